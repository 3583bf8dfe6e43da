"""Makes the JSON Schema of group files from `shape`, for editors and for the reference in the documentation."""

from __future__ import annotations

import inspect
import re
from typing import Any

from pydantic import BaseModel

from rq_ceylon import models
from rq_ceylon.groupfile.shape import KINDS, REF, GoalFields, GroupFields, ListedTask

NULL = {"type": "null"}
LOOK_UP = {"$ref": "#/$defs/look-up"}
_NAMES = {"DefaultFields": "defaults", "TaskFields": "task", "ListedTask": "listed", "GoalFields": "goal"}
_WITHOUT_LOOK_UPS = ("id", "matrix")


def make() -> dict[str, Any]:
    """Make the JSON Schema (draft 2020-12) of one document."""
    made = _named(GroupFields.model_json_schema())
    parts = made.pop("$defs")
    _complete(made, GroupFields, models.TaskGroup)
    for name in ("defaults", "task", "listed"):
        _complete(parts[name], ListedTask, models.Task, look_ups=name != "defaults")
    _complete(parts["goal"], GoalFields, models.Goal)
    return {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        "title": "Ceylon group file",
        **made,
        "$defs": parts | KINDS,
    }


def _named(schema: Any) -> Any:
    """
    The schema without the titles that pydantic derives from names, with our definitions, and with our names for its
    own.
    """
    match schema:
        case dict():
            kept = {key: one for key, one in schema.items() if not (key == "title" and isinstance(one, str))}
            refs = {"$ref": f"#/$defs/{kept.pop(REF)}"} if REF in kept else {}
            return refs | {_NAMES.get(key, key): _named(one) for key, one in kept.items()}
        case list():
            return [_named(one) for one in schema]
        case str() if schema.startswith("#/$defs/"):
            name = schema.removeprefix("#/$defs/")
            return f"#/$defs/{_NAMES.get(name, name)}"
    return schema


def _complete(schema: dict[str, Any], model: type[BaseModel], described: type, *, look_ups: bool = False) -> None:
    """Add what pydantic does not know: descriptions, that a key without a value counts as missing, and look-ups."""
    texts = _attributes(described)
    names = {field.alias or name: name for name, field in model.model_fields.items()}
    for key, field in schema["properties"].items():
        about = {"description": field.pop("description", None) or texts.get(names[key], "")}
        if (default := field.pop("default", None)) not in (None, "", [], {}):
            about["default"] = int(default) if isinstance(default, float) else default
        options = field.pop("anyOf", None) or [dict(field)]
        if look_ups and key not in _WITHOUT_LOOK_UPS:
            for option in options:
                if option.get("type") == "array":
                    option["items"] = {"anyOf": [option["items"], LOOK_UP]}
            options.append(LOOK_UP)
        if key not in schema.get("required", ()) and NULL not in options:
            options.append(NULL)
        schema["properties"][key] = about | ({"anyOf": options} if len(options) > 1 else options[0])


def _attributes(kind: type) -> dict[str, str]:
    """The descriptions of the attributes in the docstring of a class; empty if Python dropped the docstrings."""
    found: dict[str, str] = {}
    for name, text in re.findall(r"^    (\w+): (.*(?:\n {8}.*)*)", inspect.getdoc(kind) or "", re.MULTILINE):
        told = " ".join(text.split())
        found[name] = told[:1].upper() + told[1:]
    return found
