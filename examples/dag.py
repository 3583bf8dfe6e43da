"""
Tasks that need others: two shops are asked, the cheaper offer is ordered, and both customers are told. A task gets the
results of those that it needed from its context.

    $ ceylon-worker dag:app &
    $ python dag.py
    ask-north: 12.5
    ask-south: 9.9
    order: ordered at south for 9.9
    tell-ann: ann: ordered at south for 9.9
    tell-bob: bob: ordered at south for 9.9
"""

import asyncio

from rq_ceylon import Ceylon, Task, TaskContext, TaskGroup

app = Ceylon()


@app.task(role="shopping")
async def ask(shop: str) -> float:
    return {"north": 12.5, "south": 9.9}[shop]


@app.task(role="shopping")
async def order(context: TaskContext) -> str:
    task, price = min(context.needs.items(), key=lambda offer: offer[1])
    return f"ordered at {task.removeprefix('ask-')} for {price}"


@app.task(role="shopping")
async def tell(context: TaskContext, name: str) -> str:
    return f"{name}: {context.needs['order']}"


async def main() -> None:
    asked = [Task(id=f"ask-{shop}", uses="ask", arguments={"shop": shop}) for shop in ("north", "south")]
    ordered = Task(id="order", uses="order", needs=["ask-north", "ask-south"])
    told = [Task(id=f"tell-{name}", uses="tell", arguments={"name": name}, needs=["order"]) for name in ("ann", "bob")]
    async with app.client() as client:
        run = await client.submit(TaskGroup("shopping", [*asked, ordered, *told]))
        results = [result async for result in run.results()]
    for result in sorted(results, key=lambda result: result.task_id):
        print(f"{result.task_id}: {result.value}")


if __name__ == "__main__":
    asyncio.run(main())
