"""DynamicViT (Rao et al., NeurIPS 2021, arXiv:2106.02034): a small trained network before a block says what to keep.

A predictor sees each token and the mean of all (section 3.2, equations 2 to 5) and gives log-probabilities of keeping
and dropping it; the k likeliest stay (section 3.4, inference). The predictors are trained together with the backbone,
so their weights come with its checkpoint.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Literal

from torch import Tensor, nn
from torch.nn import functional

from ztp_deploy.errors import BadRequest
from ztp_deploy.methods.base import (
    Decision,
    MethodOptions,
    Replay,
    StageModule,
    StageOutput,
    any_backbone,
    misnumbered,
    only_drops,
    top_k_margin,
)
from ztp_deploy.models.base import Attention
from ztp_deploy.models.weights import fill_random, misfits
from ztp_deploy.plan import Geometry, Place, Stage, following_sites, kept_chain, share_of
from ztp_deploy.pruning.tokens import TokenState, keep_tokens, slots_of, top_k

PLACES: tuple[Place, ...] = ("before_block",)
SUMMARY = "keeps what predictors trained with the backbone call for; needs a DynamicViT checkpoint (NeurIPS 2021)"
SEARCH = "its predictors were trained for the stages of its checkpoint"
refuses = any_backbone
merges = only_drops
PREFIX = "score_predictor"
default_sites = following_sites


class Options(MethodOptions):
    """`weights` of the predictors: "checkpoint", those that came with the backbone's, or "random", seeded.

    With random predictors latency is real and predictions mean nothing.
    """

    weights: Literal["checkpoint", "random"] = "checkpoint"


# --- counts ------------------------------------------------------------------------------------


def counts(geometry: Geometry, blocks: Sequence[int], ratio: float, options: MethodOptions) -> list[int]:
    """⌊n₀·ρ^i⌋ at stage i, counted from 1 (196 at 0.7: 137, 96, 67)."""
    return [share_of(ratio, geometry.patch_tokens, power=number) for number, _ in enumerate(blocks, start=1)]


def schedule(geometry: Geometry, blocks: Sequence[int], counts: Sequence[int], options: MethodOptions) -> list[Stage]:
    """One stage before each of `blocks`, with `predictor`, the number of its predictor in the checkpoint (from 0)."""
    number = {block: index for index, block in enumerate(blocks)}
    return [
        Stage(
            block=block,
            place=PLACES[0],
            tokens_in=before,
            tokens_out=after,
            static={"predictor": number[block]},
        )
        for block, before, after in kept_chain(geometry.patch_tokens, blocks, counts)
    ]


def untrained(options: MethodOptions) -> str | None:
    """With random predictors."""
    assert isinstance(options, Options)
    return "DynamicViT's predictors are random, as asked." if options.weights == "random" else None


def score_names(stage: Stage) -> tuple[str, ...]:
    """Log-odds [B, n] of keeping each token that enters."""
    return ("log_odds",)


# --- the predictor -----------------------------------------------------------------------------


class Predictor(nn.Module):
    """Patch tokens [B, n, C] → log-odds [B, n] of keeping them; the module's keys are the official ones."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.in_conv = nn.Sequential(nn.LayerNorm(width), nn.Linear(width, width), nn.GELU())
        self.out_conv = nn.Sequential(
            nn.Linear(width, width // 2),
            nn.GELU(),
            nn.Linear(width // 2, width // 4),
            nn.GELU(),
            nn.Linear(width // 4, 2),
        )

    def forward(self, patches: Tensor) -> Tensor:
        features: Tensor = self.in_conv(patches)
        own, others = features.tensor_split([features.shape[-1] // 2], dim=-1)
        joint = self.out_conv[0]
        assert isinstance(joint, nn.Linear)
        # The mean is the same for all tokens, so its share of the first product is computed once.
        for_own, for_all = joint.weight.tensor_split([own.shape[-1]], dim=1)
        hidden = functional.linear(own, for_own) + functional.linear(others.mean(1, keepdim=True), for_all, joint.bias)
        choice: Tensor = self.out_conv[1:](hidden)  # [B, n, 2]: keep, drop
        # Where the official code ranks by log p = −log(1 + e^−odds): the same order, but float32 tells tokens
        # that are all but certain to stay apart no longer.
        return choice[..., 0] - choice[..., 1]


def predictor_for(stage: Stage, width: int, options: Options, weights: Mapping[str, Tensor]) -> Predictor:
    """The stage's predictor with the weights its options ask for. Raises BadRequest that lists the keys that do not fit."""
    predictor = Predictor(width)
    number = stage.static["predictor"]
    if options.weights == "random":
        fill_random(predictor, seed=number)
        return predictor
    if not weights:
        raise BadRequest(
            "DynamicViT selects by predictors that are trained together with the backbone, and these weights have none.",
            "Give a DynamicViT checkpoint (--weights path), or --option weights=random to measure latency alone.",
        )
    prefix = f"{PREFIX}.{number}."
    expected = {prefix + name: value for name, value in predictor.state_dict().items()}
    found = {name: value for name, value in weights.items() if name.startswith(prefix)}
    if problems := misfits(expected, found):
        raise BadRequest(
            f"The checkpoint's predictors do not fit the stage at block {stage.block}. {problems}.",
            "Give as many stages as the checkpoint has predictors, in a model of its size.",
        )
    predictor.load_state_dict({name.removeprefix(prefix): value for name, value in found.items()})
    return predictor


# --- the stage ---------------------------------------------------------------------------------


class DynamicVitStage(StageModule):
    """Keeps the k patch tokens whose predictor is surest of them; it computes in float32 whatever the tokens are in."""

    def __init__(self, stage: Stage, geometry: Geometry, predictor: Predictor) -> None:
        super().__init__()
        self.keep = stage.tokens_out
        self.special_tokens = geometry.special_tokens
        self.predictor = predictor.requires_grad_(False)

    def forward(
        self, tokens: Tensor, state: TokenState, attention: Attention | None, forced: Tensor | None = None
    ) -> StageOutput:
        score = self.predictor(tokens[:, self.special_tokens :].float())
        kept = top_k(score, self.keep) if forced is None else slots_of(forced, state)
        return StageOutput(*keep_tokens(tokens, state, kept, self.special_tokens), {"log_odds": score})


def build_stage(stage: Stage, geometry: Geometry, options: MethodOptions, weights: Mapping[str, Tensor]) -> StageModule:
    """The stage for `stage` with its predictor.

    Raises BadRequest where the weights hold no predictor that fits, or the stage does not say which is its own.
    """
    assert isinstance(options, Options)
    if set(stage.static) != {"predictor"}:
        raise misnumbered(stage, "DynamicViT needs predictor alone")
    return DynamicVitStage(stage, geometry, predictor_for(stage, geometry.embed_dim, options, weights))


# --- replay ------------------------------------------------------------------------------------


def replay(stage: Stage, scores: Mapping[str, Tensor], geometry: Geometry, options: MethodOptions) -> Replay:
    """Recomputes a stage's selection from its own audit scores."""
    score = scores["log_odds"]
    # The cut may lie at 0, where even odds are: distances are taken relative to what the log-odds usually are.
    scale = score.square().mean(dim=-1, keepdim=True).sqrt()
    decision = Decision("log_odds", top_k_margin(score, stage.tokens_out, scale))
    return Replay(top_k(score, stage.tokens_out), (decision,))
