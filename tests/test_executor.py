"""The executor: whatever a handler does becomes one outcome, and whatever goes on in spite of it is counted."""

from __future__ import annotations

import asyncio
import json
import math
import os
import sys
import threading
import time
from asyncio.subprocess import PIPE
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager, suppress
from datetime import date
from pathlib import Path
from typing import Annotated, Any

import cpu_jobs
import pytest
from commands import ROOT, eventually, is_alive
from pydantic import BaseModel, BeforeValidator, field_serializer
from pydantic_core import core_schema, from_json
from runs import Body, Runs, assigned, error_of

from rq_ceylon.attempt import AttemptStoppedError, Backoff, FailTask, RetryTask, StopReason, TaskContext
from rq_ceylon.client import Client
from rq_ceylon.handlers import Handler, Registry
from rq_ceylon.worker.children import Children
from rq_ceylon.worker.outcome import BUSY, UNKNOWN, Outcome
from rq_ceylon.worker.places import UNBOUNDED, Places

pytestmark = pytest.mark.anyio

STEADY = Backoff(first="1s", factor=2, jitter=False)


MADE: list[Runs] = []


@pytest.fixture(autouse=True)
def _small_results(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("rq_ceylon.worker.executor.RESULT_BYTES_MAX", 1000)


@pytest.fixture(autouse=True)
async def _close_executors() -> AsyncIterator[None]:
    yield
    while MADE:
        await MADE.pop().close()


def executor_of(function: Callable[..., Any], **options: Any) -> Runs:
    """An executor that knows one handler, `job`; its backoff is 1 s, 2 s, 4 s, ... It is closed after the test."""
    own = {name: options.pop(name) for name in ("threads", "on_freed") if name in options}
    registry = Registry()
    registry.add(Handler("job", function, **{"backoff": STEADY, **options}))
    executor = Runs(registry, **own)
    MADE.append(executor)
    return executor


# ---- ends ------------------------------------------------------------------------------------------------------------
async def test_what_a_handler_returns_is_its_result_as_json() -> None:
    async def add(a: int, b: int = 1) -> dict[str, int]:
        return {"sum": a + b}

    outcome = await executor_of(add).run(assigned(arguments={"a": 2}))

    assert (outcome.kind, outcome.reason, outcome.blob) == ("completed", "", b'{"sum":3}')


async def test_a_plain_function_runs_in_a_thread_of_its_own_and_a_cpu_one_in_a_process() -> None:
    def where() -> list[int]:
        return [os.getpid(), threading.get_ident()]

    in_thread = await executor_of(where).run(assigned())
    in_process = await executor_of(cpu_jobs.own_pid, cpu=True).run(assigned())

    pid, thread = from_json(in_thread.blob)
    assert pid == os.getpid()
    assert thread != threading.get_ident()
    assert in_process.kind == "completed"
    assert from_json(in_process.blob) != os.getpid()


async def test_a_handler_sees_its_attempt() -> None:
    seen: list[TaskContext] = []

    def look(context: TaskContext) -> str:
        seen.append(context)
        return context.id

    outcome = await executor_of(look, max_attempts=5).run(assigned(attempt=2, metadata={"n": 1}, duration=0.5))

    (context,) = seen
    assert outcome.blob == b'"g/t"'
    assert (context.attempt, context.max_attempts, context.fence, context.role) == (2, 5, 7, "r")
    assert (context.metadata, context.duration) == ({"n": 1}, 0.5)


async def test_an_error_is_tried_again_after_a_growing_wait_and_fails_at_the_last_attempt() -> None:
    async def fail() -> None:
        raise ValueError("bad value")

    executor = executor_of(fail, max_attempts=4)
    outcomes = [await executor.run(assigned(attempt=attempt)) for attempt in (1, 2, 3, 4)]

    assert [outcome.kind for outcome in outcomes] == ["retry", "retry", "retry", "failed"]
    assert [outcome.delay_ms for outcome in outcomes] == [1000, 2000, 4000, 0]
    for outcome in outcomes:
        assert outcome.reason == "error"
        error = error_of(outcome)
        assert (error["type"], error["message"]) == ("ValueError", "bad value")
        assert 'raise ValueError("bad value")' in error["traceback"]
        assert "executor.py" not in error["traceback"].replace("test_executor.py", "")
        assert outcome.summary == "ValueError: bad value"


async def test_the_task_says_how_often_before_its_handler_does() -> None:
    async def fail() -> None:
        raise ValueError

    outcome = await executor_of(fail, max_attempts=4).run(assigned(max_attempts=1))

    assert outcome.kind == "failed"


async def test_fail_task_ends_it_and_retry_task_says_when() -> None:
    def refuse() -> None:
        raise FailTask("no use")

    def again() -> None:
        raise RetryTask("2s", "busy")

    refused = await executor_of(refuse).run(assigned())
    asked = await executor_of(again).run(assigned())
    last = await executor_of(again).run(assigned(attempt=3))

    assert (refused.kind, refused.reason, error_of(refused)["message"]) == ("failed", "error", "no use")
    assert (asked.kind, asked.delay_ms, error_of(asked)["message"]) == ("retry", 2000, "busy")
    assert (last.kind, last.reason) == ("failed", "error")


@pytest.mark.parametrize(
    ("error", "kind", "delay_ms"),
    [(KeyError("k"), "retry", 5000), (IndexError("i"), "failed", 0), (OSError("o"), "retry", 1000)],
    ids=str,
)
async def test_the_most_specific_rule_for_an_exception_decides(error: Exception, kind: str, delay_ms: int) -> None:
    async def fail() -> None:
        raise error

    rules = {LookupError: None, KeyError: Backoff(first="5s", jitter=False)}

    outcome = await executor_of(fail, retry=rules).run(assigned())

    assert (outcome.kind, outcome.delay_ms) == (kind, delay_ms)


@pytest.mark.parametrize("error", [SystemExit(1), KeyboardInterrupt(), asyncio.CancelledError()], ids=repr)
@pytest.mark.parametrize("form", ["async", "thread"])
async def test_no_exception_of_a_handler_takes_the_worker_down(error: BaseException, form: str) -> None:
    async def fail() -> None:
        raise error

    def fail_in_thread() -> None:
        raise error

    outcome = await executor_of(fail if form == "async" else fail_in_thread).run(assigned())

    assert (outcome.kind, outcome.reason) == ("retry", "error")
    # Python itself turns the one that a coroutine must not raise into a RuntimeError.
    is_turned = form == "async" and isinstance(error, StopIteration)
    assert error_of(outcome)["type"] == ("RuntimeError" if is_turned else type(error).__name__)
    assert "    raise error" in error_of(outcome)["traceback"]


@pytest.mark.parametrize(
    ("arguments", "words"), [({"a": "x"}, "'a'"), ({}, "'a'"), ({"a": 1, "c": 2}, "'c'")], ids=["type", "missing", "c"]
)
async def test_arguments_that_do_not_fit_fail_at_once_and_nothing_runs(arguments: Body, words: str) -> None:
    ran = []

    async def take(a: int) -> None:
        ran.append(a)

    outcome = await executor_of(take).run(assigned(arguments=arguments))

    assert (outcome.kind, outcome.reason) == ("failed", "invalid")
    assert words in error_of(outcome)["message"]
    assert ran == []


async def test_a_result_that_is_no_json_or_too_large_fails_with_the_remedy() -> None:
    async def strange() -> Any:
        return object()

    async def large() -> str:
        return "x" * 1000

    bad = await executor_of(strange).run(assigned())
    too_large = await executor_of(large).run(assigned())

    assert (bad.kind, bad.reason) == ("failed", "invalid")
    assert (too_large.kind, too_large.reason) == ("failed", "invalid")
    assert error_of(too_large)["type"] == "PayloadTooLargeError"
    assert "has 1,002 bytes, 1,000 are allowed" in error_of(too_large)["message"]
    assert "return a reference" in error_of(too_large)["message"]


async def test_a_task_of_an_unknown_name_is_given_back_at_once_to_wait_by_its_name() -> None:
    outcome = await Runs(Registry()).run(assigned(releases=6))

    assert (outcome.kind, outcome.reason, outcome.delay_ms) == ("release", UNKNOWN + "job", 0)


async def test_a_name_that_no_task_can_have_waits_for_nobody() -> None:
    outcome = await Runs(Registry()).run(assigned(uses="no such:thing at all"))

    assert (outcome.kind, outcome.reason) == ("failed", "invalid")


async def test_an_unknown_handler_is_answered_with_what_is_known_here() -> None:
    async def job() -> None: ...

    outcome = await executor_of(job).run(assigned(uses="jop"))

    assert outcome.summary == (
        "UnknownTaskError: no task is registered as 'jop'; did you mean 'job'? registered: default, echo, job"
    )


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("arguments", [1]),
        ("arguments", "text"),
        ("metadata", 5),
        ("timeout", "soon"),
        ("timeout", [1]),
        ("timeout", -1),
        ("max_attempts", "3"),
        ("max_attempts", 1.5),
        ("max_attempts", -1),
        ("duration", "x"),
        ("uses", ["job"]),
    ],
)
async def test_a_body_that_makes_no_sense_fails_at_once_and_names_the_field(field: str, value: Any) -> None:
    ran = []

    async def note() -> None:
        ran.append(1)

    outcome = await executor_of(note).run(assigned(**{field: value}))

    assert (outcome.kind, outcome.reason) == ("failed", "invalid")
    assert f"{field}: {value!r} " in error_of(outcome)["message"]
    assert ran == []


