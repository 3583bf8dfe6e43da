"""`python -m rq_ceylon.cli worker|submit|monitor|ceylon …`: the commands without their scripts on PATH."""

import sys

import click

from rq_ceylon import cli

COMMANDS = {
    "worker": (cli.worker, "ceylon-worker"),
    "submit": (cli.submit, "ceylon-submit"),
    "monitor": (cli.monitor, "ceylon-monitor"),
    "ceylon": (cli.ceylon, "ceylon"),
}

if __name__ == "__main__":
    if len(sys.argv) < 2 or sys.argv[1] not in COMMANDS:
        click.echo(f"Usage: python -m rq_ceylon.cli {'|'.join(COMMANDS)} ...", err=True)
        sys.exit(2)
    command, name = COMMANDS[sys.argv.pop(1)]
    command(prog_name=name)
