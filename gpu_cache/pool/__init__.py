"""Ranges of device memory, and when each may be used again."""
