"""The switch: an installed AReaL uses the handles, the cache and the wire of `gpu_cache.rpc`.

An import hook serves two modules of ours under AReaL's names, and adapts two of AReaL's own when they load. It imports
nothing of either until the program does. `GPU_CACHE_AREAL=1` installs it in every process, through a `.pth` file that
the wheel brings; `adopt()` installs it in this process, and sets the variable for its children.
"""

from __future__ import annotations

import ast
import contextlib
import functools
import importlib.machinery
import importlib.util
import logging
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from types import FunctionType, ModuleType
from typing import Any, NamedTuple

from gpu_cache.config import YES, is_off

VARIABLE = "GPU_CACHE_AREAL"
_WORDS = (*YES, "force")
_RTENSOR = "areal.infra.rpc.rtensor"
_BLUEPRINT = "areal.infra.rpc.guard.data_blueprint"
_CODEC = "areal.infra.rpc.serialization"
_LAUNCHER = "areal.infra.utils.launcher"
_LOGGING = "areal.utils.logging"
# Methods whose reads want host memory: one dumps trajectories number by number, the others look at one reward.
_HOST_READS = {
    "areal.infra.workflow_executor": "WorkflowExecutor._dump_trajectory",
    "areal.experimental.inference_service.controller.workflow": "InferenceServiceWorkflow._run_online",
    "areal.v2.inference_service.controller.workflow": "InferenceServiceWorkflow._run_online",
}
_OUR_RTENSOR = "gpu_cache.rpc.rtensor"
_CONTAINERS = (dict, list, tuple)
_nothing = contextlib.nullcontext()
# AReaL's name of each module that we replace, and ours.
SERVED = {_RTENSOR: _OUR_RTENSOR, _BLUEPRINT: "gpu_cache.rpc.server.blueprint"}
# AReaL's launchers hand these on to processes on other nodes, beside their own list.
_FORWARDED = "GPU_CACHE_"
_FORWARDED_TOO = ("AREAL_RPC_TOKEN",)

# The names that were checked: AReaL 1.0.4 and its checkout of August 2026. Each module has the first ones; another
# public name than these means that AReaL has come to use something that we do not have.
CHECKED_VERSIONS = "1.0.4 and the checkout of 22 August 2026"
_NEEDED = {
    _RTENSOR: {
        "HttpRTensorBackend", "RTensor", "RTensor.clear_node", "RTensor.collect_shards", "RTensor.device",
        "RTensor.dtype", "RTensor.localize", "RTensor.ndim", "RTensor.remotize", "RTensor.shape", "RTensor.to_local",
        "RTensorBackend", "TensorShardInfo", "clear_fetch_buffer", "fetch", "fetch_buffer_stats", "flatten_shard_ids",
        "get_backend", "remove", "set_backend", "storage_stats", "store",
    },
    _BLUEPRINT: {"data_bp"},
    _CODEC: {"SerializedDataclass", "SerializedDataclass.from_dataclass", "deserialize_value", "serialize_value"},
    _LAUNCHER: {"get_env_vars"},
    _LOGGING: {"getLogger"},
}  # fmt: skip
_KNOWN = {
    _RTENSOR: _NEEDED[_RTENSOR]
    | {
        "HttpRTensorBackend.delete", "HttpRTensorBackend.fetch", "HttpRTensorBackend.store", "RTensorBackend.delete",
        "RTensorBackend.fetch", "RTensorBackend.store", "RayRTensorBackend", "RayRTensorBackend.delete",
        "RayRTensorBackend.fetch", "RayRTensorBackend.store", "logger",
    },
    _BLUEPRINT: {
        "BatchShardRequest", "ClearShardRequest", "ShardListRequest", "clear_batch_data", "data_bp", "logger",
        "retrieve_batch_data", "retrieve_batch_data_many", "store_batch_data",
    },
}  # fmt: skip


class AdoptError(ImportError):
    """AReaL cannot use this data plane: it was imported already, or it is another AReaL than those checked."""


