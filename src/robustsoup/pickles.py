"""Read the pickles of torch.save as plain data: nothing is imported and nothing is called.

The reader knows the opcodes and the names that torch.load(weights_only=True) accepts for tensors,
numbers, text and containers, and the harmless types that training scripts put beside weights:
numbers and arrays of NumPy, argparse.Namespace, paths. Whatever the bytes are, reading ends with
plain data or a ValueError with a short reason.
"""

import struct
import sys
from argparse import Namespace
from collections import Counter, OrderedDict
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import PurePosixPath, PureWindowsPath
from types import SimpleNamespace
from typing import Any, BinaryIO

import numpy as np
import torch
from torch import Tensor, nn

from robustsoup.file_bytes import MAX_ELEMENTS, check_numbers, check_shape
from robustsoup.printable import first_line, make_printable

REPEATS_PER_VIEW = 32
"""How many times a tensor may stand again, as the weights of a shared block do, for the limit that
one other view of its storage has: what repeats is one parameter, and takes no memory."""
SAVE_WEIGHTS_ALONE = "load it with torch.load, and save the state_dict() of the network alone"
MAX_OPERATIONS = 350_000
MAX_TEXT_BYTES = 2**20
MAX_PLAIN_BYTES = 2**28
"""Most bytes of all plain objects together, such as sets and bytes."""
MAX_DEPTH = 32
"""Most levels of containers."""

STORAGE_TYPES = {
    "DoubleStorage": torch.float64,
    "FloatStorage": torch.float32,
    "HalfStorage": torch.float16,
    "BFloat16Storage": torch.bfloat16,
    "LongStorage": torch.int64,
    "IntStorage": torch.int32,
    "ShortStorage": torch.int16,
    "CharStorage": torch.int8,
    "ByteStorage": torch.uint8,
    "BoolStorage": torch.bool,
    "ComplexFloatStorage": torch.complex64,
    "ComplexDoubleStorage": torch.complex128,
    "UntypedStorage": torch.uint8,
}
_SPARSE_OR_QUANTIZED = (
    "_get_layout",
    "_rebuild_sparse_tensor",
    "_rebuild_qtensor",
    "_rebuild_nested_tensor",
)


@dataclass(frozen=True)
class StorageRequest:
    """A storage that a pickle refers to.

    Attributes:
        key: Its name in the file.
        dtype: Type of its elements.
        count: Number of its elements.
    """

    key: str
    dtype: torch.dtype
    count: int

    @property
    def nbytes(self) -> int:
        """The bytes of the storage."""
        return self.count * self.dtype.itemsize


@dataclass(frozen=True, eq=False)
class Storage:
    """A storage of tensors in a pickle, or the type of one, which holds nothing."""

    raw: Tensor
    dtype: torch.dtype


@dataclass(frozen=True)
class Name:
    """A global name in a pickle, such as that of a class, as text."""

    text: str

    def __str__(self) -> str:
        return make_printable(self.text)[:160]


