"""Token Merging, ToMe (Bolya, Fu, Dai, Zhang, Feichtenhofer, Hoffman, ICLR 2023, arXiv:2210.09461).

Between attention and MLP of a block, tokens are split in turn into the sets A and B; each of A is matched with its
most similar one of B (cosine of the keys' mean over heads), and the r best matched of A join their partners by a mean
weighted by size. Attention then adds the logarithm of each key's size (proportional attention).
Special tokens take part in the split and in nothing else. The output order is the authors': special tokens, what is
left of A, B; the next block splits by it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from fractions import Fraction
from typing import Literal

import torch
from torch import Tensor

from ztp_deploy.errors import BadRequest
from ztp_deploy.methods.base import (
    Decision,
    MethodOptions,
    Replay,
    StageModule,
    StageOutput,
    any_backbone,
    misnumbered,
    needs_no_training,
    top_k_margin,
)
from ztp_deploy.methods.share import counts_after, counts_at_share, falling, spread, zero_tprune_share
from ztp_deploy.models.base import Attention
from ztp_deploy.plan import Geometry, Place, Stage, every_block, kept_chain
from ztp_deploy.pruning.merge import Joining, directions, forced_joining, join, partner_margin
from ztp_deploy.pruning.tokens import TokenState, key_bias, membership, take, take_special, top_k

PLACES: tuple[Place, ...] = ("after_attention",)
SUMMARY = "training-free: merges the most similar tokens, a few in every block (ICLR 2023)"
SEARCH = "it has a number for every block and no stages to place"

default_sites = every_block
refuses = any_backbone
untrained = needs_no_training


class Options(MethodOptions):
    """Choices of ToMe; the defaults are the published method for models used off the shelf.

    `proportional`: attention weighs keys by size; the authors switch it off for MAE models and models trained with
    ToMe. `schedule`, of a ratio: "constant" merges as many in every block, "decreasing" linearly fewer, none in the
    last. `weigh_mean`: read-outs that average over patches weigh by size, as the authors do for MAE.
    """

    proportional: bool = True
    schedule: Literal["constant", "decreasing"] = "constant"
    weigh_mean: bool = True


# --- counts ------------------------------------------------------------------------------------


def counts(geometry: Geometry, blocks: Sequence[int], ratio: float, options: MethodOptions) -> list[int]:
    """The counts nearest to the FLOP share that Zero-TPrune has at the ratio with its default sites."""
    assert isinstance(options, Options)
    tokens, number = geometry.patch_tokens, len(blocks)

    def constant(total: int) -> list[int]:
        return counts_after(tokens, spread(total, number), most_merged)

    def decreasing(step: int) -> list[int]:
        return counts_after(tokens, falling(Fraction(step, number), number), most_merged)

    def stages_for(counts: list[int]) -> list[Stage]:
        return schedule(geometry, blocks, counts, options)

    counts_for = constant if options.schedule == "constant" else decreasing
    return counts_at_share(geometry, zero_tprune_share(geometry, ratio), tokens * number, counts_for, stages_for)


def most_merged(tokens: int) -> int:
    """Tokens a block can merge of so many patch tokens: half, rounded down."""
    return tokens // 2


def schedule(geometry: Geometry, blocks: Sequence[int], counts: Sequence[int], options: MethodOptions) -> list[Stage]:
    """One stage in each of `blocks` that merges any, with `unmerged` (tokens of A that stay) and `top_k`.

    Raises BadRequest for counts that fall by more than half.
    """
    stages = []
    for block, before, after in kept_chain(geometry.patch_tokens, blocks, counts):
        merged = before - after
        if merged > most_merged(before):
            raise BadRequest(
                f"ToMe merges at most half of the tokens in a block; from {before} to {after} at block {block} is more.",
                f"Keep at least {before - most_merged(before)} there.",
            )
        unmerged = len(set_a(before, geometry.special_tokens)) - merged
        static = {"unmerged": unmerged, "top_k": merged if unmerged else 0}
        stages.append(Stage(block=block, place=PLACES[0], tokens_in=before, tokens_out=after, static=static))
    return stages


def first_slots(special_tokens: int) -> tuple[int, int]:
    """The first patch slots of the sets A and B: A has, with the special tokens ahead, the even ones of all, B the odd."""
    return special_tokens % 2, 1 - special_tokens % 2


def set_a(tokens: int, special_tokens: int) -> range:
    """The patch slots of set A."""
    return range(first_slots(special_tokens)[0], tokens, 2)


def set_b(tokens: int, special_tokens: int) -> range:
    """The patch slots of set B."""
    return range(first_slots(special_tokens)[1], tokens, 2)


def merges(options: MethodOptions) -> bool:
    """Yes."""
    return True


def score_names(stage: Stage) -> tuple[str, ...]:
    """Cosines [B, a, b] of the tokens of A with those of B, both in slot order."""
    return ("similarity",)


# --- pure scores -------------------------------------------------------------------------------


def cosines(keys: Tensor, special_tokens: int) -> Tensor:
    """Similarity [B, a, b] of A with B, keys [B, H, S + n, d]: cosine of their mean over heads."""
    features = directions(keys.float().mean(1)[:, special_tokens:])
    a, b = first_slots(special_tokens)
    return features[:, a::2] @ features[:, b::2].transpose(1, 2)


def match(similarity: Tensor, stage: Stage, special_tokens: int) -> Joining:
    """The best matched of A join their partners: similarity [B, a, b] → who stays, leaves and joins whom."""
    batch, in_a, _ = similarity.shape
    a, b = first_slots(special_tokens)
    unmerged = stage.static["unmerged"]
    partner = similarity.argmax(2)
    numbers = torch.arange(in_a, device=similarity.device)
    of_b = torch.arange(b, stage.tokens_in, 2, device=similarity.device).expand(batch, -1)
    if unmerged:
        sources = top_k(similarity.amax(2), in_a - unmerged)
        # What is left of A in slot order: the lowest numbers first, those that leave last.
        left = top_k(-numbers - membership(sources, in_a) * in_a, unmerged)
        stay, joined = torch.cat([left * 2 + a, of_b], dim=1), take(partner, sources)
    else:
        sources, stay, joined = numbers.expand(batch, -1), of_b, partner
    return Joining(stay, sources * 2 + a, joined + unmerged)


# --- the stage ---------------------------------------------------------------------------------


class ToMeStage(StageModule):
    """Matches by the block's keys and joins the tokens that come out of its attention."""

    needs_attention = True

    def __init__(self, stage: Stage, geometry: Geometry, options: Options) -> None:
        super().__init__()
        self.stage = stage
        self.special_tokens = geometry.special_tokens
        self.options = options

    def forward(
        self, tokens: Tensor, state: TokenState, attention: Attention | None, forced: Tensor | None = None
    ) -> StageOutput:
        assert attention is not None
        similarity = cosines(attention.keys, self.special_tokens)
        joining = match(similarity, self.stage, self.special_tokens)
        if forced is not None:
            joining = self._forced(forced, state)
        order, special = joining.order, self.special_tokens
        sizes = None if state.sizes is None else take(state.sizes, order)
        rows = take_special(tokens, order, special)
        tokens, sizes = join(rows, joining.target, self.stage.tokens_out, special, sizes)
        state = replace(
            state,
            positions=take(state.positions, joining.stay),
            sizes=sizes[:, special:],
            bias=key_bias(sizes.log()) if self.options.proportional else None,
            weigh_mean=self.options.weigh_mean,
        )
        return StageOutput(tokens, state, {"similarity": similarity}, joining.destination_slots(self.stage.tokens_in))

    def _forced(self, destinations: Tensor, state: TokenState) -> Joining:
        entering, leaving = self.stage.tokens_in, self.stage.tokens_in - self.stage.tokens_out
        order = [*set_a(entering, self.special_tokens), *set_b(entering, self.special_tokens)]
        slots = torch.tensor(order, device=destinations.device)
        return forced_joining(destinations, state, self.stage.tokens_out, leaving, slots)


