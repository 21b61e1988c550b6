"""Read pickles of tensors and plain values in place of the pickle module, and refuse all that could run code.

``torch.load`` takes this module as ``pickle_module``. PyTorch's own weights-only reader is no replacement: it accepts
any function that a caller allows (MMEngine's checkpoints would need ``getattr``) and passes it on to
``_rebuild_from_type_v2``, which calls its argument. Here each name stands for a function below that checks its
arguments, or for a harmless type, and nothing else can be called.
"""
from __future__ import annotations

import pickle
from collections import Counter, OrderedDict
from collections.abc import Callable
from functools import cache
from types import SimpleNamespace
from typing import Any, BinaryIO

import numpy as np
import torch
from mmengine.logging import HistoryBuffer
from torch import Tensor


class ForbiddenPickleError(pickle.UnpicklingError):
    """A pickle asks for something that is not allowed; the message names it."""


def _require(value: object, expected: type | tuple[type, ...]) -> None:
    """Raise unless the type is exactly an expected one, as a subclass could have its own methods."""
    if type(value) not in (expected if isinstance(expected, tuple) else (expected,)):
        raise ForbiddenPickleError(f'a {type(value).__name__} in an unexpected place')


def _tensor(storage: torch.TypedStorage, offset: int, size: tuple, stride: tuple, requires_grad: bool = False,
            hooks: object = None, *rest: object) -> Tensor:
    """Build a tensor on a storage; ``hooks`` is a relic of old files, and always empty in sound ones."""
    _require(storage, torch.storage.TypedStorage)
    if rest and rest[0]:
        raise ForbiddenPickleError('a conjugated or negated tensor')
    return torch._utils._rebuild_tensor(storage, offset, size, stride).requires_grad_(requires_grad)


def _tensor_of_dtype(storage: torch.TypedStorage, offset: int, size: tuple, stride: tuple, requires_grad: bool,
                     hooks: object, dtype: torch.dtype, *rest: object) -> Tensor:
    """Build a tensor of a dtype that has no storage class of its own, such as float8."""
    _require(storage, torch.storage.TypedStorage)
    _require(dtype, torch.dtype)
    if rest and rest[0]:
        raise ForbiddenPickleError('a conjugated or negated tensor')
    tensor = torch.empty(0, dtype=dtype, device=storage._untyped_storage.device)
    return tensor.set_(storage._untyped_storage, offset, size, stride).requires_grad_(requires_grad)


def _parameter(data: Tensor, requires_grad: bool, *hooks_and_state: object) -> torch.nn.Parameter:
    _require(data, Tensor)
    return torch.nn.Parameter(data, requires_grad)


def _ordered_dict(pairs: list | tuple = ()) -> OrderedDict:
    _require(pairs, (list, tuple))
    return OrderedDict(pairs)


def _counter(counts: dict) -> Counter:
    _require(counts, dict)
    return Counter(counts)


def _set(values: list | tuple = ()) -> set:
    _require(values, (list, tuple))
    return set(values)


def _bytes() -> bytes:
    return b''


def _latin1(text: str, codec: str) -> bytes:
    """Return bytes that protocols before 3 write as text."""
    _require(text, str)
    if codec != 'latin1':
        raise ForbiddenPickleError(f'the codec {codec!r}')
    return text.encode('latin1')


def _size(values: tuple) -> torch.Size:
    _require(values, tuple)
    return torch.Size(values)


def _numpy_dtype(name: str, *align_and_copy: object) -> np.dtype:
    """Return a numeric dtype; object arrays could hold anything, and structured ones disguise bytes as objects."""
    _require(name, str)
    dtype = np.dtype(name)
    if dtype.kind not in 'biufc':
        raise ForbiddenPickleError(f'a NumPy array of {name!r}')
    # Copy it: its byte order may be set next, and the whole process shares NumPy's own instances.
    return np.dtype(dtype, copy=True)


def _numpy_array(*initial: object) -> np.ndarray:
    """Return an empty array, which the BUILD opcode that follows fills."""
    return np.empty(0, np.int8)


def _numpy_scalar(dtype: np.dtype, data: bytes) -> np.generic:
    _check_numeric(dtype)
    _require(data, bytes)
    value, = np.frombuffer(data, dtype)
    return value


def _log_buffer_method(owner: type, name: str) -> str:
    """Replace getattr, by which log buffers refer to four of their own methods, which the class has anyway."""
    if owner is not HistoryBuffer or name not in ('mean', 'max', 'min', 'current'):
        raise ForbiddenPickleError(f'getattr({owner!r}, {name!r})')
    return name


def _check_numeric(dtype: object) -> None:
    if not isinstance(dtype, np.dtype) or dtype.kind not in 'biufc':
        raise ForbiddenPickleError(f'a NumPy array of {dtype!r}')


