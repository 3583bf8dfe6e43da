"""
The fields that each mapping of a group file may have, and the messages about fields that it may not. `json_schema`
makes the same rules available to editors.

Fields are described in `models`, where users of Python read about them. Only fields that a file writes differently are
described here.
"""

from __future__ import annotations

import re
from typing import Annotated, Any, Literal, get_args

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    Field,
    SkipValidation,
    ValidationError,
    WithJsonSchema,
)
from pydantic_core import ErrorDetails

from rq_ceylon import expression, goals, graph, models
from rq_ceylon.errors import InvalidInputError, guess
from rq_ceylon.groupfile.matrix import AXIS, MAX_AXES, MAX_COMBINATIONS, MAX_LISTED
from rq_ceylon.groupfile.reader import Document, Path
from rq_ceylon.models import Priority

# A message of a check begins with "it: ", which the report replaces by the path.


def _seconds(value: Any) -> float:
    if isinstance(value, str) and (clock := re.fullmatch(r"([0-9]{1,6}):([0-9]{2})", value)):
        minutes, rest = int(clock[1]), int(clock[2])
        raise InvalidInputError(f"it: {value!r} is not a duration; write {minutes * 60 + rest}s or {minutes}m{rest}s")
    return models.seconds(value, "it")


def _listed(most: int, remedy: str) -> BeforeValidator:
    def check(value: Any) -> Any:
        listed = value if isinstance(value, list) else [value]
        if len(listed) > most:  # check before any value is read
            raise InvalidInputError(f"it: {len(listed):,} of them; {remedy}")
        return listed

    return BeforeValidator(check)


_COMBINATIONS = {
    "anyOf": [
        {"type": "array", "minItems": 1, "items": {"type": "object", "minProperties": 1}},
        {"type": "null"},
    ]
}
KINDS: dict[str, dict[str, Any]] = {
    "name": {
        "description": "1 to 64 letters, digits and `. _ : -`.",
        "type": "string",
        "pattern": f"^{models.ID_PATTERN.pattern}$",
    },
    "id": {
        "description": "Like a name; a whole number is taken as text.",
        "type": ["string", "integer"],
        "pattern": f"^{models.ID_PATTERN.pattern}$",
    },
    "duration": {
        "description": "Seconds, or text such as `250ms`, `30s`, `5m`, `1h30m`, `2d`; at most 10 years.",
        "type": ["number", "string"],
        "minimum": 0,
        "maximum": 10 * 365 * 86400,
        "pattern": r"^\s*([0-9]+(\.[0-9]+)?|([0-9]+(\.[0-9]+)?(ms|s|m|h|d))+)\s*$",
    },
    "expression": {
        "description": "A condition on the group's counters, such as `completed >= 95% and failed < 10`.",
        "type": "string",
        "minLength": 1,
        "maxLength": expression.MAX_CHARACTERS,
    },
    "priority": {
        "description": "`high`, `normal` or `low`: tasks of a higher priority run first within their role.",
        "enum": [level.value for level in Priority],
    },
    "policy": {
        "description": "What happens to the rest of the group. `continue`: it goes on. `drain`: running tasks finish, "
        "the others are cancelled. `cancel`: running tasks are stopped too.",
        "enum": list(get_args(models.GoalPolicy)),
    },
    "matrix": {
        "description": "One axis per key. An axis is a list of values, or `{range: [first, end, step]}`, where `end` "
        f"is not included. A matrix has at most {MAX_AXES} axes, a group at most {MAX_COMBINATIONS:,} tasks. The name "
        "of an axis consists of letters, digits, `_` and `-`, and does not begin with a digit or `-`. `exclude` "
        "removes combinations. `include` adds values to combinations, or adds combinations. A matrix with either of "
        f"them has at most {MAX_LISTED:,} combinations.",
        "type": "object",
        "minProperties": 1,
        "anyOf": [
            {"maxProperties": MAX_AXES},
            {"maxProperties": MAX_AXES + 1, "required": ["exclude"]},
            {"maxProperties": MAX_AXES + 1, "required": ["include"]},
            {"maxProperties": MAX_AXES + 2, "required": ["exclude", "include"]},
        ],
        "properties": {"exclude": _COMBINATIONS, "include": _COMBINATIONS},
        "propertyNames": {"pattern": f"^{AXIS}$"},
        "additionalProperties": {
            "anyOf": [
                {"type": "array", "minItems": 1},
                {
                    "type": "object",
                    "additionalProperties": False,
                    "required": ["range"],
                    "properties": {
                        "range": {"type": "array", "minItems": 2, "maxItems": 3, "items": {"type": "integer"}}
                    },
                },
            ]
        },
    },
    "look-up": {
        "description": "`${{ matrix.NAME }}` is the value of an axis of the task's matrix, also within a longer text.",
        "type": "string",
        "pattern": r"\$\{\{",
    },
}
"""The kinds of values that several fields share, as JSON Schema."""

