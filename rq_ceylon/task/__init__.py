"""The tutorial's words: a playground with agents, over client and worker. `docs/tutorial.md` walks through it."""

from rq_ceylon.task.agent import TaskExecutionAgent
from rq_ceylon.task.data import GoalStatus, TaskGroup, TaskGroupGoal, TaskMessage, TaskStatus
from rq_ceylon.task.manager import TaskManager
from rq_ceylon.task.playground import TaskPlayGround

__all__ = [
    "GoalStatus",
    "TaskExecutionAgent",
    "TaskGroup",
    "TaskGroupGoal",
    "TaskManager",
    "TaskMessage",
    "TaskPlayGround",
    "TaskStatus",
]
