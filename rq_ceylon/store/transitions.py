"""
Every state change as a call to its script, and what the script answers. The only writer.

Nothing here does I/O: a function returns a `Call`, its `…_reply` reads what came back. What each script promises stands
in the head of its Lua file.
"""

from __future__ import annotations

import random
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple, TypeVar

from rq_ceylon.goals import CompiledGoal
from rq_ceylon.models import Durability
from rq_ceylon.store.codec import encode
from rq_ceylon.store.durability import confirming
from rq_ceylon.store.histogram import bucket_of
from rq_ceylon.store.keys import Keys
from rq_ceylon.store.scripts import Call, command, insist

RELAY_LEASE_MS = 10_000
"""How long a page of the outbox is left to whoever got it in a reply, before a relay hands it over."""

UNROUTABLE_MS = 3_600_000
"""How long tasks wait for a worker that knows the name of their function before they fail as unroutable."""

SUBMIT_TASKS_MAX = 500
SUBMIT_BYTES_MAX = 4 * 1024 * 1024
CLAIM_TASKS_MAX = 500
COMMIT_TASKS_MAX = 500

T = TypeVar("T")

PROBE_ENTRIES = 500
SCAN_TASKS = 500


def in_batches(items: Iterable[T], size: Callable[[T], int], most: int) -> Iterator[list[T]]:
    """At least one batch, perhaps an empty one; each of at most so many items and, but for a single one, 4 MiB."""
    batch: list[T] = []
    total = 0
    for item in items:
        length = size(item)
        if batch and (len(batch) == most or total + length > SUBMIT_BYTES_MAX):
            yield batch
            batch, total = [], 0
        batch.append(item)
        total += length
    yield batch


# ---- outbox pages ----------------------------------------------------------------------------------------------------
@dataclass(frozen=True, slots=True)
class Page:
    """An outbox page: entries to enqueue in one role, or a message to a group that depends on this one."""

    gid: str
    text: str

    @property
    def role(self) -> str:
        return self.text.split("|", 2)[1]

    @property
    def due(self) -> str:
        return self.text.split("|", 3)[2]

    @property
    def is_message(self) -> bool:
        return self.role == "@"


class PageAck(NamedTuple):
    """A page that has arrived, and the largest entry or due ms that it got in its role."""

    page: Page
    horizon: str = "0"


def deliver(keys: Keys, page: Page) -> Call:
    """The call that takes a message to its group."""
    _, _, outcome, gid = page.text.split("|")
    return met(keys, gid, page.gid, outcome)


def _acks(acks: Sequence[PageAck]) -> list[Any]:
    args: list[Any] = [len(acks)]
    for page, horizon in acks:
        args += (page.text, page.role, horizon)
    return args


def enqueue(
    keys: Keys,
    role: str,
    pages: Sequence[Page],
    *,
    insist: bool = True,
    names: Mapping[tuple[str, str], str] | None = None,
) -> Call:
    """
    Hand pages to their role; at `maxmemory` too, unless told not to insist.

    Args:
        names: tasks (group, task) that are to wait by the name of their function for a worker that knows it and has
            room for it, and this name.
    """
    args: list[Any] = [int(insist)]
    for page in pages:
        _, _, due, items = page.text.split("|", 3)
        if names:
            items = " ".join(_with_name(item, page.gid, names) for item in items.split(" "))
        args += (page.gid, due, items)
    return Call("enqueue", keys.role(role), args)


def _with_name(item: str, gid: str, names: Mapping[tuple[str, str], str]) -> str:
    priority, tid, issue, *supersedes = item.split(",")
    name = names.get((gid, tid))
    return item if name is None else ",".join((priority, tid, issue, *(supersedes or [""]), name))


def outbox(keys: Keys, gid: str, *, wanted: int = 0, again: bool = False, acks: Sequence[PageAck] = ()) -> Call:
    """
    Args:
        again: also what was handed out before and is not acknowledged, since the answer that had it may be lost. What
            is with somebody else arrives twice, which the claim settles.
    """
    return Call("outbox", keys.group(gid), [wanted, int(again), RELAY_LEASE_MS, *_acks(acks)])


