"""Hostile, lying and broken files: nothing in them runs, none costs more than its own size, each gets a clear error."""

import copyreg
import functools
import gc
import io
import json
import os
import pickle
import runpy
import struct
import subprocess
import sys
import time
import tracemalloc
import zipfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext, suppress
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from ldm.files import CheckpointError, MissingFileError, open_weights, pickles, read_checkpoint, read_state_dict
from tests.ldm.files.forging import (
    dictionary,
    number,
    program,
    safetensors,
    storage,
    tensor,
    text,
    torch_legacy,
    torch_zip,
)
from tests.ldm.files.fuzz import fuzz

FORGERS = [torch_zip, torch_legacy]
FORMATS = ["torch-zip", "torch-legacy"]


def refused(path: Path, match: str | None = None) -> str:
    """The error of opening and reading a file that must be refused; it names the file once and is short."""
    with pytest.raises(CheckpointError, match=match) as raised:
        read_state_dict(path)
    message = str(raised.value)
    assert message.count(str(path)) == 1 and len(message) < 600, message
    return message


@contextmanager
def cheap(memory: int = 2**21, seconds: float = 10) -> Iterator[None]:
    """What happens within allocates less than `memory` bytes (torch's not counted) and takes few seconds."""
    tracemalloc.start()
    start = time.monotonic()
    try:
        yield
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < memory, f"{peak:,} bytes"
    assert time.monotonic() - start < seconds


# Code in pickles. Each payload leaves a mark when Python's own unpickler reads it; here it must not.


class Call:
    """Pickles as the call of a function."""

    def __init__(self, function: Any, *arguments: Any) -> None:
        self.function, self.arguments = function, arguments

    def __reduce__(self) -> tuple[Any, tuple[Any, ...]]:
        return self.function, self.arguments

    def __call__(self) -> None:
        """So that it may itself stand for a function."""


