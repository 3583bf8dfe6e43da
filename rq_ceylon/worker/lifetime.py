"""
What an application sets up once per process before its tasks, and takes down after them.
"""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from typing import Any

from rq_ceylon.handlers import Registry, awaited


@asynccontextmanager
async def lifetime(registry: Registry) -> AsyncIterator[Any]:
    """
    Start an application; stop it at the end. Gives what its lifespan yields, which becomes `context.state`.
    """
    async with AsyncExitStack() as stack:
        for hook in registry.on_start:
            await awaited(hook())
        for hook in registry.on_stop:
            stack.push_async_callback(_call, hook)
        state = None
        if registry.lifespan is not None:
            state = await stack.enter_async_context(registry.lifespan())
        yield state


async def _call(hook: Any) -> None:
    await awaited(hook())
