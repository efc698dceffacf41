"""Files that the writer makes: readable by the libraries they are for, complete or absent."""

import errno
import json
import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file

from ldm.files import (
    CheckpointError,
    LazyTensor,
    check_output,
    open_weights,
    read_state_dict,
    remove_unfinished_weights,
    write_folder,
    write_weights,
)

SUFFIXES = (".safetensors", ".ckpt", ".pth", ".pt", ".bin")


def state_dict() -> dict[str, torch.Tensor]:
    """One entry of every kind: dtypes, a scalar, an empty one, strides, a shared storage, names beyond ASCII."""
    torch.manual_seed(0)
    weight = torch.randn(6, 5)
    return {
        "odd.bool": torch.tensor([True, False, True]),
        "a.weight": weight,
        "a.transposed": weight.t(),
        "a.row": weight[2],
        "half": torch.randn(3, 7).half(),
        "brain": torch.randn(5).bfloat16(),
        "double": torch.randn(2, 2, dtype=torch.float64),
        "scalar": torch.tensor(3.5),
        "empty": torch.zeros(0, 4),
        "count": torch.tensor(7, dtype=torch.int64),
        "bytes": torch.arange(5, dtype=torch.uint8),
        "betas": torch.linspace(1e-4, 2e-2, 10),
        "größe 猫": torch.ones(1),
    }


def assert_same(got: dict[str, torch.Tensor], want: dict[str, torch.Tensor]) -> None:
    assert got.keys() == want.keys()
    for key, tensor in want.items():
        assert got[key].dtype == tensor.dtype and torch.equal(got[key], tensor), key


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_others_and_ourselves_read_what_is_written(tmp_path: Path, suffix: str) -> None:
    path, entries = tmp_path / f"model{suffix}", state_dict()
    assert write_weights(path, entries, metadata={"made": "by a test"}, progress=False) == path
    with open_weights(path) as checkpoint:
        assert_same({key: tensor.read() for key, tensor in checkpoint.items()}, entries)
    if suffix == ".safetensors":
        assert_same(load_file(path), entries)
        with safe_open(path, "pt") as file:
            assert file.metadata() == {"format": "pt", "made": "by a test"}
    else:
        assert_same(torch.load(path, weights_only=True), entries)
        assert_same(torch.load(path, weights_only=True, mmap=True), entries)
    assert os.listdir(tmp_path) == [path.name]


def test_torch_archives_are_aligned_and_whole(tmp_path: Path) -> None:
    path = write_weights(tmp_path / "model.ckpt", state_dict(), progress=False)
    with zipfile.ZipFile(path) as archive, open(path, "rb") as file:
        assert archive.testzip() is None
        for member in archive.infolist():
            file.seek(member.header_offset + 26)
            name, extra = (int.from_bytes(file.read(2), "little") for _ in range(2))
            assert (member.header_offset + 30 + name + extra) % 64 == 0


def test_dtype_changes_weights_and_spares_integers_and_the_schedule(tmp_path: Path) -> None:
    entries = state_dict()
    path = write_weights(tmp_path / "half.safetensors", entries, dtype="bf16", keep={"betas"}, progress=False)
    got = load_file(path)
    for key, tensor in entries.items():
        as_it_was = key == "betas" or not tensor.is_floating_point()
        assert torch.equal(got[key], tensor if as_it_was else tensor.bfloat16()), key
    with pytest.raises(CheckpointError, match="'large' has values too large for torch.float16; use bfloat16"):
        write_weights(tmp_path / "over.ckpt", {"large": torch.tensor([7e4])}, dtype=torch.float16, progress=False)
    inf = {str(dtype): torch.tensor([torch.inf]).to(dtype) for dtype in (torch.float32, torch.float8_e5m2)}
    write_weights(tmp_path / "inf.ckpt", inf, dtype=torch.float16, progress=False)
    with pytest.raises(CheckpointError, match="too large"):  # an infinite value beside it does not hide it
        write_weights(
            tmp_path / "over.ckpt",
            {"x": torch.tensor([torch.inf, 1e300], dtype=torch.float64)},
            dtype="bf16",
            progress=False,
        )
    with pytest.raises(CheckpointError, match="unknown dtype 'int4'"):
        write_weights(tmp_path / "x.ckpt", entries, dtype="int4", progress=False)
    assert not (tmp_path / "over.ckpt").exists()