class Stateful:
    """An object whose `__setstate__` acts."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark.as_posix()

    def __setstate__(self, state: dict[str, str]) -> None:
        Path(state["mark"]).touch()


class Growing(list):
    """A list whose `extend` and `append` act."""

    def append(self, item: str) -> None:
        Path(item).touch()

    def extend(self, items: list[str]) -> None:
        Path(items[0]).touch()


class Keyed(dict):
    """A dict whose `__setitem__` acts."""

    def __setitem__(self, key: str, mark: str) -> None:
        Path(mark).touch()


def _touch(mark: Path) -> Call:
    return Call(os.system, f"touch {mark}")


def _reentry(mark: Path) -> Call:
    inner = mark.parent / "inner.pth"
    torch.save({"w": _touch(mark)}, inner)
    return Call(functools.partial(torch.load, weights_only=False), str(inner))


def _script(mark: Path) -> Call:
    script = mark.parent / "script.py"
    script.write_text(f"open({str(mark)!r}, 'w').close()")
    return Call(runpy.run_path, str(script))


PAYLOADS: dict[str, tuple[Callable[[Path], Any], str]] = {
    "os.system": (_touch, "system"),
    "eval": (lambda mark: Call(eval, f"open({str(mark)!r}, 'w').close()"), "builtins.eval"),
    "exec": (lambda mark: Call(exec, f"open({str(mark)!r}, 'w').close()"), "builtins.exec"),
    "getattr chain": (
        lambda mark: Call(Call(getattr, Call(__import__, "os"), "system"), f"touch {mark}"),
        "builtins.getattr",
    ),
    "subprocess": (lambda mark: Call(subprocess.check_call, ["touch", str(mark)]), "check_call"),
    "runpy": (_script, "runpy.run_path"),
    "torch.load": (_reentry, "functools.partial"),
    "__setstate__": (Stateful, "test_attacks.Stateful"),
    "list subclass": (lambda mark: Growing([str(mark), str(mark)]), "test_attacks.Growing"),
    "dict subclass": (lambda mark: Keyed(a=str(mark), b=str(mark)), "test_attacks.Keyed"),
    "deep inside": (lambda mark: [{"a": ({"b": [_touch(mark)]},)}], "system"),
}


def _in_hooks(payload: Any) -> torch.Tensor:
    tensor = torch.ones(2)
    tensor.attribute = payload  # pickled as the state of the tensor
    return tensor


PLACES: dict[str, tuple[Callable[[Any], Any], bool]] = {  # and whether the weights stay usable
    "all of it": (lambda payload: payload, False),
    "the state dict": (lambda payload: {"state_dict": payload}, False),
    "an entry": (lambda payload: {"state_dict": {"good": torch.ones(2), "odd": payload}}, False),
    "an entry, unwrapped": (lambda payload: {"good": torch.ones(2), "odd": payload}, False),
    "beside": (lambda payload: {"state_dict": {"good": torch.ones(2)}, "callbacks": payload}, True),
    "within a tensor": (lambda payload: {"good": _in_hooks(payload)}, True),
}


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("name", PAYLOADS)
def test_code_in_a_pickle_never_runs(tmp_path: Path, name: str, place: str) -> None:
    make, named = PAYLOADS[name]
    put, usable = PLACES[place]
    mark = tmp_path / "mark"
    for format in FORMATS:
        path = tmp_path / f"{format}.ckpt"
        torch.save(put(make(mark)), path, _use_new_zipfile_serialization=format == "torch-zip")
        if usable:
            with open_weights(path) as file:
                assert torch.equal(file["good"].read(), torch.ones(2)) and list(file) == ["good"]
                assert any(named in foreign for foreign in file.foreign)
            if place == "beside":
                with pytest.raises(CheckpointError, match="not executed"):
                    read_checkpoint(path)
        else:
            message = refused(path)
            assert named in message or "a list" in message or "holds no tensors" in message, message
        assert not mark.exists()


@pytest.mark.parametrize("name", PAYLOADS)
def test_the_payloads_are_real(tmp_path: Path, name: str) -> None:
    pickle.loads(pickle.dumps(PAYLOADS[name][0](tmp_path / "mark"), 2))
    assert (tmp_path / "mark").exists()


def test_nothing_is_imported_or_looked_up(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A module that acts when imported, named in every way that a pickle can name something."""
    (tmp_path / "acts_on_import.py").write_text(f"open({str(tmp_path / 'mark')!r}, 'w').close()")
    monkeypatch.syspath_prepend(tmp_path)
    name = b"cacts_on_import\nthing\n"
    ways = {
        "GLOBAL": name,
        "STACK_GLOBAL": text("acts_on_import") + text("thing") + b"\x93",
        "REDUCE": name + b")R",
        "NEWOBJ": name + b")\x81",
        "NEWOBJ_EX": name + b")}\x92",
        "BUILD": name + b")R}b",
        "key": b"}" + name + b"Ns",
        "storage type": storage(kind=name)[:-1],
        "hooks": tensor(hooks=name + b")R"),
        "dotted": text("acts_on_import.thing") + text("a.b.c") + b"\x93",
    }
    for way, instructions in ways.items():
        path = torch_zip(tmp_path / "w.pth", program(dictionary(state_dict=dictionary(w=tensor()), extra=instructions)))
        with open_weights(path) as file:
            assert list(file) == ["w"] and any("acts_on_import" in n for n in file.foreign), way
        assert not (tmp_path / "mark").exists(), way


@pytest.mark.parametrize("forge", FORGERS)
def test_extension_codes(tmp_path: Path, forge: Callable[..., Path]) -> None:
    copyreg.add_extension(os.system.__module__, "system", 240)
    try:
        pickled = pickle.dumps({"w": _touch(tmp_path / "mark")}, 2)
        assert b"\x82\xf0" in pickled
        refused(forge(tmp_path / "w.pth", pickled), "EXT1")
        refused(forge(tmp_path / "w.pth", program(b"\x83\x00\x01")), "EXT2")
    finally:
        copyreg.remove_extension(os.system.__module__, "system", 240)
    assert not (tmp_path / "mark").exists()


@pytest.mark.parametrize("forge", FORGERS)
@pytest.mark.parametrize(
    "instructions",
    {
        "text": b"Pstorage\n",
        "number": number(7) + b"Q",
        "none": b"NQ",
        "short": b"(" + text("storage") + b"tQ",
        "called type": storage(kind=b"cos\nsystem\n(" + text("true") + b"tR"),
        "unknown type": storage(kind=b"cos\nsystem\n"),
        "negative count": storage(count=-4),
        "count beyond all": storage(count=2**63),
        "key is a list": b"(" + text("storage") + b"ctorch\nFloatStorage\n]" + text("cpu") + number(4) + b"tQ",
        "two sizes": storage(count=4) + b"0" + storage(count=3),
        "view": storage()[:-2] + b"(" + text("v") + number(3) + number(2) + b"ttQ",
    }.items(),
    ids=lambda item: item[0],
)
def test_persistent_ids(tmp_path: Path, forge: Callable[..., Path], instructions: tuple[str, bytes]) -> None:
    refused(forge(tmp_path / "w.pth", program(dictionary(w=tensor(held=instructions[1])))), "the pickle|storage")


