"""Maintenance: what was left lying is handed over, judged, sealed and removed, by anyone, as often as they like."""

import asyncio
from types import SimpleNamespace
from typing import Any

import pytest
from bench import Bench

from rq_ceylon.maintenance import reissue, steps
from rq_ceylon.maintenance.relay import PAGES_PER_CALL, relay
from rq_ceylon.maintenance.steps import MOVING_MS, STILL_MS, Maintenance, drop
from rq_ceylon.models import Durability, Goal
from rq_ceylon.store import queries, transitions
from rq_ceylon.store.connection import Connection
from rq_ceylon.store.keys import Keys

pytestmark = [pytest.mark.anyio, pytest.mark.every_engine]

HOUR_MS = 3_600_000

FACTS: dict[str, Any] = {
    "kind": "worker",
    "host": "h",
    "pid": 1,
    "version": "0",
    "roles": ["p"],
    "slots": 1,
    "task_names": [],
    "tasks": {},
    "started_ms": 0,
    "stopping": False,
}


@pytest.fixture
def maintenance(connection: Connection, bench: Bench) -> Maintenance:
    return Maintenance(connection, bench.keys)


def make_visible(bench: Bench, gid: str) -> None:
    """Let the relay lease of all pages be over."""
    key = bench.keys.group_part(gid, "outbox")
    for page in bench.redis.zrange(key, 0, -1):
        bench.redis.zadd(key, {page: 1})


def next_look_ms(bench: Bench, gid: str) -> float | None:
    """From now, by the server's clock; None if the group is not in the index."""
    score = bench.redis.zscore(bench.keys.index_of(gid), gid)
    return None if score is None else score - server_ms(bench)


def server_ms(bench: Bench) -> int:
    seconds, micros = bench.redis.time()
    return int(seconds) * 1000 + int(micros) // 1000


def make_due(bench: Bench, gid: str) -> None:
    bench.redis.zadd(bench.keys.index_of(gid), {gid: 1})


def age(bench: Bench, gid: str, field: str, ms: int) -> None:
    key = bench.keys.group_part(gid, "meta")
    bench.redis.hset(key, field, int(bench.redis.hget(key, field)) - ms)


def queued_tasks(bench: Bench) -> list[str]:
    entries = bench.redis.xrange(bench.keys.role_part("p", "normal"))
    return [fields["task"].split(" ")[1] for _, fields in entries]


# ---- relay -----------------------------------------------------------------------------------------------------------
async def test_an_enqueue_that_was_lost_is_relayed_after_the_relay_lease_and_not_before(
    bench: Bench, maintenance: Maintenance
) -> None:
    bench.submit("g", ["a", "b"])  # and its client is gone

    assert await maintenance.run_once() <= MOVING_MS / 1000
    assert queued_tasks(bench) == []

    make_visible(bench, "g")
    make_due(bench, "g")
    await maintenance.run_once()
    assert queued_tasks(bench) == ["a", "b"]
    assert not bench.redis.exists(bench.keys.group_part("g", "outbox"))
    assert bench.commit("w", bench.started("w", "g")) == "OK"


async def test_more_pages_than_one_call_takes_are_relayed_in_one_look(bench: Bench, maintenance: Maintenance) -> None:
    parts = PAGES_PER_CALL + 5
    for part in range(1, parts + 1):
        bench.submit("g", [f"t{part}"], part=part, last=part == parts)
    make_visible(bench, "g")

    await maintenance.run_once()

    assert sorted(queued_tasks(bench)) == sorted(f"t{part}" for part in range(1, parts + 1))


async def test_asking_an_outbox_again_ends_though_others_write_to_it_all_the_while(
    bench: Bench, connection: Connection, monkeypatch: pytest.MonkeyPatch
) -> None:
    bench.queued("g")
    outbox, run, written = bench.keys.group_part("g", "outbox"), connection.run, list[str]()

    async def busy(calls: Any, **options: Any) -> Any:
        written.append(f"{len(written) + 100}|p||2,a,1")
        bench.redis.zadd(outbox, {written[-1]: server_ms(bench) + 10_000})  # it is with a worker that lives
        return await run(calls, **options)

    monkeypatch.setattr(connection, "run", busy)
    async with asyncio.timeout(10):
        await relay(connection, bench.keys, "g", hidden=True)
    assert len(written) <= 4


