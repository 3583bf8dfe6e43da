"""
Goals: what an expression compiles to, what it says to people, what is refused and how, and that the rules of the
evaluator, here in Python, agree with brute force over every outcome.
"""

import json
import re
from datetime import timedelta
from functools import partial
from typing import Any

import pytest
from goal_oracle import (
    check_exact,
    check_sound,
    comparisons,
    expressions,
    interval_verdict,
    oracle,
    small_counters,
)
from hypothesis import given, settings
from hypothesis import strategies as st

from rq_ceylon.errors import InvalidInputError
from rq_ceylon.expression import CALL, GOAL_COUNTERS, parse
from rq_ceylon.goals import CompiledGoal, compile_goals, impossible_words
from rq_ceylon.models import Goal
from rq_ceylon.views import Counters


def counters(total: int = 200, **counts: int) -> Counters:
    pending = total - sum(counts.get(name, 0) for name in ("completed", "failed", "cancelled", "in_progress"))
    return Counters(total=total, pending=pending, **counts)


def refusal(text: Any) -> str:
    with pytest.raises(InvalidInputError) as caught:
        parse(text, "when")
    assert str(caught.value).startswith("when: ")
    return str(caught.value)


# Programs.


@pytest.mark.parametrize(
    ("text", "program"),
    [
        ("completed >= 5", "completed,5,>="),
        ("completed>=5", "completed,5,>="),
        ("\n  failed\n< 10 ", "failed,10,<"),
        ("5 <= completed", "completed,5,>="),
        ("0 > failed", "failed,0,<"),
        ("completed > failed", "completed,failed,>"),
        ("007 < attempts", "attempts,7,>"),
        ("completed >= 95%", "completed,100,*,total,95,*,>="),
        ("95 % <= completed", "completed,100,*,total,95,*,>="),
        ("completed >= 99.5%", "completed,1000,*,total,995,*,>="),
        ("completed >= 99.50%", "completed,1000,*,total,995,*,>="),
        ("completed >= 95.00%", "completed,100,*,total,95,*,>="),
        ("failed < 0.0001%", "failed,1000000,*,total,1,*,<"),
        ("attempts <= 250%", "attempts,100,*,total,250,*,<="),
        ("failed <= 0%", "failed,0,<="),
        ("completed >= 1 and failed < 2", "completed,1,>=,failed,2,<,and"),
        ("total>1 or total>2 and total>3", "total,1,>,total,2,>,total,3,>,and,or"),
        ("(total>1 or total>2) and total>3", "total,1,>,total,2,>,or,total,3,>,and"),
        ("not total>1 and total>2", "total,1,<=,total,2,>,and"),
        ("not (total>1 and total>2)", "total,1,<=,total,2,<=,or"),
        ("not not total>1", "total,1,>"),
        ("total>1 and total>2 and total>3", "total,1,>,total,2,>,and,total,3,>,and"),
        ("total>1 and (total>2 and total>3)", "total,1,>,total,2,>,total,3,>,and,and"),
        ("completed >= 1000000000000", "completed,1000000000000,>="),
        ("attempts < 999999999999.5%", "attempts,1000,*,total,9999999999995,*,<"),
    ],
)
def test_an_expression_compiles_to_reverse_polish(text: str, program: str) -> None:
    assert parse(text, "when").program == program


def test_an_expression_knows_its_text_in_single_spaces() -> None:
    expression = parse(" completed >= 95%\n  and not failed>2", "when")

    assert expression.text == "completed >= 95% and not failed>2"
    assert parse(expression.text, "when") == expression