@dataclass(frozen=True, slots=True)
class OutboxReply:
    """`status` is None if the group is gone; `next_deadline_ms` is 0 if no goal has one; `more`: call again at once."""

    status: str | None
    next_deadline_ms: int = 0
    pages: Sequence[Page] = ()
    more: bool = False


def outbox_reply(gid: str, reply: list[Any]) -> OutboxReply:
    if reply[0] == "GONE":
        return OutboxReply(None)
    return OutboxReply(reply[1], int(reply[2]), [Page(gid, text) for text in reply[3]], reply[4] == "1")


# ---- submit ----------------------------------------------------------------------------------------------------------
class StagedTask(NamedTuple):
    """
    A task ready for submission: its id, its text (see `codec.task_text`), the ids it needs, and the text by which the
    same submission is known again, if that is another.
    """

    tid: str
    text: bytes
    needs: Sequence[str] = ()
    known: bytes = b""

    @property
    def size(self) -> int:
        return len(self.tid) + len(self.text) + sum(map(len, self.needs)) + 16


@dataclass(frozen=True, slots=True)
class GroupFacts:
    """
    What is stored once for a group.

    Attributes:
        defaults: what most tasks share, JSON; handed to the worker with every claim.
        retention_ms: how long the finished group is kept.
        depends_on: ids of groups that must complete before this one starts.
        on_need_failed: what becomes of a task that needs one that did not complete: skip, fail or continue.
    """

    name: str
    retention_ms: int
    key: str = ""
    depends_on: Sequence[str] = ()
    on_need_failed: str = "skip"
    description: str = ""
    defaults: Mapping[str, Any] = field(default_factory=dict)
    goals: Sequence[CompiledGoal] = ()

    def meta(self) -> list[Any]:
        fields: dict[str, Any] = {"name": self.name, "retention": self.retention_ms}
        if self.key:
            fields["key"] = self.key
        if self.description:
            fields["description"] = self.description
        if self.on_need_failed != "skip":
            fields["on_need_failed"] = self.on_need_failed
        if self.defaults:
            fields["defaults"] = encode(self.defaults)
        if self.goals:
            fields["specs"] = encode([goal.to_json() for goal in self.goals])
            fields["goals_total"] = len(self.goals)
        return [word for pair in fields.items() for word in pair]

    def programs(self) -> str:
        return ";".join(
            f"{goal.name}|{goal.on_achieved}|{goal.on_failed}|{goal.deadline_ms}|{goal.program}|{goal.fail_program}"
            for goal in self.goals
        )


def submit(
    keys: Keys,
    gid: str,
    facts: GroupFacts,
    tasks: Iterable[StagedTask],
    *,
    part: int,
    last: bool,
    digest: str,
    rolling: bool = False,
    acks: Sequence[PageAck] = (),
) -> Call:
    meta = facts.meta() if part == 1 else []
    args: list[Any] = [part, int(last), int(rolling), digest, RELAY_LEASE_MS, *_acks(acks)]
    args += (len(meta), *meta, facts.programs() if last else "", " ".join(facts.depends_on) if last else "")
    for task in tasks:
        args += (task.tid, task.text, " ".join(task.needs))
    return Call("submit", keys.group(gid), args)


@dataclass(frozen=True, slots=True)
class SubmitReply:
    """
    `word`: OK, REPEAT, GAP, CLOSED, EXISTS or REFUSED. `detail`: the group's status; for REFUSED what was wrong (goal,
    duplicate, unknown need), and `name` says with which.
    """

    word: str
    detail: str = ""
    name: str = ""
    pages: Sequence[Page] = ()


def submit_reply(gid: str, reply: list[Any]) -> SubmitReply:
    word, *rest = reply
    if word == "OK":
        return SubmitReply(word, rest[0], pages=[Page(gid, text) for text in rest[1]])
    return SubmitReply(word, *rest)


ANNOUNCED_BELOW = 1
"""A group whose score in the index is smaller was announced, and not looked at since."""


