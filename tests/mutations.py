"""
Breaks one rule of the protocol at a time, in a copy of the tree: some test must notice. `scripts/mutate [WORD…]` runs
those whose name contains a word.

A mutation that does not apply exactly once is an error, and so is one that only makes the code unreadable. The tests of
the protocol come first, then seeds of the simulator.
"""

from __future__ import annotations

import os
import re
import shutil
import sys
import tempfile
from pathlib import Path
from typing import NamedTuple

from commands import ROOT, run_to_end

TESTS = [
    f"tests/test_{name}.py"
    for name in (
        "protocol",
        "retry",
        "open_groups",
        "spawn",
        "dependencies",
        "follow_ups",
        "max_running",
        "maintenance",
        "goals_lua",
        "turn",
        "model",
    )
]
SEEDS, LOSSY_SEEDS = "1-6", "101-106"
UNREADABLE = re.compile(r"Error compiling script|SyntaxError|ImportError|ModuleNotFoundError|errors? during collection")


class Edit(NamedTuple):
    """In this file of the package, these lines, or parts of them, become those."""

    file: str
    old: list[str]
    new: list[str]


def mutations() -> dict[str, list[Edit]]:
    """The mutations of `mutations.txt`: `# name`, then per edit a file, its `- ` lines and the new `+ ` lines."""
    found: dict[str, list[Edit]] = {}
    edits: list[Edit] = []
    for line in Path(__file__).with_suffix(".txt").read_text().splitlines():
        match line[:2]:
            case "# ":
                edits = found.setdefault(line[2:], [])
            case "- ":
                edits[-1].old.append(line[2:])
            case "+ ":
                edits[-1].new.append(line[2:])
            case "##" | "":
                pass
            case _:
                edits.append(Edit(line, [], []))
    return found


class Tree:
    """A copy of the tree, with one mutation at a time."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        ignored = shutil.ignore_patterns("__pycache__", ".*_cache")
        for name in ("rq_ceylon", "tests"):
            shutil.copytree(ROOT / name, folder / name, ignore=ignored)
        shutil.copy(ROOT / "pyproject.toml", folder)

    def applied(self, edits: list[Edit]) -> dict[Path, str]:
        """Apply edits; returns the texts to put back."""
        before: dict[Path, str] = {}
        for edit in edits:
            path = self.folder / "rq_ceylon" / edit.file
            text = path.read_text()
            before.setdefault(path, text)
            old = "\n".join(edit.old)
            if text.count(old) != 1:
                raise LookupError(f"{edit.file} holds {text.count(old)} times: {old}")
            path.write_text(text.replace(old, "\n".join(edit.new)))
        return before

    def killer(self) -> str | None:
        """The test or seed that fails, None if all pass."""
        code, output = self._run("-m", "pytest", "-x", "-q", "-p", "no:cacheprovider", *TESTS)
        if code:
            found = re.search(r"^(?:FAILED|ERROR) \S+?::(\S+)", output, re.MULTILINE)
            if code != 1 or not found or UNREADABLE.search(output):
                raise SyntaxError(output[-2000:])
            return found[1]
        for seeds, flags in ((SEEDS, []), (LOSSY_SEEDS, ["--loss"])):
            code, output = self._run("tests/simulate.py", "--first", "--seeds", seeds, *flags)
            if UNREADABLE.search(output):
                raise SyntaxError(output[-2000:])
            if code:
                found = re.search(r"^seed (\d+): VIOLATED[^\n]*\n +([^\n]{1,90})", output, re.MULTILINE)
                return (
                    f"seed {found[1]}{' with loss' if flags else ''}: {found[2]}"
                    if found
                    else f"simulator: {output[-300:]}"
                )
        return None

    def _run(self, *words: str) -> tuple[int, str]:
        environ = {**os.environ, "PYTHONPATH": str(self.folder), "PYTHONDONTWRITEBYTECODE": "1"}
        environ["PATH"] = os.devnull  # no second engine: the rules are the same
        done = run_to_end(sys.executable, *words, folder=self.folder, environ=environ, limit_s=600, in_one_stream=True)
        return done.returncode, done.stdout


def main() -> None:
    known = mutations()
    wanted = [name for name in known if not sys.argv[1:] or any(word in name for word in sys.argv[1:])]
    survived = []
    with tempfile.TemporaryDirectory(prefix="ceylon-mutate-") as folder:
        tree = Tree(Path(folder))
        for name in wanted:  # an edit that does not apply is known before anything runs
            for path, text in tree.applied(known[name]).items():
                path.write_text(text)
        if (killed := tree.killer()) is not None:
            sys.exit(f"the unmutated tree fails: {killed}")
        print("the unmutated tree passes", flush=True)
        for name in wanted:
            before = tree.applied(known[name])
            killed = tree.killer()
            for path, text in before.items():
                path.write_text(text)
            print(f"{'killed  ' if killed else 'SURVIVED'} {name}" + (f": {killed}" if killed else ""), flush=True)
            if killed is None:
                survived.append(name)
    print(f"{len(wanted) - len(survived)} of {len(wanted)} killed")
    sys.exit(bool(survived))


if __name__ == "__main__":
    main()
