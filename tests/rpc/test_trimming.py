"""Trailing padding is cut off a batch, and nothing else."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from gpu_cache.rpc.trimming import trim_padding

MASK = torch.tensor([[1, 1, 0, 0, 0], [1, 1, 1, 0, 0]])


def test_trailing_padding_is_cut_to_the_longest_row() -> None:
    ids = torch.arange(10).view(2, 5)
    batch = trim_padding({"attention_mask": MASK, "input_ids": ids})
    assert torch.equal(batch["attention_mask"], torch.tensor([[1, 1, 0], [1, 1, 1]]))
    assert torch.equal(batch["input_ids"], ids[:, :3])


def test_only_the_sequence_dimension_is_cut() -> None:
    others = {
        "logits": torch.arange(2 * 5 * 7).view(2, 5, 7),
        "square": torch.arange(2 * 5 * 5).view(2, 5, 5),
        "features": torch.arange(2 * 3 * 5).view(2, 3, 5),
        "rewards": torch.arange(2),
        "tokens": torch.arange(5),
        "pixels": torch.arange(4 * 5).view(4, 5),
        "scalar": torch.tensor(5),
    }
    batch = trim_padding({"attention_mask": MASK} | others)
    assert torch.equal(batch["logits"], others["logits"][:, :3])
    assert torch.equal(batch["square"], others["square"][:, :3])
    for name in ("features", "rewards", "tokens", "pixels", "scalar"):
        assert batch[name] is others[name], name


def test_values_that_are_no_tensor_pass() -> None:
    batch = {"attention_mask": MASK, "prompt": "2 5", "nested": {"ids": torch.arange(10).view(2, 5)}, 7: None}
    trimmed = trim_padding(batch)
    assert list(trimmed) == list(batch)
    assert all(trimmed[name] is batch[name] for name in ("prompt", "nested", 7))
    assert batch["attention_mask"] is MASK


def test_padding_on_the_left_is_no_trailing_padding() -> None:
    mask = torch.tensor([[0, 0, 1, 1, 0], [0, 1, 1, 0, 0]])
    assert torch.equal(trim_padding({"attention_mask": mask})["attention_mask"], mask[:, :4])


@pytest.mark.parametrize("dtype", [torch.bool, torch.uint8, torch.int64, torch.float32, torch.bfloat16])
def test_any_kind_of_mask_counts(dtype: torch.dtype) -> None:
    assert trim_padding({"attention_mask": MASK.to(dtype)})["attention_mask"].shape == (2, 3)


def test_a_mask_may_have_more_dimensions() -> None:
    mask = torch.zeros(2, 3, 4, 5)
    mask[1, 2, 0, 1] = 1
    batch = trim_padding({"attention_mask": mask, "ids": torch.arange(10).view(2, 5)})
    assert batch["attention_mask"].shape == (2, 3, 4, 2)
    assert batch["ids"].shape == (2, 2)


def test_a_batch_of_nothing_but_padding_has_no_tokens() -> None:
    batch = trim_padding({"attention_mask": torch.zeros(2, 5), "ids": torch.arange(10).view(2, 5)})
    assert (batch["attention_mask"].shape, batch["ids"].shape) == ((2, 0), (2, 0))


UNCUT: dict[str, dict[Any, Any]] = {
    "no mask": {"ids": torch.arange(10).view(2, 5)},
    "full mask": {"attention_mask": torch.ones(2, 5), "ids": torch.arange(10).view(2, 5)},
    "mask of one dimension": {"attention_mask": torch.tensor([1, 0]), "ids": torch.arange(4).view(2, 2)},
    "mask of none": {"attention_mask": torch.tensor(0)},
    "mask of no tokens": {"attention_mask": torch.zeros(2, 0), "ids": torch.zeros(2, 0)},
    "remote mask": {"attention_mask": MASK.to("meta")},
    "mask that is no tensor": {"attention_mask": [[1, 0]], "ids": torch.arange(2).view(1, 2)},
    "nothing": {},
}


@pytest.mark.parametrize("batch", UNCUT.values(), ids=UNCUT.keys())
def test_where_there_is_nothing_to_cut_the_batch_is_the_same(batch: dict[Any, Any]) -> None:
    assert trim_padding(batch) is batch
