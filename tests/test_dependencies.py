"""Groups that wait for others: until they completed, failed, finished or achieved a goal; or can no longer."""

from __future__ import annotations

from typing import Any

import pytest
from bench import Bench
from commands import Commands

from rq_ceylon import Client, Dependency, Goal, InvalidInputError, Task, TaskGroup
from rq_ceylon.maintenance.steps import Maintenance
from rq_ceylon.store import transitions
from rq_ceylon.store.connection import Connection

pytestmark = pytest.mark.anyio

GOALS = [Goal("completed >= 1", name="one"), Goal("completed >= 3", name="three")]


def end(bench: Bench, *kinds: str) -> None:
    """The tasks of `first` end, one after the other."""
    for kind in kinds:
        (delivery,) = bench.fetch("w", 1, role="f")
        assert bench.claim("w", delivery) == ["GRANTED"]
        bench.commit("w", delivery, kind)


def both(bench: Bench, *conditions: str, goal: Any = GOALS) -> None:
    """The group `first` of two tasks, and `then`, which depends on it."""
    bench.queued("first", ["a", "b"], role="f", goal=goal)
    bench.run(transitions.register(bench.keys, "first", "then"))
    entries = ["first" if one == "completed" else f"first={one}" for one in conditions]
    bench.submit("then", depends_on=entries)


def status(bench: Bench) -> str:
    meta = bench.meta("then")
    return meta["outcome"] if meta["status"] == "finished" else meta["status"]


@pytest.mark.every_engine
@pytest.mark.parametrize(
    ("when", "goal", "kinds", "after_one", "after_both"),
    [
        ("completed", (), ["completed", "completed"], "waiting", "active"),
        ("completed", (), ["completed", "failed"], "waiting", "cancelled"),
        ("failed", (), ["failed", "completed"], "waiting", "active"),
        ("failed", (), ["completed", "completed"], "waiting", "cancelled"),
        ("finished", (), ["failed", "completed"], "waiting", "active"),
        ("finished", (), ["completed", "completed"], "waiting", "active"),
        ("achieved:one", GOALS[:1], ["completed", "failed"], "active", "active"),
        ("achieved:one", GOALS[:1], ["failed", "completed"], "waiting", "active"),
        ("achieved:one", GOALS[:1], ["failed", "failed"], "waiting", "cancelled"),
        ("achieved:nosuch", GOALS[:1], ["completed", "completed"], "waiting", "cancelled"),
    ],
)
def test_a_group_starts_when_its_condition_holds_and_is_cancelled_when_it_cannot(
    when: str, goal: Any, kinds: list[str], after_one: str, after_both: str, bench: Bench
) -> None:
    both(bench, when, goal=goal)

    end(bench, kinds[0])
    assert status(bench) == after_one
    end(bench, kinds[1])
    assert status(bench) == after_both
    if after_both == "cancelled" and when == "failed":
        assert bench.meta("then")["reason"] == "group first it depends on is completed, not failed"


def test_all_conditions_must_hold(bench: Bench) -> None:
    both(bench, "achieved:one", "finished", goal=GOALS[:1])
    end(bench, "completed")
    assert bench.meta("then")["depends_on"] == "first=finished"
    end(bench, "failed")
    assert status(bench) == "active"


def test_a_goal_that_closes_its_group_is_told_though_closing_removes_the_outbox(bench: Bench) -> None:
    goal = Goal("completed >= 1", name="enough", on_achieved="drain")
    bench.queued("first", ["a", "b", "c"], role="f", goal=goal)
    bench.run(transitions.register(bench.keys, "first", "then"))
    bench.submit("then", depends_on=["first=achieved:enough"])
    running = bench.fetch("w", 2, role="f")
    assert bench.claim("w", *running) == ["GRANTED", "GRANTED"]

    bench.commit("w", running[0])

    assert bench.meta("first")["status"] == "closing"
    assert status(bench) == "active"


def test_a_goal_that_settles_while_its_group_waits_is_told(bench: Bench) -> None:
    bench.queued("other", ["o"], role="q")
    goals = [Goal(call="enough", name="called"), Goal("completed >= 1", name="one", deadline="1h")]
    bench.submit("first", ["a"], role="f", goal=goals, depends_on=["other"])
    bench.run(transitions.judge(bench.keys, "first", goal="called", verdict="achieved"))
    bench.run(transitions.register(bench.keys, "first", "then"))
    bench.submit("then", depends_on=["first=achieved:called"])

    bench.run(transitions.cancel_group(bench.keys, "first"))
    bench.relay("first")

    assert status(bench) == "active"
    lines = bench.meta("first")["goals_at_start"].split(";")
    assert [line.split("|")[0] for line in lines] == ["called", "one"]


