"""Statistics of a group, computed from its events."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field

from rq_ceylon.store import queries
from rq_ceylon.store.connection import Connection
from rq_ceylon.store.events import Event
from rq_ceylon.store.histogram import Histogram
from rq_ceylon.store.keys import Keys
from rq_ceylon.views import GroupView


@dataclass
class RoleStatistics:
    """The ended tasks of one role by outcome, its retries, and how long tasks waited and ran."""

    outcomes: Counter[str] = field(default_factory=Counter)
    retries: int = 0
    run: Histogram = field(default_factory=Histogram)
    wait: Histogram = field(default_factory=Histogram)


@dataclass
class GroupStatistics:
    """
    Statistics of one group per role, which grow with its events; `seq` is the last event read. Tasks that were
    cancelled because the group closed have no events: only the group's counters include them.
    """

    roles: dict[str, RoleStatistics] = field(default_factory=dict)
    first_ms: int | None = None
    last_ms: int = 0
    seq: int = 0

    async def read_on(self, connection: Connection, keys: Keys, gid: str, last: float = math.inf) -> None:
        """Read the new events of the group, up to number `last` at least."""
        async for batch in queries.new_events(connection, keys, gid, self.seq, last):
            self.add(batch)

    def add(self, events: Iterable[Event]) -> None:
        for event in events:
            self.first_ms = event.at_ms if self.first_ms is None else self.first_ms
            self.last_ms, self.seq = event.at_ms, event.seq
            for task in event.tasks:
                role = self.roles.get(task.role)
                if role is None:
                    role = self.roles[task.role] = RoleStatistics()
                if task.outcome == "retry":
                    role.retries += 1
                elif task.outcome == "reopened":
                    role.outcomes["reopened"] += 1
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
        """Completed tasks per second, over the whole time."""
        completed = sum(role.outcomes["completed"] for role in self.roles.values())
        return completed / self.seconds if self.seconds else 0.0


async def of_group(connection: Connection, keys: Keys, gid: str) -> GroupStatistics:
    """The statistics of a group from all its events so far."""
    found = GroupStatistics()
    await found.read_on(connection, keys, gid)
    return found


def summary(view: GroupView, found: GroupStatistics) -> str:
    """The end or present state of a group in words: counts, rate, and the run and wait times of each role."""
    counters = view.counters
    how, so_far = (f"finished as {view.outcome}", "") if view.is_finished else (f"is {view.status}", " so far")
    pace = f" in {found.seconds:.1f} s ({found.rate:.1f}/s)" if found.rate >= 0.05 else ""
    lines = [
        f'Group "{view.name}" {how}: {counters.completed} completed, {counters.failed} failed, '
        f"{counters.cancelled} cancelled{so_far}{pace}"
    ]
    for name, role in sorted(found.roles.items()):
        if role.run.count:
            lines.append(f"  role {name}: run {role.run}; wait {role.wait}")
    return "\n".join(lines)
