"""
The events of a group as they are recorded, and the notifications that there are new ones.

A notification says "look now" and nothing else: it may be lost, doubled, or early. The record is the group's list.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass
from typing import Any, NamedTuple

import redis

from rq_ceylon.store.connection import subscribed
from rq_ceylon.store.keys import Keys

SILENCE_S = 15.0
"""After this long without a word from the server it is asked for one; after twice as long the connection is dead."""

_PAUSE_S = (0.05, 2.0)


class TaskEvent(NamedTuple):
    """
    What became of one task: completed, failed, cancelled, retry or release.
    """

    tid: str
    outcome: str
    role: str
    wait_ms: int
    run_ms: int


@dataclass(frozen=True, slots=True)
class Event:
    """
    One change of a group. Tasks that were cancelled because the group closed are not listed.

    Attributes:
        seq: its position in the group's list, from 1.
        at_ms: server time, epoch ms.
        kind: what caused it: submit, claim, commit, outbox, seal, cancel, judge.
        goals: those settled by it, with their status.
        status: the group's new status, empty if it stayed.
    """

    seq: int
    at_ms: int
    kind: str
    tasks: list[TaskEvent]
    goals: list[tuple[str, str]]
    status: str


def event_of(seq: int, text: str) -> Event:
    """
    An event record: `ms|kind|tid,outcome,role,wait,run ...|goal:status ...|status`.
    """
    at, kind, tasks, goals, status = text.split("|")
    return Event(
        seq=seq,
        at_ms=int(at),
        kind=kind,
        tasks=[_task_event(item) for item in tasks.split()],
        goals=[(name, settled) for name, _, settled in (item.rpartition(":") for item in goals.split())],
        status=status,
    )


def _task_event(item: str) -> TaskEvent:
    tid, outcome, role, wait, run = item.split(",")
    return TaskEvent(tid, outcome, role, int(float(wait)), int(float(run)))


class Watch:
    """
    Waits for notifications. One that came between two waits ends the second at once.
    """

    def __init__(self) -> None:
        self._woken = asyncio.Event()
        self._gids: dict[str | None, None] = {}

    def notify(self, gid: str | None) -> None:
        """
        Wake it: there is news of this group, or, with None, there may be of any.
        """
        self._gids[gid] = None
        self._woken.set()

    async def wait(self, timeout_s: float) -> list[str | None]:
        """
        Return on a notification, on a reconnect, or at the timeout. What is returned are the groups to look at, each
        once; None among them says that any may have news.
        """
        with suppress(TimeoutError):
            async with asyncio.timeout(timeout_s):
                await self._woken.wait()
        self._woken.clear()
        gids, self._gids = self._gids, {}
        return list(gids) or [None]


class EventHub:
    """
    One pub/sub connection for all who wait in one event loop. It connects when the first comes, reconnects as long as
    somebody waits, and wakes everybody after it: what was told in between is lost.
    """

    def __init__(self, url: str, keys: Keys) -> None:
        self._url, self._keys = url, keys
        self._start = keys.events_channel("")  # itself a channel that nobody publishes to: it keeps the subscription up
        self._watches: dict[str, set[Watch]] = {}
        self._pubsub: Any = None
        self._runner: asyncio.Task[None] | None = None

    @asynccontextmanager
    async def watch(self, gid: str) -> AsyncIterator[Watch]:
        """
        Watch one group. The server's word that the subscription stands counts as the first notification, so that
        nothing is missed which happened before it.
        """
        channel = self._keys.events_channel(gid)
        watch = Watch()
        try:
            await self._add(channel, watch)
            yield watch
        finally:
            await self._remove(channel, watch)

    async def watch_all(self, every_s: float) -> AsyncIterator[str | None]:
        """
        The ids of groups that have news, as it comes; None, "look at everything", after each connect and after
        `every_s` of silence. To be closed (`contextlib.aclosing`).
        """
        watch, pattern = Watch(), self._start + "*"
        try:
            await self._add(pattern, watch)
            while True:
                for gid in await watch.wait(every_s):
                    yield gid
        finally:
            await self._remove(pattern, watch)

    async def close(self) -> None:
        """
        Disconnect. Who still waits is woken by its timeout only.
        """
        runner, self._runner = self._runner, None
        if runner is not None:
            runner.cancel()
            await asyncio.wait([runner])

    async def _add(self, channel: str, watch: Watch) -> None:
        watches = self._watches.setdefault(channel, set())
        watches.add(watch)
        if self._runner is None or self._runner.done():
            self._runner = asyncio.create_task(self._run(), name="ceylon events")
        elif len(watches) == 1:
            await self._tell("subscribe", channel)
        else:
            watch.notify(None)  # the subscription stands, and nobody will say so again

    async def _remove(self, channel: str, watch: Watch) -> None:
        watches = self._watches[channel]
        watches.discard(watch)
        if not watches:
            del self._watches[channel]
            await self._tell("unsubscribe", channel)

    async def _tell(self, what: str, channel: str) -> None:
        # Unheard, it is made good by the runner, which subscribes to all that is watched when it connects.
        if self._pubsub is not None:
            with suppress(redis.RedisError, OSError):
                await getattr(self._pubsub, "p" + what if channel.endswith("*") else what)(channel)

    async def _run(self) -> None:
        pause = _PAUSE_S[0]
        while True:
            with suppress(redis.RedisError, OSError):
                async with subscribed(self._url) as pubsub:
                    await pubsub.subscribe(self._start, *(name for name in self._watches if not name.endswith("*")))
                    if patterns := [name for name in self._watches if name.endswith("*")]:
                        await pubsub.psubscribe(*patterns)
                    self._pubsub = pubsub
                    try:
                        # Somebody may have come while the lines above waited.
                        for name in self._watches.keys() - pubsub.channels.keys() - pubsub.patterns.keys():
                            await self._tell("subscribe", name)
                        async for message in _messages(pubsub):
                            pause = _PAUSE_S[0]
                            self._pass_on(message)
                    finally:
                        self._pubsub = None
            await asyncio.sleep(pause)
            pause = min(pause * 2, _PAUSE_S[1])

    def _pass_on(self, message: dict[str, Any]) -> None:
        match message["type"]:
            case "message":
                channel, gid = message["channel"], message["channel"].removeprefix(self._start)
            case "pmessage":
                channel, gid = message["pattern"], message["channel"].removeprefix(self._start)
            case "subscribe" | "psubscribe":
                channel, gid = message["channel"], None
            case _:
                return
        for watch in self._watches.get(channel, ()):
            watch.notify(gid)


async def _messages(pubsub: Any) -> AsyncIterator[dict[str, Any]]:
    """
    All messages, until the connection ends or is silent for too long.
    """
    asked = False
    while True:
        message = await pubsub.get_message(timeout=SILENCE_S)
        if message is not None:
            asked = False
            yield message
        elif asked:
            return
        else:
            asked = True
            await pubsub.ping()
