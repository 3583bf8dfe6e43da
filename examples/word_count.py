"""
A batch: the words of a folder of text files, counted by several processes at once. Two files are not text, and that is
no reason to fail: the goal asks for 95 % of them.

    $ ceylon-worker word_count:app --processes 3 -c 2 &
    $ python word_count.py
    not counted: file-13: FailTask: not UTF-8
    not counted: file-42: FailTask: not UTF-8
    Goal achieved: 58 of 60 files, counted by 3 processes
      74083 the
      36990 of
      24491 and

The text is made up, the same every time.
"""

import random
import tempfile
from collections import Counter
from pathlib import Path

from rq_ceylon import Ceylon, FailTask, Goal, TaskGroup

app = Ceylon()

WORDS = ["the", "of", "and", "to", "in", "a", "is", "that", "for", "it", "as", "was", "with", "be", "by", "on", "not"]


@app.task(role="words", timeout="1m")
def count_words(path: Path) -> dict[str, int]:
    try:
        text = path.read_text("utf-8")
    except UnicodeDecodeError as error:
        raise FailTask("not UTF-8") from error
    return dict(Counter(text.lower().split()).most_common(10))


def make_files(folder: Path, count: int = 60, words: int = 5000) -> list[Path]:
    """Text in which some words are more frequent than others, as in any language."""
    dice = random.Random(7)
    weights = [1 / rank for rank in range(1, len(WORDS) + 1)]
    paths = [folder / f"file-{number}.txt" for number in range(count)]
    for path in paths:
        path.write_text(" ".join(dice.choices(WORDS, weights, k=words)), "utf-8")
    for number in (13, 42):
        paths[number].write_bytes(b"\xff\xfe not text")
    return paths


def main(folder: Path) -> None:
    paths = make_files(folder)
    goal = Goal("completed >= 95%", name="words", deadline="10m")
    tasks = [count_words.using(id=path.stem).bind(path) for path in paths]
    total: Counter[str] = Counter()
    workers = set()
    with app.sync_client() as client:
        run = client.submit(TaskGroup("word count", tasks, goal=goal))
        for result in run.results():
            workers.add(result.worker)
            if result.error:
                print(f"not counted: {result.task_id}: {result.error['type']}: {result.error['message']}")
            else:
                total.update(result.value)
        view = run.view()
    counters, (judged,) = view.counters, view.goals
    print(f"Goal {judged.status}: {counters.completed} of {counters.total} files, counted by {len(workers)} processes")
    for word, number in total.most_common(3):
        print(f"{number:7} {word}")


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as made:
        main(Path(made))
