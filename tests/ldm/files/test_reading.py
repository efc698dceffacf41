"""Every format that weights come in reads to the same tensors; torch and safetensors wrote the files."""

import collections
import json
import threading
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from ldm.files import CheckpointError, open_weights, read_checkpoint, read_state_dict

FORMATS = ("torch-zip", "torch-legacy")


def save(content: object, path: Path, format: str) -> Path:
    torch.save(content, path, _use_new_zipfile_serialization=format == "torch-zip")
    return path


def same(got: Tensor, want: Tensor) -> bool:
    """Equal in dtype, shape and every bit."""
    if got.dtype != want.dtype or got.shape != want.shape:
        return False
    return got.contiguous().view(-1).view(torch.uint8).equal(want.detach().contiguous().view(-1).view(torch.uint8))


@pytest.fixture
def tensors() -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(5)
    shared = torch.randn(100, generator=generator)
    made = {f"{t}".removeprefix("torch."): torch.randn(3, 5, generator=generator).to(t) for t in DTYPES}
    return made | {
        "int64": torch.arange(-3, 4),
        "uint8": torch.arange(7, dtype=torch.uint8),
        "bool": torch.tensor([True, False]),
        "scalar": torch.tensor(2.5),
        "empty": torch.zeros(0, 4),
        "transposed": torch.randn(4, 5, generator=generator).t(),
        "channels_last": torch.randn(2, 3, 4, 4, generator=generator).to(memory_format=torch.channels_last),
        "expanded": torch.ones(1).expand(5),
        "tied_a": shared,
        "tied_b": shared,
        "tied_slice": shared[10:30:3],
        "parameter": nn.Parameter(torch.randn(3, generator=generator)),
    }


DTYPES = (torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.float8_e4m3fn, torch.complex64)


@pytest.mark.parametrize("depth", [0, 1, 2, 3])
@pytest.mark.parametrize("format", FORMATS)
def test_torch_files(tmp_path: Path, tensors: dict[str, Tensor], format: str, depth: int) -> None:
    content: object = tensors
    for _ in range(depth):
        content = {"state_dict": content}
    with open_weights(save(content, tmp_path / "weights.any", format)) as file:
        assert file.format == format
        assert file.wrapping == ("state_dict",) * depth
        assert list(file) == list(tensors)
        for key, want in tensors.items():
            lazy, got = file[key], file[key].read()
            assert (lazy.shape, lazy.dtype, lazy.nbytes) == (tuple(want.shape), want.dtype, want.nbytes)
            assert same(got, want) and got.is_contiguous(), key


def test_the_default_device_does_not_matter(tmp_path: Path) -> None:
    torch.save({"a": torch.ones(3)}, tmp_path / "a.pth")
    with torch.device("meta"):
        assert read_state_dict(tmp_path / "a.pth")["a"].tolist() == [1, 1, 1]


@pytest.mark.parametrize("format", FORMATS)
def test_four_wrappings_are_too_many(tmp_path: Path, format: str) -> None:
    content: object = {"w": torch.ones(2)}
    for _ in range(4):
        content = {"state_dict": content}
    with pytest.raises(CheckpointError, match="nested more than 3"):
        open_weights(save(content, tmp_path / "deep.ckpt", format))


def test_safetensors(tmp_path: Path, tensors: dict[str, Tensor]) -> None:
    whole = {key: value.detach().clone().contiguous() for key, value in tensors.items()}
    save_file(whole, tmp_path / "a.ckpt", metadata={"note": "kept"})  # content decides, not the name
    with open_weights(tmp_path / "a.ckpt") as file:
        assert file.format == "safetensors" and file.metadata == {"note": "kept"}
        assert file.keys() == whole.keys()
        for key, want in whole.items():
            assert same(file[key].read(), want), key


