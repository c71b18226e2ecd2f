"""The module that exporters trace: one image input, logits, what was kept, and the audit scores."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor, nn

from ztp_deploy import methods
from ztp_deploy.plan import Plan
from ztp_deploy.pruning.prune import PrunedModel


def output_names(plan: Plan) -> tuple[str, ...]:
    """`logits`, then `kept_1`, `kept_2` … one per stage, then `merged_1` … of methods that merge tokens."""
    kinds = ("kept", "merged") if merges(plan) else ("kept",)
    return ("logits", *(f"{kind}_{index}" for kind in kinds for index in range(1, len(plan.stages) + 1)))


def merges(plan: Plan) -> bool:
    """Whether the plan's stages join tokens and say which."""
    if not plan.stages:
        return False
    return methods.get(plan.method).merges(methods.parse_options(plan.method, plan.options))


class InferenceGraph(nn.Module):
    """Images → (logits, kept_1 …, merged_1 …): what a graph file computes; `audited` adds the scores.

    With `input="uint8"` pixels [B, 3, H, W] are normalised here, as timm's transform does it. Of a module on another
    device it takes a copy on the CPU: what is exported and what proofs refer to does not hang on where the model lies.
    """

    mean: Tensor
    std: Tensor

    def __init__(self, pruned: PrunedModel, input: Literal["float32", "uint8"]) -> None:
        super().__init__()
        on_cpu = all(value.device.type == "cpu" for value in (*pruned.parameters(), *pruned.buffers()))
        self.pruned = pruned if on_cpu else copy.deepcopy(pruned).cpu()
        self.input = input
        self.low: torch.dtype | None = None
        """What the backbone computes in where that is not float32; set by `lower`."""
        preprocessing = pruned.source.preprocessing
        self.register_buffer("mean", torch.tensor(preprocessing.mean).reshape(1, 3, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(preprocessing.std).reshape(1, 3, 1, 1), persistent=False)
        plan = pruned.plan
        self.output_names = output_names(plan)
        self.audit_names = tuple(
            f"{name}_{index}"
            for index, stage in enumerate(plan.stages, start=1)
            for name in methods.get(plan.method).score_names(stage)
        )

    def forward(self, images: Tensor) -> tuple[Tensor, ...]:
        """What ships: the outputs in the order of `output_names`."""
        outputs = self.pruned.run(self.normalise(images))
        return (outputs.logits, *outputs.kept, *outputs.merged)

    def audited(self, images: Tensor, forced: Sequence[Tensor] | None = None) -> tuple[Tensor, ...]:
        """What ships, then the stage scores in the order of `audit_names`; see `PrunedModel.run` for `forced`."""
        outputs = self.pruned.run(self.normalise(images), forced)
        scores = {
            f"{name}_{index}": value
            for index, stage in enumerate(outputs.scores, start=1)
            for name, value in stage.items()
        }
        return (outputs.logits, *outputs.kept, *outputs.merged, *(scores[name] for name in self.audit_names))

    def normalise(self, images: Tensor) -> Tensor:
        """Float input as it is; uint8 pixels scaled to [0, 1], then (x − mean) / std."""
        if self.input == "uint8":
            images = (images.to(torch.float32) / 255 - self.mean) / self.std
        return images if self.low is None else images.to(self.low)

    def example(self, batch: int) -> Tensor:
        """A traceable example batch: noise, the same on every machine."""
        generator = torch.Generator().manual_seed(0)
        shape = (batch, 3, self.pruned.plan.image_size, self.pruned.plan.image_size)
        if self.input == "uint8":
            return torch.randint(0, 256, shape, generator=generator, dtype=torch.uint8)
        return torch.randn(shape, generator=generator)


class AuditedGraph(nn.Module):
    """`InferenceGraph.audited` as a module, for exporters that trace `forward`."""

    def __init__(self, graph: InferenceGraph) -> None:
        super().__init__()
        self.inference = graph  # fx modules own the name "graph"

    def forward(self, images: Tensor) -> tuple[Tensor, ...]:
        return self.inference.audited(images)
