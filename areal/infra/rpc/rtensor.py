"""Handles, under AReaL's name: the same module object as `gpu_cache.rpc.rtensor`."""

import sys

import gpu_cache.rpc.rtensor

sys.modules[__name__] = gpu_cache.rpc.rtensor
