"""The Lua scripts, and calls as values: a `Call` describes a call that has not been sent yet."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from importlib import resources
from typing import Any

from rq_ceylon.store import records

GROUP_SCRIPTS = (
    "submit",
    "add",
    "claim",
    "commit",
    "outbox",
    "judge",
    "control",
    "depend",
    "reissue",
    "reopen",
    "foresee",
    "list",
)
ROLE_SCRIPTS = ("enqueue", "fetch", "renew", "release", "probe")

_INCLUDE = re.compile(r"^ *-- include: (.+)$", re.MULTILINE)


@dataclass(frozen=True, slots=True)
class Call:
    """
    One script call, or one plain command if `script` is empty.

    Attributes:
        keys: all keys that the call touches; they are in one slot.
        args: ARGV of the script; for a plain command the whole command, its keys included.
        confirm: a WAIT or WAITAOF command, sent once after all calls of a pipeline. The reply then becomes a pair: the
            reply of the call, and why it was not confirmed ('' if it was).
        follows: the last run of this call comes after that of the nearest earlier call with `follows=False`. If that
            one goes to another node, is redirected or is sent again, this one is sent again after it, though it may
            have run before.
    """

    script: str
    keys: Sequence[str]
    args: Sequence[Any]
    confirm: Sequence[Any] = ()
    follows: bool = False


def command(*words: Any) -> Call:
    """A plain command. Its key is the second word, or the third one of XINFO."""
    return Call("", (words[2 if words[0] == "XINFO" else 1],), words)


def insist(name: str, key: str, *words: Any) -> Call:
    """A command on one key that Redis runs at its memory limit too."""
    return Call("insist", (key,), (name, *words))


@cache
def source(script: str) -> str:
    """
    The full text of a script. Each line `-- include: NAME...`, in the script or in an included file, is replaced by
    those files (`records.NAME` by what `store/records.py` makes), but each is included only once. A script puts its
    includes after the early returns that do not need them: Redis runs every `local function` that a call reaches, so a
    call on a group that does not exist skips the cost of the tail.
    """
    folder, included = resources.files(__package__) / "lua", {script}

    def paste(line: re.Match[str]) -> str:
        texts = []
        for name in line[1].split():
            if name not in included:
                included.add(name)
                texts.append(read(name))
        return "\n".join(texts)

    def read(name: str) -> str:
        if name.startswith("records."):
            return records.lua(name.removeprefix("records."))
        return _INCLUDE.sub(paste, (folder / f"{name}.lua").read_text("utf-8"))

    return read(script)


@cache
def digest(script: str) -> str:
    """The SHA-1 digest under which Redis caches a script."""
    return hashlib.sha1(source(script).encode(), usedforsecurity=False).hexdigest()


def words(call: Call) -> Sequence[Any]:
    """The command that is sent for a call."""
    if not call.script:
        return call.args
    return ("EVALSHA", digest(call.script), len(call.keys), *call.keys, *call.args)
