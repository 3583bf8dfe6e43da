"""The values that users build and read: tasks, groups, goals, results and progress. No I/O, no protocol."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import KW_ONLY, dataclass, field
from datetime import timedelta
from enum import StrEnum
from typing import Any, Literal

from rq_ceylon.errors import InvalidInputError

ID_PATTERN = re.compile(r"[A-Za-z0-9._:-]{1,64}")
"""The form of ids, roles, namespaces and names. It allows no braces, so a name never moves a key to another slot."""

Duration = int | float | str | timedelta
"""Seconds as a number, a `timedelta`, or text such as `30s`, `5m`, `1h30m`, `250ms`, `2d`."""

NeedPolicy = Literal["skip", "fail", "continue"]
"""A task that needs one that did not complete is cancelled, fails, or runs all the same."""

Durability = Literal["none", "replica", "fsync"]
"""A submission waits for the answer of Redis only, until a replica has it, or until it is on the disk."""

GoalPolicy = Literal["continue", "drain", "cancel"]
"""After a goal settles, the rest of the group goes on, lets only running tasks finish, or stops them as well."""

DEFAULT_ROLE = "default"
DEFAULT_TIMEOUT_S = 3600.0
DEFAULT_MAX_ATTEMPTS = 3
DEFAULT_MAX_CRASHES = 3
DEFAULT_RETENTION_S = 24 * 3600.0
OPEN_TIMEOUT_S = 24 * 3600.0
DEPENDS_ON_MAX = 64
MAX_RUNNING_MAX = 1_000_000
CRASHES_MAX = 1_000_000
PAYLOAD_BYTES_MAX = 1024 * 1024
"""Limit of one task as it is sent: its arguments, metadata and needs."""
DEFAULTS_BYTES_MAX = 64 * 1024
"""The defaults of a group travel with every delivery of its tasks."""
DESCRIPTION_MAX = 10_000
KEY_MAX = 1_000


class TaskStatus(StrEnum):
    """State of a task. Anything finer is its reason (see `TaskResult.reason`)."""

    WAITING = "waiting"
    PENDING = "pending"
    IN_PROGRESS = "in_progress"
    COMPLETED = "completed"
    FAILED = "failed"
    CANCELLED = "cancelled"

    @property
    def is_final(self) -> bool:
        return self in (TaskStatus.COMPLETED, TaskStatus.FAILED, TaskStatus.CANCELLED)


class GroupStatus(StrEnum):
    """State of a group: staging → active → closing → finished (`waiting` on other groups, `paused` by a user)."""

    STAGING = "staging"
    WAITING = "waiting"
    ACTIVE = "active"
    PAUSED = "paused"
    CLOSING = "closing"
    FINISHED = "finished"


class GoalStatus(StrEnum):
    """State of a goal. Achieved and failed are final."""

    NOT_STARTED = "not_started"
    IN_PROGRESS = "in_progress"
    ACHIEVED = "achieved"
    FAILED = "failed"

    @property
    def is_final(self) -> bool:
        return self in (GoalStatus.ACHIEVED, GoalStatus.FAILED)


class Priority(StrEnum):
    """Which of a role's three streams a task waits in."""

    HIGH = "high"
    NORMAL = "normal"
    LOW = "low"


LONGEST_S = 10 * 365 * 86400.0
"""The longest duration: 10 years."""

_UNIT_S = {"ms": 0.001, "s": 1.0, "m": 60.0, "h": 3600.0, "d": 86400.0}
_DURATION = re.compile(r"(?:\d+(?:\.\d+)?(?:ms|[smhd]))+")
_DURATION_PART = re.compile(r"(\d+(?:\.\d+)?)(ms|[smhd])")


def seconds(value: Duration, name: str) -> float:
    """
    Turn a duration into seconds.

    Args:
        value: a number of seconds, a `timedelta`, or text such as `30s` or `1h30m`.
        name: the name of the value where the user wrote it; the error names it.

    Raises:
        InvalidInputError: not a duration, negative, infinite, or over 10 years.
    """
    remedy = "give seconds (30) or text such as 30s, 5m, 1h30m, 250ms, 2d"
    match value:
        case int() | float() if not isinstance(value, bool):
            result = float(value)
        case timedelta():
            result = value.total_seconds()
        case str() if len(value) <= 100 and _DURATION.fullmatch(value.strip()):
            result = sum(float(number) * _UNIT_S[unit] for number, unit in _DURATION_PART.findall(value))
        case str() if len(value) <= 100 and re.fullmatch(r"\d+(\.\d+)?", value.strip()):
            result = float(value)
        case _:
            raise InvalidInputError(f"{name}: {value!r} is not a duration; {remedy}")
    if not math.isfinite(result) or not 0 <= result <= LONGEST_S:
        raise InvalidInputError(f"{name}: {value!r} is out of range (0 to 10 years); {remedy}")
    return result


