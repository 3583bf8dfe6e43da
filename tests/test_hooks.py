"""Start and stop hooks: which run, in which order, and what happens if one raises, exits or hangs."""

from __future__ import annotations

import asyncio
import sys
from collections.abc import Callable

import pytest
import redis
from commands import Commands, eventually

from rq_ceylon.app import Ceylon
from rq_ceylon.worker.hooks import HookError, Hooks

pytestmark = pytest.mark.anyio


@pytest.fixture
def ran() -> list[str]:
    return []


def note(app: Ceylon, ran: list[str], *names: str) -> None:
    """Register hooks that note their names: those that begin with `stop` as stop hooks."""

    def hook(name: str) -> Callable[[], None]:
        return lambda: ran.append(name)

    for name in names:
        (app.on_stop if name.startswith("stop") else app.on_start)(hook(name))


async def test_start_hooks_run_in_order_and_stop_hooks_in_reverse(app: Ceylon, ran: list[str]) -> None:
    note(app, ran, "start a", "stop a", "start b", "stop b")

    async with Hooks(app.registry):
        ran.append("work")

    assert ran == ["start a", "start b", "work", "stop b", "stop a"]


async def test_a_start_hook_that_exits_fails_and_only_what_started_is_stopped(app: Ceylon, ran: list[str]) -> None:
    note(app, ran, "start a", "stop a")

    @app.on_start
    async def exits() -> None:
        sys.exit("no licence")

    note(app, ran, "stop of what exits", "start c", "stop c")

    with pytest.raises(HookError, match=r"exits failed: SystemExit: no licence \(at .*test_hooks.py:\d+: "):
        async with Hooks(app.registry):
            ran.append("work")

    assert ran == ["start a", "stop a"]


@pytest.mark.parametrize("error", [ValueError("closed"), SystemExit(0)])
async def test_each_stop_hook_runs_whatever_another_raises(
    error: BaseException, app: Ceylon, ran: list[str], said: list[str]
) -> None:
    note(app, ran, "stop a")

    @app.on_stop
    def breaks() -> None:
        raise error

    note(app, ran, "stop c")

    with pytest.raises(HookError, match=r"these stop hooks failed: .*breaks"):
        async with Hooks(app.registry):
            ran.append("work")

    assert ran == ["work", "stop c", "stop a"]
    (line,) = said
    assert line.startswith("ERROR: The stop hook ")
    assert f"{type(error).__name__}: {error}" in line


async def test_a_stop_hook_does_not_hide_what_ended_the_work(app: Ceylon, said: list[str]) -> None:
    @app.on_stop
    def breaks() -> None:
        raise ValueError("closed")

    with pytest.raises(ZeroDivisionError):
        async with Hooks(app.registry):
            raise ZeroDivisionError

    assert len(said) == 1


async def test_a_stop_hook_that_hangs_is_given_up_and_a_slow_start_hook_is_waited_for(
    app: Ceylon, ran: list[str], said: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("rq_ceylon.worker.hooks.HOOK_S", 0.05)
    note(app, ran, "stop a")

    @app.on_start
    async def loads_a_model() -> None:
        await eventually(lambda: said, "it is said that this takes long")

    @app.on_stop
    async def hangs() -> None:
        await asyncio.sleep(600)

    with pytest.raises(HookError, match="hangs"):
        async with Hooks(app.registry):
            ran.append("work")

    assert ran == ["work", "stop a"]
    assert "loads_a_model has not ended for 0.05 s; this worker takes no tasks before it has" in said[0]
    assert "hangs did not end within 0.05 s" in said[1]


async def test_a_cancelled_worker_runs_its_stop_hooks(app: Ceylon, ran: list[str]) -> None:
    note(app, ran, "stop a")

    async def work() -> None:
        async with Hooks(app.registry):
            ran.append("work")
            await asyncio.sleep(600)

    working = asyncio.create_task(work())
    await eventually(lambda: ran, "it works")
    working.cancel()

    with pytest.raises(asyncio.CancelledError):
        await working
    assert ran == ["work", "stop a"]


# ---- as a command ----------------------------------------------------------------------------------------------------
HEAD = """
import sys, time
from rq_ceylon import Ceylon
from rq_ceylon.worker import hooks
app = Ceylon()
hooks.HOOK_S = 0.2
hooks.process.ALLOWANCE_S = 0.2

@app.task
def f() -> None: ...

@app.on_stop
def says_so() -> None:
    print("stopped")
"""
ENDINGS = {
    "import": ("", "sys.exit(0)", 4, "application 'jobs:app' cannot be imported: SystemExit: 0 (at {file}:{line}: "),
    "start": ("@app.on_start", "    sys.exit(0)", 1, "start hook opens failed: SystemExit: 0 (at {file}:{line}: "),
    "stop": ("@app.on_stop", "    time.sleep(60)", 1, "ends now: the stop hook opens took too long to end; its main"),
}


@pytest.mark.parametrize("place", ENDINGS)
def test_a_worker_whose_application_exits_or_hangs_says_where_and_ends(place: str, commands: Commands) -> None:
    decorator, body, code, words = ENDINGS[place]
    text = HEAD + (f"{decorator}\ndef opens() -> None:\n" if decorator else "") + body + "\n"
    file = commands.folder / "jobs.py"
    file.write_text(text)

    ended = commands.run("worker", "jobs:app", "--burst")

    assert ended.returncode == code, ended.stderr
    assert words.format(file=file, line=text.count("\n")) in ended.stderr
    assert "Traceback" not in ended.stderr


def test_no_hook_runs_if_redis_refuses_at_the_start(commands: Commands) -> None:
    (commands.folder / "jobs.py").write_text(HEAD)
    with redis.Redis.from_url(commands.url) as store:
        store.config_set("maxmemory-policy", "allkeys-lru")
        try:
            refused = commands.run("worker", "jobs:app", "--burst")
        finally:
            store.config_set("maxmemory-policy", "noeviction")

    assert (refused.returncode, refused.stdout) == (3, ""), refused.stderr
    assert commands.run("worker", "jobs:app", "--burst").stdout == "stopped\n"
