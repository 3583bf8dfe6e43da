"""One attempt at a time, without a worker."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any

from pydantic_core import from_json

from rq_ceylon.attempt import TaskContext
from rq_ceylon.store.transitions import Claimed, Delivery
from rq_ceylon.worker.executor import Executor
from rq_ceylon.worker.outcome import Assignment, Outcome

Body = dict[str, Any]


class Runs(Executor):
    """An executor whose attempts can be awaited."""

    async def run(self, assignment: Assignment, *, begun: Callable[[TaskContext], None] = lambda _: None) -> Outcome:
        told = asyncio.get_running_loop().create_future()
        self.start(assignment, told.set_result, begun=begun)
        outcome: Outcome = await told
        return outcome


def assigned(*, attempt: int = 1, releases: int = 0, role: str = "r", fence: int = 7, **body: Any) -> Assignment:
    delivery = Delivery(role, "2:1-0", "g", "t", "1", "2:1-0", fence)
    return Assignment("w", delivery, Claimed("GRANTED", attempt, 0, releases), {"uses": "job", **body}, {})


def error_of(outcome: Outcome) -> dict[str, str]:
    error: dict[str, str] = from_json(outcome.blob)
    assert set(error) == {"type", "message", "traceback"}
    return error
