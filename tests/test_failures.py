"""Which tasks failed, over all groups: as the client finds them, and as `ceylon failures` groups them."""

from __future__ import annotations

import asyncio
import json

import pytest
from commands import LIMIT_S, Commands

from rq_ceylon import Ceylon, Client, NotFoundError, Task, TaskGroup
from rq_ceylon.worker import Worker

pytestmark = pytest.mark.anyio


@pytest.fixture
async def failed(app: Ceylon, client: Client) -> list[str]:
    """The ids of two groups whose tasks have ended, some as failed."""

    @app.task(role="r", max_attempts=1)
    async def check(number: int) -> int:
        if number % 2:
            raise ValueError(f"page {number} is empty")
        return number

    @app.task(role="s", max_attempts=1)
    async def load(name: str) -> None:
        raise OSError(f"no such file: {name}")

    first = await client.submit(TaskGroup("one", [check.bind(number) for number in range(5)]))
    second = await client.submit(
        TaskGroup(
            "two",
            [load.using(id="a", role="s").bind("a.txt"), Task(id="b", arguments={"number": 7}), check.bind(8)],
            defaults=Task(uses="check", role="r", max_attempts=1),
        )
    )
    worker = Worker(client.url, registry=app.registry, namespace=client.keys.namespace, roles=["r", "s"], burst=True)
    await asyncio.wait_for(worker.run(), LIMIT_S)
    return [first.id, second.id]


async def test_failed_tasks_of_all_groups_are_found_by_what_is_known_of_them(client: Client, failed: list[str]) -> None:
    one, two = failed

    async def found(**wanted: str) -> set[str]:
        return {task.id async for task in client.failures(**wanted)}

    every = {f"{one}/2", f"{one}/4", f"{two}/a", f"{two}/b"}
    assert await found() == await found(since="1h") == every
    assert await found(group=one) == {f"{one}/2", f"{one}/4"}
    assert await found(role="s") == await found(name="load") == await found(error="NO SUCH FILE") == {f"{two}/a"}
    assert await found(name="check", group=two) == {f"{two}/b"}
    assert await found(error="ValueError: page 1 ") == {f"{one}/2"}
    assert await found(since="0s") == await found(role="t") == set()
    with pytest.raises(NotFoundError):
        await found(group="nosuch")

    task = await client.task(f"{two}/b").view()
    assert (task.uses, task.result and task.result.payload) == ("check", {"arguments": {"number": 7}})


async def test_failures_that_differ_in_numbers_are_one_line(
    client: Client, commands: Commands, failed: list[str]
) -> None:
    one, two = failed
    where = ("--namespace", client.keys.namespace)

    lines = (await asyncio.to_thread(commands.run, "ceylon", "failures", *where)).stdout.splitlines()

    assert lines[0].split() == ["FAILED", "LAST", "ROLE", "FUNCTION", "REASON", "ERROR", "TASK"]
    assert [line.split()[0] for line in lines[1:]] == ["3", "1"]
    assert lines[1].split()[3:6] == ["r", "check", "error"]
    assert "OSError: no such file: a.txt" in lines[2]
    assert lines[2].endswith(f"  {two}/a")
    few = (await asyncio.to_thread(commands.run, "ceylon", "failures", "--limit", "1", *where)).stdout
    assert few.endswith("\nand 1 more kind; --limit shows more\n")
    told = (await asyncio.to_thread(commands.run, "ceylon", "failures", "--json", "--group", one, *where)).stdout
    assert {json.loads(line)["id"] for line in told.splitlines()} == {f"{one}/2", f"{one}/4"}
    bad = await asyncio.to_thread(commands.run, "ceylon", "failures", "--since", "soon", *where)
    assert (bad.returncode, "since: 'soon'" in bad.stderr) == (2, True)
