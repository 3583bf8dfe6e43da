"""
Recounts groups from their records, and compares the result with their counters and events.

A group is read in parts while work goes on, so the records count only if the group did not change meanwhile. A group
that keeps changing is listed as moving, and is not judged.
"""

from __future__ import annotations

import collections
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

from rq_ceylon.errors import RecordError
from rq_ceylon.models import GroupStatus, TaskStatus
from rq_ceylon.store import queries, transitions
from rq_ceylon.store.codec import reading
from rq_ceylon.store.connection import Connection
from rq_ceylon.store.keys import Keys
from rq_ceylon.store.scripts import command
from rq_ceylon.views import COUNTERS

READS = 5
"""How often a group is read, at most, until it does not change during a read."""


@dataclass(frozen=True, slots=True)
class Drift:
    """
    One difference between a group and its records.

    Attributes:
        task: the id of the task; empty if the difference concerns the group.
        what: what is wrong; for a counter, its name.
        found: the value that was found.
        expected: the value that the records call for.
        repaired: whether the difference was repaired.
    """

    group: str
    task: str
    what: str
    found: str
    expected: str
    repaired: bool = False

    def __str__(self) -> str:
        where = f"{self.group}/{self.task}" if self.task else self.group
        return f"{where}: {self.what} is {self.found}, should be {self.expected}" + (
            " (repaired)" if self.repaired else ""
        )


@dataclass(slots=True)
class Audit:
    """The result of an audit. `moving` are groups that changed too fast to be judged."""

    groups: int = 0
    tasks: int = 0
    moving: list[str] = field(default_factory=list)
    drift: list[Drift] = field(default_factory=list)


@dataclass(frozen=True, slots=True)
class _Records:
    meta: Mapping[str, str]
    tasks: frozenset[str]
    results: Mapping[str, str]
    claims: Mapping[str, str]
    needs: Mapping[str, str]
    children: Mapping[str, str]
    tried: frozenset[str]
    has_internal_pages: bool
    ends: Mapping[str, Sequence[str]]

    @property
    def recount(self) -> dict[str, int]:
        counts: collections.Counter[str] = collections.Counter(self.results.values())
        closed = self.meta["status"] in (GroupStatus.CLOSING, GroupStatus.FINISHED)
        for tid in self.tasks - self.results.keys():
            if self.claims.get(tid, "-") in queries.RUNNING:
                counts["in_progress"] += 1
            elif closed:
                counts["cancelled"] += 1
            else:
                counts["waiting" if tid in self.needs else "pending"] += 1
        return {"total": len(self.tasks | self.results.keys()), **{name: counts[name] for name in COUNTERS}}


async def audit(connection: Connection, keys: Keys, gids: Sequence[str] = (), *, repair: bool = False) -> Audit:
    """
    Recount groups; all by default.

    Args:
        repair: set counters to the recount, remove leftovers of tasks that have ended, and put lost groups back into
            the index. Counters and leftovers are only changed if the counters have not changed since the recount.

    Raises:
        NotFoundError: there is no group with one of the ids in `gids`.
    """
    found = Audit()
    indexed = set(await queries.group_ids(connection, keys))
    for gid in gids:
        await queries.group(connection, keys, gid)
    stored = set() if gids else {gid async for some in queries.stored_groups(connection, keys) for gid in some}
    for gid in gids or sorted(indexed | stored):
        try:
            with reading(f"group {gid!r}"):
                records = await _steady(connection, keys, gid)
                drift = _drift(gid, records) if records and records.meta else []
        except RecordError as error:
            found.drift.append(Drift(gid, "", "record", str(error), "one that can be read"))
            continue
        if records is None:
            found.moving.append(gid)
            continue
        if not records.meta:
            continue
        found.groups += 1
        found.tasks += records.recount["total"]
        if gid not in indexed:
            drift.append(Drift(gid, "", "index", "without it", "with it"))
        found.drift += await _repair(connection, keys, gid, records, drift) if repair and drift else drift
    return found