def adopt() -> None:
    """Make the installed AReaL use our handles, cache and wire, in this process and in its children.

    Call it before anything imports `areal`. It sets `GPU_CACHE_AREAL` for the children, and is idempotent. Where AReaL
    is not installed it logs one warning, and changes nothing.

    Raises:
        AdoptError: It comes too late: says which modules were imported already, and by whom. Or AReaL is not one that
            was checked: names what is missing. `GPU_CACHE_AREAL=force` adopts it nevertheless.
    """
    is_first = _installed() is None
    if is_first:
        _check_is_early()
    mode = os.environ.get(VARIABLE)
    os.environ[VARIABLE] = mode if _is_on(mode) and mode else "1"
    try:
        start()
        finder = _installed()
        assert finder is not None
        finder.look()
    except AdoptError:
        if is_first:
            _undo(mode)
        raise


def start() -> None:
    """Install the import hook if the variable asks for it; what the `.pth` file calls at the start of each process."""
    if _is_on(mode := os.environ.get(VARIABLE)) and _installed() is None:
        if mode and mode.strip().lower() not in _WORDS:
            text = "%s=%r: must be 0, 1 or force; taken as 1"
            logging.getLogger(__name__).warning(text, VARIABLE, mode)
        finder = _Finder()
        sys.meta_path.insert(0, finder)
        if _OUR_RTENSOR in sys.modules and finder.look() is not None:
            finder.adapt_rtensor(sys.modules[_OUR_RTENSOR])


def is_asked_for() -> bool:
    """Whether the variable asks for the switch."""
    return _is_on(os.environ.get(VARIABLE))


def is_installed() -> bool:
    """Whether the import hook is there."""
    return _installed() is not None


def find_areal() -> Found | None:
    """Find the AReaL that this process would import, without importing it; None where there is none.

    Raises:
        AdoptError: The switch is on, and AReaL is not one that was checked.
    """
    if (finder := _installed()) is not None:
        return finder.look()
    spec = importlib.util.find_spec("areal")
    folder = None if spec is None else _folder_of(spec)
    return None if folder is None or _is_checkouts(folder) else Found(folder)


class Finding(NamedTuple):
    """One thing that was looked at, for people."""

    what: str
    text: str
    is_good: bool = True


def findings() -> list[Finding]:
    """Look whether the switch works here, without importing AReaL or torch."""
    variable = f"{VARIABLE}={os.environ.get(VARIABLE, '')}"
    try:
        areal = find_areal()
    except AdoptError as error:
        return [Finding("AReaL", str(error), is_good=False)]
    if areal is None:
        return [Finding("AReaL", f"not installed here ({variable})", is_good=not is_asked_for())]
    faults = f"not one that was checked: {'; '.join(areal.faults)}" if areal.faults else "its names were checked"
    found = Finding("AReaL", f"{areal.version} in {areal.folder}, {faults}", is_good=not areal.faults)
    if is_asked_for() and not is_installed():
        text = f"{variable}, but no gpu_cache_areal.pth acts on it here; install the wheel, or call gpu_cache.adopt()"
        return [found, Finding("switch", text, is_good=False)]
    return [found, Finding("switch", f"{'on' if is_installed() else 'off'} ({variable})")]


