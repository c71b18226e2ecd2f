"""EViT (Liang et al., ICLR 2022, arXiv:2202.07800): keeps what the class token attends to, fuses the rest into one token.

Between attention and MLP of a block, patch tokens are ranked by the class token's attention to them, averaged over
heads (section 3.1). The k best stay. The others leave, or are summed into one further token, each weighted by that
attention (section 3.2); the weights are not normalised. A fused token takes part in later selections like any other.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from ztp_deploy.methods.base import (
    Decision,
    MethodOptions,
    Replay,
    Search,
    StageModule,
    StageOutput,
    class_rows,
    misnumbered,
    needs_no_training,
    top_k_margin,
)
from ztp_deploy.models.base import Attention
from ztp_deploy.plan import Geometry, Place, Stage, following_sites, share_of
from ztp_deploy.pruning.tokens import TokenState, destinations_of, keep_tokens, membership, slots_of, top_k

PLACES: tuple[Place, ...] = ("after_attention",)
SUMMARY = "keeps what the class token attends to and drops the rest or fuses it into one (ICLR 2022)"
SEARCH = Search()
default_sites = following_sites
untrained = needs_no_training


class Options(MethodOptions):
    """Choices of EViT.

    `fuse`: the tokens that are not kept live on as one, as in the published models; otherwise they are dropped.
    """

    fuse: bool = False


# --- counts ------------------------------------------------------------------------------------


def counts(geometry: Geometry, blocks: Sequence[int], ratio: float, options: MethodOptions) -> list[int]:
    """k ← ⌈ρn⌉ per stage, where n counts an earlier fused token (196 at 0.7: 138, 97, 68; fusing 138, 98, 70)."""
    assert isinstance(options, Options)
    tokens, found = geometry.patch_tokens, []
    for _ in blocks:
        found.append(share_of(ratio, tokens, math.ceil))
        tokens = _tokens_after(tokens, found[-1], options)
    return found


def _tokens_after(tokens: int, kept: int, options: Options) -> int:
    """How many leave a stage that keeps the best `kept`: a fused token is one more, where there is anything to fuse."""
    return kept + 1 if options.fuse and kept < tokens else kept


def schedule(geometry: Geometry, blocks: Sequence[int], counts: Sequence[int], options: MethodOptions) -> list[Stage]:
    """One stage inside each of `blocks`; where it fuses, with `top_k` (tokens kept) and `stage` (its index from 0)."""
    assert isinstance(options, Options)
    stages: list[Stage] = []
    tokens = geometry.patch_tokens
    for block, kept in zip(blocks, counts, strict=True):
        if kept == tokens:
            continue
        after = _tokens_after(tokens, kept, options)
        static = {"top_k": kept, "stage": len(stages)} if options.fuse else {}
        stages.append(Stage(block=block, place=PLACES[0], tokens_in=tokens, tokens_out=after, static=static))
        tokens = after
    return stages


def refuses(geometry: Geometry, options: MethodOptions) -> str | None:
    """It needs a class token, and to fuse, blocks that ask no token for its position."""
    assert isinstance(options, Options)
    if geometry.class_token is None:
        return "EViT ranks tokens by the class token's attention, and this backbone has no class token."
    if options.fuse and geometry.rotary:
        return "a fused token has no position, and this backbone's attention asks for one; the option fuse=false works."
    return None


def merges(options: MethodOptions) -> bool:
    """Where it fuses."""
    assert isinstance(options, Options)
    return options.fuse


def score_names(stage: Stage) -> tuple[str, ...]:
    """The class token's attention [B, n] to the tokens that enter, mean over heads."""
    return ("class_attention",)


# --- pure functions ----------------------------------------------------------------------------


def fuse(patches: Tensor, rows: Tensor, dropped: Tensor) -> Tensor:
    """The dropped ones (1.0 in [B, n]) of patches [B, n, C], weighted by rows [B, H, n] meaned over H → [B, 1, C]."""
    # Masked before the mean: sharing the scores' own mean would draw them into the tokens' way, and into its precision.
    weights = (rows * dropped.to(rows.dtype).unsqueeze(1)).mean(dim=1, keepdim=True)
    return weights.to(patches.dtype) @ patches


