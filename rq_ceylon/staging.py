"""
Checks tasks and groups, and packs them into the form in which they are sent. No I/O: everything that can be refused
without Redis is refused here.
"""

from __future__ import annotations

import base64
import hashlib
import os
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any, Literal, NamedTuple, get_args

from pydantic_core import from_json

from rq_ceylon.attempt import check_max_attempts, check_max_crashes
from rq_ceylon.errors import InvalidInputError, PayloadTooLargeError, guess
from rq_ceylon.goals import CompiledGoal, compile_goals
from rq_ceylon.graph import MAX_NEEDS, in_order
from rq_ceylon.handlers import Handler, Registry
from rq_ceylon.models import (
    DEFAULT_RETENTION_S,
    DEFAULT_ROLE,
    DEFAULTS_BYTES_MAX,
    DEPENDS_ON_MAX,
    DESCRIPTION_MAX,
    KEY_MAX,
    MAX_RUNNING_MAX,
    PAYLOAD_BYTES_MAX,
    Dependency,
    Duration,
    NeedPolicy,
    Priority,
    Task,
    TaskGroup,
    check_id,
    check_priority,
    check_timeout,
    check_when,
    seconds,
)
from rq_ceylon.settings import retention_ms
from rq_ceylon.store import transitions
from rq_ceylon.store.codec import encode, task_text
from rq_ceylon.store.keys import STREAMS
from rq_ceylon.store.transitions import SUBMIT_TASKS_MAX, GroupFacts, StagedTask, in_batches
from rq_ceylon.values import BadValueError, JsonType


def check_group(group: TaskGroup, registry: Registry | None = None) -> None:
    """
    Make all checks of a submission that need no Redis. Consumes `group.tasks` if it is an iterator.

    Args:
        registry: the handlers known here, which check the arguments of their tasks.

    Raises:
        InvalidInputError: as `Client.submit`.
    """
    for _ in StagedGroup(group, registry, gid=new_id()).parts():
        pass


class StagedGroup:
    """
    A group in the form in which it is sent: its facts, and its tasks in parts of at most 500 tasks and 4 MiB. The parts
    are made one at a time, so that a large group need not be in memory.

    Attributes:
        gid: the id of the group; the same for the same key.
        others: the ids of the groups on which it depends.
        roles, count: the roles and the number of tasks in the parts that were made so far.
    """

    def __init__(self, group: TaskGroup, registry: Registry | None, *, gid: str) -> None:
        if not isinstance(group.name, str) or not 0 < len(group.name) <= 200:
            raise InvalidInputError(f"group: name: {group.name!r} is not usable; give 1 to 200 characters")
        _check_text(group.description, "group: description", DESCRIPTION_MAX)
        _check_text(group.key or "", "group: key", KEY_MAX)
        _check_kept_with_group(group.defaults, "defaults")
        defaults = _present(_shared(group.defaults, "defaults"))
        if (size := len(_encoded(defaults, "defaults"))) > DEFAULTS_BYTES_MAX:
            raise PayloadTooLargeError(
                f"group: defaults: {size:,} bytes, {DEFAULTS_BYTES_MAX:,} are allowed; "
                "give large values to the tasks that need them"
            )
        self.group, self.gid = group, gid
        self.what = f"group {group.name!r}"
        self.goals = compile_goals(group.goal)
        self.facts = GroupFacts(
            name=group.name,
            retention_ms=retention_ms(group.retention, "retention"),
            key=group.key or "",
            description=group.description,
            defaults=defaults,
            goals=self.goals,
            depends_on=_others(group.depends_on, f"{self.what}: depends_on"),
            on_need_failed=_need_policy(group.on_need_failed, f"{self.what}: on_need_failed"),
            open=_open_word(group.open, f"{self.what}: open"),
            open_timeout_ms=_open_ms(group.open_timeout, f"{self.what}: open_timeout"),
            max_running=_max_running(group.max_running, f"{self.what}: max_running"),
            then=_follow_ups(group, registry, gid, self.what),
            lazy=_is_lazy(group.dispatch, self.goals, f"{self.what}: dispatch"),
            added_defaults=_added_defaults(group),
        )
        self.others = list(dict.fromkeys(other.partition("=")[0] for other in self.facts.depends_on))
        self.roles: set[str] = set()
        self.count = 0
        self._registry = registry

    def digest(self) -> bytes:
        """The digest of everything but the tasks. The digests of the parts are chained from it."""
        # The default for what is kept may change between two submissions of the same content.
        own = self.facts if self.group.retention is not None else replace(self.facts, retention_ms=_DEFAULT_MS)
        facts = [own.meta()[1::2], own.programs(), list(own.depends_on)]
        return hashlib.sha256(encode(facts)).digest()

    def parts(self) -> Iterator[list[StagedTask]]:
        return in_batches(self._staged(), lambda staged: staged.size, SUBMIT_TASKS_MAX)

    def _staged(self) -> Iterator[StagedTask]:
        for tid, task in self._tasks():
            ready = stage_in_group(task, self._registry, tid, self.group.defaults, self.group.priority)
            self.roles.add(ready.role)
            self.count += 1
            yield StagedTask(tid, ready.text, ready.needs, ready.known)
        if not self.count and not self.group.open:
            raise InvalidInputError(f"{self.what} has no tasks; give at least one")

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
                raise InvalidInputError(f"{self.what}: two tasks have the id {tid!r}; ids are unique")
            by_id[tid] = task
        # Send a task after those that it needs, so that Redis can check each part against the parts before it.
        if any(task.needs for task in tasks):
            for tid in in_order({tid: task.needs for tid, task in by_id.items()}, self.what):
                yield tid, by_id[tid]
        else:
            yield from by_id.items()


