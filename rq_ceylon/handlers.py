"""
The registered functions behind the names of tasks, with their rules, and their arguments and results as JSON. Nothing
here runs a task or knows Redis.
"""

from __future__ import annotations

import asyncio
import inspect
import sys
from collections.abc import Awaitable, Callable, Iterable, Mapping, Sequence
from contextlib import AbstractAsyncContextManager, suppress
from functools import cached_property, partial
from types import SimpleNamespace
from typing import Any, Generic, Literal, NamedTuple, ParamSpec, TypeVar, cast, get_args, get_type_hints

from pydantic_core import to_json

from rq_ceylon.attempt import Backoff, FailTask, Said, TaskContext, check_max_attempts, check_max_crashes, type_name
from rq_ceylon.errors import InvalidInputError, UnknownTaskError, guess
from rq_ceylon.models import DEFAULT_ROLE, LONGEST_S, Duration, Task, check_id, check_priority, check_timeout, counted
from rq_ceylon.settings import Settings
from rq_ceylon.values import BadValueError, JsonType
from rq_ceylon.views import GroupView

P = ParamSpec("P")
R = TypeVar("R")

SubmitHook = Callable[[Task], Mapping[str, Any] | None]
Lifespan = Callable[[], AbstractAsyncContextManager[Any]]
Middleware = Callable[[TaskContext], AbstractAsyncContextManager[Any]]
GoalCheck = Callable[[GroupView], bool | Awaitable[bool | None] | None]

DEFAULT_HANDLER = "default"
"""The handler of tasks that name none."""


