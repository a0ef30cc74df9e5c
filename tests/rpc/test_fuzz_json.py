"""The JSON codec under any damage: tensors and values are refused by the documented errors, or built as described."""

from __future__ import annotations

import contextlib
import functools
import inspect
import json
import math
import sys
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from hypothesis import strategies as st

from gpu_cache.rpc import rtensor  # enters its classes in the codec's table
from gpu_cache.rpc.wire.serialization import deserialize_value, serialize_value, tensor_from_json, tensor_to_json
from tests.support.fuzz_corpus import contents, corpus
from tests.support.fuzz_damage import (
    NUM_EXAMPLES,
    as_text,
    counted_allocations,
    damaged,
    exchanged,
    fuzz,
    repeating,
)
from tests.support.wire_tensors import WIRE_DTYPES, patterned

pytestmark = pytest.mark.filterwarnings("ignore:ComplexHalf support is experimental")

_ON_PURPOSE = (ValueError, TypeError)  # RecursionError is neither


@functools.cache
def tensors() -> list[dict[str, Any]]:
    """Descriptions that we wrote, of every dtype."""
    return [tensor_to_json(patterned(dtype, 2, number % 3)) for number, dtype in enumerate(WIRE_DTYPES)]


@functools.cache
def values() -> list[Any]:
    """Values with handles and tensors in them."""
    shard = rtensor.TensorShardInfo("s", "h:1")
    handle = rtensor.RTensor(shard, torch.empty(2, 3, dtype=torch.bfloat16, device="meta"))
    chat = {"role": "user", "content": [{"type": "text", "text": "é"}, {"type": "tensor"}], "data": None}
    return [serialize_value([handle, shard, {"x": torch.arange(3)}]), chat, serialize_value({"a": {"b": (handle, 1)}})]


def parsed(text: bytes) -> Any:
    """As a server or a client does it; None for what is no JSON."""
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        return None


def check_tensor(text: bytes) -> bool:
    """Refused with nothing allocated, or as many bytes as its base64 has; whether the latter."""
    described = parsed(text)
    with counted_allocations() as sizes:
        try:
            tensor = tensor_from_json(described)
        except ValueError:
            assert sum(sizes) <= len(text), "allocated before the length was checked"
            return False
    assert list(tensor.shape) == described["shape"]
    assert sum(sizes) <= len(text)
    assert tensor.is_meta == (described.get("data") is None)
    assert tensor.is_meta or tensor.untyped_storage().nbytes() == math.prod(tensor.shape) * tensor.dtype.itemsize
    return True


def check_value(text: bytes) -> bool:
    """Refused by a documented error, or built; whether the latter."""
    return is_built(parsed(text), len(text))


def is_built(value: Any, most_bytes: int) -> bool:
    with counted_allocations() as sizes:
        try:
            deserialize_value(value)
        except _ON_PURPOSE:
            return False
        finally:
            assert sum(sizes) <= most_bytes
    return True


@contextlib.contextmanager
def few_frames() -> Iterator[None]:
    """Room for 400 more frames of Python: how deep the interpreter goes by itself depends on its version."""
    limit = sys.getrecursionlimit()
    sys.setrecursionlimit(len(inspect.stack(0)) + 400)
    try:
        yield
    finally:
        sys.setrecursionlimit(limit)


def damages(documents: list[Any], folder: str) -> dict[str, st.SearchStrategy[bytes]]:
    """Every kind of damage to valid documents, and to the files of a folder."""
    texts = [json.dumps(document).encode() for document in documents]
    return {
        "bytes": damaged(st.sampled_from([*texts, *contents(folder)])),
        "parts": exchanged(st.sampled_from(documents)).map(as_text),
        "keys": repeating(st.sampled_from(texts)),
    }


@corpus("tensors/valid")
def test_a_valid_tensor_of_the_corpus_is_built_and_written_again(content: bytes) -> None:
    assert check_tensor(content)
    tensor = tensor_from_json(json.loads(content))
    assert tensor_to_json(tensor).keys() == {"type", "data", "shape", "dtype"}


@corpus("tensors/broken")
def test_a_broken_tensor_of_the_corpus_is_refused(content: bytes) -> None:
    assert not check_tensor(content)
    assert parsed(content) is not None or content == b"null"


@corpus("values/valid")
def test_a_valid_value_of_the_corpus_is_built(content: bytes) -> None:
    assert check_value(content)


@corpus("values/broken")
def test_a_broken_value_of_the_corpus_is_refused(content: bytes) -> None:
    value = parsed(content)
    assert value is not None
    with few_frames():
        assert not is_built(value, len(content))


@pytest.mark.parametrize("num_examples", NUM_EXAMPLES)
@pytest.mark.parametrize("kind", ["bytes", "parts", "keys"])
def test_a_tensor_with_any_damage_is_refused_or_built_as_it_says(kind: str, num_examples: int) -> None:
    outcomes = fuzz(check_tensor, damages(tensors(), "tensors")[kind], num_examples)
    assert outcomes[True] > outcomes.total() / 50
    assert outcomes[False] > outcomes.total() / 4 or kind == "keys", "of a repeated key the last one counts"


@pytest.mark.parametrize("num_examples", NUM_EXAMPLES)
@pytest.mark.parametrize("kind", ["bytes", "parts", "keys"])
def test_a_value_with_any_damage_is_refused_or_built(kind: str, num_examples: int) -> None:
    outcomes = fuzz(check_value, damages(values(), "values")[kind], num_examples)
    assert min(outcomes.values()) > outcomes.total() / 50


@pytest.mark.parametrize("opening", ["[", '{"a":', '{"type":"tensor","shape":', '[{"x":'])
@pytest.mark.parametrize("depth", [50, 200, 400, 480, 600, 900])
def test_depth_is_a_refusal_and_no_recursion_error(opening: str, depth: int) -> None:
    value: Any = 1
    for _ in range(depth):
        value = {"[": [value], '{"a":': {"a": value}, '[{"x":': [{"x": value}]}.get(
            opening, {"type": "tensor", "shape": value, "dtype": "torch.uint8"}
        )
    try:
        assert deserialize_value(value) == value
    except ValueError:
        assert depth > 200 or "tensor" in opening
