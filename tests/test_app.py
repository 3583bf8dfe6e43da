"""The application object: registering, making tasks of functions, and the side without await."""

from __future__ import annotations

import asyncio
import inspect
import os
import sys
import threading
import warnings
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import date
from functools import partial
from typing import Any

import pytest
import redis
from commands import run_to_end

from rq_ceylon import (
    Backoff,
    Ceylon,
    CeylonError,
    GroupView,
    InvalidInputError,
    RedisError,
    Task,
    TaskFailedError,
    TaskGroup,
    WaitTimeoutError,
    Worker,
)
from rq_ceylon.settings import Settings


@dataclass
class Point:
    x: int
    on: date


def make_app(redis_url: str, namespace: str) -> Ceylon:
    app = Ceylon(redis_url, namespace=namespace)

    @app.task(role="p")
    async def move(point: Point, by: int = 1) -> Point:
        return Point(point.x + by, point.on)

    @app.task(role="p")
    def double(number: int) -> int:
        return 2 * number

    @app.task(role="p", max_attempts=1)
    def fail() -> None:
        raise KeyError("gone")

    return app


@pytest.fixture
def app(redis_url: str, namespace: str) -> Iterator[Ceylon]:
    app = make_app(redis_url, namespace)
    yield app
    if app._sync is not None:
        app._sync[1].close()


@contextmanager
def working(app: Ceylon) -> Iterator[None]:
    """A worker in a thread and loop of its own."""
    started = threading.Event()
    stop: list[Callable[[], object]] = []

    async def work() -> None:
        url, namespace = app.settings.redis_url, app.settings.namespace
        worker = Worker(url, namespace=namespace, registry=app.registry, roles=["p"])
        loop = asyncio.get_running_loop()
        stop.append(lambda: loop.call_soon_threadsafe(worker.stop))
        started.set()
        await worker.run()

    thread = threading.Thread(target=asyncio.run, args=[work()])
    thread.start()
    started.wait()
    try:
        yield
    finally:
        stop[0]()
        thread.join()


def task_of(app: Ceylon, name: str) -> Any:
    """The `AppTask` of a function that `make_app` registered; typed ones are in `typing_cases`."""
    from rq_ceylon import AppTask

    return AppTask(app, app.registry.get(name), Task(uses=name))


# ---- registering -----------------------------------------------------------------------------------------------------
def test_a_bare_decorator_registers_the_functions_name_and_leaves_the_function() -> None:
    app = Ceylon()

    @app.task
    def area(width: int, height: int = 2) -> int:
        "The words."
        return width * height

    assert area(3) == 6
    assert area.__doc__ == "The words."
    assert app.registry.get("area").function is area.function


def test_rules_reach_the_handler() -> None:
    app = Ceylon()
    rule = Backoff(first="2s")

    @app.task(
        name="n",
        aliases=["old"],
        role="r",
        timeout="1m",
        max_attempts=5,
        priority="low",
        backoff=rule,
        retry={ValueError: None},
    )
    async def work() -> None: ...

    handler = app.registry.get("old")
    assert handler is app.registry.get("n")
    assert (handler.role, handler.timeout_s, handler.max_attempts, handler.priority) == ("r", 60.0, 5, "low")
    assert (handler.backoff, handler.retry) == (rule, {ValueError: None})
    assert app.registry.roles() == ["r"]


def test_one_name_for_two_functions_is_refused() -> None:
    app = Ceylon()
    app.task(name="same")(lambda: None)

    with pytest.raises(InvalidInputError, match="same"):
        app.task(name="same")(lambda: None)


def test_hooks_and_goal_checks_are_registered_and_stay_functions() -> None:
    app = Ceylon()

    @app.on_start
    def begin() -> str:
        return "begun"

    @app.on_stop
    async def end() -> None: ...

    @app.on_error
    def tell(context: object, error: BaseException) -> None: ...

    @app.goal_check
    def enough(view: GroupView) -> bool:
        return view.counters.completed > 1

    assert begin() == "begun"
    assert app.registry.hooks == [("start", begin), ("stop", end)]
    assert app.registry.on_error == [tell]
    assert app.registry.goal_checks == {"enough": enough}


def test_a_goal_check_may_have_a_name_of_its_own_that_nothing_else_has() -> None:
    app = Ceylon()

    @app.goal_check(name="enough-files")
    def enough(view: GroupView) -> bool:
        return True

    app.goal_check(enough)
    assert app.registry.goal_checks == {"enough-files": enough, "enough": enough}
    with pytest.raises(InvalidInputError, match="enough-files"):
        app.goal_check(name="enough-files")(lambda view: False)
    with pytest.raises(InvalidInputError, match="goal check name"):
        app.goal_check(name="not good")(enough)


