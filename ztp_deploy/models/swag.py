"""SWAG (Singh et al., CVPR 2022, arXiv:2201.08371), fine-tuned on ImageNet: plain ViTs in torchvision's and SWAG's keys."""

from __future__ import annotations

from torch import Tensor, nn

from ztp_deploy.models import layouts, timm_vit
from ztp_deploy.models.base import of_another_family
from ztp_deploy.models.layouts import Layout
from ztp_deploy.source import ModelSize

SUMMARY = "SWAG ViT-B/16 at 384, L/16 at 512, H/14 at 518, torchvision's keys or SWAG's (weights non-commercial)"

NAMES: dict[str, str] = {
    "swag_vit_b16": "vit_base_patch16_384",
    "swag_vit_l16": "vit_large_patch16_384",
    "swag_vit_h14": "vit_huge_patch14_224",
}

architecture_of = NAMES.get
adapts = of_another_family
host = timm_vit.TimmVitHost

IMAGE_SIZES = {"vit_base_patch16_384": 384, "vit_large_patch16_384": 512, "vit_huge_patch14_224": 518}

# Preprocessing as torchvision's IMAGENET1K_SWAG_E2E_V1 has it.
_CONFIG = {
    "url": None,
    "hf_hub_id": None,
    "origin_url": "https://github.com/facebookresearch/SWAG",
    "license": "CC-BY-NC-4.0",
    "num_classes": 1000,
    "interpolation": "bicubic",
    "mean": (0.485, 0.456, 0.406),
    "std": (0.229, 0.224, 0.225),
    "crop_pct": 1.0,
}


def _layout(publisher: str, block: str, mlp: tuple[str, str], head: str, *, sequence_first: bool = False) -> Layout:
    names = {
        "cls_token": "class_token",
        "pos_embed": "encoder.pos_embedding",
        "patch_embed.proj.": "conv_proj.",
        "blocks.*.norm1.": f"encoder.layers.{block}.ln_1.",
        "blocks.*.attn.qkv.": f"encoder.layers.{block}.self_attention.in_proj_",
        "blocks.*.attn.proj.": f"encoder.layers.{block}.self_attention.out_proj.",
        "blocks.*.norm2.": f"encoder.layers.{block}.ln_2.",
        "blocks.*.mlp.fc1.": f"encoder.layers.{block}.mlp.{mlp[0]}.",
        "blocks.*.mlp.fc2.": f"encoder.layers.{block}.mlp.{mlp[1]}.",
        "norm.": "encoder.ln.",
        "head.": f"{head}.",
    }
    return Layout(publisher, names, sequence_first)


LAYOUTS = (
    _layout("torchvision", "encoder_layer_*", ("0", "3"), "heads.head"),
    # The files torchvision hands out are older than its MLP's present names.
    _layout("torchvision", "encoder_layer_*", ("linear_1", "linear_2"), "heads.head"),
    _layout("SWAG", "layer_*", ("linear_1", "linear_2"), "head.layers.head", sequence_first=True),
)


def build(architecture: str, size: ModelSize, device: str = "cpu") -> nn.Module:
    """The untrained model in evaluation mode. Raises BadRequest for sizes that do not fit together."""
    side = IMAGE_SIZES[architecture]
    config = _CONFIG | {"input_size": (3, side, side)}
    return timm_vit.create(architecture, size, device, {"pretrained_cfg_overlay": config})


def translate(model: nn.Module, state: dict[str, Tensor]) -> dict[str, Tensor]:
    """A checkpoint of torchvision's or of the SWAG repository in the module's own keys."""
    return layouts.translate(model, state, LAYOUTS)
