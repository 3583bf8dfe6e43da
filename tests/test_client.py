"""Submitting and following, with real workers in the same process."""

from __future__ import annotations

import asyncio
import contextlib
import subprocess
import sys
import tempfile
import tracemalloc
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import redis
from bench import Bench
from commands import eventually, run_to_end
from pydantic_core import from_json

from rq_ceylon import (
    Ceylon,
    Client,
    ConnectionLostError,
    FailTask,
    Goal,
    GoalImpossibleError,
    GroupExistsError,
    InvalidInputError,
    NotFoundError,
    NoWorkerError,
    PayloadTooLargeError,
    QueueFullError,
    Task,
    TaskCancelledError,
    TaskContext,
    TaskFailedError,
    TaskGroup,
    WaitTimeoutError,
    Worker,
)
from rq_ceylon.client import rolling
from rq_ceylon.dev.server import EmbeddedServer
from rq_ceylon.handlers import Registry
from rq_ceylon.maintenance.steps import drop
from rq_ceylon.staging import keyed_id, stage
from rq_ceylon.store import queries
from rq_ceylon.store.connection import Connection
from rq_ceylon.store.scripts import Call, command

pytestmark = pytest.mark.anyio


@pytest.fixture
def app(redis_url: str, namespace: str) -> Ceylon:
    app = Ceylon(redis_url, namespace=namespace)

    @app.task(role="p")
    async def double(number: int) -> int:
        return 2 * number

    @app.task(role="p", max_attempts=2)
    def fail(words: str) -> None:
        raise FailTask(words)

    @app.task(role="p")
    async def total(context: TaskContext) -> int:
        return sum(context.needs.values())

    return app


@contextlib.asynccontextmanager
async def working(app: Ceylon, **options: Any) -> AsyncIterator[Worker]:
    worker = Worker(
        app.settings.redis_url,
        namespace=app.settings.namespace,
        registry=app.registry,
        roles=options.pop("roles", ["p"]),
        **options,
    )
    running = asyncio.create_task(worker.run())
    try:
        yield worker
    finally:
        worker.kill()
        await running


async def test_a_task_gives_its_typed_result(app: Ceylon) -> None:
    double: Any = app.registry.get("double")
    async with app.client() as client, working(app):
        handle = await client.submit(Task(uses="double", arguments={"number": 21}, role="p"))
        assert await handle.result(timeout=10) == 42
        assert await handle.status() == "completed"
        assert await client.task(handle.id).result(timeout=10) == 42
    assert double.role == "p"


async def test_a_failed_task_raises_with_the_remote_traceback(app: Ceylon) -> None:
    async with app.client() as client, working(app):
        handle = await client.submit(Task(uses="fail", arguments={"words": "out of paper"}))
        with pytest.raises(TaskFailedError, match="out of paper") as caught:
            await handle.result(timeout=10)
    assert caught.value.error_type == "FailTask"
    assert "raise FailTask(words)" in caught.value.traceback


async def test_a_group_with_a_goal_is_waited_for_and_spares_the_rest(app: Ceylon) -> None:
    tasks = [Task(duration=0.01, role="p") for _ in range(200)]
    group = TaskGroup("g", tasks, goal=Goal("completed >= 5", on_achieved="drain"))
    async with app.client() as client, working(app, slots=4):
        run = await client.submit(group)
        view = await run.wait("goal", timeout=20)
        assert view.goals[0].status == "achieved"
        assert view.goals[0].settled is not None
        assert 5 <= view.goals[0].settled.counters.completed < 20
        view = await run.wait("all", timeout=20)
        assert view.outcome == "completed"
        assert view.counters.cancelled > 150
        last = [task async for task in run.tasks() if task.status == "cancelled"][-1]
        with pytest.raises(TaskCancelledError, match="closed"):
            await run.task(last.id).result(timeout=10)


async def test_results_of_needs_reach_the_task_that_needs_them(app: Ceylon) -> None:
    tasks = [
        Task(id="sum", uses="total", needs=["a", "b"], role="p"),
        Task(id="a", uses="double", arguments={"number": 1}),
        Task(id="b", uses="double", arguments={"number": 2}),
    ]
    async with app.client() as client, working(app):
        run = await client.submit(TaskGroup("dag", tasks))
        assert await run.task("sum").result(timeout=10) == 6
        results = {result.task_id: result.value async for result in run.results()}
        assert results == {"a": 2, "b": 4, "sum": 6}
        events = [event async for event in run.events()]
        assert [event.seq for event in events] == list(range(1, len(events) + 1))
        assert events[-1].status == "finished"


