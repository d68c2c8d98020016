"""Which network addresses a downloader may reach: public ones, and those the recipe allows.

A list of addresses is input from strangers. It may name a cloud's metadata service, a machine of
the private network, or a host whose name resolves to one; and a public server may redirect to one.
So the decision is taken where all these ways end, at `connect` with the numeric address, by an
audit hook of the interpreter, which no Python code of the process can go around or remove.

Nothing of ours is imported here: the downloader's process loads this file by itself.
"""

from __future__ import annotations

import ipaddress
import socket
import sys
import threading
from collections.abc import Iterable
from dataclasses import dataclass, field

IpAddress = ipaddress.IPv4Address | ipaddress.IPv6Address
IpNetwork = ipaddress.IPv4Network | ipaddress.IPv6Network

REFUSED = "address refused"  # begins the message of every refusal
_NAT64 = ipaddress.ip_network("64:ff9b::/96")  # its last 32 bits are an IPv4 address
_SENDING = ("socket.connect", "socket.sendto", "socket.sendmsg")  # second argument: the peer
_KINDS = (  # the first that fits is told
    "unspecified",
    "loopback",
    "link_local",
    "multicast",
    "site_local",
    "private",
    "reserved",
)


class AddressRefused(OSError):
    """A connection that must not be made."""


def kind_of(address: IpAddress) -> str:
    """Why an address is not public, such as `loopback`; "" for a public one.

    An IPv6 address that only carries IPv4 ones (mapped, NAT64, 6to4, Teredo) is of their kind.
    """
    carried = _carried(address)
    if carried:
        return next((kind for inner in carried if (kind := kind_of(inner))), "")
    for kind in _KINDS:
        if getattr(address, f"is_{kind}", False):
            return kind.replace("_", "-")
    return "" if address.is_global else "not public"


def _carried(address: IpAddress) -> tuple[ipaddress.IPv4Address, ...]:
    if isinstance(address, ipaddress.IPv4Address):
        return ()
    if address.ipv4_mapped is not None:
        return (address.ipv4_mapped,)
    if address in _NAT64:
        return (ipaddress.IPv4Address(int(address) & 0xFFFFFFFF),)
    if address.sixtofour is not None:
        return (address.sixtofour,)
    return address.teredo or ()


@dataclass(frozen=True, kw_only=True)
class AddressRules:
    """Public addresses may be reached, and beyond them the listed networks and host names."""

    networks: tuple[IpNetwork, ...] = ()
    hosts: frozenset[str] = frozenset()

    @classmethod
    def parse(cls, allowed: Iterable[str]) -> AddressRules:
        """Read `data.allow_addresses`: networks, single addresses, host names.

        Raises:
            ValueError: an entry is none of these.
        """
        networks, hosts = [], []
        for entry in allowed:
            try:
                networks.append(ipaddress.ip_network(entry.strip("[]"), strict=False))
            except ValueError:
                if not entry or set("/:@ []") & set(entry):
                    raise ValueError(
                        "data.allow_addresses: each must be a network such as 10.0.0.0/8, an "
                        f"address or a host name without port, got {entry!r}"
                    ) from None
                hosts.append(_plain(entry))
        return cls(networks=tuple(networks), hosts=frozenset(hosts))

    def problem(self, address: str, host: str = "") -> str:
        """Why the address must not be reached under that host name; "" if it may be."""
        if _plain(host) in self.hosts:
            return ""
        named = f" ({host})" if host and host != address else ""
        try:
            ip = ipaddress.ip_address(address)
        except ValueError:
            return f"{REFUSED}: {address!r}{named} is not numeric"
        kind = kind_of(ip)
        if not kind or self._lists(ip):
            return ""
        carried = _carried(ip)
        if carried and all(not kind_of(inner) or self._lists(inner) for inner in carried):
            return ""
        return f"{REFUSED}: {address}{named} is {kind}; data.allow_addresses does not list it"

    def _lists(self, ip: IpAddress) -> bool:
        return any(ip in network for network in self.networks)


def _plain(host: str) -> str:
    return host.lower().rstrip(".")


@dataclass
class AddressGuard:
    """Refuses this process every connection that the rules do not allow.

    Behind a proxy the connection goes to the proxy, which then looks the name up by itself: the
    proxy is trusted because the environment names it, and what the name means here is checked
    before the request is sent. A name that only the proxy knows is left to the proxy.
    """

    rules: AddressRules
    _asked: threading.local = field(default_factory=threading.local)  # per thread: names looked up

    def install(self) -> None:
        """Watch all sockets of this process from now on; there is no way back."""
        sys.addaudithook(self._watch)

    def enter(self, host: str, proxy: str = "") -> None:
        """Announce a request of this thread, to `host` directly or through a proxy's host.

        Raises:
            AddressRefused: a proxied host, as this machine knows it, must not be reached.
        """
        self._asked.proxy = _plain(proxy)
        if proxy:
            for address in _look_up(host):
                self._refuse(self.rules.problem(address, host))

    def _watch(self, event: str, arguments: tuple[object, ...]) -> None:
        if event == "socket.getaddrinfo":
            self._asked.host = str(arguments[0])
        elif event in _SENDING and arguments[1] is not None:  # None: connected, so checked before
            self._check(arguments[1])

    def _check(self, peer: object) -> None:
        host = getattr(self._asked, "host", "")
        if host and _plain(host) == getattr(self._asked, "proxy", ""):
            return
        if not isinstance(peer, tuple):
            self._refuse(f"{REFUSED}: {peer!r} is no network address")
        else:
            self._refuse(self.rules.problem(str(peer[0]), host))

    def _refuse(self, problem: str) -> None:
        if problem:
            raise AddressRefused(problem)


def _look_up(host: str) -> set[str]:
    """Every address of a host name as this machine knows it; none if it does not."""
    try:
        return {str(found[4][0]) for found in socket.getaddrinfo(host, None)}
    except (OSError, UnicodeError):
        return set()
