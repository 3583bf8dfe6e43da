"""
Handles of tasks and groups: to wait for them, view them and cancel them. A submission returns one; one can also be made
from an id, in any process.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Iterable
from typing import Any, Generic, Literal, TypeVar

from rq_ceylon import maintenance
from rq_ceylon.client.adding import add
from rq_ceylon.client.retrying import failed, retry
from rq_ceylon.client.session import Session
from rq_ceylon.client.waits import why_waiting
from rq_ceylon.errors import (
    CeylonError,
    InvalidInputError,
    NotFoundError,
    TaskCancelledError,
    TaskFailedError,
    WaitTimeoutError,
)
from rq_ceylon.handlers import Handler
from rq_ceylon.models import GoalStatus, Task, TaskStatus, check_id
from rq_ceylon.store import queries, transitions
from rq_ceylon.store.events import Event
from rq_ceylon.store.scripts import Call
from rq_ceylon.views import AttemptError, GroupView, TaskResult, TaskView

R = TypeVar("R")


class TaskHandle(Generic[R]):
    """
    A submitted task.

    `await handle.result(timeout=30)` returns the value that the handler returned, or raises if the task failed or was
    cancelled. `status()` and `view()` return the current state, `cancel()` ends the task. The `id` is valid in any
    process: `client.task(id)`.

    A wait survives a restart of Redis. You may wait for any number of handles at once; those of one group share their
    reads. After 10 s, a role that no worker serves is named in a warning of the standard library's logger `rq_ceylon`;
    a program that does not configure logging shows it on stderr.
    """

    def __init__(self, session: Session, gid: str, tid: str, handler: Handler[..., R] | None = None) -> None:
        self._session, self._gid, self._tid, self._handler = session, gid, tid, handler

    @property
    def id(self) -> str:
        """`<group>/<task>`."""
        return f"{self._gid}/{self._tid}"

    def __repr__(self) -> str:
        return f"<{type(self).__name__} {self.id}>"

    def through(self, session: Session) -> TaskHandle[R]:
        """A handle of the same task that uses another client."""
        return TaskHandle(session, self._gid, self._tid, self._handler)

    async def result(self, timeout: float | None = None) -> R:
        """
        Wait until the task has completed, and return the value that the handler returned; it has the annotated type if
        the handler is known here.

        Args:
            timeout: seconds; None waits as long as it takes.

        Raises:
            TaskFailedError: the task failed; the error carries the remote traceback.
            TaskCancelledError: the task was cancelled, or its group closed before it started.
            WaitTimeoutError: the task has not ended within `timeout` seconds; it goes on.
            NotFoundError: the task is not known, or no longer.
        """
        try:
            with self._session.follow(self._gid) as follower:
                async with asyncio.timeout(timeout):
                    result = await follower.result(self._tid)
        except TimeoutError:
            words = f"task {self.id} has not ended within {timeout} s; {await self._standing()}"
            raise WaitTimeoutError(words) from None
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

    async def _standing(self) -> str:
        """What the task does now, or why it waits, as far as Redis tells within a second."""
        with contextlib.suppress(CeylonError, TimeoutError):
            async with asyncio.timeout(1.0):
                view = await self.view()
                if view.status is TaskStatus.IN_PROGRESS:
                    return f"it runs on worker {view.worker}"
                group = await GroupHandle(self._session, self._gid).view()
                for why in (await why_waiting(self._session, group, [view])).values():
                    return f"it waits: {why}"
        return "it goes on"

    async def view(self) -> TaskView:
        """
        The current state of the task.

        Raises:
            NotFoundError: the task is not known, or no longer.
        """
        return await queries.task(self._session.connection, self._session.keys, self._gid, self._tid)

    async def errors(self) -> list[AttemptError]:
        """
        How the attempts of the task failed, oldest first: the last five, and what it had failed with before a retry. A
        task that has completed keeps none.

        Raises:
            NotFoundError: the task is not known, or no longer.
        """
        return await queries.errors(self._session.connection, self._session.keys, self._gid, self._tid)

    async def status(self) -> TaskStatus:
        return (await self.view()).status

    async def cancel(self) -> str:
        """
        Cancel the task. Returns `cancelled` if it had not started, `stopping` if it runs and its worker was asked to
        stop it, and `ended` if it had already ended.
        """
        cancel = transitions.cancel_tasks(self._session.keys, self._gid, [self._tid])
        ((_, *words),) = await self._session.call([cancel])
        if len(words) < 2 or words[1] == "unknown":
            raise NotFoundError(f"task {self.id} is not known; it was never submitted, or its group was pruned")
        if words[1] != "stopping":  # "ended" too: perhaps an earlier answer, that it is cancelled, was lost
            await self._session.relay(self._gid)
        return str(words[1])

    async def retry(self) -> None:
        """
        Run the task again, which failed or was cancelled, from its first attempt on; with it those tasks of its group
        that were skipped because of it. Its group is active again, and a goal that failed is undecided again, unless
        it can still not be achieved.

        Raises:
            InvalidInputError: the task has completed or is open, needs one that did not complete, or its group has not
                started or is closing.
            NotFoundError: the task is not known, or no longer.
        """
        view = await self.view()
        told = await retry(self._session, self._gid, lambda one: one.task_id == self._tid or one.reason == "skipped")
        word = told.get(self._tid, "completed" if view.status is TaskStatus.COMPLETED else "open")
        if self._tid in told and word in ("reopened", "open"):
            return
        raise InvalidInputError(f"task {self.id} cannot be retried: {_NO_RETRY.get(word, word)}")


_NO_RETRY = {
    "completed": "it has completed",
    "open": "it has not ended",
    "blocked": "a task that it needs did not complete; retry that one",
    "busy": "tasks are still being told of an end; try again",
    "old": "an older version of rq-ceylon wrote its result; submit it again",
}


class GroupHandle:
    """
    A submitted group.

    `await run.wait("goal")` returns once the goals are settled, `wait("all")` once the group has finished. `progress()`
    yields the group after every change, `events()` every state change, `results()` each task's result as it ends; all
    three end with the group. `tasks()` lists its tasks, `task(id)` is the handle of one, `cancel()` ends the group.

    Attributes:
        id: valid in any process: `client.group(id)`.
        name: the submitted name; empty for a handle made from an id.
        repeated: the same content had been submitted under this key before, so nothing was written.
    """

    def __init__(self, session: Session, gid: str, *, name: str = "", repeated: bool = False) -> None:
        self._session, self.id, self.name, self.repeated = session, gid, name, repeated

    def __repr__(self) -> str:
        return f"<{type(self).__name__} {self.id}{self.name and f' {self.name!r}'}>"

    def through(self, session: Session) -> GroupHandle:
        """A handle of the same group that uses another client."""
        return GroupHandle(session, self.id, name=self.name, repeated=self.repeated)

    def task(self, tid: str) -> TaskHandle[Any]:
        """
        The handle of a task of this group, made from its id, with or without the group. Does not ask Redis.

        Raises:
            InvalidInputError: it cannot be the id of a task of this group.
        """
        return TaskHandle(self._session, self.id, check_id(tid.removeprefix(f"{self.id}/"), "task id"))

    async def view(self) -> GroupView:
        """
        The current state of the group.

        Raises:
            NotFoundError: the group is not known, or no longer.
        """
        return await queries.group(self._session.connection, self._session.keys, self.id)

    async def wait(self, until: Literal["goal", "all"] = "goal", timeout: float | None = None) -> GroupView:
        """
        Wait until every goal is settled; with `all`, or if the group has no goals, until the group has finished.

        Raises:
            WaitTimeoutError: this has not happened within `timeout` seconds; the group goes on.
            NotFoundError: the group is not known, or no longer.
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
        Yield the group now and after every change, until it has finished.

        Raises:
            NotFoundError: the group is not known, or no longer.
        """
        with self._session.follow(self.id) as follower:
            view = await follower.change(None)
            yield view
            while not view.is_finished:
                view = await follower.change(view)
                yield view

    async def events(self, start: int = 1) -> AsyncIterator[Event]:
        """
        Yield every event from number `start` on, until the group has finished.

        Raises:
            NotFoundError: the group is not known, or no longer.
            ConnectionLostError: Redis went away while the events were read; go on from the next number.
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
        Yield each task's result as it ends, until the group has finished. Tasks that were cancelled because the group
        closed come last. A task that is retried meanwhile comes once more.

        Raises:
            NotFoundError: the group is not known, or no longer; results may be missing.
            ConnectionLostError: Redis went away while the results were read; start again.
        """
        told: dict[str, int] = {}  # by its end, since a task that was retried ends again
        connection, keys = self._session.connection, self._session.keys
        async for event in self.events():
            tids = [task.tid for task in event.tasks if task.is_end and told.get(task.tid, 0) < event.at_ms]
            for result in (await queries.results(connection, keys, self.id, tids)).values():
                told[result.task_id] = result.ended_ms or event.at_ms
                yield result
        async for task in self.tasks():
            if task.result is not None and task.task_id not in told:
                yield task.result
        await self.view()  # raises if the group has gone meanwhile, since results would be missing then

    async def tasks(self) -> AsyncIterator[TaskView]:
        """
        Yield each task once, open tasks first. Each is read when its turn comes, so two tasks may show different
        moments.
        """
        async for task in queries.tasks(self._session.connection, self._session.keys, self.id):
            yield task

    async def cancel(self) -> str:
        """
        End the group: tasks that do not run are cancelled, running tasks are asked to stop. Returns the group's
        status.
        """
        return await self._control(transitions.cancel_group(self._session.keys, self.id))

    async def add(self, tasks: Iterable[Task]) -> int:
        """
        Put tasks into the group, which was submitted with `open`. All are checked before the first is sent; they are
        sent in parts of at most 500 tasks and 4 MiB. A task whose id the group knows already is not added, so that
        several writers may add the same tasks, and an add may be repeated. A task without an id gets a new one. Tasks
        may need tasks of the group, whether open or over.

        Returns:
            how many tasks were new.

        Raises:
            InvalidInputError: a task cannot be used, or needs one that the group does not have; or the group takes no
                tasks, or no more.
            NotFoundError: the group is not known.
            QueueFullError: Redis is at its memory limit.
            ConnectionLostError: no answer for 5 s. Adding tasks that have ids again is safe.
        """
        return await add(self._session, self.id, tasks)

    async def seal(self) -> str:
        """Let the open group take no more tasks: it finishes once its tasks have ended. Returns its status."""
        return await self._control(transitions.seal(self._session.keys, self.id, untouched_ms=0))

    async def pause(self) -> str:
        """Start no further task; running tasks and deadlines go on. Returns the group's status."""
        return await self._control(transitions.pause_group(self._session.keys, self.id))

    async def resume(self) -> str:
        """Resume after `pause`. Returns the group's status."""
        return await self._control(transitions.resume_group(self._session.keys, self.id))

    async def remove(self) -> bool:
        """
        Remove a group that has finished, with its results, before its retention ends. Its key may be used again.

        Returns:
            False if it has not finished, or still has to tell a group that depends on it; then nothing was removed.

        Raises:
            NotFoundError: the group is not known.
        """
        await self.view()
        return await maintenance.prune(self._session.connection, self._session.keys, self.id, at_once=True) is None

    async def retry(self, tasks: Iterable[str] | None = None, *, cancelled: bool = False) -> int:
        """
        Run the failed tasks of the group again, each from its first attempt on, and those that were skipped because of
        them or cancelled because a goal had failed. What has completed never runs again. The group is active again. A
        goal that failed is undecided again, unless it can still not be achieved; an achieved goal stays achieved.

        Args:
            tasks: only these tasks, and what was skipped because of them.
            cancelled: also the tasks that were cancelled otherwise, by a user or by an achieved goal.

        Returns:
            the number of tasks that run again.

        Raises:
            InvalidInputError: the group has not started, or is closing.
            NotFoundError: the group is not known.
        """
        only = None if tasks is None else set(tasks)
        by_goal = await queries.closed_by(self._session.connection, self._session.keys, self.id) == "failed"

        def chosen(result: TaskResult) -> bool:
            if only is not None and result.task_id not in only and result.reason != "skipped":
                return False
            return cancelled or failed(result) or (by_goal and result.reason == "closed")

        told = await retry(self._session, self.id, chosen)
        return sum(word in ("reopened", "open") for word in told.values())

    async def _control(self, call: Call) -> str:
        (reply,) = await self._session.call([call])
        if reply[0] == "GONE":
            raise NotFoundError(f"group {self.id} is not known; it was never submitted, or it was pruned")
        # Hand over what follows from the change: tasks that may go on, messages to groups that depend on this one.
        await self._session.relay(self.id)
        return str(reply[1])


def is_over(view: GroupView, until: Literal["goal", "all"]) -> bool:
    """Whether a wait for `until` is over."""
    if until == "all" or not view.goals:
        return view.is_finished
    return all(goal.status.is_final for goal in view.goals)


def not_over(gid: str, view: GroupView | None, until: Literal["goal", "all"]) -> str:
    """Say in words what has not happened yet."""
    if until == "goal" and view is not None and view.goals:
        return f"the goals of group {gid} have not settled"
    return f"group {gid} has not finished"


def succeeded(view: GroupView) -> bool:
    """Whether the goals were achieved or, without goals, every task completed."""
    if view.goals:
        return all(goal.status is GoalStatus.ACHIEVED for goal in view.goals)
    return view.outcome == "completed"
