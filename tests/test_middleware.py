"""What an application puts around its attempts and around the life of its processes."""

from __future__ import annotations

import asyncio
import itertools
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from typing import Any

import cpu_jobs
import pytest
from commands import eventually
from pydantic_core import from_json
from runs import Runs, assigned, error_of

from rq_ceylon.app import Ceylon
from rq_ceylon.attempt import TaskContext
from rq_ceylon.errors import InvalidInputError
from rq_ceylon.handlers import Handler
from rq_ceylon.models import Task, TaskGroup
from rq_ceylon.worker import Worker
from rq_ceylon.worker.children import Children

pytestmark = pytest.mark.anyio

Around = Callable[[TaskContext], AsyncIterator[None]]


@pytest.fixture
async def run() -> AsyncIterator[Callable[..., Awaitable[Any]]]:
    """Runs a function once, as the one task of an application with this middleware; gives the outcome."""
    made: list[Runs] = []

    async def run(function: Callable[..., Any], *around: Around, **rules: Any) -> Any:
        app = Ceylon("redis://127.0.0.1:1")
        for one in around:
            app.middleware(one)
        app.registry.add(Handler("job", function, **rules))
        made.append(Runs(app.registry))
        return await made[-1].run(assigned())

    yield run
    for one in made:
        await one.close()


async def job() -> str:
    return "async"


def plain_job() -> str:
    return "plain"


@pytest.mark.parametrize(("function", "cpu"), [(job, False), (plain_job, False), (cpu_jobs.own_pid, True)])
async def test_middleware_surrounds_every_kind_of_attempt_and_the_first_is_outermost(
    run: Callable[..., Awaitable[Any]], function: Callable[..., Any], cpu: bool
) -> None:
    steps: list[str] = []

    def named(name: str) -> Around:
        async def around(context: TaskContext) -> AsyncIterator[None]:
            steps.append(f"{name} begins {context.id}")
            yield
            steps.append(f"{name} ends")

        return around

    outcome = await run(function, named("outer"), named("inner"), cpu=cpu)

    assert outcome.kind == "completed"
    assert steps == ["outer begins g/t", "inner begins g/t", "inner ends", "outer ends"]


@pytest.mark.parametrize("swallowing", ["outer", "inner"])
async def test_middleware_may_look_at_an_exception_but_not_swallow_it(
    run: Callable[..., Awaitable[Any]], swallowing: str
) -> None:
    seen: list[str] = []

    async def look(context: TaskContext) -> AsyncIterator[None]:
        try:
            yield
        except ValueError as error:
            seen.append(str(error))
            raise

    async def swallow(context: TaskContext) -> AsyncIterator[None]:
        try:
            yield
        except ValueError as error:
            seen.append(str(error))

    async def fail() -> None:
        raise ValueError("bad")

    around = [swallow, look] if swallowing == "outer" else [look, swallow]
    outcome = await run(fail, *around, max_attempts=1)

    assert (outcome.kind, error_of(outcome)["message"]) == ("failed", "bad")
    assert "bad" in seen


async def test_what_middleware_raises_ends_the_attempt_as_the_handler_would(
    run: Callable[..., Awaitable[Any]],
) -> None:
    ran: list[int] = []

    async def refuse(context: TaskContext) -> AsyncIterator[None]:
        raise PermissionError("not this tenant")
        yield

    def work() -> None:
        ran.append(1)

    outcome = await run(work, refuse, retry={PermissionError: None})

    assert (outcome.kind, error_of(outcome)["type"], ran) == ("failed", "PermissionError", [])


async def test_a_middleware_that_hangs_ends_with_the_timeout_of_the_attempt(
    run: Callable[..., Awaitable[Any]],
) -> None:
    async def hang(context: TaskContext) -> AsyncIterator[None]:
        await asyncio.sleep(60)
        yield

    outcome = await run(job, hang, timeout=0.05, max_attempts=1)

    assert (outcome.kind, outcome.reason) == ("failed", "timeout")


