"""Commands that start other commands: `ceylon demo`, `ceylon server`, `ceylon up`."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path

import click

from rq_ceylon.cli.common import PYTHON, load_app
from rq_ceylon.errors import InvalidInputError
from rq_ceylon.process import CHILD_END_S, SUPERVISED
from rq_ceylon.settings import check_url, configured, masked, place_of, require_unix, server_folder
from rq_ceylon.store.server import EmbeddedServer

GRACE_S = 25.0
"""The grace of a worker that is told no other."""

DEMO = """\
name: Data Processing
description: Process ten data items; the goal is met at five
defaults: {role: processor, duration: 1}
tasks:
  item:
    matrix: {number: {range: [0, 10]}}
    metadata: {item_number: "${{ matrix.number }}"}
goal:
  name: partial-processing-complete
  when: completed >= 5
  success_message: Successfully completed minimum required tasks!
  failure_message: Failed to complete minimum required tasks.
"""
"""The group of examples/data_processing.yaml, which an installed package does not have beside it."""


def run_demo() -> int:
    """Run the main job with the commands a user would run, each said before it runs."""
    require_unix("ceylon demo")
    example = Path(__file__).parents[2] / "examples" / "data_processing.yaml"
    with tempfile.TemporaryDirectory() as folder:
        file = example if example.exists() else Path(folder) / "data_processing.yaml"
        if file is not example:
            file.write_text(DEMO, "utf-8")
        shown = os.path.relpath(file)
        with EmbeddedServer.start() as server:
            click.echo("A throw-away server is running; it ends with this demo.", err=True)
            environ = environ_of(server)
            # On a terminal the bar is drawn where they log.
            quiet = ["--quiet"] if sys.stderr.isatty() else []
            with contextlib.ExitStack() as stack:
                for _ in range(2):
                    stack.enter_context(_running("worker", ["--role", "processor", "-c", "2", *quiet], environ))
                stack.enter_context(_running("monitor", quiet, environ))
                code = _foreground("submit", [shown, "--wait=all"], environ)
                _foreground("ceylon", ["status"], environ)
    return code


def run_server(port: int | None) -> int:
    """A server in the foreground, with a kept folder."""
    require_unix("ceylon server")
    folder = server_folder()
    with EmbeddedServer.start(folder=folder, appendonly=True, port=port) as server:
        click.echo(f"Server at {server.url}, data in {folder}; Ctrl-C ends it", err=True)
        if found := configured():
            url, source = found
            click.echo(
                f"Note: {source} is set to {masked(url)}; commands with that setting do not use this server", err=True
            )
        signals = _signals()
        while not signals:
            time.sleep(0.2)
    return 0


def run_up(app: str, concurrency: int | None) -> int:
    """Worker and monitor until a signal, with a server unless a Redis is configured: clients would use that one."""
    require_unix("ceylon up")
    found = load_app(app).configured()
    slots = ["-c", str(concurrency)] if concurrency else []
    with contextlib.ExitStack() as stack:
        if found is None:
            server = stack.enter_context(EmbeddedServer.start(folder=server_folder(), appendonly=True))
            environ, what = {**os.environ, "CEYLON_REDIS_URL": server.url}, f"server at {server.url}, worker, monitor"
        else:
            environ, what = dict(os.environ), f"worker, monitor; Redis is {_shared_by_all(*found)}"
        signals = _signals()
        worker = stack.enter_context(_running("worker", [app, *slots], environ, signals))
        stack.enter_context(_running("monitor", ["--app", app], environ, signals))
        click.echo(f"Up: {what}. Send tasks from another terminal; Ctrl-C ends all.", err=True)
        while not signals and worker.poll() is None:
            time.sleep(0.2)
    return 0 if signals else worker.returncode


def _shared_by_all(url: str, source: str) -> str:
    """
    Raises:
        InvalidInputError: the URL cannot be used, or means a server of each process.
    """
    if place_of(check_url(url, source)).kind == "embedded":
        raise InvalidInputError(
            f"ceylon up: {url!r} (from: {source}) gives each process a server of its own, so worker and client would "
            "never meet; leave it out, and ceylon up starts one server for all"
        )
    return f"{masked(url)} (from: {source}), so no server was started"


def environ_of(server: EmbeddedServer) -> dict[str, str]:
    """The environment of a demo's commands: its own server and the user's log settings, no other settings."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith("CEYLON_") or "_LOG_" in name}
    return {**kept, "CEYLON_REDIS_URL": server.url}


def start(name: str, arguments: Sequence[str], environ: Mapping[str, str]) -> subprocess.Popen[bytes]:
    """
    Start a command in the background. It has its own session, so that Ctrl-C reaches it through us alone, and it ends
    when we do, whatever ends us.
    """
    return subprocess.Popen(
        _command(name, arguments),
        env={**environ, SUPERVISED: "1"},
        stdin=subprocess.PIPE,
        start_new_session=True,
    )


def end(processes: Sequence[subprocess.Popen[bytes]], *, is_hurried: Callable[[], bool] = lambda: False) -> None:
    """SIGTERM to all, SIGKILL to those that outlive their grace, or at once when it is hurried."""
    for process in processes:
        process.send_signal(signal.SIGTERM)
    limit = time.monotonic() + GRACE_S + CHILD_END_S
    while any(process.poll() is None for process in processes):
        if is_hurried() or time.monotonic() > limit:
            for process in processes:
                process.kill()
        time.sleep(0.02)


def _command(name: str, arguments: Sequence[str]) -> list[str]:
    return [*PYTHON, name, *arguments]


@contextlib.contextmanager
def _running(
    name: str, arguments: Sequence[str], environ: Mapping[str, str], signals: Sequence[int] = ()
) -> Iterator[subprocess.Popen[bytes]]:
    """A command in the background while the block runs; a second one in `signals` kills it."""
    click.echo(f"$ ceylon-{name} {' '.join(arguments)} &", err=True)
    process = start(name, arguments, environ)
    try:
        yield process
    finally:
        end([process], is_hurried=lambda: len(signals) > 1)


def _foreground(name: str, arguments: Sequence[str], environ: Mapping[str, str]) -> int:
    click.echo(f"$ {'ceylon' if name == 'ceylon' else 'ceylon-' + name} {' '.join(arguments)}", err=True)
    process = start(name, arguments, environ)
    try:
        return process.wait()
    except KeyboardInterrupt:
        # It was not asked by the terminal. It is waited for, since it restores what it changed there.
        process.send_signal(signal.SIGINT)
        try:
            process.wait(CHILD_END_S)
        finally:
            process.kill()
        raise


def _signals() -> list[int]:
    """The numbers of the SIGTERMs and Ctrl-Cs from now on, as they come."""
    heard: list[int] = []
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda number, _: heard.append(number))
    return heard
