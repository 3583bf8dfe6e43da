"""Completion and checking survive `@app.task`."""

from __future__ import annotations

from pathlib import Path

from commands import ROOT
from mypy import api

CASES = Path(__file__).with_name("typing_cases.py")


MYPY = ["--strict", f"--config-file={ROOT / 'pyproject.toml'}", f"--cache-dir={ROOT / '.mypy_cache'}"]
"""As scripts/test calls it, so that what the cases import is not checked again."""


def test_a_type_checker_sees_through_the_decorator() -> None:
    """Results and handles have the handler's types, and exactly the calls marked as wrong are refused."""
    said, trouble, status = api.run([*MYPY, str(CASES)])

    assert (said, trouble, status) == ("Success: no issues found in 1 source file\n", "", 0)


def test_a_wrong_call_that_is_not_marked_is_found(tmp_path: Path) -> None:
    """The cases would notice: without its mark every wrong call is an error."""
    bare = tmp_path / "bare_cases.py"
    text = CASES.read_text()
    bare.write_text(text.replace("# type: ignore[", "# was: ["))

    said, _, _ = api.run([*MYPY, str(bare)])

    assert said.count(": error: ") == text.count("# type: ignore[")
