"""The attempt as its handler sees it: the context, and the exceptions and rules that decide about the next attempt."""

from __future__ import annotations

import asyncio
import math
import random
import time
from collections.abc import Callable, Mapping
from contextvars import ContextVar
from dataclasses import dataclass, field, fields
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

from loguru import logger

from rq_ceylon.errors import CeylonError, InvalidInputError, Portable
from rq_ceylon.models import CRASHES_MAX, Duration, Task, seconds

if TYPE_CHECKING:
    from loguru import Logger

SPAWN_TASKS_MAX = 1000
SPAWN_BYTES_MAX = 4 * 1024 * 1024
"""How much one attempt may spawn, since one call of a script adds it."""

StopReason = Literal["cancelled", "lost", "shutdown", "timeout"]


@dataclass(frozen=True)
class Backoff:
    """
    How long to wait before the next attempt: `min(cap, first * factor ** (attempt - 1))`. With jitter, the wait is a
    uniform choice between half of that and all of it: tasks that failed together come back spread out, which relieves
    the server that failed them, and none comes back at once.
    """

    first: Duration = "1s"
    factor: float = 2.0
    cap: Duration = "10m"
    jitter: bool = True

    def __post_init__(self) -> None:
        seconds(self.first, "backoff: first")
        seconds(self.cap, "backoff: cap")
        if not isinstance(self.factor, int | float) or not math.isfinite(self.factor) or self.factor < 1:
            raise InvalidInputError(f"backoff: factor: {self.factor!r} is not usable; give a number from 1 on")

    def delay_s(self, attempt: int) -> float:
        """The wait after attempt 1, 2, ... failed."""
        cap = seconds(self.cap, "backoff: cap")
        try:
            delay = min(cap, seconds(self.first, "backoff: first") * self.factor ** (attempt - 1))
        except OverflowError:
            delay = cap
        return random.uniform(delay / 2, delay) if self.jitter else delay


class RetryTask(Portable, Exception):
    """
    Raise this in a handler to try again, after `delay` if given, else after the handler's backoff, as long as attempts
    are left. In an exception group, the longest delay counts.
    """

    delay_s: float | None = None

    def __init__(self, delay: Duration | None = None, reason: str = "") -> None:
        super().__init__(reason)
        self.delay_s = None if delay is None else seconds(delay, "RetryTask: delay")
        self.reason = reason


class FailTask(Portable, Exception):
    """
    Raise this in a handler if another attempt would not help: the task fails at once. In an exception group, it counts
    only if no other member asks for another attempt.
    """

    def __init__(self, reason: str) -> None:
        super().__init__(reason)
        self.reason = reason


class AttemptStoppedError(Portable, BaseException):
    """Raised by `check_cancelled`. It is no `Exception`, so a handler's `except Exception` lets it through."""


@dataclass(kw_only=True, eq=False)
class TaskContext:
    """
    The facts of the attempt in which a handler runs. A handler gets its context as the parameter annotated
    `TaskContext`, and may use it from any thread.

    Attributes:
        uses: the name that the task asked for.
        attempt: 1 for the first. `crashes` counts the workers lost under the task, which use up no attempt.
        fence: grows with every delivery of a task, so an external store can refuse a write with an older fence.
        duration: expected run time in seconds, 0 if the task gave none.
        needs: results of the tasks that this one needed, by their ids.
        is_open: the group was submitted with `open`, so the task may spawn others.
        state: the value that the application's lifespan yielded in this process; None without a lifespan.
        deadline: when this attempt times out, on the clock of `time.monotonic()`.
        reported: the last progress that was reported: the fraction, if any, and the message.
        children, spawned_bytes: the tasks that were spawned, as they are sent, and their size. `stager` checks and
            packs them; set by the worker.
        stopped: why the attempt is over although its handler still runs; set by the worker.
    """

    group_id: str
    task_id: str
    uses: str
    role: str
    worker: str
    attempt: int
    max_attempts: int
    crashes: int
    fence: int
    duration: float = 0.0
    metadata: Mapping[str, Any] = field(default_factory=dict)
    needs: Mapping[str, Any] = field(default_factory=dict)
    is_open: bool = False
    state: Any = None
    deadline: float = math.inf
    reported: tuple[float | None, str] = field(init=False, default=(None, ""))
    children: list[Any] = field(init=False, repr=False, default_factory=list)
    spawned_bytes: int = field(init=False, repr=False, default=0)
    stager: Callable[[Task], Any] | None = field(init=False, repr=False, default=None)
    stopped: StopReason | None = field(init=False, default=None)

    @property
    def id(self) -> str:
        return f"{self.group_id}/{self.task_id}"

    @property
    def idempotency_key(self) -> str:
        """The same for every attempt of the task, and for no other task."""
        return self.id

    @property
    def log(self) -> Logger:
        return logger.bind(task=self.task_id, group=self.group_id, attempt=self.attempt)

    def progress(self, fraction: float | None = None, message: str = "") -> None:
        """
        Report the progress of the attempt: a fraction from 0 to 1 (values outside are clipped), or None to keep the
        last one, and a message. It is shown from the worker's next heartbeat on while the attempt runs, and never
        stored. NaN counts as None. In a message that is not valid Unicode, as a file name may be, bad characters become
        `?`.
        """
        new = math.nan if fraction is None else float(fraction)
        known = self.reported[0] if math.isnan(new) else min(max(new, 0.0), 1.0)
        # The heartbeat of the worker carries it, so it must be JSON: else this attempt would silence all others.
        self.reported = (known, str(message)[:200].encode(errors="replace").decode())

    def spawn(self, task: Task) -> str:
        """
        Add a task to the group, which was submitted with `open`. It is added when this attempt has completed, in the
        step that counts the completion: a task that runs twice spawns once, and one that fails spawns nothing. A task
        whose id the group knows already is not added. A group that was sealed or closed meanwhile takes none.

        Args:
            task: `needs` may name tasks of the group, and tasks that were spawned before. Without an id it gets a new
                one, without a role that of its handler, else the role of this task.

        Returns:
            the id of the task, `<group>/<task>`.

        Raises:
            InvalidInputError: the task cannot be used, the group takes no tasks, or the attempt has spawned too much:
                at most 1,000 tasks, or 4 MiB.
        """
        if not self.is_open:
            words = "its group takes no tasks; submit it with open=True or open='until_idle'"
            raise InvalidInputError(f"task {self.id}: spawn: {words}")
        if self.stager is None:
            raise CeylonError("spawn: this context belongs to no worker, which would add the task")
        child = self.stager(task)
        self.spawned_bytes += child.size
        if len(self.children) == SPAWN_TASKS_MAX or self.spawned_bytes > SPAWN_BYTES_MAX:
            raise InvalidInputError(
                f"task {self.id}: spawns more than {SPAWN_TASKS_MAX:,} tasks or {SPAWN_BYTES_MAX:,} bytes; "
                "let the tasks that it spawns spawn the rest"
            )
        self.children.append(child)
        return f"{self.group_id}/{child.tid}"

    @property
    def is_cancelled(self) -> bool:
        """Whether this attempt was cancelled, lost to another worker, or timed out, so that its result cannot count."""
        return self.stopped is not None or time.monotonic() >= self.deadline

    def check_cancelled(self) -> None:
        """
        End the handler here if the attempt is over. For long loops, and for plain functions, since their thread cannot
        be stopped from outside.
        """
        if self.is_cancelled:
            raise AttemptStoppedError(f"task {self.id}: this attempt is over ({self.stopped or 'timeout'})")


