"""`trace_tokens`: which tokens each stage kept, and what became of every patch."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from ztp_deploy.pruning.assignment import assign
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
