"""Frozen weights in half precision, and recomputation as a switch: the same training, in less memory."""

import pytest
import torch

from cldm.training.precision import cast_frozen, forward_context, set_recompute
from ldm.modules.diffusionmodules.openaimodel import ResBlock
from ldm.util import ConfigError, instantiate_from_config
from tests.cldm.tiny import Inputs, tiny_config, tiny_model


def training_model(**changes):
    model = tiny_model("sd1", **changes).train()
    set_recompute(model, False)
    return model


def loss_of(model, precision="32-true"):
    inputs = Inputs("sd1")
    with forward_context(precision, "cpu"):
        return model.p_losses(inputs.x, inputs.cond, inputs.t, inputs.n)[0]


def gradients(model):
    return {k: p.grad.clone() for k, p in model.named_parameters() if p.grad is not None}


@pytest.fixture(scope="module")
def exact():
    """Loss and gradients in float32."""
    model = training_model()
    loss = loss_of(model)
    loss.backward()
    return loss.item(), gradients(model)


@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed"])
def test_training_with_frozen_weights_in_bf16(exact, precision):
    model = training_model()
    saved = cast_frozen(model, "bf16")
    frozen = [p for p in model.parameters() if not p.requires_grad]
    assert saved == 2 * sum(p.numel() for p in frozen) and {p.dtype for p in frozen} == {torch.bfloat16}
    assert {p.dtype for p in model.trained_parameters()} == {torch.float32}
    assert {b.dtype for b in model.buffers() if b.is_floating_point()} == {torch.float32}
    loss = loss_of(model, precision)
    loss.backward()
    assert loss.dtype == torch.float32 and loss.item() == pytest.approx(exact[0], rel=0.02)
    found = gradients(model)
    assert found.keys() == exact[1].keys() and all(g.dtype == torch.float32 for g in found.values())
    flat, wanted = (torch.cat([g[k].flatten() for k in found]) for g in (found, exact[1]))
    assert torch.cosine_similarity(flat, wanted, dim=0) > 0.99
    optimizer = torch.optim.AdamW(model.trained_parameters(), lr=1e-3)
    for _ in range(3):
        optimizer.step()
        optimizer.zero_grad()
        again = loss_of(model, precision)
        again.backward()
    assert torch.isfinite(again) and again < loss
    cast_frozen(model, torch.float32)
    assert {p.dtype for p in model.parameters()} == {torch.float32}


def test_a_network_in_half_precision_converts_nothing(monkeypatch):
    model = training_model()
    cast_frozen(model, "bf16")
    seen = set()
    for module in model.model.modules():
        if isinstance(module, (torch.nn.GroupNorm, torch.nn.LayerNorm, torch.nn.Conv2d)):
            module.register_forward_hook(lambda m, args, out: seen.update({args[0].dtype, out.dtype}))
    loss_of(model, "bf16-mixed")
    assert seen == {torch.bfloat16}


def test_an_unlocked_decoder_trains_beside_a_frozen_encoder_in_half_precision():
    model = training_model()
    model.sd_locked = False
    cast_frozen(model, "bf16")
    unet = model.model.diffusion_model
    assert unet.out[2].weight.dtype == torch.float32 and unet.input_blocks[0][0].weight.dtype == torch.bfloat16
    for precision in ("bf16-mixed", "32-true"):
        loss_of(model, precision).backward()
        assert torch.isfinite(unet.out[2].weight.grad).all()


def test_an_unknown_precision_is_named():
    with pytest.raises(ConfigError, match="must be one of fp32, bf16, fp16, found 'int8'"):
        cast_frozen(torch.nn.Linear(1, 1), "int8")


@pytest.mark.parametrize("choice", ["all", "trained", True])
def test_recomputation_changes_nothing_but_memory(exact, choice):
    model = training_model()
    set_recompute(model, choice)
    runs = []
    for block in (model.control_model.input_blocks[1][0], model.model.diffusion_model.output_blocks[0][0]):
        assert isinstance(block, ResBlock)
        # Its beginning: computing again ends as soon as everything that the backward pass needs is there.
        block.in_layers.register_forward_pre_hook(lambda *args, block=block: runs.append(block))
    loss = loss_of(model)
    loss.backward()
    assert loss.item() == exact[0]
    for key, gradient in gradients(model).items():
        assert torch.equal(gradient, exact[1][key])
    # A block that computes again runs twice; the locked decoder's does only where that is asked for.
    counts = {id(block): sum(b is block for b in runs) for block in runs}
    assert list(counts.values()) == ([2, 1] if choice == "trained" else [2, 2])


def test_recomputation_can_be_switched_off_for_a_configuration_that_has_it_on():
    model = instantiate_from_config(tiny_config("sd1"))
    switches = [m.use_checkpoint for m in model.modules() if isinstance(m, ResBlock)]
    assert all(switches)
    set_recompute(model, "none")
    assert not any(m.use_checkpoint for m in model.modules() if isinstance(m, ResBlock))
    assert not any(m.checkpoint for m in model.modules() if type(m).__name__ == "BasicTransformerBlock")
    with pytest.raises(ConfigError, match="recompute must be one of none, trained, all, found 'some'"):
        set_recompute(model, "some")
