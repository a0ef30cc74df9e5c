"""The soak: a short run passes, and its verdict tells of every kind of leak, wrong byte and stuck operation."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "scripts"))

import soak
from soaking import columns, figures
from soaking.catalogue import NUM_OWNERS, Catalogue
from soaking.consumer import Consumer, World
from soaking.tally import EXPECTED_OF_PREFETCH, Tally
from soaking.verdict import LEAST_SAMPLES, MB, RSS_LIMIT_BYTES, Findings, judge

from gpu_cache import CacheFullError, FetchError
from gpu_cache.rpc import runtime
from gpu_cache.rpc.rtensor import RTensor
from gpu_cache.rpc.shard import ShardFetchError, ShardMissingError
from gpu_cache.rpc.store import ShardStore

pytestmark = pytest.mark.scripts

DEADLINE_S = 120
SEED = 3


def failed(findings: Findings) -> list[str]:
    return [name for name, problem in judge(findings) if problem]


@pytest.fixture(scope="module")
def catalogue() -> Catalogue:
    return Catalogue(SEED)


@pytest.fixture
def world(catalogue: Catalogue) -> Iterator[World]:
    """One whose owners are this process itself."""
    store = runtime.configure(device="cpu", pool_bytes="48MiB", slab_bytes="8MiB").store
    addresses = [f"127.0.0.1:{1 + number}" for number in range(NUM_OWNERS)]
    for number, address in enumerate(addresses):
        store.update(catalogue.owned_by(number))
        runtime.current().add_own_address(address)
    yield World(catalogue, addresses, Tally(), threading.Event())
    store.clear()


def consume(world: World, seconds: float) -> None:
    consumer = Consumer(world, SEED, 0)
    consumer.thread.start()
    time.sleep(seconds)
    world.stopping.set()
    consumer.thread.join(30)
    assert not consumer.thread.is_alive()


# A run.


def test_a_short_run_passes_and_prints_a_line_for_each_period() -> None:
    command = [sys.executable, soak.__file__, "--minutes", "0.05", "--line-seconds", "1", "--device", "cpu"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=DEADLINE_S, env=dict(os.environ))
    assert done.returncode == 0, done.stdout + done.stderr
    lines = done.stdout.splitlines()
    first = lines.index(columns.header())
    assert all(
        name in lines[first] for name in ("elapsed", "ops", "GB", "faults", "RSS MB", "quarant", "threads", "fds")
    )
    assert [line.split()[0] for line in lines[first + 1 : first + 3]] == ["0:01", "0:02"]
    assert lines[-1] == "verdict: all hold"
    assert done.stderr == ""


def test_a_device_that_is_not_there_is_a_usage_error(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        soak.main(["--device", "tpu"])
    assert "--device tpu: not here" in capsys.readouterr().err


# Contents.


def test_a_consumer_expects_the_shards_that_the_owner_keeps(catalogue: Catalogue) -> None:
    owned = {**Catalogue(SEED).owned_by(0), **Catalogue(SEED).owned_by(1)}
    assert [catalogue.fault_in(shard, owned[shard.shard_id]) for shard in catalogue.shards] == [""] * len(owned)
    assert min(shard.nbytes for shard in catalogue.shards) < 50
    assert max(shard.nbytes for shard in catalogue.shards) > 2_000_000


def test_one_wrong_byte_in_one_shard_is_found(world: World, catalogue: Catalogue) -> None:
    shard = catalogue.shards[5]
    wrong = catalogue.owned_by(shard.owner)[shard.shard_id]
    wrong.view(-1).view(torch.uint8)[-1] ^= 1
    runtime.current().store[shard.shard_id] = wrong
    Consumer(world, SEED, 0)._check_and_keep(shard, RTensor.localize(world.handle(shard)))
    assert "1 wrong bytes" in world.tally.wrong[0]
    assert failed(Findings(wrong=world.tally.wrong)) == ["contents"]


def test_a_byte_that_changes_while_it_is_held_is_found(world: World, catalogue: Catalogue) -> None:
    held = RTensor.localize(world.handle(catalogue.shards[7]))
    assert catalogue.fault_in(catalogue.shards[7], held) == ""
    held.view(-1).view(torch.uint8)[-1] ^= 1  # what the reuse of its block would do
    first = catalogue.shards[7].dtype.itemsize
    assert "1 wrong bytes" in catalogue.fault_in(catalogue.shards[7], held.view(-1)[1:], first)


def test_the_contents_of_another_shard_are_found(catalogue: Catalogue) -> None:
    owned = catalogue.owned_by(0)
    alike = [shard for shard in catalogue.shards if shard.owner == 0 and shard.nbytes > 100]
    other = owned[alike[1].shard_id].reshape(-1).view(torch.uint8)[:64].clone()
    taken = owned[alike[0].shard_id]
    taken.view(-1).view(torch.uint8)[:64] = other
    assert "wrong bytes" in catalogue.fault_in(alike[0], taken)


def test_another_dtype_or_shape_is_found(catalogue: Catalogue) -> None:
    shard = next(shard for shard in catalogue.shards if shard.dtype == torch.int16)
    tensor = catalogue.owned_by(shard.owner)[shard.shard_id]
    assert "came as" in catalogue.fault_in(shard, tensor.view(torch.bfloat16))
    assert "came as" in catalogue.fault_in(shard, tensor[None])


def test_a_consumer_uses_everything_and_leaves_nothing(world: World) -> None:
    consume(world, 0.5)
    assert world.tally.checks > 20
    assert failed(Findings(world.tally.wrong, world.tally.stuck, world.tally.unexpected)) == []
    runtime.current().cache.clear()
    assert runtime.current().cache.buffer_stats()["device_bytes"] == 0


def test_a_fault_of_the_library_is_an_unexplained_error(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(RTensor, "to_local", lambda handle: 1 / 0)
    consume(world, 0.5)
    assert "ZeroDivisionError" in world.tally.unexpected[0]
    assert world.tally.errors["ZeroDivisionError"] > 0
    assert failed(Findings(unexpected=world.tally.unexpected)) == ["no unexplained error"]


# The tally.


def test_failures_after_faults_and_clears_are_counted_by_reason() -> None:
    tally = Tally()
    cut = ShardFetchError("Failed to fetch")
    cut.__cause__ = ConnectionResetError()
    with tally.operation("localize", 5):
        raise FetchError("some failed", {"a": ShardMissingError("a"), "b": cut, "c": cut})
    assert tally.error_counts() == {"connection": 1, "missing": 1}
    assert tally.num_operations == 1
    assert not tally.unexpected


def test_only_a_prefetch_may_find_the_pool_full() -> None:
    tally = Tally()
    tally.note_error(CacheFullError(2, 1, 3), EXPECTED_OF_PREFETCH)
    assert not tally.unexpected
    tally.note_error(CacheFullError(2, 1, 3))
    assert "need 2 bytes" in tally.unexpected[0]


def test_an_answer_that_breaks_the_form_is_unexplained() -> None:
    tally = Tally()
    broken = ShardFetchError("Failed to fetch")
    broken.__cause__ = ValueError("bad frame")
    tally.note_error(broken)
    assert "bad frame" in tally.unexpected[0]


def test_an_operation_that_takes_too_long_is_told_once_and_with_its_place() -> None:
    tally, going_on = Tally(), threading.Event()

    def wait() -> None:
        with tally.operation("localize", 0.01):
            going_on.wait(30)

    thread = threading.Thread(target=wait)
    thread.start()
    assert figures.wait_until(lambda: bool(tally.look_for_stuck() or tally.stuck), 10)
    going_on.set()
    thread.join()
    assert len(tally.stuck) == 1
    assert "going_on.wait" in tally.stuck[0]
    assert failed(Findings(stuck=tally.stuck)) == ["no operation stuck"]


# The verdict.


def test_a_run_without_findings_holds() -> None:
    assert failed(Findings()) == []
    assert columns.verdict_lines(Findings())[-1] == "verdict: all hold"


@pytest.mark.parametrize("name", ["device_bytes", "device_quarantined_bytes", "pinned_bytes", "num_entries"])
def test_bytes_left_in_the_cache_fail(name: str) -> None:
    assert failed(Findings(left={"total_bytes": 0, name: 512})) == ["cache empty"]


def test_a_planted_thread_fails() -> None:
    before, ending = figures.num_threads(), threading.Event()
    thread = threading.Thread(target=ending.wait)
    thread.start()
    assert failed(Findings(threads=(before, figures.num_threads()))) == ["threads"]
    ending.set()
    thread.join()


def test_a_planted_descriptor_fails() -> None:
    before = figures.num_descriptors()
    with Path(os.devnull).open():
        assert failed(Findings(descriptors=(before, figures.num_descriptors()))) == ["file descriptors"]
    assert failed(Findings(descriptors=(before, figures.num_descriptors()))) == []


@pytest.mark.parametrize(("field", "name"), [("rss", "RSS flat"), ("server_rss", "server's RSS flat")])
def test_memory_that_grows_steadily_fails_and_noise_does_not(field: str, name: str) -> None:
    steps = range(10 * LEAST_SAMPLES)
    leak: dict[str, Any] = {field: [400 * MB + 3 * RSS_LIMIT_BYTES * step // len(steps) for step in steps]}
    noise: dict[str, Any] = {field: [400 * MB + RSS_LIMIT_BYTES * (step % 7) // 3 for step in steps]}
    warm_up: dict[str, Any] = {field: [min(400, 100 + 10 * step) * MB for step in steps]}
    assert failed(Findings(**leak)) == [name]
    assert failed(Findings(**noise)) == failed(Findings(**warm_up)) == []


def test_rss_counts_what_a_process_uses() -> None:
    """Of a child that does nothing else: this process's own memory shrinks and grows with other tests' garbage."""
    grows = "import os, sys; print(flush=True); input(); kept = os.urandom(64 * 10**6); print(flush=True); input()"
    with subprocess.Popen(
        [sys.executable, "-c", grows], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, bufsize=1
    ) as child:
        assert child.stdin
        assert child.stdout
        child.stdout.readline()
        before = figures.rss_bytes(child.pid)
        child.stdin.write("\n")
        child.stdout.readline()
        assert figures.rss_bytes(child.pid) - before > 60 * MB
        child.stdin.write("\n")
    assert figures.rss_bytes(2**22 + 1) == 0  # more than a pid can be


def test_a_run_that_met_no_faults_fails() -> None:
    assert failed(Findings(missing_events=["no fault was injected"])) == ["run met faults"]


def test_main_says_what_failed(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    found = Findings(wrong=["soak-1: 1 wrong bytes"], threads=(4, 5))
    monkeypatch.setattr(soak, "soak", lambda plan, tell: found)
    monkeypatch.setattr(
        soak, "torch", SimpleNamespace(set_num_threads=lambda count: None, accelerator=torch.accelerator)
    )
    assert soak.main(["--device", "cpu"]) == soak.EXIT_FAILED
    printed = capsys.readouterr().out
    assert "soak-1: 1 wrong bytes" in printed
    assert "4 threads at the start, 5 at the end" in printed
    assert printed.splitlines()[-1] == "verdict: FAILED (contents, threads)"


def test_a_store_can_be_given_its_shards_back(catalogue: Catalogue) -> None:
    store, owned = ShardStore(), catalogue.owned_by(1)
    store.update(owned)
    store.remove(list(owned)[:7])
    store.update(owned)
    assert len(store) == len(owned)
