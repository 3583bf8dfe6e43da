"""
Submits work and follows it.

A group is staged in parts and becomes active with its last one, all or nothing. Single tasks share *rolling groups*:
one submission is in flight at a time, and what is submitted meanwhile goes with the next, so that many cost little.
"""

from __future__ import annotations

import asyncio
import base64
import contextlib
import difflib
import hashlib
import os
import time
from collections.abc import AsyncIterator, Iterable, Iterator, Sequence
from types import TracebackType
from typing import Any, Generic, Literal, Self, TypeVar, overload

from loguru import logger

from rq_ceylon.errors import (
    CeylonError,
    ConnectionLostError,
    GoalImpossibleError,
    GroupExistsError,
    InvalidInputError,
    NotFoundError,
    NoWorkerError,
    PayloadTooLargeError,
    RedisError,
    TaskCancelledError,
    TaskFailedError,
    WaitTimeoutError,
)
from rq_ceylon.goals import compile_goals, impossible_words
from rq_ceylon.graph import in_order
from rq_ceylon.handlers import Handler, Registry
from rq_ceylon.maintenance import hand_over, relay
from rq_ceylon.models import (
    DEFAULT_ROLE,
    Counters,
    GoalStatus,
    GroupView,
    Priority,
    RoleView,
    Task,
    TaskGroup,
    TaskResult,
    TaskStatus,
    TaskView,
    WorkerView,
    check_id,
    seconds,
)
from rq_ceylon.store import queries, transitions
from rq_ceylon.store.codec import encode, task_text
from rq_ceylon.store.connection import Connection
from rq_ceylon.store.events import LOOK_S, Event, EventHub
from rq_ceylon.store.keys import STREAMS, Keys
from rq_ceylon.store.scripts import Call
from rq_ceylon.store.transitions import GroupFacts, Page, PageAck, StagedTask, SubmitReply

R = TypeVar("R")

ANSWER_S = 5.0
"""How long a submission is repeated while Redis does not answer."""

PAYLOAD_BYTES_MAX = 1024 * 1024
ROLLING_TASKS_MAX, ROLLING_S = 1000, 60.0
ROLLING_RETENTION_MS = 3_600_000
LONG_DELAY_MS = 600_000
"""Tasks due later than this go to a rolling group of their own, so that they do not pin the results of others."""

NO_WORKER_S = 10.0
"""After so long a wait, roles that nobody serves are named in a warning."""


