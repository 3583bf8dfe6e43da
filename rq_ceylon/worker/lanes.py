"""Sends turns: one in flight per node of Redis, so that a slow node holds up no other. A single server is one node."""

from __future__ import annotations

import asyncio
import collections
import time
from collections.abc import Callable, Sequence
from typing import Any

from loguru import logger

from rq_ceylon.errors import CeylonError, ConnectionLostError
from rq_ceylon.models import counted
from rq_ceylon.process import own_task
from rq_ceylon.store.connection import Connection
from rq_ceylon.store.redis_errors import complain
from rq_ceylon.worker.delivery import Step

PAUSE_S, PAUSE_MAX_S = 0.02, 1.0
"""The first and the longest pause between two tries at a node that does not answer; the pause doubles."""


class Lanes:
    """
    Each node has a lane. A lane is open, or it has a turn in flight. A turn ends when all its calls have been answered,
    except those that must not be repeated.

    Args:
        on_answer: called when replies have been absorbed, also if some calls of the turn got none.
    """

    def __init__(self, connection: Connection, on_answer: Callable[[], None]) -> None:
        self._connection, self._on_answer = connection, on_answer
        # All by node.
        self._turns: dict[str, asyncio.Task[None]] = {}  # the turn in flight: a lane without one is open
        self._since: dict[str, float] = {}  # when the last turn was sent (monotonic)
        self._pauses: dict[str, float] = {}  # the last pause, while the node does not answer
        self._losses: dict[str, int] = collections.defaultdict(int)  # connections lost since it last answered
        self._failure: BaseException | None = None

    @property
    def in_flight(self) -> int:
        return len(self._turns)

    def is_open(self, key: str) -> bool:
        """May calls on this key be sent now?"""
        return self._connection.node_of(key) not in self._turns

    def are_cut_off(self, patience_s: float) -> bool:
        """Do all turns in flight go to nodes that failed at the last try or have not answered for this long?"""
        limit = time.monotonic() - patience_s
        return all(node in self._pauses or self._since[node] < limit for node in self._turns)

    def send(self, steps: Sequence[Step]) -> None:
        """Send each step to its node, whose lane must be open."""
        by_node: dict[str, list[Step]] = collections.defaultdict(list)
        for step in steps:
            by_node[self._connection.node_of(step.call.keys[0])].append(step)
        for node, some in by_node.items():
            self._since[node] = time.monotonic()
            self._turns[node] = own_task(self._take_turn(node, some), name=f"turn of {node}")

    def check(self) -> None:
        """Raise the error that ended a turn, if one did. Failures of Redis end none, so it is a bug."""
        if self._failure is not None:
            raise self._failure

    async def close(self) -> None:
        """Break off the turns in flight. Their calls may or may not have happened."""
        turns = list(self._turns.values())
        for turn in turns:
            turn.cancel()
        await asyncio.gather(*turns, return_exceptions=True)

    async def _take_turn(self, node: str, steps: Sequence[Step]) -> None:
        try:
            while steps:
                steps = await self._try(node, steps)
        except Exception as error:
            self._failure = error
        finally:
            del self._turns[node]
            self._on_answer()

    async def _try(self, node: str, steps: Sequence[Step]) -> Sequence[Step]:
        """
        One round trip. Returns the steps without a reply, which must be repeated with the same arguments. Steps that
        must not be repeated are not among them; their `on_no_reply` was called.
        """
        replies = await self._connection.run_each([step.call for step in steps])
        failure, unanswered = None, []
        for step, reply in zip(steps, replies, strict=True):
            if not isinstance(reply, ConnectionLostError):
                self._absorb(step, reply)
                continue
            failure = reply
            if step.on_no_reply is None:
                unanswered.append(step)
            else:
                step.on_no_reply()
        pause = self._pauses.pop(node, 0.0)
        if failure is not None:
            if pause == 0:
                logger.warning("{}; trying again until {} answers", failure, node)
            self._pauses[node] = min(max(2 * pause, PAUSE_S), PAUSE_MAX_S)
            self._losses[node] += 1
            self._on_answer()
            await asyncio.sleep(self._pauses[node])
        elif pause > 0:
            logger.info("{} answers again, after {}", node, counted(self._losses.pop(node), "lost connection"))
        return unanswered

    def _absorb(self, step: Step, reply: Any) -> None:
        try:
            step.absorb(reply)
        except Exception as error:  # treated as a refusal, so that it costs this call and not the worker
            complain("An answer of Redis cannot be read", error)
            step.absorb(CeylonError(f"its answer cannot be read ({error!r})"))
