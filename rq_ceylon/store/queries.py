"""Every read. Nothing here writes, and no query reads a whole large key at once, since that would block Redis."""

from __future__ import annotations

import collections
import math
from collections.abc import AsyncIterator, Iterable, Mapping, Sequence
from dataclasses import fields, replace
from typing import Any, Literal, NamedTuple

from rq_ceylon.errors import CeylonError, NotFoundError, RecordError
from rq_ceylon.models import GoalStatus, GroupStatus, TaskStatus
from rq_ceylon.store import transitions
from rq_ceylon.store.codec import counters_of, decode, reading, result_of, settled_of, task_parts
from rq_ceylon.store.connection import Connection
from rq_ceylon.store.events import Event, event_of
from rq_ceylon.store.keys import INDEX_SHARDS, STREAMS, Keys
from rq_ceylon.store.records import CLAIM, GOAL
from rq_ceylon.store.redis_errors import warn_once
from rq_ceylon.store.scripts import Call, command
from rq_ceylon.views import AttemptError, GoalView, GroupView, RoleView, TaskResult, TaskView, WorkerView

SCAN = 500
ERRORS_KEPT = 5
"""How many errors of a task are kept beside that of its result; see lua/group_ends.lua."""
RUNNING = "pcs"
"""States of a claim whose task is in progress; see lua/group_records.lua."""


async def server_ms(connection: Connection, keys: Keys) -> int:
    """The server's clock in epoch ms. Decisions use no other clock, because those of different hosts disagree."""
    ((now_s, now_us),) = await connection.run([Call("", (keys.roles,), ("TIME",))])
    return int(now_s) * 1000 + int(now_us) // 1000


# ---- groups ----------------------------------------------------------------------------------------------------------
async def group(connection: Connection, keys: Keys, gid: str) -> GroupView:
    """
    The present state of a group.

    Raises:
        NotFoundError: there is no such group; it may have been pruned.
    """
    view, _, _ = await group_and_results(connection, keys, gid, ())
    return view


async def group_and_results(
    connection: Connection, keys: Keys, gid: str, tids: Sequence[str], *, check_exist: bool = False
) -> tuple[GroupView, dict[str, TaskResult], set[str]]:
    """
    Read, in one round trip, a group and the results of the tasks `tids`, for those that have one.

    Args:
        check_exist: also check whether every one of these tasks exists.

    Returns:
        the group, the results by task id, and if `check_exist` the ids of tasks that are neither open nor ended.

    Raises:
        NotFoundError: there is no such group; it may have been pruned.
    """
    calls = _view_calls(keys, gid)
    if tids:
        # Results are read last: a task that ends after its HEXISTS has a result by then. HEXISTS transfers no payload.
        calls += [command("HEXISTS", keys.group_part(gid, "tasks"), tid) for tid in (tids if check_exist else ())]
        calls.append(command("HMGET", keys.group_part(gid, "results"), *tids))
    meta, events, *rest = await connection.run(calls)
    view = _view(gid, meta, events)
    if view is None:
        raise NotFoundError(
            f"group {gid!r} is not known in namespace {keys.namespace!r}; "
            "it was never submitted, or it was pruned after its retention"
        )
    *are_open, texts = rest or [()]
    found = _results(gid, tids, texts)
    missing = {tid for tid, is_open in zip(tids, are_open, strict=False) if not is_open and tid not in found}
    return view, found, missing


async def views(connection: Connection, keys: Keys, gids: Sequence[str]) -> AsyncIterator[tuple[str, GroupView | None]]:
    """Groups in the given order; None for a group that is gone or cannot be read. The latter is logged once."""
    for first in range(0, len(gids), 100):
        some = gids[first : first + 100]
        calls = [call for gid in some for call in _view_calls(keys, gid)]
        replies = await connection.run(calls, refusals=True)
        for gid, meta, events in zip(some, replies[::2], replies[1::2], strict=True):
            try:
                view = _view(gid, meta, events)
            except RecordError as error:
                warn_once(f"Left out: {error}")
                view = None
            yield gid, view


def _view_calls(keys: Keys, gid: str) -> list[Call]:
    return [command("HGETALL", keys.group_part(gid, "meta")), command("LLEN", keys.group_part(gid, "events"))]


