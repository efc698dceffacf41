"""Transformer blocks inside the UNet: feed-forward, attention, and the block that applies them to a picture's positions.

Shapes: B batch, C channels, H W height and width, L tokens, D width, h heads, d width of a head, M tokens of the context.
"""

from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from ldm.modules.diffusionmodules.util import checkpoint, repeat_rows, zero_module
from ldm.util import default

AttentionFunction = Callable[[Tensor, Tensor, Tensor, Tensor | None], Tensor]


def full_attention(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None) -> Tensor:
    """softmax(q k^T / sqrt(d)) v over (B, h, L, d); `mask` is True where a key may be seen (Vaswani et al. 2017, eq. 1)."""
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask)


_SLICE = 2**24  # attention scores that are held at once: 64 MiB in float32


def sliced_attention(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None) -> Tensor:
    """The same numbers one image and a few queries at a time: less memory at once where the fused kernels are not available."""
    rows = max(1, _SLICE // (q.shape[1] * k.shape[2]))
    out = q.new_empty(*q.shape[:3], v.shape[3])  # (B, h, L, d)
    for image in range(len(q)):
        one = slice(image, image + 1)
        for start in range(0, q.shape[2], rows):
            part = slice(start, start + rows)
            seen = None
            if mask is not None:  # (B or 1, h or 1, L or 1, M)
                seen = mask[one] if len(mask) == len(q) else mask
                seen = seen[:, :, part] if seen.shape[2] > 1 else seen
            out[one, :, part] = full_attention(q[one, :, part], k[one], v[one], seen)
    return out


_attention: AttentionFunction = full_attention


def set_attention(function: AttentionFunction) -> None:
    """Choose the function that every CrossAttention uses from its next call on: `full_attention`, `sliced_attention` or another."""
    global _attention
    _attention = function


def get_attention() -> AttentionFunction:
    """The function in use."""
    return _attention


class GEGLU(nn.Module):
    """Gated linear unit with GELU (Shazeer 2020)."""

    def __init__(self, dim_in: int, dim_out: int) -> None:
        super().__init__()
        self.proj = nn.Linear(dim_in, dim_out * 2)

    def forward(self, x: Tensor) -> Tensor:  # (B, L, dim_in) -> (B, L, dim_out)
        x, gate = self.proj(x).chunk(2, dim=-1)
        return x * F.gelu(gate)


class FeedForward(nn.Module):
    """Two linear layers with a hidden width of `mult` times the input's."""

    def __init__(
        self, dim: int, dim_out: int | None = None, mult: int = 4, glu: bool = False, dropout: float = 0.0
    ) -> None:
        super().__init__()
        inner = int(dim * mult)
        first = GEGLU(dim, inner) if glu else nn.Sequential(nn.Linear(dim, inner), nn.GELU())
        self.net = nn.Sequential(first, nn.Dropout(dropout), nn.Linear(inner, default(dim_out, dim)))

    def forward(self, x: Tensor) -> Tensor:  # (B, L, D) -> (B, L, D)
        return self.net(x)


class CrossAttention(nn.Module):
    """Multi-head attention of tokens to a context, or to themselves where none is given.

    Args:
        query_dim: width of the tokens.
        context_dim: width of the context; None for self-attention.
        heads, dim_head: number and width of the heads.
        dropout: after the output projection.
    """

    def __init__(
        self, query_dim: int, context_dim: int | None = None, heads: int = 8, dim_head: int = 64, dropout: float = 0.0
    ) -> None:
        super().__init__()
        inner = heads * dim_head
        context_dim = default(context_dim, query_dim)
        self.heads = heads
        self.scale = dim_head**-0.5  # public: what replaces `forward` from outside reads it
        self.to_q = nn.Linear(query_dim, inner, bias=False)
        self.to_k = nn.Linear(context_dim, inner, bias=False)
        self.to_v = nn.Linear(context_dim, inner, bias=False)
        self.to_out = nn.Sequential(nn.Linear(inner, query_dim), nn.Dropout(dropout))

    def forward(self, x: Tensor, context: Tensor | None = None, mask: Tensor | None = None) -> Tensor:
        """x (B, L, D), context (B, M, context_dim), mask (B, M), True where a context token may be seen -> (B, L, D)."""
        context = default(context, x)
        q, k, v = (
            rearrange(t, "b l (h d) -> b h l d", h=self.heads)
            for t in (self.to_q(x), self.to_k(context), self.to_v(context))
        )
        if mask is not None:
            mask = mask.flatten(1).bool()[:, None, None, :]  # (B, 1, 1, M)
        out = _attention(q, k, v, mask)  # (B, h, L, d)
        return self.to_out(rearrange(out, "b h l d -> b l (h d)"))


class BasicTransformerBlock(nn.Module):
    """Self-attention, attention to the context, feed-forward; each after a layer norm and added to its input.

    Tokens may come for fewer items than the context, a fraction of them; they are repeated where the context is first looked at.

    Args:
        dim: width of the tokens.
        n_heads, d_head: number and width of the heads.
        dropout: inside attention and feed-forward.
        context_dim: width of the context; None makes the second attention one to itself.
        gated_ff: GEGLU rather than GELU.
        checkpoint: recompute activations in the backward pass.
        disable_self_attn: the first attention looks at the context too.
    """

    def __init__(
        self,
        dim: int,
        n_heads: int,
        d_head: int,
        dropout: float = 0.0,
        context_dim: int | None = None,
        gated_ff: bool = True,
        checkpoint: bool = True,
        disable_self_attn: bool = False,
    ) -> None:
        super().__init__()
        self.disable_self_attn = disable_self_attn
        self.attn1 = CrossAttention(dim, context_dim if disable_self_attn else None, n_heads, d_head, dropout)
        self.ff = FeedForward(dim, dropout=dropout, glu=gated_ff)
        self.attn2 = CrossAttention(dim, context_dim, n_heads, d_head, dropout)
        self.norm1 = nn.LayerNorm(dim)
        self.norm2 = nn.LayerNorm(dim)
        self.norm3 = nn.LayerNorm(dim)
        self.checkpoint = checkpoint

    def forward(
        self, x: Tensor, context: Tensor | None = None
    ) -> Tensor:  # (B, L, D), (B, M, context_dim) -> (B, L, D)
        return checkpoint(self._forward, (x, context), self.parameters(), self.checkpoint)

    def _forward(self, x: Tensor, context: Tensor | None) -> Tensor:
        rows = len(x) if context is None else len(context)
        if self.disable_self_attn:
            x = repeat_rows(x, rows)
        x = x + self.attn1(self.norm1(x), context if self.disable_self_attn else None)
        x = repeat_rows(x, rows)
        x = x + self.attn2(self.norm2(x), context)
        return x + self.ff(self.norm3(x))


class SpatialTransformer(nn.Module):
    """Transformer blocks over the positions of a feature map, with a residual connection around them.

    Args:
        in_channels: channels of the map.
        n_heads, d_head: number and width of the heads; their product is the tokens' width.
        depth: number of blocks. (More than one fails in the reference: it gives each block one element of the context.)
        dropout: inside the blocks.
        context_dim: width of the context, or one for each block.
        disable_self_attn: see BasicTransformerBlock.
        use_linear: linear projections (SD 2.x) rather than 1x1 convolutions (SD 1.x).
        use_checkpoint: recompute activations in the backward pass.
    """

    def __init__(
        self,
        in_channels: int,
        n_heads: int,
        d_head: int,
        depth: int = 1,
        dropout: float = 0.0,
        context_dim: int | Sequence[int] | None = None,
        disable_self_attn: bool = False,
        use_linear: bool = False,
        use_checkpoint: bool = True,
    ) -> None:
        super().__init__()
        given = [context_dim] if context_dim is None or isinstance(context_dim, int) else list(context_dim)
        widths = given * depth if len(given) == 1 else given
        if len(widths) != depth:
            raise ValueError(f"context_dim must be one width or one for each of the {depth} blocks, found {widths}")
        inner = n_heads * d_head
        self.in_channels = in_channels
        self.use_linear = use_linear
        self.norm = nn.GroupNorm(32, in_channels, eps=1e-6)
        self.proj_in = nn.Linear(in_channels, inner) if use_linear else nn.Conv2d(in_channels, inner, 1)
        self.transformer_blocks = nn.ModuleList(
            BasicTransformerBlock(
                inner, n_heads, d_head, dropout, width, disable_self_attn=disable_self_attn, checkpoint=use_checkpoint
            )
            for width in widths
        )
        self.proj_out = zero_module(nn.Linear(inner, in_channels) if use_linear else nn.Conv2d(inner, in_channels, 1))

    def forward(self, x: Tensor, context: Tensor | Sequence[Tensor] | None = None) -> Tensor:
        """x (B, C, H, W), context (B, M, context_dim) or one for each block -> (B, C, H, W)."""
        blocks = self.transformer_blocks
        contexts = context if isinstance(context, (list, tuple)) else [context] * len(blocks)
        if len(contexts) != len(blocks):
            raise ValueError(
                f"{len(contexts)} contexts for {len(blocks)} transformer blocks; give one, or one for each"
            )
        height = x.shape[2]
        tokens = self.norm(x)
        if not self.use_linear:
            tokens = self.proj_in(tokens)
        # Tokens one after the other in memory, and the map as it came: else every norm and sum copies or strides. A map with
        # its channels last is both at once.
        channels_last = not x.is_contiguous() and x.is_contiguous(memory_format=torch.channels_last)
        tokens = rearrange(tokens, "b c h w -> b (h w) c").contiguous()
        if self.use_linear:
            tokens = self.proj_in(tokens)
        for block, block_context in zip(blocks, contexts, strict=True):
            tokens = block(tokens, block_context)  # (B, H*W, D)
        if self.use_linear:
            tokens = self.proj_out(tokens)
        tokens = rearrange(tokens, "b (h w) c -> b c h w", h=height)
        if not channels_last:
            tokens = tokens.contiguous()
        return repeat_rows(x, len(tokens)) + (tokens if self.use_linear else self.proj_out(tokens))
