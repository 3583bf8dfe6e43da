"""Retry: what failed runs again, what completed never does, and failed goals are judged anew, once all is reopened."""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

import pytest
from bench import Bench
from commands import LIMIT_S, Commands

from rq_ceylon import Backoff, Ceylon, Client, Goal, InvalidInputError, NotFoundError, Task, TaskGroup
from rq_ceylon.audit import audit
from rq_ceylon.maintenance import steps
from rq_ceylon.maintenance.steps import Maintenance
from rq_ceylon.store import transitions
from rq_ceylon.store.codec import result_of
from rq_ceylon.store.connection import Connection
from rq_ceylon.worker import Worker

pytestmark = pytest.mark.anyio


# Step by step.


def end_all(bench: Bench, gid: str, kinds: dict[str, str]) -> None:
    """Run the tasks that are queued; each ends as `kinds` says, or completes."""
    while deliveries := bench.fetch("w"):
        for delivery in deliveries:
            if bench.claim("w", delivery) == ["GRANTED"]:
                bench.commit("w", delivery, kinds.get(delivery.tid, "completed"))
        bench.fetch("w", 0, acks=[delivery.entry for delivery in deliveries])


def reopen(bench: Bench, gid: str, *tids: str, needs: Mapping[str, Sequence[str]] | None = None) -> list[str]:
    reply = bench.run(transitions.reopen(bench.keys, gid, [(tid, (needs or {}).get(tid, ())) for tid in tids]))
    return [str(word) for word in reply]


def settle(bench: Bench, gid: str) -> None:
    assert bench.run(transitions.settle(bench.keys, gid, "0")) == ["OK", "finished", "0"]


def end_retry(bench: Bench, gid: str) -> list[str]:
    reply: list[str] = bench.run(transitions.end_retry(bench.keys, gid))
    bench.relay(gid)
    return reply


def goals(bench: Bench, gid: str) -> dict[str, str]:
    meta = bench.meta(gid)
    return {name[5:]: text.split("|")[0] for name, text in meta.items() if name.startswith("goal:")}


@pytest.mark.every_engine
def test_no_goal_is_judged_between_two_parts_of_a_retry(bench: Bench) -> None:
    bench.queued("g", list("abcd"), goal=Goal("failed <= 1", name="clean", on_failed="cancel"))
    end_all(bench, "g", dict.fromkeys("abc", "failed"))
    assert goals(bench, "g") == {"clean": "failed"}
    settle(bench, "g")

    assert reopen(bench, "g", "a") == ["OK", "active", "reopened"]
    # Two have failed still, which would fail the goal again and cancel what was just reopened.
    assert bench.run(transitions.judge(bench.keys, "g"))[1] == "active"
    bench.relay("g")
    end_all(bench, "g", {})
    assert bench.meta("g")["status"] == "active"
    assert reopen(bench, "g", "b", "c", "d")[:4] == ["OK", "active", "reopened", "reopened"]
    assert end_retry(bench, "g") == ["OK", "active"]

    assert goals(bench, "g") == {}
    end_all(bench, "g", {})
    assert (bench.meta("g")["status"], bench.meta("g")["outcome"]) == ("finished", "completed")
    assert goals(bench, "g") == {"clean": "achieved"}


def test_an_undecided_goal_does_not_fail_for_what_the_next_part_of_a_retry_reopens(bench: Bench) -> None:
    bench.queued("g", list("abc"), goal=Goal("failed <= 2", name="few", on_failed="cancel"))
    first, second, third = bench.fetch("w")
    assert bench.claim("w", first, second) == ["GRANTED", "GRANTED"]
    assert bench.commit("w", first, "failed") == bench.commit("w", second, "failed") == "OK"

    assert reopen(bench, "g", first.tid)[2:] == ["reopened"]
    assert bench.claim("w", third) == ["GRANTED"]
    bench.commit("w", third, "failed")
    bench.relay("g")
    end_all(bench, "g", {first.tid: "failed"})
    assert bench.counters("g") == {"total": 3, "failed": 3}
    assert reopen(bench, "g", second.tid, third.tid) == ["OK", "active", "reopened", "reopened"]
    assert end_retry(bench, "g") == ["OK", "active"]
    end_all(bench, "g", {})

    assert goals(bench, "g") == {"few": "achieved"}


