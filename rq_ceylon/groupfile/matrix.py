"""
One task for every combination of a matrix: the axes, the ids of the tasks, and the texts that look up values.

A text may contain `${{ matrix.axis }}`, or `${{ matrix.axis.key }}` if the value is a mapping. This is a plain look-up:
nothing is computed. A text that is only a look-up becomes the value itself. `$${{` stands for the characters `${{`.

A need names a combination by the values of its axes. It is looked up by value, never by the words of another matrix,
because two axes that number their values may number them differently.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import product
from math import prod
from typing import Any, NamedTuple

from pydantic_core import to_json

from rq_ceylon.errors import InvalidInputError, guess

MAX_COMBINATIONS = 1_000_000
MAX_LISTED = 10_000
"""The limit of a matrix with `exclude` or `include`, whose combinations are kept in memory as a list."""
MAX_AXES = 8
MAX_WORD = 24
MAX_ID = 64
MAX_BOUND = 10**15

AXIS = "[A-Za-z_][A-Za-z0-9_-]*"
_HOLE = re.compile(rf"\$\$\{{\{{|\$\{{\{{(?:\s*matrix\.({AXIS}(?:\.{AXIS})*)\s*\}}\}})?")
_WORD = re.compile(rf"[A-Za-z0-9._:-]{{1,{MAX_WORD}}}")
_INTEGER = re.compile("0|-?[1-9][0-9]{0,15}")

Row = Mapping[str, Any]


class Value(NamedTuple):
    """A piece of a need that is a value; the other pieces are text as written."""

    value: Any


Piece = str | Value


def canonical(value: Any) -> str:
    """The same text for equal JSON values, whatever the order of their keys."""
    return json.dumps(value, sort_keys=True)


class Axis:
    """
    The values of one axis, and the word that stands for each value in ids.

    A word is the value as text. If a value of the axis cannot stand in an id, or two values look the same, all values
    are numbered from 0 instead.
    """

    def __init__(self, name: str, values: Sequence[Any]) -> None:
        self.name, self.values = name, values
        self.words: Sequence[str] | range = values if isinstance(values, range) else [as_text(one) for one in values]
        self._known = self.words if isinstance(self.words, range) else frozenset(self.words)
        self._by_value: dict[str, list[int]] = {}
        self._by_text: dict[str, list[int]] = {}
        self.is_numbered = False
        if isinstance(self._known, frozenset) and not (
            len(self._known) == len(values) and all(map(_WORD.fullmatch, self._known))
        ):
            self.number()

    def number(self) -> None:
        self.words = self._known = range(len(self.values))
        self.is_numbered = True

    def pairs(self) -> Iterable[tuple[Any, str]]:
        return zip(self.values, map(str, self.words), strict=True)

    def has(self, word: str) -> bool:
        if not isinstance(self._known, range):
            return word in self._known
        return bool(_INTEGER.fullmatch(word)) and int(word) in self._known

    def meant(self, pieces: Sequence[Piece]) -> Sequence[str]:
        """
        The words that these pieces of a need can mean. A value means the words of the same value, or else of a value
        with the same text. Text as written can also mean the word itself.
        """
        if len(pieces) == 1 and isinstance(pieces[0], Value):
            return self._words_of(pieces[0].value)
        text = joined(pieces)
        found = [text] if self.has(text) else []
        return [*found, *(word for word in self._words_of(text) if word != text)] if self.is_numbered else found

    def _words_of(self, value: Any) -> list[str]:
        return [str(self.words[at]) for at in self._places(value)]

    def _places(self, value: Any) -> Sequence[int]:
        """The positions of this value, or else of values with the same text, such as the number 1 for the text "1"."""
        if isinstance(self.values, range):
            number = int(value) if isinstance(value, str) and _INTEGER.fullmatch(value) else value
            return (self.values.index(number),) if type(number) is int and number in self.values else ()
        if not self._by_value:
            for at, one in enumerate(self.values):
                self._by_value.setdefault(canonical(one), []).append(at)
                self._by_text.setdefault(as_text(one), []).append(at)
        return self._by_value.get(canonical(value)) or self._by_text.get(as_text(value)) or ()

    def nearest(self, value: Any) -> Any:
        """
        This value of the axis, or else one with the same text.

        Raises:
            KeyError: the axis has neither.
        """
        places = self._places(value)
        if not places:
            raise KeyError(value)
        return self.values[places[0]]

    @property
    def is_even(self) -> bool:
        """Whether all its words have the same number of dashes, which shows where each of them ends in an id."""
        return len({str(word).count("-") for word in _ends(self.words)}) == 1

    @property
    def longest(self) -> str:
        return max(map(str, _ends(self.words)), key=len)


def _ends(words: Sequence[str] | range) -> Sequence[str | int]:
    return (words[0], words[-1]) if isinstance(words, range) else words


def joined(pieces: Iterable[Piece]) -> str:
    return "-".join(piece if isinstance(piece, str) else as_text(piece.value) for piece in pieces)


class Matrix:
    """
    The combinations of some axes, of which the last varies fastest. The task `name` becomes one task for each.

    Args:
        exclude: combinations, or parts of combinations, to leave out.
        include: values to add to each combination that they fit; values that fit none become a combination of their
            own.

    Raises:
        InvalidInputError: there are too many axes or combinations, an id would be too long, or no combination is left.
    """

    def __init__(
        self, name: str, axes: Sequence[Axis], exclude: Sequence[Row] = (), include: Sequence[Row] = ()
    ) -> None:
        self.name, self.axes = name, {axis.name: axis for axis in axes}
        self.checked: set[tuple[Sequence[str], bool]] = set()  # look-ups that succeed in every value
        self._longest: dict[Sequence[str], int] = {}
        self._listed: list[tuple[Row, Row]] | None = None
        self._ids: dict[str, int] = {}
        self._by_words: dict[tuple[str, ...], list[str]] = {}
        self.names = list(self.axes)
        if len(axes) > MAX_AXES:
            raise InvalidInputError(f"it: {len(axes)} axes; give a matrix at most {MAX_AXES}")
        if len(self) > MAX_COMBINATIONS:
            raise InvalidInputError(f"it: {len(self):,} combinations; give a matrix at most {MAX_COMBINATIONS:,}")
        rows: list[dict[str, Any]] = []
        if exclude or include:
            rows = self._chosen(exclude, include)
            self.axes = _widened(self.axes, rows)
        for axis in [axis for axis in self.axes.values() if not axis.is_even][1:]:
            axis.number()  # with two such axes an id could be read in two ways: a, b-c and a-b, c
        if exclude or include:
            self._list(rows)
        longest = max(self._ids, key=len, default="") or "-".join((name, *(axis.longest for axis in axes)))
        if len(longest) > MAX_ID:
            remedy = "shorten the task's name, or use fewer axes"
            raise InvalidInputError(f"it: {longest!r} has {len(longest)} characters, an id at most {MAX_ID}; {remedy}")

    def _chosen(self, exclude: Sequence[Row], include: Sequence[Row]) -> list[dict[str, Any]]:
        """
        Choose the combinations as CI systems do. `include` sees only the combinations of the axes: it never overwrites
        the value of an axis, and adds nothing to a combination that it made itself.
        """
        if (size := len(self) + len(include)) > MAX_LISTED:
            remedy = f"give a matrix with exclude or include at most {MAX_LISTED:,}"
            raise InvalidInputError(f"it: {size:,} combinations; {remedy}")
        texts = [[canonical(value) for value in axis.values] for axis in self.axes.values()]
        places = {name: at for at, name in enumerate(self.axes)}
        left_out = [[(places[key], canonical(value)) for key, value in one.items()] for one in exclude]
        rows: list[dict[str, Any]] = []
        codes: list[tuple[str, ...]] = []
        if texts:
            values = product(*(axis.values for axis in self.axes.values()))
            for code, row in zip(product(*texts), values, strict=True):
                if not any(all(code[at] == text for at, text in one) for one in left_out):
                    codes.append(code)
                    rows.append(dict(zip(self.axes, row, strict=True)))
        made: list[dict[str, Any]] = []
        for added in include:
            wanted = [(places[key], canonical(value)) for key, value in added.items() if key in places]
            more = {key: value for key, value in added.items() if key not in places}
            fits = [fit for code, fit in zip(codes, rows, strict=True) if all(code[at] == text for at, text in wanted)]
            for fit in fits:
                fit.update(more)
            if not fits:
                made.append(dict(added))
        if not rows and not made:
            raise InvalidInputError("it: exclude leaves no combination; leave one, or remove the task")
        return [*rows, *made]

    def _list(self, rows: Sequence[dict[str, Any]]) -> None:
        """
        Store these combinations, with ids made of the words of the axes. All combinations are numbered from 0 instead
        if one has no value for an axis, an id would be too long, or two ids would be the same.
        """
        words = [
            {name: axis.meant([Value(row[name])])[0] for name, axis in self.axes.items() if name in row} for row in rows
        ]
        ids = [self.id(one) for one in words]
        are_whole = all(len(one) == len(self.axes) for one in words)
        self.is_numbered = not are_whole or len(set(ids)) < len(ids) or max(map(len, ids)) > MAX_ID
        if self.is_numbered:
            ids = [f"{self.name}-{at}" for at in range(len(rows))]
            self._listed = [(row, {"": str(at)}) for at, row in enumerate(rows)]
        else:
            self._listed = list(zip(rows, words, strict=True))
        self._ids = {task_id: at for at, task_id in enumerate(ids)}
        for one, task_id in zip(words, ids, strict=True):
            if len(one) == len(self.axes):
                self._by_words.setdefault(tuple(one.values()), []).append(task_id)
        self.names = list(dict.fromkeys([*self.axes, *(name for row in rows for name in row)]))

    def __len__(self) -> int:
        if self._listed is not None:
            return len(self._listed)
        return prod(len(axis.values) for axis in self.axes.values())

    def size(self, names: Iterable[str], *, ends: bool = False) -> int:
        """The number of rows that `rows` gives."""
        if self._listed is not None:
            return len(self)
        values = (self.axes[name].values for name in names)
        return prod(2 if ends and isinstance(one, range) else len(one) for one in values)

    def rows(self, axes: Iterable[str] | None = None, *, ends: bool = False) -> Iterator[tuple[Row, Row]]:
        """
        Every combination of these axes, or of all axes: its values and its words. With `ends`, a range gives only its
        first and last number. Whatever a field requires of a number holds for the whole range if it holds for both.
        """
        if self._listed is not None:
            return iter(self._listed)
        chosen = [self.axes[name] for name in (self.axes if axes is None else axes)]
        if ends:
            chosen = [
                Axis(one.name, list(_ends(one.values))) if isinstance(one.values, range) else one for one in chosen
            ]
        return _rows(chosen, {}, {})

    def id(self, words: Row) -> str:
        return "-".join((self.name, *words.values()))

    def has(self, task_id: str) -> bool:
        """Whether one of the combinations has this id."""
        if self._listed is not None:
            return task_id in self._ids
        start = f"{self.name}-"
        pieces = task_id[len(start) :].split("-")
        return task_id.startswith(start) and any(True for _ in _readings(pieces, [*self.axes.values()], is_id=True))

    def meant(self, pieces: Sequence[Piece]) -> set[str]:
        """The ids that a need can mean, given its pieces after the name of this task."""
        found = set[str]()
        for words in _readings(pieces, [*self.axes.values()]):
            if self._listed is None:
                found.add("-".join((self.name, *words)))
            else:
                found.update(self._by_words.get(words, ()))
        as_written = "-".join((self.name, *(piece for piece in pieces if isinstance(piece, str))))
        if as_written in self._ids and not any(isinstance(piece, Value) for piece in pieces):
            found.add(as_written)
        return found

    @property
    def has_numbers(self) -> bool:
        """Whether its ids contain numbers that are not values."""
        return self.is_numbered or any(axis.is_numbered for axis in self.axes.values())

    is_numbered = False

    def values_of(self, names: Sequence[str]) -> Iterator[Any]:
        """
        The values that a look-up may find; all numbers of a range count as one. A KeyError or TypeError means that it
        finds nothing in the value `self.missing`.
        """
        axis = self.axes.get(names[0])
        if self._listed is not None:
            for row, _ in self._listed:
                self.missing = row.get(names[0], row)
                yield _found(row, names)
            return
        assert axis is not None
        for value in _ends(axis.values) if isinstance(axis.values, range) else axis.values:
            self.missing = value
            yield _found({names[0]: value}, names)

    missing: Any = None

    def longest(self, names: Sequence[str]) -> int:
        """The size of the longest JSON, in bytes, that a look-up finds."""
        if names not in self._longest:
            self._longest[names] = max(len(to_json(value)) for value in self.values_of(names))
        return self._longest[names]


def _widened(axes: Mapping[str, Axis], rows: Sequence[Row]) -> dict[str, Axis]:
    """The axes, extended by further values of the combinations; without axes, each name in them becomes one."""
    wider = {}
    for name in axes or dict.fromkeys(name for row in rows for name in row):
        values = [*(axes[name].values if name in axes else ()), *(row[name] for row in rows if name in row)]
        wider[name] = Axis(name, list({canonical(value): value for value in values}.values()))
    return wider


def _rows(axes: Sequence[Axis], values: Row, words: Row) -> Iterator[tuple[Row, Row]]:
    if not axes:
        yield values, words
        return
    axis, rest = axes[0], axes[1:]
    for value, word in axis.pairs():
        pair = {**values, axis.name: value}, {**words, axis.name: word}
        if rest:
            yield from _rows(rest, *pair)
        else:
            yield pair


def _readings(pieces: Sequence[Piece], axes: Sequence[Axis], *, is_id: bool = False) -> Iterator[tuple[str, ...]]:
    """All ways to read pieces between dashes as one word per axis; with `is_id`, only the words themselves count."""
    if not axes:
        if not pieces:
            yield ()
        return
    ends = range(1, len(pieces) - len(axes) + 2) if len(axes) > 1 else (len(pieces),)
    for end in ends:
        some = pieces[:end]
        words = axes[0].meant(some) if not is_id else [text] if axes[0].has(text := joined(some)) else []
        for word in words:
            for rest in _readings(pieces[end:], axes[1:], is_id=is_id):
                yield (word, *rest)


class Text(NamedTuple):
    """A text with look-ups. Each look-up is stored as the names on its path: an axis, then keys."""

    parts: tuple[str | tuple[str, ...], ...]

    @property
    def axes(self) -> list[str]:
        return list(dict.fromkeys(part[0] for part in self.parts if isinstance(part, tuple)))

    def fill(self, values: Row) -> Any:
        """Fill in the values of one combination."""
        if len(self.parts) == 1:
            return _found(values, self.parts[0])
        return "".join(part if isinstance(part, str) else as_text(_found(values, part)) for part in self.parts)

    def pieces(self, values: Row) -> list[Piece]:
        """
        Fill in one combination, and split the result at the dashes as written. A piece that is only a look-up stays a
        value, even if the value contains dashes.
        """
        pieces: list[list[str | Value]] = [[]]
        for part in self.parts:
            if not isinstance(part, str):
                pieces[-1].append(Value(_found(values, part)))
                continue
            first, *more = part.split("-")
            pieces[-1].append(first)
            pieces += [[one] for one in more]
        found: list[Piece] = []
        for piece in pieces:
            some = [one for one in piece if one != ""]
            is_value = len(some) == 1 and isinstance(some[0], Value)
            found.append(some[0] if is_value else "".join(joined([one]) for one in some))
        return found

    @property
    def is_alone(self) -> bool:
        return len(self.parts) == 1

    def longest(self, matrix: Matrix) -> int:
        """The largest size of the filled text, in bytes."""
        sizes = (len(to_json(part)) if isinstance(part, str) else matrix.longest(part) for part in self.parts)
        return sum(sizes)


def _found(values: Row, names: Iterable[str]) -> Any:
    value: Any = values
    for name in names:
        value = value[name]
    return value


def as_text(value: Any) -> str:
    """A value as part of a text: its JSON, but text without its quotes."""
    return value if isinstance(value, str) else to_json(value).decode()


def read_text(text: str, matrix: Matrix | None) -> str | Text:
    """
    Read a text that may contain look-ups.

    Raises:
        InvalidInputError: the text contains `${{` that is no look-up, or a look-up that finds nothing for some
            combination.
    """
    if "${{" not in text:
        return text
    parts: list[str | tuple[str, ...]] = []
    end = 0
    for hole in _HOLE.finditer(text):
        parts.append(text[end : hole.start()])
        end = hole.end()
        if hole[0] == "$${{":
            parts.append("${{")
        elif hole[1] is None:
            raise InvalidInputError(f"it: {text!r} has a ${{{{ that names no value; {_FORMS}")
        else:
            parts.append(tuple(hole[1].split(".")))
    parts = [part for part in (*parts, text[end:]) if part]
    names = [part for part in parts if isinstance(part, tuple)]
    if not names:
        return "".join(map(str, parts))
    if matrix is None:
        raise InvalidInputError(f"it: {text!r} needs a matrix, and here is none; {_FORMS}")
    for part in names:
        _check(part, matrix, is_inside=len(parts) > 1)
    return Text(tuple(parts))


_FORMS = "write ${{ matrix.NAME }} in a task with a matrix, or $${{ for these characters themselves"


def _check(names: tuple[str, ...], matrix: Matrix, *, is_inside: bool) -> None:
    first = names[0]
    if first not in matrix.names:
        remedy = guess(first, matrix.names, f"the axes are {', '.join(matrix.names)}")
        raise InvalidInputError(f"it: matrix.{first} is not an axis of this task's matrix; {remedy}")
    if (names, is_inside) in matrix.checked:
        return
    where = f"matrix.{'.'.join(names)}"
    try:
        for found in matrix.values_of(names):
            if is_inside and isinstance(found, dict | list):
                what = "mapping" if isinstance(found, dict) else "list"
                remedy = "let the look-up be the whole text, or look up a part of it"
                raise InvalidInputError(f"it: {where} is a {what}, which cannot stand in a text; {remedy}")
    except (KeyError, TypeError):
        shown = f"{matrix.missing!r:.100}"
        raise InvalidInputError(f"it: {where} finds nothing in {shown}; add it to the matrix") from None
    matrix.checked.add((names, is_inside))


def texts_in(value: Any) -> Iterator[Text]:
    match value:
        case Text():
            yield value
        case dict():
            for one in value.values():
                yield from texts_in(one)
        case list():
            for one in value:
                yield from texts_in(one)


def fill(value: Any, values: Row) -> Any:
    """Fill in every look-up of a value for one combination."""
    kind = type(value)
    if kind is Text:
        return value.fill(values)
    if kind is dict:
        return {key: fill(one, values) for key, one in value.items()}
    if kind is list:
        return [fill(one, values) for one in value]
    return value
