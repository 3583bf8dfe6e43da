"""Group files: what a good one becomes, and the message and position for each mistake and each attack."""

from __future__ import annotations

import json
import re
from contextlib import suppress
from pathlib import Path

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from rq_ceylon.errors import GroupFileError
from rq_ceylon.groupfile import load, reader
from rq_ceylon.models import Goal, Priority, Task, TaskGroup

EXAMPLES = Path(__file__).parent.parent / "examples"

TASK_KEYS = (
    "use one of uses, role, duration, timeout, max_attempts, max_crashes, priority, delay, expires, metadata, with, "
)
TASK_KEYS += "needs, matrix"
DEFAULT_KEYS = "use one of uses, role, duration, timeout, max_attempts, max_crashes, priority, delay, expires, metadata"
GROUP_KEYS = (
    "use one of name, description, key, priority, retention, defaults, tasks, goal, depends_on, on_need_failed, "
    "max_running, dispatch, open, open_timeout"
)
DURATIONS = "give seconds (30) or text such as 30s, 5m, 1h30m, 250ms, 2d"
IDS = "use 1 to 64 letters, digits and . _ : -"


def loaded(text: str | bytes, filename: str = "group.yaml") -> TaskGroup:
    (group,) = load(text, filename)
    return group


def problems(text: str | bytes) -> list[str]:
    with pytest.raises(GroupFileError) as caught:
        load(text, "group.yaml")
    return caught.value.problems


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        pytest.param(
            "",
            [
                "1:1: file: it is empty; start with name: and tasks:",
            ],
            id="an_empty_file",
        ),
        pytest.param(
            "~",
            [
                "1:1: name: missing; add it",
                "1:1: tasks: missing; add it",
            ],
            id="null",
        ),
        pytest.param(
            """\
- a
- b
""",
            [
                "1:1: file: a list where a mapping is needed; write key: value",
            ],
            id="a_list",
        ),
        pytest.param(
            "description: x\n",
            [
                "1:1: name: missing; add it",
                "1:1: tasks: missing; add it",
            ],
            id="no_name_and_no_tasks",
        ),
        pytest.param(
            """\
name:
tasks: {a: }
""",
            [
                "1:6: name: missing; add it",
            ],
            id="name_null",
        ),
        pytest.param(
            """\
name: 5
tasks: {a: }
""",
            [
                "1:7: name: 5 where text is needed; write text, in quotes",
            ],
            id="name_number",
        ),
        pytest.param(
            """\
name: ""
tasks: {a: }
""",
            [
                "1:7: name: '' is not usable; string should have at least 1 character",
            ],
            id="name_empty",
        ),
        pytest.param(
            "name: " + "x" * 201 + "\nkey: ''\ntasks: {a: }\n",
            [
                f"1:7: name: '{'x' * 201}' is not usable; string should have at most 200 characters",
                "2:6: key: '' is not usable; string should have at least 1 character",
            ],
            id="name_long",
        ),
        pytest.param(
            """\
name: x
task: {a: }
tasks: {a: }
""",
            [
                '2:1: task: unknown key; did you mean "tasks"?',
            ],
            id="unknown_top",
        ),
        pytest.param(
            """\
name: x
tasks:
  a:
    retries: 3
    depends_on: [b]
""",
            [
                f"4:5: tasks.a.retries: unknown key; {TASK_KEYS}",
                f"5:5: tasks.a.depends_on: unknown key; {TASK_KEYS}",
            ],
            id="unknown_keys_of_a_task",
        ),
        pytest.param(
            """\
name: x
needs: other
tasks: {a: }
""",
            [
                f"2:1: needs: unknown key; {GROUP_KEYS}",
            ],
            id="needs_of_a_group",
        ),
        pytest.param(
            """\
name: x
tasks:
  item:
    role: r
    prio: high
""",
            [
                '5:5: tasks.item.prio: unknown key; did you mean "priority"?',
            ],
            id="unknown_task_key",
        ),
        pytest.param(
            """\
name: x
tasks:
  a: {id: b}
""",
            [
                f"3:7: tasks.a.id: unknown key; {TASK_KEYS}",
            ],
            id="id_in_mapping",
        ),
        pytest.param(
            """\
name: x
defaults: {needs: a, with: {b: 1}}
tasks: {a: }
""",
            [
                f"2:12: defaults.needs: unknown key; {DEFAULT_KEYS}",
                f"2:22: defaults.with: unknown key; {DEFAULT_KEYS}",
            ],
            id="needs_in_defaults",
        ),
        pytest.param(
            """\
name: x
defaults: []
tasks: {a: }
""",
            [
                "2:11: defaults: an empty list where a mapping is needed; write key: value",
            ],
            id="defaults_list",
        ),
        pytest.param(
            """\
name: x
priority: 1
tasks:
  a: {priority: hihg}
  b: {priority: urgent}
""",
            [
                "2:11: priority: 1 is not known here; use high, normal or low",
                "4:17: tasks.a.priority: 'hihg' is not known here; did you mean \"high\"?",
                "5:17: tasks.b.priority: 'urgent' is not known here; use high, normal or low",
            ],
            id="priority",
        ),
        pytest.param(
            """\
name: x
tasks: {a: }
goal: {when: completed >= 1, on_achieved: Cancle}
""",
            [
                "3:43: goal.on_achieved: 'Cancle' is not known here; did you mean \"cancel\"?",
            ],
            id="policy",
        ),
        pytest.param(
            """\
name: x
tasks:
  a:
    timeout: 1:30
""",
            [
                "4:14: tasks.a.timeout: '1:30' is not a duration; write 90s or 1m30s",
            ],
            id="sexagesimal",
        ),
        pytest.param(
            """\
name: x
retention: -1
tasks:
  a: {timeout: 30x, delay: true, expires: [1], duration: 2026-01-01}
""",
            [
                f"2:12: retention: -1 is out of range (0 to 10 years); {DURATIONS}",
                f"4:16: tasks.a.timeout: '30x' is not a duration; {DURATIONS}",
                f"4:28: tasks.a.delay: True is not a duration; {DURATIONS}",
                f"4:43: tasks.a.expires: [1] is not a duration; {DURATIONS}",
                f"4:58: tasks.a.duration: '2026-01-01' is not a duration; {DURATIONS}",
            ],
            id="durations",
        ),
        pytest.param(
            """\
name: x
tasks:
  a: {max_attempts: 010}
  b: {max_attempts: 0}
  c: {max_attempts: 2.5}
  d: {max_attempts: yes}
""",
            [
                "3:21: tasks.a.max_attempts: '010' is not usable; input should be a valid integer",
                "4:21: tasks.b.max_attempts: 0 is not usable; input should be greater than or equal to 1",
                "5:21: tasks.c.max_attempts: 2.5 is not usable; input should be a valid integer",
                "6:21: tasks.d.max_attempts: 'yes' is not usable; input should be a valid integer",
            ],
            id="attempts",
        ),
        pytest.param(
            """\
name: x
tasks:
  a: {with: [1], metadata: text}
""",
            [
                "3:13: tasks.a.with: a list is not usable; input should be a valid dictionary",
                "3:28: tasks.a.metadata: 'text' is not usable; input should be a valid dictionary",
            ],
            id="with_list",
        ),
        pytest.param(
            """\
name: x
tasks:
  a: echo
""",
            [
                "3:6: tasks.a: 'echo' where a mapping is needed; write key: value",
            ],
            id="task_text",
        ),
        pytest.param(
            """\
name: x
tasks:
  "a b": {uses: "os.system(1)"}
""",
            [
                f"3:3: tasks['a b']: 'a b' is not usable; {IDS}",
                f"3:17: tasks['a b'].uses: 'os.system(1)' is not usable; {IDS}",
            ],
            id="task_id_bad",
        ),
        pytest.param(
            'name: x\ntasks:\n  "a\\nx.yaml:1:1: forged\\e[2J": \n',
            [
                f"3:3: tasks['a\\nx.yaml:1:1: forged\\x1b[2J']: 'a\\nx.yaml:1:1: forged\\x1b[2J' is not usable; {IDS}",
            ],
            id="task_id_forged",
        ),
        pytest.param(
            """\
name: x
tasks: {}
""",
            [
                "2:8: tasks: an empty mapping where tasks are needed; write one per key, or a list of them",
            ],
            id="tasks_empty",
        ),
        pytest.param(
            """\
name: x
tasks: a
""",
            [
                "2:8: tasks: 'a' where tasks are needed; write one per key, or a list of them",
            ],
            id="tasks_text",
        ),
        pytest.param(
            """\
name: x
tasks:
  fetch:
  resize:
    needs: [fetch, fecth]
  show: {needs: nothing}
""",
            [
                "5:20: tasks.resize.needs[1]: no task has the id 'fecth'; did you mean \"fetch\"?",
                "6:17: tasks.show.needs[0]: no task has the id 'nothing'; name a task of this group",
            ],
            id="unknown_need",
        ),
        pytest.param(
            """\
name: x
tasks:
  a: {needs: a}
""",
            [
                "3:14: tasks.a.needs[0]: it needs itself; remove it from its needs",
            ],
            id="self_need",
        ),
        pytest.param(
            """\
name: x
tasks:
  a: {needs: c}
  b: {needs: a}
  c: {needs: [b]}
""",
            [
                "2:1: tasks: tasks need each other in a circle: a -> c -> b -> a; remove one of these needs",
            ],
            id="circle",
        ),
        pytest.param(
            """\
name: x
tasks:
  a: {needs: {b: }}
""",
            [
                "3:14: tasks.a.needs[0]: a mapping where text is needed; write text, in quotes",
            ],
            id="need_mapping",
        ),
        pytest.param(
            """\
name: x
tasks:
- id: a
- {}
- id: a
""",
            [
                "5:7: tasks[2].id: 'a' is also the id of tasks[0]; give another",
            ],
            id="dup_list_id",
        ),
        pytest.param(
            """\
name: x
tasks:
  a: {role: r}
  a: {role: s}
name: y
""",
            [
                "4:3: tasks.a: duplicate key; keep one of them",
                "5:1: name: duplicate key; keep one of them",
            ],
            id="dup_key",
        ),
        pytest.param(
            """\
name: &n x
description: *n
tasks: {a: }
""",
            [
                "1:7: name: &n is an anchor; remove it",
                "2:14: description: *n is an alias; write the value itself, or use defaults",
            ],
            id="anchor_alias",
        ),
        pytest.param(
            """\
name: x
tasks:
  a: &a {role: r}
  b:
    <<: *a
""",
            [
                "3:6: tasks.a: &a is an anchor; remove it",
                "5:9: tasks.b['<<']: *a is an alias; write the value itself, or use defaults",
            ],
            id="merge",
        ),
        pytest.param(
            """\
name: x
tasks:
  a: {with: !!python/object/apply:os.system [ls]}
  b: {timeout: !!int 3}
""",
            [
                "3:13: tasks.a.with: tag:yaml.org,2002:python/object/apply:os.system is a tag; "
                "remove it, and quote the value if it is text",
                "4:16: tasks.b.timeout: tag:yaml.org,2002:int is a tag; remove it, and quote the value if it is text",
            ],
            id="tag",
        ),
        pytest.param(
            """\
a: &a [x, x]
b: &b [*a, *a]
""",
            [
                f"1:1: a: unknown key; {GROUP_KEYS}",
                "1:1: name: missing; add it",
                "1:1: tasks: missing; add it",
                "1:4: a: &a is an anchor; remove it",
                f"2:1: b: unknown key; {GROUP_KEYS}",
                "2:4: b: &b is an anchor; remove it",
                "2:8: b[0]: *a is an alias; write the value itself, or use defaults",
                "2:12: b[1]: *a is an alias; write the value itself, or use defaults",
            ],
            id="bomb",
        ),
        pytest.param(
            """\
name: x
tasks: {a: }
---
name: y
tasks: {a: {rolle: r}}
--- {}
""",
            [
                '5:13: tasks.a.rolle: unknown key; did you mean "role"?',
                "6:5: name: missing; add it",
                "6:5: tasks: missing; add it",
            ],
            id="second_document",
        ),
        pytest.param(
            "name: x\ntasks: {a: {with: {x: " + "[" * 30 + "]" * 30 + "}}}\n",
            [
                "2:39: tasks.a.with.x: nested more than 20 deep; make it flatter",
            ],
            id="deep",
        ),
        pytest.param(
            """\
name: x
tasks:
  a: {with: {x: .nan, y: -.inf, z: NaN}, duration: .inf}
""",
            [
                "3:17: tasks.a.with.x: .nan is no number that JSON can hold; quote it if it is text",
                "3:26: tasks.a.with.y: -.inf is no number that JSON can hold; quote it if it is text",
                "3:36: tasks.a.with.z: NaN is no number that JSON can hold; quote it if it is text",
                "3:52: tasks.a.duration: .inf is no number that JSON can hold; quote it if it is text",
            ],
            id="nan",
        ),
        pytest.param(
            "name: x\ntasks:\n  a: {with: {x: " + "9" * 4300 + ", y: 1e400}}\n",
            [
                "3:17: tasks.a.with.x: "
                f"{'9' * 100} … 99999999999999999999999999999999999999999999 is no number that JSON can hold; "
                "quote it if it is text",
                "3:4322: tasks.a.with.y: 1e400 is no number that JSON can hold; quote it if it is text",
            ],
            id="huge_number",
        ),
        pytest.param(
            """\
name: x
tasks: {? [a] : }
""",
            [
                "2:11: tasks: a key must be text; write one word before the colon",
            ],
            id="complex_key",
        ),
        pytest.param(
            "name: x\ntasks:\n\ta: \n",
            [
                (
                    "3:1: file: found character that cannot start any token; "
                    "indent with spaces, not tabs, and quote text that starts with @ or `"
                ),
            ],
            id="tab",
        ),
        pytest.param(
            "name: x: y\n",
            [
                (
                    "1:8: file: mapping values are not allowed in this context; "
                    'check the indentation, and quote text that contains ": "'
                ),
            ],
            id="colon",
        ),
        pytest.param(
            'name: "x\n',
            [
                "2:1: file: found unexpected end of stream; close the quote",
            ],
            id="unclosed_quote",
        ),
        pytest.param(
            """\
name: x
tasks: {a: [1
""",
            [
                "3:1: file: did not find expected ',' or ']'; "
                "close the bracket, or quote text that contains { } [ ] or a comma",
            ],
            id="unclosed_bracket",
        ),
        pytest.param(
            """\
name: x
 tasks: {}
""",
            [
                (
                    "2:7: file: mapping values are not allowed in this context; "
                    'check the indentation, and quote text that contains ": "'
                ),
            ],
            id="misindented",
        ),
        pytest.param(
            "name: x\ndescription: a\x07b\n",
            [
                "2:15: file: the character U+0007 is not allowed; remove it",
            ],
            id="control",
        ),
        pytest.param(
            b"name: caf\xe9\n",
            [
                "1:10: file: the byte 0xE9 is not UTF-8; save the file as UTF-8",
            ],
            id="not_utf8",
        ),
        pytest.param(
            "name: x\n".encode("utf-16"),
            [
                "1:1: file: the byte 0xFF is not UTF-8; save the file as UTF-8",
            ],
            id="utf16",
        ),
        pytest.param(
            "name: \ud800\n",
            [
                "1:7: file: the byte 0xED is not UTF-8; save the file as UTF-8",
            ],
            id="lone_surrogate_str",
        ),
        pytest.param(
            '{"name": "\\ud83d", "tasks": {"a": {}}}',
            [
                "1:10: name: half of a surrogate pair; write the character itself",
            ],
            id="lone_surrogate_json",
        ),
        pytest.param(
            """\
{
  "name": "x",
  "name": "y",
  "tasks": {"a": {"timeout": NaN}}
}""",
            [
                "3:3: name: duplicate key; keep one of them",
                "4:30: tasks.a.timeout: NaN is no number that JSON can hold; quote it if it is text",
            ],
            id="json_dup",
        ),
        pytest.param(
            '{"name": "\\ud83d\\ude00", "nmae": 1, "tasks": {"a": {}}}',
            [
                '1:26: nmae: unknown key; did you mean "name"?',
            ],
            id="json_surrogate_columns",
        ),
        pytest.param(
            '{"name": "x", "tasks": {"a": {"with": {"n": ' + "1" * 5000 + "}}}}",
            [
                (
                    "1:45: tasks.a.with.n: "
                    f"{'1' * 100} … 11111111111111111111111111111111111111111111 is no number that JSON can hold; "
                    "quote it if it is text"
                ),
            ],
            id="json_huge",
        ),
        pytest.param(
            '{"name": "x", "tasks": {"a": ',
            [
                "2:1: file: did not find expected node content; correct the syntax",
            ],
            id="json_cut",
        ),
        pytest.param(
            """\
name: x
tasks: {a: }
goal: 5
""",
            [
                "3:7: goal: 5 where a mapping is needed; write key: value",
            ],
            id="goal_number",
        ),
        pytest.param(
            """\
name: x
tasks: {a: }
goal: completed => 5
""",
            [
                "3:7: goal.when: => is not known here (column 11 of 'completed => 5'); write >=",
            ],
            id="goal_text",
        ),
        pytest.param(
            """\
name: x
tasks: {a: }
goal:
- completd >= 5
- when: completed == 5
  call: check
- name: c
- {when: completed >= 1, name: c d, fail_when: pending < 1, deadline: 0}
""",
            [
                "4:3: goal[0].when: completd is not known here (column 1 of 'completd >= 5'); did you mean completed?",
                "5:9: goal[1].when: == cannot be decided: tasks end in batches, so a counter can jump over a "
                "number (column 11 of 'completed == 5'); "
                "write >= to reach a number, <= to stay within it, > or < to be beyond it",
                "7:3: goal[2]: neither when nor call is given; give an expression (when), or a callable's name (call)",
                f"8:32: goal[3].name: 'c d' is not usable; {IDS}",
                "8:48: goal[3].fail_when: pending can fall again, so no verdict on it is final (column 1 of "
                "'pending < 1'); "
                "use total, completed, failed, cancelled, attempts or crashes",
                "8:71: goal[3].deadline: 0 is not usable; input should be greater than 0",
            ],
            id="goal_list",
        ),
        pytest.param(
            """\
name: x
tasks: {a: }
goal:
- {when: completed >= 1, name: g}
- {when: completed >= 1, name: g}
""",
            [
                "5:3: goal[1]: two goals are named 'g'; give each its own name",
            ],
            id="goal_same",
        ),
        pytest.param(
            """\
name: x
tasks: {a: }
goal: {wehn: completed >= 1}
""",
            [
                '3:8: goal.wehn: unknown key; did you mean "when"?',
            ],
            id="goal_key",
        ),
        pytest.param(
            "name: x\ntasks: {a: }\ngoal: [" + "completed >= 1, " * 17 + "]\n",
            [
                "3:7: goal: 17 goals; give a group at most 16",
            ],
            id="many_goals",
        ),
        pytest.param(
            """\
name: x
tasks:
  1: {role: 5}
  2: {needs: 1.5}
""",
            [
                "3:13: tasks.1.role: 5 where text is needed; write text, in quotes",
                "4:14: tasks.2.needs[0]: 1.5 where text is needed; write text, in quotes",
            ],
            id="numbers_as_words",
        ),
    ],
)
def test_every_problem_is_told_with_its_place_and_a_remedy(text: str | bytes, expected: list[str]) -> None:
    assert problems(text) == [f"group.yaml:{line}" for line in expected]


