"""
Finds the URL of Redis and the settings that all commands share. It reads the environment and looks for one socket; it
never connects.
"""

from __future__ import annotations

import hashlib
import importlib.util
import os
import re
import stat
import sys
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal
from urllib.parse import parse_qs, parse_qsl, quote, unquote, urlencode, urlsplit

from rq_ceylon.errors import InvalidInputError, RedisError
from rq_ceylon.models import DEFAULT_RETENTION_S, Duration, check_namespace, seconds

DEFAULT_NAMESPACE = "ceylon"

SOCKET_PATH_BYTES = 100
"""A unix socket's path must be shorter than this; kernels stop at 104 (macOS) or 108 (Linux)."""

_FORMS = (
    "redis://host:port/db, rediss://host:port/db, unix:///path/to/socket, "
    "redis+sentinel://host:26379,host2:26379/primary-name/db, redis+cluster://host:port,host2:port or embedded://"
)

REMEDIES = (
    "Start one in another terminal: ceylon server (or ceylon up MODULE:APP, with a worker).\n"
    'Or give its URL: the variable CEYLON_REDIS_URL, the option --redis of a command, or Ceylon("redis://host:6379/0").'
)

_OPTIONS = {"db", "username", "password", "client_name", "socket_connect_timeout", "socket_keepalive"}
_TLS_FILES = {"ssl_ca_certs", "ssl_certfile", "ssl_keyfile"}
_TLS_OPTIONS = _TLS_FILES | {
    "ssl_ca_path",
    "ssl_cert_reqs",
    "ssl_check_hostname",
    "ssl_ciphers",
    "ssl_min_version",
    "ssl_password",
}
_YES_OR_NO = {"yes", "no", "true", "false", "1", "0"}
_TLS_VERSIONS = {"TLSv1_2": 771, "TLSv1_3": 772}
"""The names of `ssl.TLSVersion`, and the numbers by which redis-py knows them."""

_OPEN_OPTIONS = {*_OPTIONS, *_TLS_OPTIONS, "sentinel_username"} - {"password", "ssl_password"}
"""Options whose values messages may show."""

_HOST = r"(\[[0-9a-fA-F:.%]*\]|[\w.-]*)(:\d{0,5})?"
SENTINEL_OPTIONS = {"sentinel_username": "username", "sentinel_password": "password"}
"""Options for the user of the Sentinels themselves; without them, Sentinels are asked without a user."""


@dataclass(frozen=True)
class Settings:
    """
    The settings that every command needs first.

    Attributes:
        redis_url: `redis://`, `unix://`, `redis+sentinel://` or `redis+cluster://` (with TLS `rediss…`), or
            `embedded://` for a throw-away server of this process.
        namespace: keeps applications that share one Redis apart.
    """

    redis_url: str = field(repr=False)
    namespace: str = DEFAULT_NAMESPACE


def resolve(
    redis_url: str | None = None, *, namespace: str | None = None, environ: Mapping[str, str] = os.environ
) -> Settings:
    """
    Find Redis: the argument, else CEYLON_REDIS_URL, else REDIS_URL, else this user's running `ceylon server`. An empty
    value counts as not given.

    Raises:
        InvalidInputError: the URL or the namespace cannot be used.
        RedisError: none of the four names a server.
    """
    checked = check_namespace(namespace or environ.get("CEYLON_NAMESPACE") or DEFAULT_NAMESPACE)
    if found := configured(redis_url, environ=environ):
        return Settings(check_url(*found), checked)
    if running := _running_server(environ):
        return Settings(check_url(running, "ceylon server"), checked)
    raise RedisError(f"No Redis is configured.\n{REMEDIES}")


