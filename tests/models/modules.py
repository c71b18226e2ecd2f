"""Small timm modules with seeded weights, as a user would bring them, and what must hold of every one."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import timm
import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

import ztp_deploy as ztp
from ztp_deploy.models import host_of
from ztp_deploy.models.weights import fill_random
from ztp_deploy.pruning.tokens import initial_state, key_bias

GRID = 6


def module(architecture: str, **changes: object) -> nn.Module:
    """The architecture with 36 patches, 4 blocks of 48 channels and 3 heads, and 10 classes."""
    side = GRID * (14 if "patch14" in architecture else 16)
    sizes: dict[str, object] = {"img_size": side, "embed_dim": 48, "depth": 4, "num_heads": 3, "num_classes": 10}
    if "dinov3" in architecture:
        sizes["dynamic_img_size"] = False
    model = timm.create_model(architecture, **(sizes | changes)).eval()
    fill_random(model)
    return model.requires_grad_(False)


def images(model: nn.Module, count: int = 2) -> Tensor:
    """Noise images [count, 3, H, W] of the size that the model takes."""
    height, width = model.patch_embed.img_size
    return torch.randn(count, 3, height, width, generator=torch.Generator().manual_seed(0))


def macs(run: Callable[[Tensor], object], image: Tensor) -> int:
    """Multiply-accumulates of all matrix products and convolutions in one pass, counted by torch."""
    with torch.no_grad(), sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        run(image)
    return counter.get_total_flops() // 2


def assert_dense_is_the_modules_own_forward(model: nn.Module) -> None:
    """Without stages the host computes what the module computes, and not nothing."""
    batch = images(model)
    expected = model(batch)
    assert expected.std() > 0.1
    found = ztp.prune(model, ztp.make_plan(model, "dense"))(batch)
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)


def assert_open_attention_is_the_fused_one(model: nn.Module) -> None:
    """With and without a bias; its logits are those of the queries and keys it reports."""
    host = host_of(model)
    batch = images(model)
    tokens, state = host.embed(batch), initial_state(batch, GRID**2)
    block: Any = host.blocks[1]
    bias = key_bias(torch.linspace(-2, 0, tokens.shape[1]).expand(2, -1))
    for given in (state, replace(state, bias=bias)):
        attention = host.attention(block, tokens, given)
        again = (attention.queries * block.attn.scale) @ attention.keys.transpose(-1, -2)
        torch.testing.assert_close(attention.logits, again + (0 if given.bias is None else bias), atol=1e-5, rtol=1e-5)
        finished = host.finish(block, tokens, attention.probabilities @ attention.values)
        torch.testing.assert_close(finished, host.mix(block, tokens, given), atol=1e-5, rtol=1e-5)
