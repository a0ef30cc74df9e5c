"""AReaL's names for this data plane, in a checkout alone: a wheel brings `gpu_cache` only.

Where AReaL is installed too, the first of both on `sys.path` is imported: `areal.__file__` tells which. To get the
other, leave this checkout, or put it behind on the path.
"""
