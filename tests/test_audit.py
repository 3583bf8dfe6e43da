"""The audit: silent on healthy groups at every stage, exact about faults, and careful with repairs."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import pytest
from bench import LEASE_MS, Bench
from click.testing import CliRunner

from rq_ceylon.audit import Audit, audit
from rq_ceylon.cli import ceylon
from rq_ceylon.errors import NotFoundError
from rq_ceylon.models import Goal
from rq_ceylon.store import transitions
from rq_ceylon.store.connection import Connection

pytestmark = [pytest.mark.anyio, pytest.mark.every_engine]


def words(found: Audit) -> list[str]:
    return [str(drift) for drift in found.drift]


async def test_nothing_is_found_at_any_stage_of_a_group(bench: Bench, connection: Connection) -> None:
    async def is_clean() -> None:
        found = await audit(connection, bench.keys)
        assert (words(found), found.moving) == ([], [])

    bench.submit("staged", ["a"], last=False)
    bench.queued("g", ["a", "b", "c", "d", "e"], needs={"d": ["a", "b"], "e": ["d"]}, on_need_failed="skip")
    await is_clean()
    a, b = bench.fetch("w", 2)
    assert bench.claim("w", a, b) == ["GRANTED", "GRANTED"]
    await is_clean()
    bench.commit("w", a, "retry", delay_ms=60_000)
    await is_clean()
    bench.commit("w", b, "failed")
    await is_clean()
    bench.started("v", "g")
    bench.run(transitions.pause_group(bench.keys, "g"))
    await is_clean()
    bench.run(transitions.cancel_group(bench.keys, "g"))
    assert bench.meta("g")["status"] == "closing"
    await is_clean()
    bench.age(LEASE_MS + 1)
    (lost,) = [delivery for delivery in bench.fetch("w") if delivery.tid == "c"]
    assert bench.claim("w", lost) == ["DONE"]
    assert bench.meta("g")["status"] == "finished"
    found = await audit(connection, bench.keys)
    assert (words(found), found.groups, found.tasks) == ([], 2, 6)


def _leave_error(bench: Bench, part: Callable[[str], str]) -> None:
    """As if `a` had completed at its second attempt."""
    state, reason, role, attempts, rest = bench.redis.hget(part("results"), "a").split("|", 4)
    bench.redis.hset(part("results"), "a", "|".join([state, reason, role, str(int(attempts) + 1), rest]))
    bench.redis.hset(part("errors"), "a 1", "{}")


DAMAGE: dict[str, tuple[Callable[[Bench, Any], object], list[str], bool]] = {
    "a counter": (
        lambda b, part: b.redis.hincrby(part("meta"), "completed", 2),
        ["g: completed is 3, should be 1"],
        True,
    ),
    "a total": (lambda b, part: b.redis.hset(part("meta"), "total", 9), ["g: total is 9, should be 4"], True),
    "a payload of an ended task": (
        lambda b, part: b.redis.hset(part("tasks"), "a", "p|2||||{}"),
        ["g/a: payload is there, should be gone: the task has ended"],
        True,
    ),
    "a claim of an ended task": (
        lambda b, part: b.redis.hset(part("claims"), "a", "p|1|5|w|2:1-0|1|0|0||p|2"),
        ["g/a: claim is there, should be gone: the task has ended"],
        True,
    ),
    "an error of a completed task": (
        _leave_error,
        ["g/a: errors of its attempts is there, should be gone: the task has completed"],
        True,
    ),
    "a lost result": (
        lambda b, part: b.redis.hdel(part("results"), "a"),
        [
            "g: total is 4, should be 3",
            "g: completed is 1, should be 0",
            "g/a: end is completed, should be none on record",
        ],
        False,
    ),
    "an untold end": (
        lambda b, part: b.redis.lset(part("events"), 1, "1|commit|||"),
        ["g/a: end is untold by events, should be completed"],
        False,
    ),
    "a need too many": (
        lambda b, part: b.redis.hset(part("needs"), "d", "2"),
        ["g/d: count of unmet needs is 2, should be 1"],
        False,
    ),
    "the index": (
        lambda b, part: b.redis.zrem(b.keys.index_of("g"), "g"),
        ["g: index is without it, should be with it"],
        True,
    ),
}


@pytest.mark.parametrize("name", DAMAGE)
async def test_drift_is_named_exactly_and_what_is_certain_is_repaired(
    bench: Bench, connection: Connection, name: str
) -> None:
    damage, expected, is_certain = DAMAGE[name]
    bench.queued("g", ["a", "b", "c", "d"], needs={"d": ["b"]})
    bench.queued("other")
    bench.commit("w", bench.started("w", "g"))
    damage(bench, lambda part: bench.keys.group_part("g", part))

    assert words(await audit(connection, bench.keys)) == expected

    repaired = await audit(connection, bench.keys, repair=True)
    assert all(drift.repaired for drift in repaired.drift) == is_certain
    left = words(await audit(connection, bench.keys))
    assert left == [] if is_certain else left == expected[-1:]


async def test_a_repaired_counter_settles_the_goal_that_was_waiting_for_it(
    bench: Bench, connection: Connection
) -> None:
    bench.queued("g", ["a", "b"], goal=Goal("completed >= 1", on_achieved="cancel"))
    delivery = bench.started("w", "g")
    bench.redis.hincrby(bench.keys.group_part("g", "meta"), "completed", -1)
    bench.commit("w", delivery)
    assert bench.meta("g")["status"] == "active"

    await audit(connection, bench.keys, ["g"], repair=True)

    assert (bench.meta("g")["status"], bench.meta("g")["outcome"]) == ("finished", "completed")
    assert words(await audit(connection, bench.keys)) == []


async def test_a_repair_changes_nothing_if_the_group_has_moved_since_it_was_counted(bench: Bench) -> None:
    bench.queued("g", ["a", "b"])
    before = bench.state("g")
    call = transitions.repair(bench.keys, "g", {"pending": (1, 2), "completed": (0, 0)}, ["a"])
    assert bench.run(call)[0] == "NO"
    assert bench.state("g") == before


async def test_a_repair_never_removes_a_task_that_has_not_ended(bench: Bench) -> None:
    bench.queued("g", ["a", "b"])
    assert bench.run(transitions.repair(bench.keys, "g", {"pending": (2, 2)}, ["a"]))[0] == "OK"
    assert bench.redis.hlen(bench.keys.group_part("g", "tasks")) == 2


async def test_a_group_that_does_not_hold_still_is_named_and_not_judged(
    bench: Bench, connection: Connection, monkeypatch: pytest.MonkeyPatch
) -> None:
    bench.queued("g", ["a", "b"])
    run = connection.run

    async def moving(calls: Any, **options: Any) -> Any:
        bench.redis.hincrby(bench.keys.group_part("g", "meta"), "attempts", 1)
        return await run(calls, **options)

    monkeypatch.setattr(connection, "run", moving)
    found = await audit(connection, bench.keys)
    assert (found.groups, found.moving, found.drift) == (0, ["g"], [])


async def test_an_unknown_group_is_refused(bench: Bench, connection: Connection) -> None:
    with pytest.raises(NotFoundError, match="nobody"):
        await audit(connection, bench.keys, ["nobody"])


def test_the_command_says_drift_0_or_what_it_is_and_exits_accordingly(bench: Bench, redis_url: str) -> None:
    def command(*words: str) -> tuple[int, str]:
        where = ["--redis", redis_url, "--namespace", bench.keys.namespace]
        done = CliRunner().invoke(ceylon, ["audit", *words, *where])
        return done.exit_code, done.output

    bench.queued("g", ["a", "b"])
    bench.queued("h")
    assert command() == (0, "2 groups, 3 tasks: drift 0\n")
    bench.redis.hset(bench.keys.group_part("g", "meta"), "pending", 5)
    assert command() == (1, "g: pending is 5, should be 2\n2 groups, 3 tasks: drift 1\n")
    assert command("h") == (0, "1 group, 1 task: drift 0\n")
    code, output = command("--json")
    assert code == 1
    assert json.loads(output)["drift"] == [
        {"group": "g", "task": "", "what": "pending", "found": "5", "expected": "2", "repaired": False}
    ]
    assert command("g", "--repair") == (0, "g: pending is 5, should be 2 (repaired)\n1 group, 2 tasks: drift 1\n")
    assert command() == (0, "2 groups, 3 tasks: drift 0\n")
    assert command("nobody")[0] not in (0, 1)
