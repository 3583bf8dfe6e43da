"""
Every error that rq_ceylon raises on purpose. Each message names what was wrong, the value, and what to do about it;
`exit_code` is what a command ends with when the error reaches it.
"""

from __future__ import annotations

import traceback
from collections.abc import Callable, Iterable, Sequence
from difflib import get_close_matches
from itertools import islice
from pathlib import Path
from typing import Any, cast

_PACKAGE = str(Path(__file__).parent)


def guess(word: object, options: Iterable[str], otherwise: str = "", ask: str = 'did you mean "{}"?') -> str:
    """The remedy for an unknown word: the option nearest to it, or `otherwise` if none is near."""
    known = list(islice(options, 5000))  # each takes about 10 µs
    forms = dict.fromkeys((word[:64], word[:64].lower())) if isinstance(word, str) else ()
    near = next((found for form in forms for found in get_close_matches(form, known, 1)), None)
    return otherwise if near is None else ask.format(near)


def shown(what: str, text: Callable[[], str]) -> str:
    """
    Text that users' code gives, such as the message of an exception, as Unicode. It never raises: what cannot be shown
    is replaced by words that say so, since what comes after it (an outcome, a line of the log) must not be lost.
    """
    try:
        return str.encode(text(), errors="replace").decode()
    except BaseException as problem:  # also a SystemExit of a `__str__`
        return f"({what} cannot be shown: {type(problem).__name__})"


def error_at(error: BaseException) -> str:
    """An exception of users' code in one line: its type, its message, and the innermost line that is not ours."""
    frames = traceback.extract_tb(error.__traceback__)
    own = [frame for frame in frames if "importlib" not in frame.filename and not frame.filename.startswith(_PACKAGE)]
    at = f" (at {own[-1].filename}:{own[-1].lineno}: {own[-1].line})" if own else ""
    return f"{type(error).__name__}: {shown('its message', lambda: str(error))}{at}"


class Portable:
    """
    Lets an exception survive copying and pickling (by process pools, for example). It is rebuilt from its `args` and
    attributes, not by calling its `__init__`, whose parameters differ.
    """

    def __reduce__(self) -> tuple[Any, ...]:
        return _made_again, (type(self), cast(BaseException, self).args), vars(self).copy()


def _made_again(kind: type[BaseException], args: tuple[Any, ...]) -> BaseException:
    return kind.__new__(kind, *args)


class CeylonError(Portable, Exception):
    """Base of all errors of this package."""

    exit_code = 1


class InvalidInputError(CeylonError, ValueError):
    """A given value cannot be used. Nothing was written."""

    exit_code = 2


class PayloadTooLargeError(InvalidInputError):
    """The arguments of a task, or its result, are larger than the limit (1 MiB by default)."""


class GoalImpossibleError(InvalidInputError):
    """A goal could hold in no outcome of its group, so the group was refused. Nothing is kept of it."""


class GroupExistsError(InvalidInputError):
    """The same `key` was submitted before with other content."""


class NotFoundError(InvalidInputError):
    """No group or task with this id is known: it was never submitted, or it was pruned after its retention."""


class GroupFileError(InvalidInputError):
    """A group file is not valid. `problems` holds one line per problem, `file:line:column: where: what; remedy`."""

    def __init__(self, problems: Sequence[str]) -> None:
        super().__init__("\n".join(problems))
        self.problems = list(problems)


class RedisError(CeylonError):
    """Redis is not configured, not reachable, refuses us, or is not suitable."""

    exit_code = 3


class ConnectionLostError(RedisError):
    """Redis did not answer, so it is unknown whether the call took effect; repeating it is safe."""


class QueueFullError(RedisError):
    """Redis is at its memory limit and takes no new tasks. Queued tasks go on and free memory; submit again later."""


class RecordError(RedisError):
    """A record in Redis cannot be read: a newer version of rq-ceylon wrote it, or another program did."""


class DurabilityError(RedisError):
    """
    A submission is not as durable as requested. If `id` is empty, the server cannot provide this durability, and
    nothing was written. Otherwise the group or task of that id was accepted and runs, but a crash of Redis may still
    lose it.
    """

    def __init__(self, message: str, id: str = "") -> None:
        super().__init__(message)
        self.id = id


class AppImportError(CeylonError):
    """The application named on the command line cannot be imported, or is not one."""

    exit_code = 4


class UnknownTaskError(InvalidInputError):
    """No task is registered under this name."""

    exit_code = 4


class WaitTimeoutError(CeylonError, TimeoutError):
    """The task or group did not get that far within the given time. It goes on all the same."""

    exit_code = 5


class NoWorkerError(CeylonError):
    """No live worker serves a role that the tasks need."""

    exit_code = 6


class TaskFailedError(CeylonError):
    """The awaited task failed. `error_type`, `error_message` and `traceback` are those of the worker, as text."""

    def __init__(
        self, task_id: str, reason: str, *, error_type: str = "", error_message: str = "", traceback: str = ""
    ) -> None:
        what = f"{error_type}: {error_message}" if error_type else error_message
        super().__init__(f"task {task_id} failed ({reason}){': ' + what if what else ''}")
        self.task_id, self.reason = task_id, reason
        self.error_type, self.error_message, self.traceback = error_type, error_message, traceback
        if traceback:
            self.add_note("Remote traceback:\n" + traceback.rstrip())


class TaskCancelledError(CeylonError):
    """The awaited task was cancelled, so it has no result. `reason` is closed, cancelled, expired or skipped."""

    def __init__(self, task_id: str, reason: str) -> None:
        super().__init__(f"task {task_id} was cancelled ({reason})")
        self.task_id, self.reason = task_id, reason
