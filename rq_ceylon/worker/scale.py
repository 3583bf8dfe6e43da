"""Decides how many workers a load needs. The supervisor and the playground start and stop them."""

from __future__ import annotations

import math
from dataclasses import dataclass, field


@dataclass
class Scale:
    """
    The number of workers, between two bounds. It grows at once to what busy slots and queued tasks need, since a
    waiting task costs more than an idle worker. It shrinks by one when one worker less would have been enough for
    `quiet_s`.
    """

    least: int
    most: int
    quiet_s: float
    _quiet_since: float = field(init=False, default=math.inf)

    def look(self, workers: int, each: int, busy: int, queued: int, now: float) -> int:
        """
        How many workers there should be.

        Args:
            workers: how many there are, including those just started.
            each: the slots of each.
            busy: how many of all slots are busy.
            queued: how many tasks wait for a slot.
            now: monotonic time in seconds.
        """
        wanted = workers
        # If tasks queue up while slots are idle, more workers will not help: the role may be paused.
        if queued and 2 * busy >= each * workers:
            wanted = max(workers, -(-(busy + queued) // each))
        sufficed = not queued and busy <= 0.75 * each * (workers - 1)
        self._quiet_since = min(self._quiet_since, now) if sufficed else math.inf
        if now - self._quiet_since >= self.quiet_s:
            wanted, self._quiet_since = workers - 1, now
        return max(self.least, min(self.most, wanted))
