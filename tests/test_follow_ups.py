"""`then`: groups that follow a group, as data of it until their condition holds; also after a retry, and only once."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping

import pytest
from commands import LIMIT_S

from rq_ceylon import Ceylon, Client, Goal, InvalidInputError, Task, TaskContext, TaskGroup
from rq_ceylon.errors import PayloadTooLargeError
from rq_ceylon.maintenance import relay
from rq_ceylon.maintenance.steps import Maintenance
from rq_ceylon.models import GroupStatus
from rq_ceylon.store import transitions
from rq_ceylon.store.scripts import command
from rq_ceylon.worker import Worker

pytestmark = pytest.mark.anyio


class Batch:
    """Tasks that fail for some numbers, and follow-ups that note whom they follow."""

    def __init__(self, app: Ceylon, client: Client) -> None:
        self.app, self.client = app, client
        self.bad: set[int] = set()
        self.told: list[tuple[str, str]] = []

        @app.task(role="r", max_attempts=1)
        async def work(number: int) -> int:
            if number in self.bad:
                raise ValueError(number)
            return number

        @app.task(role="r")
        async def tell(context: TaskContext, what: str) -> None:
            self.told.append((what, context.metadata["after"]))

        self.work, self.tell = work, tell

    def follower(self, what: str) -> TaskGroup:
        return TaskGroup(what, [self.tell.bind(what)])

    def group(self, then: TaskGroup | Mapping[str, TaskGroup]) -> TaskGroup:
        tasks = [self.work.bind(number) for number in range(4)]
        goal = Goal("completed >= 2", name="half")
        return TaskGroup("batch", tasks, goal=[goal, Goal("completed >= 4", name="all")], then=then)

    def every(self) -> dict[str, TaskGroup]:
        return {
            when: self.follower(when) for when in ("completed", "failed", "finished", "achieved:half", "achieved:all")
        }

    async def run(self) -> None:
        url, namespace = self.client.url, self.client.keys.namespace
        worker = Worker(url, registry=self.app.registry, namespace=namespace, roles=["r"], burst=True)
        await asyncio.wait_for(worker.run(), LIMIT_S)


@pytest.fixture
def batch(app: Ceylon, client: Client) -> Batch:
    return Batch(app, client)


async def settled(batch: Batch, count: int) -> None:
    """Until so many follow-ups have run; a worker may have left before the last one was submitted."""
    async with asyncio.timeout(LIMIT_S):
        while len(batch.told) < count:
            await batch.run()


@pytest.mark.parametrize("fails", [False, True])
async def test_each_follow_up_runs_if_its_condition_holds(fails: bool, batch: Batch) -> None:
    batch.bad = {3} if fails else set()
    run = await batch.client.submit(batch.group(batch.every()))
    expected = (
        {"failed", "finished", "achieved:half"} if fails else {"completed", "finished", "achieved:half", "achieved:all"}
    )

    await settled(batch, len(expected))
    await batch.run()

    assert sorted(batch.told) == sorted((what, run.id) for what in expected)
    view = await run.view()
    assert set(view.then) == set(batch.every())
    exist = {when for when, gid in view.then.items() if await known(batch.client, gid)}
    assert exist == expected


async def known(client: Client, gid: str) -> bool:
    return gid in [view.id for view in await client.groups()]


async def test_after_a_retry_what_follows_the_success_runs_and_nothing_runs_twice(batch: Batch) -> None:
    batch.bad = {3}
    run = await batch.client.submit(batch.group(batch.every()))
    await settled(batch, 3)
    batch.bad.clear()
    await run.retry()

    await settled(batch, 5)
    await batch.run()

    assert sorted(what for what, _ in batch.told) == sorted(batch.every())


async def test_a_group_that_follows_the_success_alone_needs_no_condition(batch: Batch) -> None:
    run = await batch.client.submit(batch.group(batch.follower("report")))
    await settled(batch, 1)

    assert batch.told == [("report", run.id)]


async def test_maintenance_submits_it_if_the_worker_died_before_and_only_once(batch: Batch) -> None:
    client = batch.client
    run = await client.submit(TaskGroup("batch", [Task(role="q")], then={"finished": batch.follower("finished")}))
    (follower,) = (await run.view()).then.values()
    await client.connection.run([transitions.cancel_group(client.keys, run.id)])  # as if its caller died then
    assert not await known(client, follower)

    await Maintenance(client.connection, client.keys).run_once()
    assert await known(client, follower)
    page = f"9|@|cancelled|{transitions.FOLLOW_UPS}"
    await client.connection.run([command("ZADD", client.keys.group_part(run.id, "outbox"), 1, page)])
    await relay(client.connection, client.keys, run.id)
    await settled(batch, 1)
    await batch.run()

    assert len(batch.told) == 1
    assert (await client.group(follower).view()).status is GroupStatus.FINISHED


async def test_what_cannot_follow_is_refused_before_anything_is_sent(batch: Batch) -> None:
    work, follower = batch.work.bind(1), batch.follower("x")
    for then, words in [
        ({"done": follower}, "then: 'done' is not known"),
        ({"achieved:hal": follower}, "there is no goal 'hal'; did you mean"),
        ([follower], "is not usable; give a TaskGroup"),
        ({"failed": work}, "is not usable; give a TaskGroup"),
        (TaskGroup("x", [work], key="k"), "neither a key nor depends_on"),
        (TaskGroup("x", []), "has no tasks"),
        (TaskGroup("x", [batch.work.bind(n) for n in range(600)]), "more than 500 tasks"),
    ]:
        with pytest.raises(InvalidInputError, match=words):
            await batch.client.submit(batch.group(then))  # type: ignore[arg-type]
    large = TaskGroup("x", [Task(metadata={"x": "y" * 70_000})])
    with pytest.raises(PayloadTooLargeError, match="then: "):
        await batch.client.submit(batch.group(large))
    assert await batch.client.groups() == []
