"""
The documentation says what the code does: every command and snippet in it is run, and every link leads somewhere.

In a page, a block whose first line is a comment with a file name is saved under it for the commands of that page.
"""

from __future__ import annotations

import ast
import re
import shutil
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest
from commands import ROOT, Commands, commands_on, run_to_end
from snippets import Shell, Step, steps

from rq_ceylon import groupfile

PAGES = [
    *(path.relative_to(ROOT).as_posix() for path in [*sorted(ROOT.glob("*.md")), ROOT / "examples" / "README.md"]),
    *(path.relative_to(ROOT).as_posix() for path in sorted((ROOT / "docs").rglob("*.md"))),
]

FROM_NOTHING = ("README.md", "docs/getting-started.md")
"""Pages that start a server themselves; the commands of all others find one."""

NETWORK = "needs the network; tests/test_packaging.py installs the package"
NOT_RUN = {
    ("README.md", "./scripts/demo"): "CI runs it as it is, .ci/run",
    ("README.md", "./scripts/demo --chaos"): "tests/test_chaos.py runs it, shorter",
    ("README.md", "./scripts/test"): "this very run",
    ("README.md", "python3 -m venv .venv && . .venv/bin/activate"): NETWORK,
    ("README.md", "pip install '.[embedded]'"): NETWORK,
    ("CONTRIBUTING.md", "./scripts/test"): "this very run",
    ("CONTRIBUTING.md", "./scripts/test tests/test_goals.py -k deadline"): "a part of this very run",
    ("CONTRIBUTING.md", "python -m docs.generate"): "would write; a test below runs it with --check",
    ("CONTRIBUTING.md", "python -m benchmarks"): "tests/test_benchmarks.py runs it, shorter",
    ("docs/benchmarks.md", "python -m benchmarks"): "tests/test_benchmarks.py runs it, shorter",
    ("docs/benchmarks.md", "python -m benchmarks --peers"): NETWORK,
    ("docs/benchmarks.md", "python -m benchmarks --peers arq celery"): NETWORK,
    ("docs/getting-started.md", "mkdir pages && cd pages"): "the test has a folder",
    ("docs/getting-started.md", "python3 -m venv .venv && . .venv/bin/activate"): NETWORK,
    ("docs/getting-started.md", "pip install '/path/to/rq_ceylon[embedded]'"): NETWORK,
    (
        "docs/getting-started.md",
        "pip install 'rq-ceylon[embedded] @ git+https://git.example.com/rq_ceylon.git'",
    ): NETWORK,
    ("docs/tutorial.md", "pip install '.[embedded]'"): NETWORK,
    ("docs/tutorial.md", "python examples/tutorial.py"): "tests/test_playground.py runs the text itself",
    ("docs/tutorial.md", "ceylon server &"): "the same, on a server of the test's own",
    ("docs/tutorial.md", "ceylon-worker --role processor -c 2 &"): "the same, with two worker processes",
    ("docs/tutorial.md", "python"): "one program in pieces; tests/test_playground.py runs it",
}
"""Commands, and kinds of blocks, that are not run, and why."""

ENDS_WITH = {
    ("docs/group-file.md", "ceylon validate group.yaml"): 2,
    ("docs/batches.md", 'ceylon retry --error "server is busy" --dry-run'): 1,  # there is none here
}
"""Exit codes other than 0."""

SHOWN = {"text", "mermaid", "ini", "lua"}
"""Kinds of blocks that are looked at only."""

TASKS = "name: n\ntasks: {a: , b: , c: , d: , e: , f: }\n"


@dataclass
class Block:
    kind: str
    text: str

    @property
    def name(self) -> str:
        """The file that it is, if it says so."""
        found = re.match(r"# ([\w.-]+\.(py|ya?ml))\n", self.text)
        return found[1] if found else ""


def blocks(page: str) -> list[Block]:
    found = re.findall(r"^```([^\n]*)\n(.*?)^```$", (ROOT / page).read_text(), re.DOTALL | re.MULTILINE)
    return [Block(kind, text) for kind, text in found]


def told(page: str) -> list[Step]:
    """The commands of a page that are run here."""
    consoles = [block for block in blocks(page) if block.kind == "console"]
    return [step for block in consoles for step in steps(block.text) if (page, step.command) not in NOT_RUN]


def saved(page: str, folder: Path) -> Path:
    """The files that a page speaks of."""
    shutil.copytree(ROOT / "examples", folder / "examples")
    for block in blocks(page):
        if block.name:
            (folder / block.name).write_text(block.text)
    return folder


def run(page: str, commands: Commands) -> None:
    saved(page, commands.folder)
    shell = Shell(commands)
    for step in told(page):
        shell.run(step, code=ENDS_WITH.get((page, step.command), 0))