async def test_a_task_whose_needs_cannot_be_read_now_is_given_back_and_runs_later(
    app: Ceylon, monkeypatch: pytest.MonkeyPatch
) -> None:
    read = queries.result_texts
    failures: list[Sequence[str]] = []

    async def lost_once(connection: Any, keys: Any, gid: str, tids: Sequence[str]) -> Any:
        if list(tids) == ["a"] and not failures:
            failures.append(tids)
            raise ConnectionLostError("cut")
        return await read(connection, keys, gid, tids)

    monkeypatch.setattr(queries, "result_texts", lost_once)
    tasks = [
        Task(id="a", uses="double", arguments={"number": 1}, role="p"),
        Task(id="sum", uses="total", needs=["a"], role="p"),
    ]
    async with app.client() as client, working(app):
        run = await client.submit(TaskGroup("dag", tasks))
        view = await run.wait("all", timeout=15)
        assert (failures, view.counters.completed) == ([["a"]], 2)
        assert (await run.task("sum").view()).attempt == 1


async def test_the_same_key_is_the_same_group_and_other_content_is_refused(app: Ceylon) -> None:
    async with app.client() as client:
        first = await client.submit(TaskGroup("g", [Task(role="p")] * 3, key="nightly"))
        again = await client.submit(TaskGroup("g", [Task(role="p")] * 3, key="nightly"))
        assert (again.id, again.repeated, first.repeated) == (first.id, True, False)
        assert (await again.view()).counters.total == 3
        with pytest.raises(GroupExistsError, match="nightly"):
            await client.submit(TaskGroup("g", [Task(role="p")] * 4, key="nightly"))


def lose_answers(client: Client) -> list[Sequence[Call]]:
    """Whatever this client sends is answered only when it is sent again. Returns what was sent."""
    sent: list[Sequence[Call]] = []
    send = client.connection.run_until_answered

    async def send_twice(calls: Sequence[Call], **options: Any) -> list[Any]:
        sent.append(calls)
        await send(calls, **options)
        answers: list[Any] = await send(calls, **options)
        return answers

    client.connection.run_until_answered = send_twice  # type: ignore[method-assign]
    return sent


async def test_a_group_without_a_key_whose_answer_was_lost_is_no_repetition(app: Ceylon) -> None:
    async with app.client() as client:
        first = await client.submit(TaskGroup("first", [Task(role="p")]))
        lost = lose_answers(client)
        group = await client.submit(TaskGroup("g", [Task(role="p")], depends_on=[first.id]))

        assert "submit" in {call.script for call in lost[0]}
        assert not group.repeated
        assert (await group.view()).counters.total == 1
        (told,) = await client.connection.run([command("HGET", client.keys.group_part(first.id, "meta"), "dependents")])
        assert told == group.id


@pytest.mark.parametrize(
    "work",
    [
        Task(role="p"),
        TaskGroup("g", [Task(role="p")]),
        TaskGroup("g", [Task(role="p")], key="nightly"),
        TaskGroup("g", [Task(role="p")] * 600, key="nightly"),
    ],
    ids=["task", "group", "group with a key", "group in two parts"],
)
async def test_what_was_submitted_is_with_its_role_at_once_though_the_answer_was_lost(
    app: Ceylon, work: Task | TaskGroup
) -> None:
    async with app.client() as other:
        async with app.client() as client:
            lost = lose_answers(client)
            run = await client.submit(work)
            assert "submit" in {call.script for call in lost[0]}
            (queued,) = await other.connection.run([command("XLEN", other.keys.role_part("p", "normal"))])
        outbox = other.keys.group_part(run.id.partition("/")[0], "outbox")
        (left,) = await other.connection.run([command("ZCARD", outbox)])

    assert queued >= (1 if isinstance(work, Task) else len(list(work.tasks)))
    assert left == 0


def lose_once(client: Client, script: str) -> list[Call]:
    """The first call of this script is lost; it is in the list then."""
    run_each, lost = client.connection.run_each, list[Call]()

    async def losing(calls: Sequence[Call]) -> list[Any]:
        found = [call for call in calls if call.script == script and not lost]
        lost.extend(found)
        return [ConnectionLostError("lost on the way")] * len(calls) if found else await run_each(calls)

    client.connection.run_each = losing  # type: ignore[method-assign]
    return lost


