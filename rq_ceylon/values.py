"""
How values of users' functions become JSON and come back, as their annotations say. A value is written only if its
annotation reads it back as an equal value of the same type. Any other value is refused, with its place in the value and
the remedy.
"""

from __future__ import annotations

import dataclasses
import math
import reprlib
from collections import deque
from collections.abc import Collection, Iterable, Mapping, Set
from datetime import UTC, datetime
from enum import Enum
from functools import cached_property
from types import NoneType, UnionType
from typing import TYPE_CHECKING, Any, Literal, NewType, Union, cast, get_args, get_origin

from pydantic_core import ValidationError, from_json, to_json

if TYPE_CHECKING:
    from pydantic import TypeAdapter

_DEPTH_MAX = 100
"""How deep a value may be nested; the parser gives up at 200."""

_INTEGER_BITS_MAX = 14_000
"""The parser accepts numbers of at most 4,300 digits."""

_SCALARS = (str, int, float, bool)
_LEAVES = frozenset({*_SCALARS, bytes})


class JsonType:
    """
    How values of one annotation become JSON and come back. Without an annotation only JSON values are accepted, because
    any other would come back as something else.

    Args:
        unresolved: the annotation as written, if it names something that does not exist at run time.
    """

    def __init__(self, annotation: Any, *, is_result: bool = False, unresolved: str = "") -> None:
        if get_origin(annotation) is Iterable:
            annotation = list[get_args(annotation)]  # type: ignore[misc]  # pydantic would turn it into an iterator
        self.annotation = annotation
        self._is_result, self._unresolved = is_result, unresolved
        self._is_scalar = _is_one_of(annotation, _SCALARS)
        self._is_open = _is_one_of(annotation, (None, NoneType, Any, object))
        # Validated values of such an annotation are already JSON values, which the annotation reads back unchanged:
        # they can be written without a proof.
        self._is_plain = _is_plain(annotation)

    @cached_property
    def _adapter(self) -> TypeAdapter[Any] | None:
        from pydantic import ConfigDict, PydanticUserError, TypeAdapter

        config = ConfigDict(ser_json_bytes="base64", val_json_bytes="base64")
        try:
            try:
                return TypeAdapter(self.annotation, config=config)
            except PydanticUserError as error:
                if error.code != "type-adapter-config-unused":
                    raise
                # A dataclass, TypedDict or model: it accepts the configuration only from a type that contains it.
                return TypeAdapter(cast(Any, NewType("argument", self.annotation)), config=config)
        except Exception as error:
            if self._is_result:  # then the value decides: most such functions do not return what their annotation says
                return None
            raise BadValueError(
                f"{self.annotation!r} cannot be made from JSON; annotate it with a type that pydantic knows "
                f"({_first_line(error)})"
            ) from None

    def write(self, value: Any) -> Any:
        """
        Turn a Python value into a JSON value.

        Raises:
            BadValueError: the annotation does not accept the value, the value cannot be written, or `read` would make
                another value of what was written.
        """
        if self._is_open:
            return self._written_openly(value)
        if self._is_scalar and type(value) is self.annotation:
            return _json_copy(value)
        if (adapter := self._adapter) is None:
            return self._written_openly(value)
        try:
            value = adapter.validate_python(value)
        except ValidationError as error:
            raise BadValueError.of(error) from None
        except Exception as error:
            raise BadValueError(f"checking it failed with {_named(error)}") from error
        return _json_copy(value) if self._is_plain else _proven(adapter, value)

    def read(self, value: Any) -> Any:
        """Turn a JSON value into a Python value."""
        if self._is_open or (self._is_scalar and type(value) is self.annotation) or (adapter := self._adapter) is None:
            return value
        try:
            # As JSON, not as Python values: a type that is strict about Python values still accepts text for a date in
            # JSON.
            return adapter.validate_json(to_json(value))
        except ValidationError as error:
            raise BadValueError.of(error) from None

    def normal(self, value: Any) -> Any:
        """Turn a JSON value into the one that `write` would have made."""
        value = _json_copy(value)
        if self._is_open or (self._is_scalar and type(value) is self.annotation):
            return value
        return self.write(self.read(value))

    def _written_openly(self, value: Any) -> Any:
        try:
            return _json_copy(value)
        except BadValueError as bad:
            if self._unresolved:
                bad.add(
                    f"its annotation {self._unresolved!r} cannot be found at run time; import it outside of "
                    "`if TYPE_CHECKING:`"
                )
            raise


