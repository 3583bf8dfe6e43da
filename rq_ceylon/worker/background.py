"""The background tasks of a worker: bells, cancellations, heartbeat, dead neighbours, maintenance."""

from __future__ import annotations

import asyncio
import collections
import time
from collections.abc import Awaitable, Callable

from rq_ceylon.maintenance import maintain
from rq_ceylon.presence import BEAT_S, Presence
from rq_ceylon.process import own_task
from rq_ceylon.store import queries
from rq_ceylon.store.connection import UNHEARD, Connection, heard, subscribed
from rq_ceylon.store.keys import Keys
from rq_ceylon.store.node import heed_cancellation
from rq_ceylon.store.redis_errors import complain
from rq_ceylon.store.scripts import Call
from rq_ceylon.worker.executor import Executor
from rq_ceylon.worker.neighbours import LOOK_S, Neighbours
from rq_ceylon.worker.turn import Turns

BELL_S = 0.5
"""The longest wait on the bells. If a token is lost, work starts this late at worst while a slot is free."""


class Background:
    """
    The tasks of the event loop that run beside the turns of one worker. They have connections of their own, so that
    none of them holds up a turn.

    Args:
        on_bell: called when a bell rang, or after the longest wait without one.

    Attributes:
        idle: set by the worker while it has a free slot and nothing to send. Only then does it wait on the bells.
    """

    def __init__(
        self,
        url: str,
        keys: Keys,
        *,
        presence: Presence,
        turns: Turns,
        executor: Executor,
        neighbours: Neighbours,
        on_bell: Callable[[], None],
    ) -> None:
        self._url, self._keys, self._presence, self._turns = url, keys, presence, turns
        self._executor, self._neighbours, self._on_bell = executor, neighbours, on_bell
        self._connection = Connection(url)
        self._bells = Connection(url)
        self._tasks: list[asyncio.Task[None]] = []
        self.idle = asyncio.Event()

    def start(self) -> None:
        for name, body in (
            ("bell", self._listen_to_bells()),
            ("heartbeat", self._every("The heartbeat cannot be sent", self._beat_s, self._beat)),
            ("looks", self._every("Cancellations cannot be looked for", self._beat_s, self._look)),
            ("control", self._listen_to_control()),
            (
                "neighbours",
                self._every("Dead neighbours cannot be looked for", lambda: LOOK_S, self._look_at_neighbours),
            ),
            ("maintenance", maintain(self._url, self._keys)),
        ):
            self._tasks.append(own_task(body, name=name))

    def check(self) -> None:
        """Raise the error that ended one of the tasks, if one did: the worker cannot go on without it."""
        for task in self._tasks:
            if task.done():
                task.result()

    async def stop(self) -> None:
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        await self._connection.close()
        await self._bells.close()

    def heartbeat(self) -> list[Call]:
        now_ms, now = time.time() * 1000, time.monotonic()
        tasks = {
            f"{held.delivery.gid}/{held.delivery.tid}": round(now_ms - (now - held.since) * 1000)
            for held in self._turns.running()
        }
        return self._presence.beat(
            stopping=self._turns.stopping,
            tasks=tasks,
            progress=self._executor.reported(),
            low_marks=self._turns.low_marks(),
            hung=self._executor.hung,
            is_exhausted=self._executor.is_exhausted,
        )

    async def _listen_to_bells(self) -> None:
        bells = [self._keys.role_part(role, "bell") for role in self._turns.roles]
        while True:
            await self.idle.wait()
            due = self._turns.next_due_s
            try:
                await self._bells.pop(bells, BELL_S if due is None else min(BELL_S, max(due, 0.01)))
            except Exception as error:
                # Ring all the same: the turn that follows meets the same trouble, reports it, and waits.
                complain("The bell cannot be heard, so work starts late", error)
                await asyncio.sleep(BELL_S)
            self.idle.clear()
            self._on_bell()

    async def _listen_to_control(self) -> None:
        pause = 0.1
        while True:
            try:
                async with subscribed(self._url) as pubsub:
                    await pubsub.subscribe(self._keys.control_channel)
                    heed_cancellation()
                    async for message in heard(pubsub):
                        pause = 0.1
                        if message["type"] == "message":
                            await self._look()
            except Exception as error:
                heed_cancellation()
                complain(UNHEARD, error)
                await asyncio.sleep(pause)
                pause = min(2 * pause, 5.0)

    async def _every(self, what: str, pause_s: Callable[[], float], body: Callable[[], Awaitable[None]]) -> None:
        while True:
            try:
                await body()
            except Exception as error:
                complain(what, error)
            await asyncio.sleep(pause_s())

    def _beat_s(self) -> float:
        return min(BEAT_S, self._turns.lease_ms / 3000)

    async def _beat(self) -> None:
        await self._connection.run(self.heartbeat())

    async def _look(self) -> None:
        """Read which of the tasks that run here must stop, and cancel them."""
        wanted: dict[str, list[str]] = collections.defaultdict(list)
        running = {}
        for held in self._turns.running():
            delivery = held.delivery
            wanted[delivery.gid].append(delivery.tid)
            running[delivery.gid, delivery.tid] = (delivery.role, delivery.fence)
        if wanted:
            for key in await queries.stopping(self._connection, self._keys, wanted):
                self._executor.cancel(*running[key], "cancelled")

    async def _look_at_neighbours(self) -> None:
        await self._neighbours.bury_dead(self._connection)
