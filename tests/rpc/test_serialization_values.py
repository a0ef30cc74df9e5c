"""The JSON codec beyond tensors: containers, the two dataclasses, and what is refused."""

from __future__ import annotations

import binascii
import enum
import gc
import json
import types
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pytest
import torch

from gpu_cache.rpc.wire import serialization
from gpu_cache.rpc.wire.serialization import deserialize_value, register_dataclass, serialize_value
from tests.support.wire_tensors import encoded, through_json

pytestmark = pytest.mark.filterwarnings("ignore:ComplexHalf support is experimental")

RTENSOR = "areal.infra.rpc.rtensor.RTensor"
SHARD_INFO = "areal.infra.rpc.rtensor.TensorShardInfo"


@dataclass
class Info:
    shard_id: Any
    node_addr: str


@dataclass
class Handle:
    shard: Info
    data: torch.Tensor = field(default_factory=lambda: torch.ones(1))

    def __wire_fields__(self) -> dict[str, Any]:
        return {"shard": self.shard, "data": self.data.to("meta")}


@pytest.fixture
def handles(monkeypatch: pytest.MonkeyPatch) -> None:
    """Stand-ins for the two admitted classes, taken out of the table afterwards."""
    for table in ("_class_of_path", "_path_of_class", "_reader_of_path", "_writer_of_class"):
        monkeypatch.setattr(serialization, table, {})
    register_dataclass(RTENSOR, Handle)
    register_dataclass(SHARD_INFO, Info)


def test_containers_and_plain_values_pass_with_tuples_as_lists() -> None:
    value = {"a": [1, 2.5, "x", None, True], "t": (1, (2,)), "d": {"n": {}}}
    assert serialize_value(value) == {"a": [1, 2.5, "x", None, True], "t": [1, [2]], "d": {"n": {}}}
    assert deserialize_value(serialize_value(value)) == serialize_value(value)


def test_tensors_are_found_inside_containers() -> None:
    arrived = through_json({"batch": [{"ids": torch.arange(3)}, (torch.ones(1),)]})
    assert arrived["batch"][0]["ids"].tolist() == [0, 1, 2]
    assert arrived["batch"][1][0].tolist() == [1.0]


