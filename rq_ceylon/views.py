"""What users read: groups, goals, tasks, results, workers and roles as they stand in Redis at one moment."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from rq_ceylon.models import (
    GoalStatus,
    GroupStatus,
    TaskStatus,
)

COUNTERS = ("waiting", "pending", "in_progress", "completed", "failed", "cancelled")


@dataclass(frozen=True, slots=True)
class Counters:
    """
    The number of tasks of a group in each state; the six sum to `total` at every instant. `attempts` counts the
    attempts started in the whole group, `crashes` the workers lost under its tasks.
    """

    total: int = 0
    waiting: int = 0
    pending: int = 0
    in_progress: int = 0
    completed: int = 0
    failed: int = 0
    cancelled: int = 0
    attempts: int = 0
    crashes: int = 0

    @property
    def ended(self) -> int:
        return self.completed + self.failed + self.cancelled

    @property
    def open(self) -> int:
        return self.waiting + self.pending + self.in_progress


@dataclass(frozen=True, slots=True)
class Settled:
    """
    How a goal was settled: when (`at_ms`, server time, epoch ms), by which event of the group (`seq`), by what (`by`:
    `commit`, `deadline`, `callable`, ...), and the counters at that instant.
    """

    at_ms: int
    seq: int
    by: str
    counters: Counters


@dataclass(frozen=True, slots=True)
class GoalView:
    """
    The current state of a goal. `when` is the expression, or `call: name`. `deadline_ms` (server time, epoch ms) is
    None if the goal has no deadline, or if its group still waits for others, so that the deadline has not begun.
    """

    name: str
    when: str
    status: GoalStatus
    deadline_ms: int | None = None
    settled: Settled | None = None
    success_message: str | None = None
    failure_message: str | None = None
    fail_when: str | None = None
    call: str | None = None

    @property
    def title(self) -> str:
        """Its name in a sentence: `goal enough`, but not `goal goal` for one that was given no name."""
        return self.name if re.fullmatch("goal[0-9]*", self.name) else f"goal {self.name}"


@dataclass(frozen=True, slots=True)
class GroupView:
    """
    The current state of a group. Times are server time, epoch ms.

    Attributes:
        outcome: completed, failed or cancelled once the group has finished, else None.
        reason: why the group was cancelled, if a group that it depends on did not complete.
        depends_on: groups that it still waits for.
        events: length of the group's event list.
        is_open: tasks may still be added.
        max_running: how many of its tasks run at once at most; None if any number may.
        then: the ids of the groups that follow it, by the condition; each exists once that holds.
    """

    id: str
    name: str
    status: GroupStatus
    counters: Counters
    goals: Sequence[GoalView] = ()
    key: str | None = None
    outcome: str | None = None
    reason: str = ""
    depends_on: Sequence[str] = ()
    description: str = ""
    created_ms: int | None = None
    finished_ms: int | None = None
    events: int = 0
    is_open: bool = False
    max_running: int | None = None
    then: Mapping[str, str] = field(default_factory=dict)

    @property
    def is_finished(self) -> bool:
        return self.status is GroupStatus.FINISHED

    def __str__(self) -> str:
        goals = "".join(f", {goal.title} {goal.status}" for goal in self.goals)
        outcome = f" ({self.outcome})" if self.outcome else ""
        return (
            f"{self.name}: {self.status}{outcome}, {self.counters.completed} of {self.counters.total} completed{goals}"
        )


@dataclass(frozen=True, slots=True)
class TaskResult:
    """
    How a task ended. Times are server time, epoch ms; `value` is the JSON value that the handler returned.

    Attributes:
        task_id: its id in its group.
        status: completed, failed or cancelled.
        reason: why a task did not complete: error, timeout, poison, unroutable, invalid; closed, cancelled, expired,
            skipped.
        attempts: how many attempts were started.
        ended_ms: None for a task that ended because its group closed before it started.
        wait_ms: time from ready to started. `run_ms` is the time of the last attempt, by the worker's monotonic clock.
        error: `{"type", "message", "traceback"}` of a failed task.
        payload: what a failed or cancelled task was submitted with, as far as its group's defaults do not say it:
            `uses`, `arguments`, `metadata` and rules. None for a completed task.
    """

    task_id: str
    status: TaskStatus
    reason: str = ""
    role: str = ""
    attempts: int = 0
    crashes: int = 0
    worker: str = ""
    started_ms: int | None = None
    ended_ms: int | None = None
    wait_ms: int = 0
    run_ms: int = 0
    value: Any = None
    error: Mapping[str, str] | None = None
    payload: Mapping[str, Any] | None = None


@dataclass(frozen=True, slots=True)
class AttemptError:
    """
    How an attempt of a task failed. Times are server time, epoch ms; None, as `worker` is empty, where no worker saw
    the end. `attempt` is 0 for what a task had failed with before it was retried by a user.
    """

    attempt: int
    type: str
    message: str
    traceback: str = ""
    worker: str = ""
    started_ms: int | None = None
    ended_ms: int | None = None

    def __str__(self) -> str:
        return ": ".join(filter(None, (self.type, self.message)))


@dataclass(frozen=True, slots=True)
class TaskView:
    """
    The current state of a task.

    Attributes:
        task_id: its id in its group. `id` is valid everywhere, like that of a handle: `<group>/<task>`.
        attempt: the attempt that runs or comes next; once the task has ended, the number of attempts.
        due_ms: set while the task waits for a delay or a retry; for a delay, not before its group is active.
        needs: how many of the tasks that it needs have not ended.
        progress: the last progress that its handler reported, up to 5 s old: a fraction, if any, and a message.
        last_error: `{"type", "message", "traceback"}` of the attempt before, if the task waits for the next one, runs
            again, or was cancelled after it. That of a failed task is in its result.
        result: set once the task has ended.
    """

    group_id: str
    task_id: str
    status: TaskStatus
    role: str = ""
    uses: str = ""
    reason: str = ""
    attempt: int = 1
    crashes: int = 0
    worker: str = ""
    started_ms: int | None = None
    due_ms: int | None = None
    needs: int = 0
    progress: tuple[float | None, str] = (None, "")
    last_error: Mapping[str, str] | None = None
    result: TaskResult | None = None

    @property
    def id(self) -> str:
        return f"{self.group_id}/{self.task_id}"


@dataclass(frozen=True, slots=True)
class WorkerView:
    """
    A live worker or monitor, as its heartbeat describes it.

    Attributes:
        tasks: maps `<gid>/<tid>` of each running task to its start (epoch ms).
        hung: number of attempts that are over, but whose code goes on: threads that do not end, coroutines that ignore
            their cancellation.
        is_exhausted: so many attempts hang that they take places from others. Restart the worker.
    """

    name: str
    kind: str = "worker"
    host: str = "?"
    pid: int = 0
    version: str = "?"
    roles: Sequence[str] = ()
    slots: int = 0
    task_names: Sequence[str] = ()
    tasks: Mapping[str, int] = field(default_factory=dict)
    started_ms: int = 0
    stopping: bool = False
    hung: int = 0
    is_exhausted: bool = False


@dataclass(frozen=True, slots=True)
class RoleView:
    """
    The current state of a role: entries that are not yet delivered or wait by name (`queued`), are delivered, or due
    later (`delayed`), its workers, and totals by outcome since the role exists (statistics, not accounting).
    """

    name: str
    queued: int
    delivered: int
    delayed: int
    workers: int
    slots: int
    busy: int
    totals: Mapping[str, int]
    paused: bool = False
