"""The reuse fence: events behind everything that may still read a freed range."""

from __future__ import annotations

from gpu_cache.config import ReuseFence
from gpu_cache.device import Device, Event, Stream


class StreamFence:
    """Records events on the streams that may have read blocks.

    Args:
        device: Whose streams.
        mode: "all": every stream of torch's pools too; "noted": the default stream and the noted ones.
    Thread-safety: any thread; the set of noted streams only grows, by single dict operations.
    """

    def __init__(self, device: Device, mode: ReuseFence) -> None:
        self._device, self._mode = device, mode
        self._noted: dict[Stream, None] = {}

    def note(self, stream: Stream) -> None:
        """Remember a stream that reads blocks."""
        self._noted[stream] = None

    @property
    def is_captured(self) -> bool:
        """Whether a graph is being captured on one of the streams, so that nothing can be recorded."""
        return any(map(self._device.is_capturing, self._streams()))

    def record(self) -> list[Event] | None:
        """One event on each stream, behind what is enqueued now; all of them done means: nobody reads any more.

        Returns:
            None while a graph is being captured on one of the streams: it cannot be recorded on, and work enqueued
            before the capture began may still run.
        """
        streams = self._streams()
        if any(map(self._device.is_capturing, streams)):
            return None
        events = [self._device.record(stream) for stream in streams]
        # Again: of events that a capture which began meanwhile took in, none could ever be asked.
        return None if any(map(self._device.is_capturing, streams)) else events

    def _streams(self) -> list[Stream]:
        """The streams to fence, each once."""
        pooled = self._device.fence_streams()
        return list(dict.fromkeys([*(pooled if self._mode == "all" else pooled[:1]), *list(self._noted)]))
