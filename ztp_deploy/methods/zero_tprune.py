"""Zero-TPrune (Wang, Dedhia, Jha, CVPR 2024, arXiv:2305.17328): training-free token pruning on the attention graph.

Importance is attention received: a weighted PageRank (WPR) votes along A, per head;
heads are combined by the emphasising root mean square (EIR) over those whose score variance lies in
bounds (VHF). One stage runs I′ → S → I: I′ ranks, S drops tokens that resemble more
important ones, I votes again among the survivors and keeps the best.

Scores are float32, and scaled to mean 1 over the tokens that take part until the heads are combined.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from pydantic import Field, field_validator
from torch import Tensor

from ztp_deploy.errors import BadRequest
from ztp_deploy.methods.base import (
    Choice,
    Decision,
    MethodOptions,
    Replay,
    Search,
    StageModule,
    StageOutput,
    any_backbone,
    misnumbered,
    needs_no_training,
    only_drops,
    top_k_margin,
)
from ztp_deploy.methods.similarity import (
    PARTITIONS,
    Metric,
    Partition,
    best_match,
    length,
    raster_order,
    staying,
)
from ztp_deploy.methods.slice import counts as counts
from ztp_deploy.models.base import Attention
from ztp_deploy.plan import Geometry, Place, Stage, kept_chain
from ztp_deploy.plan import default_sites as default_sites
from ztp_deploy.pruning.tokens import TokenState, keep_tokens, membership, slots_of, take, top_k

PLACES: tuple[Place, ...] = ("after_block",)
SUMMARY = "training-free: weighted PageRank on attention, then similarity, then importance (CVPR 2024)"
refuses = any_backbone
merges = only_drops
untrained = needs_no_training

MAX_ROUNDS = 1000
EARLY_ROUNDS, MIDDLE_ROUNDS, LATE_ROUNDS = 30, 8, 1
_OUT_OF_BOUNDS = 1e-12
"""Weight of a head that VHF leaves out; its square is far below float32's last digit of what the others give."""


class Options(MethodOptions):
    """Choices of Zero-TPrune; the defaults are those that docs/accuracy.md found best.

    `rounds`: voting rounds of the I-stage, one number, one per stage, or "published": 30 in blocks 1–3, 1 in the last
    three, else 8 (paper: 30–50, 1, 5–10). `similar`: share of the removed tokens that
    the S-stage removes, rounded down (0: no S-stage). `start`: "class" gives the class token √N times
    the others, "uniform" does not. `variance_bounds`: heads outside are left out (VHF), null for all heads.
    `heads`: "rms" (EIR) or "mean". `temperature`: of the softmax whose rows vote. `renormalise`: whether survivors of
    the S-stage pass on whole votes or lose what dropped tokens would have got. The S-stage's `partition`, `metric`
    (see `similarity`) and `features`: keys, queries or values, or the tokens that enter the block; `feature_heads`:
    heads "concatenated", the same with each at length 1 ("normalised": under the cosine, heads count equally), or
    "averaged".
    The published method is rounds "published" and renormalise true. The paper's ladder: of these WPR alone, which is
    heads "mean", no bounds, similar 0; then rms (EIR), bounds (VHF), similar 0.5.
    """

    rounds: int | list[int] | Literal["published"] = 1
    similar: float = Field(default=0.5, ge=0, le=1)
    start: Literal["class", "uniform"] = "class"
    variance_bounds: tuple[float, float] | None = (0.01, 0.7)
    heads: Literal["rms", "mean"] = "rms"
    temperature: float = Field(default=1.0, gt=0, allow_inf_nan=False)
    renormalise: bool = False
    partition: Partition = "importance"
    metric: Metric = "cosine"
    features: Literal["keys", "queries", "values", "inputs"] = "keys"
    feature_heads: Literal["concatenated", "normalised", "averaged"] = "concatenated"

    @field_validator("rounds")
    @classmethod
    def _positive(cls, rounds: int | list[int] | Literal["published"]) -> int | list[int] | Literal["published"]:
        given = rounds if isinstance(rounds, list) else [rounds]
        if any(isinstance(number, int) and not 1 <= number <= MAX_ROUNDS for number in given):
            raise ValueError(f"voting rounds are 1 to {MAX_ROUNDS}")
        return rounds

    @field_validator("variance_bounds")
    @classmethod
    def _ordered(cls, bounds: tuple[float, float] | None) -> tuple[float, float] | None:
        if bounds is not None and not 0 <= bounds[0] < bounds[1] < float("inf"):
            raise ValueError("the bounds must rise from 0 or more")
        return bounds


