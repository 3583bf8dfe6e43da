"""Where Redis is: which of several answers wins, what a URL may look like, and that no password is ever shown."""

import os
import socket
import ssl
from contextlib import closing
from pathlib import Path
from typing import Any

import click
import pytest
from click.testing import CliRunner

from rq_ceylon import Ceylon
from rq_ceylon.cli.common import RedisOptions, where
from rq_ceylon.client import Client
from rq_ceylon.errors import InvalidInputError, RedisError
from rq_ceylon.settings import Settings, check_url, masked, place_of, resolve, server_folder, socket_path, socket_url
from rq_ceylon.store.keys import Keys
from rq_ceylon.store.node import client_of

NOWHERE = {"CEYLON_SERVER_DIR": os.devnull}


def listen(path: Path) -> closing[socket.socket]:
    listener = socket.socket(socket.AF_UNIX)
    listener.bind(str(path))
    return closing(listener)


def test_the_argument_wins_then_the_variables_then_the_running_server(short_tmp_path: Path) -> None:
    environ = {
        "CEYLON_REDIS_URL": "redis://ours",
        "REDIS_URL": "redis://common",
        "CEYLON_SERVER_DIR": str(short_tmp_path),
    }
    with listen(short_tmp_path / "redis.sock"):
        assert resolve("redis://here", environ=environ) == Settings("redis://here")
        assert resolve(environ=environ) == Settings("redis://ours")
        del environ["CEYLON_REDIS_URL"]
        assert resolve(environ=environ) == Settings("redis://common")
        environ["REDIS_URL"] = ""
        assert resolve(environ=environ) == Settings(f"unix://{short_tmp_path}/redis.sock")


@pytest.mark.parametrize("lacking", ["socket", "privacy", "folder"])
def test_without_any_of_them_the_error_names_the_remedies(lacking: str, short_tmp_path: Path) -> None:
    """A server that listens in a folder that others may enter is not taken for this user's own."""
    folder = short_tmp_path / "server"
    if lacking != "folder":
        folder.mkdir(mode=0o755 if lacking == "privacy" else 0o700)
        with listen(folder / "redis.sock"):
            pass  # the file stays
    if lacking == "socket":
        (folder / "redis.sock").unlink()

    with pytest.raises(RedisError) as caught:
        resolve(environ={"CEYLON_SERVER_DIR": str(folder)})

    assert caught.value.exit_code == 3
    for remedy in ("ceylon server", "ceylon up", "CEYLON_REDIS_URL", "--redis"):
        assert remedy in str(caught.value)


def test_the_namespace_is_argument_then_variable_then_ceylon() -> None:
    environ = {"CEYLON_NAMESPACE": "staging"}

    assert resolve("embedded://", namespace="mine", environ=environ).namespace == "mine"
    assert resolve("embedded://", environ=environ).namespace == "staging"
    assert resolve("embedded://", environ={}).namespace == "ceylon"
    with pytest.raises(InvalidInputError, match=r"namespace: 'a\{b\}' is not usable"):
        resolve("embedded://", namespace="a{b}", environ={})


