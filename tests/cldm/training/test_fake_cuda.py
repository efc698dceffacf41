"""The full-size model on fake CUDA tensors, which need neither a GPU nor memory: nothing is left on the CPU or of a wrong type."""

from contextlib import contextmanager, nullcontext

import pytest
import torch

from cldm.model import create_model
from cldm.training.cache import release_encoders
from cldm.training.precision import cast_frozen, set_recompute
from tests.cldm.fake_tensors import fake_tensors

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
BATCH = 2


@contextmanager
def autocast_cuda(dtype):
    """torch.autocast("cuda"), which without a GPU switches itself off."""
    before = torch.is_autocast_enabled("cuda"), torch.get_autocast_dtype("cuda")
    torch.set_autocast_enabled("cuda", True)
    torch.set_autocast_dtype("cuda", dtype)
    torch.autocast_increment_nesting()
    try:
        yield
    finally:
        if torch.autocast_decrement_nesting() == 0:
            torch.clear_autocast_cache()
        torch.set_autocast_enabled("cuda", before[0])
        torch.set_autocast_dtype("cuda", before[1])


@pytest.fixture(scope="module", params=DTYPES)
def built(request):
    """(model, dtype) of each precision, made on the device in that precision."""
    with fake_tensors():
        yield create_model("cldm_v15", device="cuda", dtype=DTYPES[request.param]), DTYPES[request.param]


def whole_batch():
    """As a loader gives it, on the CPU."""
    return {"jpg": torch.zeros(BATCH, 512, 512, 3), "hint": torch.zeros(BATCH, 512, 512, 3), "txt": ["a bird", ""]}


def cached_loss(model):
    """The loss of a batch from the cache."""
    moments, context = torch.zeros(BATCH, 8, 64, 64), torch.zeros(BATCH, 77, 768)
    return model.shared_step({"moments": moments, "context": context, "hint": torch.zeros(BATCH, 512, 512, 3)})[0]


def is_loss(loss):
    return loss.device.type == "cuda" and loss.dtype == torch.float32 and loss.shape == () and loss.requires_grad


@pytest.mark.slow
def test_everything_is_on_the_device_and_of_the_dtype(built):
    model, dtype = built
    elsewhere = [k for k, v in [*model.named_parameters(), *model.named_buffers()] if v.device.type != "cuda"]
    assert not elsewhere
    assert {p.dtype for p in model.parameters()} == {dtype}
    schedule = {name: b.dtype for name, b in model.named_buffers(recurse=False) if b.is_floating_point()}
    assert len(schedule) > 10 and set(schedule.values()) == {torch.float32}


@pytest.mark.slow
def test_training_step_forward(built):
    model, _ = built
    model.train()
    for recompute in ("none", "all"):
        set_recompute(model, recompute)
        assert is_loss(model.shared_step(whole_batch())[0])
    assert is_loss(cached_loss(model))


@pytest.mark.slow
def test_guidance_and_both_ways_through_the_autoencoder(built):
    model, dtype = built
    model.eval()
    with torch.no_grad():
        posterior = model.encode_first_stage(torch.zeros(BATCH, 3, 512, 512, device="cuda", dtype=dtype))
        assert posterior.mean.device.type == "cuda" and posterior.mean.shape == (BATCH, 4, 64, 64)
        text = model.get_learned_conditioning(["a bird"] * BATCH)
        cond = {"c_crossattn": [text], "c_concat": [torch.zeros(BATCH, 3, 512, 512, device="cuda")]}
        latents = torch.zeros(BATCH, 4, 64, 64, device="cuda")
        output = model.make_guidance(cond, cond, 9.0)(latents, torch.full((BATCH,), 500, device="cuda"))
        assert output.device.type == "cuda" and output.shape == latents.shape
        picture = model.decode_first_stage(latents)
    assert picture.device.type == "cuda" and picture.shape == (BATCH, 3, 512, 512)


@pytest.mark.slow
def test_mixed_precision_with_frozen_weights_in_half(built):
    # As a training run has it: trained weights in float32, frozen ones converted, encoders released. The last test of a model.
    model, dtype = built
    if dtype != torch.float32:
        pytest.skip("trained weights are float32")
    release_encoders(model)
    model.train()
    for frozen, computing in [("bf16", "bf16"), ("fp16", "fp16"), ("fp32", "bf16"), ("bf16", None)]:
        cast_frozen(model, frozen)
        assert {p.dtype for p in model.control_model.parameters()} == {torch.float32}
        assert {p.dtype for p in model.model.parameters()} == {DTYPES[frozen]}
        assert model.alphas_cumprod.dtype == torch.float32
        with autocast_cuda(DTYPES[computing]) if computing else nullcontext():
            assert is_loss(cached_loss(model))
