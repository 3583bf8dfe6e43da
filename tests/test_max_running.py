"""`max_running`: never more tasks of a group at once, whoever claims; and as many as may, whatever happens to them."""

from __future__ import annotations

import asyncio
import time

import pytest
from bench import Bench
from commands import LIMIT_S, Commands

from rq_ceylon import Ceylon, Client, Goal, InvalidInputError, Task, TaskGroup
from rq_ceylon.audit import audit
from rq_ceylon.maintenance.steps import Maintenance
from rq_ceylon.store import transitions
from rq_ceylon.store.connection import Connection
from rq_ceylon.store.transitions import Delivery
from rq_ceylon.worker import Worker

pytestmark = pytest.mark.anyio


def claim_all(bench: Bench, worker: str = "w") -> list[Delivery]:
    """Fetch and claim all that is queued. Returns what was granted; the rest is parked."""
    granted = []
    while deliveries := bench.fetch(worker, 100):
        for delivery, verdict in zip(deliveries, bench.claim(worker, *deliveries), strict=True):
            assert verdict in ("GRANTED", "PARKED")
            granted += [delivery] if verdict == "GRANTED" else []
        bench.fetch(worker, 0, acks=[one.entry for one in deliveries if one not in granted])
    assert bench.counters("g").get("in_progress", 0) <= int(bench.meta("g")["max_running"])
    return granted


def parked(bench: Bench) -> int:
    return int(bench.redis.zcard(bench.keys.group_part("g", "parked")))


@pytest.mark.every_engine
def test_what_exceeds_it_waits_and_each_end_makes_room(bench: Bench) -> None:
    bench.queued("g", list("abcdefg"), max_running=2)
    running = claim_all(bench)
    assert (len(running), parked(bench)) == (2, 5)
    ran = list(running)
    while running:
        bench.commit("w", running.pop(0), "completed")
        more = claim_all(bench)
        running += more
        ran += more
        assert len(running) == min(2, 7 - len(ran) + len(running))
    assert sorted(delivery.tid for delivery in ran) == list("abcdefg")
    assert bench.meta("g")["outcome"] == "completed"


@pytest.mark.parametrize("kind", ["failed", "retry", "release"])
def test_every_kind_of_end_makes_room(kind: str, bench: Bench) -> None:
    bench.queued("g", list("abc"), max_running=1)
    (running,) = claim_all(bench)
    bench.commit("w", running, kind, delay_ms=60_000 if kind == "retry" else 0)

    assert len(claim_all(bench)) == 1


def test_a_takeover_takes_no_further_place_and_a_crash_frees_none(bench: Bench) -> None:
    bench.queued("g", list("abc"), max_running=1)
    (first,) = claim_all(bench)
    bench.fetch("w", 0, acks=[])
    bench.age(10_000)
    (again,) = bench.fetch("v")
    assert again.tid == first.tid
    assert bench.claim("v", again) == ["GRANTED"]
    assert (bench.counters("g")["in_progress"], parked(bench)) == (1, 2)
    assert bench.commit("w", first) == "STALE"
    assert bench.fetch("v") == []
    bench.commit("v", again)
    assert len(claim_all(bench)) == 1


def test_cancelled_tasks_free_the_places_that_they_were_given(bench: Bench) -> None:
    bench.queued("g", list("abcdef"), max_running=2)
    running = claim_all(bench)
    bench.commit("w", running[0])  # one more is queued again
    (queued,) = [tid for tid in "abcdef" if tid not in {one.tid for one in running} and not waits(bench, tid)]
    bench.run(transitions.cancel_tasks(bench.keys, "g", [queued]))
    bench.relay("g")
    bench.commit("w", running[1])

    granted = []
    while deliveries := bench.fetch("w"):
        granted += [
            one.tid for one, word in zip(deliveries, bench.claim("w", *deliveries), strict=True) if word == "GRANTED"
        ]
    assert len(granted) == 2
    waiting = [tid for tid in "abcdef" if waits(bench, tid)]
    bench.run(transitions.cancel_tasks(bench.keys, "g", waiting))
    assert parked(bench) == 0


def waits(bench: Bench, tid: str) -> bool:
    claim = bench.redis.hget(bench.keys.group_part("g", "claims"), tid)
    return claim is not None and claim.split("|")[8] == "room"


def test_tasks_that_are_due_later_do_not_take_the_room_of_others(bench: Bench) -> None:
    bench.queued("g", list("abcdef"), max_running=3)
    running = claim_all(bench)
    for delivery in running:  # all three come back in an hour
        bench.commit("w", delivery, "retry", delay_ms=3_600_000)

    assert len(claim_all(bench)) == 3


