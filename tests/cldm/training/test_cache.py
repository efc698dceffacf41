"""Cached latents and text embeddings: the same losses as without them, and a folder that survives whatever happens to it."""

import multiprocessing
import os
import signal
import subprocess
import sys
import time

import cv2
import pytest
import torch
from safetensors import safe_open
from torch.utils.data import DataLoader, Dataset

from cldm.config import resolve
from cldm.data.fill import generate_fill
from cldm.data.pairs import PairDataset
from cldm.model import create_model
from cldm.training import cache as caching
from cldm.training.cache import CachedPairs, encoders, make_cache, release_encoders
from cldm.training.precision import forward_context
from ldm.util import ConfigError

BASE = "cldm_tiny.safetensors"


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    folder = tmp_path_factory.mktemp("cache") / "fill"
    generate_fill(folder, count=10, size=64, palette="clear", progress=False)
    return folder


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    from cldm.checkpoint import add_control

    path = tmp_path_factory.mktemp("weights") / "control.safetensors"
    add_control(resolve(BASE), path, "cldm_tiny")
    return path


@pytest.fixture
def model(weights):
    return create_model("cldm_tiny", weights=weights)


def count_encoded(model, monkeypatch):
    """Lists that grow with what the encoders get."""
    pictures, prompts = [], []
    encode, learned = model.encode_first_stage, model.get_learned_conditioning
    monkeypatch.setattr(model, "encode_first_stage", lambda x: pictures.extend(x) or encode(x))
    monkeypatch.setattr(model, "get_learned_conditioning", lambda c: prompts.extend(c) or learned(c))
    return pictures, prompts


@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed"])
def test_losses_are_those_without_the_cache(model, data, weights, tmp_path, precision):
    dataset = PairDataset(data)
    plain, cached = [], []
    for batch in DataLoader(dataset, 4):
        torch.manual_seed(3)
        with forward_context(precision, "cpu"):
            plain.append(model.shared_step(batch)[0].item())
    pairs = CachedPairs(dataset, make_cache(model, dataset, tmp_path, precision, progress=False))
    release_encoders(model)
    assert {p.device.type for p in model.parameters()} == {"cpu"}
    assert not any(k.startswith(("first_stage", "cond_stage")) for k, _ in model.named_parameters())
    for batch in DataLoader(pairs, 4, num_workers=2 if precision == "32-true" else 0):
        assert "jpg" not in batch
        torch.manual_seed(3)
        with forward_context(precision, "cpu"):
            cached.append(model.shared_step(batch)[0].item())
    # Exact in half precision; in float32 a convolution's last bit depends on how many pictures it sees at once.
    assert cached == (plain if precision != "32-true" else pytest.approx(plain, rel=1e-6))


def test_losses_are_bit_for_bit_equal_where_the_encoder_sees_the_same_pictures_at_once(model, data, tmp_path):
    dataset = PairDataset(data)
    pairs = CachedPairs(dataset, make_cache(model, dataset, tmp_path, batch_size=2, progress=False))
    for batch, stored in zip(DataLoader(dataset, 2), DataLoader(pairs, 2), strict=True):
        torch.manual_seed(3)
        plain = model.shared_step(batch)[0]
        torch.manual_seed(3)
        assert torch.equal(plain, model.shared_step(stored)[0])


def test_encoders_come_back_for_pictures(model, data, weights):
    batch = next(iter(DataLoader(PairDataset(data), 2)))
    torch.manual_seed(0)
    before = model.get_input(batch, "jpg")
    release_encoders(model)
    with pytest.raises(ConfigError, match="not in memory"):
        model.get_input(batch, "jpg")
    with encoders(model, weights):
        torch.manual_seed(0)
        again = model.get_input(batch, "jpg")
        assert not any(p.requires_grad for p in model.first_stage_model.parameters())
    assert torch.equal(before[0], again[0])
    assert torch.equal(before[1]["c_crossattn"][0], again[1]["c_crossattn"][0])
    with pytest.raises(ConfigError, match="not in memory"):
        model.decode_first_stage(before[0])


