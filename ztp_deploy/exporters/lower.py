"""Precision written into the module itself, by the rule that `precision` applies to ONNX graphs.

The way of the tokens goes to fp16 or bf16. Scores stay float32, because every stage takes the attention it
is given as float32; so do the image until it enters the backbone, and the classifier's own product.
"""

from __future__ import annotations

import copy
from typing import cast

import torch
from torch import Tensor, nn
from torch.nn import functional

from ztp_deploy.exporters.graph import InferenceGraph
from ztp_deploy.methods.base import StageModule

TYPES = {"fp16": torch.float16, "bf16": torch.bfloat16}


def lower(graph: InferenceGraph, precision: str) -> InferenceGraph:
    """A copy of the graph whose backbone computes in fp16 or bf16; the graph itself for fp32.

    Same input, outputs and names; the caller's module stays as it is. Patches are cut out and multiplied: for three
    channels in half precision cuDNN has no convolution on tensor cores.
    """
    if precision == "fp32":
        return graph
    lowered = copy.deepcopy(graph)
    lowered.low = TYPES[precision]
    lowered.pruned.model.to(lowered.low)
    for name, module in list(lowered.pruned.model.named_modules()):
        if isinstance(module, nn.Conv2d) and cuts_patches(module):
            lowered.pruned.model.set_submodule(name, PatchProduct(module))
    for classifier in lowered.pruned.host.classifiers:
        classifier.float().register_forward_pre_hook(_in_float32)
    return lowered


def join_stages(graph: InferenceGraph) -> InferenceGraph:
    """A copy of the graph whose stages may be operators of their own, for programs that know them by name."""
    joined = copy.deepcopy(graph)
    for stage in joined.pruned.stages.values():
        cast(StageModule, stage).joined = True
    return joined


def _in_float32(module: nn.Module, arguments: tuple[Tensor]) -> tuple[Tensor]:
    return (arguments[0].float(),)


def cuts_patches(convolution: nn.Conv2d) -> bool:
    """Whether the convolution reads every pixel once: a product of patches that lie side by side."""
    return (
        convolution.stride == convolution.kernel_size
        and convolution.padding in ((0, 0), 0)
        and convolution.dilation == (1, 1)
        and convolution.groups == 1
        and convolution.kernel_size != (1, 1)
    )


class PatchProduct(nn.Module):
    """A convolution that cuts patches, as one matrix product."""

    def __init__(self, convolution: nn.Conv2d) -> None:
        super().__init__()
        self.patch = convolution.kernel_size
        self.weight = nn.Parameter(convolution.weight.flatten(1), requires_grad=False)
        self.bias = convolution.bias

    def forward(self, images: Tensor) -> Tensor:
        """Images [B, C, H, W] → [B, D, H // patch, W // patch]; pixels beyond the last whole patch are not read."""
        (height, width), (h, w) = self.patch, images.shape[2:]
        if h % height or w % width:
            images = images[:, :, : h - h % height, : w - w % width]
        rows, columns = h // height, w // width
        cut = images.reshape(-1, images.shape[1], rows, height, columns, width)
        patches = cut.permute(0, 2, 4, 1, 3, 5).flatten(3)
        return functional.linear(patches, self.weight, self.bias).permute(0, 3, 1, 2)
