"""An interpreter for the pickles in weights files that cannot execute anything.

Python's unpickler is a small stack machine whose instructions may import any name and call it. This one has the same
instructions, but names stay names: the few that a state dict needs (tensor rebuilding, ordered dictionaries, sizes,
dtypes) are carried out by the functions below, and every other becomes a `Placeholder` which swallows whatever is done
to it. Nothing is imported, looked up or called on behalf of the file, and what is built costs memory in proportion to
the instructions read. Tensors are described (`StoredTensor`), not read.
"""

from __future__ import annotations

import math
import pickletools
import struct
import warnings
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any, BinaryIO

import torch

from cldm.checkpoint.errors import CheckpointError

MAX_INSTRUCTIONS = 2**21  # a checkpoint of SD 1.5 with its optimizer needs about 2**17; each costs up to 100 bytes
MAX_DIMENSIONS = 64

DTYPES = {
    name: getattr(torch, name)
    for name in (
        *("float64", "float32", "float16", "bfloat16", "float8_e4m3fn", "float8_e5m2"),
        *("int64", "int32", "int16", "int8", "uint8", "uint16", "uint32", "uint64", "bool"),
        *("complex64", "complex128"),
    )
    if hasattr(torch, name)
}
_DTYPE_ALIASES = {"double": "float64", "float": "float32", "half": "float16", "long": "int64", "int": "int32"}
_STORAGE_NAMES = {
    **{"DoubleStorage": "float64", "FloatStorage": "float32", "HalfStorage": "float16", "BFloat16Storage": "bfloat16"},
    **{"LongStorage": "int64", "IntStorage": "int32", "ShortStorage": "int16", "CharStorage": "int8"},
    **{"ByteStorage": "uint8", "BoolStorage": "bool", "UntypedStorage": "uint8"},
    **{"ComplexFloatStorage": "complex64", "ComplexDoubleStorage": "complex128"},
    # quantised: only for their sizes, as what is rebuilt from them stays a placeholder
    **{"QInt8Storage": "uint8", "QUInt8Storage": "uint8", "QUInt4x2Storage": "uint8", "QUInt2x4Storage": "uint8"},
    **{"QInt32Storage": "int32"},
}
_STORAGE_DTYPES = {
    f"{module}.{name}": DTYPES[dtype]
    for module in ("torch", "torch.cuda", "torch.storage")
    for name, dtype in _STORAGE_NAMES.items()
}
_DTYPE_NAMES = {f"torch.{name}": dtype for name, dtype in DTYPES.items()}
_DTYPE_NAMES.update({f"torch.{alias}": DTYPES[name] for alias, name in _DTYPE_ALIASES.items()})


class Placeholder:
    """Stands for something that a pickle names or builds and that is not executed; `name` says what."""

    __slots__ = ("name",)

    def __init__(self, name: str) -> None:
        self.name = name if len(name) <= 120 else name[:117] + "..."

    def __repr__(self) -> str:
        return f"<{self.name}, not built>"


class _Named(Placeholder):
    """A global name itself, before anything is done with it."""

    __slots__ = ()


@dataclass(frozen=True, slots=True)
class Storage:
    """A run of bytes in the file that tensors are views of: `count` numbers of `dtype`, `offset` into record `key`."""

    key: str
    dtype: torch.dtype
    count: int
    offset: int = 0


@dataclass(frozen=True, slots=True)
class StoredTensor:
    """A tensor as the pickle describes it; `offset` and `stride` count elements of `dtype`."""

    storage: Storage
    dtype: torch.dtype
    offset: int
    shape: tuple[int, ...]
    stride: tuple[int, ...]

    @property
    def span(self) -> tuple[int, int]:
        """First byte within the storage's record, and how many bytes the view reaches over."""
        size = self.dtype.itemsize
        reach = 0
        if math.prod(self.shape):
            reach = 1 + sum((n - 1) * step for n, step in zip(self.shape, self.stride, strict=True))
        return (self.storage.offset * self.storage.dtype.itemsize) + self.offset * size, reach * size


