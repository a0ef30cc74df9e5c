"""Upstream's JSON form of values: tensors in base64, and a closed table of admitted dataclasses."""

from __future__ import annotations

import binascii
import enum
import functools
import json
import operator
import re
import secrets
from collections.abc import Callable, Iterator
from dataclasses import fields
from reprlib import repr as short_repr
from typing import Any, get_type_hints

import numpy as np
import torch
from torch.nn.parameter import is_lazy

from gpu_cache.device.hostmem import host_tensor
from gpu_cache.device.modes import plain_tensors
from gpu_cache.pool.lease import aliases_of
from gpu_cache.process import no_collections
from gpu_cache.transfer.tensor_reader import lacks_memory

# Dtypes that travel, by the name that follows "torch." on the wire.
DTYPES = {
    str(dtype).removeprefix("torch."): dtype
    for dtype in (
        torch.bool, torch.uint8, torch.uint16, torch.uint32, torch.uint64, torch.int8, torch.int16, torch.int32,
        torch.int64, torch.float16, torch.bfloat16, torch.float32, torch.float64, torch.float8_e4m3fn,
        torch.float8_e4m3fnuz, torch.float8_e5m2, torch.float8_e5m2fnuz, torch.float8_e8m0fnu, torch.complex32,
        torch.complex64, torch.complex128,
    )
}  # fmt: skip
ADMITTED_DTYPES = frozenset(DTYPES.values())
MAX_RANK = 64
_MAX_EXTENT = 2**63 - 1  # torch counts bytes and strides in int64

# Characters decoded at a time; whole groups of four. The one copy of the payload stays in the CPU's cache.
_BASE64_CHUNK = 1 << 20
# Bytes of a tensor encoded at a time; whole groups of three. Other threads wait for the interpreter meanwhile: 3 ms.
_ENCODED_CHUNK = 3 << 20
# A tensor of more bytes takes some milliseconds: too long for a pause of the collector.
_LONG_BYTES = 1 << 20
# JSON that a tensor's text may have beside the base64. Longer texts are not parsed: `json.loads` lets no other thread
# run, and some MiB of "[[],[]..." take it seconds.
_MAX_BESIDE_BYTES = 64 << 10
_DATA_OPENS = re.compile(rb'"data"[ \t\r\n]*:[ \t\r\n]*"')

# The class paths of a handle, and of the shard in it.
HANDLE_PATH, SHARD_PATH = "areal.infra.rpc.rtensor.RTensor", "areal.infra.rpc.rtensor.TensorShardInfo"
ADMITTED_CLASS_PATHS = frozenset({HANDLE_PATH, SHARD_PATH})
# Entered by rtensor.py when it is imported, constant from then on.
_class_of_path: dict[str, type] = {}
_reader_of_path: dict[str, Callable[[dict[str, Any]], Any] | None] = {}
_path_of_class: dict[type, str] = {}
_writer_of_class: dict[type, Callable[[Any], dict[str, Any] | None] | None] = {}

_ONLY = "only tensors, handles and plain JSON values do"
# Upstream's other tagged values, and the fields by which such a value is told from a user's dict with a "type" key.
_REFUSED_TAGS = {
    "ndarray": {"data", "shape", "dtype"},
    "pil_image": {"data"},
    "ray_object_ref": {"data"},
    "tokenizer": {"data", "name_or_path"},
    "processor": {"data", "name_or_path"},
    "torch_dtype": {"value"},
    "enum": {"class_path", "value"},
}


def register_dataclass(
    class_path: str,
    cls: type,
    read: Callable[[dict[str, Any]], Any] | None = None,
    write: Callable[[Any], dict[str, Any] | None] | None = None,
) -> None:
    """Say which class an admitted path stands for.

    A class may define `__wire_fields__(self) -> dict[str, Any]`, sent in the place of its fields.

    Args:
        class_path: As it stands in messages.
        cls: The class.
        read: Builds an instance of a whole tagged value; None from it: the value is read field by field.
        write: Describes an instance as a whole tagged value; None from it: the instance is written field by field.
    Raises:
        ValueError: Not one of `ADMITTED_CLASS_PATHS`.
    """
    if class_path not in ADMITTED_CLASS_PATHS:
        raise ValueError(f"{class_path!r} is not admitted on the wire, only {sorted(ADMITTED_CLASS_PATHS)}")
    _class_of_path[class_path] = cls
    _path_of_class[cls] = class_path
    _reader_of_path[class_path], _writer_of_class[cls] = read, write


