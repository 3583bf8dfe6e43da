"""The tutorial's words: its text as printed, and what a playground promises beyond it."""

from __future__ import annotations

import ast
import asyncio
import re
import textwrap
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from datetime import date
from pathlib import Path
from typing import Any

import pytest
from commands import ROOT, Commands, commands_on, eventually, until
from pydantic_core import from_json, to_json

from rq_ceylon import models
from rq_ceylon.app import Ceylon
from rq_ceylon.attempt import FailTask, TaskContext
from rq_ceylon.client import Client
from rq_ceylon.errors import CeylonError, InvalidInputError, RedisError
from rq_ceylon.handlers import Handler, Registry
from rq_ceylon.models import Priority
from rq_ceylon.task import (
    GoalStatus,
    TaskExecutionAgent,
    TaskGroup,
    TaskGroupGoal,
    TaskManager,
    TaskMessage,
    TaskPlayGround,
    TaskStatus,
    crew,
)
from rq_ceylon.worker import Worker

TUTORIAL, EXAMPLE = ROOT / "docs" / "tutorial.md", ROOT / "examples" / "tutorial.py"
DEBUG_MODE = "import logging"

pytestmark = pytest.mark.anyio


# ---- the tutorial as printed -----------------------------------------------------------------------------------------
def lifted(*, debug_mode: bool) -> str:
    """The code of the tutorial as one module: definitions, the class with its methods, and what runs it."""
    fences = re.findall(r"```python\n(.*?)```", TUTORIAL.read_text(), re.DOTALL)
    first, debug = fences[0], next(fence for fence in fences if fence.startswith(DEBUG_MODE))
    (head,) = [fence for fence in fences if fence.startswith("class TaskProcessor")]
    (last,) = [fence for fence in fences if fence.startswith("async def main")]
    methods = [fence for fence in fences if re.match(r"(async )?def \w+\(\s*self", fence)]
    others = [fence for fence in fences if fence not in (first, debug, head, last, *methods)]
    body = [textwrap.indent(method, "    ") for method in methods]
    return "\n".join([first, *([debug] if debug_mode else []), *others, head, *body, last])


HELD = """
import asyncio, os
from rq_ceylon import Ceylon, TaskContext
from rq_ceylon.task import TaskExecutionAgent

app = Ceylon()

async def hold(self, task):
    await asyncio.sleep(task.duration)
    while task.metadata.get("item_number", 0) >= 8 and not os.path.exists("told"):
        await asyncio.sleep(0.01)

@app.task
async def default(context: TaskContext) -> None:
    await hold(None, context)

TaskExecutionAgent.execute_task = hold
"""
"""What agents and workers do by default; but the last two of ten tasks end only when the statistics were told."""


def run_module(text: str, commands: Commands) -> tuple[str, str]:
    """Run it as a user would, but for HELD; returns what it printed and what it logged."""
    path, told = commands.folder / "lifted.py", "await self.print_statistics(active_playground)\n"
    assert text.count(told) == 1
    path.write_text("import held\n" + text.replace(told, f"{told}            open('told', 'a').close()\n"))
    ended = commands.python("-W", "error", str(path))
    assert ended.returncode == 0, ended.stdout + ended.stderr
    return ended.stdout, ended.stderr


def assert_as_promised(printed: str, logged: str) -> None:
    lines = [line.rpartition(" - ")[2] for line in logged.splitlines()]
    progress = [line for line in lines if line.startswith("Progress: ")]
    assert progress[:5] == [f"Progress: {n}/5 tasks completed" for n in range(1, 6)]
    assert progress[5:] == []  # a settled goal is not asked again
    achieved = lines.index("Goal achieved! System can stop while tasks continue.")
    assert lines.index("Progress: 5/5 tasks completed") < achieved
    assert lines.index("Goal Status: achieved") < achieved
    (completed,) = [int(line.split()[-1]) for line in lines[achieved:] if line.startswith("Completed Tasks: ")]
    assert 5 <= completed <= 8
    assert "Completed Tasks: 10" in printed.splitlines()
    assert "Group Data Processing: completed (10 completed)" in printed.splitlines()
    assert all(float(mean) >= 1 for mean in re.findall(r"^Average Duration: (.*)s$", printed, re.MULTILINE))
    steps = [f"Workflow: {{'did': '{step}', 'with': {{'year': 2025}}}}" for step in ("load", "clean", "report")]
    assert [line for line in lines if line.startswith("Workflow: ")] == steps
    assert "Burst: 12 tasks by 6 workers" in lines