def announce(
    keys: Keys, gid: str, roles: Iterable[str], *, durability: Durability = "none", insisting: bool = False
) -> list[Call]:
    """
    Enter a group in the index, due at once, and its roles; to be sent before the group is written, so that
    maintenance finds whatever follows.

    Args:
        durability: of the entry in the index, which then gets a score of its own below `ANNOUNCED_BELOW` whether or not
            it is there, since a confirmation waits for a write, and the same score again is none.
        insisting: at the memory limit too.
    """
    write = insist if insisting else command
    due = ("NX", 0) if durability == "none" else (f"{random.random():.9f}",)
    calls = [confirming(write("ZADD", keys.index_of(gid), *due, gid), durability)]
    roles = sorted(roles)
    if roles:
        calls.append(write("SADD", keys.roles, *roles))
    return calls


# ---- claim, commit ---------------------------------------------------------------------------------------------------
class Delivery(NamedTuple):
    """One entry as `fetch` gave it, with the fence that names this delivery."""

    role: str
    entry: str
    gid: str
    tid: str
    issue: str
    lineage: str
    fence: int
    supersedes: str = "-"


Verdict = Literal["GRANTED", "DONE", "GONE", "DUPLICATE", "LOST", "OUTDATED", "NOTREADY", "CLOSED", "PARKED", "LATER"]

SUSPECT_CRASHES = 2
"""A task whose worker died under it so often starts only where no other such task runs."""


class Claimed(NamedTuple):
    """
    The answer for one delivery. `attempt` to `task`, the stored text, are set if it is GRANTED; `reason` and `words`,
    why the task ended, if it is DONE by this very claim: it will never run, and no other worker is told.
    """

    verdict: Verdict
    attempt: int = 1
    crashes: int = 0
    releases: int = 0
    task: str = ""
    reason: str = ""
    words: str = ""


@dataclass(frozen=True, slots=True)
class ClaimReply:
    """`defaults` is the group's JSON; `stop`: what runs of this group should be stopped."""

    answers: Sequence[Claimed]
    defaults: str = ""
    stop: bool = False


def claim(keys: Keys, gid: str, worker: str, deliveries: Sequence[Delivery], *, suspect: bool = True) -> Call:
    """
    Args:
        suspect: whether a suspect may start; see `SUSPECT_CRASHES`.
    """
    asked = (f"{d.tid} {d.issue} {d.lineage} {d.fence} {d.supersedes}" for d in deliveries)
    return Call("claim", keys.group(gid), [worker, int(suspect), *asked])


def claim_reply(reply: list[Any], asked: int) -> ClaimReply:
    if reply[0] == "GONE":
        return ClaimReply([Claimed("GONE")] * asked)
    answers, flat = [], reply[4]
    for i in range(0, len(flat), 3):
        if flat[i] == "GRANTED":
            attempt, crashes, releases = flat[i + 1].split(" ")
            answers.append(Claimed("GRANTED", int(attempt), int(crashes), int(releases), flat[i + 2]))
        else:
            answers.append(Claimed(flat[i], reason=flat[i + 1], words=flat[i + 2]))
    return ClaimReply(answers, reply[2], reply[3] == "1")


class Committed(NamedTuple):
    """
    The outcome of one delivery, to be recorded. `kind`: completed, failed, retry, release, stopped, or stopping: not an
    end yet, but its worker was told to stop, so that losing it now is no crash.
    """

    tid: str
    fence: int
    kind: str
    reason: str
    delay_ms: int
    run_ms: int
    blob: bytes


@dataclass(frozen=True, slots=True)
class CommitReply:
    verdicts: Sequence[Literal["OK", "DONE", "STALE"]]
    pages: Sequence[Page] = ()
    more: bool = False


def commit(
    keys: Keys,
    gid: str,
    worker: str,
    outcomes: Sequence[Committed],
    acks: Sequence[PageAck] = (),
    *,
    relay_lease_ms: int | None = None,
) -> Call:
    """
    Args:
        relay_lease_ms: how long the pages in the reply are left to the caller, which hands them over; if not given, as
            long as a page of any other reply.
    """
    args: list[Any] = [worker, RELAY_LEASE_MS if relay_lease_ms is None else relay_lease_ms, *_acks(acks)]
    for o in outcomes:
        args += (f"{o.tid} {o.fence} {o.kind} {o.reason or '-'} {o.delay_ms} {o.run_ms}", o.blob)
    return Call("commit", keys.group(gid), args)


