"""
The processes of `cpu=True` tasks: a worker starts them when needed, keeps them for the next task, and kills one whose
task is stopped. No object of a user travels, only lines of JSON and the name of the function, over a socket of its own:
the child's stdout and stderr are those of its worker.
"""

from __future__ import annotations

import asyncio
import json
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Mapping
from contextlib import suppress
from typing import Any

from pydantic_core import from_json, to_json

from rq_ceylon import log
from rq_ceylon.attempt import Said, TaskContext, facts_of
from rq_ceylon.handlers import Handler
from rq_ceylon.process import own_task
from rq_ceylon.settings import Settings
from rq_ceylon.worker.child import INVALID, PROGRESS, VALUE
from rq_ceylon.worker.outcome import RemoteError
from rq_ceylon.worker.places import Places
from rq_ceylon.worker.wear import jittered

_BOOT = (
    "import json, sys; path, argv, *rest = json.loads(sys.argv[1]); sys.path[:] = path; sys.argv[:] = argv; "
    "from rq_ceylon.worker.child import serve; serve(*rest)"
)
_LINE_BYTES_MAX = 2**31


class Children:
    """
    At most `count` processes at once: as many as there are processors to use, unless told otherwise.

    Args:
        max_tasks, max_memory: a process that has run about so many tasks, or takes so many bytes, ends after its task,
            and the next one gets a new process.
        settings: of the worker; an application uses them in these processes too. None: it goes by its own.

    Attributes:
        places: who calls `take` holds one.
    """

    def __init__(
        self,
        count: int | None = None,
        *,
        max_tasks: int | None = None,
        max_memory: int | None = None,
        settings: Settings | None = None,
    ) -> None:
        self.places = Places(count or _processors())
        self._max_tasks, self._max_memory, self._settings = max_tasks, max_memory, settings
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
        """Kill them all."""
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
        # Not among its arguments, which every user of the machine may see.
        writer.write(to_json([self._settings, log.in_force]) + b"\n")
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
        self.exit = own_task(process.wait())
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
        while kind == PROGRESS:
            context.progress(*from_json(content))
            kind, _, content = (await self.read()).partition(b" ")
        memory, _, content = content.partition(b" ")
        self._count(int(memory))
        if kind == VALUE:
            return content
        says, error = from_json(content)
        raise RemoteError(
            tuple(Said(tuple(names), delay_s) for names, delay_s in says), error, is_invalid=kind == INVALID
        )

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
        """End it and the programs that it started; not an error if it has ended."""
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
    """Where the child finds the main module: by its name if it was started so (`python -m`), else by its path."""
    main = sys.modules["__main__"]
    spec = getattr(main, "__spec__", None)
    return (spec.name, None) if spec is not None else (None, getattr(main, "__file__", None))
