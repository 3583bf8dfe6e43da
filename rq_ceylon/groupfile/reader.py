"""
From the text of a file to its documents: plain values, and where each of them stands.

A file is foreign text, so its values are built here from the parser's events: no aliases, tags or duplicate keys,
bounded size and depth, and of YAML's guesses only null, true, false and JSON's numbers. JSON is read as YAML.
Events are six times faster than `yaml.compose`, which also hides anchors and recurses without a limit.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from contextlib import suppress
from typing import Any, NoReturn

import yaml
from pydantic_core import from_json

from rq_ceylon import models
from rq_ceylon.errors import GroupFileError, InvalidInputError

MAX_BYTES = 16 * 2**20
MAX_DEPTH = 20
MAX_VALUES = 2_000_000  # bounds memory: 16 MiB of `[0,0,0,...` would be eight million values
MAX_DOCUMENTS = 100
Path = tuple[str | int, ...]

_Loader: Any = getattr(yaml, "CSafeLoader", yaml.SafeLoader)
_NUMBER = re.compile(r"-?(?:0|[1-9][0-9]*)(\.[0-9]+)?([eE][+-]?[0-9]+)?")
_NOT_FINITE = re.compile(r"(?i:[-+]?\.inf|\.nan)|NaN|-?Infinity")
_WORDS = {"": None, "~": None, "null": None, "true": True, "false": False}
_FILLER = "\ufdd0"  # a code that is no character, and refused in files
_FORBIDDEN = re.compile("[^\t\n\r\x20-\x7e\x85\xa0-\ud7ff\ue000-\ufdcf\ufdd1-\ufffd\U00010000-\U0010ffff]")
_SURROGATES = re.compile(r"\\u[dD][89abAB][0-9a-fA-F]{2}\\u[dD][c-fC-F][0-9a-fA-F]{2}")
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
    One document of a file: its value, and the place of what stands in it.
    """

    def __init__(self, problems: Problems, mark: Any) -> None:
        self.problems = problems
        self.value: Any = None
        self.mark = mark  # where it starts
        self.marks: dict[Path, tuple[Any, Any]] = {(): (mark, mark)}  # of keys and values
        self.refused: set[Path] = set()  # whatever the checks say about these is only a consequence

    def add(self, path: Path, what: str, mark: Any = None, *, at_key: bool = False) -> None:
        """
        Note a problem with the value at `path`.
        """
        if self.refused and not mark and any(path[:end] in self.refused for end in range(len(path) + 1)):
            return
        known = next(path[:end] for end in range(len(path), -1, -1) if path[:end] in self.marks)
        self.problems.add(path, what, mark or self.marks[known][0 if at_key else 1])

    def check(self, path: Path, check: Callable[..., object], *values: Any) -> bool:
        """
        Note what `check` refuses. Its messages begin with a name for the value; the report gives the path instead.
        """
        try:
            check(*values)
        except InvalidInputError as error:
            self.add(path, str(error).partition(": ")[2], at_key=True)
            return False
        return True


class Problems:
    """
    Everything that is wrong with a file.
    """

    def __init__(self, filename: str) -> None:
        self.filename = filename
        self.found: list[tuple[int, int, str]] = []

    def add(self, path: Path, what: str, mark: Any) -> None:
        plain = models.ID_PATTERN.fullmatch
        where = "".join(f".{p}" if isinstance(p, str) and plain(p) else f"[{p!r:.64}]" for p in path) or "file"
        what = what if what.isprintable() else repr(what)[1:-1]  # it must neither forge a line nor steer a terminal
        what = what if len(what) <= 400 else f"{what[:100]} … {what[-100:]}"
        place = f"{self.filename}:{mark.line + 1}:{mark.column + 1}"
        self.found.append((mark.line, mark.column, f"{place}: {where.removeprefix('.')}: {what}"))

    def stop(self, path: Path, what: str, mark: Any) -> NoReturn:
        self.add(path, what, mark)
        self.give_up()

    def give_up(self) -> NoReturn:
        raise GroupFileError([text for _, _, text in sorted(self.found)])


def read(text: str | bytes, problems: Problems) -> list[Document]:
    """
    All documents of a file that hold something, at least one.

    Raises:
        GroupFileError: bad syntax, or over a limit. Anything else that is wrong is added to `problems`.
    """
    return _Reader(text, problems).documents()


