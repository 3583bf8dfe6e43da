"""
Turns one assignment into an outcome. Runs users' code, and never touches Redis.
"""

from __future__ import annotations

import asyncio
import inspect
import threading
from collections.abc import Callable
from concurrent.futures import Future
from contextlib import suppress
from contextvars import copy_context
from functools import partial
from typing import Any, NamedTuple

from loguru import logger

from rq_ceylon.attempt import AttemptStoppedError, StopReason, TaskContext
from rq_ceylon.errors import InvalidInputError, PayloadTooLargeError, UnknownTaskError
from rq_ceylon.handlers import Registry
from rq_ceylon.worker.children import Children
from rq_ceylon.worker.outcome import BUSY, Assignment, Attempt, Outcome, invalid, unknown

RESULT_BYTES_MAX = 1024 * 1024

WAIT_S = 60.0
"""How long a task waits for a thread or a process before it is given back: others may be idle."""

CLEANUP_S = 5.0
"""How long a coroutine may go on after it was cancelled; then it is cancelled once more and abandoned."""


class _Raised(NamedTuple):
    """
    An exception of a handler, as a value: no future takes a StopIteration, and a SystemExit would end the event loop.
    """

    error: BaseException


class _Run:
    """
    An attempt under way. `settled` is done when it is over: its runner has ended, or was abandoned.
    """

    def __init__(self, attempt: Attempt, begun: Callable[[TaskContext], None], work: Callable[[_Run], Any]) -> None:
        self.attempt, self.begun = attempt, begun
        self.loop = asyncio.get_running_loop()
        self.settled: asyncio.Future[None] = self.loop.create_future()
        self.timer: asyncio.TimerHandle | None = None
        self.runner: asyncio.Task[Any] = self.loop.create_task(work(self))
        self.runner.add_done_callback(self.settle)

    def settle(self, _: object = None) -> None:
        if not self.settled.done():
            self.settled.set_result(None)

    def after(self, delay_s: float | None, then: Callable[[], None] = lambda: None) -> None:
        """
        Set the one timer of the attempt, None: to nothing.
        """
        if self.timer is not None:
            self.timer.cancel()
        self.timer = None if delay_s is None else self.loop.call_later(delay_s, then)

    def end(self) -> Any:
        """
        What the handler returned, or what ended it.
        """
        if not self.runner.done() or self.runner.cancelled():
            return _Raised(asyncio.CancelledError())
        return self.runner.result()


