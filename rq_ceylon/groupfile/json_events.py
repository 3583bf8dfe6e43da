"""
Gives JSON as the events of a YAML parser, so that one reader builds the values, enforces the limits and finds places.

A YAML parser does not read JSON exactly: it folds U+2028 inside texts, refuses long keys, and does not know surrogate
pairs.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from json import JSONDecodeError
from json.decoder import scanstring  # type: ignore[attr-defined]
from typing import Any, NoReturn

import yaml

_SPACE = re.compile(r"[ \t\n\r]*")
_PLAIN = re.compile(r"-?(?:0|[1-9][0-9]*)(?:\.[0-9]+)?(?:[eE][+-]?[0-9]+)?|true|false|null|NaN|-?Infinity", re.ASCII)


class JsonSyntaxError(yaml.MarkedYAMLError):
    """The text is not JSON. `problem` also names the remedy."""


class _Place:
    """A place in the text. Its line and column are counted only on demand, because most places are never shown."""

    __slots__ = ("at", "text")

    def __init__(self, text: str, at: int) -> None:
        self.text, self.at = text, at

    @property
    def line(self) -> int:
        return self.text.count("\n", 0, self.at)

    @property
    def column(self) -> int:
        return self.at - self.text.rfind("\n", 0, self.at) - 1


class JsonEvents:
    """Returns the events one by one, like `yaml.Loader.get_event`."""

    def __init__(self, text: str) -> None:
        self._text = text
        self._events = self._document()

    def get_event(self) -> Any:
        return next(self._events)

    def _document(self) -> Iterator[Any]:
        yield yaml.StreamStartEvent()
        yield yaml.DocumentStartEvent()
        at = self._space((yield from self._value(self._space(0))))
        if at < len(self._text):
            self._refuse(at, "the JSON value has ended before", "remove what follows; a JSON file holds one group")
        yield yaml.DocumentEndEvent()
        yield yaml.StreamEndEvent()

    def _value(self, at: int) -> Any:
        """Yield the events of the value that starts here; return where it ends. The reader limits the depth."""
        text, place = self._text, self._place(at)
        char = text[at : at + 1]
        if char == '"':
            value, at = self._string(at)
            yield yaml.ScalarEvent(None, None, (False, True), value, place)
        elif char == "{":
            yield yaml.MappingStartEvent(None, None, True, place)
            at = yield from self._items(self._space(at + 1), "}")
            yield yaml.MappingEndEvent()
        elif char == "[":
            yield yaml.SequenceStartEvent(None, None, True, place)
            at = yield from self._items(self._space(at + 1), "]")
            yield yaml.SequenceEndEvent()
        elif found := _PLAIN.match(text, at):
            at = found.end()
            yield yaml.ScalarEvent(None, None, (True, False), found[0], place)
        else:
            self._refuse(at, "no JSON value starts here", 'write "text", a number, true, false, null, [ or {')
        return at

    def _items(self, at: int, end: str) -> Any:
        text = self._text
        if text[at : at + 1] == end:
            return at + 1
        while True:
            if end == "}":
                if text[at : at + 1] != '"':
                    self._refuse(at, "a key is expected here", 'write it as "key"')
                place = self._place(at)
                key, at = self._string(at)
                yield yaml.ScalarEvent(None, None, (False, True), key, place)
                at = self._space(at)
                if text[at : at + 1] != ":":
                    self._refuse(at, "a colon is expected behind a key", "write :")
                at = self._space(at + 1)
            at = self._space((yield from self._value(at)))
            if text[at : at + 1] == end:
                return at + 1
            if text[at : at + 1] != ",":
                self._refuse(
                    at, f"a comma or {end} is expected here", f"separate values by commas, and close with {end}"
                )
            at = self._space(at + 1)

    def _string(self, at: int) -> tuple[str, int]:
        try:
            text, end = scanstring(self._text, at + 1, True)
        except JSONDecodeError as error:
            self._refuse(error.pos, error.msg[:1].lower() + error.msg[1:], "correct the text, or its escape")
        return text, end

    def _space(self, at: int) -> int:
        found = _SPACE.match(self._text, at)
        assert found is not None
        return found.end()

    def _refuse(self, at: int, what: str, remedy: str) -> NoReturn:
        raise JsonSyntaxError(problem=f"{what}; {remedy}", problem_mark=self._place(at))

    def _place(self, at: int) -> Any:  # has all that is used of a mark of the YAML parser
        return _Place(self._text, at)
