"""Groups on groups, pauses, and needs that were not met, as their users see them."""

import json

import pytest
from bench import Bench
from commands import ROOT, Commands, eventually, until
from test_worker import running, worker_of

from rq_ceylon.app import Ceylon
from rq_ceylon.client import Client
from rq_ceylon.errors import InvalidInputError, NotFoundError
from rq_ceylon.models import Goal, GroupStatus, Task, TaskGroup
from rq_ceylon.store import transitions
from rq_ceylon.store.scripts import command

pytestmark = pytest.mark.anyio


def group(name: str, count: int = 1, **fields: object) -> TaskGroup:
    return TaskGroup(name, [Task(role="r") for _ in range(count)], **fields)  # type: ignore[arg-type]


async def test_a_group_runs_after_those_on_which_it_depends(app: Ceylon, client: Client) -> None:
    first, second = await client.submit(group("first", 3)), await client.submit(group("second", 2))
    last = await client.submit(group("last", depends_on=[first.id, second.id], goal=Goal("completed >= 1")))
    view = await last.view()
    assert (view.status, sorted(view.depends_on)) == ("waiting", sorted([first.id, second.id]))

    async with running(worker_of(app)):
        assert (await last.wait("all", timeout=15)).outcome == "completed"
        ended = [await first.view(), await second.view()]

    (started,) = [task.started_ms async for task in last.tasks()]
    assert started is not None
    assert all(view.outcome == "completed" and (view.finished_ms or 0) <= started for view in ended)


async def test_a_group_on_a_finished_one_starts_at_once(app: Ceylon, client: Client) -> None:
    async with running(worker_of(app)):
        first = await client.submit(group("first"))
        await first.wait("all", timeout=15)
        last = await client.submit(group("last", depends_on=[first.id]))
        assert (await last.wait("all", timeout=5)).outcome == "completed"


async def test_a_chain_of_groups_is_cancelled_with_the_reason_when_one_fails(app: Ceylon, client: Client) -> None:
    first = await client.submit(group("first", goal=Goal("failed >= 1")))
    middle = await client.submit(group("middle", depends_on=[first.id]))
    last = await client.submit(group("last", 2, depends_on=[middle.id]))

    async with running(worker_of(app)):
        view = await last.wait("all", timeout=25)

    assert (view.outcome, view.reason) == ("cancelled", f"group {middle.id} it depends on is cancelled")
    assert (await middle.view()).reason == f"group {first.id} it depends on is failed"


async def test_what_follows_from_a_cancel_is_there_when_it_returns(client: Client) -> None:
    first = await client.submit(group("first"))
    last = await client.submit(group("last", depends_on=[first.id]))
    await first.cancel()
    assert (await last.view()).outcome == "cancelled"

    tasks = [Task(id="a", role="r"), Task(id="b", role="r", needs=["a"])]
    run = await client.submit(TaskGroup("g", tasks, on_need_failed="continue"))
    assert await run.task("a").cancel() == "cancelled"
    queued, left = await client.connection.run(
        [
            command("XLEN", client.keys.role_part("r", "normal")),
            command("ZCARD", client.keys.group_part(run.id, "outbox")),
        ]
    )
    assert (queued, left) == (3, 0)  # first, a, b


async def test_depending_on_an_unknown_group_is_refused(client: Client) -> None:
    with pytest.raises(NotFoundError, match="depends_on: group 'nobody' is not known; submit it first"):
        await client.submit(group("last", depends_on=["nobody"]))
    with pytest.raises(InvalidInputError, match="on_need_failed: 'retry' is not known; use skip, fail, continue"):
        await client.submit(group("last", on_need_failed="retry"))
    assert await client.groups() == []


async def test_a_paused_group_and_a_paused_role_start_nothing_until_they_are_resumed(
    app: Ceylon,
    client: Client,
) -> None:
    run = await client.submit(group("g", 5))
    other = await client.submit(group("other"))
    assert await run.pause() == "paused"

    async with running(worker_of(app)):
        await other.wait("all", timeout=15)
        assert (await run.view()).counters.pending == 5
        await client.pause_role("r")
        assert await run.resume() == "active"
        (role,) = await client.roles()
        assert role.paused
        later = await client.submit(group("later"))
        await eventually(lambda: _is(client, "r", queued=6), "the role has all six in its queue")
        assert (await run.view()).counters.pending == 5
        await client.resume_role("r")
        assert (await run.wait("all", timeout=15)).counters.completed == 5
        await later.wait("all", timeout=15)


async def _is(client: Client, role: str, *, queued: int) -> bool:
    (view,) = [view for view in await client.roles() if view.name == role]
    return view.queued == queued


def test_a_file_of_groups_is_submitted_and_run_in_order(commands: Commands) -> None:
    commands.start("worker", "--role", "data")
    example = ROOT / "examples" / "pipeline.yaml"
    ended = commands.run("submit", str(example), "--wait=all", "--timeout", "25s")
    assert ended.returncode == 0, ended.stderr