def test_an_application_needs_no_redis_until_it_is_used() -> None:
    app = Ceylon()

    @app.task
    def work(number: int) -> None: ...

    assert work.bind(1) == Task(uses="work", arguments={"number": 1})
    with pytest.raises(RedisError, match="No Redis is configured"):
        work.enqueue(1)


# ---- making tasks ----------------------------------------------------------------------------------------------------
def test_bind_turns_the_arguments_into_json_values(redis_url: str, namespace: str) -> None:
    move = task_of(make_app(redis_url, namespace), "move")

    assert move.bind(Point(1, date(2024, 2, 29)), by=2) == Task(
        uses="move", arguments={"point": {"x": 1, "on": "2024-02-29"}, "by": 2}
    )


@pytest.mark.parametrize(
    ("args", "kwargs", "words"),
    [((), {}, "number"), ((1, 2), {}, "positional"), ((), {"number": 1, "more": 2}, "more"), (("x",), {}, "number")],
)
def test_arguments_that_do_not_fit_are_refused_and_nothing_is_sent(
    app: Ceylon, redis_url: str, args: tuple[Any, ...], kwargs: dict[str, Any], words: str
) -> None:
    with pytest.raises(InvalidInputError, match=words):
        task_of(app, "double").enqueue(*args, **kwargs)

    with redis.Redis.from_url(redis_url) as client:
        assert client.keys("*") == []


@pytest.mark.anyio
async def test_arguments_are_checked_before_redis_is_asked_for_anything() -> None:
    double = task_of(make_app("redis://127.0.0.1:1", "n"), "double")

    with pytest.raises(InvalidInputError, match="number"):
        double.enqueue("x")
    with pytest.raises(InvalidInputError, match="number"):
        await double.aenqueue("x")
    with pytest.raises(RedisError, match="Cannot reach Redis"):
        double.enqueue(1)


@pytest.mark.anyio
async def test_calling_a_registered_coroutine_function_gives_its_coroutine() -> None:
    app = Ceylon()

    @app.task
    async def area(width: int) -> int:
        return 2 * width

    assert await area(3) == await area.using(role="r")(3) == 6


def test_using_adds_options_and_leaves_the_task_as_it_was(redis_url: str, namespace: str) -> None:
    double = task_of(make_app(redis_url, namespace), "double")

    late = double.using(delay="5s", priority="high").using(role="q", needs=["a"])

    assert late.bind(1) == Task(
        uses="double", arguments={"number": 1}, delay="5s", priority="high", role="q", needs=["a"]
    )
    assert double.bind(1) == Task(uses="double", arguments={"number": 1})


# ---- without await ---------------------------------------------------------------------------------------------------
def test_a_result_comes_back_as_the_annotated_type(app: Ceylon) -> None:
    with working(app):
        point = Point(1, date(2024, 2, 29))

        assert task_of(app, "move").enqueue(point).result(timeout=20) == Point(2, date(2024, 2, 29))


def test_a_submitted_task_gives_the_annotated_type_too(app: Ceylon) -> None:
    with working(app), app.sync_client() as client:
        handle = client.submit(task_of(app, "move").bind(Point(1, date(2024, 2, 29))))

        assert handle.result(timeout=20) == Point(2, date(2024, 2, 29))


def test_a_failure_comes_back_with_the_remote_traceback(app: Ceylon) -> None:
    with working(app), pytest.raises(TaskFailedError, match="gone") as caught:
        task_of(app, "fail").enqueue().result(timeout=20)

    assert caught.value.error_type.endswith("KeyError")
    assert 'raise KeyError("gone")' in caught.value.traceback


def test_a_sync_wait_has_its_limit(app: Ceylon) -> None:
    handle = task_of(app, "double").enqueue(1)

    with pytest.raises(WaitTimeoutError, match="it waits: no worker serves role"):
        handle.result(timeout=0.05)
    assert handle.status() == "pending"
    assert handle.cancel() == "cancelled"
    assert handle.view().reason == "cancelled"


def test_the_implicit_client_is_one_for_all_threads(app: Ceylon) -> None:
    double = task_of(app, "double")
    with working(app), ThreadPoolExecutor(8) as pool:
        handles = list(pool.map(double.enqueue, range(50)))

        assert [handle.result(timeout=20) for handle in handles] == [2 * n for n in range(50)]
        assert len({handle.id.partition("/")[0] for handle in handles}) == 1