class _Reader:
    def __init__(self, text: str | bytes, problems: Problems) -> None:
        self.problems = problems
        self.start: Any = yaml.Mark("", 0, 0, 0, None, 0)
        self.values = 0
        self.parser = _Loader(self._decoded(text))

    def documents(self) -> list[Document]:
        found: list[Document] = []
        self._next()
        while type(self._next()) is not yaml.StreamEndEvent:
            event = self._next()
            self.document = Document(self.problems, event.start_mark)
            # Nothing at all, as behind a last ---, is no document.
            is_nothing = type(event) is yaml.ScalarEvent and not event.value and event.implicit[0] and not event.anchor
            self.document.value = self._value(event, event.start_mark, ())
            self._next()
            if not is_nothing:
                found.append(self.document)
            if len(found) > MAX_DOCUMENTS:
                self.problems.stop((), f"more than {MAX_DOCUMENTS} documents; use several files", event.start_mark)
        if not found:
            self.problems.stop((), "it is empty; start with name: and tasks:", self.start)
        return found

    def _decoded(self, text: str | bytes) -> str:
        data = text if isinstance(text, bytes) else text.encode("utf-8", "surrogatepass")
        stop = self.problems.stop
        if len(data) > MAX_BYTES:
            stop((), f"{len(data):,} bytes, more than {MAX_BYTES:,}; split it into several groups", self.start)
        decoded = data.decode("utf-8", "surrogateescape").removeprefix("\ufeff")
        if found := _FORBIDDEN.search(decoded):
            before, code = decoded[: found.start()], ord(found[0])
            mark = yaml.Mark("", 0, before.count("\n"), len(before) - before.rfind("\n") - 1, None, 0)
            if 0xDC80 <= code <= 0xDCFF:  # as surrogateescape writes it
                stop((), f"the byte 0x{code - 0xDC00:02X} is not UTF-8; save the file as UTF-8", mark)
            stop((), f"the character U+{code:04X} is not allowed; remove it", mark)
        if decoded.lstrip().startswith("{") and _SURROGATES.search(decoded):
            with suppress(ValueError):
                from_json(decoded)  # or it is YAML. The filler keeps the columns of JSON, until `_text` drops it.
                return _SURROGATES.sub(lambda pair: from_json(f'"{pair[0]}"') + 11 * _FILLER, decoded)
        return decoded

    def _next(self) -> Any:
        try:
            return self.parser.get_event()
        except (yaml.YAMLError, ValueError, OverflowError) as error:  # the latter: pure Python, on "\Uffffffff"
            problem = getattr(error, "problem", None) or "an escape stands for no character"
            remedy = next((say for key, say in _SYNTAX_REMEDIES.items() if key in problem), "correct the syntax")
            self.problems.stop((), f"{problem}; {remedy}", getattr(error, "problem_mark", None) or self.start)

    def _value(self, event: Any, key_mark: Any, path: Path) -> Any:
        self.values += 1
        if self.values > MAX_VALUES:
            self.problems.stop((), f"more than {MAX_VALUES:,} values; split it into several groups", event.start_mark)
        if len(path) <= 4:  # further in are only arguments and metadata, which no check looks into
            self.document.marks[path] = key_mark, event.start_mark
        if type(event) is yaml.AliasEvent:
            return self._refuse(event, path, f"*{event.anchor} is an alias; write the value itself, or use defaults")
        self._check_marks(event, path)
        if type(event) is yaml.ScalarEvent:
            return self._scalar(event, path)
        if len(path) >= MAX_DEPTH:
            self.problems.stop(path[:4], f"nested more than {MAX_DEPTH} deep; make it flatter", event.start_mark)
        if type(event) is yaml.MappingStartEvent:
            return self._mapping(path)
        items: list[Any] = []
        while type(event := self._next()) is not yaml.SequenceEndEvent:
            items.append(self._value(event, event.start_mark, (*path, len(items))))
        return items

    def _mapping(self, path: Path) -> dict[str, Any]:
        items: dict[str, Any] = {}
        while type(event := self._next()) is not yaml.MappingEndEvent:
            if type(event) is not yaml.ScalarEvent:
                self.problems.stop(path, "a key must be text; write one word before the colon", event.start_mark)
            self._check_marks(event, path)
            key = self._text(event, path)
            if key in items:
                self.document.add((*path, key), "duplicate key; keep one of them", event.start_mark)
            items[key] = self._value(self._next(), event.start_mark, (*path, key))
        return items

    def _scalar(self, event: Any, path: Path) -> Any:
        text: str = event.value
        if event.implicit[0]:  # plain, so neither quoted nor a block
            if len(text) <= 5 and (word := text.lower()) in _WORDS:
                return _WORDS[word]
            number = _NUMBER.fullmatch(text)
            if _NOT_FINITE.fullmatch(text) or (number and (len(text) > 300 or math.isinf(float(text)))):
                return self._refuse(event, path, f"{text} is no number that JSON can hold; quote it if it is text")
            if number:
                return float(text) if number[1] or number[2] else int(text)
        return self._text(event, path)

    def _text(self, event: Any, path: Path) -> str:
        text: str = event.value if event.value.isascii() else event.value.replace(_FILLER, "")
        if not text.isascii() and re.search("[\ud800-\udfff]", text):  # the pure Python scanner lets it pass
            self._refuse(event, path, "half of a surrogate pair; write the character itself")
            return ""
        return text

    def _check_marks(self, event: Any, path: Path) -> None:
        if event.anchor is not None:
            self.document.add(path, f"&{event.anchor} is an anchor; remove it", event.start_mark)
        if event.tag is not None:
            self._refuse(event, path, f"{event.tag} is a tag; remove it, and quote the value if it is text")

    def _refuse(self, event: Any, path: Path, what: str) -> None:
        self.document.add(path, what, event.start_mark)
        self.document.refused.add(path)
