"""Registered functions: their names and rules, their arguments and results as JSON, and what a handler knows."""

from __future__ import annotations

import math
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from datetime import date, datetime, timedelta
from enum import StrEnum
from functools import partial, wraps
from types import FunctionType
from typing import TYPE_CHECKING, Annotated, Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import BaseModel, ConfigDict, Field
from pydantic_core import from_json, to_json

from rq_ceylon.attempt import AttemptStoppedError, Backoff, FailTask, RetryTask, TaskContext, said, says_stopped
from rq_ceylon.errors import InvalidInputError, UnknownTaskError
from rq_ceylon.handlers import Handler, Registry

if TYPE_CHECKING:
    from nowhere import Missing  # type: ignore[import-not-found]


class Colour(StrEnum):
    RED = "red"


@dataclass
class Point:
    x: int
    y: int = 0


class Strict(BaseModel):
    model_config = ConfigDict(strict=True)
    day: date
    first: int = Field(alias="1st")


class Opaque:
    pass


def context(**changes: Any) -> TaskContext:
    fields: dict[str, Any] = {
        "group_id": "g",
        "task_id": "t",
        "uses": "x",
        "role": "r",
        "worker": "w",
        "attempt": 2,
        "max_attempts": 3,
        "crashes": 0,
        "fence": 7,
    }
    return TaskContext(**{**fields, **changes})


def refusal(call: Callable[..., Any], *args: Any, **kwargs: Any) -> str:
    with pytest.raises(InvalidInputError) as caught:
        call(*args, **kwargs)
    return str(caught.value)


async def resize(path: str, width: int, *, when: datetime | None = None, tags: list[str] | None = None) -> Point:
    return Point(width)


RESIZE: Handler[..., Any] = Handler("resize", resize)


def loose(value, other=1, **more):  # type: ignore[no-untyped-def]
    return value


LOOSE: Handler[..., Any] = Handler("loose", loose)


def test_a_call_binds_as_python_would_and_becomes_json() -> None:
    assert RESIZE.arguments("a.jpg", "64", when=datetime(2026, 1, 2, 3)) == {
        "path": "a.jpg",
        "width": 64,
        "when": "2026-01-02T03:00:00",
    }


@pytest.mark.parametrize(
    ("args", "kwargs", "problem"),
    [
        ((), {"path": "a"}, "task 'resize': argument 'width' is missing"),
        (("a", 1, 2), {}, "takes 2 positional arguments, 3 were given"),
        (("a", 1), {"path": "b"}, "argument 'path' is given twice"),
        (("a",), {"widht": 1, "width": 1}, "argument 'widht' is unknown; did you mean 'width'?"),
        (("a", "wide"), {}, "argument 'width': Input should be a valid integer"),
        (("a", 1), {"tags": ["x", 5]}, "argument 'tags[1]': Input should be a valid string, not 5"),
    ],
)
def test_a_wrong_call_names_the_task_and_the_argument(args: Any, kwargs: Any, problem: str) -> None:
    message = refusal(RESIZE.arguments, *args, **kwargs)

    assert message.startswith("task 'resize': ")
    assert problem in message


def test_all_problems_of_a_call_are_named_at_once() -> None:
    message = refusal(RESIZE.arguments, width="x", tags=3)

    assert all(f"argument {name!r}" in message for name in ("path", "width", "tags"))


@pytest.mark.parametrize(
    ("value", "problem"),
    [
        ({"a": [1, Opaque()]}, "argument 'value.a[1]': a Opaque is not JSON; annotate it with its type"),
        (datetime(2026, 1, 1), "argument 'value': a datetime is not JSON"),
        ([math.nan], "argument 'value[0]': nan is not JSON"),
        ({1: 2}, "argument 'value': the key 1 is not text"),
        ("\ud800", "argument 'value': text with half a surrogate pair"),
        pytest.param(10**5000, "argument 'value': the number has over 4,000 digits", id="long"),
        (b"x", "argument 'value': a bytes is not JSON"),
    ],
)
def test_what_is_not_json_is_refused_with_its_place(value: Any, problem: str) -> None:
    assert problem in refusal(LOOSE.arguments, value)


def test_a_value_inside_itself_is_refused() -> None:
    endless: list[Any] = []
    endless.append(endless)

    assert "nested more than 100 levels deep, or inside itself" in refusal(LOOSE.arguments, endless)


