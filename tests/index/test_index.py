from __future__ import annotations

from collections import deque

import pytest
import torch

from gpu_cache.config import MutationPolicy
from gpu_cache.device.modes import plain_tensors
from gpu_cache.index.entry import Entry, State
from gpu_cache.index.index import ShardIndex
from gpu_cache.index.mutation import Mutations
from gpu_cache.pool.block import Copy
from gpu_cache.pool.lease import Lease, carve

KEYS = "abcdef"


def index_of(held: set[int] | None = None) -> ShardIndex:
    """An index whose bases are never held but those whose ids are in `held`."""
    return ShardIndex(lambda base, num_loans: id(base) in (held or set()))


def landing(entry: Entry, nbytes: int = 8) -> tuple[Entry, Copy]:
    return entry, Copy(entry.key, torch.zeros(nbytes, dtype=torch.uint8), None, nbytes)


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
    assert second.joined["a"].flight.landed is not None
    assert second.joined["a"].flight.landed.done()
    assert second.joined["a"] is first.claimed["a"]
    third = index.claim(["a"])
    assert list(third.hits) == ["a"]
    stats = index.stats()
    assert (stats["hits"], stats["joined"], stats["misses"], stats["requested"]) == (1, 1, 2, 4)
    assert (stats["hit_bytes"], stats["joined_bytes"], stats["miss_bytes"]) == (8, 8, 8)


def test_a_hit_is_an_alias_made_in_the_look_up_itself() -> None:
    index = index_of()
    (entry,) = cached(index, "a")
    assert entry.copy is not None
    tensor = index.claim(["a"]).hits["a"]
    assert tensor is not entry.copy.base
    assert tensor.data_ptr() == entry.copy.base.data_ptr()


def test_a_clear_wins_over_a_fetch_under_way() -> None:
    index = index_of()
    (entry,) = index.claim(["a"]).claimed.values()
    joined = index.claim(["a"]).joined["a"]
    assert index.remove(["a"]) == []
    index.publish([landing(entry)], "n:1", None)
    assert "a" not in index
    assert joined.copy is not None, "who waited gets it all the same"
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
    assert joined.flight.landed is not None
    assert joined.flight.landed.done()
    assert str(joined.error) == "gone"
    assert index.is_empty
    assert index.stats()["fetch_errors"] == 1
    assert list(index.claim(["a"]).claimed) == ["a"]


def test_a_shard_that_arrives_after_an_abort_is_not_cached() -> None:
    index = index_of()
    (entry,) = index.claim(["a"]).claimed.values()
    index.abort([entry], TimeoutError("late"))
    index.publish([landing(entry)], "n:1", None)
    assert entry.copy is None
    assert "a" not in index


def test_delivered_shards_reach_the_waiting_but_not_the_index() -> None:
    index = index_of()
    (entry,) = index.claim(["a"]).claimed.values()
    joined = index.claim(["a"]).joined["a"]
    index.deliver([landing(entry)], "n:1", None)
    assert joined.copy is entry.copy is not None
    assert index.is_empty
    assert (index.stats()["overflows"], index.stats()["overflow_bytes"]) == (1, 8)


def test_entries_that_no_reader_holds_may_go_the_least_recently_used_first() -> None:
    held: set[int] = set()
    index = index_of(held)
    entries = {entry.key: entry for entry in cached(index, "a", "b", "c", "d")}
    assert entries["b"].copy is not None
    held.add(id(entries["b"].copy.base))
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
        assert entries[1].copy is not None
        held.add(id(entries[1].copy.base))
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


def test_a_shard_that_a_joiner_has_yet_to_hand_out_is_no_victim() -> None:
    """Moved to the host tier, it would be handed out there."""
    index = index_of()
    claim, joining = index.claim(["a"]), index.claim(["a"])
    index.publish([landing(claim.claimed["a"])], "n:1", None)
    index.release(claim.claimed.values())
    assert index.candidates() == []
    index.release(joining.joined.values())
    assert len(index.candidates()) == 1


