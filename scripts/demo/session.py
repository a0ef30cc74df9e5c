"""The run: order rollouts, prefetch, train, clear, publish weights; first with the cache, then a few steps without."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import CancelledError, Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any

from demo.handles import RemoteBatch
from demo.learner import Learner, LearnerConfig, Targets
from demo.meter import Meter, Phase
from demo.recovery import OnDeath, Recovery
from demo.roles import CRITIC, REFERENCE, Roles
from demo.rollouts import WorkerDiedError, WorkerError, Workers
from demo.trajectory import rewards
from demo.weights import WeightPublisher, clear_everywhere
from demo.worker import SampleOrder
from gpu_cache import FetchError
from gpu_cache.rpc import runtime
from gpu_cache.rpc.rtensor import RTensor

NUM_EPOCHS = 2
# Of each batch: for the reference's log-probs, the actor's, the rewards, and in each epoch.
NUM_READS = 3 + NUM_EPOCHS


@dataclass(frozen=True, slots=True)
class Plan:
    """How much to run.

    Attributes:
        steps: Training steps with the cache.
        uncached_steps: Further training steps in which every read goes over the wire and nothing is prefetched.
        seed: Of the weights, the prompts and the sampling. On a CPU, equal plans bring equal batches.
        num_prompts: Prompts per step, over all workers.
        learner: Settings of the update.
        roles: Those that are processes, each with a cache; the actor is the trainer. Empty: the trainer does all.
        kill_worker_at: The step, from 1, whose batch loses a worker between the handles and the first read.
        on_worker_death: End the run, or restart the worker and go on without what was lost.
    """

    steps: int = 60
    uncached_steps: int = 3
    seed: int = 0
    num_prompts: int = 32
    learner: LearnerConfig = field(default_factory=LearnerConfig)
    roles: tuple[str, ...] = ()
    kill_worker_at: int | None = None
    on_worker_death: OnDeath = "fail"

    @property
    def total_steps(self) -> int:
        return self.steps + self.uncached_steps


@dataclass(frozen=True, slots=True)
class Outcome:
    """What a run brought.

    Attributes:
        step_rewards: Mean reward of each step with the cache, but for those whose whole batch was lost.
        cached: Figures of these steps.
        uncached: Figures of the steps without.
        rollout_wait_s: Seconds that the trainer waited for the workers to sample.
        seconds: From the first order to the last clear.
        device_bytes: In the trainer's cache after the last clear and `synchronize()`.
        shards_left: In the workers' stores after the last clear.
        num_lost_shards: That died with their workers before they were read.
        num_worker_restarts: Workers that were started again.
        num_retried_clears: Shards that a party had to be told of twice.
        num_given_up_clears: Shards that a party could not be told of twice.
        roles: What each role has fetched in the steps with the cache, and from where in which way.
        http_bytes: Bytes of tensors that the workers sent over HTTP meanwhile.
    """

    step_rewards: list[float]
    cached: Phase
    uncached: Phase
    rollout_wait_s: float
    seconds: float
    device_bytes: int
    shards_left: int
    num_lost_shards: int = 0
    num_worker_restarts: int = 0
    num_retried_clears: int = 0
    num_given_up_clears: int = 0
    roles: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    http_bytes: int = 0


class Session:
    """One run of the demo. One thread; orders and prefetches are awaited on another.

    While step k trains, the workers sample batch k + 1 from the weights that step k began with, and it is prefetched:
    every batch but the first is one version old when its turn comes.

    Args:
        plan: How much to run.
        learner: On the trainer's device.
        workers: Started; they may still be on their way up.
        address: Of this process's shard server.
        on_step: Told after each step with the cache: its mean reward, and the figures so far.
        tell: Takes lines about what went wrong and was mended.
        roles: The other processes that read each batch.
    """

    def __init__(
        self,
        plan: Plan,
        learner: Learner,
        workers: Workers,
        address: str,
        on_step: Callable[[float, Phase], None],
        tell: Callable[[str], None] = print,
        roles: Roles | None = None,
    ) -> None:
        self._roles = roles
        self._plan = plan
        self._learner = learner
        self._workers = workers
        self._recovery = Recovery(workers, plan.on_worker_death, tell)
        self._publisher = WeightPublisher(address, workers, is_strict=not self._recovery.is_on)
        self._on_step = on_step
        self._gatherer = ThreadPoolExecutor(1, thread_name_prefix="gather")
        self._rollout_wait_s = 0.0

    def run(self) -> Outcome:
        """Train, and account for it.

        Raises:
            WorkerError: A worker died or failed.
        """
        try:
            return self._run()
        except Exception:
            # A worker's death shows first as whatever was going on with it: a fetch, a clear, an order.
            self._workers.check()
            raise
        finally:
            self._gatherer.shutdown(wait=False, cancel_futures=True)

    def _run(self) -> Outcome:
        start = time.perf_counter()
        step_rewards: list[float] = []
        meter = self._meter()
        batch = self._order_batch(0)
        for step in range(self._plan.steps):
            batch = self._train_step(step, batch, meter, step_rewards)
            self._on_step(step_rewards[-1] if step_rewards else 0.0, meter.phase(ask_servers=False))
        self._recovery.revive(self._plan.steps)  # servers are asked now
        if not step_rewards:
            raise WorkerError("every batch died with its workers")
        cached, http_bytes = meter.phase(ask_servers=True), self._workers.health_total("sent_payload_bytes")
        fetched, meter = {} if self._roles is None else self._roles.fetched(), self._meter()
        for step in range(self._plan.steps, self._plan.total_steps):
            batch = self._train_step(step, batch, meter, [])
        self._recovery.revive(self._plan.total_steps)
        self._publisher.clear()
        cache, clearer = runtime.current().cache, runtime.current().clearer
        cache.synchronize()
        return Outcome(
            step_rewards=step_rewards,
            cached=cached,
            uncached=meter.phase(ask_servers=True),
            rollout_wait_s=self._rollout_wait_s,
            seconds=time.perf_counter() - start,
            device_bytes=cache.buffer_stats()["device_bytes"],
            shards_left=self._workers.health_total("num_tensors"),
            num_lost_shards=self._recovery.num_lost_shards,
            num_worker_restarts=self._recovery.num_restarts,
            num_retried_clears=clearer.num_retried,
            num_given_up_clears=clearer.num_given_up,
            roles=fetched,
            http_bytes=http_bytes,
        )

    def _meter(self) -> Meter:
        return Meter(lambda: self._workers.served_bytes)

    def _train_step(
        self, step: int, arriving: Future[RemoteBatch], meter: Meter, step_rewards: list[float]
    ) -> Future[RemoteBatch]:
        """Train on one batch while the next one, whose future is returned, is sampled; then clear it everywhere."""
        start = time.perf_counter()
        batch = arriving.result()
        self._rollout_wait_s += time.perf_counter() - start
        self._recovery.revive(step + 1)
        following = self._order_batch(step + 1)
        step_rewards += self._train(step, batch)
        consumers = [] if self._roles is None else [self._roles.clear]
        clear_everywhere(batch.handles, consumers, is_strict=not self._recovery.is_on)
        meter.note(batch)
        return following

    def _train(self, step: int, batch: RemoteBatch) -> list[float]:
        """The mean reward of a batch; none if all of it was lost. What is lost is found out by reading it."""
        while not batch.is_empty:
            try:
                return [train(self._learner, batch, self._roles)]
            except FetchError as error:
                self._recovery.drop_lost(step + 1, batch, error)
        return []

    def _order_batch(self, step: int) -> Future[RemoteBatch]:
        """Publish the weights and have a batch sampled from them; the workers must be idle."""
        if step >= self._plan.total_steps:
            return Future()
        weights, version = self._publisher.publish(self._learner.policy), max(0, step - 1)
        shares = split(self._plan.num_prompts, len(self._workers))
        orders = [
            SampleOrder(weights, version, share, self._plan.learner.group_rows, self._seed(step, number))
            for number, share in enumerate(shares)
        ]
        return self._gatherer.submit(self._gather, step, self._workers.sample(orders))

    def _gather(self, step: int, answers: Sequence[Future[str]]) -> RemoteBatch:
        """Wait for all workers and make one batch of their handles; begin to fetch it if it is to be cached."""
        is_cached = step < self._plan.steps
        texts = [text for answer in answers for text in self._answered(answer)]
        batch = RemoteBatch(texts, is_cached=is_cached)
        if step + 1 == self._plan.kill_worker_at:
            self._workers.kill(len(self._workers) - 1)
        if is_cached:
            RTensor.prefetch(batch.handles)
        return batch

    def _answered(self, answer: Future[str]) -> list[str]:
        """A worker's text; none if it died and the run is to go on."""
        try:
            return [answer.result()]
        except (WorkerDiedError, CancelledError):  # the latter: it died before the order reached it
            if not self._recovery.is_on:
                raise
            return []

    def _seed(self, step: int, worker: int) -> int:
        return (self._plan.seed * 1_000_003 + step) * 1_009 + worker


def train(learner: Learner, batch: RemoteBatch, roles: Roles | None = None) -> float:
    """One training step: five reads of the batch, each as if it had come in an RPC of its own.

    Args:
        learner: Of this process.
        batch: The batch to train on.
        roles: Other processes that make some of the reads, at once.
    Returns:
        The mean reward of the batch.
    """
    asked = {} if roles is None else roles.ask(batch)
    reference = None if REFERENCE in asked else learner.reference_logprobs(batch.read())
    actor = learner.actor_logprobs(batch.read())
    if CRITIC in asked:
        advantages, reward = asked[CRITIC].result()
    else:
        scored = batch.read()
        advantages, reward = learner.advantages(scored), float(rewards(scored).mean())
    if reference is None:
        reference = asked[REFERENCE].result()
    targets = Targets(reference.to(actor.device), actor, advantages.to(actor.device))
    for _ in range(NUM_EPOCHS):
        learner.update(batch.read(), targets)
    return reward


def split(total: int, parts: int) -> list[int]:
    """`total` in `parts` shares that differ by one at most."""
    return [total // parts + (part < total % parts) for part in range(parts)]
