import asyncio
import json
from typing import Any

import pytest

from diffattn.errors import ConfigError
from diffattn.serve.hosts import CheckHosts, Hosts
from diffattn.serve.request_error import RequestError

LOOPBACK = Hosts.of("127.0.0.1", "127.0.0.1", ["models.example.org"])
EVERYWHERE = Hosts.of("0.0.0.0", "0.0.0.0", ["models.example.org"])
LAN = Hosts.of("192.168.1.7", "box.lan")


@pytest.mark.parametrize(
    "host",
    [
        "localhost", "localhost:8000", "LocalHost:8000", "localhost.", "127.0.0.1", "127.0.0.1:8000", "127.8.9.10:1",
        "[::1]", "[::1]:8000", "[0:0:0:0:0:0:0:1]", "[::ffff:127.0.0.1]", "models.example.org",
        "Models.Example.Org.:443",
    ],
)  # fmt: skip
def test_a_server_of_this_machine_is_called_by_loopback_names_and_those_that_are_allowed(host):
    assert LOOPBACK.allows(host)
    assert EVERYWHERE.allows(host)


@pytest.mark.parametrize(
    "host",
    [
        "", " ", ".", "localhost.evil.com", "evil.com", "evil.com:8000", "localhost@evil.com", "user@localhost",
        "localhost:x", "localhost:", "localhost:99999", "localhost:8000:8000", "localhost..", "localhost/",
        "localhost, evil.com",
        "127.0.0.1.evil.com", "127.1", "0x7f.1", "2130706433", "::1", "[::1", "[localhost]", "[127.0.0.1]",
        "loc\xe4lhost",
        "xlocalhost", "localhostx", "example.org", "x.models.example.org", "[fe80::1%25eth0].evil.com",
    ],
)  # fmt: skip
def test_no_other_name_is_taken(host):
    assert not LOOPBACK.allows(host)
    assert not EVERYWHERE.allows(host)


@pytest.mark.parametrize(
    "address", ["0.0.0.0", "192.168.1.7:8000", "8.8.8.8", "[2001:db8::7]:8000", "[fe80::1%25eth0]"]
)
def test_an_address_is_taken_where_others_reach_the_server_and_only_there(address):
    assert not LOOPBACK.allows(address)
    assert EVERYWHERE.allows(address)
    assert LAN.allows(address)


def test_the_host_that_it_listens_on_and_the_machines_own_name_are_taken(monkeypatch):
    assert LAN.allows("Box.lan:8000")
    assert not LAN.allows("evil.com")
    monkeypatch.setattr("socket.gethostname", lambda: "Mine")
    assert Hosts.of("::", "::").allows("mine:8000")
    assert not Hosts.of("::1", "::1").allows("mine:8000")
    assert Hosts.of("127.0.1.1", "mine").allows("mine:8000")


@pytest.mark.parametrize("name", ["", "*", "http://a.org", "a.org:80", "[::1]:80", "a b", "a/b", "ä.org", "user@a.org"])
def test_what_is_no_name_of_a_machine_cannot_be_allowed(name):
    with pytest.raises(ConfigError, match=r"allow_host is .* without a port"):
        Hosts.of("127.0.0.1", "127.0.0.1", [name])


def test_an_address_can_be_allowed():
    assert Hosts.of("127.0.0.1", "127.0.0.1", ["[2001:DB8:0::7]", "10.0.0.2"]).allows("[2001:db8::7]:80")


def refused(hosts: Hosts, *headers: tuple[str, str]) -> tuple[int, str | None]:
    with pytest.raises(RequestError) as caught:
        hosts.check((name.encode(), value.encode("latin-1")) for name, value in headers)
    return caught.value.status, caught.value.body["error"]["code"]


def test_exactly_one_host_is_wanted_and_no_proxy_is_believed():
    assert refused(LOOPBACK) == (400, None)
    assert refused(LOOPBACK, ("host", "localhost"), ("host", "localhost")) == (400, None)
    for name in ("x-forwarded-host", "forwarded", "x-host"):
        assert refused(LOOPBACK, ("host", "evil.com"), (name, "localhost")) == (403, "host_not_allowed")
        LOOPBACK.check([(b"host", b"localhost"), (name.encode(), b"evil.com")])


@pytest.mark.parametrize(
    "origin",
    ["http://evil.com", "https://localhost.evil.com", "null", "", "file://", "http://8.8.8.8", "http://["],
)
def test_a_page_of_another_site_is_refused(origin):
    for hosts in (LOOPBACK, EVERYWHERE):
        assert refused(hosts, ("host", "localhost"), ("origin", origin)) == (403, "origin_not_allowed")


@pytest.mark.parametrize(
    ("host", "origin"),
    [
        ("localhost:8000", "http://localhost:3000"), ("127.0.0.1:8000", "http://localhost:8000"),
        ("localhost", "http://[::1]:3000"), ("localhost", "https://models.example.org"),
    ],
)  # fmt: skip
def test_a_page_of_this_machine_is_let_in(host, origin):
    LOOPBACK.check([(b"host", host.encode()), (b"origin", origin.encode())])
    # Where the server has an address, so may its own page.
    LAN.check([(b"host", b"192.168.1.7:8000"), (b"origin", b"http://192.168.1.7:8000")])


def test_what_is_refused_never_reaches_the_application():
    reached: list[Any] = []

    async def app(scope: Any, receive: Any, send: Any) -> None:
        reached.append(scope)

    async def ask(*headers: tuple[bytes, bytes], kind: str = "http") -> list[Any]:
        sent: list[Any] = []

        async def send(message: Any) -> None:
            sent.append(message)

        await CheckHosts(app, LOOPBACK)({"type": kind, "headers": headers}, None, send)
        return sent

    start, body = asyncio.run(ask((b"host", b"evil.com")))
    assert start["status"] == 403
    error = json.loads(body["body"])["error"]
    assert error["type"] == "invalid_request_error"
    assert "'evil.com'" in error["message"]
    assert "--allow-host" in error["message"]
    assert not reached
    assert asyncio.run(ask((b"host", b"localhost"))) == []
    assert asyncio.run(ask(kind="lifespan")) == []
    assert len(reached) == 2