def test_a_callable_settles_no_goal_between_two_parts_of_a_retry(bench: Bench) -> None:
    bench.queued("g", ["a", "b"], goal=Goal(call="enough", name="called", on_failed="cancel"))
    first, second = bench.fetch("w")
    assert bench.claim("w", first, second) == ["GRANTED", "GRANTED"]
    bench.commit("w", first, "failed")
    assert reopen(bench, "g", first.tid)[2:] == ["reopened"]

    verdict = transitions.judge(bench.keys, "g", goal="called", verdict="failed")
    assert bench.run(verdict)[:2] == ["NO", "active"]
    assert goals(bench, "g") == {}
    end_retry(bench, "g")
    assert bench.run(verdict)[:2] == ["OK", "closing"]
    assert goals(bench, "g") == {"called": "failed"}


@pytest.mark.every_engine
def test_a_finished_group_goes_on_without_ttl_and_its_retention_starts_anew(bench: Bench) -> None:
    bench.queued("g", ["a", "b"])
    end_all(bench, "g", {"a": "failed"})
    assert bench.redis.pttl(bench.keys.group_part("g", "meta")) > 0

    assert reopen(bench, "g", "a", "b", "c") == ["OK", "active", "reopened", "completed", "unknown"]
    assert {bench.redis.pttl(key) for key in bench.keys.group("g") if bench.redis.exists(key)} == {-1}
    assert not {"finished", "outcome", "closed_by"} & bench.meta("g").keys()
    assert bench.counters("g") == {"total": 2, "pending": 1, "completed": 1}
    end_retry(bench, "g")
    end_all(bench, "g", {})

    assert bench.meta("g")["outcome"] == "completed"
    assert bench.redis.pttl(bench.keys.group_part("g", "results")) > 0


@pytest.mark.every_engine
def test_every_entry_of_an_earlier_run_is_out_of_date(bench: Bench) -> None:
    bench.queued("g", ["a"], crash_limit=7, priority=1)
    first = bench.started("w", "g")
    assert bench.commit("w", first, "retry") == "OK"
    (second,) = [one for one in bench.fetch("v") if one.issue == "2"]
    assert bench.claim("v", second) == ["GRANTED"]
    assert bench.commit("v", second, "failed") == "OK"
    reopen(bench, "g", "a")

    assert bench.claim("w", first) == ["OUTDATED"]
    assert bench.claim("v", second) == ["OUTDATED"]
    assert bench.commit("v", second, "completed") == "STALE"
    end_retry(bench, "g")
    (third,) = bench.fetch("u")
    reply = bench.run(transitions.claim(bench.keys, "g", "u", [third]))
    (answer,) = transitions.claim_reply(reply, 1).answers
    assert (answer.verdict, answer.attempt, answer.crashes) == ("GRANTED", 1, 0)
    assert answer.task.startswith("p|1|||7|")
    assert bench.commit("v", second, "failed") == "STALE"
    assert bench.commit("u", third, "completed") == "OK"
    assert bench.counters("g") == {"total": 1, "completed": 1}


def test_a_task_is_reopened_only_if_each_of_its_needs_has_completed_or_is_open(bench: Bench) -> None:
    needs = {"c": ["a", "b"], "d": ["c", "e"]}
    bench.queued("g", list("abecd"), needs=needs)
    end_all(bench, "g", {"a": "failed", "b": "failed"})
    assert bench.counters("g") == {"total": 5, "completed": 1, "failed": 2, "cancelled": 2}

    assert reopen(bench, "g", "a", "c", "d", needs=needs)[2:] == ["reopened", "blocked", "blocked"]
    assert reopen(bench, "g", "b", "c", "d", needs=needs)[2:] == ["reopened", "reopened", "reopened"]
    assert bench.counters("g") == {"total": 5, "waiting": 2, "pending": 2, "completed": 1}
    assert bench.state("g")[bench.keys.group_part("g", "needs")] == {"c": "2", "d": "1"}
    end_retry(bench, "g")
    end_all(bench, "g", {})
    assert bench.counters("g") == {"total": 5, "completed": 5}


def test_a_task_that_is_skipped_twice_can_still_be_reopened(bench: Bench) -> None:
    needs = {"b": ["a"]}
    bench.queued("g", list("ab"), needs=needs)
    for kind in ("failed", "failed", "completed"):
        end_all(bench, "g", {"a": kind})
        bench.relay("g")
        if kind == "failed":
            assert reopen(bench, "g", "a", "b", needs=needs)[2:] == ["reopened", "reopened"]
            end_retry(bench, "g")
    end_all(bench, "g", {})
    assert bench.counters("g") == {"total": 2, "completed": 2}