REF = "$kind"
"""Stands for `$ref` to one of KINDS until `json_schema` replaces it, because pydantic accepts only its own
definitions."""


def _kind(name: str, **more: Any) -> WithJsonSchema:
    return WithJsonSchema({REF: name, **more})


def _listing(kind: str, most: int) -> WithJsonSchema:
    one = {REF: kind} if kind in KINDS else {"type": kind}
    return WithJsonSchema({"anyOf": [one, {"type": "array", "maxItems": most, "items": one}]})


Name = Annotated[str, AfterValidator(lambda text: models.check_id(text, "it")), _kind("name")]
TaskId = Annotated[  # a number is accepted as an id, just as it is as a key
    str,
    AfterValidator(lambda text: models.check_id(text, "it")),
    BeforeValidator(lambda value: str(value) if type(value) is int else value),
    _kind("id"),
]
Needs = Annotated[list[TaskId], _listed(graph.MAX_NEEDS, graph.FEWER_NEEDS), _listing("id", graph.MAX_NEEDS)]


def _dependency(value: Any) -> str | models.Dependency:
    if isinstance(value, str):
        return value
    if not isinstance(value, dict) or not isinstance(value.get("group"), str) or value.keys() - {"group", "when"}:
        raise InvalidInputError("it: not usable; write a group's name, or {group: NAME, when: failed}")
    return models.Dependency(value["group"], models.check_when(value.get("when", "completed"), "it"))


_DEPENDENCY = {
    "anyOf": [
        {"type": "string"},
        {
            "type": "object",
            "additionalProperties": False,
            "required": ["group"],
            "properties": {
                "group": {"type": "string"},
                "when": {"type": "string", "pattern": "^(completed|failed|finished|achieved:.+)$"},
            },
        },
    ]
}
Groups = Annotated[
    list[Annotated[str | models.Dependency, BeforeValidator(_dependency)]],
    _listed(models.DEPENDS_ON_MAX, f"a group may depend on {models.DEPENDS_ON_MAX}; put a group in between"),
    WithJsonSchema(
        {"anyOf": [*_DEPENDENCY["anyOf"], {"type": "array", "maxItems": models.DEPENDS_ON_MAX, "items": _DEPENDENCY}]}
    ),
]
Expression = Annotated[str, AfterValidator(lambda text: expression.parse(text, "it").text), _kind("expression")]
Seconds = Annotated[float, BeforeValidator(_seconds), _kind("duration")]
SomeSeconds = Annotated[Seconds, Field(gt=0), _kind("duration", exclusiveMinimum=0)]
Level = Annotated[Priority, Field(strict=False), _kind("priority")]
Policy = Annotated[models.GoalPolicy, _kind("policy")]
Message = Annotated[str, WithJsonSchema({"type": "string", "maxLength": goals.MAX_MESSAGE})]
Matrix = SkipValidation[Annotated[dict[str, Any], _kind("matrix")] | None]


def _else(default: Any) -> Any:
    """A field that may be missing. `default` is what the package uses if neither the group nor the handler sets it."""
    return Field(None, json_schema_extra={"default": default})


class DefaultFields(BaseModel, extra="forbid", strict=True):
    uses: Name | None = None
    role: Name | None = _else(models.DEFAULT_ROLE)
    duration: Seconds | None = None
    timeout: SomeSeconds | None = _else(models.DEFAULT_TIMEOUT_S)
    max_attempts: Annotated[int, Field(ge=1)] | None = _else(models.DEFAULT_MAX_ATTEMPTS)
    max_crashes: Annotated[int, Field(ge=0, le=models.CRASHES_MAX)] | None = _else(models.DEFAULT_MAX_CRASHES)
    priority: Level | None = None
    delay: Seconds | None = None
    expires: Seconds | None = None
    metadata: dict[str, Any] | None = None


class TaskFields(DefaultFields):
    arguments: dict[str, Any] = Field({}, alias="with")
    needs: Needs = Field(
        [], description="Tasks of this group that must complete first; a task with a matrix stands for all it makes."
    )
    matrix: Matrix = Field(None, description="Makes one task for each combination of the given values.")


class ListedTask(TaskFields):
    id: TaskId | None = Field(None, description="Unique in the group; default: a number. Only where `tasks` is a list.")


