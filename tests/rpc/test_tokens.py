"""A token is read alike from everywhere, and no message says what it is."""

from __future__ import annotations

import logging
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from gpu_cache.rpc.client.http import HttpRTensorBackend
from gpu_cache.rpc.server import main as rpc_server
from gpu_cache.rpc.shard import ShardFetchError, TensorShardInfo
from gpu_cache.rpc.tokens import TOKEN_VARIABLE, find_token, read_token_file
from tests.support.fake_owner import FakeOwner

SECRET = "s3cret-of-a-cluster"
WAYS = ["argument", "variable", "file"]


@pytest.fixture
def read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str, str], str | None]:
    """Reads a text in one of the ways."""

    def of_file(text: str) -> str | None:
        path = tmp_path / "token"
        path.write_bytes(text.encode())
        path.chmod(0o600)
        return read_token_file(path)

    def of_variable(text: str) -> str | None:
        monkeypatch.setenv(TOKEN_VARIABLE, text)
        return find_token()

    return lambda way, text: {"argument": find_token, "variable": of_variable, "file": of_file}[way](text)


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("text", [SECRET, f"{SECRET}\n", f" {SECRET}\r\n"], ids=["plain", "newline", "spaces"])
def test_white_space_around_a_token_is_dropped(read: Callable[[str, str], str | None], way: str, text: str) -> None:
    assert read(way, text) == SECRET


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize(
    ("text", "why"),
    [
        (" \n", "is empty"),
        (f"{SECRET}\nother\n", "has 2 lines, a token is one line"),
        (f"{SECRET}\r\n\r\nX: y", "has 3 lines"),
        (f"{SECRET} x", "has a space, a control character or a letter outside ASCII"),
        (f"{SECRET}\x01x", "a control character"),
        (f"{SECRET}ü", "a letter outside ASCII"),
    ],
    ids=["empty", "two lines", "a header", "space", "control", "umlaut"],
)
def test_a_token_that_cannot_be_sent_is_refused_and_not_shown(
    read: Callable[[str, str], str | None], way: str, text: str, why: str
) -> None:
    with pytest.raises(ValueError, match=why) as caught:
        read(way, text)
    assert SECRET not in repr(caught.value)
    assert caught.value.__cause__ is None


def test_an_empty_variable_is_no_token_and_an_empty_argument_is_a_mistake(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(TOKEN_VARIABLE, "")
    assert find_token() is None
    for take in (HttpRTensorBackend, lambda **token: rpc_server.start(owner=FakeOwner(), **token)):
        with pytest.raises(ValueError, match="the token given as an argument is empty"):
            take(token="")


def test_a_file_of_no_text_is_refused_and_not_shown(tmp_path: Path) -> None:
    path = tmp_path / "token"
    path.write_bytes(SECRET.encode() + b"\xff\xfe")
    with pytest.raises(ValueError, match="a letter outside ASCII") as caught:
        read_token_file(path)
    assert SECRET not in repr(caught.value)


@pytest.mark.parametrize(("mode", "is_said"), [(0o600, False), (0o400, False), (0o640, True), (0o604, True)])
def test_a_token_file_that_others_may_read_is_warned_about(
    tmp_path: Path, mode: int, is_said: bool, caplog: pytest.LogCaptureFixture
) -> None:
    path = tmp_path / "token"
    path.write_text(SECRET)
    path.chmod(mode)
    assert read_token_file(path) == SECRET
    said = f"other users may read the token file {path} (mode {mode:04o}): chmod 600 {path}"
    assert caplog.messages == ([said] if is_said else [])


def test_client_and_server_agree_over_a_newline(monkeypatch: pytest.MonkeyPatch) -> None:
    owner = FakeOwner()
    owner.store["a"] = torch.ones(3)
    with rpc_server.start(owner=owner, token=f"{SECRET}\n") as server:
        monkeypatch.setenv(TOKEN_VARIABLE, f"{SECRET}\r\n")
        for backend in (HttpRTensorBackend(), HttpRTensorBackend(token=f"{SECRET}\n")):
            assert backend.fetch([TensorShardInfo("a", server.address)])[0].tolist() == [1, 1, 1]
            backend.close()


def test_no_error_repr_or_log_shows_the_token(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.DEBUG)
    backend = HttpRTensorBackend(token=SECRET)
    with rpc_server.start(owner=FakeOwner(), token="another") as server:
        with pytest.raises(ShardFetchError, match="401") as caught:
            backend.fetch([TensorShardInfo("a", server.address)])
        shown = [repr(caught.value), repr(caught.value.__cause__), repr(backend), repr(backend._settings), repr(server)]
    backend.close()
    assert [text for text in [*shown, caplog.text] if SECRET in text or "another" in text] == []