class Mute(Exception):
    def __str__(self) -> str:
        raise ValueError

    __repr__ = __str__


async def test_an_exception_that_cannot_be_shown_is_recorded_all_the_same() -> None:
    async def fail() -> None:
        raise Mute

    outcome = await executor_of(fail).run(assigned())

    assert (outcome.kind, error_of(outcome)["type"]) == ("retry", "Mute")
    assert error_of(outcome)["message"] == "(its message cannot be shown: ValueError)"
    assert "raise Mute" in error_of(outcome)["traceback"]


class Careless(RetryTask):
    def __init__(self) -> None: ...


async def test_a_retry_task_of_ones_own_that_says_no_delay_waits_the_backoff() -> None:
    async def fail() -> None:
        raise Careless

    outcome = await executor_of(fail).run(assigned())

    assert (outcome.kind, outcome.delay_ms) == ("retry", 1000)


def careless(value: Any) -> Any:
    raise KeyError(value)


async def test_what_a_users_type_raises_about_an_argument_is_an_error_of_the_attempt() -> None:
    async def take(a: Annotated[int, BeforeValidator(careless)]) -> None: ...

    outcome = await executor_of(take).run(assigned(arguments={"a": 1}))

    assert (outcome.kind, outcome.reason, error_of(outcome)["type"]) == ("retry", "error", "KeyError")