@pytest.fixture
def nowhere(tmp_path: Path) -> Iterator[Commands]:
    with commands_on("", tmp_path) as commands:
        (tmp_path / "held.py").write_text(HELD)
        yield commands


def test_the_example_is_the_code_of_the_tutorial() -> None:
    example = ast.parse(EXAMPLE.read_text())

    example.body = example.body[1:]  # its docstring
    assert ast.unparse(ast.parse(lifted(debug_mode=False))) == ast.unparse(example)


def test_the_tutorial_runs_where_no_redis_is_configured(nowhere: Commands) -> None:
    printed, logged = run_module(lifted(debug_mode=False), nowhere)

    assert_as_promised(printed, logged)
    assert "rq_ceylon." not in logged


@pytest.mark.long
def test_the_tutorial_runs_with_worker_processes(commands: Commands) -> None:
    (commands.folder / "held.py").write_text(HELD)
    for _ in range(2):
        commands.start("worker", "held:app", "--role", "processor", "-c", "2")
    with Ceylon(commands.url).sync_client() as client:
        until(lambda: len(client.workers()) == 2, "two workers are registered")
        text = lifted(debug_mode=True).replace(
            "num_workers=2, tasks_per_worker=2)\n    await", "num_workers=0)\n    await"
        )
        assert "num_workers=0" in text

        printed, logged = run_module(text, commands)

        assert_as_promised(printed, logged)
        assert "Successfully completed minimum required tasks!" in logged  # debug mode
        (group,) = [group for group in client.groups() if group.name == "Data Processing"]
    (goal,) = group.goals
    assert (goal.name, goal.status, group.outcome) == ("Partial-Processing-Complete", GoalStatus.ACHIEVED, "completed")
    assert goal.settled is not None
    assert goal.settled.by == "callable"
    assert 5 <= goal.settled.counters.completed <= 8
    assert len(re.findall(r"^Worker \S+-[0-9a-f]{8}: ", printed, re.MULTILINE)) == 2


# ---- building blocks -------------------------------------------------------------------------------------------------
class Fast(TaskExecutionAgent):
    """Returns the task's name."""

    async def execute_task(self, task: TaskMessage) -> Any:
        return task.name


class Gated(TaskExecutionAgent):
    """Holds every task until its gate opens."""

    def __init__(self, name: str, worker_role: str = "r", max_concurrent_tasks: int = 2) -> None:
        super().__init__(name, worker_role, max_concurrent_tasks)
        self.gate = asyncio.Event()
        self.started: list[str] = []

    async def execute_task(self, task: TaskMessage) -> Any:
        self.started.append(task.task_id)
        await self.gate.wait()


def messages(count: int, role: str = "r", prefix: str = "t") -> list[TaskMessage]:
    return [TaskMessage(task_id=f"{prefix}{n}", name=f"Task {n}", required_role=role) for n in range(1, count + 1)]


def group_of(tasks: list[TaskMessage], check: Callable[..., Any] | None = None, **more: Any) -> TaskGroup:
    goal = None if check is None else TaskGroupGoal("Enough, now!", "", check, "Well done.", "Alas.")
    return TaskManager.create_task_group("Some tasks", "", tasks, goal, **more)


@pytest.fixture
def playground(app: Ceylon) -> TaskPlayGround:
    return TaskPlayGround("test", app=app)