def test_the_tasks_of_a_closed_group_get_their_results_before_it_goes_on(bench: Bench) -> None:
    bench.queued("g", list("abc"), goal=Goal("completed >= 1", on_achieved="drain"))
    first, second = bench.started("w", "g"), bench.started("w", "g")
    bench.commit("w", first, "completed")
    assert bench.commit("w", second, "failed") == "OK"  # cancelled: its group is closed
    assert bench.counters("g") == {"total": 3, "completed": 1, "cancelled": 2}

    assert reopen(bench, "g", second.tid) == ["UNSETTLED", "finished"]
    assert bench.meta("g")["status"] == "finished"
    settle(bench, "g")
    settle(bench, "g")
    assert bench.redis.pttl(bench.keys.group_part("g", "results")) > 0
    assert reopen(bench, "g", second.tid)[2:] == ["reopened"]
    assert bench.counters("g") == {"total": 3, "pending": 1, "completed": 1, "cancelled": 1}


def test_an_achieved_goal_stays_achieved_and_a_failed_one_too_if_it_must_fail_again(bench: Bench) -> None:
    bench.queued(
        "g",
        list("abc"),
        goal=[
            Goal("completed >= 1", name="first"),
            Goal("completed >= 3", name="all"),
            Goal("failed <= 0", name="none"),
            Goal("attempts <= 2", name="cheap", on_failed="cancel"),
        ],
    )
    deliveries = bench.fetch("w")
    for delivery, kind in zip(deliveries, ("completed", "failed", "failed"), strict=True):
        assert bench.claim("w", delivery) == ["GRANTED"]
        bench.commit("w", delivery, kind)
    assert bench.counters("g") == {"total": 3, "completed": 1, "failed": 1, "cancelled": 1}
    assert goals(bench, "g") == {"first": "achieved", "all": "failed", "none": "failed", "cheap": "failed"}

    assert reopen(bench, "g", deliveries[1].tid, deliveries[2].tid)[2:] == ["reopened", "reopened"]
    end_retry(bench, "g")

    # Three attempts were made, whatever comes: its policy does not cancel what is open now.
    assert goals(bench, "g") == {"first": "achieved", "cheap": "failed"}
    assert bench.counters("g") == {"total": 3, "pending": 2, "completed": 1}
    end_all(bench, "g", {})
    assert goals(bench, "g") == {"first": "achieved", "cheap": "failed", "all": "achieved", "none": "achieved"}
    assert bench.meta("g")["outcome"] == "failed"


def test_a_goal_whose_deadline_is_over_stays_failed(bench: Bench) -> None:
    bench.queued("g", ["a"], goal=Goal("completed >= 1", name="soon", deadline=0.01, on_failed="cancel"))
    delivery = bench.started("w", "g")
    while bench.run(transitions.judge(bench.keys, "g"))[1] != "closing":
        pass
    bench.commit("w", delivery, "failed")
    settle(bench, "g")

    assert reopen(bench, "g", "a")[2:] == ["reopened"]
    end_retry(bench, "g")
    assert (goals(bench, "g"), bench.meta("g")["status"]) == ({"soon": "failed"}, "active")
    end_all(bench, "g", {})
    assert bench.counters("g") == {"total": 1, "completed": 1}


def test_a_group_that_is_closing_or_has_not_started_is_not_reopened(bench: Bench) -> None:
    bench.queued("g", ["a", "b"])
    bench.started("w", "g")
    bench.run(transitions.cancel_group(bench.keys, "g"))
    bench.submit("staged", ["a"], last=False)

    assert reopen(bench, "g", "b") == ["NO", "closing"]
    assert reopen(bench, "staged", "a") == ["NO", "staging"]
    assert reopen(bench, "nosuch", "a") == ["GONE"]
    assert end_retry(bench, "g") == ["NO", "closing"]


def test_what_a_cancel_closed_meanwhile_is_not_reopened_further(bench: Bench) -> None:
    bench.queued("g", list("abc"), goal="completed >= 3")
    end_all(bench, "g", dict.fromkeys("abc", "failed"))
    assert reopen(bench, "g", "a")[2:] == ["reopened"]

    bench.run(transitions.cancel_group(bench.keys, "g"))

    assert bench.meta("g")["status"] == "finished"
    assert bench.counters("g") == {"total": 3, "failed": 2, "cancelled": 1}
    assert end_retry(bench, "g") == ["NO", "finished"]


