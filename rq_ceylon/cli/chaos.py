"""`ceylon demo --chaos`: runs a group while workers are killed before the user's eyes, and recounts it at the end."""

from __future__ import annotations

import asyncio
import collections
import random
import subprocess
import sys
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

import click
from rich.text import Text

from rq_ceylon.audit import audit
from rq_ceylon.cli.common import run_async
from rq_ceylon.cli.live import Display
from rq_ceylon.client import Client, GroupHandle
from rq_ceylon.dev import processes
from rq_ceylon.dev.server import EmbeddedServer
from rq_ceylon.errors import CeylonError, InvalidInputError, WaitTimeoutError
from rq_ceylon.models import Goal, Task, TaskGroup, counted, seconds
from rq_ceylon.settings import require_unix
from rq_ceylon.store import queries
from rq_ceylon.views import GroupView

WORKERS, SLOTS = 4, 4
TASK_S = 0.1, 0.5
TASKS_PER_S = 40
"""So many tasks that they last about as long as the kills: those are what makes it fewer than the slots could do."""

PAUSE_S = 0.5, 1.8
"""From one kill to the next."""

WEIGHTS = {"worker": 3, "monitor": 1}
"""How likely one is the next to be killed."""

DEAD_S = 0.6, 1.4
"""How long a place stays empty."""

BACK_S = 2.0
LOOK_S = 0.2
LINE_S = 5.0
"""How often the numbers are printed without a terminal."""

REST_S = 120.0
"""The longest that the remaining tasks may take after the last kill."""

COLOURS = {"killed": "bold red", "starting": "yellow", "back": "green", "running": ""}


@dataclass
class _Place:
    """
    A worker or the monitor, and the processes that replace it.

    Attributes:
        process: None while it is dead; `due` says until when.
        up_since: when it was first seen in the registry; None until then.
        running: number of tasks that it runs.
        to_redo: number of tasks that a killed process ran and that no worker has taken up since.
        done: number of tasks that it and its killed predecessors have ended.
    """

    name: str
    command: str
    arguments: Sequence[str] = ()
    process: subprocess.Popen[bytes] | None = None
    due: float = 0.0
    up_since: float | None = None
    kills: int = 0
    running: int = 0
    to_redo: int = 0
    done: int = 0

    def start(self, environ: Mapping[str, str]) -> None:
        arguments = ["--name", self.name, "--log-level", "error", *self.arguments]
        self.process = processes.start(self.command, arguments, environ)

    def kill(self, due: float) -> None:
        assert self.process is not None
        assert self.process.stdin is not None
        self.process.kill()
        self.process.wait()
        self.process.stdin.close()
        self.process, self.up_since, self.due = None, None, due
        self.kills += 1

    @property
    def alive(self) -> str:
        """The beginning of the name of its live worker; empty while it is dead."""
        return f"{self.name}-{self.process.pid}-" if self.process else ""

    def row(self, now: float) -> Text:
        state = self._state(now)
        line = Text(f"{self.name:<10}  ")
        line.append(f"{state:<8}", COLOURS[state])
        for number in (self.running, self.to_redo, self.done):
            line.append(f"  {number:>7}" if self.command == "worker" else " " * 9)
        return line.append(f"  {self.kills:>6}")

    def _state(self, now: float) -> str:
        if self.process is None:
            return "killed"
        if self.up_since is None:
            return "starting"
        return "back" if self.kills and now - self.up_since < BACK_S else "running"


