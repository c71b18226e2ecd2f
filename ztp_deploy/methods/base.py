"""What a method is: a rule for counts, fixed numbers per stage, and the stage that runs."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Protocol

import torch
from pydantic import BaseModel, ConfigDict
from torch import Tensor, nn

from ztp_deploy.errors import BadRequest
from ztp_deploy.plan import Geometry, Place, Stage

if TYPE_CHECKING:
    from ztp_deploy.models.base import Attention
    from ztp_deploy.pruning.tokens import TokenState


class MethodOptions(BaseModel):
    """Base of every method's options: frozen, unknown names refused."""

    model_config = ConfigDict(frozen=True, extra="forbid")


@dataclass(frozen=True)
class StageOutput:
    """What a stage hands on: tokens [B, S + k, C], their state, and the scores behind the choice.

    `scores` belong to the audit graph: names to float32 tensors whose first axis is the batch. `merged` [B, n] int32,
    of methods that merge: the output slot each entering patch slot went into, -1 where it was dropped. `rows`
    [B, k] int64, of stages at attention rows: the entering patch slots whose attention rows are computed.
    """

    tokens: Tensor
    state: TokenState
    scores: dict[str, Tensor]
    merged: Tensor | None = None
    rows: Tensor | None = None


class StageModule(nn.Module):
    """A stage at work; subclasses implement `forward`."""

    needs_attention: bool = False
    batch_dependent: bool = False
    """Whether what an image keeps depends on the others in its batch; such a stage is not exported."""
    joined: bool = False
    """Whether the stage may be one operator together with its block's attention, where the method has one."""

    def attend(self, attention: Attention) -> Attention:
        """The block's attention as the stage is going to read it, of stages after the block that ask for attention."""
        return attention

    def forward(
        self, tokens: Tensor, state: TokenState, attention: Attention | None, forced: Tensor | None = None
    ) -> StageOutput:
        """Selects tokens [B, S + n, C] → [B, S + k, C]; `attention` is set where `needs_attention`.

        With `forced` the choice is made for it, and the scores are reported all the same: positions [B, k] that are
        kept (`tokens.slots_of`), or, for methods that merge, by position the position [B, P] that its token goes by
        afterwards, -1 where it is dropped (`tokens.destinations_of`).
        """
        raise TypeError(f"{type(self).__name__} does not implement forward")


@dataclass(frozen=True)
class Decision:
    """One discrete choice of a stage over M candidates, for every image.

    Candidates are the tokens that enter the stage, in slot order, where `per_token`, else anything fixed
    (heads). `margin` [B, M] is each candidate's relative distance from the cut, positive on the chosen side;
    its sign is the choice, its size says how near the choice was to flipping. `margin` [B, M, M] chooses among pairs
    of tokens: for the one of a row, those it could go with.
    """

    name: str
    margin: Tensor
    per_token: bool = True

    @property
    def chosen(self) -> Tensor:
        """Booleans of the margin's shape."""
        return self.margin > 0


@dataclass(frozen=True)
class Replay:
    """A selection recomputed from audit scores: kept slots [B, k] and the decisions on the way, in order.

    A slot of -1 is masked. `goes` [B, n], of methods that merge: the entering slot whose position each entering slot
    goes by afterwards, n for a token made anew, -1 where it is dropped.
    """

    kept: Tensor
    decisions: tuple[Decision, ...]
    goes: Tensor | None = None


@dataclass(frozen=True)
class Choice:
    """What a search may choose besides blocks and counts: one of `words`, or without any a share in tenths.

    `usual` is the method's default.
    """

    usual: str | float
    words: tuple[str, ...] = ()


@dataclass(frozen=True)
class Search:
    """What `ztp tune` may choose of a method, by name, and the options that the chosen values come to.

    They also depend on the blocks that carry stages, on the model's depth, and on voting rounds by block, where measured.
    """

    choices: Mapping[str, Choice] = field(default_factory=dict)
    options: Callable[[Mapping[str, Any], Sequence[int], int, Mapping[int, int]], dict[str, Any]] = lambda *_: {}


