"""The worker: sends turns, and runs handlers in between."""

from __future__ import annotations

import asyncio
import collections
import time
from collections.abc import Coroutine, Iterator, Mapping, Sequence
from functools import lru_cache, partial
from typing import Any

from loguru import logger

from rq_ceylon.errors import CeylonError
from rq_ceylon.graph import MAX_NEEDS
from rq_ceylon.handlers import DEFAULT_HANDLER, Registry
from rq_ceylon.maintenance import relay
from rq_ceylon.models import check_id, counted
from rq_ceylon.presence import Presence, is_unroutable
from rq_ceylon.process import own_task
from rq_ceylon.settings import require_unix
from rq_ceylon.store import queries, transitions
from rq_ceylon.store.codec import decode, result_of, task_parts
from rq_ceylon.store.connection import Connection, until_reached
from rq_ceylon.store.keys import Keys
from rq_ceylon.store.transitions import Committed
from rq_ceylon.worker.background import Background
from rq_ceylon.worker.delivery import Granted, Held, Stage
from rq_ceylon.worker.executor import PLACE_S, START_S, Executor
from rq_ceylon.worker.hooks import Hooks
from rq_ceylon.worker.lanes import Lanes
from rq_ceylon.worker.leases import Leases
from rq_ceylon.worker.neighbours import Neighbours
from rq_ceylon.worker.outcome import BUSY, UNKNOWN, Assignment, Outcome, invalid, unroutable
from rq_ceylon.worker.turn import Turns
from rq_ceylon.worker.wear import jittered, memory_in_use

BURST_WAIT_S = 60.0
"""A burst worker waits for delayed entries (retries, say) that are due this soon, and not for later ones."""

HUNG_EXIT_CODE = 7
"""The exit code of a worker that ended because too many attempts hung."""

WEIGH_S = 1.0
"""How often a worker measures its memory."""

LAST_WORD_S = 2.0
"""How long a node may take to answer after the grace. What the worker could not tell it by then is left to others."""


