"""
Reads one group from YAML or JSON text into a `TaskGroup`, or says everything that is wrong with it and where.

A file is foreign text, so its values are built here from the parser's events: no aliases, tags or duplicate keys,
bounded size and depth, and of YAML's guesses only null, true, false and JSON's numbers. JSON is read as YAML.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterable
from contextlib import suppress
from difflib import get_close_matches
from typing import Annotated, Any, NoReturn

import yaml
from pydantic import AfterValidator, BaseModel, BeforeValidator, Field, SkipValidation, ValidationError
from pydantic_core import ErrorDetails, from_json

from rq_ceylon import goals, graph, models
from rq_ceylon.errors import GroupFileError, InvalidInputError
from rq_ceylon.models import Goal, GoalPolicy, Priority, Task, TaskGroup

MAX_BYTES = 16 * 2**20
MAX_DEPTH = 20
MAX_VALUES = 2_000_000  # bounds memory: 16 MiB of `[0,0,0,...` would be eight million values
Path = tuple[str | int, ...]


def load(text: str | bytes, filename: str) -> TaskGroup:
    """
    Read a group from the text of a YAML or JSON file; `filename` is only what the problems are prefixed with.

    Raises:
        GroupFileError: with all problems, in the order of the file. Only bad syntax and limits end the search early.
    """
    file = _File(filename)
    data = file.read(text)
    group = _shape(file, GroupFields, data, ())
    parts = data if isinstance(data, dict) else {}
    defaults = _shape(file, DefaultFields, parts.get("defaults"), ("defaults",))
    tasks, goal = _tasks(file, parts.get("tasks")), _goals(file, parts.get("goal"))
    if file.problems:
        file.give_up()
    return TaskGroup(**(dict(group) | {"tasks": tasks, "goal": goal, "defaults": Task(**dict(defaults))}))


def _tasks(file: _File, data: Any) -> list[Task]:
    if not data or not isinstance(data, dict | list):
        if data is not None:  # else the group's shape reports it
            file.add(("tasks",), f"{_shown(data)} where tasks are needed; write one per key, or a list of them")
        return []
    tasks: list[Task] = []
    paths: dict[str, Path] = {}  # by id; a task without one gets a stand-in that nobody can need
    needs: dict[str, list[str]] = {}
    for at, (key, value) in enumerate(data.items() if isinstance(data, dict) else ((None, value) for value in data)):
        path: Path = ("tasks", at if key is None else key)
        fields = _shape(file, ListedTask if key is None else TaskFields, value, path)
        task_id = getattr(fields, "id", None) if key is None else key
        if key is not None:
            file.check(path, models.check_id, key, "id")
        elif task_id in paths:
            file.add((*path, "id"), f"{task_id!r} is also the id of tasks[{paths[task_id][1]}]; give another")
        name = task_id or f"#{at}"
        paths[name], needs[name] = path, fields.needs if fields else []
        if fields:
            tasks.append(Task(**(dict(fields) | {"id": task_id})))
    for name, others in needs.items():
        for at, other in enumerate(others):
            if other == name:
                file.add((*paths[name], "needs", at), "it needs itself; remove it from its needs")
            elif other not in paths:
                known = paths if len(file.problems) < 10 else ()  # a guess is slow among many ids
                guess = _guess(other, known, "name a task of this group")
                file.add((*paths[name], "needs", at), f"no task has the id {other!r}; {guess}")
        needs[name] = [other for other in others if other in paths and other != name]
    file.check(("tasks",), graph.in_order, needs, "tasks")
    return tasks


def _goals(file: _File, data: Any) -> list[Goal]:
    found: list[Goal] = []
    for at, value in enumerate(data if isinstance(data, list) else [] if data is None else [data]):
        path: Path = ("goal", at) if isinstance(data, list) else ("goal",)
        fields = _shape(file, GoalFields, {"when": value} if isinstance(value, str) else value, path)
        if fields and file.check(path, goals.compile_goals, [*found, Goal(**dict(fields))]):
            found.append(Goal(**dict(fields)))
    return found


# The shape: what each mapping may hold. Checks say "it: " before what is wrong; the report gives the path instead.


def _seconds(value: Any) -> float:
    if isinstance(value, str) and (clock := re.fullmatch(r"([0-9]{1,6}):([0-9]{2})", value)):
        minutes, rest = int(clock[1]), int(clock[2])
        raise InvalidInputError(f"it: {value!r} is not a duration; write {minutes * 60 + rest}s or {minutes}m{rest}s")
    return models.seconds(value, "it")


Name = Annotated[str, AfterValidator(lambda text: models.check_id(text, "it"))]
TaskId = Annotated[Name, BeforeValidator(lambda value: str(value) if type(value) is int else value)]  # as keys are
Needs = Annotated[list[TaskId], BeforeValidator(lambda value: value if isinstance(value, list) else [value])]
Expression = Annotated[str, AfterValidator(lambda text: goals.parse(text, "it").text)]
Seconds = Annotated[float, BeforeValidator(_seconds, json_schema_input_type=float | str)]
Level = Annotated[Priority, Field(strict=False)]


class DefaultFields(BaseModel, extra="forbid", strict=True):
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
    arguments: dict[str, Any] = Field({}, alias="with")
    needs: Annotated[Needs, Field(max_length=graph.MAX_NEEDS)] = []


class ListedTask(TaskFields):
    id: TaskId | None = None


class GoalFields(BaseModel, extra="forbid", strict=True):
    when: Expression | None = None
    call: Name | None = None
    name: Name | None = None
    deadline: Annotated[Seconds, Field(gt=0)] | None = None
    fail_when: Expression | None = None
    on_achieved: GoalPolicy = "continue"
    on_failed: GoalPolicy = "continue"
    success_message: str | None = None
    failure_message: str | None = None


class GroupFields(BaseModel, extra="forbid", strict=True):
    name: Annotated[str, Field(min_length=1, max_length=200)]
    description: str = ""
    key: Annotated[str, Field(min_length=1)] | None = None
    priority: Level | None = None
    retention: Seconds = models.DEFAULT_RETENTION_S
    defaults: SkipValidation[DefaultFields | None] = None
    tasks: SkipValidation[dict[str, TaskFields | None] | list[ListedTask | None]]
    goal: SkipValidation[str | GoalFields | list[str | GoalFields] | None] = None


def _shape(file: _File, model: type[BaseModel], data: Any, path: Path) -> Any:
    if not isinstance(data, dict | None):
        file.add(path, f"{_shown(data)} where a mapping is needed; write key: value")
        return None
    keys = [field.alias or name for name, field in model.model_fields.items()]
    try:  # a known key with nothing behind it counts as not given
        return model.model_validate({k: v for k, v in (data or {}).items() if v is not None or k not in keys})
    except ValidationError as error:
        for problem in error.errors(include_url=False):
            file.add((*path, *problem["loc"]), _explained(problem, keys), at_key=problem["type"] == "extra_forbidden")
    return None


def _explained(problem: ErrorDetails, keys: list[str]) -> str:
    given, context = problem["input"], problem.get("ctx", {})
    match problem["type"]:
        case "extra_forbidden":
            return f"unknown key; {_guess(problem['loc'][-1], keys, 'use one of ' + ', '.join(keys))}"
        case "missing":
            return "missing; add it"
        case "value_error":
            return str(context["error"]).partition(": ")[2]
        case "enum" | "literal_error":
            options = str(context["expected"]).replace("'", "")
            return f"{_shown(given)} is not known here; {_guess(given, re.split(', | or ', options), f'use {options}')}"
        case "string_type":
            return f"{_shown(given)} where text is needed; write text, in quotes"
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
}


class _File:
    """
    One file: reads it, knows where each value stands, and collects the problems, its own and those of the checks.
    Built on events: six times faster than `yaml.compose`, which also hides anchors and recurses without a limit.
    """

    def __init__(self, filename: str) -> None:
        self.filename = filename
        self.problems: list[tuple[int, int, str]] = []
        self.start: Any = yaml.Mark("", 0, 0, 0, None, 0)
        self.marks: dict[Path, tuple[Any, Any]] = {(): (self.start, self.start)}  # of keys and values
        self.refused: set[Path] = set()  # whatever the checks say about these is only a consequence
        self.values = 0

    def add(self, path: Path, what: str, mark: Any = None, *, at_key: bool = False) -> None:
        if self.refused and not mark and any(path[:end] in self.refused for end in range(len(path) + 1)):
            return
        known = next(path[:end] for end in range(len(path), -1, -1) if path[:end] in self.marks)
        mark = mark or self.marks[known][0 if at_key else 1]
        plain = models.ID_PATTERN.fullmatch
        where = "".join(f".{p}" if isinstance(p, str) and plain(p) else f"[{p!r:.64}]" for p in path) or "file"
        what = what if what.isprintable() else repr(what)[1:-1]  # it must neither forge a line nor steer a terminal
        what = what if len(what) <= 400 else f"{what[:100]} … {what[-100:]}"
        place = f"{self.filename}:{mark.line + 1}:{mark.column + 1}"
        self.problems.append((mark.line, mark.column, f"{place}: {where.removeprefix('.')}: {what}"))

    def check(self, path: Path, check: Callable[..., object], *values: Any) -> bool:
        try:
            check(*values)
        except InvalidInputError as error:
            self.add(path, str(error).partition(": ")[2], at_key=True)
            return False
        return True

    def give_up(self) -> NoReturn:
        raise GroupFileError([text for _, _, text in sorted(self.problems)])

    def stop(self, path: Path, what: str, mark: Any) -> NoReturn:
        self.add(path, what, mark)
        self.give_up()

    def read(self, text: str | bytes) -> Any:
        self.parser = _Loader(self._decoded(text))
        self._next()
        if type(self._next()) is yaml.StreamEndEvent:
            self.stop((), "it is empty; start with name: and tasks:", self.start)
        value = self._value(event := self._next(), event.start_mark, ())
        self._next()
        if type(event := self._next()) is not yaml.StreamEndEvent:
            self.add((), "a second document starts here; give each group a file of its own", event.start_mark)
        return value

    def _decoded(self, text: str | bytes) -> str:
        data = text if isinstance(text, bytes) else text.encode("utf-8", "surrogatepass")
        if len(data) > MAX_BYTES:
            self.stop((), f"{len(data):,} bytes, more than {MAX_BYTES:,}; split it into several groups", self.start)
        decoded = data.decode("utf-8", "surrogateescape").removeprefix("\ufeff")
        if found := _FORBIDDEN.search(decoded):
            before, code = decoded[: found.start()], ord(found[0])
            mark = yaml.Mark("", 0, before.count("\n"), len(before) - before.rfind("\n") - 1, None, 0)
            if 0xDC80 <= code <= 0xDCFF:  # as surrogateescape writes it
                self.stop((), f"the byte 0x{code - 0xDC00:02X} is not UTF-8; save the file as UTF-8", mark)
            self.stop((), f"the character U+{code:04X} is not allowed; remove it", mark)
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
            self.stop((), f"{problem}; {remedy}", getattr(error, "problem_mark", None) or self.start)

    def _value(self, event: Any, key_mark: Any, path: Path) -> Any:
        self.values += 1
        if self.values > MAX_VALUES:
            self.stop((), f"more than {MAX_VALUES:,} values; split it into several groups", event.start_mark)
        if len(path) <= 4:  # further in are only arguments and metadata, which no check looks into
            self.marks[path] = key_mark, event.start_mark
        if type(event) is yaml.AliasEvent:
            return self._refuse(event, path, f"*{event.anchor} is an alias; write the value itself, or use defaults")
        self._check_marks(event, path)
        if type(event) is yaml.ScalarEvent:
            return self._scalar(event, path)
        if len(path) >= MAX_DEPTH:
            self.stop(path[:4], f"nested more than {MAX_DEPTH} deep; make it flatter", event.start_mark)
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
                self.stop(path, "a key must be text; write one word before the colon", event.start_mark)
            self._check_marks(event, path)
            key = self._text(event, path)
            if key in items:
                self.add((*path, key), "duplicate key; keep one of them", event.start_mark)
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
            self.add(path, f"&{event.anchor} is an anchor; remove it", event.start_mark)
        if event.tag is not None:
            self._refuse(event, path, f"{event.tag} is a tag; remove it, and quote the value if it is text")

    def _refuse(self, event: Any, path: Path, what: str) -> None:
        self.add(path, what, event.start_mark)
        self.refused.add(path)
