"""`ceylon failures`."""

from __future__ import annotations

import re
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING

import click

from rq_ceylon.cli.common import say, table, with_client
from rq_ceylon.cli.facts import task_facts, to_json
from rq_ceylon.log import plain
from rq_ceylon.models import counted

if TYPE_CHECKING:
    from rq_ceylon.client import Client
    from rq_ceylon.views import TaskView

KINDS = 20
"""How many kinds of failures are shown unless another number is asked for."""


@dataclass
class _Kind:
    """Failures of one function in one role whose errors differ in numbers only. `last` failed last."""

    count: int
    last: TaskView


@click.command()
@click.option("--group", metavar="GROUP", help="Only tasks of this group.")
@click.option("--role", metavar="ROLE", help="Only tasks of this role.")
@click.option("--name", metavar="NAME", help="Only tasks of this function.")
@click.option("--error", metavar="TEXT", help="Only tasks whose error, as 'type: message', contains this text.")
@click.option("--since", metavar="DURATION", help="Only tasks that failed within this time, such as 30m or 2d.")
@click.option("--limit", type=click.IntRange(1), default=KINDS, show_default=True, help="Show this many kinds at most.")
@click.option("--json", is_flag=True, help="Print each failed task as a line of JSON.")
@with_client
async def failures(
    client: Client,
    group: str | None,
    role: str | None,
    name: str | None,
    error: str | None,
    since: str | None,
    limit: int,
    json: bool,
) -> None:
    """
    Show which tasks failed, and why.

    It looks at all groups that are still kept. Failures of one function that differ in numbers only are one line, the
    most frequent first; LAST is when the latest of them failed, and TASK is that one.

    \b
    Examples:
      ceylon failures --since 1h
      ceylon failures --role gpu --error "out of memory"
      ceylon failures --json | jq .id
    """
    kinds: dict[tuple[str, ...], _Kind] = {}
    async for task in client.failures(group=group, role=role, name=name, error=error, since=since):
        if json:
            click.echo(to_json(task_facts(task)))
            continue
        kind = kinds.setdefault((task.role, task.uses, task.reason, _shape(_words(task))), _Kind(0, task))
        kind.count += 1
        kind.last = max(kind.last, task, key=_ended_ms)
    if json:
        return
    shown = sorted(kinds.values(), key=lambda kind: (-kind.count, -_ended_ms(kind.last)))[:limit]
    table(
        ("FAILED", "LAST", "ROLE", "FUNCTION", "REASON", "ERROR", "TASK"),
        [
            (
                kind.count,
                time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(_ended_ms(kind.last) / 1000)),
                kind.last.role,
                kind.last.uses or "-",
                kind.last.reason,
                _short(_words(kind.last)),
                kind.last.id,
            )
            for kind in shown
        ],
    )
    if len(kinds) > len(shown):
        say(f"and {counted(len(kinds) - len(shown), 'more kind')}; --limit shows more")


def _words(task: TaskView) -> str:
    error = (task.result and task.result.error) or {"type": "", "message": ""}
    return ": ".join(filter(None, (error["type"], error["message"])))


def _shape(words: str) -> str:
    """The words without what differs from one task to the next: numbers, also hexadecimal ones of some length."""
    return re.sub(r"0x[0-9a-fA-F]+|[0-9a-f]{8,}|[0-9]+", "#", words)


def _short(words: str) -> str:
    words = plain(words, keep="")
    return words if len(words) <= 60 else words[:57] + "..."


def _ended_ms(task: TaskView) -> int:
    return (task.result and task.result.ended_ms) or 0
