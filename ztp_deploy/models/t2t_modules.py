"""The modules of T2T-ViT (Yuan et al., ICCV 2021, arXiv:2101.11986), under the names of the official checkpoints.

Tokens are [B, N, C] in raster order throughout.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional

from ztp_deploy.models.blocks import Block, Mlp
from ztp_deploy.models.parts import project

PATCH = 16
"""Pixels from one final token to the next: the three soft splits step by 4, 2 and 2."""
TOKEN_DIM = 64
EPSILON = 1e-8
"""Added to the performer's denominator."""


@dataclass(frozen=True)
class Size:
    """The numbers that make one T2T-ViT (section 3.3, table 1); image side in pixels."""

    token_module: Literal["performer", "transformer"]
    embed_dim: int
    depth: int
    num_heads: int
    mlp_ratio: float
    img_size: int = 224
    num_classes: int = 1000


class SoftSplit(nn.Module):
    """Overlapping windows of a map of tokens, each window's tokens joined to one (section 3.1).

    Tokens [B, side², C] → [B, out_side², C·kernel²], zeros beyond the edges, channel before place in the window:
    what `torch.nn.Unfold` gives, transposed. One gather by a constant index, exact in every precision.
    """

    window: Tensor

    def __init__(self, side: int, kernel: int, stride: int, padding: int) -> None:
        super().__init__()
        self.out_side = (side + 2 * padding - kernel) // stride + 1
        self.area = kernel**2
        at = torch.arange(self.out_side).unsqueeze(1) * stride + torch.arange(kernel) - padding
        within = (at >= 0) & (at < side)
        rows, row_within = at[:, None, :, None], within[:, None, :, None]
        columns, column_within = at[None, :, None, :], within[None, :, None, :]
        # Places beyond the edges all read the zero token that `forward` puts behind the last one.
        index = torch.where(row_within & column_within, rows * side + columns, side**2)
        self.register_buffer("window", index.reshape(-1), persistent=False)

    def forward(self, tokens: Tensor) -> Tensor:
        padded = torch.cat([tokens, torch.zeros_like(tokens[:, :1])], dim=1)
        windows: Tensor = padded.index_select(1, self.window).unflatten(1, (self.out_side**2, self.area))
        return windows.transpose(2, 3).flatten(2)


class TokenPerformer(nn.Module):
    """One layer of linear attention with positive random features (Performer), from any width to `TOKEN_DIM`.

    Tokens [B, N, dim] → [B, N, 64]; the values, not the tokens, go on in the residual, since widths differ.
    """

    def __init__(self, dim: int) -> None:
        super().__init__()
        features = TOKEN_DIM // 2
        self.kqv = nn.Linear(dim, 3 * TOKEN_DIM)
        self.proj = nn.Linear(TOKEN_DIM, TOKEN_DIM)
        self.norm1 = nn.LayerNorm(dim)
        self.norm2 = nn.LayerNorm(TOKEN_DIM)
        self.mlp = nn.Sequential(nn.Linear(TOKEN_DIM, TOKEN_DIM), nn.GELU(), nn.Linear(TOKEN_DIM, TOKEN_DIM))
        rows = nn.init.orthogonal_(torch.empty(features, TOKEN_DIM)) * math.sqrt(features)
        self.w = nn.Parameter(rows, requires_grad=False)

    def forward(self, tokens: Tensor) -> Tensor:
        keys, queries, values = (part.squeeze(1) for part in project(self.norm1(tokens), self.kqv, heads=1))
        mixed = values + self.proj(self._attend(keys, queries, values))
        transformed: Tensor = mixed + self.mlp(self.norm2(mixed))
        return transformed

    def _attend(self, keys: Tensor, queries: Tensor, values: Tensor) -> Tensor:
        # Exponentials, and their sums over thousands of tokens, outgrow half precision.
        keys, queries = self._features(keys.float()), self._features(queries.float())
        total = queries @ keys.sum(dim=1).unsqueeze(2)
        mixed = queries @ (keys.transpose(1, 2) @ values.float())
        # The kernel's 1/√m in queries and keys cancels but for the epsilon, which takes it on. As a bare 1e-8 torch's
        # ONNX optimiser would drop it: it takes whatever is that small for an addition of zero.
        return (mixed / (total + self.w.shape[0] * EPSILON)).to(values.dtype)

    def _features(self, x: Tensor) -> Tensor:
        return torch.exp(x @ self.w.float().t() - x.square().sum(dim=-1, keepdim=True) / 2)

    def macs(self, tokens: int) -> int:
        """Multiply-accumulates for so many tokens: linear layers, random features, and the attention's products."""
        attention = 2 * self.w.numel() + self.w.shape[0] * (2 * TOKEN_DIM + 1)
        return tokens * (self.kqv.weight.numel() + attention + 3 * TOKEN_DIM**2)