class Client:
    """
    A producer's connection. It belongs to one event loop and one process.

    Args:
        url: where Redis is.
        registry: handlers known here; the arguments of their tasks are checked before anything is sent.
    """

    def __init__(self, url: str, *, namespace: str = "ceylon", registry: Registry | None = None) -> None:
        self.url, self.keys, self.registry = url, Keys(check_id(namespace, "namespace")), registry
        self.connection = Connection(url)
        self.hub = EventHub(url, self.keys)
        self._followers: dict[str, _Follower] = {}
        self._rolling = {False: _Rolling(self), True: _Rolling(self)}
        self._owner: tuple[int, asyncio.AbstractEventLoop] | None = None

    async def open(self) -> Self:
        """
        Connect, and refuse a server that is not fit.

        Raises:
            RedisError: not reachable (nothing is retried), or too old, evicting, or of another kind.
        """
        self._owner = os.getpid(), asyncio.get_running_loop()
        await self.connection.check()
        return self

    async def close(self) -> None:
        """
        Seal what is open and disconnect. Submitted work goes on; who still waits for it here gets an error.
        """
        self._owner = None  # a waiter that was answered just now must not begin anew
        for rolling in self._rolling.values():
            await rolling.close()
        for follower in list(self._followers.values()):
            await follower.close()
        await self.hub.close()
        await self.connection.close()

    async def __aenter__(self) -> Self:
        return await self.open()

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None
    ) -> None:
        await self.close()

    # ---- submit ------------------------------------------------------------------------------------------------------
    @overload
    async def submit(self, work: Task, *, require_workers: bool = False) -> TaskHandle[Any]: ...
    @overload
    async def submit(self, work: TaskGroup, *, require_workers: bool = False) -> GroupHandle: ...

    async def submit(self, work: Task | TaskGroup, *, require_workers: bool = False) -> TaskHandle[Any] | GroupHandle:
        """
        Hand over a task or a group; returns once Redis has it.

        Args:
            require_workers: refuse if a role has no live worker.

        Raises:
            InvalidInputError: something in it cannot be used; nothing was written.
            GoalImpossibleError: a goal could hold in no outcome; nothing is kept.
            GroupExistsError: its key was used for other content.
            NoWorkerError: see `require_workers`; nothing was written.
            QueueFullError: Redis is at its memory limit.
            ConnectionLostError: no answer for 5 s. Submitting again is safe for a group with a key.
        """
        self._check_owner()
        if isinstance(work, TaskGroup):
            return await _Submission(self, work).run(require_workers=require_workers)
        if work.needs or work.id is not None:
            raise InvalidInputError(
                "a single task can neither need others nor choose its id; submit it in a TaskGroup (with a key, if the "
                "submission is to be repeatable)"
            )
        staged, role = self.stage(work, "", Task(), None)
        if require_workers:
            await self.require_workers([role])
        delay_ms = staged.text.split(b"|", 3)[2]
        return await self._rolling[int(delay_ms or 0) > LONG_DELAY_MS].submit(staged.text, role)

    def stage(self, task: Task, tid: str, defaults: Task, priority: Priority | str | None) -> tuple[StagedTask, str]:
        """
        A task as it is sent, and its role. What is None is taken from the group, then from the handler.
        """
        where = f"task {tid or task.uses or 'default'!r}"
        uses = task.uses or defaults.uses
        handler = self.registry.find(uses) if self.registry and uses else None
        arguments = dict(task.arguments)
        if handler is not None:
            arguments = handler.check(arguments)
        role = check_id(
            task.role or defaults.role or (handler.role if handler else None) or DEFAULT_ROLE, f"{where}: role"
        )
        rank = str(
            task.priority or defaults.priority or priority or (handler.priority if handler else None) or Priority.NORMAL
        )
        if rank not in STREAMS:
            raise InvalidInputError(f"{where}: priority: {rank!r} is not known; use high, normal or low")
        body = {**_shared(task, where), "arguments": arguments or None, "needs": list(task.needs) or None}
        try:
            blob = encode({name: value for name, value in body.items() if value is not None})
        except ValueError as error:
            raise InvalidInputError(f"{where}: it is not JSON ({error}); give plain values") from error
        if len(blob) > PAYLOAD_BYTES_MAX:
            raise PayloadTooLargeError(
                f"{where}: its arguments are {len(blob):,} bytes, {PAYLOAD_BYTES_MAX:,} are allowed; "
                "store the data elsewhere and pass a reference"
            )
        delay, expires = task.delay or defaults.delay, task.expires or defaults.expires
        text = task_text(
            role, STREAMS[rank], _ms(delay, f"{where}: delay"), _ms(expires, f"{where}: expires"), None, blob
        )
        return StagedTask(tid, text, list(dict.fromkeys(task.needs))), role

    async def call(self, calls: Sequence[Call]) -> list[Any]:
        """
        Send calls that are safe to repeat, for up to 5 s.
        """
        return await self.connection.run_until_answered(calls, give_up_after=ANSWER_S)

    def _check_owner(self) -> None:
        if self._owner is None:
            raise CeylonError("this client is not open; use `async with app.client() as client`")
        if self._owner != (os.getpid(), asyncio.get_running_loop()):
            raise CeylonError("this client belongs to another process or event loop; make one here")

    # ---- look up -----------------------------------------------------------------------------------------------------
    def task(self, task_id: str) -> TaskHandle[Any]:
        """
        A task by its public id, `<gid>/<tid>`, from any process.
        """
        gid, _, tid = task_id.partition("/")
        if not tid:
            raise InvalidInputError(f"task id {task_id!r} has no /; a task's id is <group>/<task>")
        return TaskHandle(self, check_id(gid, "group id"), check_id(tid, "task id"))

    def group(self, gid: str) -> GroupHandle:
        """
        A group by its id, from any process.
        """
        return GroupHandle(self, check_id(gid, "group id"))

    async def groups(self) -> list[GroupView]:
        return await queries.groups(self.connection, self.keys)

    async def workers(self) -> list[WorkerView]:
        return await queries.workers(self.connection, self.keys)

    async def roles(self) -> list[RoleView]:
        return await queries.roles(self.connection, self.keys)

    async def missing_roles(self, roles: Iterable[str]) -> list[str]:
        """
        Those of these roles that no live worker serves, each in words: with the nearest role that one does.
        """
        served = await queries.served_roles(self.connection, self.keys)
        return [_missing_words(role, served) for role in sorted(set(roles) - served)]

    async def require_workers(self, roles: Iterable[str]) -> None:
        if missing := await self.missing_roles(roles):
            raise NoWorkerError("; ".join(missing) + "; start one with: ceylon-worker --role ROLE")

    def follow(self, gid: str) -> _Follower:
        """
        The one reader of a group's events that all waiters of this client share.
        """
        self._check_owner()
        follower = self._followers.get(gid)
        if follower is None:
            follower = self._followers[gid] = _Follower(self, gid)
        return follower

    def unfollow(self, gid: str) -> None:
        self._followers.pop(gid, None)