@pytest.mark.parametrize("format", FORMATS)
def test_a_training_run_with_everything_in_it(tmp_path: Path, format: str) -> None:
    """As Lightning writes: modules' own order, callbacks keyed by class, an optimizer with states, configurations."""
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4))
    optimizer = torch.optim.AdamW(model.parameters())
    model(torch.randn(1, 3, 8, 8)).sum().backward()
    optimizer.step()
    content = {
        "epoch": 3,
        "global_step": 1200,
        "pytorch-lightning_version": "1.4.2",
        "state_dict": model.state_dict(),
        "callbacks": {nn.Conv2d: {"best": torch.tensor(1.0), "path": Path("x"), "seen": {1, 2}}},
        "optimizer_states": [optimizer.state_dict()],
        "hyper_parameters": collections.Counter(a=1),
        "lr_schedulers": [slice(1, 2), range(3), complex(1, 2)],
    }
    with open_weights(save(content, tmp_path / "run.ckpt", format)) as file:
        assert list(file) == list(model.state_dict())
        assert all(same(file[key].read(), want) for key, want in model.state_dict().items())
        assert file.extras["global_step"] == 1200 and file.extras["pytorch-lightning_version"] == "1.4.2"
        assert "collections.Counter" in file.foreign
        assert "not built" in repr(file.extras["hyper_parameters"])


@pytest.mark.parametrize("format", FORMATS)
def test_a_checkpoint_is_what_torch_makes_of_it(tmp_path: Path, format: str) -> None:
    """Optimizer and all, and without executing anything, whatever the version of torch."""
    model = nn.Linear(3, 4)
    optimizer = torch.optim.AdamW(model.parameters())
    model(torch.randn(8, 3)).sum().backward()
    optimizer.step()
    shared = torch.arange(6.0).reshape(2, 3)
    content = {
        "global_step": 12,
        "state_dict": model.state_dict(),
        "optimizer_states": [optimizer.state_dict()],
        "callbacks": {
            "a": {"best": 0.25, "list": [None, True, "text"], "pair": (1, 2**40)},
            "same": [shared, shared.T],
        },
    }
    content |= {"ema": torch.ones(2), "model": {"a": torch.zeros(1)}}  # beside the weights, and another wrapper
    path = save(content, tmp_path / "run.ckpt", format)
    assert alike(read_checkpoint(path), torch.load(path, weights_only=True))


def test_a_file_of_tensors_alone_is_no_checkpoint(tmp_path: Path) -> None:
    save_file({"a": torch.ones(2)}, tmp_path / "a.safetensors")
    with pytest.raises(CheckpointError, match="no checkpoint of a training run"):
        read_checkpoint(tmp_path / "a.safetensors")


def alike(got: Any, want: Any) -> bool:
    """Equal in every key, item and bit."""
    if isinstance(want, Tensor):
        return same(got, want)
    if isinstance(want, dict):
        return got.keys() == want.keys() and all(alike(got[key], want[key]) for key in want)
    if isinstance(want, (list, tuple)):
        return type(got) is type(want) and all(alike(x, y) for x, y in zip(got, want, strict=True))
    return type(got) is type(want) and got == want


@pytest.mark.parametrize("format", FORMATS)
def test_plain_values_beside_weights(tmp_path: Path, format: str) -> None:
    path = save({"w": torch.ones(2), "difference": 1.0, "note": "x", "sizes": [1, 2]}, tmp_path / "d.pth", format)
    with open_weights(path) as file:
        assert list(file) == ["w"]
        assert file.extras["difference"] == 1.0 and file.extras["note"] == "x"


@pytest.mark.parametrize("wrapper", ["model", "module"])
def test_other_wrappers(tmp_path: Path, wrapper: str) -> None:
    content = {wrapper: {"w": torch.ones(2)}, "optimizer": {"state": {}}, "step": 3}
    with open_weights(save(content, tmp_path / "w.pt", "torch-zip")) as file:
        assert list(file) == ["w"] and file.wrapping == (wrapper,) and file.extras["step"] == 3


@pytest.mark.parametrize("wrapper", ["model", "module"])
def test_one_number_beside_the_weights_does_not_hide_them(tmp_path: Path, wrapper: str) -> None:
    content = {"step": torch.tensor(3), "decay": torch.tensor([0.9]), wrapper: {"w": torch.ones(2)}}
    with open_weights(save(content, tmp_path / "w.pt", "torch-zip")) as file:
        assert list(file) == ["w"] and file.wrapping == (wrapper,)


