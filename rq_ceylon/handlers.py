"""
What a task's name stands for: the registered functions with their rules, their arguments and results as JSON, and what
a function may know about the attempt it runs in. Nothing here runs a task or knows Redis.
"""

from __future__ import annotations

import asyncio
import inspect
import math
import random
import reprlib
import sys
import time
from collections.abc import Awaitable, Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from difflib import get_close_matches
from functools import cached_property, partial
from types import NoneType, SimpleNamespace
from typing import TYPE_CHECKING, Any, Generic, Literal, NamedTuple, ParamSpec, TypeVar, cast, get_args, get_type_hints

from loguru import logger
from pydantic_core import PydanticSerializationError, ValidationError, to_json, to_jsonable_python

from rq_ceylon.errors import InvalidInputError, UnknownTaskError
from rq_ceylon.models import DEFAULT_ROLE, Duration, GroupView, Priority, check_id, seconds

if TYPE_CHECKING:
    from loguru import Logger
    from pydantic import TypeAdapter

P = ParamSpec("P")
R = TypeVar("R")

StopReason = Literal["cancelled", "lost", "shutdown", "timeout"]
GoalCheck = Callable[[GroupView], bool | Awaitable[bool | None] | None]

DEFAULT_HANDLER = "default"
"""What runs a task that names no handler."""


@dataclass(frozen=True)
class Backoff:
    """
    How long to wait before the next attempt: `min(cap, first * factor ** (attempt - 1))`; with jitter a uniform choice
    between half of that and all of it. Tasks that failed together then come back spread out, which the server that
    failed them needs; and still none comes back at once, as it may when the choice starts at zero.
    """

    first: Duration = "1s"
    factor: float = 2.0
    cap: Duration = "10m"
    jitter: bool = True

    def __post_init__(self) -> None:
        seconds(self.first, "backoff: first")
        seconds(self.cap, "backoff: cap")
        if not isinstance(self.factor, int | float) or not math.isfinite(self.factor) or self.factor < 1:
            raise InvalidInputError(f"backoff: factor: {self.factor!r} is not usable; give a number from 1 on")

    def delay_s(self, attempt: int) -> float:
        """
        The wait after attempt 1, 2, ... failed.
        """
        cap = seconds(self.cap, "backoff: cap")
        try:
            delay = min(cap, seconds(self.first, "backoff: first") * self.factor ** (attempt - 1))
        except OverflowError:
            delay = cap
        return random.uniform(delay / 2, delay) if self.jitter else delay


class RetryTask(Exception):
    """
    Raised by a handler: try again, after `delay` if given, else after the handler's backoff, while attempts are left.
    """

    def __init__(self, delay: Duration | None = None, reason: str = "") -> None:
        super().__init__(reason)
        self.delay_s = None if delay is None else seconds(delay, "RetryTask: delay")
        self.reason = reason


class FailTask(Exception):
    """
    Raised by a handler: the task has failed, and another attempt would not help.
    """

    def __init__(self, reason: str) -> None:
        super().__init__(reason)
        self.reason = reason


class AttemptStoppedError(BaseException):
    """
    Raised by `TaskContext.check_cancelled`. Not an `Exception`, so that a handler's `except Exception` lets it through.
    """


