"""
The worker as it runs: turns, the bell, heartbeats, and handlers in between.
"""

from __future__ import annotations

import asyncio
import collections
import contextlib
import inspect
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from loguru import logger

from rq_ceylon.errors import CeylonError, ConnectionLostError
from rq_ceylon.handlers import Registry
from rq_ceylon.maintenance import maintain
from rq_ceylon.models import check_id
from rq_ceylon.presence import BEAT_S, Presence, is_unroutable
from rq_ceylon.store import queries, transitions
from rq_ceylon.store.codec import decode, task_parts
from rq_ceylon.store.connection import Connection, subscribed
from rq_ceylon.store.keys import Keys
from rq_ceylon.store.places import heed_cancellation
from rq_ceylon.store.scripts import Call
from rq_ceylon.store.transitions import Committed
from rq_ceylon.worker.executor import WAIT_S, Executor
from rq_ceylon.worker.leases import Leases
from rq_ceylon.worker.neighbours import LOOK_S, Neighbours
from rq_ceylon.worker.outcome import UNKNOWN, Assignment, Outcome
from rq_ceylon.worker.turn import Granted, Held, Stage, Turns

BELL_S = 0.5
"""Longest blocking wait: work starts at worst so late while a slot is free."""

BURST_WAIT_S = 60.0
"""A burst worker waits for entries (retries, say) that are due within this time, and leaves later ones."""