LEASE_MIN_S = 0.1


def check_lease(value: Duration, name: str) -> float:
    """
    Return a lease in seconds.

    Raises:
        InvalidInputError: not a duration, or too short for a worker to renew it.
    """
    lease_s = seconds(value, name)
    if lease_s < LEASE_MIN_S:
        raise InvalidInputError(f"{name}: {value!r} is too short; give at least 100ms")
    return lease_s


def check_timeout(value: Duration, name: str) -> float:
    """
    The limit of an attempt in seconds.

    Raises:
        InvalidInputError: not a duration, or 0, which leaves no time.
    """
    limit = seconds(value, name)
    if not limit:
        raise InvalidInputError(f"{name}: {value!r} leaves no time; leave it out for the default")
    return limit


def check_when(value: object, name: str) -> str:
    """
    Return `value` if it may say how far a group must come.

    Raises:
        InvalidInputError: it is none of `completed`, `failed`, `finished` and `achieved:GOAL`.
    """
    if isinstance(value, str):
        goal = value.partition(":")[2]
        if value in ("completed", "failed", "finished") or (value.startswith("achieved:") and goal):
            return f"achieved:{check_id(goal, f'{name}: goal')}" if goal else value
    raise InvalidInputError(f"{name}: {value!r} is not known; use completed, failed, finished or achieved:GOAL")


def check_id(value: object, name: str) -> str:
    """
    Return `value` if it may serve as an id or name in Redis.

    Raises:
        InvalidInputError: it is not text of 1 to 64 letters, digits and `. _ : -`.
    """
    if not isinstance(value, str) or not ID_PATTERN.fullmatch(value):
        raise InvalidInputError(f"{name}: {value!r} is not usable; use 1 to 64 letters, digits and . _ : -")
    return value


def check_namespace(value: object) -> str:
    """
    Return `value` if it may serve as a namespace. It holds no colon: a user who may touch the keys `ceylon:team:*` must
    not reach those of a namespace `team:prod`.

    Raises:
        InvalidInputError: it is not text of 1 to 64 letters, digits and `. _ -`.
    """
    if ":" in str(value):
        raise InvalidInputError(f"namespace: {value!r} is not usable; use 1 to 64 letters, digits and . _ -")
    return check_id(value, "namespace")


def check_priority(value: str, name: str) -> Priority:
    """
    Raises:
        InvalidInputError: it is none of high, normal, low.
    """
    try:
        return Priority(value)
    except ValueError:
        raise InvalidInputError(f"{name}: {value!r} is not known; use high, normal or low") from None


def counted(number: int, one: str, many: str | None = None) -> str:
    """A number of things, for people: `1 task`, `2,000 tasks`."""
    return f"{number:,} {one if number == 1 else many or one + 's'}"


def span_words(seconds: float) -> str:
    """A length of time, for people: `12 s`, `3 min 20 s`, `26 h 5 min`."""
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    minutes, rest = divmod(whole, 60)
    return f"{minutes} min {rest} s" if minutes < 60 else f"{minutes // 60} h {minutes % 60} min"


@dataclass(kw_only=True)
class Task:
    """
    One unit of work. A field that is None is decided by the group's defaults, then by the registered handler, then by
    the package.

    Attributes:
        uses: registered name of the handler; default: the worker's default handler, which sleeps for `duration`.
        arguments: keyword arguments for the handler; JSON values.
        id: unique in its group; default: a short number.
        role: the role whose workers run the task; default: the handler's, where that is known, else `default`.
        needs: ids of tasks of the same group that must complete first.
        duration: expected run time; the default handler sleeps that long.
        timeout: limit of one attempt; default: the handler's, else 1 h.
        max_attempts: number of attempts, including the first; default: the handler's, else 3.
        max_crashes: how often the task may lose its worker and run again. With 0, each attempt runs at most once.
            Default: the handler's, where that is known, else 3.
        priority: tasks of a higher priority run first within their role; default: the group's.
        delay: earliest start, counted from the submission, or from the moment its group no longer waits for others.
        expires: latest start, counted in the same way; a task not started by then is cancelled (expired).
        retention: how long a task that is submitted by itself is kept after it has ended, at least; default:
            CEYLON_RETENTION, else 24 h. A task of a group is kept as long as its group.
        metadata: any JSON; passed to the handler and shown, but never interpreted.
        handler: set by `AppTask.bind`; its rules apply, whichever application's client submits the task.
    """

    uses: str | None = None
    arguments: Mapping[str, Any] = field(default_factory=dict)
    id: str | None = None
    role: str | None = None
    needs: Sequence[str] = ()
    duration: Duration | None = None
    timeout: Duration | None = None
    max_attempts: int | None = None
    max_crashes: int | None = None
    priority: Priority | str | None = None
    delay: Duration | None = None
    expires: Duration | None = None
    retention: Duration | None = None
    metadata: Mapping[str, Any] | None = None
    handler: Any = field(default=None, repr=False, compare=False)

    def __getstate__(self) -> dict[str, Any]:
        return {**vars(self), "handler": None}  # in another process the handler of that name is another object


