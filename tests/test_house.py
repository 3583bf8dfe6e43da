"""
The house: a file imports only from floors below, never sideways or up. Only `store` imports redis, and
nothing unpickles or evaluates.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

PACKAGE = "rq_ceylon"

FLOORS: list[set[str]] = [
    {
        "errors",
        "settings",
        "models",
        "views",
        "graph",
        "expression",
        "goals",
        "groupfile",
        "values",
        "attempt",
        "handlers",
        "log",
        "script",
        "process",
        "dev",
    },
    {"store"},
    {"maintenance", "presence", "audit", "checks", "staging"},
    {"client", "worker", "monitor"},
    {"app"},
    {"task", "cli"},
]
FLOOR_OF = {name: number for number, names in enumerate(FLOORS) for name in names}

STEPS: dict[str, set[str]] = {
    "errors": set(),
    "models": {"errors"},
    "values": set(),
    "views": {"errors", "models"},
    "expression": {"errors", "views"},
    "goals": {"errors", "models", "views", "expression"},
    "groupfile": {"errors", "models", "graph", "expression", "goals"},
    "dev": {"errors", "models", "settings", "script", "process"},
    "handlers": {"errors", "models", "views", "settings", "values", "attempt"},
}
"""What a module of the ground floor may import of that floor; those not named: errors, models and views."""

REDIS = {"redis", "hiredis"}
UNPICKLERS = {"pickle", "_pickle", "cPickle", "cloudpickle", "dill", "marshal", "shelve"}
EVALUATORS = {"eval", "exec"}


@dataclass(frozen=True)
class Import:
    """One imported module, by its full name, and where that stands."""

    importer: str
    target: str
    at: str


def offences(root: Path) -> list[str]:
    """Everything in the package below `root` that breaks the house rules, as `file:line: what`."""
    found: list[str] = []
    imports: list[Import] = []
    modules = {_module_name(path, root): path for path in sorted((root / PACKAGE).rglob("*.py"))}
    for module, path in modules.items():
        place = path.relative_to(root).as_posix()
        tree = ast.parse(path.read_text(), place)
        found += [f"{place}:{line}: calls {name}" for line, name in _evaluations(tree)]
        for line, target in _imports(tree, module, is_package=path.name == "__init__.py", modules=set(modules)):
            imports.append(Import(module, target, f"{place}:{line}"))
    for one in imports:
        if problem := _problem(one):
            found.append(f"{one.at}: {problem}")
    return list(dict.fromkeys(found + _cycles(imports)))


def _problem(one: Import) -> str | None:
    importer, target = _part(one.importer), _part(one.target)
    outside = one.target.partition(".")[0]
    if outside in REDIS and importer != "store":
        return f"imports {one.target}; only {PACKAGE}/store does"
    if outside in UNPICKLERS:
        return f"imports {one.target}; data is JSON only"
    if importer == "" or outside != PACKAGE or importer == target:  # the public door may name anything
        return None
    if importer not in FLOOR_OF or (target and target not in FLOOR_OF):
        return f"{importer} or {target} has no floor yet; give it one in tests/test_house.py"
    if not target:
        return f"imports the public door, {PACKAGE}, from inside; name the module itself"
    rise = FLOOR_OF[target] - FLOOR_OF[importer]
    if rise > 0:
        return f"imports up: {importer} (floor {FLOOR_OF[importer]}) from {target} (floor {FLOOR_OF[target]})"
    if rise == 0 and not (FLOOR_OF[importer] == 0 and target in STEPS.get(importer, {"errors", "models", "views"})):
        return f"imports sideways: {importer} from {target}, both floor {FLOOR_OF[importer]}"
    return None


def _cycles(imports: list[Import]) -> list[str]:
    """Modules of one subpackage that import each other in a circle; each circle once, naming the line of each step."""
    steps: dict[str, list[Import]] = {}
    for one in imports:
        if _part(one.importer) and _part(one.importer) == _part(one.target) and one.importer != one.target:
            steps.setdefault(one.importer, []).append(one)
    circles: dict[frozenset[str], str] = {}

    def walk(trail: list[Import]) -> None:
        for step in steps.get(trail[-1].target, []):
            if step.target == trail[0].importer:
                circle = [*trail, step]
                places = ", ".join(one.at for one in circle)
                names = " -> ".join([*(one.importer for one in circle), step.target])
                circles.setdefault(frozenset(one.importer for one in circle), f"{places}: import in a circle: {names}")
            elif all(step.target != one.importer for one in trail):
                walk([*trail, step])

    for first in [one for many in steps.values() for one in many]:
        walk([first])
    return list(circles.values())


def _imports(tree: ast.Module, module: str, *, is_package: bool, modules: set[str]) -> Iterator[tuple[int, str]]:
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                above = module.split(".") if is_package else module.split(".")[:-1]
                base = ".".join([*above[: len(above) - node.level + 1], *filter(None, [node.module])])
            for alias in node.names:
                full = f"{base}.{alias.name}"
                # The version is set before anything is imported, so it may be taken from the door.
                if full != f"{PACKAGE}.__version__":
                    yield alias.lineno, full if full in modules else base


def _evaluations(tree: ast.Module) -> Iterator[tuple[int, str]]:
    for node in ast.walk(tree):
        match node:
            case ast.Name(id=name, ctx=ast.Load()) if name in EVALUATORS:
                yield node.lineno, name
            case ast.Attribute(value=ast.Name(id="builtins"), attr=name) if name in EVALUATORS:
                yield node.lineno, name


def _module_name(path: Path, root: Path) -> str:
    parts = path.relative_to(root).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def _part(module: str) -> str:
    """The file or subpackage of ours that a module belongs to; empty for the door itself."""
    return ".".join(module.split(".")[1:2])


def test_the_house_stands() -> None:
    found = offences(Path(__file__).parent.parent)

    assert not found, "\n".join(["", *found])


def test_the_page_on_the_architecture_shows_the_floors_as_they_are() -> None:
    page = (Path(__file__).parent.parent / "docs" / "architecture.md").read_text()
    rows = re.findall(r"^\| \d \| ([^|]+) \|", page, re.MULTILINE)

    assert [set(re.findall(r"`(\w+)`", row)) for row in rows] == FLOORS


def test_the_files_and_names_on_the_page_on_the_architecture_exist() -> None:
    root = Path(__file__).parent.parent
    page = (root / "docs" / "architecture.md").read_text()
    # `file` or `file` (`name`, `name`, and words).
    named = re.findall(r"`([\w./]+\.(?:py|lua|md|txt|yml))`(?: \(([^)]*)\))?", page)
    missing = []
    for file, names in named:
        found = [folder / file for folder in (root / PACKAGE, root / PACKAGE / "store" / "lua", root)]
        text = next((path.read_text() for path in found if path.exists()), None)
        wanted = re.findall(r"`(\w+)`", names)
        missing += [file] if text is None else [f"{file}: {name}" for name in wanted if name not in text]

    assert len(named) > 40
    assert missing == []


LUA_COLUMNS = 100


def test_a_script_has_short_lines_with_one_statement_each() -> None:
    scripts = sorted((Path(__file__).parent.parent / PACKAGE / "store" / "lua").glob("*.lua"))
    found = []
    for script in scripts:
        for number, line in enumerate(script.read_text().splitlines(), 1):
            code = re.sub(r"'[^']*'|--.*", "", line)
            if len(line) > LUA_COLUMNS or ";" in code:
                found.append(f"{script.name}:{number}: {line}")

    assert len(scripts) > 15
    assert found == []


def build(root: Path, files: dict[str, str]) -> None:
    for name, text in {"__init__.py": "", **files}.items():
        path = root / PACKAGE / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)


@pytest.mark.parametrize(
    ("name", "text", "offence"),
    [
        ("errors.py", "import rq_ceylon.models", "1: imports sideways: errors from models, both floor 0"),
        ("models.py", "from rq_ceylon.settings import x", "1: imports sideways: models from settings, both floor 0"),
        ("graph.py", "from rq_ceylon import goals", "1: imports sideways: graph from goals, both floor 0"),
        ("goals.py", "import rq_ceylon.graph as g", "1: imports sideways: goals from graph, both floor 0"),
        ("groupfile.py", "from . import handlers", "1: imports sideways: groupfile from handlers, both floor 0"),
        ("models.py", "from rq_ceylon.store.keys import x", "1: imports up: models (floor 0) from store (floor 1)"),
        ("store/a.py", "from ..maintenance import x", "1: imports up: store (floor 1) from maintenance (floor 2)"),
        ("store/__init__.py", "from ..client import x", "1: imports up: store (floor 1) from client (floor 3)"),
        (
            "maintenance.py",
            "import rq_ceylon.worker.loop",
            "1: imports up: maintenance (floor 2) from worker (floor 3)",
        ),
        (
            "client.py",
            "if a:\n    from rq_ceylon import monitor",
            "2: imports sideways: client from monitor, both floor 3",
        ),
        (
            "worker/loop.py",
            "def f():\n import rq_ceylon.client",
            "2: imports sideways: worker from client, both floor 3",
        ),
        ("monitor.py", "\n\nfrom rq_ceylon.app import x", "3: imports up: monitor (floor 3) from app (floor 4)"),
        ("app.py", "from rq_ceylon.cli.common import x", "1: imports up: app (floor 4) from cli (floor 5)"),
        ("cli/demo.py", "from rq_ceylon.task import x", "1: imports sideways: cli from task, both floor 5"),
        ("task/__init__.py", "from rq_ceylon.cli import x", "1: imports sideways: task from cli, both floor 5"),
        (
            "app.py",
            "from rq_ceylon import Goal",
            "1: imports the public door, rq_ceylon, from inside; name the module itself",
        ),
        ("app.py", "import rq_ceylon", "1: imports the public door, rq_ceylon, from inside; name the module itself"),
        (
            "utils.py",
            "import rq_ceylon.errors",
            "1: utils or errors has no floor yet; give it one in tests/test_house.py",
        ),
        ("app.py", "import rq_ceylon.utils", "1: app or utils has no floor yet; give it one in tests/test_house.py"),
        ("client.py", "import redis.asyncio as r", "1: imports redis.asyncio; only rq_ceylon/store does"),
        ("__init__.py", "from redis import Redis", "1: imports redis; only rq_ceylon/store does"),
        ("store/codec.py", "import json\nimport pickle", "2: imports pickle; data is JSON only"),
        ("goals.py", "x = 1\ny = eval('x')", "2: calls eval"),
        ("goals.py", "import builtins\nbuiltins.exec('')", "2: calls exec"),
        ("goals.py", "run = exec", "1: calls exec"),
    ],
)
def test_what_breaks_the_house_is_named_with_its_line(name: str, text: str, offence: str, tmp_path: Path) -> None:
    targets = ["errors", "models", "settings", "graph", "goals", "handlers", "client", "monitor", "app", "testing"]
    build(tmp_path, {**{f"{target}.py": "" for target in targets}, name: text})

    assert offences(tmp_path) == [f"rq_ceylon/{name}:{offence}"]


def test_a_circle_in_a_subpackage_is_named_once_with_all_its_lines(tmp_path: Path) -> None:
    build(
        tmp_path,
        {
            "store/__init__.py": "",
            "store/a.py": "\nfrom rq_ceylon.store import b, keys",
            "store/b.py": "def f() -> None:\n    from rq_ceylon.store.c import x",
            "store/c.py": "from .a import x",
            "store/keys.py": "",
            "worker/__init__.py": "from rq_ceylon.worker.loop import x",
            "worker/loop.py": "import rq_ceylon.worker",
        },
    )

    assert offences(tmp_path) == [
        "rq_ceylon/store/a.py:2, rq_ceylon/store/b.py:2, rq_ceylon/store/c.py:1: import in a circle: "
        "rq_ceylon.store.a -> rq_ceylon.store.b -> rq_ceylon.store.c -> rq_ceylon.store.a",
        "rq_ceylon/worker/__init__.py:1, rq_ceylon/worker/loop.py:1: import in a circle: "
        "rq_ceylon.worker -> rq_ceylon.worker.loop -> rq_ceylon.worker",
    ]


def test_a_house_in_order_has_no_offences(tmp_path: Path) -> None:
    """Every step that is allowed; and names that only look like offences."""
    build(
        tmp_path,
        {
            "__init__.py": "from rq_ceylon.app import Ceylon\nfrom rq_ceylon import cli",
            "errors.py": "import json",
            "models.py": "from rq_ceylon.errors import x",
            "settings.py": "from rq_ceylon import errors, models",
            "graph.py": "from rq_ceylon.models import x",
            "goals.py": "from .models import x",
            "groupfile.py": "from rq_ceylon import errors, goals, graph, models",
            "values.py": "import json",
            "attempt.py": "from rq_ceylon.models import x",
            "handlers.py": "from rq_ceylon import attempt, errors, models, values",
            "store/__init__.py": "",
            "store/keys.py": "from rq_ceylon.settings import x",
            "store/connection.py": "import redis.asyncio\nfrom . import keys\nclient.eval('return 1')",
            "maintenance.py": "from rq_ceylon.store import connection",
            "client.py": "from rq_ceylon import __version__\nfrom rq_ceylon.maintenance import x",
            "worker/__init__.py": "from rq_ceylon.worker.loop import x",
            "worker/loop.py": "import pickletools\nfrom rq_ceylon.store import keys",
            "app.py": "import rq_ceylon.client\nfrom rq_ceylon.worker.loop import x",
            "task/__init__.py": "from rq_ceylon.app import x",
            "cli/__init__.py": "import rq_ceylon.cli.demo, rq_ceylon.monitor",
            "cli/demo.py": "from rq_ceylon.errors import x",
            "monitor.py": "",
        },
    )

    assert offences(tmp_path) == []
