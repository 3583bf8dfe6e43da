"""Worker processes follow the load: more while tasks queue, fewer once it is quiet, and none loses a task."""

from __future__ import annotations

import asyncio
import os
import signal
import sys
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest
from commands import ROOT, eventually

from rq_ceylon.client import Client
from rq_ceylon.models import Task, TaskGroup
from rq_ceylon.worker.scale import Scale
from rq_ceylon.worker.supervisor import Supervisor

pytestmark = pytest.mark.anyio


@pytest.fixture
async def client(redis_url: str) -> AsyncIterator[Client]:
    async with Client(redis_url) as client:
        yield client


async def until_processes(client: Client, count: int) -> None:
    async def are_there() -> bool:
        return len({worker.pid for worker in await client.workers()}) == count

    await eventually(are_there, f"{count} processes are there", 60)


async def until_role(client: Client, *, queued: set[int], delivered: int, limit_s: float = 30) -> None:
    async with asyncio.timeout(limit_s):
        while True:
            if any(role.queued in queued and role.delivered == delivered for role in await client.roles()):
                return
            await asyncio.sleep(0.02)


@pytest.mark.long
async def test_processes_grow_with_a_backlog_and_shrink_one_by_one_when_quiet(
    client: Client, said: list[str], redis_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    command = [sys.executable, "-m", "rq_ceylon.cli", "worker", "-r", "r", "-c", "2", "--redis", redis_url]
    monkeypatch.setattr("rq_ceylon.worker.supervisor.LOOK_S", 0.1)
    monkeypatch.setattr("rq_ceylon.worker.supervisor.QUIET_S", 0.5)
    supervisor = Supervisor([*command, "--lease", "1s"], processes=(1, 3), url=redis_url, namespace="ceylon")
    running = asyncio.create_task(supervisor.run())
    try:
        await until_processes(client, 1)

        group = await client.submit(TaskGroup("Burst", [Task(role="r", duration=0.4) for _ in range(60)]))
        await until_processes(client, 3)
        view = await group.wait("all", timeout=60)
        await until_processes(client, 1)
    finally:
        supervisor.signal(signal.SIGTERM)
        code = await running

    assert code == 0
    assert (view.counters.completed, view.counters.crashes, view.counters.attempts) == (60, 0, 60)
    growing = [line for line in said if line.startswith("INFO: Growing from 1 to 3 worker processes: ")]
    assert len(growing) == 1
    assert "tasks queued, 2 of 2 slots busy" in growing[0]
    assert not [line for line in said if " died" in line]
    shrinking = [line.split(":")[1].strip() for line in said if line.startswith("INFO: Shrinking ")]
    assert shrinking == [f"Shrinking from {n} to {n - 1} worker processes" for n in (3, 2)]


async def test_a_backlog_that_idle_workers_leave_starts_no_process(
    client: Client, said: list[str], redis_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    command = [sys.executable, "-m", "rq_ceylon.cli", "worker", "-r", "r", "--redis", redis_url]
    monkeypatch.setattr("rq_ceylon.worker.supervisor.LOOK_S", 0.05)
    monkeypatch.setattr("rq_ceylon.worker.supervisor.QUIET_S", 0.1)
    supervisor = Supervisor(command, processes=(1, 3), url=redis_url, namespace="ceylon")
    running = asyncio.create_task(supervisor.run())
    try:
        await until_processes(client, 1)
        await (await client.submit(TaskGroup("Few", [Task(role="r", duration=0) for _ in range(5)]))).wait("all", 30)
    finally:
        supervisor.signal(signal.SIGTERM)
        code = await running

    assert code == 0
    assert not [line for line in said if line.startswith(("INFO: Growing", "INFO: Shrinking"))]


async def test_what_a_killed_process_held_is_given_back_though_no_other_is_there(
    client: Client, redis_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    monkeypatch.setattr("rq_ceylon.worker.supervisor.PAUSE_S", 600.0)  # until another would be
    monkeypatch.setattr("rq_ceylon.worker.supervisor.PAUSE_MAX_S", 600.0)
    command = [sys.executable, "-m", "rq_ceylon.cli", "worker", "-r", "r", "--lease", "10m", "--redis", redis_url]
    supervisor = Supervisor(command, processes=(1, 1), url=redis_url, namespace="ceylon")
    running = asyncio.create_task(supervisor.run())
    try:
        await client.submit(Task(role="r", duration=600))
        await until_role(client, queued={0}, delivered=1)

        (child,) = supervisor._children.values()
        child.kill()

        # Perhaps twice: the page of the submission is handed on too, as nothing has acknowledged it yet.
        await until_role(client, queued={1, 2}, delivered=0)
        await until_processes(client, 0)
    finally:
        supervisor.signal(signal.SIGTERM)
        await running


# ---- one child -------------------------------------------------------------------------------------------------------
def supervisor_of(*command: str, count: int = 1, **options: Any) -> Supervisor:
    return Supervisor(command, processes=(count, count), url="unix:///nowhere.sock", namespace="n", **options)


async def test_each_of_many_processes_is_replaced_when_it_dies(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("rq_ceylon.worker.supervisor.PAUSE_S", 0.01)
    count = min(32, (os.cpu_count() or 1) + 4) + 2  # more than the loop's executor has threads
    supervisor = supervisor_of("/bin/sleep", "600", count=count)
    running = asyncio.create_task(supervisor.run())
    try:
        await eventually(lambda: len(supervisor._children) == count, "all have started")
        first = set(supervisor._children)

        for child in supervisor._children.values():
            child.kill()

        await eventually(lambda: len(set(supervisor._children) - first) == count, "all are replaced")
    finally:
        supervisor.signal(signal.SIGTERM)
        assert await running == 0


@pytest.mark.parametrize(
    ("code", "burst", "at_once"), [(0, False, True), (7, False, True), (1, False, False), (7, True, False)]
)
async def test_a_process_that_wants_to_be_replaced_is_so_at_once(
    code: int, burst: bool, at_once: bool, said: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("rq_ceylon.worker.supervisor.PAUSE_S", 600.0)
    monkeypatch.setattr("rq_ceylon.worker.supervisor.PAUSE_MAX_S", 600.0)
    lives = tmp_path / "lives"
    lives.touch()
    script = f"echo >>{lives}; [ $(wc -l <{lives}) -gt 3 ] && exec sleep 600; exit {code}"
    supervisor = supervisor_of("/bin/sh", "-c", script, burst=burst)
    running = asyncio.create_task(supervisor.run())
    try:
        if at_once:
            await eventually(lambda: (tmp_path / "lives").read_text().count("\n") == 4, "the fourth lives")
        else:
            await eventually(
                lambda: [line for line in said if f"ended with {code}; restarting in 600.0 s" in line], "said"
            )
    finally:
        supervisor.signal(signal.SIGTERM)
        await running

    assert lives.read_text() == "\n" * (4 if at_once else 1)


async def test_in_burst_mode_a_process_that_has_ended_well_is_not_replaced(tmp_path: Path) -> None:
    supervisor = supervisor_of("/bin/sh", "-c", f"echo >>{tmp_path}/lives", count=2, burst=True)

    assert await asyncio.wait_for(supervisor.run(), 30) == 0
    assert (tmp_path / "lives").read_text() == "\n\n"


async def test_a_process_that_ignores_its_signal_is_killed_after_its_grace(
    said: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("rq_ceylon.worker.supervisor.CHILD_END_S", 0.1)
    script = f"trap '' TERM; touch {tmp_path}/deaf; exec sleep 600"
    supervisor = supervisor_of("/bin/sh", "-c", script, grace_s=0.1)
    running = asyncio.create_task(supervisor.run())
    await eventually((tmp_path / "deaf").exists, "it ignores the signal")

    supervisor.signal(signal.SIGTERM)

    await asyncio.wait_for(running, 30)
    assert [line for line in said if "did not end 0.1 s after its grace; killing it" in line]


async def test_a_process_that_cannot_be_started_is_tried_again(
    said: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("rq_ceylon.worker.supervisor.PAUSE_S", 0.01)
    supervisor = supervisor_of("/nowhere/worker")
    running = asyncio.create_task(supervisor.run())

    await eventually(lambda: len([line for line in said if "cannot be started" in line]) >= 3, "it is tried again")
    supervisor.signal(signal.SIGTERM)

    await asyncio.wait_for(running, 30)


async def test_a_process_that_waits_for_redis_is_left_alone(said: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("rq_ceylon.worker.supervisor.LOOK_S", 0.01)
    supervisor = Supervisor(["/bin/sleep", "600"], processes=(1, 2), url="unix:///nowhere.sock", namespace="n")
    running = asyncio.create_task(supervisor.run())
    try:
        await eventually(lambda: len([line for line in said if "load is not known" in line]) >= 3, "it looks")
        (child,) = supervisor._children.values()
        assert child.returncode is None
    finally:
        supervisor.signal(signal.SIGTERM)
        assert await running == 0


# ---- how many --------------------------------------------------------------------------------------------------------
def test_a_backlog_grows_the_processes_at_once_while_half_of_the_slots_are_busy() -> None:
    scale = Scale(1, 8, quiet_s=10)

    assert scale.look(2, 4, busy=4, queued=9, now=0) == 4
    assert scale.look(2, 4, busy=3, queued=9, now=0) == 2  # whatever holds them back, more processes do not help
    assert scale.look(2, 4, busy=8, queued=99, now=0) == 8


def test_a_scale_lets_one_go_after_a_time_in_which_one_less_had_sufficed() -> None:
    scale = Scale(1, 8, quiet_s=10)

    assert [scale.look(4, 4, busy=9, queued=0, now=now) for now in (0, 9, 10, 19, 20)] == [4, 4, 3, 4, 3]
    assert scale.look(4, 4, busy=10, queued=0, now=21) == 4  # three would be too few, so the time begins anew
    assert [scale.look(4, 4, busy=9, queued=0, now=now) for now in (22, 31)] == [4, 4]
    assert scale.look(4, 4, busy=9, queued=1, now=32) == 4  # and so it does with a backlog
    assert [scale.look(4, 4, busy=9, queued=0, now=now) for now in (33, 42, 43)] == [4, 4, 3]


def test_a_scale_keeps_to_its_limits() -> None:
    scale = Scale(2, 3, quiet_s=0)

    assert scale.look(0, 4, busy=0, queued=0, now=0) == 2
    assert scale.look(5, 4, busy=20, queued=9, now=0) == 3
    assert [scale.look(2, 4, busy=0, queued=0, now=now) for now in range(5)] == [2] * 5