def test_a_task_whose_dependents_are_still_being_told_of_its_end_is_busy(bench: Bench) -> None:
    tids = [f"c{number}" for number in range(1200)]
    needs = {tid: ["a"] for tid in tids}
    bench.submit("g", ["a", *tids[:400], "x"], needs=needs, part=1, last=False)
    bench.submit("g", tids[400:800], needs=needs, part=2, last=False)
    bench.submit("g", tids[800:], needs=needs, part=3)
    bench.relay("g")
    deliveries = {delivery.tid: delivery for delivery in bench.fetch("w")}
    assert bench.claim("w", *deliveries.values()) == ["GRANTED", "GRANTED"]
    bench.commit_with_pages("w", deliveries["a"], "failed")
    assert bench.counters("g")["cancelled"] == 1000  # the rest waits in an internal page

    assert reopen(bench, "g", "a")[2:] == ["busy"]
    bench.relay("g")
    assert bench.counters("g")["cancelled"] == 1200
    assert reopen(bench, "g", "a")[2:] == ["reopened"]


def test_a_task_that_is_still_to_be_told_of_a_need_is_busy(bench: Bench) -> None:
    tids = [f"c{number}" for number in range(1100)]
    needs = {**{tid: ["a"] for tid in tids}, "x": ["a", "b"]}
    bench.submit("g", ["a", "b", *tids[:400]], needs=needs, part=1, last=False)
    bench.submit("g", tids[400:800], needs=needs, part=2, last=False)
    bench.submit("g", [*tids[800:], "x"], needs=needs, part=3)
    bench.relay("g")
    deliveries = {delivery.tid: delivery for delivery in bench.fetch("w")}
    assert bench.claim("w", *deliveries.values()) == ["GRANTED", "GRANTED"]
    bench.commit_with_pages("w", deliveries["b"], "failed")
    bench.commit_with_pages("w", deliveries["a"], "completed")  # x comes last in its list, and waits in a page

    assert reopen(bench, "g", "b", "x", needs=needs)[2:] == ["reopened", "busy"]
    bench.relay("g")
    assert reopen(bench, "g", "x", needs=needs)[2:] == ["reopened"]
    assert bench.redis.hget(bench.keys.group_part("g", "needs"), "x") == "1"
    assert bench.counters("g")["waiting"] == 1


def test_results_of_an_older_version_are_not_reopened(bench: Bench) -> None:
    bench.queued("g", ["a", "b"])
    end_all(bench, "g", {"a": "failed"})
    old = 'failed|error|p|1|0|w|1|2|0|0|[{"type":"E","message":"m","traceback":""},{}]'
    bench.redis.hset(bench.keys.group_part("g", "results"), "a", old)

    assert reopen(bench, "g", "a") == ["OK", "finished", "old"]
    assert bench.meta("g")["status"] == "finished"


async def test_a_retry_whose_client_died_is_completed_by_maintenance(
    bench: Bench, connection: Connection, monkeypatch: pytest.MonkeyPatch
) -> None:
    bench.queued("g", list("ab"), goal=Goal("completed >= 2", name="both"))
    end_all(bench, "g", {"a": "failed"})
    assert reopen(bench, "g", "a")[2:] == ["reopened"]

    async def look() -> dict[str, str]:
        bench.redis.zadd(bench.keys.index_of("g"), {"g": 1})
        await Maintenance(connection, bench.keys).run_once()
        return goals(bench, "g")

    assert await look() == {"both": "failed"}
    monkeypatch.setattr(steps, "SILENT_MS", 0)
    assert await look() == {}
    end_all(bench, "g", {})
    assert goals(bench, "g") == {"both": "achieved"}


async def test_a_look_that_was_set_while_a_retry_came_does_not_wait_for_the_retention(
    bench: Bench, connection: Connection, monkeypatch: pytest.MonkeyPatch
) -> None:
    bench.queued("g", ["a"])
    end_all(bench, "g", {"a": "failed"})
    prune = steps.prune

    async def retried_meanwhile(*args: Any, **options: Any) -> int | None:
        found = await prune(*args, **options)
        reopen(bench, "g", "a")
        return found

    monkeypatch.setattr(steps, "prune", retried_meanwhile)
    bench.redis.zadd(bench.keys.index_of("g"), {"g": 1})
    await Maintenance(connection, bench.keys).run_once()

    assert bench.redis.zscore(bench.keys.index_of("g"), "g") == 0


