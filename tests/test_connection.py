"""
What users meet between them and Redis: one server for all that name embedded://, errors that name the remedy, TLS,
and users with an ACL.
"""

from __future__ import annotations

import asyncio
import os
import re
import signal
import subprocess
import sys
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import redis
import redis.asyncio
from bench import Bench
from commands import LIMIT_S, ROOT, commands_on, eventually, is_alive, until
from redis.crc import key_slot
from servers import (
    Fleet,
    Running,
    documented_users,
    make_certificates,
    pretended,
    start_cluster,
    start_watched,
    tls_lines,
)
from simulator.simulation import client_of

from rq_ceylon import Ceylon, Client, Goal, RetryTask, Task, TaskGroup
from rq_ceylon.attempt import TaskContext
from rq_ceylon.client import GroupHandle, rolling
from rq_ceylon.errors import ConnectionLostError, RedisError
from rq_ceylon.maintenance.steps import restore_index
from rq_ceylon.monitor import Monitor
from rq_ceylon.settings import resolve
from rq_ceylon.store import cluster as store_cluster
from rq_ceylon.store import connection as store_connection
from rq_ceylon.store import node as store_node
from rq_ceylon.store import queries, scripts
from rq_ceylon.store.connection import Connection
from rq_ceylon.store.events import EventHub
from rq_ceylon.store.keys import Keys
from rq_ceylon.store.scripts import command
from rq_ceylon.worker.loop import Worker

pytestmark = pytest.mark.anyio


def warnings(said: list[str]) -> list[str]:
    return [line for line in said if line.startswith("WARNING: ")]


@asynccontextmanager
async def connected(url: str) -> AsyncIterator[Connection]:
    connection = Connection(url)
    try:
        yield connection
    finally:
        await connection.close()


async def problem_of(url: str) -> str:
    """What a command that starts with this URL says."""
    async with connected(url) as connection:
        with pytest.raises(RedisError) as caught:
            await connection.check()
    assert "secret" not in str(caught.value)
    return str(caught.value)


async def works(url: str) -> bool:
    async with connected(url) as connection:
        await connection.check()
        return await connection.run([command("SET", "key", "1"), command("GET", "key")]) == [True, "1"]


# ---- embedded:// -----------------------------------------------------------------------------------------------------
EMBEDDED = """
import asyncio, os, sys
from rq_ceylon import Ceylon, Task
from rq_ceylon.maintenance.steps import restore_index
from rq_ceylon.monitor import Monitor
from rq_ceylon.dev import server
from rq_ceylon.worker.loop import Worker

app = Ceylon("embedded://")

@app.task(role="r")
async def double(number: int) -> int:
    return 2 * number

double_task = Task(uses="double", arguments={"number": 21}, role="r")

async def main():
    worker = Worker("embedded://", registry=app.registry, roles=["r"])
    monitor = Monitor("embedded://", registry=app.registry)
    async with app.client() as client:
        running = asyncio.create_task(worker.run()), asyncio.create_task(monitor.run())
        print(await (await client.submit(double_task)).result())
        while not any(one.kind == "monitor" for one in await client.workers()):
            await asyncio.sleep(0.01)
        worker.stop(); monitor.stop()
        await asyncio.gather(*running)
    print(len(server._running), server.shared().pid, server.shared().url, flush=True)
    sys.stdin.read()

asyncio.run(main())
"""


