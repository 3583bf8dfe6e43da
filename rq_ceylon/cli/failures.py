"""`ceylon failures` and `ceylon retry`."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import click

from rq_ceylon.cli.common import clock, say, table, with_client
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


def which(function: Callable[..., Any]) -> Callable[..., Any]:
    """The options that choose among the failed tasks of all groups."""
    for option in reversed(
        (
            click.option("--role", metavar="ROLE", help="Only tasks of this role."),
            click.option("--name", metavar="NAME", help="Only tasks of this function."),
            click.option("--error", metavar="TEXT", help="Only tasks whose error, as 'type: message', has this text."),
            click.option(
                "--since", metavar="DURATION", help="Only tasks that failed within this time, such as 30m or 2d."
            ),
        )
    ):
        function = option(function)
    return function


@click.command()
@click.option("--group", metavar="GROUP", help="Only tasks of this group.")
@which
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
                clock(_ended_ms(kind.last)),
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


@click.command()
@click.argument("targets", metavar="[GROUP[/TASK]]...", nargs=-1)
@which
@click.option("--cancelled", is_flag=True, help="Of these groups, also the tasks that were cancelled.")
@click.option("--dry-run", is_flag=True, help="Only say how many tasks would run again.")
@click.option("-y", "--yes", is_flag=True, help="Do not ask.")
@with_client
async def retry(
    client: Client,
    targets: tuple[str, ...],
    role: str | None,
    name: str | None,
    error: str | None,
    since: str | None,
    cancelled: bool,
    dry_run: bool,
    yes: bool,
) -> int:
    """
    Run failed tasks again, of some groups or of all.

    Tasks that were skipped because of them run too, and so do those that were cancelled because a goal had failed. What
    has completed never runs again. A goal that failed is undecided again, unless it can still not be achieved; an
    achieved one stays achieved. Exit code 1 if nothing is to be retried.

    \b
    Examples:
      ceylon retry GROUP
      ceylon retry GROUP/7 GROUP/9
      ceylon retry --role gpu --error "out of memory" --since 2h
    """
    filters = {"role": role, "name": name, "error": error, "since": since}
    is_filtered = any(value is not None for value in filters.values())
    if not targets and not is_filtered:
        raise click.UsageError("give a GROUP, or one of --role, --name, --error and --since")
    if cancelled and (not targets or is_filtered):
        raise click.UsageError("--cancelled needs a GROUP, and no --role, --name, --error or --since")
    chosen = await _to_retry(client, targets, filters if is_filtered else None)
    count = sum(len(tids or ()) for tids in chosen.values())
    if is_filtered or dry_run:
        for gid, tids in chosen.items():
            known = await client.group(gid).view()
            failed = known.counters.failed if tids is None else len(tids)
            say(f"{gid} {known.name!r}: {counted(failed, 'failed task')}")
    if dry_run:
        return 0 if chosen else 1
    if is_filtered and chosen and not yes:
        click.confirm(f"Run {counted(count, 'task')} of {counted(len(chosen), 'group')} again?", abort=True, err=True)
    total = 0
    for gid, tids in chosen.items():
        again = await client.group(gid).retry(tids, cancelled=cancelled)
        total += again
        say(f"{gid}: {counted(again, 'task runs', 'tasks run')} again")
    if not total:
        say("nothing to retry", err=True)
    return 0 if total else 1


async def _to_retry(
    client: Client, targets: tuple[str, ...], filters: Mapping[str, str | None] | None
) -> dict[str, set[str] | None]:
    """The tasks to retry by group; None for all that failed. Each target is judged before anything is retried."""
    chosen: dict[str, set[str] | None] = {}
    for target in targets:
        gid, _, tid = target.partition("/")
        if tid:
            await client.task(target).view()
            known = chosen.setdefault(gid, set())
            if known is not None:
                known.add(tid)
        else:
            await client.group(gid).view()
            chosen[gid] = None
    if filters is None:
        return chosen
    found: dict[str, set[str] | None] = {}
    for group in chosen or (None,):
        async for task in client.failures(group=group, **filters):
            only = None if group is None else chosen[group]
            if only is None or task.task_id in only:
                tids = found.setdefault(task.group_id, set())
                assert tids is not None
                tids.add(task.task_id)
    return found


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
