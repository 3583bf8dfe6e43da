"""The glossary has each answer of a script, state of a claim, key, and term of the protocol."""

from __future__ import annotations

import re
from collections.abc import Iterator

from commands import ROOT

from rq_ceylon.store.keys import GROUP_PARTS, ROLE_PARTS, STREAMS, Keys

LUA = ROOT / "rq_ceylon" / "store" / "lua"
STRING = re.compile(r"'([^'\n]*)'")


def defined() -> set[str]:
    """The words that the glossary defines: those in bold, in lower case."""
    rows = [line for line in (ROOT / "docs" / "glossary.md").read_text().splitlines() if line.startswith("|")]
    return {word.strip("`").lower() for row in rows for word in re.findall(r"\*\*([^*]+)\*\*", row)}


def missing(words: set[str]) -> list[str]:
    known = defined()
    return sorted(word for word in words if not {word.lower(), word.lower().removesuffix("s")} & known)


# ---- what the scripts say --------------------------------------------------------------------------------------------
def code(lua: str) -> str:
    """A script without comments, and with only such strings as may be an answer."""
    lua = re.sub(r"--.*", "", lua)
    return STRING.sub(lambda string: string[0] if re.fullmatch(r"[A-Z]+", string[1]) else "''", lua)


def without_commands(lua: str) -> str:
    """Without the words that go to Redis: the arguments of its calls, and tables that are unpacked as such."""
    for table in re.findall(r"call\(unpack\((\w+)\)", lua):
        lua = re.sub(rf"local {table} = {{[^}}]*}}", "", lua)
    return "".join(_outside_of_calls(lua))


def _outside_of_calls(lua: str) -> Iterator[str]:
    at = 0
    for call in re.finditer(r"\bp?call\(", lua):
        if call.start() < at:  # inside the one before
            continue
        yield lua[at : call.start()]
        at, depth = call.end(), 1
        while depth:
            depth += {"(": 1, ")": -1}.get(lua[at], 0)
            at += 1
    yield lua[at:]


def answers(lua: str) -> set[str]:
    return {word for word in STRING.findall(without_commands(code(lua))) if word}


def test_the_answers_of_a_script_are_told_from_its_commands() -> None:
    lua = """
    -- Reply: 'NEVER'
    local ask = {'XREADGROUP', 'COUNT', count}
    local found = redis.pcall(unpack(ask))
    if call('HGET', TASKS, text(call('INCR', name .. '('))) then error('LAYOUT is unknown') end
    return {found and 'GRANTED' or 'LATER', 'not an answer'}
    """

    assert answers(lua) == {"GRANTED", "LATER"}


def test_the_glossary_has_every_answer_of_a_script() -> None:
    found = {path.name: answers(path.read_text()) for path in LUA.glob("*.lua")}

    assert found["commit.lua"] == {"GONE", "OK", "DONE", "STALE", "FULL"}
    assert {name: words for name, said in found.items() if (words := missing(said))} == {}


def test_the_glossary_has_every_state_of_a_claim() -> None:
    lua = "".join(path.read_text() for path in LUA.glob("*.lua"))
    states = set(re.findall(r"state [=~]=? ?'(\w)'", lua))

    assert len(states) > 3, "the scripts do not compare or set states as they did"
    assert missing(states) == []


# ---- what lies in Redis ----------------------------------------------------------------------------------------------
def test_the_glossary_has_every_key() -> None:
    keys = Keys("n")
    others = {key.rpartition(":")[2] for key in (keys.roles, keys.workers, keys.thorough, keys.index(0))}

    assert missing({*GROUP_PARTS, *ROLE_PARTS, *STREAMS, *others}) == []


def test_the_glossary_has_every_term_that_the_protocol_introduces() -> None:
    terms = set(re.findall(r"\*\*([^*]+)\*\*", (ROOT / "docs" / "protocol.md").read_text()))

    assert len(terms) > 30, "the protocol sets terms in bold where it introduces them"
    assert missing(terms) == []
