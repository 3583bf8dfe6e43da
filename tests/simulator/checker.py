"""The judge: compares raw Redis and the ledger with what is promised, and knows no script, only records."""

from __future__ import annotations

import collections
import json
from collections.abc import Iterator, Mapping
from fractions import Fraction
from typing import Any, NamedTuple

from rq_ceylon.store.codec import result_of, settled_of
from rq_ceylon.store.events import Event, event_of
from rq_ceylon.store.keys import INDEX_SHARDS, STREAMS, Keys
from rq_ceylon.views import COUNTERS

from .ledger import (
    Acknowledged,
    Buried,
    Cancelled,
    Committed,
    Delivered,
    Died,
    Granted,
    Ledger,
    Lost,
    Outage,
    Over,
    Parked,
    Plan,
    Released,
    Renewed,
    Reopened,
    Started,
)

SLACK_MS = 2.0
ENDS = ("completed", "failed", "cancelled")
PERMANENT = (":groups", ":roles", ":workers")


def violations(raw: Any, keys: Keys, ledger: Ledger) -> Iterator[str]:
    """Everything that is not as promised, in words. `raw` is a plain client; all work has ended."""
    yield from history(ledger)
    yield from records(raw, keys, ledger)


def records(raw: Any, keys: Keys, ledger: Ledger) -> Iterator[str]:
    """What is wrong in Redis."""
    for gid, tasks in ledger.accepted.items():
        yield from _group(raw, keys, gid, tasks, ledger)
    yield from _left(raw, keys, ledger)


class Touch(NamedTuple):
    """Who had a lease prolonged last, under which fence."""

    worker: str
    fence: int
    before: float


