"""The mathematics of control: a fresh ControlNet changes nothing, what learns and what does not, shapes at many sizes."""

import copy

import pytest
import torch
import torch.nn.functional as F

from cldm.cldm import ControlNet
from cldm.guidance import ControlCall
from ldm.modules.diffusionmodules.openaimodel import UNetModel
from ldm.util import ConfigError, instantiate_from_config
from tests.cldm.tiny import NAMES, Inputs, tiny_config, tiny_model
from tests.parity import fill_


@pytest.fixture(params=NAMES)
def fresh(request):
    """A filled base with a ControlNet as tool_add_control makes it: copied encoder, initial zero convolutions and hint encoder."""
    torch.manual_seed(0)
    model = instantiate_from_config(tiny_config(request.param)).eval()
    fill_(model.model, prefix="model.")
    base = model.model.diffusion_model.state_dict()
    model.control_model.load_state_dict(
        {k: v for k, v in base.items() if k in model.control_model.state_dict()}, strict=False
    )
    return model, Inputs(request.param)


@torch.no_grad()
def test_a_fresh_controlnet_changes_nothing_at_all(fresh):
    model, inputs = fresh
    controlled = model.apply_model(inputs.x, inputs.t, inputs.cond)
    plain = model.apply_model(inputs.x, inputs.t, {**inputs.cond, "c_concat": None})
    assert torch.equal(controlled, plain)


def test_zero_convolutions_learn_in_the_first_step_and_pass_gradient_from_the_second(fresh):
    model, inputs = fresh
    model.train()
    model.learning_rate = 1e-3
    optimizer = model.configure_optimizers()
    control = model.control_model
    zero_convs = [z[0].weight for z in control.zero_convs] + [control.middle_block_out[0].weight]
    behind = [
        p
        for n, p in control.named_parameters()
        if "zero_convs" not in n and "middle_block_out" not in n and "hint" not in n
    ]

    for step in range(2):
        optimizer.zero_grad()
        model.p_losses(inputs.x, inputs.cond, inputs.t, noise=inputs.n)[0].backward()
        assert all(float(w.grad.abs().max()) > 0 for w in zero_convs)
        reaches_behind = [float(p.grad.abs().max()) > 0 for p in behind]
        # W = 0 stops the gradient to its input in the first step (section 3.1); after it, everything behind learns too.
        assert not any(reaches_behind) if step == 0 else all(reaches_behind)
        optimizer.step()


@pytest.mark.parametrize("locked", [True, False])
def test_what_is_not_trained_stays_bit_identical_and_has_no_gradient(locked):
    model, inputs = tiny_model("sd1"), Inputs("sd1")
    model.sd_locked = locked
    model.learning_rate = 1e-2
    model.train()
    before = copy.deepcopy(model.state_dict())
    optimizer = model.configure_optimizers()
    for _ in range(2):
        optimizer.zero_grad()
        model.p_losses(inputs.x, inputs.cond, inputs.t, noise=inputs.n)[0].backward()
        optimizer.step()
    unlocked = ("model.diffusion_model.output_blocks", "model.diffusion_model.out.")
    for name, parameter in model.named_parameters():
        trained = name.startswith("control_model.") or (not locked and name.startswith(unlocked))
        assert parameter.requires_grad == trained, name
        if not trained:
            assert parameter.grad is None and torch.equal(parameter, before[name]), name
    assert not torch.equal(model.control_model.zero_convs[3][0].weight, before["control_model.zero_convs.3.0.weight"])


def test_locks_follow_the_switches():
    model = tiny_model("sd1")
    model.sd_locked = False
    assert model.model.diffusion_model.out[2].weight.requires_grad
    assert not model.model.diffusion_model.input_blocks[1][0].in_layers[2].weight.requires_grad
    model.sd_locked, model.only_mid_control = True, True
    assert not any(p.requires_grad for p in [*model.model.parameters(), *model.control_model.zero_convs.parameters()])
    assert model.control_model.middle_block_out[0].weight.requires_grad
    model.only_mid_control = False
    assert all(p.requires_grad for p in model.control_model.parameters())


