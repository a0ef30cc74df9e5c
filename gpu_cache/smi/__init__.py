"""`gpu-cache-smi`: what the caches of a machine hold and do, read from their reports. Never imports torch."""