def test_the_lease_of_a_running_role_is_changed_by_a_command(commands: Commands) -> None:
    commands.start("worker", "--role", "data", "--lease", "24h")
    until(lambda: "data" in commands.run("ceylon", "status").stdout, "the role is served")
    changed = "role data: lease 20s instead of 86400 s\n"
    until(lambda: commands.run("ceylon", "lease", "data", "20s").stdout == changed, "its lease is in force")
    assert commands.run("ceylon", "lease", "data", "1m").stdout == "role data: lease 1m instead of 20 s\n"
    for words, error in ((("nobody", "30s"), "no worker ever served it"), (("data", "1ms"), "give at least 100ms")):
        refused = commands.run("ceylon", "lease", *words)
        assert refused.returncode == 2
        assert error in refused.stderr


def test_pause_and_resume_as_commands(commands: Commands) -> None:
    gid = commands.run("submit", str(ROOT / "examples" / "data_processing.yaml")).stdout.strip()
    assert commands.run("ceylon", "pause", gid).stdout == f"{gid}: paused\n"
    assert commands.run("ceylon", "resume", gid).stdout == f"{gid}: active\n"
    assert commands.run("ceylon", "pause", "--role", "processor").stdout == "role processor: paused\n"
    assert "processor (paused)" in commands.run("ceylon", "status").stdout
    assert commands.run("ceylon", "resume", "--role", "processor").stdout == "role processor: resumed\n"
    assert commands.run("ceylon", "resume", "--role", "processor").stdout == "role processor: was not paused\n"
    unknown = commands.run("ceylon", "pause", "--role", "procesor")
    assert unknown.returncode == 2
    assert "role 'procesor' is not known (there are: processor); did you mean \"processor\"?" in unknown.stderr
    refused = commands.run("ceylon", "pause")
    assert (refused.returncode, "give a GROUP or --role ROLE" in refused.stderr) == (2, True)


REFUSALS = {
    "waiting": "group g has not started: it waits for first and will start by itself; it can be {word}d after that, or "
    "cancelled now",
    "staging": "group g is still being submitted; it can be {word}d once that is done",
    "closing": "group g is closing: its running tasks come to their end, and no further task starts",
    "finished": "group g has finished (completed); there is nothing left to {word}",
}


@pytest.mark.parametrize("word", ["pause", "resume", "cancel"])
@pytest.mark.parametrize("status", GroupStatus)
def test_pause_resume_and_cancel_are_done_or_refused_in_a_sentence(
    status: GroupStatus, word: str, commands: Commands, bench: Bench
) -> None:
    """A group that has finished cannot be cancelled; only one that has started and is not closing can be paused."""
    _group_of(status, bench)

    ended = commands.here("ceylon", word, "g", "--namespace", bench.keys.namespace)

    if status in ("active", "paused") or (word == "cancel" and status != "finished"):
        assert (ended.exit_code, ended.stderr) == (0, "")
        assert ended.stdout.startswith("g: ")
    else:
        assert (ended.exit_code, ended.stdout) == (1, "")
        assert ended.stderr == f"Error: {REFUSALS[status].format(word=word)}\n"


def _group_of(status: GroupStatus, bench: Bench) -> None:
    """Group `g`, brought to this status."""
    match status:
        case GroupStatus.STAGING:
            bench.submit("g", last=False)
        case GroupStatus.WAITING:
            bench.submit("first")
            bench.submit("g", depends_on=["first"])
        case _:
            bench.queued("g", ["a", "b"], goal=Goal("completed >= 1", on_achieved="drain"))
    if status is GroupStatus.PAUSED:
        bench.run(transitions.pause_group(bench.keys, "g"))
    if status in (GroupStatus.CLOSING, GroupStatus.FINISHED):
        first, second = bench.started("w", "g"), bench.started("w", "g")
        bench.commit("w", first)
        if status is GroupStatus.FINISHED:
            bench.commit("w", second)


@pytest.mark.parametrize("reason", ["cancelled", "closed"])
def test_show_and_results_count_the_attempts_of_a_cancelled_task_alike(
    reason: str, commands: Commands, bench: Bench
) -> None:
    """One that was tried once and waited for its second attempt, and one that was never tried."""
    bench.queued("g", ["tried", "never"])
    bench.commit("w", bench.started("w", "g"), "retry", delay_ms=60_000)
    cancel = transitions.cancel_group(bench.keys, "g")
    bench.run(cancel if reason == "closed" else transitions.cancel_tasks(bench.keys, "g", ["tried", "never"]))

    where = ("--namespace", bench.keys.namespace)
    shown = json.loads(commands.here("ceylon", "show", "g", "--json", *where).stdout)["tasks"]
    results = [json.loads(line) for line in commands.here("ceylon", "results", "g", *where).stdout.splitlines()]

    assert {one["id"]: (one["attempt"], one["reason"]) for one in shown} == {
        "g/tried": (1, reason),
        "g/never": (0, reason),
    }
    assert {one["id"]: (one["attempts"], one["reason"]) for one in results} == {
        one["id"]: (one["attempt"], one["reason"]) for one in shown
    }


def test_a_task_that_has_ended_cannot_be_cancelled_but_a_cancelled_one_is(commands: Commands, bench: Bench) -> None:
    bench.queued("g", ["a", "b"])
    bench.commit("w", bench.started("w", "g"))

    def said(tid: str) -> tuple[int, str]:
        ended = commands.here("ceylon", "cancel", f"g/{tid}", "--namespace", bench.keys.namespace)
        return ended.exit_code, ended.output

    assert said("a") == (1, "Error: task g/a had already ended (completed)\n")
    assert said("b") == said("b") == (0, "g/b: cancelled\n")