@pytest.mark.parametrize("count", [1, 600])
async def test_a_stored_group_counts_as_submitted_though_its_entries_are_lost(app: Ceylon, count: int) -> None:
    async with app.client() as client:
        lost = lose_once(client, "enqueue")
        run = await client.submit(TaskGroup("g", [Task(role="p")] * count))
        assert lost
        assert (await run.view()).status == "active"
        (queued,) = await client.connection.run([command("XLEN", client.keys.role_part("p", "normal"))])
        assert queued == count


async def test_a_cancelled_group_is_cancelled_though_what_follows_is_lost(app: Ceylon) -> None:
    async with app.client() as client:
        run = await client.submit(TaskGroup("g", [Task(role="p")] * 2))
        for cancel, answer in ((run.task("1").cancel, "cancelled"), (run.cancel, "finished")):
            lost = lose_once(client, "outbox")
            assert await cancel() == answer
            assert lost


async def test_dependents_of_a_cancelled_task_go_on_though_the_answer_was_lost(
    app: Ceylon,
) -> None:
    async with app.client() as client:
        tasks = [Task(id="a", role="p"), Task(id="b", role="p", needs=["a"])]
        run = await client.submit(TaskGroup("g", tasks, on_need_failed="continue"))
        lose_answers(client)
        await run.task("a").cancel()
        (queued,) = await client.connection.run([command("XLEN", client.keys.role_part("p", "normal"))])
    assert queued == 2


def _tasks(count: int, *, words: str = "", at: int = 0, then: Callable[[], None] = lambda: None) -> Iterator[Task]:
    """Tasks in parts of 500; `then` is called when the producer asks for number `at`."""
    for n in range(count):
        if n == at:
            then()
        yield Task(role="p", arguments={"n": n, "words": words})


async def test_two_clients_that_submit_the_same_under_one_key_at_once_both_succeed(app: Ceylon) -> None:
    async with app.client() as one, app.client() as other:
        runs = await asyncio.gather(
            one.submit(TaskGroup("g", _tasks(5000), key="nightly")),
            other.submit(TaskGroup("g", _tasks(5000), key="nightly")),
        )

        assert {run.id for run in runs} == {runs[0].id}
        assert sorted(run.repeated for run in runs) == [False, True]
        assert (await runs[0].view()).counters.pending == 5000


async def test_other_content_under_a_key_that_is_being_submitted_is_refused(app: Ceylon) -> None:
    """The later one's parts seem known until it meets the newest; its failure removed the group of the first."""
    begun = asyncio.Event()
    async with app.client() as one, app.client() as other:
        first = asyncio.create_task(one.submit(TaskGroup("g", _tasks(9000, at=2500, then=begun.set), key="nightly")))
        await begun.wait()
        with pytest.raises(GroupExistsError, match="still sending"):
            await other.submit(TaskGroup("g", _tasks(1300), key="nightly"))

        assert (await (await first).view()).counters.pending == 9000


async def test_a_keyed_submission_that_fails_leaves_the_same_one_of_another_client_alone(app: Ceylon) -> None:
    begun = asyncio.Event()

    def broken() -> Iterator[Task]:
        yield from _tasks(1200)
        raise ValueError("the source broke")

    async with app.client() as one, app.client() as other:
        first = asyncio.create_task(one.submit(TaskGroup("g", _tasks(9000, at=2500, then=begun.set), key="nightly")))
        await begun.wait()
        with pytest.raises(ValueError, match="the source broke"):
            await other.submit(TaskGroup("g", broken(), key="nightly"))

        assert (await (await first).view()).counters.pending == 9000


async def test_a_keyed_submission_that_failed_is_continued_by_the_next(app: Ceylon) -> None:
    def broken() -> Iterator[Task]:
        yield from _tasks(1200)
        raise ValueError("the source broke")

    async with app.client() as client:
        with pytest.raises(ValueError, match="the source broke"):
            await client.submit(TaskGroup("g", broken(), key="nightly"))
        with pytest.raises(GroupExistsError, match="ceylon cancel k"):
            await client.submit(TaskGroup("g", _tasks(1600, words="other"), key="nightly"))
        run = await client.submit(TaskGroup("g", _tasks(1600), key="nightly"))

        assert ((await run.view()).counters.pending, run.repeated) == (1600, False)


async def test_a_cancelled_submission_leaves_nothing(app: Ceylon) -> None:
    begun = asyncio.Event()
    async with app.client() as client:
        submission = asyncio.create_task(client.submit(TaskGroup("g", _tasks(9000, at=2500, then=begun.set))))
        await begun.wait()
        submission.cancel()
        with pytest.raises(asyncio.CancelledError):
            await submission

        assert await client.groups() == []


