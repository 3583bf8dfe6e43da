"""Users' code in a worker: every attempt ends in an outcome and one log line, and the worker goes on."""

from __future__ import annotations

import json
import re
import signal
import textwrap
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
from commands import Commands, commands_on, until

from rq_ceylon.app import Ceylon
from rq_ceylon.client import SyncClient
from rq_ceylon.models import Task, TaskGroup
from rq_ceylon.views import TaskResult

LIMIT_S = 60.0
LAUNCH = """
import sys
loop, sys.argv[0] = sys.argv[1], "ceylon-worker"
del sys.argv[1]
if loop == "asyncio":
    sys.modules["uvloop"] = None
from rq_ceylon import cli
from rq_ceylon.worker import executor
executor.CLEANUP_S = 0.3
cli.worker(prog_name="ceylon-worker")
"""

HEAD = """
import asyncio, contextlib, logging, multiprocessing, os, signal, sys, threading, time
from rq_ceylon import Ceylon, FailTask

app = Ceylon()
KEPT = []

async def soon(call):
    await asyncio.sleep(0.01)
    return call()

def fail():
    raise ValueError("bad")

class OwnBase(BaseException):
    pass

class Unshowable(Exception):
    __traceback__ = property(lambda self: fail())

    def __str__(self):
        sys.exit(3)

def deep():
    error = ValueError("bad")
    for _ in range(3000):
        error = ExceptionGroup("deep", [error])
    return error

def fork_and_exit():
    if (child := os.fork()) == 0:
        sys.exit(5)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 5
"""

