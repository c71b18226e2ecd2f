"""What hosts share: projections, fused attention, reading out what tokens survive, and what no host can carry."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from ztp_deploy.pruning.tokens import TokenState


def project(normed: Tensor, qkv: Any, heads: int) -> tuple[Tensor, Tensor, Tensor]:
    """Queries, keys and values [B, H, N, d] of normed tokens [B, N, C] by one joint linear layer."""
    # Three projections instead of one that is cut apart again: engines then copy nothing.
    biases = qkv.bias.chunk(3) if qkv.bias is not None else (None, None, None)
    queries, keys, values = (
        split_heads(functional.linear(normed, weight, bias), heads)
        for weight, bias in zip(qkv.weight.chunk(3), biases, strict=True)
    )
    return queries, keys, values


def split_heads(values: Tensor, heads: int) -> Tensor:
    """Values [B, N, H·d] of all heads → [B, H, N, d]."""
    split: Tensor = values.unflatten(2, (heads, -1)).transpose(1, 2)
    return split


def fused_attention(queries: Tensor, keys: Tensor, values: Tensor, scale: float, state: TokenState) -> Tensor:
    """The heads' results [B, H, N, d] without probabilities in between."""
    return functional.scaled_dot_product_attention(
        queries, keys, values, attn_mask=typed(state.bias, queries), scale=scale
    )


def typed(bias: Tensor | None, like: Tensor) -> Tensor | None:
    """A bias in the type that the tokens are computed in."""
    return None if bias is None else bias.to(like.dtype)


def mean_of_patches(patches: Tensor, state: TokenState) -> Tensor:
    """The mean [B, C] over the patch tokens [B, n, C] that are there, weighed by size where the state says so."""
    weights = None
    if state.weigh_mean and state.sizes is not None:
        weights = state.sizes / state.sizes.sum(1, keepdim=True)
    elif state.alive is not None:
        present = state.alive[:, -patches.shape[1] :]
        weights = present / present.sum(1, keepdim=True)
    if weights is None:
        return patches.mean(dim=1)
    return (weights.to(patches.dtype).unsqueeze(1) @ patches).squeeze(1)


def max_of_patches(values: Tensor, state: TokenState) -> Tensor:
    """The maximum [B, D] over the patch tokens' values [B, n, D] that are there."""
    if state.alive is not None:
        present = state.alive[:, -values.shape[1] :].unsqueeze(-1)
        values = torch.where(present > 0, values, torch.finfo(values.dtype).min)
    return values.amax(dim=1)


def unready(model: nn.Module) -> str | None:
    """Why a host would compute something else than this module or no engine would run it, as a clause; else None."""
    if any(parameter.dtype != torch.float32 for parameter in model.parameters()):
        return "its parameters are not float32 (precision is chosen at export)"
    if any(part._forward_hooks or part._forward_pre_hooks for part in model.modules()):
        return "it carries forward hooks, which no engine would run"
    return None
