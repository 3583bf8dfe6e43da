"""
The rule for a program that is a script: what it does stands below `if __name__ == "__main__":`.

A child process of `cpu=True` tasks imports the script to find its functions. Without that line the import runs the
program again.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from rq_ceylon.errors import AppImportError, CeylonError, error_at

GUARD = 'if __name__ == "__main__":'

_loading: list[str] = []


@contextmanager
def loading(path: str) -> Iterator[None]:
    """
    The block imports the script, and finds functions in it.

    Raises:
        AppImportError: whatever the block raised; it names the guard.
    """
    _loading.append(path)
    try:
        yield
    except (Exception, SystemExit) as error:
        raise AppImportError(
            f"{path} cannot be imported into a child process, which runs its functions: {error_at(error)}; "
            f"put what the script does below the line `{GUARD}`, and its tasks above it"
        ) from error
    finally:
        _loading.pop()


def refuse_while_loading(what: str) -> None:
    """
    Raises:
        CeylonError: a child process is importing the script, so this is its program that runs again.
    """
    if _loading:
        raise CeylonError(f"a child process imports {_loading[-1]} and may not {what}: `{GUARD}` is missing above this")
