"""Runs each plain function of users in its own daemon thread. A thread cannot be ended, so nothing waits for one."""

from __future__ import annotations

import asyncio
import os
import socket
import threading
from collections.abc import Callable
from contextlib import suppress
from contextvars import copy_context
from functools import partial
from typing import Any, NamedTuple

from rq_ceylon.process import end_fork


class End(NamedTuple):
    """
    The value that a function returned, or the exception that it raised. The exception travels as a value, since asyncio
    handles some of them (StopIteration, SystemExit) in ways of its own.
    """

    value: Any = None
    error: BaseException | None = None

    def unwrap(self) -> Any:
        """
        Raises:
            BaseException: the exception that the function raised.
        """
        if self.error is not None:
            raise self.error
        return self.value


def in_thread(function: Callable[[], Any], name: str) -> asyncio.Future[End]:
    """
    Start `function` in a new daemon thread, with the caller's context variables.

    Returns:
        A future of the running loop, set once the function has ended. Cancelling the future does not end the thread.

    Raises:
        RuntimeError: the system gives no more threads.
    """
    loop = asyncio.get_running_loop()
    ended: asyncio.Future[End] = loop.create_future()
    variables, here = copy_context(), os.getpid()

    def tell(end: End) -> None:
        if not ended.done():
            ended.set_result(end)

    def body() -> None:
        try:
            end = End(value=variables.run(function))
        except BaseException as error:
            end = End(error=error)
        end_fork(here, end.error)  # a process that the function forked ends here
        with suppress(RuntimeError):  # the loop is closed, as the worker has ended
            loop.call_soon_threadsafe(tell, end)

    threading.Thread(target=body, name=name, daemon=True).start()
    return ended


class Loop(asyncio.SelectorEventLoop):
    """
    An event loop that looks up each host name in a thread of its own. Asyncio uses the loop's default executor, which
    users' code may fill (`asyncio.to_thread`) or shut down; then a worker that lost its connection could not open
    another. uvloop does not use the executor either.
    """

    async def getaddrinfo(self, *args: Any, **kwargs: Any) -> Any:
        return (await in_thread(partial(socket.getaddrinfo, *args, **kwargs), "lookup")).unwrap()