async def test_two_maintainers_at_once_lose_nothing_and_every_task_runs_once(
    bench: Bench, maintenance: Maintenance, redis_url: str
) -> None:
    gids = [f"g{number}" for number in range(30)]
    for gid in gids:
        bench.submit(gid, ["a", "b"])
        make_visible(bench, gid)
    other = Connection(redis_url)

    await asyncio.gather(maintenance.run_once(), Maintenance(other, bench.keys).run_once())

    await other.close()
    deliveries = bench.fetch("w", 1000)
    granted = [d for d in deliveries if bench.claim("w", d) == ["GRANTED"]]
    assert {(d.gid, d.tid) for d in granted} == {(gid, tid) for gid in gids for tid in "ab"}
    for delivery in granted:
        assert bench.commit("w", delivery) == "OK"
    assert all(bench.counters(gid) == {"total": 2, "completed": 2} for gid in gids)


async def test_a_group_where_nothing_moves_is_looked_at_once_a_minute(bench: Bench, maintenance: Maintenance) -> None:
    bench.queued("g")

    assert await maintenance.run_once() == MOVING_MS / 1000  # new groups are seen in time

    assert MOVING_MS < (next_look_ms(bench, "g") or 0) <= STILL_MS


async def test_groups_that_cannot_be_looked_after_do_not_stop_the_others(
    bench: Bench, maintenance: Maintenance, said: list[str]
) -> None:
    gids = [f"g{number}" for number in range(20)]
    for gid in gids:
        bench.submit(gid)
        make_visible(bench, gid)
    bench.redis.hset(bench.keys.group_part("g3", "meta"), "v", "99")

    await maintenance.run_once()

    assert len(queued_tasks(bench)) == len(gids) - 1
    (line,) = [text for text in said if "cannot be looked after" in text]
    assert "Group g3 " in line
    assert (next_look_ms(bench, "g3") or 0) > MOVING_MS


async def test_at_the_memory_limit_pages_are_relayed_and_nobody_spins(start_server: Any, namespace: str) -> None:
    url = start_server().url
    bench = Bench(url, namespace)
    bench.submit("g", ["a"])
    make_visible(bench, "g")
    connection = Connection(url)
    bench.redis.config_set("maxmemory", 1)

    pause_s = await Maintenance(connection, bench.keys).run_once()

    await connection.close()
    assert queued_tasks(bench) == ["a"]
    assert pause_s > 5
    assert (next_look_ms(bench, "g") or 0) > 0


# ---- judge -----------------------------------------------------------------------------------------------------------
async def test_a_deadline_is_judged_with_no_worker_about_and_the_next_step_is_not_later(
    bench: Bench, maintenance: Maintenance
) -> None:
    bench.queued("g", ["a", "b"], goal=Goal("completed >= 1", deadline="300ms", on_failed="cancel"))

    pause_s = await maintenance.run_once()
    assert pause_s <= 0.3
    assert bench.meta("g")["status"] == "active"

    async with asyncio.timeout(5):
        while bench.meta("g")["status"] != "finished":
            await asyncio.sleep(min(pause_s, 0.1))
            pause_s = await maintenance.run_once()
    meta = bench.meta("g")
    assert meta["goal:goal"].startswith("failed|")
    assert "|deadline|" in meta["goal:goal"]
    assert (meta["outcome"], meta["cancelled"]) == ("failed", "2")


# ---- seal, prune -----------------------------------------------------------------------------------------------------
async def test_a_rolling_group_whose_client_fell_silent_is_sealed_and_finishes(
    bench: Bench, maintenance: Maintenance
) -> None:
    bench.queued("silent", rolling=True, last=False)
    bench.queued("busy", rolling=True, last=False)
    for _ in range(2):
        delivery = bench.fetch("w", 1)[0]
        assert bench.claim("w", delivery) == ["GRANTED"]
        assert bench.commit("w", delivery) == "OK"
    age(bench, "silent", "touched", 91_000)

    await maintenance.run_once()

    assert bench.meta("silent")["status"] == "finished"
    assert (bench.meta("busy")["status"], bench.meta("busy")["open"]) == ("active", "1")
    assert (next_look_ms(bench, "silent") or 0) > 23 * HOUR_MS


