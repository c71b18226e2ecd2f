"""What the tests of dropping methods share: golden models, observations of runs, and the point where a choice flips."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import numpy as np
import torch

import ztp_deploy as ztp
from tests import golden
from ztp_deploy.evidence.selection import Observation
from ztp_deploy.models.base import ModelSize
from ztp_deploy.pruning.prune import Outputs, PrunedModel


def golden_model(name: str) -> torch.nn.Module:
    """The backbone of a golden case with its weights."""
    case = golden.CASES[name]
    arguments = case["arguments"]
    size = ModelSize(
        img_size=case["input_shape"][-1],
        embed_dim=arguments["embed_dim"],
        depth=arguments["depth"],
        num_heads=arguments["num_heads"],
        num_classes=arguments["num_classes"],
    )
    return ztp.load_model("deit_t", weights=golden.state_dict(name), overrides=size)


def run(pruned: PrunedModel, images: torch.Tensor, forced: list[torch.Tensor] | None = None) -> Outputs:
    """One pass without gradients."""
    with torch.inference_mode():
        return pruned.run(images, forced)


def observe(outputs: Outputs) -> Observation:
    """What the parity gate sees of a run."""
    scores = {
        f"{name}_{index}": value.numpy().copy()
        for index, stage in enumerate(outputs.scores, start=1)
        for name, value in stage.items()
    }
    return Observation(outputs.logits.numpy(), [kept.numpy().copy() for kept in outputs.kept], [], scores)


def observation(kept: list[np.ndarray], scores: Mapping[str, np.ndarray]) -> Observation:
    """A run over one image, made up: positions [k] per stage and scores [n] by name."""
    return Observation(
        np.zeros((1, 10)), [k[None].astype(np.int32) for k in kept], [], {key: v[None] for key, v in scores.items()}
    )


def flip(
    kept: Callable[[np.ndarray], np.ndarray], start: np.ndarray, end: np.ndarray
) -> tuple[np.ndarray, np.ndarray] | None:
    """Scores on the way from `start` to `end` that lie just before and just after a change of the kept set."""

    def at(share: float) -> np.ndarray:
        return (1 - share) * start + share * end

    low, high = 0.0, 1.0
    before = set(kept(start).tolist())
    if before == set(kept(end).tolist()):
        return None
    while high - low > 1e-13:
        middle = (low + high) / 2
        low, high = (middle, high) if set(kept(at(middle)).tolist()) == before else (low, middle)
    return at(low), at(high)
