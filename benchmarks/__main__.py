"""Benchmarks of rq_ceylon, on a server of their own: `python -m benchmarks --help`."""

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
from benchmarks.measure import GROUP_TASKS, Queue, Sample, Server, bare, bare_latencies
from rq_ceylon.cli.common import run_async
from rq_ceylon.dev.server import EmbeddedServer

R = TypeVar("R")

PEER_SLOTS = peers.SLOTS
OWN_TASKS_MIN = 4_000
"""Of ours beside a slow peer, so that starting and ending do not show."""

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
        _ours(console, server, options.tasks, options.runs, options.latencies)
        if options.peers is not None:
            _peers(console, server, options.peers or peers.NAMES, options.tasks, options.runs)


# ---- this project ----------------------------------------------------------------------------------------------------
def _ours(console: Console, server: Server, tasks: int, runs: int, latencies: int) -> None:
    """Print what a bare client and what we cost."""
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
    forms: list[tuple[str, str, tuple[int, ...], tuple[int, ...]]] = [
        (f"groups of {GROUP_TASKS}", "in_groups", (tasks, GROUP_TASKS), (50, 100)),
        ("one group", "in_groups", (tasks, tasks), ()),
        ("single, 32 in flight", "singly", (tasks, 32), (50, 100)),
        ("single, one by one", "singly", (max(2, tasks // 10), 1), ()),
    ]
    for name, method, arguments, slots in forms:
        results = _repeated(runs, lambda m=method, a=arguments, s=slots: run_async(_once(server, m, a, s)))  # type: ignore[misc]
        queued = [one for half, _ in results for one in half]
        submitted.add_row(
            name, *_costs(queued, ceilings[0]), f"{_median([one.memory / one.tasks for one in queued]):.0f}"
        )
        for position, some in enumerate(slots):
            run = [half[position] for _, half in results]
            processed.add_row(
                f"{name}; {some} slots", *_costs(run, ceilings[1] if some == 50 else ceilings[2]), _by_script(run)
            )
    console.print(submitted)
    console.print(processed)

    server.empty()
    trips = run_async(bare_latencies(server, latencies))
    delays = run_async(_with_client(Queue(server), "latencies", latencies))
    (trip, _), (p50, p99) = (
        [1000 * found[int(len(found) * share)] for share in (0.5, 0.99)] for found in (trips, delays)
    )
    console.print(
        f"idle worker, submit to start of the handler: p50 {p50:.2f} ms, p99 {p99:.2f} ms; "
        f"p50 is {p50 / trip:.1f} times a bare round trip ({trip:.2f} ms)\n"
    )


async def _once(
    server: Server, method: str, arguments: tuple[int, ...], slots: tuple[int, ...]
) -> tuple[list[Sample], list[Sample]]:
    """Submit, then process with a worker of so many slots, anew for each number of them; at least submit."""
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
def _peers(console: Console, server: Server, names: list[str], tasks: int, runs: int) -> None:
    """Beside each run of another queue stands one of ours, so that both meet the same machine."""
    console.print(
        "Others, with fewer tasks where they are slow. Ours: how many times as fast we are, in a run beside each of "
        f"theirs with at least {OWN_TASKS_MIN:,} tasks: single, in groups of {GROUP_TASKS}, {PEER_SLOTS} slots."
    )
    table = _table("one worker process each", "tasks", "single /s", "ours", "in bulk /s", "ours", "process /s", "ours")
    for name in names:
        console.print(f"[dim]{name} …")
        try:
            peer = peers.Peer(name)
            some = peer.tasks_of(tasks)
            pairs = _repeated(
                runs,
                lambda peer=peer, some=some: (  # type: ignore[misc]
                    peer.measure(server.url, some, server.empty),
                    _same_as_peer(server, max(some, OWN_TASKS_MIN)),
                ),
            )
        except peers.PeerError as error:
            console.print(f"[red]{name} is not measured: {escape(str(error))}")
            continue
        cells: list[str] = []
        for column in range(3):
            rates = [theirs[column] for theirs, _ in pairs if theirs[column]]
            ratios = [ours[column] / theirs[column] for theirs, ours in pairs if theirs[column]]
            cells += [_spread(rates), f"×{_spread(ratios, 1)}"] if rates else ["–", ""]
        table.add_row(f"{name} {peer.version}, {peer.spec.note}", f"{some:,}", *cells)
    console.print(table)


def _same_as_peer(server: Server, tasks: int) -> tuple[float, float, float]:
    """Our rates as `Peer.measure` gives them."""
    (single,), _ = run_async(_once(server, "singly", (tasks, 1), ()))
    (grouped,), (processed,) = run_async(_once(server, "in_groups", (tasks, GROUP_TASKS), (PEER_SLOTS,)))
    return single.rate, grouped.rate, processed.rate


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