@dataclass
class Goal:
    """
    Says when the purpose of a group is met.

    Attributes:
        when: an expression over the group's counters, such as `completed >= 95% and failed < 10`.
        call: instead of `when`, the registered name of a callable that a monitor runs.
        name: unique in its group; default: `goal`, or `goal2` and so on by position.
        deadline: counted from the group's start; a goal not achieved by then has failed.
        fail_when: an expression; once it holds for certain, the goal has failed.
        on_achieved: what happens to the rest of the group when the goal is achieved.
        on_failed: what happens to the rest of the group when the goal has failed.
        success_message: shown when the goal is achieved.
        failure_message: shown when the goal has failed.
    """

    when: str | None = None
    _: KW_ONLY
    call: str | None = None
    name: str | None = None
    deadline: Duration | None = None
    fail_when: str | None = None
    on_achieved: GoalPolicy = "continue"
    on_failed: GoalPolicy = "continue"
    success_message: str | None = None
    failure_message: str | None = None


@dataclass(frozen=True)
class Dependency:
    """
    A group on which another one depends, and how far it must come.

    Attributes:
        group: its id; in a group file also its key or name.
        when: `completed` or `failed` (it has finished with this outcome), `finished` (with any outcome), or
            `achieved:NAME` (it has achieved this goal, though it may go on).
    """

    group: str
    when: str = "completed"


@dataclass
class TaskGroup:
    """
    Tasks with a common purpose.

    Attributes:
        name: shown to people; need not be unique.
        tasks: any iterable; a generator is submitted in parts, in constant memory.
        goal: none, one, or several; an expression is short for a goal with that `when`.
        key: makes the submission repeatable: the same key with the same content is the same group. At most 1,000
            characters.
        defaults: fields for tasks that leave them out; at most 64 KiB of JSON.
        priority: the priority of tasks that name none.
        retention: how long the group is kept after it has finished; default: CEYLON_RETENTION, else 24 h.
        description: shown to people; at most 10,000 characters.
        depends_on: groups that must have come so far before this one starts: ids of groups that must complete, or a
            `Dependency` for another condition. If it can no longer hold, this group is cancelled.
        on_need_failed: what happens to a task that needs one that did not complete. It is cancelled (`skip`), fails
            (`fail`), or runs all the same (`continue`).
        then: a group that follows this one, or several by their conditions: `completed` or `failed` (this group has
            finished with that outcome), `finished` (with any), or `achieved:GOAL`. Each is submitted when its condition
            holds, also after a retry; the metadata of its tasks has the id of this group as `after`.
        open: whether tasks may be added later. With True they may until the group is sealed, with `until_idle` until
            none of its tasks is open. A goal that asks for a share stays undecided until the group is sealed.
        open_timeout: an open group is sealed when no task was added for so long.
        max_running: how many tasks of the group run at once at most, on all workers together.
        dispatch: `eager` starts tasks as workers have room. `lazy` starts no more than the nearest goal with the
            policy `drain` or `cancel` still needs, and one more; so little is done in vain, but the goal is reached
            later if tasks fail.
    """

    name: str
    tasks: Iterable[Task] = ()
    goal: Goal | str | Sequence[Goal | str] | None = ()
    _: KW_ONLY
    key: str | None = None
    defaults: Task = field(default_factory=Task)
    priority: Priority | str | None = None
    retention: Duration | None = None
    description: str = ""
    depends_on: Sequence[str | Dependency] = ()
    on_need_failed: NeedPolicy = "skip"
    then: TaskGroup | Mapping[str, TaskGroup] | None = None
    open: bool | Literal["until_idle"] = False
    open_timeout: Duration = OPEN_TIMEOUT_S
    max_running: int | None = None
    dispatch: Literal["eager", "lazy"] = "eager"