def test_the_command_line_wins_then_the_application_then_the_environment(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("CEYLON_NAMESPACE", "staging")
    monkeypatch.setenv("CEYLON_REDIS_URL", "redis://ours")
    app = Ceylon("redis://app", namespace="app")

    @click.command()
    @where
    def command(options: RedisOptions) -> None:
        for found in (options.settings(app), options.settings(Ceylon()), options.settings()):
            click.echo(f"{found.redis_url} {found.namespace}")

    def said(*arguments: str) -> list[str]:
        return CliRunner().invoke(command, arguments).output.splitlines()

    assert said() == ["redis://app app", "redis://ours staging", "redis://ours staging"]
    assert said("--namespace", "x") == ["redis://app x", "redis://ours x", "redis://ours x"]
    assert said("--redis", "redis://here") == ["redis://here app", "redis://here staging", "redis://here staging"]


@pytest.mark.parametrize(
    "url",
    [
        "redis://localhost",
        "redis://localhost:6379/0",
        "redis://:secret@[::1]:6379/15?client_name=x",
        "rediss://user:p%2Fw@redis.example:6380/",
        "redis://localhost/?db=2",
        "unix:///run/redis.sock",
        "unix://user:secret@/run/with%20space.sock?db=1",
        "redis://user@host?username=a&password=b&socket_connect_timeout=5&socket_keepalive=yes",
        "rediss://host?ssl_cert_reqs=none&ssl_check_hostname=no&ssl_min_version=771&ssl_ciphers=ECDHE%2BAESGCM&ssl_password=y",
        "rediss://host?ssl_min_version=TLSv1_2&ssl_check_hostname=False&ssl_cert_reqs=required",
        "redis+sentinel://a,b:26380,[::1]:26379/main",
        "redis+sentinel://user:secret@a:26379,b:26379/main/3?sentinel_username=s&sentinel_password=t",
        "rediss+sentinel://a/main/0",
        "redis+cluster://a",
        "redis+cluster://user:secret@a:7000,b:7001/0",
        "rediss+cluster://a:7000?client_name=x",
        "embedded://",
    ],
)
def test_these_urls_are_taken_as_they_are(url: str) -> None:
    assert resolve(url, environ=NOWHERE) == Settings(url)


@pytest.mark.parametrize(
    ("url", "problem"),
    [
        ("localhost:6379", "it has no scheme"),
        ("//localhost", "it has no scheme"),
        ("http://localhost", "http:// is not known"),
        ("valkey://localhost", "valkey:// is not known"),
        ("redis://", "it names no host, or port 0"),
        ("redis://host:0", "it names no host, or port 0"),
        ("redis://host:port", "it is malformed"),
        ("redis://host:99999", "it is malformed"),
        ("redis://[::1", "it is malformed"),
        ("redis://host/name", "the database is not a number"),
        ("redis://host?db=-1", "the database is not a number"),
        ("unix://run/redis.sock", "it does not give the absolute path of a socket"),
        ("unix://", "it does not give the absolute path of a socket"),
        ("redis://a,b", "it names several hosts; only redis+sentinel:// and redis+cluster:// may"),
        ("redis+sentinel://a,b", "it does not give the name by which the Sentinels know the primary"),
        ("redis+sentinel://a,/main", "it names no host, or port 0"),
        ("redis+sentinel://a/main/x", "the database is not a number"),
        ("redis+cluster://a:port", "it is malformed"),
        ("redis+cluster://a/1", "a cluster has only the database 0"),
        ("redis+other://a", "redis+other:// is not known"),
        ("redis://a?protocol=3", "the option 'protocol' is not known (known: client_name, db, "),
        ("redis://a?ssl_ca_certs=x", "the option 'ssl_ca_certs' is not known"),
        ("redis://a?sentinel_password=", "the option 'sentinel_password' is not known"),
        ("rediss://a?ssl_ca_certs=/no/ca.pem", "ssl_ca_certs: there is no file '/no/ca.pem'"),
        ("rediss://a?ssl_ca_path=/no/folder", "ssl_ca_path: there is no folder '/no/folder'"),
        ("redis://a?socket_connect_timeout=abc", "socket_connect_timeout: 'abc' is not usable; write a number"),
        ("redis://a?socket_connect_timeout=0", "socket_connect_timeout: '0' is not usable"),
        ("redis://a?socket_connect_timeout=inf", "socket_connect_timeout: 'inf' is not usable"),
        ("redis://a?socket_keepalive=maybe", "socket_keepalive: 'maybe' is not usable; write yes or no"),
        ("redis://a?client_name=two%20words", "client_name: 'two words' is not usable"),
        ("redis://a?client_name=x&client_name=y", "the option 'client_name' is given 2 times"),
        ("rediss://a?ssl_check_hostname=off", "ssl_check_hostname: 'off' is not usable; write yes or no"),
        ("rediss://a?ssl_cert_reqs=CERT_NONE", "ssl_cert_reqs: 'CERT_NONE' is not usable; write none, optional or req"),
        ("rediss://a?ssl_min_version=1.2", "ssl_min_version: '1.2' is not usable; write TLSv1_2 or TLSv1_3"),
        ("rediss://a?ssl_ciphers=x", "ssl_ciphers: 'x' is not usable; write names that OpenSSL knows"),
        ("redis+cluster://a?socket_connect_timeout=", "socket_connect_timeout: '' is not usable"),
        ("embedded://folder", "nothing may follow embedded://"),
    ],
)
def test_any_other_url_is_refused_with_the_forms_that_are_not(url: str, problem: str) -> None:
    with pytest.raises(InvalidInputError) as caught:
        resolve(environ={"REDIS_URL": url})

    message = str(caught.value)
    assert f"Redis URL {masked(url)!r} (from: REDIS_URL): {problem}" in message
    assert "use redis://host:port/db, rediss://host:port/db, unix:///path/to/socket, redis+sentinel://" in message


@pytest.mark.parametrize(
    ("url", "shown"),
    [
        ("redis://host:6379/0", "redis://host:6379/0"),
        ("redis://:secret@host:6379/0", "redis://:***@host:6379/0"),
        ("redis://user:secret@host/0?protocol=3", "redis://user:***@host/0?protocol=***"),
        ("redis://user:secret@secret@host", "redis://user:***@host"),
        ("redis://user:secret/secret@host/0", "redis://user:***@host/0"),
        ("redis://user:1/secret@host/0", "redis://user:***@host/0"),
        ("redis://user:secret#secret@host", "redis://user:***@host"),
        ("redis://user:secret?secret@host", "redis://user:***@host"),
        (
            "unix:///run/a.sock?db=1&password=secret@secret&client_name=x",
            "unix:///run/a.sock?db=1&password=***&client_name=x",
        ),
        ("http://:secret@host", "http://:***@host"),
        ("redis://secret@host", "redis://***@host"),
        ("redis://user:secret", "redis://***"),
        ("redis:/user:secret@host:6379/0", "***@host:6379/0"),
        ("redis:user:secret@host:6379/0", "***@host:6379/0"),
        ("user:secret@host:6379", "***@host:6379"),
        ("secret:secret@host:6379", "***@host:6379"),
        ("redis//user:secret@host:6379", "***@host:6379"),
        ("redis:///:secret@host:6379/0", "redis://***@host:6379/0"),
        ("redis://host/0?passwd=secret", "redis://host/0?passwd=***"),
        ("redis://host/0?auth=secret&secret", "redis://host/0?auth=***&***"),
        ("redis://host/0?passwd=secret@secret", "redis://host/0?passwd=***"),
        ("redis://user:secret?x=secret@host", "redis://***?x=***"),
        ("rediss://u:secret@h/0?ssl_passwords=secret", "rediss://u:***@h/0?ssl_passwords=***"),
        ("redis+cluster://u:secret@a:1,b:2", "redis+cluster://u:***@a:1,b:2"),
        (
            "rediss+sentinel://u:secret@a/m?sentinel_password=secret&ssl_password=secret",
            "rediss+sentinel://u:***@a/m?sentinel_password=***&ssl_password=***",
        ),
    ],
)
def test_a_password_is_never_shown(url: str, shown: str) -> None:
    assert masked(url) == shown
    with pytest.raises(InvalidInputError) as caught:
        resolve(refused := url + "&db=x" if "?" in url else url + "?db=x", environ=NOWHERE)
    assert masked(refused) in str(caught.value)
    assert "secret" not in str(caught.value)
    assert "secret" not in repr(Settings(url))


def test_a_namespace_holds_no_colon_as_a_user_of_its_beginning_could_reach_it() -> None:
    with pytest.raises(InvalidInputError, match="namespace: 'team:prod' is not usable; use 1 to 64 letters"):
        resolve("embedded://", namespace="team:prod", environ=NOWHERE)
    with pytest.raises(InvalidInputError, match="namespace: 'team:prod' is not usable"):
        Keys("team:prod")


def test_the_server_folder_is_the_chosen_one_or_in_the_users_state_folder() -> None:
    environ = {"HOME": "/users/me", "XDG_STATE_HOME": "relative"}

    assert server_folder(environ) == Path("/users/me/.local/state/ceylon")
    environ["XDG_STATE_HOME"] = "/state"
    assert server_folder(environ) == Path("/state/ceylon")
    environ["CEYLON_SERVER_DIR"] = "here"
    assert server_folder(environ) == Path.cwd() / "here"


def test_without_a_home_a_given_redis_is_used_and_a_missing_one_said(monkeypatch: pytest.MonkeyPatch) -> None:
    def no_home() -> Path:
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.setattr(Path, "home", no_home)

    assert resolve("redis://here", environ={}) == Settings("redis://here")
    with pytest.raises(RedisError, match="No Redis is configured"):
        resolve(environ={})
    with pytest.raises(InvalidInputError, match="no home folder for the server's data; set CEYLON_SERVER_DIR"):
        server_folder({})


def test_a_socket_whose_path_is_too_long_lies_at_a_short_path() -> None:
    fits = Path("/" + "a" * 87)
    too_long = Path("/" + "a" * 88)
    long_too = Path("/" + "ä" * 60)

    assert socket_path(fits) == fits / "redis.sock"
    paths = {socket_path(folder, {"TMPDIR": tmp}) for folder in (too_long, long_too) for tmp in ("/var/tmp", str(fits))}
    assert len(paths) == 4
    assert {path.parent for path in paths} == {Path(f"{tmp}/ceylon-{os.getuid()}") for tmp in ("/var/tmp", "/tmp")}
    assert all(len(os.fsencode(path)) < 100 for path in [*paths, socket_path(fits)])
    assert socket_path(too_long, {}) == socket_path(too_long, {})


def test_a_socket_url_quotes_what_a_url_cannot_hold() -> None:
    assert socket_url(Path("/a b/ä?#.sock")) == "unix:///a%20b/%C3%A4%3F%23.sock"


def test_servers_and_sentinels_get_each_what_is_theirs_of_a_url() -> None:
    place = place_of(
        "rediss+sentinel://u%2F:p%40@a,[::1]:5/main%20one/3?client_name=x%26y&sentinel_username=s&sentinel_password=t"
    )

    assert (place.kind, place.primary, place.tls) == ("sentinel", "main one", True)
    assert place.addresses == (("a", 26379), ("::1", 5))
    assert place.server_url(("b", 6379)) == "rediss://u%2F:p%40@b:6379/3?client_name=x%26y"
    assert place.sentinel_url(("::1", 5)) == "rediss://[::1]:5/0?client_name=x%26y&username=s&password=t"
    cluster = place_of("redis+cluster://u:p@a,b:2?password=q")
    assert cluster.addresses == (("a", 6379), ("b", 2))
    assert cluster.server_url(("c", 3)) == "redis://u:p@c:3/0?password=q"


def test_every_option_of_a_url_reaches_redis_py_as_it_is_meant() -> None:
    own = "client_name=x&socket_connect_timeout=2.5&socket_keepalive=no"
    tls = "ssl_min_version=TLSv1_2&ssl_check_hostname=false&ssl_cert_reqs=required&ssl_ciphers=ECDHE%2BAESGCM"
    client = client_of(check_url(f"rediss://u:p@host:1/3?{own}&{tls}"))
    found = client.connection_pool.connection_kwargs

    assert {name: found[name] for name in ("client_name", "socket_connect_timeout", "socket_keepalive", "db")} == {
        "client_name": "x",
        "socket_connect_timeout": 2.5,
        "socket_keepalive": False,
        "db": 3,
    }
    connection: Any = client.connection_pool.make_connection()  # type: ignore[no-untyped-call]
    context = connection.ssl_context.get()
    assert context.minimum_version is ssl.TLSVersion.TLSv1_2
    assert context.verify_mode is ssl.CERT_REQUIRED
    assert not context.check_hostname


def test_a_client_checks_its_url_before_it_connects() -> None:
    with pytest.raises(InvalidInputError, match="socket_connect_timeout: 'abc' is not usable"):
        Client("redis://host?socket_connect_timeout=abc")
