"""
docs/defaults.md states the values that the code has: every row of its tables is compared. So are the times that
docs/running-functions.md tells.
"""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable
from typing import Any

import click
import pytest
from commands import ROOT

from rq_ceylon import Backoff, Goal, TaskGroup, attempt, cli, graph, models
from rq_ceylon.cli.worker import PLAIN_SLOTS, SLOTS
from rq_ceylon.client import following, session
from rq_ceylon.client.sync import SyncClient, SyncTaskHandle
from rq_ceylon.expression import MAX_CHARACTERS
from rq_ceylon.goals import MAX_GOALS
from rq_ceylon.groupfile import matrix, reader, tasks
from rq_ceylon.process import ALLOWANCE_S
from rq_ceylon.settings import DEFAULT_NAMESPACE, retention_ms
from rq_ceylon.store.transitions import UNROUTABLE_MS
from rq_ceylon.worker import executor, outcome

PAGE = (ROOT / "docs" / "defaults.md").read_text()
ID_MAX = max(length for length in range(1, 100) if models.ID_PATTERN.fullmatch("a" * length))


def size(count: int) -> str:
    return f"{count // 2**20} MiB" if count >= 2**20 else f"{count // 1024} KiB"


def span(seconds: float) -> str:
    number, unit = next((n, u) for n, u in ((3600, "h"), (60, "min"), (1, "s")) if seconds >= n)
    return f"{seconds / number:g} {unit}"


def option(name: str) -> Any:
    """The default of an option of `ceylon-worker`."""
    (found,) = [one for one in cli.worker.params if isinstance(one, click.Option) and name in one.opts]
    return found.default if isinstance(found.default, str) else "no limit"  # click has a word of its own for none


def default(function: Callable[..., Any], name: str) -> Any:
    found = inspect.signature(function).parameters[name].default
    return "none" if found in (None, ()) else found


BACKOFF = Backoff()
VALUES = {
    "attempts of a task": models.DEFAULT_MAX_ATTEMPTS,
    "pause before attempt 2": span(models.seconds(BACKOFF.first, "")),
    "growth of the pause with each attempt": f"{BACKOFF.factor:g} ×",
    "longest pause": span(models.seconds(BACKOFF.cap, "")),
    "a pause, at random": "between half and all of it" if BACKOFF.jitter else "all of it",
    "time limit of one attempt": span(models.DEFAULT_TIMEOUT_S),
    "crashes that a task survives": models.DEFAULT_MAX_CRASHES,
    "a finished group, with results and errors": span(retention_ms(None, "", environ={}) / 1000),
    "a task sent by `enqueue`, after it has ended, at least": span(retention_ms(None, "", environ={}) / 1000),
    "a task that no live worker knows: how long it waits before it fails": span(UNROUTABLE_MS / 1000),
    "role of a task": f"`{models.DEFAULT_ROLE}`",
    "goals of a group": default(TaskGroup, "goal"),
    "the rest, once a goal is achieved": default(Goal, "on_achieved"),
    "the rest, once a goal has failed": default(Goal, "on_failed"),
    "deadline of a goal": default(Goal, "deadline"),
    "tasks of a group that run at once": default(TaskGroup, "max_running"),
    "which tasks start (`lazy`: no more than a goal needs)": default(TaskGroup, "dispatch"),
    "adding tasks later": default(TaskGroup, "open"),
    "an open group without a new task, before it is sealed": span(default(TaskGroup, "open_timeout")),
    "a task whose need did not complete": default(TaskGroup, "on_need_failed"),
    "what a submission waits for": default(SyncClient.submit, "durability"),
    "tasks at once, some of them async": SLOTS,
    "tasks at once, all plain functions": PLAIN_SLOTS,
    "processes of a worker": option("--processes"),
    "grace: how long running tasks may finish after a stop signal": option("--grace"),
    "lease: how long a worker that stops responding keeps its tasks": option("--lease"),
    "attempts that may hang before they take places from others": PLAIN_SLOTS,
    "tasks after which a worker is replaced": option("--max-tasks"),
    "memory at which a worker is replaced": option("--max-memory"),
    "log level": option("--log-level"),
    "`result()`, `wait()`": default(SyncTaskHandle.result, "timeout").replace("none", "no limit"),
    "a call that Redis does not answer": span(session.ANSWER_S),
    "first warning that no worker serves a role": span(following.NO_WORKER_S),
    "namespace": f"`{DEFAULT_NAMESPACE}`",
    "one task as it is sent: arguments, metadata, needs": size(models.PAYLOAD_BYTES_MAX),
    "one result": size(executor.RESULT_BYTES_MAX),
    "defaults of a group": size(models.DEFAULTS_BYTES_MAX),
    "traceback that is kept of an error": size(outcome.TRACEBACK_MAX),
    "needs of one task": graph.MAX_NEEDS,
    "groups in `depends_on`": models.DEPENDS_ON_MAX,
    "groups in `then`, together": size(models.DEFAULTS_BYTES_MAX),
    "what one task spawns": f"{attempt.SPAWN_TASKS_MAX:,} tasks",
    "goals of a group (limit)": MAX_GOALS,
    "a goal's expression": f"{MAX_CHARACTERS} characters",
    "ids, roles and names of tasks": f"{ID_MAX} characters",
    "`key` of a group": f"{models.KEY_MAX:,} characters",
    "group file": size(reader.MAX_BYTES),
    "tasks written in one group file": f"{tasks.MAX_WRITTEN:,}",
    "tasks that the matrices of one file make": f"{matrix.MAX_COMBINATIONS:,}",
}
"""By the first cell of a row, what its second must be."""

ELSEWHERE = {
    "a `key` of a group": "follows from the retention",
    "priority of a task": "tests/test_groups.py and others submit without one",
    "start of a task": "no number",
    "end of waiting": "no number",
    "Redis": "tests/test_settings.py",
}
"""Rows that state no value of the code's, and why."""


def rows() -> dict[str, str]:
    found: dict[str, str] = {}
    for line in re.findall(r"^\| (?!what \|)(.*)\|$", PAGE, re.MULTILINE):
        what, value, *_ = map(str.strip, line.split("|"))
        found[f"{what} (limit)" if what in found else what] = value
    return found


@pytest.mark.parametrize("what", VALUES)
def test_the_page_of_defaults_states_the_value_of_the_code(what: str) -> None:
    assert rows()[what] == str(VALUES[what])


def test_every_row_of_the_page_of_defaults_is_compared() -> None:
    assert set(rows()) == VALUES.keys() | ELSEWHERE.keys()


@pytest.mark.parametrize(
    "words",
    [
        f"role within {executor.PLACE_S:g} seconds",
        f"clean up in a `finally` block, for {executor.CLEANUP_S:g} seconds",
        f"ends {ALLOWANCE_S:g} seconds after its grace at the latest",
        f"At most {PLAIN_SLOTS} may do so, as many as the worker has threads",
        f"one for each slot: {SLOTS} |",
        f"one for each thread: {PLAIN_SLOTS} |",
        f"| {SLOTS}, or {PLAIN_SLOTS} if every task of the application is a plain function |",
    ],
)
def test_the_page_of_functions_states_the_times_and_numbers_of_the_code(words: str) -> None:
    assert words in " ".join((ROOT / "docs" / "running-functions.md").read_text().split())
