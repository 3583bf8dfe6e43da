"""Exceptions and tasks cross the borders of processes: process pools pickle them, and debuggers copy them."""

from __future__ import annotations

import copy
import importlib
import pickle
import pkgutil
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from typing import Any

import pytest

import rq_ceylon
from rq_ceylon import Ceylon, FailTask, RetryTask, TaskFailedError
from rq_ceylon.attempt import Said
from rq_ceylon.errors import DurabilityError, GroupFileError, TaskCancelledError
from rq_ceylon.values import BadValueError
from rq_ceylon.worker.outcome import RemoteError

app = Ceylon("redis://127.0.0.1:1")


@app.task
def double(number: int) -> int:
    return 2 * number


class Refused(FailTask):
    def __init__(self, account: int, *, why: str) -> None:
        super().__init__(f"account {account}: {why}")
        self.account = account


MADE: dict[type[BaseException], Callable[[], BaseException]] = {
    TaskFailedError: lambda: TaskFailedError("g/1", "error", error_type="E", error_message="no", traceback="tb"),
    TaskCancelledError: lambda: TaskCancelledError("g/1", "closed"),
    DurabilityError: lambda: DurabilityError("no replica", "g"),
    GroupFileError: lambda: GroupFileError(["a.yaml:1:1: x", "a.yaml:2:1: y"]),
    RetryTask: lambda: RetryTask("5s", "busy"),
    RemoteError: lambda: RemoteError((Said(("builtins.KeyError",), 2.0),), {"message": "no"}),
    BadValueError: lambda: BadValueError("no").inside("a"),
    Refused: lambda: Refused(3, why="empty"),
}


def own_exceptions() -> Iterator[type[BaseException]]:
    for module in pkgutil.walk_packages(rq_ceylon.__path__, "rq_ceylon."):
        if not module.name.endswith("__main__"):
            for one in vars(importlib.import_module(module.name)).values():
                if isinstance(one, type) and issubclass(one, BaseException) and one.__module__ == module.name:
                    yield one


def pickled(one: Any) -> Any:
    return pickle.loads(pickle.dumps(one))  # noqa: S301, our own text


@pytest.mark.parametrize("kind", [*own_exceptions(), Refused], ids=lambda kind: kind.__name__)
@pytest.mark.parametrize("travel", [copy.copy, copy.deepcopy, pickled])
def test_every_exception_of_the_package_travels_with_its_text_attributes_and_notes(
    kind: type[BaseException], travel: Callable[[BaseException], BaseException]
) -> None:
    error = MADE.get(kind, lambda: kind("words"))()
    error.add_note("noted")

    there = travel(error)

    assert type(there) is kind
    assert (str(there), there.args, vars(there)) == (str(error), error.args, vars(error))


def fail() -> None:
    raise TaskFailedError("g/1", "error", error_type="KeyError", traceback="remote")


def test_a_process_pool_gives_back_our_exceptions_and_runs_our_tasks() -> None:
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
        with pytest.raises(TaskFailedError, match="g/1") as caught:
            pool.submit(fail).result()
        assert pool.submit(double, 4).result() == 8

    assert (caught.value.error_type, caught.value.task_id) == ("KeyError", "g/1")


def test_a_task_travels_by_its_name_and_keeps_its_options() -> None:
    late = double.using(delay="5s").using(priority="high")

    there = pickled([double, late])

    assert there[0] is double is copy.copy(double) is copy.deepcopy(double)
    assert pickled(late.bind(1)) == late.bind(1)
    assert there[1].bind(1) == late.bind(1) == copy.deepcopy(late).bind(1)