async def test_a_delay_of_nothing_is_one_that_was_given(app: Ceylon) -> None:
    async with app.client() as client:
        tasks = [Task(role="p", delay=0), Task(role="p")]
        await client.submit(TaskGroup("g", tasks, defaults=Task(delay="1h")))

        assert [(role.queued, role.delayed) for role in await client.roles()] == [(1, 1)]


async def test_a_group_may_say_that_it_has_no_goal(app: Ceylon) -> None:
    async with app.client() as client:
        group = await client.submit(TaskGroup("a", [Task()], goal=None))

        assert not (await group.view()).goals


async def test_what_cannot_be_used_is_refused_and_nothing_is_written(app: Ceylon) -> None:
    async with app.client() as client:
        bad: list[tuple[Any, type[Exception], str]] = [
            (TaskGroup("g", [Task(role="p")], goal="completed >= 2"), GoalImpossibleError, "has 1 task"),
            (TaskGroup("g", []), InvalidInputError, "no tasks"),
            (TaskGroup("g", [Task(id="a"), Task(id="a")]), InvalidInputError, "unique"),
            (TaskGroup("g", [Task(id="a", needs=["b"]), Task(id="b", needs=["a"])]), InvalidInputError, "->"),
            (TaskGroup("g", [Task(id="a", needs=["zz"])]), InvalidInputError, "zz"),
            (TaskGroup("g", (Task(id="a", needs=["zz"]) for _ in range(1))), InvalidInputError, "zz"),
            (Task(uses="double", arguments={"number": "x"}), InvalidInputError, "number"),
            (Task(uses="double", arguments={"numbr": 1}), InvalidInputError, "numbr"),
            (Task(arguments={"x": "y" * 2_000_000}), PayloadTooLargeError, "reference"),
            (Task(role="no good"), InvalidInputError, "role"),
            (Task(priority="urgent"), InvalidInputError, "high, normal or low"),
            (Task(timeout=0), InvalidInputError, "timeout: 0 leaves no time; leave it out for the default"),
            (TaskGroup("g", [Task(timeout="0s")]), InvalidInputError, "timeout: '0s' leaves no time"),
            (TaskGroup("g", [Task()], defaults=Task(timeout=0.0)), InvalidInputError, "defaults: timeout: 0.0 leaves"),
            (Task(arguments={"a": [float("nan")]}), InvalidInputError, r"arguments.a\[0\]: nan is not JSON"),
            (Task(arguments={"a": (1, 2)}), InvalidInputError, "arguments.a: a tuple is not JSON"),
            (Task(metadata={"NaN": float("inf")}), InvalidInputError, "it is not JSON"),
            (Task(max_attempts=0), InvalidInputError, "max_attempts"),
            (Task(max_attempts=True), InvalidInputError, "max_attempts"),
            (Task(max_crashes=-1), InvalidInputError, "max_crashes: -1 is not usable; give a whole number from 0"),
            (Task(max_crashes=True), InvalidInputError, "max_crashes"),
        ]
        for work, kind, words in bad:
            with pytest.raises(kind, match=words):
                await client.submit(work)
        assert await client.groups() == []


async def test_a_producer_that_fails_in_the_middle_leaves_nothing(app: Ceylon) -> None:
    def tasks() -> Iterator[Task]:
        for _ in range(1200):
            yield Task(role="p")
        raise ValueError("the source broke")

    async with app.client() as client:
        with pytest.raises(ValueError, match="the source broke"):
            await client.submit(TaskGroup("g", tasks()))
        assert await client.groups() == []


async def test_an_iterable_is_submitted_in_constant_memory(app: Ceylon) -> None:
    async with app.client() as client:
        await client.submit(TaskGroup("warm", [Task(role="p")]))
        tracemalloc.start()
        run = await client.submit(TaskGroup("big", (Task(role="p", arguments={"n": n}) for n in range(20_000))))
        _, peak = tracemalloc.get_traced_memory()
        tracemalloc.stop()
        assert (await run.view()).counters.pending == 20_000
        assert peak < 6_000_000
        roles = await client.roles()
        assert [role.queued for role in roles if role.name == "p"] == [20_001]


async def test_concurrent_single_tasks_share_round_trips(app: Ceylon, trips: list[list[str]]) -> None:
    async with app.client() as client:
        await client.submit(Task(role="p"))
        trips.clear()
        handles = await asyncio.gather(*(client.submit(Task(role="p")) for _ in range(300)))
        assert len({handle.id for handle in handles}) == 300
        assert 1 <= len(trips) <= 8


