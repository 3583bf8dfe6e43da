"""
Ten pictures, a goal at 80 %: the first page of the README.

    $ ceylon-worker quickstart:app &
    $ python quickstart.py
    thumbnails: finished (completed), 10 of 10 completed, goal enough achieved
"""

from rq_ceylon import Ceylon, Goal, TaskGroup

app = Ceylon()


@app.task(role="thumbnails", timeout="30s")
async def resize(path: str, width: int) -> str:
    return f"{path} at {width}px"


if __name__ == "__main__":
    tasks = [resize.bind(f"{n}.jpg", width=200) for n in range(10)]
    with app.sync_client() as client:
        run = client.submit(TaskGroup("thumbnails", tasks, goal=Goal("completed >= 80%", name="enough")))
        print(run.wait("all", timeout=30))
