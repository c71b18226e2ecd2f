"""LV-ViT (Jiang et al., NeurIPS 2021, arXiv:2104.10858): a convolutional stem, damped residuals, a vote of the patches.

The class token yields logits by `head`; every patch token yields some by `aux_head`, which token labelling trains, and
half of their maximum is added. Modules carry the names of the official checkpoints.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from torch import Tensor, nn
from torch.nn import functional

from ztp_deploy.errors import BadRequest
from ztp_deploy.models.base import own_keys
from ztp_deploy.models.blocks import LAYER_NORM_EPS, Block, BlocksHost
from ztp_deploy.models.parts import max_of_patches, unready
from ztp_deploy.plan import Geometry
from ztp_deploy.pruning.tokens import TokenState, initial_state
from ztp_deploy.source import ModelSize

SUMMARY = "LV-ViT: convolutional stem, logits of class and patch tokens together"

NAMES: dict[str, str] = {
    "lvvit_t": "lvvit_t",
    "lvvit_s": "lvvit_s-26M-224-83.3",
    "lvvit_s_384": "lvvit_s-26M-384-84.4",
    "lvvit_m": "lvvit_m-56M-224-84.0",
    "lvvit_m_384": "lvvit_m-56M-384-85.4",
}
"""Our names and those of the official checkpoints."""

STEM_WIDTH = 64
BATCH_NORM_EPS = 1e-5
PATCH_VOTE = 0.5
"""What the patches' maximum counts for beside the class token's logits."""


@dataclass(frozen=True)
class Architecture:
    """The sizes of one model, in the words of ModelSize; `skip_lam` divides what a block adds to its residual stream."""

    embed_dim: int
    depth: int
    num_heads: int
    skip_lam: float = 2.0
    crop_pct: float = 0.9
    img_size: int = 224
    patch_size: int = 16
    mlp_ratio: float = 3.0
    num_classes: int = 1000


ARCHITECTURES: dict[str, Architecture] = {
    "lvvit_t": Architecture(240, 12, 4, skip_lam=1.0),
    "lvvit_s-26M-224-83.3": Architecture(384, 16, 6),
    "lvvit_s-26M-384-84.4": Architecture(384, 16, 6, img_size=384),
    "lvvit_m-56M-224-84.0": Architecture(512, 20, 8, crop_pct=1.0),
    "lvvit_m-56M-384-85.4": Architecture(512, 20, 8, crop_pct=1.0, img_size=384),
}

_CONFIG = {
    "mean": IMAGENET_DEFAULT_MEAN,
    "std": IMAGENET_DEFAULT_STD,
    "interpolation": "bicubic",
    "origin_url": "the GitHub release page of zihangJiang/TokenLabeling",
    "license": "apache-2.0",
}
"""Preprocessing and origin, in timm's terms."""


# --- the module --------------------------------------------------------------------------------


