"""
Gives back what a dead worker of this host held, in two seconds rather than after its lease.

Each worker holds a kernel lock on a file of its own, in a folder that the workers of this user on this host share. The
kernel frees the lock when the process ends, however it ends. So a file whose lock is free belongs to a worker that is
certainly dead.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import tempfile
from collections.abc import Sequence
from pathlib import Path

from loguru import logger

from rq_ceylon.maintenance.relay import relay
from rq_ceylon.models import counted
from rq_ceylon.settings import is_private
from rq_ceylon.store import transitions
from rq_ceylon.store.connection import Connection
from rq_ceylon.store.keys import Keys

LOOK_S = 1.0
LOOKED_AT = 8
"""How many neighbours a worker looks at: the next ones by name, so that many workers on one host cost little."""


class Neighbours:
    """
    The folder that the workers of one server and namespace share.

    If the folder cannot be made, or is not this user's alone, the worker has no neighbours. Then what a dead worker
    held is reclaimed when its lease ends.
    """

    def __init__(self, url: str, keys: Keys) -> None:
        self._keys = keys
        name = hashlib.sha256(f"{url}\0{keys.namespace}".encode()).hexdigest()[:16]
        try:
            temporary = tempfile.gettempdir()
        except FileNotFoundError:  # no folder is writable, as in a container with a read-only file system
            temporary = os.devnull  # no folder can be made below it, so `enter` finds that there are no neighbours
        self._folder = Path(temporary, f"ceylon-{os.getuid()}", name)
        self._mine: tuple[Path, int] | None = None

    def enter(self, worker: str, roles: Sequence[str]) -> None:
        """Take this worker's lock, and keep it until `leave` or the end of the process."""
        import fcntl  # not on Windows, where applications import this module too

        try:
            self._folder.parent.mkdir(mode=0o700, exist_ok=True)
            if not is_private(self._folder.parent):
                raise PermissionError(f"{self._folder.parent} is not yours alone")
            # Lock the file before it gets its name: a neighbour that found it free would take this worker for dead.
            low, hidden = self._hidden_file()
            fcntl.flock(low, fcntl.LOCK_EX)
            os.write(low, json.dumps({"worker": worker, "roles": list(roles)}).encode())
            os.rename(hidden, self._folder / worker)
        except OSError as error:
            logger.debug("No neighbours: {}", error)
            return
        self._mine = self._folder / worker, low

    def _hidden_file(self) -> tuple[int, str]:
        """Make a new file in the folder, again if a neighbour that left has just removed the empty folder."""
        for _ in range(10):
            with contextlib.suppress(FileNotFoundError):
                self._folder.mkdir(mode=0o700, exist_ok=True)
                return tempfile.mkstemp(dir=self._folder, prefix=".")
        raise FileNotFoundError(f"{self._folder} is removed again and again")

    def _remove_if_empty(self) -> None:
        with contextlib.suppress(OSError):  # not empty, or gone
            self._folder.rmdir()

    def leave(self, *, with_farewell: bool = True) -> None:
        """Free this worker's lock. Without a farewell its file stays, so that a neighbour gives back what it held."""
        if self._mine is not None:
            path, low = self._mine
            self._mine = None
            if with_farewell:
                path.unlink(missing_ok=True)
                self._remove_if_empty()
            os.close(low)

    async def bury_dead(self, connection: Connection) -> None:
        """
        Give back what dead workers of this host held. A task that one of them ran counts a crash at its next claim.

        Raises:
            CeylonError: Redis does not answer, or refuses; the next look tries again.
        """
        import fcntl

        for path in self._others():
            with contextlib.suppress(OSError), path.open("rb") as file:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                # Keep the dead worker's lock meanwhile, so that only one neighbour gives back. If that one dies too,
                # the next finds the lock free again.
                try:
                    facts = json.load(file)
                except ValueError:  # its content was lost when the host went down
                    logger.debug("{} names no worker", path)
                else:
                    await bury(connection, self._keys, facts["worker"], facts["roles"])
                path.unlink(missing_ok=True)
                self._remove_if_empty()

    def _others(self) -> list[Path]:
        mine = self._mine[0].name if self._mine else ""
        try:
            if not is_private(self._folder.parent):  # another user could make a living worker look dead
                return []
            names = sorted(name for name in os.listdir(self._folder) if name != mine and not name.startswith("."))
        except OSError:
            return []
        following = [name for name in names if name > mine] + [name for name in names if name < mine]
        return [self._folder / name for name in (following[:LOOKED_AT] if mine else following)]


async def bury(connection: Connection, keys: Keys, worker: str, roles: Sequence[str]) -> None:
    """
    Give back everything that a dead worker held, in its name, and remove it from the registry.

    The worker may have died between the commit of a task and its next turn. Then its entry of that task is still
    pending, and the pages that follow from the commit are hidden for it. So they are handed on here.
    """
    given_back = 0
    for role in roles:
        more = "1"
        while more == "1":
            ((count, more, gids),) = await connection.run([transitions.release_all(keys, role, worker)])
            given_back += int(count)
            for gid in gids:
                await relay(connection, keys, gid, hidden=True)
    await connection.run(transitions.farewell(keys, worker))
    logger.warning("Worker {} died; gave back {} that it held", worker, counted(given_back, "task"))
