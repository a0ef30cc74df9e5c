"""Handles, their errors, and the walk over containers."""

from __future__ import annotations

import pickle
import sys
from collections import Counter, OrderedDict, defaultdict, namedtuple
from dataclasses import fields

import pytest
import torch

from gpu_cache.errors import FetchError, GpuCacheError
from gpu_cache.rpc.shard import (
    ShardFetchError,
    ShardMissingError,
    TensorShardInfo,
    WireError,
    collect_leaves,
    map_leaves,
)

Point = namedtuple("Point", "x y")


class Leaf:
    def __init__(self, name: str) -> None:
        self.name = name


class NamedList(list):
    def __init__(self, title: str) -> None:
        super().__init__()
        self.title = title


def test_a_shard_info_has_exactly_the_two_fields_of_upstream() -> None:
    assert [field.name for field in fields(TensorShardInfo)] == ["shard_id", "node_addr"]
    assert TensorShardInfo("a", "h:1") == TensorShardInfo(shard_id="a", node_addr="h:1")
    assert TensorShardInfo("a", "h:1") != TensorShardInfo("a", "h:2")


def test_a_missing_shard_is_caught_as_fetch_error_and_as_runtime_error() -> None:
    assert issubclass(ShardMissingError, ShardFetchError)
    assert issubclass(ShardFetchError, FetchError)
    assert issubclass(ShardFetchError, RuntimeError)
    assert issubclass(ShardFetchError, GpuCacheError)
    assert issubclass(WireError, ValueError)


def test_fetch_errors_survive_pickling() -> None:
    error = pickle.loads(pickle.dumps(ShardMissingError("Shard x not found", {"x": KeyError("x")})))
    assert type(error) is ShardMissingError
    assert str(error) == "Shard x not found"
    assert list(error.failures) == ["x"]


def test_collect_leaves_keeps_order_and_repeats() -> None:
    a, b, c = Leaf("a"), Leaf("b"), Leaf("c")
    nest = {"first": [a, (b, 1)], "second": {"deep": a}, "third": Point(c, None), "text": "abc"}
    assert collect_leaves(nest, Leaf) == [a, b, a, c]
    assert collect_leaves(a, Leaf) == [a]
    assert collect_leaves("abc", Leaf) == []


def test_a_leaf_that_is_a_container_is_not_entered() -> None:
    inner = OrderedDict(x=OrderedDict())
    assert collect_leaves([inner, {"y": inner}], OrderedDict) == [inner, inner]
    assert map_leaves([inner], OrderedDict, len) == [1]


def test_map_leaves_replaces_only_leaves_and_calls_in_order() -> None:
    a, b = Leaf("a"), Leaf("b")
    other = object()
    seen: list[str] = []

    def name(leaf: Leaf) -> str:
        seen.append(leaf.name)
        return leaf.name.upper()

    assert map_leaves({"k": [b, a, other], "t": (a,), "n": None}, Leaf, name) == {
        "k": ["B", "A", other],
        "t": ("A",),
        "n": None,
    }
    assert seen == ["b", "a", "a"]
    assert map_leaves(other, Leaf, name) is other
    assert map_leaves(a, Leaf, name) == "A"


def test_map_leaves_builds_new_containers_and_leaves_the_old_ones_alone() -> None:
    leaf = Leaf("a")
    nest = {"list": [leaf], "empty": []}
    mapped = map_leaves(nest, Leaf, id)
    assert nest == {"list": [leaf], "empty": []}
    assert mapped is not nest
    assert mapped["empty"] is not nest["empty"]


def test_map_leaves_keeps_the_types_of_containers() -> None:
    leaf = Leaf("a")
    factory = defaultdict(list, {"k": leaf})
    ordered = OrderedDict([("z", leaf), ("a", 1)])
    titled = NamedList("title")
    titled.append(leaf)
    point, by_default, in_order, in_list = map_leaves((Point(leaf, 2), factory, ordered, titled), Leaf, lambda _: 7)
    assert point == Point(7, 2)
    assert type(point) is Point
    assert by_default == {"k": 7}
    assert by_default["new"] == []
    assert list(in_order.items()) == [("z", 7), ("a", 1)]
    assert type(in_order) is OrderedDict
    assert type(in_list) is NamedList
    assert (in_list.title, list(in_list)) == ("title", [7])
    assert list(titled) == [leaf]


def test_map_leaves_rebuilds_containers_with_manners_of_their_own() -> None:
    assert map_leaves(Counter(a=2), Leaf, id) == Counter(a=2)
    assert map_leaves(torch.Size([2, 3]), Leaf, id) == torch.Size([2, 3])
    pair = torch.max(torch.tensor([[1, 5], [7, 2]]), dim=1)
    mapped = map_leaves(pair, torch.Tensor, torch.Tensor.tolist)
    assert type(mapped) is type(pair)
    assert mapped.values == [5, 7]


class Pair(tuple):
    def __new__(cls, *items: object) -> Pair:
        made = super().__new__(cls, items)
        made.title = "title"
        return made


def test_a_tuple_keeps_its_class_and_attributes_whatever_its_constructor_takes() -> None:
    leaf = Leaf("a")
    pair = Pair(leaf, 1)
    pair.title = "other"
    mapped = map_leaves(pair, Leaf, lambda _: 7)
    assert type(mapped) is Pair
    assert (tuple(mapped), mapped.title) == ((7, 1), "other")


def test_a_tuple_without_leaves_is_passed_on() -> None:
    assert map_leaves([sys.version_info], Leaf, id) == [sys.version_info]


def test_tensors_are_leaves_of_their_own_type() -> None:
    parameter = torch.nn.Parameter(torch.ones(2))
    assert [leaf is parameter for leaf in collect_leaves([parameter, 1], torch.Tensor)] == [True]


def test_a_container_that_contains_itself_is_a_recursion_error() -> None:
    loop: list[object] = []
    loop.append(loop)
    with pytest.raises(RecursionError):
        collect_leaves(loop, Leaf)
    with pytest.raises(RecursionError):
        map_leaves(loop, Leaf, id)
