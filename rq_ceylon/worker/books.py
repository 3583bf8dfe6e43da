"""The books of a worker: what the next turn must send to each role that it serves, and to each group."""

from __future__ import annotations

from dataclasses import dataclass, field

from rq_ceylon.store.transitions import Ack, Committed, Page, PageAck
from rq_ceylon.worker.delivery import Held


@dataclass(slots=True)
class RoleBook:
    """
    One role that the worker serves.

    Attributes:
        lease_ms: the lease in force, as the last reply told; before the first reply, the lease to ask for.
        acks: deliveries that are done with; the next fetch acknowledges them.
        makes_due: a turn is due because of this role: it may have entries, or acknowledgements wait. A turn that is
            due for another reason fetches from it too.
        is_fetching: a fetch is in flight. A role has one at a time.
        is_recovering: the reply to a fetch was lost, so the next fetch asks in recover mode for what it delivered.
        is_empty: the last fetch that had a budget delivered nothing.
        next_due_s: when the next delayed entry is due, in seconds from the last fetch; None if there is none, and
            while a fetch is in flight.
        waiting_names: the names known to this worker under which tasks of the role wait.
        top_fence: the largest fence ever received, which bounds the low mark when nothing is held.
    """

    lease_ms: int
    acks: list[Ack] = field(default_factory=list)
    makes_due: bool = True
    is_fetching: bool = False
    is_recovering: bool = False
    is_empty: bool = False
    next_due_s: float | None = None
    waiting_names: list[str] = field(default_factory=list)
    top_fence: int = 0


@dataclass(slots=True)
class GroupBook:
    """
    One group to which the worker has something to send. The next turn to the group's node takes the whole book.

    Attributes:
        outcomes: ended attempts to commit.
        page_acks: pages of the group's outbox that have arrived, to be acknowledged.
        messages: pages of groups on which this one depends, to be delivered to it.
        wants_outbox: read the group's outbox.
        wants_hidden: take hidden pages too: a lost reply may have handed them to this worker.
    """

    outcomes: list[tuple[Held, Committed]] = field(default_factory=list)
    page_acks: list[PageAck] = field(default_factory=list)
    messages: list[Page] = field(default_factory=list)
    wants_outbox: bool = False
    wants_hidden: bool = False
