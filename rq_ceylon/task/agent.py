"""An agent of the tutorial: a worker in this process."""

from __future__ import annotations

import asyncio
import copy
import inspect
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Self

from rq_ceylon.attempt import TaskContext
from rq_ceylon.handlers import DEFAULT_HANDLER, Handler
from rq_ceylon.models import seconds
from rq_ceylon.task.data import TaskMessage, TaskStatus


class TaskExecutionAgent:
    """
    Runs tasks of one role, up to `max_concurrent_tasks` at once. Override `execute_task` to say what a task does.

    Attributes:
        active_tasks: the tasks that it runs now, by task id.
    """

    def __init__(self, name: str, worker_role: str, max_concurrent_tasks: int = 3) -> None:
        self.name, self.worker_role, self.max_concurrent_tasks = name, worker_role, max_concurrent_tasks
        self.active_tasks: dict[str, TaskMessage] = {}

    def __repr__(self) -> str:
        return f"<{type(self).__name__} {self.name}: {self.worker_role}>"

    async def execute_task(self, task: TaskMessage) -> Any:
        """
        Run the task; by default, sleep for its duration. A plain function may override this method, and runs in a
        thread.

        The returned JSON value becomes `task.result`; if it is None, a value that was written there stays. If the
        method raises, the task has failed, or gets another attempt if its `max_attempts` allows one. `RetryTask` and
        `FailTask` work as in any handler.
        """
        await asyncio.sleep(seconds(task.duration, "duration"))

    def another(self, name: str) -> Self:
        """Make another agent like this one."""
        twin = copy.copy(self)
        twin.name, twin.active_tasks = name, {}
        return twin

    def handler(self) -> Handler[..., Any]:
        """Make `execute_task` the handler of tasks that name none."""
        if not inspect.iscoroutinefunction(self.execute_task):

            def run_in_thread(context: TaskContext) -> Any:
                with self._active(context) as task:
                    return _result(task, self.execute_task(task))

            return Handler(DEFAULT_HANDLER, run_in_thread, max_attempts=1)

        async def run(context: TaskContext) -> Any:
            with self._active(context) as task:
                return _result(task, await self.execute_task(task))

        return Handler(DEFAULT_HANDLER, run, max_attempts=1)

    @contextmanager
    def _active(self, context: TaskContext) -> Iterator[TaskMessage]:
        task = TaskMessage.of(context)
        if not task.status.is_final:  # else another worker was faster, and this run counts for nothing
            task.status, task.assigned_to, task.start_time = TaskStatus.IN_PROGRESS, self.name, time.time()
        self.active_tasks[task.task_id] = task
        try:
            yield task
        finally:
            self.active_tasks.pop(task.task_id, None)


def _result(task: TaskMessage, returned: Any) -> Any:
    return task.result if returned is None else returned