# ---- the ledger alone ------------------------------------------------------------------------------------------------
def history(ledger: Ledger) -> Iterator[str]:
    """What went wrong meanwhile."""
    touched: dict[tuple[str, str], Touch] = {}
    fences: dict[tuple[str, int], str] = {}
    grants: dict[tuple[str, str], list[Granted]] = collections.defaultdict(list)
    running: dict[tuple[str, str], Granted] = {}
    settled: set[tuple[str, str, int]] = set()
    ended: dict[tuple[str, str], str] = {}
    due: dict[tuple[str, str], float] = {}
    started: set[tuple[str, str, int]] = set()
    dead: set[str] = set()
    quiet_until = 0.0
    for record in ledger.records:
        match record:
            case Lost(gid):
                for known in (grants, ended, due):
                    for key in [key for key in known if key[0] == gid]:
                        del known[key]
            case Died(worker):
                dead.add(worker)
            case Buried(role, worker):
                for held in [held for held, touch in touched.items() if held[0] == role and touch.worker == worker]:
                    del touched[held]
            case Released(role, entry, worker):
                run, touch = running.get((role, entry)), touched.get((role, entry))
                if touch and touch.worker == worker:
                    is_its = run is not None and (run.worker, run.fence) == (worker, touch.fence)
                    if run and is_its and (run.gid, run.tid, run.fence) in started - settled:
                        yield f"gave back what it runs: {record}, {run}"
                    del touched[role, entry]
            case Outage(until):
                quiet_until = until
            case Renewed(role, entry, worker, before):
                touch = touched.get((role, entry))
                if touch and touch.worker != worker and not ledger.lossy:
                    yield f"renewed another's lease: {record}, was {touch}"
                touched[role, entry] = Touch(worker, touch.fence if touch else 0, before)
            case Acknowledged(role, entry, worker):
                run = running.get((role, entry))
                is_done = run is None or (run.gid, run.tid, run.fence) in settled or (run.gid, run.tid) in ended
                if run and not is_done and not ledger.lossy and run is grants[run.gid, run.tid][-1]:
                    yield f"acknowledged what is not over: {record}, {run}"
            case Delivered(role, entry, worker, fence, is_recovery, before, after):
                if (role, fence) in fences:
                    yield f"a fence was given twice: {record}"
                fences[role, fence] = worker
                touch = touched.get((role, entry))
                if touch and not is_recovery and not ledger.lossy:
                    if after - touch.before < ledger.lease_ms - SLACK_MS:
                        yield f"reclaimed inside the lease: {record}, was {touch}"
                    if after < quiet_until:
                        yield f"reclaimed within a lease after an outage: {record}"
                touched[role, entry] = Touch(worker, fence, before)
            case Granted(gid, tid, role, entry, worker, fence, after):
                task = gid, tid
                last = grants[task][-1] if grants[task] else None
                if last and last.fence == fence:
                    if last.worker != worker:
                        yield f"one fence was granted to two workers: {record}, was {last}"
                    continue
                if task in ended:
                    yield f"granted after its end ({ended[task]}): {record}"
                if not ledger.rings and after < due.pop(task, 0) - SLACK_MS:
                    yield f"granted before its delay was over: {record}"
                if last and not ledger.lossy:
                    if fence < last.fence:
                        yield f"granted with a smaller fence: {record}, was {last}"
                    touch = touched.get((last.role, last.entry))
                    is_held = touch is not None and (touch.worker, touch.fence) == (last.worker, last.fence)
                    is_live = last.worker not in dead and (*task, last.fence) not in settled
                    if touch and is_held and is_live and after - touch.before < ledger.lease_ms - SLACK_MS:
                        yield f"granted while another lease is valid: {record}, was {last}, {touch}"
                if not ledger.lossy and ledger.policies[gid] != "continue":
                    for need in ledger.plans[gid][tid].needs:
                        if ended.get((gid, need)) != "completed":
                            yield f"granted before {need}, which it needs: {record}"
                grants[task].append(record)
                running[role, entry] = record
            case Started(gid, tid, _, fence):
                if (gid, tid, fence) in started:
                    yield f"one grant was started twice: {record}"
                started.add((gid, tid, fence))
                if not any(grant.fence == fence for grant in grants[gid, tid]) and not ledger.lossy:
                    yield f"started without a grant: {record}"
            case Committed(gid, tid, _, fence, kind, verdict, not_before) if verdict == "OK":
                task = gid, tid
                if task in ended:
                    yield f"counted twice ({ended[task]}): {record}"
                if grants[task] and fence != grants[task][-1].fence:
                    yield f"a fence that is not the latest was accepted: {record}"
                if (gid, tid, fence) in settled and not ledger.lossy:
                    yield f"one grant was counted twice: {record}"
                settled.add((gid, tid, fence))
                if kind in ENDS:
                    ended[task] = kind
                due[task] = not_before
            case Committed(gid, tid, _, fence, _, "DONE"):
                settled.add((gid, tid, fence))
            case Parked(gid, tid):
                settled.update((gid, tid, grant.fence) for grant in grants[gid, tid])
            case Over(gid, tid):
                ended.setdefault((gid, tid), "over")
            case Reopened(gid, tid):
                if ended.pop((gid, tid), "") == "completed":
                    yield f"reopened although it has completed: {record}"
                due.pop((gid, tid), None)
                settled.update((gid, tid, grant.fence) for grant in grants[gid, tid])
            case Cancelled(gid, tid):
                if (gid, tid) in ended:
                    yield f"cancelled after its end ({ended[gid, tid]}): {record}"
                ended[gid, tid] = "cancelled"