class ReadyTask(NamedTuple):
    """
    A task in the form in which it is sent, without its id.

    Attributes:
        text: its record.
        known: the text for the digest, if it differs from `text`: without the metadata of `on_submit` hooks, which may
            differ each time. So a repeated submission is known again.
        stream: the number of its priority.
    """

    text: bytes
    known: bytes
    role: str
    stream: int
    needs: Sequence[str]
    delay_ms: int | None


_NOTHING = Task()
_DEFAULT_MS = round(DEFAULT_RETENTION_S * 1000)
_ANY_JSON = JsonType(None)


def stage(
    task: Task,
    registry: Registry | None,
    tid: str = "",
    defaults: Task = _NOTHING,
    priority: Priority | str | None = None,
) -> ReadyTask:
    """
    Check a task and pack it. A field that is None is taken from the group, or else from the handler.

    Args:
        registry: the handlers known here, which check the arguments of their tasks.
        priority: the priority of the group.

    Raises:
        InvalidInputError: a field, or an argument, cannot be used.
    """
    where = f"task {tid or task.uses or 'default'!r}"
    uses = task.uses or defaults.uses
    handler = handler_of(task, uses, registry)
    arguments = handler.check(task.arguments) if handler is not None else _json(task.arguments, where)
    role = task.role or defaults.role or (handler.role if handler else None) or DEFAULT_ROLE
    check_id(role, f"{where}: role")
    rank = task.priority or defaults.priority or priority or (handler.priority if handler else None) or Priority.NORMAL
    rank = check_priority(rank, f"{where}: priority")
    body = {
        **_rules(handler, task, defaults, registry),
        **_present(_shared(task, where)),
        "arguments": arguments or None,
        "needs": list(task.needs) or None,
    }
    blob, known = _encoded(_present(body), where), b""
    if registry is not None and registry.on_submit:
        metadata = {**_added(task, registry, where), **(task.metadata or {})}
        blob, known = _encoded(_present({**body, "metadata": metadata or None}), where), blob
    if len(blob) > PAYLOAD_BYTES_MAX:
        raise PayloadTooLargeError(
            f"{where}: its arguments are {len(blob):,} bytes, {PAYLOAD_BYTES_MAX:,} are allowed; "
            "store the data elsewhere and pass a reference"
        )
    delay_ms = _ms(defaults.delay if task.delay is None else task.delay, f"{where}: delay")
    expires_ms = _ms(defaults.expires if task.expires is None else task.expires, f"{where}: expires")
    crashes = defaults.max_crashes if task.max_crashes is None else task.max_crashes
    crashes = handler.max_crashes if crashes is None and handler is not None else crashes
    crashes = None if crashes is None else check_max_crashes(crashes, f"{where}: max_crashes")
    text = task_text(role, STREAMS[rank], delay_ms, expires_ms, crashes, blob)
    known = known and task_text(role, STREAMS[rank], delay_ms, expires_ms, crashes, known)
    return ReadyTask(text, known, role, STREAMS[rank], list(dict.fromkeys(task.needs)), delay_ms)


def stage_in_group(
    task: Task, registry: Registry | None, tid: str, defaults: Task, priority: Priority | str | None = None
) -> ReadyTask:
    """`stage`, for a task of a group, which cannot be kept longer than its group."""
    _check_kept_with_group(task, f"task {tid!r}")
    return stage(task, registry, tid, defaults, priority)


def stage_child(registry: Registry | None, role: str, task: Task) -> StagedTask:
    """
    A task that another one spawns.

    Args:
        role: the role of the task that spawns it.

    Raises:
        InvalidInputError: it cannot be used.
    """
    tid = new_id() if task.id is None else check_id(task.id, "task id")
    if len(task.needs) > MAX_NEEDS:
        raise InvalidInputError(f"task {tid!r} needs {len(task.needs):,} tasks, {MAX_NEEDS} are allowed")
    if task.role is None:
        handler = handler_of(task, task.uses, registry)
        task = replace(task, role=(handler and handler.role) or role)
    ready = stage_in_group(task, registry, tid, _NOTHING)
    return StagedTask(tid, ready.text, ready.needs)


