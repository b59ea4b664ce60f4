"""Refuses requests whose ``Host`` or ``Origin`` is another site's: they come from a page in somebody's browser.

A page may have its own name resolve to 127.0.0.1 once it is shown (DNS rebinding); the browser then lets it read the
answers of a server on that machine, for which only the ``Host`` header still has the page's name. An address in place
of a name cannot be rebound. Source: Fetch standard, "Origin header"; RFC 9110, section 7.2.
"""

from __future__ import annotations

import hmac
import ipaddress
import re
import socket
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any
from urllib.parse import urlsplit

from diffattn.errors import ConfigError
from diffattn.serve.request_error import RequestError

_NAME = re.compile(r"[a-z0-9_]([a-z0-9_-]*[a-z0-9_])?(\.[a-z0-9_]([a-z0-9_-]*[a-z0-9_])?)*")
_HOST = re.compile(r"(?P<host>\[[^\[\]]*\]|[^:\[\]]*)(?::(?P<port>[0-9]{1,5}))?")


@dataclass(frozen=True)
class Hosts:
    """The names and addresses by which clients may call this server."""

    names: frozenset[str]
    """The names, in small letters."""
    loopback_only: bool
    """True where the server listens on this machine alone; else it takes every address, and none can be rebound."""

    @classmethod
    def of(cls, listening: str, host: str, allowed: Iterable[str] = ()) -> Hosts:
        """Returns the hosts of a server.

        Args:
            listening: the address that the server listens at.
            host: the name or address by which it was told to.
            allowed: more names, from ``--allow-host``.

        Raises:
            ConfigError: one of these is no name and no address.
        """
        loopback = ipaddress.ip_address(listening.partition("%")[0]).is_loopback
        names = {"localhost", host.lower().strip("[]").removesuffix(".")}
        if not loopback:
            names.add(socket.gethostname().lower())
        for name in allowed:
            plain = _plain(name)
            if plain is None or ":" in name.rpartition("]")[2]:
                raise ConfigError(
                    f"allow_host is {name!r}",
                    "the name or the address of a machine, without http:// and without a port",
                    "pass --allow-host models.example.org",
                )
            names.add(plain)
        return cls(frozenset(names), loopback)

    def allows(self, host: str) -> bool:
        """Returns whether a ``Host`` header names this server.

        >>> mine = Hosts(frozenset({"localhost"}), loopback_only=True)
        >>> [mine.allows(host) for host in ("LOCALHOST:8000", "127.0.0.2", "[::1]:80", "localhost.evil.com", "8.8.8.8")]
        [True, True, True, False, False]
        """
        plain = _plain(host)
        if plain is None:
            return False
        if plain in self.names:
            return True
        address = _address(plain)
        return address is not None and (address.is_loopback or not self.loopback_only)

    def check(self, headers: Iterable[tuple[bytes, bytes]]) -> None:
        """Checks the headers of a request.

        Args:
            headers: names in small letters and values, as ASGI has them.

        Raises:
            RequestError: status 400 unless there is exactly one ``Host``; 403 if it is another site's.
        """
        # Latin-1 holds every byte; no name has one beyond ASCII.
        found = [(name, value.decode("latin-1").strip()) for name, value in headers]
        hosts = [value for name, value in found if name == b"host"]
        if len(hosts) != 1:
            raise RequestError(f"the request has {len(hosts)} Host headers", "one", "send the server's name in it")
        if not self.allows(hosts[0]):
            raise RequestError(
                f"the Host is {hosts[0][:200]!r}", "a name of this server",
                "if that is its name, start it with --allow-host and the name",
                status=403, code="host_not_allowed",
            )  # fmt: skip
        for name, origin in found:
            if name == b"origin" and not self._is_own(origin, hosts[0]):
                raise RequestError(
                    f"the request comes from a page of {origin[:200]!r}", "a page of this server's own machine",
                    "if the page is yours, start the server with --allow-host and the page's name",
                    status=403, code="origin_not_allowed",
                )  # fmt: skip

    def _is_own(self, origin: str, host: str) -> bool:
        try:
            page = urlsplit(origin).netloc
        except ValueError:
            return False
        plain = _plain(page)
        if plain is None:
            return False
        address = _address(plain)
        # A page may be at any address, also where this server is called by any.
        return plain == _plain(host) or plain in self.names or (address is not None and address.is_loopback)


class CheckHosts:
    """An ASGI application that answers what :class:`Hosts` refuses, and hands the rest to ``app``."""

    def __init__(self, app: Any, hosts: Hosts) -> None:
        self._app = app
        self._hosts = hosts

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        from starlette.responses import JSONResponse

        if scope["type"] == "http":
            try:
                self._hosts.check(scope["headers"])
            except RequestError as error:
                await JSONResponse(error.body, status_code=error.status)(scope, receive, send)
                return
        await self._app(scope, receive, send)


def check_key(authorization: str, key: str | None) -> None:
    """Checks the key that a client sent.

    Args:
        authorization: the header of that name, or nothing.
        key: the key that the server was given; None where it takes everyone.

    Raises:
        RequestError: status 401: no key, or another.
    """
    if key is None:
        return
    scheme, _, given = authorization.partition(" ")
    if scheme.lower() == "bearer" and hmac.compare_digest(given.strip().encode(), key.encode()):
        return
    raise RequestError(
        "the API key is not this server's" if given else "no API key is given", "the key that the server was given",
        "send the header Authorization: Bearer KEY", status=401, code="invalid_api_key",
    )  # fmt: skip


def _plain(host: str) -> str | None:
    """Returns a host without its port, in small letters, an address in its short form; None for what is no host."""
    found = _HOST.fullmatch(host)
    if found is None or int(found["port"] or 0) > 65535:
        return None
    # A dot at the end says that a name is whole.
    name = found["host"].lower().removesuffix(".")
    if name.startswith("["):
        name = name[1:-1].partition("%")[0]
        address = _address(name)
        return str(address) if address is not None and ":" in name else None
    return name if _NAME.fullmatch(name) else None


def _address(host: str) -> ipaddress.IPv4Address | ipaddress.IPv6Address | None:
    try:
        address = ipaddress.ip_address(host)
    except ValueError:
        return None
    mapped = address.ipv4_mapped if isinstance(address, ipaddress.IPv6Address) else None
    return mapped or address
