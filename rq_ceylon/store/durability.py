"""What makes a submission outlast its server: a replica that has it, or the disk."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any, get_args

import redis

from rq_ceylon.errors import InvalidInputError
from rq_ceylon.models import Durability
from rq_ceylon.store.scripts import Call
from rq_ceylon.store.trouble import engine_of, is_demotion

CONFIRM_S = 5.0
"""How long a confirmation is waited for; less than an answer may take."""

_AOF_FLOOR = (7, 2)


def check_durability(durability: Durability) -> None:
    """
    Raises:
        InvalidInputError: there is none of this name.
    """
    if durability not in get_args(Durability):
        raise InvalidInputError(f"durability: {durability!r} is not known; use {', '.join(get_args(Durability))}")


def confirming(call: Call, durability: Durability) -> Call:
    """The same call, its writes confirmed. Also those before it on this server, by whatever connection, are then."""
    match durability:
        case "replica":
            return replace(call, confirm=("WAIT", 1, round(CONFIRM_S * 1000)))
        case "fsync":
            return replace(call, confirm=("WAITAOF", 1, 0, round(CONFIRM_S * 1000)))
    return call


def confirmed(reply: Any, answer: Any) -> Any:
    """The reply of a call that WAIT or WAITAOF confirmed; the error to raise if its fate is unknown."""
    if isinstance(reply, Exception):
        return reply
    if isinstance(answer, redis.exceptions.ResponseError) and not is_demotion(answer):
        return reply, f"Redis answered: {answer}"
    if isinstance(answer, Exception):
        return answer
    count = answer[0] if isinstance(answer, list) else answer
    return reply, "" if count >= 1 else f"not within {CONFIRM_S:g} s"


def unable(info: Mapping[str, Any], durability: Durability) -> str:
    """Why a server with this INFO cannot confirm, and the remedy; '' if it can."""
    if durability == "replica":
        replicas = [facts for name, facts in info.items() if name.startswith("slave") and isinstance(facts, dict)]
        if not any(facts.get("state") == "online" for facts in replicas):
            return "has no replica that is online; start one (replicaof), or use another durability"
        return ""
    engine, version, numbers = engine_of(info)
    if numbers < _AOF_FLOOR:
        return f"is {engine} {version}, which cannot confirm this; upgrade it to 7.2, or use another durability"
    if not info.get("aof_enabled"):
        return (
            "writes no append-only file; turn it on with: redis-cli CONFIG SET appendonly yes (and in its "
            "configuration file), or use another durability"
        )
    return ""
