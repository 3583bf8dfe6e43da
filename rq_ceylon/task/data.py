"""
Tasks, groups and goals in the tutorial's words. They are live: while a playground runs them, it keeps these very
objects up to date.
"""

from __future__ import annotations

import re
import uuid
from collections.abc import Awaitable, Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, fields
from functools import cache
from typing import Any, get_type_hints
from weakref import WeakValueDictionary

from rq_ceylon import models
from rq_ceylon.attempt import TaskContext
from rq_ceylon.errors import InvalidInputError
from rq_ceylon.models import Duration, Goal, GoalStatus, Priority, Task, TaskStatus
from rq_ceylon.values import BadValueError, JsonType

__all__ = ["GoalStatus", "TaskGroup", "TaskGroupGoal", "TaskMessage", "TaskStatus"]

GoalCondition = Callable[[dict[str, "TaskGroup"], dict[str, "TaskMessage"]], bool | Awaitable[bool]]
"""Called with the playground's groups and its completed tasks, each by id."""

FIRST_HIGH = 5
"""Whole-numbered priorities: 0 is low, from here on high, in between normal."""

_here: WeakValueDictionary[tuple[str | None, str], TaskMessage] = WeakValueDictionary()
"""The tasks that this process submitted, by group and task id, so that its own agents get these very objects."""


@dataclass(kw_only=True, eq=False)
class TaskMessage:
    """
    One unit of work. A subclass may add fields. Agents in this process get the object itself. For other processes, the
    added fields are written as JSON, according to their annotations: as arguments of the handler if `uses` names one,
    else into the metadata. An agent there gets an object of the subclass if its process has imported a subclass of that
    name, else a plain TaskMessage.

    Attributes:
        task_id: unique in its playground.
        duration: expected run time; an agent that does not override `execute_task` sleeps that long.
        required_role: the role whose agents and workers run the task.
        uses: registered name of a handler, which runs in place of `execute_task`.
        arguments: the arguments of that handler.
        timeout: limit of one attempt; default: 1 h.
        max_attempts: number of attempts, including the first; default: the handler's own, and 1 for `execute_task`.
        group_id: `task_id` of the group that the task is in.
        result: the returned value, as JSON carries it. `error` is the type and message of a failure.
        assigned_to: the name of the agent, or of a worker elsewhere.
        start_time, end_time: times of the last attempt, in seconds since the epoch. Once the task has ended they are
            the server's; the start of a task that runs elsewhere is known only then.
    """

    task_id: str
    name: str
    description: str = ""
    duration: Duration = 0
    required_role: str | None = None
    metadata: dict[str, Any] | None = field(default_factory=dict)
    uses: str | None = None
    arguments: Mapping[str, Any] = field(default_factory=dict)
    timeout: Duration | None = None
    max_attempts: int | None = None
    group_id: str | None = None
    status: TaskStatus = field(init=False, default=TaskStatus.PENDING)
    completed: bool = field(init=False, default=False)
    result: Any = field(init=False, default=None)
    error: str = field(init=False, default="")
    assigned_to: str | None = field(init=False, default=None)
    start_time: float | None = field(init=False, default=None)
    end_time: float | None = field(init=False, default=None)

    def renew(self) -> None:
        """Forget an earlier run, and make the object known to the agents of this process."""
        self.status, self.completed, self.result, self.error = TaskStatus.PENDING, False, None, ""
        self.assigned_to = self.start_time = self.end_time = None
        _here[self.group_id, self.task_id] = self

    def to_task(self, needs: Sequence[str]) -> Task:
        """The task as it is submitted."""
        own = _own_fields(type(self))  # type: ignore[arg-type]  # a class is hashable
        more = {name: self._written(name, kind) for name, kind in own.items()}
        told: dict[str, Any] = {"name": self.name, "description": self.description}
        if not self.uses and type(self) is not TaskMessage:
            told |= {"class": type(self).__qualname__, **more}
        return Task(
            uses=self.uses,
            arguments={**more, **self.arguments} if self.uses else {},
            id=self.task_id,
            role=self.required_role,
            needs=needs,
            duration=self.duration,
            timeout=self.timeout,
            max_attempts=self.max_attempts,
            metadata={**told, **(self.metadata or {}), "group_id": self.group_id},
        )

    def _written(self, name: str, kind: JsonType) -> Any:
        try:
            return kind.write(getattr(self, name))
        except BadValueError as bad:
            raise InvalidInputError(f"task {self.task_id!r}: {'; '.join(bad.described('field', name))}") from None

    @classmethod
    def of(cls, context: TaskContext) -> TaskMessage:
        """
        The task of an attempt: the submitted object if that was submitted in this process, else one made of the JSON.

        Raises:
            InvalidInputError: a field is of another type here: the class is of another version.
        """
        metadata = dict(context.metadata)
        group_id = metadata.get("group_id", context.group_id)
        if (here := _here.get((group_id, context.task_id))) is not None:
            return here
        kind = _class_named(metadata.get("class"))
        more, problems = {}, []
        own = _own_fields(kind)  # type: ignore[arg-type]  # a class is hashable
        for name, type_ in own.items():
            if name in metadata:
                try:
                    more[name] = type_.read(metadata[name])
                except BadValueError as bad:
                    problems += bad.described("field", name)
        if problems:
            raise InvalidInputError(f"task {context.id} as {kind.__qualname__}: {'; '.join(problems)}")
        return kind(
            **more,
            task_id=context.task_id,
            name=metadata.get("name", context.task_id),
            description=metadata.get("description", ""),
            duration=context.duration,
            required_role=context.role,
            metadata=metadata,
            group_id=group_id,
        )


