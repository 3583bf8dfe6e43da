"""
Group files of users who think in other tools, and of enemies: each becomes what it says, or one clear message.

What is large is read in a process of its own, bounded in memory and processor time: a fault would fill the machine.
"""

from __future__ import annotations

import json
import resource
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from conftest import LONG

from rq_ceylon.client import check_group
from rq_ceylon.errors import GroupFileError, InvalidInputError, PayloadTooLargeError
from rq_ceylon.groupfile import load
from rq_ceylon.models import DEFAULTS_BYTES_MAX, DESCRIPTION_MAX, KEY_MAX, Task, TaskGroup


def values(text: str | bytes, filename: str = "f.yaml") -> Any:
    (group,) = load(text, filename)
    (task,) = group.tasks
    return task.arguments["v"]


def of_value(text: str) -> str:
    return f"name: x\ntasks:\n  a:\n    with:\n      v: {text}\n"


READ = {
    "yes of YAML 1.1": ("yes", "yes"),
    "Norway": ("NO", "NO"),
    "off": ("off", "off"),
    "an octal of YAML 1.1": ("0755", "0755"),
    "an octal of YAML 1.2": ("0o755", "0o755"),
    "a hexadecimal": ("0xFF", "0xFF"),
    "underscores": ("1_000", "1_000"),
    "a sixty": ("22:22", "22:22"),
    "a date": ("2026-11-30", "2026-11-30"),
    "a moment": ("2026-11-30 10:00:00", "2026-11-30 10:00:00"),
    "a plus": ("+5", "+5"),
    "a leading dot": (".5", ".5"),
    "a trailing dot": ("5.", "5."),
    "a version of three": ("1.20.0", "1.20.0"),
    "a commit with letters": ("7a22e52", "7a22e52"),
    "a leading zero": ("007", "007"),
    "a quoted number": ("'3.10'", "3.10"),
    "a doubly quoted number": ('"7222e52"', "7222e52"),
    "an exponent with a sign": ("1e-4", 0.0001),
    "True": ("True", True),
    "FALSE": ("FALSE", False),
    "Null": ("Null", None),
    "a tilde": ("~", None),
    "nothing": ("", None),
    "a word with a hash": ("a#b", "a#b"),
    "a comment": ("a #b", "a"),
    "a URL": ("https://a:80/b?c=d#e", "https://a:80/b?c=d#e"),
    "a folded block": (">-\n        a\n        b", "a b"),
    "a literal block": ("|\n        a\n        b\n", "a\nb\n"),
    "a literal number": ("|-\n        3.10", "3.10"),
    "a single quote": ("'it''s'", "it's"),
    "an escape": ('"\\u00e9\\n"', "é\n"),
    "a word over two lines": ("a\n       b", "a b"),
    "a question mark": ("{? a : b}", {"a": "b"}),
    "an odd key": ("{1: a, true: b, 3.10: c}", {"1": "a", "true": "b", "3.10": "c"}),
    "a merge key quoted": ('{"<<": 1}', {"<<": 1}),
    "an empty mapping": ("{}", {}),
    "a trailing comma": ("[1, 2,]", [1, 2]),
    "emoji": ("😀", "😀"),
    "an expression of a shell": ("$(date) ${HOME} `id`", "$(date) ${HOME} `id`"),
    "a template of another tool": ("'{{ item }} {% if x %}'", "{{ item }} {% if x %}"),
    "an escaped look-up": ("$${{ matrix.x }}", "${{ matrix.x }}"),
}


@pytest.mark.parametrize(("text", "expected"), READ.values(), ids=READ)
def test_a_value_is_what_it_says(text: str, expected: Any) -> None:
    found = values(of_value(text))

    assert (found, type(found)) == (expected, type(expected))


OTHERS: dict[str, tuple[str | bytes, Any]] = {
    "a byte order mark": (b"\xef\xbb\xbf" + of_value("é").encode(), "é"),
    "lines of Windows": (of_value("1").replace("\n", "\r\n"), 1),
    "lines of an old Mac": (of_value("1").replace("\n", "\r"), 1),
    "a directive": ("%YAML 1.2\n---\n" + of_value("no"), "no"),
    "an end": (of_value("1") + "...\n", 1),
    "a last separator": (of_value("1") + "---\n", 1),
    "JSON in a file of YAML": (json.dumps({"name": "x", "tasks": {"a": {"with": {"v": "\u2028"}}}}), "\u2028"),
    "JSON with a byte order mark": (b'\xef\xbb\xbf{"name": "x", "tasks": {"a": {"with": {"v": 1.50}}}}', 1.5),
    "JSON behind blank lines": ('\n\n {"name": "x", "tasks": {"a": {"with": {"v": "\\ud83d\\ude00"}}}}', "😀"),
    "YAML that begins like JSON": ('{"name": x, tasks: {a: {with: {v: y}}}}', "y"),
    "a slash that is escaped": ('{"name": "x", "tasks": {"a": {"with": {"v": "\\/"}}}}', "/"),
    "a tab between tokens": ('{\t"name":\t"x",\t"tasks":\t{"a":\t{"with":\t{"v":\t1}}}}', 1),
}


