"""The commands as a user meets them: fast help, one message and exit code per fault, JSON for programs."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import redis
from bench import Bench
from commands import EXAMPLE, ROOT, Commands, commands_on, run_to_end, until

from rq_ceylon import Ceylon, Goal, Task, TaskGroup, errors
from rq_ceylon.cli.common import EXIT_CODES
from rq_ceylon.cli.main import _task_row
from rq_ceylon.dev.server import EmbeddedServer
from rq_ceylon.models import TaskStatus
from rq_ceylon.store import transitions
from rq_ceylon.views import TaskResult, TaskView
from rq_ceylon.worker.loop import HUNG_EXIT_CODE

GROUP = "name: Two\ntasks:\n  a: {role: r, duration: 0}\n  b: {role: r, duration: 0, needs: a}\ngoal: completed >= 1\n"

ADD = """\
from rq_ceylon import Ceylon

app = Ceylon()

@app.task(role="resize")
async def resize(width: int) -> int:
    return width
"""

COUNTERS = {
    "total", "waiting", "pending", "in_progress", "completed", "failed", "cancelled", "attempts", "crashes"
}  # fmt: skip


@pytest.fixture
def commands(commands: Commands) -> Commands:
    (commands.folder / "group.yaml").write_text(GROUP)
    return commands


@pytest.fixture
def store(redis_url: str) -> Iterator[redis.Redis]:
    with redis.Redis.from_url(redis_url, decode_responses=True) as store:
        yield store


def submitted(commands: Commands, *arguments: str) -> str:
    ended = commands.run("submit", "group.yaml", *arguments)
    assert ended.returncode == 0, ended.stderr
    return ended.stdout.strip()


def assert_refused(ended: subprocess.CompletedProcess[str], code: int, *words: str) -> None:
    """The command ended with this code and one message that has all these words, and no traceback."""
    assert ended.returncode == code, (ended.returncode, ended.stdout, ended.stderr)
    assert "Traceback" not in ended.stderr
    messages = [line for line in ended.stderr.splitlines() if line.startswith("Error: ")]
    assert len(messages) == 1, ended.stderr
    for word in words:
        assert word in ended.stderr
    assert ended.stdout == ""


# ---- help ------------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("name", ["ceylon", "worker", "submit", "monitor"])
def test_help_loads_neither_redis_nor_pydantic_and_names_the_exit_codes(name: str) -> None:
    script = f"""
import sys
from rq_ceylon import cli
try:
    cli.{name}(["--help"])
except SystemExit as end:
    assert end.code == 0
