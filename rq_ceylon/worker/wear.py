"""The limits after which a fresh process takes the place of one: so many tasks, or so much memory."""

from __future__ import annotations

import os
import random
import sys

JITTER = 0.1


def jittered(limit: int) -> int:
    """The limit, changed at random by up to 10 %, so that processes that started together do not end together."""
    return max(min(limit, 1), round(limit * random.uniform(1 - JITTER, 1 + JITTER)))


def memory_in_use() -> int:
    """Resident memory of this process in bytes; without `/proc`, the most that it ever had."""
    try:
        with open("/proc/self/statm", "rb") as file:
            return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    except OSError:
        import resource  # not on Windows, where applications import this module too

        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        return peak if sys.platform == "darwin" else peak * 1024
