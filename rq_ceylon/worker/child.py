"""The child process that runs `cpu=True` tasks. `children` is its worker's side."""

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
from functools import cache, partial
from operator import attrgetter
from types import ModuleType
from typing import Any

from pydantic_core import from_json, to_json

from rq_ceylon import log, script
from rq_ceylon.attempt import TaskContext, said
from rq_ceylon.errors import InvalidInputError
from rq_ceylon.handlers import Handler
from rq_ceylon.models import Task
from rq_ceylon.process import end_fork
from rq_ceylon.settings import Settings
from rq_ceylon.staging import stage_child
from rq_ceylon.worker.hooks import Hooks
from rq_ceylon.worker.outcome import error_of
from rq_ceylon.worker.wear import memory_in_use

# The lines that a child writes. While a task runs: `p [fraction, message]`, and `s [tid, text, needs]` for each task
# that it spawns. At its end, with the child's memory in bytes: `v memory result`, `e memory error`, or `i memory error`
# if the function returned a value that is no result.
PROGRESS, SPAWN, VALUE, ERROR, INVALID = b"p", b"s", b"v", b"e", b"i"


def serve(descriptor: int, parent: int) -> None:
    """Run tasks until the worker closes the socket or dies."""
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
    Let the kernel kill this process when its worker dies, whatever the task is doing then. Only Linux has this call;
    elsewhere a child ends after its task.
    """
    if sys.platform == "linux":
        pr_set_pdeathsig = 1
        ctypes.CDLL(None).prctl(pr_set_pdeathsig, signal.SIGKILL)
    if os.getppid() != parent:  # the worker died before the call
        sys.exit(1)


class _Child:
    """
    Runs functions. The hooks and the lifespan of an application start before its first function, and stop when the
    child ends. They run on an event loop of the child, which stands still while a function runs.
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
        """Run one task. Returns the kind of its last line, and its result or error."""
        progress = _Progress(self._connection)
        try:
            handler, app = _found(name, module, qualname, main, path)
            context = _ChildContext(**facts, state=self._state(app))
            context.told = progress
            context.stager = partial(stage_child, app.registry if app else None, context.role)
            value = handler.function(**handler.call_arguments(raw, context))
            if inspect.isawaitable(value):  # a plain wrapper around a coroutine function
                value = self._runner.run(_awaited(value))
            end_fork(self._pid)  # a process that the function forked ends here
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
        """The value that the lifespan of an application yielded. The application starts now unless it runs already."""
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
    Writes the progress lines of one task. Any of its threads may call this, even after the task has ended. So each line
    is written whole, and none after the end, where it would break the result or count for the next task.
    """

    def __init__(self, connection: socket.socket) -> None:
        self._connection, self._guard, self._pid, self._is_open = connection, threading.Lock(), os.getpid(), True

    def tell(self, kind: bytes, content: object) -> None:
        if os.getpid() != self._pid:  # a process that the task forked: the socket belongs to its parent
            return
        with self._guard:
            if self._is_open:
                self._connection.sendall(b"%s %s\n" % (kind, to_json(content)))

    def close(self) -> None:
        with self._guard:
            self._is_open = False


class _ChildContext(TaskContext):
    """The context of an attempt whose worker is another process."""

    told: _Progress

    def progress(self, fraction: float | None = None, message: str = "") -> None:
        super().progress(fraction, message)
        self.told.tell(PROGRESS, self.reported)

    def spawn(self, task: Task) -> str:
        tid = super().spawn(task)
        child = self.children[-1]
        self.told.tell(SPAWN, [child.tid, child.text.decode(), list(child.needs)])
        return tid


def _told(error: BaseException) -> bytes:
    return to_json([said(error), error_of(error)])


@cache
def _found(name: str, module: str, qualname: str, main: str | None, path: str | None) -> tuple[Handler[..., Any], Any]:
    """The function of a task, and its application, if it has one."""
    if module != "__main__":
        found = attrgetter(qualname)(importlib.import_module(module))
    else:
        with script.loading(path or f"module {main}"):
            found = attrgetter(qualname)(_load_main(main, path))
    stores = getattr(getattr(found, "handler", None), "store_result", True)
    return Handler(name, getattr(found, "function", found), store_result=stores), getattr(found, "app", None)


@cache
def _load_main(name: str | None, path: str | None) -> ModuleType:
    """
    Load the worker's main module as ours. It gets the name that multiprocessing gives it, so that the code under
    `if __name__ == "__main__"` does not run here.
    """
    main = ModuleType("__mp_main__")
    if name is not None:
        main.__dict__.update(runpy.run_module(name, run_name=main.__name__, alter_sys=True))
    elif path is not None:
        main.__dict__.update(runpy.run_path(path, run_name=main.__name__))
    sys.modules["__main__"] = sys.modules[main.__name__] = main
    return main
