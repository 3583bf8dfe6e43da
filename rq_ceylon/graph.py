"""
Dependencies inside a group: what a task needs, it needs of the same group, and never of itself, not even by a detour.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from difflib import get_close_matches
from graphlib import CycleError, TopologicalSorter
from heapq import heapify, heappop, heappush
from itertools import islice
from typing import NoReturn

from rq_ceylon.errors import InvalidInputError

MAX_NEEDS = 256
_COMPARED_IDS = 5000  # a guess at a misspelt id takes about 10 µs per known one
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
        remedy = f"a task may need {MAX_NEEDS}; put a task in between that gathers some of them"
        raise InvalidInputError(f"{where}: {task_id!r} needs {len(wanted)} tasks; {remedy}")
    for other in wanted:
        if other == task_id:
            raise InvalidInputError(f"{where}: {task_id!r} needs itself; remove it from its needs")
        if not isinstance(other, str) or other not in needs:
            _refuse_unknown(task_id, other, needs, where)


def _refuse_unknown(task_id: str, other: object, needs: Mapping[str, Sequence[str]], where: str) -> NoReturn:
    near = get_close_matches(str(other)[:64], islice(needs, _COMPARED_IDS), 1)
    remedy = f"did you mean {near[0]!r}?" if near else "name a task of this group"
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
