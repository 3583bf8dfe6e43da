"""
The documentation says what the code does.
"""

from __future__ import annotations

import subprocess
import sys

from commands import ROOT


def test_the_generated_pages_are_what_the_code_says() -> None:
    checked = subprocess.run(
        [sys.executable, "-m", "docs.generate", "--check"], cwd=ROOT, capture_output=True, text=True, check=False
    )

    assert checked.returncode == 0, checked.stdout + checked.stderr
