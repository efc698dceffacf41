"""The two real configurations, SD 1.5 and SD 2.1 with a ControlNet, filled whole: keys, text, control, UNet and VAE values."""

import gc

import pytest
import torch

from cldm.checkpoint.expected import expected_entries
from cldm.model import create_model
from tests.parity import fill_, load_cases, load_json, noise_tensor, relative_error

VERSIONS = {"v15": "cldm_v15", "v21": "cldm_v21"}
BAR = 1e-4
TEXTS = [
    "burly wood circle with orange background",
    "",
    "A Photo of a CAT!!, 8k   détaillé 猫 🐱 (best quality:1.2), " + "very " * 80,
]


@pytest.mark.parametrize("version", VERSIONS)
def test_keys_shapes_and_types_equal_the_manifest(version):
    entries = expected_entries(VERSIONS[version])
    got = {k: [list(info.shape), str(info.dtype).removeprefix("torch.")] for k, info in entries.items()}
    assert got == load_json(f"core/manifest_{version}.json")


@pytest.mark.full
@pytest.mark.parametrize("version", VERSIONS)
@torch.no_grad()
def test_values_equal_the_reference(version):
    cases = load_cases(f"core/full_{version}.npz")
    model = create_model(VERSIONS[version], device="meta").to_empty(device="cpu")
    # The schedule was computed on the way to the meta device and is not part of the fill.
    model.register_schedule(linear_start=0.00085, linear_end=0.0120)
    fill_(model).eval()

    def noise(name, *shape):
        return noise_tensor(f"{version}/{name}", shape)

    text = model.get_learned_conditioning(TEXTS)
    assert model.cond_stage_model.tokenize(TEXTS).tolist() == cases["tokens"].tolist()
    assert relative_error(text[:, ::4, ::8], cases["text"]) < BAR

    x, t, hint = noise("x", 2, 4, 24, 32), torch.tensor([999, 120]), torch.sigmoid(noise("hint", 2, 3, 192, 256))
    cond = {"c_crossattn": [text[:2]], "c_concat": [hint]}
    outputs = model.control_model(x=x, hint=hint, timesteps=t, context=text[:2])
    for i, output in enumerate(outputs):
        assert relative_error(output[:, ::8, ::2, ::2], cases[f"control{i:02d}"]) < BAR, i
    assert relative_error(model.apply_model(x, t, cond), cases["eps_control"]) < BAR
    assert relative_error(model.apply_model(x, t, {**cond, "c_concat": None}), cases["eps_plain"]) < BAR

    posterior = model.encode_first_stage(torch.tanh(noise("img", 1, 3, 192, 256)))
    assert relative_error(posterior.mean, cases["vae_mean"]) < BAR
    assert relative_error(posterior.logvar, cases["vae_logvar"]) < BAR
    decoded = model.decode_first_stage(noise("z", 1, 4, 16, 24))
    assert relative_error(decoded[:, :, ::2, ::2], cases["vae_decode"]) < BAR
    del model
    gc.collect()
