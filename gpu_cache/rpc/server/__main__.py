"""`python -m gpu_cache.rpc.server`: serve this process's shards."""

import sys

from gpu_cache.rpc.server.main import main

if __name__ == "__main__":
    sys.exit(main())
