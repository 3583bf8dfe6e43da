"""
Waits for groups and their tasks. All waiters of a group share one reader, its *follower*.

A notification says only "look now", and may be lost. Redis may be away, or come back without its data. So a follower
looks by itself every few seconds, starts over after a lost connection, and tells all its waiters if the group is gone.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Awaitable, Callable, Collection, Iterator, Sequence
from contextlib import contextmanager, suppress
from itertools import islice
from typing import Any

from rq_ceylon.errors import CeylonError, ConnectionLostError, NotFoundError
from rq_ceylon.models import GroupStatus, TaskStatus
from rq_ceylon.store import queries
from rq_ceylon.store.connection import Connection
from rq_ceylon.store.events import LOOK_S, EventHub, Watch
from rq_ceylon.store.keys import Keys
from rq_ceylon.views import GroupView, TaskResult

log = logging.getLogger("rq_ceylon")

NO_WORKER_S = 10.0
"""How long a task may wait before the client checks that a worker can run it; it warns if there is none."""

REMIND_TASKS_MAX = 1000
RESULTS_PER_READ = 500

FEW = 100
"""If at most this many tasks have waiters, each look reads all their results, which is cheaper than reading events."""

CLOSED = (GroupStatus.CLOSING, GroupStatus.FINISHED)
RECONNECT_S = 0.2

Warn = Callable[[Collection[tuple[str, str]]], Awaitable[None]]


class Following:
    """The followers of one client: one per group that has waiters."""

    def __init__(self, connection: Connection, keys: Keys, hub: EventHub, warn: Warn) -> None:
        self._readers: set[asyncio.Task[None]] = set()
        self._shared = self._readers, connection, keys, hub, warn
        self._followers: dict[str, Follower] = {}

    @contextmanager
    def follow(self, gid: str) -> Iterator[Follower]:
        """Share the follower of a group with its other waiters. Its reader ends when the last of them leaves."""
        follower = self._followers.get(gid)
        if follower is None:
            follower = self._followers[gid] = Follower(gid, *self._shared)
        follower.holders += 1
        try:
            yield follower
        finally:
            follower.holders -= 1
            if not follower.holders:
                self._followers.pop(gid, None)
                follower.wake()

    async def close(self) -> None:
        """End all readers, also those that are about to end by themselves: after this, none may use the connection."""
        for follower in self._followers.values():
            follower.close()
        for reader in self._readers:
            reader.cancel()
        await asyncio.gather(*self._readers, return_exceptions=True)


class Follower:
    """
    Reads the events of one group for all its waiters: each event once, and only the results of tasks with a waiter.

    Its state:

    - `_results`: per task, the futures of its waiters; `_new`: the tasks that were not asked for yet.
    - `_changes`: per waiter for a change of the group, the view that it has seen.
    - `_seq`: events up to this number need no reading: each was read, or the results of all waited-for tasks were read
      after it.
    - `_created_ms`: when the group was created, as the first look told; None before that. A group under the same id
      with another time is another group.

    Attributes:
        holders: how many waiters share this follower.
    """

    def __init__(
        self,
        gid: str,
        readers: set[asyncio.Task[None]],
        connection: Connection,
        keys: Keys,
        hub: EventHub,
        warn: Warn,
    ) -> None:
        self._gid, self._readers = gid, readers
        self._connection, self._keys, self._hub, self._warn = connection, keys, hub, warn
        self.holders = 0
        self._results: dict[str, list[asyncio.Future[TaskResult]]] = {}
        self._new: set[str] = set()
        self._changes: dict[asyncio.Future[GroupView], GroupView | None] = {}
        self._reader: asyncio.Task[None] | None = None
        self._watch: Watch | None = None
        self._seq = 0
        self._created_ms: int | None = None
        self._closed = False

    # ---- waiters -----------------------------------------------------------------------------------------------------
    async def result(self, tid: str) -> TaskResult:
        """
        Wait for the result of a task.

        Raises:
            NotFoundError: the group or the task is not known, or not any more.
        """
        future: asyncio.Future[TaskResult] = asyncio.get_running_loop().create_future()
        self._results.setdefault(tid, []).append(future)
        self._new.add(tid)
        try:
            self._start_or_wake()
            return await future
        finally:
            waiting = self._results.get(tid, [])
            if future in waiting:
                waiting.remove(future)
                if not waiting:
                    del self._results[tid]

    async def change(self, seen: GroupView | None) -> GroupView:
        """
        Wait until the group differs from `seen`, and return it.

        Raises:
            NotFoundError: the group is not known, or not any more.
        """
        future: asyncio.Future[GroupView] = asyncio.get_running_loop().create_future()
        self._changes[future] = seen
        try:
            self._start_or_wake()
            return await future
        finally:
            self._changes.pop(future, None)

    def wake(self) -> None:
        """Look at once, as after a notification."""
        if self._watch is not None:
            self._watch.tell(self._gid)

    def close(self) -> None:
        self._closed = True
        self._fail(_closed_words())

    def _start_or_wake(self) -> None:
        if self._closed:
            raise _closed_words()
        if self._reader is None or self._reader.done():
            self._reader = asyncio.create_task(self._run(), name=f"follow {self._gid}")
            self._readers.add(self._reader)
            self._reader.add_done_callback(self._readers.discard)
        else:
            self.wake()

    # ---- the reader --------------------------------------------------------------------------------------------------
    async def _run(self) -> None:
        try:
            async with self._hub.watch(self._gid) as self._watch:
                await self._follow(self._watch)
        except Exception as error:  # of any kind: without a reader, the waiters would wait for ever
            self._fail(error)

    async def _follow(self, watch: Watch) -> None:
        """
        Look again and again, until the last waiter has left: after each notification, and at least every `LOOK_S`.

        A look is *fresh* if it may not trust what earlier ones have read, since the group may have changed unheard: the
        first look, one after a lost connection, and one after a wait in which nothing was told or the subscription was
        made anew.
        """
        fresh, is_away = True, False
        waited: set[str] = set(self._results)
        remind_at = time.monotonic() + NO_WORKER_S
        while self.holders:
            try:
                if self._results or self._changes:
                    await self._look(fresh=fresh)
                # Remind only of tasks that had a waiter at the last reminder too, and so have waited for a while.
                if time.monotonic() >= remind_at:
                    await self._remind(waited)
                    waited, remind_at = set(self._results), time.monotonic() + NO_WORKER_S
                is_away = False
            except ConnectionLostError as error:
                if not is_away:
                    log.warning("Waiting for group %s goes on once Redis answers: %s", self._gid, error)
                fresh = is_away = True
                await asyncio.sleep(RECONNECT_S)
                continue
            told = await watch.wait(min(LOOK_S, max(0.0, remind_at - time.monotonic())))
            fresh = not told or None in told  # None: the subscription is new

    async def _look(self, *, fresh: bool) -> None:
        """
        Give their results to all waiters whose tasks have ended, and the group to the waiters for a change of it.

        A fresh look asks for the results of all tasks with waiters, and so does every look if they are few. Any other
        look asks for the tasks with new waiters, and for those that ended according to the events since `_seq`.

        With new waiters, and in a fresh look, it asks too whether the tasks exist, so that a waiter for a task that the
        group does not have is told. Otherwise not: what was found once exists until it ends, unless Redis lost it.
        """
        new, self._new = self._new, set()  # if this look fails, the next one is fresh and asks for them
        check_exist = fresh or bool(new)
        asks_for_all = fresh or len(self._results) <= FEW
        view = await self._ask(list(self._results if asks_for_all else new), check_exist=check_exist)
        # `view` was read before the results. So if all were asked for, events up to `view.events` need no reading.
        if asks_for_all:
            self._seq = view.events
        # Closing a group ends its open tasks without an event for each, so ask for all. Likewise if there are fewer
        # events than before: Redis came back with older data.
        elif view.status in CLOSED or view.events < self._seq:
            self._seq = view.events
            await self._ask(list(self._results))
        elif ended := await self._ended(view.events) & self._results.keys():
            await self._ask(list(ended))
        for future, seen in list(self._changes.items()):
            if view != seen and not future.done():
                future.set_result(view)

    async def _ask(self, tids: Sequence[str], *, check_exist: bool = False) -> GroupView:
        """
        Give the results of these tasks to their waiters, as far as they have one. Returns the group as it was before
        the first result was read. With `check_exist`, waiters for tasks that do not exist get a NotFoundError.
        """
        # That of the first batch. A later one knows more events, and tasks of earlier batches may have ended in them
        # after they were asked for.
        view = None
        for first in range(0, len(tids) or 1, RESULTS_PER_READ):
            some = tids[first : first + RESULTS_PER_READ]
            now, found, missing = await self._ask_once(some, check_exist=check_exist)
            view = view or now
            for tid, result in found.items():
                self._tell(tid, result)
            for tid in missing:
                self._tell(tid, NotFoundError(f"group {self._gid!r} has no task {tid!r}, or no longer"))
            left = [tid for tid in some if tid not in found]
            # In a closed group, an open task that does not run is cancelled, though no result was written for it.
            if now.status in CLOSED and left:
                for task in await queries.some_tasks(self._connection, self._keys, self._gid, left):
                    if task.result is not None:
                        self._tell(task.task_id, task.result)
        assert view is not None
        return view

    async def _ask_once(
        self, tids: Sequence[str], *, check_exist: bool
    ) -> tuple[GroupView, dict[str, TaskResult], set[str]]:
        try:
            answer = await queries.group_and_results(
                self._connection, self._keys, self._gid, tids, check_exist=check_exist
            )
        except NotFoundError:
            if self._created_ms is None:  # never seen; else the group was there, and Redis lost it
                raise
            raise self._lost() from None
        # A key always gives the same id, so the group may have been submitted again. Then this is another group, whose
        # events begin at 1.
        if self._created_ms not in (None, answer[0].created_ms):
            raise self._lost()
        self._created_ms = answer[0].created_ms
        return answer

    def _lost(self) -> NotFoundError:
        return NotFoundError(
            f"group {self._gid!r} is no longer known in namespace {self._keys.namespace!r}: Redis has lost it, as a "
            "server does that starts anew without its data; submit it again"
        )

    async def _ended(self, last: int) -> set[str]:
        """The tasks named by the events after `_seq`, up to event `last`. Moves `_seq` forward."""
        ended: set[str] = set()
        async for batch in queries.new_events(self._connection, self._keys, self._gid, self._seq, last):
            ended.update(task.tid for event in batch for task in event.tasks)
            self._seq = batch[-1].seq
        return ended

    async def _remind(self, waited: set[str]) -> None:
        """
        Warn if no worker can run tasks that have not started. The tasks are those that have had a waiter since the last
        reminder, 20 at most. If a waiter waits for the group itself, its tasks count too, up to 1,000 in all.
        """
        stuck = list(islice((tid for tid in self._results if tid in waited), 20))
        with suppress(CeylonError):  # the next look raises it too
            tasks = await queries.some_tasks(self._connection, self._keys, self._gid, stuck)
            if self.holders > sum(map(len, self._results.values())):
                async for task in queries.tasks(self._connection, self._keys, self._gid):
                    tasks.append(task)
                    if len(tasks) == REMIND_TASKS_MAX:
                        break
            waiting = (TaskStatus.WAITING, TaskStatus.PENDING)
            await self._warn({(task.role, task.uses) for task in tasks if task.status in waiting})

    def _tell(self, tid: str, result: TaskResult | NotFoundError) -> None:
        for future in self._results.pop(tid, []):
            if future.done():
                continue
            if isinstance(result, NotFoundError):
                future.set_exception(result)
            else:
                future.set_result(result)

    def _fail(self, error: Exception) -> None:
        futures: list[asyncio.Future[Any]] = [future for some in self._results.values() for future in some]
        for future in (*futures, *self._changes):
            if not future.done():
                future.set_exception(error)
        self._results, self._new = {}, set()


def _closed_words() -> CeylonError:
    return CeylonError("the client was closed while this waited; the submitted tasks go on")