def commit_reply(gid: str, reply: list[Any], asked: int) -> CommitReply:
    if reply[0] == "GONE":
        return CommitReply(["DONE"] * asked)
    return CommitReply(reply[2], [Page(gid, text) for text in reply[3]], reply[4] == "1")


# ---- fetch, renew, release -------------------------------------------------------------------------------------------
class Ack(NamedTuple):
    """An entry that is done with: how, and for statistics how long its task ran and had waited."""

    entry: str
    outcome: str
    run_ms: int = 0
    wait_ms: int = 0


def fetch(
    keys: Keys,
    role: str,
    worker: str,
    *,
    budget: int,
    lease_ms: int,
    acks: Iterable[Ack] = (),
    recover: Sequence[str] | None = None,
    names: Mapping[str, int] | None = None,
) -> Call:
    """
    Args:
        budget: entries wanted; 0 to acknowledge only.
        recover: entries that this worker holds; given after a `fetch` that was not answered, None otherwise.
        names: those that tasks wait for, as a reply told, and that this worker knows; for each, how many it takes.
    """
    args: list[Any] = [worker, budget, lease_ms, "read" if recover is None else "recover", UNROUTABLE_MS]
    known = [f"{count} {name}" for name, count in (names or {}).items()]
    args += (len(recover or ()), *(recover or ()), len(known), *known)
    by_outcome: dict[str, list[Ack]] = defaultdict(list)
    for ack in acks:
        by_outcome[ack.outcome].append(ack)
    for outcome, some in by_outcome.items():
        histograms: Counter[str] = Counter()
        for ack in some if outcome in ("completed", "failed") else ():
            for name, ms in (("run", ack.run_ms), ("wait", ack.wait_ms)):
                histograms[f"{name}_times:{bucket_of(ms)}"] += 1
                histograms[f"{name}_ms"] += ms
        args += (outcome, len(some), *(ack.entry for ack in some))
        args += (len(histograms), *(word for pair in histograms.items() for word in pair))
    return Call("fetch", keys.role(role), args)


@dataclass(frozen=True, slots=True)
class FetchReply:
    """
    Attributes:
        lease_ms: the lease in force, which is the role's.
        next_due_ms: until the next delayed entry is due; None if there is none.
        names: some of the names by which tasks wait for a worker that knows them and has room for them.
    """

    lease_ms: int
    next_due_ms: int | None
    deliveries: Sequence[Delivery]
    names: Sequence[str] = ()


def fetch_reply(role: str, reply: list[Any]) -> FetchReply:
    deliveries, flat = [], reply[2]
    for i in range(0, len(flat), 3):
        entry = flat[i]
        gid, tid, issue, *more = flat[i + 1].split(" ")
        lineage = more[0] if more and more[0] != "-" else entry
        supersedes = more[1] if len(more) > 1 else "-"
        deliveries.append(Delivery(role, entry, gid, tid, issue, lineage, int(flat[i + 2]), supersedes))
    wait = int(reply[1])
    return FetchReply(int(reply[0]), wait if wait >= 0 else None, deliveries, reply[3])


def renew(keys: Keys, role: str, worker: str, entries: Sequence[str] = (), *, lease_ms: int) -> Call:
    """
    Renew the leases of entries, and keep the role's clock; without entries the clock alone. Answers the lease in force
    (ms), then per entry MINE, OTHER or ABSENT.

    Args:
        lease_ms: the lease to ask for where the role has none in force.
    """
    return Call("renew", keys.role(role), [worker, lease_ms, *entries])


def release(keys: Keys, role: str, worker: str, entries: Sequence[str], *, leaving: bool = False) -> Call:
    """
    Give back entries that were not started. The first time they go before all that waits; if they are given back once
    more, and not because their worker is `leaving`, they wait at the end of their priority.
    """
    return Call("release", keys.role(role), [worker, "leaving" if leaving else "room", *entries])


