"""The output of `--json`: groups, goals, tasks and results as plain values with stable names."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from rq_ceylon.log import plain_json

if TYPE_CHECKING:
    from rq_ceylon.views import GroupView, TaskResult, TaskView


def to_json(value: Any) -> str:
    """One line of JSON of dataclasses and plain values."""
    from pydantic_core import to_json as dump

    return plain_json(dump(value).decode())


def group_facts(view: GroupView) -> dict[str, Any]:
    """A group and its goals, as `submit`, `groups` and `show` tell it."""
    group = {
        "id": view.id,
        "key": view.key,
        "name": view.name,
        "status": view.status,
        "outcome": view.outcome,
        "counters": view.counters,
    }
    goals = []
    for goal in view.goals:
        at = goal.settled
        settled = at and {"at": at.at_ms, "seq": at.seq, "by": at.by, "counters": at.counters}
        goals.append({"name": goal.name, "when": goal.when, "status": goal.status, "settled": settled})
    return {"group": group, "goals": goals}


def task_facts(task: TaskView) -> dict[str, Any]:
    """A task as it stands, with its result once it has ended."""
    result = task.result
    return {
        "id": task.id,
        "status": task.status,
        "reason": task.reason,
        "role": task.role,
        "uses": task.uses,
        "attempt": task.attempt,
        "crashes": task.crashes,
        "worker": task.worker,
        "progress": task.progress[0],
        "message": task.progress[1],
        "started": task.started_ms,
        "due": task.due_ms,
        "ended": result.ended_ms if result else None,
        "wait_ms": result.wait_ms if result else None,
        "run_ms": result.run_ms if result else None,
        "result": result.value if result else None,
        "error": result.error if result else None,
        "last_error": task.last_error,
    }


def result_facts(gid: str, result: TaskResult) -> dict[str, Any]:
    """How a task ended."""
    return {
        "id": f"{gid}/{result.task_id}",
        "status": result.status,
        "reason": result.reason,
        "role": result.role,
        "attempts": result.attempts,
        "worker": result.worker,
        "started": result.started_ms,
        "ended": result.ended_ms,
        "wait_ms": result.wait_ms,
        "run_ms": result.run_ms,
        "result": result.value,
        "error": result.error,
    }