@torch.no_grad()
@pytest.mark.parametrize("size", [(8, 8), (16, 8), (24, 40)])
def test_thirteen_outputs_of_the_unets_shapes(size):
    model = tiny_model("sd2")
    h, w = size
    hint, context = torch.rand(1, 3, 8 * h, 8 * w), torch.randn(1, 77, 48)
    outputs = model.control_model(torch.randn(1, 4, h, w), hint, torch.tensor([3]), context)
    channels = [32, 32, 32, 32, 64, 64, 64, 128, 128, 128, 128, 128, 128]
    factors = [1, 1, 1, 2, 2, 2, 4, 4, 4, 8, 8, 8, 8]
    assert [tuple(o.shape) for o in outputs] == [(1, c, h // f, w // f) for c, f in zip(channels, factors, strict=True)]


@torch.no_grad()
def test_the_callers_list_and_conditioning_are_left_alone():
    model, inputs = tiny_model("sd1"), Inputs("sd1")
    control = model.control_model(inputs.x, inputs.hint, inputs.t, inputs.cond["c_crossattn"][0])
    kept = list(control)
    unet = model.model.diffusion_model
    first = unet(inputs.x, inputs.t, inputs.cond["c_crossattn"][0], control=control)
    assert len(control) == 13 and all(a is b for a, b in zip(control, kept, strict=True))
    assert torch.equal(first, unet(inputs.x, inputs.t, inputs.cond["c_crossattn"][0], control=control))


@torch.no_grad()
def test_an_encoded_hint_stands_in_for_the_hint():
    model, inputs = tiny_model("sd1"), Inputs("sd1")
    want = model.apply_model(inputs.x, inputs.t, inputs.cond)
    encoded = {"hint": None, "guided_hint": model.control_model.encode_hint(inputs.hint)}
    cond = {"c_crossattn": inputs.cond["c_crossattn"], "c_control": [ControlCall(model.control_model, encoded)]}
    assert torch.equal(model.apply_model(inputs.x, inputs.t, cond), want)


@torch.no_grad()
def test_global_average_pooling_averages_after_scaling():
    model, inputs = tiny_model("sd1", global_average_pooling=True), Inputs("sd1")
    model.control_scales = [0.5] * 13
    got = model.control(inputs.x, inputs.t, inputs.cond, inputs.cond["c_crossattn"][0])
    want = model.control_model(inputs.x, inputs.hint, inputs.t, inputs.cond["c_crossattn"][0])
    for g, w in zip(got, want, strict=True):
        torch.testing.assert_close(g, (0.5 * w).mean(dim=(2, 3), keepdim=True))


def test_transformer_depth_above_one():
    config = tiny_config("sd2")
    for part in ("unet_config", "control_stage_config"):
        config["params"][part]["params"]["transformer_depth"] = 2
    model, inputs = fill_(instantiate_from_config(config)).eval(), Inputs("sd2")
    blocks = model.model.diffusion_model.input_blocks[1][1].transformer_blocks
    with torch.no_grad():
        before = model.apply_model(inputs.x, inputs.t, inputs.cond)
        blocks[1].ff.net[2].bias.add_(1.0)
        after = model.apply_model(inputs.x, inputs.t, inputs.cond)
    assert len(blocks) == 2 and not torch.allclose(before, after)


@pytest.mark.parametrize(
    "change, message",
    [
        (
            {
                "unet_config": {
                    **tiny_config("sd1")["params"]["unet_config"],
                    "target": "ldm.modules.diffusionmodules.openaimodel.UNetModel",
                }
            },
            "ControlledUnetModel",
        ),
        (
            {"control_stage_config": tiny_config("sd2")["params"]["control_stage_config"]},
            "different networks: .*proj_in",
        ),
        ({"no_such_option": 3}, "no_such_option"),
        ({"parameterization": "score"}, "parameterization"),
        ({"conditioning_key": "text"}, "conditioning_key"),
        ({"control_stage_config": {"target": "cldm.cldm.NoSuchNet", "params": {}}}, "NoSuchNet"),
        ({"control_stage_config": {"target": "cldm.nowhere.Net", "params": {}}}, "cldm.nowhere"),
    ],
)
def test_configuration_mistakes_are_named(change, message):
    with pytest.raises(ValueError, match=message):
        instantiate_from_config(tiny_config("sd1", **change))
    assert issubclass(ConfigError, ValueError)


@torch.no_grad()
def test_mistakes_in_calls_are_named():
    model, inputs = tiny_model("sd1"), Inputs("sd1")
    with pytest.raises(ValueError, match="eight times"):
        model.apply_model(inputs.x, inputs.t, {**inputs.cond, "c_concat": [F.pad(inputs.hint, (0, 64))]})
    model.control_scales = [1.0] * 12
    with pytest.raises(ValueError, match="control_scales has 12 entries for 13"):
        model.apply_model(inputs.x, inputs.t, inputs.cond)
    with pytest.raises(KeyError, match="no 'hint'"):
        model.get_input({"jpg": torch.zeros(1, 64, 64, 3), "txt": [""]}, "jpg")


@torch.no_grad()
def test_what_the_control_net_is_given_is_checked():
    model, inputs = tiny_model("sd1"), Inputs("sd1")
    call = {"x": inputs.x, "timesteps": inputs.t, "context": inputs.cond["c_crossattn"][0]}
    guided = model.control_model.encode_hint(inputs.hint)
    for given in ({"hint": None}, {"hint": inputs.hint, "guided_hint": guided}):
        with pytest.raises(ValueError, match="either hint or guided_hint"):
            model.control_model(**call, **given)
    with pytest.raises(ValueError, match="3 hints for 2 latents"):
        model.control_model(**call, hint=inputs.hint[[0, 1, 0]])
    one_for_all = model.control_model(**call, hint=inputs.hint[:1])
    torch.testing.assert_close(one_for_all, model.control_model(**call, hint=inputs.hint[[0, 0]], y=None))


@torch.no_grad()
def test_thirteen_scales_suit_a_smaller_network_too():
    config = tiny_config("sd1")
    for part in ("unet_config", "control_stage_config"):
        config["params"][part]["params"]["channel_mult"] = [1, 2, 4]
    model, inputs = fill_(instantiate_from_config(config)).eval(), Inputs("sd1")
    assert model.control_model.output_count == 10 == len(model.control_scales)
    model.control_scales = [0.5] * 10
    want = model.apply_model(inputs.x, inputs.t, inputs.cond)
    model.control_scales = [0.5] * 13
    torch.testing.assert_close(model.apply_model(inputs.x, inputs.t, inputs.cond), want)


class PlainControl(ControlNet):
    """A user's ControlNet with the signature of the reference."""

    def forward(self, x, hint, timesteps, context):
        return super().forward(x, hint, timesteps, context)


class PlainUnet(UNetModel):
    """A user's UNet that takes control in its own way."""

    def forward(self, x, timesteps=None, context=None, control=None, only_mid_control=False, **kwargs):
        return super().forward(x, timesteps, context) + (0 if control is None else control[0].mean())


@torch.no_grad()
def test_networks_of_users_take_the_place_of_these():
    inputs, plain, own = Inputs("sd1"), tiny_model("sd1"), tiny_config("sd1")
    own["params"]["control_stage_config"]["target"] = f"{__name__}.PlainControl"
    model = fill_(instantiate_from_config(own)).eval()
    want = plain.apply_model(inputs.x, inputs.t, inputs.cond)
    torch.testing.assert_close(model.apply_model(inputs.x, inputs.t, inputs.cond), want)
    own["params"]["unet_config"]["target"] = f"{__name__}.PlainUnet"
    model = fill_(instantiate_from_config(own)).eval()
    assert not torch.equal(model.apply_model(inputs.x, inputs.t, inputs.cond), want)


@torch.no_grad()
def test_the_middle_output_alone_is_enough_for_the_middle_alone():
    model, inputs = tiny_model("sd1"), Inputs("sd1")
    context = inputs.cond["c_crossattn"][0]
    control = model.control(inputs.x, inputs.t, inputs.cond, context)
    unet = model.model.diffusion_model
    want = unet(inputs.x, inputs.t, context, control=control, only_mid_control=True)
    torch.testing.assert_close(unet(inputs.x, inputs.t, context, control=control[-1:], only_mid_control=True), want)
    with pytest.raises(ValueError, match="takes 13 control outputs, found 1"):
        unet(inputs.x, inputs.t, context, control=control[-1:])


@torch.no_grad()
def test_grey_hints_and_encoded_texts_in_a_batch():
    model = tiny_model("sd1", cond_stage_config={"target": "ldm.modules.encoders.modules.FrozenCLIPEmbedder",
                                                 "params": {"width": 48, "layers": 1, "heads": 4}})  # fmt: skip
    text, hint = torch.randn(2, 77, 48), torch.rand(2, 64, 64)
    batch = {"jpg": torch.zeros(2, 64, 64, 3), "txt": text}
    _, grey = model.get_input({**batch, "hint": hint}, "jpg")
    _, colour = model.get_input({**batch, "hint": hint[..., None].repeat(1, 1, 1, 3)}, "jpg")
    assert torch.equal(grey["c_concat"][0], colour["c_concat"][0]) and torch.equal(grey["c_crossattn"][0], text)


def test_what_a_user_has_frozen_stays_frozen():
    model = instantiate_from_config(tiny_config("sd1"))
    model.control_model.input_hint_block.requires_grad_(False)
    model.configure_optimizers()
    assert not any(p.requires_grad for p in model.control_model.input_hint_block.parameters())
    assert all(p.requires_grad for p in model.control_model.zero_convs.parameters())
