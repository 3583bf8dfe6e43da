"""What a developer starts: an embedded server, everything at once, an app with logging and callable goals."""

from __future__ import annotations

import json
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest
from commands import Commands, Process, commands_on, is_alive, on_a_terminal, until

JOBS = """\
import logging
from rq_ceylon import Ceylon

app = Ceylon()
log = logging.getLogger("my.jobs")

@app.task(role="r")
async def add(a: int, b: int) -> int:
    log.info("adding\\nin two lines")
    return a + b

@app.task(role="r", max_attempts=1)
async def fail(password: str) -> None:
    try:
        raise ValueError("no good")
    except ValueError:
        log.exception("it went wrong")
        raise

@app.goal_check
def enough(view):
    return view.counters.completed >= 2
"""

GROUP = """\
name: Sums
defaults: {role: r, uses: add}
tasks: {one: {with: {a: 1, b: 2}}, two: {with: {a: 3, b: 4}}}
goal: {name: two, call: enough, success_message: Both are there.}
"""


@pytest.fixture
def commands(short_tmp_path: Path) -> Iterator[Commands]:
    """Without a configured server: this user's own is the one in the test's folder."""
    (short_tmp_path / "jobs.py").write_text(JOBS)
    (short_tmp_path / "group.yaml").write_text(GROUP)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("CEYLON_SERVER_DIR", str(short_tmp_path / "server"))
        with commands_on("", short_tmp_path) as commands:
            yield commands


def started(commands: Commands, *arguments: str, says: str) -> Process:
    process = commands.start(*arguments)
    until(lambda: says in commands.said(process), f"{arguments} says {says!r}")
    return process


def test_other_commands_find_this_users_server_and_a_second_one_says_that_it_runs(commands: Commands) -> None:
    assert commands.run("ceylon", "status").returncode == 3
    server = started(commands, "ceylon", "server", says="Ctrl-C ends it")

    second = commands.run("ceylon", "server")
    gid = commands.run("submit", "group.yaml").stdout.strip()
    commands.run("worker", "jobs:app", "--burst")
    told = commands.json("ceylon", "show", gid, "--json")

    assert second.returncode == 2
    assert second.stderr.startswith("Error: A server already runs in ")
    assert "unix://" in second.stderr
    assert told["group"]["counters"]["completed"] == 2
    server.send_signal(signal.SIGINT)
    assert server.wait(15) == 0
    assert "Traceback" not in commands.said(server)
    assert commands.run("ceylon", "status").returncode == 3

    started(commands, "ceylon", "server", says="Ctrl-C ends it")
    assert commands.json("ceylon", "show", gid, "--json") == told


def test_up_runs_server_worker_and_monitor_and_ends_them_together(commands: Commands) -> None:
    up = started(commands, "ceylon", "up", "jobs:app", "--log-format", "json", says="Up: ")

    ended = commands.run("submit", "group.yaml", "--wait=all")
    pids = [worker["pid"] for worker in commands.json("ceylon", "workers", "--json")["workers"]]
    up.send_signal(signal.SIGINT)

    assert ended.returncode == 0, ended.stderr
    assert "Goal achieved: two" in ended.stderr
    assert len(pids) == 2
    assert up.wait(30) == 0
    until(lambda: not any(is_alive(pid) for pid in pids), "worker and monitor have ended", 5)
    said = commands.said(up)
    assert "Traceback" not in said
    messages = [json.loads(line)["message"] for line in said.splitlines() if line.startswith("{")]
    assert any("serves r with" in message for message in messages)
    assert any(message.startswith("Goal achieved: two") for message in messages)


def test_up_ends_with_the_code_of_a_worker_that_cannot_start(commands: Commands) -> None:
    ended = commands.run("ceylon", "up", "nowhere:app")

    assert ended.returncode == 4
    assert "there is no module 'nowhere'" in ended.stderr


