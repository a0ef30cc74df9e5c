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

    def record(self) -> list[Event]:
        """One event on each stream, behind what is enqueued now; all of them done means: nobody reads any more."""
        return [self._device.record(stream) for stream in self._streams()]

    def _streams(self) -> list[Stream]:
        """The streams to fence, each once; one that is being captured cannot be recorded on, nor does it run now."""
        pooled = list(self._device.fence_streams())
        streams = dict.fromkeys(pooled if self._mode == "all" else pooled[:1])
        for stream in list(self._noted):
            if stream not in streams and not self._device.is_capturing(stream):
                streams[stream] = None
        return list(streams)
