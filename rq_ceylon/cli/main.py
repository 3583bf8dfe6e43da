"""`ceylon` and its commands."""

from __future__ import annotations

import re
import socket
import sys
from operator import itemgetter
from typing import TYPE_CHECKING, Literal

import click

from rq_ceylon.cli.audit import audit
from rq_ceylon.cli.common import CONTEXT, EXIT_CODES, clock, load_app, logs, reported, say, table, with_client
from rq_ceylon.cli.facts import group_facts, result_facts, task_facts, to_json
from rq_ceylon.cli.failures import failures, retry
from rq_ceylon.cli.files import graph, schema, validate
from rq_ceylon.log import plain

if TYPE_CHECKING:
    from collections.abc import Sequence

    from rq_ceylon.client import Client
    from rq_ceylon.views import GroupView, TaskView, WorkerView

JSON = click.option("--json", is_flag=True, help="Print JSON.")

SHOWN = 100
"""How many tasks or groups a table shows, unless it is told another number."""


@click.group(context_settings={**CONTEXT, "auto_envvar_prefix": "CEYLON"}, epilog=EXIT_CODES)
@click.version_option(package_name="rq-ceylon")
def ceylon() -> None:
    """
    Look after groups of tasks, their goals, and the workers that run them.

    \b
    Examples:
      ceylon demo              see it work, on a throw-away server; --chaos kills workers
      ceylon up tasks:app      run your own application, here `app` of tasks.py, while you develop it
      ceylon status            what is queued, running and done
      ceylon watch GROUP       follow one group live
      ceylon show GROUP        one group: goals, counters, tasks

    Commands of their own are ceylon-worker, ceylon-submit and ceylon-monitor.
    """


for _command in (validate, schema, graph, audit, failures, retry):
    ceylon.add_command(_command)


