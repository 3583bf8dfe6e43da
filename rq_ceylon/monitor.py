"""
The monitor: says when goals settle, keeps deadlines, runs callable goals, and records statistics.

It decides nothing alone: every verdict is a compare-and-set in Redis, so there may be several monitors, or none for an
hour. A notification only wakes it; it reads each group's events from where it stopped.
"""

from __future__ import annotations

import asyncio
import contextlib
import importlib.metadata
import inspect
import os
import secrets
import socket
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field

from loguru import logger

from rq_ceylon.errors import CeylonError, ConnectionLostError, QueueFullError
from rq_ceylon.goals import parse
from rq_ceylon.handlers import Registry
from rq_ceylon.maintenance import Maintenance
from rq_ceylon.models import GoalStatus, GoalView, GroupView
from rq_ceylon.store import queries, statistics, transitions
from rq_ceylon.store.codec import encode
from rq_ceylon.store.connection import Connection
from rq_ceylon.store.events import LOOK_S, EventHub
from rq_ceylon.store.keys import Keys
from rq_ceylon.store.scripts import Call
from rq_ceylon.store.statistics import GroupStatistics

HEARTBEAT_TTL_MS = 15_000
SAMPLES_KEPT = 24 * 60
"""Minutes."""

SettledHook = Callable[[GroupView, GoalView], Awaitable[None] | None]


@dataclass
class _Watched:
    """
    What the monitor knows of one group.
    """

    seq: int
    statistics: GroupStatistics = field(default_factory=GroupStatistics)
    announced: set[str] = field(default_factory=set)
    finished: bool = False


