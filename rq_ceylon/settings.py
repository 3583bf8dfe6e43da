"""
Where Redis is, and what all commands share. It reads the environment and looks for one socket; it never connects.
"""

from __future__ import annotations

import hashlib
import os
import re
import stat
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import parse_qs, quote, urlsplit

from rq_ceylon.errors import InvalidInputError, RedisError
from rq_ceylon.models import check_id

DEFAULT_NAMESPACE = "ceylon"

SOCKET_PATH_BYTES = 100
"""A unix socket's path must be shorter than this; kernels stop at 104 (macOS) or 108 (Linux)."""

_FORMS = "redis://host:port/db, rediss://host:port/db, unix:///path/to/socket or embedded://"


@dataclass(frozen=True)
class Settings:
    """
    What every command needs to know first.

    Attributes:
        redis_url: `redis://`, `rediss://`, `unix://`, or `embedded://` for a throw-away server.
        redis_source: where it came from: argument, CEYLON_REDIS_URL, REDIS_URL or ceylon server.
        namespace: keeps installations apart that share one Redis.
    """

    redis_url: str
    redis_source: str
    namespace: str = DEFAULT_NAMESPACE


def resolve(
    redis_url: str | None = None, *, namespace: str | None = None, environ: Mapping[str, str] = os.environ
) -> Settings:
    """
    Find Redis: the argument, else CEYLON_REDIS_URL, REDIS_URL, or this user's running `ceylon server`.
    An empty value counts as not given.

    Raises:
        InvalidInputError: the URL or the namespace cannot be used.
        RedisError: none of the four is there.
    """
    checked = check_id(namespace or environ.get("CEYLON_NAMESPACE") or DEFAULT_NAMESPACE, "namespace")
    given = {
        "argument": redis_url,
        "CEYLON_REDIS_URL": environ.get("CEYLON_REDIS_URL"),
        "REDIS_URL": environ.get("REDIS_URL"),
        "ceylon server": _running_server(environ),
    }
    for source, url in given.items():
        if url:
            return Settings(_check_url(url, source), source, checked)
    raise RedisError(
        "No Redis is configured.\n"
        "Start one in another terminal: ceylon server · ceylon up · docker compose up -d redis\n"
        "Or say where it is: --redis redis://host:6379/0, or the variable CEYLON_REDIS_URL."
    )


def masked(url: str) -> str:
    """
    The URL with its password hidden, for messages. Works on malformed URLs too: it rather hides too much.
    """
    hidden = re.sub(r"(?<=[?&]password=)[^&#]*", "***", url)
    # Up to the last @: a password may hold a / or @ that its owner forgot to quote.
    return re.sub(r"(?<=://)([^/?#:@]*):.*@", r"\1:***@", hidden)


def server_folder(environ: Mapping[str, str] = os.environ) -> Path:
    """
    Where this user's `ceylon server` keeps its data: CEYLON_SERVER_DIR, else `ceylon` in the user's state folder.
    """
    if chosen := environ.get("CEYLON_SERVER_DIR"):
        return Path(chosen).expanduser().absolute()
    state = Path(environ.get("XDG_STATE_HOME", ""))
    if not state.is_absolute():  # the XDG specification: a relative path is to be ignored
        state = Path(environ.get("HOME") or Path.home()) / ".local" / "state"
    return state / "ceylon"


def socket_path(folder: Path, environ: Mapping[str, str] = os.environ) -> Path:
    """
    Where the server that keeps its data in `folder` listens: in that folder, or, where that path would be too long
    for a socket, in a short folder of this user's under the temporary folder. The same folder gives the same path.
    """
    inside = folder.resolve() / "redis.sock"
    if fits_socket(inside):
        return inside
    name = hashlib.sha256(os.fsencode(inside)).hexdigest()[:16] + ".sock"
    owner = f"ceylon-{os.getuid()}" if sys.platform != "win32" else "ceylon"
    short = Path(environ.get("TMPDIR") or "/tmp") / owner / name
    return short if fits_socket(short) else Path("/tmp", owner, name)


def fits_socket(path: Path) -> bool:
    return len(os.fsencode(path)) < SOCKET_PATH_BYTES


def socket_url(path: Path) -> str:
    return "unix://" + quote(os.fsencode(path))


def is_private(folder: Path) -> bool:
    """
    Whether `folder` is a real folder that belongs to this user and that nobody else may enter.
    """
    if sys.platform == "win32":
        return False
    status = folder.lstat()
    return stat.S_ISDIR(status.st_mode) and status.st_uid == os.getuid() and not status.st_mode & 0o077


def _running_server(environ: Mapping[str, str]) -> str | None:
    path = socket_path(server_folder(environ), environ)
    try:
        # Someone else's socket at our path would be handed our tasks: only a folder of our own is trusted.
        found = is_private(path.parent) and stat.S_ISSOCK(path.lstat().st_mode)
    except OSError:
        return None
    return socket_url(path) if found else None


def _check_url(url: str, source: str) -> str:
    def refuse(problem: str) -> InvalidInputError:
        return InvalidInputError(f"Redis URL {masked(url)!r} (from: {source}): {problem}; use {_FORMS}")

    try:
        parts = urlsplit(url)
        port = parts.port
    except ValueError:  # its text may quote a piece of the password
        raise refuse("it is malformed (in a password, write / as %2F, # as %23, ? as %3F)") from None
    databases = parse_qs(parts.query).get("db", [])
    match parts.scheme:
        case "redis" | "rediss":
            if not parts.hostname or port == 0:
                raise refuse("it names no host, or port 0")
            databases.append(parts.path.strip("/") or "0")
        case "unix":
            if parts.netloc.rpartition("@")[2] or not parts.path.strip("/"):
                raise refuse("it names no absolute path of a socket")
        case "embedded":
            if url != "embedded://":
                raise refuse("embedded:// takes nothing more")
        case "redis+sentinel" | "redis+cluster":
            raise refuse(f"{parts.scheme}:// is not supported yet")
        case "":
            raise refuse("it has no scheme")
        case _:
            raise refuse(f"{parts.scheme}:// is not known")
    # redis-py takes a path that is no number for database 0, which may be another application's.
    if not all(database.isdecimal() and database.isascii() for database in databases):
        raise refuse("the database is not a number")
    return url
