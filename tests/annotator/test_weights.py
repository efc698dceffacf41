"""Weight files: where they are looked for, how they are read, and what is said when they do not fit."""

import json
import os
import threading
import time
from pathlib import Path

import huggingface_hub
import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from annotator import weights
from annotator.network import LazyNetwork, NetworkDetector, choose_device, to_tensor
from annotator.weights import Hub, WeightsError, find_weights, fingerprint, load_weights, read_state_dict

NAME = "ControlNetHED.pth"


@pytest.fixture
def no_download(monkeypatch):
    def fail(address, timeout):
        raise ConnectionError("no route to host")

    monkeypatch.setattr(huggingface_hub, "get_hf_file_metadata", fail)
    monkeypatch.setattr(huggingface_hub, "hf_hub_download", None)  # which is not even called


@pytest.fixture
def folders(monkeypatch, tmp_path):
    """The package's own folder and the one of the environment variable, both empty."""
    package, named = tmp_path / "ckpts", tmp_path / "named"
    package.mkdir()
    named.mkdir()
    monkeypatch.setattr(weights, "CKPTS", package)
    monkeypatch.setenv(weights.FOLDER_VARIABLE, str(named))
    return package, named


def test_places_are_searched_in_order(folders, no_download, tmp_path):
    package, named = folders
    (named / NAME).touch()
    assert find_weights([NAME]) == named / NAME
    (package / NAME).touch()
    assert find_weights([NAME]) == package / NAME
    assert find_weights([NAME], named) == named / NAME
    other = tmp_path / "renamed.bin"
    other.touch()
    assert find_weights([NAME], str(other)) == other
    (package / "older.pth").touch()
    assert find_weights(["newer.pth", "older.pth"]) == package / "older.pth"
    (package / "newer.safetensors").touch()
    assert find_weights(["newer.pth", "older.pth"]) == package / "newer.safetensors"


def test_a_file_that_is_nowhere_is_one_error_with_all_that_helps(folders, no_download, monkeypatch):
    with pytest.raises(WeightsError) as caught:
        find_weights([NAME])
    address = f"https://huggingface.co/lllyasviel/Annotators/resolve/main/{NAME}"
    for part in (NAME, address, str(folders[0]), str(folders[1]), "no route to host", weights.FOLDER_VARIABLE):
        assert part in str(caught.value)
    assert "weights=" not in str(caught.value)  # the command calls it --weights
    assert f"put the file into {folders[1]}" in str(caught.value)
    monkeypatch.delenv(weights.FOLDER_VARIABLE)
    with pytest.raises(WeightsError, match=f"put the file into {folders[0]}"):
        find_weights([NAME])


def test_a_place_named_by_the_caller_is_the_only_one(folders, monkeypatch, tmp_path):
    (folders[0] / NAME).touch()
    monkeypatch.setattr(huggingface_hub, "hf_hub_download", None)
    with pytest.raises(WeightsError, match="missing"):
        find_weights([NAME], tmp_path / "missing")


def test_a_missing_file_is_fetched_from_its_published_place(folders, monkeypatch, tmp_path):
    asked = []
    monkeypatch.setattr(huggingface_hub, "get_hf_file_metadata", lambda address, timeout: None)
    monkeypatch.setattr(
        huggingface_hub, "hf_hub_download", lambda *place, **options: asked.append(place) or str(tmp_path)
    )
    assert find_weights([NAME]) == tmp_path
    assert find_weights([NAME], Hub("me/mine")) == tmp_path
    assert find_weights([NAME], Hub("lllyasviel/ControlNet")) == tmp_path
    assert find_weights(["facenet.pth"], Hub("lllyasviel/ControlNet")) == tmp_path  # which that repository lacks
    assert asked == [
        ("lllyasviel/Annotators", NAME), ("me/mine", NAME), ("lllyasviel/ControlNet", f"annotator/ckpts/{NAME}"),
        ("lllyasviel/Annotators", "facenet.pth"),
    ]  # fmt: skip


def test_a_file_with_an_address_of_its_own_is_fetched_once(folders, monkeypatch, tmp_path):
    def fail(address, target):
        raise ConnectionError("no route to host")

    address = "https://example.org/models/face.task"
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path / "hub"))
    monkeypatch.setattr(torch.hub, "download_url_to_file", fail)
    with pytest.raises(WeightsError, match=f"fetching {address} failed .no route to host.; put the file into"):
        find_weights(["face.task"], None, address)
    asked = []
    monkeypatch.setattr(torch.hub, "download_url_to_file", lambda *place: asked.append(place) or Path(place[1]).touch())
    stored = tmp_path / "hub" / "checkpoints" / "face.task"
    assert [find_weights(["face.task"], None, address) for _ in range(2)] == [stored] * 2
    assert asked == [(address, str(stored))]
    with pytest.raises(WeightsError, match=f"neither a file nor a folder that holds face.task .published at {address}"):
        find_weights(["face.task"], tmp_path / "none", address)


