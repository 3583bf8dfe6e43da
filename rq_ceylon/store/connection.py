"""Sends calls to Redis, one pipeline per node at a time, and turns failures into our errors."""

from __future__ import annotations

import asyncio
import random
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Sequence
from contextlib import asynccontextmanager, contextmanager
from typing import Any, Self, TypeVar

import redis
import redis.asyncio
from loguru import logger

from rq_ceylon.dev.server import is_throw_away
from rq_ceylon.errors import CeylonError, ConnectionLostError, RedisError
from rq_ceylon.process import own_task
from rq_ceylon.settings import REMEDIES, masked, place_of
from rq_ceylon.store.node import client_of, close, heeding_cancellation
from rq_ceylon.store.redis_errors import DISCONNECTED, classified, unfit, warn_once
from rq_ceylon.store.scripts import Call
from rq_ceylon.store.servers import servers_of, some_url

T = TypeVar("T")

LOADING_S = 0.5
"""Pause between two checks of a server that is still loading its data."""

PAUSE_S, PAUSE_MAX_S = 0.1, 5.0
"""Pauses of a process that waits for Redis at its start: the first one, which doubles each time, and the longest."""


async def until_answered(url: str, send: Callable[[], Awaitable[T]], give_up_after: float | None) -> T:
    """
    Repeat `send`, which must be safe to repeat, with a growing, jittered pause until Redis has answered.

    Args:
        give_up_after: seconds until ConnectionLostError is raised. They include every wait: for an answer, for a new
            connection, and for earlier calls on the same connection. None never gives up.
    """
    pause, lost = 0.02, None
    try:
        async with asyncio.timeout(give_up_after):
            while True:
                try:
                    return await send()
                except ConnectionLostError as error:
                    lost = error
                await asyncio.sleep(pause * random.uniform(0.5, 1.0))
                pause = min(pause * 2, 1.0)
    except TimeoutError as error:
        raise lost or classified(error, url) from error


async def until_reached(begin: Callable[[], Awaitable[T]], stopped: asyncio.Event) -> T | None:
    """
    Start the work of a process that survives an outage of Redis. While no server is reachable, wait for one and log
    that once.

    Args:
        begin: starts the work; must be safe to repeat.
        stopped: ends the waiting; then None is returned.

    Raises:
        RedisError: Redis refuses, which waiting would not change.
    """

    async def reach() -> T:
        pause, is_waiting = PAUSE_S, False
        while True:
            try:
                found = await begin()
            except ConnectionLostError as error:
                if not is_waiting:
                    logger.warning("Waiting until Redis answers. {}", " ".join(str(error).split("\n")))
                is_waiting = True
                await asyncio.sleep(pause * random.uniform(0.5, 1.0))
                pause = min(2 * pause, PAUSE_MAX_S)
            else:
                if is_waiting:
                    logger.info("Redis answers now")
                return found

    reaching, stop = own_task(reach()), own_task(stopped.wait())
    try:
        await asyncio.wait([reaching, stop], return_when=asyncio.FIRST_COMPLETED)
        return None if stopped.is_set() else reaching.result()
    finally:
        for task in (reaching, stop):
            task.cancel()
        await asyncio.gather(reaching, stop, return_exceptions=True)


class Connection:
    """One connection to Redis, or one to each cluster node. A call blocks until its node answered the previous one."""

    def __init__(self, url: str, *, answer_s: float | None = None) -> None:
        """
        Args:
            answer_s: how long one answer, or one step of connecting, may take; None: 10 s.
        """
        self.url = url
        self._servers = servers_of(url, answer_s)

    def node_of(self, key: str) -> str:
        """
        The name of the node that receives calls on this key, as far as known. A single server has one name for all
        keys.
        """
        return self._servers.node_of(key)

    async def run(self, calls: Sequence[Call], *, refusals: bool = False) -> list[Any]:
        """
        Send calls in one pipeline per node, and return their replies in order.

        Args:
            refusals: return the error of a refused call in place of its reply, instead of raising it.

        Raises:
            ConnectionLostError: some calls got no answer; each of them may or may not have happened.
            QueueFullError: a call was refused at `maxmemory`.
            RedisError: Redis refused a call for another reason.
        """
        replies = await self.run_each(calls)
        for reply in replies:
            if isinstance(reply, ConnectionLostError) or (isinstance(reply, CeylonError) and not refusals):
                raise reply
        return replies

    async def run_each(self, calls: Sequence[Call]) -> list[Any]:
        """
        Like `run`, but return errors in place of replies instead of raising them. ConnectionLostError means that the
        call may or may not have happened. In a cluster, a broken node costs only the replies of its own calls.
        """
        try:
            with heeding_cancellation():
                replies = await self._servers.send(calls)
        except DISCONNECTED as error:
            replies = [error] * len(calls)
        for i, reply in enumerate(replies):
            if isinstance(reply, Exception):
                replies[i] = classified(reply, self.url, _about(calls[i]))
                replies[i].__cause__ = reply
        return replies

    async def run_until_answered(
        self,
        calls: Sequence[Call],
        *,
        give_up_after: float | None,
        refusals: bool = False,
    ) -> list[Any]:
        """
        Like `run`, but repeat the calls, which must be safe to repeat, until they are answered.

        Args:
            give_up_after: as in `until_answered`.
            refusals: as in `run`.
        """
        return await until_answered(self.url, lambda: self.run(calls, refusals=refusals), give_up_after)

    async def pop(self, keys: Sequence[str], timeout_s: float) -> bool:
        """Wait for a token in any of these lists; False if none came in time."""
        with _classifying(self.url, f"BLPOP {keys[0]}"):
            return await self._servers.pop(keys, timeout_s)

    async def keys(self, pattern: str, count: int) -> AsyncIterator[list[str]]:
        """Yield the keys that match `pattern` on every node, some perhaps twice; each step scans about `count` keys."""
        with _classifying(self.url, "SCAN"):
            for node in await self._servers.nodes():
                cursor = None
                while cursor != 0:
                    cursor, found = await node.command("SCAN", cursor or 0, "MATCH", pattern, "COUNT", count)
                    yield found

    async def check(self) -> None:
        """
        Refuse a server that cannot run the queue. If it is still loading its data, log that and wait.

        Raises:
            RedisError: the server is not reachable, too old, evicting, or of another kind than the URL says; the
                message names the remedy.
        """
        place, where = place_of(self.url), masked(self.url)
        try:
            with _classifying(self.url, "INFO"):
                infos = await self._infos()
                if any(info.get("loading") for info in infos):
                    logger.info("Redis at {} is loading its data; waiting for it", where)
                while any(info.get("loading") for info in infos):
                    await asyncio.sleep(LOADING_S)
                    infos = await self._infos()
        except ConnectionLostError as error:
            raise ConnectionLostError(f"{error}.\n{REMEDIES}") from error
        for info in infos:
            if problem := unfit(info, place):
                raise RedisError(f"Redis at {where} {problem}")
            if not info.get("aof_enabled") and place.kind != "embedded" and not is_throw_away(self.url):
                warn_once(
                    f"Redis at {where} writes no append-only file, so a restart loses some or all tasks; "
                    "turn it on with: redis-cli CONFIG SET appendonly yes (and in its configuration file)"
                )

    async def _infos(self) -> list[dict[str, Any]]:
        return [await node.command("INFO") for node in await self._servers.nodes()]

    async def close(self) -> None:
        await self._servers.close()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.close()


