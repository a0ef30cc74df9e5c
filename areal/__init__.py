"""The RTensor data plane under AReaL's own names: `areal.infra.rpc`."""

from importlib.metadata import PackageNotFoundError, version


def _refuse_upstream() -> None:
    """Two distributions that provide one package overwrite each other's files; say so instead of half working."""
    try:
        upstream = version("areal")
    except PackageNotFoundError:
        return
    raise ImportError(
        f"AReaL {upstream} (distribution 'areal') and 'rtensor-data-plane' are both installed, and both provide the "
        "package 'areal'. Keep one of them in this environment: `pip uninstall areal` to use this data plane, "
        "`pip uninstall rtensor-data-plane` to use AReaL's own. The README says how to tell which one is imported."
    )


_refuse_upstream()
