"""How many voting rounds are enough: the least at which a stage keeps what it would keep after many."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict
from torch import Tensor, nn

from ztp_deploy import methods, models
from ztp_deploy.methods import zero_tprune
from ztp_deploy.plan import Plan, Stage
from ztp_deploy.pruning.prune import prune
from ztp_deploy.pruning.tokens import initial_state, top_k

GRID = (1, 2, 3, 4, 5, 6, 8, 10, 12, 16, 20, 30, 40, 50)
MOST = GRID[-1]
SHARE = 0.99
IMAGES = 8


class StageRounds(BaseModel):
    """One stage's voting rounds: those of the plan, and those that keep `SHARE` of the tokens that `MOST` would."""

    model_config = ConfigDict(frozen=True)  # earlier records also say `most` and `share`

    block: int
    rounds: int
    enough: int


def rounds_needed(kept: Mapping[int, NDArray[Any]], share: float = SHARE) -> int:
    """The least rounds from which on `share` of the tokens kept are those that the most rounds keep.

    `kept` by rounds are slots [B, k], in any order. A number that agrees while a larger one does not is no
    answer.
    """
    descending = sorted(kept, reverse=True)
    least, final = descending[0], kept[descending[0]]
    for rounds in descending[1:]:
        common = sum(len(np.intersect1d(now, then)) for now, then in zip(kept[rounds], final, strict=True))
        if common < share * np.size(final):
            break
        least = rounds
    return least


def by_block(model: nn.Module, images: Tensor) -> dict[int, int]:
    """Rounds that are enough at every block of the dense model, for keeping the better half of all tokens.

    images [B, 3, H, W]. What the search proposes from; stages behind others see other tokens (`of_plan` measures
    those of one plan).
    """
    host = models.host_of(model)
    geometry, options = host.geometry, zero_tprune.Options()
    found: dict[int, int] = {}
    with torch.inference_mode():
        tokens, state = host.embed(images), initial_state(images, geometry.patch_tokens)
        for number, block in enumerate(host.blocks, start=1):
            attention = host.attention(block, tokens, state)
            everyone = attention.probabilities.shape[-1]
            start = zero_tprune.start_scores(everyone, everyone, geometry.class_token).to(images.device)
            kept = {}
            for rounds in GRID:
                score = zero_tprune.importance(
                    attention.probabilities.float(),
                    rounds,
                    start,
                    participants=everyone,
                    options=options,
                ).score[:, geometry.special_tokens :]
                kept[rounds] = top_k(score, max(1, geometry.patch_tokens // 2)).cpu().numpy()
            found[number] = rounds_needed(kept)
            tokens = host.transform(block, host.finish(block, tokens, attention.mixed))
    return found


def of_plan(model: nn.Module, plan: Plan, images: Tensor) -> tuple[StageRounds, ...]:
    """Rounds that are enough at each stage of a plan, on the tokens that reach it; none for methods that do not vote.

    Every stage is given the tokens that the plan itself keeps before it, so that stages are judged one by one.
    """
    if not plan.stages or not has_rounds(plan.method):
        return ()
    with torch.inference_mode():
        taken = prune(model, plan).run(images).kept
        kept: list[dict[int, NDArray[Any]]] = [{} for _ in plan.stages]
        for rounds in GRID:
            stages = tuple(_voting(stage, rounds) for stage in plan.stages)
            scores = prune(model, plan.model_copy(update={"stages": stages})).run(images, taken).scores
            for index, stage in enumerate(plan.stages):
                kept[index][rounds] = top_k(scores[index]["score"], stage.tokens_out).cpu().numpy()
    return tuple(
        StageRounds(block=stage.block, rounds=stage.static["rounds"], enough=rounds_needed(kept[index]))
        for index, stage in enumerate(plan.stages)
    )


def _voting(stage: Stage, rounds: int) -> Stage:
    return stage.model_copy(update={"static": {**stage.static, "rounds": rounds}})


def has_rounds(method: str) -> bool:
    """Whether a method votes in rounds."""
    return "rounds" in methods.get(method).Options.model_fields
