"""
Workers of one host bury each other's dead: what a killed one held is given back in two seconds, not after its lease.

Each worker holds a kernel lock on a file of its own, in a folder that the workers of this user on this host share. The
lock ends with the process, however that ends, so a file whose lock is free belongs to a worker that is certainly dead.
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

from rq_ceylon.models import counted
from rq_ceylon.settings import is_private
from rq_ceylon.store import transitions
from rq_ceylon.store.connection import Connection
from rq_ceylon.store.keys import Keys

LOOK_S = 1.0
LOOKED_AT = 8
"""How many of the others a worker looks at, the next ones by name, so that many on one host cost little."""


class Neighbours:
    """
    The folder of one server and namespace.

    A folder that cannot be made, or is not this user's alone, means no neighbours: the lease does the same, later.
    """

    def __init__(self, url: str, keys: Keys) -> None:
        self._keys = keys
        name = hashlib.sha256(f"{url}\0{keys.namespace}".encode()).hexdigest()[:16]
        try:
            temporary = tempfile.gettempdir()
        except FileNotFoundError:  # none can be written, as in a container whose file system is read-only
            temporary = os.devnull  # no folder can be made below it, which `enter` takes for no neighbours
        self._folder = Path(temporary, f"ceylon-{os.getuid()}", name)
        self._mine: tuple[Path, int] | None = None

    def enter(self, worker: str, roles: Sequence[str]) -> None:
        """Hold this worker's lock from now on."""
        import fcntl  # not on Windows, where applications import this module too

        try:
            self._folder.parent.mkdir(mode=0o700, exist_ok=True)
            if not is_private(self._folder.parent):
                raise PermissionError(f"{self._folder.parent} is not yours alone")
            # Locked before it has its name: a neighbour must never find it free.
            low, hidden = self._hidden_file()
            fcntl.flock(low, fcntl.LOCK_EX)
            os.write(low, json.dumps({"worker": worker, "roles": list(roles)}).encode())
            os.rename(hidden, self._folder / worker)
        except OSError as error:
            logger.debug("No neighbours: {}", error)
            return
        self._mine = self._folder / worker, low

    def _hidden_file(self) -> tuple[int, str]:
        """A new file in the folder, which the last neighbour to leave may just be removing."""
        for _ in range(10):
            with contextlib.suppress(FileNotFoundError):
                self._folder.mkdir(mode=0o700, exist_ok=True)
                return tempfile.mkstemp(dir=self._folder, prefix=".")
        raise FileNotFoundError(f"{self._folder} is removed again and again")

    def _remove_if_empty(self) -> None:
        with contextlib.suppress(OSError):  # not empty, or gone
            self._folder.rmdir()

    def leave(self, *, with_farewell: bool = True) -> None:
        """Let go of this worker's lock. Without a farewell it is found free, and what the worker held is given back."""
        if self._mine is not None:
            path, low = self._mine
            self._mine = None
            if with_farewell:
                path.unlink(missing_ok=True)
                self._remove_if_empty()
            os.close(low)

    async def bury_dead(self, connection: Connection) -> None:
        """
        Give back what dead workers of this host held. What they had claimed counts a crash when it is claimed again.

        Raises:
            CeylonError: Redis does not answer, or refuses; the next look tries again.
        """
        import fcntl

        for path in self._others():
            with contextlib.suppress(OSError), path.open("rb") as file:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                # Held while it is buried, so that one does it; should that one die, the next finds it free again.
                try:
                    facts = json.load(file)
                except ValueError:  # its content was lost when this host went down
                    logger.debug("{} names no worker", path)
                else:
                    await bury(connection, self._keys, facts["worker"], facts["roles"])
                path.unlink(missing_ok=True)
                self._remove_if_empty()

    def _others(self) -> list[Path]:
        mine = self._mine[0].name if self._mine else ""
        try:
            if not is_private(self._folder.parent):  # anybody could name the living among the dead
                return []
            names = sorted(name for name in os.listdir(self._folder) if name != mine and not name.startswith("."))
        except OSError:
            return []
        following = [name for name in names if name > mine] + [name for name in names if name < mine]
        return [self._folder / name for name in (following[:LOOKED_AT] if mine else following)]


async def bury(connection: Connection, keys: Keys, worker: str, roles: Sequence[str]) -> None:
    """Give back, in its name, what a worker held that is certainly dead, and take it from the registry."""
    given_back = 0
    for role in roles:
        more = "1"
        while more == "1":
            ((count, more),) = await connection.run([transitions.release_all(keys, role, worker)])
            given_back += int(count)
    await connection.run(transitions.farewell(keys, worker))
    logger.warning("Worker {} died; gave back {} that it held", worker, counted(given_back, "task"))
