"""
`ceylon` and its commands.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Coroutine, Sequence
from typing import TYPE_CHECKING, Any

import click

from rq_ceylon.cli.common import (
    CONTEXT,
    EXIT_CODES,
    logs,
    reported,
    run_async,
    set_up_logging,
    settings,
    to_json,
    where,
)
from rq_ceylon.cli.files import graph, schema, validate
from rq_ceylon.cli.submit import goal_facts, group_facts

if TYPE_CHECKING:
    from rq_ceylon.client import Client
    from rq_ceylon.models import TaskView

JSON = click.option("--json", "as_json", is_flag=True, help="Print JSON.")


@click.group(context_settings={**CONTEXT, "auto_envvar_prefix": "CEYLON"}, epilog=EXIT_CODES)
@click.version_option(package_name="rq-ceylon")
def ceylon() -> None:
    """
    Look after groups of tasks, their goals, and the workers that run them.

    \b
    Examples:
      ceylon demo              see it work, on a throw-away server
      ceylon status            what is queued, running and done
      ceylon show GROUP        one group: goals, counters, tasks
    """


for _command in (validate, schema, graph):
    ceylon.add_command(_command)


def _with_client(
    redis_url: str | None, namespace: str | None, body: Callable[[Client], Coroutine[Any, Any, None]]
) -> None:
    place = settings(redis_url, namespace)

    async def main() -> None:
        from rq_ceylon.client import Client

        async with Client(place.redis_url, namespace=place.namespace) as client:
            await body(client)

    run_async(main())


def _table(head: Sequence[str], rows: Sequence[Sequence[object]]) -> None:
    """
    Columns in plain text: the same on a terminal and in a pipe.
    """
    lines = [list(map(str, row)) for row in (head, *rows)]
    widths = [max(len(line[i]) for line in lines) for i in range(len(head))]
    for line in lines:
        click.echo("  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip())


@ceylon.command()
@JSON
@where
@reported
def status(as_json: bool, redis_url: str | None, namespace: str | None) -> None:
    """
    Roles with their backlog, workers and totals; groups by status.
    """

    async def body(client: Client) -> None:
        roles, groups, workers = await client.roles(), await client.groups(), await client.workers()
        counts: dict[str, int] = {}
        for group in groups:
            counts[group.status] = counts.get(group.status, 0) + 1
        monitors = sum(worker.kind == "monitor" for worker in workers)
        if as_json:
            click.echo(to_json({"schema": 1, "roles": roles, "groups": counts, "monitors": monitors}))
            return
        _table(
            ("ROLE", "QUEUED", "DELIVERED", "DELAYED", "WORKERS", "BUSY/SLOTS", "COMPLETED", "FAILED"),
            [
                (
                    role.name,
                    role.queued,
                    role.delivered,
                    role.delayed,
                    role.workers,
                    f"{role.busy}/{role.slots}",
                    role.totals.get("completed", 0),
                    role.totals.get("failed", 0),
                )
                for role in roles
            ],
        )
        click.echo("groups: " + (", ".join(f"{count} {word}" for word, count in sorted(counts.items())) or "none"))
        click.echo(f"monitors: {monitors}" + ("" if monitors else " (start one: ceylon-monitor)"))

    _with_client(redis_url, namespace, body)


@ceylon.command()
@JSON
@where
@reported
def workers(as_json: bool, redis_url: str | None, namespace: str | None) -> None:
    """
    Live workers and monitors.
    """

    async def body(client: Client) -> None:
        found = await client.workers()
        if as_json:
            click.echo(to_json({"schema": 1, "workers": found}))
            return
        _table(
            ("NAME", "KIND", "HOST", "PID", "ROLES", "BUSY/SLOTS", "TASKS", "STATE"),
            [
                (
                    worker.name,
                    worker.kind,
                    worker.host,
                    worker.pid,
                    ",".join(worker.roles) or "-",
                    f"{len(worker.tasks)}/{worker.slots}",
                    ",".join(worker.task_names) or "-",
                    "stopping" if worker.stopping else "running",
                )
                for worker in found
            ],
        )

    _with_client(redis_url, namespace, body)


@ceylon.command()
@JSON
@where
@reported
def groups(as_json: bool, redis_url: str | None, namespace: str | None) -> None:
    """
    All groups, oldest first.
    """

    async def body(client: Client) -> None:
        found = await client.groups()
        if as_json:
            facts = [{"group": group_facts(view), "goals": goal_facts(view)} for view in found]
            click.echo(to_json({"schema": 1, "groups": facts}))
            return
        _table(
            ("GROUP", "NAME", "STATUS", "COMPLETED", "FAILED", "CANCELLED", "TOTAL", "GOALS"),
            [
                (
                    view.id,
                    view.name,
                    view.outcome or view.status,
                    view.counters.completed,
                    view.counters.failed,
                    view.counters.cancelled,
                    view.counters.total,
                    ", ".join(f"{goal.name} {goal.status}" for goal in view.goals) or "-",
                )
                for view in found
            ],
        )

    _with_client(redis_url, namespace, body)


@ceylon.command()
@click.argument("target", metavar="GROUP[/TASK]")
@JSON
@where
@reported
def show(target: str, as_json: bool, redis_url: str | None, namespace: str | None) -> None:
    """
    One group with its goals and tasks, or one task.
    """

    async def body(client: Client) -> None:
        from rq_ceylon.store import statistics

        gid, _, tid = target.partition("/")
        view = await client.group(gid).view()
        tasks = [await client.task(target).view()] if tid else [task async for task in client.group(gid).tasks()]
        if as_json:
            facts = {"schema": 1, "group": group_facts(view), "goals": goal_facts(view)}
            click.echo(to_json({**facts, "tasks": [_task_facts(gid, task) for task in tasks]}))
            return
        if not tid:
            click.echo(f"{view}")
            for goal in view.goals:
                at = goal.settled
                click.echo(
                    f"  goal {goal.name}: {goal.when}: {goal.status}"
                    + (f" at {at.counters.completed} of {at.counters.total} completed, by {at.by}" if at else "")
                )
            click.echo(statistics.summary(view, await statistics.of_group(client.connection, client.keys, gid)))
        _table(
            ("TASK", "STATUS", "REASON", "ROLE", "ATTEMPT", "WORKER", "RUN MS", "RESULT"),
            [_task_row(task) for task in tasks],
        )
        if tid and tasks[0].result and tasks[0].result.error:
            click.echo(tasks[0].result.error.get("traceback", "").rstrip())

    _with_client(redis_url, namespace, body)


def _task_row(task: TaskView) -> tuple[object, ...]:
    result = task.result
    shown = "-"
    if result is not None:
        shown = f"{result.error['type']}: {result.error['message']}" if result.error else to_json(result.value)
    clean = "".join(char if char.isprintable() else "?" for char in shown)
    return (
        task.id,
        task.status,
        task.reason or "-",
        task.role,
        task.attempt,
        task.worker or "-",
        result.run_ms if result else "-",
        clean if len(clean) <= 60 else clean[:57] + "...",
    )


def _task_facts(gid: str, task: TaskView) -> dict[str, Any]:
    result = task.result
    return {
        "id": f"{gid}/{task.id}",
        "status": task.status,
        "reason": task.reason,
        "role": task.role,
        "uses": task.uses,
        "attempt": task.attempt,
        "crashes": task.crashes,
        "worker": task.worker,
        "started": task.started_ms,
        "due": task.due_ms,
        "ended": result.ended_ms if result else None,
        "wait_ms": result.wait_ms if result else None,
        "run_ms": result.run_ms if result else None,
        "result": result.value if result else None,
        "error": result.error if result else None,
    }


@ceylon.command()
@click.argument("target", metavar="GROUP[/TASK]")
@where
@reported
def cancel(target: str, redis_url: str | None, namespace: str | None) -> None:
    """
    Cancel a group or a task: at once what has not started, by asking its worker what runs.
    """

    async def body(client: Client) -> None:
        _, _, tid = target.partition("/")
        word = await (client.task(target).cancel() if tid else client.group(target).cancel())
        click.echo(f"{target}: {word}")

    _with_client(redis_url, namespace, body)


@ceylon.command()
@reported
def demo() -> None:
    """
    The main job on a throw-away server: two worker processes, a monitor, ten tasks, a goal at five.
    """
    from rq_ceylon.cli.processes import run_demo

    sys.exit(run_demo())


@ceylon.command()
@click.option("--port", type=click.IntRange(1, 65535), help="Listen on this port of 127.0.0.1 as well.")
@reported
def server(port: int | None) -> None:
    """
    Run a local Redis-compatible server with a kept folder, for development; other commands of this user find it.
    """
    from rq_ceylon.cli.processes import run_server

    sys.exit(run_server(port))


@ceylon.command()
@click.argument("app", metavar="MODULE:APP")
@click.option("-c", "--concurrency", type=click.IntRange(1, 10_000), help="Tasks at once.")
@logs("info")
@reported
def up(app: str, concurrency: int | None, log_level: str, log_format: str) -> None:
    """
    Server, worker and monitor for one application together, for development. Ctrl-C ends all.
    """
    set_up_logging(log_level, log_format)
    from rq_ceylon.cli.processes import run_up

    sys.exit(run_up(app, concurrency, log_level, log_format))
