"""The tasks of a group file. They are read and checked as written, and expanded only while they are sent."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import count, zip_longest
from math import prod
from typing import Any

from pydantic_core import to_json

from rq_ceylon import graph, models
from rq_ceylon.errors import InvalidInputError, guess
from rq_ceylon.groupfile.matrix import (
    AXIS,
    MAX_BOUND,
    MAX_COMBINATIONS,
    MAX_LISTED,
    Axis,
    Matrix,
    Piece,
    Row,
    Text,
    as_text,
    canonical,
    fill,
    joined,
    read_text,
    texts_in,
)
from rq_ceylon.groupfile.reader import Document, Path
from rq_ceylon.groupfile.shape import ListedTask, TaskFields, shape, shown
from rq_ceylon.models import Task

_ATTRIBUTES = {"with": "arguments"}
MAX_WRITTEN = 50_000
"""The limit of tasks as written, in all groups of a file; one with a matrix counts as one."""
MAX_ROLES = 10_000
NEED_COST = 4  # to look up a need takes as long as this many other checks
_GUESSES = 10  # after this many problems no more guesses, which are slow among many ids


@dataclass
class _Entry:
    """
    A task as written.

    Attributes:
        name: its id; with a matrix, the text with which the ids of its combinations begin.
        fixed: its fields without look-ups, by their names in `Task`.
        open: its fields with look-ups, by their names in `Task`.
    """

    path: Path
    name: str
    fixed: dict[str, Any] = field(default_factory=dict)
    open: dict[str, Any] = field(default_factory=dict)
    needs: list[str | Text] = field(default_factory=list)
    matrix: Matrix | None = None


class _Names:
    """All ids of a group. The ids that a matrix makes are not listed, because there may be a million."""

    def __init__(self) -> None:
        self.entries: dict[str, _Entry] = {}
        self.matrices: dict[str, Matrix] = {}

    def add(self, entry: _Entry) -> None:
        self.entries[entry.name] = entry
        if entry.matrix is not None:
            self.matrices[entry.name] = entry.matrix

    def made(self, task_id: str) -> Iterator[str]:
        """The names of tasks with a matrix of which one combination has this id."""
        for dash in re.finditer("-", task_id) if self.matrices else ():
            name = task_id[: dash.start()]
            if name in self.matrices and self.matrices[name].has(task_id):
                yield name

    def has(self, task_id: str) -> bool:
        """Whether a task as written, or a combination of one, has this id."""
        return task_id in self.entries or any(True for _ in self.made(task_id))

    def meant(self, need: str | Text, values: Row) -> dict[str, str]:
        """
        The ids that a need can mean, each with the name of its entry: the id of a task as written, which stands for all
        its combinations, or the id of one combination. If there is more than one, the need is ambiguous.
        """
        if isinstance(need, str):
            return self._meant(need.split("-"))
        found = self._meant(pieces := need.pieces(values))
        # A value may be an id, or contain dashes of its own. But a number in it must not select a numbered combination
        # of another matrix.
        if not found:
            written = self._meant(joined(pieces).split("-"))
            found = {
                task_id: owner
                for task_id, owner in written.items()
                if need.is_alone or owner not in self.matrices or not self.matrices[owner].has_numbers
            }
        return found

    def _meant(self, pieces: Sequence[Piece]) -> dict[str, str]:
        text = joined(pieces)
        found = {text: text} if text in self.entries else {}
        if self.matrices:
            for end in range(1, len(pieces)):
                name = joined(pieces[:end])
                if name in self.matrices:
                    found.update(dict.fromkeys(self.matrices[name].meant(pieces[end:]), name))
        return found

    def ids(self, named: str) -> Iterator[str]:
        """The ids that a need stands for: one task, or all combinations of one."""
        matrix = self.matrices.get(named)
        return iter((named,)) if matrix is None else (matrix.id(words) for _, words in matrix.rows())

    def size(self, named: str) -> int:
        return len(self.matrices.get(named, (named,)))


class Tasks:
    """The tasks of a group with a matrix. Iterating expands them, each after the tasks that it needs."""

    def __init__(self, names: _Names, order: Sequence[str]) -> None:
        self._names, self._order = names, order

    def __len__(self) -> int:
        return sum(map(self._names.size, self._order))

    def __iter__(self) -> Iterator[Task]:
        for name in self._order:
            entry = self._names.entries[name]
            if entry.matrix is None:
                yield Task(**entry.fixed, id=name, needs=self._needs(entry.needs))
                continue
            is_same = not any(isinstance(need, Text) for need in entry.needs)
            same = self._needs(entry.needs) if is_same else []
            for values, words in entry.matrix.rows():
                filled = {key: fill(value, values) for key, value in entry.open.items()}
                needs = same if is_same else self._needs(entry.needs, values)
                yield Task(**entry.fixed, **filled, id=entry.matrix.id(words), needs=needs)

    def _needs(self, needs: Sequence[str | Text], values: Row | None = None) -> list[str]:
        return [
            task_id
            for need in needs
            for named in self._names.meant(need, values or {})
            for task_id in self._names.ids(named)
        ]

    def samples(self) -> Iterator[Task]:
        """One task per entry, without its needs, to check the file before any task is sent."""
        for name in self._order:
            entry = self._names.entries[name]
            values = next(entry.matrix.rows())[0] if entry.matrix else {}
            filled = {key: fill(value, values) for key, value in entry.open.items()}
            yield Task(**entry.fixed, **filled, id=name)

    def roles(self) -> Iterator[str | None]:
        """The roles of all tasks; each role occurs at least once."""
        for name in self._order:
            entry = self._names.entries[name]
            if entry.matrix is None or "role" not in entry.open:
                yield entry.fixed.get("role")
            else:
                text = entry.open["role"]
                yield from (text.fill(values) for values, _ in entry.matrix.rows(text.axes))


def read_tasks(document: Document, data: Any) -> Sequence[Task] | Tasks:
    """Read the tasks under `tasks:`, and report their problems."""
    if not data or not isinstance(data, dict | list):
        if data is not None:  # otherwise the group's shape reports it
            document.add(("tasks",), f"{shown(data)} where tasks are needed; write one per key, or a list of them")
        return []
    document.problems.tasks += len(data)
    if document.problems.tasks > MAX_WRITTEN:
        remedy = "write tasks alike with a matrix, or submit them from Python"
        what = f"{document.problems.tasks:,} tasks are written up to here, {MAX_WRITTEN:,} are allowed; {remedy}"
        document.problems.stop(("tasks",), what, None, number=document.number)
    names = _Names()
    for at, (key, value) in enumerate(data.items() if isinstance(data, dict) else ((None, value) for value in data)):
        _read_entry(document, names, at, key, value)
    _check_ids(document, names)
    order = _check_needs(document, names)
    if not names.matrices:
        return [
            Task(**one.fixed, id=None if name.startswith("#") else name, needs=list(map(str, one.needs)))
            for name, one in names.entries.items()
        ]
    return Tasks(names, order)


def _read_entry(document: Document, names: _Names, at: int, key: str | None, value: Any) -> None:
    path: Path = ("tasks", at if key is None else key)
    model = ListedTask if key is None else TaskFields
    given = value.get("matrix") if isinstance(value, dict) else None
    name = key if key is not None else value.get("id") if isinstance(value, dict) else None
    name = str(name) if isinstance(name, str | int) else ""
    matrix = None if given is None else _read_matrix(document, (*path, "matrix"), name, given)
    entry = _Entry(path, name or f"#{at}", matrix=matrix)
    texts: list[Text | None] = []
    if isinstance(value, dict) and given is not None and matrix is None:
        # Fields with look-ups cannot be checked without the matrix, which has problems of its own.
        value = {key: one for key, one in value.items() if "${{" not in str(one)}
    elif isinstance(value, dict):
        value, texts = _read_open(document, entry, model, value)
    fields = shape(document, model, value, path)
    if key is not None:
        document.check(path, models.check_id, key, "id")
    elif name in names.entries:
        where = f"tasks[{names.entries[name].path[1]}]"
        document.add((*path, "id"), f"{name!r} is also the id of {where}; give another")
    elif given is not None and not name:
        document.add((*path, "matrix"), "its tasks have no name to begin their ids with; add an id")
    if fields is not None:
        entry.fixed = {key: one for key, one in fields if key not in ("id", "needs", "matrix", *entry.open)}
        if matrix is not None:
            _check_size(document, entry, matrix)
        entry.needs = [text or need for need, text in zip_longest(fields.needs, texts)]
    names.add(entry)


def _read_open(
    document: Document, entry: _Entry, model: type[TaskFields], value: dict[str, Any]
) -> tuple[dict[str, Any], list[Text | None]]:
    """
    Read the texts of a task, and move fields with look-ups into the entry.

    Returns:
        the fields that are the same for all combinations, and for each need its look-ups or None. In the fields, `_`
        stands for a need with look-ups.
    """
    closed: dict[str, Any] = {}
    texts: list[Text | None] = []
    for key, given in value.items():
        path = (*entry.path, key)
        if key in ("id", "matrix"):
            closed[key] = given
        elif key == "needs" and given is not None:
            listed = given if isinstance(given, list) else [given]
            read = [read_texts(document, (*path, at), one, entry.matrix) for at, one in enumerate(listed)]
            texts = [one if isinstance(one, Text) else None for one in read]
            closed[key] = ["_" if isinstance(one, Text) else one for one in read]
        elif any(texts_in(read := read_texts(document, path, given, entry.matrix))):
            entry.open[_ATTRIBUTES.get(key, key)] = read
            _check_open(document, path, model, key, read, entry.matrix)
        else:
            closed[key] = read
    return closed, texts


def _check_size(document: Document, entry: _Entry, matrix: Matrix) -> None:
    """Limit the size of filled look-ups before filling any, because a text may name a long value a thousand times."""
    free = [entry.open.get(key, entry.fixed.get(key)) for key in ("arguments", "metadata")]
    size = sum(len(to_json(_closed(value))) for value in free if value)
    size += sum(text.longest(matrix) for value in entry.open.values() for text in texts_in(value))
    if size > models.PAYLOAD_BYTES_MAX:
        what = f"its arguments become up to {size:,} bytes, {models.PAYLOAD_BYTES_MAX:,} are allowed"
        document.add(entry.path, f"{what}; store the data elsewhere and pass a reference", at_key=True)


def _closed(value: Any) -> Any:
    """The value without its look-ups."""
    match value:
        case Text():
            return ""
        case dict():
            return {key: _closed(one) for key, one in value.items()}
        case list():
            return [_closed(one) for one in value]
    return value


def read_texts(document: Document, path: Path, value: Any, matrix: Matrix | None) -> Any:
    match value:
        case str():
            try:
                return read_text(value, matrix)
            except InvalidInputError as error:
                document.add(path, str(error).partition(": ")[2])
                document.refused.add(path)
        case dict():
            return {key: read_texts(document, (*path, key), one, matrix) for key, one in value.items()}
        case list():
            return [read_texts(document, (*path, at), one, matrix) for at, one in enumerate(value)]
    return value


def _check_open(
    document: Document, path: Path, model: type[TaskFields], key: str, value: Any, matrix: Matrix | None
) -> None:
    if isinstance(value, dict) and key in ("with", "metadata"):  # these fields accept any values
        return
    assert matrix is not None
    axes = list(dict.fromkeys(axis for text in texts_in(value) for axis in text.axes))
    document.spend(path, matrix.size(axes, ends=True))
    if key == "role" and (size := matrix.size(axes)) > MAX_ROLES:
        document.add(path, f"its look-ups name {size:,} roles, {MAX_ROLES:,} are allowed; use fewer values")
        return
    for values, _ in matrix.rows(axes, ends=True):
        if shape(document, model, {key: fill(value, values)}, path[:-1]) is None:
            return


def _read_matrix(document: Document, path: Path, name: str, data: Any) -> Matrix | None:
    if not data or not isinstance(data, dict):
        document.add(path, f"{shown(data)} where axes are needed; write name: [first, second]")
        return None
    known = len(document.problems.found)
    axes = []
    for key, given in data.items():
        if key in CHOICES:
            continue
        if not re.fullmatch(AXIS, key):
            what = f"{key!r} is not usable as an axis; use letters, digits, _ and -, not a digit first"
            document.add((*path, key), what, at_key=True)
        elif isinstance(given, list) and given:
            axes.append(Axis(key, given))
        elif isinstance(given, dict) and list(given) == ["range"]:
            axes += _read_range(document, (*path, key, "range"), key, given["range"])
        else:
            remedy = "write [first, second], or {range: [first, end]}"
            document.add((*path, key), f"{shown(given)} where values are needed; {remedy}")
    if len(document.problems.found) > known:
        return None
    exclude, include = (_read_choice(document, path, key, data.get(key), axes) for key in CHOICES)
    if len(document.problems.found) > known:
        return None
    if not axes and not include:
        document.add(path, "it has no axis; write name: [first, second]")
        return None
    try:
        return Matrix(name, axes, exclude, include)
    except InvalidInputError as error:
        document.add(path, str(error).partition(": ")[2])
    return None


CHOICES = ("exclude", "include")


def _read_choice(document: Document, path: Path, choice: str, given: Any, axes: Sequence[Axis]) -> list[dict[str, Any]]:
    """
    Read the combinations that a matrix excludes or includes. A value that only reads like a value of its axis is
    refused, because it would fit nothing.
    """
    path = (*path, choice)
    if given is None:
        return []
    if not isinstance(given, list) or not given or not all(isinstance(one, dict) and one for one in given):
        document.add(path, f"{shown(given)} where combinations are needed; write [{{axis: value}}]")
        return []
    document.spend(path, len(given) * min(prod(len(axis.values) for axis in axes), MAX_LISTED))
    known = {axis.name: axis for axis in axes}
    for at, one in enumerate(given):
        for key, value in one.items():
            here = (*path, at, key)
            if key not in known:
                if choice == "exclude":
                    remedy = guess(key, known, f"the axes are {', '.join(known)}")
                    document.add(here, f"{key!r} is not an axis of this matrix; {remedy}", at_key=True)
                elif not re.fullmatch(AXIS, key):
                    what = f"{key!r} is not usable as a name; use letters, digits, _ and -, not a digit first"
                    document.add(here, what, at_key=True)
            else:
                _check_choice(document, here, choice, known[key], value)
    return given


def _check_choice(document: Document, path: Path, choice: str, axis: Axis, value: Any) -> None:
    try:
        near = axis.nearest(value)
    except KeyError:
        if choice == "exclude":
            document.add(path, f"{shown(value)} is no value of the axis {axis.name!r}; name one, or remove this")
        return
    if canonical(near) != canonical(value):
        document.add(path, f"{shown(value)} is not {shown(near)}, the value of the axis {axis.name!r}; write it alike")


def _read_range(document: Document, path: Path, name: str, given: Any) -> list[Axis]:
    form = "write [first, end] or [first, end, step] in whole numbers; the end is not included"
    numbers = given if isinstance(given, list) else [given]
    if not 2 <= len(numbers) <= 3 or not all(type(one) is int and abs(one) <= MAX_BOUND for one in numbers):
        document.add(path, f"{given!r} is not a range; {form}")
    elif numbers[2:] == [0] or not range(*numbers):
        document.add(path, f"{given!r} is an empty range; {form}")
    else:
        return [Axis(name, range(*numbers))]
    return []


def _check_ids(document: Document, names: _Names) -> None:
    """Check that no id occurs twice: not as written and from a matrix, and not from two matrices."""
    if not names.matrices:
        return
    if (size := sum(map(names.size, names.entries))) > MAX_COMBINATIONS:
        document.add(("tasks",), f"{size:,} tasks; give a group at most {MAX_COMBINATIONS:,}")
        document.problems.give_up()
    numbers = (number for number in map(str, count(1)) if not names.has(number))
    for entry in names.entries.values():
        if entry.name.startswith("#"):
            entry.name = next(numbers)
    names.entries = {entry.name: entry for entry in names.entries.values()}
    for entry in names.entries.values():
        other = next(names.made(entry.name), None)
        if other is not None:
            document.add(entry.path, f"{entry.name!r} is also an id that {other!r} makes; rename one", at_key=True)
        if entry.matrix is None:
            continue
        for dash in re.finditer("-", entry.name):
            begin = names.matrices.get(entry.name[: dash.start()])
            if begin is None:
                continue
            document.spend(entry.path, min(len(entry.matrix), len(begin)))
            if twice := _shared(entry.matrix, begin):
                what = f"it makes the id {twice!r}, as {begin.name!r} does; rename one"
                document.add(entry.path, what, at_key=True)


def _shared(one: Matrix, other: Matrix) -> str | None:
    """An id that both matrices make."""
    few, many = (one, other) if len(one) < len(other) else (other, one)
    return next((task_id for _, words in few.rows() if many.has(task_id := few.id(words))), None)


def _check_needs(document: Document, names: _Names) -> list[str]:
    """Report needs that cannot be met. Returns the names of the tasks, each after those that it needs."""
    wanted: dict[str, list[str]] = {}
    for entry in names.entries.values():
        owners: dict[str, None] = {}
        size = sum(_check_need(document, names, entry, at, owners) for at in range(len(entry.needs)))
        if size > graph.MAX_NEEDS:
            document.add((*entry.path, "needs"), f"it needs {size:,} tasks; {graph.FEWER_NEEDS}")
        wanted[entry.name] = list(owners)
    try:
        return graph.in_order(wanted, "tasks")
    except InvalidInputError as error:
        document.add(("tasks",), str(error).partition(": ")[2], at_key=True)
        return []


def _check_need(document: Document, names: _Names, entry: _Entry, at: int, owners: dict[str, None]) -> int:
    """
    Report the problem of a need, if any. Adds the entries that it names to `owners`. Returns how many tasks it names at
    most.
    """
    need, path = entry.needs[at], (*entry.path, "needs", at)
    rows: Iterable[tuple[Row, Row]] = [({}, {})]
    if isinstance(need, Text) and entry.matrix is not None:
        document.spend(path, NEED_COST * entry.matrix.size(need.axes))
        rows = entry.matrix.rows(need.axes)
    most = 0
    for values, _ in rows:
        found = names.meant(need, values)
        if len(found) != 1:
            text = need if isinstance(need, str) else as_text(need.fill(values))
            if found:
                ways = ", ".join(sorted(found)[:3])
                document.add(path, f"{text!r} can mean each of {ways}; rename a task, or write other values")
            else:
                known = names.entries if len(document.problems.found) < _GUESSES else ()
                remedy = guess(text, known, "name a task of this group")
                document.add(path, f"no task has the id {text!r}; {remedy}")
            break
        ((named, owner),) = found.items()
        if owner == entry.name:
            what = "it needs itself" if entry.matrix is None else "its combinations would need each other"
            document.add(path, f"{what}; remove it from its needs")
            break
        owners[owner] = None
        most = max(most, names.size(named))
    return most
