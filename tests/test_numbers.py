"""The deterministic figures: round trips, commands, calls inside scripts and bytes, counted, never timed."""

from __future__ import annotations

import asyncio

import pytest
from bench import Bench

from rq_ceylon import Ceylon, Client, Task, TaskGroup, Worker
from rq_ceylon.handlers import Handler, Registry

pytestmark = pytest.mark.anyio


async def test_a_busy_worker_needs_few_round_trips_and_commands_per_task(
    redis_url: str, namespace: str, trips: list[list[str]]
) -> None:
    slots, tasks = 50, 5000
    async with Client(redis_url, namespace=namespace) as client:
        handle = await client.submit(TaskGroup("g", (Task(uses="noop", role="p") for _ in range(tasks))))
    registry = Registry()

    async def noop() -> None:
        return None

    registry.add(Handler("noop", noop))
    worker = Worker(redis_url, namespace=namespace, registry=registry, roles=["p"], slots=slots, burst=True)
    trips.clear()
    await asyncio.wait_for(worker.run(), 60)
    made = [len(calls) for calls in trips]
    async with Client(redis_url, namespace=namespace) as client:
        view = await client.group(handle.id).view()
    assert view.counters.completed == tasks
    # One turn carries a batch; the rest is the start, heartbeats, maintenance and the end.
    assert len(made) / tasks <= 1 / slots + 60 / tasks
    assert sum(made) / tasks <= 0.08


async def test_a_single_task_takes_one_round_trip_and_its_result_one_look(
    bench: Bench, redis_url: str, namespace: str, trips: list[list[str]]
) -> None:
    async with Client(redis_url, namespace=namespace) as client:
        await client.submit(Task(uses="noop", role="p"))
        trips.clear()
        handle = await client.submit(Task(uses="noop", role="p"))
        assert trips == [["submit", "enqueue"]]
        assert bench.redis.xlen(bench.keys.role_part("p", "normal")) == 2

        for delivery in bench.fetch("w", 2):
            assert bench.claim("w", delivery) == ["GRANTED"]
            assert bench.commit("w", delivery) == "OK"
        trips.clear()
        await asyncio.wait_for(handle.result(), 10)
        assert trips == [["HGETALL", "LLEN", "HEXISTS", "HMGET"]]


async def test_a_queued_task_takes_at_most_200_bytes(redis_url: str, namespace: str) -> None:
    bench = Bench(redis_url, namespace)
    tasks = 20_000
    async with Client(redis_url, namespace=namespace) as client:
        await client.submit(TaskGroup("warm", [Task(role="p")]))
        before = bench.redis.info("memory")["used_memory"]
        app = Ceylon(redis_url, namespace=namespace)
        assert app.settings.namespace == namespace
        work = (Task(uses="resize", role="p", arguments={"path": "a.jpg", "width": 64}) for _ in range(tasks))
        await client.submit(TaskGroup("g", work))
        after = bench.redis.info("memory")["used_memory"]
    assert (after - before) / tasks <= 200


@pytest.mark.parametrize("batch", [1, 50])
def test_scripts_call_redis_a_bounded_number_of_times(redis_url: str, namespace: str, batch: int) -> None:
    bench = Bench(redis_url, namespace)
    bench.queued("g", [str(n) for n in range(batch)])
    figures = {}
    bench.redis.config_resetstat()
    deliveries = bench.fetch("w", batch)
    figures["fetch"] = _inner_calls(bench)
    bench.claim("w", *deliveries)
    figures["claim"] = _inner_calls(bench)
    from rq_ceylon.store import transitions
    from rq_ceylon.store.transitions import Committed

    outcomes = [Committed(d.tid, d.fence, "completed", "", 0, 1, b"null") for d in deliveries]
    bench.run(transitions.commit(bench.keys, "g", "w", outcomes))
    figures["commit"] = _inner_calls(bench)
    assert figures["fetch"] <= 20
    assert figures["claim"] <= 12
    assert figures["commit"] <= 30  # the last one finishes the group, and dates its keys


def _inner_calls(bench: Bench) -> int:
    stats = bench.redis.info("commandstats")
    bench.redis.config_resetstat()
    ignored = ("cmdstat_evalsha", "cmdstat_info", "cmdstat_config", "cmdstat_script", "cmdstat_client", "cmdstat_hello")
    return sum(one["calls"] for name, one in stats.items() if not name.startswith(ignored))