# Words.


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("completed >= 5", "3 of 200 completed, 5 needed"),
        ("completed > 5", "3 of 200 completed, 6 needed"),
        ("completed >= 3", "3 of 200 completed, 3 needed"),
        ("completed >= 2", "3 of 200 completed, 2 needed"),
        ("completed >= 95%", "3 of 200 completed, 190 needed"),
        ("completed > 95%", "3 of 200 completed, 191 needed"),
        ("completed >= 0.75%", "3 of 200 completed, 2 needed"),
        ("failed < 10", "2 failed, fewer than 10 allowed"),
        ("failed <= 10", "2 failed, at most 10 allowed"),
        ("failed < 1", "2 failed, none allowed"),
        ("failed <= 0", "2 failed, none allowed"),
        ("failed <= 1.4%", "2 failed, at most 2 allowed"),
        ("attempts >= 10", "6 attempts, 10 needed"),
        ("crashes < 2", "1 crash, fewer than 2 allowed"),
        ("total >= 300", "200 tasks, 300 needed"),
        ("completed > failed", "3 completed, more than the 2 failed needed"),
        ("failed <= completed", "2 failed, at most the 3 completed allowed"),
        ("not failed >= 10", "2 failed, fewer than 10 allowed"),
        ("not not failed < 10", "2 failed, fewer than 10 allowed"),
        ("completed >= 95% and failed < 10", "3 of 200 completed, 190 needed; and 2 failed, fewer than 10 allowed"),
        ("not (completed < 5 or failed >= 10)", "3 of 200 completed, 5 needed; and 2 failed, fewer than 10 allowed"),
        (
            "completed >= 5 and (failed < 3 or cancelled >= 4)",
            "3 of 200 completed, 5 needed; and (2 failed, fewer than 3 allowed; or 0 of 200 cancelled, 4 needed)",
        ),
    ],
)
def test_words_say_how_far_it_is(text: str, words: str) -> None:
    now = counters(200, completed=3, failed=2, attempts=6, crashes=1)

    assert parse(text, "when").words(now) == words


@pytest.mark.parametrize(
    ("text", "mark"),
    [
        ("completed >= 5", 5),
        ("completed > 5", 6),
        ("5 < completed", 6),
        ("completed >= 95%", 190),
        ("completed >= 99.9%", 200),
        ("completed > 50%", 101),
        ("failed < 3 and completed >= 7 and completed >= 8", 7),
        ("not (completed < 9)", 9),
        ("completed > failed or completed >= 4", 4),
        ("failed >= 3", None),
        ("completed <= 3", None),
        ("not completed >= 3", None),
        ("completed > failed", None),
    ],
)
def test_the_mark_is_where_the_first_comparison_of_completed_begins_to_hold(text: str, mark: int | None) -> None:
    assert parse(text, "when").mark(200) == mark


@given(text=comparisons(), now=small_counters())
def test_the_mark_is_the_least_count_that_satisfies_the_comparison(text: str, now: Counters) -> None:
    mark = parse(text, "when").mark(now.total)
    if mark is None or mark > 10**5:
        return

    def holds(completed: int) -> bool | None:
        # The total stays, so a share does; the counters need not sum up for a comparison.
        return interval_verdict(parse(text, "when").program, Counters(total=now.total, completed=completed))

    assert holds(mark) is True
    assert holds(mark - 1) is False


# Refusals.