@pytest.mark.parametrize(("text", "expected"), OTHERS.values(), ids=OTHERS)
def test_a_file_is_read_however_it_was_saved(text: str | bytes, expected: Any) -> None:
    assert values(text) == expected


CI = "name: x\ntasks:\n  t:\n"
REFUSED: dict[str, tuple[str | bytes, str]] = {
    "a version": (of_value("3.10"), "quote it if it is text, or write 3.1"),
    "a commit": (of_value("7222e52"), "quote it if it is text"),
    "a round price": (of_value("2.50"), "quote it if it is text, or write 2.5"),
    "a minus zero": (of_value("-0"), "quote it if it is text, or write 0"),
    "more digits than a number has": (of_value("0.12345678901234567890"), "quote it if it is text"),
    "a number as a duration": ("name: x\ntasks: {a: {timeout: 1.50}}", "or write 1.5"),
    "an anchor": (of_value("&a 1"), "&a is an anchor; remove it"),
    "an alias": (of_value("*a"), "*a is an alias; write the value itself, or use defaults"),
    "a merge": ("name: x\ntasks:\n  a:\n    <<: {role: r}\n", "unknown key; use one of"),
    "a set": (of_value("!!set {a}"), "is a tag; remove it"),
    "a tag of another tool": (of_value("!Ref x"), "!Ref is a tag; remove it"),
    "an include": (of_value("!include other.yaml"), "!include is a tag; remove it"),
    "a list as a key": (of_value("{[a]: 1}"), "a key must be text; write one word before the colon"),
    "a tab": ("name: x\ntasks:\n\ta: {}\n", "indent with spaces, not tabs"),
    "a wrong indent": ("name: x\ntasks:\n  a: {}\n b: {}\n", "f.yaml:4:2"),
    "UTF-16": (of_value("é").encode("utf-16"), "is not UTF-8; save the file as UTF-8"),
    "UTF-32": (of_value("é").encode("utf-32"), "is not UTF-8; save the file as UTF-8"),
    "latin-1": (of_value("é").encode("latin-1"), "is not UTF-8; save the file as UTF-8"),
    "half a surrogate in JSON": ('{"name": "\\udc00", "tasks": {"a": {}}}', "half of a surrogate pair"),
    "JSON twice": ('{"name": "x", "name": "y", "tasks": {"a": {}}}', "duplicate key; keep one of them"),
    "a comment in JSON": ('{"name": "x", // y\n "tasks": {"a": {}}}', "file: did not find expected"),
    "a list of groups": ('[{"name": "x", "tasks": {"a": {}}}]', "a list where a mapping is needed"),
    "strategy": (CI + "    strategy: {matrix: {n: [1]}}", "unknown key; write matrix: without it"),
    "max-parallel": (CI + "    max-parallel: 3", "write max_running: without strategy"),
    "max_parallel": (CI + "    max_parallel: 3", "write max_running: without strategy"),
    "fail-fast": ("name: x\nfail-fast: true\ntasks: {a: {}}", "fail_when: failed > 0, on_failed: cancel"),
    "continue-on-error": (CI + "    continue-on-error: true", "put such tasks into a group of their own"),
    "runs-on": (CI + "    runs-on: linux", "unknown key; use one of"),
    "timeout-minutes": (CI + "    timeout-minutes: 5", 'unknown key; did you mean "timeout"?'),
    "an axis of one value": (CI + "    matrix: {n: 1}", "write [first, second], or {range: [first, end]}"),
    "an axis by expression": (CI + "    matrix: {n: '${{ fromJSON(x) }}'}", "where values are needed; write [first"),
    "max-parallel in a matrix": (CI + "    matrix: {n: [1], max-parallel: 2}", "2 where values are needed"),
    "an expression": (CI + "    matrix: {n: [1]}\n    with: {v: '${{ matrix.n == 1 }}'}", "names no value"),
    "a variable": (CI + "    with: {v: '${{ github.sha }}'}", "names no value"),
    "a secret": (CI + "    with: {v: '${{ secrets.KEY }}'}", "names no value"),
    "exclude of an unknown axis": (CI + "    matrix: {os: [a], exclude: [{oz: a}]}", "the axes are os"),
    "exclude by another type": (CI + "    matrix: {n: ['1', '2'], exclude: [{n: 1}]}", "1 is not '1', the value of"),
    "exclude of a wrong value": (CI + "    matrix: {n: [a, b], exclude: [{n: c}]}", "'c' is no value of the axis 'n'"),
    "exclude of all": (CI + "    matrix: {n: [a], exclude: [{n: a}]}", "exclude leaves no combination"),
    "include of a mapping": (CI + "    matrix: {n: [a], include: {n: b}}", "write [{axis: value}]"),
    "a look-up that some have not": (CI + "    matrix: {n: [a, b], include: [{n: a, m: 1}]}\n"
                                     "    with: {v: '${{ matrix.m }}'}",
                                     "matrix.m finds nothing in {'n': 'b'}"),
    "a need by number": ("name: x\ntasks:\n  f: {matrix: {n: [a/b, c/d]}}\n"
                         "  t: {matrix: {i: [0, 1]}, needs: 'f-${{ matrix.i }}'}", "no task has the id 'f-0'"),
    "a need in two ways": ("name: x\ntasks:\n  f: {matrix: {n: [1, b c]}}\n  t: {needs: f-1}",
        "can mean each of f-0, f-1"),
    "a need of what is excluded": ("name: x\ntasks:\n  f: {matrix: {n: [1, 2], exclude: [{n: 2}]}}\n"
                                   "  t: {matrix: {n: [1, 2]}, needs: 'f-${{ matrix.n }}'}",
        "no task has the id 'f-2'"),
    "all of many": ("name: x\ntasks:\n  f: {matrix: {n: {range: [0, 300]}}}\n  t: {needs: f}",
        "a second group with depends_on"),
    "257 needs": ("name: x\ntasks:\n  f: {}\n  t: {needs: [" + "f, " * 257 + "]}", "a second group with depends_on"),
    "a condition": (CI + "    if: always()", "unknown key"),
    "65 groups": ("name: x\ntasks: {a: {}}\ndepends_on: [" + "06h0rb0itfv026ispq2k," * 65 + "]",
        "put a group in between"),
    "a long description": (f"name: x\ndescription: {'y' * (DESCRIPTION_MAX + 1)}\ntasks: {{a: {{}}}}",
        "at most 10000 characters"),
    "a long key": (f"name: x\nkey: {'y' * (KEY_MAX + 1)}\ntasks: {{a: {{}}}}", "at most 1000 characters"),
    "large defaults": (f"name: x\ndefaults: {{metadata: {{v: {'y' * DEFAULTS_BYTES_MAX}}}}}\ntasks: {{a: {{}}}}",
                       "65,536 are allowed; give large values to the tasks that need them"),
    "a duration without end": (f"name: x\ntasks: {{a: {{timeout: {'1s' * 100_000}}}}}", "is not a duration"),
}  # fmt: skip