def _added(task: Task, registry: Registry, where: str) -> dict[str, Any]:
    """The metadata that the `on_submit` hooks add to a task."""
    added: dict[str, Any] = {}
    for hook in registry.on_submit:
        more = hook(task)
        if more is not None and not isinstance(more, Mapping):
            raise InvalidInputError(f"{where}: on_submit gave {more!r}; return an object of metadata, or None")
        added |= more or {}
    return added


def _check_kept_with_group(task: Task, where: str) -> None:
    if task.retention is not None:
        raise InvalidInputError(
            f"{where}: retention: {task.retention!r} cannot be kept: a task is kept as long as its group; give the "
            "retention to the group"
        )


def _encoded(fields: dict[str, Any], where: str) -> bytes:
    try:
        blob = encode(fields)
        if b"NaN" in blob or b"Infinity" in blob:  # in a text, or as a number, which is not JSON
            from_json(blob, allow_inf_nan=False)
        return blob
    except ValueError as error:
        raise InvalidInputError(f"{where}: it is not JSON ({error}); give plain values") from error


def _check_text(text: object, where: str, most: int) -> None:
    if not isinstance(text, str) or len(text) > most:
        what = f"has {len(text):,} characters" if isinstance(text, str) else f"is {text!r}"
        raise InvalidInputError(f"{where}: {what}; give text of at most {most:,}")


def handler_of(task: Task, uses: str | None, registry: Registry | None) -> Handler[..., Any] | None:
    """The handler that checks a task and gives its rules: the one bound to it, else the one known here."""
    bound: Handler[..., Any] | None = task.handler
    if bound is not None and uses in (bound.name, *bound.aliases):
        return bound
    return registry.find(uses) if registry and uses else None


def _rules(
    handler: Handler[..., Any] | None, task: Task, defaults: Task, registry: Registry | None
) -> dict[str, float | int | None]:
    """The rules to send along, if the handler is of another application. Workers know those of this one's handlers."""
    if handler is None or handler is not task.handler or (registry and registry.find(handler.name) is handler):
        return {}
    return {
        "timeout": handler.timeout_s if defaults.timeout is None else None,
        "max_attempts": handler.max_attempts if defaults.max_attempts is None else None,
    }


def _json(arguments: Mapping[str, Any], where: str) -> dict[str, Any]:
    try:
        return dict(_ANY_JSON.write(dict(arguments)))
    except BadValueError as bad:
        raise InvalidInputError("; ".join(bad.described(f"{where}: arguments"))) from None


def _shared(task: Task, where: str) -> dict[str, Any]:
    """The fields of a task that its worker needs and that the defaults of its group can give too."""
    attempts = task.max_attempts
    return {
        "uses": None if task.uses is None else check_id(task.uses, f"{where}: uses"),
        "duration": None if task.duration is None else seconds(task.duration, f"{where}: duration"),
        "timeout": None if task.timeout is None else check_timeout(task.timeout, f"{where}: timeout"),
        "max_attempts": None if attempts is None else check_max_attempts(attempts, f"{where}: max_attempts"),
        "metadata": dict(task.metadata) if task.metadata else None,
    }


def _others(groups: Sequence[str | Dependency], where: str) -> list[str]:
    """The groups on which another one depends, as `gid` or `gid=when`."""
    if isinstance(groups, str | Dependency) or len(groups) > DEPENDS_ON_MAX:
        raise InvalidInputError(f"{where}: {groups!r} is not usable; give a list of at most {DEPENDS_ON_MAX} group ids")
    found = []
    for one in groups:
        gid, when = (one.group, one.when) if isinstance(one, Dependency) else (one, "completed")
        when = check_when(when, f"{where}: when")
        found.append(check_id(gid, where) + ("" if when == "completed" else f"={when}"))
    return list(dict.fromkeys(found))


def _open_word(value: object, where: str) -> Literal["0", "o", "i"]:
    match value:
        case False:
            return "0"
        case True:
            return "o"
        case "until_idle":
            return "i"
    raise InvalidInputError(f"{where}: {value!r} is not usable; give True, False or 'until_idle'")


def _open_ms(value: Duration, where: str) -> int:
    timeout_s = seconds(value, where)
    if timeout_s <= 0:
        raise InvalidInputError(f"{where}: {value!r} is not usable; give a duration above 0")
    return round(timeout_s * 1000)


def _max_running(value: object, where: str) -> int:
    if value is None:
        return 0
    if isinstance(value, bool) or not isinstance(value, int) or not 0 < value <= MAX_RUNNING_MAX:
        raise InvalidInputError(f"{where}: {value!r} is not usable; give a whole number from 1 to {MAX_RUNNING_MAX:,}")
    return value


