"""
What really happened, kept outside Redis: one record per accepted task, delivery, renewal, grant, start, answered
commit, death and loss. Times are ms of this process's monotonic clock, taken before and after the call.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from rq_ceylon.store.scripts import Call
from rq_ceylon.store.transitions import claim_reply, fetch_reply


class Plan(NamedTuple):
    """What one task was made for."""

    role: str
    needs: Sequence[str]
    kind: str


class Delivered(NamedTuple):
    role: str
    entry: str
    worker: str
    fence: int
    is_recovery: bool
    before: float
    after: float


class Acknowledged(NamedTuple):
    role: str
    entry: str
    worker: str


class Renewed(NamedTuple):
    role: str
    entry: str
    worker: str
    before: float


class Granted(NamedTuple):
    gid: str
    tid: str
    role: str
    entry: str
    worker: str
    fence: int
    after: float


class Started(NamedTuple):
    gid: str
    tid: str
    worker: str
    fence: int


class Committed(NamedTuple):
    """`verdict` as answered; `not_before` is when a retry is due at the earliest."""

    gid: str
    tid: str
    worker: str
    fence: int
    kind: str
    verdict: str
    not_before: float


class Cancelled(NamedTuple):
    """A user was told that this task, which had not started, never will."""

    gid: str
    tid: str


class Over(NamedTuple):
    """A claim was told that this task has ended, or never will start."""

    gid: str
    tid: str


class Reopened(NamedTuple):
    """A retry was told that this task, which had ended, is open again."""

    gid: str
    tid: str


class Parked(NamedTuple):
    """A claim was told that this task waits until its paused group goes on; a lease that was on it is over."""

    gid: str
    tid: str


class Died(NamedTuple):
    worker: str


class Buried(NamedTuple):
    """Everything a worker held in a role was given back in its name. The worker may live: an accepted risk."""

    role: str
    worker: str


class Released(NamedTuple):
    """This worker gave an entry back that it had not started, which ends its lease."""

    role: str
    entry: str
    worker: str


class Outage(NamedTuple):
    """All workers slept; nothing may be reclaimed until then."""

    quiet_until: float


class Lost(NamedTuple):
    """Redis went back in time, or lost data, in a group (`gid`) or a role ('')."""

    gid: str


Seen = Delivered | Acknowledged | Renewed | Granted | Started | Committed | Cancelled | Over | Parked | Reopened
Record = Seen | Died | Buried | Released | Outage | Lost


@dataclass
class Ledger:
    """
    Attributes:
        accepted: per group that was answered OK, its tasks.
        ended: tasks of which somebody was told that they are over.
        goals: per group, name → (expression, fail_when, has a deadline, is a callable).
        lossy: Redis may lose data in this run, so leases and orders across losses prove nothing.
        takes_tasks: the group of the call that is told next took tasks when the call came.
        rings: reissue may ring what is merely late, so delays prove nothing.
    """

    lease_ms: float
    lossy: bool = False
    rings: bool = True
    records: list[Record] = field(default_factory=list)
    accepted: dict[str, dict[str, Plan]] = field(default_factory=dict)
    policies: dict[str, str] = field(default_factory=dict)
    goals: dict[str, dict[str, tuple[str, str, bool, bool]]] = field(default_factory=dict)
    plans: dict[str, Mapping[str, Plan]] = field(default_factory=dict)
    ended: set[tuple[str, str]] = field(default_factory=set)
    takes_tasks: bool = False
    _staged: dict[str, list[str]] = field(default_factory=dict)
    _entries: dict[tuple[str, int], str] = field(default_factory=dict)

    def saw(self, call: Call, reply: Any, worker: str, before: float, after: float) -> None:
        """One script call and its reply, whether or not its sender ever reads it."""
        name = call.keys[0].partition("{")[2].partition("}")[0].partition(":")[2]
        watch = getattr(self, f"_saw_{call.script}", None)
        if watch is not None:
            watch(name, list(call.args), reply, worker, before, after)

    def _saw_submit(self, gid: str, args: list[Any], reply: Any, *_: Any) -> None:
        if reply[0] != "OK":
            return
        position = 6 + 3 * int(args[5])
        position += 1 + int(args[position]) + 2
        tids = [str(tid) for tid in args[position::3]]
        self._staged.setdefault(gid, []).extend(tids)
        if reply[1] != "staging":
            accepted = self.accepted.setdefault(gid, {})
            for tid in self._staged.pop(gid):
                accepted[tid] = self.plans[gid][tid]

    def _saw_add(self, gid: str, args: list[Any], reply: Any, *_: Any) -> None:
        if reply[0] == "OK":
            self._accept(gid, [str(tid) for tid in args[1::3]])

    def _accept(self, gid: str, tids: Sequence[str]) -> None:
        self.accepted[gid].update((tid, self.plans[gid][tid]) for tid in tids)

    def _saw_fetch(self, role: str, args: list[Any], reply: Any, worker: str, before: float, after: float) -> None:
        position = 6 + int(args[5])
        position += 1 + int(args[position])
        while position < len(args):
            count = int(args[position + 1])
            entries = args[position + 2 : position + 2 + count]
            self.records += [Acknowledged(role, entry, worker) for entry in entries]
            position += 3 + count + 2 * int(args[position + 2 + count])
        for delivery in fetch_reply(role, reply).deliveries:
            self._entries[role, delivery.fence] = delivery.entry
            recovery = args[3] == "recover"
            self.records.append(Delivered(role, delivery.entry, worker, delivery.fence, recovery, before, after))

    def _saw_renew(self, role: str, args: list[Any], reply: Any, worker: str, before: float, _: float) -> None:
        for entry, answer in zip(args[2:], reply[1:], strict=True):
            if answer == "MINE":
                self.records.append(Renewed(role, entry, worker, before))

    def _saw_release(self, role: str, args: list[Any], *_: Any) -> None:
        if args[1] == "*":
            self.records.append(Buried(role, args[0]))
        else:
            self.records += [Released(role, entry, args[0]) for entry in args[1:]]

    def _saw_claim(self, gid: str, args: list[Any], reply: Any, worker: str, _: float, after: float) -> None:
        asked = [str(line).split(" ") for line in args[2:]]
        answers = claim_reply(reply, len(asked)).answers
        for (tid, _issue, _lineage, fence, _supersedes), claimed in zip(asked, answers, strict=True):
            if claimed.verdict == "GRANTED":
                role = self.plans[gid][tid].role
                entry = self._entries[role, int(fence)]
                self.records.append(Granted(gid, tid, role, entry, worker, int(fence), after))
            elif claimed.verdict in ("DONE", "CLOSED"):
                self.records.append(Over(gid, tid))
                self.ended.add((gid, tid))
            elif claimed.verdict == "PARKED":
                self.records.append(Parked(gid, tid))

    def _saw_commit(self, gid: str, args: list[Any], reply: Any, worker: str, before: float, _: float) -> None:
        if reply[0] == "GONE":
            return
        position, lines = 3 + 3 * int(args[2]), []
        while position < len(args):
            lines.append(str(args[position]).split(" "))
            children = int(lines[-1][6]) if len(lines[-1]) > 6 else 0
            lines[-1][6:] = [str(tid) for tid in args[position + 2 : position + 2 + 3 * children : 3]]
            position += 2 + 3 * children
        for (tid, fence, kind, _reason, delay, _run, *spawned), verdict in zip(lines, reply[2], strict=True):
            if kind != "stopping":
                due = before + int(delay) if kind in ("retry", "release") and int(delay) else 0.0
                self.records.append(Committed(gid, tid, worker, int(fence), kind, verdict, due))
                if verdict == "OK" and kind not in ("retry", "release"):
                    self.ended.add((gid, tid))
                if verdict == "OK" and kind == "completed" and self.takes_tasks:
                    self._accept(gid, spawned)

    def _saw_reopen(self, gid: str, args: list[Any], reply: Any, *_: Any) -> None:
        if args[0] == "tasks" and reply[0] == "OK":
            for tid, word in zip(args[1::2], reply[2:], strict=True):
                if word == "reopened":
                    self.ended.discard((gid, tid))
                    self.records.append(Reopened(gid, tid))

    def _saw_control(self, gid: str, args: list[Any], reply: Any, *_: Any) -> None:
        if args[0] == "cancel_tasks" and reply[0] == "OK":
            for tid, word in zip(args[1:], reply[2:], strict=True):
                if word == "cancelled":
                    self.ended.add((gid, tid))
                    self.records.append(Cancelled(gid, tid))