@dataclass
class _Chaos:
    """
    Kills processes, and reports it.

    Attributes:
        settled: numbers of the events that settled each goal.
        news: the last kills, for a terminal; elsewhere each kill is printed at once.
    """

    client: Client
    handle: GroupHandle
    display: Display
    environ: Mapping[str, str]
    limit_s: float
    places: list[_Place]
    settled: dict[str, list[int]] = field(default_factory=lambda: collections.defaultdict(list))
    news: collections.deque[str] = field(default_factory=lambda: collections.deque(maxlen=5))
    began: float | None = None
    next_kill: float = 0.0
    seq: int = 0

    async def run(self) -> GroupView:
        """Run until the group has finished and the last killed process is back."""
        told = 0.0
        await self.handle.pause()  # until all are there, so that nothing ends before the first is killed
        view = await self.handle.view()
        try:
            with self.display:
                while not view.is_finished or len(self._up) < len(self.places):
                    now = time.monotonic()
                    await self._look_after(now)
                    if not view.is_finished:
                        await self._kill_one(now)
                    view = await self.handle.view()
                    await self._count(view)
                    if self.display.is_live or now - told >= LINE_S or view.is_finished:
                        told = now
                        await self.display.show(view, self._below(now))
                    await asyncio.sleep(LOOK_S)
            for line in self._table(time.monotonic()):
                self.display.say(line)
        finally:
            processes.end([place.process for place in self.places if place.process is not None])
        return view

    # ---- killing -----------------------------------------------------------------------------------------------------
    async def _look_after(self, now: float) -> None:
        """Start the processes that are due, note which are up, and begin once all are."""
        registered = {worker.pid for worker in await self.client.workers()}
        for place in self.places:
            if place.process is None:
                if now >= place.due:
                    place.start(self.environ)
            elif (code := place.process.poll()) is not None:
                raise CeylonError(f"{place.name} ended by itself, with exit code {code}; the demo did not kill it")
            elif place.up_since is None and place.process.pid in registered:
                place.up_since = now
        if self.began is None and len(self._up) == len(self.places):
            await self.handle.resume()
            self.began = now
            self.next_kill = now + random.uniform(*PAUSE_S)

    async def _kill_one(self, now: float) -> None:
        """Kill a process, if it is time and one is alive."""
        if not self._up or self.began is None or not self.next_kill <= now < self.began + self.limit_s:
            return
        (victim,) = random.choices(self._up, [WEIGHTS[place.command] for place in self._up])
        await self._count_running()
        what = "" if victim.command == "monitor" else f", which ran {counted(victim.running, 'task')}"
        victim.kill(now + random.uniform(*DEAD_S))
        self._tell(f"{now - self.began:5.1f} s  killed {victim.name}{what}")
        self.next_kill = now + random.uniform(*PAUSE_S)

    def _tell(self, words: str) -> None:
        if self.display.is_live:
            self.news.append(words)
        else:
            self.display.say(words)

    # ---- looking -----------------------------------------------------------------------------------------------------
    @property
    def _up(self) -> list[_Place]:
        return [place for place in self.places if place.up_since is not None]

    async def _count_running(self) -> None:
        found = await queries.running(self.client.connection, self.client.keys, self.handle.id)
        for place in self.places:
            own = [task.worker for task in found if _place_of(task.worker) == place.name]
            place.running = sum(worker.startswith(place.alive) for worker in own) if place.alive else 0
            place.to_redo = len(own) - place.running

    async def _count(self, view: GroupView) -> None:
        """Count running tasks, and read from new events which worker ended which task and which goals settled."""
        await self._count_running()
        connection, keys, gid = self.client.connection, self.client.keys, self.handle.id
        places = {place.name: place for place in self.places}
        async for events in queries.new_events(connection, keys, gid, self.seq, view.events):
            for event in events:
                for goal, _ in event.goals:
                    self.settled[goal].append(event.seq)
            ended = [task.tid for event in events for task in event.tasks if task.is_end]
            for result in (await queries.results(connection, keys, gid, ended)).values():
                if place := places.get(_place_of(result.worker)):
                    place.done += 1
            self.seq = events[-1].seq

    def _below(self, now: float) -> list[Text]:
        if self.began is None:
            words = "waiting until all workers are up"
        elif (left := self.began + self.limit_s - now) > 0:
            words = f"{counted(_kills_of(self.places), 'kill')} so far; they go on for {left:.0f} s"
        else:
            words = f"{counted(_kills_of(self.places), 'kill')}, and no more; the remaining tasks run undisturbed"
        return [Text(), *self._table(now), Text(), Text(words), *(Text(line, "dim") for line in self.news)]

    def _table(self, now: float) -> list[Text]:
        head = f"{'WORKER':<10}  {'STATE':<8}  {'RUNNING':>7}  {'TO REDO':>7}  {'DONE':>7}  {'KILLED':>6}"
        return [Text(head, "bold"), *(place.row(now) for place in self.places)]


