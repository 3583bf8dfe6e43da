"""
How our processes receive signals and how they end.

The end of a process never waits for users' code. A thread beside the event loop, the watch, receives each signal even
while a handler blocks the loop, and ends the process when the time for its end is over. A process that ends by itself
does not join threads of users' code.
"""

from __future__ import annotations

import asyncio
import atexit
import collections
import contextlib
import os
import signal
import socket
import sys
import threading
import time
import traceback
from collections.abc import Callable, Coroutine, Iterator
from pathlib import Path
from types import FrameType
from typing import Any, NoReturn, TypeVar

from loguru import logger

from rq_ceylon.errors import CeylonError, error_at

ALLOWANCE_S = 5.0
"""How long the end of a process may take after the grace: cancelled tasks clean up, unfinished work is given back, and
stop hooks run. A second signal leaves only this time."""

LAST_LINE_S = 1.0
"""How long the watch tries to write its last line, because the code that hangs may hold the lock of the log."""

CHILD_END_S = ALLOWANCE_S + LAST_LINE_S + 0.5
"""How long after its grace a child may take before its parent kills it: long enough for the child's own watch to end
it."""

TAKE_S = 1.0
"""How long users' code may keep the wakeup descriptor of signals before the watch takes it back."""

PYTHON = [sys.executable, "-P", "-m", "rq_ceylon.cli"]
"""Starts a command in a process of its own. -P: a file of the working directory that is called `queue.py` or `redis.py`
must not take the place of the module of that name. An application is still found there: `load_app` sees to that."""

SUPERVISED = "CEYLON_SUPERVISED"
"""Set in the environment of a child: its standard input is a pipe that closes when its parent ends."""

_SIGNALS = (signal.SIGTERM, signal.SIGINT)

T = TypeVar("T")