ASYNC: dict[str, tuple[str, str]] = {
    # name: how it ends, and what its attempt ends as: completed, or the type of its error
    "returns": ("return 1", "completed"),
    "raises": ("fail()", "ValueError"),
    "raises_a_base_exception": ("raise OwnBase", "OwnBase"),
    "raises_keyboard_interrupt": ("raise KeyboardInterrupt", "KeyboardInterrupt"),
    "raises_generator_exit": ("raise GeneratorExit", "GeneratorExit"),
    "raises_stop_async_iteration": ("raise StopAsyncIteration", "StopAsyncIteration"),
    "raises_stop_iteration": ("raise StopIteration", "RuntimeError"),
    "raises_cancelled_error": ("raise asyncio.CancelledError", "CancelledError"),
    "exits": ("sys.exit(3)", "SystemExit"),
    "exits_below_gather": ("await asyncio.gather(soon(sys.exit), asyncio.sleep(9))", "SystemExit"),
    "exits_in_a_task_group": (
        """
        async with asyncio.TaskGroup() as group:
            group.create_task(soon(sys.exit))
            await asyncio.sleep(9)
        """,
        "SystemExit",
    ),
    "exits_in_a_callback": (
        """
        asyncio.get_running_loop().call_soon(sys.exit)
        await asyncio.sleep(0.05)
        """,
        "completed",
    ),
    "exits_in_a_task_that_it_left": ("KEPT.append(asyncio.create_task(soon(sys.exit)))", "completed"),
    "fails_in_a_task_group": (
        """
        async with asyncio.TaskGroup() as group:
            group.create_task(soon(fail))
            await asyncio.sleep(9)
        """,
        "ExceptionGroup",
    ),
    "cancels_itself": (
        """
        asyncio.current_task().cancel()
        await asyncio.sleep(9)
        """,
        "CancelledError",
    ),
    "cancels_itself_at_its_end": ("asyncio.current_task().cancel()", "completed"),
    "swallows_its_cancellation": (
        """
        asyncio.current_task().cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await asyncio.sleep(9)
        """,
        "completed",
    ),
    "counts_back_its_cancellation": (
        """
        asyncio.current_task().cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await asyncio.sleep(9)
        asyncio.current_task().uncancel()
        """,
        "completed",
    ),
    "runs_into_a_timeout_of_its_own": (
        """
        async with asyncio.timeout(0.01):
            await asyncio.sleep(9)
        """,
        "TimeoutError",
    ),
    "raises_while_a_generator_closes": (
        """
        async def generated():
            try:
                yield 1
            finally:
                fail()

        async for one in generated():
            KEPT.append(one)
            break
        """,
        "completed",
    ),
    "stops_the_loop": (
        """
        asyncio.get_running_loop().stop()
        await asyncio.sleep(0.05)
        """,
        "completed",
    ),
    "returns_no_json": ("return object()", "InvalidInputError"),
    "does_not_end": (
        """
        while True:
            with contextlib.suppress(asyncio.CancelledError):
                await asyncio.sleep(9)
        """,
        "TimeoutError",
    ),
    "ends_late": ("await asyncio.sleep(60)", "TimeoutError"),
    "freezes_the_loop": ("time.sleep(0.3)", "completed"),
    "raises_what_cannot_be_shown": ("raise Unshowable", "Unshowable"),
    "raises_a_deep_group": ("raise deep()", "ExceptionGroup"),
    "logs_what_cannot_be_written": ('logging.getLogger("own").error("%d", "one")', "completed"),
    "forks_and_exits": ("fork_and_exit()", "completed"),
}
PLAIN: dict[str, tuple[str, str]] = {
    "returns": ("return 1", "completed"),
    "raises": ("fail()", "ValueError"),
    "raises_a_base_exception": ("raise OwnBase", "OwnBase"),
    "raises_stop_iteration": ("raise StopIteration", "RuntimeError"),
    "raises_keyboard_interrupt": ("raise KeyboardInterrupt", "KeyboardInterrupt"),
    "raises_generator_exit": ("raise GeneratorExit", "GeneratorExit"),
    "exits": ("sys.exit(3)", "SystemExit"),
    "returns_an_awaitable": ("return soon(lambda: 1)", "completed"),
    "returns_an_awaitable_that_fails": ("return soon(fail)", "ValueError"),
    "returns_no_json": ("return object()", "InvalidInputError"),
    "does_not_end": ("time.sleep(60)", "TimeoutError"),
    "leaves_a_thread": ("threading.Thread(target=time.sleep, args=[60]).start()", "completed"),
    "ends_a_process_that_it_forked": (
        """
        child = multiprocessing.get_context("fork").Process(target=time.sleep, args=[60])
        child.start()
        child.terminate()
        child.join()
        assert child.exitcode == -signal.SIGTERM, child.exitcode
        """,
        "completed",
    ),
    "forks_and_exits": ("fork_and_exit()", "completed"),
}
CPU: dict[str, tuple[str, str]] = {
    "returns": ("return 1", "completed"),
    "raises": ("fail()", "ValueError"),
    "raises_keyboard_interrupt": ("raise KeyboardInterrupt", "KeyboardInterrupt"),
    "exits": ("sys.exit(3)", "SystemExit"),
    "exits_at_once": ("os._exit(3)", "ChildProcessError"),
    "is_killed": ("os.kill(os.getpid(), signal.SIGKILL)", "ChildProcessError"),
    "is_terminated": ("os.kill(os.getpid(), signal.SIGTERM); time.sleep(9)", "ChildProcessError"),
    "closes_its_files": ("os.closerange(3, 50)", "ChildProcessError"),
    "returns_no_json": ("return object()", "InvalidInputError"),
    "does_not_end": ("time.sleep(60)", "TimeoutError"),
    "raises_what_cannot_be_shown": ("raise Unshowable", "Unshowable"),
    "raises_a_deep_group": ("raise deep()", "ExceptionGroup"),
    "forks_and_exits": ("fork_and_exit()", "completed"),
}


def source() -> str:
    """An application with a task for each ending."""
    functions = [HEAD]
    for prefix, endings, head, rules in (
        ("async", ASYNC, "async def", ""),
        ("plain", PLAIN, "def", ""),
        ("cpu", CPU, "def", ", cpu=True"),
    ):
        for name, (body, _) in endings.items():
            timeout = "0.5s" if name in ("does_not_end", "ends_late") else "60s"
            functions.append(f'@app.task(role="r", max_attempts=1, timeout="{timeout}"{rules})')
            functions.append(f"{head} {prefix}_{name}():")
            functions.append(textwrap.indent(textwrap.dedent(body), "    "))
    return "\n".join(functions)


def expected() -> dict[str, str]:
    every = (("async", ASYNC), ("plain", PLAIN), ("cpu", CPU))
    return {f"{prefix}_{name}": end for prefix, endings in every for name, (_, end) in endings.items()}


@pytest.fixture
def client(app: Ceylon) -> Iterator[SyncClient]:
    with app.sync_client() as client:
        yield client


