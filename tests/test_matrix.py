"""Tasks with a matrix: their expansion, refusals, and constant memory for a hundred thousand of them."""

from __future__ import annotations

import json
import tracemalloc
from collections.abc import Iterable
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rq_ceylon.client import check_group
from rq_ceylon.errors import GroupFileError
from rq_ceylon.groupfile import load
from rq_ceylon.groupfile.matrix import Axis, Matrix
from rq_ceylon.models import Task


def tasks(text: str) -> list[Task]:
    (group,) = load(f"name: x\ntasks:\n{text}", "group.yaml")
    return list(group.tasks)


def ids(found: Iterable[Task]) -> list[str | None]:
    return [task.id for task in found]


def problems(text: str) -> list[str]:
    """Without the file's name and the line: `column: where: what`."""
    with pytest.raises(GroupFileError) as caught:
        load(f"name: x\ntasks:\n{text}", "group.yaml")
    return [problem.split(":", 2)[2] for problem in caught.value.problems]


# ---- what it becomes -------------------------------------------------------------------------------------------------
def test_a_matrix_makes_one_task_per_combination_the_last_axis_fastest() -> None:
    found = tasks("""
  size:
    matrix: {picture: [cat, dog], width: {range: [100, 300, 100]}}
    uses: resize
    with: {path: "in/${{ matrix.picture }}.jpg", width: "${{ matrix.width }}"}
""")

    assert [(task.id, task.uses, task.arguments) for task in found] == [
        ("size-cat-100", "resize", {"path": "in/cat.jpg", "width": 100}),
        ("size-cat-200", "resize", {"path": "in/cat.jpg", "width": 200}),
        ("size-dog-100", "resize", {"path": "in/dog.jpg", "width": 100}),
        ("size-dog-200", "resize", {"path": "in/dog.jpg", "width": 200}),
    ]


@pytest.mark.parametrize(
    "value", [5, 0.5, True, False, None, "text", "5", [1, "a"], {"deep": [None]}, -3, "", "a b", "é😀"]
)
def test_a_look_up_alone_keeps_the_value_and_its_type(value: Any) -> None:
    text = json.dumps(value, ensure_ascii=False)
    (task,) = tasks(f"  a: {{matrix: {{v: [{text}]}}, with: {{y: '${{{{matrix.v}}}}', z: ['${{{{ matrix.v }}}}']}}}}")

    assert task.arguments["y"] == value
    assert type(task.arguments["y"]) is type(value)
    assert task.arguments["z"] == [value]


@pytest.mark.parametrize("value", [[1, "a"], {"deep": [None]}])
def test_a_list_or_mapping_stands_alone_only(value: Any) -> None:
    (said,) = problems(f"  a: {{matrix: {{v: [{json.dumps(value)}]}}, with: {{y: 'a ${{{{ matrix.v }}}}'}}}}")

    assert "which cannot stand in a text" in said


def test_inside_a_text_a_value_stands_as_in_json() -> None:
    found = tasks("  a: {matrix: {v: [5, 0.5, true, null, b]}, with: {x: '<${{ matrix.v }}|${{matrix.v}}>'}}")

    assert [task.arguments["x"] for task in found] == ["<5|5>", "<0.5|0.5>", "<true|true>", "<null|null>", "<b|b>"]


def test_every_field_takes_look_ups_and_each_combination_its_own() -> None:
    one, two = tasks("""
  a:
    matrix: {of: [{uses: u1, s: 1m, n: 1, p: high}, {uses: u2, s: 2, n: 2, p: low}]}
    uses: ${{ matrix.of.uses }}
    role: r-${{ matrix.of.n }}
    duration: ${{ matrix.of.s }}
    timeout: ${{ matrix.of.n }}m
    max_attempts: ${{ matrix.of.n }}
    priority: ${{ matrix.of.p }}
    delay: ${{ matrix.of.n }}
    expires: ${{ matrix.of.n }}h
    metadata: {deep: [{deeper: "${{ matrix.of.n }}"}]}
    with: ${{ matrix.of }}
""")

    assert one == Task(
        id="a-0", uses="u1", role="r-1", duration="1m", timeout="1m", max_attempts=1, priority="high", delay=1,
        expires="1h", metadata={"deep": [{"deeper": 1}]}, arguments={"uses": "u1", "s": "1m", "n": 1, "p": "high"},
        needs=[],
    )  # fmt: skip
    assert (two.id, two.uses, two.role, two.duration, two.priority) == ("a-1", "u2", "r-2", 2, "low")


