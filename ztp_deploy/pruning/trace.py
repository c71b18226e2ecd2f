"""`trace_tokens`: which tokens each stage kept, and what became of every patch."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ztp_deploy.pruning.prune import PrunedModel


@dataclass(frozen=True)
class TokenTrace:
    """One stage's selection, for a batch.

    `kept` [B, k] int32: original patch positions in ascending order, -1 for a masked slot.
    `assignment` [B, n0] int32: for every patch of the image, -1 if it is dropped, else the index in
    `kept` of the output token that carries it.
    """

    block: int
    kept: Tensor
    assignment: Tensor


def trace_tokens(pruned: PrunedModel, images: Tensor) -> list[TokenTrace]:
    """Runs images [B, 3, H, W] and reports every stage's selection, in block order."""
    with torch.inference_mode():
        outputs = pruned.run(images)
    return [
        _trace(stage.block, kept, pruned.plan.patch_tokens)
        for stage, kept in zip(pruned.plan.stages, outputs.kept, strict=True)
    ]


def _trace(block: int, positions: Tensor, patch_tokens: int) -> TokenTrace:
    kept = positions.sort(dim=1).values
    assignment = torch.full((kept.shape[0], patch_tokens), -1, dtype=torch.int32, device=kept.device)
    slots = torch.arange(kept.shape[1], dtype=torch.int32, device=kept.device).expand_as(kept)
    return TokenTrace(block, kept, assignment.scatter(1, kept.long(), slots))