@ceylon.command()
@JSON
@with_client
async def status(client: Client, json: bool) -> None:
    """
    Show what is queued, running and done.

    It lists roles with their backlog, workers and totals, and counts groups by status. QUEUED tasks wait for a worker,
    DELIVERED ones are at a worker, DELAYED ones wait for their time or for their next attempt. BUSY/SLOTS may be 5 s
    old.
    """
    roles, groups, workers = await client.roles(), await client.groups(), await client.workers()
    counts: dict[str, int] = {}
    for group in groups:
        counts[group.status] = counts.get(group.status, 0) + 1
    monitors = sum(worker.kind == "monitor" for worker in workers)
    if json:
        click.echo(to_json({"schema": 1, "roles": roles, "groups": counts, "monitors": monitors}))
        return
    table(
        ("ROLE", "QUEUED", "DELIVERED", "DELAYED", "WORKERS", "BUSY/SLOTS", "COMPLETED", "FAILED"),
        [
            (
                role.name + (" (paused)" if role.paused else ""),
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


@ceylon.command()
@JSON
@click.option(
    "--check",
    is_flag=True,
    help="For health checks: end with 1 if no worker or monitor is alive on this host, or if too much hangs in one.",
)
@with_client
async def workers(client: Client, json: bool, check: bool) -> int:
    """
    List live workers and monitors.

    TASKS leaves out the built-in tasks default and echo where a worker knows others.
    """
    from rq_ceylon.handlers import BUILTIN_NAMES

    found = await client.workers()
    if check:
        here = [worker for worker in found if worker.host == socket.gethostname() and not worker.stopping]
        say("\n".join(_health(worker) for worker in here) or "no worker or monitor is alive on this host")
        return 0 if here and not any(worker.is_exhausted for worker in here) else 1
    if json:
        click.echo(to_json({"schema": 1, "workers": found}))
        return 0
    table(
        ("NAME", "KIND", "HOST", "PID", "ROLES", "BUSY/SLOTS", "TASKS", "STATE"),
        [
            (
                worker.name,
                worker.kind,
                worker.host,
                worker.pid,
                ",".join(worker.roles) or "-",
                f"{len(worker.tasks)}/{worker.slots}",
                ",".join([name for name in worker.task_names if name not in BUILTIN_NAMES] or worker.task_names) or "-",
                ("stopping" if worker.stopping else "running") + (f", {worker.hung} hung" if worker.hung else ""),
            )
            for worker in found
        ],
    )
    return 0


def _health(worker: WorkerView) -> str:
    from rq_ceylon.models import counted

    if worker.is_exhausted:
        hung = counted(worker.hung, "attempt hangs", "attempts hang")
        return f"{worker.kind} {worker.name} is alive, but {hung} in it: restart it"
    return f"{worker.kind} {worker.name} is alive"


@ceylon.command()
@click.option(
    "--status",
    "statuses",
    type=click.Choice(["staging", "waiting", "active", "paused", "closing", "completed", "failed", "cancelled"]),
    multiple=True,
    help="Only groups of this status or outcome; may be repeated.",
)
@click.option("--name", metavar="TEXT", default="", help="Only groups whose name contains this text.")
@click.option(
    "--limit",
    type=click.IntRange(0),
    help=f"Show this many of the newest at most; 0: all. Default: {SHOWN}, with --json all.",
)
@JSON
@with_client
async def groups(client: Client, statuses: tuple[str, ...], name: str, limit: int | None, json: bool) -> None:
    """List groups, oldest first."""
    found = [
        view
        for view in await client.groups()
        if name in view.name and (not statuses or (view.outcome or view.status) in statuses)
    ]
    most = (0 if json else SHOWN) if limit is None else limit
    older = len(found) - most if most else 0
    found = found[-most:]
    if json:
        facts = [group_facts(view) for view in found]
        click.echo(to_json({"schema": 1, "groups": facts}))
        return
    table(
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
    if older > 0:
        say(f"and {older:,} older; --limit 0 shows all")


@ceylon.command()
@click.argument("target", metavar="GROUP[/TASK]")
@click.option(
    "--status",
    "statuses",
    type=click.Choice(["waiting", "pending", "in_progress", "completed", "failed", "cancelled"]),
    multiple=True,
    help="Only tasks of this status; may be repeated.",
)
@click.option("--failed", "statuses", flag_value="failed", multiple=True, help="Short for --status failed.")
@click.option("--running", "statuses", flag_value="in_progress", multiple=True, help="Short for --status in_progress.")
@click.option(
    "--limit",
    type=click.IntRange(0),
    help=f"Show this many tasks at most; 0: all. Default: {SHOWN}, with --json all.",
)
@JSON
@with_client
async def show(client: Client, target: str, statuses: tuple[str, ...], limit: int | None, json: bool) -> None:
    """
    Show one group with its goals and tasks, or one task.

    DETAIL is the result, the error, the progress, or why the task waits.

    \b
    Examples:
      ceylon show GROUP --failed
      ceylon show GROUP --running --limit 20
    """
    from rq_ceylon.client import why_waiting
    from rq_ceylon.goals import how_settled
    from rq_ceylon.store import statistics

    gid, _, tid = target.partition("/")
    if tid and (statuses or limit is not None):
        raise click.UsageError(f"--status and --limit choose among the tasks of a group: ceylon show {gid} --failed")
    view = await client.group(gid).view()
    if tid:
        tasks, left = [await client.task(target).view()], 0
    else:
        most = (0 if json else SHOWN) if limit is None else limit
        tasks, left = await _first(client, view, statuses, most)
    why = await why_waiting(client, view, tasks)
    if json:
        facts = [{**task_facts(task), "waits": why.get(task.task_id)} for task in tasks]
        click.echo(to_json({"schema": 1, **group_facts(view), "tasks": facts}))
        return
    if not tid:
        say(statistics.summary(view, await statistics.of_group(client.connection, client.keys, gid)))
        for when, follower in view.then.items():
            say(f"  then, when {when}: {follower}")
        if view.is_open:
            say(f"  open: takes tasks (ceylon add {gid} FILE) until it is sealed (ceylon seal {gid})")
        for goal in view.goals:
            say(f"  {goal.title}: {goal.when}: {goal.status}" + (f" ({how_settled(goal)})" if goal.settled else ""))
    table(
        ("TASK", "STATUS", "REASON", "ROLE", "ATTEMPT", "WORKER", "RUN MS", "DETAIL"),
        [_task_row(task, why.get(task.task_id, "")) for task in tasks],
    )
    if left:
        say(f"and {left:,} more; --limit 0 shows all")
    if tid:
        await _show_more(client, gid, tasks[0], why.get(tid, ""))


async def _first(client: Client, view: GroupView, statuses: Sequence[str], most: int) -> tuple[list[TaskView], int]:
    """The first `most` tasks in order (0: all) of these states (none: of any), and how many more there are."""
    from rq_ceylon.store import queries

    connection, keys = client.connection, client.keys
    kept: dict[str, tuple[bool, list[str | int]]] = {}
    last: tuple[bool, list[str | int]] = (True, [chr(sys.maxunicode)])  # what comes behind it is not shown
    async for some in queries.states(connection, keys, view.id):
        for tid, status, _ in some:
            place = (status.is_final, _as_counted(tid))
            if place < last and (not statuses or status in statuses):
                kept[tid] = place
        if most and len(kept) > 20 * most:
            kept = dict(sorted(kept.items(), key=itemgetter(1))[:most])
            last = max(kept.values())
    chosen = sorted(kept, key=kept.__getitem__)[: most or None]
    tasks: list[TaskView] = []
    for at in range(0, len(chosen), queries.SCAN):  # only what is shown is read in full
        tasks += await queries.some_tasks(connection, keys, view.id, chosen[at : at + queries.SCAN])
    wanted = sum(getattr(view.counters, status) for status in set(statuses)) if statuses else view.counters.total
    return tasks, max(0, wanted - len(tasks)) if most else 0


async def _show_more(client: Client, gid: str, task: TaskView, why: str) -> None:
    """Print the facts of one task for which its row has no room."""
    from rq_ceylon.store import queries

    if task.uses:
        say(f"  function: {task.uses}")
    if task.needs:
        needs = (await queries.needs(client.connection, client.keys, gid, [task.task_id])).get(task.task_id, [])
        ended = await queries.results(client.connection, client.keys, gid, needs)
        say(f"  needs: {', '.join(need for need in needs if need not in ended)}")
    if why:
        say(f"  waits: {why}")
    payload = task.result and task.result.payload
    if payload:
        for name in ("arguments", "metadata"):
            if payload.get(name):
                say(f"  {name}: {to_json(payload[name])}")
    errors = await queries.errors(client.connection, client.keys, gid, task.task_id)
    for error in errors:
        run = f"attempt {error.attempt}" if error.attempt else "before it was retried"
        at = clock(error.ended_ms) if error.ended_ms else ""
        say(f"  {run}{error.worker and f', on {error.worker}'}{at and f', at {at}'}: {error}")
    if errors:
        say(errors[-1].traceback.rstrip())


def _task_row(task: TaskView, why: str = "") -> tuple[object, ...]:
    result = task.result
    fraction, message = task.progress
    shown = why or " ".join(filter(None, ("" if fraction is None else f"{fraction:.0%}", message)))
    if result is not None and result.status == "completed":
        shown = to_json(result.value)
    elif error := (result and result.error) or (not shown and task.last_error):
        # What no handler raised, a poison say, has no type.
        shown = ": ".join(filter(None, (error.get("type"), error.get("message"))))
    shown = shown or "-"
    shown = plain(shown, keep="")
    return (
        task.task_id,
        task.status,
        task.reason or "-",
        task.role,
        task.attempt,
        task.worker or "-",
        result.run_ms if result and result.started_ms else "-",
        shown if len(shown) <= 60 else shown[:57] + "...",
    )


def _as_counted(tid: str) -> list[str | int]:
    """An order of ids as people count them: 2 before 10, `page-2` before `page-10`."""
    if tid.isdecimal():
        return ["", int(tid), ""]
    parts = re.split(r"([0-9]+)", tid)
    return [int(part) if number % 2 else part for number, part in enumerate(parts)]


@ceylon.command()
@click.argument("group")
@with_client
async def watch(client: Client, group: str) -> int:
    """
    Follow a group until it has finished.

    It shows progress, the time left, and the running tasks. Without a terminal it prints a plain line per change, or
    per percent of a large group. Ctrl-C stops watching, but the group goes on.
    """
    from rq_ceylon.cli.live import follow

    _, code = await follow(client, client.group(group), "all", None, sys.stdout)
    return code


@ceylon.command()
@click.argument("target", metavar="GROUP[/TASK]")
@click.option(
    "-f",
    "--follow",
    is_flag=True,
    help="Also print each further result as its task ends, until the group has finished.",
)
@with_client
async def results(client: Client, target: str, follow: bool) -> None:
    """Print the results of the tasks that have ended, as JSON Lines."""
    group, _, tid = target.partition("/")
    if tid:
        if follow:
            raise click.UsageError(f"--follow follows a whole group: ceylon results --follow {group}")
        result = (await client.task(target).view()).result
        if result is not None:
            click.echo(to_json(result_facts(group, result)))
        return
    handle = client.group(group)
    if follow:
        async for result in handle.results():
            click.echo(to_json(result_facts(group, result)))
        return
    await handle.view()  # an unknown group is an error, not an empty list
    async for task in handle.tasks():
        if task.result is not None:
            click.echo(to_json(result_facts(group, task.result)))


@ceylon.command()
@click.argument("target", metavar="GROUP[/TASK]")
@with_client
async def cancel(client: Client, target: str) -> int:
    """
    Cancel a group or a task. A task that has not started is cancelled at once; if it runs, its worker is asked to stop
    it.

    Exit code 1 if it had already ended.
    """
    if "/" not in target:
        group = client.group(target)
        view = await group.view()
        problem = _why_not("cancel", view.status, view)
        return _told(target, "" if problem else await group.cancel(), problem and f"group {target} {problem}")
    task = client.task(target)
    word = await task.cancel()
    if word == "ended":  # perhaps cancelled by this very call, if the first answer to it was lost
        word = await task.status()
    problem = f"task {target} had already ended ({word})" if word in ("completed", "failed") else ""
    return _told(target, word, problem)


@ceylon.command()
@click.argument("group")
@with_client
async def remove(client: Client, group: str) -> int:
    """
    Remove a finished group before its retention ends.

    Its results go with it, and its key may be used again. Exit code 1 if it has not finished.
    """
    if await client.group(group).remove():
        click.echo(f"{group}: removed")
        return 0
    view = await client.group(group).view()
    now = "must still tell the groups that depend on it; try again in a few seconds"
    problem = now if view.is_finished else f"is {view.status}; end it first: ceylon cancel {group}"
    return _told(group, "", f"group {group} {problem}")


@ceylon.command()
@click.argument("group")
@click.argument("file", type=click.Path(allow_dash=True))
@with_client
async def add(client: Client, group: str, file: str) -> int:
    """
    Put the tasks of a group file into an open group.

    A task whose id the group knows is not added. Goals and other settings of the file are not used.

    \b
    Example:
      ceylon add GROUP more.yaml
    """
    from rq_ceylon.cli.files import read_groups
    from rq_ceylon.client.adding import with_defaults
    from rq_ceylon.models import counted

    tasks = [with_defaults(task, one.defaults) for one in read_groups(file) for task in one.tasks]
    added = await client.group(group).add(tasks)
    known = len(tasks) - added
    click.echo(f"{group}: {counted(added, 'task')} added" + (f", {known} known before" if known else ""))
    return 0


@ceylon.command()
@click.argument("group")
@with_client
async def seal(client: Client, group: str) -> int:
    """
    Let an open group take no more tasks.

    It finishes once its tasks have ended, and goals that ask for a share can be settled.
    """
    handle = client.group(group)
    was_open = (await handle.view()).is_open
    status = await handle.seal()
    return _told(group, status, "" if was_open else f"group {group} is not open")


ROLE = click.option("--role", metavar="ROLE", help="A role, in place of one group.")


@ceylon.command()
@click.argument("group", required=False)
@ROLE
@with_client
async def pause(client: Client, group: str | None, role: str | None) -> int:
    """
    Pause a group or a role.

    No further task starts, but running tasks and deadlines go on.

    Exit code 1 if the group has not started yet, or starts nothing more anyway.
    """
    return await _hold(client, group, role, "pause")


@ceylon.command()
@click.argument("group", required=False)
@ROLE
@with_client
async def resume(client: Client, group: str | None, role: str | None) -> int:
    """
    Resume a paused group or a role.

    Exit code 1 if the group has not started yet, or starts nothing more.
    """
    return await _hold(client, group, role, "resume")


@ceylon.command()
@click.argument("role")
@click.argument("duration")
@with_client
async def lease(client: Client, role: str, duration: str) -> None:
    """
    Change the lease of a role.

    This is how long a worker of the role that stops responding keeps its tasks. A role that workers serve keeps its
    lease, whatever --lease further workers are started with; only this command changes it. Workers learn of the change
    within 10 s. Until 30 s have passed, or the new lease if that is longer, no task is taken from a worker.

    \b
    Example:
      ceylon lease gpu 30s
    """
    before_s = await client.set_lease(role, duration)
    click.echo(f"role {role}: lease {duration} instead of {before_s:g} s")


async def _hold(client: Client, group: str | None, role: str | None, word: Literal["pause", "resume"]) -> int:
    if group is not None and role is None:
        handle = client.group(group)
        status = await (handle.pause() if word == "pause" else handle.resume())
        problem = _why_not(word, status, await handle.view())
        return _told(group, status, problem and f"group {group} {problem}")
    if role is None or group is not None:
        raise click.UsageError(f"give a GROUP or --role ROLE: ceylon {word} 06h0ql7fl6apk73bpl93")
    was_paused = await _is_paused(client, role)
    await (client.pause_role(role) if word == "pause" else client.resume_role(role))
    click.echo(f"role {role}: {'was not paused' if word == 'resume' and not was_paused else word + 'd'}")
    return 0


def _told(target: str, status: str, problem: str) -> int:
    """Print the status of a group or task, or why nothing could be done. Returns the exit code."""
    if problem:
        say(f"Error: {problem}", err=True)
        return 1
    click.echo(f"{target}: {status}")
    return 0


def _why_not(word: Literal["pause", "resume", "cancel"], status: str, view: GroupView) -> str:
    """Why a group of this status cannot be paused, resumed or cancelled; '' if it can, or is so already."""
    if status == "finished":
        return f"has finished ({view.outcome}); there is nothing left to {word}"
    if word == "cancel" or status in ("active", "paused"):
        return ""
    match status:
        case "waiting":
            others = ", ".join(view.depends_on) or "another group"
            now = f"it waits for {others} and will start by itself"
            return f"has not started: {now}; it can be {word}d after that, or cancelled now"
        case "staging":
            return f"is still being submitted; it can be {word}d once that is done"
        case _:
            return "is closing: its running tasks come to their end, and no further task starts"


async def _is_paused(client: Client, role: str) -> bool:
    """
    Raises:
        NotFoundError: the role was never used, and no worker serves it.
    """
    from rq_ceylon.errors import NotFoundError, guess
    from rq_ceylon.models import check_id
    from rq_ceylon.store import queries

    connection, keys = client.connection, client.keys
    is_paused = (await queries.role_meta(connection, keys, check_id(role, "--role"))).get("paused") == "1"
    known = {*await queries.role_names(connection, keys)}
    known.update(name for worker in await client.workers() for name in worker.roles)
    if role in known or is_paused:
        return is_paused
    there = f"there are: {', '.join(sorted(known)[:20])}" if known else "there is none yet"
    raise NotFoundError(
        f"role {role!r} is not known ({there})" + guess(role, sorted(known), ask='; did you mean "{}"?')
    )


@ceylon.command()
@click.option("--chaos", metavar="[=DURATION]", flag_value="60s", is_flag=False, default=None,
              help="Instead, kill workers at random for DURATION (default 60s), then recount.")  # fmt: skip
@reported
def demo(chaos: str | None) -> None:
    """
    Run the main job on a throw-away server.

    That is two worker processes, a monitor, ten tasks, and a goal at five. With --chaos, four workers and a monitor run
    a larger group while they are killed at random and replaced. An audit follows: exit code 0 if every task counted
    once and the goal settled once, else 1.
    """
    from rq_ceylon.cli.chaos import run_chaos
    from rq_ceylon.dev.demo import run_demo

    try:
        sys.exit(run_demo() if chaos is None else run_chaos(chaos))
    except KeyboardInterrupt:
        click.echo("Stopped; everything that this demo started has ended.", err=True)
        raise


@ceylon.command()
@click.option("--port", type=click.IntRange(1, 65535), help="Also listen on this port of 127.0.0.1.")
@reported
def server(port: int | None) -> None:
    """
    Run a local Redis-compatible server, for development.

    It keeps its data in a folder of yours, and your other commands find it.
    """
    from rq_ceylon.dev.up import run_server

    sys.exit(run_server(port))


@ceylon.command()
@click.argument("app", metavar="MODULE:APP")
@click.option("-c", "--concurrency", type=click.IntRange(1, 10_000), help="How many tasks run at once.")
@logs
@reported
def up(app: str, concurrency: int | None) -> None:
    """
    Run all that one application needs.

    For development: a server, a worker and a monitor. Ctrl-C ends them all. No server is started if the application or
    a variable names a Redis, since clients use that one too.
    """
    from rq_ceylon.dev.up import run_up
    from rq_ceylon.settings import require_unix

    require_unix("ceylon up")
    sys.exit(run_up(app, load_app(app).configured(), concurrency))
