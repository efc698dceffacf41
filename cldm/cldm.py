"""ControlNet: a trainable copy of the UNet's encoder, joined to the locked UNet by zero convolutions (Zhang et al. 2023, section 3).

Shapes: B batch, h w the latent, H = 8h and W = 8w the hint, M tokens of the text, K number of control outputs (13 for four
levels of two residual blocks).
"""

import inspect
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from cldm.data.checking import check_batch
from cldm.guidance import (
    Control,
    ControlCall,
    ControlGuidance,
    PublishedControlGuidance,
    add_rows,
    joined,
    published_controls,
    repeats_latents,
    sum_of_outputs,
)
from ldm.models.diffusion.ddpm import LatentDiffusion, drawn_prompts, take_start
from ldm.models.diffusion.guidance import Guidance, Scale, make_guidance
from ldm.modules.diffusionmodules.openaimodel import TimestepEmbedSequential, UNetEncoder, UNetModel
from ldm.modules.diffusionmodules.util import conv_nd, in_own_precision, repeat_rows, weight_of, zero_module
from ldm.modules.distributions.distributions import DiagonalGaussianDistribution
from ldm.modules.ema import LitEma
from ldm.util import ConfigError, MissingEntryError, images_to_nchw, instantiate_from_config

# Output channels and strides of the hint encoder's convolutions before the last: 8 times smaller in all, as the latent is.
_HINT_ENCODER = ((16, 1), (16, 1), (32, 2), (32, 1), (96, 2), (96, 1), (256, 2))


class ControlNet(UNetEncoder):
    """The trainable copy: hint encoder, UNet encoder and middle block, and a zero convolution for each output.

    Takes UNetModel's arguments except `out_channels` and `num_classes` (`num_heads_upsample` and `n_embed` have no effect
    here; with them one YAML block serves both), and

    Args:
        hint_channels: of the hint picture; after `model_channels`, where given by position.
    """

    def __init__(
        self,
        image_size: int | None = None,
        in_channels: int = 4,
        model_channels: int = 320,
        hint_channels: int = 3,
        *args: Any,
        **kwargs: Any,
    ) -> None:
        super().__init__(image_size, in_channels, model_channels, *args, **kwargs)
        self.hint_channels = hint_channels
        self.zero_convs = nn.ModuleList(self.make_zero_conv(channels) for channels in self._block_channels)
        self.input_hint_block = self.make_hint_encoder()
        self.middle_block_out = self.make_zero_conv(self._block_channels[-1])
        if self.use_fp16:
            self.half()

    def make_zero_conv(self, channels: int) -> TimestepEmbedSequential:
        """A 1x1 convolution whose weights and biases start at zero (section 3.1)."""
        return TimestepEmbedSequential(zero_module(conv_nd(self.dims, channels, channels, 1)))

    def make_hint_encoder(self) -> TimestepEmbedSequential:
        """Eight 3x3 convolutions with SiLU between them, from the hint's size to the latent's; the last starts at zero."""
        layers: list[nn.Module] = []
        width = self.hint_channels
        for out, stride in _HINT_ENCODER:
            layers += [conv_nd(self.dims, width, out, 3, padding=1, stride=stride), nn.SiLU()]
            width = out
        layers.append(zero_module(conv_nd(self.dims, width, self.model_channels, 3, padding=1)))
        return TimestepEmbedSequential(*layers)

    @property
    def output_count(self) -> int:
        """Number K of control outputs."""
        return len(self.zero_convs) + 1

    def encode_hint(self, hint: Tensor) -> Tensor:
        """hint (B, hint_channels, H, W) -> (B, model_channels, h, w). Does not depend on the timestep."""
        if hint.shape[1] != self.hint_channels:
            raise ConfigError(f"this ControlNet takes hints of {self.hint_channels} channels, found {hint.shape[1]}")
        return self.input_hint_block(hint.to(weight_of(self.input_hint_block[0]).dtype), None, None)

    @repeats_latents
    def forward(
        self,
        x: Tensor,
        hint: Tensor | None,
        timesteps: Tensor,
        context: Tensor | None = None,
        *,
        guided_hint: Tensor | None = None,
        **kwargs: Any,
    ) -> list[Tensor]:
        """The K control outputs, each of the shape of the UNet activation that it is added to.

        Args:
            x: noisy latents (B, in_channels, h, w); or half of them, where both halves are equal.
            hint: (B, hint_channels, 8h, 8w) in [0, 1]; or None with
            guided_hint: what `encode_hint` made of it, so that sampling encodes a hint once.
            timesteps: (B,).
            context: (B, M, context_dim).
            **kwargs: accepted for compatibility.

        Raises:
            ValueError: the hint is missing, or of another size or number than the latents.
        """
        if hint is not None and guided_hint is None:
            guided_hint = self.encode_hint(hint)  # (B, model_channels, h, w)
        elif hint is not None or guided_hint is None:
            raise ValueError("give either hint or guided_hint")
        dtype = self.input_weight.dtype
        context = None if context is None else context.to(dtype)
        emb = self.embed_timesteps(timesteps)  # (B, E)
        if guided_hint.shape[2:] != x.shape[2:]:
            size = tuple(8 * s for s in x.shape[2:])
            raise ValueError(
                f"latents of {tuple(x.shape[2:])} need a hint of {size}, eight times their height and width; "
                f"this one gives features of {tuple(guided_hint.shape[2:])}"
            )
        if guided_hint.shape[0] not in (1, x.shape[0], timesteps.shape[0]):
            raise ValueError(
                f"{guided_hint.shape[0]} hints for {x.shape[0]} latents; give one for all, or one for each"
            )
        hidden = self.input_blocks[0](x.to(dtype), emb, context)  # (B, model_channels, h, w)
        hidden = add_rows(hidden, guided_hint)
        outputs = [self.zero_convs[0](hidden, emb, context)]
        for block, zero_conv in zip(self.input_blocks[1:], self.zero_convs[1:], strict=True):
            hidden = block(hidden, emb, context)  # (B, C_i, h_i, w_i)
            outputs.append(zero_conv(hidden, emb, context))  # of the same shape
        hidden = self.middle_block(hidden, emb, context)  # (B, C_mid, h_mid, w_mid)
        return [*outputs, self.middle_block_out(hidden, emb, context)]