@pytest.mark.parametrize(("num_bytes", "is_on"), [(1 << 20, False), ((1 << 20) + 1, True)])
def test_the_collector_rests_while_a_short_tensor_is_encoded_and_decoded(
    num_bytes: int, is_on: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    found: list[bool] = []

    def seen(convert: Callable[..., bytes]) -> Callable[..., bytes]:
        def call(*args: Any, **options: Any) -> bytes:
            found.append(gc.isenabled())
            return convert(*args, **options)

        return call

    coder = types.SimpleNamespace(b2a_base64=seen(binascii.b2a_base64), a2b_base64=seen(binascii.a2b_base64))
    monkeypatch.setattr(serialization, "binascii", coder)
    value = [torch.zeros(num_bytes, dtype=torch.uint8)]
    assert torch.equal(deserialize_value(serialize_value(value))[0], value[0])
    assert set(found) == {is_on}
    assert gc.isenabled()


class Colour(enum.IntEnum):
    RED = 1


@dataclass
class Stranger:
    value: int


@pytest.mark.parametrize(
    ("value", "name"),
    [
        (np.ones(2), "ndarray"),
        (Colour.RED, "Colour"),
        (torch.float32, "dtype"),
        (Stranger(1), "Stranger"),
        ({1, 2}, "set"),
        (b"raw", "bytes"),
        ({1: "key"}, "int"),
    ],
)
def test_other_values_are_refused_by_name(value: object, name: str) -> None:
    with pytest.raises(TypeError, match=name):
        serialize_value([value])


@pytest.mark.usefixtures("handles")
def test_a_handle_with_data_stays_small_on_the_wire() -> None:
    shard = Info("3f1c6cb5-54c4-4f7c-8b56-2f6a8f6f5f0c", "10.0.0.5:8000")
    handle = Handle(shard, torch.ones(1024, 1024))
    text = json.dumps(serialize_value(handle))
    assert len(text) < 400
    assert json.loads(text)["class_path"] == RTENSOR
    assert json.loads(text)["data"]["shard"]["class_path"] == SHARD_INFO
    arrived = through_json([handle])[0]
    assert type(arrived) is Handle
    assert arrived.shard == shard
    assert arrived.data.is_meta
    assert arrived.data.shape == (1024, 1024)


@pytest.mark.usefixtures("handles")
def test_only_the_two_admitted_paths_can_be_registered() -> None:
    with pytest.raises(ValueError, match=r"areal\.api\.Other"):
        register_dataclass("areal.api.Other", Stranger)


@pytest.mark.usefixtures("handles")
@pytest.mark.parametrize("class_path", ["os.system", "gpu_cache.rpc.rtensor.fetch", 7, None, ["x"]])
def test_a_class_path_that_is_not_admitted_is_named_and_never_imported(
    class_path: object, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("importlib.import_module", lambda name: pytest.fail(f"imported {name}"))
    with pytest.raises(TypeError, match="is not admitted") as raised:
        deserialize_value({"type": "dataclass", "class_path": class_path, "data": {}})
    assert repr(class_path) in str(raised.value)


@pytest.mark.usefixtures("handles")
@pytest.mark.parametrize("data", [{}, {"shard_id": "x"}, {"shard_id": "x", "node_addr": "h:1", "extra": 1}, None, []])
def test_a_dataclass_with_other_fields_is_refused(data: object) -> None:
    with pytest.raises(ValueError, match="Info has the fields"):
        deserialize_value({"type": "dataclass", "class_path": SHARD_INFO, "data": data})


@pytest.mark.usefixtures("handles")
@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"shard": 1}, "Handle.shard is a Info, not 1"),
        ({"shard": {"shard_id": "x", "node_addr": "h:1"}}, "Handle.shard is a Info, not {'node_addr': 'h:1', 'sh"),
        ({"data": None}, "Handle.data is a Tensor, not None"),
        ({"shard": {"type": "dataclass", "class_path": SHARD_INFO, "data": {"shard_id": "x", "node_addr": 80}}},
         "Info.node_addr is a str, not 80"),
    ],
)  # fmt: skip
def test_a_dataclass_with_a_field_of_another_class_is_refused(fields: dict[str, Any], message: str) -> None:
    described = serialize_value(Handle(Info("x", "h:1")))
    with pytest.raises(ValueError, match=message):
        deserialize_value([{**described, "data": {**described["data"], **fields}}])


@pytest.mark.parametrize(
    "value",
    [
        {"type": "ndarray", "data": "", "shape": [0], "dtype": "<f4"},
        {"type": "pil_image", "data": "", "mode": "RGB"},
        {"type": "ray_object_ref", "data": "gASV"},
        {"type": "tokenizer", "data": "", "name_or_path": "x", "compression": "zip"},
        {"type": "processor", "data": "", "name_or_path": "x", "compression": "zip"},
        {"type": "torch_dtype", "value": "torch.float32"},
        {"type": "enum", "class_path": "os.Enum", "value": 1},
        {"type": "never heard of", "class_path": "os.system"},
    ],
    ids=lambda value: value["type"],
)
def test_upstreams_other_tagged_values_are_refused_by_tag(value: dict[str, Any]) -> None:
    with pytest.raises(TypeError, match=repr(value["type"])):
        deserialize_value({"nested": [value]})


@pytest.mark.parametrize(
    "value",
    [
        {"type": "text", "text": "hello"},
        {"type": "base64", "media_type": "image/png", "data": "iVBORw0KGgo="},
        {"type": "tensor", "name": "a dict of the user's"},
        {"type": "enum", "values": [1, 2]},
        {"type": ["list"], "class": 1},
        {"type": None},
    ],
)
def test_a_users_dict_with_a_type_key_is_plain_data(value: dict[str, Any]) -> None:
    assert deserialize_value(value) == value


def test_a_broken_tensor_inside_a_value_is_not_passed_on_as_a_dict() -> None:
    with pytest.raises(ValueError, match="characters of base64"):
        deserialize_value([encoded([100])])
