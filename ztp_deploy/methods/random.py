"""The control: tokens drawn at random, fixed by a seed, the same for every image.

Whatever a method gains over it in accuracy, at the same counts, is what its scores are worth.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import torch
from pydantic import Field
from torch import Tensor

from ztp_deploy.methods.base import (
    MethodOptions,
    Replay,
    Search,
    StageModule,
    StageOutput,
    any_backbone,
    needs_no_training,
    only_drops,
)
from ztp_deploy.methods.slice import counts as counts
from ztp_deploy.methods.slice import schedule as schedule
from ztp_deploy.methods.slice import score_names as score_names
from ztp_deploy.models.base import Attention
from ztp_deploy.plan import Geometry, Place, Stage
from ztp_deploy.plan import default_sites as default_sites
from ztp_deploy.pruning.tokens import TokenState, keep_tokens, slots_of

PLACES: tuple[Place, ...] = ("after_block",)
SUMMARY = "keeps tokens drawn at random once for all images; the control for what scores are worth"
SEARCH = Search()
refuses = any_backbone
merges = only_drops
untrained = needs_no_training


class Options(MethodOptions):
    """`seed`: of the draw."""

    seed: int = Field(default=0, ge=0)


def draw(stage: Stage, seed: int) -> list[int]:
    """The patch slots [k] that a stage keeps, ascending: other ones at every block and for every seed."""
    drawn = np.random.default_rng([seed, stage.block]).permutation(stage.tokens_in)[: stage.tokens_out]
    return sorted(drawn.tolist())


class RandomStage(StageModule):
    """Keeps the special tokens and the patch slots that were drawn."""

    slots: Tensor

    def __init__(self, stage: Stage, geometry: Geometry, seed: int) -> None:
        super().__init__()
        self.special_tokens = geometry.special_tokens
        self.register_buffer("slots", torch.tensor(draw(stage, seed)), persistent=False)

    def forward(
        self, tokens: Tensor, state: TokenState, attention: Attention | None, forced: Tensor | None = None
    ) -> StageOutput:
        kept = self.slots.expand(tokens.shape[0], -1) if forced is None else slots_of(forced, state)
        return StageOutput(*keep_tokens(tokens, state, kept, self.special_tokens), {})


def build_stage(stage: Stage, geometry: Geometry, options: MethodOptions, weights: Mapping[str, Tensor]) -> StageModule:
    """The stage for `stage`."""
    assert isinstance(options, Options)
    return RandomStage(stage, geometry, options.seed)


def replay(stage: Stage, scores: Mapping[str, Tensor], geometry: Geometry, options: MethodOptions) -> Replay:
    """The slots that were drawn; nothing was decided. `scores` is empty, so the batch axis has length 1."""
    assert isinstance(options, Options)
    return Replay(kept=torch.tensor([draw(stage, options.seed)]), decisions=())
