"""Handles of remote tensors, and the codec that carries them. Names load on first use (PEP 562)."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from gpu_cache.rpc.rtensor import RTensor, TensorShardInfo
    from gpu_cache.rpc.wire.serialization import deserialize_value, serialize_value

__all__ = ["RTensor", "TensorShardInfo", "deserialize_value", "serialize_value"]


if not TYPE_CHECKING:  # else a checker would take any name for one of these

    def __getattr__(name: str) -> Any:
        if name not in __all__:
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        # Even for the codec: importing rtensor is what enters the handles in the codec's table.
        rtensor = import_module("gpu_cache.rpc.rtensor")
        home = import_module("gpu_cache.rpc.wire.serialization") if name.endswith("_value") else rtensor
        return getattr(home, name)


def __dir__() -> list[str]:
    return sorted(__all__)
