"""What may go wrong between a caller and Redis, and the limits and times that a run of seconds needs."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine, Generator, Iterator, Sequence
from enum import StrEnum
from typing import Any
from unittest import mock

from redis.crc import key_slot

from rq_ceylon import presence, staging
from rq_ceylon.client import retrying, rolling
from rq_ceylon.errors import ConnectionLostError
from rq_ceylon.maintenance import steps
from rq_ceylon.maintenance.reissue import Reissue
from rq_ceylon.store import connection, scripts, transitions
from rq_ceylon.store.connection import Connection
from rq_ceylon.store.scripts import Call, command
from rq_ceylon.worker import lanes, loop, turn

Spawn = Callable[[Coroutine[Any, Any, None], str], Any]

LEASE_MS = 90

SCRIPTS = tuple(name for name in (*scripts.GROUP_SCRIPTS, *scripts.ROLE_SCRIPTS) if name != "list")
"""All but the one that people read by."""

RARE = {
    "submit": 8,
    "foresee": 8,
    "enqueue": 4,
    "claim": 2,
    "commit": 2,
    "judge": 3,
    "control": 0.7,
    "depend": 3,
    "reopen": 8,
    "add": 8,
    "release": 6,
    "renew": 3,
    "reissue": 4,
    "probe": 4,
}
"""Scripts that a run calls seldom: faults hit them so much more often."""

CRASH, LOSE = 0.004, 0.012

_TIMES: list[tuple[Any, str, float]] = [
    (transitions, "RELAY_LEASE_MS", 40),
    (transitions, "UNROUTABLE_MS", 400),
    (presence, "TTL_MS", LEASE_MS * 1.5),
    (turn, "UNCLAIMED_S", 0.05),
    (steps, "MOVING_MS", 40),
    (retrying, "MOVING_MS", 40),
    (steps, "STILL_MS", 300),
    (steps, "SILENT_MS", 400),
    (steps, "CONSUMER_IDLE_MS", 300),
    (steps, "RARE_EVERY_MS", 150),
    (steps, "HOURLY_EVERY_MS", 100),
]

_SIZES: list[tuple[Any, str, int]] = [
    (transitions, "SUBMIT_TASKS_MAX", 15),
    (transitions, "REOPEN_TASKS_MAX", 4),
    (transitions, "PROBE_ENTRIES", 30),
    (transitions, "SCAN_TASKS", 25),
    (staging, "SUBMIT_TASKS_MAX", 15),
    (rolling, "ROLLING_TASKS_MAX", 25),
]

_LIMITS = {
    "CHILDREN_MAX = 1000": "CHILDREN_MAX = 4",
    "PAGE_ITEMS = 100": "PAGE_ITEMS = 6",
    "PROMOTE_MAX = 50": "PROMOTE_MAX = 4",
    "RELEASE_MAX = 500": "RELEASE_MAX = 3",
    "REPLY_BYTES_MAX = 4194304": "REPLY_BYTES_MAX = 300",
    "LAZY_PATIENCE = 10000": "LAZY_PATIENCE = 100",
}


@contextlib.contextmanager
def short_times(scale: float, *, reissue: bool, spawn: Spawn) -> Iterator[None]:
    """
    The shipped code, with times and limits so small that a run of seconds meets them all.

    Args:
        scale: all times are so much longer, for a slow machine.
        reissue: off, nothing may be lost that it would have to put back.
        spawn: takes what shipped code wants done beside itself.
    """
    shipped, digest_of = scripts.source, scripts.digest.__wrapped__

    @functools.cache
    def source(script: str) -> str:
        text = shipped(script)
        for long, short in _LIMITS.items():
            text = text.replace(f"local {long}", f"local {short}")
        return text

    @functools.cache
    def digest(script: str) -> str:
        return digest_of(script)

    with contextlib.ExitStack() as stack:
        for module, name, time in _TIMES:
            value = time * scale
            stack.enter_context(mock.patch.object(module, name, value if name.endswith("_S") else round(value)))
        for module, name, size in _SIZES:
            stack.enter_context(mock.patch.object(module, name, size))
        stack.enter_context(mock.patch.object(scripts, "source", source))
        stack.enter_context(mock.patch.object(scripts, "digest", digest))
        for user in (connection, lanes, loop, retrying, rolling):
            stack.enter_context(mock.patch.object(user, "asyncio", _Asyncio(spawn)))
        for user in (lanes, loop):
            stack.enter_context(mock.patch.object(user, "own_task", _own_task(spawn)))
        if not reissue:
            stack.enter_context(mock.patch.object(Reissue, "put_back", _nothing_lost))
        yield


async def _nothing_lost(_: Reissue, gid: str) -> int:
    return 0


def _own_task(spawn: Spawn) -> Callable[..., Any]:
    def own_task(body: Coroutine[Any, Any, None], *, name: str) -> Any:
        return spawn(body, name)

    return own_task


class _Asyncio:
    """The part of asyncio that workers and clients need, without an event loop. No timer ever ends."""

    def __init__(self, spawn: Spawn) -> None:
        self._spawn = spawn

    def __getattr__(self, name: str) -> Any:
        import asyncio

        return getattr(asyncio, name)

    def create_task(self, coroutine: Coroutine[Any, Any, None], *, name: str) -> Any:
        return self._spawn(coroutine, name)

    @staticmethod
    async def gather(*tasks: Any, return_exceptions: bool) -> None:
        while not all(task.done() for task in tasks):
            await gate()

    @staticmethod
    @contextlib.asynccontextmanager
    async def timeout(_: float | None) -> AsyncIterator[None]:
        yield

    @staticmethod
    async def sleep(_: float) -> None:
        await gate()

    @staticmethod
    async def wait_for(awaitable: Awaitable[Any], _: float) -> Any:
        return await awaitable

    @staticmethod
    def get_running_loop() -> Any:
        return mock.Mock()


class Fault(StrEnum):
    NONE = "-"
    BEFORE = "crash before"
    AFTER = "crash after"
    LOST = "lost reply"


class Crashed(BaseException):
    """The process of this actor has ended here."""


class _Gate:
    def __await__(self) -> Generator[None, None, None]:
        yield


async def gate() -> None:
    """Let any other actor go on."""
    await _Gate()


Send = Callable[[Call, str], Any]
Strike = Callable[[str], Fault]
Stray = Callable[[Sequence[Call], str], None]


class Line(Connection):
    """
    The connection of one actor, driven by hand: before each script call all others may go on, and a fault may strike.
    The slots lie on so many nodes, even where one server plays them all.
    """

    def __init__(self, owner: str, nodes: int, send: Send, strike: Strike, stray: Stray) -> None:
        self.url, self.owner, self._nodes = "", owner, nodes
        self._deliver, self._strike, self._stray = send, strike, stray
        self.is_dead = False

    def node_of(self, key: str) -> str:
        return f"node {key_slot(key.encode()) * self._nodes // 16384}"

    async def run_each(self, calls: Sequence[Call]) -> list[Any]:
        replies: list[Any] = []
        for position, call in enumerate(calls):
            if call.script in SCRIPTS:
                await gate()
            try:
                replies.append(self.one(call, calls[position + 1 :]))
            except ConnectionLostError as error:
                return [*replies, *[error] * (len(calls) - position)]
        return replies

    async def keys(self, pattern: str, count: int) -> AsyncIterator[list[str]]:
        yield self.one(command("KEYS", pattern))

    def one(self, call: Call, following: Sequence[Call] = ()) -> Any:
        """
        One call, and what strikes it. If its reply is lost, so are those of the calls that were sent with it; any of
        them may have reached Redis, or reach it when it has been repeated by now, or never.
        """
        if self.is_dead:
            raise Crashed
        fault = self._strike(call.script) if call.script in SCRIPTS else Fault.NONE
        if fault is Fault.BEFORE:
            raise Crashed
        if fault is Fault.LOST:
            for calls in _in_order([call, *following]):
                self._stray(calls, self.owner)
            raise ConnectionLostError("lost on the way, or on the way back")
        reply = self._deliver(call, self.owner)
        if fault is Fault.AFTER:
            raise Crashed
        return reply


def _in_order(calls: Sequence[Call]) -> list[list[Call]]:
    """Each call with those that never overtake it, since they are behind it on one connection."""
    together: list[list[Call]] = []
    for call in calls:
        if call.follows and together:
            together[-1].append(call)
        else:
            together.append([call])
    return together


class ThreadLine:
    """The same for the lease thread."""

    def __init__(self, line: Line) -> None:
        self._line = line

    def run_each(self, calls: Sequence[Call]) -> list[Any]:
        replies: list[Any] = []
        for position, call in enumerate(calls):
            try:
                replies.append(self._line.one(call, calls[position + 1 :]))
            except ConnectionLostError as error:
                return [*replies, *[error] * (len(calls) - position)]
        return replies
