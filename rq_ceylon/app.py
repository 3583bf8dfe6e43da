"""The application object: registers handlers, and gives clients, async and sync."""

from __future__ import annotations

import asyncio
import atexit
import inspect
import os
import sys
import threading
from collections.abc import AsyncIterator, Callable, Coroutine, Mapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import replace
from functools import cached_property, partial, update_wrapper
from types import MethodType
from typing import TYPE_CHECKING, Any, Concatenate, Generic, Literal, ParamSpec, Protocol, TypeVar, cast, overload

from rq_ceylon.attempt import Backoff, TaskContext
from rq_ceylon.client import Client, SyncClient, SyncTaskHandle, TaskHandle
from rq_ceylon.client.sync import OF_PARENTS
from rq_ceylon.errors import InvalidInputError
from rq_ceylon.handlers import GoalCheck, Handler, Lifespan, Middleware, Registry, SubmitHook, is_again
from rq_ceylon.models import Duration, Task, check_id
from rq_ceylon.settings import Settings, configured, resolve

P = ParamSpec("P")
R = TypeVar("R")
C = TypeVar("C")
"""What calling the function gives: R itself, or a coroutine of it."""
G = TypeVar("G", bound=GoalCheck)
S = TypeVar("S", bound=SubmitHook)
H = TypeVar("H", bound=Callable[..., Any])


