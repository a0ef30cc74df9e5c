"""The demo: its figures agree with each other, it leaves no process behind, and its parts do what they say."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch

from tests.support.demo_run import DEADLINE_S, figures_of, is_worker, started

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "scripts"))

import train_demo
from demo import policy, report, rollouts, session, task, trajectory
from demo.learner import Learner

pytestmark = pytest.mark.scripts

BYTE_KEYS = {"read_bytes", "wire_bytes", "served_bytes", "saved_bytes", "uncached_read_bytes", "uncached_wire_bytes"}
OTHER_KEYS = {
    "device", "workers", "seed", "reward_first", "reward_last", "rewards", "steps", "trajectories", "shards",
    "hit_rate", "wait_seconds", "wait_seconds_total", "uncached_steps", "wait_seconds_uncached",
    "rollout_wait_seconds", "seconds", "device_bytes_after_clear", "shards_left", "evictions", "overflows",
    "num_lost_shards", "num_worker_restarts", "num_retried_clears", "num_given_up_clears", "roles", "http_bytes",
}  # fmt: skip


def family_in_training(process: subprocess.Popen[str]) -> list[psutil.Process]:
    """Every child of a demo, once it has made its first step."""
    assert process.stdout is not None
    assert any(line.startswith("step 1/") for line in process.stdout), process.communicate()
    return psutil.Process(process.pid).children(recursive=True)


Runs = tuple[dict[str, Any], dict[str, Any]]


@pytest.fixture(scope="module")
def two_runs(tmp_path_factory: pytest.TempPathFactory) -> Runs:
    """Figures of two runs over the same three batches: all of them with the cache, and only the first.

    The second trains in this process, which has imported torch already.
    """
    folder = tmp_path_factory.mktemp("demo")
    a, b = folder / "a.json", folder / "b.json"
    num_threads = torch.get_num_threads()
    with started("--quiet", "--steps", "3", "--uncached-steps", "0", "--json", str(a)) as cached:
        arguments = ["--quiet", "--steps", "1", "--uncached-steps", "2", "--device", "cpu"]
        assert train_demo.main([*arguments, "--json", str(b)]) == 0
        torch.set_num_threads(num_threads)
        return figures_of(cached, a), json.loads(b.read_text())


def test_the_json_has_every_figure(two_runs: Runs) -> None:
    for figures in two_runs:
        assert figures.keys() == BYTE_KEYS | OTHER_KEYS
        assert all(isinstance(figures[key], int) for key in BYTE_KEYS)


def test_steps_trajectories_and_shards_are_counted(two_runs: Runs) -> None:
    per_step = session.Plan().num_prompts * session.Plan().learner.group_rows
    assert [(figures["steps"], figures["uncached_steps"]) for figures in two_runs] == [(3, 0), (1, 2)]
    for figures in two_runs:
        assert figures["trajectories"] == figures["steps"] * per_step
        assert figures["shards"] == 6 * figures["trajectories"]
        assert len(figures["rewards"]) == figures["steps"]


def test_bytes_over_the_wire_equal_the_servers_count(two_runs: Runs) -> None:
    for figures in two_runs:
        assert figures["wire_bytes"] == figures["served_bytes"] > 0


def test_saved_bytes_equal_the_cost_of_the_same_batches_without_the_cache(two_runs: Runs) -> None:
    a, b = two_runs
    assert a["rewards"][0] == b["rewards"][0], "equal seeds must bring equal batches"
    assert a["wire_bytes"] + a["saved_bytes"] == b["wire_bytes"] + b["saved_bytes"] + b["uncached_wire_bytes"]


def test_a_cached_batch_crosses_the_wire_once_and_an_uncached_one_at_each_read(two_runs: Runs) -> None:
    for figures in two_runs:
        assert figures["read_bytes"] == session.NUM_READS * figures["wire_bytes"]
        assert figures["uncached_wire_bytes"] == figures["uncached_read_bytes"]


def test_nothing_is_left_after_the_last_clear(two_runs: Runs) -> None:
    for figures in two_runs:
        assert figures["device_bytes_after_clear"] == 0
        assert figures["shards_left"] == 0


def test_a_worker_that_dies_ends_the_run_and_is_named() -> None:
    with started("--steps", "1000") as process:
        family = family_in_training(process)
        victim = [child for child in family if is_worker(child)][-1]
        victim.kill()
        _, errors = process.communicate(timeout=DEADLINE_S)
        assert process.returncode == 1, errors
        assert re.search(rf"train_demo: rollout worker \d \(pid {victim.pid}\) died with exit code -9\n$", errors)
        assert psutil.wait_procs(family, timeout=DEADLINE_S)[1] == []


def test_no_worker_outlives_a_trainer_that_is_killed() -> None:
    with started("--steps", "1000") as process:
        family = family_in_training(process)
        assert len([child for child in family if is_worker(child)]) == 2
        process.kill()
        assert psutil.wait_procs(family, timeout=DEADLINE_S)[1] == []


def test_a_bad_argument_ends_the_process_with_status_2() -> None:
    with started("--steps", "0") as process:
        _, errors = process.communicate(timeout=DEADLINE_S)
    assert process.returncode == 2
    assert "argument --steps: must be at least 1" in errors


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--steps", "many"], "--steps: invalid number value"),
        (["--uncached-steps", "-1"], "--uncached-steps: must be at least 0"),
        (["--workers", "33"], "--workers 33: there are 32 prompts"),
        (["--device", "tpu"], "--device tpu: not here; choose auto, cpu"),
        (["--json", "no/such/folder/figures.json"], "there is no such folder"),
        (["--step", "3"], "unrecognized arguments"),
        (["--kill-worker-at", "61"], "--kill-worker-at 61: there are 60 steps"),
        (["--kill-worker-at", "0"], "--kill-worker-at: must be at least 1"),
        (["--on-worker-death", "shrug"], "invalid choice: 'shrug'"),
    ],
)
def test_a_bad_argument_is_refused_before_anything_starts(
    arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as exit_info:
        train_demo.main(arguments)
    assert exit_info.value.code == 2
    assert message in capsys.readouterr().err


@pytest.mark.parametrize("key", ["device_bytes_after_clear", "shards_left"])
def test_bytes_left_after_the_last_clear_fail_the_run(key: str, capsys: pytest.CaptureFixture[str]) -> None:
    figures = {"device_bytes_after_clear": 0, "shards_left": 0}
    assert train_demo._check(figures) == 0
    assert train_demo._check({**figures, key: 5}) == 1
    assert "after the last clear" in capsys.readouterr().err


@pytest.mark.slow
def test_the_default_run_learns_the_task(tmp_path: Path) -> None:
    with started("--quiet", "--json", str(tmp_path / "figures.json")) as process:
        figures = figures_of(process, tmp_path / "figures.json")
    assert figures["reward_first"] < 0.2
    assert figures["reward_last"] > 0.8
    assert figures["hit_rate"] > 0.8


def a_policy(seed: int = 0) -> policy.Policy:
    """A policy whose answers are not uniform, as a fresh one's are."""
    torch.manual_seed(seed)
    fresh = policy.Policy()
    torch.nn.init.normal_(fresh.head.weight, std=0.3)
    return fresh


