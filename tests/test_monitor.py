"""The monitor: goals are announced once and judged in time, whoever else is about and whatever happens to Redis."""

import asyncio
import contextlib
import math
import random
import re
import sys
import threading
from collections import Counter
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

import pytest
from bench import Bench
from commands import LIMIT_S, eventually

from rq_ceylon.dev.server import EmbeddedServer
from rq_ceylon.errors import RedisError
from rq_ceylon.handlers import GoalCheck, Registry
from rq_ceylon.maintenance import judge
from rq_ceylon.models import Goal
from rq_ceylon.monitor import Monitor
from rq_ceylon.store import queries, transitions
from rq_ceylon.store.connection import Connection
from rq_ceylon.store.events import LOOK_S, Event, TaskEvent, Watch
from rq_ceylon.store.histogram import Histogram
from rq_ceylon.store.keys import Keys
from rq_ceylon.store.statistics import GroupStatistics
from rq_ceylon.views import GroupView

pytestmark = pytest.mark.anyio


def about(said: list[str], words: str) -> list[str]:
    return [line for line in said if words in line]


async def until_said(said: list[str], words: str, times: int = 1) -> None:
    await eventually(lambda: len(about(said, words)) >= times, f"logged {times} times: {words}")


@contextlib.asynccontextmanager
async def watching(url: str, namespace: str, said: list[str], **options: Any) -> AsyncIterator[Monitor]:
    """A running monitor that already watches."""
    monitor = Monitor(url, namespace=namespace, **options)
    running = asyncio.create_task(monitor.run())
    try:
        await eventually(lambda: running.done() or about(said, monitor.name), "the monitor watches")
        yield monitor
        assert not running.done(), running.exception()
    finally:
        monitor.stop()
        await running


def registry(**checks: GoalCheck) -> Registry:
    made = Registry()
    made.goal_checks.update(checks)
    return made


def without_maintenance(monkeypatch: pytest.MonkeyPatch) -> None:
    async def nothing(maintenance: object) -> float:
        return 60.0

    monkeypatch.setattr("rq_ceylon.maintenance.Maintenance.run_once", nothing)


def finish_all(bench: Bench, kind: str = "completed", count: int = 1000) -> None:
    for delivery in bench.fetch("w", count):
        if bench.claim("w", delivery) == ["GRANTED"]:
            assert bench.commit("w", delivery, kind) == "OK"


def goal_of(bench: Bench, gid: str, name: str = "goal") -> str:
    """Status and what settled it; empty while undecided."""
    text = bench.meta(gid).get(f"goal:{name}", "")
    return " by ".join(text.split("|")[:4:3]) if text else ""


# ---- saying what happened --------------------------------------------------------------------------------------------
async def test_an_achieved_goal_and_a_finished_group_are_logged(
    bench: Bench, redis_url: str, namespace: str, said: list[str]
) -> None:
    async with watching(redis_url, namespace, said):
        goal = Goal("completed >= 5", name="partial", success_message="Enough {of} them!")
        bench.queued("g", [str(number) for number in range(10)], goal=goal)
        finish_all(bench, count=5)
        await until_said(said, "Goal")
        finish_all(bench)
        await until_said(said, "finished")

    assert about(said, "Goal") == [
        'INFO: Goal achieved: partial of "g" (5 of 10 completed, 5 needed). Enough {of} them!\n'
    ]
    (line,) = about(said, "finished")
    assert 'Group "g" finished as completed: 10 completed, 0 failed, 0 cancelled in ' in line
    assert re.search(r"; role p: run mean 5 ms, p50 5, p95 5, p99 5; wait mean \d+ ms, p50 ", line)


async def test_a_group_that_waits_for_others_has_no_deadline_yet(
    bench: Bench, connection: Connection, redis_url: str, namespace: str
) -> None:
    bench.queued("first")
    bench.submit("last", depends_on=["first"], goal=Goal("completed >= 1", deadline=600))
    assert [goal.deadline_ms for goal in (await queries.group(connection, bench.keys, "last")).goals] == [None]

    monitor, watch = Monitor(redis_url, namespace=namespace), Watch()
    await monitor._look(connection, watch, {"last"}, everything=False)
    assert await monitor._judge_due(connection, watch) == LOOK_S

    bench.run(transitions.met(bench.keys, "last", "first", "completed"))
    (goal,) = (await queries.group(connection, bench.keys, "last")).goals
    assert (goal.deadline_ms or 0) > await queries.server_ms(connection, bench.keys)


