"""One run: owners, proxies, consumers and chaos are started, watched, ended, and judged."""

from __future__ import annotations

import contextlib
import gc
import logging
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from gpu_cache import FetchError
from gpu_cache.rpc import runtime
from gpu_cache.rpc.rtensor import RTensor, clear_fetch_buffer, set_backend
from soaking import columns
from soaking.catalogue import NUM_OWNERS, Catalogue
from soaking.chaos import Chaos
from soaking.columns import SHOWN
from soaking.consumer import FETCH_TIMEOUT_S, MARGIN_S, Consumer, World
from soaking.figures import Sample, look, num_descriptors, num_threads, settled_counts, wait_until
from soaking.owner import Owner, OwnerError
from soaking.proxies import Proxies
from soaking.tally import ErrorLog, Tally
from soaking.verdict import LEAST_SAMPLES, Findings

_SAMPLE_S = 1.0
_JOIN_S = 30.0  # more than any operation's limit
_QUIET_S, _SETTLE_S = 1.3, 15.0  # the cache's own thread ends when it had nothing to do for a second
_WARM_TRIES = 10
_MUST_BE_ZERO = (
    "device_bytes", "device_quarantined_bytes", "host_bytes", "pinned_bytes", "num_entries", "total_bytes",
)  # fmt: skip


@dataclass(frozen=True, slots=True)
class Plan:
    """What to do.

    Attributes:
        seconds: Of the steady state.
        line_s: Between two lines.
        seed: Of everything.
        num_threads: Consumers.
        device: Of the cache.
    """

    seconds: float
    line_s: float
    seed: int
    num_threads: int
    device: str