class PickleReader:
    """Reads one pickle.

    Args:
        stream: The pickle; reading stops after its end.
        find_storage: Returns the bytes of a storage, uint8 of shape (nbytes,).
        max_tensor_bytes: Limit of the bytes of all tensors together. Views of one storage count
            each, so this bounds later work; equal ones count by `REPEATS_PER_VIEW`.
    """

    def __init__(
        self,
        stream: BinaryIO,
        find_storage: Callable[[StorageRequest], Tensor],
        max_tensor_bytes: int,
    ) -> None:
        self._stream = stream
        self._find_storage = find_storage
        self._bytes_left = max_tensor_bytes
        self._views: set[tuple[Any, ...]] = set()
        self._plain_bytes_left = MAX_PLAIN_BYTES
        self._requests: dict[str, StorageRequest] = {}
        self._stack: list[Any] = []
        self._outer_stacks: list[list[Any]] = []
        self._memo: dict[int, Any] = {}

    def load(self) -> Any:
        """Return the content of the pickle.

        Raises:
            ValueError: The pickle is broken, too large or too deep, or holds what a state dict does
                not need.
        """
        try:
            for _ in range(MAX_OPERATIONS):
                opcode = self._take(1)
                if opcode == b".":
                    content = self._stack.pop()
                    _check_depth(content)
                    return content
                self._run(opcode)
        except (IndexError, KeyError):
            raise ValueError("a broken pickle") from None
        except (TypeError, AttributeError, RuntimeError, OverflowError) as error:
            raise ValueError(f"a broken pickle: {first_line(error)[:160]}") from None
        raise ValueError(
            f"a pickle of more than {MAX_OPERATIONS:,} operations; {SAVE_WEIGHTS_ALONE}"
        )

    def _run(self, opcode: bytes) -> None:
        if opcode in _CONSTANTS:
            self._stack.append(_CONSTANTS[opcode]())
        elif opcode in _NUMBERS:
            self._stack.append(self._number(_NUMBERS[opcode]))
        elif opcode in _TUPLE_LENGTHS:
            self._push_tuple_of(_TUPLE_LENGTHS[opcode])
        elif opcode in _OPERATIONS:
            _OPERATIONS[opcode](self)
        elif opcode == b"\x80":
            self._check_protocol(self._take(1)[0])
        else:
            raise ValueError(f"a pickle with the opcode {opcode!r}")

    def _check_protocol(self, number: int) -> None:
        if number > 3:
            raise ValueError(
                f"a pickle of protocol {number}; load the file with torch.load and save it again "
                "with torch.save, which writes protocol 2"
            )

    def _take(self, length: int) -> bytes:
        if length > MAX_TEXT_BYTES:
            raise ValueError(f"text of {length:,} bytes; at most {MAX_TEXT_BYTES:,} are read")
        content = self._stream.read(length)
        if len(content) < length:
            raise ValueError("a pickle that is cut short")
        return content

    def _number(self, code: str) -> Any:
        return struct.unpack(code, self._take(struct.calcsize(code)))[0]

    def _pop_marked(self) -> list[Any]:
        marked = self._stack
        self._stack = self._outer_stacks.pop()
        return marked

    # One method for each opcode that the tables below do not explain.

    def _push_mark(self) -> None:
        self._outer_stacks.append(self._stack)
        self._stack = []

    def _push_long(self) -> None:
        length = self._number("<B")
        if length > 64:  # the state of NumPy's PCG64 has 17 bytes
            raise ValueError(f"an integer of {length} bytes")
        self._stack.append(int.from_bytes(self._take(length), "little", signed=True))

    def _push_text(self) -> None:
        self._stack.append(self._take(self._number("<I")).decode("utf-8"))

    def _push_short_text(self) -> None:
        self._stack.append(self._take(self._number("<B")).decode("ascii"))

    def _push_tuple(self) -> None:
        items = self._pop_marked()
        self._stack.append(tuple(items))

    def _push_tuple_of(self, length: int) -> None:
        if length == 1:
            self._stack[-1] = (self._stack[-1],)
            return
        if len(self._stack) < length:
            raise IndexError
        self._stack[-length:] = [tuple(self._stack[-length:])]

    def _memoize_byte(self) -> None:
        self._memo[self._number("<B")] = self._stack[-1]

    def _memoize_int(self) -> None:
        self._memo[self._number("<I")] = self._stack[-1]

    def _recall_byte(self) -> None:
        self._stack.append(self._memo[self._number("<B")])

    def _recall_int(self) -> None:
        self._stack.append(self._memo[self._number("<I")])

    def _append_one(self) -> None:
        item = self._stack.pop()
        self._last_list().append(item)

    def _append_marked(self) -> None:
        items = self._pop_marked()
        self._last_list().extend(items)

    def _last_list(self) -> list[Any]:
        target = self._stack[-1]
        if type(target) is not list:
            raise TypeError("items for what is not a list")
        return target

    def _set_one(self) -> None:
        value, key = self._stack.pop(), self._stack.pop()
        self._set_items([key, value])

    def _set_marked(self) -> None:
        self._set_items(self._pop_marked())

    def _set_items(self, items: list[Any]) -> None:
        target = self._stack[-1]
        if type(target) not in (dict, OrderedDict, Counter) or len(items) % 2:
            raise TypeError("entries for what is not a dict")
        _add_pairs(target, zip(items[::2], items[1::2], strict=True))

    def _push_name(self) -> None:
        parts = [self._stream.readline(256) for _ in range(2)]
        if not all(part.endswith(b"\n") for part in parts):
            raise ValueError("a pickle that is cut short")
        module, name = (part[:-1].decode("utf-8") for part in parts)
        self._stack.append(_resolve_name(module, name))

    def _call_name(self) -> None:
        arguments = self._stack.pop()
        name = self._stack.pop()
        if not isinstance(name, Name) or type(arguments) is not tuple:
            raise TypeError("a call of what is not a name")
        self._stack.append(self._rebuild(name, arguments))

    def _make_object(self) -> None:
        """Make an object of a class that is known to be harmless."""
        arguments, name = self._stack.pop(), self._stack.pop()
        if not isinstance(name, Name) or type(arguments) is not tuple:
            raise TypeError("an object of what is not a class")
        make = _PLAIN_TYPES.get(name.text)
        if make is None:
            whole = not self._stack and not self._outer_stacks
            raise ValueError(self._describe_foreign_class(name, whole=whole))
        self._stack.append(self._make_plain(make, arguments))

    def _make_plain(self, make: Callable[..., Any], arguments: tuple[Any, ...]) -> Any:
        """Return a plain object; a few bytes of a pickle may ask for many large ones."""
        plain_object = make(*arguments)
        self._plain_bytes_left -= sys.getsizeof(plain_object)
        if self._plain_bytes_left < 0:
            raise ValueError(f"objects of more than {MAX_PLAIN_BYTES:,} bytes")
        return plain_object

    def _describe_foreign_class(self, name: Name, *, whole: bool) -> str:
        is_network = b"_parameters" in self._stream.read(MAX_TEXT_BYTES)
        kind = "network" if is_network else "object"
        what = f"a whole {kind} ({name})" if whole else f"an {kind} of the class {name}"
        what = what.replace("an network", "a network")
        return (
            f"it holds {what}, not plain tensors, numbers and text; if you trust the file, load it "
            "where that class is defined, with torch.load(..., weights_only=False), and save the "
            "state_dict() of the network"
        )

    def _set_attributes(self) -> None:
        """Set the attributes of a namespace or of an OrderedDict (`_metadata` of a state dict)."""
        state, target = self._stack.pop(), self._stack[-1]
        if isinstance(target, np.dtype):
            _check_byte_order(state)
            return
        if type(target) is np.ndarray:
            _fill_array(target, state)
            return
        if type(target) not in _WITH_ATTRIBUTES or type(state) is not dict:
            raise TypeError("attributes for what is not an OrderedDict")
        if not all(type(key) is str for key in state) or "__class__" in state:
            raise TypeError("attributes that are not named")
        target.__dict__.update(state)

    def _push_storage(self) -> None:
        """Replace the description of a storage by the storage."""
        kind, storage_type, key, _location, count, *view = self._stack.pop()
        if kind != "storage" or type(key) is not str or view not in ([], [None]):
            raise ValueError("a reference to what is not a storage of tensors")
        if isinstance(storage_type, Name) and storage_type.text.startswith("torch.Q"):
            raise ValueError(
                "a tensor that is quantized; give the weights from before quantization"
            )
        if not isinstance(storage_type, Storage) or type(count) is not int:
            raise ValueError("a storage without a type or a size")
        if not 0 <= count <= MAX_ELEMENTS:
            raise ValueError(f"a storage of {count:,} elements")
        request = StorageRequest(key, storage_type.dtype, count)
        if self._requests.setdefault(key, request) != request:
            raise ValueError(f"two types or sizes for the storage {key!r}")
        self._stack.append(Storage(self._find_storage(request), request.dtype))

    def _rebuild(self, name: Name, arguments: tuple[Any, ...]) -> Any:
        rebuild = _PLAIN_TYPES.get(name.text)
        if rebuild is not None:
            return self._make_plain(rebuild, arguments)
        match name.text, arguments:
            case "torch._utils._rebuild_tensor", (storage, offset, size, stride):
                return self._view_storage(storage, offset, size, stride)
            case "torch._utils._rebuild_tensor_v2", (storage, offset, size, stride, _, _, *more):
                return _set_bits(self._view_storage(storage, offset, size, stride), more)
            case (
                "torch._utils._rebuild_tensor_v3",
                (storage, offset, size, stride, _, _, torch.dtype() as dtype, *_),
            ):
                typed = Storage(storage.raw, dtype)
                return self._view_storage(typed, offset, size, stride)
            case (
                "torch._utils._rebuild_parameter" | "torch._utils._rebuild_parameter_with_state",
                (Tensor() as data, bool() as requires_grad, *_),
            ):
                return nn.Parameter(data, requires_grad)
            case "torch._tensor._rebuild_from_type_v2", (Name() as inner, _, tuple() as args, _):
                if inner.text == name.text:
                    raise ValueError("a tensor type within a tensor type")
                return self._rebuild(inner, args)
        if name.text.rpartition(".")[2] in _SPARSE_OR_QUANTIZED:
            raise ValueError("a tensor that is sparse or quantized; expected plain tensors")
        raise ValueError(
            f"the name {name}, which is not plain tensors, numbers or text; if you trust the file, "
            "load it with torch.load(..., weights_only=False), and save the state_dict() alone"
        )

    def _view_storage(self, storage: Any, offset: Any, size: Any, stride: Any) -> Tensor:
        """Return a tensor in a storage, after checking that all its elements lie within it."""
        if not isinstance(storage, Storage):
            raise TypeError("a tensor without a storage")
        sizes, strides = check_shape(size), check_numbers(stride)
        (start,) = check_numbers([offset])
        if len(sizes) != len(strides):
            raise ValueError(f"a tensor with {len(sizes)} dimensions and {len(strides)} strides")
        elements = torch.Size(sizes).numel()
        if not elements:
            return torch.empty(sizes, dtype=storage.dtype)
        last = start + sum((n - 1) * step for n, step in zip(sizes, strides, strict=True))
        itemsize = storage.dtype.itemsize
        if (last + 1) * itemsize > len(storage.raw) or len(storage.raw) % itemsize:
            raise ValueError(f"a tensor of shape {list(sizes)} that its storage does not hold")
        view = (storage.raw.data_ptr(), storage.dtype, start, sizes, strides)
        self._bytes_left -= elements * itemsize // (REPEATS_PER_VIEW if view in self._views else 1)
        self._views.add(view)
        if self._bytes_left < 0:
            raise ValueError(
                f"tensors that are larger than the file allows; {SAVE_WEIGHTS_ALONE}, as a "
                ".safetensors file if many tensors share memory"
            )
        return storage.raw.view(storage.dtype).as_strided(sizes, strides, start)


