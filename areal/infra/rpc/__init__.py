"""The names of `gpu_cache.rpc`, under AReaL's; the modules are the same objects, so that state and patches are one."""

from typing import Any

from gpu_cache import rpc


def __getattr__(name: str) -> Any:
    return getattr(rpc, name)
