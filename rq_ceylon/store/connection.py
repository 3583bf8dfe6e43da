"""
Sends calls to Redis, one pipeline at a time, and turns what goes wrong into our errors.

redis-py repeats commands on its own by default, up to ten times; here it never does: who sends a call knows whether it
may be repeated (`run_until_answered`), and a blocking read must not be.
"""

from __future__ import annotations

import asyncio
import random
import time
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from typing import Any

import redis
import redis.asyncio
from redis.asyncio.retry import Retry as AsyncRetry
from redis.backoff import NoBackoff
from redis.retry import Retry

from rq_ceylon.errors import CeylonError, ConnectionLostError, QueueFullError, RedisError
from rq_ceylon.settings import masked
from rq_ceylon.store import scripts
from rq_ceylon.store.scripts import Call

ANSWER_S = 10.0
"""How long an answer may take. Scripts take milliseconds; a server that loads its data set says so at once."""

FLOOR = {"redis": (6, 2), "valkey": (7, 2)}

_OPTIONS: dict[str, Any] = {
    "decode_responses": True,
    "protocol": 2,
    "socket_timeout": ANSWER_S,
    "socket_connect_timeout": 2.0,
    "retry_on_error": [],
    "health_check_interval": 0,
}
LOST = (redis.ConnectionError, redis.TimeoutError, OSError)
"""What a broken connection raises."""

# Errors that a restarting, failing-over or busy server gives for a while: nothing was executed, try again.
_PASSING = (
    "LOADING",
    "READONLY",
    "MASTERDOWN",
    "UNBLOCKED",
    "CLUSTERDOWN",
    "TRYAGAIN",
    "BUSY ",
    "NOREPLICAS",
    "MISCONF",
)


class Connection:
    """
    One connection to Redis. Not for use by two tasks at once: a second `run` waits for the first.
    """

    def __init__(self, url: str) -> None:
        self.url = url
        self._client = redis.asyncio.Redis.from_url(
            url, retry=AsyncRetry(NoBackoff(), 0), single_connection_client=True, **_OPTIONS
        )
        self._one_at_a_time = asyncio.Lock()

    async def run(self, calls: Sequence[Call], *, refusals: bool = False) -> list[Any]:
        """
        Send calls in one pipeline and return their replies, in order.

        Args:
            refusals: put the error of a refused call in the place of its reply, instead of raising it.

        Raises:
            ConnectionLostError: not all were answered; each may or may not have happened.
            QueueFullError: a call was refused at `maxmemory`.
            RedisError: Redis refused a call for another reason.
        """
        async with self._one_at_a_time:
            try:
                replies = await self._send(calls)
                unknown = [i for i, reply in enumerate(replies) if isinstance(reply, redis.exceptions.NoScriptError)]
                if unknown:
                    for script in sorted({calls[i].script for i in unknown}):
                        await self._client.script_load(scripts.source(script))
                    for i, reply in zip(unknown, await self._send([calls[i] for i in unknown]), strict=True):
                        replies[i] = reply
            except LOST as error:
                heed_cancellation()
                raise classified(error, self.url) from error
        heed_cancellation()
        for i, reply in enumerate(replies):
            if isinstance(reply, redis.RedisError):
                refusal = classified(reply, self.url)
                if not refusals or isinstance(refusal, ConnectionLostError):
                    raise refusal from reply
                replies[i] = refusal
        return replies

    async def _send(self, calls: Sequence[Call]) -> list[Any]:
        pipeline = self._client.pipeline(transaction=False)
        for call in calls:
            pipeline.execute_command(*scripts.words(call))
        replies: list[Any] = await pipeline.execute(raise_on_error=False)
        return replies

    async def run_until_answered(
        self,
        calls: Sequence[Call],
        *,
        give_up_after: float | None,
        on_lost: Callable[[CeylonError], None] | None = None,
    ) -> list[Any]:
        """
        Like `run`, but send calls that are safe to repeat again, with a growing, jittered pause, until answered.

        Args:
            give_up_after: seconds after which the last error is raised; None never gives up.
            on_lost: told of the first failure.
        """
        started, pause = time.monotonic(), 0.02
        while True:
            try:
                return await self.run(calls)
            except ConnectionLostError as error:
                if give_up_after is not None and time.monotonic() - started + pause > give_up_after:
                    raise
                if on_lost is not None:
                    on_lost(error)
                    on_lost = None
            await asyncio.sleep(pause * random.uniform(0.5, 1.0))
            pause = min(pause * 2, 1.0)

    async def pop(self, keys: Sequence[str], timeout_s: float) -> bool:
        """
        Wait for a token in any of these lists; False when none came in time.
        """
        async with self._one_at_a_time:
            try:
                rang = await self._client.blpop(list(keys), timeout=timeout_s) is not None
            except LOST as error:
                heed_cancellation()
                raise classified(error, self.url) from error
            except redis.RedisError as error:
                raise classified(error, self.url) from error
        heed_cancellation()
        return rang

    async def check(self) -> None:
        """
        Refuse a server that cannot do this work.

        Raises:
            RedisError: too old, evicting, or a cluster node; it names the remedy.
        """
        async with self._one_at_a_time:
            try:
                info = await self._client.info()
            except LOST as error:
                heed_cancellation()
                raise classified(error, self.url) from error
            except redis.RedisError as error:
                raise classified(error, self.url) from error
        heed_cancellation()
        refuse_unfit(info, self.url)

    async def close(self) -> None:
        await self._client.aclose()