class Ceylon:
    """
    An application: its tasks, and the way to submit them.

        app = Ceylon()

        @app.task(role="processor", timeout="30s")
        async def resize(path: str, width: int) -> str: ...

    Workers and monitors take the application to run its tasks and goal checks. Importing it needs no Redis, since the
    settings are looked up when they are first needed. `@app.task` returns an `AppTask`, which can be called like the
    function; the decorators of hooks and goal checks return the function unchanged.

    Args:
        redis_url: URL of Redis; default: CEYLON_REDIS_URL, REDIS_URL, or this user's running `ceylon server`.
        namespace: keeps applications that share one Redis apart; default: CEYLON_NAMESPACE, or `ceylon`.
    """

    def __init__(self, redis_url: str | None = None, *, namespace: str | None = None) -> None:
        self._redis_url, self._namespace = redis_url, namespace
        self.registry = Registry()
        self._clients: dict[tuple[int, asyncio.AbstractEventLoop], asyncio.Task[Client]] = {}
        self._sync: tuple[int, SyncClient] | None = None
        self._sync_guard = threading.Lock()

    @cached_property
    def settings(self) -> Settings:
        """The settings, looked up when they are first needed, so that importing an application needs no Redis."""
        return self.settings_with()

    def settings_with(self, *, redis_url: str | None = None, namespace: str | None = None) -> Settings:
        """The settings with these values, such as those of a command line, in place of the application's own."""
        return resolve(redis_url or self._redis_url, namespace=namespace or self._namespace)

    def configured(self) -> tuple[str, str] | None:
        """The URL that the application or a variable gives, and which of them; see `settings.configured`."""
        return (self._redis_url, "the application") if self._redis_url else configured()

    def use(self, settings: Settings) -> None:
        """
        Replace the application's own settings. Workers and monitors call this before they start, so that a task that
        submits others submits them to the Redis of its worker.
        """
        self.settings = self.registry.settings = settings

    # ---- registering -------------------------------------------------------------------------------------------------
    @overload
    def task(
        self, function: Callable[Concatenate[TaskContext, P], Coroutine[Any, Any, R]], /
    ) -> ContextTask[P, R, Coroutine[Any, Any, R]]: ...
    @overload
    def task(self, function: Callable[Concatenate[TaskContext, P], R], /) -> ContextTask[P, R, R]: ...
    @overload
    def task(self, function: Callable[P, Coroutine[Any, Any, R]], /) -> AppTask[P, R, Coroutine[Any, Any, R]]: ...
    @overload
    def task(self, function: Callable[P, R], /) -> AppTask[P, R, R]: ...
    @overload
    def task(
        self,
        /,
        *,
        name: str | None = None,
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
    ) -> _Decorator: ...

    def task(self, function: Any = None, /, *, name: str | None = None, **rules: Any) -> Any:
        """
        Register a function as the handler of a task; bare, or with rules.

        Args:
            name: registered name; default: the function's own.
            aliases: former names, so that tasks queued under them still run.
            role: the role whose workers run the task.
            timeout: limit of one attempt; default: 1 h.
            max_attempts: number of attempts, including the first; default: 3.
            max_crashes: how often a task may lose its worker and run again; 0: never. Default: 3. It applies to tasks
                that are made by `bind`, or submitted where this function is registered.
            priority: high, normal or low.
            backoff: the wait between attempts.
            retry: a rule per exception type: a `Backoff`, or None to fail at once.
            cpu: run the function in a child process, which a timeout can end.
            store_result: whether what the function returns is stored. If not, it need not be JSON, and the result is
                None.
        """

        def register(function: Callable[..., Any]) -> AppTask[..., Any, Any]:
            called = name or getattr(function, "__name__", None)
            if called is None:
                raise InvalidInputError(f"{function!r} has no name of its own; give it one: app.task(name=...)")
            handler: Handler[..., Any] = Handler(called, function, **rules)
            self.registry.add(handler)
            return AppTask(self, handler, Task(uses=handler.name))

        return register if function is None else register(function)

    @overload
    def goal_check(self, check: G, /) -> G: ...
    @overload
    def goal_check(self, /, *, name: str | None = None) -> Callable[[G], G]: ...

    def goal_check(self, check: Any = None, /, *, name: str | None = None) -> Any:
        """
        Register a callable for goals with `call: <name>`; bare, or with a name. Monitors call it with the group's view.
        True achieves the goal.

        Args:
            name: registered name; default: the function's own.
        """

        def register(check: G) -> G:
            called = check_id(name or getattr(check, "__name__", None), "goal check name")
            taken = self.registry.goal_checks.get(called)
            if taken is not None and not is_again(taken, check):
                raise InvalidInputError(f"goal check {called!r}: the name is taken; give one of them another name")
            self.registry.goal_checks[called] = check
            return check

        return register if check is None else register(check)

    def on_start(self, hook: H) -> H:
        """
        Register a hook that every worker process calls once before it takes work. If it raises, the worker ends with
        exit code 1.
        """
        return self._around("start", hook)

    def on_stop(self, hook: H) -> H:
        """
        Register a hook that every worker process calls once after its last task, if all start hooks registered before
        it have run. The hook registered last runs first. It may take 30 s; after a signal, the grace and 5 s are the
        limit for everything together. If it raises, the others still run, and the worker ends with exit code 1.
        """
        return self._around("stop", hook)

    def on_error(self, hook: H) -> H:
        """Register a hook that is called with the context and the exception after an attempt has failed."""
        return _hooked(self.registry.on_error, hook)

    def on_submit(self, hook: S) -> S:
        """
        Register a hook that this application's clients call with each task before they send it. It may return metadata
        to travel with the task, such as the context of a trace. The task's own metadata takes precedence.
        """
        return _hooked(self.registry.on_submit, hook)

    def lifespan(self, function: Callable[[], AsyncIterator[Any]] | Lifespan, /) -> Lifespan:
        """
        Set up what the tasks of a process share, and tear it down after the last one. Takes an async generator function
        that yields once, or a callable that returns an async context manager. The yielded value is `context.state`.

            @app.lifespan
            async def pool():
                async with connect(...) as pool:
                    yield pool

        It runs once in every worker process, and in each child process of `cpu=True` tasks.

        Raises:
            InvalidInputError: the application already has one.
        """
        made: Any = asynccontextmanager(function) if inspect.isasyncgenfunction(function) else function
        if any(kind == "lifespan" and not is_again(known, made) for kind, known in self.registry.hooks):
            raise InvalidInputError("lifespan: the application already has one; put both into one function")
        return cast(Lifespan, self._around("lifespan", made))

    def _around(self, kind: Literal["start", "stop", "lifespan"], hook: H) -> H:
        hooks = self.registry.hooks
        hooks[:] = [*(one for one in hooks if one[0] != kind or not is_again(one[1], hook)), (kind, hook)]
        return hook

    @overload
    def middleware(self, function: Callable[[TaskContext], AsyncIterator[None]], /) -> Middleware: ...
    @overload
    def middleware(self, function: Middleware, /) -> Middleware: ...

    def middleware(self, function: Any, /) -> Middleware:
        """
        Surround every attempt. Takes an async generator function that gets the context and yields once, or a callable
        that returns an async context manager. The middleware declared first is outermost.

            @app.middleware
            async def timed(context: TaskContext):
                began = time.perf_counter()
                try:
                    yield
                finally:
                    print(context.uses, time.perf_counter() - began)

        It runs on the worker's event loop, also for plain functions and `cpu=True`, and its time counts as time of the
        attempt. An exception of the handler is raised at the `yield`. The middleware may inspect or replace it, but
        cannot suppress it.
        """
        made = asynccontextmanager(function) if inspect.isasyncgenfunction(function) else function
        return cast(Middleware, _hooked(self.registry.middleware, made))

    # ---- clients -----------------------------------------------------------------------------------------------------
    def client(self) -> Client:
        """A client for the running event loop: `async with app.client() as client`."""
        return Client(self.settings.redis_url, namespace=self.settings.namespace, registry=self.registry)

    def sync_client(self) -> SyncClient:
        """A client without await: `with app.sync_client() as client`."""
        return SyncClient(self.client)

    async def implicit_client(self) -> Client:
        """The client behind `aenqueue`: one per event loop and process."""
        loop = asyncio.get_running_loop()
        key = os.getpid(), loop
        opening = self._clients.get(key)
        if opening is None:
            _before_close(loop, partial(self._drop_client, *key))
        if opening is None or _has_failed(opening):
            # Known before it is open: calls that come meanwhile wait for the same one.
            opening = self._clients[key] = loop.create_task(self.client().open())
        return await asyncio.shield(opening)

    async def _drop_client(self, pid: int, loop: asyncio.AbstractEventLoop) -> None:
        opening = self._clients.pop((pid, loop), None)
        if opening is not None and pid == os.getpid() and opening.done() and not _has_failed(opening):
            await opening.result().close()

    def implicit_sync_client(self) -> SyncClient:
        """The client behind `enqueue`: one per process, so that a forked child makes its own."""
        with self._sync_guard:
            if self._sync is None or self._sync[0] != os.getpid():
                if self._sync is not None:
                    OF_PARENTS.append(self._sync)
                self._sync = os.getpid(), self.sync_client().open()
                atexit.register(self._sync[1].close)
            return self._sync[1]


