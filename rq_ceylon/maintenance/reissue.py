"""
Reissues entries that Redis itself lost, as when it restarts with an old file and a role's streams go back in time.

The entry of a task counts as lost if all of this holds. Where this errs, it makes an entry too many, and the claim of
that entry answers DUPLICATE or OUTDATED.

1. The group is active or closing, and has open tasks and an empty outbox: no entry of it is on its way.
2. The group has a *horizon* in the role: the largest entry or due time (ms) that an acknowledged page got there.
   Without one, none of its entries has arrived there.
3. A *probe* of the role answered CLEAR or DUE: it has shown all entries of the group up to the horizon (after DUE,
   except some that are not due yet). An entry stays in its role until its task has ended, also while a worker runs it.
   So a task that was not shown has no entry up to the horizon. It may have one above: a copy of an entry that was given
   back, or a delayed one that became due, has a new id. Then one too many is made, and its page moves the horizon.
4. No page of the group was written between the look that read the horizons and the scan for open tasks; otherwise the
   scan answers MOVED.
5. The task is pending, has no unmet need, and is due (after CLEAR: or will be). `scan` writes a page for it.
6. Or the task is in progress and an *orphan*: no worker runs it. Either its worker lives and its fence is below the low
   mark in the heartbeat, or this process has seen no heartbeat of its worker in looks at least a lease apart. `orphans`
   writes a page whose entry supersedes the fence on record.

In a closing group nothing starts any more, so only 6 counts, and the task is cancelled so that the group finishes.
"""

from __future__ import annotations

import time
from typing import NamedTuple

from rq_ceylon.maintenance.relay import relay
from rq_ceylon.store import queries, transitions
from rq_ceylon.store.connection import Connection
from rq_ceylon.store.keys import Keys

OPEN = ("active", "closing")

PROBES = 100
"""How often a role is probed in one look: enough for 50,000 entries that are delivered or wait by name."""


class Shown(NamedTuple):
    """The last word of a probe of a role, and the tasks of the group that its answers have shown."""

    word: str
    tids: frozenset[str] | set[str] = frozenset()


class Reissue:
    """
    Looks at groups with open tasks and an empty outbox, for one process.

    Its only state is `_silent_since`: for a task in progress (group, task, fence), since when this process has seen no
    heartbeat of its worker, in monotonic seconds.
    """

    def __init__(self, connection: Connection, keys: Keys) -> None:
        self._connection, self._keys = connection, keys
        self._silent_since: dict[tuple[str, str, str], float] = {}

    async def put_back(self, gid: str) -> int:
        """Reissue the lost entries of one group. Returns how many were made again."""
        seen = await self._read(gid)
        if seen is None or seen.status not in OPEN or seen.open == 0 or seen.in_outbox:
            return 0
        # A closing group needs no probe: only orphans matter there.
        answers = {role: Shown("CLEAR") for role in seen.horizons}
        if seen.status == "active":
            answers = await self._probe(gid, seen)
        reissued = 0
        for role, shown in answers.items():
            reissued += await self._scan(gid, role, seen.last_page, shown)
            await relay(self._connection, self._keys, gid)
            # These pages must have arrived before the next role is scanned, and that scan must be told the number of
            # the last page, or it answers MOVED. It does not notice pages that others wrote since the probe.
            seen = await self._read(gid)
            if seen is None or seen.in_outbox:
                break
        return reissued

    async def _read(self, gid: str) -> transitions.GroupState | None:
        (reply,) = await self._connection.run([transitions.read_state(self._keys, gid)])
        return transitions.read_state_reply(reply)

    async def _probe(self, gid: str, seen: transitions.GroupState) -> dict[str, Shown]:
        """What each role shows that answers CLEAR or DUE; nothing if all roles do and together show all open tasks."""
        begins = dict.fromkeys(seen.horizons, "")
        answers = {role: Shown("MORE") for role in begins}
        for _ in range(PROBES):
            calls = [
                transitions.probe(self._keys, role, gid, seen.horizons[role], begin) for role, begin in begins.items()
            ]
            replies = await self._connection.run(calls)
            for role, reply in zip(list(begins), replies, strict=True):
                word, begins[role], tids = transitions.probe_reply(reply)
                answers[role] = Shown(word, answers[role].tids | set(tids))
                if word != "MORE":
                    del begins[role]
            if not begins:
                break
        # Of a role that answers BUSY, or still MORE, nothing can be said in this look.
        clear = {role: shown for role, shown in answers.items() if shown.word in ("CLEAR", "DUE")}
        shown = {tid for answer in clear.values() for tid in answer.tids}
        if len(clear) < len(seen.horizons) or len(shown) < seen.open:
            return clear
        # Among the tasks shown, some may have ended. They must not make up the number for open ones that are not shown.
        still = await queries.count_open(self._connection, self._keys, gid, shown)
        return clear if still < seen.open else {}

    async def _scan(self, gid: str, role: str, last_page: int, shown: Shown) -> int:
        """Make the entries of open tasks of the role that it did not show. Returns how many."""
        reissued, cursor = 0, "0"
        while True:
            call = transitions.scan(self._keys, gid, role, last_page, cursor, [shown.word, *shown.tids])
            (reply,) = await self._connection.run([call])
            if reply[0] != "OK":  # MOVED: what was shown does not hold any more
                return reissued
            _, _, cursor, running, entries = reply
            reissued += int(entries)
            claims = list(zip(running[::3], running[1::3], running[2::3], strict=True))
            if found := await self._orphans(gid, role, claims):
                (ended,) = await self._connection.run([transitions.orphans(self._keys, gid, found)])
                reissued += int(ended[2]) if ended[0] == "OK" else 0
            if cursor == "0":
                return reissued

    async def _orphans(self, gid: str, role: str, claims: list[tuple[str, str, str]]) -> list[tuple[str, str]]:
        """
        The orphans among these tasks in progress (task, fence, worker).

        A worker holds nothing below its low mark; without one in its heartbeat, it may hold anything. If a worker shows
        no heartbeat for a whole lease, it has not renewed the lease, so this is over.
        """
        if not claims:
            return []
        marks = await queries.low_marks(self._connection, self._keys, {worker for _, _, worker in claims}, role)
        lease_s = await queries.lease_s(self._connection, self._keys, role)
        now, found = time.monotonic(), []
        for tid, fence, worker in claims:
            key, mark = (gid, tid, fence), marks[worker]
            if mark is not None:  # the worker lives
                self._silent_since.pop(key, None)
                if int(fence) < mark:
                    found.append((tid, fence))
            elif now - self._silent_since.setdefault(key, now) >= lease_s:
                del self._silent_since[key]
                found.append((tid, fence))
        return found

    def start_silences_anew(self, gid: str) -> None:
        """Time the silence of the workers of this group's tasks anew, since something of it moves."""
        for key in [key for key in self._silent_since if key[0] == gid]:
            del self._silent_since[key]