class Method(Protocol):
    """The face of a module in `methods/`."""

    PLACES: tuple[Place, ...]
    """Where its stages may act, the usual place first."""
    SUMMARY: str

    @property
    def SEARCH(self) -> Search | str:
        """What may be searched, or why nothing can be, in words that follow "cannot be tuned: "."""

    @property
    def Options(self) -> type[MethodOptions]:
        """What the method lets choose; a property, since modules have narrower types."""

    def refuses(self, geometry: Geometry, options: MethodOptions) -> str | None:
        """Why the method cannot run on such a backbone, as a sentence; None where it can."""

    def default_sites(self, depth: int, stages: int | None) -> list[int]:
        """Blocks that carry the stages where the caller names none; `stages` is how many were asked for, if any."""

    def counts(self, geometry: Geometry, blocks: Sequence[int], ratio: float, options: MethodOptions) -> list[int]:
        """Tokens kept by the stage at each of `blocks` for one ratio."""

    def schedule(
        self, geometry: Geometry, blocks: Sequence[int], counts: Sequence[int], options: MethodOptions
    ) -> list[Stage]:
        """The stages for these counts, with the method's fixed numbers; none for a block that changes nothing."""

    def merges(self, options: MethodOptions) -> bool:
        """Whether tokens are joined, so that the stages report `merged`."""

    def untrained(self, options: MethodOptions) -> str | None:
        """Why predictions of a model pruned like this mean nothing, although its latency does; None where they do."""

    def score_names(self, stage: Stage) -> tuple[str, ...]:
        """Names of the scores the stage reports in the audit graph."""

    def build_stage(
        self, stage: Stage, geometry: Geometry, options: MethodOptions, weights: Mapping[str, Tensor]
    ) -> StageModule:
        """The module that runs one stage; `weights` are the method's own of the checkpoint (`methods.WEIGHTS`)."""

    def replay(self, stage: Stage, scores: Mapping[str, Tensor], geometry: Geometry, options: MethodOptions) -> Replay:
        """Recomputes the selection from the scores an engine reported (audit graph)."""


# --- answers that many methods give ------------------------------------------------------------


def any_backbone(geometry: Geometry, options: MethodOptions) -> str | None:
    """`Method.refuses` of methods that run on every backbone, with and without a class token."""
    return None


def only_drops(options: MethodOptions) -> bool:
    """`Method.merges` of methods that join no tokens."""
    return False


def needs_no_training(options: MethodOptions) -> str | None:
    """`Method.untrained` of methods that leave a pre-trained model's weights as they are."""
    return None


def misnumbered(stage: Stage, needs: str) -> BadRequest:
    """The refusal of a stage whose fixed numbers cannot be, as in a plan edited by hand; `needs`: which could."""
    return BadRequest(
        f"The stage at block {stage.block} has the fixed numbers {stage.static}; {needs}.",
        "Make the plan anew with `ztp plan`.",
    )


# --- scores and margins ------------------------------------------------------------------------


def class_rows(probabilities: Tensor, class_token: int, special_tokens: int) -> Tensor:
    """The class token's attention [B, H, n] to the patch tokens, from probabilities [B, H, N, N]."""
    return probabilities[:, :, class_token, special_tokens:]


def top_k_margin(scores: Tensor, k: int, scale: Tensor | None = None) -> Tensor:
    """Relative distance [B, M] of each score from the middle between the k-th and the (k + 1)-th largest.

    Positive for the k best, ties resolved towards the lower index as the selection does. Relative to that middle, or,
    for scores whose zero is nowhere in particular, to `scale` [B, 1].
    """
    from ztp_deploy.pruning.tokens import membership, top_k

    count = scores.shape[-1]
    chosen = membership(top_k(scores, k), count) > 0
    if k >= count or k == 0:
        return torch.where(chosen, torch.inf, -torch.inf).to(scores)
    ranked = scores.sort(dim=-1, descending=True).values
    cut = (ranked[:, k - 1 : k] + ranked[:, k : k + 1]) / 2
    distance = (scores - cut).abs() / (cut.abs() if scale is None else scale).clamp_min(torch.finfo(scores.dtype).tiny)
    # A cut at −∞ (everything that takes part is kept) is infinitely far away.
    distance = distance.nan_to_num(nan=torch.inf, posinf=torch.inf).clamp_min(torch.finfo(scores.dtype).tiny)
    return torch.where(chosen, distance, -distance)
