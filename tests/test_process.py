"""How a process ends, whatever users' code does: hostile handlers in real workers, on both event loops."""

from __future__ import annotations

import signal
import subprocess
import textwrap
from collections.abc import Iterator

import pytest
from commands import Commands, Process, until

from rq_ceylon.app import Ceylon
from rq_ceylon.client import SyncClient
from rq_ceylon.dev import processes
from rq_ceylon.models import Task

GRACE_S, ALLOWANCE_S = 0.3, 2.0
LIMIT_S = 30.0
"""Less than what the handlers would take."""

LOOPS = ("asyncio", "uvloop")

LAUNCH = f"""
import sys
loop, sys.argv[0] = sys.argv[1], "ceylon-worker"
del sys.argv[1]
if loop == "asyncio":
    sys.modules["uvloop"] = None
from rq_ceylon import cli, process
from rq_ceylon.worker import executor
process.ALLOWANCE_S, executor.CLEANUP_S = {ALLOWANCE_S}, 0.3
cli.COMMAND(prog_name="ceylon-COMMAND")
"""
"""A command with a shorter allowance, on the loop that its first argument names."""

HOSTILE = {
    "blocks_the_loop": "time.sleep(60)",
    "spins_on_the_loop": "while True: pass",
    "hangs_at_exit": "atexit.register(time.sleep, 60)",
    "goes_on_in_every_other_way": """
        async def stubborn():
            while True:
                try:
                    await asyncio.sleep(60)
                except asyncio.CancelledError:
                    pass

        TASKS.append(asyncio.create_task(stubborn()))
        multiprocessing.get_context("fork").Process(target=time.sleep, args=[60]).start()
        asyncio.get_running_loop().run_in_executor(None, time.sleep, 60)
        ThreadPoolExecutor(2).submit(time.sleep, 60)
        await stubborn()
    """,
}
LAST_LINES = {
    "blocks_the_loop": ("what runs in it took too long to end; its main thread is at", "in hostile"),
    "spins_on_the_loop": ("what runs in it took too long to end; its main thread is at", "in hostile"),
    "hangs_at_exit": ("its atexit functions took too long to end",),
}
"""What the watch says when it must end the process; the others end by themselves."""


def app_with(body: str) -> str:
    head = """
        import asyncio, atexit, multiprocessing, os, pathlib, sys, time
        from concurrent.futures import ThreadPoolExecutor
        from rq_ceylon import Ceylon

        app = Ceylon()
        TASKS = []

        @app.task
        async def hostile(name: str) -> None:
            pathlib.Path(name).touch()
    """
    return textwrap.dedent(head) + textwrap.indent(textwrap.dedent(body), "    ")


@pytest.fixture
def client(redis_url: str) -> Iterator[SyncClient]:
    with Ceylon(redis_url).sync_client() as client:
        yield client


def launch(commands: Commands, loop: str, *arguments: str, command: str = "worker") -> Process:
    """A command on that loop, with the shorter allowance."""
    return commands.launch("-c", LAUNCH.replace("COMMAND", command), loop, *arguments)


def workers_with(commands: Commands, client: SyncClient, body: str, *arguments: str) -> dict[str, Process]:
    """One worker per event loop, each of which has begun the hostile task."""
    (commands.folder / "jobs.py").write_text(app_with(body))
    found = {}
    for loop in LOOPS:
        client.submit(Task(uses="hostile", arguments={"name": f"begun-{loop}"}, role=loop))
        found[loop] = launch(commands, loop, "jobs:app", "-r", loop, "--grace", f"{GRACE_S}s", *arguments)
    for loop in LOOPS:
        until((commands.folder / f"begun-{loop}").exists, f"the task has begun on {loop}")
    return found


@pytest.mark.parametrize("name", HOSTILE)
def test_sigterm_ends_a_worker_whatever_its_handler_does(name: str, commands: Commands, client: SyncClient) -> None:
    workers = workers_with(commands, client, HOSTILE[name])

    for worker in workers.values():
        worker.send_signal(signal.SIGTERM)

    for loop, worker in workers.items():
        worker.wait(LIMIT_S)
        said = commands.said(worker)
        assert worker.returncode == (143 if name.endswith("loop") else 0), said
        assert said.count("This process ends now") == (name in LAST_LINES), said
        assert all(words in said for words in LAST_LINES.get(name, ())), said
        assert "Traceback" not in said, said
        assert loop in said


def served(commands: Commands, loop: str, body: str) -> Process:
    """A process whose main coroutine is that body, with a grace of an hour."""
    lines = ["import asyncio, os, signal, sys, time", *SERVED_HEAD[loop], "async def main(watch):"]
    lines += [textwrap.indent(textwrap.dedent(body), "    "), "    return 0", "serve(main, grace_s=3600)"]
    return commands.launch("-u", "-c", "\n".join(lines))


SERVED_HEAD = {
    loop: [
        *(['sys.modules["uvloop"] = None'] if loop == "asyncio" else []),
        "from rq_ceylon import process",
        "from rq_ceylon.cli.common import serve",
        f"process.ALLOWANCE_S = {ALLOWANCE_S}",
        "process.logger.enable('rq_ceylon')",
    ]
    for loop in LOOPS
}