@pytest.mark.parametrize(
    ("text", "column", "says"),
    [
        ("completed == 5", 11, "can jump over a number"),
        ("failed=0", 7, "<= to stay within it"),
        ("failed != 0", 8, "can jump over a number"),
        ("failed <> 0", 8, "can jump over a number"),
        ("waiting < 1", 1, "waiting can fall again"),
        ("completed > pending", 13, "pending can fall again"),
        ("in_progress < 1", 1, "use total, completed, failed, cancelled, attempts or crashes"),
        ("complete >= 5", 1, "did you mean completed?"),
        ("Completed >= 5", 1, "did you mean completed?"),
        ("canceled > 1", 1, "did you mean cancelled?"),
        ("completed > 5 AND failed < 2", 15, "did you mean and?"),
        ("done >= 5", 1, "the counters are total, completed"),
        ("completed >= 5 && failed < 2", 16, "write and"),
        ("completed ≥ 5", 11, "write >="),
        ("completed => 5", 11, "write >="),
        ("completed", 1, "compare it, such as completed >= 5"),
        ("failed < 2 and attempts", 16, "such as attempts >= 5"),
        ("95%", 1, "such as completed >= 95%"),
        ("not 5", 5, "such as completed >= 5"),
        ("1 < completed < 5", 15, "write two, joined with and"),
        ("5 >= 3", 1, "both fixed"),
        ("5% >= 3", 1, "both fixed"),
        ("5% >= 3%", 1, "both fixed"),
        ("completed >= completed", 1, "compared with itself"),
        ("total >= 50%", 1, "a share of total itself"),
        ("50% >= total", 8, "a share of total itself"),
        ("completed >= 0.95", 14, "a share of total such as 95%"),
        ("completed >= 1e3", 15, "e3 is not known here"),
        ("completed >= -5", 14, "'-' is not known here"),
        ("completed + failed >= 5", 11, "'+' is not known here"),
        ("completed >= ٣", 14, "is not known here"),
        ("completed >= 99.12345%", 14, "at most 4 decimals"),
        ("completed >= 1000000000001", 14, "at most 1000000000000"),
        ("completed >= 1000000000000.1%", 14, "at most 1000000000000"),
        ("completed >= " + "9" * 400, 14, "at most 1000000000000"),
        ("(completed >= 5", 16, "opened at column 1"),
        ("completed >= 5)", 15, "closes nothing"),
        ("(completed) >= 5", 2, "completed alone is not a condition"),
        ("(completed > 1) > 2", 17, "a condition cannot be compared"),
        ("completed >=  ", 13, "the expression ends"),
        ("completed > 5 or", 17, "the expression ends"),
        ("completed > and 5", 13, "and stands where"),
        ("()", 2, ") stands where"),
        ("completed > 5 failed < 2", 15, "join conditions with and, or"),
        ("completed > 5 not failed < 2", 15, "join conditions with and, or"),
        ("__import__('os').system('id')", 1, "__import__ is not known here"),
    ],
)
def test_a_refusal_names_the_column_the_expression_and_the_remedy(text: str, column: int, says: str) -> None:
    message = refusal(text)

    assert f"(column {column} of {text!r}); " in message
    assert says in message


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("", "the expression is empty"),
        (" \n ", "the expression is empty"),
        (None, "None is not an expression"),
        (5, "5 is not an expression"),
        (True, "True is not an expression"),
    ],
)
def test_what_is_no_expression_at_all_is_refused(text: Any, says: str) -> None:
    assert says in refusal(text)


def test_an_expression_has_at_most_512_characters() -> None:
    text = "completed >= 5".ljust(512)

    assert parse(text, "when").text == "completed >= 5"
    assert "513 characters; write at most 512" in refusal(text + " ")


def test_an_expression_has_at_most_64_operations() -> None:
    many = " or ".join(["total>1"] * 32)

    assert parse("not " + many, "when").program.count(",") == 32 * 3 + 31 - 1
    assert "65 operations, at most 64" in refusal("not not " + many)
    assert "65 operations, at most 64" in refusal(" or ".join(["failed<1%"] * 16) + " and total>1")


def test_an_expression_is_at_most_16_deep() -> None:
    assert parse("(" * 16 + "total>1" + ")" * 16, "when").program == "total,1,>"
    assert parse("not " * 16 + "total>1", "when").program == "total,1,>"
    assert "nested more than 16 deep (column 17 of" in refusal("(" * 17 + "total>1" + ")" * 17)
    assert "nested more than 16 deep (column 65 of" in refusal("not " * 17 + "total>1")
    assert "nested more than 16 deep" in refusal("(" * 512)


_PIECES = [
    *GOAL_COUNTERS,
    "and",
    "or",
    "not",
    "(",
    ")",
    ">=",
    "<",
    "==",
    "5",
    "95%",
    "0.5",
    "%",
    "waiting",
    "!",
    "é",
    "\n",
]


@given(text=st.one_of(st.text(max_size=60), st.lists(st.sampled_from(_PIECES), max_size=12).map(" ".join)))
def test_any_text_is_either_read_or_refused_in_our_words(text: str) -> None:
    try:
        expression = parse(text, "when")
    except InvalidInputError:
        assert re.match(r"when: .+; .+", refusal(text))
        return

    # What is read is a program of known tokens, with no separator of the store in it.
    assert re.fullmatch(r"(([a-z]+|[0-9]+|[<>]=?|\*),)*(and|or|[<>]=?)", expression.program)


# Verdicts. The same properties are run on the evaluator in Lua.


@given(text=expressions(), now=small_counters())
@settings(max_examples=400)
def test_intervals_never_contradict_brute_force(text: str, now: Counters) -> None:
    check_sound(interval_verdict, text, now)