# ---- blocks ----------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("page", [page for page in PAGES if page not in FROM_NOTHING and told(page)])
def test_the_commands_of_a_page_print_what_it_says(page: str, redis_url: str, tmp_path: Path) -> None:
    with commands_on(redis_url, tmp_path) as commands:
        run(page, commands)


@pytest.mark.long
@pytest.mark.parametrize("page", FROM_NOTHING)
def test_the_first_pages_work_where_nothing_is_configured(
    page: str, short_tmp_path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CEYLON_SERVER_DIR", str(short_tmp_path))  # in place of this user's own
    with commands_on("", tmp_path) as commands:
        run(page, commands)


@pytest.mark.parametrize("page", [page for page in PAGES if any(block.kind == "python" for block in blocks(page))])
def test_the_python_of_a_page_runs(page: str, redis_url: str, tmp_path: Path) -> None:
    if (page, "python") in NOT_RUN:
        return
    with commands_on(redis_url, tmp_path) as commands:
        for number, block in enumerate(block for block in blocks(page) if block.kind == "python"):
            if block.name:
                assert [step for step in told(page) if block.name.removesuffix(".py") in step.command], block.name
                continue
            path = tmp_path / f"block{number}.py"
            path.write_text(block.text)
            Shell(commands).run(Step(f"python {path.name}", []))


@pytest.mark.parametrize("page", PAGES)
def test_the_yaml_of_a_page_is_valid(page: str) -> None:
    for block in blocks(page):
        if block.kind == "yaml":
            is_group = re.search(r"^name:", block.text, re.MULTILINE)
            assert groupfile.load(block.text if is_group else TASKS + block.text, page)


@pytest.mark.parametrize("page", PAGES)
def test_every_block_of_a_page_is_of_a_kind_that_is_checked_or_only_shown(page: str) -> None:
    assert {block.kind for block in blocks(page)} <= {"console", "python", "yaml", "yaml invalid", *SHOWN}
    outside = re.sub(r"^```.*?^```$", "", (ROOT / page).read_text(), flags=re.DOTALL | re.MULTILINE)
    assert not re.findall(r"^ {4}(?:\$|\./|ceylon|python|pip|docker) .*", outside, re.MULTILINE), (
        "put it into a console block"
    )


def test_what_is_not_run_is_there_with_a_reason() -> None:
    for page, what in NOT_RUN:
        known = {step.command for block in blocks(page) for step in steps(block.text)}
        assert what in known | {block.kind for block in blocks(page)}, f"{page}: {what}"
    assert all(NOT_RUN.values())


# ---- what is said twice ----------------------------------------------------------------------------------------------
def test_the_quickstart_is_the_program_of_the_readme() -> None:
    (block,) = [block for block in blocks("README.md") if block.kind == "python"]
    example = ast.parse((ROOT / "examples" / "quickstart.py").read_text())

    example.body = example.body[1:]  # its docstring
    assert ast.unparse(ast.parse(block.text)) == ast.unparse(example)


def test_the_readme_names_every_command() -> None:
    pages = {page: (ROOT / page).read_text() for page in ("README.md", "docs/commands.md")}

    for command in re.findall(r"^## (.*)$", pages["docs/commands.md"], re.MULTILINE):
        assert f"`{command}" in pages["README.md"], f"README.md does not name {command}"


def test_the_messages_that_getting_started_explains_are_those_of_the_code() -> None:
    code = "".join(path.read_text() for path in sorted((ROOT / "rq_ceylon").rglob("*.py")))
    messages = re.findall(r"^- `([^`]+)`:", (ROOT / "docs" / "getting-started.md").read_text(), re.MULTILINE)

    assert len(messages) == 6
    for message in messages:
        words = re.split(r" *(?:['…]|: )", message.removeprefix("Still waiting: "))[0]  # up to what is filled in
        assert words in code, message


def test_the_generated_pages_are_what_the_code_says() -> None:
    checked = run_to_end(sys.executable, "-m", "docs.generate", "--check", folder=ROOT)

    assert checked.returncode == 0, checked.stdout + checked.stderr


# ---- links -----------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("page", PAGES)
def test_the_links_of_a_page_lead_somewhere(page: str) -> None:
    for link in re.findall(r"\]\(([^)\s]+)\)", (ROOT / page).read_text()):
        if not re.match(r"[a-z]+:", link):
            target = ((ROOT / page).parent / link.partition("#")[0]).resolve()
            assert target.exists(), link
            assert target.is_relative_to(ROOT), link


@pytest.mark.parametrize(("folder", "pattern"), [("docs", "*.md"), ("examples", "*.*")])
def test_every_page_and_every_example_is_in_the_index(folder: str, pattern: str) -> None:
    index = (ROOT / folder / "README.md").read_text()

    for path in (ROOT / folder).glob(pattern):
        assert path.name == "README.md" or f"({path.name})" in index, path.name