class Found:
    """An AReaL that can be imported.

    Args:
        folder: The package's folder.
    Attributes:
        version: As its metadata has it.
        faults: Reasons not to replace its modules; empty if there are none.
        has_ray: Whether its handles may be of Ray's object store.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.version = _version_of(folder)
        names = {module: _names_in(folder.parent.joinpath(*module.split(".")).with_suffix(".py")) for module in _NEEDED}
        self.has_ray = "RayRTensorBackend" in (names[_RTENSOR] or ())
        self.faults = [fault for module, found in names.items() for fault in _faults_of(module, found)]


class _Finder:
    """Finds modules under AReaL's names before Python's own finders do. Says once what it did, or could not do."""

    def __init__(self) -> None:
        self._found: Found | None = None
        self._has_looked = self._has_told = False
        self._adapts: dict[str, Callable[[ModuleType], None]] = {
            _CODEC: _handle_codec,
            _LAUNCHER: _forward_variables,
            _OUR_RTENSOR: self.adapt_rtensor,
            **{module: functools.partial(_read_host_memory, method) for module, method in _HOST_READS.items()},
        }

    def find_spec(
        self, name: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        """As `importlib.abc.MetaPathFinder` has it."""
        if name == "areal":
            return self._areal(path, target)
        if name in SERVED and self._found is not None:
            self._tell()
            alias: Any = _Alias(SERVED[name])  # a loader; `importlib.abc` would take longer than all of this
            return importlib.machinery.ModuleSpec(name, alias, origin=SERVED[name])
        if name in self._adapts and self.look() is not None:
            spec = self._beyond(name, path, target)
            if spec is not None and spec.loader is not None:
                adapting: Any = _Adapting(spec.loader, self._adapts[name])
                spec.loader = adapting
            return spec
        return None

    def look(self) -> Found | None:
        """Find AReaL without importing it; None if there is none, or only the names that a checkout of ours has.

        Raises:
            AdoptError: It is not one that was checked.
        """
        if not self._has_looked:
            self._areal(None, None)
        return self._found

    def adapt_rtensor(self, module: ModuleType) -> None:
        """Let pickles and class paths of our handles name AReaL's module, which every peer has."""
        for name in ("RTensor", "TensorShardInfo"):
            getattr(module, name).__module__ = _RTENSOR
        if self._found is not None:
            decided = {"may_use_ray": self._found.has_ray, "takes_any_address": True}
            sys.modules["gpu_cache.rpc.runtime"].__dict__.update(decided)

    def _areal(self, path: Sequence[str] | None, target: ModuleType | None) -> importlib.machinery.ModuleSpec | None:
        spec = self._beyond("areal", path, target)
        if not self._has_looked:
            self._has_looked = True
            self._judge(spec)
        elif self._found is None or spec is None or _folder_of(spec) != self._found.folder:
            self._judge(spec)  # the path has changed since
        return spec

    def _judge(self, spec: importlib.machinery.ModuleSpec | None) -> None:
        """Look at what would be imported as `areal`."""
        self._found = None
        folder = None if spec is None else _folder_of(spec)
        if folder is None or _is_checkouts(folder):
            self._tell_of_none(folder)
            return
        found = Found(folder)
        if found.faults and os.environ.get(VARIABLE) != "force":
            self._has_looked = False
            raise AdoptError(
                f"{VARIABLE}: AReaL {found.version} in {folder} is not one that was checked ({CHECKED_VERSIONS}): "
                f"{'; '.join(found.faults)}. Unset {VARIABLE}, or set it to force to use it nevertheless",
                name="areal",
            )
        self._found = found

    def _beyond(
        self, name: str, path: Sequence[str] | None, target: ModuleType | None
    ) -> importlib.machinery.ModuleSpec | None:
        """The spec that the other finders find."""
        for finder in sys.meta_path:
            find = getattr(finder, "find_spec", None)
            if finder is not self and find is not None and (spec := find(name, path, target)) is not None:
                assert isinstance(spec, importlib.machinery.ModuleSpec)
                return spec
        return None

    def _tell(self) -> None:
        """Say what is replaced, when the first of it is."""
        if not self._has_told and self._found is not None:
            self._has_told = True
            _areals_logger().info(
                "AReaL %s uses gpu_cache %s: %s replaced, %s and %s adapted%s",
                self._found.version, sys.modules["gpu_cache"].__version__, " and ".join(SERVED), _CODEC, _LAUNCHER,
                f" (forced, in spite of: {'; '.join(self._found.faults)})" if self._found.faults else "",
            )  # fmt: skip

    def _tell_of_none(self, folder: Path | None) -> None:
        if not self._has_told:
            self._has_told = True
            only = "" if folder is None else f"; the areal in {folder} is a checkout's list of our own names"
            logging.getLogger(__name__).warning("%s is set, but AReaL is not installed here%s", VARIABLE, only)


class _Alias:
    """Loads a module by putting another one, that has its own name too, in its place."""

    def __init__(self, of: str) -> None:
        self._of = of

    def create_module(self, spec: importlib.machinery.ModuleSpec) -> None:
        return None

    def exec_module(self, module: ModuleType) -> None:
        # The import system returns what is in sys.modules when this ends.
        sys.modules[module.__name__] = importlib.import_module(self._of)


