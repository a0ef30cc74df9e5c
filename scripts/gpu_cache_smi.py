"""`gpu-cache-smi` from a checkout."""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from gpu_cache.smi.__main__ import run

if __name__ == "__main__":
    run()