async def groups(connection: Connection, keys: Keys) -> list[GroupView]:
    """All groups in the index that still exist, oldest first."""
    gids = await group_ids(connection, keys)
    found = [view async for _, view in views(connection, keys, gids) if view is not None]
    return sorted(found, key=lambda view: (view.created_ms or 0, view.id))


async def group_ids(connection: Connection, keys: Keys) -> list[str]:
    replies = await connection.run([command("ZRANGE", keys.index(shard), 0, -1) for shard in range(INDEX_SHARDS)])
    return [gid for shard in replies for gid in shard]


async def stored_groups(connection: Connection, keys: Keys) -> AsyncIterator[list[str]]:
    """The ids of all groups that exist, in the index or not, in batches. It scans every key of every node."""
    before, after = f"{keys.prefix}{{g:", "}:meta"
    async for found in connection.keys(f"{before}*{after}", SCAN):
        yield [key.removeprefix(before).removesuffix(after) for key in found]


async def depends_on(connection: Connection, keys: Keys, gid: str) -> list[str]:
    """The ids of the groups that this one still waits for."""
    (text,) = await connection.run([command("HGET", keys.group_part(gid, "meta"), "depends_on")])
    return _awaited(text)


def _awaited(text: str | None) -> list[str]:
    """The ids in a list of `gid` and `gid=when`."""
    return list(dict.fromkeys(entry.partition("=")[0] for entry in (text or "").split()))


async def closed_by(connection: Connection, keys: Keys, gid: str) -> str:
    """What closed a group: `achieved` or `failed` if a goal of this status did, `user`, `group`; '' if it is open."""
    (text,) = await connection.run([command("HGET", keys.group_part(gid, "meta"), "closed_by")])
    return text or ""


async def added_defaults(connection: Connection, keys: Keys, gid: str) -> dict[str, Any]:
    """The fields that a task added to this group has unless it says otherwise; {} if it is not open, or unknown."""
    (texts,) = await connection.run([command("HMGET", keys.group_part(gid, "meta"), "defaults", "added_defaults")])
    with reading(f"the defaults of group {gid!r}"):
        return {name: value for text in texts if text for name, value in decode(text).items() if name != "open"}


async def follow_ups(connection: Connection, keys: Keys, gid: str) -> list[dict[str, Any]]:
    """The groups that follow this one, as `transitions.packed` made them."""
    (text,) = await connection.run([command("HGET", keys.group_part(gid, "meta"), "then")])
    with reading(f"what follows group {gid!r}"):
        return list(decode(text)) if text else []


