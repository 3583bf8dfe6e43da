"""
A crawler that finds its work while it goes: each page spawns tasks for the pages to which it links. A page that several
others link to is fetched once, since its number is the id of its task. The group ends by itself when no page is left.

    $ ceylon-worker crawler:app -c 20 &
    $ python crawler.py
    site: finished (completed), 500 of 500 completed, goal whole-site achieved
    page 499 is 8 clicks from the start
"""

import asyncio

from rq_ceylon import Ceylon, Goal, TaskContext, TaskGroup

app = Ceylon()
PAGES = 500


async def links_of(page: int) -> list[int]:
    """As if it fetched the page: to its two children, its parent, and the start."""
    await asyncio.sleep(0.01)
    return [link for link in (2 * page + 1, 2 * page + 2, (page - 1) // 2, 0) if 0 <= link < PAGES]


@app.task(role="crawler")
async def crawl(context: TaskContext, page: int, clicks: int = 0) -> int:
    for link in await links_of(page):
        context.spawn(crawl.using(id=f"page-{link}").bind(link, clicks + 1))
    return clicks


def main() -> None:
    start = crawl.using(id="page-0").bind(0)
    goal = Goal("completed >= 100%", name="whole-site", deadline="1m")
    with app.sync_client() as client:
        run = client.submit(TaskGroup("site", [start], goal=goal, open="until_idle"))
        print(run.wait("all", timeout=60))
        print(f"page {PAGES - 1} is {run.task(f'page-{PAGES - 1}').result()} clicks from the start")


if __name__ == "__main__":
    main()
