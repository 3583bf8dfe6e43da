"""
Keeps the leases of what this worker holds, from a thread of its own, so that a busy event loop loses none.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Sequence

from loguru import logger

from rq_ceylon.errors import CeylonError
from rq_ceylon.store import transitions
from rq_ceylon.store.connection import ThreadConnection
from rq_ceylon.store.keys import Keys


class Leases:
    """
    The entries that this worker holds, and until when each may be renewed: a frozen event loop must not keep a task for
    ever, so renewing stops at the limit of the attempt plus the grace.

    Each round also keeps the clock of every role of the worker, since handlers that block the event loop hold up its
    fetches.

    Args:
        lease_ms: the lease to ask for in each of the roles.
    """

    def __init__(self, *, url: str, keys: Keys, worker: str, roles: Sequence[str], lease_ms: int) -> None:
        self._url, self._keys, self._worker = url, keys, worker
        self._on_lost: Callable[[str, str], object] = lambda role, entry: None
        self._lease_ms = dict.fromkeys(roles, lease_ms)
        self._until: dict[tuple[str, str], float] = {}
        self._guard = threading.Lock()
        self._closed = False
        self._wake = threading.Event()
        self._thread: threading.Thread | None = None
        self.lease_s = 30.0

    def hold(self, role: str, entry: str, until: float) -> None:
        """
        Renew this entry until the given `time.monotonic()`.
        """
        with self._guard:
            self._until[role, entry] = until

    def drop(self, role: str, entry: str) -> None:
        with self._guard:
            self._until.pop((role, entry), None)

    def adopt(self, role: str, lease_ms: int) -> None:
        """
        Take over the lease in force in a role: a round each third of the shortest one, the first one now.
        """
        self._lease_ms[role] = lease_ms
        lease_s = min(self._lease_ms.values()) / 1000
        if lease_s != self.lease_s:
            self.lease_s = lease_s
            self._wake.set()

    def start(self, on_lost: Callable[[str, str], object]) -> None:
        """
        Args:
            on_lost: called in the lease thread with role and entry, when an entry belongs to another worker by now.
        """
        self._on_lost = on_lost
        self._thread = threading.Thread(target=self._run, name="ceylon-leases", daemon=True)
        self._thread.start()

    def stop(self) -> None:
        """
        End the thread; what is still held runs out by itself.
        """
        self._closed = True
        self._wake.set()
        if self._thread is not None:
            self._thread.join(timeout=2.0)

    def _run(self) -> None:
        connection = ThreadConnection(self._url)
        silent = False
        while True:
            self._wake.wait(min(self.lease_s / 3, 10.0))
            self._wake.clear()
            if self._closed:
                break
            try:
                self.renew(connection)
                silent = False
            except CeylonError as error:
                if not silent:
                    logger.warning("Leases cannot be renewed for now: {}", error)
                silent = True
            except Exception:  # a thread that ended here would let every lease run out
                logger.exception("Leases could not be renewed in this round")
        connection.close()

    def renew(self, connection: ThreadConnection) -> None:
        """
        One round: renew what may be renewed, and tell of what is lost.
        """
        now = time.monotonic()
        with self._guard:
            due = [held for held, until in self._until.items() if until > now]
        asked: list[tuple[str, list[str]]] = []
        for role in self._lease_ms:
            entries = [entry for of, entry in due if of == role]
            asked += [(role, entries[first : first + 500]) for first in range(0, max(len(entries), 1), 500)]
        calls = [
            transitions.renew(self._keys, role, self._worker, some, lease_ms=self._lease_ms[role])
            for role, some in asked
        ]
        # All at the same time, so that a node that does not answer costs no lease on another.
        lost: CeylonError | None = None
        for (role, some), replies in zip(asked, connection.run_each(calls), strict=True):
            if isinstance(replies, CeylonError):
                lost = replies
                continue
            for entry, reply in zip(some, replies, strict=True):
                if reply == "OTHER":
                    self.drop(role, entry)
                    self._on_lost(role, entry)
        if lost is not None:
            raise lost
