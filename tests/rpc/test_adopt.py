"""The switch, with a package that has the names that AReaL has and nothing else: nothing here needs AReaL."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.scripts  # whole processes, some seconds each

ROOT = Path(__file__).parents[2]
PTH = (ROOT / "gpu_cache_areal.pth").read_text().strip()

# An editable install of a checkout brings its own `areal`.
ALONE = """
import os, sys
sys.path[1:] = [one for one in sys.path if one == os.getcwd() or not os.path.isdir(f"{one}/areal")]
sys.meta_path[:] = [one for one in sys.meta_path if "editable" not in getattr(one, "__module__", "")]
"""
HANDLES = """
class TensorShardInfo: pass
class RTensorBackend: pass
class HttpRTensorBackend: pass
class RayRTensorBackend: pass
class RTensor:
    def shape(self): pass
    def dtype(self): pass
    def device(self): pass
    def ndim(self): pass
    def to_local(self): pass
    def localize(obj): pass
    def remotize(obj, node_addr): pass
    def collect_shards(obj): pass
    async def clear_node(node_addr, shard_ids): pass
def get_backend(): pass
def set_backend(backend): pass
def clear_fetch_buffer(ids=None): pass
def fetch_buffer_stats(): pass
def flatten_shard_ids(obj): pass
def store(id, tensor): pass
def fetch(id): pass
def remove(id): pass
def storage_stats(): pass
"""
CODEC = """
import dataclasses
class SerializedDataclass:
    @classmethod
    def from_dataclass(cls, one):
        made = cls()
        made.data = {field.name: getattr(one, field.name) for field in dataclasses.fields(one)}
        return made
def serialize_value(value): return SerializedDataclass.from_dataclass(value).data
def deserialize_value(value): pass
"""
LAUNCHER = """
def get_env_vars(more=None): return {"ITS": "own", "GPU_CACHE_POOL_BYTES": "theirs"} if more else {"ITS": "own"}
"""
LOGGING = """
import logging
logging.basicConfig(level="INFO", format="%(levelname)s %(message)s")
getLogger = logging.getLogger
"""
MODULES = {
    "__init__": "import areal.infra",
    "infra/__init__": "from areal.infra.rpc.rtensor import RTensor",
    "infra/rpc/__init__": "from .rtensor import RTensor\nfrom .serialization import serialize_value",
    "infra/rpc/rtensor": HANDLES,
    "infra/rpc/serialization": CODEC,
    "infra/rpc/guard/__init__": "",
    "infra/rpc/guard/data_blueprint": "data_bp = 'theirs'",
    "infra/utils/__init__": "",
    "infra/utils/launcher": LAUNCHER,
    "utils/__init__": "",
    "utils/logging": LOGGING,
}
SAID = (
    "INFO AReaL 1.0.4 uses gpu_cache 0.1.0: areal.infra.rpc.rtensor and areal.infra.rpc.guard.data_blueprint replaced, "
    "areal.infra.rpc.serialization and areal.infra.utils.launcher adapted\n"
)


@pytest.fixture
def site(tmp_path: Path) -> Path:
    """A folder from which both packages are imported."""
    (tmp_path / "gpu_cache").symlink_to(ROOT / "gpu_cache")
    (tmp_path / "areal-1.0.4.dist-info").mkdir()
    for name, text in MODULES.items():
        path = tmp_path / "areal" / f"{name}.py"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return tmp_path


def run(site: Path, code: str, **variables: str) -> subprocess.CompletedProcess[str]:
    """Run a program in a process that begins as one does where the wheel is installed."""
    of_tests = ("GPU_CACHE_AREAL", "GPU_CACHE_NATIVE")
    environment = {name: value for name, value in os.environ.items() if name not in of_tests}
    environment |= {"PYTHONPATH": str(site), **variables}
    command = [sys.executable, "-W", "error", "-c", f"{ALONE}\n{PTH}\n{code}"]
    return subprocess.run(command, capture_output=True, text=True, env=environment, cwd=site, timeout=120)


def printed(site: Path, code: str, **variables: str) -> str:
    done = run(site, code, **variables)
    assert done.returncode == 0, done.stderr
    return done.stdout


def complaint(done: subprocess.CompletedProcess[str]) -> str:
    """The last line of a program that failed."""
    assert done.returncode == 1
    return done.stderr.splitlines()[-1]


def test_with_the_switch_both_names_are_one_module_and_handles_name_areals(site: Path) -> None:
    code = """
