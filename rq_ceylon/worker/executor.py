"""
Turns one assignment into an outcome. Runs users' code, and never touches Redis.
"""

from __future__ import annotations

import asyncio
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
from rq_ceylon.handlers import Registry, awaited
from rq_ceylon.worker.children import Children
from rq_ceylon.worker.outcome import BUSY, Assignment, Attempt, Outcome, invalid, unknown

RESULT_BYTES_MAX = 1024 * 1024

WAIT_S = 60.0
"""How long a task waits for a thread or a process before it is given back: others may be idle."""

CLEANUP_S = 5.0
"""How long a coroutine may go on after it was cancelled; then it is cancelled once more and abandoned."""


class _Raised(NamedTuple):
    """
    An exception of a handler, as a value: a SystemExit that left its task would end the event loop.
    """

    error: BaseException


class _Run:
    """
    An attempt under way, in the task that called `Executor.run`: `is_over` once its handler has ended or was abandoned,
    from when on nothing may cancel that task.
    """

    def __init__(
        self, attempt: Attempt, begun: Callable[[TaskContext], None], abandoned: Callable[[Outcome], None]
    ) -> None:
        self.attempt, self.begun, self.abandoned = attempt, begun, abandoned
        self.loop = asyncio.get_running_loop()
        runner = asyncio.current_task()
        assert runner is not None
        self.runner: asyncio.Task[Any] = runner
        self.is_over = False
        self.cancels = 0
        self.timer: asyncio.TimerHandle | None = None

    def after(self, delay_s: float | None, then: Callable[[], None] = lambda: None) -> None:
        """
        Set the one timer of the attempt, None: to nothing.
        """
        if self.timer is not None:
            self.timer.cancel()
        self.timer = None if delay_s is None else self.loop.call_later(delay_s, then)

    def cancel(self) -> None:
        self.cancels += 1
        self.runner.cancel()


class Executor:
    """
    Runs handlers: coroutine functions on the loop, plain ones in threads, `cpu=True` in processes.

    A thread cannot be stopped, nor a coroutine that goes on when cancelled: when its attempt is settled early it is
    *abandoned*. `abandoned` counts those that still run; each keeps occupying a slot (a thread its place among the
    threads, too), and `on_freed` is called when one ends.

    Args:
        threads: how many plain functions at once; others wait, and so do `cpu=True` ones, of which as many run as there
            are processors. Waiting is not part of the attempt: its time begins with its handler.
    """

    def __init__(self, registry: Registry, *, threads: int = 16, on_freed: Callable[[], None] = lambda: None) -> None:
        self.registry, self.on_freed = registry, on_freed
        self.abandoned = 0
        self._threads = asyncio.Semaphore(threads)
        self._children = Children()
        self._running: dict[tuple[str, int], _Run] = {}
        self._settled = asyncio.Event()
        self._telling: set[asyncio.Task[None]] = set()

    async def run(
        self,
        assignment: Assignment,
        *,
        begun: Callable[[TaskContext], None] = lambda _: None,
        abandoned: Callable[[Outcome], None] = lambda _: None,
    ) -> Outcome:
        """
        Run one attempt in the present task. Whatever users' code does becomes an outcome.

        Args:
            begun: called when the handler is about to be called, from when on `deadline` of its context is known.
            abandoned: told the outcome of a coroutine that goes on although it was cancelled; what `run` returns
                whenever that ends is of no interest any more.
        """
        try:
            attempt = Attempt(self.registry, assignment)
        except UnknownTaskError as error:
            outcome, delivery = unknown(assignment.claimed.releases, error), assignment.delivery
            words = "Task {}/{} is given back for {:g} s: {}"
            logger.warning(words, delivery.gid, delivery.tid, outcome.delay_ms / 1000, error)
            return outcome
        except InvalidInputError as error:
            return invalid(error)
        try:
            arguments = attempt.handler.call_arguments(attempt.raw, attempt.context)
        except InvalidInputError as error:
            return attempt.failed("invalid", error)
        except Exception as error:  # of a user's validator
            return await self._told(attempt, error, attempt.raised(error))
        run = _Run(attempt, begun, abandoned)
        key = (assignment.delivery.role, assignment.delivery.fence)
        self._running[key] = run
        end = await self._call(run, arguments)
        if run.is_over:
            self._freed()
        self._settle(run)
        for _ in range(run.cancels):
            run.runner.uncancel()
        if run.runner.cancelling():
            raise asyncio.CancelledError  # the worker itself goes down
        return await self._outcome(run, end)

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
        for run in list(self._running.values()):
            self._stop(run, "shutdown")
        while self._running:
            self._settled.clear()
            await self._settled.wait()
        await self._children.close()

    # ---- how it runs -------------------------------------------------------------------------------------------------
    async def _call(self, run: _Run, arguments: dict[str, Any]) -> Any:
        handler = run.attempt.handler
        try:
            if handler.kind == "async":
                self._begin(run)
                return await handler.function(**arguments)
            run.after(WAIT_S, lambda: self._stop(run, "timeout"))
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
        if context.stopped is None and not run.is_over:
            context.stopped = why
            run.after(CLEANUP_S, lambda: self._abandon(run))
            run.cancel()

    def _abandon(self, run: _Run) -> None:
        context = run.attempt.context
        logger.error(
            "Task {} goes on although it was cancelled ({}); it is left behind, and takes a slot until it ends",
            context.id,
            context.stopped,
        )
        self.abandoned += 1
        self._settle(run)
        run.cancel()

        async def tell() -> None:
            run.abandoned(await self._outcome(run, _Raised(asyncio.CancelledError())))

        telling = run.loop.create_task(tell())
        self._telling.add(telling)
        telling.add_done_callback(self._telling.discard)

    def _settle(self, run: _Run) -> None:
        """
        From here on nothing more of the handler counts.
        """
        run.is_over = True
        run.after(None)
        self._running.pop((run.attempt.context.role, run.attempt.context.fence), None)
        self._settled.set()

    def _freed(self) -> None:
        self.abandoned -= 1
        self.on_freed()

    async def _outcome(self, run: _Run, end: Any) -> Outcome:
        attempt, context = run.attempt, run.attempt.context
        if isinstance(end, _Raised):
            if context.stopped is None and isinstance(end.error, AttemptStoppedError):
                context.stopped = "timeout"  # the handler saw it before the loop did
            match context.stopped:
                case None:
                    return await self._told(attempt, end.error, attempt.raised(end.error))
                case "timeout" if attempt.began is None:
                    return Outcome("release", reason=BUSY)
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
        if len(blob) > RESULT_BYTES_MAX:
            too_large = PayloadTooLargeError(
                f"the result of task {context.uses!r} has {len(blob):,} bytes, {RESULT_BYTES_MAX:,} are allowed; "
                "store it elsewhere and return a reference"
            )
            return attempt.failed("invalid", too_large)
        return attempt.completed(blob)

    async def _told(self, attempt: Attempt, error: BaseException, outcome: Outcome) -> Outcome:
        for hook in self.registry.on_error:
            try:
                await awaited(hook(attempt.context, error))
            except Exception:
                logger.exception("on_error of task {} failed", attempt.context.id)
        return outcome
