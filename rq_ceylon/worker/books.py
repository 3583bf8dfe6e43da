"""What a worker has to say: to each role that it serves, and to each group whose tasks it ran or relays for."""

from __future__ import annotations

from dataclasses import dataclass, field

from rq_ceylon.store.transitions import Ack, Committed, Page, PageAck
from rq_ceylon.worker.held import Held


@dataclass(slots=True)
class RoleBook:
    """
    One role that the worker serves.

    Attributes:
        lease_ms: the lease in force, as the last reply told; until then the one to ask for.
        acks: settled deliveries, which the next fetch acknowledges.
        is_wanted: there may be something to fetch.
        is_fetching: a fetch is in flight.
        is_recovering: the reply to a fetch was lost, so the next one asks for what it may have delivered.
        is_empty: the last fetch that had a budget found nothing.
        next_due_s: when the next delayed entry is due, in seconds from the last fetch; None if there is none.
        waiting_names: task names known here, under which tasks of the role wait.
        top_fence: the largest fence ever received.
    """

    lease_ms: int
    acks: list[Ack] = field(default_factory=list)
    is_wanted: bool = True
    is_fetching: bool = False
    is_recovering: bool = False
    is_empty: bool = False
    next_due_s: float | None = None
    waiting_names: list[str] = field(default_factory=list)
    top_fence: int = 0


@dataclass(slots=True)
class GroupBook:
    """
    One group, until the next turn to its node has said all of this.

    Attributes:
        outcomes: what to commit.
        page_acks: pages of its outbox that are enqueued.
        messages: messages of groups on which it depends.
        relays: look through its outbox.
        relays_hidden: also take pages that are hidden: a reply that handed them to this worker may be lost.
    """

    outcomes: list[tuple[Held, Committed]] = field(default_factory=list)
    page_acks: list[PageAck] = field(default_factory=list)
    messages: list[Page] = field(default_factory=list)
    relays: bool = False
    relays_hidden: bool = False