import areal.infra.rpc.rtensor as theirs, areal.infra.rpc, gpu_cache.rpc.rtensor as ours, pickle, torch
from unittest import mock
assert theirs is ours is areal.infra.rpc.rtensor
assert areal.infra.RTensor is areal.infra.rpc.RTensor is ours.RTensor
handle = ours.RTensor(ours.TensorShardInfo("a", "h:1"), torch.ones(1000))
text = pickle.dumps(handle)
assert b"areal.infra.rpc.rtensor" in text and b"gpu_cache" not in text and len(text) < 500
assert pickle.loads(text).shard == handle.shard
from areal.infra.rpc.serialization import deserialize_value, serialize_value
assert areal.infra.rpc.serialize_value is serialize_value, "also where it was imported before"
described = serialize_value(handle)
assert described["data"]["data"]["data"] is None, "a localized handle stays small"
back = deserialize_value(described)
assert type(back) is ours.RTensor and back.shard == handle.shard and back.data.is_meta and back.shape == (1000,)
assert deserialize_value({"class_path": "x"}) is deserialize_value(7) is None, "theirs has the rest"
opaque = ours.RTensor(ours.TensorShardInfo(object(), ""), torch.ones(3))
assert serialize_value(opaque)["data"].is_meta, "theirs has ids that are no text"
assert areal.infra.rpc.serialize_value(handle.shard) == {"shard_id": "a", "node_addr": "h:1"}
for name in ("fetch", "get_backend", "_storage", "_storage_stats", "_fetch_buffer", "HttpRTensorBackend"):
    with mock.patch(f"areal.infra.rpc.rtensor.{name}") as patched:
        assert getattr(ours, name) is patched
"""
    done = run(site, code, GPU_CACHE_AREAL="1")
    assert (done.returncode, done.stderr) == (0, SAID)


def test_without_the_variable_nothing_is_imported_and_areal_is_its_own(site: Path) -> None:
    code = """
import sys
assert "gpu_cache" not in sys.modules
import areal.infra.rpc.rtensor
assert "gpu_cache" not in sys.modules and areal.infra.rpc.rtensor.__name__ == "areal.infra.rpc.rtensor"
"""
    assert run(site, code).stderr == run(site, code, GPU_CACHE_AREAL="0").stderr == ""


def test_a_word_that_the_switch_does_not_know_is_warned_of(site: Path) -> None:
    done = run(site, "import areal", GPU_CACHE_AREAL="focre")
    assert done.stderr.splitlines()[0] == "GPU_CACHE_AREAL='focre': must be 0, 1 or force; taken as 1"
    yes, one = (run(site, "import areal", GPU_CACHE_AREAL=said).stderr for said in ("yes", "1"))
    assert yes == one


def test_a_call_as_the_first_line_switches_this_process_and_its_children(site: Path) -> None:
    child = f"{PTH}\nimport areal, sys; print(sys.modules['areal.infra.rpc.rtensor'].__name__)"
    code = f"""
import gpu_cache
gpu_cache.adopt()
gpu_cache.adopt()
import areal, subprocess, sys
assert areal.infra.RTensor.__module__ == "areal.infra.rpc.rtensor"
assert sys.modules["areal.infra.rpc.rtensor"].__name__ == "gpu_cache.rpc.rtensor"
print(subprocess.check_output([sys.executable, "-c", {child!r}], text=True), end="")
"""
    assert printed(site, code) == "gpu_cache.rpc.rtensor\n"


def test_handles_that_were_imported_before_the_call_name_areals_module_after_it(site: Path) -> None:
    code = """
import gpu_cache.rpc
handle = gpu_cache.rpc.RTensor
gpu_cache.adopt()
import areal
assert areal.infra.RTensor is handle and handle.__module__ == "areal.infra.rpc.rtensor"
"""
    printed(site, code)


def test_a_late_call_names_the_import_that_came_first(site: Path) -> None:
    (site / "users.py").write_text("from areal.infra.rpc import RTensor\n")
    code = """
import users, gpu_cache, os
try:
    gpu_cache.adopt()
finally:
    assert "GPU_CACHE_AREAL" not in os.environ
