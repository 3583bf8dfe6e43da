"""
An agent of the tutorial: a worker in this process.
"""

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
    Runs tasks of one role, so many at once. What a task is worth is decided by `execute_task`: override it.

    Attributes:
        active_tasks: what it runs now, by task id.
    """

    def __init__(self, name: str, worker_role: str, max_concurrent_tasks: int = 3) -> None:
        self.name, self.worker_role, self.max_concurrent_tasks = name, worker_role, max_concurrent_tasks
        self.active_tasks: dict[str, TaskMessage] = {}

    def __repr__(self) -> str:
        return f"<{type(self).__name__} {self.name}: {self.worker_role}>"

    async def execute_task(self, task: TaskMessage) -> Any:
        """
        Do what the task asks for; here: sleep for its duration. A plain function may override it, and runs in a thread.

        What it returns, a JSON value, becomes `task.result`; if it returns None, what it wrote there stays. If it
        raises, the task has failed, or has another attempt if its `max_attempts` allows; `RetryTask` and `FailTask`
        work as in any handler.
        """
        await asyncio.sleep(seconds(task.duration, "duration"))

    def another(self, name: str) -> Self:
        """
        One more of its kind.
        """
        twin = copy.copy(self)
        twin.name, twin.active_tasks = name, {}
        return twin

    def handler(self) -> Handler[..., Any]:
        """
        `execute_task` as the handler of tasks that name none.
        """
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
