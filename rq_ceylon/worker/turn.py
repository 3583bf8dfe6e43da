"""
Keeps the deliveries that a worker holds, and plans its turns. No I/O: `plan` returns calls, each with the function that
reads its reply.

A turn is one pipeline to one node; `plan` makes those to all nodes that are free. It commits the attempts that have
ended since the last turn, claims the fetched entries, gives back what could not start, fetches from each role (a fetch
also acknowledges the entries that earlier replies have dealt with), enqueues the pages that earlier replies brought,
tells other groups, and reads outboxes.

Replies take effect in the next turn, so an entry is never acknowledged in the pipeline that carries its commit: if the
commit is lost, the entry is still pending, and Redis delivers it again. Calls to a node whose turn is still in flight
wait in the books.
"""

from __future__ import annotations

import collections
import time
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from functools import partial
from typing import Any

from loguru import logger

from rq_ceylon.errors import CeylonError
from rq_ceylon.store import transitions
from rq_ceylon.store.keys import Keys
from rq_ceylon.store.transitions import Ack, Committed, Page, PageAck
from rq_ceylon.worker.books import GroupBook, RoleBook
from rq_ceylon.worker.delivery import Granted, Held, Stage, Step
from rq_ceylon.worker.leases import Leases
from rq_ceylon.worker.outcome import waits_by_name
from rq_ceylon.worker.places import RECENT_S, UNBOUNDED

UNCLAIMED_S = 2.0
"""How long a fetched entry may wait for its claim before it is given back: other workers may be idle."""

RELAY_PAGES = 500
"""The most pages in one answer of an outbox: a commit whose answer was lost may have written so many, one per retry."""


