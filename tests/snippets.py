"""
What documentation shows, taken at its word: commands behind `$ ` are run, and below each stands what it prints. A block
without a command is what the one in the other terminal prints meanwhile.
"""

from __future__ import annotations

import os
import re
import shlex
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import groupby
from pathlib import Path

from commands import NAMES, Commands, run_to_end, until

from rq_ceylon.app import Ceylon
from rq_ceylon.errors import RedisError

VARIES = (
    (re.compile(r"\b(?:0[0-9a-z]{19}|k[0-9a-f]{20})\b"), "GROUP"),
    (re.compile(r"\b[\w.-]+-[0-9a-f]{8}\b"), "WORKER"),
    (re.compile(r'File "[^"]*/'), 'File "'),
    (re.compile(r"unix://[^\s,]+"), "URL"),
    (re.compile(r"\d+(\.\d+)?( (ms|s|min))?\b"), "0"),
    (re.compile(r"\(0 (of 0 completed|completed, 0 needed)\)"), "(GOAL)"),
    (re.compile(r"\s+"), " "),
)
"""What differs from run to run, or is a matter of width."""

GROUP = VARIES[0][0]

STAYS = r"ceylon up |ceylon-monitor|ceylon-worker (?!.*--burst)"
"""Commands that do not end by themselves; in another terminal, or with & behind them."""


ELSEWHERE = ""
"""The command of a step that runs none: it looks at what the last one in the background has printed."""


@dataclass
class Step:
    command: str
    printed: list[str]


def steps(text: str) -> list[Step]:
    """The commands of a console block, each with the lines below it."""
    found: list[Step] = []
    for line in text.splitlines():
        if line.startswith("$ "):
            found.append(Step(line[2:].partition("  #")[0].rstrip(), []))
        elif line.strip():
            found = found or [Step(ELSEWHERE, [])]
            found[-1].printed.append(line)
    return found


def same(line: str) -> str:
    """A line without what differs from run to run."""
    for pattern, instead in VARIES:
        line = pattern.sub(instead, line)
    return line.strip()


@dataclass
class Shell:
    """
    Runs steps one after another in the folder of `commands`.

    Attributes:
        groups: ids as they are written, and what they are in this run.
        workers: how many were started in the background.
    """

    commands: Commands
    groups: dict[str, str] = field(default_factory=dict)
    workers: int = 0
    _seen: int = 0

    def run(self, step: Step, *, code: int = 0) -> None:
        """Run a step; what it prints, in either stream, must have the lines below it, in their order."""
        command = GROUP.sub(lambda found: self.groups.get(found[0], found[0]), step.command)
        if re.match(STAYS, command):
            self._start(Step(command.removesuffix("&"), step.printed))
            return
        if command == ELSEWHERE:
            self._until_logged("the command in the other terminal", len(self.commands.started) - 1, step.printed)
            return
        self._until_workers_live()
        first = command.partition(" ")[0]
        # A worker leaves by `os._exit`, which would end the test too.
        alone = first in NAMES and first != "ceylon-worker" and not set(command) & set("|<>;$")
        if alone:
            done = self.commands.here(*shlex.split(command))
            printed, ended = done.output, done.exit_code
        else:
            printed, ended = self._in_shell(command)
        assert ended == code, f"$ {command}\n{printed}"
        lines = iter(printed.splitlines())
        for wanted, alike in groupby(step.printed, same):  # how often a number changes is a matter of speed
            found = next((line for line in lines if same(line) == wanted), None)
            assert found is not None, f"$ {command}\nprints no line as {wanted!r}, or not in that order:\n{printed}"
            self.groups.update(zip(GROUP.findall(next(alike)), GROUP.findall(found), strict=True))

    def _start(self, step: Step) -> None:
        """A command that runs until the end of the test, once it has logged what it is to."""
        name, *arguments = shlex.split(step.command)
        self.commands.start(NAMES[name], *arguments)
        self.workers += {"ceylon-worker": _processes(arguments), "ceylon-monitor": 1, "ceylon": 2}[name]
        self._until_logged(name, len(self.commands.started) - 1, step.printed)

    def _until_logged(self, name: str, number: int, printed: Sequence[str]) -> None:
        log = self.commands.log(number)
        for wanted in map(same, printed):
            until(lambda: wanted in map(same, log.read_text().splitlines()), f"{name} logs {wanted}")  # noqa: B023

    def _in_shell(self, command: str) -> tuple[str, int]:
        environ = self.commands.environ({"PATH": f"{self._bin()}:{os.environ['PATH']}"})
        ended = run_to_end("sh", "-c", command, folder=self.commands.folder, environ=environ, in_one_stream=True)
        return ended.stdout, ended.returncode

    def _bin(self) -> Path:
        """A folder with the commands as an installed package has them, of this very source."""
        folder = self.commands.folder / "bin"
        if not folder.exists():
            folder.mkdir()
            scripts = {name: f"-m rq_ceylon.cli {ours}" for name, ours in NAMES.items()}
            for name, arguments in {**scripts, "python": "-W error"}.items():
                (folder / name).write_text(f'#!/bin/sh\nexec {shlex.quote(sys.executable)} {arguments} "$@"\n')
                (folder / name).chmod(0o755)
        return folder

    def _until_workers_live(self) -> None:
        if self.workers > self._seen:
            until(lambda: self._live() >= self.workers, f"{self.workers} workers live")
            self._seen = self.workers

    def _live(self) -> int:
        try:
            with Ceylon(self.commands.url or None).sync_client() as client:
                return len(client.workers())
        except RedisError:  # `ceylon up` has not started its server yet
            return 0


def _processes(arguments: Sequence[str]) -> int:
    return int(arguments[arguments.index("--processes") + 1]) if "--processes" in arguments else 1