def test_a_group_is_submitted_and_followed_without_await(app: Ceylon) -> None:
    double = task_of(app, "double")
    with working(app), app.sync_client() as client:
        run = client.submit(TaskGroup("numbers", [double.bind(n) for n in range(5)], goal="completed >= 5"))

        *_, last = run.progress()
        assert (last.is_finished, last.outcome) == (True, "completed")
        assert run.wait("all", timeout=20).counters.completed == 5
        assert sorted(result.value for result in run.results()) == [0, 2, 4, 6, 8]
        assert {task.task_id for task in run.tasks()} == {"1", "2", "3", "4", "5"}
        assert list(run.events())[-1].status == "finished"
        assert run.task("3").result(timeout=5) == 4
        again = client.group(run.id)
        assert (again.view().name, again.cancel()) == ("numbers", "finished")
        assert [view.id for view in client.groups()] == [run.id]
        assert [role.name for role in client.roles()] == ["p"]


@pytest.mark.anyio
async def test_the_sync_side_works_inside_a_running_loop(app: Ceylon) -> None:
    """As in a notebook, where a loop runs that the user did not start."""
    with working(app):
        assert task_of(app, "double").enqueue(4).result(timeout=20) == 8


def threads() -> int:
    return sum(thread.name == "ceylon-client" for thread in threading.enumerate())


def test_a_closed_client_and_its_handles_say_so_and_it_may_be_opened_again(app: Ceylon) -> None:
    before = threads()
    client = app.sync_client()
    with pytest.raises(CeylonError, match="not open"):
        client.groups()
    with client.open():  # twice is once
        handle = client.submit(task_of(app, "double").bind(1))
        events = client.group(handle.id.partition("/")[0]).events()
    client.close()

    for use in (client.groups, handle.view, handle.result, lambda: next(events)):
        with pytest.raises(CeylonError, match="not open, or was closed"):
            use()
    assert threads() == before
    with client:
        assert handle.status() == "pending"
    assert threads() == before


@pytest.mark.anyio
async def test_a_closed_async_client_is_refused_and_an_open_one_opened_once(app: Ceylon) -> None:
    async with app.client() as client:
        async with asyncio.timeout(20):
            assert await client.open() is client
        handle = await client.submit(task_of(app, "double").bind(1))

    for use in (client.open, client.groups, handle.view, handle.result):
        with pytest.raises(CeylonError, match=r"was closed; make another: app.client\(\)"):
            await use()


@pytest.mark.anyio
async def test_the_first_concurrent_submissions_of_a_loop_share_one_client(app: Ceylon) -> None:
    double = task_of(app, "double")

    handles = await asyncio.gather(*(double.aenqueue(number) for number in range(20)))

    assert len({id(handle._session) for handle in handles}) == 1
    assert len({handle.id for handle in handles}) == 20


@pytest.mark.anyio
async def test_the_client_of_a_loop_is_opened_anew_after_it_could_not_be(redis_url: str, namespace: str) -> None:
    app = make_app("redis://127.0.0.1:1", namespace)
    double = task_of(app, "double")
    for error in await asyncio.gather(double.aenqueue(1), double.aenqueue(2), return_exceptions=True):
        assert isinstance(error, RedisError)

    app.use(Settings(redis_url, namespace))

    assert await (await double.aenqueue(1)).status() == "pending"


@pytest.mark.parametrize("by_hand", [True, False])
def test_the_clients_of_loops_that_come_and_go_leave_nothing_behind(app: Ceylon, *, by_hand: bool) -> None:
    async def enqueue() -> int:
        await task_of(app, "double").aenqueue(1)
        return len(os.listdir("/dev/fd"))

    def once() -> int:
        if not by_hand:
            return asyncio.run(enqueue())
        loop = asyncio.new_event_loop()
        try:
            return loop.run_until_complete(enqueue())
        finally:
            loop.close()

    opened = [once() for _ in range(5)]

    assert len(set(opened)) == 1
    assert app._clients == {}


def test_what_a_process_enqueued_right_before_it_was_gone_is_in_its_queue(app: Ceylon) -> None:
    script = f"""
import os
from rq_ceylon import Ceylon

app = Ceylon({app.settings.redis_url!r}, namespace={app.settings.namespace!r})

@app.task(role="p")
def double(number: int) -> int: ...

double.enqueue(1)
double.enqueue(2)
os._exit(0)
"""
    run_to_end(sys.executable, "-c", script).check_returncode()

    with app.sync_client() as client:
        assert [role.queued for role in client.roles()] == [2]


SCRIPT = """
import asyncio, os, sys, threading
from rq_ceylon import Ceylon

app = Ceylon(sys.argv[1], namespace=sys.argv[2])

@app.task(role="p")
def double(number: int) -> int:
    return 2 * number

def say(handle):
    print(handle.id, handle.result(timeout=20), flush=True)

async def first() -> None:
    handle = await double.aenqueue(1)
    print(handle.id, await handle.result(timeout=20), flush=True)

asyncio.run(first())
asyncio.run(first())
say(double.enqueue(2))
if os.fork() == 0:
    say(double.enqueue(3))
    asyncio.run(first())
    sys.exit(0)
os.wait()
say(double.enqueue(4))
"""


