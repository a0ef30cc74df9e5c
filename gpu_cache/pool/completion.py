"""Completions: whether a copy to the device is done, as far as the host has seen."""

from __future__ import annotations

from gpu_cache.device.protocol import Device, Event, Stream


class Completion:
    """A copy to the device, as far as the host has seen it.

    It remembers "done" only after the host saw it: a stream that waits for the copy proves nothing for another.
    Thread-safety: any thread; the worst that a race does is to look twice.
    """

    __slots__ = ("_device", "_event")

    def __init__(self, device: Device, event: Event) -> None:
        self._device = device
        self._event: Event | None = event

    @property
    def is_seen(self) -> bool:
        """Whether the host has already seen it done. Asks nothing of the device."""
        return self._event is None

    @property
    def is_done(self) -> bool:
        """Whether the host sees it done now. Waits for nothing; not during CUDA graph capture."""
        if (event := self._event) is not None and self._device.query(event):
            self._event = None
        return self._event is None

    def wait_host(self) -> None:
        """Block until it is done."""
        if (event := self._event) is not None:
            self._device.synchronize(event)
            self._event = None

    def wait_on(self, stream: Stream) -> None:
        """Make later work on `stream` wait for it, unless it is seen to be done."""
        if (event := self._event) is not None and not self.is_done:
            self._device.wait(stream, event)
