"""
Puts back what Redis itself lost: entries of a role whose queue is gone or went back in time.

The group knows its open tasks, and per role the *horizon*: the largest entry or due ms that any of its pages got there.
A role that has nothing left up to that horizon, and does not show a task that is open, has lost its entry. Nothing here
decides more than "enqueue it again": a false alarm is answered at the claim.
"""

from __future__ import annotations

import time

from rq_ceylon.maintenance.relay import relay
from rq_ceylon.store import queries, transitions
from rq_ceylon.store.connection import Connection
from rq_ceylon.store.keys import Keys

OPEN = ("active", "closing")

PROBES = 100
"""How often a role is asked in one look: for 50,000 entries that are delivered, or wait by their name."""


class Reissue:
    """One process's looks at groups with open tasks and an empty outbox."""

    def __init__(self, connection: Connection, keys: Keys) -> None:
        self._connection, self._keys = connection, keys
        self._silent_since: dict[tuple[str, str, str], float] = {}

    async def run(self, gid: str) -> int:
        """Reissue what is lost of one group. Returns how many entries that were."""
        seen = await self._look(gid)
        if seen is None or seen.status not in OPEN or seen.open == 0 or seen.in_outbox:
            return 0
        # A closed group gets no entries, whatever its roles show: what a vanished worker ran is cancelled.
        answers = {role: ["CLEAR"] for role in seen.horizons}
        if seen.status == "active":
            answers = await self._probe(gid, seen)
        reissued = 0
        for role, answer in answers.items():
            reissued += await self._reissue(gid, role, seen.pages, answer)
            await relay(self._connection, self._keys, gid)
            # The next role waits until the pages of this one have arrived.
            seen = await self._look(gid)
            if seen is None or seen.in_outbox:
                break
        return reissued

    async def _look(self, gid: str) -> transitions.Look | None:
        (reply,) = await self._connection.run([transitions.look(self._keys, gid)])
        return transitions.look_reply(reply)

    async def _probe(self, gid: str, seen: transitions.Look) -> dict[str, list[str]]:
        """The roles that are clear up to the group's horizon, with their answers; none if all tasks are found."""
        begins = dict.fromkeys(seen.horizons, "")
        clear: dict[str, list[str]] = {role: ["MORE"] for role in begins}
        for _ in range(PROBES):
            calls = [
                transitions.probe(self._keys, role, gid, seen.horizons[role], begin) for role, begin in begins.items()
            ]
            replies = await self._connection.run(calls)
            for role, reply in zip(list(begins), replies, strict=True):
                word, begins[role], tids = transitions.probe_reply(reply)
                clear[role] = [word, *clear[role][1:], *tids]
                if word != "MORE":
                    del begins[role]
            if not begins:
                break
        clear = {role: answer for role, answer in clear.items() if answer[0] in ("CLEAR", "DUE")}
        shown = {tid for _, *tids in clear.values() for tid in tids}
        if len(clear) < len(seen.horizons) or len(shown) < seen.open:
            return clear
        # Entries of tasks that have ended may be among them, and hide no other.
        still = await queries.count_open(self._connection, self._keys, gid, shown)
        return clear if still < seen.open else {}

    async def _reissue(self, gid: str, role: str, pages: int, answer: list[str]) -> int:
        reissued, cursor = 0, "0"
        while True:
            call = transitions.scan(self._keys, gid, role, pages, cursor, answer)
            (reply,) = await self._connection.run([call])
            if reply[0] != "OK":
                return reissued
            _, _, cursor, running, entries = reply
            reissued += int(entries)
            claims = list(zip(running[::3], running[1::3], running[2::3], strict=True))
            lost = await self._lost(gid, role, claims)
            if lost:
                (ended,) = await self._connection.run([transitions.orphans(self._keys, gid, lost)])
                reissued += int(ended[2]) if ended[0] == "OK" else 0
            if cursor == "0":
                return reissued

    async def _lost(self, gid: str, role: str, claims: list[tuple[str, str, str]]) -> list[tuple[str, str]]:
        """
        Return the running tasks of `claims` (task, fence, worker) that no worker runs. A task is lost if its worker
        lives but holds no fence that old, or if its worker's heartbeat has been gone for a whole lease of the role.
        """
        if not claims:
            return []
        marks = await queries.low_marks(self._connection, self._keys, {worker for _, _, worker in claims}, role)
        lease_s = await queries.lease_s(self._connection, self._keys, role)
        now, lost = time.monotonic(), []
        for tid, fence, worker in claims:
            key, mark = (gid, tid, fence), marks[worker]
            if mark is not None:
                self._silent_since.pop(key, None)
                if int(fence) < mark:
                    lost.append((tid, fence))
            elif now - self._silent_since.setdefault(key, now) >= lease_s:
                del self._silent_since[key]
                lost.append((tid, fence))
        return lost

    def forget(self, gid: str) -> None:
        """Nothing of this group is open any more."""
        for key in [key for key in self._silent_since if key[0] == gid]:
            del self._silent_since[key]
