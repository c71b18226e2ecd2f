"""`vit_digits`: the reference classifier's shape, registered with timm under that name, and its shipped weights."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from timm.models import register_model
from timm.models.vision_transformer import VisionTransformer

from ztp_deploy.reference.canvases import LABELS, PATCH, SIDE

WEIGHTS = Path(__file__).with_name("vit_digits.safetensors")
MEAN, STD = 0.5, 0.25
WIDTH = 144

CONFIG: dict[str, Any] = {
    "file": str(WEIGHTS),
    "input_size": (3, SIDE, SIDE),
    "fixed_input_size": True,
    "num_classes": len(LABELS),
    "label_names": LABELS,
    "interpolation": "bicubic",
    "crop_pct": 1.0,
    "mean": (MEAN,) * 3,
    "std": (STD,) * 3,
    "license": "apache-2.0",
    "first_conv": "patch_embed.proj",
    "classifier": "head",
}
"""What timm calls a pretrained configuration; the weights lie beside this file."""


@register_model  # type: ignore[untyped-decorator]
def vit_digits(pretrained: bool = False, **settings: Any) -> VisionTransformer:
    """A ViT of DeiT's shape: 196 patch tokens and a class token, 8 blocks of width 144 with 3 heads, 10 classes.

    Without weights; `load_model` gives it the shipped ones.
    """
    own = {"pretrained_cfg", "pretrained_cfg_overlay", "cache_dir"}
    sizes = {name: value for name, value in settings.items() if name not in own and value is not None}
    shape = {"img_size": SIDE, "patch_size": PATCH, "embed_dim": WIDTH, "depth": 8, "num_heads": 3, "num_classes": 10}
    model = VisionTransformer(**(shape | sizes))
    model.pretrained_cfg = model.default_cfg = CONFIG
    return model
