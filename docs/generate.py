"""
Writes the reference pages in docs from the code: `python -m docs.generate`. With `--check` it writes nothing, and ends
with 1 if one of them is not what the code says.
"""

from __future__ import annotations

import importlib
import inspect
import re
import sys
import textwrap
from collections.abc import Callable, Iterator, Sequence
from enum import Enum
from functools import cached_property
from pathlib import Path
from types import FunctionType
from typing import Any, ForwardRef, get_overloads

import click

import rq_ceylon
from rq_ceylon import cli
from rq_ceylon.groupfile import json_schema, reader
from rq_ceylon.groupfile.matrix import MAX_COMBINATIONS
from rq_ceylon.groupfile.shape import KINDS
from rq_ceylon.groupfile.tasks import MAX_WRITTEN, NEED_COST
from rq_ceylon.models import DEFAULTS_BYTES_MAX, PAYLOAD_BYTES_MAX

HERE = Path(__file__).parent
MADE = "<!-- Made by `python -m docs.generate` from the code. Change it there. -->\n"
WIDTH = 100

SECTIONS = {
    "The application": "app.AppTask app.Ceylon",
    "Clients": "client.Client client.TaskHandle client.GroupHandle client.SyncClient client.SyncTaskHandle "
    "client.SyncGroupHandle",
    "Tasks, groups and goals": "models.Task models.TaskGroup models.Dependency models.Goal models.Priority",
    "In a handler": "attempt.TaskContext attempt.RetryTask attempt.FailTask attempt.Backoff",
    "How things stand": "models.TaskStatus models.GroupStatus models.GoalStatus views.GroupView views.Counters "
    "views.GoalView* views.Settled* views.TaskView views.TaskResult views.AttemptError* "
    "views.RoleView* views.WorkerView* "
    "store.events.Event* store.events.TaskEvent*",
    "Workers and monitors": "worker.Worker monitor.Monitor",
    "Errors": "errors.CeylonError errors.InvalidInputError errors.PayloadTooLargeError errors.GoalImpossibleError "
    "errors.GroupExistsError errors.NotFoundError errors.GroupFileError errors.UnknownTaskError errors.RedisError "
    "errors.ConnectionLostError errors.QueueFullError errors.DurabilityError errors.AppImportError "
    "errors.WaitTimeoutError errors.NoWorkerError errors.TaskFailedError errors.TaskCancelledError",
    "The tutorial's words": "task.playground.TaskPlayGround task.agent.TaskExecutionAgent task.manager.TaskManager "
    "task.data.TaskMessage task.data.TaskGroupGoal task.data.TaskGroup*",
}
"""Where each public name stands. With a star: not under rq_ceylon itself, but given by what is."""


# ---- commands --------------------------------------------------------------------------------------------------------
def commands() -> str:
    text = [
        f"{MADE}\n# Commands\n",
        _filled(
            "The `--help` of each command, and the environment variables that stand for its options. "
            "[Deployment](deployment.md) describes exit codes, signals and the variables that all commands share."
        ),
    ]
    for command in (cli.worker, cli.submit, cli.monitor):
        text += _command(command, click.Context(command, info_name=command.name, **_settings(command)))
    group = click.Context(cli.ceylon, info_name="ceylon", **_settings(cli.ceylon))
    text += _command(cli.ceylon, group)
    for name, command in cli.ceylon.commands.items():
        text += _command(command, click.Context(command, info_name=name, parent=group, **_settings(command)))
    return "\n".join(text)


def _settings(command: click.Command) -> dict[str, Any]:
    return {**command.context_settings, "terminal_width": WIDTH}


def _command(command: click.Command, context: click.Context) -> Iterator[str]:
    formatter = context.make_formatter()
    command.format_usage(context, formatter)
    command.format_help_text(context, formatter)
    command.format_options(context, formatter)
    yield f"## {context.command_path}\n"
    yield _code(formatter.getvalue().rstrip())
    variables = [
        f"`{_variable(one, context)}` ({max(one.opts, key=len) if isinstance(one, click.Option) else one.metavar})"
        for one in command.params
        if one.envvar or (isinstance(one, click.Option) and one.expose_value)
    ]
    if variables:
        yield _filled(f"Variables: {', '.join(variables)}.")


def _variable(parameter: click.Parameter, context: click.Context) -> str:
    if isinstance(parameter.envvar, str):
        return parameter.envvar
    return f"{context.auto_envvar_prefix}_{parameter.name}".upper()


