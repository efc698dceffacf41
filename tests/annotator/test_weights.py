"""Weight files: where they are looked for, how they are read, and what is said when they do not fit."""

import os
import threading
from http.server import BaseHTTPRequestHandler, HTTPServer

import huggingface_hub
import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from annotator import weights
from annotator.detector import NetworkDetector, choose_device
from annotator.weights import WeightsError, find_weights, load_weights, read_state_dict

NAME = "ControlNetHED.pth"


@pytest.fixture
def no_download(monkeypatch):
    def fail(address):
        raise ConnectionError("no route to host")

    monkeypatch.setattr(weights, "_check_reachable", fail)
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
    assert find_weights(NAME) == named / NAME
    (package / NAME).touch()
    assert find_weights(NAME) == package / NAME
    assert find_weights(NAME, named) == named / NAME
    other = tmp_path / "renamed.bin"
    other.touch()
    assert find_weights(NAME, str(other)) == other
    (package / "older.pth").touch()
    assert find_weights(["newer.pth", "older.pth"]) == package / "older.pth"


def test_a_file_that_is_nowhere_is_one_error_with_all_that_helps(folders, no_download):
    with pytest.raises(WeightsError) as caught:
        find_weights(NAME, repository="lllyasviel/ControlNet", folder="annotator/ckpts")
    address = f"https://huggingface.co/lllyasviel/ControlNet/resolve/main/annotator/ckpts/{NAME}"
    for part in (NAME, address, str(folders[0]), str(folders[1]), "no route to host", weights.FOLDER_VARIABLE):
        assert part in str(caught.value)


def test_a_place_named_by_the_caller_is_the_only_one(folders, monkeypatch, tmp_path):
    (folders[0] / NAME).touch()
    monkeypatch.setattr(huggingface_hub, "hf_hub_download", None)
    with pytest.raises(WeightsError, match="missing"):
        find_weights(NAME, tmp_path / "missing")


def test_a_missing_file_is_fetched_from_its_published_place(folders, monkeypatch, tmp_path):
    asked = []
    monkeypatch.setattr(weights, "_check_reachable", lambda address: None)
    monkeypatch.setattr(
        huggingface_hub, "hf_hub_download", lambda repo_id, filename: asked.append((repo_id, filename)) or str(tmp_path)
    )
    assert find_weights(NAME) == tmp_path
    assert asked == [("lllyasviel/Annotators", NAME)]


def test_a_server_that_answers_at_all_is_reachable():
    server = HTTPServer(("127.0.0.1", 0), BaseHTTPRequestHandler)  # it knows no method: status 501
    address = f"http://127.0.0.1:{server.server_port}/file.pth"
    thread = threading.Thread(target=server.handle_request, daemon=True)
    thread.start()
    weights._check_reachable(address)
    thread.join()
    server.server_close()
    with pytest.raises(OSError):
        weights._check_reachable(address)


@pytest.mark.parametrize("wrapped", [True, False])
@pytest.mark.parametrize("prefix", ["module.", ""])
def test_published_wrappings_are_taken_off(tmp_path, wrapped, prefix):
    tensors = {f"{prefix}conv.weight": torch.randn(2, 3), f"{prefix}conv.bias": torch.randn(2).half()}
    path = tmp_path / "net.pth"
    torch.save({"state_dict": tensors, "meta": {"epoch": 3}} if wrapped else tensors, path)
    read = read_state_dict(path, wrapper="state_dict")
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
            read_state_dict(path, "state_dict")


def test_files_of_other_networks_are_refused_with_some_of_the_entries():
    network = nn.Sequential(nn.Conv2d(3, 4, 1), nn.Conv2d(4, 4, 1))
    fitting = {key: torch.randn_like(tensor) for key, tensor in network.state_dict().items()}
    load_weights(network, {key: tensor.half() for key, tensor in fitting.items()}, "net.pth")
    assert torch.equal(network[0].weight, fitting["0.weight"].half().float())

    partial = {key: tensor for key, tensor in fitting.items() if key != "1.bias"} | {"head.weight": torch.zeros(1)}
    with pytest.raises(WeightsError, match=r"net.pth does not fit Seq.*missing: 1.bias.*unexpected: head.weight"):
        load_weights(network, partial, "net.pth")
    load_weights(network, partial, "net.pth", strict=False)
    assert torch.equal(network[1].weight, fitting["1.weight"])
    with pytest.raises(WeightsError, match="does not fit"):
        load_weights(network, {"other.weight": torch.zeros(1)}, "net.pth", strict=False)
    with pytest.raises(WeightsError, match=r"0.weight \(file \(1,\), network \(4, 3, 1, 1\)\)"):
        load_weights(network, fitting | {"0.weight": torch.zeros(1)}, "net.pth", strict=False)


class Blur(NetworkDetector):
    filename = "blur.pth"
    max_pixels = 1000

    def build_network(self):
        return nn.Conv2d(3, 1, 3, padding=1)


def test_a_network_detector_is_ready_to_run_and_refuses_what_is_too_large(tmp_path):
    torch.save(nn.Conv2d(3, 1, 3).state_dict(), tmp_path / "blur.pth")
    detector = Blur(device="cpu", weights=tmp_path)
    assert not detector.network.training and not any(p.requires_grad for p in detector.network.parameters())
    image = detector.prepare(np.full((20, 30), 7, dtype=np.uint8))
    batch = detector.tensor(image[:, ::-1])
    assert batch.shape == (1, 3, 20, 30) and batch.dtype == torch.float32 and (batch == 7).all()
    assert detector.network(batch).shape == (1, 1, 20, 30)
    with pytest.raises(ValueError, match="unknown device 'gpu'"):
        Blur(device="gpu", weights=tmp_path)
    with pytest.raises(ValueError, match="no device cuda:99"):
        Blur(device="cuda:99", weights=tmp_path)
    with pytest.raises(ValueError, match="40x30 pixels is too large for Blur"):
        detector.prepare(np.zeros((40, 30, 3), dtype=np.uint8))


def test_devices_that_no_detector_runs_on():
    for device in ("xpu", "meta", "nonsense", "cuda:99"):
        with pytest.raises(ValueError, match=device):
            choose_device(device)
    assert choose_device("cpu") == torch.device("cpu")