def _missing_words(role: str, served: set[str]) -> str:
    near = difflib.get_close_matches(role, sorted(served), 1)
    serve = f"workers serve: {', '.join(sorted(served))}" if served else "no worker is running"
    return f"no worker serves role {role!r} ({serve})" + (f'; did you mean "{near[0]}"?' if near else "")


def _ms(value: Any, name: str) -> int | None:
    return None if value is None else round(seconds(value, name) * 1000)


def _shared(task: Task, where: str) -> dict[str, Any]:
    """
    The fields of a task that its worker needs, and that a group's defaults may give as well.
    """
    if task.max_attempts is not None and (not isinstance(task.max_attempts, int) or task.max_attempts < 1):
        raise InvalidInputError(
            f"{where}: max_attempts: {task.max_attempts!r} is not usable; give a whole number from 1 on"
        )
    return {
        "uses": None if task.uses is None else check_id(task.uses, f"{where}: uses"),
        "duration": None if task.duration is None else seconds(task.duration, f"{where}: duration"),
        "timeout": None if task.timeout is None else seconds(task.timeout, f"{where}: timeout"),
        "max_attempts": task.max_attempts,
        "metadata": dict(task.metadata) if task.metadata else None,
    }


class _Submission:
    """
    One group on its way: parts of at most 500 tasks and 4 MiB, one after another.
    """

    def __init__(self, client: Client, group: TaskGroup) -> None:
        self.client, self.group = client, group
        self.goals = compile_goals(group.goal)
        shared = _shared(group.defaults, "defaults")
        self.facts = GroupFacts(
            name=group.name,
            retention_ms=round(seconds(group.retention, "retention") * 1000),
            key=group.key or "",
            description=group.description,
            defaults={name: value for name, value in shared.items() if value is not None},
            goals=self.goals,
        )
        if not isinstance(group.name, str) or not 0 < len(group.name) <= 200:
            raise InvalidInputError(f"group: name: {group.name!r} is not usable; give 1 to 200 characters")
        self.gid = _keyed_id(client.keys.namespace, group.key) if group.key else _new_id()
        self.digest = hashlib.sha256(encode([self.facts.meta()[1::2], self.facts.programs()])).digest()
        self.roles: set[str] = set()
        self.count = 0

    async def run(self, *, require_workers: bool) -> GroupHandle:
        part, sent, parts = 0, False, self.parts()
        try:
            ready = next(parts, None)
            if ready is None:
                raise InvalidInputError(f"group {self.group.name!r} has no tasks; give at least one")
            reply = SubmitReply("OK")
            while ready is not None:
                following = next(parts, None)
                part += 1
                if require_workers:
                    await self.client.require_workers(self.roles)
                reply = await self._send(ready, part, last=following is None)
                sent, ready = True, following
        except BaseException:
            # Nothing half-written: a cancel removes a group that is still staging.
            if sent and part:
                with contextlib.suppress(CeylonError):
                    await self._drop()
            raise
        if reply.word == "OK":
            await self._enqueue(reply.pages, staged=part > 1)
        return GroupHandle(self.client, self.gid, name=self.group.name, repeated=reply.word == "REPEAT")

    async def _drop(self) -> None:
        view = await queries.group(self.client.connection, self.client.keys, self.gid)
        if view.status == "staging":
            await self.client.call([transitions.cancel_group(self.client.keys, self.gid)])

    def _tasks(self) -> Iterator[tuple[str, Task]]:
        tasks = self.group.tasks
        if not isinstance(tasks, Sequence):
            for position, task in enumerate(tasks, 1):
                yield _task_id(task, position), task
            return
        by_id: dict[str, Task] = {}
        given, position = {task.id for task in tasks if task.id is not None}, 0
        for task in tasks:
            position += 1
            while task.id is None and str(position) in given:
                position += 1
            tid = _task_id(task, position)
            if tid in by_id:
                raise InvalidInputError(f"group {self.group.name!r}: two tasks have the id {tid!r}; ids are unique")
            by_id[tid] = task
        # A task comes after what it needs, so that each part can be checked against those before it.
        if any(task.needs for task in tasks):
            for tid in in_order({tid: task.needs for tid, task in by_id.items()}, f"group {self.group.name!r}"):
                yield tid, by_id[tid]
        else:
            yield from by_id.items()

    def parts(self) -> Iterator[list[StagedTask]]:
        part: list[StagedTask] = []
        size = 0
        for tid, task in self._tasks():
            staged, role = self.client.stage(task, tid, self.group.defaults, self.group.priority)
            if part and (
                len(part) == transitions.SUBMIT_TASKS_MAX or size + staged.size > transitions.SUBMIT_BYTES_MAX
            ):
                yield part
                part, size = [], 0
            part.append(staged)
            size += staged.size
            self.roles.add(role)
            self.count += 1
        if part:
            yield part

    async def _send(self, tasks: list[StagedTask], part: int, *, last: bool) -> SubmitReply:
        self.digest = _chain(self.digest, tasks)
        keys = self.client.keys
        call = transitions.submit(
            keys, self.gid, self.facts, tasks, part=part, last=last, digest=self.digest.hex()[:32]
        )
        *_, raw = await self.client.call([*transitions.announce(keys, self.gid, self.roles), call])
        reply = transitions.submit_reply(self.gid, raw)
        match reply.word:
            case "OK" | "REPEAT":
                return reply
            case "EXISTS":
                raise GroupExistsError(
                    f"key {self.group.key!r} was submitted before with other content (group {self.gid}); "
                    "use another key, or submit the same content"
                )
            case "REFUSED" if reply.detail == "goal":
                goal = next(goal for goal in self.goals if goal.name == reply.name)
                raise GoalImpossibleError(impossible_words(goal, Counters(total=self.count, pending=self.count)))
            case "REFUSED" if reply.detail == "duplicate":
                raise InvalidInputError(
                    f"group {self.group.name!r}: two tasks have the id {reply.name!r}; ids are unique"
                )
            case "REFUSED":
                raise InvalidInputError(
                    f"group {self.group.name!r}: a task needs {reply.name!r}, which no earlier task has as its id; "
                    "give it before the tasks that need it"
                )
        raise RedisError(f"Redis lost earlier parts of group {self.group.name!r} ({reply.word}); submit it again")

    async def _enqueue(self, pages: Sequence[Page], *, staged: bool) -> None:
        # Should this process end here, a relay hands the pages over.
        connection, keys = self.client.connection, self.client.keys
        if staged:
            await relay(connection, keys, self.gid)
        elif pages:
            acks = await hand_over(connection, keys, pages)
            await self.client.call([transitions.outbox(keys, self.gid, acks=acks)])


