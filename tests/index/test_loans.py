"""Hand-outs that are lent: to one reader at a time, clean, and by calls that keep the GIL."""

from __future__ import annotations

import gc
import threading
import weakref
from collections import deque
from collections.abc import Callable
from typing import Any

import pytest
import torch

from gpu_cache import CacheConfig, FetchError, TensorCache, reaper
from gpu_cache.device.modes import plain_tensors
from gpu_cache.index import lending
from gpu_cache.index.lending import MOST_SPARES
from gpu_cache.pool import lease
from gpu_cache.pool.block import Copy, Range
from gpu_cache.source import ShardSpec
from tests.support.gil import counted_turns
from tests.support.sources import DictSource, same_bytes

ORIGINAL = torch.arange(24.0).reshape(4, 6)


@pytest.fixture(params=["refetch", "ignore"])
def cache(request: pytest.FixtureRequest) -> TensorCache:
    return TensorCache(CacheConfig(device="cpu", pool_bytes="8MiB", prealloc_bytes=0, on_mutation=request.param))


@pytest.fixture
def source() -> DictSource:
    return DictSource({"a": ORIGINAL.clone()})


def get(cache: TensorCache, source: DictSource) -> torch.Tensor:
    (tensor,) = cache.get_many(["a"], source)
    return tensor


def held_bytes(cache: TensorCache) -> int:
    cache.synchronize()
    return cache.buffer_stats()["device_bytes"]


def test_a_reader_gets_the_tensor_that_the_one_before_let_go_of(cache: TensorCache, source: DictSource) -> None:
    seen = {id(get(cache, source)) for _ in range(5)}
    assert len(seen) == 1
    assert len(source.asked) == 1


def test_two_readers_at_a_time_have_two_tensors_on_one_block(cache: TensorCache, source: DictSource) -> None:
    readers = [get(cache, source) for _ in range(4)]
    assert len(set(map(id, readers))) == 4
    assert len({one.data_ptr() for one in readers}) == 1
    readers[0].requires_grad_()
    readers[1].unsqueeze_(0)
    assert (readers[2].shape, readers[3].requires_grad) == (ORIGINAL.shape, False)


CHANGES: dict[str, Callable[[torch.Tensor], Any]] = {
    "requires_grad_": lambda one: one.requires_grad_(),
    "grad": lambda one: setattr(one, "grad", torch.ones_like(one)),
    "attribute": lambda one: setattr(one, "tag", 1),
    "t_": lambda one: one.t_(),
    "unsqueeze_": lambda one: one.unsqueeze_(0),
    "resize_": lambda one: one.resize_(2, 3),
    "set_": lambda one: one.set_(),
    "data": lambda one: setattr(one, "data", torch.zeros(3, dtype=torch.int32)),
    "data of its own": lambda one: setattr(one, "data", one.data[1:, :2]),
    "negative bit": lambda one: torch._C._set_neg(one, True),
    "gradient": lambda one: (one.requires_grad_() * 2).sum().backward(),
    "hook": lambda one: (one.requires_grad_().register_hook(print), one.requires_grad_(False)),
    "hook behind gradients": lambda one: (
        one.requires_grad_().register_post_accumulate_grad_hook(print),
        one.requires_grad_(False),
    ),
}


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES.keys())
def test_the_next_reader_gets_no_change_of_the_one_before(
    cache: TensorCache, source: DictSource, change: Callable[[torch.Tensor], Any]
) -> None:
    change(get(cache, source))
    fresh = get(cache, source)
    assert type(fresh) is torch.Tensor
    assert same_bytes(fresh, ORIGINAL)
    assert (fresh.shape, fresh.stride(), fresh.dtype) == (ORIGINAL.shape, ORIGINAL.stride(), ORIGINAL.dtype)
    assert (fresh.requires_grad, fresh.grad, fresh.__dict__, fresh.is_neg()) == (False, None, {}, False)
    assert fresh._backward_hooks is fresh._post_accumulate_grad_hooks is None
    assert fresh.untyped_storage().nbytes() == ORIGINAL.nbytes


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES.keys())
def test_a_readers_tensor_stays_as_the_reader_made_it(
    cache: TensorCache, source: DictSource, change: Callable[[torch.Tensor], Any]
) -> None:
    mine = get(cache, source)
    change(mine)
    shape, needs_grad = mine.shape, mine.requires_grad
    fresh, another = get(cache, source), get(cache, source)
    assert mine is not fresh is not another
    assert (mine.shape, mine.requires_grad) == (shape, needs_grad)
    assert same_bytes(fresh, ORIGINAL)
    assert same_bytes(another, ORIGINAL)


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES.keys())
def test_a_clear_takes_a_tensor_back_whatever_its_reader_made_of_it(
    cache: TensorCache, source: DictSource, change: Callable[[torch.Tensor], Any]
) -> None:
    change(get(cache, source))
    assert cache.clear() == 1
    assert held_bytes(cache) == 0