def test_a_message_of_a_goal_that_closing_removed_is_written_again(bench: Bench) -> None:
    both(bench, "achieved:one", goal=GOALS[:1])
    (delivery,) = bench.fetch("w", 1, role="f")
    assert bench.claim("w", delivery) == ["GRANTED"]
    running = bench.fetch("w", 1, role="f")
    assert bench.claim("w", *running) == ["GRANTED"]
    bench.commit_with_pages("w", delivery)  # its worker died before it told anybody
    bench.run(transitions.cancel_group(bench.keys, "first"))

    bench.relay("first")

    assert status(bench) == "active"


async def test_maintenance_asks_for_what_no_message_told(bench: Bench, connection: Connection) -> None:
    bench.queued("first", ["a", "b"], role="f", goal=GOALS[:1])
    (delivery,) = bench.fetch("w", 1, role="f")
    assert bench.claim("w", delivery) == ["GRANTED"]
    bench.commit("w", delivery)
    bench.submit("then", depends_on=["first=achieved:one"])
    bench.submit("later", depends_on=["first=achieved:two"])
    bench.submit("never", depends_on=["nosuch=finished"])

    await Maintenance(connection, bench.keys).run_once()

    assert (status(bench), bench.meta("later")["status"]) == ("active", "waiting")
    assert bench.meta("never")["outcome"] == "cancelled"
    assert bench.meta("first")["dependents"].split() == ["then", "later"]


async def test_conditions_are_checked_before_anything_is_sent(client: Client) -> None:
    first = await client.submit(TaskGroup("first", [Task(role="f")], goal=Goal("completed >= 1", name="one")))
    group = TaskGroup("then", [Task(role="t")], depends_on=[Dependency(first.id, "achieved:one")])
    then = await client.submit(group)
    view = await then.view()
    assert (view.status, view.depends_on) == ("waiting", (first.id,))
    for when in ("done", "achieved", "achieved:", "achieved:a b", 1):
        with pytest.raises(InvalidInputError, match="depends_on"):
            await client.submit(TaskGroup("x", [Task()], depends_on=[Dependency(first.id, when)]))  # type: ignore[arg-type]
    with pytest.raises(InvalidInputError, match=r"has no goal 'on'; did you mean \"one\"\?"):
        await client.submit(TaskGroup("x", [Task()], depends_on=[Dependency(first.id, "achieved:on")]))
    for bad in (Dependency(first.id), first.id):
        with pytest.raises(InvalidInputError, match="give a list"):
            await client.submit(TaskGroup("x", [Task()], depends_on=bad))  # type: ignore[arg-type]


def test_a_group_file_names_conditions(commands: Commands, bench: Bench) -> None:
    where = ("--namespace", bench.keys.namespace)
    (commands.folder / "batch.yaml").write_text(
        "name: batch\ntasks: {a: {role: f}, b: {role: f}}\ngoal: {name: one, when: completed >= 1}\n---\n"
        "name: alarm\ntasks: {mail: {role: t}}\ndepends_on: {group: batch, when: failed}\n---\n"
        "name: first-answer\ntasks: {use: {role: t}}\ndepends_on: [{group: batch, when: 'achieved:one'}]\n"
    )
    (commands.folder / "bad.yaml").write_text(
        "name: a\ntasks: {a: }\ndepends_on: [{group: nosuch}, {group: b, when: later}, {grp: b}]\n"
    )
    bad = commands.here("ceylon", "validate", "bad.yaml")
    assert bad.exit_code == 2
    assert bad.output.count("bad.yaml:3:") == 4
    assert "use completed, failed, finished or achieved:GOAL" in bad.output
    submitted = commands.here("ceylon-submit", "batch.yaml", *where)
    assert submitted.exit_code == 0, submitted.output
    _, alarm, answer = submitted.stdout.split()

    (delivery,) = bench.fetch("w", 1, role="f")
    assert bench.claim("w", delivery) == ["GRANTED"]
    bench.commit("w", delivery)

    assert [bench.meta(gid)["status"] for gid in (alarm, answer)] == ["waiting", "active"]
    assert "alarm" in commands.here("ceylon", "graph", "batch.yaml").output
