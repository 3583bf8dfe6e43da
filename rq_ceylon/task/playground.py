"""The playground of the tutorial: it takes groups and runs until they have finished."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Iterable, Sequence
from contextlib import asynccontextmanager, suppress
from typing import Any, Self

from loguru import logger

from rq_ceylon.app import Ceylon
from rq_ceylon.client import Client
from rq_ceylon.errors import CeylonError, RedisError
from rq_ceylon.models import counted
from rq_ceylon.settings import resolve
from rq_ceylon.task.agent import TaskExecutionAgent
from rq_ceylon.task.crew import Crew
from rq_ceylon.task.data import TaskGroup, TaskMessage
from rq_ceylon.task.manager import TaskManager
from rq_ceylon.worker.hooks import Hooks

CLOSE_S = 5.0
"""How long a playground that is left early waits to hear how its groups ended."""


class TaskPlayGround:
    """
    Runs groups of tasks with agents of this process, with workers elsewhere, or with both. It may be played again, but
    not twice at a time.

    Args:
        name: shown in logs.
        app: names Redis, and has the handlers that agents know besides `execute_task`. If no Redis is configured, the
            playground uses a throw-away server of this process.
    """

    def __init__(self, name: str = "task_manager", *, app: Ceylon | None = None) -> None:
        self.name, self.task_manager = name, TaskManager()
        self._app = app or Ceylon()
        self._crew: Crew | None = None

    @asynccontextmanager
    async def play(
        self, workers: Sequence[TaskExecutionAgent] | None = None, *, scale: tuple[int, int] | None = None
    ) -> AsyncIterator[Self]:
        """
        Start the agents; at the end, wait until all groups have finished, then let the agents go. After an exception,
        all groups and agents are stopped at once.

        Args:
            workers: agents of this process. If it is a list, the playground follows it: an agent appended to it starts,
                an agent removed from it finishes its running tasks and leaves.
            scale: the least and the most agents of each role; the list then grows and shrinks with the load.

        Raises:
            RedisError: Redis is not reachable, or not suitable.
        """
        if self._crew is not None:
            raise CeylonError(f"playground {self.name!r} is already running; make another")
        agents = workers if isinstance(workers, list) else list(workers or ())
        url, namespace = self._place()
        async with Client(url, namespace=namespace, registry=self._app.registry) as client:
            crew = self._crew = Crew(agents, client, self._app.registry, scale)
            try:
                async with Hooks(self._app.registry) as hooks:
                    crew.state = hooks.state
                    self.task_manager.open(client)
                    try:
                        await crew.start()
                        hands = counted(len(agents), "agent")
                        logger.info("Playground {} runs in namespace {} with {}", self.name, namespace, hands)
                        yield self
                        await self._drain(crew)
                    except BaseException:
                        await asyncio.create_task(self.force_close())  # in a cancelled task no call would reach Redis
                        raise
                    finally:
                        await crew.stop()
                        await self.task_manager.close()
            finally:
                self._crew = None
        completed = counted(len(self.task_manager.completed_tasks), "completed task")
        logger.info("Playground {} finished with {}", self.name, completed)

    def _place(self) -> tuple[str, str]:
        try:
            settings = self._app.settings
        except RedisError:
            settings = resolve("embedded://")
        return settings.redis_url, settings.namespace

    async def _drain(self, crew: Crew) -> None:
        """Wait until all groups have finished, the crew was dismissed, or an agent has ended."""
        drained, guard = asyncio.create_task(self.task_manager.wait()), asyncio.create_task(crew.guard())
        try:
            await asyncio.wait((drained, guard), return_when=asyncio.FIRST_COMPLETED)
            if drained.done():
                drained.result()
            else:
                guard.result()
                await self._hear_the_end()
        finally:
            drained.cancel()
            guard.cancel()
            await asyncio.gather(drained, guard, return_exceptions=True)

    async def assign_task_groups(self, groups: Iterable[TaskGroup]) -> None:
        """Submit groups; see `TaskManager.assign_task_groups`."""
        await self.task_manager.assign_task_groups(groups)

    async def finish(self) -> None:
        """
        Leave early: tasks that run here finish, tasks that do not run are cancelled, and tasks that run elsewhere
        are asked to stop.
        """
        if self._crew is not None:
            await self._crew.stop()
            await self.task_manager.cancel()
            await self._hear_the_end()

    async def force_close(self) -> None:
        """Leave at once: running tasks are stopped, and tasks that do not run are cancelled."""
        if self._crew is not None:
            await self.task_manager.cancel()
            await self._crew.stop(at_once=True)
            await self._hear_the_end()

    async def _hear_the_end(self) -> None:
        with suppress(TimeoutError, CeylonError):
            async with asyncio.timeout(CLOSE_S):
                await self.task_manager.wait()

    # ---- what came of it ---------------------------------------------------------------------------------------------
    def get_completed_tasks(self) -> dict[str, TaskMessage]:
        """The completed tasks by id, in the order in which they completed."""
        return dict(self.task_manager.completed_tasks)

    def get_task_results(self) -> dict[str, Any]:
        """The results of the completed tasks, by id."""
        return {key: task.result for key, task in self.task_manager.completed_tasks.items()}

    async def print_statistics(self) -> None:
        """Print how many tasks completed, and how long they took."""
        print("\n".join(self.task_manager.statistics()))

    async def print_all_statistics(self) -> None:
        """Print the same, and statistics of each group, its goal, and each worker."""
        print("\n".join(self.task_manager.all_statistics()))