@pytest.mark.parametrize("inside", [{"y": torch.ones(2)}, [[torch.ones(2)]], {"y": {"z": (torch.ones(2),)}}])
def test_tensors_inside_an_entry_are_not_dropped_in_silence(tmp_path: Path, inside: object) -> None:
    path = save({"w": torch.ones(2), "x": inside}, tmp_path / "w.pt", "torch-zip")
    with pytest.raises(CheckpointError, match="entry 'x' among its weights holds tensors of its own"):
        open_weights(path)


@pytest.mark.filterwarnings("ignore")  # torch on quantised and sparse tensors
@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize(
    ("kind", "value"),
    [
        ("sparse", lambda: torch.eye(3).to_sparse()),
        ("quantised", lambda: torch.quantize_per_tensor(torch.ones(2), 0.1, 0, torch.qint8)),
        ("conjugated", lambda: torch.randn(2, dtype=torch.complex64).conj()),
        ("torch.float8_e4m3fnuz", lambda: torch.ones(2).to(torch.float8_e4m3fnuz)),
        ("Linear", lambda: nn.Linear(1, 1)),
    ],
)
def test_what_is_no_plain_tensor_is_refused_by_name(tmp_path: Path, format: str, kind: str, value) -> None:
    path = save({"good": torch.ones(1), "odd": value()}, tmp_path / "odd.pth", format)
    with pytest.raises(CheckpointError, match=kind) as raised:
        open_weights(path)
    assert str(path) in str(raised.value)


@pytest.mark.parametrize("protocol", [0, 1])
def test_old_protocols_are_named(tmp_path: Path, protocol: int) -> None:
    torch.save({"w": torch.ones(2)}, tmp_path / "w.pt", pickle_protocol=protocol, _use_new_zipfile_serialization=False)
    with pytest.raises(CheckpointError, match="a torch file of pickle protocol 0 or 1"):
        open_weights(tmp_path / "w.pt")


def test_whole_pickled_module(tmp_path: Path) -> None:
    torch.save(nn.Linear(2, 2), tmp_path / "module.pt")
    with pytest.raises(CheckpointError, match=r"torch\.nn\.modules\.linear\.Linear.*state_dict\(\)"):
        open_weights(tmp_path / "module.pt")


def test_closed_and_shrunk_files(tmp_path: Path) -> None:
    path = tmp_path / "w.safetensors"
    save_file({"w": torch.ones(1000)}, path)
    with open_weights(path) as file:
        path.write_bytes(path.read_bytes()[:200])
        with pytest.raises(CheckpointError, match="changed while being read"):
            file["w"].read()
    with pytest.raises(CheckpointError, match="closed"):
        file["w"].read()


def test_threads_read_one_file(tmp_path: Path) -> None:
    want = {f"w{i}": torch.full((5000,), float(i)) for i in range(20)}
    save_file(want, tmp_path / "w.safetensors")
    wrong = []
    with open_weights(tmp_path / "w.safetensors") as file:

        def work() -> None:
            wrong.extend(key for key in want if not torch.equal(file[key].read(), want[key]))

        threads = [threading.Thread(target=work) for _ in range(4)]
        [thread.start() for thread in threads]
        [thread.join() for thread in threads]
    assert not wrong


def make_pipeline(folder: Path) -> dict[str, Tensor]:
    """A folder as diffusers writes it, with every way of storing a component."""
    want = {}
    stem = "diffusion_pytorch_model"
    for component in ("unet", "vae", "text_encoder"):
        (folder / component).mkdir(parents=True)
        (folder / component / "config.json").write_text(json.dumps({"of": component}))
        parts = {f"{component}.{i}": torch.randn(3) for i in range(3)}
        want |= {f"{component}/{key}": value for key, value in parts.items()}
        if component == "unet":  # in shards
            names = [f"{stem}-{i:05}-of-00002.safetensors" for i in (1, 2)]
            weight_map = {key: names[i % 2] for i, key in enumerate(parts)}
            for name in names:
                save_file({k: v for k, v in parts.items() if weight_map[k] == name}, folder / component / name)
            index = folder / component / f"{stem}.safetensors.index.json"
            index.write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
        elif component == "vae":
            save_file(parts, folder / component / f"{stem}.fp16.safetensors")
        else:
            torch.save(parts, folder / component / "pytorch_model.bin")
    (folder / "scheduler").mkdir()
    (folder / "scheduler" / "scheduler_config.json").write_text('{"prediction_type": "v_prediction"}')
    (folder / "model_index.json").write_text('{"_class_name": "StableDiffusionPipeline"}')
    return want


