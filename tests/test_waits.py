"""Why a task waits, as `ceylon show` tells it: every cause by its own words."""

import json
from typing import Any

import pytest
from bench import Bench
from commands import Commands

from rq_ceylon import Ceylon, Task, TaskGroup, WaitTimeoutError
from rq_ceylon.store import transitions


def serve(bench: Bench, *, roles: list[str], names: list[str], busy: int = 0) -> None:
    """The heartbeat of a worker with two slots."""
    tasks = {f"x/{n}": 1 for n in range(busy)}
    facts = {"roles": roles, "slots": 2, "task_names": names, "tasks": tasks}
    for call in transitions.heartbeat(bench.keys, "w", facts, ttl_ms=60_000, roles=roles):
        bench.run(call)


def shown(commands: Commands, bench: Bench, target: str) -> dict[str, Any]:
    """Why each task waits."""
    ended = commands.here("ceylon", "show", target, "--json", "--namespace", bench.keys.namespace)
    assert ended.exit_code == 0, ended.output
    return {task["id"].partition("/")[2]: task["waits"] for task in json.loads(ended.stdout)["tasks"]}


def test_why_a_task_waits_names_role_then_name_then_backlog(app: Ceylon, commands: Commands, bench: Bench) -> None:
    with app.sync_client() as client:
        gid = client.submit(TaskGroup("g", [Task(role="pictures", uses="resise")])).id
    assert shown(commands, bench, gid) == {"1": "no worker serves role 'pictures' (no worker is running)"}

    serve(bench, roles=["picture"], names=["resize"])
    assert shown(commands, bench, gid) == {
        "1": "no worker serves role 'pictures' (workers serve: picture); did you mean \"picture\"?"
    }
    serve(bench, roles=["pictures"], names=["resize"])
    assert shown(commands, bench, gid) == {
        "1": "no live worker of role pictures knows 'resise'; did you mean \"resize\"?"
    }
    serve(bench, roles=["pictures"], names=["resise"], busy=2)
    assert shown(commands, bench, gid) == {"1": "its turn has not come: 2 of 2 slots of role pictures are busy"}


@pytest.mark.parametrize("what", ["group", "role"])
def test_a_task_waits_while_its_group_or_its_role_is_paused(what: str, commands: Commands, bench: Bench) -> None:
    serve(bench, roles=["p"], names=[])
    bench.queued("g")
    group = [transitions.pause_group(bench.keys, "g")]
    for call in group if what == "group" else transitions.pause_role(bench.keys, "p"):
        bench.run(call)

    resume = "--role p" if what == "role" else "g"
    named = "role p" if what == "role" else "its group"
    assert shown(commands, bench, "g") == {"a": f"{named} is paused; go on with: ceylon resume {resume}"}


def test_tasks_of_a_group_that_has_not_started_wait_for_what_it_waits_for(commands: Commands, bench: Bench) -> None:
    serve(bench, roles=["p"], names=[])
    bench.submit("first")
    bench.submit("later", depends_on=["first"])
    bench.submit("staged", last=False)

    assert shown(commands, bench, "later") == {"a": "its group waits for first"}
    assert shown(commands, bench, "staged") == {"a": "its group is still being submitted"}


def test_delays_retries_and_needs_are_told_with_their_times_and_names(
    app: Ceylon, commands: Commands, bench: Bench
) -> None:
    serve(bench, roles=["p"], names=["resize"])
    tasks = [Task(id="a"), Task(id="b", needs=["a"]), Task(id="c", needs=["a", "b"], uses="resize")]
    with app.sync_client() as client:
        gid = client.submit(TaskGroup("g", tasks, defaults=Task(role="p"))).id
        bench.commit("w", bench.started("w", gid), "retry", delay_ms=90_500)
        later = client.submit(TaskGroup("later", [Task(role="p", delay="2h")])).id

    waits = shown(commands, bench, gid)
    one = commands.here("ceylon", "show", f"{gid}/c", "--namespace", bench.keys.namespace)

    assert waits["a"].startswith("attempt 2 after an error in 1 min ")
    assert waits["b"] == "1 task that it needs has not ended"
    assert waits["c"] == "2 tasks that it needs have not ended"
    assert one.stdout.endswith("  function: resize\n  needs: a, b\n  waits: 2 tasks that it needs have not ended\n")
    assert shown(commands, bench, later)["1"].startswith(("due in 2 h 0 min, at ", "due in 1 h 59 min, at "))


def test_what_has_started_or_ended_waits_for_nothing(commands: Commands, bench: Bench) -> None:
    bench.queued("g", ["a", "b"])
    bench.commit("w", bench.started("w", "g"))
    bench.started("w", "g")

    assert shown(commands, bench, "g") == {"a": None, "b": None}


def test_a_wait_that_takes_too_long_says_what_the_task_waits_for(app: Ceylon, bench: Bench) -> None:
    with app.sync_client() as client:
        run = client.submit(TaskGroup("g", [Task(role="pictures", uses="resise")]))
        with pytest.raises(WaitTimeoutError, match=r"within 0\.1 s; it waits: no worker serves role 'pictures'"):
            run.task("1").result(timeout=0.1)
        (delivery,) = bench.fetch("w", role="pictures")
        assert bench.claim("w", delivery) == ["GRANTED"]
        with pytest.raises(WaitTimeoutError, match=r"within 0\.1 s; it runs on worker w$"):
            run.task("1").result(timeout=0.1)


def test_handles_show_what_they_are_handles_of(app: Ceylon) -> None:
    with app.sync_client() as client:
        run = client.submit(TaskGroup("pages", [Task(id="a")]))
        assert repr(run) == f"<SyncGroupHandle {run.id} 'pages'>"
        assert repr(run.task("a")) == f"<SyncTaskHandle {run.id}/a>"
        assert repr(client.group(run.id)) == f"<SyncGroupHandle {run.id}>"