def _follow_ups(group: TaskGroup, registry: Registry | None, gid: str, what: str) -> list[dict[str, Any]]:
    """The groups that follow this one, packed."""
    if group.then is None:
        return []
    given = {"completed": group.then} if isinstance(group.then, TaskGroup) else group.then
    if not isinstance(given, Mapping) or not all(isinstance(one, TaskGroup) for one in given.values()):
        raise InvalidInputError(
            f"{what}: then: {given!r} is not usable; give a TaskGroup, or a mapping of conditions to them"
        )
    packed = []
    for when, follower in given.items():
        where = f"{what}: then ({check_when(when, f'{what}: then')})"
        _check_achieved(when, group, where)
        if follower.key or follower.depends_on:
            raise InvalidInputError(f"{where}: it can have neither a key nor depends_on; it follows this group alone")
        defaults = replace(follower.defaults, metadata={**(follower.defaults.metadata or {}), "after": gid})
        staged = StagedGroup(replace(follower, defaults=defaults), registry, gid=keyed_id(gid, f"then {when}"))
        first, *more = staged.parts()
        if more:
            raise InvalidInputError(
                f"{where}: it has more than {SUBMIT_TASKS_MAX} tasks; submit them from one of its tasks"
            )
        digest = chain(staged.digest(), first).hex()[:32]
        packed.append(transitions.packed(when, staged.gid, staged.facts, first, digest))
    if (size := len(encode(packed))) > DEFAULTS_BYTES_MAX:
        raise PayloadTooLargeError(
            f"{what}: then: {size:,} bytes, {DEFAULTS_BYTES_MAX:,} are allowed; "
            "submit large groups from a task of a small one"
        )
    return packed


def _check_achieved(when: str, group: TaskGroup, where: str) -> None:
    names = [goal.name for goal in compile_goals(group.goal)]
    goal = when.removeprefix("achieved:")
    if when.startswith("achieved:") and goal not in names:
        raise InvalidInputError(f"{where}: there is no goal {goal!r}; {guess(goal, names, 'give the group one')}")


def _is_lazy(value: object, goals: Sequence[CompiledGoal], where: str) -> bool:
    if value not in ("eager", "lazy"):
        raise InvalidInputError(f"{where}: {value!r} is not known; use eager or lazy")
    if value == "lazy" and all(goal.on_achieved == "continue" for goal in goals):
        raise InvalidInputError(
            f"{where}: lazy needs a goal that ends the group; give it a goal with on_achieved: drain or cancel"
        )
    return value == "lazy"


def _added_defaults(group: TaskGroup) -> dict[str, Any]:
    """What tasks that are added later get from their group, beside the defaults that its workers read."""
    if not group.open:
        return {}
    own, where = group.defaults, "defaults"
    priority = own.priority or group.priority
    return _present(
        {
            "role": None if own.role is None else check_id(own.role, f"{where}: role"),
            "priority": None if priority is None else check_priority(priority, f"{where}: priority"),
            "max_crashes": own.max_crashes,
            "delay": None if own.delay is None else seconds(own.delay, f"{where}: delay"),
            "expires": None if own.expires is None else seconds(own.expires, f"{where}: expires"),
        }
    )


def _need_policy(policy: str, where: str) -> str:
    if policy not in get_args(NeedPolicy):
        raise InvalidInputError(f"{where}: {policy!r} is not known; use {', '.join(get_args(NeedPolicy))}")
    return policy


def _present(fields: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in fields.items() if value is not None}


def _ms(value: Duration | None, name: str) -> int | None:
    return None if value is None else round(seconds(value, name) * 1000)


def _task_id(task: Task, position: int) -> str:
    return str(position) if task.id is None else check_id(task.id, "task id")


# ---- ids and digests -------------------------------------------------------------------------------------------------
def keyed_id(namespace: str, key: str) -> str:
    return "k" + hashlib.sha256(f"{namespace}\0{key}".encode()).hexdigest()[:20]


def new_id() -> str:
    """An id that sorts by time. Its 50 random bits come from the system, so a forked process gets others."""
    stamp = int(time.time() * 1000).to_bytes(6, "big")
    return base64.b32hexencode(stamp + os.urandom(7)).decode().rstrip("=").lower()[:20]


def chain(digest: bytes, tasks: Sequence[StagedTask]) -> bytes:
    """The digest of all parts up to this one. By it a repeated part, or the content under a key, is known again."""
    longer = hashlib.sha256(digest)
    for task in tasks:
        longer.update(b"%b\0%b\0%b\0" % (task.tid.encode(), task.known or task.text, " ".join(task.needs).encode()))
    return longer.digest()
