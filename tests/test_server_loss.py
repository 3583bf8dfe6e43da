"""
Servers that are full, or killed and started again, under real worker processes: nothing that was accepted is lost, and
nothing runs twice because of it.
"""

from __future__ import annotations

import asyncio
import collections
import contextlib
import os
import statistics
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import redis
from commands import Commands, commands_on, until
from conftest import ENGINES
from servers import Fleet, Running, fleet_of

from rq_ceylon import (
    Ceylon,
    Client,
    ConnectionLostError,
    Goal,
    NotFoundError,
    QueueFullError,
    SyncClient,
    Task,
    TaskGroup,
)
from rq_ceylon.dev.server import EmbeddedServer
from rq_ceylon.models import Durability
from rq_ceylon.store.events import event_of
from rq_ceylon.store.keys import Keys

JOBS = """
import asyncio, os
from pathlib import Path

from rq_ceylon import Backoff, Ceylon, TaskContext

app = Ceylon()
ran = os.open(Path(__file__).parent / "ran", os.O_WRONLY | os.O_APPEND | os.O_CREAT)


@app.task(backoff=Backoff(first="10ms", cap="50ms"))
async def work(context: TaskContext, payload: str = "") -> str:
    await asyncio.sleep(0.01)
    if payload == "flaky" and context.attempt == 1:
        raise ValueError("the first time")
    os.write(ran, f"{context.group_id}/{context.task_id}\\n".encode())
    return "done"
"""

GROUP, AHEAD = 50, 400


class Distance(NamedTuple):
    """How many tasks run while the server is killed so often, and how long that may take."""

    tasks: int
    kills: int
    limit_s: float


SHORT, WHOLE = Distance(1_000, 2, 90), Distance(20_000, 10, 600)


@pytest.fixture
def commands(start_server: Callable[..., EmbeddedServer], short_tmp_path: Path, namespace: str) -> Iterator[Commands]:
    (short_tmp_path / "jobs.py").write_text(JOBS)
    with commands_on(start_server().url, short_tmp_path) as commands:
        yield commands


def runs(commands: Commands) -> collections.Counter[str]:
    """How often each task was run."""
    path = commands.folder / "ran"
    return collections.Counter(path.read_text().split() if path.exists() else [])


def everything(raw: Any) -> set[Any]:
    """But for the index, which is written before a group, and forgets what was not."""
    return {(key, member) for key in raw.scan_iter() if "{i:" not in key for member in members(raw, key)}


def members(raw: Any, key: str) -> list[Any]:
    if raw.type(key) == "zset":
        return [(name, score) for name, score in raw.zrange(key, 0, -1, withscores=True)]
    if raw.type(key) == "hash":
        return list(raw.hgetall(key).items())
    return list(raw.smembers(key)) if raw.type(key) == "set" else [None]


# ---- the memory limit ------------------------------------------------------------------------------------------------
def fill(client: SyncClient, payload: str) -> dict[str, int]:
    """Submit groups until one is refused; the ids of the others, with their sizes."""
    accepted = {}
    for number in range(1000):
        count = 1 + number % 7
        tasks = [Task(uses="work", arguments={"payload": payload})] * count
        try:
            accepted[client.submit(TaskGroup("g", tasks)).id] = count
        except QueueFullError:
            return accepted
    raise AssertionError("it never gets full")


