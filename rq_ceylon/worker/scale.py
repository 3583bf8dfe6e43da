"""
How many workers a load needs. Decides only: processes (`supervisor`) and agents of a playground follow it.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field


@dataclass
class Scale:
    """
    Grows at once to what busy slots and backlog need, since a waiting task costs more than an idle worker; lets one go
    after a quiet time in which one less would have sufficed.

    Attributes:
        least, most: never fewer, never more.
        quiet_s: so long is that time.
    """

    least: int
    most: int
    quiet_s: float
    _quiet_since: float = field(init=False, default=math.inf)

    def look(self, workers: int, each: int, busy: int, queued: int, now: float) -> int:
        """
        How many workers there should be.

        Args:
            workers: how many there are, also those that have only begun to start.
            each: slots of one.
            busy: slots of all that run a task.
            queued: tasks that wait for a slot.
            now: monotonic time in seconds.
        """
        wanted = workers
        # A backlog beside idle slots is not to be cured so: the role is paused, say.
        if queued and 2 * busy >= each * workers:
            wanted = max(workers, -(-(busy + queued) // each))
        sufficed = not queued and busy <= 0.75 * each * (workers - 1)
        self._quiet_since = min(self._quiet_since, now) if sufficed else math.inf
        if now - self._quiet_since >= self.quiet_s:
            wanted, self._quiet_since = workers - 1, now
        return max(self.least, min(self.most, wanted))
