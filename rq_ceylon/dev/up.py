"""`ceylon server` and `ceylon up`: a local server, and all that one application needs while it is developed."""

from __future__ import annotations

import contextlib
import os
import time

import click

from rq_ceylon.dev.processes import running, signals_heard
from rq_ceylon.dev.server import EmbeddedServer
from rq_ceylon.errors import InvalidInputError
from rq_ceylon.settings import check_url, configured, masked, place_of, require_unix, server_folder


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
        signals = signals_heard()
        while not signals:
            time.sleep(0.2)
    return 0


def run_up(app: str, found: tuple[str, str] | None, concurrency: int | None) -> int:
    """
    Run a worker and a monitor until a signal, and a server unless a Redis is configured: clients would use that one.

    Args:
        app: `module:app`.
        found: URL of the configured Redis, and the setting that names it.
    """
    slots = ["-c", str(concurrency)] if concurrency else []
    with contextlib.ExitStack() as stack:
        if found is None:
            server = stack.enter_context(EmbeddedServer.start(folder=server_folder(), appendonly=True))
            environ, what = {**os.environ, "CEYLON_REDIS_URL": server.url}, f"server at {server.url}, worker, monitor"
        else:
            environ, what = dict(os.environ), f"worker, monitor; Redis is {_shared_by_all(*found)}"
        signals = signals_heard()
        worker = stack.enter_context(running("worker", [app, *slots], environ, signals))
        stack.enter_context(running("monitor", ["--app", app], environ, signals))
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
