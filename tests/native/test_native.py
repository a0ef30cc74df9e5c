"""The C++ functions: built by a command, never required, refused where they cannot be trusted."""

from __future__ import annotations

import dataclasses
import gc
import os
import subprocess
import sys
import threading
import weakref
from collections import deque
from collections.abc import Callable, Hashable
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch

from gpu_cache import native
from gpu_cache.config import CacheConfig
from gpu_cache.device.host import HostDevice
from gpu_cache.index import lending
from gpu_cache.index.entry import Entry, Flight, State
from gpu_cache.index.index import ShardIndex
from gpu_cache.index.lending import Table
from gpu_cache.pool.block import Copy
from gpu_cache.pool.fence import StreamFence
from gpu_cache.pool.lease import Husks, carve
from gpu_cache.pool.slab import SlabPool
from gpu_cache.source import ShardSpec

SAYS = "from gpu_cache.index import lending; print(lending.hits.__module__)"


def run(*words: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, *words], capture_output=True, text=True, env={**os.environ, **environment}, timeout=120
    )


def test_without_a_library_python_serves(tmp_path: Path) -> None:
    done = run("-c", SAYS, GPU_CACHE_NATIVE="", GPU_CACHE_NATIVE_DIR=str(tmp_path))
    assert (done.stdout, done.stderr, done.returncode) == ("gpu_cache.index.lending\n", "", 0)


@pytest.mark.parametrize("word", ["1", "yes"])
def test_a_missing_library_that_is_required_is_an_error_that_says_how_to_build_it(tmp_path: Path, word: str) -> None:
    done = run("-c", SAYS, GPU_CACHE_NATIVE=word, GPU_CACHE_NATIVE_DIR=str(tmp_path))
    assert done.returncode == 1
    assert "build it: python -m gpu_cache.native" in done.stderr
    assert str(tmp_path) in done.stderr


def test_a_word_that_says_neither_yes_nor_no_is_warned_of(tmp_path: Path) -> None:
    done = run("-c", SAYS, GPU_CACHE_NATIVE="maybe", GPU_CACHE_NATIVE_DIR=str(tmp_path))
    assert (done.stdout, done.returncode) == ("gpu_cache.index.lending\n", 0)
    assert done.stderr == "GPU_CACHE_NATIVE='maybe': must be 0 or 1; taken as not set\n"


def test_a_broken_library_is_left_out_with_a_warning(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GPU_CACHE_NATIVE_DIR", str(tmp_path))
    native.library().write_bytes(b"no library")
    done = run("-c", SAYS, GPU_CACHE_NATIVE="", GPU_CACHE_NATIVE_DIR=str(tmp_path))
    assert (done.stdout, done.returncode) == ("gpu_cache.index.lending\n", 0)
    assert "blocks are built in Python" in done.stderr
    assert native.library().name in done.stderr


@pytest.mark.skipif(os.getuid() != 0, reason="only root gives files away")
def test_a_library_of_another_user_is_not_loaded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GPU_CACHE_NATIVE_DIR", str(tmp_path))
    native.library().touch()
    os.chown(native.library(), 12345, -1)
    done = run("-c", SAYS, GPU_CACHE_NATIVE="1", GPU_CACHE_NATIVE_DIR=str(tmp_path))
    assert f"{native.library()} belongs to user 12345" in done.stderr


def test_a_build_without_a_compiler_says_so_and_leaves_nothing(tmp_path: Path) -> None:
    done = run(
        "-m", "gpu_cache.native", GPU_CACHE_NATIVE="0", GPU_CACHE_NATIVE_DIR=str(tmp_path), CXX="no-such-compiler"
    )
    assert done.returncode == 2
    assert "no-such-compiler" in done.stderr
    assert list(tmp_path.iterdir()) == []


def test_a_build_that_fails_shows_the_words_of_the_compiler_and_leaves_nothing(tmp_path: Path) -> None:
    compiler = f"{sys.executable} -c 'raise SystemExit(\"no such header\")'"
    done = run("-m", "gpu_cache.native", GPU_CACHE_NATIVE="0", GPU_CACHE_NATIVE_DIR=str(tmp_path), CXX=compiler)
    assert done.returncode == 1
    assert "no such header" in done.stderr
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("folder", "compiler", "words"),
    [
        ("file/x", "c++", "Not a directory"),
        ("x", "c++ 'y", "No closing quotation"),
        ("x", "false", "false ended with 1, and without a word"),
    ],
)
def test_a_build_that_cannot_be_says_why_without_a_traceback(
    tmp_path: Path, folder: str, compiler: str, words: str
) -> None:
    (tmp_path / "file").touch()
    done = run(
        "-m", "gpu_cache.native", GPU_CACHE_NATIVE="0", GPU_CACHE_NATIVE_DIR=str(tmp_path / folder), CXX=compiler
    )
    assert (done.returncode, done.stdout) == (1, "")
    assert words in done.stderr
    assert "Traceback" not in done.stderr


