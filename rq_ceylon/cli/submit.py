"""
`ceylon-submit`.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Sequence
from contextlib import suppress
from typing import TYPE_CHECKING, Any, Literal

import click

from rq_ceylon.cli.common import CONTEXT, EXIT_CODES, reported, run_async, settings, to_json, where
from rq_ceylon.cli.files import in_words, read_groups

if TYPE_CHECKING:
    from rq_ceylon.client import Client, GroupHandle
    from rq_ceylon.models import GroupView, TaskGroup


@click.command("ceylon-submit", context_settings={**CONTEXT, "auto_envvar_prefix": "CEYLON_SUBMIT"}, epilog=EXIT_CODES)
@click.argument("file", metavar="FILE")
@click.option("--dry-run", is_flag=True, help="Check the file, send nothing.")
@click.option("--wait", "wait", flag_value="auto", is_flag=False, default=None, metavar="[=goal|all]",
              help="Wait: bare, for the goals, or without goals for all tasks.")  # fmt: skip
@click.option("--timeout", metavar="DURATION", help="Give up waiting after this; the group goes on.")
@click.option("--json", "as_json", is_flag=True, help="Print JSON, a line for each group.")
@click.option("--require-workers", is_flag=True, help="Refuse if a role has no live worker.")
@click.option("--key", metavar="KEY", help="Submitting the same content again under a key changes nothing.")
@where
@click.version_option(package_name="rq-ceylon")
@reported
def submit(
    file: str,
    dry_run: bool,
    wait: str | None,
    timeout: str | None,
    as_json: bool,
    require_workers: bool,
    key: str | None,
    redis_url: str | None,
    namespace: str | None,
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
    place = settings(redis_url, namespace)
    sys.exit(
        run_async(
            _submit(place.redis_url, place.namespace, groups, wait, limit, as_json=as_json, require=require_workers)
        )
    )


async def _submit(
    url: str,
    namespace: str,
    groups: Sequence[TaskGroup],
    wait: str | None,
    limit: float | None,
    *,
    as_json: bool,
    require: bool,
) -> int:
    from rq_ceylon.client import Client
    from rq_ceylon.groupfile import resolved

    async with Client(url, namespace=namespace) as client:
        handles: list[GroupHandle] = []
        for group in groups:
            group.depends_on = resolved(group, [(one, handle.id) for one, handle in zip(groups, handles, strict=False)])
            handles.append(await client.submit(group, require_workers=require))
            if not as_json:
                await _tell(client, handles[-1], print_id=wait is None)
        code, began = 0, time.monotonic()
        for handle in handles:
            view = await handle.view()
            if wait is not None:
                until: Literal["goal", "all"] = "all" if wait == "all" else "goal"
                left = None if limit is None else max(0.0, round(limit - (time.monotonic() - began), 1))
                view, one_code = await follow(handle, until, left)
                code = code or one_code
            if as_json:
                click.echo(to_json({"schema": 1, "group": group_facts(view), "goals": goal_facts(view)}))
        return code


async def _tell(client: Client, handle: GroupHandle, *, print_id: bool) -> None:
    """
    Say what was submitted, and which of its roles nobody serves.
    """
    view = await handle.view()
    known = " (already submitted)" if handle.repeated else ""
    click.echo(f"Submitted {view.counters.total} tasks as group {handle.id}{known}", err=True)
    roles = {task.role async for task in handle.tasks()} if view.counters.total <= 10_000 else set()
    for words in await client.missing_roles(roles):
        click.echo(f"Note: {words}", err=True)
    if print_id:
        click.echo(handle.id)


async def follow(handle: GroupHandle, until: Literal["goal", "all"], limit: float | None) -> tuple[GroupView, int]:
    """
    Show a bar until what is waited for is there. Returns the group and the exit code.
    """
    import asyncio
    import signal

    from rq_ceylon.client import is_over, succeeded
    from rq_ceylon.errors import WaitTimeoutError

    view = await handle.view()
    current = asyncio.current_task()
    assert current is not None
    loop = asyncio.get_running_loop()
    detached = False

    def detach() -> None:
        nonlocal detached
        detached = True
        current.cancel()

    loop.add_signal_handler(signal.SIGINT, detach)
    told: set[str] = set()
    try:
        with _Bar() as bar:
            async with asyncio.timeout(limit):
                async for view in handle.progress():
                    bar.show(view)
                    for goal in view.goals:
                        if goal.settled and goal.name not in told:
                            told.add(goal.name)
                            bar.say(_settled_words(goal))
                    if is_over(view, until):
                        break
    except TimeoutError:
        raise WaitTimeoutError(f"group {handle.id} is not there within {limit:g} s; it goes on") from None
    except asyncio.CancelledError:
        if not detached:
            raise
        current.uncancel()
        click.echo(f"\nStopped watching; the group goes on. Look with: ceylon show {handle.id}", err=True)
        return view, 130
    finally:
        loop.remove_signal_handler(signal.SIGINT)
    view = await handle.view()
    click.echo(_last_words(view), err=True)
    return view, 0 if succeeded(view) else 1


def _settled_words(goal: Any) -> str:
    from rq_ceylon.goals import parse

    counters = goal.settled.counters
    words = goal.when if goal.call else parse(goal.when, goal.name).words(counters)
    message = goal.success_message if goal.status == "achieved" else goal.failure_message
    why = "deadline passed; " if goal.settled.by == "deadline" else ""
    return f"Goal {goal.status}: {goal.name} ({why}{words})" + (f". {message}" if message else "")


def _last_words(view: GroupView) -> str:
    """
    How it ended, and what the goal spared.
    """
    counters = view.counters
    parts = [f"{counters.completed} completed", f"{counters.failed} failed", f"{counters.cancelled} cancelled"]
    words = f"{view.name}: {', '.join(parts)} of {counters.total}"
    if view.outcome:
        words += f"; {view.outcome}"
    if view.goals and counters.cancelled:
        words += f". {counters.cancelled} tasks never had to run"
    elif counters.open:
        words += f"; {counters.open} tasks go on"
    return words


class _Bar:
    """
    A bar on stderr: live on a terminal, a line per tenth elsewhere.
    """

    def __enter__(self) -> _Bar:
        from rich.console import Console
        from rich.live import Live

        self.console = Console(stderr=True)
        self.live = Live(console=self.console, refresh_per_second=10, transient=True)
        self.tenth = -1
        if self.console.is_terminal:
            self.live.start()
        return self

    def __exit__(self, *_: object) -> None:
        with suppress(Exception):
            self.live.stop()

    def say(self, words: str) -> None:
        self.console.print(words, markup=False, highlight=False, soft_wrap=True)

    def show(self, view: GroupView) -> None:
        counters = view.counters
        if self.console.is_terminal:
            self.live.update(_drawn(view, self.console.width))
            return
        tenth = 10 * counters.ended // max(counters.total, 1)
        if tenth > self.tenth:
            self.tenth = tenth
            self.say(f"{counters.ended}/{counters.total} ended, {counters.in_progress} running")


def _drawn(view: GroupView, width: int) -> Any:
    from rich.text import Text

    from rq_ceylon.goals import parse

    counters = view.counters
    numbers = f" {counters.completed}/{counters.total} completed, {counters.in_progress} running"
    if counters.failed:
        numbers += f", {counters.failed} failed"
    room = max(10, min(50, width - len(numbers) - 3))
    marks = set()
    for goal in view.goals:
        target = None if goal.call else parse(goal.when, goal.name).mark(counters.total)
        if target is not None and counters.total:
            marks.add(min(room - 1, target * room // counters.total))
    done = counters.completed * room // max(counters.total, 1)
    lost = done + (counters.failed + counters.cancelled) * room // max(counters.total, 1)
    text = Text("[")
    for cell in range(room):
        if cell in marks:
            text.append("◆" if cell < done else "◇", style="bold yellow")
        elif cell < done:
            text.append("━", style="green")
        else:
            text.append("━" if cell < lost else "─", style="red" if cell < lost else "dim")
    text.append("]" + numbers)
    return text


def group_facts(view: GroupView) -> dict[str, Any]:
    """
    The `group` of `--json`.
    """
    counters = view.counters
    return {
        "id": view.id,
        "key": view.key,
        "name": view.name,
        "status": view.status,
        "outcome": view.outcome,
        "counters": {name: getattr(counters, name) for name in counters.__slots__},
    }


def goal_facts(view: GroupView) -> list[dict[str, Any]]:
    """
    The `goals` of `--json`.
    """
    found = []
    for goal in view.goals:
        settled = None
        if goal.settled:
            counters = goal.settled.counters
            settled = {
                "at": goal.settled.at_ms,
                "seq": goal.settled.seq,
                "by": goal.settled.by,
                "counters": {name: getattr(counters, name) for name in counters.__slots__},
            }
        found.append({"name": goal.name, "when": goal.when, "status": goal.status, "settled": settled})
    return found
