"""Helpers of `benchmark.py`: workloads, their owner, the paths that are timed, measuring, and the report."""