class Worker:
    """
    Runs the tasks of some roles until it is stopped.

    Args:
        url: where Redis is.
        roles: which tasks; in no order of preference.
        slots: how many tasks at once.
        threads: how many plain functions at once.
        lease_s: how long a silent worker keeps its tasks. The lease is the role's: a running role's is adopted.
        grace_s: how long running tasks may go on after `stop`.
        burst: end when there is nothing left to do.
    """

    def __init__(
        self,
        url: str,
        *,
        registry: Registry,
        roles: Sequence[str],
        namespace: str = "ceylon",
        name: str | None = None,
        slots: int = 100,
        threads: int = 16,
        lease_s: float = 30.0,
        grace_s: float = 25.0,
        burst: bool = False,
    ) -> None:
        self.url, self.registry, self.roles = url, registry, [check_id(role, "role") for role in dict.fromkeys(roles)]
        self.keys = Keys(namespace)
        self.presence = Presence(self.keys, "worker", name, task_names=registry.names(), roles=self.roles, slots=slots)
        self.name = self.presence.name
        self.slots, self.grace_s, self.burst = slots, grace_s, burst
        self.leases = Leases(url=url, keys=self.keys, worker=self.name, on_lost=self._lost_in_thread)
        self.turns = Turns(
            keys=self.keys,
            worker=self.name,
            roles=self.roles,
            slots=slots,
            lease_ms=round(lease_s * 1000),
            leases=self.leases,
        )
        self.completed = 0
        self._stop = asyncio.Event()
        self._cold = asyncio.Event()
        self._wake = asyncio.Event()
        self.neighbours = Neighbours(url, self.keys)
        self.executor = Executor(registry, threads=threads, on_freed=self._wake.set)
        self._idle = asyncio.Event()
        self._running: dict[tuple[str, int], tuple[Held, asyncio.Task[None]]] = {}
        self._defaults: dict[str, Mapping[str, Any]] = {"": {}}
        self._loop: asyncio.AbstractEventLoop | None = None
        self._lost_pause_s = 0.0

    # ---- from outside ------------------------------------------------------------------------------------------------
    def stop(self) -> None:
        """
        Take nothing new, finish what runs within the grace, give the rest back. May be called twice, or before `run`.
        """
        self._stop.set()
        self._wake.set()

    def kill(self) -> None:
        """
        Stop without grace: cancel what runs and give it back at once.
        """
        self._cold.set()
        self.stop()

    async def run(self) -> None:
        """
        Work until stopped.

        Raises:
            RedisError: Redis is not reachable at the start, or not fit for this.
        """
        self._loop = asyncio.get_running_loop()
        connection = Connection(self.url)
        try:
            await connection.check()
            await _call_all(self.registry.on_start)
            await connection.run([*self._heartbeat(), *self.presence.advertise()])
            self.leases.start()
            self.neighbours.enter(self.name, self.roles)
            logger.info(
                "Worker {} serves {} with {} slots: {}",
                self.name,
                ", ".join(self.roles),
                self.slots,
                ", ".join(self.registry.names()),
            )
            helpers = [
                asyncio.create_task(body, name=name)
                for name, body in (
                    ("bell", self._listen_to_bells()),
                    ("looks", self._look_regularly()),
                    ("control", self._listen_to_control()),
                    ("neighbours", self._look_at_neighbours()),
                    ("maintenance", maintain(self.url, self.keys, _log_maintenance)),
                )
            ]
            try:
                await self._work(connection, helpers)
            finally:
                for helper in helpers:
                    helper.cancel()
                await asyncio.gather(*helpers, return_exceptions=True)
            await self._leave(connection)
        finally:
            self.leases.stop()
            self.neighbours.leave()
            await self.executor.close()
            await _call_all(self.registry.on_stop)
            await connection.close()

    # ---- turns -------------------------------------------------------------------------------------------------------
    async def _work(self, connection: Connection, helpers: Sequence[asyncio.Task[None]]) -> None:
        shutdown: asyncio.Task[None] | None = None
        while True:
            if self._stop.is_set() and shutdown is None:
                shutdown = asyncio.create_task(self._shut_down(), name="shutdown")
            for helper in helpers:
                if helper.done():
                    helper.result()
            self._wake.clear()
            await self._take_turn(connection)
            if self.turns.is_idle() and not self._running and (self._stop.is_set() or self._burst_is_over()):
                break
            # A handler that ends at once takes so many passes of the loop; the next turn then carries them all.
            for _ in range(4):
                await asyncio.sleep(0)
            if not self.turns.is_due(self._free()):
                await self._rest()
        if shutdown is not None:
            shutdown.cancel()

    async def _take_turn(self, connection: Connection) -> None:
        """
        One round trip. What is not answered is repeated with the same arguments until it is; a fetch, which delivers,
        is followed by recovery instead.
        """
        steps = self.turns.plan(self._free())
        while steps:
            replies = await connection.run_each([step.call for step in steps])
            lost, unanswered = None, []
            for step, reply in zip(steps, replies, strict=True):
                if not isinstance(reply, ConnectionLostError):
                    step.absorb(reply)
                    continue
                lost = reply
                if step.lost is None:
                    unanswered.append(step)
                else:
                    step.lost()
            granted, self.turns.granted = self.turns.granted, []
            for grant in granted:
                self._start(connection, grant)
            if lost is not None:
                if self._lost_pause_s == 0:
                    logger.warning("{}; trying again until it answers", lost)
                self._lost_pause_s = min(max(2 * self._lost_pause_s, 0.02), 1.0)
                await asyncio.sleep(self._lost_pause_s)
            elif self._lost_pause_s > 0:
                logger.info("Redis answers again")
                self._lost_pause_s = 0.0
            steps = unanswered

    async def _rest(self) -> None:
        """
        Until a task ends, a bell rings, or the role's clock needs a fetch (every third of a lease).
        """
        self._idle.set()
        try:
            async with asyncio.timeout(self.turns.lease_ms / 3000):
                await self._wake.wait()
        except TimeoutError:
            pass
        finally:
            self._idle.clear()

    def _free(self) -> int:
        return max(0, self.slots - len(self._running) - self.executor.abandoned)

    def _burst_is_over(self) -> bool:
        due = self.turns.next_due_s
        return self.burst and self.turns.fetched_nothing and (due is None or due > BURST_WAIT_S)

    async def _listen_to_bells(self) -> None:
        """
        Whenever a slot is free and no turn is due, wait for new entries on a connection of its own.
        """
        connection = Connection(self.url)
        bells = [self.keys.role_part(role, "bell") for role in self.roles]
        try:
            while True:
                await self._idle.wait()
                if self._free() == 0 or self._stop.is_set():
                    self._idle.clear()
                    continue
                due = self.turns.next_due_s
                try:
                    await connection.pop(bells, BELL_S if due is None else min(BELL_S, max(due, 0.01)))
                except CeylonError:
                    # The turn that follows meets the same trouble, says so, and waits.
                    await asyncio.sleep(BELL_S)
                self._idle.clear()
                self._wake.set()
        finally:
            await connection.close()

    # ---- running -----------------------------------------------------------------------------------------------------
    def _start(self, connection: Connection, grant: Granted) -> None:
        delivery = grant.held.delivery
        runner = asyncio.create_task(self._run_one(connection, grant))
        self._running[delivery.role, delivery.fence] = (grant.held, runner)

    async def _run_one(self, connection: Connection, grant: Granted) -> None:
        delivery, claimed = grant.held.delivery, grant.claimed
        try:
            if grant.stop:
                outcome = Outcome(kind="stopped")
            else:
                try:
                    outcome = await self._execute(connection, grant)
                except CeylonError as error:
                    # Before the handler began: nothing of it ran, so it is given back.
                    logger.warning("{}/{} cannot start now: {}", delivery.gid, delivery.tid, error)
                    outcome = Outcome(kind="release", delay_ms=1000)
            if outcome.kind == "lost":
                self.turns.forget(grant.held)
                return
            self.completed += outcome.kind == "completed"
            self.turns.finish(
                grant.held,
                Committed(
                    delivery.tid,
                    delivery.fence,
                    outcome.kind,
                    outcome.reason,
                    outcome.delay_ms,
                    outcome.run_ms,
                    outcome.blob,
                ),
            )
            _log_end(delivery.gid, delivery.tid, claimed.attempt, outcome)
        finally:
            self._running.pop((delivery.role, delivery.fence), None)
            self._wake.set()

    async def _execute(self, connection: Connection, grant: Granted) -> Outcome:
        delivery, claimed = grant.held.delivery, grant.claimed
        *_, text = task_parts(claimed.task)
        defaults = self._defaults.get(grant.defaults)
        if defaults is None:
            if len(self._defaults) > 1000:
                self._defaults = {"": {}}
            defaults = self._defaults[grant.defaults] = decode(grant.defaults)
        body: dict[str, Any] = {**defaults, **decode(text)}
        needs: dict[str, Any] = {}
        if body.get("needs"):
            found = await queries.results(connection, self.keys, delivery.gid, body["needs"])
            needs = {tid: result.value for tid, result in found.items()}
        assignment = Assignment(
            group_id=delivery.gid,
            task_id=delivery.tid,
            role=delivery.role,
            worker=self.name,
            attempt=claimed.attempt,
            crashes=claimed.crashes,
            releases=claimed.releases,
            fence=delivery.fence,
            body=body,
            needs=needs,
        )

        def hold(until: float) -> None:
            self.leases.hold(delivery.role, delivery.entry, until + self.grace_s)

        hold(time.monotonic() + WAIT_S)
        outcome = await self.executor.run(assignment, begun=lambda context: hold(context.deadline))
        if outcome.reason == UNKNOWN and await is_unroutable(connection, self.keys, delivery.role, body["uses"]):
            return Outcome(kind="failed", reason="unroutable", blob=outcome.blob)
        return outcome

    def _lost_in_thread(self, role: str, entry: str) -> None:
        """
        Called by the lease thread: this entry is another worker's now.
        """
        if self._loop is not None:
            self._loop.call_soon_threadsafe(self._lost, role, entry)

    def _lost(self, role: str, entry: str) -> None:
        held = self.turns.held.get((role, entry))
        if held is None:
            return
        if held.stage is Stage.RUNNING:
            logger.warning("Lost the lease of {}/{}; its result will not count", held.delivery.gid, held.delivery.tid)
            self.executor.cancel(held.delivery.role, held.delivery.fence, "lost")
        self.turns.forget(held)

    # ---- beside the turns --------------------------------------------------------------------------------------------
    async def _look_regularly(self) -> None:
        connection = Connection(self.url)
        try:
            while True:
                try:
                    await self._look(connection)
                    await connection.run(self._heartbeat())
                except ConnectionLostError as error:
                    logger.debug("No heartbeat for now: {}", error)  # the turns go on, and say what they meet
                await asyncio.sleep(min(BEAT_S, self.turns.lease_ms / 3000))
        finally:
            await connection.close()

    async def _look_at_neighbours(self) -> None:
        connection = Connection(self.url)
        try:
            while True:
                await asyncio.sleep(LOOK_S)
                with contextlib.suppress(CeylonError):  # then at the next look, or when the lease ends
                    await self.neighbours.bury_dead(connection)
        finally:
            await connection.close()

    async def _listen_to_control(self) -> None:
        connection = Connection(self.url)
        pause = 0.1
        try:
            while True:
                try:
                    async with subscribed(self.url) as pubsub:
                        await pubsub.subscribe(self.keys.control_channel)
                        heed_cancellation()
                        async for message in pubsub.listen():
                            pause = 0.1
                            if message["type"] == "message":
                                await self._look(connection)
                except CeylonError:
                    heed_cancellation()
                    await asyncio.sleep(pause)
                    pause = min(2 * pause, 5.0)
        finally:
            await connection.close()

    async def _look(self, connection: Connection) -> None:
        """
        Cancel what runs here and should not any more.
        """
        wanted: dict[str, list[str]] = collections.defaultdict(list)
        running = {}
        for attempt, (held, _) in self._running.items():
            wanted[held.delivery.gid].append(held.delivery.tid)
            running[held.delivery.gid, held.delivery.tid] = attempt
        if wanted:
            for key in await queries.stopping(connection, self.keys, wanted):
                self.executor.cancel(*running[key], "cancelled")

    def _heartbeat(self) -> list[Call]:
        now_ms, now = time.time() * 1000, time.monotonic()
        tasks = {
            f"{held.delivery.gid}/{held.delivery.tid}": round(now_ms - (now - held.since) * 1000)
            for held, _ in self._running.values()
        }
        return self.presence.beat(stopping=self._stop.is_set(), tasks=tasks, low_marks=self.turns.low_marks())

    # ---- the end -----------------------------------------------------------------------------------------------------
    async def _shut_down(self) -> None:
        """
        Say in the records of what runs that this worker is stopping, so that losing it now counts no crash; then wait.
        """
        self.turns.stopping = True
        for held, _ in self._running.values():
            delivery = held.delivery
            self.turns.finish(held, Committed(delivery.tid, delivery.fence, "stopping", "", 0, 0, b""))
        self._wake.set()
        if self._running:
            logger.info("Stopping; {} tasks may run for {:.0f} s more", len(self._running), self.grace_s)
        try:
            async with asyncio.timeout(self.grace_s):
                await self._cold.wait()
        except TimeoutError:
            pass
        if self._running:
            logger.warning("Giving back {} tasks that still run", len(self._running))
        for role, fence in list(self._running):
            self.executor.cancel(role, fence, "shutdown")
        self._wake.set()

    async def _leave(self, connection: Connection) -> None:
        """
        Give back whatever is left, and go from the registry. If Redis is away now, the lease does the same later.
        """
        try:
            for role in self.roles:
                more = "1"
                while more == "1":
                    ((_, more),) = await connection.run([transitions.release_all(self.keys, role, self.name)])
            await connection.run(self.presence.farewell())
        except CeylonError as error:
            logger.warning("Left without farewell: {}", error)
        logger.info("Worker {} stopped after {} completed tasks", self.name, self.completed)


def _log_end(gid: str, tid: str, attempt: int, outcome: Outcome) -> None:
    if outcome.kind == "completed":
        logger.debug("{}/{} completed in {} ms", gid, tid, outcome.run_ms)
    elif outcome.kind == "retry":
        logger.warning(
            "{}/{} failed in attempt {} ({}), next in {} ms", gid, tid, attempt, outcome.summary, outcome.delay_ms
        )
    elif outcome.kind == "failed":
        logger.error("{}/{} failed ({}): {}", gid, tid, outcome.reason, outcome.summary)
    else:
        logger.info("{}/{} {} {}", gid, tid, outcome.kind, outcome.reason)


def _log_maintenance(error: CeylonError) -> None:
    logger.debug("No maintenance for now: {}", error)  # the turns go on, and say what they meet


async def _call_all(hooks: Sequence[Callable[[], Any]]) -> None:
    for hook in hooks:
        result = hook()
        if inspect.isawaitable(result):
            await result