@dataclass(frozen=True)
class Importance:
    """Scores [B, N] of all tokens (0 for those that take no part) and the heads' spreads [B, H, 1]."""

    score: Tensor
    spread: Tensor


@dataclass(frozen=True)
class Selection:
    """Kept patch slots [B, k], best first, and the scores that decided (`score_names`)."""

    kept: Tensor
    scores: dict[str, Tensor]


# --- counts ------------------------------------------------------------------------------------


def schedule(geometry: Geometry, blocks: Sequence[int], counts: Sequence[int], options: MethodOptions) -> list[Stage]:
    """One stage after each of `blocks`, with `similar` (tokens S drops) and `rounds` (votes of I)."""
    assert isinstance(options, Options)
    if isinstance(options.rounds, list) and len(options.rounds) != len(blocks):
        raise BadRequest(
            f"rounds={options.rounds} has {len(options.rounds)} entries for {len(blocks)} stages.",
            "Give one number, or one per stage.",
        )
    stages = []
    for block, before, after in kept_chain(geometry.patch_tokens, blocks, counts):
        if isinstance(options.rounds, list):
            rounds = options.rounds[list(blocks).index(block)]
        else:
            rounds = published_rounds(block, geometry.depth) if options.rounds == "published" else options.rounds
        # S can drop no more than those that may go.
        similar = min(int((before - after) * options.similar), before - staying(before, options.partition))
        static = {"similar": similar, "rounds": rounds}
        if similar and options.partition != "importance":
            static["partition"] = PARTITIONS.index(options.partition)
        stages.append(Stage(block=block, place=PLACES[0], tokens_in=before, tokens_out=after, static=static))
    return stages


def published_rounds(block: int, depth: int) -> int:
    """Voting rounds of the I-stage by depth: 30 in blocks 1–3, 1 in the last three, else 8 (paper: 30–50, 1, 5–10)."""
    if block <= 3:
        return EARLY_ROUNDS
    return LATE_ROUNDS if block > depth - 3 else MIDDLE_ROUNDS


def searched_options(
    chosen: Mapping[str, Any], blocks: Sequence[int], depth: int, enough: Mapping[int, int]
) -> dict[str, Any]:
    """The options of a search: `similar`, and `rounds` of every stage by one rule.

    One each, as published by depth, or as many as were measured to be enough.
    """

    def rounds(block: int) -> int:
        published = published_rounds(block, depth)
        return {"one": 1, "published": published, "enough": enough.get(block, published)}[chosen["rounds"]]

    return {"similar": round(chosen["similar"], 1), "rounds": [rounds(block) for block in blocks]}


SEARCH = Search(
    {"similar": Choice(0.5), "rounds": Choice("one", ("one", "published", "enough"))},
    searched_options,
)


def score_names(stage: Stage) -> tuple[str, ...]:
    """I′ scores [B, n] and head spreads [B, H, 1], S similarities [B, n//2] in I′ order, then the same of I.

    A partition that does not look at importance has no I′ but the positions it goes by.
    """
    if not stage.static["similar"]:
        return ("score", "spread")
    preliminary = ("position",) if stage.static.get("partition") else ("pre_score", "pre_spread")
    return (*preliminary, "similarity", "score", "spread")


# --- pure scores -------------------------------------------------------------------------------


def start_scores(count: int, participants: int, class_token: int | None) -> Tensor:
    """Start vector [N] of the vote, mean 1 over `participants`: √participants times the others for the class token."""
    start = torch.ones(count, dtype=torch.float32)
    total = float(participants)
    if class_token is not None:
        boost = participants**0.5
        start[class_token] = boost
        total += boost - 1
    return start * (participants / total)