def test_an_open_place_in_an_annotation_is_refused_with_its_path() -> None:
    def take(options: dict[str, Any]) -> None: ...

    options = {"a": [datetime(2026, 1, 1), Opaque()]}

    assert "argument 'options.a[0]'" in refusal(Handler("take", take).arguments, options=options)


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=10,
)


@given(value=json_values)
def test_json_values_come_back_as_they_were(value: Any) -> None:
    arguments = LOOSE.arguments(value)

    assert LOOSE.call_arguments(from_json(to_json(arguments)), None) == {"value": value}
    assert from_json(LOOSE.dump_result(value)) == value


def test_json_values_are_copied_so_that_later_changes_do_not_travel() -> None:
    given_list = [1, [2, "red"]]

    arguments = LOOSE.arguments(given_list)
    given_list.append(3)

    assert arguments == {"value": [1, [2, "red"]]}


def test_annotated_values_come_back_as_their_types() -> None:
    def typed(point: Point, colour: Colour, wait: timedelta, strict: Strict, many: set[int]) -> None: ...

    handler = Handler("typed", typed)
    strict = Strict.model_validate({"day": date(2026, 1, 2), "1st": 1})
    call = {"point": Point(1, 2), "colour": Colour.RED, "wait": timedelta(seconds=5), "strict": strict, "many": {1}}

    raw = from_json(to_json(handler.arguments(**call)))

    assert handler.call_arguments(raw, None) == call
    assert handler.check(raw) == raw


def test_values_from_a_file_are_checked_and_made_regular() -> None:
    assert RESIZE.check({"path": "a", "width": "64"}) == {"path": "a", "width": 64}
    assert "argument 'width': " in refusal(RESIZE.check, {"path": "a", "width": "x"})
    assert "argument 'width' is missing" in refusal(RESIZE.check, {"path": "a"})


def test_constraints_in_annotations_are_checked() -> None:
    def take(width: Annotated[int, Field(gt=0)]) -> None: ...

    assert "argument 'width': Input should be greater than 0, not -1" in refusal(Handler("take", take).arguments, -1)


def test_extra_keyword_arguments_pass_with_their_type() -> None:
    def take(**sizes: int) -> None: ...

    handler = Handler("take", take)

    assert handler.arguments(a="1") == {"a": 1}
    assert "argument 'b': Input should be a valid integer" in refusal(handler.arguments, b="x")
    assert LOOSE.arguments(1, extra=2) == {"value": 1, "extra": 2}


def test_the_context_is_never_an_argument_and_always_passed() -> None:
    def take(context: TaskContext, path: str) -> None: ...

    handler = Handler("take", take)
    given_context = context()

    assert handler.arguments("a") == {"path": "a"}
    assert handler.call_arguments({"path": "a"}, given_context) == {"path": "a", "context": given_context}
    assert "argument 'context' is given by the worker" in refusal(handler.arguments, "a", context=given_context)


def test_an_optional_context_is_recognized() -> None:
    def take(context: TaskContext | None = None) -> None: ...

    assert list(Handler("take", take).call_arguments({}, context())) == ["context"]


def test_a_context_imported_for_type_checkers_only_is_recognized() -> None:
    def with_context(context: TaskContext) -> None: ...

    names: dict[str, Any] = {"__name__": "elsewhere"}
    take = FunctionType(with_context.__code__, names)
    take.__annotations__ = {"context": "TaskContext"}

    assert Handler("take", take).arguments() == {}


def test_what_cannot_be_resolved_counts_as_any_and_does_not_spoil_the_rest() -> None:
    def take(first: Missing, second: int) -> Missing: ...

    assert Handler("take", take).arguments({"x": 1}, "2") == {"first": {"x": 1}, "second": 2}


def test_a_type_that_json_cannot_make_is_refused_by_name() -> None:
    def take(thing: Opaque) -> None: ...

    assert "argument 'thing': " in refusal(Handler("take", take).arguments, Opaque())


@pytest.mark.parametrize(
    ("function", "problem"),
    [
        (lambda a, /: a, "parameter a can only be passed by position"),
        (lambda *many: many, "parameter *many can only be passed by position"),
        (lambda: (yield), "yields; return one value instead"),
    ],
)
def test_functions_that_cannot_be_called_by_name_are_refused(function: Callable[..., Any], problem: str) -> None:
    assert problem in refusal(Handler, "x", function)


