"""
Other queues with the same no-op task, each in a virtual environment of its own, by its usual interface.

This file is both sides: `Peer` runs it again with the other queue's Python, where it submits tasks or works until it is
ended. So nothing but the standard library is imported at the top.
"""

from __future__ import annotations

import asyncio
import os
import signal
import struct
import subprocess
import sys
import tempfile
import time
import venv
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

ROOT = Path(__file__).parent.parent
FOLDER = Path(__file__).parent / ".venvs"
MODULE = ("-m", "benchmarks.peers")
SLOTS = 100
WORK_S = 300.0
"""How long a worker may take."""


class PeerError(Exception):
    """A queue that cannot be installed, or does not do the work."""


class Spec(NamedTuple):
    """
    Attributes:
        packages: what pip installs.
        note: how it is run, where that is not the one obvious way.
        share: measured with this share of the tasks, since it is slow.
        bulk: it has a call that submits many tasks.
    """

    packages: str
    note: str = ""
    share: float = 1.0
    bulk: bool = False


SPECS = {
    "rq": Spec("rq", "SimpleWorker", 0.2, bulk=True),
    "rq-fork": Spec("rq", "its default: a fork per task", 0.01, bulk=True),
    "celery": Spec("celery[redis]", "prefork, 1 child, results kept", 0.2),
    "celery-threads": Spec("celery[redis]", "8 threads, results kept", 0.2),
    "dramatiq": Spec("dramatiq[redis]", "8 threads, no results", 0.2),
    "arq": Spec("arq", f"{SLOTS} jobs at once", 0.2),
    "taskiq": Spec("taskiq-redis", "streams, results kept", 0.2),
    "saq": Spec("saq[redis] typing_extensions", f"{SLOTS} jobs at once", 0.2),
    "streaq": Spec("streaq", f"{SLOTS} tasks at once", 0.2, bulk=True),
}
NAMES = list(SPECS)


# ---- our side --------------------------------------------------------------------------------------------------------
class Peer:
    """One other queue, installed if it is not yet."""

    def __init__(self, name: str) -> None:
        self.name, self.spec = name, SPECS[name]
        package = self.spec.packages.split()[0].partition("[")[0]
        home = FOLDER / package
        self.python = home / "bin" / "python"
        installed = home / "installed"
        if not installed.exists() or installed.read_text() != self.spec.packages:
            venv.create(home, with_pip=True, clear=True)
            self._run(
                "-m", "pip", "install", "--quiet", "--disable-pip-version-check", *self.spec.packages.split(), "uvloop"
            )
            installed.write_text(self.spec.packages)
        code = f"from importlib.metadata import version; print(version({package!r}))"
        self.version = self._run("-c", code).strip()

    def tasks_of(self, tasks: int) -> int:
        return max(2, round(tasks * self.spec.share))

    def measure(self, url: str, tasks: int, empty: Callable[[], None]) -> tuple[float, float, float]:
        """Tasks per second: submitted one by one, submitted in bulk (0 if it cannot), processed by one worker."""
        bulk = 0.0
        if self.spec.bulk:
            empty()
            bulk = tasks / float(self._run(*MODULE, self.name, "bulk", url, str(tasks)))
        empty()
        single = tasks / float(self._run(*MODULE, self.name, "submit", url, str(tasks)))
        return single, bulk, (tasks - 1) / self._worked(url, tasks)

    def _worked(self, url: str, tasks: int) -> float:
        """Seconds from the first run of a task until every task has run."""
        with tempfile.TemporaryDirectory() as folder, tempfile.TemporaryFile("w+") as log:
            notes = Path(folder, "notes")
            notes.touch()
            command = [str(self.python), *MODULE, self.name, "work", url, "0"]
            environ = {**os.environ, "BENCH_NOTES": str(notes)}
            worker = subprocess.Popen(command, env=environ, cwd=ROOT, stdout=log, stderr=log, start_new_session=True)
            try:
                limit = time.monotonic() + WORK_S
                while (seconds := _seconds(notes, tasks)) is None:
                    if worker.poll() is not None or time.monotonic() > limit:
                        log.seek(0)
                        raise PeerError(f"its worker did not finish: {log.read().strip()[-200:]}")
                    time.sleep(0.1)
                return seconds
            finally:
                if worker.poll() is None:
                    os.killpg(worker.pid, signal.SIGKILL)
                worker.wait()

    def _run(self, *arguments: str) -> str:
        try:
            done = subprocess.run(
                [self.python, *arguments], capture_output=True, text=True, timeout=WORK_S, check=True, cwd=ROOT
            )
        except subprocess.CalledProcessError as error:
            lines = error.stderr.strip().splitlines() or ["no message"]
            raise PeerError(lines[-1]) from error
        except (subprocess.TimeoutExpired, OSError) as error:
            raise PeerError(str(error)) from error
        return done.stdout


def _seconds(notes: Path, tasks: int) -> float | None:
    """From the first run to the first run of the last task to have one; None while a task has not run."""
    if notes.stat().st_size < tasks * RUN_NOTE.size:
        return None
    first_runs: dict[int, float] = {}
    for n, at in RUN_NOTE.iter_unpack(notes.read_bytes()):
        first_runs.setdefault(n, at)
    return max(first_runs.values()) - min(first_runs.values()) if len(first_runs) == tasks else None


