"""Requests under any damage: the server refuses them in its own words, or does what they say, and goes on."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import http.client
import json
from collections.abc import Iterator
from typing import Any
from urllib.parse import quote

import pytest
import torch
from hypothesis import strategies as st

from gpu_cache.rpc.server import main as rpc_server
from gpu_cache.rpc.wire.frame import CONTENT_TYPE, Frame, decode_frame
from gpu_cache.rpc.wire.serialization import tensor_to_json
from tests.support.fake_owner import FakeOwner
from tests.support.fuzz_corpus import contents, corpus
from tests.support.fuzz_damage import as_text, counted_allocations, damaged, exchanged, fuzz, repeating
from tests.support.wire_tensors import patterned, same_bits

NUM_OF_REQUESTS = [pytest.param(200, id="short"), pytest.param(10_000, id="long", marks=pytest.mark.slow)]
STORED = {"a": torch.tensor([1.5, -2.0]), "b": torch.tensor([1, 2, 3], dtype=torch.uint8)}
BINARY = {"Accept": CONTENT_TYPE}


@dataclasses.dataclass
class Reply:
    status: int
    content_type: str
    body: bytes


class Town:
    """A server that owns "a" and "b", and one connection to it after another."""

    def __init__(self) -> None:
        self.owner = FakeOwner()
        self._server = rpc_server.start(owner=self.owner, max_body_bytes=1 << 20)
        self._connection = http.client.HTTPConnection(self._server.address, timeout=30)
        self.restore()

    def restore(self) -> None:
        self.owner.store.clear()
        self.owner.store.update(STORED)

    def ask(self, method: str, path: str, body: bytes = b"", headers: dict[str, str] | None = None) -> Reply:
        """One request; at most as much as was sent is allocated for tensors."""
        with counted_allocations() as sizes:
            self._connection.request(method, path, body, headers or {})
            answer = self._connection.getresponse()
            reply = Reply(answer.status, answer.headers.get_content_type(), answer.read())
        assert sum(sizes) <= len(body) + sum(tensor.nbytes for tensor in STORED.values())
        assert reply.status in (200, 400, 404), reply
        if reply.status != 200:
            assert reply.content_type == "application/json"
            assert json.loads(reply.body)["status"] == "error"
        return reply

    def check_healthy(self) -> None:
        """As if nothing had been asked."""
        reply = self.ask("POST", "/data/batch", b'{"shard_ids": ["a", "b"]}', BINARY)
        tensors = decode_frame(reply.body)
        assert all(same_bits(tensors[key], STORED[key]) for key in STORED)

    def close(self) -> None:
        self._connection.close()
        self._server.stop()


@pytest.fixture
def town() -> Iterator[Town]:
    with contextlib.closing(Town()) as made:
        yield made


def check_batch(town: Town, body: bytes, headers: dict[str, str] | None = None) -> int:
    """The shards that are named, or a refusal; the status."""
    reply = town.ask("POST", "/data/batch", body, headers)
    if reply.status == 200:
        shard_ids = json.loads(body)["shard_ids"]
        assert set(shard_ids) <= STORED.keys()
        assert reply.content_type == (CONTENT_TYPE if headers else "application/octet-stream")
    assert town.owner.store.stats()["num_tensors"] == len(STORED)
    return reply.status


def check_clear(town: Town, body: bytes) -> int:
    """What is named is gone and nothing else, or a refusal; the status."""
    reply = town.ask("DELETE", "/data/clear", body)
    if reply.status == 200:
        named = {key for key in json.loads(body)["shard_ids"] if isinstance(key, str)}
        assert set(town.owner.store) == STORED.keys() - named
        assert json.loads(reply.body)["cleared_count"] == len(named & STORED.keys())
    else:
        assert set(town.owner.store) == STORED.keys()
    town.restore()
    return reply.status


def check_put(town: Town, body: bytes, headers: dict[str, str] | None = None) -> int:
    """A tensor of the bytes that were sent, or a refusal and nothing stored; the status."""
    reply = town.ask("PUT", "/data/new", body, headers)
    assert ("new" in town.owner.store) == (reply.status == 200)
    assert town.owner.store.keys() >= STORED.keys()
    town.restore()
    return reply.status


@pytest.mark.parametrize("headers", [None, BINARY], ids=["json", "binary"])
@corpus("requests/valid")
def test_a_valid_batch_of_the_corpus_is_answered(town: Town, content: bytes, headers: dict[str, str] | None) -> None:
    assert check_batch(town, content, headers) == 200


@pytest.mark.parametrize("headers", [None, BINARY], ids=["json", "binary"])
@corpus("requests/broken", "requests/missing", "requests/other-types")
def test_another_batch_of_the_corpus_is_refused(town: Town, content: bytes, headers: dict[str, str] | None) -> None:
    assert check_batch(town, content, headers) == 400
    town.check_healthy()


@corpus("requests/valid", "requests/missing", "requests/other-types")
def test_a_clear_of_the_corpus_clears_what_it_names(town: Town, content: bytes) -> None:
    assert check_clear(town, content) == 200


@corpus("requests/broken")
def test_a_broken_clear_of_the_corpus_is_refused(town: Town, content: bytes) -> None:
    assert check_clear(town, content) == 400
    town.check_healthy()


@corpus("tensors/broken")
def test_a_broken_tensor_of_the_corpus_is_not_stored(town: Town, content: bytes) -> None:
    assert check_put(town, content) == 400
    town.check_healthy()


@corpus("frames/broken", "frames/valid")
def test_a_frame_of_the_corpus_is_not_stored_under_another_name(town: Town, content: bytes) -> None:
    assert check_put(town, content, {"Content-Type": CONTENT_TYPE}) == 400
    town.check_healthy()


@functools.cache
def listed() -> list[Any]:
    return [{"shard_ids": ["a", "b"]}, {"shard_ids": ["a", "b", "a"]}, {"shard_ids": []}]


def damages(documents: list[Any], folder: str) -> st.SearchStrategy[bytes]:
    """Valid documents with any kind of damage, and the files of a folder."""
    texts = [json.dumps(document).encode() for document in documents]
    return (
        damaged(st.sampled_from([*texts, *texts, *contents(folder)]), max_edits=2)
        | exchanged(st.sampled_from(documents)).map(as_text)
        | repeating(st.sampled_from(texts))
    )


@pytest.mark.parametrize("num_examples", NUM_OF_REQUESTS)
@pytest.mark.parametrize("headers", [None, BINARY], ids=["json", "binary"])
def test_a_batch_with_any_damage_is_refused_or_answered(
    town: Town, headers: dict[str, str] | None, num_examples: int
) -> None:
    outcomes = fuzz(lambda body: check_batch(town, body, headers), damages(listed(), "requests"), num_examples)
    assert outcomes.keys() == {200, 400}
    town.check_healthy()


@pytest.mark.parametrize("num_examples", NUM_OF_REQUESTS)
def test_a_clear_with_any_damage_is_refused_or_done(town: Town, num_examples: int) -> None:
    outcomes = fuzz(lambda body: check_clear(town, body), damages(listed(), "requests"), num_examples)
    assert outcomes.keys() == {200, 400}
    town.check_healthy()


@pytest.mark.parametrize("num_examples", NUM_OF_REQUESTS)
def test_a_tensor_with_any_damage_is_refused_or_stored(town: Town, num_examples: int) -> None:
    documents = [tensor_to_json(tensor) for tensor in STORED.values()]
    outcomes = fuzz(lambda body: check_put(town, body), damages(documents, "tensors"), num_examples)
    assert outcomes.keys() == {200, 400}
    town.check_healthy()


@pytest.mark.parametrize("num_examples", NUM_OF_REQUESTS)
def test_a_frame_with_any_damage_is_refused_or_stored(town: Town, num_examples: int) -> None:
    frame = b"".join(Frame([("new", patterned(torch.float32, 40))]))
    headers = {"Content-Type": CONTENT_TYPE}
    outcomes = fuzz(lambda body: check_put(town, body, headers), damaged(st.just(frame), max_edits=1), num_examples)
    assert outcomes.keys() == {200, 400}
    town.check_healthy()


def check_path(town: Town, shard_id: bytes) -> int:
    """Ids are opaque: stored under a name, found under it, or refused; the status."""
    path = f"/data/{quote(shard_id, safe='')}"
    stored = town.ask("PUT", path, json.dumps(tensor_to_json(STORED["a"])).encode())
    if stored.status == 200:
        assert json.loads(stored.body)["shard_id"] in town.owner.store
        assert town.ask("GET", path).status == 200
    town.restore()
    return stored.status


@pytest.mark.parametrize("num_examples", NUM_OF_REQUESTS)
def test_an_id_of_any_bytes_is_refused_or_stored_and_found(town: Town, num_examples: int) -> None:
    assert fuzz(lambda shard_id: check_path(town, shard_id), st.binary(min_size=1, max_size=30), num_examples)[200]
    town.check_healthy()
