"""
How values of users' functions become JSON and come back, by their annotations. What would come back as something else
is refused, with the place in it.
"""

from __future__ import annotations

import math
import reprlib
from collections.abc import Callable, Mapping
from functools import cached_property
from types import NoneType
from typing import TYPE_CHECKING, Any

from pydantic_core import PydanticSerializationError, ValidationError, to_json, to_jsonable_python

if TYPE_CHECKING:
    from pydantic import TypeAdapter

_DEPTH_MAX = 100
"""Nesting of a value; the parser gives up at 200."""

_INTEGER_BITS_MAX = 14_000
"""The parser takes numbers of at most 4,300 digits."""


class JsonType:
    """
    How values of one annotation become JSON and come back. Where it says nothing, JSON values pass and others are
    refused, since they would come back as something else.
    """

    def __init__(self, annotation: Any, *, is_result: bool = False) -> None:
        self.annotation = annotation
        self._is_result = is_result
        self._is_scalar = any(annotation is one for one in (str, int, float, bool))
        self._is_open = any(annotation is one for one in (None, NoneType, Any, object))

    @cached_property
    def _adapter(self) -> TypeAdapter[Any] | None:
        from pydantic import PydanticUserError, TypeAdapter

        try:
            return TypeAdapter(self.annotation)
        except PydanticUserError:
            if self._is_result:  # then the value decides: most such functions return something else than they say
                return None
            raise BadValueError(
                f"{self.annotation!r} cannot be made from JSON; annotate it with a type that pydantic knows"
            ) from None

    def write(self, value: Any) -> Any:
        """
        A Python value as a JSON value.
        """
        if self._is_open or (self._is_scalar and type(value) is self.annotation) or (adapter := self._adapter) is None:
            return _json_copy(value)
        try:
            value = adapter.validate_python(value)
            # By alias and round_trip: what `read` accepts. Warnings: the value was just validated.
            dumped = adapter.dump_python(value, mode="json", by_alias=True, round_trip=True, warnings=False)
        except ValidationError as error:
            raise BadValueError.of(error) from None
        except PydanticSerializationError as error:
            _json_copy(value, convert=to_jsonable_python)  # finds the place
            raise BadValueError(str(error)) from None
        return _json_copy(dumped)

    def read(self, value: Any) -> Any:
        """
        A JSON value as a Python value.
        """
        if self._is_open or (self._is_scalar and type(value) is self.annotation) or (adapter := self._adapter) is None:
            return value
        try:
            # As JSON, not as Python values: types that are strict about Python values still take text for a date.
            return adapter.validate_json(to_json(value))
        except ValidationError as error:
            raise BadValueError.of(error) from None

    def normal(self, value: Any) -> Any:
        """
        A JSON value as `write` would have written it.
        """
        return self.write(self.read(_json_copy(value)))


class BadValueError(Exception):
    """
    A value that cannot pass: where in it (keys and positions from the outside in), and what is wrong there.
    """

    def __init__(self, what: str) -> None:
        super().__init__(what)
        self.problems: list[tuple[list[str | int], str]] = [([], what)]

    @classmethod
    def of(cls, error: ValidationError) -> BadValueError:
        bad = cls("")
        bad.problems = [
            ([*one["loc"]], f"{one['msg']}, not {reprlib.repr(one['input'])}")
            for one in error.errors(include_url=False, include_context=False)[:10]
        ]
        return bad

    def described(self, what: str, name: str = "") -> list[str]:
        lines = []
        for path, problem in self.problems:
            place = name + "".join(f"[{step}]" if isinstance(step, int) else f".{step}" for step in path)
            lines.append(f"{what} {place!r}: {problem}" if name else f"{what}{place}: {problem}")
        return lines


def _json_copy(value: Any, *, convert: Callable[[Any], Any] | None = None, depth: int = _DEPTH_MAX) -> Any:
    """
    A copy made of JSON values only, tuples as lists. What is none goes to `convert`, without one it is refused.
    """
    match value:
        case None | bool():
            return value
        case str():
            return _text(value)
        case int() | float():
            return _number(value)
        case Mapping() | list() | tuple() if not depth:
            raise BadValueError(f"nested more than {_DEPTH_MAX} levels deep, or inside itself")
        case Mapping():
            return {_key(key): _placed(key, one, convert, depth) for key, one in value.items()}
        case list() | tuple():
            return [_placed(index, one, convert, depth) for index, one in enumerate(value)]
    if convert is None:
        raise BadValueError(
            f"a {type(value).__qualname__} is not JSON; annotate it with its type so that it is converted, "
            "or pass text, numbers, true/false, null, lists and objects"
        )
    try:
        return convert(value)
    except Exception as error:
        raise BadValueError(f"a {type(value).__qualname__} is not JSON ({error})") from None


def _text(value: str) -> str:
    text = str.__str__(value)  # an enum's text is its value, whatever its `str()` says
    if not text.isascii() and any("\ud800" <= one <= "\udfff" for one in text):
        raise BadValueError("text with half a surrogate pair is not Unicode")
    return text


def _key(value: Any) -> str:
    if not isinstance(value, str):
        raise BadValueError(f"the key {reprlib.repr(value)} is not text, as JSON wants it")
    return _text(value)


def _number(value: float) -> float:
    if isinstance(value, int):
        if value.bit_length() > _INTEGER_BITS_MAX:
            raise BadValueError("the number has over 4,000 digits; pass it as text")
        return int(value)
    if not math.isfinite(value):
        raise BadValueError(f"{float(value)} is not JSON; pass null or text")
    return float(value)


def _placed(step: str | int, value: Any, convert: Callable[[Any], Any] | None, depth: int) -> Any:
    try:
        return _json_copy(value, convert=convert, depth=depth - 1)
    except BadValueError as bad:
        for path, _ in bad.problems:
            path.insert(0, step)
        raise