# ---- one group -------------------------------------------------------------------------------------------------------
def _group(raw: Any, keys: Keys, gid: str, tasks: Mapping[str, Plan], ledger: Ledger) -> Iterator[str]:
    def part(name: str) -> str:
        return keys.group_part(gid, name)

    meta, payloads = raw.hgetall(part("meta")), set(raw.hkeys(part("tasks")))
    if not meta:
        yield f"{gid}: the group has vanished"
        return
    if meta["status"] != "finished":
        claims = {tid: raw.hget(part("claims"), tid) for tid in sorted(payloads)[:3]}
        counts = {name: meta.get(name) for name in ("waiting", "pending", "in_progress")}
        look = raw.zscore(keys.index_of(gid), gid)
        yield f"{gid}: not finished but {meta['status']}, next look {look}, {counts}, {claims}"
        return
    results = {tid: result_of(tid, text) for tid, text in raw.hgetall(part("results")).items()}
    recount = collections.Counter(result.status.value for result in results.values())
    recount["cancelled"] += len(payloads)  # what an ended group never started is cancelled
    lost, unknown = set(tasks) - set(results) - payloads, (set(results) | payloads) - set(tasks)
    twice = payloads & set(results)
    for words, tids in (("is lost", lost), ("was never accepted", unknown), ("is open and has a result", twice)):
        yield from (f"{gid}/{tid}: {words}" for tid in sorted(tids))
    counters = {name: int(meta.get(name, 0)) for name in COUNTERS}
    if counters != {name: recount[name] for name in COUNTERS} or int(meta["total"]) != len(tasks):
        yield f"{gid}: counters {counters} of {meta['total']}, recount {dict(recount)} of {len(tasks)}"
    events = [event_of(n, line) for n, line in enumerate(raw.lrange(part("events"), 0, -1), 1)]
    yield from _events(gid, events, {tid: result.status.value for tid, result in results.items()})
    yield from _goals(gid, meta, events, ledger)
    # Where a failed need counts as met, it may be reopened after what needs it has run.
    later = {task.tid for event in events for task in event.tasks if task.outcome == "reopened"}
    later = later if ledger.policies[gid] == "continue" else set()
    for tid, result in results.items():
        if result.started_ms is None or tid not in tasks:
            continue
        needed = [results.get(need) for need in tasks[tid].needs if need not in later]
        if any(need is None or (need.ended_ms or 0) > result.started_ms for need in needed):
            yield f"{gid}/{tid}: started before what it needs had ended"
        if ledger.policies[gid] != "continue" and any(need and need.status != "completed" for need in needed):
            yield f"{gid}/{tid}: ran although it needs one that did not complete"
    last = {(r.gid, r.tid): r.kind for r in ledger.records if isinstance(r, Committed) and r.verdict == "OK"}
    for tid, result in results.items():
        kind = last.get((gid, tid))
        if kind == "completed" and result.status != "completed" and not ledger.lossy:
            yield f"{gid}/{tid}: its success was acknowledged, but {result.status} is on record"
    if raw.zscore(keys.index_of(gid), gid) is None:
        yield f"{gid}: not in the index"
    for one in json.loads(meta.get("then", "[]")):
        achieved = meta.get("goal:" + one["when"].partition(":")[2], "").startswith("achieved|")
        if (achieved or one["when"] in (meta["outcome"], "finished")) and one["gid"] not in ledger.accepted:
            yield f"{gid}: what follows it when {one['when']} was never submitted"


def _events(gid: str, events: list[Event], ends: Mapping[str, str]) -> Iterator[str]:
    told: dict[str, str] = {}
    statuses: list[str] = []
    for event in events:
        for task in event.tasks:
            if task.outcome == "reopened":
                if told.pop(task.tid, "completed") == "completed":
                    yield f"{gid}/{task.tid}: reopened although it was open or had completed"
            elif task.outcome in ENDS:
                if task.tid in told:
                    yield f"{gid}/{task.tid}: ended in two events"
                told[task.tid] = task.outcome
        if event.status == "active" and event.kind == "reopen":
            statuses.clear()
        elif event.status not in ("", "active", "paused"):
            statuses.append(event.status)
    if told != ends:
        yield f"{gid}: events tell other ends than the results: {sorted(told.items() ^ ends.items())[:4]}"
    if len(statuses) != len(set(statuses)) or statuses[-1:] != ["finished"]:
        yield f"{gid}: went through {statuses}"


