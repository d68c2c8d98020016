"""Tests of pipelines.stages.ingestion.address_guard."""

import ipaddress
import os
import subprocess
import sys
from pathlib import Path

import pytest

from pipelines.stages.ingestion import address_guard
from pipelines.stages.ingestion.address_guard import AddressRules, kind_of


@pytest.mark.parametrize(
    ("address", "kind"),
    [
        ("8.8.8.8", ""),
        ("2606:4700::1", ""),
        ("127.0.0.1", "loopback"),
        ("::1", "loopback"),
        ("10.1.2.3", "private"),
        ("192.168.0.1", "private"),
        ("fd00::1", "private"),
        ("169.254.169.254", "link-local"),
        ("fe80::1%eth0", "link-local"),
        ("fec0::1", "site-local"),
        ("100.64.0.1", "not public"),
        ("0.0.0.0", "unspecified"),
        ("::", "unspecified"),
        ("224.0.0.1", "multicast"),
        ("ff02::1", "multicast"),
        ("255.255.255.255", "private"),
        ("::127.0.0.1", "reserved"),
        ("64:ff9b:1::1", "reserved"),
    ],
)
def test_only_public_addresses_have_no_kind(address: str, kind: str) -> None:
    """Every sort of address that is not of the public internet is named by its sort."""
    assert kind_of(ipaddress.ip_address(address)) == kind


@pytest.mark.parametrize(
    ("address", "kind"),
    [
        ("::ffff:127.0.0.1", "loopback"),
        ("::ffff:169.254.169.254", "link-local"),
        ("::ffff:8.8.8.8", ""),
        ("64:ff9b::a9fe:a9fe", "link-local"),  # NAT64 of 169.254.169.254
        ("64:ff9b::808:808", ""),
        ("2002:7f00:1::", "loopback"),  # 6to4 of 127.0.0.1
        ("2001:0:4136:e378:8000:63bf:5601:5601", "link-local"),  # Teredo, client 169.254.169.254
    ],
)
def test_an_address_in_disguise_is_what_it_carries(address: str, kind: str) -> None:
    """IPv6 addresses that lead to an IPv4 one are judged as that one."""
    assert kind_of(ipaddress.ip_address(address)) == kind


def test_what_is_listed_may_be_reached() -> None:
    """Networks, single addresses and host names open just themselves, and messages name them."""
    rules = AddressRules.parse(["10.0.0.0/8", "127.0.0.2", "[fd00::1]", "Store.Internal"])
    for address in ("10.9.9.9", "127.0.0.2", "fd00::1", "::ffff:10.0.0.1", "8.8.8.8"):
        assert rules.problem(address) == ""
    assert rules.problem("192.168.1.1", "store.internal.") == ""
    assert rules.problem("192.168.1.1", "store.internal.example") == (
        "address refused: 192.168.1.1 (store.internal.example) is private; "
        "data.allow_addresses does not list it"
    )
    assert "fd00::2 is private" in rules.problem("fd00::2")
    # A Teredo address carries two, and both must be allowed.
    assert "is private" in rules.problem("2001:0:a00:1:8000:63bf:5601:5601")


@pytest.mark.parametrize("entry", ["", "http://h/", "host:80", "10.0.0.0/99", "a b"])
def test_unfit_entries_are_named(entry: str) -> None:
    """What is neither network nor host name is an error with the field and the entry."""
    with pytest.raises(ValueError, match=r"data\.allow_addresses: .* got ") as error:
        AddressRules.parse([entry])
    assert repr(entry) in str(error.value)


GUARDED = """
import importlib.util, socket, sys
spec = importlib.util.spec_from_file_location("address_guard", sys.argv[1])
guard_module = importlib.util.module_from_spec(spec)
sys.modules["address_guard"] = guard_module
spec.loader.exec_module(guard_module)
guard = guard_module.AddressGuard(guard_module.AddressRules.parse(sys.argv[2].split(",")))
guard.install()

def attempt(say, act):
    try:
        act()
    except guard_module.AddressRefused as error:
        print(say, "refused:", error)
    except OSError as error:
        print(say, "tried")

"""


def guarded(allowed: str, program: str) -> list[str]:
    """Run a program in a process with a guard; nothing listens where it connects to."""
    done = subprocess.run(
        [sys.executable, "-c", GUARDED + program, str(Path(address_guard.__file__)), allowed],
        capture_output=True,
        text=True,
        check=True,
        env={**os.environ, "PYTHONSAFEPATH": "1"},
    )
    return done.stdout.splitlines()


def test_no_way_to_a_socket_leads_around_the_guard() -> None:
    """`connect`, `connect_ex`, odd numbers, local sockets and datagrams are all seen."""
    said = guarded(
        "127.0.0.9",
        """
attempt("plain", lambda: socket.create_connection(("127.0.0.1", 9), 1))
attempt("odd", lambda: socket.create_connection(("2130706433", 9), 1))
attempt("ex", lambda: socket.socket().connect_ex(("127.0.0.1", 9)))
attempt("name", lambda: socket.socket().connect(("localhost", 9)))
attempt("unix", lambda: socket.socket(socket.AF_UNIX).connect("/tmp/none"))
attempt("datagram", lambda: socket.socket(type=socket.SOCK_DGRAM).sendto(b"x", ("127.0.0.1", 9)))
attempt("listed", lambda: socket.create_connection(("127.0.0.9", 9), 1))
""",
    )
    assert [line.split()[:2] for line in said[:6]] == [
        [name, "refused:"] for name in ("plain", "odd", "ex", "name", "unix", "datagram")
    ]
    assert "127.0.0.1 (2130706433) is loopback" in said[1]
    assert said[6] == "listed tried"


def test_a_listed_host_name_opens_itself_alone() -> None:
    """A name may resolve to a private address if listed; the address by itself stays closed."""
    said = guarded(
        "localhost",
        """
attempt("name", lambda: socket.create_connection(("localhost", 9), 1))
attempt("address", lambda: socket.create_connection(("127.0.0.1", 9), 1))
""",
    )
    assert said[0] == "name tried"
    assert said[1].startswith("address refused: address refused: 127.0.0.1 is loopback")


def test_behind_a_proxy_the_target_is_judged() -> None:
    """The proxy that the environment names is trusted for its requests; targets are looked up."""
    said = guarded(
        "192.0.2.1",
        """
attempt("metadata", lambda: guard.enter("169.254.169.254", "127.0.0.1"))
attempt("unknown name", lambda: guard.enter("no-such-host.invalid", "127.0.0.1"))
attempt("proxy", lambda: socket.create_connection(("127.0.0.1", 9), 1))
guard.enter("8.8.8.8")
attempt("proxy without a request", lambda: socket.create_connection(("127.0.0.1", 9), 1))
""",
    )
    assert said[0].startswith("metadata refused: address refused: 169.254.169.254 is link-local")
    assert said[1] == "proxy tried"
    assert said[2].startswith("proxy without a request refused")
