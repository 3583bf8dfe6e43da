"""
Whatever a user or an enemy hands to a command: the right exit code, one clear message with a remedy, no traceback, and
nothing written.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import pytest
import redis
from click.testing import CliRunner
from commands import Commands
from loguru import logger

from rq_ceylon import cli, log
from rq_ceylon.cli.facts import to_json

MISSING = "redis://127.0.0.1:1"
LONG = "x" * 65
IDS = "use 1 to 64 letters, digits and . _ : -"
TASK_IDS = "give <group>/<task>, such as 06h0ql7fl6apk73bpl93/1"
DURATIONS = "give seconds (30) or text such as 30s, 5m, 1h30m, 250ms, 2d"
TASKS = "\ntasks: {a: {}}\n"


@dataclass
class Case:
    """
    What is handed to a command, and what it has to say.

    Attributes:
        arguments: `URL` in them is that of a live server, `FILE` the path of a file with `content`.
        says: all of these are in the message; the last is the remedy.
    """

    arguments: Sequence[str]
    says: Sequence[str]
    code: int = 2
    content: bytes | str | None = None
    stdin: bytes | None = None
    environ: dict[str, str] = field(default_factory=dict)


@pytest.fixture
def store(redis_url: str) -> Iterator[redis.Redis]:
    with redis.Redis.from_url(redis_url, decode_responses=True) as store:
        yield store


def assert_one_message(case: Case, code: int, stdout: str, stderr: str) -> None:
    assert code == case.code, (code, stdout, stderr)
    assert "Traceback" not in stderr
    assert stdout == ""
    assert len([line for line in stderr.splitlines() if line.startswith("Error: ")]) == 1, stderr
    for words in case.says:
        assert words in stderr, stderr
    assert len(stderr) < 3000
    assert all(line.isprintable() for line in stderr.splitlines())


def run_here(case: Case, url: str, folder: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[int, str, str]:
    """Run the command in this process, as its script would."""
    monkeypatch.chdir(folder)
    if case.content is not None:
        content = case.content if isinstance(case.content, bytes) else case.content.encode("utf-8", "surrogatepass")
        (folder / "FILE").write_bytes(content)
    name, *arguments = [argument.replace("URL", url) for argument in case.arguments]
    environ = {"CEYLON_REDIS_URL": url, **case.environ}
    ended = CliRunner(env=environ).invoke(getattr(cli, name), arguments, input=case.stdin, prog_name=name)
    assert ended.exception is None or isinstance(ended.exception, SystemExit), ended.exception
    return ended.exit_code, ended.stdout, ended.stderr


# ---- files -----------------------------------------------------------------------------------------------------------
FILES: list[tuple[str, bytes | str, Sequence[str]]] = [
    ("empty", "", ["FILE:1:1: ", "it is empty; start with name: and tasks:"]),
    ("blank", "\n  \n# nothing\n", ["it is empty; start with name: and tasks:"]),
    ("only separators", "---\n---\n", ["it is empty; start with name: and tasks:"]),
    ("null", "null", ["name: missing; add it", "tasks: missing; add it"]),
    ("text", "hello", ["'hello' where a mapping is needed; write key: value"]),
    ("number", "42", ["42 where a mapping is needed; write key: value"]),
    ("list", "[1, 2]", ["a list where a mapping is needed; write key: value"]),
    ("binary", bytes(range(256)), ["FILE:1:1: file: the character U+0000 is not allowed; remove it"]),
    ("ELF", b"\x7fELF\x02\x01\x01\x00", ["the character U+007F is not allowed; remove it"]),
    ("gzip", b"\x1f\x8b\x08\x00\x00", ["the character U+001F is not allowed; remove it"]),
    ("latin-1", "name: caf\u00e9".encode("latin-1") + TASKS.encode(), ["0xE9 is not UTF-8; save the file as UTF-8"]),
    ("UTF-16", ("name: x" + TASKS).encode("utf-16"), ["is not UTF-8; save the file as UTF-8"]),
    ("terminal codes", "name: x\x1b[2J" + TASKS, ["the character U+001B is not allowed; remove it"]),
    ("a BOM and CRLF, and a mistake", "\ufeffname: x\r\ntasks:\r\n  a: {rolle: r}\r\n", ["FILE:3:7: ", '"role"?']),
    ("a BOM in the middle", "name: x\ufeff" + TASKS + "task: 1\n", ['did you mean "tasks"?']),
    ("tabs", "name: x\ntasks:\n\ta: {}\n", ["FILE:3:1: ", "indent with spaces, not tabs"]),
    ("unclosed bracket", "name: x\ntasks: {a: {}\n", ["close the bracket"]),
    ("unclosed quote", 'name: "x\ntasks: {a: {}}\n', ["close the quote"]),
    ("colon in text", "name: a: b" + TASKS, ["FILE:1:8: ", 'quote text that contains ": "']),
    ("cut JSON", '{"name": "x", "tasks": {"a": {}', ["FILE:", "close the bracket"]),
    ("JSON lines", '{"name": "x", "tasks": {"a": {}}}\n{"name": "y", "tasks": {"a": {}}}\n', ["FILE:2:1: "]),
    ("duplicate key", "name: x\nname: y" + TASKS, ["FILE:2:1: name: duplicate key; keep one of them"]),
    ("duplicate task", "name: x\ntasks:\n  a: {}\n  a: {}\n", ["FILE:4:3: tasks.a: duplicate key"]),
    ("merge key", "name: x\ntasks:\n  a: &a {}\n  b: {<<: *a}\n", ["&a is an anchor; remove it", "use defaults"]),
    ("bomb", "a: &a [x]\nb: &b [*a, *a]\nc: &c [*b, *b]\nd: [*c, *c]\n", ["*c is an alias; write the value itself"]),
    ("object", "name: !!python/object/apply:os.system [id]" + TASKS, ["is a tag; remove it"]),
    ("tagged", "name: !!binary aGk=" + TASKS, ["is a tag; remove it"]),
    ("NaN", "name: x\ntasks: {a: {with: {x: .nan}}}", ["FILE:2:23: ", "quote it if it is text"]),
    ("infinity", "name: x\ntasks: {a: {duration: -.inf}}", ["is no number that JSON can hold; quote it"]),
    ("huge number", "name: x\ntasks: {a: {with: {x: " + "9" * 5000 + "}}}", ["is no number that JSON can hold; quote"]),
    ("huge exponent", "name: x\ntasks: {a: {with: {x: 1e999}}}", ["is no number that JSON can hold; quote it"]),
    ("date as duration", "name: x\ntasks: {a: {delay: 2026-01-01}}", ["'2026-01-01' is not a duration", DURATIONS]),
    ("clock as duration", "name: x\ntasks: {a: {timeout: 1:30}}", ["write 90s or 1m30s"]),
    ("negative duration", "name: x\ntasks: {a: {timeout: -5}}", ["-5 is out of range (0 to 10 years)", DURATIONS]),
    ("endless duration", "name: x\ntasks: {a: {expires: 99999d}}", ["'99999d' is out of range", DURATIONS]),
    ("very deep", "name: x\ntasks: {a: {with: {x: " + "[" * 3000 + "]" * 3000 + "}}}", ["nest"]),
    ("deep and cut", "[" * 100_000, ["nest"]),
    ("deep block", "- " * 5000, ["nest"]),
    ("9 MiB", b"#" * 9 * 2**20, ["more than 8,388,608; split it into several groups"]),
    ("many documents", "--- {}\n" * 200, ["more than 100 documents; use several files"]),
    ("payload of 2 MiB", f"name: x\ntasks: {{a: {{with: {{x: {'y' * 2**21}}}}}}}", ["store the data elsewhere"]),
    ("metadata of 2 MiB", f"name: x\ntasks: {{a: {{metadata: {{x: {'y' * 2**21}}}}}}}", ["store the data elsewhere"]),
    ("no tasks", "name: x\ntasks: {}", ["an empty mapping where tasks are needed; write one per key"]),
    ("tasks of text", "name: x\ntasks: a", ["'a' where tasks are needed; write one per key, or a list of them"]),
    ("task of text", "name: x\ntasks: {a: echo}", ["FILE:2:12: tasks.a: 'echo' where a mapping is needed"]),
    ("task of a list", "name: x\ntasks: [[]]", ["tasks[0]: an empty list where a mapping is needed"]),
    ("arguments of a list", "name: x\ntasks: {a: {with: [1]}}", ["tasks.a.with: a list is not usable", "dictionary"]),
    ("attempts of text", "name: x\ntasks: {a: {max_attempts: two}}", ["'two' is not usable", "valid integer"]),
    ("attempts of zero", "name: x\ntasks: {a: {max_attempts: 0}}", ["greater than or equal to 1"]),
    ("attempts of a truth", "name: x\ntasks: {a: {max_attempts: true}}", ["true is not usable", "valid integer"]),
    ("priority", "name: x\npriority: hgih" + TASKS, ['did you mean "high"?']),
    ("priority of a number", "name: x\npriority: 5" + TASKS, ["5 is not known here; use high, normal or low"]),
    ("role of a number", "name: x\ntasks: {a: {role: 5}}", ["5 where text is needed; write text, in quotes"]),
    ("role with braces", "name: x\ntasks: {a: {role: '{r}'}}", ["'{r}' is not usable", IDS]),
    ("role with a newline", 'name: x\ntasks: {a: {role: "a\\nb"}}', ["FILE:2:19: ", IDS]),
    ("id with a space", "name: x\ntasks: {a b: {}}", ["'a b' is not usable", IDS]),
    ("id in Unicode", "name: x\ntasks: {caf\u00e9: {}}", ["is not usable", IDS]),
    ("id of 65", f"name: x\ntasks: {{{LONG}: {{}}}}", ["is not usable", IDS]),
    ("id empty", "name: x\ntasks: {'': {}}", ["'' is not usable", IDS]),
    ("id with codes", 'name: x\ntasks: {"a\\e[2J": {}}', ["is not usable", IDS]),
    ("uses as an import", "name: x\ntasks: {a: {uses: 'os.system(1)'}}", ["'os.system(1)' is not usable", IDS]),
    ("goal name", "name: x\ngoal: {when: completed >= 1, name: a b}" + TASKS, ["'a b' is not usable", IDS]),
    ("unknown key", "name: x\ntaks: {a: {}}", ["FILE:2:1: taks: unknown key", 'did you mean "tasks"?']),
    ("unknown key of a goal", "name: x\ngoal: {wen: completed >= 1}" + TASKS, ["wen: unknown key; did you mean"]),
    ("name of 201", f"name: {'x' * 201}" + TASKS, ["string should have at most 200 characters"]),
    ("needs itself", "name: x\ntasks: {a: {needs: a}}", ["it needs itself; remove it from its needs"]),
    ("needs in a circle", "name: x\ntasks: {a: {needs: b}, b: {needs: a}}", ["a -> b -> a; remove one of these needs"]),
    ("needs nobody", "name: x\ntasks: {fetch: {}, b: {needs: fecth}}", ['did you mean "fetch"?']),
    ("needs too many", "name: x\ntasks: {a: {needs: [" + "b, " * 257 + "]}, b: {}}", ["257 of them"]),
    ("goal nonsense", "name: x\ngoal: win" + TASKS, ["win is not known here", "the counters are"]),
    ("goal of code", "name: x\ngoal: __import__('os')" + TASKS, ["goal.when: ", "the counters are"]),
    ("goal by equality", "name: x\ngoal: completed == 1" + TASKS, ["write >= to reach a number"]),
    ("goal deep", "name: x\ngoal: '" + "(" * 200 + "completed >= 1" + ")" * 200 + "'" + TASKS, ["write it flatter"]),
    ("goal long", "name: x\ngoal: " + "completed >= 1 or " * 100 + "failed < 1" + TASKS, ["write at most 512"]),
    ("matrix without end", "name: x\ntasks: {a: {matrix: {n: {range: [0, 1000000000000]}}}}", ["at most 1,000,000"]),
    ("matrix of many", "name: x\ntasks: {a: {matrix: {n: {range: [0, 9999]}, m: {range: [0, 9999]}}}}", ["1,000,000"]),
    ("look-up of code", "name: x\ntasks: {a: {matrix: {n: [1]}, with: {x: '${{ matrix.n.__class__ }}'}}}", ["add it"]),
    ("look-up of secrets", "name: x\ntasks: {a: {with: {x: '${{ env.HOME }}'}}}", ["write ${{ matrix.NAME }}"]),
    ("depends on nobody", "name: x\ndepends_on: nobody" + TASKS, ["no group has the key or name 'nobody'; name a g"]),
    ("depends on itself", "name: x\ndepends_on: x" + TASKS, ["it depends on itself; remove it"]),
]  # fmt: skip


@pytest.mark.parametrize(("content", "says"), [one[1:] for one in FILES], ids=[name for name, *_ in FILES])
def test_a_file_that_cannot_be_used(
    content: bytes | str,
    says: Sequence[str],
    redis_url: str,
    store: redis.Redis,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    case = Case(["submit", "FILE"], says, content=content)

    assert_one_message(case, *run_here(case, redis_url, tmp_path, monkeypatch))
    assert store.dbsize() == 0

    code, stdout, stderr = run_here(
        Case(["ceylon", "validate", "FILE"], says, content=content), redis_url, tmp_path, monkeypatch
    )
    assert (code, stdout) == (2, "")
    assert all(line.startswith("FILE:") for line in stderr.splitlines())


# ---- everything else -------------------------------------------------------------------------------------------------
GOOD = f"name: x{TASKS}"

PATHS = {
    "a directory": Case(["submit", "."], [".: cannot be read (Is a directory)", "give a YAML or JSON file, or -"]),
    "a missing file": Case(["submit", "no.yaml"], ["no.yaml: cannot be read", "give a YAML or JSON file, or -"]),
    "no name": Case(["submit", ""], ["cannot be read", "give a YAML or JSON file, or -"]),
    "a path through a file": Case(["submit", "FILE/x"], ["Not a directory", "give a YAML or JSON"], content=GOOD),
    "a very long name": Case(["submit", "x" * 300], ["File name too long", "give a YAML or JSON file, or -"]),
    "no end": Case(["submit", "/dev/zero"], ["more than 8,388,608; split it into several groups"]),
    "nothing": Case(["submit", "/dev/null"], ["it is empty; start with name: and tasks:"]),
    "nothing on stdin": Case(["submit", "-"], ["<stdin>:1:1: file: it is empty; start with"], stdin=b""),
    "binary on stdin": Case(["submit", "-"], ["<stdin>:1:1: file: ", "save the file as UTF-8"], stdin=b"\xff"),
    "two files": Case(["submit", "FILE", "FILE"], ["Got unexpected extra argument (FILE)"], content=GOOD),
    "no file": Case(["submit"], ["Missing argument 'FILE'"]),
    "a graph of a missing file": Case(["ceylon", "graph", "no.yaml"], ["no.yaml: cannot be read", "give a YAML or"]),
    "a graph of a directory": Case(["ceylon", "graph", "."], ["Is a directory", "give a YAML or JSON file, or -"]),
    "a graph of a chain": Case(
        ["ceylon", "graph", "-"],
        ["300 boxes", "draw a smaller group"],
        stdin=("name: x\ntasks:\n  a0:\n" + "".join(f"  a{n}: {{needs: a{n - 1}}}\n" for n in range(1, 300))).encode(),
    ),
}

URLS = {
    "redis": ["it has no scheme", "use redis://host:port/db"],
    "localhost:6379": ["it has no scheme", "use redis://host:port/db"],
    "http://host": ["http:// is not known", "use redis://host:port/db"],
    "redis://": ["it names no host, or port 0", "use redis://host:port/db"],
    "redis://:6379": ["it names no host, or port 0", "use redis://host:port/db"],
    "redis://user:secret@": ["it names no host, or port 0", "use redis://host:port/db"],
    "redis://host:port": ["it is malformed", "use redis://host:port/db"],
    "redis://host:99999": ["it is malformed", "use redis://host:port/db"],
    "redis://host:-1": ["it is malformed", "use redis://host:port/db"],
    "redis://host:0": ["it names no host, or port 0", "use redis://host:port/db"],
    "redis://[::1": ["it is malformed", "use redis://host:port/db"],
    "redis://host/first": ["the database is not a number", "use redis://host:port/db"],
    "redis://host/-1": ["the database is not a number", "use redis://host:port/db"],
    "redis://host/0/1": ["the database is not a number", "use redis://host:port/db"],
    "redis://host?db=first": ["the database is not a number", "use redis://host:port/db"],
    "redis://user:sec/ret@host": ["use redis://host:port/db"],
    "rediss://": ["it names no host, or port 0", "use redis://host:port/db"],
    "unix://": ["it does not give the absolute path of a socket", "use redis://host:port/db"],
    "unix:///": ["it does not give the absolute path of a socket", "use redis://host:port/db"],
    "unix://folder/socket": ["it does not give the absolute path of a socket", "use redis://host:port/db"],
    "embedded://here": ["nothing may follow embedded://", "use redis://host:port/db"],
    "redis+sentinel://": ["use redis://host:port/db"],
    "redis+cluster://": ["use redis://host:port/db"],
    "\u202eredis://host": ["use redis://host:port/db"],
}
NOT_DURATIONS = [
    "",
    "soon",
    "-1",
    "-1s",
    "nan",
    "inf",
    "1e400",
    "1:30",
    "5 minutes",
    "1w",
    "99999d",
    "\u0661\u0660\u0660x",
]

GROUPS = ["", "a b", "{a}", "a\nb", "\u00e9", LONG, "/", "/a", "*", "\x1b[2J"]

NAMESPACES = ["a b", "{a}", "a\nb", "\u00e9", LONG, "*"]

OPTIONS = {
    "an unknown option": Case(["submit", "FILE", "--wiat"], ["No such option '--wiat'", "--wait"], content=GOOD),
    "an unknown wait": Case(["submit", "FILE", "--wait=banana"], ["'banana'", "write --wait, --wait="], content=GOOD),
    "an empty key": Case(["submit", "FILE", "--key", ""], ["--key: it is empty", "give a text"], content=GOOD),
    "one key for two groups": Case(
        ["submit", "FILE", "--key", "k"], ["FILE has 2 groups", "write key: into each"], content=f"{GOOD}---\n{GOOD}"
    ),
    "an unknown command": Case(["ceylon", "valdate"], ["No such command 'valdate'"]),
    "no file to validate": Case(["ceylon", "validate"], ["Missing argument 'FILE...'"]),
    "a port of text": Case(["ceylon", "server", "--port", "x"], ["'--port': 'x' is not a valid integer range"]),
    "a port too large": Case(["ceylon", "server", "--port", "65536"], ["65536 is not in the range 1<=x<=65535"]),
    "an impossible goal": Case(
        ["submit", "FILE"], ["can never hold: the group has 10 tasks", "lower the number or add tasks"],
        content="name: x\ntasks: {a: {matrix: {n: {range: [0, 10]}}}}\ngoal: completed >= 11",
    ),
    "an impossible goal of many": Case(
        ["submit", "FILE"], ["can never hold: the group has 1200 tasks", "lower the number or add tasks"],
        content="name: x\ntasks: {a: {matrix: {n: {range: [0, 1200]}}}}\ngoal: completed > 1200",
    ),
    "no such server": Case(["submit", "FILE", "--redis", MISSING], ["Cannot reach Redis at"], 3, content=GOOD),
    "no such socket": Case(["submit", "FILE", "--redis", "unix:///no"], ["Cannot reach Redis at"], 3, content=GOOD),
    "no such database": Case(["submit", "FILE", "--redis", "URL?db=99999"], ["out of range"], 3, content=GOOD),
    "nobody serves it": Case(
        ["submit", "FILE", "--require-workers"], ["no worker serves role 'default'", "start one with: ceylon-"], 6,
        content=GOOD,
    ),
    "a variable": Case(["submit", "FILE"], ["--timeout: 'soon' is not a duration", DURATIONS], content=GOOD,
                       environ={"CEYLON_SUBMIT_TIMEOUT": "soon"}),
    "a namespace by variable": Case(["submit", "FILE"], ["namespace: 'a b' is not usable", IDS], content=GOOD,
                                    environ={"CEYLON_NAMESPACE": "a b"}),
}  # fmt: skip

CASES = (
    PATHS
    | OPTIONS
    | {f"URL {url}": Case(["ceylon", "status", "--redis", url], says) for url, says in URLS.items()}
    | {
        f"timeout {text}": Case(["submit", "FILE", "--timeout", text], ["--timeout: ", DURATIONS], content=GOOD)
        for text in NOT_DURATIONS
    }
    | {f"namespace {name!r:.9}": Case(["submit", "FILE", "--namespace", name], ["namespace: ", IDS], content=GOOD)
       for name in NAMESPACES}
    | {f"show {gid!r:.9}": Case(["ceylon", "show", gid], [IDS]) for gid in GROUPS}
    | {f"cancel {gid!r:.9}": Case(["ceylon", "cancel", gid], [TASK_IDS if "/" in gid else IDS]) for gid in GROUPS}
    | {f"show {gid}": Case(["ceylon", "show", gid], ["not known"]) for gid in ("nobody", "nobody/1", "nobody/")}
    | {f"cancel {gid}": Case(["ceylon", "cancel", gid], ["not known"]) for gid in ("nobody", "nobody/1")}
)  # fmt: skip


@pytest.mark.parametrize("case", CASES.values(), ids=[name.encode("unicode_escape").decode() for name in CASES])
def test_an_input_that_cannot_be_used(
    case: Case, redis_url: str, store: redis.Redis, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert_one_message(case, *run_here(case, redis_url, tmp_path, monkeypatch))
    # A group is announced in the index before Redis judges its goals; of the group itself nothing is kept.
    index: tuple[str, ...] = (":groups", ":roles") if "can never hold" in case.says[0] else ()
    assert [key for key in store.keys("*") if not str(key).endswith(index)] == []


WORKERS = {
    "no role": Case(["worker"], ["no role to serve", "give --role ROLE"]),
    "a role with braces": Case(["worker", "-r", "{r}"], ["'{r}' is not usable", IDS]),
    "a role of 65": Case(["worker", "-r", LONG], ["is not usable", IDS]),
    "no slots": Case(["worker", "-r", "r", "-c", "0"], ["0 is not in the range 1<=x<=10000"]),
    "slots of text": Case(["worker", "-r", "r", "-c", "many"], ["'many' is not a valid integer range"]),
    "no processes": Case(["worker", "-r", "r", "--processes", "0"], ["give a number (4) or bounds (2..10)"]),
    "grace": Case(["worker", "-r", "r", "--grace", "soon"], ["--grace: 'soon' is not a duration", DURATIONS]),
    "lease": Case(["worker", "-r", "r", "--lease", "1:00"], ["--lease: '1:00' is not a duration", DURATIONS]),
    "a lease too short": Case(["worker", "-r", "r", "--lease", "10ms"], ["too short; give at least 100ms"]),
    "a log level": Case(["worker", "-r", "r", "--log-level", "loud"], ["'loud' is not one of 'debug'"]),
    "a name": Case(["worker", "-r", "r", "--name", "a b"], ["name: 'a b'", IDS]),
    "a monitor's name": Case(["monitor", "--name", "a b"], ["name: 'a b'", IDS]),
    "a variable": Case(
        ["worker", "-r", "r"], ["'many' is not a valid integer"], environ={"CEYLON_WORKER_CONCURRENCY": "many"}
    ),
    "no object": Case(["worker", "jobs"], ["does not name an object", "write module:app"], 4),
    "no module": Case(["worker", "no_such:app"], ["there is no module 'no_such'"], 4),
    "no such object": Case(["worker", "json:app"], ["name the Ceylon() object"], 4),
    "another object": Case(["worker", "json:dumps"], ["is a function, not a Ceylon; name the Ceylon() object"], 4),
    "an app that fails": Case(["worker", "FILE:app"], ["cannot be imported"], 4),
    "a monitor's app": Case(["monitor", "--app", "no_such:app"], ["there is no module 'no_such'"], 4),
}  # fmt: skip


@pytest.mark.parametrize("case", WORKERS.values(), ids=WORKERS)
def test_a_worker_or_monitor_that_cannot_start(case: Case, commands: Commands, store: redis.Redis) -> None:
    (commands.folder / "FILE.py").write_text("1 / 0\n")

    ended = commands.run(*case.arguments, environ=case.environ)

    assert_one_message(case, ended.returncode, ended.stdout, ended.stderr)
    assert store.dbsize() == 0


@pytest.mark.skipif(os.geteuid() == 0, reason="root reads every file")
def test_a_file_that_may_not_be_read(
    redis_url: str, store: redis.Redis, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "secret.yaml").write_text(GOOD)
    (tmp_path / "secret.yaml").chmod(0)
    case = Case(["submit", "secret.yaml"], ["cannot be read (Permission denied)", "give a YAML or JSON file, or -"])

    assert_one_message(case, *run_here(case, redis_url, tmp_path, monkeypatch))
    assert store.dbsize() == 0


def test_strange_but_usable_texts_are_taken_as_they_are(
    redis_url: str, store: redis.Redis, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Only ids are restricted: names, keys, arguments and metadata hold any text."""
    text = '"{g:1}:meta\\n\\"\\\\ %s {0} \\u0001\\uFFFF 😀 \\u202e |:,;"'
    task = f"{{with: {{{text}: {text}}}, metadata: {{x: {text}}}}}"
    content = f"name: {text}\nkey: {text}\ntasks: {{'a.b:c_d-{'e' * 56}': {task}}}\n"

    code, stdout, stderr = run_here(
        Case(["submit", "FILE", "--json"], [], content=content), redis_url, tmp_path, monkeypatch
    )

    assert code == 0, stderr
    assert '"total":1' in stdout
    assert store.dbsize() is not None


