"""From a hint and a prompt to pictures: what scripts, demos and notebooks call.

    from cldm.model import create_model
    from cldm.pipeline import ControlPipeline

    pipeline = ControlPipeline(create_model("cldm_v15", weights="control_sd15_canny.safetensors", device=device))
    pictures = pipeline(hint, "a bird", steps=20, seed=1)  # uint8 (N, H, W, 3)
    pictures.save("bird.png")

Hints and pictures come in through `cldm.inputs`, results go out as `cldm.results.Pictures`; sampling itself is ldm's and `cldm.guidance`'s.

Shapes: N pictures, C channels, H W pixels, h w the latent, K ControlNets.
"""

import logging
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Any
from weakref import WeakKeyDictionary

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from annotator.registry import Annotator, describe, load
from cldm import inputs
from cldm.arguments import (
    check_numbers,
    check_texts,
    check_yes_or_no,
    count_pictures,
    list_seeds,
    mask_for,
    one_for_each,
    read_seed,
)
from cldm.cldm import ControlLDM
from cldm.guidance import Control, strength_scales
from cldm.low_memory import LowMemory
from cldm.pictures import to_uint8
from cldm.preview import LatentPreview
from cldm.prompts import Captioner
from cldm.results import Pictures
from ldm.models.diffusion.guidance import Guidance
from ldm.models.diffusion.noise import picture_generators
from ldm.models.diffusion.sampler import Sampler
from ldm.models.diffusion.samplers import SAMPLER_NAMES, SAMPLERS, make_sampler
from ldm.modules.encoders.modules import FrozenTextEncoder

logger = logging.getLogger(__name__)

__all__ = ["SAMPLERS", "SAMPLER_NAMES", "ControlPipeline", "strength_scales"]

_LATENT_SCALE = 8  # pixels of a hint or picture for one position of the latent

Condition = str | Annotator | Callable[[np.ndarray], Any]  # what makes a hint of a picture
EachControl = Any  # one value for all ControlNets, or a list of one for each