class BadValueError(Exception):
    """A value that is refused: where inside it (keys and positions, from the outside in), and what is wrong there."""

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

    def inside(self, step: Any) -> BadValueError:
        """The same error, seen from the value that contains this one at `step`."""
        for path, _ in self.problems:
            path.insert(0, step if isinstance(step, int) else str(step))
        return self

    def add(self, words: str) -> None:
        self.problems = [(path, f"{problem} ({words})") for path, problem in self.problems]

    def described(self, what: str, name: str = "") -> list[str]:
        lines = []
        for path, problem in self.problems:
            place = name + "".join(f"[{step}]" if isinstance(step, int) else f".{step}" for step in path)
            lines.append(f"{what} {place!r}: {problem}" if name else f"{what}{place}: {problem}")
        return lines


def _is_plain(annotation: Any) -> bool:
    if _is_one_of(annotation, (*_SCALARS, None, NoneType, Any, list, dict)):
        return True
    origin, arguments = get_origin(annotation), get_args(annotation)
    if origin is Union or origin is UnionType:
        given = [one for one in arguments if one is not NoneType]
        return all(_is_one_of(one, _SCALARS) for one in given) or (len(given) == 1 and _is_plain(given[0]))
    if origin is list:
        return all(map(_is_plain, arguments))
    if origin is dict:
        return not arguments or (arguments[0] is str and _is_plain(arguments[1]))
    return origin is Literal and all(type(one) is str for one in arguments)


def _is_one_of(annotation: Any, types: Iterable[Any]) -> bool:
    return any(annotation is one for one in types)  # by identity, because an annotation may define its own equality


# ---- JSON values -----------------------------------------------------------------------------------------------------
def _json_copy(value: Any, depth: int = _DEPTH_MAX) -> Any:
    """
    Copy a JSON value. Types must match exactly: a tuple, a date or a subclass of `dict` would come back as a list, text
    or a dict.
    """
    kind = type(value)
    if kind is str:
        return value if value.isascii() else _unicode(value)
    if kind is bool or value is None:
        return value
    if kind is int or kind is float:
        return _number(value)
    if kind is list or kind is dict:
        if not depth:
            raise BadValueError(f"nested more than {_DEPTH_MAX} levels deep, or inside itself")
        if kind is list:
            return [_placed(index, one, depth) for index, one in enumerate(value)]
        return {_key(key): _placed(key, one, depth) for key, one in value.items()}
    raise BadValueError(_not_json(value))


def _placed(step: str | int, value: Any, depth: int) -> Any:
    try:
        return _json_copy(value, depth - 1)
    except BadValueError as bad:
        raise bad.inside(step) from None


def _unicode(value: str) -> str:
    if any("\ud800" <= one <= "\udfff" for one in value):
        raise BadValueError("text with half a surrogate pair is not Unicode")
    return value


def _key(value: Any) -> str:
    if type(value) is not str:
        raise BadValueError(
            f"the key {reprlib.repr(value)} is not text, which JSON requires; use text, "
            f"or annotate the keys: dict[{type(value).__qualname__}, ...]"
        )
    return value if value.isascii() else _unicode(value)


def _number(value: float) -> float:
    if isinstance(value, int):
        if value.bit_length() > _INTEGER_BITS_MAX:
            raise BadValueError("the number has over 4,000 digits; pass it as text")
    elif not math.isfinite(value):
        raise BadValueError(f"{value} is not JSON; pass null or text")
    return value


def _not_json(value: Any) -> str:
    name = type(value).__qualname__
    if _is_secret(value):
        return _secret_words(value)
    for base in (dict, list, tuple, str, int, float):
        if isinstance(value, base):
            plain = list if base is tuple else base
            return (
                f"a {name} is not JSON: it would come back as a {plain.__name__}; annotate it with its type, or pass "
                f"{plain.__name__}(...)"
            )
    return (
        f"a {name} is not JSON; annotate it with its type so that it is converted, "
        "or pass text, numbers, true/false, null, lists and objects"
    )


# ---- values of annotated types ---------------------------------------------------------------------------------------
def _proven(adapter: TypeAdapter[Any], value: Any) -> Any:
    """The JSON value of a validated value, proven by reading it back."""
    try:
        # `read` accepts what is written by alias and with round_trip. Warnings would tell nothing new, because the
        # value was just validated.
        text = adapter.dump_json(value, by_alias=True, round_trip=True, warnings=False)
    except Exception as error:
        is_of_bytes = isinstance(error, UnicodeDecodeError) or "invalid utf-8" in str(error)
        raise _unwritable(value, is_of_bytes) or BadValueError(f"it cannot be written: {_first_line(error)}") from error
    try:
        back = adapter.validate_json(text)
    except Exception as error:
        bad = _unwritable(value) or (BadValueError.of(error) if isinstance(error, ValidationError) else None)
        bad = bad or BadValueError(_named(error))
        bad.add(f"it is written as {reprlib.repr(text.decode())}, which its annotation does not read")
        raise bad from error
    if (difference := _difference(value, back)) is not None:
        raise difference
    return from_json(text)