def test_one_tensor_at_a_time(tmp_path: Path) -> None:
    alive = []

    class Watched(torch.Tensor):
        pass

    def entry(i: int) -> LazyTensor:
        def read() -> torch.Tensor:
            import weakref

            tensor = torch.full((1000,), float(i)).as_subclass(Watched)
            alive.append(weakref.ref(tensor))
            assert sum(ref() is not None for ref in alive) <= 2
            return tensor

        return LazyTensor((1000,), torch.float32, read)

    for suffix in (".safetensors", ".pt"):
        path = write_weights(tmp_path / f"m{suffix}", {str(i): entry(i) for i in range(20)}, progress=False)
        with open_weights(path) as checkpoint:
            assert all(torch.equal(checkpoint[str(i)].read(), torch.full((1000,), float(i))) for i in range(20))


def test_targets_that_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    entries = {"a": torch.ones(3)}
    path = write_weights(tmp_path / "a.safetensors", entries, progress=False)
    before = path.read_bytes()
    with pytest.raises(CheckpointError, match="exists already.*--force"):
        write_weights(path, {"a": torch.zeros(3)}, progress=False)
    assert path.read_bytes() == before
    write_weights(path, {"a": torch.zeros(3)}, overwrite=True, progress=False)
    assert torch.equal(load_file(path)["a"], torch.zeros(3))
    with pytest.raises(CheckpointError, match="end its name in one of .safetensors"):
        write_weights(tmp_path / "a.onnx", entries, progress=False)
    with pytest.raises(CheckpointError, match="does not exist; create it"):
        write_weights(tmp_path / "no" / "a.pt", entries, progress=False)
    with pytest.raises(CheckpointError, match="nothing to write"):
        write_weights(tmp_path / "b.pt", {}, progress=False)
    with pytest.raises(CheckpointError, match="'a' of torch.float8_e4m3fn cannot be stored in a .pt file"):
        write_weights(tmp_path / "b.pt", {"a": torch.ones(3).to(torch.float8_e4m3fn)}, progress=False)
    huge = {"huge": LazyTensor((2**50,), torch.float32, lambda: pytest.fail("was read"))}
    with pytest.raises(CheckpointError, match="MB are free"):
        write_weights(tmp_path / "c.safetensors", huge, progress=False)
    assert os.listdir(tmp_path) == ["a.safetensors"]


def test_a_failure_while_writing_leaves_the_old_file(tmp_path: Path) -> None:
    path = write_weights(tmp_path / "a.pt", {"a": torch.ones(3)}, progress=False)
    before = path.read_bytes()

    def fail() -> torch.Tensor:
        raise KeyboardInterrupt

    entries = {"a": torch.zeros(3), "b": LazyTensor((3,), torch.float32, fail)}
    for name in ("a.pt", "b.safetensors"):
        with pytest.raises(KeyboardInterrupt):
            write_weights(tmp_path / name, entries, overwrite=True, progress=False)
    with pytest.raises(KeyboardInterrupt):
        write_folder(tmp_path / "folder", {"config.json": {}, "x.safetensors": entries}, progress=False)
    assert os.listdir(tmp_path) == ["a.pt"] and path.read_bytes() == before


CONTENT = {"config.json": {"_class_name": "X"}, "diffusion_pytorch_model.safetensors": {"a": torch.ones(2)}}