def test_up_starts_no_server_beside_the_one_that_clients_would_use(commands: Commands, redis_url: str) -> None:
    given = {"REDIS_URL": redis_url}
    up = commands.start("ceylon", "up", "jobs:app", environ=given)
    until(lambda: "Up: " in commands.said(up), "it is up")

    ended = commands.run("submit", "group.yaml", "--wait=all", "--timeout", "30s", environ=given)
    up.send_signal(signal.SIGINT)

    assert ended.returncode == 0, ended.stderr
    assert up.wait(30) == 0
    assert f"Up: worker, monitor; Redis is {redis_url} (from: REDIS_URL), so no server was started." in commands.said(
        up
    )
    assert not (commands.folder / "server").exists()


def test_up_refuses_a_url_that_gives_each_process_a_server_of_its_own(
    commands: Commands,
) -> None:
    (commands.folder / "alone.py").write_text("from rq_ceylon import Ceylon\napp = Ceylon('embedded://')\n")

    ended = commands.run("ceylon", "up", "alone:app")
    server = commands.start("ceylon", "server", environ={"REDIS_URL": "redis://:secret@elsewhere"})
    until(lambda: "Note: " in commands.said(server), "the server notes it")

    assert ended.returncode == 2
    assert "'embedded://' (from: the application) gives each process a server of its own" in ended.stderr
    note = "Note: REDIS_URL is set to redis://:***@elsewhere; commands with that setting do not use this server"
    assert note in commands.said(server)


def test_a_json_log_is_one_flat_object_per_line_whoever_logs(redis_url: str, tmp_path: Path) -> None:
    (tmp_path / "jobs.py").write_text(JOBS)
    tasks = "{a: {uses: add, with: {a: 1, b: 2}}, b: {uses: fail, with: {password: s3cret}}}"
    (tmp_path / "group.yaml").write_text(f"name: Log\ndefaults: {{role: r}}\ntasks: {tasks}\n")
    with commands_on(redis_url, tmp_path) as commands:
        commands.run("submit", "group.yaml")

        ended = commands.run("worker", "jobs:app", "--burst", "--log-format", "json")

    assert ended.returncode == 0, ended.stderr
    lines = [json.loads(line) for line in ended.stderr.splitlines()]
    assert all({"time", "level", "logger", "message"} <= line.keys() for line in lines)
    mine = {line["message"]: line for line in lines if line["logger"] == "my.jobs"}
    assert set(mine) == {"adding\nin two lines", "it went wrong"}
    assert mine["it went wrong"]["level"] == "error"
    assert mine["it went wrong"]["exception"].endswith("ValueError: no good\n")
    assert "s3cret" not in ended.stderr


@pytest.mark.parametrize(
    ("environ", "coloured"), [({}, True), ({"NO_COLOR": "1"}, False), ({"TERM": "dumb"}, False)], ids=str
)
def test_a_log_on_a_terminal_has_colours_unless_they_are_not_wanted(
    environ: dict[str, str], coloured: bool, redis_url: str, tmp_path: Path
) -> None:
    with commands_on(redis_url, tmp_path) as commands:
        code, drawn = on_a_terminal(
            commands, "worker", "-r", "r", "--burst", once_shown=lambda: None, columns=80, **environ
        )

    assert code == 0, drawn
    assert "serves r with" in drawn
    assert ("\x1b[" in drawn) is coloured


def test_a_monitor_with_the_application_judges_its_callable_goals(redis_url: str, tmp_path: Path) -> None:
    (tmp_path / "jobs.py").write_text(JOBS)
    (tmp_path / "group.yaml").write_text(
        "name: Two\ntasks: {a: {role: r}, b: {role: r}}\ngoal: {name: two, call: enough}"
    )
    with commands_on(redis_url, tmp_path) as commands:
        commands.start("worker", "-r", "r")
        commands.start("monitor", "--app", "jobs:app")

        told = commands.json("submit", "group.yaml", "--wait=goal", "--timeout", "30s", "--json")

    assert told["goals"][0]["status"] == "achieved"
    assert told["goals"][0]["settled"]["by"] == "callable"
