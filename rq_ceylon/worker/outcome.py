"""Assignments, and the outcomes that attempts at them have. Runs nothing itself."""

from __future__ import annotations

import time
import traceback
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any, Literal, NamedTuple

from pydantic_core import from_json, to_json

from rq_ceylon.attempt import Said, StopReason, TaskContext, check_max_attempts, mark_running, said
from rq_ceylon.errors import InvalidInputError, Portable, shown
from rq_ceylon.handlers import DEFAULT_HANDLER, Handler, Registry
from rq_ceylon.models import DEFAULT_MAX_ATTEMPTS, DEFAULT_TIMEOUT_S, check_id, seconds
from rq_ceylon.staging import stage_child
from rq_ceylon.store.transitions import Claimed, Delivery, StagedTask

TRACEBACK_MAX = 8192
TYPE_NAME_MAX = 256

UNKNOWN = "unknown:"
"""The start of a release's reason when the handler is not registered here; the name of the task follows."""

INTERRUPTED = "interrupted"
"""The reason of a release when the handler had begun: with `max_crashes=0` the task has then failed."""

BUSY = "busy:"
"""The start of a release's reason when no thread or child process is free here; the name of the task follows."""

NO_RESOURCES = "no-resources"
"""The reason of a release when the system has no more threads, processes or files to give."""


def waits_by_name(reason: str) -> str:
    """The name under which a released task must wait by name, given the reason of its release; '': it need not."""
    return reason.partition(":")[2] if reason.startswith((UNKNOWN, BUSY)) else ""


class Assignment(NamedTuple):
    """
    A granted task.

    Attributes:
        body: the task's JSON over its group's defaults: uses, arguments, duration, timeout (s), max_attempts, metadata.
        needs: the results of the tasks that it needs, by id.
    """

    worker: str
    delivery: Delivery
    claimed: Claimed
    body: Mapping[str, Any]
    needs: Mapping[str, Any]


class Outcome(NamedTuple):
    """
    How an attempt ended.

    Attributes:
        kind: completed; failed; retry; release (given back, spends no attempt); stopped (cancelled from outside); lost
            (another worker has the task, so nothing is recorded).
        run_ms: how long the handler ran, by the monotonic clock.
        blob: JSON: the result, or `{"type", "message", "traceback"}` of the error.
        children: the tasks that it spawned, if it completed.
    """

    kind: Literal["completed", "failed", "retry", "release", "stopped", "lost"]
    reason: str = ""
    delay_ms: int = 0
    run_ms: int = 0
    blob: bytes = b""
    children: Sequence[StagedTask] = ()

    @property
    def error(self) -> dict[str, str]:
        """The error in `blob`; empty if there is none."""
        if not self.blob or self.kind == "completed":
            return {}
        error: dict[str, str] = from_json(self.blob)
        return error

    @property
    def summary(self) -> str:
        """The error without its traceback."""
        error = self.error
        return f"{error['type']}: {error['message']}" if error else ""


def unknown(name: str, error: BaseException) -> Outcome:
    """The outcome of a task whose name is not registered here: it waits by name for a worker that knows it."""
    return Outcome("release", reason=UNKNOWN + name, blob=to_json(error_of(error)))


def unroutable(role: str, outcome: Outcome) -> Outcome:
    """The outcome of a task whose name no worker of its role has known for an hour: none is expected to come."""
    error = outcome.error
    words = f"no worker of role {role!r} that knows this task has asked for work in an hour; here {error['message']}"
    return Outcome("failed", reason="unroutable", blob=to_json({**error, "message": words}))


def invalid(error: Exception) -> Outcome:
    """The outcome of a task whose body cannot be used."""
    return Outcome("failed", "invalid", blob=to_json(error_of(error)))


class RemoteError(Portable, Exception):
    """
    An exception of a child process, as text.

    Attributes:
        says: the exception as `said` describes it, from which the rules for retries follow.
        error: the exception as `error_of` gives it.
        is_invalid: the function returned, but its value cannot be a result.
    """

    def __init__(self, says: tuple[Said, ...], error: dict[str, str], *, is_invalid: bool = False) -> None:
        super().__init__(error["message"])
        self.says, self.error, self.is_invalid = says, error, is_invalid


