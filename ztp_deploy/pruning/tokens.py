"""Token selection in the owned op vocabulary: top-k with a constant k, and gather on flattened rows."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

MASKED = -1e4
"""What attention adds to its logits for a key that is out: exp gives 0, and half precision can hold it."""


@dataclass(frozen=True)
class TokenState:
    """What travels with the tokens from block to block: S special tokens, then n patch slots.

    `positions` [B, n] int32: the original patch position of every slot. A token merged from several goes by that of
    the one the others joined, a token made anew at stage i (counted from 0) by patch_tokens + i, a masked slot by -1.
    `bias` [B, 1, 1, S + n]: what every attention adds to its logits, key by key. `sizes` [B, n]: how many patches a slot
    stands for; a mean over patches weighs by them with `weigh_mean`. `alive` [B, S + n]: 1.0, or 0.0 for a masked slot. None where the method has no use for it.
    `carried`: what the method hands from stage to stage, by names of its own.
    """

    positions: Tensor
    bias: Tensor | None = None
    sizes: Tensor | None = None
    weigh_mean: bool = False
    alive: Tensor | None = None
    carried: Mapping[str, Tensor] = field(default_factory=dict)


def initial_state(images: Tensor, patch_tokens: int) -> TokenState:
    """Every patch present, in raster order; the batch size is taken from `images` [B, …]."""
    positions = torch.arange(patch_tokens, dtype=torch.int32, device=images.device)
    return TokenState(positions=positions.unsqueeze(0).expand(images.shape[0], -1))


def slots_of(positions: Tensor, state: TokenState) -> Tensor:
    """Slots [B, k] that hold the original positions [B, k] now; slot 0 for a position that is gone."""
    return (positions.unsqueeze(2) == state.positions.unsqueeze(1)).int().argmax(2)


def destinations_of(destinations: Tensor, state: TokenState) -> Tensor:
    """Per slot [B, n] the position its token is to go by, from a table by position [B, P]; never exported."""
    return destinations.gather(1, state.positions.long())


def top_k(scores: Tensor, k: int) -> Tensor:
    """Indices [B, k] of the k largest of scores [B, n], best first, ties to the lower index."""
    if torch.onnx.is_in_onnx_export():
        return scores.topk(k, dim=-1).indices  # ONNX defines ties as going to the lower index
    # torch.topk leaves ties open; a stable sort does not.
    return scores.sort(dim=-1, descending=True, stable=True).indices[:, :k]


def take(values: Tensor, index: Tensor, skip: int = 0) -> Tensor:
    """Rows of values [B, n, …] at index + skip, index [B, k] → [B, k, …], as one Gather on axis 0 of [B·n, …]."""
    return _rows(values, index + (_first_row(values) + skip), index.shape[1])


def look_up(table: Tensor, index: Tensor) -> Tensor:
    """Rows of a table [P, D] at index [B, k] → [B, k, D], as one Gather on axis 0."""
    rows: Tensor = table.index_select(0, index.reshape(-1)).unflatten(0, (-1, index.shape[1]))
    return rows


def membership(index: Tensor, count: int, skip: int = 0) -> Tensor:
    """1.0 where a slot of [B, count] is among index + skip, index [B, k] distinct in a row; else 0.0."""
    slots = torch.arange(-skip, count - skip, device=index.device)
    return (index.unsqueeze(-1) == slots).to(torch.float32).sum(dim=1)


def one_hot(index: Tensor, count: int) -> Tensor:
    """1.0 at [b, index[b, n], n], else 0.0: index [B, n] → [B, count, n]; a negative index marks nothing."""
    rows = torch.arange(count, device=index.device).unsqueeze(-1)
    return (index.unsqueeze(1) == rows).to(torch.float32)


def take_special(tokens: Tensor, rows: Tensor, special_tokens: int) -> Tensor:
    """The special tokens and the patch slots `rows` [B, k] of tokens [B, S + n, …] → [B, S + k, …]."""
    return _rows(tokens, _with_special(tokens, rows, special_tokens), special_tokens + rows.shape[1])


def keep_tokens(tokens: Tensor, state: TokenState, kept: Tensor, special_tokens: int) -> tuple[Tensor, TokenState]:
    """Keeps the special tokens and the patch slots `kept` [B, k] of tokens [B, S + n, C] → [B, S + k, C]."""
    return take_special(tokens, kept, special_tokens), keep_state(state, kept, special_tokens)


def keep_state(state: TokenState, kept: Tensor, special_tokens: int) -> TokenState:
    """The state of the patch slots `kept` [B, k]."""
    return replace(
        state,
        positions=take(state.positions, kept),
        sizes=None if state.sizes is None else take(state.sizes, kept),
        alive=None if state.alive is None else take_special(state.alive, kept, special_tokens),
        bias=None
        if state.bias is None
        else take_special(state.bias.flatten(1), kept, special_tokens).unsqueeze(1).unsqueeze(1),
    )


def mask_slots(state: TokenState, alive: Tensor) -> TokenState:
    """The state with the slots at 0 of alive [B, S + n] masked: attention does not see them, their positions are -1."""
    present = alive[:, -state.positions.shape[1] :]
    return replace(
        state,
        positions=torch.where(present > 0, state.positions, -1),
        alive=alive,
        bias=key_bias((1 - alive) * MASKED),
    )


def special_ahead(values: Tensor, special_tokens: int, fill: float) -> Tensor:
    """Values [B, n] of the patch slots with `fill` for the special tokens before them → [B, S + n]."""
    if not special_tokens:
        return values
    return torch.cat([torch.full_like(values[:, :1], fill)] * special_tokens + [values], dim=1)


def key_bias(values: Tensor) -> Tensor:
    """Values [B, N] as the bias [B, 1, 1, N] that attention adds for its keys."""
    return values.unsqueeze(1).unsqueeze(1)


def _with_special(tokens: Tensor, rows: Tensor, special_tokens: int) -> Tensor:
    first = _first_row(tokens)
    special = [first + slot for slot in range(special_tokens)]
    return torch.cat([*special, rows + (first + special_tokens)], dim=1)


def _first_row(values: Tensor) -> Tensor:
    """Where each image's rows begin [B, 1] once values [B, n, …] are flattened to [B·n, …]."""
    return torch.arange(values.shape[0], device=values.device).unsqueeze(1) * values.shape[1]


def _rows(values: Tensor, rows: Tensor, count: int) -> Tensor:
    picked: Tensor = values.flatten(0, 1).index_select(0, rows.reshape(-1)).unflatten(0, (-1, count))
    return picked