@pytest.mark.every_engine
def test_a_full_server_refuses_cleanly_and_drains_to_empty(commands: Commands, namespace: str) -> None:
    raw: Any = redis.Redis.from_url(commands.url, decode_responses=True)
    keys = Keys(namespace)
    with Ceylon(commands.url, namespace=namespace).sync_client() as client:
        raw.config_set("maxmemory", raw.info()["used_memory"] + 4_000_000)
        large = TaskGroup("large", [Task(uses="work", arguments={"payload": "x" * 4_000})] * 1500)
        with pytest.raises(QueueFullError, match="at its memory limit"):
            client.submit(large)  # a part of it fits
        assert client.groups() == []

        accepted = fill(client, "x" * 10_000)
        accepted |= fill(client, "")  # to the last byte
        assert {view.id for view in client.groups()} == set(accepted)
        # What is used rises and falls with the buffers of connections: only far over the limit nothing can be written.
        raw.config_set("maxmemory", raw.info()["used_memory"] - 1_000_000)
        before = everything(raw)
        for work in (TaskGroup("g", [Task(uses="work")], key="k"), Task(uses="work"), large):
            with pytest.raises(QueueFullError, match="at its memory limit"):
                client.submit(work)
        assert everything(raw) == before

        commands.start("worker", "jobs:app", "--namespace", namespace, "--concurrency", "20", "--log-level", "error")
        until(lambda: all(view.is_finished for view in client.groups()), "it drains", 60)
        await_nothing_left(raw, keys)

        assert {view.id: view.counters.completed for view in client.groups()} == accepted
        assert runs(commands) == collections.Counter(
            f"{gid}/{tid}" for gid, count in accepted.items() for tid in range(1, count + 1)
        )
        assert client.submit(TaskGroup("g", [Task(uses="work")], key="k")).wait("all", timeout=30).is_finished
    raw.close()


def await_nothing_left(raw: Any, keys: Keys) -> None:
    """Nobody has to do anything any more: no entries, delayed ones, pages of outboxes, payloads, claims."""
    began = time.monotonic()
    while left := list(undone(raw, keys)):
        assert time.monotonic() < began + 120, f"left: {left}"
        time.sleep(0.05)


def undone(raw: Any, keys: Keys) -> Iterator[str]:
    for stream in ("high", "normal", "low"):
        key = keys.role_part("default", stream)
        if entries := raw.xrange(key, count=3):
            yield f"{key}: {raw.xlen(key)} entries: {entries}"
        if pending := raw.xpending_range(key, "workers", "-", "+", 3):
            consumers, meta = raw.xinfo_consumers(key, "workers"), raw.hgetall(keys.role_part("default", "meta"))
            yield f"{key}: {pending} of {consumers}, {meta}"
    for part in ("outbox", "tasks", "claims", "delayed"):
        for key in raw.scan_iter(f"{keys.prefix}*:{part}"):
            yield f"{key}: {members(raw, key)}, {raw.hgetall(key.removesuffix(part) + 'meta')}"


# ---- a file that was cut ---------------------------------------------------------------------------------------------
def append_only_file(server: Running) -> Path:
    """The one that is written to; Redis 6.2 has no folder for it."""
    home = server.log.parent
    (path,) = {*home.glob("appendonlydir/*.incr.aof"), *home.glob("appendonly.aof")}
    return path


def await_loaded(server: Running) -> None:
    until(lambda: not server.ask("INFO", "persistence")["loading"], "it has loaded")


def rewrite_append_only_file(server: Running) -> None:
    """What docs/reliability.md says to do about a file that was cut."""
    await_loaded(server)
    server.ask("BGREWRITEAOF")
    until(lambda: not server.ask("INFO", "persistence")["aof_rewrite_in_progress"], "the file is written anew")


@pytest.mark.every_engine
def test_a_file_cut_in_the_middle_of_a_script_is_mended_by_writing_it_anew(
    binary: str, short_tmp_path: Path, namespace: str
) -> None:
    """Without that, Redis 7.0 runs what it left of the script at the second restart, and 49 tasks stand there twice."""
    lines = ["appendonly yes", "appendfsync always"]
    group = TaskGroup("g", [Task(uses="work")] * 50, key="k")
    stream = Keys(namespace).role_part("default", "normal")
    with fleet_of(binary, short_tmp_path) as fleet:
        server = fleet.start(*lines)
        with Ceylon(server.url, namespace=namespace).sync_client() as client:
            client.submit(group)
        server.kill()
        path = append_only_file(server)
        os.truncate(path, path.read_bytes().rindex(b"XADD") + 10)
        server = fleet.start(*lines, port=server.port)
        rewrite_append_only_file(server)
        assert server.ask("XLEN", stream) == 0
        with Ceylon(server.url, namespace=namespace).sync_client() as client:
            assert client.submit(group).repeated
        assert server.ask("XLEN", stream) == 50
        server.kill()
        server = fleet.start(*lines, port=server.port)
        await_loaded(server)
        assert server.ask("XLEN", stream) == 50


