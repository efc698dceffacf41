"""The autoencoder with little memory and in half precision: bands of rows, one picture at a time, repair of overflows."""

import pytest
import torch

from ldm.models.autoencoder import AutoencoderKL
from ldm.modules.attention import full_attention, set_attention, sliced_attention
from ldm.modules.diffusionmodules import bands
from tests.parity import fill_

DDCONFIG = dict(double_z=True, z_channels=4, resolution=64, in_channels=3, out_ch=3, ch=32, ch_mult=[1, 2, 2], num_res_blocks=1,
                attn_resolutions=[], dropout=0.0)  # fmt: skip


def autoencoder(**changes) -> AutoencoderKL:
    return fill_(AutoencoderKL({**DDCONFIG, **changes}, embed_dim=4)).eval()


@pytest.mark.parametrize(
    "changes", [{}, {"attn_resolutions": [32]}, {"resamp_with_conv": False}, {"tanh_out": True}, {"give_pre_end": True}]
)
@torch.no_grad()
def test_bands_give_what_a_whole_pass_gives(changes):
    shared = {key: value for key, value in changes.items() if key not in ("tanh_out", "give_pre_end")}
    first_stage = autoencoder(**shared)
    decoder = fill_(bands.Decoder(**DDCONFIG | changes)).eval()
    encoder = fill_(bands.Encoder(**DDCONFIG | shared)).eval()
    for height, width in ((8, 8), (19, 13), (40, 5)):
        z, x = torch.randn(2, 4, height, width), torch.rand(2, 3, 4 * height, 4 * width) * 2 - 1
        kept = z.clone(), x.clone()
        for positions in (1, 700):
            want, got = decoder(z), bands.decode_in_bands(decoder, z, positions)
            torch.testing.assert_close(got, want, atol=2e-5 * float(want.abs().max()), rtol=0)
            want, got = encoder(x), bands.encode_in_bands(encoder, x, positions)
            torch.testing.assert_close(got, want, atol=2e-5 * float(want.abs().max()), rtol=0)
        assert torch.equal(z, kept[0]) and torch.equal(x, kept[1])  # nothing that was given is written to
    whole = first_stage.decode(z)
    first_stage.band_positions, first_stage.one_at_a_time = 64, True
    torch.testing.assert_close(first_stage.decode(z), whole, atol=2e-5 * float(whole.abs().max()), rtol=0)


def test_gradients_go_through_whole_passes():
    first_stage = autoencoder()
    first_stage.band_positions = 64
    z = torch.randn(1, 4, 8, 8, requires_grad=True)
    first_stage.decode(z).sum().backward()
    assert z.grad.abs().sum() > 0


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@torch.no_grad()
def test_half_precision_takes_and_gives_the_callers_type(dtype):
    whole, half = autoencoder(), autoencoder().to(dtype)
    z, x = torch.randn(1, 4, 8, 8), torch.rand(1, 3, 32, 32) * 2 - 1
    want, got = whole.decode(z), half.decode(z)
    assert got.dtype == torch.float32 and (got - want).abs().max() < 0.05 * want.abs().max()
    assert half.encode(x).sample().dtype == torch.float32 and half.decode(z.to(dtype)).dtype == dtype
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert whole.decode(z).dtype == torch.float32


@pytest.mark.parametrize("positions", [None, 64])
@torch.no_grad()
def test_an_overflow_is_named_and_repaired(caplog, positions):
    first_stage = autoencoder()
    broken = first_stage.decoder.up[1].block[0].conv2
    broken.weight.mul_(1e6).clamp_(-6e4, 6e4)
    z = torch.randn(1, 4, 8, 8)
    want = first_stage.half().float().decode(z)
    first_stage.half()
    first_stage.band_positions = positions
    before = {key: value.clone() for key, value in first_stage.state_dict().items()}
    got = first_stage.decode(z)
    torch.testing.assert_close(got, want, atol=1e-3 * float(want.abs().max()), rtol=0)
    assert "decoding in float16 is not finite from decoder.up.1.block.0.conv2 (Conv2d) on" in caplog.text
    assert all(torch.equal(before[key], value) for key, value in first_stage.state_dict().items())
    caplog.clear()
    assert not first_stage.decode(torch.full_like(z, torch.nan)).isfinite().any() and not caplog.records


def test_sliced_attention_cuts_images_and_queries(monkeypatch):
    monkeypatch.setattr("ldm.modules.attention._SLICE", 2 * 20 * 7)  # seven queries of two heads at a time
    seen = []
    monkeypatch.setattr(
        "ldm.modules.attention.full_attention", lambda q, *rest: seen.append(q.shape) or full_attention(q, *rest)
    )
    q, k, v = (torch.randn(3, 2, length, 8) for length in (30, 20, 20))
    for mask in (None, torch.rand(3, 1, 1, 20) > 0.3, torch.rand(1, 2, 30, 20) > 0.3):
        torch.testing.assert_close(sliced_attention(q, k, v, mask), full_attention(q, k, v, mask))
    assert max(shape[0] for shape in seen) == 1 and max(shape[2] for shape in seen) == 7
    first_stage, z = autoencoder(), torch.randn(1, 4, 16, 16)
    whole = first_stage.decode(z)
    seen.clear()
    set_attention(sliced_attention)
    try:
        torch.testing.assert_close(first_stage.decode(z), whole, atol=1e-4, rtol=1e-4)
    finally:
        set_attention(full_attention)
    assert len(seen) > 1  # the autoencoder's attention too
