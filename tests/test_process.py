"""
How a process ends, whatever users' code does: hostile handlers in real workers, on both event loops.
"""

from __future__ import annotations

import signal
import textwrap
from collections.abc import Iterator

import pytest
from commands import Commands, Process, until

from rq_ceylon.app import Ceylon
from rq_ceylon.client import SyncClient
from rq_ceylon.models import Task

GRACE_S, ALLOWANCE_S = 0.3, 2.0
LIMIT_S = 30.0
"""Less than what the handlers would take."""

LOOPS = ("asyncio", "uvloop")

LAUNCH = f"""
import sys
loop, sys.argv[0] = sys.argv[1], "ceylon-worker"
del sys.argv[1]
if loop == "asyncio":
    sys.modules["uvloop"] = None
from rq_ceylon import cli, process
from rq_ceylon.worker import executor
process.ALLOWANCE_S, executor.CLEANUP_S = {ALLOWANCE_S}, 0.3
cli.COMMAND(prog_name="ceylon-COMMAND")
"""
"""A command with a shorter allowance, on the loop that its first argument names."""

HOSTILE = {
    "blocks_the_loop": "time.sleep(60)",
    "spins_on_the_loop": "while True: pass",
    "hangs_at_exit": "atexit.register(time.sleep, 60)",
    "goes_on_in_every_other_way": """
        async def stubborn():
            while True:
                try:
                    await asyncio.sleep(60)
                except asyncio.CancelledError:
                    pass

        TASKS.append(asyncio.create_task(stubborn()))
        multiprocessing.get_context("fork").Process(target=time.sleep, args=[60]).start()
        asyncio.get_running_loop().run_in_executor(None, time.sleep, 60)
        ThreadPoolExecutor(2).submit(time.sleep, 60)
        await stubborn()
    """,
}
LAST_LINES = {
    "blocks_the_loop": ("what runs in it took too long to end; its main thread is at", "in hostile"),
    "spins_on_the_loop": ("what runs in it took too long to end; its main thread is at", "in hostile"),
    "hangs_at_exit": ("its atexit functions took too long to end",),
}
"""What the watch says when it must end the process; the others end by themselves."""


def app_with(body: str) -> str:
    head = """
        import asyncio, atexit, multiprocessing, os, pathlib, sys, time
        from concurrent.futures import ThreadPoolExecutor
        from rq_ceylon import Ceylon

        app = Ceylon()
        TASKS = []

        @app.task
        async def hostile(name: str) -> None:
            pathlib.Path(name).touch()
    """
    return textwrap.dedent(head) + textwrap.indent(textwrap.dedent(body), "    ")


@pytest.fixture
def client(redis_url: str) -> Iterator[SyncClient]:
    with Ceylon(redis_url).sync_client() as client:
        yield client


def launch(commands: Commands, loop: str, *arguments: str, command: str = "worker") -> Process:
    """
    A command on that loop, with the shorter allowance.
    """
    return commands.launch("-c", LAUNCH.replace("COMMAND", command), loop, *arguments)


def workers_with(commands: Commands, client: SyncClient, body: str, *arguments: str) -> dict[str, Process]:
    """
    One worker per event loop, each of which has begun the hostile task.
    """
    (commands.folder / "jobs.py").write_text(app_with(body))
    found = {}
    for loop in LOOPS:
        client.submit(Task(uses="hostile", arguments={"name": f"begun-{loop}"}, role=loop))
        found[loop] = launch(commands, loop, "jobs:app", "-r", loop, "--grace", f"{GRACE_S}s", *arguments)
    for loop in LOOPS:
        until((commands.folder / f"begun-{loop}").exists, f"the task has begun on {loop}")
    return found


@pytest.mark.parametrize("name", HOSTILE)
def test_sigterm_ends_a_worker_whatever_its_handler_does(name: str, commands: Commands, client: SyncClient) -> None:
    workers = workers_with(commands, client, HOSTILE[name])

    for worker in workers.values():
        worker.send_signal(signal.SIGTERM)

    for loop, worker in workers.items():
        worker.wait(LIMIT_S)
        said = commands.said(worker)
        assert worker.returncode == (143 if name.endswith("loop") else 0), said
        assert said.count("This process ends now") == (name in LAST_LINES), said
        assert all(words in said for words in LAST_LINES.get(name, ())), said
        assert "Traceback" not in said, said
        assert loop in said