def slots_after(kept: Tensor, count: int) -> Tensor:
    """The slot [B, n] int32 that each of `count` entering ones goes into: its place among kept [B, k], else k."""
    k = kept.shape[1]
    # Multiplied and summed in float32: as a product of matrices engines may round it, and OpenVINO's processor plugin
    # gets a sum of int32 wrong.
    before_last = torch.arange(-k, 0, dtype=torch.float32, device=kept.device).unsqueeze(-1)
    found = kept.unsqueeze(-1) == torch.arange(count, device=kept.device)  # [B, k, n]
    return ((found.to(torch.float32) * before_last).sum(dim=1) + k).to(torch.int32)


# --- the stage ---------------------------------------------------------------------------------


class EvitStage(StageModule):
    """Keeps the k patch tokens with the most class attention; appends the fused rest where asked."""

    needs_attention = True

    def __init__(self, stage: Stage, geometry: Geometry, options: Options) -> None:
        super().__init__()
        assert geometry.class_token is not None
        self.keep = stage.static.get("top_k", stage.tokens_out)
        self.new_position = geometry.patch_tokens + stage.static.get("stage", 0)
        self.special_tokens = geometry.special_tokens
        self.class_token = geometry.class_token
        self.fuses = options.fuse

    def forward(
        self, tokens: Tensor, state: TokenState, attention: Attention | None, forced: Tensor | None = None
    ) -> StageOutput:
        assert attention is not None
        rows = class_rows(attention.probabilities, self.class_token, self.special_tokens)
        score = rows.float().mean(dim=1)
        kept = top_k(score, self.keep) if forced is None else self._forced(forced, state)
        remaining, after = keep_tokens(tokens, state, kept, self.special_tokens)
        if not self.fuses:
            return StageOutput(remaining, after, {"class_attention": score})
        count = state.positions.shape[1]
        fused = fuse(tokens[:, self.special_tokens :], rows, 1 - membership(kept, count))
        position = torch.full_like(after.positions[:, :1], self.new_position)
        return StageOutput(
            torch.cat([remaining, fused], dim=1),
            replace(after, positions=torch.cat([after.positions, position], dim=1)),
            {"class_attention": score},
            merged=slots_after(kept, count),
        )

    def _forced(self, forced: Tensor, state: TokenState) -> Tensor:
        if not self.fuses:
            return slots_of(forced, state)
        return top_k((destinations_of(forced, state) == state.positions).float(), self.keep)


def build_stage(stage: Stage, geometry: Geometry, options: MethodOptions, weights: Mapping[str, Tensor]) -> StageModule:
    """The stage for `stage`. Raises BadRequest where its fixed numbers cannot be (a plan edited by hand)."""
    assert isinstance(options, Options)
    kept = stage.static.get("top_k", 0)
    fits = kept >= 1 and kept + 1 == stage.tokens_out and "stage" in stage.static if options.fuse else not stage.static
    if not fits:
        needs = f"top_k = {stage.tokens_out - 1}, one less than it hands on, and stage" if options.fuse else "none"
        raise misnumbered(stage, f"EViT with fuse={str(options.fuse).lower()} needs {needs}")
    return EvitStage(stage, geometry, options)


# --- replay ------------------------------------------------------------------------------------


def replay(stage: Stage, scores: Mapping[str, Tensor], geometry: Geometry, options: MethodOptions) -> Replay:
    """Recomputes a stage's selection from its own audit scores."""
    assert isinstance(options, Options)
    score = scores["class_attention"]
    keep = stage.static.get("top_k", stage.tokens_out)
    kept = top_k(score, keep)
    decision = Decision("class_attention", top_k_margin(score, keep))
    if not options.fuse:
        return Replay(kept, (decision,))
    own = torch.arange(stage.tokens_in, device=score.device).expand_as(score)
    return Replay(kept, (decision,), goes=torch.where(decision.chosen, own, stage.tokens_in))
