"""
The servers behind a URL: one, the primary that Sentinels know now, or the nodes of a cluster.

Each kind takes calls and answers each with its reply or its error, so that what one server refuses or loses does not
take the answers of others with it. redis-py repeats commands on its own by default, up to ten times; here it never
does: who sends a call knows whether it may be repeated, and a blocking read must not be.
"""

from __future__ import annotations

import asyncio
import contextlib
import random
import time
from collections.abc import Awaitable, Callable, Iterator, Sequence
from functools import cache
from typing import Any

import hiredis
import redis
import redis.asyncio
from redis.asyncio.retry import Retry
from redis.asyncio.sentinel import MasterNotFoundError, Sentinel
from redis.backoff import NoBackoff
from redis.crc import key_slot

from rq_ceylon.errors import ConnectionLostError, RedisError
from rq_ceylon.process import own_task
from rq_ceylon.settings import Address, Place, for_redis_py, masked, place_of, shown_address
from rq_ceylon.store import durability, scripts, server
from rq_ceylon.store.scripts import Call
from rq_ceylon.store.trouble import LOST, carrying, is_demotion, text_of

ANSWER_S = 10.0
"""How long an answer may take. Scripts take milliseconds; a server that loads its data set says so at once."""

CONNECT_S = 2.0
REDIRECTS = 5
"""How often a call follows a slot that moves, before its sender is told to try again."""


def heed_cancellation(before: int = 0) -> None:
    """
    Raise the cancellation of the present task, should redis-py have swallowed it, as it does while it connects.

    Args:
        before: how many it had been asked for earlier. A task that cleans up after one goes on to use Redis.
    """
    if _cancellations() > before:
        raise asyncio.CancelledError