class _Rolling:
    """
    The group that single tasks of one client share. One submission is in flight; what comes meanwhile goes next.
    """

    def __init__(self, client: Client) -> None:
        self.client = client
        self.facts = GroupFacts(name="single tasks", retention_ms=ROLLING_RETENTION_MS)
        self.waiting: list[tuple[bytes, str, asyncio.Future[str]]] = []
        self.pages: list[Page] = []
        self.acks: list[PageAck] = []
        self.pump: asyncio.Task[None] | None = None
        self._fresh()

    def _fresh(self) -> None:
        self.gid, self.part, self.count, self.began = _new_id(), 0, 0, time.monotonic()
        self.digest = b""

    async def submit(self, text: bytes, role: str) -> TaskHandle[Any]:
        accepted: asyncio.Future[str] = asyncio.get_running_loop().create_future()
        self.waiting.append((text, role, accepted))
        if self.pump is None or self.pump.done():
            self.pump = asyncio.create_task(self._pump(), name="submit")
        task_id = await accepted
        gid, _, tid = task_id.partition("/")
        return TaskHandle(self.client, gid, tid)

    async def close(self) -> None:
        if self.pump is not None:
            await asyncio.gather(self.pump, return_exceptions=True)
        if self.part:
            with contextlib.suppress(CeylonError):
                await self.client.connection.run(
                    [
                        transitions.outbox(self.client.keys, self.gid, acks=self.acks),
                        transitions.seal(self.client.keys, self.gid, untouched_ms=0),
                    ]
                )

    async def _pump(self) -> None:
        while self.waiting or self.pages or self.acks:
            batch: list[tuple[bytes, str, asyncio.Future[str]]] = []
            size = 0
            while self.waiting and len(batch) < transitions.SUBMIT_TASKS_MAX:
                size += len(self.waiting[0][0])
                if batch and size > transitions.SUBMIT_BYTES_MAX:
                    break
                batch.append(self.waiting.pop(0))
            try:
                await self._turn(batch)
            except BaseException as error:
                for *_, accepted in batch:
                    if not accepted.done():
                        accepted.set_exception(error)
                # What is written but not yet enqueued is in the outbox; a relay hands it over.
                self.pages, self.acks = [], []
                self._fresh()
                if not isinstance(error, CeylonError):
                    raise
            # Who was answered just now and submits again at once shares the next round trip.
            await asyncio.sleep(0)

    async def _turn(self, batch: list[tuple[bytes, str, asyncio.Future[str]]]) -> None:
        """
        Enqueue what the last part returned, and send the next part.
        """
        keys, pages, acks = self.client.keys, self.pages, self.acks
        self.pages, self.acks = [], []
        by_role: dict[str, list[Page]] = {}
        for page in pages:
            by_role.setdefault(page.role, []).append(page)
        calls: list[Call] = [transitions.enqueue(keys, role, some) for role, some in by_role.items()]
        tids: list[str] = []
        last = False
        if batch:
            if self.part and time.monotonic() - self.began > ROLLING_S:
                await self._seal(acks)
                acks = []
            tids = [str(self.count + n) for n in range(1, len(batch) + 1)]
            staged = [StagedTask(tid, text) for tid, (text, *_) in zip(tids, batch, strict=True)]
            last = self.count + len(batch) >= ROLLING_TASKS_MAX
            digest = _chain(self.digest, staged)
            if self.part == 0:
                calls += transitions.announce(keys, self.gid, {role for _, role, _ in batch})
            calls.append(
                transitions.submit(
                    keys,
                    self.gid,
                    self.facts,
                    staged,
                    part=self.part + 1,
                    last=last,
                    digest=digest.hex()[:32],
                    rolling=True,
                    acks=acks,
                )
            )
        elif acks:
            calls.append(transitions.outbox(keys, self.gid, acks=acks))
        replies = await self.client.call(calls)
        for some, horizon in zip(by_role.values(), replies, strict=False):
            self.acks += [PageAck(page, horizon) for page in some]
        if not batch:
            return
        reply = transitions.submit_reply(self.gid, replies[-1])
        if reply.word in ("GAP", "CLOSED"):
            # Sealed meanwhile, or Redis lost earlier parts: the same tasks open a new group.
            self.waiting[:0] = batch
            self.acks = []
            self._fresh()
            return
        self.part, self.count, self.digest = self.part + 1, self.count + len(batch), digest
        self.pages = list(reply.pages)
        for tid, (*_, accepted) in zip(tids, batch, strict=True):
            if not accepted.done():
                accepted.set_result(f"{self.gid}/{tid}")
        if last:
            await self._seal([], enqueue=True)

    async def _seal(self, acks: list[PageAck], *, enqueue: bool = False) -> None:
        """
        Finish with the present group: its last pages and acknowledgements go out, and it takes no more tasks.
        """
        keys = self.client.keys
        acks = [*acks, *self.acks]
        if enqueue and self.pages:
            acks += await hand_over(self.client.connection, keys, self.pages)
        await self.client.call(
            [transitions.outbox(keys, self.gid, acks=acks), transitions.seal(keys, self.gid, untouched_ms=0)]
        )
        self.pages, self.acks = [], []
        self._fresh()


