"""Runs seeds of the simulator and says what they violated, as tests/test_simulator.py does."""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from pathlib import Path

from servers import BINARIES, running_at
from simulator.runner import empty_cells, replayed, report, run, table
from simulator.simulation import Coverage


def main() -> None:
    parser = argparse.ArgumentParser(prog="python tests/simulate.py", description=__doc__)
    parser.add_argument("--seeds", default="1-20", help="such as 1-20 or 7")
    parser.add_argument("--loss", action="store_true", help="Redis loses data too")
    parser.add_argument("--engine", choices=[*BINARIES, "cluster"], default="valkey")
    parser.add_argument("--first", action="store_true", help="end at the first seed that fails")
    parser.add_argument("--replay", type=int, metavar="SEED", help="make the choices of a failed run again")
    options = parser.parse_args()
    low, _, high = options.seeds.partition("-")
    covered = Coverage()
    with tempfile.TemporaryDirectory() as folder, running_at(options.engine, Path(folder)) as (url, move):
        if options.replay is not None:
            began = time.monotonic()
            simulation = replayed(url, options.replay, move)
            report(simulation, time.monotonic() - began)
            sys.exit(bool(simulation.found))
        seeds = range(int(low), int(high or low) + 1)
        failed = run(url, seeds, loss=options.loss, covered=covered, move=move, first=options.first)
    print(table(covered))
    missing = empty_cells(covered)
    if missing:
        print("never struck:", ", ".join(missing))
    sys.exit(bool(failed or missing))


if __name__ == "__main__":
    main()
