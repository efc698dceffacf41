"""Encoders of conditionings: the text encoders of Stable Diffusion 1.x and 2.x, and small ones for other conditionings.

All are built from their configuration alone; their weights come from the checkpoint.
Shapes: B prompts, L tokens, D width.
"""

import logging
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from ldm.modules.encoders.clip import CLIPTextTransformer, OpenCLIPTextTransformer, quick_gelu
from ldm.modules.encoders.tokenizer import END, encode, encode_weighted, tokenize, window
from ldm.modules.precision import guarded
from ldm.util import ConfigError

logger = logging.getLogger(__name__)


class AbstractEncoder(nn.Module):
    """An encoder of a batch entry."""

    def encode(self, *args: Any, **kwargs: Any) -> Any:
        """What the diffusion model is conditioned on."""
        raise NotImplementedError


class IdentityEncoder(AbstractEncoder):
    """Leaves its input as it is."""

    def encode(self, x: Any) -> Any:
        return x


class ClassEmbedder(AbstractEncoder):
    """A vector for each class label, as a context of one token.

    Args:
        embed_dim: D.
        n_classes: number of labels, the last of which may stand for "no class".
        key: name of the labels in a batch.
        ucg_rate: share of labels replaced by the last class in training.
    """

    def __init__(self, embed_dim: int, n_classes: int = 1000, key: str = "class", ucg_rate: float = 0.1) -> None:
        super().__init__()
        self.key = key
        self.embedding = nn.Embedding(n_classes, embed_dim)
        self.n_classes = n_classes
        self.ucg_rate = ucg_rate

    def forward(
        self, batch: Mapping[str, Tensor] | Tensor, key: str | None = None, disable_dropout: bool = False
    ) -> Tensor:
        """Labels (B,), or a batch that holds them -> (B, 1, D)."""
        labels = batch[key or self.key] if isinstance(batch, Mapping) else batch
        if self.ucg_rate > 0.0 and self.training and not disable_dropout:
            dropped = torch.rand(labels.shape, device=labels.device) < self.ucg_rate
            labels = torch.where(dropped, self.n_classes - 1, labels)
        return self.embedding(labels.long()[:, None])

    def encode(self, batch: Mapping[str, Tensor] | Tensor) -> Tensor:
        """The call, with its defaults."""
        return self(batch)

    def get_unconditional_conditioning(self, bs: int, device: torch.device | str | None = None) -> dict[str, Tensor]:
        """The last class, `bs` times, under this encoder's key."""
        return {self.key: torch.full((bs,), self.n_classes - 1, device=device or self.embedding.weight.device)}


@dataclass(frozen=True)
class PromptOptions:
    """How a text encoder reads prompts. The defaults are the published behaviour.

    Attributes:
        windows: number of windows of 77 tokens, 75 of them the prompt's own; the context is that many times as long. What does not
            fit is cut off, with a warning. None takes as many as the longest prompt of a call needs.
        clip_skip: take the n-th hidden state from the end, with the final norm; None for the layer that the encoder was built for.
        weights: brackets are weights, as in `(word:1.2)`; otherwise they are characters like any other.

    Raises:
        ValueError: a number out of its range.
    """

    windows: int | None = 1
    clip_skip: int | None = None
    weights: bool = False

    def __post_init__(self) -> None:
        for name in ("windows", "clip_skip"):
            value = getattr(self, name)
            if value is not None and (not isinstance(value, int) or isinstance(value, bool)):
                raise ValueError(f"{name} must be a whole number, found {value!r}")
        if self.windows is not None and not 1 <= self.windows <= MAX_WINDOWS:
            raise ValueError(
                f"windows must be from 1 to {MAX_WINDOWS}, or None for as many as are needed; found {self.windows}"
            )
        if self.clip_skip is not None and self.clip_skip < 1:
            raise ValueError(f"clip_skip must be at least 1, found {self.clip_skip}")


MAX_WINDOWS = 20
_CUT_WARNINGS = 10  # prompts that are reported as too long; a data set may hold thousands

_default_options = PromptOptions()


