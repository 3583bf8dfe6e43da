"""
What each mapping of a group file may hold, and the words for what it may not. `group.schema.json` is the same for
editors.
"""

from __future__ import annotations

import re
from collections.abc import Collection
from difflib import get_close_matches
from typing import Annotated, Any

from pydantic import AfterValidator, BaseModel, BeforeValidator, Field, SkipValidation, ValidationError
from pydantic_core import ErrorDetails

from rq_ceylon import goals, graph, models
from rq_ceylon.errors import InvalidInputError
from rq_ceylon.groupfile.reader import Document, Path
from rq_ceylon.models import GoalPolicy, Priority

# Checks say "it: " before what is wrong; the report gives the path instead.


def _seconds(value: Any) -> float:
    if isinstance(value, str) and (clock := re.fullmatch(r"([0-9]{1,6}):([0-9]{2})", value)):
        minutes, rest = int(clock[1]), int(clock[2])
        raise InvalidInputError(f"it: {value!r} is not a duration; write {minutes * 60 + rest}s or {minutes}m{rest}s")
    return models.seconds(value, "it")


def _listed(value: Any) -> Any:
    return value if isinstance(value, list) else [value]


Name = Annotated[str, AfterValidator(lambda text: models.check_id(text, "it"))]
TaskId = Annotated[Name, BeforeValidator(lambda value: str(value) if type(value) is int else value)]  # as keys are
Needs = Annotated[list[TaskId], BeforeValidator(_listed)]
Groups = Annotated[list[str], BeforeValidator(_listed)]
Expression = Annotated[str, AfterValidator(lambda text: goals.parse(text, "it").text)]
Seconds = Annotated[float, BeforeValidator(_seconds)]
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
    matrix: SkipValidation[dict[str, Any] | None] = None


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
    depends_on: Annotated[Groups, Field(max_length=models.DEPENDS_ON_MAX)] = []
    on_need_failed: models.NeedPolicy = "skip"


def shape(document: Document, model: type[BaseModel], data: Any, path: Path) -> Any:
    """
    The checked fields of a mapping; None, and the problems are noted, if it cannot be used.
    """
    if not isinstance(data, dict | None):
        document.add(path, f"{shown(data)} where a mapping is needed; write key: value")
        return None
    keys = [field.alias or name for name, field in model.model_fields.items()]
    try:  # a known key with nothing behind it counts as not given
        return model.model_validate({k: v for k, v in (data or {}).items() if v is not None or k not in keys})
    except ValidationError as error:
        for problem in error.errors(include_url=False):
            at_key = problem["type"] == "extra_forbidden"
            document.add((*path, *problem["loc"]), _explained(problem, keys), at_key=at_key)
    return None


def _explained(problem: ErrorDetails, keys: list[str]) -> str:
    given, context = problem["input"], problem.get("ctx", {})
    match problem["type"]:
        case "extra_forbidden":
            return f"unknown key; {guess(problem['loc'][-1], keys, 'use one of ' + ', '.join(keys))}"
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


def guess(word: object, options: Collection[str], otherwise: str) -> str:
    forms = dict.fromkeys((word, word.lower())) if isinstance(word, str) and len(word) <= 64 else ()
    near = [found for form in forms for found in get_close_matches(form, options, 1)]
    return f'did you mean "{near[0]}"?' if near else otherwise


def shown(value: object) -> str:
    if value is None:
        return "nothing"
    if isinstance(value, dict | list):
        return ("a" if value else "an empty") + (" mapping" if isinstance(value, dict) else " list")
    return str(value).lower() if isinstance(value, bool) else repr(value)