class Watch:
    """
    The thread beside the event loop of one process. Create it in the main thread, at most once per process.

    Args:
        grace_s: how long after the first signal the clean-up begins; the clean-up may take `ALLOWANCE_S`.
        at_once: called in the watch's thread at the first signal, even while the loop is blocked. It must not wait for
            anything, because the watch does nothing else meanwhile.
    """

    def __init__(self, grace_s: float = 0.0, *, at_once: Callable[[], object] = lambda: None) -> None:
        self._grace_s, self.at_once = grace_s, at_once
        self._stop: Callable[[int], object] = lambda _: None
        self._pid = os.getpid()
        self._guard = threading.Lock()
        self._signals: list[int] = []
        self._passed_on: collections.Counter[int] = collections.Counter()
        self._loop: asyncio.AbstractEventLoop | None = None
        self._limits: dict[object, tuple[float, str]] = {}
        self._what = "what runs in it"
        self._code: int | None = None
        self._near, self._far = socket.socketpair()
        self._far.setblocking(False)
        self._loop_fd = -1
        self.handlers: dict[int, Any] = {}
        _watching.append(self)
        threading.Thread(target=self._run, name="ceylon-watch", daemon=True).start()

    # ---- in the main thread ------------------------------------------------------------------------------------------
    def listen(self, stop: Callable[[int], object]) -> None:
        """From now on, each SIGTERM and SIGINT calls `stop` with its number, in the running loop."""
        self._stop = stop
        self._loop = loop = asyncio.get_running_loop()
        with contextlib.suppress(NotImplementedError):  # on Windows, Ctrl-C cancels the main task instead
            for number in _SIGNALS:
                loop.add_signal_handler(number, self._tell, number)
                self.handlers[number] = signal.getsignal(number)
            self._keep_taking()

    def take(self) -> None:
        """Receive the signals that the running loop would read; the watch passes them on to the loop."""
        if (found := signal.set_wakeup_fd(self._far.fileno(), warn_on_full_buffer=False)) != self._far.fileno():
            self._loop_fd = found

    def _keep_taking(self) -> None:
        # When users' code adds a signal handler to the loop, the loop takes the descriptor back. The watch must still
        # hear a SIGTERM that such a handler handles.
        self.take()
        asyncio.get_running_loop().call_later(TAKE_S, self._keep_taking)

    def run(self, main: Coroutine[Any, Any, int], loop: asyncio.AbstractEventLoop) -> int:
        """
        Run `main` to its end, even if users' code stops the loop earlier: by `loop.stop()`, or by a SystemExit in a
        task that a handler has started, for example with `gather`. Such a SystemExit concerns only the handler.

        Raises:
            CeylonError: `main` itself let a SystemExit through.
        """
        task = own_task(main, loop=loop)
        task.add_done_callback(lambda _: loop.stop())
        while not task.done():
            try:
                loop.run_forever()
            except (SystemExit, KeyboardInterrupt) as error:
                end_fork(self._pid, error)
                if isinstance(error, KeyboardInterrupt) and not self.handlers:
                    raise  # Ctrl-C, and no handler for it is installed
                if task.done():
                    raise CeylonError(f"the process must end: {error_at(error)}") from error
                logger.error(
                    "A task started by a handler, hook or goal check tried to end the process: {}", error_at(error)
                )
            if self.handlers and not task.done():
                loop.call_soon(self.take)  # a stopped loop gives up the descriptor
        return task.result()

    @contextlib.contextmanager
    def limit(self, seconds: float, what: str) -> Iterator[None]:
        """End the process if the block takes longer than `seconds`; the last log line then names `what`."""
        key = object()
        with self._guard:
            self._limits[key] = time.monotonic() + seconds, what
        self._wake()
        try:
            yield
        finally:
            with self._guard:
                self._limits.pop(key, None)

    def leave(self, code: int) -> NoReturn:
        """End the process: run the functions registered with `atexit`, flush, and join no thread."""
        self._code, self._loop_fd = code, -1
        with self._guard:
            self._what = "its atexit functions"
            # The earliest limit stays in force, so that the atexit functions cannot gain time.
            due = min([time.monotonic() + ALLOWANCE_S, *(due for due, _ in self._limits.values())])
            self._limits = {self: (due, self._what)}
        self._wake()
        _end_children()
        atexit._run_exitfuncs()
        _flush()
        os._exit(code)

    def _tell(self, number: int) -> None:
        if self._passed_on[number]:  # the watch has already heard it
            self._passed_on[number] -= 1
        else:  # users' code has taken the wakeup descriptor back, so the watch has not heard it
            self._hear(number)
            self._wake()

    def _wake(self) -> None:
        with contextlib.suppress(BlockingIOError):  # full, so the thread will wake anyway
            self._far.send(b"\0")

    # ---- in the watch's thread ---------------------------------------------------------------------------------------
    def _run(self) -> None:
        while True:
            with self._guard:
                due, what = min(self._limits.values(), default=(None, ""))
            rest = None if due is None else due - time.monotonic()
            if rest is not None and rest <= 0:
                self._end(what)
            self._near.settimeout(rest)
            try:
                heard = self._near.recv(64)
            except TimeoutError:
                continue
            for number in heard:
                if number in _SIGNALS:
                    self._hear(number)
            if any(heard) and self._loop_fd != -1:
                self._passed_on.update(heard)
                with contextlib.suppress(OSError):  # full, so the loop will wake anyway; or the loop is closed
                    os.write(self._loop_fd, heard)

    def _hear(self, number: int) -> None:
        self._signals.append(number)
        rest_s = ALLOWANCE_S if len(self._signals) > 1 else self._grace_s + ALLOWANCE_S
        with self._guard:
            # Each signal sets a limit of its own, so a later one never leaves more time than an earlier one.
            self._limits[len(self._signals)] = time.monotonic() + rest_s, self._what
        if self._loop is not None:
            with contextlib.suppress(RuntimeError):  # the loop is closed
                self._loop.call_soon_threadsafe(self._stop, number)
        if len(self._signals) == 1:
            try:
                self.at_once()
            except Exception:  # the watch must survive the error
                logger.exception("The immediate action at signal {} failed", number)

    def _end(self, what: str) -> NoReturn:
        code = self._code
        if code is None:
            code = 128 + self._signals[-1] if self._signals else 1

        def last_words() -> None:
            logger.error("This process ends now: {} took too long to end{}", what, _whereabouts())
            _end_children()
            _flush()

        # The log may hang, so another thread writes to it: this one must end the process in any case.
        last = threading.Thread(target=last_words, daemon=True)
        last.start()
        last.join(LAST_LINE_S)
        os._exit(code)


_watching: list[Watch] = []
"""The watch that this process created, and not a parent that forked it; empty without one."""