@contextlib.contextmanager
def heeding_cancellation() -> Iterator[None]:
    """Raise a cancellation that arrived inside once the block is done; other errors are those of `carrying`."""
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
    redis-py's client of one server, with nothing repeated and nothing sent that was not asked for.

    Args:
        answer_s: how long one answer may take; None: ANSWER_S.
    """
    answer_s = ANSWER_S if answer_s is None else answer_s
    defaults: dict[str, Any] = {
        "decode_responses": True,
        # A record that is not UTF-8 must not take the replies beside it with it; it is refused where it is read.
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
    """Close a client. A connection that breaks while it is closed is as gone as any other."""
    with contextlib.suppress(*LOST, redis.RedisError), heeding_cancellation():
        await client.aclose()


@cache
def _packing(kind: Any) -> Any:
    """
    A kind of connection whose commands are packed in C: asyncio's redis-py does it in Python, a tenth of what a worker
    with small tasks does at all.
    """

    class Packing(kind):  # type: ignore[misc]
        def pack_command(self, name: str, *words: Any) -> list[bytes]:
            try:
                return [hiredis.pack_command((*name.split(), *words))]
            except Exception as error:  # a mistake of ours, which no new connection would mend
                raise redis.DataError(f"{name} cannot be packed: {error}") from error

    return Packing


class Node:
    """One connection to one server; one call or pipeline at a time."""

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
        Reply or error of each call, in order. A script that the server does not know is loaded, and called again.

        Args:
            asking: the slot of these calls is on its way to this node.
        """
        try:
            replies: list[Any] = await self._alone(lambda: self._send_known(calls, asking))
        except redis.DataError:
            raise
        except (*LOST, redis.RedisError) as error:
            return [error] * len(calls)
        return replies

    async def _send_known(self, calls: Sequence[Call], asking: bool) -> list[Any]:
        replies = await self._send(calls, asking)
        unknown = [i for i, reply in enumerate(replies) if isinstance(reply, redis.exceptions.NoScriptError)]
        if unknown:
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
        # On the connection that wrote, for it tells of its own writes only.
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
        One plain command.

        Raises:
            redis.RedisError: as redis-py raises it.
        """
        execute: Any = self._client.execute_command
        return await self._alone(lambda: execute(*words))

    async def _alone(self, work: Callable[[], Awaitable[Any]]) -> Any:
        silences = self._silences
        with heeding_cancellation():
            async with self._one_at_a_time:
                # What waited behind a call that got no answer in time is lost with it: else the waits would add up.
                if self._silences != silences:
                    raise redis.TimeoutError("no answer in time to the call ahead")
                try:
                    return await work()
                except (redis.TimeoutError, TimeoutError):
                    self._silences += 1
                    raise
                finally:
                    # redis-py connected again for who had waited behind the one that broke; nobody else knows of it.
                    if self._is_closed:
                        await close(self._client)

    async def close(self) -> None:
        self._is_closed = True
        await close(self._client)


def servers_of(url: str, answer_s: float | None = None) -> Primary | Cluster:
    place = place_of(url)
    return (Cluster if place.kind == "cluster" else Primary)(place, answer_s)


async def some_url(place: Place, answer_s: float | None = None) -> str:
    """
    Where one server is that can be asked right now: the server, the primary, or a node of the cluster.

    Args:
        answer_s: as `client_of`, of each Sentinel.

    Raises:
        ConnectionLostError: the Sentinels know no primary that lives.
        RedisError: they know none of this name.
    """
    match place.kind:
        case "embedded":
            return server.shared().url
        case "sentinel":
            return place.server_url(await _primary_address(place, answer_s))
        case "cluster":
            return place.server_url(random.choice(place.addresses))
        case "server":
            return place.url


async def _primary_address(place: Place, answer_s: float | None) -> Address:
    sentinels = Sentinel([])  # type: ignore[no-untyped-call]
    sentinels.sentinels = [client_of(place.sentinel_url(address), answer_s) for address in place.addresses]
    try:
        with heeding_cancellation():
            address: Address = await sentinels.discover_master(place.primary)
        return address
    except MasterNotFoundError as error:
        where, known = masked(place.url), await _names_known(sentinels)
        if known and place.primary not in known:
            raise RedisError(
                f"The Sentinels at {where} know no primary {place.primary!r}; they know: {', '.join(known)}"
            ) from None
        problem = f"the Sentinels know no primary {place.primary!r} that is alive" if known else "no Sentinel answers"
        raise ConnectionLostError(f"Cannot reach Redis at {where} ({problem})") from error
    finally:
        for sentinel in sentinels.sentinels:
            await close(sentinel)


async def _names_known(sentinels: Sentinel) -> list[str]:
    names: set[str] = set()
    for sentinel in sentinels.sentinels:
        with contextlib.suppress(*LOST), heeding_cancellation():
            names.update(dict(await sentinel.sentinel_masters()))  # type: ignore[arg-type]
    return sorted(names)


class Primary:
    """
    One server; where Sentinels watch, whichever is the primary now: it is looked up again after each loss.

    `send` gives the reply or error of each call, in order; `pop` and `nodes` raise what redis-py raises.
    """

    def __init__(self, place: Place, answer_s: float | None = None) -> None:
        self._place, self._answer_s = place, answer_s
        self._node: Node | None = None
        self._looking_up = asyncio.Lock()

    def node_of(self, key: str) -> str:
        return "Redis"

    async def send(self, calls: Sequence[Call]) -> list[Any]:
        try:
            node = await self._reached()
        except (*LOST, RedisError) as error:
            return [error] * len(calls)
        replies = await node.send(calls)
        await self._forget_demoted(node, replies)
        return replies

    async def pop(self, keys: Sequence[str], timeout_s: float) -> bool:
        node = await self._reached()
        try:
            return await node.command("BLPOP", *keys, timeout_s) is not None
        except (*LOST, redis.RedisError) as error:
            await self._forget_demoted(node, [error])
            raise

    async def nodes(self) -> list[Node]:
        return [await self._reached()]

    async def _reached(self) -> Node:
        async with self._looking_up:
            if self._node is None:
                self._node = Node(await some_url(self._place, self._answer_s), self._answer_s)
            return self._node

    async def _forget_demoted(self, node: Node, replies: Sequence[Any]) -> None:
        if node is self._node and any(isinstance(reply, LOST) or is_demotion(reply) for reply in replies):
            self._node = None
            await node.close()

    async def close(self) -> None:
        if self._node is not None:
            await self._node.close()


def _leader(calls: Sequence[Call], position: int) -> int:
    """Which call this one follows: the last ahead of it that follows none."""
    return next(i for i in range(position - 1, -1, -1) if not calls[i].follows)


class Cluster:
    """
    The primaries of a cluster. A call goes to the node that owns the slot of its first key, all nodes at the same time.

    The map of slots is asked for anew by the calls of a node that broke, or is no primary any more; the calls of other
    nodes do not wait for it.
    """

    def __init__(self, place: Place, answer_s: float | None = None) -> None:
        self._place, self._answer_s = place, answer_s
        self._owners: dict[int, Address] = {}
        self._doubtful: set[Address] = set()
        self._asking = asyncio.Lock()
        self._nodes: dict[Address, Node] = {}
        self._bells: dict[str, Node] = {}
        self._waiting: dict[str, asyncio.Task[bool]] = {}

    def node_of(self, key: str) -> str:
        return f"Redis at {shown_address(self._owner(key))}" if self._owners else "Redis"

    async def send(self, calls: Sequence[Call]) -> list[Any]:
        replies: list[Any] = [None] * len(calls)
        left: dict[int, Address | None] = dict.fromkeys(range(len(calls)))  # and where a call was told to ask
        overtaking: set[int] = set()  # to be sent again once all else was answered
        for _ in range(REDIRECTS):
            try:
                await self._know_owners([calls[i].keys[0] for i in left])
            except (*LOST, redis.RedisError) as error:
                for i in left:
                    replies[i] = error
                return replies
            groups: dict[tuple[Address, bool], list[int]] = {}
            for i, told in left.items():
                groups.setdefault((told or self._owner(calls[i].keys[0]), told is not None), []).append(i)
            for some in groups.values():
                overtaking |= {i for i in some if calls[i].follows and _leader(calls, i) in left.keys() - some}
            sent = [self._send_to(to, [calls[i] for i in some], asking) for (to, asking), some in groups.items()]
            answers = await asyncio.gather(*map(own_task, sent))
            left = {}
            for some, got in zip(groups.values(), answers, strict=True):
                for i, reply in zip(some, got, strict=True):
                    replies[i] = reply
                    if isinstance(reply, redis.exceptions.AskError):  # MOVED is one too
                        left[i] = self._redirected(reply)
            if left:
                overtaking |= {i for i, call in enumerate(calls) if call.follows and i > min(left)}
            elif overtaking:
                left, overtaking = dict.fromkeys(sorted(overtaking)), set()
            else:
                return replies
        for i in left:
            replies[i] = redis.exceptions.TryAgainError(text_of(replies[i]), status_code="TRYAGAIN")
        return replies

    async def _send_to(self, address: Address, calls: Sequence[Call], asking: bool) -> list[Any]:
        replies = await self._node(address).send(calls, asking=asking)
        if any(_is_out_of_date(reply) for reply in replies):
            self._doubtful.add(address)
        return replies

    def _redirected(self, error: redis.exceptions.AskError) -> Address | None:
        address = (error.host or self._place.addresses[0][0], error.port)
        if not isinstance(error, redis.exceptions.MovedError):
            return address
        self._owners[error.slot_id] = address
        return None

    def _owner(self, key: str) -> Address:
        # A slot that nobody owns: any node answers with the error to tell.
        return self._owners.get(key_slot(key.encode())) or next(iter(self._owners.values()))

    def _node(self, address: Address) -> Node:
        if address not in self._nodes:
            self._nodes[address] = Node(self._place.server_url(address), self._answer_s)
        return self._nodes[address]

    async def _know_owners(self, keys: Sequence[str]) -> None:
        """Ask for the map of slots, where it is not known or the owners of these keys are in doubt."""
        if self._are_known(keys):
            return
        async with self._asking:
            if self._are_known(keys):
                return
            known = list(set(self._owners.values()))
            candidates = dict.fromkeys([*random.sample(known, len(known)), *self._place.addresses])
            lost: BaseException | None = None
            for address in sorted(candidates, key=self._doubtful.__contains__):
                try:
                    ranges = await self._node(address).command("CLUSTER", "SLOTS")
                except LOST as error:
                    lost = error
                    continue
                owners = {
                    slot: (host or address[0], int(port))
                    for start, end, (host, port, *_), *_ in ranges
                    for slot in range(int(start), int(end) + 1)
                }
                if owners:
                    self._owners = owners
                    self._doubtful.clear()
                    return
                lost = redis.exceptions.ClusterDownError("Hash slot not served", status_code="CLUSTERDOWN")
            assert lost is not None
            raise lost

    def _are_known(self, keys: Sequence[str]) -> bool:
        return bool(self._owners) and not any(self._owner(key) in self._doubtful for key in keys)

    async def pop(self, keys: Sequence[str], timeout_s: float) -> bool:
        """
        One blocking read per key, as no command may touch two slots; each has a connection of its own. Those that have
        not ended when one has go on until the next `pop`: to break one off could lose its token.
        """
        until = time.monotonic() + timeout_s
        while (left := until - time.monotonic()) > 0:
            await self._know_owners(keys)
            for key in keys:
                if key not in self._waiting:
                    # Redis takes 0 for ever.
                    self._waiting[key] = own_task(self._pop_one(key, max(left, 0.01)), name=f"bell {key}")
            await asyncio.wait([self._waiting[key] for key in keys], timeout=left, return_when=asyncio.FIRST_COMPLETED)
            ended = [self._waiting.pop(key) for key in keys if self._waiting[key].done()]
            for error in [task.exception() for task in ended]:
                if error is not None:
                    raise error
            if any(task.result() for task in ended):
                return True
        return False

    async def _pop_one(self, key: str, timeout_s: float) -> bool:
        address = self._owner(key)
        url = self._place.server_url(address)
        node = self._bells.get(key)
        if node is None or node.url != url:
            if node is not None:
                await node.close()
            node = self._bells[key] = Node(url)
        try:
            return await node.command("BLPOP", key, timeout_s) is not None
        except redis.exceptions.AskError as error:
            if self._redirected(error) is not None:  # on its way, and empty: come back later
                await asyncio.sleep(timeout_s)
            return False
        except (*LOST, redis.RedisError) as error:
            if _is_out_of_date(error):
                self._doubtful.add(address)
            raise

    async def nodes(self) -> list[Node]:
        await self._know_owners([])
        return [self._node(address) for address in sorted(set(self._owners.values()))]

    async def close(self) -> None:
        for task in self._waiting.values():
            task.cancel()
        await asyncio.gather(*self._waiting.values(), return_exceptions=True)
        for node in (*self._nodes.values(), *self._bells.values()):
            await node.close()


def _is_out_of_date(reply: Any) -> bool:
    """Whether an answer means that the map of slots may not hold any more."""
    return isinstance(reply, (*LOST, redis.exceptions.ClusterDownError)) or (
        isinstance(reply, redis.RedisError) and is_demotion(reply)
    )
