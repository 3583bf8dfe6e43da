"""
The commands as processes of a test: each runs as a user's would, and none outlives the test. And how to wait, for them
or for anything else.
"""

from __future__ import annotations

import asyncio
import contextlib
import inspect
import json
import os
import pty
import re
import signal
import struct
import subprocess
import sys
import termios
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from fcntl import ioctl
from pathlib import Path
from typing import Any

import forked
from click.testing import CliRunner, Result

from rq_ceylon import cli

ROOT = Path(__file__).parent.parent
EXAMPLE = ROOT / "examples" / "data_processing.yaml"
NAMES = {"ceylon": "ceylon", "ceylon-worker": "worker", "ceylon-submit": "submit", "ceylon-monitor": "monitor"}
"""The commands as they are installed, each with its name in `rq_ceylon.cli`."""

LIMIT_S = 30.0
"""How long something that is waited for may take, if nothing else is said."""

Process = subprocess.Popen[str]
Ended = subprocess.CompletedProcess[str]


def run_to_end(
    *words: str | Path,
    folder: Path | None = None,
    environ: Mapping[str, str] | None = None,
    stdin: str = "",
    limit_s: float = 60,
    in_one_stream: bool = False,
) -> Ended:
    """Run a program to its end, however it ends; what it prints is caught, all in `stdout` if in one stream."""
    return subprocess.run(
        words,
        cwd=folder,
        env=environ,
        input=stdin,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT if in_one_stream else subprocess.PIPE,
        text=True,
        timeout=limit_s,
        check=False,
    )


@dataclass
class Commands:
    """
    Runs commands against one server.

    Attributes:
        url: the server; empty: none is configured.
        folder: the working directory; a process's log is a file in it.
    """

    url: str
    folder: Path
    started: list[Process] = field(default_factory=list)

    def environ(self, more: Mapping[str, str] | None = None) -> dict[str, str]:
        known = {"CEYLON_REDIS_URL": self.url} if self.url else {}
        return {**os.environ, **known, "PYTHONPATH": str(ROOT), **(more or {})}

    def run(
        self, name: str, *arguments: str, stdin: str = "", environ: Mapping[str, str] | None = None, limit_s: float = 30
    ) -> Ended:
        """Run a command to its end."""
        own = self.environ(environ)
        words = [name, *arguments]
        return forked.run("rq_ceylon.cli", words, folder=self.folder, environ=own, stdin=stdin, limit_s=limit_s)

    def python(
        self, *words: str, stdin: str = "", environ: Mapping[str, str] | None = None, limit_s: float = 60
    ) -> Ended:
        """Run this Python with such words to its end."""
        own = self.environ(environ)
        return run_to_end(sys.executable, *words, folder=self.folder, environ=own, stdin=stdin, limit_s=limit_s)

    def here(self, name: str, *arguments: str, input: str = "") -> Result:
        """Run a command, under the name that it is installed by, in this process, which spares a second."""
        with contextlib.chdir(self.folder):
            return CliRunner(env=self.environ()).invoke(getattr(cli, NAMES[name]), arguments, input, prog_name=name)

    def json(self, name: str, *arguments: str, stdin: str = "") -> Any:
        """What a command that succeeds prints, read as JSON."""
        ended = self.run(name, *arguments, stdin=stdin)
        assert ended.returncode == 0, ended.stderr
        return json.loads(ended.stdout)

    def start(self, name: str, *arguments: str, environ: Mapping[str, str] | None = None) -> Process:
        """Run a command in the background, in a session of its own."""
        return self.launch("-m", "rq_ceylon.cli", name, *arguments, environ=environ)

    def launch(self, *words: str, environ: Mapping[str, str] | None = None) -> Process:
        """Run this Python with such words in the background, in a session of its own."""
        with self.log(len(self.started)).open("w") as log:
            process = subprocess.Popen(
                [sys.executable, *words],
                cwd=self.folder,
                env=self.environ(environ),
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                text=True,
                start_new_session=True,
            )
        self.started.append(process)
        return process

    def log(self, number: int) -> Path:
        return self.folder / f"process-{number}.log"

    def said(self, process: Process) -> str:
        """What a command in the background has printed so far."""
        return self.log(self.started.index(process)).read_text()

    def end(self) -> None:
        """SIGTERM to all that run, SIGKILL to those that do not heed it."""
        for process in self.started:
            if process.poll() is None:
                process.send_signal(signal.SIGTERM)
        for process in self.started:
            try:
                process.wait(5)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait(5)


@contextlib.contextmanager
def commands_on(url: str, folder: Path) -> Iterator[Commands]:
    commands = Commands(url, folder)
    try:
        yield commands
    finally:
        commands.end()


def on_a_terminal(
    commands: Commands, *arguments: str, once_shown: Callable[[], object] | None, columns: int = 80, **environ: str
) -> tuple[int, str]:
    """
    Run a command to its end on a terminal of that width, and call `once_shown` when it has drawn something (None: press
    Ctrl-C then); returns its exit code and all it drew.
    """
    master, slave = pty.openpty()
    ioctl(slave, termios.TIOCSWINSZ, struct.pack("HHHH", 24, columns, 0, 0))
    own = commands.environ({"TERM": "xterm-256color", **environ})
    process = subprocess.Popen(
        [sys.executable, "-m", "rq_ceylon.cli", *arguments],
        cwd=commands.folder,
        env={name: value for name, value in own.items() if name not in ("COLUMNS", "LINES")},
        stdin=slave,
        stdout=slave,
        stderr=slave,
        start_new_session=True,
    )
    os.close(slave)
    drawn = b""
    try:
        while piece := os.read(master, 65536):
            if b" completed" not in drawn and b" completed" in drawn + piece:
                if once_shown is None:
                    os.killpg(process.pid, signal.SIGINT)
                else:
                    once_shown()
            drawn += piece
    except OSError:  # its last user has closed the terminal
        pass
    finally:
        os.close(master)
    return process.wait(30), drawn.decode()


def plain(drawn: str) -> list[str]:
    return re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]", "", drawn).replace("\r", "\n").split("\n")


def is_alive(pid: int) -> bool:
    """Whether a process runs; one that has ended and was not waited for does not."""
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    state = run_to_end("ps", "-o", "stat=", "-p", str(pid)).stdout
    return bool(state.strip()) and not state.strip().startswith("Z")


def until(condition: Callable[[], object], what: str, limit_s: float = LIMIT_S) -> None:
    """Wait for a condition, and fail in words if it does not come."""
    started = time.monotonic()
    while not condition():
        assert time.monotonic() - started < limit_s, f"not within {limit_s:g} s: {what}"
        time.sleep(0.02)


async def eventually(condition: Callable[[], object], what: str, limit_s: float = LIMIT_S) -> None:
    """As `until`, while the event loop goes on; the condition may be asynchronous."""
    try:
        async with asyncio.timeout(limit_s):
            while True:
                found = condition()
                if await found if inspect.isawaitable(found) else found:
                    return
                await asyncio.sleep(0.01)
    except TimeoutError as error:
        raise AssertionError(f"not within {limit_s:g} s: {what}") from error
