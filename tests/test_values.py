"""Values of users' functions: each comes back equal and of the same type, or is refused with a remedy."""

from __future__ import annotations

import dataclasses
import ipaddress
import math
import re
from collections import Counter, OrderedDict, defaultdict, deque
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, date, datetime, time, timedelta
from decimal import Decimal
from enum import Enum, IntEnum, StrEnum
from fractions import Fraction
from functools import partial
from pathlib import Path, PurePosixPath
from typing import Annotated, Any, Generic, Literal, NamedTuple, TypeVar
from uuid import UUID
from zoneinfo import ZoneInfo

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    PrivateAttr,
    RootModel,
    Secret,
    SecretBytes,
    SecretStr,
    computed_field,
)
from pydantic import field_serializer as serializer
from pydantic_core import from_json, to_json
from typing_extensions import TypedDict

from rq_ceylon.values import BadValueError, JsonType

T = TypeVar("T")
BERLIN = ZoneInfo("Europe/Berlin")


class Colour(StrEnum):
    RED = "red"


class Size(IntEnum):
    BIG = 3


class Shape(Enum):
    ROUND = "round"
    PAIR = (1, 2)


class Pair(NamedTuple):
    left: int
    right: date


class Payload(TypedDict):
    name: str
    at: date


@dataclass
class Point:
    x: int
    on: date
    data: bytes = b""


@dataclass
class Point3(Point):
    z: int = 0


@dataclass(eq=False)
class Plain:
    on: date


@dataclass
class Derived:
    first: int
    second: int = field(init=False)

    def __post_init__(self) -> None:
        self.second = 2 * self.first


@dataclass
class Drifting:
    first: int
    second: int = field(init=False, default=0)


class Animal(BaseModel):
    name: str
    _cache: int = PrivateAttr(default=0)


class Dog(Animal):
    bites: bool = False


class Cat(BaseModel):
    kind: Literal["cat"] = "cat"
    born: date


class Bird(BaseModel):
    kind: Literal["bird"] = "bird"
    born: date


class Box(BaseModel, Generic[T]):
    inside: T


class Renamed(BaseModel):
    first: int = Field(alias="1st")

    @computed_field  # type: ignore[prop-decorator]
    @property
    def twice(self) -> int:
        return 2 * self.first


class Loose(BaseModel):
    model_config = ConfigDict(extra="allow")
    anything: Any = None


class Bytes64(BaseModel):
    model_config = ConfigDict(ser_json_bytes="base64", val_json_bytes="base64")
    data: bytes


class BytesText(BaseModel):
    data: bytes


class Forgetful(BaseModel):
    kept: int
    dropped: int = Field(default=0, exclude=True)


class German(BaseModel):
    on: date

    @serializer("on")
    def _written(self, value: date) -> str:
        return value.strftime("%d.%m.%Y")


class Broken(BaseModel):
    first: int

    @serializer("first")
    def _written(self, value: int) -> str:
        raise RuntimeError("no way to write this")


class Login(BaseModel):
    user: str
    password: SecretStr


class Numbers(RootModel[list[date]]):
    pass


class Opaque:
    pass


DAY = date(2026, 1, 2)
MOMENT = datetime(2026, 1, 2, 3, 4, 5, 6, tzinfo=UTC)
NETWORK = ipaddress.ip_network("10.0.0.0/8")
Animals = Annotated[Cat | Bird, Field(discriminator="kind")]


def same(value: Any, back: Any) -> bool:
    """Equal and of the same types all the way down, told another way than the package tells it."""
    if type(value) is not type(back):
        return False
    if isinstance(value, dict):
        pairs = zip(value.items(), back.items(), strict=False)
        return len(value) == len(back) and all(same(one, other) for one, other in pairs)
    if isinstance(value, list | tuple | deque):
        return len(value) == len(back) and all(map(same, value, back))
    if isinstance(value, set | frozenset):
        return value == back and Counter(map(type, value)) == Counter(map(type, back))
    if dataclasses.is_dataclass(value) or isinstance(value, BaseModel):
        return same(dict(vars(value)), dict(vars(back)))
    return bool(value == back)


