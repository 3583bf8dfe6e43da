"""Packs and unpacks the texts in the arguments and replies of scripts. The scripts do not read the JSON in them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from pydantic_core import from_json, to_json

from rq_ceylon.errors import CeylonError, RecordError
from rq_ceylon.models import GoalStatus, TaskStatus
from rq_ceylon.store.records import COUNTERS, RESULT, SETTLED, TASK
from rq_ceylon.views import Counters, Settled, TaskResult


@contextmanager
def reading(what: str) -> Iterator[None]:
    """
    Wrap code that reads a record: any failure inside means that this version did not write the record.

    Args:
        what: names the record, such as `group 'g'`.

    Raises:
        RecordError: the record cannot be read. Other errors of ours pass unchanged.
    """
    try:
        yield
    except CeylonError:
        raise
    except Exception as error:
        raise RecordError(
            f"{what} cannot be read ({type(error).__name__}: {error}); a newer version of rq-ceylon wrote it (then "
            "upgrade this one), or something else did"
        ) from error


def encode(value: Any) -> bytes:
    """The JSON of a value that is known to consist of JSON values."""
    return to_json(value)


def decode(text: str | bytes) -> Any:
    return from_json(text)


def counters_of(fields: Mapping[str, str]) -> Counters:
    """The counters of a group, from the fields of its meta hash."""
    return Counters(**{name: int(fields.get(name) or 0) for name in COUNTERS})


def settled_of(text: str) -> tuple[GoalStatus, Settled]:
    """Unpack a settled goal."""
    goal = SETTLED.parse(text)
    # A goal that settled before a counter was added lacks it, and a newer version's counters come behind those we know.
    counters = Counters(**dict(zip(COUNTERS, map(int, goal["counters"].split(",")), strict=False)))
    return GoalStatus(goal["status"]), Settled(at_ms=goal["at"], seq=goal["seq"], by=goal["by"], counters=counters)


def result_of(tid: str, text: str) -> TaskResult:
    """Unpack a result."""
    result = RESULT.parse(text)
    values = from_json(result["json"])
    failed = result["outcome"] == TaskStatus.FAILED
    return TaskResult(
        task_id=tid,
        status=TaskStatus(result["outcome"]),
        reason=result["reason"],
        role=result["role"],
        attempts=result["attempts"],
        crashes=result["crashes"],
        worker=result["worker"],
        started_ms=result["started"],
        ended_ms=result["ended"],
        wait_ms=result["wait"],
        run_ms=result["run"],
        value=None if failed or not values else values[0],
        error=values[0] if failed else None,
        payload=values[1] if len(values) > 1 else None,
    )


def task_text(
    role: str, priority: int, delay_ms: int | None, expires_ms: int | None, crash_limit: int | None, body: bytes
) -> bytes:
    """Pack a task for `submit`, with times from now."""
    fields = {
        "role": role, "priority": priority, "not_before": delay_ms, "expiry": expires_ms, "crash_limit": crash_limit,
    }  # fmt: skip
    return TASK.pack(fields).encode() + body


def task_parts(text: str) -> tuple[str, int, int | None, int | None, str]:
    """Unpack a stored task: role, priority 1..3, earliest start and expiry (epoch ms), JSON."""
    role, priority, not_before, expiry, *_, body = TASK.split(text)
    return role, int(priority), int(not_before) if not_before else None, int(expiry) if expiry else None, body
