"""An interpreter for the pickles in weights files that cannot execute anything.

Python's unpickler is a small stack machine whose instructions may import any name and call it. This one knows the same
instructions, but names stay names: the few that a state dict needs (rebuilding tensors, ordered dictionaries, sizes,
dtypes) are carried out by the functions below, and all others become a `Placeholder` which swallows whatever is done to
it. Nothing is imported, looked up or called on behalf of the file.

Time and memory are bounded: `MAX_INSTRUCTIONS` limits what a pickle can build, containers are filled but never expanded
or compared, and texts that the file could have compared over and over (keys, names) have a greatest length.
"""

from __future__ import annotations

import math
import pickletools
import struct
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from ldm.files.errors import CheckpointError
from ldm.files.tensors import DTYPES, MAX_DIMENSIONS, MAX_TEXT, STORAGE_NAMES, LazyTensor, OpenFile, is_shape, is_size

MAX_INSTRUCTIONS = 2**20  # a checkpoint of SD 1.5 with its optimizer needs about 2**17; each builds less than 256 bytes
MAX_FOREIGN = 100  # names that are reported
_MAX_ARGUMENTS = 10  # of a call; each call copies them

_DTYPES = {f"torch.{name}": dtype for name, dtype in DTYPES.items()}
_STORAGES = {
    f"{m}.{name}": dtype for dtype, name in STORAGE_NAMES.items() for m in ("torch", "torch.cuda", "torch.storage")
} | {"torch.storage.UntypedStorage": torch.uint8}
_TENSOR_TYPES = frozenset({"torch.Tensor", "torch._tensor.Tensor", "torch.nn.parameter.Parameter"})
# The instructions of protocols 2 to 5, and what Python 2 adds to them; torch files of protocols 0 and 1 are not read.
_VALUES = frozenset(
    "INT LONG BININT BININT1 BININT2 LONG1 LONG4 BINFLOAT BINSTRING SHORT_BINSTRING SHORT_BINUNICODE BINUNICODE BINUNICODE8 "
    "BINBYTES SHORT_BINBYTES BINBYTES8 BYTEARRAY8".split()
)
_NEW: dict[str, Callable[[], Any]] = {
    **{"NONE": lambda: None, "NEWTRUE": lambda: True, "NEWFALSE": lambda: False, "EMPTY_DICT": dict},
    **{"EMPTY_LIST": list, "EMPTY_TUPLE": tuple, "EMPTY_SET": lambda: Placeholder("set")},
}
# How many items an instruction takes; the others that take items take all since the last mark.
_COUNTS = {"TUPLE1": 1, "TUPLE2": 2, "TUPLE3": 3, "APPEND": 1, "SETITEM": 2}


class Placeholder:
    """Stands for something that a pickle names or builds and that is not executed; `name` says what."""

    __slots__ = ("name",)

    def __init__(self, name: str) -> None:
        self.name = name if len(name) <= 120 else name[:117] + "..."

    def __repr__(self) -> str:
        return f"<{self.name}, not built>"


class Name(Placeholder):
    """A global name itself, before anything is done with it."""

    __slots__ = ()


@dataclass(frozen=True, slots=True)
class Storage:
    """Bytes that tensors are views of: `count` numbers of `dtype` in the record `key`."""

    key: str
    dtype: torch.dtype
    count: int