def unpickle(file: BinaryIO, storages: dict[str, Storage] | None = None) -> tuple[Any, set[str]]:
    """Interpret one pickle from the current position of `file`, which ends up behind it.

    Args:
        file: has `read`, `readline` and `tell`; `read` must not allocate more than there is.
        storages: receives the storages that the pickle mentions, by key.

    Returns:
        the object (dicts, lists, tuples, scalars, `StoredTensor`, `Placeholder`), and the foreign names in the pickle.

    Raises:
        CheckpointError: the pickle is damaged or does something that no weights file does. Without the file's name.
    """
    machine = _Machine({} if storages is None else storages)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", DeprecationWarning)  # of backslashes in damaged text
            machine.run(file)
    except CheckpointError:
        raise
    except (ValueError, LookupError, TypeError, AttributeError, OverflowError, struct.error) as error:
        raise CheckpointError(f"the pickle is damaged near byte {machine.position}: {str(error)[:200]}") from error
    return machine.result, machine.foreign


class _Machine:
    """Stack, marks and memo of one pickle."""

    def __init__(self, storages: dict[str, Storage]) -> None:
        self.stack: list[Any] = []
        self.marked: list[list[Any]] = []
        self.memo: dict[int, Any] = {}
        self.storages = storages
        self.foreign: set[str] = set()
        self.result: Any = None
        self.budget = MAX_INSTRUCTIONS
        self.position: int | None = 0

    def run(self, file: BinaryIO) -> None:
        """Carry out the instructions up to the end of the pickle."""
        for instruction, argument, position in pickletools.genops(file):
            self.position = position
            self.spend(1)
            handler = _INSTRUCTIONS.get(instruction.name)
            if handler is None:
                raise CheckpointError(f"the pickle uses {instruction.name}, which no weights file needs")
            handler(self, argument)

    def spend(self, count: int) -> None:
        """Account for work and memory of about `count` items."""
        self.budget -= count
        if self.budget < 0:
            raise CheckpointError(f"the pickle needs more than {MAX_INSTRUCTIONS:,} instructions")

    def pop_mark(self) -> list[Any]:
        """What was pushed since the last mark."""
        items, self.stack = self.stack, self.marked.pop()
        return items

    def mark(self) -> None:
        self.marked.append(self.stack)
        self.stack = []

    def name(self, module: Any, attribute: Any) -> Any:
        """A global: a dtype, a name that is known, or a name that is only remembered."""
        if type(module) is not str or type(attribute) is not str:
            raise CheckpointError("the pickle names a global by something other than text")
        full = f"{_MODULE_ALIASES.get(module, module)}.{attribute}"
        if full in _DTYPE_NAMES:
            return _DTYPE_NAMES[full]
        named = _Named(full)
        if full not in _CALLS and full not in _STORAGE_DTYPES and full not in _TENSOR_TYPES:
            self.foreign.add(named.name)
        return named

    def call(self, function: Any, arguments: Any) -> Any:
        """What stands for `function(*arguments)`; only the functions of `_CALLS` have a meaning."""
        if isinstance(function, _Named) and function.name in _CALLS:
            if type(arguments) is not tuple:
                raise CheckpointError(f"the pickle calls {function.name} with something other than a tuple")
            self.spend(sum(len(argument) for argument in arguments if type(argument) in (dict, list, tuple)))
            return _CALLS[function.name](*arguments)
        return Placeholder(function.name if isinstance(function, Placeholder) else f"call of {type(function).__name__}")

    def persistent(self, identity: Any) -> Any:
        """The storage, or for whole pickled modules the class, that a persistent id stands for."""
        if type(identity) is tuple and len(identity) >= 2 and identity[0] == "module":
            return identity[1] if isinstance(identity[1], _Named) else Placeholder("module")
        if type(identity) is not tuple or len(identity) not in (5, 6) or identity[0] != "storage":
            raise CheckpointError("the pickle has a persistent id that is not a tensor storage")
        kind, key, count = identity[1], identity[2], identity[4]
        if not isinstance(kind, _Named) or kind.name not in _STORAGE_DTYPES:
            named = kind.name if isinstance(kind, Placeholder) else type(kind).__name__
            raise CheckpointError(f"the pickle has a tensor storage of the unknown type {named}")
        if type(key) is not str or not _is_size(count):
            raise CheckpointError("the pickle has a tensor storage with an odd key or size")
        storage = Storage(key, _STORAGE_DTYPES[kind.name], count)
        known = self.storages.setdefault(key, storage)
        if known != storage:
            raise CheckpointError(f"the pickle describes tensor storage {key[:40]!r} in two ways")
        view = identity[5] if len(identity) == 6 else None
        if view is None:
            return storage
        _, offset, size = view  # of torch before 0.4: a part of a storage
        if not _is_size(offset) or not _is_size(size) or offset + size > count:
            raise CheckpointError("the pickle has a view that reaches beyond its tensor storage")
        return Storage(key, storage.dtype, size, offset)