loaded = {{name.partition(".")[0] for name in sys.modules}} & {{"redis", "pydantic", "rich", "uvloop"}}
assert not loaded, loaded
"""
    ended = run_to_end(sys.executable, "-c", script)

    assert ended.returncode == 0, ended.stderr
    assert "Exit codes: 0" in ended.stdout
    assert "Examples:" in ended.stdout


def test_every_exit_code_of_the_code_is_listed_in_help_readme_and_docs() -> None:
    kinds = [kind for kind in vars(errors).values() if isinstance(kind, type) and issubclass(kind, errors.CeylonError)]
    codes = {0, 130, 143, HUNG_EXIT_CODE, *(kind.exit_code for kind in kinds)}
    readme = " ".join((ROOT / "README.md").read_text().split())
    table = (ROOT / "docs" / "deployment.md").read_text().split("## Exit codes")[1].split("##")[0]

    listed = re.sub(r"\s+", " ", EXIT_CODES.removeprefix("\b"))
    assert {int(code) for code in re.findall(r"(?<=[:,] )\d+", listed)} == codes
    assert {int(code) for row in re.findall(r"^\| ([\d, ]+) \|", table, re.M) for code in row.split(",")} == codes
    assert listed.split("codes: ")[1] in readme


# ---- log -------------------------------------------------------------------------------------------------------------
def test_quiet_leaves_out_the_line_of_each_task_and_wins_over_the_environment(commands: Commands) -> None:
    told = {}
    for option in ([], ["--quiet"]):
        submitted(commands)
        ended = commands.run("worker", "-r", "r", "--burst", *option, environ={"CEYLON_LOG_LEVEL": "info"})
        assert ended.returncode == 0, ended.stderr
        told[bool(option)] = ended.stderr

    assert " completed in " in told[False]
    assert told[True] == ""


def test_quiet_beside_a_log_level_is_refused(tmp_path: Path) -> None:
    ended = Commands("", tmp_path).run("worker", "-r", "r", "-q", "--log-level", "debug")

    assert_refused(ended, 2, "--quiet and --log-level debug contradict each other; give only one")


# ---- Redis -----------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    "arguments",
    [("submit", str(EXAMPLE)), ("worker", "-r", "r"), ("monitor",), ("ceylon", "status")],
    ids=lambda value: value[0],
)
def test_without_redis_each_command_says_how_to_get_one(arguments: tuple[str, ...], tmp_path: Path) -> None:
    ended = Commands("", tmp_path).run(*arguments)

    assert_refused(ended, 3, "No Redis is configured", "ceylon server", "--redis")


@pytest.mark.parametrize(
    "arguments",
    [("submit", str(EXAMPLE)), ("ceylon", "groups")],
    ids=lambda value: value[0],
)
def test_a_redis_that_is_not_there_ends_a_client_command(arguments: tuple[str, ...], tmp_path: Path) -> None:
    ended = Commands("redis://127.0.0.1:1", tmp_path).run(*arguments)

    assert_refused(ended, 3, "Cannot reach Redis at redis://127.0.0.1:1 (connection refused)")


@pytest.mark.parametrize(
    "arguments",
    [("worker", "-r", "r"), ("worker", "-r", "r", "--processes", "2"), ("monitor",)],
    ids=["worker", "supervisor", "monitor"],
)
def test_a_redis_that_is_not_there_is_waited_for_by_what_runs_for_long(
    arguments: tuple[str, ...], tmp_path: Path
) -> None:
    with commands_on("redis://127.0.0.1:1", tmp_path) as commands:
        process = commands.start(*arguments)
        says = "Waiting until Redis answers. Cannot reach Redis at redis://127.0.0.1:1 (connection refused)"
        until(lambda: says in commands.said(process), "it says that it waits")
        process.terminate()
        assert process.wait(30) == 0
        assert "Traceback" not in commands.said(process)


def test_a_wrong_password_is_refused_and_not_shown(start_server: Callable[..., EmbeddedServer], tmp_path: Path) -> None:
    server = start_server()
    with redis.Redis.from_url(server.url) as store:
        store.config_set("requirepass", "right")

    without = Commands(server.url, tmp_path).run("submit", str(EXAMPLE))
    wrong = Commands(server.url.replace("unix://", "unix://:s3cret@"), tmp_path).run("submit", str(EXAMPLE))

    assert_refused(without, 3, "refuses the user or password")
    assert_refused(wrong, 3, "refuses the user or password")
    assert "s3cret" not in wrong.stderr


def test_a_server_that_evicts_is_refused_with_the_remedy(
    start_server: Callable[..., EmbeddedServer], tmp_path: Path
) -> None:
    server = start_server()
    with redis.Redis.from_url(server.url) as store:
        store.config_set("maxmemory-policy", "allkeys-lru")
        for arguments in (("submit", str(EXAMPLE)), ("ceylon", "status"), ("worker", "-r", "r"), ("monitor",)):
            ended = Commands(server.url, tmp_path).run(*arguments)

            assert_refused(ended, 3, "allkeys-lru", "CONFIG SET maxmemory-policy noeviction")
            assert len(ended.stderr.splitlines()) == 1, "no connection is left to be collected after its loop"
        assert store.keys("*") == []


# ---- submit: what is refused -----------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("name: Two\ntasks: [a\n", ["group.yaml:3:1: "]),
        ("name: Two\ntasks:\n  a: {rolle: r}\n", ["group.yaml:3:7: ", "unknown key", 'did you mean "role"?']),
        ("", ["group.yaml:1:1: ", "empty"]),
        ("name: Two\ntasks: {a: {}}\ngoal: completed >= 2\n", ["completed >= 2"]),
        ("name: Two\ntasks:\n  a: {needs: b}\n  b: {needs: a}\n", ["group.yaml:"]),
        (
            f"name: Two\ntasks:\n  a:\n    with: {{text: {'x' * 1_100_000}}}\n",
            ["1,048,576 are allowed", "store the data elsewhere"],
        ),
    ],
    ids=["broken YAML", "unknown key", "empty", "impossible goal", "circle", "too large"],
)
def test_a_file_that_cannot_be_used_is_refused_and_nothing_written(
    text: str, words: list[str], commands: Commands, store: redis.Redis
) -> None:
    (commands.folder / "group.yaml").write_text(text)

    assert_refused(commands.run("submit", "group.yaml"), 2, *words)
    for key in store.keys("*"):
        assert "{g:" not in key, f"{key!r} was written"


def test_a_missing_file_and_an_unknown_wait_are_usage_errors(commands: Commands, store: redis.Redis) -> None:
    assert_refused(commands.run("submit", "nowhere.yaml"), 2, "nowhere.yaml: cannot be read")
    assert_refused(commands.run("submit", "group.yaml", "--wait=banana"), 2, "banana", "--wait=goal", "--wait=all")
    assert_refused(commands.run("submit", "group.yaml", "--timeout=soon", "--wait"), 2, "--timeout", "soon")
    assert store.keys("*") == []


def test_a_role_that_nobody_serves_is_refused_on_request_with_the_nearest_name(
    commands: Commands, store: redis.Redis
) -> None:
    commands.start("worker", "-r", "processor")
    until(lambda: bool(commands.json("ceylon", "workers", "--json")["workers"]), "the worker is registered")
    (commands.folder / "group.yaml").write_text("name: Two\ntasks: {a: {role: procesor}}\n")

    ended = commands.run("submit", "group.yaml", "--require-workers")

    assert_refused(ended, 6, "'procesor'", 'did you mean "processor"?')
    assert not [key for key in store.keys("*") if "{g:" in key]


def test_waiting_too_long_ends_with_five_and_the_group_goes_on(commands: Commands) -> None:
    ended = commands.run("submit", "group.yaml", "--wait", "--timeout", "0.5s")

    assert ended.returncode == 5, ended.stderr
    (group,) = commands.json("ceylon", "groups", "--json")["groups"]
    assert ended.stderr.endswith(f"; it goes on.\nCome back with: ceylon watch {group['group']['id']}\n")
    assert group["group"]["status"] == "active"


# ---- submit: what is accepted ----------------------------------------------------------------------------------------
def test_a_key_makes_a_submission_repeatable_and_keeps_other_content_out(commands: Commands) -> None:
    first = commands.run("submit", "group.yaml", "--key", "nightly")
    again = commands.run("submit", "group.yaml", "--key", "nightly")
    (commands.folder / "group.yaml").write_text(GROUP.replace("name: Two", "name: Other"))
    other = commands.run("submit", "group.yaml", "--key", "nightly")

    assert (first.returncode, again.returncode) == (0, 0)
    assert "already submitted" in again.stderr
    assert "already submitted" not in first.stderr
    assert first.stdout == again.stdout
    assert_refused(other, 2, "'nightly'", "other content")
    (group,) = commands.json("ceylon", "groups", "--json")["groups"]
    assert group["group"]["key"] == "nightly"


def test_a_dry_run_checks_the_file_and_needs_no_redis(commands: Commands, store: redis.Redis) -> None:
    ended = commands.run("submit", "group.yaml", "--dry-run")
    without = Commands("", commands.folder).run("submit", "group.yaml", "--dry-run")

    assert (ended.returncode, without.returncode) == (0, 0), ended.stderr + without.stderr
    assert "valid: 1 group, 2 tasks" in ended.stdout
    assert store.keys("*") == []


def test_a_group_comes_from_standard_input_and_is_told_as_json(commands: Commands) -> None:
    told = commands.json("submit", "-", "--json", stdin=GROUP)

    assert told == {
        "schema": 1,
        "group": {
            "id": told["group"]["id"],
            "key": None,
            "name": "Two",
            "status": "active",
            "outcome": None,
            "counters": {**dict.fromkeys(COUNTERS, 0), "total": 2, "waiting": 1, "pending": 1},
        },
        "goals": [{"name": "goal", "when": "completed >= 1", "status": "in_progress", "settled": None}],
    }
    broken = commands.run("submit", "-", stdin="name: [")
    assert_refused(broken, 2, "<stdin>:")


# ---- ceylon ----------------------------------------------------------------------------------------------------------
def test_a_finished_group_is_told_as_json_with_goals_and_tasks(commands: Commands) -> None:
    commands.start("worker", "-r", "r")
    gid = commands.json("submit", "group.yaml", "--json", "--wait=all")["group"]["id"]

    told: dict[str, Any] = commands.json("ceylon", "show", gid, "--json")

    assert set(told) == {"schema", "group", "goals", "tasks"}
    assert told["schema"] == 1
    assert told["group"] == {
        "id": gid,
        "key": None,
        "name": "Two",
        "status": "finished",
        "outcome": "completed",
        "counters": {**dict.fromkeys(COUNTERS, 0), "total": 2, "completed": 2, "attempts": 2},
    }
    (goal,) = told["goals"]
    settled = goal["settled"]
    assert (goal["name"], goal["when"], goal["status"]) == ("goal", "completed >= 1", "achieved")
    assert set(settled) == {"at", "seq", "by", "counters"}
    assert settled["by"] == "commit"
    assert set(settled["counters"]) == COUNTERS
    assert settled["counters"]["completed"] == 1
    tasks = {task["id"]: task for task in told["tasks"]}
    assert set(tasks) == {f"{gid}/a", f"{gid}/b"}
    for task in tasks.values():
        assert (task["status"], task["role"], task["attempt"], task["error"]) == ("completed", "r", 1, None)
    assert tasks[f"{gid}/a"]["ended"] <= tasks[f"{gid}/b"]["started"]
    one = commands.json("ceylon", "show", f"{gid}/a", "--json")
    assert [task["id"] for task in one["tasks"]] == [f"{gid}/a"]


def test_a_group_that_runs_is_not_shown_as_finished_and_one_task_is_no_plural(commands: Commands) -> None:
    (commands.folder / "group.yaml").write_text("name: One\ntasks: {a: {role: r}}\n")

    ended = commands.run("submit", "group.yaml")
    dry = commands.run("submit", "group.yaml", "--dry-run")
    shown = commands.run("ceylon", "show", ended.stdout.strip())

    assert ended.stderr.startswith("Submitted 1 task as group ")
    assert "valid: 1 group, 1 task, " in dry.stdout
    assert shown.stdout.splitlines()[0] == 'Group "One" is active: 0 completed, 0 failed, 0 cancelled so far'
    assert "None" not in shown.stdout


def test_the_tasks_of_a_group_are_shown_in_the_order_of_their_numbers(commands: Commands) -> None:
    (commands.folder / "pages.yaml").write_text(
        "name: p\ndefaults: {role: r}\ntasks: {page-10: , page-2: , page-1: , page-11: }\n"
    )

    gid = commands.run("submit", "pages.yaml").stdout.strip()
    shown = commands.run("ceylon", "show", gid).stdout

    assert re.findall(r"^page-\S*", shown, re.MULTILINE) == ["page-1", "page-2", "page-10", "page-11"]


def test_groups_are_listed_by_status_name_and_number(commands: Commands, bench: Bench) -> None:
    for number in range(102):
        bench.submit(f"g{number:03}")
    bench.run(transitions.cancel_group(bench.keys, "g001"))
    bench.run(transitions.pause_group(bench.keys, "g002"))

    def listed(*options: str) -> tuple[list[str], str]:
        text = commands.run("ceylon", "groups", *options, "--namespace", bench.keys.namespace).stdout
        return re.findall(r"^g\d+", text, re.MULTILINE), text

    every, _ = listed("--limit", "0")
    newest, text = listed()
    assert (len(every), newest) == (102, every[2:])
    assert text.endswith("\nand 2 older; --limit 0 shows all\n")
    assert listed("--status", "cancelled", "--status", "paused")[0] == ["g001", "g002"]
    assert listed("--limit", "1")[0] == every[-1:]
    assert listed("--name", "h")[0] == []
    where = ("--json", "--namespace", bench.keys.namespace)
    assert len(commands.json("ceylon", "groups", *where)["groups"]) == 102


def test_a_finished_group_is_removed_and_its_key_is_free(commands: Commands, bench: Bench) -> None:
    (commands.folder / "a.yaml").write_text("name: a\nkey: nightly\ntasks: {a: {role: r}}\n")
    gid = commands.run("submit", "a.yaml").stdout.strip()

    assert_refused(commands.run("ceylon", "remove", gid), 1, f"ceylon cancel {gid}")
    commands.run("ceylon", "cancel", gid)
    assert commands.run("ceylon", "remove", gid).stdout == f"{gid}: removed\n"
    assert_refused(commands.run("ceylon", "remove", gid), 2, "not known")
    assert commands.json("ceylon", "groups", "--json")["groups"] == []
    (commands.folder / "a.yaml").write_text("name: b\nkey: nightly\ntasks: {b: {role: r}}\n")
    assert commands.run("submit", "a.yaml").stdout.strip() == gid


def test_of_many_tasks_the_first_in_order_are_shown_or_those_of_a_status(commands: Commands, bench: Bench) -> None:
    bench.queued("g", [f"t-{number}" for number in range(250)])
    for kind in ("failed", "completed", "failed"):
        bench.commit("w", bench.started("w", "g"), kind)
    running = bench.started("w", "g").tid

    def shown(*options: str) -> tuple[list[str], str]:
        text = commands.run("ceylon", "show", "g", *options, "--namespace", bench.keys.namespace).stdout
        return re.findall(r"^t-\S*", text, re.MULTILINE), text

    every, _ = shown("--limit", "0")
    first, text = shown()
    assert (len(every), first) == (250, every[:100])
    assert text.endswith("\nand 150 more; --limit 0 shows all\n")
    assert shown("--running")[0] == [running]
    failed, text = shown("--failed", "--limit", "1")
    assert text.endswith("\nand 1 more; --limit 0 shows all\n")
    assert shown("--failed")[0][:1] == failed
    assert len(shown("--status", "failed", "--status", "completed")[0]) == 3
    where = ("--json", "--namespace", bench.keys.namespace)
    assert len(commands.json("ceylon", "show", "g", *where)["tasks"]) == 250
    assert [task["status"] for task in commands.json("ceylon", "show", "g", "--failed", *where)["tasks"]] == [
        "failed"
    ] * 2
    assert_refused(commands.run("ceylon", "show", "g/t-1", "--failed"), 2, "ceylon show g --failed")


def test_a_goal_without_a_name_is_not_called_goal_twice(commands: Commands) -> None:
    (commands.folder / "goals.yaml").write_text(
        "name: G\ntasks: {a: {role: r}}\ngoal: [{when: completed >= 1}, {name: most, when: completed >= 1}]\n"
    )

    gid = commands.run("submit", "goals.yaml").stdout.strip()
    shown = commands.run("ceylon", "show", gid).stdout

    assert "\n  goal: completed >= 1: in_progress\n  goal most: completed >= 1: in_progress\n" in shown
    with Ceylon(commands.url).sync_client() as client:
        assert str(client.group(gid).view()).endswith("completed, goal in_progress, goal most in_progress")


def test_a_failure_without_an_exception_is_shown_by_its_message_alone() -> None:
    poison = TaskResult("a", TaskStatus.FAILED, "poison", error={"type": "", "message": "poison", "traceback": ""})

    *_, reason, _, _, _, _, shown = _task_row(
        TaskView("g", "a", TaskStatus.FAILED, "r", reason="poison", result=poison)
    )

    assert (reason, shown) == ("poison", "poison")


def test_the_error_of_the_attempt_before_is_shown_of_a_task_that_waits_for_the_next(
    commands: Commands, bench: Bench
) -> None:
    bench.queued("g", role="r")
    (delivery,) = bench.fetch("w", role="r")
    assert bench.claim("w", delivery) == ["GRANTED"]
    bench.commit("w", delivery, "retry", delay_ms=60_000, message="no answer")

    (task,) = commands.json("ceylon", "show", "g/a", "--json", "--namespace", bench.keys.namespace)["tasks"]
    shown = commands.run("ceylon", "show", "g/a", "--namespace", bench.keys.namespace).stdout

    assert (task["error"], task["last_error"]["message"], task["status"]) == (None, "no answer", "pending")
    assert re.search(r"^  attempt 1, on w, at \d{4}-\d\d-\d\d \d\d:\d\d:\d\d: E: no answer$", shown, re.MULTILINE)


def test_a_task_that_is_cancelled_while_it_waits_for_a_retry_keeps_its_error(commands: Commands, bench: Bench) -> None:
    bench.queued("g", role="r")
    (delivery,) = bench.fetch("w", role="r")
    assert bench.claim("w", delivery) == ["GRANTED"]
    bench.commit("w", delivery, "retry", delay_ms=60_000, message="no answer")

    commands.run("ceylon", "cancel", "g", "--namespace", bench.keys.namespace)
    row = commands.run("ceylon", "show", "g/a", "--namespace", bench.keys.namespace).stdout.splitlines()[1].split()
    facts = json.loads(commands.run("ceylon", "results", "g/a", "--namespace", bench.keys.namespace).stdout)

    assert row == ["a", "cancelled", "closed", "r", "1", "-", "-", "E:", "no", "answer"]
    assert (facts["id"], facts["status"], facts["attempts"]) == ("g/a", "cancelled", 1)


def test_status_workers_and_groups_are_told_as_json_and_as_tables(commands: Commands) -> None:
    gid = submitted(commands)
    commands.start("worker", "-r", "other", "-c", "3")
    until(lambda: bool(commands.json("ceylon", "workers", "--json")["workers"]), "the worker is registered")

    status = commands.json("ceylon", "status", "--json")
    (worker,) = commands.json("ceylon", "workers", "--json")["workers"]
    (group,) = commands.json("ceylon", "groups", "--json")["groups"]

    assert set(status) == {"schema", "roles", "groups", "monitors"}
    roles = {role["name"]: role for role in status["roles"]}
    assert (roles["r"]["queued"], roles["r"]["workers"]) == (1, 0)
    assert (roles["other"]["workers"], roles["other"]["slots"], roles["other"]["busy"]) == (1, 3, 0)
    assert (status["groups"], status["monitors"]) == ({"active": 1}, 0)
    assert (worker["kind"], worker["roles"], worker["slots"], worker["tasks"]) == ("worker", ["other"], 3, {})
    assert group["group"]["id"] == gid
    assert group["goals"][0]["status"] == "in_progress"
    for arguments, word in ((("status",), "ROLE"), (("workers",), "KIND"), (("groups",), gid), (("show", gid), "TASK")):
        ended = commands.run("ceylon", *arguments)
        assert ended.returncode == 0, ended.stderr
        assert word in ended.stdout


def test_cancelling_ends_a_group_and_the_unknown_is_refused(commands: Commands) -> None:
    gid = submitted(commands)

    ended = commands.run("ceylon", "cancel", gid)
    told = commands.json("ceylon", "show", gid, "--json")

    assert ended.returncode == 0, ended.stderr
    assert gid in ended.stdout
    assert (told["group"]["status"], told["group"]["outcome"]) == ("finished", "cancelled")
    assert {task["status"] for task in told["tasks"]} == {"cancelled"}
    assert_refused(commands.run("ceylon", "show", "nosuch"), 2, "nosuch")
    assert_refused(commands.run("ceylon", "cancel", "nosuch"), 2, "nosuch")
    assert_refused(commands.run("ceylon", "cancel", f"{gid}/nosuch"), 2, "nosuch")
    assert_refused(commands.run("ceylon", "show", "{}"), 2, "{}")


# ---- worker ----------------------------------------------------------------------------------------------------------
def test_a_worker_needs_a_role_or_an_application_that_names_one(commands: Commands) -> None:
    (commands.folder / "jobs.py").write_text(
        "from rq_ceylon import Ceylon\napp = Ceylon()\nno_app = 1\n\n\n"
        "@app.task(role='r')\ndef add(a: int, b: int) -> int:\n    return a + b\n"
    )

    ended = commands.run("worker", "jobs:app", "--burst", "--log-format", "json")

    assert ended.returncode == 0, ended.stderr
    first = json.loads(ended.stderr.splitlines()[0])
    assert "serves r with 16 slots" in first["message"]
    assert_refused(commands.run("worker"), 2, "--role")


def test_a_role_without_tasks_is_warned_of_once_with_the_nearest_name(commands: Commands) -> None:
    (commands.folder / "jobs.py").write_text(ADD)
    words = "No task of the application has the role 'resise' (they have: resize); did you mean \"resize\"?"

    one = commands.run("worker", "jobs:app", "--role", "resise", "--role", "resize", "--burst")
    two = commands.run("worker", "jobs:app", "--role", "resise", "--burst", "--processes", "2")

    assert [one.returncode, two.returncode] == [0, 0]
    assert [one.stderr.count(words), two.stderr.count(words)] == [1, 1]
    assert "'resize'" not in one.stderr.replace(words, "")
    assert_refused(commands.run("worker", "--role", "a,b"), 2, "--role: 'a,b'", "--role a --role b")


def test_options_of_a_worker_with_several_processes_may_end_before_its_application(commands: Commands) -> None:
    (commands.folder / "jobs.py").write_text(ADD)

    ended = commands.run("worker", "--processes", "2", "--burst", "--", "jobs:app")

    assert ended.returncode == 0, ended.stderr
    assert ended.stderr.count("serves resize with") == 2


@pytest.mark.parametrize("name", ["queue", "redis", "click", "types"])
def test_a_file_named_like_a_module_of_ours_takes_the_place_of_none(name: str, commands: Commands) -> None:
    """The application's own modules are still found beside it."""
    (commands.folder / f"{name}.py").write_text("MINE = 1\n")
    (commands.folder / "helpers.py").write_text("WIDTH = 1\n")
    (commands.folder / "jobs.py").write_text("import helpers\n" + ADD)
    # As the installed script: its own folder is first on the path, not the working directory.
    installed = "import sys; from rq_ceylon.cli import worker; worker(prog_name='ceylon-worker')"

    ended = commands.python("-P", "-c", installed, "jobs:app", "--burst", "--processes", "2")

    assert ended.returncode == 0, ended.stderr
    assert ended.stderr.count("serves resize with") == 2