def _task_id(task: Task, position: int) -> str:
    return str(position) if task.id is None else check_id(task.id, "task id")


def _chain(digest: bytes, tasks: Sequence[StagedTask]) -> bytes:
    """
    The digest of all parts so far: a repeated part is known by it, and a key's content too.
    """
    chain = hashlib.sha256(digest)
    for task in tasks:
        chain.update(b"%b\0%b\0%b\0" % (task.tid.encode(), task.text, " ".join(task.needs).encode()))
    return chain.digest()


def _keyed_id(namespace: str, key: str) -> str:
    return "k" + hashlib.sha256(f"{namespace}\0{key}".encode()).hexdigest()[:20]


def _new_id() -> str:
    """
    Sorts by time; its 50 random bits come from the system, so a copied process draws others.
    """
    stamp = int(time.time() * 1000).to_bytes(6, "big")
    return base64.b32hexencode(stamp + os.urandom(7)).decode().rstrip("=").lower()[:20]


class _Follower:
    """
    Reads the events of one group for all who wait for it: each event once, and the results that somebody waits for.
    """

    def __init__(self, client: Client, gid: str) -> None:
        self.client, self.gid = client, gid
        self.results: dict[str, list[asyncio.Future[TaskResult]]] = {}
        self.new: set[str] = set()  # waited for, and not yet asked for
        self.views: list[asyncio.Future[GroupView]] = []
        self.reader: asyncio.Task[None] | None = None
        self.news = asyncio.Event()
        self.seq = 0

    async def result(self, tid: str) -> TaskResult:
        """
        The result of a task, once it has ended.

        Raises:
            NotFoundError: the group or the task is not, or no longer, known.
        """
        future: asyncio.Future[TaskResult] = asyncio.get_running_loop().create_future()
        self.results.setdefault(tid, []).append(future)
        self.new.add(tid)
        try:
            self._read()
            return await future
        finally:
            waiters = self.results.get(tid, [])
            if future in waiters:
                waiters.remove(future)
                if not waiters:
                    self.results.pop(tid, None)

    async def change(self) -> GroupView:
        """
        The group after its next event, or as it stands when it is time to look again.
        """
        future: asyncio.Future[GroupView] = asyncio.get_running_loop().create_future()
        self.views.append(future)
        self._read()
        return await future

    async def close(self) -> None:
        if self.reader is not None:
            self.reader.cancel()
            await asyncio.gather(self.reader, return_exceptions=True)
        self._fail(CeylonError("the client was closed; what was waited for goes on"))

    def _read(self) -> None:
        if self.reader is None or self.reader.done():
            self.reader = asyncio.create_task(self._run(), name=f"follow {self.gid}")
        else:
            self.news.set()

    async def _run(self) -> None:
        connection, keys = self.client.connection, self.client.keys
        try:
            async with self.client.hub.watch(self.gid) as watch:
                fresh = True
                while self.results or self.views:
                    try:
                        await self._look(connection, keys, fresh=fresh)
                        fresh = False
                    except ConnectionLostError as error:
                        logger.debug("Following {}: {}", self.gid, error)
                        await asyncio.sleep(0.2)
                        fresh = True
                        continue
                    if not (self.results or self.views):
                        break
                    waits = [asyncio.create_task(watch.wait(LOOK_S)), asyncio.create_task(self.news.wait())]
                    done, pending = await asyncio.wait(waits, return_when=asyncio.FIRST_COMPLETED)
                    for wait in pending:
                        wait.cancel()
                    fresh = waits[0] in done and not waits[0].result()
                    self.news.clear()
        except Exception as error:
            self._fail(error)
            if not isinstance(error, CeylonError):
                raise
        finally:
            self.client.unfollow(self.gid)

    async def _look(self, connection: Connection, keys: Keys, *, fresh: bool) -> None:
        """
        Read on from the last event, and ask for what ended and what is newly waited for; on a fresh look, for all.
        """
        view = await queries.group(connection, keys, self.gid)
        new, self.new = self.new, set()
        ended = set(new)
        closed = view.status in ("closing", "finished")
        if fresh or closed or view.events < self.seq:
            ended.update(self.results)
            self.seq = view.events
        else:
            while self.seq < view.events:
                batch = await queries.events(connection, keys, self.gid, self.seq + 1)
                if not batch:
                    break
                ended.update(task.tid for event in batch for task in event.tasks)
                self.seq = batch[-1].seq
        wanted = [tid for tid in ended if tid in self.results]
        for first in range(0, len(wanted), 500):
            found = await queries.results(connection, keys, self.gid, wanted[first : first + 500])
            for tid, result in found.items():
                self._tell(tid, result)
        for first in range(0, len(wanted), 500):
            left = [tid for tid in wanted[first : first + 500] if tid in self.results]
            if closed:
                for task in await queries.some_tasks(connection, keys, self.gid, left):
                    if task.status is TaskStatus.CANCELLED and task.result is None:
                        self._tell(task.id, TaskResult(task.id, TaskStatus.CANCELLED, task.reason, task.role))
            for tid in await queries.missing(connection, keys, self.gid, left) if fresh or new else ():
                self._tell(tid, NotFoundError(f"group {self.gid!r} has no task {tid!r}, or no longer"))
        if not fresh or self.views:
            views, self.views = self.views, []
            for future in views:
                if not future.done():
                    future.set_result(view)

    def _tell(self, tid: str, result: TaskResult | NotFoundError) -> None:
        for future in self.results.pop(tid, []):
            if future.done():
                continue
            if isinstance(result, NotFoundError):
                future.set_exception(result)
            else:
                future.set_result(result)

    def _fail(self, error: Exception) -> None:
        futures: list[asyncio.Future[Any]] = [future for some in self.results.values() for future in some]
        futures += self.views
        self.results, self.views = {}, []
        for future in futures:
            if not future.done():
                future.set_exception(error)


