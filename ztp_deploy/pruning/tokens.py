"""Token selection in the owned op vocabulary: top-k with a constant k, and gather on flattened rows."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor


@dataclass(frozen=True)
class TokenState:
    """What travels with the tokens from block to block.

    `positions` [B, n] int32: the original patch position of every patch token present.
    """

    positions: Tensor


def initial_state(images: Tensor, patch_tokens: int) -> TokenState:
    """Every patch present, in raster order; the batch size is taken from `images` [B, …]."""
    positions = torch.arange(patch_tokens, dtype=torch.int32, device=images.device)
    return TokenState(positions=positions.unsqueeze(0).expand(images.shape[0], -1))


def slots_of(positions: Tensor, state: TokenState) -> Tensor:
    """Slots [B, k] that hold the original positions [B, k] now; slot 0 for a position that is gone."""
    return (positions.unsqueeze(2) == state.positions.unsqueeze(1)).int().argmax(2)


def top_k(scores: Tensor, k: int) -> Tensor:
    """Indices [B, k] of the k largest of scores [B, n], best first, ties to the lower index."""
    if torch.onnx.is_in_onnx_export():
        return scores.topk(k, dim=-1).indices  # ONNX defines ties as going to the lower index
    # torch.topk leaves ties open; a stable sort does not.
    return scores.sort(dim=-1, descending=True, stable=True).indices[:, :k]


def take(values: Tensor, index: Tensor, skip: int = 0) -> Tensor:
    """Rows of values [B, n, …] at index + skip, index [B, k] → [B, k, …], as one Gather on axis 0 of [B·n, …]."""
    return _rows(values, index + (_first_row(values) + skip), index.shape[1])


def membership(index: Tensor, count: int, skip: int = 0) -> Tensor:
    """1.0 where a slot of [B, count] is among index + skip, index [B, k] distinct in a row; else 0.0."""
    slots = torch.arange(-skip, count - skip, device=index.device)
    return (index.unsqueeze(-1) == slots).to(torch.float32).sum(dim=1)


def keep_tokens(tokens: Tensor, state: TokenState, kept: Tensor, special_tokens: int) -> tuple[Tensor, TokenState]:
    """Keeps the special tokens and the patch slots `kept` [B, k] of tokens [B, S + n, C] → [B, S + k, C]."""
    first = _first_row(tokens)
    special = [first + slot for slot in range(special_tokens)]
    rows = torch.cat([*special, kept + (first + special_tokens)], dim=1)
    return _rows(tokens, rows, special_tokens + kept.shape[1]), replace(state, positions=take(state.positions, kept))


def _first_row(values: Tensor) -> Tensor:
    """Where each image's rows begin [B, 1] once values [B, n, …] are flattened to [B·n, …]."""
    return torch.arange(values.shape[0], device=values.device).unsqueeze(1) * values.shape[1]


def _rows(values: Tensor, rows: Tensor, count: int) -> Tensor:
    picked: Tensor = values.flatten(0, 1).index_select(0, rows.reshape(-1)).unflatten(0, (-1, count))
    return picked