def test_a_rising_shard_is_no_victim_before_all_waiters_have_it() -> None:
    index, _ = tiered_index()
    claim, joining = index.claim(["a"]), index.claim(["a"])
    index.publish([landing(claim.claimed["a"])], "", None)
    index.release(claim.claimed.values())
    assert [one.entry.key for one in index.candidates()] == ["b"]
    index.release(joining.joined.values())
    assert sorted(str(one.entry.key) for one in index.candidates()) == ["a", "b"]


def test_a_written_or_held_shard_is_not_kept_below() -> None:
    held: set[int] = set()
    index = index_of(held)
    below = index.add_level()
    written, handed_out, sound = cached(index, "a", "b", "c")
    victims = index.candidates(held=True)
    assert written.copy is not None
    assert handed_out.copy is not None
    written.copy.base.add_(1)
    held.add(id(handed_out.copy.base))
    refuges = {key: refuge(key) for key in "abc"}
    assert index.evict(victims, refuges, held=True)
    assert [below.has(key) for key in "abc"] == [False, False, True]
    assert sound.copy is refuges["c"]


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
    assert (stats["clears"], stats["outlived_entries"], stats["outlived_bytes"]) == (2, 1, 512)
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
    index = ShardIndex(lambda base, num_loans: False, lambda: now[0])
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
        base, twin, lease = carve(arena.untyped_storage(), 0, 8, arena, (8,), freed.append)
    del twin
    lease.key = "a"
    index.publish([(entry, Copy("a", base, lease, 8))], "n:1", None)
    base.share_memory_()
    assert list(freed) == [lease]
    index.forget_dead([lease])
    assert "a" not in index


@pytest.mark.parametrize("count", [0, 3])
def test_repr_counts_entries(count: int) -> None:
    index = index_of()
    cached(index, *KEYS[:count])
    index.claim(["z"])
    assert repr(index) == f"ShardIndex({count} ready, 1 pending, {8 * count} bytes)"


def refuge(key: str) -> Copy:
    """A copy of a shard at the level below."""
    return Copy(key, torch.ones(8, dtype=torch.uint8), None, 8)


def tiered_index(index: ShardIndex | None = None) -> tuple[ShardIndex, ShardIndex]:
    """An index whose "a" is at the level below, and that level."""
    index = index_of() if index is None else index
    below = index.add_level()
    cached(index, "a", "b")
    assert index.evict(index.candidates()[:1], {"a": refuge("a")})
    return index, below


def test_a_shard_below_is_copied_by_one_call_and_joined_by_others() -> None:
    index, below = tiered_index()
    assert below.has("a")
    first, second = index.claim(["a", "b"]), index.claim(["a"])
    assert (list(first.claimed), list(first.hits), list(second.joined)) == (["a"], ["b"], ["a"])
    (low,) = first.below.values()
    assert low.generation == first.claimed["a"].generation
    assert below.candidates() == [], "it is being copied from"
    assert index.publish([landing(first.claimed["a"])], "", None) == [low]
    assert (below.has("a"), index.has("a")) == (False, True)
    assert list(index.claim(["a"]).hits) == ["a"]
    assert second.joined["a"].copy is not None
    stats = index.stats()
    assert (stats["host_hits"], stats["hits"], stats["joined"], stats["misses"]) == (1, 2, 1, 2)
    assert (stats["hit_bytes"], stats["joined_bytes"], stats["fetch_bytes"]) == (24, 8, 16)
    assert (index.report()["device_entries"], index.report()["host_entries"]) == (2, 0)