def test_needs_name_one_combination_or_all_of_them() -> None:
    found = tasks("""
  all: {needs: [size, fetch-dog]}
  size:
    matrix: {picture: [cat, dog], width: [1, 2]}
    needs: "fetch-${{ matrix.picture }}"
  fetch: {matrix: {picture: [cat, dog]}}
""")

    assert {task.id: task.needs for task in found} == {
        "fetch-cat": [],
        "fetch-dog": [],
        "size-cat-1": ["fetch-cat"],
        "size-cat-2": ["fetch-cat"],
        "size-dog-1": ["fetch-dog"],
        "size-dog-2": ["fetch-dog"],
        "all": ["size-cat-1", "size-cat-2", "size-dog-1", "size-dog-2", "fetch-dog"],
    }


def test_each_task_comes_after_all_that_it_needs() -> None:
    seen: set[str | None] = set()
    for task in tasks(
        "  c: {needs: b}\n  b: {matrix: {n: [1, 2]}, needs: 'a-${{ matrix.n }}'}\n  a: {matrix: {n: [1, 2]}}"
    ):
        assert seen.issuperset(task.needs)
        seen.add(task.id)


def test_values_that_no_id_can_hold_are_numbered_in_ids_and_in_needs_alike() -> None:
    found = tasks("""
  get: {matrix: {url: ["https://a/?b", "https://c"]}, with: {url: "${{ matrix.url }}"}}
  use: {matrix: {url: ["https://a/?b", "https://c"]}, needs: "get-${{ matrix.url }}"}
""")

    assert [(task.id, task.needs) for task in found] == [
        ("get-0", []),
        ("get-1", []),
        ("use-0", ["get-0"]),
        ("use-1", ["get-1"]),
    ]
    assert found[1].arguments == {"url": "https://c"}


@pytest.mark.parametrize(
    ("axes", "expected"),
    [
        ("n: [1, 2.5, true, null]", ["t-1", "t-2.5", "t-true", "t-null"]),
        ("n: [2026-01-01, eu-west]", ["t-2026-01-01", "t-eu-west"]),
        ("n: [1, '1']", ["t-0", "t-1"]),
        ("n: [a, a]", ["t-0", "t-1"]),
        ("n: [a, '']", ["t-0", "t-1"]),
        ("n: [a, b c]", ["t-0", "t-1"]),
        ("n: [a, [1]]", ["t-0", "t-1"]),
        ("n: [a, " + "x" * 25 + "]", ["t-0", "t-1"]),
        ("n: {range: [-1, 2]}", ["t--1", "t-0", "t-1"]),
        ("n: {range: [2, 0, -1]}", ["t-2", "t-1"]),
        ("n: [a, a-b], m: [b-c, c]", ["t-a-0", "t-a-1", "t-a-b-0", "t-a-b-1"]),
        ("n: [a-b, c-d], m: [2026-01-01]", ["t-a-b-2026-01-01", "t-c-d-2026-01-01"]),
    ],
)
def test_ids_are_readable_and_unique(axes: str, expected: list[str]) -> None:
    assert ids(tasks(f"  t: {{matrix: {{{axes}}}}}")) == expected


WORDS = st.lists(st.text("ab-1", max_size=3) | st.integers(-3, 3) | st.none(), min_size=1, max_size=4)


@given(st.lists(WORDS, min_size=1, max_size=3), st.text("ab1-", max_size=6))
def test_no_two_combinations_share_an_id_and_each_is_known(axes: list[list[Any]], other: str) -> None:
    matrix = Matrix("t", [Axis(str(at), values) for at, values in enumerate(axes)])
    made = [matrix.id(words) for _, words in matrix.rows()]

    assert len(made) == len(set(made)) == len(matrix)
    assert all(map(matrix.has, made))
    assert matrix.has(f"t-{other}") == (f"t-{other}" in made)