def test_a_full_file_becomes_the_group_it_describes() -> None:
    text = """
        name: Thumbnails
        description: for the album
        key: album-7
        priority: low
        retention: 2d
        defaults: {role: processor, timeout: 1m30s, max_attempts: 5, max_crashes: 0}
        tasks:
          fetch: {uses: fetch, with: {url: "a b"}, priority: high, delay: 250ms, metadata: {n: 1}}
          show: {needs: fetch, duration: 1.5, expires: 1h}
          rest:
        goal:
        - completed  >=  95%
        - {name: checked, call: check, deadline: 10m, fail_when: failed > 1, on_achieved: drain, on_failed: cancel,
           success_message: Done!, failure_message: Not done.}
    """

    assert loaded(text, "group.yaml") == TaskGroup(
        "Thumbnails",
        [
            Task(
                id="fetch",
                uses="fetch",
                arguments={"url": "a b"},
                priority=Priority.HIGH,
                delay=0.25,
                metadata={"n": 1},
                needs=[],
            ),
            Task(id="show", needs=["fetch"], duration=1.5, expires=3600),
            Task(id="rest", needs=[]),
        ],
        [
            Goal("completed >= 95%"),
            Goal(
                call="check",
                name="checked",
                deadline=600,
                fail_when="failed > 1",
                on_achieved="drain",
                on_failed="cancel",
                success_message="Done!",
                failure_message="Not done.",
            ),
        ],
        description="for the album",
        key="album-7",
        priority=Priority.LOW,
        retention=172800,
        depends_on=[],
        defaults=Task(role="processor", timeout=90, max_attempts=5, max_crashes=0),
    )


