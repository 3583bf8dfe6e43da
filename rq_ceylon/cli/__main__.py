"""
`python -m rq_ceylon.cli worker|submit|monitor|ceylon …`: the commands without their scripts on PATH.
"""

import sys

from rq_ceylon import cli

if __name__ == "__main__":
    name = sys.argv.pop(1)
    getattr(cli, name)(prog_name="ceylon" if name == "ceylon" else f"ceylon-{name}")
