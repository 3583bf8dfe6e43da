"""
Who takes part: worker processes, producers, clients of single tasks, maintenance, users. Each is a coroutine that gives
way at every script call; all that touches Redis is shipped code.
"""

from __future__ import annotations

import contextlib
import inspect
import random
from collections.abc import Callable, Coroutine, Iterator, Sequence
from typing import TYPE_CHECKING, Any

from rq_ceylon.client.adding import add
from rq_ceylon.client.retrying import failed, retry
from rq_ceylon.client.rolling import Rolling, _Waiting
from rq_ceylon.client.session import Session
from rq_ceylon.client.submission import Submission, check_groups
from rq_ceylon.errors import ConnectionLostError, InvalidInputError, NotFoundError
from rq_ceylon.handlers import Registry
from rq_ceylon.maintenance import Maintenance, judge
from rq_ceylon.models import Goal, Task, TaskGroup
from rq_ceylon.staging import keyed_id, stage, stage_child
from rq_ceylon.store import transitions
from rq_ceylon.store.codec import decode, task_parts
from rq_ceylon.store.transitions import Committed, StagedTask
from rq_ceylon.views import TaskResult
from rq_ceylon.worker.delivery import Granted
from rq_ceylon.worker.loop import Worker
from rq_ceylon.worker.neighbours import bury

from . import ledger
from .faults import Crashed, Line, ThreadLine, gate

if TYPE_CHECKING:
    from .simulation import Simulation

ROLES = ("cpu", "io")

KINDS = {"ok": 80, "slow": 4, "long": 1, "flaky": 6, "bad": 4, "poison": 1, "rare": 4}
ATTEMPTS = 3


class Actor:
    """
    One line of doing. `coroutine` gives way at every gate; the actor sleeps until `wake_ms`. It lives and dies with its
    `owner`.
    """

    owner: Actor | None = None

    def __init__(self, simulation: Simulation, name: str) -> None:
        self.simulation, self.name = simulation, name
        self.random = random.Random(f"{simulation.seed} {name}")
        self.wake_ms = 0.0
        self.line = simulation.line(name)
        self.coroutine = self.live()

    async def live(self) -> None:
        raise NotImplementedError

    async def rest(self, ms: float) -> None:
        self.wake_ms = max(self.wake_ms, self.simulation.now_ms() + ms)
        await gate()

    def end(self) -> None:
        """The process ends here, whatever it was about to do."""
        self.line.is_dead = True
        if inspect.getcoroutinestate(self.coroutine) != inspect.CORO_CLOSED:
            with contextlib.suppress(Crashed, StopIteration):
                self.coroutine.throw(Crashed())

    def crash(self) -> None:
        """The process has ended; a new one begins."""
        self.line = self.simulation.line(self.name)
        self.coroutine = self.live()


class Side(Actor):
    """What shipped code does beside another actor, in the same process: a task of its event loop."""

    def __init__(self, owner: Actor, coroutine: Coroutine[Any, Any, None], name: str) -> None:
        self.owner, self._work = owner, coroutine
        super().__init__(owner.simulation, f"{owner.name}, {name}")

    def live(self) -> Coroutine[Any, Any, None]:
        return self._work

    def done(self) -> bool:
        return inspect.getcoroutinestate(self.coroutine) == inspect.CORO_CLOSED


# ---- workers ---------------------------------------------------------------------------------------------------------
class Process(Worker):
    """A shipped worker whose handlers are a list of due times."""

    def __init__(self, body: WorkerActor, roles: tuple[str, ...], slots: int) -> None:
        super().__init__(
            "redis://none",
            registry=Registry(),
            roles=roles,
            namespace=body.simulation.keys.namespace,
            name=body.name,
            slots=slots,
            lease_s=body.simulation.lease_ms / 1000,
        )
        self.body = body
        self.connection = self.lanes._connection = body.line

    def _start_granted(self) -> None:
        granted, self.turns.granted = self.turns.granted, []
        for grant in granted if not self.body.line.is_dead else ():
            self.body.start(grant)


