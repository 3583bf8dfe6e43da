"""
Runs several workers as child processes: starts, watches, restarts and stops them, as many as the load needs, and gives
back at once what a dead one held.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import socket
import subprocess
import time
from asyncio.subprocess import Process
from collections.abc import Sequence

from loguru import logger

from rq_ceylon.errors import CeylonError
from rq_ceylon.models import counted
from rq_ceylon.process import CHILD_END_S, SUPERVISED
from rq_ceylon.store import queries
from rq_ceylon.store.connection import Connection
from rq_ceylon.store.keys import Keys
from rq_ceylon.views import WorkerView
from rq_ceylon.worker.neighbours import Neighbours
from rq_ceylon.worker.scale import Scale

PAUSE_S, PAUSE_MAX_S, STEADY_S = 0.5, 30.0, 60.0
"""The first and the longest pause before a restart. It doubles, unless the child lived for longer than `STEADY_S`."""

BURY_S = 2.0
"""How long giving back what a dead child held may delay its replacement, or the end of the supervisor."""

REPLACED = (0, 7)
"""Exit codes of a child that drained and must be replaced at once: it has run its number of tasks or takes too much
memory (0), or too many of its attempts hang (7)."""

LOOK_S, QUIET_S = 2.0, 60.0
"""The pause between two looks at the load, and how long one child less must have been enough before one is stopped."""


class Supervisor:
    """
    Keeps child processes of one worker command running until it is told to stop: as many as the load needs, between
    two bounds.

    Args:
        command: the worker command for one process.
        processes: the fewest and the most children.
        url, namespace: those of the children, to read the load and to give back what a dead child held.
        burst: do not restart a child that ended with exit code 0.
        grace_s: how long running tasks of a child may go on; a child that lives `CHILD_END_S` longer is killed.
    """

    def __init__(
        self,
        command: Sequence[str],
        *,
        processes: tuple[int, int],
        url: str,
        namespace: str,
        burst: bool = False,
        grace_s: float = 25.0,
    ) -> None:
        self.command, self.burst, self._scale = list(command), burst, Scale(*processes, QUIET_S)
        self._grace_s = grace_s
        self.url, self.keys = url, Keys(namespace)
        self.exit_code = 0
        self._kept = 0  # how many children are kept, also one that is being started or waits for its restart
        self._began = 0.0
        self._children: dict[int, Process] = {}  # those that run, by pid
        self._retired: set[int] = set()  # pids of children that were told to stop since fewer are needed
        self._stop = asyncio.Event()

    def signal(self, number: int) -> None:
        """Forward a signal to all children, and start no more."""
        self._stop.set()
        for child in self._children.values():
            self._tell(child, number)

    async def run(self) -> int:
        """Run until all children have ended. Returns the exit code."""
        fewest, most = self._scale.least, self._scale.most
        self._began = time.monotonic()
        bounds = f"{fewest}" if fewest == most else f"{fewest} to {most}"
        logger.info("Supervisor {} runs {} worker processes", os.getpid(), bounds)
        try:
            async with asyncio.TaskGroup() as keepers:
                self._grow(keepers, fewest)
                if fewest < most:
                    await self._follow_load(keepers)
        finally:
            for child in self._children.values():
                _kill(child)
        return self.exit_code

    # ---- how many ----------------------------------------------------------------------------------------------------
    async def _follow_load(self, keepers: asyncio.TaskGroup) -> None:
        async with Connection(self.url) as connection:
            while not await self._stops_within(LOOK_S):
                try:
                    mine, queued = await self._load(connection)
                except CeylonError as error:
                    logger.debug("The load is not known now: {}", error)
                    continue
                if not mine:
                    continue
                busy, slots = sum(len(view.tasks) for view in mine), sum(view.slots for view in mine)
                running = self._kept - len(self._retired)
                wanted = self._scale.look(running, slots // len(mine), busy, queued, time.monotonic())
                if wanted == running:
                    continue
                how = "Growing" if wanted > running else "Shrinking"
                stand = f"{counted(queued, 'task')} queued, {busy} of {slots} slots busy"
                logger.info("{} from {} to {} worker processes: {}", how, running, wanted, stand)
                self._grow(keepers, wanted - running)
                if wanted < running:
                    self._retire(min(mine, key=lambda view: len(view.tasks)).pid)

    async def _load(self, connection: Connection) -> tuple[list[WorkerView], int]:
        """The heartbeats of the children, and how many tasks wait in the streams of their roles."""
        workers = await queries.workers(connection, self.keys)
        here = self._children.keys() - self._retired
        mine = [view for view in workers if view.pid in here and view.host == socket.gethostname()]
        served = {role for view in mine for role in view.roles}
        return mine, sum(role.queued for role in await queries.roles(connection, self.keys) if role.name in served)

    def _grow(self, keepers: asyncio.TaskGroup, number: int) -> None:
        for _ in range(number):
            self._kept += 1
            keepers.create_task(self._keep())

    def _retire(self, pid: int) -> None:
        if child := self._children.get(pid):  # it may just have ended by itself
            self._retired.add(pid)
            self._tell(child, signal.SIGTERM)

    async def _stops_within(self, seconds: float) -> bool:
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(self._stop.wait(), seconds)
        return self._stop.is_set()

    # ---- one child ---------------------------------------------------------------------------------------------------
    async def _keep(self) -> None:
        """Run a child, and another each time one ends, until none must follow."""
        pause, code = PAUSE_S, 0
        while not self._stop.is_set():
            began = time.monotonic()
            try:
                child = await self._start()
            except OSError as error:  # out of processes, memory or descriptors, which may pass
                logger.error("A worker process cannot be started, next attempt in {:.1f} s: {}", pause, error)
                await self._stops_within(pause)
                pause = min(pause * 2, PAUSE_MAX_S)
                continue
            code = await child.wait()
            assert child.stdin is not None
            child.stdin.close()
            del self._children[child.pid]
            if code != 0:  # also after a signal: its watch may have ended it before it could give back
                await self._bury()
            if child.pid in self._retired:
                self._retired.discard(child.pid)
                code = 0
                break
            if self._stop.is_set() or (self.burst and code == 0):
                break
            # Wrong options (2), an application that cannot be imported (4), or a Redis that refuses (3): a restart
            # would end the same way. But a Redis that served the children before may refuse only for a while, as during
            # a failover, and other children still run.
            if code in (2, 4) or (code == 3 and time.monotonic() - self._began < STEADY_S):
                self.signal(signal.SIGTERM)
                break
            if code in REPLACED and not self.burst:
                logger.info("Worker process {} ended with {}; another takes its place", child.pid, code)
                continue
            pause = PAUSE_S if time.monotonic() - began > STEADY_S else min(pause * 2, PAUSE_MAX_S)
            logger.warning("Worker process {} ended with {}; restarting in {:.1f} s", child.pid, code, pause)
            await self._stops_within(pause)
        self.exit_code = self.exit_code or max(code, 0)
        self._kept -= 1
        if self._kept == 0:
            self._stop.set()

    async def _start(self) -> Process:
        # The event loop waits for each child by a thread or descriptor of its own, so their number has no limit here.
        child = await asyncio.create_subprocess_exec(
            *self.command,
            stdin=subprocess.PIPE,
            start_new_session=True,
            env={**os.environ, SUPERVISED: "1"},
        )
        self._children[child.pid] = child
        if self._stop.is_set():  # the stop came while it was being started
            self._tell(child, signal.SIGTERM)
        return child

    def _tell(self, child: Process, number: int) -> None:
        """Send a signal to a child, and kill it if it still runs when its own watch should have ended it."""
        with contextlib.suppress(ProcessLookupError):
            child.send_signal(number)
        asyncio.get_running_loop().call_later(self._grace_s + CHILD_END_S, self._kill_hung, child)

    def _kill_hung(self, child: Process) -> None:
        if child.returncode is None and self._children.get(child.pid) is child:
            logger.error("Worker process {} did not end {:g} s after its grace; killing it", child.pid, CHILD_END_S)
            _kill(child)

    async def _bury(self) -> None:
        """Give back at once what a dead child held."""
        try:
            async with asyncio.timeout(BURY_S), Connection(self.url) as connection:
                await Neighbours(self.url, self.keys).bury_dead(connection)
        except (CeylonError, TimeoutError) as error:
            words = "What the dead process held comes back when its lease ends: {}"
            logger.warning(words, str(error) or "Redis did not answer in time")


def _kill(child: Process) -> None:
    with contextlib.suppress(ProcessLookupError):
        child.kill()