@pytest.mark.parametrize(("text", "says"), REFUSED.values(), ids=REFUSED)
def test_what_would_be_misread_is_one_clear_message(text: str | bytes, says: str) -> None:
    with pytest.raises(GroupFileError) as caught:
        load(text, "f.yaml")

    (said,) = caught.value.problems
    assert says in said
    assert said.startswith("f.yaml:")
    assert said.isprintable()
    assert len(said) < 700


def test_users_of_python_have_the_same_limits() -> None:
    many = TaskGroup("x", [Task()], defaults=Task(metadata={"v": "y" * DEFAULTS_BYTES_MAX}))
    with pytest.raises(PayloadTooLargeError, match=r"group: defaults: .* 65,536 are allowed"):
        check_group(many)
    with pytest.raises(
        InvalidInputError, match="group: description: has 10,001 characters; give text of at most 10,000"
    ):
        check_group(TaskGroup("x", [Task()], description="y" * (DESCRIPTION_MAX + 1)))
    with pytest.raises(InvalidInputError, match="group: key: has 1,001 characters; give text of at most 1,000"):
        check_group(TaskGroup("x", [Task()], key="y" * (KEY_MAX + 1)))


def tasks(text: str) -> str:
    return f"name: x\ntasks: {{{text}}}\n"


