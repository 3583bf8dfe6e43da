"""
What a network does between Redis and those that use it: connections that are reset in their handshake, closed halfway,
or silent; a Redis that hangs, or is not there yet. No worker and no monitor may end of it, and no task may be lost.
"""

from __future__ import annotations

import asyncio
import contextlib
import random
import signal
import threading
import time
from collections.abc import AsyncIterator, Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import redis
import redis.asyncio
from commands import LIMIT_S, commands_on, eventually, until
from conftest import LONG
from proxy import GREETINGS, Line, Proxy, proxy_to
from servers import Fleet, Running, free_port, pretended

from rq_ceylon import Ceylon, Client, Task, TaskGroup
from rq_ceylon.attempt import TaskContext
from rq_ceylon.audit import audit
from rq_ceylon.client import session
from rq_ceylon.errors import ConnectionLostError, RedisError
from rq_ceylon.monitor import Monitor
from rq_ceylon.store.connection import Connection
from rq_ceylon.store.events import EventHub
from rq_ceylon.store.keys import Keys
from rq_ceylon.store.scripts import command, digest
from rq_ceylon.worker.loop import Worker

pytestmark = pytest.mark.anyio

"""Whether to run the whole distance, which takes minutes."""


@contextlib.asynccontextmanager
async def at_work(*parts: Worker | Monitor) -> AsyncIterator[None]:
    running = [asyncio.create_task(part.run()) for part in parts]
    try:
        yield
        assert not [task for task in running if task.done()]
    finally:
        for part in parts:
            part.stop()
        async with asyncio.timeout(LIMIT_S):
            await asyncio.gather(*running)


# ---- whatever breaks, breaks as a lost connection --------------------------------------------------------------------
class _UnknownError(Exception):
    pass


@pytest.mark.parametrize("where", ["connect", "send_packed_command", "read_response", "disconnect"])
@pytest.mark.parametrize("error", [RuntimeError("the handler is closed"), AttributeError("write"), _UnknownError()])
async def test_a_connection_that_fails_in_any_way_counts_as_lost(
    fleet: Fleet, monkeypatch: pytest.MonkeyPatch, where: str, error: Exception
) -> None:
    server = fleet.start("appendonly yes")

    async def fail(*_: Any, **__: Any) -> None:
        raise error

    async with Connection(server.url) as connection:
        if where != "connect":
            await connection.run([command("SET", "key", "1")])
        if where == "disconnect":
            server.kill()
        with monkeypatch.context() as patch:
            patch.setattr(redis.asyncio.Connection, where, fail)
            for call in (connection.pop(["key"], 0.01), connection.run([command("GET", "key")])):
                with pytest.raises(ConnectionLostError):
                    await call


async def test_what_is_no_protocol_of_redis_counts_as_a_lost_connection() -> None:
    with pretended(lambda _: b"HTTP/1.1 503 Service Unavailable\r\n\r\n") as port:
        async with Connection(f"redis://127.0.0.1:{port}") as connection:
            (reply,) = await connection.run_each([command("GET", "key")])
    assert isinstance(reply, ConnectionLostError)
    assert "the server there does not speak the protocol of Redis" in str(reply)


async def test_words_that_cannot_be_packed_are_a_mistake_and_no_lost_connection(redis_url: str) -> None:
    async with Connection(redis_url) as connection:
        with pytest.raises(redis.DataError, match="SET cannot be packed"):
            await connection.run([command("SET", "key", object())])
        assert await connection.run([command("SET", "key", "1")]) == [True]


async def test_a_reply_that_is_not_utf_8_takes_no_other_reply_with_it(redis_url: str) -> None:
    async with Connection(redis_url) as connection:
        with redis.Redis.from_url(redis_url) as raw:
            raw.set("bad", b"\xff")
        assert await connection.run([command("GET", "bad"), command("SET", "good", "1")]) == ["\ufffd", True]