@dataclass(frozen=True)
class _Canvas:
    """The size of the pictures that were asked for, and the one that the networks run on.

    A UNet halves the latent a few times and doubles it again, which needs sides that can be halved so often: 64 pixels for Stable
    Diffusion. Other sizes are padded at the bottom and on the right, and the result is cut.
    """

    height: int
    width: int
    padded: tuple[int, int]

    @classmethod
    def of(cls, size: tuple[int, int], multiple: int) -> "_Canvas":
        height, width = (-(-side // multiple) * multiple for side in size)
        return cls(*size, (height, width))

    @property
    def size(self) -> tuple[int, int]:
        return self.height, self.width

    @property
    def latent(self) -> tuple[int, int]:
        return self.padded[0] // _LATENT_SCALE, self.padded[1] // _LATENT_SCALE


@dataclass(frozen=True)
class _Start:
    """A picture to start from, and what of it is to be painted anew."""

    picture: Tensor  # (1 or N, 3, H, W) in [0, 1]
    paint: Tensor | None  # (1 or N, 1, H, W), 1 where to paint; None for everywhere
    latents: Tensor  # (1 or N, 4, h, w), scaled
    keep: Tensor | None  # (1 or N, 1, h, w), 1 where no pixel of the position is painted

    def merged(self, made: Tensor) -> Tensor:
        """Pictures made (N, 3, H, W) in [0, 1], with the start's own pixels where nothing was to be painted."""
        if self.paint is None:
            return made
        picture, paint = (t.to(made) for t in (self.picture, self.paint))
        return torch.where(paint == 0, picture, paint * made + (1 - paint) * picture)


_LOCKS: WeakKeyDictionary[nn.Module, Any] = WeakKeyDictionary()
_NEW_LOCK = threading.Lock()


@contextmanager
def _in_use(model: nn.Module) -> Iterator[None]:
    """Inside it the model is in eval mode and used by this thread alone; each of its modules gets its own mode back."""
    with _NEW_LOCK:
        lock = _LOCKS.setdefault(model, threading.RLock())
    with lock:
        modes = [(module, module.training) for module in model.modules()]
        model.eval()
        try:
            yield
        finally:
            for module, training in modes:
                module.training = training


class ControlPipeline:
    """Samples pictures from a ControlLDM. The model is left as it was found, and the global random generators too.

    Several threads may share a model: their calls wait for one another.

    Args:
        model: in any precision.
        sampler: see the call's argument of that name.
        device: where to compute; by default where the model is. Another one needs `offload`.
        sliced_attention, vae_tiles, vae_one_at_a_time, offload: for less memory, see `cldm.low_memory.LowMemory`.
        compile: compile UNet and ControlNets in place with `torch.compile`; the first run then takes a minute or more.
        warn_untrained: say it, once, where weights were never loaded or trained.

    Raises:
        ValueError: there is no sampler of that name, or the model is on another device and is not to be moved.
    """

    def __init__(
        self,
        model: ControlLDM,
        sampler: Any = "ddim",
        *,
        device: torch.device | str | None = None,
        sliced_attention: bool = False,
        vae_tiles: bool = False,
        vae_one_at_a_time: bool = False,
        offload: bool = False,
        compile: bool = False,
        warn_untrained: bool = True,
    ) -> None:
        self.model = model
        self.sampler = sampler
        home = next(model.model.parameters()).device
        self.device = torch.device(device) if device is not None else home
        self.low_memory = LowMemory(sliced_attention, vae_tiles, vae_one_at_a_time, offload)
        if self.device.type != home.type and not offload:
            raise ValueError(
                f"the model is on {home} and the pipeline on {self.device}: move the model there, or give offload=True"
            )
        make_sampler(
            sampler, model, self.device
        )  # an unknown name is an error now, not after the first text is encoded
        self._annotators: dict[tuple[str, str], Annotator] = {}
        self._preview: LatentPreview | None = None
        self._checked_weights = not warn_untrained
        if compile:
            model.compile_networks()

    @torch.no_grad()
    def __call__(
        self,
        hint: Any,
        prompt: str | Sequence[str] | Tensor | Captioner,
        *,
        negative_prompt: str | Sequence[str] | Tensor = "",
        num_samples: int = 1,
        sampler: Any = None,
        steps: int = 20,
        guidance_scale: float = 9.0,
        eta: float = 0.0,
        seed: int | Sequence[int] | None = None,
        size: tuple[int, int] | None = None,
        strength: EachControl = 1.0,
        scales: EachControl = None,
        guess_mode: EachControl = False,
        conditional_only: EachControl = None,
        resolution_weights: bool = False,
        start: EachControl = 0.0,
        end: EachControl = 1.0,
        annotator: EachControl = None,
        image: Any = None,
        denoise: float | None = None,
        mask: Any = None,
        clip_skip: int | None = None,
        long_prompts: bool | int | None = None,
        prompt_weights: bool = True,
        x_T: Tensor | None = None,
        callback: Callable[[int], None] | None = None,
        preview: Callable[[int, np.ndarray], None] | None = None,
        progress: bool = False,
    ) -> Pictures:
        """Pictures, uint8 (N, H, W, 3) RGB, with the settings that make them again.

        With several ControlNets, `hint` is a list of one for each (None for one that is off), and each argument marked * is one
        value for all of them or a list of one for each.

        Args:
            hint: what steers: any form of picture (see `cldm.inputs`), one for all pictures or N of them; None for no control.
            prompt: one for all pictures, or N of them, or texts already encoded (1 or N, M, D). "" and `cldm.prompts.DEFAULT_PROMPT`
                are two of the paper's settings; for its automatic prompts, a function that captions: it gets the picture that is made
                without a prompt, uint8 (H, W, 3), and the picture is made again with its text.
            negative_prompt: likewise, but for the function.
            num_samples: N, where nothing else says so.
            sampler: one of `SAMPLER_NAMES`, a class, or a scheduler of diffusers; by default the pipeline's.
            steps: of the sampler. DPM-Solver needs fewest; 20 of DDIM's are usual.
            guidance_scale: 1 for no guidance.
            eta: of DDIM, 0 deterministic to 1 as noisy as DDPM; the others take 0 alone.
            seed: of the first picture, the next one's is 1 more; or a list of N. Picture i depends on its own seed alone. None draws one.
            size: (H, W) in pixels, 8 to 8192. By default the hint's, else the image's, else the model's. Hints, image and mask of
                another size are scaled to cover it and cut evenly.
            strength: * factor of the control, 0 to 10; takes the place of `model.control_scales` for this call.
            scales: * a further factor for each of the control's outputs.
            guess_mode: * the hint steers the conditional half of the guidance only, more weakly in the early blocks; for sampling
                without a prompt.
            conditional_only: * the same without that decay. By default what a ControlNet with global average pooling needs.
            resolution_weights: weigh the outputs by their resolution, 64 / h, as in the paper (section 3.4), on the conditional half.
            start, end: * fractions of the run between which the control acts.
            annotator: * the hint is a picture, of which this makes the hint: a condition's name (`annotator.list_annotators()`), a loaded
                one, or a function from a uint8 picture to any form of hint. Without a hint it gets `image`, and `inpaint` the mask too.
            image: a picture to start from, of any form; one for all, or N.
            denoise: how much of the run `image` goes through, above 0 (nearly the same picture) to 1; 0.75 by default, 1 with a mask.
            mask: white where `image` is to be painted anew, of its size; grey blends. Pixels where it is black come back exactly.
            clip_skip: see `PromptOptions` of the text encoders.
            long_prompts: read prompts of more than 77 tokens, in as many windows as the longest one needs, or in this number of them
                (which the settings of the result tell).
            prompt_weights: `(word:1.2)` in prompts are weights rather than characters.
            x_T: noise to start from, (N, 4, h, w).
            callback: called with the number of each step, from 0; it may raise an exception to stop.
            preview: called with that and a small picture of each predicted result so far, uint8 (N, h, w, 3).
            progress: show a progress bar.

        Raises:
            ValueError: sizes, counts or ranges that do not fit, an unknown sampler or condition.
            FloatingPointError: the model gives NaN, in float32 too.
        """
        seed = read_seed(seed)
        captioner = None
        if callable(prompt):
            captioner, prompt = prompt, ""
        check_texts(prompt=prompt, negative_prompt=negative_prompt)
        check_yes_or_no(resolution_weights=resolution_weights, prompt_weights=prompt_weights)
        if x_T is not None and not isinstance(x_T, Tensor):
            raise ValueError(f"x_T must be a tensor (N, 4, h, w), found {type(x_T).__name__}")
        self._check_weights()
        check_numbers(steps=steps, guidance_scale=guidance_scale, eta=eta, denoise=denoise, num_samples=num_samples)
        new_sampler = partial(make_sampler, sampler or self.sampler, self.model, self.device)
        new_sampler()  # an unknown one is an error before any work
        networks = self._networks()
        hints, makers = one_for_each(hint, len(networks), "hint"), one_for_each(annotator, len(networks), "annotator")
        if mask is not None and image is None:
            raise ValueError("a mask needs image=, the picture in which it is to be painted")
        if denoise is not None and image is None:
            raise ValueError("denoise needs image=, the picture to start from")
        canvas = self._canvas(hints, image, size)
        paint = None if mask is None else mask_for(mask, image, canvas.size)
        picture = None if image is None else inputs.picture_tensor(image, canvas.size)
        sources = [
            self._source(one, maker, picture, canvas, getattr(network, "hint_channels", 3))
            for one, maker, network in zip(hints, makers, networks, strict=True)
        ]
        count = count_pictures(prompt, negative_prompt, sources, picture, paint, seed, x_T, num_samples)
        seeds = list_seeds(seed, count)
        hints = [
            None
            if source is None
            else self._hint(source, maker, paint, seeds, canvas, getattr(network, "hint_channels", 3))
            for source, maker, network in zip(sources, makers, networks, strict=True)
        ]
        controls = self._controls(
            hints, strength=strength, scales=scales, guess_mode=guess_mode, conditional_only=conditional_only,
            resolution_weights=resolution_weights, start=start, end=end,
        )  # fmt: skip
        text_options = {"clip_skip": clip_skip, "weights": prompt_weights}
        if long_prompts is not None:
            text_options["windows"] = (
                {True: None, False: 1}[long_prompts] if isinstance(long_prompts, bool) else long_prompts
            )

        as_many_as_needed = long_prompts is True
        with _in_use(self.model), self.low_memory.applied(self.model.first_stage_model):
            begin = None if picture is None else self._encode(picture, paint, canvas)

            def sample(texts: Any) -> np.ndarray:
                nonlocal long_prompts
                cond, uncond = self._encode_texts(texts, negative_prompt, count, guidance_scale != 1.0, text_options)
                if as_many_as_needed:  # one picture of them, made alone again, needs as many windows
                    long_prompts = cond.shape[1] // self.model.cond_stage_model.max_length
                latents = self._sample(
                    new_sampler(), cond, uncond, controls, guidance_scale, canvas, seeds, begin,
                    steps=steps, eta=eta, x_T=x_T, denoise=denoise, callback=callback, preview=preview, progress=progress,
                )  # fmt: skip
                return self._decode(latents, canvas, begin)

            made = sample(prompt)
            if captioner is not None:
                prompt = [_caption(captioner, one) for one in made]
                made = sample(prompt)
        settings = {
            "prompt": prompt, "negative_prompt": negative_prompt, "sampler": sampler or self.sampler, "steps": steps,
            "guidance_scale": guidance_scale, "eta": eta, "seed": seeds, "size": list(canvas.size), "strength": strength,
            "scales": scales, "guess_mode": guess_mode, "conditional_only": conditional_only,
            "resolution_weights": resolution_weights, "start": start, "end": end, "annotator": annotator, "denoise": denoise,
            "clip_skip": clip_skip, "long_prompts": long_prompts, "prompt_weights": prompt_weights,
        }  # fmt: skip
        given = {"hint": [inputs.fingerprint(one) for one in hints], "image": inputs.fingerprint(picture),
                 "mask": inputs.fingerprint(paint), "x_T": inputs.fingerprint(x_T)}  # fmt: skip
        return Pictures(made, *_noted(settings, given))

    # -- what is given -----------------------------------------------------------------------------------

    def _canvas(self, hints: Sequence[Any], image: Any, size: tuple[int, int] | None) -> _Canvas:
        """The size of the pictures: as asked, or that of the first hint or the image, or the model's own."""
        if size is None:
            first = next((one for one in (*hints, image) if one is not None), None)
            size = _default_size(self.model) if first is None else inputs.size_of(first)
        return _Canvas.of(inputs.check_size(size), _multiple(self.model))

    def _source(
        self, hint: Any, maker: Condition | None, picture: Tensor | None, canvas: _Canvas, channels: int
    ) -> Tensor | None:
        """One ControlNet's hints (1 or N, channels, H, W), or the pictures (1 or N, 3, H, W) of which an annotator makes them."""
        if maker is None:
            return None if hint is None else inputs.hint_tensor(hint, channels, canvas.size)
        source = picture if hint is None else inputs.picture_tensor(hint, canvas.size)
        if source is None:
            raise ValueError("annotator= needs a picture: give it as hint, or as image")
        return source

    def _hint(
        self, source: Tensor, maker: Condition | None, paint: Tensor | None, seeds: Sequence[int], canvas: _Canvas, channels: int
    ) -> Tensor:  # fmt: skip
        """One ControlNet's hints (1 or N, channels, H, W) at the padded size, made by an annotator if there is one."""
        if maker is not None:
            source = inputs.hint_tensor(self._annotate(maker, source, paint, seeds), channels, canvas.size)
        return inputs.pad(source, canvas.padded)

    def _annotate(self, maker: Condition, source: Tensor, paint: Tensor | None, seeds: Sequence[int]) -> list[Any]:
        """The hint of each picture (1 or N, 3, H, W); with its own seed and mask, where these matter."""
        if isinstance(maker, str):
            version = describe(maker).version  # which `use_version` may have changed since the last call
            if (maker, version) not in self._annotators:
                self._annotators[maker, version] = load(maker, self.device, version=version)
            maker = self._annotators[maker, version]
        pictures = inputs.to_array(source)
        if not isinstance(maker, Annotator):
            if not callable(maker):
                raise ValueError(
                    f"annotator must be a condition's name, an Annotator or a function, found {type(maker).__name__}"
                )
            return [maker(picture) for picture in pictures]
        each: dict[str, Any] = {"picture": pictures}
        options: dict[str, Any] = {"resolution": None}
        if maker.info.name == "inpaint" and paint is not None:
            each["mask"] = inputs.to_array(paint)
            options["blur"] = 0.0
        if "seed" in maker.info.offers:
            each["seed"] = [seed % 2**32 for seed in seeds]
        hints = []
        for i in range(max(map(len, each.values()))):
            own = {name: values[i % len(values)] for name, values in each.items()}  # one serves all
            hints.append(maker.make_hint(own.pop("picture"), **own, **options))
        return hints

    def _encode_texts(
        self, prompts: Any, negatives: Any, count: int, guided: bool, options: dict[str, Any]
    ) -> tuple[Tensor, Tensor | None]:
        """Both halves' texts, (count, M, D) each; None for a half that is not needed."""
        encoder = self.model.cond_stage_model
        reading: AbstractContextManager[None] = nullcontext()
        if isinstance(encoder, FrozenTextEncoder):
            # What is not given stays as the encoder's own options say.
            reading = encoder.using(
                **{key: value for key, value in options.items() if key == "windows" or value is not None}
            )
        elif options["clip_skip"] is not None or options.get("windows", 1) != 1:
            raise ValueError(
                f"clip_skip and long_prompts are options of CLIP's encoders; this model has a {type(encoder).__name__}"
            )
        halves = [prompts, negatives] if guided else [prompts]
        texts = [half for half in halves if not isinstance(half, Tensor)]
        texts = [[half] * count if isinstance(half, str) else list(half) * (count // len(half)) for half in texts]
        with self.low_memory.resident([encoder], self.device), reading:
            encoded = self.model.get_learned_conditioning([text for half in texts for text in half]) if texts else None
        of_texts = iter(encoded.split(count) if encoded is not None else ())
        found = [half.expand(count, -1, -1) if isinstance(half, Tensor) else next(of_texts) for half in halves]
        found = [half.to(self.device) for half in found]
        if guided and found[0].shape != found[1].shape:
            raise ValueError(
                f"encoded prompts {tuple(found[0].shape)} and negative prompts {tuple(found[1].shape)} must be of one shape"
            )
        return found[0], found[1] if guided else None

    # -- the three stages of the work ----------------------------------------------------------------------

    def _encode(self, picture: Tensor, paint: Tensor | None, canvas: _Canvas) -> _Start:
        """A picture to start from as latents: the mean of their distribution, so that a seed alone decides what differs."""
        with self.low_memory.resident([self.model.first_stage_model], self.device):
            padded = inputs.pad(picture, canvas.padded).to(self.device)
            posterior = self.model.encode_first_stage(padded * 2 - 1)
        mean: Any = getattr(posterior, "mean", posterior)
        latents = self.model.scale_factor * mean
        keep = None
        if paint is not None:
            keep = 1 - F.max_pool2d((inputs.pad(paint, canvas.padded) > 0).float(), _LATENT_SCALE)
        return _Start(picture, paint, latents, keep)

    def _sample(
        self, sampler: Sampler, cond: Tensor, uncond: Tensor | None, controls: Any, guidance_scale: float, canvas: _Canvas,
        seeds: list[int], begin: _Start | None, *, steps: int, eta: float, x_T: Tensor | None, denoise: float | None,
        callback: Callable[[int], None] | None, preview: Callable[[int, np.ndarray], None] | None, progress: bool,
    ) -> Tensor:  # fmt: skip
        """Latents (N, 4, h, w), float32."""
        options: dict[str, Any] = {}
        if begin is not None and begin.keep is not None:
            options |= {"mask": begin.keep, "x0": begin.latents}
        if begin is not None and (begin.keep is None or denoise not in (None, 1.0)):
            part = 0.75 if denoise is None else denoise
            sampler.make_schedule(steps, ddim_eta=eta, verbose=False)
            if sampler.image_start(steps, part)[0] < 1:  # some samplers take one step less than asked for
                more = ", or a higher denoise" if part < 1 else ""
                raise ValueError(f"denoise {part:g} leaves none of {steps} steps; take more steps{more}")
            options |= {"init_latents": begin.latents, "strength": part}
        if preview is not None:
            show = self._previewer()
            options["img_callback"] = lambda x0, step: preview(step, show(x0))
        with self.low_memory.resident([self.model.model, *self._networks()], self.device):
            latents, _ = sampler.sample(
                steps, len(seeds), (self.model.channels, *canvas.latent), eta=eta, x_T=x_T, callback=callback, verbose=progress,
                guidance=self._guidance(cond, uncond, guidance_scale, controls), generators=picture_generators(seeds, len(seeds)),
                **options,
            )  # fmt: skip
        return latents

    def _decode(self, latents: Tensor, canvas: _Canvas, begin: _Start | None) -> np.ndarray:
        """Pictures uint8 (N, H, W, 3) at the size that was asked for."""
        with self.low_memory.resident([self.model.first_stage_model], self.device):
            pictures = self.model.decode_first_stage(latents)[:, :, : canvas.height, : canvas.width]
        made = to_uint8(pictures)
        if begin is None or begin.paint is None:
            return made
        return inputs.to_array(begin.merged(torch.from_numpy(made).permute(0, 3, 1, 2).float() / 255))

    def _previewer(self) -> LatentPreview:
        if self._preview is None:
            with self.low_memory.resident([self.model.first_stage_model], self.device):
                self._preview = LatentPreview(self.model)
        return self._preview

    # -- the model -----------------------------------------------------------------------------------------

    def _networks(self) -> list[nn.Module]:
        """The K ControlNets."""
        return self.model.control_networks()

    def _controls(
        self, hints: Sequence[Tensor | None], *, strength: EachControl, scales: EachControl, guess_mode: EachControl,
        conditional_only: EachControl, resolution_weights: bool, start: EachControl, end: EachControl,
    ) -> list[Control]:  # fmt: skip
        """What steers: one control for each ControlNet that has a hint.

        Raises:
            ValueError: an argument is out of range, or has not one entry for each ControlNet.
        """
        networks = self._networks()
        count = len(networks)
        own_scales = scales
        if count == 1 and scales is not None:
            if not isinstance(scales, (list, tuple)) or not scales:
                raise ValueError(f"scales must be a list with a factor for each output, found {scales!r}")
            own_scales = scales if isinstance(scales[0], (list, tuple)) else [scales]
        each = zip(
            hints, networks, one_for_each(strength, count, "strength"), one_for_each(own_scales, count, "scales"),
            one_for_each(guess_mode, count, "guess_mode"), one_for_each(conditional_only, count, "conditional_only"),
            one_for_each(start, count, "start"), one_for_each(end, count, "end"), strict=True,
        )  # fmt: skip
        controls = []
        for number, (hint, network, factor, own, guess, only, begin, finish) in enumerate(each):
            if factor is None or begin is None or finish is None:
                raise ValueError(f"strength, start and end must be numbers, found {factor}, {begin} and {finish}")
            check_numbers(strength=factor, start=begin, end=finish)
            check_yes_or_no(guess_mode=guess, **({} if only is None else {"conditional_only": only}))
            if not begin < finish:
                raise ValueError(f"start must be below end, found start={begin} and end={finish}")
            outputs = getattr(network, "output_count", 13)
            factors = strength_scales(factor, guess, outputs)
            if own is not None:
                if len(own) != outputs:
                    raise ValueError(f"scales has {len(own)} entries for the {outputs} outputs of a ControlNet")
                for value in own:
                    check_numbers(scales=value)
                factors = [a * b for a, b in zip(factors, own, strict=True)]
            only = self.model.pools_control(number) if only is None else only
            if hint is not None:
                controls.append(
                    Control(
                        hint, number, factors, begin, finish, guess or only or resolution_weights, resolution_weights
                    )
                )
        return controls

    def _guidance(self, cond: Tensor, uncond: Tensor | None, scale: float, controls: Sequence[Control]) -> Guidance:
        no_control = None if uncond is None else {"c_crossattn": [uncond]}
        return self.model.make_guidance({"c_crossattn": [cond]}, no_control, scale, controls)

    def _check_weights(self) -> None:
        """Warn, once, of networks that were never trained: their last layers still hold the zeros of a new model."""
        if self._checked_weights:
            return
        self._checked_weights = True
        out = getattr(self.model.model.diffusion_model, "out", None)
        if out is not None and not bool(out[-1].weight.any()):
            logger.warning(
                "the UNet's last layer is all zeros: its weights were never loaded or trained, so only noise can come out"
            )
        for network in self._networks():
            if is_untrained(network):
                logger.warning(
                    "the ControlNet's zero convolutions are all zeros: it was never trained or loaded, so hints change nothing"
                )


def is_untrained(network: nn.Module) -> bool:
    """Whether all zero convolutions of a ControlNet are still zero, so that its hints change nothing."""
    zero_convs = [*getattr(network, "zero_convs", ()), *getattr(network, "middle_block_out", ())]
    return bool(zero_convs) and not any(bool(p.any()) for part in zero_convs for p in part.parameters())


def _caption(captioner: Captioner, picture: np.ndarray) -> str:
    found = captioner(picture)
    if not isinstance(found, str):
        raise ValueError(f"a captioner must return a text, found {type(found).__name__}")
    return found


def _noted(settings: dict[str, Any], given: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """Settings that a text can hold, and what else was given; what is no plain value is named among the latter by its type."""

    def plain(value: Any) -> Any:
        if isinstance(value, (list, tuple)):
            return [plain(entry) for entry in value]
        value = value.item() if isinstance(value, np.generic) else value
        if isinstance(value, (str, int, float, bool, type(None))):
            return value
        raise TypeError

    noted, others = {}, {}
    for name, value in settings.items():
        try:
            noted[name] = plain(value)
        except TypeError:
            others[name] = getattr(value, "__name__", type(value).__name__)
    return noted, {name: value for name, value in given.items() if value not in (None, [None])} | others


def _multiple(model: ControlLDM) -> int:
    """Sides of a picture that the networks take as they are: multiples of this."""
    levels = getattr(model.model.diffusion_model, "channel_mult", (1, 1, 1, 1))
    return _LATENT_SCALE * 2 ** (len(levels) - 1)


def _default_size(model: ControlLDM) -> tuple[int, int]:
    size = model.image_size
    height, width = (size, size) if isinstance(size, int) else size
    return height * _LATENT_SCALE, width * _LATENT_SCALE
