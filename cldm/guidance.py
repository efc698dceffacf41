"""What steers a run of sampling: hints, their strength and when they act, for one ControlNet or several; and guidance with them.

    controls = [Control(edges), Control(depth, network=1, scales=0.6, end=0.8)]
    guidance = model.make_guidance(cond, uncond, scale=9.0, controls=controls)
    latents, _ = DDIMSampler(model).sample(20, batch_size, shape, guidance=guidance)

Shapes: B batch, C h w the latent, H W pixels, M tokens of the text, K control outputs.
"""

import inspect
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ldm.models.diffusion.guidance import Conditioning, Scale, combine, make_guidance, scale_at
from ldm.modules.diffusionmodules.util import repeat_rows

if TYPE_CHECKING:
    from cldm.cldm import ControlLDM

GUESS_MODE_DECAY = 0.825


def strength_scales(strength: float = 1.0, guess_mode: bool = False, count: int = 13) -> list[float]:
    """One factor for each control output: all `strength`, or in guess mode weaker towards the first, strength * 0.825^(12 - i)."""
    return [strength * (GUESS_MODE_DECAY ** float(count - 1 - i) if guess_mode else 1.0) for i in range(count)]


@dataclass(frozen=True)
class Control:
    """One hint and what it does in a run.

    Args:
        hint: (B or 1, hint_channels, H, W), in [0, 1] but for conditions with other values (inpainting has -1 in the hole).
        network: which of the model's ControlNets; 0 is `control_model`, others were added by `add_control`.
        scales: a factor for all outputs, or one for each; None takes the model's `control_scales`.
        start, end: the part of the run in which the hint acts, as fractions of its steps.
        conditional_only: the unconditional half of the guidance is without control, as in guess mode.
        resolution_weights: weigh output i with 64 / h_i, its height for a latent of 64, from 1 to 8 (ControlNet, section 3.3,
            "CFG resolution weighting"; the paper gives the hint to the conditional half only with it).
        uncond_hint: another hint for the unconditional half.
    """

    hint: Tensor
    network: int = 0
    scales: float | Sequence[float] | None = None
    start: float = 0.0
    end: float = 1.0
    conditional_only: bool = False
    resolution_weights: bool = False
    uncond_hint: Tensor | None = None

    def __post_init__(self) -> None:
        if self.hint.dim() != 4:
            raise ValueError(f"a hint must have shape (B, C, H, W), found {tuple(self.hint.shape)}")
        if not 0 <= self.start < self.end <= 1:
            raise ValueError(f"start and end must satisfy 0 <= start < end <= 1, found {self.start} and {self.end}")
        scales = 1.0 if self.scales is None else self.scales
        for factor in [scales] if isinstance(scales, (int, float)) else scales:
            if not math.isfinite(factor):
                raise ValueError(f"the scales of a control must be finite numbers, found {factor}")

    def acts(self, step: int, steps: int) -> bool:
        """Whether the hint acts in number `step` of a run's `steps`."""
        return self.start <= step / steps and (step + 1) / steps <= self.end


def repeats_latents(forward: Callable[..., Any]) -> Callable[..., Any]:
    """Marks the `forward` of a network that takes latents for a fraction of its timesteps and texts.

    The halves of the guidance have the same latents, so what comes before the first look at the text is computed once for both.
    """
    marked: Any = forward
    marked.repeats_latents = True
    return forward


def can_repeat_latents(network: nn.Module) -> bool:
    """Whether a network's own `forward`, which a subclass may replace, is marked with `repeats_latents`."""
    return getattr(getattr(network, "_orig_mod", network).forward, "repeats_latents", False)


def takes_guided_hint(network: nn.Module) -> bool:
    """Whether a ControlNet can be called with an encoded hint, so that it is encoded once a run. Published ones cannot."""
    network = getattr(network, "_orig_mod", network)  # what torch.compile wraps
    return hasattr(network, "encode_hint") and "guided_hint" in inspect.signature(network.forward).parameters


@dataclass(frozen=True)
class ControlCall:
    """A ControlNet's part in one call of `apply_model`.

    Args:
        network: the ControlNet.
        hint: its arguments `hint`, and `guided_hint` where that stands in for it.
        scales: a factor for all outputs, or one for each.
        pooled: average the outputs over height and width.
        resolution_weights: see Control.
        second_half: control the second half of the batch alone.
    """

    network: nn.Module
    hint: Mapping[str, Tensor | None]
    scales: float | Sequence[float] = 1.0
    pooled: bool = False
    resolution_weights: bool = False
    second_half: bool = False

    def outputs(self, x: Tensor, t: Tensor, context: Tensor, equal_halves: bool = False) -> list[Tensor]:
        """x (B, C, h, w), t (B,), context (B, M, D) -> the K outputs, scaled and pooled.

        They have half as many rows with `second_half`; with `equal_halves` of x, those may have too that are equal for both.
        """
        if self.second_half:
            x, t, context = (a.chunk(2)[1] for a in (x, t, context))
        elif equal_halves and can_repeat_latents(self.network):
            x = x.chunk(2)[0]
        outputs = self.network(x=x, timesteps=t, context=context, **self.hint)
        scales = [self.scales] * len(outputs) if isinstance(self.scales, (int, float)) else list(self.scales)
        # More scales than outputs are usual: everyone writes 13, and smaller networks have fewer.
        if len(scales) < len(outputs):
            raise ValueError(f"control_scales has {len(scales)} entries for {len(outputs)} outputs")
        scaled = []
        for output, scale in zip(outputs, scales, strict=False):
            factor = scale * (x.shape[2] / output.shape[2]) if self.resolution_weights else scale
            output = output if factor == 1.0 else output * factor
            scaled.append(output.mean(dim=(2, 3), keepdim=True) if self.pooled else output)
        return scaled