class Attempt:
    """
    One attempt: its handler, its context, its arguments, and the outcome of each way in which it can end.

    Attributes:
        raw: the arguments as JSON values.
        began: when the handler was called, by the monotonic clock; None before that.

    Raises:
        UnknownTaskError: no handler of this name is registered here.
        InvalidInputError: the task's body, which any client may have written, cannot be used.
    """

    def __init__(self, registry: Registry, assignment: Assignment, state: Any = None) -> None:
        worker, delivery, claimed, body, needs = assignment
        uses = check_id(body.get("uses") or DEFAULT_HANDLER, "uses")
        self.handler: Handler[..., Any] = registry.get(uses)
        self.timeout_s = (
            seconds(body.get("timeout") or 0, f"task {uses!r}: timeout") or self.handler.timeout_s or DEFAULT_TIMEOUT_S
        )
        self.context = TaskContext(
            group_id=delivery.gid,
            task_id=delivery.tid,
            uses=uses,
            role=delivery.role,
            worker=worker,
            attempt=claimed.attempt,
            max_attempts=check_max_attempts(
                body.get("max_attempts") or self.handler.max_attempts or DEFAULT_MAX_ATTEMPTS,
                f"task {uses!r}: max_attempts",
            ),
            crashes=claimed.crashes,
            fence=delivery.fence,
            duration=seconds(body.get("duration") or 0, f"task {uses!r}: duration"),
            metadata=_object(body, uses, "metadata"),
            needs=needs,
            is_open=bool(body.get("open")),
            state=state,
        )
        self.context.stager = partial(stage_child, registry, delivery.role)
        self.raw = _object(body, uses, "arguments")
        self.began: float | None = None

    def begin(self) -> None:
        """Start the clock of the attempt: its timeout counts from here, right before its handler is called."""
        self.began = time.monotonic()
        self.context.deadline = self.began + self.timeout_s
        mark_running(self.context)

    def completed(self, blob: bytes) -> Outcome:
        children = tuple(self.context.children)
        return Outcome("completed", blob=blob, run_ms=self._run_ms(), children=children)

    def failed(self, reason: str, error: BaseException) -> Outcome:
        return Outcome("failed", reason=reason, blob=_blob_of(error), run_ms=self._run_ms())

    def stopped(self, why: StopReason) -> Outcome:
        if why == "shutdown":
            # INTERRUPTED: the handler has begun, and a task with `max_crashes=0` must never be started again then.
            return Outcome("release", "" if self.began is None else INTERRUPTED, run_ms=self._run_ms())
        return Outcome("lost" if why == "lost" else "stopped", run_ms=self._run_ms())

    def timed_out(self) -> tuple[TimeoutError, Outcome]:
        error = TimeoutError(f"no result within {self.timeout_s:g} s")
        return error, self._again_or_failed("timeout", error, said(error))

    def raised(self, error: BaseException) -> Outcome:
        """The outcome of an exception that the handler raised."""
        if not isinstance(error, RemoteError):
            return self._again_or_failed("error", error, said(error))
        return self.failed("invalid", error) if error.is_invalid else self._again_or_failed("error", error, error.says)

    def _again_or_failed(self, reason: str, error: BaseException, says: tuple[Said, ...]) -> Outcome:
        wait_s = self.handler.wait_s(says, self.context.attempt)
        if wait_s is None or self.context.attempt >= self.context.max_attempts:
            return self.failed(reason, error)
        return Outcome("retry", reason, round(wait_s * 1000), self._run_ms(), _blob_of(error))

    def _run_ms(self) -> int:
        return 0 if self.began is None else round((time.monotonic() - self.began) * 1000)


def error_of(error: BaseException) -> dict[str, str]:
    """
    An exception as text: its type, its message, and its traceback, without our own frames at its start. This never
    raises, whatever a user's exception class does, since an attempt must have an outcome.
    """
    return {
        "type": shown("its type", lambda: type(error).__name__)[:TYPE_NAME_MAX],
        "message": shown("its message", lambda: str(error))[:TRACEBACK_MAX],
        "traceback": shown("its traceback", lambda: _traceback(error))[-TRACEBACK_MAX:],
    }


def _traceback(error: BaseException) -> str:
    frames = error.__traceback__
    while frames is not None and frames.tb_frame.f_globals.get("__name__", "").startswith(
        ("rq_ceylon.worker", "asyncio", "concurrent.")
    ):
        frames = frames.tb_next
    is_of_user = frames is not None or error.__cause__ is not None
    return "".join(traceback.format_exception(type(error), error, frames)) if is_of_user else ""


def _blob_of(error: BaseException) -> bytes:
    return to_json(error.error if isinstance(error, RemoteError) else error_of(error))


def _object(body: Mapping[str, Any], uses: str, name: str) -> Mapping[str, Any]:
    value = body.get(name)
    if value is None:
        return {}
    if not isinstance(value, Mapping):
        raise InvalidInputError(f"task {uses!r}: {name}: {value!r} is not usable; give an object, by name")
    return value
