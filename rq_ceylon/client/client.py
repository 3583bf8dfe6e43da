"""The client: submits tasks and groups, and finds them again."""

from __future__ import annotations

from collections.abc import AsyncIterator
from typing import Any, Self, overload

from rq_ceylon.client.handles import GroupHandle, TaskHandle
from rq_ceylon.client.rolling import Rolling
from rq_ceylon.client.session import Session
from rq_ceylon.client.submission import Submission
from rq_ceylon.errors import InvalidInputError, NotFoundError
from rq_ceylon.handlers import Registry
from rq_ceylon.models import Durability, Duration, Task, TaskGroup, check_id, check_lease, seconds
from rq_ceylon.settings import retention_ms
from rq_ceylon.staging import handler_of, stage
from rq_ceylon.store import queries, transitions
from rq_ceylon.store.durability import check_durability
from rq_ceylon.views import GroupView, RoleView, TaskView, WorkerView

LONG_DELAY_MS = 600_000
"""Tasks due later than this go to a rolling group of their own, so that they do not pin the results of others."""


class Client(Session):
    """
    A connection to Redis that submits tasks and groups, and follows them.

        async with app.client() as client:
            run = await client.submit(TaskGroup("thumbnails", tasks, goal="completed >= 95%"))
            print(await run.wait("goal"))

    Concurrent submissions and waits share their round trips, so one client serves any number of them. It belongs to one
    event loop and one process; `app.sync_client()` is the same without await, for any thread.

    Args:
        url: URL of Redis.
        namespace: keeps applications that share one Redis apart.
        registry: handlers known here. The arguments of their tasks are checked before anything is sent, and their
            results are converted to the annotated type.
    """

    def __init__(self, url: str, *, namespace: str = "ceylon", registry: Registry | None = None) -> None:
        super().__init__(url, namespace, registry)
        self._rolling: dict[tuple[bool, Durability, int], Rolling] = {}

    async def open(self) -> Self:
        """
        Connect, and refuse an unsuitable server.

        Raises:
            RedisError: Redis is not reachable (the client does not retry), too old, evicting, or of another kind.
        """
        try:
            await self.connect()
        except BaseException:
            # `async with` closes only what was opened; a connection left open is collected after its loop has closed.
            await self.disconnect()
            raise
        return self

    async def close(self) -> None:
        """
        Finish the submissions under way and disconnect. Submitted tasks go on; calls that still wait for them here
        raise an error.
        """
        for rolling in self._rolling.values():
            await rolling.close()
        await self.disconnect()

    async def __aenter__(self) -> Self:
        return await self.open()

    async def __aexit__(self, *_: object) -> None:
        await self.close()

    @overload
    async def submit(
        self, work: Task, *, require_workers: bool = False, durability: Durability = "none"
    ) -> TaskHandle[Any]: ...
    @overload
    async def submit(
        self, work: TaskGroup, *, require_workers: bool = False, durability: Durability = "none"
    ) -> GroupHandle: ...

    async def submit(
        self, work: Task | TaskGroup, *, require_workers: bool = False, durability: Durability = "none"
    ) -> TaskHandle[Any] | GroupHandle:
        """
        Submit a task or a group; returns once Redis has it.

        Args:
            require_workers: refuse the submission if a role has no live worker.
            durability: `replica` returns once a replica of the server has the submission too, `fsync` once it is in the
                append-only file on the disk (Redis or Valkey 7.2). Both wait for up to 5 s. Single tasks submitted
                meanwhile share the next wait. The wait does not cover entries of roles, since these are put back from
                the group.

        Raises:
            InvalidInputError: something in the task or group cannot be used; nothing was written.
            GoalImpossibleError: a goal could hold in no outcome; nothing is kept.
            GroupExistsError: the key was used for other content.
            NoWorkerError: see `require_workers`; nothing was written.
            QueueFullError: Redis is at its memory limit.
            DurabilityError: see `durability`; if its `id` is empty, nothing was written.
            ConnectionLostError: no answer for 5 s. Submitting again is safe for a group with a key.
        """
        self.check_owner()
        check_durability(durability)
        if isinstance(work, TaskGroup):
            submission = Submission(self, work, durability)
            is_new = await submission.run(require_workers=require_workers)
            return GroupHandle(self, submission.gid, name=work.name, repeated=not is_new)
        if work.needs or work.id is not None:
            raise InvalidInputError(
                "a single task can neither need others nor choose its id; submit it in a TaskGroup (with a key, if the "
                "submission is to be repeatable)"
            )
        ready = stage(work, self.registry)
        if require_workers:
            await self.require_workers([ready.role])
        keep_ms = retention_ms(work.retention, "retention")
        kind = (ready.delay_ms or 0) > LONG_DELAY_MS, durability, keep_ms
        if kind not in self._rolling:
            self._rolling[kind] = Rolling(self, durability, keep_ms)
        rolling = self._rolling[kind]
        gid, tid = await rolling.submit(ready)
        handler = handler_of(work, work.uses, self.registry)
        return TaskHandle(self, gid, tid, handler)

    # ---- look up -----------------------------------------------------------------------------------------------------
    def task(self, task_id: str) -> TaskHandle[Any]:
        """
        The handle of a task, made from its id, `<group>/<task>`, in any process. Does not ask Redis.

        Raises:
            InvalidInputError: it cannot be the id of a task.
        """
        gid, _, tid = task_id.partition("/")
        if not gid or not tid:
            raise InvalidInputError(
                f"task id {task_id!r} is not usable; give <group>/<task>, such as 06h0ql7fl6apk73bpl93/1"
            )
        return TaskHandle(self, check_id(gid, "group id"), check_id(tid, "task id"))

    def group(self, gid: str) -> GroupHandle:
        """
        The handle of a group, made from its id, in any process. Does not ask Redis.

        Raises:
            InvalidInputError: it cannot be the id of a group.
        """
        return GroupHandle(self, check_id(gid, "group id"))

    async def groups(self) -> list[GroupView]:
        """All groups of the namespace, oldest first."""
        return await queries.groups(self.connection, self.keys)

    async def failures(
        self,
        *,
        group: str | None = None,
        role: str | None = None,
        name: str | None = None,
        error: str | None = None,
        since: Duration | None = None,
    ) -> AsyncIterator[TaskView]:
        """
        Yield the failed tasks of all groups that are kept, by group, the oldest group first.

        Args:
            group: id of the only group to look at.
            role, name: only tasks of this role, or of this function.
            error: only tasks whose error contains this text, as `type: message`; capitals do not matter.
            since: only tasks that failed within this time.

        Raises:
            NotFoundError: the group is not known.
        """
        found = [await self.group(group).view()] if group is not None else await self.groups()
        after = 0
        if since is not None:
            after = await queries.server_ms(self.connection, self.keys) - round(seconds(since, "since") * 1000)
        for view in found:
            if not view.counters.failed:
                continue
            async for task in queries.tasks(self.connection, self.keys, view.id):
                result = task.result
                if result is None or result.error is None or (result.ended_ms or 0) < after:
                    continue
                words = f"{result.error['type']}: {result.error['message']}"
                wanted = (role in (None, task.role), name in (None, task.uses), (error or "").lower() in words.lower())
                if all(wanted):
                    yield task

    async def workers(self) -> list[WorkerView]:
        """Live workers and monitors, by name."""
        return await queries.workers(self.connection, self.keys)

    async def roles(self) -> list[RoleView]:
        """The current state of all roles that were ever used."""
        return await queries.roles(self.connection, self.keys)

    async def pause_role(self, role: str) -> None:
        """
        Deliver no more tasks of a role, of whatever group, until `resume_role`. Tasks that its workers already have are
        finished.
        """
        await self.call(transitions.pause_role(self.keys, check_id(role, "role")))

    async def resume_role(self, role: str) -> None:
        await self.call(transitions.resume_role(self.keys, check_id(role, "role")))

    async def set_lease(self, role: str, lease: Duration) -> float:
        """
        Change the lease of a role whose workers are running: how long a worker that stops responding keeps its tasks.
        Workers learn of the change within 10 s. Until 30 s have passed, or the new lease if that is longer, no task is
        taken from a worker. Returns the previous lease, in seconds.

        Raises:
            InvalidInputError: a bad role, or not a duration of 100 ms or more.
            NotFoundError: no worker ever served this role.
        """
        lease_s = check_lease(lease, "lease")
        meta = await queries.role_meta(self.connection, self.keys, check_id(role, "role"))
        if "lease" not in meta:
            raise NotFoundError(
                f"role {role!r} has no lease: no worker ever served it; `ceylon status` lists the roles"
            )
        now_ms = await queries.server_ms(self.connection, self.keys)
        await self.call([transitions.set_lease(self.keys, role, round(lease_s * 1000), now_ms)])
        return int(meta["lease"]) / 1000
