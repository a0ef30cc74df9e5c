"""Figures of a cache, and the reports that a process writes about it."""
