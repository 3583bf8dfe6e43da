"""
Commands without the half second that a start of Python takes: one process imports the package, and forks for each.

As a program it is that process; it ends with the one that started it.
"""

from __future__ import annotations

import atexit
import functools
import gc
import importlib
import json
import os
import runpy
import signal
import socket
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path

IMPORTED = (
    "rq_ceylon.app",
    "rq_ceylon.cli.live",
    "rq_ceylon.groupfile",
    "rq_ceylon.monitor",
    "rq_ceylon.worker",
    "uvloop",
)
"""What commands import late, and all that these import."""


def run(
    module: str, arguments: list[str], *, folder: Path, environ: Mapping[str, str], stdin: str, limit_s: float
) -> subprocess.CompletedProcess[str]:
    """As `subprocess.run` with `python -m module arguments`, which heeds no variable of Python's but PYTHONPATH."""
    words = ["-m", module, *arguments]
    ours, theirs = socket.socketpair()
    with (
        tempfile.TemporaryFile("w+") as request,
        tempfile.TemporaryFile("w+") as given,
        tempfile.TemporaryFile("w+") as out,
        tempfile.TemporaryFile("w+") as err,
        ours,
        ours.makefile() as replies,
    ):
        json.dump([module, arguments, str(folder), dict(environ)], request)
        given.write(stdin)
        for file in (request, given):
            file.flush()
            file.seek(0)
        with theirs:
            files = [file.fileno() for file in (request, given, out, err)]
            socket.send_fds(_forker(), [b"!"], [*files, theirs.fileno()])
        pid = int(replies.readline())
        ours.settimeout(limit_s)
        try:
            code = int(replies.readline())
        except TimeoutError:
            os.kill(pid, signal.SIGKILL)
            out.seek(0)
            err.seek(0)
            raise subprocess.TimeoutExpired(words, limit_s, out.read(), err.read()) from None
        out.seek(0)
        err.seek(0)
        return subprocess.CompletedProcess(words, code, out.read(), err.read())


@functools.cache
def _forker() -> socket.socket:
    """The socket of the process that forks, which is started with the first command."""
    ours, theirs = socket.socketpair()
    with theirs:
        process = subprocess.Popen([sys.executable, __file__, str(theirs.fileno())], pass_fds=[theirs.fileno()])
    owner = os.getpid()

    def end() -> None:
        ours.close()
        if os.getpid() == owner:
            process.wait()

    atexit.register(end)
    return ours


def _until_asked(control: socket.socket) -> str:
    """Fork for each command; returns in the process that is to run one, with the name of the module."""
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # the system reaps those that wait for a command
    while True:
        asked, files, _, _ = socket.recv_fds(control, 1, 5)
        if not asked:
            sys.exit()
        if os.fork() == 0:
            break
        for file in files:
            os.close(file)
    control.close()
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    request, *standard, reply = files
    if pid := os.fork():
        os.write(reply, f"{pid}\n".encode())
        _, status = os.waitpid(pid, 0)
        os.write(reply, f"{os.waitstatus_to_exitcode(status)}\n".encode())
        os._exit(0)
    with open(request) as asked_for:
        module, arguments, folder, environ = json.load(asked_for)
    for number, descriptor in enumerate(standard):
        os.dup2(descriptor, number)
        os.close(descriptor)
    os.close(reply)
    os.chdir(folder)
    os.environ.clear()
    os.environ.update(environ)
    sys.argv[1:] = arguments
    sys.path[:1] = [folder, *filter(None, environ.get("PYTHONPATH", "").split(os.pathsep))]  # as with `python -m`
    return str(module)


if __name__ == "__main__":
    for name in IMPORTED:
        importlib.import_module(name)
    gc.freeze()  # what is here already stays: no fork copies it to look for garbage
    runpy.run_module(_until_asked(socket.socket(fileno=int(sys.argv[1]))), run_name="__main__", alter_sys=True)
