"""What queries tell of groups, tasks, events, roles and workers, in states made by the real scripts."""

from __future__ import annotations

from collections.abc import AsyncIterator, Sequence
from dataclasses import replace
from typing import Any

import pytest
import redis

from rq_ceylon.errors import NotFoundError
from rq_ceylon.goals import compile_goals
from rq_ceylon.models import Goal, GoalStatus, GroupStatus, TaskStatus
from rq_ceylon.store import queries, transitions
from rq_ceylon.store.codec import task_text
from rq_ceylon.store.connection import Connection
from rq_ceylon.store.events import TaskEvent
from rq_ceylon.store.keys import Keys
from rq_ceylon.store.scripts import command
from rq_ceylon.store.transitions import Ack, Committed, Delivery, GroupFacts, StagedTask
from rq_ceylon.views import Counters, GoalView, GroupView, RoleView, WorkerView

pytestmark = [pytest.mark.anyio, pytest.mark.every_engine]

FAILURE = b'{"type":"E","message":"m","traceback":"t"}'


class Bench:
    """Plays client and worker on one connection, a call at a time."""

    def __init__(self, connection: Connection, keys: Keys) -> None:
        self.connection, self.keys = connection, keys

    async def submit(self, gid: str, tasks: Sequence[StagedTask], facts: GroupFacts | None = None) -> None:
        facts = facts or GroupFacts(gid, 60_000)
        call = transitions.submit(self.keys, gid, facts, tasks, part=1, last=True, digest="d")
        *_, raw = await self.connection.run([*transitions.announce(self.keys, gid, ["p"]), call])
        pages = transitions.submit_reply(gid, raw).pages
        if pages:
            await self.connection.run([transitions.enqueue(self.keys, "p", pages)])

    async def fetch(self, budget: int, acks: Sequence[Ack] = ()) -> Sequence[Delivery]:
        call = transitions.fetch(self.keys, "p", "w", budget=budget, lease_ms=30_000, acks=acks)
        (raw,) = await self.connection.run([call])
        return transitions.fetch_reply("p", raw).deliveries

    async def claim(self, gid: str, deliveries: Sequence[Delivery]) -> None:
        await self.connection.run([transitions.claim(self.keys, gid, "w", deliveries)])

    async def commit(self, gid: str, delivery: Delivery, kind: str, blob: bytes = b"null", delay_ms: int = 0) -> None:
        reason = "error" if kind in ("failed", "retry") else ""
        outcome = Committed(delivery.tid, delivery.fence, kind, reason, delay_ms, 7, blob)
        await self.connection.run([transitions.commit(self.keys, gid, "w", [outcome])])

    async def start(self, gid: str, tasks: Sequence[StagedTask]) -> dict[str, Delivery]:
        await self.submit(gid, tasks)
        deliveries = await self.fetch(100)
        await self.claim(gid, deliveries)
        return {delivery.tid: delivery for delivery in deliveries}


def staged(tid: str, *needs: str, body: bytes = b"{}", delay_ms: int | None = None) -> StagedTask:
    return StagedTask(tid, task_text("p", 2, delay_ms, None, None, body), needs)


@pytest.fixture
async def bench(redis_url: str, namespace: str) -> AsyncIterator[Bench]:
    connection = Connection(redis_url)
    yield Bench(connection, Keys(namespace))
    await connection.close()


async def statuses(bench: Bench, gid: str) -> dict[str, TaskStatus]:
    return {view.task_id: view.status async for view in queries.tasks(bench.connection, bench.keys, gid)}


