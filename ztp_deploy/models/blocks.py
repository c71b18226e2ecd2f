"""The transformer block of the backbones built here (LV-ViT, T2T-ViT), and the host of models made of it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor, nn
from torch.nn import functional

from ztp_deploy.models.base import Attention
from ztp_deploy.models.parts import fused_attention, project
from ztp_deploy.plan import Geometry
from ztp_deploy.pruning.tokens import TokenState, initial_state

LAYER_NORM_EPS = 1e-5


class SelfAttention(nn.Module):
    """The weights of multi-head self-attention; queries, keys and values have no bias."""

    def __init__(self, dim: int, num_heads: int) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.scale = float((dim // num_heads) ** -0.5)
        self.qkv = nn.Linear(dim, 3 * dim, bias=False)
        self.proj = nn.Linear(dim, dim)


class Mlp(nn.Module):
    """Two linear layers with GELU between them: tokens [B, N, C] → [B, N, C]."""

    def __init__(self, dim: int, hidden: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(dim, hidden)
        self.fc2 = nn.Linear(hidden, dim)

    def forward(self, tokens: Tensor) -> Tensor:
        projected: Tensor = self.fc2(functional.gelu(self.fc1(tokens)))
        return projected


class Block(nn.Module):
    """A pre-norm transformer block whose halves add 1/skip_lam of their result; tokens [B, N, C] → [B, N, C]."""

    def __init__(self, dim: int, num_heads: int, hidden: int, skip_lam: float = 1.0) -> None:
        super().__init__()
        self.skip_lam = skip_lam
        self.norm1 = nn.LayerNorm(dim, eps=LAYER_NORM_EPS)
        self.attn = SelfAttention(dim, num_heads)
        self.norm2 = nn.LayerNorm(dim, eps=LAYER_NORM_EPS)
        self.mlp = Mlp(dim, hidden)

    def forward(self, tokens: Tensor) -> Tensor:
        return self.transform(self.mix(tokens, initial_state(tokens, tokens.shape[1] - 1)))

    def mix(self, tokens: Tensor, state: TokenState) -> Tensor:
        """The attention half, fused."""
        return self.finish(tokens, fused_attention(*self.project(tokens), self.attn.scale, state))

    def project(self, tokens: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Queries, keys and values [B, H, N, d]."""
        return project(self.norm1(tokens), self.attn.qkv, self.attn.num_heads)

    def finish(self, tokens: Tensor, mixed: Tensor) -> Tensor:
        """The attention half of tokens [B, n, C] from the heads' results [B, H, n, d]."""
        return self._add(tokens, self.attn.proj(mixed.transpose(1, 2).flatten(2)))

    def transform(self, tokens: Tensor) -> Tensor:
        """The MLP half."""
        return self._add(tokens, self.mlp(self.norm2(tokens)))

    def _add(self, tokens: Tensor, branch: Tensor) -> Tensor:
        return tokens + (branch if self.skip_lam == 1 else branch / self.skip_lam)


class BlocksHost:
    """What hosts of models made of `Block` share; subclasses set `geometry` and say how the model reads out."""

    geometry: Geometry

    def __init__(self, model: nn.Module) -> None:
        self.model: Any = model

    @property
    def blocks(self) -> Sequence[nn.Module]:
        return list(self.model.blocks)

    def embed(self, images: Tensor) -> Tensor:
        tokens: Tensor = self.model.embed(images)
        return tokens

    def mix(self, block: Any, tokens: Tensor, state: TokenState) -> Tensor:
        mixed: Tensor = block.mix(tokens, state)
        return mixed

    def attention(self, block: Any, tokens: Tensor, state: TokenState) -> Attention:
        queries, keys, values = block.project(tokens)
        return Attention(tokens, queries, keys, values, block.attn.scale, state.bias)

    def finish(self, block: Any, tokens: Tensor, mixed: Tensor) -> Tensor:
        finished: Tensor = block.finish(tokens, mixed)
        return finished

    def transform(self, block: Any, tokens: Tensor) -> Tensor:
        transformed: Tensor = block.transform(tokens)
        return transformed
