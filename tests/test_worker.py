"""A worker in this process, against a real server: what it runs, in which order, and what it leaves to others."""

from __future__ import annotations

import asyncio
import json
import threading
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from functools import partial
from typing import Any

import pytest
from bench import Bench
from commands import LIMIT_S, eventually

from rq_ceylon.app import Ceylon
from rq_ceylon.attempt import Backoff, TaskContext
from rq_ceylon.client import Client
from rq_ceylon.errors import TaskCancelledError, TaskFailedError
from rq_ceylon.models import Task, TaskGroup, TaskStatus
from rq_ceylon.store import queries, transitions
from rq_ceylon.store.connection import ThreadConnection
from rq_ceylon.store.scripts import command
from rq_ceylon.worker import Worker

pytestmark = pytest.mark.anyio


def worker_of(app: Ceylon, *roles: str, **options: Any) -> Worker:
    settings = app.settings
    return Worker(
        settings.redis_url, registry=app.registry, namespace=settings.namespace, roles=roles or ["r"], **options
    )


@asynccontextmanager
async def running(worker: Worker) -> AsyncIterator[asyncio.Task[None]]:
    """The worker at work; killed at the end, should it still run."""
    task = asyncio.create_task(worker.run())
    try:
        yield task
    finally:
        worker.kill()
        async with asyncio.timeout(LIMIT_S):
            await task


def tasks(count: int, **fields: Any) -> list[Task]:
    return [Task(id=f"t{number}", role="r", **fields) for number in range(count)]


# ---- what runs, and in which order -----------------------------------------------------------------------------------
async def test_the_result_of_a_task_that_stores_none_is_none(app: Ceylon, client: Client) -> None:
    @app.task(role="r", store_result=False)
    async def shout(text: str) -> str:
        return text.upper()

    group = await client.submit(TaskGroup("g", [shout.bind("a")]))
    await asyncio.wait_for(worker_of(app, burst=True).run(), LIMIT_S)

    assert await shout("a") == "A"
    assert [result.value async for result in group.results()] == [None]
    with app.sync_client() as sync:
        task = sync.submit(shout.bind("b"))
        await asyncio.wait_for(worker_of(app, burst=True).run(), LIMIT_S)
        assert task.result(timeout=LIMIT_S) is None


async def test_a_burst_worker_runs_all_there_is_once_and_ends(app: Ceylon, client: Client) -> None:
    seen: list[int] = []

    @app.task(role="r")
    async def note(number: int) -> int:
        seen.append(number)
        return number

    @app.task(role="r")
    def double(number: int) -> int:
        return 2 * number

    group = await client.submit(TaskGroup("g", [*(note.bind(n) for n in range(700)), double.bind(21)]))
    worker = worker_of(app, burst=True)

    await asyncio.wait_for(worker.run(), LIMIT_S)

    view = await group.view()
    assert (view.outcome, view.counters.completed, view.counters.attempts) == ("completed", 701, 701)
    assert sorted(seen) == list(range(700))
    assert await group.task("701").result() == 42
    assert worker.completed == 701
    (role,) = await client.roles()
    assert (role.queued, role.delivered, role.workers, role.totals["completed"]) == (0, 0, 0, 701)
    assert await client.workers() == []


async def test_a_worker_serves_its_roles_and_no_other(app: Ceylon, client: Client) -> None:
    works = [Task(id=role, role=role) for role in ("a", "b", "c")]
    group = await client.submit(TaskGroup("g", works))

    await asyncio.wait_for(worker_of(app, "a", "b", burst=True).run(), LIMIT_S)

    status = {task.task_id: task.status async for task in group.tasks()}
    assert status == {"a": TaskStatus.COMPLETED, "b": TaskStatus.COMPLETED, "c": TaskStatus.PENDING}


async def test_high_goes_before_normal_before_low(app: Ceylon, client: Client) -> None:
    order: list[str] = []

    @app.task(role="r")
    async def note(context: TaskContext) -> None:
        order.append(context.task_id)

    works = [
        note.using(id=f"{priority}{number}", priority=priority).bind()
        for priority in ("low", "normal", "high")
        for number in range(2)
    ]
    await client.submit(TaskGroup("g", works))

    await asyncio.wait_for(worker_of(app, slots=1, burst=True).run(), LIMIT_S)

    assert sorted(order) == sorted(task.id or "" for task in works)
    # Every eighth turn begins with another stream, so low is not last for certain; high is first.
    assert set(order[:2]) == {"high0", "high1"} or order.index("high1") < order.index("low1")
    assert order.index("high0") < order.index("normal0") < order.index("normal1")