def test_two_loops_and_a_fork_have_clients_of_their_own(app: Ceylon) -> None:
    """Nobody closes the implicit clients, in the parent or in the child; neither hangs at its end."""
    with working(app):
        ran = run_to_end(sys.executable, "-W", "error", "-c", SCRIPT, app.settings.redis_url, app.settings.namespace)

    lines = [line.split() for line in ran.stdout.splitlines()]
    assert [result for _, result in lines] == ["2", "2", "4", "6", "2", "8"], ran.stderr
    assert len({task_id for task_id, _ in lines}) == 6
    assert (ran.returncode, "Traceback" in ran.stderr) == (0, False), ran.stderr


FORKED = """
import os, sys
from rq_ceylon import Ceylon, Task, TaskGroup

with Ceylon(sys.argv[1], namespace=sys.argv[2]).sync_client() as client:
    run = client.submit(TaskGroup("a", [Task(), Task()]))
    is_child = os.fork() == 0
    for _ in range(100):
        assert run.view().counters.total == run.task("1").view().attempt + 1 == 2
        assert [view.id for view in client.groups()] == [run.id]
        assert [task.task_id for task in run.tasks()] == ["1", "2"]
    if is_child:
        os._exit(0)
    assert os.wait()[1] == 0
"""


def test_a_forked_child_uses_its_parents_client_on_a_connection_of_its_own(
    app: Ceylon,
) -> None:
    """Both used the parent's connection at the same time, and got each other's answers."""
    ran = run_to_end(sys.executable, "-c", FORKED, app.settings.redis_url, app.settings.namespace)

    assert (ran.returncode, ran.stderr) == (0, "")


# ---- what may be registered ------------------------------------------------------------------------------------------
def test_a_method_is_called_on_its_object_and_makes_no_task() -> None:
    task: Callable[[Any], Any] = Ceylon().task  # type checkers know functions only, not methods

    class Service:
        factor = 3

        @task
        def times(self, number: int = 1) -> int:
            return self.factor * number

        @classmethod
        @task
        def of_class(cls, number: int) -> int:
            return number

        @staticmethod
        @task
        def static(number: int) -> int:
            return number

    service: Any = Service()
    assert (service.times(5), service.static.bind(5).arguments) == (15, {"number": 5})
    for bind in (service.times.bind, service.times.enqueue, service.__class__.times.bind, service.of_class.bind):
        with pytest.raises(InvalidInputError, match="is a method, and a worker has no object to call it on"):
            bind(5)


def test_what_has_no_name_is_told_to_take_one() -> None:
    app, add = Ceylon(), partial(lambda number, more: number + more, more=1)

    with pytest.raises(InvalidInputError, match=r"has no name of its own; give it one: app.task\(name=...\)"):
        app.task(add)
    assert app.task(name="add")(add).bind(1).arguments == {"number": 1}


def defined(text: str, file: str) -> Any:
    """What a notebook does with a cell: it runs in the main module, and each version of it is a file of its own."""
    scope: dict[str, Any] = {"__name__": "__main__"}
    exec(compile(text, file, "exec"), scope)  # noqa: S102
    return scope["work"]


def test_a_definition_that_runs_again_takes_the_place_of_the_one_before() -> None:
    app = Ceylon()
    cell = "def work(number: int = 0): return number + 1"
    first = defined(cell, "cell 1")
    for function in (first, defined(cell, "cell 1"), last := defined("\n" + cell, "cell 2")):
        app.task(name="work", aliases=["former"])(function)
        app.goal_check(name="check")(function)
        app.on_start(function)

    assert app.registry.get("work").function is app.registry.get("former").function is last
    assert (app.registry.goal_checks, app.registry.hooks) == ({"check": last}, [("start", last)])


def test_two_definitions_in_one_file_are_two_functions() -> None:
    app = Ceylon()
    app.task(defined("def work(): ...", "tasks.py"))

    with pytest.raises(InvalidInputError, match="'work' is taken"):
        app.task(defined("\n\ndef work(): ...", "tasks.py"))


def test_python_says_of_a_task_what_it_says_of_its_function() -> None:
    app = Ceylon()

    @app.task
    async def on_the_loop() -> None: ...

    @app.task
    def in_a_thread() -> None: ...

    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # asyncio's own goes one day
        for asks in (inspect.iscoroutinefunction, asyncio.iscoroutinefunction):
            assert (asks(on_the_loop), asks(on_the_loop.using(role="r")), asks(in_a_thread)) == (True, True, False)
    assert list(inspect.signature(on_the_loop).parameters) == []


def test_any_argument_name_may_be_used() -> None:
    app = Ceylon()

    @app.task
    def take(**options: int) -> None: ...

    assert take.bind(**{"self": 1, "app": 2}).arguments == {"self": 1, "app": 2}
