"""The relay: takes pages from the outbox of a group to the roles and groups that they are for."""

from __future__ import annotations

import collections
from collections.abc import Sequence

from loguru import logger

from rq_ceylon.store import queries, transitions
from rq_ceylon.store.connection import Connection
from rq_ceylon.store.keys import Keys
from rq_ceylon.store.scripts import Call, command
from rq_ceylon.store.transitions import OutboxReply, Page, PageAck

PAGES_PER_CALL = 50


async def relay(connection: Connection, keys: Keys, gid: str, *, hidden: bool = False) -> tuple[OutboxReply, bool]:
    """
    Hand over the visible pages of a group's outbox, and acknowledge them. Returns the last answer of the outbox, and
    whether something moves: there were pages, or hidden ones are left to the process that received them.

    A page is acknowledged only after its entries have reached their role. If this stops in between, the page is handed
    over twice, and the claim refuses the second entry.

    Args:
        hidden: also take hidden pages: a lost reply may have brought them to the caller.
    """
    answer, moved, told = await _relay_one(connection, keys, gid, hidden=hidden)
    await _relay_all(connection, keys, told)
    return answer, moved


async def hand_over(connection: Connection, keys: Keys, pages: Sequence[Page]) -> list[PageAck]:
    """Take pages to where they belong. Returns their acknowledgements, which the caller must send to their outbox."""
    acks, told = await _hand_over(connection, keys, pages)
    await _relay_all(connection, keys, told)
    return acks


async def _relay_all(connection: Connection, keys: Keys, gids: Sequence[str]) -> None:
    # A loop and not a recursion: a long chain of groups, each of which waits for the one before, may end at once.
    waiting = collections.deque(gids)
    while waiting:
        _, _, told = await _relay_one(connection, keys, waiting.popleft())
        waiting += told


async def _relay_one(
    connection: Connection, keys: Keys, gid: str, *, hidden: bool = False
) -> tuple[OutboxReply, bool, list[str]]:
    """As `relay`. Third, the groups to which a message was delivered, and which may have pages themselves now."""
    acks: list[PageAck] = []
    told: list[str] = []
    moved = False
    there: int | None = None
    while True:
        calls = [
            transitions.outbox(keys, gid, wanted=PAGES_PER_CALL, hidden=hidden, acks=acks),
            command("ZCARD", keys.group_part(gid, "outbox")),
        ]
        reply, left = await connection.run(calls)
        answer = transitions.outbox_reply(gid, reply)
        if not answer.pages and not answer.more:
            return answer, moved or left > 0, told
        moved = True
        # Hidden pages include those that others receive meanwhile. So ask for hidden ones only for as many pages as
        # there were at first.
        there = (left if there is None else there) - PAGES_PER_CALL
        hidden = hidden and there > 0
        acks, some = await _hand_over(connection, keys, answer.pages)
        told += some


async def _hand_over(connection: Connection, keys: Keys, pages: Sequence[Page]) -> tuple[list[PageAck], list[str]]:
    by_role: dict[str, list[Page]] = collections.defaultdict(list)
    messages = [page for page in pages if page.is_message and not page.is_for_follow_ups]
    followed = [page for page in pages if page.is_for_follow_ups]
    for page in pages:
        if not page.is_message:
            by_role[page.role].append(page)
    calls: list[Call] = [transitions.enqueue(keys, role, some) for role, some in by_role.items()]
    calls += [transitions.tell_group(keys, page) for page in messages]
    replies = await connection.run(calls)
    answers = zip(messages, replies[len(by_role) :], strict=True)
    # Also groups that no longer wait: the process that delivered this message first may have ended before it relayed
    # their pages.
    told = [page.text.rpartition("|")[2] for page, (word, *_) in answers if word != "GONE"]
    acks = [PageAck(page, horizon) for some, horizon in zip(by_role.values(), replies, strict=False) for page in some]
    for page in followed:
        told += await _submit_follow_ups(connection, keys, page)
    return acks + [PageAck(page) for page in (*messages, *followed)], told


async def _submit_follow_ups(connection: Connection, keys: Keys, page: Page) -> list[str]:
    """
    Submit those groups that follow the one of this message and whose time has come. They are data of that group until
    then, so they exist exactly if it does. Returns the groups that got a message by that.
    """
    _, _, standing, _ = page.text.split("|")
    followed: list[str] = []
    for one in await queries.follow_ups(connection, keys, page.gid):
        if not _holds(one["when"], standing):
            continue
        *_, reply = await connection.run(transitions.follow_up(keys, one))
        if reply[0] not in ("OK", "REPEAT"):
            logger.error("Group {} that follows {} cannot be submitted: {}", one["gid"], page.gid, " ".join(reply))
            continue
        # The reply had its pages, or an earlier one that was lost.
        *_, told = await _relay_one(connection, keys, one["gid"], hidden=True)
        followed += told
    return followed


def _holds(when: str, standing: str) -> bool:
    outcome, *achieved = standing.split("+")
    return when == outcome or when in achieved or (when == "finished" and outcome != "")
