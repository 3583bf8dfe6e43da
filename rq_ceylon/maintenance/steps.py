"""
The steps of maintenance, which every worker and monitor takes. For each group that is due: relay pages that were left
behind, judge deadlines, ask the groups on which it depends, seal it if it is rolling and silent, reissue entries that
Redis lost, remove it when it is over. Rarely, for all: remove the consumers of workers that have left, and take the
hourly look at all keys.

There is no leader. Every step is a compare-and-set or safe to repeat, so any number of processes may take it at once.
Nothing is lost while none runs; things only happen later. Every decision uses the server's clock.
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
from rq_ceylon.store.redis_errors import complain, warn_once
from rq_ceylon.store.scripts import Call, command

GROUPS_PER_STEP = 100
DELAYED_PER_STEP = 500
AFTER_ERROR_S = 5.0
MOVING_MS = 10_000
"""How long until the next look at a group while pages are on their way or its state is about to change. Also the
longest time between two steps, so that a new group is looked at in time."""

STILL_MS = 60_000
"""How long until the next look at any other group."""

STAGING_MS = 3_600_000
"""A staging group that no part has reached for this long is removed, since its client is gone."""

SILENT_MS = 90_000
"""A rolling group without a new part for this long is sealed. A client that lives seals it after 60 s. A retry without
a new part for this long is completed."""

HOURLY_EVERY_MS = 3_600_000
"""The time between two looks at all keys, which the processes share."""

CONSUMER_IDLE_MS = 3_600_000
"""A consumer without a heartbeat and without pending entries is removed after this long."""

RARE_EVERY_MS = 600_000
"""The time between two rare steps of one process."""


class Maintenance:
    """The maintenance of one process. It remembers only when the rare steps are due and which workers are silent."""

    def __init__(self, connection: Connection, keys: Keys) -> None:
        self._connection, self._keys = connection, keys
        self._reissue = Reissue(connection, keys)
        self._rare_at = 0

    async def run_once(self) -> float:
        """
        Take one step: look at the groups that are due, about 100 at most. Returns the seconds to wait before the next
        step, 10 at most.

        Raises:
            ConnectionLostError: Redis does not answer. Everything that was begun is safe to repeat.
        """
        now_ms = await queries.server_ms(self._connection, self._keys)
        if now_ms >= self._rare_at:
            self._rare_at = now_ms + RARE_EVERY_MS
            await hourly_look(self._connection, self._keys, now_ms)
            await remove_left_consumers(self._connection, self._keys)
        next_looks: dict[str, int] = {}
        for gid in await queries.due_groups(self._connection, self._keys, now_ms, GROUPS_PER_STEP):
            try:
                next_ms = await self._look_after(gid, now_ms)
            except ConnectionLostError:
                raise
            except Exception as error:  # of this group; the others must not suffer
                complain(f"Group {gid} cannot be looked after", error)
                next_ms = now_ms + STILL_MS
            if next_ms is not None:
                next_looks[gid] = next_ms
        await self._connection.run([transitions.look_again(self._keys, *one) for one in next_looks.items()])
        await self._look_sooner([gid for gid, next_ms in next_looks.items() if next_ms > now_ms + STILL_MS])
        return await self._pause_s()

    async def _look_sooner(self, gids: Sequence[str]) -> None:
        """
        Look soon at those of these groups that have not finished. They had, and were due at the end of their
        retention. A retry that came meanwhile has set an earlier look, which may just have been overwritten.
        """
        calls = [command("HGET", self._keys.group_part(gid, "meta"), "status") for gid in gids]
        statuses = await self._connection.run(calls, refusals=True)
        active = [gid for gid, status in zip(gids, statuses, strict=True) if status != "finished"]
        await self._connection.run([transitions.look_again(self._keys, gid, 0) for gid in active])

    async def _look_after(self, gid: str, now_ms: int) -> int | None:
        """
        Do what one group needs now. Returns the time of the next look at it (ms), None if the group is gone.

        `status` is the group's status as the latest answer told it (None: gone), and `deadline_ms` its next deadline
        (0: none). Each step may change them, and the later steps go by the new ones. `moves` says that the next look
        must be soon: pages are on their way or withheld, or the group's state is about to change.
        """
        answer, moves = await relay(self._connection, self._keys, gid)
        status, deadline_ms = answer.status, answer.next_deadline_ms
        if status is not None and 0 < deadline_ms <= now_ms:
            status, deadline_ms = await judge(self._connection, self._keys, gid)
        # The messages of the groups on which this one depends may be lost, so ask them.
        if status == "waiting":
            status, deadline_ms = await ask_dependencies(self._connection, self._keys, gid)
            moves = True
        # Does nothing unless it is a rolling group whose client has fallen silent.
        if status == "active":
            status = await seal(self._connection, self._keys, gid)
        if status == "finished" and answer.status != "finished":
            # One of the steps above finished it, after its outbox was relayed. It may have messages for dependents.
            answer, moves = await relay(self._connection, self._keys, gid)
        # Reissue only while nothing moves: an entry whose page is under way is not in its role yet, but is not lost.
        # A closing group finishes once its running tasks have ended, so the next look is soon.
        if status in ("active", "closing") and not moves:
            moves = await self._reissue.put_back(gid) > 0 or status == "closing"
        else:
            self._reissue.start_silences_anew(gid)  # a later reissue times the silence of workers anew
        if status is None:
            return await self._unlist(gid, now_ms)
        due_ms = now_ms + (MOVING_MS if moves else STILL_MS)
        if status in ("staging", "finished"):
            prune_ms = await prune(self._connection, self._keys, gid)
            if prune_ms is None:
                return None
            # A finished group needs no look before it is pruned, unless pages still move or its status has changed
            # (prune_ms is 0). A staging group may become active at any moment and then has deadlines: look soon.
            return prune_ms if status == "finished" and prune_ms and not moves else due_ms
        # A deadline is looked at when it passes; one of a group that started without this look, within MOVING_MS.
        return min(due_ms, deadline_ms) if deadline_ms else due_ms

    async def _unlist(self, gid: str, now_ms: int) -> int | None:
        """
        Take a group that does not exist out of the index, unless its client may be about to write it. Returns the time
        of the next look (ms), None if there is none.

        A client announces a group with its first part, by a score below `ANNOUNCED_BELOW`, and each look replaces the
        score by a time. So a score that is still so small means: announced, and not looked at since.
        """
        # Announced, and this is the first look: the client is about to write it. Keep the entry until the next look.
        (score,) = await self._connection.run([command("ZSCORE", self._keys.index_of(gid), gid)])
        if score is not None and float(score) < transitions.ANNOUNCED_BELOW:
            return now_ms + STILL_MS
        # Another process has taken it out, or has looked meanwhile and set the next look, perhaps because it found the
        # group just announced. Then it is not ours to drop.
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
    """Do maintenance until cancelled. A step that fails is reported, and the next one follows after a pause."""
    async with Connection(url) as connection:
        maintenance = Maintenance(connection, keys)
        while True:
            try:
                pause_s = await maintenance.run_once()
            except Exception as error:
                complain("Maintenance cannot go on now", error)
                pause_s = AFTER_ERROR_S
            await asyncio.sleep(pause_s)


async def hourly_look(connection: Connection, keys: Keys, now_ms: int) -> None:
    """Look at all keys, once an hour: the first process that asks takes the look, and the others do nothing."""
    (mine,) = await connection.run([transitions.take_thorough(keys, now_ms, HOURLY_EVERY_MS)], refusals=True)
    if not mine or isinstance(mine, CeylonError):  # refused at the memory limit: this can wait
        return
    await restore_index(connection, keys)
    await remove_useless_delayed(connection, keys)


async def restore_index(connection: Connection, keys: Keys) -> None:
    """Enter groups again that the index has lost, as when its node of a cluster fails: no maintenance sees them."""
    try:
        async for gids in queries.stored_groups(connection, keys):
            restored = await connection.run([transitions.restore(keys, gid) for gid in gids])
            if any(restored):
                logger.warning("The index of groups had lost some; entered again: {}", sum(restored))
    except ConnectionLostError:
        raise
    except CeylonError as error:
        warn_once(f"Groups that the index loses will not be found: {error}")


async def remove_useless_delayed(connection: Connection, keys: Keys) -> None:
    """
    Remove the delayed entries of tasks that have ended, or whose group is closed or gone. The claim would refuse them,
    but perhaps only in days, when they are due.

    A task is stored before its entry is made. So the task of an entry that finds no task has ended.
    """
    for key in [keys.role_part(role, "delayed") for role in await queries.role_names(connection, keys)]:
        # From the latest on: entries that become due meanwhile leave at the other end, and shift none. Those that are
        # added later push others down, so that some are read twice, but none is missed.
        last = -1
        while True:
            (entries,) = await connection.run([command("ZRANGE", key, last - DELAYED_PER_STEP + 1, last)])
            if not entries:
                break
            over = await _over(connection, keys, entries)
            if over:
                await connection.run([command("ZREM", key, *over)])
            last -= DELAYED_PER_STEP - len(over)


async def _over(connection: Connection, keys: Keys, entries: Sequence[str]) -> list[str]:
    # `1 gid tid issue ...`. An entry that cannot be read is left to the fetch, which puts it into quarantine.
    tasks = {entry: words[1:3] for entry in entries if len(words := entry.split(" ")) > 3}
    calls = [command("HEXISTS", keys.group_part(gid, "tasks"), tid) for gid, tid in tasks.values()]
    exist = await connection.run(calls, refusals=True)
    gids = list({gid for gid, _ in tasks.values()})
    calls = [command("HGET", keys.group_part(gid, "meta"), "status") for gid in gids]
    statuses = dict(zip(gids, await connection.run(calls, refusals=True), strict=True))
    closed = {gid for gid, status in statuses.items() if status in ("closing", "finished")}
    return [entry for (entry, (gid, _)), one in zip(tasks.items(), exist, strict=True) if one == 0 or gid in closed]


async def ask_dependencies(connection: Connection, keys: Keys, gid: str) -> tuple[str | None, int]:
    """
    Ask the groups on which this one depends how they stand, in case a message of theirs was lost. It starts once all
    have come as far as it wants, and is cancelled if one can no longer. Returns the group's status (None: gone) and its
    next deadline (ms), or 0.
    """
    others = await queries.depends_on(connection, keys, gid)
    # Registering tells how the other group stands, and makes it write a message when it finishes.
    asked = await connection.run([transitions.register(keys, other, gid) for other in others])
    for other, reply in zip(others, asked, strict=True):
        standing = reply[2] if reply[0] == "OK" else "gone"
        if standing:
            await connection.run([transitions.met(keys, gid, other, standing)])
    answer, _ = await relay(connection, keys, gid)
    return answer.status, answer.next_deadline_ms


async def judge(
    connection: Connection, keys: Keys, gid: str, *, goal: str = "", verdict: Literal["achieved", "failed", ""] = ""
) -> tuple[str | None, int]:
    """
    Settle the goals whose deadline has passed, and the named goal by the verdict of its function. If that finished the
    group, tell the groups that depend on it. Returns the group's status (None: gone) and its next deadline (ms), or 0.
    """
    (reply,) = await connection.run([transitions.judge(keys, gid, goal=goal, verdict=verdict)])
    if reply[0] == "GONE":
        return None, 0
    if reply[1] == "finished":
        await relay(connection, keys, gid)
    return reply[1], int(reply[2])


async def seal(connection: Connection, keys: Keys, gid: str) -> str | None:
    """
    Seal the group if it is a rolling group whose client fell silent, or complete a retry whose client did. Returns its
    status (None: gone).
    """
    (reply,) = await connection.run([transitions.seal(keys, gid, untouched_ms=SILENT_MS)])
    if reply[-1] == "reopening":
        (reply,) = await connection.run([transitions.end_retry(keys, gid, untouched_ms=SILENT_MS)])
    return None if reply[0] == "GONE" else str(reply[1])


async def prune(connection: Connection, keys: Keys, gid: str, *, at_once: bool = False) -> int | None:
    """
    Remove a group that is past its retention (`at_once`: that has finished), or whose client never sent the last part.
    Returns None if it is gone now, the time from which it can be removed (ms), or 0 if it is neither finished nor
    staging.
    """
    (reply,) = await connection.run([transitions.prune(keys, gid, staging_ms=STAGING_MS, at_once=at_once)])
    if reply[0] == "NO":
        return int(reply[2])
    await drop(connection, keys, gid)
    return None


async def drop(connection: Connection, keys: Keys, gid: str) -> None:
    """Take a group that is gone out of the index, unless it was submitted again meanwhile, under its key."""
    await connection.run([transitions.drop_from_index(keys, gid)])
    # Look only now: a submission that announced the group before the removal has written it, or announces it again.
    (exists,) = await connection.run([command("EXISTS", keys.group_part(gid, "meta"))])
    if exists:
        await connection.run(transitions.announce(keys, gid, ()))


async def remove_left_consumers(connection: Connection, keys: Keys) -> None:
    """
    Remove the consumers and the names of workers that died, once nothing is pending for them and they were idle for an
    hour. A name without consumers is removed at once. Entries that are still pending are first reclaimed by other
    workers of the role.

    If such a worker wakes and fetches between this reading and the removal, the script gives its entries back, as
    copies with the lineage of the original. A claim of the copy takes over from the worker that woke, and the fence
    decides which outcome counts. At worst a task runs twice, as after any lost lease; it is never lost, and never
    counted twice.
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
                gone.discard(name)  # its name stays until all its consumers can go
    for name in sorted(gone):
        calls += transitions.farewell(keys, name)
    for reply in await connection.run(calls, refusals=True):
        if isinstance(reply, CeylonError):
            logger.error("A worker that has left cannot be removed: {}", reply)
