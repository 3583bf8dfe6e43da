"""
JSON as the events that a YAML parser gives, so that one reader builds values, keeps limits and knows places.

YAML reads JSON almost, but not quite, as JSON: it folds U+2028 inside of texts, refuses long keys, and knows no pairs
of surrogates.
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
    """It is not JSON. `problem` names the remedy too."""


class _Place:
    """A place in the text; its line and column are counted only when they are asked for."""

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
    """Gives one event after another, as `yaml.Loader.get_event`."""

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
        """The events of the value that starts here. Returns where it ends. The reader stops at its limit of depth."""
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

    def _place(self, at: int) -> Any:  # all that is asked of a mark of the YAML parser
        return _Place(self._text, at)
