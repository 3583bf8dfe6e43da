"""
rq_ceylon: a distributed job queue on Redis that knows its purpose.

Names are loaded when first used (PEP 562), so that `ceylon --help` imports neither redis nor pydantic.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from loguru import logger

if TYPE_CHECKING:
    from rq_ceylon.app import AppTask, Ceylon
    from rq_ceylon.attempt import Backoff, FailTask, RetryTask, TaskContext
    from rq_ceylon.client import Client, GroupHandle, SyncClient, SyncGroupHandle, SyncTaskHandle, TaskHandle
    from rq_ceylon.errors import (
        AppImportError,
        CeylonError,
        ConnectionLostError,
        DurabilityError,
        GoalImpossibleError,
        GroupExistsError,
        GroupFileError,
        InvalidInputError,
        NotFoundError,
        NoWorkerError,
        PayloadTooLargeError,
        QueueFullError,
        RedisError,
        TaskCancelledError,
        TaskFailedError,
        UnknownTaskError,
        WaitTimeoutError,
    )
    from rq_ceylon.models import Dependency, Goal, GoalStatus, GroupStatus, Priority, Task, TaskGroup, TaskStatus
    from rq_ceylon.monitor import Monitor
    from rq_ceylon.task.agent import TaskExecutionAgent
    from rq_ceylon.task.data import TaskGroupGoal, TaskMessage
    from rq_ceylon.task.manager import TaskManager
    from rq_ceylon.task.playground import TaskPlayGround
    from rq_ceylon.views import Counters, GroupView, TaskResult, TaskView
    from rq_ceylon.worker import Worker

_HOME = {
    "app": "AppTask Ceylon",
    "client": "Client GroupHandle SyncClient SyncGroupHandle SyncTaskHandle TaskHandle",
    "errors": "AppImportError CeylonError ConnectionLostError DurabilityError GoalImpossibleError GroupExistsError "
    "GroupFileError InvalidInputError NotFoundError NoWorkerError PayloadTooLargeError QueueFullError RedisError "
    "TaskCancelledError TaskFailedError UnknownTaskError WaitTimeoutError",
    "attempt": "Backoff FailTask RetryTask TaskContext",
    "models": "Dependency Goal GoalStatus GroupStatus Priority Task TaskGroup TaskStatus",
    "views": "Counters GroupView TaskResult TaskView",
    "monitor": "Monitor",
    "task.agent": "TaskExecutionAgent",
    "task.data": "TaskGroupGoal TaskMessage",
    "task.manager": "TaskManager",
    "task.playground": "TaskPlayGround",
    "worker": "Worker",
}
_MODULE_OF = {name: module for module, names in _HOME.items() for name in names.split()}

__all__ = [  # noqa: RUF022, in the order of the table above
    "AppTask", "Ceylon",
    "Client", "GroupHandle", "SyncClient", "SyncGroupHandle", "SyncTaskHandle", "TaskHandle",
    "AppImportError", "CeylonError", "ConnectionLostError", "DurabilityError", "GoalImpossibleError",
    "GroupExistsError", "GroupFileError", "InvalidInputError", "NotFoundError", "NoWorkerError", "PayloadTooLargeError",
    "QueueFullError", "RedisError", "TaskCancelledError", "TaskFailedError", "UnknownTaskError", "WaitTimeoutError",
    "Backoff", "FailTask", "RetryTask", "TaskContext",
    "Counters", "Dependency", "Goal", "GoalStatus", "GroupStatus", "GroupView", "Priority", "Task", "TaskGroup",
    "TaskResult", "TaskStatus", "TaskView",
    "Monitor",
    "TaskExecutionAgent", "TaskGroupGoal", "TaskMessage", "TaskManager", "TaskPlayGround",
    "Worker",
]  # fmt: skip

# The log of workers and monitors is silent until its user asks: `logger.enable("rq_ceylon")`. The commands do.
# What a client must tell goes through the standard library's logger `rq_ceylon` instead, so that it is always heard.
logger.disable("rq_ceylon")


def __getattr__(name: str) -> Any:
    if name not in _MODULE_OF:
        raise AttributeError(f"module 'rq_ceylon' has no attribute {name!r}")
    value = getattr(importlib.import_module(f"rq_ceylon.{_MODULE_OF[name]}"), name)
    globals()[name] = value
    return value
