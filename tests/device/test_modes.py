"""Every tensor of ours is what it should be, whatever mode the caller's thread is in."""

from __future__ import annotations

import ast
import contextlib
import subprocess
import sys
import textwrap
import threading
from collections.abc import Callable, Hashable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.overrides import BaseTorchFunctionMode, TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from gpu_cache import CacheConfig, TensorCache
from gpu_cache.rpc import rtensor, runtime
from gpu_cache.rpc.rtensor import RTensor, get_backend
from gpu_cache.rpc.server import main as rpc_server
from gpu_cache.rpc.wire.frame import Frame, decode_frame
from gpu_cache.rpc.wire.serialization import deserialize_value, serialize_value
from tests.support.areal_fixtures import remote
from tests.support.fake_owner import FakeOwner
from tests.support.fault_server import FaultServer, json_of, whole
from tests.support.sources import DictSource, same_bytes

ROOT = Path(__file__).parents[2]
# They take a device, and make a tensor on the default one if they get none.
FACTORIES = {
    "arange", "as_tensor", "asarray", "empty", "empty_permuted", "empty_strided", "eye", "full", "linspace", "ones",
    "rand", "randint", "randn", "randperm", "range", "scalar_tensor", "tensor", "zeros",
}  # fmt: skip
TENSORS = {
    "floats": torch.randn(5, 3),
    "halves": torch.randn(7).bfloat16(),
    "numbers": torch.arange(4),
    "nothing": torch.ones(0, 2),
    "number": torch.tensor(3.5),
}
MASK = torch.tensor([[True, False], [True, False]])


@contextlib.contextmanager
def default_device(name: str) -> Iterator[None]:
    torch.set_default_device(name)
    try:
        yield
    finally:
        torch.set_default_device(None)


@contextlib.contextmanager
def default_dtype() -> Iterator[None]:
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


@contextlib.contextmanager
def deterministic() -> Iterator[None]:
    torch.use_deterministic_algorithms(True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(False)


class RefusingMode(TorchDispatchMode):
    """No operation of ours may come by here."""

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), options: Any = None) -> Any:
        raise AssertionError(f"{function} was called inside the caller's mode")


class RefusingFunctions(TorchFunctionMode):
    """No function of torch may be called by us where the mode sees it, and least of all under a lock."""

    def __torch_function__(self, function: Any, types: Any, args: Any = (), options: Any = None) -> Any:
        raise AssertionError(f"{function} was called inside the caller's mode")


@contextlib.contextmanager
def inside_grad() -> Iterator[None]:
    with torch._functorch.eager_transforms.grad_increment_nesting():  # type: ignore[attr-defined]
        yield


MODES: dict[str, Callable[[], contextlib.AbstractContextManager[Any]]] = {
    "none": contextlib.nullcontext,
    "default device meta": lambda: default_device("meta"),
    "with device meta": lambda: torch.device("meta"),
    "default dtype": default_dtype,
    "deterministic": deterministic,
    "inference": torch.inference_mode,
    "no grad": torch.no_grad,
    "fake tensors": FakeTensorMode,
    "a dispatch mode": RefusingMode,
    "a function mode": BaseTorchFunctionMode,
    "inside grad": inside_grad,
}


def as_it_should_be(got: torch.Tensor, want: torch.Tensor) -> None:
    """To be looked at outside of the mode."""
    assert type(got) is torch.Tensor
    assert not isinstance(got, FakeTensor)
    assert not torch._C._functorch.is_functorch_wrapped_tensor(got)
    assert (got.device.type, got.is_inference(), got.requires_grad) == ("cpu", False, False)
    assert same_bytes(got, want)
    if got.is_floating_point():
        weight = torch.ones(got.shape, dtype=got.dtype, requires_grad=True)
        (got * weight).sum().backward()  # which saves it


def by_wire() -> dict[str, torch.Tensor]:
    return {name: deserialize_value(serialize_value(tensor)) for name, tensor in TENSORS.items()}


def by_frame() -> dict[str, torch.Tensor]:
    return decode_frame(b"".join(map(bytes, Frame(TENSORS.items()))))


def by_remotize() -> dict[str, torch.Tensor]:
    handles = RTensor.remotize({**TENSORS, "attention_mask": MASK}, "me:1")
    return {name: rtensor.fetch(handles[name].shard.shard_id) for name in TENSORS}


def by_own_store() -> dict[str, torch.Tensor]:
    runtime.current().add_own_address("me:1")
    handles = deserialize_value(serialize_value(RTensor.remotize(TENSORS, "me:1")))
    RTensor.prefetch(handles)
    return RTensor.localize(handles)  # type: ignore[no-any-return]


def by_travelling_handles() -> dict[str, torch.Tensor]:
    runtime.current().add_own_address("me:1")
    handles = RTensor.remotize(TENSORS, "me:1")
    RTensor.localize(handles)
    return {name: deserialize_value(serialize_value(handle)).to_local() for name, handle in handles.items()}


def by_views() -> dict[str, torch.Tensor]:
    rtensor._fetch_buffer.update(TENSORS)
    rtensor._storage.update(TENSORS)
    return {name: rtensor._fetch_buffer[name] for name in TENSORS}


def by_cache() -> dict[str, torch.Tensor]:
    cache = runtime.current().cache
    assert cache.put("numbers", TENSORS["numbers"])
    return dict(zip(TENSORS, cache.get_many(list(TENSORS), DictSource(dict(TENSORS))), strict=True))