@dataclass(kw_only=True, eq=False)
class TaskContext:
    """
    What a handler may know about the attempt it runs in: it gets one for a parameter annotated `TaskContext`.
    May be used from any thread.

    Attributes:
        uses: the name that the task asked for.
        attempt: 1 for the first. `crashes` counts workers that died under the task; they spend no attempt.
        fence: grows with every delivery of a task, so an external store can refuse whoever shows an older one.
        duration: expected run time in seconds, 0 if the task gave none.
        needs: results of the tasks that this one needed, by their ids.
        deadline: when this attempt times out, as `time.monotonic()` tells it.
        reported: what `progress` last said: the fraction, if any, and the message.
        stopped: why the attempt is over although its handler still runs; set by the worker.
    """

    group_id: str
    task_id: str
    uses: str
    role: str
    worker: str
    attempt: int
    max_attempts: int
    crashes: int
    fence: int
    duration: float = 0.0
    metadata: Mapping[str, Any] = field(default_factory=dict)
    needs: Mapping[str, Any] = field(default_factory=dict)
    deadline: float = math.inf
    reported: tuple[float | None, str] = field(init=False, default=(None, ""))
    stopped: StopReason | None = field(init=False, default=None)

    @property
    def id(self) -> str:
        return f"{self.group_id}/{self.task_id}"

    @property
    def idempotency_key(self) -> str:
        """
        The same for every attempt of the task, and for no other task.
        """
        return self.id

    @property
    def log(self) -> Logger:
        return logger.bind(task=self.task_id, group=self.group_id, attempt=self.attempt)

    def progress(self, fraction: float | None = None, message: str = "") -> None:
        """
        Say how far the attempt is: from 0 to 1 (what is outside is moved to the nearer end), None for as before.
        Kept in `reported` for as long as the attempt runs, never stored.
        """
        known = self.reported[0] if fraction is None else min(max(float(fraction), 0.0), 1.0)
        self.reported = (known, message[:200])

    @property
    def is_cancelled(self) -> bool:
        """
        Whether this attempt was cancelled, lost to another worker, or timed out: what it does now counts for nothing.
        """
        return self.stopped is not None or time.monotonic() >= self.deadline

    def check_cancelled(self) -> None:
        """
        End the handler here if the attempt is over. For plain functions, whose thread nobody can stop, and long loops.
        """
        if self.is_cancelled:
            raise AttemptStoppedError(f"task {self.id}: this attempt is over ({self.stopped or 'timeout'})")


