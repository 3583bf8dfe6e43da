"""
Turns one assignment into an outcome. Runs users' code, and never touches Redis.
"""

from __future__ import annotations

import asyncio
import importlib
import inspect
import signal
import sys
import threading
import time
import traceback
from collections.abc import Callable, Mapping
from concurrent.futures import Future
from contextvars import copy_context
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple

import anyio
import anyio.to_process
from loguru import logger
from pydantic_core import from_json, to_json

from rq_ceylon.attempt import AttemptStoppedError, FailTask, RetryTask, StopReason, TaskContext, type_names
from rq_ceylon.errors import InvalidInputError
from rq_ceylon.handlers import DEFAULT_HANDLER, Handler, Registry
from rq_ceylon.models import DEFAULT_MAX_ATTEMPTS, DEFAULT_TIMEOUT_S

RESULT_BYTES_MAX = 1024 * 1024
TRACEBACK_MAX = 8192
UNKNOWN_FIRST_MS, UNKNOWN_CAP_MS = 5_000, 300_000
"""How long a task whose handler is unknown here stays away: doubling, so that another host or a new version gets it."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Assignment:
    """
    A granted task.

    Attributes:
        body: the task's JSON over its group's defaults: uses, arguments, duration, timeout (s), max_attempts, metadata.
        needs: results of the tasks it needed, by id.
    """

    group_id: str
    task_id: str
    role: str
    worker: str
    attempt: int
    crashes: int
    releases: int
    fence: int
    body: Mapping[str, Any]
    needs: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, slots=True, kw_only=True)
class Outcome:
    """
    How an attempt ended.

    Attributes:
        kind: completed; failed; retry; release (given back, spends no attempt); stopped (cancelled from outside); lost
            (another worker has the task: nothing is to be recorded).
        blob: JSON: the result, or `{"type", "message", "traceback"}` of a failure.
        run_ms: by the monotonic clock.
    """

    kind: Literal["completed", "failed", "retry", "release", "stopped", "lost"]
    reason: str = ""
    delay_ms: int = 0
    blob: bytes = b""
    run_ms: int = 0

    @property
    def summary(self) -> str:
        """
        The error in one line.
        """
        if not self.blob or self.kind not in ("failed", "retry"):
            return ""
        error = from_json(self.blob)
        return f"{error['type']}: {error['message']}"


class _RemoteError(Exception):
    """
    An exception of a child process, as text.
    """

    def __init__(self, names: tuple[str, ...], error: dict[str, str], delay_s: float | None) -> None:
        super().__init__(error["message"])
        self.names, self.error, self.delay_s = names, error, delay_s


class _Raised(NamedTuple):
    """
    An exception of a handler, as a value: no future takes a StopIteration, and a SystemExit would end the event loop.
    """

    error: BaseException


class Executor:
    """
    Runs handlers: coroutine functions on the loop, plain ones in threads, `cpu=True` in processes.

    A thread cannot be stopped: when its attempt is settled early it is *abandoned*. `abandoned` counts those that still
    run; each keeps occupying a slot, and `on_freed` is called when one ends.
    """

    def __init__(
        self,
        registry: Registry,
        *,
        threads: int = 16,
        result_bytes_max: int = RESULT_BYTES_MAX,
        on_freed: Callable[[], None] = lambda: None,
    ) -> None:
        self.registry, self.result_bytes_max, self.on_freed = registry, result_bytes_max, on_freed
        self.abandoned = 0
        self._threads = asyncio.Semaphore(threads)
        self._running: dict[tuple[str, int], tuple[asyncio.Task[Any], TaskContext]] = {}

    async def run(self, assignment: Assignment) -> Outcome:
        """
        Run one attempt. Whatever users' code does becomes an outcome.
        """
        body = assignment.body
        uses = body.get("uses") or DEFAULT_HANDLER
        handler = self.registry.find(uses)
        if handler is None:
            delay = min(UNKNOWN_CAP_MS, UNKNOWN_FIRST_MS * 2 ** min(assignment.releases, 10))
            logger.warning(
                "Task {}/{} uses {!r}, which is not registered here ({}); given back for {} s",
                assignment.group_id,
                assignment.task_id,
                uses,
                ", ".join(self.registry.names()),
                delay / 1000,
            )
            return Outcome(kind="release", reason="unknown", delay_ms=delay)
        timeout_s = body.get("timeout") or handler.timeout_s or DEFAULT_TIMEOUT_S
        max_attempts = body.get("max_attempts") or handler.max_attempts or DEFAULT_MAX_ATTEMPTS
        started = time.monotonic()
        context = TaskContext(
            group_id=assignment.group_id,
            task_id=assignment.task_id,
            uses=uses,
            role=assignment.role,
            worker=assignment.worker,
            attempt=assignment.attempt,
            max_attempts=max_attempts,
            crashes=assignment.crashes,
            fence=assignment.fence,
            duration=body.get("duration") or 0.0,
            metadata=body.get("metadata") or {},
            needs=assignment.needs,
            deadline=started + timeout_s,
        )
        attempt = _Attempt(handler, context, started)
        try:
            arguments = handler.call_arguments(body.get("arguments") or {}, context)
        except InvalidInputError as error:
            return attempt.failed("invalid", error)
        runner = asyncio.ensure_future(self._call(handler, arguments, body.get("arguments") or {}, context))
        self._running[assignment.role, assignment.fence] = runner, context
        try:
            async with asyncio.timeout(timeout_s) as limit:
                value = await runner
                if isinstance(value, _Raised):
                    raise value.error
        except TimeoutError as error:
            if limit.expired():
                context.stopped = context.stopped or "timeout"
                problem = TimeoutError(f"no result within {timeout_s:g} s")
                return await self._told(context, problem, attempt.again_or_failed("timeout", problem))
            return await self._told(context, error, attempt.of(error))
        except asyncio.CancelledError as error:
            stop = context.stopped
            if stop is None:
                # Not cancelled by us: the handler raised it, or the worker itself goes down.
                task = asyncio.current_task()
                if task is not None and task.cancelling():
                    raise
                return await self._told(context, error, attempt.of(error))
            return attempt.stopped(stop)
        except AttemptStoppedError as error:
            if context.stopped is None:
                return await self._told(context, error, attempt.again_or_failed("timeout", error))
            return attempt.stopped(context.stopped)
        except BaseException as error:
            return await self._told(context, error, attempt.of(error))
        finally:
            self._running.pop((assignment.role, assignment.fence), None)
        try:
            blob = value if handler.kind == "process" else handler.dump_result(value)
        except InvalidInputError as error:
            return attempt.failed("invalid", error)
        if len(blob) > self.result_bytes_max:
            too_large = InvalidInputError(
                f"the result of task {uses!r} has {len(blob):,} bytes, {self.result_bytes_max:,} are allowed; "
                "store it elsewhere and return a reference"
            )
            return attempt.failed("invalid", too_large, kind="PayloadTooLargeError")
        return Outcome(kind="completed", blob=blob, run_ms=attempt.run_ms())

    def cancel(self, role: str, fence: int, why: StopReason) -> None:
        """
        End an attempt from outside: `run` then returns stopped (cancelled), lost, or release (shutdown). A handler that
        ends normally all the same counts by what it returns.
        """
        if (role, fence) in self._running:
            runner, context = self._running[role, fence]
            context.stopped = context.stopped or why
            runner.cancel()

    async def close(self) -> None:
        """
        Cancel what still runs. Abandoned threads are daemons: they do not keep the process.
        """
        runners = [runner for runner, _ in self._running.values()]
        for runner in runners:
            runner.cancel()
        await asyncio.gather(*runners, return_exceptions=True)

    async def _call(
        self, handler: Handler[..., Any], arguments: dict[str, Any], raw: Mapping[str, Any], context: TaskContext
    ) -> Any:
        if handler.kind == "async":
            try:
                return await handler.function(**arguments)
            except (SystemExit, KeyboardInterrupt) as error:
                return _Raised(error)
        if handler.kind == "process":
            return await _in_process(handler, raw)
        async with self._threads:
            return await self._in_thread(handler, arguments, context)

    async def _in_thread(self, handler: Handler[..., Any], arguments: dict[str, Any], context: TaskContext) -> Any:
        loop = asyncio.get_running_loop()
        done: Future[Any] = Future()
        variables = copy_context()
        abandoned = False

        def body() -> None:
            try:
                done.set_result(variables.run(handler.function, **arguments))
            except BaseException as error:
                done.set_result(_Raised(error))
            if not loop.is_closed():
                loop.call_soon_threadsafe(returned)

        def returned() -> None:
            if abandoned:
                self.abandoned -= 1
                self.on_freed()

        threading.Thread(target=body, name=f"task-{context.id}", daemon=True).start()
        try:
            return await asyncio.shield(asyncio.wrap_future(done))
        except asyncio.CancelledError:
            if not done.done():
                abandoned = True
                self.abandoned += 1
            raise

    async def _told(self, context: TaskContext, error: BaseException, outcome: Outcome) -> Outcome:
        for hook in self.registry.on_error:
            try:
                told = hook(context, error)
                if inspect.isawaitable(told):
                    await told
            except Exception:
                logger.exception("on_error of task {} failed", context.id)
        return outcome


class _Attempt:
    """
    What an attempt's end means.
    """

    def __init__(self, handler: Handler[..., Any], context: TaskContext, started: float) -> None:
        self.handler, self.context, self.started = handler, context, started

    def run_ms(self) -> int:
        return round((time.monotonic() - self.started) * 1000)

    def failed(self, reason: str, error: BaseException, *, kind: str = "") -> Outcome:
        return Outcome(kind="failed", reason=reason, blob=error_blob(error, kind), run_ms=self.run_ms())

    def stopped(self, why: StopReason) -> Outcome:
        kind: Literal["stopped", "lost", "release"] = (
            "release" if why == "shutdown" else "lost" if why == "lost" else "stopped"
        )
        return Outcome(kind=kind, run_ms=self.run_ms())

    def again_or_failed(self, reason: str, error: BaseException, delay_s: float | None = None) -> Outcome:
        names = error.names if isinstance(error, _RemoteError) else type_names(type(error))
        backoff = self.handler.backoff_for(names)
        if self.context.attempt >= self.context.max_attempts or (backoff is None and delay_s is None):
            return self.failed(reason, error)
        if delay_s is None and backoff is not None:
            delay_s = backoff.delay_s(self.context.attempt)
        return Outcome(
            kind="retry",
            reason=reason,
            delay_ms=round((delay_s or 0) * 1000),
            blob=error_blob(error),
            run_ms=self.run_ms(),
        )

    def of(self, error: BaseException) -> Outcome:
        """
        The outcome of an exception that the handler raised.
        """
        if isinstance(error, FailTask) or (
            isinstance(error, _RemoteError) and error.names[0] == type_names(FailTask)[0]
        ):
            return self.failed("error", error)
        if isinstance(error, RetryTask):
            return self.again_or_failed("error", error, error.delay_s)
        return self.again_or_failed("error", error, error.delay_s if isinstance(error, _RemoteError) else None)


def error_blob(error: BaseException, kind: str = "") -> bytes:
    if isinstance(error, _RemoteError):
        return to_json(error.error)
    return to_json(_error_of(error, kind))


def _error_of(error: BaseException, kind: str = "") -> dict[str, str]:
    frames = error.__traceback__
    # The user's frames only: ours say nothing about the failure.
    while frames is not None and frames.tb_frame.f_globals.get("__name__", "").startswith(
        ("rq_ceylon.worker", "asyncio", "concurrent.")
    ):
        frames = frames.tb_next
    is_of_user = frames is not None or error.__cause__ is not None
    text = "".join(traceback.format_exception(type(error), error, frames)) if is_of_user else ""
    return {
        "type": kind or type(error).__name__,
        "message": str(error).encode(errors="replace").decode()[:TRACEBACK_MAX],
        "traceback": text.encode(errors="replace").decode()[-TRACEBACK_MAX:],
    }


async def _in_process(handler: Handler[..., Any], raw: Mapping[str, Any]) -> bytes:
    """
    Run a handler in a child process, which imports it by name: no object of a user is sent, only JSON. Cancelling kills
    that child alone.
    """
    function = handler.function
    reply = await anyio.to_process.run_sync(
        _child, function.__module__, function.__qualname__, to_json(raw), cancellable=True
    )
    answer = from_json(reply)
    if "error" in answer:
        raise _RemoteError(tuple(answer["names"]), answer["error"], answer["delay_s"])
    blob: bytes = to_json(answer["value"])
    return blob


def _child(module: str, qualname: str, raw: bytes) -> bytes:
    """
    In the child: call the function, answer JSON.
    """
    # Ctrl-C goes to the whole terminal group; the parent decides what becomes of this task.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    names = [module, "__mp_main__"] if module == "__main__" else [module]
    loaded = next((sys.modules[name] for name in names if name in sys.modules), None) or importlib.import_module(module)
    found: Any = loaded
    for part in qualname.split("."):
        found = getattr(found, part)
    function = getattr(found, "function", found)
    handler: Handler[..., Any] = Handler(function.__name__, function, cpu=False)
    try:
        return b'{"value":' + handler.dump_result(function(**handler.call_arguments(from_json(raw), None))) + b"}"
    except BaseException as error:
        delay_s = error.delay_s if isinstance(error, RetryTask) else None
        return to_json({"error": _error_of(error), "names": type_names(type(error)), "delay_s": delay_s})