# ---- live objects ----------------------------------------------------------------------------------------------------
async def test_a_users_own_objects_tell_how_everything_ended(playground: TaskPlayGround) -> None:
    tasks = messages(6)
    group = group_of(tasks, lambda groups, completed: len(completed) >= 3)
    assert group.goal is not None
    assert (group.status, group.goal.status) == (TaskStatus.PENDING, GoalStatus.NOT_STARTED)
    assert {task.group_id for task in tasks} == {group.task_id}

    async with playground.play(workers=[Fast("a b", "r")]) as playing:
        await playing.assign_task_groups([group])
        assert playing.task_manager.task_groups[group.task_id] is group

    assert (group.status, group.goal.status) == (TaskStatus.COMPLETED, GoalStatus.ACHIEVED)
    for task in tasks:
        assert (task.status, task.completed, task.result, task.error) == (TaskStatus.COMPLETED, True, task.name, "")
        assert task.assigned_to == "a b"
        assert task.start_time is not None
        assert task.end_time is not None
        assert task.start_time <= task.end_time
        assert playing.get_completed_tasks()[task.task_id] is task
    assert playing.get_task_results() == {task.task_id: task.name for task in playing.get_completed_tasks().values()}


async def test_a_task_is_in_progress_while_its_agent_runs_it(playground: TaskPlayGround) -> None:
    agent, group = Gated("a"), group_of(messages(3))

    async with playground.play(workers=[agent]) as playing:
        await playing.assign_task_groups([group])
        await eventually(lambda: len(agent.started) == 2, "both slots are busy")
        running = [task for task in group.subtasks if task.status is TaskStatus.IN_PROGRESS]
        assert [agent.active_tasks[task.task_id] for task in running] == running
        assert all(task.start_time and task.assigned_to == "a" for task in running)
        assert group.status is TaskStatus.IN_PROGRESS
        agent.gate.set()

    assert agent.active_tasks == {}


async def test_a_condition_is_asked_once_per_completion_in_order_until_it_holds(playground: TaskPlayGround) -> None:
    asked: list[list[str]] = []

    async def check(groups: dict[str, TaskGroup], completed: dict[str, TaskMessage]) -> bool:
        assert groups == {group.task_id: group}
        assert all(task.completed and task.group_id == group.task_id for task in completed.values())
        asked.append(list(completed))
        await asyncio.sleep(0)
        return len(completed) == 30

    group = group_of(messages(40), check)
    async with playground.play(workers=[Fast(f"a{n}", "r", 5) for n in range(3)]) as playing:
        await playing.assign_task_groups([group])

    ended = list(playing.get_completed_tasks())
    assert asked == [ended[:n] for n in range(1, 31)]
    assert len(ended) == 40


async def test_a_goal_that_was_never_reached_has_failed_in_redis_too(playground: TaskPlayGround, app: Ceylon) -> None:
    group = group_of(messages(3), lambda groups, completed: len(completed) > 3)

    async with playground.play(workers=[Fast("a", "r")]) as playing:
        await playing.assign_task_groups([group])

    assert group.goal is not None
    assert (group.goal.status, group.status) == (GoalStatus.FAILED, TaskStatus.FAILED)
    async with app.client() as client:
        (view,) = await client.groups()
    assert [(goal.status, goal.success_message, goal.failure_message) for goal in view.goals] == [
        (GoalStatus.FAILED, "Well done.", "Alas.")
    ]


async def test_a_condition_that_raises_has_said_nothing(playground: TaskPlayGround) -> None:
    def check(groups: dict[str, TaskGroup], completed: dict[str, TaskMessage]) -> bool:
        if len(completed) < 3:
            raise KeyError("odd")
        return True

    group = group_of(messages(3), check)
    async with playground.play(workers=[Fast("a", "r")]) as playing:
        await playing.assign_task_groups([group])

    assert group.goal is not None
    assert (group.goal.status, group.goal.error) == (GoalStatus.ACHIEVED, "KeyError: 'odd'")