needs_library = pytest.mark.skipif(native.blocks is None, reason="not built: make native")


@needs_library
def test_the_library_serves_where_it_is_built() -> None:
    assert lending.hits is native.blocks.hits


@needs_library
@pytest.mark.parametrize(
    ("offset", "nbytes", "shape", "words"),
    [
        (-512, 8, (8,), "8 bytes at -512 are not in an arena of 64"),
        (60, 8, (8,), "8 bytes at 60 are not in an arena of 64"),
        (0, 8, (-8,), r"shape \(-8,\) has a negative length"),
        (0, 8, (9,), r"8 bytes are no Byte tensor of shape \(9,\)"),
        (0, 8, (2**61 + 1, 8), "bytes are no Byte tensor of shape"),
        (0, 8, ("8",), "cannot be interpreted as an integer|must be int|integer"),
    ],
)
def test_a_block_outside_of_the_arena_is_refused(offset: int, nbytes: int, shape: tuple[int, ...], words: str) -> None:
    arena = torch.zeros(64, dtype=torch.uint8)
    with pytest.raises((ValueError, TypeError), match=words):
        native.blocks.carve(arena.untyped_storage(), offset, nbytes, arena, shape, print)


@needs_library
def test_the_functions_refuse_what_they_do_not_take() -> None:
    taking = native.blocks
    for call in (taking.carve, taking.carve_all, taking.lend, taking.hits, taking.bind_entries, taking.bind_copies):
        with pytest.raises(TypeError):
            call(1)
    for call in (native.blocks.track, native.blocks.untrack, native.blocks.strip):
        with pytest.raises(TypeError, match=r"a list of records is expected|takes a list"):
            call(1)
    with pytest.raises(TypeError, match="is no slot"):
        native.blocks.bind_entries(type("Entry", (), {"copy": 1}), print, 7)
    with pytest.raises(TypeError, match="has other slots than those that are known"):
        native.blocks.bind_copies(dataclasses.make_dataclass("Copy", [("extra", int, 0)], bases=(Copy,), slots=True))


class Owner(str):
    """An owner's name whose comparison runs code of the caller."""

    __slots__ = ()
    runs: ClassVar[list[Callable[[], object]]] = []
    __hash__ = str.__hash__

    def __eq__(self, other: object) -> bool:
        for run_it in self.runs:
            run_it()
        return str.__eq__(self, other)


def shard(key: Hashable, freed: deque[Any], *, node: str = "") -> Entry:
    arena = torch.zeros(64, dtype=torch.uint8)
    base, twin, lease = carve(arena.untyped_storage(), 0, 64, arena[:0], (64,), freed.append)
    assert twin is not None
    copy = Copy(key, base, lease, 64, twin, version=twin._version)
    return Entry(key, 1, Flight(), State.READY, node, (torch.uint8, (64,), Owner(node)), copy)


def hit(table: Table, *keys: Hashable) -> list[torch.Tensor]:
    found = lending.hits(table, keys, {}, True, [], {})
    assert found is not None
    return found[0]


