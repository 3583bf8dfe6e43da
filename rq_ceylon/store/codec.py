"""Packs and unpacks the texts in the arguments and replies of scripts. The scripts do not read the JSON in them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from pydantic_core import from_json, to_json

from rq_ceylon.errors import CeylonError, RecordError
from rq_ceylon.models import GoalStatus, TaskStatus
from rq_ceylon.views import COUNTERS, Counters, Settled, TaskResult

COUNTER_NAMES = ("total", *COUNTERS, "attempts", "crashes")
"""The counters in the order in which a settled goal keeps them. A new one comes last, so old goals stay readable."""


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
    return Counters(**{name: int(fields.get(name) or 0) for name in COUNTER_NAMES})


def settled_of(text: str) -> tuple[GoalStatus, Settled]:
    """Unpack a settled goal: `status|at ms|event number|by|counters`."""
    status, at, seq, by, counts = text.split("|")
    # A goal that settled before a counter was added lacks it, and a newer version's counters come behind those we know.
    counters = Counters(**dict(zip(COUNTER_NAMES, map(int, counts.split(",")), strict=False)))
    return GoalStatus(status), Settled(at_ms=int(at), seq=int(seq), by=by, counters=counters)


def result_of(tid: str, text: str) -> TaskResult:
    """
    Unpack a result: `outcome|reason|role|attempts|crashes|worker|started|ended|wait ms|run ms|[value]`. A failed task
    has `[error, payload]` in place of `[value]`.
    """
    outcome, reason, role, attempts, crashes, worker, started, ended, wait, run, blob = text.split("|", 10)
    values = from_json(blob)
    failed = outcome == TaskStatus.FAILED
    return TaskResult(
        task_id=tid,
        status=TaskStatus(outcome),
        reason=reason,
        role=role,
        attempts=int(attempts),
        crashes=int(crashes),
        worker=worker,
        started_ms=int(started) if started else None,
        ended_ms=int(ended),
        wait_ms=int(float(wait)),
        run_ms=int(float(run)),
        value=None if failed or not values else values[0],
        error=values[0] if failed else None,
    )


def task_text(
    role: str, priority: int, delay_ms: int | None, expires_ms: int | None, crash_limit: int | None, body: bytes
) -> bytes:
    """Pack a task for `submit`: `role|priority|delay|expires|crash limit|JSON`."""
    numbers = "|".join("" if number is None else str(number) for number in (delay_ms, expires_ms, crash_limit))
    return f"{role}|{priority}|{numbers}|".encode() + body


def task_parts(text: str) -> tuple[str, int, int | None, int | None, str]:
    """Unpack a stored task: role, priority 1..3, earliest start and expiry (epoch ms), JSON."""
    role, priority, not_before, expiry, _, body = text.split("|", 5)
    return role, int(priority), int(not_before) if not_before else None, int(expiry) if expiry else None, body
