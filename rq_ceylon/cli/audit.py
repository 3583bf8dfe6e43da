"""`ceylon audit`."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING

import click

from rq_ceylon.cli.common import say, with_client
from rq_ceylon.cli.facts import to_json
from rq_ceylon.models import counted

if TYPE_CHECKING:
    from rq_ceylon.client import Client


@click.command()
@click.argument("group", required=False)
@click.option(
    "--repair", is_flag=True, help="Repair what is certain: counters, leftovers of ended tasks, the index of groups."
)
@click.option("--json", is_flag=True, help="Print JSON.")
@with_client
async def audit(client: Client, group: str | None, repair: bool, json: bool) -> int:
    """
    Recount groups from their records.

    It compares one group, or all, with their counters and events, and prints each difference (drift). Exit code 0 if
    there is none or all were repaired, else 1.
    """
    from rq_ceylon.audit import audit as recount

    found = await recount(client.connection, client.keys, [group] if group else [], repair=repair)
    if json:
        click.echo(to_json({"schema": 1, **dataclasses.asdict(found)}))
    else:
        for drift in found.drift:
            say(drift)
        for gid in found.moving:
            say(f"{gid}: changes too fast to be recounted; try again when fewer of its tasks run")
        checked = f"{counted(found.groups, 'group')}, {counted(found.tasks, 'task')}"
        click.echo(f"{checked}: drift {len(found.drift)}")
    return int(any(not drift.repaired for drift in found.drift))