def test_json_and_yaml_of_the_same_group_are_the_same_group() -> None:
    group = {
        "name": 'a "name" \\ / é 😀 \u2028',
        "tasks": {"a": {"with": {"x": [1, -2.5e3, 1e5, True, None, "yes", ""], "😀": {}}}, "b": {"needs": ["a"]}},
        "goal": "completed >= 1",
    }
    expected = loaded(yaml.safe_dump(group, allow_unicode=False), "group.yaml")

    assert expected.name == group["name"]
    for text in (json.dumps(group), json.dumps(group, indent="\t"), json.dumps(group, separators=(",", ":"))):
        assert loaded(text, "group.json") == expected
        assert loaded(text.encode(), "group.json") == expected
        assert loaded("\ufeff" + text, "group.json") == expected


def test_tasks_may_be_a_list_and_need_no_id() -> None:
    group = loaded("name: x\ntasks:\n- {id: 1}\n-\n- {needs: 1}\n- uses: echo\n", "group.yaml")

    assert list(group.tasks) == [
        Task(id="1", needs=[]),
        Task(needs=[]),
        Task(needs=["1"]),
        Task(uses="echo", needs=[]),
    ]


def test_a_key_with_nothing_behind_it_counts_as_left_out() -> None:
    text = (
        "name: x\ntasks: {a: {matrix: , needs: , with: , role: }, b: {matrix: {n: [1]}, needs: }}\ngoal:\ndepends_on:\n"
    )
    group = loaded(text)

    assert list(group.tasks) == [Task(id="a", needs=[]), Task(id="b-1", needs=[])]
    assert group.goal == group.depends_on == []


