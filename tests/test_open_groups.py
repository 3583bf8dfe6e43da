"""Open groups: tasks are added while the group runs, each id once; goals wait for the end of that where they must."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from typing import Any

import pytest
from bench import Bench
from commands import LIMIT_S, Commands

from rq_ceylon import Ceylon, Client, Goal, InvalidInputError, NotFoundError, Task, TaskGroup
from rq_ceylon.audit import audit
from rq_ceylon.maintenance.steps import Maintenance
from rq_ceylon.store import transitions
from rq_ceylon.store.codec import task_text
from rq_ceylon.store.connection import Connection
from rq_ceylon.store.transitions import AddReply, StagedTask
from rq_ceylon.worker import Worker

pytestmark = pytest.mark.anyio


def opened(bench: Bench, tids: Sequence[str] = ("a",), *, until_idle: bool = False, **options: Any) -> None:
    bench.queued("g", tids, open="i" if until_idle else "o", **options)


def add(bench: Bench, *tids: str, needs: dict[str, list[str]] | None = None, delay_ms: int | None = None) -> AddReply:
    text = task_text("p", 2, delay_ms, None, None, b"{}")
    call = transitions.add(bench.keys, "g", [StagedTask(tid, text, (needs or {}).get(tid, ())) for tid in tids])
    answer = transitions.add_reply("g", bench.run(call))
    bench.ring(answer.pages)
    return answer


def end_all(bench: Bench, kinds: dict[str, str] | None = None) -> list[str]:
    """Run what is queued; each task ends as `kinds` says, or completes. Returns the tasks that ran."""
    ran = []
    while deliveries := bench.fetch("w"):
        for delivery in deliveries:
            if bench.claim("w", delivery) == ["GRANTED"]:
                bench.commit("w", delivery, (kinds or {}).get(delivery.tid, "completed"))
                ran.append(delivery.tid)
        bench.fetch("w", 0, acks=[delivery.entry for delivery in deliveries])
    return ran


def goal(bench: Bench, name: str = "goal") -> str:
    return bench.meta("g").get(f"goal:{name}", "undecided").split("|")[0]


@pytest.mark.every_engine
def test_an_open_group_goes_on_without_open_tasks_until_it_is_sealed(bench: Bench) -> None:
    opened(bench)
    assert end_all(bench) == ["a"]
    assert bench.meta("g")["status"] == "active"

    assert add(bench, "b", "c").added == 2
    assert sorted(end_all(bench)) == ["b", "c"]
    bench.run(transitions.seal(bench.keys, "g", untouched_ms=0))

    assert (bench.meta("g")["status"], bench.meta("g")["outcome"]) == ("finished", "completed")
    assert bench.counters("g") == {"total": 3, "completed": 3}
    assert add(bench, "d").word == "CLOSED"


@pytest.mark.every_engine
def test_a_group_that_is_open_until_idle_seals_itself_after_a_first_task(bench: Bench) -> None:
    opened(bench, (), until_idle=True, goal="completed >= 100%")
    assert bench.meta("g")["status"] == "active"
    add(bench, "a")
    add(bench, "b", needs={"b": ["a"]})

    assert end_all(bench) == ["a", "b"]

    assert (bench.meta("g")["status"], goal(bench)) == ("finished", "achieved")


@pytest.mark.every_engine
def test_a_known_id_adds_nothing_be_its_task_open_or_over(bench: Bench) -> None:
    opened(bench, ["a", "b"])
    first = bench.fetch("w", 1)[0]
    assert bench.claim("w", first) == ["GRANTED"]
    bench.commit("w", first)

    assert add(bench, "a", "b", "c", "c").added == 1
    assert add(bench, "a", "b", "c").added == 0
    assert bench.counters("g") == {"total": 3, "pending": 2, "completed": 1}
    assert sorted(end_all(bench)) == sorted({"a", "b", "c"} - {first.tid})


def test_a_need_on_a_task_that_has_ended_is_settled_at_once(bench: Bench) -> None:
    opened(bench, ["good", "bad"])
    end_all(bench, {"bad": "failed"})

    needs = {"x": ["good"], "y": ["bad"], "z": ["y"], "u": ["good", "x"], "v": ["bad", "x"]}
    assert add(bench, "x", "y", "z", "u", "v", needs=needs).added == 5
    bench.relay("g")
    assert bench.counters("g") == {
        "total": 7, "waiting": 1, "pending": 1, "completed": 1, "failed": 1, "cancelled": 3,
    }  # fmt: skip
    assert end_all(bench) == ["x", "u"]


def test_an_unknown_need_refuses_all_of_the_call(bench: Bench) -> None:
    opened(bench)
    before = bench.state("g")

    assert add(bench, "b", "c", needs={"c": ["nosuch"]}) == AddReply("REFUSED", "nosuch")
    assert add(bench, "b", "c", needs={"b": ["c"]}).word == "REFUSED"  # `c` comes behind it
    assert bench.state("g") == before


def test_goals_that_ask_for_a_share_wait_until_the_group_is_sealed(bench: Bench) -> None:
    opened(
        bench,
        ["a"],
        goal=[
            Goal("completed >= 50%", name="share"),
            Goal("completed >= 3", name="three"),
            Goal("failed <= 0", name="none"),
        ],
    )
    end_all(bench)
    assert [goal(bench, name) for name in ("share", "three", "none")] == ["undecided"] * 3
    add(bench, "b", "c", "d")
    end_all(bench, {"d": "failed"})
    assert [goal(bench, name) for name in ("share", "three", "none")] == ["undecided", "achieved", "failed"]

    bench.run(transitions.seal(bench.keys, "g", untouched_ms=0))

    assert goal(bench, "share") == "achieved"


def test_a_goal_that_closes_an_open_group_ends_the_adding(bench: Bench) -> None:
    opened(bench, ["a", "b"], goal=Goal("completed >= 1", on_achieved="drain"))
    first = bench.fetch("w", 1)[0]
    assert bench.claim("w", first) == ["GRANTED"]
    bench.commit("w", first)

    assert add(bench, "c") == AddReply("CLOSED", "finished")
    assert bench.counters("g") == {"total": 2, "completed": 1, "cancelled": 1}


def test_tasks_are_added_to_a_group_that_is_paused_or_waits_for_others(bench: Bench) -> None:
    bench.queued("other", ["o"])
    opened(bench, ["a"], depends_on=["other"])
    bench.run(transitions.register(bench.keys, "other", "g"))
    assert add(bench, "b", delay_ms=3_600_000).added == 1
    assert [delivery.gid for delivery in bench.fetch("w")] == ["other"]
    bench.run(transitions.met(bench.keys, "g", "other", "completed"))
    bench.relay("g")
    assert end_all(bench) == ["a"]
    bench.run(transitions.pause_group(bench.keys, "g"))
    assert add(bench, "c").pages == []
    assert bench.fetch("w") == []
    bench.run(transitions.resume_group(bench.keys, "g"))
    bench.relay("g")
    assert end_all(bench) == ["c"]
    assert bench.counters("g") == {"total": 3, "pending": 1, "completed": 2}


def test_the_delay_of_a_task_added_to_a_group_that_waits_counts_from_its_start(bench: Bench) -> None:
    opened(bench, ["a"], depends_on=["other"])
    hour_ago = int(bench.meta("g")["touched"]) - 3_600_000
    bench.redis.hset(bench.keys.group_part("g", "meta"), "touched", hour_ago)
    add(bench, "b", delay_ms=60_000)
    bench.run(transitions.met(bench.keys, "g", "other", "completed"))
    bench.relay("g")
    assert {one.tid: bench.claim("w", one) for one in bench.fetch("w")} == {"a": ["GRANTED"], "b": ["PARKED"]}
    bench.relay("g")

    (due,) = [score for _, score in bench.redis.zrange(bench.keys.role_part("p", "delayed"), 0, -1, withscores=True)]
    seconds, _ = bench.redis.time()
    assert 0 < due - int(seconds) * 1000 < 61_000


async def test_an_open_group_is_sealed_when_no_task_was_added_for_its_time(
    bench: Bench, connection: Connection
) -> None:
    async def look() -> str:
        bench.redis.zadd(bench.keys.index_of("g"), {"g": 1})
        await Maintenance(connection, bench.keys).run_once()
        return bench.meta("g")["status"]

    opened(bench)
    end_all(bench)
    hour_ago = int(bench.meta("g")["touched"]) - 3_600_000
    bench.redis.hset(bench.keys.group_part("g", "meta"), "touched", hour_ago)
    add(bench, "b")
    end_all(bench)
    assert await look() == "active"  # `added` counts
    bench.redis.hset(bench.keys.group_part("g", "meta"), "added", hour_ago)
    assert await look() == "active"  # the silence of a rolling group's client means nothing here
    bench.redis.hset(bench.keys.group_part("g", "meta"), "open_timeout", 3_600_000)
    assert await look() == "finished"


async def test_tasks_are_added_from_python_with_the_defaults_of_their_group(app: Ceylon, client: Client) -> None:
    @app.task(role="r")
    async def work(number: int, factor: int = 1) -> int:
        return number * factor

    group = TaskGroup("pages", [work.using(id="0").bind(0)], open=True, defaults=Task(uses="work", role="r"))
    run = await client.submit(group)
    assert await run.add([Task(id=str(n), arguments={"number": n}) for n in range(700)]) == 699
    assert await run.add([work.bind(7, factor=2), Task(id="last", arguments={"number": 1}, needs=["0", "699"])]) == 2
    assert (await run.view()).is_open
    assert await client.group(run.id).seal() == "active"
    worker = Worker(client.url, registry=app.registry, namespace=client.keys.namespace, roles=["r"], burst=True)
    await asyncio.wait_for(worker.run(), LIMIT_S)

    view = await run.wait("all", timeout=LIMIT_S)
    assert (view.counters.completed, view.counters.total, view.is_open) == (702, 702, False)
    assert not (await audit(client.connection, client.keys)).drift
    with pytest.raises(InvalidInputError, match=r"is finished and takes no more tasks$"):
        await run.add([work.bind(1)])


async def test_what_cannot_be_added_is_refused_before_anything_is_sent(app: Ceylon, client: Client) -> None:
    @app.task(role="r")
    async def work(number: int) -> int:
        return number

    plain = await client.submit(TaskGroup("plain", [work.bind(1)]))
    run = await client.submit(TaskGroup("open", open="until_idle"))
    for tasks, words in [
        ([work.using(id="a").bind(1), work.using(id="a").bind(2)], "two tasks have the id 'a'"),
        ([work.using(id="a", needs=["b"]).bind(1), work.using(id="b", needs=["a"]).bind(2)], "in a circle"),
        ([work.using(id="a").bind(1), Task(uses="work", arguments={"numbr": 1})], "numbr"),
        ([work.using(needs=["nosuch"]).bind(1)], "needs 'nosuch', which group"),
    ]:
        with pytest.raises(InvalidInputError, match=words):
            await run.add(tasks)
    assert (await run.view()).counters.total == 0
    with pytest.raises(InvalidInputError, match=r"takes no tasks: it was not submitted as an open group"):
        await plain.add([work.bind(1)])
    with pytest.raises(NotFoundError):
        await client.group("nosuch").add([work.bind(1)])
    for bad in ("yes", 1, None):
        with pytest.raises(InvalidInputError, match="open: "):
            await client.submit(TaskGroup("g", [work.bind(1)], open=bad))  # type: ignore[arg-type]
    with pytest.raises(InvalidInputError, match="open_timeout"):
        await client.submit(TaskGroup("g", [work.bind(1)], open=True, open_timeout=0))


def test_a_group_file_may_be_open_and_another_one_adds_its_tasks(commands: Commands, bench: Bench) -> None:
    where = ("--namespace", bench.keys.namespace)
    (commands.folder / "open.yaml").write_text("name: g\nopen: true\nopen_timeout: 2h\ntasks: {a: {role: p}}\n")
    (commands.folder / "more.yaml").write_text(
        "name: more\ndefaults: {role: p}\ntasks: {a: {}, b: {}, c: {needs: a}}\n"
    )
    gid = commands.here("ceylon-submit", "open.yaml", *where).stdout.strip()

    added = commands.here("ceylon", "add", gid, "more.yaml", *where)
    assert (added.exit_code, added.output) == (0, f"{gid}: 2 tasks added, 1 known before\n")
    assert "open: takes tasks (ceylon add" in commands.here("ceylon", "show", gid, *where).output
    assert sorted(end_all(bench)) == ["a", "b", "c"]
    sealed = commands.here("ceylon", "seal", gid, *where)
    assert (sealed.exit_code, sealed.output) == (0, f"{gid}: finished\n")
    assert commands.here("ceylon", "seal", gid, *where).exit_code == 1
    assert commands.here("ceylon", "add", gid, "more.yaml", *where).exit_code == 2
