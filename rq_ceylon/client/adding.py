"""Adds tasks to an open group."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import fields, replace
from graphlib import CycleError, TopologicalSorter
from typing import Any

from rq_ceylon.client.session import Session
from rq_ceylon.errors import CeylonError, InvalidInputError, NotFoundError
from rq_ceylon.maintenance import hand_over
from rq_ceylon.models import Task, check_id
from rq_ceylon.staging import new_id, stage_in_group
from rq_ceylon.store import queries, transitions
from rq_ceylon.store.transitions import SUBMIT_TASKS_MAX, AddReply, StagedTask, in_batches


async def add(session: Session, gid: str, tasks: Iterable[Task]) -> int:
    """
    Put tasks into an open group. All are checked before the first is sent. A task whose id the group knows is not
    added.

    Returns:
        how many were new.

    Raises:
        InvalidInputError: a task cannot be used or needs one that the group does not know, or the group takes no tasks.
        NotFoundError: the group is not known.
    """
    defaults = await queries.added_defaults(session.connection, session.keys, gid)
    ready, roles = _ready(session, tasks, Task(**defaults))
    added = 0
    for part in in_batches(ready, lambda staged: staged.size, SUBMIT_TASKS_MAX):
        if not part:
            break
        (reply,), _ = await session.send_part(gid, transitions.add(session.keys, gid, part), roles)
        answer = transitions.add_reply(gid, reply)
        if answer.word != "OK":
            raise _refused(gid, answer, added)
        added += answer.added
        await _enqueue(session, gid, answer)
    return added


def _ready(session: Session, tasks: Iterable[Task], defaults: Task) -> tuple[list[StagedTask], set[str]]:
    """The tasks in the form in which they are sent, each after those among them that it needs; and their roles."""
    by_id: dict[str, Task] = {}
    for task in tasks:
        tid = new_id() if task.id is None else check_id(task.id, "task id")
        if by_id.setdefault(tid, task) is not task:
            raise InvalidInputError(f"two tasks have the id {tid!r}; ids are unique")
    among = {tid: [need for need in task.needs if need in by_id] for tid, task in by_id.items()}
    try:
        order = list(TopologicalSorter(among).static_order())
    except CycleError as error:
        circle = " -> ".join(error.args[1])
        raise InvalidInputError(f"tasks need each other in a circle: {circle}; take out one of these needs") from None
    staged, roles = [], set()
    for tid in order:
        ready = stage_in_group(by_id[tid], session.registry, tid, defaults)
        roles.add(ready.role)
        staged.append(StagedTask(tid, ready.text, ready.needs))
    return staged, roles


async def _enqueue(session: Session, gid: str, answer: AddReply) -> None:
    """Hand over the entries of the new tasks. What cannot be handed over now is left to maintenance."""
    if answer.more:
        await session.relay(gid)
    if answer.pages:
        try:
            acks = await hand_over(session.connection, session.keys, answer.pages)
            await session.call([transitions.outbox(session.keys, gid, acks=acks)])
        except CeylonError:  # the pages are still in the outbox, hidden
            await session.relay(gid, hidden=True)


def _refused(gid: str, answer: AddReply, added: int) -> CeylonError:
    before = f"; {added:,} tasks before it were added" if added else ""
    if answer.word == "GONE":
        return NotFoundError(f"group {gid} is not known; it was never submitted, or it was pruned")
    if answer.word == "REFUSED":
        words = f"a task needs {answer.detail!r}, which group {gid} does not have; add it before"
        return InvalidInputError(words + before)
    if answer.detail in ("closing", "finished"):
        return InvalidInputError(f"group {gid} is {answer.detail} and takes no more tasks{before}")
    return InvalidInputError(
        f"group {gid} takes no tasks: it was not submitted as an open group (open=True), or it was sealed{before}"
    )


def with_defaults(task: Task, defaults: Task) -> Task:
    """The task, with the fields of `defaults` where it has none of its own."""
    ours: dict[str, Any] = {}
    for one in fields(Task):
        if getattr(task, one.name) is None and getattr(defaults, one.name) is not None:
            ours[one.name] = getattr(defaults, one.name)
    return replace(task, **ours)