class ThreadConnection:
    """
    A connection for a thread, which runs on an event loop of its own: the lease thread must not depend on the loop that
    it watches over. Only one thread may use and close it.
    """

    def __init__(self, url: str, within_s: float) -> None:
        """
        Args:
            within_s: how long one `run_each` may take, including connecting.
        """
        self._url, self.within_s = url, within_s
        self._runner = asyncio.Runner()
        # One answer may take at most half of the time, so that time is left to hear the other nodes of a cluster.
        self._connection = Connection(url, answer_s=within_s / 2)

    def run_each(self, calls: Sequence[Call]) -> list[Any]:
        """
        Like `Connection.run_each`, but it returns in time. Calls without an answer then count as lost, and the next
        call opens a new connection.
        """
        return self._runner.run(self._run_each(calls))

    async def _run_each(self, calls: Sequence[Call]) -> list[Any]:
        try:
            async with asyncio.timeout(self.within_s):
                return await self._connection.run_each(calls)
        except TimeoutError as error:
            return [classified(error, self._url)] * len(calls)

    def close(self) -> None:
        self._runner.run(self._connection.close())
        self._runner.close()


LISTEN_S = 10.0
"""How long a subscription may be silent before it is sent a ping, and how long the answer to that may take."""

UNHEARD = "Notifications do not arrive, so changes are noticed late"


class _PubSub(redis.asyncio.client.PubSub):
    """
    A pub/sub connection that never reconnects by itself: its user opens a new one. redis-py reconnects before it
    reports a loss, once in each task that meets the loss, and then forgets all but one of those connections.
    """

    async def _reconnect(self, conn: Any, *_: Any, **__: Any) -> None:
        await conn.disconnect()


@asynccontextmanager
async def subscribed(url: str) -> AsyncIterator[redis.asyncio.client.PubSub]:
    """
    A pub/sub connection. The subscriber must handle its loss, because a notification is never the record.

    Raises:
        ConnectionLostError: the connection is lost, or was never made.
        RedisError: refused, for example by an ACL; the subscriber continues without notifications, and logs UNHEARD.
    """
    client = None
    try:
        with _classifying(url, "SUBSCRIBE"):
            client = client_of(await some_url(place_of(url)), socket_timeout=None)
            async with _PubSub(client.connection_pool) as pubsub:
                yield pubsub
    finally:
        if client is not None:
            await close(client)


async def heard(pubsub: redis.asyncio.client.PubSub) -> AsyncIterator[dict[str, Any]]:
    """
    The messages of a subscription. A connection can go silent without being closed, so a silent one is sent a ping.

    Raises:
        redis.TimeoutError: the connection did not answer the ping.
    """
    is_asked = False
    while True:
        message = await pubsub.get_message(timeout=LISTEN_S)
        if message is not None:
            is_asked = False
            yield message
        elif is_asked:
            raise redis.TimeoutError("no answer in time")
        else:
            await pubsub.ping()
            is_asked = True


@contextmanager
def _classifying(url: str, about: str) -> Iterator[None]:
    try:
        with heeding_cancellation():
            yield
    except redis.DataError:
        raise
    except (*DISCONNECTED, redis.RedisError) as error:
        raise classified(error, url, about) from error


def _about(call: Call) -> str:
    return f"{call.script or call.args[0]} on {call.keys[0]}"
