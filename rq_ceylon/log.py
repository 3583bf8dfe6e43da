"""The log of a process: ours and that of users' standard logging, to stderr, as text or as JSON."""

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
    """How much a process logs, and how. Child processes are set up alike."""

    level: str
    form: Form


in_force: Setup | None = None
"""What `set_up` was called with; None in a program that sets up a log of its own."""


def set_up(level: str, form: Form) -> None:
    """Log what is at least of this level. The log of the standard library goes the same way."""
    global in_force  # noqa: PLW0603 - a process has one log
    in_force = Setup(level, form)
    logger.remove()
    stream = sys.stderr

    def sink(message: Any) -> None:
        # Users' code may close the stream. The log is then lost, but nothing else: without this, loguru would raise
        # the error in the code that logs, since it cannot report it anywhere.
        with suppress(OSError, ValueError):
            stream.write(_json_line(message.record) if form == "json" else message)
            stream.flush()

    # A traceback with the values of its variables would tell secrets.
    text = "{message}" if form == "json" else _text_line
    # Loguru asks only whether it is a terminal.
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
        # As everywhere in the standard log, a line that cannot be made must not fail who wrote it.
        message = shown(f"the message of {record.pathname}:{record.lineno}", record.getMessage)
        logger.bind(logger=record.name).opt(exception=record.exc_info).log(severity, "{}", message)


def _text_line(record: Any) -> str:
    """A record is one line, so no foreign text can look like a second record; its traceback is indented."""
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
    """The traceback of the record: of its exception, or, as text, of one that was raised elsewhere."""
    if record["exception"] is not None:
        return shown("the traceback", lambda: "".join(traceback.format_exception(*record["exception"])))
    return str(record["extra"].get("traceback", ""))


def plain(text: str, *, keep: str = "\n\t") -> str:
    """Escape everything in a foreign text that could control a terminal, except the characters in `keep`."""
    if text.isprintable():
        return text
    return "".join(
        char if char.isprintable() or char in keep else char.encode("unicode_escape").decode() for char in text
    )


def plain_json(text: str) -> str:
    """JSON that shows the same, in which what could steer a terminal is escaped."""
    if text.isprintable():
        return text
    return "".join(char if char.isprintable() else json.dumps(char)[1:-1] for char in text)
