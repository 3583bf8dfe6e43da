"""The records of held deliveries, and the steps of a turn."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from enum import Enum, auto
from typing import Any, NamedTuple

from rq_ceylon.store.scripts import Call
from rq_ceylon.store.transitions import Claimed, Delivery


class Stage(Enum):
    """
    How far a held delivery has come: FETCHED (may be claimed), CLAIMING (its claim is in flight), RUNNING (granted),
    ENDED (its commit is to be sent or in flight), RELEASING (it is being given back).
    """

    FETCHED = auto()
    CLAIMING = auto()
    RUNNING = auto()
    ENDED = auto()
    RELEASING = auto()


@dataclass(slots=True, eq=False)
class Held:
    """
    One held delivery.

    Attributes:
        since: monotonic time of its fetch.
        is_suspect: its task was granted and is a suspect: workers died under it at least twice.
        was_put_off: its last claim was answered LATER. It is claimed again only where a suspect may start.
        name: the function that its task names; empty until its claim is granted.
    """

    delivery: Delivery
    since: float
    stage: Stage = Stage.FETCHED
    is_suspect: bool = False
    was_put_off: bool = False
    name: str = ""


class Granted(NamedTuple):
    """
    A task that may run: its delivery, the claim's answer, and its group's defaults (JSON). `stop`: the running tasks of
    the group must stop.
    """

    held: Held
    claimed: Claimed
    defaults: str
    stop: bool


class Step(NamedTuple):
    """
    One call of a turn. `absorb` reads its reply. If no reply comes, the call is repeated, unless it has `on_no_reply`,
    which is called instead: a fetch delivers, so repeating it would deliver more; an outbox hides the pages it gave.
    """

    call: Call
    absorb: Callable[[Any], None]
    on_no_reply: Callable[[], None] | None = None