def configured(redis_url: str | None = None, *, environ: Mapping[str, str] = os.environ) -> tuple[str, str] | None:
    """
    The URL that the argument or a variable gives, unchecked, and which of them gave it. None if none does; then
    `resolve` looks for this user's `ceylon server`.
    """
    given = {
        "argument": redis_url,
        "CEYLON_REDIS_URL": environ.get("CEYLON_REDIS_URL"),
        "REDIS_URL": environ.get("REDIS_URL"),
    }
    return next(((url, source) for source, url in given.items() if url), None)


def retention_ms(given: Duration | None, where: str, *, environ: Mapping[str, str] = os.environ) -> int:
    """
    How long something is kept after it has ended: the given time, else CEYLON_RETENTION, else 24 h.

    Args:
        where: names the field that gave the time.

    Raises:
        InvalidInputError: it is not a duration.
    """
    if given is None:
        variable = environ.get("CEYLON_RETENTION")
        given, where = (variable, "CEYLON_RETENTION") if variable else (DEFAULT_RETENTION_S, where)
    return round(seconds(given, where) * 1000)


def masked(url: str) -> str:
    """The URL as messages show it: whatever could be a secret is `***`. Works on malformed URLs too."""
    front, mark, query = re.fullmatch(r"(.*?)(?:(\?)(?=\w+=)(.*))?", url, re.DOTALL).groups("")  # type: ignore[union-attr]
    scheme, rest = re.fullmatch(r"([a-z][a-z+]*://)?(.*)", front, re.DOTALL).groups("")  # type: ignore[union-attr]
    # Up to the last @: a password may hold a / or @ that its owner forgot to quote.
    user, at, address = rest.rpartition("@")
    name = re.match(r"([^/?#:@]*):", user) if scheme else None
    shown = address if re.fullmatch(rf"{_HOST}(,{_HOST})*(/[^?#@:]*)?", address) else "***"
    options = (item.partition("=") for item in query.split("&"))
    values = [f"{key}={value if key in _OPEN_OPTIONS else '***'}" if eq else "***" for key, eq, value in options]
    return "".join(
        [scheme, f"{name[1]}:" if name else "", "***@" if at else "", shown, mark, "&".join(values if mark else [])]
    )


def server_folder(environ: Mapping[str, str] = os.environ) -> Path:
    """
    Where this user's `ceylon server` keeps its data: CEYLON_SERVER_DIR, else `ceylon` in the user's state folder.

    Raises:
        InvalidInputError: this user has no home.
    """
    try:
        if chosen := environ.get("CEYLON_SERVER_DIR"):
            return Path(chosen).expanduser().absolute()
        state = Path(environ.get("XDG_STATE_HOME", ""))
        if not state.is_absolute():  # the XDG specification: a relative path is to be ignored
            state = Path(environ.get("HOME") or Path.home()) / ".local" / "state"
    except RuntimeError:  # HOME is not set, and the system knows no user of this number, as in a container
        raise InvalidInputError("this user has no home folder for the server's data; set CEYLON_SERVER_DIR") from None
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
    """Whether `folder` is a real folder that belongs to this user and that no other user may enter."""
    if sys.platform == "win32":
        return False
    status = folder.lstat()
    return stat.S_ISDIR(status.st_mode) and status.st_uid == os.getuid() and not status.st_mode & 0o077


def require_unix(what: str) -> None:
    """
    Raises:
        InvalidInputError: this system has no file locks, process groups and signals as Unix has.
    """
    if importlib.util.find_spec("fcntl") is None:
        raise InvalidInputError(
            f"{what} needs Linux or macOS; "
            "on Windows run it in WSL or in a container (clients and ceylon-monitor run here)"
        )


def _running_server(environ: Mapping[str, str]) -> str | None:
    try:
        path = socket_path(server_folder(environ), environ)
        # Someone else's socket at our path would be handed our tasks: only a folder of our own is trusted.
        found = is_private(path.parent) and stat.S_ISSOCK(path.lstat().st_mode)
    except (OSError, InvalidInputError):  # no such folder, or no home where it could be
        return None
    return socket_url(path) if found else None


