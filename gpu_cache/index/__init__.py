"""Which shard is where, and in what state."""