class Turns:
    """
    The books of one worker: its held deliveries, one book per role that it serves, and one per group to which it has
    something to send.

    A delivery enters `held` when a fetch brings it, and passes the stages FETCHED, CLAIMING (FETCHED again if it was
    put off), RUNNING and ENDED. It leaves when its acknowledgement is noted for the next fetch, when it was given back
    (RELEASING), or when it is forgotten. `plan` moves what it sends out of the books and into steps; the methods under
    *absorb* read the replies and fill the books for the next turn.

    Args:
        slots: how many tasks may run at once.
        lease_ms: the lease to ask for.
        knows: the names of the tasks that can run here.
        shares: returns how many tasks of each of the given names can start here now.
        may_send: tells whether calls on a key may be sent now, that is, whether the lane of its node is open. A turn
            has no calls on other keys.

    Attributes:
        held: the deliveries in this worker's hands, by role and entry. All others that Redis has given to this worker
            are acknowledged by the next fetch, or were forgotten.
        granted: tasks that may run and that the loop has not started yet.
        stopping: set by the loop when the worker was told to stop. From then on it asks for no entries and claims none.
        completed: how many tasks Redis counted as completed by this worker.
    """

    def __init__(
        self,
        *,
        keys: Keys,
        worker: str,
        roles: Sequence[str],
        slots: int,
        lease_ms: int,
        leases: Leases,
        knows: Collection[str] = (),
        shares: Callable[[Sequence[str]], dict[str, int]] = lambda names: dict.fromkeys(names, UNBOUNDED),
        may_send: Callable[[str], bool],
    ) -> None:
        self.keys, self.worker, self.roles, self.slots, self.leases = keys, worker, list(roles), slots, leases
        self._may_send, self._knows, self._shares = may_send, frozenset(knows), shares
        self._roles = {role: RoleBook(lease_ms) for role in self.roles}
        self._groups: dict[str, GroupBook] = collections.defaultdict(GroupBook)
        self.held: dict[tuple[str, str], Held] = {}
        self.granted: list[Granted] = []
        self.to_relay: set[str] = set()
        self.stopping, self.completed = False, 0
        # By role, also roles that this worker does not serve.
        self._to_enqueue: dict[str, list[Page]] = collections.defaultdict(list)
        # Per page: task → name, of its tasks that must wait by name because they cannot run here.
        self._by_name: dict[Page, Mapping[str, str]] = {}
        # A claim that may grant a suspect is in flight. A worker runs one suspect at a time, so no second one is sent.
        self._asks_for_suspect = False
        self._recent: collections.deque[float] = collections.deque()  # when the latest attempts ended (monotonic)
        self._by_turns = list(self.roles)  # the role that was asked for entries most recently is last

    # ---- what the loop asks ------------------------------------------------------------------------------------------
    @property
    def lease_ms(self) -> int:
        """The shortest lease in force in any of the roles."""
        return min(book.lease_ms for book in self._roles.values())

    @property
    def next_due_s(self) -> float | None:
        """
        The shortest wait for a delayed entry that the last fetch of any role told, in seconds from that fetch; None: no
        role told any, or those are being fetched from.
        """
        return min((book.next_due_s for book in self._roles.values() if book.next_due_s is not None), default=None)

    @property
    def fetched_nothing(self) -> bool:
        """Did the last fetch with a budget find nothing, in every role?"""
        return all(book.is_empty for book in self._roles.values())

    @property
    def rest_s(self) -> float:
        """How long the worker has nothing to send, unless something happens: a third of a lease at most."""
        now = time.monotonic()
        waits = [
            held.since + UNCLAIMED_S - now
            for held in self.held.values()
            if held.stage is Stage.FETCHED and self._is_open(role=held.delivery.role)
        ]
        return max(0.0, min([self.lease_ms / 3000, *waits]))

    def running(self) -> list[Held]:
        return [held for held in self.held.values() if held.stage is Stage.RUNNING]

    def low_marks(self) -> dict[str, int]:
        """
        The low mark of each role: the smallest fence held here or, if none is held, one more than the largest ever
        received. A task on record for this worker under a smaller fence is an orphan, since it does not run here.
        """
        marks = {role: book.top_fence + 1 for role, book in self._roles.items()}
        for held in self.held.values():
            marks[held.delivery.role] = min(marks[held.delivery.role], held.delivery.fence)
        return marks

    def ring(self) -> None:
        """Note that every role may have entries: a turn is due."""
        for book in self._roles.values():
            book.makes_due = True

    def is_due(self, free: int) -> bool:
        """Is there something to send now, with this many free slots, to a node whose lane is open?"""
        return (
            any(self._is_open(gid=gid) for gid in self._groups)
            or any(self._is_open(role=role) for role in self._to_enqueue)
            or any(book.makes_due and self._may_fetch(role) for role, book in self._roles.items())
            or self._has_waiting(free)
            or any(self._is_open(role=role) for role in self._unstartable())
        )

    def _has_waiting(self, free: int) -> bool:
        """Is there a fetched entry that can be claimed now?"""
        waiting = (held for held in self.held.values() if held.stage is Stage.FETCHED)
        if self.stopping:
            return False
        suspect = self._may_start_suspect()
        return free > 0 and any(
            self._is_open(gid=held.delivery.gid) for held in waiting if suspect or not held.was_put_off
        )

    def _unstartable(self) -> dict[str, list[Held]]:
        """Per role, the fetched entries to give back: they were not claimed in time, or the worker is stopping."""
        limit = time.monotonic() - (0 if self.stopping else UNCLAIMED_S)
        found: dict[str, list[Held]] = collections.defaultdict(list)
        for held in self.held.values():
            if held.stage is Stage.FETCHED and held.since <= limit:
                found[held.delivery.role].append(held)
        return found

    def _may_start_suspect(self) -> bool:
        return not self._asks_for_suspect and not any(
            held.is_suspect and held.stage is Stage.RUNNING for held in self.held.values()
        )

    def _is_open(self, *, gid: str = "", role: str = "") -> bool:
        return self._may_send(self.keys.group_part(gid, "meta") if gid else self.keys.role_part(role, "meta"))

    def _may_fetch(self, role: str) -> bool:
        # An open lane is not enough: the slot of the role may have moved to another node while its last fetch is still
        # in flight. A role has one fetch at a time, since recovery must know all that earlier fetches delivered.
        return not self._roles[role].is_fetching and self._is_open(role=role)

    def may_fetch(self) -> bool:
        """Can any role be fetched from now?"""
        return any(self._may_fetch(role) for role in self.roles)

    def is_idle(self) -> bool:
        return not self.held and not self.is_due(0)

    def finish(self, held: Held, outcome: Committed) -> None:
        """Note the outcome of a running delivery; the next turn commits it."""
        if not self.holds(held):  # its lease was lost: another worker has the task, and this outcome does not count
            return
        held.stage = Stage.ENDED
        self._recent.append(time.monotonic())
        self._groups[held.delivery.gid].outcomes.append((held, outcome))

    def forget(self, held: Held) -> None:
        """
        Drop a delivery without a word to Redis: from now on it is never run, renewed, committed or acknowledged here.
        Another worker has it, or gets it when its lease ends.
        """
        self._drop(held)

    def _drop(self, held: Held) -> None:
        if self.holds(held):
            name = held.delivery.role, held.delivery.entry
            del self.held[name]
            self.leases.drop(*name)

    def holds(self, held: Held) -> bool:
        """Is this very delivery still in the books? Its entry may be there again, in a later delivery."""
        return self.held.get((held.delivery.role, held.delivery.entry)) is held

    # ---- plan --------------------------------------------------------------------------------------------------------
    def plan(self, free: int) -> list[Step]:
        """
        The calls of the next turn, only those to nodes whose lane is open.

        Args:
            free: how many more tasks may run now.
        """
        # Claims, releases, fetches in this order: claims in flight take slots from the fetches, and while entries are
        # being given back, a fetch of their role delivers nothing. Enqueues come behind the fetches, as they make a
        # role due again. The place of the others does not matter.
        groups = {gid: self._groups.pop(gid) for gid in list(self._groups) if self._is_open(gid=gid)}
        return [
            *self._commits(groups),
            *self._claims(free),
            *self._releases(),
            *self._fetches(free),
            *self._enqueues(),
            *self._messages(groups),
            *self._outboxes(groups),
        ]

    def _commits(self, groups: Mapping[str, GroupBook]) -> Iterable[Step]:
        for gid, book in groups.items():
            if not book.outcomes and not book.page_acks:
                continue
            acks, most = book.page_acks, transitions.COMMIT_TASKS_MAX
            # Without outcomes there is one empty batch, whose call carries the acknowledgements.
            for batch in transitions.in_batches(book.outcomes, lambda ended: ended[1].size, most):
                call = transitions.commit(self.keys, gid, self.worker, [o for _, o in batch], acks)
                acks = []  # the first call of the group carries all of them
                yield Step(call, partial(self._committed, gid, batch))

    def _claims(self, free: int) -> Iterable[Step]:
        if self.stopping:
            return
        # Claims in flight may all be granted, so they take their slots already.
        free -= sum(held.stage is Stage.CLAIMING for held in self.held.values())
        suspect = self._may_start_suspect()
        by_group: dict[str, list[Held]] = collections.defaultdict(list)
        for held in self.held.values():
            if free <= 0:
                break
            gid = held.delivery.gid
            # A claim answered LATER waits until this worker may start a suspect: the task may be one.
            may_ask = held.stage is Stage.FETCHED and (suspect or not held.was_put_off)
            if may_ask and (gid in by_group or self._is_open(gid=gid)):
                free -= 1
                held.stage = Stage.CLAIMING
                by_group[gid].append(held)
        for gid, helds in by_group.items():
            for first in range(0, len(helds), transitions.CLAIM_TASKS_MAX):
                batch = helds[first : first + transitions.CLAIM_TASKS_MAX]
                asked = [held.delivery for held in batch]
                call = transitions.claim(self.keys, gid, self.worker, asked, suspect=suspect)
                yield Step(call, partial(self._claimed, batch, suspect))
                self._asks_for_suspect |= suspect
                suspect = False  # one claim at a time may grant a suspect, since a worker runs only one

    def _releases(self) -> Iterable[Step]:
        for role, some in self._unstartable().items():
            if not self._is_open(role=role):
                continue
            for held in some:
                held.stage = Stage.RELEASING
            entries = [held.delivery.entry for held in some]
            call = transitions.release(self.keys, role, self.worker, entries, leaving=self.stopping)
            yield Step(call, partial(self._released, some))

    def _fetches(self, free: int) -> Iterable[Step]:
        now = time.monotonic()
        while self._recent and self._recent[0] < now - RECENT_S:
            self._recent.popleft()
        stages = collections.Counter(held.stage for held in self.held.values())
        ahead = min(self.slots, len(self._recent)) - stages[Stage.FETCHED]
        # Fetch for the free slots and those likely to become free, less the entries already on their way to a slot.
        left = 0 if self.stopping else max(0, free - stages[Stage.CLAIMING] + ahead)
        # Entries are given back so that idle workers get them. A fetch in the same turn would bring them back here.
        releasing = {held.delivery.role for held in self.held.values() if held.stage is Stage.RELEASING}
        roles = [role for role in self._by_turns if self._may_fetch(role)]
        has_room = left > 0
        for number, role in enumerate(roles):
            # The roles share one budget, so that together they deliver no more than can start. If it is less than one
            # entry per role, they take turns.
            budget = 0 if role in releasing else -(-left // (len(roles) - number))
            left -= budget
            if budget > 0:
                self._by_turns.remove(role)
                self._by_turns.append(role)
                self._roles[role].is_empty = False
            if budget > 0 or not has_room:
                self._roles[role].makes_due = False
            elif not self._roles[role].acks and not self._roles[role].is_recovering:
                continue  # no budget was left for this role and it has nothing else to send: it stays wanted
            yield self._fetch(role, budget)

    def _fetch(self, role: str, budget: int) -> Step:
        book = self._roles[role]
        book.is_fetching, book.next_due_s = True, None
        acks, book.acks = book.acks, []
        # Recover mode after a lost reply: entries pending for this worker but not named here are delivered again. Those
        # whose acknowledgement is noted are not named either; they are in `acks`, and fetch.lua acknowledges before it
        # recovers.
        recover = [entry for of, entry in self.held if of == role] if book.is_recovering else None
        # Fetches of two roles in one turn may be promised the same places: what cannot start then is given back.
        names = self._shares(book.waiting_names)
        call = transitions.fetch(
            self.keys,
            role,
            self.worker,
            budget=budget,
            lease_ms=book.lease_ms,
            acks=acks,
            recover=recover,
            names=names,
        )
        return Step(call, partial(self._fetched, role, budget, names), partial(self._fetch_unanswered, role, acks))

    def _enqueues(self) -> Iterable[Step]:
        for role in [role for role in self._to_enqueue if self._is_open(role=role)]:
            some = self._to_enqueue.pop(role)
            # The page may be for a role that this worker does not serve, and so never fetches from.
            if (book := self._roles.get(role)) is not None:
                # The role counts as empty only after a fetch that could see the new entries: a burst worker must not
                # end before.
                book.is_empty, book.makes_due = False, True
            by_name = [(page.gid, self._by_name.pop(page, {})) for page in some]
            names = {(gid, tid): name for gid, tasks in by_name for tid, name in tasks.items()}
            call = transitions.enqueue(self.keys, role, some, names=names)
            yield Step(call, partial(self._enqueued, some))

    def _messages(self, groups: Mapping[str, GroupBook]) -> Iterable[Step]:
        for gid, book in groups.items():
            for page in book.messages:
                call = transitions.tell_group(self.keys, page)
                yield Step(call, partial(self._message_arrived, gid, page))

    def _outboxes(self, groups: Mapping[str, GroupBook]) -> Iterable[Step]:
        for gid in [gid for gid, book in groups.items() if book.wants_outbox]:
            call = transitions.outbox(self.keys, gid, wanted=RELAY_PAGES, hidden=groups[gid].wants_hidden)
            yield Step(call, partial(self._outbox_read, gid), partial(self._want_outbox, gid, hidden=True))

    # ---- absorb ------------------------------------------------------------------------------------------------------
    def _committed(self, gid: str, batch: Sequence[tuple[Held, Committed]], reply: Any) -> None:
        if isinstance(reply, CeylonError):
            logger.error("Outcomes of group {} cannot be recorded: {}", gid, reply)
            # Forgotten, so that the leases end and other workers get the tasks; they need the entries, so none is
            # acknowledged.
            for held, _ in batch:
                self.forget(held)
            return
        answer = transitions.commit_reply(gid, reply, len(batch))
        for (held, outcome), verdict in zip(batch, answer.verdicts, strict=True):
            if verdict == "STALE":
                self.forget(held)  # another delivery holds the task, and may be of the same entry: never acknowledge it
            elif verdict == "FULL":
                words = "{}/{} was given back, since Redis is at its memory limit and takes no task that it spawns"
                logger.warning(words, gid, held.delivery.tid)
                self._acknowledge(held, "release", outcome.run_ms)
            else:
                self.completed += verdict == "OK" and outcome.kind == "completed"
                self._acknowledge(held, outcome.kind if verdict == "OK" else "stale", outcome.run_ms)
        self._note_names(batch, answer.pages)
        self._take(answer.pages)
        # DONE: an earlier call recorded this attempt, and its answer was lost with pages that are hidden now.
        # `more`: the call could not visit all dependents, so a page that continues the visit waits in the outbox.
        if answer.more or "DONE" in answer.verdicts:
            self._want_outbox(gid, hidden="DONE" in answer.verdicts)

    def _claimed(self, batch: Sequence[Held], suspect: bool, reply: Any) -> None:
        if suspect:
            self._asks_for_suspect = False
        if isinstance(reply, CeylonError):
            logger.error("Tasks of group {} cannot be claimed: {}", batch[0].delivery.gid, reply)
            for held in batch:
                self.forget(held)
            return
        answer = transitions.claim_reply(reply, len(batch))
        for held, claimed in zip(batch, answer.answers, strict=True):
            if not self.holds(held):
                continue  # its lease was lost while the claim was in flight, so its outcome would not count
            match claimed.verdict:
                case "GRANTED":
                    held.stage, held.was_put_off = Stage.RUNNING, False
                    held.is_suspect = claimed.crashes >= transitions.SUSPECT_CRASHES
                    self.granted.append(Granted(held, claimed, answer.defaults, answer.stop))
                case "LATER":
                    held.stage, held.was_put_off = Stage.FETCHED, True
                # A later delivery of the lineage runs the task, perhaps one of this entry: do not acknowledge it.
                case "LOST":
                    self.forget(held)
                case verdict:
                    if verdict in ("DONE", "PARKED"):
                        # The pages that follow from that end or parking may still be in the outbox.
                        self._want_outbox(held.delivery.gid)
                    if claimed.words:
                        level = "WARNING" if claimed.reason == "expired" else "ERROR"  # expiry was asked for
                        task, words = f"{held.delivery.gid}/{held.delivery.tid}", "{} is over ({}): {}"
                        logger.log(level, words, task, claimed.reason, claimed.words)
                    # "stale" is the role's total of deliveries that ran nothing, not the verdict STALE.
                    self._acknowledge(held, "stale", 0)

    def _fetched(self, role: str, budget: int, names: Collection[str], reply: Any) -> None:
        book = self._roles[role]
        book.is_fetching = False
        if isinstance(reply, CeylonError):
            # The acknowledgements that it carried are not sent again: those entries are reclaimed when their leases
            # end, and their claims answer DONE.
            logger.error("Role {} cannot be read: {}", role, reply)
            return
        answer = transitions.fetch_reply(role, reply)
        book.is_recovering = False  # only now: a recovery that was refused is still to be done
        if answer.lease_ms != book.lease_ms:
            words = "Role {} has leases of {} s; adopted instead of {} s"
            logger.warning(words, role, answer.lease_ms / 1000, book.lease_ms / 1000)
            book.lease_ms = answer.lease_ms
        self.leases.adopt(role, answer.lease_ms)
        if answer.next_due_ms is not None:
            book.next_due_s = answer.next_due_ms / 1000
        if budget > 0 and not answer.deliveries:
            book.is_empty = True
        book.waiting_names = [name for name in answer.names if name in self._knows]
        if not set(names).issuperset(book.waiting_names):
            book.makes_due = True  # tasks wait under names that this fetch gave no share for: fetch again at once
        now = time.monotonic()
        for delivery in answer.deliveries:
            book.top_fence = max(book.top_fence, delivery.fence)
            mine = self.held.get((role, delivery.entry))
            # We reclaimed our own entry (its lease ran out although we are alive). Keep running it, or await its claim,
            # under the fence of the first delivery; do not start it again.
            if mine is not None and mine.stage is not Stage.FETCHED:
                continue
            self.held[role, delivery.entry] = Held(delivery, now)
            # Renew it until it has certainly been claimed or given back; a granted task gets a limit of its own.
            self.leases.hold(role, delivery.entry, now + UNCLAIMED_S + 2 * answer.lease_ms / 1000)

    def _fetch_unanswered(self, role: str, acks: list[Ack]) -> None:
        book = self._roles[role]
        book.is_fetching = False
        # The fetch may have delivered entries. Repeating it would deliver more, so the next one recovers instead. The
        # acknowledgements go with it again: they are safe to repeat.
        book.is_recovering = book.makes_due = True
        book.acks += acks

    def _released(self, given_back: Sequence[Held], reply: Any) -> None:
        if isinstance(reply, CeylonError):
            logger.error("Entries of role {} cannot be given back: {}", given_back[0].delivery.role, reply)
        # Also after a refusal: then other workers get them when their leases end.
        for held in given_back:
            self._drop(held)

    def _enqueued(self, pages: Sequence[Page], reply: Any) -> None:
        # A refused page is not acknowledged, so it stays in its outbox, where maintenance finds it.
        if isinstance(reply, CeylonError):
            logger.error("Tasks cannot be enqueued: {}", reply)
            return
        for page in pages:
            self._groups[page.gid].page_acks.append(PageAck(page, reply))

    def _message_arrived(self, gid: str, page: Page, reply: Any) -> None:
        if isinstance(reply, CeylonError):
            logger.error("Group {} cannot be told that {} has finished: {}", gid, page.gid, reply)
            return
        self._groups[page.gid].page_acks.append(PageAck(page))  # of the group that sent the message
        if reply[0] != "GONE":  # also for NO: the group may have been told before, by a call whose answer was lost
            self._want_outbox(gid)

    def _outbox_read(self, gid: str, reply: Any) -> None:
        if isinstance(reply, CeylonError):
            logger.error("The outbox of group {} cannot be read: {}", gid, reply)
            return
        answer = transitions.outbox_reply(gid, reply)
        self._take(answer.pages)
        if answer.more:
            self._want_outbox(gid)

    def _want_outbox(self, gid: str, *, hidden: bool = False) -> None:
        """Read an outbox in the next turn; `hidden`: also pages that were hidden for a reader whose reply was lost."""
        book = self._groups[gid]
        book.wants_outbox, book.wants_hidden = True, book.wants_hidden or hidden

    def _note_names(self, batch: Sequence[tuple[Held, Committed]], pages: Iterable[Page]) -> None:
        """
        Note which tasks in the pages of a commit cannot run here: they are enqueued by name. If the answer with the
        page is lost, a relay enqueues the task like any other, and the next worker that cannot run it does the same.
        """
        names = {outcome.tid: name for _, outcome in batch if (name := waits_by_name(outcome.reason))}
        if names:
            self._by_name.update((page, names) for page in pages if not page.is_message)

    def _take(self, pages: Iterable[Page]) -> None:
        for page in pages:
            if page.is_for_follow_ups:
                self.to_relay.add(page.gid)
            elif page.is_message:
                # For the group that is named last, which waits for the one that wrote the page.
                self._groups[page.text.rpartition("|")[2]].messages.append(page)
            else:
                self._to_enqueue[page.role].append(page)

    def _acknowledge(self, held: Held, outcome: str, run_ms: int) -> None:
        delivery = held.delivery
        # By the server's clock: the fence is the time of delivery (µs), the id of the entry its time of arrival (ms).
        # A copy keeps the lineage of the original, so what was given back has waited since its first arrival.
        wait_ms = max(0, delivery.fence // 1000 - int(delivery.lineage[2:].partition("-")[0]))
        book = self._roles[delivery.role]
        book.acks.append(Ack(delivery.entry, outcome, run_ms, wait_ms))
        book.makes_due = True
        self._drop(held)