class Unpickler:
    """Reads the pickles of one file into dicts, lists, tuples, plain values, `LazyTensor` and `Placeholder`.

    Attributes:
        storages: the storages that the pickles mention, by key.
        starts: the first byte in the file of each of them, for whoever knows it to fill in.
        foreign: names in the pickles that another reader would have imported.
    """

    def __init__(self, file: OpenFile) -> None:
        self._file = file
        self.storages: dict[str, Storage] = {}
        self.starts: dict[str, int] = {}
        self.foreign: set[str] = set()

    def load(self, stream: Any) -> Any:
        """The object of one pickle that begins where `stream` stands, and ends where it stands afterwards.

        Args:
            stream: has `read`, `readline` and `tell`; `read` must not allocate more than there is.

        Raises:
            CheckpointError: the pickle is damaged or does something that no weights file does.
        """
        self._stack: list[Any] = []
        self._marked: list[list[Any]] = []  # the stacks below each mark
        self._memo: dict[int, Any] = {}
        position: int | None = 0
        try:
            for count, (instruction, argument, position) in enumerate(pickletools.genops(stream)):  # noqa: B007
                if count == MAX_INSTRUCTIONS:
                    problem = f"the pickle needs more than {MAX_INSTRUCTIONS:,} instructions"
                    raise CheckpointError(f"{problem}; save its state dict alone")
                self._run(instruction.name, argument)
            return self._stack.pop()
        except CheckpointError:
            raise
        except (ValueError, LookupError, TypeError, AttributeError, OverflowError, struct.error) as error:
            raise CheckpointError(f"the pickle is damaged near byte {position}: {str(error)[:200]}") from error

    def _take(self, count: int | None) -> list[Any]:
        """Take the last `count` items off the stack, or all since the last mark."""
        if count is None:
            items, self._stack = self._stack, self._marked.pop()
        elif count > len(self._stack):
            raise IndexError("too few items")
        else:
            items = self._stack[-count:]
            del self._stack[-count:]
        return items

    def _run(self, name: str, argument: Any) -> None:
        """Carry out one instruction."""
        stack = self._stack
        match name:
            case "PROTO" | "FRAME" | "STOP":
                pass
            case _ if name in _VALUES:
                stack.append(argument)
            case _ if name in _NEW:
                stack.append(_NEW[name]())
            case "BINPUT" | "LONG_BINPUT":
                self._memo[argument] = stack[-1]
            case "MEMOIZE":
                self._memo[len(self._memo)] = stack[-1]
            case "BINGET" | "LONG_BINGET":
                stack.append(self._memo[argument])
            case "MARK":
                self._marked.append(stack)
                self._stack = []
            case "POP" | "POP_MARK":
                self._take(1 if stack and name == "POP" else None)
            case "TUPLE" | "TUPLE1" | "TUPLE2" | "TUPLE3" | "FROZENSET":
                items = self._take(_COUNTS.get(name))
                self._stack.append(Placeholder("frozenset") if name == "FROZENSET" else tuple(items))
            case "APPEND" | "APPENDS" | "SETITEM" | "SETITEMS" | "ADDITEMS":
                items = self._take(_COUNTS.get(name))
                _add(self._stack[-1], items)
            case "GLOBAL":
                stack.append(self._name(*argument.split(" ", 1)))
            case "STACK_GLOBAL":
                attribute, module = stack.pop(), stack.pop()
                stack.append(self._name(module, attribute))
            case "REDUCE" | "NEWOBJ":
                arguments, function = stack.pop(), stack.pop()
                stack.append(self._call(function, arguments))
            case "NEWOBJ_EX":
                keywords, arguments, function = stack.pop(), stack.pop(), stack.pop()
                stack.append(Placeholder("object with keywords") if keywords else self._call(function, arguments))
            case "BUILD":  # the state is dropped: neither dictionaries nor tensors have attributes here
                stack.pop()
                if type(stack[-1]) is not dict and not isinstance(stack[-1], (Placeholder, LazyTensor)):
                    raise CheckpointError(f"the pickle sets the state of a {type(stack[-1]).__name__}")
            case "BINPERSID":
                stack.append(self._persistent(stack.pop()))
            case _:
                raise CheckpointError(f"the pickle uses {name}, which no weights file needs")

    def _name(self, module: Any, attribute: Any) -> Any:
        """A global: a dtype, or a name that is only remembered."""
        if type(module) is not str or type(attribute) is not str or len(module) + len(attribute) > MAX_TEXT:
            raise CheckpointError("the pickle names a global by something other than a short text")
        full = f"{'builtins' if module == '__builtin__' else module}.{attribute}"
        if full in _DTYPES:
            return _DTYPES[full]
        named = Name(full)
        known = full in _CALLS or full in _STORAGES or full in _TENSOR_TYPES
        if not known and len(self.foreign) < MAX_FOREIGN:
            self.foreign.add(named.name)
        return named

    def _call(self, function: Any, arguments: Any) -> Any:
        """What stands for `function(*arguments)`; only the functions of `_CALLS` have a meaning."""
        if isinstance(function, Name) and function.name in _CALLS:
            if type(arguments) is not tuple or len(arguments) > _MAX_ARGUMENTS:
                raise CheckpointError(f"the pickle calls {function.name} with something other than a few arguments")
            return _CALLS[function.name](self, *arguments)
        return Placeholder(function.name if isinstance(function, Placeholder) else f"call of {type(function).__name__}")

    def _persistent(self, identity: Any) -> Any:
        """The storage, or for whole pickled modules the class, that a persistent id stands for."""
        if type(identity) is tuple and len(identity) >= 2 and identity[0] == "module":
            return identity[1] if isinstance(identity[1], Name) else Placeholder("module")
        # The sixth item is there in the older format alone, and None since torch 0.4.
        if type(identity) is not tuple or identity[:1] != ("storage",) or identity[5:] not in ((), (None,)):
            raise CheckpointError("the pickle has a persistent id that is not a tensor storage")
        _, kind, key, _, count = identity[:5]
        if not isinstance(kind, Name) or kind.name not in _STORAGES:
            quantised = "; quantised tensors are not supported" if ".Q" in _describe(kind) else ""
            raise CheckpointError(f"the pickle has a tensor storage of the unknown type {_describe(kind)}{quantised}")
        if type(key) is not str or len(key) > MAX_TEXT or not is_size(count):
            raise CheckpointError("the pickle has a tensor storage with an odd key or size")
        storage = Storage(key, _STORAGES[kind.name], count)
        if self.storages.setdefault(key, storage) != storage:
            raise CheckpointError(f"the pickle describes tensor storage {key[:40]!r} in two ways")
        return storage

    # The functions that have a meaning.

    def _tensor(self, storage: Any, offset: Any, shape: Any, stride: Any, *rest: Any) -> LazyTensor:
        grad, hooks, bits = (*rest, None, None, None)[:3]
        return self._typed_tensor(storage, offset, shape, stride, grad, hooks, getattr(storage, "dtype", None), bits)

    def _typed_tensor(
        self, storage: Any, offset: Any, shape: Any, stride: Any, _grad: Any, _hooks: Any, dtype: Any, bits: Any = None
    ) -> LazyTensor:
        if not isinstance(storage, Storage):
            raise CheckpointError("the pickle builds a tensor from something that is not a tensor storage")
        if bits:
            raise CheckpointError("the pickle builds a conjugated or negated view, which is not supported")
        if not isinstance(dtype, torch.dtype):
            raise CheckpointError(f"the pickle builds a tensor of type {_describe(dtype)}, which is not supported")
        fits = is_shape(shape, tuple) and is_shape(stride, tuple, product=False) and is_size(offset)
        if not fits or len(shape) != len(stride):
            raise CheckpointError("the pickle builds a tensor with an impossible offset, shape or stride")
        reach = 1 + sum((n - 1) * step for n, step in zip(shape, stride, strict=True)) if all(shape) else 0
        if (offset + reach) * dtype.itemsize > storage.count * storage.dtype.itemsize:
            raise CheckpointError("the pickle builds a tensor that reaches beyond its storage")
        gaps = max(0, reach - math.prod(shape)) * dtype.itemsize
        read = partial(self._read, storage.key, offset * dtype.itemsize, dtype, shape, stride)
        return LazyTensor(shape, dtype, read, gaps)

    def _read(self, key: str, start: int, *kind: Any) -> Tensor:
        return self._file.read_tensor(self.starts[key] + start, *kind)

    def _parameter(self, data: Any, _grad: Any, _hooks: Any, _state: Any = None) -> Any:
        return data if isinstance(data, LazyTensor) else Placeholder("torch.nn.parameter.Parameter")

    def _tensor_of_class(self, function: Any, kind: Any, arguments: Any, _state: Any) -> Any:
        """A tensor that carries attributes, or one of a subclass; the latter's meaning is unknown here."""
        rebuilt = isinstance(function, Name) and function.name.startswith("torch._utils._rebuild_")
        if rebuilt and isinstance(kind, Name) and kind.name in _TENSOR_TYPES:
            return self._call(function, arguments)
        return Placeholder(kind.name if isinstance(kind, Placeholder) else "tensor of an unknown type")

    def _size(self, shape: Any) -> tuple[int, ...]:
        if type(shape) not in (tuple, list) or len(shape) > MAX_DIMENSIONS:
            raise CheckpointError("the pickle builds a size from something that is not a short list of numbers")
        return tuple(shape)