def vote(
    attention: Tensor, start: Tensor, rounds: int, survivors: Tensor | None = None, participants: int | None = None
) -> Tensor:
    """Weighted PageRank: s ← Aᵀs, `rounds` times, on the graph restricted to the survivors.

    attention [B, H, N, N] with rows that sum to 1, start [N], survivors [B, N] of 0 and 1 (None: all)
    → scores [B, H, N], 0 outside the survivors. With row sums q = A m over the survivors m, one round is
    s ← m ∘ Aᵀ(m ∘ s / q): rows renormalised, nothing gathered. With their number, `participants`, q is
    left out and s scaled back to mean 1 over them each time, since votes are then lost.
    """
    score = start.to(attention).reshape(1, 1, -1)
    if survivors is None:
        for _ in range(rounds):
            score = _received(attention, score.unsqueeze(2))
        return score
    mask = survivors.to(attention).unsqueeze(1)
    voting = mask.unsqueeze(2)
    if participants is not None:
        for _ in range(rounds):
            score = _received(attention, score.unsqueeze(2) * voting) * mask
            score = score / (score.sum(-1, keepdim=True) / participants).clamp_min(1e-30)
        return score
    row_sums = voting @ attention.transpose(-1, -2)  # [B, H, 1, N]
    # A row whose whole attention went to dropped tokens underflows to 0 and must not turn into NaN.
    voting = voting / row_sums.clamp_min(1e-30)
    for _ in range(rounds):
        score = _received(attention, score.unsqueeze(2) * voting)
    return score * mask


def _received(attention: Tensor, votes: Tensor) -> Tensor:
    """What each token receives of votes [1 or B, 1 or H, 1, N] that go along attention [B, H, N, N] → [B, H, N]."""
    return (votes @ attention).squeeze(2)


def score_spread(scores: Tensor, survivors: Tensor | None = None) -> Tensor:
    """Length [B, H, 1] of the mean-1 scores' deviation from 1: √(participants · variance).

    scores [B, H, N] are 0 outside the survivors [B, N].
    """
    deviation = scores - (1 if survivors is None else survivors.to(scores).unsqueeze(1))
    spread: Tensor = torch.linalg.vector_norm(deviation, dim=-1, keepdim=True)
    return spread


def head_weights(spread: Tensor, bounds: tuple[float, float] | None, participants: int) -> Tensor:
    """VHF: 1.0 for heads whose population variance, spread² / participants [B, H, 1], lies in the bounds.

    Other heads get so little that no digit shows it, and therefore count alike where no head lies in the bounds.
    """
    if bounds is None:
        return torch.ones_like(spread)
    low, high = ((participants * bound) ** 0.5 for bound in bounds)
    within: Tensor = spread.clamp(low, high) == spread
    return torch.where(within, 1.0, _OUT_OF_BOUNDS).to(spread)


def combine_heads(scores: Tensor, weights: Tensor, how: Literal["rms", "mean"] = "rms") -> Tensor:
    """EIR: root of the sum of squares over the heads, scores [B, H, N] weighted by [B, H, 1] → [B, N].

    The mean is that of the heads that count, which are the same for all tokens of an image: dividing by their number
    would change no ranking, and is left out. So for the sum, "mean".
    """
    weighted = scores * weights
    if how == "mean":
        return weighted.sum(1)
    combined: Tensor = torch.linalg.vector_norm(weighted, dim=1)
    return combined


def importance(
    attention: Tensor,
    rounds: int,
    start: Tensor,
    *,
    participants: int,
    options: Options,
    survivors: Tensor | None = None,
) -> Importance:
    """WPR, VHF and EIR in one: attention [B, H, N, N] and start [N] → scores [B, N] and head spreads [B, H, 1]."""
    per_head = vote(attention, start, rounds, survivors, None if options.renormalise else participants)
    spread = score_spread(per_head, survivors)
    weights = head_weights(spread, options.variance_bounds, participants)
    return Importance(combine_heads(per_head, weights, options.heads), spread)