@pytest.mark.parametrize("forge", FORGERS)
@pytest.mark.parametrize(
    ("instructions", "match"),
    [
        (tensor(shape=(5,)), "beyond its storage"),
        (tensor(offset=1), "beyond its storage"),
        (tensor(shape=(2,), stride=(4,)), "beyond its storage"),
        (tensor(offset=-1), "impossible"),
        (tensor(stride=(-1,)), "impossible"),
        (tensor(shape=(2, 2)), "impossible"),
        (tensor(shape=(2**62,), stride=(0,)), "impossible"),
        (tensor(shape=(2**40,), stride=(0,)), "many times larger"),
        (tensor(shape=(2**40, 2**40, 0), stride=(0, 0, 0)), "impossible"),
        (tensor(shape=(1,) * 65, stride=(1,) * 65), "impossible"),
        (tensor(held=b"]"), "not a tensor storage"),
        (tensor(held=tensor()), "not a tensor storage"),
        (storage(), "storage"),
    ],
)
def test_tensors_that_lie(tmp_path: Path, forge: Callable[..., Path], instructions: bytes, match: str) -> None:
    with cheap():
        refused(forge(tmp_path / "w.pth", program(dictionary(w=instructions))), match)


def test_many_views_of_one_storage_are_not_multiplied(tmp_path: Path) -> None:
    views = {f"w{i}": tensor(shape=(1000, 1000), stride=(0, 0)) for i in range(50)}
    refused(torch_zip(tmp_path / "w.pth", program(dictionary(**views))), "many times larger")
    beside = dictionary(state_dict=dictionary(w=tensor()), optimizer_states=dictionary(**views))
    with pytest.raises(CheckpointError, match="many times larger"):
        read_checkpoint(torch_zip(tmp_path / "w.pth", program(beside)))


@pytest.mark.parametrize("same", [False, True])
def test_wide_views_are_read_a_few_times_at_most(tmp_path: Path, same: bool) -> None:
    """A column of a matrix is read with all that lies between its numbers, so all columns would take quadratic time."""
    for size in (400, 800, 1600):
        matrix = torch.zeros(size, size)
        columns = [matrix[:, 0]] * size if same else list(matrix.unbind(1))
        torch.save({f"w{i}": column for i, column in enumerate(columns)}, tmp_path / "w.pth")
        with cheap(2**23):
            refused(tmp_path / "w.pth", "many times larger than the file; save a clone")
    few = {f"w{i}": column for i, column in enumerate(torch.arange(30.0).view(10, 3).unbind(1))}
    for content in (few, {"state_dict": {"w": few["w0"]}, "optimizer": few}):
        torch.save(content, tmp_path / "w.pth")
        read_checkpoint(tmp_path / "w.pth")
    assert torch.equal(read_checkpoint(tmp_path / "w.pth")["optimizer"]["w2"], few["w2"])
    beside = [matrix[:, 0]] if same else columns  # what a checkpoint shows many times is read once
    torch.save({"state_dict": {"w": torch.ones(1)}, "optimizer": beside * 2}, tmp_path / "w.pth")
    with nullcontext() if same else pytest.raises(CheckpointError, match="many times larger"):
        read_checkpoint(tmp_path / "w.pth")


# Pickles that ask for much.


