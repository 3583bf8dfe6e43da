"""The parts that all commands share: options, one-line errors, logging, the event loop."""

from __future__ import annotations

import contextlib
import functools
import importlib
import os
import pkgutil
import signal
import sys
import time
import traceback
from collections.abc import Callable, Coroutine, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NoReturn, TypeVar

import click
from click.core import ParameterSource

from rq_ceylon import log
from rq_ceylon.errors import AppImportError, CeylonError, error_at

if TYPE_CHECKING:
    import asyncio

    from rq_ceylon.app import Ceylon
    from rq_ceylon.process import Watch
    from rq_ceylon.settings import Settings

T = TypeVar("T")
F = TypeVar("F", bound=Callable[..., Any])

EXIT_CODES = """\b
Exit codes: 0 goals achieved or outcome completed, 1 not, 2 usage or invalid
file, 3 no Redis, 4 cannot import, 5 waited too long, 6 no worker for a role,
7 a worker ended because too much hung, 130 Ctrl-C, 143 terminated."""

CLEAN_UP_S = 1.0
"""How long tasks that users' code has started beside its handlers may go on once they are cancelled at the end."""

CONTEXT = {"help_option_names": ["-h", "--help"], "max_content_width": 100}


@dataclass(frozen=True)
class RedisOptions:
    """The options that name Redis and the namespace; resolved only when a command needs them."""

    redis_url: str | None
    namespace: str | None

    def settings(self, app: Ceylon | None = None) -> Settings:
        """Each option if given, else the application's own setting, else the environment."""
        from rq_ceylon.settings import resolve

        if app is not None:
            return app.settings_with(redis_url=self.redis_url, namespace=self.namespace)
        return resolve(self.redis_url, namespace=self.namespace)

    def bound(self, app: Ceylon | None) -> Settings:
        """
        The same for a process that runs users' code, so that this code submits to the Redis of the process itself. The
        application gets the settings; other applications and child processes find them in the environment.
        """
        settings = self.settings(app)
        if app is not None:
            app.use(settings)
        os.environ.update(CEYLON_REDIS_URL=settings.redis_url, CEYLON_NAMESPACE=settings.namespace)
        return settings


def command(name: str) -> Callable[[F], click.Command]:
    """A command with a name of its own on PATH. Each option is also a variable, such as CEYLON_WORKER_GRACE."""

    def make(function: F) -> click.Command:
        prefix = name.upper().replace("-", "_")
        context = {**CONTEXT, "auto_envvar_prefix": prefix}
        versioned = click.version_option(package_name="rq-ceylon")(reported(function))
        return click.command(name, context_settings=context, epilog=EXIT_CODES)(versioned)

    return make


def where(function: Callable[..., Any]) -> Callable[..., Any]:
    """The options that say which Redis and which namespace, as the argument `options`."""

    @click.option("--redis", "redis_url", metavar="URL", help="URL of Redis; else CEYLON_REDIS_URL, else REDIS_URL.")
    @click.option("--namespace", metavar="NAME", help="Keeps applications apart; else CEYLON_NAMESPACE, else ceylon.")
    @functools.wraps(function)
    def run(*args: Any, redis_url: str | None, namespace: str | None, **kwargs: Any) -> Any:
        return function(*args, options=RedisOptions(redis_url, namespace), **kwargs)

    return run


def with_client(function: Callable[..., Coroutine[Any, Any, int | None]]) -> Callable[..., None]:
    """Make a command of a coroutine that takes an open client first and returns the exit code."""

    @where
    @reported
    @functools.wraps(function)
    def run(*args: Any, options: RedisOptions, **kwargs: Any) -> None:
        found = options.settings()

        async def main() -> int | None:
            from rq_ceylon.client import Client

            async with Client(found.redis_url, namespace=found.namespace) as client:
                return await function(client, *args, **kwargs)

        sys.exit(run_async(main()) or 0)

    return run


def logs(function: Callable[..., Any]) -> Callable[..., Any]:
    """The options of the log, which is set up before the command runs."""

    @click.option(
        "--log-level",
        type=click.Choice(["debug", "info", "warning", "error"], case_sensitive=False),
        default="info",
        envvar="CEYLON_LOG_LEVEL",
        show_default=True,
        help="Least severe level to log, on stderr.",
    )
    @click.option("-q", "--quiet", is_flag=True, help="Short for --log-level warning: no line for each task.")
    @click.option(
        "--log-format",
        type=click.Choice(["text", "json"]),
        default="text",
        envvar="CEYLON_LOG_FORMAT",
        show_default=True,
        help="Text, or one JSON object per line.",
    )
    @functools.wraps(function)
    def run(*args: Any, log_level: str, quiet: bool, log_format: log.Form, **kwargs: Any) -> Any:
        if quiet:
            source = click.get_current_context().get_parameter_source("log_level")
            if source is ParameterSource.COMMANDLINE:
                raise click.UsageError(f"--quiet and --log-level {log_level} contradict each other; give only one")
            log_level = "warning"
        log.set_up(log_level, log_format)
        # Commands that this one starts log alike.
        os.environ.update(CEYLON_LOG_LEVEL=log_level, CEYLON_LOG_FORMAT=log_format)
        return function(*args, **kwargs)

    return run


def say(words: object, *, err: bool = False) -> None:
    """Print words for people; text that others wrote may be in them, so control characters are escaped."""
    click.echo(log.plain(str(words)), err=err)


def clock(epoch_ms: int) -> str:
    """A time in words, in the time zone of this machine."""
    return time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(epoch_ms / 1000))