class Handler(Generic[P, R]):
    """
    One registered function and its rules. The package's defaults apply to rules that are None.

    Attributes:
        kind: `async` for a coroutine function, which runs on the event loop; `thread` for a plain function, also for
            one that wraps a coroutine function (it may return an awaitable); `process` for a plain function with
            cpu=True.
        is_method: the function is called on an object. No worker has that object, so it can be called here only, and
            cannot be made into a task.
        backoff: the wait between attempts, for exceptions that `retry` does not name.
        retry: maps an exception type to a backoff of its own, or to None: fail at once. The most specific type decides.
        store_result: whether the returned value is stored; if not, it need not be JSON, and the result is None.

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
        timeout: Duration | None = None,
        max_attempts: int | None = None,
        max_crashes: int | None = None,
        priority: str | None = None,
        backoff: Backoff | None = None,
        retry: Mapping[type[Exception], Backoff | None] | None = None,
        cpu: bool = False,
        store_result: bool = True,
    ) -> None:
        self.name = check_id(name, "task name")
        self.function = function
        self.aliases = tuple(check_id(alias, f"task {name!r}: alias") for alias in aliases)
        self.role = None if role is None else check_id(role, f"task {name!r}: role")
        self.timeout_s = None if timeout is None else check_timeout(timeout, f"task {name!r}: timeout")
        self.max_attempts, self.max_crashes = max_attempts, max_crashes
        self.priority = None if priority is None else check_priority(priority, f"task {name!r}: priority")
        self.backoff = backoff or Backoff()
        self.retry = dict(retry or {})
        self.store_result = store_result
        self.kind = _kind(name, function, cpu=cpu)
        self._signature = _signature(name, function)
        self.is_method = _is_method(function, self._signature)
        self._check_rules()
        if self.kind == "process":
            _check_process(name, function)

    def __repr__(self) -> str:
        return f"<Handler {self.name}: {_described(self.function)}>"

    def _check_rules(self) -> None:
        if self.max_attempts is not None:
            check_max_attempts(self.max_attempts, f"task {self.name!r}: max_attempts")
        if self.max_crashes is not None:
            check_max_crashes(self.max_crashes, f"task {self.name!r}: max_crashes")
        for kind, rule in self.retry.items():
            if not (isinstance(kind, type) and issubclass(kind, Exception)):
                raise InvalidInputError(
                    f"task {self.name!r}: retry: {kind!r} is not an exception type; give one, such as OSError"
                )
            if not (rule is None or isinstance(rule, Backoff)):
                raise InvalidInputError(
                    f"task {self.name!r}: retry: {kind.__name__}: {rule!r} is not a rule; "
                    "give a Backoff, or None to fail at once"
                )

    def wait_s(self, says: Iterable[Said], attempt: int) -> float | None:
        """
        How long to wait before the next attempt, or None to fail at once. `says` is what `said` found in the exception,
        which may have been raised in another process. If it found several rules, the longest wait counts, and the task
        fails at once only if all of them say so.
        """
        rules = {type_name(kind): rule for kind, rule in self.retry.items()} if self.retry else {}
        waits = []
        for one in says:
            if type_name(FailTask) in one.names:
                continue
            if one.delay_s is not None:
                # Judged here too: users' code may have written it since its RetryTask was made.
                waits.append(min(max(0.0, one.delay_s), LONGEST_S))
            elif (backoff := next((rules[name] for name in one.names if name in rules), self.backoff)) is not None:
                waits.append(backoff.delay_s(attempt))
        return max(waits, default=None)

    def arguments(self, /, *args: Any, **kwargs: Any) -> dict[str, Any]:
        """
        Bind a call as Python would and turn its arguments into JSON values, checked by the function's annotations.
        Arguments that are left to the function's defaults stay out.

        Raises:
            InvalidInputError: naming every argument that is missing, unknown, of the wrong type or not JSON.
        """
        if self.is_method:
            raise self._refusal(
                [
                    "it is a method, and a worker has no object to call it on; decorate a plain function, "
                    "or a method without self below @staticmethod"
                ]
            )
        positional = [name for name, one in self._plan.accepted.items() if one.kind is one.POSITIONAL_OR_KEYWORD]
        problems = []
        if len(args) > len(positional):
            taken = counted(len(positional), "positional argument")
            problems.append(f"takes {taken}, {counted(len(args), 'was', 'were')} given")
        given = dict(zip(positional, args, strict=False))
        problems += [f"argument {name!r} is given twice" for name in given if name in kwargs]
        given |= kwargs
        return self._converted(given, JsonType.write, problems)

    def check(self, arguments: Mapping[str, Any]) -> dict[str, Any]:
        """Like `arguments`, for JSON values that come from elsewhere, such as a file."""
        return self._converted(arguments, JsonType.normal)

    def call_arguments(self, raw: Mapping[str, Any], context: TaskContext | None) -> dict[str, Any]:
        """
        Turn JSON arguments into those of the call: converted to the annotated types, and with the context if the
        function has a parameter for it.

        Raises:
            InvalidInputError: as `arguments`.
        """
        called = self._converted(raw, JsonType.read)
        for name in self._plan.contexts:
            called[name] = context
        return called

    def dump_result(self, value: Any) -> bytes:
        """
        The JSON text of the returned value, according to the return annotation; null if no value is to be stored.

        Raises:
            InvalidInputError: the value is not JSON, or does not fit the annotation, so that `load_result` could not
                read it.
        """
        if not self.store_result:
            return b"null"
        try:
            return to_json(self._plan.returns.write(value))
        except BadValueError as bad:
            raise self._refusal(bad.described("result")) from bad.__cause__
        except Exception as error:  # of users' code, such as the `__eq__` of a value
            raise self._refusal([f"result: it cannot be written: {type(error).__name__}: {error}"]) from error

    def load_result(self, value: Any) -> R:
        """
        Turn the JSON value of a result into the annotated return type; without an annotation it is returned as it is.

        Raises:
            InvalidInputError: the value has another type, as when the worker runs another version of the function.
        """
        if value is None and not self.store_result:
            return cast(R, None)
        try:
            return cast(R, self._plan.returns.read(value))
        except BadValueError as bad:
            raise self._refusal(bad.described("result")) from None

    def _converted(
        self, given: Mapping[str, Any], convert: Callable[[JsonType, Any], Any], problems: Sequence[str] = ()
    ) -> dict[str, Any]:
        found = [*problems, *self._plan.name_problems(given)]
        converted = {}
        for name, value in given.items():
            type_ = self._plan.types.get(name, self._plan.more)
            if type_ is not None:
                try:
                    converted[name] = convert(type_, value)
                except BadValueError as bad:
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
        unresolved = {name: str(one) for name, one in _annotations(self.function).items() if name not in hints}
        accepted = {}
        contexts = []
        more = None
        for name, parameter in self._signature.parameters.items():
            if _is_context(hints.get(name)):
                contexts.append(name)
            elif parameter.kind is parameter.VAR_KEYWORD:
                more = JsonType(hints.get(name), unresolved=unresolved.get(name, ""))
            else:
                accepted[name] = parameter
        return _Plan(
            accepted=accepted,
            contexts=tuple(contexts),
            required=frozenset(name for name, one in accepted.items() if one.default is one.empty)
            - _supplied(self.function),
            types={name: JsonType(hints.get(name), unresolved=unresolved.get(name, "")) for name in accepted},
            more=more,
            returns=JsonType(hints.get("return"), is_result=True, unresolved=unresolved.get("return", "")),
        )


class Registry:
    """
    The handlers that a process knows, by name, and everything else that an application registers.

    Attributes:
        hooks: called without arguments, in the order of their registration, once in each process that runs handlers,
            when it starts or stops; may be async. A lifespan returns an async context manager around the life of the
            process, and the value that it yields is `context.state`.
        on_error: called with the context and the exception after an attempt failed; may be async.
        on_submit: called with each task before it is sent; the returned metadata travels with the task.
        middleware: called with the context; returns an async context manager around each attempt. The first is
            outermost.
        goal_checks: callables for goals, by name; may be async. True achieves the goal; anything else leaves it
            undecided, or fails it at the end.
        settings: those of the worker or monitor that these handlers run in, for the child processes of its `cpu=True`
            tasks; None: each application uses its own.
    """

    def __init__(self) -> None:
        self.settings: Settings | None = None
        self.hooks: list[tuple[Literal["start", "stop", "lifespan"], Callable[[], Any]]] = []
        self.on_error: list[Callable[[TaskContext, BaseException], Any]] = []
        self.on_submit: list[SubmitHook] = []
        self.middleware: list[Middleware] = []
        self.goal_checks: dict[str, GoalCheck] = {}
        self._handlers: dict[str, Handler[..., Any]] = dict(_BUILTINS)

    def add(self, handler: Handler[..., Any]) -> None:
        """
        Raises:
            InvalidInputError: its name or an alias is taken. Only the built-in `default` and `echo` may be replaced,
                and a function by itself when its definition runs again (a notebook's cell, a reloaded module).
        """
        names = [handler.name, *handler.aliases]
        for position, name in enumerate(names):
            taken = handler if name in names[:position] else self._handlers.get(name)
            if taken is None or taken is _BUILTINS.get(name):
                continue
            if name in names[:position] or not is_again(taken.function, handler.function):
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
        names, near = self.names(), guess(name, self._handlers, ask="did you mean {!r}? ")
        shown = ", ".join(names[:20]) + (f" and {len(names) - 20} more" if len(names) > 20 else "")
        raise UnknownTaskError(f"no task is registered as {name!r}; {near}registered: {shown}")

    def find(self, name: str) -> Handler[..., Any] | None:
        return self._handlers.get(name)

    def names(self) -> list[str]:
        """All names that can be run, including aliases and built-in ones, sorted."""
        return sorted(self._handlers)

    def own(self) -> list[Handler[..., Any]]:
        """The handlers that a user registered."""
        return [handler for name, handler in self._handlers.items() if handler is not _BUILTINS.get(name)]

    def roles(self) -> list[str]:
        """The roles that the registered tasks ask for, sorted; a task that names none asks for the default role."""
        return sorted({handler.role or DEFAULT_ROLE for handler in self.own()})


def is_again(known: Callable[..., Any], function: Callable[..., Any]) -> bool:
    """Whether a function is a known one whose definition ran again. Two definitions in one file are two functions."""
    one, other = (_inner(each) for each in (known, function))
    if one is other:
        return True
    name = getattr(one, "__qualname__", "<")
    if "<" in name or (one.__module__, name) != (other.__module__, getattr(other, "__qualname__", "")):
        return False
    (file, line), (new_file, new_line) = (
        (code and code.co_filename, code and code.co_firstlineno)
        for code in (getattr(each, "__code__", None) for each in (one, other))
    )
    return file != new_file or line == new_line


class _Plan(NamedTuple):
    """What the annotations say: which parameters are arguments, which get the context, and their types."""

    accepted: dict[str, inspect.Parameter]
    contexts: tuple[str, ...]
    required: frozenset[str]
    types: dict[str, JsonType]
    more: JsonType | None  # of the arguments that `**kwargs` takes
    returns: JsonType

    def name_problems(self, given: Mapping[str, Any]) -> list[str]:
        """What is missing or too much among the names; nothing in the usual case, and that quickly."""
        if self.required <= given.keys() <= self.types.keys():
            return []
        problems = [f"argument {name!r} is missing" for name in self.accepted if name in self.required - given.keys()]
        for name in given:
            if name in self.contexts:
                problems.append(f"argument {name!r} is given by the worker; leave it out")
            elif name not in self.types and self.more is None:
                known = f"known: {', '.join(self.accepted) or 'none'}"
                remedy = guess(name, self.accepted, known, "did you mean {!r}?")
                problems.append(f"argument {name!r} is unknown; {remedy}")
        return problems


def _kind(name: str, function: Callable[..., Any], *, cpu: bool) -> Literal["async", "thread", "process"]:
    inner = _inner(function)
    if inspect.isgeneratorfunction(inner) or inspect.isasyncgenfunction(inner):
        raise InvalidInputError(f"task {name!r}: {_described(function)} yields; return one value instead")
    called: Any = function
    while isinstance(called, partial):
        called = called.func
    # Of a plain wrapper only a call tells whether it returns an awaitable: it may as well run what it wraps to its end.
    is_async = inspect.iscoroutinefunction(called) or inspect.iscoroutinefunction(type(called).__call__)
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


def _is_method(function: Callable[..., Any], signature: inspect.Signature) -> bool:
    first = next(iter(signature.parameters), "")
    holder = getattr(function, "__qualname__", "").rpartition(".")[0]
    return first in ("self", "cls") and holder != "" and not holder.endswith("<locals>")


def _check_process(name: str, function: Callable[..., Any]) -> None:
    """A child process imports the function by its name, so it must have one."""
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
    """The function that carries the annotations and the names they use."""
    while isinstance(function, partial):
        function = function.func
    function = inspect.unwrap(function)
    return function if inspect.isroutine(function) else type(function).__call__


def _supplied(function: Callable[..., Any]) -> frozenset[str]:
    """The arguments that decorators may supply: those a wrapper names in its code (`function(session=...)`)."""
    words: set[Any] = set()
    while (wrapped := getattr(function, "__wrapped__", None)) is not None:
        code = getattr(function, "__code__", None)
        if code is not None and code.co_flags & inspect.CO_VARKEYWORDS:
            for constant in code.co_consts:
                words.update(constant if isinstance(constant, tuple) else [constant])
        function = wrapped
    return frozenset(word for word in words if isinstance(word, str))


def _annotations(function: Callable[..., Any]) -> dict[str, Any]:
    """The annotations as they were written."""
    inner = _inner(function)
    if sys.version_info >= (3, 14):
        from annotationlib import Format, get_annotations

        return get_annotations(inner, format=Format.FORWARDREF)
    return dict(getattr(inner, "__annotations__", None) or {})


def _hints(function: Callable[..., Any]) -> dict[str, Any]:
    """The annotations as types. What cannot be resolved is left out: it counts as Any."""
    # TaskContext is often imported for type checkers only.
    names = {"TaskContext": TaskContext, **getattr(_inner(function), "__globals__", {})}
    hints: dict[str, Any] = {}
    for name, annotation in _annotations(function).items():
        with suppress(Exception):
            hints |= get_type_hints(SimpleNamespace(__annotations__={name: annotation}), names, include_extras=True)
    return hints


def _is_context(hint: Any) -> bool:
    return hint is TaskContext or TaskContext in get_args(hint)


async def awaited(answer: Any) -> Any:
    """The value that a user's function returned, awaited if the function is async."""
    return await answer if inspect.isawaitable(answer) else answer


async def _sleep(context: TaskContext) -> None:
    await asyncio.sleep(context.duration)


async def _echo(**arguments: Any) -> Any:
    return arguments


_BUILTINS: dict[str, Handler[..., Any]] = {
    DEFAULT_HANDLER: Handler(DEFAULT_HANDLER, _sleep),
    "echo": Handler("echo", _echo),
}
BUILTIN_NAMES = frozenset(_BUILTINS)
"""The tasks that every worker knows."""
