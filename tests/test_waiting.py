"""
Many who wait cost no more than a few, and nobody waits for ever.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any

import pytest
import redis
from loguru import logger

from rq_ceylon import Ceylon, CeylonError, InvalidInputError, NotFoundError, Task, TaskGroup, WaitTimeoutError
from rq_ceylon.client import following
from rq_ceylon.store.connection import Connection

pytestmark = pytest.mark.anyio


@pytest.fixture
def trips(monkeypatch: pytest.MonkeyPatch) -> Callable[[], int]:
    """
    Round trips since the last call.
    """
    count = 0
    run = Connection.run

    async def counted(self: Connection, calls: Any, **options: Any) -> Any:
        nonlocal count
        count += 1
        return await run(self, calls, **options)

    def since() -> int:
        nonlocal count
        told, count = count, 0
        return told

    monkeypatch.setattr(Connection, "run", counted)
    return since


async def test_a_thousand_waiters_share_a_few_round_trips(app: Ceylon, trips: Callable[[], int]) -> None:
    async with app.client() as client:
        handles = await asyncio.gather(*(client.submit(Task(role="p")) for _ in range(1000)))
        trips()

        waiting = [asyncio.create_task(handle.result()) for handle in handles]
        await asyncio.sleep(0.1)
        assert await handles[0].cancel() == "cancelled"
        with pytest.raises(CeylonError, match="cancelled"):
            await waiting[0]

        assert trips() <= 20
        assert not any(one.done() for one in waiting[1:])
    assert {str(one.exception()) for one in waiting[1:]} == {"the client was closed; what was waited for goes on"}


async def test_waiting_for_a_group_asks_nothing_while_nothing_changes(app: Ceylon, trips: Callable[[], int]) -> None:
    """
    A wait was answered at once with the same view, and began anew: thousands of round trips a second.
    """
    async with app.client() as client:
        run = await client.submit(TaskGroup("g", [Task(role="p")] * 2))
        waiting = [asyncio.create_task(run.wait("all")) for _ in range(10)]
        async for _ in run.progress():
            break
        await asyncio.sleep(0.05)
        trips()

        await asyncio.sleep(0.1)
        assert trips() <= 5
        await run.task("1").cancel()
        await run.task("2").cancel()
        assert {view.status for view in await asyncio.gather(*waiting)} == {"finished"}


async def test_a_role_that_nobody_serves_is_named_once_for_all_who_wait(
    app: Ceylon, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(following, "NO_WORKER_S", 0.03)
    lines: list[str] = []
    named = asyncio.Event()

    def tell(line: str) -> None:
        lines.append(line)
        if len(lines) == 2:
            named.set()

    logger.enable("rq_ceylon")
    sink = logger.add(tell, format="{message}")
    try:
        async with app.client() as client:
            handles = [await client.submit(Task(role="lone")) for _ in range(20)]
            run = await client.submit(TaskGroup("g", [Task(role="grouped")] * 5))
            waiting = [asyncio.create_task(handle.result()) for handle in handles]
            waiting += [asyncio.create_task(run.task(str(n)).result()) for n in range(1, 6)]
            waiting += [asyncio.create_task(run.wait()) for _ in range(5)]
            async with asyncio.timeout(20):
                await named.wait()
            await asyncio.sleep(0.1)
        await asyncio.gather(*waiting, return_exceptions=True)
    finally:
        logger.remove(sink)
        logger.disable("rq_ceylon")

    assert sorted(line.strip() for line in lines) == [
        "Still waiting: no worker serves role 'grouped' (no worker is running)",
        "Still waiting: no worker serves role 'lone' (no worker is running)",
    ]


async def test_who_asks_for_an_unknown_task_disturbs_nobody_else(app: Ceylon) -> None:
    async with app.client() as client:
        run = await client.submit(TaskGroup("g", [Task(role="p")]))
        waiting = asyncio.create_task(run.task("1").result())

        with pytest.raises(NotFoundError, match="zz"):
            await run.task("zz").result(timeout=5)

        assert not waiting.done()
        await run.cancel()
        with pytest.raises(CeylonError, match="closed"):
            await waiting


async def test_one_submission_after_the_other_takes_one_round_trip_each(app: Ceylon, trips: Callable[[], int]) -> None:
    async with app.client() as client:
        await client.submit(Task(role="p"))
        trips()

        for _ in range(100):
            await client.submit(Task(role="p"))

        assert trips() <= 105


@pytest.mark.parametrize("task", [Task(id="mine"), Task(needs=["other"])])
async def test_a_single_task_with_what_only_a_group_can_give_is_refused(app: Ceylon, task: Task) -> None:
    async with app.client() as client:
        with pytest.raises(InvalidInputError, match="TaskGroup"):
            await client.submit(task)


async def test_a_position_that_is_taken_by_a_given_id_is_passed_over(app: Ceylon) -> None:
    async with app.client() as client:
        run = await client.submit(TaskGroup("g", [Task(id="2"), Task(), Task(id="4"), Task()]))

        assert {task.id async for task in run.tasks()} == {"2", "3", "4", "5"}


@pytest.mark.parametrize("turns", range(0, 60, 3))
async def test_closing_a_client_ends_every_wait_at_whatever_moment(app: Ceylon, turns: int) -> None:
    """
    A group's waiter that was answered just before the end asked again, and waited for ever.
    """
    async with app.client() as client:
        run = await client.submit(TaskGroup("g", [Task(role="p"), Task(role="p")]))
        waiting = [asyncio.create_task(run.task("1").result()), asyncio.create_task(run.wait())]
        for _ in range(turns):
            await asyncio.sleep(0.0005)

    done, _ = await asyncio.wait(waiting, timeout=5)

    assert done == set(waiting)
    assert all(isinstance(one.exception(), CeylonError) for one in waiting)


async def test_a_client_that_closes_right_after_a_wait_leaves_no_connection(app: Ceylon, redis_url: str) -> None:
    """
    The reader that the last waiter left behind unsubscribed after the end, on a new connection.
    """
    with redis.Redis.from_url(redis_url) as raw:
        before = raw.info("clients")["connected_clients"]
        for turns in range(12):
            async with app.client() as client:
                run = await client.submit(TaskGroup("g", [Task(role="p")]))
                with pytest.raises(WaitTimeoutError):
                    await run.wait(timeout=0.001 * turns)

        async with asyncio.timeout(10):
            while raw.info("clients")["connected_clients"] > before:  # noqa: ASYNC110
                await asyncio.sleep(0.01)
