"""The steps of a program, by name: what consumers, the trainer and the device may do, and how often."""

from __future__ import annotations

import contextlib
import dataclasses
import gc
from collections.abc import Callable
from typing import Any

from gpu_cache import CacheFullError, FetchError
from gpu_cache.errors import TransferError
from tests.support.sim_shards import Flight, LateReader, broken, contents
from tests.support.sim_world import NODE, World, names
from tests.support.sources import GatedReader

STEPS: dict[str, Callable[[World], None]] = {}
WEIGHTS: dict[str, int] = {}
_MAX_STREAMS = 8


def _step(weight: int) -> Callable[[Callable[[World], None]], Callable[[World], None]]:
    def enter(step: Callable[[World], None]) -> Callable[[World], None]:
        STEPS[step.__name__], WEIGHTS[step.__name__] = step, weight
        return step

    return enter


# Fetching.


@_step(20)
def get(world: World) -> None:
    choices, prefer = world.choices, world.some_place()
    world.get(world.some_keys(), choices.choice(("host", "stream")), choices.choice(world.open_streams), prefer)


@_step(4)
def share(world: World) -> None:
    """One shard on two streams, each of which reads at once."""
    key = world.choices.choice(list(contents()))
    for comma in (",", ""):
        if world.get([key], "stream", world.choices.choice(world.open_streams)):
            world.say("and read")
            world.read(world.held[-1])
        world.words += comma


@_step(4)
def get_one(world: World) -> None:
    key = world.choices.choice(list(contents()))
    world.say(key)
    is_changed, num_refused = bool(world.changed([key])), world.device.num_refused
    asked = [key] if world.is_parked(key) and not is_changed else []
    try:
        world.ledger.ask(asked)
        with world.ledger.receiving(asked):
            found = world.cache.get(key)
    except FetchError:
        if world.device.num_refused == num_refused:
            raise
        world.say("refused")
        return
    assert found is None or not is_changed, f"{key} was written to, and is handed out"
    if found is not None:
        world.hold(key, found, None)


@_step(4)
def get_parked(world: World) -> None:
    """Some of what is in the host tier, in either place, and read at once; often what has just been sent there."""
    choices = world.choices
    if world.config.host_tier_bytes and choices.happens(60):
        world.say("after an offload")
        world.cache.offload()
        world.cache.resume()
    parked = list(filter(world.is_parked, world.cache.keys()))
    if parked:
        keys, prefer = choices.sample(parked, min(len(parked), 2)), choices.choice(("device", "host", "host"))
        if world.get(keys, choices.choice(("host", "stream")), choices.choice(world.open_streams), prefer):
            world.read(world.held[-1])


@_step(3)
def get_broken(world: World) -> None:
    """A fetch whose connection breaks after some reads."""
    world.land()
    keys, num_reads, prefer = world.choices.sample(list(contents()), 6), world.choices.below(3), world.some_place()
    if world.choices.happens(50):  # between the pieces of a large shard, of which the first is on its way
        large = [key for key, tensor in contents().items() if tensor.numel() > 16 << 10]
        keys, num_reads = [*dict.fromkeys([world.choices.choice(large), *keys[:2]])], 1
    world.say(f"{names(keys)} after {num_reads} reads")
    world.ledger.ask(keys)
    with world.wrapped(lambda reader: broken(reader, num_reads)), contextlib.suppress(FetchError):  # noqa: SIM117
        with world.ledger.receiving(keys):
            world.cache.get_many(keys, world.source, prefer=prefer)


@_step(2)
def get_late(world: World) -> None:
    """A fetch that is given up while its reader receives."""
    world.land()
    keys, prefer = world.some_keys(), world.some_place()
    world.say(names(keys))
    world.ledger.ask(keys)
    with world.wrapped(LateReader) as readers, contextlib.suppress(FetchError), world.ledger.receiving(keys):
        world.cache.get_many(keys, world.source, timeout_s=0, prefer=prefer)
    world.await_moves()
    if readers:
        late = {key for key in readers[0].keys if contents()[key].numel()}
        if futures := [task.done for task in list(world.cache._tasks)]:  # else there were empty shards only
            world.fly(Flight(futures[0], readers[0], [], set(), late))


@_step(2)
def get_captured(world: World) -> None:
    """A capture gets what is cached, and whose copy was seen complete; anything else is refused."""
    if world.device.captured is None:
        world.capture(world.choices.choice(world.streams[1:]), 1)
    stream, cached = world.device.captured, world.cache.keys()
    assert stream is not None
    keys = world.choices.sample(cached, min(len(cached), 2)) if world.choices.happens(90) else world.some_keys()
    prefer = world.some_place()
    on_device = [key for key in cached if not world.is_parked(key)]
    is_cached = set(keys) <= set(cached if prefer == "host" else on_device)
    is_cached = is_cached and not world.changed(keys)
    keep = world.choices.happens(50)  # which is not the quick way of plain hits, and frees what can be freed
    world.say(names(keys))
    if is_cached:
        world.ledger.ask(keys)
    received = world.ledger.receiving(keys if is_cached else ())
    try:
        with world.device.stream(stream), received:
            tensors = world.cache.get_many(keys, world.source, prefer=prefer, keep=keep)
    except TransferError:
        world.say("refused")
        return
    assert is_cached, "fetched during a capture"
    for key, tensor in zip(keys, tensors, strict=True):
        world.hold(key, tensor, None)


