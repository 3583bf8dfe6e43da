"""
The monitor: reports when goals settle, enforces deadlines, runs callable goals, and records statistics.

Every verdict is a compare-and-set in Redis, so no monitor decides anything alone: there may be several, or none for an
hour. A notification only wakes the monitor; it reads each group's events from where it stopped.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable
from dataclasses import dataclass, field
from typing import Literal

from loguru import logger

from rq_ceylon.checks import CHECK_S, CheckHangsError, Checks
from rq_ceylon.errors import CeylonError, ConnectionLostError
from rq_ceylon.goals import how_settled
from rq_ceylon.handlers import GoalCheck, Registry
from rq_ceylon.maintenance import judge, maintain
from rq_ceylon.models import GoalStatus, GroupStatus, counted
from rq_ceylon.presence import BEAT_S, Presence
from rq_ceylon.store import queries, transitions
from rq_ceylon.store.codec import encode
from rq_ceylon.store.connection import Connection, until_reached
from rq_ceylon.store.events import LOOK_S, EventHub, Watch
from rq_ceylon.store.keys import Keys
from rq_ceylon.store.redis_errors import complain
from rq_ceylon.store.statistics import GroupStatistics, summary
from rq_ceylon.views import GoalView, GroupView

COALESCE_S = 0.02
"""Notifications that arrive within this time after a look are handled together by the next."""

BACKOFF_S = 1.0
"""Longest pause between two attempts to reach Redis."""


@dataclass
class _Watched:
    """
    The monitor's knowledge of one group. `created_ms` distinguishes the group from an earlier one with the same id.

    Attributes:
        checks: callables that run now, by goal. `again` says that the group has changed meanwhile.
    """

    created_ms: int | None
    statistics: GroupStatistics = field(default_factory=GroupStatistics)
    announced: set[str] = field(default_factory=set)
    finished: bool = False
    checks: dict[str, asyncio.Task[None]] = field(default_factory=dict)
    again: bool = False


class Monitor:
    """
    Watches all groups of a namespace until stopped.

    Args:
        registry: has the callables for goals with `call: <name>`.
    """

    def __init__(
        self,
        url: str,
        *,
        namespace: str = "ceylon",
        registry: Registry | None = None,
        name: str | None = None,
    ) -> None:
        self.url, self.keys, self.registry = url, Keys(namespace), registry or Registry()
        self.presence = Presence(self.keys, "monitor", name, task_names=list(self.registry.goal_checks))
        self.name = self.presence.name
        self._groups: dict[str, _Watched] = {}
        self._deadlines: dict[str, int] = {}
        self._said: set[tuple[str, ...]] = set()
        self._checks = Checks()
        self._stop = asyncio.Event()
        self._minute: int | None = None

    def stop(self) -> None:
        """End `run`. May be called twice."""
        self._stop.set()

    async def run(self) -> None:
        """
        Watch until stopped. If Redis is not reachable at the start, wait for it.

        Raises:
            RedisError: Redis is not suitable, or refuses this user.
        """
        connection, hub = Connection(self.url), EventHub(self.url, self.keys)
        try:
            await until_reached(connection.check, self._stop)
            # Goals that settled earlier are not news.
            for view in await until_reached(lambda: queries.groups(connection, self.keys), self._stop) or ():
                settled = {goal.name for goal in view.goals if goal.settled}
                self._groups[view.id] = _Watched(view.created_ms, announced=settled, finished=view.is_finished)
            if self._stop.is_set():
                return
            logger.info("Monitor {} watches namespace {}", self.name, self.keys.namespace)
            maintenance = maintain(self.url, self.keys)
            await self._until_stopped(self._watch(connection, hub), maintenance, self._beat())
            await connection.run(self.presence.farewell())
        except ConnectionLostError as error:
            if not self._stop.is_set():
                raise
            logger.warning("Ended without removing its heartbeat, which expires by itself: {}", error)
        finally:
            self._checks.close()
            await hub.close()
            await connection.close()

    async def _until_stopped(self, *bodies: Awaitable[None]) -> None:
        tasks = [asyncio.ensure_future(body) for body in (*bodies, self._stop.wait())]
        try:
            done, _ = await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
            for task in done:
                task.result()
        finally:
            tasks += [check for watched in self._groups.values() for check in watched.checks.values()]
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)

    def _once(self, *key: str) -> bool:
        """True the first time: for messages that every look would log again. A key begins with its group."""
        if key in self._said:
            return False
        self._said.add(key)
        return True

    # ---- watching ----------------------------------------------------------------------------------------------------
    async def _watch(self, connection: Connection, hub: EventHub) -> None:
        lost, pause_s, look_all_at = False, 0.05, 0.0
        async with hub.watch() as watch:
            gids: set[str | None] = {None}
            while True:
                look_all = None in gids or time.monotonic() >= look_all_at
                try:
                    await self._look(connection, watch, {gid for gid in gids if gid}, everything=look_all)
                    rest_s = await self._judge_due(connection, watch)
                except Exception as error:
                    if not isinstance(error, ConnectionLostError):
                        complain("Groups cannot be watched now", error)
                    elif not lost:
                        logger.warning("{}; trying again until it answers", error)
                    lost, gids = True, {None}
                    await asyncio.sleep(pause_s)
                    pause_s = min(2 * pause_s, BACKOFF_S)
                    continue
                if lost:
                    logger.info("Redis answers again")
                if look_all:
                    look_all_at = time.monotonic() + LOOK_S
                lost, pause_s = False, 0.05
                await asyncio.sleep(min(COALESCE_S, rest_s))
                gids = await watch.wait(max(0.001, rest_s - COALESCE_S))

    async def _look(self, connection: Connection, watch: Watch, gids: set[str], *, everything: bool) -> None:
        """Look at these groups, with `everything` at all unfinished ones too. Forget groups that are gone."""
        if everything:
            known = set(await queries.group_ids(connection, self.keys))
            for gid in set(self._groups) - known:
                self._forget(gid)
            gids = gids | {gid for gid in known if gid not in self._groups or not self._groups[gid].finished}
        async for gid, view in queries.views(connection, self.keys, sorted(gids)):
            if view is None:
                self._forget(gid)
                continue
            try:
                await self._read(connection, watch, view)
            except ConnectionLostError:
                raise
            except Exception as error:  # of this group alone
                complain(f"Group {gid} cannot be watched", error)

    def _forget(self, gid: str) -> None:
        self._deadlines.pop(gid, None)
        self._said = {key for key in self._said if key[0] != gid}
        watched = self._groups.pop(gid, None)
        for check in watched.checks.values() if watched else ():
            check.cancel()

    async def _read(self, connection: Connection, watch: Watch, view: GroupView) -> None:
        watched = self._groups.get(view.id)
        if watched is None or watched.created_ms != view.created_ms:
            self._forget(view.id)
            watched = self._groups[view.id] = _Watched(view.created_ms)
        elif view.events < watched.statistics.seq:  # Redis lost the newest of them.
            watched.statistics, watched.finished = GroupStatistics(), False
        if watched.finished and watched.statistics.seq == view.events:  # else tasks were retried
            return
        await watched.statistics.read_on(connection, self.keys, view.id, view.events)
        watched.announced &= {goal.name for goal in view.goals if goal.settled}  # a retry may have unsettled some
        for goal in view.goals:
            if goal.settled and goal.name not in watched.announced:
                watched.announced.add(goal.name)
                self._announce(view, goal)
        self._deadlines.pop(view.id, None)
        if deadlines := [goal.deadline_ms for goal in view.goals if goal.deadline_ms and not goal.settled]:
            self._deadlines[view.id] = min(deadlines)
        if view.is_finished:
            lines = summary(view, watched.statistics).splitlines()
            logger.info("{}", "; ".join(line.strip() for line in lines))  # a record of the log is one line
            watched.finished = True
            watched.statistics.roles.clear()
        else:
            self._start_checks(connection, watch, view, watched)

    def _announce(self, view: GroupView, goal: GoalView) -> None:
        achieved = goal.status is GoalStatus.ACHIEVED
        level, message = ("INFO", goal.success_message) if achieved else ("WARNING", goal.failure_message)
        words = f'Goal {goal.status}: {goal.name} of "{view.name}" ({how_settled(goal)}).'
        logger.log(level, "{}{}", words, f" {message}" if message else "")

    # ---- deadlines and callables -------------------------------------------------------------------------------------
    async def _judge_due(self, connection: Connection, watch: Watch) -> float:
        """Judge goals whose deadline has passed. Returns the seconds to the next one by the server's clock."""
        if not self._deadlines:
            return LOOK_S
        now_ms = await queries.server_ms(connection, self.keys)
        for gid in [gid for gid, due_ms in self._deadlines.items() if due_ms <= now_ms]:
            try:
                await judge(connection, self.keys, gid)
            except ConnectionLostError:
                raise
            except Exception as error:
                complain(f"Group {gid} cannot be judged, or the groups that wait for it cannot be told", error)
            del self._deadlines[gid]
            watch.tell(gid)
        nearest = min(self._deadlines.values(), default=now_ms + LOOK_S * 1000)
        return float(min(LOOK_S, max(0.001, (nearest - now_ms) / 1000)))

    def _start_checks(self, connection: Connection, watch: Watch, view: GroupView, watched: _Watched) -> None:
        """
        Run the callables of undecided goals beside the watching, since they are users' code; each goal has one call at
        a time.
        """

        def done(_: asyncio.Task[None]) -> None:
            if watched.again:
                watched.again = False
                watch.tell(view.id)

        for goal in view.goals:
            if goal.call is None or goal.settled:
                continue
            check = self.registry.goal_checks.get(goal.call)
            running = watched.checks.get(goal.name)
            if check is None:
                if self._once("", goal.call):
                    words = 'Goal {} of "{}" calls {}, which this monitor does not know; see ceylon-monitor --app'
                    logger.warning(words, goal.name, view.name, goal.call)
            elif running is not None and not running.done():
                watched.again = True
            else:
                task = asyncio.create_task(self._check(connection, view, goal, check))
                task.add_done_callback(done)
                watched.checks[goal.name] = task

    async def _check(self, connection: Connection, view: GroupView, goal: GoalView, check: GoalCheck) -> None:
        """
        Ask a callable. True achieves the goal; anything else leaves it undecided, or fails it once no task is left that
        could change that. If the callable raises or hangs, the goal stays undecided and the callable is asked again.
        """

        def hangs() -> None:
            if self._once(view.id, goal.name, "hangs"):
                words = 'Goal {} of "{}": {} has not answered for {:g} s, so the goal stays undecided; {} by now'
                hanging = counted(self._checks.hanging, "callable hangs", "callables hang")
                logger.error(words, goal.name, view.name, goal.call, CHECK_S, hanging)

        achieved = await self._checks.ask(str(goal.call), check, view, on_hang=hangs)
        if isinstance(achieved, BaseException):
            if not isinstance(achieved, CheckHangsError) and self._once(view.id, goal.name, repr(achieved)):
                words = 'Goal {} of "{}": its callable failed, so the goal stays undecided'
                logger.opt(exception=achieved).error(words, goal.name, view.name)
            return
        if achieved or (view.status is GroupStatus.CLOSING and view.counters.open == 0):
            verdict: Literal["achieved", "failed"] = "achieved" if achieved else "failed"
            try:
                await judge(connection, self.keys, view.id, goal=goal.name, verdict=verdict)
            except ConnectionLostError:
                return  # the watching side logs it, and its next look asks again
            except CeylonError as error:
                if self._once(view.id, goal.name, str(error)):
                    logger.error('Goal {} of "{}" cannot be settled: {}', goal.name, view.name, error)

    # ---- beside it ---------------------------------------------------------------------------------------------------
    async def _beat(self) -> None:
        async with Connection(self.url) as connection:
            while True:
                try:
                    await connection.run(self.presence.beat(stopping=self._stop.is_set()))
                    await self._sample(connection)
                except Exception as error:
                    complain("The heartbeat or a sample cannot be sent", error)
                await asyncio.sleep(BEAT_S)

    async def _sample(self, connection: Connection) -> None:
        """Once a minute, record each role's totals and backlog. Several monitors write the same values."""
        minute = await queries.server_ms(connection, self.keys) // 60_000
        if minute == self._minute:
            return
        for role in await queries.roles(connection, self.keys):
            meta = await queries.role_meta(connection, self.keys, role.name)
            facts = {
                name: getattr(role, name) for name in ("queued", "delivered", "delayed", "slots", "busy", "totals")
            }
            facts |= {name: int(meta.get(name, 0)) for name in ("run_ms", "wait_ms")}
            calls = transitions.sample(self.keys, role.name, minute, encode(facts), previous=self._minute)
            await connection.run(calls)
        self._minute = minute