class Handler(Generic[P, R]):
    """
    One registered function and its rules. What is None is decided by the package's defaults.

    Attributes:
        kind: async: a coroutine function, on the event loop; thread: a plain function; process: the same with cpu=True.
        backoff: the wait between attempts, for exceptions that `retry` does not name.
        retry: for an exception type another backoff, or None: fail at once. The most specific type decides.

    Raises:
        InvalidInputError: the function cannot be called by name from JSON, or a rule cannot be used.
    """

    def __init__(
        self,
        name: str,
        function: Callable[P, R | Awaitable[R]],
        *,
        aliases: Sequence[str] = (),
        role: str | None = None,
        timeout_s: float | None = None,
        max_attempts: int | None = None,
        priority: str | None = None,
        backoff: Backoff | None = None,
        retry: Mapping[type[Exception], Backoff | None] | None = None,
        cpu: bool = False,
    ) -> None:
        self.name = check_id(name, "task name")
        self.function = function
        self.aliases = tuple(check_id(alias, f"task {name!r}: alias") for alias in aliases)
        self.role = None if role is None else check_id(role, f"task {name!r}: role")
        self.timeout_s = None if timeout_s is None else seconds(timeout_s, f"task {name!r}: timeout")
        self.max_attempts = max_attempts
        self.priority = priority
        self.backoff = backoff or Backoff()
        self.retry = dict(retry or {})
        self.kind = _kind(name, function, cpu=cpu)
        self._signature = _signature(name, function)
        self._check_rules()
        if self.kind == "process":
            _check_process(name, function, self._signature)

    def __repr__(self) -> str:
        return f"<Handler {self.name}: {_described(self.function)}>"

    def _check_rules(self) -> None:
        if self.timeout_s == 0:
            raise InvalidInputError(f"task {self.name!r}: timeout: 0 leaves no time; leave it out for the default")
        if self.max_attempts is not None and (
            isinstance(self.max_attempts, bool) or not isinstance(self.max_attempts, int) or self.max_attempts < 1
        ):
            raise InvalidInputError(
                f"task {self.name!r}: max_attempts: {self.max_attempts!r} is not usable; give a whole number from 1 on"
            )
        if self.priority is not None and self.priority not in list(Priority):
            raise InvalidInputError(
                f"task {self.name!r}: priority: {self.priority!r} is not known; use {', '.join(Priority)}"
            )
        for kind, rule in self.retry.items():
            if not (isinstance(kind, type) and issubclass(kind, Exception)):
                raise InvalidInputError(f"task {self.name!r}: retry: {kind!r} is not an exception type")
            if not (rule is None or isinstance(rule, Backoff)):
                raise InvalidInputError(
                    f"task {self.name!r}: retry: {kind.__name__}: {rule!r} is not a rule; "
                    "give a Backoff, or None to fail at once"
                )

    def backoff_for(self, types: Iterable[str]) -> Backoff | None:
        """
        The rule for an exception, None to fail at once. It is given as `type_names` of it, since it may have been
        raised in another process.
        """
        rules = {type_names(kind)[0]: rule for kind, rule in self.retry.items()} if self.retry else {}
        return next((rules[name] for name in types if name in rules), self.backoff)

    def arguments(self, *args: Any, **kwargs: Any) -> dict[str, Any]:
        """
        Bind a call as Python would and turn its arguments into JSON values, checked by the function's annotations.
        What is left to the function's defaults stays out.

        Raises:
            InvalidInputError: naming every argument that is missing, unknown, of the wrong type or not JSON.
        """
        positional = [name for name, one in self._plan.accepted.items() if one.kind is one.POSITIONAL_OR_KEYWORD]
        problems = []
        if len(args) > len(positional):
            problems.append(f"takes {len(positional)} positional arguments, {len(args)} were given")
        given = dict(zip(positional, args, strict=False))
        problems += [f"argument {name!r} is given twice" for name in given if name in kwargs]
        given |= kwargs
        return self._converted(given, _Type.write, problems)

    def check(self, arguments: Mapping[str, Any]) -> dict[str, Any]:
        """
        As `arguments`, for JSON values that came from elsewhere, such as a file.
        """
        return self._converted(arguments, _Type.normal)

    def call_arguments(self, raw: Mapping[str, Any], context: TaskContext | None) -> dict[str, Any]:
        """
        Turn JSON arguments into those for the call: of the annotated types, and with the context where it is asked for.

        Raises:
            InvalidInputError: as `arguments`.
        """
        called = self._converted(raw, _Type.read)
        for name in self._plan.contexts:
            called[name] = context
        return called

    def dump_result(self, value: Any) -> bytes:
        """
        The JSON text of what the function returned, by its return annotation.

        Raises:
            InvalidInputError: it is not JSON, or not what the annotation says (`load_result` could not read it then).
        """
        try:
            return to_json(self._plan.returns.write(value))
        except _BadError as bad:
            raise self._refusal(bad.described("result")) from None

    def load_result(self, value: Any) -> R:
        """
        Turn the JSON value of a result into the annotated return type; without one it stays as it is.

        Raises:
            InvalidInputError: it is of another type: the worker runs another version of the function.
        """
        try:
            return cast(R, self._plan.returns.read(value))
        except _BadError as bad:
            raise self._refusal(bad.described("result")) from None

    def _converted(
        self, given: Mapping[str, Any], convert: Callable[[_Type, Any], Any], problems: Sequence[str] = ()
    ) -> dict[str, Any]:
        found = [*problems, *self._plan.name_problems(given)]
        converted = {}
        for name, value in given.items():
            type_ = self._plan.types.get(name, self._plan.more)
            if type_ is not None:
                try:
                    converted[name] = convert(type_, value)
                except _BadError as bad:
                    found += bad.described("argument", name)
        if found:
            raise self._refusal(found)
        return converted

    def _refusal(self, problems: Sequence[str]) -> InvalidInputError:
        return InvalidInputError(f"task {self.name!r}: {'; '.join(problems)}")

    @cached_property
    def _plan(self) -> _Plan:
        # Not at registration: by the first call all names that the annotations use are defined.
        hints = _hints(self.function)
        accepted = {}
        contexts = []
        more = None
        for name, parameter in self._signature.parameters.items():
            if _is_context(hints.get(name)):
                contexts.append(name)
            elif parameter.kind is parameter.VAR_KEYWORD:
                more = _Type(hints.get(name))
            else:
                accepted[name] = parameter
        return _Plan(
            accepted=accepted,
            contexts=tuple(contexts),
            required=frozenset(name for name, one in accepted.items() if one.default is one.empty),
            types={name: _Type(hints.get(name)) for name in accepted},
            more=more,
            returns=_Type(hints.get("return"), is_result=True),
        )


