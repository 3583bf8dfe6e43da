"""The places of a worker: how many threads, or child processes, may run at once, besides the limit of its slots."""

from __future__ import annotations

import asyncio
import collections
import time

UNBOUNDED = 100_000
"""How many tasks can start that need no place: only the slots bound them."""

RECENT_S = 0.1
"""What ended within this time tells how much will end within the next: as many attempts may wait for a place as places
were freed, and a fetch reads ahead as many entries as tasks ended."""

WAITING_MAX = 2
"""For each place at most so many attempts wait, as each keeps a slot from tasks that need no place."""


class Places:
    """
    A number of places, each of which one attempt holds at a time. Attempts get them in the order in which they ask.

    Attributes:
        expected: attempts that were started and have not asked for their place yet. They count as holding one, since a
            worker starts many attempts before the first of them asks.
    """

    def __init__(self, count: int) -> None:
        self.count, self._held, self._waiting, self.expected = count, 0, 0, 0
        self._semaphore = asyncio.Semaphore(count)
        self._freed: collections.deque[float] = collections.deque(maxlen=WAITING_MAX * count)

    @property
    def room(self) -> int:
        """How many more attempts can have a place now or in a moment."""
        since = time.monotonic() - RECENT_S
        while self._freed and self._freed[0] < since:
            self._freed.popleft()
        return max(0, self.count - self._held - self._waiting - self.expected + len(self._freed))

    async def acquire(self) -> None:
        self._waiting += 1
        try:
            await self._semaphore.acquire()
        finally:
            self._waiting -= 1
        self._held += 1

    def give_up(self) -> None:
        self._held -= 1
        self._freed.append(time.monotonic())
        self._semaphore.release()

    async def __aenter__(self) -> None:
        await self.acquire()

    async def __aexit__(self, *_: object) -> None:
        self.give_up()
