"""Precision written into the module itself, by the rule that `precision` applies to ONNX graphs.

The way of the tokens goes to fp16 or bf16. Scores stay float32, because every stage takes the attention it
is given as float32; so do the image until it enters the backbone, and the classifier's own product.
"""

from __future__ import annotations

import copy

import torch
from torch import Tensor, nn

from ztp_deploy.exporters.graph import InferenceGraph

TYPES = {"fp16": torch.float16, "bf16": torch.bfloat16}


def lower(graph: InferenceGraph, precision: str) -> InferenceGraph:
    """A copy of the graph whose backbone computes in fp16 or bf16; the graph itself for fp32.

    Same input, outputs and names; the caller's module stays as it is.
    """
    if precision == "fp32":
        return graph
    lowered = copy.deepcopy(graph)
    lowered.low = TYPES[precision]
    lowered.pruned.model.to(lowered.low)
    for classifier in lowered.pruned.host.classifiers:
        classifier.float().register_forward_pre_hook(_in_float32)
    return lowered


def _in_float32(module: nn.Module, arguments: tuple[Tensor]) -> tuple[Tensor]:
    return (arguments[0].float(),)
