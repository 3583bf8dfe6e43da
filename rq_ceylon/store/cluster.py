"""The nodes of a cluster. Each call goes to the owner of its slot, and follows a slot that moves."""

from __future__ import annotations

import asyncio
import random
import time
from collections.abc import Sequence
from typing import Any

import redis
import redis.asyncio
from redis.crc import key_slot

from rq_ceylon.process import own_task
from rq_ceylon.settings import Address, Place, shown_address
from rq_ceylon.store.node import Node
from rq_ceylon.store.redis_errors import DISCONNECTED, is_demotion, text_of
from rq_ceylon.store.scripts import Call

ROUNDS = 5
"""How many times calls are sent while slots move, before their sender is told to try again."""


def _followed(calls: Sequence[Call], position: int) -> int:
    """The index of the call that this one follows: the nearest earlier call with `follows=False`."""
    return next(i for i in range(position - 1, -1, -1) if not calls[i].follows)


class Cluster:
    """
    The primaries of a cluster. A call goes to the node that owns the slot of its first key; all nodes are sent their
    calls at the same time.

    If a node breaks, or is no longer a primary, the calls to it ask for the map of slots again. Calls to other nodes do
    not wait for that.
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
        """
        Send each call to the owner of its slot. Returns the reply or the error of each.

        A round is one pipeline to each node, all at once. A call that is redirected goes into the next round. A call
        with `follows` may have run too early: the one that it follows went to another node, or was redirected. Once no
        redirect is left it is sent once more, and its last reply counts; so it must be safe to repeat.
        """
        replies: list[Any] = [None] * len(calls)
        # The calls of the next round, each with the node that ASK named for it, or None.
        to_send: dict[int, Address | None] = dict.fromkeys(range(len(calls)))
        ran_early: set[int] = set()
        for _ in range(ROUNDS):
            try:
                await self._know_owners([calls[i].keys[0] for i in to_send])
            except (*DISCONNECTED, redis.RedisError) as error:
                for i in to_send:
                    replies[i] = error
                return replies
            pipelines: dict[tuple[Address, bool], list[int]] = {}
            for i, asked_at in to_send.items():
                node = (asked_at or self._owner(calls[i].keys[0]), asked_at is not None)
                pipelines.setdefault(node, []).append(i)
            for some in pipelines.values():
                others = to_send.keys() - some
                ran_early |= {i for i in some if calls[i].follows and _followed(calls, i) in others}
            sent = [self._send_to(node, [calls[i] for i in some], ask) for (node, ask), some in pipelines.items()]
            answers = await asyncio.gather(*map(own_task, sent))
            to_send = {}
            for some, got in zip(pipelines.values(), answers, strict=True):
                for i, reply in zip(some, got, strict=True):
                    replies[i] = reply
                    if isinstance(reply, redis.exceptions.AskError):  # MovedError is a subclass
                        to_send[i] = self._redirected(reply)
            if to_send:
                # Those behind a redirected call have run before it. Some that follow another one are sent again too.
                ran_early |= {i for i, call in enumerate(calls) if call.follows and i > min(to_send)}
            elif ran_early:
                to_send, ran_early = dict.fromkeys(sorted(ran_early)), set()
            else:
                return replies
        for i in to_send:
            # For the sender this is a lost connection: it tries again.
            words = text_of(replies[i]) if isinstance(replies[i], BaseException) else "its slot keeps moving"
            replies[i] = redis.exceptions.TryAgainError(words, status_code="TRYAGAIN")
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
        # Any node serves for a slot without an owner: its error tells the reason.
        return self._owners.get(key_slot(key.encode())) or next(iter(self._owners.values()))

    def _node(self, address: Address) -> Node:
        if address not in self._nodes:
            self._nodes[address] = Node(self._place.server_url(address), self._answer_s)
        return self._nodes[address]

    async def _know_owners(self, keys: Sequence[str]) -> None:
        """Ask for the map of slots if it is unknown, or if the owner of one of these keys is in doubt."""
        if self._are_known(keys):
            return
        async with self._asking:
            if self._are_known(keys):
                return
            known = list(set(self._owners.values()))
            candidates = dict.fromkeys([*random.sample(known, len(known)), *self._place.addresses])
            failure: BaseException | None = None
            # Ask the doubtful nodes last: a broken one may cost a timeout.
            for address in sorted(candidates, key=self._doubtful.__contains__):
                try:
                    ranges = await self._node(address).command("CLUSTER", "SLOTS")
                except DISCONNECTED as error:
                    failure = error
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
                failure = redis.exceptions.ClusterDownError("Hash slot not served", status_code="CLUSTERDOWN")
            assert failure is not None
            raise failure

    def _are_known(self, keys: Sequence[str]) -> bool:
        return bool(self._owners) and not any(self._owner(key) in self._doubtful for key in keys)

    async def pop(self, keys: Sequence[str], timeout_s: float) -> bool:
        """
        Wait for a token in any of these lists, by one blocking read per key, since no command may touch two slots. Each
        read has a connection of its own. When one read ends, the others go on until the next `pop`: to break one off
        could lose its token.
        """
        until = time.monotonic() + timeout_s
        while (left := until - time.monotonic()) > 0:
            await self._know_owners(keys)
            for key in keys:
                if key not in self._waiting:
                    # For Redis, 0 means to wait forever.
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
            if self._redirected(error) is not None:  # the slot is moving and the list is empty: try again later
                await asyncio.sleep(timeout_s)
            return False
        except (*DISCONNECTED, redis.RedisError) as error:
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
    """Whether this reply means that the map of slots may be out of date."""
    return isinstance(reply, (*DISCONNECTED, redis.exceptions.ClusterDownError)) or (
        isinstance(reply, redis.RedisError) and is_demotion(reply)
    )
