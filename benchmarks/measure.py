"""The cost of a no-op task with a bare client and with rq_ceylon: one server, one client-and-worker process."""

from __future__ import annotations

import asyncio
import itertools
import time
from collections import Counter
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager, contextmanager, suppress
from dataclasses import dataclass, field
from typing import Any

import redis
import redis.asyncio

from rq_ceylon import Ceylon, TaskGroup
from rq_ceylon.client import Client
from rq_ceylon.store import scripts
from rq_ceylon.store.connection import Connection
from rq_ceylon.worker import Worker

GROUP_TASKS = 500
SCRIPT_NAMES = {scripts.digest(name): name for name in (*scripts.GROUP_SCRIPTS, *scripts.ROLE_SCRIPTS, "insist")}


@dataclass(kw_only=True)
class Sample:
    """
    What some tasks cost.

    Attributes:
        seconds, cpu_s: of the clock, and of this process.
        script_us: time by the clock that the server spent in scripts, by script.
        server_cpu_s: all that the server did.
        trips, commands: round trips, and commands in them, on rq_ceylon's connections.
        memory: bytes that the server needs more than before.
    """

    tasks: int
    seconds: float = 0.0
    cpu_s: float = 0.0
    script_us: Counter[str] = field(default_factory=Counter)
    server_cpu_s: float = 0.0
    trips: int = 0
    commands: int = 0
    memory: int = 0

    @property
    def rate(self) -> float:
        return self.tasks / self.seconds

    @property
    def cpu_us(self) -> float:
        return 1e6 * self.cpu_s / self.tasks


class Server:
    """The server as the benchmark sees it. It is emptied before every measurement."""

    def __init__(self, url: str) -> None:
        self.url = url
        self.redis: Any = redis.Redis.from_url(url)

    def empty(self) -> None:
        self.redis.flushall()
        # Every call of a script goes to the slow log, since INFO does not tell scripts apart.
        self.redis.config_set("slowlog-log-slower-than", 0)
        self.redis.config_set("slowlog-max-len", 200_000)

    @contextmanager
    def measured(self, tasks: int) -> Iterator[Sample]:
        """Everything that happens in the block counts, except that `stopwatch` alone sets the clock and the CPU."""
        sample = Sample(tasks=tasks)
        self.redis.slowlog_reset()
        memory, cpu_s = self._memory(), self._cpu_s()
        with _counted(sample):
            yield sample
        sample.server_cpu_s = self._cpu_s() - cpu_s
        self.redis.config_set("slowlog-log-slower-than", -1)
        for entry in self.redis.slowlog_get(200_000):
            words = entry["command"].decode(errors="replace").split(" ", 2)
            if words[0].upper() == "EVALSHA":
                sample.script_us[SCRIPT_NAMES.get(words[1], words[1])] += entry["duration"]
        self.redis.slowlog_reset()  # it takes memory too
        sample.memory = self._memory() - memory
        self.redis.config_set("slowlog-log-slower-than", 0)

    def _memory(self) -> int:
        used: int = self.redis.info("memory")["used_memory"]
        return used

    def _cpu_s(self) -> float:
        cpu = self.redis.info("cpu")
        used: float = cpu["used_cpu_user"] + cpu["used_cpu_sys"]
        return used


@contextmanager
def stopwatch(sample: Sample) -> Iterator[None]:
    wall, cpu = time.perf_counter(), time.process_time()
    yield
    sample.seconds, sample.cpu_s = time.perf_counter() - wall, time.process_time() - cpu


@contextmanager
def _counted(sample: Sample) -> Iterator[None]:
    """Count what goes over rq_ceylon's connections."""
    send = Connection.run_each

    async def counting(self: Connection, calls: Any) -> list[Any]:
        sample.trips += 1
        sample.commands += len(calls)
        return await send(self, calls)

    Connection.run_each = counting  # type: ignore[method-assign]
    try:
        yield
    finally:
        Connection.run_each = send  # type: ignore[method-assign]