# ---- reading ---------------------------------------------------------------------------------------------------------
async def _steady(connection: Connection, keys: Keys, gid: str) -> _Records | None:
    before = await _meta(connection, keys, gid)
    for _ in range(READS):
        records = await _read(connection, keys, gid, before)
        after = await _meta(connection, keys, gid)
        # Every state change also changes a counter that never goes back: attempts, pages, or an end.
        if after == before:
            return records
        before = after
    return None


async def _meta(connection: Connection, keys: Keys, gid: str) -> dict[str, str]:
    (reply,) = await connection.run([command("HGETALL", keys.group_part(gid, "meta"))])
    return dict(reply)


async def _read(connection: Connection, keys: Keys, gid: str, meta: Mapping[str, str]) -> _Records:
    async def part(name: str) -> dict[str, str]:
        """The fields of a hash, each with its text up to the first bar."""
        found: dict[str, str] = {}
        async for some in queries.scan(connection, keys.group_part(gid, name)):
            found |= {tid: text.partition("|")[0] for tid, text in some.items()}
        return found

    ends: dict[str, list[str]] = collections.defaultdict(list)
    async for batch in queries.new_events(connection, keys, gid, 0):
        for event in batch:
            for task in event.tasks:
                if task.is_end:
                    ends[task.tid].append(task.outcome)
                elif task.outcome == "reopened":
                    ends[task.tid].clear()
    (pages,) = await connection.run([command("ZRANGE", keys.group_part(gid, "outbox"), 0, -1)])
    return _Records(
        meta=meta,
        tasks=frozenset(await part("tasks")),
        results=await part("results"),
        claims=await part("claims"),
        needs=await part("needs"),
        children=await part("children"),
        tried=frozenset(field.partition(" ")[0] for field in await part("errors")),
        has_internal_pages=any("|#" in page for page in pages),
        ends=ends,
    )


# ---- judging ---------------------------------------------------------------------------------------------------------
def _drift(gid: str, records: _Records) -> list[Drift]:
    found = [
        Drift(gid, "", name, records.meta.get(name, "0"), str(count))
        for name, count in records.recount.items()
        if int(records.meta.get(name) or 0) != count
    ]
    for tid in sorted(records.tasks & records.results.keys()):
        found.append(Drift(gid, tid, "payload", "there", "gone: the task has ended"))
    for name, hash_ in (("claim", records.claims), ("needs", records.needs)):
        for tid in sorted(hash_.keys() - records.tasks):
            found.append(Drift(gid, tid, name, "there", "gone: the task has ended"))
    for tid in sorted(records.tried):
        if records.results.get(tid) == TaskStatus.COMPLETED:
            found.append(Drift(gid, tid, "errors of its attempts", "there", "gone: the task has completed"))
    for tid in sorted(records.results.keys() | records.ends.keys()):
        told, recorded = records.ends.get(tid, []), records.results.get(tid)
        if told != [recorded] and (told or recorded):
            found.append(Drift(gid, tid, "end", ", ".join(told) or "untold by events", recorded or "none on record"))
    # An internal page stands for dependents that were not visited yet, so until it is done the counts may differ.
    if not records.has_internal_pages:
        parents = collections.Counter(tid for text in records.children.values() for tid in text.split())
        for tid in sorted(records.needs.keys() & records.tasks):
            if int(records.needs[tid]) != parents[tid]:
                found.append(Drift(gid, tid, "count of unmet needs", records.needs[tid], str(parents[tid])))
    return found


# ---- repairing -------------------------------------------------------------------------------------------------------
async def _repair(
    connection: Connection, keys: Keys, gid: str, records: _Records, drift: Sequence[Drift]
) -> list[Drift]:
    leftovers = sorted({one.task for one in drift if one.expected.startswith("gone")})
    counters = {name: (int(records.meta.get(name) or 0), count) for name, count in records.recount.items()}
    call = transitions.repair(keys, gid, counters, leftovers)
    (reply,) = await connection.run([call])
    if any(one.what == "index" for one in drift):
        await connection.run(transitions.announce(keys, gid, ()))
    done = reply[0] == "OK"
    certain = {*records.recount, "payload", "claim", "needs", "errors of its attempts"}
    return [replace(one, repaired=one.what == "index" or (done and one.what in certain)) for one in drift]
