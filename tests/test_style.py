"""No function, and no name of a test, is longer than a reader keeps in mind."""

from __future__ import annotations

import ast
import io
import tokenize
from collections.abc import Iterator
from pathlib import Path

PACKAGE = Path(__file__).parent.parent / "rq_ceylon"

FUNCTION_LINES_MAX = 60
"""Lines of code in the body: no comments, docstrings or blank lines, and not the signature."""

TEST_NAME_MAX = 80

_NO_CODE = {tokenize.COMMENT, tokenize.NL, tokenize.NEWLINE, tokenize.INDENT, tokenize.DEDENT, tokenize.ENDMARKER}


def long_functions(source: str) -> Iterator[str]:
    """Each function that has more lines of code than allowed, as `name: lines`."""
    lines: set[int] = set()
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type not in _NO_CODE:
            lines.update(range(token.start[0], token.end[0] + 1))
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            text = node.body[0] if ast.get_docstring(node) is not None else None
            said = set(range(text.lineno, (text.end_lineno or 0) + 1)) if text else set()
            count = len(lines & set(range(node.body[0].lineno, (node.end_lineno or 0) + 1)) - said)
            if count > FUNCTION_LINES_MAX:
                yield f"{node.name}: {count}"


def test_no_function_is_long() -> None:
    found = [f"{path.name}: {one}" for path in PACKAGE.rglob("*.py") for one in long_functions(path.read_text())]

    assert not found, "\n".join(found)


def test_a_long_function_is_named_with_its_lines() -> None:
    body = "".join(f"    x = {number}\n\n    # no code\n" for number in range(FUNCTION_LINES_MAX + 1))

    assert list(long_functions(f'def f(\n):\n    """\n    Text.\n    """\n{body}')) == ["f: 61"]
    assert list(long_functions(f"def f():\n{body}".replace("    x = 0\n", ""))) == []


def test_the_name_of_a_test_is_short() -> None:
    names = [
        node.name
        for path in Path(__file__).parent.glob("test_*.py")
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef) and node.name.startswith("test_")
    ]

    assert len(names) > 900
    assert [name for name in names if len(name) >= TEST_NAME_MAX] == []