def test_tasks_of_a_list_without_an_id_get_the_next_number_that_no_other_task_has() -> None:
    found = tasks("- {}\n- {id: 1}\n- {}\n- {id: a, matrix: {n: [1]}}\n- {id: 3}\n")

    assert ids(found) == ["2", "1", "4", "a-1", "3"]


def test_two_dollars_stand_for_the_characters_themselves() -> None:
    plain, made = tasks("""
  a: {with: {x: "$${{ matrix.n }} {{ }} ${ } $$"}}
  b: {matrix: {n: [1]}, with: {x: "$${{ matrix.n }}=${{ matrix.n }}"}}
""")

    assert plain.arguments == {"x": "${{ matrix.n }} {{ }} ${ } $$"}
    assert made.arguments == {"x": "${{ matrix.n }}=1"}


def test_values_of_a_matrix_are_not_read_again() -> None:
    (task,) = tasks("  a: {matrix: {n: ['${{ matrix.n }}']}, with: {x: '${{ matrix.n }}'}}")

    assert task.arguments == {"x": "${{ matrix.n }}"}


AXIS_VALUES = st.lists(
    st.sampled_from(["a", "b", "a-b", "in/a", "0", "1", "2", "x y", ""]) | st.integers(-2, 3),
    min_size=1,
    max_size=4,
    unique_by=json.dumps,
)


@settings(deadline=None)
@given(AXIS_VALUES, AXIS_VALUES, st.data())
def test_a_need_by_look_ups_is_the_combination_of_the_same_values_or_is_refused(
    one: list[Any], two: list[Any], data: st.DataObject
) -> None:
    fewer = [data.draw(st.lists(st.sampled_from(values), min_size=1, unique_by=json.dumps)) for values in (one, two)]
    document = {
        "name": "x",
        "tasks": {
            "fetch": {"matrix": {"n": one, "m": two}, "with": {"n": "${{ matrix.n }}", "m": "${{ matrix.m }}"}},
            "check": {
                "matrix": {"m": fewer[1], "n": fewer[0]},
                "needs": "fetch-${{ matrix.n }}-${{ matrix.m }}",
                "with": {"n": "${{ matrix.n }}", "m": "${{ matrix.m }}"},
            },
        },
    }

    (group,) = load(json.dumps(document), "group.json")

    arguments = {task.id: task.arguments for task in group.tasks}
    for task in group.tasks:
        for need in task.needs:
            assert arguments[need] == task.arguments
    assert len(arguments) == len(one) * len(two) + len(fewer[0]) * len(fewer[1])


@settings(deadline=None)
@given(AXIS_VALUES, AXIS_VALUES)
def test_a_value_that_the_needed_task_has_not_is_never_another_one(have: list[Any], want: list[Any]) -> None:
    tasks = {
        "fetch": {"matrix": {"n": have}, "with": {"n": "${{ matrix.n }}"}},
        "check": {"matrix": {"n": want}, "needs": ["fetch-${{ matrix.n }}"], "with": {"n": "${{ matrix.n }}"}},
    }
    try:
        (group,) = load(json.dumps({"name": "x", "tasks": tasks}), "group.json")
    except GroupFileError:
        return
    values = {task.id: task.arguments["n"] for task in group.tasks}

    for task in group.tasks:
        for need in task.needs:
            assert str(values[need]) == str(task.arguments["n"])


def test_a_need_is_found_by_its_values_though_each_matrix_numbers_its_own() -> None:
    found = tasks("""
  fetch: {matrix: {file: [in/a, in/b, in/c]}}
  check: {matrix: {file: [in/b, in/c]}, needs: "fetch-${{ matrix.file }}"}
  of-a-part: {matrix: {of: [{file: in/c}]}, needs: "fetch-${{ matrix.of.file }}"}
  by-id: {needs: fetch-2}
  by-name: {matrix: {what: [fetch-0, check]}, needs: "${{ matrix.what }}"}
""")

    assert {task.id: task.needs for task in found if not task.id.startswith("fetch")} == {  # type: ignore[union-attr]
        "check-0": ["fetch-1"],
        "check-1": ["fetch-2"],
        "of-a-part-0": ["fetch-2"],
        "by-id": ["fetch-2"],
        "by-name-fetch-0": ["fetch-0"],
        "by-name-check": ["check-0", "check-1"],
    }


