"""Retry: run tasks of a group again that failed or were cancelled."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping, Sequence
from graphlib import TopologicalSorter

from rq_ceylon.client.session import Session
from rq_ceylon.errors import CeylonError, InvalidInputError, NotFoundError
from rq_ceylon.maintenance import MOVING_MS
from rq_ceylon.models import TaskStatus
from rq_ceylon.store import queries, transitions
from rq_ceylon.store.codec import reading, result_of
from rq_ceylon.views import TaskResult

BUSY_S = 0.05
BUSY_LOOKS = 100
"""How often, and after which pause, a retry asks again for a task whose dependents are still being told of its end."""


def failed(result: TaskResult) -> bool:
    """Whether a retry of a whole group reopens this task: it failed, or was skipped since another one did."""
    return result.status is TaskStatus.FAILED or result.reason == "skipped"


async def retry(session: Session, gid: str, chosen: Callable[[TaskResult], bool]) -> Mapping[str, str]:
    """
    Reopen those tasks of a group that did not complete and are `chosen`. A task that needs others is reopened only if
    each of them has completed or is open again.

    Returns:
        for each chosen task what became of it; `reopened` and `open` mean that it will run. The other words are those
        of the script `reopen`.

    Raises:
        NotFoundError: the group is not known.
        InvalidInputError: it has not started, or is closing.
    """
    await _settle(session, gid)
    needs = await _chosen(session, gid, chosen)
    above = {tid: [need for need in some if need in needs] for tid, some in needs.items()}
    order = list(TopologicalSorter(above).static_order())  # a task is reopened behind those that it needs
    told: dict[str, str] = {}
    for first in range(0, len(order), transitions.REOPEN_TASKS_MAX):
        part = order[first : first + transitions.REOPEN_TASKS_MAX]
        told |= await _reopen(session, gid, {tid: needs[tid] for tid in part})
    if told:
        # Behind the reopening, which may have ended a retention of days: maintenance looks again at once.
        await session.call([transitions.end_retry(session.keys, gid), transitions.look_again(session.keys, gid, 0)])
        await session.relay(gid)
    return told


async def _settle(session: Session, gid: str) -> None:
    """Give a finished group the results of the tasks that ended without one when it closed."""
    cursor = ""
    while cursor != "0":
        ((word, *rest),) = await session.call([transitions.settle(session.keys, gid, cursor or "0")])
        if word == "GONE":
            raise NotFoundError(f"group {gid} is not known; it was never submitted, or it was pruned")
        cursor = rest[1] if word == "OK" else "0"  # only a finished group has such tasks


async def _chosen(session: Session, gid: str, chosen: Callable[[TaskResult], bool]) -> dict[str, Sequence[str]]:
    """The needs of each chosen task."""
    found: dict[str, Sequence[str]] = {}
    async for texts in queries.scan(session.connection, session.keys.group_part(gid, "results")):
        for tid, text in texts.items():
            if text.startswith(f"{TaskStatus.COMPLETED}|"):  # without a look at its value, which may be large
                continue
            with reading(f"the result of task {gid}/{tid}"):
                result = result_of(tid, text)
            if chosen(result):
                found[tid] = (result.payload or {}).get("needs", ())
    return found


async def _reopen(session: Session, gid: str, part: Mapping[str, Sequence[str]]) -> dict[str, str]:
    told: dict[str, str] = {}
    for _ in range(BUSY_LOOKS):
        left = {tid: needs for tid, needs in part.items() if told.get(tid, "busy") == "busy"}
        if not left:
            break
        # A finished group has its next look in its retention's end. If this process dies behind its reopening,
        # maintenance must find it sooner.
        now_ms = await queries.server_ms(session.connection, session.keys)
        soon = transitions.look_again(session.keys, gid, now_ms + MOVING_MS)
        _, (word, *rest) = await session.call([soon, transitions.reopen(session.keys, gid, left.items())])
        if word == "UNSETTLED":  # it finished meanwhile
            await _settle(session, gid)
        elif word == "OK":
            told |= dict(zip(left, rest[1:], strict=True))
        else:
            raise _refused(gid, *rest)
        if "busy" in told.values():
            await session.relay(gid)
            await asyncio.sleep(BUSY_S)
    return told


def _refused(gid: str, status: str = "") -> CeylonError:
    if not status:
        return NotFoundError(f"group {gid} is not known; it was never submitted, or it was pruned")
    if status == "closing":
        return InvalidInputError(f"group {gid} is closing: its running tasks come to their end; retry it after that")
    return InvalidInputError(f"group {gid} is {status}: it has not started, so nothing of it can be retried")
