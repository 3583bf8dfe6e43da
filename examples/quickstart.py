"""
Ten pictures, a goal at 80 %. Run `ceylon-worker quickstart:app` beside this file, then `python quickstart.py`.
"""

import asyncio

from rq_ceylon import Ceylon, Goal, TaskGroup

app = Ceylon()


@app.task(role="thumbnails", timeout="30s", max_attempts=3)
async def resize(path: str, width: int) -> str:
    return f"{path} at {width}px"


async def main() -> None:
    tasks = [resize.bind(f"{n}.jpg", width=200) for n in range(10)]
    async with app.client() as client:
        run = await client.submit(TaskGroup("thumbnails", tasks, goal=Goal("completed >= 80%")))
        print(await run.wait("all", timeout=30))


if __name__ == "__main__":
    asyncio.run(main())