class Worker:
    """
    Runs the tasks of some roles until it is stopped.

    Args:
        url: where Redis is.
        roles: the roles to serve; their order means nothing.
        slots: how many tasks may run at once.
        threads: how many plain functions may run at once.
        lease_s: how long a worker that stops responding keeps its tasks. The lease belongs to the role: if other
            workers serve it, theirs is adopted.
        grace_s: how long running tasks may go on after `stop`.
        burst: end when there is nothing left to do.
        max_tasks: drain and end after this many tasks, give or take 10 %. A child process ends likewise.
        max_memory: drain and end once this process takes this many bytes, give or take 10 %. A child process likewise.
        max_hung_threads: drain and end with exit code 7 once more attempts than this hang, give or take 10 %.

    Attributes:
        exit_code: the code with which the process should end after `run`.

    Raises:
        InvalidInputError: a bad name or role; or this is Windows, where no worker runs.
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
        max_tasks: int | None = None,
        max_memory: int | None = None,
        max_hung_threads: int | None = None,
    ) -> None:
        require_unix("a worker")
        self.url, self.registry, self.roles = url, registry, [check_id(role, "role") for role in dict.fromkeys(roles)]
        self.keys = Keys(namespace)
        self.presence = Presence(self.keys, "worker", name, task_names=registry.names(), roles=self.roles, slots=slots)
        self.name = self.presence.name
        self.slots, self.grace_s, self.burst = slots, grace_s, burst
        self.connection = Connection(url)
        self.lanes = Lanes(self.connection, on_answer=self._start_granted)
        self.leases = Leases(
            url=url, keys=self.keys, worker=self.name, roles=self.roles, lease_ms=round(lease_s * 1000)
        )
        self._wake = asyncio.Event()
        self.executor = Executor(
            registry, threads=threads, max_tasks=max_tasks, max_memory=max_memory, on_freed=self._wake.set
        )
        self.turns = Turns(
            keys=self.keys,
            worker=self.name,
            roles=self.roles,
            slots=slots,
            lease_ms=round(lease_s * 1000),
            leases=self.leases,
            knows=registry.names(),
            shares=self.executor.shares,
            may_send=self.lanes.is_open,
        )
        self.exit_code = 0
        self._ended_tasks, self._weighed = 0, 0.0
        self._max_tasks, self._max_memory, self._max_hung_threads = [
            None if limit is None else jittered(limit) for limit in (max_tasks, max_memory, max_hung_threads)
        ]
        self._stop = asyncio.Event()
        self._cold = asyncio.Event()
        self._grace_is_over = False
        self.neighbours = Neighbours(url, self.keys)
        self.background = Background(
            url,
            self.keys,
            presence=self.presence,
            turns=self.turns,
            executor=self.executor,
            neighbours=self.neighbours,
            on_bell=self._ring,
        )
        self._announced: set[str] = set()
        self._relays = 0
        self._running: dict[tuple[str, int], Held] = {}
        self._background: set[asyncio.Task[None]] = set()

    @property
    def completed(self) -> int:
        """How many tasks Redis counted as completed by this worker."""
        return self.turns.completed

    # ---- from outside ------------------------------------------------------------------------------------------------
    def stop(self) -> None:
        """Start no new tasks, let running ones finish within the grace, and give the rest back. May be called twice."""
        self.leases.stopping()
        self._stop.set()
        self._wake.set()

    def kill(self) -> None:
        """Stop without grace: cancel the running tasks and give them back at once."""
        self._cold.set()
        self.stop()

    async def run(self) -> None:
        """
        Work until stopped. If Redis cannot be reached at the start, wait for it.

        Raises:
            RedisError: this Redis cannot be used, or refuses this user.
            HookError: a start or stop hook raised.
        """
        try:
            await until_reached(self.connection.check, self._stop)
            if self._stop.is_set():
                return
            async with Hooks(self.registry) as hooks:
                self.executor.state = hooks.state
                try:
                    await self._serve()
                finally:
                    self.leases.stop()
                    # Unless `_leave` has said farewell, the lock becomes free here: neighbours give back what is held.
                    self.neighbours.leave(with_farewell=False)
                    await self.executor.close()
        finally:
            await self.connection.close()

    async def _serve(self) -> None:
        loop = asyncio.get_running_loop()
        await until_reached(lambda: self.connection.run(self.background.heartbeat()), self._stop)
        self.leases.start(lambda role, entry: loop.call_soon_threadsafe(self._lost, role, entry))
        self.neighbours.enter(self.name, self.roles)
        names = sorted({handler.name for handler in self.registry.own()}) or self.registry.names()
        words = "Worker {} serves {} with {}; it knows {}: {}"
        slots, tasks = counted(self.slots, "slot"), "the task" if len(names) == 1 else "the tasks"
        logger.info(words, self.name, ", ".join(self.roles), slots, tasks, ", ".join(names))
        self.background.start()
        try:
            await self._work()
        finally:
            for task in self._background:
                task.cancel()
            await self.lanes.close()
            await self.background.stop()
        await self._leave()

    # ---- turns -------------------------------------------------------------------------------------------------------
    async def _work(self) -> None:
        while True:
            if self._stop.is_set() and not self.turns.stopping:
                self.turns.stopping = True  # before the plan, so that `_shut_down` sees everything that starts
                self._keep(self._shut_down(), "shutdown")
            self.background.check()
            self.lanes.check()
            while self.turns.to_relay:
                self._relays += 1
                self._keep(self._relay(self.turns.to_relay.pop()), "relaying")
            self._wake.clear()
            if self.turns.is_due(self._free()):
                self.lanes.send(self.turns.plan(self._free()))
            if self._is_over():
                break
            await self._rest()
            # A handler that returns at once needs this many passes of the event loop, so one turn commits all of those.
            for _ in range(4):
                await asyncio.sleep(0)

    async def _relay(self, gid: str) -> None:
        """Submit the groups that follow this one."""
        try:
            await relay(self.connection, self.keys, gid, hidden=True)
        except CeylonError as error:
            logger.warning("What follows group {} is left to maintenance: {}", gid, error)
        finally:
            self._relays -= 1
            self._wake.set()

    async def _rest(self) -> None:
        """
        Wait until a node answers, a task ends or a bell rings; at most until fetched entries must be given back because
        they could not start, or until it is time to fetch again (every third of a lease).
        """
        if self._free() > 0 and not self._stop.is_set() and self.turns.may_fetch():
            self.background.idle.set()
        try:
            async with asyncio.timeout(LAST_WORD_S / 4 if self._grace_is_over else self.turns.rest_s):
                await self._wake.wait()
        except TimeoutError:
            self.turns.ring()
        finally:
            self.background.idle.clear()

    def _ring(self) -> None:
        self.turns.ring()
        self._wake.set()

    def _free(self) -> int:
        """How many more tasks may run. A hanging attempt takes no slot until more hang than there are threads."""
        return max(0, self.slots - len(self._running) - max(0, self.executor.hung - self.executor.hung_max))

    def _is_over(self) -> bool:
        if self._running or self.turns.to_relay or (self._relays and not self._grace_is_over):
            return False
        if self.lanes.in_flight:  # commits may be among them; after the grace, do not wait for nodes that are cut off
            return self._grace_is_over and self.lanes.are_cut_off(LAST_WORD_S)
        return self.turns.is_idle() and (self._stop.is_set() or self._burst_is_over())

    def _burst_is_over(self) -> bool:
        due = self.turns.next_due_s
        return self.burst and self.turns.fetched_nothing and (due is None or due > BURST_WAIT_S)

    # ---- running -----------------------------------------------------------------------------------------------------
    def _start_granted(self) -> None:
        granted, self.turns.granted = self.turns.granted, []
        waiting: dict[str, list[_Needy]] = collections.defaultdict(list)
        for grant in granted:
            delivery = grant.held.delivery
            self._running[delivery.role, delivery.fence] = grant.held
            if grant.stop:
                self._end(grant, Outcome("stopped"))
            elif self.turns.stopping:
                self._end(grant, Outcome("release"))
            else:
                self._start(grant, waiting[delivery.gid])
        for gid, some in waiting.items():
            for part in _by_needs(some):
                self._in_background(self._start_with_needs(gid, part), [grant for grant, *_ in part])
        self._wake.set()

    def _start(self, grant: Granted, waiting: list[_Needy]) -> None:
        """Start a granted task, or let it wait for the results of the tasks that it needs."""
        try:
            *_, text = task_parts(grant.claimed.task)
            body: dict[str, Any] = {**_defaults(grant.defaults), **decode(text)}
            grant.held.name = str(body.get("uses") or DEFAULT_HANDLER)
            if body.get("needs"):
                waiting.append((grant, body, [str(tid) for tid in body["needs"]]))
            else:
                self._execute(grant, body, {})
        except Exception as error:  # of any kind: without an outcome the task would be in progress for ever
            self._cannot_use(grant, error)

    async def _start_with_needs(self, gid: str, some: Sequence[_Needy]) -> None:
        """Start tasks of one group that need others, with one read of what all of them need."""
        needed = list({tid for *_, needs in some for tid in needs})
        texts = await queries.result_texts(self.connection, self.keys, gid, needed)
        for grant, body, needs in some:
            try:
                # Each task gets values of its own, since its handler may change them.
                values = {tid: result_of(tid, texts[tid]).value for tid in needs if tid in texts}
                self._execute(grant, body, values)
            except Exception as error:
                self._cannot_use(grant, error)

    def _execute(self, grant: Granted, body: Mapping[str, Any], needs: Mapping[str, Any]) -> None:
        delivery = grant.held.delivery

        def hold(until: float) -> None:
            self.leases.hold(delivery.role, delivery.entry, until + self.grace_s, running=delivery)

        if not self.turns.holds(grant.held):  # its lease was lost before there was an attempt to cancel
            self._end(grant, Outcome("lost"))
            return
        hold(time.monotonic() + PLACE_S + START_S)  # while it waits for its place; its own limit counts once it begins
        self.executor.start(
            Assignment(self.name, delivery, grant.claimed, body, needs),
            partial(self._ended, grant, body),
            begun=lambda context: hold(context.deadline),
        )

    def _ended(self, grant: Granted, body: Mapping[str, Any], outcome: Outcome) -> None:
        if outcome.reason.startswith(UNKNOWN):
            self._in_background(self._end_unknown(grant, body, outcome), [grant])
        else:
            self._end(grant, outcome)

    async def _end_unknown(self, grant: Granted, body: Mapping[str, Any], outcome: Outcome) -> None:
        if await is_unroutable(self.connection, self.keys, grant.held.delivery.role, body["uses"]):
            outcome = unroutable(grant.held.delivery.role, outcome)
        self._end(grant, outcome)

    def _in_background(self, body: Coroutine[Any, Any, None], grants: Sequence[Granted]) -> None:
        """Go on with granted tasks in an asyncio task of the worker's own, which runs none of the users' code."""

        async def guarded() -> None:
            try:
                await body
            except CeylonError as error:  # no handler has begun, so the tasks are given back
                for grant in grants:
                    logger.warning(
                        "{}/{} cannot start now: {}", grant.held.delivery.gid, grant.held.delivery.tid, error
                    )
                    self._end(grant, Outcome("release", delay_ms=1000))
            except Exception as error:
                for grant in grants:
                    self._cannot_use(grant, error)

        delivery = grants[0].held.delivery
        self._keep(guarded(), f"{delivery.gid}/{delivery.tid}")

    def _keep(self, body: Coroutine[Any, Any, None], name: str) -> None:
        task = own_task(body, name=name)
        self._background.add(task)
        task.add_done_callback(self._background.discard)

    def _cannot_use(self, grant: Granted, error: Exception) -> None:
        delivery = grant.held.delivery
        logger.opt(exception=error).error("{}/{} cannot be used", delivery.gid, delivery.tid)
        self._end(grant, invalid(error))

    def _end(self, grant: Granted, outcome: Outcome) -> None:
        """Note the outcome of an attempt. Only the first one counts."""
        delivery = grant.held.delivery
        if self._running.pop((delivery.role, delivery.fence), None) is None:
            return
        self._wake.set()
        if outcome.kind == "lost":  # another worker has the task, so nothing is committed or acknowledged
            self.turns.forget(grant.held)
            return
        if outcome.children:
            roles = {task_parts(child.text.decode())[0] for child in outcome.children} - self._announced
            self._announced |= roles
            self._keep(self._announce(roles), "announcing roles")
        self.turns.finish(grant.held, Committed(delivery.tid, delivery.fence, *outcome))
        _log_end(grant, outcome)
        if outcome.kind != "release":  # a task that was given back was not done here
            self._count_end()

    async def _announce(self, roles: set[str]) -> None:
        """Enter the roles of spawned tasks in the registry, where people and maintenance find them."""
        try:
            await self.connection.run([transitions.announce_role(self.keys, role) for role in roles])
        except CeylonError:
            self._announced -= roles  # the next task that spawns tries again

    def _count_end(self) -> None:
        """Drain and end if this process is worn out or too much hangs in it; its supervisor starts a fresh one."""
        self._ended_tasks += 1
        if self._stop.is_set():
            return
        if self._max_tasks is not None and self._ended_tasks >= self._max_tasks:
            logger.info("Draining: {} ended here, as many as --max-tasks wants", counted(self._ended_tasks, "task"))
            self.stop()
        elif self._max_hung_threads is not None and self.executor.hung > self._max_hung_threads:
            words = "Draining: {} hang, more than --max-hung-threads allows"
            logger.error(words, counted(self.executor.hung, "attempt"))
            self.exit_code = HUNG_EXIT_CODE
            self.stop()
        elif self._max_memory is not None and time.monotonic() >= self._weighed + WEIGH_S:
            self._weighed = time.monotonic()
            if (used := memory_in_use()) >= self._max_memory:
                words = "Draining: this process takes {:.0f} MiB, which --max-memory does not allow"
                logger.info(words, used / 2**20)
                self.stop()

    def _lost(self, role: str, entry: str) -> None:
        """Cancel and forget what runs under this entry, since another worker has it: its outcome would not count."""
        held = self.turns.held.get((role, entry))
        if held is None:
            return
        if held.stage is Stage.RUNNING:
            logger.warning("Lost the lease of {}/{}; its result will not count", held.delivery.gid, held.delivery.tid)
            self.executor.cancel(held.delivery.role, held.delivery.fence, "lost")
        self.turns.forget(held)

    # ---- the end -----------------------------------------------------------------------------------------------------
    async def _shut_down(self) -> None:
        """Let running tasks finish within the grace, or until `kill`; then cancel those that still run."""
        if self._running:
            logger.info("Stopping; {} may run for {:.0f} s more", counted(len(self._running), "task"), self.grace_s)
        try:
            async with asyncio.timeout(self.grace_s):
                await self._cold.wait()
        except TimeoutError:
            pass
        if self._running:
            logger.warning("Giving back what still runs: {}", counted(len(self._running), "task"))
        for role, fence in list(self._running):
            self.executor.cancel(role, fence, "shutdown")
        self._grace_is_over = True
        self._wake.set()

    async def _leave(self) -> None:
        """
        Give back all deliveries that are left, and leave the registry. If Redis cannot be reached now, neighbours give
        them back, or they are reclaimed when the lease ends.
        """
        roles = self.roles
        try:
            while roles:  # a call gives back a limited number, and says whether there are more
                calls = [transitions.release_all(self.keys, role, self.name) for role in roles]
                async with asyncio.timeout(LAST_WORD_S):
                    replies = await self.connection.run(calls)
                roles = [role for role, (_, more, _) in zip(roles, replies, strict=True) if more == "1"]
            async with asyncio.timeout(LAST_WORD_S):
                await self.connection.run(self.presence.farewell())
            self.neighbours.leave()
        except (CeylonError, TimeoutError) as error:
            logger.warning(
                "Left without farewell: other workers of this host give back what is left here, or its lease ends ({})",
                str(error) or "Redis did not answer in time",
            )
        logger.info("Worker {} stopped after {}", self.name, counted(self.completed, "completed task"))


_Needy = tuple[Granted, Mapping[str, Any], list[str]]
"""A granted task with its body and the tasks that it needs."""


def _by_needs(some: Sequence[_Needy]) -> Iterator[list[_Needy]]:
    """Tasks in parts that together need at most 256 others, since results may be large."""
    part: list[_Needy] = []
    needed: set[str] = set()
    for one in some:
        if part and len(needed.union(one[2])) > MAX_NEEDS:
            yield part
            part, needed = [], set()
        part.append(one)
        needed.update(one[2])
    if part:
        yield part


@lru_cache(32)  # few, as each is up to 64 KiB of JSON
def _defaults(text: str) -> Mapping[str, Any]:
    return decode(text) if text else {}


def _log_end(grant: Granted, outcome: Outcome) -> None:
    """Log one line for each attempt that has ended. The values in its text are fields of the log record as well."""
    delivery = grant.held.delivery
    fields: dict[str, Any] = {
        "function": grant.held.name,
        "task": f"{delivery.gid}/{delivery.tid}",
        "attempt": grant.claimed.attempt,
        "outcome": outcome.kind,
        "duration_ms": outcome.run_ms,
    }
    if outcome.kind == "completed":
        logger.info("{function} {task} completed in {duration_ms} ms, attempt {attempt}", **fields)
        return
    error = outcome.error
    fields |= {"reason": outcome.reason, "error": f"{error['type']}: {error['message']}" if error else ""}
    match outcome.kind:
        case "retry":
            words = "{function} {task} failed after {duration_ms} ms, attempt {attempt} ({reason}): {error}; "
            logger.warning(words + "next attempt in {delay_ms} ms", delay_ms=outcome.delay_ms, **fields)
        case "failed":
            words = "{function} {task} failed for good after {duration_ms} ms, attempt {attempt} ({reason}): {error}"
            logger.error(words, traceback=error.get("traceback", ""), **fields)
        case "stopped":
            logger.info("{function} {task} was cancelled after {duration_ms} ms, attempt {attempt}", **fields)
        case _ if outcome.reason.startswith(BUSY):
            logger.debug("{function} {task} waits for a free thread or process", **fields)
        case _:
            why = f" ({outcome.reason})" if outcome.reason else ""
            logger.info("{function} {task} is given back{why}, attempt {attempt}", why=why, **fields)
