"""The training loop over AReaL's scheduler, controllers and servers. Needs an installed AReaL."""

from __future__ import annotations

import threading
import time
from argparse import Namespace
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from areal.api.cli_args import SchedulingSpec, TrainEngineConfig
from areal.infra.scheduler import local
from rich.console import Console

from areal.infra import LocalScheduler, TrainController
from areal.infra.rpc import rtensor
from demo.areal_engines import Actor, Reference, Sampler

ENGINES = {"rollout": Sampler, "ref": Reference, "actor": Actor}
NUM_EPOCHS = 2
GROUP_ROWS = 8
START_S = 300.0
# Where the workers find the engines, and nowhere else: AReaL would add the root of the checkout that its virtual
# environment stands in, and Python the folder that the demo was started in. The `areal` there has no servers.
PATHS = {"PYTHONPATH": str(Path(__file__).resolve().parents[1]), "PYTHONSAFEPATH": "1"}
# AReaL's workers run what they are told: no other host shall reach them.
COMMAND = "python -m areal.infra.rpc.rpc_server --host 127.0.0.1"
local.gethostip = lambda: "127.0.0.1"


class Scheduler(LocalScheduler):
    """AReaL's, for controllers that begin at once.

    Args:
        folder: For logs, and for the addresses of the workers.
    """

    def __init__(self, folder: str) -> None:
        names = Path(folder, "names")
        names.mkdir()
        super().__init__(
            gpu_devices=[0], startup_timeout=START_S, experiment_name="demo", trial_name="demo", fileroot=folder,
            nfs_record_root=str(names), health_check_interval=0.2,
        )  # fmt: skip
        self._starting = threading.Lock()  # guards AReaL's tables of ports and workers

    def create_workers(self, *args: Any, **kwargs: Any) -> list[str]:
        """Start the workers of one role."""
        with self._starting:
            started: list[str] = super().create_workers(*args, **kwargs)
        return started


class Controller(TrainController):
    """AReaL's, of one role."""

    def __init__(self, role: str, num_workers: int, scheduler: Scheduler) -> None:
        spec = SchedulingSpec(cpu=1, gpu=0, cmd=COMMAND, env_vars=PATHS)
        config = TrainEngineConfig(
            experiment_name="demo", trial_name="demo", backend=f"fsdp:d{num_workers}", scheduling_spec=(spec,)
        )
        super().__init__(ENGINES[role], config, scheduler)
        self.role, self.num_workers = role, num_workers

    def ask(self, method: str, *args: Any, **kwargs: Any) -> Any:
        """Call the engines of this role, as AReaL's own controllers do."""
        return self._custom_function_call(method, *args, **kwargs)


def run(options: Namespace, folder: str, console: Console) -> dict[str, Any]:
    """Start the workers, train, and end them; returns the figures."""
    scheduler = Scheduler(folder)
    controllers = {role: Controller(role, options.workers if role == "rollout" else 1, scheduler) for role in ENGINES}
    with ThreadPoolExecutor() as pool:
        try:
            list(pool.map(lambda one: one.initialize(one.role, None, seed=options.seed), controllers.values()))
            return train(options, controllers, console)
        finally:
            list(pool.map(scheduler.delete_workers, controllers))


def train(options: Namespace, controllers: dict[str, Controller], console: Console) -> dict[str, Any]:
    """Train for so many steps; returns the figures."""
    began = time.perf_counter()
    rewards: list[float] = []
    for number in range(options.steps):
        rewards.append(step(options.prompts, number, **controllers))
        console.print(f"step {number + 1}/{options.steps} · reward {rewards[-1]:.2f}", highlight=False)
    held = {role: one.ask("held") for role, one in controllers.items()}
    held["controller"] = {**rtensor.storage_stats(), **rtensor.fetch_buffer_stats()}
    return {
        "steps": options.steps,
        "rewards": rewards,
        "seconds": time.perf_counter() - began,
        "actor": controllers["actor"].ask("cache_figures"),
        "held": held,
    }


def step(num_prompts: int, number: int, rollout: Controller, ref: Controller, actor: Controller) -> float:
    """One step, in the order of AReaL's trainer; returns the mean reward."""
    weights = actor.ask("weights")
    size = {"num_prompts": num_prompts // rollout.num_workers, "group_rows": GROUP_ROWS}
    shares = rollout.ask("sample", [weights] * rollout.num_workers, version=number, **size)
    batch = [trajectory for share in shares for trajectory in share]
    work = {"ref_logp": (ref, "compute_logp"), "prox_logp": (actor, "compute_logp")}
    for name, (controller, method) in {**work, "advantages": (actor, "compute_advantages")}.items():
        for trajectory, result in zip(batch, controller.ask(method, batch), strict=True):
            trajectory[name] = result
    reward = actor.ask("mean_reward", batch)[0]
    for _ in range(NUM_EPOCHS):
        actor.ask("update", batch)
    actor.clear_batches(batch)
    ref.clear_batches(batch)
    rollout.clear_batches(weights)
    return float(reward)
