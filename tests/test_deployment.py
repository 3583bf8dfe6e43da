"""
What stands around the package: workflows, hooks, and the files to deploy with. Each is valid, and says what the code
says.
"""

from __future__ import annotations

import configparser
import re
import subprocess
import sys
import tomllib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import yaml
from commands import ROOT

from rq_ceylon import cli

DEPLOY = ROOT / "examples" / "deploy"
GRACE_S = 25
WORKFLOWS = sorted((ROOT / ".github" / "workflows").iterdir())
UNITS = sorted(DEPLOY.glob("*.service"))
DEPLOYMENTS: dict[str, Any] = {
    one["metadata"]["name"]: one for one in yaml.safe_load_all((DEPLOY / "kubernetes.yaml").read_text())
}


def parses(words: Sequence[str]) -> None:
    """
    Fails if one of our commands does not take these arguments.
    """
    name = words[0].rpartition("/")[2]
    getattr(cli, name.removeprefix("ceylon-")).make_context(name, list(words[1:]))


# ---- workflows and hooks ---------------------------------------------------------------------------------------------
@pytest.mark.parametrize("schema", ["vendor.github-workflows", "custom.github-workflows-require-timeout"])
def test_the_workflows_are_valid(schema: str) -> None:
    checked = subprocess.run(
        [sys.executable, "-m", "check_jsonschema", "--builtin-schema", schema, *WORKFLOWS],
        capture_output=True,
        text=True,
        check=False,
    )

    assert checked.returncode == 0, checked.stdout + checked.stderr


def test_the_tests_run_on_every_python_and_every_engine_that_is_promised() -> None:
    workflow = yaml.safe_load((ROOT / ".github" / "workflows" / "tests.yml").read_text())
    matrix = workflow["jobs"]["tests"]["strategy"]["matrix"]
    classifiers = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["classifiers"]

    pythons = [word.rpartition(" ")[2] for word in classifiers]
    assert matrix["python"] == [python for python in pythons if re.fullmatch(r"3\.\d+", python)]
    assert matrix["engine"] == ["redis:6.2", "redis:7", "redis:8", "valkey/valkey:8", "valkey/valkey:9"]


def test_the_hooks_run_what_the_checks_run() -> None:
    (local,) = yaml.safe_load((ROOT / ".pre-commit-config.yaml").read_text())["repos"]
    entries = {hook["id"]: hook["entry"] for hook in local["hooks"]}

    assert local["repo"] == "local"
    for line in re.findall(r'"\$bin/python" (-m (?:ruff|mypy) .*)$', (ROOT / "scripts/test").read_text(), re.MULTILINE):
        assert any(entry.partition(" ")[2].startswith(line.partition(" --check")[0]) for entry in entries.values()), (
            line
        )


# ---- systemd ---------------------------------------------------------------------------------------------------------
def unit(path: Path) -> configparser.SectionProxy:
    read = configparser.ConfigParser()
    read.optionxform = str  # type: ignore[assignment, method-assign]
    read.read(path)
    return read["Service"]


@pytest.mark.parametrize("path", UNITS, ids=lambda path: path.name)
def test_a_unit_starts_our_command_and_starts_it_again_unless_that_is_useless(path: Path) -> None:
    service = unit(path)

    parses(service["ExecStart"].split())
    assert service["Restart"] == "on-failure"
    assert service["RestartPreventExitStatus"] == "2 4"


def test_a_worker_unit_leaves_time_for_the_grace_and_the_signals_to_the_supervisor() -> None:
    service = unit(DEPLOY / "ceylon-worker.service")

    assert service["KillMode"] == "mixed"
    assert int(service["TimeoutStopSec"]) > GRACE_S
    assert "PrivateTmp" not in service  # neighbours meet there


# ---- Kubernetes ------------------------------------------------------------------------------------------------------
def pods() -> Iterator[Any]:
    for one in DEPLOYMENTS.values():
        assert one["spec"]["selector"]["matchLabels"].items() <= one["spec"]["template"]["metadata"]["labels"].items()
        yield one["spec"]["template"]["spec"]


def test_pods_run_our_commands_and_leave_time_for_the_grace() -> None:
    assert list(DEPLOYMENTS) == ["ceylon-worker", "ceylon-monitor"]
    for pod in pods():
        (container,) = pod["containers"]
        parses(container["args"])
        assert pod["terminationGracePeriodSeconds"] > GRACE_S
        assert container["env"][0]["name"] == "CEYLON_REDIS_URL"
        assert "livenessProbe" not in container  # while Redis is away a restart helps nobody


def test_pods_have_no_more_rights_than_they_need() -> None:
    for pod in pods():
        (container,) = pod["containers"]
        assert pod["securityContext"]["runAsNonRoot"] is True
        assert container["securityContext"] == {
            "allowPrivilegeEscalation": False,
            "readOnlyRootFilesystem": True,
            "capabilities": {"drop": ["ALL"]},
        }