class GoalFields(BaseModel, extra="forbid", strict=True):
    when: Expression | None = None
    call: Name | None = None
    name: Name | None = None
    deadline: SomeSeconds | None = None
    fail_when: Expression | None = None
    on_achieved: Policy = "continue"
    on_failed: Policy = "continue"
    success_message: Message | None = None
    failure_message: Message | None = None


class GroupFields(BaseModel, extra="forbid", strict=True):
    name: Annotated[str, Field(min_length=1, max_length=200)]
    description: Annotated[str, Field(max_length=models.DESCRIPTION_MAX)] = ""
    key: Annotated[str, Field(min_length=1, max_length=models.KEY_MAX)] | None = None
    priority: Level | None = _else(Priority.NORMAL)
    retention: Seconds | None = _else(models.DEFAULT_RETENTION_S)
    defaults: SkipValidation[DefaultFields | None] = None
    tasks: SkipValidation[
        Annotated[
            dict[str, TaskFields | None],
            Field(min_length=1, json_schema_extra={"propertyNames": {REF: "name"}}),
        ]
        | Annotated[list[ListedTask | None], Field(min_length=1)]
    ] = Field(description="A mapping with one task per key, which is its id, or a list of tasks.")
    goal: SkipValidation[
        Expression | GoalFields | Annotated[list[Expression | GoalFields], Field(max_length=goals.MAX_GOALS)] | None
    ] = None
    depends_on: Groups = Field(
        [],
        description="Groups that must complete before this one starts: keys or names of groups further up in the file, "
        "or ids. `{group: NAME, when: W}` waits for something else: `failed`, `finished`, or `achieved:GOAL`. If that "
        "can no longer come, this one is cancelled.",
    )
    on_need_failed: models.NeedPolicy = "skip"
    max_running: Annotated[int, Field(ge=1, le=models.MAX_RUNNING_MAX)] | None = None
    dispatch: Literal["eager", "lazy"] = "eager"
    open: bool | Literal["until_idle"] = Field(
        False,
        description="Whether tasks may be added later (`ceylon add`): until the group is sealed (`ceylon seal`), or "
        "with `until_idle` until none of its tasks is open.",
    )
    open_timeout: SomeSeconds = Field(
        models.OPEN_TIMEOUT_S, description="An open group is sealed when no task was added for so long."
    )


def shape(document: Document, model: type[BaseModel], data: Any, path: Path) -> Any:
    """Check the fields of a mapping. Returns None if the mapping cannot be used; its problems are then reported."""
    if not isinstance(data, dict | None):
        document.add(path, f"{shown(data)} where a mapping is needed; write key: value")
        return None
    keys = [field.alias or name for name, field in model.model_fields.items()]
    given, unknown = data or {}, len(document.problems.found)
    for key in [key for key in given if key not in keys]:
        remedy = _ELSEWHERE.get(key) or guess(key, keys, "use one of " + ", ".join(keys))
        document.add((*path, key), f"unknown key; {remedy}", at_key=True)
    if len(document.problems.found) > unknown:
        given = {key: value for key, value in given.items() if key in keys}
    try:  # a known key without a value counts as missing
        made = model.model_validate({key: value for key, value in given.items() if value is not None})
        return made if len(document.problems.found) == unknown else None
    except ValidationError as error:
        for problem in error.errors(include_url=False):
            document.add((*path, *problem["loc"]), _explained(problem))
    return None


_ELSEWHERE = {
    "strategy": "write matrix: without it",
    "max-parallel": "write max_running: without strategy",
    "fail-fast": "write goal: {when: completed >= 100%, fail_when: failed > 0, on_failed: cancel}",
    "continue-on-error": "put such tasks into a group of their own, on which none depends",
}
_ELSEWHERE |= {name.replace("-", "_"): remedy for name, remedy in _ELSEWHERE.items()}
"""Keys of CI systems, and how to express them in a group file."""


def _explained(problem: ErrorDetails) -> str:
    given, context = problem["input"], problem.get("ctx", {})
    match problem["type"]:
        case "missing":
            return "missing; add it"
        case "value_error":
            return str(context["error"]).partition(": ")[2]
        case "enum" | "literal_error":
            options = str(context["expected"]).replace("'", "")
            return f"{shown(given)} is not known here; {guess(given, re.split(', | or ', options), f'use {options}')}"
        case "string_type":
            return f"{shown(given)} where text is needed; write text, in quotes"
        case _:
            return f"{shown(given)} is not usable; {problem['msg'][0].lower()}{problem['msg'][1:]}"


def shown(value: object) -> str:
    if value is None:
        return "nothing"
    if isinstance(value, dict | list):
        return ("a" if value else "an empty") + (" mapping" if isinstance(value, dict) else " list")
    return str(value).lower() if isinstance(value, bool) else repr(value)
