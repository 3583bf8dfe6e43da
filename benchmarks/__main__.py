"""
Benchmarks of rq_ceylon, on a server of their own: `python -m benchmarks --help`.
"""

from __future__ import annotations

import argparse
import gc
import os
import platform
import socket
from collections.abc import Callable
from typing import Any, TypeVar

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from benchmarks import peers
from benchmarks.measure import GROUP_TASKS, Queue, Sample, Server, bare
from rq_ceylon.cli.common import run_async
from rq_ceylon.store.server import EmbeddedServer

R = TypeVar("R")

HELP = """
What a no-op task costs, in one run on one throw-away server, so that the ratios hold where the rates do not.
Nothing else should run on the machine.
"""


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=HELP)
    parser.add_argument("--tasks", type=int, default=20_000, metavar="N", help="tasks per measurement (20000)")
    parser.add_argument("--runs", type=int, default=3, metavar="N", help="measure each N times, show the median (3)")
    parser.add_argument("--latencies", type=int, default=500, metavar="N", help="tasks for the idle latency (500)")
    parser.add_argument(
        "--peers",
        nargs="*",
        choices=peers.NAMES,
        metavar="NAME",
        help=f"compare with other queues, each installed from the package index into {peers.FOLDER.name}/; "
        f"all, or some of {', '.join(peers.NAMES)}",
    )
    options = parser.parse_args()
    console = Console(width=None if os.isatty(1) else 160)
    with EmbeddedServer.start(port=_free_port()) as embedded:
        server = Server(embedded.url)
        url = f"redis://127.0.0.1:{server.redis.config_get('port')['port']}/0"
        server = Server(url)  # over TCP, as everywhere outside this machine, and as the peers
        info = server.redis.info("server")
        engine = f"Valkey {info['valkey_version']}" if "valkey_version" in info else f"Redis {info['redis_version']}"
        console.print(
            f"{engine}, Python {platform.python_version()}, {os.cpu_count()} CPUs; {options.tasks:,} tasks, "
            f"median of {options.runs} (lowest–highest)\n"
        )
        ours = _ours(console, server, options.tasks, options.runs, options.latencies)
        if options.peers is not None:
            _peers(console, server, options.peers or peers.NAMES, options.tasks, options.runs, ours)


