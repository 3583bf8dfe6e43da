"""Confirmation that a submission survives the loss of its server: a replica has it, or it is on disk."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any, get_args

import redis

from rq_ceylon.errors import InvalidInputError
from rq_ceylon.models import Durability
from rq_ceylon.store.redis_errors import engine_of, is_demotion
from rq_ceylon.store.scripts import Call

CONFIRM_S = 5.0
"""How long to wait for a confirmation; less than an answer may take, so that the wait does not count as a lost call."""

_AOF_FLOOR = (7, 2)


def check_durability(durability: Durability) -> None:
    """
    Refuse an unknown durability.

    Raises:
        InvalidInputError: there is no durability of this name.
    """
    if durability not in get_args(Durability):
        raise InvalidInputError(f"durability: {durability!r} is not known; use {', '.join(get_args(Durability))}")


def confirming(call: Call, durability: Durability) -> Call:
    """The same call, its writes confirmed. Earlier writes on the server, of any connection, are then confirmed too."""
    match durability:
        case "replica":
            return replace(call, confirm=("WAIT", 1, round(CONFIRM_S * 1000)))
        case "fsync":
            return replace(call, confirm=("WAITAOF", 1, 0, round(CONFIRM_S * 1000)))
    return call


def confirmed(reply: Any, answer: Any) -> Any:
    """
    Combine the reply of a call with the answer of WAIT or WAITAOF: the pair that `Call.confirm` describes, or the error
    to raise if it is unknown whether the call has happened.
    """
    if isinstance(reply, Exception):
        return reply
    if isinstance(answer, redis.exceptions.ResponseError) and not is_demotion(answer):
        return reply, f"Redis answered: {answer}"
    if isinstance(answer, Exception):
        return answer
    count = answer[0] if isinstance(answer, list) else answer
    return reply, "" if count >= 1 else f"not within {CONFIRM_S:g} s"


def unable(info: Mapping[str, Any], durability: Durability) -> str:
    """Why a server with this INFO cannot confirm writes, and the remedy; '' if it can."""
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