@pytest.mark.parametrize("forge", FORGERS)
@pytest.mark.parametrize(
    "instructions",
    {
        "long text": b"\x8d" + struct.pack("<Q", 2**62) + b"abc",
        "long bytes": b"\x8e" + struct.pack("<Q", 2**40) + b"abc",
        "long bytearray": b"\x96" + struct.pack("<Q", 2**40) + b"abc",
        "long binary text": b"X" + struct.pack("<I", 2**32 - 1) + b"abc",
        "long number": b"\x8b" + struct.pack("<i", 2**31 - 1) + b"abc",
        "negative number": b"\x8b" + struct.pack("<i", -5) + b"abc",
        "long decimal": b"I" + b"9" * 100_000 + b"\n",
        "high memo": b"Nr" + struct.pack("<I", 2**32 - 1) + b"j" + struct.pack("<I", 2**32 - 2),
        "higher memo": b"Np" + b"9" * 40 + b"\n",
        "huge frame": b"\x95" + struct.pack("<Q", 2**63),
        "buffers": b"\x97\x98",
        "no such memo": b"h\x05",
        "no mark": b"t",
        "of protocol 0": b"(lp0\n",
        "empty stack": b"00R",
        "unknown instruction": b"\xff\xfe",
        "odd items": b"}(Nu",
        "reduced text": text("a") + text("b") + b"R" + b"a",
        "appended number": number(1) + number(2) + b"a",
        "state of a number": number(1) + b"}b",
        "pairs that are none": b"ccollections\nOrderedDict\n(](" + number(1) + b"etR",
        "sized by dict": b"ctorch\nSize\n(}tR",
        "too few for a tensor": b"ctorch._utils\n_rebuild_tensor_v2\n)R",
        "bad global": b"conly one line",
        "end": b"",
    }.items(),
    ids=lambda item: item[0],
)
def test_broken_pickles(tmp_path: Path, forge: Callable[..., Path], instructions: tuple[str, bytes]) -> None:
    path = forge(tmp_path / "w.pth", program(instructions[1]))
    with cheap():
        refused(path)


def _laughs(begin: bytes, end: bytes, rounds: int = 200) -> bytes:
    """A container in ten of its kind in ten of its kind ...; written out it would have 10 ** rounds items."""
    step = begin + b"h\x00" * 10 + end + b"q\x00"
    return b"]q\x00" + (b"0" + step) * rounds


@pytest.mark.parametrize("forge", FORGERS)
@pytest.mark.parametrize("begin, end", [(b"(", b"t"), (b"](", b"e"), (b"}(", b"u")], ids=["tuple", "list", "dict"])
def test_exponential_containers(tmp_path: Path, forge: Callable[..., Path], begin: bytes, end: bytes) -> None:
    laughs = _laughs(begin, end)
    with cheap():
        path = forge(tmp_path / "w.pth", program(dictionary(state_dict=dictionary(w=tensor()), extra=laughs)))
        assert read_state_dict(path).keys() == {"w"}
        if end == b"u":
            with pytest.raises(CheckpointError, match="not executed"):
                read_checkpoint(path)
        else:
            assert read_checkpoint(path).keys() == {"state_dict", "extra"}
        path = forge(tmp_path / "w.pth", program(dictionary(w=tensor(), extra=laughs)))
        if end == b"u":  # its keys are dicts, which no key can be
            refused(path, "key of type dict|key of type list")
        else:
            assert read_state_dict(path).keys() == {"w"}
        path = forge(tmp_path / "w.pth", program(dictionary(w=tensor(), extra=b"}" + laughs + b"Ns")))
        refused(path, "key of type")  # hashing it would take for ever
        refused(
            forge(tmp_path / "w.pth", program(laughs)), "dictionary of tensors|dictionary key|holds no tensors|storages"
        )


def test_deep_nesting(tmp_path: Path) -> None:
    depth = 50_000
    for nested in (b"]" * depth + b"a" * (depth - 1), b")" + b"\x85" * depth):
        with cheap(memory=200 * depth):
            path = torch_zip(tmp_path / "w.pth", program(dictionary(w=tensor(), extra=nested)))
            assert read_state_dict(path).keys() == {"w"}
            with pytest.raises(CheckpointError, match="nested too deeply"):
                read_checkpoint(path)
    itself = torch_zip(
        tmp_path / "w.pth", program(dictionary(w=tensor(), extra=b"]q\x00h\x00a"))
    )  # a list that holds itself
    assert read_state_dict(itself).keys() == {"w"}
    with pytest.raises(CheckpointError, match="nested too deeply"):
        read_checkpoint(itself)


def test_large_containers_are_not_copied(tmp_path: Path) -> None:
    """A dictionary made from a remembered one would be a copy, so few bytes could ask for much memory."""
    large = b"}(" + b"".join(number(i) + b"N" for i in range(20_000)) + b"uq\x00"
    copies = b"(" + b"ccollections\nOrderedDict\n(h\x00tR" * 5_000 + b"t"
    path = torch_zip(tmp_path / "w.pth", program(dictionary(state_dict=dictionary(w=tensor()), a=large, b=copies)))
    with cheap(memory=2**23):
        refused(path, "damaged")