AXIS = "matrix: {n: {range: [0, 1000000]}}"
SMALL: dict[str, tuple[str, str]] = {
    "a million tasks": (tasks(f"a: {{{AXIS}, duration: '${{{{ matrix.n }}}}'}}"), "1,000,000 tasks"),
    "a million a hundred times": ("---\n".join([tasks(f"a: {{{AXIS}}}")] * 100), "give a file at most 1,000,000"),
    "a million needs": (tasks("a: {matrix: {n: {range: [0, 500000]}}}, b: {matrix: {n: {range: [0, 500000]}}, "
                              "needs: ['a-${{ matrix.n }}']}"), "combinations have to be checked"),
    "a million roles": (tasks(f"a: {{{AXIS}, role: 'r${{{{ matrix.n }}}}'}}"), "10,000 are allowed; use fewer values"),
    "a long value often": (tasks(f"a: {{matrix: {{v: [{'y' * 100_000}]}}, "
                                 f"metadata: {{x: '{'${{matrix.v}}' * 3000}'}}}}"),
                           "its arguments become up to 300,006,008 bytes, 1,048,576 are allowed"),
    "many to include": (tasks("a: {matrix: {n: {range: [0, 9000]}, include: [" + "{m: 1}, " * 900 + "]}}"),
                        "combinations have to be checked"),
    "deep": (tasks("a: {with: {x: " + "[" * 100_000 + "]" * 100_000 + "}}"), "nest"),
    "aliases": ("a: &a [x, x, x]\n" + "".join(f"{b}: &{b} [*{a}, *{a}]\n" for a, b in zip("abcdefgh",
        "bcdefghi", strict=True)),
                "is an alias"),
    "1,000 unknown keys": (tasks("a: {" + ",".join(f"k{n}: 1" for n in range(1000)) + "}"), "ended after 50 problems"),
    "1,000 goals": (tasks("a: ") + "goal: [" + "completed >= 1, " * 1000 + "]", "1,000 goals; give a group at most 16"),
}  # fmt: skip
LARGE: dict[str, tuple[str, str]] = {
    "1,900,000 zeros as tasks": ("name: x\ntasks: [" + "0," * 1_900_000 + "]", "more than 500,000 keys and values"),
    "mappings": ("name: x\ntasks: [" + "{x: 1}," * 160_000 + "]", "160,000 tasks are written up to here"),
    "wrong needs": ("name: x\ntasks: [" + "{needs: nope}," * 49_000 + "]", "ended after 50 problems"),
    "unknown keys": (tasks("a: {" + ",".join(f"k{n}: 1" for n in range(240_000)) + "}"), "ended after 50 problems"),
    "a long key": ("name: x\n" + "k" * 8_000_000 + ": 1\ntasks: {a: {}}\n", "expected ':'"),
    "a wide text": (tasks(f'a: {{with: {{x: "😀{"y" * 8_000_000}"}}}}'), "1,048,576 are allowed"),
    "needs of one": (tasks("a: {needs: [" + "b," * 490_000 + "]}"), "490,000 of them"),
    "look-ups": (tasks("a: {matrix: {n: [1]}, metadata: {x: [" + "'${{ matrix.m }}'," * 200_000 + "]}}"),
        "ended after 50"),
    "a chain": (tasks("t0: {}, " + ", ".join(f"t{n}: {{needs: t{n - 1}}}" for n in range(1, 20_000))), "20,000 tasks"),
    "JSON": ('{"name": "x", "tasks": [' + ", ".join(["{}"] * 240_000) + "]}", "240,000 tasks are written up to here"),
}  # fmt: skip
SIZED = SMALL | (LARGE if LONG else {})


@pytest.mark.parametrize(("text", "says"), SIZED.values(), ids=SIZED)
def test_a_file_that_would_fill_the_machine_is_bounded(text: str, says: str, tmp_path: Path) -> None:
    file = tmp_path / "f.yaml"
    file.write_text(text)

    def bound() -> None:
        resource.setrlimit(resource.RLIMIT_CPU, (20, 20))  # a loaded machine takes longer than 5 s for the same work
        resource.setrlimit(resource.RLIMIT_DATA, (250 * 2**20, 250 * 2**20))

    ended = subprocess.run(
        [sys.executable, "-m", "rq_ceylon.cli", "ceylon", "validate", file],
        preexec_fn=bound,
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )

    assert ended.returncode in (0, 2), ended.stderr[-2000:]
    assert says in ended.stdout + ended.stderr
    assert "Traceback" not in ended.stderr
    assert len(ended.stderr) < 40_000
