"""The order of tasks that need each other: what comes first, what stays, and what is refused."""

import time
from collections.abc import Mapping, Sequence
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rq_ceylon.errors import InvalidInputError
from rq_ceylon.graph import MAX_NEEDS, in_order


def refusal(needs: Mapping[str, Any]) -> str:
    with pytest.raises(InvalidInputError) as caught:
        in_order(needs, "tasks")
    return str(caught.value)


@pytest.mark.parametrize(
    ("needs", "order"),
    [
        ({}, []),
        ({"c": [], "a": [], "b": []}, ["c", "a", "b"]),
        ({"a": [], "b": ["a"], "c": []}, ["a", "b", "c"]),
        ({"b": ["a"], "a": []}, ["a", "b"]),
        ({"x": [], "c": ["b"], "b": ["a"], "y": [], "a": [], "z": []}, ["x", "y", "a", "b", "c", "z"]),
        ({"a": [], "b": ["a", "a"]}, ["a", "b"]),
        ({"a": [], "d": ("b", "c"), "b": ("a",), "c": ("a",)}, ["a", "b", "c", "d"]),
    ],
)
def test_each_task_comes_after_its_needs_and_otherwise_stays(needs: dict[str, Sequence[str]], order: list[str]) -> None:
    assert in_order(needs, "tasks") == order


@st.composite
def graphs(draw: st.DrawFn) -> dict[str, list[str]]:
    """Any graph without a circle, its tasks given in any order."""
    ids = [f"t{index}" for index in range(draw(st.integers(0, 12)))]
    needs = {
        tid: draw(st.lists(st.sampled_from(ids[:index]), max_size=4)) if index else [] for index, tid in enumerate(ids)
    }
    return {tid: needs[tid] for tid in draw(st.permutations(ids))}


@given(needs=graphs())
def test_next_is_always_the_foremost_task_that_can_be(needs: dict[str, list[str]]) -> None:
    expected: list[str] = []
    while len(expected) < len(needs):
        expected.append(next(tid for tid in needs if tid not in expected and set(needs[tid]) <= set(expected)))

    assert in_order(needs, "tasks") == expected


@given(needs=graphs())
def test_an_order_that_is_good_already_stays(needs: dict[str, list[str]]) -> None:
    ordered = in_order(needs, "tasks")

    assert in_order({tid: needs[tid] for tid in ordered}, "tasks") == ordered


@pytest.mark.parametrize(
    ("needs", "circle"),
    [
        ({"a": ["b"], "b": ["a"]}, "a -> b -> a"),
        ({"b": ["a"], "a": ["b"]}, "b -> a -> b"),
        ({"x": [], "c": ["a"], "a": ["b", "x"], "b": ["c"]}, "c -> a -> b -> c"),
        ({"before": ["b"], "a": ["c"], "b": ["a"], "c": ["b"], "after": ["c"]}, "a -> c -> b -> a"),
        (
            {f"t{index}": [f"t{(index + 1) % 50}"] for index in range(50)},
            "t0 -> t1 -> t2 -> t3 -> t4 -> t5 -> t6 -> t7 -> … 42 more … -> t0",
        ),
    ],
)
def test_a_circle_is_refused_along_its_needs_from_its_foremost_task(needs: dict[str, list[str]], circle: str) -> None:
    assert refusal(needs) == f"tasks: tasks need each other in a circle: {circle}; remove one of these needs"


@pytest.mark.parametrize(
    ("needs", "says"),
    [
        ({"build": [], "test": ["biuld"]}, "'test' needs 'biuld', which is not in the group; did you mean 'build'?"),
        ({"a": [], "b": ["zzzz"]}, "'b' needs 'zzzz', which is not in the group; name a task of this group"),
        ({"a": [], "b": [5]}, "'b' needs 5, which is not in the group"),
        ({"a": [], "b": [["a"]]}, "'b' needs ['a'], which is not in the group"),
        ({"a": ["a"]}, "'a' needs itself; remove it from its needs"),
        ({"a": [], "b": "a"}, "the needs of 'b' are the text 'a'; give a list of ids"),
    ],
)
def test_a_need_that_cannot_be_met_is_refused_with_the_remedy(needs: dict[str, Any], says: str) -> None:
    message = refusal(needs)

    assert message.startswith("tasks: ")
    assert says in message


def test_a_task_needs_at_most_256_others() -> None:
    ids = [f"t{index}" for index in range(MAX_NEEDS + 1)]
    needs: dict[str, list[str]] = {tid: [] for tid in ids}

    assert in_order({**needs, "last": ids[:MAX_NEEDS]}, "tasks")[-1] == "last"
    assert "'last' needs 257 tasks; a task may need 256" in refusal({**needs, "last": ids})


@pytest.mark.parametrize("shape", ["chain", "backward", "fan", "circle", "misspelt"])
def test_a_hundred_thousand_tasks_take_about_a_second(shape: str) -> None:
    """The bound is far above what it takes, so that only another order of growth fails it, never a slow machine."""
    size = 100_000
    ids = [f"t{index}" for index in range(size)]
    needs: dict[str, list[str]] = {tid: [] for tid in ids}
    for index in range(1, size):
        match shape:
            case "backward":
                needs[ids[index - 1]] = [ids[index]]
            case "fan":
                needs[ids[index]] = [ids[index * 7919 % index], ids[index // 2]]
            case _:
                needs[ids[index]] = [ids[index - 1]]
    if shape == "circle":
        needs["t0"] = [ids[-1]]
    if shape == "misspelt":
        needs[ids[-1]] = ["t_99998"]
    started = time.process_time()
    if shape in ("circle", "misspelt"):
        refusal(needs)
    else:
        ordered = in_order(needs, "tasks")
        assert ordered == (ids[::-1] if shape == "backward" else ids)

    assert time.process_time() - started < 10
