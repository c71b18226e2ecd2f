"""DiffRate (Chen, Shao, Xu, Lin, Ma, Chao, Ji, Qiao, Luo, ICCV 2023, arXiv:2305.17997) as it runs once its rates are known.

Between attention and MLP of a block, tokens are ranked by the class token's attention to them, mean over heads. The
tail is pruned; of what is left, the new tail joins its most similar tokens ahead of it by a plain mean (section 3.2).
Attention adds the logarithm of each key's size, to which a joining token adds its own times the cosine.
The rates are what DiffRate learns; here they come with the plan.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from fractions import Fraction
from typing import Annotated

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
    class_rows,
    misnumbered,
    needs_no_training,
    top_k_margin,
)
from ztp_deploy.methods.share import counts_after, counts_at_share, spread, zero_tprune_share
from ztp_deploy.models.base import Attention
from ztp_deploy.plan import Geometry, Place, Stage, every_block, kept_chain
from ztp_deploy.pruning.merge import Joining, destination_slots, directions, forced_joining, join, partner_margin
from ztp_deploy.pruning.tokens import (
    TokenState,
    keep_tokens,
    key_bias,
    one_hot,
    special_ahead,
    take,
    take_special,
    top_k,
)

PLACES: tuple[Place, ...] = ("after_attention",)
SUMMARY = "prunes the least attended tokens, merges the next (ICCV 2023); takes the learned rates with keep and pruned"
SEARCH = "its numbers for every block were learned with its checkpoint"
untrained = needs_no_training

FLOOR = 2.0**-13
"""Of sizes, whose logarithm is taken and which negative cosines could use up; exact in every precision."""

default_sites = every_block


class Options(MethodOptions):
    """Choices of DiffRate.

    `pruned`: how many of the tokens that leave a block are pruned, the others merge: a share of them, rounded (half
    up), or one number per site. `proportional`: attention weighs keys by size. `weigh_mean`: read-outs that average
    over patches weigh by size, as the authors do for MAE.
    """

    pruned: Annotated[float, Field(ge=0, le=1)] | list[Annotated[int, Field(ge=0)]] = 0.5
    proportional: bool = True
    weigh_mean: bool = True


# --- counts ------------------------------------------------------------------------------------


def counts(geometry: Geometry, blocks: Sequence[int], ratio: float, options: MethodOptions) -> list[int]:
    """As many removed in every block, by the FLOP share that Zero-TPrune has at the ratio with its default sites."""
    tokens, number = geometry.patch_tokens, len(blocks)

    def counts_for(total: int) -> list[int]:
        return counts_after(tokens, spread(total, number), lambda left: left - 1)

    def stages_for(counts: list[int]) -> list[Stage]:
        return [
            Stage(block=block, place=PLACES[0], tokens_in=before, tokens_out=after)
            for block, before, after in kept_chain(tokens, blocks, counts)
        ]

    return counts_at_share(geometry, zero_tprune_share(geometry, ratio), tokens * number, counts_for, stages_for)


def schedule(geometry: Geometry, blocks: Sequence[int], counts: Sequence[int], options: MethodOptions) -> list[Stage]:
    """One stage in each of `blocks` that removes any, with `pruned` and `top_k` (what pruning leaves).

    Raises BadRequest where `pruned` does not fit the counts.
    """
    assert isinstance(options, Options)
    if isinstance(options.pruned, list) and len(options.pruned) != len(blocks):
        raise BadRequest(
            f"pruned={options.pruned} has {len(options.pruned)} entries for {len(blocks)} sites.",
            "Give one share, or one number per site.",
        )
    stages = []
    for block, before, after in kept_chain(geometry.patch_tokens, blocks, counts):
        if isinstance(options.pruned, list):
            pruned = options.pruned[list(blocks).index(block)]
        else:
            pruned = math.floor(Fraction(repr(options.pruned)) * (before - after) + Fraction(1, 2))
        if pruned > before - after:
            raise BadRequest(
                f"At block {block} only {before - after} tokens leave; pruned={pruned} is more.",
                "Lower it, or keep fewer.",
            )
        static = {"pruned": pruned, "top_k": before - pruned}
        stages.append(Stage(block=block, place=PLACES[0], tokens_in=before, tokens_out=after, static=static))
    return stages


def refuses(geometry: Geometry, options: MethodOptions) -> str | None:
    """Tokens are ranked by the attention of a class token."""
    return None if geometry.class_token is not None else "it ranks tokens by the class token, and this model has none."


def merges(options: MethodOptions) -> bool:
    """Yes."""
    return True


def score_names(stage: Stage) -> tuple[str, ...]:
    """Class attention [B, n] and, where any merge, cosines [B, r, k] of those with the kept ones, both by rank."""
    return ("score", "similarity") if joining_in(stage) else ("score",)


def joining_in(stage: Stage) -> int:
    """How many tokens merge into others at a stage."""
    return stage.tokens_in - stage.static["pruned"] - stage.tokens_out


# --- pure scores -------------------------------------------------------------------------------


def cosines(rows: Tensor, kept: int, special_tokens: int) -> Tensor:
    """Similarity [B, r, k] of the tokens after the first `kept` = k patch tokens of rows [B, S + k + r, C] with those."""
    features = directions(rows[:, special_tokens:])
    return features[:, kept:] @ features[:, :kept].transpose(1, 2)


def likeness(rows: Tensor, target: Tensor, kept: int, special_tokens: int) -> Tensor:
    """Cosine [B, r] of the tokens after the first `kept` patch tokens of rows with those they join, by target [B, r].

    Computed apart from `cosines`: sizes bear on the logits and follow the tokens' precision, the choice does not.
    """
    leaving = rows[:, special_tokens + kept :].float()
    targets = take(rows, target, skip=special_tokens).float()
    # Means, not sums: fp16 cannot hold the latter.
    lengths = (leaving * leaving).mean(-1).sqrt() * (targets * targets).mean(-1).sqrt()
    return (leaving * targets).mean(-1) / lengths.clamp_min(FLOOR)


# --- the stage ---------------------------------------------------------------------------------


class DiffRateStage(StageModule):
    """Ranks by class attention, prunes the tail and joins the next tokens to those ahead of them."""

    needs_attention = True

    def __init__(self, stage: Stage, geometry: Geometry, options: Options) -> None:
        super().__init__()
        assert geometry.class_token is not None
        self.stage = stage
        self.joins = joining_in(stage)
        self.special_tokens = geometry.special_tokens
        self.class_token = geometry.class_token
        self.options = options

    def forward(
        self, tokens: Tensor, state: TokenState, attention: Attention | None, forced: Tensor | None = None
    ) -> StageOutput:
        assert attention is not None
        kept, entering, special = self.stage.tokens_out, self.stage.tokens_in, self.special_tokens
        score = class_rows(attention.probabilities, self.class_token, special).float().mean(1)
        order = top_k(score, self.stage.static["top_k"])
        scores = {"score": score}
        if self.joins:
            rows = take_special(tokens, order, special)
            scores["similarity"] = similarity = cosines(rows, kept, special)
            joining = Joining(order[:, :kept], order[:, kept:], similarity.argmax(2))
            if forced is not None:
                joining = self._forced(forced, state)
                rows = take_special(tokens, joining.order, special)
            tokens, _ = join(rows, joining.target, kept, special)
            state = self._sized(state, joining, likeness(rows, joining.target, kept, special))
            merged = joining.destination_slots(entering)
        else:
            stay = order if forced is None else self._forced(forced, state).stay
            tokens, state = keep_tokens(tokens, state, stay, special)
            merged = destination_slots(stay, torch.arange(kept, device=stay.device).expand_as(stay), entering)
        return StageOutput(tokens, replace(state, weigh_mean=self.options.weigh_mean), scores, merged)

    def _forced(self, destinations: Tensor, state: TokenState) -> Joining:
        slots = torch.arange(self.stage.tokens_in, device=destinations.device)
        return forced_joining(destinations, state, self.stage.tokens_out, self.joins, slots)

    def _sized(self, state: TokenState, joining: Joining, added: Tensor) -> TokenState:
        """Positions and sizes after joining; a token that joins adds its size times `added` [B, r]."""
        kept = self.stage.tokens_out
        own: Tensor | float = 1.0
        if state.sizes is not None:
            before = take(state.sizes, joining.order)
            own, added = before[:, :kept], added * before[:, kept:]
        sizes = ((one_hot(joining.target, kept) * added.unsqueeze(1)).sum(2) + own).clamp_min(FLOOR)
        bias = key_bias(special_ahead(sizes.log(), self.special_tokens, 0.0)) if self.options.proportional else None
        return replace(state, positions=take(state.positions, joining.stay), sizes=sizes, bias=bias)


def build_stage(stage: Stage, geometry: Geometry, options: MethodOptions, weights: Mapping[str, Tensor]) -> StageModule:
    """The stage for `stage`. Raises BadRequest where its fixed numbers cannot be (a plan edited by hand)."""
    assert isinstance(options, Options)
    most, pruned = stage.tokens_in - stage.tokens_out, stage.static.get("pruned", -1)
    if not 0 <= pruned <= most or stage.static != {"pruned": pruned, "top_k": stage.tokens_in - pruned}:
        raise misnumbered(stage, f"DiffRate needs pruned from 0 to {most} and top_k = {stage.tokens_in} - pruned")
    return DiffRateStage(stage, geometry, options)


# --- replay ------------------------------------------------------------------------------------


def replay(stage: Stage, scores: Mapping[str, Tensor], geometry: Geometry, options: MethodOptions) -> Replay:
    """Recomputes who is pruned, who merges and into whom from class attention and cosines."""
    score, entering, kept = scores["score"], stage.tokens_in, stage.tokens_out
    left = stage.static["top_k"]
    order = top_k(score, left)
    stay, leave = order[:, :kept], order[:, kept:]
    goes = torch.full((len(score), entering), -1).scatter(1, stay, stay)
    decisions = []
    if left < entering:
        decisions.append(Decision("importance", top_k_margin(score, left)))
    if joining_in(stage):
        similarity = scores["similarity"]
        goes = goes.scatter(1, leave, stay.gather(1, similarity.argmax(2)))
        decisions.append(Decision("merged", top_k_margin(score, kept)))
        decisions.append(Decision("partner", partner_margin(similarity, leave, stay, entering)))
    return Replay(kept=stay, decisions=tuple(decisions), goes=goes)