@pytest.mark.parametrize(
    ("function", "problem"),
    [
        (resize, "is async; cpu=True needs a plain function"),
        (lambda: 1, "cannot be imported by a child process"),
        (partial(loose, 1), "cannot be imported by a child process"),
    ],
)
def test_what_a_process_cannot_run_is_refused(function: Callable[..., Any], problem: str) -> None:
    assert problem in refusal(Handler, "x", function, cpu=True)


@pytest.mark.parametrize(
    "rules",
    [
        {"name": "a b"},
        {"aliases": ["{x}"]},
        {"role": ""},
        {"timeout": 0},
        {"timeout": -1},
        {"max_attempts": 0},
        {"max_attempts": True},
        {"max_crashes": -1},
        {"max_crashes": 0.5},
        {"priority": "urgent"},
        {"retry": {"ValueError": None}},
        {"retry": {ValueError: "5s"}},
        {"retry": {SystemExit: None}},
    ],
)
def test_rules_that_cannot_be_used_are_refused(rules: dict[str, Any]) -> None:
    refusal(partial(Handler, **{"name": "x", "function": loose, **rules}))


def test_the_kind_follows_from_the_function() -> None:
    class Callable_:
        async def __call__(self) -> None: ...

    functions: list[Any] = [resize, partial(resize, "a"), Callable_(), loose, partial(loose, 1)]

    assert [Handler("x", function).kind for function in functions] == ["async"] * 3 + ["thread"] * 2
    assert Handler("x", loose, cpu=True).kind == "process"


def test_a_result_comes_back_as_the_annotated_type() -> None:
    assert RESIZE.dump_result(Point(3)) == b'{"x":3,"y":0}'
    assert RESIZE.load_result({"x": 3, "y": 4}) == Point(3, 4)


def test_a_result_without_annotation_stays_as_it_is() -> None:
    value = {"a": [1]}

    assert LOOSE.load_result(value) is value


def test_a_result_that_is_not_json_or_not_as_annotated_is_refused() -> None:
    assert "task 'loose': result[0]: a Opaque is not JSON" in refusal(LOOSE.dump_result, [Opaque()])
    assert "task 'resize': result" in refusal(RESIZE.dump_result, "text")
    assert "task 'resize': result.x: Input should be a valid integer" in refusal(RESIZE.load_result, {"x": "a"})


def test_a_return_annotation_that_pydantic_does_not_know_leaves_it_to_the_value() -> None:
    def take() -> Opaque: ...  # type: ignore[empty-body]

    assert Handler("take", take).dump_result({"a": 1}) == b'{"a":1}'


def test_the_backoff_doubles_up_to_its_cap() -> None:
    backoff = Backoff("1s", cap="10s", jitter=False)

    assert [backoff.delay_s(attempt) for attempt in (1, 2, 3, 4, 5, 5000)] == [1, 2, 4, 8, 10, 10]


def test_jitter_chooses_between_half_and_all_of_the_delay() -> None:
    delays = [Backoff("10s").delay_s(2) for _ in range(500)]

    assert 10 <= min(delays) < 12
    assert 18 < max(delays) <= 20


@pytest.mark.parametrize("fields", [{"first": "soon"}, {"cap": -1}, {"factor": 0.5}, {"factor": math.nan}])
def test_a_backoff_that_cannot_be_used_is_refused(fields: dict[str, Any]) -> None:
    refusal(partial(Backoff, **fields))


def wait_s(handler: Handler[..., Any], *errors: Exception, attempt: int = 1) -> float | None:
    error = errors[0] if len(errors) == 1 else ExceptionGroup("several", errors)
    return handler.wait_s(said(error), attempt)


def test_the_most_specific_exception_type_decides_the_rule() -> None:
    slow = Backoff("1m", jitter=False)
    handler = Handler("x", loose, retry={OSError: slow, ConnectionError: None}, backoff=Backoff("2s", jitter=False))

    assert wait_s(handler, ConnectionResetError()) is None
    assert wait_s(handler, FileNotFoundError(), attempt=2) == 120
    assert wait_s(handler, KeyError(), attempt=3) == 8
    assert wait_s(handler, RetryTask("5s")) == 5
    assert wait_s(handler, FailTask("no")) is None


