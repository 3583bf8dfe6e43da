"""
Runs users' code: turns each assignment into one outcome. Never touches Redis.

An attempt that cannot start here is answered at once: its task is given back, or has failed. One that started ends when
its outcome is told, once:

- Its handler returns or raises. That decides the outcome. A value that is returned counts even after a stop.
- It was stopped (timeout, cancel, lost lease or shutdown: its asyncio task was cancelled), and raises. The reason of
  the stop decides the outcome, whatever is raised. A child process is killed; a thread cannot be, so it goes on, and
  `_leave_thread` counts it.
- It was stopped, and has not ended `CLEANUP_S` later. `_abandon` tells the outcome without waiting any longer.

Code that goes on after its outcome was told *hangs*.
"""

from __future__ import annotations

import asyncio
import collections
import inspect
import os
import random
from collections.abc import Awaitable, Callable, Sequence
from contextlib import AsyncExitStack
from functools import partial
from typing import Any

from loguru import logger

from rq_ceylon.attempt import StopReason, TaskContext, says_stopped
from rq_ceylon.errors import InvalidInputError, PayloadTooLargeError, UnknownTaskError
from rq_ceylon.handlers import Handler, Registry
from rq_ceylon.process import end_fork
from rq_ceylon.worker.children import Children
from rq_ceylon.worker.outcome import BUSY, NO_RESOURCES, Assignment, Attempt, Outcome, invalid, unknown
from rq_ceylon.worker.places import UNBOUNDED, Places
from rq_ceylon.worker.threads import End, in_thread

RESULT_BYTES_MAX = 1024 * 1024

PLACE_S = 2.0
"""How long a task waits for a thread or a child process before it is given back: other workers may have one free."""

START_S = 60.0
"""How long a child process may take to start."""

CLEANUP_S = 3.0
"""How long a coroutine may go on after it was cancelled; then it is cancelled once more and counts as hung. A process
has more time than this for its end, so that it can still give the task back."""

HOOK_S = 30.0
"""How long an `on_error` hook may take."""

HOOKS_LAST_S = 1.0
"""How long a worker that ends waits for its `on_error` hooks."""

HUNG_HOOKS_MAX = 8
"""How many threads of `on_error` hooks may hang before plain hooks are no longer called."""

RETRY_START_MS = 1000
"""The delay of a task that could not start because the system has no more threads, processes or files."""

Tell = Callable[[Outcome], None]


class _CannotStart(Exception):
    """The system gave no thread or process. The handler was not called, though middleware may have been entered."""


