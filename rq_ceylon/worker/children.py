"""
The processes of `cpu=True` tasks: a worker starts them when needed, keeps them for the next task, and kills one whose
task is stopped. No object of a user travels, only lines of JSON and the name of the function, over a socket of its own:
the child's stdout and stderr are those of its worker.
"""

from __future__ import annotations

import asyncio
import ctypes
import importlib
import json
import os
import runpy
import signal
import socket
import subprocess
import sys
from collections.abc import Mapping
from contextlib import AsyncExitStack, suppress
from functools import cache
from types import ModuleType
from typing import Any, Self

from pydantic_core import from_json, to_json

from rq_ceylon.attempt import RetryTask, TaskContext, facts_of, type_names
from rq_ceylon.errors import InvalidInputError
from rq_ceylon.handlers import Handler, Registry
from rq_ceylon.worker.hooks import Hooks
from rq_ceylon.worker.outcome import RemoteError, error_of
from rq_ceylon.worker.wear import jittered, memory_in_use

_BOOT = (
    "import json, sys; path, argv, *rest = json.loads(sys.argv[1]); sys.path[:] = path; sys.argv[:] = argv; "
    "from rq_ceylon.worker.children import serve; serve(*rest)"
)
_LINE_BYTES_MAX = 2**31
# A child's lines: `p [fraction, message]` while a task runs; then its bytes of memory and how the task ended:
# `v memory result`, `e memory error`, or `i memory error` where the function did its work, but its result is none.
_PROGRESS, _VALUE, _ERROR, _INVALID = b"p", b"v", b"e", b"i"


# ---- in the worker ---------------------------------------------------------------------------------------------------
class Children:
    """
    At most `count` processes at once: as many as there are processors to use, unless told otherwise.

    Args:
        max_tasks, max_memory: a process that has run about so many tasks, or takes so many bytes, ends after its task,
            and the next one gets a new process.

    Attributes:
        places: who calls `take` holds one.
    """

    def __init__(
        self, count: int | None = None, *, max_tasks: int | None = None, max_memory: int | None = None
    ) -> None:
        self.places = asyncio.Semaphore(count or _processors())
        self._max_tasks, self._max_memory = max_tasks, max_memory
        self._idle: list[Child] = []
        self._living: set[Child] = set()

    async def take(self) -> Child:
        """
        A process that is ready; who enters it (`async with`) gives it back. A caller that leaves with any exception but
        RemoteError kills that process alone.

        Raises:
            OSError: none can be started.
        """
        self._idle = [one for one in self._idle if one.is_alive]
        return self._idle.pop() if self._idle else await self._start()

    def give_back(self, child: Child) -> None:
        if child.is_worn_out:
            child.dismiss()
        else:
            self._idle.append(child)

    async def close(self) -> None:
        """
        Kill them all.
        """
        self._idle.clear()
        for child in list(self._living):
            child.kill()
            await child.gone()

    async def _start(self) -> Child:
        ours, theirs = socket.socketpair()
        with theirs:
            reader, writer = await asyncio.open_unix_connection(sock=ours, limit=_LINE_BYTES_MAX)
            paths = [one for one in sys.path if isinstance(one, str)]
            try:
                process = await asyncio.create_subprocess_exec(
                    sys.executable,
                    "-P",  # nothing of the working directory is imported before the path is the worker's
                    "-u",  # what a task printed before it was killed is seen
                    "-c",
                    _BOOT,
                    json.dumps([paths, sys.argv, theirs.fileno(), os.getpid()]),
                    stdin=subprocess.DEVNULL,
                    pass_fds=[theirs.fileno()],
                    # Not of the terminal's group: Ctrl-C asks the worker, which decides what becomes of the task. And
                    # a group of its own: the programs that a task starts are killed with it.
                    start_new_session=True,
                )
            except BaseException:
                writer.close()  # should the process exist all the same, this ends it
                raise
        limit = None if self._max_tasks is None else jittered(self._max_tasks)
        child = Child(self, process, reader, writer, max_tasks=limit, max_memory=self._max_memory)
        self._living.add(child)
        child.exit.add_done_callback(lambda _: self._living.discard(child))
        try:
            await child.read()  # it is ready
        except BaseException:
            child.kill()
            raise
        return child


