"""Reads what torch.save() wrote, as data: numbers, text, lists, tuples, dictionaries and dense tensors.

The pickle in the file is a program for a stack machine. The one below knows the instructions, names and types
that such data need, and refuses all others, so that time and memory stay in proportion to the size of the
file: a part is read once, a tensor has memory of its own, lists and dictionaries are in one place only.
"""

import os
import pickletools
import sys
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

PIECE = 1 << 24  # bytes that are read at a time
MOST_DIMENSIONS = 8
LONGEST_SHARED = 8  # values of a tuple that is in several places
LARGEST_KEY = 2**31  # integers below it cannot be chosen so that looking them up takes long
LARGEST = 2**64  # of all other integers

STORAGES = {
    "FloatStorage": torch.float32,
    "DoubleStorage": torch.float64,
    "LongStorage": torch.int64,
    "IntStorage": torch.int32,
    "ByteStorage": torch.uint8,
}
SCALARS = ("f4", "f8", "i4", "i8")  # NumPy's
PLAIN = "it has more in it than tensors and plain values"


def read_torch_file(path: str | os.PathLike) -> Any:
    """The object in the file, its tensors on the CPU. ValueError or one of zipfile's errors if it has more in
    it, or is damaged."""
    if not Path(path).is_file():
        raise ValueError("there is no such file")
    with zipfile.ZipFile(path) as file:
        parts = file.infolist()
        if any(part.compress_type != zipfile.ZIP_STORED for part in parts):
            raise ValueError("it has compressed parts")
        if sum(part.file_size for part in parts) > os.path.getsize(path):
            raise ValueError("its parts are larger than the file")
        folders = [name.removesuffix("/data.pkl") for name in file.namelist() if name.endswith("/data.pkl")]
        if len(folders) != 1:
            raise ValueError("it was not written by torch.save()")
        order = f"{folders[0]}/byteorder"
        if order in file.namelist() and file.read(order) != sys.byteorder.encode():
            raise ValueError(f"it was written on a machine that is not {sys.byteorder}-endian")
        return _Machine(file, folders[0]).run()


class _Name:
    """A function or a type that the file names."""

    def __init__(self, module: str, name: str):
        self.module, self.name = module, name


class _Dtype:
    """NumPy's description of a type of number."""

    def __init__(self, code: str):
        self.code = code


