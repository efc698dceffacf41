"""What a weights path may name beside a file: packaged weights, and the Hugging Face hub with a cache made here."""

import json
import os
from pathlib import Path

import huggingface_hub.constants
import pytest
import torch

from ldm.files import CheckpointError, MissingFileError, open_weights, read_state_dict, write_weights
from ldm.files.locating import choose_weights, locate

COMMIT = "0123456789abcdef0123456789abcdef01234567"


@pytest.fixture
def snapshot(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder of owner/name in a cache as huggingface_hub makes it, without a network."""
    repository = tmp_path / "hub" / "models--owner--name"
    (repository / "refs").mkdir(parents=True)
    (repository / "refs" / "main").write_text(COMMIT)
    folder = repository / "snapshots" / COMMIT
    folder.mkdir(parents=True)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    return folder


def test_a_file_of_the_hub(snapshot: Path) -> None:
    want = {"w": torch.arange(3)}
    write_weights(snapshot / "model.safetensors", want, progress=False)
    (snapshot / "old").mkdir()
    torch.save({"state_dict": want}, snapshot / "old" / "model.ckpt")
    for name in ("model.safetensors", "old/model.ckpt"):
        for address in (f"hf://owner/name/{name}", Path(f"hf://owner/name/{name}"), f"hf://owner/name@main/{name}"):
            assert torch.equal(read_state_dict(address)["w"], want["w"])


def test_a_folder_of_the_hub(snapshot: Path) -> None:
    for component in ("unet", "vae"):
        (snapshot / component).mkdir()
        (snapshot / component / "config.json").write_text("{}")
        tensors = {component: torch.ones(1)}
        write_weights(snapshot / component / "diffusion_pytorch_model.safetensors", tensors, progress=False)
    (snapshot / "model_index.json").write_text(json.dumps({"unet": ["a", "b"], "vae": ["a", "b"]}))
    assert read_state_dict("hf://owner/name").keys() == {"unet/unet", "vae/vae"}
    for address in ("hf://owner/name/vae", "hf://owner/name@main/vae/"):
        assert read_state_dict(address).keys() == {"vae"}
    with pytest.raises(
        CheckpointError, match="cannot be fetched: the hub cannot be reached, and it is not in the cache"
    ):
        open_weights("hf://owner/name/unet_2")


def test_a_folder_that_was_fetched_in_part_is_read_without_the_hub(snapshot: Path) -> None:
    """Newer versions of the library note which files a snapshot has, and refuse one that lacks some unless told otherwise."""
    write_weights(snapshot / "model.safetensors", {"w": torch.ones(1)}, progress=False)
    files = {name: {"size": 1, "blob_id": "0" * 40} for name in ("model.safetensors", "other.bin")}
    trees = snapshot.parents[1] / "trees"
    trees.mkdir()
    (trees / f"{COMMIT}.json").write_text(json.dumps({"format_version": 1, "files": files}))
    assert read_state_dict("hf://owner/name").keys() == {"w"}


def test_revisions_may_be_of_a_pull_request(snapshot: Path) -> None:
    reference = snapshot.parents[1] / "refs" / "refs" / "pr" / "3"
    reference.parent.mkdir(parents=True)
    reference.write_text(COMMIT)
    write_weights(snapshot / "model.safetensors", {"w": torch.ones(1)}, progress=False)
    for address in ("hf://owner/name@refs/pr/3", "hf://owner/name@refs/pr/3/model.safetensors"):
        assert read_state_dict(address).keys() == {"w"}


def test_of_a_folder_only_what_is_read_is_fetched(snapshot: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    stem = "diffusion_pytorch_model"
    parts = [f"unet/{stem}-0000{i}-of-00002.safetensors" for i in (1, 2)]
    read = ["model_index.json", *parts, f"unet/{stem}.safetensors.index.json", "unet/config.json", f"vae/{stem}.bin"]
    unread = ["v1-5-pruned.ckpt", "README.md", f"unet/{stem}.fp16.safetensors", f"vae/{stem}.fp16.bin", "vae/x.onnx"]
    fetched: list[str] = []

    def download(repository: str, revision: str | None, allow_patterns: list[str]) -> str:
        fetched[:] = allow_patterns
        return str(snapshot)

    monkeypatch.setattr(huggingface_hub.HfApi, "list_repo_files", lambda *_, **__: read + unread)
    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    assert locate("hf://owner/name") == snapshot and sorted(fetched) == sorted(read)
    with pytest.raises(CheckpointError, match="'owner/name' has no 'text'. Check the name"):
        locate("hf://owner/name/text")
    (snapshot / "vae").mkdir()
    assert locate("hf://owner/name/vae") == snapshot / "vae" and fetched == [f"vae/{stem}.bin"]


def test_what_the_hub_cannot_give_is_one_line(snapshot: Path) -> None:
    for address in ("hf://owner/name/absent.safetensors", "hf://owner/absent", "hf://owner/absent/model.ckpt"):
        with pytest.raises(CheckpointError, match="cannot be fetched: .*give the path of the file") as raised:
            open_weights(address)
        assert str(raised.value).startswith(address) and "\n" not in str(raised.value)
    for address in ("hf://", "hf://owner", "hf://own er/name", "hf:///name/x.pt"):
        with pytest.raises(CheckpointError, match="write hf://owner/name"):
            open_weights(address)


def test_packaged_weights_have_names(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("cldm_tiny.safetensors", "cldm_tiny"):
        with open_weights(name) as file:
            assert "model.diffusion_model.out.2.bias" in file
    own = write_weights(tmp_path / "cldm_tiny.safetensors", {"mine": torch.ones(1)}, progress=False)
    assert os.path.samefile(locate("cldm_tiny.safetensors"), own)  # a file of that name comes first


def test_a_missing_file_is_a_file_not_found_error(tmp_path: Path) -> None:
    for path in (tmp_path / "no.ckpt", tmp_path / "no" / "folder", "no.safetensors"):
        with pytest.raises(FileNotFoundError, match="does not exist") as raised:
            open_weights(path)
        assert isinstance(raised.value, CheckpointError | MissingFileError) and str(path) in str(raised.value)


def test_full_precision_and_safetensors_come_first() -> None:
    stem = "diffusion_pytorch_model"
    names = {f"{stem}.bin", f"{stem}.fp16.safetensors", f"{stem}.safetensors.index.json", "config.json", "model.onnx"}
    assert choose_weights(names) == f"{stem}.safetensors.index.json"
    assert choose_weights(names - {f"{stem}.safetensors.index.json"}) == f"{stem}.bin"
    assert choose_weights({f"{stem}.fp16.safetensors", f"{stem}.non_ema.bin"}) == f"{stem}.fp16.safetensors"
    assert choose_weights({"config.json"}) is None