@dataclass(frozen=True)
class Starts:
    """Start vectors [N] of a stage's two votes: among all tokens, and among those that the S-stage leaves."""

    everyone: Tensor
    survivors: Tensor

    @classmethod
    def of(cls, stage: Stage, special_tokens: int, class_token: int | None, options: Options) -> Starts:
        """Those of a stage, on the CPU."""
        everyone = stage.tokens_in + special_tokens
        boosted = class_token if options.start == "class" else None
        left = everyone - stage.static["similar"]
        return cls(start_scores(everyone, everyone, boosted), start_scores(everyone, left, boosted))


def select(
    attention: Tensor,
    features: Tensor,
    stage: Stage,
    starts: Starts,
    *,
    special_tokens: int,
    options: Options,
    positions: Tensor | None = None,
) -> Selection:
    """One stage, I′ → S → I: attention [B, H, N, N] and features [B, H, N, d] → kept patch slots [B, k].

    Special tokens come first, are always kept, vote, and take no part in S. `positions` [B, n] of the patch slots are
    needed by partitions that go by them.
    """
    similar, rounds = stage.static["similar"], stage.static["rounds"]
    everyone = stage.tokens_in + special_tokens  # a trace would take a shape for a tensor on the host
    scores: dict[str, Tensor] = {}
    dropped = None
    if similar:
        if options.partition == "importance":
            ranking = importance(attention, 1, starts.everyone, participants=everyone, options=options)
            pre_score = ranking.score[:, special_tokens:]
            order = top_k(pre_score, stage.tokens_in)
            scores |= {"pre_score": pre_score, "pre_spread": ranking.spread}
        else:
            assert positions is not None
            scores["position"] = positions.float()
            order = raster_order(positions, options.partition)
        half = staying(stage.tokens_in, options.partition)
        match = best_match(
            join_heads(features.float(), options.feature_heads),
            less=order[:, half:],
            more=order[:, :half] if half else order,
            metric=options.metric,
            skip=special_tokens,
            apart=half > 0,
        )
        least = take(order, top_k(match, similar), skip=half)
        dropped = membership(least, everyone, skip=special_tokens)
        scores["similarity"] = match
    final = importance(
        attention,
        rounds,
        starts.survivors,
        participants=everyone - similar,
        options=options,
        survivors=None if dropped is None else 1 - dropped,
    )
    score = final.score if dropped is None else final.score - dropped  # dropped ones rank below a survivor's 0
    score = score[:, special_tokens:]
    scores |= {"score": score, "spread": final.spread}
    return Selection(top_k(score, stage.tokens_out), scores)


def join_heads(features: Tensor, how: Literal["concatenated", "normalised", "averaged"]) -> Tensor:
    """One feature vector a token: [B, H, N, d] → [B, N, H·d], or [B, N, d] averaged."""
    if how == "averaged":
        return features.mean(1)
    if how == "normalised":
        features = features / length(features)
    return features.transpose(1, 2).flatten(2)


# --- the stage ---------------------------------------------------------------------------------


class ZeroTPruneStage(StageModule):
    """Runs `select` on the block's attention and keys, then keeps the chosen tokens."""

    needs_attention = True
    start: Tensor
    start_of_survivors: Tensor

    def __init__(self, stage: Stage, geometry: Geometry, options: Options) -> None:
        super().__init__()
        self.stage = stage
        self.special_tokens = geometry.special_tokens
        self.options = options
        starts = Starts.of(stage, geometry.special_tokens, geometry.class_token, options)
        # With the module on its device: a copy from the host makes a GPU wait, and no CUDA graph can record it.
        self.register_buffer("start", starts.everyone, persistent=False)
        self.register_buffer("start_of_survivors", starts.survivors, persistent=False)

    def forward(
        self, tokens: Tensor, state: TokenState, attention: Attention | None, forced: Tensor | None = None
    ) -> StageOutput:
        assert attention is not None
        chosen = self._choose(attention, state)
        tokens, state = keep_tokens(
            tokens, state, chosen.kept if forced is None else slots_of(forced, state), self.special_tokens
        )
        return StageOutput(tokens, state, chosen.scores)

    def attend(self, attention: Attention) -> Attention:
        if not self.joined:
            return attention
        from ztp_deploy.methods import zero_tprune_op

        if zero_tprune_op.misfit(attention, self.options):
            return attention
        outcome = zero_tprune_op.decide(attention, self.stage, self._starts, self.special_tokens, self.options)
        return replace(attention, decided=outcome)

    def _choose(self, attention: Attention, state: TokenState) -> Selection:
        if attention.decided:
            from ztp_deploy.methods import zero_tprune_op

            return zero_tprune_op.Outcome(*attention.decided).selection(self.stage)
        probabilities = attention.probabilities.float()
        if self.options.temperature != 1:
            probabilities = (attention.logits.float() / self.options.temperature).softmax(-1)
        return select(
            probabilities,
            _features(attention, self.options),
            self.stage,
            self._starts,
            special_tokens=self.special_tokens,
            options=self.options,
            positions=state.positions,
        )

    @property
    def _starts(self) -> Starts:
        return Starts(self.start, self.start_of_survivors)


