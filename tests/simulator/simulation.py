"""One run: who goes next, what strikes, what Redis loses, and when all is over."""

from __future__ import annotations

import collections
import random
import threading
import time
import traceback
from collections.abc import Callable, Coroutine, Sequence
from typing import Any, NamedTuple

import redis
from redis.cluster import ClusterNode
from redis.crc import key_slot

from rq_ceylon.goals import compile_goals
from rq_ceylon.models import Dependency, Goal, NeedPolicy, TaskGroup
from rq_ceylon.staging import keyed_id
from rq_ceylon.store import scripts, transitions
from rq_ceylon.store.keys import ROLE_PARTS, STREAMS, Keys
from rq_ceylon.store.redis_errors import classified
from rq_ceylon.store.scripts import Call
from rq_ceylon.views import COUNTERS

from . import actors
from .actors import (
    ROLES,
    Actor,
    Adder,
    Judge,
    LoneClient,
    Maintainer,
    Neighbour,
    Producer,
    Retrier,
    Side,
    User,
    WorkerActor,
)
from .checker import history, records
from .faults import CRASH, LEASE_MS, LOSE, RARE, SCRIPTS, Crashed, Fault, Line, short_times
from .ledger import Died, Ledger, Lost, Outage, Plan, Record

WORKERS = 5
GROUPS, LONE_CLIENTS = 7, 2
POLICIES: list[NeedPolicy] = ["skip", "skip", "fail", "continue"]
LOSS_MS, FIRE_MS = 1300.0, 2000.0
"""So long Redis may lose data, and anything else may strike. What was struck must then come to its end."""

STILL_MS, STARVED_MS = 4000.0, 3000.0
"""
A run in which nothing has ended for so long is stuck. The first is a fault. It counts only while every role's clock is
kept in time, as nothing may be reclaimed where it is not, and a pass of maintenance as 50 ms at most. By the second, in
steps of at most 5 ms, the machine was too slow, unless most of it counts; such a run is made again with longer times.
"""

SCALE_MAX = 16.0

Coverage = collections.Counter[tuple[str, str]]


def client_of(url: str, *, decode_responses: bool = False) -> Any:
    """A plain client."""
    if not url.startswith("redis+cluster://"):
        return redis.Redis.from_url(url, decode_responses=decode_responses, protocol=2)
    nodes = [address.rsplit(":", 1) for address in url.partition("://")[2].split(",")]
    startup = [ClusterNode(host, int(port)) for host, port in nodes]  # type: ignore[no-untyped-call]
    return redis.RedisCluster(startup_nodes=startup, decode_responses=decode_responses, protocol=2)


class Choice(NamedTuple):
    """One step of the schedule: when, whose turn, the dice for faults and sleep, and what struck in the end."""

    at_ms: float
    actor: str
    fault: float
    nap: float
    struck: str = Fault.NONE


