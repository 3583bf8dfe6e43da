"""`ceylon-worker`."""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING

import click

from rq_ceylon.cli.common import RedisOptions, command, load_app, logs, serve, where

if TYPE_CHECKING:
    from rq_ceylon.handlers import Registry
    from rq_ceylon.process import Watch

PROCESSES_MAX = 256

SLOTS, PLAIN_SLOTS = 100, 16
"""Tasks at once by default: of an application with async functions; of one with plain functions alone, since a worker
has this many threads."""


def _bounds(context: click.Context, parameter: click.Parameter, text: str) -> tuple[int, int]:
    """`4` or `2..10`."""
    low, dots, high = text.partition("..")
    try:
        bounds = int(low), int(high if dots else low)
    except ValueError:
        bounds = 0, 0
    if not 1 <= bounds[0] <= bounds[1] <= PROCESSES_MAX:
        raise click.BadParameter(f"{text!r} is not usable; give a number (4) or bounds (2..10), up to {PROCESSES_MAX}")
    return bounds


def _size(context: click.Context, parameter: click.Parameter, text: str | None) -> int | None:
    """Bytes: `500MB`, `2GB`, or a plain number."""
    if text is None:
        return None
    found = re.fullmatch(r"(\d+)\s*([KMG]?)B?", text.strip(), re.IGNORECASE | re.ASCII)
    if not found or not int(found[1]):
        raise click.BadParameter(f"{text!r} is not usable; give a size such as 500MB or 2GB")
    return int(found[1]) << 10 * " KMG".index(found[2].upper() or " ")


def _child(arguments: Sequence[str]) -> list[str]:
    """The command of a child: this command with one process. Options end at `--`."""
    from rq_ceylon.process import PYTHON

    end = arguments.index("--") if "--" in arguments else len(arguments)
    return [*PYTHON, "worker", *arguments[:end], "--processes", "1", *arguments[end:]]


def _check_roles(roles: Sequence[str]) -> None:
    from rq_ceylon.errors import InvalidInputError
    from rq_ceylon.models import check_id

    for role in roles:
        if "," in role:
            each = " ".join(f"--role {one}" for one in role.split(",") if one)
            raise InvalidInputError(f"--role: {role!r} is not usable; give each role its own: {each}")
        check_id(role, "--role")


def _warn_of_unused(served: Sequence[str], registry: Registry) -> None:
    """Warn of a role that no task of the application has: it is most often mistyped."""
    from loguru import logger

    from rq_ceylon.errors import guess

    known = registry.roles()
    for role in served:
        if known and role not in known:
            logger.warning(
                "No task of the application has the role {!r} (they have: {}){}; it will get only tasks that are "
                "submitted to this role explicitly",
                role,
                ", ".join(known),
                guess(role, known, ask='; did you mean "{}"?'),
            )


