"""The compose file and the image: valid, private, unprivileged, and stopped with time to hand tasks back."""

import re
import sys
import tomllib
from typing import Any

import pytest
import yaml
from commands import ROOT, run_to_end

from rq_ceylon.models import seconds

COMPOSE = ROOT / "docker-compose.yml"
GRACE_S = 25
"""A worker's own grace: what it may take to finish or hand back its tasks."""

SERVICES: dict[str, dict[str, Any]] = yaml.safe_load(COMPOSE.read_text())["services"]
OURS = [name for name, service in SERVICES.items() if "build" in service]


def test_it_is_a_valid_compose_file() -> None:
    checked = run_to_end(sys.executable, "-m", "check_jsonschema", "--builtin-schema", "vendor.compose-spec", COMPOSE)

    assert checked.returncode == 0, checked.stdout + checked.stderr


def test_there_are_a_server_workers_and_a_monitor() -> None:
    assert list(SERVICES) == ["redis", "worker", "monitor"]
    assert OURS == ["worker", "monitor"]


@pytest.mark.parametrize("name", OURS)
def test_our_services_run_our_commands_once_redis_is_healthy(name: str) -> None:
    service = SERVICES[name]
    commands = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["scripts"]

    assert isinstance(service["command"], list)  # exec form: signals arrive
    assert service["command"][0] in commands
    assert service["depends_on"] == {"redis": {"condition": "service_healthy"}}
    assert service["environment"]["CEYLON_REDIS_URL"] == "redis://redis:6379/0"
    assert seconds(service["stop_grace_period"], "stop_grace_period") > GRACE_S


@pytest.mark.parametrize("name", OURS)
def test_our_services_are_checked_and_may_be_scaled(name: str) -> None:
    service = SERVICES[name]

    assert service["healthcheck"]["test"] == ["CMD", "ceylon", "workers", "--check"]
    assert not {"container_name", "hostname", "ports", "network_mode", "user"} & set(service)


def test_redis_keeps_what_it_is_given() -> None:
    command = " ".join(SERVICES["redis"]["command"])

    assert "--appendonly yes" in command
    assert "--maxmemory-policy noeviction" in command
    assert SERVICES["redis"]["volumes"] == ["redis-data:/data"]
    assert SERVICES["redis"]["healthcheck"]["test"]


def test_ports_are_published_on_loopback_only() -> None:
    ports = [port for service in SERVICES.values() for port in service.get("ports", [])]

    assert ports
    assert all(port.startswith("127.0.0.1:") for port in ports)


def test_the_image_is_unprivileged_and_runs_its_command_directly() -> None:
    lines = (ROOT / "Dockerfile").read_text().splitlines()
    last_stage = lines[max(number for number, line in enumerate(lines) if line.startswith("FROM ")) :]

    assert any(re.fullmatch(r"USER [1-9]\d*:[1-9]\d*", line) for line in last_stage)
    assert [line for line in last_stage if re.match("(CMD|ENTRYPOINT) ", line)] == ['CMD ["ceylon", "--help"]']