def _set_bits(tensor: Tensor, more: list[Any]) -> Tensor:
    """Return a tensor that is conjugated or negated where the file only says so."""
    bits = more[0] if more and type(more[0]) is dict else {}
    if bits.get("conj") is True:
        tensor = tensor.conj().resolve_conj()
    return -tensor if bits.get("neg") is True else tensor


def _resolve_name(module: str, name: str) -> Any:
    """Return a dtype or a type of storages; other names stay text."""
    if module in ("torch", "torch.cuda", "torch.storage") and name in STORAGE_TYPES:
        return Storage(torch.empty(0, dtype=torch.uint8), STORAGE_TYPES[name])
    if module == "torch" and isinstance(dtype := getattr(torch, name, None), torch.dtype):
        return dtype
    return Name(f"{module}.{name}")


def _add_pairs(target: dict[Any, Any], pairs: Iterable[tuple[Any, Any]]) -> dict[Any, Any]:
    for key, value in pairs:
        _check_key(key)
        if key in target:
            raise ValueError("a dict that repeats a key")
        target[key] = value
    return target


_KEY_TYPES = (str, int, float, bool, bytes, type(None), Name)


def _check_key(key: Any) -> None:
    """Refuse keys of which hashing takes longer than reading, such as tuples of tuples."""
    parts = key if type(key) is tuple else (key,)
    if not all(type(part) in _KEY_TYPES for part in parts):
        raise ValueError(f"a key of type {type(key).__name__}")