@pytest.mark.parametrize(
    ("written", "expected"), [(1e300, 10 * 365 * 86400), (math.inf, 10 * 365 * 86400), (-1.0, 0), (math.nan, 0)]
)
def test_the_delay_of_a_retry_is_kept_within_what_a_duration_may_be(written: float, expected: float) -> None:
    error = RetryTask("5s")
    error.delay_s = written

    assert wait_s(Handler("x", loose), error) == expected


class Many(ExceptionGroup[Exception]):
    pass


@pytest.mark.parametrize(
    ("errors", "expected"),
    [
        ([FailTask("a"), FailTask("b")], None),
        ([FailTask("a"), ExceptionGroup("inner", [FailTask("b"), ConnectionResetError()])], None),
        ([FailTask("a"), KeyError("b")], 2),
        ([FailTask("a"), RetryTask("7s")], 7),
        ([ConnectionResetError(), KeyError("b")], 2),
        ([RetryTask("1s"), RetryTask("5s"), ExceptionGroup("inner", [RetryTask("9s")])], 9),
        ([RetryTask("1s"), KeyError("b")], 2),
        ([RetryTask(), KeyError("b")], 2),
        ([FileNotFoundError(), KeyError("b")], 60),
        ([Many("rule", [KeyError("b")]), KeyError("c")], 2),
        ([Many("rule", [KeyError("b")]), Many("rule", [FileNotFoundError()])], None),
    ],
    ids=repr,
)
def test_a_group_of_exceptions_fails_at_once_only_if_all_say_so(
    errors: list[Exception], expected: float | None
) -> None:
    rules = {OSError: Backoff("1m", jitter=False), ConnectionError: None, Many: None}
    handler = Handler("x", loose, retry=rules, backoff=Backoff("2s", jitter=False))

    assert wait_s(handler, *errors) == expected


def test_a_rule_for_a_type_of_groups_goes_before_those_for_their_members() -> None:
    handler = Handler("x", loose, retry={ExceptionGroup: None, KeyError: Backoff("1s")})

    assert wait_s(handler, KeyError(), KeyError("b")) is None
    assert wait_s(Handler("x", loose, retry={Exception: None}), KeyError(), KeyError("b")) is None


def test_a_group_says_stopped_if_all_its_members_do() -> None:
    stopped = AttemptStoppedError("over")

    assert says_stopped(stopped)
    assert says_stopped(BaseExceptionGroup("g", [stopped, BaseExceptionGroup("h", [stopped])]))
    assert not says_stopped(BaseExceptionGroup("g", [stopped, KeyError()]))


def test_the_exceptions_of_handlers_carry_what_they_say() -> None:
    assert RetryTask("1m", "busy").delay_s == 60
    assert RetryTask().delay_s is None
    assert str(RetryTask(reason="busy")) == FailTask("busy").reason == "busy"
    assert "RetryTask: delay" in refusal(RetryTask, "soon")


def test_a_registry_finds_handlers_by_name_and_alias() -> None:
    registry = Registry()
    handler: Handler[..., Any] = Handler("resize", resize, aliases=["scale"], role="images")
    registry.add(handler)
    registry.add(LOOSE)

    assert registry.get("scale") is registry.find("resize") is handler
    assert registry.find("nobody") is None
    assert registry.names() == ["default", "echo", "loose", "resize", "scale"]
    assert registry.roles() == ["default", "images"]


def test_an_unknown_name_is_answered_with_the_nearest_and_the_known() -> None:
    registry = Registry()
    registry.add(RESIZE)

    with pytest.raises(UnknownTaskError, match=r"'resise'; did you mean 'resize'\? registered: default, echo, resize"):
        registry.get("resise")


@pytest.mark.parametrize(("name", "aliases"), [("resize", []), ("new", ["resize"]), ("new", ["new"])])
def test_a_taken_name_is_refused_and_nothing_is_added(name: str, aliases: list[str]) -> None:
    registry = Registry()
    registry.add(RESIZE)

    assert "give one of them another name" in refusal(registry.add, Handler(name, loose, aliases=aliases))
    assert registry.names() == ["default", "echo", "resize"]


def test_only_built_in_handlers_can_be_replaced_and_only_once() -> None:
    registry = Registry()
    mine = Handler("default", loose)
    registry.add(mine)

    assert registry.get("default") is mine
    assert "is taken by" in refusal(registry.add, Handler("default", resize))
    assert Registry().get("default") is not mine


