from __future__ import annotations

from collections import deque

import pytest
import torch

from gpu_cache.device.modes import plain_tensors
from gpu_cache.index.entry import Entry, Parked, State
from gpu_cache.index.index import ShardIndex
from gpu_cache.pool.block import Landing
from gpu_cache.pool.lease import Lease, aliases_of, carve

KEYS = "abcdef"


def index_of(held: set[int] | None = None) -> ShardIndex:
    """An index whose bases are never held but those whose ids are in `held`."""
    return ShardIndex(aliases_of, lambda base: id(base) in (held or set()))


def landing(entry: Entry, nbytes: int = 8) -> tuple[Entry, Landing]:
    return entry, Landing(entry.key, torch.zeros(nbytes, dtype=torch.uint8), None, nbytes)


def cached(index: ShardIndex, *keys: str, node: str = "n:1", nbytes: int = 8) -> list[Entry]:
    entries = list(index.claim(keys).claimed.values())
    index.publish([landing(entry, nbytes) for entry in entries], node, None)
    index.release(entries)
    return entries


def test_a_key_is_claimed_then_joined_then_hit() -> None:
    index = index_of()
    first = index.claim(["a"])
    second = index.claim(["a", "b"])
    assert (list(first.claimed), list(second.joined), list(second.claimed)) == (["a"], ["a"], ["b"])
    index.publish([landing(first.claimed["a"])], "n:1", None)
    assert second.joined["a"].flight is not None
    assert second.joined["a"].flight.done()
    assert second.joined["a"] is first.claimed["a"]
    third = index.claim(["a"])
    assert list(third.hits) == ["a"]
    stats = index.stats()
    assert (stats["hits"], stats["joined"], stats["misses"], stats["requested"]) == (1, 1, 2, 4)
    assert (stats["hit_bytes"], stats["joined_bytes"], stats["miss_bytes"]) == (8, 8, 8)


def test_a_hit_is_an_alias_made_in_the_look_up_itself() -> None:
    index = index_of()
    (entry,) = cached(index, "a")
    assert entry.base is not None
    tensor = index.claim(["a"]).hits["a"]
    assert tensor is not entry.base
    assert tensor.data_ptr() == entry.base.data_ptr()


def test_a_clear_wins_over_a_fetch_under_way() -> None:
    index = index_of()
    (entry,) = index.claim(["a"]).claimed.values()
    joined = index.claim(["a"]).joined["a"]
    assert index.remove(["a"]) == []
    index.publish([landing(entry)], "n:1", None)
    assert "a" not in index
    assert joined.base is not None, "who waited gets it all the same"
    assert entry.state is State.GONE
    assert index.is_empty


def test_a_cleared_and_refetched_key_is_another_generation() -> None:
    index = index_of()
    (old,) = index.claim(["a"]).claimed.values()
    index.remove(["a"])
    (new,) = index.claim(["a"]).claimed.values()
    assert new.generation > old.generation
    index.publish([landing(old)], "n:1", None)
    assert "a" not in index
    index.abort([old], RuntimeError("too late"))
    index.publish([landing(new)], "n:1", None)
    assert "a" in index


def test_an_abort_wakes_the_waiting_and_leaves_nothing() -> None:
    index = index_of()
    (entry,) = index.claim(["a"]).claimed.values()
    joined = index.claim(["a"]).joined["a"]
    index.abort([entry], RuntimeError("gone"))
    assert joined.flight is not None
    assert joined.flight.done()
    assert str(joined.error) == "gone"
    assert index.is_empty
    assert index.stats()["fetch_errors"] == 1
    assert list(index.claim(["a"]).claimed) == ["a"]


def test_a_shard_that_arrives_after_an_abort_is_not_cached() -> None:
    index = index_of()
    (entry,) = index.claim(["a"]).claimed.values()
    index.abort([entry], TimeoutError("late"))
    index.publish([landing(entry)], "n:1", None)
    assert entry.base is None
    assert "a" not in index


def test_delivered_shards_reach_the_waiting_but_not_the_index() -> None:
    index = index_of()
    (entry,) = index.claim(["a"]).claimed.values()
    joined = index.claim(["a"]).joined["a"]
    index.deliver([landing(entry)], "n:1", None)
    assert joined.base is entry.base is not None
    assert index.is_empty
    assert (index.stats()["overflows"], index.stats()["overflow_bytes"]) == (1, 8)