# ---- Python ----------------------------------------------------------------------------------------------------------
def python() -> str:
    text = [
        f"{MADE}\n# Python reference\n",
        _filled(
            "Import these names from `rq_ceylon`, unless they name another module. A `Duration` is a number of "
            "seconds, a `timedelta`, or text such as `30s`, `5m`, `1h30m`, `250ms`, `2d`."
        ),
    ]
    told = set()
    for section, places in SECTIONS.items():
        text.append(f"## {section}\n")
        for place in places.split():
            module, _, name = place.rstrip("*").rpartition(".")
            is_public = not place.endswith("*")
            if is_public:
                told.add(name)
            text += _class(getattr(importlib.import_module(f"rq_ceylon.{module}"), name), is_public)
    if missing := set(rq_ceylon.__all__) ^ told:
        raise SystemExit(f"SECTIONS and rq_ceylon.__all__ differ: {', '.join(sorted(missing))}")
    return "\n".join(text)


def _class(kind: type, is_public: bool) -> Iterator[str]:
    yield f"### {kind.__name__}\n"
    yield _code(*([] if is_public else [f"# in {_home(kind)}"]), *_head(kind))
    yield from _prose(kind.__doc__)
    for name, member in vars(kind).items():
        if name.startswith("_"):
            continue
        full = f"{kind.__name__}.{name}"
        if isinstance(member, property | cached_property):
            getter = member.func if isinstance(member, cached_property) else member.fget
            assert getter is not None
            shown = [f"{full}: {_annotation(inspect.signature(getter).return_annotation)}"]
        elif isinstance(member, FunctionType | staticmethod):
            function = member.__func__ if isinstance(member, staticmethod) else member
            word = "async " if inspect.iscoroutinefunction(function) else ""
            shown = [_call(word + full, way, bound=True) for way in get_overloads(function) or [function]]
        else:
            continue
        yield f"#### {full}\n"
        yield _code(*shown)
        yield from _prose(member.__doc__)


def _head(kind: type) -> Iterator[str]:
    """How one is made; of an enum its members, of an error what it is and ends a command with."""
    if not issubclass(kind, Enum | BaseException):
        yield _call(kind.__name__, kind)
        return
    yield f"class {kind.__name__}({kind.__mro__[1].__name__})"
    if issubclass(kind, Enum):
        yield from (f"    {one.name} = {one.value!r}" for one in kind)
    if "exit_code" in vars(kind):
        yield f"    exit_code = {vars(kind)['exit_code']}"
    if "__init__" in vars(kind):
        yield _call(kind.__name__, kind)


def _home(kind: type) -> str:
    """The shortest module that offers it."""
    return "rq_ceylon.task" if kind.__module__.startswith("rq_ceylon.task.") else kind.__module__


def _call(name: str, function: Callable[..., Any], *, bound: bool = False) -> str:
    signature = inspect.signature(function)
    parameters = list(signature.parameters.values())
    if bound and parameters and parameters[0].name == "self":
        parameters = parameters[1:]
    kinds = [one.kind for one in parameters]
    given: list[str] = []
    for index, one in enumerate(parameters):
        if one.kind is one.KEYWORD_ONLY and one.KEYWORD_ONLY not in kinds[:index] and one.VAR_POSITIONAL not in kinds:
            given.append("*")
        star = "*" if one.kind is one.VAR_POSITIONAL else "**" if one.kind is one.VAR_KEYWORD else ""
        type_ = "" if one.annotation is one.empty else f": {_annotation(one.annotation)}"
        default = "" if one.default is one.empty else f" = {_default(one.default)}"
        given.append(f"{star}{one.name}{type_}{default}")
        if one.kind is one.POSITIONAL_ONLY and one.POSITIONAL_ONLY not in kinds[index + 1 :]:
            given.append("/")
    returned = signature.return_annotation
    says_nothing = inspect.isclass(function) or returned in (signature.empty, None, "None")
    end = "" if says_nothing else f" -> {_annotation(returned)}"
    line = f"{name}({', '.join(given)}){end}"
    return line if len(line) <= WIDTH else "\n".join([f"{name}(", *(f"    {one}," for one in given), f"){end}"])


def _annotation(value: Any) -> str:
    if isinstance(value, ForwardRef):
        return value.__forward_arg__
    return value if isinstance(value, str) else inspect.formatannotation(value)


def _default(value: Any) -> str:
    if isinstance(value, Enum):
        return str(value)
    shown = repr(value)
    return "..." if shown.startswith("<") or "object at 0x" in shown else shown


def _prose(doc: str | None) -> Iterator[str]:
    """A docstring as Markdown: its sections as lists, its indented code as it is."""
    if not doc:
        return
    lines: list[str] = []
    in_section = False
    for line in inspect.cleandoc(doc).splitlines():
        if re.fullmatch(r"(Args|Attributes|Raises|Returns):", line):
            lines += [f"**{line}**", ""]
            in_section = True
        elif in_section and (item := re.fullmatch(r" {4}(\w[\w., ]*): (.*)", line)):
            lines.append(f"- `{item[1]}`: {item[2]}")
        elif in_section and line.startswith("    "):
            lines.append("  " + line.strip() if lines[-1] else line.strip())
        else:
            in_section = in_section and not line
            lines.append(line)
    yield "\n".join(lines) + "\n"