class Executor:
    """
    Runs handlers: coroutine functions on the loop, plain ones in threads, `cpu=True` in processes.

    A thread cannot be stopped, nor a coroutine that goes on when cancelled: when its attempt is settled early it is
    *abandoned*. `abandoned` counts those that still run; each keeps occupying a slot (a thread its place among the
    threads, too), and `on_freed` is called when one ends.

    Args:
        threads: how many plain functions at once; others wait, and so do `cpu=True` ones, of which as many run as there
            are processors. Waiting is not part of the attempt: its time begins with its handler.
        cleanup_s: see CLEANUP_S.
    """

    def __init__(
        self,
        registry: Registry,
        *,
        threads: int = 16,
        result_bytes_max: int = RESULT_BYTES_MAX,
        wait_s: float = WAIT_S,
        cleanup_s: float = CLEANUP_S,
        on_freed: Callable[[], None] = lambda: None,
    ) -> None:
        self.registry, self.result_bytes_max, self.on_freed = registry, result_bytes_max, on_freed
        self.abandoned = 0
        self._wait_s, self._cleanup_s = wait_s, cleanup_s
        self._threads = asyncio.Semaphore(threads)
        self._children = Children()
        self._running: dict[tuple[str, int], _Run] = {}

    async def run(self, assignment: Assignment, *, begun: Callable[[TaskContext], None] = lambda _: None) -> Outcome:
        """
        Run one attempt. Whatever users' code does becomes an outcome.

        Args:
            begun: called when the handler is about to be called, from when on `deadline` of its context is known.
        """
        try:
            attempt = Attempt(self.registry, assignment)
        except UnknownTaskError as error:
            outcome = unknown(assignment.releases, error)
            logger.warning(
                "Task {}/{} is given back for {:g} s: {}",
                assignment.group_id,
                assignment.task_id,
                outcome.delay_ms / 1000,
                error,
            )
            return outcome
        except InvalidInputError as error:
            return invalid(error)
        try:
            arguments = attempt.handler.call_arguments(attempt.raw, attempt.context)
        except InvalidInputError as error:
            return attempt.failed("invalid", error)
        except Exception as error:  # of a user's validator
            return await self._told(attempt, error, attempt.raised(error))
        run = _Run(attempt, begun, lambda run: self._call(run, arguments))
        key = (assignment.role, assignment.fence)
        self._running[key] = run
        try:
            await run.settled
        except asyncio.CancelledError:  # the worker itself goes down
            self._stop(run, "shutdown")
            raise
        finally:
            run.after(None)
            del self._running[key]
        return await self._outcome(run)

    def cancel(self, role: str, fence: int, why: StopReason) -> None:
        """
        End an attempt from outside: `run` then returns stopped (cancelled), lost, or release (shutdown), whatever the
        handler raises. One that ends normally all the same counts by what it returns.
        """
        if (run := self._running.get((role, fence))) is not None:
            self._stop(run, why)

    def reported(self) -> dict[str, tuple[float | None, str]]:
        """
        What running attempts said of their progress, by task: those that said anything.
        """
        contexts = [run.attempt.context for run in self._running.values()]
        return {context.id: context.reported for context in contexts if context.reported != (None, "")}

    async def close(self) -> None:
        """
        Give back what still runs, and end the processes. What does not end is left behind: threads are daemons, they do
        not keep the process.
        """
        runs = list(self._running.values())
        for run in runs:
            self._stop(run, "shutdown")
        if runs:
            await asyncio.wait([run.settled for run in runs])
        await self._children.close()

    # ---- how it runs -------------------------------------------------------------------------------------------------
    async def _call(self, run: _Run, arguments: dict[str, Any]) -> Any:
        handler = run.attempt.handler
        try:
            if handler.kind == "async":
                self._begin(run)
                return await handler.function(**arguments)
            run.after(self._wait_s, lambda: self._stop(run, "timeout"))
            if handler.kind == "process":
                return await self._children.call(handler, run.attempt.raw, lambda: self._begin(run))
            return await self._in_thread(run, partial(handler.function, **arguments))
        except BaseException as error:
            return _Raised(error)

    def _begin(self, run: _Run) -> None:
        run.attempt.begin()
        run.after(run.attempt.timeout_s, lambda: self._stop(run, "timeout"))
        run.begun(run.attempt.context)

    async def _in_thread(self, run: _Run, function: Callable[[], Any]) -> Any:
        done: Future[Any] = Future()
        variables = copy_context()
        abandoned = False

        def body() -> None:
            try:
                done.set_result(variables.run(function))
            except BaseException as error:
                done.set_result(_Raised(error))
            with suppress(RuntimeError):  # the loop is closed: the worker has gone, and nobody counts any more
                run.loop.call_soon_threadsafe(returned)

        def returned() -> None:
            self._threads.release()
            if abandoned:
                self._freed()

        await self._threads.acquire()
        try:
            self._begin(run)
            threading.Thread(target=body, name=f"task-{run.attempt.context.id}", daemon=True).start()
        except BaseException:
            self._threads.release()
            raise
        try:
            return await asyncio.shield(asyncio.wrap_future(done))
        except asyncio.CancelledError:
            if done.done():
                return done.result()
            abandoned = True
            self.abandoned += 1
            raise

    # ---- how it ends -------------------------------------------------------------------------------------------------
    def _stop(self, run: _Run, why: StopReason) -> None:
        """
        Cancel an attempt; only once, since a second time would cut short what it does about the first.
        """
        context = run.attempt.context
        if context.stopped is None and not run.runner.done():
            context.stopped = why
            run.after(self._cleanup_s, lambda: self._abandon(run))
            run.runner.cancel()

    def _abandon(self, run: _Run) -> None:
        if run.runner.done():
            return
        logger.error(
            "Task {} goes on although it was cancelled ({}); it is left behind, and takes a slot until it ends",
            run.attempt.context.id,
            run.attempt.context.stopped,
        )
        self.abandoned += 1
        run.runner.add_done_callback(self._freed)
        run.runner.cancel()
        run.settle()

    def _freed(self, _: object = None) -> None:
        self.abandoned -= 1
        self.on_freed()

    async def _outcome(self, run: _Run) -> Outcome:
        attempt, context, end = run.attempt, run.attempt.context, run.end()
        if isinstance(end, _Raised):
            if context.stopped is None and isinstance(end.error, AttemptStoppedError):
                context.stopped = "timeout"  # the handler saw it before the loop did
            match context.stopped:
                case None:
                    return await self._told(attempt, end.error, attempt.raised(end.error))
                case "timeout" if attempt.began is None:
                    return Outcome(kind="release", reason=BUSY)
                case "timeout":
                    return await self._told(attempt, *attempt.timed_out())
                case why:
                    return attempt.stopped(why)
        try:
            blob: bytes = end if attempt.handler.kind == "process" else attempt.handler.dump_result(end)
        except InvalidInputError as error:
            return attempt.failed("invalid", error)
        except Exception as error:  # of a user's serializer
            return await self._told(attempt, error, attempt.raised(error))
        if len(blob) > self.result_bytes_max:
            too_large = PayloadTooLargeError(
                f"the result of task {context.uses!r} has {len(blob):,} bytes, {self.result_bytes_max:,} are allowed; "
                "store it elsewhere and return a reference"
            )
            return attempt.failed("invalid", too_large)
        return attempt.completed(blob)

    async def _told(self, attempt: Attempt, error: BaseException, outcome: Outcome) -> Outcome:
        for hook in self.registry.on_error:
            try:
                told = hook(attempt.context, error)
                if inspect.isawaitable(told):
                    await told
            except Exception:
                logger.exception("on_error of task {} failed", attempt.context.id)
        return outcome
