"""Processes that run the commands of rq_ceylon: how they start, and how they end."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import time
from collections.abc import Callable, Iterator, Mapping, Sequence

import click

from rq_ceylon.dev.server import EmbeddedServer
from rq_ceylon.process import CHILD_END_S, PYTHON, SUPERVISED

GRACE_S = 25.0
"""The grace of a worker that is told no other."""


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
def running(
    name: str, arguments: Sequence[str], environ: Mapping[str, str], signals: Sequence[int] = ()
) -> Iterator[subprocess.Popen[bytes]]:
    """A command in the background while the block runs; a second one in `signals` kills it."""
    click.echo(f"$ ceylon-{name} {' '.join(arguments)} &", err=True)
    process = start(name, arguments, environ)
    try:
        yield process
    finally:
        end([process], is_hurried=lambda: len(signals) > 1)


def foreground(name: str, arguments: Sequence[str], environ: Mapping[str, str]) -> int:
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


def signals_heard() -> list[int]:
    """The numbers of the SIGTERMs and Ctrl-Cs from now on, as they come."""
    heard: list[int] = []
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda number, _: heard.append(number))
    return heard
