"""
What any worker or monitor does for all: hand over what nobody handed over, judge deadlines, remove what is over.

No leader: every step is a compare-and-set or safe to repeat, so any number of processes may do it at once, and none for
an hour loses nothing. Time is the server's.
"""

from __future__ import annotations

import asyncio
import collections
from collections.abc import Sequence
from typing import Literal

from loguru import logger

from rq_ceylon.errors import CeylonError, ConnectionLostError
from rq_ceylon.maintenance.reissue import Reissue
from rq_ceylon.maintenance.relay import relay
from rq_ceylon.store import queries, transitions
from rq_ceylon.store.connection import Connection
from rq_ceylon.store.keys import INDEX_SHARDS, Keys
from rq_ceylon.store.scripts import Call, command
from rq_ceylon.store.trouble import complain, warn_once

GROUPS_PER_STEP = 100
DELAYED_PER_STEP = 500
AFTER_ERROR_S = 5.0
MOVING_MS, STILL_MS = 10_000, 60_000
"""How long until the next look at a group while something moves, and while nothing does. No step is further from the
next than the first, so that a new group is seen in time."""

STAGING_MS = 3_600_000
"""A staged group that no part reached for so long is removed: its producer is gone."""

SILENT_MS = 90_000
"""A rolling group without a new part for so long is sealed: its client seals after 60 s by itself."""

THOROUGH_EVERY_MS = 3_600_000
"""Between two looks at all keys."""

CONSUMER_IDLE_MS = 3_600_000

RARELY_MS = 600_000
"""Between two looks at what goes wrong rarely."""


class Maintenance:
    """One process's share of the work."""

    def __init__(self, connection: Connection, keys: Keys) -> None:
        self._connection, self._keys = connection, keys
        self._reissue = Reissue(connection, keys)
        self._rarely_at = 0

    async def run_once(self) -> float:
        """
        Look at about 100 groups that are due. Returns the seconds until the next step is worth while, 10 at most.

        Raises:
            ConnectionLostError: Redis does not answer; whatever was begun is safe to begin again.
        """
        now_ms = await queries.server_ms(self._connection, self._keys)
        if now_ms >= self._rarely_at:
            self._rarely_at = now_ms + RARELY_MS
            await look_at_all(self._connection, self._keys, now_ms)
            await remove_left_consumers(self._connection, self._keys)
        next_looks: dict[str, int] = {}
        for gid in await queries.due_groups(self._connection, self._keys, now_ms, GROUPS_PER_STEP):
            try:
                next_ms = await self._look(gid, now_ms)
            except ConnectionLostError:
                raise
            except Exception as error:  # of this group alone
                complain(f"Group {gid} cannot be looked after", error)
                next_ms = now_ms + STILL_MS
            if next_ms is not None:
                next_looks[gid] = next_ms
        await self._connection.run([transitions.look_again(self._keys, *one) for one in next_looks.items()])
        return await self._pause_s()

    async def _look(self, gid: str, now_ms: int) -> int | None:
        """Do what one group needs. Returns when to look again, None if the group is gone."""
        answer, moves = await relay(self._connection, self._keys, gid)
        status, deadline_ms = answer.status, answer.next_deadline_ms
        if status is not None and 0 < deadline_ms <= now_ms:
            status, deadline_ms = await judge(self._connection, self._keys, gid)
        if status == "waiting":
            status = await meet(self._connection, self._keys, gid)
            moves = True
        if status == "active":
            status = await seal(self._connection, self._keys, gid)
        if status == "finished" and answer.status != "finished":
            # Since its outbox was looked through: it may have messages to send.
            answer, moves = await relay(self._connection, self._keys, gid)
        if status in ("active", "closing") and not moves:
            moves = await self._reissue.run(gid) > 0 or status == "closing"
        else:
            self._reissue.forget(gid)
        if status is None:
            return await self._forget(gid, now_ms)
        due_ms = now_ms + (MOVING_MS if moves else STILL_MS)
        if status in ("staging", "finished"):
            prune_ms = await prune(self._connection, self._keys, gid)
            if prune_ms is None:
                return None
            # A staged group may be active in a moment, and then have deadlines: its withheld pages keep its look near.
            return prune_ms if status == "finished" and prune_ms and not moves else due_ms
        return min(due_ms, deadline_ms) if deadline_ms else due_ms

    async def _forget(self, gid: str, now_ms: int) -> int | None:
        # Not looked at since its client announced it, which is about to write it.
        (score,) = await self._connection.run([command("ZSCORE", self._keys.index_of(gid), gid)])
        if score is not None and float(score) < transitions.ANNOUNCED_BELOW:
            return now_ms + STILL_MS
        # Another process has looked meanwhile, perhaps for the first time.
        if score is None or float(score) > now_ms:
            return None
        await drop(self._connection, self._keys, gid)
        return None

    async def _pause_s(self) -> float:
        calls = [command("ZRANGE", self._keys.index(shard), 0, 0, "WITHSCORES") for shard in range(INDEX_SHARDS)]
        first = [int(float(reply[1])) for reply in await self._connection.run(calls) if reply]
        now_ms = await queries.server_ms(self._connection, self._keys)
        return min(max(0.05, (min(first, default=now_ms + MOVING_MS) - now_ms) / 1000), MOVING_MS / 1000)