async def test_a_delayed_task_starts_when_it_is_due_and_holds_up_nothing(app: Ceylon, client: Client) -> None:
    group = await client.submit(TaskGroup("g", [Task(role="r", delay=0.3), Task(role="r", delay="1h"), Task(role="r")]))
    async with running(worker_of(app)):
        for name in ("1", "3"):
            await group.task(name).result(LIMIT_S)
        assert await group.task("2").status() is TaskStatus.PENDING

    view, delayed = await group.view(), (await group.task("1").view()).result
    assert view.created_ms
    assert delayed
    assert delayed.started_ms
    assert delayed.started_ms - view.created_ms >= 300


async def test_a_task_not_started_in_time_is_cancelled_as_expired(app: Ceylon, client: Client) -> None:
    group = await client.submit(TaskGroup("g", [Task(role="r", expires=0.001), Task(role="r", expires=60)]))
    await asyncio.sleep(0.01)

    await asyncio.wait_for(worker_of(app, burst=True).run(), LIMIT_S)

    found = {task.task_id: (task.status, task.reason) async for task in group.tasks()}
    assert found["1"] == (TaskStatus.CANCELLED, "expired")
    assert found["2"][0] is TaskStatus.COMPLETED


async def test_results_reach_the_tasks_that_need_them(app: Ceylon, client: Client) -> None:
    @app.task(role="r")
    async def give(number: int) -> int:
        return number

    @app.task(role="r")
    def total(context: TaskContext) -> int:
        return sum(context.needs.values())

    works = [give.using(id="a").bind(1), give.using(id="b").bind(2), total.using(id="c", needs=["a", "b"]).bind()]
    group = await client.submit(TaskGroup("g", works))

    await asyncio.wait_for(worker_of(app, burst=True).run(), LIMIT_S)

    assert await group.task("c").result() == 3


# ---- failures --------------------------------------------------------------------------------------------------------
async def test_a_failing_task_is_retried_until_it_failed_with_its_traceback(app: Ceylon, client: Client) -> None:
    attempts: list[int] = []

    @app.task(role="r", max_attempts=3, backoff=Backoff(first="20ms", jitter=False))
    def fail(context: TaskContext) -> None:
        attempts.append(context.attempt)
        raise ValueError(f"attempt {context.attempt}")

    @app.task(role="r", backoff=Backoff(first="20ms"))
    async def recover(context: TaskContext) -> int:
        if context.attempt == 1:
            raise ValueError
        return context.attempt

    failing, recovering = await client.submit(fail.bind()), await client.submit(recover.bind())
    async with running(worker_of(app)):
        with pytest.raises(TaskFailedError, match="ValueError: attempt 3") as caught:
            await failing.result(LIMIT_S)
        assert await recovering.result(LIMIT_S) == 2

    assert attempts == [1, 2, 3]
    assert caught.value.reason == "error"
    assert 'raise ValueError(f"attempt {context.attempt}")' in caught.value.traceback
    view = await failing.view()
    assert (view.status, view.attempt) == (TaskStatus.FAILED, 3)


async def test_a_task_that_survives_no_crash_does_not_run_again_after_a_stop(app: Ceylon, client: Client) -> None:
    starts: list[str] = []

    @app.task(role="r", max_crashes=0)
    async def once() -> None:
        starts.append("once")
        await asyncio.Event().wait()

    @app.task(role="r")
    async def again() -> None:
        starts.append("again")
        if starts.count("again") == 1:
            await asyncio.Event().wait()

    handles = [await client.submit(task.bind()) for task in (once, again)]
    worker = worker_of(app, grace_s=0)
    async with running(worker) as first:
        await eventually(lambda: len(starts) == 2, "both run")
        worker.stop()
        await first

    await asyncio.wait_for(worker_of(app, burst=True).run(), LIMIT_S)

    with pytest.raises(TaskFailedError) as caught:
        await handles[0].result(LIMIT_S)
    assert caught.value.reason == "poison"
    assert await handles[1].result(LIMIT_S) is None
    assert sorted(starts) == ["again", "again", "once"]