class TaskHandle(Generic[R]):
    """
    A submitted task.
    """

    def __init__(self, client: Client, gid: str, tid: str, handler: Handler[..., R] | None = None) -> None:
        self._client, self._gid, self._tid, self._handler = client, gid, tid, handler

    @property
    def id(self) -> str:
        return f"{self._gid}/{self._tid}"

    def __repr__(self) -> str:
        return f"<TaskHandle {self.id}>"

    async def result(self, timeout: float | None = None) -> R:
        """
        What the handler returned, once the task has completed; of the annotated type if the handler is known here.

        Raises:
            TaskFailedError: it failed; the remote traceback is with it.
            TaskCancelledError: it was cancelled, or its group closed before it started.
            WaitTimeoutError: not within `timeout` seconds.
            NotFoundError: the task is not, or no longer, known.
        """
        follower = self._client.follow(self._gid)
        reminder = asyncio.create_task(self._warn())
        try:
            async with asyncio.timeout(timeout):
                result = await follower.result(self._tid)
        except TimeoutError:
            raise WaitTimeoutError(f"task {self.id} has not ended within {timeout} s; it goes on") from None
        finally:
            reminder.cancel()
        if result.status is TaskStatus.FAILED:
            error = result.error or {}
            raise TaskFailedError(
                self.id,
                result.reason,
                error_type=error.get("type", ""),
                error_message=error.get("message", ""),
                traceback=error.get("traceback", ""),
            )
        if result.status is TaskStatus.CANCELLED:
            raise TaskCancelledError(self.id, result.reason)
        value: R = result.value if self._handler is None else self._handler.load_result(result.value)
        return value

    async def view(self) -> TaskView:
        return await queries.task(self._client.connection, self._client.keys, self._gid, self._tid)

    async def status(self) -> TaskStatus:
        return (await self.view()).status

    async def cancel(self) -> str:
        """
        Cancel it: at once if it has not started (`cancelled`), by asking its worker if it runs (`stopping`); `ended` if
        it is over.
        """
        ((_, *words),) = await self._client.call([transitions.cancel_tasks(self._client.keys, self._gid, [self._tid])])
        if len(words) < 2 or words[1] == "unknown":
            raise NotFoundError(f"task {self.id} is not known")
        return str(words[1])

    async def _warn(self) -> None:
        await asyncio.sleep(NO_WORKER_S)
        with contextlib.suppress(CeylonError):
            await _warn_of_missing(self._client, {(await self.view()).role})


