"""Turns errors of Redis and its connections into words for the user: what happened, where, and what to do."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import redis
from loguru import logger

from rq_ceylon.errors import CeylonError, ConnectionLostError, QueueFullError, RecordError, RedisError
from rq_ceylon.settings import Place, masked, place_of, shown_address

DISCONNECTED = (redis.ConnectionError, redis.TimeoutError, OSError)
"""The errors of a lost connection that `carrying` lets pass."""

FLOOR = {"redis": (6, 2), "valkey": (7, 2)}

# Codes and texts of a server that is restarting, failing over or busy. It executed nothing, so try again.
_PASSING = {
    "LOADING": "it is loading its data",
    "READONLY": "it is a replica now",
    "MASTERDOWN": "it is a replica without its primary",
    "UNBLOCKED": "it became a replica",
    "CLUSTERDOWN": "the cluster is down",
    "TRYAGAIN": "a slot of the cluster is being moved",
    "BUSY ": "it is busy with a script",
    "NOREPLICAS": "it has too few replicas to write",
    "MISCONF": "it cannot save to its disk",
}

_LOST_WORDS = {
    "refused": "connection refused",
    "No such file": "no such socket",
    "not known": "unknown host",
    "No address associated": "unknown host",
    "name resolution": "the name server does not answer",
    "unreachable": "that network cannot be reached",
    "Permission denied": "this user may not use the socket",
}


_said: dict[str, None] = {}
SAID_MAX = 10_000
"""How many messages are remembered. One about a group that broke days ago may be logged again."""


def _is_new(message: str) -> bool:
    if message in _said:
        return False
    if len(_said) >= SAID_MAX:
        del _said[next(iter(_said))]
    _said[message] = None
    return True


def warn_once(message: str) -> None:
    """Log a warning, unless this process has already logged the same one."""
    if _is_new(message):
        logger.warning("{}", message)


def forget_said() -> None:
    """Forget all logged messages, so that each can be logged again."""
    _said.clear()


@contextmanager
def carrying() -> Iterator[None]:
    """
    Wrap code that uses a connection: any failure inside is a lost connection, unless it is an answer of Redis.

    The libraries below (uvloop, asyncio, ssl, redis-py) raise errors of many types when a connection breaks, and no
    list of those types is complete. So this lists only the errors that are *not* a loss: an answer of Redis, an error
    of ours, and `redis.DataError`, for a word that cannot be packed.

    Raises:
        redis.RedisError, OSError, CeylonError: nothing else.
    """
    try:
        yield
    except redis.exceptions.InvalidResponse as error:
        raise redis.ConnectionError(f"the server there does not speak the protocol of Redis: {error}") from error
    except (redis.RedisError, OSError, CeylonError):
        raise
    except Exception as error:
        kind = type(error).__name__
        # It may also be a bug in the program, so log its traceback, although it counts as a loss like any other.
        if _is_new(f"loss {kind}"):
            logger.opt(exception=error).warning("A connection to Redis failed with {}; it counts as lost", kind)
        raise redis.ConnectionError(f"{kind}: {error}") from error


def complain(what: str, error: Exception) -> None:
    """
    Log a failure in a loop that continues: each refusal once, and each bug in the program once with its traceback. A
    lost connection is logged only at the level debug, because the code that waits for Redis tells the user about it.

    Args:
        what: a sentence, such as `The heartbeat cannot be sent`.
    """
    if isinstance(error, ConnectionLostError):
        logger.debug("{}: {}", what, error)
    elif isinstance(error, CeylonError):
        warn_once(f"{what}: {error}")
    elif _is_new(f"{what}: {error!r}"):
        logger.opt(exception=error).error("{}", what)


def text_of(error: BaseException) -> str:
    """The error as the server sent it. redis-py strips known codes, except for errors inside scripts on Redis 6.2."""
    code = getattr(error, "status_code", None)
    return f"{code} {error}" if code else str(error)


def is_demotion(error: BaseException) -> bool:
    """Whether a server says that it is no longer a primary."""
    return isinstance(error, redis.RedisError) and any(
        code in text_of(error) for code in ("READONLY", "MASTERDOWN", "UNBLOCKED")
    )


def classified(error: BaseException, url: str, about: str = "") -> CeylonError:
    """
    Translate an error of redis-py or the operating system into one of ours. The text decides, not the class, because
    errors of scripts arrive as plain response errors on Redis 6.2.

    Args:
        about: the refused command and its key, for a refusal by the ACL.
    """
    text, where = text_of(error), masked(url)
    if isinstance(error, CeylonError):
        return error
    if "OOM" in text or "maxmemory" in text:
        return QueueFullError(
            f"Redis at {where} is at its memory limit and takes no new tasks; wait until workers have drained it, "
            "or raise maxmemory"
        )
    if isinstance(error, redis.exceptions.AuthenticationError) or any(
        word in text for word in ("WRONGPASS", "NOAUTH", "Authentication required", "invalid username-password")
    ):
        return RedisError(f"Redis at {where} refuses the user or password; check the URL (redis://user:password@host)")
    if any(word in text for word in ("NOPERM", "no permission", "ACL failure")):
        what = f"{text}; asked for: {about}" if about else text
        return RedisError(
            f"Redis at {where} does not allow what is needed ({what}); see docs/deployment.md for the ACL"
        )
    if "LAYOUT" in text:
        return RedisError(f"Redis at {where} holds data of another version of rq-ceylon ({text}); upgrade this one")
    if wrong := _wrong_kind(text, place_of(url)) or _tls_problem(text):
        return RedisError(f"Redis at {where} {wrong}")
    if "WRONGTYPE" in text:
        return RecordError(f"Redis at {where} holds something else in place of a record ({about or text})")
    for code, plain in _PASSING.items():
        if code in text:
            return ConnectionLostError(f"Cannot reach Redis at {where} ({plain})")
    if isinstance(error, DISCONNECTED):
        return ConnectionLostError(f"Cannot reach Redis at {where} ({_plain(error, text, tls=place_of(url).tls)})")
    return RedisError(f"Redis at {where} answered: {text}")


def _plain(error: BaseException, text: str, *, tls: bool) -> str:
    if isinstance(error, redis.TimeoutError | TimeoutError) or "Timeout" in text or "timed out" in text:
        # A server without TLS takes the handshake for the start of a command, and waits for the rest.
        return "no answer in time; does it speak TLS at this port?" if tls else "no answer in time"
    if any(words in text for words in ("closed by server", "reset by peer", "Connection lost")):
        # The server's message about a missing certificate may be lost with the connection.
        missed = "does it require a client certificate (ssl_certfile and ssl_keyfile)?"
        return "connection closed; " + (missed if tls else "if it speaks TLS, use rediss://")
    for words, plain in _LOST_WORDS.items():
        if words in text:
            return plain
    # asyncio gives the number of a failed connect, but not its message.
    if number := re.search(r"(?:Errno|Error) (\d+)\b.*Connect call failed", text):
        return os.strerror(int(number[1])).lower()
    return text or type(error).__name__


def _wrong_kind(text: str, place: Place) -> str:
    address = shown_address(place.addresses[0]) if place.addresses else "host:port"
    s = "s" if place.tls else ""
    if re.match(r"(MOVED|ASK|CROSSSLOT) ", text) and place.kind != "cluster":
        return f"is a node of a cluster; use redis{s}+cluster://{address}"
    if "cluster support disabled" in text:
        return f"is not a cluster; use redis{s}://{address}/0"
    if "unknown command" in text.lower() and place.kind == "sentinel" and "SENTINEL" in text.upper():
        return f"is not a Sentinel but a server; use redis{s}://{address}/{place.database}"
    return ""


def _tls_problem(text: str) -> str:
    if "CERTIFICATE_VERIFY_FAILED" in text or "certificate verify failed" in text:
        reason = re.sub(r"^.*certificate verify failed: |\s*\(_ssl\.c.*$", "", text)
        return (
            f"shows a certificate that is not trusted ({reason}); name the CA that signed it: "
            "rediss://…?ssl_ca_certs=/path/to/ca.pem"
        )
    if any(word in text for word in ("WRONG_VERSION_NUMBER", "RECORD_LAYER_FAILURE", "PACKET_LENGTH_TOO_LONG")):
        return "does not speak TLS at this port; use redis:// or its TLS port"
    if "CERTIFICATE_REQUIRED" in text or "certificate required" in text:
        return "requires a client certificate; name it: rediss://…?ssl_certfile=/path/to/cert.pem&ssl_keyfile=/path"
    if "[SSL" in text:
        return f"and this client do not agree on TLS ({text})"
    return ""


def engine_of(info: Mapping[str, Any]) -> tuple[str, str, tuple[int, ...]]:
    """The name of the engine with this INFO, its version, and the first two numbers of the version."""
    engine = "valkey" if "valkey_version" in info else "redis"
    version = str(info.get("valkey_version") or info.get("redis_version") or "0.0")
    return engine, version, tuple(int(part) for part in version.split(".")[:2])


def unfit(info: Mapping[str, Any], place: Place) -> str:
    """Why a server with this INFO cannot run the queue, and the remedy; '' if it can."""
    engine, version, numbers = engine_of(info)
    address = shown_address(place.addresses[0]) if place.addresses else "host:port"
    s = "s" if place.tls else ""
    mode = info.get("redis_mode") or info.get("server_mode")
    if mode == "sentinel":
        names = sorted(str(facts.get("name")) for name, facts in info.items() if re.fullmatch(r"master\d+", name))
        return (
            f"is a Sentinel; use redis{s}+sentinel://{address}/{names[0] if len(names) == 1 else 'primary-name'}/0"
            + (f" (it knows: {', '.join(names)})" if len(names) > 1 else "")
        )
    if mode == "cluster" and place.kind != "cluster":
        return f"is a node of a cluster; use redis{s}+cluster://{address}"
    if numbers < FLOOR[engine]:
        floor = ".".join(map(str, FLOOR[engine]))
        return f"is {engine} {version}; at least {engine} {floor} is needed: upgrade it"
    policy = info.get("maxmemory_policy", "noeviction")
    if policy != "noeviction":
        return (
            f"evicts keys when memory is short (maxmemory-policy {policy}), which would lose tasks; "
            "set it with: redis-cli CONFIG SET maxmemory-policy noeviction"
        )
    if info.get("role") == "slave":
        primary = shown_address((str(info.get("master_host")), int(info.get("master_port", 6379))))
        return f"is a replica, which takes no tasks; use its primary: redis{s}://{primary}/{place.database}"
    return ""
