"""How many workers a load needs. Decides only: processes (`supervisor`) and agents of a playground follow it."""

from __future__ import annotations

import math
from dataclasses import dataclass, field


@dataclass
class Scale:
    """
    Between two bounds it grows at once to what busy slots and backlog need, since a waiting task costs more than an
    idle worker, and lets one go when for `quiet_s` one less would have sufficed.
    """

    least: int
    most: int
    quiet_s: float
    _quiet_since: float = field(init=False, default=math.inf)

    def look(self, workers: int, each: int, busy: int, queued: int, now: float) -> int:
        """
        How many there should be, given how many there are (also those just started), the slots of each, how many of
        all slots are busy, the tasks that wait for one, and the monotonic time.
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
