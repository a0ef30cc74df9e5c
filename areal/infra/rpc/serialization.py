"""The codec, under AReaL's name: the same module object as `gpu_cache.rpc.wire.serialization`."""

import sys

import gpu_cache.rpc.wire.serialization

sys.modules[__name__] = gpu_cache.rpc.wire.serialization
