"""Renews the leases of held deliveries in a thread of its own, so that a busy event loop loses none."""

from __future__ import annotations

import collections
import threading
import time
from collections.abc import Callable, Sequence
from typing import NamedTuple

from loguru import logger

from rq_ceylon.errors import CeylonError, ConnectionLostError
from rq_ceylon.store import transitions
from rq_ceylon.store.connection import ThreadConnection
from rq_ceylon.store.keys import Keys
from rq_ceylon.store.redis_errors import complain
from rq_ceylon.store.transitions import Committed, Delivery

ROUND_MAX_S = 10.0
"""The longest time between two rounds, and the longest that a round may take, however long the lease is."""

PAUSE_S = 0.02
"""The first pause after a round that was not answered; it doubles, up to a ninth of the lease."""


class _Lease(NamedTuple):
    """Until when an entry may be renewed (monotonic), and the delivery that runs under it, or None."""

    until: float
    running: Delivery | None


class Leases:
    """
    The entries that this worker holds, and until when each may be renewed. Renewing stops at the timeout of the attempt
    plus the grace, so that a frozen event loop cannot keep a task for ever.

    A lost connection must cost no lease. A round begins every third of the lease and must be answered within another
    third. If it is not, it is repeated at once on a new connection, until one is answered. So a connection that goes
    silent leaves at least a third of the lease to renew on the next one.

    Each round also renews in roles in which nothing is held. That keeps the clock of the role, which a worker otherwise
    keeps by fetching, and handlers that block the event loop hold up its fetches.

    Args:
        lease_ms: the lease to ask for in each of the roles.
    """

    def __init__(self, *, url: str, keys: Keys, worker: str, roles: Sequence[str], lease_ms: int) -> None:
        self._url, self._keys, self._worker = url, keys, worker
        self._on_lost: Callable[[str, str], object] = lambda role, entry: None
        self._lease_ms = dict.fromkeys(roles, lease_ms)
        self._held: dict[tuple[str, str], _Lease] = {}
        self._guard = threading.Lock()
        self._closed = False
        self._stopping = False
        self._noted: set[tuple[str, int]] = set()
        self._wake = threading.Event()
        self._thread: threading.Thread | None = None
        self.lease_s = 30.0

    def hold(self, role: str, entry: str, until: float, running: Delivery | None = None) -> None:
        """
        Renew this entry until the given `time.monotonic()`; this replaces an earlier limit.

        Args:
            running: the delivery that runs under the entry from now on.
        """
        with self._guard:
            self._held[role, entry] = _Lease(until, running)
        if self._stopping and running is not None:  # it began to run after the stop: note that on its record too
            self._wake.set()

    def drop(self, role: str, entry: str) -> None:
        with self._guard:
            self._held.pop((role, entry), None)

    def adopt(self, role: str, lease_ms: int) -> None:
        """Adopt the lease in force in a role. Rounds follow the shortest lease; if that changed, one begins now."""
        self._lease_ms[role] = lease_ms
        lease_s = min(self._lease_ms.values()) / 1000
        if lease_s != self.lease_s:
            self.lease_s = lease_s
            self._wake.set()

    def stopping(self) -> None:
        """
        Note on the records of the tasks that run here that this worker is stopping, so that losing it from now on
        counts no crash. Any thread may call this, more than once. The lease thread writes the notes, so that they are
        written even while a handler blocks the event loop.
        """
        self._stopping = True
        self._wake.set()

    def start(self, on_lost: Callable[[str, str], object]) -> None:
        """
        Args:
            on_lost: called in the lease thread with role and entry when another worker has the entry.
        """
        self._on_lost = on_lost
        self._thread = threading.Thread(target=self._run, name="ceylon-leases", daemon=True)
        self._thread.start()

    def stop(self) -> None:
        """End the thread. Leases of entries that are still held end by themselves."""
        self._closed = True
        self._wake.set()
        if self._thread is not None:
            self._thread.join(timeout=2.0)

    def _run(self) -> None:
        connection = ThreadConnection(self._url, self._round_s)
        unanswered = 0
        while True:
            pause_s = min(PAUSE_S * 2**unanswered, self.lease_s / 9, 1.0) if unanswered else self._round_s
            self._wake.wait(pause_s)
            self._wake.clear()
            if self._closed:
                break
            if connection.within_s != self._round_s:
                connection.close()
                connection = ThreadConnection(self._url, self._round_s)
            try:
                self.renew(connection)
                self._note_stopping(connection)
                unanswered = 0
            except ConnectionLostError as error:
                unanswered = min(unanswered + 1, 10)
                if unanswered == 2:  # the first loss costs no lease, so it is not worth a line
                    logger.warning("Leases cannot be renewed for now: {}", error)
            except Exception as error:  # of any kind: if this thread ended, every lease would run out
                complain("Leases cannot be renewed in this round", error)
        connection.close()

    @property
    def _round_s(self) -> float:
        return min(self.lease_s / 3, ROUND_MAX_S)

    def renew(self, connection: ThreadConnection) -> None:
        """One round: renew the entries whose limit has not passed, and report those that another worker has."""
        now = time.monotonic()
        with self._guard:
            due = [held for held, lease in self._held.items() if lease.until > now]
        asked: list[tuple[str, list[str]]] = []
        for role in self._lease_ms:  # each of them, even if nothing is held there: a renewal keeps the role's clock
            entries = [entry for of, entry in due if of == role]
            asked += [(role, entries[first : first + 500]) for first in range(0, max(len(entries), 1), 500)]
        calls = [
            transitions.renew(self._keys, role, self._worker, some, lease_ms=self._lease_ms[role])
            for role, some in asked
        ]
        # To all nodes at once, so that a node that does not answer costs no lease on another.
        lost: CeylonError | None = None
        for (role, some), replies in zip(asked, connection.run_each(calls), strict=True):
            if isinstance(replies, CeylonError):
                lost = replies
                continue
            lease_ms, *answers = replies
            self.adopt(role, int(lease_ms))
            for entry, reply in zip(some, answers, strict=True):
                # ABSENT is not lost: the entry was acknowledged, or Redis lost it. The fence decides at the commit.
                if reply == "OTHER":
                    self.drop(role, entry)
                    self._on_lost(role, entry)
        if lost is not None:
            raise lost

    def _note_stopping(self, connection: ThreadConnection) -> None:
        if not self._stopping:
            return
        with self._guard:
            running = [lease.running for lease in self._held.values() if lease.running is not None]
        by_group: dict[str, list[Delivery]] = collections.defaultdict(list)
        for delivery in running:
            if (delivery.role, delivery.fence) not in self._noted:
                by_group[delivery.gid].append(delivery)
        notes = [
            (gid, some[first : first + transitions.COMMIT_TASKS_MAX])
            for gid, some in by_group.items()
            for first in range(0, len(some), transitions.COMMIT_TASKS_MAX)
        ]
        calls = [
            transitions.commit(
                self._keys,
                gid,
                self._worker,
                [Committed(one.tid, one.fence, "stopping", "", 0, 0, b"") for one in some],
                relay_lease_ms=0,  # this thread relays nothing, so pages in the reply stay visible to all
            )
            for gid, some in notes
        ]
        for (_, some), reply in zip(notes, connection.run_each(calls), strict=True):
            if isinstance(reply, CeylonError):
                raise reply
            self._noted.update((one.role, one.fence) for one in some)
