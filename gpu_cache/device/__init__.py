"""One device: its memory, streams and events."""