async def test_a_finished_group_is_removed_whole_when_its_retention_ends(
    bench: Bench, maintenance: Maintenance
) -> None:
    bench.queued("g")
    bench.commit("w", bench.started("w", "g"))

    await maintenance.run_once()
    assert 23 * HOUR_MS < (next_look_ms(bench, "g") or 0) <= 24 * HOUR_MS

    age(bench, "g", "finished", 24 * HOUR_MS)
    make_due(bench, "g")
    await maintenance.run_once()
    assert next_look_ms(bench, "g") is None
    assert bench.redis.keys(bench.keys.group_part("g", "*")) == []


async def test_what_was_staged_and_never_completed_is_removed_after_an_hour(
    bench: Bench, maintenance: Maintenance
) -> None:
    bench.submit("g", ["a"], last=False)

    await maintenance.run_once()
    assert bench.meta("g")["status"] == "staging"
    # Its last part may come at any moment, with pages and deadlines.
    assert (next_look_ms(bench, "g") or 0) <= MOVING_MS

    age(bench, "g", "touched", HOUR_MS)
    make_due(bench, "g")
    await maintenance.run_once()
    assert next_look_ms(bench, "g") is None
    assert bench.redis.keys(bench.keys.group_part("g", "*")) == []


@pytest.mark.parametrize("durability", ["none", "replica"])
async def test_a_group_that_is_gone_leaves_the_index_unless_about_to_be_written(
    bench: Bench, maintenance: Maintenance, durability: Durability
) -> None:
    for call in transitions.announce(bench.keys, "g", ["p"], durability=durability):
        bench.run(call)

    await maintenance.run_once()
    assert next_look_ms(bench, "g") is not None

    make_due(bench, "g")
    await maintenance.run_once()
    assert next_look_ms(bench, "g") is None


async def test_a_group_that_was_submitted_again_while_it_was_dropped_stays_in_the_index(
    bench: Bench, connection: Connection
) -> None:
    bench.queued("again")
    bench.submit("gone")
    bench.redis.delete(*bench.keys.group("gone"))
    for gid in ("again", "gone"):
        await drop(connection, bench.keys, gid)
    assert next_look_ms(bench, "again") is not None
    assert next_look_ms(bench, "gone") is None


async def test_two_looks_at_once_do_not_drop_a_group_about_to_be_written(
    bench: Bench, maintenance: Maintenance
) -> None:
    now_ms = server_ms(bench)
    for call in transitions.announce(bench.keys, "g", ["p"]):
        bench.run(call)

    await maintenance.run_once()
    assert await maintenance._look_after("g", now_ms) is None  # it read which groups are due before that

    assert next_look_ms(bench, "g") is not None


# ---- groups on groups ------------------------------------------------------------------------------------------------
async def test_a_group_that_waits_for_one_that_finished_unheard_is_started(
    bench: Bench, maintenance: Maintenance
) -> None:
    bench.queued("first")
    bench.submit("g", depends_on=["first"])  # and its client is gone before it registered
    await maintenance.run_once()
    assert bench.meta("g")["status"] == "waiting"
    assert (next_look_ms(bench, "g") or 0) <= MOVING_MS

    delivery = bench.started("w", "first")
    bench.commit_with_pages("w", delivery)  # and the worker that got the message is gone
    make_due(bench, "g")
    await maintenance.run_once()

    assert bench.meta("g")["status"] == "active"
    assert queued_tasks(bench) == ["a", "a"]


async def test_a_group_that_maintenance_starts_is_looked_at_at_its_deadline(
    bench: Bench, maintenance: Maintenance
) -> None:
    bench.queued("first")
    bench.submit("g", depends_on=["first"], goal=Goal("completed >= 1", deadline="2s"))
    bench.commit_with_pages("w", bench.started("w", "first"))

    await maintenance.run_once()

    assert bench.meta("g")["status"] == "active"
    assert 0 < (next_look_ms(bench, "g") or 0) <= 2000