async def test_a_goal_may_be_reached_by_tasks_of_another_group(playground: TaskPlayGround) -> None:
    late = Gated("late", "late")
    first, second = (
        group_of(messages(1, "late", "l"), lambda groups, completed: len(completed) >= 2),
        group_of(messages(2)),
    )

    async with playground.play(workers=[late, Fast("a", "r")]) as playing:
        await playing.assign_task_groups([first, second])
        assert first.goal is not None
        goal = first.goal
        await eventually(lambda: goal.status is GoalStatus.ACHIEVED, "the goal is achieved")
        assert first.subtasks[0].completed is False
        late.gate.set()


# ---- tasks -----------------------------------------------------------------------------------------------------------
@dataclass
class Custom(TaskMessage):
    kind: str
    parameters: dict[str, Any]


def custom(**more: Any) -> Custom:
    return Custom(task_id="c", name="Custom", required_role="r", kind="sum", parameters={"of": [1, 2]}, **more)


async def test_a_custom_task_arrives_as_itself(playground: TaskPlayGround) -> None:
    arrived = []

    class Adding(TaskExecutionAgent):
        async def execute_task(self, task: TaskMessage) -> Any:
            arrived.append(task)
            assert isinstance(task, Custom)
            task.result = {task.kind: sum(task.parameters["of"])}

    task = custom(metadata={"owner": "me"})
    async with playground.play(workers=[Adding("a", "r")]) as playing:
        await playing.assign_task_groups([group_of([task])])

    assert arrived == [task]
    assert playing.get_task_results() == {"c": {"sum": 3}}


async def test_another_process_gets_the_fields_as_metadata(playground: TaskPlayGround, app: Ceylon) -> None:
    async def tell(context: TaskContext) -> Any:
        return [context.duration, dict(context.metadata)]

    registry = Registry()
    registry.add(Handler("default", tell))
    async with playground.play() as playing:
        group = group_of([custom(metadata={"owner": "me"}, duration="0.5s", description="Adds")])
        await playing.assign_task_groups([group])
        await Worker(
            app.settings.redis_url, namespace=app.settings.namespace, registry=registry, roles=["r"], burst=True
        ).run()

    (task,) = group.subtasks
    told = {
        "name": "Custom",
        "description": "Adds",
        "class": "Custom",
        "kind": "sum",
        "parameters": {"of": [1, 2]},
        "owner": "me",
    }
    assert task.result == [0.5, {**told, "group_id": group.task_id}]
    assert task.assigned_to not in (None, "a")


@dataclass
class Dated(Custom):
    due: date
    sizes: tuple[int, ...] = ()


class Shaped(Dated):
    pass


def arrived(metadata: dict[str, Any]) -> TaskMessage:
    context = TaskContext(
        group_id="g",
        task_id="d",
        uses="default",
        role="r",
        worker="w",
        attempt=1,
        max_attempts=1,
        crashes=0,
        fence=1,
        metadata=from_json(to_json(metadata)),
    )
    return TaskMessage.of(context)


@pytest.mark.parametrize("kind", [Dated, Shaped, TaskMessage])
def test_in_another_process_a_task_is_of_the_class_that_was_submitted(kind: type[TaskMessage]) -> None:
    more: dict[str, Any] = (
        {} if kind is TaskMessage else {"kind": "sum", "parameters": {}, "due": date(2026, 1, 2), "sizes": (1, 2)}
    )
    task = kind(task_id="d", name="Dated", group_id="elsewhere", **more)

    there = arrived(dict(task.to_task(()).metadata or {}))

    assert type(there) is kind
    assert {name: getattr(there, name) for name in more} == more
    assert (there.name, there.group_id) == ("Dated", "elsewhere")


def test_a_class_that_is_not_there_gives_a_plain_task_with_its_fields() -> None:
    there = arrived({"class": "Nowhere", "kind": "sum"})

    assert type(there) is TaskMessage
    assert there.metadata == {"class": "Nowhere", "kind": "sum"}


def test_a_field_that_cannot_travel_or_is_of_another_version_is_refused_by_name() -> None:
    task = custom()
    task.parameters = {"on": date(2026, 1, 2)}

    with pytest.raises(InvalidInputError, match=r"task 'c': field 'parameters.on': a date is not JSON"):
        task.to_task(())
    with pytest.raises(InvalidInputError, match=r"task g/d as Dated: field 'due': Input should be a valid date"):
        arrived({"class": "Dated", "kind": "sum", "parameters": {}, "due": "soon"})