class Registry:
    """
    The handlers that a process knows, by name, and what else an application registers.

    Attributes:
        on_start, on_stop: called once per worker process, without arguments; may be async.
        on_error: called with the context and the exception after an attempt failed; may be async.
        goal_checks: callables for goals, by name: True achieved, else not yet (at the end: failed); may be async.
    """

    def __init__(self) -> None:
        self.on_start: list[Callable[[], Any]] = []
        self.on_stop: list[Callable[[], Any]] = []
        self.on_error: list[Callable[[TaskContext, BaseException], Any]] = []
        self.goal_checks: dict[str, GoalCheck] = {}
        self._handlers: dict[str, Handler[..., Any]] = dict(_BUILTINS)

    def add(self, handler: Handler[..., Any]) -> None:
        """
        Raises:
            InvalidInputError: its name or an alias is taken. Only the built-in `default` and `echo` may be replaced.
        """
        names = [handler.name, *handler.aliases]
        for position, name in enumerate(names):
            taken = handler if name in names[:position] else self._handlers.get(name)
            if taken is not None and taken is not _BUILTINS.get(name):
                raise InvalidInputError(
                    f"task {handler.name!r}: the name {name!r} is taken by {_described(taken.function)}; "
                    "give one of them another name"
                )
        self._handlers.update(dict.fromkeys(names, handler))

    def get(self, name: str) -> Handler[..., Any]:
        """
        Raises:
            UnknownTaskError: naming what is registered, the nearest first.
        """
        if (handler := self._handlers.get(name)) is not None:
            return handler
        near = get_close_matches(name, self._handlers, n=1)
        guess = f"did you mean {near[0]!r}? " if near else ""
        names = self.names()
        shown = ", ".join(names[:20]) + (f" and {len(names) - 20} more" if len(names) > 20 else "")
        raise UnknownTaskError(f"no task is registered as {name!r}; {guess}registered: {shown}")

    def find(self, name: str) -> Handler[..., Any] | None:
        return self._handlers.get(name)

    def names(self) -> list[str]:
        """
        All names that can be run, aliases and built-in ones included, sorted.
        """
        return sorted(self._handlers)

    def own(self) -> list[Handler[..., Any]]:
        """
        The handlers that a user registered.
        """
        return [handler for name, handler in self._handlers.items() if handler is not _BUILTINS.get(name)]

    def roles(self) -> list[str]:
        """
        The roles that the registered tasks ask for, sorted; a task that names none asks for the default role.
        """
        return sorted({handler.role or DEFAULT_ROLE for handler in self.own()})


def type_names(kind: type[BaseException]) -> tuple[str, ...]:
    """
    The full names of an exception type and its bases, the most specific first.
    """
    # In a child process the main module bears multiprocessing's name for it.
    return tuple(f"{one.__module__}.{one.__qualname__}".replace("__mp_main__", "__main__") for one in kind.__mro__)


class _Plan(NamedTuple):
    """
    What the annotations say: which parameters are arguments, which get the context, and their types.
    """

    accepted: dict[str, inspect.Parameter]
    contexts: tuple[str, ...]
    required: frozenset[str]
    types: dict[str, _Type]
    more: _Type | None  # of the arguments that `**kwargs` takes
    returns: _Type

    def name_problems(self, given: Mapping[str, Any]) -> list[str]:
        """
        What is missing or too much among the names; nothing in the usual case, and that quickly.
        """
        if self.required <= given.keys() <= self.types.keys():
            return []
        problems = [f"argument {name!r} is missing" for name in self.accepted if name in self.required - given.keys()]
        for name in given:
            if name in self.contexts:
                problems.append(f"argument {name!r} is given by the worker; leave it out")
            elif name not in self.types and self.more is None:
                near = get_close_matches(name, self.accepted, n=1)
                guess = f"did you mean {near[0]!r}?" if near else f"known: {', '.join(self.accepted) or 'none'}"
                problems.append(f"argument {name!r} is unknown; {guess}")
        return problems


