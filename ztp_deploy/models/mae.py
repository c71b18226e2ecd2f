"""MAE (He et al., CVPR 2022, arXiv:2111.06377), fine-tuned: plain ViTs read out by the mean of their patch tokens.

The class token takes part in attention and is not read; `fc_norm` follows the mean, and there is no final norm.
"""

from __future__ import annotations

from torch import nn

from ztp_deploy.models import timm_vit
from ztp_deploy.models.base import of_another_family, own_keys
from ztp_deploy.source import ModelSize

SUMMARY = "MAE fine-tuned ViT-B/L/H: the mean of the patches is read out (weights non-commercial)"

NAMES: dict[str, str] = {
    "mae_vit_b": "vit_base_patch16_224.mae",
    "mae_vit_l": "vit_large_patch16_224.mae",
    "mae_vit_h": "vit_huge_patch14_224.mae",
}

architecture_of = NAMES.get
translate = own_keys
adapts = of_another_family
host = timm_vit.TimmVitHost

# What the hub has under these names is pre-trained without a classifier.
_CONFIG = {
    "url": None,
    "hf_hub_id": None,
    "origin_url": "https://github.com/facebookresearch/mae",
    "license": "CC-BY-NC-4.0",
    "num_classes": 1000,
}


def build(architecture: str, size: ModelSize, device: str = "cpu") -> nn.Module:
    """The untrained model in evaluation mode. Raises BadRequest for sizes that do not fit together."""
    # MAE evaluates on the middle 224 of 256 pixels, and on all of larger images.
    config = _CONFIG | {"crop_pct": 224 / 256 if (size.img_size or 224) <= 224 else 1.0}
    return timm_vit.create(architecture, size, device, {"global_pool": "avg", "pretrained_cfg_overlay": config})
