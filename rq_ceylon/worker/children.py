"""
The child processes of a worker, which run its `cpu=True` tasks. A worker starts them when needed, keeps them for the
next task, and kills one whose task is stopped. Only lines of JSON travel, with the name of the function, and no
object of a user. They go over a socket, since the child's stdout and stderr are those of its worker.
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
from rq_ceylon.store.transitions import StagedTask
from rq_ceylon.worker.child import INVALID, PROGRESS, SPAWN, VALUE
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
    The child processes: at most `count` at once, by default as many as there are processors to use.

    Args:
        max_tasks, max_memory: a child that has run about this many tasks, or takes this many bytes, ends after its
            task, and the next task gets a new child.
        settings: the worker's; an application uses them in the children too. None: it uses its own.

    Attributes:
        places: the caller of `take` must hold one of these. That bounds the number of children.
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
        A child that is ready. The caller enters it (`async with`), and leaving gives it back. Leaving with an exception
        other than RemoteError kills it, and no other child.

        Raises:
            ChildProcessError: a child was started and died.
            OSError: no child can be started.
        """
        self._idle = [one for one in self._idle if one.is_alive]
        return self._idle.pop() if self._idle else await self._start()

    def give_back(self, child: Child) -> None:
        if child.is_worn_out:
            child.dismiss()
        else:
            self._idle.append(child)

    async def close(self) -> None:
        """Kill all children."""
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
                    "-P",  # import nothing from the working directory before the path is the worker's
                    "-u",  # so that what a task printed before it was killed is seen
                    "-c",
                    _BOOT,
                    json.dumps([paths, sys.argv, theirs.fileno(), os.getpid()]),
                    stdin=subprocess.DEVNULL,
                    pass_fds=[theirs.fileno()],
                    # A process group of its own. So Ctrl-C in the terminal reaches the worker alone, which decides what
                    # to do with the task, and the programs that a task starts are killed together with the child.
                    start_new_session=True,
                )
            except BaseException:
                writer.close()  # if the process was started all the same, this ends it
                raise
        # Not as arguments of the process, which every user of the machine can see.
        writer.write(to_json([self._settings, log.in_force]) + b"\n")
        limit = None if self._max_tasks is None else jittered(self._max_tasks)
        child = Child(self, process, reader, writer, max_tasks=limit, max_memory=self._max_memory)
        self._living.add(child)
        child.exit.add_done_callback(lambda _: self._living.discard(child))
        try:
            await child.read()  # the line that says it is ready
        except BaseException:
            child.kill()
            raise
        return child


class Child:
    """
    One child process and the socket to it.

    Attributes:
        is_worn_out: the child has run as many tasks, or takes as much memory, as is allowed.
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
            self.kill()  # it may still be running the task

    async def call(self, handler: Handler[..., Any], raw: Mapping[str, Any], context: TaskContext) -> bytes:
        """
        Run a handler in this child. The progress that it reports is written to `context`.

        Returns:
            The result as JSON.

        Raises:
            RemoteError: the handler raised, or returned a value that cannot be a result.
            ChildProcessError: the child died.
        """
        function = handler.function
        named = handler.name, function.__module__, function.__qualname__
        self._writer.write(to_json([*named, *_main(), raw, facts_of(context)]) + b"\n")
        kind, _, content = (await self.read()).partition(b" ")
        while kind in (PROGRESS, SPAWN):
            if kind == SPAWN:
                tid, text, needs = from_json(content)
                context.children.append(StagedTask(tid, text.encode(), needs))
            else:
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
        """Close the socket, so that the idle child ends by itself."""
        self._writer.close()

    def kill(self) -> None:
        """End the child and the programs that it started. Does nothing if it has ended."""
        if not self.exit.done():
            self._kill_group()

    def _kill_group(self) -> None:
        with suppress(ProcessLookupError, PermissionError):
            os.killpg(self._process.pid, signal.SIGKILL)

    def _clear(self, _: object) -> None:
        # However the child ended, a program that it started may go on and hold the other end of the socket.
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
    hint = ": killed from outside, or because memory ran out" if -code == signal.SIGKILL else ""
    return f"signal {-code}, {name}{hint}"


def _main() -> tuple[str | None, str | None]:
    """The name of the main module if it was started by name (`python -m`), else its path."""
    main = sys.modules["__main__"]
    spec = getattr(main, "__spec__", None)
    return (spec.name, None) if spec is not None else (None, getattr(main, "__file__", None))