async def test_a_finished_group_is_looked_at_soon_while_its_message_is_hidden(
    bench: Bench, maintenance: Maintenance
) -> None:
    bench.queued("first")
    bench.run(transitions.register(bench.keys, "first", "g"))
    bench.commit_with_pages("w", bench.started("w", "first"))

    await maintenance.run_once()
    assert (next_look_ms(bench, "first") or 0) <= MOVING_MS

    make_visible(bench, "first")
    for _ in range(2):
        make_due(bench, "first")
        await maintenance.run_once()
    assert (next_look_ms(bench, "first") or 0) > 23 * HOUR_MS
    assert not bench.redis.exists(bench.keys.group_part("first", "outbox"))


async def test_a_group_goes_on_at_once_though_whoever_told_it_first_went_no_further(
    bench: Bench, connection: Connection
) -> None:
    bench.queued("first")
    bench.submit("last", depends_on=["first"])
    bench.run(transitions.register(bench.keys, "first", "last"))
    bench.commit_with_pages("w", bench.started("w", "first"))
    bench.run(transitions.met(bench.keys, "last", "first", "completed"))

    make_visible(bench, "first")
    await relay(connection, bench.keys, "first")

    assert queued_tasks(bench) == ["a", "a"]
    assert not bench.redis.exists(bench.keys.group_part("last", "outbox"))


async def test_a_chain_of_a_thousand_groups_ends_with_its_first(bench: Bench, connection: Connection) -> None:
    gids = [f"g{number}" for number in range(1000)]
    for before, gid in zip([None, *gids], gids, strict=False):
        bench.submit(gid, depends_on=[before] if before else [])
        if before:
            bench.run(transitions.register(bench.keys, before, gid))
    bench.run(transitions.cancel_group(bench.keys, gids[0]))

    await relay(connection, bench.keys, gids[0])

    assert bench.meta(gids[-1])["outcome"] == "cancelled"


async def test_whoever_settles_the_goal_that_ends_a_group_tells_those_that_wait_for_it(
    bench: Bench, connection: Connection
) -> None:
    bench.queued("first", goal=Goal(call="f", on_failed="drain"))
    bench.submit("last", depends_on=["first"])
    bench.run(transitions.register(bench.keys, "first", "last"))

    await steps.judge(connection, bench.keys, "first", goal="goal", verdict="failed")

    assert bench.meta("last")["reason"] == "group first it depends on is failed"
    assert not bench.redis.exists(bench.keys.group_part("first", "outbox"))


async def test_a_group_that_finishes_while_it_is_looked_at_tells_those_that_wait_for_it(
    bench: Bench, maintenance: Maintenance, monkeypatch: pytest.MonkeyPatch
) -> None:
    bench.queued("first")
    bench.run(transitions.register(bench.keys, "first", "g"))
    delivery, shipped = bench.started("w", "first"), steps.seal

    async def seal(connection: Connection, keys: Keys, gid: str) -> str | None:
        bench.commit_with_pages("w", delivery)  # and the worker that got the message is gone
        return await shipped(connection, keys, gid)

    with monkeypatch.context() as patch:
        patch.setattr(steps, "seal", seal)
        await maintenance.run_once()

    assert bench.meta("first")["status"] == "finished"
    assert (next_look_ms(bench, "first") or 0) <= MOVING_MS


async def test_a_group_that_waits_for_one_that_is_gone_is_cancelled(bench: Bench, maintenance: Maintenance) -> None:
    bench.submit("g", depends_on=["nobody"])

    await maintenance.run_once()

    assert (bench.meta("g")["outcome"], bench.meta("g")["reason"]) == (
        "cancelled",
        "group nobody it depends on is gone",
    )


# ---- reissue ---------------------------------------------------------------------------------------------------------
def wipe(bench: Bench) -> None:
    bench.redis.delete(*bench.keys.role("p"))


def live(bench: Bench, worker: str, low_mark: int) -> None:
    facts = {**FACTS, "low_marks": {"p": low_mark}}
    for call in transitions.heartbeat(bench.keys, worker, facts, ttl_ms=60_000, roles=["p"]):
        bench.run(call)


