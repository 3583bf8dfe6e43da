"""Tasks that add tasks: by the step that counts their completion, so once, however often they run."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence

import cpu_jobs
import pytest
import redis
from bench import Bench
from commands import LIMIT_S

from rq_ceylon import Ceylon, Client, Goal, Task, TaskContext, TaskFailedError, TaskGroup
from rq_ceylon.audit import audit
from rq_ceylon.store import transitions
from rq_ceylon.store.codec import task_text
from rq_ceylon.store.transitions import StagedTask
from rq_ceylon.worker import Worker

pytestmark = pytest.mark.anyio


def children(*tids: str, needs: Sequence[str] = ()) -> list[StagedTask]:
    return [StagedTask(tid, task_text("p", 2, None, None, None, b"{}"), needs) for tid in tids]


@pytest.mark.every_engine
def test_a_commit_that_is_repeated_or_stale_adds_nothing(bench: Bench) -> None:
    bench.queued("g", ["a"], open="i", goal="completed >= 100%")
    first = bench.started("w", "g")
    bench.age(10_000)
    (second,) = bench.fetch("v", 1)
    assert bench.claim("v", second) == ["GRANTED"]

    assert bench.commit("w", first, children=children("x")) == "STALE"
    assert bench.commit("v", second, children=children("b", "c")) == "OK"
    assert bench.commit("v", second, children=children("b", "c", "d")) == "DONE"

    assert bench.counters("g") == {"total": 3, "pending": 2, "completed": 1}
    assert bench.meta("g")["status"] == "active"  # it was never idle


@pytest.mark.every_engine
def test_children_may_need_their_parent_and_each_other(bench: Bench) -> None:
    bench.queued("g", ["a", "bad"], open="i")
    deliveries = {delivery.tid: delivery for delivery in bench.fetch("w")}
    assert bench.claim("w", *deliveries.values()) == ["GRANTED", "GRANTED"]
    bench.commit("w", deliveries["bad"], "failed")

    more = [*children("b", needs=["a"]), *children("c", needs=["b"]), *children("d", needs=["bad"])]
    assert bench.commit("w", deliveries["a"], children=more) == "OK"
    assert bench.counters("g") == {"total": 5, "waiting": 1, "pending": 1, "completed": 1, "failed": 1, "cancelled": 1}
    for tid in ("b", "c"):
        delivery = bench.started("w", "g")
        assert delivery.tid == tid
        bench.commit("w", delivery)
    assert bench.meta("g")["status"] == "finished"


@pytest.mark.parametrize("kind", ["failed", "retry", "release", "stopped"])
def test_a_task_that_does_not_complete_adds_nothing(kind: str, bench: Bench) -> None:
    bench.queued("g", ["a"], open="o")
    bench.commit("w", bench.started("w", "g"), kind, children=children("b"))

    assert bench.counters("g")["total"] == 1


@pytest.mark.parametrize("how", ["sealed", "closed", "never open"])
def test_a_group_that_takes_no_more_tasks_drops_them(how: str, bench: Bench) -> None:
    goal = Goal("completed >= 1", on_achieved="drain")
    bench.queued("g", ["a", "b"], open="0" if how == "never open" else "o", goal=goal if how == "closed" else ())
    first, second = bench.fetch("w")
    assert bench.claim("w", first, second) == ["GRANTED", "GRANTED"]
    bench.commit("w", first)
    if how == "sealed":
        bench.run(transitions.seal(bench.keys, "g", untouched_ms=0))

    assert bench.commit("w", second, children=children("c")) == "OK"
    assert bench.counters("g") == {"total": 2, "completed": 2}


@pytest.mark.every_engine
def test_at_the_memory_limit_a_task_that_spawns_is_given_back_and_others_count(bench: Bench) -> None:
    bench.queued("g", ["a", "b"], open="o")
    first, second = bench.fetch("w")
    assert bench.claim("w", first, second) == ["GRANTED", "GRANTED"]
    bench.redis.config_set("maxmemory", 1)
    try:
        assert bench.commit("w", second) == "OK"
        assert bench.commit("w", first, children=children("c")) == "FULL"
    finally:
        bench.redis.config_set("maxmemory", 0)
    assert bench.counters("g") == {"total": 2, "pending": 1, "completed": 1}
    (claim,) = bench.redis.hvals(bench.keys.group_part("g", "claims"))
    assert claim.startswith("l|1|")


def test_at_the_memory_limit_a_task_that_may_run_once_fails(bench: Bench) -> None:
    bench.queued("g", ["a"], open="o", crash_limit=0)
    delivery = bench.started("w", "g")
    bench.redis.config_set("maxmemory", 1)
    try:
        assert bench.commit("w", delivery, children=children("c")) == "OK"
    finally:
        bench.redis.config_set("maxmemory", 0)
    assert bench.counters("g") == {"total": 1, "failed": 1}


def test_at_the_memory_limit_a_task_that_is_to_stop_counts_without_its_children(bench: Bench) -> None:
    bench.queued("g", ["a"], open="o")
    delivery = bench.started("w", "g")
    bench.run(transitions.cancel_tasks(bench.keys, "g", ["a"]))
    bench.redis.config_set("maxmemory", 1)
    try:
        assert bench.commit("w", delivery, children=children("c")) == "OK"
    finally:
        bench.redis.config_set("maxmemory", 0)
    assert bench.counters("g") == {"total": 1, "completed": 1}


def make_jobs(app: Ceylon) -> dict[str, Task]:
    @app.task(role="r", name="leaf")
    async def leaf(number: int) -> int:
        return number

    @app.task(role="r")
    async def tree(context: TaskContext, depth: int, path: str = "0") -> str:
        for branch in range(2 if depth else 0):
            context.spawn(tree.using(id=f"{path}{branch}").bind(depth - 1, f"{path}{branch}"))
        return path

    @app.task(role="r")
    def threaded(context: TaskContext) -> str:
        return context.spawn(Task(uses="leaf", id="from-thread", arguments={"number": 1}))

    return {"tree": tree.using(id="0").bind(3), "thread": threaded.bind(), "process": cpu_jobs.spawning.bind()}


async def run(app: Ceylon, client: Client, names: Sequence[str] = ("r",)) -> None:
    worker = Worker(client.url, registry=app.registry, namespace=client.keys.namespace, roles=names, burst=True)
    await asyncio.wait_for(worker.run(), LIMIT_S)


@pytest.mark.parametrize(("kind", "total"), [("tree", 15), ("thread", 2), ("process", 2)])
async def test_every_kind_of_handler_may_spawn(kind: str, total: int, app: Ceylon, client: Client) -> None:
    job = make_jobs(app)[kind]
    app.registry.add(cpu_jobs.spawning.handler)
    group = await client.submit(TaskGroup("g", [job], goal="completed >= 100%", open="until_idle"))
    await run(app, client, ["r", "default"])

    view = await group.view()
    assert (view.outcome, view.counters.completed, view.counters.total) == ("completed", total, total)
    assert view.goals[0].status == "achieved"
    assert not (await audit(client.connection, client.keys)).drift


async def test_what_cannot_be_spawned_fails_the_task_in_words(app: Ceylon, client: Client) -> None:
    @app.task(role="r", max_attempts=1)
    async def spawns(context: TaskContext, what: str) -> None:
        task = Task(uses="spawns", arguments={"what": "x"})
        if what == "argument":
            task = Task(uses="spawns", arguments={"wat": 1})
        elif what == "id":
            task = Task(id="not an id")
        for _ in range(1001 if what == "many" else 5 if what == "large" else 1):
            context.spawn(Task(metadata={"x": "y" * 1_000_000}) if what == "large" else task)

    group = await client.submit(
        TaskGroup("g", [spawns.using(id=what).bind(what) for what in ("argument", "id", "many", "large")], open=True)
    )
    closed = await client.submit(TaskGroup("g", [spawns.using(id="closed").bind("x")]))
    await run(app, client)

    for gid, what, words in [
        (group.id, "argument", "wat"),
        (group.id, "id", "task id"),
        (group.id, "many", "spawns more than 1,000 tasks"),
        (group.id, "large", "spawns more than 1,000 tasks or 4,194,304 bytes"),
        (closed.id, "closed", "its group takes no tasks; submit it with open=True"),
    ]:
        with pytest.raises(TaskFailedError, match=words):
            await client.task(f"{gid}/{what}").result()
    assert (await group.view()).counters.total == 4


async def test_the_role_of_a_spawned_task_is_that_of_its_handler_else_that_of_its_parent(
    app: Ceylon, client: Client
) -> None:
    @app.task(role="other")
    async def elsewhere() -> None: ...

    @app.task(role="r")
    async def parent(context: TaskContext) -> None:
        context.spawn(elsewhere.using(id="handler").bind())
        context.spawn(Task(id="parent"))
        context.spawn(Task(id="own", role="own"))

    group = await client.submit(TaskGroup("g", [parent.bind()], open=True))
    await run(app, client)

    roles = {task.task_id: task.role async for task in group.tasks()}
    assert {tid: role for tid, role in roles.items() if tid != "1"} == {"handler": "other", "parent": "r", "own": "own"}
    with redis.Redis.from_url(client.url, decode_responses=True) as raw:
        assert {"other", "own"} <= raw.smembers(client.keys.roles)