def set_default_options(options: PromptOptions | None) -> None:
    """Choose how every text encoder without options of its own reads prompts from its next call on; None for the published way."""
    global _default_options
    _default_options = options or PromptOptions()


class FrozenTextEncoder(AbstractEncoder):
    """What both text encoders share: options, freezing, and the way from prompts to the transformer.

    Attributes:
        prompt_options: how prompts are read; None for what `set_default_options` says.
    """

    LAYERS: tuple[str, ...]  # what `layer` may be
    PAD: int  # the token after the end token

    def __init__(
        self, layer: str, max_length: int, positions: int, depth: int, options: Mapping[str, Any] | None
    ) -> None:
        super().__init__()
        if layer not in self.LAYERS:
            raise ConfigError(f"layer must be one of {', '.join(self.LAYERS)}, found {layer!r}")
        if not 3 <= max_length <= positions:
            raise ConfigError(f"max_length must be from 3 to {positions}, found {max_length}")
        self.layer = layer
        self.max_length = max_length
        self.depth = depth
        self.frozen = False
        self.prompt_options = _options_from(options)
        self._cut_warnings_left = _CUT_WARNINGS

    def _place(self, freeze: bool, device: torch.device | str | None) -> None:
        """Last step of construction."""
        if freeze:
            self.freeze()
        if device is not None:
            self.to(device)

    def freeze(self) -> None:
        """Eval mode and no gradients, for good."""
        self.frozen = True
        self.eval().requires_grad_(False)

    def train(self, mode: bool = True) -> "FrozenTextEncoder":
        return super().train(mode and not self.frozen)

    @property
    def device(self) -> torch.device:
        """Where the weights are; setting it moves them."""
        return next(self.parameters()).device

    @device.setter
    def device(self, device: torch.device | str) -> None:
        self.to(device)

    @contextmanager
    def using(self, **changes: Any) -> Iterator[None]:
        """Inside it the given fields of `PromptOptions` hold."""
        before = self.prompt_options
        self.prompt_options = replace(before or _default_options, **changes)
        try:
            yield
        finally:
            self.prompt_options = before

    def tokenize(self, text: str | Sequence[str]) -> Tensor:
        """Prompts -> token ids (B, L) of one window each: begin, prompt, end, padding."""
        return tokenize(text, self.max_length, pad=self.PAD)

    def encode_with_transformer(self, tokens: Tensor) -> Tensor:
        """Token ids (B, L) -> (B, L, D), of the layer that was chosen."""
        if self._clip_skip is not None:
            return self._network.final_norm(self._network.hidden_states(tokens)[-self._clip_skip])
        return self._chosen_layer(tokens)

    def forward(self, text: str | Sequence[str]) -> Tensor:
        """Prompts -> (B, windows * L, D); a prompt that comes several times is computed once.

        Raises:
            TypeError: something that is not a string.
            ValueError: a prompt of more than 20,000 characters, one that needs more than 20 windows, or a weight out of range.
        """
        prompts = [text] if isinstance(text, str) else list(text)
        for prompt in prompts:
            if not isinstance(prompt, str):
                raise TypeError(f"a prompt must be a string, found {type(prompt).__name__}: {prompt!r}")
        unique = list(dict.fromkeys(prompts))
        tokens, weights = self._windows(unique)  # (U, n, L), (U, n, L) or None
        states = self._encode(tokens.flatten(0, 1))  # (U * n, L, D)
        if weights is not None:
            # A weight moves a token's vector away from what an empty prompt has in its place, or towards it.
            empty = self._encode(self.tokenize("").to(tokens.device))  # (1, L, D)
            states = empty + weights.flatten(0, 1)[:, : states.shape[1], None].to(states) * (states - empty)
        states = states.unflatten(0, tokens.shape[:2]).flatten(1, 2)  # (U, n * L, D)
        if len(unique) == len(prompts):
            return states
        return states[[unique.index(prompt) for prompt in prompts]]

    def encode(self, text: str | Sequence[str]) -> Tensor:
        """Prompts -> (B, windows * L, D)."""
        return self(text)

    def _encode(self, tokens: Tensor) -> Tensor:
        """`encode_with_transformer`; what half precision makes NaN is repeated in float32, with a warning."""
        return guarded(self, self.encode_with_transformer, tokens, "encoding prompts")

    @property
    def _network(self) -> CLIPTextTransformer | OpenCLIPTextTransformer:
        """The transformer."""
        raise NotImplementedError

    def _chosen_layer(self, tokens: Tensor) -> Tensor:
        """Token ids (B, L) -> (B, L, D), of the layer that the encoder was built for."""
        raise NotImplementedError

    @property
    def _clip_skip(self) -> int | None:
        """The option, checked against this network."""
        clip_skip = (self.prompt_options or _default_options).clip_skip
        if clip_skip is not None and clip_skip > self.depth:
            raise ValueError(f"clip_skip must be from 1 to {self.depth} for this text encoder, found {clip_skip}")
        return clip_skip

    def _windows(self, prompts: Sequence[str]) -> tuple[Tensor, Tensor | None]:
        """Token ids (B, n, L) of n windows a prompt, and the weights of the tokens where any is not 1."""
        options = self.prompt_options or _default_options
        room = self.max_length - 2
        read = [encode_weighted(prompt) if options.weights else (encode(prompt), []) for prompt in prompts]
        count = options.windows or max([1, *(-(-len(ids) // room) for ids, _ in read)])
        if count > MAX_WINDOWS:
            longest = max(len(ids) for ids, _ in read)
            raise ValueError(
                f"a prompt of {longest} tokens is too long: at most {MAX_WINDOWS} windows of {room} tokens are read; shorten it"
            )
        rows, row_weights = [], []
        for prompt, (ids, weights) in zip(prompts, read, strict=True):
            if len(ids) > count * room:
                self._warn_cut(prompt, len(ids), count * room)
            parts = [ids[i * room : (i + 1) * room] for i in range(count)]
            rows.append([window(part, self.max_length, self.PAD) for part in parts])
            own = [weights[i * room : (i + 1) * room] for i in range(count)]
            row_weights.append([[1.0, *part] + [1.0] * (self.max_length - 1 - len(part)) for part in own])
        tokens = torch.tensor(rows, dtype=torch.long, device=self.device).reshape(len(rows), count, self.max_length)
        if all(weight == 1.0 for _, weights in read for weight in weights):
            return tokens, None
        return tokens, torch.tensor(row_weights, device=self.device)

    def _warn_cut(self, prompt: str, found: int, room: int) -> None:
        if not self._cut_warnings_left:
            return
        self._cut_warnings_left -= 1
        logger.warning(
            "a prompt of %d tokens is cut to %d: %.60r...; long prompts are an option of the text encoder (PromptOptions.windows)%s",
            found, room, prompt, "" if self._cut_warnings_left else "; further ones are not reported",
        )  # fmt: skip


def _options_from(given: Mapping[str, Any] | None) -> PromptOptions | None:
    try:
        return None if given is None else PromptOptions(**given)
    except (TypeError, ValueError) as error:
        raise ConfigError(f"prompt_options: {error}") from error


class FrozenCLIPEmbedder(FrozenTextEncoder):
    """The text encoder of SD 1.x: CLIP ViT-L/14, padded with the end token, last hidden state after the final norm.

    Args:
        version: accepted for compatibility; the sizes below say what is built.
        device: where to put the weights; where they are made, by default.
        max_length: L, at most 77.
        freeze: no training.
        layer: `last`, `pooled` (the end token's vector, as one token) or `hidden`, the state number
        layer_idx: 0 being the embeddings, without the final norm; negative counts from the end.
        width, layers, heads: of the transformer.
        prompt_options: the fields of `PromptOptions`, for long prompts, clip skip and weights.

    Raises:
        ConfigError: an option is out of its range.
    """

    LAYERS = ("last", "pooled", "hidden")
    PAD = END

    def __init__(
        self,
        version: str = "openai/clip-vit-large-patch14",
        device: torch.device | str | None = None,
        max_length: int = 77,
        freeze: bool = True,
        layer: str = "last",
        layer_idx: int | None = None,
        width: int = 768,
        layers: int = 12,
        heads: int = 12,
        prompt_options: Mapping[str, Any] | None = None,
    ) -> None:
        super().__init__(layer, max_length, 77, layers, prompt_options)
        if layer == "hidden" and (layer_idx is None or not -layers - 1 <= layer_idx <= layers):
            raise ConfigError(f"layer hidden needs layer_idx from {-layers - 1} to {layers}, found {layer_idx}")
        self.version = version
        self.layer_idx = layer_idx
        self.transformer = CLIPTextTransformer(width, heads, layers)
        self._place(freeze, device)

    @property
    def _network(self) -> CLIPTextTransformer:
        return self.transformer

    def _chosen_layer(self, tokens: Tensor) -> Tensor:
        """Token ids (B, L) -> (B, L, D), or (B, 1, D) where pooled."""
        if self.layer == "hidden":
            assert self.layer_idx is not None  # as the constructor has checked
            return self.transformer.hidden_states(tokens)[self.layer_idx]
        states = self.transformer(tokens)  # (B, L, D)
        if self.layer == "last":
            return states
        ends = (tokens == END).int().argmax(dim=1)  # (B,) the first end token
        return states[torch.arange(len(states), device=states.device), ends][:, None]  # (B, 1, D)


class FrozenOpenCLIPEmbedder(FrozenTextEncoder):
    """The text encoder of SD 2.x: OpenCLIP ViT-H/14, padded with 0, next-to-last layer, then the final norm.

    Args:
        arch: an architecture that open_clip knows; its text tower is built.
        version: accepted for compatibility; weights come from the checkpoint.
        device: where to put the weights; where they are made, by default.
        max_length: L, at most the architecture's context length.
        freeze: no training.
        layer: `last` or `penultimate`.
        width, layers, heads: of the transformer, in place of the architecture's.
        prompt_options: the fields of `PromptOptions`, for long prompts, clip skip and weights.

    Raises:
        ConfigError: an option is out of its range, or the architecture has no plain CLIP text tower.
    """

    LAYERS = ("last", "penultimate")
    PAD = 0

    def __init__(
        self,
        arch: str = "ViT-H-14",
        version: str = "laion2b_s32b_b79k",
        device: torch.device | str | None = None,
        max_length: int = 77,
        freeze: bool = True,
        layer: str = "last",
        width: int | None = None,
        layers: int | None = None,
        heads: int | None = None,
        prompt_options: Mapping[str, Any] | None = None,
    ) -> None:
        config = _architecture(arch)
        tower = config["text_cfg"]
        super().__init__(layer, max_length, tower["context_length"], layers or tower["layers"], prompt_options)
        self.arch = arch
        self.version = version
        self.model = OpenCLIPTextTransformer(
            width=width or tower["width"],
            heads=heads or tower["heads"],
            layers=layers or tower["layers"],
            embed_dim=width or config["embed_dim"],
            length=tower["context_length"],
            vocabulary=tower["vocab_size"],
            activation=quick_gelu if config.get("quick_gelu") else nn.functional.gelu,
        )
        self._place(freeze, device)

    @property
    def _network(self) -> OpenCLIPTextTransformer:
        return self.model

    def _chosen_layer(self, tokens: Tensor) -> Tensor:
        """Token ids (B, L) -> (B, L, D)."""
        return self.model.final_norm(self.model.hidden_states(tokens)[-1 if self.layer == "last" else -2])


def _architecture(name: str) -> dict[str, Any]:
    """open_clip's configuration of a CLIP whose text tower is the plain transformer with this library's vocabulary."""
    import open_clip  # takes seconds, so not before an encoder is built

    config = open_clip.get_model_config(name)
    if config is None:
        raise ConfigError(f"open_clip knows no architecture {name!r}")
    tower = config["text_cfg"]
    plain = {"context_length", "vocab_size", "width", "heads", "layers"}
    if set(tower) != plain or tower["vocab_size"] != END + 1:
        raise ConfigError(
            f"the text tower of {name!r} is not CLIP's plain transformer; ViT-H-14 and ViT-L-14, for example, have one"
        )
    return config
