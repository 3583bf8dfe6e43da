"""
Dependencies inside a group: what a task needs, it needs of the same group, and never of itself, not even by a detour.
Also their picture.
"""

from __future__ import annotations

import re
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from graphlib import CycleError, TopologicalSorter
from heapq import heapify, heappop, heappush
from typing import NoReturn

from rq_ceylon.errors import InvalidInputError, guess

MAX_NEEDS = 256
FEWER_NEEDS = (
    f"a task may need {MAX_NEEDS}; put it into a second group with depends_on, which waits for the whole first group"
)
_SHOWN_IDS = 10


def in_order(needs: Mapping[str, Sequence[str]], where: str) -> list[str]:
    """
    Order tasks so that each comes after all that it needs; otherwise the given order stays: next is always the
    foremost task that can be.

    Args:
        needs: for every task of the group, in the order given, the ids it needs; naming one twice is harmless.
        where: what the tasks are called where the user wrote them; errors begin with it.

    Raises:
        InvalidInputError: a task needs itself, an unknown task or more than 256, or tasks need each other in a circle.
    """
    for task_id, wanted in needs.items():
        if wanted:
            _check(task_id, wanted, needs, where)
    sorter = TopologicalSorter(needs)
    try:
        sorter.prepare()
    except CycleError as error:
        _refuse_cycle(error.args[1], needs, where)
    position = {task_id: index for index, task_id in enumerate(needs)}
    ids = list(needs)
    ready = [position[task_id] for task_id in sorter.get_ready()]
    heapify(ready)
    ordered = []
    while ready:
        task_id = ids[heappop(ready)]
        ordered.append(task_id)
        sorter.done(task_id)
        for freed in sorter.get_ready():
            heappush(ready, position[freed])
    return ordered


def _check(task_id: str, wanted: Sequence[str], needs: Mapping[str, Sequence[str]], where: str) -> None:
    if isinstance(wanted, str):
        raise InvalidInputError(f"{where}: the needs of {task_id!r} are the text {wanted!r}; give a list of ids")
    if len(wanted) > MAX_NEEDS:
        raise InvalidInputError(f"{where}: {task_id!r} needs {len(wanted):,} tasks; {FEWER_NEEDS}")
    for other in wanted:
        if other == task_id:
            raise InvalidInputError(f"{where}: {task_id!r} needs itself; remove it from its needs")
        if not isinstance(other, str) or other not in needs:
            remedy = guess(str(other), needs, "name a task of this group", "did you mean {!r}?")
            raise InvalidInputError(f"{where}: {task_id!r} needs {other!r}, which is not in the group; {remedy}")


def _refuse_cycle(cycle: Sequence[str], needs: Mapping[str, Sequence[str]], where: str) -> NoReturn:
    # graphlib gives each before what needs it, the first again at the end. Shown: each before what it needs, from the
    # one that the user wrote first.
    around = list(reversed(cycle))[:-1]
    members = set(around)
    start = around.index(next(task_id for task_id in needs if task_id in members))
    around = around[start:] + around[: start + 1]
    if len(around) > _SHOWN_IDS:
        around = [*around[: _SHOWN_IDS - 2], f"… {len(around) - _SHOWN_IDS + 1} more …", around[-1]]
    circle = " -> ".join(around)
    raise InvalidInputError(f"{where}: tasks need each other in a circle: {circle}; remove one of these needs")


# ---- for people ------------------------------------------------------------------------------------------------------
MAX_TASKS_DRAWN = 60
MAX_BOXES, MAX_ARROWS = 250, 500
"""More is no picture; and Mermaid draws at most 500 arrows."""

_COLOURS = {
    "waiting": "#eeeeee",
    "pending": "#fff3c4",
    "in_progress": "#bfdbfe",
    "completed": "#bbf7d0",
    "failed": "#fecaca",
    "cancelled": "#d4d4d8",
}


