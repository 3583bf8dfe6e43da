"""
Run a worker from this folder with `ceylon-worker quickstart:app`, then this file.
"""

import asyncio

from rq_ceylon import Ceylon, Goal, TaskGroup

app = Ceylon()


@app.task(role="processor", timeout="30s", max_attempts=3)
async def resize(path: str, width: int) -> str:
    return f"{path} at {width}"


async def main() -> None:
    tasks = [resize.bind(path=f"{n}.jpg", width=200) for n in range(100)]
    group = TaskGroup("thumbnails", tasks, goal=Goal("completed >= 95%", deadline="10m", on_achieved="drain"))
    async with app.client() as client:
        run = await client.submit(group)
        print(await run.wait("goal"))


if __name__ == "__main__":
    asyncio.run(main())