@needs_library
def test_records_of_other_kinds_are_refused() -> None:
    for call in (native.blocks.track, native.blocks.untrack):
        call([1, "key", 2.0, None])  # the garbage collector knows of none
    for copies in ([1], [Copy("key", None, None, 0)]):  # type: ignore[arg-type]
        with pytest.raises(TypeError, match=r"is no Copy|has no tensor"):
            native.blocks.lend(copies, [])
    with pytest.raises(TypeError, match="3 is no Entry"):
        native.blocks.hits(Table(key=3), ["key"], {}, False, [], {})


@needs_library
def test_keys_that_change_the_list_they_are_in_do_no_harm() -> None:
    class Key:
        def __hash__(self) -> int:
            return 1

        def __eq__(self, other: object) -> bool:
            keys.clear()
            return self is other

    known = [Key() for _ in range(20)]
    keys: list[Hashable] = []
    table = Table((key, shard(number, deque())) for number, key in enumerate(known))
    keys.extend(known)
    found = lending.hits(table, keys, {}, True, [], {})
    assert found is not None
    assert len(found[0]) == 20


@needs_library
def test_an_owner_that_empties_table_and_promises_while_it_is_compared_does_no_harm() -> None:
    table = Table(key=shard("key", deque(), node="here"))
    expected = {"key": (torch.uint8, (64,), Owner("here"))}
    Owner.runs[:] = [table.clear, expected.clear, gc.collect]
    try:
        with pytest.raises(KeyError):
            lending.hits(table, ["key"], expected, True, [], {})
    finally:
        Owner.runs.clear()


@needs_library
def test_a_key_that_the_caller_expects_nothing_of_is_a_hit() -> None:
    assert lending.hits(Table(key=shard("key", deque())), ["key"], {"key": None}, True, [], {}) is not None


class Marked(torch.Tensor):
    """A class that a reader gives a tensor."""


def hooked(tensor: torch.Tensor) -> None:
    tensor.data = tensor.float()
    tensor.requires_grad_()
    tensor.register_hook(lambda gradient: gradient)
    tensor.requires_grad_(False)


KEPT: list[object] = []
TRACES: dict[str, Callable[[torch.Tensor], object]] = {
    "attribute": lambda tensor: setattr(tensor, "name_of_reader", 1),
    "class": lambda tensor: setattr(tensor, "__class__", Marked),
    "hook": hooked,
    "weak reference": lambda tensor: KEPT.append(weakref.ref(tensor)),
    "view": lambda tensor: KEPT.append(tensor[1:]),
    "graph": lambda tensor: KEPT.append(tensor.float() * torch.ones(64, requires_grad=True)),
    "look": lambda tensor: setattr(tensor, "data", torch.ones(3)),
}


@pytest.mark.parametrize("trace", TRACES)
def test_the_next_reader_finds_no_trace_of_the_last(trace: str) -> None:
    table = Table(key=shard("key", deque()))
    TRACES[trace](hit(table, "key")[0])
    (again,) = hit(table, "key")
    assert (type(again), again.shape, again.dtype, again.requires_grad) == (torch.Tensor, (64,), torch.uint8, False)
    assert (vars(again), again._backward_hooks, weakref.getweakrefcount(again)) == ({}, None, 0)
    KEPT.clear()


@needs_library
def test_a_run_is_carved_without_work_for_the_garbage_collector_until_readers_have_it() -> None:
    config = CacheConfig(pool_bytes="1MiB", prealloc_bytes=0).resolved(is_cuda=False, device_bytes=0)
    pool = SlabPool(HostDevice(), config, StreamFence(HostDevice(), "all"), lambda dead: None, Husks())
    taken = pool.take(1024)
    assert taken is not None
    specs = [ShardSpec("a", torch.int16, (3, 4)), ShardSpec("b", torch.float64, ())]
    copies = pool.carve(taken, specs, [0, 512])
    assert [(one.key, one.nbytes, one.version, one.completion, one.checksum) for one in copies] == [
        ("a", 24, 0, None, None),
        ("b", 8, 0, None, None),
    ]
    assert [(one.base.dtype, one.base.shape) for one in copies] == [(one.dtype, one.shape) for one in specs]
    assert [(one.lease.key, one.lease.slab, one.lease.nbytes) for one in copies if one.lease is not None] == [
        ("a", taken.slab, 512),
        ("b", taken.slab, 512),
    ]
    assert not any(gc.is_tracked(part) for one in copies for part in (one, one.base, one.loan, one.lease))
    lent = lending.lend(copies, [])
    assert all(map(gc.is_tracked, lent))
    assert lent == [one.loan for one in copies]


