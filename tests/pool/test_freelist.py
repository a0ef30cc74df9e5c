from __future__ import annotations

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import Bundle, RuleBasedStateMachine, consumes, invariant, multiple, rule

from gpu_cache.pool.freelist import FreeList, bin_of

CAPACITY = 4096


class FreeListAgainstBytes(RuleBasedStateMachine):
    """The list against a map of which byte is taken."""

    taken = Bundle("taken")

    def __init__(self) -> None:
        super().__init__()
        self.free = FreeList(CAPACITY)
        self.owner = bytearray(CAPACITY)  # 1: taken

    @property
    def gaps(self) -> dict[int, int]:
        """Where free bytes begin, and how many follow one another."""
        found, at = {}, 0
        for gap in bytes(self.owner).split(b"\x01"):
            if gap:
                found[at] = len(gap)
            at += len(gap) + 1
        return found

    @rule(target=taken, more=st.integers(-3, 3))
    def take_about_the_longest(self, more: int) -> object:
        return self.take(max(1, max(self.gaps.values(), default=0) + more))

    @rule(target=taken, nbytes=st.one_of(st.integers(1, CAPACITY), st.integers(1, CAPACITY // 8)))
    def take_some(self, nbytes: int) -> object:
        return self.take(nbytes)

    def take(self, nbytes: int) -> object:
        longest = max(self.gaps.values(), default=0)
        start = self.free.take(nbytes)
        assert (start is not None) == (nbytes <= longest), "a fitting range must be found"
        if start is None:
            return multiple()
        assert start >= 0
        assert start + nbytes <= CAPACITY
        assert not any(self.owner[start : start + nbytes]), "two owners"
        self.owner[start : start + nbytes] = b"\x01" * nbytes
        return (start, nbytes)

    @rule(target=taken, block=consumes(taken), cuts=st.tuples(st.floats(0, 1), st.floats(0, 1)))
    def give_a_part(self, block: tuple[int, int], cuts: tuple[float, float]) -> object:
        start, nbytes = block
        begin, end = sorted(start + int(nbytes * cut) for cut in cuts)
        if begin == end:
            return multiple(block)
        self._give(begin, end - begin)
        return multiple(*[(at, to - at) for at, to in ((start, begin), (end, start + nbytes)) if to > at])

    @rule(block=consumes(taken))
    def give_all(self, block: tuple[int, int]) -> None:
        self._give(*block)

    @rule(share=st.floats(0, 1))
    def give_what_is_free(self, share: float) -> None:
        for start, nbytes in self.gaps.items():
            cut = int(nbytes * share)
            for begin in (start, start + cut):
                with pytest.raises(ValueError, match="given back twice"):
                    self.free.give(begin, nbytes - cut)

    def _give(self, start: int, nbytes: int) -> None:
        self.free.give(start, nbytes)
        self.owner[start : start + nbytes] = bytes(nbytes)

    @invariant()
    def knows_every_free_byte_and_has_coalesced(self) -> None:
        gaps = self.gaps
        assert self.free._size_at == gaps
        assert self.free._start_of == {start + nbytes: start for start, nbytes in gaps.items()}
        assert self.free.free_bytes == sum(gaps.values()) == CAPACITY - sum(self.owner)
        assert self.free.largest_free_bytes == max(gaps.values(), default=0)
        assert self.free.is_empty == (not any(self.owner))

    @invariant()
    def has_each_range_in_its_bin(self) -> None:
        in_bins = {start: index for index, starts in self.free._bins.items() for start in starts}
        assert in_bins == {start: bin_of(nbytes) for start, nbytes in self.gaps.items()}
        assert self.free._bitmap == sum(1 << index for index in set(in_bins.values()))


TestFreeList = FreeListAgainstBytes.TestCase
TestFreeList.settings = settings(
    max_examples=80, stateful_step_count=60, deadline=None, derandomize=True, database=None
)


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
