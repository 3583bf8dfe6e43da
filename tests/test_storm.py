"""
The whole under fire: three worker processes and two monitors, groups of 250 tasks in three levels over two roles,
with failures and retries, while workers are killed. Judged from the raw records.
"""

from __future__ import annotations

import asyncio
import collections
import os
import random
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import redis

from rq_ceylon import Client, Goal, Task, TaskGroup
from rq_ceylon.store.events import Event, event_of
from rq_ceylon.store.keys import STREAMS, Keys
from rq_ceylon.views import COUNTERS

pytestmark = [pytest.mark.anyio, pytest.mark.timeout(150)]

JOBS = """
from rq_ceylon import Backoff, Ceylon, TaskContext

app = Ceylon()
SOON = Backoff(first="10ms", cap="50ms")


@app.task(backoff=SOON)
async def work(context: TaskContext, kind: str) -> str:
    if kind == "bad" or (kind == "flaky" and context.attempt < 2):
        raise ValueError(kind)
    return kind
"""

TASKS = 250
"""In each group."""

SEED = int(os.environ.get("CEYLON_STORM_SEED", "7"))


def tasks_of(rnd: random.Random) -> list[Task]:
    levels: list[list[str]] = [[], [], []]
    tasks = []
    for number in range(TASKS):
        level = min(2, number * 3 // TASKS)
        tid = f"t{number}"
        above = levels[level - 1] if level else []
        kind = rnd.choices(["good", "flaky", "bad"], [0.9, 0.07, 0.03])[0]
        needs = rnd.sample(above, rnd.choice([1, 1, 2])) if above else []
        levels[level].append(tid)
        role = rnd.choice(["cpu", "io"])
        tasks.append(Task(id=tid, uses="work", arguments={"kind": kind}, role=role, needs=needs))
    return tasks


@pytest.mark.parametrize("groups", [4, pytest.param(20, marks=pytest.mark.long)])
async def test_nothing_is_lost_or_counted_twice_while_workers_are_killed(
    groups: int, redis_url: str, namespace: str, tmp_path: Path
) -> None:
    rnd = random.Random(SEED)
    (tmp_path / "jobs.py").write_text(JOBS)
    where = ["--redis", redis_url, "--namespace", namespace, "--log-level", "error"]
    base = [sys.executable, "-m", "rq_ceylon.cli"]
    roles = ["--role", "cpu", "--role", "io", "-c", "20", "--lease", "1s"]
    processes: list[subprocess.Popen[bytes]] = []

    def start(*command: str) -> subprocess.Popen[bytes]:
        process = subprocess.Popen([*base, *command, *where], cwd=tmp_path)
        processes.append(process)
        return process

    goals = [
        Goal("completed >= 50%", name="half"),
        Goal("failed <= 100", name="clean"),
        Goal("completed >= 240", name="many"),
    ]
    needs = {}
    try:
        workers = [start("worker", "jobs:app", *roles) for _ in range(3)]
        for _ in range(2):
            start("monitor")
        async with Client(redis_url, namespace=namespace) as client:
            handles = []
            for number in range(groups):
                tasks = tasks_of(rnd)
                handle = await client.submit(TaskGroup(f"g{number}", tasks, goal=goals))
                needs[handle.id] = {str(task.id): list(task.needs) for task in tasks}
                handles.append(handle)
            waiting = asyncio.gather(*(handle.wait("all", timeout=120) for handle in handles))
            kills = 0
            while not waiting.done() and kills < 6:
                await asyncio.wait([waiting], timeout=0.7)
                victim = rnd.randrange(3)
                workers[victim].send_signal(signal.SIGKILL)
                workers[victim].wait()
                workers[victim] = start("worker", "jobs:app", *roles)
                kills += 1
            await waiting
            await quiet(redis_url, namespace)
    finally:
        for process in processes:
            process.terminate()
        for process in processes:
            process.wait(40)
    check(redis_url, namespace, needs)


async def quiet(url: str, namespace: str) -> None:
    """Until every stream, pending list, delayed set and outbox is empty."""
    raw: Any = redis.Redis.from_url(url, decode_responses=True)
    keys = Keys(namespace)
    for _ in range(300):
        if not left(raw, keys):
            return
        await asyncio.sleep(0.1)
    details = {
        key: raw.zrange(key, 0, 3)
        if key.endswith(("outbox", "delayed", "by_name"))
        else raw.xpending_range(key, "workers", "-", "+", 3)
        for key in left(raw, keys)
    }
    pytest.fail(f"not quiet within 30 s: {details}")


def left(raw: Any, keys: Keys) -> list[str]:
    found = []
    for role in ("cpu", "io"):
        for stream in STREAMS:
            key = keys.role_part(role, stream)
            if raw.exists(key) and (raw.xlen(key) or raw.xpending(key, "workers")["pending"]):
                found.append(key)
        found += [key for part in ("delayed", "by_name") if raw.zcard(key := keys.role_part(role, part))]
    return found + list(raw.scan_iter(f"{keys.prefix}*:outbox"))


def check(url: str, namespace: str, needs: dict[str, dict[str, list[str]]]) -> None:
    raw: Any = redis.Redis.from_url(url, decode_responses=True)
    keys = Keys(namespace)
    assert left(raw, keys) == []
    for gid, tasks in needs.items():
        meta, results = raw.hgetall(keys.group_part(gid, "meta")), raw.hgetall(keys.group_part(gid, "results"))
        lines = raw.lrange(keys.group_part(gid, "events"), 0, -1)
        events = [event_of(number, line) for number, line in enumerate(lines, 1)]
        assert meta["status"] == "finished"
        recount = collections.Counter(text.split("|")[0] for text in results.values())
        assert set(results) == set(tasks), "every task has a result"
        assert {name: int(meta[name]) for name in COUNTERS} == {name: recount[name] for name in COUNTERS}
        ends = collections.Counter(
            task.tid for event in events for task in event.tasks if task.outcome in ("completed", "failed", "cancelled")
        )
        assert ends == collections.Counter(dict.fromkeys(tasks, 1)), "every task ends in one event"
        settled = collections.Counter(name for event in events for name, _ in event.goals)
        assert settled == {"half": 1, "clean": 1, "many": 1}
        check_order(tasks, results, events)
    permanent = (":groups", ":roles", ":workers")
    for key in raw.scan_iter(f"{keys.prefix}*"):
        assert raw.ttl(key) > 0 or "{r:" in key or key.endswith(permanent), f"{key} has no TTL"


def check_order(tasks: dict[str, list[str]], results: dict[str, str], events: list[Event]) -> None:
    """No task started before the commits of those it needs."""
    ended = {task.tid: event.at_ms for event in events for task in event.tasks if task.outcome == "completed"}
    for tid, text in results.items():
        outcome, _, _, _, _, _, started, *_ = text.split("|")
        if outcome == "completed":
            assert all(int(started) >= ended[need] for need in tasks[tid])
