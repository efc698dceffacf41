"""The text transformers of CLIP (Radford et al. 2021, section 2.4) in the two layouts that published weights use.

Both are the same network: token and position embeddings, pre-norm blocks with causal attention, a final layer norm.
Attribute names are the published keys. Shapes: B prompts, L tokens, D width, h heads, d width of a head.
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn


def quick_gelu(x: Tensor) -> Tensor:
    """x * sigmoid(1.702 x), the approximation of GELU that OpenAI's CLIP was trained with."""
    return x * torch.sigmoid(1.702 * x)


def causal_attention(q: Tensor, k: Tensor, v: Tensor, heads: int) -> Tensor:
    """Multi-head attention of tokens to themselves and those before them, (B, L, D) each -> (B, L, D)."""
    q, k, v = (rearrange(t, "b l (h d) -> b h l d", h=heads) for t in (q, k, v))
    return rearrange(F.scaled_dot_product_attention(q, k, v, is_causal=True), "b h l d -> b l (h d)")


# -- the layout of SD 1.x: names as in transformers ---------------------------------------------------------


class _Attention(nn.Module):
    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.q_proj, self.k_proj, self.v_proj, self.out_proj = (nn.Linear(width, width) for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:  # (B, L, D) -> (B, L, D)
        return self.out_proj(causal_attention(self.q_proj(x), self.k_proj(x), self.v_proj(x), self.heads))


class _MLP(nn.Module):
    def __init__(self, width: int, activation: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.fc1 = nn.Linear(width, 4 * width)
        self.fc2 = nn.Linear(4 * width, width)
        self.activation = activation

    def forward(self, x: Tensor) -> Tensor:  # (B, L, D) -> (B, L, D)
        return self.fc2(self.activation(self.fc1(x)))


class _Layer(nn.Module):
    def __init__(self, width: int, heads: int, activation: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.self_attn = _Attention(width, heads)
        self.layer_norm1 = nn.LayerNorm(width)
        self.mlp = _MLP(width, activation)
        self.layer_norm2 = nn.LayerNorm(width)

    def forward(self, x: Tensor) -> Tensor:  # (B, L, D) -> (B, L, D)
        x = x + self.self_attn(self.layer_norm1(x))
        return x + self.mlp(self.layer_norm2(x))


class _Embeddings(nn.Module):
    """Token plus position embeddings; `position_ids` is in old files and not in new ones, so loading takes both."""

    position_ids: Tensor

    def __init__(self, vocabulary: int, width: int, length: int) -> None:
        super().__init__()
        self.token_embedding = nn.Embedding(vocabulary, width)
        self.position_embedding = nn.Embedding(length, width)
        # A counter, not a weight: kept real also in a model that is made without memory and filled from a file.
        self.register_buffer("position_ids", torch.arange(length, device="cpu")[None])
        nn.init.normal_(self.token_embedding.weight, std=0.02)
        nn.init.normal_(self.position_embedding.weight, std=0.01)

    def forward(self, tokens: Tensor) -> Tensor:  # (B, L) -> (B, L, D)
        return self.token_embedding(tokens) + self.position_embedding.weight[: tokens.shape[1]]

    def _load_from_state_dict(self, state_dict: dict, prefix: str, *args: object) -> None:
        # The ids are always 0, 1, 2, ...: neither their absence from a file nor their type there (some hold floats)
        # matters, nor what lies in the buffer before (nothing yet, after `to_empty`).
        key = f"{prefix}position_ids"
        ids = torch.arange(self.position_ids.shape[1], device=self.position_ids.device)[None]
        super()._load_from_state_dict({**state_dict, key: ids}, prefix, *args)


class _Encoder(nn.Module):
    def __init__(self, width: int, heads: int, layers: int, activation: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.layers = nn.ModuleList(_Layer(width, heads, activation) for _ in range(layers))


class _TextModel(nn.Module):
    def __init__(
        self, vocabulary: int, width: int, heads: int, layers: int, length: int, activation: Callable[[Tensor], Tensor]
    ) -> None:
        super().__init__()
        self.embeddings = _Embeddings(vocabulary, width, length)
        self.encoder = _Encoder(width, heads, layers, activation)
        self.final_layer_norm = nn.LayerNorm(width)


class CLIPTextTransformer(nn.Module):
    """The text tower under the names of SD 1.x checkpoints (`text_model.*`).

    Args:
        width, heads, layers: of the transformer; the defaults are ViT-L/14's.
        length: number of positions.
        vocabulary: number of tokens.
        activation: of the feed-forward layers.
    """

    def __init__(
        self,
        width: int = 768,
        heads: int = 12,
        layers: int = 12,
        length: int = 77,
        vocabulary: int = 49408,
        activation: Callable[[Tensor], Tensor] = quick_gelu,
    ) -> None:
        super().__init__()
        if width % heads:
            raise ValueError(f"width {width} is not a multiple of {heads} heads")
        self.text_model = _TextModel(vocabulary, width, heads, layers, length, activation)

    def hidden_states(self, tokens: Tensor) -> list[Tensor]:
        """tokens (B, L) -> the embeddings and every layer's output, (B, L, D) each, without the final norm."""
        states = [self.text_model.embeddings(tokens)]
        for layer in self.text_model.encoder.layers:
            states.append(layer(states[-1]))
        return states

    def final_norm(self, x: Tensor) -> Tensor:  # (B, L, D) -> (B, L, D)
        return self.text_model.final_layer_norm(x)

    def forward(self, tokens: Tensor) -> Tensor:  # (B, L) -> (B, L, D)
        return self.final_norm(self.hidden_states(tokens)[-1])


# -- the layout of SD 2.x: names as in open_clip ------------------------------------------------------------


class _OpenAttention(nn.Module):
    """One matrix for queries, keys and values, as torch's MultiheadAttention names it."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.in_proj_weight = nn.Parameter(torch.empty(3 * width, width))
        self.in_proj_bias = nn.Parameter(torch.zeros(3 * width))
        self.out_proj = nn.Linear(width, width)
        nn.init.xavier_uniform_(self.in_proj_weight)

    def forward(self, x: Tensor) -> Tensor:  # (B, L, D) -> (B, L, D)
        q, k, v = F.linear(x, self.in_proj_weight, self.in_proj_bias).chunk(3, dim=-1)
        return self.out_proj(causal_attention(q, k, v, self.heads))


class _OpenMLP(nn.Module):
    def __init__(self, width: int, activation: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.c_fc = nn.Linear(width, 4 * width)
        self.c_proj = nn.Linear(4 * width, width)
        self.activation = activation

    def forward(self, x: Tensor) -> Tensor:  # (B, L, D) -> (B, L, D)
        return self.c_proj(self.activation(self.c_fc(x)))


class _OpenBlock(nn.Module):
    def __init__(self, width: int, heads: int, activation: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.ln_1 = nn.LayerNorm(width)
        self.attn = _OpenAttention(width, heads)
        self.ln_2 = nn.LayerNorm(width)
        self.mlp = _OpenMLP(width, activation)

    def forward(self, x: Tensor) -> Tensor:  # (B, L, D) -> (B, L, D)
        x = x + self.attn(self.ln_1(x))
        return x + self.mlp(self.ln_2(x))


class _OpenTransformer(nn.Module):
    def __init__(self, width: int, heads: int, layers: int, activation: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.resblocks = nn.ModuleList(_OpenBlock(width, heads, activation) for _ in range(layers))


class OpenCLIPTextTransformer(nn.Module):
    """The text tower under open_clip's names.

    The projection and the temperature are there because SD 2.x files carry them; nothing here uses them.

    Args:
        width, heads, layers: of the transformer; the defaults are ViT-H/14's.
        embed_dim: of the joint embedding with pictures.
        length: number of positions.
        vocabulary: number of tokens.
        activation: of the feed-forward layers.
    """

    def __init__(
        self,
        width: int = 1024,
        heads: int = 16,
        layers: int = 24,
        embed_dim: int = 1024,
        length: int = 77,
        vocabulary: int = 49408,
        activation: Callable[[Tensor], Tensor] = F.gelu,
    ) -> None:
        super().__init__()
        if width % heads:
            raise ValueError(f"width {width} is not a multiple of {heads} heads")
        self.token_embedding = nn.Embedding(vocabulary, width)
        self.positional_embedding = nn.Parameter(torch.empty(length, width))
        self.transformer = _OpenTransformer(width, heads, layers, activation)
        self.ln_final = nn.LayerNorm(width)
        self.text_projection = nn.Parameter(torch.empty(width, embed_dim))
        self.logit_scale = nn.Parameter(torch.full((), 2.6593))  # ln(1 / 0.07)
        nn.init.normal_(self.token_embedding.weight, std=0.02)
        nn.init.normal_(self.positional_embedding, std=0.01)
        nn.init.normal_(self.text_projection, std=width**-0.5)

    def hidden_states(self, tokens: Tensor) -> list[Tensor]:
        """tokens (B, L) -> the embeddings and every block's output, (B, L, D) each, without the final norm."""
        states = [self.token_embedding(tokens) + self.positional_embedding[: tokens.shape[1]]]
        for block in self.transformer.resblocks:
            states.append(block(states[-1]))
        return states

    def final_norm(self, x: Tensor) -> Tensor:  # (B, L, D) -> (B, L, D)
        return self.ln_final(x)

    def forward(self, tokens: Tensor) -> Tensor:  # (B, L) -> (B, L, D)
        return self.final_norm(self.hidden_states(tokens)[-1])
