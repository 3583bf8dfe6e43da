"""
What any worker or monitor does for all: hand over what nobody handed over, judge deadlines, remove what is over.

No leader: every step is a compare-and-set or safe to repeat, so any number of processes may do it at once, and none for
an hour loses nothing. Time is the server's.
"""

from __future__ import annotations

import collections
from collections.abc import Sequence

from loguru import logger

from rq_ceylon.errors import CeylonError, ConnectionLostError, QueueFullError
from rq_ceylon.store import queries, transitions
from rq_ceylon.store.connection import Connection
from rq_ceylon.store.keys import Keys
from rq_ceylon.store.scripts import Call
from rq_ceylon.store.transitions import Page, PageAck

GROUPS_PER_STEP = 100
PAGES_PER_CALL = 50
MOVING_S, STILL_S = 10.0, 60.0
"""How long until the next look at a group while something moves, and while nothing does."""

STAGING_MS = 3_600_000
"""A staged group that no part reached for so long is removed: its producer is gone."""

SILENT_MS = 90_000
"""A rolling group without a new part for so long is sealed: its client seals after 60 s by itself."""

CONSUMER_IDLE_MS = 3_600_000
CONSUMERS_EVERY_MS = 600_000


class Maintenance:
    """
    One process's share of the work.
    """

    def __init__(self, connection: Connection, keys: Keys) -> None:
        self._connection, self._keys = connection, keys
        self._consumers_at = 0

    async def run_once(self) -> float:
        """
        Look at up to 100 groups that are due. Returns the seconds until the next step is worth while.

        Raises:
            ConnectionLostError: Redis does not answer; whatever was begun is safe to begin again.
        """
        now_ms = await queries.server_ms(self._connection, self._keys)
        due = await queries.due_groups(self._connection, self._keys, now_ms, GROUPS_PER_STEP)
        nearest = now_ms + round(MOVING_S * 1000)
        for gid in due:
            try:
                nearest = min(nearest, await self._look(gid, now_ms))
            except ConnectionLostError:
                raise
            except QueueFullError:
                continue  # the next look cannot be entered at the memory limit: the group stays due
            except CeylonError as error:
                logger.error("Group {} cannot be looked after: {}", gid, error)
                await self._next_look(gid, now_ms + round(STILL_S * 1000))
        if now_ms >= self._consumers_at:
            self._consumers_at = now_ms + CONSUMERS_EVERY_MS
            await remove_left_consumers(self._connection, self._keys)
        if len(due) >= GROUPS_PER_STEP:
            return 0.0
        return max(0.05, (nearest - now_ms) / 1000)

    async def _look(self, gid: str, now_ms: int) -> int:
        moved = await relay(self._connection, self._keys, gid)
        status, deadline_ms = await judge(self._connection, self._keys, gid)
        if status is None:
            await self._connection.run([transitions.drop_from_index(self._keys, gid)])
            return now_ms + round(MOVING_S * 1000)
        if status in ("finished", "staging"):
            due_ms = await prune(self._connection, self._keys, gid)
            if due_ms == 0:
                return now_ms + round(MOVING_S * 1000)
            await self._next_look(gid, due_ms)
            return due_ms
        await self._connection.run([transitions.seal(self._keys, gid, untouched_ms=SILENT_MS)])
        next_ms = now_ms + round((MOVING_S if moved else STILL_S) * 1000)
        if deadline_ms:
            next_ms = min(next_ms, deadline_ms)
        # A page in flight becomes visible to relays only after its lease: look again by then.
        next_ms = min(next_ms, now_ms + transitions.RELAY_LEASE_MS)
        await self._next_look(gid, next_ms)
        return next_ms

    async def _next_look(self, gid: str, at_ms: int) -> None:
        await self._connection.run([transitions.look_again(self._keys, gid, at_ms)])


async def relay(connection: Connection, keys: Keys, gid: str) -> bool:
    """
    Hand over the pages of a group that whoever wrote them left in the outbox. True if there were any.

    A page is acknowledged only after its role has it: what happens twice is settled at the claim.
    """
    acks: list[PageAck] = []
    moved = False
    while True:
        call = transitions.outbox(keys, gid, wanted=PAGES_PER_CALL, acks=acks)
        (reply,) = await connection.run([call])
        answer = transitions.outbox_reply(gid, reply)
        if not answer.pages and not answer.more:
            return moved
        moved = True
        acks = await hand_over(connection, keys, answer.pages)


async def hand_over(connection: Connection, keys: Keys, pages: Sequence[Page]) -> list[PageAck]:
    """
    Enqueue pages, and return what acknowledges them.
    """
    by_role: dict[str, list[Page]] = collections.defaultdict(list)
    for page in pages:
        by_role[page.role].append(page)
    calls: list[Call] = [transitions.enqueue(keys, role, some) for role, some in by_role.items()]
    horizons = await connection.run(calls) if calls else []
    return [PageAck(page, horizon) for some, horizon in zip(by_role.values(), horizons, strict=True) for page in some]


async def judge(connection: Connection, keys: Keys, gid: str) -> tuple[str | None, int]:
    """
    Settle goals whose deadline has passed. Returns the group's status (None: gone) and its next deadline (0: none).
    """
    (reply,) = await connection.run([transitions.judge(keys, gid)])
    if reply[0] == "GONE":
        return None, 0
    return reply[1], int(reply[2])


async def prune(connection: Connection, keys: Keys, gid: str) -> int:
    """
    Remove a group that is past its retention, or was never completed. Returns when to look again, 0 if it is gone.
    """
    (reply,) = await connection.run([transitions.prune(keys, gid, staging_ms=STAGING_MS)])
    if reply[0] == "NO":
        return int(reply[2])
    await connection.run([transitions.drop_from_index(keys, gid)])
    return 0


async def remove_left_consumers(connection: Connection, keys: Keys) -> None:
    """
    Remove the consumers and names of workers that died, once nothing is pending for them and nobody heard of them for
    an hour.

    Should such a worker wake just then, what it holds is given back at most, and the claim decides as always.
    """
    registered = await queries.registered(connection, keys)
    gone = {name for name, view in registered.items() if view is None}
    for role in await queries.role_names(connection, keys):
        rows: dict[str, list[tuple[int, int]]] = collections.defaultdict(list)
        for name, pending, idle_ms in await queries.idle_consumers(connection, keys, role):
            rows[name].append((pending, idle_ms))
        for name, states in rows.items():
            if all(pending == 0 and idle_ms > CONSUMER_IDLE_MS for pending, idle_ms in states):
                await connection.run([transitions.release_all(keys, role, name)])
            else:
                gone.discard(name)
    for name in sorted(gone):
        await connection.run(transitions.farewell(keys, name))