@pytest.mark.parametrize("command", [("worker", "-r", "r"), ("monitor", "--app")], ids=["worker", "monitor"])
def test_an_application_that_cannot_be_used_is_refused_in_one_message(
    command: tuple[str, ...], commands: Commands, store: redis.Redis
) -> None:
    (commands.folder / "jobs.py").write_text("no_app = 1\n")
    (commands.folder / "broken.py").write_text("import math\nmath.nothing()\n")

    assert_refused(commands.run(*command, "nowhere:app"), 4, "'nowhere:app'", "no module 'nowhere'")
    assert_refused(commands.run(*command, "jobs"), 4, "'jobs'", "module:app")
    assert_refused(commands.run(*command, "jobs:missing"), 4, "missing")
    (commands.folder / "good.py").write_text(ADD)
    assert_refused(commands.run(*command, "good:ap"), 4, "'ap'", "name the Ceylon() object of the module (good:app)")
    assert_refused(commands.run(*command, "good.py:app"), 4, "'good.py:app' names a file", "write its module: good:app")
    assert_refused(commands.run(*command, "src/good.py"), 4, "write its module: good:app, in the folder src")
    assert_refused(commands.run(*command, "jobs:no_app"), 4, "is a int, not a Ceylon")
    assert_refused(commands.run(*command, "broken:app"), 4, "broken.py:2: math.nothing()")
    assert store.keys("*") == []


