"""Following a group: on a terminal, in a pipe, and as JSON Lines; and leaving it."""

from __future__ import annotations

import json
import re
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest
from commands import Commands, on_a_terminal, plain, until

from rq_ceylon.app import Ceylon
from rq_ceylon.client import SyncClient
from rq_ceylon.models import Goal, Task, TaskGroup

GROUP = """\
name: Four
defaults: {role: r, duration: 0.3}
tasks: {a: {}, b: {needs: a}, c: {needs: b}, d: {uses: unknown, role: nobody}}
goal: {name: two, when: completed >= 2, success_message: Two are there.}
"""

SETTLED = "Goal achieved: two (2 of 4 completed, 2 needed). Two are there."
LAST = "Four: 3 completed, 0 failed, 1 cancelled of 4; completed"


@pytest.fixture
def commands(commands: Commands) -> Commands:
    (commands.folder / "group.yaml").write_text(GROUP)
    return commands


@pytest.fixture
def client(redis_url: str) -> Iterator[SyncClient]:
    with Ceylon(redis_url).sync_client() as client:
        yield client


def submitted(commands: Commands) -> str:
    ended = commands.here("ceylon-submit", "group.yaml")
    assert ended.exit_code == 0, ended.output
    return ended.stdout.strip()


def test_a_terminal_shows_bar_goal_mark_rate_roles_and_what_runs(commands: Commands) -> None:
    gid = submitted(commands)
    commands.here("ceylon", "cancel", f"{gid}/d")

    code, drawn = on_a_terminal(
        commands, "ceylon", "watch", gid, once_shown=lambda: commands.start("worker", "--role", "r", "--name", "one")
    )

    assert code == 0
    lines = plain(drawn)
    assert any(line.startswith("Four: active, 0/4 completed, ") for line in lines)
    assert any(re.fullmatch(r"\[╳+─*◇─+\]", line) for line in lines)
    assert any(re.fullmatch(r"\[━+◆━*╳+─*\]", line) for line in lines)
    assert any(re.match(r"running: [abc] on one-", line) for line in lines)
    assert any(re.match(r"r: \d completed, run mean \d+ ms", line) for line in lines)
    assert any(re.search(r"/s, .*all in ", line) for line in lines)
    assert max(len(line) for line in lines) <= 79
    assert "\x1b[32m" in drawn
    assert [line for line in lines if line.startswith("Goal ")] == [SETTLED]
    assert " ".join(line.strip() for line in lines if line).endswith(LAST), "a long line breaks between words"


def test_ctrl_c_in_the_demo_ends_all_of_it_and_gives_the_terminal_back(tmp_path: Path) -> None:
    code, drawn = on_a_terminal(Commands("", tmp_path), "ceylon", "demo", once_shown=None)

    assert code == 130
    lines = [line for line in plain(drawn) if line]
    assert lines[-1] == "Stopped; everything that this demo started has ended."
    assert "ceylon watch" not in drawn
    assert "Traceback" not in drawn
    assert max(len(line) for line in lines if not line.startswith("$ ")) <= 79
    assert drawn.rfind("\x1b[?25h") > drawn.rfind("\x1b[?25l") > 0, "the cursor is shown again"


def test_without_colour_or_width_it_stays_readable(commands: Commands) -> None:
    gid = submitted(commands)
    commands.here("ceylon", "cancel", f"{gid}/d")

    code, drawn = on_a_terminal(
        commands,
        *("ceylon", "watch", gid),
        once_shown=lambda: commands.start("worker", "--role", "r"),
        columns=40,
        NO_COLOR="1",
    )

    assert code == 0
    assert not re.search(r"\x1b\[[0-9;]*3[0-9]m", drawn)
    bars = [line for line in plain(drawn) if line.startswith("[")]
    assert bars
    assert {len(bar) for bar in bars} == {37}


def test_a_pipe_gets_one_plain_line_per_change(commands: Commands) -> None:
    gid = submitted(commands)
    commands.here("ceylon", "cancel", f"{gid}/d")
    watching = commands.start("ceylon", "watch", gid, environ={"FORCE_COLOR": "1"})
    until(lambda: "0/4 completed, 0 running, 1 cancelled" in commands.said(watching), "the group is shown")

    commands.start("worker", "--role", "r")

    assert watching.wait(30) == 0
    assert "\x1b" not in commands.said(watching)
    lines = commands.said(watching).splitlines()
    assert len(set(lines)) == len(lines)
    assert SETTLED in lines
    assert lines[-2:] == ["3/4 completed, 0 running, 1 cancelled", LAST]