class ThreadConnection:
    """
    The same for a thread: the lease thread must not depend on the event loop that it watches over.
    """

    def __init__(self, url: str) -> None:
        self.url = url
        self._client = redis.Redis.from_url(url, retry=Retry(NoBackoff(), 0), single_connection_client=True, **_OPTIONS)

    def run(self, calls: Sequence[Call]) -> list[Any]:
        """
        As `Connection.run`.
        """
        execute: Callable[..., Any] = self._client.execute_command
        replies = []
        try:
            for call in calls:
                try:
                    replies.append(execute(*scripts.words(call)))
                except redis.exceptions.NoScriptError:
                    self._client.script_load(scripts.source(call.script))
                    replies.append(execute(*scripts.words(call)))
        except (*LOST, redis.RedisError) as error:
            raise classified(error, self.url) from error
        return replies

    def close(self) -> None:
        self._client.close()


@asynccontextmanager
async def subscribed(url: str) -> AsyncIterator[redis.asyncio.client.PubSub]:
    """
    A pub/sub connection; its losses are the subscriber's to handle, since a notification is never the record.
    """
    client = redis.asyncio.Redis.from_url(url, retry=AsyncRetry(NoBackoff(), 0), **{**_OPTIONS, "socket_timeout": None})
    try:
        async with client.pubsub() as pubsub:
            yield pubsub
    finally:
        await client.aclose()


def heed_cancellation() -> None:
    """
    Raise the cancellation of the present task, should redis-py have swallowed it, as it does while it connects.
    """
    task = asyncio.current_task()
    if task is not None and task.cancelling():
        raise asyncio.CancelledError


def classified(error: BaseException, url: str) -> CeylonError:
    """
    What an error of redis-py or the operating system means to us, in words for the user. By text, not by class: errors
    from scripts arrive as plain response errors on Redis 6.2.
    """
    text = str(error)
    where = masked(url)
    if "OOM" in text or "maxmemory" in text:
        return QueueFullError(
            f"Redis at {where} is at its memory limit and takes no new tasks; wait until workers have drained it, "
            "or raise maxmemory"
        )
    if isinstance(error, redis.exceptions.AuthenticationError) or any(
        word in text for word in ("WRONGPASS", "NOAUTH", "Authentication required", "invalid username-password")
    ):
        return RedisError(f"Redis at {where} refuses the user or password; check the URL (redis://user:password@host)")
    if "NOPERM" in text:
        return RedisError(
            f"Redis at {where} does not allow what is needed ({text}); see docs/deployment.md for the ACL"
        )
    if "LAYOUT" in text:
        return RedisError(f"Redis at {where} holds data of another version of rq-ceylon ({text}); upgrade this one")
    if isinstance(error, LOST) or any(word in text for word in _PASSING):
        return ConnectionLostError(f"Cannot reach Redis at {where} ({_plain(error)})")
    return RedisError(f"Redis at {where} answered: {text}")


def _plain(error: BaseException) -> str:
    text = str(error)
    for words, plain in (
        ("refused", "connection refused"),
        ("No such file", "no such socket"),
        ("Timeout", "no answer in time"),
        ("not known", "unknown host"),
        ("Name or service", "unknown host"),
        ("closed by server", "connection closed"),
    ):
        if words in text:
            return plain
    return text or type(error).__name__


def refuse_unfit(info: dict[str, Any], url: str) -> None:
    """
    Raise RedisError if a server with this INFO cannot do this work.
    """
    where = masked(url)
    engine = "valkey" if "valkey_version" in info else "redis"
    version = str(info.get("valkey_version") or info.get("redis_version") or "0.0")
    if tuple(int(part) for part in version.split(".")[:2]) < FLOOR[engine]:
        floor = ".".join(map(str, FLOOR[engine]))
        raise RedisError(f"Redis at {where} is {engine} {version}; at least {engine} {floor} is needed: upgrade it")
    if info.get("redis_mode") == "cluster":
        raise RedisError(f"Redis at {where} is a cluster node; this version works with a standalone server")
    policy = info.get("maxmemory_policy", "noeviction")
    if policy != "noeviction":
        raise RedisError(
            f"Redis at {where} evicts keys when memory is short (maxmemory-policy {policy}), which would lose tasks; "
            "set it with: redis-cli CONFIG SET maxmemory-policy noeviction"
        )