def test_tasks_that_are_due_later_hide_no_room_when_what_got_it_is_cancelled(bench: Bench) -> None:
    bench.queued("g", list("abcdef"), max_running=2)
    running = claim_all(bench)
    for delivery in running:
        bench.commit("w", delivery, "retry", delay_ms=3_600_000)
    queued = [tid for tid in "abcdef" if tid not in {one.tid for one in running} and not waits(bench, tid)]
    assert (len(queued), parked(bench)) == (3, 1)

    bench.run(transitions.cancel_tasks(bench.keys, "g", queued))
    bench.relay("g")

    assert (len(lazily(bench)), parked(bench)) == (1, 0)


def test_high_goes_before_low_where_tasks_wait_for_room(bench: Bench) -> None:
    bench.submit("g", ["a"], max_running=1, part=1, last=False)
    bench.submit("g", ["low"], priority=3, part=2, last=False)
    bench.submit("g", ["high"], priority=1, part=3)
    bench.relay("g")
    order = []
    for _ in range(3):
        (running,) = claim_all(bench)
        order.append(running.tid)
        bench.commit("w", running)
    assert order[1:] == sorted(order[1:], key=["high", "a", "low"].index)  # the first did not wait


def test_closing_drops_what_waits_and_a_retry_begins_anew(bench: Bench) -> None:
    bench.queued("g", list("abcd"), max_running=1, goal=Goal("failed <= 0", on_failed="cancel"))
    (running,) = claim_all(bench)
    bench.commit("w", running, "failed")
    assert (bench.meta("g")["status"], parked(bench)) == ("finished", 0)

    assert bench.run(transitions.settle(bench.keys, "g", "0")) == ["OK", "finished", "0"]
    bench.run(transitions.reopen(bench.keys, "g", [(tid, ()) for tid in "abcd"]))
    bench.run(transitions.end_retry(bench.keys, "g"))
    bench.relay("g")
    for _ in "abcd":
        (running,) = claim_all(bench)
        bench.commit("w", running)
    assert bench.meta("g")["outcome"] == "completed"


async def test_a_role_that_loses_its_entries_gets_back_those_of_tasks_that_had_room(
    bench: Bench, connection: Connection
) -> None:
    bench.queued("g", list("abcdef"), max_running=2)
    (running, other) = claim_all(bench)
    bench.commit("w", running)  # one is queued again
    bench.redis.delete(*bench.keys.role("p"))
    for _ in range(3):
        bench.redis.zadd(bench.keys.index_of("g"), {"g": 1})
        await Maintenance(connection, bench.keys).run_once()

    assert [len(bench.fetch("v", 10)), parked(bench)] == [1, 3]
    bench.commit("w", other)


async def test_workers_keep_to_it_and_use_all_of_it(app: Ceylon, client: Client) -> None:
    now = most = 0

    @app.task(role="r", max_attempts=2)
    async def work(number: int) -> None:
        nonlocal now, most
        now += 1
        most = max(most, now)
        await asyncio.sleep(0.01)
        now -= 1
        if number % 7 == 0:
            raise ValueError

    tasks = [work.using(max_attempts=1).bind(number) for number in range(100)]
    group = await client.submit(TaskGroup("array", tasks, max_running=5))
    assert (await group.view()).max_running == 5
    workers = [
        Worker(
            client.url, registry=app.registry, namespace=client.keys.namespace, roles=["r"], burst=True, name=f"w{n}"
        )
        for n in range(2)
    ]
    began = time.monotonic()
    await asyncio.wait_for(asyncio.gather(*(worker.run() for worker in workers)), LIMIT_S)

    view = await group.wait("all", timeout=LIMIT_S)
    assert (most, view.counters.completed, view.counters.failed) == (5, 85, 15)
    assert time.monotonic() - began < LIMIT_S
    assert not (await audit(client.connection, client.keys)).drift


async def test_only_a_whole_number_of_tasks_may_run(client: Client) -> None:
    for bad in (0, -1, 1.5, True, "3", 10**7):
        with pytest.raises(InvalidInputError, match="max_running"):
            await client.submit(TaskGroup("g", [Task()], max_running=bad))  # type: ignore[arg-type]


def test_a_file_has_it_and_show_says_why_a_task_waits(commands: Commands, bench: Bench) -> None:
    where = ("--namespace", bench.keys.namespace)
    (commands.folder / "array.yaml").write_text("name: array\nmax_running: 1\ntasks: {a: {role: p}, b: {role: p}}\n")
    gid = commands.here("ceylon-submit", "array.yaml", *where).stdout.strip()
    for delivery in bench.fetch("w"):
        bench.claim("w", delivery)

    told = (
        commands.here("ceylon", "show", f"{gid}/b", *where).stdout
        + commands.here("ceylon", "show", f"{gid}/a", *where).stdout
    )
    assert "its group runs 1 tasks at once at most (max_running), and so many are running" in told


