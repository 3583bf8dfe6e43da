"""`ceylon demo --chaos`: workers really die, the audit judges, and nothing is left behind however it ends."""

from __future__ import annotations

import re
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import redis
from commands import Commands, Process, commands_on, is_alive, on_a_terminal, plain, until

from rq_ceylon.app import Ceylon
from rq_ceylon.store.keys import Keys

ALL = 5
"""Four workers and a monitor."""


@pytest.fixture
def commands(short_tmp_path: Path) -> Iterator[Commands]:
    with commands_on("", short_tmp_path) as commands:
        yield commands


def chaos(commands: Commands, duration: str) -> tuple[Process, str]:
    """The demo in a pipe, with settings around that are not meant for it, and its server's URL."""
    mine = {"CEYLON_APP": "nowhere:app", "CEYLON_WORKER_BURST": "1", "CEYLON_NAMESPACE": "mine"}
    demo = commands.start("ceylon", "demo", f"--chaos={duration}", environ=mine)
    until(lambda: "--redis unix://" in commands.said(demo), "its server is named")
    return demo, commands.said(demo).split("--redis ")[1].split()[0]


def pids(url: str) -> set[int]:
    with Ceylon(url).sync_client() as client:
        return {worker.pid for worker in client.workers()}


@pytest.mark.long
def test_workers_are_killed_and_replaced_and_every_task_counts_once(commands: Commands) -> None:
    demo, url = chaos(commands, "6s")
    seen: set[int] = set()
    with Ceylon(url).sync_client() as client:
        until(lambda: len(client.workers()) == ALL, "all are there")

        def has_finished() -> bool:
            if "\nWORKER " in commands.said(demo):  # before it ends anything
                return True
            seen.update(worker.pid for worker in client.workers() if is_alive(worker.pid))
            return False

        until(has_finished, "the group has finished", 60)

    assert demo.wait(30) == 0
    said = commands.said(demo)
    assert "Traceback" not in said
    assert "Error" not in said
    assert "\x1b" not in said
    assert max(len(line) for line in said.splitlines()) <= 80
    kills = re.findall(r"^ *\d+\.\d s  killed (worker-[1-4], which ran [0-9] tasks?|monitor)$", said, re.MULTILINE)
    assert len(kills) >= 2
    assert len(seen) > ALL, "the killed are replaced"
    workers = sum(kill.startswith("worker") for kill in kills)
    assert re.search(rf"^Killed: {workers} workers?, {len(kills) - workers} monitors?\.$", said, re.MULTILINE)
    assert re.search(r"^Twice:  [1-9]\d* attempts? died with a worker and ran again\.$", said, re.MULTILINE)
    assert "Audit:  240 tasks, each counted once: drift 0." in said
    assert re.search(r"^Goal:   most \(completed >= 60%\) settled once, at event \d+\.$", said, re.MULTILINE)
    done = re.findall(r"^worker-\d  +\w+ +0 +0 +(\d+) +(\d+)$", said, re.MULTILINE)
    assert len(done) == ALL - 1
    assert sum(int(number) for number, _ in done) == 240
    assert sum(int(number) for _, number in done) == workers
    assert not any(is_alive(pid) for pid in seen)


def test_drift_is_named_and_fails(commands: Commands) -> None:
    demo, url = chaos(commands, "2s")
    server: Any = redis.Redis.from_url(url, decode_responses=True)
    with Ceylon(url).sync_client() as client:
        gid = client.groups()[0].id
    events = Keys("ceylon").group_part(gid, "events")
    until(lambda: any("completed" in line for line in server.lrange(events, 0, -1)), "a task has ended")
    twice = next(line for line in server.lrange(events, 0, -1) if "completed" in line)

    server.rpush(events, twice)

    assert demo.wait(60) == 1
    said = commands.said(demo)
    tid = twice.split("|")[2].split(",")[0]
    assert f"{gid}/{tid}: end is completed, completed, should be completed" in said
    assert re.search(r"^Audit:  80 tasks: drift \d+$", said, re.MULTILINE)
    assert "counted once" not in said
    assert "Traceback" not in said


@pytest.mark.long
@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGKILL, -signal.SIGKILL)])
def test_however_it_ends_nothing_is_left(number: signal.Signals, code: int, commands: Commands) -> None:
    demo, url = chaos(commands, "60s")
    until(lambda: len(pids(url)) == ALL, "all are there")
    until(lambda: " s  killed " in commands.said(demo), "one was killed")
    living = {pid for pid in pids(url) if is_alive(pid)}

    demo.send_signal(number)

    assert demo.wait(20) == code
    until(lambda: not any(is_alive(pid) for pid in living), "all have ended")
    until(lambda: not Path(url.removeprefix("unix://")).parent.exists(), "the server's folder is gone")
    said = commands.said(demo)
    assert "Traceback" not in said
    assert ("Stopped; everything that this demo started has ended." in said) == (number == signal.SIGINT)


@pytest.mark.long
def test_a_terminal_shows_who_is_dead_and_who_is_back(commands: Commands) -> None:
    code, drawn = on_a_terminal(commands, "ceylon", "demo", "--chaos=4s", once_shown=lambda: None, NO_COLOR="1")

    assert code == 0
    lines = plain(drawn)
    assert not re.search(r"\x1b\[[0-9;]*3[0-9]m", drawn)
    assert any(line.startswith("WORKER") for line in lines)
    for state in ("starting", "running", "killed", "back"):
        assert any(re.match(rf"(worker-\d|monitor) +{state} ", line) for line in lines), state
    assert any(re.fullmatch(r"\[━+◆━*─+\]", line) for line in lines), "the goal's mark is passed"
    assert any(re.fullmatch(r"[1-9] kills? so far; they go on for \d s", line) for line in lines)
    assert any(re.match(r" +\d\.\d s  killed ", line) for line in lines)
    assert "Audit:  160 tasks, each counted once: drift 0." in lines


def test_an_unusable_duration_is_refused(commands: Commands) -> None:
    for text in ("soon", "0", "2h"):
        ended = commands.run("ceylon", "demo", "--chaos", text)

        assert ended.returncode == 2
        assert ended.stderr.startswith("Error: --chaos: ")
