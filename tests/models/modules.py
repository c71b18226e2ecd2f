"""Small timm modules with seeded weights, as a user would bring them, and what a forward pass multiplies."""

from __future__ import annotations

from collections.abc import Callable

import timm
import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from ztp_deploy.models.weights import fill_random

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