# ---- include and exclude ---------------------------------------------------------------------------------------------
def test_exclude_leaves_out_every_combination_that_it_fits() -> None:
    found = tasks("""
  t:
    matrix:
      os: [linux, windows]
      n: {range: [1, 4]}
      exclude: [{os: windows, n: 1}, {n: 3}]
""")

    assert ids(found) == ["t-linux-1", "t-linux-2", "t-windows-2"]


def test_include_adds_values_where_it_fits_and_else_a_combination() -> None:
    """The example of the documentation of GitHub Actions, and its result."""
    found = tasks("""
  t:
    matrix:
      fruit: [apple, pear]
      animal: [cat, dog]
      include:
        - {color: green}
        - {color: pink, animal: cat}
        - {fruit: apple, shape: circle}
        - {fruit: banana}
        - {fruit: banana, animal: cat}
""")

    assert ids(found) == [f"t-{number}" for number in range(6)]
    include: list[dict[str, Any]] = [
        {"color": "green"},
        {"color": "pink", "animal": "cat"},
        {"fruit": "apple", "shape": "circle"},
        {"fruit": "banana"},
        {"fruit": "banana", "animal": "cat"},
    ]
    axes = [Axis("fruit", ["apple", "pear"]), Axis("animal", ["cat", "dog"])]
    assert [values for values, _ in Matrix("t", axes, include=include).rows()] == [
        {"fruit": "apple", "animal": "cat", "color": "pink", "shape": "circle"},
        {"fruit": "apple", "animal": "dog", "color": "green", "shape": "circle"},
        {"fruit": "pear", "animal": "cat", "color": "pink"},
        {"fruit": "pear", "animal": "dog", "color": "green"},
        {"fruit": "banana"},
        {"fruit": "banana", "animal": "cat"},
    ]


@pytest.mark.parametrize(
    ("matrix", "expected"),
    [
        ("os: [linux], n: ['1'], include: [{os: mac, n: '1'}]", ["t-linux-1", "t-mac-1"]),
        ("os: [linux], include: [{os: linux, fast: true}]", ["t-linux"]),
        ("os: [linux], include: [{os: mac, n: 1}, {os: mac, n: 2}]", ["t-0", "t-1", "t-2"]),
        ("include: [{site: a, at: b}, {site: c, at: d}]", ["t-a-b", "t-c-d"]),
        ("include: [{site: a}, {at: d}]", ["t-0", "t-1"]),
        ("include: [{site: a/b}]", ["t-0"]),
        ("n: [1, 2], exclude: [{n: 1}], include: [{n: 1}]", ["t-2", "t-1"]),
        ("a: [" + "x" * 24 + "], b: [" + "y" * 24 + "], c: [" + "z" * 24 + "], include: [{d: 1}]", ["t-0"]),
        ("of: [{k: 1, l: 2}, {k: 3}], exclude: [{of: {l: 2, k: 1}}]", ["t-1"]),
    ],
)
def test_ids_of_chosen_combinations(matrix: str, expected: list[str]) -> None:
    assert ids(tasks(f"  t: {{matrix: {{{matrix}}}}}")) == expected


def test_needs_know_chosen_combinations_by_value() -> None:
    found = tasks("""
  build:
    matrix: {os: [linux, mac], n: [1, 2], exclude: [{os: mac, n: 1}], include: [{os: bsd, n: 1}]}
  test: {matrix: {os: [bsd, mac], n: [1, 2], exclude: [{os: mac, n: 1}, {os: bsd, n: 2}]},
         needs: "build-${{ matrix.os }}-${{ matrix.n }}"}
""")

    assert [task.needs for task in found][4:] == [["build-bsd-1"], ["build-mac-2"]]
    assert problems("""
  build: {matrix: {os: [linux, mac], n: [1, 2], exclude: [{os: mac, n: 1}]}}
  test: {matrix: {os: [mac], n: [1]}, needs: "build-${{ matrix.os }}-${{ matrix.n }}"}
""") == ["46: tasks.test.needs[0]: no task has the id 'build-mac-1'; did you mean \"build\"?"]


