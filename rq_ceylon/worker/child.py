"""What a child process of `cpu=True` tasks does; `children` is its worker's side."""

from __future__ import annotations

import asyncio
import ctypes
import importlib
import inspect
import os
import runpy
import signal
import socket
import sys
import threading
from collections.abc import Awaitable
from contextlib import AsyncExitStack
from functools import cache
from operator import attrgetter
from types import ModuleType
from typing import Any

from pydantic_core import from_json, to_json

from rq_ceylon import log, script
from rq_ceylon.attempt import TaskContext, said
from rq_ceylon.errors import InvalidInputError
from rq_ceylon.handlers import Handler
from rq_ceylon.process import end_fork
from rq_ceylon.settings import Settings
from rq_ceylon.worker.hooks import Hooks
from rq_ceylon.worker.outcome import error_of
from rq_ceylon.worker.wear import memory_in_use

# A child's lines: `p [fraction, message]` while a task runs; then its bytes of memory and how the task ended:
# `v memory result`, `e memory error`, or `i memory error` where the function did its work, but its result is none.
PROGRESS, VALUE, ERROR, INVALID = b"p", b"v", b"e", b"i"


def serve(descriptor: int, parent: int) -> None:
    """Answer calls until the worker is gone, or hangs up."""
    _end_with(parent)
    with socket.socket(fileno=descriptor) as connection, connection.makefile("rb") as requests:
        connection.set_inheritable(False)
        connection.sendall(b"\n")
        settings, setup = from_json(requests.readline())
        if setup is not None:
            log.set_up(*setup)
        child = _Child(connection, Settings(**settings) if settings else None)
        try:
            for request in requests:
                kind, content = child.run(*from_json(request))
                connection.sendall(b"%s %d %s\n" % (kind, memory_in_use(), content))
        finally:
            child.close()


def _end_with(parent: int) -> None:
    """
    Let the kernel kill this process when its worker dies, whatever the task is doing then. Other systems have no such
    call: there a child ends after its task.
    """
    if sys.platform == "linux":
        pr_set_pdeathsig = 1
        ctypes.CDLL(None).prctl(pr_set_pdeathsig, signal.SIGKILL)
    if os.getppid() != parent:  # it died before
        sys.exit(1)


class _Child:
    """
    Runs functions. The application of a function is started before the first of them, and stopped in the end: its hooks
    are async, and the loop that runs them stands still while a function runs.
    """

    def __init__(self, connection: socket.socket, settings: Settings | None) -> None:
        self._connection, self._settings = connection, settings
        self._pid = os.getpid()
        self._runner = asyncio.Runner()
        self._running = AsyncExitStack()
        self._states: dict[int, Any] = {}

    def run(
        self,
        name: str,
        module: str,
        qualname: str,
        main: str | None,
        path: str | None,
        raw: dict[str, Any],
        facts: dict[str, Any],
    ) -> tuple[bytes, bytes]:
        """How a task ended, and its result or its error."""
        progress = _Progress(self._connection)
        try:
            handler, app = _found(name, module, qualname, main, path)
            context = _ChildContext(**facts, state=self._state(app))
            context.told = progress
            value = handler.function(**handler.call_arguments(raw, context))
            if inspect.isawaitable(value):  # a wrapper that is no coroutine function around one that is
                value = self._runner.run(_awaited(value))
            end_fork(self._pid)
            try:
                return VALUE, handler.dump_result(value)
            except InvalidInputError as error:
                return INVALID, _told(error)
        except BaseException as error:
            end_fork(self._pid, error)
            return ERROR, _told(error)
        finally:
            progress.close()

    def _state(self, app: Any) -> Any:
        """What the lifespan of an application gave, which is started now unless it runs already."""
        if app is None:  # a function of no application
            return None
        if id(app) not in self._states:
            if self._settings is not None:
                app.use(self._settings)
            hooks = self._runner.run(self._running.enter_async_context(Hooks(app.registry)))
            self._states[id(app)] = hooks.state
        return self._states[id(app)]

    def close(self) -> None:
        self._runner.run(self._running.aclose())
        self._runner.close()


async def _awaited(value: Awaitable[Any]) -> Any:
    return await value


class _Progress:
    """
    The lines about the progress of one task. Any thread of it may write them, and may outlive it: so each is written
    whole, and none after the task has ended, where it would cut its result or speak for the next task.
    """

    def __init__(self, connection: socket.socket) -> None:
        self._connection, self._guard, self._pid, self._is_open = connection, threading.Lock(), os.getpid(), True

    def tell(self, reported: object) -> None:
        if os.getpid() != self._pid:  # a process that the task has forked: the socket is its parent's
            return
        with self._guard:
            if self._is_open:
                self._connection.sendall(b"%s %s\n" % (PROGRESS, to_json(reported)))

    def close(self) -> None:
        with self._guard:
            self._is_open = False


class _ChildContext(TaskContext):
    """The context of an attempt whose worker is another process."""

    told: _Progress

    def progress(self, fraction: float | None = None, message: str = "") -> None:
        super().progress(fraction, message)
        self.told.tell(self.reported)


def _told(error: BaseException) -> bytes:
    return to_json([said(error), error_of(error)])


@cache
def _found(name: str, module: str, qualname: str, main: str | None, path: str | None) -> tuple[Handler[..., Any], Any]:
    """The function, and the application that it belongs to, if any."""
    if module != "__main__":
        found = attrgetter(qualname)(importlib.import_module(module))
    else:
        with script.loading(path or f"module {main}"):
            found = attrgetter(qualname)(_load_main(main, path))
    return Handler(name, getattr(found, "function", found)), getattr(found, "app", None)


@cache
def _load_main(name: str | None, path: str | None) -> ModuleType:
    """
    Make the worker's main module ours, under the name that multiprocessing gives it: what stands under
    `if __name__ == "__main__"` does not run here.
    """
    main = ModuleType("__mp_main__")
    if name is not None:
        main.__dict__.update(runpy.run_module(name, run_name=main.__name__, alter_sys=True))
    elif path is not None:
        main.__dict__.update(runpy.run_path(path, run_name=main.__name__))
    sys.modules["__main__"] = sys.modules[main.__name__] = main
    return main
