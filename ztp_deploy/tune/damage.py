"""What a plan does to a model's predictions on images without labels, and which images may choose."""

from __future__ import annotations

import copy
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict
from torch import nn

from ztp_deploy.errors import BadRequest, GateFailed
from ztp_deploy.evidence.accuracy import Proportion, image_kl, paired_bootstrap, wilson
from ztp_deploy.evidence.images import ImageSet
from ztp_deploy.plan import Plan
from ztp_deploy.pruning.prune import prune

LEAST_IMAGES = 8
BATCH = 16
SUBSET_SHARE = 4
"""All trials see one in so many of the search images, at least `LEAST_IMAGES` of them."""


class Damage(BaseModel):
    """Pruned against dense on the same images: mean KL(dense ‖ pruned) in nats per image, and equal best classes."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    images: int
    mean_kl: float
    agreement: Proportion


class HeldOut(BaseModel):
    """KL of the uniform plan less that of the winner on images that chose nothing, with its paired 95 % interval."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    images: int
    difference: float
    low: float
    high: float


@dataclass(frozen=True)
class Split:
    """Rows of the images: `search` chooses the winner, `subset` of it sees every trial, `held_out` only reports."""

    search: tuple[int, ...]
    subset: tuple[int, ...]
    held_out: tuple[int, ...]


def split(count: int) -> Split:
    """Every other image is held out; the subset is spread evenly over the rest. Raises BadRequest for too few."""
    if count < 2 * LEAST_IMAGES:
        raise BadRequest(
            f"{count} images are too few to choose a plan on one half and judge it on the other.",
            f"Give at least {2 * LEAST_IMAGES}; a few hundred are better.",
        )
    search = tuple(range(0, count, 2))
    size = max(LEAST_IMAGES, len(search) // SUBSET_SHARE)
    subset = tuple(search[index * len(search) // size] for index in range(size))
    return Split(search, subset, tuple(range(1, count, 2)))


class Judge:
    """Runs plans in eager PyTorch on the images, the dense model once: `model` is a copy on the device."""

    def __init__(self, model: nn.Module, images: ImageSet, device: str) -> None:
        self.model = copy.deepcopy(model).to(device).eval()  # the caller's stays where exporters expect it
        self.device = device
        self.pixels = images.pixels
        self.dense = self._run(self.model, range(len(images.names)))

    def logits(self, plan: Plan, rows: tuple[int, ...]) -> NDArray[np.float32]:
        """The pruned model's logits [len(rows), classes]. Raises GateFailed where they are not finite."""
        found = self._run(prune(self.model, plan), rows)
        if not np.isfinite(found).all():
            raise GateFailed(f"{plan.label} gives logits that are NaN or infinite.", "Check the weights and images.")
        return found

    def kl(self, logits: NDArray[np.float32], rows: tuple[int, ...]) -> NDArray[np.float64]:
        """KL(dense ‖ pruned) of every image."""
        return image_kl(self.dense[list(rows)], logits)

    def damage(self, plan: Plan, rows: tuple[int, ...]) -> Damage:
        """What the plan does on these images."""
        return self.compare(self.logits(plan, rows), rows)

    def compare(self, logits: NDArray[np.float32], rows: tuple[int, ...]) -> Damage:
        """The same of logits that are there."""
        same = int((self.dense[list(rows)].argmax(axis=1) == logits.argmax(axis=1)).sum())
        return Damage(images=len(rows), mean_kl=float(self.kl(logits, rows).mean()), agreement=wilson(same, len(rows)))

    def _run(self, model: nn.Module, rows: range | tuple[int, ...]) -> NDArray[np.float32]:
        parts = []
        with torch.inference_mode():
            for start in range(0, len(rows), BATCH):
                pixels = torch.from_numpy(self.pixels[list(rows[start : start + BATCH])])
                parts.append(model(pixels.to(self.device)).float().cpu().numpy())
        return np.concatenate(parts)


def held_out(uniform: NDArray[np.float64], winner: NDArray[np.float64], seed: int) -> HeldOut:
    """Per-image KL [n] of both plans, compared image by image."""
    difference, low, high = paired_bootstrap(uniform - winner, seed=seed)
    return HeldOut(images=len(winner), difference=difference, low=low, high=high)
