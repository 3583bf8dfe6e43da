"""
The part of a client that all others share: the URL of Redis, one connection, one subscription to events, and the check
that they are used only by the process and event loop that opened them.
"""

from __future__ import annotations

import asyncio
import logging
import os
import time
from collections.abc import Collection, Iterable, Sequence
from contextlib import AbstractContextManager
from dataclasses import replace
from typing import Any

from rq_ceylon import maintenance
from rq_ceylon.client.following import Follower, Following
from rq_ceylon.errors import CeylonError, DurabilityError, NoWorkerError, QueueFullError, guess
from rq_ceylon.handlers import Registry
from rq_ceylon.models import Durability
from rq_ceylon.script import refuse_while_loading
from rq_ceylon.settings import check_url, masked
from rq_ceylon.store import queries, transitions
from rq_ceylon.store.connection import Connection, until_answered
from rq_ceylon.store.durability import CONFIRM_S, confirming, unable
from rq_ceylon.store.events import EventHub
from rq_ceylon.store.keys import Keys
from rq_ceylon.store.scripts import Call, command

log = logging.getLogger("rq_ceylon")
"""A client's messages go through the standard library's logging: Python prints its warnings to stderr even in a program
that has not configured logging, so its user learns why the program waits."""

ANSWER_S = 5.0
"""How long a call is repeated while Redis does not answer, and how long one answer may take."""

WARN_AGAIN_S = 60.0
"""How often at most a warning names a role, or a name, that no worker serves, however many tasks wait for it."""