class ControlledUnetModel(UNetModel):
    """The locked UNet: encoder and middle block without gradient, control added to the middle and to each skip connection."""

    @in_own_precision
    @repeats_latents
    def forward(
        self,
        x: Tensor,
        timesteps: Tensor | None = None,
        context: Tensor | None = None,
        control: Sequence[Tensor] | None = None,
        only_mid_control: bool = False,
        **kwargs: Any,
    ) -> Tensor:
        """x (B, in_channels, h, w), timesteps (B,), context (B, M, context_dim) -> (B, out_channels, h, w).

        Args:
            x: noisy latents; or half of them, where both halves are equal.
            control: the ControlNet's K outputs, or None. (The list is left as it is; the reference empties it.)
            only_mid_control: add only the last of them, which may then be the only one.
            **kwargs: `y`, class labels; others are accepted for compatibility.
        """
        # Without gradient unless the encoder itself is trained (the paper's last stage, section 3.5).
        trained = self.input_weight.requires_grad
        with torch.set_grad_enabled(torch.is_grad_enabled() and trained):
            emb = self.embed_timesteps(timesteps, kwargs.get("y"))
            hidden, skips = self.encode(x, emb, context)
        if control is not None:
            control = [c.to(hidden.dtype) for c in control]
            if len(control) != len(skips) + 1 and not (only_mid_control and control):
                raise ValueError(f"this UNet takes {len(skips) + 1} control outputs, found {len(control)}")
            hidden = add_rows(hidden, control[-1])
            if not only_mid_control:
                skips = [add_rows(skip, c) for skip, c in zip(skips, control[:-1], strict=True)]
        dtype = weight_of(self.out[-1]).dtype
        # A decoder in training stays float32 beside an encoder in half precision.
        if dtype != emb.dtype and not torch.is_autocast_enabled(x.device.type):
            hidden, skips, emb = hidden.to(dtype), [skip.to(dtype) for skip in skips], emb.to(dtype)
        output = self.decode(hidden, skips, emb, context).to(x.dtype)
        return repeat_rows(output, len(emb))  # where nothing looks at a context