"""
    assert complaint(run(site, code)) == (
        "gpu_cache.rpc.adopt.AdoptError: gpu_cache.adopt() comes too late: areal.infra.rpc.rtensor and "
        "areal.infra.rpc.serialization are imported already, and used by users. Call it before the first import of "
        "areal, or start the program with GPU_CACHE_AREAL=1"
    )


@pytest.mark.parametrize("is_called", [False, True], ids=["variable", "call"])
def test_an_areal_with_other_names_is_refused_and_the_names_are_told(site: Path, is_called: bool) -> None:
    (site / "areal/infra/rpc/rtensor.py").write_text(HANDLES.replace("store(", "keep("))
    (site / "areal/infra/utils/launcher.py").unlink()
    code = "import gpu_cache\ngpu_cache.adopt()" if is_called else "import areal"
    said = complaint(run(site, code, **({} if is_called else {"GPU_CACHE_AREAL": "1"})))
    assert said == (
        f"gpu_cache.rpc.adopt.AdoptError: GPU_CACHE_AREAL: AReaL 1.0.4 in {site}/areal is not one that was checked "
        "(1.0.4 and the checkout of 22 August 2026): areal.infra.rpc.rtensor has no store; areal.infra.rpc.rtensor has "
        "keep, which gpu_cache.rpc.rtensor has not; areal.infra.utils.launcher is missing. Unset GPU_CACHE_AREAL, or "
        "set it to force to use it nevertheless"
    )


def test_an_areal_with_other_names_can_be_forced(site: Path) -> None:
    (site / "areal/infra/rpc/rtensor.py").write_text(f"{HANDLES}\ndef evict(): pass\n")
    code = "import areal, sys; print(sys.modules['areal.infra.rpc.rtensor'].__name__)"
    done = run(site, code, GPU_CACHE_AREAL="force")
    assert done.stdout == "gpu_cache.rpc.rtensor\n"
    assert (
        "(forced, in spite of: areal.infra.rpc.rtensor has evict, which gpu_cache.rpc.rtensor has not)" in done.stderr
    )


@pytest.mark.parametrize("code", ["import gpu_cache\ngpu_cache.adopt()", "import gpu_cache.rpc.rtensor"])
def test_where_areal_is_missing_one_line_says_so_and_nothing_breaks(site: Path, code: str) -> None:
    (site / "areal").rename(site / "elsewhere")
    more = "\nfrom gpu_cache.rpc import RTensor\nassert RTensor.__module__ == 'gpu_cache.rpc.rtensor'"
    done = run(site, code + more, **({} if "adopt" in code else {"GPU_CACHE_AREAL": "1"}))
    assert (done.returncode, done.stderr) == (0, "GPU_CACHE_AREAL is set, but AReaL is not installed here\n")


def test_the_names_of_a_checkout_are_no_areal(site: Path) -> None:
    code = """
import areal.infra.rpc.rtensor, areal.infra.rpc.serialization, gpu_cache.rpc.rtensor as ours
assert areal.infra.rpc.rtensor is ours
assert areal.infra.rpc.serialization.__name__ == "gpu_cache.rpc.wire.serialization"
"""
    done = run(ROOT, code, GPU_CACHE_AREAL="1")
    assert done.returncode == 0
    said = f"but AReaL is not installed here; the areal in {ROOT}/areal is a checkout's list of our own names"
    assert done.stderr.splitlines() == [f"GPU_CACHE_AREAL is set, {said}"]


def test_launchers_hand_on_our_variables_and_the_token_and_theirs_win(site: Path) -> None:
    code = """
from areal.infra.utils.launcher import get_env_vars
print(sorted(get_env_vars().items()), get_env_vars("more")["GPU_CACHE_POOL_BYTES"])
"""
    variables = {"GPU_CACHE_POOL_BYTES": "1GiB", "GPU_CACHE_AREAL": "1", "AREAL_RPC_TOKEN": "s3cret", "OTHER": "1"}
    ours = {"GPU_CACHE_STATS": "0", "ITS": "own"} | variables
    del ours["OTHER"]
    assert printed(site, code, **variables) == f"{sorted(ours.items())} theirs\n"


@pytest.mark.parametrize("has_ray", [True, False])
def test_the_backend_is_rays_only_where_areal_has_one(site: Path, has_ray: bool) -> None:
    if not has_ray:
        text = HANDLES.replace("class RayRTensorBackend: pass\n", "")
        (site / "areal/infra/rpc/rtensor.py").write_text(text)
    code = """
import sys, types
sys.modules["ray"] = types.SimpleNamespace(is_initialized=lambda: True)
import areal
from gpu_cache.rpc.rtensor import get_backend
print(type(get_backend()).__name__)
"""
    assert printed(site, code, GPU_CACHE_AREAL="1") == f"{'Ray' if has_ray else 'Http'}RTensorBackend\n"


def test_sources_of_a_served_module_can_be_looked_at(site: Path) -> None:
    code = """
import inspect, areal.infra.rpc.rtensor, areal.infra.rpc.serialization as codec
assert "handle" in inspect.getsource(areal.infra.rpc.rtensor.RTensor)
assert codec.__spec__.loader is codec.__loader__ and "class" in codec.__loader__.get_source(codec.__name__)
"""
    printed(site, code, GPU_CACHE_AREAL="1")