@pytest.mark.parametrize(
    ("annotation", "value"),
    [
        (str, "grün 🎉"),
        (int, 10**400),
        (float, 1e-320),
        (bool, True),
        (None, {"a": [1, None, 2.5, "x", {"b": False}]}),
        (Any, [[]]),
        (list, [{"a": 1}]),
        (dict[str, list[int]], {"a": [1]}),
        (str | None, None),
        (int | str, "5"),
        (int | float, 1.0),
        (list[int] | list[str], ["1"]),
        (Literal["a", 3], 3),
        (bytes, b"\x89PNG\xff\x00"),
        (dict[str, bytes], {"a": b"\xff"}),
        (dict[int, str], {1: "a"}),
        (dict[date, Decimal], {DAY: Decimal("1.10")}),
        (dict[Colour, int], {Colour.RED: 1}),
        (tuple[int, date], (1, DAY)),
        (tuple[str, ...], ("a", "b")),
        (Sequence[int], [1, 2]),
        (Iterable[date], [DAY]),
        (Mapping[str, date], {"a": DAY}),
        (set[int], {1, 2, 3}),
        (frozenset[date], frozenset({DAY})),
        (deque[int], deque([1, 2])),
        (defaultdict[str, int], defaultdict(int, a=1)),
        (OrderedDict[str, date], OrderedDict(a=DAY)),
        (Colour, Colour.RED),
        (Size, Size.BIG),
        (Shape, Shape.ROUND),
        (Pair, Pair(1, DAY)),
        (Payload, {"name": "a", "at": DAY}),
        (Point, Point(1, DAY, b"\xff")),
        (list[Point], [Point(1, DAY)]),
        (Plain, Plain(DAY)),
        (Derived, Derived(2)),
        (Animal, Animal(name="a")),
        (Animal | Dog, Dog(name="a", bites=True)),
        (Animals, Bird(born=DAY)),
        (Box[date], Box[date](inside=DAY)),
        (Renamed, Renamed.model_validate({"1st": 1})),
        (Loose, Loose.model_validate({"anything": [1], "more": {"a": None}})),
        (Numbers, Numbers([DAY])),
        (Bytes64, Bytes64(data=b"\xff")),
        (BytesText, BytesText(data=b"text")),
        (Forgetful, Forgetful(kept=1)),
        (date, DAY),
        (datetime, MOMENT),
        (datetime, datetime(2026, 1, 2)),
        (time, time(1, 2, 3, 4)),
        (timedelta, timedelta(days=-400_000, microseconds=1)),
        (Decimal, Decimal("0.1000000000000000000000000001")),
        (Fraction, Fraction(1, 3)),
        (complex, complex(1, -0.5)),
        (UUID, UUID(int=5)),
        (Path, Path("/a/ü")),
        (PurePosixPath, PurePosixPath("a")),
        (ipaddress.IPv4Address, ipaddress.ip_address("127.0.0.1")),
        (ipaddress.IPv6Network | ipaddress.IPv4Network, NETWORK),
        (re.Pattern[str], re.compile("a+")),
        (Annotated[int, Field(gt=0)], 1),
    ],
    ids=repr,
)
def test_an_annotated_value_comes_back_equal_and_of_the_same_type(annotation: Any, value: Any) -> None:
    kind = JsonType(annotation)

    raw = from_json(to_json(kind.write(value)))
    back = kind.read(raw)

    assert same(value, back), f"{value!r} came back as {back!r}"
    assert kind.normal(raw) == raw


def test_a_time_in_the_hour_that_a_clock_repeats_comes_back_as_the_same_moment() -> None:
    kind, moment = JsonType(datetime), datetime(2024, 10, 27, 2, 30, fold=1, tzinfo=BERLIN)

    assert kind.read(kind.write(moment)).timestamp() == moment.timestamp()


def endless() -> list[Any]:
    value: list[Any] = []
    value.append([value])
    return value


@pytest.mark.parametrize(
    ("annotation", "value", "place", "words"),
    [
        (SecretStr, SecretStr("hunter2"), "", "a SecretStr never travels"),
        (SecretBytes, SecretBytes(b"hunter2"), "", "a SecretBytes never travels"),
        (Secret[int], Secret(7), "", "never travels"),
        (Annotated[SecretStr, Field(min_length=20)], SecretStr("hunter2" * 3), "", "never travels"),
        (Login, Login(user="a", password=SecretStr("hunter2")), ".password", "pass the name"),
        (list[Login], [{"user": "a", "password": "hunter2"}], "[0].password", "never travels"),
        (None, [SecretStr("hunter2")], "[0]", "never travels"),
        (None, {1: 2}, "", "the key 1 is not text"),
        (dict, {"a": {1: 2}}, ".a", "annotate the keys: dict[int, ...]"),
        (dict[Any, date], {1: DAY}, "", "1 would come back as another key"),
        (None, (1, 2), "", "would come back as a list"),
        (None, [Colour.RED], "[0]", "would come back as a str"),
        (None, {"a": Counter()}, ".a", "would come back as a dict"),
        (None, DAY, "", "a date is not JSON; annotate it with its type"),
        (None, b"x", "", "a bytes is not JSON; annotate it"),
        (list, [DAY], "[0]", "a date is not JSON; annotate it"),
        (list[Any], [1, (2, 3)], "[1]", "would come back as a list"),
        (tuple, (1, DAY), "[1]", "a date would come back as a str"),
        (set, {True, DAY}, "", "would come back as another"),
        (Sequence[date], (DAY,), "", "a tuple would come back as a list"),
        (date | str, "2026-01-02", "", "a str would come back as a date"),
        (str | date, DAY, "", "a date would come back as a str"),
        (str | bytes, b"\xff", "", "a bytes would come back as a str"),
        (Animal, Dog(name="a"), "", "a Dog would come back as a Animal"),
        (dict[str, list[Animal]], {"a": [Dog(name="a")]}, ".a[0]", "annotate this place"),
        (Point, Point3(1, DAY), "", "a Point3 would come back as a Point"),
        (Box[Any], Box[Any](inside=DAY), ".inside", "a date would come back as a str"),
        (Loose, Loose(anything={"a": (1,)}), ".anything.a", "a tuple would come back as a list"),
        (BytesText, BytesText(data=b"\xff"), ".data", 'ser_json_bytes="base64"'),
        (Forgetful, Forgetful(kept=1, dropped=2), ".dropped", "2 would come back as 0"),
        (German, German(on=DAY), ".on", "which its annotation does not read"),
        (Broken, Broken(first=1), "", "no way to write this"),
        (Shape, Shape.PAIR, "", "which its annotation does not read"),
        (float, math.nan, "", "nan is not JSON"),
        (list[float], [1.0, -math.inf], "[1]", "-inf is not JSON"),
        (list[float | date], [math.nan], "[0]", "nan is not JSON"),
        (date | float, math.inf, "", "inf is not JSON"),
        (str, "\ud800", "", "half a surrogate pair"),
        (Point, Point(10**5000, DAY), ".x", "over 4,000 digits"),
        (Box[Any], Box[Any](inside=Opaque()), ".inside", "a Opaque is not JSON"),
        (Callable[[], int], len, "", "is not JSON"),
        (Opaque, Opaque(), "", "annotate it with a type that pydantic knows"),
        (list, endless(), "[0]" * 100, "or inside itself"),
        (tuple, (endless(),), "[0]" * 100, "or inside itself"),
    ],
)
def test_a_value_that_would_come_back_as_another_is_refused(
    annotation: Any, value: Any, place: str, words: str
) -> None:
    with pytest.raises(BadValueError) as caught:
        JsonType(annotation).write(value)

    (line,) = caught.value.described("", "")[:1]
    assert line.partition(": ")[0] == place
    assert words in line
    assert "hunter2" not in line


