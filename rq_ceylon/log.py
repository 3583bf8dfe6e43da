"""The log of a process: our messages and those of users' standard logging, on stderr, as text or JSON."""

from __future__ import annotations

import json
import logging
import os
import sys
import traceback
from contextlib import suppress
from typing import Any, Literal, NamedTuple

from loguru import logger

from rq_ceylon.errors import shown

Form = Literal["text", "json"]


class Setup(NamedTuple):
    """The level and the form of a process's log. Child processes use the same."""

    level: str
    form: Form


in_force: Setup | None = None
"""The arguments of the last call of `set_up`; None in a program that sets up its own log."""


def set_up(level: str, form: Form) -> None:
    """Log messages of at least this level. Messages of the standard library's `logging` go to the same log."""
    global in_force  # noqa: PLW0603 - a process has one log
    in_force = Setup(level, form)
    logger.remove()
    stream = sys.stderr

    def sink(message: Any) -> None:
        # Users' code may close the stream. Then the log is lost, but nothing else may be: without this, loguru would
        # raise the error in the code that logs, because it cannot report it anywhere.
        with suppress(OSError, ValueError):
            stream.write(_json_line(message.record) if form == "json" else message)
            stream.flush()

    # A traceback with the values of its variables could reveal secrets.
    text = "{message}" if form == "json" else _text_line
    # By itself, loguru checks only whether stderr is a terminal.
    colours = sys.stderr.isatty() and not os.environ.get("NO_COLOR") and os.environ.get("TERM") != "dumb"
    logger.add(sink, level=level.upper(), format=text, backtrace=False, diagnose=False, colorize=colours)
    logger.enable("rq_ceylon")
    logging.basicConfig(handlers=[_ToLoguru()], level=level.upper(), force=True)


class _ToLoguru(logging.Handler):
    def emit(self, record: logging.LogRecord) -> None:
        try:
            severity: str | int = logger.level(record.levelname).name
        except ValueError:
            severity = record.levelno
        # As in standard logging, a line that cannot be formatted must not raise in the code that logs it.
        message = shown(f"the message of {record.pathname}:{record.lineno}", record.getMessage)
        logger.bind(logger=record.name).opt(exception=record.exc_info).log(severity, "{}", message)


def _text_line(record: Any) -> str:
    """Format a record as one line, so foreign text cannot look like a second record; its traceback is indented."""
    lines = [plain(record["message"], keep="\t")]
    if trace := _traceback(record):
        lines += [f"    {plain(line, keep='')}" for line in trace.rstrip().split("\n")]
    record["extra"]["shown"] = "\n".join(lines)
    return "<green>{time:HH:mm:ss.SSS}</green> <level>{level: <7}</level> {extra[shown]}\n"


def _json_line(record: Any) -> str:
    from pydantic_core import to_json

    fields = {name: value for name, value in record["extra"].items() if name not in ("logger", "traceback")}
    facts = {
        "time": record["time"].isoformat(timespec="milliseconds"),
        "level": record["level"].name.lower(),
        "logger": record["extra"].get("logger", record["name"]),
        "message": record["message"],
    }
    if trace := _traceback(record):
        facts["exception"] = trace
    return plain_json(to_json({**fields, **facts}, fallback=repr).decode()) + "\n"


def _traceback(record: Any) -> str:
    """The traceback of the record's exception, or one that was raised elsewhere and is given as text."""
    if record["exception"] is not None:
        return shown("the traceback", lambda: "".join(traceback.format_exception(*record["exception"])))
    return str(record["extra"].get("traceback", ""))


def plain(text: str, *, keep: str = "\n\t") -> str:
    """Escape every character of a foreign text that could control a terminal, except those in `keep`."""
    if text.isprintable():
        return text
    return "".join(
        char if char.isprintable() or char in keep else char.encode("unicode_escape").decode() for char in text
    )


def plain_json(text: str) -> str:
    """Escape every character of a JSON text that could control a terminal; its value stays the same."""
    if text.isprintable():
        return text
    return "".join(char if char.isprintable() else json.dumps(char)[1:-1] for char in text)