# ---- kill -9 and restart ---------------------------------------------------------------------------------------------
class Outage:
    """
    Two workers, a monitor and a client that submits by key, on a server that is killed and started again.

    Attributes:
        cut: what the kernel had not yet written to the disk is lost too, as when power fails.
        confirmed: up to where the file was when a submission was last confirmed to be on the disk.
        lost: submissions that were accepted, and forgotten.
    """

    def __init__(self, fleet: Fleet, folder: Path, namespace: str, distance: Distance, fsync: str) -> None:
        self.fleet, self.keys, self.distance = fleet, Keys(namespace), distance
        # With `everysec` what was not confirmed is lost and comes back only as maintenance finds out.
        self.cut = fsync == "everysec"
        self.lines = ["appendonly yes", f"appendfsync {fsync}", "auto-aof-rewrite-percentage 0"]
        self.server = fleet.start(*self.lines)
        self.commands = Commands(self.server.url, folder)
        self.confirmed, self.bytes_lost, self.lost = 0, 0, 0
        self.confirming = 0
        self.accepted: dict[str, bool] = {}

    def kill_and_restart(self) -> None:
        self.server.kill()
        if self.cut:
            path = append_only_file(self.server)
            self.bytes_lost += path.stat().st_size - self.confirmed
            os.truncate(path, self.confirmed)
        self.server = self.fleet.start(*self.lines, port=self.server.port)
        # A file written anew would leave `confirmed` without a meaning.
        if not self.cut and "Truncating the AOF" in self.server.log.read_text():
            rewrite_append_only_file(self.server)

    def ran(self) -> int:
        return runs(self.commands).total()

    def counted(self) -> tuple[int, int]:
        """How many tasks are counted, of how many; nothing, if the server does not answer."""
        try:
            with redis.Redis(port=self.server.port, decode_responses=True) as raw:
                pipeline = raw.pipeline(transaction=False)
                for key in raw.scan_iter(f"{self.keys.prefix}{{g:*meta", count=1000):
                    pipeline.hmget(key, "completed", "total")
                counts = pipeline.execute()
        except redis.RedisError:
            return -1, 0
        return sum(int(completed or 0) for completed, _ in counts), sum(int(total or 0) for _, total in counts)

    @contextlib.contextmanager
    def confirmation(self) -> Iterator[None]:
        """Note what is on the disk once a submission is; no kill may come in between."""
        self.confirming += 1
        try:
            yield
            self.confirmed = append_only_file(self.server).stat().st_size
        finally:
            self.confirming -= 1

    async def see_through(self, client: Client, number: int) -> None:
        """Submit a group until it is accepted, wait for its end, and do so again if it is lost: it has a key."""
        durability: Durability = "fsync" if self.cut and number % 5 == 0 else "none"
        may_be_lost = self.cut and durability == "none"
        tasks = [Task(uses="work", arguments={"payload": "flaky" if i % 10 == 0 else ""}) for i in range(GROUP)]
        goals = [Goal("completed >= 50%", name="half"), Goal("completed >= 100%", name="all")]
        while True:
            try:
                with self.confirmation() if durability == "fsync" else contextlib.nullcontext():
                    group = TaskGroup(f"g{number}", tasks, goal=goals, key=f"k{number}")
                    run = await client.submit(group, durability=durability)
                assert run.repeated or run.id not in self.accepted or may_be_lost, f"{run.id} was accepted and lost"
                self.accepted[run.id] = may_be_lost
                view = await run.wait("all")
                assert view.is_finished
                return
            except ConnectionLostError:
                continue
            except NotFoundError:
                assert may_be_lost, f"group {number} was accepted and lost"
                self.lost += 1