def check_url(url: str, source: str = "argument") -> str:
    """
    Return `url` if it may be used; its server need not be reachable.

    Raises:
        InvalidInputError: the URL has none of the known forms, or an option, or a value of one, is not known. The
            message hides passwords.
    """

    def refuse(problem: str) -> InvalidInputError:
        return InvalidInputError(f"Redis URL {masked(url)!r} (from: {source}): {problem}; use {_FORMS}")

    try:
        place = place_of(url)
        options = parse_qs(urlsplit(url).query, keep_blank_values=True)
    except ValueError as error:  # the standard library's own text may quote a piece of the password
        if isinstance(error, InvalidInputError):
            raise refuse(str(error)) from None
        raise refuse("it is malformed (in a password, write / as %2F, # as %23, ? as %3F)") from None
    known = _OPTIONS | (_TLS_OPTIONS if place.tls else set())
    known |= set(SENTINEL_OPTIONS) if place.kind == "sentinel" else set()
    if unknown := sorted(set(options) - known):
        # Else it may be a piece of a password with an unquoted ? or &.
        named = f"the option {unknown[0]!r}" if re.fullmatch(r"[a-z_]+", unknown[0]) else "an option"
        raise refuse(f"{named} is not known (known: {', '.join(sorted(known))})")
    for name, values in sorted(options.items()):
        if len(values) > 1:  # redis-py would take the first without a word
            raise refuse(f"the option {name!r} is given {len(values)} times")
        if problem := _problem_of(name, values[0]):
            raise refuse(f"{name}: {problem}")
    # redis-py takes a path that is no number for database 0, which may be another application's.
    databases = [place.database, *options.get("db", [])]
    if not all(database.isdecimal() and database.isascii() for database in databases):
        raise refuse("the database is not a number")
    if place.kind == "cluster" and any(int(database) for database in databases):
        raise refuse("a cluster has only the database 0")
    return url


def _problem_of(name: str, value: str) -> str:
    """
    Why an option cannot have this value, and what to write instead; '' if it can. redis-py would notice only when it
    connects, or misread the value: it takes any word except no for yes.
    """
    given = f"{value!r} is not usable"
    match name:
        case "ssl_ca_certs" | "ssl_certfile" | "ssl_keyfile":
            return "" if Path(value).is_file() else f"there is no file {value!r}"
        case "ssl_ca_path":
            return "" if Path(value).is_dir() else f"there is no folder {value!r}"
        case "socket_keepalive" | "ssl_check_hostname":
            return "" if value.lower() in _YES_OR_NO else f"{given}; write yes or no"
        case "socket_connect_timeout":
            is_seconds = re.fullmatch(r"[0-9]{1,6}(\.[0-9]{1,6})?", value) and float(value) > 0
            return "" if is_seconds else f"{given}; write a number of seconds, such as 5"
        case "ssl_cert_reqs":
            return "" if value in ("none", "optional", "required") else f"{given}; write none, optional or required"
        case "ssl_min_version":
            known = {*_TLS_VERSIONS, *map(str, _TLS_VERSIONS.values())}
            return "" if value in known else f"{given}; write {' or '.join(_TLS_VERSIONS)}"
        case "ssl_ciphers":
            return "" if _are_ciphers(value) else f"{given}; write names that OpenSSL knows, such as ECDHE+AESGCM"
        case "client_name":
            return "" if re.fullmatch("[!-~]+", value) else f"{given}; write ASCII letters without spaces"
    return ""


def _are_ciphers(value: str) -> bool:
    import ssl  # takes 10 ms, and few need it

    try:
        ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT).set_ciphers(value)
    except ssl.SSLError:
        return False
    return True


def for_redis_py(url: str) -> str:
    """The URL as redis-py reads it: it knows versions of TLS by their numbers."""
    return re.sub(r"(?<=[?&]ssl_min_version=)\w+", lambda found: str(_TLS_VERSIONS.get(found[0], found[0])), url)