def test_words_and_odd_numbers_stay_the_text_they_are() -> None:
    """YAML 1.1 would make truths, sixties, octals and dates of these."""
    words = ["yes", "no", "on", "off", "y", "n", "1:30", "12:30:00", "010", "0o10", "0x1F", "1_000", "+1", ".5", "1."]
    words += ["2026-01-01", "2026-01-01T10:00:00Z", "=", "<<", "nan", "inf"]
    text = f"name: no\ntasks:\n  on: {{with: {{x: [{', '.join(words)}]}}}}\n  1: {{needs: on}}\n  010: {{needs: 1}}\n"
    group = loaded(text, "group.yaml")

    assert group.name == "no"
    assert [(task.id, list(task.needs)) for task in group.tasks] == [("on", []), ("1", ["on"]), ("010", ["1"])]
    assert next(iter(group.tasks)).arguments == {"x": words}


def test_numbers_truths_and_null_are_those_of_json() -> None:
    text = "name: x\ntasks: {a: {with: {x: [0, -1, 1.5, 1.0e3, true, False, null, ~, , \"1\", 'true']}}}\n"
    (task,) = loaded(text.replace(", ,", ","), "group.yaml").tasks

    assert task.arguments == {"x": [0, -1, 1.5, 1000.0, True, False, None, None, "1", "true"]}


