"""Upstream's JSON form: exact bits, small handles, and nothing built that was not admitted."""

from __future__ import annotations

import base64
import struct

import pytest
import torch

from gpu_cache.rpc.wire import serialization
from gpu_cache.rpc.wire.serialization import serialize_value, tensor_from_json, tensor_to_json
from tests.support.wire_tensors import WIRE_DTYPES, encoded, patterned, raw_bytes, same_bits, through_json

pytestmark = pytest.mark.filterwarnings("ignore:ComplexHalf support is experimental")


@pytest.mark.parametrize("dtype", WIRE_DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(3, 5), (), (0,), (2, 0, 3), (1,)], ids=str)
def test_every_dtype_and_shape_arrives_bit_for_bit(dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    tensor = patterned(dtype, *shape)
    assert same_bits(through_json(tensor), tensor)


def test_all_the_dtypes_of_the_contract_travel_and_no_others() -> None:
    assert set(serialization.DTYPES.values()) == set(WIRE_DTYPES)
    assert all(str(dtype) == f"torch.{name}" for name, dtype in serialization.DTYPES.items())


def test_all_bfloat16_patterns_arrive_bit_for_bit() -> None:
    tensor = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16).view(torch.bfloat16)
    assert same_bits(through_json(tensor), tensor)


def test_bfloat16_travels_as_the_float32_that_upstream_expects() -> None:
    described = tensor_to_json(torch.tensor([1.5, -2.0], dtype=torch.bfloat16))
    assert struct.unpack("<2f", base64.b64decode(described["data"])) == (1.5, -2.0)
    assert described["dtype"] == "torch.bfloat16"


def test_the_form_is_that_of_upstream() -> None:
    tensor = torch.tensor([[1.0, 2.0]])
    assert tensor_to_json(tensor) == {
        "type": "tensor",
        "data": base64.b64encode(struct.pack("<2f", 1.0, 2.0)).decode(),
        "shape": [1, 2],
        "dtype": "torch.float32",
    }


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.int64], ids=str)
def test_memory_order_does_not_show(dtype: torch.dtype) -> None:
    tensor = patterned(dtype, 4, 6)
    single, none = tensor[3:, 1::9], tensor[4:, 1::9]
    assert single.stride() == none.stride() == (6, 9)
    for view in (tensor.t(), tensor[:, ::2], tensor[1:3, 2], tensor.expand(2, 4, 6), single, none):
        assert same_bits(through_json(view), view)


def test_lazy_conjugation_and_negation_are_carried_out() -> None:
    conjugated = torch.tensor([1 + 2j, 3 - 4j]).conj()
    negated = conjugated.imag
    assert conjugated.is_conj()
    assert negated.is_neg()
    assert through_json(conjugated).tolist() == [1 - 2j, 3 + 4j]
    assert through_json(negated).tolist() == [-2.0, 4.0]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_gradients_are_left_behind(dtype: torch.dtype) -> None:
    parameter = torch.nn.Parameter(torch.ones(2, dtype=dtype))
    arrived = through_json(parameter)
    assert arrived.tolist() == [1.0, 1.0]
    assert not arrived.requires_grad


def test_a_meta_tensor_stays_one() -> None:
    tensor = torch.empty(2, 3, dtype=torch.bfloat16, device="meta")
    assert tensor_to_json(tensor) == encoded([2, 3], "torch.bfloat16", None)
    arrived = through_json(tensor)
    assert arrived.is_meta
    assert (arrived.dtype, arrived.shape) == (tensor.dtype, tensor.shape)


def test_an_arrived_tensor_is_writable_and_owns_exactly_its_bytes() -> None:
    arrived = through_json(torch.arange(10))
    arrived += 1
    assert arrived.tolist() == list(range(1, 11))
    assert arrived.untyped_storage().nbytes() == 80
    assert through_json(patterned(torch.bfloat16, 7)).untyped_storage().nbytes() == 14


def test_a_payload_of_several_pieces_is_joined_exactly(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(serialization, "_BASE64_CHUNK", 8)
    for nbytes in range(20):
        tensor = patterned(torch.uint8, nbytes, seed=nbytes)
        assert same_bits(through_json(tensor), tensor)
    with pytest.raises(ValueError, match="bad base64 near character 8 of 24"):
        tensor_from_json(encoded([18], data="AAAAAAAA" + "AAA=AAAA" + "AAAAAAAA"))


@pytest.mark.parametrize(
    "tensor",
    [
        torch.empty(2, dtype=torch.uint4),
        torch.empty(2, dtype=torch.float4_e2m1fn_x2),
        torch.ones(2, 2).to_sparse(),
        torch.empty((1,) * 65),
    ],
    ids=["uint4", "float4", "sparse", "rank 65"],
)
def test_other_tensors_are_refused_before_anything_is_sent(tensor: torch.Tensor) -> None:
    with pytest.raises(TypeError, match="travel"):
        serialize_value({"fine": torch.ones(1), "not": [tensor]})


@pytest.mark.parametrize(
    ("described", "message"),
    [
        ("text", "not a tensor: 'text'"),
        ({"type": "ndarray", "data": "", "shape": [0], "dtype": "<f4"}, "not a tensor"),
        (encoded([3], "torch.float12"), "'torch.float12' is not a dtype"),
        (encoded([3], "torch.Tensor"), "'torch.Tensor' is not a dtype"),
        (encoded([3], 7), "7 is not a dtype"),
        (encoded(3), "a shape is a list of at most 64 lengths, not 3"),
        (encoded([1] * 65), "a list of at most 64"),
        (encoded([-3]), "-3 is not a length"),
        (encoded([True, 3]), "True is not a length"),
        (encoded([3.0]), "3.0 is not a length"),
        (encoded([2**62, 4]), "exceeds 9,223,372,036,854,775,807 bytes"),
        (encoded([0, 2**63]), "exceeds"),
        (encoded([2**61], "torch.float32", None), "exceeds"),
        (encoded([4]), "4 bytes need 8 characters of base64, got 4 characters"),
        (encoded([10**15]), "1,000,000,000,000,000 bytes need"),
        (encoded([3], data=[0, 0, 0]), "3 bytes need 4 characters of base64, got list"),
        (encoded([3], data="A*AA"), "bad base64"),
        (encoded([3], data="AAA="), "bad base64"),
        (encoded([2], data="AAAA"), "bad base64"),
        (encoded([3], data="Aé=="), "bad base64"),
    ],
)
def test_a_broken_tensor_is_a_value_error_that_says_what_is_wrong(described: object, message: str) -> None:
    with pytest.raises(ValueError, match=message.replace("*", r"\*")):
        tensor_from_json(described)


def test_the_base64_length_is_checked_before_the_payload_is_allocated(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "empty", lambda *_, **__: pytest.fail("allocated"))
    with pytest.raises(ValueError, match="characters of base64"):
        tensor_from_json(encoded([1 << 40], data="AAAA"))


def test_raw_bytes_of_a_dense_host_tensor_are_not_copied() -> None:
    tensor = torch.arange(4)
    view = serialization.host_bytes(tensor)
    tensor[0] = 77
    assert bytes(view) == raw_bytes(tensor)