@needs_library
def test_a_stripped_tensor_lets_go_of_its_block_and_a_held_one_stays_whole() -> None:
    freed = deque[Any]()
    mine, viewed, held = (shard(key, freed).copy for key in ("mine", "viewed", "held"))
    assert mine is not None
    assert viewed is not None
    assert held is not None
    view, other = viewed.base[1:], held.base
    tensors = [viewed.base, held.base, torch.ones(2).to_sparse(), torch.ones(3), mine.base]
    lease = mine.lease
    mine.base = mine.loan = viewed.base = viewed.loan = held.base = held.loan = None  # type: ignore[assignment]
    husks = native.blocks.strip(tensors)
    assert not tensors
    assert list(freed) == [lease]
    assert [(one.shape, one.untyped_storage().nbytes()) for one in husks] == [((0,), 0)] * len(husks)
    assert [one.dtype for one in husks] == [torch.uint8, torch.float32]
    assert (view.tolist(), other.tolist()) == ([0] * 63, [0] * 64)


@needs_library
def test_a_slab_that_a_dropped_pool_leaves_with_its_leases_is_collected() -> None:
    class Slab:
        """Refers to its lease, which refers to it."""

    slab, freed = Slab(), deque[Any]()
    entry = shard("key", freed)
    assert entry.copy is not None
    slab.lease = lease = entry.copy.lease  # type: ignore[attr-defined]
    lease.slab = slab
    died = weakref.ref(slab)
    del slab, lease, entry
    assert len(freed) == 1
    del freed
    gc.collect()
    assert died() is None


@needs_library
def test_an_entry_is_no_work_for_the_garbage_collector_until_it_fails() -> None:
    index = ShardIndex(lambda base, num_loans: False)
    failed, pending = index.claim(["failed", "pending"]).claimed.values()
    assert not gc.is_tracked(failed)
    index.abort([failed], OSError())  # whose frames may refer to it
    assert gc.is_tracked(failed)
    assert not gc.is_tracked(pending)


@needs_library
def test_hits_and_blocks_by_the_thousand_leave_no_reference() -> None:
    fixed = deque[Any](maxlen=1)
    table = Table((number, shard(number, fixed)) for number in range(4))
    entries = list(table.values())
    counted = [None, Entry, *entries, *(one.copy for one in entries), *(one.promise for one in entries)]

    def program() -> None:
        held = hit(table, 0, 1, 1, 2)
        hit(table, 0, 1)
        assert lending.hits(table, [0, 1, "missing"], {}, True, [], {}) is None
        assert len(held) == 4
        shard("other", fixed)

    program()
    gc.collect()
    before = [sys.getrefcount(one) for one in counted]
    for _ in range(1000):
        program()
    gc.collect()
    grown = [after - start for after, start in zip(map(sys.getrefcount, counted), before, strict=True)]
    assert max(map(abs, grown)) < 100


@needs_library
def test_blocks_that_die_without_the_lock_of_python_fire_once_each() -> None:
    freed = deque[Any]()
    weights = torch.ones(64, requires_grad=True)
    entry = shard("key", freed)
    assert entry.copy is not None
    sums = (weights * entry.copy.base.data.float()).sum()
    views = [entry.copy.base[1:]]
    lease = entry.copy.lease
    del entry
    thread = threading.Thread(target=sums.backward)  # autograd's graph dies in a thread of its own
    thread.start()
    thread.join(30)
    assert not freed
    views.clear()
    assert list(freed) == [lease]
    assert lease is not None
    assert lease() is None
