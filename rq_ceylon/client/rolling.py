"""
Sends single tasks. They share *rolling groups*: each call sends one part of the group. One part is in flight at a time,
and tasks that are submitted meanwhile go with the next, so that many tasks share a round trip.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections import deque
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from rq_ceylon.client.session import Session
from rq_ceylon.errors import CeylonError, DurabilityError
from rq_ceylon.maintenance import hand_over
from rq_ceylon.models import Durability
from rq_ceylon.staging import ReadyTask, chain, new_id
from rq_ceylon.store import transitions
from rq_ceylon.store.scripts import Call
from rq_ceylon.store.transitions import GroupFacts, Page, PageAck, StagedTask

log = logging.getLogger("rq_ceylon")

ROLLING_TASKS_MAX, ROLLING_S = 1000, 60.0
"""A group is sealed once it has this many tasks, or is this old (seconds from its first part)."""

ACKNOWLEDGED_S = 1.0
"""How long an acknowledgement waits for a part to go with: far less than a relay lease, so no relay takes the page."""


class _Waiting(NamedTuple):
    """A task to be sent, the future that gets its ids, and since when it waits (monotonic seconds)."""

    task: ReadyTask
    ids: asyncio.Future[tuple[str, str]]
    since: float


@dataclass
class _Group:
    """
    The rolling group that takes tasks now. Its id is random, so only this client writes the group, and what this says
    is what Redis has.

    Attributes:
        part: the number of the last part that Redis has; 0 if none was sent.
        count: how many tasks these parts have. A task's id is its position, from 1.
        digest: the digest of these parts.
        roles: the roles that were announced.
    """

    gid: str = field(default_factory=new_id)
    part: int = 0
    count: int = 0
    digest: bytes = b""
    roles: set[str] = field(default_factory=set)


class Rolling:
    """
    Sends single tasks of one client, which are kept for `retention_ms` after they have ended.

    The state is `_waiting` (tasks to be sent), `_group` (the group that takes them), and what goes with the next part.
    One task of the event loop, `_pump`, sends the parts, and ends when nothing is left to send. Two timers start it
    again: `_tidying` when acknowledgements have waited for long enough, and `_ageing` when the group must be sealed.
    """

    def __init__(self, session: Session, durability: Durability, retention_ms: int) -> None:
        self._session, self._durability = session, durability
        self._facts = GroupFacts(name="single tasks", retention_ms=retention_ms)
        self._waiting: deque[_Waiting] = deque()
        self._group = _Group()
        self._answered_at = 0.0
        # These go with the next part: acknowledgements of pages that have arrived, and groups to seal.
        self._acks: list[PageAck] = []
        self._to_seal: list[str] = []
        self._pump: asyncio.Task[None] | None = None
        self._tidying: asyncio.TimerHandle | None = None
        self._ageing: asyncio.TimerHandle | None = None

    async def submit(self, task: ReadyTask) -> tuple[str, str]:
        """
        Send a task. Returns the ids of its group and of the task once the task is stored and its role has its entry. If
        the role cannot be reached for now, maintenance enqueues the entry.
        """
        ids: asyncio.Future[tuple[str, str]] = asyncio.get_running_loop().create_future()
        self._waiting.append(_Waiting(task, ids, time.monotonic()))
        self._wake()
        return await ids

    async def close(self) -> None:
        """Wait for the parts under way, then seal the group."""
        if self._pump is not None:
            await asyncio.gather(self._pump, return_exceptions=True)
        if self._tidying is not None:
            self._tidying.cancel()
        group = self._open_another()
        if group.part:
            self._to_seal.append(group.gid)
        with suppress(CeylonError):  # maintenance does both, if later
            await self._session.connection.run(self._loose_ends(self._take_acks()))

    def _wake(self) -> None:
        if self._tidying is not None:
            self._tidying.cancel()
            self._tidying = None
        if self._pump is None or self._pump.done():
            self._pump = asyncio.create_task(self._run(), name="submit")

    async def _run(self) -> None:
        while True:
            batch = self._next_batch()
            try:
                await self._send_part(batch)
            except Exception as error:  # of any kind: a task that is neither sent nor refused would wait for ever
                for waiting in batch:
                    _refuse(waiting, error)
                if not batch:
                    log.warning("Acknowledging and sealing groups of single tasks is left to maintenance: %s", error)
                # Maintenance relays the pages that were not acknowledged, and seals the groups. Redis may or may not
                # have stored the part, so what `_group` says is not certain: the next tasks open another group.
                self._acks, self._to_seal = [], []
                self._open_another()
            # Let callers that were answered just now submit again, so that they share the next round trip.
            await asyncio.sleep(0)
            if not self._waiting and not self._to_seal:
                break
        if self._acks:
            self._tidying = asyncio.get_running_loop().call_later(ACKNOWLEDGED_S, self._wake)

    def _next_batch(self) -> list[_Waiting]:
        most = transitions.SUBMIT_TASKS_MAX
        batch = next(transitions.in_batches(self._waiting, lambda waiting: len(waiting.task.text), most))
        for _ in batch:
            self._waiting.popleft()
        return batch

    async def _send_part(self, batch: list[_Waiting]) -> None:
        """
        Send the next part, with acknowledgements of earlier pages. Its entries follow in the same pipeline where they
        can (see `_entries_behind`), and are enqueued after the answer where they cannot.
        """
        keys, group = self._session.keys, self._group
        acks = self._take_acks()
        own_acks = acks.pop(group.gid, []) if batch else []  # the part itself carries those of its own group
        calls = self._loose_ends(acks)
        if not batch:
            await self._session.call(calls)
            return
        await self._session.require_durable(self._durability, group.gid)
        tasks = [StagedTask(str(group.count + n), waiting.task.text) for n, waiting in enumerate(batch, 1)]
        digest, last = chain(group.digest, tasks), group.count + len(batch) >= ROLLING_TASKS_MAX
        part = transitions.submit(
            keys,
            group.gid,
            self._facts,
            tasks,
            part=group.part + 1,
            last=last,
            digest=digest.hex()[:32],
            rolling=True,
            acks=own_acks,
        )
        # The first part announces the group with its roles; a later part, only roles that are new to the group.
        roles = {waiting.task.role for waiting in batch} - group.roles
        behind = self._entries_behind(group.gid, tasks, batch)
        # Give up `answer_s` after the oldest task was submitted, or after the last answer if that was later. So a task
        # that waited while a part got no answer does not wait that long again.
        limit_s = max(batch[0].since, self._answered_at) + self._session.answer_s - time.monotonic()
        replies, unconfirmed = await self._session.send_part(
            group.gid,
            part,
            roles or None,
            before=calls,
            behind=[transitions.enqueue(keys, page.role, [page], insist=False) for page in behind],
            durability=self._durability,
            limit_s=limit_s,
        )
        self._answered_at = time.monotonic()
        for error in replies[: len(calls)]:
            if isinstance(error, CeylonError):
                log.warning("Acknowledging and sealing groups of single tasks is left to maintenance: %s", error)
        reply = transitions.submit_reply(group.gid, replies[len(calls)])
        if reply.word not in ("OK", "REPEAT"):
            # Nothing was stored: maintenance sealed the group (CLOSED), or Redis lost earlier parts (GAP). The same
            # tasks open another group, in the same order. The claims of entries that went behind the part find no task:
            # ids are positions, and no other part will have these. The part's acknowledgements were not taken, so
            # maintenance enqueues those pages once more, and the claims refuse the doubles.
            self._waiting.extendleft(reversed(batch))
            self._open_another()
            return
        group.part, group.count, group.digest = group.part + 1, group.count + len(batch), digest
        group.roles |= roles
        if reply.word == "REPEAT":  # the part was resent, and the lost answer had the pages: they are hidden now
            await self._session.relay(group.gid, hidden=True)
        # Per role, the horizon that the entries behind the part reached, or an error.
        horizons = {page.role: told for page, told in zip(behind, replies[len(calls) + 1 :], strict=True)}
        await self._enqueue(reply.pages, horizons)
        for task, waiting in zip(tasks, batch, strict=True):
            if unconfirmed:
                _refuse(waiting, self._unconfirmed(unconfirmed, f"{group.gid}/{task.tid}"))
            elif not waiting.ids.done():
                waiting.ids.set_result((group.gid, task.tid))
        if last:
            self._open_another()
        elif group is self._group and self._ageing is None:  # this was its first part: seal it when it is old
            self._ageing = asyncio.get_running_loop().call_later(ROLLING_S, self._retire)

    def _take_acks(self) -> dict[str, list[PageAck]]:
        by_group: dict[str, list[PageAck]] = {}
        for ack in self._acks:
            by_group.setdefault(ack.page.gid, []).append(ack)
        self._acks = []
        return by_group

    def _loose_ends(self, acks: Mapping[str, Sequence[PageAck]]) -> list[Call]:
        keys, to_seal = self._session.keys, self._to_seal
        self._to_seal = []
        calls = [transitions.outbox(keys, gid, acks=some) for gid, some in acks.items()]
        return calls + [transitions.seal(keys, gid, untouched_ms=0) for gid in to_seal]

    def _entries_behind(self, gid: str, tasks: Sequence[StagedTask], batch: Sequence[_Waiting]) -> list[Page]:
        """
        The entries of the tasks that are due now, as one page per role whose slot is on the group's own node. They go
        behind the part in one pipeline, which saves a round trip: a node runs the calls of a pipeline in order, so the
        task is stored before its entry can be delivered (if a slot moves meanwhile, `Call.follows` sees to it).

        This writes the page format a second time: `number|role|due|items`. No number, as only the script knows it, and
        no due time. Each item is `priority,task,issue`, and the issue of a task that never ran is 1. The pages that are
        acknowledged are those that the reply brings, of 100 entries at most (see `_enqueue`).
        """
        if self._durability != "none":
            return []  # such a part goes over another connection, which may know other owners of the slots
        connection, keys = self._session.connection, self._session.keys
        node = connection.node_of(keys.group_part(gid, "meta"))
        items: dict[str, list[str]] = {}
        for task, (ready, *_) in zip(tasks, batch, strict=True):
            if not ready.delay_ms and connection.node_of(keys.role_part(ready.role, "meta")) == node:
                items.setdefault(ready.role, []).append(f"{ready.stream},{task.tid},1")
        return [Page(gid, f"|{role}||{' '.join(some)}") for role, some in items.items()]

    async def _enqueue(self, pages: Sequence[Page], horizons: Mapping[str, Any]) -> None:
        """
        Acknowledge the pages whose entries went behind the part, and enqueue the others: those of roles on other nodes,
        those that are due later, and those that Redis refused at its memory limit.

        Args:
            horizons: per role, the reply to the entries behind the part: the horizon, which all its pages that are due
                now share, or an error.
        """
        left: list[Page] = []
        for page in pages:
            horizon = horizons.get(page.role)
            if page.due or not isinstance(horizon, str):
                left.append(page)
            else:
                self._acks.append(PageAck(page, horizon))
        if left:
            try:
                self._acks += await hand_over(self._session.connection, self._session.keys, left)
            except CeylonError:  # the pages are still in the outbox, hidden
                await self._session.relay(left[0].gid, hidden=True)

    def _unconfirmed(self, why: str, task_id: str) -> DurabilityError:
        return DurabilityError(
            f"durability: {self._durability!r} is not confirmed ({why}): the task was accepted as {task_id} and runs, "
            "but a crash of Redis may lose it; check its outcome before you submit it again",
            task_id,
        )

    def _retire(self) -> None:
        """Seal the group because of its age."""
        self._to_seal.append(self._open_another().gid)
        self._wake()

    def _open_another(self) -> _Group:
        """Let the next tasks open another group. Returns the group before it."""
        before, self._group = self._group, _Group()
        if self._ageing is not None:
            self._ageing.cancel()
            self._ageing = None
        return before


def _refuse(waiting: _Waiting, error: Exception) -> None:
    if not waiting.ids.done():
        waiting.ids.set_exception(error)