@given(text=expressions(), now=small_counters(closing=True))
@settings(max_examples=200)
def test_intervals_never_contradict_brute_force_in_a_closing_group(text: str, now: Counters) -> None:
    check_sound(partial(interval_verdict, closing=True), text, now, closing=True)


@given(text=comparisons(), now=small_counters())
@settings(max_examples=400)
def test_intervals_equal_brute_force_for_single_comparisons(text: str, now: Counters) -> None:
    check_exact(interval_verdict, text, now)


@given(text=comparisons(), now=small_counters(closing=True))
@settings(max_examples=200)
def test_intervals_equal_brute_force_for_single_comparisons_in_a_closing_group(text: str, now: Counters) -> None:
    check_exact(partial(interval_verdict, closing=True), text, now, closing=True)


@pytest.mark.parametrize(
    ("text", "now", "verdict"),
    [
        ("completed >= 5", counters(6, completed=4, failed=1), None),
        ("completed >= 5", counters(6, completed=5, failed=1), True),
        ("completed >= 5", counters(6, completed=4, failed=2), False),
        ("completed >= 5", counters(6, completed=3, failed=2), False),
        ("failed <= 2", counters(6, completed=3, failed=2), None),
        ("failed <= 2", counters(6, completed=4, failed=2), True),
        ("failed <= 2", counters(6, completed=4), True),
        ("failed <= 2", counters(6, failed=3), False),
        ("completed >= 95%", counters(20, completed=18), None),
        ("completed >= 95%", counters(20, completed=19), True),
        ("completed >= 95%", counters(20, failed=2), False),
        ("attempts <= 5", counters(2, completed=1, attempts=5), None),
        ("attempts <= 5", counters(2, completed=2, attempts=5), True),
        ("attempts <= 5", counters(2, completed=1, attempts=6), False),
        ("completed >= 1", Counters(), False),
        ("completed >= 95%", Counters(), True),
    ],
)
def test_a_goal_is_decided_as_soon_as_it_is_certain(text: str, now: Counters, verdict: bool | None) -> None:
    assert oracle(text, now) is verdict
    assert interval_verdict(parse(text, "when").program, now) is verdict


def test_a_failure_in_a_closing_group_no_longer_raises_failed() -> None:
    now = Counters(total=3, in_progress=1, failed=2)

    assert oracle("failed < 3", now) is None
    assert oracle("failed < 3", now, closing=True) is True
    assert interval_verdict("failed,3,<", now) is None
    assert interval_verdict("failed,3,<", now, closing=True) is True


def test_a_called_goal_is_never_decided_by_the_evaluator() -> None:
    assert interval_verdict(CALL, Counters(total=1, completed=1)) is None


# Goals of a group.


def test_text_is_short_for_a_goal_and_names_are_given_by_position() -> None:
    assert compile_goals(()) == []
    assert compile_goals("completed >= 5") == compile_goals([Goal("completed >= 5")])
    assert compile_goals("completed >= 5") == [
        CompiledGoal(name="goal", program="completed,5,>=", when="completed >= 5")
    ]
    goals = compile_goals(["completed > 1", Goal("completed > 2", name="more"), "completed > 3"])

    assert [goal.name for goal in goals] == ["goal", "more", "goal3"]


FULL = Goal(
    "completed >=\n  95%",
    name="fast",
    deadline="1m30s",
    fail_when="failed > 3",
    on_achieved="cancel",
    on_failed="drain",
    success_message="Done in time",
    failure_message="Too many failures",
)


def test_a_goal_is_compiled_whole() -> None:
    assert compile_goals(FULL) == [
        CompiledGoal(
            name="fast",
            program="completed,100,*,total,95,*,>=",
            fail_program="failed,3,>",
            on_achieved="cancel",
            on_failed="drain",
            deadline_ms=90_000,
            when="completed >= 95%",
            call=None,
            fail_when="failed > 3",
            success_message="Done in time",
            failure_message="Too many failures",
        )
    ]