class Simulation:
    """
    Args:
        scale: all times are so much longer, for a slow machine.
        move: moves a slot of the cluster at the URL to another node.
        covered: script × fault, over all runs so far; what was never struck is struck more often.
        replay: the choices of an earlier run, to be made again at the same times.
    """

    def __init__(
        self,
        url: str,
        seed: int,
        *,
        loss: bool = False,
        scale: float = 1.0,
        move: Callable[[int], object] | None = None,
        covered: Coverage | None = None,
        replay: Sequence[Choice] = (),
    ) -> None:
        self.seed, self.loss, self.scale, self.lease_ms = seed, loss, scale, LEASE_MS * scale
        self.keys = Keys("sim")
        self.raw, self.bytes = client_of(url, decode_responses=True), client_of(url)
        self.schedule, self.random = random.Random(f"{seed} schedule"), random.Random(f"{seed} world")
        self.ledger = Ledger(self.lease_ms, lossy=loss, rings=loss or seed % 4 == 0)
        self.covered = Coverage() if covered is None else covered
        self.journal: list[Choice] = []
        self._replay, self._move = list(replay), move
        # A worker has a turn in flight for each node.
        self._nodes = 3 if move or seed % 2 else 1
        self.found: list[str] = []
        self.calls = self.naps = self.deaths = 0
        self.losses: collections.Counter[str] = collections.Counter()
        self.is_draining = self.was_starved = self._gave_up = False
        self._fetched: dict[str, float] = {}
        self.groups: dict[str, TaskGroup] = {}
        self.adders: dict[str, Adder] = {}
        self._cast: dict[str, Actor] = {}
        self._workers = 0
        self._strays: list[tuple[float, Sequence[Call], str]] = []
        self._snapshots: dict[str, list[tuple[str, bytes | None, int]]] = {}
        self._rolled_back: dict[str, set[str]] = {}
        self._acting: Actor | None = None
        self._dice = Choice(0, "", 1, 1)
        self._began = time.monotonic()
        self._ran_ms = self._moved_at_ms = self._still_ms = self._looked_ms = 0.0
        self._moved = 0
        self._mover: threading.Thread | None = None

    @property
    def is_calm(self) -> bool:
        return self.is_draining or self._ran_ms > FIRE_MS * self.scale

    # ---- what actors use ---------------------------------------------------------------------------------------------
    def now_ms(self) -> float:
        return time.monotonic() * 1000

    def note(self, record: Record) -> None:
        self.ledger.records.append(record)

    def line(self, owner: str) -> Line:
        return Line(owner, self._nodes, self._send, self._strike, self._stray)

    def spawn(self, coroutine: Coroutine[Any, Any, None], name: str) -> Side:
        """What the acting process wants done beside what it does."""
        assert self._acting is not None
        side = Side(self._acting.owner or self._acting, coroutine, name)
        self.enter(side)
        return side

    def enter(self, actor: Actor) -> None:
        self._cast[actor.name] = actor

    def looked_through(self, maintainer: str) -> None:
        """Maintenance has gone through all."""
        for gid, before in list(self._rolled_back.items()):
            before.discard(maintainer)
            if not before:  # the index went back too, whatever was entered by those who looked at the group before
                self.raw.zadd(self.keys.index_of(gid), {gid: 0})
                del self._rolled_back[gid]
        now = self.now_ms()
        self._still_ms += min(now - self._looked_ms, 50 * self.scale)
        self._looked_ms = now

    def expect(self, gid: str, count: int, roles: Sequence[str]) -> None:
        """A client of single tasks is about to send tasks of these roles, after so many of the same group."""
        plans = self.ledger.plans.setdefault(gid, {})
        self.ledger.policies[gid] = "skip"
        for number, role in enumerate(roles, count + 1):
            plans[str(number)] = Plan(role, (), "")  # type: ignore[index]

    def worker_died(self, worker: WorkerActor) -> None:
        self.deaths += 1
        self._cast.pop(worker.name)
        self.note(Died(worker.process.name))
        if self.random.random() < 0.6 and not self.is_draining:
            self.enter(Neighbour(self, worker))
        self._hire()

    # ---- calls -------------------------------------------------------------------------------------------------------
    def _send(self, call: Call, owner: str) -> Any:
        before = self.now_ms()
        if call.script == "commit":
            is_open, status = self.raw.hmget(call.keys[0], "open", "status")
            self.ledger.takes_tasks = is_open in ("o", "i") and status not in ("closing", "finished")
        words = scripts.words(call)
        try:
            reply = self.raw.execute_command(*words)
        except redis.exceptions.NoScriptError:
            reply = self.raw.execute_command("EVAL", scripts.source(call.script), *words[2:])
        except redis.ResponseError as error:
            if call.script in SCRIPTS:
                self.found.append(f"{call.script} was refused: {error}")
            return classified(error, "redis://none")
        if call.script in SCRIPTS:
            self.calls += 1
            if call.script in ("fetch", "renew"):
                if before - self._fetched.get(call.keys[0], before) > self.lease_ms / 2.2:
                    self._still_ms = 0
                self._fetched[call.keys[0]] = before
            if call.script == "claim":
                self._check_room(call.keys[0])
            self.ledger.saw(call, reply, owner, before, self.now_ms())
        return reply

    def _check_room(self, meta: str) -> None:
        running, most = self.raw.hmget(meta, "in_progress", "max_running")
        if most is not None and int(running or 0) > int(most):
            self.found.append(f"{meta}: {running} tasks run at once, {most} may")

    def _strike(self, script: str) -> Fault:
        """The fault of this step, at its first script call."""
        dice, self._dice = self._dice, self._dice._replace(fault=1, struck=Fault.NONE)
        if dice.struck != Fault.NONE:
            return Fault(dice.struck)
        if self.is_calm or self._replay:
            return Fault.NONE
        low = 0.0
        for fault, chance in ((Fault.BEFORE, CRASH), (Fault.AFTER, CRASH), (Fault.LOST, LOSE)):
            low += chance * RARE.get(script, 1) * (1 if self.covered[script, fault] else 25)
            if dice.fault < low:
                self.covered[script, fault] += 1
                self.journal[-1] = dice._replace(struck=fault)
                return fault
        return Fault.NONE

    def _stray(self, calls: Sequence[Call], owner: str) -> None:
        """What becomes of calls that nobody hears of: Redis has them now, or later, or never."""
        fate = self.random.random()
        if fate < 0.5 or calls[0].script not in SCRIPTS:
            for call in calls:
                self._send(call, owner)
        elif fate < 0.85:
            self._strays.append((self.now_ms() + self.random.uniform(0, self.lease_ms), calls, owner))

    # ---- the cast ----------------------------------------------------------------------------------------------------
    def _hire(self) -> None:
        """Whoever has gone, somebody serves every role: what nobody fetches would be left, rightly."""
        self._workers += 1
        workers = [actor for actor in self._cast.values() if isinstance(actor, WorkerActor)]
        served = {role for worker in workers for role in worker.process.roles}
        # Nor would what no worker knows.
        known = {role for worker in workers if worker.knows_all for role in worker.process.roles}
        all_roles = served < set(ROLES) or known < set(ROLES) or self.random.random() < 0.5
        roles = ROLES if all_roles else (self.random.choice(ROLES),)
        knows_all = known < set(ROLES) or self.random.random() < 0.3
        worker = WorkerActor(self, self._workers, roles, knows_all=knows_all)
        self.enter(worker)
        self.enter(worker.leases)

    def _end_sides(self, process: Actor) -> None:
        """A process has ended, and all that lived in it ends."""
        process.line.is_dead = True
        for side in [actor for actor in self._cast.values() if actor.owner is process]:
            del self._cast[side.name]
            side.end()

    def _assemble(self) -> None:
        rnd = random.Random(f"{self.seed} plan")
        gids: list[str] = []
        producers: dict[str, Producer] = {}
        for number in range(GROUPS):
            goals = actors.GOALS[(self.seed + number) % len(actors.GOALS)]
            group = TaskGroup(
                f"g{number}", list(actors.graph(rnd, rnd.choice((20, 35, 50)))), goal=goals, key=f"k{number}"
            )
            policy = group.on_need_failed = rnd.choice(POLICIES)
            gid = keyed_id(self.keys.namespace, f"k{number}")
            if gids and rnd.random() < 0.3:
                others = rnd.sample(gids, min(len(gids), rnd.choice((1, 2))))
                group.depends_on = [Dependency(other, self._condition(rnd, other)) for other in others]
                for other in others:
                    producers[other].is_needed = True
            gids.append(gid)
            if rnd.random() < 0.4:
                group.then = self._follow_ups(rnd, gid, goals)
            self.groups[gid] = group
            self.ledger.policies[gid] = policy
            if rnd.random() < 0.3:
                group.max_running = rnd.choice((1, 2, 4))
            if rnd.random() < 0.5 and any(goal.on_achieved != "continue" for goal in goals):
                group.dispatch = "lazy"
            if rnd.random() < 0.35:
                group.open, group.open_timeout = rnd.choice((True, "until_idle")), 0.5 * self.scale
                adder = self.adders[gid] = Adder(self, number, gid, [str(task.id) for task in group.tasks])
                self.enter(adder)
            added = [*self.adders[gid].tasks, *self.adders[gid].children] if group.open else []
            self.ledger.plans[gid] = {
                str(task.id): Plan(str(task.role), list(task.needs), task.arguments["kind"])
                for task in (*group.tasks, *added)
            }
            self.ledger.goals[gid] = {
                goal.name: (goal.when or "", goal.fail_when or "", goal.deadline_ms > 0, bool(goal.call))
                for goal in compile_goals(goals)
            }
            producers[gid] = Producer(self, number, group)
            self.enter(producers[gid])
        for number in range(LONE_CLIENTS):
            self.enter(LoneClient(self, number, 40))
        self.enter(User(self))
        self.enter(Retrier(self))
        for number in range(2):
            self.enter(Maintainer(self, f"m{number}"))
            self.enter(Judge(self, f"j{number}"))
        for _ in range(WORKERS):
            self._hire()

    def _follow_ups(self, rnd: random.Random, gid: str, goals: Sequence[Goal]) -> dict[str, TaskGroup]:
        """Groups that follow this one; which of them, its end and its goals decide."""
        whens = ["completed", "failed", "finished", *(f"achieved:{goal.name}" for goal in compile_goals(goals))]
        then = {}
        for when in rnd.sample(whens, 2):
            tasks = list(actors.graph(rnd, 4))
            then[when] = TaskGroup("follower", tasks)
            follower = keyed_id(gid, f"then {when}")
            self.ledger.policies[follower] = "skip"
            self.ledger.plans[follower] = {
                str(task.id): Plan(str(task.role), list(task.needs), task.arguments["kind"]) for task in tasks
            }
        return then

    def _condition(self, rnd: random.Random, gid: str) -> str:
        goals = [f"achieved:{name}" for name in self.ledger.goals[gid]]
        return rnd.choice(["completed", "completed", "failed", "finished", *goals])

    # ---- the run -----------------------------------------------------------------------------------------------------
    def run(self) -> list[str]:
        """Returns what was violated."""
        self.raw.flushall()
        with short_times(self.scale, reissue=self.ledger.rings, spawn=self.spawn):
            self._assemble()
            self._loop()
            for actor in self._cast.values():
                actor.line.is_dead = True
            for actor in self._cast.values():
                actor.end()
        if self._mover is not None:
            self._mover.join()
        self.found += history(self.ledger)
        self.was_starved = self._gave_up and not self.found
        self.found += records(self.raw, self.keys, self.ledger)
        self.raw.close()
        self.bytes.close()
        return self.found

    def _loop(self) -> None:
        outage = self.random.uniform(300, 900)
        step = self.random.uniform(200, 1000)
        loss = 200.0
        steps, last = 0, self.now_ms()
        while True:
            steps += 1
            now = self.now_ms()
            self._ran_ms += min(now - last, 5.0 * self.scale)
            last, age = now, (now - self._began * 1000) / self.scale
            if self.found or self._is_stuck():
                return
            for stray in [stray for stray in self._strays if stray[0] <= now]:
                self._strays.remove(stray)
                _, calls, owner = stray
                for call in calls:
                    self._send(call, owner)
            if age > outage and not self.is_calm:
                outage = age + self.random.uniform(1200, 2500)
                self._outage(now)
            if age > step and not self.is_calm:
                step = age + self.random.uniform(600, 1500)
                self._step_clock()
            if self.loss and loss < age < LOSS_MS:
                loss = age + self.random.uniform(40, 200)
                self._disaster()
            if self._move and self._mover is None and age > step / 2 and self.ledger.accepted:
                gid = self.random.choice(list(self.ledger.accepted))
                key = self.random.choice((self.keys.group_part(gid, ""), self.keys.role_part("cpu", "")))
                self._mover = threading.Thread(target=self._move, args=[key_slot(key.encode())])
                self._mover.start()
            self._turn(now, age)
            if steps % 50 == 0:
                self._sums()
            if steps % 100 == 0 and (not self.loss or age > LOSS_MS) and self._is_over():
                return

    def _is_stuck(self) -> bool:
        moved = len(self.ledger.ended) + sum(map(len, self.ledger.accepted.values()))
        if moved != self._moved or not self.is_calm:
            self._moved, self._moved_at_ms, self._still_ms = moved, self._ran_ms, 0.0
        waited_ms = self._ran_ms - self._moved_at_ms
        self._gave_up = waited_ms > STARVED_MS * self.scale and self._still_ms < waited_ms / 2
        return self._gave_up or self._still_ms > STILL_MS * self.scale

    def _turn(self, now: float, age: float) -> None:
        choice = self._choose(now, age)
        if choice is None:
            time.sleep(0.0002)
            return
        self.journal.append(choice)
        actor = self._acting = self._cast[choice.actor]
        self._dice = choice
        try:
            actor.coroutine.send(None)
        except StopIteration:
            del self._cast[actor.name]
            if actor.owner is None:
                self._end_sides(actor)
            if isinstance(actor, WorkerActor):
                self.note(Died(actor.process.name))
                self._hire()
        except Crashed:
            process = actor.owner or actor
            self._end_sides(process)
            process.crash()
        except Exception as error:
            place = traceback.extract_tb(error.__traceback__)[-1]
            self.found.append(f"{actor.name} ended with {error!r} at {place.filename}:{place.lineno}")
            self._cast.pop(actor.name, None)
        if choice.nap < 0.003 and not self.is_calm and isinstance(actor, WorkerActor):
            # A frozen process, or only its loop while its lease thread goes on.
            self.naps += 1
            until = now + self.lease_ms * (1.1 + 400 * choice.nap)
            for one in self._cast.values():
                if one is actor or (one.owner is actor and (one is not actor.leases or choice.nap < 0.002)):
                    one.wake_ms = until

    def _choose(self, now: float, age: float) -> Choice | None:
        if self._replay:
            choice = self._replay.pop(0)
            while (self.now_ms() - self._began * 1000) / self.scale < choice.at_ms:
                time.sleep(0.0001)
            actor = self._cast.get(choice.actor)
            return choice if actor is not None and actor.wake_ms <= self.now_ms() else None
        awake = [name for name, actor in self._cast.items() if actor.wake_ms <= now]
        if not awake:
            return None
        return Choice(age, self.schedule.choice(awake), self.schedule.random(), self.schedule.random())

    def _outage(self, now: float) -> None:
        until = now + self.lease_ms * self.random.uniform(1.3, 2)
        for actor in self._cast.values():
            if isinstance(actor.owner or actor, WorkerActor):
                actor.wake_ms = max(actor.wake_ms, until)
        # Nor does a late fetch come meanwhile.
        self._strays = [(max(at, until), calls, owner) for at, calls, owner in self._strays]
        self.note(Outage(until + 0.8 * self.lease_ms))

    def _step_clock(self) -> None:
        """The server's clock has gone back: the last fetch lies in the future."""
        meta = self.keys.role_part(self.random.choice(ROLES), "meta")
        if self.raw.exists(meta):
            self.raw.hset(meta, "last", int(time.time() * 1000) + 60_000)
            self.losses["clock stepped"] += 1

    def _sums(self) -> None:
        accepted = list(self.ledger.accepted)
        if not accepted:
            return
        gid = self.random.choice(accepted)
        counts = self.raw.hmget(self.keys.group_part(gid, "meta"), "total", *COUNTERS)
        if counts[0] is not None:
            total, *rest = [int(count or 0) for count in counts]
            if total != sum(rest) or min(rest) < 0:
                self.found.append(f"{gid}: the counters {rest} do not sum to {total}")

    def _is_over(self) -> bool:
        busy = any(
            isinstance(actor, (Producer, LoneClient, User, Retrier, Adder, Neighbour)) for actor in self._cast.values()
        )
        if busy or self._strays or self._rolled_back:
            return False
        statuses = [self.raw.hget(self.keys.group_part(gid, "meta"), "status") for gid in self.ledger.accepted]
        for gid, status in zip(self.ledger.accepted, statuses, strict=True):
            if status == "paused":  # by a pause that arrived behind its resumption: its user sees it, and resumes again
                self._send(transitions.resume_group(self.keys, gid), "user")
        if any(status != "finished" for status in statuses):
            return False
        self.is_draining = True
        for role in ROLES:
            streams = [self.keys.role_part(role, stream) for stream in STREAMS]
            waiting = sum(self.raw.zcard(self.keys.role_part(role, part)) for part in ("delayed", "by_name"))
            if waiting or any(self.raw.xlen(key) for key in streams):
                return False
        return not any(self.raw.exists(self.keys.group_part(gid, "outbox")) for gid in self.ledger.accepted)

    # ---- what Redis may lose -----------------------------------------------------------------------------------------
    def _disaster(self) -> None:
        fate = self.random.random()
        role = self.random.choice(ROLES)
        if fate < 0.2:
            self.raw.delete(*self.keys.role(role))
            self._lost("role wiped", "")
        elif fate < 0.45:
            self._cut(self.keys.role_part(role, self.random.choice(list(STREAMS))))
        elif fate < 0.6:
            self._go_back(f"role {role}", self.keys.role(role), "")
        else:
            started = ("waiting", "active", "closing", "finished")
            gids = [
                gid
                for gid in self.groups
                if gid in self.ledger.accepted and self.raw.hget(self.keys.group_part(gid, "meta"), "status") in started
            ]
            if gids:
                gid = self.random.choice(gids)
                self._go_back(f"group {gid}", self.keys.group(gid), gid)

    def _cut(self, stream: str) -> None:
        ids = [entry for entry, _ in self.raw.xrange(stream)]
        tail = ids[len(ids) - self.random.randint(0, len(ids)) :]
        if tail:
            self.raw.xack(stream, "workers", *tail)
            self.raw.xdel(stream, *tail)
            self._lost("stream cut", "")

    def _go_back(self, name: str, keys: Sequence[str], gid: str) -> None:
        """The first time, remember; the second time, all is as it was then."""
        if name not in self._snapshots:
            self._snapshots[name] = [(key, self.bytes.dump(key), self.bytes.pttl(key)) for key in keys]
            return
        for key, dump, ttl_ms in self._snapshots.pop(name):
            self.bytes.delete(key)
            if dump is not None:
                self.bytes.restore(key, max(ttl_ms, 0), dump)
        if gid:
            self._forget_added(gid)
            self._rolled_back[gid] = {actor.name for actor in self._cast.values() if isinstance(actor, Maintainer)}
            self.ledger.ended = {task for task in self.ledger.ended if task[0] != gid}
        else:  # its user sees that it is paused, and resumes it again
            self.raw.hdel(keys[ROLE_PARTS.index("meta")], "paused")
        self._lost(f"{name.partition(' ')[0]} rolled back", gid)

    def _forget_added(self, gid: str) -> None:
        """Tasks that were added after the moment to which a group went back are not there."""
        there = {
            *self.raw.hkeys(self.keys.group_part(gid, "tasks")),
            *self.raw.hkeys(self.keys.group_part(gid, "results")),
        }
        for tid in [tid for tid in self.ledger.accepted[gid] if tid[0] in "as" and tid not in there]:
            del self.ledger.accepted[gid][tid]

    def _lost(self, what: str, gid: str) -> None:
        self.losses[what] += 1
        self.note(Lost(gid))
