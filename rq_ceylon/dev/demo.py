"""`ceylon demo`: the main job on a throw-away server."""

from __future__ import annotations

import contextlib
import os
import sys
import tempfile
from pathlib import Path

import click

from rq_ceylon.dev.processes import environ_of, foreground, running
from rq_ceylon.dev.server import EmbeddedServer
from rq_ceylon.settings import require_unix

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
                    stack.enter_context(running("worker", ["--role", "processor", "-c", "2", *quiet], environ))
                stack.enter_context(running("monitor", quiet, environ))
                code = foreground("submit", [shown, "--wait=all"], environ)
                foreground("ceylon", ["status"], environ)
    return code
