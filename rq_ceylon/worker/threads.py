"""Users' plain functions, each in its own daemon thread: a thread cannot be ended, so nothing waits for it."""

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
    How a function ended: what it returned, or what it raised. An exception travels as a value, since asyncio treats
    some of them (StopIteration, SystemExit) as its own business.
    """

    value: Any = None
    error: BaseException | None = None

    def unwrap(self) -> Any:
        """
        Raises:
            BaseException: what the function raised.
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
        end_fork(here, end.error)
        with suppress(RuntimeError):  # the loop is closed: the worker has gone
            loop.call_soon_threadsafe(tell, end)

    threading.Thread(target=body, name=name, daemon=True).start()
    return ended


class Loop(asyncio.SelectorEventLoop):
    """
    An event loop that looks up each name in a thread of its own. Asyncio's own asks the loop's executor, which users'
    code may fill (`asyncio.to_thread`) or shut down; a worker that has lost its connection could then make no other.
    uvloop does not ask it either.
    """

    async def getaddrinfo(self, *args: Any, **kwargs: Any) -> Any:
        return (await in_thread(partial(socket.getaddrinfo, *args, **kwargs), "lookup")).unwrap()
