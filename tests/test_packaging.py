"""What is installed: the wheel has all that the package needs, and its door opens to every name it promises."""

from __future__ import annotations

import ast
import sys
import zipfile
from collections.abc import Sequence
from pathlib import Path

import pytest
from commands import ROOT, run_to_end

import rq_ceylon
from rq_ceylon.store.scripts import GROUP_SCRIPTS, ROLE_SCRIPTS

PACKAGE = ROOT / "rq_ceylon"

LOAD_ALL = """
import pathlib, sys
import rq_ceylon
from rq_ceylon.store import scripts
assert pathlib.Path(rq_ceylon.__file__).is_relative_to(sys.argv[1]), rq_ceylon.__file__
for name in rq_ceylon.__all__:
    assert getattr(rq_ceylon, name) is not None
for script in scripts.GROUP_SCRIPTS + scripts.ROLE_SCRIPTS:
    assert "local" in scripts.source(script), script
print(len(rq_ceylon.__all__))
"""


def run(command: Sequence[str], folder: Path) -> str:
    ended = run_to_end(*command, folder=folder, limit_s=90)
    assert ended.returncode == 0, ended.stdout + ended.stderr
    return ended.stdout


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The wheel, built without the network from what is here."""
    folder = tmp_path_factory.mktemp("wheel")
    run([sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", str(folder), str(ROOT)], folder)
    (built,) = folder.glob("*.whl")
    return built


def names_in(wheel: Path) -> set[str]:
    with zipfile.ZipFile(wheel) as opened:
        return set(opened.namelist())


def test_the_wheel_has_every_file_of_the_package_and_nothing_else(wheel: Path) -> None:
    files = {path.relative_to(ROOT).as_posix() for path in PACKAGE.rglob("*") if path.is_file()}
    files = {name for name in files if "__pycache__" not in name}

    packed = {name for name in names_in(wheel) if ".dist-info/" not in name}

    assert packed == files
    assert "rq_ceylon/py.typed" in packed
    for script in ("prelude", "group_tail", "role", *GROUP_SCRIPTS, *ROLE_SCRIPTS):
        assert f"rq_ceylon/store/lua/{script}.lua" in packed


def test_the_wheel_has_its_licence_and_its_commands(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as opened:
        (place,) = [name for name in opened.namelist() if name.endswith("entry_points.txt")]
        commands = opened.read(place).decode()

    assert any(name.endswith("/licenses/LICENSE") for name in names_in(wheel))
    for line in ("ceylon = ", "ceylon-worker = ", "ceylon-submit = ", "ceylon-monitor = "):
        assert line + "rq_ceylon.cli:" in commands


def test_an_installed_wheel_loads_every_name_and_script_outside_the_repository(wheel: Path, tmp_path: Path) -> None:
    target, elsewhere = tmp_path / "installed", tmp_path / "elsewhere"
    elsewhere.mkdir()
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "install", "--quiet", "--no-deps", "--no-index"]
    run([*pip, "--no-compile", "--target", str(target), str(wheel)], elsewhere)

    # Not PYTHONPATH: in front of whatever the environment has installed already.
    script = f"import sys; sys.path.insert(0, {str(target)!r})\n{LOAD_ALL}"
    said = run([sys.executable, "-W", "error", "-c", script, str(target)], elsewhere)

    assert int(said) == len(rq_ceylon.__all__)


def test_every_promised_name_resolves_and_no_other() -> None:
    for name in rq_ceylon.__all__:
        assert getattr(rq_ceylon, name).__name__ == name
    with pytest.raises(AttributeError, match="Monitors"):
        _ = rq_ceylon.Monitors


def test_type_checkers_see_the_same_names_at_the_same_places() -> None:
    tree = ast.parse((PACKAGE / "__init__.py").read_text())
    (block,) = [node for node in tree.body if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING"]
    seen = {
        alias.name: node.module
        for node in block.body
        if isinstance(node, ast.ImportFrom) and node.module
        for alias in node.names
    }

    assert sorted(seen) == sorted(rq_ceylon.__all__)
    assert len(set(rq_ceylon.__all__)) == len(rq_ceylon.__all__)
    for name, module in seen.items():
        assert getattr(rq_ceylon, name) is getattr(sys.modules[module], name)


def test_reading_the_door_alone_loads_neither_redis_nor_pydantic() -> None:
    script = "import sys, rq_ceylon; assert not {'redis', 'pydantic', 'pydantic_core', 'yaml'} & set(sys.modules)"

    run([sys.executable, "-c", script], ROOT)
