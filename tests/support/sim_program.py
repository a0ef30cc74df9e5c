"""Random programs on a real `TensorCache` over the simulated device: scripts played, and looked at after every step."""

from __future__ import annotations

import contextlib
import gc
from collections.abc import Callable, Iterator, Sequence

from gpu_cache import CacheConfig
from tests.support.sim_accounts import check_accounts, check_lookups
from tests.support.sim_script import REST, Script, Step, random_script, shortened
from tests.support.sim_steps import STEPS, WEIGHTS
from tests.support.sim_world import CONFIG, World


class SimFaultError(AssertionError):
    """A fault, and the steps that led there."""


class Program:
    """Plays the steps of a script; what comes of it is in the device's faults, and in the accounts.

    Args:
        config: The cache's settings; at least two staging slots.
    """

    def __init__(self, config: CacheConfig = CONFIG) -> None:
        self.world = World(config)
        self.trace: list[str] = []

    def run(self, script: Script) -> None:
        """Take the steps, then let everything go and see that every byte came back.

        Raises:
            SimFaultError: The device saw a race or wrong bytes, bytes are lost, or the cache raised an error.
        """
        self._play(script)
        self.world.end_trouble()
        self._play_named("land", "drop_all", "collect", "clear_all", "finish", "synchronize")
        with self._told():
            check_accounts(self.world.cache, is_fetching=False, is_over=True)
        self.world.device.finish()
        self._play_named("collect")

    def run_on_after_close(self, script: Script) -> None:
        """Take the steps, close the cache, and go on reading what is held; raises as `run` does."""
        self._play(script)
        self.world.end_trouble()
        self._play_named("land")
        assert self.world.cache._engine is not None
        self.world.cache._engine.reaper._period_s = 0.001  # it looks after what is held until that is dropped
        self.world.cache.close()
        self._play([step for step in script if step.name in ("read", "drop", "view", "collect")])
        self._play_named("drop_all")
        self.world.device.finish()
        self._play_named("collect")

    def _play_named(self, *names: str) -> None:
        self._play([Step(name) for name in names])

    def _play(self, steps: Sequence[Step]) -> None:
        for step in [one for one in steps if one.name != REST]:
            with self._told():
                self._take(step)

    @contextlib.contextmanager
    def _told(self) -> Iterator[None]:
        """Tell every fault with the steps that led there."""
        try:
            yield
        except Exception as error:
            kind = "" if isinstance(error, AssertionError) else f"{type(error).__name__}: "
            raise SimFaultError(f"step {len(self.trace)}\n{kind}{error}\n{self.witness}") from error

    def _take(self, step: Step) -> None:
        world = self.world
        world.begin(step)
        try:
            STEPS[step.name](world)
        finally:
            self.trace.append(world.words)
        world.device.adversary.begin()
        assert not world.device.faults, "\n".join(world.device.faults[:5])
        check_accounts(world.cache, is_fetching=world.flight is not None, is_over=False)
        check_lookups(world.cache, world.ledger)

    @property
    def witness(self) -> str:
        """The steps so far, as one reads them."""
        return "; ".join(self.trace)


@contextlib.contextmanager
def few_objects() -> Iterator[None]:
    """Collect only when programs ask for it."""
    gc.disable()
    try:
        yield
    finally:
        gc.enable()
        gc.unfreeze()


def run_script(
    script: Script, config: CacheConfig = CONFIG, watch: Callable[[Program], None] = lambda program: None
) -> None:
    """Run one program and let `watch` look at it before it is closed; raises as `Program.run` does."""
    gc.collect()
    gc.freeze()  # its collections are to look at its own objects, or each would take as long as the rest of it
    program = Program(config)
    try:
        program.run(script)
        watch(program)
    finally:
        program.world.close()


def run_seed(seed: int, config: CacheConfig = CONFIG, watch: Callable[[Program], None] = lambda program: None) -> None:
    """Run the program of a seed.

    Raises:
        SimFaultError: With a shorter script than the seed's, if one fails as well.
    """
    script = random_script(seed, WEIGHTS)
    try:
        run_script(script, config, watch)
    except SimFaultError as error:
        shorter = shortened(script, lambda one: bool(fault_of(one, config)))
        error.add_note(f"seed {seed}; the same in short: {shorter!r}")
        run_script(shorter, config)
        raise


def fault_of(script: Script, config: CacheConfig = CONFIG) -> str:
    """The fault of a script's run, in a line; "" if it runs well."""
    try:
        run_script(script, config)
    except SimFaultError as error:
        return str(error).split("\n")[1]
    return ""
