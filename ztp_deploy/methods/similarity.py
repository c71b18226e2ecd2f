"""The S-stage's ways of telling which tokens resemble others: who is held against whom, and by what measure."""

from __future__ import annotations

import random
from typing import Literal, get_args

import torch
from torch import Tensor

from ztp_deploy.pruning.tokens import take, top_k

Partition = Literal["importance", "sequential", "alternate", "random", "none"]
"""Who may go and who they are held against: the less against the more important half; in raster order the later half
against the earlier one, every second token against the rest, a seeded random half against the other; or every token
against all others."""
Metric = Literal["cosine", "dot", "euclidean", "manhattan", "chebyshev"]
PARTITIONS: tuple[Partition, ...] = get_args(Partition)
_RANDOM_SEED = 0
_ITSELF = 1e30
"""Taken off a token's likeness to itself where every token is held against all."""


def staying(tokens: int, partition: Partition) -> int:
    """How many of so many tokens cannot go: the better half, the odd one among them, or none of them."""
    return 0 if partition == "none" else tokens - tokens // 2


def raster_order(positions: Tensor, partition: Partition) -> Tensor:
    """Slots [B, n] with those that cannot go first, for partitions that go by position [B, n] alone."""
    tokens = positions.shape[1]
    raster = top_k(-positions.float(), tokens)
    if partition == "alternate":
        return torch.cat([raster[:, ::2], raster[:, 1::2]], dim=1)
    if partition == "random":
        places = list(range(tokens))
        random.Random(_RANDOM_SEED).shuffle(places)
        return raster.index_select(1, torch.tensor(places, device=positions.device))
    return raster


def best_match(
    features: Tensor, less: Tensor, more: Tensor, metric: Metric = "cosine", skip: int = 0, apart: bool = True
) -> Tensor:
    """Likeness [B, a] of the tokens in slots less [B, a] to that token in slots more [B, b] which is most like each.

    features [B, skip + n, D]; slots count from `skip` on. Larger is more alike; distances count negatively (the
    Euclidean one squared). With `apart` False both are the same tokens, and none is held against itself.
    """
    ones, others = take(features, less, skip), take(features, more, skip)
    lengths = length(features) if metric == "cosine" else None
    if metric in ("cosine", "dot", "euclidean"):
        # Products of features as they came, and cosines of products: what is in low precision is cut no further.
        likeness = ones @ others.transpose(1, 2)
        if metric == "euclidean":
            likeness = 2 * likeness - _squares(ones) - _squares(others).transpose(1, 2)
        elif lengths is not None:
            likeness = likeness / take(lengths, more, skip).transpose(1, 2)
    else:
        distances = (ones.unsqueeze(2) - others.unsqueeze(1)).abs()  # [B, a, b, D]
        likeness = -(distances.sum(-1) if metric == "manhattan" else distances.amax(-1))
    if not apart:
        likeness = likeness - _ITSELF * torch.eye(less.shape[1], device=less.device)
    best = likeness.amax(-1)
    return best if lengths is None else best / take(lengths, less, skip).squeeze(-1)


def length(features: Tensor) -> Tensor:
    """Length [..., n, 1] of features [..., n, D], at least 1e-12, so that zeros are like nothing."""
    norm: Tensor = torch.linalg.vector_norm(features, dim=-1, keepdim=True)
    return norm.clamp_min(1e-12)


def _squares(features: Tensor) -> Tensor:
    """Squared lengths [..., n, 1]."""
    # A product, not a square: exporters write the latter as Pow, which engines run slowly.
    return (features * features).sum(-1, keepdim=True)
