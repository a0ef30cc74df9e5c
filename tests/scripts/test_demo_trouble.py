"""The demo in trouble: a pool that is too small, a worker that is killed. It goes on, and its accounts are right."""

from __future__ import annotations

import re
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch

from gpu_cache import FetchError
from gpu_cache.rpc import runtime
from gpu_cache.rpc.server import main as rpc_server

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "scripts"))

import train_demo
from demo import report, rollouts
from demo.handles import RemoteBatch
from demo.learner import Learner, LearnerConfig
from demo.meter import Meter, Phase
from demo.recovery import OnDeath, Recovery
from demo.rollouts import WorkerDiedError, Workers
from demo.session import NUM_READS, Outcome, Plan, Session

pytestmark = pytest.mark.scripts

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


def test_evictions_are_counted() -> None:
    """In a run they depend on when a prefetch lands, so here they are brought about."""
    cache = runtime.configure(device="cpu", pool_bytes="64KiB").cache
    cache.put("before", torch.ones(8000))
    meter = Meter(lambda: 0)
    for number in range(5):
        cache.put(number, torch.ones(8000))
    so_far = meter.phase(ask_servers=False)
    assert so_far.evictions == cache.buffer_stats()["evictions"] >= 4
    figures = report.summary(Outcome([0.5], so_far, so_far, 0.0, 1.0, 0, 0), device="cpu", workers=2, seed=0)
    assert figures["evictions"] == so_far.evictions
    assert report.rows(figures)["evicted for want of room"] == f"{so_far.evictions:,}"


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
    assert cached.read_bytes == NUM_READS * cached.wire_bytes, "no trainer read the lost shard"
    # If the step before was cleared while its owner was dead, that was made up for when it was back.
    assert outcome.num_retried_clears in (0, SHARDS // 2)
    assert table_of(outcome)["shards lost with them"] == str(SHARDS // 2)
    assert table_of(outcome)["rollout workers restarted"] == "1"


def test_a_run_goes_on_when_all_workers_are_killed_while_they_sample(workers: Workers) -> None:
    def kill_once(reward: float, so_far: Phase) -> None:
        if so_far.steps == 1:
            for one in workers._workers:
                one.kill()

    lines: list[str] = []
    outcome = run(workers, plan(4, None, "restart"), lines.append, kill_once)
    assert outcome.num_worker_restarts == 2
    assert outcome.num_lost_shards in (0, SHARDS // 2, SHARDS), "their handles may have been out already, and read"
    assert [line.partition(" (pid ")[0] for line in lines[:2]] == [
        "step 2: rollout worker 0", "step 2: rollout worker 1",
    ]  # fmt: skip
    assert len(outcome.step_rewards) in (3, 4)


def test_the_options_are_those_of_the_plan() -> None:
    options = train_demo._parser().parse_args(["--steps", "9", "--kill-worker-at", "3", "--on-worker-death", "restart"])
    expected = Plan(9, Plan().uncached_steps, Plan().seed, kill_worker_at=3, on_worker_death="restart")
    assert train_demo._plan(options) == expected
    assert train_demo._plan(train_demo._parser().parse_args([])) == Plan()


def test_a_failure_that_no_death_explains_is_no_loss(workers: Workers, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rollouts, "_REAP_WAIT_S", 0.01)
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


def test_a_killed_worker_ends_the_run_unless_told_otherwise(workers: Workers) -> None:
    """The last one: it leaves a dead worker behind."""
    with pytest.raises(WorkerDiedError, match=r"rollout worker 1 \(pid \d+\) died with exit code -9"):
        run(workers, plan(3, 1))
