"""
Sends single tasks. They share *rolling groups*: one submission is in flight at a time, and tasks submitted meanwhile go
with the next, so that many tasks share a round trip.
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
from rq_ceylon.client.staging import ReadyTask, chain, new_id
from rq_ceylon.errors import CeylonError, DurabilityError
from rq_ceylon.maintenance import hand_over
from rq_ceylon.models import Durability
from rq_ceylon.store import transitions
from rq_ceylon.store.scripts import Call
from rq_ceylon.store.transitions import GroupFacts, Page, PageAck, StagedTask

log = logging.getLogger("rq_ceylon")

ROLLING_TASKS_MAX, ROLLING_S = 1000, 60.0
"""A group takes no more tasks once it has this many, or is this old."""

ACKNOWLEDGED_S = 1.0
"""How long an acknowledgement of enqueued pages waits for a submission to go with: far less than a relay waits."""

FACTS = GroupFacts(name="single tasks", retention_ms=3_600_000)


class _Waiting(NamedTuple):
    """A task to be sent, the future that gets its ids, and since when (monotonic seconds) it waits."""

    task: ReadyTask
    ids: asyncio.Future[tuple[str, str]]
    since: float


@dataclass
class _Group:
    """The group that tasks go to now. Only this client writes it, since its id comes from the system's randomness."""

    gid: str = field(default_factory=new_id)
    part: int = 0
    count: int = 0
    digest: bytes = b""
    roles: set[str] = field(default_factory=set)


class Rolling:
    """Sends the single tasks of one client."""

    def __init__(self, session: Session, durability: Durability = "none") -> None:
        self._session, self._durability = session, durability
        self._waiting: deque[_Waiting] = deque()
        self._group = _Group()
        self._answered_at = 0.0
        # What the next turn carries beside tasks: acknowledgements of what was enqueued, groups to seal.
        self._acks: list[PageAck] = []
        self._to_seal: list[str] = []
        self._pump: asyncio.Task[None] | None = None
        self._tidying: asyncio.TimerHandle | None = None
        self._ageing: asyncio.TimerHandle | None = None

    async def submit(self, task: ReadyTask) -> tuple[str, str]:
        """Send a task. Returns the ids of its group and of the task once Redis has it, and its role too."""
        ids: asyncio.Future[tuple[str, str]] = asyncio.get_running_loop().create_future()
        self._waiting.append(_Waiting(task, ids, time.monotonic()))
        self._wake()
        return await ids

    async def close(self) -> None:
        """Finish the submissions under way, and seal the group."""
        if self._pump is not None:
            await asyncio.gather(self._pump, return_exceptions=True)
        if self._tidying is not None:
            self._tidying.cancel()
        group = self._renew()
        if group.part:
            self._to_seal.append(group.gid)
        with suppress(CeylonError):
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
                await self._turn(batch)
            except Exception as error:  # of any kind: else the submitters would wait for ever
                for waiting in batch:
                    _refuse(waiting, error)
                if not batch:
                    log.warning("Acknowledging and sealing groups of single tasks is left to maintenance: %s", error)
                self._acks, self._to_seal = [], []
                self._renew()
            # Let callers that were answered just now submit again at once, so that they share the next round trip.
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

    async def _turn(self, batch: list[_Waiting]) -> None:
        """Acknowledge the pages that earlier turns enqueued, and send the next part with its entries behind it."""
        keys, group = self._session.keys, self._group
        acks = self._take_acks()
        own_acks = acks.pop(group.gid, []) if batch else []
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
            FACTS,
            tasks,
            part=group.part + 1,
            last=last,
            digest=digest.hex()[:32],
            rolling=True,
            acks=own_acks,
        )
        # A later part announces only roles that are new to the group: `status` lists what was announced.
        roles = {waiting.task.role for waiting in batch} - group.roles
        expected = self._expected(group.gid, tasks, batch)
        entries = [transitions.enqueue(keys, page.role, [page], insist=False) for page in expected]
        # A task that waited through a turn without an answer has waited for this one too.
        limit_s = max(batch[0].since, self._answered_at) + self._session.answer_s - time.monotonic()
        replies, unconfirmed = await self._session.send_part(
            group.gid,
            part,
            roles or None,
            before=calls,
            behind=entries,
            durability=self._durability,
            limit_s=limit_s,
        )
        self._answered_at = time.monotonic()
        reply = transitions.submit_reply(group.gid, replies[len(calls)])
        if reply.word not in ("OK", "REPEAT"):
            # Sealed meanwhile, or Redis lost earlier parts: the same tasks open a new group.
            self._waiting.extendleft(reversed(batch))
            self._renew()
            return
        group.part, group.count, group.digest = group.part + 1, group.count + len(batch), digest
        group.roles |= roles
        if reply.word == "REPEAT":
            await self._session.relay(group.gid, again=True)
        horizons = {page.role: horizon for page, horizon in zip(reversed(expected), reversed(replies), strict=False)}
        await self._enqueue(reply.pages, horizons)
        for task, waiting in zip(tasks, batch, strict=True):
            if unconfirmed:
                _refuse(waiting, self._unconfirmed(unconfirmed, f"{group.gid}/{task.tid}"))
            elif not waiting.ids.done():
                waiting.ids.set_result((group.gid, task.tid))
        if last:
            self._renew()
        elif group is self._group and self._ageing is None:
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

    def _expected(self, gid: str, tasks: Sequence[StagedTask], batch: Sequence[_Waiting]) -> list[Page]:
        """
        Foresee the pages that the group will return for tasks that are due now, for each role on the group's own node.
        They are enqueued without waiting for the answer, since a node runs calls in order. If the part is refused, the
        claim finds no task.
        """
        if self._durability != "none":
            return []  # these go by another connection, which may know other owners of the slots
        connection, keys = self._session.connection, self._session.keys
        node = connection.node_of(keys.group_part(gid, "meta"))
        items: dict[str, list[str]] = {}
        for task, (ready, *_) in zip(tasks, batch, strict=True):
            if not ready.delay_ms and connection.node_of(keys.role_part(ready.role, "meta")) == node:
                items.setdefault(ready.role, []).append(f"{ready.stream},{task.tid},1")
        return [Page(gid, f"|{role}||{' '.join(some)}") for role, some in items.items()]

    async def _enqueue(self, pages: Sequence[Page], horizons: Mapping[str, Any]) -> None:
        """Note the pages that arrived as expected, and enqueue the others."""
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
            except CeylonError:
                await self._session.relay(left[0].gid, again=True)

    def _unconfirmed(self, why: str, task_id: str) -> DurabilityError:
        return DurabilityError(
            f"durability: {self._durability!r} is not confirmed ({why}): the task was accepted as {task_id} and runs, "
            "but a crash of Redis may lose it; check its outcome before you submit it again",
            task_id,
        )

    def _retire(self) -> None:
        """Seal the group because of its age, used or not."""
        self._to_seal.append(self._renew().gid)
        self._wake()

    def _renew(self) -> _Group:
        """Open a new group, and return the one before it."""
        before, self._group = self._group, _Group()
        if self._ageing is not None:
            self._ageing.cancel()
            self._ageing = None
        return before


def _refuse(waiting: _Waiting, error: Exception) -> None:
    if not waiting.ids.done():
        waiting.ids.set_exception(error)