async def test_delay_and_expiry_of_a_group_that_waits_for_another_count_from_its_start(
    app: Ceylon, client: Client
) -> None:
    @app.task(role="r")
    async def job() -> None: ...

    first = await client.submit(TaskGroup("first", [job.bind()]))
    tasks = [job.using(id="soon", expires=2).bind(), job.using(id="late", delay=1).bind()]
    group = await client.submit(TaskGroup("second", tasks, depends_on=[first.id]))
    assert (await group.task("late").view()).due_ms is None
    await asyncio.sleep(2.1)  # the first has not even begun

    async with running(worker_of(app)):
        view = await group.wait("all", LIMIT_S)

    assert view.counters.completed == 2
    began = (await first.task("1").view()).result
    late = (await group.task("late").view()).started_ms
    assert began is not None
    assert (late or 0) - (began.ended_ms or 0) >= 1000


async def test_the_error_of_the_attempt_before_is_shown_until_the_task_ends(app: Ceylon, client: Client) -> None:
    may_end = asyncio.Event()

    @app.task(role="r", backoff=Backoff(first="1s", jitter=False))
    async def flaky(context: TaskContext) -> None:
        if context.attempt == 1:
            raise ValueError("not yet")
        await may_end.wait()

    handle = await client.submit(flaky.bind())
    seen: list[Any] = []

    async def shown(status: TaskStatus) -> bool:
        view = await handle.view()
        seen.append(view.last_error)
        return view.attempt == 2 and view.status is status

    async with running(worker_of(app)):
        for status in (TaskStatus.PENDING, TaskStatus.IN_PROGRESS):
            await eventually(partial(shown, status), f"its second attempt is {status}")
            assert (seen[-1]["type"], seen[-1]["message"]) == ("ValueError", "not yet")
            assert 'raise ValueError("not yet")' in seen[-1]["traceback"]
        may_end.set()
        await handle.result(LIMIT_S)

    assert seen[0] is None
    assert (await handle.view()).last_error is None


async def test_a_handler_that_leaves_does_not_take_the_worker_with_it(app: Ceylon, client: Client) -> None:
    @app.task(role="r", max_attempts=1)
    def leave() -> None:
        raise SystemExit(1)

    @app.task(role="r", max_attempts=1)
    async def leave_too() -> None:
        raise SystemExit(1)

    handles = [await client.submit(leave.bind()), await client.submit(leave_too.bind())]

    await asyncio.wait_for(worker_of(app, burst=True).run(), LIMIT_S)

    for handle in handles:
        with pytest.raises(TaskFailedError, match="SystemExit"):
            await handle.result(LIMIT_S)


async def test_a_task_unknown_here_goes_to_a_worker_that_knows_it_in_a_second(app: Ceylon, client: Client) -> None:
    newer = Ceylon(app.settings.redis_url)

    @newer.task(role="r")
    async def renamed() -> str:
        return "known"

    group = await client.submit(TaskGroup("g", [Task(id=str(n), role="r", uses="renamed") for n in range(5)]))

    async def waiting() -> bool:
        (count,) = await client.connection.run([command("ZCARD", client.keys.role_part("r", "by_name"))])
        return bool(count == 5)

    async with running(worker_of(app)), running(worker_of(app)):
        await eventually(waiting, "the tasks wait by their name")
        (role,) = [role for role in await client.roles() if role.name == "r"]
        assert (role.queued, role.delivered, role.delayed) == (5, 0, 0)
        view = await group.task("1").view()
        assert (view.status, view.attempt, view.due_ms) == (TaskStatus.PENDING, 1, None)
        knowing = Worker(app.settings.redis_url, registry=newer.registry, namespace=client.keys.namespace, roles=["r"])
        async with running(knowing):
            assert (await group.wait("all", LIMIT_S)).counters.completed == 5
            # Both kinds are there now: whoever is given it first, it starts soon.
            for _ in range(5):
                handle = await client.submit(Task(role="r", uses="renamed"))
                assert await handle.result(timeout=3) == "known"
    entries = await client.connection.run([command("HLEN", client.keys.role_part("r", "names"))])
    assert entries == [0]


