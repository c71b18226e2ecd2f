"""Plain timm Vision Transformers: DeiT, distilled DeiT, AugReg, DINOv2, SigLIP, and any timm ViT of the same build."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import timm
import torch
from timm.layers import PatchEmbed
from timm.models.deit import VisionTransformerDistilled
from timm.models.vision_transformer import Attention as TimmAttention
from timm.models.vision_transformer import Block, VisionTransformer
from torch import Tensor, nn

from ztp_deploy.errors import BadRequest
from ztp_deploy.models import layouts, timm_head
from ztp_deploy.models.base import Attention
from ztp_deploy.models.parts import project, typed, unready
from ztp_deploy.plan import Geometry
from ztp_deploy.pruning.tokens import TokenState
from ztp_deploy.reference import model as reference
from ztp_deploy.source import ModelSize

SUMMARY = "DeiT, AugReg, DINOv2 (registers too), SigLIP and any timm ViT made of plain blocks"

NAMES: dict[str, str] = {
    "deit_t": "deit_tiny_patch16_224.fb_in1k",
    "deit_s": "deit_small_patch16_224.fb_in1k",
    "deit_b": "deit_base_patch16_224.fb_in1k",
    "deit_b_384": "deit_base_patch16_384.fb_in1k",
    "deit_t_distilled": "deit_tiny_distilled_patch16_224.fb_in1k",
    "deit_s_distilled": "deit_small_distilled_patch16_224.fb_in1k",
    "deit_b_distilled": "deit_base_distilled_patch16_224.fb_in1k",
    "deit_b_distilled_384": "deit_base_distilled_patch16_384.fb_in1k",
    "augreg_vit_t": "vit_tiny_patch16_224.augreg_in21k_ft_in1k",
    "augreg_vit_s": "vit_small_patch16_224.augreg_in21k_ft_in1k",
    "augreg_vit_b": "vit_base_patch16_224.augreg_in21k_ft_in1k",
    "augreg_vit_l": "vit_large_patch16_224.augreg_in21k_ft_in1k",
    "augreg_vit_t_384": "vit_tiny_patch16_384.augreg_in21k_ft_in1k",
    "augreg_vit_s_384": "vit_small_patch16_384.augreg_in21k_ft_in1k",
    "augreg_vit_b_384": "vit_base_patch16_384.augreg_in21k_ft_in1k",
    "augreg_vit_l_384": "vit_large_patch16_384.augreg_in21k_ft_in1k",
    "vit_digits": reference.vit_digits.__name__,
}


def architecture_of(name: str) -> str | None:
    """The timm name behind one of our names or a timm ViT's own name, else None."""
    if name in NAMES:
        return NAMES[name]
    return name if timm.is_model(name) else None


def build(architecture: str, size: ModelSize, device: str = "cpu") -> nn.Module:
    """The untrained model in evaluation mode. Raises BadRequest for sizes that do not fit together."""
    return create(architecture, size, device, {})


def create(architecture: str, size: ModelSize, device: str, settings: Mapping[str, Any]) -> nn.Module:
    """`build` with further arguments of `timm.create_model`, for families of the same modules."""
    sizes = size.given()
    heads = sizes.get("num_heads")
    if heads and "embed_dim" in sizes and sizes["embed_dim"] % heads:
        raise BadRequest(
            f"embed_dim={sizes['embed_dim']} is not a multiple of num_heads={heads}.", "Choose sizes that divide."
        )
    with torch.device(device):
        try:
            model: nn.Module = timm.create_model(architecture, pretrained=False, **settings, **sizes)
        except (TypeError, ValueError, AssertionError, RuntimeError) as error:
            raise BadRequest(
                f"timm could not build {architecture} with {sizes or 'its own sizes'}: {error}.",
                "Check the name and the sizes.",
            ) from error
    if "img_size" in sizes or "patch_size" in sizes:
        _check_divides(model)
    return model.eval()


def _check_divides(model: nn.Module) -> None:
    """Raises BadRequest where patches do not fill the image: timm's stem never looks at the pixels that are left over."""
    stem = getattr(model, "patch_embed", None)
    if not isinstance(stem, PatchEmbed) or stem.img_size is None:
        return
    for side, patch in zip(stem.img_size, stem.patch_size, strict=True):
        if left := side % patch:
            raise BadRequest(
                f"img_size={side} is not a multiple of patch_size={patch}: {left} rows and columns would never be seen.",
                f"Use img_size={side - left} or {side - left + patch}.",
            )


def translate(model: nn.Module, state: dict[str, Tensor]) -> dict[str, Tensor]:
    """A checkpoint of Hugging Face's transformers or AugReg's own in the module's keys, which all others have."""
    return layouts.translate(model, state, (*layouts.HUGGING_FACE, layouts.AUGREG))


def adapts(model: nn.Module) -> bool:
    """Whether this family's host carries the model; `TimmVitHost` says why where it does not."""
    return isinstance(model, VisionTransformer)