async def test_what_is_submitted_is_kept_for_its_own_retention_or_the_default(
    app: Ceylon, bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def kept_ms(work: Task | TaskGroup) -> int:
        gid, _, _ = (await client.submit(work)).id.partition("/")
        return int(bench.meta(gid)["retention"])

    group = partial(TaskGroup, "g", [Task(role="p")])
    async with app.client() as client:
        assert await kept_ms(Task(role="p")) == await kept_ms(group()) == 24 * 3_600_000
        assert await kept_ms(Task(role="p", retention="2h")) == await kept_ms(group(retention="2h")) == 2 * 3_600_000
        nightly = await client.submit(group(key="nightly"))

        monkeypatch.setenv("CEYLON_RETENTION", "30m")
        assert await kept_ms(Task(role="p")) == await kept_ms(group()) == 30 * 60_000
        assert await kept_ms(Task(role="p", retention=1)) == await kept_ms(group(retention=1)) == 1000
        assert (await client.submit(group(key="nightly"))).id == nightly.id

        monkeypatch.setenv("CEYLON_RETENTION", "soon")
        for work in (Task(role="p"), group()):
            with pytest.raises(InvalidInputError, match="CEYLON_RETENTION: 'soon'"):
                await client.submit(work)


@pytest.mark.parametrize("place", ["task 'a'", "defaults"])
async def test_a_task_is_kept_as_long_as_its_group(place: str, app: Ceylon) -> None:
    kept = Task(role="p", retention="1h")
    group = TaskGroup("g", [Task()], defaults=kept) if place == "defaults" else TaskGroup("g", [replace(kept, id="a")])
    async with app.client() as client:
        with pytest.raises(InvalidInputError, match=f"{place}: retention: '1h' .*give the retention to the group"):
            await client.submit(group)
        assert await client.groups() == []


async def test_a_rolling_group_is_sealed_and_its_tasks_all_run(app: Ceylon) -> None:
    async with app.client() as client, working(app, slots=100):
        work = [Task(uses="double", arguments={"number": n}) for n in range(1500)]
        handles = await asyncio.gather(*(client.submit(task) for task in work))
        results = await asyncio.gather(*(handle.result(timeout=30) for handle in handles))
        assert results == [2 * n for n in range(1500)]
        assert len({handle.id.partition("/")[0] for handle in handles}) >= 2


@contextlib.contextmanager
def refusing(client: Client, script: str) -> Iterator[None]:
    """At the memory limit one call is refused and the next is not."""
    run_each = client.connection.run_each

    async def refuse(calls: Sequence[Call]) -> list[Any]:
        answers = iter(await run_each([call for call in calls if call.script != script]))
        return [QueueFullError("full") if call.script == script else next(answers) for call in calls]

    with mock.patch.object(client.connection, "run_each", refuse):
        yield


async def test_pages_left_behind_are_not_acknowledged_with_a_later_task(app: Ceylon, bench: Bench) -> None:
    async with app.client() as client:
        with refusing(client, "enqueue"):
            first = await client.submit(Task(role="p"))
        assert bench.fetch("w") == []
        lose_answers(client)
        second = await client.submit(Task(role="p"))

    assert {f"{delivery.gid}/{delivery.tid}" for delivery in bench.fetch("w")} == {first.id, second.id}


async def test_a_task_is_accepted_although_what_is_sent_ahead_of_it_is_refused(app: Ceylon, bench: Bench) -> None:
    async with app.client() as client:
        first = await client.submit(Task(role="p"))
        for rolling in client._rolling.values():
            rolling._open_another()  # so that the acknowledgements of the first are a call of their own
        with refusing(client, "outbox"):
            second = await client.submit(Task(role="p"))

    assert {f"{delivery.gid}/{delivery.tid}" for delivery in bench.fetch("w")} == {first.id, second.id}


async def test_a_task_that_was_refused_leaves_no_entry_that_rings_for_another(app: Ceylon, bench: Bench) -> None:
    async with app.client() as client:
        with refusing(client, "submit"), pytest.raises(QueueFullError):
            await client.submit(Task(role="p"))
        await client.submit(Task(role="q"))

    (delivery,) = bench.fetch("w", role="p")
    assert bench.claim("w", delivery) == ["GONE"]


async def test_a_group_submitted_while_its_predecessor_is_dropped_stays_listed(
    app: Ceylon, connection: Connection
) -> None:
    async with app.client() as client:
        run_each, gid = client.connection.run_each, keyed_id(client.keys.namespace, "nightly")

        async def one_by_one(calls: Sequence[Call]) -> list[Any]:
            answers: list[Any] = []
            for call in calls:
                if call.script == "submit":
                    await drop(connection, client.keys, gid)
                answers += await run_each([call])
            return answers

        client.connection.run_each = one_by_one  # type: ignore[method-assign]
        await client.submit(TaskGroup("g", [Task(role="p")], key="nightly"))
        assert [view.id for view in await client.groups()] == [gid]


async def test_every_role_of_single_tasks_is_listed_and_announced_once(app: Ceylon, trips: list[list[str]]) -> None:
    async with app.client() as client:
        for role in ("a", "b", "a", "b"):
            await client.submit(Task(role=role))

        assert [(role.name, role.queued) for role in await client.roles()] == [("a", 2), ("b", 2)]
        assert sum("SADD" in trip for trip in trips) == 2


async def test_a_task_has_one_id_for_handle_view_and_client(app: Ceylon) -> None:
    async with app.client() as client:
        handle = await client.submit(Task(role="p"))
        view = await client.task(handle.id).view()

        assert view.id == handle.id == f"{view.group_id}/{view.task_id}"
        group = client.group(view.group_id)
        assert {client.task(view.id).id, group.task(view.id).id, group.task(view.task_id).id} == {handle.id}
        with pytest.raises(InvalidInputError, match="task id: 'other/1' is not usable"):
            group.task("other/1")
        for garbage in ("garbage", "a/", "/b", "a/b/c", ""):
            with pytest.raises(InvalidInputError, match=r"group id|task id"):
                client.task(garbage)


async def test_an_idle_rolling_group_is_sealed_by_its_client(app: Ceylon, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rolling, "ROLLING_S", 0.05)
    async with app.client() as client:
        handle = await client.submit(Task(role="p"))
        await handle.cancel()

        view = await client.group(handle.id.partition("/")[0]).wait("all", timeout=20)
        assert view.counters.cancelled == 1
        again = await client.submit(Task(role="p"))
        assert again.id.partition("/")[0] != view.id


async def test_waiting_has_a_limit_and_unknown_ids_are_said_so(app: Ceylon) -> None:
    async with app.client() as client:
        handle = await client.submit(Task(role="nobody"))
        with pytest.raises(WaitTimeoutError):
            await handle.result(timeout=0.05)
        with pytest.raises(NotFoundError):
            await client.group("nope").wait(timeout=5)
        with pytest.raises(NotFoundError):
            await client.task(handle.id.split("/")[0] + "/zz").result(timeout=5)
        with pytest.raises(NotFoundError):
            await client.task("nope/1").cancel()


async def test_a_waiter_raises_when_the_server_came_back_empty(app: Ceylon) -> None:
    async with app.client() as client:
        handle = await client.submit(Task(role="nobody"))
        waiting = asyncio.create_task(handle.result(timeout=20))
        await handle.status()
        with redis.Redis.from_url(app.settings.redis_url) as raw:
            raw.flushall()
        with pytest.raises(NotFoundError):
            await waiting


async def test_every_waiter_raises_when_the_server_came_back_without_its_data(
    start_server: Callable[..., EmbeddedServer], short_tmp_path: Path, namespace: str, trips: list[list[str]]
) -> None:
    server = start_server(folder=short_tmp_path)
    async with Ceylon(server.url, namespace=namespace).client() as client:
        lone = await client.submit(Task(role="p"))
        run = await client.submit(TaskGroup("g", [Task(role="p")] * 2, goal="completed >= 1"))

        async def all_of(items: AsyncIterator[Any]) -> list[Any]:
            return [item async for item in items]

        waiting = [
            asyncio.create_task(one)
            for one in (
                lone.result(),
                run.task("1").result(),
                run.wait(),
                all_of(run.progress()),
                all_of(run.results()),
            )
        ]
        async for _ in run.progress():
            break

        async def are_at_rest() -> bool:
            trips.clear()
            for _ in range(20):
                await client.connection.run([command("GET", "any")])
            return len(trips) == 20

        with redis.Redis.from_url(server.url) as raw:
            await eventually(lambda: len(raw.pubsub_channels()) == 3, "both groups are watched, and one of no group")
        await eventually(are_at_rest, "all have looked, and wait")
        server.kill()
        start_server(folder=short_tmp_path)

        done, _ = await asyncio.wait(waiting, timeout=30)
        assert done == set(waiting)
        for one in waiting:
            with pytest.raises(NotFoundError, match="is no longer known"):
                one.result()


async def test_a_waiter_raises_when_its_group_was_lost_and_its_key_submitted_again(app: Ceylon) -> None:
    async with app.client() as client:
        group = TaskGroup("g", [Task(role="p")], key="nightly")
        run = await client.submit(group)
        views = run.progress()
        await anext(views)
        with redis.Redis.from_url(app.settings.redis_url) as raw:
            raw.flushall()
        assert (await client.submit(group)).id == run.id

        with pytest.raises(NotFoundError, match="Redis has lost it"):
            await asyncio.wait_for(anext(views), 20)


async def test_results_that_are_lost_while_they_are_read_are_not_taken_for_the_end(app: Ceylon) -> None:
    async with app.client() as client, working(app):
        run = await client.submit(TaskGroup("g", [Task(role="p"), Task(role="p")]))
        await run.wait("all", timeout=20)
        results = run.results()
        await anext(results)
        with redis.Redis.from_url(app.settings.redis_url) as raw:
            raw.flushall()

        with pytest.raises(NotFoundError):
            [result async for result in results]


async def test_a_heartbeat_of_another_version_may_lack_fields(app: Ceylon) -> None:
    async with app.client() as client:
        keys = client.keys
        with redis.Redis.from_url(app.settings.redis_url) as raw:
            raw.sadd(keys.workers, "w")
            raw.set(keys.worker("w"), '{"kind": "worker", "roles": ["p"], "what": 1}')

        (worker,) = await client.workers()
        assert (worker.name, worker.roles, worker.slots, worker.stopping) == ("w", ["p"], 0, False)
        assert await client.missing_roles(["p"]) == []


async def test_a_role_that_nobody_serves_is_refused_on_demand_with_the_nearest(app: Ceylon) -> None:
    async with app.client() as client, working(app, roles=["processor"]):
        await eventually(client.workers, "the worker is registered")
        with pytest.raises(NoWorkerError, match='did you mean "processor"'):
            await client.submit(Task(role="procesor"), require_workers=True)
        assert await client.groups() == []
        await client.submit(Task(role="processor"), require_workers=True)


async def test_cancelling_a_waiting_task_is_at_once_and_a_running_one_is_asked_to_stop(app: Ceylon) -> None:
    async with app.client() as client:
        pending = await client.submit(Task(role="nobody"))
        assert await pending.cancel() == "cancelled"
        assert await pending.cancel() == "ended"
        with pytest.raises(TaskCancelledError):
            await pending.result(timeout=5)
        async with working(app):
            running = await client.submit(Task(role="p", duration=30))

            async def runs() -> bool:
                return await running.status() == "in_progress"

            await eventually(runs, "the task runs")
            assert await running.cancel() == "stopping"
            with pytest.raises(TaskCancelledError, match="cancelled"):
                await running.result(timeout=8)


async def test_a_server_at_its_memory_limit_refuses_new_work_and_is_drained_by_workers(
    start_server: Callable[..., EmbeddedServer], namespace: str
) -> None:
    app = Ceylon(start_server().url, namespace=namespace)
    async with app.client() as client:
        run = await client.submit(TaskGroup("g", [Task(role="p")] * 50))
        with redis.Redis.from_url(app.settings.redis_url) as raw:
            raw.config_set("maxmemory", 1)
        with pytest.raises(QueueFullError, match="memory limit"):
            await client.submit(TaskGroup("h", [Task(role="p")]))
        async with working(app):  # it starts, and goes on, without being able to write a heartbeat
            view = await run.wait("all", timeout=20)
        assert view.counters.completed == 50
        assert [group.name for group in await client.groups()] == ["g"]


JOBS = """
from rq_ceylon import Ceylon

app = Ceylon()


@app.task(role="p")
async def double(number: int) -> int:
    return 2 * number
"""

SCRIPT = """
import asyncio, os, sys
from rq_ceylon import Ceylon, Task

app = Ceylon(sys.argv[1], namespace=sys.argv[2])

@app.task(role="p")
async def double(number: int) -> int:
    return 2 * number

ids = [double.enqueue(number=1).id]

async def one() -> str:
    return (await double.aenqueue(number=2)).id

ids += [asyncio.run(one()), asyncio.run(one())]

async def inside() -> str:
    return double.enqueue(number=3).id

ids.append(asyncio.run(inside()))
read, write = os.pipe()
if os.fork() == 0:
    os.write(write, (double.enqueue(number=4).id + "\\n").encode())
    os._exit(0)
ids.append(os.read(read, 100).decode().strip())
os.wait()
ids.append(double.enqueue(number=5).id)
with app.sync_client() as client:
    ids.append(client.submit(Task(uses="double", arguments={"number": 6})).id)
    print(*ids)
    if len(sys.argv) > 3:
        print(*[client.task(id).result(timeout=20) for id in ids])
"""


def test_sync_async_two_loops_and_a_fork_all_work_with_distinct_ids(redis_url: str, namespace: str) -> None:
    command = [sys.executable, "-m", "rq_ceylon.cli", "worker", "--role", "p", "--redis", redis_url]
    with tempfile.TemporaryDirectory() as folder:
        Path(folder, "jobs.py").write_text(JOBS)
        worker = subprocess.Popen([*command[:4], "jobs:app", *command[4:], "--namespace", namespace], cwd=folder)
        try:
            ran = run_to_end(sys.executable, "-c", SCRIPT, redis_url, namespace, "wait")
        finally:
            worker.terminate()
            worker.wait(30)
    assert ran.returncode == 0, ran.stderr
    ids, results = ran.stdout.splitlines()
    assert len(set(ids.split())) == 7
    assert results == "2 4 4 6 8 10 12"
    assert "Traceback" not in ran.stderr


async def test_a_wait_that_would_block_its_worker_is_refused(
    app: Ceylon,
) -> None:
    double = Task(uses="double", arguments={"number": 4})

    @app.task(role="p", max_attempts=1)
    async def on_the_loop(how: str) -> object:
        with app.sync_client() as client:
            run = client.submit(TaskGroup("inner", [double]))
            ways: dict[str, Callable[[], object]] = {
                "result": lambda: run.task("1").result(timeout=9),
                "wait": lambda: run.wait(timeout=9),
                "results": lambda: list(run.results()),
            }
            return ways[how]()

    @app.task(role="p", max_attempts=1)
    def in_a_thread() -> object:
        with app.sync_client() as client:
            return client.submit(double).result(timeout=9)

    async with working(app), app.client() as client:
        for how in ("result", "wait", "results"):
            with pytest.raises(TaskFailedError, match=r"CeylonError: .* \(on_the_loop\) is async, .*; write `a"):
                await (await client.submit(on_the_loop.bind(how))).result(timeout=20)
        assert await (await client.submit(in_a_thread.bind())).result(timeout=20) == 8


async def test_max_crashes_comes_from_the_task_else_its_group_else_its_handler(app: Ceylon) -> None:
    @app.task(role="p", max_crashes=0)
    async def once() -> None: ...

    @app.task(role="p")
    async def often() -> None: ...

    def limit(task: Task, defaults: Task | None = None) -> bytes:
        return stage(task, app.registry, "a", defaults or Task()).text.split(b"|", 5)[4]

    assert (limit(once.bind()), limit(Task(uses="once")), limit(often.bind())) == (b"0", b"0", b"")
    assert limit(once.using(max_crashes=2).bind()) == b"2"
    assert (limit(once.bind(), Task(max_crashes=5)), limit(Task(max_crashes=0), Task(max_crashes=5))) == (b"5", b"0")


async def test_a_task_of_another_application_keeps_the_rules_of_its_handler(app: Ceylon) -> None:
    other = Ceylon()

    @other.task(role="far", timeout="7s", max_attempts=9, priority="high")
    async def remote(number: int) -> int:
        return number

    def sent(task: Task, registry: Registry | None, defaults: Task | None = None) -> tuple[Any, ...]:
        ready = stage(task, registry, "a", defaults or Task())
        body = from_json(ready.text.split(b"|", 5)[5])
        return ready.role, ready.stream, body.get("timeout"), body.get("max_attempts")

    own = sent(Task(role="far", priority="high", timeout=7, max_attempts=9), None)
    for task in (remote.bind(1), replace(remote.bind(1), metadata={"NaN": "text"})):
        assert sent(task, app.registry) == sent(task, None) == own
    assert sent(remote.bind(1), other.registry) == (*own[:2], None, None)
    assert sent(remote.using(role="q", timeout=1).bind(1), app.registry) == ("q", own[1], 1, 9)
    assert sent(remote.bind(1), app.registry, Task(role="d", timeout=2)) == ("d", own[1], None, 9)
