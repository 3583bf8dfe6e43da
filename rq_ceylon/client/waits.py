"""Why tasks have not started."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import datetime

from rq_ceylon.client.session import Session, missing_words
from rq_ceylon.errors import guess
from rq_ceylon.models import GroupStatus, TaskStatus, counted, span_words
from rq_ceylon.store import queries
from rq_ceylon.views import GroupView, TaskView, WorkerView

WAITS = (TaskStatus.WAITING, TaskStatus.PENDING)


async def why_waiting(session: Session, view: GroupView, tasks: Sequence[TaskView]) -> dict[str, str]:
    """
    Explain in words why each of these tasks of a group has not started, with all causes that apply. A task without a
    cause is about to start, so it only waits for its turn. This reads once per role, however many tasks there are.
    """
    waiting = [task for task in tasks if task.status in WAITS]
    if not waiting:
        return {}
    connection, keys = session.connection, session.keys
    now_ms = await queries.server_ms(connection, keys)
    workers = [one for one in await queries.workers(connection, keys) if one.roles and not one.stopping]
    roles = {role: await _of_role(session, role, workers) for role in sorted({task.role for task in waiting})}
    ours = _of_group(view)
    return {task.task_id: "; ".join(_causes(task, ours, roles[task.role], workers, now_ms)) for task in waiting}


def _of_group(view: GroupView) -> list[str]:
    match view.status:
        case GroupStatus.STAGING:
            return ["its group is still being submitted"]
        case GroupStatus.WAITING:
            return [f"its group waits for {', '.join(view.depends_on) or 'another group'}"]
        case GroupStatus.PAUSED:
            return [f"its group is paused; go on with: ceylon resume {view.id}"]
    if view.max_running and view.counters.in_progress >= view.max_running:
        return [f"its group runs {view.max_running} tasks at once at most (max_running), and so many are running"]
    return []


async def _of_role(session: Session, role: str, workers: Sequence[WorkerView]) -> list[str]:
    paused = (await queries.role_meta(session.connection, session.keys, role)).get("paused") == "1"
    served = {name for worker in workers for name in worker.roles}
    return [
        *([f"role {role} is paused; go on with: ceylon resume --role {role}"] if paused else []),
        *([] if role in served else [missing_words(role, served)]),
    ]


def _causes(
    task: TaskView, of_group: list[str], of_role: list[str], workers: Sequence[WorkerView], now_ms: int
) -> list[str]:
    mine = [worker for worker in workers if task.role in worker.roles]
    found = [*of_group]
    if task.needs:
        found.append(f"{counted(task.needs, 'task')} that it needs {'has' if task.needs == 1 else 'have'} not ended")
    if task.due_ms is not None and task.due_ms > now_ms:
        what = f"attempt {task.attempt} after an error" if task.attempt > 1 else "due"
        at = datetime.fromtimestamp(task.due_ms / 1000).astimezone().isoformat(" ", "seconds")
        found.append(f"{what} in {span_words((task.due_ms - now_ms) / 1000)}, at {at}")
    found += of_role
    known = {name for worker in mine for name in worker.task_names}
    if mine and task.uses and task.uses not in known:
        near = guess(task.uses, sorted(known), ask='; did you mean "{}"?')
        found.append(f"no live worker of role {task.role} knows {task.uses!r}{near}")
    if found:
        return found
    busy, slots = sum(len(worker.tasks) for worker in mine), sum(worker.slots for worker in mine)
    return [f"its turn has not come: {busy} of {counted(slots, 'slot')} of role {task.role} are busy"]