async def test_a_loop_of_a_worker_or_monitor_outlives_what_nobody_foresaw(
    app: Ceylon, client: Client, monkeypatch: pytest.MonkeyPatch, said: list[str]
) -> None:
    """Each loop meets an error once; a mistake of the program is shown with its traceback, and work goes on."""

    @app.task(role="r")
    async def work() -> str:
        return "done"

    settings, met = app.settings, set[str]()

    def breaking(of: Any, name: str) -> None:
        right = getattr(of, name)

        def once(*args: Any, **kwargs: Any) -> Any:
            if name not in met:
                met.add(name)
                raise ZeroDivisionError(name)
            return right(*args, **kwargs)

        monkeypatch.setattr(of, name, once)

    worker = Worker(settings.redis_url, registry=app.registry, namespace=settings.namespace, roles=["r"], lease_s=0.3)
    monitor = Monitor(settings.redis_url, namespace=settings.namespace)
    names = ["server_ms", "due_groups", "pop", "renew"]
    async with at_work(worker, monitor):
        assert await (await client.submit(work.bind())).result(LIMIT_S) == "done"
        breaking(Connection, "pop")
        for module, name in (("rq_ceylon.store.queries", "server_ms"), ("rq_ceylon.store.queries", "due_groups")):
            breaking(__import__(module, fromlist=["_"]), name)
        breaking(worker.leases, "renew")
        await eventually(lambda: met == set(names), "all have met their error")
        assert await (await client.submit(work.bind())).result(LIMIT_S) == "done"
    for name in names:
        shown = [line for line in said if line.startswith("ERROR") and f"ZeroDivisionError: {name}" in line]
        assert len(shown) == 1


# ---- the lease thread ------------------------------------------------------------------------------------------------
FAULTS: dict[str, Callable[[Proxy, Callable[[Line], bool]], int]] = {
    "silence": Proxy.silence,
    "reset": Proxy.reset,
    "half-close": Proxy.half_close,
}


def renews(line: Line) -> bool:
    return digest("renew").encode() in line.sent


@pytest.mark.parametrize("fault", FAULTS)
async def test_a_lost_connection_of_the_lease_thread_costs_no_task(fleet: Fleet, namespace: str, fault: str) -> None:
    server = fleet.start("appendonly yes")
    app, started = Ceylon(server.url, namespace=namespace), asyncio.Event()

    @app.task(role="r")
    async def work(context: TaskContext) -> str:
        started.set()
        await asyncio.sleep(3)
        return context.worker

    with proxy_to(server.port) as proxy:
        options: dict[str, Any] = {"registry": app.registry, "namespace": namespace, "roles": ["r"], "lease_s": 1.5}
        behind, beside = Worker(proxy.url, **options), Worker(server.url, **options)
        async with app.client() as client, at_work(behind):
            handle = await client.submit(TaskGroup("g", [work.bind()]))
            await started.wait()
            async with at_work(beside):
                await eventually(lambda: any(renews(line) for line in list(proxy.lines)), "a lease was renewed")
                assert FAULTS[fault](proxy, renews) >= 1
                view = await handle.wait("all", LIMIT_S)
    assert (view.counters.attempts, view.counters.crashes, view.counters.completed) == (1, 0, 1)


@pytest.mark.long
@pytest.mark.timeout(600)
@pytest.mark.parametrize(("lease_s", "workers", "rounds"), [(3, 40, 5), (9, 50, 1), (30, 20, 1)])
async def test_no_single_connection_that_is_lost_at_any_moment_costs_a_task(
    fleet: Fleet, namespace: str, lease_s: float, workers: int, rounds: int
) -> None:
    """
    Each worker loses one connection, any of those that it has, at a random phase of its lease; a rival of all of them
    has free slots.
    """
    server = fleet.start("appendonly yes")
    app, rnd = Ceylon(server.url, namespace=namespace), random.Random(7)

    @app.task
    async def work(context: TaskContext) -> str:
        await asyncio.sleep(2.3 * lease_s)
        return context.worker

    options: dict[str, Any] = {"registry": app.registry, "namespace": namespace, "lease_s": lease_s}
    roles = [f"r{number}" for number in range(workers)]
    for _ in range(rounds):
        async with contextlib.AsyncExitStack() as stack:
            client = await stack.enter_async_context(app.client())
            proxies = [stack.enter_context(proxy_to(server.port)) for _ in roles]
            ours = [
                Worker(proxy.url, roles=[role], slots=3, **options) for proxy, role in zip(proxies, roles, strict=True)
            ]
            await stack.enter_async_context(at_work(*ours))
            handle = await client.submit(TaskGroup("g", [work.using(role=role).bind() for role in roles for _ in "ab"]))
            await eventually(partial(_all_run, ours), "all run")
            await stack.enter_async_context(at_work(Worker(server.url, roles=roles, slots=100, **options)))

            async def hurt(proxy: Proxy) -> str:
                await asyncio.sleep(rnd.uniform(0, lease_s))
                line, fault = rnd.choice(list(proxy.lines)), rnd.choice(list(FAULTS))
                FAULTS[fault](proxy, lambda one: one is line)
                return fault

            await asyncio.gather(*(hurt(proxy) for proxy in proxies))
            view = await handle.wait("all", 4 * lease_s + 60)
            names = {worker.name for worker in ours}
            assert {result.value async for result in handle.results()} == names
        counters = view.counters
        assert (counters.completed, counters.attempts, counters.crashes) == (2 * workers, 2 * workers, 0)


