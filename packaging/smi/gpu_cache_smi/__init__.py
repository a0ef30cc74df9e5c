"""The tool `gpu-cache-smi` without the data plane."""