class BytesAsText(BaseModel):
    data: bytes


class Unwritable(BaseModel):
    a: int

    @field_serializer("a")
    def _written(self, value: int) -> str:
        raise KeyError("no way to write this")


class Hostile:
    __hash__ = None  # type: ignore[assignment]

    def __eq__(self, other: object) -> bool:
        raise KeyError("no way to compare this")

    @classmethod
    def __get_pydantic_core_schema__(cls, source: Any, handler: Any) -> Any:
        write = core_schema.plain_serializer_function_ser_schema(lambda value: 1)
        return core_schema.no_info_plain_validator_function(lambda value: cls(), serialization=write)


@pytest.mark.parametrize(
    ("annotation", "value", "words"),
    [
        (bytes, b"\xff", ""),
        (BytesAsText, BytesAsText(data=b"\xff"), "base64"),
        (Annotated[int, BeforeValidator(careless)], 1, "KeyError"),
        (Unwritable, Unwritable(a=1), "no way to write this"),
        (Hostile, Hostile(), "no way to compare this"),
        (float, math.nan, "nan is not JSON"),
        (None, {"at": date(2026, 1, 2)}, "a date is not JSON"),
        (None, threading.Lock(), "a lock is not JSON"),
        (None, "\ud800", "surrogate"),
    ],
)
@pytest.mark.parametrize("kind", ["async", "thread"])
async def test_a_result_that_cannot_be_stored_fails_at_once_since_the_work_is_done(
    kind: str, annotation: Any, value: Any, words: str
) -> None:
    async def on_the_loop() -> Any:
        return value

    def in_a_thread() -> Any:
        return value

    function: Any = on_the_loop if kind == "async" else in_a_thread
    function.__annotations__["return"] = annotation

    outcome = await executor_of(function, max_attempts=5).run(assigned())

    if words:
        assert (outcome.kind, outcome.reason) == ("failed", "invalid")
        assert error_of(outcome)["message"].startswith("task 'job': result")
        assert words in error_of(outcome)["message"]
    else:
        assert (outcome.kind, from_json(outcome.blob)) == ("completed", "_w==")


async def test_on_error_is_told_of_each_failed_attempt_and_may_itself_fail() -> None:
    told: list[tuple[str, str]] = []

    async def fail() -> None:
        raise ValueError("v")

    executor = executor_of(fail)

    def broken(context: TaskContext, error: BaseException) -> None:
        raise RuntimeError

    async def tell(context: TaskContext, error: BaseException) -> None:
        told.append((context.id, str(error)))

    executor.registry.on_error += [broken, tell]

    outcome = await executor.run(assigned())

    assert outcome.kind == "retry"
    await eventually(lambda: told == [("g/t", "v")], "the hook is told")


# ---- timeouts --------------------------------------------------------------------------------------------------------
async def test_a_coroutine_is_cancelled_at_its_timeout() -> None:
    cancelled = asyncio.Event()

    async def sleep() -> None:
        try:
            await asyncio.sleep(60)
        finally:
            cancelled.set()

    executor = executor_of(sleep, timeout=0.05)

    again = await executor.run(assigned())
    last = await executor.run(assigned(attempt=3))

    assert cancelled.is_set()
    assert (again.kind, again.reason, again.delay_ms) == ("retry", "timeout", 1000)
    assert (last.kind, last.reason) == ("failed", "timeout")
    assert "no result within 0.05 s" in error_of(last)["message"]
    assert 40 <= last.run_ms < 1000
    assert executor.hung == 0


async def test_a_timeout_error_of_the_handler_itself_is_an_error() -> None:
    async def fail() -> None:
        raise TimeoutError("the other side is slow")

    outcome = await executor_of(fail).run(assigned())

    assert (outcome.kind, outcome.reason) == ("retry", "error")
    assert "the other side" in error_of(outcome)["message"]


async def test_a_thread_that_outlives_its_timeout_is_counted_until_it_ends() -> None:
    may_end, contexts = threading.Event(), []

    def block(context: TaskContext) -> None:
        contexts.append(context)
        may_end.wait(10)

    executor = executor_of(block)

    outcome = await executor.run(assigned(timeout=0.05))

    assert (outcome.kind, outcome.reason) == ("retry", "timeout")
    assert executor.hung == 1
    assert contexts[0].is_cancelled
    assert contexts[0].stopped == "timeout"
    may_end.set()
    await eventually(lambda: executor.hung == 0, "the abandoned thread is no longer counted")


async def test_a_thread_behind_middleware_that_swallows_the_stop_counts_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("rq_ceylon.worker.executor.CLEANUP_S", 0.05)
    may_end, may_leave = threading.Event(), asyncio.Event()

    @asynccontextmanager
    async def stubborn(context: TaskContext) -> AsyncIterator[None]:
        try:
            yield
        finally:
            while not may_leave.is_set():
                with suppress(asyncio.CancelledError):
                    await may_leave.wait()

    executor = executor_of(lambda: may_end.wait(10), threads=1)
    executor.registry.middleware.append(stubborn)
    outcome = await executor.run(assigned(timeout=0.05))
    assert (outcome.reason, executor.hung, executor.is_exhausted) == ("timeout", 1, True)
    may_leave.set()

    # It was the first that hangs, so its place is free although its thread goes on.
    await eventually(lambda: executor.shares(["job"]) == {"job": 1}, "another task can start")

    assert executor.hung == 1
    may_end.set()
    await eventually(lambda: executor.hung == 0, "nothing goes on")


