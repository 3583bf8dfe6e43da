"""
What a type checker sees of `@app.task`; `test_typing` runs mypy on this file. It is never run.

A line with `type: ignore[code]` must be refused with that code: in strict mode an ignore that nothing needs is an
error.
"""

from __future__ import annotations

from collections.abc import Coroutine
from typing import Any, assert_type

from rq_ceylon import (
    Ceylon,
    GroupHandle,
    GroupView,
    SyncGroupHandle,
    SyncTaskHandle,
    Task,
    TaskContext,
    TaskGroup,
    TaskHandle,
)

app = Ceylon()


@app.task
def bare(path: str, width: int = 64) -> bytes:
    return b""


@app.task
async def bare_async(path: str) -> list[int]:
    return []


@app.task(role="r", timeout="30s", max_attempts=3, name="n", aliases=["old"], priority="high")
def ruled(number: int) -> float:
    return 0.0


@app.task(role="r")
async def ruled_async(number: int) -> dict[str, int]:
    return {}


@app.task(role="r")
async def told(context: TaskContext, path: str) -> int:
    return 0


@app.task
def told_bare(context: TaskContext) -> str:
    return ""


async def contexts(context: TaskContext) -> None:
    assert_type(told.bind("a"), Task)
    assert_type(await told.aenqueue(path="a"), TaskHandle[int])
    assert_type(told_bare.enqueue(), SyncTaskHandle[str])
    assert_type(await told(context, "a"), int)
    told.bind(1)  # type: ignore[arg-type]
    await told("a", "b")  # type: ignore[arg-type]


def calls() -> None:
    assert_type(bare("a", width=1), bytes)
    assert_type(ruled(1), float)
    bare(1)  # type: ignore[arg-type]
    bare("a", wide=1)  # type: ignore[call-arg]
    ruled()  # type: ignore[call-arg]


async def coroutine_calls() -> None:
    assert_type(await bare_async("a"), list[int])
    later: Coroutine[Any, Any, dict[str, int]] = ruled_async(number=1)
    assert_type(await later, dict[str, int])
    assert_type(await ruled_async.using(delay="5s")(1), dict[str, int])
    await bare_async(1)  # type: ignore[arg-type]
    await bare("a")  # type: ignore[misc]


@app.goal_check
def enough(view: GroupView) -> bool:
    return True


@app.goal_check(name="plenty")
async def much(view: GroupView) -> bool:
    return True


async def goal_checks(view: GroupView) -> None:
    assert_type(enough(view), bool)
    assert_type(await much(view), bool)


def binds() -> None:
    assert_type(bare.bind("a", 2), Task)
    assert_type(ruled_async.bind(number=1), Task)
    assert_type(bare.using(delay="5s", priority="high").bind("a"), Task)
    bare.bind(1)  # type: ignore[arg-type]
    ruled_async.bind("1")  # type: ignore[arg-type]
    bare.using(delay="5s").bind(width=1)  # type: ignore[call-arg]
    bare.using(later="5s")  # type: ignore[call-arg]


def enqueues() -> None:
    assert_type(bare.enqueue("a"), SyncTaskHandle[bytes])
    assert_type(bare_async.enqueue("a").result(timeout=1), list[int])
    assert_type(ruled.using(role="s").enqueue(1).result(), float)
    bare.enqueue(path=1)  # type: ignore[arg-type]
    ruled_async.enqueue()  # type: ignore[call-arg]


async def aenqueues() -> None:
    assert_type(await bare.aenqueue("a"), TaskHandle[bytes])
    assert_type(await (await bare_async.aenqueue(path="a")).result(), list[int])
    assert_type(await (await ruled_async.using(delay=1).aenqueue(1)).result(timeout=2.0), dict[str, int])
    await bare.aenqueue("a", width="2")  # type: ignore[arg-type]
    await ruled.aenqueue(1, 2)  # type: ignore[call-arg]


async def clients(group: TaskGroup) -> None:
    async with app.client() as client:
        assert_type(await client.submit(bare.bind("a")), TaskHandle[Any])
        assert_type(await client.submit(group), GroupHandle)
        await client.submit("a")  # type: ignore[call-overload]
    with app.sync_client() as sync:
        assert_type(sync.submit(bare.bind("a")), SyncTaskHandle[Any])
        assert_type(sync.submit(group), SyncGroupHandle)
