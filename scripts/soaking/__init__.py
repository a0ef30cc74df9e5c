"""The soak's own modules; see `scripts/soak.py`."""