class _Machine:
    """Each method runs the instruction, or the call, of its name."""

    def __init__(self, file: zipfile.ZipFile, folder: str):
        self._file, self._folder = file, folder
        self._stack: list = []
        self._marks: list[int] = []  # where in the stack a row of values begins
        self._memo: dict[int, Any] = {}
        self._seen: set[str] = set()  # storages

    def run(self) -> Any:
        program = self._file.read(f"{self._folder}/data.pkl")
        try:
            for instruction, argument, _ in pickletools.genops(program):
                if instruction.name == "STOP":
                    return self._stack.pop()
                self._step(instruction.name, argument)
        except (LookupError, TypeError, AttributeError) as error:
            raise ValueError(f"it is damaged: {error}") from None
        raise ValueError("it is cut off")

    def _step(self, name: str, argument: Any) -> None:
        if name in VALUES:
            _need(type(argument) is not int or abs(argument) < LARGEST)
            self._stack.append(argument)
        elif name in CONSTANTS:
            self._stack.append(CONSTANTS[name])
        elif name in INSTRUCTIONS:
            INSTRUCTIONS[name](self, argument)
        else:
            _need(name in ("PROTO", "FRAME"))

    # Instructions

    def _empty_list(self, _) -> None:
        self._stack.append([])

    def _empty_dict(self, _) -> None:
        self._stack.append({})

    def _mark(self, _) -> None:
        self._marks.append(len(self._stack))

    def _row(self, count: int | None = None) -> list:
        """Takes values from the stack: all since the mark, or so many."""
        start = self._marks.pop() if count is None else len(self._stack) - count
        _need(start >= 0)
        row = self._stack[start:]
        del self._stack[start:]
        return row

    def _tuple(self, count: int | None) -> None:
        self._stack.append(tuple(self._row(count)))

    def _append(self, count: int | None) -> None:
        row = self._row(count)
        _need(type(self._stack[-1]) is list)
        self._stack[-1].extend(row)

    def _set_items(self, count: int | None) -> None:
        row = self._row(count)
        target = self._stack[-1]
        _need(type(target) is dict and len(row) % 2 == 0)
        for key, value in zip(row[::2], row[1::2]):
            _need(type(key) is str or (type(key) is int and 0 <= key < LARGEST_KEY))
            target[key] = value

    def _put(self, number: int) -> None:
        self._memo[number] = self._stack[-1]

    def _memoize(self, _) -> None:
        self._memo[len(self._memo)] = self._stack[-1]

    def _get(self, number: int) -> None:
        value = self._memo[number]
        parts = value if type(value) is tuple else ()
        nested = any(isinstance(part, tuple | list | dict | Tensor) for part in parts)
        if isinstance(value, list | dict | Tensor) or nested or len(parts) > LONGEST_SHARED:
            raise ValueError("it has the same list or tensor in several places")
        self._stack.append(value)

    def _name(self, argument: str) -> None:
        module, _, name = argument.partition(" ")
        self._stack.append(_Name(module, name))

    def _stack_name(self, _) -> None:
        module, name = self._row(2)
        self._stack.append(_Name(module, name))

    def _build(self, _) -> None:
        """Nothing has a state but NumPy's types: (version, byte order, ...)."""
        state = self._row(1)[0]
        _need(type(self._stack[-1]) is _Dtype and state[1] in ("<", "=", "|"))

    def _call(self, _) -> None:
        name, arguments = self._row(2)
        _need(type(name) is _Name and type(arguments) is tuple)
        call = CALLS.get((name.module, name.name))
        _need(call is not None)
        assert call is not None  # for the type checker
        self._stack.append(call(self, *arguments))

    # Calls

    def _ordered_dict(self) -> dict:
        return {}

    def _encode(self, text: str, code: str) -> bytes:
        """How bytes are written where the pickle's protocol has none."""
        _need(code == "latin1")
        return text.encode("latin1")

    def _dtype(self, code: str, *_) -> _Dtype:
        _need(code in SCALARS)
        return _Dtype(code)

    def _scalar(self, dtype: _Dtype, data: bytes) -> int | float:
        _need(type(dtype) is _Dtype and type(data) is bytes)
        (value,) = np.frombuffer(data, dtype.code)
        return value.item()

    def _storage(self, _) -> None:
        """From ("storage", type, name of its part, device, length), a tensor of one dimension."""
        _, kind, key, _, count = self._row(1)[0]
        _need(type(kind) is _Name and kind.module == "torch" and kind.name in STORAGES and type(key) is str)
        if key in self._seen:
            raise ValueError("it has two tensors that share their memory")
        self._seen.add(key)
        part = self._file.getinfo(f"{self._folder}/data/{key}")
        numbers = torch.empty(part.file_size, dtype=torch.uint8)
        bytes_ = memoryview(numbers.numpy().data)
        with self._file.open(part) as source:  # its checksum is compared at the end
            for start in range(0, part.file_size, PIECE):
                piece = source.read(min(PIECE, part.file_size - start))
                bytes_[start : start + len(piece)] = piece
            source.read(1)
        numbers = numbers.view(STORAGES[kind.name])
        if len(numbers) != count:
            raise ValueError(f"its part {key} must have {count} numbers, got {len(numbers)}")
        self._stack.append(numbers)

    def _tensor(self, storage: Tensor, offset: int, size: tuple, stride: tuple, *more) -> Tensor:
        """A view of a storage, in which each number has a place of its own."""
        _need(isinstance(storage, Tensor) and storage.dim() == 1)
        _need(not any(more[2:]))  # after requires_grad and hooks: conjugate, negative
        _need(type(size) is tuple and type(stride) is tuple and len(size) == len(stride) <= MOST_DIMENSIONS)
        _need(all(type(value) is int and value >= 0 for value in (offset, *size, *stride)))
        if 0 in size:
            return storage.new_empty(size)
        span = 1  # places from the first number to the last
        for step, count in sorted(zip(stride, size)):
            _need(count == 1 or step >= span)
            span += (count - 1) * step
        if offset + span > len(storage):
            raise ValueError(f"a tensor of {list(size)} must have all of its numbers in the file")
        return storage.as_strided(size, stride, offset)

    def _parameter(self, data: Tensor, _grad, _hooks) -> Tensor:
        _need(isinstance(data, Tensor))
        return data


def _need(condition: bool) -> None:
    if not condition:
        raise ValueError(PLAIN)


VALUES = frozenset(
    "BININT BININT1 BININT2 LONG1 BINFLOAT BINUNICODE SHORT_BINUNICODE BINBYTES SHORT_BINBYTES".split()
)
CONSTANTS = {"NONE": None, "NEWTRUE": True, "NEWFALSE": False, "EMPTY_TUPLE": ()}
INSTRUCTIONS = {
    "EMPTY_LIST": _Machine._empty_list,
    "EMPTY_DICT": _Machine._empty_dict,
    "MARK": _Machine._mark,
    "TUPLE": _Machine._tuple,
    "TUPLE1": lambda machine, _: machine._tuple(1),
    "TUPLE2": lambda machine, _: machine._tuple(2),
    "TUPLE3": lambda machine, _: machine._tuple(3),
    "APPEND": lambda machine, _: machine._append(1),
    "APPENDS": _Machine._append,
    "SETITEM": lambda machine, _: machine._set_items(2),
    "SETITEMS": _Machine._set_items,
    "BINPUT": _Machine._put,
    "LONG_BINPUT": _Machine._put,
    "MEMOIZE": _Machine._memoize,
    "BINGET": _Machine._get,
    "LONG_BINGET": _Machine._get,
    "GLOBAL": _Machine._name,
    "STACK_GLOBAL": _Machine._stack_name,
    "REDUCE": _Machine._call,
    "BUILD": _Machine._build,
    "BINPERSID": _Machine._storage,
}
CALLS = {
    ("collections", "OrderedDict"): _Machine._ordered_dict,
    ("torch._utils", "_rebuild_tensor_v2"): _Machine._tensor,
    ("torch._utils", "_rebuild_parameter"): _Machine._parameter,
    ("_codecs", "encode"): _Machine._encode,
    ("numpy", "dtype"): _Machine._dtype,
    ("numpy.core.multiarray", "scalar"): _Machine._scalar,  # NumPy 1
    ("numpy._core.multiarray", "scalar"): _Machine._scalar,  # NumPy 2
}
