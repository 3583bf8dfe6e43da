"""
One task for every combination of a matrix: its axes, the ids of its tasks, and the texts that name its values.

A text may hold `${{ matrix.axis }}`, or `${{ matrix.axis.key }}` of a value that is a mapping: a plain look-up, nothing
is computed. A text that is nothing else becomes the value itself. `$${{` stands for the characters `${{`.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from math import prod
from typing import Any, NamedTuple

from pydantic_core import to_json

from rq_ceylon.errors import InvalidInputError, guess

MAX_COMBINATIONS = 1_000_000
MAX_AXES = 8
MAX_WORD = 24
MAX_ID = 64
MAX_BOUND = 10**15

AXIS = "[A-Za-z_][A-Za-z0-9_-]*"
_HOLE = re.compile(rf"\$\$\{{\{{|\$\{{\{{(?:\s*matrix\.({AXIS}(?:\.{AXIS})*)\s*\}}\}})?")
_WORD = re.compile(rf"[A-Za-z0-9._:-]{{1,{MAX_WORD}}}")

Row = Mapping[str, Any]


class Axis:
    """
    The values of one axis, and the word by which each stands in ids.

    A word is the value as text. Where a value of the axis cannot stand in an id, or two would look the same, all are
    numbered instead, from 0.
    """

    def __init__(self, name: str, values: Sequence[Any]) -> None:
        self.name, self.values = name, values
        self.words: Sequence[str] | range = values if isinstance(values, range) else [as_text(one) for one in values]
        self._known = self.words if isinstance(self.words, range) else frozenset(self.words)
        if isinstance(self._known, frozenset) and not (
            len(self._known) == len(values) and all(map(_WORD.fullmatch, self._known))
        ):
            self.number()

    def number(self) -> None:
        self.words = self._known = range(len(self.values))

    def pairs(self) -> Iterable[tuple[Any, str]]:
        return zip(self.values, map(str, self.words), strict=True)

    def has(self, word: str) -> bool:
        if not isinstance(self._known, range):
            return word in self._known
        return bool(re.fullmatch("0|-?[1-9][0-9]{0,15}", word)) and int(word) in self._known

    @property
    def is_even(self) -> bool:
        """
        All its words have as many dashes, so that in an id one can tell where they end.
        """
        return len({str(word).count("-") for word in _ends(self.words)}) == 1

    @property
    def longest(self) -> str:
        return max(map(str, _ends(self.words)), key=len)


def _ends(words: Sequence[str] | range) -> Sequence[str | int]:
    return (words[0], words[-1]) if isinstance(words, range) else words


class Matrix:
    """
    The combinations of some axes, the last axis fastest; the task `name` becomes one task for each.

    Raises:
        InvalidInputError: too many axes or combinations, or an id would be too long.
    """

    def __init__(self, name: str, axes: Sequence[Axis]) -> None:
        self.name, self.axes = name, {axis.name: axis for axis in axes}
        self.checked: set[tuple[Sequence[str], bool]] = set()  # look-ups that find something in every value
        if len(axes) > MAX_AXES:
            raise InvalidInputError(f"it: {len(axes)} axes; give a matrix at most {MAX_AXES}")
        if len(self) > MAX_COMBINATIONS:
            raise InvalidInputError(f"it: {len(self):,} combinations; give a matrix at most {MAX_COMBINATIONS:,}")
        for axis in [axis for axis in axes if not axis.is_even][1:]:
            axis.number()  # with two of them an id could be read in two ways: a, b-c and a-b, c
        longest = "-".join((name, *(axis.longest for axis in axes)))
        if len(longest) > MAX_ID:
            remedy = "shorten the task's name, or use fewer axes"
            raise InvalidInputError(f"it: {longest!r} has {len(longest)} characters, an id at most {MAX_ID}; {remedy}")

    def __len__(self) -> int:
        return prod(len(axis.values) for axis in self.axes.values())

    def rows(self, axes: Iterable[str] | None = None) -> Iterator[tuple[Row, Row]]:
        """
        Every combination of these axes, or of all: its values, and its words.
        """
        return _rows([self.axes[name] for name in (self.axes if axes is None else axes)], {}, {})

    def id(self, words: Row) -> str:
        return "-".join((self.name, *words.values()))

    def has(self, task_id: str) -> bool:
        """
        Whether a combination has this id.
        """
        start = f"{self.name}-"
        return task_id.startswith(start) and _is_row(task_id[len(start) :].split("-"), [*self.axes.values()])


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


def _is_row(pieces: Sequence[str], axes: Sequence[Axis]) -> bool:
    if not axes:
        return not pieces
    ends = range(1, len(pieces) - len(axes) + 2) if len(axes) > 1 else (len(pieces),)
    return any(axes[0].has("-".join(pieces[:end])) and _is_row(pieces[end:], axes[1:]) for end in ends)


class Text(NamedTuple):
    """
    A text with look-ups in it, each as the names on its way: an axis, then keys.
    """

    parts: tuple[str | tuple[str, ...], ...]

    @property
    def axes(self) -> list[str]:
        return list(dict.fromkeys(part[0] for part in self.parts if isinstance(part, tuple)))

    def fill(self, values: Row, words: Row | None = None) -> Any:
        """
        The text for one combination. With `words`, as in ids: an axis stands for its word.
        """
        if words is None and len(self.parts) == 1:
            return _found(values, self.parts[0])
        return "".join(part if isinstance(part, str) else self._said(part, values, words) for part in self.parts)

    @staticmethod
    def _said(names: tuple[str, ...], values: Row, words: Row | None) -> str:
        return str(words[names[0]]) if words and len(names) == 1 else as_text(_found(values, names))


def _found(values: Row, names: Iterable[str]) -> Any:
    value: Any = values
    for name in names:
        value = value[name]
    return value


def as_text(value: Any) -> str:
    """
    A value inside a text: as it stands in JSON, text without its quotes.
    """
    return value if isinstance(value, str) else to_json(value).decode()


def read_text(text: str, matrix: Matrix | None) -> str | Text:
    """
    Read a text in which look-ups may stand.

    Raises:
        InvalidInputError: one of them finds nothing, for one combination at least; or is none.
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
    if first not in matrix.axes:
        remedy = guess(first, matrix.axes, f"the axes are {', '.join(matrix.axes)}")
        raise InvalidInputError(f"it: matrix.{first} is not an axis of this task's matrix; {remedy}")
    if (names, is_inside) in matrix.checked:
        return
    values = matrix.axes[first].values
    if isinstance(values, range):  # all numbers alike
        values = values[:1]
    for value in values:
        try:
            found = _found({first: value}, names)
        except (KeyError, TypeError):
            where = f"matrix.{'.'.join(names)}"
            raise InvalidInputError(f"it: {where} finds nothing in {value!r}; add it to the matrix") from None
        if is_inside and isinstance(found, dict | list):
            what = "mapping" if isinstance(found, dict) else "list"
            remedy = "let the look-up be the whole text, or look up a part of it"
            raise InvalidInputError(f"it: matrix.{'.'.join(names)} is a {what}, which cannot stand in a text; {remedy}")
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
    """
    A value as it is for one combination.
    """
    kind = type(value)
    if kind is Text:
        return value.fill(values)
    if kind is dict:
        return {key: fill(one, values) for key, one in value.items()}
    if kind is list:
        return [fill(one, values) for one in value]
    return value