def _is_size(number: Any) -> bool:
    return type(number) is int and 0 <= number < 2**62


def _tensor(storage: Any, offset: Any, shape: Any, stride: Any, dtype: torch.dtype | None = None) -> StoredTensor:
    if not isinstance(storage, Storage):
        raise CheckpointError("the pickle builds a tensor from something that is not a tensor storage")
    if type(shape) is not tuple or type(stride) is not tuple or not len(shape) == len(stride) <= MAX_DIMENSIONS:
        raise CheckpointError("the pickle builds a tensor with an impossible shape or stride")
    if not all(map(_is_size, (offset, *shape, *stride))) or math.prod(max(n, 1) for n in shape) >= 2**62:
        raise CheckpointError("the pickle builds a tensor with an impossible offset, shape or stride")
    tensor = StoredTensor(storage, storage.dtype if dtype is None else dtype, offset, shape, stride)
    start, reach = tensor.span
    if start + reach > (storage.offset + storage.count) * storage.dtype.itemsize:
        raise CheckpointError("the pickle builds a tensor that reaches beyond its storage")
    return tensor


def _rebuild_tensor(storage: Any, offset: Any, shape: Any, stride: Any) -> StoredTensor:
    return _tensor(storage, offset, shape, stride)


def _rebuild_tensor_v2(
    storage: Any, offset: Any, shape: Any, stride: Any, _grad: Any, _hooks: Any, bits: Any = None
) -> StoredTensor:
    if bits:
        raise CheckpointError("the pickle builds a conjugated or negated view, which is not supported")
    return _tensor(storage, offset, shape, stride)


def _rebuild_tensor_v3(
    storage: Any, offset: Any, shape: Any, stride: Any, _grad: Any, _hooks: Any, dtype: Any, bits: Any = None
) -> StoredTensor:
    if isinstance(dtype, Placeholder):
        raise CheckpointError(f"the pickle builds a tensor of type {dtype.name}, which is not supported")
    if bits or not isinstance(dtype, torch.dtype):
        raise CheckpointError("the pickle builds a tensor of an unknown kind")
    return _tensor(storage, offset, shape, stride, dtype)


def _rebuild_parameter(data: Any, _grad: Any, _hooks: Any, _state: Any = None) -> Any:
    return data if isinstance(data, StoredTensor) else Placeholder("torch.nn.parameter.Parameter")


def _rebuild_from_type(function: Any, kind: Any, arguments: Any, _state: Any) -> Any:
    """A tensor that carries attributes, or one of a subclass; the latter's meaning is unknown here."""
    if (
        isinstance(function, _Named)
        and isinstance(kind, _Named)
        and function.name in _PLAIN_REBUILDS
        and kind.name in _TENSOR_TYPES
        and type(arguments) is tuple
    ):
        return _PLAIN_REBUILDS[function.name](*arguments)
    return Placeholder(kind.name if isinstance(kind, Placeholder) else "tensor of an unknown type")


def _size(*arguments: Any) -> tuple[int, ...]:
    (shape,) = arguments
    if type(shape) not in (tuple, list) or len(shape) > MAX_DIMENSIONS:
        raise CheckpointError("the pickle builds a size from something that is not a short list of numbers")
    return tuple(shape)


def _dictionary(*arguments: Any) -> dict:
    """`OrderedDict()`, or from a list of pairs or a dict."""
    if not arguments:
        return {}
    (entries,) = arguments
    made: dict = {}
    _put(made, entries.items() if type(entries) is dict else (_pair(entry) for entry in entries))
    return made


def _default_dictionary(_factory: Any = None, *arguments: Any) -> dict:
    return _dictionary(*arguments)


def _pair(entry: Any) -> tuple[Any, Any]:
    if type(entry) not in (tuple, list) or len(entry) != 2:
        raise CheckpointError("the pickle builds a dictionary from something that is not a pair")
    return entry[0], entry[1]