@contextlib.contextmanager
def limit(seconds: float, what: str) -> Iterator[None]:
    """`Watch.limit` of this process. Without a watch, as in a program that runs its own worker, there is no limit."""
    with _watching[0].limit(seconds, what) if _watching else contextlib.nullcontext():
        yield


def own_task(
    body: Coroutine[Any, Any, T], *, name: str | None = None, loop: asyncio.AbstractEventLoop | None = None
) -> asyncio.Task[T]:
    """
    Start a task of ours that `asyncio.all_tasks()` leaves out, because a handler may cancel every task listed there.
    Its creator must end it: when a loop closes, only listed tasks are ended.

    Args:
        loop: the loop to run it; None: the running loop.
    """
    task = (loop or asyncio.get_running_loop()).create_task(body, name=name)
    asyncio._unregister_task(task)
    return task


def end_fork(parent: int, error: BaseException | None = None) -> None:
    """
    End this process if users' code forked it from `parent` and now returns to our code, even by `sys.exit()`. Two
    processes must not use the same connections, or answer for the same task. The process ends with the status and
    traceback that Python would give it.
    """
    if os.getpid() == parent:
        return
    code = 0
    if isinstance(error, SystemExit) and (error.code is None or isinstance(error.code, int)):
        code = error.code or 0
    elif error is not None:
        code = 1
        with contextlib.suppress(BaseException):  # the exception cannot be printed
            traceback.print_exception(error)
    _flush()
    os._exit(code & 0xFF)


def stop_with_supervisor() -> None:
    """In a child, end when the parent has ended, for whatever reason."""
    if os.environ.pop(SUPERVISED, None) is None:
        return
    # Hide the variable and the pipe from users' code and the programs that it starts. A command of ours would take
    # itself for a child, a program that reads its standard input would wait forever, and users' code that closes the
    # input would hide the parent's end.
    pipe, nothing = os.dup(0), os.open(os.devnull, os.O_RDONLY)
    os.dup2(nothing, 0)
    os.close(nothing)

    def watch() -> None:
        while os.read(pipe, 1024):
            pass
        os.kill(os.getpid(), signal.SIGTERM)

    threading.Thread(target=watch, name="ceylon-supervised", daemon=True).start()


def _whereabouts() -> str:
    """
    The line of users' code, or of a package that it uses, at which the main thread stands, to show what blocks the
    loop. Empty if there is none, for example because the loop is waiting.
    """
    frame: FrameType | None = sys._current_frames()[threading.main_thread().ident or 0]
    ours, python = str(Path(__file__).parent), str(Path(os.__file__).parent)
    while frame is not None and (file := frame.f_code.co_filename) != __file__:
        if not file.startswith(ours) and (not file.startswith(python) or "site-packages" in file):
            return f"; its main thread is at {file}:{frame.f_lineno}, in {frame.f_code.co_name}"
        frame = frame.f_back
    return ""


def _flush() -> None:
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError, ValueError, AttributeError):  # the stream is closed or missing
            stream.flush()


def _end_children() -> None:
    """Send SIGTERM to children of `multiprocessing`, because `atexit` would wait for them."""
    if (module := sys.modules.get("multiprocessing.process")) is not None:
        for child in module.active_children():
            child.terminate()


# ---- forks -----------------------------------------------------------------------------------------------------------
# A child that users' code forks must not keep our handlers: its SIGTERM would go down the wakeup descriptor that it
# shares with us, and stop this process instead of the child. Signals are blocked during the fork, so that none arrives
# before the child has the default handlers.
_forking = threading.local()


def _before_fork() -> None:
    if _watching:
        _forking.mask = signal.pthread_sigmask(signal.SIG_BLOCK, _SIGNALS)


def _after_fork() -> None:
    if (mask := _forking.__dict__.pop("mask", None)) is not None:
        signal.pthread_sigmask(signal.SIG_SETMASK, mask)


def _after_fork_in_child() -> None:
    defaults: dict[int, Any] = {signal.SIGTERM: signal.SIG_DFL, signal.SIGINT: signal.default_int_handler}
    for watch in _watching:
        for number, handler in watch.handlers.items():
            if signal.getsignal(number) is handler:  # otherwise users' code has set its own
                signal.signal(number, defaults[number])
        signal.set_wakeup_fd(-1)
    _watching.clear()
    _after_fork()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(before=_before_fork, after_in_parent=_after_fork, after_in_child=_after_fork_in_child)