def _make_ordered_dict(pairs: Any = ()) -> OrderedDict[Any, Any]:
    content: OrderedDict[Any, Any] = OrderedDict()
    _add_pairs(content, ((key, value) for key, value in pairs))
    return content


def _make_size(sizes: Any) -> torch.Size:
    return torch.Size(check_shape(sizes))


def _make_counter(counts: Any) -> Counter[Any]:
    if type(counts) is not dict:
        raise TypeError("a counter of what is not a dict")
    return Counter(counts)


def _make_set(items: Any) -> set[Any]:
    for item in items:
        _check_key(item)
    return set(items)


def _encode(text: Any, encoding: Any) -> bytes:
    if encoding not in ("latin1", "latin-1") or type(text) is not str:
        raise TypeError("bytes in another encoding")
    return text.encode("latin-1")


def _make_bytearray(content: Any = b"", encoding: Any = None) -> bytearray:
    return bytearray(content if type(content) is bytes else _encode(content, encoding))


def _make_complex(real: Any, imaginary: Any) -> complex:
    return complex(float(real), float(imaginary))


def _make_dict(_factory: object = None) -> dict[Any, Any]:
    """Return what a defaultdict becomes."""
    return {}


def _make_text(text: Any) -> str:
    if type(text) is not str:
        raise TypeError("a version that is not text")
    return text


