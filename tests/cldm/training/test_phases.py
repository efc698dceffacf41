"""What is trained from which step on, and what the optimizer and the average keep of it."""

import pytest
import torch

from cldm.training.phases import Phase, plan_phases
from tests.cldm.tiny import tiny_model


@pytest.mark.parametrize(
    "settings, phases",
    [
        ({}, [Phase(0, 9)]),
        ({"only_mid_control": True}, [Phase(0, 9, True)]),
        ({"sd_locked": False}, [Phase(0, 9, False, "decoder")]),
        ({"reconnect_at": 4}, [Phase(0, 4, True), Phase(4, 9)]),
        ({"unlock_at": 4, "unlock": "all"}, [Phase(0, 4), Phase(4, 9, False, "all")]),
        ({"reconnect_at": 2, "unlock_at": 6}, [Phase(0, 2, True), Phase(2, 6), Phase(6, 9, False, "decoder")]),
        ({"reconnect_at": 6, "unlock_at": 2}, [Phase(0, 2, True), Phase(2, 6, True, "decoder"), Phase(6, 9, False, "decoder")]),
        ({"reconnect_at": 4, "unlock_at": 4}, [Phase(0, 4, True), Phase(4, 9, False, "decoder")]),
    ],
)  # fmt: skip
def test_plan(settings, phases):
    assert plan_phases(9, **settings) == phases


def test_applying_a_phase_locks_and_connects():
    model = tiny_model("sd1")
    unet = model.model.diffusion_model

    def trained(module):
        return {p.requires_grad for p in module.parameters()}

    Phase(0, 1, only_mid_control=True).apply(model)
    assert trained(model.control_model.zero_convs) == {False} and trained(unet) == {False} and model.only_mid_control
    Phase(1, 2, unlocked="decoder").apply(model)
    assert trained(model.control_model) == {True} and trained(unet.output_blocks) == {True}
    assert trained(unet.input_blocks) == {False}
    Phase(2, 3, unlocked="all").apply(model)
    assert trained(unet) == {True} and trained(model.first_stage_model) == {False}
    Phase(3, 4).apply(model)
    assert trained(unet) == {False}
    assert str(Phase(0, 1, True, "all")) == "the middle output alone and the whole UNet"
    with pytest.raises(ValueError, match='"decoder" or "all", found \'encoder\''):
        model.unlock = "encoder"


@pytest.mark.parametrize("unlock, encoder_moves", [("decoder", False), ("all", True)])
def test_the_encoder_gets_gradients_only_where_the_whole_unet_is_trained(unlock, encoder_moves):
    model = tiny_model(
        "sd1",
    )
    Phase(0, 1, unlocked=unlock).apply(model)
    x, t = torch.randn(1, 4, 8, 8), torch.tensor([5])
    cond = {"c_crossattn": [torch.randn(1, 77, 48)], "c_concat": [torch.rand(1, 3, 64, 64)]}
    model.apply_model(x, t, cond).square().mean().backward()
    unet = model.model.diffusion_model
    assert unet.out[-1].weight.grad is not None
    assert (unet.input_blocks[1][0].in_layers[-1].weight.grad is not None) == encoder_moves


def test_groups_have_their_own_rates_and_an_average_grows_with_what_is_trained():
    model = tiny_model("sd1")
    model.unlock_learning_rate = 1e-6
    Phase(0, 1).apply(model)
    assert [group.get("lr") for group in model.parameter_groups()] == [None]
    model.average_weights(0.5)
    averaged = set(model.model_ema.m_name2s_name)
    assert averaged and all(name.startswith("control_model.") for name in averaged)
    name = model.model_ema.m_name2s_name["control_model.middle_block_out.0.weight"]
    getattr(model.model_ema, name).fill_(3.0)
    Phase(1, 2, unlocked="decoder").apply(model)
    assert [group.get("lr") for group in model.parameter_groups()] == [None, 1e-6]
    model.average_weights(0.5)
    assert averaged < set(model.model_ema.m_name2s_name)
    assert (getattr(model.model_ema, name) == 3.0).all()  # what has been averaged goes on
    before = model.control_model.middle_block_out[0].weight.clone()
    with model.ema_scope():
        assert (model.control_model.middle_block_out[0].weight == 3.0).all()
    assert torch.equal(model.control_model.middle_block_out[0].weight, before)