def check(model: Any, *kinds: type[nn.Module]) -> None:
    """Raises BadRequest for everything that would make a host of these kinds compute something else than the module."""
    advice = "`ztp list` shows what can."
    reason = None
    if type(model) not in kinds:
        reason = f"{type(model).__name__} changes timm's {kinds[0].__name__}, and its changes would be lost"
    elif type(model.patch_embed) is not PatchEmbed or not isinstance(model.patch_embed.proj, nn.Conv2d):
        reason = f"its stem is a {type(model.patch_embed).__name__}, not a plain patch embedding"
    elif model.patch_embed.proj.in_channels != 3:
        reason = f"it takes {model.patch_embed.proj.in_channels} channels, not 3"
    elif unfit := unready(model):
        reason = unfit
    elif getattr(model, "dynamic_img_size", False):
        reason = "dynamic_img_size leaves its token count open"
        advice = "Build it with timm.create_model(…, dynamic_img_size=False); its weights stay the same."
    else:
        reason, advice = timm_head.refusal(model) or (None, advice)
    if reason:
        raise BadRequest(f"This {type(model).__name__} cannot be pruned: {reason}.", advice)


class TimmVitHost:
    """A timm VisionTransformer (optionally distilled) taken apart; shares the model's parameters."""

    def __init__(self, model: nn.Module) -> None:
        self.model: Any = model
        check(self.model, VisionTransformer, VisionTransformerDistilled)
        for number, block in enumerate(self.blocks, start=1):
            if type(block) is not Block or type(block.attn) is not TimmAttention:
                raise BadRequest(
                    f"Block {number} is a {type(block).__name__} with {type(getattr(block, 'attn', None)).__name__}; "
                    "pruning knows timm's plain Block with Attention.",
                    "Choose a model whose blocks are plain (`ztp list`).",
                )
        self.geometry = geometry_of(self.model)

    @property
    def blocks(self) -> Sequence[nn.Module]:
        return list(self.model.blocks)

    @property
    def classifiers(self) -> Sequence[nn.Module]:
        names = ("head", "head_dist")
        return [getattr(self.model, name) for name in names if hasattr(self.model, name)]

    def embed(self, images: Tensor) -> Tensor:
        model = self.model
        tokens: Tensor = model.norm_pre(model.patch_drop(model._pos_embed(model.patch_embed(images))))
        return tokens

    def mix(self, block: Any, tokens: Tensor, state: TokenState) -> Tensor:
        mixed: Tensor = tokens + block.ls1(block.attn(block.norm1(tokens), attn_mask=typed(state.bias, tokens)))
        return mixed

    def attention(self, block: Any, tokens: Tensor, state: TokenState) -> Attention:
        attn = block.attn
        queries, keys, values = project(block.norm1(tokens), attn.qkv, attn.num_heads)
        queries, keys = attn.q_norm(queries), attn.k_norm(keys)
        return Attention(tokens, queries, keys, values, attn.scale, state.bias)

    def finish(self, block: Any, tokens: Tensor, mixed: Tensor) -> Tensor:
        attn = block.attn
        joined = mixed.transpose(1, 2).flatten(2)
        # Normalisation and gate of the attention output exist in newer timm releases only.
        if getattr(attn, "norm", None) is not None:
            joined = attn.norm(joined)
        if getattr(attn, "gate", None) is not None:
            joined = joined * attn.gate(block.norm1(tokens)).sigmoid()
        finished: Tensor = tokens + block.ls1(attn.proj(joined))
        return finished

    def transform(self, block: Any, tokens: Tensor) -> Tensor:
        transformed: Tensor = tokens + block.ls2(block.mlp(block.norm2(tokens)))
        return transformed

    def read_out(self, tokens: Tensor, state: TokenState) -> Tensor:
        normed = self.model.norm(tokens)
        if isinstance(self.model, VisionTransformerDistilled):
            logits: Tensor = self.model.forward_head(normed)  # of the class and the distillation token alone
            return logits
        return timm_head.read_out(self.model, normed, state)


host = TimmVitHost


def geometry_of(model: Any) -> Geometry:
    """The geometry of a timm model made of a patch embedding, equal blocks and a head."""
    patches = model.patch_embed
    height, width = patches.img_size
    if height != width:
        raise BadRequest(f"The model takes {height} × {width} images.", "Only square inputs are carried so far.")
    attn = model.blocks[0].attn
    head_macs, head_macs_per_token = timm_head.macs(model)
    return Geometry(
        image_size=height,
        patch_tokens=patches.num_patches,
        special_tokens=model.num_prefix_tokens,
        class_token=0 if model.cls_token is not None else None,
        depth=len(model.blocks),
        embed_dim=model.embed_dim,
        attention_dim=attn.num_heads * attn.head_dim,
        num_heads=attn.num_heads,
        mlp_macs_per_token=timm_head.linear_macs(model.blocks[0].mlp),
        num_classes=model.head.out_features,
        embed_macs=patches.num_patches * patches.proj.weight.numel(),
        head_macs=head_macs,
        head_macs_per_token=head_macs_per_token,
        rotary=getattr(model, "rope", None) is not None,
    )
