"""
What a handler can say and know: which errors are worth another attempt, how long to wait for it, how far it is, and a
key under which a shop can tell a repeated order from a new one.

    $ ceylon-worker custom_task:app &
    $ python custom_task.py
    busy: ordered at attempt 3
    closed: failed (error): UnknownShop: nowhere
    limited: ordered at attempt 2
    refused: failed (error): FailTask: the card was declined
    tried: 4 orders, 7 attempts
"""

import asyncio

from rq_ceylon import Backoff, Ceylon, FailTask, RetryTask, Task, TaskContext, TaskGroup

app = Ceylon()


class ShopIsBusy(Exception):
    pass


class UnknownShop(Exception):
    pass


@app.task(
    role="orders",
    timeout="10s",
    max_attempts=4,
    backoff=Backoff(first="1s", cap="1m"),  # for what is not named below
    retry={ShopIsBusy: Backoff(first="100ms", factor=2), UnknownShop: None},  # None: fail at once
)
async def order(context: TaskContext, shop: str) -> str:
    context.progress(0.1, f"asking {shop}, key {context.idempotency_key}")
    context.log.info(f"Attempt {context.attempt} of {context.max_attempts} at {shop}")
    if shop == "busy" and context.attempt < 3:
        raise ShopIsBusy(shop)
    if shop == "limited" and context.attempt == 1:
        raise RetryTask(delay="200ms", reason="it said when to come back")
    if shop == "refused":
        raise FailTask("the card was declined")
    if shop == "closed":
        raise UnknownShop("nowhere")
    return f"ordered at attempt {context.attempt}"


async def main() -> None:
    shops = ["busy", "closed", "limited", "refused"]
    tasks = [Task(id=shop, uses="order", arguments={"shop": shop}) for shop in shops]
    async with app.client() as client:
        run = await client.submit(TaskGroup("orders", tasks))
        results = {result.task_id: result async for result in run.results()}
        view = await run.view()
    for shop, result in sorted(results.items()):
        error = result.error
        told = f"{result.status} ({result.reason}): {error['type']}: {error['message']}" if error else result.value
        print(f"{shop}: {told}")
    print(f"tried: {view.counters.total} orders, {view.counters.attempts} attempts")


if __name__ == "__main__":
    asyncio.run(main())
