"""
What a worker holds, and what its next round trip says. No I/O: `plan` returns calls, each with what reads its reply.

One turn is one pipeline of each node: commits of what ended since the last one, claims of what was fetched, a fetch per
role that acknowledges what earlier replies have settled, and what those replies gave to enqueue. Nothing is used in the
turn that brings it, so an entry is never acknowledged in the pipeline that commits it. What concerns a node whose turn
is still in flight waits here.
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
from rq_ceylon.worker.held import Granted, Held, Stage, Step
from rq_ceylon.worker.leases import Leases
from rq_ceylon.worker.outcome import waits_by_name

UNCLAIMED_S = 2.0
"""An entry that could not start for so long is given back: others may be idle."""

RELAY_PAGES = 500
"""In one answer of an outbox: a commit whose answer was lost may have written so many, one for each retry."""

ANY = 100_000
"""As many tasks of a name as there are slots."""

RECENT_S = 0.1
"""What finished within this time says how much to read ahead."""


class Turns:
    """
    The books of one worker.

    Args:
        slots: how many tasks may run at once.
        lease_ms: the lease to ask for.
        knows: names of the tasks that can be run here.
        shares: how many tasks of each of these names can start here now.
        may_send: whether calls on a key may be sent now; no turn has any on others.

    Attributes:
        completed: tasks whose result was counted here.
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
        shares: Callable[[Sequence[str]], dict[str, int]] = lambda names: dict.fromkeys(names, ANY),
        may_send: Callable[[str], bool],
    ) -> None:
        self.keys, self.worker, self.roles, self.slots, self.leases = keys, worker, list(roles), slots, leases
        self._may_send, self._knows, self._shares = may_send, frozenset(knows), shares
        self._roles = {role: RoleBook(lease_ms) for role in self.roles}
        self._groups: dict[str, GroupBook] = collections.defaultdict(GroupBook)
        self.held: dict[tuple[str, str], Held] = {}
        self.granted: list[Granted] = []
        self.stopping, self.completed = False, 0
        self._to_enqueue: dict[str, list[Page]] = collections.defaultdict(list)  # by role, served here or not
        self._by_name: dict[Page, Mapping[str, str]] = {}  # task → name, of those in a page that are to wait by name
        self._asks_for_suspect = False
        self._recent: collections.deque[float] = collections.deque()
        self._by_turns = list(self.roles)  # the one that was asked for entries last comes last

    # ---- what the loop asks ------------------------------------------------------------------------------------------
    @property
    def lease_ms(self) -> int:
        """The shortest lease in force in any of the roles."""
        return min(book.lease_ms for book in self._roles.values())

    @property
    def next_due_s(self) -> float | None:
        """When the next delayed entry is due, in seconds from the last fetch of its role."""
        return min((book.next_due_s for book in self._roles.values() if book.next_due_s is not None), default=None)

    @property
    def fetched_nothing(self) -> bool:
        """Was there nothing for a free slot, at the last fetch of each role?"""
        return all(book.is_empty for book in self._roles.values())

    @property
    def rest_s(self) -> float:
        """How long there is nothing to say, unless something happens."""
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
        Per role the smallest fence held here, or one more than the largest ever received: whatever is on record for
        this worker below it is not running here.
        """
        marks = {role: book.top_fence + 1 for role, book in self._roles.items()}
        for held in self.held.values():
            marks[held.delivery.role] = min(marks[held.delivery.role], held.delivery.fence)
        return marks

    def ring(self) -> None:
        """Note that there may be something to fetch; the next turn of each role does."""
        for book in self._roles.values():
            book.is_wanted = True

    def is_due(self, free: int) -> bool:
        """Is there something to say now, with so many free slots, to a node that listens?"""
        return (
            any(self._is_open(gid=gid) for gid in self._groups)
            or any(self._is_open(role=role) for role in self._to_enqueue)
            or any(book.is_wanted and self._may_fetch(role) for role, book in self._roles.items())
            or self._has_waiting(free)
            or any(self._is_open(role=role) for role in self._unstartable())
        )

    def _has_waiting(self, free: int) -> bool:
        """Is there a fetched entry to claim?"""
        waiting = (held for held in self.held.values() if held.stage is Stage.FETCHED)
        if self.stopping:
            return False
        suspect = self._may_start_suspect()
        return free > 0 and any(self._is_open(gid=held.delivery.gid) for held in waiting if suspect or not held.later)

    def _unstartable(self) -> dict[str, list[Held]]:
        """Per role, fetched entries to give back: they did not start in time, or the worker is stopping."""
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
        # The slot of a role may have moved to another node while its last fetch is still in flight.
        return not self._roles[role].is_fetching and self._is_open(role=role)

    def may_fetch(self) -> bool:
        """Does the node of any role listen?"""
        return any(self._may_fetch(role) for role in self.roles)

    def is_idle(self) -> bool:
        return not self.held and not self.is_due(0)

    def finish(self, held: Held, outcome: Committed) -> None:
        """Note the outcome of a running delivery; the next turn commits it."""
        if not self.holds(held):
            return
        if outcome.kind != "stopping":
            held.stage = Stage.ENDED
            self._recent.append(time.monotonic())
        self._groups[held.delivery.gid].outcomes.append((held, outcome))

    def forget(self, held: Held) -> None:
        """Another worker holds this delivery's task: never run, renew, commit or acknowledge it again."""
        if self.holds(held):
            name = held.delivery.role, held.delivery.entry
            del self.held[name]
            self.leases.drop(*name)

    def holds(self, held: Held) -> bool:
        """Is this delivery still this worker's, as far as it knows? The same entry may be back in another one."""
        return self.held.get((held.delivery.role, held.delivery.entry)) is held

    # ---- plan --------------------------------------------------------------------------------------------------------
    def plan(self, free: int) -> list[Step]:
        """The calls of the next turn, with so many slots free."""
        groups = {gid: self._groups.pop(gid) for gid in list(self._groups) if self._is_open(gid=gid)}
        return [
            *self._commits(groups),
            *self._claims(free),
            *self._releases(),
            *self._fetches(free),
            *self._enqueues(),
            *self._deliveries(groups),
            *self._relays(groups),
        ]

    def _commits(self, groups: Mapping[str, GroupBook]) -> Iterable[Step]:
        for gid, book in groups.items():
            if not book.outcomes and not book.page_acks:
                continue
            acks, most = book.page_acks, transitions.COMMIT_TASKS_MAX
            for batch in transitions.in_batches(book.outcomes, lambda ended: len(ended[1].blob), most):
                call = transitions.commit(self.keys, gid, self.worker, [o for _, o in batch], acks)
                acks = []
                yield Step(call, partial(self._committed, gid, batch))

    def _claims(self, free: int) -> Iterable[Step]:
        if self.stopping:
            return
        free -= sum(held.stage is Stage.CLAIMING for held in self.held.values())
        suspect = self._may_start_suspect()
        by_group: dict[str, list[Held]] = collections.defaultdict(list)
        for held in self.held.values():
            if free <= 0:
                break
            gid = held.delivery.gid
            may_ask = held.stage is Stage.FETCHED and (suspect or not held.later)
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
                suspect = False  # one claim at a time may start one

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
        left = 0 if self.stopping else max(0, free - stages[Stage.CLAIMING] + ahead)
        # What is given back here is for workers that are idle: not fetched again beside that.
        releasing = {held.delivery.role for held in self.held.values() if held.stage is Stage.RELEASING}
        roles = [role for role in self._by_turns if self._may_fetch(role)]
        has_room = left > 0
        for number, role in enumerate(roles):
            # All roles together give no more than can start; where that is less than one each, they take turns.
            budget = 0 if role in releasing else -(-left // (len(roles) - number))
            left -= budget
            if budget > 0:
                self._by_turns.remove(role)
                self._by_turns.append(role)
                self._roles[role].is_empty = False
            if budget > 0 or not has_room:
                self._roles[role].is_wanted = False
            elif not self._roles[role].acks and not self._roles[role].is_recovering:
                continue  # its turn comes
            yield self._fetch(role, budget)

    def _fetch(self, role: str, budget: int) -> Step:
        book = self._roles[role]
        book.is_fetching, book.next_due_s = True, None
        acks, book.acks = book.acks, []
        recover = [entry for of, entry in self.held if of == role] if book.is_recovering else None
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
        return Step(call, partial(self._fetched, role, budget, names), partial(self._fetch_lost, role, acks))

    def _enqueues(self) -> Iterable[Step]:
        for role in [role for role in self._to_enqueue if self._is_open(role=role)]:
            some = self._to_enqueue.pop(role)
            if (book := self._roles.get(role)) is not None:  # other roles are never fetched here
                # A fetch must see the new entries before this role counts as empty.
                book.is_empty, book.is_wanted = False, True
            by_name = [(page.gid, self._by_name.pop(page, {})) for page in some]
            names = {(gid, tid): name for gid, tasks in by_name for tid, name in tasks.items()}
            call = transitions.enqueue(self.keys, role, some, names=names)
            yield Step(call, partial(self._enqueued, some))

    def _deliveries(self, groups: Mapping[str, GroupBook]) -> Iterable[Step]:
        for gid, book in groups.items():
            for page in book.messages:
                call = transitions.deliver(self.keys, page)
                yield Step(call, partial(self._delivered, gid, page))

    def _relays(self, groups: Mapping[str, GroupBook]) -> Iterable[Step]:
        for gid in [gid for gid, book in groups.items() if book.relays]:
            call = transitions.outbox(self.keys, gid, wanted=RELAY_PAGES, again=groups[gid].relays_hidden)
            yield Step(call, partial(self._relayed, gid), partial(self._relay, gid, again=True))

    # ---- absorb ------------------------------------------------------------------------------------------------------
    def _committed(self, gid: str, batch: Sequence[tuple[Held, Committed]], reply: Any) -> None:
        if isinstance(reply, CeylonError):
            logger.error("Outcomes of group {} cannot be recorded: {}", gid, reply)
            for held, _ in batch:
                self.forget(held)
            return
        answer = transitions.commit_reply(gid, reply, len(batch))
        for (held, outcome), verdict in zip(batch, answer.verdicts, strict=True):
            if verdict == "STALE":
                self.forget(held)
            elif outcome.kind != "stopping":
                self.completed += verdict == "OK" and outcome.kind == "completed"
                self._acknowledge(held, outcome.kind if verdict == "OK" else "stale", outcome.run_ms)
        self._note_names(batch, answer.pages)
        self._take(answer.pages)
        if answer.more or "DONE" in answer.verdicts:
            self._relay(gid, again="DONE" in answer.verdicts)

    def _claimed(self, batch: Sequence[Held], suspect: bool, reply: Any) -> None:
        self._asks_for_suspect &= not suspect
        if isinstance(reply, CeylonError):
            logger.error("Tasks of group {} cannot be claimed: {}", batch[0].delivery.gid, reply)
            for held in batch:
                self.forget(held)
            return
        answer = transitions.claim_reply(reply, len(batch))
        for held, claimed in zip(batch, answer.answers, strict=True):
            if not self.holds(held):
                continue  # its lease was lost meanwhile, so what it would do counts for nothing
            match claimed.verdict:
                case "GRANTED":
                    held.stage, held.later = Stage.RUNNING, False
                    held.is_suspect = claimed.crashes >= transitions.SUSPECT_CRASHES
                    self.granted.append(Granted(held, claimed, answer.defaults, answer.stop))
                case "LATER":
                    held.stage, held.later = Stage.FETCHED, True
                case "LOST":
                    self.forget(held)
                case verdict:
                    if verdict in ("DONE", "PARKED", "OUTDATED"):
                        # What follows from that end, parking or retry may still be in the outbox. If the entry was
                        # given back, its worker may have died right after its commit: the pages are hidden for it.
                        was_given_back = held.delivery.lineage != held.delivery.entry
                        self._relay(held.delivery.gid, again=was_given_back)
                    if claimed.words:
                        level = "WARNING" if claimed.reason == "expired" else "ERROR"  # the former was asked for
                        task, words = f"{held.delivery.gid}/{held.delivery.tid}", "{} is over ({}): {}"
                        logger.log(level, words, task, claimed.reason, claimed.words)
                    self._acknowledge(held, "stale", 0)

    def _fetched(self, role: str, budget: int, names: Collection[str], reply: Any) -> None:
        book = self._roles[role]
        book.is_fetching = False
        if isinstance(reply, CeylonError):
            logger.error("Role {} cannot be read: {}", role, reply)
            return
        answer = transitions.fetch_reply(role, reply)
        book.is_recovering = False
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
            book.is_wanted = True  # it did not know these names when it asked
        now = time.monotonic()
        for delivery in answer.deliveries:
            book.top_fence = max(book.top_fence, delivery.fence)
            mine = self.held.get((role, delivery.entry))
            # We reclaimed our own entry: its lease ran out although we are alive. What runs goes on under the recorded
            # fence; do not start it again.
            if mine is not None and mine.stage is not Stage.FETCHED:
                continue
            self.held[role, delivery.entry] = Held(delivery, now)
            self.leases.hold(role, delivery.entry, now + UNCLAIMED_S + 2 * answer.lease_ms / 1000)

    def _fetch_lost(self, role: str, acks: list[Ack]) -> None:
        book = self._roles[role]
        book.is_fetching = False
        book.is_recovering = book.is_wanted = True
        book.acks += acks

    def _released(self, stale: Sequence[Held], reply: Any) -> None:
        if isinstance(reply, CeylonError):
            logger.error("Entries of role {} cannot be given back: {}", stale[0].delivery.role, reply)
        for held in stale:
            self.forget(held)

    def _enqueued(self, pages: Sequence[Page], reply: Any) -> None:
        # A refused page stays in its outbox, where maintenance finds it.
        if isinstance(reply, CeylonError):
            logger.error("Tasks cannot be enqueued: {}", reply)
            return
        for page in pages:
            self._groups[page.gid].page_acks.append(PageAck(page, reply))

    def _delivered(self, gid: str, page: Page, reply: Any) -> None:
        if isinstance(reply, CeylonError):
            logger.error("Group {} cannot be told that {} has finished: {}", gid, page.gid, reply)
            return
        self._groups[page.gid].page_acks.append(PageAck(page))
        if reply[0] != "GONE":  # NO too: it may have been told by an answer that was lost
            self._relay(gid)

    def _relayed(self, gid: str, reply: Any) -> None:
        if isinstance(reply, CeylonError):
            logger.error("The outbox of group {} cannot be read: {}", gid, reply)
            return
        answer = transitions.outbox_reply(gid, reply)
        self._take(answer.pages)
        if answer.more:
            self._relay(gid)

    def _relay(self, gid: str, *, again: bool = False) -> None:
        """Look through an outbox in the next turn; again: an answer that had pages for this worker may be lost."""
        book = self._groups[gid]
        book.relays, book.relays_hidden = True, book.relays_hidden or again

    def _note_names(self, batch: Sequence[tuple[Held, Committed]], pages: Iterable[Page]) -> None:
        """
        Of the pages of a commit, those of tasks that cannot run here are enqueued by name. Where the answer with its
        page is lost, the task goes to any worker once more.
        """
        names = {outcome.tid: name for _, outcome in batch if (name := waits_by_name(outcome.reason))}
        if names:
            self._by_name.update((page, names) for page in pages if not page.is_message)

    def _take(self, pages: Iterable[Page]) -> None:
        for page in pages:
            if page.is_message:
                self._groups[page.text.rpartition("|")[2]].messages.append(page)
            else:
                self._to_enqueue[page.role].append(page)

    def _acknowledge(self, held: Held, outcome: str, run_ms: int) -> None:
        delivery = held.delivery
        # By the server's clock: a fence is its time of delivery in µs, an entry id its time of arrival in ms.
        wait_ms = max(0, delivery.fence // 1000 - int(delivery.lineage[2:].partition("-")[0]))
        book = self._roles[delivery.role]
        book.acks.append(Ack(delivery.entry, outcome, run_ms, wait_ms))
        book.is_wanted = True
        self.forget(held)