class Session:
    """One client's connection to Redis. It belongs to one event loop and one process."""

    def __init__(self, url: str, namespace: str, registry: Registry | None) -> None:
        self.url, self.keys, self.registry = check_url(url), Keys(namespace), registry
        self.answer_s = ANSWER_S
        self._connection = Connection(url, answer_s=self.answer_s)
        # Redis answers nothing else on a connection that waits for a replica or the disk.
        self._confirming = Connection(url)
        self.hub = EventHub(url, self.keys)
        self._following = Following(self._connection, self.keys, self.hub, self._warn_of_missing)
        self._warned_at: dict[tuple[str, str], float] = {}
        self._owner: tuple[int, asyncio.AbstractEventLoop] | None = None
        self._was_closed = False

    @property
    def connection(self) -> Connection:
        """
        Raises:
            CeylonError: the client is not open, or belongs to another process or loop. If two used one connection,
                their calls would mix.
        """
        self.check_owner()
        return self._connection

    async def connect(self) -> None:
        """
        Connect and check the server; if the client is already open here, only check it again.

        Raises:
            RedisError: Redis is not reachable (nothing is retried), too old, evicting, or of another kind.
            CeylonError: the client was closed, or is open in another process or loop.
        """
        if self._owner is not None or self._was_closed:
            self.check_owner()
        self._owner = os.getpid(), asyncio.get_running_loop()
        await self.connection.check()

    async def disconnect(self) -> None:
        """Close all connections. Calls that still wait raise an error."""
        self._owner, self._was_closed = None, True
        await self._following.close()
        await self.hub.close()
        await self._confirming.close()
        await self._connection.close()

    def check_owner(self) -> None:
        if self._was_closed:
            raise CeylonError("this client was closed; make another: app.client()")
        if self._owner is None:
            raise CeylonError("this client is not open; use `async with app.client() as client`")
        if self._owner != (os.getpid(), asyncio.get_running_loop()):
            raise CeylonError("this client belongs to another process or event loop; make one here")

    async def call(self, calls: Sequence[Call]) -> list[Any]:
        """Send calls that are safe to repeat, for up to 5 s."""
        return await self.connection.run_until_answered(calls, give_up_after=self.answer_s)

    async def relay(self, gid: str, *, hidden: bool = False, ask_dependencies: bool = False) -> None:
        """
        Hand over at once the pages that follow from a change of a group. Redis has recorded the change, so this raises
        nothing: pages that cannot be handed over within 5 s are left to maintenance.

        Args:
            hidden: also take hidden pages: a lost reply may have brought them to this client.
            ask_dependencies: ask the groups on which this one depends first: they may have ended already.
        """

        async def hand_over() -> None:
            nonlocal hidden
            takes_hidden, hidden = hidden, True  # a repetition follows a lost reply
            if ask_dependencies:
                await maintenance.ask_dependencies(self.connection, self.keys, gid)
            await maintenance.relay(self.connection, self.keys, gid, hidden=takes_hidden)

        try:
            await until_answered(self.url, hand_over, self.answer_s)
        except CeylonError as error:
            log.warning("The next tasks of group %s are left to maintenance to hand over: %s", gid, error)

    async def send_part(
        self,
        gid: str,
        part: Call,
        roles: Collection[str] | None,
        *,
        before: Sequence[Call] = (),
        behind: Sequence[Call] = (),
        announce_after: bool = False,
        durability: Durability = "none",
        limit_s: float | None = None,
    ) -> tuple[list[Any], str]:
        """
        Send a part of a group, and announce the group. On one node the announcement runs first. In a cluster both go
        out at once: a group whose announcement was not answered is found by the hourly look.

        Args:
            roles: the roles to announce with the group. None: all its roles were announced before, and its entry in the
                index is confirmed.
            before: further calls to send ahead of the part.
            behind: calls that run only after the part.
            announce_after: announce the group once more after the part, since maintenance may take an older group of
                the same key out of the index between the two.
            limit_s: seconds until this gives up; default: 5. A confirmation adds the time that it may take.

        Returns:
            The replies of `before`, of the part and of `behind`, with errors among those of `before` and `behind`; and
            why the group as sent so far is not confirmed to be durable ('' if it is, or need not be).

        Raises:
            ConnectionLostError: no answer within the limit. The part may or may not be stored.
            CeylonError: Redis refused the part or the announcement, or a child process of `cpu=True` tasks is importing
                a script, which must not submit again.
        """
        refuse_while_loading("submit")
        announce = [] if roles is None else transitions.announce(self.keys, gid, roles, durability=durability)
        calls = [*announce, *before, confirming(part, durability), *(replace(call, follows=True) for call in behind)]
        own = slice(len(announce), len(calls))
        if announce_after:
            calls += transitions.announce(self.keys, gid, ())
        connection = self.connection if durability == "none" else self._confirming
        limit_s = self.answer_s if limit_s is None else limit_s
        limit_s += 0 if durability == "none" else CONFIRM_S
        answers = _pairs(await connection.run_until_answered(calls, give_up_after=limit_s, refusals=True))
        replies = [reply for reply, _ in answers]
        if isinstance(refused := replies[own][len(before)], CeylonError):
            raise refused
        refusals = [reply for reply in (*replies[: own.start], *replies[own.stop :]) if isinstance(reply, CeylonError)]
        for error in refusals:
            if not isinstance(error, QueueFullError):
                raise error
        if refusals:
            # At the memory limit, one call may be refused and the next accepted. An accepted group must be in the
            # index, or maintenance would not find it.
            insisting = transitions.announce(self.keys, gid, roles or (), durability=durability, insisting=True)
            answers += _pairs(await connection.run_until_answered(insisting, give_up_after=limit_s))
        return replies[own], next((why for _, why in answers if why), "")

    async def require_durable(self, durability: Durability, gid: str) -> None:
        """
        Raises:
            DurabilityError: the server of this group, or that of its entry in the index, cannot confirm.
        """
        if durability == "none":
            return
        wanted = (self.keys.group_part(gid, "meta"), self.keys.index_of(gid))
        keys = {self.connection.node_of(key): key for key in wanted}
        # While a server loads its data, it answers INFO as if it wrote no file. But it refuses EXISTS, so the calls are
        # sent again until it has loaded.
        calls = [call for key in keys.values() for call in (command("EXISTS", key), Call("", (key,), ("INFO",)))]
        for info in (await self.call(calls))[1::2]:
            if problem := unable(info, durability):
                raise DurabilityError(
                    f"durability: {durability!r} is not possible: Redis at {masked(self.url)} {problem}; "
                    "nothing was written"
                )

    def follow(self, gid: str) -> AbstractContextManager[Follower]:
        """Share the one reader of a group's events with all other waiters of this client."""
        self.check_owner()
        return self._following.follow(gid)

    # ---- who serves a role -------------------------------------------------------------------------------------------
    async def missing_roles(self, roles: Iterable[str]) -> list[str]:
        """Return a sentence for each of `roles` that no live worker serves, with the most similar served role."""
        return list((await self._missing(roles)).values())

    async def require_workers(self, roles: Iterable[str]) -> None:
        """
        Raises:
            NoWorkerError: no live worker serves one of these roles.
        """
        if missing := await self._missing(roles):
            start = " ".join(["ceylon-worker", *(f"--role {role}" for role in missing)])
            raise NoWorkerError(f"{'; '.join(missing.values())}; start one with: {start}")

    async def unknown_names(self, names: Iterable[tuple[str, str]]) -> list[str]:
        """
        Return a sentence for each (role, task name) that no live worker of the role knows; it names the most similar
        name that one knows. Roles that no worker serves are left out.
        """
        return list((await self._unknown(names)).values())

    async def _unknown(self, names: Iterable[tuple[str, str]]) -> dict[tuple[str, str], str]:
        live = [one for one in await queries.workers(self.connection, self.keys) if not one.stopping]
        told = {}
        for role, name in sorted(set(names)):
            known = {one for worker in live if role in worker.roles for one in worker.task_names}
            if name not in known and any(role in worker.roles for worker in live):
                near = guess(name, sorted(known), ask='; did you mean "{}"?')
                told[role, name] = f"no live worker of role {role!r} knows the task {name!r}{near}"
        return told

    async def _missing(self, roles: Iterable[str]) -> dict[str, str]:
        live = [one for one in await queries.workers(self.connection, self.keys) if not one.stopping]
        served = {role for one in live for role in one.roles}  # a monitor has none
        return {role: missing_words(role, served) for role in sorted(set(roles) - served)}

    async def _warn_of_missing(self, tasks: Collection[tuple[str, str]]) -> None:
        """Warn of roles that no worker serves, and of names that no worker of their role knows."""
        told = await self._unknown((role, name) for role, name in tasks if name)
        for role, words in (await self._missing(role for role, _ in tasks)).items():
            told[role, ""] = f"{words}; start one with: ceylon-worker MODULE:APP --role {role}"
        now = time.monotonic()
        for what, words in told.items():
            if now - self._warned_at.get(what, -WARN_AGAIN_S) >= WARN_AGAIN_S:
                self._warned_at[what] = now
                log.warning("Still waiting: %s", words)


def _pairs(replies: Sequence[Any]) -> list[tuple[Any, str]]:
    """Each reply with why it was not confirmed; '' also for calls that ask for no confirmation."""
    return [reply if isinstance(reply, tuple) else (reply, "") for reply in replies]


def missing_words(role: str, served: set[str]) -> str:
    """Say that no live worker serves a role, and name the most similar role that one serves."""
    serve = f"workers serve: {', '.join(sorted(served))}" if served else "no worker is running"
    return f"no worker serves role {role!r} ({serve})" + guess(role, sorted(served), ask='; did you mean "{}"?')