def _goals(gid: str, meta: Mapping[str, str], events: list[Event], ledger: Ledger) -> Iterator[str]:
    total, is_open = int(meta["total"]), "open_timeout" in meta  # how many tasks it had meanwhile is not told
    counts = [collections.Counter[str]()]
    ends: dict[str, str] = {}
    unjudged: set[int] = set()  # events behind which a retry was not complete
    for event in events:
        ends |= {task.tid: task.outcome for task in event.tasks if task.outcome in ENDS}
        again = {task.tid for task in event.tasks if task.outcome == "reopened"}
        ends = {tid: end for tid, end in ends.items() if tid not in again}
        counts.append(collections.Counter(ends.values()))
        if again or (event.seq - 1 in unjudged and event.kind not in ("reopen", "cancel")):
            unjudged.add(event.seq)
    for name, (when, fail_when, has_deadline, is_callable) in ledger.goals.get(gid, {}).items():
        told: list[tuple[int, str]] = []
        for seq, status in [(event.seq, status) for event in events for goal, status in event.goals if goal == name]:
            if status != "in_progress":
                told.append((seq, status))
            elif [status for _, status in told] == ["failed"]:
                told.clear()
            else:
                yield f"{gid}: goal {name} is unsettled by event {seq}, though it had settled as {told}"
        text = meta.get(f"goal:{name}")
        if len(told) != 1 or text is None:
            yield f"{gid}: goal {name} settled {len(told)} times: {told}, {text}"
            continue
        status, record = settled_of(text)
        since = max((e.seq for e in events[: record.seq] if e.kind == "reopen" and e.status == "active"), default=0)
        closed = [event.seq for event in events if event.seq > since and event.status in ("closing", "finished")]
        closed_at = min(closed, default=len(events) + 1)
        if (record.seq, status.value) != told[0]:
            yield f"{gid}: goal {name} is {text}, its event tells {told[0]}"
        if is_callable or is_open:
            continue
        if record.by == "deadline":
            if not has_deadline or status != "failed":
                yield f"{gid}: goal {name} settled by a deadline it does not have: {text}"
            continue
        now = {name: getattr(record.counters, name) for name in ENDS}
        if record.seq < closed_at and any(now[end] != counts[record.seq][end] for end in ENDS):
            yield f"{gid}: goal {name} settled at {now}, events count {dict(counts[record.seq])}"
        failing = fail_when and certain(fail_when, now, total)
        truth = "failed" if failing else {True: "achieved", False: "failed"}.get(certain(when, now, total))  # type: ignore[arg-type]
        if truth is None and record.seq >= closed_at:  # in a closed group nothing can fail any more
            truth = {True: "achieved", False: "failed"}.get(certain(when, now, total, may_fail=False))  # type: ignore[arg-type]
        if truth != status.value:
            yield f"{gid}: goal {name} ({when}) {status.value} at {now} of {total}, should be {truth}"
        # Goals are looked at from the group's start on; one that waited for others starts late.
        judged = record.seq - 1 not in unjudged
        if judged and record.seq <= closed_at and any(event.status == "active" for event in events[: record.seq - 1]):
            early = counts[record.seq - 1]
            if certain(when, early, total) is not None or (fail_when and certain(fail_when, early, total)):
                yield f"{gid}: goal {name} ({when}) was certain before event {record.seq}, at {dict(early)} of {total}"


def certain(when: str, now: Mapping[str, int], total: int, *, may_fail: bool = True) -> bool | None:
    """Whether `counter sign number[%] [and …]` holds for every, no, or some end of the open tasks."""
    left = total - sum(now.get(name, 0) for name in ENDS)
    seen = set()
    for completed in range(left + 1):
        for failed in range(left - completed + 1 if may_fail else 1):
            added = {"completed": completed, "failed": failed, "cancelled": left - completed - failed}
            seen.add(
                all(
                    _holds(one, {name: now.get(name, 0) + added[name] for name in ENDS}, total)
                    for one in when.split(" and ")
                )
            )
            if len(seen) == 2:
                return None
    return seen.pop()


def _holds(comparison: str, counts: Mapping[str, int], total: int) -> bool:
    counter, sign, number = comparison.split()
    bound = Fraction(number.rstrip("%")) * (Fraction(total, 100) if number.endswith("%") else 1)
    value = counts[counter]
    return {">=": value >= bound, "<=": value <= bound, ">": value > bound, "<": value < bound}[sign]


# ---- what must be gone -----------------------------------------------------------------------------------------------
def _left(raw: Any, keys: Keys, ledger: Ledger) -> Iterator[str]:
    for role in {plan.role for tasks in ledger.accepted.values() for plan in tasks.values()}:
        for stream in STREAMS:
            key = keys.role_part(role, stream)
            if raw.exists(key):
                pending = raw.xpending_range(key, "workers", "-", "+", 2)
                if raw.xlen(key) or pending:
                    yield f"{key}: {raw.xlen(key)} entries are left: {raw.xrange(key, count=2)}, pending: {pending}"
        if raw.zcard(keys.role_part(role, "delayed")):
            yield f"{role}: delayed entries are left"
        if raw.zcard(keys.role_part(role, "by_name")):
            yield f"{role}: tasks that wait by their name are left"
        if raw.xlen(keys.role_part(role, "quarantine")):
            yield f"{role}: an entry was malformed"
    indexed = {gid for shard in range(INDEX_SHARDS) for gid in raw.zrange(keys.index(shard), 0, -1)}
    for key in raw.scan_iter(f"{keys.prefix}*", count=1000):
        gid = key.partition("{g:")[2].partition("}")[0]
        if gid and gid not in ledger.accepted:
            status = raw.hget(keys.group_part(gid, "meta"), "status")
            if status != "staging" or gid not in indexed:
                yield f"{key}: of a group that was never accepted"
        elif key.endswith(":outbox"):
            yield f"{key}: pages are left: {raw.zrange(key, 0, 2)}"
        elif raw.pttl(key) == -1 and "{r:" not in key and not key.endswith(PERMANENT):
            yield f"{key}: has no TTL"