async def test_a_registered_name_runs_that_handler_with_the_fields_as_arguments(app: Ceylon) -> None:
    happened = []

    @app.task(role="r", name="adding")
    async def add(kind: str, parameters: dict[str, list[int]], more: int = 0) -> int:
        return sum(parameters["of"]) + more

    app.on_start(lambda: happened.append("start"))
    app.on_stop(lambda: happened.append("stop"))
    task = custom(uses="adding", arguments={"more": 10})
    async with TaskPlayGround(app=app).play(workers=[Fast("a", "r"), Fast("b", "r")]) as playing:
        await playing.assign_task_groups([group_of([task])])

    assert task.result == 13
    assert happened == ["start", "stop"]


async def test_agents_run_tasks_that_others_submitted(playground: TaskPlayGround, app: Ceylon) -> None:
    agent = Fast("a", "r")
    async with playground.play(workers=[agent]), app.client() as client:
        handle = await client.submit(models.Task(role="r", metadata={"name": "from elsewhere"}))

        assert await handle.result(20) == "from elsewhere"


async def test_without_an_override_an_agent_sleeps_for_the_duration(playground: TaskPlayGround) -> None:
    task = TaskMessage(task_id="t", name="t", required_role="r", duration="250ms")
    async with playground.play(workers=[TaskExecutionAgent("a", "r")]) as playing:
        await playing.assign_task_groups([group_of([task])])

    assert task.start_time is not None
    assert task.end_time is not None
    assert task.end_time - task.start_time >= 0.2


async def test_a_plain_function_may_override_and_runs_in_a_thread(playground: TaskPlayGround) -> None:
    ran = []

    class Blocking(TaskExecutionAgent):
        def execute_task(self, task: TaskMessage) -> Any:
            ran.append(task.task_id)
            if task.task_id == "t2":
                raise ValueError("no")
            return threading.current_thread() is threading.main_thread()

    group = group_of(messages(2))
    async with playground.play(workers=[Blocking("a", "r")]) as playing:
        await playing.assign_task_groups([group])

    assert [task.result for task in group.subtasks] == [False, None]
    assert group.subtasks[1].error == "ValueError: no"
    assert sorted(ran) == ["t1", "t2"]


async def test_dependencies_that_were_set_after_creation_hold(playground: TaskPlayGround) -> None:
    order = []

    class Noting(TaskExecutionAgent):
        async def execute_task(self, task: TaskMessage) -> Any:
            order.append(task.task_id)

    group = group_of(messages(4))
    group.dependencies = {"t1": ["t2", "t3"], "t3": ["t4"], "t2": ["t3"]}
    async with playground.play(workers=[Noting("a", "r", 4)]) as playing:
        await playing.assign_task_groups([group])

    assert order == ["t4", "t3", "t2", "t1"]


async def test_a_failing_task_frees_its_slot_and_says_why(playground: TaskPlayGround) -> None:
    class Picky(TaskExecutionAgent):
        async def execute_task(self, task: TaskMessage) -> Any:
            if task.task_id in ("t1", "t2"):
                raise ValueError(f"not {task.name}")

    agent, group = Picky("a", "r", 1), group_of(messages(5), lambda groups, completed: len(completed) >= 4)
    group.dependencies = {"t5": ["t1"]}
    async with playground.play(workers=[agent]) as playing:
        await playing.assign_task_groups([group])

    failed, completed, cancelled = TaskStatus.FAILED, TaskStatus.COMPLETED, TaskStatus.CANCELLED
    assert [task.status for task in group.subtasks] == [failed, failed, completed, completed, cancelled]
    assert group.subtasks[0].error == "ValueError: not Task 1"
    assert sorted(playing.get_completed_tasks()) == ["t3", "t4"]
    assert agent.active_tasks == {}
    assert group.goal is not None
    assert (group.goal.status, group.status) == (GoalStatus.FAILED, TaskStatus.FAILED)


