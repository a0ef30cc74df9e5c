"""The reuse fence: events behind everything that may still read a freed range."""

from __future__ import annotations

from collections.abc import Sequence

from gpu_cache.config import ReuseFence
from gpu_cache.device.protocol import Device, Event, Stream


class StreamFence:
    """Records events on the streams that may have read blocks.

    Idle streams get events too, which are done at once: asking a stream whether it is idle breaks captures.

    Args:
        device: Has the streams.
        mode: "all": every stream of torch's pools too; "noted": the default stream and the noted ones.
    Thread-safety: any thread; the set of noted streams only grows, by single dict operations.
    """

    def __init__(self, device: Device, mode: ReuseFence) -> None:
        self._device, self._mode = device, mode
        self._noted: dict[Stream, None] = {}
        self._last_noted: Stream | None = None
        self._known: tuple[int, Sequence[Stream]] = (-1, ())  # how many were noted, and all streams then

    def note(self, stream: Stream) -> None:
        """Remember a stream that reads blocks."""
        if stream is not self._last_noted:  # seldom; hashing a stream costs as much as a hand-out
            self._noted[stream] = None
            self._last_noted = stream

    def note_named(self, stream: Stream) -> None:
        """Remember a stream that a caller names.

        Raises:
            ValueError: No event can be recorded there, so that every later fence would fail.
        """
        try:
            if stream not in self._noted and not self._device.is_any_capturing([stream]):
                self._device.record(stream)
        except (AttributeError, TypeError, RuntimeError) as error:
            raise ValueError(f"{stream!r} is no stream of {self._device.torch_device}") from error
        self.note(stream)

    @property
    def is_captured(self) -> bool:
        """Whether a graph is being captured on one of the streams, so that nothing can be recorded."""
        return self._device.is_any_capturing(self._streams())

    def record(self) -> list[Event] | None:
        """Events on every stream, behind the work that is enqueued now; when all are done, no reader is left.

        Returns:
            None while a graph is being captured on one of the streams. Nothing can be recorded on that one, and work
            enqueued before the capture began may still run.
        """
        streams = self._streams()
        if self._device.is_any_capturing(streams):
            return None
        events = self._device.record_all(streams)
        if self._device.is_any_capturing(streams):  # again: a capture that began meanwhile may have taken them in
            self._device.discard(events)
            return None
        return events

    def _streams(self) -> Sequence[Stream]:
        """The streams to fence, each once; the same sequence until another one is noted."""
        num_noted, streams = self._known
        noted = list(self._noted)
        if num_noted != len(noted):
            pooled = self._device.fence_streams()
            streams = list(dict.fromkeys([*(pooled if self._mode == "all" else pooled[:1]), *noted]))
            self._known = len(noted), streams
        return streams
