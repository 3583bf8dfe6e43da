"""Many who wait cost no more than a few, and nobody waits for ever."""

from __future__ import annotations

import asyncio

import pytest
import redis
from commands import Commands, eventually

from rq_ceylon import Ceylon, CeylonError, InvalidInputError, NotFoundError, Task, TaskGroup, WaitTimeoutError
from rq_ceylon.client import following
from rq_ceylon.store import transitions
from rq_ceylon.store.scripts import command

pytestmark = pytest.mark.anyio


async def test_a_thousand_waiters_share_a_few_round_trips(app: Ceylon, trips: list[list[str]]) -> None:
    async with app.client() as client:
        handles = await asyncio.gather(*(client.submit(Task(role="p")) for _ in range(1000)))
        trips.clear()

        waiting = [asyncio.create_task(handle.result()) for handle in handles]
        await eventually(lambda: len(trips) >= 2, "all were asked for")
        assert await handles[0].cancel() == "cancelled"
        with pytest.raises(CeylonError, match="cancelled"):
            await waiting[0]

        assert len(trips) <= 20
        assert not any(one.done() for one in waiting[1:])
    assert {str(one.exception()) for one in waiting[1:]} == {
        "the client was closed while this waited; the submitted tasks go on"
    }


async def test_waiting_for_a_group_asks_nothing_while_nothing_changes(app: Ceylon, trips: list[list[str]]) -> None:
    """A wait was answered at once with the same view, and began anew: thousands of round trips a second."""
    async with app.client() as client:
        run = await client.submit(TaskGroup("g", [Task(role="p")] * 2))
        waiting = [asyncio.create_task(run.wait("all")) for _ in range(10)]
        async for _ in run.progress():
            break
        for _ in range(2):  # in the first round they come to rest
            trips.clear()
            for _ in range(100):
                await client.connection.run([command("GET", "any")])
        assert 100 <= len(trips) <= 105
        await run.task("1").cancel()
        await run.task("2").cancel()
        assert {view.status for view in await asyncio.gather(*waiting)} == {"finished"}


async def test_a_role_that_nobody_serves_is_named_once_for_all_who_wait(
    app: Ceylon, said: list[str], trips: list[list[str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(following, "NO_WORKER_S", 0.03)
    async with app.client() as client:
        handles = [await client.submit(Task(role="lone")) for _ in range(20)]
        run = await client.submit(TaskGroup("g", [Task(role="grouped")] * 5))
        waiting = [asyncio.create_task(handle.result()) for handle in handles]
        waiting += [asyncio.create_task(run.task(str(n)).result()) for n in range(1, 6)]
        waiting += [asyncio.create_task(run.wait()) for _ in range(5)]
        await eventually(lambda: len(said) >= 2, "both roles are named")
        trips.clear()
        await eventually(lambda: sum("SMEMBERS" in trip for trip in trips) >= 6, "it was looked for workers again")
    await asyncio.gather(*waiting, return_exceptions=True)

    assert sorted(said) == [
        f"WARNING: Still waiting: no worker serves role '{role}' (no worker is running); "
        f"start one with: ceylon-worker MODULE:APP --role {role}\n"
        for role in ("grouped", "lone")
    ]


async def test_a_name_that_no_worker_of_its_role_knows_is_told_to_those_who_wait(
    app: Ceylon, said: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(following, "NO_WORKER_S", 0.03)
    async with app.client() as client:
        facts = {"kind": "worker", "roles": ["r"], "task_names": ["resize"], "slots": 1}
        beat = transitions.heartbeat(client.keys, "w", facts, ttl_ms=60_000, roles=["r"])
        await client.connection.run(beat)
        waiting = [
            asyncio.create_task((await client.submit(Task(uses=uses, role="r"))).result())
            for uses in ("resise", "resise", "resize")
        ]
        await eventually(lambda: said, "the name is told")
    await asyncio.gather(*waiting, return_exceptions=True)

    words = "no live worker of role 'r' knows the task 'resise'; did you mean \"resize\"?"
    assert said == [f"WARNING: Still waiting: {words}\n"]


def test_a_program_that_waits_in_vain_hears_why_without_any_set_up_of_logging(commands: Commands) -> None:
    program = """
from rq_ceylon import Ceylon, Task, WaitTimeoutError
from rq_ceylon.client import following

following.NO_WORKER_S = 0.1
with Ceylon().sync_client() as client:
    handle = client.submit(Task(role="lone"))
    try:
        handle.result(timeout=2)
    except WaitTimeoutError:
        handle.cancel()
"""
    ended = commands.python("-c", program)

    assert ended.returncode == 0, ended.stderr
    assert ended.stderr == (
        "Still waiting: no worker serves role 'lone' (no worker is running); "
        "start one with: ceylon-worker MODULE:APP --role lone\n"
    )


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


async def test_one_submission_after_the_other_takes_one_round_trip_each(app: Ceylon, trips: list[list[str]]) -> None:
    async with app.client() as client:
        await client.submit(Task(role="p"))
        trips.clear()

        for _ in range(100):
            await client.submit(Task(role="p"))

        assert 100 <= len(trips) <= 105


@pytest.mark.parametrize("task", [Task(id="mine"), Task(needs=["other"])])
async def test_a_single_task_with_what_only_a_group_can_give_is_refused(app: Ceylon, task: Task) -> None:
    async with app.client() as client:
        with pytest.raises(InvalidInputError, match="TaskGroup"):
            await client.submit(task)


async def test_a_position_that_is_taken_by_a_given_id_is_passed_over(app: Ceylon) -> None:
    async with app.client() as client:
        run = await client.submit(TaskGroup("g", [Task(id="2"), Task(), Task(id="4"), Task()]))

        assert {task.task_id async for task in run.tasks()} == {"2", "3", "4", "5"}


@pytest.mark.parametrize("turns", range(0, 60, 3))
async def test_closing_a_client_ends_every_wait_at_whatever_moment(app: Ceylon, turns: int) -> None:
    """A group's waiter that was answered just before the end asked again, and waited for ever."""
    async with app.client() as client:
        run = await client.submit(TaskGroup("g", [Task(role="p"), Task(role="p")]))
        waiting = [asyncio.create_task(run.task("1").result()), asyncio.create_task(run.wait())]
        for _ in range(turns):
            await asyncio.sleep(0.0005)

    done, _ = await asyncio.wait(waiting, timeout=5)

    assert done == set(waiting)
    assert all(isinstance(one.exception(), CeylonError) for one in waiting)


async def test_a_client_that_closes_right_after_a_wait_leaves_no_connection(app: Ceylon, redis_url: str) -> None:
    """The reader that the last waiter left behind unsubscribed after the end, on a new connection."""
    with redis.Redis.from_url(redis_url) as raw:
        before = raw.info("clients")["connected_clients"]
        for turns in range(12):
            async with app.client() as client:
                run = await client.submit(TaskGroup("g", [Task(role="p")]))
                with pytest.raises(WaitTimeoutError):
                    await run.wait(timeout=0.001 * turns)

        await eventually(lambda: raw.info("clients")["connected_clients"] <= before, "no connection is left")