class _Type:
    """
    How values of one annotation become JSON and come back. Where it says nothing, JSON values pass and others are
    refused, since they would come back as something else.
    """

    def __init__(self, annotation: Any, *, is_result: bool = False) -> None:
        self.annotation = annotation
        self._is_result = is_result
        self._is_scalar = any(annotation is one for one in (str, int, float, bool))
        self._is_open = any(annotation is one for one in (None, NoneType, Any, object))

    @cached_property
    def _adapter(self) -> TypeAdapter[Any] | None:
        from pydantic import PydanticUserError, TypeAdapter

        try:
            return TypeAdapter(self.annotation)
        except PydanticUserError:
            if self._is_result:  # then the value decides: most such functions return something else than they say
                return None
            raise _BadError(
                f"{self.annotation!r} cannot be made from JSON; annotate it with a type that pydantic knows"
            ) from None

    def write(self, value: Any) -> Any:
        """
        A Python value as a JSON value.
        """
        if self._is_open or (self._is_scalar and type(value) is self.annotation) or (adapter := self._adapter) is None:
            return _json_copy(value)
        try:
            value = adapter.validate_python(value)
            # By alias and round_trip: what `read` accepts. Warnings: the value was just validated.
            dumped = adapter.dump_python(value, mode="json", by_alias=True, round_trip=True, warnings=False)
        except ValidationError as error:
            raise _BadError.of(error) from None
        except PydanticSerializationError as error:
            _json_copy(value, convert=to_jsonable_python)  # finds the place
            raise _BadError(str(error)) from None
        return _json_copy(dumped)

    def read(self, value: Any) -> Any:
        """
        A JSON value as a Python value.
        """
        if self._is_open or (self._is_scalar and type(value) is self.annotation) or (adapter := self._adapter) is None:
            return value
        try:
            # As JSON, not as Python values: types that are strict about Python values still take text for a date.
            return adapter.validate_json(to_json(value))
        except ValidationError as error:
            raise _BadError.of(error) from None

    def normal(self, value: Any) -> Any:
        """
        A JSON value as `write` would have written it.
        """
        return self.write(self.read(_json_copy(value)))


class _BadError(Exception):
    """
    A value that cannot pass: where in it (keys and positions from the outside in), and what is wrong there.
    """

    def __init__(self, what: str) -> None:
        super().__init__(what)
        self.problems: list[tuple[list[str | int], str]] = [([], what)]

    @classmethod
    def of(cls, error: ValidationError) -> _BadError:
        bad = cls("")
        bad.problems = [
            ([*one["loc"]], f"{one['msg']}, not {reprlib.repr(one['input'])}")
            for one in error.errors(include_url=False, include_context=False)[:10]
        ]
        return bad

    def described(self, what: str, name: str = "") -> list[str]:
        lines = []
        for path, problem in self.problems:
            place = name + "".join(f"[{step}]" if isinstance(step, int) else f".{step}" for step in path)
            lines.append(f"{what} {place!r}: {problem}" if name else f"{what}{place}: {problem}")
        return lines


_DEPTH_MAX = 100
"""Nesting of a value; the parser gives up at 200."""

_INTEGER_BITS_MAX = 14_000
"""The parser takes numbers of at most 4,300 digits."""


def _json_copy(value: Any, *, convert: Callable[[Any], Any] | None = None, depth: int = _DEPTH_MAX) -> Any:
    """
    A copy made of JSON values only, tuples as lists. What is none goes to `convert`, without one it is refused.
    """
    match value:
        case None | bool():
            return value
        case str():
            return _text(value)
        case int() | float():
            return _number(value)
        case Mapping() | list() | tuple() if not depth:
            raise _BadError(f"nested more than {_DEPTH_MAX} levels deep, or inside itself")
        case Mapping():
            return {_key(key): _placed(key, one, convert, depth) for key, one in value.items()}
        case list() | tuple():
            return [_placed(index, one, convert, depth) for index, one in enumerate(value)]
    if convert is None:
        raise _BadError(
            f"a {type(value).__qualname__} is not JSON; annotate it with its type so that it is converted, "
            "or pass text, numbers, true/false, null, lists and objects"
        )
    try:
        return convert(value)
    except Exception as error:
        raise _BadError(f"a {type(value).__qualname__} is not JSON ({error})") from None


def _text(value: str) -> str:
    text = str.__str__(value)  # an enum's text is its value, whatever its `str()` says
    if not text.isascii() and any("\ud800" <= one <= "\udfff" for one in text):
        raise _BadError("text with half a surrogate pair is not Unicode")
    return text


def _key(value: Any) -> str:
    if not isinstance(value, str):
        raise _BadError(f"the key {reprlib.repr(value)} is not text, as JSON wants it")
    return _text(value)


def _number(value: float) -> float:
    if isinstance(value, int):
        if value.bit_length() > _INTEGER_BITS_MAX:
            raise _BadError("the number has over 4,000 digits; pass it as text")
        return int(value)
    if not math.isfinite(value):
        raise _BadError(f"{float(value)} is not JSON; pass null or text")
    return float(value)