async def due_groups(connection: Connection, keys: Keys, now_ms: int, limit: int) -> list[str]:
    """About `limit` groups whose next look is due, the same number at most from each shard."""
    share = -(-limit // INDEX_SHARDS)
    replies = await connection.run(
        [command("ZRANGEBYSCORE", keys.index(n), "-inf", now_ms, "LIMIT", 0, share) for n in range(INDEX_SHARDS)]
    )
    return [gid for shard in replies for gid in shard]


def _fields(reply: Any) -> dict[str, str]:
    if isinstance(reply, CeylonError):
        raise reply
    return reply if isinstance(reply, dict) else dict(zip(reply[::2], reply[1::2], strict=True))


def _view(gid: str, meta_reply: Any, events: Any) -> GroupView | None:
    # The caller let refusals through as replies, so that one broken group does not hide the others.
    if isinstance(events, CeylonError):
        raise events
    with reading(f"group {gid!r}"):
        meta = _fields(meta_reply)
        return _group_view(gid, meta, int(events)) if "status" in meta else None


def _group_view(gid: str, meta: Mapping[str, str], events: int) -> GroupView:
    lines = [GOAL.parse(line) for line in meta.get("goals", "").split(";") if line]
    undecided = {line["name"]: line["deadline"] for line in lines}
    if meta["status"] == GroupStatus.WAITING:
        undecided = {}  # its deadlines count from its start
    goals = []
    for spec in decode(meta.get("specs", "[]")):  # see `CompiledGoal.to_json`
        name, settled = spec["name"], None
        status = GoalStatus.NOT_STARTED if meta["status"] == GroupStatus.STAGING else GoalStatus.IN_PROGRESS
        if text := meta.get(f"goal:{name}"):
            status, settled = settled_of(text)
        when = spec.get("when") or f"call: {spec['call']}"
        shown = {key: spec.get(key) for key in ("call", "fail_when", "success_message", "failure_message")}
        goals.append(GoalView(name, when, status, undecided.get(name) or None, settled, **shown))
    finished = meta.get("finished")
    return GroupView(
        id=gid,
        name=meta.get("name", ""),
        status=GroupStatus(meta["status"]),
        counters=counters_of(meta),
        goals=goals,
        key=meta.get("key"),
        outcome=meta.get("outcome") if finished else None,
        reason=meta.get("reason", ""),
        depends_on=tuple(_awaited(meta.get("depends_on"))),
        is_open=meta.get("open", "0") in ("o", "i"),
        then={one["when"]: one["gid"] for one in decode(meta.get("then") or "[]")},
        max_running=int(meta.get("max_running") or 0) or None,
        description=meta.get("description", ""),
        created_ms=int(meta.get("created", 0)) or None,
        finished_ms=int(finished) if finished else None,
        events=events,
    )


async def events(connection: Connection, keys: Keys, gid: str, start: int) -> list[Event]:
    """Events of a group from number `start` on (the first is 1), at most `SCAN` of them."""
    first = max(start, 1) - 1
    (lines,) = await connection.run([command("LRANGE", keys.group_part(gid, "events"), first, first + SCAN - 1)])
    with reading(f"an event of group {gid!r}"):
        return [event_of(first + 1 + i, line) for i, line in enumerate(lines)]


async def new_events(
    connection: Connection, keys: Keys, gid: str, seq: int, last: float = math.inf
) -> AsyncIterator[list[Event]]:
    """Events of a group after number `seq`, in batches, up to number `last` at least; none if the group is gone."""
    while seq < last and (batch := await events(connection, keys, gid, seq + 1)):
        yield batch
        seq = batch[-1].seq


# ---- tasks -----------------------------------------------------------------------------------------------------------
async def task(connection: Connection, keys: Keys, gid: str, tid: str) -> TaskView:
    """
    The present state of a task.

    Raises:
        NotFoundError: there is no such group or task.
    """
    found = await some_tasks(connection, keys, gid, [tid])
    if not found:
        await group(connection, keys, gid)
        raise NotFoundError(f"group {gid!r} has no task {tid!r}; `ceylon show {gid}` lists its tasks")
    return (await _with_progress(connection, keys, found))[0]


async def tasks(connection: Connection, keys: Keys, gid: str) -> AsyncIterator[TaskView]:
    """All tasks of a group, each once, open ones first. Memory is bounded except for the task ids."""
    seen: set[str] = set()
    # In this order: a task that ends between the two scans moves from `tasks` to `results`, and must not be missed.
    for part in ("tasks", "results"):
        async for texts in scan(connection, keys.group_part(gid, part)):
            fresh = [tid for tid in texts if tid not in seen]
            seen.update(fresh)
            for view in await some_tasks(connection, keys, gid, fresh):
                yield view


class TaskState(NamedTuple):
    """What is known of a task without reading it."""

    tid: str
    status: TaskStatus
    role: str


async def states(connection: Connection, keys: Keys, gid: str) -> AsyncIterator[list[TaskState]]:
    """
    The state of every task of a group, in parts. Each is read when its turn comes, so two tasks may show different
    moments, and a task that ends meanwhile may come twice: the later state is the newer one.
    """
    word = {status.value: status for status in TaskStatus}
    parts: tuple[Literal["tasks"], Literal["results"]] = ("tasks", "results")
    for part in parts:
        cursor = ""
        while cursor != "0":
            ((answer, *rest),) = await connection.run([transitions.list_tasks(keys, gid, part, cursor or "0")])
            if answer == "GONE":
                return
            cursor, *flat = rest
            yield [
                TaskState(tid, word[status], role)
                for tid, status, role in zip(flat[::3], flat[1::3], flat[2::3], strict=True)
            ]


async def scan(connection: Connection, key: str) -> AsyncIterator[dict[str, str]]:
    """Read a hash in steps, in bounded memory. A field that changes meanwhile may be missed or come twice."""
    cursor = "0"
    while True:
        ((cursor, found),) = await connection.run([command("HSCAN", key, cursor, "COUNT", SCAN)])
        yield _fields(found)
        if str(cursor) == "0":
            return


async def some_tasks(connection: Connection, keys: Keys, gid: str, tids: Sequence[str]) -> list[TaskView]:
    """
    These tasks, in this order. Tasks that do not exist are left out. So are tasks that cannot be read, which is logged
    once.
    """
    if not tids:
        return []
    replies = await connection.run(
        [command("HMGET", keys.group_part(gid, part), *tids) for part in ("tasks", "claims", "needs", "results")]
        + [command("HMGET", keys.group_part(gid, "meta"), "status", "defaults", "waited")]
    )
    with reading(f"the defaults of group {gid!r}"):
        facts = _group_facts(*replies[4])
    found = []
    for tid, text, claim, needs, result in zip(tids, *replies[:4], strict=True):
        try:
            with reading(f"task {gid}/{tid}"):
                # A task that ended between these reads shows up as open too; its result wins.
                if result:
                    found.append(_ended(gid, result_of(tid, result), facts.uses))
                elif text:
                    found.append(_open(gid, tid, text, claim, int(needs or 0), facts))
        except RecordError as error:
            warn_once(f"Left out: {error}")
    return await _with_errors(connection, keys, gid, found)


async def _with_errors(connection: Connection, keys: Keys, gid: str, views: list[TaskView]) -> list[TaskView]:
    """With the last error of each task that was tried before and has neither completed nor failed."""
    names = []
    for view in views:
        if view.status is TaskStatus.CANCELLED:  # by its last attempt, or while it waited for another one
            names += [f"{view.task_id} {attempt}" for attempt in (view.attempt - 1, view.attempt) if attempt > 0]
        elif not view.status.is_final:  # attempt 0 is that of a task that had failed and was reopened
            names.append(f"{view.task_id} {view.attempt - 1}")
    if not names:
        return views
    (texts,) = await connection.run([command("HMGET", keys.group_part(gid, "errors"), *names)])
    errors = {}
    for name, text in zip(names, texts, strict=True):
        try:
            with reading(f"the error of task {gid}/{name}"):
                if text:
                    errors[name.split()[0]] = dict(decode(text))
        except RecordError as error:
            warn_once(f"Left out: {error}")
    return [replace(view, last_error=errors.get(view.task_id)) for view in views]


async def errors(connection: Connection, keys: Keys, gid: str, tid: str) -> list[AttemptError]:
    """
    How the attempts of a task failed, oldest first: at most the last five, and what it had failed with before a retry.

    Raises:
        NotFoundError: there is no such group or task.
    """
    view = await task(connection, keys, gid, tid)
    attempts = [0, *range(max(1, view.attempt - ERRORS_KEPT), view.attempt + 1)]
    (texts,) = await connection.run(
        [command("HMGET", keys.group_part(gid, "errors"), *(f"{tid} {attempt}" for attempt in attempts))]
    )
    found = []
    with reading(f"an error of task {gid}/{tid}"):
        for attempt, text in zip(attempts, texts, strict=True):
            if text:
                found.append(_error(attempt, decode(text)))
    if (result := view.result) and result.error:
        facts = {"worker": result.worker, "started": result.started_ms, "ended": result.ended_ms}
        found.append(_error(result.attempts, {**result.error, **facts}))
    return found


def _error(attempt: int, facts: Mapping[str, Any]) -> AttemptError:
    kind, message, traceback, worker = (
        str(facts.get(name) or "") for name in ("type", "message", "traceback", "worker")
    )
    return AttemptError(attempt, kind, message, traceback, worker, facts.get("started"), facts.get("ended"))


def _results(gid: str, tids: Sequence[str], texts: Sequence[str | None]) -> dict[str, TaskResult]:
    found = {}
    for tid, text in zip(tids, texts, strict=True):
        if text:
            with reading(f"the result of task {gid}/{tid}"):
                found[tid] = result_of(tid, text)
    return found


def _ended(gid: str, result: TaskResult, uses: str = "") -> TaskView:
    """`uses`: the function of the group's tasks that name none. That of others is kept only if they failed."""
    payload = result.payload
    return TaskView(
        uses="" if payload is None else payload.get("uses") or uses,
        group_id=gid,
        task_id=result.task_id,
        status=result.status,
        role=result.role,
        reason=result.reason,
        attempt=result.attempts,
        crashes=result.crashes,
        worker=result.worker,
        started_ms=result.started_ms,
        result=result,
    )


class _GroupFacts(NamedTuple):
    """The facts of a group that task views need. `waited_ms`: its wait for other groups; None while it waits."""

    closed: bool
    uses: str
    waited_ms: int | None


def _group_facts(status: str | None, defaults: str | None, waited: str | None) -> _GroupFacts:
    return _GroupFacts(
        status in (GroupStatus.CLOSING, GroupStatus.FINISHED),
        (decode(defaults) if defaults else {}).get("uses") or "",
        None if status in (GroupStatus.STAGING, GroupStatus.WAITING) else int(waited or 0),
    )


def _open(gid: str, tid: str, text: str, claim: str | None, needs: int, facts: _GroupFacts) -> TaskView:
    role, _, not_before, _, body = task_parts(text)
    attempt, attempts, crashes, worker, started = 1, 0, 0, "", None
    # A delay counts from the time at which the group became active.
    due = None if not_before is None or facts.waited_ms is None else not_before + facts.waited_ms
    running = False
    if claim:
        record = CLAIM.parse(claim)
        attempt, crashes, running = record["attempt"], record["crashes"], record["state"] in RUNNING
        # As lua/group_ends.lua counts them in a result.
        attempts = 0 if record["fence"] == "0" else attempt - (record["state"] == "r")
        due = int(record["due"]) if record["due"] not in ("", "room") else None
        if running:
            worker, started, due = record["worker"], int(record["started"]), None
    payload = decode(body)
    uses = payload.get("uses") or facts.uses
    if facts.closed and not running:  # closing a group writes no results for tasks that do not run
        result = TaskResult(tid, TaskStatus.CANCELLED, "closed", role, attempts, crashes, payload=payload)
        return _ended(gid, result, uses)
    status = TaskStatus.IN_PROGRESS if running else TaskStatus.WAITING if needs else TaskStatus.PENDING
    return TaskView(
        group_id=gid,
        task_id=tid,
        status=status,
        role=role,
        uses=uses,
        attempt=attempt,
        crashes=crashes,
        worker=worker,
        started_ms=started,
        due_ms=due,
        needs=needs,
    )


async def running(connection: Connection, keys: Keys, gid: str) -> list[TaskView]:
    """Some of a group's running tasks, longest first: all of them unless very many are running or being retried."""
    ((_, found),) = await connection.run([command("HSCAN", keys.group_part(gid, "claims"), "0", "COUNT", SCAN)])
    tids = [tid for tid, claim in _fields(found).items() if claim.split("|", 1)[0] in RUNNING]
    views = [view for view in await some_tasks(connection, keys, gid, tids) if view.status is TaskStatus.IN_PROGRESS]
    views = await _with_progress(connection, keys, views)
    return sorted(views, key=lambda view: view.started_ms or 0)


async def _with_progress(connection: Connection, keys: Keys, views: list[TaskView]) -> list[TaskView]:
    names = sorted({view.worker for view in views if view.status is TaskStatus.IN_PROGRESS})
    said: dict[str, tuple[float | None, str]] = {}
    for name, facts in (await _heartbeats(connection, keys, names)).items():
        try:
            with reading(f"the progress in the heartbeat of {name!r}"):
                said |= {task: (part, words) for task, (part, words) in (facts or {}).get("progress", {}).items()}
        except RecordError as error:
            warn_once(f"Left out: {error}")
    return [replace(view, progress=said.get(view.id, view.progress)) for view in views]


async def results(connection: Connection, keys: Keys, gid: str, tids: Sequence[str]) -> dict[str, TaskResult]:
    """The results of these tasks, for those that have one."""
    if not tids:
        return {}
    (texts,) = await connection.run([command("HMGET", keys.group_part(gid, "results"), *tids)])
    return _results(gid, tids, texts)


async def result_texts(connection: Connection, keys: Keys, gid: str, tids: Sequence[str]) -> dict[str, str]:
    """The results of these tasks as they are stored, for those that have one."""
    (texts,) = await connection.run([command("HMGET", keys.group_part(gid, "results"), *tids)])
    return {tid: text for tid, text in zip(tids, texts, strict=True) if text}


async def count_open(connection: Connection, keys: Keys, gid: str, tids: Iterable[str]) -> int:
    """The number of these tasks that have not ended."""
    tasks = keys.group_part(gid, "tasks")
    return sum(await connection.run([command("HEXISTS", tasks, tid) for tid in tids]))


async def needs(connection: Connection, keys: Keys, gid: str, tids: Sequence[str]) -> dict[str, list[str]]:
    """The needs of each of these tasks that is open. A task that has ended no longer stores its needs."""
    (texts,) = await connection.run([command("HMGET", keys.group_part(gid, "tasks"), *tids)])
    with reading(f"a task of group {gid!r}"):
        bodies = {tid: decode(task_parts(text)[-1]) for tid, text in zip(tids, texts, strict=True) if text}
    return {tid: body["needs"] for tid, body in bodies.items() if body.get("needs")}


async def has_needs(connection: Connection, keys: Keys, gid: str) -> bool:
    """Whether tasks of this group need others."""
    (dag,) = await connection.run([command("HGET", keys.group_part(gid, "meta"), "dag")])
    return bool(dag == "1")


async def stopping(connection: Connection, keys: Keys, wanted: Mapping[str, Sequence[str]]) -> set[tuple[str, str]]:
    """The tasks among these running ones, `{gid: tids}`, that were asked to stop."""
    calls = []
    for gid, tids in wanted.items():
        calls.append(command("HGET", keys.group_part(gid, "meta"), "stop"))
        calls.append(command("HMGET", keys.group_part(gid, "claims"), *tids))
    replies = iter(await connection.run(calls, refusals=True))
    found: set[tuple[str, str]] = set()
    for gid, tids in wanted.items():
        stop, claims = next(replies) == "1", next(replies)
        if isinstance(claims, CeylonError):
            warn_once(f"Tasks of group {gid!r} cannot be cancelled here: {claims}")
            continue
        found.update((gid, tid) for tid, claim in zip(tids, claims, strict=True) if stop or (claim or "")[:1] == "c")
    return found


# ---- workers and roles -----------------------------------------------------------------------------------------------
async def workers(connection: Connection, keys: Keys) -> list[WorkerView]:
    """Workers and monitors that have a heartbeat, by name."""
    return [view for view in (await registered(connection, keys)).values() if view is not None]


async def registered(connection: Connection, keys: Keys) -> dict[str, WorkerView | None]:
    """All registered workers and monitors that sent no farewell; None for one without a heartbeat."""
    (names,) = await connection.run([command("SMEMBERS", keys.workers)])
    found = await _heartbeats(connection, keys, sorted(names))
    return {name: None if facts is None else _worker(name, facts) for name, facts in found.items()}


async def _heartbeats(connection: Connection, keys: Keys, names: Sequence[str]) -> dict[str, dict[str, Any] | None]:
    """
    The heartbeats of these workers and monitors: None for one that is missing, {} for one that cannot be read, which is
    logged once. A worker whose heartbeat cannot be read counts as alive, because the key has not expired.
    """
    replies = await connection.run([command("GET", keys.worker(name)) for name in names], refusals=True)
    found: dict[str, dict[str, Any] | None] = {}
    for name, reply in zip(names, replies, strict=True):
        try:
            if isinstance(reply, CeylonError):
                raise reply
            with reading(f"the heartbeat of {name!r}"):
                found[name] = None if reply is None else dict(decode(reply))
        except RecordError as error:
            warn_once(str(error))
            found[name] = {}
    return found


def _worker(name: str, facts: Mapping[str, Any]) -> WorkerView:
    # The heartbeat of another version may lack fields, or use them in another sense. A list with unknown values is
    # better than none.
    plain = WorkerView(name)
    known = {one.name: facts[one.name] for one in fields(WorkerView) if one.name in facts and one.name != "name"}
    fit = {field: value for field, value in known.items() if _is_alike(value, getattr(plain, field))}
    if len(fit) < len(known):
        warn_once(f"the heartbeat of {name!r} is read without: {', '.join(sorted(known.keys() - fit.keys()))}")
    return replace(plain, **fit)


def _is_alike(value: Any, plain: Any) -> bool:
    """
    Whether a heartbeat's value has the kind of its field: text, a number, a list of texts, or a mapping from texts to
    numbers.
    """
    match plain:
        case bool() | str():
            return type(value) is type(plain)
        case int():
            return type(value) is int
        case tuple():
            return isinstance(value, list) and all(isinstance(one, str) for one in value)
        case _:
            return isinstance(value, dict) and all(type(one) is int for one in value.values())


async def low_marks(connection: Connection, keys: Keys, names: Iterable[str], role: str) -> dict[str, int | None]:
    """For each worker, the fence in this role below which it holds nothing; None without a heartbeat."""
    marks: dict[str, int | None] = {}
    for name, facts in (await _heartbeats(connection, keys, sorted(names))).items():
        mine = facts.get("low_marks") if facts else None
        mark = mine.get(role) if isinstance(mine, dict) else 0
        marks[name] = None if facts is None else mark if isinstance(mark, int) else 0
    return marks


async def lease_s(connection: Connection, keys: Keys, role: str) -> float:
    """The lease in force in a role."""
    (lease_ms,) = await connection.run([command("HGET", keys.role_part(role, "meta"), "lease")])
    return int(lease_ms or 30_000) / 1000


async def waiting_since_ms(connection: Connection, keys: Keys, role: str, task_name: str) -> int | None:
    """Since when (epoch ms) no worker that knows this name has asked for its waiting tasks; None if none wait."""
    (since_ms,) = await connection.run([command("HGET", keys.role_part(role, "names"), task_name)])
    return None if since_ms is None else int(since_ms)


async def role_names(connection: Connection, keys: Keys) -> list[str]:
    (names,) = await connection.run([command("SMEMBERS", keys.roles)])
    return sorted(names)


async def roles(connection: Connection, keys: Keys) -> list[RoleView]:
    """The present state of all roles that were ever used."""
    names = await role_names(connection, keys)
    calls = []
    for name in names:
        streams = [keys.role_part(name, stream) for stream in STREAMS]
        calls += [command("XLEN", stream) for stream in streams]
        calls += [command("XINFO", "GROUPS", stream) for stream in streams]
        calls += [command("ZCARD", keys.role_part(name, part)) for part in ("by_name", "delayed")]
        calls.append(command("HGETALL", keys.role_part(name, "meta")))
    replies = iter(await connection.run(calls, refusals=True))
    serving: dict[str, list[WorkerView]] = collections.defaultdict(list)
    for worker in await workers(connection, keys):
        for role in worker.roles if worker.kind == "worker" else ():
            serving[role].append(worker)
    found = []
    for name in names:
        entries = sum(_number(next(replies)) for _ in STREAMS)
        delivered = sum(_pending(next(replies)) for _ in STREAMS)
        by_name, delayed = _number(next(replies)), _number(next(replies))
        totals, is_paused = dict[str, int](), False
        try:
            with reading(f"role {name!r}"):
                meta = _fields(next(replies))
                totals = {key[6:]: int(value) for key, value in meta.items() if key.startswith("total:")}
                is_paused = meta.get("paused") == "1"
        except RecordError as error:
            warn_once(f"Shown without its totals: {error}")
        mine = serving[name]
        found.append(
            RoleView(
                name=name,
                queued=entries - delivered + by_name,
                delivered=delivered,
                delayed=delayed,
                workers=len(mine),
                slots=sum(worker.slots for worker in mine),
                busy=sum(len(worker.tasks) for worker in mine),
                totals=totals,
                paused=is_paused,
            )
        )
    return found


async def role_meta(connection: Connection, keys: Keys, role: str) -> dict[str, str]:
    (reply,) = await connection.run([command("HGETALL", keys.role_part(role, "meta"))])
    return _fields(reply)


def _number(reply: Any) -> int:
    return reply if isinstance(reply, int) else 0


def _pending(reply: Any) -> int:
    # A stream that does not exist yet answers with an error; nothing is pending in it.
    return sum(int(_fields(group)["pending"]) for group in reply) if isinstance(reply, list) else 0


async def idle_consumers(connection: Connection, keys: Keys, role: str) -> list[tuple[str, int, int]]:
    """Consumers of a role's streams: name, pending entries, ms since they were last heard of; one row per stream."""
    replies: Iterable[Any] = await connection.run(
        [command("XINFO", "CONSUMERS", keys.role_part(role, stream), "workers") for stream in STREAMS], refusals=True
    )
    found = []
    for reply in replies:
        for consumer in reply if isinstance(reply, list) else ():
            fields = _fields(consumer)
            found.append((fields["name"], int(fields["pending"]), int(fields["idle"])))
    return found
