"""How workers and monitors show that they live: a registry entry, and a heartbeat that expires when they stop."""

from __future__ import annotations

import importlib.metadata
import os
import re
import secrets
import socket
import time
from collections.abc import Mapping, Sequence
from typing import Any, Literal

from rq_ceylon.models import check_id
from rq_ceylon.store import queries, transitions
from rq_ceylon.store.connection import Connection
from rq_ceylon.store.keys import Keys
from rq_ceylon.store.scripts import Call

TTL_MS = 15_000
BEAT_S = 5.0


class Presence:
    """
    The registry entry and the heartbeat of this process.

    Attributes:
        name: unique per start: entries that are pending for a name belong to one process, and to none after it.
    """

    def __init__(
        self,
        keys: Keys,
        kind: Literal["worker", "monitor"],
        name: str | None,
        *,
        task_names: Sequence[str],
        roles: Sequence[str] = (),
        slots: int = 0,
    ) -> None:
        # The name of a host may contain characters that a name in Redis may not.
        host = re.sub(r"[^A-Za-z0-9_-]", "-", socket.gethostname().split(".")[0]) or "host"
        shown = check_id(name, "name") if name else host
        self.name = check_id(f"{shown[:40]}-{os.getpid()}-{secrets.token_hex(4)}", "name")
        self._keys, self._roles = keys, roles
        self._facts: dict[str, Any] = {
            "kind": kind,
            "host": socket.gethostname(),
            "pid": os.getpid(),
            "version": importlib.metadata.version("rq-ceylon"),
            "roles": list(roles),
            "slots": slots,
            "task_names": sorted(task_names),
            "started_ms": round(time.time() * 1000),
        }

    def beat(
        self,
        *,
        stopping: bool,
        tasks: Mapping[str, int] | None = None,
        progress: Mapping[str, tuple[float | None, str]] | None = None,
        low_marks: Mapping[str, int] | None = None,
        hung: int = 0,
        is_exhausted: bool = False,
    ) -> list[Call]:
        """
        The calls of one heartbeat.

        Args:
            tasks: maps `<gid>/<tid>` of each running task to its start, epoch ms.
            progress: what handlers reported about a task: a fraction or None, and a message.
            low_marks: for each role, the fence below which this worker holds nothing.
            hung: how many attempts are over although their code goes on here.
            is_exhausted: so many attempts hang that they take places from others.
        """
        facts = {**self._facts, "stopping": stopping, "tasks": tasks or {}, "low_marks": low_marks or {}}
        if hung:
            facts |= {"hung": hung, "is_exhausted": is_exhausted}
        if progress:
            facts["progress"] = progress
        return transitions.heartbeat(self._keys, self.name, facts, ttl_ms=TTL_MS, roles=self._roles)

    def farewell(self) -> list[Call]:
        return transitions.farewell(self._keys, self.name)


async def is_unroutable(connection: Connection, keys: Keys, role: str, task_name: str) -> bool:
    """Whether no worker of the role that knows this task has asked for it in an hour, and none is alive now."""
    now_ms = await queries.server_ms(connection, keys)
    since_ms = await queries.waiting_since_ms(connection, keys, role, task_name)
    if since_ms is None or now_ms - since_ms < transitions.UNROUTABLE_MS:
        return False
    for worker in await queries.workers(connection, keys):
        if role in worker.roles and task_name in worker.task_names:
            # A live worker knows the name and may only be busy, so the hour starts again.
            await connection.run([transitions.postpone_overdue(keys, role, task_name, now_ms)])
            return False
    return True