@dataclass
class Drawing:
    """A group to be drawn. `depends_on` names other drawings by their ids, or groups that are not drawn."""

    id: str
    title: str
    depends_on: Sequence[str] = ()
    needs: dict[str, Sequence[str]] = field(default_factory=dict)
    roles: dict[str, str] = field(default_factory=dict)
    states: dict[str, str] = field(default_factory=dict)

    def add(self, task_id: str, needs: Sequence[str], role: str, state: str = "") -> None:
        self.needs[task_id], self.roles[task_id] = needs, role
        if state:
            self.states[task_id] = state


def draw(drawings: Sequence[Drawing]) -> str:
    """
    A Mermaid flowchart: an arrow leads from what is needed to what needs it. A group of more than 60 tasks is drawn by
    kind: one box for the tasks of a role that need the same kinds.

    Raises:
        InvalidInputError: more than 250 boxes or 500 arrows even so.
    """
    lines, arrows, coloured = [], [], defaultdict[str, list[str]](list)
    names = {drawing.id for drawing in drawings}
    outside: dict[str, str] = {}
    for drawing in drawings:
        boxes, inner = _boxes(drawing)
        lines.append(f"  subgraph {drawing.id}[{_quoted(drawing.title)}]")
        for at, box in enumerate(boxes):
            lines.append(f"    {drawing.id}t{at}[{_quoted(_label(box, drawing.states))}]")
            states = {drawing.states.get(task_id, "") for task_id in box}
            if len(states) == 1 and (state := states.pop()):
                coloured[state].append(f"{drawing.id}t{at}")
        lines.append("  end")
        arrows += [f"  {drawing.id}t{start} --> {drawing.id}t{end}" for start, end in inner]
        for other in drawing.depends_on:
            start = other if other in names else outside.setdefault(other, f"x{len(outside)}")
            arrows.append(f"  {start} --> {drawing.id}")
    lines += [f"  {name}([{_quoted(f'group {gid}')}])" for gid, name in outside.items()]
    if len(lines) > MAX_BOXES + 2 * len(drawings) or len(arrows) > MAX_ARROWS:
        raise InvalidInputError(
            f"graph: {len(lines) - 2 * len(drawings)} boxes and {len(arrows)} arrows, {MAX_BOXES} and {MAX_ARROWS} can "
            "be drawn, even with one box per kind of task; draw a smaller group, or a part of the file"
        )
    for state, marked in coloured.items():
        arrows.append(f"  classDef {state} fill:{_COLOURS.get(state, '#ffffff')},color:#111111")
        arrows.append(f"  class {','.join(marked)} {state}")
    return "\n".join(["flowchart LR", *lines, *arrows, ""])


def _boxes(drawing: Drawing) -> tuple[list[list[str]], list[tuple[int, int]]]:
    """The tasks of each box, and the arrows between boxes."""
    known = {task_id: [need for need in needs if need in drawing.needs] for task_id, needs in drawing.needs.items()}
    is_folded = len(known) > MAX_TASKS_DRAWN
    boxes: list[list[str]] = []
    box_of: dict[str, int] = {}
    kinds: dict[object, int] = {}
    for task_id in in_order(known, "tasks"):
        above = frozenset(box_of[need] for need in known[task_id])
        kind = (drawing.roles[task_id], above) if is_folded else task_id
        box_of[task_id] = kinds.setdefault(kind, len(boxes))
        if box_of[task_id] == len(boxes):
            boxes.append([])
        boxes[box_of[task_id]].append(task_id)
    arrows = {(box_of[need], box_of[task_id]) for task_id, needs in known.items() for need in needs}
    return boxes, sorted(arrows)


def _label(box: Sequence[str], states: Mapping[str, str]) -> str:
    if len(box) == 1:
        return box[0]
    counts = Counter(states[task_id] for task_id in box if task_id in states)
    found = "".join(f", {number} {state}" for state, number in counts.items())
    return f"{box[0]} … {box[-1]} ({len(box)} tasks{found})"


def _quoted(text: str) -> str:
    """As Mermaid reads it: anything that could end the text, or be markup, by its number."""
    return '"' + re.sub(r"[^\w .,:()…/-]", lambda found: f"#{ord(found[0])};", text[:200]) + '"'
