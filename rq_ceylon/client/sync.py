"""The client without await: the same code on an event loop in a thread of its own."""

from __future__ import annotations

import asyncio
import os
import threading
from collections.abc import AsyncIterator, Callable, Coroutine, Iterable, Iterator
from typing import Any, Generic, Literal, Self, TypeVar, overload

from rq_ceylon.attempt import refuse_to_block
from rq_ceylon.client.client import Client
from rq_ceylon.client.handles import GroupHandle, TaskHandle
from rq_ceylon.errors import CeylonError
from rq_ceylon.models import Durability, Duration, Task, TaskGroup, TaskStatus
from rq_ceylon.store.events import Event
from rq_ceylon.views import AttemptError, GroupView, RoleView, TaskResult, TaskView, WorkerView

R = TypeVar("R")
T = TypeVar("T")

_NOT_OPEN = "this client is not open, or was closed; use `with app.sync_client() as client`"

OF_PARENTS: list[Any] = []
"""Loops and clients that a forked child inherited and must neither use nor end."""


class SyncClient:
    """
    `Client` without await, for scripts, threads and notebooks.

        with app.sync_client() as client:
            run = client.submit(TaskGroup("thumbnails", tasks))
            print(run.wait("all", timeout=600))

    It runs the same code on an event loop in a thread of its own. Any number of threads may share a client. A call made
    within a running event loop blocks that loop. After a fork, the child opens a new connection. Methods, arguments and
    errors are those of `Client`. When `submit` of a single task returns, its role has it too, so the process may end
    right after.
    """

    def __init__(self, make: Callable[[], Client]) -> None:
        self._make = make
        self._loop: asyncio.AbstractEventLoop | None = None
        self._inner: Client | None = None
        self._pid = 0

    def open(self) -> Self:
        """
        Connect; does nothing if the client is open. A closed client may be opened again.

        Raises:
            RedisError: as `Client.open`.
        """
        if self._loop is not None and self._pid == os.getpid():
            return self
        if self._loop is not None:
            # Forked: the thread of this loop runs in the parent only. Keep what is its: its end is not ours to bring.
            OF_PARENTS.append((self._loop, self._inner))
        self._loop, self._pid = asyncio.new_event_loop(), os.getpid()
        self._thread = threading.Thread(target=self._loop.run_forever, name="ceylon-client", daemon=True)
        self._thread.start()

        async def connect() -> Client:
            return await self._make().open()

        try:
            self._inner = self.call(connect())
        except BaseException:
            self._end()
            raise
        return self

    def close(self) -> None:
        """Disconnect. May be called twice; does nothing in a forked child, since its parent owns the thread."""
        if self._loop is not None and self._pid == os.getpid():
            self.call(self.inner.close())
            self._inner = None
            self._end()

    def _end(self) -> None:
        if self._loop is not None:
            self._loop.call_soon_threadsafe(self._loop.stop)
            self._thread.join()
            self._loop.close()
            self._loop = None

    def __enter__(self) -> Self:
        return self.open()

    def __exit__(self, *_: object) -> None:
        self.close()

    @property
    def inner(self) -> Client:
        """
        The client of this process. A forked child gets a new one, and the parent keeps its own.

        Raises:
            CeylonError: the client was not opened, or was closed.
        """
        if self._inner is None:
            raise CeylonError(_NOT_OPEN)
        if self._loop is None or self._pid != os.getpid():
            self.open()
        return self._inner

    def call(self, coroutine: Coroutine[Any, Any, T]) -> T:
        """Run a coroutine of `inner`, or of a handle that uses it, and return its result."""
        if self._loop is None:
            coroutine.close()
            raise CeylonError(_NOT_OPEN)
        return asyncio.run_coroutine_threadsafe(coroutine, self._loop).result()

    def iterate(self, items: AsyncIterator[T]) -> Iterator[T]:
        """Yield the items of an async iterator."""
        refuse_to_block("following a group", "`async for` with a client of `async with app.client()`")
        end = object()

        async def following() -> Any:
            return await anext(items, end)

        while (item := self.call(following())) is not end:
            yield item

    @overload
    def submit(
        self, work: Task, *, require_workers: bool = False, durability: Durability = "none"
    ) -> SyncTaskHandle[Any]: ...
    @overload
    def submit(
        self, work: TaskGroup, *, require_workers: bool = False, durability: Durability = "none"
    ) -> SyncGroupHandle: ...

    def submit(
        self, work: Task | TaskGroup, *, require_workers: bool = False, durability: Durability = "none"
    ) -> SyncTaskHandle[Any] | SyncGroupHandle:
        """As `Client.submit`."""
        submit = self.inner.submit
        if isinstance(work, TaskGroup):
            group = self.call(submit(work, require_workers=require_workers, durability=durability))
            return SyncGroupHandle(self, group)
        return SyncTaskHandle(self, self.call(submit(work, require_workers=require_workers, durability=durability)))

    def task(self, task_id: str) -> SyncTaskHandle[Any]:
        return SyncTaskHandle(self, self.inner.task(task_id))

    def group(self, gid: str) -> SyncGroupHandle:
        return SyncGroupHandle(self, self.inner.group(gid))

    def groups(self) -> list[GroupView]:
        return self.call(self.inner.groups())

    def failures(
        self,
        *,
        group: str | None = None,
        role: str | None = None,
        name: str | None = None,
        error: str | None = None,
        since: Duration | None = None,
    ) -> Iterator[TaskView]:
        return self.iterate(self.inner.failures(group=group, role=role, name=name, error=error, since=since))

    def workers(self) -> list[WorkerView]:
        return self.call(self.inner.workers())

    def roles(self) -> list[RoleView]:
        return self.call(self.inner.roles())

    def pause_role(self, role: str) -> None:
        self.call(self.inner.pause_role(role))

    def resume_role(self, role: str) -> None:
        self.call(self.inner.resume_role(role))

    def set_lease(self, role: str, lease: Duration) -> float:
        return self.call(self.inner.set_lease(role, lease))


