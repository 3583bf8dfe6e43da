"""The agents of a playground at work: each one works, and with a scale agents come and go."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

from loguru import logger

from rq_ceylon.client import Client
from rq_ceylon.errors import ConnectionLostError, InvalidInputError
from rq_ceylon.handlers import DEFAULT_HANDLER, Registry
from rq_ceylon.models import DEFAULT_TIMEOUT_S, counted
from rq_ceylon.task.agent import TaskExecutionAgent
from rq_ceylon.task.data import slug
from rq_ceylon.worker import Worker
from rq_ceylon.worker.scale import Scale

LOOK_S = 0.2
"""The pause between two looks at the list and at the load."""

QUIET_S = 2.0
"""How long one agent fewer must have sufficed before one is let go."""


@dataclass
class _Post:
    agent: TaskExecutionAgent
    worker: Worker
    run: asyncio.Task[None]
    ready: asyncio.Event


class Crew:
    """
    Args:
        agents: the agents that work. Changes of this list are followed; with a scale, the crew changes it too.
        registry: handlers that all agents know besides their own `execute_task`.
        scale: the least and the most agents of each role.

    Attributes:
        state: the value that the application's lifespan yielded; all agents share it.
    """

    def __init__(
        self,
        agents: list[TaskExecutionAgent],
        client: Client,
        registry: Registry,
        scale: tuple[int, int] | None,
    ) -> None:
        self._agents, self._client, self._registry = agents, client, registry
        self.state: Any = None
        self._scales: dict[str, tuple[Scale, TaskExecutionAgent]] = {}
        if scale is not None:
            _check_scale(scale, agents)
            # Keep one agent per role as a model, in case the list is emptied.
            self._scales = {agent.worker_role: (Scale(*scale, QUIET_S), agent) for agent in agents}
        self._posts: dict[int, _Post] = {}
        self._tending: asyncio.Task[None] | None = None
        self._named = len(agents)

    async def start(self) -> None:
        """
        Start the agents; returns once all are connected.

        Raises:
            RedisError: Redis is not suitable.
        """
        self._follow_list()
        for post in list(self._posts.values()):
            ready = asyncio.create_task(post.ready.wait())
            await asyncio.wait((ready, post.run), return_when=asyncio.FIRST_COMPLETED)
            ready.cancel()
            if post.run.done():
                post.run.result()
        self._tending = asyncio.create_task(self._tend(), name="crew")

    async def guard(self) -> None:
        """Wait until the crew was dismissed; raises the error that ended an agent before that."""
        if self._tending is not None:
            await asyncio.wait([self._tending])
            if not self._tending.cancelled():
                self._tending.result()

    async def stop(self, *, at_once: bool = False) -> None:
        """Let running tasks end, or give them back at once. Returns when every agent has left. May be called twice."""
        if self._tending is not None:
            self._tending.cancel()
            await asyncio.gather(self._tending, return_exceptions=True)
        for post in self._posts.values():
            _dismiss(post, Worker.kill if at_once else Worker.stop)
        await asyncio.gather(*(post.run for post in self._posts.values()), return_exceptions=True)

    async def _tend(self) -> None:
        while True:
            await asyncio.sleep(LOOK_S)
            if self._scales:
                try:
                    await self._follow_load()
                except ConnectionLostError as error:
                    logger.debug("The load cannot be read now: {}", error)
            self._follow_list()
            for key, post in list(self._posts.items()):
                if post.run.done():
                    post.run.result()
                    del self._posts[key]

    def _follow_list(self) -> None:
        wanted = {id(agent): agent for agent in self._agents}
        for key, agent in wanted.items():
            if key not in self._posts:
                self._posts[key] = self._hire(agent)
        for key, post in self._posts.items():
            if key not in wanted:
                _dismiss(post, Worker.stop)

    def _hire(self, agent: TaskExecutionAgent) -> _Post:
        registry, ready = Registry(), asyncio.Event()
        for handler in dict.fromkeys(self._registry.own()):
            if handler.name != DEFAULT_HANDLER:
                registry.add(handler)
        registry.add(agent.handler())
        registry.on_error, registry.middleware = self._registry.on_error, self._registry.middleware
        registry.hooks.append(("lifespan", lambda: nullcontext(self.state)))
        registry.hooks.append(("start", ready.set))
        worker = Worker(
            self._client.url,
            registry=registry,
            roles=[agent.worker_role],
            namespace=self._client.keys.namespace,
            name=slug(agent.name),
            slots=agent.max_concurrent_tasks,
            threads=agent.max_concurrent_tasks,
            grace_s=DEFAULT_TIMEOUT_S,
        )
        logger.info(
            "Agent {} starts: role {}, {} at once", agent.name, agent.worker_role, counted(worker.slots, "task")
        )
        return _Post(agent, worker, asyncio.create_task(worker.run(), name=f"agent {agent.name}"), ready)

    async def _follow_load(self) -> None:
        waiting = {role.name: role.queued for role in await self._client.roles()}
        for role, (scale, model) in self._scales.items():
            team = [agent for agent in self._agents if agent.worker_role == role]
            busy = sum(len(agent.active_tasks) for agent in team)
            slots_each = max(1, sum(agent.max_concurrent_tasks for agent in team) // max(1, len(team)))
            queued = waiting.get(role, 0)
            wanted = scale.look(len(team), slots_each, busy, queued, time.monotonic())
            if wanted != len(team):
                load = f"{busy} of {len(team) * slots_each} slots busy, {counted(queued, 'task')} waiting"
                logger.info("Scaling {} from {} to {} agents: {}", role, len(team), wanted, load)
            for _ in range(wanted - len(team)):
                self._named += 1
                self._agents.append(model.another(f"{role}-{self._named}"))
            team.sort(key=lambda agent: len(agent.active_tasks), reverse=True)
            for agent in team[wanted:]:
                self._agents.remove(agent)


def _dismiss(post: _Post, how: Callable[[Worker], None]) -> None:
    logger.debug("Agent {} leaves", post.agent.name)
    how(post.worker)


def _check_scale(scale: tuple[int, int], agents: Sequence[TaskExecutionAgent]) -> None:
    least, most = scale
    if not (isinstance(least, int) and isinstance(most, int) and 1 <= least <= most):
        raise InvalidInputError(f"scale: {scale!r} is not usable; give the least and the most agents, such as (2, 10)")
    if not agents:
        raise InvalidInputError("scale: there is no agent to copy; give `workers` at least one")