class _Adapting:
    """Loads a module as its own loader does, which it gives back, and then changes something in it."""

    def __init__(self, loader: Any, adapt: Callable[[ModuleType], None]) -> None:
        self._loader, self._adapt = loader, adapt

    def __getattr__(self, name: str) -> Any:
        return getattr(self._loader, name)

    def create_module(self, spec: importlib.machinery.ModuleSpec) -> ModuleType | None:
        made: ModuleType | None = self._loader.create_module(spec)
        return made

    def exec_module(self, module: ModuleType) -> None:
        module.__loader__ = self._loader
        if module.__spec__ is not None:
            module.__spec__.loader = self._loader
        self._loader.exec_module(module)
        self._adapt(module)


def _areals_logger() -> logging.Logger:
    """A logger of AReaL's: its log shows no others."""
    try:
        made: logging.Logger = importlib.import_module(_LOGGING).getLogger("gpu_cache")
    except (ImportError, AttributeError):  # a forced AReaL may lack the name
        return logging.getLogger(__name__)
    return made


def _keep_handles_small(codec: ModuleType) -> None:
    """AReaL's serializer sends the fields of a dataclass; of a handle, what our own codec would send."""
    original = codec.SerializedDataclass.from_dataclass.__func__

    def from_dataclass(cls: Any, dataclass_instance: Any) -> Any:
        fields = getattr(type(dataclass_instance), "__wire_fields__", None)
        described = original(cls, dataclass_instance)
        if fields is not None:
            described.data = fields(dataclass_instance)
        return described

    codec.SerializedDataclass.from_dataclass = classmethod(from_dataclass)


def _handle_codec(codec: ModuleType) -> None:
    """Let AReaL's codec, which looks its two functions up for each value inside, use ours for handles.

    The outermost container is walked without cyclic collections, which thousands of handles would set off.
    """
    _keep_handles_small(codec)
    ours = importlib.import_module(_OUR_RTENSOR)
    pause = importlib.import_module("gpu_cache.process").no_collections
    serialize, deserialize = codec.serialize_value, codec.deserialize_value
    handle_kind, to_json, from_json = ours.RTensor, ours.handle_to_json, ours.handle_from_json

    @functools.wraps(serialize)
    def serialize_value(value: Any) -> Any:
        if type(value) is handle_kind and (described := to_json(value)) is not None:
            return described
        with pause if isinstance(value, _CONTAINERS) and not pause.is_entered else _nothing:
            return serialize(value)

    @functools.wraps(deserialize)
    def deserialize_value(value: Any) -> Any:
        if type(value) is dict and "class_path" in value and (handle := from_json(value)) is not None:
            return handle
        with pause if isinstance(value, _CONTAINERS) and not pause.is_entered else _nothing:
            return deserialize(value)

    codec.__dict__.update(serialize_value=serialize_value, deserialize_value=deserialize_value)


def _forward_variables(launcher: ModuleType) -> None:
    """AReaL's launchers hand a list of variables on; add ours to it."""
    original = launcher.get_env_vars

    def get_env_vars(*args: Any, **kwargs: Any) -> dict[str, str]:
        ours = {
            name: value for name, value in os.environ.items() if name.startswith(_FORWARDED) or name in _FORWARDED_TOO
        }
        return {**ours, **original(*args, **kwargs)}

    get_env_vars.__doc__, get_env_vars.__wrapped__ = original.__doc__, original  # type: ignore[attr-defined]
    launcher.get_env_vars = get_env_vars  # type: ignore[attr-defined]


def _read_host_memory(method: str, module: ModuleType) -> None:
    """Let a coroutine method read host memory, where the cache is on a device; one that is not there does not read."""
    owner, _, name = method.partition(".")
    kind = getattr(module, owner, None)
    original = getattr(kind, name, None)
    if original is None:
        return
    host_reads = importlib.import_module("gpu_cache.rpc.runtime").host_reads

    @functools.wraps(original)
    async def read(*args: Any, **kwargs: Any) -> Any:
        with host_reads():
            return await original(*args, **kwargs)

    setattr(kind, name, read)


