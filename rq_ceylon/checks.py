"""
Runs the functions of callable goals beside the monitor. They are users' code, so one that hangs must not block the
monitor's event loop, another callable, or the end of the process.
"""

from __future__ import annotations

import asyncio
import inspect
import threading
from collections import defaultdict
from collections.abc import Awaitable, Callable
from concurrent.futures import Future
from contextlib import suppress
from typing import Any, NamedTuple

from rq_ceylon.handlers import GoalCheck
from rq_ceylon.views import GroupView

CHECK_S = 30.0
"""How long a callable may take for one goal; after that, the goal stays undecided."""

PLACES = 16
"""How many goals one callable is asked about at once. Goals on which it hangs count too, so each callable has a bounded
number of hanging threads, and takes no place of another callable."""


class CheckHangsError(TimeoutError):
    """A callable did not answer within `CHECK_S`."""


class _Raised(NamedTuple):
    """An exception of users' code as a value, because a SystemExit that left its task would end the event loop."""

    error: BaseException


class Checks:
    """
    Calls each callable in a daemon thread. An async callable then runs in an event loop of its own: it meets the same
    loop each time, and cannot block the loop of another callable.
    """

    def __init__(self) -> None:
        self.hanging = 0
        self._places: dict[str, asyncio.Semaphore] = defaultdict(lambda: asyncio.Semaphore(PLACES))
        self._loops: dict[str, asyncio.AbstractEventLoop] = {}
        self._guard = threading.Lock()
        self._is_closed = threading.Event()

    async def ask(
        self, name: str, check: GoalCheck, view: GroupView, *, on_hang: Callable[[], object]
    ) -> bool | BaseException:
        """
        Ask a callable about a goal. Returns only when its code has ended, even if it took too long, because it must not
        be asked about this goal again before that.

        Args:
            on_hang: called when the callable has taken too long; `hanging` counts the calls that hang now, including
                this one.

        Returns:
            whether the callable says that the goal is achieved, or the exception that it raised, or CheckHangsError.
        """
        async with self._places[name]:
            question = _Question(lambda: self._loop_of(name))
            threading.Thread(target=question.ask, args=[check, view], name=f"check-{name}", daemon=True).start()
            answer = asyncio.wrap_future(question.answer)
            try:
                done, _ = await asyncio.wait([answer], timeout=CHECK_S)
                if not done:
                    await self._outlast(question, answer, on_hang)
                    return CheckHangsError(f"it did not answer within {CHECK_S:g} s")
            finally:
                answer.cancel()  # otherwise a thread that ends later would report to a loop that is already closed
            found = answer.result()
            return found.error if isinstance(found, _Raised) else found

    async def _outlast(
        self, question: _Question, answer: asyncio.Future[bool | _Raised], on_hang: Callable[[], object]
    ) -> None:
        self.hanging += 1
        try:
            on_hang()
            question.cancel()
            await asyncio.wait([answer])
        finally:
            self.hanging -= 1

    def close(self) -> None:
        """End each loop as soon as no code blocks it."""
        self._is_closed.set()
        for loop in self._loops.values():
            with suppress(RuntimeError):  # the loop has just ended
                loop.call_soon_threadsafe(loop.stop)
        self._loops.clear()

    def _loop_of(self, name: str) -> asyncio.AbstractEventLoop:
        with self._guard:
            if name not in self._loops:
                self._loops[name] = loop = asyncio.new_event_loop()
                threading.Thread(target=_run, args=[loop, self._is_closed], name=f"checks-{name}", daemon=True).start()
            return self._loops[name]


class _Question:
    """One callable asked about one goal; `answer` gets a bool or `_Raised` when the code has ended."""

    def __init__(self, loop: Callable[[], asyncio.AbstractEventLoop]) -> None:
        self.answer: Future[bool | _Raised] = Future()
        self.answer.set_running_or_notify_cancel()  # a waiter cannot cancel it
        self._loop = loop
        self._task: asyncio.Task[bool | _Raised] | None = None

    def ask(self, check: GoalCheck, view: GroupView) -> None:
        try:
            found = check(view)
            if inspect.isawaitable(found):
                self._loop().call_soon_threadsafe(self._begin, found)
            else:
                self.answer.set_result(bool(found))
        except BaseException as error:
            self.answer.set_result(_Raised(error))

    def cancel(self) -> None:
        """Cancel the callable if it is async; a plain function cannot be ended."""
        if (task := self._task) is not None:
            self._loop().call_soon_threadsafe(task.cancel)

    def _begin(self, found: Awaitable[Any]) -> None:
        async def body() -> bool | _Raised:
            try:
                return bool(await found)
            except BaseException as error:
                return _Raised(error)

        def end(task: asyncio.Task[bool | _Raised]) -> None:
            self.answer.set_result(_Raised(asyncio.CancelledError()) if task.cancelled() else task.result())

        self._task = asyncio.get_running_loop().create_task(body())
        self._task.add_done_callback(end)


def _run(loop: asyncio.AbstractEventLoop, is_closed: threading.Event) -> None:
    asyncio.set_event_loop(loop)
    while not is_closed.is_set():  # a callable may stop its loop, which serves its other goals too
        # A task that a callable started may raise these; the callable gets them too.
        with suppress(SystemExit, KeyboardInterrupt):
            loop.run_forever()
    for task in asyncio.all_tasks(loop):
        task.cancel()
    loop.run_until_complete(asyncio.sleep(0))
    loop.close()