def test_a_registry_without_tasks_asks_for_no_role() -> None:
    assert Registry().roles() == []


@pytest.mark.anyio
async def test_the_built_in_handlers_sleep_and_echo() -> None:
    registry = Registry()
    sleep, echo = registry.get("default"), registry.get("echo")
    before = time.monotonic()

    await sleep.function(**sleep.call_arguments({}, context(duration=0.02)))
    answer = await echo.function(**echo.call_arguments({"a": 1}, context()))

    assert time.monotonic() - before >= 0.02
    assert answer == {"a": 1}


def test_a_context_names_its_task_the_same_way_for_every_attempt() -> None:
    assert context().id == context(attempt=1, fence=9).idempotency_key == "g/t"


def test_progress_is_kept_within_bounds_and_remembers_the_fraction() -> None:
    one = context()

    seen = [one.reported]
    for fraction, message in [(0.5, "half"), (None, "still"), (7, "x" * 1000), (-1, "")]:
        one.progress(fraction, message)
        seen.append(one.reported)

    assert seen == [(None, ""), (0.5, "half"), (0.5, "still"), (1.0, "x" * 200), (0.0, "")]


@pytest.mark.parametrize(
    ("fraction", "message", "reported"),
    [
        (0.5, "a\udcffb", (0.5, "a?b")),  # the name of a file that is no UTF-8
        (math.nan, "x", (None, "x")),
        (0.5, b"x", (0.5, "b'x'")),
    ],
)
def test_what_a_handler_says_of_its_progress_is_json_whatever_it_is(
    fraction: float, message: Any, reported: tuple[float | None, str]
) -> None:
    one = context()

    one.progress(fraction, message)

    assert one.reported == reported
    assert tuple(from_json(to_json(one.reported))) == reported


@pytest.mark.parametrize("why", ["cancelled", "lost", "shutdown", "timeout"])
def test_a_stopped_attempt_ends_at_the_next_check(why: Any) -> None:
    one = context()
    one.check_cancelled()
    assert not one.is_cancelled

    one.stopped = why

    assert one.is_cancelled
    with pytest.raises(AttemptStoppedError, match=f"g/t: this attempt is over \\({why}\\)"):
        one.check_cancelled()


def test_a_passed_deadline_ends_the_attempt_at_the_next_check() -> None:
    with pytest.raises(AttemptStoppedError, match="timeout"):
        context(deadline=time.monotonic() - 1).check_cancelled()


def test_except_exception_in_a_handler_does_not_swallow_the_end() -> None:
    assert not issubclass(AttemptStoppedError, Exception)


def test_a_handler_used_from_many_threads_at_once_gives_one_answer() -> None:
    handler: Handler[..., Any] = Handler("resize", resize)
    answers: list[Any] = []
    start = threading.Barrier(8)

    def call() -> None:
        start.wait()
        answers.append(handler.arguments("a", "5", tags=["x"]))

    threads = [threading.Thread(target=call) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()

    assert answers == [{"path": "a", "width": 5, "tags": ["x"]}] * 8


def with_session(function: Callable[..., Any]) -> Callable[..., Any]:
    @wraps(function)
    def wrapper(*args: Any, **kwargs: Any) -> Any:
        return function(*args, session="session", **kwargs)

    return wrapper


def test_an_argument_that_a_decorator_supplies_is_not_missing() -> None:
    def report(year: int, session: str, other: str) -> str:
        return f"{year} by {session}"

    handler = Handler("report", with_session(report))

    assert handler.arguments(year=2026, other="x") == {"year": 2026, "other": "x"}
    assert "argument 'other' is missing" in refusal(handler.arguments, year=2026)
    assert "argument 'session' is missing" in refusal(Handler("report", report).arguments, year=2026, other="x")


def test_a_plain_wrapper_of_a_coroutine_function_is_a_plain_function() -> None:
    """It may return a coroutine, or run it to its end: `asyncio.run` in it would fail on the event loop."""
    handler = Handler("x", with_session(resize))

    assert handler.kind == "thread"


def test_an_annotation_for_type_checkers_only_is_named_where_its_value_cannot_pass() -> None:
    def take(first: Missing) -> None: ...

    assert "its annotation 'Missing' cannot be found at run time" in refusal(Handler("take", take).arguments, Opaque())