def release_all(keys: Keys, role: str, worker: str) -> Call:
    """
    Give back all that a worker holds in a role, and remove its consumer: it has left, or its process is dead. Answers
    how many were given back, and '1' if it must be called again.
    """
    return Call("release", keys.role(role), [worker, "*"])


# ---- judge, control --------------------------------------------------------------------------------------------------
def judge(keys: Keys, gid: str, *, goal: str = "", verdict: Literal["achieved", "failed", ""] = "") -> Call:
    return Call("judge", keys.group(gid), [goal, verdict])


def foresee(keys: Keys, gid: str, facts: GroupFacts, total: int) -> Call:
    """Judge the goals of a group of so many tasks that does not exist yet: `OK`, or `REFUSED` and a goal."""
    return Call("foresee", keys.group(gid), [total, facts.programs()])


def cancel_group(keys: Keys, gid: str) -> Call:
    return Call("control", keys.group(gid), ["cancel"])


def cancel_tasks(keys: Keys, gid: str, tids: Sequence[str]) -> Call:
    return Call("control", keys.group(gid), ["cancel_tasks", *tids])


def seal(keys: Keys, gid: str, *, untouched_ms: int) -> Call:
    return Call("control", keys.group(gid), ["seal", untouched_ms])


def pause_group(keys: Keys, gid: str) -> Call:
    return Call("control", keys.group(gid), ["pause"])


def resume_group(keys: Keys, gid: str) -> Call:
    return Call("control", keys.group(gid), ["resume"])


def pause_role(keys: Keys, role: str) -> list[Call]:
    """Deliver nothing of a role; what is delivered goes on."""
    return [command("HSET", keys.role_part(role, "meta"), "paused", "1")]


def resume_role(keys: Keys, role: str) -> list[Call]:
    bell = keys.role_part(role, "bell")
    return [command("HDEL", keys.role_part(role, "meta"), "paused"), command("RPUSH", bell, *"1" * 8)]


LEASE_SETTLES_MS = 30_000
"""Every lease thread has renewed within this time, whatever lease it knew, and knows the role's new one since."""


def set_lease(keys: Keys, role: str, lease_ms: int, now_ms: int) -> Call:
    """Put another lease in force in a role. Nothing is reclaimed until its workers have heard of it."""
    pause_until = now_ms + max(lease_ms, LEASE_SETTLES_MS)
    return command("HSET", keys.role_part(role, "meta"), "lease", lease_ms, "pause_until", pause_until)


def prune(keys: Keys, gid: str, *, staging_ms: int) -> Call:
    return Call("control", keys.group(gid), ["prune", staging_ms])


def repair(keys: Keys, gid: str, counters: Mapping[str, tuple[int, int]], ended: Sequence[str]) -> Call:
    """
    Set counters from what they are to what they should be, and remove what is left of tasks that have ended; nothing,
    unless all are still what they are.
    """
    values = (word for name, (found, expected) in counters.items() for word in (name, found, expected))
    return Call("control", keys.group(gid), ["repair", len(counters), *values, *ended])


def look_again(keys: Keys, gid: str, at_ms: int) -> Call:
    """Enter the time of the next look at a group; never later than its next deadline."""
    return insist("ZADD", keys.index_of(gid), "XX", at_ms, gid)


def take_thorough(keys: Keys, now_ms: int, ttl_ms: int) -> Call:
    """Take the turn to look at all keys; refused with None to all others until `ttl_ms` have passed."""
    # `insist` would take the TTL from it where it is refused.
    return command("SET", keys.thorough, now_ms, "NX", "PX", ttl_ms)


def restore(keys: Keys, gid: str) -> Call:
    """Enter a group that the index has lost, due at once. Answers 1, or 0 if it was there."""
    return insist("ZADD", keys.index_of(gid), "NX", 0, gid)


def drop_from_index(keys: Keys, gid: str) -> Call:
    return command("ZREM", keys.index_of(gid), gid)


# ---- groups on groups ------------------------------------------------------------------------------------------------
def register(keys: Keys, gid: str, dependent: str) -> Call:
    """Ask a group to tell another one how it finished. Answers its status and, if it is finished, its outcome."""
    return Call("depend", keys.group(gid), ["register", dependent])


