"""
The benchmark runs; what it measures is for people to judge, not for a test.
"""

import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parent.parent


def test_the_benchmark_prints_what_a_task_costs() -> None:
    command = [sys.executable, "-m", "benchmarks", "--tasks", "60", "--runs", "1", "--latencies", "5"]
    run = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=100, check=False)
    assert run.returncode == 0, run.stderr
    lines = {line[:32].strip(): line[32:].split() for line in run.stdout.splitlines()}
    for row in ("groups of 500; 50 slots", "single, 32 in flight; 100 slots"):
        assert "claim" in lines[row], f"{row} does not tell scripts apart: {lines[row]}"
    assert any(row.startswith("idle worker") for row in lines)
    assert any(row.startswith("bare redis-py") for row in lines)
