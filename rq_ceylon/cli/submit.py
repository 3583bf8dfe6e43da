"""`ceylon-submit`."""

from __future__ import annotations

import asyncio
import sys
import time
from collections.abc import Sequence, Sized
from typing import TYPE_CHECKING, Literal, cast

import click

from rq_ceylon.cli.common import RedisOptions, command, load_app, run_async, say, where
from rq_ceylon.cli.facts import group_facts, to_json
from rq_ceylon.cli.files import in_words, planned, read_groups
from rq_ceylon.errors import CeylonError

if TYPE_CHECKING:
    from rq_ceylon.client import Client, GroupHandle
    from rq_ceylon.models import Durability, TaskGroup
    from rq_ceylon.views import GroupView

INTERRUPTED = 130


@command("ceylon-submit")
@click.argument("file", metavar="FILE")
@click.option("--dry-run", is_flag=True, help="Check the file and send nothing.")
@click.option("--wait", "wait", flag_value="auto", is_flag=False, default=None, metavar="[=goal|all]",
              help="Wait for the goals, or for all tasks if there are none; =all: for all tasks.")  # fmt: skip
@click.option("--timeout", metavar="DURATION", help="Stop waiting after this; the group goes on.")
@click.option("--json", is_flag=True, help="Print JSON, one line per group.")
@click.option("--require-workers", is_flag=True, help="Refuse the submission if a role has no live worker.")
@click.option("--key", metavar="KEY", help="Submitting the same content again with the same key changes nothing.")
@click.option("--durability", type=click.Choice(["none", "replica", "fsync"]), default="none", show_default=True,
              help="Wait until a replica has the submission, or until it is on the disk.")  # fmt: skip
@click.option("--app", metavar="MODULE:APP", help="Check arguments against the functions of this application.")
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
    app: str | None,
    options: RedisOptions,
) -> None:
    """
    Submit groups of tasks from a YAML or JSON file, one per document; - reads standard input.

    \b
    Examples:
      ceylon-submit examples/data_processing.yaml --wait=all
      generate-group | ceylon-submit - --key nightly-2026-11-24

    Prints the id of each group. With --wait, a bar shows the progress, with a mark at the goal; Ctrl-C stops watching,
    but the group goes on.
    """
    from rq_ceylon.errors import InvalidInputError
    from rq_ceylon.models import seconds

    if wait not in (None, "auto", "goal", "all"):
        # `--wait FILE` would take the file for the value: say so, instead of "missing argument".
        raise InvalidInputError(f"--wait: {wait!r} is not known; write --wait, --wait=goal or --wait=all")
    limit = None if timeout is None else seconds(timeout, "--timeout")
    loaded = load_app(app) if app else None
    groups = read_groups(file)
    if key is not None:
        if not key:
            raise InvalidInputError(
                "--key: it is empty; give a text that stays the same for the same submission, or leave --key out"
            )
        if len(groups) > 1:
            raise InvalidInputError(f"--key: {file} has {len(groups)} groups; write key: into each of them instead")
        groups[0].key = key
    if dry_run or loaded is not None:
        words = in_words(groups, loaded.registry if loaded else None)
    if dry_run:
        click.echo(f"{file}: valid: {words}; nothing was sent")
        return
    found = options.settings(loaded)

    async def send() -> int:
        from rq_ceylon.client import Client

        registry = loaded.registry if loaded else None
        async with Client(found.redis_url, namespace=found.namespace, registry=registry) as client:
            sending = _Sending(client, groups, json=json, print_ids=wait is None and not json)
            try:
                await sending.submit(durability, require=require_workers)
                if wait is None:
                    return 0
                return await sending.wait("all" if wait == "all" else "goal", limit)
            finally:
                await sending.tell_rest()

    sys.exit(run_async(send()))


class _Sending:
    """
    Sends the groups of one file in their order, since later ones may depend on earlier ones, then waits for them. It
    reports every group that was sent, whatever happens to the rest.
    """

    def __init__(self, client: Client, groups: Sequence[TaskGroup], *, json: bool, print_ids: bool) -> None:
        self.client, self.groups, self.json, self.print_ids = client, groups, json, print_ids
        self.handles: list[GroupHandle] = []
        self.told = 0

    async def submit(self, durability: Durability, *, require: bool) -> None:
        """Check all groups, then send them."""
        from rq_ceylon.client import check_groups
        from rq_ceylon.groupfile import resolved

        if len(self.groups) > 1:  # one group is refused as a whole anyway
            ids = planned(self.groups, self.client.keys.namespace)
            await check_groups(self.client, ids, require_workers=require, durability=durability)
        sent: list[tuple[TaskGroup, str]] = []
        for group in self.groups:
            group.depends_on = resolved(group, sent)
            handle = await self.client.submit(group, require_workers=require, durability=durability)
            self.handles.append(handle)
            sent.append((group, handle.id))
            if self.print_ids:
                click.echo(handle.id)
            if not self.json:
                await self._say_how(group, handle)

    async def _say_how(self, group: TaskGroup, handle: GroupHandle) -> None:
        from rq_ceylon.groupfile import roles_of, samples
        from rq_ceylon.models import DEFAULT_ROLE, counted

        tasks = counted(len(cast("Sized", group.tasks)), "task")
        repeated = f"Group {handle.id} was already submitted, with {tasks}"
        if handle.repeated and (await handle.view()).outcome in ("failed", "cancelled"):
            repeated += f", and has not completed; run its failures again with: ceylon retry {handle.id}"
        click.echo(repeated if handle.repeated else f"Submitted {tasks} as group {handle.id}", err=True)
        registry, shared = self.client.registry, group.defaults
        names: set[tuple[str, str]] = set()
        roles = roles_of(group)
        for task in samples(group):
            if uses := task.uses or shared.uses:
                handler = registry.find(uses) if registry else None
                role = task.role or shared.role or (handler.role if handler else None) or DEFAULT_ROLE
                names.add((role, uses))
                roles.add(role)
        for words in [*await self.client.missing_roles(roles), *await self.client.unknown_names(names)]:
            say(f"Note: {words}", err=True)

    async def wait(self, until: Literal["goal", "all"], limit_s: float | None) -> int:
        """
        Show one group after another until its goals are settled or all its tasks have ended. Wait for all groups from
        the start: a group with a short retention may be gone when its turn comes.
        """
        from rq_ceylon.cli.live import follow

        began, code = time.monotonic(), 0
        ends = [asyncio.ensure_future(handle.wait(until)) for handle in self.handles]
        try:
            for handle, end in zip(self.handles, ends, strict=True):
                left = None if limit_s is None else max(0.0, round(limit_s - (time.monotonic() - began), 1))
                view, one_code = await follow(self.client, handle, until, left, sys.stderr, end)
                self._tell(view)
                code = code or one_code
                if one_code == INTERRUPTED:
                    break
        finally:
            for end in ends:
                end.cancel()
            await asyncio.gather(*ends, return_exceptions=True)
        return code

    async def tell_rest(self) -> None:
        """Report the groups that were sent but not reported yet, as they stand."""
        for handle in self.handles[self.told :] if self.json else ():
            try:
                self._tell(await handle.view())
            except CeylonError as error:
                click.echo(to_json({"schema": 1, "group": {"id": handle.id}, "error": str(error)}))

    def _tell(self, view: GroupView) -> None:
        self.told += 1
        if self.json:
            click.echo(to_json({"schema": 1, **group_facts(view)}))