async def outlast(outage: Outage, namespace: str) -> list[float]:
    """Run all tasks with all kills; returns the seconds from each restart until a hundred more tasks were counted."""
    times: list[float] = []
    commands, (tasks, kills, limit_s) = outage.commands, outage.distance
    for _ in range(2):
        commands.start("worker", "jobs:app", "--namespace", namespace, "-c", "20", "--lease", "2s")
    commands.start("monitor", "--namespace", namespace)

    async def kill_all() -> None:
        for number in range(1, kills + 1):
            # Not between a confirmation and its note: that would cut off what was confirmed.
            while outage.ran() < number * tasks // (kills + 1) or outage.confirming:  # noqa: ASYNC110
                await asyncio.sleep(0.02)
            outage.kill_and_restart()
            began, first, now, total = time.monotonic(), -1, -1, 0
            while first < 0 or now < min(first + 100, total):
                now, total = await asyncio.to_thread(outage.counted)
                first = now if first < 0 else first
                await asyncio.sleep(0.02)
            times.append(time.monotonic() - began)

    async with asyncio.timeout(limit_s), Client(outage.server.url, namespace=namespace) as client:
        async with asyncio.TaskGroup() as together:
            together.create_task(kill_all())
            for number in range(tasks // GROUP):
                while number * GROUP - outage.ran() >= AHEAD:  # noqa: ASYNC110
                    await asyncio.sleep(0.02)
                together.create_task(outage.see_through(client, number))
        # Some that have ended may be forgotten with the last kill; they run again.
        for number in range(tasks // GROUP):
            await outage.see_through(client, number)
        assert len(await client.groups()) == len(outage.accepted) == tasks // GROUP
    assert all(process.poll() is None for process in commands.started), "workers and monitor have lived through it"
    return times


def check(outage: Outage, namespace: str) -> None:
    """Every task of every accepted group ended once, and every goal was settled once."""
    raw: Any = redis.Redis(port=outage.server.port, decode_responses=True)
    keys, tasks = outage.keys, outage.distance.tasks
    await_nothing_left(raw, keys)
    audited = outage.commands.run("ceylon", "audit", "--namespace", namespace)
    assert audited.returncode == 0, audited.stdout
    assert f"{tasks:,} tasks: drift 0" in audited.stdout or f"{tasks} tasks: drift 0" in audited.stdout
    tids = [str(number) for number in range(1, GROUP + 1)]
    for gid in outage.accepted:
        assert raw.hget(keys.group_part(gid, "meta"), "status") == "finished"
        lines = raw.lrange(keys.group_part(gid, "events"), 0, -1)
        events = [event_of(number, line) for number, line in enumerate(lines, 1)]
        ends = collections.Counter(task.tid for event in events for task in event.tasks if task.outcome == "completed")
        assert ends == collections.Counter(tids)
        settled = collections.Counter(name for event in events for name, _ in event.goals)
        assert settled == {"half": 1, "all": 1}
    assert set(runs(outage.commands)) == {f"{gid}/{tid}" for gid in outage.accepted for tid in tids}
    raw.close()


LONG = [pytest.mark.long, pytest.mark.timeout(WHOLE.limit_s + 60)]


@pytest.mark.parametrize(
    ("engine", "fsync", "distance"),
    [
        *(pytest.param(engine, "always", SHORT, id=f"{engine}-short") for engine in ENGINES),
        *(pytest.param(engine, "always", WHOLE, id=f"{engine}-whole", marks=LONG) for engine in ENGINES),
        pytest.param(ENGINES[0], "everysec", WHOLE, id=f"{ENGINES[0]}-cut", marks=LONG),
    ],
    indirect=["engine"],
)
@pytest.mark.anyio
async def test_nothing_accepted_is_lost_and_goals_settle_once_when_the_server_is_killed(
    engine: str,
    binary: str,
    short_tmp_path: Path,
    namespace: str,
    fsync: str,
    distance: Distance,
    record_property: Callable[[str, object], None],
) -> None:
    (short_tmp_path / "jobs.py").write_text(JOBS)
    with fleet_of(binary, short_tmp_path) as fleet:
        outage = Outage(fleet, short_tmp_path, namespace, distance, fsync)
        try:
            times = await outlast(outage, namespace)
            check(outage, namespace)
        finally:
            outage.commands.end()
            for process in outage.commands.started:
                print(outage.commands.said(process)[-3000:])
            print(outage.server.log.read_text()[-3000:])
    record_property(
        "figures",
        f"{engine}, appendfsync {fsync}: {distance.tasks:,} tasks, {distance.kills} kills; "
        f"100 more counted after a restart: median {statistics.median(times):.2f} s, longest {max(times):.2f} s; "
        f"{outage.bytes_lost:,} bytes and {outage.lost} submissions lost, "
        f"{outage.ran() - distance.tasks} tasks ran again",
    )
