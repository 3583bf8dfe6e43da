"""What a durable submission waits for: a replica that really follows, or the disk of a killed server."""

from __future__ import annotations

import asyncio
import os
import signal
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import redis
from commands import commands_on, eventually, until
from redis.crc import key_slot
from servers import Fleet, Running, start_cluster

from rq_ceylon import Ceylon, Client, DurabilityError, InvalidInputError, Task, TaskGroup
from rq_ceylon.client import session
from rq_ceylon.dev.server import EmbeddedServer
from rq_ceylon.errors import QueueFullError
from rq_ceylon.staging import keyed_id
from rq_ceylon.store import durability
from rq_ceylon.store.keys import Keys
from rq_ceylon.store.scripts import Call, command

pytestmark = pytest.mark.anyio


@contextmanager
def hanging(replica: Running, wait_s: float = 0.2) -> Iterator[None]:
    """A replica that acknowledges nothing, and how long it is waited for."""
    os.kill(replica.process.pid, signal.SIGSTOP)
    try:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(durability, "CONFIRM_S", wait_s)
            yield
    finally:
        os.kill(replica.process.pid, signal.SIGCONT)


def start_pair(fleet: Fleet) -> tuple[Running, Running]:
    """A primary, and its replica."""
    primary = fleet.start("repl-diskless-sync-delay 0")
    replica = fleet.start(f"replicaof 127.0.0.1 {primary.port}", "repl-diskless-sync-delay 0")
    until(lambda: replica.ask("INFO").get("master_link_status") == "up", "the replica follows")
    until(lambda: primary.ask("INFO").get("slave0", {}).get("state") == "online", "the primary knows it")
    return primary, replica


def group(key: str | None = None, count: int = 1) -> TaskGroup:
    return TaskGroup("g", [Task(role="p")] * count, key=key)


def calls_of(raw: Any, command: str) -> int:
    found: int = raw.info("commandstats").get(f"cmdstat_{command}", {}).get("calls", 0)
    return found


# ---- replica ---------------------------------------------------------------------------------------------------------
@pytest.mark.every_engine
async def test_what_was_submitted_for_a_replica_is_there_once_submit_returns(fleet: Fleet, namespace: str) -> None:
    primary, replica = start_pair(fleet)
    keys = Keys(namespace)
    async with Client(primary.url, namespace=namespace) as client:
        run = await client.submit(group(count=1200), durability="replica")
        assert int(replica.ask("HGET", keys.group_part(run.id, "meta"), "total")) == 1200
        assert replica.ask("ZSCORE", keys.index_of(run.id), run.id) is not None

        task = await client.submit(Task(role="p"), durability="replica")
        gid, _, tid = task.id.partition("/")
        assert replica.ask("HEXISTS", keys.group_part(gid, "tasks"), tid)
        assert replica.ask("ZSCORE", keys.index_of(gid), gid) is not None