class WorkerActor(Actor):
    """The event loop of a worker process."""

    def __init__(self, simulation: Simulation, number: int, roles: tuple[str, ...], *, knows_all: bool) -> None:
        self.knows_all = knows_all
        self.jobs: dict[tuple[str, int], tuple[Granted, float, str]] = {}
        super().__init__(simulation, f"w{number}")
        self.process = Process(self, roles, self.random.choice((1, 3, 5, 8)))
        self.process.turns._knows = frozenset(("rare",) if knows_all else ())
        self.line.owner = self.process.name
        self.leases = LeaseActor(self)
        self._beat_ms = 0.0
        self._idle_passes = 0

    async def live(self) -> None:
        process, turns, lanes = self.process, self.process.turns, self.process.lanes
        while True:
            lanes.check()
            if self.simulation.now_ms() - self._beat_ms > self.simulation.lease_ms / 3:
                self._beat_ms = self.simulation.now_ms()
                await self.line.run(process.background.heartbeat())
            if not turns.stopping and self.random.random() < 0.003 and not self.simulation.is_draining:
                self._shut_down()
            self._end_jobs()
            if turns.is_due(process._free()):  # on other nodes turns may be in flight
                lanes.send(turns.plan(process._free()))
            if turns.stopping and turns.is_idle() and not self.jobs and not lanes.in_flight:
                await process._leave()
                return
            self._idle_passes += turns.stopping and not turns.held and not self.jobs
            assert self._idle_passes < 150, "it was told to stop, holds nothing, and does not leave"
            if turns.is_due(process._free()):
                await gate()
            else:
                await self.rest(self.random.uniform(1, 4))
                if not turns.stopping or self.random.random() < 0.1:  # a bell; else it is time for a fetch
                    turns.ring()

    def _shut_down(self) -> None:
        self.process.turns.stopping = True
        self.process.leases.stopping()
        self.leases.wake_ms = 0

    def start(self, grant: Granted) -> None:
        delivery = grant.held.delivery
        kind = decode(task_parts(grant.claimed.task)[-1])["arguments"]["kind"]
        self.simulation.note(ledger.Started(delivery.gid, delivery.tid, self.process.name, delivery.fence))
        if kind == "poison":
            raise Crashed
        lease_ms = self.simulation.lease_ms
        ms = {"slow": lease_ms * 0.6, "long": lease_ms * 2.5}.get(kind, 4) * self.random.random()
        self.jobs[delivery.role, delivery.fence] = (grant, self.simulation.now_ms() + ms, kind)
        self.process._running[delivery.role, delivery.fence] = grant.held
        limit_s = lease_ms * 5 / 1000
        self.process.leases.hold(delivery.role, delivery.entry, self.simulation.now_ms() / 1000 + limit_s, delivery)

    def _end_jobs(self) -> None:
        for key, (grant, due_ms, kind) in list(self.jobs.items()):
            if not self.process.turns.holds(grant.held):
                self._drop(key)  # lost to another worker
                continue
            outcome = self._outcome(grant, due_ms, kind)
            if outcome is not None:
                self._drop(key)
                self.process.turns.finish(grant.held, outcome)

    def _outcome(self, grant: Granted, due_ms: float, kind: str) -> Committed | None:
        stopping = self.process.turns.stopping and self.random.random() < 0.3
        now_ms, delay_ms, reason = self.simulation.now_ms(), 0, ""
        if grant.stop:
            word = "stopped"
        elif kind == "rare" and not self.knows_all:
            word, reason = "release", "unknown:rare"
        elif now_ms < due_ms and not stopping:
            return None
        elif stopping or (self.random.random() < 0.03 and not self.simulation.is_draining):
            word = "release"
        elif kind == "bad" or (kind == "flaky" and grant.claimed.attempt < ATTEMPTS):
            word = "retry" if grant.claimed.attempt < ATTEMPTS else "failed"
            delay_ms = self.random.choice((0, 5, 25)) if word == "retry" else 0
        else:
            word = "completed"
        reason = "error" if word == "failed" else reason
        delivery = grant.held.delivery
        blob = b"1" if word == "completed" else b'{"type":"E","message":"m","traceback":""}'
        adder = self.simulation.adders.get(delivery.gid)
        children = adder.spawned(self.random) if adder is not None and word == "completed" else ()
        return Committed(delivery.tid, delivery.fence, word, reason, delay_ms, 1, blob, children)

    def _drop(self, key: tuple[str, int]) -> None:
        del self.jobs[key]
        self.process._running.pop(key, None)

    def crash(self) -> None:
        self.end()  # it may be its lease thread that struck, perhaps before it did anything itself
        self.simulation.worker_died(self)


