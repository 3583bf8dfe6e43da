"""
The executor: whatever a handler does becomes one outcome, and whatever goes on in spite of it is counted.
"""

from __future__ import annotations

import asyncio
import os
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import cpu_jobs
import pytest
from commands import is_alive
from pydantic_core import from_json

from rq_ceylon.attempt import Backoff, FailTask, RetryTask, StopReason, TaskContext
from rq_ceylon.handlers import Handler, Registry
from rq_ceylon.worker.executor import Assignment, Executor, Outcome

pytestmark = pytest.mark.anyio

Body = dict[str, Any]

STEADY = Backoff(first="1s", factor=2, jitter=False)


def executor_of(function: Callable[..., Any], *, result_bytes_max: int = 1000, **rules: Any) -> Executor:
    """
    An executor that knows one handler, `job`; its backoff is 1 s, 2 s, 4 s, ...
    """
    registry = Registry()
    registry.add(Handler("job", function, **{"backoff": STEADY, **rules}))
    return Executor(registry, result_bytes_max=result_bytes_max)


def assigned(*, attempt: int = 1, releases: int = 0, fence: int = 7, **body: Any) -> Assignment:
    return Assignment(
        group_id="g",
        task_id="t",
        role="r",
        worker="w",
        attempt=attempt,
        crashes=0,
        releases=releases,
        fence=fence,
        body={"uses": "job", **body},
    )


def error_of(outcome: Outcome) -> dict[str, str]:
    error: dict[str, str] = from_json(outcome.blob)
    assert set(error) == {"type", "message", "traceback"}
    return error


async def eventually(condition: Callable[[], bool], what: str) -> None:
    try:
        async with asyncio.timeout(5):
            while not condition():  # noqa: ASYNC110
                await asyncio.sleep(0.01)
    except TimeoutError:
        pytest.fail(f"not within 5 s: {what}")


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


async def test_an_unknown_handler_gives_the_task_back_for_longer_each_time() -> None:
    executor = Executor(Registry())

    outcomes = [await executor.run(assigned(releases=releases)) for releases in (0, 1, 2, 6, 50)]

    assert {(outcome.kind, outcome.reason) for outcome in outcomes} == {("release", "unknown")}
    assert [outcome.delay_ms for outcome in outcomes] == [5_000, 10_000, 20_000, 300_000, 300_000]


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
    assert told == [("g/t", "v")]


# ---- timeouts --------------------------------------------------------------------------------------------------------
async def test_a_coroutine_is_cancelled_at_its_timeout() -> None:
    cancelled = asyncio.Event()

    async def sleep() -> None:
        try:
            await asyncio.sleep(60)
        finally:
            cancelled.set()

    executor = executor_of(sleep, timeout_s=0.05)

    again = await executor.run(assigned())
    last = await executor.run(assigned(attempt=3))

    assert cancelled.is_set()
    assert (again.kind, again.reason, again.delay_ms) == ("retry", "timeout", 1000)
    assert (last.kind, last.reason) == ("failed", "timeout")
    assert "no result within 0.05 s" in error_of(last)["message"]
    assert 40 <= last.run_ms < 1000
    assert executor.abandoned == 0


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
    assert executor.abandoned == 1
    assert contexts[0].is_cancelled
    assert contexts[0].stopped == "timeout"
    may_end.set()
    await eventually(lambda: executor.abandoned == 0, "the abandoned thread is no longer counted")


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
    await eventually(lambda: ended.is_set() and executor.abandoned == 0, "the thread has ended")


# ---- processes -------------------------------------------------------------------------------------------------------
async def test_a_child_process_is_killed_at_its_timeout(tmp_path: Path) -> None:
    path = tmp_path / "pid"
    executor = executor_of(cpu_jobs.write_pid_and_sleep, cpu=True)
    running = asyncio.create_task(executor.run(assigned(timeout=2, arguments={"path": str(path)})))
    await eventually(lambda: path.exists() and path.read_text() != "", "the child runs")

    outcome = await running

    assert (outcome.kind, outcome.reason) == ("retry", "timeout")
    await eventually(lambda: not is_alive(int(path.read_text())), "the child is gone")
    assert executor.abandoned == 0


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
    assert executor.abandoned == (form == "thread")
    may_end.set()
    await eventually(lambda: executor.abandoned == 0, "nothing goes on")


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


async def test_closing_ends_what_still_runs() -> None:
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
    await running

    assert ended.is_set()
