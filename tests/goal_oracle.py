"""
What a goal's verdict must be, by brute force over every outcome of a small group, and the properties that any evaluator
of programs must have against it.

The oracle reads the expression's text by Python's own rules and shares no code with the compiler. An evaluator is any
function of a program and counters; to check one in a closing group, give one that takes the group as closing:

    @given(text=expressions(), counters=small_counters())
    def test_...(text, counters):
        check_sound(my_verdict, text, counters)
"""

import math
import re
from collections.abc import Callable, Iterator
from fractions import Fraction
from itertools import product
from typing import Any

from hypothesis import strategies as st

from rq_ceylon.expression import GOAL_COUNTERS, MAX_DEPTH, MAX_OPERATIONS, parse
from rq_ceylon.views import Counters

Verdict = Callable[[str, Counters], bool | None]
"""From a program and counters: True holds in every outcome, False in none, None is not decided."""

_CHECKED = re.compile(
    rf"(?:\s|[()]|>=|<=|[<>]|[0-9]+(?:\.[0-9]+)?\s*%|[0-9]+|\b(?:and|or|not|{'|'.join(GOAL_COUNTERS)})\b)+"
)
_SHARE = re.compile(r"([0-9]+(?:\.[0-9]+)?)\s*%")


# The oracle.


def oracle(text: str, counters: Counters, *, closing: bool = False) -> bool | None:
    """Whether the expression holds in every outcome of the open tasks, in none, or in some."""
    assert _CHECKED.fullmatch(text), text
    source = _SHARE.sub(r"(Fraction('\1') / 100 * total)", " ".join(text.split()))
    condition = compile(source, "expression", "eval")
    growing = [name for name in ("attempts", "crashes") if name in text]
    seen = set()
    for outcome in _outcomes(text, counters, growing, closing=closing):
        seen.add(bool(eval(condition, {"__builtins__": {}, "Fraction": Fraction}, outcome)))  # noqa: S307 (checked)
        if len(seen) == 2:
            return None
    return seen.pop()


def _outcomes(text: str, now: Counters, growing: list[str], *, closing: bool) -> Iterator[dict[str, int]]:
    """
    Each way in which the open tasks can end, with each way in which attempts and crashes can grow meanwhile. These
    have no end, but only their order among the expression's numbers and each other matters, so one count beside each
    number stands for all between two of them.
    """
    numbers = {int(found) for found in re.findall(r"[0-9]+", text)}
    numbers |= {math.floor(Fraction(found) / 100 * now.total) for found in _SHARE.findall(text)}
    numbers |= {*range(now.total + 1), now.attempts, now.crashes}
    beside = {number + step for number in numbers for step in (-1, 0, 1, 2)} | {max(numbers) + 3}
    ranges = []
    for name in growing:
        count: int = getattr(now, name)
        ranges.append([count, *sorted(number for number in beside if number > count and now.open)])
    for completed in range(now.open + 1):
        for failed in range(1 if closing else now.open - completed + 1):
            ended = {
                "total": now.total,
                "completed": now.completed + completed,
                "failed": now.failed + failed,
                "cancelled": now.cancelled + now.open - completed - failed,
            }
            for grown in product(*ranges):
                yield {**ended, **dict(zip(growing, grown, strict=True))}


# A reference of the evaluator that the scripts have in Lua: the same rules over intervals.


def interval_verdict(program: str, counters: Counters, *, closing: bool = False) -> bool | None:
    stack: list[tuple[float, float]] = []
    for token in program.split(","):
        match token:
            case "not":
                low, high = stack.pop()
                stack.append((1 - high, 1 - low))
            case "and" | "or" | "*" | ">=" | ">" | "<=" | "<":
                right, left = stack.pop(), stack.pop()
                stack.append(_apply(token, left, right))
            case "call":
                stack.append((0, 1))
            case _ if token.isdecimal():
                stack.append((int(token), int(token)))
            case _:
                stack.append(_interval(token, counters, closing=closing))
    [(low, high)] = stack
    return bool(low) if low == high else None


def _interval(name: str, counters: Counters, *, closing: bool) -> tuple[float, float]:
    now: int = getattr(counters, name)
    match name:
        case "completed" | "cancelled":
            return now, now + counters.open
        case "failed":
            return now, now if closing else now + counters.open
        case "attempts" | "crashes":
            return now, math.inf if counters.open else now
        case _:
            return now, now