def test_results_are_json_lines_of_what_has_ended_and_follow_what_ends(commands: Commands, client: SyncClient) -> None:
    gid = submitted(commands)
    assert commands.here("ceylon", "results", gid).stdout == ""
    assert commands.here("ceylon", "results", "nosuch").exit_code == 2
    commands.here("ceylon", "cancel", f"{gid}/d")
    following = commands.start("ceylon", "results", gid, "--follow")
    until(lambda: "/d" in commands.said(following), "what had ended is told")

    commands.start("worker", "--role", "r")

    assert following.wait(30) == 0
    told = [json.loads(line) for line in commands.said(following).splitlines()]
    assert [result["id"] for result in told] == [f"{gid}/{tid}" for tid in "dabc"]
    assert [result["status"] for result in told] == ["cancelled", "completed", "completed", "completed"]
    assert told[1]["ended"] <= told[2]["started"]
    now = [json.loads(line) for line in commands.here("ceylon", "results", gid).stdout.splitlines()]
    assert {result["id"]: result for result in now} == {result["id"]: result for result in told}


@pytest.mark.parametrize("times", [1, 2])
@pytest.mark.parametrize("way", ["submit", "watch"])
def test_ctrl_c_leaves_the_group_and_says_how_to_come_back(
    way: str, times: int, commands: Commands, client: SyncClient
) -> None:
    gid = submitted(commands)
    if way == "submit":
        watching = commands.start("submit", "group.yaml", "--wait=all")
    else:
        watching = commands.start("ceylon", "watch", gid)
    until(lambda: "0/4 completed" in commands.said(watching), "the group is shown")
    gid = client.groups()[-1].id

    for _ in range(times):
        watching.send_signal(signal.SIGINT)

    # The second may come when Python has given the signal back to the system already; a shell says 130 of both.
    assert watching.wait(10) in ((130,) if times == 1 else (130, -signal.SIGINT))
    said = commands.said(watching)
    assert "Traceback" not in said
    if times == 1:
        assert said.endswith(f"Stopped watching; the group goes on.\nCome back with: ceylon watch {gid}\n")
    assert client.group(gid).view().status == "active"


HOSTILE = "\x1b]0;owned\x07 \x9b2J \x7f \u202e end"
SHOWN = r"\x1b]0;owned\x07 \x9b2J \x7f \u202e end"

JOBS = f"""
from rq_ceylon import Ceylon

app = Ceylon()

@app.task(role="r", max_attempts=1)
async def steer() -> None:
    raise ValueError("one\\n\\ttwo " + {HOSTILE!r})
"""


def test_what_others_wrote_cannot_steer_a_terminal(commands: Commands, client: SyncClient) -> None:
    (commands.folder / "jobs.py").write_text(JOBS)
    name = f"Name {HOSTILE}\nGoal achieved: forged"
    goal = Goal("failed >= 1", name="g", success_message=HOSTILE)
    gid = client.submit(TaskGroup(name, [Task(id="a", uses="steer", role="r")], goal=goal)).id

    _, drawn = on_a_terminal(
        commands,
        "ceylon",
        "watch",
        gid,
        once_shown=lambda: commands.start("worker", "jobs:app", "--burst"),
        columns=140,
    )

    (worker,) = commands.started
    assert worker.wait(30) == 0
    told = [
        commands.said(worker),
        *(commands.here("ceylon", *words.split()).stdout for words in ("groups", f"show {gid}", f"show {gid}/a")),
    ]
    for text in [drawn, *told]:
        assert SHOWN in text
        assert not any(char in text for char in ("\x1b]", "\x07", "\x9b", "\x7f", "\u202e"))
    assert "\x1b" not in "".join(told)
    lines = plain(drawn)
    assert any(line.startswith(f"Name {SHOWN}\\nGoal achieved") for line in lines), "a name stays on its line"
    assert f"ValueError: one\n\ttwo {SHOWN}" in told[-1], "a traceback keeps its lines"
    assert f"ValueError: one\\n\ttwo {SHOWN}" in told[0], "and a record of the log stays on its line"
    exact = commands.json("ceylon", "show", f"{gid}/a", "--json")
    assert exact["group"]["name"] == name
    assert exact["tasks"][0]["error"]["message"] == f"one\n\ttwo {HOSTILE}"