async def test_a_plain_function_can_ask_whether_it_is_over() -> None:
    ended = threading.Event()

    def loop(context: TaskContext) -> None:
        try:
            while True:
                context.check_cancelled()
        finally:
            ended.set()

    executor = executor_of(loop)

    outcome = await executor.run(assigned(timeout=0.05))

    assert (outcome.kind, outcome.reason) == ("retry", "timeout")
    await eventually(lambda: ended.is_set() and executor.hung == 0, "the thread has ended")


# ---- waiting for a place ---------------------------------------------------------------------------------------------
@pytest.fixture
def _a_place_is_free_soon(monkeypatch: pytest.MonkeyPatch) -> None:
    """Attempts ended here in the last moment, so that others may wait for their place."""
    monkeypatch.setattr(Places, "room", 1)


@pytest.mark.usefixtures("_a_place_is_free_soon")
async def test_waiting_for_a_thread_does_not_count_as_time_of_the_attempt() -> None:
    started, may_end = threading.Event(), threading.Event()
    begun: list[float] = []

    def block() -> None:
        started.set()
        may_end.wait(10)

    executor = executor_of(block, threads=1)
    first = asyncio.create_task(executor.run(assigned(fence=1)))
    await eventually(started.is_set, "the first runs")
    short = asyncio.create_task(executor.run(assigned(fence=2, timeout=0.02)))
    long = asyncio.create_task(
        executor.run(assigned(fence=3, timeout=60), begun=lambda context: begun.append(context.deadline))
    )
    await asyncio.wait([short], timeout=0.08)

    assert not short.done()
    executor.cancel("r", 2, "cancelled")
    assert (await short).run_ms == 0
    assert begun == []
    freed = time.monotonic()
    may_end.set()
    assert [(await one).kind for one in (first, long)] == ["completed", "completed"]
    assert begun[0] >= freed + 60


@pytest.mark.usefixtures("_a_place_is_free_soon")
@pytest.mark.parametrize("cpu", [False, True])
async def test_a_task_that_waits_for_its_turn_can_be_cancelled(cpu: bool, tmp_path: Path) -> None:
    path = tmp_path / "pid"
    executor = executor_of(cpu_jobs.write_pid_and_sleep, threads=1, cpu=cpu) if cpu else None
    ran, may_end = [], threading.Event()

    def block() -> None:
        ran.append(1)
        may_end.wait(10)

    if executor is None:
        executor = executor_of(block, threads=1)
    executor._children = Children(1)
    arguments = {"path": str(path)} if cpu else {}
    first = asyncio.create_task(executor.run(assigned(fence=1, arguments=arguments)))
    await eventually(lambda: bool(ran) or (path.exists() and path.read_text() != ""), "the first runs")
    second = asyncio.create_task(executor.run(assigned(fence=2, arguments=arguments)))
    await asyncio.sleep(0)

    executor.cancel("r", 2, "cancelled")
    outcome = await asyncio.wait_for(second, 5)

    assert (outcome.kind, outcome.run_ms) == ("stopped", 0)
    assert not first.done()
    assert executor.hung == 0
    executor.cancel("r", 1, "cancelled")
    may_end.set()
    await first


@pytest.mark.usefixtures("_a_place_is_free_soon")
async def test_others_take_the_place_of_a_thread_that_hangs_up_to_a_bound() -> None:
    may_end, ran = threading.Event(), []

    def work(number: int) -> None:
        ran.append(number)
        may_end.wait(10)

    executor = executor_of(work, threads=2)
    for number in (1, 2):
        assert not executor.is_exhausted
        await executor.run(assigned(fence=number, timeout=0.02, arguments={"number": number}))
    assert executor.is_exhausted
    # Two hang and are replaced; the next two take the last places, which they keep.
    for number in (3, 4):
        await executor.run(assigned(fence=number, timeout=0.02, arguments={"number": number}))
    waits = asyncio.create_task(executor.run(assigned(fence=5, arguments={"number": 5})))
    await asyncio.wait([waits], timeout=0.05)

    assert (ran, executor.hung) == ([1, 2, 3, 4], 4)
    may_end.set()
    assert (await waits).kind == "completed"
    await eventually(lambda: executor.hung == 0, "nothing hangs any more")
    assert ran == [1, 2, 3, 4, 5]


