"""How an owner serves its shards."""