async def test_a_task_that_allows_it_is_tried_again(playground: TaskPlayGround) -> None:
    attempts = []

    class Flaky(TaskExecutionAgent):
        async def execute_task(self, task: TaskMessage) -> Any:
            attempts.append(task.task_id)
            if len(attempts) == 1:
                raise OSError("once")
            if task.task_id == "t2":
                raise FailTask("never")

    tasks = [TaskMessage(task_id=tid, name=tid, required_role="r", max_attempts=3) for tid in ("t1", "t2")]
    group = group_of(tasks, dependencies={"t2": ["t1"]})
    async with playground.play(workers=[Flaky("a", "r")]) as playing:
        await playing.assign_task_groups([group])

    assert attempts == ["t1", "t1", "t2"]
    assert [task.error for task in tasks] == ["", "FailTask: never"]


@pytest.mark.parametrize(
    ("given", "meant"),
    [
        (0, Priority.LOW),
        (1, Priority.NORMAL),
        (4, Priority.NORMAL),
        (5, Priority.HIGH),
        (9, Priority.HIGH),
        ("low", Priority.LOW),
    ],
)
def test_whole_numbers_are_priorities_too(given: int | str, meant: Priority) -> None:
    assert group_of(messages(1), priority=given).to_group().priority == meant


# ---- the playground --------------------------------------------------------------------------------------------------
async def test_two_playgrounds_play_at_once(app: Ceylon) -> None:
    async def play(name: str) -> tuple[TaskGroup, dict[str, Any]]:
        group = group_of(messages(12), lambda groups, completed: len(completed) >= 6)
        async with TaskPlayGround(name, app=app).play(
            workers=[Fast(f"{name}{n}", "r", 2) for n in range(2)]
        ) as playing:
            await playing.assign_task_groups([group])
        return group, playing.get_task_results()

    for group, results in await asyncio.gather(play("one"), play("two")):
        assert group.status is TaskStatus.COMPLETED
        assert group.goal is not None
        assert group.goal.status is GoalStatus.ACHIEVED
        assert results == {task.task_id: task.name for task in group.subtasks}


async def test_without_a_configured_redis_it_has_one_of_its_own() -> None:
    with pytest.raises(RedisError):
        _ = Ceylon().settings
    async with TaskPlayGround().play(workers=[Fast("a", "r")]) as playing:
        await playing.assign_task_groups([group_of(messages(3))])

    assert len(playing.get_completed_tasks()) == 3


async def test_it_may_be_played_again_with_the_same_group(playground: TaskPlayGround) -> None:
    group = group_of(messages(2), lambda groups, completed: len(completed) == 2)
    for _ in range(2):
        async with playground.play(workers=[Fast("a", "r")]) as playing:
            assert playing.get_completed_tasks() == {}
            await playing.assign_task_groups([group])
            with pytest.raises(CeylonError, match="already running"):
                async with playground.play():
                    pass
        assert group.goal is not None
        assert (len(playing.get_completed_tasks()), group.goal.status) == (2, GoalStatus.ACHIEVED)


async def test_what_cannot_be_assigned_is_refused_and_leaves_nothing(playground: TaskPlayGround) -> None:
    with pytest.raises(CeylonError, match="is not running"):
        await playground.assign_task_groups([group_of(messages(1))])

    async with playground.play(workers=[Fast("a", "r")]) as playing:
        good = group_of(messages(1))
        await playing.assign_task_groups([good])
        refused: dict[str, Any] = {
            "already assigned": good,
            "'t1' is taken by another group": group_of(messages(1)),
            "two tasks have the id": group_of(messages(1, prefix="x") * 2),
            "'nobody' is not a task of the group": group_of(messages(1, prefix="x"), dependencies={"nobody": ["x1"]}),
            "needs 'nobody'": group_of(messages(1, prefix="x"), dependencies={"x1": ["nobody"]}),
            "it is not JSON": group_of([custom(metadata={"at": object()})]),
            "not a group of a playground": models.TaskGroup("modern", []),
        }
        for words, group in refused.items():
            with pytest.raises(InvalidInputError, match=words):
                await playing.assign_task_groups([group])
            assert list(playing.task_manager.task_groups.values()) == [good], words
            assert list(playing.task_manager.tasks) == ["t1"], words
    assert list(playing.get_completed_tasks()) == ["t1"]


