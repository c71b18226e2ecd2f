"""A-ViT (Yin et al., CVPR 2022, arXiv:2112.07658): tokens halt when what they gathered from block to block is enough.

After every block each token, the class token too, adds a halting score to its sum: the sigmoid of its own first
channel, scaled and shifted. It halts once the sum reaches 1 − ε; its output is the average of what the
blocks made of it, weighted by the scores, the last block before halting by the remainder (section 3). The
classifier reads that average. Backbones have to be trained for it.

Two forms, written into every plan as the option `form`:

* "compact", the default: fixed counts. At its sites the k tokens with the smallest sums stay and the rest are
  dropped, which saves their time; the weights are those of the method. What a dropped token had gathered goes with it, so
  that a mean over patches is one over the survivors. Tokens that halted all count as equal, and those that stay
  because there is room are still attended to, though they gather nothing more.
* "masked": the published one. Tokens stay in place, and attention no longer sees those that halted; no time is saved. Every
  token is read out with all it gathered.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Literal

import torch
from pydantic import Field
from torch import Tensor

from ztp_deploy.errors import BadRequest
from ztp_deploy.methods.base import (
    Decision,
    MethodOptions,
    Replay,
    StageModule,
    StageOutput,
    any_backbone,
    only_drops,
    top_k_margin,
)
from ztp_deploy.methods.share import one_share_counts
from ztp_deploy.models.base import Attention
from ztp_deploy.plan import Geometry, Place, Stage
from ztp_deploy.plan import default_sites as spaced_sites
from ztp_deploy.pruning.tokens import TokenState, keep_state, mask_slots, slots_of, take_special, top_k

PLACES: tuple[Place, ...] = ("read_out",)
SUMMARY = "trained halting, read out by halting weights; compact (fixed counts) or masked, as published (CVPR 2022)"
SEARCH = "it lets tokens halt at every block by themselves and has no stages to place"
refuses = any_backbone
merges = only_drops

EPSILON = 0.01
THRESHOLD = 1 - EPSILON
STEEPEST = 80.0
"""Logits beyond ±80 count as that much: e⁸⁰ is still a float32."""


class Options(MethodOptions):
    """Choices of A-ViT; a backbone trained with it needs the numbers that it was trained with.

    A token's halting score is sigmoid(first channel · `gate_scale` − `gate_center`); the published models have 10 and
    30 (tiny), 10 and 75 (small). `form`: "compact" or "masked" (see the module's text). `trained`: whether this
    backbone was trained with A-ViT; where it was not, its predictions mean nothing.
    """

    gate_scale: float = Field(default=10.0, gt=0, allow_inf_nan=False)
    gate_center: float = Field(default=30.0, allow_inf_nan=False)
    form: Literal["compact", "masked"] = "compact"
    trained: bool = False


# --- counts ------------------------------------------------------------------------------------


def default_sites(depth: int, stages: int | None = None) -> list[int]:
    """After every block but the last, which nothing follows; evenly spaced ones for another number of stages."""
    if stages in (None, depth - 1, depth):
        return list(range(1, (stages or max(depth - 1, 1)) + 1))
    return spaced_sites(depth, stages)


def counts(geometry: Geometry, blocks: Sequence[int], ratio: float, options: MethodOptions) -> list[int]:
    """One share for all sites, with the FLOP share that Zero-TPrune has at `ratio`."""

    def stages_for(counts: list[int]) -> list[Stage]:
        return _stages(geometry, blocks, counts)

    return one_share_counts(geometry, len(blocks), ratio, stages_for)


def schedule(geometry: Geometry, blocks: Sequence[int], counts: Sequence[int], options: MethodOptions) -> list[Stage]:
    """A stage after every block, since all of them gather; tokens are dropped at `blocks` alone.

    Raises BadRequest where the masked form is asked to drop any.
    """
    assert isinstance(options, Options)
    if options.form == "masked" and min(counts) < geometry.patch_tokens:
        raise BadRequest(
            f"The masked form of A-ViT leaves all {geometry.patch_tokens} tokens in place and decides itself which "
            f"ones halt; {min(counts)} was asked for.",
            'Ask for ratio=1, or for options={"form": "compact"}.',
        )
    return _stages(geometry, blocks, counts)


def _stages(geometry: Geometry, blocks: Sequence[int], counts: Sequence[int]) -> list[Stage]:
    wanted = dict(zip(blocks, counts, strict=True))
    stages, before = [], geometry.patch_tokens
    for block in range(1, geometry.depth + 1):
        after = wanted.get(block, before)
        static = {} if after < before else {"top_k": 0}
        stages.append(Stage(block=block, place=PLACES[0], tokens_in=before, tokens_out=after, static=static))
        before = after
    return stages


def untrained(options: MethodOptions) -> str | None:
    """The backbone must have learned to halt, which only the caller can know."""
    assert isinstance(options, Options)
    if options.trained:
        return None
    return (
        "A-ViT reads halting scores off a channel that only training with A-ViT makes one, and this backbone is not "
        "said to have had it (option trained)"
    )


def score_names(stage: Stage) -> tuple[str, ...]:
    """Halting sums [B, S + n] after the block; -1 for slots that were masked before."""
    return ("halting",)


# --- pure scores -------------------------------------------------------------------------------


@dataclass(frozen=True)
class Gathered:
    """What tokens carry from block to block.

    `halting` [B, N] float32: sums of halting scores, which decide. `remainder` [B, N]: the weight left to give.
    `output` [B, N, C]: the weighted sum of the block outputs so far.
    """

    halting: Tensor
    remainder: Tensor
    output: Tensor


def nothing_gathered(tokens: Tensor) -> Gathered:
    """Before the first block, for tokens [B, N, C]."""
    channel = tokens[:, :, 0]
    return Gathered(torch.zeros_like(channel, dtype=torch.float32), torch.ones_like(channel), torch.zeros_like(tokens))


def halting_score(tokens: Tensor, scale: float, center: float) -> Tensor:
    """What decides: sigmoid(channel 0 · scale − center) of tokens [B, N, C] as float32 [B, N]."""
    # Engines' own sigmoids are off by 1e-7 and end at 0, which would leave tokens far from halting without an order.
    logit = (center / scale - tokens[:, :, 0].float()) * scale
    return 1 / (1 + logit.clamp(-STEEPEST, STEEPEST).exp())


def rank(halting: Tensor) -> Tensor:
    """What compact stages keep the k largest of: how far sums [B, n] are from halting, all that halted being equal."""
    return -halting.clamp_max(THRESHOLD)


def gather(
    gathered: Gathered, tokens: Tensor, halting: Tensor, running: Tensor, goes_on: Tensor, options: Options, last: bool
) -> Gathered:
    """One block's output [B, N, C] added with its weight: its halting score where the token goes on, else what is left.

    `running` and `goes_on` [B, N] bool: before and after this block's score; after the last block nothing goes on.
    """
    # The weights go the way of the tokens, in their precision; what decides has a float32 way of its own.
    weight = gathered.remainder
    if not last:
        score = ((tokens[:, :, 0] - options.gate_center / options.gate_scale) * options.gate_scale).sigmoid()
        weight = torch.where(goes_on, score, weight)
    weight = torch.where(running, weight, 0)
    output = gathered.output + weight.unsqueeze(2) * tokens
    return Gathered(halting, gathered.remainder - weight, output)


# --- the stage ---------------------------------------------------------------------------------


class AVitStage(StageModule):
    """Gathers a block's output and lets tokens halt, then drops or masks; the last one hands on what was gathered."""

    def __init__(self, stage: Stage, geometry: Geometry, options: Options) -> None:
        super().__init__()
        self.stage = stage
        self.special_tokens = geometry.special_tokens
        self.last = stage.block == geometry.depth
        self.options = options

    def forward(
        self, tokens: Tensor, state: TokenState, attention: Attention | None, forced: Tensor | None = None
    ) -> StageOutput:
        before = self._gathered(tokens, state)
        halting = before.halting + halting_score(tokens, self.options.gate_scale, self.options.gate_center)
        if self.options.form == "masked":
            running = torch.ones_like(halting, dtype=torch.bool) if state.alive is None else state.alive > 0
            goes_on = running & (halting < THRESHOLD)
            if forced is not None:
                goes_on = torch.cat([goes_on[:, : self.special_tokens], _among(state.positions, forced)], dim=1)
            reported = torch.where(running, halting, -1.0)
        else:
            running, goes_on, reported = before.halting < THRESHOLD, halting < THRESHOLD, halting
        now = gather(before, tokens, halting, running, goes_on, self.options, self.last)
        if self.options.form == "masked":
            state = mask_slots(state, goes_on.float())
        elif self.stage.tokens_out < self.stage.tokens_in:
            tokens, state, now = self._drop(tokens, state, now, forced)
        if self.last:
            # Whatever is left has gathered all it can, halted or not: the read-out sees every slot.
            return StageOutput(now.output, replace(state, alive=None, bias=None, carried={}), {"halting": reported})
        return StageOutput(tokens, replace(state, carried=vars(now)), {"halting": reported})

    def _gathered(self, tokens: Tensor, state: TokenState) -> Gathered:
        if self.stage.block == 1:
            return nothing_gathered(tokens)
        if not state.carried:
            raise BadRequest(
                f"The plan's first A-ViT stage is at block {self.stage.block}; tokens gather from the first block on.",
                "Make the plan anew with `ztp plan`.",
            )
        return Gathered(**state.carried)

    def _drop(
        self, tokens: Tensor, state: TokenState, now: Gathered, forced: Tensor | None
    ) -> tuple[Tensor, TokenState, Gathered]:
        if forced is None:
            kept = top_k(rank(now.halting[:, self.special_tokens :]), self.stage.tokens_out)
        else:
            kept = slots_of(forced, state)
        parts = (tokens, now.halting, now.remainder, now.output)
        tokens, halting, remainder, output = (take_special(part, kept, self.special_tokens) for part in parts)
        return tokens, keep_state(state, kept, self.special_tokens), Gathered(halting, remainder, output)


def _among(positions: Tensor, forced: Tensor) -> Tensor:
    """Which slots [B, n] hold one of the positions that are forced [B, k]."""
    return (positions.unsqueeze(2) == forced.unsqueeze(1)).any(2) & (positions >= 0)


def build_stage(stage: Stage, geometry: Geometry, options: MethodOptions, weights: Mapping[str, Tensor]) -> StageModule:
    """The stage for `stage`. Raises BadRequest where a masked one is to drop tokens (a plan edited by hand)."""
    assert isinstance(options, Options)
    if options.form == "masked" and stage.tokens_out < stage.tokens_in:
        raise BadRequest(
            f"The stage at block {stage.block} drops tokens, which the masked form of A-ViT does not.",
            "Make the plan anew with `ztp plan`.",
        )
    return AVitStage(stage, geometry, options)


# --- replay ------------------------------------------------------------------------------------


def replay(stage: Stage, scores: Mapping[str, Tensor], geometry: Geometry, options: MethodOptions) -> Replay:
    """Recomputes what stays from the patch slots' halting sums, with every decision and its margin.

    Masked: relative distance of the sum from the threshold; compact: of its rank from the cut.
    """
    assert isinstance(options, Options)
    halting = scores["halting"][:, geometry.special_tokens :]
    slots = torch.arange(stage.tokens_in, device=halting.device).expand(halting.shape)
    if options.form == "masked":
        margin = torch.where(halting >= 0, (THRESHOLD - halting) / THRESHOLD, -torch.inf)
        return Replay(torch.where(margin > 0, slots, -1), (Decision("halted", margin),))
    if stage.tokens_out == stage.tokens_in:
        return Replay(slots, ())
    ranked = rank(halting)
    return Replay(top_k(ranked, stage.tokens_out), (Decision("halting", top_k_margin(ranked, stage.tokens_out)),))
