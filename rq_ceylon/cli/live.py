"""Shows the progress of a group: live on a terminal, as a plain line per change elsewhere."""

from __future__ import annotations

import asyncio
import os
import time
from collections import deque
from collections.abc import Sequence
from typing import TYPE_CHECKING, Literal, TextIO

import click
from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.text import Text

from rq_ceylon.client import is_over, not_over, succeeded
from rq_ceylon.errors import WaitTimeoutError
from rq_ceylon.expression import parse
from rq_ceylon.goals import how_settled
from rq_ceylon.log import plain
from rq_ceylon.models import GoalStatus, counted, span_words
from rq_ceylon.process import SUPERVISED
from rq_ceylon.store import queries
from rq_ceylon.store.statistics import GroupStatistics
from rq_ceylon.views import GoalView, GroupView, TaskView

if TYPE_CHECKING:
    from rq_ceylon.client import Client, GroupHandle

LOOK_S = 1.0
"""How often a terminal is updated while no task ends: the start of a task writes no event."""

RATE_S = 10.0
"""The rate is measured over this many seconds."""


async def follow(
    client: Client,
    handle: GroupHandle,
    until: Literal["goal", "all"],
    limit_s: float | None,
    file: TextIO,
    end: asyncio.Future[GroupView] | None = None,
) -> tuple[GroupView, int]:
    """
    Show a group on `file` until its goals are settled, or until it has finished. Ctrl-C only stops the watching.

    Args:
        end: the result of a wait that was started earlier. If it is done, it is shown, as the group may be gone by now.

    Returns:
        the group and the exit code: 0 if its goals were achieved or, without goals, all its tasks completed; else 1;
        130 after Ctrl-C.

    Raises:
        WaitTimeoutError: this has not happened within `limit_s`.
    """
    current = asyncio.current_task()
    assert current is not None
    display = Display(client, file)
    if end is not None and end.done():
        view = end.result()
        display.say(_last_words(view))
        return view, 0 if succeeded(view) else 1
    view = await handle.view()
    try:
        async with asyncio.timeout(limit_s):
            view = await _show(handle, view, display, until)
    except TimeoutError:
        raise WaitTimeoutError(
            f"{not_over(handle.id, view, until)} within the --timeout; it goes on.\n"
            f"Come back with: ceylon watch {handle.id}"
        ) from None
    except asyncio.CancelledError:  # only Ctrl-C cancels this task
        current.uncancel()
        if SUPERVISED not in os.environ:  # else the group ends with the command that started this one
            click.echo(f"Stopped watching; the group goes on.\nCome back with: ceylon watch {handle.id}", err=True)
        return view, 130
    display.say(_last_words(view))
    return view, 0 if succeeded(view) else 1


async def _show(handle: GroupHandle, view: GroupView, display: Display, until: Literal["goal", "all"]) -> GroupView:
    """Show every change until the wait is over; on a terminal, also refresh the time regularly."""
    changes = handle.progress()
    change = asyncio.ensure_future(anext(changes))
    try:
        with display:
            await display.show(view)
            while not is_over(view, until):
                done, _ = await asyncio.wait({change}, timeout=LOOK_S if display.is_live else None)
                if done:
                    view = change.result()
                    change = asyncio.ensure_future(anext(changes))
                else:
                    view = await handle.view()
                await display.show(view)
    finally:
        change.cancel()
        await asyncio.gather(change, return_exceptions=True)
    return view


