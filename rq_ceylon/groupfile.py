"""
Reads one group from YAML or JSON text into a `TaskGroup`, or says everything that is wrong with it and where.

A file is foreign text, so its values are built here from the parser's events: no aliases, tags or duplicate keys,
bounded size and depth, and of YAML's guesses only null, true, false and JSON's numbers. Then pydantic checks the shape,
`models` and `goals` the values, `graph` the order. JSON is read as the YAML that it is.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable
from difflib import get_close_matches
from typing import Annotated, Any, NoReturn, TypeVar

import yaml
from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, SkipValidation, ValidationError
from pydantic_core import ErrorDetails, from_json

from rq_ceylon import goals, graph, models
from rq_ceylon.errors import GroupFileError, InvalidInputError
from rq_ceylon.models import Goal, GoalPolicy, Priority, Task, TaskGroup

MAX_BYTES = 16 * 2**20
MAX_DEPTH = 20
MAX_VALUES = 2_000_000  # bounds memory: 16 MiB of `[0,0,0,...` would be eight million values

Path = tuple[str | int, ...]
Place = tuple[int, int]  # line and column, from 1


def load(text: str | bytes, filename: str) -> TaskGroup:
    """
    Read a group from the text of a YAML or JSON file; `filename` is only what the problems are prefixed with.

    Raises:
        GroupFileError: with all problems, in the order of the file. Only bad syntax and the limits end the search early.
    """
    file = _File(filename)
    group = _group(file, file.read(text))
    if group is None or file.problems:
        file.give_up()
    return group


def _group(file: _File, data: Any) -> TaskGroup | None:
    fields = _shape(file, GroupFields, data, ())
    if not isinstance(data, dict):
        return None
    defaults = _shape(file, DefaultFields, data.get("defaults"), ("defaults",))
    tasks, goal = _tasks(file, data.get("tasks")), _goals(file, data.get("goal"))
    if fields is None or defaults is None:
        return None
    return TaskGroup(**(dict(fields) | {"tasks": tasks, "goal": goal, "defaults": Task(**dict(defaults))}))


def _tasks(file: _File, data: Any) -> list[Task]:
    listed = isinstance(data, list)
    if not data or not isinstance(data, dict | list):
        if data is not None:  # then it is missing, which the group's shape has reported
            file.add(("tasks",), f"{_shown(data)} where tasks are needed; write one per key, or a list of them")
        return []
    tasks: list[Task] = []
    paths: dict[str, Path] = {}  # by id; a task without one gets a stand-in that nobody can need
    needs: dict[str, list[str]] = {}
    for key, value in enumerate(data) if listed else data.items():
        path: Path = ("tasks", key)
        fields = _shape(file, ListedTask if listed else TaskFields, value, path)
        given = getattr(fields, "id", None) if listed else key
        if not listed:
            file.check(path, models.check_id, key, "tasks")
        elif given in paths:
            file.add((*path, "id"), f"{given!r} is also the id in line {file.place(paths[given])[0]}; give another")
        name = given or f"#{key}"
        paths[name], needs[name] = path, []
        if fields is not None:
            tasks.append(Task(**(dict(fields) | {"id": given})))
            needs[name] = list(fields.needs)
    for name, others in needs.items():
        for at, other in enumerate(others):
            if other == name:
                file.add((*paths[name], "needs", at), "it needs itself; remove it from its needs")
            elif other not in paths:
                # A guess compares every id: in a large file full of mistakes only the first get one.
                guess = _guess(other, paths if len(file.problems) < 20 else (), "name a task of this group")
                file.add((*paths[name], "needs", at), f"no task has the id {other!r}; {guess}")
        needs[name] = [other for other in others if other in paths and other != name]
    file.check(("tasks",), graph.in_order, needs, "tasks")
    return tasks


def _goals(file: _File, data: Any) -> list[Goal]:
    found: list[Goal] = []
    problems = len(file.problems)
    for at, value in enumerate(data if isinstance(data, list) else [] if data is None else [data]):
        path: Path = ("goal", at) if isinstance(data, list) else ("goal",)
        fields = _shape(file, GoalFields, {"when": value} if isinstance(value, str) else value, path)
        if fields is not None:
            found.append(Goal(**dict(fields)))
            if (fields.when is None) == (fields.call is None):
                file.add(path, 'needs one of "when" and "call"; write an expression, such as when: completed >= 95%')
    if len(file.problems) == problems:
        file.check(("goal",), goals.compile_goals, found)
    return found


# The shape: what each mapping may hold. Field names are those of `models`, aliases those of the file.


def _named(name: str, check: Callable[..., Any], *values: Any) -> Any:
    # Messages begin with the name of what was checked; the report says it better, with the path.
    try:
        return check(*values)
    except InvalidInputError as error:
        raise ValueError(str(error).removeprefix(f"{name}: ")) from None


def _check_id(value: str) -> Any:
    return _named("id", models.check_id, value, "id")


def _check_expression(value: str) -> str:
    _named("expression", goals.parse, value, "expression")
    return value


def _check_duration(value: Any) -> Any:
    if isinstance(value, str) and (clock := re.fullmatch(r"([0-9]{1,6}):([0-9]{2})", value)):
        minutes, rest = int(clock[1]), int(clock[2])
        raise ValueError(f"{value!r} is not a duration; write {minutes * 60 + rest}s or {minutes}m{rest}s")
    return _named("duration", models.seconds, value, "duration")


def _as_id(value: Any) -> Any:
    return str(value) if type(value) is int else value  # the task `1:` has the id "1", and `needs: 1` means it


Name = Annotated[str, AfterValidator(_check_id)]
TaskId = Annotated[str, BeforeValidator(_as_id, json_schema_input_type=str | int), AfterValidator(_check_id)]
Needs = Annotated[
    list[TaskId], BeforeValidator(lambda value: value if isinstance(value, list) else [value]), Field(max_length=graph.MAX_NEEDS)
]
Expression = Annotated[str, AfterValidator(_check_expression)]
Seconds = Annotated[float, BeforeValidator(_check_duration, json_schema_input_type=float | str)]
Message = Annotated[str, Field(max_length=goals.MAX_MESSAGE)]
Level = Annotated[Priority, Field(strict=False)]


class _Shape(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True)


class DefaultFields(_Shape):
    uses: Name | None = None
    role: Name | None = None
    duration: Seconds | None = None
    timeout: Seconds | None = None
    max_attempts: Annotated[int, Field(ge=1)] | None = None
    priority: Level | None = None
    delay: Seconds | None = None
    expires: Seconds | None = None
    metadata: dict[str, Any] | None = None


class TaskFields(DefaultFields):
    arguments: dict[str, Any] = Field(default_factory=dict, alias="with")
    needs: Needs = Field(default_factory=list)


class ListedTask(TaskFields):
    id: TaskId | None = None


class GoalFields(_Shape):
    when: Expression | None = None
    call: Name | None = None
    name: Name | None = None
    deadline: Annotated[Seconds, Field(gt=0)] | None = None
    fail_when: Expression | None = None
    on_achieved: GoalPolicy = "continue"
    on_failed: GoalPolicy = "continue"
    success_message: Message | None = None
    failure_message: Message | None = None


class GroupFields(_Shape):
    name: Annotated[str, Field(min_length=1)]
    description: str = ""
    key: Name | None = None
    priority: Level | None = None
    retention: Seconds = models.DEFAULT_RETENTION_S
    defaults: SkipValidation[DefaultFields | None] = None
    tasks: SkipValidation[dict[str, TaskFields | None] | list[ListedTask | None]]
    goal: SkipValidation[str | GoalFields | list[str | GoalFields] | None] = None


S = TypeVar("S", bound=_Shape)

_NEEDED = {"string_type": "text", "dict_type": "a mapping", "int_type": "a whole number"}
_ALSO_CALLED = {"args": "with", "kwargs": "with", "run": "uses", "retries": "max_attempts", "depends_on": "needs"}


def _shape(file: _File, model: type[S], data: Any, path: Path) -> S | None:
    # What is null counts as not given.
    if not isinstance(data, dict | None):
        return file.add(path, f"{_shown(data)} where a mapping is needed; write key: value")
    keys = {field.alias or name for name, field in model.model_fields.items()}
    try:
        return model.model_validate({k: v for k, v in (data or {}).items() if v is not None or k not in keys})
    except ValidationError as error:
        for problem in error.errors(include_url=False):
            unknown = problem["type"] == "extra_forbidden"
            file.add((*path, *problem["loc"]), _explained(problem, sorted(keys)), at_key=unknown)
    return None


def _explained(problem: ErrorDetails, keys: list[str]) -> str:
    given, context = problem["input"], problem.get("ctx", {})
    match problem["type"]:
        case "extra_forbidden":
            key = str(problem["loc"][-1])
            meant = _ALSO_CALLED.get(key, key)
            return f"unknown key; {_guess(meant, keys, 'use one of ' + ', '.join(keys))}"
        case "missing":
            return "missing; add it"
        case "value_error":
            return str(context["error"])
        case "enum" | "literal_error":
            options = str(context["expected"]).replace("'", "")
            return f"{_shown(given)} is not known here; {_guess(given, options.split(), f'use {options}')}"
        case "string_type" if not isinstance(given, dict | list):
            return f"{_shown(given)} where text is needed; put it in quotes"
        case "string_type" | "dict_type" | "int_type" as kind:
            return f"{_shown(given)} where {_NEEDED[kind]} is needed; write that"
        case _:
            return f"{_shown(given)} is not usable; {problem['msg'][0].lower()}{problem['msg'][1:]}"


def _guess(word: object, options: Iterable[str], otherwise: str) -> str:
    near = get_close_matches(word.lower(), options, 1) if isinstance(word, str) and len(word) <= 64 else []
    return f'did you mean "{near[0]}"?' if near else otherwise


def _shown(value: object) -> str:
    if isinstance(value, dict | list):
        return ("a" if value else "an empty") + (" mapping" if isinstance(value, dict) else " list")
    return str(value).lower() if isinstance(value, bool) else repr(value)


# The loader: from text to values, and where each of them stands.

_Loader: Any = getattr(yaml, "CSafeLoader", yaml.SafeLoader)

_NUMBER = re.compile(r"-?(?:0|[1-9][0-9]*)(\.[0-9]+)?([eE][+-]?[0-9]+)?")
_NOT_FINITE = re.compile(r"[-+]?\.(?:inf|Inf|INF)|\.(?:nan|NaN|NAN)|NaN|-?Infinity")
_WORDS = {"": None, "~": None, "null": None, "true": True, "false": False}
_FILLER = "\ufdd0"  # no character at all, so nothing is lost where texts lose it
_FORBIDDEN = re.compile("[^\t\n\r\x20-\x7e\x85\xa0-\ud7ff\ue000-\ufdcf\ufdd1-\ufffd\U00010000-\U0010ffff]")
_SURROGATES = re.compile(r"\\u([dD][89abAB][0-9a-fA-F]{2})\\u([dD][c-fC-F][0-9a-fA-F]{2})")
_SYNTAX_REMEDIES = {
    "cannot start any token": "indent with spaces, not tabs, and quote text that starts with @ or `",
    "mapping values are not": 'check the indentation, and quote text that contains ": "',
    "expected ':'": "write key: value, with a space after the colon",
    "expected key": "start all keys of one mapping in the same column",
    "end of stream": "close the quote",
    "escape c": "in double quotes a backslash starts an escape; single quotes take it as it is",
}


class _File:
    """
    One file: reads it, knows where each value stands, and collects the problems, its own and those of the checks.

    Built on events: six times faster than `yaml.compose`, which also hides anchors and recurses without a limit.
    """

    def __init__(self, filename: str) -> None:
        self.filename = filename
        self.problems: list[tuple[Place, str]] = []
        self.places: dict[Path, tuple[Place, Place]] = {}  # of key and value; down to what the checks can name
        self.refused: set[Path] = set()  # values replaced by null: what the checks say about them is not news
        self.values = 0

    def add(self, path: Path, what: str, place: Place | None = None, *, at_key: bool = False) -> None:
        if place is None and any(path[:length] in self.refused for length in range(len(path) + 1)):
            return
        line, column = place or self.place(path, at_key=at_key)
        where = "".join(f"[{part}]" if isinstance(part, int) else f".{_safe(part)}" for part in path)
        what = what if len(what) <= 500 else f"{what[:300]} … {what[-150:]}"
        text = f"{self.filename}:{line}:{column}: {where.removeprefix('.') or 'file'}: {what}"
        self.problems.append(((line, column), text))

    def check(self, path: Path, check: Callable[..., object], *values: Any) -> None:
        try:
            _named(str(path[0]), check, *values)
        except ValueError as error:
            self.add(path, str(error), at_key=True)

    def place(self, path: Path, *, at_key: bool = False) -> Place:
        while path not in self.places and path:
            path = path[:-1]
        return self.places.get(path, ((1, 1), (1, 1)))[0 if at_key else 1]

    def stop(self, path: Path, what: str, place: Place) -> NoReturn:
        self.add(path, what, place)
        self.give_up()

    def give_up(self) -> NoReturn:
        raise GroupFileError([text for _, text in sorted(self.problems)])

    def read(self, text: str | bytes) -> Any:
        self.parser = _Loader(self._decoded(text))
        self.end = (1, 1)
        self._next()
        if type(self._next()) is yaml.StreamEndEvent:
            self.stop((), "it is empty; start with name: and tasks:", (1, 1))
        event = self._next()
        self.places[()] = _place(event), _place(event)
        value = self._value(event, ())
        self._next()
        if type(event := self._next()) is not yaml.StreamEndEvent:
            self.add((), "a second document starts here; give each group a file of its own", _place(event))
        return value

    def _decoded(self, text: str | bytes) -> str:
        size = len(text if isinstance(text, bytes) else text.encode("utf-8", "surrogatepass"))
        if size > MAX_BYTES:
            self.stop((), f"{size:,} bytes, more than {MAX_BYTES:,}; split it into several groups", (1, 1))
        decoded = text.decode("utf-8", "surrogateescape") if isinstance(text, bytes) else text
        decoded = decoded.removeprefix("\ufeff")
        if found := _FORBIDDEN.search(decoded):
            before, code = decoded[: found.start()], ord(found[0])
            what = f'character U+{code:04X} is not allowed; remove it, or write "\\u{code:04x}" in double quotes'
            if 0xD800 <= code <= 0xDFFF:
                what = "this is not UTF-8 text; save the file as UTF-8"
            self.stop((), what, (before.count("\n") + 1, len(before) - before.rfind("\n")))
        if decoded.lstrip().startswith("{") and _SURROGATES.search(decoded) and _is_json(decoded):
            # JSON's \ud83d\ude00 is refused by YAML. The filler keeps the columns right until `_text` drops it.
            decoded = _SURROGATES.sub(
                lambda pair: bytes.fromhex(pair[1] + pair[2]).decode("utf-16-be") + 11 * _FILLER, decoded
            )
        return decoded

    def _next(self) -> Any:
        try:
            event = self.parser.get_event()
        except (yaml.MarkedYAMLError, ValueError) as error:  # ValueError: the pure Python scanner, on "\Uffffffff"
            mark, problem = getattr(error, "problem_mark", None), getattr(error, "problem", None) or str(error)
            context = f" ({error.context})" if getattr(error, "context", None) else ""
            remedy = next((say for key, say in _SYNTAX_REMEDIES.items() if key in problem), "correct it")
            place = (mark.line + 1, mark.column + 1) if mark else self.end
            self.stop((), f"syntax: {problem}{context}; {remedy}", place)
        self.end = (event.end_mark.line + 1, event.end_mark.column + 1)
        return event

    def _value(self, event: Any, path: Path) -> Any:
        self.values += 1
        if self.values > MAX_VALUES:
            self.stop((), f"more than {MAX_VALUES:,} values; split it into several groups", _place(event))
        kind = type(event)
        if kind is yaml.AliasEvent:
            return self._refuse(event, path, f"*{event.anchor} is an alias; write the value itself, or use defaults")
        self._check_marks(event, path)
        if kind is yaml.ScalarEvent:
            return self._scalar(event, path)
        if len(path) >= MAX_DEPTH:
            self.stop(path[:4], f"nested more than {MAX_DEPTH} deep; make it flatter", _place(event))
        if kind is yaml.MappingStartEvent:
            return self._mapping(path)
        items: list[Any] = []
        while type(event := self._next()) is not yaml.SequenceEndEvent:
            items.append(self._item(event, event, (*path, len(items))))
        return items

    def _mapping(self, path: Path) -> dict[str, Any]:
        items: dict[str, Any] = {}
        while type(key_event := self._next()) is not yaml.MappingEndEvent:
            if type(key_event) is not yaml.ScalarEvent:
                self._refuse(key_event, path, "a key must be text; write one word before the colon")
                self._value(key_event, path)
                self._value(self._next(), path)
                continue
            self._check_marks(key_event, path)
            key = self._text(key_event, path)
            item = (*path, key)
            if key in items:
                self.add(item, "duplicate key; keep one of them", _place(key_event))
            items[key] = self._item(key_event, self._next(), item)
        return items

    def _item(self, key_event: Any, event: Any, path: Path) -> Any:
        if len(path) <= 4:  # further in are arguments and metadata: only the loader has a word on them
            self.places[path] = _place(key_event), _place(event)
        return self._value(event, path)

    def _scalar(self, event: Any, path: Path) -> Any:
        text: str = event.value
        if not event.implicit[0]:  # it is quoted
            return self._text(event, path)
        if len(text) <= 5 and (word := text.lower()) in _WORDS:
            return _WORDS[word]
        if _NOT_FINITE.fullmatch(text):
            return self._refuse(event, path, f"{text} is no number in JSON; leave it out, or quote it if it is text")
        if number := _NUMBER.fullmatch(text):
            value = math.inf if len(text) > 300 else float(text) if number[1] or number[2] else int(text)
            if math.isfinite(value):
                return value
            return self._refuse(event, path, f"the number {text[:20]}… is too large; quote it if it is text")
        return self._text(event, path)

    def _text(self, event: Any, path: Path) -> str:
        text: str = event.value if event.value.isascii() else event.value.replace(_FILLER, "")
        if not text.isascii() and _FORBIDDEN.search(text) and ...:
            self._refuse(event, path, "")
        return text

    def _check_marks(self, event: Any, path: Path) -> None:
        if event.anchor is not None:
            self.add(path, f"&{event.anchor} is an anchor; remove it", _place(event))
        if event.tag is not None:
            self._refuse(event, path, f"{event.tag} is a tag; remove it, and quote the value if it is text")

    def _refuse(self, event: Any, path: Path, what: str) -> None:
        self.add(path, what, _place(event))
        self.refused.add(path)
