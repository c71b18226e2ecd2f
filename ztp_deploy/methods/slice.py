"""The slice twin: the same counts with the last tokens cut off unseen.

It does no selection, so a method's cost over its slice twin is the cost of its selection.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from ztp_deploy.methods.base import (
    MethodOptions,
    Replay,
    StageModule,
    StageOutput,
    any_backbone,
    needs_no_training,
    only_drops,
)
from ztp_deploy.models.base import Attention
from ztp_deploy.plan import Geometry, Place, Plan, Stage, floor_counts, kept_chain
from ztp_deploy.plan import default_sites as default_sites
from ztp_deploy.pruning.tokens import TokenState, keep_tokens, slots_of

PLACES: tuple[Place, ...] = ("after_block", "before_block", "attention_rows", "after_attention", "read_out")
SUMMARY = "cuts the last tokens off without looking; the yardstick for what selection costs"
SEARCH = "it selects nothing: it is the yardstick for what selection costs"
refuses = any_backbone
merges = only_drops
untrained = needs_no_training


class Options(MethodOptions):
    """The slice twin has nothing to choose."""


def counts(geometry: Geometry, blocks: Sequence[int], ratio: float, options: MethodOptions) -> list[int]:
    """n ← ⌊ρn⌋ per stage (196 at 0.7: 137, 95, 66)."""
    return floor_counts(geometry.patch_tokens, len(blocks), ratio)


def schedule(geometry: Geometry, blocks: Sequence[int], counts: Sequence[int], options: MethodOptions) -> list[Stage]:
    """One stage after each of `blocks`."""
    return [
        Stage(block=block, place=PLACES[0], tokens_in=before, tokens_out=after)
        for block, before, after in kept_chain(geometry.patch_tokens, blocks, counts)
    ]


def score_names(stage: Stage) -> tuple[str, ...]:
    """None: nothing is scored."""
    return ()


def twin_of(plan: Plan) -> Plan:
    """The plan that cuts where `plan` selects: same blocks, places and counts, no selection."""
    if not plan.stages:
        return plan
    stages = tuple(stage.model_copy(update={"static": {}}) for stage in plan.stages)
    # Twins of different methods cut at different blocks: the folder's name must tell them apart.
    asked = {**plan.asked, "twin_of": plan.method}
    return plan.model_copy(update={"method": "slice", "options": {}, "asked": asked, "stages": stages})


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
            kept = slots_of(forced, state)
            return StageOutput(*keep_tokens(tokens, state, kept, self.special_tokens), {}, rows=kept)
        rows = torch.arange(self.keep, device=tokens.device).expand(tokens.shape[0], -1)
        positions = state.positions[:, : self.keep]
        return StageOutput(
            tokens[:, : self.special_tokens + self.keep], replace(state, positions=positions), {}, rows=rows
        )


def build_stage(stage: Stage, geometry: Geometry, options: MethodOptions, weights: Mapping[str, Tensor]) -> StageModule:
    """The stage for `stage`."""
    return SliceStage(stage, geometry.special_tokens)


def replay(stage: Stage, scores: Mapping[str, Tensor], geometry: Geometry, options: MethodOptions) -> Replay:
    """The first k slots; nothing was decided. `scores` is empty, so the batch axis has length 1."""
    return Replay(kept=torch.arange(stage.tokens_out).unsqueeze(0), decisions=())
