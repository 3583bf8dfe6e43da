"""Histograms of durations, in which every percentile is right within 1 %."""

from __future__ import annotations

import math
from collections import Counter
from dataclasses import dataclass, field
from functools import lru_cache

GROWTH = 1.02
"""Each bucket stands for a duration 2 % longer than the one before it, so no duration differs by more than 1 % from the
nearest bucket."""

EXACT_MS = 50
"""Durations below this have one bucket per millisecond, which is as fine. There are 776 buckets up to 24 h, and 1,190
up to the longest duration, ten years; only buckets in use take memory."""


@lru_cache(4096)
def bucket_of(ms: int) -> int:
    return max(ms, 0) if ms < EXACT_MS else round(math.log(ms, GROWTH))


def ms_of(bucket: int) -> float:
    """The duration that a bucket stands for."""
    return bucket if bucket < EXACT_MS else GROWTH**bucket


@dataclass
class Histogram:
    """A histogram of durations in ms. The count, total, minimum and maximum are exact."""

    buckets: Counter[int] = field(default_factory=Counter)
    total_ms: int = 0
    min_ms: float = math.inf
    max_ms: int = 0

    def add(self, ms: int) -> None:
        self.buckets[bucket_of(ms)] += 1
        self.total_ms += ms
        self.min_ms = min(self.min_ms, ms)
        self.max_ms = max(self.max_ms, ms)

    @property
    def count(self) -> int:
        return sum(self.buckets.values())

    @property
    def mean_ms(self) -> float:
        return self.total_ms / self.count if self.count else 0.0

    def percentile_ms(self, share: float) -> float:
        """
        The shortest duration that this share (0 to 1) of all durations does not exceed, within 1 %; 0 if there are
        none.
        """
        rank, seen = round(share * self.count, 6), 0
        for bucket in sorted(self.buckets):
            seen += self.buckets[bucket]
            if seen >= rank:
                return min(max(ms_of(bucket), self.min_ms), self.max_ms)
        return 0.0

    def __str__(self) -> str:
        p50, p95, p99 = (self.percentile_ms(share) for share in (0.5, 0.95, 0.99))
        return f"mean {self.mean_ms:.0f} ms, p50 {p50:.0f}, p95 {p95:.0f}, p99 {p99:.0f}"
