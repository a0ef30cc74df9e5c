"""How a consumer reads and deletes shards of an owner."""
