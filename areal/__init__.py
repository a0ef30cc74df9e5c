"""AReaL's names for this data plane. Only a checkout has them; pip installs `gpu_cache` alone."""

import logging
from importlib.metadata import PackageNotFoundError, version


def _tell_of_another() -> None:
    try:
        found = version("areal")
    except PackageNotFoundError:
        return
    logging.getLogger(__name__).warning(
        "AReaL %s is installed, but %s is imported instead, from a checkout of rtensor-data-plane: start Python "
        "outside of the checkout, or take it off PYTHONPATH, to import AReaL's own",
        found,
        __file__,
    )


_tell_of_another()
