"""Valid input, damaged: bytes that are flipped, cut, doubled and inserted, and JSON documents with a part exchanged."""

from __future__ import annotations

import collections
import contextlib
import copy
import json
import re
from collections.abc import Callable, Hashable, Iterator, Sequence
from typing import Any, TypeVar

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from gpu_cache.device import hostmem

ExampleT = TypeVar("ExampleT")

# How many examples a test tries: by default, and in its long variant.
NUM_EXAMPLES = [pytest.param(400, id="short"), pytest.param(20_000, id="long", marks=pytest.mark.slow)]

_TOKENS = [
    b'"', b"\\", b"[", b"]", b"{", b"}", b",", b":", b"-", b"0", b"1e999", b"-1", b"NaN", b"Infinity", b"null", b"true",
    b"\x00", b"\xff", b"\xc3\xa9", b"\\ud800", b"9" * 30, b"9" * 5000, b"[" * 3000, b'{"a":' * 2000, b"\r\n", b" ",
]  # fmt: skip

# Written as so many lists within each other; as such, Python could not even copy it.
_DEEP = ["<60 deep>", "<400 deep>", "<900 deep>", "<5000 deep>"]

EVIL: st.SearchStrategy[Any] = st.sampled_from(
    [
        None, True, False, -1, 0, 1, 2**31, 2**63 - 1, 2**63, 2**64, -(2**63), 10**40, 0.5, 4.0, float("nan"),
        float("inf"), "", "a", "0", "\ud800", "é", "x" * 5000, "torch.float32", "F32", [], [0, 1], [-1], [2**62, 4],
        [1] * 65, [[]], {}, {"a": 1}, {"type": "tensor"}, {"__metadata__": {}},
    ]
).map(copy.deepcopy) | st.integers(-(10**20), 10**20)  # fmt: skip


def fuzz(
    check: Callable[[ExampleT], Hashable], examples: st.SearchStrategy[ExampleT], num_examples: int
) -> collections.Counter[Hashable]:
    """Check examples, the same ones in every run; how often the check returned what."""
    outcomes: collections.Counter[Hashable] = collections.Counter()

    @settings(
        max_examples=num_examples,
        derandomize=True,
        deadline=None,
        database=None,
        suppress_health_check=list(HealthCheck),
    )
    @given(example=examples)
    def tried(example: ExampleT) -> None:
        outcomes[check(example)] += 1

    tried()
    return outcomes


@st.composite
def damaged(draw: st.DrawFn, data: st.SearchStrategy[bytes], max_edits: int = 3) -> bytes:
    """Bytes after a few edits, some of which may undo each other."""
    result = bytearray(draw(data))
    for _ in range(draw(st.integers(1, 2))):
        at = draw(st.integers(0, len(result)))
        length = draw(st.integers(0, 20))
        kind = draw(st.sampled_from(["flip", "set", "cut", "remove", "double", "insert"]))
        if kind == "flip" and at < len(result):
            result[at] ^= 1 << draw(st.integers(0, 7))
        elif kind == "set" and at < len(result):
            result[at] = draw(st.integers(0, 255))
        elif kind == "cut":
            del result[at:]
        elif kind == "remove":
            del result[at : at + length]
        elif kind == "double":
            result[at:at] = result[at : at + length]
        else:
            result[at:at] = draw(st.sampled_from(_TOKENS))
    return bytes(result)


@st.composite
def exchanged(draw: st.DrawFn, documents: st.SearchStrategy[Any]) -> Any:
    """A JSON document in which a part or two were exchanged, removed, doubled or wrapped."""
    root = [copy.deepcopy(draw(documents))]
    for _ in range(draw(st.integers(1, 2))):
        holder, key = draw(st.sampled_from(_parts(root)))
        kind = draw(st.sampled_from(["exchange", "exchange", "remove", "double", "wrap", "move"]))
        if kind == "exchange":
            holder[key] = draw(EVIL)
        elif kind == "wrap":
            holder[key] = draw(st.sampled_from([[holder[key]], {"type": holder[key]}, *_DEEP]))
        elif kind == "move":
            holder[key] = copy.deepcopy(draw(st.sampled_from([h[k] for h, k in _parts(root)])))
        elif holder is not root:
            _remove_or_double(holder, key, kind == "remove")
    return root[0]


def _remove_or_double(holder: Any, key: Any, is_removed: bool) -> None:
    if is_removed:
        del holder[key]
    elif isinstance(holder, list):
        holder.insert(key, holder[key])
    else:
        holder[f"{key}0"] = holder[key]


def _parts(holder: Any, depth: int = 0) -> list[tuple[Any, Any]]:
    """Every place in a nest of dicts and lists, as its container and key; not deeper than a reader would look."""
    keys: Sequence[Any] = list(holder) if isinstance(holder, dict) else range(len(holder))
    found = [(holder, key) for key in keys]
    for key in keys if depth < 8 else ():
        if isinstance(holder[key], dict | list):
            found += _parts(holder[key], depth + 1)
    return found


def as_text(document: Any) -> bytes:
    """JSON of a document."""
    return re.sub(
        rb'"<(\d+) deep>"', lambda found: b"[" * int(found[1]) + b"]" * int(found[1]), json.dumps(document).encode()
    )


@st.composite
def repeating(draw: st.DrawFn, texts: st.SearchStrategy[bytes]) -> bytes:
    """A JSON text in some object of which a key was put in front; it may be there already."""
    text = draw(texts)
    at = draw(st.sampled_from([position + 1 for position, byte in enumerate(text) if byte == ord("{")] or [0]))
    key = draw(st.sampled_from(["dtype", "shape", "data_offsets", "data", "type", "0", "1", "__metadata__", "ids"]))
    value = draw(st.sampled_from(["0", "[1]", '"F32"', "null", "{}", "[0,4]", '{"ids":"[]"}']))
    return text[:at] + f'"{key}":{value},'.encode() + text[at:]


@contextlib.contextmanager
def counted_allocations() -> Iterator[list[int]]:
    """Bytes of each tensor and host storage that is allocated within, on any thread; those on meta have none."""
    sizes: list[int] = []
    empty, host_storage = torch.empty, hostmem.host_storage

    def counted(*args: Any, **options: Any) -> torch.Tensor:
        if str(options.get("device")) == "meta":
            return empty(*args, **options)
        described = empty(*args, **options | {"device": "meta"})
        assert described.nbytes < 1 << 30, f"a tensor of {described.nbytes:,} bytes"
        sizes.append(described.nbytes)
        return empty(*args, **options)

    def counted_storage(nbytes: int) -> torch.UntypedStorage:
        assert nbytes < 1 << 30, f"a storage of {nbytes:,} bytes"
        sizes.append(nbytes)
        return host_storage(nbytes)

    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(torch, "empty", counted)
        patched.setattr(hostmem, "host_storage", counted_storage)
        yield sizes