# ---- what is refused -------------------------------------------------------------------------------------------------
FORMS = "write ${{ matrix.NAME }} in a task with a matrix, or $${{ for these characters themselves"
RANGE = "write [first, end] or [first, end, step] in whole numbers; the end is not included"
AXES = "where axes are needed; write name: [first, second]"
VALUES = "where values are needed; write [first, second], or {range: [first, end]}"


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("  a: {matrix: {}}", f"15: tasks.a.matrix: an empty mapping {AXES}"),
        ("  a: {matrix: [1]}", f"15: tasks.a.matrix: a list {AXES}"),
        ("  a: {matrix: {n: []}}", f"19: tasks.a.matrix.n: an empty list {VALUES}"),
        ("  a: {matrix: {n: 1}}", f"19: tasks.a.matrix.n: 1 {VALUES}"),
        ("  a: {matrix: {n: }}", f"19: tasks.a.matrix.n: nothing {VALUES}"),
        ("  a: {matrix: {n: {range: [1, 2], step: 3}}}", f"19: tasks.a.matrix.n: a mapping {VALUES}"),
        ("  a: {matrix: {n: {range: 5}}}", f"27: tasks.a.matrix.n.range: 5 is not a range; {RANGE}"),
        ("  a: {matrix: {n: {range: [0, 1.5]}}}", f"27: tasks.a.matrix.n.range: [0, 1.5] is not a range; {RANGE}"),
        ("  a: {matrix: {n: {range: [0, 1, 0]}}}", f"27: tasks.a.matrix.n.range: [0, 1, 0] is an empty range; {RANGE}"),
        ("  a: {matrix: {n: {range: [3, 3]}}}", f"27: tasks.a.matrix.n.range: [3, 3] is an empty range; {RANGE}"),
        ("  a: {matrix: {n: {range: [0, 1" + "0" * 30 + "]}}}",
         f"27: tasks.a.matrix.n.range: [0, 1{'0' * 30}] is not a range; {RANGE}"),
        ("  a: {matrix: {n: {range: [0, 1000001]}}}",
         "15: tasks.a.matrix: 1,000,001 combinations; give a matrix at most 1,000,000"),
        ("  a: {matrix: {n: {range: [0, 600000]}}}\n  b: {matrix: {n: {range: [0, 600000]}}}",
         "3: tasks: 1,200,000 tasks; give a group at most 1,000,000"),
        ("  a: {matrix: {2n: [1]}}", "16: tasks.a.matrix.2n: '2n' is not usable as an axis; "
         "use letters, digits, _ and -, not a digit first"),
        ("  a: {matrix: {" + ", ".join(f"{axis}: [1]" for axis in "bcdefghij") + "}}",
         "15: tasks.a.matrix: 9 axes; give a matrix at most 8"),
        (f"  {'a' * 50}: {{matrix: {{n: [{'b' * 20}]}}}}",
         f"64: tasks.{'a' * 50}.matrix: '{'a' * 50}-{'b' * 20}' has 71 characters, an id at most 64; "
         "shorten the task's name, or use fewer axes"),
        ("- {matrix: {n: [1]}}", "12: tasks[0].matrix: its tasks have no name to begin their ids with; add an id"),
        ("  a: {with: {x: '${{ matrix.n }}'}}",
         f"17: tasks.a.with.x: '${{{{ matrix.n }}}}' needs a matrix, and here is none; {FORMS}"),
        ("  a: {matrix: {num: [1]}, with: {x: '${{ matrix.nun }}'}}",
         '37: tasks.a.with.x: matrix.nun is not an axis of this task\'s matrix; did you mean "num"?'),
        ("  a: {matrix: {num: [1]}, with: {x: '${{ matrix.xyz }}'}}",
         "37: tasks.a.with.x: matrix.xyz is not an axis of this task's matrix; the axes are num"),
        ("  a: {matrix: {n: [1]}, with: {x: '${{ n }}'}}",
         f"35: tasks.a.with.x: '${{{{ n }}}}' has a ${{{{ that names no value; {FORMS}"),
        ("  a: {matrix: {n: [1]}, with: {x: '${{ matrix.n + 1 }}'}}",
         f"35: tasks.a.with.x: '${{{{ matrix.n + 1 }}}}' has a ${{{{ that names no value; {FORMS}"),
        ("  a: {matrix: {n: [1]}, with: {x: '${{ matrix.n '}}",
         f"35: tasks.a.with.x: '${{{{ matrix.n ' has a ${{{{ that names no value; {FORMS}"),
        ("  a: {matrix: {n: [{k: 1}, {}]}, with: {x: '${{ matrix.n.k }}'}}",
         "44: tasks.a.with.x: matrix.n.k finds nothing in {}; add it to the matrix"),
        ("  a: {matrix: {n: {range: [0, 9]}}, with: {x: '${{ matrix.n.k }}'}}",
         "47: tasks.a.with.x: matrix.n.k finds nothing in 0; add it to the matrix"),
        ("  a: {matrix: {n: [1, x]}, duration: '${{ matrix.n }}s'}",
         "38: tasks.a.duration: 'xs' is not a duration; give seconds (30) or text such as 30s, 5m, 1h30m, 250ms, 2d"),
        ("  a: {matrix: {n: [1, x]}, role: '${{ matrix.n }}'}",
         "34: tasks.a.role: 1 where text is needed; write text, in quotes"),
        ("  a: {matrix: {n: [{}, 1]}, with: '${{ matrix.n }}'}",
         "35: tasks.a.with: 1 is not usable; input should be a valid dictionary"),
        ("  a: {matrix: {n: [1, 2]}}\n  a-1: {}", "3: tasks.a-1: 'a-1' is also an id that 'a' makes; rename one"),
        ("  a: {matrix: {n: [b-c]}}\n  a-b: {matrix: {n: [c]}}",
         "3: tasks.a-b: it makes the id 'a-b-c', as 'a' does; rename one"),
        ("  a: {matrix: {n: [1, 2]}}\n  b: {needs: a-3}",
         "14: tasks.b.needs[0]: no task has the id 'a-3'; name a task of this group"),
        ("  a: {matrix: {n: [1, 2]}}\n  b: {matrix: {n: [1, 3]}, needs: ['a-${{ matrix.n }}']}",
         "36: tasks.b.needs[0]: no task has the id 'a-3'; name a task of this group"),
        ("  a: {matrix: {n: [1, 2]}, needs: a-1}",
         "35: tasks.a.needs[0]: its combinations would need each other; remove it from its needs"),
        ("  a: {matrix: {n: [1, 2]}, needs: b}\n  b: {needs: a-1}",
         "1: tasks: tasks need each other in a circle: a -> b -> a; remove one of these needs"),
        ("  a: {matrix: {n: {range: [0, 257]}}}\n  b: {needs: a}",
         "14: tasks.b.needs: it needs 257 tasks; a task may need 256; "
         "put it into a second group with depends_on, which waits for the whole first group"),
        ("  a: {matrix: {n: [b c, 1]}}\n  b: {needs: a-1}\n  a-x: {matrix: {n: [2]}}\n  c: {needs: a-2}",
         "14: tasks.c.needs[0]: no task has the id 'a-2'; did you mean \"a-x\"?"),
        ("  a: {matrix: {n: [1, b c]}}\n  b: {needs: a-1}",
         "14: tasks.b.needs[0]: 'a-1' can mean each of a-0, a-1; rename a task, or write other values"),
        ("  a: {matrix: {n: [5, b c]}}\n  a-5: {}\n  b: {matrix: {n: [5]}, needs: 'a-${{ matrix.n }}'}",
         "32: tasks.b.needs[0]: 'a-5' can mean each of a-0, a-5; rename a task, or write other values"),
        ("  a: {matrix: {n: [b c, d e]}}\n  b: {matrix: {n: [0, 1]}, needs: 'a-${{ matrix.n }}'}",
         "35: tasks.b.needs[0]: no task has the id 'a-0'; name a task of this group"),
        ("  a: {matrix: {n: [1], exclude: [{n: 1}]}}",
         "15: tasks.a.matrix: exclude leaves no combination; leave one, or remove the task"),
        ("  a: {matrix: {n: [1], exclude: [{m: 1}]}}",
         "35: tasks.a.matrix.exclude[0].m: 'm' is not an axis of this matrix; the axes are n"),
        ("  a: {matrix: {n: ['3.1', x], exclude: [{n: 3.1}]}}",
         "45: tasks.a.matrix.exclude[0].n: 3.1 is not '3.1', the value of the axis 'n'; write it alike"),
        ("  a: {matrix: {n: ['3.1', x], include: [{n: 3.1, m: 1}]}}",
         "45: tasks.a.matrix.include[0].n: 3.1 is not '3.1', the value of the axis 'n'; write it alike"),
        ("  a: {matrix: {n: [1], exclude: [{n: 2}]}}",
         "38: tasks.a.matrix.exclude[0].n: 2 is no value of the axis 'n'; name one, or remove this"),
        ("  a: {matrix: {n: [1], exclude: {n: 2}}}",
         "33: tasks.a.matrix.exclude: a mapping where combinations are needed; write [{axis: value}]"),
        ("  a: {matrix: {n: [1], include: [1]}}",
         "33: tasks.a.matrix.include: a list where combinations are needed; write [{axis: value}]"),
        ("  a: {matrix: {include: []}}",
         "25: tasks.a.matrix.include: an empty list where combinations are needed; write [{axis: value}]"),
        ("  a: {matrix: {n: [1], include: [{2n: 1}]}}",
         "35: tasks.a.matrix.include[0].2n: '2n' is not usable as a name; "
         "use letters, digits, _ and -, not a digit first"),
        ("  a: {matrix: {n: {range: [0, 10001]}, exclude: [{n: 1}]}}",
         "15: tasks.a.matrix: 10,001 combinations; give a matrix with exclude or include at most 10,000"),
        ("  a: {matrix: {n: [1, 2], include: [{n: 1, m: x}]}, with: {m: '${{ matrix.m }}'}}",
         "63: tasks.a.with.m: matrix.m finds nothing in {'n': 2}; add it to the matrix"),
    ],
)  # fmt: skip
def test_each_mistake_is_told_with_its_place_and_a_remedy(text: str, says: str) -> None:
    assert problems(text) == [says]