def test_an_endless_pickle(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pickles, "MAX_INSTRUCTIONS", 2**15)
    for instruction in (b"N", b"}", b"(", b"]", b")"):
        path = torch_zip(tmp_path / "w.pth", program(instruction * 2**20))
        with cheap(memory=2**23):
            refused(path, "more than 32,768 instructions; save its state dict alone")


def _shared_list(size: int) -> bytes:
    """`size` entries that share one list of `size` numbers."""
    entries = b"".join(text(f"k{i}") + b"h\x00" for i in range(size))
    return dictionary(w=tensor())[:-1] + text("l") + b"](" + b"N" * size + b"eq\x00" + entries + b"u"


def _shared_key(size: int) -> bytes:
    """Entries set again and again under two equal long keys, which are compared each time."""
    long = text("x" * size)
    keys = long + b"q\x010" + long + b"q\x020"
    return b"}" + keys + b"h\x01Ns" + b"h\x02Ns" * size + text("w") + tensor() + b"s"


def _shared_arguments(size: int) -> bytes:
    """A function called again and again with one long tuple."""
    rebuild, _, arguments = tensor().partition(b"(")
    long = b"(" + arguments[:-2] + b"N" * size + b"tq\x01"
    calls = b"h\x00h\x01R0" * size
    return b"}" + rebuild + b"q\x000" + long + b"0" + calls + text("w") + tensor() + b"s"


def _shared_names(size: int) -> bytes:
    """A global of a long name, named again and again."""
    return b"}" + text("m" * size) + b"q\x010" + b"h\x01h\x01\x930" * size + text("w") + tensor() + b"s"


@pytest.mark.parametrize("forge", FORGERS)
@pytest.mark.parametrize("make", [_shared_list, _shared_key, _shared_names, _shared_arguments])
def test_time_grows_with_the_size_alone(
    tmp_path: Path, forge: Callable[..., Path], make: Callable[[int], bytes]
) -> None:
    """Twice the file may take about twice the time: what a file repeats is not walked or compared again."""

    def seconds(size: int) -> float:
        path = forge(tmp_path / "w.pth", program(make(size)))
        gc.collect()
        gc.disable()  # it would walk what other tests left, too
        start = time.process_time()
        with suppress(CheckpointError):
            read_state_dict(path)
        took = time.process_time() - start
        gc.enable()
        return took

    seconds(100)
    small, large = (min(seconds(size) for _ in range(3)) for size in (8_000, 64_000))
    assert large < 30 * max(small, 0.01), f"{small:.3f} s, eight times the size {large:.3f} s"


_MEASURE = """
import sys
from ldm.files import CheckpointError, read_state_dict
from tests.benchmarks.memory import peak_memory
before = peak_memory()
for path in sys.argv[1:]:
    try:
        read_state_dict(path)
    except CheckpointError:
        pass
print(peak_memory() - before)
"""


def test_memory_at_the_real_limit(tmp_path: Path) -> None:
    """Pickles that build as much as they may, each in its own way, read in one process of their own."""
    rebuild, _, _ = tensor().partition(b"(")
    arguments = tensor()[len(rebuild) : -1]
    head = b"ca\nb\nq\x00" + rebuild + b"q\x01" + arguments + b"q\x02"
    paths = []
    for i, (unit, size) in enumerate(
        [(b"(", 1), (b"}h\x00h\x00s", 4), (b"ca\nb\n", 1), (b"\x94", 1), (b"h\x01h\x02R", 3), (b"h\x00)R", 3)]
    ):
        count = (pickles.MAX_INSTRUCTIONS - 40) // size
        paths.append(torch_zip(tmp_path / f"{i}.pth", program(head + unit * count)))
    command = [sys.executable, "-c", _MEASURE, *map(str, paths)]
    done = subprocess.run(command, capture_output=True, text=True, cwd=Path(__file__).parents[3], check=True)
    assert int(done.stdout) < 2**28, f"{int(done.stdout):,} bytes"


