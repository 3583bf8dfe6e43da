"""The whole of docs/tutorial.md: `python tutorial.py`. It needs no Redis; where one is configured, that one is used."""

import asyncio
import uuid
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from loguru import logger

from rq_ceylon.task import TaskExecutionAgent, TaskManager, TaskPlayGround
from rq_ceylon.task.data import GoalStatus, TaskGroup, TaskGroupGoal, TaskMessage


@dataclass
class CustomTask(TaskMessage):
    task_type: str
    parameters: dict[str, Any]


class Analyst(TaskExecutionAgent):
    async def execute_task(self, task: TaskMessage) -> Any:
        await super().execute_task(task)
        if isinstance(task, CustomTask):
            return {"did": task.task_type, "with": task.parameters}
        return None


class TaskProcessor:
    def __init__(self, num_workers: int = 2, tasks_per_worker: int = 2) -> None:
        self.playground = TaskPlayGround(name="task_processor")
        self.tasks_per_worker = tasks_per_worker
        self.workers = [
            TaskExecutionAgent(f"worker{i}", "processor", max_concurrent_tasks=tasks_per_worker)
            for i in range(num_workers)
        ]

    def create_processing_tasks(self, num_tasks: int) -> list[TaskMessage]:
        return [
            TaskMessage(
                task_id=str(uuid.uuid4()),
                name=f"Process Data Item {i}",
                description=f"Processing task {i}",
                duration=1,
                required_role="processor",
                metadata={"item_number": i},
            )
            for i in range(num_tasks)
        ]

    def create_goal_checker(self, required_tasks: int) -> Callable[..., bool]:
        def check_completion(task_groups: dict[str, TaskGroup], completed_tasks: dict[str, TaskMessage]) -> bool:
            completed_group_tasks = sum(1 for task in completed_tasks.values() if task.group_id in task_groups)
            logger.info(f"Progress: {completed_group_tasks}/{required_tasks} tasks completed")
            return completed_group_tasks >= required_tasks

        return check_completion

    def create_task_group(self, num_tasks: int, required_tasks: int) -> TaskGroup:
        return TaskManager.create_task_group(
            name="Data Processing",
            description=f"Process {num_tasks} data items, goal achieves at {required_tasks}",
            subtasks=self.create_processing_tasks(num_tasks),
            goal=TaskGroupGoal(
                name="Partial Processing Complete",
                description=f"Complete at least {required_tasks} processing tasks",
                check_condition=self.create_goal_checker(required_tasks),
                success_message="Successfully completed minimum required tasks!",
                failure_message="Failed to complete minimum required tasks.",
            ),
            priority=1,
        )

    async def monitor_progress(self, active_playground: TaskPlayGround, processing_group: TaskGroup) -> None:
        while True:
            await asyncio.sleep(1)
            current_group = active_playground.task_manager.task_groups[processing_group.task_id]

            logger.info(f"Group Status: {current_group.status}")
            if current_group.goal:
                logger.info(f"Goal Status: {current_group.goal.status}")

            if current_group.goal and current_group.goal.status == GoalStatus.ACHIEVED:
                logger.info("Goal achieved! System can stop while tasks continue.")
                break

    async def print_statistics(self, active_playground: TaskPlayGround) -> None:
        completed = active_playground.get_completed_tasks().values()
        durations = [task.end_time - task.start_time for task in completed if task.end_time and task.start_time]
        logger.info("Final Statistics:")
        logger.info(f"Completed Tasks: {len(completed)}")
        logger.info(f"Average Duration: {sum(durations) / len(durations):.1f}s")

    async def run(self, num_tasks: int = 10, required_tasks: int = 5) -> None:
        logger.info("Starting task processor...")
        logger.info(f"Workers initialized: {len(self.workers)}")
        processing_group = self.create_task_group(num_tasks, required_tasks)
        logger.info(f"Tasks created: {num_tasks}")
        logger.info(f"Required completions: {required_tasks}")

        async with self.playground.play(workers=self.workers) as active_playground:
            await active_playground.assign_task_groups([processing_group])
            await self.monitor_progress(active_playground, processing_group)
            await self.print_statistics(active_playground)

        await self.playground.print_all_statistics()

    def create_custom_task(self, task_type: str, params: dict[str, Any]) -> CustomTask:
        return CustomTask(
            task_id=str(uuid.uuid4()),
            name=f"Custom {task_type} Task",
            description=f"Execute {task_type} with parameters",
            duration=0.2,
            required_role="analyst",
            task_type=task_type,
            parameters=params,
        )

    def add_task_dependencies(self, task_group: TaskGroup, dependencies: dict[str, list[str]]) -> TaskGroup:
        task_group.dependencies = dependencies
        return task_group

    async def run_workflow(self) -> None:
        load, clean, report = [self.create_custom_task(step, {"year": 2025}) for step in ("load", "clean", "report")]
        workflow = TaskManager.create_task_group("Workflow", "Load, clean, report", [report, clean, load])
        self.add_task_dependencies(workflow, {clean.task_id: [load.task_id], report.task_id: [clean.task_id]})

        async with TaskPlayGround(name="workflow").play(workers=[Analyst("ann", "analyst")]) as active_playground:
            await active_playground.assign_task_groups([workflow])
        for result in active_playground.get_task_results().values():
            logger.info(f"Workflow: {result}")

    async def scale_workers(self, current_load: float, min_workers: int = 2, max_workers: int = 10) -> None:
        target_workers = min(max_workers, max(min_workers, int(current_load * 1.5)))

        while len(self.workers) < target_workers:
            worker = TaskExecutionAgent(
                f"worker{len(self.workers) + 1}", "processor", max_concurrent_tasks=self.tasks_per_worker
            )
            self.workers.append(worker)

    async def run_burst(self) -> None:
        burst = TaskManager.create_task_group("Burst", "Many at once", self.create_processing_tasks(12))

        async with self.playground.play(workers=self.workers) as active_playground:
            await active_playground.assign_task_groups([burst])
            await self.scale_workers(current_load=4)
        logger.info(f"Burst: {len(active_playground.get_completed_tasks())} tasks by {len(self.workers)} workers")


async def main() -> None:
    processor = TaskProcessor(num_workers=2, tasks_per_worker=2)
    await processor.run(num_tasks=10, required_tasks=5)
    await processor.run_workflow()
    await processor.run_burst()


if __name__ == "__main__":
    asyncio.run(main())
