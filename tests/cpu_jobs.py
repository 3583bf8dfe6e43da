"""
Functions that tests run in child processes, which import them from here.
"""

import os
import time
from pathlib import Path

from rq_ceylon.attempt import FailTask, RetryTask


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