def test_entries_that_no_reader_holds_may_go_the_least_recently_used_first() -> None:
    held: set[int] = set()
    index = index_of(held)
    entries = {entry.key: entry for entry in cached(index, "a", "b", "c", "d")}
    held.add(id(entries["b"].base))
    index.claim(["a"])
    index.find("c")
    found = index.candidates()
    assert [one.entry.key for one in found] == ["d", "a", "c"]
    assert index.evict(found[:2])
    assert index.keys() == ["b", "c"]
    assert (index.stats()["evictions"], index.stats()["evicted_bytes"]) == (2, 16)


@pytest.mark.parametrize("what", ["held", "cleared", "refetched"])
def test_no_victim_goes_if_one_may_not(what: str) -> None:
    held: set[int] = set()
    index = index_of(held)
    entries = cached(index, "a", "b")
    victims = index.candidates()
    if what == "held":
        held.add(id(entries[1].base))
    else:
        index.remove(["b"])
    if what == "refetched":
        cached(index, "b")
    assert not index.evict(victims)
    assert "a" in index
    assert index.stats()["evictions"] == 0


def test_an_entry_that_its_call_has_yet_to_hand_out_is_no_victim() -> None:
    index = index_of()
    claim = index.claim(["a"])
    index.publish([landing(claim.claimed["a"])], "n:1", None)
    assert index.candidates() == []
    index.release(claim.claimed.values())
    assert [one.entry for one in index.candidates()] == list(claim.claimed.values())


def test_an_entry_that_a_joiner_has_yet_to_hand_out_is_no_victim() -> None:
    """Moved to the host tier, it would have no tensor to hand out."""
    index = index_of()
    claim, joining = index.claim(["a"]), index.claim(["a"])
    index.publish([landing(claim.claimed["a"])], "n:1", None)
    index.release(claim.claimed.values())
    assert index.candidates() == []
    index.release(joining.joined.values())
    assert len(index.candidates()) == 1


def test_an_entry_brought_back_is_no_victim_before_all_waiters_have_it() -> None:
    index, _ = parked_index()
    claim, joining = index.claim(["a"]), index.claim(["a"])
    index.publish([landing(claim.claimed["a"])], "", None)
    index.release(claim.claimed.values())
    assert [one.entry.key for one in index.candidates()] == ["b"]
    index.release(joining.joined.values())
    assert sorted(str(one.entry.key) for one in index.candidates()) == ["a", "b"]


def test_a_copy_of_what_was_written_to_or_is_held_is_no_refuge() -> None:
    held: set[int] = set()
    index = index_of(held)
    written, handed_out, sound = cached(index, "a", "b", "c")
    victims = index.candidates(held=True)
    assert written.base is not None
    assert handed_out.base is not None
    written.base.add_(1)
    held.add(id(handed_out.base))
    refuges = {key: Parked(torch.ones(8, dtype=torch.uint8), object(), None, 0) for key in "abc"}
    assert index.evict(victims, refuges, held=True)
    assert [index.is_parked(key) for key in "abc"] == [False, False, True]
    assert sound.parked is refuges["c"]


def test_clearing_a_node_leaves_the_others() -> None:
    index = index_of()
    cached(index, "a", "b", node="n:1")
    cached(index, "c", node="n:2")
    assert [entry.key for entry in index.remove(["a", "c", "unknown"], "n:1")] == ["a"]
    assert [entry.key for entry in index.remove_node("n:1")] == ["b"]
    assert index.keys() == ["c"]
    assert (index.stats()["cleared"], index.stats()["cleared_bytes"]) == (2, 16)


def test_clears_between_two_fetches_are_one() -> None:
    index = index_of()
    cached(index, "a", "b", "stays")
    index.remove(["a"])
    index.remove(["b"])
    assert index.stats()["clears"] == 1
    assert index.stats()["outlived_entries"] == 0
    cached(index, "c")
    index.remove(["c"])
    stats = index.stats()
    assert (stats["clears"], stats["outlived_entries"], stats["outlived_bytes"]) == (2, 1, 8)
    index.remove(["stays"])
    assert index.stats()["outlived_entries"] == 0


def test_a_reserved_key_counts_as_no_look_up() -> None:
    index = index_of()
    entry = index.reserve("a")
    assert entry is not None
    assert index.reserve("a") is None
    index.publish([landing(entry)], "", None)
    stats = index.stats()
    assert (stats["requested"], stats["fetch_bytes"], stats["num_entries"]) == (0, 0, 1)