class _Decorator(Protocol):
    """The decorator that `app.task(...)` with rules returns."""

    @overload
    def __call__(
        self, function: Callable[Concatenate[TaskContext, P], Coroutine[Any, Any, R]], /
    ) -> ContextTask[P, R, Coroutine[Any, Any, R]]: ...
    @overload
    def __call__(self, function: Callable[Concatenate[TaskContext, P], R], /) -> ContextTask[P, R, R]: ...
    @overload
    def __call__(self, function: Callable[P, Coroutine[Any, Any, R]], /) -> AppTask[P, R, Coroutine[Any, Any, R]]: ...
    @overload
    def __call__(self, function: Callable[P, R], /) -> AppTask[P, R, R]: ...


class AppTask(Generic[P, R, C]):
    """
    A registered function. It can be called as before, and it also turns calls into tasks.

        await resize(path="a.jpg", width=64)                           # the function itself, here and now
        handle = await resize.aenqueue(path="a.jpg", width=64)         # a task, for some worker; without await: enqueue
        await resize.using(delay="5s").aenqueue(path="a.jpg", width=64)
        TaskGroup("thumbnails", [resize.bind(path=p, width=64) for p in paths])

    It keeps the function's signature and return type: a type checker refuses a wrong call, `handle.result()` has the
    function's return type, and arguments are checked before anything is sent.

    Attributes:
        function: the decorated function.
        handler: the function with its rules, as workers see it.
        app: the application that it is registered with.
    """

    def __init__(
        self, app: Ceylon, handler: Handler[P, R], options: Task, *, origin: AppTask[P, R, C] | None = None
    ) -> None:
        update_wrapper(cast(Any, self), handler.function)
        self.app, self.handler, self._options, self._origin = app, handler, options, origin
        self.function = handler.function
        if inspect.iscoroutinefunction(handler.function):
            _mark_as_coroutine_function(self)

    def __reduce__(self) -> str | tuple[Any, ...]:
        # By name, as a function travels; what `using` made is made again from the one that has the name.
        if self._origin is None:
            return str(getattr(self, "__qualname__", self.handler.name))
        return _with_options, (self._origin, self._options)

    def __get__(self, instance: object, owner: type | None = None) -> AppTask[P, R, C]:
        # As a method it is called with its object; only its object's class knows that it is one.
        is_called_on = instance is not None and self.handler.is_method
        return cast(AppTask[P, R, C], MethodType(self, instance)) if is_called_on else self

    def __call__(self, /, *args: P.args, **kwargs: P.kwargs) -> C:
        """Call the function itself, here and now; a coroutine function returns its coroutine."""
        return cast(C, self.function(*args, **kwargs))

    def using(
        self,
        *,
        role: str | None = None,
        priority: str | None = None,
        delay: Duration | None = None,
        expires: Duration | None = None,
        retention: Duration | None = None,
        timeout: Duration | None = None,
        max_attempts: int | None = None,
        max_crashes: int | None = None,
        id: str | None = None,
        needs: Sequence[str] | None = None,
        metadata: Mapping[str, Any] | None = None,
    ) -> AppTask[P, R, C]:
        """The same function with these options for the tasks that it makes; see `Task`."""
        given = {name: value for name, value in locals().items() if name != "self" and value is not None}
        return _with_options(self._origin or self, replace(self._options, **given))

    def bind(self, /, *args: P.args, **kwargs: P.kwargs) -> Task:
        """
        Make a task with these arguments, for a group.

        Raises:
            InvalidInputError: the arguments do not fit the function.
        """
        return replace(self._options, arguments=self.handler.arguments(*args, **kwargs), handler=self.handler)

    async def aenqueue(self, /, *args: P.args, **kwargs: P.kwargs) -> TaskHandle[R]:
        """Submit one task with these arguments."""
        task = self.bind(*args, **kwargs)
        client = await self.app.implicit_client()
        return await client.submit(task)

    def enqueue(self, /, *args: P.args, **kwargs: P.kwargs) -> SyncTaskHandle[R]:
        """Submit one task without await; within a running event loop it works too, but blocks the loop for a moment."""
        task = self.bind(*args, **kwargs)
        return self.app.implicit_sync_client().submit(task)


