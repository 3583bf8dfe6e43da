"""How many threads, or child processes, may run at once: a resource of a worker, besides its slots."""

from __future__ import annotations

import asyncio
import collections
import time

RECENT_S = 0.1
"""What ended within this time says how many may wait for a place: they will have one as soon again."""


class Places:
    """A number of places, each of which one attempt holds at a time; they are given in the order of asking."""

    def __init__(self, count: int) -> None:
        self.count, self._held, self._waiting = count, 0, 0
        self._semaphore = asyncio.Semaphore(count)
        self._freed: collections.deque[float] = collections.deque(maxlen=count)

    @property
    def room(self) -> int:
        """For how many more there is a place now or in a moment."""
        since = time.monotonic() - RECENT_S
        while self._freed and self._freed[0] < since:
            self._freed.popleft()
        return max(0, self.count - self._held - self._waiting + len(self._freed))

    async def acquire(self) -> None:
        self._waiting += 1
        try:
            await self._semaphore.acquire()
        finally:
            self._waiting -= 1
        self._held += 1

    def release(self) -> None:
        self._held -= 1
        self._freed.append(time.monotonic())
        self._semaphore.release()

    async def __aenter__(self) -> None:
        await self.acquire()

    async def __aexit__(self, *_: object) -> None:
        self.release()
