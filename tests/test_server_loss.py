"""
Servers that are full, or killed and started again, under real worker processes: nothing that was accepted is lost, and
nothing runs twice because of it.
"""

from __future__ import annotations

import collections
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import redis
from commands import Commands, commands_on, until

from rq_ceylon import Ceylon, QueueFullError, SyncClient, Task, TaskGroup
from rq_ceylon.store.keys import Keys
from rq_ceylon.store.server import EmbeddedServer

JOBS = """
import os
from pathlib import Path

from rq_ceylon import Ceylon, TaskContext

app = Ceylon()
ran = os.open(Path(__file__).parent / "ran", os.O_WRONLY | os.O_APPEND | os.O_CREAT)


@app.task
async def work(context: TaskContext, payload: str = "") -> str:
    os.write(ran, f"{context.group_id}/{context.task_id}\\n".encode())
    return "done"
"""


@pytest.fixture
def commands(start_server: Callable[..., EmbeddedServer], short_tmp_path: Path, namespace: str) -> Iterator[Commands]:
    (short_tmp_path / "jobs.py").write_text(JOBS)
    with commands_on(start_server().url, short_tmp_path) as commands:
        yield commands


def runs(commands: Commands) -> collections.Counter[str]:
    """
    How often each task was run.
    """
    path = commands.folder / "ran"
    return collections.Counter(path.read_text().split() if path.exists() else [])


def everything(raw: Any) -> set[Any]:
    return {(key, member) for key in raw.scan_iter() for member in members(raw, key)}


def members(raw: Any, key: str) -> list[Any]:
    if raw.type(key) == "zset":
        return [(name, score) for name, score in raw.zrange(key, 0, -1, withscores=True)]
    if raw.type(key) == "hash":
        return list(raw.hgetall(key).items())
    return list(raw.smembers(key)) if raw.type(key) == "set" else [None]


# ---- the memory limit ------------------------------------------------------------------------------------------------
def fill(client: SyncClient, payload: str) -> dict[str, int]:
    """
    Submit groups until one is refused; the ids of the others, with their sizes.
    """
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
        # To the last byte: now that the limit is below what is used, nothing at all may be written.
        accepted |= fill(client, "")
        assert {view.id for view in client.groups()} == set(accepted)
        before = everything(raw)
        for work in (TaskGroup("g", [Task(uses="work")], key="k"), Task(uses="work"), large):
            with pytest.raises(QueueFullError, match="at its memory limit"):
                client.submit(work)
        assert everything(raw) == before

        commands.start("worker", "jobs:app", "--namespace", namespace, "--concurrency", "20", "--log-level", "error")
        until(lambda: all(view.is_finished for view in client.groups()), "it drains", 60)
        until(lambda: not undone(raw, keys), "nothing is left of it", 60)

        assert {view.id: view.counters.completed for view in client.groups()} == accepted
        assert runs(commands) == collections.Counter(
            f"{gid}/{tid}" for gid, count in accepted.items() for tid in range(1, count + 1)
        )
        assert client.submit(TaskGroup("g", [Task(uses="work")], key="k")).wait("all", timeout=30).is_finished
    raw.close()


def undone(raw: Any, keys: Keys) -> list[str]:
    """
    What still waits for somebody: entries, delayed ones, pages of outboxes, payloads, claims.
    """
    streams = [keys.role_part("default", name) for name in ("high", "normal", "low")]
    entries = [key for key in streams if raw.xlen(key) or raw.xpending(key, "workers")["pending"]]
    parts = ("outbox", "tasks", "claims", "delayed")
    return entries + [key for part in parts for key in raw.scan_iter(f"{keys.prefix}*:{part}")]