# Lazy groups.

ENOUGH = Goal("completed >= 10", name="enough", on_achieved="drain")


@pytest.mark.every_engine
def test_a_lazy_group_starts_what_its_goal_needs_and_one_more(bench: Bench) -> None:
    bench.queued("g", [f"t{n}" for n in range(60)], lazy=True, goal=ENOUGH)
    running = lazily(bench)
    assert len(running) == 11
    for delivery in running[:9]:
        bench.commit("w", delivery)
        assert lazily(bench) == []
    bench.commit("w", running[9])

    assert bench.meta("g")["goal:enough"].startswith("achieved|")
    bench.commit("w", running[10])
    assert bench.counters("g") == {"total": 60, "completed": 11, "cancelled": 49}


def test_a_lazy_group_makes_up_for_tasks_that_fail(bench: Bench) -> None:
    bench.queued("g", [f"t{n}" for n in range(60)], lazy=True, goal=ENOUGH)
    running = lazily(bench)
    for number, delivery in enumerate(running):
        bench.commit("w", delivery, "completed" if number % 2 else "failed")
    started = len(running)
    running = lazily(bench)
    assert len(running) == 11  # 5 of 11 completed and 5 more are needed: 5 * 12 / 6, and one
    while running:
        started += len(running)
        for number, delivery in enumerate(running):
            bench.commit("w", delivery, "completed" if number % 2 else "failed")
        running = lazily(bench)

    assert bench.meta("g")["goal:enough"].startswith("achieved|")
    assert 20 <= started <= 40


@pytest.mark.parametrize("goals", [["completed >= 10%", "completed >= 50%"], ["completed >= 50%", "completed >= 10%"]])
def test_the_nearest_goal_that_ends_the_group_counts(goals: list[str], bench: Bench) -> None:
    bench.queued(
        "g",
        [f"t{n}" for n in range(60)],
        lazy=True,
        goal=[*(Goal(when, on_achieved="cancel") for when in goals), "completed >= 1"],
    )
    assert len(lazily(bench)) == 7


async def test_a_task_that_hangs_does_not_hold_up_a_lazy_group(bench: Bench, connection: Connection) -> None:
    goal = Goal("completed >= 1", name="enough", on_achieved="drain")
    bench.queued("g", list("abcd"), lazy=True, goal=goal)
    assert len(lazily(bench)) == 2  # both hang
    for more in (1, 2):
        long_ago = int(bench.meta("g")["touched"]) - 10_000 * more
        bench.redis.hset(bench.keys.group_part("g", "meta"), "last_end", long_ago)
        bench.redis.zadd(bench.keys.index_of("g"), {"g": 1})
        await Maintenance(connection, bench.keys).run_once()
        assert len(lazily(bench)) == 1
    bench.redis.hset(bench.keys.group_part("g", "meta"), "max_running", 1)
    assert lazily(bench) == []


def lazily(bench: Bench) -> list[Delivery]:
    """Fetch and claim all that is queued. Returns what was granted; the rest is parked, or its group is closed."""
    granted = []
    while deliveries := bench.fetch("w", 100):
        verdicts = bench.claim("w", *deliveries)
        granted += [one for one, verdict in zip(deliveries, verdicts, strict=True) if verdict == "GRANTED"]
        bench.fetch("w", 0, acks=[one.entry for one in deliveries if one not in granted])
    return granted


async def test_a_lazy_group_needs_a_goal_that_ends_it(client: Client) -> None:
    for dispatch, words in (("lazy", "lazy needs a goal that ends the group"), ("slow", "use eager or lazy")):
        with pytest.raises(InvalidInputError, match=words):
            await client.submit(TaskGroup("g", [Task()], goal="completed >= 1", dispatch=dispatch))  # type: ignore[arg-type]


async def test_workers_start_little_in_vain_for_a_lazy_group(app: Ceylon, client: Client) -> None:
    started = 0

    @app.task(role="r")
    async def work(number: int) -> int:
        nonlocal started
        started += 1
        await asyncio.sleep(0.05)
        return number

    group = await client.submit(
        TaskGroup("answers", [work.bind(number) for number in range(200)], goal=ENOUGH, dispatch="lazy")
    )
    worker = Worker(client.url, registry=app.registry, namespace=client.keys.namespace, roles=["r"], burst=True)
    await asyncio.wait_for(worker.run(), LIMIT_S)

    view = await group.wait("all", timeout=LIMIT_S)
    assert view.goals[0].status == "achieved"
    assert started <= 11
    assert not (await audit(client.connection, client.keys)).drift