@_step(6)
def prefetch(world: World) -> None:
    """Begin to fetch, and stop before the first read returns."""
    world.land()
    keys, prefer = world.some_keys(), world.some_place()
    world.say(names(keys))
    world.ledger.ask(keys)
    with world.wrapped(GatedReader) as readers:
        future = world.cache.prefetch(keys, world.source, prefer=prefer)
    if readers:
        world.fly(Flight(future, readers[0], keys, set(keys)))
    else:
        with contextlib.suppress(FetchError), world.ledger.receiving(keys):  # shards in the host tier may stay there
            future.result(20)
        world.await_moves()


@_step(4)
def land(world: World) -> None:
    world.land()


@_step(3)
def put(world: World) -> None:
    key = world.choices.choice(list(contents()))
    world.say(key)
    if world.flight is not None:
        world.flight.cleared.discard(key)
    num_refused = world.device.num_refused
    try:
        world.cache.put(key, contents()[key], node="here")
    except CacheFullError:
        world.say("full")
    except (OSError, RuntimeError):
        if world.device.num_refused == num_refused:
            raise
        world.say("refused")


# Consumers.


@_step(30)
def read(world: World) -> None:
    if (held := world.any_held()) is not None:
        world.read(held)


@_step(4)
def write(world: World) -> None:
    """Write into a tensor in place, against the rules."""
    held, choices = world.any_held(), world.choices
    if held is None or not len(held.expected) or world.device.captured is not None:
        return
    world.write(held)
    key, held = held.what, None
    if world.config.host_tier_bytes and choices.happens(40):
        world.say("and let go before an offload")
        world.held = [one for one in world.held if one.what != key]
        world.cache.offload()
        world.cache.resume()
    if choices.happens(60):  # before the device has got on
        world.get([key], choices.choice(("host", "stream")), choices.choice(world.open_streams))


@_step(5)
def cross(world: World) -> None:
    """Make another stream wait for one that may read."""
    held = next((one for one in world.held if one.streams and one.streams[0] in world.open_streams), None)
    if held is not None and held.streams:
        other = world.choices.choice(world.open_streams)
        world.device.wait(other, world.device.record(held.streams[0]))
        held.streams.append(other)
        world.say(f"{held.what} to {other.name}")


@_step(3)
def record_stream(world: World) -> None:
    """Note a stream, often one made outside of torch that the cache has not seen."""
    if (held := world.any_held()) is None:
        return
    if world.choices.happens(40) and len(world.streams) < _MAX_STREAMS:
        world.streams.append(world.device.new_stream())
        stream = world.streams[-1]
    else:
        stream = world.choices.choice(world.streams)
    world.say(f"{held.what} on {stream.name}")
    world.tell(held, stream)


@_step(5)
def view(world: World) -> None:
    """A part of a tensor, which may be all that is left of it."""
    if (held := world.any_held()) is None:
        return
    begin, end = sorted(len(held.expected) * world.choices.below(101) // 100 for _ in range(2))
    world.say(f"{held.what} from {begin} to {end}")
    part = dataclasses.replace(held, tensor=held.tensor[begin:end], expected=held.expected[begin:end])
    if world.choices.happens(50):
        world.held.remove(held)
    world.held.append(part)


@_step(24)
def drop(world: World) -> None:
    if not world.held:
        return
    held = world.held.pop(world.choices.below(len(world.held)))
    world.say(held.what)
    if world.choices.happens(30):
        world.say("into a cycle")
        _cycle_of(held.tensor)


@_step(2)
def litter(world: World) -> None:
    """Leave a tensor's storage, as Python has it, in a dead cycle; the tensor lives on."""
    if (held := world.any_held()) is not None:
        world.say(held.what)
        _cycle_of(held.tensor.untyped_storage())


def _cycle_of(item: object) -> None:
    """Only a collection finds it."""
    cycle: list[Any] = [item]
    cycle.append(cycle)


@_step(2)
def drop_all(world: World) -> None:
    world.held.clear()


# The trainer.


@_step(8)
def clear(world: World) -> None:
    keys = world.choices.sample(list(contents()), 10)
    world.say(names(keys))
    world.cache.clear(keys)
    if world.flight is not None:
        world.flight.clear(keys)


@_step(3)
def clear_all(world: World) -> None:
    if world.choices.happens(50):
        world.say("by node")
        world.cache.clear_node(NODE)  # a shard stays if its node is not known before it lands
        world.cache.clear_node("here")
        return
    world.cache.clear()
    if world.flight is not None:
        world.flight.clear(contents())


@_step(2)
def trim(world: World) -> None:
    world.cache.trim(world.choices.choice((0, 32 << 10)))


@_step(2)
def offload(world: World) -> None:
    """Give the device's memory to another user, and mostly take it back."""
    report = world.cache.offload()
    world.say(f"{report.freed_bytes} went, {report.held_bytes} held")
    if world.choices.happens(80):
        world.cache.resume()


@_step(3)
def synchronize(world: World) -> None:
    world.cache.synchronize()


@_step(4)
def capture(world: World) -> None:
    """Capture a graph for a while, on a stream that is not the default one; on one with work left, if there is one."""
    if world.device.captured is None:
        busy = [stream for stream in world.streams[1:] if stream.queue]
        world.capture(world.choices.choice(busy or world.streams[1:]), 4 + world.choices.below(8))


# The machine.


@_step(4)
def collect(world: World) -> None:
    gc.collect()


@_step(4)
def refuse(world: World) -> None:
    """Let the device refuse memory, sometimes for a while, or a copy."""
    what = world.choices.choice(("arena", "arena", "arena", "slot", "copy"))
    times = world.choices.choice((1, 2, 4, 20)) if what == "arena" else 1
    world.say(f"{what} {times} times")
    world.device.refuse(what, times)


@_step(1)
def finish(world: World) -> None:
    world.device.finish()