async def maintain(url: str, keys: Keys) -> None:
    """Maintain for as long as this runs, whatever goes wrong in one step."""
    async with Connection(url) as connection:
        maintenance = Maintenance(connection, keys)
        while True:
            try:
                pause_s = await maintenance.run_once()
            except Exception as error:
                complain("Maintenance cannot go on now", error)
                pause_s = AFTER_ERROR_S
            await asyncio.sleep(pause_s)


async def look_at_all(connection: Connection, keys: Keys, now_ms: int) -> None:
    """What takes a look at all keys: once an hour, by whoever comes first."""
    (mine,) = await connection.run([transitions.take_thorough(keys, now_ms, THOROUGH_EVERY_MS)], refusals=True)
    if not mine or isinstance(mine, CeylonError):  # at the memory limit it has time
        return
    await restore_index(connection, keys)
    await remove_over_delayed(connection, keys)


async def restore_index(connection: Connection, keys: Keys) -> None:
    """Enter again the groups that the index has lost, as when its node of a cluster fails: nobody looks after them."""
    try:
        async for gids in queries.stored_groups(connection, keys):
            lost = await connection.run([transitions.restore(keys, gid) for gid in gids])
            if any(lost):
                logger.warning("The index of groups had lost some; entered again: {}", sum(lost))
    except ConnectionLostError:
        raise
    except CeylonError as error:
        warn_once(f"Groups that the index loses will not be found: {error}")


async def remove_over_delayed(connection: Connection, keys: Keys) -> None:
    """
    Remove the delayed entries of tasks that have ended, or whose group is closed or gone; they might be due in days
    only. A task is stored before its entry is made, so none of one that is open is taken for over.
    """
    for key in [keys.role_part(role, "delayed") for role in await queries.role_names(connection, keys)]:
        last = -1  # from the latest on: those that become due leave at the other end
        while True:
            (entries,) = await connection.run([command("ZRANGE", key, last - DELAYED_PER_STEP + 1, last)])
            if not entries:
                break
            over = await _over(connection, keys, entries)
            if over:
                await connection.run([command("ZREM", key, *over)])
            last -= DELAYED_PER_STEP - len(over)


async def _over(connection: Connection, keys: Keys, entries: Sequence[str]) -> list[str]:
    # `1 gid tid issue ...`; one that cannot be read is left to the worker that fetches it.
    tasks = {entry: words[1:3] for entry in entries if len(words := entry.split(" ")) > 3}
    calls = [command("HEXISTS", keys.group_part(gid, "tasks"), tid) for gid, tid in tasks.values()]
    exist = await connection.run(calls, refusals=True)
    gids = list({gid for gid, _ in tasks.values()})
    calls = [command("HGET", keys.group_part(gid, "meta"), "status") for gid in gids]
    statuses = dict(zip(gids, await connection.run(calls, refusals=True), strict=True))
    closed = {gid for gid, status in statuses.items() if status in ("closing", "finished")}
    return [entry for (entry, (gid, _)), one in zip(tasks.items(), exist, strict=True) if one == 0 or gid in closed]


