"""Runs seeds, each with times as long as this machine needs, and counts what struck where."""

from __future__ import annotations

import json
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path

from .faults import SCRIPTS, Fault
from .simulation import SCALE_MAX, Choice, Coverage, Simulation

FAULTS = [Fault.BEFORE, Fault.AFTER, Fault.LOST]

Move = Callable[[int], object]


def simulated(
    url: str,
    seed: int,
    *,
    loss: bool = False,
    scale: float = 1.0,
    move: Move | None = None,
    covered: Coverage | None = None,
) -> Simulation:
    """Returns a run that this machine was fast enough for, if need be with longer times."""
    while True:
        simulation = Simulation(url, seed, loss=loss, scale=scale, move=move, covered=covered)
        simulation.run()
        if not simulation.was_starved or scale >= SCALE_MAX:
            return simulation
        scale *= 2


def run(
    url: str, seeds: Sequence[int], *, loss: bool, covered: Coverage, move: Move | None = None, first: bool = False
) -> dict[int, list[str]]:
    """Returns what each failing seed, or only the `first`, violated; its choices are kept for `replayed`."""
    failed = {}
    scale = 1.0
    for seed in seeds:
        began = time.monotonic()
        simulation = simulated(url, seed, loss=loss, scale=scale, move=move, covered=covered)
        if simulation.found:
            failed[seed] = simulation.found
            _journal(seed).write_text(json.dumps([loss, simulation.scale, *simulation.journal]))
        report(simulation, time.monotonic() - began)
        scale = max(1.0, simulation.scale / 2)
        if failed and first:
            break
    return failed


def replayed(url: str, seed: int, move: Move | None = None) -> Simulation:
    """The same choices and faults as in a failed run, at the same times."""
    loss, scale, *choices = json.loads(_journal(seed).read_text())
    replay = [Choice(*choice) for choice in choices]
    simulation = Simulation(url, seed, loss=loss, scale=scale, move=move, replay=replay)
    simulation.run()
    return simulation


def report(simulation: Simulation, took_s: float) -> None:
    tasks = sum(map(len, simulation.ledger.accepted.values()))
    lost = sum(choice.struck == Fault.LOST for choice in simulation.journal)
    losses = "".join(f", {count} {what}" for what, count in sorted(simulation.losses.items()))
    scale = f" at {simulation.scale:g} times the times" if simulation.scale > 1 else ""
    verdict = "starved, which proves nothing:" if simulation.was_starved else "VIOLATED" if simulation.found else "ok"
    print(
        f"seed {simulation.seed}: {verdict} {tasks} tasks, {simulation.calls} calls, "
        f"{took_s:.1f} s{scale}, {lost} lost replies, {simulation.deaths} deaths, {simulation.naps} sleeps{losses}",
        flush=True,
    )
    for words in simulation.found[:8]:
        print(f"    {words}", flush=True)


def _journal(seed: int) -> Path:
    return Path(tempfile.gettempdir(), f"ceylon-simulator-{seed}.json")


def table(covered: Coverage) -> str:
    """How often each fault struck each script."""
    rows = [f"{'':10}" + "".join(f"{fault:>14}" for fault in FAULTS)]
    rows += [f"{script:10}" + "".join(f"{covered[script, fault]:>14}" for fault in FAULTS) for script in SCRIPTS]
    return "\n".join(rows)


def empty_cells(covered: Coverage) -> list[str]:
    return [f"{script} × {fault}" for script in SCRIPTS for fault in FAULTS if not covered[script, fault]]
