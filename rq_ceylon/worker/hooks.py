"""Runs the start and stop hooks and the lifespan of an application in a worker process."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from contextlib import AsyncExitStack
from functools import partial
from typing import Any, Self

from loguru import logger

from rq_ceylon import process
from rq_ceylon.errors import CeylonError, error_at
from rq_ceylon.handlers import Registry, awaited

HOOK_S = 30.0
"""How long a stop hook may take. A start hook may take longer, such as one that loads a model; that is only logged."""

_Hook = Callable[[], Any]


class HookError(CeylonError):
    """A start or stop hook of the application raised, or a stop hook took too long."""


class Hooks:
    """
    `async with Hooks(registry)`: entering runs the start hooks and enters the lifespan; leaving leaves the lifespan and
    runs the stop hooks. The first registered starts first and stops last. A stop hook runs if everything that was
    registered before it has started, even if other hooks fail.

    Attributes:
        state: the value that the lifespan yielded; None without one.

    Raises:
        HookError: on entry, a start hook raised; on exit, stop hooks failed, each of which was logged.
    """

    def __init__(self, registry: Registry) -> None:
        self._registry = registry
        self.state: Any = None
        self._stack = AsyncExitStack()
        self._failed: list[str] = []

    async def __aenter__(self) -> Self:
        try:
            for kind, hook in self._registry.hooks:
                name = getattr(hook, "__qualname__", repr(hook))
                match kind:
                    case "start":
                        await self._start(name, hook)
                    case "stop":
                        self._stack.push_async_callback(self._stop, name, hook)
                    case "lifespan":
                        lifespan = hook()
                        self.state = await self._start(name, lifespan.__aenter__)
                        self._stack.push_async_callback(self._stop, name, partial(lifespan.__aexit__, None, None, None))
        except BaseException:
            await self._stack.aclose()  # stop what has started
            raise
        return self

    async def __aexit__(self, kind: type[BaseException] | None, *_: object) -> None:
        await self._stack.aclose()
        if self._failed and kind is None:
            raise HookError(f"all work is done, but these stop hooks failed: {', '.join(self._failed)}")

    async def _start(self, name: str, hook: _Hook) -> Any:
        words = "The start hook {} has not ended for {:g} s; this worker takes no tasks before it has"
        slow = asyncio.get_running_loop().call_later(HOOK_S, logger.warning, words, name, HOOK_S)
        try:
            return await awaited(hook())
        except BaseException as error:
            if _is_ours(error):
                raise
            raise HookError(f"the start hook {name} failed: {error_at(error)}") from error
        finally:
            slow.cancel()

    async def _stop(self, name: str, hook: _Hook) -> None:
        limit = asyncio.timeout(HOOK_S)
        try:
            # A plain function blocks the event loop, and with it this timeout. So the watch of the process has its own.
            with process.limit(HOOK_S + process.ALLOWANCE_S, f"the stop hook {name}"):
                async with limit:
                    await awaited(hook())
        except BaseException as error:
            if _is_ours(error):
                raise
            if limit.expired():
                logger.error("The stop hook {} did not end within {:g} s", name, HOOK_S)
            else:
                logger.opt(exception=error).error("The stop hook {} failed", name)
            self._failed.append(name)


def _is_ours(error: BaseException) -> bool:
    """Whether an exception is meant for the worker: Ctrl-C, or its own cancellation. A SystemExit is not."""
    task = asyncio.current_task()
    is_cancelled = isinstance(error, asyncio.CancelledError) and task is not None and task.cancelling() > 0
    return isinstance(error, KeyboardInterrupt) or is_cancelled