# ---- groups ----------------------------------------------------------------------------------------------------------
async def test_a_group_shows_its_facts_goals_and_counters(bench: Bench) -> None:
    goals = compile_goals([Goal("completed >= 1", name="one", success_message="well"), Goal(call="ask", deadline="1h")])
    facts = GroupFacts("thumbs", 60_000, key="k", description="for people", goals=goals)

    await bench.submit("g", [staged("a"), staged("b", "a")], facts)
    view = await queries.group(bench.connection, bench.keys, "g")

    now = await queries.server_ms(bench.connection, bench.keys)
    created, deadline = view.created_ms or 0, view.goals[1].deadline_ms or 0
    assert now - 60_000 < created <= now
    assert deadline == created + 3_600_000
    assert view == GroupView(
        id="g",
        name="thumbs",
        status=GroupStatus.ACTIVE,
        counters=Counters(total=2, waiting=1, pending=1),
        goals=[
            GoalView("one", "completed >= 1", GoalStatus.IN_PROGRESS, success_message="well"),
            GoalView("goal2", "call: ask", GoalStatus.IN_PROGRESS, deadline_ms=deadline, call="ask"),
        ],
        key="k",
        description="for people",
        created_ms=created,
        events=1,
    )


async def test_a_settled_goal_shows_when_and_by_what_and_the_counters_of_that_instant(bench: Bench) -> None:
    goals = compile_goals(Goal("completed >= 1", on_achieved="drain"))
    await bench.submit("g", [staged("a"), staged("b")], GroupFacts("g", 60_000, goals=goals))
    deliveries = await bench.fetch(1)
    await bench.claim("g", deliveries)
    await bench.commit("g", deliveries[0], "completed")

    view = await queries.group(bench.connection, bench.keys, "g")

    assert (view.status, view.outcome, view.finished_ms is None) == (GroupStatus.FINISHED, "completed", False)
    settled = view.goals[0].settled
    assert view.goals[0].status is GoalStatus.ACHIEVED
    assert settled is not None
    assert (settled.by, settled.counters.completed, settled.counters.total) == ("commit", 1, 2)
    event = (await queries.events(bench.connection, bench.keys, "g", settled.seq))[0]
    assert (event.seq, event.at_ms, event.goals) == (settled.seq, settled.at_ms, [("goal", "achieved")])


async def test_an_unknown_group_is_named_and_may_have_been_pruned(bench: Bench) -> None:
    with pytest.raises(NotFoundError, match=r"'nosuch'.*pruned"):
        await queries.group(bench.connection, bench.keys, "nosuch")


async def test_the_list_of_groups_skips_what_is_gone(bench: Bench) -> None:
    for gid in ("g1", "g2", "g3"):
        await bench.submit(gid, [staged("a")])
    await bench.connection.run([command("UNLINK", *bench.keys.group("g2"))])

    assert sorted(await queries.group_ids(bench.connection, bench.keys)) == ["g1", "g2", "g3"]
    assert {view.id for view in await queries.groups(bench.connection, bench.keys)} == {"g1", "g3"}


# ---- tasks -----------------------------------------------------------------------------------------------------------
async def test_every_state_of_an_open_group_is_told_apart(bench: Bench) -> None:
    tasks = [staged(tid) for tid in ("done", "broken", "again", "runs")]
    started = await bench.start("g", [*tasks, staged("late", delay_ms=60_000), staged("waits", "runs", "late")])
    await bench.commit("g", started["done"], "completed", b'{"n":1}')
    await bench.commit("g", started["broken"], "failed", FAILURE)
    await bench.commit("g", started["again"], "retry", delay_ms=60_000)

    found = {view.task_id: view async for view in queries.tasks(bench.connection, bench.keys, "g")}

    assert {tid: view.status for tid, view in found.items()} == {
        "done": TaskStatus.COMPLETED,
        "broken": TaskStatus.FAILED,
        "again": TaskStatus.PENDING,
        "runs": TaskStatus.IN_PROGRESS,
        "late": TaskStatus.PENDING,
        "waits": TaskStatus.WAITING,
    }
    assert (found["again"].attempt, found["runs"].worker, found["waits"].needs) == (2, "w", 2)
    now = await queries.server_ms(bench.connection, bench.keys)
    assert all(now < (found[tid].due_ms or 0) <= now + 60_000 for tid in ("again", "late"))
    assert (found["runs"].due_ms, found["waits"].due_ms) == (None, None)
    done, broken = found["done"].result, found["broken"].result
    assert done is not None
    assert broken is not None
    assert (done.value, done.run_ms, done.attempts, done.worker) == ({"n": 1}, 7, 1, "w")
    assert (broken.reason, broken.error) == ("error", {"type": "E", "message": "m", "traceback": "t"})