def test_colliding_keys() -> None:
    """Integers that all hash to zero would make a dictionary quadratic; they do not stay keys."""
    count = 20_000
    pickled = program(b"}(" + b"".join(number((2**61 - 1) * i) + b"N" for i in range(1, count)) + b"u")
    with cheap(memory=2**24):
        made = pickles.Unpickler(None).load(io.BytesIO(pickled))
    assert len(made) == count - 1 and not any(type(key) is int and key > 2**60 for key in made)


# Archives.


def _weights() -> bytes:
    return program(dictionary(w=tensor()))


def test_forged_files_are_otherwise_good(tmp_path: Path) -> None:
    """The attacks fail for their own sake: without them, the same files read."""
    for forge in FORGERS:
        assert torch.equal(read_state_dict(forge(tmp_path / "w.pth", _weights()))["w"], torch.zeros(4))
    header = {"w": {"dtype": "F32", "shape": [4], "data_offsets": [0, 16]}}
    assert torch.equal(read_state_dict(safetensors(tmp_path / "w.pth", header, bytes(16)))["w"], torch.zeros(4))


def test_zip_members_with_odd_names_are_only_names(tmp_path: Path) -> None:
    odd = {"../../escaped": b"x", "/absolute": b"x", "C:\\drive": b"x", "archive/data/../0": b"x", "a" * 60_000: b""}
    path = torch_zip(tmp_path / "sub.pth", _weights(), extra=odd)
    assert read_state_dict(path).keys() == {"w"}
    assert sorted(tmp_path.iterdir()) == [path]
    for key in ("../../../../etc/passwd", "/etc/passwd", "0\0", "0/", ""):
        path = torch_zip(tmp_path / "w.pth", program(dictionary(w=tensor(held=storage(key)))))
        refused(path, "missing from the file")


@pytest.mark.filterwarnings("ignore:Duplicate name")
def test_zip_archives_that_are_not_weights(tmp_path: Path) -> None:
    path = tmp_path / "w.pth"
    refused(torch_zip(path, _weights(), byteorder=b"big"), "'big' byte order")
    refused(torch_legacy(path, _weights(), little_endian=False), "'big' byte order")
    refused(torch_zip(path, _weights(), extra={"archive/constants.pkl": b""}), "TorchScript")
    refused(torch_zip(path, _weights(), extra={"other/data.pkl": b""}), "torch.save did not write")
    refused(torch_zip(path, _weights(), compression=zipfile.ZIP_DEFLATED), "compressed")
    refused(torch_zip(path, _weights(), storages={"0": bytes(12)}), "smaller than the pickle says")
    refused(torch_zip(path, _weights(), storages={"1": bytes(16)}), "missing from the file")
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("model.safetensors", b"x")
    refused(path, "'model.safetensors'.*unpack")
    torch_zip(path, _weights())
    with zipfile.ZipFile(path, "a") as archive:
        archive.writestr("archive/data/0", bytes(16))
    refused(path, "two members of one name")


def test_members_are_read_from_the_file_that_was_opened(tmp_path: Path) -> None:
    """Another file under the name, put there after the opening, is not looked at."""
    path = torch_zip(tmp_path / "w.pth", _weights(), {"0": struct.pack("<4f", 1, 2, 3, 4)})
    with open_weights(path) as file:
        torch_zip(tmp_path / "other.pth", _weights(), {"0": bytes(16)})
        os.replace(tmp_path / "other.pth", path)
        assert torch.equal(file["w"].read(), torch.tensor([1.0, 2.0, 3.0, 4.0]))


def test_zip_bomb(tmp_path: Path) -> None:
    path = torch_zip(tmp_path / "w.pth", _weights(), {"0": bytes(2**26)}, compression=zipfile.ZIP_DEFLATED)
    with cheap():
        refused(path, "compressed")


@pytest.mark.parametrize("size", [2**20, 2**31, 2**32 - 2])
def test_zip_members_with_enormous_declared_sizes(tmp_path: Path, size: int) -> None:
    for member in (b"archive/data/0", b"archive/data.pkl"):
        raw = bytearray(torch_zip(tmp_path / "w.pth", _weights()).read_bytes())
        entry = raw.rindex(b"PK\x01\x02", 0, raw.rindex(member))
        raw[entry + 20 : entry + 28] = struct.pack("<II", size, size)
        (tmp_path / "w.pth").write_bytes(raw)
        with cheap():
            refused(tmp_path / "w.pth", "larger than the file")


