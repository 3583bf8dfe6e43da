"""
What a submission gives: a task or group to wait for, look at and cancel. Also made from an id, in any process.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from typing import Any, Generic, Literal, TypeVar

from rq_ceylon.client.session import Session
from rq_ceylon.errors import NotFoundError, TaskCancelledError, TaskFailedError, WaitTimeoutError
from rq_ceylon.handlers import Handler
from rq_ceylon.models import GoalStatus, GroupView, TaskResult, TaskStatus, TaskView, check_id
from rq_ceylon.store import queries, transitions
from rq_ceylon.store.events import Event
from rq_ceylon.store.scripts import Call

R = TypeVar("R")


class TaskHandle(Generic[R]):
    """
    A submitted task.

    `await handle.result(timeout=30)` gives what its handler returned, or raises what became of it; `status()` and
    `view()` look at it as it stands, `cancel()` ends it. Its `id` is good in any process: `client.task(id)`.

    Waiting survives a restart of Redis. Any number of handles may be waited for at once; those of one group share their
    reads. After 10 s the standard library's logger `rq_ceylon` warns of a role that no worker serves; a program that
    sets up no logging shows it on stderr.
    """

    def __init__(self, session: Session, gid: str, tid: str, handler: Handler[..., R] | None = None) -> None:
        self._session, self._gid, self._tid, self._handler = session, gid, tid, handler

    @property
    def id(self) -> str:
        """
        `<group>/<task>`.
        """
        return f"{self._gid}/{self._tid}"

    def __repr__(self) -> str:
        return f"<TaskHandle {self.id}>"

    def through(self, session: Session) -> TaskHandle[R]:
        """
        The same task, by another client.
        """
        return TaskHandle(session, self._gid, self._tid, self._handler)

    async def result(self, timeout: float | None = None) -> R:
        """
        What the handler returned, once the task has completed; of the annotated type if the handler is known here.

        Args:
            timeout: seconds; None waits as long as it takes.

        Raises:
            TaskFailedError: it failed; the remote traceback is with it.
            TaskCancelledError: it was cancelled, or its group closed before it started.
            WaitTimeoutError: not within `timeout` seconds; the task goes on.
            NotFoundError: the task is not, or no longer, known.
        """
        try:
            with self._session.follow(self._gid) as follower:
                async with asyncio.timeout(timeout):
                    result = await follower.result(self._tid)
        except TimeoutError:
            raise WaitTimeoutError(f"task {self.id} has not ended within {timeout} s; it goes on") from None
        if result.status is TaskStatus.FAILED:
            error = result.error or {}
            raise TaskFailedError(
                self.id,
                result.reason,
                error_type=error.get("type", ""),
                error_message=error.get("message", ""),
                traceback=error.get("traceback", ""),
            )
        if result.status is TaskStatus.CANCELLED:
            raise TaskCancelledError(self.id, result.reason)
        value: R = result.value if self._handler is None else self._handler.load_result(result.value)
        return value

    async def view(self) -> TaskView:
        """
        The task as it stands.

        Raises:
            NotFoundError: the task is not, or no longer, known.
        """
        return await queries.task(self._session.connection, self._session.keys, self._gid, self._tid)

    async def status(self) -> TaskStatus:
        return (await self.view()).status

    async def cancel(self) -> str:
        """
        Cancel it: at once if it has not started (`cancelled`), by asking its worker if it runs (`stopping`); `ended` if
        it is over.
        """
        cancel = transitions.cancel_tasks(self._session.keys, self._gid, [self._tid])
        ((_, *words),) = await self._session.call([cancel])
        if len(words) < 2 or words[1] == "unknown":
            raise NotFoundError(f"task {self.id} is not known; it was never submitted, or its group was pruned")
        if words[1] != "stopping":  # "ended" too: the answer that it is cancelled may be lost
            await self._session.relay(self._gid)
        return str(words[1])


class GroupHandle:
    """
    A submitted group.

    `await run.wait("goal")` returns once its goals are settled, `wait("all")` once it has finished. `progress()` gives
    the group after every change, `events()` every state change, `results()` each task's result as it ends; all three
    end with the group. `tasks()` lists its tasks, `task(id)` is the handle of one, `cancel()` ends the group.

    Attributes:
        id: good in any process: `client.group(id)`.
        name: as submitted; empty for a handle made from an id.
        repeated: its key was known with the same content, so nothing was written.
    """

    def __init__(self, session: Session, gid: str, *, name: str = "", repeated: bool = False) -> None:
        self._session, self.id, self.name, self.repeated = session, gid, name, repeated

    def __repr__(self) -> str:
        return f"<GroupHandle {self.id} {self.name!r}>"

    def through(self, session: Session) -> GroupHandle:
        """
        The same group, by another client.
        """
        return GroupHandle(session, self.id, name=self.name, repeated=self.repeated)

    def task(self, tid: str) -> TaskHandle[Any]:
        """
        A task of this group, by its id in the group or by the one that is good everywhere. Asks nothing of Redis.

        Raises:
            InvalidInputError: it cannot be the id of a task of this group.
        """
        return TaskHandle(self._session, self.id, check_id(tid.removeprefix(f"{self.id}/"), "task id"))

    async def view(self) -> GroupView:
        """
        The group as it stands.

        Raises:
            NotFoundError: the group is not, or no longer, known.
        """
        return await queries.group(self._session.connection, self._session.keys, self.id)

    async def wait(self, until: Literal["goal", "all"] = "goal", timeout: float | None = None) -> GroupView:
        """
        Until every goal is settled (without goals: the group has finished), or, with `all`, until it has finished.

        Raises:
            WaitTimeoutError: not within `timeout` seconds; the group goes on.
            NotFoundError: the group is not, or no longer, known.
        """
        view: GroupView | None = None
        try:
            with self._session.follow(self.id) as follower:
                async with asyncio.timeout(timeout):
                    view = await follower.change(None)
                    while not (view.is_finished or is_over(view, until)):
                        view = await follower.change(view)
        except TimeoutError:
            raise WaitTimeoutError(f"{not_over(self.id, view, until)} within {timeout} s; it goes on") from None
        return view

    async def progress(self) -> AsyncIterator[GroupView]:
        """
        The group now, and after every change, until it has finished.

        Raises:
            NotFoundError: the group is not, or no longer, known.
        """
        with self._session.follow(self.id) as follower:
            view = await follower.change(None)
            yield view
            while not view.is_finished:
                view = await follower.change(view)
                yield view

    async def events(self, start: int = 1) -> AsyncIterator[Event]:
        """
        Every event from number `start` on, until the group has finished.

        Raises:
            NotFoundError: the group is not, or no longer, known.
            ConnectionLostError: Redis went away while they were read; go on from the next number.
        """
        seq, connection, keys = start - 1, self._session.connection, self._session.keys
        async for view in self.progress():
            async for batch in queries.new_events(connection, keys, self.id, seq, view.events):
                for event in batch:
                    yield event
                    seq = event.seq
            if seq < view.events:
                await self.view()  # a group that is gone has no events

    async def results(self) -> AsyncIterator[TaskResult]:
        """
        Every task's result as it ends, until the group has finished; those cancelled by its closing come last.

        Raises:
            NotFoundError: the group is not, or no longer, known; what was given so far may not be all.
            ConnectionLostError: Redis went away while they were read; begin again.
        """
        told: set[str] = set()
        connection, keys = self._session.connection, self._session.keys
        async for event in self.events():
            tids = [task.tid for task in event.tasks if task.is_end and task.tid not in told]
            for result in (await queries.results(connection, keys, self.id, tids)).values():
                told.add(result.task_id)
                yield result
        async for task in self.tasks():
            if task.result is not None and task.task_id not in told:
                yield task.result
        await self.view()  # had it gone meanwhile, these would not be all

    async def tasks(self) -> AsyncIterator[TaskView]:
        """
        All tasks, each once, those still open first; as they stand, so two may be of different moments.
        """
        async for task in queries.tasks(self._session.connection, self._session.keys, self.id):
            yield task

    async def cancel(self) -> str:
        """
        End the group: what has not started is cancelled, what runs is asked to stop. Returns the group's status.
        """
        return await self._control(transitions.cancel_group(self._session.keys, self.id))

    async def pause(self) -> str:
        """
        Start nothing more; what runs goes on, and so do deadlines. Returns the group's status.
        """
        return await self._control(transitions.pause_group(self._session.keys, self.id))

    async def resume(self) -> str:
        """
        Go on after `pause`. Returns the group's status.
        """
        return await self._control(transitions.resume_group(self._session.keys, self.id))

    async def _control(self, call: Call) -> str:
        (reply,) = await self._session.call([call])
        if reply[0] == "GONE":
            raise NotFoundError(f"group {self.id} is not known; it was never submitted, or it was pruned")
        # What follows from it: tasks that may go on, messages to groups that depend on it.
        await self._session.relay(self.id)
        return str(reply[1])


def is_over(view: GroupView, until: Literal["goal", "all"]) -> bool:
    """
    Is what was waited for there?
    """
    if until == "all" or not view.goals:
        return view.is_finished
    return all(goal.status.is_final for goal in view.goals)


def not_over(gid: str, view: GroupView | None, until: Literal["goal", "all"]) -> str:
    """
    What was waited for in vain, in words.
    """
    if until == "goal" and view is not None and view.goals:
        return f"the goals of group {gid} have not settled"
    return f"group {gid} has not finished"


def succeeded(view: GroupView) -> bool:
    """
    Were the goals achieved or, without goals, every task completed?
    """
    if view.goals:
        return all(goal.status is GoalStatus.ACHIEVED for goal in view.goals)
    return view.outcome == "completed"