class LeaseActor(Actor):
    """The lease thread of a worker process: it goes on while the loop waits for a reply, or is frozen."""

    def __init__(self, worker: WorkerActor) -> None:
        self.owner = self.worker = worker
        super().__init__(worker.simulation, f"{worker.name} leases")
        worker.process.leases._on_lost = self._lost

    def _lost(self, role: str, entry: str) -> None:
        # Else the loop is late, and the worker learns it at its commit.
        if self.random.random() < 0.7:
            self.worker.process._lost(role, entry)

    async def live(self) -> None:
        line = ThreadLine(self.worker.line)
        while True:
            try:
                self.worker.process.leases.renew(line)  # type: ignore[arg-type]
                self.worker.process.leases._note_stopping(line)  # type: ignore[arg-type]
            except ConnectionLostError:
                continue
            await self.rest(self.simulation.lease_ms / 3)


class Neighbour(Actor):
    """A supervisor, or a worker of the same host, that finds a dead process."""

    def __init__(self, simulation: Simulation, dead: WorkerActor) -> None:
        self.dead = dead.process
        super().__init__(simulation, f"neighbour of {dead.name}")

    async def live(self) -> None:
        await self.rest(self.random.uniform(0, self.simulation.lease_ms))
        for _ in range(self.random.choice((1, 1, 2))):
            while True:
                try:
                    await bury(self.line, self.simulation.keys, self.dead.name, self.dead.roles)
                    break
                except ConnectionLostError:
                    await self.rest(1)


# ---- maintenance, users ----------------------------------------------------------------------------------------------
class Maintainer(Actor):
    async def live(self) -> None:
        maintenance = Maintenance(self.line, self.simulation.keys)
        while True:
            with contextlib.suppress(ConnectionLostError):
                await maintenance.run_once()
            self.simulation.looked_through(self.name)
            await self.rest(8)


class Judge(Actor):
    """A monitor that evaluates callable goals; two of them disagree."""

    async def live(self) -> None:
        while True:
            await self.rest(30)
            for gid, goals in list(self.simulation.ledger.goals.items()):
                for name, (*_, is_callable) in goals.items():
                    if is_callable and gid in self.simulation.ledger.accepted and self.random.random() < 0.2:
                        verdict: Any = self.random.choice(("achieved", "failed"))
                        with contextlib.suppress(ConnectionLostError):
                            await judge(self.line, self.simulation.keys, gid, goal=name, verdict=verdict)


class User(Actor):
    """Cancels, pauses and resumes. What was paused is resumed, even if this process dies in between."""

    def __init__(self, simulation: Simulation) -> None:
        self.todo: list[tuple[str, int]] = []
        super().__init__(simulation, "user")
        for number in range(self.random.randint(6, 10)):
            word = self.random.choice(("cancel", "tasks", "tasks", "pause", "pause", "pause role"))
            self.todo.append((word, number))

    async def live(self) -> None:
        keys = self.simulation.keys
        while self.todo:
            await self.rest(self.random.uniform(10, 200))
            word, _ = self.todo[0]
            accepted = [gid for gid in self.simulation.ledger.accepted if gid in self.simulation.groups]
            if not accepted:
                continue
            gid = self.random.choice(accepted)
            if word == "cancel":
                await self._do(transitions.cancel_group(keys, gid))
            elif word == "tasks":
                tids = self.random.sample(sorted(self.simulation.ledger.plans[gid]), 3)
                await self._do(transitions.cancel_tasks(keys, gid, tids))
            elif word == "pause":
                self.todo.insert(1, (f"resume {gid}", 0))
                await self._do(transitions.pause_group(keys, gid))
            elif word.startswith("resume "):
                await self._do(transitions.resume_group(keys, word.partition(" ")[2]))
            elif word == "pause role":
                self.todo.insert(1, ("unpause role", 0))
                await self.line.run(transitions.pause_role(keys, "io"))
            else:
                await self.line.run(transitions.resume_role(keys, "io"))
            self.todo.pop(0)

    async def _do(self, call: Any) -> None:
        await self.line.run_until_answered([call], give_up_after=None)


