"""The groups of a playground: submits them, follows their events, and judges their goals by the owner's conditions."""

from __future__ import annotations

import asyncio
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from typing import Literal

from loguru import logger

from rq_ceylon.client import Client, GroupHandle
from rq_ceylon.errors import CeylonError, ConnectionLostError, InvalidInputError
from rq_ceylon.handlers import awaited
from rq_ceylon.models import GoalStatus, GroupStatus, Priority, TaskStatus, counted
from rq_ceylon.store import queries, transitions
from rq_ceylon.store.events import Event
from rq_ceylon.task.data import TaskGroup, TaskGroupGoal, TaskMessage, slug
from rq_ceylon.views import GroupView, TaskResult

PAUSE_S = 0.2
"""Before looking again after a lost connection."""


class TaskManager:
    """
    Keeps the groups and tasks of a playground.

    Attributes:
        task_groups: the assigned groups by their `task_id`; these objects are kept up to date.
        tasks: the tasks of all groups, by their `task_id`.
        completed_tasks: the tasks that completed, in the order in which they did.
    """

    def __init__(self) -> None:
        self.task_groups: dict[str, TaskGroup] = {}
        self.tasks: dict[str, TaskMessage] = {}
        self.completed_tasks: dict[str, TaskMessage] = {}
        self._client: Client | None = None
        self._followers: dict[str, _Follower] = {}
        self._in_order = asyncio.Lock()

    @staticmethod
    def create_task_group(
        name: str,
        description: str,
        subtasks: Iterable[TaskMessage],
        goal: TaskGroupGoal | None = None,
        dependencies: Mapping[str, Sequence[str]] | None = None,
        priority: int | Priority | str = 1,
    ) -> TaskGroup:
        """Make a group with an id of its own, which becomes the `group_id` of its tasks. See `TaskGroup`."""
        return TaskGroup(
            name=name,
            description=description,
            subtasks=list(subtasks),
            goal=goal,
            dependencies=dependencies or {},
            priority=priority,
        )

    # ---- for the playground ------------------------------------------------------------------------------------------
    def open(self, client: Client) -> None:
        """Forget all groups and tasks, and use this client from now on."""
        for known in (self.task_groups, self.tasks, self.completed_tasks, self._followers):
            known.clear()
        self._client = client

    async def assign_task_groups(self, groups: Iterable[TaskGroup]) -> None:
        """
        Submit groups; returns once Redis has them.

        Raises:
            CeylonError: the playground is not running.
            InvalidInputError: something in a group cannot be used; this group and those after it were not submitted.
        """
        if self._client is None:
            raise CeylonError("the playground is not running; assign groups within `async with playground.play(...)`")
        for group in groups:
            await self._assign(self._client, group)

    async def _assign(self, client: Client, group: TaskGroup) -> None:
        if not isinstance(group, TaskGroup):
            raise InvalidInputError(
                f"{group!r} is not a group of a playground; make one with TaskManager.create_task_group"
            )
        if group.task_id in self.task_groups:
            raise InvalidInputError(f"group {group.name!r} is already assigned; make another for a second run")
        tasks = {task.task_id: task for task in group.subtasks}
        if taken := tasks.keys() & self.tasks.keys():
            raise InvalidInputError(
                f"group {group.name!r}: the task id {sorted(taken)[0]!r} is taken by another group; ids are unique"
            )
        group.renew()
        submitted = group.to_group()
        # Known before it is submitted: agents of this process may start the first task before Redis has answered us.
        group.status = TaskStatus.IN_PROGRESS
        if group.goal is not None:
            group.goal.status = GoalStatus.IN_PROGRESS
        self.task_groups[group.task_id] = group
        self.tasks |= tasks
        sending = asyncio.create_task(client.submit(submitted))
        try:
            await asyncio.shield(sending)
        except asyncio.CancelledError:
            # Redis may have it by now, and a group that nobody follows here would never have its goal judged.
            await asyncio.wait([sending])
            raise
        finally:
            if sending.done() and sending.exception() is None:
                handle = sending.result()
                logger.info('Group "{}" with {} is {}', group.name, counted(len(tasks), "task"), handle.id)
                self._followers[group.task_id] = _Follower(self, client, group, handle)
            else:
                del self.task_groups[group.task_id]
                self.tasks = {key: task for key, task in self.tasks.items() if key not in tasks}
                group.renew()

    async def wait(self) -> None:
        """Wait until every group has finished."""
        while running := [one.run for one in self._followers.values() if not one.run.done()]:
            await asyncio.wait(running, return_when=asyncio.FIRST_EXCEPTION)
            for run in running:
                if run.done():
                    run.result()

    async def cancel(self) -> None:
        """
        End every group that has not finished: tasks that do not run are cancelled, running tasks are asked to
        stop.
        """
        for follower in self._followers.values():
            if not follower.run.done():
                with suppress(CeylonError):
                    await follower.handle.cancel()

    async def close(self) -> None:
        """Stop following the groups."""
        self._client = None
        runs = [one.run for one in self._followers.values()]
        for run in runs:
            run.cancel()
        await asyncio.gather(*runs, return_exceptions=True)

    # ---- as tasks end ------------------------------------------------------------------------------------------------
    async def take(self, follower: _Follower, event: Event, results: Mapping[str, TaskResult]) -> None:
        """
        Write an event into the objects, and check the goals after each task that ended. One event at a time is taken,
        whatever its group.
        """
        async with self._in_order:
            for happened in event.tasks:
                task = follower.tasks.get(happened.tid)
                if task is None or task.status.is_final:
                    continue
                if happened.tid in results:
                    _end(task, results[happened.tid])
                    if task.completed:
                        self.completed_tasks[task.task_id] = task
                    logger.debug('Task "{}" {}: {} completed', task.name, task.status, len(self.completed_tasks))
                    await self._look_at_goals()
                else:
                    task.status = TaskStatus.PENDING
            for _, status in event.goals:
                follower.settle(GoalStatus(status))

    async def _look_at_goals(self) -> None:
        for key, follower in list(self._followers.items()):
            goal = self.task_groups[key].goal
            if goal is not None and not goal.status.is_final and await self._holds(goal):
                await follower.judge("achieved")

    async def _holds(self, goal: TaskGroupGoal) -> bool:
        try:
            return bool(await awaited(goal.check_condition(self.task_groups, self.completed_tasks)))
        except Exception as error:
            goal.error = f"{type(error).__name__}: {error}"
            logger.exception('The condition of goal "{}" failed, so the goal stays undecided', goal.name)
            return False

    # ---- statistics --------------------------------------------------------------------------------------------------
    def statistics(self) -> list[str]:
        """Lines that say how many tasks completed, and how long they took on average."""
        lines = ["Final Statistics:", f"Completed Tasks: {len(self.completed_tasks)}"]
        if failed := sum(task.status is TaskStatus.FAILED for task in self.tasks.values()):
            lines.append(f"Failed Tasks: {failed}")
        if self.completed_tasks:
            lines.append(f"Average Duration: {_mean_s(self.completed_tasks.values()):.1f}s")
        return lines

    def all_statistics(self) -> list[str]:
        """The same lines, and some for each group, its goal, and each worker."""
        lines = self.statistics()
        for group in self.task_groups.values():
            count = {status: sum(task.status is status for task in group.subtasks) for status in TaskStatus}
            words = ", ".join(f"{count[status]} {status}" for status in TaskStatus if count[status])
            lines.append(f"Group {group.name}: {group.status} ({words})")
            if group.goal is not None:
                error = f"; its condition raised {group.goal.error}" if group.goal.error else ""
                lines.append(f"  Goal {group.goal.name}: {group.goal.status}{error}")
            lines += [f"  {task.name}: {task.error}" for task in group.subtasks if task.error]
        by_worker: dict[str, list[TaskMessage]] = {}
        for task in self.completed_tasks.values():
            by_worker.setdefault(task.assigned_to or "", []).append(task)
        for worker, tasks in sorted(by_worker.items()):
            lines.append(f"Worker {worker}: {len(tasks)} completed, {_mean_s(tasks):.1f}s on average")
        return lines