class Stem(nn.Module):
    """Three convolutions at half the image's resolution, then patches of them: [B, 3, H, W] → tokens [B, n, C]."""

    def __init__(self, patch_size: int, embed_dim: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, STEM_WIDTH, 7, stride=2, padding=3, bias=False)
        self.bn1 = nn.BatchNorm2d(STEM_WIDTH, eps=BATCH_NORM_EPS)
        self.conv2 = nn.Conv2d(STEM_WIDTH, STEM_WIDTH, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(STEM_WIDTH, eps=BATCH_NORM_EPS)
        self.conv3 = nn.Conv2d(STEM_WIDTH, STEM_WIDTH, 3, padding=1, bias=False)
        self.bn3 = nn.BatchNorm2d(STEM_WIDTH, eps=BATCH_NORM_EPS)
        self.proj = nn.Conv2d(STEM_WIDTH, embed_dim, patch_size // 2, stride=patch_size // 2)

    def forward(self, images: Tensor) -> Tensor:
        features = functional.relu(self.bn1(self.conv1(images)))
        features = functional.relu(self.bn2(self.conv2(features)))
        features = functional.relu(self.bn3(self.conv3(features)))
        patches: Tensor = self.proj(features)
        return patches.flatten(2).transpose(1, 2)

    def macs(self, image_size: int, patch_tokens: int) -> int:
        """Multiply-accumulates for one image: the convolutions at half resolution, the projection once a patch."""
        convolutions = sum(conv.weight.numel() for conv in (self.conv1, self.conv2, self.conv3))
        return (image_size // 2) ** 2 * convolutions + patch_tokens * self.proj.weight.numel()


class LVViT(nn.Module):
    """LV-ViT: images [B, 3, H, W] → logits [B, classes]."""

    def __init__(self, sizes: Architecture) -> None:
        super().__init__()
        dim = sizes.embed_dim
        self.img_size = sizes.img_size
        self.patch_tokens = (sizes.img_size // sizes.patch_size) ** 2
        self.num_classes = sizes.num_classes
        self.pretrained_cfg: dict[str, Any] = {}
        self.patch_embed = Stem(sizes.patch_size, dim)
        self.cls_token = nn.Parameter(torch.zeros(1, 1, dim))
        self.pos_embed = nn.Parameter(torch.zeros(1, 1 + self.patch_tokens, dim))
        hidden = int(dim * sizes.mlp_ratio)
        self.blocks = nn.ModuleList(Block(dim, sizes.num_heads, hidden, sizes.skip_lam) for _ in range(sizes.depth))
        self.norm = nn.LayerNorm(dim, eps=LAYER_NORM_EPS)
        self.head = nn.Linear(dim, sizes.num_classes)
        self.aux_head = nn.Linear(dim, sizes.num_classes)

    def forward(self, images: Tensor) -> Tensor:
        tokens = self.embed(images)
        for block in self.blocks:
            tokens = block(tokens)
        return self.read_out(tokens, initial_state(images, self.patch_tokens))

    def embed(self, images: Tensor) -> Tensor:
        """Images [B, 3, H, W] → tokens [B, 1 + n, C], the class token first."""
        patches = self.patch_embed(images)
        return torch.cat([self.cls_token.expand(patches.shape[0], -1, -1), patches], dim=1) + self.pos_embed

    def read_out(self, tokens: Tensor, state: TokenState) -> Tensor:
        """Logits of the class token, and half of the greatest that any patch token still there has for a class."""
        normed = self.norm(tokens)
        own: Tensor = self.head(normed[:, 0])
        return own + PATCH_VOTE * max_of_patches(self.aux_head(normed[:, 1:]), state)


# --- the family --------------------------------------------------------------------------------


architecture_of = NAMES.get
translate = own_keys


def build(architecture: str, size: ModelSize, device: str = "cpu") -> nn.Module:
    """The untrained model in evaluation mode. Raises BadRequest for sizes that do not fit together."""
    sizes = replace(ARCHITECTURES[architecture], **size.given())
    _check_sizes(sizes)
    with torch.device(device):
        model = LVViT(sizes)
    model.pretrained_cfg = _CONFIG | {"crop_pct": sizes.crop_pct}
    return model.eval()


def _check_sizes(sizes: Architecture) -> None:
    wrong = None
    if sizes.embed_dim % sizes.num_heads:
        wrong = f"embed_dim={sizes.embed_dim} is not a multiple of num_heads={sizes.num_heads}"
    elif sizes.patch_size % 2:
        wrong = f"patch_size={sizes.patch_size} is odd, but the stem halves the resolution before it cuts patches"
    elif sizes.img_size % sizes.patch_size:
        wrong = f"img_size={sizes.img_size} is not a multiple of patch_size={sizes.patch_size}"
    elif sizes.embed_dim * sizes.mlp_ratio < 1:
        wrong = f"mlp_ratio={sizes.mlp_ratio} leaves the MLP without a hidden unit"
    if wrong:
        raise BadRequest(f"{wrong}.", "Choose sizes that divide.")


def adapts(model: nn.Module) -> bool:
    """Whether this family's host carries the model."""
    return type(model) is LVViT


class LVViTHost(BlocksHost):
    """An LV-ViT taken apart; shares the model's parameters."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__(model)
        reason = unready(model)
        if any(type(block) is not Block for block in self.blocks):
            reason = "its blocks are of another kind, and what they change would be lost"
        if reason:
            raise BadRequest(f"This LV-ViT cannot be pruned: {reason}.", "`ztp list` shows what can.")
        self.geometry = _geometry(self.model)

    @property
    def classifiers(self) -> Sequence[nn.Module]:
        return [self.model.head, self.model.aux_head]

    def read_out(self, tokens: Tensor, state: TokenState) -> Tensor:
        logits: Tensor = self.model.read_out(tokens, state)
        return logits


host = LVViTHost


def _geometry(model: Any) -> Geometry:
    block = model.blocks[0]
    dim = model.head.in_features
    return Geometry(
        image_size=model.img_size,
        patch_tokens=model.patch_tokens,
        special_tokens=1,
        class_token=0,
        depth=len(model.blocks),
        embed_dim=dim,
        attention_dim=dim,
        num_heads=block.attn.num_heads,
        mlp_macs_per_token=block.mlp.fc1.weight.numel() + block.mlp.fc2.weight.numel(),
        num_classes=model.num_classes,
        embed_macs=model.patch_embed.macs(model.img_size, model.patch_tokens),
        head_macs=dim * model.num_classes,
        head_macs_per_token=dim * model.num_classes,
    )
