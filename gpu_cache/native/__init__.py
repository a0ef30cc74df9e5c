"""Blocks and hits in C++, for where a compiler is: `python -m gpu_cache.native` builds it. Python does the same.

The environment variable `GPU_CACHE_NATIVE` is "0": never used; "1": an error at import where it is not built; else it
is used where it is built. It is built for one torch and one Python, and into `GPU_CACHE_NATIVE_DIR`, by default
`~/.cache/gpu-cache`.
Source: our measurement, torch 2.13, 3,072 shards on two slow cores: a hit 0.2 to 0.9 us instead of 1.5 to 3.7, a block
1.1 to 2.5 instead of 10 to 12.
"""

from __future__ import annotations

import hashlib
import importlib.util
import logging
import os
import sysconfig
from importlib.machinery import ExtensionFileLoader
from pathlib import Path
from typing import Any

import torch

from gpu_cache.config import is_off, says_yes

logger = logging.getLogger(__name__)

SOURCE = Path(__file__).with_name("blocks.cpp")


def library() -> Path:
    """The file that holds what is built of this source for this torch and this Python."""
    folder = os.environ.get("GPU_CACHE_NATIVE_DIR") or Path(
        os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache", "gpu-cache"
    )
    built_of = SOURCE.read_bytes() + f"{torch.__version__} {torch.version.git_version}".encode()
    return Path(folder, f"blocks-{hashlib.sha256(built_of).hexdigest()[:16]}{sysconfig.get_config_var('EXT_SUFFIX')}")


def load(path: Path) -> Any:
    """The module in a file.

    Raises:
        ImportError: It cannot be loaded.
        PermissionError: Another user, who is not root, could have written it.
    """
    if path.stat().st_uid not in (0, os.getuid()):
        raise PermissionError(f"{path} belongs to user {path.stat().st_uid}")
    loader = ExtensionFileLoader("gpu_cache.native.blocks", str(path))
    spec = importlib.util.spec_from_loader(loader.name, loader)
    assert spec is not None
    module = importlib.util.module_from_spec(spec)
    loader.exec_module(module)
    return module


def _loaded() -> Any:
    if is_off(os.environ.get("GPU_CACHE_NATIVE")):
        return None
    is_wanted = False
    try:
        is_wanted = says_yes("GPU_CACHE_NATIVE", default=False)
    except ValueError as error:
        logger.warning("%s; taken as not set", str(error))
    try:
        path = library()
        if is_wanted or path.exists():
            return load(path)
    except (ImportError, OSError, RuntimeError) as error:
        if is_wanted:
            raise ImportError(f"GPU_CACHE_NATIVE=1, and {error}; build it: python -m gpu_cache.native") from error
        logger.warning("blocks are built in Python: %s", str(error))
    return None


blocks: Any = _loaded()  # the module, or None