# Functions that a file may call, by name. Python 2 wrote __builtin__ for builtins, and NumPy 1 core for _core.
FUNCTIONS: dict[tuple[str, str], Callable] = {
    ('torch._utils', '_rebuild_tensor'): _tensor,
    ('torch._utils', '_rebuild_tensor_v2'): _tensor,
    ('torch._utils', '_rebuild_tensor_v3'): _tensor_of_dtype,
    ('torch._utils', '_rebuild_parameter'): _parameter,
    ('torch._utils', '_rebuild_parameter_with_state'): _parameter,
    ('torch', 'Size'): _size,
    ('torch', 'device'): torch.device,
    ('collections', 'OrderedDict'): _ordered_dict,
    ('collections', 'Counter'): _counter,
    ('_codecs', 'encode'): _latin1,
    ('numpy', 'dtype'): _numpy_dtype,
    **{(f'numpy.{core}.multiarray', '_reconstruct'): _numpy_array for core in ('core', '_core')},
    **{(f'numpy.{core}.multiarray', 'scalar'): _numpy_scalar for core in ('core', '_core')},
    **{(module, name): function for module in ('builtins', '__builtin__') for name, function in (
        ('set', _set), ('bytes', _bytes), ('slice', slice), ('complex', complex), ('getattr', _log_buffer_method))},
}
# Classes that a file may also name, as arguments.
CLASSES: dict[tuple[str, str], type] = {
    ('numpy', 'ndarray'): np.ndarray,
    ('torch.storage', 'UntypedStorage'): torch.UntypedStorage,
    ('mmengine.logging.history_buffer', 'HistoryBuffer'): HistoryBuffer,
}


class _Opcodes(dict):
    """Table of opcode → method for pickle that refuses opcodes which are not in it."""

    def __missing__(self, opcode: int) -> Callable:
        raise ForbiddenPickleError(f'the pickle opcode {bytes([opcode])!r}')


# Opcodes that make plain values, keep them in the memo, and look up a name with ``find_class``.
_PLAIN_OPCODES = (
    pickle.PROTO, pickle.FRAME, pickle.STOP, pickle.MARK, pickle.POP, pickle.POP_MARK, pickle.DUP, pickle.NONE,
    pickle.NEWTRUE, pickle.NEWFALSE, pickle.INT, pickle.BININT, pickle.BININT1, pickle.BININT2, pickle.LONG,
    pickle.LONG1, pickle.LONG4, pickle.FLOAT, pickle.BINFLOAT, pickle.STRING, pickle.BINSTRING, pickle.SHORT_BINSTRING,
    pickle.UNICODE, pickle.BINUNICODE, pickle.SHORT_BINUNICODE, pickle.BINUNICODE8, pickle.BINBYTES,
    pickle.SHORT_BINBYTES, pickle.BINBYTES8, pickle.TUPLE, pickle.EMPTY_TUPLE, pickle.TUPLE1, pickle.TUPLE2,
    pickle.TUPLE3, pickle.LIST, pickle.EMPTY_LIST, pickle.DICT, pickle.EMPTY_DICT, pickle.EMPTY_SET, pickle.GET,
    pickle.BINGET, pickle.LONG_BINGET, pickle.PUT, pickle.BINPUT, pickle.LONG_BINPUT, pickle.MEMOIZE, pickle.GLOBAL,
    pickle.STACK_GLOBAL)


