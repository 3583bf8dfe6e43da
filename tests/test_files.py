"""Group files as users write them: several groups in one, `ceylon validate`, `schema` and `graph`."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import yaml
from commands import ROOT, Commands, until
from hypothesis import given, settings
from hypothesis import strategies as st
from jsonschema import Draft202012Validator  # type: ignore[import-untyped]

from rq_ceylon import groupfile
from rq_ceylon.errors import GroupFileError, InvalidInputError
from rq_ceylon.graph import Drawing, draw
from rq_ceylon.groupfile import load, resolved
from rq_ceylon.groupfile.shape import KINDS
from rq_ceylon.models import DEFAULT_RETENTION_S

EXAMPLES = sorted((ROOT / "examples").glob("*.yaml"))
SNIPPETS = re.findall(r"```yaml\n(.*?)```", (ROOT / "docs" / "group-file.md").read_text(), re.DOTALL)
README = re.findall(r"```yaml\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)


def problems(text: str) -> list[str]:
    with pytest.raises(GroupFileError) as caught:
        load(text, "f")
    return caught.value.problems


# ---- several groups --------------------------------------------------------------------------------------------------
ONE = "name: A\ntasks: {x: }\n"


def test_each_document_is_a_group_and_an_empty_one_is_none() -> None:
    groups = load(f"# first\n---\n{ONE}---\n{ONE.replace('A', 'B')}...\n---\n# nothing\n---\n", "f")

    assert [group.name for group in groups] == ["A", "B"]


def test_names_and_keys_become_the_ids_of_groups_submitted_before() -> None:
    text = "name: B\nkey: A\ntasks: {x: }\n---\nname: C\ntasks: {x: }\ndepends_on: [A, B, 06h0rb0itfv026ispq2k]\n"
    first, last = load(text, "f")

    assert resolved(first, []) == []
    assert resolved(last, [(first, "id-of-first")]) == ["id-of-first", "id-of-first", "06h0rb0itfv026ispq2k"]


def test_a_key_comes_before_a_name() -> None:
    text = "name: A\ntasks: {x: }\n---\nname: B\nkey: A\ntasks: {x: }\n---\nname: C\ntasks: {x: }\ndepends_on: A\n"
    one, two, three = load(text, "f")

    assert resolved(three, [(one, "1"), (two, "2")]) == ["2"]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("name: A\ndepends_on: A\ntasks: {x: }\n", ["2:13: depends_on[0]: it depends on itself; remove it"]),
        (
            "name: Album\ntasks: {x: }\n---\nname: B\ntasks: {x: }\ndepends_on: [albums, other]\n",
            [
                '6:14: depends_on[0]: no group has the key or name \'albums\'; did you mean "Album"?',
                "6:22: depends_on[1]: no group has the key or name 'other'; "
                "name a group further up by its key or name, or give a group's id",
            ],
        ),
        (
            f"name: B\ndepends_on: A\ntasks: {{x: }}\n---\n{ONE}",
            ["2:13: depends_on[0]: the group 'A' comes further down; move it before this one"],
        ),
        (
            "name: A\ndepends_on: C\ntasks: {x: }\n---\n"
            "name: B\ndepends_on: [A]\ntasks: {x: }\n---\nname: C\ndepends_on: [B]\ntasks: {x: }\n",
            [
                "2:13: depends_on[0]: groups depend on each other in a circle: A -> C -> B -> A; remove one of these",
            ],
        ),
        (
            f"{ONE}---\n{ONE}---\nname: B\ndepends_on: A\ntasks: {{x: }}\n",
            ["8:13: depends_on[0]: 2 groups are named 'A'; give them keys, and write the key here"],
        ),
        (
            f"{ONE}key: k\n---\n{ONE}key: k\n",
            ["7:6: key: 'k' is also the key of a group above; give another"],
        ),
        (
            f"{ONE}depends_on: [5, {{a: b}}]\n",
            [
                "3:14: depends_on[0]: not usable; write a group's name, or {group: NAME, when: failed}",
                "3:17: depends_on[1]: not usable; write a group's name, or {group: NAME, when: failed}",
            ],
        ),
        ("---\n".join([ONE] * 101), ["301:1: file: more than 100 documents; use several files"]),
    ],
)  # fmt: skip
def test_what_groups_cannot_depend_on_is_told(text: str, expected: list[str]) -> None:
    assert problems(text) == [f"f:{line}" for line in expected]


def test_groups_of_a_file_are_submitted_in_order_and_know_each_other(commands: Commands) -> None:
    (commands.folder / "f.yaml").write_text(f"{ONE}---\n{ONE.replace('A', 'B')}key: b\n")

    ended = commands.run("submit", "f.yaml")

    assert ended.returncode == 0, ended.stderr
    ids = ended.stdout.split()
    assert [commands.json("ceylon", "show", gid, "--json")["group"]["name"] for gid in ids] == ["A", "B"]
    assert all(map(groupfile.GROUP_ID.fullmatch, ids))


def test_a_wrong_group_of_a_file_keeps_all_from_being_sent(commands: Commands) -> None:
    large = f"name: B\ntasks: {{x: {{with: {{text: {'x' * 1_100_000}}}}}}}\n"
    (commands.folder / "f.yaml").write_text(f"{ONE}---\n{large}")

    wrong = commands.run("submit", "f.yaml")
    keyed = commands.run("submit", "-", "--key", "k", stdin=f"{ONE}---\n{ONE}")

    assert (wrong.returncode, keyed.returncode) == (2, 2)
    assert "1,048,576 are allowed" in wrong.stderr
    assert "--key: - has 2 groups; write key: into each of them instead" in keyed.stderr
    assert commands.json("ceylon", "groups", "--json")["groups"] == []


def test_waiting_for_a_file_waits_for_all_its_groups(commands: Commands) -> None:
    text = "name: {}\ndefaults: {{role: r, duration: 0}}\ntasks: {{x: }}\n"
    commands.start("worker", "-r", "r")

    ended = commands.run("submit", "-", "--wait=all", "--json", stdin="---\n".join(map(text.format, "AB")))

    assert ended.returncode == 0, ended.stderr
    found = [json.loads(line)["group"] for line in ended.stdout.splitlines()]
    assert [(group["name"], group["outcome"]) for group in found] == [("A", "completed"), ("B", "completed")]


def sent(commands: Commands) -> list[str]:
    return [one["group"]["name"] for one in commands.json("ceylon", "groups", "--json")["groups"]]


@pytest.mark.parametrize(
    ("second", "options", "code", "says"),
    [
        ("goal: completed >= 3", [], 2, 'goal "goal": completed >= 3 can never hold: the group has 1 task'),
        ("defaults: {role: nobody}", ["--require-workers"], 6, "no worker serves role 'nobody'"),
        ("depends_on: 06h0rb0itfv026ispq2k", [], 2, "group '06h0rb0itfv026ispq2k' is not known; submit it first"),
        ("key: k\ndepends_on: 06h0rb0itfv026ispq2k", [], 2, "group '06h0rb0itfv026ispq2k' is not known"),
        ("", ["--durability", "fsync"], 3, "durability: 'fsync' is not possible"),
        ("defaults: {uses: greet}", ["--app", "greetings:app"], 2, "task 'greet': argument 'name' is missing"),
    ],
    ids=["goal", "workers", "depends_on", "depends_on of a keyed group", "durability", "arguments"],
)
def test_nothing_of_a_file_is_sent_before_all_of_it_is_judged(
    commands: Commands, second: str, options: list[str], code: int, says: str
) -> None:
    (commands.folder / "greetings.py").write_text(
        "from rq_ceylon import Ceylon\napp = Ceylon()\n@app.task\ndef greet(name: str) -> str: return name\n"
    )
    commands.start("worker", "-r", "r")

    ended = commands.run(
        "submit", "-", *options, stdin=f"{ONE}defaults: {{role: r}}\n---\nname: B\ntasks: {{x: }}\n{second}\n"
    )

    assert ended.returncode == code, ended.stderr
    assert says in ended.stderr
    assert (ended.stdout, sent(commands)) == ("", [])


def test_a_file_with_keys_submitted_twice_is_the_same_or_refused_as_a_whole(commands: Commands) -> None:
    keyed = f"{ONE}key: a\n---\nname: B\nkey: b\ndepends_on: A\ntasks: {{x: }}\n"
    some = f"{ONE}key: c\n---\nname: D\ntasks: {{x: }}\n"
    changed = f"{ONE}key: e\n---\nname: B\nkey: b\ntasks: {{y: }}\n"

    first, again = commands.run("submit", "-", stdin=keyed), commands.run("submit", "-", stdin=keyed)
    commands.run("submit", "-", stdin=some)
    mixed = commands.run("submit", "-", stdin=some)
    other = commands.run("submit", "-", stdin=changed)

    assert first.returncode == again.returncode == 0, again.stderr
    assert first.stdout == again.stdout
    assert (mixed.returncode, mixed.stdout) == (2, "")
    assert "group 'A' was submitted before under its key" in mixed.stderr
    assert "group 'D' has no key and would run again; give every group of the file a key" in mixed.stderr
    assert (other.returncode, other.stdout) == (2, "")
    assert "group 'B': key 'b' was submitted before with other content" in other.stderr
    assert sorted(sent(commands)) == ["A", "A", "B", "D"]


def test_a_keyed_group_depends_on_known_groups_only_until_it_is_there(commands: Commands) -> None:
    text = "name: A\nkey: k\ntasks: {{x: }}\ndepends_on: {}\n"
    other = commands.run("submit", "-", stdin=ONE).stdout.strip()

    unknown = commands.run("submit", "-", stdin=text.format("06h0rb0itfv026ispq2k"))
    first, again = (commands.run("submit", "-", stdin=text.format(other)) for _ in range(2))

    assert unknown.returncode != 0
    assert "group '06h0rb0itfv026ispq2k' is not known; submit it first" in unknown.stderr
    assert (first.returncode, again.returncode) == (0, 0)
    assert first.stdout == again.stdout


def test_depends_on_takes_any_name(commands: Commands) -> None:
    text = f"{ONE.replace('A', 'Nächtlicher Lauf')}---\nname: B\ndepends_on: Nächtlicher Lauf\ntasks: {{x: }}\n"

    checked = commands.run("submit", "-", "--dry-run", stdin=text)
    ended = commands.run("submit", "-", stdin=text)

    assert checked.returncode == ended.returncode == 0, ended.stderr
    statuses = [commands.json("ceylon", "show", gid, "--json")["group"]["status"] for gid in ended.stdout.split()]
    assert statuses == ["active", "waiting"]


def test_what_was_sent_is_told_when_the_waiting_ends_early(commands: Commands) -> None:
    ended = commands.run("submit", "-", "--json", "--wait", "--timeout", "200ms", stdin=f"{ONE}---\n{ONE}")

    assert ended.returncode == 5, ended.stderr
    found = [json.loads(line)["group"] for line in ended.stdout.splitlines()]
    assert [(group["name"], group["status"]) for group in found] == [("A", "active"), ("A", "active")]


def test_a_group_that_is_kept_for_a_short_time_is_waited_for_from_the_start(commands: Commands) -> None:
    text = "name: {}\ndefaults: {{role: r}}\nretention: {}\ntasks: {{x: {{duration: {}}}}}\n"
    commands.start("worker", "-r", "r", "-c", "2")
    commands.start("monitor")

    stdin = f"{text.format('long', '1h', '3s')}---\n{text.format('short', 0, 0)}"
    ended = commands.run("submit", "-", "--wait=all", "--json", stdin=stdin)

    assert ended.returncode == 0, ended.stderr
    found = [json.loads(line)["group"] for line in ended.stdout.splitlines()]
    assert [(group["name"], group["outcome"]) for group in found] == [("long", "completed"), ("short", "completed")]


def test_a_task_that_no_worker_of_its_role_knows_is_named_with_the_nearest(commands: Commands) -> None:
    (commands.folder / "greetings.py").write_text(
        "from rq_ceylon import Ceylon\napp = Ceylon()\n@app.task(role='r')\ndef greet(name: str) -> str: return name\n"
    )
    worker = commands.start("worker", "greetings:app")
    until(lambda: "serves" in commands.said(worker), "the worker lives")
    text = "name: A\ndefaults: {role: r}\ntasks: {x: {uses: gret, with: {name: 1}}}\n"

    ended = commands.run("submit", "-", stdin=text)

    assert ended.returncode == 0, ended.stderr
    assert "Note: no live worker of role 'r' knows the task 'gret'; did you mean \"greet\"?" in ended.stderr


# ---- validate --------------------------------------------------------------------------------------------------------
def test_validate_says_what_a_file_holds_and_needs_no_redis(tmp_path: Path) -> None:
    ended = Commands("", tmp_path).run("ceylon", "validate", *map(str, EXAMPLES))

    assert (ended.returncode, ended.stderr) == (0, "")
    assert "pipeline.yaml: valid: 3 groups, 6 tasks, 1 role (data), 1 goal; " in ended.stdout
    assert "matrix.yaml: valid: 1 group, 49 tasks, 1 role (pictures), 1 goal; " in ended.stdout
    assert ended.stdout.count("whether each goal is possible is checked at submission") == len(EXAMPLES)


def test_validate_tells_all_problems_of_all_files_a_line_each(tmp_path: Path) -> None:
    (tmp_path / "a.yaml").write_text("name: x\ntasks: {a: {rolle: r, needs: b}}\n")
    (tmp_path / "b.yaml").write_text("name: x\ntasks: {a: }\n")
    (tmp_path / "c.yaml").write_text("name: x\ntasks: {a: {with: {text: " + "x" * 1_100_000 + "}}}")

    ended = Commands("", tmp_path).run("ceylon", "validate", "a.yaml", "b.yaml", "c.yaml", "none.yaml")

    assert ended.returncode == 2
    assert ended.stdout == "b.yaml: valid: 1 group, 1 task, 1 role (default), 0 goals\n"
    assert ended.stderr.splitlines() == [
        'a.yaml:2:13: tasks.a.rolle: unknown key; did you mean "role"?',
        "c.yaml: task 'a': its arguments are 1,100,025 bytes, 1,048,576 are allowed; "
        "store the data elsewhere and pass a reference",
        "none.yaml: cannot be read (No such file or directory); give a YAML or JSON file, or -",
    ]


# ---- schema ----------------------------------------------------------------------------------------------------------
SCHEMA: dict[str, Any] = json.loads(groupfile.schema())
VALIDATOR = Draft202012Validator(SCHEMA)


def fits(document: Any) -> bool:
    return bool(VALIDATOR.is_valid(document))


def test_schema_prints_the_schema(tmp_path: Path) -> None:
    assert Commands("", tmp_path).json("ceylon", "schema") == SCHEMA
    Draft202012Validator.check_schema(SCHEMA)


def test_editors_say_of_every_key_what_it_means_and_of_every_kind_what_it_takes() -> None:
    defs = SCHEMA["$defs"]
    for part in (SCHEMA, defs["defaults"], defs["task"], defs["listed"], defs["goal"]):
        for key, about in part["properties"].items():
            assert about["description"], key
    for kind in KINDS:
        assert defs[kind]["description"]
    assert SCHEMA["properties"]["retention"]["default"] == DEFAULT_RETENTION_S
    assert "${{" in defs["look-up"]["pattern"].replace("\\", "")
    assert "$kind" not in json.dumps(SCHEMA)


@pytest.mark.parametrize(
    "text", [*(path.read_text() for path in EXAMPLES), *SNIPPETS, *README], ids=lambda text: text.split("\n")[0][:30]
)
def test_every_example_is_valid_for_the_parser_and_for_the_schema(text: str) -> None:
    assert load(text, "example.yaml")
    for document in yaml.safe_load_all(text):
        VALIDATOR.validate(document)


BROKEN: list[dict[str, Any]] = [
    {},
    {"name": "x"},
    {"tasks": {"a": {}}},
    {"name": "", "tasks": {"a": {}}},
    {"name": 5, "tasks": {"a": {}}},
    {"name": "x", "tasks": {}},
    {"name": "x", "tasks": []},
    {"name": "x", "tasks": "a"},
    {"name": "x", "tasks": {"a": "echo"}},
    {"name": "x", "tasks": {"a b": {}}},
    {"name": "x", "tasks": {"a": {"id": "b"}}},
    {"name": "x", "tasks": [{"id": "b c"}]},
    {"name": "x", "tasks": {"a": {}}, "task": {}},
    {"name": "x", "tasks": {"a": {}}, "priority": "urgent"},
    {"name": "x", "tasks": {"a": {}}, "retention": "1:30"},
    {"name": "x", "tasks": {"a": {}}, "retention": -1},
    {"name": "x", "tasks": {"a": {}}, "retention": 10 * 365 * 86400 + 1},
    {"name": "x", "tasks": {"a": {}}, "goal": "completed >= 1 or " * 40 + "failed > 1"},
    {"name": "x", "tasks": {"a": {}}, "goal": ["completed >= 1"] * 17},
    {"name": "x", "tasks": {"a": {}}, "goal": {"when": "completed >= 1", "failure_message": "x" * 1001}},
    {"name": "x", "tasks": {"a": {}}, "depends_on": ["06h0rb0itfv026ispq2k"] * 65},
    {"name": "x", "tasks": {"a": {"needs": ["b"] * 257}, "b": {}}},
    {"name": "x", "tasks": {"a": {"matrix": {f"n{n}": [1] for n in range(9)}}}},
    {"name": "x", "tasks": {"a": {}}, "defaults": {"with": {}}},
    {"name": "x", "tasks": {"a": {}}, "goal": 5},
    {"name": "x", "tasks": {"a": {}}, "goal": {"wehn": "completed >= 1"}},
    {"name": "x", "tasks": {"a": {}}, "goal": {"when": "completed >= 1", "on_failed": "stop"}},
    {"name": "x", "tasks": {"a": {}}, "goal": {"when": "completed >= 1", "deadline": 0}},
    {"name": "x", "tasks": {"a": {}}, "depends_on": {"a": 1}},
    {"name": "x", "tasks": {"a": {"rolle": "r"}}},
    {"name": "x", "tasks": {"a": {"role": 5}}},
    {"name": "x", "tasks": {"a": {"timeout": "30x"}}},
    {"name": "x", "tasks": {"a": {"timeout": True}}},
    {"name": "x", "tasks": {"a": {"max_attempts": 0}}},
    {"name": "x", "tasks": {"a": {"max_attempts": 2.5}}},
    {"name": "x", "tasks": {"a": {"max_crashes": -1}}},
    {"name": "x", "tasks": {"a": {"max_crashes": 0.5}}},
    {"name": "x", "tasks": {"a": {"with": [1]}}},
    {"name": "x", "tasks": {"a": {"needs": {"b": 1}}}},
    {"name": "x", "tasks": {"a": {"needs": ["b c"]}}},
    {"name": "x", "tasks": {"a": {"matrix": {}}}},
    {"name": "x", "tasks": {"a": {"matrix": {"n": 1}}}},
    {"name": "x", "tasks": {"a": {"matrix": {"n": []}}}},
    {"name": "x", "tasks": {"a": {"matrix": {"2n": [1]}}}},
    {"name": "x", "tasks": {"a": {"matrix": {"n": {"range": [1]}}}}},
    {"name": "x", "tasks": {"a": {"matrix": {"n": {"range": [1, 2], "step": 1}}}}},
]


@pytest.mark.parametrize("document", BROKEN, ids=lambda document: json.dumps(document)[:90])
def test_what_the_parser_refuses_by_its_shape_the_schema_refuses_too(document: dict[str, Any]) -> None:
    assert not fits(document)
    problems(json.dumps(document))


SCALARS = st.sampled_from(
    [
        None,
        True,
        False,
        0,
        1,
        -1,
        2.5,
        "",
        "a",
        "b-1",
        "30s",
        "1:30",
        "high",
        "a b",
        "completed >= 1",
        "${{ matrix.n }}",
    ]
)
VALUES = st.recursive(
    SCALARS,
    lambda inner: (
        st.lists(inner, max_size=2) | st.dictionaries(st.sampled_from(["a", "n", "range"]), inner, max_size=2)
    ),
    max_leaves=3,
)


def some(keys: Any, values: st.SearchStrategy[Any] = VALUES, **fixed: Any) -> st.SearchStrategy[dict[str, Any]]:
    return st.dictionaries(st.sampled_from(sorted(keys)), values, max_size=3).map(lambda found: {**found, **fixed})


TASKS = some(SCHEMA["$defs"]["listed"]["properties"])


@settings(deadline=None)
@given(some(SCHEMA["properties"], name="x") | some(SCHEMA["properties"], name="x", tasks={"a": None}), TASKS)
def test_the_schema_refuses_nothing_that_the_parser_takes(document: dict[str, Any], task: dict[str, Any]) -> None:
    for one in (
        document,
        {"name": "x", "tasks": {"a": task, "b-1": None}},
        {"name": "x", "tasks": [task, {"id": "a"}]},
        {"name": "x", "tasks": {"b-1": None, "a": {"matrix": {"n": ["1", "high", "30s"]}} | task}},
    ):
        try:
            load(json.dumps(one), "f")
        except GroupFileError:
            continue
        VALIDATOR.validate(one)


# ---- graph -----------------------------------------------------------------------------------------------------------
def test_a_file_is_drawn_with_its_needs_and_groups(tmp_path: Path) -> None:
    text = (
        "name: A\ntasks:\n  b: {needs: a}\n  a: \n---\nname: B\ndepends_on: [A, 06h0rb0itfv026ispq2k]\ntasks: {c: }\n"
    )

    ended = Commands("", tmp_path).run("ceylon", "graph", "-", stdin=text)

    assert ended.returncode == 0, ended.stderr
    assert ended.stdout.splitlines() == [
        "flowchart LR",
        '  subgraph g1["A"]',
        '    g1t0["a"]',
        '    g1t1["b"]',
        "  end",
        '  subgraph g2["B"]',
        '    g2t0["c"]',
        "  end",
        '  x0(["group 06h0rb0itfv026ispq2k"])',
        "  g1t0 --> g1t1",
        "  g1 --> g2",
        "  x0 --> g2",
    ]


def test_a_submitted_group_is_drawn_with_its_states(commands: Commands) -> None:
    (commands.folder / "f.yaml").write_text("name: A\ntasks:\n  a: \n  b: {needs: a}\n")
    gid = commands.run("submit", "f.yaml").stdout.strip()

    drawn = commands.run("ceylon", "graph", gid)
    commands.run("ceylon", "cancel", gid)
    after = commands.run("ceylon", "graph", gid)
    unknown = commands.run("ceylon", "graph", "06h0rb0itfv026ispq2k")

    assert drawn.stdout.splitlines() == [
        "flowchart LR",
        '  subgraph g1["A"]',
        '    g1t0["a"]',
        '    g1t1["b"]',
        "  end",
        "  g1t0 --> g1t1",
        "  classDef pending fill:#fff3c4,color:#111111",
        "  class g1t0 pending",
        "  classDef waiting fill:#eeeeee,color:#111111",
        "  class g1t1 waiting",
    ]
    assert "  class g1t0,g1t1 cancelled" in after.stdout.splitlines()
    assert unknown.returncode == 2
    assert "Traceback" not in unknown.stderr


def test_many_tasks_are_drawn_by_kind_with_their_states_counted() -> None:
    drawing = Drawing("g1", "Many")
    for at in range(100):
        drawing.add(f"fetch-{at}", (), "r", "completed")
        drawing.add(f"size-{at}", (f"fetch-{at}",), "r", "completed" if at < 40 else "pending")
    drawing.add("all", [f"size-{at}" for at in range(100)], "r", "waiting")

    drawn = draw([drawing]).splitlines()

    assert drawn[1:8] == [
        '  subgraph g1["Many"]',
        '    g1t0["fetch-0 … fetch-99 (100 tasks, 100 completed)"]',
        '    g1t1["size-0 … size-99 (100 tasks, 40 completed, 60 pending)"]',
        '    g1t2["all"]',
        "  end",
        "  g1t0 --> g1t1",
        "  g1t1 --> g1t2",
    ]
    assert "  class g1t0 completed" in drawn
    assert not [line for line in drawn if line.startswith("  class ") and "g1t1" in line]


def test_too_many_kinds_are_refused_with_a_remedy() -> None:
    drawing = Drawing("g1", "Chain")
    for at in range(300):
        drawing.add(f"t{at}", (f"t{at - 1}",) if at else (), "r")

    with pytest.raises(
        InvalidInputError, match=r"^graph: 300 boxes and 299 arrows, 250 and 500 can .*; draw a smaller"
    ):
        draw([drawing])


def test_a_title_cannot_add_to_the_drawing() -> None:
    drawn = draw([Drawing("g1", 'a"]\n  x["<b>`é'), Drawing("g2", "b", ["no\nid"])])

    assert drawn.splitlines()[1] == '  subgraph g1["a#34;#93;#10;  x#91;#34;#60;b#62;#96;é"]'
    assert '  x0(["group no#10;id"])' in drawn.splitlines()