@pytest.mark.usefixtures("_a_place_is_free_soon")
async def test_a_task_whose_turn_does_not_come_is_given_back_and_spends_no_attempt(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("rq_ceylon.worker.executor.PLACE_S", 0.05)
    may_end = threading.Event()

    def block() -> None:
        may_end.wait(10)

    executor = executor_of(block, threads=1)
    first = asyncio.create_task(executor.run(assigned(fence=1)))
    await asyncio.sleep(0)

    outcome = await executor.run(assigned(fence=2))

    assert (outcome.kind, outcome.reason, outcome.run_ms) == ("release", BUSY + "job", 0)
    may_end.set()
    assert (await first).kind == "completed"


async def test_of_many_tasks_at_once_those_without_a_thread_are_given_back() -> None:
    may_end = threading.Event()

    def block() -> None:
        may_end.wait(10)

    executor = executor_of(block, threads=2)
    running = [asyncio.create_task(executor.run(assigned(fence=fence))) for fence in range(10)]
    ended, left = await asyncio.wait(running, timeout=1)

    assert [task.result().reason for task in ended] == [BUSY + "job"] * 8
    may_end.set()
    assert [(await task).kind for task in left] == ["completed"] * 2
    assert executor.shares(["job"]) == {"job": 4}  # as many are free again, and ended in this moment


async def test_a_task_without_a_free_thread_is_given_back_to_wait_by_name() -> None:
    may_end = threading.Event()

    def block() -> None:
        may_end.wait(10)

    executor = executor_of(block, threads=1)
    executor.registry.add(Handler("short", awaited_nothing))
    first = asyncio.create_task(executor.run(assigned(fence=1)))
    await asyncio.sleep(0)

    second = await executor.run(assigned(fence=2))
    quick = await executor.run(assigned(fence=3, uses="short"))

    assert (second.kind, second.reason, second.delay_ms) == ("release", BUSY + "job", 0)
    assert executor.shares(["job", "short"]) == {"job": 0, "short": UNBOUNDED}
    assert quick.kind == "completed"
    may_end.set()
    await first
    assert executor.shares(["job"])["job"] >= 1


async def awaited_nothing() -> None: ...


async def test_free_threads_are_shared_out_among_the_names_that_need_one() -> None:
    def nothing() -> None: ...

    executor = executor_of(nothing, threads=5)
    executor.registry.add(Handler("other", nothing))

    assert sorted(executor.shares(["job", "other"]).values()) == [2, 3]


# ---- processes -------------------------------------------------------------------------------------------------------
async def test_a_child_process_is_killed_at_its_timeout(tmp_path: Path) -> None:
    path = tmp_path / "pid"
    executor = executor_of(cpu_jobs.write_pid_and_sleep, cpu=True)
    running = asyncio.create_task(executor.run(assigned(timeout=2, arguments={"path": str(path)})))
    await eventually(lambda: path.exists() and path.read_text() != "", "the child runs")

    outcome = await running

    assert (outcome.kind, outcome.reason) == ("retry", "timeout")
    await eventually(lambda: not is_alive(int(path.read_text())), "the child is gone")
    assert executor.hung == 0


@pytest.mark.parametrize("kind", ["async", "thread", "process"])
async def test_what_is_not_to_be_stored_need_not_be_json(kind: str) -> None:
    async def later() -> object:
        return object()

    def now() -> object:
        return object()

    functions: dict[str, Callable[..., Any]] = {
        "async": later, "thread": now, "process": cpu_jobs.nothing_to_store.function,
    }  # fmt: skip
    outcome = await executor_of(functions[kind], cpu=kind == "process", store_result=False).run(assigned())

    assert (outcome.kind, outcome.blob) == ("completed", b"null")
    if kind != "process":
        assert (await executor_of(functions[kind]).run(assigned())).reason == "invalid"


async def test_errors_of_a_child_process_count_as_those_of_any_other() -> None:
    async def outcome(function: Callable[..., Any], **body: Any) -> Outcome:
        return await executor_of(function, cpu=True, retry={ZeroDivisionError: None}).run(assigned(**body))

    squared = await outcome(cpu_jobs.square, arguments={"number": 12})
    refused, again, left = [await outcome(one) for one in (cpu_jobs.refuse, cpu_jobs.again, cpu_jobs.leave)]
    divided = await outcome(cpu_jobs.divide, arguments={"number": 1})

    assert (squared.kind, squared.blob) == ("completed", b"144")
    assert (refused.kind, error_of(refused)["message"]) == ("failed", "no use")
    assert (again.kind, again.delay_ms) == ("retry", 2000)
    assert (left.kind, error_of(left)["type"]) == ("retry", "SystemExit")
    assert (divided.kind, error_of(divided)["type"]) == ("failed", "ZeroDivisionError")
    assert "return number / 0" in error_of(divided)["traceback"]


async def test_a_process_is_used_again_by_the_next_task() -> None:
    executor = executor_of(cpu_jobs.own_pid, cpu=True)

    first, second = [from_json((await executor.run(assigned())).blob) for _ in range(2)]

    assert first == second


@pytest.mark.usefixtures("_a_place_is_free_soon")
async def test_no_more_processes_than_there_are_places_run_at_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("rq_ceylon.worker.executor.PLACE_S", 60)
    executor = executor_of(cpu_jobs.meet, cpu=True)
    executor._children = Children(2)

    outcomes = await asyncio.gather(
        *(executor.run(assigned(fence=fence, arguments={"folder": str(tmp_path)})) for fence in range(6))
    )

    assert {outcome.kind for outcome in outcomes} == {"completed"}
    assert max(from_json(outcome.blob) for outcome in outcomes) <= 2


@pytest.mark.parametrize(
    ("function", "words"),
    [
        (cpu_jobs.exit_now, "the process of this task died (exit code 3)"),
        (cpu_jobs.kill_itself, "the process of this task died (signal 9, SIGKILL: "),
    ],
)
async def test_a_process_that_dies_is_an_error_of_the_attempt_and_says_how(
    function: Callable[..., Any], words: str
) -> None:
    again = await executor_of(function, cpu=True).run(assigned())
    refused = await executor_of(function, cpu=True, retry={ChildProcessError: None}).run(assigned())

    assert (again.kind, again.reason, again.delay_ms) == ("retry", "error", 1000)
    assert error_of(again)["type"] == "ChildProcessError"
    assert error_of(again)["message"].startswith(words)
    assert refused.kind == "failed"


async def test_what_a_process_leaves_behind_ends_with_it(tmp_path: Path) -> None:
    path = tmp_path / "pid"

    outcome = await executor_of(cpu_jobs.exit_while_a_process_goes_on, cpu=True).run(
        assigned(arguments={"path": str(path)})
    )

    assert error_of(outcome)["message"] == "the process of this task died (exit code 4)"
    await eventually(lambda: not is_alive(int(path.read_text())), "the other is gone")


async def test_after_a_process_died_the_next_task_gets_another() -> None:
    executor = executor_of(cpu_jobs.exit_now, cpu=True)
    executor.registry.add(Handler("square", cpu_jobs.square, cpu=True))

    outcomes = [await executor.run(assigned()), await executor.run(assigned(uses="square", arguments={"number": 3}))]

    assert [outcome.kind for outcome in outcomes] == ["retry", "completed"]


async def test_what_a_process_writes_is_seen_and_disturbs_nothing(capfd: pytest.CaptureFixture[str]) -> None:
    outcome = await asyncio.wait_for(executor_of(cpu_jobs.write_much, cpu=True).run(assigned()), 30)

    out, err = capfd.readouterr()
    assert (outcome.kind, outcome.blob) == ("completed", b'"done"')
    assert out == "printed\nechoed\n"
    assert err.count("x") == 5_000_000


async def test_arguments_of_a_megabyte_reach_a_process() -> None:
    executor = executor_of(cpu_jobs.pid_and_argument, cpu=True)

    outcome = await executor.run(assigned(arguments={"text": "x" * 1_000_000}))

    assert from_json(outcome.blob)[1] == 1_000_000


async def test_a_result_of_a_process_that_is_no_json_fails_as_that_of_any_other() -> None:
    outcome = await executor_of(cpu_jobs.not_json, cpu=True).run(assigned())

    assert (outcome.kind, outcome.reason) == ("failed", "invalid")
    assert error_of(outcome)["message"] == (
        "task 'job': result: a object is not JSON; annotate it with its type so that it is converted, "
        "or pass text, numbers, true/false, null, lists and objects"
    )


async def test_a_fail_task_of_ones_own_ends_a_task_in_a_process_too() -> None:
    outcome = await executor_of(cpu_jobs.hopeless, cpu=True).run(assigned())

    assert (outcome.kind, outcome.reason, error_of(outcome)["type"]) == ("failed", "error", "HopelessError")


async def test_a_group_of_exceptions_means_the_same_from_a_process_as_from_the_loop() -> None:
    hopeless = await executor_of(cpu_jobs.hopeless_group, cpu=True).run(assigned())
    later = await executor_of(cpu_jobs.later_group, cpu=True).run(assigned())

    assert (hopeless.kind, hopeless.reason, error_of(hopeless)["type"]) == ("failed", "error", "ExceptionGroup")
    assert (later.kind, later.delay_ms) == ("retry", 7000)


@pytest.mark.parametrize(
    ("error", "kind", "delay_ms"),
    [
        (FailTask("no account"), "failed", 0),
        (KeyError("ruled"), "failed", 0),
        (RetryTask("5s"), "retry", 5000),
        (ValueError("other"), "retry", 1000),
    ],
)
async def test_what_a_handler_says_in_a_group_of_exceptions_counts(error: Exception, kind: str, delay_ms: int) -> None:
    async def work() -> None:
        raise ExceptionGroup("as of asyncio.TaskGroup", [error])

    outcome = await executor_of(work, retry={KeyError: None}).run(assigned())

    assert (outcome.kind, outcome.reason, outcome.delay_ms) == (kind, "error", delay_ms)


async def test_an_attempt_that_a_member_of_a_group_ends_has_timed_out() -> None:
    async def work(context: TaskContext) -> None:
        context.deadline = 0.0  # so that the handler sees it before the loop does

        try:
            context.check_cancelled()
        except AttemptStoppedError as stopped:
            raise BaseExceptionGroup("as of asyncio.TaskGroup", [stopped]) from None

    outcome = await executor_of(work, max_attempts=1).run(assigned())

    assert (outcome.kind, outcome.reason) == ("failed", "timeout")


async def test_a_cancelled_process_is_killed_with_the_programs_it_started(tmp_path: Path) -> None:
    path = tmp_path / "pids"
    executor = executor_of(cpu_jobs.start_a_program_and_sleep, cpu=True)
    running = asyncio.create_task(executor.run(assigned(arguments={"path": str(path)})))
    await eventually(lambda: path.exists() and " " in path.read_text(), "the program runs")

    executor.cancel("r", 7, "cancelled")

    assert (await running).kind == "stopped"
    for pid in path.read_text().split():
        await eventually(lambda pid=pid: not is_alive(int(pid)), "both are gone")  # type: ignore[misc]


@pytest.mark.parametrize("delay_s", [0, 0.002, 0.01, 0.05])
async def test_a_process_whose_task_is_cancelled_while_it_starts_is_not_left_behind(delay_s: float) -> None:
    before = children()
    executor = executor_of(cpu_jobs.own_pid, cpu=True)
    running = asyncio.create_task(executor.run(assigned()))
    await asyncio.sleep(delay_s)

    executor.cancel("r", 7, "cancelled")

    assert (await running).kind in ("stopped", "completed")
    await executor.close()
    await eventually(lambda: children() <= before, "no child is left")


def children() -> set[int]:
    listed = Path("/proc/self/task").glob("*/children")
    return {int(pid) for one in listed for pid in one.read_text().split() if is_alive(int(pid))}


SCRIPT = """
import asyncio, os, sys, time
from rq_ceylon.handlers import Handler, Registry
from rq_ceylon.worker.executor import Executor
from rq_ceylon.store.transitions import Claimed, Delivery
from rq_ceylon.worker.outcome import Assignment

class OwnError(Exception):
    pass

def work(number: int) -> int:
    if number == 0:
        raise OwnError
    if number == 1:
        print("child", os.getpid(), flush=True)
        time.sleep(60)
    return number + 1

async def main(*numbers):
    registry = Registry()
    registry.add(Handler("work", work, cpu=True, retry={OwnError: None}))
    executor = Executor(registry)
    for number in numbers:
        body = {"uses": "work", "arguments": {"number": number}}
        delivery = Delivery("r", "2:1-0", "g", "t", "1", "2:1-0", 1)
        ended = asyncio.get_running_loop().create_future()
        executor.start(Assignment("w", delivery, Claimed("GRANTED"), body, {}), ended.set_result)
        outcome = await ended
        print(outcome.kind, outcome.blob.decode()[:5], flush=True)
    await executor.close()

if __name__ == "__main__":
    asyncio.run(main(*map(int, sys.argv[1:])))
"""


@pytest.mark.parametrize("how", [["script.py"], ["-m", "script"]], ids=["path", "module"])
async def test_a_function_of_the_main_module_runs_in_a_process(how: list[str], tmp_path: Path) -> None:
    (tmp_path / "script.py").write_text(SCRIPT)
    process = await asyncio.create_subprocess_exec(
        sys.executable, *how, "5", "0", cwd=tmp_path, env={**os.environ, "PYTHONPATH": str(ROOT)}, stdout=PIPE
    )

    out, _ = await process.communicate()

    assert out.decode().splitlines() == ["completed 6", 'failed {"typ']


UNGUARDED = """
import asyncio, json, os, sys
from rq_ceylon.app import Ceylon
from rq_ceylon.dev.server import EmbeddedServer
from rq_ceylon.store.transitions import Claimed, Delivery
from rq_ceylon.worker.executor import Executor
from rq_ceylon.worker.outcome import Assignment

app = Ceylon()

@app.task(cpu=True, max_attempts=1)
def work() -> int:
    return 1

def submit():
    with Ceylon(os.environ["TEST_URL"]).sync_client() as client:
        client.submit(work.bind())

PROGRAM
if "rq_ceylon.worker.executor" in sys.modules and os.environ.pop("IS_WORKER", ""):
    @app.task(cpu=True, max_attempts=1)
    def late() -> int:
        return 1

    async def main():
        executor = Executor(app.registry)
        ended = asyncio.get_running_loop().create_future()
        body = {"uses": sys.argv[1], "arguments": {}}
        delivery = Delivery("default", "2:1-0", "g", "t", "1", "2:1-0", 1)
        executor.start(Assignment("w", delivery, Claimed("GRANTED"), body, {}), ended.set_result)
        outcome = await ended
        print(json.dumps([outcome.kind, outcome.error]), flush=True)
        await executor.close()

    asyncio.run(main())
"""
"""A script whose program has no guard. `IS_WORKER` is gone in its children."""


@pytest.mark.parametrize(
    ("program", "name", "cause"),
    [
        ("if 'IS_WORKER' not in os.environ: submit()", "work", "may not submit"),
        ("if 'IS_WORKER' not in os.environ: EmbeddedServer.start()", "work", "may not start a server"),
        ("if 'IS_WORKER' not in os.environ: sys.exit(3)", "work", "SystemExit: 3"),
        ("if 'IS_WORKER' not in os.environ: int('x')", "work", "ValueError: invalid literal"),
        ("", "late", "has no attribute 'late'"),
    ],
    ids=["submits", "starts a server", "exits", "raises", "defines it later"],
)
async def test_a_script_that_runs_its_program_in_a_child_is_refused_and_told_the_guard(
    program: str, name: str, cause: str, tmp_path: Path, redis_url: str
) -> None:
    (tmp_path / "script.py").write_text(UNGUARDED.replace("PROGRAM", program))
    environ = {**os.environ, "PYTHONPATH": str(ROOT), "IS_WORKER": "1", "TEST_URL": redis_url}
    process = await asyncio.create_subprocess_exec(
        sys.executable, "script.py", name, cwd=tmp_path, env=environ, stdout=PIPE
    )

    out, _ = await process.communicate()

    kind, error = json.loads(out)
    assert (kind, error["type"]) == ("failed", "AppImportError")
    assert cause in error["message"], error["message"]
    assert 'below the line `if __name__ == "__main__":`' in error["message"]
    async with Client(redis_url) as client:
        assert await client.roles() == []


async def test_a_process_ends_with_its_worker_even_if_that_is_killed(tmp_path: Path) -> None:
    (tmp_path / "script.py").write_text(SCRIPT)
    process = await asyncio.create_subprocess_exec(
        sys.executable, "script.py", "1", cwd=tmp_path, env={**os.environ, "PYTHONPATH": str(ROOT)}, stdout=PIPE
    )
    assert process.stdout is not None
    _, pid = (await process.stdout.readline()).split()

    process.kill()
    await process.wait()

    await eventually(lambda: not is_alive(int(pid)), "the child is gone")


# ---- stopped from outside --------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("why", "kind"), [("cancelled", "stopped"), ("lost", "lost"), ("shutdown", "release")], ids=lambda value: value
)
@pytest.mark.parametrize("form", ["async", "thread"])
async def test_an_attempt_ended_from_outside_says_why(why: StopReason, kind: str, form: str) -> None:
    started, may_end = threading.Event(), threading.Event()

    async def sleep() -> None:
        started.set()
        await asyncio.sleep(60)

    def block() -> None:
        started.set()
        may_end.wait(10)

    executor = executor_of(sleep if form == "async" else block)
    running = asyncio.create_task(executor.run(assigned(fence=3)))
    await eventually(started.is_set, "the handler runs")

    executor.cancel("r", 99, why)
    executor.cancel("r", 3, why)
    outcome = await running

    assert (outcome.kind, outcome.blob) == (kind, b"")
    assert executor.hung == (form == "thread")
    may_end.set()
    await eventually(lambda: executor.hung == 0, "nothing goes on")


