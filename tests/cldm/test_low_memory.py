"""Memory of sampling as computed on fake tensors, and previews without the autoencoder's decoder."""

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from cldm import sampling_memory
from cldm.low_memory import LowMemory
from cldm.model import create_model
from cldm.preview import LatentPreview
from cldm.sampling_memory import Case, measure
from cldm.training import curves, memory


def test_each_switch_saves_where_it_should(capsys):
    def peaks(**options):
        return measure("cldm_tiny", 512, Case("", **options))

    half = peaks()
    assert half["step"] < 0.6 * peaks(dtype=torch.float32)["step"]
    weights = half["text"]  # and a little more
    assert peaks(memory=LowMemory(vae_tiles=True))["decode"] - weights < 0.75 * (half["decode"] - weights)
    moved = peaks(memory=LowMemory(offload=True))
    assert all(moved[stage] < half[stage] for stage in half)
    several = peaks(pictures=4)["decode"] - weights
    assert peaks(pictures=4, memory=LowMemory(vae_one_at_a_time=True))["decode"] - weights < 0.5 * several
    unfused = peaks(fused=False)
    sliced = peaks(fused=False, memory=LowMemory(sliced_attention=True))
    assert half["step"] <= sliced["step"] < unfused["step"]


def test_the_command_prints_a_table(capsys, monkeypatch):
    monkeypatch.setattr(sampling_memory, "CASES", sampling_memory.CASES[:1])
    assert sampling_memory.main(["cldm_tiny", "--sizes", "64"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert "text, 64 | step, 64 | decode, 64 | most, 64" in " ".join(lines[0].split()) and lines[2].startswith(
        "| float32"
    )
    assert sampling_memory.main(["cldm_tiny", "--sizes", "60"]) == 2
    assert "multiples of 64, found 60" in capsys.readouterr().err


@pytest.mark.parametrize("command", [sampling_memory, memory, curves])
def test_a_misspelt_option_is_one_line_and_exit_2(command, capsys):
    with pytest.raises(SystemExit, match="2"):
        command.main(["--sizs", "a"])
    error = capsys.readouterr().err
    assert "--sizs" in error and error.count("\n") == 1


def test_previews_show_about_the_colours_of_the_picture():
    model = create_model("cldm_tiny").eval()
    model.load_state_dict(load_file("models/cldm_tiny.safetensors"), strict=False)
    picture = torch.full((1, 3, 64, 64), -1.0)
    picture[:, 0, :, :32] = 1.0  # red
    picture[:, 2, :, 32:] = 1.0  # blue
    with torch.no_grad():
        latents = model.scale_factor * model.encode_first_stage(picture).mean
    preview = LatentPreview(model)
    shown = preview(latents)[0].astype(int)
    assert shown.shape == (8, 8, 3)
    left, right = shown[2:6, 1:3].mean(axis=(0, 1)), shown[2:6, 5:7].mean(axis=(0, 1))
    assert left == pytest.approx([255, 0, 0], abs=60) and right == pytest.approx([0, 0, 255], abs=60), (left, right)
    assert np.isfinite(shown).all()
    torch.set_default_dtype(torch.float64)
    try:
        with torch.device("meta"):  # where a notebook may have made all tensors by default, say on a GPU
            assert torch.equal(LatentPreview(model).matrix, preview.matrix)
    finally:
        torch.set_default_dtype(torch.float32)