async def test_a_failed_goal_is_a_warning_that_tells_why(
    bench: Bench, redis_url: str, namespace: str, said: list[str]
) -> None:
    async with watching(redis_url, namespace, said):
        bench.queued("g", ["a", "b"], goal=Goal("completed >= 2", failure_message="Pity."))
        finish_all(bench, "failed", 1)
        await until_said(said, "Goal")

    assert about(said, "Goal") == [
        'WARNING: Goal failed: goal of "g" (0 of 2 completed, 2 needed, 1 failed; it can no longer hold). Pity.\n'
    ]


async def test_two_monitors_at_once_each_say_a_goal_once_and_it_is_settled_once(
    bench: Bench, redis_url: str, namespace: str, said: list[str]
) -> None:
    checks = registry(enough=lambda view: view.counters.completed >= 1)
    async with (
        watching(redis_url, namespace, said, registry=checks),
        watching(redis_url, namespace, said, registry=checks),
    ):
        bench.queued("g", ["a", "b", "c"], goal=["completed >= 2", Goal(call="enough")])
        finish_all(bench)
        await until_said(said, "finished", 2)

    assert [len(about(said, f"Goal achieved: {goal} of")) for goal in ("goal", "goal2")] == [2, 2]
    connection = Connection(redis_url)
    events = await queries.events(connection, bench.keys, "g", 1)
    await connection.close()
    assert sorted(goal for event in events for goal in event.goals) == [("goal", "achieved"), ("goal2", "achieved")]


async def test_a_monitor_that_takes_over_says_what_settles_from_then_on_and_nothing_again(
    bench: Bench, redis_url: str, namespace: str, said: list[str]
) -> None:
    bench.queued("g", ["a", "b", "c"], goal=["completed >= 1", "completed >= 3"])
    first = Monitor(redis_url, namespace=namespace)
    running = asyncio.create_task(first.run())
    await until_said(said, first.name)
    finish_all(bench, count=1)
    await until_said(said, "Goal achieved: goal of")
    running.cancel()  # killed: no farewell
    await asyncio.gather(running, return_exceptions=True)
    assert bench.redis.smembers(bench.keys.workers) == {first.name}

    async with watching(redis_url, namespace, said):
        finish_all(bench)
        await until_said(said, "finished")

    assert len(about(said, "Goal achieved: goal of")) == 1
    assert len(about(said, "Goal achieved: goal2 of")) == 1
    # The new one has read the past too: its statistics are those of the whole group.
    assert "3 completed" in about(said, "finished")[0]