def _installed() -> _Finder | None:
    return next((finder for finder in sys.meta_path if isinstance(finder, _Finder)), None)


def _is_on(mode: str | None) -> bool:
    return bool(mode and mode.strip()) and not is_off(mode)


def _undo(mode: str | None) -> None:
    """Leave this process as it was before `adopt`."""
    sys.meta_path[:] = [finder for finder in sys.meta_path if not isinstance(finder, _Finder)]
    if mode is None:
        del os.environ[VARIABLE]
    else:
        os.environ[VARIABLE] = mode


def _check_is_early() -> None:
    early = [name for name in (*SERVED, _CODEC, _LAUNCHER) if name in sys.modules and not _is_ours(sys.modules[name])]
    if early:
        users = ", ".join(_users_of_areal()) or "no module that is loaded now"
        raise AdoptError(
            f"gpu_cache.adopt() comes too late: {' and '.join(early)} {'is' if len(early) == 1 else 'are'} imported "
            f"already, and used by {users}. Call it before the first import of areal, or start the program with "
            f"{VARIABLE}=1",
            name=early[0],
        )


def _is_ours(module: ModuleType) -> bool:
    return module.__name__.startswith("gpu_cache.")


def _users_of_areal() -> list[str]:
    """Modules that have something of AReaL's among their names: its own only if no other has."""
    users = [
        name
        for name, module in list(sys.modules.items())
        if any(_is_areals(value) for value in list(getattr(module, "__dict__", {}).values()))
    ]
    return [name for name in users if name.partition(".")[0] not in ("areal", "__mp_main__")] or users[:1]


def _is_areals(value: object) -> bool:
    """Whether AReaL defines a module, a class, a function, or an object's class; asks no object, which may answer."""
    kind = type(value)
    if issubclass(kind, ModuleType):
        home = vars(value).get("__name__")
    else:
        home = value.__module__ if issubclass(kind, type) or kind is FunctionType else kind.__module__
    return isinstance(home, str) and home.partition(".")[0] == "areal"


def _folder_of(spec: importlib.machinery.ModuleSpec) -> Path | None:
    """A regular package's folder; a folder without `__init__.py` is none."""
    return Path(spec.origin).parent if spec.origin and spec.submodule_search_locations else None


def _is_checkouts(folder: Path) -> bool:
    """Whether it is the package of this project's checkout, which has AReaL's names for our modules, and no servers."""
    return folder.parent == Path(__file__).parents[2] and not (folder / "infra" / "rpc" / "guard").exists()


def _version_of(folder: Path) -> str:
    """The version in the name of the metadata beside it; a checkout has none."""
    found = next(iter(folder.parent.glob("areal-*.dist-info")), None)
    return "(a checkout)" if found is None else found.name.removeprefix("areal-").removesuffix(".dist-info")


def _names_in(source: Path) -> set[str] | None:
    """The public names that a module's source defines, and the public methods of its classes; None if there is none."""
    try:
        tree = ast.parse(source.read_bytes())
    except (OSError, SyntaxError):
        return None
    return {name for node in tree.body for name in _defined_by(node)}


def _defined_by(node: ast.stmt) -> Iterator[str]:
    if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef) and not node.name.startswith("_"):
        yield node.name
    elif isinstance(node, ast.ClassDef) and not node.name.startswith("_"):
        yield node.name
        yield from (f"{node.name}.{name}" for child in node.body for name in _functions(child))
    elif isinstance(node, ast.Assign):
        yield from (one.id for one in node.targets if isinstance(one, ast.Name) and not one.id.startswith("_"))


def _functions(node: ast.stmt) -> Iterator[str]:
    if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef) and not node.name.startswith("_"):
        yield node.name


def _faults_of(module: str, found: set[str] | None) -> Iterator[str]:
    """Names that a module of AReaL's lacks, or has beyond those of ours."""
    if found is None:
        yield f"{module} is missing"
        return
    if missing := sorted(_NEEDED[module] - found):
        yield f"{module} has no {', '.join(missing)}"
    if unknown := sorted(found - _KNOWN.get(module, found)):
        yield f"{module} has {', '.join(unknown)}, which {SERVED[module]} has not"