# ---- cancelling ------------------------------------------------------------------------------------------------------
async def test_a_task_whose_data_no_client_of_ours_wrote_fails_and_holds_up_nothing(
    app: Ceylon, client: Client
) -> None:
    async with running(worker_of(app, slots=1)):
        run = await client.submit(TaskGroup("foreign", tasks(2, delay="1h")))
        text = "r|2||||" + json.dumps({"needs": 5})
        keys = client.keys
        await client.connection.run([command("HSET", keys.group_part(run.id, "tasks"), "t0", text)])
        entry = f"{run.id} t0 1"
        await client.connection.run([command("XADD", keys.role_part("r", "normal"), "*", "task", entry)])
        with pytest.raises(TaskFailedError, match="invalid"):
            await run.task("t0").result(timeout=LIMIT_S)
        await run.cancel()
        assert (await run.wait("all", timeout=LIMIT_S)).counters.failed == 1


async def test_cancelling_stops_a_running_task_and_a_running_group(app: Ceylon, client: Client) -> None:
    started: set[str] = set()
    ended: set[str] = set()

    @app.task(role="r")
    async def sleep(context: TaskContext) -> None:
        started.add(context.task_id)
        try:
            await asyncio.sleep(60)
        finally:
            ended.add(context.task_id)

    works = [sleep.using(id=name).bind() for name in ("a", "b", "c", "d")]
    group = await client.submit(TaskGroup("g", works))
    async with running(worker_of(app, slots=3)):
        await eventually(lambda: len(started) == 3, "three tasks run")
        (first, *_) = started

        assert await group.task(first).cancel() == "stopping"
        with pytest.raises(TaskCancelledError):
            await group.task(first).result(3)
        assert first in ended
        await eventually(lambda: len(started) == 4, "the fourth took its place")
        await group.cancel()
        view = await group.wait("all", 3)

    assert (view.outcome, view.counters.cancelled) == ("cancelled", 4)
    assert ended == started


# ---- stopping --------------------------------------------------------------------------------------------------------
async def test_a_warm_stop_waits_for_what_runs_and_takes_nothing_new(app: Ceylon, client: Client) -> None:
    started, may_end = asyncio.Event(), asyncio.Event()

    @app.task(role="r")
    async def wait() -> str:
        started.set()
        await may_end.wait()
        return "done"

    group = await client.submit(TaskGroup("g", [wait.bind(), wait.bind()]))
    worker = worker_of(app, slots=1)
    async with running(worker) as task:
        await started.wait()
        worker.stop()

        async def is_stopping() -> bool:
            return worker.turns.stopping and not worker.turns.is_due(0)

        await eventually(is_stopping, "the worker is stopping")
        assert not task.done()
        may_end.set()
        async with asyncio.timeout(LIMIT_S):
            await asyncio.shield(task)

    view = await group.view()
    assert (view.counters.completed, view.counters.pending, view.counters.attempts) == (1, 1, 1)
    (role,) = await client.roles()
    assert (role.queued, role.delivered) == (1, 0)


async def test_a_worker_that_is_lost_while_it_stops_counts_no_crash(app: Ceylon, client: Client, bench: Bench) -> None:
    may_end = asyncio.Event()

    @app.task(role="r")
    async def wait() -> None:
        await may_end.wait()

    group = await client.submit(TaskGroup("g", [wait.bind()]))
    worker = worker_of(app)
    async with running(worker):
        await eventually(lambda: len(worker.turns.running()) == 1, "the task runs")
        worker.stop()

        def is_noted() -> bool:
            claim: str = bench.redis.hget(bench.keys.group_part(group.id, "claims"), "1")
            return claim.startswith("s|")

        await eventually(is_noted, "the record says that its worker is stopping")
        bench.run(transitions.release_all(bench.keys, "r", worker.name))  # as its neighbours would, were it dead
        (delivery,) = bench.fetch("other", role="r")
        assert bench.claim("other", delivery) == ["GRANTED"]
        assert (await group.view()).counters.crashes == 0
        may_end.set()


async def test_what_is_fetched_when_the_stop_comes_is_given_back_unclaimed(app: Ceylon, client: Client) -> None:
    group = await client.submit(TaskGroup("g", tasks(1)))
    worker = worker_of(app)
    on_answer = worker.lanes._on_answer

    def stop_once_fetched() -> None:
        on_answer()
        if worker.turns.held:
            worker.stop()

    worker.lanes._on_answer = stop_once_fetched
    await asyncio.wait_for(worker.run(), LIMIT_S)

    counters = (await group.view()).counters
    assert (counters.pending, counters.attempts) == (1, 0)