class TokenAttention(nn.Module):
    """Self-attention with one head from any width to `TOKEN_DIM`, its values added to the result."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.scale = dim**-0.5  # of the width that comes in, not of the head
        self.qkv = nn.Linear(dim, 3 * TOKEN_DIM, bias=False)
        self.proj = nn.Linear(TOKEN_DIM, TOKEN_DIM)

    def forward(self, tokens: Tensor) -> Tensor:
        queries, keys, values = project(tokens, self.qkv, heads=1)
        mixed = functional.scaled_dot_product_attention(queries, keys, values, scale=self.scale)
        attended: Tensor = (values + self.proj(mixed)).squeeze(1)
        return attended


class TokenTransformer(nn.Module):
    """One Transformer layer from any width to `TOKEN_DIM`: tokens [B, N, dim] → [B, N, 64]."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(dim)
        self.attn = TokenAttention(dim)
        self.norm2 = nn.LayerNorm(TOKEN_DIM)
        self.mlp = Mlp(TOKEN_DIM, TOKEN_DIM)

    def forward(self, tokens: Tensor) -> Tensor:
        mixed = self.attn(self.norm1(tokens))
        transformed: Tensor = mixed + self.mlp(self.norm2(mixed))
        return transformed

    def macs(self, tokens: int) -> int:
        """Multiply-accumulates for so many tokens: linear layers, and attention of all on all."""
        return tokens * (self.attn.qkv.weight.numel() + 2 * tokens * TOKEN_DIM + 3 * TOKEN_DIM**2)


class TokensToToken(nn.Module):
    """Images [B, 3, H, W] → tokens [B, (H / 16)², C]: soft splits with a token layer between each two (section 3.1)."""

    def __init__(self, size: Size) -> None:
        super().__init__()
        layer = TokenPerformer if size.token_module == "performer" else TokenTransformer
        self.split0 = SoftSplit(size.img_size, kernel=7, stride=4, padding=2)
        self.attention1 = layer(3 * self.split0.area)
        self.split1 = SoftSplit(self.split0.out_side, kernel=3, stride=2, padding=1)
        self.attention2 = layer(TOKEN_DIM * self.split1.area)
        self.split2 = SoftSplit(self.split1.out_side, kernel=3, stride=2, padding=1)
        self.project = nn.Linear(TOKEN_DIM * self.split2.area, size.embed_dim)

    def forward(self, images: Tensor) -> Tensor:
        pixels = images.flatten(2).transpose(1, 2)
        tokens = self.attention1(self.split0(pixels))
        tokens = self.attention2(self.split1(tokens))
        projected: Tensor = self.project(self.split2(tokens))
        return projected

    def macs(self) -> int:
        """Multiply-accumulates for one image; a split moves values and multiplies none."""
        first, second, last = (split.out_side**2 for split in (self.split0, self.split1, self.split2))
        return self.attention1.macs(first) + self.attention2.macs(second) + last * self.project.weight.numel()


class T2TViT(nn.Module):
    """T2T-ViT: images [B, 3, H, W] → logits [B, classes]."""

    def __init__(self, size: Size) -> None:
        super().__init__()
        self.size = size
        self.num_classes = size.num_classes  # where timm looks for a model's labels
        self.tokens_to_token = TokensToToken(size)
        self.cls_token = nn.Parameter(torch.zeros(1, 1, size.embed_dim))
        positions = self.tokens_to_token.split2.out_side**2 + 1
        self.pos_embed = nn.Parameter(sinusoids(positions, size.embed_dim), requires_grad=False)
        hidden = int(size.embed_dim * size.mlp_ratio)
        self.blocks = nn.ModuleList(Block(size.embed_dim, size.num_heads, hidden) for _ in range(size.depth))
        self.norm = nn.LayerNorm(size.embed_dim)
        self.head = nn.Linear(size.embed_dim, size.num_classes)

    def embed(self, images: Tensor) -> Tensor:
        """Images → tokens [B, 1 + n, C] as they enter the first block, the class token first."""
        tokens = self.tokens_to_token(images)
        return torch.cat([self.cls_token.expand(tokens.shape[0], -1, -1), tokens], dim=1) + self.pos_embed

    def read_out(self, tokens: Tensor) -> Tensor:
        """Tokens after the last block → logits, by the class token."""
        logits: Tensor = self.head(self.norm(tokens[:, 0]))
        return logits

    def forward(self, images: Tensor) -> Tensor:
        tokens = self.embed(images)
        for block in self.blocks:
            tokens = block(tokens)
        return self.read_out(tokens)


def sinusoids(positions: int, dim: int) -> Tensor:
    """Sine at even, cosine at odd channels, wavelengths from 2π to 10000·2π → [1, positions, dim]."""
    channels = torch.arange(dim, dtype=torch.float64)
    angles = torch.arange(positions, dtype=torch.float64).unsqueeze(1) / 10000 ** ((channels // 2) * 2 / dim)
    return torch.where(channels % 2 == 0, angles.sin(), angles.cos()).float().unsqueeze(0)
