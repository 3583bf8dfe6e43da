"""`ceylon validate`, `ceylon schema`, `ceylon graph`: group files without a submission."""

from __future__ import annotations

import sys
from collections.abc import Sequence, Sized
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, cast

import click

from rq_ceylon.cli.common import RedisOptions, reported, run_async, where
from rq_ceylon.log import plain

if TYPE_CHECKING:
    from rq_ceylon.graph import Drawing
    from rq_ceylon.handlers import Registry
    from rq_ceylon.models import TaskGroup

MAX_NAMED = 20
GOALS_LATER = "whether each goal is possible is checked at submission"
"""The one evaluator of goals runs in Redis, so nothing here can tell."""


def read_groups(file: str) -> list[TaskGroup]:
    """
    The groups of a file; - is standard input.

    Raises:
        InvalidInputError: it cannot be read, or is not valid.
    """
    from rq_ceylon.errors import InvalidInputError
    from rq_ceylon.groupfile import load
    from rq_ceylon.groupfile.reader import MAX_BYTES

    if file == "-":
        return load(sys.stdin.buffer.read(MAX_BYTES + 1), "<stdin>")
    try:
        with open(file, "rb") as opened:
            text = opened.read(MAX_BYTES + 1)  # more is refused unread, even if it has no end
    except (OSError, ValueError) as error:
        why = getattr(error, "strerror", None) or error
        raise InvalidInputError(f"{file}: cannot be read ({why}); give a YAML or JSON file, or -") from error
    return load(text, file)


def planned(groups: Sequence[TaskGroup], namespace: str = "ceylon") -> list[tuple[TaskGroup, str]]:
    """
    The groups of a file with the ids they will have, and with ids for the names in `depends_on`. A group without a key
    will get another id.
    """
    from rq_ceylon.client import keyed_id, new_id
    from rq_ceylon.groupfile import resolved

    made: list[tuple[TaskGroup, str]] = []
    for group in groups:
        gid = keyed_id(namespace, group.key) if group.key else new_id()
        made.append((replace(group, depends_on=resolved(group, made)), gid))
    return made


def in_words(groups: Sequence[TaskGroup], registry: Registry | None = None) -> str:
    """
    Check the groups of a file as a submission does before it sends anything, and return what the file holds, in words.
    Of a matrix one task is checked, since reading the file has refused whatever is wrong with single combinations. With
    handlers, the arguments of every task are checked.

    Raises:
        InvalidInputError: as `Client.submit`.
    """
    from rq_ceylon.client import check_group
    from rq_ceylon.goals import compile_goals
    from rq_ceylon.groupfile import roles_of, samples
    from rq_ceylon.models import counted

    tasks, goals, roles = 0, 0, set[str]()
    for group, _ in planned(groups):
        check_group(replace(group, tasks=samples(group)) if registry is None else group, registry)
        goals += len(compile_goals(group.goal))
        tasks += len(cast("Sized", group.tasks))
        roles.update(roles_of(group))
    names = sorted(roles)
    more = ", …" if len(names) > MAX_NAMED else ""
    served = f"{counted(len(roles), 'role')} ({', '.join(names[:MAX_NAMED])}{more})"
    parts = [counted(len(groups), "group"), counted(tasks, "task"), served, counted(goals, "goal")]
    return ", ".join(parts) + (f"; {GOALS_LATER}" if goals else "")


@click.command()
@click.argument("files", metavar="FILE...", nargs=-1, required=True)
@reported
def validate(files: tuple[str, ...]) -> None:
    """
    Check group files as a submission does before it sends anything. Needs no Redis.

    Prints each problem on a line of its own: FILE:LINE:COLUMN: WHERE: WHAT; REMEDY.
    """
    from rq_ceylon.errors import InvalidInputError

    code = 0
    for file in files:
        try:
            groups = read_groups(file)
            try:
                click.echo(f"{file}: valid: {in_words(groups)}")
            except InvalidInputError as error:
                raise InvalidInputError(f"{file}: {error}") from error
        except InvalidInputError as error:
            click.echo(str(error), err=True)
            code = error.exit_code
    sys.exit(code)


@click.command()
@reported
def schema() -> None:
    """
    Print the JSON Schema of group files, for editors.

    \b
    Example:
      ceylon schema > ceylon-group.schema.json
    and as the first line of a file:
      # yaml-language-server: $schema=ceylon-group.schema.json
    """
    from rq_ceylon import groupfile

    click.echo(groupfile.schema(), nl=False)


@click.command()
@click.argument("source", metavar="FILE|GROUP")
@where
@reported
def graph(source: str, options: RedisOptions) -> None:
    """
    Print which tasks need which, as a Mermaid flowchart. Takes a group file or a submitted group.

    For a submitted group, the chart shows the state of each task, but only the needs of tasks that have not ended. Many
    tasks are drawn as one box per kind: the tasks of one role that need the same kinds.

    \b
    Example:
      ceylon graph examples/dag.yaml
    """
    from rq_ceylon.graph import draw

    if source == "-" or Path(source).exists() or Path(source).suffix in (".yaml", ".yml", ".json"):
        click.echo(plain(draw(_of_file(source))), nl=False)
        return
    found = options.settings()
    click.echo(plain(draw([run_async(_of_group(found.redis_url, found.namespace, source))])), nl=False)


def _of_file(file: str) -> list[Drawing]:
    from rq_ceylon.graph import Drawing
    from rq_ceylon.groupfile import resolved
    from rq_ceylon.models import DEFAULT_ROLE

    drawn: list[tuple[TaskGroup, str]] = []
    found = []
    for number, group in enumerate(read_groups(file), 1):
        others = [one if isinstance(one, str) else one.group for one in resolved(group, drawn)]
        drawing = Drawing(f"g{number}", group.name, depends_on=others)
        for at, task in enumerate(group.tasks, 1):
            drawing.add(task.id or str(at), task.needs, task.role or group.defaults.role or DEFAULT_ROLE)
        drawn.append((group, drawing.id))
        found.append(drawing)
    return found


async def _of_group(url: str, namespace: str, gid: str) -> Drawing:
    from rq_ceylon.client import Client
    from rq_ceylon.graph import Drawing
    from rq_ceylon.store import queries

    async with Client(url, namespace=namespace) as client:
        handle = client.group(gid)
        view = await handle.view()
        drawing = Drawing("g1", view.name)
        async for some in queries.states(client.connection, client.keys, gid):
            for tid, status, role in some:
                drawing.add(tid, (), role, status.value)
        if not await queries.has_needs(client.connection, client.keys, gid):
            return drawing
        for at in range(0, len(ids := list(drawing.needs)), 500):
            drawing.needs.update(await queries.needs(client.connection, client.keys, gid, ids[at : at + 500]))
        return drawing