def test_what_only_the_default_factory_or_a_later_change_tells_is_refused() -> None:
    value = Drifting(1)
    value.second = 5

    with pytest.raises(BadValueError, match="5 would come back as 0"):
        JsonType(Drifting).write(value)


def test_a_secret_from_a_file_is_refused_as_one_of_a_program_is() -> None:
    with pytest.raises(BadValueError) as caught:
        JsonType(SecretStr).normal("hunter2")

    assert "never travels" in caught.value.described("x")[0]


LEAVES: dict[Any, st.SearchStrategy[Any]] = {
    str: st.text(),
    int: st.integers(),
    float: st.floats(allow_nan=False, allow_infinity=False),
    bool: st.booleans(),
    None: st.none(),
    bytes: st.binary(),
    date: st.dates(),
    datetime: st.datetimes(timezones=st.sampled_from([None, UTC, BERLIN])),
    timedelta: st.timedeltas(),
    Decimal: st.decimals(allow_nan=False, allow_infinity=False),
    UUID: st.uuids(),
    Colour: st.just(Colour.RED),
    Size: st.just(Size.BIG),
    complex: st.complex_numbers(allow_nan=False, allow_infinity=False),
}
PLACES: dict[Any, Callable[[Any], Any]] = {
    list: list.__class_getitem__,
    tuple: lambda one: tuple.__class_getitem__((one, ...)),
    dict: lambda one: dict.__class_getitem__((str, one)),
    deque: deque.__class_getitem__,
    Box: Box.__class_getitem__,
}


def filled(place: Any, members: list[Any]) -> Any:
    if place is dict:
        return {str(position): one for position, one in enumerate(members)}
    return Box[Any].model_construct(inside=members[0]) if place is Box else place(members)


@st.composite
def annotated_values(draw: st.DrawFn) -> tuple[Any, Any]:
    """An annotation, and a value of it or of another one: users pass what they should not."""
    kinds = draw(st.lists(st.sampled_from([*LEAVES]), min_size=1, max_size=2))
    annotation = kinds[0] if len(kinds) == 1 else (kinds[0] or type(None)) | (kinds[1] or type(None))
    annotation = draw(st.sampled_from([annotation, annotation, Any]))
    value = st.one_of([LEAVES[kind] for kind in kinds])
    for place in draw(st.lists(st.sampled_from([*PLACES]), max_size=2)):
        annotation = draw(st.sampled_from([PLACES[place](annotation), PLACES[place](annotation), Any]))
        value = st.lists(value, min_size=1, max_size=3).map(partial(filled, place))
    return annotation, draw(value)


@settings(deadline=None)  # the first of each annotation builds its schema
@given(annotated_values())
def test_every_value_that_is_written_reads_back_as_the_annotation_took_it(pair: tuple[Any, Any]) -> None:
    annotation, value = pair
    kind = JsonType(annotation)
    try:
        raw = kind.write(value)
    except BadValueError:
        return

    back = kind.read(from_json(to_json(raw)))

    # The annotation may convert what it is given, as Python's own `int("5")` does; that is what must come back.
    taken = value if annotation is Any else JsonType(annotation)._adapter.validate_python(value)  # type: ignore[union-attr]
    assert same(taken, back), f"{taken!r} came back as {back!r}"
    assert kind.write(back) == raw
