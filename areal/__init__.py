"""AReaL's names for this data plane, in a checkout alone: what pip installs is `gpu_cache`."""

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
