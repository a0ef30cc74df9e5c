"""From a source through staging buffers into the pool."""
