"""The Lua scripts, and calls as values: what to run, not yet sent."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from importlib import resources
from typing import Any

GROUP_SCRIPTS = ("submit", "claim", "commit", "outbox", "judge", "control", "depend", "reissue", "foresee")
ROLE_SCRIPTS = ("enqueue", "fetch", "renew", "release", "probe")

_INCLUDE = re.compile(r"^-- include: (.+)$", re.MULTILINE)


@dataclass(frozen=True, slots=True)
class Call:
    """
    One script call, or one plain command where `script` is empty.

    Attributes:
        keys: what the call touches; all in one slot.
        args: ARGV of the script; the whole command with its keys where it is plain.
        confirm: WAIT or WAITAOF, asked once behind all calls of a pipeline. The reply is a pair then: the call's, and
            why it was not confirmed ('': it was).
        follows: it must not run before the last ahead of it that follows none; where that had to be sent again, or went
            to another node, this one is sent again behind it, though it may have run.
    """

    script: str
    keys: Sequence[str]
    args: Sequence[Any]
    confirm: Sequence[Any] = ()
    follows: bool = False


def command(*words: Any) -> Call:
    """A plain command; its second word is its key, after XINFO the third."""
    return Call("", (words[2 if words[0] == "XINFO" else 1],), words)


def insist(name: str, key: str, *words: Any) -> Call:
    """A command on one key that is run at the memory limit too."""
    return Call("insist", (key,), (name, *words))


@cache
def source(script: str) -> str:
    """
    The full text of a script. A line `-- include: NAME...` in it, or in an included file, stands for those files, each
    the first time it is named. A script includes behind its early returns what these do not need: Redis runs every
    `local function` that it reaches, so a call on an absent group costs no tail.
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
        return _INCLUDE.sub(paste, (folder / f"{name}.lua").read_text("utf-8"))

    return read(script)


@cache
def digest(script: str) -> str:
    """The SHA-1 under which Redis caches a script."""
    return hashlib.sha1(source(script).encode(), usedforsecurity=False).hexdigest()


def words(call: Call) -> Sequence[Any]:
    """The command of a call, as it goes over the wire."""
    if not call.script:
        return call.args
    return ("EVALSHA", digest(call.script), len(call.keys), *call.keys, *call.args)