def _features(attention: Attention, options: Options) -> Tensor:
    """What the S-stage compares, [B, H, N, d]; the tokens that enter the block count as one head."""
    if options.features == "inputs":
        return attention.inputs.unsqueeze(1)
    return {"keys": attention.keys, "queries": attention.queries, "values": attention.values}[options.features]


def build_stage(stage: Stage, geometry: Geometry, options: MethodOptions, weights: Mapping[str, Tensor]) -> StageModule:
    """The stage for `stage`. Raises BadRequest where its fixed numbers cannot be (a plan edited by hand)."""
    assert isinstance(options, Options)
    most = min(stage.tokens_in - staying(stage.tokens_in, options.partition), stage.tokens_in - stage.tokens_out)
    rounds, similar = stage.static.get("rounds", 0), stage.static.get("similar", -1)
    partition = PARTITIONS.index(options.partition) if similar else 0
    fits = 1 <= rounds <= MAX_ROUNDS and 0 <= similar <= most
    if not fits or stage.static.get("partition", 0) != partition:
        raise misnumbered(
            stage,
            f"Zero-TPrune needs rounds from 1 to {MAX_ROUNDS}, similar from 0 to {most} and, for its options, "
            f"partition {partition} (0 may be left out)",
        )
    return ZeroTPruneStage(stage, geometry, options)


# --- replay ------------------------------------------------------------------------------------


def replay(stage: Stage, scores: Mapping[str, Tensor], geometry: Geometry, options: MethodOptions) -> Replay:
    """Recomputes a stage's selection from its own audit scores, with every decision and its margin."""
    assert isinstance(options, Options)
    decisions: list[Decision] = []
    score = scores["score"]
    everyone = stage.tokens_in + geometry.special_tokens
    if similar := stage.static["similar"]:
        half = staying(stage.tokens_in, options.partition)
        if options.partition == "importance":
            order = top_k(scores["pre_score"], stage.tokens_in)
            decisions += _head_decisions("pre_heads", scores["pre_spread"].square() / everyone, options)
            decisions.append(Decision("split", top_k_margin(scores["pre_score"], half)))
        else:
            order = raster_order(scores["position"], options.partition)
        # Positive for what stays, and in slot order, so that two replays compare token by token.
        goes = -top_k_margin(scores["similarity"], similar).to(score)
        stays = torch.full_like(score, torch.inf).scatter(1, order[:, half:], goes)
        decisions.append(Decision("similarity", stays))
        score = torch.where(stays > 0, score, -torch.inf)
    decisions += _head_decisions("heads", scores["spread"].square() / (everyone - stage.static["similar"]), options)
    decisions.append(Decision("importance", top_k_margin(score, stage.tokens_out)))
    return Replay(kept=top_k(score, stage.tokens_out), decisions=tuple(decisions))


def _head_decisions(name: str, variance: Tensor, options: Options) -> list[Decision]:
    """VHF as two threshold decisions per head."""
    if options.variance_bounds is None:
        return []
    variance = variance.flatten(1)  # [B, H]
    low, high = options.variance_bounds
    return [
        Decision(f"{name}_above", (variance - low) / low if low else variance + 1, per_token=False),
        Decision(f"{name}_below", (high - variance) / high, per_token=False),
    ]