# As its users do it.


class Batch:
    """Tasks that fail until they are mended; `runs` counts the attempts by number."""

    def __init__(self, app: Ceylon, client: Client) -> None:
        self.client, self.broken, self.runs = client, {3, 5}, Counter[int]()
        self.registry = app.registry

        @app.task(role="r", max_attempts=2, backoff=Backoff(first=0.01, factor=1))
        async def work(number: int) -> int:
            self.runs[number] += 1
            if number in self.broken:
                raise ValueError(f"page {number} is broken")
            return number

        self.work = work

    async def run(self) -> None:
        url, namespace = self.client.url, self.client.keys.namespace
        worker = Worker(url, registry=self.registry, namespace=namespace, roles=["r"], burst=True)
        await asyncio.wait_for(worker.run(), LIMIT_S)


@pytest.fixture
def batch(app: Ceylon, client: Client) -> Batch:
    return Batch(app, client)


async def test_the_failures_alone_run_again_and_the_goal_is_judged_anew(batch: Batch) -> None:
    goal = Goal("completed >= 10", name="all", on_failed="cancel")
    tasks = [batch.work.using(id=str(number)).bind(number) for number in range(10)]
    run = await batch.client.submit(TaskGroup("pages", [*tasks[5:], *tasks[:5]], goal=goal))
    await batch.run()
    before = await run.view()
    assert (before.outcome, before.goals[0].status, before.counters.completed) == ("failed", "failed", 8)
    failed = (await run.task("3").view()).result
    assert failed is not None
    assert failed.payload is not None
    assert failed.payload["arguments"] == {"number": 3}

    batch.broken.clear()
    again = await run.retry()
    view, before_retry = await run.task("3").view(), await run.task("3").errors()
    await batch.run()
    assert await run.task("3").errors() == []

    assert again == 2
    assert (view.status, view.attempt, view.last_error and view.last_error["message"]) == (
        "pending", 1, "page 3 is broken",
    )  # fmt: skip
    assert [(error.attempt, error.type) for error in before_retry] == [(0, "ValueError")]
    assert before_retry[0].worker
    assert before_retry[0].started_ms
    after = await run.view()
    assert (after.outcome, after.goals[0].status, after.counters.completed) == ("completed", "achieved", 10)
    assert {number for number, count in batch.runs.items() if count > 1} == {3, 5}
    assert [result.value async for result in run.results() if result.task_id == "3"] == [3]
    assert not (await audit(batch.client.connection, batch.client.keys)).drift
    assert await run.retry() == 0


async def test_what_a_failed_goal_cancelled_runs_again_but_not_what_a_user_cancelled(batch: Batch) -> None:
    goal = Goal("failed <= 0", on_failed="cancel")
    tasks = [batch.work.using(max_attempts=1, priority="high").bind(3), batch.work.using(delay="1h").bind(4)]
    by_goal = await batch.client.submit(TaskGroup("goal", tasks, goal=goal))
    by_user = await batch.client.submit(TaskGroup("user", tasks))
    await by_user.cancel()
    await batch.run()
    assert (await by_goal.view()).counters.cancelled == 1

    batch.broken.clear()
    assert await by_goal.retry() == 2
    assert await by_user.retry() == 0
    assert await by_user.retry(cancelled=True) == 2
    await batch.run()

    for run in (by_goal, by_user):
        view = await run.view()
        assert (view.outcome, view.counters.completed) == ("completed", 2)
    assert not (await audit(batch.client.connection, batch.client.keys)).drift