def test_only_what_is_new_is_encoded(model, tmp_path, monkeypatch):
    data = tmp_path / "fill"
    generate_fill(data, count=4, size=64, palette="clear", progress=False)
    pictures, prompts = count_encoded(model, monkeypatch)
    first = make_cache(model, PairDataset(data), tmp_path / "cache", progress=False)
    assert len(pictures) == 4
    assert len(prompts) == len({*PairDataset(data).prompts(), ""})  # each prompt once, and the empty one
    assert torch.equal(first.empty_context, model.get_learned_conditioning([""])[0])

    def encoded():
        pictures.clear()
        prompts.clear()
        make_cache(model, PairDataset(data), tmp_path / "cache", progress=False)
        return len(pictures), len(prompts)

    assert encoded() == (0, 0)
    generate_fill(data, count=6, size=64, palette="clear", progress=False)
    assert encoded()[0] == 2
    target = PairDataset(data).pairs[0].target
    cv2.imwrite(str(target), cv2.imread(str(target)) // 2)
    assert encoded() == (1, 0)
    assert encoded() == (0, 0)
    with torch.no_grad():
        next(model.first_stage_model.encoder.parameters()).mul_(1.01)
    assert encoded() == (6, 0)  # other weights of the autoencoder, the same text encoder
    for broken in (tmp_path / "cache").glob("latents-*/*.safetensors"):
        broken.write_bytes(broken.read_bytes()[:100])
    assert encoded() == (6, 0)
    assert encoded() == (0, 0)


def test_what_a_subclass_makes_of_its_targets_is_what_counts(model, data, tmp_path):
    class Darker(PairDataset):
        def __getitem__(self, index):
            item = super().__getitem__(index)
            return {**item, "jpg": item["jpg"] * 0.5}

    class Plain(Dataset):  # no names, no sizes, no prompts
        def __len__(self):
            return 2

        def __getitem__(self, index):
            return {"jpg": torch.zeros(64, 64, 3) + index, "txt": f"number {index}", "hint": torch.zeros(64, 64, 3)}

    sets = PairDataset(data), Darker(data)
    bright, dark = (CachedPairs(d, make_cache(model, d, tmp_path, progress=False)) for d in sets)
    assert not torch.equal(bright[0]["moments"], dark[0]["moments"])
    plain = CachedPairs(Plain(), make_cache(model, Plain(), tmp_path, progress=False))
    assert set(plain[1]) == {"moments", "context", "txt", "hint"}


def test_items_that_do_not_decode_are_left_out(model, tmp_path, caplog):
    data = tmp_path / "fill"
    generate_fill(data, count=3, size=64, palette="clear", progress=False)
    dataset = PairDataset(data)
    dataset.pairs[1].target.write_bytes(b"no picture")
    pairs = CachedPairs(dataset, make_cache(model, dataset, tmp_path / "cache", progress=False))
    assert "does not decode" in caplog.text
    assert pairs[0]["moments"].shape == (8, 8, 8)
    with pytest.raises(ValueError, match=r"1\.png is not in the cache"):
        pairs[1]


def fill_cache(weights, data, folder, slowly=False):
    """Runs in a process of its own; slowly, it writes a file for each entry and takes its time."""
    model = create_model("cldm_tiny", weights=weights)
    if slowly:
        caching._PART_BYTES = 0
    encode = model.encode_first_stage

    def patient(x):
        if slowly:
            time.sleep(0.3)
        return encode(x)

    model.encode_first_stage = patient
    make_cache(model, PairDataset(data), folder, progress=False)


def entries_in(folder):
    count = 0
    for path in folder.glob("latents-*/*.safetensors"):
        with safe_open(path, framework="pt") as file:
            count += len(file.keys())
    return count


def test_what_a_killed_process_wrote_stays_and_two_share_the_rest(model, data, weights, tmp_path, monkeypatch):
    paths = ", ".join(repr(str(path)) for path in (weights, data, tmp_path))
    code = f"from tests.cldm.training.test_cache import fill_cache; fill_cache({paths}, slowly=True)"
    process = subprocess.Popen([sys.executable, "-c", code])
    deadline = time.monotonic() + 120
    while entries_in(tmp_path) < 3 and time.monotonic() < deadline:
        time.sleep(0.05)
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    kept = entries_in(tmp_path)
    assert 3 <= kept < 10
    # Two at the same time finish it: every target is there once.
    other = multiprocessing.get_context("spawn").Process(target=fill_cache, args=(weights, data, tmp_path, True))
    other.start()
    while entries_in(tmp_path) == kept and other.is_alive():
        time.sleep(0.05)
    pictures, _ = count_encoded(model, monkeypatch)
    pairs = CachedPairs(PairDataset(data), make_cache(model, PairDataset(data), tmp_path, progress=False))
    assert not pictures and len([pairs[i]["moments"] for i in range(10)]) == 10
    other.join(120)
    assert other.exitcode == 0 and entries_in(tmp_path) == 10
    assert not list(tmp_path.rglob("*.tmp"))