def by_checksums() -> dict[str, torch.Tensor]:
    runtime.configure(device="cpu", debug_checksum=True, host_tier_bytes=1 << 20)
    by_cache()
    return dict(zip(TENSORS, runtime.current().cache.get_many(list(TENSORS), DictSource(dict(TENSORS))), strict=True))


PATHS = [by_wire, by_frame, by_remotize, by_own_store, by_travelling_handles, by_views, by_cache, by_checksums]


def test_a_cache_calls_no_function_mode() -> None:
    cache = TensorCache(CacheConfig(device="cpu", pool_bytes="8MiB", host_tier_bytes="1MiB", debug_checksum=True))
    source = DictSource(dict(TENSORS))
    with RefusingFunctions():
        cache.put("numbers", TENSORS["numbers"])
        for _ in range(2):
            held = [cache.get_many(list(TENSORS), source, prefer=prefer) for prefer in ("device", "host")]
        assert cache.get("numbers") is not None
        assert len(cache.entries()) == len(TENSORS)
        cache.offload()
        with cache.scope():
            cache.get_many(list(TENSORS), source)
        cache.clear()
    assert all(map(same_bytes, held[0], TENSORS.values()))


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("mode", MODES)
def test_tensors_are_plain_in_any_mode(mode: str, path: Callable[[], dict[str, torch.Tensor]]) -> None:
    with MODES[mode]():
        found = path()
    for name, tensor in TENSORS.items():
        as_it_should_be(found[name], tensor)


@pytest.mark.parametrize("mode", MODES)
def test_modes_of_another_thread_are_ignored_alike(mode: str) -> None:
    found: dict[str, torch.Tensor] = {}

    def run() -> None:
        with MODES[mode]():
            found.update(by_own_store())

    thread = threading.Thread(target=run)
    thread.start()
    thread.join(30)
    for name, tensor in TENSORS.items():
        as_it_should_be(found[name], tensor)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("form", ["binary", "json"])
def test_a_fetch_over_http_ignores_modes(mode: str, form: str) -> None:
    owner = FakeOwner()
    owner.store.update(TENSORS)
    server = rpc_server.start(owner=owner) if form == "binary" else FaultServer(whole(json_of(TENSORS)))
    handles = {name: remote(server.address, name, tensor) for name, tensor in TENSORS.items()}
    with server, MODES[mode]():
        past_the_cache = get_backend().fetch([handle.shard for handle in handles.values()])
        found = RTensor.localize(handles)
    for got, again, want in zip(found.values(), past_the_cache, TENSORS.values(), strict=True):
        as_it_should_be(got, want)
        as_it_should_be(again, want)


FIRST_USE = """
    import torch
    from torch._subclasses.fake_tensor import FakeTensorMode

    tensor = torch.randn(5, 3)
    with torch.inference_mode(), FakeTensorMode(), torch.device("meta"):
        from gpu_cache.rpc.rtensor import RTensor
        from gpu_cache.rpc import runtime

        runtime.current().add_own_address("me:1")
        found = RTensor.localize(RTensor.remotize([tensor], "me:1"))[0]
    assert type(found) is torch.Tensor and not found.is_inference() and torch.equal(found, tensor)
    (found * torch.ones(5, 3, requires_grad=True)).sum().backward()
    runtime.current().cache.clear()
    runtime.current().cache.trim()
"""


def test_a_first_import_within_modes_is_sound() -> None:
    command = [sys.executable, "-W", "error", "-c", textwrap.dedent(FIRST_USE)]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120, check=False)
    assert (result.returncode, result.stderr) == (0, "")


def test_every_tensor_names_its_device_and_its_dtype() -> None:
    found = []
    for path in [*(ROOT / "areal").rglob("*.py"), *(ROOT / "gpu_cache").rglob("*.py")]:
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Call) and (name := called(node.func)):
                given = {keyword.arg for keyword in node.keywords}
                needed = {"dtype"} if name == "frombuffer" else {"device", "dtype"}
                assert needed <= given, f"{path.name}:{node.lineno}: torch.{name} without {needed - given}"
                found.append(name)
    assert len(found) > 5


def called(function: ast.expr) -> str:
    """The factory of torch's that is called, or "" for anything else; `self._empty` is `torch.empty`."""
    if not isinstance(function, ast.Attribute) or not isinstance(function.value, ast.Name):
        return ""
    if function.value.id == "torch" and function.attr in FACTORIES | {"frombuffer"}:
        return function.attr
    return "empty" if (function.value.id, function.attr) == ("self", "_empty") else ""


def test_a_compiled_function_calls_the_cache_and_does_not_trace_it() -> None:
    cache = TensorCache(CacheConfig(device="cpu", pool_bytes="1MiB", prealloc_bytes=0))
    source, found = DictSource({"a": TENSORS["floats"]}), []

    class Watched(DictSource):
        def open(self, keys: Sequence[Hashable], timeout_s: float) -> Any:
            found.append(torch.compiler.is_compiling())
            return source.open(keys, timeout_s)

    def doubled(scale: torch.Tensor) -> torch.Tensor:
        (tensor,) = cache.get_many(["a"], Watched({}))
        return tensor * (scale + 1)

    compiled = torch.compile(doubled, backend="eager")
    for _ in range(2):
        assert same_bytes(compiled(torch.ones(3)), TENSORS["floats"] * 2)
    assert (found, len(source.asked)) == ([False], 1)
    torch.compiler.reset()
    with pytest.raises(torch._dynamo.exc.Unsupported, match=r"get_many"):
        torch.compile(doubled, backend="eager", fullgraph=True)(torch.ones(3))
