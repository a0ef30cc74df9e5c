"""`python -m gpu_cache.smi`."""

from gpu_cache.smi.main import run

if __name__ == "__main__":
    run()