async def test_no_agent_starts_where_redis_is_not(tmp_path: Path) -> None:
    with pytest.raises(RedisError):
        async with TaskPlayGround(app=Ceylon(f"unix://{tmp_path}/none.sock")).play(workers=[Fast("a", "r")]):
            pytest.fail("it plays")


async def test_finish_lets_run_what_runs_and_cancels_the_rest(playground: TaskPlayGround, app: Ceylon) -> None:
    agent, group = Gated("a"), group_of(messages(5), lambda groups, completed: len(completed) == 5)
    async with app.client() as client, playground.play(workers=[agent]) as playing:
        await playing.assign_task_groups([group])
        await eventually(lambda: len(agent.started) == 2, "both slots are busy")
        finishing = asyncio.create_task(playing.finish())
        for _ in range(20):
            (view,) = await client.groups()
        assert (view.counters.cancelled, view.counters.in_progress, finishing.done()) == (0, 2, False)
        agent.gate.set()
        await finishing
        assert sorted(task.status for task in group.subtasks) == ["cancelled"] * 3 + ["completed"] * 2

    assert len(agent.started) == 2
    assert group.goal is not None
    assert (group.status, group.goal.status) == (TaskStatus.CANCELLED, GoalStatus.FAILED)


@pytest.mark.parametrize("leaves", ["force_close", "exception", "cancellation"])
async def test_what_is_left_at_once_is_stopped(leaves: str, playground: TaskPlayGround, app: Ceylon) -> None:
    agent, group = Gated("a"), group_of(messages(5), lambda groups, completed: False)

    async def play() -> None:
        async with playground.play(workers=[agent]) as playing:
            await playing.assign_task_groups([group])
            await eventually(lambda: len(agent.started) == 2, "both slots are busy")
            if leaves == "force_close":
                await playing.force_close()
            elif leaves == "exception":
                raise RuntimeError("enough")
            else:
                await asyncio.Event().wait()

    playing = asyncio.create_task(play())
    if leaves == "cancellation":
        await eventually(lambda: len(agent.started) == 2, "both slots are busy")
        playing.cancel()
    (ended,) = await asyncio.gather(playing, return_exceptions=True)

    assert type(ended) is {"force_close": type(None), "exception": RuntimeError}.get(leaves, asyncio.CancelledError)
    assert {task.status for task in group.subtasks} == {TaskStatus.CANCELLED}
    assert agent.active_tasks == {}
    async with app.client() as client:
        (view,) = await client.groups()
        assert (view.outcome, view.counters.cancelled) == ("cancelled", 5)
        assert await client.workers() == []


async def test_what_was_sent_when_a_cancellation_came_is_ended_too(
    playground: TaskPlayGround, app: Ceylon, monkeypatch: pytest.MonkeyPatch
) -> None:
    submit, sent, answer = Client.submit, asyncio.Event(), asyncio.Event()

    async def submit_and_wait(self: Client, work: Any) -> Any:
        handle = await submit(self, work)
        sent.set()
        await answer.wait()
        return handle

    async def play() -> None:
        async with playground.play(workers=[Gated("a")]) as playing:
            await playing.assign_task_groups([group])

    monkeypatch.setattr(Client, "submit", submit_and_wait)
    group = group_of(messages(3), lambda groups, completed: False)
    playing = asyncio.create_task(play())
    await sent.wait()
    playing.cancel()
    await asyncio.sleep(0)
    answer.set()
    with pytest.raises(asyncio.CancelledError):
        await playing

    async with app.client() as client:
        (view,) = await client.groups()
    assert (view.is_finished, view.outcome, group.status) == (True, "cancelled", TaskStatus.CANCELLED)


