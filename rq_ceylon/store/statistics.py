"""
Statistics of a group, from its events, with log-2 histograms.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field

from rq_ceylon.models import GroupView
from rq_ceylon.store import queries
from rq_ceylon.store.connection import Connection
from rq_ceylon.store.events import Event
from rq_ceylon.store.keys import Keys


@dataclass
class Histogram:
    """
    Durations in ms by buckets of powers of two: bucket 0 is below 1 ms, bucket b is 2^(b-1) up to 2^b.
    `max_ms`: none of them is longer.
    """

    buckets: Counter[int] = field(default_factory=Counter)
    total_ms: int = 0
    max_ms: int = 0

    def add(self, ms: int) -> None:
        self.buckets[max(ms, 0).bit_length()] += 1
        self.total_ms += ms
        self.max_ms = max(self.max_ms, ms)

    @property
    def count(self) -> int:
        return sum(self.buckets.values())

    @property
    def mean_ms(self) -> float:
        return self.total_ms / self.count if self.count else 0.0

    def percentile_ms(self, share: float) -> float:
        """
        The duration that this share (0 to 1) does not exceed, interpolated inside its bucket: right to a factor of two,
        and never above `max_ms`.
        """
        rank, seen = share * self.count, 0
        for bucket in sorted(self.buckets):
            count = self.buckets[bucket]
            if seen + count >= rank:
                low = 1 << bucket >> 1
                high = min(2.0**bucket, max(low, self.max_ms))
                return low + (high - low) * (rank - seen) / count
            seen += count
        return 0.0

    def __str__(self) -> str:
        p50, p95, p99 = (self.percentile_ms(share) for share in (0.5, 0.95, 0.99))
        return f"mean {self.mean_ms:.0f} ms, p50 {p50:.0f}, p95 {p95:.0f}, p99 {p99:.0f}"


@dataclass
class RoleStatistics:
    """
    Tasks of one role that ended, by outcome, and how long they waited and ran.
    """

    outcomes: Counter[str] = field(default_factory=Counter)
    retries: int = 0
    run: Histogram = field(default_factory=Histogram)
    wait: Histogram = field(default_factory=Histogram)


@dataclass
class GroupStatistics:
    """
    Statistics per role of one group, growing with its events; `seq` is the last of them. What closing the group
    cancelled at once has no events: it is in the group's counters alone.
    """

    roles: dict[str, RoleStatistics] = field(default_factory=dict)
    first_ms: int | None = None
    last_ms: int = 0
    seq: int = 0

    async def read_on(self, connection: Connection, keys: Keys, gid: str, last: float = math.inf) -> None:
        """
        Read the events of the group that are new, up to that number at least.
        """
        async for batch in queries.new_events(connection, keys, gid, self.seq, last):
            self.add(batch)

    def add(self, events: Iterable[Event]) -> None:
        for event in events:
            self.first_ms = event.at_ms if self.first_ms is None else self.first_ms
            self.last_ms, self.seq = event.at_ms, event.seq
            for task in event.tasks:
                role = self.roles.setdefault(task.role, RoleStatistics())
                if task.outcome == "retry":
                    role.retries += 1
                elif task.is_end:
                    role.outcomes[task.outcome] += 1
                    if task.outcome != "cancelled":
                        role.run.add(task.run_ms)
                        role.wait.add(task.wait_ms)

    @property
    def seconds(self) -> float:
        return (self.last_ms - (self.first_ms or self.last_ms)) / 1000

    @property
    def rate(self) -> float:
        """
        Completed tasks per second, over the whole time.
        """
        completed = sum(role.outcomes["completed"] for role in self.roles.values())
        return completed / self.seconds if self.seconds else 0.0


async def of_group(connection: Connection, keys: Keys, gid: str) -> GroupStatistics:
    """
    Statistics of a group from all its events so far.
    """
    found = GroupStatistics()
    await found.read_on(connection, keys, gid)
    return found


def summary(view: GroupView, found: GroupStatistics) -> str:
    """
    How a group ended or stands, in words: counts, rate, and per role run and wait times.
    """
    counters = view.counters
    how, so_far = (f"finished as {view.outcome}", "") if view.is_finished else (f"is {view.status}", " so far")
    lines = [
        f'Group "{view.name}" {how}: {counters.completed} completed, {counters.failed} failed, '
        f"{counters.cancelled} cancelled{so_far} in {found.seconds:.1f} s ({found.rate:.1f}/s)"
    ]
    for name, role in sorted(found.roles.items()):
        if role.run.count:
            lines.append(f"  {name}: run {role.run}; wait {role.wait}")
    return "\n".join(lines)