@pytest.mark.parametrize("loop", ["asyncio", "uvloop"])
def test_every_attempt_ends_in_an_outcome_and_the_worker_goes_on(
    loop: str, app: Ceylon, client: SyncClient, redis_url: str, tmp_path: Path
) -> None:
    (tmp_path / "jobs.py").write_text(source())
    with commands_on(redis_url, tmp_path) as commands:
        options = ["jobs:app", "--namespace", app.settings.namespace, "--grace", "1s", "--lease", "5s"]
        worker = commands.launch("-c", LAUNCH, loop, *options)
        names = list(expected())

        group = client.submit(TaskGroup("every ending", [Task(id=name, uses=name, role="r") for name in names]))
        group.wait("all", LIMIT_S)
        after = client.submit(Task(uses="plain_returns", role="r"))

        assert after.result(LIMIT_S) == 1
        assert {result.task_id: end_of(result) for result in group.results()} == expected()
        assert_one_line_each(commands, names)
        assert {result.attempts for result in group.results()} == {1}
        assert group.view().counters.crashes == 0
        worker.send_signal(signal.SIGTERM)
        until(lambda: worker.poll() is not None, "the worker has ended", 1 + 5 + 4)  # grace, clean-up, a busy machine
        assert worker.returncode == 0, commands.said(worker)


def end_of(result: TaskResult) -> str:
    error: Any = result.error or {"type": result.status.value}
    return str(error["type"])


def assert_one_line_each(commands: Commands, names: Sequence[str]) -> None:
    lines = commands.said(commands.started[0]).splitlines()
    ended = [
        found[1]
        for line in lines
        if (found := re.search(r"(\w+) \w+/\w+ (?:completed in|failed for good after)", line))
    ]
    assert sorted(ended) == sorted([*names, "plain_returns"])


CANCELS = """
import asyncio
from rq_ceylon import Ceylon

app = Ceylon()
started = asyncio.Event()

@app.task(role="r", max_attempts=1)
async def is_cancelled_by_another() -> None:
    started.set()
    await asyncio.sleep(60)

@app.task(role="r", max_attempts=1)
async def cancels_all_tasks() -> list[str]:
    await started.wait()
    others = [task for task in asyncio.all_tasks() if task is not asyncio.current_task()]
    for task in others:
        task.cancel()
    await asyncio.gather(*others, return_exceptions=True)
    return [repr(task.get_coro()) for task in others]

@app.task(role="r", max_attempts=1, cpu=True)
def one() -> int:
    return 1
"""


@pytest.mark.parametrize("loop", ["asyncio", "uvloop"])
def test_a_handler_that_cancels_all_tasks_of_the_loop_spares_the_worker(
    loop: str, app: Ceylon, client: SyncClient, redis_url: str, tmp_path: Path
) -> None:
    (tmp_path / "jobs.py").write_text(CANCELS)
    with commands_on(redis_url, tmp_path) as commands:
        options = ["jobs:app", "--namespace", app.settings.namespace, "--grace", "1s", "--lease", "5s"]
        worker = commands.launch("-c", LAUNCH, loop, *options)
        assert client.submit(Task(uses="one", role="r")).result(LIMIT_S) == 1  # a child process waits from now on

        other = client.submit(TaskGroup("other", [Task(uses="is_cancelled_by_another", role="r")]))
        found = client.submit(Task(uses="cancels_all_tasks", role="r")).result(LIMIT_S)
        other.wait("all", LIMIT_S)

        assert len(found) == 1, found  # the other attempt
        (ended,) = other.results()
        assert (end_of(ended), ended.attempts) == ("CancelledError", 1)
        assert other.view().counters.crashes == 0
        assert client.submit(Task(uses="one", role="r")).result(LIMIT_S) == 1
        worker.send_signal(signal.SIGTERM)
        until(lambda: worker.poll() is not None, "the worker has ended", 1 + 5 + 4)
        assert worker.returncode == 0, commands.said(worker)


