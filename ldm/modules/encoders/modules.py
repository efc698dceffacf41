"""Encoders of conditionings: the text encoders of Stable Diffusion 1.x and 2.x, and small ones for other conditionings.

All are built from their configuration alone; their weights come from the checkpoint.
Shapes: B prompts, L tokens, D width.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ldm.modules.encoders.clip import CLIPTextTransformer, OpenCLIPTextTransformer, quick_gelu
from ldm.modules.encoders.tokenizer import BEGIN, END, encode, tokenize
from ldm.util import ConfigError


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


class _FrozenText(AbstractEncoder):
    """What both text encoders share: options, freezing, and the way from prompts to the transformer."""

    LAYERS: tuple[str, ...]  # what `layer` may be
    PAD: int  # the token after the end token

    def __init__(self, layer: str, max_length: int, positions: int) -> None:
        super().__init__()
        if layer not in self.LAYERS:
            raise ConfigError(f"layer must be one of {', '.join(self.LAYERS)}, found {layer!r}")
        if not 3 <= max_length <= positions:
            raise ConfigError(f"max_length must be from 3 to {positions}, found {max_length}")
        self.layer = layer
        self.max_length = max_length
        self.frozen = False

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

    def train(self, mode: bool = True) -> "_FrozenText":
        return super().train(mode and not self.frozen)

    @property
    def device(self) -> torch.device:
        """Where the weights are; setting it moves them."""
        return next(self.parameters()).device

    @device.setter
    def device(self, device: torch.device | str) -> None:
        self.to(device)

    def tokenize(self, text: str | Sequence[str]) -> Tensor:
        """Prompts -> token ids (B, L): begin, prompt, end, padding; what does not fit is cut off before the end."""
        return tokenize(text, self.max_length, pad=self.PAD)

    def encode_with_transformer(self, tokens: Tensor) -> Tensor:
        """Token ids (B, L) -> (B, L, D), of the layer that was chosen."""
        raise NotImplementedError

    def forward(self, text: str | Sequence[str]) -> Tensor:
        """Prompts -> (B, L, D)."""
        return self.encode_with_transformer(self.tokenize(text).to(self.device))

    def encode(self, text: str | Sequence[str]) -> Tensor:
        """Prompts -> (B, L, D)."""
        return self(text)


class FrozenCLIPEmbedder(_FrozenText):
    """The text encoder of SD 1.x: CLIP ViT-L/14, padded with the end token, last hidden state after the final norm.

    Args:
        version: accepted for compatibility; the sizes below say what is built.
        device: where to put the weights; where they are made, by default.
        max_length: L, at most 77.
        freeze: no training.
        layer: `last`, `pooled` (the end token's vector, as one token) or `hidden`, the state number
        layer_idx: 0 being the embeddings, without the final norm; negative counts from the end.
        width, layers, heads: of the transformer.

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
    ) -> None:
        super().__init__(layer, max_length, positions=77)
        if layer == "hidden" and (layer_idx is None or not -layers - 1 <= layer_idx <= layers):
            raise ConfigError(f"layer hidden needs layer_idx from {-layers - 1} to {layers}, found {layer_idx}")
        self.version = version
        self.layer_idx = layer_idx
        self.transformer = CLIPTextTransformer(width, heads, layers)
        self._place(freeze, device)

    def encode_with_transformer(self, tokens: Tensor) -> Tensor:
        """Token ids (B, L) -> (B, L, D), or (B, 1, D) where pooled."""
        if self.layer == "hidden":
            return self.transformer.hidden_states(tokens)[self.layer_idx]
        states = self.transformer(tokens)  # (B, L, D)
        if self.layer == "last":
            return states
        ends = (tokens == END).int().argmax(dim=1)  # (B,) the first end token
        return states[torch.arange(len(states), device=states.device), ends][:, None]  # (B, 1, D)

    def encode_long(self, text: str | Sequence[str], clip_skip: int = 1, chunks: int = 3) -> Tensor:
        """Prompts of up to `chunks` * 75 tokens -> (B, chunks * 77, D); the excess is cut off.

        Each chunk is begin, 75 tokens padded with the end token, end, and goes through the transformer alone.

        Args:
            clip_skip: n > 1 takes the n-th hidden state from the end, with the final norm.
            chunks: number of windows.

        Raises:
            ValueError: `clip_skip` reaches past the first layer, or `chunks` is not positive.
        """
        layers = len(self.transformer.text_model.encoder.layers)
        if not 1 <= clip_skip <= layers:
            raise ValueError(f"clip_skip must be from 1 to {layers}, found {clip_skip}")
        if chunks < 1:
            raise ValueError(f"chunks must be positive, found {chunks}")
        room = self.max_length - 2
        rows = []
        for entry in [text] if isinstance(text, str) else text:
            ids = encode(entry)[: chunks * room]
            ids += [END] * (chunks * room - len(ids))
            rows.append([[BEGIN, *ids[i * room : (i + 1) * room], END] for i in range(chunks)])
        tokens = torch.tensor(rows, device=self.device)  # (B, chunks, L)
        states = self.transformer.hidden_states(tokens.flatten(0, 1))[-clip_skip]  # (B * chunks, L, D)
        return self.transformer.final_norm(states).unflatten(0, tokens.shape[:2]).flatten(1, 2)


class FrozenOpenCLIPEmbedder(_FrozenText):
    """The text encoder of SD 2.x: OpenCLIP ViT-H/14, padded with 0, next-to-last layer, then the final norm.

    Args:
        arch: an architecture that open_clip knows; its text tower is built.
        version: accepted for compatibility; weights come from the checkpoint.
        device: where to put the weights; where they are made, by default.
        max_length: L, at most the architecture's context length.
        freeze: no training.
        layer: `last` or `penultimate`.
        width, layers, heads: of the transformer, in place of the architecture's.

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
    ) -> None:
        config = _architecture(arch)
        tower = config["text_cfg"]
        super().__init__(layer, max_length, positions=tower["context_length"])
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

    def encode_with_transformer(self, tokens: Tensor) -> Tensor:
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
