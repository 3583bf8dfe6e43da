"""
Runs seeds on a server of its own and says what they violated.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

from rq_ceylon.store.server import EmbeddedServer, wheel_binary

from .faults import SCRIPTS, Fault
from .simulation import Choice, Coverage, Simulation

SCALE_MAX = 16.0
"""A machine so slow that it starves a run gets longer times."""

FAULTS = [Fault.BEFORE, Fault.AFTER, Fault.LOST]


def run(url: str, seeds: Sequence[int], *, loss: bool, covered: Coverage, first: bool = False) -> dict[int, list[str]]:
    """
    Returns what each failing seed, or only the `first`, violated; its choices are kept for `--replay`.
    """
    failed = {}
    scale = 1.0
    for seed in seeds:
        simulation, began = Simulation(url, seed, loss=loss, scale=scale, covered=covered), time.monotonic()
        found = simulation.run()
        while simulation.was_starved and scale < SCALE_MAX:
            scale *= 2
            simulation = Simulation(url, seed, loss=loss, scale=scale, covered=covered)
            found = simulation.run()
        if found:
            failed[seed] = found
            _journal(seed).write_text(json.dumps([scale, *simulation.journal]))
        _report(seed, simulation, time.monotonic() - began, found)
        if failed and first:
            break
    return failed


def _report(seed: int, simulation: Simulation, took_s: float, found: Sequence[str]) -> None:
    tasks = sum(map(len, simulation.ledger.accepted.values()))
    losses = "".join(f", {count} {what}" for what, count in sorted(simulation.losses.items()))
    print(
        f"seed {seed}: {'VIOLATED' if found else 'ok'} {tasks} tasks, {simulation.calls} calls, {took_s:.1f} s, "
        f"{simulation.deaths} deaths, {simulation.naps} sleeps{losses}",
        flush=True,
    )
    for words in found[:8]:
        print(f"    {words}", flush=True)


def _journal(seed: int) -> Path:
    return Path(tempfile.gettempdir(), f"ceylon-simulator-{seed}.json")


def table(covered: Coverage) -> str:
    """
    How often each fault struck each script.
    """
    rows = [f"{'':10}" + "".join(f"{fault:>14}" for fault in FAULTS)]
    rows += [f"{script:10}" + "".join(f"{covered[script, fault]:>14}" for fault in FAULTS) for script in SCRIPTS]
    return "\n".join(rows)


def empty_cells(covered: Coverage) -> list[str]:
    return [f"{script} × {fault}" for script in SCRIPTS for fault in FAULTS if not covered[script, fault]]


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m tests.simulator", description=__doc__)
    parser.add_argument("--seeds", default="1-20", help="such as 1-20 or 7")
    parser.add_argument("--loss", action="store_true", help="Redis loses data too")
    parser.add_argument("--engine", choices=["valkey", "redis"], default="valkey")
    parser.add_argument("--first", action="store_true", help="end at the first seed that fails")
    parser.add_argument("--replay", type=int, metavar="SEED", help="make the choices of a failed run again")
    options = parser.parse_args()
    binary = wheel_binary() if options.engine == "valkey" else shutil.which("redis-server")
    if binary is None:
        sys.exit(f"the engine {options.engine} is not installed")
    os.environ["CEYLON_SERVER_BIN"] = binary
    low, _, high = options.seeds.partition("-")
    covered = Coverage()
    with EmbeddedServer.start() as server:
        if options.replay is not None:
            choices = [Choice(*choice) for choice in json.loads(_journal(options.replay).read_text())]
            simulation, began = (
                Simulation(server.url, options.replay, loss=options.loss, replay=choices),
                time.monotonic(),
            )
            found = simulation.run()
            _report(options.replay, simulation, time.monotonic() - began, found)
            sys.exit(bool(simulation.found))
        seeds = range(int(low), int(high or low) + 1)
        failed = run(server.url, seeds, loss=options.loss, covered=covered, first=options.first)
    print(table(covered))
    missing = empty_cells(covered)
    if missing:
        print("never struck:", ", ".join(missing))
    sys.exit(bool(failed or missing))


if __name__ == "__main__":
    main()
