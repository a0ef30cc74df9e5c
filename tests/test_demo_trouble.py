"""The demo in trouble: a pool that is too small, a worker that is killed. It goes on, and its accounts are right."""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch

from areal.infra.rpc import rpc_server, runtime
from gpu_cache import FetchError

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "scripts"))

import train_demo
from demo import report
from demo.handles import RemoteBatch
from demo.learner import Learner, LearnerConfig
from demo.meter import Phase
from demo.recovery import OnDeath, Recovery
from demo.rollouts import WorkerDiedError, Workers
from demo.session import NUM_READS, Outcome, Plan, Session

PROMPTS = 4
SHARDS = 6 * 8 * PROMPTS  # of a batch: six tensors of each answer, eight answers to a prompt
BATCH_BYTES = 7_000  # about; but each takes 512 bytes of a pool or more


@pytest.fixture(scope="module")
def workers() -> Iterator[Workers]:
    """Two, for several tests: it takes seconds to start one."""
    with Workers(2) as workers:
        yield workers


@pytest.fixture(autouse=True)
def threads_of_torch() -> Iterator[None]:
    """The demo sets them for its process."""
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def plan(steps: int, kill_worker_at: int | None = None, on_worker_death: OnDeath = "fail") -> Plan:
    learner = LearnerConfig(num_minibatches=2)
    return Plan(
        steps, 0, num_prompts=PROMPTS, learner=learner, kill_worker_at=kill_worker_at, on_worker_death=on_worker_death
    )


def run(
    workers: Workers,
    plan: Plan,
    tell: Callable[[str], None] = print,
    on_step: Callable[[float, Phase], None] = lambda *_: None,
) -> Outcome:
    """A run that ends with everything cleared."""
    runtime.configure(device="cpu")
    with rpc_server.start() as server:
        learner = Learner(torch.device("cpu"), 0, plan.learner)
        outcome = Session(plan, learner, workers, server.address, on_step, tell).run()
    assert (outcome.device_bytes, outcome.shards_left, outcome.num_given_up_clears) == (0, 0, 0)
    assert len(runtime.current().cache) == runtime.current().clearer.num_owed == 0
    return outcome


def table_of(outcome: Outcome) -> dict[str, str]:
    return report.rows(report.summary(outcome, device="cpu", workers=2, seed=0))


def test_with_a_pool_of_a_quarter_of_a_batch_every_byte_arrives(
    workers: Workers, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("GPU_CACHE_POOL_BYTES", str(BATCH_BYTES // 4))
    outcome = run(workers, plan(3))
    cached = outcome.cached
    # Most shards at each read; the prefetch brings what fits, whatever was sent.
    assert 0.5 * cached.read_bytes < cached.wire_bytes <= cached.read_bytes * (NUM_READS + 1) / NUM_READS
    assert cached.wire_bytes <= cached.served_bytes <= cached.read_bytes * (NUM_READS + 1) / NUM_READS
    assert cached.overflows > SHARDS
    assert len(outcome.step_rewards) == 3
    assert table_of(outcome)["handed out uncached (overflows)"] == f"{cached.overflows:,}"


def test_a_pool_that_is_too_small_for_two_batches_evicts(workers: Workers, monkeypatch: pytest.MonkeyPatch) -> None:
    """The next batch is prefetched while this one is read."""
    monkeypatch.setenv("GPU_CACHE_POOL_BYTES", str(SHARDS * 512 * 5 // 4))
    outcome = run(workers, plan(6))
    cached = outcome.cached
    assert cached.evictions > 0
    assert cached.read_bytes / NUM_READS <= cached.wire_bytes <= cached.served_bytes
    assert table_of(outcome)["evicted for want of room"] == f"{cached.evictions:,}"


def test_a_killed_worker_is_restarted_and_its_shards_are_reported_lost(workers: Workers) -> None:
    lines: list[str] = []
    outcome = run(workers, plan(4, 2, "restart"), lines.append)
    assert (outcome.num_worker_restarts, outcome.num_lost_shards) == (1, SHARDS // 2)
    died, lost = lines
    pattern = r"step 2: rollout worker 1 \(pid \d+\) died with exit code -9; restarted at (\S+), the same address"
    found = re.fullmatch(pattern, died)
    assert found, died
    trajectories = SHARDS // 2 // 6
    assert lost == (
        f"step 2: {SHARDS // 2} shards of rollout worker 1 ({found[1]}) are lost; "
        f"goes on without their {trajectories} trajectories"
    )
    assert len(outcome.step_rewards) == 4
    cached = outcome.cached
    assert cached.wire_bytes == cached.served_bytes
    assert cached.read_bytes == NUM_READS * cached.wire_bytes, "nobody read what was lost"
    # If the step before was cleared while its owner was dead, that was made up for when it was back.
    assert outcome.num_retried_clears in (0, SHARDS // 2)
    assert table_of(outcome)["shards lost with them"] == str(SHARDS // 2)
    assert table_of(outcome)["rollout workers restarted"] == "1"


def test_a_worker_that_is_killed_while_it_samples_is_restarted(workers: Workers) -> None:
    def kill_once(reward: float, so_far: Phase) -> None:
        if so_far.steps == 1:
            workers._workers[0].kill()

    lines: list[str] = []
    outcome = run(workers, plan(4, None, "restart"), lines.append, kill_once)
    assert outcome.num_worker_restarts == 1
    assert outcome.num_lost_shards in (0, SHARDS // 2), "it may have had its handles out already"
    assert lines[0].startswith("step 2: rollout worker 0 (pid ")
    assert len(outcome.step_rewards) == 4


def test_a_killed_worker_ends_the_run_unless_told_otherwise() -> None:
    pattern = r"rollout worker 0 \(pid \d+\) died with exit code -9"
    with Workers(1) as workers, pytest.raises(WorkerDiedError, match=pattern):
        run(workers, plan(3, 1))


def test_a_run_goes_on_when_the_only_worker_is_killed(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "figures.json"
    arguments = ["--steps", "2", "--uncached-steps", "0", "--workers", "1", "--device", "cpu", "--json", str(path)]
    assert train_demo.main([*arguments, "--kill-worker-at", "1", "--on-worker-death", "restart"]) == 0
    figures = json.loads(path.read_text())
    assert (figures["num_worker_restarts"], figures["num_lost_shards"]) == (1, 6 * 8 * Plan().num_prompts)
    assert (len(figures["rewards"]), figures["shards_left"], figures["num_given_up_clears"]) == (1, 0, 0)
    output = capsys.readouterr().out
    assert "step 1: 1,536 shards of rollout worker 0 (127.0.0.1:" in output
    assert re.search(r"shards lost with them +│ +1,536 │", output)


def test_what_no_death_explains_is_no_loss(workers: Workers) -> None:
    told: list[str] = []
    error = FetchError("broken frame", {"a": ValueError()})
    policies: list[OnDeath] = ["restart", "fail"]
    for policy in policies:
        recovery = Recovery(workers, policy, told.append)
        with pytest.raises(FetchError, match="broken frame"):
            recovery.drop_lost(1, RemoteBatch([], is_cached=False), error)
        assert (recovery.num_lost_shards, recovery.num_restarts) == (0, 0)
    assert told == []


def test_the_table_tells_of_deaths_only_if_there_were_any() -> None:
    assert report.deaths({"num_worker_restarts": 0, "num_lost_shards": 0}) == {}