def _make_posix_path(*parts: Any) -> PurePosixPath:
    return PurePosixPath(*map(_make_text, parts))


def _make_windows_path(*parts: Any) -> PureWindowsPath:
    return PureWindowsPath(*map(_make_text, parts))


_NUMPY_KINDS = "biufcSU"


def _make_numpy_dtype(text: Any, *_: object) -> np.dtype[Any]:
    """Return a type of numbers or text: "f8", "i4", "U12"."""
    if type(text) is not str or text[:1] not in _NUMPY_KINDS or not text[1:].isdecimal():
        raise ValueError("a type of NumPy that is not numbers or text")
    return np.dtype(text)


def _check_byte_order(state: Any) -> None:
    if type(state) is not tuple or len(state) < 2 or state[1] not in ("<", "|", "="):
        raise ValueError("numbers of NumPy that are not little-endian")


def _make_numpy_scalar(dtype: Any, content: Any) -> Any:
    if not isinstance(dtype, np.dtype) or type(content) is not bytes:
        raise TypeError("a number of NumPy without a type")
    if len(content) != dtype.itemsize:
        raise ValueError("a number of NumPy of another size than its type")
    return np.frombuffer(content, dtype)[0]


def _make_numpy_array(*_: object) -> np.ndarray[Any, np.dtype[Any]]:
    """Return an array that `_fill_array` fills."""
    return np.empty(0)


