"""Transports: where the bytes of remote shards come from."""