# ---- on its way ------------------------------------------------------------------------------------------------------
async def test_what_on_submit_returns_travels_and_does_not_change_a_keyed_group(
    app: Ceylon,
) -> None:
    numbers = itertools.count(1)

    @app.on_submit
    def trace(task: Task) -> dict[str, Any]:
        return {"trace": next(numbers), "by": "hook"}

    @app.task(role="r")
    async def tell(context: TaskContext) -> dict[str, Any]:
        return dict(context.metadata)

    group = TaskGroup("g", [Task(uses="tell", role="r", metadata={"by": "task"})], key="once")
    async with app.client() as client:
        single = await client.submit(tell.bind())
        first, second = await client.submit(group), await client.submit(group)
        settings = app.settings
        await Worker(
            settings.redis_url, namespace=settings.namespace, registry=app.registry, roles=["r"], burst=True
        ).run()

        assert (first.id, second.repeated) == (second.id, True)
        assert await single.result(10) == {"trace": 1, "by": "hook"}
        assert [one.value async for one in first.results()] == [{"trace": 2, "by": "task"}]


async def test_an_on_submit_hook_that_returns_no_metadata_is_refused(app: Ceylon) -> None:
    @app.on_submit
    def trace(task: Task) -> Any:
        return "trace"

    async with app.client() as client:
        with pytest.raises(InvalidInputError, match="on_submit gave 'trace'"):
            await client.submit(Task(uses="echo"))


# ---- the life of a process -------------------------------------------------------------------------------------------
async def test_a_lifespan_is_entered_once_and_its_value_reaches_each_task(app: Ceylon) -> None:
    steps: list[str] = []

    @app.lifespan
    async def pool() -> AsyncIterator[list[str]]:
        steps.append("set up")
        yield steps
        steps.append("taken down")

    @app.task(role="r")
    async def use(context: TaskContext) -> None:
        context.state.append("used")

    async with app.client() as client:
        for _ in range(2):
            await client.submit(use.bind())
        settings = app.settings
        await Worker(
            settings.redis_url, namespace=settings.namespace, registry=app.registry, roles=["r"], burst=True
        ).run()

    assert steps == ["set up", "used", "used", "taken down"]


def test_a_second_lifespan_is_refused() -> None:
    app = Ceylon("redis://127.0.0.1:1")

    @asynccontextmanager
    async def one() -> AsyncIterator[None]:
        yield

    @asynccontextmanager
    async def another() -> AsyncIterator[None]:
        yield

    app.lifespan(one)
    with pytest.raises(InvalidInputError, match="put both into one"):
        app.lifespan(another)


async def test_a_child_process_has_the_context_the_lifespan_and_tells_the_progress() -> None:
    app = cpu_jobs.app
    executor = Runs(app.registry)
    contexts: list[TaskContext] = []
    try:
        outcome = await executor.run(assigned(uses="inspect", metadata={"a": 1}, attempt=2), begun=contexts.append)
    finally:
        await executor.close()

    assert outcome.kind == "completed", outcome.summary
    assert from_json(outcome.blob) == {"id": "g/t", "attempt": 2, "metadata": {"a": 1}, "state": "lived"}
    assert contexts[0].reported == (0.5, "half")


async def test_a_child_process_is_replaced_after_as_many_tasks_as_it_may_run(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("rq_ceylon.worker.wear.JITTER", 0)
    executor = Runs(cpu_jobs.app.registry, max_tasks=2)
    executor.registry.add(Handler("pid", cpu_jobs.own_pid, cpu=True))
    try:
        pids = [from_json((await executor.run(assigned(uses="pid"))).blob) for _ in range(4)]
    finally:
        await executor.close()

    assert pids[0] == pids[1] != pids[2] == pids[3]


async def test_a_child_process_is_replaced_once_it_takes_more_memory_than_it_may() -> None:
    children = Children(1, max_memory=1)
    handler: Handler[..., Any] = Handler("pid", cpu_jobs.own_pid, cpu=True)
    first, second = [await one_call(children, handler) for _ in range(2)]

    assert first != second
    await eventually(lambda: len(children._living) == 0, "both have ended by themselves")
    await children.close()


async def one_call(children: Children, handler: Handler[..., Any]) -> bytes:
    async with children.places, await children.take() as child:
        return await child.call(handler, {}, context_of())


def context_of() -> TaskContext:
    return TaskContext(
        group_id="g", task_id="t", uses="pid", role="r", worker="w", attempt=1, max_attempts=1, crashes=0, fence=1
    )