def _all_run(workers: list[Worker]) -> bool:
    return all(len(worker.turns.running()) == 2 for worker in workers)


async def test_a_blocked_worker_notes_all_the_same_that_it_is_stopping(
    app: Ceylon, client: Client, redis_url: str, namespace: str
) -> None:
    started, may_end = threading.Event(), threading.Event()

    @app.task(role="r")
    async def block() -> None:
        started.set()
        may_end.wait(LIMIT_S)

    worker = Worker(redis_url, registry=app.registry, namespace=namespace, roles=["r"])
    handle = await client.submit(TaskGroup("g", [block.bind()]))
    thread = threading.Thread(target=lambda: asyncio.run(worker.run()))
    thread.start()
    raw: Any = redis.Redis.from_url(redis_url, decode_responses=True)
    claims = client.keys.group_part(handle.id, "claims")
    try:
        await asyncio.to_thread(started.wait, LIMIT_S)
        worker.leases.stopping()
        await eventually(lambda: raw.hget(claims, "1").startswith("s|"), "its record says so")
    finally:
        may_end.set()
        worker.stop()
        await asyncio.to_thread(thread.join, LIMIT_S)


async def test_a_subscription_that_goes_silent_is_opened_anew(
    fleet: Fleet, namespace: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("rq_ceylon.store.connection.LISTEN_S", 0.3)
    server, keys = fleet.start("appendonly yes"), Keys(namespace)
    with proxy_to(server.port) as proxy:
        hub = EventHub(proxy.url, keys)
        async with hub.watch("g") as watch:
            await eventually(lambda: proxy.silence(lambda line: b"SUBSCRIBE" in line.sent), "it has subscribed")

            async def hears() -> bool:
                server.ask("PUBLISH", keys.events_channel("g"), "")
                return "g" in await watch.wait(0.1)

            await eventually(hears, "it hears again")
        await hub.close()


# ---- a Redis that hangs ----------------------------------------------------------------------------------------------
async def test_submissions_to_a_redis_that_hangs_give_up_together(
    fleet: Fleet, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(session, "ANSWER_S", 0.5)
    server = fleet.start("appendonly yes")
    async with Ceylon(server.url).client() as client:
        handle = await client.submit(TaskGroup("g", [Task()]))
        await client.submit(Task())
        server.process.send_signal(signal.SIGSTOP)
        try:
            async with asyncio.timeout(5):  # one behind the other takes ten
                calls: list[Any] = [work for _ in range(7) for work in (client.submit(Task()), handle.view())]
                calls += [client.submit(TaskGroup("g", [Task()])) for _ in range(7)]
                found = await asyncio.gather(*calls, return_exceptions=True)
        finally:
            server.process.send_signal(signal.SIGCONT)
    assert {type(one) for one in found} == {ConnectionLostError}


# ---- a Redis that is not there yet -----------------------------------------------------------------------------------
async def test_a_worker_and_a_monitor_wait_for_redis_and_say_so_once(fleet: Fleet, said: list[str]) -> None:
    port = free_port()
    app = Ceylon(f"redis://127.0.0.1:{port}")
    begun: list[str] = []

    @app.on_start
    async def begin() -> None:
        begun.append("start")

    @app.task(role="r")
    async def work() -> str:
        return "done"

    url = app.settings.redis_url
    async with at_work(Worker(url, registry=app.registry, roles=["r"]), Monitor(url)):
        await eventually(lambda: len([line for line in said if "Waiting until Redis answers" in line]) == 2, "both say")
        assert begun == []
        await asyncio.to_thread(fleet.start, "appendonly yes", port=port)
        await eventually(lambda: len([line for line in said if "Redis answers now" in line]) == 2, "both go on")
        async with app.client() as client:
            assert await (await client.submit(work.bind())).result(LIMIT_S) == "done"
    assert begun == ["start"]
    assert len([line for line in said if line.startswith("WARNING: Waiting until Redis answers. Cannot reach")]) == 2


async def test_a_worker_and_a_monitor_that_wait_for_redis_end_when_they_are_stopped() -> None:
    url = f"redis://127.0.0.1:{free_port()}"
    async with at_work(Worker(url, registry=Ceylon(url).registry, roles=["r"]), Monitor(url)):
        await asyncio.sleep(0.05)


async def test_a_redis_that_refuses_is_not_waited_for(fleet: Fleet) -> None:
    server = fleet.start("appendonly yes", "requirepass right")
    url = f"redis://:wrong@127.0.0.1:{server.port}"
    for part in (Worker(url, registry=Ceylon(url).registry, roles=["r"]), Monitor(url)):
        with pytest.raises(RedisError, match="refuses the user or password"):
            async with asyncio.timeout(LIMIT_S):
                await part.run()


# ---- all of it at once -----------------------------------------------------------------------------------------------
JOBS = """
import asyncio
from rq_ceylon import Backoff, Ceylon

app = Ceylon()

@app.task(backoff=Backoff(first="10ms", cap="50ms"))
async def work(seconds: float = 0.02) -> str:
    await asyncio.sleep(seconds)
    return "done"
"""


def storm(proxy: Proxy, seconds: float, rnd: random.Random) -> None:
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        proxy.greeting = rnd.choice(GREETINGS)
        proxy.delay_s = rnd.choice([0, 0, 0.005, 0.05])
        chosen = [line for line in list(proxy.lines) if rnd.random() < 0.5]
        rnd.choice(list(FAULTS.values()))(proxy, chosen.__contains__)
        time.sleep(rnd.uniform(0.05, 0.5))
        if rnd.random() < 0.4:
            proxy.greeting, proxy.delay_s = "pass", 0
            time.sleep(rnd.uniform(0.1, 0.6))
    proxy.greeting, proxy.delay_s = "pass", 0
    proxy.reset()  # what is silent would be noticed only after its limit


@pytest.mark.timeout(480)
@pytest.mark.parametrize("loop", ["uvloop", "asyncio"])
async def test_no_worker_and_no_monitor_ends_of_a_storm(fleet: Fleet, tmp_path: Path, loop: str) -> None:
    server = fleet.start("appendonly yes")
    (tmp_path / "jobs.py").write_text(JOBS)
    if loop == "asyncio":
        (tmp_path / "uvloop.py").write_text("raise ImportError")
    with proxy_to(server.port) as proxy, commands_on(proxy.url, tmp_path) as commands:
        quiet = ["--log-level", "error"]
        parts = [commands.start("worker", "jobs:app", "-c", "20", "--lease", "2s", *quiet) for _ in range(2)]
        parts.append(commands.start("monitor", *quiet))
        until(lambda: server.ask("SCARD", Keys("ceylon").workers) == 3, "all are registered")
        async with Client(server.url) as client:
            handles = [await client.submit(TaskGroup("g", [Task(uses="work")] * 200)) for _ in range(20 if LONG else 2)]
            await asyncio.to_thread(storm, proxy, 180 if LONG else 2.5, random.Random(11))
            assert [part.poll() for part in parts] == [None] * 3, "\n".join(map(commands.said, parts))
            for handle in handles:
                view = await handle.wait("all", 120)
                assert (view.counters.completed, view.counters.total) == (200, 200)
            found = await audit(client.connection, client.keys, [])
        assert found.drift == []
        assert proxy.counts.keys() >= {"reset", "silenced"}
        for part in parts:
            part.send_signal(signal.SIGTERM)
        assert [part.wait(LIMIT_S) for part in parts] == [0] * 3


async def test_a_server_process_that_is_frozen_for_a_while_ends_nobody(fleet: Fleet, namespace: str) -> None:
    server: Running = fleet.start("appendonly yes")
    app = Ceylon(server.url, namespace=namespace)

    @app.task(role="r")
    async def work() -> str:
        return "done"

    worker = Worker(server.url, registry=app.registry, namespace=namespace, roles=["r"], lease_s=0.6)
    async with at_work(worker, Monitor(server.url, namespace=namespace)), app.client() as client:
        assert await (await client.submit(work.bind())).result(LIMIT_S) == "done"
        server.process.send_signal(signal.SIGSTOP)
        await asyncio.sleep(1)
        server.process.send_signal(signal.SIGCONT)
        assert await (await client.submit(work.bind())).result(LIMIT_S) == "done"
