"""The server, under AReaL's name: the same module object as `gpu_cache.rpc.server.main`."""

import sys

import gpu_cache.rpc.server.main

if __name__ == "__main__":
    sys.exit(gpu_cache.rpc.server.main.main())

sys.modules[__name__] = gpu_cache.rpc.server.main