class _Follower:
    """Reads the events of one group to its end."""

    def __init__(self, manager: TaskManager, client: Client, group: TaskGroup, handle: GroupHandle) -> None:
        self.manager, self.client, self.group, self.handle = manager, client, group, handle
        self.tasks = {task.task_id: task for task in group.subtasks}
        self.seq = 0
        self.run = asyncio.create_task(self._run(), name=f"playground group {handle.id}")

    async def _run(self) -> None:
        while True:
            try:
                async for view in self.handle.progress():
                    await self._read(view)
                return
            except ConnectionLostError as error:
                logger.debug("Following {}: {}", self.handle.id, error)
                await asyncio.sleep(PAUSE_S)

    async def _read(self, view: GroupView) -> None:
        connection, keys = self.client.connection, self.client.keys
        async for batch in queries.new_events(connection, keys, self.handle.id, self.seq, view.events):
            for event in batch:
                ended = [task.tid for task in event.tasks if task.is_end]
                results = await queries.results(connection, keys, self.handle.id, ended)
                await self.manager.take(self, event, results)
                self.seq = event.seq
        if view.status is GroupStatus.CLOSING and view.counters.open == 0:
            await self.judge("failed")
        if view.is_finished:
            for task in self.tasks.values():
                if not task.status.is_final:  # closing cancels what has not started without a word for each
                    task.status = TaskStatus.CANCELLED
            self.group.status = TaskStatus(view.outcome or "completed")
            logger.info("Group {}", view)

    async def judge(self, verdict: Literal["achieved", "failed"]) -> None:
        """Write a verdict where every process sees it; a goal that is settled already stays as it is."""
        goal = self.group.goal
        if goal is None or goal.status.is_final:
            return
        call = transitions.judge(self.client.keys, self.handle.id, goal=goal.to_goal().name or "", verdict=verdict)
        ((reply, *_),) = await self.client.connection.run_until_answered([call], give_up_after=None)
        if reply == "OK":
            self.settle(GoalStatus(verdict))

    def settle(self, status: GoalStatus) -> None:
        """Log once how the goal was settled."""
        goal = self.group.goal
        if goal is None or goal.status.is_final:
            return
        goal.status = status
        achieved = status is GoalStatus.ACHIEVED
        level, message = ("INFO", goal.success_message) if achieved else ("WARNING", goal.failure_message)
        completed = sum(task.completed for task in self.group.subtasks)
        words = 'Goal {}: {} of "{}" ({} of {} completed). {}'
        logger.log(level, words, status, goal.name, self.group.name, completed, len(self.tasks), message)


def _end(task: TaskMessage, result: TaskResult) -> None:
    task.status, task.completed = result.status, result.status is TaskStatus.COMPLETED
    task.start_time = None if result.started_ms is None else result.started_ms / 1000
    task.end_time = None if result.ended_ms is None else result.ended_ms / 1000
    if task.completed:
        task.result = result.value
    elif result.status is TaskStatus.FAILED:
        error = result.error or {}
        task.error = f"{error['type']}: {error['message']}" if error else result.reason
    # An agent of this process has entered its name already; its worker's begins with that.
    if not (task.assigned_to and result.worker.startswith(f"{slug(task.assigned_to)}-")):
        task.assigned_to = result.worker or None


def _mean_s(tasks: Iterable[TaskMessage]) -> float:
    spans = [task.end_time - task.start_time for task in tasks if task.end_time and task.start_time]
    return sum(spans) / len(spans) if spans else 0.0
