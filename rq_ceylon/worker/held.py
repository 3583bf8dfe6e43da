"""
What a worker holds, what it is done with, and the steps of a turn about it.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from enum import Enum, auto
from typing import Any, NamedTuple

from rq_ceylon.store.scripts import Call
from rq_ceylon.store.transitions import Acks, Claimed, Delivery


class Stage(Enum):
    """
    Where a held entry stands.
    """

    FETCHED = auto()
    CLAIMING = auto()
    RUNNING = auto()
    ENDED = auto()
    RELEASING = auto()


@dataclass(slots=True, eq=False)
class Held:
    """
    One delivery in this worker's hands.

    Attributes:
        since: monotonic time of the fetch.
        is_suspect: it runs, and its worker died under it before, more than once.
        later: its claim was put off.
    """

    delivery: Delivery
    since: float
    stage: Stage = Stage.FETCHED
    is_suspect: bool = False
    later: bool = False


class Granted(NamedTuple):
    """
    A task that may run now: the delivery, the claim's answer, and its group's defaults (JSON) and stop flag.
    """

    held: Held
    claimed: Claimed
    defaults: str
    stop: bool


class Settled:
    """
    The entries of one role that are done with, by outcome, until a fetch acknowledges them.
    """

    def __init__(self) -> None:
        self._acks: dict[str, Acks] = {}

    def note(self, delivery: Delivery, outcome: str, run_ms: int) -> None:
        acks = self._acks.setdefault(outcome, Acks())
        acks.entries.append(delivery.entry)
        if outcome in ("completed", "failed"):
            # By the server's clock: a fence is its time of delivery in µs, an entry id its time of arrival in ms.
            wait_ms = max(0, delivery.fence // 1000 - int(delivery.lineage[2:].partition("-")[0]))
            for name, value in (("run", run_ms), ("wait", wait_ms)):
                bucket, total = f"{name}:{value.bit_length()}", f"{name}_ms"
                acks.histogram[bucket] += 1
                acks.histogram[total] += value

    def take(self) -> dict[str, Acks]:
        acks, self._acks = self._acks, {}
        return acks

    def put_back(self, acks: dict[str, Acks]) -> None:
        """
        What was taken, and may not have been acknowledged.
        """
        for outcome, some in acks.items():
            mine = self._acks.setdefault(outcome, Acks())
            mine.entries += some.entries
            mine.histogram.update(some.histogram)


class Step(NamedTuple):
    """
    One call of a turn and what reads its reply. `lost`: what to do instead of repeating it if no reply comes (a fetch
    delivers, so it must not be repeated).
    """

    call: Call
    absorb: Callable[[Any], None]
    lost: Callable[[], None] | None = None