class _Run:
    """
    The state of one attempt. Its handler runs in an asyncio task, `task`, which runs nothing else. So whatever users'
    code does to its own task (cancels it, counts cancellations, exits) affects this attempt alone.

    Attributes:
        key: role and fence, by which the worker knows the attempt; kept here since a handler may write to its context.
        pid: the process in which the attempt began; if its handler forks, the fork must not go on as the worker.
        expected_at: where the attempt will ask for a place; None once it has asked, or needs none.
        outcome: set by `task` as its last step. It is told when `task` has ended.
        tell: called once with the outcome.
        is_told: the outcome was told. Whatever the handler still does no longer counts.
        thread: the thread that goes on although the attempt is over.
        hangs: the attempt is counted in `hung`, until both its task and its thread have ended.
    """

    def __init__(self, attempt: Attempt, begun: Callable[[TaskContext], None], tell: Tell) -> None:
        self.attempt, self.begun, self.tell = attempt, begun, tell
        self.key = attempt.context.role, attempt.context.fence
        self.pid = os.getpid()
        self.task: asyncio.Task[None] | None = None
        self.expected_at: Places | None = None
        self.outcome: Outcome | None = None
        self.is_told = False
        self.thread: asyncio.Future[End] | None = None
        self.hangs = False
        self._timer: asyncio.TimerHandle | None = None

    def after(self, delay_s: float, then: Callable[[], None]) -> None:
        """Call `then` after a delay. An attempt has one timer, so this replaces the one that was set before."""
        self.clear_timer()
        self._timer = asyncio.get_running_loop().call_later(delay_s, then)

    def expect_at(self, places: Places | None) -> None:
        """Count the attempt as expected at these places; None: it asks now, or will not ask any more."""
        if self.expected_at is not None:
            self.expected_at.expected -= 1
        self.expected_at = places
        if places is not None:
            places.expected += 1

    def clear_timer(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None


class Executor:
    """
    Runs handlers: coroutine functions on the event loop, plain functions in threads, `cpu=True` functions in child
    processes.

    Threads and child processes are *places*. If no place is free, now or in a moment, the task is given back at once,
    and waits by name for a worker that has one. Waiting for a place is not part of the attempt: its time begins when
    its handler is called.

    A thread cannot be stopped, and neither can a coroutine that ignores its cancellation. Such code *hangs* once its
    outcome was told. A hanging thread gives up its place, so that another task can have it, while fewer than `hung_max`
    attempts hang. After that the executor is exhausted: a further hanging thread keeps its place until it ends.

    Args:
        threads: how many plain functions may run at once. Of `cpu=True` functions, as many as there are processors.
        max_tasks, max_memory: after this many tasks, or with this many bytes, a child process is replaced.
        on_freed: called when code that hung has ended.

    Attributes:
        hung: how many attempts hang. Threads of `on_error` hooks that hang are counted apart.
        hung_max: how many may hang before the executor is exhausted; by default as many as there are threads.
        state: what the application's lifespan yielded.
    """

    def __init__(
        self,
        registry: Registry,
        *,
        threads: int = 16,
        max_tasks: int | None = None,
        max_memory: int | None = None,
        on_freed: Callable[[], None] = lambda: None,
    ) -> None:
        self.registry, self.on_freed = registry, on_freed
        self.hung, self.hung_max = 0, threads
        self.state: Any = None
        self._threads = Places(threads)
        self._children = Children(max_tasks=max_tasks, max_memory=max_memory, settings=registry.settings)
        self._running: dict[tuple[str, int], _Run] = {}
        self._one_told = asyncio.Event()
        self._hooks: set[asyncio.Task[None]] = set()
        self._hung_hooks = 0

    @property
    def is_exhausted(self) -> bool:
        """Whether so many attempts hang that a further hanging thread keeps its place."""
        return self.hung >= self.hung_max

    def start(
        self, assignment: Assignment, tell: Tell, *, begun: Callable[[TaskContext], None] = lambda _: None
    ) -> None:
        """
        Run one attempt. Whatever users' code does becomes an outcome.

        Args:
            tell: called with the outcome, exactly once; before this returns if the task cannot run here.
            begun: called right before the handler; from then on the context has its `deadline`.
        """
        try:
            attempt = Attempt(self.registry, assignment, self.state)
        except UnknownTaskError as error:
            delivery = assignment.delivery
            logger.warning("Task {}/{} waits for a worker that knows it: {}", delivery.gid, delivery.tid, error)
            tell(unknown(assignment.body["uses"], error))
            return
        except InvalidInputError as error:
            tell(invalid(error))
            return
        places = self._places(attempt.handler)
        if places is not None and places.room == 0:
            tell(Outcome("release", reason=BUSY + attempt.context.uses))
            return
        run = _Run(attempt, begun, tell)
        self._running[run.key] = run
        run.expect_at(places)
        run.task = asyncio.get_running_loop().create_task(self._attempt(run))
        run.task.add_done_callback(partial(self._task_ended, run))

    def shares(self, names: Sequence[str]) -> dict[str, int]:
        """
        How many tasks of each of these names can start here now. Names that need the same places share those that are
        free, so that the shares together never exceed them.
        """
        by_places: dict[Places | None, list[str]] = collections.defaultdict(list)
        for name in names:
            handler = self.registry.find(name)
            by_places[self._places(handler) if handler else None].append(name)
        shares: dict[str, int] = {}
        for places, some in by_places.items():
            random.shuffle(some)  # with fewer places than names, no name always comes last
            left = UNBOUNDED if places is None else places.room
            for number, name in enumerate(some):
                shares[name] = left if places is None else -(-left // (len(some) - number))
                left -= 0 if places is None else shares[name]
        return shares

    def _places(self, handler: Handler[..., Any]) -> Places | None:
        return {"async": None, "thread": self._threads, "process": self._children.places}[handler.kind]

    def cancel(self, role: str, fence: int, why: StopReason) -> None:
        """
        Stop an attempt. If its handler raises then, `why` decides the outcome: cancelled gives `stopped`, lost gives
        `lost`, and shutdown gives `release`. If the handler returns all the same, its result counts.
        """
        if (run := self._running.get((role, fence))) is not None:
            self._stop(run, why)

    def reported(self) -> dict[str, tuple[float | None, str]]:
        """The progress that running attempts have reported, by task; without those that reported none."""
        contexts = [run.attempt.context for run in self._running.values()]
        return {context.id: context.reported for context in contexts if context.reported != (None, "")}

    async def close(self) -> None:
        """Give back the tasks that still run, and end the child processes. Code that hangs is left behind."""
        for run in list(self._running.values()):
            self._stop(run, "shutdown")
        while self._running:
            self._one_told.clear()
            await self._one_told.wait()
        if self._hooks:
            await asyncio.wait(self._hooks, timeout=HOOKS_LAST_S)
        for hook in self._hooks:
            hook.cancel()
        await self._children.close()

    # ---- in the task of the attempt ----------------------------------------------------------------------------------
    async def _attempt(self, run: _Run) -> None:
        attempt, handler = run.attempt, run.attempt.handler
        try:
            try:
                arguments = handler.call_arguments(attempt.raw, attempt.context)
            except InvalidInputError as error:
                run.outcome = attempt.failed("invalid", error)
                return
            value = await self._called(run, arguments)
            end_fork(run.pid)  # a process that the handler forked ends here: two must not answer for one task
            try:
                # A child process has dumped its value already.
                blob: bytes = value if handler.kind == "process" else handler.dump_result(value)
            except InvalidInputError as error:
                run.outcome = attempt.failed("invalid", error)
                return
        except BaseException as error:  # of any kind: a SystemExit that leaves a task ends the event loop
            end_fork(run.pid, error)
            run.outcome = self._raised(run, error)
            return
        if len(blob) > RESULT_BYTES_MAX:
            too_large = PayloadTooLargeError(
                f"the result of task {attempt.context.uses!r} has {len(blob):,} bytes, {RESULT_BYTES_MAX:,} are "
                "allowed; store it elsewhere and return a reference"
            )
            run.outcome = attempt.failed("invalid", too_large)
        else:
            run.outcome = attempt.completed(blob)

    async def _called(self, run: _Run, arguments: dict[str, Any]) -> Any:
        """
        Call the handler where its kind runs, and return or raise as it does.

        The attempt has one timer, which is set anew for each stage: waiting for a place, starting a child process,
        running, and cleaning up after a stop. If it runs out in the first two, the handler has not begun, so the task
        is given back (`_raised` tells that by `began`).
        """
        attempt, handler = run.attempt, run.attempt.handler
        if handler.kind == "async":
            self._begin(run)
            return await self._surrounded(run, lambda: handler.function(**arguments))
        run.after(PLACE_S, lambda: self._stop(run, "timeout"))
        # The next await asks for the place, so the attempt is never counted both as expected and as waiting.
        run.expect_at(None)
        if handler.kind == "process":
            async with self._children.places:
                run.after(START_S, lambda: self._stop(run, "timeout"))
                try:
                    child = await self._children.take()
                except ChildProcessError:  # an OSError too, but the process was started and died: that is a failure
                    raise
                except OSError as error:
                    raise _CannotStart(f"no process can be started ({error})") from error
                async with child:
                    self._begin(run)
                    return await self._surrounded(run, lambda: child.call(handler, attempt.raw, attempt.context))
        await self._threads.acquire()
        return await self._in_thread(run, partial(handler.function, **arguments))  # which gives the place up

    def _begin(self, run: _Run) -> None:
        run.attempt.begin()
        run.after(run.attempt.timeout_s, lambda: self._stop(run, "timeout"))
        run.begun(run.attempt.context)

    async def _surrounded(self, run: _Run, call: Callable[[], Awaitable[Any]]) -> Any:
        """Make the call within the middleware; the first declared is outermost."""
        if not self.registry.middleware:
            return await call()
        async with AsyncExitStack() as stack:
            try:
                for middleware in self.registry.middleware:
                    await stack.enter_async_context(middleware(run.attempt.context))
                return await call()
            except BaseException as error:
                failure = error
                raise
        # A middleware swallowed the exception. It may observe or replace one, but a failure stays a failure.
        raise failure

    async def _in_thread(self, run: _Run, function: Callable[[], Any]) -> Any:
        """Call a plain function in a thread. The caller has acquired a place among the threads; this gives it up."""
        thread: asyncio.Future[End] | None = None

        async def call() -> Any:
            nonlocal thread
            try:
                thread = in_thread(function, f"task-{run.attempt.context.id}")
            except RuntimeError as error:
                raise _CannotStart(f"no thread can be started ({error})") from error
            try:
                # Shielded: cancelling the attempt must not cancel the future, which alone tells when the thread ends.
                end = await asyncio.shield(thread)
            except asyncio.CancelledError:
                if not thread.done():
                    raise
                end = thread.result()  # the thread ended at the moment of the cancellation, so its result counts
            value = end.unwrap()
            return await value if inspect.isawaitable(value) else value

        try:
            self._begin(run)
            return await self._surrounded(run, call)
        finally:
            if thread is None or thread.done():
                self._threads.give_up()
            else:  # cancelled while the function runs
                self._leave_thread(run, thread)

    def _leave_thread(self, run: _Run, thread: asyncio.Future[End]) -> None:
        """Count a thread that goes on although its attempt is over. Give up its place unless exhausted."""
        # Without this attempt, which `_abandon` has counted if middleware held it up.
        is_replaced = self.hung - run.hangs < self.hung_max
        run.thread = thread
        if is_replaced:
            self._threads.give_up()

        def returned(_: object) -> None:
            if not is_replaced:  # it has kept its place until now
                self._threads.give_up()
            self._end_hanging(run)

        thread.add_done_callback(returned)
        self._hangs(run, "its thread goes on")

    # ---- how it ends -------------------------------------------------------------------------------------------------
    def _stop(self, run: _Run, why: StopReason) -> None:
        """
        Cancel an attempt for this reason, unless one was given before: a second cancellation would cut short the
        cleaning up after the first.
        """
        context = run.attempt.context
        if context.stopped is None and not run.is_told and run.task is not None:
            context.stopped = why
            run.after(CLEANUP_S, lambda: self._abandon(run))
            run.task.cancel()

    def _abandon(self, run: _Run) -> None:
        """Tell the outcome of an attempt that goes on `CLEANUP_S` after its cancellation, and count it as hung."""
        self._hangs(run, "it ignores that it was cancelled")
        assert run.task is not None
        run.task.cancel()  # once more, since the handler ignored the first
        self._tell_outcome(run, self._raised(run, asyncio.CancelledError()))

    def _task_ended(self, run: _Run, task: asyncio.Task[None]) -> None:
        run.expect_at(None)  # it may have ended before it asked for a place
        self._end_hanging(run)
        if run.is_told:  # by `_abandon`
            return
        if run.outcome is not None:  # also if a cancellation came in its last step: its work is done, so it counts
            self._tell_outcome(run, run.outcome)
        elif task.cancelled():  # before its first step, so `_attempt` could set no outcome
            self._tell_outcome(run, self._raised(run, asyncio.CancelledError()))
        else:  # `_attempt` itself failed
            error = task.exception()
            assert error is not None
            self._tell_outcome(run, run.attempt.failed("error", error))
            logger.opt(exception=error).error("Task {} cannot be used", run.attempt.context.id)

    def _tell_outcome(self, run: _Run, outcome: Outcome) -> None:
        """Tell the outcome: from here on, whatever the handler does no longer counts."""
        run.is_told = True
        run.clear_timer()
        del self._running[run.key]
        self._one_told.set()
        run.tell(outcome)

    def _hangs(self, run: _Run, what: str) -> None:
        if run.hangs:
            return
        run.hangs = True
        self.hung += 1
        context = run.attempt.context
        if context.stopped != "shutdown":
            words = "Task {} ({}) hangs: its attempt is over ({}), but {}; {} of {} that may"
            logger.error(words, context.id, context.uses, context.stopped, what, self.hung, self.hung_max)
            if self.hung == self.hung_max:
                logger.error("So much hangs that nothing takes its place any more; restart this worker")

    def _end_hanging(self, run: _Run) -> None:
        assert run.task is not None
        if run.hangs and run.task.done() and (run.thread is None or run.thread.done()):
            run.hangs = False
            self.hung -= 1
            self.on_freed()

    def _raised(self, run: _Run, error: BaseException) -> Outcome:
        """The outcome of an attempt that ended with an exception."""
        attempt, context = run.attempt, run.attempt.context
        if context.stopped is None and says_stopped(error):
            context.stopped = "timeout"  # the handler noticed its deadline before the timer did
        match context.stopped:
            case None if isinstance(error, _CannotStart):
                logger.warning("Task {} cannot start now: {}", context.id, error)
                return Outcome("release", reason=NO_RESOURCES, delay_ms=RETRY_START_MS)
            case None:
                outcome = attempt.raised(error)
            case "timeout" if attempt.began is None:  # it only waited for a place or for its child process
                return Outcome("release", reason=BUSY + context.uses)
            case "timeout":
                error, outcome = attempt.timed_out()
            case why:  # cancelled, lost or shutdown: not the handler's fault, so no hook hears of it
                return attempt.stopped(why)
        if self.registry.on_error:
            hooks = asyncio.get_running_loop().create_task(self._tell(context, error))
            self._hooks.add(hooks)
            hooks.add_done_callback(self._hooks.discard)
        return outcome

    # ---- hooks -------------------------------------------------------------------------------------------------------
    async def _tell(self, context: TaskContext, error: BaseException) -> None:
        """Call the `on_error` hooks. This runs in a task of its own, so that no attempt waits for them."""
        for hook in self.registry.on_error:
            try:
                async with asyncio.timeout(HOOK_S):
                    if inspect.iscoroutinefunction(hook):
                        await hook(context, error)
                    elif self._hung_hooks < HUNG_HOOKS_MAX:
                        await self._call_plain_hook(partial(hook, context, error))
            except TimeoutError:
                logger.error("on_error of task {} took longer than {:g} s and was left behind", context.id, HOOK_S)
            except BaseException:  # of any kind: a SystemExit would end the event loop
                logger.exception("on_error of task {} failed", context.id)

    async def _call_plain_hook(self, hook: Callable[[], Any]) -> None:
        thread = in_thread(hook, "on-error")
        try:
            value = (await asyncio.shield(thread)).unwrap()
        except asyncio.CancelledError:
            if not thread.done():
                self._hung_hooks += 1
                thread.add_done_callback(self._hook_returned)
            raise
        if inspect.isawaitable(value):
            await value

    def _hook_returned(self, _: object) -> None:
        self._hung_hooks -= 1
