"""
`ceylon-submit`.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Sequence
from typing import TYPE_CHECKING, Literal

import click

from rq_ceylon.cli.common import RedisOptions, command, run_async, where
from rq_ceylon.cli.facts import group_facts, to_json
from rq_ceylon.cli.files import in_words, read_groups

if TYPE_CHECKING:
    from rq_ceylon.client import Client, GroupHandle
    from rq_ceylon.models import Durability, TaskGroup


@command("ceylon-submit")
@click.argument("file", metavar="FILE")
@click.option("--dry-run", is_flag=True, help="Check the file, send nothing.")
@click.option("--wait", "wait", flag_value="auto", is_flag=False, default=None, metavar="[=goal|all]",
              help="Wait: bare, for the goals, or without goals for all tasks.")  # fmt: skip
@click.option("--timeout", metavar="DURATION", help="Give up waiting after this; the group goes on.")
@click.option("--json", is_flag=True, help="Print JSON, a line for each group.")
@click.option("--require-workers", is_flag=True, help="Refuse if a role has no live worker.")
@click.option("--key", metavar="KEY", help="Submitting the same content again under a key changes nothing.")
@click.option("--durability", type=click.Choice(["none", "replica", "fsync"]), default="none", show_default=True,
              help="Wait until a replica has it, or until it is on the disk.")  # fmt: skip
@where
def submit(
    file: str,
    dry_run: bool,
    wait: str | None,
    timeout: str | None,
    json: bool,
    require_workers: bool,
    key: str | None,
    durability: Durability,
    options: RedisOptions,
) -> None:
    """
    Submit groups of tasks from a YAML or JSON file, one per document; - reads standard input.

    \b
    Examples:
      ceylon-submit examples/data_processing.yaml --wait=all
      generate-group | ceylon-submit - --key nightly-2026-11-24

    Prints the id of each group. With --wait a bar shows how far it is, with a mark at the goal; Ctrl-C stops watching,
    the group goes on.
    """
    from rq_ceylon.errors import InvalidInputError
    from rq_ceylon.models import seconds

    if wait not in (None, "auto", "goal", "all"):
        # `--wait FILE` would take the file for the value: say so, instead of "missing argument".
        raise InvalidInputError(f"--wait: {wait!r} is not known; write --wait, --wait=goal or --wait=all")
    limit = None if timeout is None else seconds(timeout, "--timeout")
    groups = read_groups(file)
    if key is not None:
        if not key:
            raise InvalidInputError(
                "--key: it is empty; give text that is the same for the same submission, or no --key"
            )
        if len(groups) > 1:
            raise InvalidInputError(f"--key: {file} has {len(groups)} groups; write key: into each of them instead")
        groups[0].key = key
    if dry_run or len(groups) > 1:
        words = in_words(groups)
    if dry_run:
        click.echo(f"{file}: valid: {words}; nothing was sent")
        return
    found = options.settings()

    async def send() -> int:
        from rq_ceylon.client import Client

        async with Client(found.redis_url, namespace=found.namespace) as client:
            handles = await _submit(
                client, groups, durability, require=require_workers, talk=not json, print_ids=wait is None
            )
            code, began = 0, time.monotonic()
            for handle in handles:
                view = await handle.view()
                if wait is not None:
                    from rq_ceylon.cli.live import follow

                    until: Literal["goal", "all"] = "all" if wait == "all" else "goal"
                    left = None if limit is None else max(0.0, round(limit - (time.monotonic() - began), 1))
                    view, one_code = await follow(client, handle, until, left, sys.stderr)
                    code = code or one_code
                if json:
                    click.echo(to_json({"schema": 1, **group_facts(view)}))
            return code

    sys.exit(run_async(send()))


async def _submit(
    client: Client, groups: Sequence[TaskGroup], durability: Durability, *, require: bool, talk: bool, print_ids: bool
) -> list[GroupHandle]:
    """
    Submit them in their order, since later ones may depend on earlier ones, and say which of their roles nobody serves.
    """
    from rq_ceylon.groupfile import resolved
    from rq_ceylon.models import counted

    handles: list[GroupHandle] = []
    for group in groups:
        group.depends_on = resolved(group, [(one, handle.id) for one, handle in zip(groups, handles, strict=False)])
        handle = await client.submit(group, require_workers=require, durability=durability)
        handles.append(handle)
        if not talk:
            continue
        view = await handle.view()
        tasks = counted(view.counters.total, "task")
        repeated = f"Group {handle.id} was already submitted, with {tasks}"
        click.echo(repeated if handle.repeated else f"Submitted {tasks} as group {handle.id}", err=True)
        roles = {task.role async for task in handle.tasks()} if view.counters.total <= 10_000 else set()
        for words in await client.missing_roles(roles):
            click.echo(f"Note: {words}", err=True)
        if print_ids:
            click.echo(handle.id)
    return handles