@pytest.mark.parametrize("number", ["3.10", "1.20", "2.00", "-0", "7222e52", "1e5", "1E7", "3.14159265358979323846"])
def test_a_number_that_would_lose_what_its_text_says_is_refused(number: str) -> None:
    value = json.loads(number)

    for text in (
        f"  a: {{with: {{v: {number}}}}}",
        f"  a: {{matrix: {{v: [{number}]}}, with: {{x: 'v${{{{matrix.v}}}}'}}}}",
    ):
        (said,) = problems(f"name: x\ntasks:\n{text}\n")
        assert f"{number} is {value!r} as a number; quote it if it is text, or write {value!r}" in said


@pytest.mark.parametrize(
    "number", ["0", "-1", "1.5", "2.0", "1e-4", "1.5e3", "2e+6", "0.1", "-0.0", "123456789012345678901"]
)
def test_a_number_that_can_be_nothing_else_is_one(number: str) -> None:
    (task,) = loaded(f"name: x\ntasks: {{a: {{with: {{v: {number}}}}}}}").tasks

    assert repr(task.arguments["v"]) == repr(json.loads(number))


def test_in_json_a_number_is_a_number_and_only_quotes_make_text() -> None:
    (task,) = loaded('{"name": "x", "tasks": {"a": {"with": {"v": [3.10, 7222e52, "3.10"]}}}}').tasks

    assert task.arguments == {"v": [3.1, 7222e52, "3.10"]}


