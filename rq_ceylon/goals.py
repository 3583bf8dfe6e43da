"""Goals as data: each condition with its policies and deadline, compiled for the scripts that judge it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any, get_args

from rq_ceylon.errors import InvalidInputError
from rq_ceylon.expression import (
    CALL,
    Share,
    comparisons,
    counter_words,
    listed,
    parse,
)
from rq_ceylon.models import Goal, GoalPolicy, GoalStatus, check_id, seconds
from rq_ceylon.views import Counters, GoalView

MAX_GOALS = 16
MAX_MESSAGE = 1000


@dataclass(frozen=True, slots=True, kw_only=True)
class CompiledGoal:
    """
    A goal that was checked, as the store keeps it.

    Attributes:
        program: of `when`; `CALL` for a goal that a callable judges.
        fail_program: of `fail_when`; empty if there is none.
        deadline_ms: counted from the group's start; 0: none.
        when, call: the expression, or the callable's name; the other is None.
    """

    name: str
    program: str
    fail_program: str = ""
    on_achieved: str = "continue"
    on_failed: str = "continue"
    deadline_ms: int = 0
    when: str | None = None
    call: str | None = None
    fail_when: str | None = None
    success_message: str | None = None
    failure_message: str | None = None

    def to_json(self) -> dict[str, Any]:
        """Everything that is set."""
        return {key: value for key, value in asdict(self).items() if value not in (None, "", 0)}


def compile_goals(goal: Goal | str | Sequence[Goal | str] | None) -> list[CompiledGoal]:
    """
    Check the goals of a group, name them, and compile their expressions.

    Raises:
        InvalidInputError: naming the goal, its field and the remedy.
    """
    if goal is None:
        return []
    if isinstance(goal, Goal | str):
        goal = [goal]
    if not isinstance(goal, Sequence):
        raise InvalidInputError(f"goal: {goal!r} is not a goal; give an expression, a Goal, or a list of them")
    if len(goal) > MAX_GOALS:
        raise InvalidInputError(f"goal: {len(goal)} goals; give a group at most {MAX_GOALS}")
    compiled: list[CompiledGoal] = []
    for position, item in enumerate(goal, 1):
        done = _compile(item, position)
        if any(done.name == other.name for other in compiled):
            raise InvalidInputError(f"goal: two goals are named {done.name!r}; give each its own name")
        compiled.append(done)
    return compiled


def _compile(goal: Goal | str, position: int) -> CompiledGoal:
    if isinstance(goal, str):
        goal = Goal(goal)
    if not isinstance(goal, Goal):
        raise InvalidInputError(f"goal: {goal!r} is not a goal; give an expression or a Goal")
    name = f"goal{position if position > 1 else ''}" if goal.name is None else check_id(goal.name, "goal name")
    label = f'goal "{name}"'
    if (goal.when is None) == (goal.call is None):
        found = "neither when nor call" if goal.when is None else "both when and call"
        raise InvalidInputError(f"{label}: {found} is given; give an expression (when), or a callable's name (call)")
    when = None if goal.when is None else parse(goal.when, f"{label} when")
    fail_when = None if goal.fail_when is None else parse(goal.fail_when, f"{label} fail_when")
    return CompiledGoal(
        name=name,
        program=when.program if when else CALL,
        fail_program=fail_when.program if fail_when else "",
        on_achieved=_policy(goal.on_achieved, f"{label} on_achieved"),
        on_failed=_policy(goal.on_failed, f"{label} on_failed"),
        deadline_ms=_deadline_ms(goal, f"{label} deadline"),
        when=when.text if when else None,
        call=None if goal.call is None else check_id(goal.call, f"{label} call"),
        fail_when=fail_when.text if fail_when else None,
        success_message=_message(goal.success_message, f"{label} success_message"),
        failure_message=_message(goal.failure_message, f"{label} failure_message"),
    )


def _policy(value: object, name: str) -> str:
    if value not in get_args(GoalPolicy):
        raise InvalidInputError(f"{name}: {value!r} is not a policy; use {listed(get_args(GoalPolicy))}")
    return str(value)


def _deadline_ms(goal: Goal, name: str) -> int:
    if goal.deadline is None:
        return 0
    after = seconds(goal.deadline, name)
    if after <= 0:
        raise InvalidInputError(f"{name}: {goal.deadline!r} leaves no time; give more than 0, or leave it out")
    return max(1, round(after * 1000))


def _message(value: object, name: str) -> str | None:
    if value is not None and not isinstance(value, str):
        raise InvalidInputError(f"{name}: {value!r} is not text; write a sentence")
    if value is not None and len(value) > MAX_MESSAGE:
        raise InvalidInputError(f"{name}: the message has {len(value)} characters; write at most {MAX_MESSAGE}")
    return value


def impossible_words(goal: CompiledGoal, counters: Counters) -> str:
    """Why a group is refused whose goal is impossible from the start, and the remedy."""
    label, tasks = f'goal "{goal.name}"', counter_words(counters.total, "total")
    expression = parse(goal.when or "", label)
    for comparison in comparisons(expression._node):
        is_bounded = comparison.is_reach and comparison.counter not in ("attempts", "crashes")
        if is_bounded and comparison.edge(counters.total) > counters.total:
            remedy = "lower the share" if isinstance(comparison.other, Share) else "lower the number or add tasks"
            return f"{label}: {goal.when} can never hold: the group has {tasks}; {remedy}"
    return f"{label}: {goal.when} can never hold, whatever becomes of the group's {tasks}; correct the expression"


def how_settled(goal: GoalView) -> str:
    """What settled a goal, for people: `1 of 5 completed, 3 needed, 3 failed; it can no longer hold`."""
    assert goal.settled is not None
    counters = goal.settled.counters
    if goal.call:
        words = f"{counters.completed} of {counters.total} completed"
    else:
        words = parse(goal.when, goal.name).words(counters)
    if goal.status is not GoalStatus.ACHIEVED and counters.failed and "failed" not in goal.when:
        words += f", {counters.failed} failed"
    if goal.settled.by == "deadline":
        return f"{words}; its deadline has passed"
    if goal.call:
        return f"{words}; {goal.when}"
    if goal.status is GoalStatus.ACHIEVED:
        return words
    return f"{words}; {goal.fail_when} holds" if goal.settled.by == "fail_when" else f"{words}; it can no longer hold"
