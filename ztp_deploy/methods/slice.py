"""The slice twin: the same counts with the last tokens cut off unseen.

It does no selection, so a method's cost over its slice twin is the cost of its selection.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from ztp_deploy.methods.base import MethodOptions, Replay, StageModule, StageOutput
from ztp_deploy.models.base import Attention
from ztp_deploy.plan import Geometry, Place, Plan, Stage, floor_counts
from ztp_deploy.pruning.tokens import TokenState, keep_tokens

PLACE: Place = "after_block"
SUMMARY = "cuts the last tokens off unseen; the yardstick for what selection costs"


class Options(MethodOptions):
    """The slice twin has nothing to choose."""


def counts(geometry: Geometry, blocks: Sequence[int], ratio: float) -> list[int]:
    """n ← ⌊ρn⌋ per stage."""
    return floor_counts(geometry.patch_tokens, len(blocks), ratio)


def schedule(geometry: Geometry, blocks: Sequence[int], counts: Sequence[int], options: MethodOptions) -> list[Stage]:
    """One stage after each of `blocks`."""
    entering = [geometry.patch_tokens, *counts]
    return [
        Stage(block=block, place=PLACE, tokens_in=before, tokens_out=after)
        for block, before, after in zip(blocks, entering, counts, strict=False)
    ]


def score_names(stage: Stage) -> tuple[str, ...]:
    """None: nothing is scored."""
    return ()


def twin_of(plan: Plan) -> Plan:
    """The plan that cuts where `plan` selects: same blocks, places and counts, no selection."""
    stages = tuple(stage.model_copy(update={"static": {}}) for stage in plan.stages)
    return plan.model_copy(update={"method": "slice" if stages else "dense", "options": {}, "stages": stages})


class SliceStage(StageModule):
    """Keeps the special tokens and the first k patch slots."""

    def __init__(self, stage: Stage, special_tokens: int) -> None:
        super().__init__()
        self.keep = stage.tokens_out
        self.special_tokens = special_tokens

    def forward(
        self, tokens: Tensor, state: TokenState, attention: Attention | None, forced: Tensor | None = None
    ) -> StageOutput:
        if forced is not None:
            return StageOutput(*keep_tokens(tokens, state, forced, self.special_tokens), {})
        return StageOutput(
            tokens[:, : self.special_tokens + self.keep],
            replace(state, positions=state.positions[:, : self.keep]),
            {},
        )


def build_stage(stage: Stage, geometry: Geometry, options: MethodOptions) -> StageModule:
    """The stage for `stage`."""
    return SliceStage(stage, geometry.special_tokens)


def replay(stage: Stage, scores: Mapping[str, Tensor], geometry: Geometry, options: MethodOptions) -> Replay:
    """The first k slots; nothing was decided. `scores` is empty, so the batch axis has length 1."""
    return Replay(kept=torch.arange(stage.tokens_out).unsqueeze(0), decisions=())