def test_zip_directories_that_lie(tmp_path: Path) -> None:
    good = torch_zip(tmp_path / "w.pth", _weights()).read_bytes()
    end = good.rindex(b"PK\x05\x06")
    for offset, format in ((10, "<H"), (12, "<I"), (16, "<I")):  # number of members, size and place of the directory
        for value in (1, 0x7FFF, 0xFFFE):
            raw = bytearray(good)
            struct.pack_into(format, raw, end + offset, value)
            (tmp_path / "w.pth").write_bytes(raw)
            try:
                with cheap():
                    assert torch.equal(read_state_dict(tmp_path / "w.pth")["w"], torch.zeros(4))
            except CheckpointError as error:
                assert str(tmp_path / "w.pth") in str(error)


def test_legacy_storages_that_lie(tmp_path: Path) -> None:
    path = tmp_path / "w.pth"
    refused(torch_legacy(path, _weights(), {"0": (5, bytes(20))}), "another size")
    refused(torch_legacy(path, _weights(), {"0": (4, bytes(12))}), "ends within its tensors")
    refused(torch_legacy(path, _weights(), {"9": (4, bytes(16))}), "list of tensor storages")
    refused(torch_legacy(path, _weights(), {}), "missing from the file")
    refused(torch_legacy(path, program(dictionary(w=tensor(held=storage(count=2**50))))), "another size")
    huge = program(dictionary(w=tensor(held=storage(count=2**50))))
    with cheap():
        refused(torch_legacy(path, huge, {"0": (2**50, b"")}), "ends within its tensors")
    path.write_bytes(pickle.dumps({"w": [1.0]}, 2))
    refused(path, "torch.save did not write")


# safetensors.

_W = {"dtype": "F32", "shape": [4], "data_offsets": [0, 16]}


@pytest.mark.parametrize(
    ("header", "match"),
    [
        (b"{", "not valid JSON"),
        (b"{\xff}", "not valid JSON"),
        (b'{"a"' + b":[" * 50_000, "table of tensors|JSON"),
        (b'{"a":"' + b"x" * 400_000 + b'","b":' + b"[" * 90_000 + b"]" * 90_000 + b"}", "JSON"),
        (b'{"w":' + json.dumps(_W).encode() + b',"w":' + json.dumps(_W).encode() + b"}", "twice"),
        (b'{"w":{"dtype":"F32","dtype":"F32","shape":[4],"data_offsets":[0,16]}}', "twice"),
        (b'{"w":{"dtype":"F32","shape":[' + b"9" * 5000 + b'],"data_offsets":[0,16]}}', "JSON"),
        ({"w": _W, "k" * 2000: _W}, "2,000 characters"),
        ({"w": 5}, "no dtype"),
        ({"w": {"dtype": "F32", "shape": [4]}}, "no dtype"),
        ({"w": _W | {"dtype": "F4"}}, "unknown dtype 'F4'"),
        ({"w": _W | {"dtype": ["F32"]}}, "unknown dtype"),
        ({"w": _W | {"shape": [-4]}}, "impossible shape"),
        ({"w": _W | {"shape": [4.0]}}, "impossible shape"),
        ({"w": _W | {"shape": [True, 4]}}, "impossible shape"),
        ({"w": _W | {"shape": [1] * 100 + [4]}}, "impossible shape"),
        ({"w": _W | {"shape": [2**40, 2**40]}}, "impossible shape"),
        ({"w": _W | {"shape": [2**61, 8]}}, "impossible shape"),
        ({"w": _W | {"shape": [5]}}, "contradicts"),
        ({"w": _W | {"data_offsets": [16, 0]}}, "contradicts"),
        ({"w": _W | {"data_offsets": [-16, 0]}}, "impossible offsets"),
        ({"w": _W | {"data_offsets": [0]}}, "impossible offsets"),
        ({"w": _W | {"data_offsets": [0, 2**70]}}, "impossible offsets"),
        ({"w": _W | {"data_offsets": [4, 20]}}, "gap"),
        ({"w": _W | {"shape": [2**34], "data_offsets": [0, 2**36]}}, "cut short"),
        ({"w": _W, "v": _W}, "overlaps"),
        ({"w": _W, "v": _W | {"data_offsets": [8, 24]}}, "overlaps"),
        ({"w": _W | {"shape": [2], "data_offsets": [0, 8]}}, "appended"),
        ({"w": _W, "__metadata__": {"a": 1}}, "metadata"),
        ({"w": _W, "__metadata__": "a"}, "metadata"),
        ({"__metadata__": {}}, "appended"),
    ],
)
def test_safetensors_headers_that_lie(tmp_path: Path, header: Any, match: str) -> None:
    path = safetensors(tmp_path / "w.safetensors", header, bytes(16))
    with cheap(memory=2**20 + 8 * path.stat().st_size):
        refused(path, match)


