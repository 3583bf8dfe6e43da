"""The main job as its commands run it: ten tasks, two worker processes, a goal at five; also while processes die."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from commands import EXAMPLE, ROOT, Commands, Process, is_alive, run_to_end, until

from rq_ceylon.app import Ceylon
from rq_ceylon.client import SyncClient


@pytest.fixture
def client(redis_url: str) -> Iterator[SyncClient]:
    """What the tests look with while the commands run: many looks cost little."""
    with Ceylon(redis_url).sync_client() as client:
        yield client


def job(folder: Path, duration: float) -> str:
    """The example with other durations."""
    text = EXAMPLE.read_text()
    assert "duration: 1}" in text
    path = folder / "job.yaml"
    path.write_text(text.replace("duration: 1}", f"duration: {duration}}}"))
    return str(path)


def start_two_workers(commands: Commands, *more: str) -> list[Process]:
    return [commands.start("worker", "--role", "processor", "-c", "2", *more) for _ in range(2)]


def await_workers(client: SyncClient, count: int) -> list[int]:
    """The process ids of that many workers, once they are registered."""
    found: list[int] = []

    def are_there() -> bool:
        found[:] = [worker.pid for worker in client.workers() if worker.kind == "worker"]
        return len(found) == count

    until(are_there, f"{count} workers are registered")
    return found


def shown(commands: Commands, client: SyncClient) -> dict[str, Any]:
    (group,) = client.groups()
    told: dict[str, Any] = commands.json("ceylon", "show", group.id, "--json")
    return told


def await_middle(client: SyncClient) -> None:
    """Some are completed, some are left, and all slots are in use."""

    def is_in_the_middle() -> bool:
        (group,) = client.groups()
        return 1 <= group.counters.completed <= 5 and group.counters.in_progress == 4

    until(is_in_the_middle, "the job is in the middle")


def assert_finished(told: dict[str, Any]) -> None:
    """The goal was achieved before the end, and at the end all ten are completed, each once."""
    counters, (goal,) = told["group"]["counters"], told["goals"]
    assert goal["status"] == "achieved"
    assert 5 <= goal["settled"]["counters"]["completed"] < 10
    assert (told["group"]["status"], told["group"]["outcome"]) == ("finished", "completed")
    assert (counters["total"], counters["completed"], counters["failed"], counters["cancelled"]) == (10, 10, 0, 0)
    assert {task["status"] for task in told["tasks"]} == {"completed"}
    assert len(told["tasks"]) == 10


def submit_in_background(commands: Commands, client: SyncClient, file: str) -> Process:
    process = commands.start("submit", file, "--wait=all")
    until(lambda: bool(client.groups()), "the group is there")
    return process


def test_ten_tasks_meet_a_goal_at_five_on_two_worker_processes(commands: Commands, client: SyncClient) -> None:
    start_two_workers(commands)
    commands.start("monitor")
    await_workers(client, 2)

    ended = commands.run("submit", str(EXAMPLE), "--wait=all")

    assert ended.returncode == 0, ended.stderr
    assert "Goal achieved: partial-processing-complete" in ended.stderr
    assert "Successfully completed minimum required tasks!" in ended.stderr
    told = shown(commands, client)
    assert_finished(told)
    assert len({task["worker"] for task in told["tasks"]}) == 2
    assert {task["attempt"] for task in told["tasks"]} == {1}
    assert commands.json("ceylon", "status", "--json")["monitors"] == 1


def test_a_worker_that_is_killed_loses_no_task(commands: Commands, client: SyncClient) -> None:
    first, _ = start_two_workers(commands, "--lease", "3s")
    await_workers(client, 2)
    following = submit_in_background(commands, client, job(commands.folder, 0.5))
    await_middle(client)

    first.kill()

    assert following.wait(30) == 0
    told = shown(commands, client)
    assert_finished(told)
    assert told["group"]["counters"]["crashes"] >= 1
    assert {task["attempt"] for task in told["tasks"]} == {1}


def test_the_goal_needs_no_monitor_and_workers_may_come_late(commands: Commands, client: SyncClient) -> None:
    monitor = commands.start("monitor")
    until(lambda: [one.kind for one in client.workers()] == ["monitor"], "the monitor is registered")
    monitor.kill()
    following = submit_in_background(commands, client, job(commands.folder, 0.1))
    assert shown(commands, client)["group"]["counters"]["pending"] == 10

    start_two_workers(commands)

    assert following.wait(20) == 0
    assert_finished(shown(commands, client))
    assert "no worker serves role 'processor'" in commands.said(following)


# ---- as the compose file says ----------------------------------------------------------------------------------------
def start_service(commands: Commands, name: str) -> Process:
    """Start what a service of the compose file starts, on the test's server."""
    service = yaml.safe_load((ROOT / "docker-compose.yml").read_text())["services"][name]
    program, *arguments = service["command"]
    environ = dict(service["environment"])
    assert environ["CEYLON_REDIS_URL"] == "redis://redis:6379/0"
    environ.update(CEYLON_REDIS_URL=commands.url, CEYLON_WORKER_CONCURRENCY="2")
    return commands.start(program.removeprefix("ceylon-"), *arguments, environ=environ)


def test_the_services_of_the_compose_file_do_the_main_job_and_tell_their_health(
    commands: Commands, client: SyncClient
) -> None:
    assert commands.run("ceylon", "workers", "--check").returncode == 1

    start_service(commands, "worker")
    start_service(commands, "worker")
    monitor = start_service(commands, "monitor")
    until(lambda: len(client.workers()) == 3, "two workers and a monitor are registered")
    ended = commands.run("submit", str(EXAMPLE), "--wait=all")

    assert ended.returncode == 0, ended.stderr
    assert_finished(shown(commands, client))
    until(lambda: "Goal achieved: partial-processing-complete" in commands.said(monitor), "the monitor says so")
    healthy = commands.run("ceylon", "workers", "--check")
    assert (healthy.returncode, healthy.stdout.count("worker "), healthy.stdout.count("monitor ")) == (0, 2, 1)


# ---- several processes of one command --------------------------------------------------------------------------------
def children(process: Process) -> list[int]:
    found = run_to_end("ps", "-o", "pid=", "--ppid", str(process.pid)).stdout
    return [int(pid) for pid in found.split()]


def start_two_processes(commands: Commands, client: SyncClient, *more: str) -> tuple[Process, list[int]]:
    supervisor = commands.start("worker", "--role", "processor", "-c", "2", "--processes", "2", *more)
    pids = await_workers(client, 2)
    assert set(pids) <= set(children(supervisor))
    return supervisor, pids


def test_what_a_killed_child_held_comes_back_long_before_its_lease_ends(commands: Commands, client: SyncClient) -> None:
    _, pids = start_two_processes(commands, client, "--lease", "60s")
    following = submit_in_background(commands, client, job(commands.folder, 0.5))
    await_middle(client)

    os.kill(pids[0], signal.SIGKILL)

    assert following.wait(15) == 0
    told = shown(commands, client)
    assert_finished(told)
    assert told["group"]["counters"]["crashes"] >= 1


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL])
def test_no_child_outlives_its_supervisor(number: signal.Signals, commands: Commands, client: SyncClient) -> None:
    supervisor, pids = start_two_processes(commands, client)

    supervisor.send_signal(number)

    supervisor.wait(10)
    until(lambda: not any(is_alive(pid) for pid in pids), "all children have ended", 5)
    assert supervisor.returncode == (0 if number == signal.SIGTERM else -signal.SIGKILL)
    until(lambda: not client.workers(), "no worker is registered", 5)