def test_a_server_that_is_out_of_reach_is_found_out_at_once(folders, monkeypatch):
    monkeypatch.setattr(huggingface_hub, "hf_hub_url", lambda *place: "http://127.0.0.1:9/nobody-listens-here")
    start = time.perf_counter()
    with pytest.raises(WeightsError, match="fetching http.* failed"):
        find_weights(["no-such-file-anywhere.pth"])
    assert time.perf_counter() - start < 15


def test_pickles_are_refused_where_torch_cannot_read_them_safely(tmp_path, monkeypatch):
    tensors = {"a.weight": torch.randn(2)}
    torch.save(tensors, tmp_path / "net.pth")
    save_file(tensors, tmp_path / "net.safetensors")
    for version, safe in (("2.5.1+cu124", False), ("2.9.1", False), ("2.10.0", True), ("3.0.0a0", True)):
        monkeypatch.setattr(torch, "__version__", version)
        if safe:
            assert read_state_dict(tmp_path / "net.pth").keys() == tensors.keys()
        else:
            with pytest.raises(
                WeightsError, match=r"net.pth is a pickle.*install torch 2.10 or later, or.*net.safetensors"
            ):
                read_state_dict(tmp_path / "net.pth")
        assert read_state_dict(tmp_path / "net.safetensors").keys() == tensors.keys()


@pytest.mark.parametrize("wrapped", [True, False])
@pytest.mark.parametrize("prefix", ["module.", ""])
def test_published_wrappings_are_taken_off(tmp_path, wrapped, prefix):
    tensors = {f"{prefix}conv.weight": torch.randn(2, 3), f"{prefix}conv.bias": torch.randn(2).half()}
    path = tmp_path / "net.pth"
    torch.save({"state_dict": tensors, "meta": {"epoch": 3}} if wrapped else tensors, path)
    read = read_state_dict(path)
    assert list(read) == ["conv.weight", "conv.bias"]
    assert torch.equal(read["conv.weight"], tensors[f"{prefix}conv.weight"])
    if not wrapped:
        save_file(tensors, tmp_path / "net.safetensors")
        assert torch.equal(read_state_dict(tmp_path / "net.safetensors")["conv.bias"], read["conv.bias"])


class Command:
    def __init__(self, marker) -> None:
        self.marker = marker

    def __reduce__(self):
        return os.mkdir, (str(self.marker),)


