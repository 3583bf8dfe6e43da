"""Reads group files, YAML or JSON with one group per document, and reports every problem with its place."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

from pydantic_core import to_json

from rq_ceylon import goals
from rq_ceylon.errors import guess
from rq_ceylon.groupfile.matrix import MAX_COMBINATIONS
from rq_ceylon.groupfile.reader import Document, Path, Problems, read
from rq_ceylon.groupfile.shape import DefaultFields, GoalFields, GroupFields, shape
from rq_ceylon.groupfile.tasks import Tasks, read_tasks, read_texts
from rq_ceylon.models import DEFAULT_ROLE, DEFAULTS_BYTES_MAX, DEPENDS_ON_MAX, Dependency, Goal, Task, TaskGroup

GROUP_ID = re.compile("[0-9a-v]{20}|k[0-9a-f]{20}")
"""The form of the ids of submitted groups. Any other text in `depends_on` is the key or name of a group further up."""


def load(text: str | bytes, filename: str) -> list[TaskGroup]:
    """
    Read the groups of a file, in the order of the file. `filename` is only the prefix of the reported problems.

    Tasks with a matrix are expanded while one iterates over `tasks`. `depends_on` holds ids, and keys or names of
    groups further up in the file; `resolved` turns these into ids.

    Raises:
        GroupFileError: lists all problems in the order of the file. Only bad syntax and limits end the search early.
    """
    problems = Problems(filename)
    documents = read(text, problems)
    parts = [_parts(document) for document in documents]
    _check_groups(documents)
    if (size := sum(len(fields["tasks"]) for fields in parts)) > MAX_COMBINATIONS:
        documents[-1].add(("tasks",), f"{size:,} tasks up to here; give a file at most {MAX_COMBINATIONS:,}")
    if problems.found:
        problems.give_up()
    return [TaskGroup(**fields) for fields in parts]


def schema() -> str:
    """
    JSON Schema (draft 2020-12) of one document, for editors. It accepts everything that `load` accepts. It cannot
    express every rule of `load`, for example that a need must name a task of the group.
    """
    from rq_ceylon.groupfile.json_schema import make

    return json.dumps(make(), indent=2) + "\n"


def resolved(group: TaskGroup, submitted: Sequence[tuple[TaskGroup, str]]) -> list[str | Dependency]:
    """
    The groups on which this group of a file depends, by their ids, given the groups of the file that were submitted so
    far.
    """
    names = {one.name: gid for one, gid in submitted} | {one.key: gid for one, gid in submitted if one.key}
    found: list[str | Dependency] = []
    for one in group.depends_on:
        if isinstance(one, Dependency):
            found.append(replace(one, group=names.get(one.group, one.group)))
        else:
            found.append(names.get(one, one))
    return found


def samples(group: TaskGroup) -> Iterable[Task]:
    """
    The tasks of a group of a file, but only one task per matrix, and without its needs. One is enough, because `load`
    refuses everything that could be wrong with a single combination.
    """
    return list(group.tasks.samples()) if isinstance(group.tasks, Tasks) else group.tasks


def roles_of(group: TaskGroup) -> set[str]:
    """The roles of the tasks of a group of a file, as far as the file names them."""
    tasks = group.tasks
    roles = tasks.roles() if isinstance(tasks, Tasks) else (task.role for task in tasks)
    return {role or group.defaults.role or DEFAULT_ROLE for role in roles}


def _parts(document: Document) -> dict[str, Any]:
    data = document.value
    group = shape(document, GroupFields, data, ())
    given = data if isinstance(data, dict) else {}
    defaults = shape(
        document, DefaultFields, read_texts(document, ("defaults",), given.get("defaults"), None), ("defaults",)
    )
    if defaults is not None and (size := len(to_json(defaults, exclude_none=True))) > DEFAULTS_BYTES_MAX:
        what = f"{size:,} bytes, {DEFAULTS_BYTES_MAX:,} are allowed; give large values to the tasks that need them"
        document.add(("defaults",), what)
    tasks, goal = read_tasks(document, given.get("tasks")), _goals(document, given.get("goal"))
    return dict(group or ()) | {"tasks": tasks, "goal": goal, "defaults": Task(**dict(defaults or ()))}


def _goals(document: Document, data: Any) -> list[Goal]:
    found: list[Goal] = []
    if isinstance(data, list) and len(data) > goals.MAX_GOALS:  # check before any goal is read
        document.add(("goal",), f"{len(data):,} goals; give a group at most {goals.MAX_GOALS}")
        return []
    for at, value in enumerate(data if isinstance(data, list) else [] if data is None else [data]):
        path: Path = ("goal", at) if isinstance(data, list) else ("goal",)
        fields = shape(document, GoalFields, {"when": value} if isinstance(value, str) else value, path)
        if fields and document.check(path, goals.compile_goals, [*found, Goal(**dict(fields))]):
            found.append(Goal(**dict(fields)))
    return found


def _check_groups(documents: Sequence[Document]) -> None:
    """Check that groups depend only on earlier groups, and that no two groups share a key."""
    titles = [_titles(document) for document in documents]
    keys = [key for key, _ in titles]
    steps: list[dict[int, tuple[Path, str]]] = []  # per document: the documents it depends on, and where it says so
    for here, document in enumerate(documents):
        if keys[here] is not None and keys.index(keys[here]) < here:
            document.add(("key",), f"{keys[here]!r} is also the key of a group above; give another")
        steps.append({})
        for path, other in _depends_on(document):
            found = [at for at, title in enumerate(titles) if other == title[0]]
            found = found or [at for at, title in enumerate(titles) if other == title[1]]
            if here in found:
                document.add(path, "it depends on itself; remove it")
            elif len(found) > 1:
                document.add(path, f"{len(found)} groups are named {other!r}; give them keys, and write the key here")
            elif found:
                steps[here][found[0]] = path, other
            elif not GROUP_ID.fullmatch(other):
                options = [title for pair in titles[:here] for title in pair if title]
                remedy = guess(other, options, "name a group further up by its key or name, or give a group's id")
                document.add(path, f"no group has the key or name {other!r}; {remedy}")
    for here, document in enumerate(documents):
        for there, (path, other) in steps[here].items():
            if there > here:
                back = _way(steps, there, here)
                circle = " -> ".join(titles[at][1] or "?" for at in (here, *back))
                what = f"groups depend on each other in a circle: {circle}; remove one of these"
                down = f"the group {other!r} comes further down; move it before this one"
                document.add(path, what if back else down)


def _way(steps: Sequence[Mapping[int, Any]], start: int, end: int) -> list[int]:
    """The shortest path of dependencies between two documents; empty if there is none."""
    ways = {start: [start]}
    for at in (reached := [start]):
        for step in steps[at]:
            if step not in ways:
                ways[step] = [*ways[at], step]
                reached.append(step)
    return ways.get(end, [])


def _titles(document: Document) -> tuple[str | None, str | None]:
    data = document.value if isinstance(document.value, dict) else {}
    key, name = data.get("key"), data.get("name")
    return key if isinstance(key, str) else None, name if isinstance(name, str) else None


def _depends_on(document: Document) -> Iterator[tuple[Path, str]]:
    data = document.value.get("depends_on") if isinstance(document.value, dict) else None
    listed = data[:DEPENDS_ON_MAX] if isinstance(data, list) else [data]
    for at, one in enumerate(listed):
        if isinstance(one, str):
            yield ("depends_on", at), one
        elif isinstance(one, dict) and isinstance(one.get("group"), str):
            yield ("depends_on", at, "group"), one["group"]