class Display:
    """Shows a group. Reads its events once, as they come, for rates and numbers per role."""

    def __init__(self, client: Client, file: TextIO) -> None:
        self._client = client
        self._console = Console(file=file, highlight=False, markup=False)
        self.is_live = file.isatty() and not self._console.is_dumb_terminal
        self._console.soft_wrap = not self.is_live  # people read whole words, programs whole lines
        self._live = Live(console=self._console, auto_refresh=False, transient=True)
        self._statistics = GroupStatistics()
        self._ended: deque[tuple[float, int]] = deque()
        self._told: set[str] = set()
        self._step = ""

    def __enter__(self) -> None:
        if self.is_live:
            self._live.start()

    def __exit__(self, *_: object) -> None:
        self._live.stop()

    def say(self, words: str | Text) -> None:
        self._console.print(plain(words) if isinstance(words, str) else words)

    async def show(self, view: GroupView, below: Sequence[Text] = ()) -> None:
        """
        Bring it up to date.

        Args:
            below: what a terminal shows below the bar; by default numbers per role, and what runs.
        """
        connection, keys = self._client.connection, self._client.keys
        await self._statistics.read_on(connection, keys, view.id, view.events)
        now = time.monotonic()
        self._ended.append((now, view.counters.ended))
        while now - self._ended[0][0] > RATE_S:
            self._ended.popleft()
        self._told &= {goal.name for goal in view.goals if goal.settled}  # a retry may have unsettled some
        for goal in view.goals:
            if goal.settled and goal.name not in self._told:
                self._told.add(goal.name)
                self.say(settled_words(goal))
        if self.is_live:
            below = below or self._below(await queries.running(connection, keys, view.id))
            self._live.update(self._drawn(view, below), refresh=True)
            return
        step = f"{view.status} {100 * view.counters.ended // max(view.counters.total, 1)}"
        if step != self._step:  # a line per task that ends, or per hundredth of a large group
            self._step = step
            self.say(_numbers(view))

    @property
    def _rate(self) -> float:
        (began, before), (now, ended) = self._ended[0], self._ended[-1]
        return (ended - before) / (now - began) if now > began else 0.0

    def _drawn(self, view: GroupView, below: Sequence[Text]) -> RenderableType:
        width = self._console.width - 3  # room for the ^C that a terminal shows, or it would add a line
        counters = view.counters
        head = f"{view.name}: {view.status}, {_numbers(view)}"
        pace = [f"{self._rate:.1f}/s"] if self._rate else []
        marks = _marks(view)
        for what, left in [
            *((f"{goal}", mark - counters.completed) for goal, mark in marks.items() if mark > counters.completed),
            ("all", counters.open),
        ]:
            if self._rate and left:
                pace.append(f"{what} in {span_words(left / self._rate)}")
        lines = [_line(head), self._bar(view, width, set(marks.values())), _line(", ".join(pace)), *below]
        for line in lines:
            line.truncate(width, overflow="ellipsis")
        return Group(*lines)

    def _below(self, running: Sequence[TaskView]) -> list[Text]:
        lines = []
        for name, role in sorted(self._statistics.roles.items()):
            words = [f"{number} {outcome}" for outcome, number in sorted(role.outcomes.items())]
            words += [counted(role.retries, "retry", "retries")] if role.retries else []
            words += [f"run {role.run}"] if role.run.count else []
            lines.append(_line(f"{name}: {', '.join(words)}"))
        if running:
            lines.append(_line("running: " + ", ".join(_running_words(task) for task in running)))
        return lines

    def _bar(self, view: GroupView, width: int, targets: set[int]) -> Text:
        """A bar with cells for completed tasks, for failed or cancelled ones and for the rest, and marks of goals."""
        room = max(10, width - 2)
        counters, total = view.counters, max(view.counters.total, 1)
        marks = {min(room - 1, target * room // total) for target in targets}
        done = counters.completed * room // total
        lost = counters.ended * room // total
        left, full, bad, open_mark, done_mark = "─━╳◇◆" if self._console.encoding.startswith("utf") else "-=x|+"
        text = Text("[")
        for cell in range(room):
            if cell in marks:
                text.append(done_mark if cell < done else open_mark, "bold yellow")
            elif cell < done:
                text.append(full, "green")
            else:
                text.append(bad if cell < lost else left, "red" if cell < lost else "dim")
        return text.append("]")


def _line(words: str) -> Text:
    return Text(plain(words, keep=""))


def _numbers(view: GroupView) -> str:
    counters = view.counters
    words = f"{counters.completed}/{counters.total} completed, {counters.in_progress} running"
    for number, word in ((counters.failed, "failed"), (counters.cancelled, "cancelled")):
        words += f", {number} {word}" if number else ""
    return words


def _marks(view: GroupView) -> dict[str, int]:
    """The number of completed tasks at which each goal is achieved, for goals that have such a number."""
    found = {}
    for goal in view.goals:
        mark = None if goal.call else parse(goal.when, goal.name).mark(view.counters.total)
        if mark is not None:
            found[goal.name] = mark
    return found


def settled_words(goal: GoalView) -> str:
    """A settled goal with the numbers that settled it, and its success or failure message."""
    message = goal.success_message if goal.status is GoalStatus.ACHIEVED else goal.failure_message
    return f"Goal {goal.status}: {goal.name} ({how_settled(goal)})" + (f". {message}" if message else "")


def _running_words(task: TaskView) -> str:
    fraction, message = task.progress
    words = [f"{task.task_id} on {task.worker}", "" if fraction is None else f"{fraction:.0%}", message]
    return " ".join(word for word in words if word)


def _last_words(view: GroupView) -> str:
    """Say how the group ended."""
    counters = view.counters
    parts = [f"{counters.completed} completed", f"{counters.failed} failed", f"{counters.cancelled} cancelled"]
    words = f"{plain(view.name, keep='')}: {', '.join(parts)} of {counters.total}"
    if view.outcome:
        words += f"; {view.outcome}"
    if counters.open:
        words += f"; {counted(counters.open, 'task goes on', 'tasks go on')}"
    return words