def test_broken_and_hostile_files_are_named_and_execute_nothing(tmp_path):
    path = tmp_path / "net.pth"
    torch.save({"a.weight": torch.zeros(1), "b": Command(tmp_path / "executed")}, path)
    with pytest.raises(WeightsError, match="net.pth"):
        read_state_dict(path)
    assert not (tmp_path / "executed").exists()
    torch.save({"a.weight": torch.randn(100)}, path)
    whole = path.read_bytes()
    for content in (b"", b"<!DOCTYPE html><html></html>", whole[: len(whole) // 2]):
        path.write_bytes(content)
        with pytest.raises(WeightsError, match="net.pth"):
            read_state_dict(path)
        (tmp_path / "net.safetensors").write_bytes(content)
        with pytest.raises(WeightsError, match="net.safetensors"):
            read_state_dict(tmp_path / "net.safetensors")
    (tmp_path / "text.pth").write_text("weights, they said")
    with pytest.raises(WeightsError, match="text.pth: it is not a weight file"):
        read_state_dict(tmp_path / "text.pth")
    for content in ([torch.zeros(1)], {"state_dict": {"model": {}}}, {1: torch.zeros(1)}):
        torch.save(content, path)
        with pytest.raises(WeightsError, match="net.pth"):
            read_state_dict(path)


@pytest.mark.parametrize("sizes", [[0, 4], [4, 8]])
def test_names_in_a_file_cannot_write_to_the_terminal(tmp_path, caplog, sizes):
    """Neither through a warning, nor through what a library says of a damaged file."""
    header = json.dumps({"\x1b[2Jkey": {"dtype": "F32", "shape": [1], "data_offsets": sizes}}).encode()
    path = tmp_path / "net.safetensors"
    path.write_bytes(len(header).to_bytes(8, "little") + header + bytes(4))
    with pytest.raises(WeightsError, match=r"\[2Jkey") as raised:
        load_weights(nn.Linear(1, 1), read_state_dict(path), path)
    assert str(raised.value).isprintable()
    load_weights(nn.Module(), {"\x1b[2Jkey": torch.zeros(1)}, path, optional="")
    assert "[2Jkey" in caplog.text and "\x1b" not in caplog.text


def test_files_of_other_networks_are_refused_with_some_of_the_entries():
    network = nn.Sequential(nn.Conv2d(3, 4, 1), nn.Conv2d(4, 4, 1))
    fitting = {key: torch.randn_like(tensor) for key, tensor in network.state_dict().items()}
    load_weights(network, {key: tensor.half() for key, tensor in fitting.items()}, "net.pth")
    assert torch.equal(network[0].weight, fitting["0.weight"].half().float())

    partial = {key: tensor for key, tensor in fitting.items() if key != "1.bias"} | {"head.weight": torch.zeros(1)}
    with pytest.raises(WeightsError, match=r"net.pth does not fit Seq.*missing: '1.bias'.*unexpected: 'head.weight'"):
        load_weights(network, partial, "net.pth")
    load_weights(network, partial, "net.pth", optional="1.b")
    assert torch.equal(network[1].weight, fitting["1.weight"])
    with pytest.raises(WeightsError, match="does not fit"):
        load_weights(network, {"other.weight": torch.zeros(1)}, "net.pth", optional="1.")
    with pytest.raises(WeightsError, match=r"net.pth does not fit Sequential: .*0.weight"):
        load_weights(network, fitting | {"0.weight": torch.zeros(1)}, "net.pth", optional="1.")


class Blur(NetworkDetector):
    network = LazyNetwork("blur.pth")
    max_pixels = 1000
    stride = 8

    def build_network(self):
        return nn.Conv2d(3, 1, 3, padding=1)

    def encode(self, image):
        return to_tensor(image[:, ::-1])

    def decode(self, output, size, level: int = 0):
        return np.full(size, output.shape[-1] + level, dtype=np.uint8)


def test_a_network_detector_is_ready_to_run_and_refuses_what_is_too_large(tmp_path):
    torch.save(nn.Conv2d(3, 1, 3).state_dict(), tmp_path / "blur.pth")
    detector = Blur(device="cpu", weights=tmp_path)
    assert not detector.network.training and not any(p.requires_grad for p in detector.network.parameters())
    assert detector.sources == {"blur.pth": fingerprint(tmp_path / "blur.pth")}
    x = detector.prepare(np.full((20, 30), 7, dtype=np.uint8))
    assert x.shape == (3, 24, 32) and x.dtype == torch.float32 and (x == 7).all()
    outputs = detector.run(torch.stack([x, x]))
    assert len(outputs) == 2 and torch.equal(outputs[0], outputs[1]) and outputs[0].shape == (1, 24, 32)
    found = detector(np.zeros((20, 30, 4), dtype=np.uint8), 5)
    assert found.shape == (20, 30) and (found == 37).all()
    assert detector.to("cpu") is detector
    with pytest.raises(ValueError, match="no device gpu"):
        Blur(device="gpu", weights=tmp_path)
    with pytest.raises(ValueError, match="40x30 pixels is too large for Blur"):
        detector.prepare(np.zeros((40, 30, 3), dtype=np.uint8))
    with pytest.raises(TypeError, match="Blur takes level after the picture, each once"):
        detector(np.zeros((20, 30, 3), dtype=np.uint8), 1, 2)


def test_another_default_dtype_changes_nothing(tmp_path):
    torch.save(nn.Conv2d(3, 1, 3).state_dict(), tmp_path / "blur.pth")
    want = Blur(device="cpu", weights=tmp_path)(np.zeros((20, 30, 3), dtype=np.uint8))
    torch.set_default_dtype(torch.float64)
    try:
        assert np.array_equal(Blur(device="cpu", weights=tmp_path)(np.zeros((20, 30, 3), dtype=np.uint8)), want)
    finally:
        torch.set_default_dtype(torch.float32)


def test_autocast_changes_nothing(tmp_path):
    """Its bfloat16, which numpy does not have, is not for detectors."""
    torch.save(nn.Conv2d(3, 1, 3).state_dict(), tmp_path / "blur.pth")
    detector = Blur(device="cpu", weights=tmp_path)
    x = torch.rand(1, 3, 8, 8)
    (want,) = detector.run(x)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        (found,) = detector.run(x)
        assert found.dtype == torch.float32 and torch.equal(found, want)


def test_a_network_is_loaded_once_by_however_many_threads(tmp_path, monkeypatch):
    torch.save(nn.Conv2d(3, 1, 3).state_dict(), tmp_path / "blur.pth")
    monkeypatch.setattr(Blur, "load", lambda self, **parameters: None)
    built = []

    def build(self):
        time.sleep(0.05)
        built.append(nn.Conv2d(3, 1, 3, padding=1))
        return built[-1]

    monkeypatch.setattr(Blur, "build_network", build)
    detector, seen = Blur("cpu", tmp_path), []
    threads = [threading.Thread(target=lambda: seen.append(detector.network)) for _ in range(5)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(built) == 1 and all(network is built[0] for network in seen) and len(seen) == 5


def test_devices_that_this_machine_does_not_have():
    for device in ("meta", "nonsense", "cuda:99"):
        with pytest.raises(ValueError, match=device):
            choose_device(device)
    if not torch.xpu.is_available():
        with pytest.raises(ValueError, match="this machine has no device xpu"):
            choose_device("xpu")
    assert choose_device("cpu") == torch.device("cpu")
