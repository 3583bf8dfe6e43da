"""
One connection to one server.

Each call gets its own reply or error, so a refused or lost call does not affect the others. By default redis-py repeats
commands on its own, up to ten times. Here it never does: only the sender knows whether a call may be repeated, and a
blocking read may not.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Awaitable, Callable, Iterator, Sequence
from functools import cache
from typing import Any

import hiredis
import redis
import redis.asyncio
from redis.asyncio.retry import Retry
from redis.backoff import NoBackoff

from rq_ceylon.settings import for_redis_py
from rq_ceylon.store import durability, scripts
from rq_ceylon.store.redis_errors import DISCONNECTED, carrying
from rq_ceylon.store.scripts import Call

ANSWER_S = 10.0
"""How long an answer may take. Scripts take milliseconds, and a server that is loading its data says so at once."""

CONNECT_S = 2.0


def heed_cancellation(before: int = 0) -> None:
    """
    Raise the cancellation of the current task if redis-py has swallowed it, as it does while it connects.

    Args:
        before: how many cancellations were requested earlier. A task that cleans up after one must still be able to use
            Redis.
    """
    if _cancellations() > before:
        raise asyncio.CancelledError


@contextlib.contextmanager
def heeding_cancellation() -> Iterator[None]:
    """Raise a cancellation that arrived inside the block after it is done. Other errors are those of `carrying`."""
    before = _cancellations()
    try:
        with carrying():
            yield
    except Exception:
        heed_cancellation(before)
        raise
    heed_cancellation(before)


def _cancellations() -> int:
    task = asyncio.current_task()
    return task.cancelling() if task is not None else 0


def client_of(url: str, answer_s: float | None = None, **options: Any) -> redis.asyncio.Redis:
    """
    redis-py's client for one server. It repeats nothing, and sends nothing that we did not ask for.

    Args:
        answer_s: how long one answer may take; None: ANSWER_S.
    """
    answer_s = ANSWER_S if answer_s is None else answer_s
    defaults: dict[str, Any] = {
        "decode_responses": True,
        # A record that is not UTF-8 must not spoil the replies beside it; the code that reads it refuses it.
        "encoding_errors": "replace",
        "protocol": 2,
        "socket_timeout": answer_s,
        "socket_connect_timeout": min(CONNECT_S, answer_s),
        "retry": Retry(NoBackoff(), 0),
        "retry_on_error": [],
        "health_check_interval": 0,
    }
    return redis.asyncio.Redis.from_url(for_redis_py(url), **{**defaults, **options})


async def close(client: redis.asyncio.Redis) -> None:
    """Close a client. Errors are ignored, because a connection that breaks while it is being closed is closed too."""
    with contextlib.suppress(*DISCONNECTED, redis.RedisError), heeding_cancellation():
        await client.aclose()


@cache
def _packing(kind: Any) -> Any:
    """
    A connection class that packs commands in C. redis-py's asyncio client packs them in Python, which takes a tenth of
    the time of a worker with small tasks.
    """

    class Packing(kind):  # type: ignore[misc]
        def pack_command(self, name: str, *words: Any) -> list[bytes]:
            try:
                return [hiredis.pack_command((*name.split(), *words))]
            except Exception as error:  # a bug of ours, which a new connection would not fix
                raise redis.DataError(f"{name} cannot be packed: {error}") from error

    return Packing


class Node:
    """One connection to one server. It sends one call or pipeline at a time."""

    def __init__(self, url: str, answer_s: float | None = None) -> None:
        self.url = url
        self._client = client_of(url, answer_s, single_connection_client=True)
        pool = self._client.connection_pool
        pool.connection_class = _packing(pool.connection_class)  # type: ignore[arg-type]
        self._one_at_a_time = asyncio.Lock()
        self._silences = 0
        self._is_closed = False

    async def send(self, calls: Sequence[Call], *, asking: bool = False) -> list[Any]:
        """
        Send calls and return the reply or error of each, in order. If the server does not know a script, load it and
        call again.

        Args:
            asking: the slot of these calls is moving to this node.
        """
        try:
            replies: list[Any] = await self._alone(lambda: self._send_known(calls, asking))
        except redis.DataError:
            raise
        except (*DISCONNECTED, redis.RedisError) as error:
            return [error] * len(calls)
        return replies

    async def _send_known(self, calls: Sequence[Call], asking: bool) -> list[Any]:
        replies = await self._send(calls, asking)
        unknown = [i for i, reply in enumerate(replies) if isinstance(reply, redis.exceptions.NoScriptError)]
        if unknown:
            # A call that follows an unknown script has run too early, so it is sent again after it.
            for script in sorted({calls[i].script for i in unknown}):
                await self._client.script_load(scripts.source(script))
            again = [i for i, call in enumerate(calls) if i in unknown or (call.follows and i > unknown[0])]
            for i, reply in zip(again, await self._send([calls[i] for i in again], asking), strict=True):
                replies[i] = reply
        return replies

    async def _send(self, calls: Sequence[Call], asking: bool) -> list[Any]:
        pipeline = self._client.pipeline(transaction=False)
        for call in calls:
            if asking:
                pipeline.execute_command("ASKING")
            pipeline.execute_command(*scripts.words(call))
        # On the connection that wrote, because WAIT and WAITAOF wait for the last write of their own connection.
        confirm = next((call.confirm for call in calls if call.confirm), ())
        if confirm:
            pipeline.execute_command(*confirm)
        replies: list[Any] = await pipeline.execute(raise_on_error=False)
        answer = replies.pop() if confirm else None
        if asking:
            replies = replies[1::2]
        return [
            durability.confirmed(reply, answer) if call.confirm else reply
            for call, reply in zip(calls, replies, strict=True)
        ]

    async def command(self, *words: Any) -> Any:
        """
        Send one plain command.

        Raises:
            redis.RedisError: as redis-py raises it.
        """
        execute: Any = self._client.execute_command
        return await self._alone(lambda: execute(*words))

    async def _alone(self, work: Callable[[], Awaitable[Any]]) -> Any:
        silences = self._silences
        with heeding_cancellation():
            async with self._one_at_a_time:
                # Calls that waited behind one without an answer in time are lost with it: otherwise their waits would
                # add up.
                if self._silences != silences:
                    raise redis.TimeoutError("no answer in time to the call ahead")
                try:
                    return await work()
                except (redis.TimeoutError, TimeoutError):
                    self._silences += 1
                    raise
                finally:
                    # After `close`, redis-py connects again for a call that waited behind the broken one. Nothing else
                    # knows of that connection, so close it here.
                    if self._is_closed:
                        await close(self._client)

    async def close(self) -> None:
        self._is_closed = True
        await close(self._client)