class SyncTaskHandle(Generic[R]):
    """
    `TaskHandle` without await: waits for a submitted task, shows its state, and cancels it. The `id` is valid in any
    process.
    """

    def __init__(self, client: SyncClient, handle: TaskHandle[R]) -> None:
        self._client, self._handle = client, handle

    def __repr__(self) -> str:
        return f"<Sync{repr(self._handle)[1:]}"

    @property
    def _bound(self) -> TaskHandle[R]:
        return self._handle.through(self._client.inner)

    @property
    def id(self) -> str:
        return self._handle.id

    def result(self, timeout: float | None = None) -> R:
        """
        As `TaskHandle.result`.

        Raises:
            CeylonError: it would block the event loop of a worker.
        """
        refuse_to_block("handle.result()", "`await (await task.aenqueue(...)).result()`")
        return self._client.call(self._bound.result(timeout))

    def view(self) -> TaskView:
        return self._client.call(self._bound.view())

    def errors(self) -> list[AttemptError]:
        return self._client.call(self._bound.errors())

    def status(self) -> TaskStatus:
        return self._client.call(self._bound.status())

    def cancel(self) -> str:
        return self._client.call(self._bound.cancel())

    def retry(self) -> None:
        self._client.call(self._bound.retry())


class SyncGroupHandle:
    """
    `GroupHandle` without await: waits for a submitted group, follows it, and cancels it. `progress`, `events`,
    `results` and `tasks` are plain iterators here.
    """

    def __init__(self, client: SyncClient, handle: GroupHandle) -> None:
        self._client, self._handle = client, handle

    def __repr__(self) -> str:
        return f"<Sync{repr(self._handle)[1:]}"

    @property
    def _bound(self) -> GroupHandle:
        return self._handle.through(self._client.inner)

    @property
    def id(self) -> str:
        return self._handle.id

    @property
    def name(self) -> str:
        return self._handle.name

    @property
    def repeated(self) -> bool:
        return self._handle.repeated

    def task(self, tid: str) -> SyncTaskHandle[Any]:
        return SyncTaskHandle(self._client, self._handle.task(tid))

    def view(self) -> GroupView:
        return self._client.call(self._bound.view())

    def wait(self, until: Literal["goal", "all"] = "goal", timeout: float | None = None) -> GroupView:
        """
        As `GroupHandle.wait`.

        Raises:
            CeylonError: it would block the event loop of a worker.
        """
        refuse_to_block("wait()", "`await run.wait()` with a client of `async with app.client()`")
        return self._client.call(self._bound.wait(until, timeout))

    def progress(self) -> Iterator[GroupView]:
        return self._client.iterate(self._bound.progress())

    def events(self, start: int = 1) -> Iterator[Event]:
        return self._client.iterate(self._bound.events(start))

    def results(self) -> Iterator[TaskResult]:
        return self._client.iterate(self._bound.results())

    def tasks(self) -> Iterator[TaskView]:
        return self._client.iterate(self._bound.tasks())

    def add(self, tasks: Iterable[Task]) -> int:
        return self._client.call(self._bound.add(tasks))

    def seal(self) -> str:
        return self._client.call(self._bound.seal())

    def retry(self, tasks: Iterable[str] | None = None, *, cancelled: bool = False) -> int:
        return self._client.call(self._bound.retry(tasks, cancelled=cancelled))

    def remove(self) -> bool:
        return self._client.call(self._bound.remove())

    def cancel(self) -> str:
        return self._client.call(self._bound.cancel())

    def pause(self) -> str:
        return self._client.call(self._bound.pause())

    def resume(self) -> str:
        return self._client.call(self._bound.resume())