@pytest.mark.parametrize("loop", LOOPS)
def test_a_blocked_loop_still_hears_the_first_and_the_second_signal(loop: str, commands: Commands) -> None:
    process = served(
        commands,
        loop,
        """
        watch.at_once = lambda: print("heard at once")
        watch.listen(lambda number: print("heard by the loop"))
        print("blocks")
        import threading
        threading.Event().wait(60)  # a line of Python's own library, below the user's
        """,
    )
    until(lambda: "blocks" in commands.said(process), "the loop is blocked")

    process.send_signal(signal.SIGTERM)
    until(lambda: "heard at once" in commands.said(process), "the first signal is heard")
    process.send_signal(signal.SIGINT)

    assert process.wait(LIMIT_S) == 130
    assert commands.said(process).count("heard") == 1
    assert "its main thread is at <string>:" in commands.said(process)


@pytest.mark.parametrize("loop", LOOPS)
def test_signals_reach_the_loop_once_each_and_other_handlers_too(loop: str, commands: Commands) -> None:
    process = served(
        commands,
        loop,
        """
        heard, ended = [], asyncio.Event()
        watch.listen(heard.append)
        asyncio.get_running_loop().add_signal_handler(signal.SIGUSR1, ended.set)
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1):
            os.kill(os.getpid(), number)
        await asyncio.wait_for(ended.wait(), 1)
        print([int(number) for number in heard])
        """,
    )

    assert process.wait(LIMIT_S) == 0, commands.said(process)
    assert commands.said(process).strip() == "[15, 2]"


@pytest.mark.parametrize("loop", LOOPS)
def test_a_signal_is_heard_though_users_code_has_a_handler_of_its_own_for_it(loop: str, commands: Commands) -> None:
    process = served(
        commands,
        loop,
        """
        process.TAKE_S = 0.05
        ended = asyncio.Event()
        watch.listen(lambda number: ended.set())
        asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, print, "heard by users' code")
        await asyncio.sleep(0.2)
        os.kill(os.getpid(), signal.SIGTERM)
        await ended.wait()
        await asyncio.sleep(0.05)
        """,
    )

    assert process.wait(LIMIT_S) == 0, commands.said(process)
    assert commands.said(process).strip() == "heard by users' code"


@pytest.mark.parametrize("loop", LOOPS)
def test_names_are_looked_up_though_users_code_fills_the_executor_of_the_loop(loop: str, commands: Commands) -> None:
    process = served(
        commands,
        loop,
        """
        loop = asyncio.get_running_loop()
        for _ in range(100):
            loop.run_in_executor(None, time.sleep, 60)
        print((await loop.getaddrinfo("localhost", 6379, type=1))[0][4][1])
        await asyncio.wait_for(asyncio.open_connection("localhost", 1), 20)
        """,
    )

    assert process.wait(LIMIT_S) == 1
    assert "6379" in commands.said(process)
    assert "OSError" in commands.said(process) or "ConnectionRefusedError" in commands.said(process)


@pytest.mark.parametrize("loop", LOOPS)
def test_a_forked_child_heeds_its_signals_and_its_parent_does_not(loop: str, commands: Commands) -> None:
    process = served(
        commands,
        loop,
        """
        heard, (reader, writer) = [], os.pipe()
        watch.listen(heard.append)
        for number in [signal.SIGTERM, signal.SIGINT] * 20:
            if (pid := os.fork()) == 0:
                try:
                    if number == signal.SIGINT:
                        os.write(writer, b"!")
                    for _ in range(1000):  # one long sleep would miss a signal that comes just before it begins
                        time.sleep(0.01)
                except KeyboardInterrupt:
                    os._exit(2)
                os._exit(1)
            if number == signal.SIGINT:  # it is heard where the child can catch the exception, SIGTERM anywhere
                os.read(reader, 1)
            os.kill(pid, number)
            _, status = os.waitpid(pid, 0)
            print(os.waitstatus_to_exitcode(status))
        await asyncio.sleep(0.1)
        print(heard, signal.pthread_sigmask(signal.SIG_BLOCK, []))
        """,
    )

    assert process.wait(LIMIT_S) == 0, commands.said(process)
    assert commands.said(process).split("\n") == ["-15", "2"] * 20 + ["[] set()", ""]


@pytest.mark.parametrize("loop", LOOPS)
def test_a_task_of_users_code_that_exits_does_not_end_the_process(loop: str, commands: Commands) -> None:
    process = served(
        commands,
        loop,
        """
        ended = asyncio.Event()
        watch.listen(lambda number: ended.set())

        async def exits():
            sys.exit("mute?")

        for _ in range(2):
            print(await asyncio.gather(exits(), asyncio.sleep(0.01, "sleeps"), return_exceptions=True))
        print("goes on")
        await ended.wait()
        print("ends")
        """,
    )
    until(lambda: "goes on" in commands.said(process), "it goes on")

    process.send_signal(signal.SIGTERM)

    assert process.wait(LIMIT_S) == 0
    said = commands.said(process).splitlines()
    gathered = "[SystemExit('mute?'), 'sleeps']"
    assert [line for line in said if "ERROR" not in line] == [gathered, gathered, "goes on", "ends"]
    assert len([line for line in said if "tried to end the process: SystemExit: mute? (at <string>:" in line]) == 2


@pytest.mark.parametrize("loop", LOOPS)
def test_an_exit_that_does_end_the_process_is_never_mute(loop: str, commands: Commands) -> None:
    process = served(commands, loop, "sys.exit(0)")

    assert process.wait(LIMIT_S) == 1
    assert "Error: the process must end: SystemExit: 0 (at <string>:" in commands.said(process)


def test_a_second_signal_kills_the_commands_that_another_has_started() -> None:
    words = ["/bin/sh", "-c", "trap '' TERM; echo deaf; exec sleep 600"]
    with subprocess.Popen(words, stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == b"deaf\n"

        processes.end([process], is_hurried=lambda: True)

    assert process.returncode == -signal.SIGKILL