def test_no_text_of_others_can_look_like_a_record_of_the_log(capsys: pytest.CaptureFixture[str]) -> None:
    forged = "no\n12:00:00.000 INFO    Worker w stopped\r\x1b[2J\x9b31m\u202e"
    try:
        log.set_up("info", "text")
        logger.error("a task failed: {}", forged)
        try:
            raise ValueError(forged)
        except ValueError:
            logger.exception("it failed")
        lines = capsys.readouterr().err.split("\n")
        log.set_up("info", "json")
        logger.error("a task failed: {}", forged)
        (as_json,) = capsys.readouterr().err.splitlines()
    finally:
        logger.remove()
        logger.disable("rq_ceylon")
    first, second, *traceback, last = lines
    assert first.endswith(r"a task failed: no\n12:00:00.000 INFO    Worker w stopped\r\x1b[2J\x9b31m\u202e")
    assert second.endswith("it failed")
    assert len(traceback) > 3
    assert all(line.startswith("    ") for line in traceback)
    assert last == ""
    assert all(line.isprintable() for line in [*lines, as_json])
    assert json.loads(as_json)["message"] == f"a task failed: {forged}"


def test_json_output_steers_no_terminal() -> None:
    value = {"r": "\x9b31m \u202e \x7f \u2028 \U000e0001 ä"}
    shown = to_json(value)
    assert shown.isprintable()
    assert "ä" in shown
    assert json.loads(shown) == value