async def test_a_role_wiped_in_redis_is_rung_again_once_with_retries_in_their_time(
    bench: Bench, maintenance: Maintenance
) -> None:
    bench.queued("g", ["a", "b", "c", "d"], needs={"d": ["a"]})
    delivery = bench.started("w", "g")
    bench.commit("w", delivery, "retry", delay_ms=60_000)
    wipe(bench)

    await maintenance.run_once()

    assert sorted(queued_tasks(bench)) == ["b", "c"]
    assert bench.redis.zcard(bench.keys.role_part("p", "delayed")) == 1
    for _ in range(3):
        make_due(bench, "g")
        await maintenance.run_once()
    assert bench.redis.xlen(bench.keys.role_part("p", "normal")) == 2


async def test_a_role_without_workers_does_not_grow_in_a_day_nor_after_it_was_wiped(
    bench: Bench, maintenance: Maintenance
) -> None:
    """A day of looks at both groups, one every quarter of an hour: the next one would add what the one before has."""
    bench.queued("g", [str(n) for n in range(250)])
    bench.queued("h", ["a", "b"])

    async def a_day_passes() -> None:
        for _ in range(24 * 4):
            for gid in ("g", "h"):
                make_due(bench, gid)
            await maintenance.run_once()

    def size() -> tuple[int, int, int]:
        outboxes = sum(bench.redis.zcard(bench.keys.group_part(gid, "outbox")) for gid in ("g", "h"))
        return bench.redis.xlen(bench.keys.role_part("p", "normal")), outboxes, bench.redis.dbsize()

    before = size()
    assert before[:2] == (252, 0)
    await a_day_passes()
    assert size()[:2] == before[:2]
    keys = bench.redis.dbsize()

    wipe(bench)
    await a_day_passes()
    assert size() == (252, 0, keys)
    assert sorted(queued_tasks(bench)) == sorted([*map(str, range(250)), "a", "b"])


async def test_the_entry_of_a_task_that_has_ended_hides_no_lost_one(bench: Bench, maintenance: Maintenance) -> None:
    bench.submit("g", ["ended"], part=1, last=False, digest="1", delay_ms=HOUR_MS)
    bench.submit("g", ["lost"], part=2, digest="2")
    bench.relay("g")
    bench.run(transitions.cancel_tasks(bench.keys, "g", ["ended"]))
    bench.redis.delete(bench.keys.role_part("p", "normal"))

    await maintenance.run_once()

    assert queued_tasks(bench) == ["lost"]


