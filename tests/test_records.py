"""
Records that this version cannot read: a newer one wrote them, or something else did. They are left out, and named once;
everything beside them is served, and no worker, monitor or command ends of them.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import pytest
import redis
from bench import Bench
from commands import LIMIT_S, Commands, eventually

from rq_ceylon import Ceylon, Client, Counters, Goal, TaskGroup
from rq_ceylon.errors import RecordError
from rq_ceylon.monitor import Monitor
from rq_ceylon.store import records, scripts
from rq_ceylon.store.codec import result_of, settled_of, task_parts
from rq_ceylon.store.keys import Keys
from rq_ceylon.store.records import Record
from rq_ceylon.worker.loop import Worker

pytestmark = pytest.mark.anyio

# As this layout has always been written.
TASK = 'p|2||||{"uses":"a|b"}'
CLAIM = "l|2|17|w|2:5-0|5|1|1||p|2"
RESULT = 'failed|error|p|2|1|w|5|9|1|3|2|1||44|[{"type":"E","message":"a|b","traceback":""},{"uses":"x"}]'
OLD_RESULT = 'failed|error|p|2|1|w|5|9|1|3|[{"type":"E","message":"a|b","traceback":""},{"uses":"x"}]'
GOAL = "most|drain|continue|0|completed,1,>=|"
SETTLED = "achieved|9|3|commit|3,0,0,0,3,0,0,4,1"

BAD_META: dict[str, Callable[[Any, str], Any]] = {
    "an unknown status": lambda raw, key: raw.hset(key, "status", "hibernating"),
    "a counter that is no number": lambda raw, key: raw.hset(key, mapping={"status": "active", "total": "many"}),
    "goals in another form": lambda raw, key: raw.hset(key, mapping={"status": "active", "goals": "g"}),
    "specs that are no JSON": lambda raw, key: raw.hset(key, mapping={"status": "active", "specs": "["}),
    "specs of another form": lambda raw, key: raw.hset(key, mapping={"status": "active", "specs": "[7]"}),
    "not UTF-8": lambda raw, key: raw.hset(key, "status", b"\xff"),
    "a text": lambda raw, key: raw.set(key, "x"),
}

BAD_HEARTBEATS: dict[str, Callable[[Any, str], Any]] = {
    "no JSON": lambda raw, key: raw.set(key, "{"),
    "not UTF-8": lambda raw, key: raw.set(key, b"\xff"),
    "another JSON": lambda raw, key: raw.set(key, "[1]"),
    "a hash": lambda raw, key: raw.hset(key, "a", 1),
    "fields of other kinds": lambda raw, key: raw.set(
        key, json.dumps({"roles": 7, "slots": "x", "tasks": [1], "low_marks": [1], "task_names": {"a": 1}, "new": 1})
    ),
}


def forge(raw: Any, keys: Keys) -> None:
    """Every bad record at once, beside what is good."""
    for number, bad in enumerate(BAD_META.values()):
        gid = f"bad-{number}"
        bad(raw, keys.group_part(gid, "meta"))
        raw.zadd(keys.index_of(gid), {gid: 1})
    for number, bad in enumerate(BAD_HEARTBEATS.values()):
        name = f"odd-{number}"
        bad(raw, keys.worker(name))
        raw.sadd(keys.workers, name)
    raw.set(keys.role_part("odd", "meta"), "x")
    raw.sadd(keys.roles, "odd")


async def test_everything_beside_a_record_that_cannot_be_read_is_served(
    app: Ceylon, client: Client, redis_url: str, namespace: str, said: list[str]
) -> None:
    @app.task(role="r")
    async def work() -> str:
        return "done"

    raw, keys = redis.Redis.from_url(redis_url), Keys(namespace)
    forge(raw, keys)
    monitor = Monitor(redis_url, namespace=namespace)
    worker = Worker(redis_url, registry=app.registry, namespace=namespace, roles=["r"], lease_s=0.5)
    running = [asyncio.create_task(part.run()) for part in (worker, monitor)]
    handle = await client.submit(TaskGroup("good", [work.bind()], goal=Goal("completed >= 1", name="all")))
    await handle.wait("all", LIMIT_S)
    await eventually(lambda: any("Goal achieved: all" in line for line in said), "the monitor tells of the goal")

    assert [view.id for view in await client.groups()] == [handle.id]
    names = {view.name for view in await client.workers()}
    assert names == {worker.name, monitor.name, *(f"odd-{number}" for number in range(len(BAD_HEARTBEATS)))}
    assert {role.name for role in await client.roles()} == {"r", "odd"}
    assert not [task for task in running if task.done()]
    for part in (worker, monitor):
        part.stop()
    await asyncio.gather(*running)
    for number in range(len(BAD_META)):
        assert len([line for line in said if f"bad-{number}" in line and line.startswith("WARNING: Left out")]) == 1
    assert not [line for line in said if "Traceback" in line]


async def test_a_group_that_cannot_be_read_is_refused_in_words_where_it_is_asked_for(
    client: Client, redis_url: str, namespace: str
) -> None:
    with redis.Redis.from_url(redis_url) as raw:
        for number, bad in enumerate(BAD_META.values()):
            gid = f"bad-{number}"
            bad(raw, Keys(namespace).group_part(gid, "meta"))
            with pytest.raises(RecordError, match=r"cannot be read|something else"):
                await client.group(gid).view()


async def test_results_and_events_that_cannot_be_read_are_refused_in_words(
    app: Ceylon, client: Client, redis_url: str, namespace: str
) -> None:
    keys = Keys(namespace)

    @app.task(role="r")
    async def work() -> str:
        return "done"

    worker = Worker(redis_url, registry=app.registry, namespace=namespace, roles=["r"], burst=True)
    handle = await client.submit(TaskGroup("g", [work.bind()]))
    await worker.run()
    with redis.Redis.from_url(redis_url) as raw:
        raw.hset(keys.group_part(handle.id, "results"), "1", "completed|in|another|form")
        raw.lset(keys.group_part(handle.id, "events"), 0, "another form")
    for read in (handle.task("1").result(LIMIT_S), anext(handle.events())):
        with pytest.raises(RecordError, match="cannot be read"):
            await read


def test_commands_show_what_they_can_read(commands: Commands, redis_url: str) -> None:
    with redis.Redis.from_url(redis_url) as raw:
        forge(raw, Keys("ceylon"))
    for name, code in {"status": 0, "groups": 0, "workers": 0, "audit": 1}.items():
        ended = commands.run("ceylon", name)
        assert ended.returncode == code, (name, ended.stderr)
        assert "Traceback" not in ended.stderr


@pytest.mark.parametrize(
    ("counts", "found"),
    [
        ("9,0,0,1,6,2,0,11,3", Counters(9, 0, 0, 1, 6, 2, 0, 11, 3)),
        ("9,0,0,1,6,2,0,11", Counters(9, 0, 0, 1, 6, 2, 0, 11, 0)),
        ("9,0,0,1,6,2,0,11,3,77", Counters(9, 0, 0, 1, 6, 2, 0, 11, 3)),
    ],
    ids=["all", "settled before a counter was added", "settled by a newer version"],
)
def test_a_settled_goal_is_read_whatever_counters_it_keeps(counts: str, found: Counters) -> None:
    status, settled = settled_of(f"achieved|1|2|commit|{counts}")

    assert (status, settled.by, settled.counters) == ("achieved", "commit", found)


# ---- one description for both languages ------------------------------------------------------------------------------
def in_lua(bench: Bench, name: str, record: Record, text: str, changes: str = "") -> list[str]:
    """The record as a script reads it, and as it writes it again; a nil is `nil`."""
    behind = f", {name}_json(ARGV[1])" if record.json else ""
    script = f"""{record.lua(name, "of")}
        {record.lua(name, "text")}
        {record.lua(name, "json") if record.json else ""}
        local t = {name}_of(ARGV[1])
        local read = {{}}
        for i, field in ipairs({{{", ".join(f"'{field}'" for field in record.fields)}}}) do
            read[i] = tostring(t[field])
        end
        {changes}
        read[#read + 1] = {name}_text(t{behind})
        return read"""
    answer: list[str] = bench.redis.eval(script, 0, text)
    return answer


@pytest.mark.parametrize(
    ("name", "text"), [("task", TASK), ("claim", CLAIM), ("result", RESULT), ("goal", GOAL), ("settled", SETTLED)]
)
def test_a_record_reads_alike_in_both_languages_and_a_new_field_is_one_word(name: str, text: str, bench: Bench) -> None:
    record = records._RECORDS[name]
    longer = replace(record, fields=(*record.fields, "colour", "shape"))
    texts = record.split(text)[: len(record.fields)]
    read = [str(record.parse(text)[field]).replace("None", "nil") for field in record.fields]

    assert in_lua(bench, name, record, text) == [*read, text]
    assert record.pack(dict(zip(record.fields, texts, strict=True))) == text.partition(record.json or "\n")[0]

    # Written before the fields were there, or before the second was, and with both.
    *old, again = in_lua(bench, name, longer, text, "t.colour = 'red'")
    assert old == [*read, "", ""]
    *newer, last = in_lua(bench, name, longer, again, "t.shape = 'round'")
    assert newer == [*read, "red", ""]
    assert in_lua(bench, name, longer, last)[-3:] == ["red", "round", last]
    assert longer.split(last)[: len(longer.fields)] == [*texts, "red", "round"]
    shorter = replace(record, fields=(*record.fields, "colour"))
    one_less = shorter.pack(dict(zip(shorter.fields, [*texts, "red"], strict=True)))
    one_less += "".join(record.split(text)[len(record.fields) :])
    assert in_lua(bench, name, longer, one_less)[-3:-1] == ["red", ""]
    with pytest.raises(ValueError, match="are known"):
        record.split(last)


def test_records_of_this_layout_are_read(bench: Bench) -> None:
    assert task_parts(TASK) == ("p", 2, None, None, '{"uses":"a|b"}')
    result = result_of("a", RESULT)
    assert result == result_of("a", OLD_RESULT)
    assert in_lua(bench, "result", records.RESULT, OLD_RESULT)[10:14] == ["nil", "", "nil", "nil"]
    assert (result.status, result.attempts, result.run_ms, result.error) == (
        "failed", 2, 3, {"type": "E", "message": "a|b", "traceback": ""},
    )  # fmt: skip
    assert settled_of(SETTLED)[1].counters == Counters(total=3, completed=3, attempts=4, crashes=1)


@pytest.fixture
def a_field_more(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[], None]]:
    """Begins a version in which each record has one more field."""

    def begin() -> None:
        for name, record in records._RECORDS.items():
            monkeypatch.setitem(records._RECORDS, name, replace(record, fields=(*record.fields, "colour")))
        forget()

    def forget() -> None:
        scripts.source.cache_clear()
        scripts.digest.cache_clear()

    yield begin
    monkeypatch.undo()
    forget()


def test_a_group_whose_records_lack_a_new_field_goes_on(bench: Bench, a_field_more: Callable[[], None]) -> None:
    bench.queued("g", ["a", "b"], goal="completed >= 2")
    bench.commit("w", bench.started("w", "g"), "retry")

    a_field_more()
    for delivery in bench.fetch("v"):
        assert bench.claim("v", delivery) == ["GRANTED"]
        assert bench.commit("v", delivery) == "OK"

    assert (bench.meta("g")["status"], bench.meta("g")["completed"]) == ("finished", "2")
    results = bench.redis.hgetall(bench.keys.group_part("g", "results"))
    assert sorted(text.split("|")[3] for text in results.values()) == ["1", "2"]
    assert all("||[" in text for text in results.values())  # the new field is there, and empty