def test_a_look_up_in_the_defaults_is_refused() -> None:
    with pytest.raises(GroupFileError, match=r"^group.yaml:2:18: defaults.role: '\$\{\{ matrix.n \}\}' needs a matrix"):
        load("name: x\ndefaults: {role: '${{ matrix.n }}'}\ntasks: {a: {matrix: {n: [1]}}}", "group.yaml")


def test_a_broken_matrix_is_one_problem_and_the_rest_of_the_task_is_checked() -> None:
    assert problems("  a: {matrix: {n: 1}, duration: '${{ matrix.n }}', rolle: r}") == [
        f"19: tasks.a.matrix.n: 1 {VALUES}",
        '52: tasks.a.rolle: unknown key; did you mean "role"?',
    ]


# ---- many ------------------------------------------------------------------------------------------------------------
def peak_of_submitting(size: int) -> int:
    """Bytes held at most while such a file is read and all its parts are made."""
    text = f"name: x\ntasks: {{a: {{matrix: {{n: {{range: [0, {size}]}}}}, with: {{n: '${{{{ matrix.n }}}}'}}}}}}"
    tracemalloc.start()
    try:
        (group,) = load(text, "group.yaml")
        check_group(group)
        return tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()


@pytest.mark.long
def test_ten_times_the_tasks_take_no_more_memory() -> None:
    peak_of_submitting(1)

    assert peak_of_submitting(20_000) < 1.5 * peak_of_submitting(2_000)


def test_the_tasks_can_be_gone_through_again_and_are_counted_without() -> None:
    (group,) = load("name: x\ntasks: {a: {matrix: {n: {range: [0, 1000000]}}}}", "group.yaml")
    (few,) = load("name: x\ntasks: {a: {matrix: {n: [1, 2]}}}", "group.yaml")

    assert len(group.tasks) == 1_000_000  # type: ignore[arg-type]
    assert list(few.tasks) == list(few.tasks)
