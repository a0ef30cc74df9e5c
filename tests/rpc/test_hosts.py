"""Which names in Host and Origin a local server believes."""

from __future__ import annotations

import pytest

from gpu_cache.hosts import HostRule, is_loopback, name_of

PAGE = "http://page.example"


@pytest.mark.parametrize("host", ["localhost", "LOCALHOST", "127.0.0.1", "127.9.9.9", "::1", "[::1]"])
def test_names_of_the_loopback(host: str) -> None:
    assert is_loopback(host)


@pytest.mark.parametrize("host", ["", "0.0.0.0", "10.0.0.1", "::", "localhost.page.example", "127.0.0.1.page.example"])
def test_other_names(host: str) -> None:
    assert not is_loopback(host)


@pytest.mark.parametrize(
    ("authority", "name"),
    [
        ("Node:80", "node"),
        ("node", "node"),
        ("127.0.0.1:80", "127.0.0.1"),
        ("[::1]:80", "::1"),
        ("[::1]", "::1"),
        ("::1", "::1"),
        ("a:b", "a:b"),
        (":80", ":80"),
        ("", ""),
    ],
)
def test_the_name_of_an_authority(authority: str, name: str) -> None:
    assert name_of(authority) == name


@pytest.mark.parametrize("hosts", [["localhost:1"], ["127.0.0.1"], ["[::1]:80"], [], ["allowed:7"]])
def test_a_local_server_answers_to_loopback_names_and_those_allowed(hosts: list[str]) -> None:
    assert HostRule("127.0.0.1", ["Allowed"]).refusal(hosts, []) is None


@pytest.mark.parametrize("hosts", [["page.example:80"], ["10.0.0.1"], ["0.0.0.0:80"], [""], ["localhost", "x"]])
def test_a_local_server_refuses_other_names(hosts: list[str]) -> None:
    refusal = HostRule("::1").refusal(hosts, [])
    assert refusal == f"this server answers requests to localhost, 127.0.0.1 and [::1], not to {hosts[-1]!r}"


def test_a_server_of_other_machines_answers_to_any_name() -> None:
    for bound in ("0.0.0.0", "::", "10.0.0.1"):
        assert HostRule(bound).refusal(["node17.cluster:80"], []) is None


@pytest.mark.parametrize("bound", ["127.0.0.1", "0.0.0.0"])
@pytest.mark.parametrize(
    "origin",
    [PAGE, "null", "http://localhost:3000", "http://127.0.0.1", "localhost:80", "", "http://[", "http://bound"],
)
def test_a_page_of_another_origin_is_refused(bound: str, origin: str) -> None:
    refusal = HostRule(bound, names=["bound"]).refusal(["localhost:80"], [origin])
    assert refusal == f"this server answers no web page of another origin: {origin!r}"


@pytest.mark.parametrize(
    ("host", "origin"),
    [("localhost:80", "http://localhost:80"), ("10.0.0.1:80", "http://10.0.0.1:80"), ("x:80", "https://allowed")],
)
def test_a_page_of_the_same_address_or_an_allowed_one_is_answered(host: str, origin: str) -> None:
    assert HostRule("0.0.0.0", ["allowed"]).refusal([host], [origin]) is None


def test_a_local_server_answers_to_the_name_that_it_was_bound_under() -> None:
    assert HostRule("127.0.0.1", names=["Node17"]).refusal(["node17:80"], ["http://node17:80"]) is None


def test_a_page_that_pointed_its_own_name_here_is_refused() -> None:
    assert HostRule("10.0.0.1").refusal(["page.example:80"], [f"{PAGE}:80"]) is not None
