"""Workers on one host give back at once what a killed one held; nobody takes from the living."""

import os
import signal
from pathlib import Path

import pytest
from bench import Bench
from commands import Commands, until

from rq_ceylon.app import Ceylon
from rq_ceylon.models import Task, TaskGroup
from rq_ceylon.presence import Presence
from rq_ceylon.store.connection import Connection
from rq_ceylon.store.keys import Keys
from rq_ceylon.worker.neighbours import Neighbours

pytestmark = pytest.mark.anyio


JOBS = """
import asyncio
from rq_ceylon import Ceylon, TaskContext

app = Ceylon()

@app.task(role="p")
async def work(context: TaskContext) -> None:
    if not context.crashes:
        await asyncio.Event().wait()
"""
"""A task that ends only if a worker has died under it."""


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A host of the test's own."""
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    return tmp_path


def test_the_last_worker_to_leave_removes_the_folder(folder: Path) -> None:
    keys = Keys("ceylon")
    one, other = Neighbours("redis://a", keys), Neighbours("redis://a", keys)
    for _ in range(2):
        one.enter("w1", ["r"])
        other.enter("w2", ["r"])
        (shared,) = (folder / f"ceylon-{os.getuid()}").iterdir()
        one.leave()
        assert [path.name for path in shared.iterdir()] == ["w2"]
        other.leave()
        assert not shared.exists()


async def test_a_worker_has_no_neighbours_where_no_temporary_folder_can_be_written(
    redis_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def none() -> str:
        raise FileNotFoundError(2, "No usable temporary directory found")

    monkeypatch.setattr("tempfile.gettempdir", none)
    neighbours = Neighbours(redis_url, Keys("n"))

    neighbours.enter("w", ["p"])
    async with Connection(redis_url) as connection:
        await neighbours.bury_dead(connection)
    neighbours.leave()


@pytest.mark.parametrize(("host", "shown"), [("my host_1.lan", "my-host_1"), ("häuschen", "h-uschen"), ("", "host")])
def test_a_host_may_be_called_what_a_name_may_not(host: str, shown: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("socket.gethostname", lambda: host)

    assert Presence(Keys("n"), "worker", None, task_names=[]).name.startswith(f"{shown}-{os.getpid()}-")


def test_a_killed_workers_tasks_restart_on_its_host_long_before_the_lease_ends(
    redis_url: str, commands: Commands
) -> None:
    with Ceylon(redis_url).sync_client() as client:
        (commands.folder / "jobs.py").write_text(JOBS)
        doomed = commands.start("worker", "jobs:app", "--role", "p", "-c", "1", "--lease", "10m")
        group = client.submit(TaskGroup("g", [Task(uses="work", role="p")]))
        until(lambda: group.view().counters.in_progress == 1, "the task runs")
        commands.start("worker", "jobs:app", "--role", "p", "-c", "1")
        until(lambda: len(client.workers()) == 2, "both workers are there")

        os.kill(doomed.pid, signal.SIGKILL)

        view = group.wait("all", timeout=20)
        assert (view.counters.completed, view.counters.crashes) == (1, 1)
        assert len(client.workers()) == 1


async def test_the_living_are_left_alone_and_the_dead_are_buried_once(bench: Bench, connection: Connection) -> None:
    bench.queued("g")
    bench.started("neighbour", "g")
    theirs, mine = Neighbours("redis://x", bench.keys), Neighbours("redis://x", bench.keys)
    theirs.enter("neighbour", ["p"])
    mine.enter("me", ["p"])

    await mine.bury_dead(connection)
    assert bench.fetch("w") == []

    assert theirs._mine is not None
    os.close(theirs._mine[1])  # as its end would
    await mine.bury_dead(connection)
    (delivery,) = bench.fetch("w")
    assert bench.claim("w", delivery) == ["GRANTED"]
    await mine.bury_dead(connection)
    assert bench.fetch("w") == []
    mine.leave()


async def test_a_file_whose_content_the_host_lost_holds_nobody_up(bench: Bench, connection: Connection) -> None:
    mine = Neighbours("redis://x", bench.keys)
    mine.enter("me", ["p"])
    (mine._folder / "empty").touch()
    await mine.bury_dead(connection)
    assert os.listdir(mine._folder) == ["me"]
    mine.leave()


async def test_only_dead_workers_of_the_same_namespace_are_buried(
    bench: Bench, connection: Connection, redis_url: str, folder: Path
) -> None:
    mine, other = Neighbours(redis_url, bench.keys), Neighbours(redis_url, Bench(redis_url, "other").keys)
    mine.enter("me", ["p"])
    assert mine._folder != other._folder
    mine.leave()
    assert list(os.walk(folder))[-1][2] == []


async def test_a_folder_of_somebody_else_is_not_trusted(bench: Bench, connection: Connection, folder: Path) -> None:
    shared = folder / f"ceylon-{os.getuid()}"
    shared.mkdir()
    shared.chmod(0o777)
    bench.queued("g")
    bench.started("w", "g")
    mine = Neighbours("redis://x", bench.keys)
    mine.enter("me", ["p"])
    mine._folder.mkdir()
    forged = mine._folder / "w"
    forged.write_text('{"worker": "w", "roles": ["p"]}')

    await mine.bury_dead(connection)

    assert bench.fetch("v") == []