async def test_what_a_monitor_did_not_hear_of_it_finds_by_looking(
    bench: Bench, redis_url: str, namespace: str, said: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("rq_ceylon.monitor.LOOK_S", 0.05)
    monkeypatch.setattr("rq_ceylon.store.events.EventHub._dispatch", lambda self, message: None)
    async with watching(redis_url, namespace, said):
        for number, gid in enumerate("ghi", 1):  # it looks twice as it starts; the last is not found so
            bench.queued(gid, goal="completed >= 1")
            finish_all(bench)
            await until_said(said, "finished", number)

    assert len(about(said, "Goal achieved")) == 3


async def test_it_forgets_groups_that_are_gone_and_knows_a_new_one_of_the_same_id(
    bench: Bench, redis_url: str, namespace: str, said: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    # With it: a look at the group that began before it is removed would enter it in the index again.
    without_maintenance(monkeypatch)
    monkeypatch.setattr("rq_ceylon.monitor.LOOK_S", 0.05)
    async with watching(redis_url, namespace, said) as monitor:
        for _ in range(2):
            bench.queued("g", goal="completed >= 1")
            finish_all(bench)
            await eventually(lambda: monitor._groups.get("g") and monitor._groups["g"].finished, "it knows the end")
            bench.redis.delete(*bench.keys.group("g"))
            bench.run(transitions.drop_from_index(bench.keys, "g"))
            await eventually(lambda: "g" not in monitor._groups, "it has forgotten the group")

    assert len(about(said, "Goal achieved")) == 2


async def test_a_group_that_was_submitted_again_between_two_looks_is_a_new_one(
    bench: Bench, redis_url: str, namespace: str, said: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    without_maintenance(monkeypatch)
    async with watching(redis_url, namespace, said):
        channel = bench.keys.events_channel("nobody")
        await eventually(lambda: bench.redis.publish(channel, 1) == 1, "it is subscribed")
        for number in (1, 2):
            bench.redis.delete(*bench.keys.group("g"))
            bench.queued("g", goal="completed >= 1")
            finish_all(bench)
            await until_said(said, "finished as completed", number)

    assert len(about(said, "Goal achieved")) == 2


# ---- deadlines -------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("goal", "status"),
    [
        (Goal("completed >= 1", deadline=0.05, on_failed="cancel"), "finished"),
        (Goal(call="ask", on_achieved="cancel"), "active"),
    ],
    ids=["deadline", "callable"],
)
async def test_a_verdict_that_ends_a_group_tells_those_that_wait_for_it(
    bench: Bench,
    redis_url: str,
    namespace: str,
    said: list[str],
    monkeypatch: pytest.MonkeyPatch,
    goal: Goal,
    status: str,
) -> None:
    without_maintenance(monkeypatch)
    bench.queued("first", goal=goal)
    bench.submit("last", depends_on=["first"])
    bench.run(transitions.register(bench.keys, "first", "last"))
    async with watching(redis_url, namespace, said, registry=registry(ask=lambda _: True)):
        await eventually(lambda: bench.meta("last")["status"] == status, "the other is told")
        await eventually(
            lambda: not bench.redis.exists(bench.keys.group_part("first", "outbox")), "nothing is left to tell"
        )


@pytest.mark.parametrize(
    "goal", [Goal("completed >= 1", deadline=0.05), Goal(call="ask")], ids=["deadline", "callable"]
)
async def test_a_verdict_that_redis_refuses_is_said_once_and_holds_up_no_other(
    bench: Bench, redis_url: str, namespace: str, said: list[str], monkeypatch: pytest.MonkeyPatch, goal: Goal
) -> None:
    asked: list[str] = []

    async def refusing(connection: Connection, keys: Keys, gid: str, **verdict: Any) -> Any:
        asked.append(gid)
        if gid == "bad":
            raise RedisError("no permission")
        return await judge(connection, keys, gid, **verdict)

    without_maintenance(monkeypatch)
    monkeypatch.setattr("rq_ceylon.monitor.LOOK_S", 0.02)
    monkeypatch.setattr("rq_ceylon.monitor.judge", refusing)
    async with watching(redis_url, namespace, said, registry=registry(ask=lambda _: True)):
        bench.queued("bad", goal=goal)
        await eventually(lambda: len(asked) > 2, "it is asked again")
        bench.queued("good", goal=goal)
        await eventually(lambda: bench.meta("good")["goals"] == "", "the other is settled")

    assert len(about(said, "no permission")) == 1


async def test_a_deadline_is_judged_on_time(
    bench: Bench, redis_url: str, namespace: str, said: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    without_maintenance(monkeypatch)
    async with watching(redis_url, namespace, said):
        bench.queued("g", ["a"], goal=Goal("completed >= 1", deadline="250ms"))
        started = int(bench.meta("g")["created"])
        await until_said(said, "Goal")

    assert "(0 of 1 completed, 1 needed; its deadline has passed)" in about(said, "Goal")[0]
    settled = int(bench.meta("g")["goal:goal"].split("|")[1])
    assert 250 <= settled - started < 1000 * LOOK_S / 2  # a look would have found it later


async def test_a_deadline_of_a_group_that_was_there_before_is_kept_too(
    bench: Bench, redis_url: str, namespace: str, said: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    without_maintenance(monkeypatch)
    bench.queued("g", ["a"], goal=Goal("completed >= 1", deadline="200ms", on_failed="cancel"))
    async with watching(redis_url, namespace, said):
        await until_said(said, "finished")

    assert goal_of(bench, "g") == "failed by deadline"


# ---- callables -------------------------------------------------------------------------------------------------------
async def test_a_callable_goal_is_achieved_as_soon_as_its_callable_says_so(
    bench: Bench, redis_url: str, namespace: str, said: list[str]
) -> None:
    loop_thread = threading.get_ident()
    threads: dict[str, int] = {}
    loops: set[asyncio.AbstractEventLoop] = set()

    def plain(view: GroupView) -> bool:
        threads["plain"] = threading.get_ident()
        return view.counters.completed >= 2

    async def on_loop(view: GroupView) -> bool | None:
        loops.add(asyncio.get_running_loop())
        threads["on_loop"] = threading.get_ident()
        return view.counters.completed >= 2 or None

    async with watching(redis_url, namespace, said, registry=registry(plain=plain, on_loop=on_loop)):
        bench.queued("g", ["a", "b", "c"], goal=[Goal(call="plain", name="x"), Goal(call="on_loop", name="y")])
        finish_all(bench, count=1)
        await eventually(lambda: len(threads) == 2, "both are asked")
        assert goal_of(bench, "g", "x") == goal_of(bench, "g", "y") == ""
        finish_all(bench, count=1)
        await until_said(said, "Goal achieved", 2)

    assert goal_of(bench, "g", "x") == goal_of(bench, "g", "y") == "achieved by callable"
    assert loop_thread not in threads.values()
    assert len(loops) == 1  # the same each time, so that what it keeps for its loop stays usable


async def test_a_callable_goal_has_failed_when_all_tasks_ended_without_it(
    bench: Bench, redis_url: str, namespace: str, said: list[str]
) -> None:
    async with watching(redis_url, namespace, said, registry=registry(never=lambda view: False)):
        bench.queued("g", ["a", "b"], goal=Goal(call="never"))
        finish_all(bench)
        await until_said(said, "finished")

    assert goal_of(bench, "g") == "failed by callable"
    assert about(said, "Goal") == ['WARNING: Goal failed: goal of "g" (2 of 2 completed; call: never).\n']
    assert bench.meta("g")["outcome"] == "failed"


async def test_a_callable_that_raises_is_logged_once_and_decides_nothing(
    bench: Bench, redis_url: str, namespace: str, said: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("rq_ceylon.monitor.LOOK_S", 0.05)
    calls: list[GroupView] = []

    def broken_check(view: GroupView) -> bool:
        calls.append(view)
        if len(calls) < 5:
            raise ZeroDivisionError("of the user")
        return True

    async with watching(redis_url, namespace, said, registry=registry(broken=broken_check)):
        bench.queued("g", goal=Goal(call="broken", name="odd"))
        finish_all(bench)
        await until_said(said, "finished")

    assert goal_of(bench, "g", "odd") == "achieved by callable"
    (line,) = about(said, "ZeroDivisionError")
    assert line.startswith('ERROR: Goal odd of "g"')
    assert "in broken_check" in line


@pytest.mark.parametrize("kind", ["plain", "async", "async that blocks its loop"])
async def test_a_callable_that_hangs_is_said_once_and_holds_up_nothing_else(
    kind: str, bench: Bench, redis_url: str, namespace: str, said: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("rq_ceylon.monitor.LOOK_S", 0.05)
    monkeypatch.setattr("rq_ceylon.monitor.CHECK_S", 0.2)
    monkeypatch.setattr("rq_ceylon.checks.CHECK_S", 0.2)
    let_go, asked = threading.Event(), []

    def plain(view: GroupView) -> bool:
        asked.append(view.id)
        return let_go.wait(LIMIT_S)

    async def waiting(view: GroupView) -> bool:
        asked.append(view.id)
        while not let_go.is_set():
            with contextlib.suppress(asyncio.CancelledError):
                await asyncio.sleep(0.01)
        return True

    async def blocking(view: GroupView) -> bool:
        return plain(view)

    kinds: dict[str, GoalCheck] = {"plain": plain, "async": waiting, "async that blocks its loop": blocking}
    made = registry(hang=kinds[kind], fine=lambda view: view.counters.completed >= 1)
    async with watching(redis_url, namespace, said, registry=made):
        bench.queued("g", goal=Goal(call="hang"))
        await until_said(said, "hang has not answered for 0.2 s")
        goals = [Goal("completed >= 2", deadline="100ms", name="late"), Goal(call="fine", name="fine")]
        bench.queued("h", ["a", "b"], goal=goals)
        finish_all(bench, count=2)  # one of each
        await until_said(said, "Goal failed")
        await until_said(said, "Goal achieved: fine")
        assert asked == ["g"]

        let_go.set()
        await until_said(said, "Goal achieved: goal")

    assert len(about(said, "has not answered")) == 1
    assert asked == ["g", "g"]  # the first answer came too late


async def test_a_monitor_ends_at_once_though_a_callable_hangs(
    bench: Bench, redis_url: str, namespace: str, said: list[str]
) -> None:
    let_go, asked = threading.Event(), threading.Event()

    def hang(view: GroupView) -> bool:
        asked.set()
        return let_go.wait(600)

    async with asyncio.timeout(LIMIT_S):
        async with watching(redis_url, namespace, said, registry=registry(hang=hang)):
            bench.queued("g", goal=Goal(call="hang"))
            await eventually(asked.is_set, "it is asked")
    let_go.set()


async def test_a_callable_that_exits_has_failed_like_one_that_raises(
    bench: Bench, redis_url: str, namespace: str, said: list[str]
) -> None:
    def plain(view: GroupView) -> bool:
        sys.exit("of plain")

    async def on_loop(view: GroupView) -> bool:
        sys.exit("of on_loop")

    async def below(view: GroupView) -> bool:
        await asyncio.gather(on_loop(view))
        return True

    def fine(view: GroupView) -> bool:
        return view.counters.completed >= 1

    made = registry(plain=plain, on_loop=on_loop, below=below, fine=fine)
    async with watching(redis_url, namespace, said, registry=made):
        bench.queued("g", goal=[Goal(call=name, name=name) for name in made.goal_checks])
        await until_said(said, "its callable failed", 3)
        bench.queued("h", goal=Goal(call="fine", name="after"))
        finish_all(bench)
        await until_said(said, "Goal achieved: after")

    assert sorted(line.split()[2] for line in about(said, "its callable failed")) == ["below", "on_loop", "plain"]


async def test_a_callable_that_stops_its_loop_is_answered_and_asked_again(
    bench: Bench, redis_url: str, namespace: str, said: list[str]
) -> None:
    async def stops(view: GroupView) -> bool:
        asyncio.get_running_loop().stop()
        await asyncio.sleep(0)
        return True

    async with watching(redis_url, namespace, said, registry=registry(stops=stops)):
        for name in ("first", "second"):
            bench.queued(name, goal=Goal(call="stops", name=name))
            await until_said(said, f"Goal achieved: {name}")


async def test_a_callable_that_this_monitor_does_not_know_is_left_to_others(
    bench: Bench, redis_url: str, namespace: str, said: list[str]
) -> None:
    async with watching(redis_url, namespace, said):
        for gid in ("g", "h"):
            bench.queued(gid, goal=Goal(call="elsewhere"))
            finish_all(bench)
        await until_said(said, "elsewhere")
        assert [bench.meta(gid)["status"] for gid in "gh"] == ["closing", "closing"]
        async with watching(redis_url, namespace, said, registry=registry(elsewhere=lambda view: True)):
            await until_said(said, "finished", 4)

    assert len(about(said, "does not know")) == 1


# ---- Redis going away ------------------------------------------------------------------------------------------------
async def test_after_a_restart_of_the_server_it_goes_on_and_says_so_once(
    start_server: Callable[..., EmbeddedServer],
    short_tmp_path: Path,
    namespace: str,
    said: list[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("rq_ceylon.monitor.LOOK_S", 0.2)
    server = start_server(folder=short_tmp_path, appendonly=True)
    bench = Bench(server.url, namespace)
    async with watching(server.url, namespace, said):
        bench.queued("g", ["a", "b"], goal=["completed >= 1", Goal("completed >= 2", name="both", deadline="1h")])
        finish_all(bench, count=1)
        await until_said(said, "Goal achieved: goal of")

        await asyncio.to_thread(server.stop)
        await until_said(said, "trying again")
        server = await asyncio.to_thread(start_server, folder=short_tmp_path, appendonly=True)
        finish_all(bench)
        await until_said(said, "finished")

    assert len(about(said, "trying again")) == len(about(said, "answers again")) == 1
    assert len(about(said, "Goal achieved: goal of")) == len(about(said, "Goal achieved: both of")) == 1


async def test_it_can_be_stopped_while_redis_is_away(
    start_server: Callable[..., EmbeddedServer], namespace: str, said: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("rq_ceylon.monitor.LOOK_S", 0.2)
    monkeypatch.setattr("rq_ceylon.store.events.LOOK_S", 0.2)
    server = start_server()
    monitor = Monitor(server.url, namespace=namespace)
    running = asyncio.create_task(monitor.run())
    await until_said(said, monitor.name)
    await asyncio.to_thread(server.stop)
    await until_said(said, "trying again")

    monitor.stop()
    monitor.stop()
    await asyncio.wait_for(running, 5)
    assert about(said, "Ended without removing its heartbeat")


# ---- registry, samples -----------------------------------------------------------------------------------------------
async def test_it_is_in_the_registry_while_it_runs(
    bench: Bench, redis_url: str, namespace: str, said: list[str]
) -> None:
    connection = Connection(redis_url)
    async with watching(redis_url, namespace, said) as monitor:
        await eventually(lambda: bench.redis.exists(bench.keys.worker(monitor.name)), "it is registered")
        (view,) = await queries.workers(connection, bench.keys)
        assert (view.name, view.kind, view.slots) == (monitor.name, "monitor", 0)
    assert await queries.workers(connection, bench.keys) == []
    assert not bench.redis.exists(bench.keys.workers)
    await connection.close()


async def test_totals_of_roles_are_sampled_per_minute_and_kept_for_a_day(
    bench: Bench, redis_url: str, namespace: str, said: list[str]
) -> None:
    bench.queued("g")
    delivery = bench.started("w", "g")
    bench.commit("w", delivery)
    bench.fetch("w", 0, acks=[delivery.entry])
    samples = bench.keys.role_part("p", "samples")
    minute = int(bench.redis.time()[0]) // 60
    for old in (minute - 2879, minute - 1440, minute - 1438):
        bench.redis.hset(samples, old, "{}")

    async with watching(redis_url, namespace, said):
        await eventually(lambda: bench.redis.hlen(samples) == 2, "two samples are kept")

    fields = bench.redis.hgetall(samples)
    newest = max(map(int, fields))
    assert set(fields) == {str(minute - 1438), str(newest)}
    assert newest - minute in (0, 1)
    assert '"totals":{"completed":1}' in fields[str(newest)]
    assert 0 < bench.redis.ttl(samples) <= 24 * 3600


# ---- statistics ------------------------------------------------------------------------------------------------------
async def test_statistics_equal_a_naive_recount(bench: Bench, redis_url: str, namespace: str, said: list[str]) -> None:
    for gid, role in (("g", "p"), ("h", "q")):
        bench.queued(gid, [str(number) for number in range(40)], role=role)
    kinds = ["completed", "completed", "failed", "retry"]
    for number, delivery in enumerate(bench.fetch("w", 100)):
        assert bench.claim("w", delivery) == ["GRANTED"]
        assert bench.commit("w", delivery, kinds[number % 4]) == "OK"
    bench.run(transitions.cancel_tasks(bench.keys, "g", [str(number) for number in range(40)]))
    connection = Connection(redis_url)
    events = await queries.events(connection, bench.keys, "g", 1)
    await connection.close()

    found = GroupStatistics()
    found.add(events)

    recount = Counter(task.outcome for event in events for task in event.tasks)
    mine = found.roles["p"]
    assert set(found.roles) == {"p"}
    assert mine.retries == recount.pop("retry") > 0
    assert mine.outcomes == recount == {"completed": 20, "failed": 10, "cancelled": 10}
    runs = [task.run_ms for event in events for task in event.tasks if task.outcome in ("completed", "failed")]
    assert (mine.run.count, mine.run.mean_ms) == (len(runs), sum(runs) / len(runs))
    assert found.seconds == (events[-1].at_ms - events[0].at_ms) / 1000


def test_a_histogram_of_equal_times_tells_that_time_exactly() -> None:
    histogram = Histogram()
    for _ in range(10):
        histogram.add(1001)

    assert str(histogram) == "mean 1001 ms, p50 1001, p95 1001, p99 1001"
    assert Histogram().percentile_ms(0.5) == Histogram().mean_ms == 0.0


@pytest.mark.parametrize("spread", ["even", "exponential", "wide", "two peaks", "short"])
def test_percentiles_are_right_within_one_hundredth_whatever_the_times(spread: str) -> None:
    dice = random.Random(spread)
    draw: dict[str, Callable[[], float]] = {
        "even": lambda: dice.uniform(0, 5000),
        "exponential": lambda: dice.expovariate(1 / 700),
        "wide": lambda: 10 ** dice.uniform(0, 8),  # 1 ms to 28 h
        "two peaks": lambda: dice.gauss(20, 2) if dice.random() < 0.9 else dice.gauss(60_000, 5_000),
        "short": lambda: dice.uniform(0, 60),
    }
    times = [max(0, round(draw[spread]())) for _ in range(3000)]
    found = GroupStatistics()
    found.add([Event(1, 0, "commit", [TaskEvent("t", "completed", "p", ms, ms) for ms in times], [], "")])
    histogram = found.roles["p"].run

    for share in (0.001, 0.01, 0.1, 0.25, 0.5, 0.75, 0.9, 0.95, 0.99, 0.999, 1):
        exact = sorted(times)[max(0, math.ceil(round(share * len(times), 6)) - 1)]
        assert abs(histogram.percentile_ms(share) - exact) <= 0.01 * exact, share
    assert histogram.mean_ms == sum(times) / len(times)
