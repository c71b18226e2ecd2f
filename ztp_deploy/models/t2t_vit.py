"""T2T-ViT (arXiv:2101.11986): its names, and its backbone taken apart. The token module is the embedding, unpruned."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from torch import Tensor, nn

from ztp_deploy.errors import BadRequest
from ztp_deploy.models.base import own_keys
from ztp_deploy.models.blocks import Block, BlocksHost
from ztp_deploy.models.parts import unready
from ztp_deploy.models.t2t_modules import PATCH, Size, T2TViT
from ztp_deploy.plan import Geometry
from ztp_deploy.pruning.tokens import TokenState
from ztp_deploy.source import ModelSize

SUMMARY = "T2T-ViT: tokens from overlapping soft splits, with performer or transformer (t) token modules"

SIZES: dict[str, Size] = {
    "t2t_vit_7": Size("performer", embed_dim=256, depth=7, num_heads=4, mlp_ratio=2),
    "t2t_vit_10": Size("performer", embed_dim=256, depth=10, num_heads=4, mlp_ratio=2),
    "t2t_vit_12": Size("performer", embed_dim=256, depth=12, num_heads=4, mlp_ratio=2),
    "t2t_vit_14": Size("performer", embed_dim=384, depth=14, num_heads=6, mlp_ratio=3),
    "t2t_vit_19": Size("performer", embed_dim=448, depth=19, num_heads=7, mlp_ratio=3),
    "t2t_vit_24": Size("performer", embed_dim=512, depth=24, num_heads=8, mlp_ratio=3),
    "t2t_vit_t_14": Size("transformer", embed_dim=384, depth=14, num_heads=6, mlp_ratio=3),
    "t2t_vit_t_19": Size("transformer", embed_dim=448, depth=19, num_heads=7, mlp_ratio=3),
    "t2t_vit_t_24": Size("transformer", embed_dim=512, depth=24, num_heads=8, mlp_ratio=3),
}

NAMES: dict[str, str] = {name: name for name in SIZES}
architecture_of = NAMES.get
translate = own_keys

_CONFIG = {
    "mean": IMAGENET_DEFAULT_MEAN,
    "std": IMAGENET_DEFAULT_STD,
    "interpolation": "bicubic",
    "crop_pct": 0.9,
    "origin_url": "https://github.com/yitu-opensource/T2T-ViT",
    "license": "BSD-3-Clause-Clear",
}
"""Preprocessing and origin, in timm's terms; the official checkpoints are releases of that repository."""


def build(architecture: str, size: ModelSize, device: str = "cpu") -> nn.Module:
    """The untrained model in evaluation mode. Raises BadRequest for sizes that do not fit together."""
    given = size.given()
    patch = given.pop("patch_size", PATCH)
    sizes = replace(SIZES[architecture], **given)
    reason = None
    if patch != PATCH:
        reason = f"patch_size={patch} was asked for, but its three soft splits always make patches of {PATCH} pixels"
    elif sizes.img_size % PATCH:
        reason = f"img_size={sizes.img_size} is not a multiple of {PATCH}"
    elif sizes.embed_dim % sizes.num_heads:
        reason = f"embed_dim={sizes.embed_dim} is not a multiple of num_heads={sizes.num_heads}"
    elif int(sizes.embed_dim * sizes.mlp_ratio) < 1:
        reason = f"mlp_ratio={sizes.mlp_ratio:g} leaves the MLP no channels"
    if reason:
        raise BadRequest(f"{architecture} cannot be built: {reason}.", "Choose other sizes, or leave them out.")
    with torch.device(device):
        model = T2TViT(sizes)
    model.pretrained_cfg = _CONFIG  # type: ignore[assignment]
    return model.eval()


def adapts(model: nn.Module) -> bool:
    """Whether this family's host carries the model."""
    return isinstance(model, T2TViT)


def _check_plain(model: Any) -> None:
    """Raises BadRequest for everything that would make the host compute something else than the module."""
    reason = unready(model)
    if type(model) is not T2TViT or any(type(block) is not Block for block in model.blocks):
        reason = "it changes parts of T2T-ViT, and the changes would be lost"
    if reason:
        raise BadRequest(f"This {type(model).__name__} cannot be pruned: {reason}.", "`ztp list` shows what can.")


class T2TVitHost(BlocksHost):
    """A T2T-ViT taken apart; shares the model's parameters."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__(model)
        _check_plain(self.model)
        self.geometry = _geometry(self.model)

    @property
    def classifiers(self) -> Sequence[nn.Module]:
        return [self.model.head]

    def read_out(self, tokens: Tensor, state: TokenState) -> Tensor:
        logits: Tensor = self.model.read_out(tokens)
        return logits


host = T2TVitHost


def _geometry(model: Any) -> Geometry:
    size = model.size
    mlp = model.blocks[0].mlp
    return Geometry(
        image_size=size.img_size,
        patch_tokens=model.tokens_to_token.split2.out_side**2,
        special_tokens=1,
        class_token=0,
        depth=size.depth,
        embed_dim=size.embed_dim,
        attention_dim=size.embed_dim,
        num_heads=size.num_heads,
        mlp_macs_per_token=mlp.fc1.weight.numel() + mlp.fc2.weight.numel(),
        num_classes=size.num_classes,
        # Both token modules whole (linear layers and the products of their attention) and the last projection.
        embed_macs=model.tokens_to_token.macs(),
        head_macs=model.head.weight.numel(),
    )