def some_prompts(count: int, seed: int = 0) -> task.Prompts:
    return task.random_prompts(count, torch.Generator().manual_seed(seed))


def test_a_prompt_holds_digits_and_the_answer_is_its_reverse() -> None:
    prompts = some_prompts(200)
    for row, length, answer in zip(prompts.token_ids.tolist(), prompts.lengths, prompts.answers.tolist(), strict=True):
        digits = row[1 : length - 1]
        assert (row[0], row[length - 1], {*row[length:]} - {task.PAD}) == (task.OPEN, task.SEPARATOR, set())
        assert all(0 <= digit <= 9 for digit in digits)
        assert [token for token in answer if token != task.PAD] == [*reversed(digits), task.STOP]
    assert set((prompts.lengths - 2).tolist()) == set(range(task.MIN_DIGITS, task.MAX_DIGITS + 1))


@pytest.mark.parametrize(
    ("response", "expected"),
    [
        ([3, 2, 1, task.STOP], 1.0),
        ([3, 2, 9, task.STOP], 0.75),
        ([3, 2], 0.5),
        ([task.STOP], 0.0),
        ([3, 2, 1, task.STOP, 0, 0, 0, 0], 0.5),
    ],
)
def test_the_reward_is_the_share_of_right_places(response: list[int], expected: float) -> None:
    assert task.reward(response, [3, 2, 1, task.STOP]) == expected


def test_the_policy_is_small() -> None:
    assert Learner(torch.device("cpu"), 0).num_parameters < 1_000_000


def test_a_fresh_policy_is_uniform_over_an_answers_tokens() -> None:
    logprobs = policy.Policy()(some_prompts(4).token_ids)
    allowed = [*range(10), task.STOP]
    assert torch.allclose(logprobs[..., allowed].exp(), torch.tensor(1 / 11))
    assert logprobs.exp()[..., [task.PAD, task.OPEN, task.SEPARATOR]].sum() == 0


def test_the_samplers_logprobs_are_those_of_the_policy() -> None:
    prompts, model = some_prompts(32), a_policy()
    samples = policy.sample(model, prompts, torch.Generator().manual_seed(1))
    with torch.no_grad():
        recomputed = policy.token_logprobs(model, samples.token_ids)
    place = torch.arange(samples.token_ids.shape[1])
    is_answer = (place >= prompts.lengths[:, None]) & (place < samples.lengths[:, None])
    assert torch.allclose(samples.logprobs[:, 1:][is_answer[:, 1:]], recomputed[is_answer[:, 1:]], atol=1e-5)
    assert samples.logprobs[~is_answer].eq(0).all()
    assert samples.logprobs[is_answer].lt(0).all()