class Monitor:
    """
    Watches all groups of a namespace until stopped.

    Args:
        registry: callables for goals with `call: <name>`.
        on_settled: told once of each goal that settles while this monitor watches.
    """

    def __init__(
        self,
        url: str,
        *,
        namespace: str = "ceylon",
        registry: Registry | None = None,
        name: str | None = None,
        on_settled: SettledHook | None = None,
    ) -> None:
        self.url, self.keys, self.registry = url, Keys(namespace), registry or Registry()
        host = (name or socket.gethostname().split(".")[0])[:24]
        self.name = f"{host}-{os.getpid()}-{secrets.token_hex(4)}"
        self._on_settled = on_settled
        self._groups: dict[str, _Watched] = {}
        self._deadlines: dict[str, int] = {}
        self._unknown: set[str] = set()
        self._started_ms = round(time.time() * 1000)
        self._stop = asyncio.Event()
        self._minute = 0

    def stop(self) -> None:
        """
        End `run`. May be called twice.
        """
        self._stop.set()

    async def run(self) -> None:
        """
        Watch until stopped.

        Raises:
            RedisError: Redis is not reachable at the start, or not fit for this.
        """
        connection, hub = Connection(self.url), EventHub(self.url, self.keys)
        try:
            await connection.check()
            with contextlib.suppress(QueueFullError):
                await connection.run(self._heartbeat())
            for view in await queries.groups(connection, self.keys):
                settled = {goal.name for goal in view.goals if goal.settled}
                self._groups[view.id] = _Watched(0, announced=settled, finished=view.is_finished)
            logger.info("Monitor {} watches namespace {}", self.name, self.keys.namespace)
            bodies = [self._watch(connection, hub), self._maintain(), self._beat()]
            tasks = [asyncio.create_task(body) for body in bodies]
            stop = asyncio.create_task(self._stop.wait())
            await asyncio.wait([*tasks, stop], return_when=asyncio.FIRST_COMPLETED)
            for task in [*tasks, stop]:
                task.cancel()
            ended = await asyncio.gather(*tasks, return_exceptions=True)
            for result in ended:
                if isinstance(result, Exception):
                    raise result
            await connection.run(transitions.farewell(self.keys, self.name))
        finally:
            await hub.close()
            await connection.close()

    # ---- watching ----------------------------------------------------------------------------------------------------
    async def _watch(self, connection: Connection, hub: EventHub) -> None:
        silent = False
        async with hub.watch_all() as watch:
            gids: set[str | None] = {None}
            while True:
                try:
                    await self._look(connection, gids)
                    silent = False
                except ConnectionLostError as error:
                    if not silent:
                        logger.warning("{}; trying again until it answers", error)
                    silent = True
                    await asyncio.sleep(0.5)
                    gids = {None}
                    continue
                gids = await watch.wait(await self._rest_s(connection))

    async def _look(self, connection: Connection, gids: set[str | None]) -> None:
        wanted = set(await queries.group_ids(connection, self.keys)) if not gids or None in gids else gids
        names = sorted(gid for gid in wanted if gid and not self._is_over(gid))
        for first in range(0, len(names), 100):
            some = names[first : first + 100]
            for gid, view in zip(some, await queries.views(connection, self.keys, some), strict=True):
                if view is None:
                    self._groups.pop(gid, None)
                    self._deadlines.pop(gid, None)
                else:
                    await self._read(connection, view)

    def _is_over(self, gid: str) -> bool:
        watched = self._groups.get(gid)
        return watched is not None and watched.finished

    async def _read(self, connection: Connection, view: GroupView) -> None:
        watched = self._groups.setdefault(view.id, _Watched(0))
        if view.events < watched.seq:
            # Redis lost events: begin again.
            watched.seq, watched.statistics = 0, GroupStatistics()
        while watched.seq < view.events:
            batch = await queries.events(connection, self.keys, view.id, watched.seq + 1)
            if not batch:
                break
            watched.statistics.add(batch)
            watched.seq = batch[-1].seq
        for goal in view.goals:
            if goal.settled and goal.name not in watched.announced:
                watched.announced.add(goal.name)
                await self._announce(view, goal)
        if view.is_finished and not watched.finished:
            watched.finished = True
            logger.info("{}", summary(view, watched.statistics))
        deadlines = [goal.deadline_ms for goal in view.goals if goal.deadline_ms and not goal.settled]
        self._deadlines.pop(view.id, None)
        if deadlines:
            self._deadlines[view.id] = min(deadlines)
        await self._run_callables(connection, view)

    async def _announce(self, view: GroupView, goal: GoalView) -> None:
        if goal.settled is None:
            return
        achieved = goal.status is GoalStatus.ACHIEVED
        words = parse(goal.when, goal.name).words(goal.settled.counters) if not goal.call else goal.when
        message = goal.success_message if achieved else goal.failure_message
        logger.log(
            "INFO" if achieved else "WARNING",
            'Goal {}: {} of "{}" ({}){}',
            "achieved" if achieved else "failed",
            goal.name,
            view.name,
            words if goal.settled.by != "deadline" else f"deadline passed; {words}",
            f". {message}" if message else "",
        )
        if self._on_settled is not None:
            told = self._on_settled(view, goal)
            if inspect.isawaitable(told):
                await told

    # ---- deadlines and callables -------------------------------------------------------------------------------------
    async def _rest_s(self, connection: Connection) -> float:
        """
        Judge what is due, and tell how long until the next deadline, by the server's clock.
        """
        if not self._deadlines:
            return LOOK_S
        now_ms = await queries.server_ms(connection, self.keys)
        for gid, due_ms in list(self._deadlines.items()):
            if due_ms <= now_ms:
                del self._deadlines[gid]
                await connection.run([transitions.judge(self.keys, gid)])
        nearest = min(self._deadlines.values(), default=now_ms + LOOK_S * 1000)
        return float(min(LOOK_S, max(0.001, (nearest - now_ms) / 1000)))

    async def _run_callables(self, connection: Connection, view: GroupView) -> None:
        for goal in view.goals:
            if goal.call is None or goal.settled:
                continue
            check = self.registry.goal_checks.get(goal.call)
            if check is None:
                if goal.call not in self._unknown:
                    self._unknown.add(goal.call)
                    logger.warning(
                        "Goal {} of {!r} calls {!r}, which this monitor does not know; start one with: "
                        "ceylon-monitor --app MODULE:APP",
                        goal.name,
                        view.name,
                        goal.call,
                    )
                continue
            try:
                verdict = await asyncio.to_thread(check, view)
                if inspect.isawaitable(verdict):
                    verdict = await verdict
            except Exception:
                logger.exception("Goal {} of {!r}: {} failed; not judged", goal.name, view.name, goal.call)
                continue
            ended = view.counters.open == 0 and view.counters.total > 0 and view.status == "closing"
            if verdict or ended:
                word = "achieved" if verdict else "failed"
                await connection.run([transitions.judge(self.keys, view.id, goal=goal.name, verdict=word)])  # type: ignore[arg-type]

    # ---- beside it ---------------------------------------------------------------------------------------------------
    async def _maintain(self) -> None:
        connection = Connection(self.url)
        maintenance = Maintenance(connection, self.keys)
        try:
            while True:
                try:
                    pause = await maintenance.run_once()
                except CeylonError as error:
                    logger.debug("No maintenance for now: {}", error)
                    pause = 1.0
                await asyncio.sleep(pause)
        finally:
            await connection.close()

    async def _beat(self) -> None:
        connection = Connection(self.url)
        try:
            while True:
                try:
                    await connection.run(self._heartbeat())
                    await self._sample(connection)
                except ConnectionLostError:
                    pass  # Said by the watching side.
                except CeylonError as error:
                    logger.error("Statistics cannot be recorded: {}", error)
                await asyncio.sleep(LOOK_S)
        finally:
            await connection.close()

    async def _sample(self, connection: Connection) -> None:
        """
        Once a minute, each role's totals and backlog; several monitors write the same.
        """
        minute = await queries.server_ms(connection, self.keys) // 60_000
        if minute == self._minute:
            return
        self._minute = minute
        for role in await queries.roles(connection, self.keys):
            found = statistics.of_role(await queries.role_meta(connection, self.keys, role.name))
            facts = {
                "queued": role.queued,
                "delivered": role.delivered,
                "delayed": role.delayed,
                "slots": role.slots,
                "busy": role.busy,
                "totals": dict(found.outcomes),
                "run_ms": found.run.total_ms,
                "wait_ms": found.wait.total_ms,
            }
            await connection.run(
                transitions.sample(self.keys, role.name, minute, encode(facts), oldest=minute - SAMPLES_KEPT)
            )

    def _heartbeat(self) -> list[Call]:
        facts = {
            "kind": "monitor",
            "host": socket.gethostname(),
            "pid": os.getpid(),
            "version": importlib.metadata.version("rq-ceylon"),
            "roles": [],
            "slots": 0,
            "task_names": sorted(self.registry.goal_checks),
            "tasks": {},
            "started_ms": self._started_ms,
            "stopping": self._stop.is_set(),
        }
        return transitions.heartbeat(self.keys, self.name, facts, ttl_ms=HEARTBEAT_TTL_MS)


def summary(view: GroupView, found: GroupStatistics) -> str:
    """
    How a group ended, in words: counts, rate, and per role run and wait times.
    """
    counters = view.counters
    lines = [
        f'Group "{view.name}" finished {view.outcome}: {counters.completed} completed, {counters.failed} failed, '
        f"{counters.cancelled} cancelled in {found.seconds:.1f} s ({found.rate:.1f}/s)"
    ]
    for name, role in sorted(found.roles.items()):
        if role.run.count:
            lines.append(
                f"  {name}: "
                + "; ".join(
                    f"{what} mean {times.mean_ms:.0f} ms, p50 {times.percentile_ms(0.5):.0f}, "
                    f"p95 {times.percentile_ms(0.95):.0f}, p99 {times.percentile_ms(0.99):.0f}"
                    for what, times in (("run", role.run), ("wait", role.wait))
                )
            )
    return "\n".join(lines)