def _difference(value: Any, back: Any) -> BadValueError | None:
    """
    The first place where the value that was read back differs from the one that was written: it is unequal, or of
    another type.
    """
    kind = type(value)
    if kind is type(back) and (value is back or (kind in _LEAVES and value == back)):
        return None
    if _is_secret(value) or (kind is float and not math.isfinite(value)):
        return _unwritable(value)
    if kind is not type(back):
        return BadValueError(
            f"a {kind.__qualname__} would come back as a {type(back).__qualname__}; "
            "annotate this place with the type of its value, or pass what its annotation says"
        )
    if isinstance(value, Mapping | Set) and (changed := _changed_keys(value, back)) is not None:
        return changed
    parts = _parts(value)
    if parts is None:
        return None if _equal(value, back) else _changed(value, back)
    others = _parts(back) or {}
    for step, one in parts.items():
        if (bad := _difference(one, others.get(step))) is not None:
            return bad.inside(step)
    return None if len(parts) == len(others) else _changed(value, back)


def _changed_keys(keys: Collection[Any], back: Collection[Any]) -> BadValueError | None:
    # Keys are found by equality, then compared like values: True equals 1, and a member of a StrEnum equals its text.
    known = {one: one for one in back}
    for key in keys:
        if key not in known or _difference(key, known[key]) is not None:
            return BadValueError(
                f"{reprlib.repr(key)} would come back as another key or member; annotate it with its type"
            )
    return None if len(known) == len(keys) else _changed(keys, back)


def _parts(value: Any) -> Mapping[Any, Any] | None:
    """The parts of a value by position, key or field; None if it has no parts."""
    if isinstance(value, Mapping):
        return value
    if isinstance(value, list | tuple | deque):
        return dict(enumerate(value))
    kind = type(value)
    if hasattr(kind, "__pydantic_fields__") and hasattr(kind, "model_fields"):
        fields = kind.model_fields
        return {name: one for name, one in vars(value).items() if name in fields} | (value.__pydantic_extra__ or {})
    if dataclasses.is_dataclass(kind):
        return {one.name: getattr(value, one.name, None) for one in dataclasses.fields(kind)}
    return None


def _state(value: Any) -> dict[str, Any]:
    dictionary, slots = state if isinstance(state := value.__getstate__(), tuple) else (state, None)
    return {**(dictionary or {}), **(slots or {})}


def _equal(value: Any, back: Any) -> bool:
    if isinstance(value, datetime) and value.tzinfo is not None and back.tzinfo is not None:
        # In the hour that a clock repeats, Python never finds times of two zones equal (PEP 495).
        value, back = value.astimezone(UTC), back.astimezone(UTC)
    if cast(Any, type(value).__eq__) is object.__eq__ and not isinstance(value, Enum):
        value, back = _state(value), _state(back)  # objects without their own equality: compare their attributes
    return bool(value == back)


def _changed(value: Any, back: Any) -> BadValueError:
    return BadValueError(
        f"{reprlib.repr(value)} would come back as {reprlib.repr(back)}; annotate it with a type that JSON can carry"
    )


def _unwritable(value: Any, is_of_bytes: bool = False, depth: int = _DEPTH_MAX) -> BadValueError | None:
    """The first part of a value that cannot be written as JSON, whatever its annotation."""
    if not depth:
        return BadValueError(f"nested more than {_DEPTH_MAX} levels deep, or inside itself")
    try:
        match value:
            case _ if _is_secret(value):
                return BadValueError(_secret_words(value))
            case bytes() if is_of_bytes:
                value.decode()
            case str() | float() | int() | None:
                _json_copy(value)
            case _ if (parts := _parts(value)) is not None:
                for step, one in parts.items():
                    if (bad := _unwritable(one, is_of_bytes, depth - 1)) is not None:
                        return bad.inside(step)
            case Set():
                return next(filter(None, (_unwritable(one, is_of_bytes, depth - 1) for one in value)), None)
            case _:
                to_json(value, bytes_mode="base64")
    except BadValueError as bad:
        return bad
    except UnicodeDecodeError:
        return BadValueError(
            f"{reprlib.repr(value)} is not text, as which its model writes bytes; give the model the configuration "
            'ConfigDict(ser_json_bytes="base64", val_json_bytes="base64")'
        )
    except Exception:
        return BadValueError(_not_json(value))
    return None


def _is_secret(value: Any) -> bool:
    return hasattr(type(value), "get_secret_value")


def _secret_words(value: Any) -> str:
    return (
        f"a {type(value).__qualname__} never travels, since Redis would keep the secret as plain text; pass the name "
        "under which the worker finds it, such as that of an environment variable"
    )


def _named(error: Exception) -> str:
    return f"{type(error).__name__}: {_first_line(error)}"


def _first_line(error: Exception) -> str:
    return str(error).partition("\n")[0]