async def test_a_handler_that_ends_well_in_spite_of_a_cancellation_counts() -> None:
    started = asyncio.Event()

    async def stubborn() -> str:
        started.set()
        try:
            await asyncio.sleep(60)
        except asyncio.CancelledError:
            return "done"
        return "slept"

    executor = executor_of(stubborn)
    running = asyncio.create_task(executor.run(assigned(fence=3)))
    await started.wait()

    executor.cancel("r", 3, "cancelled")
    outcome = await running

    assert (outcome.kind, outcome.blob) == ("completed", b'"done"')


@pytest.mark.parametrize(
    ("why", "kind"), [("cancelled", "stopped"), ("lost", "lost"), ("shutdown", "release")], ids=lambda value: value
)
@pytest.mark.parametrize("form", ["async", "thread"])
async def test_what_a_handler_raises_while_it_is_stopped_says_nothing_about_its_task(
    why: StopReason, kind: str, form: str
) -> None:
    started, told = threading.Event(), []

    async def clean_up() -> None:
        started.set()
        try:
            await asyncio.sleep(60)
        finally:
            raise ValueError("while cleaning up")

    def check(context: TaskContext) -> None:
        started.set()
        while not context.is_cancelled:
            time.sleep(0.001)
        raise ValueError("while cleaning up")

    executor = executor_of(clean_up if form == "async" else check)
    executor.registry.on_error.append(lambda context, error: told.append(error))
    running = asyncio.create_task(executor.run(assigned(fence=3, attempt=3)))
    await eventually(started.is_set, "the handler runs")

    executor.cancel("r", 3, why)
    outcome = await running

    assert (outcome.kind, outcome.blob, told) == (kind, b"", [])
    await eventually(lambda: executor.hung == 0, "nothing goes on")