def test_the_oldest_entry_has_an_age() -> None:
    now = [10.0]
    index = ShardIndex(aliases_of, lambda base: False, lambda: now[0])
    assert index.stats()["oldest_entry_age_seconds"] == 0.0
    cached(index, "a")
    now[0] = 12.5
    cached(index, "b")
    index.claim(["a"])
    assert index.stats()["oldest_entry_age_seconds"] == 2.5
    index.remove(["a"])
    assert index.stats()["oldest_entry_age_seconds"] == 0.0


def test_a_closed_index_keeps_nothing() -> None:
    index = index_of()
    cached(index, "a")
    (late,) = index.claim(["b"]).claimed.values()
    assert [entry.key for entry in index.close()] == ["a"]
    (later,) = index.claim(["c"]).claimed.values()
    index.publish([landing(late), landing(later)], "n:1", None)
    assert index.is_closed
    assert index.is_empty
    assert (late.state, later.state) == (State.GONE, State.GONE)


def test_a_block_that_died_under_its_entry_takes_the_entry_along() -> None:
    index, freed, arena = index_of(), deque[Lease](), torch.zeros(64, dtype=torch.uint8)
    (entry,) = index.claim(["a"]).claimed.values()
    with plain_tensors():
        base, lease = carve(arena.untyped_storage(), 0, 8, arena, (8,), freed)
    lease.key = "a"
    index.publish([(entry, Landing("a", base, lease, 8))], "n:1", None)
    base.share_memory_()
    assert list(freed) == [lease]
    index.forget_dead([lease])
    assert "a" not in index


@pytest.mark.parametrize("count", [0, 3])
def test_repr_shows_what_is_there(count: int) -> None:
    index = index_of()
    cached(index, *KEYS[:count])
    index.claim(["z"])
    assert repr(index) == f"ShardIndex({count} ready, 1 pending, {8 * count} bytes)"


def parked_index() -> tuple[ShardIndex, Parked]:
    """An index whose "a" is in the host tier."""
    index = index_of()
    cached(index, "a", "b")
    refuge = Parked(torch.ones(8, dtype=torch.uint8), object(), None, 0)
    assert index.evict(index.candidates()[:1], {"a": refuge})
    return index, refuge


def test_a_parked_entry_is_brought_back_by_one_call_and_joined_by_others() -> None:
    index, refuge = parked_index()
    assert index.is_parked("a")
    first, second = index.claim(["a", "b"]), index.claim(["a"])
    assert (list(first.claimed), list(first.hits), list(second.joined)) == (["a"], ["b"], ["a"])
    assert first.claimed["a"].origin is refuge
    assert index.candidates(parked=True) == [], "it is being copied from"
    assert index.publish([landing(first.claimed["a"])], "", None) == [refuge]
    assert not index.is_parked("a")
    assert list(index.claim(["a"]).hits) == ["a"]
    assert second.joined["a"].base is not None
    stats = index.stats()
    assert (stats["host_hits"], stats["hits"], stats["joined"], stats["misses"]) == (1, 2, 1, 2)
    assert (stats["hit_bytes"], stats["joined_bytes"], stats["fetch_bytes"]) == (24, 8, 16)
    assert (index.report()["device_entries"], index.report()["host_entries"]) == (2, 0)


def test_a_clear_wins_over_what_is_being_brought_back() -> None:
    index, refuge = parked_index()
    (entry,) = index.claim(["a"]).claimed.values()
    assert [one.key for one in index.remove(["a"])] == ["a"]
    assert index.publish([landing(entry)], "", None) == [refuge]
    assert entry.base is not None, "who waited gets it all the same"
    assert "a" not in index
    cached(index, "a")
    assert index.keys() == ["b", "a"]


def test_an_entry_that_could_not_be_brought_back_stays_in_the_tier() -> None:
    index, refuge = parked_index()
    for give_up in ("abort", "deliver"):
        (entry,) = index.claim(["a"]).claimed.values()
        if give_up == "abort":
            index.abort([entry], RuntimeError("no"))
        else:
            assert index.deliver([landing(entry)], "", None) == [refuge]
        assert index.is_parked("a")
        assert index.missing(["a"]) == ["a"]
    assert [one.entry.key for one in index.candidates(parked=True)] == ["a"]
    assert index.evict(index.candidates(parked=True), parked=True)
    assert index.keys() == ["b"]
    assert index.report()["host_evictions"] == 1
