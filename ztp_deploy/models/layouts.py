"""Official checkpoints of plain ViTs under other keys than timm's, as tables."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ztp_deploy.models.weights import check_keys

Names = Mapping[str, str | tuple[str, ...]]
"""Beginnings of timm's keys and what stands in their place, with `*` for the number of a block; several names where
timm stacks what the checkpoint holds apart."""


@dataclass(frozen=True)
class Layout:
    """How a publisher writes the weights of a timm ViT; what `names` leaves out keeps timm's key.

    `sequence_first`: position embeddings are [N, 1, C] instead of [1, N, C].
    """

    publisher: str
    names: Names
    sequence_first: bool = False

    def keys_of(self, name: str) -> tuple[str, ...]:
        """The checkpoint's keys for one of timm's."""
        pattern = re.sub(r"^blocks\.\d+\.", "blocks.*.", name)
        number = name.split(".")[1] if pattern != name else ""
        for beginning, theirs in self.names.items():
            if pattern.startswith(beginning):
                parts = (theirs,) if isinstance(theirs, str) else theirs
                return tuple(part.replace("*", number) + pattern.removeprefix(beginning) for part in parts)
        return (name,)

    def matches(self, state: Mapping[str, Tensor]) -> bool:
        """Whether the first block's MLP is there under this layout's key."""
        return self.keys_of("blocks.0.mlp.fc1.weight")[0] in state

    def write(self, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """A timm state dict in this layout."""
        written: dict[str, Tensor] = {}
        for name, value in state.items():
            keys = self.keys_of(name)
            written |= zip(keys, self._turned(name, value).chunk(len(keys)), strict=True)
        return written

    def read(self, state: Mapping[str, Tensor], names: Iterable[str]) -> dict[str, Tensor]:
        """A state dict in this layout under timm's `names`."""
        return {name: self._turned(name, torch.cat([state[key] for key in self.keys_of(name)])) for name in names}

    def _turned(self, name: str, value: Tensor) -> Tensor:
        return value.transpose(0, 1) if self.sequence_first and name == "pos_embed" else value


def translate(model: nn.Module, state: dict[str, Tensor], layouts: Iterable[Layout]) -> dict[str, Tensor]:
    """The state dict in timm's keys where it is in one of the layouts, else as it is.

    Raises BadRequest that lists missing, unexpected and misshapen keys in the layout's own terms.
    """
    for layout in layouts:
        if layout.matches(state):
            expected = model.state_dict()
            check_keys(model, layout.write(expected), state, f"A checkpoint in the layout of {layout.publisher}")
            return layout.read(state, expected)
    return state


def _hugging_face(body: str, heads: Mapping[str, str]) -> Layout:
    block = f"{body}.encoder.layer.*"
    attention = f"{block}.attention.attention"
    names: Names = {
        "cls_token": f"{body}.embeddings.cls_token",
        "dist_token": f"{body}.embeddings.distillation_token",
        "pos_embed": f"{body}.embeddings.position_embeddings",
        "patch_embed.proj.": f"{body}.embeddings.patch_embeddings.projection.",
        "blocks.*.norm1.": f"{block}.layernorm_before.",
        "blocks.*.attn.qkv.": (f"{attention}.query.", f"{attention}.key.", f"{attention}.value."),
        "blocks.*.attn.proj.": f"{block}.attention.output.dense.",
        "blocks.*.norm2.": f"{block}.layernorm_after.",
        "blocks.*.mlp.fc1.": f"{block}.intermediate.dense.",
        "blocks.*.mlp.fc2.": f"{block}.output.dense.",
        "norm.": f"{body}.layernorm.",
        **heads,
    }
    return Layout("Hugging Face", names)


HUGGING_FACE = (
    _hugging_face("vit", {"head.": "classifier."}),
    _hugging_face("deit", {"head.": "cls_classifier.", "head_dist.": "distillation_classifier."}),
)
"""ViTForImageClassification (DeiT without distillation too) and DeiTForImageClassificationWithTeacher of transformers.

Their configurations say LayerNorm eps 1e-12, where the original weights were trained with timm's 1e-6, which stays.
"""


def _augreg() -> Layout:
    block = "Transformer/encoderblock_*"
    attention, mlp = f"{block}/MultiHeadDotProductAttention_1", f"{block}/MlpBlock_3"
    names: dict[str, str | tuple[str, ...]] = {
        "cls_token": "cls",
        "pos_embed": "Transformer/posembed_input/pos_embedding",
    }
    for ours, theirs, weight in (
        ("patch_embed.proj.", ("embedding",), "kernel"),
        ("blocks.*.norm1.", (f"{block}/LayerNorm_0",), "scale"),
        ("blocks.*.attn.qkv.", tuple(f"{attention}/{part}" for part in ("query", "key", "value")), "kernel"),
        ("blocks.*.attn.proj.", (f"{attention}/out",), "kernel"),
        ("blocks.*.norm2.", (f"{block}/LayerNorm_2",), "scale"),
        ("blocks.*.mlp.fc1.", (f"{mlp}/Dense_0",), "kernel"),
        ("blocks.*.mlp.fc2.", (f"{mlp}/Dense_1",), "kernel"),
        ("norm.", ("Transformer/encoder_norm",), "scale"),
        ("head.", ("head",), "kernel"),
    ):
        names[f"{ours}weight"] = tuple(f"{part}/{weight}" for part in theirs)
        names[f"{ours}bias"] = tuple(f"{part}/bias" for part in theirs)
    return Layout("AugReg", names)


AUGREG = _augreg()
"""The `.npz` files of google-research/vision_transformer, once `weights.from_jax` has turned their arrays."""