async def _warn_of_missing(client: Client, roles: Iterable[str]) -> None:
    for words in await client.missing_roles(role for role in roles if role):
        logger.warning("Still waiting: {}", words)


class GroupHandle:
    """
    A submitted group. `repeated`: its key was known with the same content, so nothing was written.
    """

    def __init__(self, client: Client, gid: str, *, name: str = "", repeated: bool = False) -> None:
        self._client, self.id, self.name, self.repeated = client, gid, name, repeated

    def __repr__(self) -> str:
        return f"<GroupHandle {self.id} {self.name!r}>"

    def task(self, tid: str) -> TaskHandle[Any]:
        return TaskHandle(self._client, self.id, check_id(tid, "task id"))

    async def view(self) -> GroupView:
        return await queries.group(self._client.connection, self._client.keys, self.id)

    async def wait(self, until: Literal["goal", "all"] = "goal", timeout: float | None = None) -> GroupView:
        """
        Until every goal is settled (without goals: the group has finished), or, with `all`, until it has finished.

        Raises:
            WaitTimeoutError: not within `timeout` seconds; the group goes on.
            NotFoundError: the group is not, or no longer, known.
        """
        try:
            async with asyncio.timeout(timeout):
                async for view in self.progress():
                    if is_over(view, until):
                        return view
        except TimeoutError:
            raise WaitTimeoutError(f"group {self.id} is not there within {timeout} s; it goes on") from None
        return await self.view()

    async def progress(self) -> AsyncIterator[GroupView]:
        """
        The group now, and after every change, until it has finished.
        """
        follower = self._client.follow(self.id)
        view = await self.view()
        reminder = asyncio.create_task(self._warn())
        try:
            while True:
                yield view
                if view.is_finished:
                    return
                follower = self._client.follow(self.id)
                view = await follower.change()
        finally:
            reminder.cancel()

    async def events(self, start: int = 1) -> AsyncIterator[Event]:
        """
        Every event from number `start` on, until the group has finished.
        """
        seq = start - 1
        async for view in self.progress():
            while seq < view.events:
                batch = await queries.events(self._client.connection, self._client.keys, self.id, seq + 1)
                for event in batch:
                    yield event
                    seq = event.seq
                if not batch:
                    break

    async def results(self) -> AsyncIterator[TaskResult]:
        """
        Every task's result as it ends, until the group has finished; those cancelled by its closing come last.
        """
        told: set[str] = set()
        connection, keys = self._client.connection, self._client.keys
        async for event in self.events():
            tids = [task.tid for task in event.tasks if task.outcome in tuple(TaskStatus) and task.tid not in told]
            for result in (await queries.results(connection, keys, self.id, tids)).values():
                told.add(result.task_id)
                yield result
        async for task in self.tasks():
            if task.id not in told:
                yield task.result or TaskResult(task.id, task.status, task.reason, task.role)

    def tasks(self) -> AsyncIterator[TaskView]:
        return queries.tasks(self._client.connection, self._client.keys, self.id)

    async def cancel(self) -> str:
        """
        End the group: what has not started is cancelled, what runs is asked to stop. Returns the group's status.
        """
        (reply,) = await self._client.call([transitions.cancel_group(self._client.keys, self.id)])
        if reply[0] == "GONE":
            raise NotFoundError(f"group {self.id} is not known; it was never submitted, or it was pruned")
        return str(reply[1])

    async def _warn(self) -> None:
        await asyncio.sleep(NO_WORKER_S)
        with contextlib.suppress(CeylonError):
            roles: set[str] = set()
            async for task in self.tasks():
                if not task.status.is_final:
                    roles.add(task.role)
                if len(roles) > 20:
                    break
            await _warn_of_missing(self._client, roles)


def is_over(view: GroupView, until: Literal["goal", "all"]) -> bool:
    """
    Is what was waited for there?
    """
    if until == "all" or not view.goals:
        return view.is_finished
    return all(goal.status in (GoalStatus.ACHIEVED, GoalStatus.FAILED) for goal in view.goals)


def succeeded(view: GroupView) -> bool:
    """
    Were the goals achieved or, without goals, every task completed?
    """
    if view.goals:
        return all(goal.status is GoalStatus.ACHIEVED for goal in view.goals)
    return view.outcome == "completed"


def check_group(group: TaskGroup) -> None:
    """
    All that a submission checks before it sends, without Redis.

    Raises:
        InvalidInputError: as `Client.submit`.
    """
    submission = _Submission(Client("redis://127.0.0.1"), group)
    for _ in submission.parts():
        pass