JSON_VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=8,
)


@settings(deadline=None)
@given(st.dictionaries(st.text(), JSON_VALUES, max_size=3), st.booleans(), st.sampled_from([None, 0, 1, "\t"]))
def test_a_json_file_holds_what_json_says(
    arguments: dict[str, object], escapes: bool, indent: int | str | None
) -> None:
    arguments = {key: value for key, value in arguments.items() if "${{" not in json.dumps(value)}
    document = {"name": "x", "tasks": {"a": {"with": arguments}}}
    text = json.dumps(document, ensure_ascii=escapes, indent=indent)
    if "\ufeff" not in text[:1]:
        (task,) = loaded(text).tasks
        assert task.arguments == json.loads(text)["tasks"]["a"]["with"]


@pytest.mark.parametrize(
    "inside", ["\u2028", "\u2029", "\x85", "\x7f", "\ufeff", "\ufffe", "a\u2028  b", "#", " - ", ": "]
)
@pytest.mark.parametrize("key", ["k", "k" * 3000])
def test_no_rule_of_yaml_holds_in_a_json_file(inside: str, key: str) -> None:
    text = json.dumps({"name": "x", "tasks": {"a": {"with": {key + inside: inside}}}}, ensure_ascii=False)

    (task,) = loaded(text, "group.json").tasks

    assert task.arguments == {key + inside: inside}


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ('{"name": "x",}', "1:14: file: a key is expected here; write it as \"key\""),
        ('{"name": "x" "tasks": 1}',
         "1:14: file: a comma or } is expected here; separate values by commas, and close with }"),
        ('{"name" "x"}', "1:9: file: a colon is expected behind a key; write :"),
        ('{"name": [1 2]}', "1:13: file: a comma or ] is expected here; separate values by commas, and close with ]"),
        ('{"name": x}', '1:10: file: no JSON value starts here; write "text", a number, true, false, null, [ or {'),
        ('{\n "name": 01}', "2:11: file: a comma or } is expected here; separate values by commas, and close with }"),
        ('{"name": "x\\q"}', "1:12: file: invalid \\escape; correct the text, or its escape"),
        ('{"name": "x', "1:10: file: unterminated string starting at; correct the text, or its escape"),
        ('{"name": "a\tb"}', "1:12: file: invalid control character at; correct the text, or its escape"),
        ("", '1:1: file: no JSON value starts here; write "text", a number, true, false, null, [ or {'),
        ("name: x", '1:1: file: no JSON value starts here; write "text", a number, true, false, null, [ or {'),
        ('{"name": "x", "tasks": {"a": {}}}\n{"name": "y"}',
         "2:1: file: the JSON value has ended before; remove what follows; a JSON file holds one group"),
        ('{"name": "x",\n "name": "y", "tasks": {"a": {}}}', "2:2: name: duplicate key; keep one of them"),
        ('{"name": "x", "tasks": {"a": {"duration": NaN}}}',
         "1:43: tasks.a.duration: NaN is no number that JSON can hold; quote it if it is text"),
        ('{"name": "x", "tasks": {"a": {"duration": 1e999}}}',
         "1:43: tasks.a.duration: 1e999 is no number that JSON can hold; quote it if it is text"),
        ('{"name": "\\ud800", "tasks": {"a": {}}}',
         "1:10: name: half of a surrogate pair; write the character itself"),
        ('{"name": "x",\n "tasks": {"a": {"rolle": 1}}}', '2:18: tasks.a.rolle: unknown key; did you mean "role"?'),
    ],
)  # fmt: skip
def test_what_is_wrong_with_a_json_file_is_told_with_its_place(text: str, expected: str) -> None:
    with pytest.raises(GroupFileError) as caught:
        load(text, "g.json")

    assert caught.value.problems == [f"g.json:{expected}"]


