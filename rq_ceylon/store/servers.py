"""The servers behind a URL: one server, the primary that the Sentinels name now, or the nodes of a cluster."""

from __future__ import annotations

import asyncio
import contextlib
import random
from collections.abc import Sequence
from typing import Any

import redis
import redis.asyncio
from redis.asyncio.sentinel import MasterNotFoundError, Sentinel

from rq_ceylon.dev import server
from rq_ceylon.errors import ConnectionLostError, RedisError
from rq_ceylon.settings import Address, Place, masked, place_of
from rq_ceylon.store.cluster import Cluster
from rq_ceylon.store.node import Node, client_of, close, heeding_cancellation
from rq_ceylon.store.redis_errors import DISCONNECTED, is_demotion
from rq_ceylon.store.scripts import Call


def servers_of(url: str, answer_s: float | None = None) -> Primary | Cluster:
    place = place_of(url)
    return (Cluster if place.kind == "cluster" else Primary)(place, answer_s)


async def some_url(place: Place, answer_s: float | None = None) -> str:
    """
    The URL of one server that can be asked right now: the server, the primary, or a node of the cluster.

    Args:
        answer_s: for each Sentinel, as in `client_of`.

    Raises:
        ConnectionLostError: the Sentinels know no live primary.
        RedisError: the Sentinels know no primary of this name.
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
        with contextlib.suppress(*DISCONNECTED), heeding_cancellation():
            names.update(dict(await sentinel.sentinel_masters()))  # type: ignore[arg-type]
    return sorted(names)


class Primary:
    """
    One server. If Sentinels watch it, this is the current primary, which is looked up again after each loss.

    `send` returns the reply or error of each call, in order; `pop` and `nodes` raise what redis-py raises.
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
        except (*DISCONNECTED, RedisError) as error:
            return [error] * len(calls)
        replies = await node.send(calls)
        await self._forget_demoted(node, replies)
        return replies

    async def pop(self, keys: Sequence[str], timeout_s: float) -> bool:
        node = await self._reached()
        try:
            return await node.command("BLPOP", *keys, timeout_s) is not None
        except (*DISCONNECTED, redis.RedisError) as error:
            await self._forget_demoted(node, [error])
            raise

    async def nodes(self) -> list[Node]:
        return [await self._reached()]

    async def _reached(self) -> Node:
        # One lookup at a time, so that all calls share the one node that it makes.
        async with self._looking_up:
            if self._node is None:
                self._node = Node(await some_url(self._place, self._answer_s), self._answer_s)
            return self._node

    async def _forget_demoted(self, node: Node, replies: Sequence[Any]) -> None:
        # A call that was sent before the new lookup must not close the connection that the lookup made.
        if node is self._node and any(isinstance(reply, DISCONNECTED) or is_demotion(reply) for reply in replies):
            self._node = None
            await node.close()

    async def close(self) -> None:
        if self._node is not None:
            await self._node.close()
