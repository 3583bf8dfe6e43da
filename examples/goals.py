"""
Several goals on one group: a share, a limit on failures, one with a deadline whose policy ends the rest, and one that
only Python can judge, which needs a monitor that knows the application.

    $ ceylon-worker goals:app -c 4 &
    $ ceylon-monitor --app goals:app &
    $ python goals.py
    enough: achieved by commit
    healthy: achieved by judge
    over-the-hill: achieved by callable
    in-time: failed by deadline
    survey: failed, 24 of 40 completed
"""

import asyncio

from rq_ceylon import Ceylon, Goal, GroupView, TaskGroup

app = Ceylon()


@app.task(role="survey")
async def ask(number: int) -> str:
    return "yes" if number % 3 else "no"


@app.goal_check
def more_done_than_open(group: GroupView) -> bool:
    return group.counters.completed > group.counters.open


async def main() -> None:
    goals = [
        Goal("completed >= 50%", name="enough"),
        Goal("failed <= 10%", name="healthy"),
        Goal(call="more_done_than_open", name="over-the-hill", deadline="1m"),
        Goal(
            "completed >= 100%", name="in-time", deadline="3s", on_failed="cancel", failure_message="Not all answered."
        ),
    ]
    today = [ask.bind(number) for number in range(24)]
    later = [ask.using(delay="1h").bind(number) for number in range(24, 40)]
    async with app.client() as client:
        run = await client.submit(TaskGroup("survey", [*today, *later], goal=goals))
        view = await run.wait("all", timeout=60)
    for goal in view.goals:
        print(f"{goal.name}: {goal.status} by {goal.settled.by if goal.settled else '-'}")
    print(f"{view.name}: {view.outcome}, {view.counters.completed} of {view.counters.total} completed")


if __name__ == "__main__":
    asyncio.run(main())