async def test_cancelling_one_of_two_roles_with_equal_fences_spares_the_other() -> None:
    """Each role counts its own fences, so a worker of two roles may hold the same number twice."""
    may_end = asyncio.Event()

    async def work() -> None:
        await may_end.wait()

    executor = executor_of(work)
    first, second = [asyncio.create_task(executor.run(assigned(role=role, fence=3))) for role in ("a", "b")]
    await asyncio.sleep(0)

    executor.cancel("a", 3, "cancelled")

    assert (await first).kind == "stopped"
    may_end.set()
    assert (await second).kind == "completed"


async def test_a_second_cancellation_does_not_cut_short_the_cleaning_up() -> None:
    started, cleaning, may_end = asyncio.Event(), asyncio.Event(), asyncio.Event()
    cleaned = []

    async def work() -> None:
        started.set()
        try:
            await asyncio.sleep(60)
        finally:
            cleaning.set()
            await may_end.wait()
            cleaned.append(1)

    executor = executor_of(work)
    running = asyncio.create_task(executor.run(assigned()))
    await started.wait()
    executor.cancel("r", 7, "cancelled")
    await cleaning.wait()

    executor.cancel("r", 7, "cancelled")
    may_end.set()

    assert (await running).kind == "stopped"
    assert cleaned == [1]