# ---- this project ----------------------------------------------------------------------------------------------------
def _ours(console: Console, server: Server, tasks: int, runs: int, latencies: int) -> tuple[float, float, float]:
    """
    Print what we cost, and return our rates: submitted in groups, submitted singly, processed.
    """
    table = _table("bare redis-py, pipelines of", "add /s", "client µs", "read, keep, ack /s", "client µs")
    ceiling: dict[int, list[tuple[Sample, Sample]]] = {}
    for batch in (50, 500):
        found = ceiling[batch] = _repeated(runs, lambda batch=batch: bare(server, tasks, batch))  # type: ignore[misc]
        cells = []
        for half in (0, 1):
            samples = [one[half] for one in found]
            cells += [_spread([one.rate for one in samples]), _spread([one.cpu_us for one in samples], 1)]
        table.add_row(str(batch), *cells)
    console.print(table)
    ceilings = [_median([one[half].rate for one in ceiling[batch]]) for batch, half in ((500, 0), (50, 1), (500, 1))]

    columns = ("/s", "of bare", "process µs", "script µs", "server CPU µs", "round trips", "commands")
    submitted, processed = _table("submit", *columns, "B queued"), _table("process", *columns, "by script, µs")
    rates: dict[str, float] = {}
    forms: list[tuple[str, str, tuple[int, ...], tuple[int, ...]]] = [
        (f"groups of {GROUP_TASKS}", "in_groups", (tasks, GROUP_TASKS), (50, 100)),
        ("one group", "in_groups", (tasks, tasks), ()),
        ("single, 32 in flight", "singly", (tasks, 32), (50, 100)),
        ("single, one by one", "singly", (max(2, tasks // 10), 1), ()),
    ]
    for name, method, arguments, slots in forms:
        results = _repeated(runs, lambda m=method, a=arguments, s=slots: run_async(_once(server, m, a, s)))  # type: ignore[misc]
        queued = [one for half, _ in results for one in half]
        rates[name] = _median([one.rate for one in queued])
        submitted.add_row(
            name, *_costs(queued, ceilings[0]), f"{_median([one.memory / one.tasks for one in queued]):.0f}"
        )
        for position, some in enumerate(slots):
            run = [half[position] for _, half in results]
            rates[f"{name}, {some}"] = _median([one.rate for one in run])
            processed.add_row(
                f"{name}; {some} slots", *_costs(run, ceilings[1] if some == 50 else ceilings[2]), _by_script(run)
            )
    console.print(submitted)
    console.print(processed)

    server.empty()
    queue = Queue(server)
    found_s = run_async(_with_client(queue, "latencies", latencies))
    p50, p99 = (1000 * found_s[int(len(found_s) * share)] for share in (0.5, 0.99))
    console.print(f"idle worker, submit to start of the handler: p50 {p50:.2f} ms, p99 {p99:.2f} ms\n")
    return rates[f"groups of {GROUP_TASKS}"], rates["single, one by one"], rates[f"groups of {GROUP_TASKS}, 100"]


async def _once(
    server: Server, method: str, arguments: tuple[int, ...], slots: tuple[int, ...]
) -> tuple[list[Sample], list[Sample]]:
    """
    Submit, then process with a worker of so many slots, anew for each number of them; at least submit.
    """
    submits, runs = [], []
    for some in slots or (0,):
        server.empty()
        queue = Queue(server)
        submits.append(await _with_client(queue, method, *arguments))
        if some:
            runs.append(await queue.processed(submits[-1].tasks, some))
    return submits, runs


async def _with_client(queue: Queue, method: str, *arguments: Any) -> Any:
    async with queue.app.client() as client:
        return await getattr(queue, method)(client, *arguments)


def _costs(samples: list[Sample], ceiling: float) -> list[str]:
    return [
        _spread([one.rate for one in samples]),
        f"{_median([one.rate for one in samples]) / ceiling:.2f}",
        _spread([one.cpu_us for one in samples], 1),
        _spread([one.script_us.total() / one.tasks for one in samples], 1),
        f"{_median([1e6 * one.server_cpu_s / one.tasks for one in samples]):.1f}",
        f"{_median([one.trips / one.tasks for one in samples]):.3f}",
        f"{_median([one.commands / one.tasks for one in samples]):.3f}",
    ]


def _by_script(samples: list[Sample]) -> str:
    names = sorted({name for one in samples for name in one.script_us})
    costs = {name: _median([one.script_us[name] / one.tasks for one in samples]) for name in names}
    shown = {name: cost for name, cost in costs.items() if cost >= 0.5}
    others = sum(cost for name, cost in costs.items() if name not in shown)
    return ", ".join(f"{name} {cost:.1f}" for name, cost in {**shown, "other": others}.items())


# ---- others ----------------------------------------------------------------------------------------------------------
def _peers(
    console: Console, server: Server, names: list[str], tasks: int, runs: int, ours: tuple[float, float, float]
) -> None:
    in_groups, singly, processed = ours
    console.print("Others, with fewer of the same task where they are slow; ours: ×single, ×groups, ×processing.")
    table = _table("one worker process each", "submit /s", "ours", "in bulk /s", "ours", "process /s", "ours")
    for name in names:
        console.print(f"[dim]{name} …")
        try:
            peer = peers.Peer(name)
            found = _repeated(runs, lambda peer=peer: peer.measure(server.url, tasks, server.empty))  # type: ignore[misc]
        except peers.PeerError as error:
            console.print(f"[red]{name} is not measured: {escape(str(error))}")
            continue
        cells: list[str] = []
        for column, own in enumerate((singly, in_groups, processed)):
            rates = [one[column] for one in found if one[column]]
            cells += [_spread(rates), f"×{own / _median(rates):.1f}"] if rates else ["–", ""]
        table.add_row(f"{name} {peer.version}, {peer.spec.note}", *cells)
    console.print(table)


# ---- words -----------------------------------------------------------------------------------------------------------
def _table(title: str, *columns: str) -> Table:
    table = Table(title, box=None, pad_edge=False, header_style="bold")
    for column in columns:
        table.add_column(column, justify="left" if column.startswith("by") else "right")
    return table


def _repeated(runs: int, measure: Callable[[], R]) -> list[R]:
    found = []
    for _ in range(runs):
        gc.collect()
        found.append(measure())
    return found


def _median(values: list[float]) -> float:
    return sorted(values)[len(values) // 2]


def _spread(values: list[float], digits: int = 0) -> str:
    low, high = min(values), max(values)
    middle = f"{_median(values):,.{digits}f}"
    return middle if len(values) == 1 else f"{middle} ({low:,.{digits}f}–{high:,.{digits}f})"


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


if __name__ == "__main__":
    main()