async def test_what_is_delayed_holds_up_nothing_that_its_role_has_lost_and_is_due(
    bench: Bench, maintenance: Maintenance, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(transitions, "PROBE_ENTRIES", 100)
    bench.submit("g", [str(n) for n in range(150)], part=1, last=False, digest="1", delay_ms=HOUR_MS)
    bench.submit("g", ["lost"], part=2, digest="2")
    bench.relay("g")
    bench.redis.delete(bench.keys.role_part("p", "normal"))

    for _ in range(2):
        make_due(bench, "g")
        await maintenance.run_once()

    assert queued_tasks(bench) == ["lost"]
    assert bench.redis.zcard(bench.keys.role_part("p", "delayed")) == 150
    assert int(bench.meta("g")["pages"]) == 4


async def test_an_entry_lost_among_many_long_tasks_is_put_back_at_the_next_look(
    bench: Bench, maintenance: Maintenance, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(transitions, "PROBE_ENTRIES", 20)
    bench.queued("long", [str(n) for n in range(120)])
    for delivery in bench.fetch("w", 120):
        assert bench.claim("w", delivery) == ["GRANTED"]
    bench.queued("g")
    (delivery,) = bench.fetch("w", 1)
    stream = bench.keys.role_part("p", "normal")
    bench.redis.xack(stream, "workers", delivery.entry[2:])
    bench.redis.xdel(stream, delivery.entry[2:])
    make_due(bench, "g")
    await maintenance.run_once()
    assert [again.gid for again in bench.fetch("w")] == ["g"]


async def test_tasks_that_wait_by_name_are_not_lost(bench: Bench, maintenance: Maintenance) -> None:
    bench.queued("g", ["a", "b"])
    for delivery in bench.fetch("old"):
        bench.unknown("old", delivery)
    make_due(bench, "g")
    await maintenance.run_once()
    assert bench.fetch("old") == []
    assert len(bench.fetch("new", names=["name"])) == 2


async def test_a_running_task_whose_worker_lives_and_has_it_is_left_to_it(
    bench: Bench, maintenance: Maintenance
) -> None:
    bench.queued("g")
    delivery = bench.started("w", "g")
    wipe(bench)
    live(bench, "w", delivery.fence)

    await maintenance.run_once()

    assert queued_tasks(bench) == []
    assert bench.commit("w", delivery) == "OK"


async def test_a_running_task_that_its_worker_no_longer_has_is_rung_for_another(
    bench: Bench, maintenance: Maintenance
) -> None:
    bench.queued("g")
    delivery = bench.started("w", "g")
    wipe(bench)
    live(bench, "w", delivery.fence + 1)

    await maintenance.run_once()

    (again,) = bench.fetch("v")
    assert bench.claim("v", again) == ["GRANTED"]
    assert bench.commit("w", delivery) == "STALE"


async def test_what_a_vanished_worker_ran_is_made_again_or_cancelled_if_closed(
    bench: Bench, maintenance: Maintenance
) -> None:
    bench.queued("g", ["a", "b"])
    bench.queued("closed", goal=Goal("failed >= 1"))
    deliveries = bench.fetch("w", 3)
    for delivery in deliveries:
        assert bench.claim("w", delivery) == ["GRANTED"]
    bench.run(transitions.cancel_group(bench.keys, "closed"))
    assert bench.meta("closed")["status"] == "closing"
    bench.redis.delete(*(bench.keys.role_part("p", part) for part in ("high", "normal", "low")))

    await maintenance.run_once()
    assert queued_tasks(bench) == []
    assert bench.meta("closed")["status"] == "closing"

    async with asyncio.timeout(5):
        while bench.meta("closed")["status"] != "finished" or len(queued_tasks(bench)) < 2:
            await asyncio.sleep(0.05)
            for gid in ("g", "closed"):
                make_due(bench, gid)
            await maintenance.run_once()
    assert bench.counters("closed") == {"total": 1, "cancelled": 1}


async def test_a_worker_that_was_silent_and_came_back_has_a_whole_lease_again(
    bench: Bench, maintenance: Maintenance, monkeypatch: pytest.MonkeyPatch
) -> None:
    bench.queued("g")
    delivery = bench.started("w", "g")
    wipe(bench)
    for now, lives in ((0.0, False), (10.0, True), (60.0, False)):
        monkeypatch.setattr(reissue, "time", SimpleNamespace(monotonic=lambda now=now: now))
        bench.redis.delete(bench.keys.worker("w"))
        if lives:
            live(bench, "w", delivery.fence)
        make_due(bench, "g")
        await maintenance.run_once()
    assert queued_tasks(bench) == []


async def test_a_closed_group_finishes_though_page_and_worker_vanished(bench: Bench, maintenance: Maintenance) -> None:
    (page,) = bench.submit("g").pages
    bench.run(transitions.enqueue(bench.keys, "p", [page]))
    bench.started("w", "g")
    bench.run(transitions.cancel_group(bench.keys, "g"))
    async with asyncio.timeout(5):
        while bench.meta("g")["status"] != "finished":
            make_due(bench, "g")
            await maintenance.run_once()
            await asyncio.sleep(0.05)
    assert bench.counters("g") == {"total": 1, "cancelled": 1}


# ---- the index -------------------------------------------------------------------------------------------------------
async def test_groups_that_the_index_has_lost_come_back_within_the_hour(
    bench: Bench, maintenance: Maintenance, said: list[str]
) -> None:
    for gid in ("lost", "known", "gone"):
        bench.queued(gid)
    bench.redis.delete(*bench.keys.group("gone"))
    await maintenance.run_once()
    for gid in ("lost", "gone"):
        bench.redis.zrem(bench.keys.index_of(gid), gid)

    await Maintenance(maintenance._connection, bench.keys).run_once()
    assert next_look_ms(bench, "lost") is None  # somebody has looked within the hour
    assert 0 < bench.redis.pttl(bench.keys.thorough) <= HOUR_MS
    bench.redis.delete(bench.keys.thorough)
    await Maintenance(maintenance._connection, bench.keys).run_once()

    assert next_look_ms(bench, "lost") == pytest.approx(STILL_MS, abs=5000)
    assert next_look_ms(bench, "gone") is None
    assert said == ["WARNING: The index of groups had lost some; entered again: 1\n"]


# ---- delayed ---------------------------------------------------------------------------------------------------------
async def test_delayed_entries_of_tasks_that_are_over_go_within_the_hour_and_no_others(
    bench: Bench, connection: Connection, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(steps, "DELAYED_PER_STEP", 4)
    many = [str(n) for n in range(10)]
    for gid in ("cancelled", "gone", "open"):
        bench.queued(gid, many, delay_ms=24 * HOUR_MS)
    bench.queued("tried")
    bench.commit("w", bench.started("w", "tried"), "retry", delay_ms=HOUR_MS)
    bench.run(transitions.cancel_group(bench.keys, "cancelled"))
    bench.run(transitions.cancel_tasks(bench.keys, "open", ["3", "7"]))
    bench.redis.delete(*bench.keys.group("gone"))
    bench.redis.zadd(bench.keys.role_part("p", "delayed"), {"unreadable": 1e15})
    bench.redis.sadd(bench.keys.roles, "p")

    await Maintenance(connection, bench.keys).run_once()

    left = bench.redis.zrange(bench.keys.role_part("p", "delayed"), 0, -1)
    tasks = [("open", n) for n in many if n not in ("3", "7")] + [("tried", "a")]
    assert sorted(entry.split(" ")[1:3] for entry in left if entry != "unreadable") == sorted(map(list, tasks))
    assert "unreadable" in left


# ---- consumers -------------------------------------------------------------------------------------------------------
def consumers(bench: Bench) -> set[str]:
    rows = bench.redis.xinfo_consumers(bench.keys.role_part("p", "normal"), "workers")
    return {row["name"] for row in rows}


async def test_consumers_of_dead_workers_go_after_an_hour_with_nothing_pending(
    bench: Bench, maintenance: Maintenance, monkeypatch: pytest.MonkeyPatch
) -> None:
    bench.queued("g")
    bench.started("holding", "g")
    for name in ("dead", "left", "alive"):
        bench.redis.xgroup_createconsumer(bench.keys.role_part("p", "normal"), "workers", name)
    for name in ("holding", "dead", "alive"):
        for call in transitions.heartbeat(bench.keys, name, FACTS, ttl_ms=60_000, roles=["p"]):
            bench.run(call)
    bench.redis.delete(bench.keys.worker("holding"), bench.keys.worker("dead"))

    await maintenance.run_once()
    assert consumers(bench) == {"holding", "dead", "left", "alive"}
    assert bench.redis.smembers(bench.keys.workers) == {"holding", "dead", "alive"}

    monkeypatch.setattr("rq_ceylon.maintenance.steps.CONSUMER_IDLE_MS", -1)
    await Maintenance(maintenance._connection, bench.keys).run_once()
    assert consumers(bench) == {"holding", "alive"}
    assert bench.redis.smembers(bench.keys.workers) == {"holding", "alive"}


@pytest.mark.parametrize("closed", [False, True])
async def test_states_are_what_the_tasks_say_but_read_no_task(
    closed: bool, bench: Bench, connection: Connection
) -> None:
    bench.queued("g", ["a", "b", "c", "d"], needs={"d": ["a"]})
    deliveries = {delivery.tid: delivery for delivery in bench.fetch("w")}
    assert bench.claim("w", deliveries["a"], deliveries["b"]) == ["GRANTED", "GRANTED"]
    bench.commit("w", deliveries["b"], "failed")
    if closed:
        bench.run(transitions.cancel_group(bench.keys, "g"))

    states = [state async for some in queries.states(connection, bench.keys, "g") for state in some]
    tasks = [task async for task in queries.tasks(connection, bench.keys, "g")]

    assert {(one.tid, one.status, one.role) for one in states} == {(one.task_id, one.status, one.role) for one in tasks}
    assert len({one.status for one in tasks}) == (3 if closed else 4)
    assert [some async for some in queries.states(connection, bench.keys, "nosuch")] == []