# ---- the other side --------------------------------------------------------------------------------------------------
RUN_NOTE = struct.Struct("=qd")


def noop(n: int) -> None:
    """The task. It notes the time of each run, as neither the order of tasks nor a single run of each is promised."""
    with open(os.environ["BENCH_NOTES"], "ab", buffering=0) as notes:
        notes.write(RUN_NOTE.pack(n, time.monotonic()))


async def async_noop(n: int) -> None:
    noop(n)


async def context_noop(ctx: Any, n: int) -> None:
    noop(n)


def run_rq(action: str, url: str, tasks: int, *, fork: bool) -> None:
    import rq
    from redis import Redis

    connection = Redis.from_url(url)
    queue = rq.Queue("bench", connection=connection)
    if action == "work":
        (rq.Worker if fork else rq.SimpleWorker)([queue], connection=connection).work(logging_level="ERROR")
    elif action == "bulk":
        jobs = [rq.Queue.prepare_data(noop, args=(n,)) for n in range(tasks)]
        with timed():
            for first in range(0, tasks, 500):
                queue.enqueue_many(jobs[first : first + 500])
    else:
        with timed():
            for n in range(tasks):
                queue.enqueue(noop, n)


def run_celery(action: str, url: str, tasks: int, *, pool: Sequence[str]) -> None:
    from celery import Celery

    app = Celery("bench", broker=url, backend=url)
    app.conf.update(broker_connection_retry_on_startup=True, worker_hijack_root_logger=False)
    task = app.task(noop, name="noop")
    if action == "work":
        app.worker_main(["worker", "--loglevel=ERROR", *pool])
    else:
        with timed():
            for n in range(tasks):
                task.delay(n)


def run_dramatiq(action: str, url: str, tasks: int) -> None:
    import dramatiq
    from dramatiq.brokers.redis import RedisBroker

    broker = RedisBroker(url=url)
    dramatiq.set_broker(broker)
    actor = dramatiq.actor(noop)
    if action == "work":
        dramatiq.Worker(broker, worker_threads=8).start()
        signal.pause()
    else:
        with timed():
            for n in range(tasks):
                actor.send(n)


async def run_arq(action: str, url: str, tasks: int) -> None:
    from arq import create_pool
    from arq.connections import RedisSettings
    from arq.worker import Worker

    settings = RedisSettings.from_dsn(url)
    if action == "work":
        await Worker([context_noop], redis_settings=settings, max_jobs=SLOTS, handle_signals=False).async_run()
    else:
        pool = await create_pool(settings)
        with timed():
            for n in range(tasks):
                await pool.enqueue_job("context_noop", n)


async def run_taskiq(action: str, url: str, tasks: int) -> None:
    from taskiq.api import run_receiver_task
    from taskiq_redis import RedisAsyncResultBackend, RedisStreamBroker

    broker = RedisStreamBroker(url).with_result_backend(RedisAsyncResultBackend(url))
    task = broker.register_task(async_noop, task_name="noop")
    if action == "work":
        await run_receiver_task(broker, max_async_tasks=SLOTS, max_prefetch=SLOTS, run_startup=True)
    else:
        await broker.startup()
        with timed():
            for n in range(tasks):
                await task.kiq(n)
        await broker.shutdown()


async def run_saq(action: str, url: str, tasks: int) -> None:
    from saq import Queue, Worker

    queue = Queue.from_url(url)
    if action == "work":
        await Worker(queue, functions=[context_noop], concurrency=SLOTS).start()
    else:
        await queue.connect()
        with timed():
            for n in range(tasks):
                await queue.enqueue("context_noop", n=n)
        await queue.disconnect()


async def run_streaq(action: str, url: str, tasks: int) -> None:
    from streaq import Worker

    worker: Any = Worker(redis_url=url, concurrency=SLOTS, handle_signals=False)
    task = worker.task(async_noop)
    if action == "work":
        await worker.run_async()
        return
    async with worker:
        if action == "bulk":
            some = [task.enqueue(n) for n in range(tasks)]
            with timed():
                for first in range(0, tasks, 500):
                    await worker.enqueue_many(some[first : first + 500])
        else:
            with timed():
                for n in range(tasks):
                    await task.enqueue(n)


RUN: dict[str, Callable[[str, str, int], Any]] = {
    "rq": lambda *asked: run_rq(*asked, fork=False),
    "rq-fork": lambda *asked: run_rq(*asked, fork=True),
    "celery": lambda *asked: run_celery(*asked, pool=["--concurrency=1"]),
    "celery-threads": lambda *asked: run_celery(*asked, pool=["--pool=threads", "--concurrency=8"]),
    "dramatiq": run_dramatiq,
    "arq": run_arq,
    "taskiq": run_taskiq,
    "saq": run_saq,
    "streaq": run_streaq,
}


@contextmanager
def timed() -> Iterator[None]:
    """Prints the seconds that its block took."""
    began = time.perf_counter()
    yield
    print(time.perf_counter() - began)


def child() -> None:
    name, action, url, tasks = sys.argv[1:]
    running = RUN[name](action, url, int(tasks))
    if asyncio.iscoroutine(running):
        import uvloop

        uvloop.run(running)


if __name__ == "__main__":
    from benchmarks import peers  # noqa: PLW0406 -- by its own name, under which the others' workers import the task

    peers.child()