async def test_an_announcement_that_was_refused_is_confirmed_too_when_it_is_repeated(
    fleet: Fleet, namespace: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    primary, _ = start_pair(fleet)
    async with Client(primary.url, namespace=namespace) as client:
        confirming, sent = client._confirming, []
        run_each = confirming.run_each

        async def full_at_first(calls: Sequence[Call]) -> list[Any]:
            sent.append(calls)
            replies = await run_each(calls)
            return [QueueFullError("full"), *replies[1:]] if len(sent) == 1 else replies

        monkeypatch.setattr(confirming, "run_each", full_at_first)
        run = await client.submit(group(), durability="replica")

    assert primary.ask("ZSCORE", Keys(namespace).index_of(run.id), run.id) is not None
    assert [any(call.confirm for call in calls) for calls in sent] == [True, True]


@pytest.mark.every_engine
async def test_a_replica_that_hangs_is_told_of_and_the_same_key_waits_for_it_anew(fleet: Fleet, namespace: str) -> None:
    primary, replica = start_pair(fleet)
    url = primary.url
    async with Client(url, namespace=namespace) as client, Client(url, namespace=namespace) as other:
        with hanging(replica):
            with pytest.raises(DurabilityError, match=r"'replica' is not confirmed.*again with key 'k'") as caught:
                await client.submit(group("k"), durability="replica")
            assert (await client.group(caught.value.id).view()).counters.pending == 1  # accepted all the same

            # By a connection that has written nothing before, of which alone WAIT would have nothing to tell.
            with pytest.raises(DurabilityError, match=caught.value.id):
                await other.submit(group("k"), durability="replica")
            with pytest.raises(DurabilityError, match="the task was accepted as") as lone:
                await client.submit(Task(role="p"), durability="replica")
            assert await client.task(lone.value.id).status() == "pending"

        run = await other.submit(group("k"), durability="replica")

        assert run.repeated
        assert run.id == caught.value.id
        assert replica.ask("EXISTS", Keys(namespace).group_part(run.id, "meta"))


async def test_who_does_not_wait_for_the_replica_is_not_held_up_by_those_who_do(fleet: Fleet, namespace: str) -> None:
    primary, replica = start_pair(fleet)
    async with Client(primary.url, namespace=namespace) as client:
        with hanging(replica, 5):
            waiting = asyncio.create_task(client.submit(group(), durability="replica"))
            await eventually(lambda: primary.ask("INFO", "clients")["blocked_clients"], "the first waits")

            run = await client.submit(group())
            task = await client.submit(Task(role="p"))

            assert (await run.view()).counters.pending == 1
            assert await task.status() == "pending"
            assert not waiting.done()
        await asyncio.wait([waiting])


@pytest.mark.every_engine
async def test_without_a_replica_nothing_is_written(redis_url: str, namespace: str) -> None:
    async with Client(redis_url, namespace=namespace) as client:
        for work in (group("k"), Task(role="p")):
            with pytest.raises(DurabilityError, match=r"'replica' is not.* no replica .*nothing was") as it:
                await client.submit(work, durability="replica")
            assert it.value.id == ""
    with redis.Redis.from_url(redis_url) as raw:
        assert raw.dbsize() == 0


@pytest.mark.long
async def test_in_a_cluster_the_replica_of_the_groups_own_node_is_waited_for(fleet: Fleet, namespace: str) -> None:
    cluster = start_cluster(fleet, 2)
    replicas = {}
    for node in cluster.nodes:
        node.ask("CONFIG", "SET", "repl-diskless-sync-delay", 0)
        replica = fleet.start("cluster-enabled yes", "cluster-node-timeout 2000", "repl-diskless-sync-delay 0")
        replica.ask("CLUSTER", "MEET", "127.0.0.1", node.port)
        identity = node.ask("CLUSTER", "MYID")
        until(lambda r=replica, i=identity: i in str(r.ask("CLUSTER", "NODES")), "it knows its primary")  # type: ignore[misc]
        replica.ask("CLUSTER", "REPLICATE", identity)
        until(lambda n=node: n.ask("INFO").get("slave0", {}).get("state") == "online", "it follows")  # type: ignore[misc]
        replicas[node.port] = replica
    keys = Keys(namespace)

    async with Client(cluster.url, namespace=namespace) as client:
        first: set[int] = set()
        for number in range(20):
            run = await client.submit(group(f"k{number}"), durability="replica")
            meta, index = keys.group_part(run.id, "meta"), keys.index_of(run.id)
            owner, of_index = (cluster.owner(key_slot(key.encode())).port for key in (meta, index))
            for port, key in ((owner, meta), (of_index, index)):
                with redis.Redis(port=replicas[port].port) as raw:
                    raw.execute_command("READONLY")
                    assert raw.exists(key)
            first.add(owner)
        assert len(first) == 2

        hung = cluster.nodes[0]
        ended = set()
        for number in range(20, 200):
            gid = keyed_id(namespace, f"k{number}")
            places = (keys.group_part(gid, "meta"), keys.index_of(gid))
            of_group, of_index = (cluster.owner(key_slot(key.encode())) is hung for key in places)
            if (of_group, of_index) in ended:
                continue
            if of_group or of_index:
                with hanging(replicas[hung.port]), pytest.raises(DurabilityError, match=gid):
                    await client.submit(group(f"k{number}"), durability="replica")
            else:
                with hanging(replicas[hung.port], 5):
                    await client.submit(group(f"k{number}"), durability="replica")
            ended.add((of_group, of_index))
        assert len(ended) == 4


# ---- fsync -----------------------------------------------------------------------------------------------------------
async def test_what_was_submitted_for_the_disk_survives_a_kill_at_once(
    start_server: Callable[..., EmbeddedServer], short_tmp_path: Path, namespace: str
) -> None:
    server = start_server(folder=short_tmp_path, appendonly=True)
    async with Client(server.url, namespace=namespace) as client:
        run = await client.submit(group("k", count=700), durability="fsync")
        task = await client.submit(Task(role="p"), durability="fsync")
        with redis.Redis.from_url(server.url) as raw:
            assert calls_of(raw, "waitaof") >= 2
    server.kill()
    server = start_server(folder=short_tmp_path, appendonly=True)
    async with Client(server.url, namespace=namespace) as client:
        assert (await client.group(run.id).view()).counters.pending == 700
        assert await client.task(task.id).status() == "pending"
        assert (await client.submit(group("k", count=700), durability="fsync")).repeated


async def test_a_server_that_still_reads_its_file_is_waited_for(fleet: Fleet, namespace: str) -> None:
    server = fleet.start("appendonly yes")
    async with Client(server.url, namespace=namespace) as client:
        with redis.Redis(port=server.port) as raw, raw.pipeline(transaction=False) as pipeline:
            for number in range(5000):  # it answers after each thousand, and then seems to write no file
                pipeline.set(f"other:{number}", "x")
            pipeline.execute()
        server.kill()
        fleet.start("appendonly yes", "key-load-delay 100", port=server.port)

        run = await client.submit(group(), durability="fsync")

        assert (await run.view()).counters.pending == 1


async def test_single_tasks_that_are_submitted_together_share_the_wait_for_the_disk(
    start_server: Callable[..., EmbeddedServer], short_tmp_path: Path, namespace: str
) -> None:
    server = start_server(folder=short_tmp_path, appendonly=True)
    async with Client(server.url, namespace=namespace) as client:
        tasks = await asyncio.gather(*(client.submit(Task(role="p"), durability="fsync") for _ in range(100)))

        assert len({task.id for task in tasks}) == 100
        with redis.Redis.from_url(server.url) as raw:
            assert calls_of(raw, "waitaof") <= 3


async def test_a_durable_task_does_not_share_its_pipeline_with_its_entry(
    start_server: Callable[..., EmbeddedServer], short_tmp_path: Path, namespace: str
) -> None:
    """The two may know different owners of the slots of a cluster: the entry might be there before the task."""
    server = start_server(folder=short_tmp_path, appendonly=True)
    async with Client(server.url, namespace=namespace) as client:
        confirming, sent = client._confirming, list[str]()
        run_each = confirming.run_each

        async def noted(calls: Sequence[Call]) -> list[Any]:
            sent.extend(call.script for call in calls if call.script)
            return await run_each(calls)

        confirming.run_each = noted  # type: ignore[method-assign]
        await client.submit(Task(role="p"), durability="fsync")
        (queued,) = await client.connection.run([command("XLEN", client.keys.role_part("p", "normal"))])

    assert sent == ["submit"]
    assert queued == 1


async def test_without_an_append_only_file_nothing_is_written(redis_url: str, namespace: str) -> None:
    async with Client(redis_url, namespace=namespace) as client:
        for work in (group("k"), Task(role="p")):
            with pytest.raises(DurabilityError, match=r"CONFIG SET appendonly yes.*nothing was written"):
                await client.submit(work, durability="fsync")
    with redis.Redis.from_url(redis_url) as raw:
        assert raw.dbsize() == 0


@pytest.mark.parametrize("work", [group("k"), Task(role="p")])
async def test_a_file_that_was_switched_off_meanwhile_is_told_of(
    redis_url: str, namespace: str, monkeypatch: pytest.MonkeyPatch, work: Task | TaskGroup
) -> None:
    monkeypatch.setattr(session, "unable", lambda info, durability: "")
    async with Client(redis_url, namespace=namespace) as client:
        with pytest.raises(DurabilityError, match=r"Redis answered: WAITAOF cannot.* accepted as") as caught:
            await client.submit(work, durability="fsync")
        gid = caught.value.id.partition("/")[0]
        assert (await client.group(gid).view()).counters.pending == 1


@pytest.mark.parametrize(
    ("info", "words"),
    [
        ({"redis_version": "7.0.15", "aof_enabled": 1}, "is redis 7.0.15, which cannot confirm this; upgrade it"),
        ({"redis_version": "7.2.4", "valkey_version": "9.1.2", "aof_enabled": 0}, "writes no append-only file"),
        ({"redis_version": "7.2.4", "aof_enabled": 1}, ""),
        ({"redis_version": "7.2.4", "valkey_version": "7.2.6", "aof_enabled": 1}, ""),
    ],
)
def test_who_can_tell_that_it_is_on_the_disk(info: dict[str, Any], words: str) -> None:
    assert durability.unable(info, "fsync").startswith(words)
    assert bool(durability.unable(info, "fsync")) == bool(words)


@pytest.mark.parametrize("engine", ["redis"], indirect=True)
async def test_a_redis_that_cannot_tell_is_refused_before_anything_is_written(
    start_server: Callable[..., EmbeddedServer], short_tmp_path: Path, namespace: str
) -> None:
    server = start_server(folder=short_tmp_path, appendonly=True)
    with redis.Redis.from_url(server.url) as raw:
        if tuple(map(int, raw.info()["redis_version"].split(".")[:2])) >= (7, 2):
            pytest.skip("this Redis can tell")
        async with Client(server.url, namespace=namespace) as client:
            with pytest.raises(DurabilityError, match=r"upgrade it to 7\.2, or use another durability; nothing was"):
                await client.submit(group(), durability="fsync")
        assert raw.dbsize() == 0


# ---- how it is asked for ---------------------------------------------------------------------------------------------
async def test_an_unknown_durability_is_refused(redis_url: str, namespace: str) -> None:
    async with Client(redis_url, namespace=namespace) as client:
        with pytest.raises(InvalidInputError, match="durability: 'disk' is not known; use none, replica, fsync"):
            await client.submit(group(), durability="disk")  # type: ignore[call-overload]


def test_the_client_without_await_and_the_command_take_it_too(
    start_server: Callable[..., EmbeddedServer], redis_url: str, short_tmp_path: Path, namespace: str
) -> None:
    server = start_server(folder=short_tmp_path, appendonly=True)
    (short_tmp_path / "group.yaml").write_text("name: g\ntasks: [{role: p, duration: 0}]\n")
    with Ceylon(server.url, namespace=namespace).sync_client() as client:
        assert client.submit(group(), durability="fsync").view().counters.pending == 1
        assert client.submit(Task(role="p"), durability="fsync").status() == "pending"
    with commands_on(server.url, short_tmp_path) as commands, redis.Redis.from_url(server.url) as raw:
        before = calls_of(raw, "waitaof")
        sent = commands.run("submit", "group.yaml", "--durability", "fsync")
        assert sent.returncode == 0, sent.stderr
        assert calls_of(raw, "waitaof") == before + 1
    with commands_on(redis_url, short_tmp_path) as commands:
        refused = commands.run("submit", "group.yaml", "--durability", "fsync")
        assert refused.returncode == 3
        assert "durability: 'fsync' is not possible" in refused.stderr
        assert "Traceback" not in refused.stderr
        assert refused.stdout == ""
