"""
The records that Python and the scripts share, each described once. Python packs and reads them with the methods of
`Record`; for `-- include: records.claim_of`, say, `scripts.source` puts in that Lua function.

A record is its fields, joined with `|`, and perhaps a JSON text behind them. A new field comes last: then it reads as
empty, in both languages, where a record was written before it was added. Any other number of fields is refused: a newer
version wrote such a record, or something else did.
"""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Any

from rq_ceylon.views import Counters

COUNTERS = tuple(field.name for field in fields(Counters))
"""The counters of a group, in the order in which a settled goal keeps them."""

NUMBERS = (*COUNTERS, "pages", "goals_failed", "waited", "reopening")
"""
The numbers in a group's meta hash that scripts change: the counters, the number of the last page, how many goals have
failed, how long (ms) the group waited for the groups on which it depends, and when the last part of a retry came that
is not complete (epoch ms; else 0).
"""


@dataclass(frozen=True)
class Record:
    """
    Attributes:
        fields: their names, in order. None of their texts contains `|`, or the character with which the JSON begins.
        first: how many fields the first version of the record had; it has at least these.
        numbers: those that are numbers; an empty one reads as None and nil.
        json: the character with which the JSON behind the fields begins; empty if there is none.
    """

    fields: tuple[str, ...]
    first: int
    numbers: tuple[str, ...] = ()
    json: str = ""

    def split(self, text: str) -> list[str]:
        """
        The texts of the fields, then the JSON if there is one.

        Raises:
            ValueError: there are too few fields, or more than this version knows, or there is no JSON.
        """
        behind = []
        if self.json:
            text, found, rest = text.partition("|" + self.json)
            if not found:
                raise ValueError(f"no JSON behind {text!r}")
            behind = [self.json + rest]
        texts = text.split("|")
        if not self.first <= len(texts) <= len(self.fields):
            raise ValueError(f"{len(texts)} fields, {self.first} to {len(self.fields)} are known: {text!r}")
        return texts + [""] * (len(self.fields) - len(texts)) + behind

    def parse(self, text: str) -> dict[str, Any]:
        """The fields by name, and the JSON as `json`."""
        found: dict[str, Any] = dict(
            zip((*self.fields, *(("json",) if self.json else ())), self.split(text), strict=True)
        )
        for name in self.numbers:
            found[name] = int(float(found[name])) if found[name] else None
        return found

    def pack(self, values: dict[str, Any]) -> str:
        """The text of the fields, each followed by `|` if JSON comes behind. What is not given, or None, is empty."""
        assert values.keys() <= set(self.fields), values
        texts = ("" if (value := values.get(name)) is None else str(value) for name in self.fields)
        return "|".join(texts) + ("|" if self.json else "")

    def lua(self, name: str, what: str) -> str:
        """
        The Lua function NAME_WHAT. `NAME_fields(text)` returns the fields, and nil if the text is no such record;
        `NAME_of(text)` returns them as a table. `NAME_text(table, json)` packs, and `NAME_json(text)` returns the JSON.

        A record of all fields costs one match. If fields were added since the first version, a record without them
        costs a second match, on its fields with more `|` behind.
        """
        names, begin = ", ".join(self.fields), "%" + self.json if self.json else ""
        match what:
            case "json":
                return f"local function {name}_json(record) return string.match(record, '{begin}.*$') end"
            case "text":
                json = ", json" if self.json else ""
                texts = ", ".join(f"t.{field} or ''" for field in self.fields)
                return f"local function {name}_text(t{json}) return table.concat({{{texts}{json}}}, '|') end"
            case "fields":
                answer = ", ".join(self._in_lua(field) for field in self.fields)
            case "of":
                answer = "{" + ", ".join(f"{field} = {self._in_lua(field)}" for field in self.fields) + "}"
            case _:
                raise ValueError(f"no function {name}_{what}")
        all_fields = "^" + "|".join([f"([^|{begin}]*)"] * len(self.fields))
        lines = [
            f"local function {name}_{what}(record)",
            f"  local {names} = string.match(record, '{all_fields}{'|' + begin if begin else '$'}')",
        ]
        if added := len(self.fields) - self.first:
            head = f"(string.match(record, '^([^{begin}]*)|{begin}') or '')" if begin else "record"
            lines.append(f"  if not {self.fields[0]} then")
            lines.append(f"    {names} = string.match({head} .. '{'|' * added}', '{all_fields}|*$')")
            lines.append("  end")
        return "\n".join([*lines, f"  return {answer}", "end"])

    def _in_lua(self, field: str) -> str:
        return f"tonumber({field})" if field in self.numbers else field


TASK = Record(
    ("role", "priority", "not_before", "expiry", "crash_limit"), 5, ("not_before", "expiry", "crash_limit"), json="{"
)
"""
A task. `priority` is 1 to 3, its stream; `not_before` and `expiry` are epoch ms, in `submit` ms from now; both hold
from the start of the group. `crash_limit` is how many crashes it survives, if not as many as others. The JSON is the
payload.
"""

CLAIM = Record(
    (
        "state", "attempt", "fence", "worker", "lineage", "started", "crashes", "releases", "due", "role", "priority",
    ),
    11,
    ("attempt", "crashes", "releases"),
)  # fmt: skip
"""
The record of a task that was claimed or parked. `state`: p in progress, c in progress and asked to cancel, s in
progress at a worker that was told to stop, r retrying, l released. `fence`: that of the last grant, 0 if there was
none; it stays text but where two are compared in size, since a Lua number would lose its last digits on the way back.
`started` is when that was, `due` when the task may run again: epoch ms, or `room` if it waits in `parked` until its
group may run one more.
"""

RESULT = Record(
    (
        "outcome", "reason", "role", "attempts", "crashes", "worker", "started", "ended", "wait", "run",
        "issue", "priority", "crash_limit", "value_bytes",
    ),
    10,
    ("attempts", "crashes", "started", "ended", "wait", "run", "issue", "crash_limit", "value_bytes"),
    json="[",
)  # fmt: skip
"""
The result of a task. `started` and `ended` are epoch ms, `wait` and `run` ms. The JSON of a completed task is
`[value]`, of any other `[error or null, payload]`. The last four fields say what reopening a task needs: the issue of
its last entry, its priority and crash limit, and the length of the first JSON value.
"""

GOAL = Record(("name", "on_achieved", "on_failed", "deadline", "program", "fail_program"), 6, ("deadline",))
"""
An undecided goal. `deadline` is epoch ms, before the start of the group ms from it; 0: none. A program is an
expression in reverse Polish notation, see `expression`. META keeps the goals in `goals`, joined with `;`.
"""

SETTLED = Record(("status", "at", "seq", "by", "counters"), 5, ("at", "seq"))
"""A settled goal: when (epoch ms), by which event of the group, by what, and the counters then, joined with `,`."""

_RECORDS = {"task": TASK, "claim": CLAIM, "result": RESULT, "goal": GOAL, "settled": SETTLED}


def lua(name: str) -> str:
    """What a script includes as `records.NAME`: `numbers`, or one function of a record, such as `claim_of`."""
    if name == "numbers":
        numbers = ", ".join(f"'{number}'" for number in NUMBERS)
        return f"local COUNTERS, NUMBERS = {len(COUNTERS)}, {{{numbers}}}"
    record, _, what = name.partition("_")
    return _RECORDS[record].lua(record, what)