def test_an_export_replaces_its_own_files_alone(tmp_path: Path) -> None:
    """Exported again over an older export, with whatever people have put beside it."""
    files = {f"unet/{name}": content for name, content in CONTENT.items()}
    files |= {"model_index.json": {"_class_name": "P"}, "tokenizer/merges.txt": "ü\n"}
    folder = write_folder(tmp_path / "out", files, progress=False)
    assert json.loads((folder / "model_index.json").read_text()) == {"_class_name": "P"}
    assert (folder / "tokenizer" / "merges.txt").read_text(encoding="utf-8") == "ü\n"
    own = {"model_notes.md": "mine", "prompt.json": "{}", "unet/thesis.tex": "...", "pictures/cat.json": "[1"}
    for name, text in own.items():
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text(text)
    with pytest.raises(CheckpointError, match="exists already"):
        write_folder(folder, files, progress=False)
    new = {**files, "unet/diffusion_pytorch_model.safetensors": {"a": torch.zeros(2)}, "vae/config.json": {}}
    write_folder(folder, new, overwrite=True, progress=False)
    assert torch.equal(load_file(folder / "unet" / "diffusion_pytorch_model.safetensors")["a"], torch.zeros(2))
    assert all((folder / name).read_text() == text for name, text in own.items())
    written = {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}
    assert written == {*own, *new} and os.listdir(tmp_path) == ["out"]
    (tmp_path / "empty").mkdir()
    write_folder(tmp_path / "empty", CONTENT, progress=False)
    assert sorted(os.listdir(tmp_path / "empty")) == sorted(CONTENT)


def test_an_export_stays_in_its_folder(tmp_path: Path) -> None:
    """A part of the folder, or a file in it, may be a link to the input's."""
    files = {"model_index.json": {"_class_name": "P"}, **{f"unet/{name}": content for name, content in CONTENT.items()}}
    source = write_folder(tmp_path / "source", files, progress=False)
    for name, inside in (("a", "unet"), ("b", "unet/diffusion_pytorch_model.safetensors")):
        folder = write_folder(tmp_path / name, {"model_index.json": {"_class_name": "P"}}, progress=False)
        (folder / inside).parent.mkdir(exist_ok=True)
        (folder / inside).symlink_to(source / inside)
    changed = {**files, "unet/diffusion_pytorch_model.safetensors": {"a": torch.zeros(2)}}
    with pytest.raises(CheckpointError, match="a link that leads out of it"):
        write_folder(tmp_path / "a", changed, overwrite=True, progress=False)
    write_folder(tmp_path / "b", changed, overwrite=True, progress=False)
    assert torch.equal(read_state_dict(source)["unet/a"], torch.ones(2))
    assert torch.equal(read_state_dict(tmp_path / "b")["unet/a"], torch.zeros(2))


@pytest.mark.parametrize(
    ("name", "content", "match"),
    [
        ("config.json", '{"name": "my web server"}', "something else in it"),
        ("config.json", "[1", "something else in it"),
        ("diffusion_pytorch_model.fp16.safetensors", "x", "might be read instead"),
        ("diffusion_pytorch_model.safetensors.index.json", "{}", "might be read instead"),
    ],
)
def test_folders_that_are_refused(tmp_path: Path, name: str, content: str, match: str) -> None:
    folder = write_folder(tmp_path / "out", CONTENT, progress=False)
    (folder / name).write_text(content)
    with pytest.raises(CheckpointError, match=match):
        write_folder(folder, CONTENT, overwrite=True, progress=False)
    assert (folder / name).read_text() == content
    (tmp_path / "home").mkdir()
    (tmp_path / "home" / "thesis.tex").touch()
    with pytest.raises(CheckpointError, match="something else in it"):
        write_folder(tmp_path / "home", CONTENT, overwrite=True, progress=False)


@pytest.mark.parametrize("name", ["config.json", "thesis.tex"])
def test_what_appears_while_writing_is_not_replaced(tmp_path: Path, name: str) -> None:
    target = tmp_path / "out"

    def appear() -> torch.Tensor:
        target.mkdir(exist_ok=True)
        (target / name).write_text("mine")
        return torch.ones(2)

    entries = {"a": LazyTensor((2,), torch.float32, appear)}
    with pytest.raises(CheckpointError, match="something else in it"):
        write_folder(target, {"config.json": {}, "diffusion_pytorch_model.safetensors": entries}, progress=False)
    assert [path.name for path in target.iterdir()] == [name] and (target / name).read_text() == "mine"
    with pytest.raises(CheckpointError, match="is a folder"):
        write_weights(
            target.with_name("x.pt"), {"a": LazyTensor((2,), torch.float32, lambda: _make(tmp_path / "x.pt"))}
        )
    assert sorted(os.listdir(tmp_path)) == ["out", "x.pt"]