def table(head: Sequence[str], rows: Sequence[Sequence[object]]) -> None:
    """Columns in plain text: the same on a terminal and in a pipe."""
    lines = [[log.plain(str(cell), keep="") for cell in row] for row in (head, *rows)]
    widths = [max(len(line[i]) for line in lines) for i in range(len(head))]
    for line in lines:
        click.echo("  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip())


def reported(function: Callable[..., Any]) -> Callable[..., Any]:
    """Report an expected error as one message and its exit code, never as a traceback."""

    @functools.wraps(function)
    def run(*args: Any, **kwargs: Any) -> Any:
        try:
            return function(*args, **kwargs)
        except CeylonError as error:
            say(f"Error: {error}", err=True)
            sys.exit(error.exit_code)
        except KeyboardInterrupt:
            signal.signal(signal.SIGINT, signal.SIG_IGN)  # a second one would end the ending with a traceback
            sys.exit(130)
        except BrokenPipeError:
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            sys.exit(0)

    return run


def run_async(main: Coroutine[Any, Any, T]) -> T:
    """Run a coroutine on uvloop where it is installed. Ctrl-C cancels it, a second one ends the process at once."""
    import asyncio

    was_interrupted = False

    async def interruptible() -> T:
        loop, task = asyncio.get_running_loop(), asyncio.current_task()
        assert task is not None

        def interrupt() -> None:
            nonlocal was_interrupted
            was_interrupted = True
            loop.remove_signal_handler(signal.SIGINT)
            signal.signal(signal.SIGINT, lambda *_: os._exit(130))
            task.cancel()

        with contextlib.suppress(NotImplementedError):  # Windows: there the runner does the first half
            loop.add_signal_handler(signal.SIGINT, interrupt)
        return await main

    with _runner() as runner:
        try:
            return runner.run(interruptible())
        except asyncio.CancelledError:
            if was_interrupted:
                raise KeyboardInterrupt from None
            raise


def serve(main: Callable[[Watch], Coroutine[Any, Any, int]], *, grace_s: float = 0.0) -> NoReturn:
    """
    Run a coroutine that returns the exit code, then end the process with it: for commands in which users' code runs.

    Args:
        main: gets the watch of this process, by which it hears signals.
        grace_s: how long after a first signal it may go on; a watch ends the process soon after.
    """
    import asyncio

    from rq_ceylon.process import ALLOWANCE_S, Watch
    from rq_ceylon.worker.threads import Loop

    watch = Watch(grace_s)

    async def to_the_end() -> int:
        try:
            return await main(watch)
        finally:
            left = asyncio.all_tasks() - {asyncio.current_task()}  # of users' code
            for task in left:
                task.cancel()
            if left:
                with watch.limit(ALLOWANCE_S, "a task that users' code left behind"):
                    await asyncio.wait(left, timeout=CLEAN_UP_S)

    # The runner is not closed: that would wait for the threads of the loop's executor.
    runner = _runner(None if sys.platform == "win32" else Loop)
    try:
        code = reported(watch.run)(to_the_end(), runner.get_loop())
    except SystemExit as error:
        code = error.code if isinstance(error.code, int) else 1
    except BaseException:
        traceback.print_exc()
        code = 1
    watch.leave(code)


def _runner(loop_factory: Callable[[], asyncio.AbstractEventLoop] | None = None) -> asyncio.Runner:
    """A runner on uvloop where it is installed, else on the given loop, else on asyncio's own."""
    import asyncio

    try:
        import uvloop
    except ImportError:
        return asyncio.Runner(loop_factory=loop_factory)
    return asyncio.Runner(loop_factory=uvloop.new_event_loop)


def load_app(path: str) -> Ceylon:
    """
    Import `module:app`, with the working directory on the path.

    Raises:
        AppImportError: it cannot be imported, or is not an application.
    """
    from rq_ceylon.app import Ceylon

    sys.path.insert(0, os.getcwd())
    module, _, name = path.partition(":")
    if "/" in module or (module.endswith(".py") and os.path.isfile(module)):
        folder, file = os.path.split(module)
        at = f", in the folder {folder}" if folder else ""
        raise AppImportError(
            f"application {path!r} names a file; write its module: {file.removesuffix('.py')}:{name or 'app'}{at}"
        )
    if ":" not in path:
        raise AppImportError(f"application {path!r} does not name an object; write module:app, such as myjobs:app")
    try:
        importlib.import_module(module)
    except ModuleNotFoundError as error:
        if error.name and (module == error.name or module.startswith(error.name + ".")):
            raise AppImportError(
                f"application {path!r}: there is no module {error.name!r}; "
                f"looked in {os.getcwd()} and the installed packages"
            ) from error
        raise AppImportError(f"application {path!r}: {error_at(error)}") from error
    except KeyboardInterrupt:
        raise
    except BaseException as error:  # also a SystemExit, which would end the command without a word
        raise AppImportError(f"application {path!r} cannot be imported: {error_at(error)}") from error
    try:
        app = pkgutil.resolve_name(path)
    except (AttributeError, ValueError) as error:
        found = [name for name, value in vars(sys.modules[module]).items() if isinstance(value, Ceylon)]
        there = f" ({module}:{found[0]})" if found else ""
        raise AppImportError(f"application {path!r}: {error}; name the Ceylon() object of the module{there}") from error
    if not isinstance(app, Ceylon):
        raise AppImportError(f"application {path!r} is a {type(app).__name__}, not a Ceylon; name the Ceylon() object")
    return app