async def test_statistics_tell_of_groups_goals_and_workers(
    playground: TaskPlayGround, capsys: pytest.CaptureFixture[str]
) -> None:
    class Picky(TaskExecutionAgent):
        async def execute_task(self, task: TaskMessage) -> Any:
            if task.task_id == "t2":
                raise ValueError("no")

    async with playground.play(workers=[Picky("ann", "r")]) as playing:
        await playing.assign_task_groups([group_of(messages(3), lambda groups, completed: len(completed) > 1)])
    await playing.print_statistics()
    short = capsys.readouterr().out
    await playing.print_all_statistics()
    long = capsys.readouterr().out

    *counts, duration = short.splitlines()
    assert counts == ["Final Statistics:", "Completed Tasks: 2", "Failed Tasks: 1"]
    assert re.fullmatch(r"Average Duration: \d\.\ds", duration)
    assert re.sub(r"\d\.\ds on", "_ on", long) == short + (
        "Group Some tasks: completed (2 completed, 1 failed)\n"
        "  Goal Enough, now!: achieved\n"
        "  Task 2: ValueError: no\n"
        "Worker ann: 2 completed, _ on average\n"
    )


# ---- more and fewer agents -------------------------------------------------------------------------------------------
async def test_an_appended_agent_starts_and_a_removed_one_ends_what_it_runs(
    playground: TaskPlayGround, app: Ceylon
) -> None:
    first, second, third = Gated("first"), Gated("second"), Gated("third")
    workers: list[TaskExecutionAgent] = [first]
    group = group_of(messages(8))

    async def has_left() -> bool:
        return len(await client.workers()) == 2

    async with app.client() as client, playground.play(workers=workers) as playing:
        await playing.assign_task_groups([group])
        await eventually(lambda: len(first.started) == 2, "the first is busy")
        workers.append(second)
        await eventually(lambda: len(second.started) == 2, "the second is busy")
        workers[0] = third
        await eventually(lambda: len(third.started) == 2, "the third is busy")
        assert len(first.active_tasks) == 2
        first.gate.set()
        await eventually(has_left, "the first has left")
        assert len(first.started) == 2
        second.gate.set()
        third.gate.set()

    assert len(second.started) + len(third.started) == 6
    assert [task.status for task in group.subtasks] == [TaskStatus.COMPLETED] * 8
    assert {task.assigned_to for task in group.subtasks} == {"first", "second", "third"}


async def test_a_scale_grows_with_the_load_and_shrinks_without_it(
    playground: TaskPlayGround, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(crew, "LOOK_S", 0.02)
    monkeypatch.setattr(crew, "QUIET_S", 0.2)
    model = Gated("model")
    workers: list[TaskExecutionAgent] = [model]
    group = group_of(messages(20))
    async with playground.play(workers=workers, scale=(1, 4)) as playing:
        await playing.assign_task_groups([group])
        await eventually(lambda: len(workers) == 4, "there are four agents")
        await eventually(lambda: len(model.started) == 8, "all of them work")  # copies share what they do not replace
        model.gate.set()
        await eventually(lambda: len(workers) == 1, "one agent is left")
        await eventually(lambda: len(playing.get_completed_tasks()) == 20, "all tasks are completed")

    assert len({task.assigned_to for task in group.subtasks}) == 4


@pytest.mark.parametrize("scale", [(0, 2), (3, 2), (1.5, 2)])
async def test_a_scale_that_cannot_be_is_refused(scale: Any, playground: TaskPlayGround) -> None:
    with pytest.raises(InvalidInputError, match="scale: "):
        async with playground.play(workers=[Fast("a", "r")], scale=scale):
            pytest.fail("it plays")


async def test_a_scale_needs_an_agent_to_copy(playground: TaskPlayGround) -> None:
    with pytest.raises(InvalidInputError, match="give `workers` at least one"):
        async with playground.play(scale=(1, 2)):
            pytest.fail("it plays")
