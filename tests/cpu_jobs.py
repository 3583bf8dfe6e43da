"""Functions that tests run in child processes, which import them from here."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

from rq_ceylon.app import Ceylon
from rq_ceylon.attempt import FailTask, RetryTask, TaskContext
from rq_ceylon.models import Task


def square(number: int) -> int:
    return number * number


def own_pid() -> int:
    return os.getpid()


def write_pid_and_sleep(path: str) -> None:
    Path(path).write_text(str(os.getpid()))
    time.sleep(60)


def refuse() -> None:
    raise FailTask("no use")


def again() -> None:
    raise RetryTask("2s")


def divide(number: int) -> float:
    return number / 0


def leave() -> None:
    raise SystemExit(3)


def exit_now() -> None:
    os._exit(3)


def kill_itself() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def exit_while_a_process_goes_on(path: str) -> None:
    if (pid := os.fork()) == 0:  # it holds all that this process has open
        time.sleep(60)
    Path(path).write_text(str(pid))
    os._exit(4)


def write_much() -> str:
    print("printed")
    subprocess.run(["echo", "echoed"], check=True)
    sys.stderr.write("x" * 5_000_000)
    return "done"


def pid_and_argument(text: str) -> list[object]:
    return [os.getpid(), len(text)]


def start_a_program_and_sleep(path: str) -> None:
    program = subprocess.Popen(["sleep", "60"])
    Path(path).write_text(f"{os.getpid()} {program.pid}")
    program.wait()


def meet(folder: str) -> int:
    """How many of these ran at the same time as this one, at most."""
    mine = Path(folder) / str(os.getpid())
    mine.touch()
    time.sleep(0.1)
    count = len(os.listdir(folder))
    mine.unlink()
    return count


def not_json() -> object:
    return object()


class HopelessError(FailTask):
    pass


def hopeless() -> None:
    raise HopelessError("no use")


def hopeless_group() -> None:
    raise ExceptionGroup("both", [HopelessError("no use"), FailTask("neither")])


def later_group() -> None:
    raise ExceptionGroup("both", [RetryTask("2s"), ExceptionGroup("one", [RetryTask("7s")])])


app = Ceylon("redis://127.0.0.1:1")


@app.lifespan
async def life() -> AsyncIterator[str]:
    yield "lived"


@app.task(name="inspect", cpu=True)
def inspect_context(context: TaskContext) -> dict[str, Any]:
    context.progress(0.5, "half")
    facts = {"id": context.id, "attempt": context.attempt, "metadata": dict(context.metadata)}
    return {**facts, "state": context.state}


@app.task(name="nothing", cpu=True, store_result=False)
def nothing_to_store() -> object:
    return object()


@app.task(cpu=True, role="r")
def spawning(context: TaskContext) -> str:
    return context.spawn(Task(uses="leaf", id="from-process", arguments={"number": 1}))
