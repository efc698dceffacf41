"""Reading files with random damage: `python -m tests.ldm.files.fuzz --count 20000`.

Every mutated file must read, or be refused by a `CheckpointError` that names it; quickly, in little memory, and without
anything being imported, executed or started, for which the interpreter's audit events are watched.
"""

import argparse
import collections
import encodings.cp437  # noqa: F401 - decoders are imported when first needed, which would look like an attack
import encodings.raw_unicode_escape  # noqa: F401
import io
import random
import resource
import signal
import sys
import tempfile
import time
import zipfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import save

from ldm.files import CheckpointError, open_weights

_FORBIDDEN_EVENTS = ("exec", "compile", "import", "os.", "subprocess.", "socket.", "ctypes.", "pickle.", "shutil.")
_MAX_SECONDS = 5.0
_MAX_GROWTH = 300 * 2**20  # bytes of resident memory, over a whole run

_watching = False
_hooked = False
_events: list[str] = []


@dataclass(frozen=True)
class Result:
    """What became of the mutated files."""

    read: int
    refused: int
    slowest: float  # seconds


def _seeds() -> list[bytes]:
    """Small files of every kind that is read, as honest programs write them."""
    generator = torch.Generator().manual_seed(0)
    base = torch.randn(12, generator=generator)
    tensors = {
        "model.diffusion_model.out.0.weight": torch.randn(3, 4, generator=generator),
        "half": torch.randn(5, generator=generator).half(),
        "brain": torch.randn(5, generator=generator).bfloat16(),
        "strided": base[::2],
        "shared": base,
        "steps": torch.arange(3),
        "parameter": torch.nn.Parameter(torch.ones(2)),
    }
    run = {
        "epoch": 1,
        "pytorch-lightning_version": "1.4",
        "state_dict": torch.nn.Linear(2, 2).state_dict(),
        "callbacks": {collections.Counter: {"best": torch.tensor(1.0), "seen": {1, 2}, "of": slice(1, 2)}},
        "optimizer_states": [{"state": {0: {"exp_avg": torch.zeros(2), "step": 3}}, "param_groups": [{"betas": (0,)}]}],
    }
    seeds = [save({key: value.detach().clone() for key, value in tensors.items()}, metadata={"format": "pt"})]
    for content in (tensors, run):
        for modern in (True, False):
            stream = io.BytesIO()
            torch.save(content, stream, _use_new_zipfile_serialization=modern)
            seeds.append(stream.getvalue())
    return seeds


def _mutate(content: bytes, rng: random.Random) -> bytes:
    """The content with one to four injuries."""
    raw = bytearray(content)
    for _ in range(rng.choice((1, 1, 2, 4))):
        rng.choice(_INJURIES)(raw, rng)
    return bytes(raw)


def _place(raw: bytearray, rng: random.Random) -> int:
    """Any position; the beginning and the end, where the directories lie, more often."""
    size = max(1, len(raw))
    return rng.choice((rng.randrange(size), rng.randrange(min(size, 700)), size - 1 - rng.randrange(min(size, 700))))


def _flip(raw: bytearray, rng: random.Random) -> None:
    if raw:
        raw[_place(raw, rng)] ^= 1 << rng.randrange(8)


def _set(raw: bytearray, rng: random.Random) -> None:
    if raw:
        raw[_place(raw, rng)] = rng.choice((0, 1, 0x7F, 0x80, 0xFF, rng.randrange(256)))


def _cut(raw: bytearray, rng: random.Random) -> None:
    del raw[_place(raw, rng) :]


def _remove(raw: bytearray, rng: random.Random) -> None:
    start = _place(raw, rng)
    del raw[start : start + rng.choice((1, 2, 4, 8, 64))]


def _repeat(raw: bytearray, rng: random.Random) -> None:
    start = _place(raw, rng)
    raw[start:start] = raw[start : start + rng.choice((1, 4, 16, 64))] * rng.choice((1, 2, 50))


def _overwrite(raw: bytearray, rng: random.Random) -> None:
    piece = rng.choice(_PIECES)
    start = _place(raw, rng)
    raw[start : start + rng.choice((0, len(piece)))] = piece


def _swap(raw: bytearray, rng: random.Random) -> None:
    a, b, length = _place(raw, rng), _place(raw, rng), rng.choice((1, 4, 16))
    if a + length <= b and b + length <= len(raw):
        raw[a : a + length], raw[b : b + length] = raw[b : b + length], raw[a : a + length]


def _digits(raw: bytearray, rng: random.Random) -> None:
    """Change a digit, as in the offsets of a safetensors header."""
    digits = [i for i in range(min(len(raw), 1500)) if 48 <= raw[i] <= 57]
    if digits:
        raw[rng.choice(digits)] = rng.choice(b"0123456789-.e")


