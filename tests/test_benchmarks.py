"""The benchmark runs; what it measures is for people to judge, not for a test."""

import sys

from commands import ROOT, run_to_end


def test_the_benchmark_prints_what_a_task_costs() -> None:
    command = [sys.executable, "-m", "benchmarks", "--tasks", "60", "--runs", "1", "--latencies", "5"]
    run = run_to_end(*command, folder=ROOT, limit_s=100)
    assert run.returncode == 0, run.stderr
    rows = run.stdout.splitlines()
    for row in ("bare redis-py", "groups of 500; 50 slots", "idle worker"):
        assert any(line.startswith(row) for line in rows), f"{row} is missing in:\n{run.stdout}"
    for script in ("claim", "commit", "fetch"):
        assert run.stdout.count(f"{script} ") >= 2, f"{script} is not told apart in:\n{run.stdout}"
