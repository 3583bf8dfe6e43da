"""
Expressions of goals: what a condition means, as a program and in words for people. This module evaluates nothing: the
one evaluator of programs is in Lua, inside the scripts that change the counters.

    condition  = all {"or" all}
    all        = negation {"and" negation}
    negation   = "not" negation | "(" condition ")" | comparison
    comparison = operand (">=" | ">" | "<=" | "<") operand       one of them a counter
    operand    = a counter | a whole number | N%                 N% is of total, with up to 4 decimals

A program is the expression in reverse Polish, tokens joined by commas: whole numbers, counters, comparisons, `and`,
`or`, `*`; no `not`, since what stands under it is compiled as its opposite. Shares are scaled to whole numbers:
`completed >= 95%` is `completed,100,*,total,95,*,>=`.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import NamedTuple, NoReturn

from rq_ceylon.errors import InvalidInputError, guess
from rq_ceylon.views import Counters

MAX_CHARACTERS = 512
MAX_OPERATIONS = 64
MAX_DEPTH = 16
MAX_NUMBER = 10**12
MAX_DECIMALS = 4
"""A counter times its scale (10**6 at most) stays an exact double in Lua up to nine thousand million tasks."""

GOAL_COUNTERS = ("total", "completed", "failed", "cancelled", "attempts", "crashes")
"""The counters that never fall, so that a verdict on them is final."""

CALL = "call"
"""The program of a goal whose owner judges it: the evaluator leaves it undecided."""

_FALLING = ("waiting", "pending", "in_progress")
_WORDS = ("and", "or", "not")
_SIGNS = (">=", ">", "<=", "<")
_FLIPPED = {">=": "<=", ">": "<", "<=": ">=", "<": ">"}
_OPPOSITE = {">=": "<", ">": "<=", "<=": ">", "<": ">="}
_EQUALITY = ("==", "=", "!=", "<>", "≠")
_MISSPELT = {"=>": ">=", "=<": "<=", "≥": ">=", "≤": "<=", "&&": "and", "&": "and", "||": "or", "|": "or", "!": "not"}
_NOUNS = {"total": ("task", "tasks"), "attempts": ("attempt", "attempts"), "crashes": ("crash", "crashes")}


# The parts of an expression. A comparison has its counter on the left: `5 <= completed` is read as `completed >= 5`.


@dataclass(frozen=True, slots=True)
class Share:
    """`parts / scale` of total, in the lowest power of ten that makes it whole: 99.5% is 995 / 1000."""

    parts: int
    scale: int


@dataclass(frozen=True, slots=True)
class _Comparison:
    counter: str
    sign: str
    other: str | int | Share

    @property
    def is_reach(self) -> bool:
        """Whether it asks a counter to get as far as a number, or a share."""
        return self.sign in (">=", ">") and not isinstance(self.other, str)

    def edge(self, total: int) -> int:
        """The nearest count that satisfies the comparison: the least for `>=` and `>`, the most for `<=` and `<`."""
        match self.other:
            case Share(parts, scale):
                parts *= total
            case int(parts):
                scale = 1
            case _:
                raise AssertionError("only a number or a share has an edge")
        floor, ceiling = parts // scale, -(-parts // scale)
        return {">=": ceiling, ">": floor + 1, "<=": floor, "<": ceiling - 1}[self.sign]

    def tokens(self) -> Iterator[str]:
        match self.other:
            case Share(parts, scale):
                yield from (self.counter, str(scale), "*", "total", str(parts), "*", self.sign)
            case other:
                yield from (self.counter, str(other), self.sign)

    def words(self, counters: Counters) -> str:
        count: int = getattr(counters, self.counter)
        counted = counter_words(count, self.counter)
        purpose = "needed" if self.sign in (">=", ">") else "allowed"
        if isinstance(self.other, str):
            phrase = {">=": "at least", ">": "more than", "<=": "at most", "<": "fewer than"}[self.sign]
            return f"{counted}, {phrase} the {counter_words(getattr(counters, self.other), self.other)} {purpose}"
        edge = self.edge(counters.total)
        if self.is_reach:
            of_all = "" if self.counter in _NOUNS else f"{count} of {counters.total} {self.counter}"
            return f"{of_all or counted}, {edge} {purpose}"
        if edge == 0:
            return f"{counted}, none {purpose}"
        return f"{counted}, {f'fewer than {edge + 1}' if self.sign == '<' else f'at most {edge}'} {purpose}"


@dataclass(frozen=True, slots=True)
class _Joined:
    word: str
    parts: tuple[_Node, ...]

    def tokens(self) -> Iterator[str]:
        for position, part in enumerate(self.parts):
            yield from part.tokens()
            if position:
                yield self.word


_Node = _Comparison | _Joined


def comparisons(node: _Node) -> Iterator[_Comparison]:
    if isinstance(node, _Comparison):
        yield node
    else:
        for part in node.parts:
            yield from comparisons(part)


def _say(node: _Node, counters: Counters, *, inside: bool = False) -> str:
    if isinstance(node, _Comparison):
        return node.words(counters)
    text = f"; {node.word} ".join(_say(part, counters, inside=True) for part in node.parts)
    return f"({text})" if inside else text


def counter_words(count: int, counter: str) -> str:
    one, many = _NOUNS.get(counter, (counter, counter))
    return f"{count} {one if count == 1 else many}"


@dataclass(frozen=True)
class Expression:
    """
    A condition over the counters of a group, made by `parse`.

    Attributes:
        text: as written, in single spaces.
        program: for the evaluator.
    """

    text: str
    program: str
    _node: _Node = field(repr=False, compare=False)

    def words(self, counters: Counters) -> str:
        """How far it is, for people: `12 of 200 completed, 190 needed; and 2 failed, fewer than 10 allowed`."""
        return _say(self._node, counters)

    def mark(self, total: int) -> int | None:
        """How many of `total` tasks must complete for the first `completed >=` or `>`; None if there is none."""
        for comparison in comparisons(self._node):
            if comparison.counter == "completed" and comparison.is_reach:
                return comparison.edge(total)
        return None


def parse(text: str, name: str) -> Expression:
    """
    Read an expression.

    Args:
        text: such as `completed >= 95% and failed < 10`.
        name: what the expression is called where the user wrote it; errors begin with it.

    Raises:
        InvalidInputError: not an expression, or over a limit; the message names the column and the remedy.
    """
    if not isinstance(text, str):
        raise InvalidInputError(f"{name}: {text!r} is not an expression; write text such as completed >= 5")
    if len(text) > MAX_CHARACTERS:
        raise InvalidInputError(f"{name}: the expression has {len(text)} characters; write at most {MAX_CHARACTERS}")
    if not text.strip():
        raise InvalidInputError(f"{name}: the expression is empty; write one such as completed >= 5")
    parser = _Parser(text, name)
    node = parser.read()
    tokens = list(node.tokens())
    operations = parser.negations + sum(token in (*_SIGNS, "and", "or", "*") for token in tokens)
    if operations > MAX_OPERATIONS:
        raise InvalidInputError(
            f"{name}: the expression has {operations} operations, at most {MAX_OPERATIONS} are allowed; shorten it "
            f"(each comparison, and, or, not counts as one, each percentage as two more)"
        )
    return Expression(" ".join(text.split()), ",".join(tokens), node)


# From text to nodes.


class _Token(NamedTuple):
    kind: str  # number, share, counter, word, sign, bracket, end
    text: str
    at: int  # position in the expression, from 0
    value: int | Share = 0


_TOKEN = re.compile(
    r"(?P<number>(?P<whole>[0-9]+)(?:\.(?P<decimals>[0-9]+))?(?:\s*(?P<percent>%))?)"
    r"|(?P<word>[A-Za-z_][A-Za-z0-9_]*)"
    r"|(?P<sign>[<>=!]=|=[<>]|<>|[<>])"
    r"|(?P<bracket>[()])"
    r"|(?P<other>&&|\|\||\S)"
)


class _Parser:
    """
    Recursive descent; one method per rule of the grammar. All refusals give column and remedy. What stands under a
    `not` becomes its opposite: `not (a >= 1 and b < 2)` is `a < 1 or b >= 2`.
    """

    def __init__(self, text: str, name: str) -> None:
        self.text, self.name = text, name
        self.tokens = [self._token(found) for found in _TOKEN.finditer(text)]
        self.tokens.append(_Token("end", "", len(text.rstrip())))
        self.next = self.negations = 0

    def read(self) -> _Node:
        node = self._condition(0, negated=False)
        token = self.tokens[self.next]
        if token.text == ")":
            self._refuse(token, "this bracket closes nothing", "remove it, or add the opening one")
        if token.kind != "end":
            self._refuse(token, f"{token.text} is not expected here", "join conditions with and, or")
        return node

    def _condition(self, depth: int, *, negated: bool) -> _Node:
        parts = [self._all(depth, negated=negated)]
        while self._take("or"):
            parts.append(self._all(depth, negated=negated))
        return parts[0] if len(parts) == 1 else _Joined("and" if negated else "or", tuple(parts))

    def _all(self, depth: int, *, negated: bool) -> _Node:
        parts = [self._negation(depth, negated=negated)]
        while self._take("and"):
            parts.append(self._negation(depth, negated=negated))
        return parts[0] if len(parts) == 1 else _Joined("or" if negated else "and", tuple(parts))

    def _negation(self, depth: int, *, negated: bool) -> _Node:
        token = self.tokens[self.next]
        if token.text in ("not", "(") and depth >= MAX_DEPTH:
            self._refuse(token, f"brackets and not are nested more than {MAX_DEPTH} deep", "write it flatter")
        if self._take("not"):
            self.negations += 1
            return self._negation(depth + 1, negated=not negated)
        if not self._take("("):
            comparison = self._comparison()
            return replace(comparison, sign=_OPPOSITE[comparison.sign]) if negated else comparison
        node = self._condition(depth + 1, negated=negated)
        if not self._take(")"):
            here = self.tokens[self.next]
            self._refuse(here, f"the bracket opened at column {token.at + 1} is not closed here", "write )")
        here = self.tokens[self.next]
        if here.kind == "sign":
            self._refuse(here, "a condition cannot be compared", "compare a counter with a number or N%")
        return node

    def _comparison(self) -> _Comparison:
        left = self._operand()
        sign = self.tokens[self.next]
        if sign.kind != "sign":
            example = f"{left.text} >= 5" if left.kind == "counter" else f"completed >= {left.text}"
            self._refuse(left, f"{left.text} alone is not a condition", f"compare it, such as {example}")
        self.next += 1
        right = self._operand()
        after = self.tokens[self.next]
        if after.kind == "sign":
            self._refuse(after, "comparisons cannot be chained", "write two, joined with and")
        return self._compare(left, sign.text, right)

    def _compare(self, left: _Token, sign: str, right: _Token) -> _Comparison:
        if "counter" not in (left.kind, right.kind):
            what = f"{left.text} and {right.text} are both fixed, so this compares nothing"
            self._refuse(left, what, "name a counter on one side, such as completed >= 5")
        if left.kind != "counter":
            left, sign, right = right, _FLIPPED[sign], left
        if left.text == right.text:
            self._refuse(left, f"{left.text} is compared with itself", "name another counter, a number or N%")
        if right.kind == "share" and left.text == "total":
            self._refuse(left, f"{right.text} is a share of total itself", "compare total with a number")
        return _Comparison(left.text, sign, right.text if right.kind == "counter" else right.value)

    def _operand(self) -> _Token:
        token = self.tokens[self.next]
        if token.kind not in ("counter", "number", "share"):
            what = f"{token.text} stands" if token.text else "the expression ends"
            self._refuse(token, f"{what} where a counter or number is expected", "write one, such as completed >= 5")
        self.next += 1
        return token

    def _take(self, text: str) -> bool:
        found = self.tokens[self.next].text == text
        self.next += found
        return found

    def _token(self, found: re.Match[str]) -> _Token:
        kind, text, at = str(found.lastgroup), found[0], found.start()
        if found["number"]:
            return self._number(found)
        token = _Token(kind, text, at)
        if text in _EQUALITY:
            what = f"{text} cannot be decided: tasks end in batches, so a counter can jump over a number"
            self._refuse(token, what, "write >= to reach a number, <= to stay within it, > or < to be beyond it")
        if text in _FALLING:
            self._refuse(token, f"{text} can fall again, so no verdict on it is final", f"use {listed(GOAL_COUNTERS)}")
        if text in _MISSPELT:
            self._refuse(token, f"{text} is not known here", f"write {_MISSPELT[text]}")
        if kind == "word" and text not in (*GOAL_COUNTERS, *_WORDS):
            counters = f"the counters are {listed(GOAL_COUNTERS)}"
            remedy = guess(text.lower(), (*GOAL_COUNTERS, *_WORDS), counters, "did you mean {}?")
            self._refuse(token, f"{text} is not known here", remedy)
        if kind == "other":
            known = "use counters, whole numbers, N%, >= > <= <, and, or, not, brackets"
            self._refuse(token, f"{text!r} is not known here", known)
        return token._replace(kind="counter") if text in GOAL_COUNTERS else token

    def _number(self, found: re.Match[str]) -> _Token:
        token = _Token("number", "".join(found[0].split()), found.start())
        decimals = (found["decimals"] or "").rstrip("0")
        if found["decimals"] and not found["percent"]:
            self._refuse(token, f"{token.text} is not a whole number", "write one, or a share of total such as 95%")
        if len(decimals) > MAX_DECIMALS:
            self._refuse(token, f"{token.text} is too fine", f"write at most {MAX_DECIMALS} decimals")
        value = int(found["whole"] + decimals)
        if value > MAX_NUMBER * 10 ** len(decimals):
            self._refuse(token, f"{token.text} is too large", f"write at most {MAX_NUMBER}")
        if not found["percent"]:
            return token._replace(value=value)
        # No share is a plain 0: in an open group, total times 0 would be infinity times 0, which is no number.
        return token._replace(kind="share", value=Share(value, 100 * 10 ** len(decimals)) if value else 0)

    def _refuse(self, token: _Token, what: str, remedy: str) -> NoReturn:
        raise InvalidInputError(f"{self.name}: {what} (column {token.at + 1} of {self.text!r}); {remedy}")


def listed(names: Sequence[str]) -> str:
    return f"{', '.join(names[:-1])} or {names[-1]}"


# Goals of a group.