class Session:
    """A run among owners and proxies that serve.

    Args:
        plan: What to do.
        owners: In the order of the catalogue.
        proxies: In front of them.
        stopping: Set at the end.
        tell: Prints a line.
    """

    def __init__(
        self, plan: Plan, owners: list[Owner], proxies: Proxies, stopping: threading.Event, tell: Callable[[str], None]
    ) -> None:
        self._plan, self._owners, self._proxies, self._stopping, self._tell = plan, owners, proxies, stopping, tell
        self._tally = Tally()
        self._samples: list[Sample] = []
        self._num_told = 0
        self._world = World(Catalogue(plan.seed, plan.device), proxies.addresses, self._tally, stopping)
        self._consumers = [Consumer(self._world, plan.seed, number) for number in range(plan.num_threads)]
        self._chaos = Chaos(owners, plan.seed, self._tally, stopping)
        self._started = 0.0

    def run(self) -> Findings:
        """Soak until the time is up, or Ctrl-C."""
        with _errors_to(self._tally):
            self._warm_up()
            self._go_quiet()
            counts = settled_counts(_QUIET_S, _SETTLE_S)
            self._started = time.monotonic()
            self._tell(columns.header())
            with contextlib.suppress(KeyboardInterrupt):
                for worker in (self._chaos, *self._consumers):
                    worker.thread.start()
                self._watch()
            return self._end(counts)

    def _warm_up(self) -> None:
        """Use everything once, so that what is started lazily is there when threads are counted."""
        for _ in range(_WARM_TRIES):
            with contextlib.suppress(FetchError):
                RTensor.localize([self._world.handle(shard) for shard in self._world.catalogue.shards[:40]])
                return
        raise OwnerError("nothing arrives through the proxies")

    def _watch(self) -> None:
        next_line = self._plan.line_s
        while (elapsed_s := time.monotonic() - self._started) < self._plan.seconds:
            time.sleep(min(_SAMPLE_S, self._plan.seconds - elapsed_s))
            self._samples.append(self._sample())
            self._tally.look_for_stuck()
            if time.monotonic() - self._started >= next_line:
                self._tell_line()
                next_line += self._plan.line_s

    def _sample(self) -> Sample:
        """Only what is shown: all samples are kept, and must not look like a leak themselves."""
        figures = runtime.current().cache.buffer_stats()
        return look(self._owners[-1].pid, {name: figures[name] for name in SHOWN})  # type: ignore[literal-required]

    def _tell_line(self) -> None:
        counts = {
            "operations": self._tally.num_operations,
            "checks": self._tally.checks,
            "faults": sum(self._proxies.faults().values()),
            "kills": self._chaos.kills,
        }
        since, self._num_told = self._samples[self._num_told :] or self._samples[-1:], len(self._samples)
        self._tell(columns.line(time.monotonic() - self._started, counts, self._tally.error_counts(), since))

    def _end(self, counts: tuple[int, int]) -> Findings:
        """Join, drop, clear, synchronize, and say what is left."""
        self._stopping.set()
        self._join()
        self._samples.append(self._sample())
        if self._num_told < len(self._samples) - 1:
            self._tell_line()
        self._tell_totals()
        self._samples.pop()  # no moment of the steady state
        left = self._go_quiet()
        wait_until(lambda: num_threads() <= counts[0] and num_descriptors() <= counts[1], _SETTLE_S)
        return Findings(
            self._tally.wrong,
            self._tally.stuck,
            self._tally.unexpected,
            left,
            (counts[0], num_threads()),
            (counts[1], num_descriptors()),
            [sample.rss_bytes for sample in self._samples],
            [sample.server_bytes for sample in self._samples],
            self._missing_events(),
        )

    def _join(self) -> None:
        deadline = time.monotonic() + _JOIN_S
        for worker in (*self._consumers, self._chaos):
            if worker.thread.ident is not None:
                worker.thread.join(max(0.0, deadline - time.monotonic()))
            self._tally.look_for_stuck()
            if worker.thread.is_alive():
                self._tally.stuck.append(f"{worker.thread.name} did not end")

    def _tell_totals(self) -> None:
        self._tell(f"operations: {dict(self._tally.operations)}")
        self._tell(f"faults: {self._proxies.faults()}, servers killed: {self._chaos.kills}")

    def _missing_events(self) -> list[str]:
        if len(self._samples) < LEAST_SAMPLES:
            return []
        figures = self._sample().cache
        found = {
            "no fault was injected": sum(self._proxies.faults().values()),
            "no server was killed": self._chaos.kills,
            "nothing was evicted": figures["evictions"],
            "nothing found the pool full": figures["overflows"],
        }
        return [told for told, count in found.items() if not count]

    def _go_quiet(self) -> dict[str, float]:
        """Drop everything; returns what should be 0. A prefetch that no thread waits for may take its time."""
        set_backend(None)  # closes the idle connections
        gc.collect()  # errors that were caught are cycles with their frames, and frames hold tensors
        cache = runtime.current().cache

        def left() -> dict[str, float]:
            clear_fetch_buffer()
            cache.synchronize()
            return {name: value for name, value in cache.buffer_stats().items() if name in _MUST_BE_ZERO}  # type: ignore[misc]

        wait_until(lambda: not any(left().values()), FETCH_TIMEOUT_S + MARGIN_S)
        return left()


@contextlib.contextmanager
def _errors_to(tally: Tally) -> Iterator[None]:
    """Take the log, and exceptions that end a thread."""
    handler, before = ErrorLog(tally), threading.excepthook
    logging.getLogger().addHandler(handler)
    threading.excepthook = lambda args: tally.note_unexpected(f"{args.thread}: {args.exc_value!r}")
    try:
        yield
    finally:
        threading.excepthook = before
        logging.getLogger().removeHandler(handler)


def soak(plan: Plan, tell: Callable[[str], None]) -> Findings:
    """Run; on return, and on any error, the other processes are gone."""
    stopping = threading.Event()
    with contextlib.ExitStack() as stack:
        owners = [stack.enter_context(Owner(plan.seed, number, stopping)) for number in range(NUM_OWNERS)]
        for owner in owners:
            owner.launch()
        for owner in owners:
            owner.wait()
        proxies = stack.enter_context(Proxies(plan.seed, [owner.port for owner in owners]))
        runtime.configure(
            device=plan.device,
            pool_bytes="48MiB",
            slab_bytes="8MiB",
            host_tier_bytes="24MiB",
            fetch_timeout_s=FETCH_TIMEOUT_S,
        )
        try:
            return Session(plan, owners, proxies, stopping, tell).run()
        finally:
            stopping.set()
            runtime.current().close()