def test_the_lower_level_hands_out_shards_of_both_levels() -> None:
    index, below = tiered_index()
    rising = index.claim(["a", "c"])
    found = below.claim(["a", "b", "c", "d"])
    assert list(found.hits) == ["a", "b"]
    assert found.joined == {"c": rising.claimed["c"]}
    assert list(found.claimed) == ["d"]
    follower = index.claim(["d"])
    assert (list(follower.claimed), follower.below) == (["d"], {"d": found.claimed["d"]})
    assert list(below.claim(["d"]).joined.values()) == [found.claimed["d"]], "not its copy"
    stats = index.stats()
    assert (stats["hits"], stats["host_hits"], stats["joined"], stats["misses"]) == (1, 2, 3, 4)


def test_a_following_shard_rises_when_it_landed_unless_it_is_awaited_below() -> None:
    index, below = tiered_index()
    for key, is_awaited in (("c", True), ("d", False)):
        coming = below.claim([key])
        follower = index.claim([key])
        below.publish([landing(coming.claimed[key])], "n:1", None)
        assert below.has(key)
        if not is_awaited:
            below.release(coming.claimed.values())
        index.publish([landing(follower.claimed[key])], "", None)
        assert (index.has(key), below.has(key)) == (not is_awaited, is_awaited)
        assert follower.claimed[key].copy is not None
    assert index.report()["host_entries"] == 2
    assert [entry.key for entry in index.remove_node("n:1")] == ["b", "d", "a", "c"]
    assert index.report()["host_entries"] == 0
    assert (index.report()["host_cleared"], index.report()["cleared"]) == (2, 4)


def test_a_clear_wins_over_a_rising_shard() -> None:
    index, below = tiered_index()
    (entry,) = index.claim(["a"]).claimed.values()
    assert [one.key for one in index.remove(["a"])] == ["a"]
    assert index.publish([landing(entry)], "", None) == []
    assert entry.copy is not None, "who waited gets it all the same"
    assert "a" not in index
    cached(index, "a")
    assert index.keys() == ["b", "a"]
    assert not below.has("a")


def test_a_clear_wins_over_a_following_shard() -> None:
    index, below = tiered_index()
    coming, follower = below.claim(["c"]), index.claim(["c"])
    assert index.remove_node(None) != []
    below.publish([landing(coming.claimed["c"])], "n:1", None)
    index.publish([landing(follower.claimed["c"])], "", None)
    assert index.keys() == []
    assert index.is_empty


@pytest.mark.parametrize("policy", ["refetch", "ignore"])
def test_a_write_while_it_rises_harms_only_the_calls_that_wait(policy: MutationPolicy) -> None:
    index, below = tiered_index(ShardIndex(lambda base, num_loans: False, mutations=Mutations(policy)))
    claim = index.claim(["a"])
    low = claim.below["a"]
    assert low.copy is not None
    low.copy.base.add_(1)
    is_ignored = policy == "ignore"
    if not is_ignored:
        assert index.publish([landing(claim.claimed["a"])], "", None) == []
        assert (below.has("a"), index.has("a")) == (True, False)
        assert list(index.claim(["a"]).claimed) == ["a"], "from a source"
    again = index.claim(["a"])
    assert (list(again.joined), list(again.below)) == (["a"], [])
    assert index.publish([landing(claim.claimed["a"])], "", None) == ([low] if is_ignored else [])
    assert (below.has("a"), index.has("a")) == (False, is_ignored)


def test_a_shard_that_could_not_rise_stays_below() -> None:
    index, below = tiered_index()
    for give_up in ("abort", "deliver"):
        (entry,) = index.claim(["a"]).claimed.values()
        if give_up == "abort":
            index.abort([entry], RuntimeError("no"))
        else:
            index.deliver([landing(entry)], "", None)
        assert below.has("a")
        assert index.missing(["a"]) == ["a"]
        assert below.missing(["a"]) == []
    assert [one.entry.key for one in below.candidates()] == ["a"]
    assert below.evict(below.candidates())
    assert index.keys() == ["b"]
    assert index.report()["host_evictions"] == 1