def _make(folder: Path) -> torch.Tensor:
    folder.mkdir()
    return torch.ones(2)


def test_a_folder_that_exists_is_filled(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It may be a disk of its own, have permissions of its own, or be the one in which the shell stands."""
    target = tmp_path / "out"
    target.mkdir(mode=0o770)
    target.chmod(0o2770)
    (target / ".out.01234567.partial").touch()  # of a process that was killed
    before = target.stat()
    monkeypatch.chdir(target)
    measured: list[Path] = []
    disk_usage = shutil.disk_usage
    monkeypatch.setattr(shutil, "disk_usage", lambda path: (measured.append(path), disk_usage(path))[1])
    write_folder(target, CONTENT, progress=False)
    write_folder(target, CONTENT, overwrite=True, progress=False)
    after = target.stat()
    assert (after.st_ino, after.st_mode) == (before.st_ino, before.st_mode) and set(measured) == {target}
    assert sorted(os.listdir()) == [".out.01234567.partial", *sorted(CONTENT)]


def test_what_killed_processes_left_is_removed(tmp_path: Path) -> None:
    code = "import os, sys, torch; from pathlib import Path; from ldm.files import writing;"
    code += "writing.os.fsync = lambda _: os._exit(9);"
    files = "writing.write_folder(Path(sys.argv[1]) / 'folder', {'a.bin': {'a': torch.ones(3)}}, progress=False)"
    file = "writing.write_weights(Path(sys.argv[1]) / 'b.safetensors', {'b': torch.ones(3)}, progress=False)"
    for call in (files, file):
        assert subprocess.run([sys.executable, "-c", code + call, tmp_path]).returncode == 9
    kept = [tmp_path / name for name in ("b.safetensors", ".mine.partial", ".b.safetensors.mine.partial")]
    for path in kept:
        path.touch()
    assert len(os.listdir(tmp_path)) == 5
    remove_unfinished_weights(tmp_path, "b.safetensors")
    assert len(os.listdir(tmp_path)) == 4
    remove_unfinished_weights(tmp_path)
    assert sorted(tmp_path.iterdir()) == sorted(kept)


def test_inputs_are_never_outputs(tmp_path: Path) -> None:
    path = write_weights(tmp_path / "a.pt", {"a": torch.ones(3)}, progress=False)
    folder = write_folder(tmp_path / "out", {f"unet/{k}": v for k, v in CONTENT.items()}, progress=False)
    (tmp_path / "link.pt").symlink_to(path)
    os.link(path, tmp_path / "hard.pt")
    inside = folder / "unet" / "diffusion_pytorch_model.safetensors"
    for output, source in ((path, path), (tmp_path / "link.pt", path), (tmp_path / "hard.pt", path), (inside, folder)):
        with pytest.raises(CheckpointError, match="is also the input"):
            check_output(output, overwrite=True, inputs=[tmp_path / "other.pt", source])
    for source in (folder, inside):
        with pytest.raises(CheckpointError, match="is also the input"):
            check_output(folder, overwrite=True, files=CONTENT, inputs=[source])
    check_output(path, overwrite=True, inputs=[folder])
    # A folder of links to the files that it stands for, as in the hub's cache.
    real = inside.rename(tmp_path / "real.safetensors")
    inside.symlink_to(real)
    with pytest.raises(CheckpointError, match="is also the input"):
        check_output(real, overwrite=True, inputs=[folder])
    with pytest.raises(CheckpointError, match="is also the input"):
        check_output(tmp_path, overwrite=True, files=CONTENT, inputs=[folder])
    # A pipeline of parts that lie elsewhere.
    elsewhere = (folder / "unet").rename(tmp_path / "elsewhere")
    (folder / "unet").symlink_to(elsewhere)
    (elsewhere / inside.name).unlink()
    real.rename(elsewhere / inside.name)
    for output, files in ((elsewhere / inside.name, None), (elsewhere, CONTENT)):
        with pytest.raises(CheckpointError, match="is also the input"):
            check_output(output, overwrite=True, files=files, inputs=[folder])


def test_links_are_written_through(tmp_path: Path) -> None:
    disk = tmp_path / "disk"
    disk.mkdir()
    write_folder(disk / "folder", CONTENT, progress=False)
    write_weights(disk / "file.pt", {"a": torch.ones(1)}, progress=False)
    for name in ("folder", "file.pt", "new.pt"):
        (tmp_path / name).symlink_to(disk / name)
    write_folder(tmp_path / "folder", {**CONTENT, "extra.json": {}}, overwrite=True, progress=False)
    for name in ("file.pt", "new.pt"):
        write_weights(tmp_path / name, {"a": torch.zeros(1)}, overwrite=True, progress=False)
        assert (tmp_path / name).is_symlink() and torch.equal(read_state_dict(disk / name)["a"], torch.zeros(1))
    assert (tmp_path / "folder").is_symlink() and (disk / "folder" / "extra.json").is_file()
    assert sorted(os.listdir(disk)) == ["file.pt", "folder", "new.pt"] and len(os.listdir(tmp_path)) == 4


def test_names_that_a_system_refuses(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    entries = {"a": torch.ones(1)}
    long = "n" * 237 + ".safetensors"
    assert write_weights(tmp_path / long, entries, progress=False).is_file()
    with pytest.raises(CheckpointError, match="cannot be written: File name too long"):
        write_weights(tmp_path / ("n" * 300 + ".pt"), entries, progress=False)

    def refuse(*_: object, **__: object) -> None:
        raise PermissionError(errno.EACCES, "Permission denied")

    for name in ("exists", "is_dir"):
        with monkeypatch.context() as patch, pytest.raises(CheckpointError, match="written: Permission denied"):
            patch.setattr(Path, name, refuse)
            write_weights(tmp_path / "a.pt", entries, progress=False)
    assert os.listdir(tmp_path) == [long]


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_names_that_are_no_text_are_refused(tmp_path: Path, suffix: str) -> None:
    for entries, metadata in (({"a\ud800": torch.ones(1)}, {}), ({"a": torch.ones(1)}, {"b": "\udcff"})):
        with pytest.raises(CheckpointError, match="is not valid text"):
            write_weights(tmp_path / f"a{suffix}", entries, metadata, progress=False)
    assert not os.listdir(tmp_path)


def test_progress_is_shown_on_a_terminal(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    write_weights(tmp_path / "piped.pt", {"a": torch.ones(3)})
    assert capsys.readouterr().err == ""
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True, raising=False)
    write_weights(tmp_path / "shown.pt", {"a": torch.ones(3)})
    assert "shown.pt: 100%" in capsys.readouterr().err
    write_weights(tmp_path / "silent.pt", {"a": torch.ones(3)}, progress=False)
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize("suffix", [".safetensors", ".ckpt"])
def test_tensors_of_an_open_file_are_written_as_they_are_read(tmp_path: Path, suffix: str) -> None:
    weights = {f"w{i}": torch.randn(size) for i, size in enumerate([3, 700_001, 0, 1])}
    write_weights(tmp_path / "source.safetensors", weights, progress=False)
    more = {"new": torch.arange(5), "half": torch.ones(7, dtype=torch.float16)}
    with open_weights(tmp_path / "source.safetensors") as source:
        write_weights(tmp_path / f"out{suffix}", {**source, **more, "twice": source["w1"]}, progress=False)
    assert_same(read_state_dict(tmp_path / f"out{suffix}"), {**weights, **more, "twice": weights["w1"]})