class Child:
    """
    One process and the socket to it.

    Attributes:
        is_worn_out: it has run as many tasks, or takes as much memory, as one may.
    """

    def __init__(
        self,
        home: Children,
        process: asyncio.subprocess.Process,
        reader: asyncio.StreamReader,
        writer: asyncio.StreamWriter,
        *,
        max_tasks: int | None,
        max_memory: int | None,
    ) -> None:
        self._home, self._process, self._reader, self._writer = home, process, reader, writer
        self._tasks_left, self._max_memory = max_tasks, max_memory
        self.is_worn_out = False
        self.exit = asyncio.ensure_future(process.wait())
        self.exit.add_done_callback(self._clear)

    @property
    def is_alive(self) -> bool:
        return not self.exit.done() and not self._reader.at_eof()

    async def __aenter__(self) -> Child:
        return self

    async def __aexit__(self, kind: type[BaseException] | None, error: BaseException | None, _: object) -> None:
        if error is None or isinstance(error, RemoteError):
            self._home.give_back(self)
        else:
            self.kill()  # it may be in the middle of the task

    async def call(self, handler: Handler[..., Any], raw: Mapping[str, Any], context: TaskContext) -> bytes:
        """
        Run a handler in this process. What it says of its progress is put into `context`.

        Returns:
            The result as JSON.

        Raises:
            RemoteError: what the handler raised.
            ChildProcessError: the process died.
        """
        function = handler.function
        named = handler.name, function.__module__, function.__qualname__
        self._writer.write(to_json([*named, *_main(), raw, facts_of(context)]) + b"\n")
        kind, _, content = (await self.read()).partition(b" ")
        while kind == _PROGRESS:
            context.progress(*from_json(content))
            kind, _, content = (await self.read()).partition(b" ")
        memory, _, content = content.partition(b" ")
        self._count(int(memory))
        if kind == _VALUE:
            return content
        names, error, delay_s = from_json(content)
        raise RemoteError(tuple(names), error, delay_s, is_invalid=kind == _INVALID)

    def _count(self, memory: int) -> None:
        if self._tasks_left is not None:
            self._tasks_left -= 1
        self.is_worn_out = self._tasks_left == 0 or (self._max_memory is not None and memory >= self._max_memory)

    async def read(self) -> bytes:
        try:
            return (await self._reader.readuntil())[:-1]
        except (asyncio.IncompleteReadError, OSError):
            pass
        await asyncio.wait([self.exit], timeout=1.0)
        if not self.exit.done():
            raise ChildProcessError("the process of this task closed its connection to the worker")
        raise ChildProcessError(f"the process of this task died ({_cause(self.exit.result())})")

    def dismiss(self) -> None:
        """Let it end by itself: it sees that its worker has hung up."""
        self._writer.close()

    def kill(self) -> None:
        """
        End it and the programs that it started; not an error if it has ended.
        """
        if not self.exit.done():
            self._kill_group()

    def _kill_group(self) -> None:
        with suppress(ProcessLookupError, PermissionError):
            os.killpg(self._process.pid, signal.SIGKILL)

    def _clear(self, _: object) -> None:
        # However it ended: a program that it started may go on, and hold the other end of the socket.
        self._kill_group()
        self._writer.close()

    async def gone(self) -> None:
        await self.exit
        with suppress(OSError):
            await self._writer.wait_closed()


def _processors() -> int:
    if sys.platform == "linux":
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def _cause(code: int) -> str:
    if code >= 0:
        return f"exit code {code}"
    name = signal.Signals(-code).name if -code in set(signal.Signals) else "unknown"
    hint = ": killed from outside, or for want of memory" if -code == signal.SIGKILL else ""
    return f"signal {-code}, {name}{hint}"


def _main() -> tuple[str | None, str | None]:
    """
    Where the child finds the main module: by its name if it was started so (`python -m`), else by its path.
    """
    main = sys.modules["__main__"]
    spec = getattr(main, "__spec__", None)
    return (spec.name, None) if spec is not None else (None, getattr(main, "__file__", None))


# ---- in the child ----------------------------------------------------------------------------------------------------
def serve(descriptor: int, parent: int) -> None:
    """
    Answer calls until the worker is gone, or hangs up.
    """
    _end_with(parent)
    with socket.socket(fileno=descriptor) as connection, connection.makefile("rb") as requests:
        connection.set_inheritable(False)
        connection.sendall(b"\n")
        with _Applications() as applications:
            for request in requests:
                kind, content = _run(applications, connection, *from_json(request))
                connection.sendall(b"%s %d %s\n" % (kind, memory_in_use(), content))


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


class _ChildContext(TaskContext):
    """
    The context of an attempt, in a child process.
    """

    connection: socket.socket

    def progress(self, fraction: float | None = None, message: str = "") -> None:
        super().progress(fraction, message)
        self.connection.sendall(b"%s %s\n" % (_PROGRESS, to_json(self.reported)))


class _Applications:
    """
    The applications whose functions ran here: each is started once, and stopped in the end. Their hooks are async: a
    loop runs them, and stands still while a function runs.
    """

    def __init__(self) -> None:
        self._runner = asyncio.Runner()
        self._running = AsyncExitStack()
        self._states: dict[int, Any] = {}

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._runner.run(self._running.aclose())
        self._runner.close()

    def state(self, registry: Registry | None) -> Any:
        """
        What the lifespan of an application gave; started now, unless it runs already.
        """
        if registry is None:
            return None
        if id(registry) not in self._states:
            self._states[id(registry)] = self._runner.run(self._running.enter_async_context(Hooks(registry))).state
        return self._states[id(registry)]


def _run(
    applications: _Applications,
    connection: socket.socket,
    name: str,
    module: str,
    qualname: str,
    main: str | None,
    path: str | None,
    raw: dict[str, Any],
    facts: dict[str, Any],
) -> tuple[bytes, bytes]:
    try:
        handler, registry = _handler(name, module, qualname, main, path)
        context = _ChildContext(**facts, state=applications.state(registry))
        context.connection = connection
        value = handler.function(**handler.call_arguments(raw, context))
        try:
            return _VALUE, handler.dump_result(value)
        except InvalidInputError as error:
            return _INVALID, _told(error)
    except BaseException as error:
        return _ERROR, _told(error)


def _told(error: BaseException) -> bytes:
    delay_s = error.delay_s if isinstance(error, RetryTask) else None
    return to_json([type_names(type(error)), error_of(error), delay_s])


@cache
def _handler(
    name: str, module: str, qualname: str, main: str | None, path: str | None
) -> tuple[Handler[..., Any], Registry | None]:
    """
    The function of this name, and what its application registers besides.
    """
    if module == "__main__":
        _load_main(main, path)
    found: Any = importlib.import_module(module)
    for part in qualname.split("."):
        found = getattr(found, part)
    app = getattr(found, "app", None)  # of a function that `@app.task` has wrapped
    return Handler(name, getattr(found, "function", found)), getattr(app, "registry", None)


@cache
def _load_main(name: str | None, path: str | None) -> None:
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