@pytest.mark.parametrize("length", [0, 1, 1000, 10**8, 10**8 + 1, 2**40, 2**63, 2**64 - 1])
def test_safetensors_header_lengths_that_lie(tmp_path: Path, length: int) -> None:
    with cheap():
        refused(safetensors(tmp_path / "w.safetensors", {"w": _W}, bytes(16), length=length))


def test_messages_are_short_whatever_they_quote(tmp_path: Path) -> None:
    safetensors(tmp_path / "a.safetensors", {"w": _W}, bytes(16))
    weight_map = {"begins" + "k" * 100_000 + "ends": "a.safetensors"}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    with pytest.raises(CheckpointError, match="lacks 'beginsk.* ... k.*ends', which the index") as raised:
        open_weights(tmp_path)
    assert len(raised.value.problem) < 1100


# Failed downloads and broken copies.


@pytest.mark.parametrize(
    ("content", "match"),
    [
        (b"", "empty; the download failed"),
        (b"<!DOCTYPE html>\n<html><head><title>Sign in</title>", "HTML page, not weights: the download failed"),
        (b"\n\n  <html>" + b"x" * 5000, "HTML page"),
        (b"<?xml version='1.0'?><Error><Code>AccessDenied</Code>", "HTML page"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 57\n", "git-lfs pointer.*git lfs pull"),
        (b"Not Found", "text file, not weights: the download failed"),
        (b'{"error":"Invalid credentials"}', "text file.*download failed.*invalid cred"),
        ("Страница не найдена".encode() * 90, "text file"),
        (bytes(5000), "nothing but zeros"),
        (b"\x1f\x8b\x08\x00" + bytes(20), "gzip"),
        (b"GGUF" + bytes(20), "it begins with b'GGUF'"),
        (bytes(257) + b"ustar" + bytes(200), "tar"),
        (b"\x07\xff\x01" * 100, "neither a safetensors file nor one of torch.save"),
        (b"\x80\x04", "pickle"),
    ],
)
@pytest.mark.parametrize("suffix", [".ckpt", ".safetensors"])
def test_files_that_are_no_weights(tmp_path: Path, content: bytes, match: str, suffix: str) -> None:
    path = tmp_path / f"v1-5-pruned{suffix}"
    path.write_bytes(content)
    refused(path, match if suffix == ".ckpt" else None)


def test_no_file(tmp_path: Path) -> None:
    with pytest.raises(MissingFileError):
        open_weights(tmp_path / "absent.ckpt")
    refused(tmp_path / "absent.ckpt", "does not exist")
    os.mkfifo(tmp_path / "pipe.ckpt")
    refused(tmp_path / "pipe.ckpt", "not an ordinary file")
    (tmp_path / "model.safetensors.index.json").symlink_to(os.devnull)  # reading a pipe would wait for ever
    with pytest.raises(CheckpointError, match="index.json: not an ordinary file"):
        open_weights(tmp_path)


@pytest.mark.parametrize("format", [*FORMATS, "safetensors"])
def test_truncated_files(tmp_path: Path, format: str) -> None:
    path = tmp_path / "w.ckpt"
    weights = {f"w{i}": torch.randn(5, 7) for i in range(4)}
    if format == "safetensors":
        save_file(weights, path)
    else:
        torch.save({"state_dict": weights, "epoch": 1}, path, _use_new_zipfile_serialization=format == "torch-zip")
    whole = path.read_bytes()
    for length in {*range(0, len(whole), max(1, len(whole) // 60)), len(whole) - 1}:
        path.write_bytes(whole[:length])
        refused(path)


def test_fuzz_sample() -> None:
    """A sample of what `python -m tests.ldm.files.fuzz --count 20000` does at length."""
    result = fuzz(count=800, seed=2)
    assert result.refused > 200 and result.read > 50


@pytest.mark.slow
def test_fuzz_at_length() -> None:
    assert fuzz(count=20_000, seed=3).refused > 5000
