"""
Batches as their owners run them, on real processes that are killed meanwhile: a batch that misses its goal and whose
failures run again, and a spider that finds its pages while it goes. What each handler does it writes into a ledger.
"""

from __future__ import annotations

import asyncio
import collections
import random
import signal
import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest

from rq_ceylon import Client, Goal, Task, TaskGroup
from rq_ceylon.audit import audit

pytestmark = [pytest.mark.anyio, pytest.mark.timeout(150)]

JOBS = """
import asyncio, os, random
from rq_ceylon import Ceylon, TaskContext

app = Ceylon()


def note(word, number):
    with open("ledger", "a") as ledger:
        ledger.write(f"{word} {number}\\n")


@app.task(role="items", max_attempts=1, timeout="2s")
async def item(number: int) -> int:
    note("start", number)
    await asyncio.sleep(random.random() / 50)
    if not os.path.exists("mended"):
        if number % 97 == 0:
            await asyncio.sleep(3600)
        if number % 10 == 0 or random.random() < 0.03:
            raise ConnectionError(number)
    note("end", number)
    return number


@app.task(role="items", max_attempts=5)
async def page(context: TaskContext, number: int, pages: int) -> int:
    note("start", number)
    await asyncio.sleep(0.005)
    for link in (2 * number + 1, 2 * number + 2, number // 3, 0):
        if link < pages:
            context.spawn(page.using(id=f"p{link}").bind(link, pages))
    return number
"""


class Crew:
    """Worker processes and a monitor. `harass` kills some at random, and starts others in their place."""

    def __init__(self, folder: Path, url: str, namespace: str) -> None:
        (folder / "jobs.py").write_text(JOBS)
        self.folder = folder
        self._where = ["--redis", url, "--namespace", namespace, "--log-level", "error"]
        self._random = random.Random(7)
        self._worker = ["worker", "jobs:app", "--role", "items", "-c", "50", "--lease", "1s"]
        self._members = [self._start(self._worker), self._start(self._worker), self._start(["monitor"])]
        self.kills = 0

    def _start(self, command: Sequence[str]) -> tuple[Sequence[str], subprocess.Popen[bytes]]:
        words = [sys.executable, "-m", "rq_ceylon.cli", *command, *self._where]
        return command, subprocess.Popen(words, cwd=self.folder)

    async def harass(self, waiting: asyncio.Future[Any], most: int) -> None:
        while not waiting.done() and self.kills < most:
            await asyncio.wait([waiting], timeout=0.6)
            place = self._random.randrange(len(self._members))
            command, process = self._members[place]
            process.send_signal(signal.SIGKILL)
            process.wait()
            self._members[place] = self._start(command)
            self.kills += 1
        await waiting

    def dismiss(self) -> None:
        for _, process in self._members:
            process.terminate()
        for _, process in self._members:
            process.wait(40)

    def ledger(self) -> collections.Counter[str]:
        return collections.Counter((self.folder / "ledger").read_text().splitlines())


@pytest.fixture
def crew(tmp_path: Path, redis_url: str, namespace: str) -> Iterator[Crew]:
    made = Crew(tmp_path, redis_url, namespace)
    yield made
    made.dismiss()


@pytest.mark.parametrize(("count", "kills"), [(200, 1), pytest.param(2000, 5, marks=pytest.mark.long)])
async def test_the_failures_of_a_batch_run_again_and_what_completed_never_does(
    count: int, kills: int, crew: Crew, client: Client
) -> None:
    results: dict[str, int] = {}
    tasks = [Task(uses="item", role="items", id=f"i{number}", arguments={"number": number}) for number in range(count)]
    goal = Goal("completed >= 95%", name="most")
    run = await client.submit(TaskGroup("items", tasks, goal=goal))

    async def keep() -> None:
        async for result in run.results():
            if result.status == "completed":
                assert result.task_id not in results
                results[result.task_id] = result.value

    await crew.harass(asyncio.ensure_future(keep()), most=kills)
    first = await run.view()
    assert (first.outcome, first.goals[0].status) == ("failed", "failed")
    assert len(results) == first.counters.completed < 0.95 * count
    ended_before = {word for word in crew.ledger() if word.startswith("end ")}
    done_before = {f"start {number}" for number in results.values()}
    starts_before = crew.ledger()

    (crew.folder / "mended").touch()
    reopened = await run.retry()
    assert reopened == count - len(results)
    waiting = asyncio.ensure_future(run.wait("all", timeout=60))
    await crew.harass(waiting, most=2 * kills)

    view = await run.view()
    assert (view.outcome, view.counters.completed, view.goals[0].status) == ("completed", count, "achieved")
    after = crew.ledger()
    assert all(after[word] == starts_before[word] for word in done_before), "what had completed ran again"
    assert ended_before <= after.keys()
    assert {result.value async for result in run.results()} == set(range(count))
    assert not (await audit(client.connection, client.keys)).drift


@pytest.mark.parametrize(("pages", "kills"), [(200, 2), pytest.param(10_000, 6, marks=pytest.mark.long)])
async def test_a_spider_fetches_each_page_once_though_workers_are_killed(
    pages: int, kills: int, crew: Crew, client: Client
) -> None:
    start = Task(uses="page", role="items", id="p0", arguments={"number": 0, "pages": pages})
    goals = [Goal(f"completed >= {pages // 2}", name="half"), Goal("completed >= 100%", name="all")]
    run = await client.submit(TaskGroup("site", [start], goal=goals, open="until_idle"))

    await crew.harass(asyncio.ensure_future(run.wait("all", timeout=120)), most=kills)

    view = await run.view()
    assert (view.outcome, view.counters.total, view.counters.completed) == ("completed", pages, pages)
    half = view.goals[0]
    assert half.settled is not None
    assert half.settled.counters.completed >= pages // 2
    assert {result.value async for result in run.results()} == set(range(pages))
    assert not (await audit(client.connection, client.keys)).drift