def test_the_search_ends_at_the_fiftieth_problem() -> None:
    found = problems("name: x\ntasks:\n" + "".join(f"  t{n}: {{rolle: r}}\n" for n in range(1000)))

    assert len(found) == 51
    assert found[49].startswith("group.yaml:52:9: tasks.t49.rolle: unknown key")
    assert found[50] == "group.yaml: the search ended after 50 problems; correct these first"


def test_a_pair_of_surrogates_stays_text_where_single_quotes_say_so() -> None:
    group = loaded("{name: '\\ud83d\\ude00', tasks: {a: }}", "group.yaml")

    assert group.name == "\\ud83d\\ude00"


def test_a_file_of_8_mib_is_read_and_a_larger_one_refused_before_it_is_read() -> None:
    text = "name: x\ntasks: {a: }\n#"
    room = reader.MAX_BYTES - len(text)
    padding = "é" * (room // 2) + "." * (room % 2)

    assert loaded(text + padding, "group.yaml").name == "x"
    assert problems(text + padding + ".") == [
        "group.yaml:1:1: file: 8,388,609 bytes, more than 8,388,608; split it into several groups"
    ]


def test_values_are_counted_so_that_a_small_file_cannot_fill_the_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reader, "MAX_VALUES", 10)

    assert problems("name: x\ntasks: {a: {with: {x: [1, 2, 3, 4, 5, 6]}}}\n") == [
        "group.yaml:2:23: file: more than 10 keys and values; split it into several groups"
    ]


def test_twenty_levels_are_not_too_deep() -> None:
    nested = "[" * 16 + "1" + "]" * 16

    assert loaded(f"name: x\ntasks: {{a: {{with: {{x: {nested}}}}}}}\n", "group.yaml").name == "x"
    assert problems(f"name: x\ntasks: {{a: {{with: {{x: [{nested}]}}}}}}\n") == [
        "group.yaml:2:39: tasks.a.with.x: nested more than 20 deep; make it flatter"
    ]


