"""Adaptive Token Sampling (Fayyaz et al., ECCV 2022, arXiv:2111.15667): training-free sampling by class attention.

A token's significance is the attention that the class token pays it, times the length of its value. A stage
lays evenly spaced points over the cumulative distribution of the significance and takes the token nearest to each;
significant tokens are hit by many points and stay once. Only the attention rows of the tokens that were taken
are multiplied with the values (paper, section 3).

Two forms, written into every plan as the option `form`:

* "compact", the default: exactly k tokens. k points are laid; the tokens they pick stay, and the most
  significant of the others fill the places that points left empty by meeting on one token.
* "masked": the published one. The places left empty are masked instead, so that an image keeps as many tokens as it
  needs, up to the budget; shapes are fixed and time is not saved.

Official code, whose budget is the number of all patches at every stage, pads the images of a batch to the fullest of
them, and padding moves the distribution's start. Here every image is sampled as official code samples it alone, unless
`batch_padding` asks for the official batch; no engine is made of that.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Literal

import torch
from pydantic import model_validator
from torch import Tensor

from ztp_deploy.methods.base import (
    Decision,
    MethodOptions,
    Replay,
    StageModule,
    StageOutput,
    misnumbered,
    needs_no_training,
    only_drops,
    top_k_margin,
)
from ztp_deploy.methods.share import one_share_counts
from ztp_deploy.models.base import Attention
from ztp_deploy.plan import Geometry, Place, Stage, following_sites
from ztp_deploy.pruning.tokens import (
    TokenState,
    keep_tokens,
    mask_slots,
    one_hot,
    slots_of,
    special_ahead,
    take,
    top_k,
)

PLACES: tuple[Place, ...] = ("attention_rows",)
SUMMARY = "training-free: samples by class attention; compact (exactly k tokens) or masked, as published (ECCV 2022)"
SEARCH = "it has a number for every block and no stages to place"
merges = only_drops
untrained = needs_no_training

TINY = torch.finfo(torch.float32).tiny


class Options(MethodOptions):
    """Choices of ATS. `form`: "compact" keeps exactly k tokens, "masked" up to k (see the module's text).

    `batch_padding`, of the masked form: images with fewer tokens than the fullest of their batch are sampled as if
    padded, to compare with official code. What an image keeps then depends on its neighbours, so that it is not exported.
    """

    form: Literal["compact", "masked"] = "compact"
    batch_padding: bool = False

    @model_validator(mode="after")
    def _padded_where_masked(self) -> Options:
        if self.batch_padding and self.form != "masked":
            raise ValueError("batch_padding belongs to the masked form")
        return self


# --- counts ------------------------------------------------------------------------------------


def default_sites(depth: int, stages: int | None = None) -> list[int]:
    """The last three quarters of the blocks (4 … 12 of 12, as published); `following_sites` for another number."""
    published = list(range(depth // 4 + 1, depth + 1))
    return published if stages in (None, len(published)) else following_sites(depth, stages)


def counts(geometry: Geometry, blocks: Sequence[int], ratio: float, options: MethodOptions) -> list[int]:
    """One share for all stages, with the FLOP share that Zero-TPrune has at `ratio`."""

    def stages_for(counts: list[int]) -> list[Stage]:
        return schedule(geometry, blocks, counts, options)

    return one_share_counts(geometry, len(blocks), ratio, stages_for)


def schedule(geometry: Geometry, blocks: Sequence[int], counts: Sequence[int], options: MethodOptions) -> list[Stage]:
    """One stage in each of `blocks`, with as many sampling `points` as it keeps tokens.

    A masked stage samples even where its budget is all that reaches it; a compact one would change nothing then.
    """
    assert isinstance(options, Options)
    stages, before = [], geometry.patch_tokens
    for block, after in zip(blocks, counts, strict=True):
        if after < before or options.form == "masked":
            static = {"points": after}
            stages.append(Stage(block=block, place=PLACES[0], tokens_in=before, tokens_out=after, static=static))
        before = after
    return stages


def refuses(geometry: Geometry, options: MethodOptions) -> str | None:
    """It needs the class token, whose attention is the significance."""
    return None if geometry.class_token is not None else "it has no class token, whose attention ATS samples by."


def score_names(stage: Stage) -> tuple[str, ...]:
    """Significance [B, n] of the patch slots, summing to 1; -1 for slots that were masked before."""
    return ("significance",)


# --- pure scores -------------------------------------------------------------------------------


def significance(attention: Attention, class_token: int, special_tokens: int, alive: Tensor | None = None) -> Tensor:
    """Class attention summed over heads × length of the value over all heads, [B, n], summing to 1.

    `alive` [B, n]: 0.0 for masked slots, which get 0.
    """
    row = attention.probabilities[:, :, class_token].float().sum(1)  # [B, S + n]
    values = attention.values.float()
    score = (row * (values * values).sum((1, 3)).sqrt())[:, special_tokens:]
    if alive is not None:
        score = score * alive
    return score / score.sum(1, keepdim=True)


def start_of(score: Tensor, alive: Tensor | None = None, batch_padding: bool = False) -> Tensor:
    """Where the distribution of significance [B, n] starts, [B, 1]: its smallest value among the alive.

    With `batch_padding` 0, which is the padding's, for images that hold fewer tokens than the fullest.
    """
    if alive is None:
        return score.amin(1, keepdim=True)
    start = torch.where(alive > 0, score, 1.0).amin(1, keepdim=True)
    if batch_padding:
        count = alive.sum(1, keepdim=True)
        start = torch.where(count < count.max(), 0.0, start)
    return start


def distribution(score: Tensor, start: Tensor) -> Tensor:
    """The cumulative distribution [B, n] of significance [B, n]: 0 at the least (`start`), 1 at the most significant.

    Each slot's entry sums what is not above its own; equal ones share an entry, which the first of them stands for.
    """
    # A sum of the terms that count, not a product with a triangular matrix: no sorting, and no TF32 on a GPU.
    upto = torch.where(score.unsqueeze(1) <= score.unsqueeze(2), score.unsqueeze(1), 0.0).sum(2)
    whole = upto.amax(1, keepdim=True)
    return (upto - start) / (whole - start).clamp_min(TINY)


def distances(entries: Tensor, fractions: Tensor) -> Tensor:
    """Distance [B, K, n] of each sampling point from each entry [B, n] of the distribution.

    The points divide the way from the smallest entry above 0 to 1 at `fractions` [K], as official code lays them.
    """
    first = torch.where(entries > 0, entries, 1.0).amin(1, keepdim=True)
    points = first + (1 - first) * fractions
    return (points.unsqueeze(2) - entries.unsqueeze(1)).abs()


def even_fractions(points: int) -> Tensor:
    """0 … 1 in `points` equal steps; a single point lies at 1, on the most significant token."""
    return torch.linspace(0, 1, points) if points > 1 else torch.ones(1)


def sample(score: Tensor, fractions: Tensor, alive: Tensor | None = None, batch_padding: bool = False) -> Tensor:
    """1.0 for each slot [B, n] that a sampling point is nearest to; ties to the lower slot."""
    table = distances(distribution(score, start_of(score, alive, batch_padding)), fractions)
    return one_hot((-table).argmax(2), score.shape[1]).amax(2)


def keep_slots(sampled: Tensor, score: Tensor, k: int, form: str) -> Tensor:
    """The k slots [B, k] that stay: what was sampled, then the most significant (compact) or any, to be masked."""
    # Significance is at most 1, so that none passes a sampled one.
    return top_k(2 * sampled + score if form == "compact" else sampled, k)


# --- the stage ---------------------------------------------------------------------------------


class AtsStage(StageModule):
    """Samples by the block's own attention, before its results are computed; masks what is left empty, if asked to."""

    fractions: Tensor
    needs_attention = True

    def __init__(self, stage: Stage, geometry: Geometry, options: Options) -> None:
        super().__init__()
        assert geometry.class_token is not None
        self.keep = stage.tokens_out
        self.special_tokens = geometry.special_tokens
        self.class_token = geometry.class_token
        self.form = options.form
        self.batch_dependent = options.batch_padding
        self.register_buffer("fractions", even_fractions(stage.static["points"]), persistent=False)

    def forward(
        self, tokens: Tensor, state: TokenState, attention: Attention | None, forced: Tensor | None = None
    ) -> StageOutput:
        assert attention is not None
        alive = None if state.alive is None else state.alive[:, self.special_tokens :]
        score = significance(attention, self.class_token, self.special_tokens, alive)
        sampled = sample(score, self.fractions, alive, self.batch_dependent)
        if forced is None:
            kept = keep_slots(sampled, score, self.keep, self.form)
            present = take(sampled, kept)
        else:
            kept, present = slots_of(forced, state), (forced >= 0).float()
        tokens, state = keep_tokens(tokens, state, kept, self.special_tokens)
        if self.form == "masked":
            state = mask_slots(state, special_ahead(present, self.special_tokens, 1.0))
        reported = score if alive is None else torch.where(alive > 0, score, -1.0)
        return StageOutput(tokens, state, {"significance": reported}, rows=kept)


def build_stage(stage: Stage, geometry: Geometry, options: MethodOptions, weights: Mapping[str, Tensor]) -> StageModule:
    """The stage for `stage`. Raises BadRequest where its fixed numbers cannot be (a plan edited by hand)."""
    assert isinstance(options, Options)
    if not 1 <= stage.static.get("points", 0) <= stage.tokens_out:
        raise misnumbered(stage, f"ATS needs points from 1 to {stage.tokens_out}, the tokens it keeps")
    return AtsStage(stage, geometry, options)


# --- replay ------------------------------------------------------------------------------------


def replay(stage: Stage, scores: Mapping[str, Tensor], geometry: Geometry, options: MethodOptions) -> Replay:
    """Recomputes a stage's selection from its significance, with every decision and its margin."""
    assert isinstance(options, Options)
    alive = (scores["significance"] >= 0).to(scores["significance"])
    score = scores["significance"].clamp_min(0)
    fractions = even_fractions(stage.static["points"]).to(score)
    sampled = sample(score, fractions, alive)
    kept = keep_slots(sampled, score, stage.tokens_out, options.form)
    table = distances(distribution(score, start_of(score, alive)), fractions)
    decisions = [Decision("sampled", _sampling_margin(table, sampled, score, alive))]
    if options.form == "masked":
        kept = torch.where(take(sampled, kept) > 0, kept, -1)
    elif stage.tokens_out < stage.tokens_in:
        decisions.append(Decision("filled", _filling_margin(table, sampled, score, stage.tokens_out)))
    return Replay(kept=kept, decisions=tuple(decisions))


def _leads(table: Tensor) -> Tensor:
    """By how much [B, K] each point's nearest entry is nearer than the second, in shares of the whole significance."""
    if table.shape[2] < 2:
        return torch.full_like(table[:, :, 0], torch.inf)
    nearest = table.sort(2).values
    return nearest[:, :, 1] - nearest[:, :, 0]


def _sampling_margin(table: Tensor, sampled: Tensor, score: Tensor, alive: Tensor) -> Tensor:
    """How near [B, n] each slot was to being sampled (negative) or not (positive).

    A sampled one falls when all its points turn to another entry, one that is not rises when a point turns to it;
    either way the tokens may also change places with another of nearly the same significance.
    """
    hit = one_hot((-table).argmax(2), score.shape[1]) > 0  # [B, n, K]
    falls = torch.where(hit, _leads(table).unsqueeze(1), 0).amax(2)
    rises = (table - table.amin(2, keepdim=True)).amin(1)
    margin = torch.where(sampled > 0, falls, rises)
    ours, theirs = score.unsqueeze(2), score.unsqueeze(1)
    apart = (ours - theirs).abs() / torch.maximum(ours, theirs).clamp_min(TINY)
    other = (sampled.unsqueeze(2) != sampled.unsqueeze(1)) & (alive.unsqueeze(1) > 0)
    margin = torch.minimum(margin, torch.where(other, apart, torch.inf).amin(2)).clamp_min(TINY)
    return torch.where(alive > 0, torch.where(sampled > 0, margin, -margin), -torch.inf)


def _filling_margin(table: Tensor, sampled: Tensor, score: Tensor, k: int) -> Tensor:
    """How near [B, n] each slot was to the cut among those that fill up; sampled ones are far from it.

    A point that turns to another entry may leave room for one more or one fewer, so that the two slots next to the
    cut are no farther from it than the nearest such point.
    """
    ranked = torch.where(sampled > 0, torch.inf, score)
    margin = top_k_margin(ranked, k)
    order = top_k(ranked, k + 1)[:, k - 1 :]  # the last that stays and the first that goes
    nearest = _leads(table).amin(1, keepdim=True).clamp_min(TINY)
    at_cut = one_hot(order, score.shape[1]).sum(2) * (sampled == 0) > 0
    return torch.where(at_cut, margin.sign() * torch.minimum(margin.abs(), nearest), margin)
