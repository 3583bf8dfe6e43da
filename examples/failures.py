"""
A batch of 2,000 items on a bad day: a tenth fails, some hang, and the goal of 95 % is missed. The results go into a
file as they come. Then the service is mended, and the failures alone run again: the goal is judged anew.

    $ ceylon-worker failures:app -c 100 --quiet &
    $ python failures.py
    items: finished (failed), 1800 of 2000 completed, goal nearly-all failed
    200 run again
    items: finished (completed), 2000 of 2000 completed, goal nearly-all achieved
    2000 results in results.jsonl
"""

import asyncio
import json
from pathlib import Path

from rq_ceylon import Ceylon, Goal, TaskGroup
from rq_ceylon.client import SyncGroupHandle

app = Ceylon()
MENDED = Path("service-is-mended")


def is_up(number: int) -> bool:
    return number % 10 > 0 or MENDED.exists()


@app.task(role="items", max_attempts=1, timeout="500ms")
async def process(number: int) -> int:
    if not is_up(number):
        if number % 250 == 0:
            await asyncio.sleep(3600)
        raise ConnectionError("the service is down")
    return number * number


def keep(run: SyncGroupHandle, file: Path) -> None:
    """Write each result as its task ends; a second call goes on where tasks were retried."""
    known = {json.loads(line)["id"] for line in file.read_text().splitlines()} if file.exists() else set()
    with file.open("a") as out:
        for result in run.results():
            if result.status == "completed" and result.task_id not in known:
                out.write(json.dumps({"id": result.task_id, "value": result.value}) + "\n")


def main() -> None:
    file = Path("results.jsonl")
    tasks = (process.bind(number) for number in range(2000))
    with app.sync_client() as client:
        run = client.submit(TaskGroup("items", tasks, goal=Goal("completed >= 95%", name="nearly-all")))
        keep(run, file)
        print(run.view())
        MENDED.touch()
        print(f"{run.retry()} run again")
        keep(run, file)
        print(run.view())
    print(f"{len(file.read_text().splitlines())} results in {file}")


if __name__ == "__main__":
    main()
