"""What a worker holds, and the steps of a turn about it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from enum import Enum, auto
from typing import Any, NamedTuple

from rq_ceylon.store.scripts import Call
from rq_ceylon.store.transitions import Claimed, Delivery


class Stage(Enum):
    """Where a held entry stands."""

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
        name: which function its task names; empty until its claim is granted.
    """

    delivery: Delivery
    since: float
    stage: Stage = Stage.FETCHED
    is_suspect: bool = False
    later: bool = False
    name: str = ""


class Granted(NamedTuple):
    """A task that may run now: the delivery, the claim's answer, and its group's defaults (JSON) and stop flag."""

    held: Held
    claimed: Claimed
    defaults: str
    stop: bool


class Step(NamedTuple):
    """
    One call of a turn and what reads its reply. `lost`: what to do instead of repeating it if no reply comes (a fetch
    delivers, so it must not be repeated; an outbox hides what it gave).
    """

    call: Call
    absorb: Callable[[Any], None]
    lost: Callable[[], None] | None = None