async def meet(connection: Connection, keys: Keys, gid: str) -> str | None:
    """
    Ask the groups on which this one depends whether they have finished, should their message have been lost, and start
    it once all have. Returns the group's status (None: gone).
    """
    others = await queries.depends_on(connection, keys, gid)
    asked = await connection.run([transitions.register(keys, other, gid) for other in others])
    for other, reply in zip(others, asked, strict=True):
        word, *rest = reply
        if word == "OK" and rest[0] != "finished":
            continue
        outcome = rest[1] if word == "OK" else "gone"
        await connection.run([transitions.met(keys, gid, other, outcome)])
    answer, _ = await relay(connection, keys, gid)
    return answer.status


async def judge(
    connection: Connection, keys: Keys, gid: str, *, goal: str = "", verdict: Literal["achieved", "failed", ""] = ""
) -> tuple[str | None, int]:
    """
    Settle goals whose deadline has passed, and one by the verdict of its callable; if that ended the group, tell those
    that depend on it. Returns the group's status (None: gone) and its next deadline (0: none).
    """
    (reply,) = await connection.run([transitions.judge(keys, gid, goal=goal, verdict=verdict)])
    if reply[0] == "GONE":
        return None, 0
    if reply[1] == "finished":
        await relay(connection, keys, gid)
    return reply[1], int(reply[2])


async def seal(connection: Connection, keys: Keys, gid: str) -> str | None:
    """Seal a rolling group whose client fell silent. Returns the status of the group; None if it is gone."""
    (reply,) = await connection.run([transitions.seal(keys, gid, untouched_ms=SILENT_MS)])
    return None if reply[0] == "GONE" else str(reply[1])


async def prune(connection: Connection, keys: Keys, gid: str) -> int | None:
    """
    Remove a group that is past its retention, or was never completed. Returns None if it is gone, else when it will be
    due (0: its status has changed).
    """
    (reply,) = await connection.run([transitions.prune(keys, gid, staging_ms=STAGING_MS)])
    if reply[0] == "NO":
        return int(reply[2])
    await drop(connection, keys, gid)
    return None


async def drop(connection: Connection, keys: Keys, gid: str) -> None:
    """Take a group that is gone out of the index, unless somebody submitted it again meanwhile."""
    await connection.run([transitions.drop_from_index(keys, gid)])
    (exists,) = await connection.run([command("EXISTS", keys.group_part(gid, "meta"))])
    if exists:
        await connection.run(transitions.announce(keys, gid, ()))


async def remove_left_consumers(connection: Connection, keys: Keys) -> None:
    """
    Remove the consumers and names of workers that died, once nothing is pending for them and nobody heard of them for
    an hour. What is still pending for one is first reclaimed by the other workers of its role.

    Should such a worker wake and fetch between this reading and the removal, the script gives back what it fetched: a
    copy with the lineage of the original, so that a claim of it ends the other's lease, and its fence decides whose
    outcome counts. At worst a task runs twice, as after any lost lease; it is never lost or counted twice.
    """
    registered = await queries.registered(connection, keys)
    gone = {name for name, view in registered.items() if view is None}
    calls: list[Call] = []
    for role in await queries.role_names(connection, keys):
        rows: dict[str, list[tuple[int, int]]] = collections.defaultdict(list)
        for name, pending, idle_ms in await queries.idle_consumers(connection, keys, role):
            if registered.get(name) is None:
                rows[name].append((pending, idle_ms))
        for name, states in rows.items():
            if all(pending == 0 and idle_ms > CONSUMER_IDLE_MS for pending, idle_ms in states):
                calls.append(transitions.release_all(keys, role, name))
            else:
                gone.discard(name)
    for name in sorted(gone):
        calls += transitions.farewell(keys, name)
    for reply in await connection.run(calls, refusals=True):
        if isinstance(reply, CeylonError):
            logger.error("A worker that has left cannot be removed: {}", reply)