class Unpickler(pickle._Unpickler):
    """Python's unpickler with a checked version of each operation that calls, looks up or changes an object."""

    # Returns the bytes in a storage's record by its key; :func:`for_archive` sets it.
    record_size: Callable[[str], int] | None = None
    dispatch = _Opcodes({ord(opcode): pickle._Unpickler.dispatch[ord(opcode)] for opcode in _PLAIN_OPCODES})

    def find_class(self, module: str, name: str) -> Any:
        """Return what a name stands for, without importing anything."""
        found = FUNCTIONS.get((module, name)) or CLASSES.get((module, name))
        if found is None and module == 'torch' and isinstance(vars(torch).get(name), torch.dtype):
            found = vars(torch)[name]
        if found is None:
            raise ForbiddenPickleError(f'{module}.{name}')
        return found

    def load_reduce(self) -> None:
        """Call an allowed function with arguments."""
        arguments, function = self.stack.pop(), self.stack[-1]
        _require(arguments, tuple)
        if not any(function is allowed for allowed in FUNCTIONS.values()):
            raise ForbiddenPickleError(f'a call of {function!r}')
        self.stack[-1] = function(*arguments)

    dispatch[ord(pickle.REDUCE)] = load_reduce

    def load_newobj(self) -> None:
        """Make an instance without calling its ``__init__``."""
        arguments, cls = self.stack.pop(), self.stack.pop()
        if cls is not HistoryBuffer or arguments != ():
            raise ForbiddenPickleError(f'an instance of {cls!r}')
        self.append(HistoryBuffer.__new__(HistoryBuffer))

    dispatch[ord(pickle.NEWOBJ)] = load_newobj

    def load_build(self) -> None:
        """Set an object's state."""
        state, target = self.stack.pop(), self.stack[-1]
        if type(target) is OrderedDict:
            # ``state_dict()`` stores the version numbers of modules in this attribute.
            if type(state) is not dict or state.keys() != {'_metadata'}:
                raise ForbiddenPickleError('an OrderedDict with attributes')
            target._metadata = state['_metadata']
        elif type(target) is HistoryBuffer:
            self._build_log_buffer(target, state)
        elif isinstance(target, np.dtype):
            # A numeric dtype's state has only the byte order; other fields are empty.
            if type(state) is not tuple or len(state) != 8 or state[0] != 3 or state[2:] != (None, None, None, -1, -1,
                                                                                             0):
                raise ForbiddenPickleError(f'a NumPy dtype with the state {state!r}')
            target.__setstate__(state)
        elif type(target) is np.ndarray:
            _require(state, tuple)
            _, _, dtype, _, data = state
            _check_numeric(dtype)
            _require(data, bytes)
            target.__setstate__(state)
        else:
            raise ForbiddenPickleError(f'a state for a {type(target).__name__}')

    dispatch[ord(pickle.BUILD)] = load_build

    @staticmethod
    def _build_log_buffer(buffer: HistoryBuffer, state: object) -> None:
        _require(state, dict)
        # These would be set on the class, for the whole process, and the class has them.
        state.pop('statistics_methods', None)
        if state.keys() != {'max_length', '_log_history', '_count_history'}:
            raise ForbiddenPickleError(f'a HistoryBuffer with the attributes {sorted(map(repr, state))}')
        _require(state['max_length'], int)
        _require(state['_log_history'], np.ndarray)
        _require(state['_count_history'], np.ndarray)
        buffer.__setstate__(state)

    def load_append(self) -> None:
        """Append an item to a list."""
        item = self.stack.pop()
        _require(self.stack[-1], list)
        self.stack[-1].append(item)

    dispatch[ord(pickle.APPEND)] = load_append

    def load_appends(self) -> None:
        """Append items to a list."""
        items = self.pop_mark()
        _require(self.stack[-1], list)
        self.stack[-1].extend(items)

    dispatch[ord(pickle.APPENDS)] = load_appends

    def load_additems(self) -> None:
        """Add items to a set."""
        items = self.pop_mark()
        _require(self.stack[-1], set)
        self.stack[-1].update(items)

    dispatch[ord(pickle.ADDITEMS)] = load_additems

    def load_setitem(self) -> None:
        """Set one item of a dict."""
        value, key = self.stack.pop(), self.stack.pop()
        _require(self.stack[-1], (dict, OrderedDict))
        self.stack[-1][key] = value

    dispatch[ord(pickle.SETITEM)] = load_setitem

    def load_setitems(self) -> None:
        """Set items of a dict."""
        items = self.pop_mark()
        _require(self.stack[-1], (dict, OrderedDict))
        self.stack[-1].update(zip(items[::2], items[1::2]))

    dispatch[ord(pickle.SETITEMS)] = load_setitems

    def load_binpersid(self) -> None:
        """Ask torch for a storage, which lies in the file but outside of the pickle."""
        reference = self.stack.pop()
        # For the other kind, 'module', torch would compare the source of a class and write a patch file.
        if type(reference) is not tuple or reference[:1] != ('storage',):
            raise ForbiddenPickleError(f'the persistent id {reference!r}')
        for part, expected in zip(reference[2:5], (str, str, int)):
            _require(part, expected)
        if self.record_size is not None:
            _, kind, key, _, length = reference
            dtype = torch.uint8 if kind is torch.UntypedStorage else kind.dtype
            if length * dtype.itemsize > self.record_size(key):
                raise pickle.UnpicklingError(f'the storage {key} is longer than its record')
        self.append(self.persistent_load(reference))

    dispatch[ord(pickle.BINPERSID)] = load_binpersid


def for_archive(archive: torch._C.PyTorchFileReader) -> SimpleNamespace:
    """Return a ``pickle_module`` with which ``torch.load`` can read a file of torch's zip format.

    Before 2.12, PyTorch trusts the sizes in the pickle: it would expose the memory behind a record that is too short,
    and write to that memory if the file has the other byte order. So PyTorch's own reader first reads each record once
    more. Another reader, such as zipfile, can be made to find other records in the same file.

    Args:
        archive (torch._C.PyTorchFileReader): Open file.
    """
    record_size = staticmethod(cache(lambda key: len(archive.get_record(f'data/{key}'))))
    checked = type('Unpickler', (Unpickler,), dict(record_size=record_size))
    return SimpleNamespace(__name__=__name__, Unpickler=checked, load=load)


def load(file: BinaryIO, **kwargs: Any) -> Any:
    """Read one object; ``torch.load`` needs this function in a ``pickle_module``.

    Args:
        file (BinaryIO): Open file.
        **kwargs: ``encoding``, as for ``pickle.load``.

    Raises:
        ForbiddenPickleError: If the pickle asks for something that could run code.
    """
    return Unpickler(file, **kwargs).load()