class Adder(Actor):
    """
    Adds tasks to an open group, some of them twice, and seals it in the end. `children` are what its tasks may spawn:
    each of them may be spawned by several.
    """

    def __init__(self, simulation: Simulation, number: int, gid: str, tids: Sequence[str]) -> None:
        self.gid = gid
        super().__init__(simulation, f"a{number}")
        self.tasks = [self._task(f"a{n}", [*tids[:4], *(f"a{m}" for m in range(n))]) for n in range(20)]
        self.children = [self._task(f"s{n}", ()) for n in range(12)]

    def _task(self, tid: str, others: Sequence[str]) -> Task:
        needs = self.random.sample(others, min(len(others), self.random.choice((0, 0, 1, 2))))
        kind, role = kind_of(self.random), self.random.choice(ROLES)
        return Task(uses="work", id=tid, role=role, needs=needs, arguments={"kind": kind})

    def spawned(self, rnd: random.Random) -> list[StagedTask]:
        some = rnd.sample(self.children, rnd.choice((0, 0, 1, 2)))
        return [stage_child(None, str(task.role), task) for task in some]

    async def live(self) -> None:
        while self.gid not in self.simulation.ledger.accepted:
            await self.rest(20)
            if self.simulation.is_draining:
                return
        left = list(self.tasks)
        with contextlib.suppress(InvalidInputError):  # it was closed, or went back to before a task that is needed
            while left:
                await self.rest(self.random.uniform(5, 60))
                count = self.random.randint(1, 6)
                with contextlib.suppress(ConnectionLostError):
                    await add(_Session(self), self.gid, left[:count])
                    left = left[self.random.choice((count, count, count - 1)) :]
        await self.line.run_until_answered(
            [transitions.seal(self.simulation.keys, self.gid, untouched_ms=0)], give_up_after=None
        )


class Retrier(Actor):
    """Retries groups: what failed, or all that did not complete; or a single task."""

    def __init__(self, simulation: Simulation) -> None:
        super().__init__(simulation, "retrier")
        self.left = self.random.randint(15, 25)

    async def live(self) -> None:
        while self.left > 0:
            await self.rest(self.random.uniform(10, 150))
            accepted = sorted(self.simulation.ledger.accepted)
            if not accepted:
                continue
            gid = self.random.choice(accepted)
            self.left -= 1
            with contextlib.suppress(ConnectionLostError, InvalidInputError):
                await retry(_Session(self), gid, self._choice(sorted(self.simulation.ledger.plans[gid])))

    def _choice(self, tids: Sequence[str]) -> Callable[[TaskResult], bool]:
        tid = self.random.choice(tids)
        return self.random.choice(
            (
                failed,
                lambda result: failed(result) or result.reason == "closed",
                lambda _: True,
                lambda result: result.task_id == tid or result.reason == "skipped",
            )
        )


# ---- producers -------------------------------------------------------------------------------------------------------
class Producer(Actor):
    """
    Submits one group, under a key, and again should its process die meanwhile; one in eight gives up, unless another
    group waits for this one.
    """

    is_needed = False

    def __init__(self, simulation: Simulation, number: int, group: TaskGroup) -> None:
        self.group, self.given_up = group, False
        super().__init__(simulation, f"p{number}")

    async def live(self) -> None:
        if self.given_up:
            return
        await self.rest(self.random.uniform(0, 300))
        for _ in range(self.random.choice((1, 1, 1, 2))):
            await self._submit()

    async def _submit(self) -> None:
        while True:
            try:
                session = _Session(self)
                if self.random.random() < 0.3:  # as of a file, whose groups are judged before the first is sent
                    assert self.group.key is not None
                    await check_groups(session, [(self.group, keyed_id(session.keys.namespace, self.group.key))])
                await Submission(session, self.group).run(require_workers=False)
            except ConnectionLostError:
                return  # what is written is in the outbox
            except NotFoundError:  # on what it depends its producer has yet to submit
                await self.rest(20)
            else:
                return

    def crash(self) -> None:
        self.given_up = self.random.random() < 0.12 and not self.is_needed
        super().crash()