@cache
def _own_fields(kind: type[TaskMessage]) -> dict[str, JsonType]:
    """What a subclass adds that its constructor takes, and how that travels."""
    known = {one.name for one in fields(TaskMessage)}
    hints: dict[str, Any] = {}
    with suppress(NameError):  # of a type for type checkers only: then the fields take JSON values
        hints = get_type_hints(kind, include_extras=True)
    return {one.name: JsonType(hints.get(one.name)) for one in fields(kind) if one.init and one.name not in known}


def _class_named(name: object) -> type[TaskMessage]:
    """The subclass of that name, among those that this process has; the last one, as where its definition ran again."""
    found, kinds = TaskMessage, [TaskMessage]
    while kinds:
        kind = kinds.pop(0)
        found = kind if kind.__qualname__ == name else found
        kinds += kind.__subclasses__()
    return found


@dataclass(eq=False)
class TaskGroupGoal:
    """
    Says when the purpose of a group is met, by a condition in the process of the playground.

    Attributes:
        check_condition: called on this event loop whenever a task of the playground has ended; may be async. True
            achieves the goal. The goal has failed if all tasks of its group have ended without that. If the condition
            raises, the goal stays undecided.
        error: the exception that the condition raised last.
    """

    name: str
    description: str
    check_condition: GoalCondition
    success_message: str = ""
    failure_message: str = ""
    status: GoalStatus = field(init=False, default=GoalStatus.NOT_STARTED)
    error: str = field(init=False, default="")

    def to_goal(self) -> Goal:
        return Goal(
            call="check_condition",
            name=slug(self.name),
            success_message=self.success_message or None,
            failure_message=self.failure_message or None,
        )


@dataclass(kw_only=True, eq=False)
class TaskGroup:
    """
    Tasks with a common purpose. `TaskManager.create_task_group` makes one.

    Attributes:
        dependencies: maps the id of a task to the ids of tasks of this group that must complete before it starts; read
            when the group is assigned.
        priority: 0 is low, 1 to 4 is normal, 5 and above is high; or a `Priority`.
        task_id: the group's own id.
        status: pending until it is assigned, then in progress until it is completed, failed or cancelled.
    """

    name: str
    description: str = ""
    subtasks: list[TaskMessage]
    goal: TaskGroupGoal | None = None
    dependencies: Mapping[str, Sequence[str]] = field(default_factory=dict)
    priority: int | Priority | str = 1
    task_id: str = field(default_factory=lambda: str(uuid.uuid4()))
    status: TaskStatus = field(init=False, default=TaskStatus.PENDING)

    def __post_init__(self) -> None:
        for task in self.subtasks:
            task.group_id = self.task_id

    def renew(self) -> None:
        """Forget an earlier run of the group, its tasks and its goal."""
        self.status = TaskStatus.PENDING
        if self.goal is not None:
            self.goal.status, self.goal.error = GoalStatus.NOT_STARTED, ""
        for task in self.subtasks:
            task.group_id = self.task_id
            task.renew()

    def to_group(self) -> models.TaskGroup:
        """
        The group as it is submitted.

        Raises:
            InvalidInputError: `dependencies` names tasks that are not in the group.
        """
        if strangers := set(self.dependencies) - {task.task_id for task in self.subtasks}:
            raise InvalidInputError(
                f"group {self.name!r}: dependencies: {sorted(strangers)[0]!r} is not a task of the group; "
                "map the task_id of a subtask to the task_ids that it needs"
            )
        return models.TaskGroup(
            self.name,
            [task.to_task(self.dependencies.get(task.task_id, ())) for task in self.subtasks],
            goal=self.goal.to_goal() if self.goal is not None else (),
            priority=_priority(self.priority),
            description=self.description,
        )


def slug(text: str) -> str:
    """Text as a name that may stand in Redis."""
    return re.sub(r"[^A-Za-z0-9._:]+", "-", text).strip("-")[:40] or "unnamed"


def _priority(value: int | Priority | str) -> Priority | str:
    if not isinstance(value, int):
        return value
    return Priority.LOW if value <= 0 else Priority.HIGH if value >= FIRST_HIGH else Priority.NORMAL