def serialize_value(value: Any) -> Any:
    """Turn a value into what `json.dumps` takes: tensors and admitted dataclasses tagged, tuples as lists.

    Raises:
        TypeError: Something in the value does not travel: another class, another dtype, a key that is no string. Says
            where in `value` it is.
    """
    try:
        with no_collections:  # which the objects of thousands of handles would set off
            return _serialize(value)
    except TypeError as error:
        path = _path_of_fault(value, "value")
        raise TypeError(f"{path}: {error}" if path != "value" else str(error)) from None
    finally:
        no_collections.leave()  # whatever interrupted it


def _path_of_fault(value: Any, path: str) -> str:
    """The words that lead to what does not travel, as in `value["mask"][2]`."""
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list | tuple) else ()
    for name, item in items:
        try:
            _serialize(item)
        except TypeError:
            return _path_of_fault(item, f"{path}[{name!r}]")
    return path


def _serialize(value: Any) -> Any:
    if value is None or (isinstance(value, str | int | float) and not isinstance(value, enum.Enum)):
        return value
    if isinstance(value, torch.Tensor):
        return tensor_to_json(value)
    if isinstance(value, dict):
        return _serialize_fields(value)
    if isinstance(value, list | tuple):
        return [_serialize(item) for item in value]
    class_path, write = _path_of_class.get(type(value)), _writer_of_class.get(type(value))
    if class_path is None:
        raise TypeError(f"{_type_name(value)} does not travel, {_ONLY}")
    if write is not None and (written := write(value)) is not None:
        return written
    return {"type": "dataclass", "class_path": class_path, "data": _serialize_fields(_wire_fields(value))}


def _serialize_fields(named: dict[Any, Any]) -> dict[str, Any]:
    for name in named:
        if not isinstance(name, str):
            raise TypeError(f"keys of a dict that travels are strings, not {type(name).__qualname__}: {name!r}")
    return {name: _serialize(value) for name, value in named.items()}


def _type_name(value: object) -> str:
    """The type's name, with its package where that is another one than Python's: numpy's float32 is no dtype here."""
    kind = type(value)
    package = kind.__module__.partition(".")[0]
    return kind.__qualname__ if package in ("builtins", "__main__") else f"{package}.{kind.__qualname__}"


def _wire_fields(instance: Any) -> dict[str, Any]:
    if hasattr(instance, "__wire_fields__"):
        return dict(instance.__wire_fields__())
    return {field.name: getattr(instance, field.name) for field in fields(instance)}


def deserialize_value(value: Any) -> Any:
    """Build what `serialize_value` described. Nothing that the value names is ever imported.

    A dict is a tagged value if its "type" is one of upstream's tags *and* the fields of that tag are there. Any other
    dict is plain data, as for upstream: chat messages have a "type", some with "data" beside it. Only a
    "class_path" gives away a tag that we have not heard of.

    Raises:
        TypeError: A tagged value that does not travel, or a class path that is not admitted; names it.
        ValueError: A tagged value that is broken, or a value that is nested too deeply.
    """
    try:
        with plain_tensors(), no_collections:  # once, as entering costs more than a handle where a mode is active
            return _deserialize(value)
    except RecursionError:
        raise ValueError("the value is nested too deeply") from None
    finally:
        no_collections.leave()  # whatever interrupted it


def _deserialize(value: Any) -> Any:
    if isinstance(value, list):
        return [_deserialize(item) for item in value]
    if not isinstance(value, dict):
        return value
    tag = value.get("type")
    if tag == "tensor" and value.keys() >= {"shape", "dtype"}:
        return _tensor_from_json(value)
    if tag == "dataclass" and value.keys() >= {"class_path", "data"}:
        return _dataclass_from_json(value)
    if isinstance(tag, str) and value.keys() >= _REFUSED_TAGS.get(tag, {"class_path"}):
        raise TypeError(f"values tagged {short_repr(tag)} do not travel, {_ONLY}")
    return {name: _deserialize(item) for name, item in value.items()}


def _dataclass_from_json(value: dict[str, Any]) -> Any:
    class_path, described = value["class_path"], value["data"]
    read = _reader_of_path.get(class_path) if isinstance(class_path, str) else None
    if read is not None and (found := read(value)) is not None:
        return found
    cls = _class_of_path.get(class_path) if isinstance(class_path, str) else None
    if cls is None:
        raise TypeError(
            f"dataclass {class_path!r} is not admitted: only {sorted(ADMITTED_CLASS_PATHS)} are, "
            "once gpu_cache.rpc.rtensor is imported"
        )
    names = {field.name for field in fields(cls)}
    if not isinstance(described, dict) or described.keys() != names:
        raise ValueError(f"a {cls.__name__} has the fields {sorted(names)}, not {short_repr(described)}")
    made = {name: _deserialize(item) for name, item in described.items()}
    for name, kind in _kinds_of(cls).items():
        if not isinstance(made[name], kind):
            raise ValueError(f"{cls.__name__}.{name} is a {kind.__name__}, not {short_repr(made[name])}")
    return cls(**made)