class Refusing(torch.Tensor):
    """Refuses every look at a tensor."""

    @classmethod
    def __torch_function__(cls, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        raise AssertionError(function)


def test_a_class_that_a_reader_gave_its_tensor_is_not_asked(source: DictSource) -> None:
    cache = TensorCache(CacheConfig(device="cpu", pool_bytes="8MiB", prealloc_bytes=0, on_mutation="ignore"))
    for _ in range(2):
        get(cache, source).__class__ = Refusing
    assert same_bytes(get(cache, source), ORIGINAL)
    get(cache, source).__class__ = Refusing
    assert cache.clear() == 1
    assert held_bytes(cache) == 0


def test_a_new_tensor_is_lent_also_if_a_debugger_holds_it(monkeypatch: pytest.MonkeyPatch) -> None:
    held: list[torch.Tensor] = []

    def held_aliases(bases: list[torch.Tensor]) -> list[torch.Tensor]:
        assert len(held) < 10, "the index looks for a free one for ever"
        held.extend(lease.aliases_of(bases))
        return held[-len(bases) :]

    monkeypatch.setattr(lending, "aliases_of", held_aliases)
    one = Copy("a", torch.ones(3), None, 12)
    assert [lending.lend_in_python([one], [])[0] is held[number] for number in range(3)] == [True] * 3


def with_graph(tensor: torch.Tensor) -> Any:
    return (torch.ones(4, 6, requires_grad=True) * tensor).sum()


KEEPERS: dict[str, Callable[[torch.Tensor], Any]] = {
    "view": lambda one: one[1:],
    "graph": with_graph,
    "DLPack capsule": lambda one: torch.utils.dlpack.to_dlpack(one),
    "weak reference": weakref.ref,
    "closure": lambda one: lambda: one.sum(),
    "dead cycle": lambda one: cycle_of(one),
}


def cycle_of(tensor: torch.Tensor) -> None:
    cycle: list[Any] = [tensor]
    cycle.append(cycle)


@pytest.mark.parametrize("keep", KEEPERS.values(), ids=KEEPERS.keys())
def test_a_tensor_that_a_reader_keeps_in_any_way_goes_to_no_other(
    cache: TensorCache, source: DictSource, keep: Callable[[torch.Tensor], Any]
) -> None:
    gc.disable()
    try:
        first = get(cache, source)
        address = id(first)
        kept = keep(first)
        del first
        second = get(cache, source)
    finally:
        gc.enable()
    assert id(second) != address
    assert second.data_ptr() != 0
    del kept, second


def test_a_write_through_any_of_them_is_seen(source: DictSource) -> None:
    cache = TensorCache(CacheConfig(device="cpu", pool_bytes="8MiB", prealloc_bytes=0, on_mutation="refetch"))
    for writer in range(4):
        readers = [get(cache, source) for _ in range(4)]
        readers[writer].add_(1)
        del readers
        assert same_bytes(get(cache, source), ORIGINAL)
    assert cache.buffer_stats()["mutations"] == 4


def test_a_loan_that_was_returned_keeps_its_shard_from_nothing(cache: TensorCache, source: DictSource) -> None:
    del source.tensors["a"]
    source.tensors.update(
        {f"s{number}": torch.zeros(1 << 18) for number in range(30)}
    )  # 30 of 1 MiB each, in a pool of 8 MiB
    for number in range(30):
        cache.get_many([f"s{number}"], source)
    assert cache.buffer_stats()["evictions"] == 22
    kept = cache.get_many(["s29"], source)
    cache.clear()
    assert held_bytes(cache) == 1 << 20
    del kept
    assert held_bytes(cache) == 0


def test_a_clear_gives_bytes_back_at_once_and_leaves_husks_for_the_reaper(
    cache: TensorCache, source: DictSource, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(reaper, "PERIOD_S", 3600.0)
    get(cache, source)
    cache.clear()
    assert held_bytes(cache) == 0
    engine = cache._engine
    assert engine is not None
    assert len(engine.husks) == 2
    engine.husks.drop(10)
    assert len(engine.husks) == 0
    cache.close()


def test_readers_of_one_shard_get_the_tensors_that_readers_before_let_go_of(
    cache: TensorCache, source: DictSource
) -> None:
    first = {id(one) for one in [get(cache, source) for _ in range(4)]}
    for num_readers in (4, 3, 4, 1):
        seen = {id(one) for one in [get(cache, source) for _ in range(num_readers)]}
        assert len(seen) == num_readers
        assert seen <= first
    with_attribute = [get(cache, source) for _ in range(4)]
    with_attribute[2].tag = 1  # type: ignore[attr-defined]
    del with_attribute
    again = [get(cache, source) for _ in range(5)]
    assert len(set(map(id, again))) == 5
    assert not any(map(vars, again))
    assert all(same_bytes(one, ORIGINAL) for one in again)


def test_spares_are_bounded_and_go_with_their_shard(cache: TensorCache, source: DictSource) -> None:
    held = [get(cache, source) for _ in range(3 * MOST_SPARES)]
    (entry,) = cache._index._entries.values()
    assert entry.copy is not None
    assert entry.copy.spares is not None
    assert len(entry.copy.spares) == MOST_SPARES
    del entry
    held.clear()
    cache.clear()
    assert held_bytes(cache) == 0


@pytest.mark.parametrize("number", range(4))
def test_a_shard_that_one_of_several_readers_holds_is_not_evicted(
    cache: TensorCache, source: DictSource, number: int
) -> None:
    readers = [get(cache, source) for _ in range(4)]
    kept = [readers[number]]
    readers.clear()
    assert not cache._index.candidates()
    kept[0] = kept[0][1:]
    assert not cache._index.candidates()
    kept.clear()
    assert len(cache._index.candidates()) == 1


# The GIL.


def carved(cache: TensorCache, keys: list[str], specs: list[ShardSpec]) -> Range:
    """Claim, carve and publish shards, as a fetch does, on this thread."""
    engine, index = cache._lazy.open(), cache._index
    found = index.claim(keys)
    room = engine.pool.take(512 * len(keys))
    assert room is not None
    with plain_tensors():
        landings = engine.pool.carve(room, specs, [512 * number for number in range(len(keys))])
    index.publish(zip(found.claimed.values(), landings, strict=True), "node", None)
    index.release(found.claimed.values())
    return room


@pytest.mark.parametrize(
    "what", ["hits", "hits of what others hold", "drops", "drops of several readers", "carving and publishing", "clear"]
)
def test_nothing_gives_the_gil_away(what: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reaper, "PERIOD_S", 3600.0)
    cache = TensorCache(CacheConfig(device="cpu", pool_bytes="8MiB", prealloc_bytes="8MiB", stats=False))
    keys = [f"k{number}" for number in range(1000)]
    specs = [ShardSpec(key, torch.float32, (2, 10 + number % 50)) for number, key in enumerate(keys)]
    carved(cache, keys[:10], specs[:10])  # makes the objects of a first use
    cache.clear()
    source = DictSource({})
    held: list[Any] = []
    if what != "carving and publishing":
        carved(cache, keys, specs)
    if what in ("drops", "hits of what others hold"):
        held += cache.get_many(keys, source)
    if what in ("drops of several readers", "clear"):
        held += [cache.get_many(keys, source) for _ in range(MOST_SPARES + 1)]
    if what == "clear":  # of shards that had several readers
        held.clear()
    with counted_turns() as turns:
        before = turns()
        if what in ("hits", "hits of what others hold"):
            held += cache.get_many(keys, source)
        elif what in ("drops", "drops of several readers"):
            held.clear()
        elif what == "clear":
            cache.clear(keys)
        else:
            carved(cache, keys, specs)
        taken = turns() - before
    held.clear()
    cache.close()  # else its reaper, with this period, would look once more in an hour
    assert taken == 0


# Building.


def built(shape: tuple[int, ...]) -> tuple[torch.Tensor, lease.Lease, deque[lease.Lease]]:
    """A block of 24 int16 in the middle of an arena."""
    freed: deque[lease.Lease] = deque()
    with plain_tensors():
        arena = torch.zeros(4096, dtype=torch.uint8).untyped_storage()
        base, _, one = lease.carve(arena, 512, 48, torch.empty(0, dtype=torch.int16), shape, freed.append)
        return base, one, freed


def refuse(*args: Any) -> Any:
    raise RuntimeError("not in this torch")


GUARDS = torch._C._dynamo.guards
UNSOUND: dict[str, Callable[..., Any] | None] = {
    "missing": None,
    "refuses": refuse,
    "takes other arguments": lambda tensor: tensor,
    "another shape": lambda tensor, shape, strides, offset: tensor[1:],
    "another storage": lambda tensor, shape, strides, offset: tensor.clone().reshape(shape),
    "a view": lambda tensor, shape, strides, offset: tensor.view(shape),
}


@pytest.mark.parametrize("reinterpret", UNSOUND.values(), ids=UNSOUND.keys())
@pytest.mark.parametrize("shape", [(24,), (4, 6), (2, 1, 12)])
def test_a_torch_without_a_sound_way_builds_in_the_slow_way(
    shape: tuple[int, ...], reinterpret: Callable[..., Any] | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(lease, "_builders", {})
    if reinterpret is None:
        monkeypatch.delattr(GUARDS, "_reinterpret_tensor")
    else:
        monkeypatch.setattr(GUARDS, "_reinterpret_tensor", reinterpret)
    block, one_lease, freed = built(shape)
    twin = built(shape)[0]
    assert (block.shape, block.dtype, block.storage_offset()) == (shape, torch.int16, 0)
    assert block.is_contiguous()
    assert (block.untyped_storage().nbytes(), block._is_view()) == (48, False)
    before = twin._version
    block.fill_(1)
    assert twin._version == before
    assert not freed
    del block
    assert list(freed) == [one_lease]


def test_this_torch_builds_in_the_quick_way(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lease, "_builders", {})
    monkeypatch.setattr(torch.Tensor, "set_", refuse)
    assert built((4, 6))[0].shape == (4, 6)


@pytest.mark.parametrize("shape", [(25,), (4, 5), (-4, -6), (4, 6, 2), ()])
def test_a_shape_that_its_bytes_do_not_fill_is_refused(shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match="shape"):
        built(shape)


class CountingLock:
    """A lock that counts how often it is taken."""

    def __init__(self) -> None:
        self.lock, self.num_taken = threading.Lock(), 0

    def __enter__(self) -> None:
        self.lock.acquire()
        self.num_taken += 1

    def __exit__(self, *error: object) -> None:
        self.lock.release()


def test_a_batch_of_hits_takes_the_index_lock_once_and_builds_no_error(monkeypatch: pytest.MonkeyPatch) -> None:
    cache = TensorCache(CacheConfig(device="cpu", pool_bytes="8MiB", prealloc_bytes=0))
    keys = [f"{number}" for number in range(50)]
    source = DictSource({key: ORIGINAL.clone() for key in keys})
    kept = cache.get_many(keys, source)
    monkeypatch.setattr(cache._index, "_lock", counting := CountingLock())
    built: list[object] = []
    monkeypatch.setattr(FetchError, "__init__", lambda *args: built.append(args))
    again = cache.get_many([*keys, keys[0]], source)
    assert (counting.num_taken, built) == (1, [])
    assert len(set(map(id, [*kept, *again]))) == 101
    stats = cache.buffer_stats()
    assert (stats["hits"], stats["misses"], stats["requested"]) == (51, 50, 101)


@pytest.mark.parametrize("missing", [0, 25, 49])
def test_a_batch_that_lacks_one_shard_counts_each_once(missing: int) -> None:
    cache = TensorCache(CacheConfig(device="cpu", pool_bytes="8MiB", prealloc_bytes=0))
    keys = [f"{number}" for number in range(50)]
    source = DictSource({key: torch.full((3,), int(key)) for key in keys})
    cache.get_many([key for key in keys if key != keys[missing]], source)
    tensors = cache.get_many(keys, source)
    assert [int(tensor[0]) for tensor in tensors] == list(range(50))
    stats = cache.buffer_stats()
    assert (stats["hits"], stats["misses"], stats["num_entries"]) == (49, 50, 50)
    assert source.asked[1:] == [[keys[missing]]]


def test_hits_are_the_latest_used() -> None:
    cache = TensorCache(CacheConfig(device="cpu", pool_bytes="8MiB", prealloc_bytes=0))
    source = DictSource({key: ORIGINAL.clone() for key in "abc"})
    cache.get_many(list("abc"), source)
    cache.get_many(["a"], source)
    assert [one.entry.key for one in cache._index.candidates()] == ["b", "c", "a"]