def _placed(step: str | int, value: Any, convert: Callable[[Any], Any] | None, depth: int) -> Any:
    try:
        return _json_copy(value, convert=convert, depth=depth - 1)
    except _BadError as bad:
        for path, _ in bad.problems:
            path.insert(0, step)
        raise


def _kind(name: str, function: Callable[..., Any], *, cpu: bool) -> Literal["async", "thread", "process"]:
    inner = _inner(function)
    if inspect.isgeneratorfunction(inner) or inspect.isasyncgenfunction(inner):
        raise InvalidInputError(f"task {name!r}: {_described(function)} yields; return one value instead")
    is_async = inspect.iscoroutinefunction(function) or inspect.iscoroutinefunction(type(function).__call__)
    if is_async and cpu:
        raise InvalidInputError(f"task {name!r}: {_described(function)} is async; cpu=True needs a plain function")
    if cpu:
        return "process"
    return "async" if is_async else "thread"


def _signature(name: str, function: Callable[..., Any]) -> inspect.Signature:
    options: dict[str, Any] = {}
    if sys.version_info >= (3, 14):
        from annotationlib import Format

        options["annotation_format"] = Format.FORWARDREF  # else a name for type checkers only would raise
    try:
        signature = inspect.signature(function, **options)
    except (TypeError, ValueError) as error:
        raise InvalidInputError(f"task {name!r}: {function!r} has no signature; wrap it in a function") from error
    for one in signature.parameters.values():
        if one.kind in (one.POSITIONAL_ONLY, one.VAR_POSITIONAL):
            star = "*" if one.kind is one.VAR_POSITIONAL else ""
            raise InvalidInputError(
                f"task {name!r}: parameter {star}{one.name} can only be passed by position, "
                "and tasks are called by name; make it an ordinary or keyword parameter"
            )
    return signature


def _check_process(name: str, function: Callable[..., Any], signature: inspect.Signature) -> None:
    """
    A child process imports the function by its name, so it must have one; and nothing else reaches the child.
    """
    hints = _hints(function)
    context = next((one for one in signature.parameters if _is_context(hints.get(one))), None)
    if context is not None:
        raise InvalidInputError(
            f"task {name!r}: parameter {context!r}: a process has no TaskContext; leave it out, or leave out cpu=True"
        )
    module, qualname = getattr(function, "__module__", None), getattr(function, "__qualname__", "<")
    is_interactive = module == "__main__" and not hasattr(sys.modules["__main__"], "__file__")
    if not inspect.isroutine(function) or inspect.ismethod(function) or "<" in qualname or is_interactive:
        raise InvalidInputError(
            f"task {name!r}: {_described(function)} cannot be imported by a child process; "
            "cpu=True needs a function defined with def at the top of a module"
        )


def _described(function: Callable[..., Any]) -> str:
    return f"{getattr(function, '__module__', '?')}.{getattr(function, '__qualname__', repr(function))}"


def _inner(function: Callable[..., Any]) -> Callable[..., Any]:
    """
    The function that carries the annotations and the names they use.
    """
    while isinstance(function, partial):
        function = function.func
    function = inspect.unwrap(function)
    return function if inspect.isroutine(function) else type(function).__call__


def _hints(function: Callable[..., Any]) -> dict[str, Any]:
    """
    The annotations as types. What cannot be resolved is left out: it counts as Any.
    """
    inner = _inner(function)
    if sys.version_info >= (3, 14):
        from annotationlib import Format, get_annotations

        written = get_annotations(inner, format=Format.FORWARDREF)
    else:
        written = dict(getattr(inner, "__annotations__", None) or {})
    # TaskContext is often imported for type checkers only.
    names = {"TaskContext": TaskContext, **getattr(inner, "__globals__", {})}
    hints: dict[str, Any] = {}
    for name, annotation in written.items():
        with suppress(Exception):
            hints |= get_type_hints(SimpleNamespace(__annotations__={name: annotation}), names, include_extras=True)
    return hints


def _is_context(hint: Any) -> bool:
    return hint is TaskContext or TaskContext in get_args(hint)


async def _sleep(context: TaskContext) -> None:
    await asyncio.sleep(context.duration)


async def _echo(**arguments: Any) -> Any:
    return arguments


_BUILTINS: dict[str, Handler[..., Any]] = {
    DEFAULT_HANDLER: Handler(DEFAULT_HANDLER, _sleep),
    "echo": Handler("echo", _echo),
}
