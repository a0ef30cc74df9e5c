"""The requests that a local server believes: none that a web page made a browser send.

A page can point its own name at 127.0.0.1. The browser then takes a server there for a part of the page, which reads
and writes at it. The name in Host gives such a page away; Origin gives away a page that keeps its own address.
"""

from __future__ import annotations

import functools
import ipaddress
from collections.abc import Iterable, Sequence
from reprlib import repr as short_repr
from urllib.parse import urlsplit


@functools.lru_cache(256)  # requests name few hosts, each of them often
def is_loopback(host: str) -> bool:
    """Whether a name or an address means this machine, and no other can reach it."""
    address = _address(host)
    return host.lower() == "localhost" if address is None else address.is_loopback


class HostRule:
    """The names under which a server may be asked.

    Args:
        bound: The address that the server listens on.
        allowed: Further names, without ports, beside those of the loopback; web pages of these may ask, too.
        names: The names that it was bound under.
    Attributes:
        is_local: Whether the server listens on the loopback only; otherwise any name in Host will do.
    Raises:
        TypeError: A name is no text.
    """

    def __init__(self, bound: str, allowed: Iterable[str] = (), names: Iterable[str] = ()) -> None:
        self.is_local = is_loopback(bound)
        self._pages = set(map(_lower, allowed))
        self._known = self._pages | {name.lower() for name in names}

    def refusal(self, hosts: Sequence[str], origins: Sequence[str]) -> str | None:
        """Say what is wrong with a request that has these values of Host and Origin; None: nothing."""
        for host in hosts:
            if self.is_local and not self._is_known(name_of(host)):
                return f"this server answers requests to localhost, 127.0.0.1 and [::1], not to {short_repr(host)}"
        for origin in origins:
            if not self._is_own(_authority(origin), hosts):
                return f"this server answers no web page of another origin: {short_repr(origin)}"
        return None

    def _is_known(self, name: str) -> bool:
        return is_loopback(name) or name in self._known

    def _is_own(self, authority: str, hosts: Sequence[str]) -> bool:
        """Whether this server could have served the page, under a name that no other server's page can have."""
        name = name_of(authority)
        is_same = authority.lower() in {host.lower() for host in hosts}
        return name in self._pages or (is_same and (self._is_known(name) or _address(name) is not None))


def name_of(authority: str) -> str:
    """The host of "host:port", "host", "[ipv6]:port" or "[ipv6]", in lower case and without brackets."""
    host, _, port = authority.rpartition(":")
    has_port = bool(host) and port.isdecimal() and (":" not in host or host.endswith("]"))
    return (host if has_port else authority).strip("[]").lower()


def _lower(name: object) -> str:
    if not isinstance(name, str):
        raise TypeError(f"a name of a host is a text, not {name!r}")
    return name.lower()


def _authority(origin: str) -> str:
    """Host and port of a page's origin; "" where it has none, or is not to be understood."""
    try:
        return urlsplit(origin).netloc
    except ValueError:
        return ""


def _address(host: str) -> ipaddress.IPv4Address | ipaddress.IPv6Address | None:
    try:
        return ipaddress.ip_address(host.strip("[]").partition("%")[0])
    except ValueError:
        return None
