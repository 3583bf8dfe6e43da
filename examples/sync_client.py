"""
All of it without await, for scripts, threads and notebooks.

    $ ceylon-worker sync_client:app &
    $ python sync_client.py
    one: 1024
    an error: ZeroDivisionError: float division by zero
    threads: 1 4 9 16
    group: 0 10 20 30 40
    squares: finished (completed), 5 of 5 completed, goal achieved
"""

from concurrent.futures import ThreadPoolExecutor

from rq_ceylon import Ceylon, TaskFailedError, TaskGroup

app = Ceylon()


@app.task(role="maths")
def power(base: int, exponent: int = 2) -> int:
    return int(base**exponent)


@app.task(role="maths", max_attempts=1)
def divide(one: float, other: float) -> float:
    return one / other


def main() -> None:
    print("one:", power.enqueue(2, exponent=10).result(timeout=30))
    try:
        divide.enqueue(1, 0).result(timeout=30)
    except TaskFailedError as error:
        print(f"an error: {error.error_type}: {error.error_message}")

    with app.sync_client() as client:
        with ThreadPoolExecutor(4) as threads:  # any number of threads may share a client
            numbers = threads.map(lambda base: client.submit(power.bind(base)).result(timeout=30), range(1, 5))
            print("threads:", *numbers)

        tasks = [power.bind(base * 10, exponent=1) for base in range(5)]
        run = client.submit(TaskGroup("squares", tasks, goal="completed >= 80%"))
        print("group:", *sorted(result.value for result in run.results()))
        print(run.view())


if __name__ == "__main__":
    main()