HARMFUL = """
import asyncio, math, sys, threading
from rq_ceylon import Ceylon, TaskContext

app = Ceylon()

@app.task(role="r", max_attempts=1, cpu=True)
def leaves_a_thread_that_tells_progress(context: TaskContext) -> str:
    def tell():
        while True:
            context.progress(0.5, "on")

    threading.Thread(target=tell, daemon=True).start()
    return "x" * 1_000_000

@app.task(role="r", max_attempts=1, cpu=True)
def ends(number: int) -> int:
    return number

@app.task(role="r", max_attempts=1)
async def changes_its_context(context: TaskContext) -> None:
    context.role, context.fence, context.task_id = "other", 1, "other"

@app.task(role="r", max_attempts=1)
async def closes_stderr() -> None:
    sys.stderr.close()
"""


def test_no_task_harms_another_nor_its_worker(app: Ceylon, client: SyncClient, redis_url: str, tmp_path: Path) -> None:
    (tmp_path / "jobs.py").write_text(HARMFUL)
    with commands_on(redis_url, tmp_path) as commands:
        worker = commands.launch("-c", LAUNCH, "asyncio", "jobs:app", "--namespace", app.settings.namespace, "-c", "1")

        for number in range(3):
            assert (
                client.submit(Task(uses="leaves_a_thread_that_tells_progress", role="r")).result(LIMIT_S) == "x" * 10**6
            )
            assert client.submit(Task(uses="ends", arguments={"number": number}, role="r")).result(LIMIT_S) == number
        assert client.submit(Task(uses="changes_its_context", role="r")).result(LIMIT_S) is None
        assert client.submit(Task(uses="closes_stderr", role="r")).result(LIMIT_S) is None
        assert client.submit(Task(uses="ends", arguments={"number": 4}, role="r")).result(LIMIT_S) == 4
        worker.send_signal(signal.SIGTERM)
        assert worker.wait(LIMIT_S) == 0


READS = """
import os, subprocess
from rq_ceylon import Ceylon

app = Ceylon()

@app.task(role="r", max_attempts=1, timeout="20s")
def reads_its_input() -> list[str]:
    return [subprocess.run(["cat"], capture_output=True, text=True).stdout, os.environ.get("CEYLON_SUPERVISED", "")]
"""


def test_the_input_of_one_of_several_processes_is_empty(
    app: Ceylon, client: SyncClient, redis_url: str, tmp_path: Path
) -> None:
    (tmp_path / "jobs.py").write_text(READS)
    with commands_on(redis_url, tmp_path) as commands:
        commands.start("worker", "jobs:app", "--namespace", app.settings.namespace, "--processes", "2")

        assert client.submit(Task(uses="reads_its_input", role="r")).result(LIMIT_S) == ["", ""]


LOGGED = """
import logging
from rq_ceylon import Ceylon, TaskContext

app = Ceylon()
log = logging.getLogger("mine")

@app.task(role="r", max_attempts=1, cpu=True)
def divide(number: int) -> float:
    log.info("dividing %s", number)
    return 1 / number

@app.task(role="r")
async def double(number: int) -> int:
    return 2 * number
"""


def test_each_attempt_is_one_log_line_with_fields_also_from_children(
    app: Ceylon, client: SyncClient, redis_url: str, tmp_path: Path
) -> None:
    (tmp_path / "logged.py").write_text(LOGGED)
    with commands_on(redis_url, tmp_path) as commands:
        options = ["logged:app", "--namespace", app.settings.namespace, "--burst", "--log-format", "json"]
        group = client.submit(
            TaskGroup(
                "g",
                [
                    Task(id="bad", uses="divide", role="r", arguments={"number": 0}),
                    Task(id="good", uses="double", role="r", arguments={"number": 3}),
                ],
            )
        )
        worker = commands.start("worker", *options)
        group.wait("all", LIMIT_S)
        until(lambda: worker.poll() is not None, "the burst is over")
        lines = [json.loads(line) for line in commands.said(worker).splitlines()]

    (good,) = [line for line in lines if line.get("task") == f"{group.id}/good"]
    (bad,) = [line for line in lines if line.get("task") == f"{group.id}/bad"]
    assert (good["function"], good["attempt"], good["outcome"], good["level"]) == ("double", 1, "completed", "info")
    assert isinstance(good["duration_ms"], int)
    assert (bad["function"], bad["outcome"], bad["reason"], bad["level"]) == ("divide", "failed", "error", "error")
    assert bad["error"] == "ZeroDivisionError: division by zero"
    assert "return 1 / number" in bad["exception"]
    (mine,) = [line for line in lines if line["logger"] == "mine"]
    assert (mine["level"], mine["message"]) == ("info", "dividing 0")