def met(keys: Keys, gid: str, other: str, outcome: str) -> Call:
    """Tell a group that one on which it depends has finished."""
    return Call("depend", keys.group(gid), ["met", other, outcome])


# ---- reissue ---------------------------------------------------------------------------------------------------------
class Look(NamedTuple):
    """
    What reissue must know of a group: how many pages its outbox holds, the number of the last one, open tasks that are
    not waiting, and per role the horizon: the largest entry or due ms that a page got there.
    """

    status: str
    in_outbox: int
    pages: int
    open: int
    horizons: Mapping[str, str]


def look(keys: Keys, gid: str) -> Call:
    return Call("reissue", keys.group(gid), ["look"])


def look_reply(reply: list[Any]) -> Look | None:
    if reply[0] == "GONE":
        return None
    horizons = dict(zip(reply[5::2], reply[6::2], strict=True))
    return Look(reply[1], int(reply[2]), int(reply[3]), int(reply[4]), horizons)


def probe(keys: Keys, role: str, gid: str, horizon: str, begin: str = "") -> Call:
    """
    Args:
        begin: where the last reply said to begin, '' at the first call.
    """
    return Call("probe", keys.role(role), [gid, horizon, PROBE_ENTRIES, begin])


class Probed(NamedTuple):
    """
    `word`: BUSY; MORE, to be asked again from `begin` on; CLEAR; DUE, which says nothing of what is to come. `tids`:
    the group's tasks that the role shows.
    """

    word: Literal["BUSY", "MORE", "CLEAR", "DUE"]
    begin: str
    tids: Sequence[str]


def probe_reply(reply: list[Any]) -> Probed:
    word, begin, *tids = reply
    return Probed(word, begin, tids)


def scan(keys: Keys, gid: str, role: str, pages: int, cursor: str, answer: Iterable[str]) -> Call:
    """
    Args:
        answer: CLEAR or DUE, as `probe` answered, and the tasks it showed.
    """
    return Call("reissue", keys.group(gid), ["scan", role, pages, cursor, SCAN_TASKS, *answer])


def orphans(keys: Keys, gid: str, lost: Iterable[tuple[str, str]]) -> Call:
    return Call("reissue", keys.group(gid), ["orphans", *(word for pair in lost for word in pair)])


# ---- registry --------------------------------------------------------------------------------------------------------
def heartbeat(keys: Keys, name: str, facts: Mapping[str, Any], *, ttl_ms: int, roles: Sequence[str] = ()) -> list[Call]:
    """Say that a worker or monitor lives. `facts` are the fields of `models.WorkerView`, the name excepted."""
    calls = [
        insist("SET", keys.worker(name), encode(facts), "PX", ttl_ms),
        insist("SADD", keys.workers, name),
    ]
    if roles:
        calls.append(insist("SADD", keys.roles, *roles))
    return calls


def farewell(keys: Keys, name: str) -> list[Call]:
    return [command("DEL", keys.worker(name)), command("SREM", keys.workers, name)]


def postpone_overdue(keys: Keys, role: str, name: str, now_ms: int) -> Call:
    """Count anew since when no worker that knows a name has asked for the tasks that wait for it."""
    return command("HSET", keys.role_part(role, "names"), name, now_ms)


SAMPLES_KEPT = 24 * 60
"""Minutes."""


def sample(keys: Keys, role: str, minute: int, facts: bytes, *, previous: int | None) -> list[Call]:
    """
    Keep one sample of a role's totals (field: epoch minute), and drop what has left the retention since the `previous`
    sample of this process. The whole key goes after a day without samples, so its first sample (`previous` None) finds
    nothing older than two days.
    """
    key = keys.role_part(role, "samples")
    before = minute - SAMPLES_KEPT if previous is None else previous
    gone = range(before - SAMPLES_KEPT + 1, minute - SAMPLES_KEPT + 1)
    return [
        command("HSET", key, minute, facts),
        command("PEXPIRE", key, SAMPLES_KEPT * 60_000),
        *([command("HDEL", key, *gone)] if gone else []),
    ]