def add_rows(a: Tensor, b: Tensor) -> Tensor:
    """a + b, where one of them may be given once for all halves of the batch."""
    return repeat_rows(a, len(b)) + repeat_rows(b, len(a))


def sum_of_outputs(
    calls: Sequence[ControlCall], x: Tensor, t: Tensor, context: Tensor, equal_halves: bool = False
) -> list[Tensor] | None:
    """The sum of all outputs, for x (B, C, h, w); None without calls. See `ControlCall.outputs`."""
    totals: dict[bool, list[Tensor]] = {}
    for call in calls:
        outputs, total = call.outputs(x, t, context, equal_halves), totals.get(call.second_half)
        totals[call.second_half] = outputs if total is None else list(map(add_rows, total, outputs))
    if True in totals:
        missing = len(x) // 2  # rows of the first half, which stay without control
        padded = [F.pad(output, (0, 0) * (output.dim() - 1) + (missing, 0)) for output in totals[True]]
        return list(map(add_rows, totals[False], padded)) if False in totals else padded
    return totals.get(False)


class _EncodedControl:
    """A Control during a run of `batch` pictures: its hint is encoded once, at the first step that needs it."""

    def __init__(self, control: Control, model: "ControlLDM", batch: int, equal_halves: bool) -> None:
        networks = model.control_networks()
        if not 0 <= control.network < len(networks):
            raise ValueError(f"there is no ControlNet {control.network}: this model has {len(networks)}")
        for hint in (control.hint, control.uncond_hint):
            if hint is not None and len(hint) not in (1, batch):
                raise ValueError(f"{len(hint)} hints for {batch} pictures; give one for all, or one for each")
        self.control = control
        self.model = model
        self.network: Any = networks[control.network]  # a ControlNet, or whatever class takes its place
        self.batch = batch
        self.takes_guided = takes_guided_hint(self.network)
        self.equal_halves = equal_halves and can_repeat_latents(self.network)
        self._hints: dict[str, Tensor] = {}

    def call(self, rows: str, device: torch.device) -> ControlCall:
        """What to call for the conditional half (`cond`), for the other (`uncond`), or for both in one batch (`both`)."""
        second_half = rows == "both" and self.control.conditional_only
        hint = self._hint("cond" if second_half else rows, device)
        scales = self.model.control_scales if self.control.scales is None else self.control.scales
        return ControlCall(
            self.network,
            {"hint": None, "guided_hint": hint} if self.takes_guided else {"hint": hint},
            scales,
            self.model.pools_control(self.control.network),
            self.control.resolution_weights,
            second_half,
        )

    def forget(self) -> None:
        """Encode the hints again at the next step that needs them."""
        self._hints.clear()

    def _hint(self, rows: str, device: torch.device) -> Tensor:
        """The hint for these rows, encoded if the network takes it so."""
        uncond_hint = self.control.uncond_hint
        if rows == "uncond" and uncond_hint is None:
            rows = "cond"
        if rows not in self._hints:
            if rows == "both":
                uncond, cond = self._hint("uncond", device), self._hint("cond", device)
                hint = cond if uncond is cond and self.equal_halves else torch.cat([uncond, cond])
            else:
                hint = (self.control.hint if rows == "cond" or uncond_hint is None else uncond_hint).to(device)
                hint = self.network.encode_hint(hint) if self.takes_guided else hint
                hint = hint.expand(self.batch, -1, -1, -1)
            self._hints[rows] = hint
        return self._hints[rows]


