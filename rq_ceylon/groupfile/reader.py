"""
Reads the text of a file into documents: plain values, and the place of each value.

A file is foreign text, so this module builds the values from the parser's events. It allows no aliases, tags or
duplicate keys, and bounds size and depth. Of YAML's implicit types it knows only null, true, false and the numbers of
JSON. JSON has events of its own (`json_events`). Events are six times faster than `yaml.compose`, which also hides
anchors and recurses without a limit.

Places are looked up only for refused values, by reading the file a second time: to remember the place of every value
would take ten times the memory of the values.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Collection
from contextlib import suppress
from decimal import Decimal
from typing import Any, NamedTuple, NoReturn

import yaml

from rq_ceylon import models
from rq_ceylon.errors import GroupFileError, InvalidInputError
from rq_ceylon.groupfile.json_events import JsonEvents, JsonSyntaxError

MAX_BYTES = 8 * 2**20
MAX_DEPTH = 20
MAX_VALUES = 500_000  # keys too; bounds memory and time: 8 MiB of `[0,0,0,...` would be four million values
MAX_DOCUMENTS = 100
MAX_PROBLEMS = 50
MAX_WORK = 1_000_000
Path = tuple[str | int, ...]

_Loader: Any = getattr(yaml, "CSafeLoader", yaml.SafeLoader)
_NUMBER = re.compile(r"-?(?:0|[1-9][0-9]*)(\.[0-9]+)?([eE][+-]?[0-9]+)?")
_NOT_FINITE = re.compile(r"(?i:[-+]?\.inf|\.nan)|NaN|-?Infinity")
_WORDS = {"": None, "~": None, "null": None, "true": True, "false": False}
_FORBIDDEN = re.compile("[^\t\n\r\x20-\x7e\x85\xa0-\ud7ff\ue000-\ufffd\U00010000-\U0010ffff]")
_NOT_UTF8 = re.compile("[\ud800-\udfff]")
_START: Any = yaml.Mark("", 0, 0, 0, None, 0)
_SYNTAX_REMEDIES = {
    "cannot start any token": "indent with spaces, not tabs, and quote text that starts with @ or `",
    "mapping values are not": 'check the indentation, and quote text that contains ": "',
    "expected ':'": "write key: value, with a space after the colon",
    "expected key": "start all keys of one mapping in the same column",
    "end of stream": "close the quote",
    "expected ',' or '": "close the bracket, or quote text that contains { } [ ] or a comma",
}


class Document:
    """
    One document of a file.

    Attributes:
        number: its position in the file; documents without content count too.
        value: its content.
        refused: paths of values that cannot be read. Further problems with these are not reported, because they are
            only consequences.
    """

    def __init__(self, problems: Problems, number: int) -> None:
        self.problems, self.number = problems, number
        self.value: Any = None
        self.refused: set[Path] = set()

    def add(self, path: Path, what: str, mark: Any = None, *, at_key: bool = False) -> None:
        """Report a problem with the value at `path`."""
        if self.refused and not mark and any(path[:end] in self.refused for end in range(len(path) + 1)):
            return
        self.problems.add(path, what, mark, number=self.number, at_key=at_key)

    def check(self, path: Path, check: Callable[..., object], *values: Any) -> bool:
        """Run a check and report its error, in which the path in the file replaces the name at the start."""
        try:
            check(*values)
        except InvalidInputError as error:
            self.add(path, str(error).partition(": ")[2], at_key=True)
            return False
        return True

    def spend(self, path: Path, work: int) -> None:
        """
        Bound the number of combinations that are checked one by one, because a few bytes of a matrix can ask for
        millions.
        """
        self.problems.work += work
        if self.problems.work > MAX_WORK:
            what = f"more than {MAX_WORK:,} combinations have to be checked by now; use fewer, or several files"
            self.problems.stop(path, what, None, number=self.number)


class _Problem(NamedTuple):
    number: int
    path: Path
    what: str
    mark: Any
    at_key: bool


class Problems:
    """All problems of a file; the search ends at the fiftieth."""

    def __init__(self, filename: str) -> None:
        self.filename = filename
        self.found: list[_Problem] = []
        self.work = self.tasks = 0
        self.events: Callable[[], Any] | None = None  # reads the file again from its start

    def add(self, path: Path, what: str, mark: Any, *, number: int = 0, at_key: bool = False) -> None:
        what = what if what.isprintable() else repr(what)[1:-1]  # the text must not forge a line or control a terminal
        what = what if len(what) <= 400 else f"{what[:100]} … {what[-100:]}"
        self.found.append(_Problem(number, path, what, mark, at_key))
        if len(self.found) >= MAX_PROBLEMS:
            self.give_up()

    def stop(self, path: Path, what: str, mark: Any, *, number: int = 0) -> NoReturn:
        self.add(path, what, mark, number=number)
        self.give_up()

    def give_up(self) -> NoReturn:
        marks = self._marks()
        lines = sorted(
            (mark.line, mark.column, one) for mark, one in zip(marks, map(self._said, self.found), strict=True)
        )
        told = [f"{self.filename}:{line + 1}:{column + 1}: {said}" for line, column, said in lines]
        if len(told) >= MAX_PROBLEMS:
            told.append(f"{self.filename}: the search ended after {MAX_PROBLEMS} problems; correct these first")
        raise GroupFileError(told)

    @staticmethod
    def _said(problem: _Problem) -> str:
        plain = models.ID_PATTERN.fullmatch
        where = "".join(
            f".{p}" if isinstance(p, str) and plain(p) else f"[{p[:64] if isinstance(p, str) else p!r:.64}]"
            for p in problem.path
        )
        return f"{where.removeprefix('.') or 'file'}: {problem.what}"

    def _marks(self) -> list[Any]:
        """
        The place of each problem: that of its value, or if the value is not in the file, of the nearest one that
        contains it.
        """
        wanted = {
            (one.number, *one.path)[: end + 1] for one in self.found if not one.mark for end in range(len(one.path) + 1)
        }
        known = find(self.events(), wanted) if self.events and wanted else {}
        marks = []
        for one in self.found:
            path = (one.number, *one.path)
            near = next((path[:end] for end in range(len(path), 0, -1) if path[:end] in known), None)
            marks.append(one.mark or (known[near][0 if one.at_key else 1] if near else _START))
        return marks


def find(events: Any, wanted: Collection[Path]) -> dict[Path, tuple[Any, Any]]:
    """
    The places of the keys and values at these paths. A path begins with the number of its document, and `wanted` must
    also contain every path that leads to a wanted value. If the file cannot be read to its end, only places before the
    error are found.
    """
    found: dict[Path, tuple[Any, Any]] = {}

    def walk(event: Any, key_mark: Any, path: Path) -> None:
        is_wanted, kind = path in wanted, type(event)
        if is_wanted:
            found[path] = key_mark, event.start_mark
        if kind is yaml.MappingStartEvent and is_wanted:
            while type(key := events.get_event()) is not yaml.MappingEndEvent:
                walk(events.get_event(), key.start_mark, (*path, key.value))
        elif kind is yaml.SequenceStartEvent and is_wanted:
            count = 0
            while type(event := events.get_event()) is not yaml.SequenceEndEvent:
                walk(event, event.start_mark, (*path, count))
                count += 1
        elif kind in _OPENS:
            depth = 1
            while depth:
                kind = type(events.get_event())
                depth += (kind in _OPENS) - (kind in _CLOSES)

    with suppress(yaml.YAMLError, ValueError, OverflowError, AttributeError):
        events.get_event()
        number = 0
        while type(events.get_event()) is not yaml.StreamEndEvent:
            event = events.get_event()
            walk(event, event.start_mark, (number,))
            events.get_event()
            number += 1
    return found


_OPENS = (yaml.MappingStartEvent, yaml.SequenceStartEvent)
_CLOSES = (yaml.MappingEndEvent, yaml.SequenceEndEvent)


def read(text: str | bytes, problems: Problems) -> list[Document]:
    """
    Read all documents of a file that have content; there is at least one. A file that is named `.json`, or is JSON, is
    read as JSON.

    Raises:
        GroupFileError: the syntax is bad, or a limit is exceeded. Other problems are added to `problems`.
    """
    decoded = _decoded(text, problems)
    is_json = problems.filename.endswith(".json")
    if is_json or re.match(r'[ \t\r\n]*\{[ \t\r\n]*["}]', decoded):
        problems.events = lambda: JsonEvents(decoded)
        try:
            return _Reader(problems, is_json=True).documents()
        except JsonSyntaxError as error:  # otherwise it may be YAML that begins like JSON
            if is_json:
                problems.stop((), str(error.problem), error.problem_mark)
        # The file is YAML after all, so problems that were found in it as JSON do not count.
        problems.found.clear()
    if found := _FORBIDDEN.search(decoded):
        problems.stop(
            (), f"the character U+{ord(found[0]):04X} is not allowed; remove it", _mark(decoded, found.start())
        )
    problems.events = lambda: _Loader(decoded)
    return _Reader(problems).documents()


def _decoded(text: str | bytes, problems: Problems) -> str:
    data = text if isinstance(text, bytes) else text.encode("utf-8", "surrogatepass")
    if len(data) > MAX_BYTES:
        problems.stop((), f"{len(data):,} bytes, more than {MAX_BYTES:,}; split it into several groups", _START)
    decoded = data.decode("utf-8", "surrogateescape").removeprefix("\ufeff")
    if not decoded.isascii() and (found := _NOT_UTF8.search(decoded)):
        # A forbidden character before the bad byte shows that the file is not text at all, so report that one.
        if (before := _FORBIDDEN.search(decoded)) and before.start() < found.start():
            found = before
        code, mark = ord(found[0]), _mark(decoded, found.start())
        if 0xDC80 <= code <= 0xDCFF:  # how surrogateescape stores a byte
            problems.stop((), f"the byte 0x{code - 0xDC00:02X} is not UTF-8; save the file as UTF-8", mark)
        problems.stop((), f"the character U+{code:04X} is not allowed; remove it", mark)
    return decoded


def _mark(text: str, at: int) -> Any:
    return yaml.Mark("", 0, text.count("\n", 0, at), at - text.rfind("\n", 0, at) - 1, None, 0)


class _Reader:
    def __init__(self, problems: Problems, *, is_json: bool = False) -> None:
        assert problems.events is not None
        self.problems, self.is_json = problems, is_json
        self.values = 0
        self.path: list[str | int] = []
        try:
            self.parser = problems.events()
        except (yaml.YAMLError, ValueError) as error:  # the pure Python scanner checks all characters at once
            self._refuse_syntax(error)

    def documents(self) -> list[Document]:
        found: list[Document] = []
        number = 0
        self._next()
        while type(self._next()) is not yaml.StreamEndEvent:
            event = self._next()
            self.document = Document(self.problems, number)
            number += 1
            # A document without any content, such as after a final ---, does not count.
            is_nothing = type(event) is yaml.ScalarEvent and not event.value and event.implicit[0] and not event.anchor
            self.document.value = self._value(event)
            self._next()
            if not is_nothing:
                found.append(self.document)
            if len(found) > MAX_DOCUMENTS:
                self.problems.stop((), f"more than {MAX_DOCUMENTS} documents; use several files", event.start_mark)
        if not found:
            self.problems.stop((), "it is empty; start with name: and tasks:", _START)
        return found

    def _next(self) -> Any:
        try:
            return self.parser.get_event()
        except JsonSyntaxError:
            raise
        except (yaml.YAMLError, ValueError, OverflowError) as error:  # overflow: pure Python, on "\Uffffffff"
            self._refuse_syntax(error)

    def _refuse_syntax(self, error: Exception) -> NoReturn:
        problem = getattr(error, "problem", None) or "an escape stands for no character"
        remedy = next((say for key, say in _SYNTAX_REMEDIES.items() if key in problem), "correct the syntax")
        self.problems.stop((), f"{problem}; {remedy}", getattr(error, "problem_mark", None) or _START)

    def _count(self, event: Any) -> None:
        self.values += 1
        if self.values > MAX_VALUES:
            what = f"more than {MAX_VALUES:,} keys and values; split it into several groups"
            self.problems.stop((), what, event.start_mark)

    def _value(self, event: Any) -> Any:
        self._count(event)
        kind = type(event)
        if kind is yaml.AliasEvent:
            return self._refuse(event, f"*{event.anchor} is an alias; write the value itself, or use defaults")
        if event.anchor is not None or event.tag is not None:
            self._refuse_marks(event)
        if kind is yaml.ScalarEvent:
            return self._scalar(event)
        if len(self.path) >= MAX_DEPTH:
            where, what = tuple(self.path[:4]), f"nested more than {MAX_DEPTH} deep; make it flatter"
            self.problems.stop(where, what, event.start_mark)
        if kind is yaml.MappingStartEvent:
            return self._mapping()
        items: list[Any] = []
        self.path.append(0)
        while type(event := self._next()) is not yaml.SequenceEndEvent:
            self.path[-1] = len(items)
            items.append(self._value(event))
        self.path.pop()
        return items

    def _mapping(self) -> dict[str, Any]:
        items: dict[str, Any] = {}
        self.path.append("")
        while type(event := self._next()) is not yaml.MappingEndEvent:
            self._count(event)
            if type(event) is not yaml.ScalarEvent:
                where, what = tuple(self.path[:-1]), "a key must be text; write one word before the colon"
                self.problems.stop(where, what, event.start_mark)
            if event.anchor is not None or event.tag is not None:
                self._refuse_marks(event, is_key=True)
            key = self._text(event)
            self.path[-1] = key
            if key in items:
                self.document.add(tuple(self.path), "duplicate key; keep one of them", event.start_mark)
            items[key] = self._value(self._next())
        self.path.pop()
        return items

    def _scalar(self, event: Any) -> Any:
        text: str = event.value
        if event.implicit[0]:  # plain: neither quoted nor a block
            if len(text) <= 5 and (word := text.lower()) in _WORDS:
                return _WORDS[word]
            number = _NUMBER.fullmatch(text)
            if (number and (len(text) > 300 or math.isinf(float(text)))) or _NOT_FINITE.fullmatch(text):
                return self._refuse(event, f"{text} is no number that JSON can hold; quote it if it is text")
            if number:
                value = float(text) if number[1] or number[2] else int(text)
                if not self.is_json and (shown := _spelt_otherwise(number, value)):
                    what = f"{text} is {shown} as a number; quote it if it is text, or write {shown}"
                    return self._refuse(event, what)
                return value
        return self._text(event)

    def _text(self, event: Any) -> str:
        text: str = event.value
        # A single escape can be half of a surrogate pair; the pure Python scanner accepts it.
        if not text.isascii() and _NOT_UTF8.search(text):
            self._refuse(event, "half of a surrogate pair; write the character itself")
            return ""
        return text

    def _refuse_marks(self, event: Any, *, is_key: bool = False) -> None:
        path = tuple(self.path[:-1] if is_key else self.path)
        if event.anchor is not None:
            self.document.add(path, f"&{event.anchor} is an anchor; remove it", event.start_mark)
        if event.tag is not None:
            what = f"{event.tag} is a tag; remove it, and quote the value if it is text"
            self.document.add(path, what, event.start_mark)
            self.document.refused.add(path)

    def _refuse(self, event: Any, what: str) -> None:
        path = tuple(self.path)
        self.document.add(path, what, event.start_mark)
        self.document.refused.add(path)


def _spelt_otherwise(number: re.Match[str], value: float) -> str:
    """
    How JSON spells a number, if that loses what the text may mean: the version 3.10, the commit 7222e52, or more digits
    than a number holds; '' otherwise. YAML does not say whether such a text is a number, and no reader would notice the
    change.
    """
    decimals, exponent = number[1] or "", number[2] or ""
    has_odd_zeros = decimals != ".0" and decimals.endswith("0")
    is_like_a_commit = exponent[1:].isdigit() and not decimals
    same = number[0] == str(value) if isinstance(value, int) else Decimal(number[0]) == Decimal(repr(value))
    return "" if same and not has_odd_zeros and not is_like_a_commit else repr(value)