def _fill_array(array: np.ndarray[Any, np.dtype[Any]], state: Any) -> None:
    match state:
        case (int(), tuple() as shape, np.dtype() as dtype, bool() as fortran, bytes() as content):
            sizes = check_shape(shape)
            if torch.Size(sizes).numel() * dtype.itemsize != len(content):
                raise ValueError(f"an array of NumPy of shape {list(sizes)} with other content")
            # pyrefly: ignore[bad-argument-type]  # NumPy's stub asks for a bool of NumPy
            array.__setstate__((1, sizes, dtype, fortran, content))
        case _:
            raise ValueError("an array of NumPy that is not numbers or text")


_WITH_ATTRIBUTES = (OrderedDict, Namespace, SimpleNamespace)
_PLAIN_TYPES: dict[str, Callable[..., Any]] = {
    "argparse.Namespace": Namespace,
    "types.SimpleNamespace": SimpleNamespace,
    "collections.defaultdict": _make_dict,
    "torch.torch_version.TorchVersion": _make_text,
    "numpy.dtype": _make_numpy_dtype,
    **{
        f"numpy.{core}.multiarray.{name}": function
        for core in ("core", "_core")
        for name, function in (("scalar", _make_numpy_scalar), ("_reconstruct", _make_numpy_array))
    },
    **{
        f"{module}.{pure}{name}": function
        for module in ("pathlib", "pathlib._local")
        for pure in ("", "Pure")
        for name, function in (
            ("PosixPath", _make_posix_path),
            ("WindowsPath", _make_windows_path),
        )
    },
    "collections.OrderedDict": _make_ordered_dict,
    "collections.Counter": _make_counter,
    "torch.Size": _make_size,
    "torch.device": torch.device,
    "_codecs.encode": _encode,
    **{
        f"{module}.{name}": function
        for module in ("builtins", "__builtin__")
        for name, function in (
            ("set", _make_set),
            ("complex", _make_complex),
            ("bytearray", _make_bytearray),
        )
    },
}

_CONSTANTS: dict[bytes, Callable[[], Any]] = {
    b"N": lambda: None,
    b"\x88": lambda: True,
    b"\x89": lambda: False,
    b")": tuple,
    b"]": list,
    b"}": dict,
    b"\x8f": set,
}
_NUMBERS = {b"J": "<i", b"K": "<B", b"M": "<H", b"G": ">d"}
_TUPLE_LENGTHS = {b"\x85": 1, b"\x86": 2, b"\x87": 3}
_OPERATIONS: dict[bytes, Callable[[PickleReader], None]] = {
    b"(": PickleReader._push_mark,
    b"\x8a": PickleReader._push_long,
    b"X": PickleReader._push_text,
    b"U": PickleReader._push_short_text,
    b"t": PickleReader._push_tuple,
    b"q": PickleReader._memoize_byte,
    b"r": PickleReader._memoize_int,
    b"h": PickleReader._recall_byte,
    b"j": PickleReader._recall_int,
    b"a": PickleReader._append_one,
    b"e": PickleReader._append_marked,
    b"s": PickleReader._set_one,
    b"u": PickleReader._set_marked,
    b"c": PickleReader._push_name,
    b"R": PickleReader._call_name,
    b"b": PickleReader._set_attributes,
    b"\x81": PickleReader._make_object,
    b"Q": PickleReader._push_storage,
}


_PLAIN = (dict, list, tuple)


_NESTING = (dict, list, tuple, Namespace, SimpleNamespace)


def _check_depth(content: Any) -> None:
    """Check the depth of nested containers, without recursion."""
    level, depth, seen = [content], 0, set[int]()
    while level:
        if depth > MAX_DEPTH:
            raise ValueError(f"containers nested deeper than {MAX_DEPTH} levels")
        below: list[Any] = []
        for value in level:
            if not isinstance(value, _NESTING) or id(value) in seen:
                continue
            seen.add(id(value))
            if not isinstance(value, (Namespace, SimpleNamespace)):
                below.extend(value.values() if isinstance(value, dict) else value)
            if type(value) not in _PLAIN:  # an OrderedDict may have attributes
                below.extend(getattr(value, "__dict__", {}).values())
        level, depth = below, depth + 1