_CALLS: dict[str, Callable[..., Any]] = {
    "torch._utils._rebuild_tensor": Unpickler._tensor,
    "torch._utils._rebuild_tensor_v2": Unpickler._tensor,
    "torch._utils._rebuild_tensor_v3": Unpickler._typed_tensor,
    "torch._utils._rebuild_parameter": Unpickler._parameter,
    "torch._utils._rebuild_parameter_with_state": Unpickler._parameter,
    "torch._tensor._rebuild_from_type_v2": Unpickler._tensor_of_class,
    "torch.Size": Unpickler._size,
    # Their entries come in instructions of their own.
    "collections.OrderedDict": lambda _self: {},
    "collections.defaultdict": lambda _self, _factory=None: {},
}
_KEY_TYPES = (str, int, float, bool, bytes, type(None), Placeholder, Name, torch.dtype)


def _add(target: Any, items: list[Any]) -> None:
    """Append items to a list, or set entries of a dict from keys and values in turn; a placeholder swallows them.

    A key that could be costly to hash or compare becomes a placeholder.
    """
    if type(target) is list:
        target.extend(items)
    elif type(target) is dict and len(items) % 2 == 0:
        for key, value in zip(items[::2], items[1::2], strict=True):
            costly = type(key) is int and key.bit_length() > 60 or type(key) in (str, bytes) and len(key) > MAX_TEXT
            if costly or type(key) not in _KEY_TYPES:
                key = Placeholder(f"a{' long' if costly else ''} dictionary key of type {type(key).__name__}")
            target[key] = value
    elif not isinstance(target, Placeholder):
        raise CheckpointError(f"the pickle adds items to a {type(target).__name__}, or half an entry to a dictionary")


def _describe(value: Any) -> str:
    return value.name if isinstance(value, Placeholder) else type(value).__name__