_MODULE_ALIASES = {"__builtin__": "builtins"}
_TENSOR_TYPES = frozenset({"torch.Tensor", "torch._tensor.Tensor", "torch.nn.parameter.Parameter"})
_PLAIN_REBUILDS: dict[str, Callable[..., Any]] = {
    "torch._utils._rebuild_tensor": _rebuild_tensor,
    "torch._utils._rebuild_tensor_v2": _rebuild_tensor_v2,
    "torch._utils._rebuild_tensor_v3": _rebuild_tensor_v3,
    "torch._utils._rebuild_parameter": _rebuild_parameter,
    "torch._utils._rebuild_parameter_with_state": _rebuild_parameter,
}
_CALLS: dict[str, Callable[..., Any]] = {
    **_PLAIN_REBUILDS,
    "torch._tensor._rebuild_from_type_v2": _rebuild_from_type,
    "torch.Size": _size,
    "collections.OrderedDict": _dictionary,
    "collections.defaultdict": _default_dictionary,
    "builtins.dict": _dictionary,
}


# The instructions. Containers are filled, never expanded, so shared references cost nothing however often they repeat.

_KEY_TYPES = (str, int, float, bool, bytes, type(None), Placeholder, _Named, torch.dtype)


def _put(target: Any, pairs: Iterable[tuple[Any, Any]]) -> None:
    """Set entries of a dict; a placeholder swallows them. Keys that could be costly to hash become placeholders."""
    if isinstance(target, Placeholder):
        return
    if type(target) is not dict:
        raise CheckpointError("the pickle sets entries of something that is not a dictionary")
    for key, entry in pairs:
        if type(key) not in _KEY_TYPES or type(key) is int and key.bit_length() > 60:
            key = Placeholder(f"a dictionary key of type {type(key).__name__}")
        target[key] = entry


def _pairs(items: list[Any]) -> Iterable[tuple[Any, Any]]:
    return zip(items[::2], items[1::2], strict=True)


def _extend(target: Any, items: list[Any]) -> None:
    if isinstance(target, Placeholder):
        return
    if type(target) is not list:
        raise CheckpointError("the pickle appends to something that is not a list")
    target.extend(items)


def _push_argument(m: _Machine, argument: Any) -> None:
    m.stack.append(argument)


def _push_new(make: Callable[[], Any]) -> Callable[[_Machine, Any], None]:
    return lambda m, _: m.stack.append(make())


def _collect(make: Callable[[list[Any]], Any]) -> Callable[[_Machine, Any], None]:
    """Replace everything since the mark by what `make` makes of it."""

    def run(m: _Machine, _: Any) -> None:
        made = make(m.pop_mark())
        m.stack.append(made)

    return run


def _tuple_of(count: int) -> Callable[[_Machine, Any], None]:
    def run(m: _Machine, _: Any) -> None:
        if len(m.stack) < count:
            raise IndexError("too few items for a tuple")
        m.stack[-count:] = [tuple(m.stack[-count:])]

    return run


def _make_dictionary(items: list[Any]) -> dict:
    made: dict = {}
    _put(made, _pairs(items))
    return made


def _append(m: _Machine, _: Any) -> None:
    item = m.stack.pop()
    _extend(m.stack[-1], [item])


def _appends(m: _Machine, _: Any) -> None:
    items = m.pop_mark()
    _extend(m.stack[-1], items)


def _set_item(m: _Machine, _: Any) -> None:
    entry, key = m.stack.pop(), m.stack.pop()
    _put(m.stack[-1], [(key, entry)])


def _set_items(m: _Machine, _: Any) -> None:
    items = m.pop_mark()
    _put(m.stack[-1], _pairs(items))


def _add_items(m: _Machine, _: Any) -> None:
    m.pop_mark()
    if not isinstance(m.stack[-1], Placeholder):
        raise CheckpointError("the pickle adds items to something that is not a set")


def _pop(m: _Machine, _: Any) -> None:
    if m.stack:
        m.stack.pop()
    else:
        m.pop_mark()


def _pop_mark(m: _Machine, _: Any) -> None:
    m.pop_mark()


def _mark(m: _Machine, _: Any) -> None:
    m.mark()


def _duplicate(m: _Machine, _: Any) -> None:
    m.stack.append(m.stack[-1])


def _remember(m: _Machine, index: int) -> None:
    if not 0 <= index < 2**32:
        raise CheckpointError("the pickle uses an impossible memo number")
    m.memo[index] = m.stack[-1]