def _apply(token: str, left: tuple[float, float], right: tuple[float, float]) -> tuple[float, float]:
    match token:
        case "and":
            return min(left[0], right[0]), min(left[1], right[1])
        case "or":
            return max(left[0], right[0]), max(left[1], right[1])
        case "*":
            return left[0] * right[0], left[1] * right[1]
        case ">=":
            return left[0] >= right[1], left[1] >= right[0]
        case ">":
            return left[0] > right[1], left[1] > right[0]
        case "<=":
            return left[1] <= right[0], left[0] <= right[1]
        case _:
            return left[1] < right[0], left[0] < right[1]


# The properties.


def check_sound(verdict: Verdict, text: str, counters: Counters, *, closing: bool = False) -> None:
    """What the evaluator calls certain is certain, and a group without open tasks leaves it nothing to wait for."""
    said, truth = verdict(parse(text, "when").program, counters), oracle(text, counters, closing=closing)

    assert said is None or said is truth, f"{text} at {counters}: said {said}, is {truth}"
    assert said is not None or counters.open, f"{text} at {counters}: undecided though every task has ended"


def check_exact(verdict: Verdict, text: str, counters: Counters, *, closing: bool = False) -> None:
    """For a single comparison of one counter with a number or a share, the evaluator says at once what is certain."""
    said, truth = verdict(parse(text, "when").program, counters), oracle(text, counters, closing=closing)

    assert said is truth, f"{text} at {counters}: said {said}, is {truth}"


# Strategies. Numbers are small, so that they lie among the counters of small groups; now and then one is huge.

_SIGNS = st.sampled_from([">=", ">", "<=", "<"])
_GAPS = st.sampled_from(["", " ", "  ", "\n"])
_NUMBERS = st.one_of(st.integers(0, 14), st.sampled_from([10**6, 10**12])).map(str)
_SHARES = st.one_of(
    st.integers(0, 110).map(str),
    st.sampled_from(["0.0", "12.5", "33.3333", "49.9", "50.0", "66.67", "99.5", "99.9999", "100.0", "1000000"]),
).map(lambda text: text + "%")


@st.composite
def comparisons(draw: st.DrawFn) -> str:
    """One counter against a number or a share, on either side."""
    counter = draw(st.sampled_from(GOAL_COUNTERS))
    other = draw(_NUMBERS if counter == "total" else st.one_of(_NUMBERS, _SHARES))
    return _compared(draw, counter, other)


@st.composite
def _counter_comparisons(draw: st.DrawFn) -> str:
    first, second = draw(st.permutations(GOAL_COUNTERS))[:2]
    return _compared(draw, first, second)


def _compared(draw: st.DrawFn, counter: str, other: str) -> str:
    left, right = draw(st.permutations([counter, other]))
    return f"{left}{draw(_GAPS)}{draw(_SIGNS)}{draw(_GAPS)}{right}"


def expressions() -> st.SearchStrategy[str]:
    """Any expression that `parse` takes, spelt in many ways."""
    single = st.one_of(comparisons(), comparisons(), _counter_comparisons())
    return st.recursive(single, _larger, max_leaves=8).filter(_is_within_limits)


def _larger(parts: st.SearchStrategy[str]) -> st.SearchStrategy[str]:
    joined = st.tuples(parts, st.sampled_from([" and ", " or ", "\nand "]), parts).map("".join)
    bracketed = parts.map(lambda text: f"({text})")
    negated = parts.map(lambda text: f"not {text}")
    return st.one_of(joined, joined, bracketed, negated, negated.map(lambda text: f"( {text} )"))


def _is_within_limits(text: str) -> bool:
    deep = text.count("(") + text.count("not") <= MAX_DEPTH
    operations = len(re.findall(r"[<>]|and|or|not", text)) + 2 * text.count("%")
    return len(text) <= 512 and deep and operations <= MAX_OPERATIONS


@st.composite
def small_counters(draw: st.DrawFn, *, closing: bool = False) -> Counters:
    """Counters of a group with few open tasks, often none; of a closing group only running tasks are open."""
    open_tasks = [0 if closing else draw(st.integers(0, 2)) for _ in range(2)] + [draw(st.integers(0, 3))]
    ended = [draw(st.integers(0, 4)) for _ in range(3)]
    names = ("waiting", "pending", "in_progress", "completed", "failed", "cancelled")
    counts: dict[str, Any] = dict(zip(names, open_tasks + ended, strict=True))
    attempts, crashes = draw(st.integers(0, 12)), draw(st.integers(0, 4))
    return Counters(total=sum(counts.values()), attempts=attempts, crashes=crashes, **counts)
