from __future__ import annotations

import itertools

from hypothesis import given, settings
from hypothesis import strategies as st

from gpu_cache.pool.eviction import Layout, Plan, Span, choose

BLOCK = 512


def layout(*free: Span, slabs: int = 1, slab_bytes: int = 8 * BLOCK, growth_bytes: int = 0) -> Layout:
    return Layout(dict.fromkeys(range(slabs), slab_bytes), free, growth_bytes)


def blocks(*numbers: int, slab: int = 0) -> list[Span]:
    """Blocks of one unit by their places in a slab, the least recently used first."""
    return [Span(slab, number * BLOCK, BLOCK) for number in numbers]


def test_victims_are_neighbours_and_nothing_goes_that_leaves_a_hole() -> None:
    assert choose(2 * BLOCK, blocks(0, 4, 7, 5, 1), layout()) == Plan([1, 3], 2 * BLOCK)


def test_a_run_goes_as_a_whole() -> None:
    order = [block for slab in (1, 0) for block in blocks(*range(8), slab=slab)]
    assert choose(4 * BLOCK, order, layout(slabs=2)) == Plan([0, 1, 2, 3], 4 * BLOCK)


def test_free_ranges_beside_a_victim_count() -> None:
    free = Span(0, 0, 2 * BLOCK)
    assert choose(3 * BLOCK, blocks(5, 2, 3), layout(free)) == Plan([1], 3 * BLOCK)
    assert choose(2 * BLOCK, blocks(5, 2, 3), layout(free)) == Plan([], 2 * BLOCK)


def test_no_block_goes_if_all_of_them_make_no_room() -> None:
    assert choose(3 * BLOCK, blocks(0, 1, 3, 5, 6), layout()) == Plan(None, 2 * BLOCK)
    assert choose(BLOCK, [], layout()) == Plan(None, 0)


def test_whole_slabs_make_way_for_a_run_longer_than_they_are() -> None:
    order = [block for slab in (2, 0, 1) for block in blocks(*range(8), slab=slab)]
    plan = choose(15 * BLOCK, order, layout(slabs=3))
    assert plan.victims == list(range(16)), "the slabs 2 and 0"
    assert choose(15 * BLOCK, order, layout(slabs=3, growth_bytes=7 * BLOCK)).victims == list(range(8))
    assert choose(25 * BLOCK, order, layout(slabs=3)) == Plan(None, 24 * BLOCK)


@given(st.data())
@settings(max_examples=300, deadline=None)
def test_a_plan_makes_room_or_there_is_none(data: st.DataObject) -> None:
    num_slabs, slab_units = data.draw(st.integers(1, 3)), 12
    cuts = [sorted({0, slab_units, *data.draw(st.lists(st.integers(1, 11), max_size=8))}) for _ in range(num_slabs)]
    spans = [
        Span(slab, begin * BLOCK, (end - begin) * BLOCK)
        for slab, cut in enumerate(cuts)
        for begin, end in itertools.pairwise(cut)
    ]
    kinds = [data.draw(st.sampled_from(["free", "block", "held"])) for _ in spans]
    free = [span for span, kind in zip(spans, kinds, strict=True) if kind == "free"]
    order = data.draw(st.permutations([span for span, kind in zip(spans, kinds, strict=True) if kind == "block"]))
    needed = data.draw(st.integers(1, 24)) * BLOCK
    plan = choose(needed, order, layout(*free, slabs=num_slabs, slab_bytes=slab_units * BLOCK))
    all_room = room_of([*free, *order], num_slabs, slab_units * BLOCK)
    assert (plan.victims is not None) == (all_room >= needed)
    if plan.victims is None:
        assert plan.most_bytes == all_room
        return
    went = [order[number] for number in plan.victims]
    assert room_of([*free, *went], num_slabs, slab_units * BLOCK) >= needed
    older = order[: max(plan.victims, default=0)]
    assert room_of([*free, *older], num_slabs, slab_units * BLOCK) < needed or not went, "no younger one than it takes"


def room_of(spans: list[Span], num_slabs: int, slab_bytes: int) -> int:
    """The longest run that fits these bytes, by trying; whole slabs may make way together."""
    longest = empty = 0
    for slab in range(num_slabs):
        is_free = bytearray(slab_bytes // BLOCK)
        for span in spans:
            if span.slab == slab:
                is_free[span.start // BLOCK : (span.start + span.nbytes) // BLOCK] = b"\1" * (span.nbytes // BLOCK)
        longest = max(longest, *(len(stretch) * BLOCK for stretch in bytes(is_free).split(b"\0")))
        empty += slab_bytes * all(is_free)
    return max(longest, empty)