_INJURIES: tuple[Callable[[bytearray, random.Random], None], ...] = (
    *(_flip, _set, _cut, _remove, _repeat, _overwrite, _overwrite, _swap, _digits),
)
_PIECES = [
    b"cos\nsystem\n(X\x04\x00\x00\x00truetR",
    b"cbuiltins\neval\n(X\x01\x00\x00\x001tR",
    b"\x8c\x02os\x8c\x06system\x93\x8c\x04true\x85R",
    b"\x8e" + (2**40).to_bytes(8, "little"),
    b"X\xff\xff\xff\x7f",
    b"r\xff\xff\xff\xff",
    *(bytes([code]) for code in b"().012NRQabdeilostuj}]\x81\x85\x86\x87\x88\x92\x93\x94\x82\x97"),
    *(bytes(width) for width in (2, 4, 8)),
    *(b"\xff" * width for width in (2, 4, 8)),
    *(bytes(width - 1) + b"\x80" for width in (2, 4, 8)),
    *(b'"shape":[99999999999999]', b'"data_offsets":[0,9999999999]', b'"__metadata__":', b"{{", b"[[[[", b"\\ud800"),
    *(b"PK\x03\x04", b"PK\x01\x02", b"PK\x05\x06", b"PK\x06\x06", b"../../"),
]


def _mutated(seeds: list[bytes], count: int, rng: random.Random) -> Iterator[bytes]:
    """Mutated files; of a torch zip every second one is damaged within its pickle, and the archive is whole."""
    for _ in range(count):
        content = rng.choice(seeds)
        if content.startswith(b"PK") and rng.random() < 0.5:
            stream = io.BytesIO()
            with zipfile.ZipFile(io.BytesIO(content)) as old, zipfile.ZipFile(stream, "w") as new:
                for name in old.namelist():
                    held = old.read(name)
                    new.writestr(name, _mutate(held, rng) if name.endswith("data.pkl") else held)
            yield stream.getvalue()
        else:
            yield _mutate(content, rng)


def _audit(event: str, arguments: tuple[object, ...]) -> None:
    if _watching and event.startswith(_FORBIDDEN_EVENTS):
        _events.append(f"{event}{arguments!r}"[:200])


@contextmanager
def _watched() -> Iterator[None]:
    global _watching, _hooked
    if not _hooked:
        sys.addaudithook(_audit)  # cannot be removed again, so it is added once
        _hooked = True
    _watching = True
    try:
        yield
    finally:
        _watching = False


def _stop(*_: object) -> None:
    raise TimeoutError(f"took more than {_MAX_SECONDS} s")


def fuzz(count: int, seed: int = 0) -> Result:
    """Read `count` mutated files.

    Raises:
        AssertionError: one of them broke a promise; the message says how to get it back.
    """
    signal.signal(signal.SIGALRM, _stop)
    read = refused = 0
    slowest = 0.0
    seeds = _seeds()
    start_memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "mutated.ckpt"
        for number, content in enumerate(_mutated(seeds, count, random.Random(seed))):
            path.write_bytes(content)
            start = time.perf_counter()
            signal.setitimer(signal.ITIMER_REAL, _MAX_SECONDS)  # what hangs becomes a TimeoutError
            try:
                with _watched(), open_weights(path) as file:
                    total = sum(tensor.read().nbytes for tensor in file.values())
                read += 1
                assert total <= 4 * len(content) + 2**20, f"file {number} of seed {seed} grew to {total:,} bytes"
            except CheckpointError as error:
                refused += 1
                assert str(path) in str(error), f"file {number} of seed {seed}: unnamed {error}"
            except Exception as error:
                raise AssertionError(f"file {number} of seed {seed} raised {error!r}") from error
            finally:
                signal.setitimer(signal.ITIMER_REAL, 0)
            assert not _events, f"file {number} of seed {seed} did {_events}"
            slowest = max(slowest, time.perf_counter() - start)
            assert slowest < _MAX_SECONDS, f"file {number} of seed {seed} took {slowest:.1f} s"
    growth = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 - start_memory
    assert growth < _MAX_GROWTH, f"memory grew by {growth:,} bytes over seed {seed}"
    return Result(read, refused, slowest)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.ldm.files.fuzz", description=__doc__)
    parser.add_argument("--count", type=int, default=20_000, help="mutated files to read (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="of the mutations (default: %(default)s)")
    arguments = parser.parse_args(argv)
    result = fuzz(arguments.count, arguments.seed)
    print(f"{result.refused:,} refused, {result.read:,} read, none misbehaved; the slowest took {result.slowest:.2f} s")
    return 0


if __name__ == "__main__":
    sys.exit(main())