def test_an_answer_ends_at_stop_or_when_it_is_full() -> None:
    prompts = some_prompts(64)
    samples = policy.sample(a_policy(), prompts, torch.Generator().manual_seed(1))
    for row, start, end in zip(samples.token_ids.tolist(), prompts.lengths, samples.lengths, strict=True):
        answer = row[start:end]
        assert task.STOP not in answer[:-1]
        assert answer[-1] == task.STOP or len(answer) == task.MAX_ANSWER
        assert set(row[end:]) <= {task.PAD}


def test_trajectories_are_cut_to_their_length_and_padded_back() -> None:
    prompts = some_prompts(8)
    samples = policy.sample(a_policy(), prompts, torch.Generator().manual_seed(1))
    batch = trajectory.trajectories(prompts, samples, version=4)
    for one, start, end in zip(batch, prompts.lengths, samples.lengths, strict=True):
        assert {tensor.shape for name, tensor in one.items() if name != "rewards"} == {(1, int(end))}
        assert one["loss_mask"].sum() == end - start
        assert one["versions"][0].tolist() == [trajectory.NO_VERSION] * int(start) + [4] * int(end - start)
        assert one["input_ids"].untyped_storage().nbytes() == one["input_ids"].nbytes
    whole = trajectory.padded(batch, torch.device("cpu"))
    longest = int(samples.lengths.max())
    assert whole.token_ids.equal(samples.token_ids[:, :longest])
    assert whole.logprobs.equal(samples.logprobs[:, 1:longest])
    assert whole.is_answer.sum() == (samples.lengths - prompts.lengths).sum()


def test_an_update_makes_rewarded_answers_likelier() -> None:
    learner = Learner(torch.device("cpu"), 0)
    prompts = some_prompts(8).repeated(learner._config.group_rows)
    batch = trajectory.trajectories(
        prompts, policy.sample(learner.policy, prompts, torch.Generator().manual_seed(1)), 0
    )
    before, advantages = learner.actor_logprobs(batch), learner.advantages(batch)
    targets = session.Targets(learner.reference_logprobs(batch), before, advantages)
    for _ in range(2):
        learner.update(batch, targets)
    change = ((learner.actor_logprobs(batch) - before) * advantages[:, None]).sum()
    assert change > 0


def test_the_table_has_a_dash_where_nothing_was_compared(two_runs: Runs) -> None:
    cached, mostly_uncached = two_runs
    assert report.rows(cached)["the same without the cache (steps: 0)"] == "-"
    assert report.rows(mostly_uncached)["the same without the cache (steps: 2)"].endswith(" ms")
    assert report.rows(cached)["bytes over the wire"] == f"{cached['wire_bytes']:,}"


def test_a_failure_of_a_worker_is_told_with_its_pid_and_traceback() -> None:
    bad_order = rollouts.SampleOrder(weights="no JSON", version=0, num_prompts=1, group_rows=1, seed=0)
    with rollouts.Workers(1) as workers:
        child = next(child for child in psutil.Process().children() if is_worker(child))
        with pytest.raises(rollouts.WorkerError, match=rf"worker 0 \(pid {child.pid}\) failed:\nTraceback"):
            workers.sample([bad_order])[0].result(DEADLINE_S)
        assert workers.health_total("num_tensors") == 0
    assert not child.is_running()


@pytest.mark.parametrize("way", [pytest.param("shm", marks=pytest.mark.slow), "node cache"])
def test_roles_that_are_processes_share_what_crosses_the_network(way: str, tmp_path: Path) -> None:
    path = tmp_path / "figures.json"
    arguments = ["--quiet", "--steps", "1", "--uncached-steps", "0", "--workers", "1", "--roles", "actor,ref,critic"]
    with started(*arguments, *(["--node-cache"] if way == "node cache" else []), "--json", str(path)) as process:
        figures = figures_of(process, path)
    fetched = [one["fetch_bytes"] for one in figures["roles"].values()]
    assert fetched == [figures["wire_bytes"]] * 3, "each has read every batch"
    assert {one for role in figures["roles"].values() for one in role["sources"].values()} == {way}
    assert 3 * figures["http_bytes"] <= sum(fetched)
    assert report.rows(figures)["read by way of"] == way


@pytest.mark.parametrize("roles", ["ref", "actor,teacher"])
def test_roles_that_there_are_not_are_refused(roles: str) -> None:
    with pytest.raises(SystemExit):
        train_demo.main(["--quiet", "--roles", roles])