def run_chaos(duration: str) -> int:
    """
    Kill processes for `duration`, wait until the group has finished, and recount it.

    Returns:
        the exit code: 0 if every task counted once and the goal settled once, else 1.

    Raises:
        InvalidInputError: the duration cannot be used.
    """
    require_unix("ceylon demo")
    limit_s = seconds(duration, "--chaos")
    if not 1 <= limit_s <= 3600:
        raise InvalidInputError(f"--chaos: {duration!r} is not usable; give 1s to 1h, such as --chaos=60s")
    with EmbeddedServer.start() as server:
        return run_async(_run(server, limit_s))


async def _run(server: EmbeddedServer, limit_s: float) -> int:
    tasks = [Task(duration=round(random.uniform(*TASK_S), 3)) for _ in range(int(limit_s * TASKS_PER_S))]
    group = TaskGroup("Chaos", tasks, goal=Goal("completed >= 60%", name="most"), defaults=Task(role="chaos"))
    # The lease matters only for workers on other hosts; here the live ones notice a dead one at once.
    options = ["--role", "chaos", "-c", str(SLOTS), "--lease", "5s", "--grace", "2s"]
    places = [_Place(f"worker-{number}", "worker", options) for number in range(1, WORKERS + 1)]
    places.append(_Place("monitor", "monitor"))
    async with Client(server.url) as client:
        handle = await client.submit(group)
        click.echo(
            f"{counted(len(tasks), 'task')} on a throw-away server that ends with this demo.\n"
            f"In another terminal, try:\nceylon status --redis {server.url}",
            err=True,
        )
        chaos = _Chaos(client, handle, Display(client, sys.stdout), processes.environ_of(server), limit_s, places)
        try:
            async with asyncio.timeout(limit_s + REST_S):
                view = await chaos.run()
        except TimeoutError:
            raise WaitTimeoutError(f"the group did not finish within {limit_s + REST_S:g} s") from None
        return await _verdict(chaos, view)


async def _verdict(chaos: _Chaos, view: GroupView) -> int:
    found = await audit(chaos.client.connection, chaos.client.keys, [view.id])
    problems = [str(drift) for drift in found.drift]
    problems += [f"{gid} changes although it has finished" for gid in found.moving]
    for goal in view.goals:
        at = chaos.settled[goal.name]
        if len(at) != 1:
            problems.append(f"goal {goal.name} settled {counted(len(at), 'time')}: {at}")
    workers = _kills_of(place for place in chaos.places if place.command == "worker")
    monitors = _kills_of(chaos.places) - workers
    say = chaos.display.say
    say(f"Killed: {counted(workers, 'worker')}, {counted(monitors, 'monitor')}.")
    say(f"Twice:  {counted(view.counters.crashes, 'attempt')} died with a worker and ran again.")
    if view.counters.failed:
        say(f"Poison: {counted(view.counters.failed, 'task')} ended as failed: too many workers died under it.")
    if problems:
        say(f"Audit:  {counted(found.tasks, 'task')}: drift {len(problems)}")
        for problem in problems:
            say(problem)
        return 1
    say(f"Audit:  {counted(found.tasks, 'task')}, each counted once: drift 0.")
    for goal in view.goals:
        say(f"Goal:   {goal.name} ({goal.when}) settled once, at event {chaos.settled[goal.name][0]:,}.")
    return 0


def _kills_of(places: Iterable[_Place]) -> int:
    return sum(place.kills for place in places)


def _place_of(worker: str) -> str:
    """A worker's name is its place's, its pid, and a part that is unique."""
    return worker.rsplit("-", 2)[0]
