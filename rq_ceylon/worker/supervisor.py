"""
Several workers as processes: starts, watches, restarts, stops them, and gives back at once what a dead one held.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import subprocess
import threading
import time
from collections.abc import Sequence

from loguru import logger

from rq_ceylon.errors import CeylonError
from rq_ceylon.store.connection import Connection
from rq_ceylon.store.keys import Keys
from rq_ceylon.worker.neighbours import Neighbours

SUPERVISED = "CEYLON_SUPERVISED"
"""Set for a child: its standard input is a pipe that closes when its supervisor is gone."""

PAUSE_S, PAUSE_MAX_S, STEADY_S = 0.5, 30.0, 60.0
"""A child that ends at once is restarted after a growing pause; one that lived this long begins anew."""


class Supervisor:
    """
    Keeps `processes` children of one worker command alive until told to stop.

    Args:
        command: the worker command for one process.
        url, namespace: where to give back what a dead child held.
        burst: children that end by themselves with 0 are not restarted.
    """

    def __init__(self, command: Sequence[str], *, processes: int, url: str, namespace: str, burst: bool) -> None:
        self.command, self.processes, self.burst = list(command), processes, burst
        self.url, self.keys = url, Keys(namespace)
        self.exit_code = 0
        self._children: dict[int, subprocess.Popen[bytes]] = {}
        self._stop = asyncio.Event()

    def signal(self, number: int) -> None:
        """
        Forward a signal to all children, and start no more.
        """
        self._stop.set()
        for child in self._children.values():
            with contextlib.suppress(ProcessLookupError):
                child.send_signal(number)

    async def run(self) -> int:
        """
        Until all children have ended; returns the exit code.
        """
        logger.info("Supervisor {} runs {} worker processes", os.getpid(), self.processes)
        try:
            await asyncio.gather(*(self._keep() for _ in range(self.processes)))
        finally:
            for child in self._children.values():
                child.kill()
        return self.exit_code

    async def _keep(self) -> None:
        pause = PAUSE_S
        while not self._stop.is_set():
            began = time.monotonic()
            child = self._start()
            code = await asyncio.to_thread(child.wait)
            del self._children[child.pid]
            if code < 0 or code not in (0, 130, 143):
                await self._bury()
            if self._stop.is_set() or (self.burst and code == 0):
                self.exit_code = self.exit_code or max(code, 0)
                return
            if code in (2, 3, 4):
                # Wrong options, no Redis, an application that cannot be imported: the same would happen again.
                self.exit_code = code
                self.signal(signal.SIGTERM)
                return
            pause = PAUSE_S if time.monotonic() - began > STEADY_S else min(pause * 2, PAUSE_MAX_S)
            logger.warning("Worker process {} ended with {}; restarting in {:.1f} s", child.pid, code, pause)
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self._stop.wait(), pause)

    def _start(self) -> subprocess.Popen[bytes]:
        child = subprocess.Popen(
            self.command,
            stdin=subprocess.PIPE,
            start_new_session=True,
            env={**os.environ, SUPERVISED: "1"},
        )
        self._children[child.pid] = child
        return child

    async def _bury(self) -> None:
        """
        Give back at once what a dead child held.
        """
        connection = Connection(self.url)
        try:
            await Neighbours(self.url, self.keys).bury_dead(connection)
        except CeylonError as error:
            logger.warning("What the dead process held comes back when its lease ends: {}", error)
        finally:
            await connection.close()


def stop_with_supervisor() -> None:
    """
    In a child: end when the supervisor is gone, however it went.
    """
    if SUPERVISED not in os.environ:
        return

    def watch() -> None:
        while os.read(0, 1024):
            pass
        os.kill(os.getpid(), signal.SIGTERM)

    threading.Thread(target=watch, name="ceylon-supervised", daemon=True).start()