@pytest.mark.parametrize(
    ("how", "kind"), [("cancel", "stopped"), ("timeout", "retry"), ("close", "release")], ids=lambda value: value
)
async def test_a_coroutine_that_does_not_end_when_cancelled_is_abandoned_and_named(
    how: str, kind: str, said: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("rq_ceylon.worker.executor.CLEANUP_S", 0.05)
    started, give_up, freed = asyncio.Event(), asyncio.Event(), asyncio.Event()

    async def stubborn() -> None:
        while not give_up.is_set():
            started.set()
            try:
                await give_up.wait()
            except asyncio.CancelledError:
                continue

    executor = executor_of(stubborn, on_freed=freed.set)
    running = asyncio.create_task(executor.run(assigned(timeout=0.05 if how == "timeout" else 60)))
    await started.wait()

    try:
        if how == "close":
            await asyncio.wait_for(executor.close(), 5)
        elif how == "cancel":
            executor.cancel("r", 7, "cancelled")

        assert (await asyncio.wait_for(running, 5)).kind == kind
        assert executor.hung == 1
        if how != "close":
            assert any(line.startswith("ERROR: Task g/t (job) hangs: its attempt is over") for line in said)
    finally:
        give_up.set()
    await asyncio.wait_for(freed.wait(), 5)
    assert executor.hung == 0


async def test_closing_gives_back_what_still_runs_and_spends_no_attempt() -> None:
    started, ended = asyncio.Event(), asyncio.Event()

    async def sleep() -> None:
        started.set()
        try:
            await asyncio.sleep(60)
        finally:
            ended.set()

    executor = executor_of(sleep)
    running = asyncio.create_task(executor.run(assigned()))
    await started.wait()

    await executor.close()

    assert ended.is_set()
    assert (await running).kind == "release"