def _has_failed(task: asyncio.Task[Any]) -> bool:
    return task.done() and (task.cancelled() or task.exception() is not None)


def _before_close(loop: asyncio.AbstractEventLoop, last: Callable[[], Coroutine[Any, Any, None]]) -> None:
    """Run a coroutine when a loop is closed, by asyncio.run or by hand; the loop can still run it then."""
    close = loop.close

    def close_after_last() -> None:
        if not (loop.is_running() or loop.is_closed()):
            loop.run_until_complete(last())
        close()

    loop.close = close_after_last  # type: ignore[method-assign]


def _hooked(hooks: list[Any], hook: H) -> H:
    # When a notebook's cell runs again, its new hook replaces the one that it defined before.
    hooks[:] = [*(known for known in hooks if not is_again(known, hook)), hook]
    return hook


def _with_options(task: AppTask[P, R, C], options: Task) -> AppTask[P, R, C]:
    return AppTask(task.app, task.handler, options, origin=task)


def _mark_as_coroutine_function(task: AppTask[..., Any, Any]) -> None:
    """Let `inspect.iscoroutinefunction` and that of asyncio say of a task what they say of its function."""
    one = cast(Any, task)
    if sys.version_info >= (3, 12):
        inspect.markcoroutinefunction(one)
    else:
        # inspect asks whatever looks like a function for the flags of its code; asyncio asks for a mark.
        function = inspect.unwrap(cast(Any, task.function))
        for name in ("__code__", "__defaults__", "__kwdefaults__"):
            setattr(one, name, getattr(function, name, None))
    if (mark := getattr(asyncio.coroutines, "_is_coroutine", None)) is not None:
        one._is_coroutine = mark


if TYPE_CHECKING:

    class ContextTask(AppTask[P, R, C]):
        """The type of an `AppTask` whose function takes a `TaskContext` first, which the worker passes."""

        def __call__(self, context: TaskContext, /, *args: P.args, **kwargs: P.kwargs) -> C:  # type: ignore[override]
            ...
