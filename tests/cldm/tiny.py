"""The two small ControlLDMs of the parity cases, `sd1` and `sd2`, with their inputs."""

from typing import Any

import torch

from cldm.cldm import ControlLDM
from ldm.util import instantiate_from_config
from tests.parity import fill_, load_cases, noise_tensor

CASES = load_cases("core/tiny.npz")
NAMES = ("sd1", "sd2")
GUESS_SCALES = [0.825 ** (12 - i) for i in range(13)]

_UNET = {
    "image_size": 32,
    "in_channels": 4,
    "model_channels": 32,
    "attention_resolutions": [4, 2, 1],
    "num_res_blocks": 2,
    "channel_mult": [1, 2, 4, 4],
    "use_spatial_transformer": True,
    "transformer_depth": 1,
    "context_dim": 48,
    "use_checkpoint": True,
    "legacy": False,
}
_VERSIONS = {
    "sd1": ({"num_heads": 4}, {}),
    "sd2": ({"num_head_channels": 16, "use_linear_in_transformer": True}, {"parameterization": "v"}),
}
SIZES = {"sd1": (2, 16, 24), "sd2": (1, 24, 16)}


def tiny_config(name: str, **changes: Any) -> dict[str, Any]:
    """The configuration of `sd1` or `sd2`; `changes` replace parameters of the ControlLDM."""
    heads, params = _VERSIONS[name]
    ddconfig = dict(
        double_z=True, z_channels=4, resolution=64, in_channels=3, out_ch=3, ch=32, ch_mult=[1, 2, 4, 4], num_res_blocks=2,
        attn_resolutions=[], dropout=0.0,
    )  # fmt: skip
    params = dict(
        linear_start=0.00085, linear_end=0.0120, timesteps=1000, num_timesteps_cond=1, log_every_t=200, first_stage_key="jpg",
        cond_stage_key="txt", control_key="hint", image_size=64, channels=4, cond_stage_trainable=False, conditioning_key="crossattn",
        monitor="val/loss_simple_ema", scale_factor=0.18215, use_ema=False, only_mid_control=False,
        control_stage_config={"target": "cldm.cldm.ControlNet", "params": {"hint_channels": 3, **_UNET, **heads}},
        unet_config={"target": "cldm.cldm.ControlledUnetModel", "params": {"out_channels": 4, **_UNET, **heads}},
        first_stage_config={
            "target": "ldm.models.autoencoder.AutoencoderKL",
            "params": {"embed_dim": 4, "ddconfig": ddconfig, "lossconfig": {"target": "torch.nn.Identity"}},
        },
        cond_stage_config={"target": "torch.nn.Identity"},
        **params,
    )  # fmt: skip
    return {"target": "cldm.cldm.ControlLDM", "params": {**params, **changes}}


class OwnControlLDM(ControlLDM):
    """A user's model, whose `apply_model` takes and gives what the reference's does."""

    def apply_model(self, x_noisy, t, cond, *args, **kwargs):
        text, unet = torch.cat(cond["c_crossattn"], 1), self.model.diffusion_model
        if cond["c_concat"] is None:
            return unet(x=x_noisy, timesteps=t, context=text, control=None, only_mid_control=self.only_mid_control)
        control = self.control_model(x=x_noisy, hint=torch.cat(cond["c_concat"], 1), timesteps=t, context=text)
        control = [c * scale for c, scale in zip(control, self.control_scales, strict=True)]
        return unet(x=x_noisy, timesteps=t, context=text, control=control, only_mid_control=self.only_mid_control)


def tiny_model(name: str, **changes: Any) -> Any:
    """The filled model in eval mode."""
    return fill_(instantiate_from_config(tiny_config(name, **changes))).eval()


class Inputs:
    """The named inputs of a case, and the conditionings made of them."""

    def __init__(self, name: str) -> None:
        self.batch, self.height, self.width = SIZES[name]
        self.name = name
        self.shape = (4, self.height, self.width)
        self.x, self.n, self.x_T, self.x0 = (self.latent(n) for n in ("x", "n", "xT", "x0"))
        self.t = torch.tensor([17, 801][: self.batch])
        self.hint = torch.sigmoid(self.noise("hint", (self.batch, 3, 8 * self.height, 8 * self.width)))
        self.image = torch.tanh(self.noise("img", (self.batch, 3, 8 * self.height, 8 * self.width)))
        self.cond = {"c_crossattn": [self.noise("context", (self.batch, 77, 48))], "c_concat": [self.hint]}
        self.uncond = {"c_crossattn": [self.noise("uncontext", (self.batch, 77, 48))], "c_concat": [self.hint]}
        self.mask = (self.noise("m", (self.batch, 1, self.height, self.width)) > 0).float()

    def noise(self, name: str, shape: tuple[int, ...]) -> torch.Tensor:
        return noise_tensor(f"{self.name}/{name}", shape)

    def latent(self, name: str) -> torch.Tensor:
        return self.noise(name, (self.batch, *self.shape))
