"""The script that attacks a server: what it offers, and that each attack is a load which can be held."""

from __future__ import annotations

import sys

import pytest

from gpu_cache.rpc.server import main as rpc_server
from scripts import attacks
from tests.support.fake_owner import FakeOwner


def test_the_list_names_every_attack(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(sys, "argv", ["attacks.py", "--list"])
    assert attacks.main() == 0
    assert [line.split()[0] for line in capsys.readouterr().out.splitlines()] == list(attacks.ATTACKS)


@pytest.mark.parametrize("name", ["slow-headers", "no-bodies", "drip-bodies", "unread", "stopped-readers", "repeats"])
def test_an_attack_holds_its_load(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for setting in ("NUM_SLOW", "NUM_UNREAD", "NUM_PLACES"):
        monkeypatch.setattr(attacks, setting, 5)
    monkeypatch.setattr(rpc_server, "_GRACE_S", 0.1)
    with rpc_server.start(owner=FakeOwner()) as server:
        steps = attacks.ATTACKS[name](server.address)
        next(steps)
        attacks.health(server.address)
        next(steps)
        steps.close()
