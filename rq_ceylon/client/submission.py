"""Sends one group, all or nothing: its parts are staged one after another, and the last one activates it."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping, Sequence
from contextlib import suppress
from typing import NoReturn

from rq_ceylon.client.session import Session
from rq_ceylon.errors import (
    CeylonError,
    ConnectionLostError,
    DurabilityError,
    GoalImpossibleError,
    GroupExistsError,
    InvalidInputError,
    NotFoundError,
    RedisError,
    guess,
)
from rq_ceylon.goals import impossible_words
from rq_ceylon.maintenance import hand_over
from rq_ceylon.models import Durability, GroupStatus, TaskGroup
from rq_ceylon.staging import StagedGroup, chain, keyed_id, new_id
from rq_ceylon.store import queries, transitions
from rq_ceylon.store.scripts import command
from rq_ceylon.store.transitions import StagedTask, SubmitReply
from rq_ceylon.views import Counters


async def check_known(session: Session, staged: StagedGroup, made: Mapping[str, Sequence[str]]) -> None:
    """
    Check the groups on which a group depends.

    Args:
        made: the names of the goals of groups that are about to be submitted, by their ids.

    Raises:
        NotFoundError: one of them is not known, or not any more.
        InvalidInputError: one has no goal of the name that is waited for.
    """
    where, goals = f"{staged.what}: depends_on", dict(made)
    outside = [other for other in staged.others if other not in made]
    async for gid, view in queries.views(session.connection, session.keys, outside):
        if view is None:
            raise NotFoundError(f"{where}: group {gid!r} is not known; submit it first")
        goals[gid] = [goal.name for goal in view.goals]
    for entry in staged.facts.depends_on:
        gid, _, when = entry.partition("=")
        name = when.removeprefix("achieved:")
        if when.startswith("achieved:") and name not in goals[gid]:
            remedy = guess(name, goals[gid], f"its goals: {', '.join(goals[gid]) or 'none'}")
            raise InvalidInputError(f"{where}: group {gid!r} has no goal {name!r}; {remedy}")


async def check_groups(
    session: Session,
    groups: Sequence[tuple[TaskGroup, str]],
    *,
    require_workers: bool = False,
    durability: Durability = "none",
) -> None:
    """
    Check several groups as `Client.submit` checks each, before the first one is sent. This iterates over their tasks.

    Args:
        groups: each with an id by which `depends_on` of the others may name it. Only a group with a key keeps that id.

    Raises:
        InvalidInputError: a group cannot be used; or some groups were submitted before, under their keys, while others
            have no key and would run again.
        NotFoundError: a group depends on one that is not known.
        GoalImpossibleError, GroupExistsError, NoWorkerError, DurabilityError: as `Client.submit`.
    """
    roles: set[str] = set()
    made: dict[str, list[str]] = {}
    known: list[str] = []
    for group, gid in groups:
        staged = StagedGroup(group, session.registry, gid=gid)
        digest = staged.digest()
        for part in staged.parts():
            digest = chain(digest, part)
        roles |= staged.roles
        await session.require_durable(durability, gid)
        meta = command("HMGET", session.keys.group_part(gid, "meta"), "status", "digest")
        foreseen, (status, stored) = await session.call(
            [transitions.foresee(session.keys, gid, staged.facts, staged.count), meta]
        )
        if foreseen[0] == "REFUSED":
            raise _impossible(staged, foreseen[1])
        made[gid] = [goal.name for goal in staged.goals]
        if status in (None, GroupStatus.STAGING):
            await check_known(session, staged, made)
            continue
        if stored != digest.hex()[:32]:
            raise GroupExistsError(f"{staged.what}: {_OTHER_CONTENT.format(group.key, gid)}; {_SAME_CONTENT}")
        known.append(f"{staged.what} was submitted before under its key (group {gid})")
    unkeyed = [group.name for group, _ in groups if not group.key]
    if known and unkeyed:
        remedy = "give every group of the file a key, or submit those without one from a file of their own"
        raise InvalidInputError(f"{known[0]}, but group {unkeyed[0]!r} has no key and would run again; {remedy}")
    if require_workers:
        await session.require_workers(roles)


_OTHER_CONTENT = "key {!r} was submitted before with other content (group {})"
_SAME_CONTENT = "use another key, or submit the same content"


def _impossible(staged: StagedGroup, name: str) -> GoalImpossibleError:
    goal = next(goal for goal in staged.goals if goal.name == name)
    return GoalImpossibleError(impossible_words(goal, Counters(total=staged.count, pending=staged.count)))


class Submission:
    """Sends one group."""

    def __init__(self, session: Session, group: TaskGroup, durability: Durability = "none") -> None:
        self._session, self._key, self._durability = session, group.key, durability
        gid = keyed_id(session.keys.namespace, group.key) if group.key else new_id()
        self._staged = StagedGroup(group, session.registry, gid=gid)
        self._digest = self._staged.digest()
        self._part = 0
        self._unconfirmed = ""

    @property
    def gid(self) -> str:
        return self._staged.gid

    async def run(self, *, require_workers: bool) -> bool:
        """Send the group. Returns False if the same group was submitted before, so that nothing changed."""
        await self._session.require_durable(self._durability, self.gid)
        if self._staged.others and not (self._key and await self._is_known()):
            await check_known(self._session, self._staged, {})
        try:
            reply = await self._send_all(require_workers=require_workers)
        except ConnectionLostError:
            raise  # maintenance removes the staged parts, since they cannot be removed now
        except BaseException:
            # Leave nothing half-written. But keep a group with a key, as another client may be staging the same one:
            # that client or the next submission completes it, or maintenance removes it.
            if self._part and not self._key:
                # In an asyncio task of its own, since this one may be cancelled.
                await asyncio.gather(asyncio.create_task(self._drop()), return_exceptions=True)
            raise
        await self._enqueue(reply)
        if self._unconfirmed:
            again = f"key {self._key!r} to wait once more" if self._key else "a key: without one it is another group"
            raise DurabilityError(
                f"durability: {self._durability!r} is not confirmed ({self._unconfirmed}): {self._staged.what} was "
                f"accepted as {self.gid} and runs, but a crash of Redis may lose it; submit it again with {again}",
                self.gid,
            )
        # Without a key, only this client writes the group. Then REPEAT means only that an answer was lost and the part
        # was sent again.
        return reply.word != "REPEAT" or not self._key

    async def _is_known(self) -> bool:
        """Whether a group of this key was submitted before. Then the groups on which it depends may be gone by now."""
        return any([view async for _, view in queries.views(self._session.connection, self._session.keys, [self.gid])])

    async def _send_all(self, *, require_workers: bool) -> SubmitReply:
        parts = self._staged.parts()
        tasks: list[StagedTask] | None = next(parts)
        roles: set[str] = set()
        reply = SubmitReply("OK")
        while tasks is not None:
            following = next(parts, None)
            if require_workers and self._staged.roles - roles:
                roles = set(self._staged.roles)
                await self._session.require_workers(roles)
            reply = await self._send(tasks, last=following is None)
            tasks = following
        return reply

    async def _send(self, tasks: Sequence[StagedTask], *, last: bool) -> SubmitReply:
        self._part += 1
        self._digest = chain(self._digest, tasks)
        keys, staged = self._session.keys, self._staged
        submit = transitions.submit(
            keys, self.gid, staged.facts, tasks, part=self._part, last=last, digest=self._digest.hex()[:32]
        )
        (answer,), self._unconfirmed = await self._session.send_part(
            self.gid, submit, staged.roles, announce_after=last, durability=self._durability if last else "none"
        )
        reply = transitions.submit_reply(self.gid, answer)
        if reply.word not in ("OK", "REPEAT"):
            await self._refuse(reply)
        return reply

    async def _refuse(self, reply: SubmitReply) -> NoReturn:
        what = self._staged.what
        match reply.word, reply.detail:
            case "EXISTS", _:
                raise GroupExistsError(await self._exists_words())
            case "REFUSED", "goal":
                raise _impossible(self._staged, reply.name)
            case "REFUSED", "duplicate":
                raise InvalidInputError(f"{what}: two tasks have the id {reply.name!r}; ids are unique")
            case "REFUSED", _:
                raise InvalidInputError(
                    f"{what}: a task needs {reply.name!r}, but no earlier task has that id; "
                    "put it before the tasks that need it"
                )
        raise RedisError(f"Redis lost earlier parts of {what} ({reply.word}); submit it again")

    async def _exists_words(self) -> str:
        words = _OTHER_CONTENT.format(self._key, self.gid)
        with suppress(CeylonError):
            view = await queries.group(self._session.connection, self._session.keys, self.gid)
            if view.status is GroupStatus.STAGING:
                return (
                    f"{words}, whose submission is not complete: another client is still sending it, or gave up; "
                    f"use another key, submit the same content, or remove it with: ceylon cancel {self.gid}"
                )
        return f"{words}; {_SAME_CONTENT}"

    async def _drop(self) -> None:
        # `prune` removes the group only while it is staging (or past its retention).
        await self._session.connection.run([transitions.prune(self._session.keys, self.gid, staging_ms=0)])

    async def _enqueue(self, reply: SubmitReply) -> None:
        connection, keys = self._session.connection, self._session.keys
        # The answer has the pages only if this is the first part and no REPEAT. And the groups on which this one
        # depends must be asked, as they may have finished before this one was registered with them.
        if self._part > 1 or reply.word == "REPEAT" or self._staged.facts.depends_on:
            asks = bool(self._staged.facts.depends_on)
            await self._session.relay(self.gid, hidden=reply.word == "REPEAT", ask_dependencies=asks)
        elif reply.pages:
            try:
                acks = await hand_over(connection, keys, reply.pages)
                await self._session.call([transitions.outbox(keys, self.gid, acks=acks)])
            except CeylonError:  # the pages are still in the outbox, hidden
                await self._session.relay(self.gid, hidden=True)