def build_stage(stage: Stage, geometry: Geometry, options: MethodOptions, weights: Mapping[str, Tensor]) -> StageModule:
    """The stage for `stage`. Raises BadRequest where its fixed numbers cannot be (a plan edited by hand)."""
    assert isinstance(options, Options)
    merged = stage.tokens_in - stage.tokens_out
    unmerged = len(set_a(stage.tokens_in, geometry.special_tokens)) - merged
    needed, most = {"unmerged": unmerged, "top_k": merged if unmerged else 0}, most_merged(stage.tokens_in)
    if not 0 < merged <= most:
        raise misnumbered(stage, f"ToMe merges 1 to {most} of {stage.tokens_in} tokens, not {merged}")
    if stage.static != needed:
        raise misnumbered(stage, f"ToMe from {stage.tokens_in} to {stage.tokens_out} tokens needs {needed}")
    return ToMeStage(stage, geometry, options)


# --- replay ------------------------------------------------------------------------------------


def replay(stage: Stage, scores: Mapping[str, Tensor], geometry: Geometry, options: MethodOptions) -> Replay:
    """Recomputes which tokens of A merge, and into which of B, from the cosines."""
    similarity = scores["similarity"]
    entering, batch = stage.tokens_in, len(similarity)
    joining = match(similarity, stage, geometry.special_tokens)
    a = torch.tensor(set_a(entering, geometry.special_tokens))
    b = torch.tensor(set_b(entering, geometry.special_tokens))
    merged = similarity.new_full((batch, entering), -torch.inf)
    # A cosine of 0 is nothing in particular: differences count as they are.
    merged[:, a] = top_k_margin(similarity.amax(2), entering - stage.tokens_out, similarity.new_ones(batch, 1))
    leave = joining.leave
    rows = similarity.gather(1, (leave // 2).unsqueeze(2).expand(-1, -1, len(b)))
    goes = torch.arange(entering).expand(batch, -1).scatter(1, leave, joining.stay.gather(1, joining.target))
    return Replay(
        kept=joining.stay,
        decisions=(
            Decision("merged", merged),
            Decision("partner", partner_margin(rows, leave, b.expand(batch, -1), entering)),
        ),
        goes=goes,
    )