async def test_what_had_not_started_when_its_group_closed_is_cancelled(bench: Bench) -> None:
    await bench.submit("g", [staged("a"), staged("b"), staged("c", "b")])
    first = await bench.fetch(1)
    await bench.claim("g", first)
    await bench.connection.run([transitions.cancel_group(bench.keys, "g")])

    assert await statuses(bench, "g") == {
        "a": TaskStatus.IN_PROGRESS,
        "b": TaskStatus.CANCELLED,
        "c": TaskStatus.CANCELLED,
    }
    assert (await queries.task(bench.connection, bench.keys, "g", "c")).reason == "closed"
    assert await queries.results(bench.connection, bench.keys, "g", ["a", "b", "c"]) == {}


async def test_a_task_takes_its_name_from_itself_before_the_defaults(bench: Bench) -> None:
    facts = GroupFacts("g", 60_000, defaults={"uses": "common"})
    await bench.submit("g", [staged("a"), staged("b", body=b'{"uses":"own"}')], facts)

    assert [view.uses async for view in queries.tasks(bench.connection, bench.keys, "g")] == ["common", "own"]


async def test_an_unknown_task_is_named(bench: Bench) -> None:
    await bench.submit("g", [staged("a")])

    with pytest.raises(NotFoundError, match="'zz'"):
        await queries.task(bench.connection, bench.keys, "g", "zz")
    with pytest.raises(NotFoundError, match="'nosuch'"):
        await queries.task(bench.connection, bench.keys, "nosuch", "zz")


async def test_many_tasks_are_told_once_each_while_they_end(bench: Bench) -> None:
    """A task that ends during the scan is met in both hashes."""
    await bench.submit("g", [staged(f"t{n}") for n in range(500)])
    deliveries = list(await bench.fetch(500))
    await bench.claim("g", deliveries)

    seen: list[str] = []
    async for view in queries.tasks(bench.connection, bench.keys, "g"):
        seen.append(view.task_id)
        if deliveries and len(seen) % 3 == 0:
            await bench.commit("g", deliveries.pop(), "completed")

    assert sorted(seen) == sorted(f"t{n}" for n in range(500))


async def test_results_come_only_for_tasks_that_have_one(bench: Bench) -> None:
    started = await bench.start("g", [staged("a"), staged("b")])
    await bench.commit("g", started["a"], "completed", b'"x"')

    found = await queries.results(bench.connection, bench.keys, "g", ["a", "b", "zz"])

    assert {tid: result.value for tid, result in found.items()} == {"a": "x"}
    assert await queries.results(bench.connection, bench.keys, "g", []) == {}


# ---- events ----------------------------------------------------------------------------------------------------------
async def test_events_tell_tasks_goals_and_status_and_go_on_where_a_reader_stopped(bench: Bench) -> None:
    """A goal's name may hold a colon, which is also what stands between it and its status."""
    goals = compile_goals(Goal("completed >= 2", name="a:b"))
    await bench.submit("g", [staged("a"), staged("b")], GroupFacts("g", 60_000, goals=goals))
    deliveries = await bench.fetch(2)
    await bench.claim("g", deliveries)
    for delivery in deliveries:
        await bench.commit("g", delivery, "completed")

    events = await queries.events(bench.connection, bench.keys, "g", 1)

    assert [(event.seq, event.kind, event.goals, event.status) for event in events] == [
        (1, "submit", [], "active"),
        (2, "commit", [], ""),
        (3, "commit", [("a:b", "achieved")], "finished"),
    ]
    assert [replace_wait(task) for event in events for task in event.tasks] == [
        TaskEvent("a", "completed", "p", 0, 7),
        TaskEvent("b", "completed", "p", 0, 7),
    ]
    assert await queries.events(bench.connection, bench.keys, "g", 3) == events[2:]
    assert await queries.events(bench.connection, bench.keys, "g", 4) == []


