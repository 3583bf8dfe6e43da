"""
What stands around the package: workflows, hooks, and the files to deploy with. Each is valid, and says what the code
says. And the main job where Redis is guarded as the page on deployment says.
"""

from __future__ import annotations

import configparser
import re
import sys
import tomllib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any
from urllib.parse import quote

import pytest
import redis
import yaml
from commands import EXAMPLE, ROOT, commands_on, run_to_end, until
from servers import documented_users, fleet_of, make_certificates, tls_lines
from test_main_job import assert_finished, shown

from rq_ceylon import cli
from rq_ceylon.app import Ceylon

DEPLOY = ROOT / "examples" / "deploy"
GRACE_S = 25
WORKFLOWS = sorted((ROOT / ".github" / "workflows").iterdir())
UNITS = sorted(DEPLOY.glob("*.service"))
DEPLOYMENTS: dict[str, Any] = {
    one["metadata"]["name"]: one for one in yaml.safe_load_all((DEPLOY / "kubernetes.yaml").read_text())
}


def parses(words: Sequence[str]) -> None:
    """Fails if one of our commands does not take these arguments."""
    name = words[0].rpartition("/")[2]
    getattr(cli, name.removeprefix("ceylon-")).make_context(name, list(words[1:]))


# ---- workflows and hooks ---------------------------------------------------------------------------------------------
@pytest.mark.parametrize("schema", ["vendor.github-workflows", "custom.github-workflows-require-timeout"])
def test_the_workflows_are_valid(schema: str) -> None:
    checked = run_to_end(sys.executable, "-m", "check_jsonschema", "--builtin-schema", schema, *WORKFLOWS)

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


# ---- Redis, as the page says -----------------------------------------------------------------------------------------
SECRET = "s/e@c#r?t"
"""All that the page says is written as %… in a URL."""


def test_the_users_of_the_page_may_run_whatever_scripts_and_queries_run() -> None:
    code = [path.read_text() for kind in ("lua", "py") for path in (ROOT / "rq_ceylon").rglob(f"*.{kind}")]
    calls = r"""(?:call\(|redis\.pcall\(|command\(|insist\()['"]([A-Z]+)['"](?:, ['"]([A-Z]+)['"])?"""
    found = {match for text in code for match in re.findall(calls, text)}
    used = {(name if name != "XGROUP" else f"{name}|{sub}").lower() for name, sub in found} - {"asking", "cluster"}
    assert {"hset", "exists", "zcount", "xgroup|delconsumer", "scan"} <= used
    for user, rules in documented_users().items():
        allowed = {word[1:] for word in rules.split() if word[0] == "+"}
        assert user == "ceylon-client" or used - {"blpop"} <= allowed, (user, used - allowed)
        assert user != "ceylon-worker" or "blpop" in allowed


@pytest.mark.parametrize("engine", ["redis"], indirect=True)
@pytest.mark.parametrize("way", [pytest.param("TLS", marks=pytest.mark.long), "socket"])
def test_the_main_job_runs_over_tls_and_on_a_socket_as_the_users_of_the_page(
    way: str, binary: str, short_tmp_path: Path, tmp_path: Path
) -> None:
    users = documented_users()
    lines = [f"user {name} {rules.replace('SECRET', SECRET)}" for name, rules in users.items()]
    lines += ["user default off", f"user operator on >{SECRET} ~* &* +@all", "appendonly yes"]
    at = short_tmp_path / "redis.sock"
    with fleet_of(binary, short_tmp_path) as fleet:
        if way == "TLS":
            certificates = make_certificates(tmp_path)
            server = fleet.start(*lines, *tls_lines(certificates, clients="no"), tls=True)
            form = f"rediss://{{}}@127.0.0.1:{server.port}/0?ssl_ca_certs={certificates}/ca.pem"
        else:
            fleet.start(*lines, f"unixsocket {at}")
            form = f"unix://{{}}@{at}?db=0"
        urls = {name: form.format(f"{name}:{quote(SECRET, safe='')}") for name in [*users, "operator"]}

        with commands_on(urls["ceylon-client"], tmp_path) as commands:
            for name in ("worker", "worker", "monitor"):
                more = ["--role", "processor", "-c", "2"] if name == "worker" else []
                commands.start(name, *more, environ={"CEYLON_REDIS_URL": urls[f"ceylon-{name}"]})
            with Ceylon(urls["ceylon-client"]).sync_client() as client:
                until(lambda: len(client.workers()) == 3, "two workers and a monitor are registered")

                ended = commands.run("submit", str(EXAMPLE), "--wait=all")

                assert ended.returncode == 0, ended.stderr
                assert_finished(shown(commands, client))
                until(lambda: "Goal achieved: partial-processing-complete" in commands.log(2).read_text(), "it is told")
            logs = [commands.log(number).read_text() for number in range(3)]

        with redis.Redis.from_url(urls["operator"], decode_responses=True) as operator:
            refused = [one for one in operator.acl_log() if "client|setinfo" not in str(one).lower()]
    assert refused == []
    assert not [line for log in [*logs, ended.stderr] for line in log.splitlines() if SECRET in line or "docs/" in line]
