from __future__ import annotations

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import Bundle, RuleBasedStateMachine, consumes, invariant, multiple, rule

from gpu_cache.freelist import FreeList, bin_of

CAPACITY = 4096


class FreeListAgainstBytes(RuleBasedStateMachine):
    """The list against a map of which byte belongs to which range."""

    taken = Bundle("taken")

    def __init__(self) -> None:
        super().__init__()
        self.free = FreeList(CAPACITY)
        self.owner = bytearray(CAPACITY)  # 1: taken

    @rule(target=taken, nbytes=st.integers(1, CAPACITY))
    def take(self, nbytes: int) -> object:
        longest = max(map(len, bytes(self.owner).split(b"\x01")))
        start = self.free.take(nbytes)
        assert (start is not None) == (nbytes <= longest), "a fitting range must be found"
        if start is None:
            return multiple()
        assert not any(self.owner[start : start + nbytes]), "two owners"
        self.owner[start : start + nbytes] = b"\x01" * nbytes
        return (start, nbytes)

    @rule(target=taken, block=consumes(taken), share=st.floats(0.01, 0.99))
    def give_the_front(self, block: tuple[int, int], share: float) -> object:
        start, nbytes = block
        front = max(1, int(nbytes * share))
        self._give(start, front)
        return (start + front, nbytes - front) if nbytes > front else multiple()

    @rule(block=consumes(taken))
    def give_all(self, block: tuple[int, int]) -> None:
        self._give(*block)

    def _give(self, start: int, nbytes: int) -> None:
        self.free.give(start, nbytes)
        self.owner[start : start + nbytes] = bytes(nbytes)

    @invariant()
    def knows_what_is_free(self) -> None:
        gaps = bytes(self.owner).split(b"\x01")
        assert self.free.free_bytes == sum(map(len, gaps))
        assert self.free.largest_free_bytes == max(map(len, gaps))
        assert self.free.is_empty == (not any(self.owner))

    @invariant()
    def has_coalesced(self) -> None:
        gaps = [gap for gap in bytes(self.owner).split(b"\x01") if gap]
        assert sorted(self.free._size_at.values()) == sorted(map(len, gaps))


TestFreeList = FreeListAgainstBytes.TestCase
TestFreeList.settings = settings(max_examples=80, stateful_step_count=60, deadline=None)


def test_bins_ascend_with_length() -> None:
    bins = [bin_of(nbytes) for nbytes in range(1, 5000)]
    assert bins == sorted(bins)
    assert bin_of(1 << 40) - bin_of(1 << 39) == 8


def test_a_run_can_be_given_back_shard_by_shard() -> None:
    free = FreeList(1 << 20)
    start = free.take(64 * 512)
    assert start is not None
    for number in (*range(0, 64, 2), *range(1, 64, 2)):
        free.give(start + number * 512, 512)
    assert free.is_empty
    assert free.take(1 << 20) == 0


@pytest.mark.parametrize(("start", "nbytes"), [(0, 512), (512, 512), (-512, 512), (1024, 512), (512, 0)])
def test_giving_back_twice_or_outside_is_refused(start: int, nbytes: int) -> None:
    free = FreeList(1024)
    with pytest.raises(ValueError, match="given back twice, or outside 1,024"):
        free.give(start, nbytes)
    assert free.free_bytes == 1024