def test_pipeline_folder(tmp_path: Path) -> None:
    want = make_pipeline(tmp_path / "pipe")
    with open_weights(tmp_path / "pipe") as file:
        assert file.format == "folder" and file.keys() == want.keys()
        assert all(same(file[key].read(), value) for key, value in want.items())
        assert file.configs["scheduler"]["prediction_type"] == "v_prediction"
        assert file.configs["unet"] == {"of": "unet"}
    got = read_state_dict(tmp_path / "pipe" / "unet")  # one network of it
    assert got.keys() == {"unet.0", "unet.1", "unet.2"}


@pytest.mark.parametrize("place", ["../stolen.safetensors", "/etc/passwd", "sub/x", "a\\b", "", "..", 7])
def test_an_index_cannot_lead_out_of_its_folder(tmp_path: Path, place: object) -> None:
    make_pipeline(tmp_path / "pipe")
    save_file({"unet.0": torch.ones(1)}, tmp_path / "pipe" / "stolen.safetensors")
    index = tmp_path / "pipe" / "unet" / "diffusion_pytorch_model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {"unet.0": place}}))
    with pytest.raises(CheckpointError, match="not a file name"):
        open_weights(tmp_path / "pipe")


def test_incomplete_folders(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="without model_index.json"):
        open_weights(tmp_path)
    make_pipeline(tmp_path / "pipe")
    next((tmp_path / "pipe" / "unet").glob("*-00002-of-*")).unlink()
    with pytest.raises(CheckpointError, match="00002-of-00002.safetensors: does not exist"):
        open_weights(tmp_path / "pipe")
    (tmp_path / "pipe" / "unet" / "config.json").write_text("{")
    with pytest.raises(CheckpointError, match="config.json: not valid JSON"):
        open_weights(tmp_path / "pipe")


@pytest.mark.parametrize("variant", ["", ".fp16", ".bf16", ".non_ema"])
@pytest.mark.parametrize("shards", [False, True])
def test_variants_of_diffusers(tmp_path: Path, variant: str, shards: bool) -> None:
    stem, want = "diffusion_pytorch_model", {"w": torch.ones(2)}
    if shards:
        save_file(want, tmp_path / f"{stem}{variant}-00001-of-00001.safetensors")
        weight_map = {"w": f"{stem}{variant}-00001-of-00001.safetensors"}
        (tmp_path / f"{stem}.safetensors.index{variant}.json").write_text(json.dumps({"weight_map": weight_map}))
    else:
        save_file(want, tmp_path / f"{stem}{variant}.safetensors")
    assert read_state_dict(tmp_path).keys() == want.keys()
    if variant:  # full precision comes first
        save_file({"full": torch.ones(2)}, tmp_path / f"{stem}.safetensors")
        assert read_state_dict(tmp_path).keys() == {"full"}


def test_what_a_system_refuses_is_one_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(CheckpointError, match="cannot be .*: File name too long"):
        open_weights(tmp_path / ("n" * 300))
    make_pipeline(tmp_path / "pipe")
    (tmp_path / "pipe" / "unet" / "config.json").write_text('{"a": ' + "1" * 5000 + "}")
    with pytest.raises(CheckpointError, match="config.json: not valid JSON"):
        open_weights(tmp_path / "pipe")

    def refuse(_: Path) -> bool:
        raise PermissionError(13, "Permission denied")

    for name in ("is_dir", "is_file"):
        with monkeypatch.context() as patch, pytest.raises(CheckpointError, match="cannot be read: Permission denied"):
            patch.setattr(Path, name, refuse)
            open_weights(tmp_path / "pipe")