def _remember_next(m: _Machine, _: Any) -> None:
    m.memo[len(m.memo)] = m.stack[-1]


def _recall(m: _Machine, index: int) -> None:
    m.stack.append(m.memo[index])


def _global(m: _Machine, argument: str) -> None:
    module, attribute = argument.split(" ", 1)
    m.stack.append(m.name(module, attribute))


def _stack_global(m: _Machine, _: Any) -> None:
    attribute, module = m.stack.pop(), m.stack.pop()
    m.stack.append(m.name(module, attribute))


def _instance(m: _Machine, argument: str) -> None:
    m.pop_mark()
    module, attribute = argument.split(" ", 1)
    m.stack.append(Placeholder(m.name(module, attribute).name))


def _object(m: _Machine, _: Any) -> None:
    function, *arguments = m.pop_mark()
    m.stack.append(m.call(function, tuple(arguments)))


def _reduce(m: _Machine, _: Any) -> None:
    arguments, function = m.stack.pop(), m.stack.pop()
    m.stack.append(m.call(function, arguments))


def _new_object_with_keywords(m: _Machine, _: Any) -> None:
    keywords, arguments, function = m.stack.pop(), m.stack.pop(), m.stack.pop()
    m.stack.append(Placeholder("object with keywords") if keywords else m.call(function, arguments))


def _build(m: _Machine, _: Any) -> None:
    """The state that would be set on an object is dropped: neither dictionaries nor tensors here have attributes."""
    m.stack.pop()
    if type(m.stack[-1]) is not dict and not isinstance(m.stack[-1], (Placeholder, StoredTensor)):
        raise CheckpointError(f"the pickle sets the state of a {type(m.stack[-1]).__name__}")


def _persistent(m: _Machine, _: Any) -> None:
    m.stack.append(m.persistent(m.stack.pop()))


def _stop(m: _Machine, _: Any) -> None:
    m.result = m.stack.pop()


def _nothing(m: _Machine, _: Any) -> None:
    """Protocol version and frame sizes carry no meaning here."""


_INSTRUCTIONS: dict[str, Callable[[_Machine, Any], None]] = {
    **dict.fromkeys(("INT", "BININT", "BININT1", "BININT2", "LONG", "LONG1", "LONG4"), _push_argument),
    **dict.fromkeys(("FLOAT", "BINFLOAT", "STRING", "BINSTRING", "SHORT_BINSTRING"), _push_argument),
    **dict.fromkeys(("UNICODE", "SHORT_BINUNICODE", "BINUNICODE", "BINUNICODE8"), _push_argument),
    **dict.fromkeys(("BINBYTES", "SHORT_BINBYTES", "BINBYTES8", "BYTEARRAY8"), _push_argument),
    **dict.fromkeys(("PUT", "BINPUT", "LONG_BINPUT"), _remember),
    **dict.fromkeys(("GET", "BINGET", "LONG_BINGET"), _recall),
    **dict.fromkeys(("PROTO", "FRAME"), _nothing),
    **{"NONE": _push_new(lambda: None), "NEWTRUE": _push_new(lambda: True), "NEWFALSE": _push_new(lambda: False)},
    **{"EMPTY_LIST": _push_new(list), "EMPTY_TUPLE": _push_new(tuple), "EMPTY_DICT": _push_new(dict)},
    **{"EMPTY_SET": _push_new(lambda: Placeholder("set")), "FROZENSET": _collect(lambda _: Placeholder("frozenset"))},
    **{"LIST": _collect(list), "TUPLE": _collect(tuple), "DICT": _collect(_make_dictionary)},
    **{"TUPLE1": _tuple_of(1), "TUPLE2": _tuple_of(2), "TUPLE3": _tuple_of(3)},
    **{"APPEND": _append, "APPENDS": _appends, "SETITEM": _set_item, "SETITEMS": _set_items, "ADDITEMS": _add_items},
    **{"POP": _pop, "POP_MARK": _pop_mark, "MARK": _mark, "DUP": _duplicate, "MEMOIZE": _remember_next},
    **{"GLOBAL": _global, "STACK_GLOBAL": _stack_global, "INST": _instance, "OBJ": _object, "REDUCE": _reduce},
    **{"NEWOBJ": _reduce, "NEWOBJ_EX": _new_object_with_keywords, "BUILD": _build, "BINPERSID": _persistent},
    "STOP": _stop,
}
