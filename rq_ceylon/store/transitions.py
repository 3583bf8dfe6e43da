"""
Every state change, as a call to its script, and the readers of the replies. No other module writes state.

Nothing here does I/O: a function returns a `Call`, and the matching `…_reply` reads the reply. The head of each Lua
file states what the script promises.
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
from rq_ceylon.store.records import GOAL
from rq_ceylon.store.scripts import Call, command, insist

RELAY_LEASE_MS = 10_000
"""How long an outbox page is left to the process that received it in a reply, before a relay delivers it."""

UNROUTABLE_MS = 3_600_000
"""How long tasks wait for a worker that knows the name of their function before they fail as unroutable."""

# Redis runs nothing else while a script runs, so no call may be large.
SUBMIT_TASKS_MAX = 500
SUBMIT_BYTES_MAX = 4 * 1024 * 1024
CLAIM_TASKS_MAX = 500
COMMIT_TASKS_MAX = 500
REOPEN_TASKS_MAX = 200

T = TypeVar("T")

PROBE_ENTRIES = 500
SCAN_TASKS = 500


def in_batches(items: Iterable[T], size: Callable[[T], int], most: int) -> Iterator[list[T]]:
    """
    Split items into batches of at most `most` items and 4 MiB. An item larger than that gets a batch of its own. At
    least one batch is yielded; it is empty if there are no items.
    """
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

    @property
    def is_for_follow_ups(self) -> bool:
        """Whether it is a message for the groups that follow this one, which do not exist yet."""
        return self.is_message and self.text.endswith(f"|{FOLLOW_UPS}")


FOLLOW_UPS = "@then"
"""Stands among the dependents of a group for the groups in its `then`."""


class PageAck(NamedTuple):
    """A page that has arrived, and its horizon: the largest entry ms or due ms that the page got in its role."""

    page: Page
    horizon: str = "0"


def tell_group(keys: Keys, page: Page) -> Call:
    """The call that delivers a message to its group."""
    _, _, standing, gid = page.text.split("|")
    return met(keys, gid, page.gid, standing)


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
    Deliver pages to their role.

    Args:
        insist: write at `maxmemory` too.
        names: tasks (group, task) that must wait outside the streams, each with the name of its function. A worker that
            knows this name and has room for the task takes it from there.
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
    # The name is the fifth part, so an item that supersedes nothing gets an empty fourth part.
    return item if name is None else ",".join((priority, tid, issue, *(supersedes or [""]), name))


def outbox(keys: Keys, gid: str, *, wanted: int = 0, hidden: bool = False, acks: Sequence[PageAck] = ()) -> Call:
    """
    Args:
        hidden: also return pages that were handed out before and are not acknowledged, because the reply that carried
            them may be lost. A page that another process is delivering then arrives twice, which is harmless: the claim
            decides.
    """
    return Call("outbox", keys.group(gid), [wanted, int(hidden), RELAY_LEASE_MS, *_acks(acks)])


@dataclass(frozen=True, slots=True)
class OutboxReply:
    """
    `status` is None if the group is gone, `next_deadline_ms` is 0 if no goal has a deadline, `more`: call again at
    once.
    """

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
    A task ready for submission.

    Attributes:
        text: the stored task, see `codec.task_text`.
        needs: ids of the tasks that it needs.
        known: the text that goes into the digest of its part instead of `text`, if they differ.
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
    The data that is stored once per group.

    Attributes:
        defaults: JSON values that most tasks share; each claim's reply carries them to the worker.
        retention_ms: how long the group is kept after it finished.
        depends_on: groups that must have come so far before this one starts, as `gid` or `gid=when`.
        on_need_failed: what happens to a task if a task that it needs does not complete: skip, fail or continue.
        open: whether it takes further tasks: `0` no, `o` until it is sealed, `i` until no task is open.
        open_timeout_ms: an open group is sealed when no task was added for so long.
        max_running: how many of its tasks run at once at most; 0: any number.
        lazy: start no more tasks than the nearest goal that ends the group needs.
        then: the groups that follow it, as JSON; see `follow_up`.
        added_defaults: what a task that is added later gets unless it says otherwise: role, priority and times.
    """

    name: str
    retention_ms: int
    key: str = ""
    depends_on: Sequence[str] = ()
    on_need_failed: str = "skip"
    description: str = ""
    defaults: Mapping[str, Any] = field(default_factory=dict)
    goals: Sequence[CompiledGoal] = ()
    open: Literal["0", "o", "i"] = "0"
    open_timeout_ms: int = 0
    max_running: int = 0
    lazy: bool = False
    then: Sequence[Mapping[str, Any]] = ()
    added_defaults: Mapping[str, Any] = field(default_factory=dict)

    def meta(self) -> list[Any]:
        fields: dict[str, Any] = {"name": self.name, "retention": self.retention_ms}
        if self.key:
            fields["key"] = self.key
        if self.description:
            fields["description"] = self.description
        if self.on_need_failed != "skip":
            fields["on_need_failed"] = self.on_need_failed
        defaults = self.defaults if self.open == "0" else {**self.defaults, "open": True}  # tells workers of it
        if defaults:
            fields["defaults"] = encode(defaults)
        if self.max_running:
            fields["max_running"] = self.max_running
        if self.lazy:
            fields["lazy"] = 1
        if self.then:
            fields["dependents"] = FOLLOW_UPS
            fields["then"] = encode(self.then)
        if self.open != "0":
            fields["open_timeout"] = self.open_timeout_ms
            fields["until_idle"] = int(self.open == "i")
            fields["added_defaults"] = encode(self.added_defaults)
        if self.goals:
            fields["specs"] = encode([goal.to_json() for goal in self.goals])
            fields["goals_total"] = len(self.goals)
        return [word for pair in fields.items() for word in pair]

    def programs(self) -> str:
        """The goals as `submit` gets them, with deadlines from the start of the group."""
        return ";".join(
            GOAL.pack(
                {
                    "name": goal.name,
                    "on_achieved": goal.on_achieved,
                    "on_failed": goal.on_failed,
                    "deadline": goal.deadline_ms,
                    "program": goal.program,
                    "fail_program": goal.fail_program,
                }
            )
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
    return Call(
        "submit",
        keys.group(gid),
        _submit_args(facts, tasks, part=part, last=last, digest=digest, rolling=rolling, acks=acks),
    )


def _submit_args(
    facts: GroupFacts,
    tasks: Iterable[StagedTask],
    *,
    part: int,
    last: bool,
    digest: str,
    rolling: bool = False,
    acks: Sequence[PageAck] = (),
) -> list[Any]:
    meta = facts.meta() if part == 1 else []
    args: list[Any] = [part, int(last), 1 if rolling else facts.open, digest, RELAY_LEASE_MS, *_acks(acks)]
    args += (len(meta), *meta, facts.programs() if last else "", " ".join(facts.depends_on) if last else "")
    for task in tasks:
        args += (task.tid, task.text, " ".join(task.needs))
    return args


def packed(when: str, gid: str, facts: GroupFacts, tasks: Sequence[StagedTask], digest: str) -> dict[str, Any]:
    """
    A group that follows another one, as that one keeps it: ready to be submitted in one part.

    Args:
        when: how far the other group must come; see `models.Dependency`.
    """
    args = _submit_args(facts, tasks, part=1, last=True, digest=digest)
    texts = [arg.decode() if isinstance(arg, bytes) else arg for arg in args]
    return {"when": when, "gid": gid, "name": facts.name, "args": texts}


def follow_up(keys: Keys, one: Mapping[str, Any]) -> list[Call]:
    """Submit a group that follows another one. The last reply is that of `submit`; a repetition changes nothing."""
    return [*announce(keys, one["gid"], ()), Call("submit", keys.group(one["gid"]), one["args"])]


@dataclass(frozen=True, slots=True)
class SubmitReply:
    """
    `word` is OK, REPEAT, GAP, CLOSED, EXISTS or REFUSED. `detail` is the group's status, or for REFUSED the problem
    (goal, duplicate, unknown need); `name` is then the goal, task or need at fault.
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


def add(keys: Keys, gid: str, tasks: Iterable[StagedTask]) -> Call:
    """Put tasks into an open group."""
    args: list[Any] = [RELAY_LEASE_MS]
    for task in tasks:
        args += (task.tid, task.text, " ".join(task.needs))
    return Call("add", keys.group(gid), args)


@dataclass(frozen=True, slots=True)
class AddReply:
    """`word` is OK, GONE, CLOSED or REFUSED; `detail` the group's status, for REFUSED the task that is unknown."""

    word: str
    detail: str = ""
    added: int = 0
    pages: Sequence[Page] = ()
    more: bool = False


def add_reply(gid: str, reply: list[Any]) -> AddReply:
    if reply[0] != "OK":
        return AddReply(*reply)
    return AddReply("OK", reply[1], int(reply[2]), [Page(gid, text) for text in reply[3]], reply[4] == "1")


ANNOUNCED_BELOW = 1
"""A group with a smaller score in the index was announced, and maintenance has not looked at it since."""


def announce(
    keys: Keys, gid: str, roles: Iterable[str], *, durability: Durability = "none", insisting: bool = False
) -> list[Call]:
    """
    Enter a group, due at once, in the index, and its roles in the registry. Send this before the group is written, so
    that maintenance finds the group even if its client stops in between.

    Args:
        durability: how the index entry is confirmed. Unless it is `none`, the entry gets a new random score below
            `ANNOUNCED_BELOW` even if it exists: a confirmation waits for a write, and setting the same score again
            writes nothing.
        insisting: write at the memory limit too.
    """
    write = insist if insisting else command
    due = ("NX", 0) if durability == "none" else (f"{random.random():.9f}",)
    calls = [confirming(write("ZADD", keys.index_of(gid), *due, gid), durability)]
    roles = sorted(roles)
    if roles:
        calls.append(write("SADD", keys.roles, *roles))
    return calls


def announce_role(keys: Keys, role: str) -> Call:
    """Enter a role in the registry, whose tasks a commit adds."""
    return insist("SADD", keys.roles, role)


# ---- claim, commit ---------------------------------------------------------------------------------------------------
class Delivery(NamedTuple):
    """One entry as `fetch` delivered it, with the fence of this delivery."""

    role: str
    entry: str
    gid: str
    tid: str
    issue: str
    lineage: str
    fence: int
    supersedes: str = "-"


ClaimVerdict = Literal[
    "GRANTED", "DONE", "GONE", "DUPLICATE", "LOST", "OUTDATED", "NOTREADY", "CLOSED", "PARKED", "LATER"
]

SUSPECT_CRASHES = 2
"""A task that crashed this often is a suspect. A worker runs only one suspect at a time."""


class Claimed(NamedTuple):
    """
    The answer for one delivery. GRANTED sets `attempt` to `task`, the stored text. DONE sets `reason` and `words` (why
    the task ended) if this very claim ended it: the task will never run, and no other worker is told.
    """

    verdict: ClaimVerdict
    attempt: int = 1
    crashes: int = 0
    releases: int = 0
    task: str = ""
    reason: str = ""
    words: str = ""


@dataclass(frozen=True, slots=True)
class ClaimReply:
    """`defaults` is the group's JSON; `stop`: running tasks of this group must be stopped."""

    answers: Sequence[Claimed]
    defaults: str = ""
    stop: bool = False


def claim(keys: Keys, gid: str, worker: str, deliveries: Sequence[Delivery], *, suspect: bool = True) -> Call:
    """
    Args:
        suspect: whether a suspect may be granted; see `SUSPECT_CRASHES`.
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
    The outcome of one delivery, to be recorded. `kind` is completed, failed, retry, release, stopped or stopping. The
    last one ends nothing: it records that the worker was told to stop, so that losing this worker is no crash.
    """

    tid: str
    fence: int
    kind: str
    reason: str
    delay_ms: int
    run_ms: int
    blob: bytes
    children: Sequence[StagedTask] = ()

    @property
    def size(self) -> int:
        """Its weight in a batch, with which no more children come together than one attempt may spawn."""
        return len(self.blob) + sum(max(child.size, SUBMIT_BYTES_MAX // 1000) for child in self.children)


@dataclass(frozen=True, slots=True)
class CommitReply:
    """The verdict FULL: Redis is at its memory limit, so a task that spawned others was given back."""

    verdicts: Sequence[Literal["OK", "DONE", "STALE", "FULL"]]
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
        relay_lease_ms: how long the pages in the reply are left to the caller, which delivers them; None:
            `RELAY_LEASE_MS`, as for every other reply.
    """
    args: list[Any] = [worker, RELAY_LEASE_MS if relay_lease_ms is None else relay_lease_ms, *_acks(acks)]
    for o in outcomes:
        count = f" {len(o.children)}" if o.children else ""
        args += (f"{o.tid} {o.fence} {o.kind} {o.reason or '-'} {o.delay_ms} {o.run_ms}{count}", o.blob)
        for child in o.children:
            args += (child.tid, child.text, " ".join(child.needs))
    return Call("commit", keys.group(gid), args)


def commit_reply(gid: str, reply: list[Any], asked: int) -> CommitReply:
    if reply[0] == "GONE":
        # The group is gone, so nothing is left to record.
        return CommitReply(["DONE"] * asked)
    return CommitReply(reply[2], [Page(gid, text) for text in reply[3]], reply[4] == "1")


# ---- fetch, renew, release -------------------------------------------------------------------------------------------
class Ack(NamedTuple):
    """An entry to acknowledge and its outcome; for statistics, how long its task ran and how long it had waited."""

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
        budget: how many entries to deliver at most; 0 only acknowledges.
        recover: the entries that this worker holds, if the previous `fetch` got no answer: pending entries that are not
            among them are delivered again. None otherwise.
        names: names that tasks wait for (a reply told them) and that this worker knows; for each, how many it takes.
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
        lease_ms: the lease in force, which is a property of the role.
        next_due_ms: milliseconds until the next delayed entry is due; None if there is none.
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
        # An entry that is not a copy begins a lineage of its own.
        lineage = more[0] if more and more[0] != "-" else entry
        supersedes = more[1] if len(more) > 1 else "-"
        deliveries.append(Delivery(role, entry, gid, tid, issue, lineage, int(flat[i + 2]), supersedes))
    wait = int(reply[1])
    return FetchReply(int(reply[0]), wait if wait >= 0 else None, deliveries, reply[3])


def renew(keys: Keys, role: str, worker: str, entries: Sequence[str] = (), *, lease_ms: int) -> Call:
    """
    Renew the leases of entries and keep the role's clock; without entries, keep only the clock. The reply is the lease
    in force (ms), then MINE, OTHER or ABSENT per entry.

    Args:
        lease_ms: the lease to set if the role has none in force.
    """
    return Call("renew", keys.role(role), [worker, lease_ms, *entries])


def release(keys: Keys, role: str, worker: str, entries: Sequence[str], *, leaving: bool = False) -> Call:
    """
    Give back entries that were not started. The first time, an entry goes to the front of the role. If it is given back
    again, and its worker is not `leaving`, it goes to the end of its priority: at the front it would go back and forth
    between full workers.
    """
    return Call("release", keys.role(role), [worker, "leaving" if leaving else "room", *entries])


def release_all(keys: Keys, role: str, worker: str) -> Call:
    """
    Give back every entry that a worker holds in a role, and remove its consumer. Use it only if the worker has left or
    its process is dead. The reply is how many entries were given back, '1' if it must be called again, and the groups
    of these entries.
    """
    return Call("release", keys.role(role), [worker, "*"])


# ---- judge, control --------------------------------------------------------------------------------------------------
def judge(keys: Keys, gid: str, *, goal: str = "", verdict: Literal["achieved", "failed", ""] = "") -> Call:
    return Call("judge", keys.group(gid), [goal, verdict])


def foresee(keys: Keys, gid: str, facts: GroupFacts, total: int) -> Call:
    """Judge the goals of a group before it exists, given its number of tasks. Replies `OK`, or `REFUSED` and a goal."""
    return Call("foresee", keys.group(gid), [total, facts.programs(), facts.open])


def cancel_group(keys: Keys, gid: str) -> Call:
    return Call("control", keys.group(gid), ["cancel"])


def cancel_tasks(keys: Keys, gid: str, tids: Sequence[str]) -> Call:
    return Call("control", keys.group(gid), ["cancel_tasks", *tids])


def seal(keys: Keys, gid: str, *, untouched_ms: int) -> Call:
    """`untouched_ms`: only if no task came for so long; an open group has a time of its own. 0: at once."""
    return Call("control", keys.group(gid), ["seal", untouched_ms])


def pause_group(keys: Keys, gid: str) -> Call:
    return Call("control", keys.group(gid), ["pause"])


def resume_group(keys: Keys, gid: str) -> Call:
    return Call("control", keys.group(gid), ["resume"])


def pause_role(keys: Keys, role: str) -> list[Call]:
    """Pause a role: no entry is delivered, and tasks that were delivered go on."""
    return [command("HSET", keys.role_part(role, "meta"), "paused", "1")]


def resume_role(keys: Keys, role: str) -> list[Call]:
    # Each token wakes one idle worker; without them, idle workers would notice the end of the pause late.
    bell = keys.role_part(role, "bell")
    return [command("HDEL", keys.role_part(role, "meta"), "paused"), command("RPUSH", bell, *"1" * 8)]


LEASE_SETTLES_MS = 30_000
"""Within this time every lease thread renews, whatever lease it knew before, and so learns the role's new lease."""


def set_lease(keys: Keys, role: str, lease_ms: int, now_ms: int) -> Call:
    """
    Set a new lease for a role. Nothing is reclaimed until its workers have heard of it, since they may still renew too
    late for a shorter one.
    """
    pause_until = now_ms + max(lease_ms, LEASE_SETTLES_MS)
    return command("HSET", keys.role_part(role, "meta"), "lease", lease_ms, "pause_until", pause_until)


def prune(keys: Keys, gid: str, *, staging_ms: int, at_once: bool = False) -> Call:
    """`at_once`: also before the retention of a finished group has passed."""
    return Call("control", keys.group(gid), ["prune", staging_ms, *(["now"] if at_once else [])])


def repair(keys: Keys, gid: str, counters: Mapping[str, tuple[int, int]], ended: Sequence[str]) -> Call:
    """
    Set counters from their found to their expected values, and remove leftovers of tasks that have ended. If any
    counter no longer has its found value, nothing is changed.
    """
    values = (word for name, (found, expected) in counters.items() for word in (name, found, expected))
    return Call("control", keys.group(gid), ["repair", len(counters), *values, *ended])


def look_again(keys: Keys, gid: str, at_ms: int) -> Call:
    """Set the time of the next look at a group, which must not be later than its next deadline."""
    return insist("ZADD", keys.index_of(gid), "XX", at_ms, gid)


def take_thorough(keys: Keys, now_ms: int, ttl_ms: int) -> Call:
    """Claim the look at all keys for one process. Until `ttl_ms` have passed, Redis refuses all others with None."""
    # Not by `insist`: it would remove the TTL of the key even if SET NX is refused.
    return command("SET", keys.thorough, now_ms, "NX", "PX", ttl_ms)


def restore(keys: Keys, gid: str) -> Call:
    """Enter a group that the index has lost, due at once. The reply is 1, or 0 if the group was in the index."""
    return insist("ZADD", keys.index_of(gid), "NX", 0, gid)


def drop_from_index(keys: Keys, gid: str) -> Call:
    return command("ZREM", keys.index_of(gid), gid)


# ---- retry -----------------------------------------------------------------------------------------------------------
def settle(keys: Keys, gid: str, cursor: str) -> Call:
    """Write results for the tasks of a finished group that ended without one. Call it until the next cursor is 0."""
    return Call("reopen", keys.group(gid), ["settle", cursor, SCAN_TASKS])


def reopen(keys: Keys, gid: str, tasks: Iterable[tuple[str, Sequence[str]]]) -> Call:
    """
    Reopen tasks, each given with its needs. No goal of the group is judged until `end_retry`. The reply is the status,
    then a word for each task.
    """
    return Call(
        "reopen", keys.group(gid), ["tasks", *(word for tid, needs in tasks for word in (tid, " ".join(needs)))]
    )


def end_retry(keys: Keys, gid: str, *, untouched_ms: int = 0) -> Call:
    """
    Judge the goals of a group whose tasks were reopened.

    Args:
        untouched_ms: do nothing if a task was reopened within this time.
    """
    return Call("reopen", keys.group(gid), ["end", untouched_ms])


# ---- groups on groups ------------------------------------------------------------------------------------------------
def register(keys: Keys, gid: str, dependent: str) -> Call:
    """Ask a group to tell `dependent` how it comes on. The reply is its status, and how it stands; see `met`."""
    return Call("depend", keys.group(gid), ["register", dependent])


def met(keys: Keys, gid: str, other: str, standing: str) -> Call:
    """
    Tell a group how another group stands on which it depends: `outcome+achieved:goal…`, with an empty outcome while
    that one goes on, and `gone` if it does not exist.
    """
    return Call("depend", keys.group(gid), ["met", other, standing])


# ---- reissue ---------------------------------------------------------------------------------------------------------
class GroupState(NamedTuple):
    """
    The state of a group that reissue needs.

    Attributes:
        in_outbox: how many pages the outbox holds.
        last_page: the number of the last page that was written.
        open: how many tasks are pending or in progress.
        horizons: the horizon of each role: the largest entry ms or due ms that a page got there.
    """

    status: str
    in_outbox: int
    last_page: int
    open: int
    horizons: Mapping[str, str]


def read_state(keys: Keys, gid: str) -> Call:
    return Call("reissue", keys.group(gid), ["look"])


def read_state_reply(reply: list[Any]) -> GroupState | None:
    if reply[0] == "GONE":
        return None
    horizons = dict(zip(reply[5::2], reply[6::2], strict=True))
    return GroupState(reply[1], int(reply[2]), int(reply[3]), int(reply[4]), horizons)


def probe(keys: Keys, role: str, gid: str, horizon: str, begin: str = "") -> Call:
    """
    Args:
        begin: where to begin, as the last reply said; '' at the first call.
    """
    return Call("probe", keys.role(role), [gid, horizon, PROBE_ENTRIES, begin])


class Probed(NamedTuple):
    """
    `word` is BUSY, MORE (ask again from `begin`), CLEAR, or DUE (tells only of entries that are due by now). `tids` are
    the tasks of the group that the role can still deliver.
    """

    word: Literal["BUSY", "MORE", "CLEAR", "DUE"]
    begin: str
    tids: Sequence[str]


def probe_reply(reply: list[Any]) -> Probed:
    word, begin, *tids = reply
    return Probed(word, begin, tids)


def scan(keys: Keys, gid: str, role: str, last_page: int, cursor: str, answer: Iterable[str]) -> Call:
    """
    Args:
        answer: the answer of `probe`, CLEAR or DUE, followed by the tasks that it showed.
    """
    return Call("reissue", keys.group(gid), ["scan", role, last_page, cursor, SCAN_TASKS, *answer])


def orphans(keys: Keys, gid: str, found: Iterable[tuple[str, str]]) -> Call:
    return Call("reissue", keys.group(gid), ["orphans", *(word for pair in found for word in pair)])


# ---- listing ---------------------------------------------------------------------------------------------------------
LIST_TASKS = 1000


def list_tasks(keys: Keys, gid: str, part: Literal["tasks", "results"], cursor: str) -> Call:
    """Read which tasks a group has, their states and roles, without their records; it writes nothing."""
    return Call("list", keys.group(gid), [part, cursor, LIST_TASKS])


# ---- registry --------------------------------------------------------------------------------------------------------
def heartbeat(keys: Keys, name: str, facts: Mapping[str, Any], *, ttl_ms: int, roles: Sequence[str] = ()) -> list[Call]:
    """
    Show that a worker or monitor lives. `facts` are the fields of `views.WorkerView` without the name, and what only
    other reads use: `progress` and `low_marks`.
    """
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
    """Restart the time in which no worker that knows a name has asked for its waiting tasks."""
    return command("HSET", keys.role_part(role, "names"), name, now_ms)


SAMPLES_KEPT = 24 * 60
"""In minutes."""


def sample(keys: Keys, role: str, minute: int, facts: bytes, *, previous: int | None) -> list[Call]:
    """
    Store one sample of a role's totals (its field is the epoch minute), and remove the samples that left the retention
    since the `previous` sample of this process. The whole key expires after a day without samples, so the first sample
    of a process (`previous` None) finds none older than two days.
    """
    key = keys.role_part(role, "samples")
    before = minute - SAMPLES_KEPT if previous is None else previous
    gone = range(before - SAMPLES_KEPT + 1, minute - SAMPLES_KEPT + 1)
    return [
        command("HSET", key, minute, facts),
        command("PEXPIRE", key, SAMPLES_KEPT * 60_000),
        *([command("HDEL", key, *gone)] if gone else []),
    ]
