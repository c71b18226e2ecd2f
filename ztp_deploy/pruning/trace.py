"""`trace_tokens`: which tokens each stage kept, and what became of every patch."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ztp_deploy.pruning.prune import PrunedModel


@dataclass(frozen=True)
class TokenTrace:
    """One stage's selection, for a batch.

    `kept` [B, k] int32: original patch positions in ascending order, -1 for a masked slot; patch_tokens + i
    is a token that stage i made anew from several.
    `assignment` [B, n0] int32: for every patch of the image, -1 if it is dropped, else the index in
    `kept` of the output token that carries it.
    """

    block: int
    kept: Tensor
    assignment: Tensor


def trace_tokens(pruned: PrunedModel, images: Tensor) -> list[TokenTrace]:
    """Runs images [B, 3, H, W] on the module's device and reports every stage's selection, in block order."""
    with torch.inference_mode():
        outputs = pruned.run(images.to(next(pruned.parameters()).device))
    patches = pruned.plan.patch_tokens
    kept = [positions.cpu().numpy() for positions in outputs.kept]
    assignments = assign(kept, [merged.cpu().numpy() for merged in outputs.merged], patches)
    return [
        TokenTrace(stage.block, torch.from_numpy(np.sort(now, axis=1)), torch.from_numpy(carried))
        for stage, now, carried in zip(pruned.plan.stages, kept, assignments, strict=True)
    ]


def assign(kept: Sequence[NDArray[Any]], merged: Sequence[NDArray[Any]], patch_tokens: int) -> list[NDArray[np.int32]]:
    """Per stage, for every patch [B, n0] the index of its token in the sorted positions, -1 where it is dropped.

    `kept` [B, k] are positions in slot order, -1 masked; `merged` [B, n] the slots that entering slots went
    into, empty for methods that only drop.
    """
    found = []
    slots = np.tile(np.arange(patch_tokens, dtype=np.int32), (len(kept[0]) if kept else 0, 1))
    for index, positions in enumerate(kept):
        if merged:
            slots = np.where(slots < 0, -1, np.take_along_axis(merged[index], slots.clip(0), axis=1))
        else:
            slots = _slots_by_position(positions, patch_tokens)
        order = np.argsort(positions, axis=1, kind="stable")
        ranks = np.argsort(order, axis=1, kind="stable").astype(np.int32)
        found.append(np.where(slots < 0, np.int32(-1), np.take_along_axis(ranks, slots.clip(0), axis=1)))
    return found


def _slots_by_position(positions: NDArray[Any], patch_tokens: int) -> NDArray[np.int32]:
    slots = np.full((len(positions), patch_tokens + 1), -1, dtype=np.int32)
    numbers = np.broadcast_to(np.arange(positions.shape[1], dtype=np.int32), positions.shape)
    np.put_along_axis(slots, positions.astype(np.int64), numbers, axis=1)  # -1 lands in the last column
    return slots[:, :patch_tokens]