async def test_after_the_grace_another_worker_finishes_what_was_given_back(app: Ceylon, client: Client) -> None:
    seen: list[tuple[str, int, int]] = []

    @app.task(role="r")
    async def slow(context: TaskContext) -> str:
        seen.append((context.worker, context.attempt, context.crashes))
        if len(seen) == 1:
            await asyncio.sleep(60)
        return context.worker

    handle = await client.submit(slow.bind())
    first, second = worker_of(app, grace_s=0.2), worker_of(app)
    async with running(first) as task:
        await eventually(lambda: len(seen) == 1, "the task runs")
        stopped = time.monotonic()
        first.stop()
        async with asyncio.timeout(LIMIT_S):
            await asyncio.shield(task)
        assert 0.2 <= time.monotonic() - stopped < 20  # by itself the grace is longer
    async with running(second):
        assert await handle.result(LIMIT_S) == second.name

    assert seen == [(first.name, 1, 0), (second.name, 1, 0)]


async def test_hooks_run_once_before_and_once_after_all_tasks(app: Ceylon, client: Client) -> None:
    order: list[str] = []

    @app.on_start
    async def start() -> None:
        order.append("start")

    @app.on_stop
    def stop() -> None:
        order.append("stop")

    @app.task(role="r")
    async def note() -> None:
        order.append("task")

    await client.submit(TaskGroup("g", [note.bind(), note.bind()]))

    await asyncio.wait_for(worker_of(app, burst=True).run(), LIMIT_S)

    assert order == ["start", "task", "task", "stop"]


# ---- fairness and leases ---------------------------------------------------------------------------------------------
async def test_a_worker_with_one_long_task_holds_back_nothing_that_an_idle_one_could_run(
    app: Ceylon, client: Client
) -> None:
    may_end, on = asyncio.Event(), []

    @app.task(role="r")
    async def long() -> None:
        on.append("long")
        await may_end.wait()

    @app.task(role="r")
    async def short(context: TaskContext) -> str:
        return context.worker

    busy, idle = worker_of(app, slots=1), worker_of(app, slots=1)
    async with running(busy):
        # Short ones first: they are what makes a worker read ahead.
        await (await client.submit(TaskGroup("warm", [short.bind() for _ in range(20)]))).wait("all", LIMIT_S)
        blocker = await client.submit(TaskGroup("long", [long.bind()]))
        await eventually(lambda: on == ["long"], "the long task runs")
        group = await client.submit(TaskGroup("short", [short.bind() for _ in range(20)]))
        async with running(idle):
            view = await group.wait("all", 8)
        results = [result.value async for result in group.results()]
        may_end.set()
        await blocker.wait("all", LIMIT_S)

    assert view.counters.completed == 20
    assert results == [idle.name] * 20


async def test_workers_share_plain_functions_by_their_threads_and_what_waits_is_pending(
    app: Ceylon, client: Client
) -> None:
    may_end = threading.Event()

    @app.task(role="r")
    def block(context: TaskContext) -> str:
        may_end.wait(LIMIT_S)
        return context.worker

    @app.task(role="r")
    async def quick() -> None: ...

    first, second = worker_of(app, slots=30, threads=4), worker_of(app, slots=30, threads=4)
    blocking = await client.submit(TaskGroup("blocking", [block.bind() for _ in range(20)]))
    async with running(first), running(second):

        async def are_shared() -> bool:
            counters = (await blocking.view()).counters
            return (counters.in_progress, counters.pending) == (8, 12)

        await eventually(are_shared, "each worker runs as many as it has threads")
        await (await client.submit(quick.bind())).result(LIMIT_S)
        assert await are_shared()
        may_end.set()
        view = await blocking.wait("all", LIMIT_S)

    ran_by = [result.value async for result in blocking.results()]
    assert view.counters.completed == 20
    assert min(ran_by.count(worker.name) for worker in (first, second)) >= 4


