"""The tiny base's script in a few steps: what it keeps between calls is whole and of the same settings."""

import pytest
import torch

import tool_train_tiny
from ldm.files import open_weights, read_state_dict


def arguments(tmp_path, **changes):
    settings = {"work": tmp_path / "work", "out": tmp_path / "new" / "base.safetensors", "vae_half_steps": 2, "vae_steps": 2,
                "vae_batch": 1, "latents": 3, "unet_steps": 2, "unet_batch": 1, "vae_precision": "32-true", "save_every": 1,
                **changes}  # fmt: skip
    return [f"{key}={value}" for key, value in settings.items()]


def test_stages_go_on_with_the_same_settings_alone(tmp_path, capsys, monkeypatch):
    encoded = []
    cache = tool_train_tiny.cache_latents
    monkeypatch.setattr(tool_train_tiny, "cache_latents", lambda *args: encoded.append(cache(*args)) or encoded[-1])
    write = tool_train_tiny.write_weights

    def interrupt(path, *args, **kwargs):
        raise KeyboardInterrupt

    monkeypatch.setattr(tool_train_tiny, "write_weights", interrupt)
    assert tool_train_tiny.main(arguments(tmp_path)) == 130
    assert not list((tmp_path / "work").glob("latents*"))
    monkeypatch.setattr(tool_train_tiny, "write_weights", write)
    assert tool_train_tiny.main(arguments(tmp_path)) == 0
    base = read_state_dict(tmp_path / "new" / "base.safetensors")
    assert any(key.startswith("model.diffusion_model.") for key in base)
    # Prompts come from where the latents lie: what a later version draws does not matter any more.
    monkeypatch.setattr(tool_train_tiny, "draw_with_prompt", lambda *args: pytest.fail("drawn again"))
    assert tool_train_tiny.main(arguments(tmp_path, save_every=2)) == 0
    (mean, std, prompts), (again, _, same) = encoded
    assert torch.equal(mean, again) and prompts == same and len(mean) == len(std) == len(prompts) == 3
    # The UNet is trained on latents of standard deviation 1, and the file says by which factor.
    with open_weights(tmp_path / "new" / "base.safetensors") as file:
        scale = float(file.metadata["scale_factor"])
    noisy = mean + std * torch.randn((2000, *mean.shape))
    assert float((noisy * scale).std(correction=0)) == pytest.approx(1, rel=0.02)
    capsys.readouterr()
    assert tool_train_tiny.main(arguments(tmp_path, latents=4, palette="web")) == 2
    assert "different settings (palette, latents)" in capsys.readouterr().err
    (tmp_path / "work" / "settings.json").unlink()
    assert tool_train_tiny.main(arguments(tmp_path)) == 2
    assert "unknown settings" in capsys.readouterr().err


@pytest.mark.parametrize(
    "argument",
    ["palette=pale", "out=.", "config=nowhere", "size=50", "vae_batch=0", "vae_steps=1", "unet_precision=bf16mixed"]
    + ["unet_lr=nan", "empty_prompts=5", "threads=-1"],
)
def test_mistakes_are_one_line_and_exit_2(tmp_path, capsys, argument):
    assert tool_train_tiny.main([*arguments(tmp_path), argument]) == 2
    error = capsys.readouterr().err
    assert error.startswith("tool_train_tiny.py: ") and error.count("\n") == 1
    assert not (tmp_path / "work" / "settings.json").exists()
