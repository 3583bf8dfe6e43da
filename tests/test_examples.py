"""Every example runs as its first lines say, and prints what they say."""

from __future__ import annotations

import re
import shutil
import textwrap
from pathlib import Path

import pytest
from commands import ROOT, Commands
from snippets import Shell, steps

EXAMPLES = sorted(path for path in (ROOT / "examples").iterdir() if path.is_file() and path.suffix in (".py", ".yaml"))
ELSEWHERE = {
    "tutorial.py": "tests/test_playground.py",
    "data_processing.yaml": "README.md",
    "quickstart.py": "README.md",
}
"""What runs an example that is not run here; tests/test_docs.py runs the README."""


def head(path: Path) -> str:
    """The docstring, or the comment at the top of a YAML file."""
    text = path.read_text()
    if path.suffix == ".py":
        return text.split('"""')[1]
    comment = re.match(r"(#.*\n)*", text)
    assert comment is not None
    return re.sub(r"^# ?", "", comment[0], flags=re.M)


@pytest.mark.parametrize("path", [path for path in EXAMPLES if path.name not in ELSEWHERE], ids=lambda path: path.name)
def test_an_example_prints_what_it_says(path: Path, commands: Commands) -> None:
    shutil.copy(path, commands.folder)
    shell = Shell(commands)
    told = steps("\n".join(re.findall(r"^ {4}(.*)$", textwrap.dedent(head(path)), re.M)))

    assert len(told) >= 2
    assert told[-1].printed
    for step in told:
        shell.run(step)


def test_the_other_examples_are_run_elsewhere() -> None:
    for name, runner in ELSEWHERE.items():
        assert name in (ROOT / runner).read_text(), f"{runner} does not run {name}"