@pytest.mark.parametrize("where", ["  a: {timeout: %s}", "  ? %s\n  :", "  a: {%s: 1}", "  a: {needs: %s}"])
def test_a_long_text_is_cut_in_the_message(where: str) -> None:
    found = problems("name: x\ntasks:\n" + where % ("x" * 5000))

    assert len(found) == 1
    assert len(found[0]) < 700


@pytest.mark.parametrize(
    "text",
    [
        'name: x\ntasks:\n  "a\\nb\\e[2J": \n',
        'name: x\ntasks:\n  a: {"\\e[2J": 1, needs: "\\e[2J", timeout: "\\e", priority: "\\e"}\n',
        "name: x\ntasks:\n  a: {with: !<tag:%0A%1B> x}\n",
        'name: x\ntasks: {a: }\ngoal: "completed \\e >= 5"\n',
        'name: x\ntasks:\n  "a\\e": {needs: "b\\e"}\n  "b\\e": {needs: "a\\e"}\n',
    ],
)
def test_no_message_can_forge_a_line_or_steer_a_terminal(text: str) -> None:
    assert all(line.isprintable() and line.startswith("group.yaml:") for line in problems(text))


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ('name: "\\ud800"\ntasks: {"\\ud800": }\n', r"1:7: name: half of a surrogate pair; .*\n.*2:9: tasks.*"),
        ('{"name": "\\ud83d\\ude00", "nmae": 1, "tasks": {"a": {}}}', '1:26: nmae: unknown key; did you mean "name".'),
        ('name: "\\Uffffffff"\n', r"1:1: file: an escape stands for no character; .*"),
        ("a: &a [x]\nb: *a\n", r"1:1: (.|\n)*2:4: b: \*a is an alias; (.|\n)*"),
        ("[" * 5000, r"1:21: .*: nested more than 20 deep; make it flatter"),
        ("name: [\n", r"2:1: file: .*"),
    ],
)
def test_without_libyaml_the_pure_python_parser_is_as_strict(
    text: str, expected: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(reader, "_Loader", yaml.SafeLoader)

    assert re.match(f"group.yaml:{expected}", "\n".join(problems(text)))


FRAGMENTS = [
    "name: x\n",
    "tasks:\n",
    "  a: ",
    "- ",
    "{",
    "}",
    "[",
    "]",
    "needs",
    ": ",
    ", ",
    "goal",
    '"',
    "'",
    "&a ",
    "*a",
    "!!int ",
]
FRAGMENTS += [
    "? ",
    "<<",
    "---\n",
    "...\n",
    "%YAML 1.2\n",
    "| \n",
    "#",
    "\t",
    "\\u",
    "d83d",
    "\\ud83d\\ude00",
    "9" * 400,
    ".inf",
    "1:30",
]


@given(st.lists(st.sampled_from(FRAGMENTS) | st.text(max_size=3), max_size=20).map("".join) | st.binary(max_size=30))
def test_no_text_ends_in_a_traceback(text: str | bytes) -> None:
    for loader in (yaml.CSafeLoader, yaml.SafeLoader):
        with pytest.MonkeyPatch.context() as patch, suppress(GroupFileError):
            patch.setattr(reader, "_Loader", loader)
            load(text, "group.yaml")


def test_the_error_is_one_text_with_a_problem_per_line() -> None:
    with pytest.raises(
        GroupFileError, match=r"^a\.yaml:1:1: name: missing; add it\na\.yaml:1:1: tasks: missing; add it$"
    ):
        loaded("{}", "a.yaml")


@pytest.mark.parametrize("name", ["data_processing.yaml", "dag.yaml"])
def test_the_examples_load(name: str) -> None:
    assert loaded((EXAMPLES / name).read_bytes(), name).goal


def test_the_example_of_the_tutorial_asks_for_five_of_ten() -> None:
    group = loaded((EXAMPLES / "data_processing.yaml").read_text(), "data_processing.yaml")

    assert group.name == "Data Processing"
    assert group.defaults == Task(role="processor", duration=1)
    assert list(group.tasks) == [Task(id=f"item-{n}", metadata={"item_number": n}, needs=[]) for n in range(10)]
    assert group.goal == [
        Goal(
            "completed >= 5",
            name="partial-processing-complete",
            success_message="Successfully completed minimum required tasks!",
            failure_message="Failed to complete minimum required tasks.",
        )
    ]


@pytest.mark.parametrize("text", ["tasks: {a: {timeout: 0}}", "tasks: {a: {}}\ndefaults: {timeout: 0s}"])
def test_a_task_of_a_file_may_not_have_no_time(text: str) -> None:
    (problem,) = problems(f"name: x\n{text}\n")

    assert "timeout: " in problem
    assert "greater than 0" in problem