async def test_a_worker_drains_and_ends_after_as_many_tasks_as_it_may_run(
    app: Ceylon, client: Client, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("rq_ceylon.worker.wear.JITTER", 0)
    group = await client.submit(TaskGroup("g", [Task(uses="echo", role="r") for _ in range(5)]))
    worker = worker_of(app, slots=1, max_tasks=3)

    await asyncio.wait_for(worker.run(), LIMIT_S)

    counters = (await group.view()).counters
    assert (worker.exit_code, worker.completed, counters.completed, counters.pending) == (0, 3, 3, 2)


@pytest.mark.parametrize("most", [0, 1])
async def test_a_worker_drains_and_ends_with_7_once_too_much_hangs(
    app: Ceylon, client: Client, monkeypatch: pytest.MonkeyPatch, most: int
) -> None:
    monkeypatch.setattr("rq_ceylon.worker.wear.JITTER", 0)
    may_end = threading.Event()

    @app.task(role="r", timeout=0.05, max_attempts=1)
    def block() -> None:
        may_end.wait(LIMIT_S)

    group = await client.submit(TaskGroup("g", [block.bind() for _ in range(4)]))
    worker = worker_of(app, slots=1, threads=1, max_hung_threads=most)
    try:
        await asyncio.wait_for(worker.run(), LIMIT_S)
    finally:
        may_end.set()

    counters = (await group.view()).counters
    assert (worker.exit_code, counters.failed, counters.pending) == (7, most + 1, 3 - most)


async def test_a_worker_drains_and_ends_once_it_takes_more_memory_than_it_may(app: Ceylon, client: Client) -> None:
    await client.submit(TaskGroup("g", [Task(uses="echo", role="r") for _ in range(3)]))
    worker = worker_of(app, slots=1, max_memory=1)

    await asyncio.wait_for(worker.run(), LIMIT_S)

    assert (worker.exit_code, worker.completed) == (0, 1)


async def test_a_thread_that_outlived_its_timeout_takes_nothing_from_other_tasks(app: Ceylon, client: Client) -> None:
    may_end = threading.Event()

    @app.task(role="r", timeout=0.05, max_attempts=1)
    def block() -> None:
        may_end.wait(LIMIT_S)

    @app.task(role="r")
    def short() -> None: ...

    blocked = await client.submit(block.bind())
    worker = worker_of(app, slots=1, threads=1)
    async with running(worker):
        with pytest.raises(TaskFailedError, match="no result within"):
            await blocked.result(LIMIT_S)
        assert worker.executor.hung == 1
        await (await client.submit(short.bind())).result(LIMIT_S)
        await worker.background._beat()
        assert [(view.hung, view.is_exhausted) for view in await client.workers()] == [(1, True)]
        may_end.set()


async def test_a_task_that_takes_longer_than_the_lease_keeps_its_worker(
    app: Ceylon, client: Client, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also the first task after the start, and on a worker that asked for a longer lease than its role has."""
    monkeypatch.setattr("rq_ceylon.worker.turn.UNCLAIMED_S", 0)  # so long it would be kept without being begun
    ran: list[str] = []

    @app.task(role="r")
    async def work(context: TaskContext) -> str:
        ran.append(context.worker)
        await asyncio.sleep(context.duration)
        return context.worker

    first, second = worker_of(app, lease_s=0.3, slots=1), worker_of(app, slots=1)
    async with running(first):
        await eventually(lambda: first.leases.lease_s == 0.3, "the role's lease is the short one")
        async with running(second):
            group = await client.submit(TaskGroup("g", [Task(uses="work", role="r", duration=1.5)]))
            view = await group.wait("all", LIMIT_S)

    assert second.turns.lease_ms == 300
    assert (view.counters.attempts, view.counters.crashes) == (1, 0)
    assert len(ran) == 1


async def test_a_round_of_renewals_that_breaks_does_not_end_the_rounds(
    app: Ceylon, client: Client, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The thread ended with the first unforeseen error, and from then on every lease ran out under its task."""

    @app.task(role="r")
    async def work(context: TaskContext) -> None:
        await asyncio.sleep(context.duration)

    worker = worker_of(app, lease_s=0.3)
    renew = worker.leases.renew

    def break_once(connection: ThreadConnection) -> None:
        monkeypatch.setattr(worker.leases, "renew", renew)
        raise ValueError("unforeseen")

    monkeypatch.setattr(worker.leases, "renew", break_once)
    async with running(worker):
        await eventually(lambda: worker.leases.renew == renew, "a round has broken")
        group = await client.submit(TaskGroup("g", [Task(uses="work", role="r", duration=1)]))
        async with running(worker_of(app)):
            view = await group.wait("all", LIMIT_S)

    assert (view.counters.attempts, view.counters.crashes) == (1, 0)


async def test_a_task_whose_lease_is_lost_before_it_begins_is_not_run_and_not_kept(
    app: Ceylon, client: Client, monkeypatch: pytest.MonkeyPatch
) -> None:
    ran: list[str] = []

    @app.task(role="r")
    async def note(context: TaskContext) -> None:
        ran.append(context.task_id)

    worker = worker_of(app, lease_s=0.3)
    read = queries.result_texts

    async def losing(*args: Any) -> Any:
        found = await read(*args)
        monkeypatch.setattr(queries, "result_texts", read)
        (held,) = worker.turns.running()
        worker._lost("r", held.delivery.entry)
        return found

    monkeypatch.setattr(queries, "result_texts", losing)
    async with running(worker):
        group = await client.submit(TaskGroup("g", [Task(uses="note", id="a"), Task(uses="note", id="b", needs=["a"])]))
        view = await group.wait("all", LIMIT_S)

    assert ran == ["a", "b"]
    assert (view.counters.completed, view.counters.attempts, view.counters.crashes) == (2, 3, 1)


async def test_what_many_tasks_need_is_read_once_and_each_gets_values_of_its_own(
    app: Ceylon, client: Client, monkeypatch: pytest.MonkeyPatch
) -> None:
    @app.task(role="r")
    async def give() -> list[int]:
        return [1]

    @app.task(role="r")
    async def take(context: TaskContext) -> int:
        context.needs["a"].append(2)
        return sum(context.needs["a"])

    reads, read = [], queries.result_texts

    async def counting(*args: Any) -> Any:
        reads.append(args[-1])
        return await read(*args)

    monkeypatch.setattr(queries, "result_texts", counting)
    async with running(worker_of(app)):
        tasks = [give.using(id="a").bind(), *(take.using(needs=["a"]).bind() for _ in range(100))]
        group = await client.submit(TaskGroup("g", tasks))
        await group.wait("all", LIMIT_S)
        values = {result.value async for result in group.results() if result.task_id != "a"}

    assert values == {3}
    assert {tuple(read) for read in reads} == {("a",)}
    assert len(reads) < 50


def stall(worker: Worker, monkeypatch: pytest.MonkeyPatch) -> Callable[[], None]:
    """From now on the worker neither renews nor fetches, as if its process were frozen. Returns how to wake it."""
    renew, fetches = worker.leases.renew, worker.turns._fetches
    monkeypatch.setattr(worker.leases, "renew", lambda connection: None)
    monkeypatch.setattr(worker.turns, "_fetches", lambda free: [])

    def wake() -> None:
        monkeypatch.setattr(worker.leases, "renew", renew)
        monkeypatch.setattr(worker.turns, "_fetches", fetches)

    return wake


async def test_a_stalled_worker_that_wakes_after_its_lease_takes_nothing_back(
    app: Ceylon, client: Client, monkeypatch: pytest.MonkeyPatch
) -> None:
    may_end, ran, cancelled = asyncio.Event(), [], []

    @app.task(role="r")
    async def work(context: TaskContext) -> str:
        ran.append(context.worker)
        try:
            await may_end.wait()
        except asyncio.CancelledError:
            cancelled.append(context.worker)
            raise
        return context.worker

    stalled, other = worker_of(app, lease_s=1, slots=2), worker_of(app, lease_s=1, slots=2)
    handle = await client.submit(work.bind())
    async with running(stalled):
        await eventually(lambda: ran == [stalled.name], "the task runs on the worker that stalls")
        wake = stall(stalled, monkeypatch)
        async with running(other):
            await eventually(lambda: len(ran) == 2, "another worker runs it")
            wake()
            await eventually(lambda: cancelled == [stalled.name], "the first one is told that it lost it")
            may_end.set()

            assert await handle.result(LIMIT_S) == other.name
            await eventually(lambda: not stalled.turns.held and not other.turns.held, "nobody holds it")

    assert ran == [stalled.name, other.name]
    await assert_counted_once(client, stalled, other)
    counters = (await client.group(handle.id.partition("/")[0]).view()).counters
    assert (counters.attempts, counters.crashes) == (2, 1)


async def test_what_a_stalled_worker_finishes_after_its_lease_does_not_count(
    app: Ceylon, client: Client, monkeypatch: pytest.MonkeyPatch
) -> None:
    may_end, ran = asyncio.Event(), []

    @app.task(role="r")
    async def work(context: TaskContext) -> str:
        ran.append(context.worker)
        if len(ran) == 1:
            await may_end.wait()
        return context.worker

    stalled, other = worker_of(app, lease_s=1, slots=2), worker_of(app, lease_s=1, slots=2)
    handle = await client.submit(work.bind())
    async with running(stalled):
        await eventually(lambda: ran == [stalled.name], "the task runs on the worker that stalls")
        wake = stall(stalled, monkeypatch)
        async with running(other):
            assert await handle.result(LIMIT_S) == other.name

            may_end.set()
            wake()
            await eventually(lambda: not stalled.turns.held and not stalled._running, "the stalled worker gave up")

    assert ran == [stalled.name, other.name]
    assert await handle.result(LIMIT_S) == other.name
    await assert_counted_once(client, other)


async def assert_counted_once(client: Client, *workers: Worker) -> None:
    (role,) = await client.roles()
    assert (role.totals["completed"], role.delivered, role.queued) == (1, 0, 0)
    counts = [*[0] * (len(workers) - 1), 1]
    await eventually(lambda: [worker.completed for worker in workers] == counts, "the last one counted it")


async def test_what_a_handler_says_of_its_progress_is_seen_while_it_runs(app: Ceylon, client: Client) -> None:
    seen = asyncio.Event()

    @app.task(role="r")
    async def slow(context: TaskContext) -> None:
        context.progress(0.4, "resizing")
        await seen.wait()

    handle = await client.submit(slow.bind())
    async with running(worker_of(app, lease_s=0.5)):

        async def is_told() -> bool:
            return (await handle.view()).progress == (0.4, "resizing")

        await eventually(is_told, "the progress is told")
        seen.set()
        await handle.result(timeout=LIMIT_S)
    assert (await handle.view()).progress == (None, "")


async def test_a_task_that_no_worker_has_known_for_an_hour_fails(app: Ceylon, client: Client) -> None:
    group = await client.submit(TaskGroup("g", [Task(id=name, uses=name, role="r") for name in ("old", "new")]))
    async with running(worker_of(app)):
        await unknown_for_an_hour(client, "old")
        with pytest.raises(TaskFailedError, match=r"no worker of role 'r' .* in an hour; .* as 'old'") as failed:
            await group.task("old").result(timeout=LIMIT_S)
        assert failed.value.reason == "unroutable"
    assert await group.task("new").status() is TaskStatus.PENDING


async def test_a_task_known_to_a_live_worker_that_has_not_asked_for_an_hour_waits_another(
    app: Ceylon, client: Client
) -> None:
    facts = {"kind": "worker", "roles": ["r"], "task_names": ["old"]}
    await client.connection.run(transitions.heartbeat(client.keys, "busy", facts, ttl_ms=60_000))
    handle = await client.submit(Task(uses="old", role="r"))
    async with running(worker_of(app)):
        long_ago_ms = await unknown_for_an_hour(client, "old")

        async def is_postponed() -> bool:
            since_ms = await queries.waiting_since_ms(client.connection, client.keys, "r", "old")
            return since_ms is not None and since_ms > long_ago_ms

        await eventually(is_postponed, "the hour begins anew")
    assert await handle.status() is TaskStatus.PENDING


async def unknown_for_an_hour(client: Client, name: str) -> int:
    """Let a task wait for a worker that knows it, and have it waited for an hour. Returns since when."""

    async def is_waiting() -> bool:
        return await queries.waiting_since_ms(client.connection, client.keys, "r", name) is not None

    await eventually(is_waiting, f"{name} waits for a worker that knows it")
    long_ago_ms = await queries.server_ms(client.connection, client.keys) - transitions.UNROUTABLE_MS
    await client.connection.run([transitions.postpone_overdue(client.keys, "r", name, long_ago_ms)])
    return long_ago_ms