@command("ceylon-worker")
@click.argument("app", metavar="[MODULE:APP]", required=False, envvar="CEYLON_APP")
@click.option(
    "-r",
    "--role",
    "roles",
    multiple=True,
    metavar="ROLE",
    envvar="CEYLON_ROLE",
    help="A role to serve; may be repeated.",
)
@click.option(
    "-c",
    "--concurrency",
    type=click.IntRange(1, 10_000),
    help=f"How many tasks run at once. Default: {SLOTS}, or {PLAIN_SLOTS} if the application has no async function.",
)
@click.option(
    "--processes",
    metavar="N|MIN..MAX",
    default="1",
    show_default=True,
    callback=_bounds,
    help="How many worker processes run; between bounds, as many as busy slots and backlog need.",
)
@click.option("-b", "--burst", is_flag=True, help="End when nothing is left to do.")
@click.option("--name", metavar="NAME", help="Shown in lists, with a unique suffix. Default: the host.")
@click.option(
    "--grace",
    metavar="DURATION",
    default="25s",
    show_default=True,
    help="How long running tasks may go on after a stop signal.",
)
@click.option(
    "--lease",
    metavar="DURATION",
    default="30s",
    show_default=True,
    help="How long a worker that stops responding keeps its tasks.",
)
@click.option("--max-tasks", type=click.IntRange(1), metavar="N", help="Drain and end after about N tasks.")
@click.option(
    "--max-memory", metavar="SIZE", callback=_size, help="Drain and end once memory use is about SIZE, such as 500MB."
)
@click.option(
    "--max-hung-threads",
    type=click.IntRange(0),
    metavar="N",
    help="Drain and end with exit code 7 once more than about N attempts hang.",
)
@where
@logs
def worker(
    app: str | None,
    roles: tuple[str, ...],
    concurrency: int | None,
    processes: tuple[int, int],
    burst: bool,
    name: str | None,
    grace: str,
    lease: str,
    max_tasks: int | None,
    max_memory: int | None,
    max_hung_threads: int | None,
    options: RedisOptions,
) -> None:
    """
    Run the tasks of some roles.

    \b
    Examples:
      ceylon-worker --role processor -c 4
      ceylon-worker myjobs:app --processes 4
      ceylon-worker myjobs:app --processes 2..10

    Without MODULE:APP, the worker has two functions: `default`, which sleeps for the task's duration, and `echo`.
    Without --role, it serves the roles of the application's tasks. A first SIGTERM or Ctrl-C lets running tasks finish
    within --grace; a second one gives them back at once.
    """
    from rq_ceylon.errors import InvalidInputError
    from rq_ceylon.handlers import Registry
    from rq_ceylon.models import check_lease, seconds
    from rq_ceylon.process import CHILD_END_S, SUPERVISED, stop_with_supervisor
    from rq_ceylon.settings import require_unix
    from rq_ceylon.worker.supervisor import Supervisor

    require_unix("ceylon-worker")
    _check_roles(roles)
    loaded = load_app(app) if app else None
    registry = loaded.registry if loaded else Registry()
    found = options.bound(loaded)
    served = list(roles) or registry.roles()
    if not served:
        raise InvalidInputError("no role to serve: give --role ROLE, or an application whose tasks have roles")
    if loaded and SUPERVISED not in os.environ:  # of several processes the supervisor says it
        _warn_of_unused(served, registry)
    grace_s, lease_s = seconds(grace, "--grace"), check_lease(lease, "--lease")
    stop_with_supervisor()

    async def supervise(watch: Watch) -> int:
        supervisor = Supervisor(
            _child(sys.argv[1:]),
            processes=processes,
            url=found.redis_url,
            namespace=found.namespace,
            burst=burst,
            grace_s=grace_s,
        )
        watch.listen(supervisor.signal)
        return await supervisor.run()

    async def work(watch: Watch) -> int:
        from rq_ceylon.worker import Worker

        is_async = not loaded or any(handler.kind == "async" for handler in registry.own())
        running = Worker(
            found.redis_url,
            namespace=found.namespace,
            registry=registry,
            roles=served,
            name=name,
            slots=concurrency or (SLOTS if is_async else PLAIN_SLOTS),
            threads=concurrency or PLAIN_SLOTS,
            lease_s=lease_s,
            grace_s=grace_s,
            burst=burst,
            max_tasks=max_tasks,
            max_memory=max_memory,
            max_hung_threads=max_hung_threads,
        )
        signals: list[int] = []

        def stop(number: int) -> None:
            signals.append(number)
            (running.stop if len(signals) == 1 else running.kill)()

        watch.at_once = running.leases.stopping  # written to the records even while a handler blocks the event loop
        watch.listen(stop)
        await running.run()
        return 128 + signals[-1] if len(signals) > 1 else running.exit_code

    if processes == (1, 1):
        serve(work, grace_s=grace_s)
    serve(supervise, grace_s=grace_s + CHILD_END_S)