async def test_a_task_is_retried_with_what_was_skipped_because_of_it(batch: Batch) -> None:
    work = batch.work.using
    tasks = [
        work(id="a", max_attempts=1).bind(3),
        work(id="x", max_attempts=1).bind(5),
        work(id="b", needs=["a"]).bind(1),
        work(id="c", needs=["b"]).bind(2),
        work(id="d", needs=["c", "x"]).bind(4),
    ]
    run = await batch.client.submit(TaskGroup("chain", tasks))
    await batch.run()
    assert (await run.view()).counters.cancelled == 3

    with pytest.raises(
        InvalidInputError, match=r"cannot be retried: a task that it needs did not complete; retry that"
    ):
        await run.task("d").retry()
    batch.broken.clear()
    await run.task("a").retry()
    with pytest.raises(InvalidInputError, match="cannot be retried: it has not ended"):
        await run.task("a").retry()
    await batch.run()
    assert (await run.view()).counters.completed == 3
    with pytest.raises(InvalidInputError, match="cannot be retried: it has completed"):
        await run.task("a").retry()
    await run.task("x").retry()
    await batch.run()

    assert (await run.view()).outcome == "completed"
    assert await run.task("d").result(timeout=LIMIT_S) == 4
    with pytest.raises(NotFoundError):
        await run.task("nosuch").retry()
    assert not (await audit(batch.client.connection, batch.client.keys)).drift


async def test_a_single_task_is_retried_and_its_errors_are_kept_until_it_completes(batch: Batch) -> None:
    handle = await batch.client.submit(batch.work.using(max_attempts=8).bind(3))
    await batch.run()
    errors = await handle.errors()
    assert [error.attempt for error in errors] == [3, 4, 5, 6, 7, 8]
    assert {str(error) for error in errors} == {"ValueError: page 3 is broken"}
    assert all(error.worker and error.traceback and error.started_ms and error.ended_ms for error in errors)
    batch.broken.clear()

    await handle.retry()
    await batch.run()

    assert await handle.result(timeout=LIMIT_S) == 3


def test_failures_are_retried_by_the_command_line(app: Ceylon, commands: Commands, bench: Bench) -> None:
    def retry(*words: str, answer: str = "") -> tuple[int, str]:
        ended = commands.here("ceylon", "retry", *words, "--namespace", bench.keys.namespace, input=answer)
        return ended.exit_code, ended.output

    with app.sync_client() as client:
        runs = [client.submit(TaskGroup(name, [Task(role="p"), Task(role="p")])) for name in ("one", "two")]
        one, two = (run.id for run in runs)
        for failed in (2, 1):  # both of the first group, one of the second
            for _ in range(failed):
                delivery = bench.fetch("w", 1)[0]
                assert bench.claim("w", delivery) == ["GRANTED"]
                bench.commit("w", delivery, "failed", message=f"page {failed}")
        end_all(bench, two, {})
        assert [run.view().counters.failed for run in runs] == [2, 1]

        assert retry()[0] == retry(one, "--cancelled", "--role", "r")[0] == retry("nosuch")[0] == 2
        names = [f"{one} 'one': 2 failed tasks", f"{two} 'two': 1 failed task"]
        assert retry("--error", "page", "--dry-run") == (0, "\n".join([*names, ""]))
        code, words = retry("--error", "page", answer="n\n")
        assert (code, "Run 3 tasks of 2 groups again? [y/N]" in words) == (1, True)
        assert [run.view().counters.failed for run in runs] == [2, 1]

        assert retry(f"{one}/1") == (0, f"{one}: 1 task runs again\n")
        assert retry("--error", "page 2", "--yes")[1].splitlines()[-1] == f"{one}: 1 task runs again"
        assert retry(two) == (0, f"{two}: 1 task runs again\n")
        end_all(bench, one, {})
        assert [run.view().counters.completed for run in runs] == [2, 2]
        assert retry(one) == (1, f"{one}: 0 tasks run again\nnothing to retry\n")


def test_a_key_that_is_submitted_again_names_the_retry(commands: Commands, bench: Bench) -> None:
    where = ("--namespace", bench.keys.namespace, "--key", "nightly")
    (commands.folder / "group.yaml").write_text("name: g\ntasks: {a: {role: p}}\n")
    gid = commands.here("ceylon-submit", "group.yaml", *where).stdout.strip()
    assert "retry" not in commands.here("ceylon-submit", "group.yaml", *where).output
    end_all(bench, gid, {"a": "failed"})

    again = commands.here("ceylon-submit", "group.yaml", *where)
    assert f"has not completed; run its failures again with: ceylon retry {gid}" in again.output


def test_a_result_keeps_what_a_retry_needs(bench: Bench) -> None:
    bench.queued("g", ["a"], priority=3, crash_limit=2)
    end_all(bench, "g", {"a": "failed"})
    record = bench.redis.hget(bench.keys.group_part("g", "results"), "a")

    assert result_of("a", record).payload == {}
    assert record.split("[")[0].split("|")[10:14] == ["1", "3", "2", str(len('{"type":"E","message":"m"}'))]
