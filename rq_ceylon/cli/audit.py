"""
`ceylon audit`.
"""

from __future__ import annotations

import dataclasses
import sys
from typing import TYPE_CHECKING

import click

from rq_ceylon.cli.common import reported, run_async, settings, to_json, where

if TYPE_CHECKING:
    from rq_ceylon.audit import Audit


@click.command()
@click.argument("group", required=False)
@click.option(
    "--repair", is_flag=True, help="Put right what is certain: counters, leftovers of ended tasks, the index."
)
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
@where
@reported
def audit(group: str | None, repair: bool, as_json: bool, redis_url: str | None, namespace: str | None) -> None:
    """
    Recount all groups, or one, from their records, against their counters and events.

    Exit code 0: drift 0, or all of it repaired; 1: there is drift.
    """
    place = settings(redis_url, namespace)

    async def main() -> Audit:
        from rq_ceylon.audit import audit as recount
        from rq_ceylon.client import Client

        async with Client(place.redis_url, namespace=place.namespace) as client:
            return await recount(client.connection, client.keys, [group] if group else [], repair=repair)

    found = run_async(main())
    if as_json:
        click.echo(to_json({"schema": 1, **dataclasses.asdict(found)}))
    else:
        for drift in found.drift:
            click.echo(str(drift))
        for gid in found.moving:
            click.echo(f"{gid}: changes too fast to be recounted; try again when less of it runs")
        click.echo(f"{found.groups} groups, {found.tasks} tasks: drift {len(found.drift)}")
    sys.exit(any(not drift.repaired for drift in found.drift))