# ---- a bare client ---------------------------------------------------------------------------------------------------
def bare(server: Server, tasks: int, batch: int) -> tuple[Sample, Sample]:
    """
    The least that a queue must do, in pipelines of so many tasks: add entries; read them, keep a result of each and
    acknowledge it. Returns what each half cost.
    """
    server.empty()
    server.redis.config_set("slowlog-log-slower-than", -1)
    client: Any = redis.Redis.from_url(server.url, decode_responses=True)
    added, processed = Sample(tasks=tasks), Sample(tasks=tasks)
    with stopwatch(added):
        for first in range(0, tasks, batch):
            pipeline = client.pipeline(transaction=False)
            for number in range(first, min(first + batch, tasks)):
                pipeline.xadd("queue", {"task": f'{{"uses":"noop","arguments":{{"n":{number}}}}}'})
            pipeline.execute()
    client.xgroup_create("queue", "workers", "0")
    with stopwatch(processed):
        while found := client.xreadgroup("workers", "me", {"queue": ">"}, count=batch):
            pipeline = client.pipeline(transaction=False)
            for entry, _ in found[0][1]:
                pipeline.hset("results", entry, "null")
                pipeline.xack("queue", "workers", entry)
            pipeline.execute()
    client.close()
    return added, processed


async def bare_latencies(server: Server, tasks: int) -> list[float]:
    """Seconds of one round trip each, with a command that adds an entry; sorted."""
    client = redis.asyncio.Redis.from_url(server.url)
    found = []
    for _ in range(tasks):
        await asyncio.sleep(0.01)
        began = time.perf_counter()
        await client.xadd("queue", {"task": "noop"})
        found.append(time.perf_counter() - began)
    await client.aclose()
    return sorted(found)


# ---- rq_ceylon -------------------------------------------------------------------------------------------------------
class Queue:
    """An application with one no-op task, and what it has seen of it."""

    def __init__(self, server: Server) -> None:
        self.server = server
        self.app = Ceylon(server.url, namespace="bench")
        self.started: Callable[[int], None] = lambda number: None

        @self.app.task(name="noop", role="bench")
        async def noop(n: int) -> None:
            self.started(n)

        self.noop = noop

    def group(self, tasks: int) -> TaskGroup:
        return TaskGroup("bench", [self.noop.bind(number) for number in range(tasks)])

    async def in_groups(self, client: Client, tasks: int, size: int) -> Sample:
        """Submit groups of so many tasks, one after another. Making the tasks counts, since every user does."""
        with self.server.measured(tasks) as sample, stopwatch(sample):
            for first in range(0, tasks, size):
                await client.submit(self.group(min(size, tasks - first)))
        return sample

    async def singly(self, client: Client, tasks: int, flying: int) -> Sample:
        """Submit single tasks, each awaited, by so many callers at once."""
        numbers = iter(range(tasks))

        async def caller() -> None:
            for number in numbers:
                await client.submit(self.noop.bind(number))

        with self.server.measured(tasks) as sample, stopwatch(sample):
            await asyncio.gather(*(caller() for _ in range(flying)))
        return sample

    async def processed(self, tasks: int, slots: int) -> Sample:
        """
        Let one worker process what is queued. The clock runs from the first start of a handler until the last outcome
        is recorded and acknowledged: to stop at the last start would make a gift of a whole batch.
        """
        done, seen = asyncio.Event(), itertools.count(1)
        began: list[float] = []

        def started(_: int) -> None:
            number = next(seen)
            if number == 1:
                began.extend((time.perf_counter(), time.process_time()))
            if number == tasks:
                done.set()

        self.started = started
        with self.server.measured(tasks) as sample:
            async with self.worker(slots) as worker:
                await done.wait()
                while not worker.turns.is_idle():  # noqa: ASYNC110 -- a worker tells nobody that it is idle
                    await asyncio.sleep(0.001)
                sample.seconds, sample.cpu_s = time.perf_counter() - began[0], time.process_time() - began[1]
        return sample

    async def latencies(self, client: Client, tasks: int) -> list[float]:
        """Seconds from `submit` to the start of the handler, at a worker that is idle each time; sorted."""
        found = []
        arrived: asyncio.Queue[float] = asyncio.Queue()
        self.started = lambda number: arrived.put_nowait(time.perf_counter())
        async with self.worker(slots=10):
            for number in range(tasks + 5):
                await asyncio.sleep(0.01)  # until the worker waits for the bell again
                began = time.perf_counter()
                _, at = await asyncio.gather(client.submit(self.noop.bind(number)), arrived.get())
                found.append(at - began)
        return sorted(found[5:])

    @asynccontextmanager
    async def worker(self, slots: int) -> AsyncIterator[Worker]:
        settings = self.app.settings
        worker = Worker(
            settings.redis_url,
            registry=self.app.registry,
            roles=["bench"],
            namespace=settings.namespace,
            slots=slots,
        )
        running = asyncio.create_task(worker.run())
        try:
            yield worker
        finally:
            worker.stop()
            with suppress(asyncio.CancelledError):
                await running