def test_all_parts_of_a_process_share_one_embedded_server_that_is_gone_with_it() -> None:
    process = subprocess.Popen(
        [sys.executable, "-W", "error", "-c", EMBEDDED],
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    with process:
        assert process.stdout is not None
        assert process.stdout.readline() == "42\n"
        count, pid, url = process.stdout.readline().split()
        assert count == "1"
        assert is_alive(int(pid))
        process.kill()
    until(lambda: not is_alive(int(pid)) and not Path(url.removeprefix("unix://")).exists(), "the server is gone")


# ---- the main job, disturbed -----------------------------------------------------------------------------------------
async def finish_the_main_job(url: str, disturb: Callable[[Ceylon, str], object], *, tasks: int = 60) -> None:
    """A group on two workers, with something that happens in its middle; at the end each task is counted once."""
    app = Ceylon(url)
    half, disturbed = tasks // 2, asyncio.Event()

    @app.task(role="r", max_attempts=1)
    async def work(number: int) -> int:
        if number >= half:
            await disturbed.wait()
        return number

    @app.task(role="s", max_attempts=1)
    async def more(number: int) -> int:
        if number >= half:
            await disturbed.wait()
        return number

    workers = [Worker(url, registry=app.registry, roles=["r", "s"], slots=4, lease_s=5) for _ in range(2)]
    names = ("work", "more")
    async with app.client() as client:
        running = [asyncio.create_task(worker.run()) for worker in workers]
        group = TaskGroup("main", [Task(uses=names[i % 2], arguments={"number": i}) for i in range(tasks)])
        handle = await client.submit(replace(group, goal=Goal(f"completed >= {half + 1}")))
        await eventually(lambda: sum(worker.completed for worker in workers) >= half, "half is completed")

        # The rest runs, or waits for a slot, while it happens.
        happening = asyncio.create_task(asyncio.to_thread(disturb, app, handle.id))
        await asyncio.sleep(0.05)
        disturbed.set()
        await happening

        await client.connection.run_until_answered([command("GET", "any")], give_up_after=LIMIT_S)
        goal = await handle.wait("goal", timeout=LIMIT_S)
        view = await handle.wait("all", timeout=LIMIT_S)
        assert goal.goals[0].status == "achieved"
        assert (view.status, view.outcome) == ("finished", "completed")
        counters = view.counters
        assert (counters.total, counters.completed, counters.failed) == (tasks, tasks, 0)
        assert (counters.pending, counters.in_progress, counters.waiting) == (0, 0, 0)
        results = [result.value async for result in handle.results()]
        assert sorted(results) == list(range(tasks))
        for worker in workers:
            worker.stop()
        await asyncio.gather(*running)


@pytest.mark.every_engine
async def test_the_main_job_goes_on_through_a_failover_that_sentinels_decide(fleet: Fleet) -> None:
    watched = start_watched(fleet)

    def fail_over(app: Ceylon, gid: str) -> None:
        until(lambda: watched.replica.ask("EXISTS", Keys("ceylon").group_part(gid, "meta")) == 1, "it has followed")
        watched.primary.kill()
        until(lambda: watched.replica.ask("ROLE")[0] == "master", "the replica is the primary now")

    await finish_the_main_job(watched.url, fail_over)


@pytest.mark.every_engine
async def test_a_demoted_primary_is_left_for_the_new_one(fleet: Fleet) -> None:
    """Both go on to live, so nothing breaks the connection but what the old one answers."""
    watched = start_watched(fleet)

    def fail_over() -> None:
        until(lambda: watched.replica.ask("GET", "key") == "1", "the replica has followed")
        until(watched.promote, "the Sentinels find the replica fit to be the primary")
        until(lambda: watched.primary_port() == watched.replica.port, "the Sentinels name the new primary")
        watched.primary.ask("REPLICAOF", "127.0.0.1", watched.replica.port)  # as they do, but seconds later

    async with connected(watched.url) as connection:
        await connection.run([command("SET", "key", "1")])

        await asyncio.to_thread(fail_over)

        await connection.run_until_answered([command("SET", "key", "2")], give_up_after=LIMIT_S)
        assert watched.replica.ask("GET", "key") == "2"


@pytest.mark.every_engine
async def test_the_main_job_goes_on_in_a_cluster_while_its_slots_move(fleet: Fleet) -> None:
    cluster = start_cluster(fleet)

    def move_all(app: Ceylon, gid: str) -> None:
        for key in (Keys("ceylon").group_part(gid, "meta"), Keys("ceylon").role_part("r", "meta")):
            slot = key_slot(key.encode())
            source = cluster.owner(slot)
            target = next(one for one in cluster.nodes if one is not source)
            assert cluster.move(slot, target) > 0

    await finish_the_main_job(cluster.url, move_all)


def takes_all(bench: Bench) -> list[str]:
    """A worker fetches, claims, and acknowledges what it does not get."""
    verdicts = []
    for delivery in bench.fetch("w"):
        verdicts += bench.claim("w", delivery)
        bench.fetch("w", 0, acks=[] if verdicts[-1] == "GRANTED" else [delivery.entry])
    return verdicts


@pytest.mark.every_engine
async def test_a_task_whose_entry_overtook_it_is_rung_again(
    bench: Bench, redis_url: str, namespace: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    bench.queued("before")
    assert takes_all(bench) == ["GRANTED"]
    # As after a restart, when something was relayed and nothing submitted yet.
    bench.redis.script_flush()
    bench.redis.script_load(scripts.source("enqueue"))
    source, found = scripts.source, list[str]()

    def loading(script: str) -> str:
        found.extend(takes_all(bench) if script == "submit" else [])
        return source(script)

    monkeypatch.setattr(scripts, "source", loading)
    async with Client(redis_url, namespace=namespace) as client:
        await client.submit(Task(role="p"))
        assert found == ["GONE"]
        assert takes_all(bench) == ["GRANTED"]


async def test_what_follows_a_call_to_another_node_is_sent_again_behind_it(fleet: Fleet, namespace: str) -> None:
    cluster = start_cluster(fleet)
    names = [f"{{{number}}}:{namespace}" for number in range(20)]
    first = names[0]
    other = next(
        name for name in names if cluster.owner(key_slot(name.encode())) is not cluster.owner(key_slot(first.encode()))
    )
    beside = next(
        name for name in names[1:] if cluster.owner(key_slot(name.encode())) is cluster.owner(key_slot(first.encode()))
    )
    async with Connection(cluster.url) as connection:
        for follower, times in ((other, 2), (beside, 1)):
            calls = [command("SET", first, "x"), replace(command("RPUSH", follower, "x"), follows=True)]
            assert await connection.run(calls) == [True, times]


async def test_a_task_whose_entry_overtook_it_while_a_slot_moved_is_rung_again(
    fleet: Fleet, namespace: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    cluster, keys = start_cluster(fleet), Keys(namespace)
    bench = Bench("redis://none", namespace)
    bench.redis = client_of(cluster.url, decode_responses=True)
    slot = key_slot(keys.group_part("moved", "meta").encode())
    source = cluster.owner(slot)
    role = next(
        role for role in map(str, range(99)) if cluster.owner(key_slot(keys.role_part(role, "meta").encode())) is source
    )
    redirected, found = store_cluster.Cluster._redirected, list[str]()

    def late(self: store_cluster.Cluster, error: Any) -> Any:
        found.extend(bench.claim("w", delivery)[0] for delivery in bench.fetch("w", role=role))
        return redirected(self, error)

    monkeypatch.setattr(store_cluster.Cluster, "_redirected", late)
    monkeypatch.setattr(rolling, "_Group", partial(rolling._Group, "moved"))
    async with Client(cluster.url, namespace=namespace) as client:
        await client.roles()  # so it knows the slots
        cluster.move(slot, cluster.other_than(source))
        await client.submit(Task(role=role))
        assert found == ["GONE"]
        (delivery,) = bench.fetch("w", role=role)
        assert bench.claim("w", delivery) == ["GRANTED"]


async def test_an_index_that_a_node_has_lost_is_restored_from_the_groups_of_all_nodes(fleet: Fleet) -> None:
    cluster, keys = start_cluster(fleet), Keys("ceylon")
    gids = sorted(f"g{n}" for n in range(12))
    async with connected(cluster.url) as connection:
        await connection.run([command("HSET", keys.group_part(gid, "meta"), "status", "active") for gid in gids])

        await restore_index(connection, keys)

        assert sorted(await queries.group_ids(connection, keys)) == gids


async def test_a_broken_node_takes_the_replies_of_its_own_calls_only(fleet: Fleet) -> None:
    cluster = start_cluster(fleet)
    keys = [f"key{i}" for i in range(12)]
    broken = cluster.owner(key_slot(b"key0"))
    own = {key for key in keys if cluster.owner(key_slot(key.encode())) is broken}
    assert own != set(keys)
    async with connected(cluster.url) as connection:
        assert await connection.run([command("SET", key, key) for key in keys]) == [True] * 12

        broken.kill()
        replies = await connection.run_each([command("GET", key) for key in keys])

        for key, reply in zip(keys, replies, strict=True):
            assert isinstance(reply, ConnectionLostError) if key in own else reply == key
        with pytest.raises(ConnectionLostError):
            await connection.run([command("GET", key) for key in keys], refusals=True)


@pytest.mark.long
async def test_a_stopped_node_holds_back_only_what_is_on_it(fleet: Fleet) -> None:
    cluster = start_cluster(fleet)
    for node in cluster.nodes:
        node.ask("CONFIG", "SET", "cluster-node-timeout", 60_000)  # so that the others do not give it up
    stopped, keys, app = cluster.nodes[1], Keys("ceylon"), Ceylon(cluster.url)

    def is_on_stopped(key: str) -> bool:
        return cluster.owner(key_slot(key.encode())) is stopped

    names = [f"r{i}" for i in range(20)]
    held = next(role for role in names if is_on_stopped(keys.role_part(role, "meta")))
    free = next(role for role in names if not is_on_stopped(keys.role_part(role, "meta")))
    may_go_on = asyncio.Event()

    @app.task
    async def work() -> None:
        await may_go_on.wait()

    async def submitted(role: str, *, on_stopped: bool) -> GroupHandle:
        while True:
            handle = await client.submit(TaskGroup("g", [Task(uses="work", role=role)] * 40))
            if is_on_stopped(keys.group_part(handle.id, "meta")) is on_stopped:
                return handle
            await handle.cancel()

    worker = Worker(cluster.url, registry=app.registry, roles=[held, free], slots=30)
    async with app.client() as client:
        going_on = await submitted(free, on_stopped=False)
        waiting = [
            await submitted(role, on_stopped=where) for role, where in ((free, True), (held, True), (held, False))
        ]
        running = asyncio.create_task(worker.run())
        await eventually(lambda: len(worker._running) == 30, "all slots are taken")

        stopped.process.send_signal(signal.SIGSTOP)
        may_go_on.set()
        view = await going_on.wait("all", timeout=LIMIT_S)
        assert view.counters.completed == 40
        assert not worker.lanes.is_open(keys.role_part(held, "meta"))
        assert not worker.turns.is_idle()

        stopped.process.send_signal(signal.SIGCONT)
        for handle in (going_on, *waiting):
            view = await handle.wait("all", timeout=LIMIT_S)
            assert (view.outcome, view.counters.completed, view.counters.attempts) == ("completed", 40, 40)
        await eventually(
            lambda: worker.turns.is_idle() and not worker.lanes.in_flight, "all is said, and has been answered"
        )
        for role in await client.roles():
            assert (role.totals["completed"], role.queued, role.delivered) == (80, 0, 0)
        worker.stop()
        await running


async def test_a_bell_of_any_role_is_heard_in_a_cluster(fleet: Fleet) -> None:
    cluster = start_cluster(fleet)
    bells = [f"bell{{{i}}}" for i in range(6)]
    assert {cluster.owner(key_slot(bell.encode())).port for bell in bells} == {one.port for one in cluster.nodes}
    async with connected(cluster.url) as waiting, connected(cluster.url) as ringing:
        assert await waiting.pop(bells, 0.01) is False
        for bell in bells:
            pop = asyncio.create_task(waiting.pop(bells, 10))
            await ringing.run([command("RPUSH", bell, "1")])
            async with asyncio.timeout(LIMIT_S):
                assert await pop is True


# ---- what goes wrong at the start ------------------------------------------------------------------------------------
def info(**facts: object) -> bytes:
    """An answer to INFO."""
    text = "".join(f"{name}:{value}\r\n" for name, value in facts.items())
    return f"${len(text)}\r\n{text}\r\n".encode()


def answering(reply: Callable[[], bytes]) -> Callable[[bytes], bytes]:
    """This to INFO, OK to all else."""

    def answer(piece: bytes) -> bytes:
        commands = re.split(rb"^\*\d+\r\n", piece, flags=re.MULTILINE)[1:]
        return b"".join(reply() if b"INFO\r\n" in one and b"SETINFO" not in one else b"+OK\r\n" for one in commands)

    return answer


async def test_a_server_that_is_not_there_is_named_with_the_remedies(short_tmp_path: Path) -> None:
    for url, reason in {
        "redis://user:secret@127.0.0.1:1/0": "connection refused",
        f"unix://{short_tmp_path}/no.sock": "no such socket",
        "redis://nowhere.invalid": "unknown host",
        "redis+sentinel://127.0.0.1:1,127.0.0.1:2/main": "no Sentinel answers",
        "redis+cluster://127.0.0.1:1,127.0.0.1:2": "connection refused",
    }.items():
        first, *remedies = (await problem_of(url)).splitlines()
        assert first == f"Cannot reach Redis at {url.replace('secret', '***')} ({reason})."
        assert "ceylon server" in remedies[0]
        assert "CEYLON_REDIS_URL" in remedies[1]


async def test_a_server_that_does_not_answer_is_not_waited_for_for_ever(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(store_node, "ANSWER_S", 0.2)
    monkeypatch.setattr(store_node, "CONNECT_S", 0.2)
    with pretended(lambda _: None) as port:
        assert "(no answer in time)" in await problem_of(f"redis://127.0.0.1:{port}")
        said = await problem_of(f"rediss://127.0.0.1:{port}")
        assert "(no answer in time; does it speak TLS at this port?)" in said
    monkeypatch.setattr(store_node, "ANSWER_S", 10.0)
    monkeypatch.setattr(store_node, "CONNECT_S", 10.0)
    with pretended(lambda _: b"-ERR what is this?\r\n") as port:
        assert "does not speak TLS at this port; use redis://" in await problem_of(f"rediss://127.0.0.1:{port}")


@pytest.mark.parametrize(
    ("facts", "problem"),
    [
        ({"redis_version": "6.0.16"}, "is redis 6.0.16; at least redis 6.2 is needed: upgrade it"),
        ({"redis_version": "7.2.4", "valkey_version": "7.1.0"}, "is valkey 7.1.0; at least valkey 7.2 is needed"),
        (
            {"redis_version": "7.4.0", "maxmemory_policy": "allkeys-lru"},
            "evicts keys when memory is short (maxmemory-policy allkeys-lru), which would lose tasks; "
            "set it with: redis-cli CONFIG SET maxmemory-policy noeviction",
        ),
    ],
)
async def test_a_server_that_would_lose_tasks_is_refused(facts: dict[str, object], problem: str) -> None:
    with pretended(answering(lambda: info(**facts))) as port:
        assert problem in await problem_of(f"redis://127.0.0.1:{port}")


async def test_a_server_that_loads_its_data_is_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(store_connection, "LOADING_S", 0.01)
    left = iter([1, 1, 1, 0])
    with pretended(answering(lambda: info(redis_version="7.4.0", loading=next(left), aof_enabled=1))) as port:
        async with connected(f"redis://127.0.0.1:{port}") as connection:
            await connection.check()
    assert next(left, "all asked") == "all asked"


async def test_a_server_of_another_kind_is_refused_with_the_right_url(fleet: Fleet) -> None:
    watched, cluster = start_watched(fleet, sentinels=1), start_cluster(fleet)
    sentinel, server, node = watched.sentinels[0].port, watched.primary.port, cluster.nodes[1].port
    replica = watched.replica.port
    for given, right in {
        f"redis://127.0.0.1:{sentinel}": f"redis+sentinel://127.0.0.1:{sentinel}/main/0",
        f"redis://127.0.0.1:{node}": f"redis+cluster://127.0.0.1:{node}",
        f"redis://127.0.0.1:{replica}/2": f"redis://127.0.0.1:{server}/2",
        f"redis+cluster://127.0.0.1:{server}": f"redis://127.0.0.1:{server}/0",
        f"redis+sentinel://127.0.0.1:{server}/main": f"redis://127.0.0.1:{server}/0",
    }.items():
        assert (await problem_of(given)).endswith(right)
    said = await problem_of(f"redis+sentinel://127.0.0.1:{sentinel}/other")
    assert said.endswith("know no primary 'other'; they know: main")


async def test_a_server_that_keeps_nothing_is_warned_of_once(fleet: Fleet, redis_url: str, said: list[str]) -> None:
    forgetful, keeping = fleet.start(), fleet.start("appendonly yes")
    for url in (forgetful.url, redis_url, "embedded://", keeping.url, forgetful.url):
        assert await works(url)

    (warning,) = warnings(said)
    assert f"Redis at {forgetful.url} writes no append-only file" in warning
    assert "redis-cli CONFIG SET appendonly yes" in warning


async def test_database_and_user_of_a_url_are_used_on_a_socket_and_on_a_port(
    fleet: Fleet, short_tmp_path: Path
) -> None:
    at = short_tmp_path / "with space.sock"
    running = fleet.start(f'unixsocket "{at}"', "user someone on >s%cret ~* &* +@all")
    for number, url in enumerate(
        [
            f"redis://someone:s%25cret@127.0.0.1:{running.port}/1",
            f"redis://127.0.0.1:{running.port}?username=someone&password=s%25cret&db=2",
            f"unix://someone:s%25cret@{str(at).replace(' ', '%20')}?db=3",
            f"unix://{str(at).replace(' ', '%20')}?username=someone&password=s%25cret&db=4",
        ],
        1,
    ):
        async with connected(resolve(url).redis_url) as connection:
            (who,) = await connection.run([command("ACL", "WHOAMI")])
            await connection.run([command("SET", "key", number)])
        assert who == "someone"
        with redis.Redis(port=running.port, db=number) as client:
            assert client.get("key") == str(number).encode()
    said = await problem_of(f"redis://someone:secret@127.0.0.1:{running.port}")
    assert f"redis://someone:***@127.0.0.1:{running.port} refuses the user or password" in said


# ---- TLS -------------------------------------------------------------------------------------------------------------
@pytest.fixture(scope="module")
def certificates(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_certificates(tmp_path_factory.mktemp("certificates"))


@pytest.mark.parametrize("engine", ["redis"], indirect=True)
async def test_tls_checks_the_server_and_shows_the_clients_certificate(fleet: Fleet, certificates: Path) -> None:
    open_to_all = fleet.start(*tls_lines(certificates, clients="no"), tls=True)
    strict = fleet.start(*tls_lines(certificates, clients="yes"), tls=True)
    ca = f"ssl_ca_certs={certificates}/ca.pem"
    own = f"ssl_certfile={certificates}/client.pem&ssl_keyfile={certificates}/client.key"

    assert await works(resolve(f"rediss://127.0.0.1:{open_to_all.port}?{ca}").redis_url)
    assert await works(resolve(f"rediss://127.0.0.1:{strict.port}/3?{ca}&{own}").redis_url)
    assert await works(resolve(f"rediss://127.0.0.1:{open_to_all.port}?ssl_cert_reqs=none").redis_url)

    said = await problem_of(f"rediss://127.0.0.1:{open_to_all.port}")
    assert "shows a certificate that is not trusted (" in said
    assert "?ssl_ca_certs=/path/to/ca.pem" in said
    assert "Hostname mismatch" in await problem_of(f"rediss://localhost:{open_to_all.port}?{ca}")
    said = await problem_of(f"rediss://127.0.0.1:{strict.port}?{ca}")
    assert "a client certificate" in said
    said = await problem_of(f"redis://127.0.0.1:{strict.port}")
    assert "(connection closed; if it speaks TLS, use rediss://)" in said


# ---- ACL -------------------------------------------------------------------------------------------------------------
@pytest.mark.every_engine
async def test_the_documented_users_can_do_all_that_they_need_and_no_more(fleet: Fleet, said: list[str]) -> None:
    running = fleet.start("appendonly yes")
    users = documented_users()
    assert set(users) == {"ceylon-worker", "ceylon-monitor", "ceylon-client"}
    for name, rules in users.items():
        running.ask("ACL", "SETUSER", name, *rules.replace(">SECRET", ">secret").split(" "))
    urls = {name: f"redis://{name}:secret@127.0.0.1:{running.port}" for name in users}

    app = Ceylon(urls["ceylon-client"])

    @app.task(role="r")
    async def work(number: int) -> int:
        if number == 3:
            raise RetryTask(delay=0.01) if not tried else ValueError("always")
        return number

    tried: list[int] = []

    worker = Worker(urls["ceylon-worker"], registry=app.registry, roles=["r"], lease_s=1)
    monitor = Monitor(urls["ceylon-monitor"])
    async with app.client() as client:
        running_parts = [asyncio.create_task(worker.run()), asyncio.create_task(monitor.run())]
        await eventually(lambda: len(running.ask("SMEMBERS", Keys("ceylon").workers)) == 2, "both are registered")
        group = TaskGroup(
            "g",
            [Task(uses="work", id=f"t{i}", arguments={"number": i}, needs=["t0"] if i else []) for i in range(5)],
            goal=Goal("completed >= 4", deadline=60),
        )
        handle = await client.submit(group)
        view = await handle.wait("all", timeout=LIMIT_S)
        assert view.counters.completed >= 4
        lone = await client.submit(Task(uses="work", arguments={"number": 1}))
        assert await lone.result(timeout=LIMIT_S) == 1
        later = await client.submit(TaskGroup("later", [Task(uses="work", arguments={"number": 1}, delay=600)]))
        await later.cancel()
        assert (await later.wait("all", timeout=LIMIT_S)).outcome == "cancelled"
        assert [task async for task in handle.tasks()]
        assert await client.roles()
        for part in (worker, monitor):
            part.stop()
        await asyncio.gather(*running_parts)
    log = [dict(zip(entry[::2], entry[1::2], strict=True)) for entry in running.ask("ACL", "LOG")]
    # The Redis client tells its version, and goes on where that is refused; Redis 6.2 logs it as `client`.
    assert [entry for entry in log if entry["object"].lower() not in ("client|setinfo", "client")] == []
    assert not [line for line in warnings(said) if "docs/deployment.md" in line]

    for name in users:
        for words in (["FLUSHALL"], ["KEYS", "*"], ["CONFIG", "GET", "*"], ["GET", "other"], ["PUBLISH", "other", "1"]):
            with redis.Redis.from_url(urls[name]) as client_of_user, pytest.raises(redis.exceptions.NoPermissionError):
                client_of_user.execute_command(*words)


@pytest.mark.every_engine
async def test_what_an_acl_refuses_is_named_and_said_once(fleet: Fleet, said: list[str]) -> None:
    running = fleet.start("appendonly yes")
    running.ask("ACL", "SETUSER", "poor", "on", ">secret", "resetchannels", "~ceylon:*", "+info", "+get", "+subscribe")
    url = f"redis://poor:secret@127.0.0.1:{running.port}"
    async with connected(url) as connection:
        for call, named in ((command("SET", "ceylon:a", 1), "set"), (command("GET", "other"), "GET on other")):
            with pytest.raises(RedisError, match=r"docs/deployment\.md") as caught:
                await connection.run([call])
            assert named in str(caught.value)

    hub = EventHub(url, Keys("ceylon"))
    waiter = asyncio.create_task(enter(hub.watch("g")))
    await eventually(lambda: warnings(said), "a warning")
    await eventually(lambda: count_of(running, "subscribe") >= 3, "the subscription was tried again")
    waiter.cancel()
    await asyncio.gather(waiter, return_exceptions=True)
    await hub.close()
    (warning,) = warnings(said)
    assert "Notifications do not arrive" in warning
    assert "docs/deployment.md" in warning


def count_of(running: Running, name: str) -> int:
    facts: Any = running.ask("INFO", "commandstats").get(f"cmdstat_{name}", {})
    return int(facts.get("calls", 0)) + int(facts.get("rejected_calls", 0))


async def enter(watching: Any) -> None:
    async with watching:
        await asyncio.Event().wait()


# ---- cancelled in the middle -----------------------------------------------------------------------------------------
async def test_a_cancelled_task_can_use_redis_while_it_cleans_up(redis_url: str, namespace: str) -> None:
    app, waiting = Ceylon(redis_url, namespace=namespace), asyncio.Event()
    answers: list[object] = []
    async with app.client() as client:
        handle = await client.submit(TaskGroup("g", [Task(role="r")]))

        async def wait_or_cancel() -> None:
            try:
                waiting.set()
                await handle.wait("all")
            except asyncio.CancelledError:
                await handle.cancel()
                answers.append((await handle.view()).outcome)
                raise

        waiter = asyncio.create_task(wait_or_cancel())
        await waiting.wait()
        waiter.cancel()
        with pytest.raises(asyncio.CancelledError):
            await waiter

    assert answers == ["cancelled"]


async def test_a_cancellation_that_the_connection_swallows_is_raised_all_the_same(
    redis_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    started = asyncio.Event()

    async def swallow(*_: Any, **__: Any) -> None:
        started.set()
        try:
            await asyncio.Event().wait()
        except asyncio.CancelledError:
            raise redis.ConnectionError("as redis-py says while it connects") from None

    monkeypatch.setattr(redis.asyncio.Connection, "connect", swallow)
    monkeypatch.setattr(redis.asyncio.UnixDomainSocketConnection, "connect", swallow)
    async with connected(redis_url) as connection:
        for call in (connection.run([command("GET", "key")]), connection.pop(["key"], 1), connection.check()):
            started.clear()
            task = asyncio.ensure_future(call)
            await started.wait()
            task.cancel()
            with pytest.raises(asyncio.CancelledError):
                await task


# ---- losing it later -------------------------------------------------------------------------------------------------
async def test_a_worker_that_loses_redis_says_so_once_and_once_when_it_is_back(fleet: Fleet, said: list[str]) -> None:
    running = fleet.start("appendonly yes")
    app = Ceylon(running.url)

    @app.task(role="r")
    async def work() -> str:
        return "done"

    worker = Worker(running.url, registry=app.registry, roles=["r"])
    async with app.client() as client:
        task = asyncio.create_task(worker.run())
        assert await (await client.submit(Task(uses="work"))).result(timeout=LIMIT_S) == "done"
        running.kill()
        await eventually(
            lambda: any(pause > 0.1 for pause in worker.lanes._pauses.values()), "the worker has tried several times"
        )
        await asyncio.to_thread(fleet.start, "appendonly yes", port=running.port)
        await client.connection.run_until_answered([command("GET", "any")], give_up_after=LIMIT_S)
        assert await (await client.submit(Task(uses="work"))).result(timeout=LIMIT_S) == "done"
        worker.stop()
        await task
    lost, back = [line for line in said if "trying again" in line or "answers again" in line]
    assert lost.startswith(f"WARNING: Cannot reach Redis at {running.url} (connection ")
    assert lost.endswith("; trying again until Redis answers\n")
    assert re.fullmatch(r"INFO: Redis answers again, after \d+ lost connections\n", back)


@asynccontextmanager
async def at_work(url: str, said: list[str], **options: Any) -> AsyncIterator[tuple[Worker, str]]:
    """A worker in the middle of a task whose first attempt never ends by itself. Ends with the worker's own end."""
    app, started = Ceylon(url), asyncio.Event()

    @app.task(role="r")
    async def work(context: TaskContext) -> str:
        started.set()
        if context.crashes == 0:
            await asyncio.Event().wait()
        return context.worker

    worker = Worker(url, registry=app.registry, roles=["r"], lease_s=600, **options)
    async with app.client() as client:
        handle = await client.submit(TaskGroup("g", [work.bind()]))
        running = asyncio.create_task(worker.run())
        async with asyncio.timeout(LIMIT_S):
            await started.wait()
            yield worker, handle.id
            await running
    assert len([line for line in said if "Left without farewell" in line]) == 1


@pytest.mark.parametrize("cold", [False, True])
async def test_a_worker_that_is_stopped_while_redis_is_away_ends_after_its_grace(
    fleet: Fleet, said: list[str], cold: bool
) -> None:
    server = fleet.start("appendonly yes")
    async with at_work(server.url, said, grace_s=3600 if cold else 0.3) as (worker, gid):
        server.kill()
        await eventually(lambda: bool(worker.lanes._pauses), "the worker has noticed")
        worker.kill() if cold else worker.stop()

    # Its neighbour gives back at once what it held; its lease would end in ten minutes.
    await asyncio.to_thread(fleet.start, "appendonly yes", port=server.port)
    app = Ceylon(server.url)

    @app.task(role="r")
    async def work(context: TaskContext) -> str:
        return context.worker

    neighbour = Worker(server.url, registry=app.registry, roles=["r"])
    async with app.client() as client:
        running = asyncio.create_task(neighbour.run())
        assert await client.group(gid).task("1").result(timeout=LIMIT_S) == neighbour.name
        neighbour.stop()
        await running


async def test_a_cold_stop_does_not_wait_for_a_redis_that_does_not_answer(
    fleet: Fleet, said: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(store_node, "ANSWER_S", 3600.0)
    monkeypatch.setattr("rq_ceylon.worker.loop.LAST_WORD_S", 0.2)
    server = fleet.start("appendonly yes")
    async with at_work(server.url, said, grace_s=3600) as (worker, _):
        server.process.send_signal(signal.SIGSTOP)
        worker.kill()


def test_a_worker_command_that_is_stopped_while_redis_is_away_ends_with_0(fleet: Fleet, tmp_path: Path) -> None:
    server = fleet.start("appendonly yes")
    with commands_on(server.url, tmp_path) as commands:
        worker = commands.start("worker", "--role", "r", "--grace", "200ms")
        until(lambda: server.ask("SCARD", Keys("ceylon").workers) == 1, "the worker is registered")
        server.kill()
        until(lambda: "trying again" in commands.log(0).read_text(), "the worker has noticed")
        worker.terminate()
        assert worker.wait(LIMIT_S) == 0
        assert commands.log(0).read_text().count("Left without farewell") == 1
