"""The commands. Each imports what it runs only when it runs, so that `--help` is fast."""

from rq_ceylon.cli.main import ceylon
from rq_ceylon.cli.monitor import monitor
from rq_ceylon.cli.submit import submit
from rq_ceylon.cli.worker import worker

__all__ = ["ceylon", "monitor", "submit", "worker"]