def replace_wait(task: TaskEvent) -> TaskEvent:
    return task._replace(wait_ms=0)


# ---- what workers ask ------------------------------------------------------------------------------------------------
async def test_a_cancelled_task_and_every_task_of_a_cancelled_group_should_stop(bench: Bench) -> None:
    for gid in ("g1", "g2", "g3"):
        await bench.start(gid, [staged("a"), staged("b")])
    await bench.connection.run([transitions.cancel_tasks(bench.keys, "g1", ["a"])])
    await bench.connection.run([transitions.cancel_group(bench.keys, "g2")])
    wanted = {"g1": ["a", "b"], "g2": ["b"], "g3": ["a", "b"], "gone": ["a"]}

    assert await queries.stopping(bench.connection, bench.keys, wanted) == {("g1", "a"), ("g2", "b")}


# ---- roles and workers -----------------------------------------------------------------------------------------------
FACTS: dict[str, Any] = {
    "kind": "worker",
    "host": "h",
    "pid": 1,
    "version": "1",
    "roles": ["p"],
    "slots": 4,
    "task_names": ["x"],
    "tasks": {"g/a": 5},
    "started_ms": 9,
    "stopping": False,
}


async def test_a_role_counts_what_waits_what_is_out_and_who_serves_it(bench: Bench) -> None:
    started = await bench.start("g", [staged("a"), staged("b"), staged("late", delay_ms=60_000)])
    await bench.commit("g", started["a"], "completed")
    await bench.fetch(0, [Ack(started["a"].entry, "completed")])
    await bench.submit("h", [staged("c"), staged("d"), staged("e")])
    for name, facts in {"w1": FACTS, "w2": FACTS | {"roles": ["q"]}, "m": FACTS | {"kind": "monitor"}}.items():
        await bench.connection.run(transitions.heartbeat(bench.keys, name, facts, ttl_ms=60_000))

    assert await queries.roles(bench.connection, bench.keys) == [
        RoleView("p", queued=3, delivered=1, delayed=1, workers=1, slots=4, busy=1, totals={"completed": 1})
    ]


async def test_a_role_that_no_worker_ever_read_is_all_queued(bench: Bench) -> None:
    await bench.submit("g", [staged("a")])

    (role,) = await queries.roles(bench.connection, bench.keys)

    assert (role.queued, role.delivered, role.workers, role.totals) == (1, 0, 0, {})


async def test_only_workers_whose_heartbeat_lasts_are_alive(bench: Bench) -> None:
    for name in ("w2", "w1", "dead"):
        await bench.connection.run(transitions.heartbeat(bench.keys, name, FACTS, ttl_ms=60_000))
    await bench.connection.run([command("DEL", bench.keys.worker("dead"))])
    expected = WorkerView(name="w1", **FACTS)

    assert await queries.workers(bench.connection, bench.keys) == [expected, replace(expected, name="w2")]


async def test_no_reading_writes(bench: Bench, redis_url: str) -> None:
    await bench.start("g", [staged("a"), staged("b", "a")])
    before = dump(redis_url)

    await queries.group(bench.connection, bench.keys, "g")
    await queries.groups(bench.connection, bench.keys)
    await queries.task(bench.connection, bench.keys, "g", "a")
    await statuses(bench, "g")
    await queries.roles(bench.connection, bench.keys)
    await queries.events(bench.connection, bench.keys, "g", 1)
    await queries.stopping(bench.connection, bench.keys, {"g": ["a"]})

    assert dump(redis_url) == before


def dump(redis_url: str) -> dict[bytes, bytes]:
    with redis.Redis.from_url(redis_url, protocol=2) as client:
        return {name: client.dump(name) for name in client.keys("*") if client.type(name) != b"stream"}