# ---- group files -----------------------------------------------------------------------------------------------------
def group_file() -> str:
    whole = json_schema.make()
    parts = whole["$defs"]
    few = [f"`{key}`" for key in parts["listed"]["properties"] if key not in parts["defaults"]["properties"]]
    text = [
        f"{MADE}\n# Group file reference\n",
        _filled(
            "The keys of a [group file](group-file.md): what each takes, and what applies if it is left out. A key "
            "without a value counts as left out. Any key that is not listed here is refused."
        ),
        "## A group\n",
        _keys(whole),
        "## A task\n",
        _filled(
            f"`defaults` takes all of these except {', '.join(few)}. In a task with a matrix, all of them except `id` "
            "and `matrix` may hold [look-ups](#look-up)."
        ),
        _keys(parts["listed"]),
        "## A goal\n",
        _keys(parts["goal"]),
        "## What keys take\n",
    ]
    for name in KINDS:
        text += [f"### {name}\n", _filled(parts[name]["description"])]
    text += [
        "## A file\n",
        _filled(
            f"A file may have at most {reader.MAX_BYTES // 2**20} MiB, {reader.MAX_VALUES:,} keys and values, "
            f"{reader.MAX_DOCUMENTS} groups, {MAX_WRITTEN:,} tasks as written, {MAX_COMBINATIONS:,} tasks made of "
            f"matrices, and {reader.MAX_DEPTH} levels. `defaults` may have {DEFAULTS_BYTES_MAX // 1024} KiB, a task "
            f"{PAYLOAD_BYTES_MAX // 2**20} MiB. Needs and fields with look-ups may take at most {reader.MAX_WORK:,} "
            f"checks of combinations, of which a need takes {NEED_COST}."
        ),
    ]
    return "\n".join(text)


def _keys(part: dict[str, Any]) -> str:
    rows = ["| key | takes | if left out | meaning |", "|---|---|---|---|"]
    for key, about in part["properties"].items():
        options = [one for one in about.get("anyOf", [about]) if one not in (json_schema.NULL, json_schema.LOOK_UP)]
        default = "needed" if key in part.get("required", ()) else _left_out(about.get("default"), options)
        meaning = about["description"].rstrip(".").replace("|", "\\|")
        rows.append(f"| `{key}` | {', or '.join(map(_takes, options))} | {default} | {meaning} |")
    return "\n".join(rows) + "\n"


def _left_out(default: Any, options: Sequence[Any]) -> str:
    if default is None:
        return ""
    is_hours = options[0].get("$ref") == "#/$defs/duration"
    default = str(default).lower() if isinstance(default, bool) else default
    return f"`{default / 3600:g}h`" if is_hours else f"`{default}`"


def _takes(option: dict[str, Any]) -> str:
    match option:
        case {"$ref": str(place)}:
            name = place.rpartition("/")[2]
            link = {"defaults": "some of [a task](#a-task)", "goal": "[a goal](#a-goal)"}.get(
                name, f"[{name}](#{name})"
            )
            return link + (", more than 0" if option.get("exclusiveMinimum") == 0 else "")
        case {"enum": values}:
            return ", ".join(f"`{one}`" for one in values)
        case {"type": "boolean"}:
            return "`true`, `false`"
        case {"const": value}:
            return f"`{value}`"
        case {"type": "array"}:
            return f"a list of up to {option['maxItems']}" if "maxItems" in option else "a list"
        case {"type": "object"}:
            return "a mapping"
        case {"type": "integer", "minimum": least}:
            return f"a whole number from {least}"
        case {"type": "string"}:
            least, most = option.get("minLength", 0), option.get("maxLength")
            if most:
                return f"text of {least} to {most:,} characters" if least else f"text of up to {most:,} characters"
            return "text, not empty" if least else "text"
    raise SystemExit(f"no words for {option}")


PAGES = {"commands.md": commands, "python.md": python, "group-file-reference.md": group_file}


def main() -> int:
    stale = [name for name, make in PAGES.items() if _read(HERE / name) != make()]
    if "--check" in sys.argv:
        for name in stale:
            print(f"docs/{name} is not what the code says; run: python -m docs.generate")
        return int(bool(stale))
    for name in stale:
        (HERE / name).write_text(PAGES[name](), "utf-8")
        print(f"docs/{name}")
    return 0


def _code(*lines: str) -> str:
    return "\n".join(["```text", *lines, "```", ""])


def _filled(text: str) -> str:
    return textwrap.fill(text, 120, break_on_hyphens=False, break_long_words=False) + "\n"


def _read(path: Path) -> str:
    return path.read_text("utf-8") if path.exists() else ""


if __name__ == "__main__":
    sys.exit(main())