class LoneClient(Actor):
    """Submits single tasks through the rolling group of its process."""

    def __init__(self, simulation: Simulation, number: int, left: int) -> None:
        self.left = left
        super().__init__(simulation, f"c{number}")

    async def live(self) -> None:
        rolling = _Rolling(self)
        self.simulation.enter(Timer(self, rolling))
        while self.left > 0:
            rolling.submit_some()
            await self.rest(self.random.choice((0, 1, 20)))
        await rolling.close()

    def task(self) -> _Waiting:
        kind, role = kind_of(self.random), self.random.choice(ROLES)
        delay = self.random.choice((None, None, 0.02))
        self.left -= 1
        ready = stage(Task(uses="work", role=role, arguments={"kind": kind}, delay=delay), None)
        return _Waiting(ready, _Accepted(), 0)  # type: ignore[arg-type]


class Timer(Actor):
    """The age of a client's rolling group, which may be over at any moment."""

    def __init__(self, client: LoneClient, rolling: Rolling) -> None:
        self.owner, self._rolling = client, rolling
        super().__init__(client.simulation, f"timer of {client.name}")

    async def live(self) -> None:
        while True:
            await self.rest(self.random.uniform(10, 200))
            if self._rolling._ageing is not None:
                self._rolling._retire()


class _Rolling(Rolling):
    def __init__(self, client: LoneClient) -> None:
        super().__init__(_Session(client), "none", 3_600_000)
        self._client = client

    def submit_some(self) -> None:
        self._waiting.extend(self._client.task() for _ in range(self._client.random.choice((1, 1, 2, 5))))
        self._wake()

    async def _send_part(self, batch: list[_Waiting]) -> None:
        group = self._group
        self._client.simulation.expect(group.gid, group.count, [waiting.task.role for waiting in batch])
        await super()._send_part(batch)


class _Session(Session):
    """A client's session on the line of an actor."""

    def __init__(self, actor: Actor) -> None:
        super().__init__("redis://none", actor.simulation.keys.namespace, None)
        self._connection: Line = actor.line

    def check_owner(self) -> None:
        """No event loop owns it."""


class _Accepted:
    """Nobody waits for it."""

    def done(self) -> bool:
        return True


def kind_of(rnd: random.Random) -> str:
    return rnd.choices(list(KINDS), list(KINDS.values()))[0]


def graph(rnd: random.Random, count: int) -> Iterator[Task]:
    """Three levels; most of the second needs the first task too, so that its dependents fill several calls."""
    levels: list[list[str]] = [[], [], []]
    for number in range(count):
        level = 0 if number < count // 3 else rnd.choice((0, 1, 2))
        above = levels[level - 1] if level else []
        needs = set(rnd.sample(above, min(len(above), rnd.choice((1, 1, 2))))) if above else set()
        if level == 1 and rnd.random() < 0.6:
            needs.add("t0")
        kind = rnd.choice(("ok", "ok", "flaky", "bad")) if number == 0 else kind_of(rnd)
        tid = f"t{number}"
        levels[level if needs else 0].append(tid)
        yield Task(
            uses="work",
            id=tid,
            role=rnd.choice(ROLES),
            needs=sorted(needs),
            priority=rnd.choice(("high", "normal", "low")),
            arguments={"kind": kind},
            expires=0.3 if rnd.random() < 0.02 else None,
            delay=0.05 if rnd.random() < 0.03 else None,
        )


GOALS: list[list[Goal]] = [
    [Goal("completed >= 50%", name="half"), Goal("completed >= 100%", name="all")],
    [Goal("completed >= 12", name="few", on_achieved="cancel")],
    [Goal("failed <= 3", name="clean", on_failed="cancel"), Goal("completed >= 90%", name="many", on_achieved="drain")],
    [],
    [
        Goal("completed >= 60% and failed <= 4", name="both"),
        Goal("completed >= 30%", name="part", fail_when="failed >= 2"),
    ],
    [Goal("completed >= 95%", name="soon", deadline=0.35), Goal(call="enough", name="judged")],
    [Goal("cancelled >= 1", name="pity", deadline=0.8, on_failed="drain")],
]
