"""The control: tokens drawn at random, fixed by a seed, the same for every image.

Whatever a method gains over it in accuracy, at the same counts, is what its scores are worth.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import torch
from pydantic import Field
from torch import Tensor

from ztp_deploy.methods.base import MethodOptions, Replay, StageModule, StageOutput
from ztp_deploy.models.base import Attention
from ztp_deploy.plan import Geometry, Place, Stage, floor_counts, kept_chain
from ztp_deploy.plan import default_sites as default_sites
from ztp_deploy.pruning.tokens import TokenState, keep_tokens, slots_of

PLACES: tuple[Place, ...] = ("after_block",)
SUMMARY = "keeps tokens drawn at random once for all images; the control for what scores are worth"


class Options(MethodOptions):
    """`seed`: of the draw."""

    seed: int = Field(default=0, ge=0)


def counts(geometry: Geometry, blocks: Sequence[int], ratio: float, options: MethodOptions) -> list[int]:
    """n ← ⌊ρn⌋ per stage, as Zero-TPrune."""
    return floor_counts(geometry.patch_tokens, len(blocks), ratio)


def schedule(geometry: Geometry, blocks: Sequence[int], counts: Sequence[int], options: MethodOptions) -> list[Stage]:
    """One stage after each of `blocks`."""
    return [
        Stage(block=block, place=PLACES[0], tokens_in=before, tokens_out=after)
        for block, before, after in kept_chain(geometry.patch_tokens, blocks, counts)
    ]


def refuses(geometry: Geometry, options: MethodOptions) -> str | None:
    """Any token can go."""
    return None


def merges(options: MethodOptions) -> bool:
    """No."""
    return False


def untrained(options: MethodOptions) -> str | None:
    """Without tokens drawn at random the model still works, if badly: that is what it is for."""
    return None


def score_names(stage: Stage) -> tuple[str, ...]:
    """None: nothing is scored."""
    return ()


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
