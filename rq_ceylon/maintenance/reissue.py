"""
Reissues entries that Redis itself lost, as when it restarts with an old file and a role's streams go back in time.

How this knows that an entry is lost:

- The group knows its open tasks and, for each role, the *horizon*: the largest entry or due time (ms) that an
  acknowledged page of the group reached there. Only up to it can one tell what is lost.
- A *probe* of the role tells which tasks of the group it can still deliver, and whether it is clear: whether it has no
  others up to the horizon.
- A task that is open, and that a clear role does not show, has lost its entry. If it is pending, `scan` writes a page
  with a new entry for it.
- A task in progress needs no entry while a worker runs it. It is an orphan if no worker does (see `Reissue._lost`);
  then `orphans` writes a page whose entry supersedes the fence on record.

All this only ever makes an entry too many: the claim answers a false alarm.
"""

from __future__ import annotations

import time

from rq_ceylon.maintenance.relay import relay
from rq_ceylon.store import queries, transitions
from rq_ceylon.store.connection import Connection
from rq_ceylon.store.keys import Keys

OPEN = ("active", "closing")

PROBES = 100
"""How often a role is probed in one look: enough for 50,000 entries that are delivered or wait by name."""


class Reissue:
    """
    Looks at groups with open tasks and an empty outbox, for one process.

    Its only state is `_silent_since`: for a task in progress (group, task, fence), since when this process has seen no
    heartbeat of its worker, in monotonic seconds.
    """

    def __init__(self, connection: Connection, keys: Keys) -> None:
        self._connection, self._keys = connection, keys
        self._silent_since: dict[tuple[str, str, str], float] = {}

    async def run(self, gid: str) -> int:
        """Reissue the lost entries of one group. Returns how many were made again."""
        seen = await self._look(gid)
        # While the outbox holds pages, an entry that a role does not show may be under way.
        if seen is None or seen.status not in OPEN or seen.open == 0 or seen.in_outbox:
            return 0
        # In a closing group no task starts, so no role need be probed. Only orphans matter: their tasks are cancelled,
        # so that the group finishes.
        answers = {role: ["CLEAR"] for role in seen.horizons}
        if seen.status == "active":
            answers = await self._probe(gid, seen)
        reissued = 0
        for role, answer in answers.items():
            reissued += await self._reissue(gid, role, seen.pages, answer)
            await relay(self._connection, self._keys, gid)
            # The pages of this role must have arrived before the next role is looked at, and the scan must be told the
            # number of the last page, or it answers MOVED.
            seen = await self._look(gid)
            if seen is None or seen.in_outbox:
                break
        return reissued

    async def _look(self, gid: str) -> transitions.Look | None:
        (reply,) = await self._connection.run([transitions.look(self._keys, gid)])
        return transitions.look_reply(reply)

    async def _probe(self, gid: str, seen: transitions.Look) -> dict[str, list[str]]:
        """The roles that are clear up to the group's horizon, with their answers; none if they show all open tasks."""
        begins = dict.fromkeys(seen.horizons, "")
        clear: dict[str, list[str]] = {role: ["MORE"] for role in begins}
        for _ in range(PROBES):
            calls = [
                transitions.probe(self._keys, role, gid, seen.horizons[role], begin) for role, begin in begins.items()
            ]
            replies = await self._connection.run(calls)
            for role, reply in zip(list(begins), replies, strict=True):
                word, begins[role], tids = transitions.probe_reply(reply)
                clear[role] = [word, *clear[role][1:], *tids]  # the last word, and the tasks of all answers so far
                if word != "MORE":
                    del begins[role]
            if not begins:
                break
        # Of a role that answers BUSY, or still MORE, nothing can be said in this look.
        clear = {role: answer for role, answer in clear.items() if answer[0] in ("CLEAR", "DUE")}
        shown = {tid for _, *tids in clear.values() for tid in tids}
        if len(clear) < len(seen.horizons) or len(shown) < seen.open:
            return clear
        # Among the tasks shown, some may have ended. They must not stand in for an open one that is lost.
        still = await queries.count_open(self._connection, self._keys, gid, shown)
        return clear if still < seen.open else {}

    async def _reissue(self, gid: str, role: str, pages: int, answer: list[str]) -> int:
        reissued, cursor = 0, "0"
        while True:
            call = transitions.scan(self._keys, gid, role, pages, cursor, answer)
            (reply,) = await self._connection.run([call])
            if reply[0] != "OK":  # MOVED: the group changed since the look, so what was seen does not hold any more
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
        The orphans among tasks in progress (task, fence, worker): those that no worker runs.

        A task is an orphan if its worker lives and its fence is below the worker's low mark, so that the worker does
        not hold it. It is one too if this process has seen no heartbeat of its worker for a whole lease of the role:
        a lease that its worker does not renew is over by then.
        """
        if not claims:
            return []
        marks = await queries.low_marks(self._connection, self._keys, {worker for _, _, worker in claims}, role)
        lease_s = await queries.lease_s(self._connection, self._keys, role)
        now, lost = time.monotonic(), []
        for tid, fence, worker in claims:
            key, mark = (gid, tid, fence), marks[worker]
            if mark is not None:  # the worker lives
                self._silent_since.pop(key, None)
                if int(fence) < mark:
                    lost.append((tid, fence))
            elif now - self._silent_since.setdefault(key, now) >= lease_s:
                del self._silent_since[key]
                lost.append((tid, fence))
        return lost

    def forget(self, gid: str) -> None:
        """Forget since when workers of this group's tasks are silent: nothing of it is reissued now."""
        for key in [key for key in self._silent_since if key[0] == gid]:
            del self._silent_since[key]