# ---- tasks that submit tasks -----------------------------------------------------------------------------------------
ENQUEUING = """
from rq_ceylon import Ceylon, GroupView

app = Ceylon("redis://127.0.0.1:1")  # where its developer has one
other = Ceylon()

@app.task
def child(number: int) -> int:
    return number + 1

@other.task(name="child")
def of_other(number: int) -> int: ...

@app.task
async def on_the_loop(number: int) -> str:
    return (await child.aenqueue(number)).id

@app.task
def in_a_thread(number: int) -> str:
    return child.enqueue(number).id

@app.task(cpu=True)
def in_a_process(number: int) -> str:
    return child.enqueue(number).id

@app.task
def by_another_application(number: int) -> str:
    return of_other.enqueue(number).id

@app.task(cpu=True)
def by_another_application_in_a_process(number: int) -> str:
    return of_other.enqueue(number).id

@app.goal_check
def submits(view: GroupView) -> bool:
    child.using(role="marked").enqueue(view.counters.completed)
    return True
"""


def test_what_a_task_or_a_goal_submits_goes_where_its_worker_or_monitor_is(commands: Commands, redis_url: str) -> None:
    (commands.folder / "enqueuing.py").write_text(ENQUEUING)
    where = ["--redis", redis_url, "--namespace", "mine"]
    nowhere = {"CEYLON_REDIS_URL": "", "HOME": str(commands.folder)}
    commands.start("worker", "enqueuing:app", *where, environ=nowhere)
    commands.start("monitor", "--app", "enqueuing:app", *where, environ=nowhere)
    names = re.findall(r"def (\w+)\(number: int\) -> str", ENQUEUING)

    with Ceylon(redis_url, namespace="mine").sync_client() as client:
        for name in names:
            parent = client.submit(Task(uses=name, arguments={"number": 1}, max_attempts=1))
            assert client.task(parent.result(timeout=30)).result(timeout=30) == 2, name
        client.submit(
            TaskGroup("goal", [Task(uses="child", arguments={"number": 1})], goal=Goal(call="submits"))
        ).wait()
        assert {role.name for role in client.roles()} == {"default", "marked"}

    assert len(names) == 5