Address = tuple[str, int]


@dataclass(frozen=True)
class Place:
    """
    The parts of a URL.

    Attributes:
        kind: one server; the primary that Sentinels know; a cluster; or a server of this process.
        addresses: addresses of the server, the Sentinels, or some nodes of the cluster; none for a unix socket.
        primary: the name by which the Sentinels know the primary.
        tls: whether all connections use TLS.
    """

    url: str = field(repr=False)
    kind: Literal["server", "sentinel", "cluster", "embedded"]
    addresses: tuple[Address, ...] = ()
    primary: str = ""
    database: str = "0"
    tls: bool = False

    def server_url(self, address: Address) -> str:
        """The URL of one server: same user, database and options, another address."""
        parts = urlsplit(self.url)
        user = parts.netloc.rpartition("@")[0]
        options = [(name, value) for name, value in parse_qsl(parts.query) if name not in SENTINEL_OPTIONS]
        return self._url(address, f"{user}@" if user else "", options)

    def sentinel_url(self, address: Address) -> str:
        """The URL of a Sentinel: the options for its own user take the place of the servers' user."""
        given = parse_qsl(urlsplit(self.url).query)
        options = [(name, value) for name, value in given if name not in {"db", *SENTINEL_OPTIONS.values()}]
        return self._url(address, "", [(SENTINEL_OPTIONS.get(name, name), value) for name, value in options], "0")

    def _url(self, address: Address, user: str, options: list[tuple[str, str]], database: str | None = None) -> str:
        scheme, query = "rediss" if self.tls else "redis", urlencode(options, quote_via=quote)
        where = f"{user}{shown_address(address)}/{self.database if database is None else database}"
        return f"{scheme}://{where}{'?' if query else ''}{query}"


def shown_address(address: Address) -> str:
    host, port = address
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"


def place_of(url: str) -> Place:
    """
    Read a URL.

    Raises:
        InvalidInputError: the URL has none of the known forms; the message says only what is wrong with it.
        ValueError: this is not a URL at all.
    """
    parts = urlsplit(url)
    scheme = parts.scheme.replace("rediss", "redis", 1)
    tls, path = scheme != parts.scheme, parts.path.strip("/")
    match scheme:
        case "redis":
            addresses = _addresses(parts.netloc, 6379)
            if len(addresses) > 1:
                raise InvalidInputError("it names several hosts; only redis+sentinel:// and redis+cluster:// may")
            return Place(url, "server", addresses, database=path or "0", tls=tls)
        case "redis+sentinel":
            addresses = _addresses(parts.netloc, 26379)
            primary, _, database = path.partition("/")
            if not primary:
                raise InvalidInputError("it does not give the name by which the Sentinels know the primary")
            return Place(url, "sentinel", addresses, unquote(primary), database or "0", tls)
        case "redis+cluster":
            return Place(url, "cluster", _addresses(parts.netloc, 6379), database=path or "0", tls=tls)
        case "unix":
            if parts.netloc.rpartition("@")[2] or not path:
                raise InvalidInputError("it does not give the absolute path of a socket")
            return Place(url, "server")
        case "embedded":
            if url != "embedded://":
                raise InvalidInputError("nothing may follow embedded://")
            return Place(url, "embedded")
        case "":
            raise InvalidInputError("it has no scheme")
        case _ if "://" not in url:  # then what stands before the colon may be a user or a password
            raise InvalidInputError("it has no scheme")
        case _:
            raise InvalidInputError(f"{parts.scheme}:// is not known")


def _addresses(netloc: str, default_port: int) -> tuple[Address, ...]:
    found = []
    for item in netloc.rpartition("@")[2].split(","):
        parts = urlsplit(f"//{item}")
        if not parts.hostname or parts.port == 0:
            raise InvalidInputError("it names no host, or port 0")
        found.append((unquote(parts.hostname), parts.port or default_port))
    return tuple(found)