@functools.cache
def _kinds_of(cls: type) -> dict[str, type]:
    """The classes of its fields, but of those that may hold anything."""
    hints = get_type_hints(cls)
    return {field.name: hints[field.name] for field in fields(cls) if hints[field.name] is not Any}


def tensor_to_json(tensor: torch.Tensor) -> dict[str, Any]:
    """Describe a tensor, its bytes in base64; those of a meta tensor are None.

    bfloat16 travels as float32, its own bits in the upper half.

    Raises:
        TypeError: A dtype or layout that does not travel.
    """
    check_travels(tensor)
    text = None
    if not tensor.is_meta:
        _end_pause(tensor.nbytes)
        text = b"".join(_base64(tensor)).decode("ascii")
    return {"type": "tensor", "data": text, "shape": list(tensor.shape), "dtype": str(tensor.dtype)}


def _end_pause(nbytes: int) -> None:
    """Let the collector run while a long tensor is encoded or decoded, and from then on."""
    if nbytes > _LONG_BYTES:
        no_collections.leave()


class TensorText:
    """The text `json.dumps(tensor_to_json(tensor))`; iterating makes it in parts of at most 4 MiB.

    Args:
        tensor: Kept alive; its values of the moment when a part is made are in that part.
    Attributes:
        nbytes: Its length, known before any part is made.
    Raises:
        TypeError: A dtype or layout that does not travel.
    """

    def __init__(self, tensor: torch.Tensor) -> None:
        check_travels(tensor)
        self._tensor = tensor
        quote = "" if tensor.is_meta else '"'
        self._head = f'{{"type": "tensor", "data": {quote or "null"}'.encode()
        self._tail = f'{quote}, "shape": {list(tensor.shape)}, "dtype": "{tensor.dtype}"}}'.encode()
        num_bytes = 0 if tensor.is_meta else tensor.nbytes * (1 + (tensor.dtype is torch.bfloat16))
        self.nbytes = len(self._head) + -(-num_bytes // 3) * 4 + len(self._tail)

    def __iter__(self) -> Iterator[bytes]:
        yield self._head
        if not self._tensor.is_meta:
            yield from _base64(self._tensor)
        yield self._tail


def _base64(tensor: torch.Tensor) -> Iterator[bytes]:
    """The tensor's bytes in base64, in parts that can be joined."""
    with plain_tensors():
        memory, is_narrow = host_bytes(tensor), tensor.dtype is torch.bfloat16
    step = _ENCODED_CHUNK // 2 if is_narrow else _ENCODED_CHUNK
    for start in range(0, len(memory), step):
        chunk = memory[start : start + step]
        yield binascii.b2a_base64(_widened(chunk) if is_narrow else chunk, newline=False)


def _widened(memory: memoryview) -> bytes:
    """bfloat16 as float32, whose upper half it is; by bits, as a conversion would quieten signalling NaNs."""
    halves = np.zeros((len(memory) // 2, 2), np.uint16)
    halves[:, 1] = np.frombuffer(memory, np.uint16)
    return halves.tobytes()


def tensor_from_text(text: bytes | bytearray) -> torch.Tensor:
    """Build the tensor of a JSON text, as `tensor_from_json` does. The base64 in a long text is found, not parsed.

    Raises:
        ValueError: Not JSON, not a tensor, or more than 64 KiB of JSON beside the base64.
        RecursionError: It is nested too deeply.
    """
    if len(text) <= _MAX_BESIDE_BYTES:
        return tensor_from_json(json.loads(text))
    opening = _DATA_OPENS.search(text, 0, _MAX_BESIDE_BYTES)
    start = opening.end() if opening else 0
    end = text.find(b'"', start) if opening else 0
    if end < 0 or len(text) - (end - start) > _MAX_BESIDE_BYTES:
        raise ValueError(
            f"not a tensor: {len(text):,} bytes of JSON, and at most {_MAX_BESIDE_BYTES:,} may stand beside its data"
        )
    mark = secrets.token_hex(16)  # no other text can hold it: it marks where the base64 was
    described = json.loads(text[:start] + mark.encode() + text[end:])
    if not isinstance(described, dict) or described.get("data") != mark:
        raise ValueError(f"not a tensor: the long text in {len(text):,} bytes of JSON is not its data")
    with memoryview(text)[start:end] as data:
        return tensor_from_json(described, data)


def tensor_from_json(described: object, data: memoryview | None = None) -> torch.Tensor:
    """Build the tensor that `tensor_to_json` described: on the host, writable, owning its memory; or on meta.

    Every number is checked before anything is allocated.

    Args:
        described: The JSON description.
        data: The base64, if it is not in `described`.
    Raises:
        ValueError: Not a tensor, or its shape, dtype and bytes do not fit together.
    """
    with plain_tensors():
        return _tensor_from_json(described, data)


def _tensor_from_json(described: object, data: memoryview | None = None) -> torch.Tensor:
    if not isinstance(described, dict) or described.get("type") != "tensor":
        raise ValueError(f"not a tensor: {short_repr(described)}")
    dtype = _named_dtype(described.get("dtype"))
    is_narrow = dtype is torch.bfloat16
    shape, nbytes = checked_shape(described.get("shape"), 4 if is_narrow else dtype.itemsize)
    text = described.get("data") if data is None else data
    if text is None:
        return torch.empty(shape, dtype=dtype, device="meta")
    flat = _decoded(text, nbytes)
    if is_narrow:
        # Little-endian: the upper half of each float32 is the odd one.
        flat = flat.view(torch.int16)[1::2].clone(memory_format=torch.contiguous_format)
    return flat.view(dtype).view(shape)


def _named_dtype(name: object) -> torch.dtype:
    dtype = DTYPES.get(name.removeprefix("torch.")) if isinstance(name, str) else None
    if dtype is None:
        raise ValueError(f"{short_repr(name)} is not a dtype that travels")
    return dtype


def _decoded(text: object, nbytes: int) -> torch.Tensor:
    """The bytes of a base64 text as a new uint8 tensor; the length is checked first."""
    num_chars = -(-nbytes // 3) * 4
    if not isinstance(text, str | memoryview) or len(text) != num_chars:
        found = f"{len(text):,} characters" if isinstance(text, str | memoryview) else type(text).__qualname__
        raise ValueError(f"{nbytes:,} bytes need {num_chars:,} characters of base64, got {found}")
    flat = host_tensor(nbytes)
    target = flat.numpy().data
    _end_pause(nbytes)
    for start in range(0, num_chars, _BASE64_CHUNK):
        place = target[start // 4 * 3 : (start + _BASE64_CHUNK) // 4 * 3]
        try:
            # Padding in the wrong place makes a piece shorter than its place, which the assignment refuses.
            place[:] = binascii.a2b_base64(text[start : start + _BASE64_CHUNK], strict_mode=True)
        except ValueError as error:
            raise ValueError(f"bad base64 near character {start:,} of {num_chars:,}: {error}") from error
    return flat


def checked_shape(shape: object, itemsize: int) -> tuple[tuple[int, ...], int]:
    """The shape that a JSON list stands for, and the bytes of a tensor of that shape.

    Raises:
        ValueError: Not a shape that torch could hold: rank, signs, types (True is no length), overflow.
    """
    if not isinstance(shape, list) or len(shape) > MAX_RANK:
        raise ValueError(f"a shape is a list of at most {MAX_RANK} lengths, not {short_repr(shape)}")
    nbytes = extent = itemsize
    for length in shape:
        if type(length) is not int or length < 0:
            raise ValueError(f"{short_repr(length)} is not a length, in the shape {short_repr(shape)}")
        nbytes *= length
        extent *= length or 1  # torch computes the strides of empty tensors this way
        if extent > _MAX_EXTENT:
            raise ValueError(f"the shape {short_repr(shape)} exceeds {_MAX_EXTENT:,} bytes")
    return tuple(shape), nbytes


def check_travels(tensor: torch.Tensor) -> None:
    """Refuse what has no bytes that another process could read as the same tensor.

    Raises:
        TypeError: A dtype that does not travel, or not a plain dense tensor.
    """
    if fault := _fault_of(tensor):
        raise TypeError(fault)


def check_stored(tensor: object) -> None:
    """Refuse what others could not fetch, if it was stored: what does not travel, and what has no values.

    Raises:
        TypeError: It is one of these, or no tensor; the message names it and the remedy.
    """
    if not isinstance(tensor, torch.Tensor):
        raise TypeError(f"a Tensor is expected, not {_type_name(tensor)}")
    check_travels(tensor)
    if tensor.is_meta:
        raise TypeError("a meta tensor has no values; store one that has")


def _fault_of(tensor: torch.Tensor) -> str:
    """The reason why a tensor cannot travel, and what to do; "" if it can."""
    kind, dtype = type(tensor), tensor.dtype
    if torch._C._functorch.is_functorch_wrapped_tensor(tensor) or torch._is_functional_tensor(tensor):
        return (
            "tensors inside torch.func (grad, vmap, jvp) do not travel; return it from the transformed function first"
        )
    if is_lazy(tensor):
        return "the parameter has no values yet; call its lazy module first"
    if tensor.is_nested:
        return "only dense tensors travel, not nested ones; call to_padded_tensor() first"
    if kind.__torch_dispatch__ is not torch.Tensor.__torch_dispatch__:
        remedy = "call full_tensor()" if kind.__name__ == "DTensor" else "make a plain tensor of it"
        return f"only plain tensors travel, not {kind.__name__}; {remedy} first"
    if tensor.layout is not torch.strided:
        return f"only dense tensors travel, not {tensor.layout}; call to_dense() first"
    if dtype not in ADMITTED_DTYPES:
        remedy = "call dequantize()" if tensor.is_quantized else "call view(torch.uint8)"
        return f"tensors of {dtype} do not travel; {remedy} first"
    if tensor.ndim > MAX_RANK:
        return f"tensors of rank {tensor.ndim} do not travel, the limit is {MAX_RANK}; reshape() it first"
    if not tensor.is_meta and lacks_memory(tensor):
        return "the tensor's memory was given back, as FSDP does with a parameter between uses; gather it first"
    return ""


def host_bytes(tensor: torch.Tensor) -> memoryview:
    """The tensor's bytes in C order; its own memory if that is dense, on the host and free of lazy conjugation."""
    plain = tensor.detach().cpu().resolve_conj().resolve_neg().contiguous()
    return dense_bytes(plain.clone() if plain._is_zerotensor() else plain)


def is_dense(tensor: torch.Tensor) -> bool:
    """Whether its bytes lie in C order on the host: no lazy conjugation, no tensor of zeros without memory."""
    # By its keys: `is_conj`, `is_neg` and `_is_zerotensor` give the GIL away.
    is_lazy_one = torch._C._dispatch_keys(tensor).raw_repr() & _LAZY_KEYS
    return tensor.is_cpu and tensor.is_contiguous() and not is_lazy_one


_LAZY_KEYS = functools.reduce(
    operator.or_,
    (torch._C.DispatchKeySet(key).raw_repr() for key in (
        torch._C.DispatchKey.Conjugate, torch._C.DispatchKey.Negative, torch._C.DispatchKey.ZeroTensor
    )),
)  # fmt: skip


def dense_bytes(tensor: torch.Tensor) -> memoryview:
    """The bytes of a tensor that `is_dense`. From now on torch refuses to resize its storage, which would free them."""
    if tensor.untyped_storage().resizable():
        with plain_tensors():
            tensor.detach().as_strided((0,), (1,)).view(torch.uint8).numpy()
    return bytes_for_now(tensor)


def bytes_for_now(tensor: torch.Tensor) -> memoryview:
    """The bytes of a tensor that `is_dense`, until its storage is resized.

    It calls none of torch's operators, which give the GIL away.
    """
    return np.asarray(_Bytes(tensor)).data if tensor.nbytes else memoryview(b"")


class _Bytes:
    """A tensor's bytes as numpy takes them. An array made of this keeps the storage."""

    def __init__(self, tensor: torch.Tensor) -> None:
        self.storage = tensor.untyped_storage()  # not the tensor, which may be given other memory
        place = {"data": (tensor.data_ptr(), False), "shape": (tensor.nbytes,)}
        self.__array_interface__ = {**place, "typestr": "|u1", "version": 3}


def meta_tensor(dtype: torch.dtype, *shape: int) -> torch.Tensor:
    """An empty tensor on `meta`. Those of one dtype and shape share a storage: an alias does not give the GIL away.

    Raises:
        RuntimeError: torch holds no tensor of this shape.
        TypeError: A length is no number.
    """
    with plain_tensors():
        (alias,) = aliases_of([_meta_template(dtype, *shape)])
    return alias


@functools.lru_cache(4096, typed=True)
def _meta_template(dtype: torch.dtype, *shape: int) -> torch.Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")