def _check_alike(control_model: ControlNet, unet: ControlledUnetModel) -> None:
    """Raise ConfigError if the ControlNet is no copy of this UNet's encoder, whose outputs it would not fit."""
    sizes = {key: tuple(entry.shape) for key, entry in unet.state_dict(keep_vars=True).items()}
    for key, entry in control_model.state_dict(keep_vars=True).items():
        own = key.startswith(("zero_convs", "input_hint_block", "middle_block_out"))
        if not own and sizes.get(key) != tuple(entry.shape):
            there = f"{list(sizes[key])} in the UNet" if key in sizes else "nothing in the UNet"
            raise ConfigError(
                f"control_stage_config and unet_config describe different networks: {key} has shape "
                f"{list(entry.shape)} in the ControlNet and {there}"
            )


def check_conditioning(cond: Any) -> None:
    """Raise ValueError if this is not a conditioning of a ControlLDM."""
    if not isinstance(cond, Mapping) or "c_crossattn" not in cond:
        raise ValueError('the conditioning must be a dict with "c_crossattn" (text) and "c_concat" (hint or None)')


class ControlLDM(LatentDiffusion):
    """Stable Diffusion with a ControlNet. Batches hold the target picture, the prompt and the hint.

    Set `sd_locked`, `only_mid_control`, `control_scales` and `learning_rate` as attributes. What is not trained has
    `requires_grad=False`, always: by default everything but the ControlNet; with `sd_locked = False` the UNet's decoder
    (`output_blocks` and `out`) is trained too, or with `unlock = "all"` the whole UNet, as the paper says. (The reference never
    locks the UNet's weights, so gradients for them are computed and thrown away.)

    With `use_ema` the average is that of what is trained; `average_weights` begins it.

    Args:
        control_stage_config: the ControlNet.
        control_key: name of the hint in a batch, (B, H, W, 3) in [0, 1].
        only_mid_control: use the middle output alone.
        global_average_pooling: average each output over height and width (ControlNet 1.1, shuffle).
        *args, **kwargs: see LatentDiffusion.
    """

    def __init__(
        self,
        control_stage_config: Mapping[str, Any],
        control_key: str,
        only_mid_control: bool,
        global_average_pooling: bool = False,
        *args: Any,
        **kwargs: Any,
    ) -> None:
        start = take_start(kwargs)
        super().__init__(*args, **kwargs)
        unet = self.model.diffusion_model
        if "control" not in inspect.signature(unet.forward).parameters:
            raise ConfigError(
                "unet_config of a ControlLDM must name a UNet that takes `control`, such as "
                f"cldm.cldm.ControlledUnetModel; {type(unet).__name__} does not"
            )
        self.control_model = instantiate_from_config(control_stage_config)
        if isinstance(unet, ControlledUnetModel) and isinstance(self.control_model, ControlNet):
            _check_alike(self.control_model, unet)
        self.more_control_models = nn.ModuleList()  # see add_control; without any, the state dict is as published
        self._control_stage_config = control_stage_config
        self.control_key = control_key
        self.control_scales = [1.0] * getattr(self.control_model, "output_count", 13)
        self.global_average_pooling = global_average_pooling
        self.learning_rate = 1e-5
        self.unlock_learning_rate: float | None = (
            None  # of the UNet's weights, where it is another than the ControlNet's
        )
        self._saw_a_batch = False
        self._sd_locked = True
        self._unlock = "decoder"
        self.only_mid_control = only_mid_control
        if self.use_ema:
            self.model_ema = LitEma(self)
        self._start_from(**start)

    # -- what is trained ------------------------------------------------------------------------------

    @property
    def sd_locked(self) -> bool:
        """Whether the whole UNet keeps its weights; otherwise its decoder is trained too."""
        return self._sd_locked

    @sd_locked.setter
    def sd_locked(self, locked: bool) -> None:
        self._sd_locked = bool(locked)
        self._lock()

    @property
    def unlock(self) -> str:
        """What of the UNet `sd_locked = False` trains: "decoder", as the published code, or "all", as the paper."""
        return self._unlock

    @unlock.setter
    def unlock(self, part: str) -> None:
        if part not in ("decoder", "all"):
            raise ValueError(f'unlock must be "decoder" or "all", found {part!r}')
        self._unlock = part
        self._lock()

    @property
    def only_mid_control(self) -> bool:
        """Whether only the middle output is added; the zero convolutions of the others are then not trained."""
        return self._only_mid_control

    @only_mid_control.setter
    def only_mid_control(self, only_mid: bool) -> None:
        self._only_mid_control = bool(only_mid)
        self._lock()

    def _lock(self) -> None:
        """Set `requires_grad` on everything by what the two switches say."""
        self.control_model.requires_grad_(True)
        self.control_model.zero_convs.requires_grad_(not self._only_mid_control)
        unet = self.model.diffusion_model
        unet.requires_grad_(not self._sd_locked and self._unlock == "all")
        for part in (unet.output_blocks, unet.out):
            part.requires_grad_(not self._sd_locked)

    def trained_parameters(self) -> list[nn.Parameter]:
        """The ControlNet's parameters and, if unlocked, those of the UNet or of its decoder."""
        return [p for group in self.parameter_groups() for p in group["params"]]

    def parameter_groups(self) -> list[dict[str, Any]]:
        """One group for the ControlNet and, if unlocked, one for what is trained of the UNet."""
        parameters = list(self.control_model.parameters())
        if self.cond_stage_trainable:
            parameters += list(self.cond_stage_model.parameters())
        groups: list[dict[str, Any]] = [{"params": parameters + ([self.logvar] if self.learn_logvar else [])}]
        if not self.sd_locked:
            unlocked = [p for p in self.model.diffusion_model.parameters() if p.requires_grad]
            rate = self.unlock_learning_rate
            groups.append({"params": unlocked} | ({} if rate is None else {"lr": rate}))
        return groups

    def average_weights(self, decay: float = 0.9999) -> None:
        """Keep a moving average of what is trained now, updated at each optimizer step.

        It begins at the present values; what has been averaged before goes on.
        """
        average = LitEma(self, decay)
        if self.use_ema:
            buffers = dict(average.named_buffers())
            for name, value in self.model_ema.named_buffers():
                if name in buffers and name != "decay":
                    buffers[name].copy_(value)
        self.use_ema, self.model_ema = True, average

    def averaged_module(self) -> nn.Module:
        return self

    # -- inputs -----------------------------------------------------------------------------------------

    @torch.no_grad()
    def get_input(
        self, batch: Mapping[str, Any], k: str, bs: int | None = None, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, dict[str, list[Any]]]:
        """A batch -> latents (B, 4, h, w) and `{"c_crossattn": [text], "c_concat": [hint (B, 3, H, W)]}`.

        `bs` takes only the first few; `k` and other arguments are accepted for compatibility: the target is under
        `first_stage_key`. Instead of picture and prompt a batch may hold what the encoders made of them: `moments` (B, 8, h, w),
        mean and log-variance of the latents' posterior, and `context` (B, M, D).

        Raises:
            MissingEntryError: the batch lacks an entry; it is a KeyError too.
            DataError: pictures of another type, layout or range than training needs.
        """
        if self.control_key not in batch:
            raise MissingEntryError(f"the batch has no {self.control_key!r}; it has {', '.join(map(repr, batch))}")
        # On an accelerator, looking at values would wait for it in each step: the first batch must do.
        check_batch(batch, self.first_stage_key, self.control_key, values=None if self._saw_a_batch else True)
        self._saw_a_batch = True
        if "moments" in batch:
            posterior = DiagonalGaussianDistribution(batch["moments"][:bs].to(self.device))
            z, c = self.get_first_stage_encoding(posterior).detach(), batch["context"][:bs].to(self.device)
        else:
            z, c = super().get_input(batch, self.first_stage_key, bs=bs)[:2]
        hint = images_to_nchw(batch[self.control_key][:bs].to(self.device))
        if hint.shape[1] == 1:  # grey
            hint = hint.repeat(1, getattr(self.control_model, "hint_channels", 1), 1, 1)
        return z, {"c_crossattn": [c], "c_concat": [hint]}

    def get_learned_conditioning(self, c: Any) -> Any:
        """Text conditioning; what is already encoded stays as it is, in a dict too."""
        if torch.is_tensor(c) and c.is_floating_point():
            return c
        if isinstance(c, Mapping):
            texts = [
                entry if torch.is_tensor(entry) else super(ControlLDM, self).get_learned_conditioning(entry)
                for entry in c["c_crossattn"]
            ]
            return {**c, "c_crossattn": texts}
        return super().get_learned_conditioning(c)

    @torch.no_grad()
    def get_unconditional_conditioning(self, N: int, null_label: Any = None) -> Tensor:
        """The empty prompt, N times: (N, M, D)."""
        return super().get_unconditional_conditioning(N, null_label)

    # -- the model --------------------------------------------------------------------------------------

    def apply_model(self, x_noisy: Tensor, t: Tensor, cond: Mapping[str, Any]) -> Tensor:
        """The UNet's output (B, 4, h, w), with control where `cond` holds any.

        Args:
            x_noisy: (B, 4, h, w).
            t: (B,).
            cond: `c_crossattn`, a list of (B, M, D), and `c_concat`, a list of hints (B, C, H, W), or None for no control.
                `c_control`, a list of `ControlCall`, may stand in for `c_concat`. `equal_halves` says that the second half of
                the latents and timesteps repeats the first; the UNet must then be one that `repeats_latents`.
        """
        check_conditioning(cond)
        context = joined(cond["c_crossattn"])
        return self.model.diffusion_model(
            x=x_noisy.chunk(2)[0] if cond.get("equal_halves") else x_noisy,
            timesteps=t,
            context=context,
            control=self.control(x_noisy, t, cond, context),
            only_mid_control=self.only_mid_control,
        )

    def control(self, x_noisy: Tensor, t: Tensor, cond: Mapping[str, Any], context: Tensor) -> list[Tensor] | None:
        """The sum of the ControlNets' outputs, scaled and, where configured, averaged; None without a hint."""
        calls = cond.get("c_control")
        if calls is None and cond.get("c_concat") is not None:
            # Nothing more than published, so that another class can be the ControlNet.
            hint = {"hint": joined(cond["c_concat"])}
            calls = [ControlCall(self.control_model, hint, self.control_scales, self.global_average_pooling)]
        return sum_of_outputs(calls, x_noisy, t, context, bool(cond.get("equal_halves"))) if calls else None

    def make_guidance(
        self,
        cond: Mapping[str, Any],
        uncond: Mapping[str, Any] | None = None,
        scale: Scale = 1.0,
        controls: Sequence[Control] | None = None,
    ) -> Guidance:
        """How samplers evaluate this model in a run: hints are encoded once, both halves go in one batch.

        Args:
            cond, uncond: conditionings as `apply_model` takes them; without `uncond` there is no guidance.
            scale: of the guidance, or one for each step.
            controls: what steers, instead of the hints in the conditionings.

        Raises:
            ValueError: conditionings, hints or ControlNets that do not fit together.
        """
        for conditioning in (cond,) if uncond is None else (cond, uncond):
            check_conditioning(conditioning)
        own_apply_model = type(self).apply_model is not ControlLDM.apply_model
        only_uncond_has_hint = (
            uncond is not None and cond.get("c_concat") is None and uncond.get("c_concat") is not None
        )
        if controls is None and (own_apply_model or only_uncond_has_hint):
            return make_guidance(self, cond, uncond, scale)
        if controls is None:
            controls = published_controls(cond, uncond)
        return (PublishedControlGuidance if own_apply_model else ControlGuidance)(self, cond, uncond, scale, controls)

    # -- several ControlNets ------------------------------------------------------------------------------

    def control_networks(self) -> list[nn.Module]:
        """The ControlNets: `control_model`, which is the one that is trained, and those that were added."""
        return [self.control_model, *self.more_control_models]

    def add_control(
        self,
        control: nn.Module | Mapping[str, Any] | None = None,
        global_average_pooling: bool = False,
        **changes: Any,
    ) -> int:
        """Add a ControlNet beside `control_model`, for sampling; its weights are locked. The base is shared.

        Args:
            control: the network, its configuration, or None for the configuration of `control_model`.
            global_average_pooling: see the class.
            **changes: parameters that replace those of the configuration, such as `hint_channels`.

        Returns:
            its number, `network` of a `Control`; `control_networks()[number]` is the network, to load weights into.

        Raises:
            ConfigError: the configuration cannot be built, or the network does not fit this UNet.
        """
        network: Any = control  # a ControlNet, or whatever class takes its place
        if not isinstance(control, nn.Module):
            config = self._control_stage_config if control is None else control
            network = instantiate_from_config({**config, "params": {**config["params"], **changes}})
        elif changes:
            raise ConfigError(f"{', '.join(changes)} cannot be changed in a network that is already built")
        unet, like = self.model.diffusion_model, next(self.control_model.parameters())
        if isinstance(unet, ControlledUnetModel) and isinstance(network, ControlNet):
            _check_alike(network, unet)
        network.global_average_pooling = global_average_pooling
        self.more_control_models.append(network.to(like).eval().requires_grad_(False))
        return len(self.more_control_models)

    def pools_control(self, number: int) -> bool:
        """Whether a ControlNet's outputs are averaged over height and width."""
        if number == 0:
            return self.global_average_pooling
        return bool(self.more_control_models[number - 1].global_average_pooling)

    def compile_networks(self, **options: Any) -> None:
        """Compile UNet and ControlNets in place with `torch.compile`; the state dict keeps its keys."""
        for network in (self.model.diffusion_model, *self.control_networks()):
            network.compile(**options)

    # -- logging ----------------------------------------------------------------------------------------

    def log_images(
        self, batch: Mapping[str, Any], N: int = 4, n_row: int = 2, sample: bool = False, **options: Any
    ) -> dict[str, Tensor]:
        """Pictures for a logger, (B, 3, H, W) in [-1, 1]: target's reconstruction, hint, prompt, and samples with guidance.

        As LatentDiffusion's, with other defaults: guidance scale 9, in both halves the hint, and no `diffusion_row`.
        """
        defaults = {"plot_diffusion_rows": False, "unconditional_guidance_scale": 9.0, "use_ema_scope": False}
        return super().log_images(batch, N, n_row, sample, **defaults | options)

    def logged_inputs(self, batch: Mapping[str, Any], count: int) -> tuple[Tensor, Any, dict[str, Tensor]]:
        z, c = self.get_input(batch, self.first_stage_key, bs=count)
        c = self.get_learned_conditioning(c)  # not yet encoded where the text encoder is trained
        hint = c["c_concat"][0]
        prompts = drawn_prompts(list(batch[self.cond_stage_key])[:count], hint)
        log = {"reconstruction": self.decode_first_stage(z), "control": hint * 2.0 - 1.0, "conditioning": prompts}
        return z, c, log

    def unconditional_like(self, cond: Any, count: int, null_label: Any = None) -> Any:
        nothing = self.get_unconditional_conditioning(count, null_label)
        return {**cond, "c_crossattn": [nothing.to(cond["c_crossattn"][0])]}

    def sample_log(
        self,
        cond: Any,
        batch_size: int,
        ddim: bool,
        ddim_steps: int | None,
        shape: Sequence[int] | None = None,
        **options: Any,
    ) -> tuple[Tensor, Any]:
        """As LatentDiffusion's; the latent's size follows from the hint where `shape` is not given."""
        if shape is None and cond.get("c_concat") is not None:
            height, width = cond["c_concat"][0].shape[2:]
            shape = (self.channels, height // 8, width // 8)
        return super().sample_log(cond, batch_size, ddim, ddim_steps, shape, **options)

    def low_vram_shift(self, is_diffusing: bool, device: torch.device | str | None = None) -> None:
        """Keep on the accelerator only what is needed next: UNet and ControlNet while diffusing, else VAE and text encoder.

        Args:
            is_diffusing: which of the two.
            device: the accelerator; by default the device on which one of the parts is now, if that is not the CPU.
        """
        parts = {True: (self.model, *self.control_networks()), False: (self.first_stage_model, self.cond_stage_model)}
        if device is None:
            found = [p.device for part in (*parts[True], *parts[False]) for p in part.parameters()]
            device = next((d for d in found if d.type != "cpu"), torch.device("cpu"))
        for part in parts[not is_diffusing]:
            part.cpu()
        for part in parts[is_diffusing]:
            part.to(device)