def test_a_callable_goal_may_have_an_expression_that_fails_it() -> None:
    [goal] = compile_goals(Goal(call="good_enough", fail_when="failed > 3"))

    assert goal == CompiledGoal(
        name="goal", program="call", call="good_enough", fail_program="failed,3,>", fail_when="failed > 3"
    )


@pytest.mark.parametrize("goal", [FULL, Goal("completed > 1"), Goal(call="good_enough")])
def test_a_compiled_goal_goes_through_json_unchanged(goal: Goal) -> None:
    [compiled] = compile_goals(goal)

    assert CompiledGoal(**json.loads(json.dumps(compiled.to_json()))) == compiled
    assert None not in compiled.to_json().values()


@pytest.mark.parametrize(
    ("deadline", "ms"), [(2, 2000), (0.25, 250), ("2m", 120_000), (timedelta(hours=1), 3_600_000), (0.0001, 1)]
)
def test_a_deadline_is_in_milliseconds_and_never_rounded_to_none(deadline: Any, ms: int) -> None:
    assert compile_goals(Goal("completed > 1", deadline=deadline))[0].deadline_ms == ms


@pytest.mark.parametrize(
    ("goal", "says"),
    [
        (7, "goal: 7 is not a goal"),
        ({"when": "completed > 1"}, "is not a goal; give an expression, a Goal, or a list of them"),
        ([5], "goal: 5 is not a goal"),
        (Goal(), 'goal "goal": neither when nor call is given'),
        (Goal("completed > 1", call="check"), 'goal "goal": both when and call is given'),
        (Goal("completed > 1", name="a b"), "goal name: 'a b' is not usable"),
        (Goal("completed > 1", name=""), "goal name: '' is not usable"),
        (Goal(call="a.b:c d"), "goal \"goal\" call: 'a.b:c d' is not usable"),
        (["completed > 1", "completed == 2"], 'goal "goal2" when: == cannot be decided'),
        (Goal("completed > 1", name="x", fail_when="failed"), 'goal "x" fail_when: failed alone'),
        (Goal("completed > 1", fail_when=""), 'goal "goal" fail_when: the expression is empty'),
        (Goal("completed > 1", deadline="soon"), "goal \"goal\" deadline: 'soon' is not a duration"),
        (Goal("completed > 1", deadline=0), 'goal "goal" deadline: 0 leaves no time'),
        (
            Goal("completed > 1", on_achieved="stop"),  # type: ignore[arg-type]
            "goal \"goal\" on_achieved: 'stop' is not a policy; use continue, drain or cancel",
        ),
        (Goal("completed > 1", on_failed=None), 'goal "goal" on_failed: None is not a policy'),  # type: ignore[arg-type]
        (Goal("completed > 1", success_message=5), 'goal "goal" success_message: 5 is not text'),  # type: ignore[arg-type]
        (Goal("completed > 1", failure_message="x" * 1001), "has 1001 characters; write at most 1000"),
        ([Goal("completed > 1", name="goal2"), "completed > 2"], "two goals are named 'goal2'"),
        (["completed > 1"] * 17, "17 goals; give a group at most 16"),
    ],
)
def test_a_goal_that_cannot_be_used_is_refused_with_its_field(goal: Any, says: str) -> None:
    with pytest.raises(InvalidInputError) as caught:
        compile_goals(goal)

    assert says in str(caught.value)


def test_a_group_has_at_most_16_goals() -> None:
    assert len(compile_goals(["completed > 1"] * 16)) == 16


@pytest.mark.parametrize(
    ("text", "total", "words"),
    [
        ("completed >= 5", 4, "completed >= 5 can never hold: the group has 4 tasks; lower the number or add tasks"),
        (
            "failed < 9 and completed>1",
            1,
            "failed < 9 and completed>1 can never hold: the group has 1 task; lower the number or add tasks",
        ),
        ("completed >= 101%", 4, "completed >= 101% can never hold: the group has 4 tasks; lower the share"),
        (
            "failed < 2 and failed > 3",
            4,
            "failed < 2 and failed > 3 can never hold, whatever becomes of the group's 4 tasks; correct the expression",
        ),
    ],
)
def test_a_refused_goal_is_explained(text: str, total: int, words: str) -> None:
    [goal] = compile_goals(text)

    assert impossible_words(goal, counters(total)) == f'goal "goal": {words}'