class ControlGuidance:
    """Guidance of a ControlLDM: both halves in one batch, each hint for the half or halves, and in the steps, where it acts.

    Args:
        model: the ControlLDM.
        cond, uncond: dicts with `c_crossattn`, a list of texts (B, M, D); without `uncond` there is no guidance.
        scale: of the guidance, or one for each step.
        controls: what steers; hints in `cond` and `uncond` are not looked at.
    """

    def __init__(
        self,
        model: "ControlLDM",
        cond: Mapping[str, Any],
        uncond: Mapping[str, Any] | None,
        scale: Scale,
        controls: Sequence[Control],
    ) -> None:
        self.model = model
        self.scale = scale
        self.contexts = {"cond": joined(cond["c_crossattn"])}
        if uncond is not None:
            self.contexts["uncond"] = joined(uncond["c_crossattn"])
            if self.contexts["uncond"].shape == self.contexts["cond"].shape:
                self.contexts["both"] = torch.cat([self.contexts["uncond"], self.contexts["cond"]])
            elif len(self.contexts["uncond"]) != len(self.contexts["cond"]):
                raise ValueError(
                    f"the unconditional half has {len(self.contexts['uncond'])} texts, the conditional one {len(self.contexts['cond'])}"
                )
        batch = len(self.contexts["cond"])
        self.equal_halves = can_repeat_latents(model.model.diffusion_model)
        self.controls = [_EncodedControl(control, model, batch, self.equal_halves) for control in controls]

    def start(self) -> None:
        for control in self.controls:
            control.forget()

    def __call__(self, x: Tensor, t: Tensor, step: int = 0, steps: int = 1) -> Tensor:
        acting = [c for c in self.controls if c.control.acts(step, steps)]
        scale = scale_at(self.scale, step)
        if "uncond" not in self.contexts or scale == 1.0:
            return self._output("cond", x, t, acting)
        if "both" in self.contexts:
            uncond, cond = self._output("both", torch.cat([x, x]), torch.cat([t, t]), acting).chunk(2)
            return combine(uncond, cond, scale)
        # Texts of different lengths do not fit into one batch.
        of_uncond = [c for c in acting if not c.control.conditional_only]
        return combine(self._output("uncond", x, t, of_uncond), self._output("cond", x, t, acting), scale)

    def _output(self, rows: str, x: Tensor, t: Tensor, acting: Sequence[_EncodedControl]) -> Tensor:
        calls = [control.call(rows, x.device) for control in acting]
        cond = {
            "c_crossattn": [self.contexts[rows]],
            "c_control": calls,
            "equal_halves": rows == "both" and self.equal_halves,
        }
        return self.model.apply_model(x, t, cond)


class PublishedControlGuidance:
    """The same for a model with an `apply_model` of its own, written as published: one hint, which it gets under `c_concat`."""

    def __init__(
        self,
        model: "ControlLDM",
        cond: Mapping[str, Any],
        uncond: Mapping[str, Any] | None,
        scale: Scale,
        controls: Sequence[Control],
    ) -> None:
        if len(controls) > 1 or any(c.network or c.resolution_weights for c in controls):
            raise ValueError(
                f"{type(model).__name__} has an apply_model of its own, which takes one hint, for its first ControlNet, unweighted"
            )
        self.model = model
        self.control = controls[0] if controls else None
        hint, uncond_hint = None, None
        if self.control is not None:
            batch = len(cond["c_crossattn"][0])
            hint = self.control.hint.expand(batch, -1, -1, -1)
            if not self.control.conditional_only:
                uncond_hint = hint if self.control.uncond_hint is None else self.control.uncond_hint
        self.guided, self.unsteered = (
            make_guidance(model, _with_hint(cond, hint), _with_hint(uncond, uncond_hint), scale)
            for hint, uncond_hint in ((hint, uncond_hint), (None, None))
        )

    def __call__(self, x: Tensor, t: Tensor, step: int = 0, steps: int = 1) -> Tensor:
        if self.control is None or not self.control.acts(step, steps):
            return self.unsteered(x, t, step, steps)
        with _scales(self.model, self.control.scales):
            return self.guided(x, t, step, steps)


def _with_hint(conditioning: Mapping[str, Any] | None, hint: Tensor | None) -> Conditioning:
    return None if conditioning is None else {**conditioning, "c_concat": None if hint is None else [hint]}


@contextmanager
def _scales(model: "ControlLDM", scales: float | Sequence[float] | None) -> Iterator[None]:
    """Inside it `control_scales` are these; None leaves them."""
    own = model.control_scales
    if scales is not None:
        model.control_scales = [scales] * len(own) if isinstance(scales, (int, float)) else list(scales)
    try:
        yield
    finally:
        model.control_scales = own


def joined(tensors: Sequence[Tensor]) -> Tensor:
    """A conditioning's list of tensors as one, along their second axis."""
    return tensors[0] if len(tensors) == 1 else torch.cat(list(tensors), dim=1)


def published_controls(cond: Mapping[str, Any], uncond: Mapping[str, Any] | None) -> list[Control]:
    """The hints of published conditionings, under `c_concat`, as controls with the model's own scales."""
    hints = None if cond.get("c_concat") is None else joined(cond["c_concat"])
    if hints is None:
        return []
    others = None if uncond is None or uncond.get("c_concat") is None else joined(uncond["c_concat"])
    return [
        Control(
            hints,
            conditional_only=uncond is not None and others is None,
            uncond_hint=None if others is hints else others,
        )
    ]
