"""
The events of groups: how to unpack them, and how readers hear of new ones.

A notification says only "look now". It may be lost; the list in Redis is the record. So every wait here has a time
limit, and also ends when the subscription is made again.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator
from typing import Any, NamedTuple

from rq_ceylon.store.connection import UNHEARD, heard, subscribed
from rq_ceylon.store.keys import Keys
from rq_ceylon.store.node import heed_cancellation
from rq_ceylon.store.redis_errors import DISCONNECTED, carrying, complain

LOOK_S = 5.0
"""How long a waiter waits at most between two looks, because notifications may be lost."""


class TaskEvent(NamedTuple):
    """
    A change of one task. `outcome` is completed, failed or cancelled (the task ended), retry or release, or reopened (a
    task that had ended is open again).
    """

    tid: str
    outcome: str
    role: str
    wait_ms: int
    run_ms: int

    @property
    def is_end(self) -> bool:
        return self.outcome in ("completed", "failed", "cancelled")


class Event(NamedTuple):
    """
    One state change of a group. `seq` counts from 1; `status` is the group's new status, '' if it did not change.
    `goals` are pairs of a name and the new status, `in_progress` for a failed goal that a retry made undecided.
    """

    seq: int
    at_ms: int
    kind: str
    tasks: list[TaskEvent]
    goals: list[tuple[str, str]]
    status: str


def event_of(seq: int, line: str) -> Event:
    """Unpack an event: `ms|kind|tid,outcome,role,wait,run ...|goal:status ...|status`."""
    at, kind, tasks, goals, status = line.split("|")
    ended = []
    for item in tasks.split(" ") if tasks else ():
        tid, outcome, role, wait, run = item.split(",")
        ended.append(TaskEvent(tid, outcome, role, int(float(wait)), int(float(run))))
    settled = [tuple(item.rsplit(":", 1)) for item in goals.split(" ")] if goals else []
    return Event(seq, int(at), kind, ended, settled, status)  # type: ignore[arg-type]


class Watch:
    """The notifications that one waiter receives, of one group or of all."""

    def __init__(self) -> None:
        self._news = asyncio.Event()
        self._groups: set[str | None] = set()

    def tell(self, gid: str | None) -> None:
        self._groups.add(gid)
        self._news.set()

    async def wait(self, timeout_s: float = LOOK_S) -> set[str | None]:
        """
        Wait for a notification, or for the timeout. Returns the ids of the groups that changed. If it is empty (nothing
        was told), or None is in it (the subscription is new), any group may have changed unheard.
        """
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(timeout_s):
                await self._news.wait()
        self._news.clear()
        groups, self._groups = self._groups, set()
        return groups


class EventHub:
    """One pub/sub connection that all waiters of an event loop share; the first waiter opens it."""

    def __init__(self, url: str, keys: Keys) -> None:
        self._url, self._keys = url, keys
        self._watches: dict[str, set[Watch]] = {}
        self._pubsub: Any = None
        self._listener: asyncio.Task[None] | None = None
        self._ready = asyncio.Event()

    @contextlib.asynccontextmanager
    async def watch(self, gid: str = "*") -> AsyncIterator[Watch]:
        """Watch one group, or all groups of the namespace. Nothing that happens after this was entered is missed."""
        watch, channel = Watch(), self._keys.events_channel(gid)
        first = channel not in self._watches
        self._watches.setdefault(channel, set()).add(watch)
        if self._listener is None:
            self._listener = asyncio.create_task(self._listen(), name="events")
        elif first and self._pubsub is not None:
            await self._send("subscribe", channel)
        # An unreachable server must not delay the waiter, which looks by itself every few seconds.
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(LOOK_S):
                await self._ready.wait()
        try:
            yield watch
        finally:
            watches = self._watches[channel]
            watches.discard(watch)
            if not watches:
                del self._watches[channel]
                if self._pubsub is not None:
                    await self._send("unsubscribe", channel)

    async def close(self) -> None:
        if self._listener is not None:
            self._listener.cancel()
            await asyncio.gather(self._listener, return_exceptions=True)
            self._listener = None

    async def _send(self, action: str, channel: str) -> None:
        kind = f"p{action}" if channel.endswith("*") else action
        # The listener repairs a broken connection, and subscribes to all channels again. If we sent here, redis-py
        # would reconnect, and leave open the connection that the listener may be making.
        connection = self._pubsub.connection
        if connection is not None and connection.is_connected:
            with contextlib.suppress(*DISCONNECTED), carrying():
                await getattr(self._pubsub, kind)(channel)

    async def _listen(self) -> None:
        pause = 0.1
        while True:
            try:
                async with subscribed(self._url) as pubsub:
                    # No group has this channel, so nothing arrives on it: it keeps the connection open while there is
                    # no waiter.
                    await pubsub.subscribe(self._keys.events_channel(""))
                    self._pubsub = pubsub
                    for channel in list(self._watches):
                        await self._send("subscribe", channel)
                    heed_cancellation()
                    self._ready.set()
                    # Notifications may have been lost before the subscription, so every waiter looks at everything.
                    for watches in list(self._watches.values()):
                        for watch in list(watches):
                            watch.tell(None)
                    async for message in heard(pubsub):
                        pause = 0.1
                        self._dispatch(message)
            except Exception as error:
                heed_cancellation()
                complain(UNHEARD, error)
            finally:
                self._pubsub = None
            await asyncio.sleep(pause)
            pause = min(2 * pause, 5.0)

    def _dispatch(self, message: dict[str, Any]) -> None:
        if message["type"] not in ("message", "pmessage"):
            return
        gid = message["channel"].rsplit("events:", 1)[1]
        for watch in list(self._watches.get(message["pattern"] or message["channel"], ())):
            watch.tell(gid)