def facts_of(context: TaskContext) -> dict[str, Any]:
    """The fields of a context, without its state, as JSON values, so that another process can make it too."""
    return {one.name: getattr(context, one.name) for one in fields(context) if one.init and one.name != "state"}


_running: ContextVar[TaskContext | None] = ContextVar("running attempt", default=None)


def mark_running(context: TaskContext) -> None:
    """Note which attempt the current task of an event loop, and the tasks that it creates, run from now on."""
    _running.set(context)


def refuse_to_block(what: str, instead: str) -> None:
    """
    Refuse a wait that would keep the event loop on which an attempt runs: its worker would do nothing else, and the
    task waited for might be its own next one.

    Raises:
        CeylonError: it says what to write instead.
    """
    context = _running.get()
    if context is None:
        return
    try:
        asyncio.get_running_loop()
    except RuntimeError:  # a thread may wait
        return
    raise CeylonError(
        f"task {context.id} ({context.uses}) is async, and {what} would keep its worker from doing anything else "
        f"meanwhile; write {instead}, or make the task a plain function (def, not async def)"
    )


def check_max_attempts(value: object, name: str) -> int:
    """
    Return `value` if it may say how many attempts a task has.

    Raises:
        InvalidInputError: it is not a whole number from 1 on.
    """
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise InvalidInputError(f"{name}: {value!r} is not usable; give a whole number from 1 on")
    return value


def check_max_crashes(value: object, name: str) -> int:
    """
    Return `value` if it may say how many crashes a task survives.

    Raises:
        InvalidInputError: it is not a whole number from 0 to 1,000,000.
    """
    if isinstance(value, bool) or not isinstance(value, int) or not 0 <= value <= CRASHES_MAX:
        raise InvalidInputError(f"{name}: {value!r} is not usable; give a whole number from 0 to {CRASHES_MAX:,}")
    return value


class Said(NamedTuple):
    """
    What one exception says about the next attempt: the types whose rules it asks for, the most specific first, and the
    delay of a `RetryTask`.
    """

    names: tuple[str, ...]
    delay_s: float | None = None


def said(error: BaseException) -> tuple[Said, ...]:
    """
    What an exception says; one of a group (`asyncio.TaskGroup` raises them) says what its members say. A rule for the
    type of the group goes before those for the types of its members.
    """
    if not isinstance(error, BaseExceptionGroup):
        return (Said(type_names(type(error)), error.delay_s if isinstance(error, RetryTask) else None),)
    own = tuple(type_name(one) for one in type(error).__mro__ if issubclass(one, BaseExceptionGroup))
    try:
        members = [one for member in error.exceptions for one in said(member)]
    except RecursionError:  # nested too deeply to be read: this group speaks for what is in it
        members = [Said(type_names(type(error))[len(own) :])]
    return tuple(dict.fromkeys(Said(own + one.names, one.delay_s) for one in members))


def says_stopped(error: BaseException) -> bool:
    """Whether the handler ended because `TaskContext.check_cancelled` told it to, be it in a group of exceptions."""
    return all(type_name(AttemptStoppedError) in one.names for one in said(error))


def type_name(kind: type) -> str:
    # In a child process the main module bears multiprocessing's name for it.
    return f"{kind.__module__}.{kind.__qualname__}".replace("__mp_main__", "__main__")


def type_names(kind: type[BaseException]) -> tuple[str, ...]:
    """The full names of an exception type and its bases, the most specific first."""
    return tuple(map(type_name, kind.__mro__))
