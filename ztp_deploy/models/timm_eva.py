"""timm's Eva: ViTs with rotary positions, among them EVA-02, DINOv3, Perception Encoder and RoPE-ViT; EVA without.

Rotary positions turn queries and keys by where their patch was in the image, in every block. Tokens that are left
after pruning are turned by their original positions, so the table's rows are looked up by `TokenState.positions`.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from timm.layers import AttentionRope, apply_rot_embed_cat
from timm.layers.pos_embed_sincos import RotaryEmbeddingCat, RotaryEmbeddingDinoV3
from timm.models import is_model_in_modules
from timm.models.eva import Eva, EvaAttention, EvaBlock
from torch import Tensor, nn
from torch.nn import functional

from ztp_deploy.errors import BadRequest
from ztp_deploy.models import timm_head, timm_vit
from ztp_deploy.models.base import Attention
from ztp_deploy.models.parts import fused_attention, split_heads
from ztp_deploy.pruning.tokens import TokenState, look_up
from ztp_deploy.source import ModelSize

SUMMARY = "EVA-02, DINOv3, EVA, Perception Encoder, RoPE-ViT: timm's Eva, tokens keep their rotary positions"

NAMES: dict[str, str] = {
    "eva02_t_336": "eva02_tiny_patch14_336.mim_in22k_ft_in1k",
    "eva02_s_336": "eva02_small_patch14_336.mim_in22k_ft_in1k",
    "eva02_b_448": "eva02_base_patch14_448.mim_in22k_ft_in22k_in1k",
    "eva02_l_448": "eva02_large_patch14_448.mim_m38m_ft_in22k_in1k",
}

_OFFICIAL = {
    ".mlp.w12.": ".mlp.fc1.",
    ".mlp.w1.": ".mlp.fc1_g.",
    ".mlp.w2.": ".mlp.fc1_x.",
    ".mlp.w3.": ".mlp.fc2.",
    ".mlp.ffn_ln.": ".mlp.norm.",
    ".attn.inner_attn_ln.": ".attn.norm.",
}


def architecture_of(name: str) -> str | None:
    """The timm name behind one of our names, or a timm name that builds an Eva, else None."""
    if name in NAMES:
        return NAMES[name]
    return name if is_model_in_modules(name, ("eva",)) else None


def build(architecture: str, size: ModelSize, device: str = "cpu") -> nn.Module:
    """The untrained model in evaluation mode, at one image size. Raises BadRequest for sizes that do not fit."""
    return timm_vit.create(architecture, size, device, {"dynamic_img_size": False})


def translate(model: nn.Module, state: dict[str, Tensor]) -> dict[str, Tensor]:
    """EVA-02's official layout in timm's keys; its rotary tables, which are computed, are left out."""
    apart = "blocks.0.attn.q_proj.weight" in state
    translated = {}
    for name, value in state.items():
        if name.endswith(("rope.freqs_cos", "rope.freqs_sin")):
            continue
        for theirs, ours in _OFFICIAL.items():
            name = name.replace(theirs, ours)
        if apart:
            name = name.replace(".attn.q_bias", ".attn.q_proj.bias").replace(".attn.v_bias", ".attn.v_proj.bias")
        translated[name] = value
    return translated


def adapts(model: nn.Module) -> bool:
    """Whether this family's host carries the model; `TimmEvaHost` says why where it does not."""
    return isinstance(model, Eva)


class TimmEvaHost:
    """A timm Eva taken apart; shares the model's parameters."""

    def __init__(self, model: nn.Module) -> None:
        self.model: Any = model
        timm_vit.check(self.model, Eva)
        if reason := _refusal(self.model):
            raise BadRequest(f"This Eva cannot be pruned: {reason}.", "`ztp list` shows what can.")
        self.geometry = timm_vit.geometry_of(self.model)

    @property
    def blocks(self) -> Sequence[nn.Module]:
        return list(self.model.blocks)

    @property
    def classifiers(self) -> Sequence[nn.Module]:
        return [self.model.head]

    def embed(self, images: Tensor) -> Tensor:
        model = self.model
        embedded, _ = model._pos_embed(model.patch_embed(images))
        tokens: Tensor = model.norm_pre(embedded)
        return tokens

    def mix(self, block: Any, tokens: Tensor, state: TokenState) -> Tensor:
        queries, keys, values = self._project(block, tokens, state)
        return self.finish(block, tokens, fused_attention(queries, keys, values, block.attn.scale, state))

    def attention(self, block: Any, tokens: Tensor, state: TokenState) -> Attention:
        """The block's attention computed openly; queries and keys are turned, as attention multiplies them."""
        queries, keys, values = self._project(block, tokens, state)
        return Attention(tokens, queries, keys, values, block.attn.scale, state.bias)

    def finish(self, block: Any, tokens: Tensor, mixed: Tensor) -> Tensor:
        attn = block.attn
        joined = attn.norm(mixed.transpose(1, 2).flatten(2))
        if getattr(attn, "gate", None) is not None:  # newer timm releases only
            joined = joined * attn.gate(block.norm1(tokens)).sigmoid()
        return tokens + _scaled(attn.proj(joined), block.gamma_1)

    def transform(self, block: Any, tokens: Tensor) -> Tensor:
        return tokens + _scaled(block.mlp(block.norm2(tokens)), block.gamma_2)

    def read_out(self, tokens: Tensor, state: TokenState) -> Tensor:
        return timm_head.read_out(self.model, self.model.norm(tokens), state)

    def _project(self, block: Any, tokens: Tensor, state: TokenState) -> tuple[Tensor, Tensor, Tensor]:
        """Queries, keys and values [B, H, N, d] of the block's tokens, the former two turned by position."""
        attn = block.attn
        normed = block.norm1(tokens)
        queries, keys, values = (
            split_heads(functional.linear(normed, weight, bias), attn.num_heads) for weight, bias in _projections(attn)
        )
        queries, keys = attn.q_norm(queries), attn.k_norm(keys)
        if self.model.rope is not None:
            rotation = self._rotation(state)
            queries = apply_rot_embed_cat(queries, rotation, half=attn.rotate_half).type_as(values)
            keys = apply_rot_embed_cat(keys, rotation, half=attn.rotate_half).type_as(values)
        return queries, keys, values

    def _rotation(self, state: TokenState) -> Tensor:
        """Sines, then cosines [B, 1, S + n, 2·d] of every slot's original position; special tokens are not turned."""
        table = self.model.rope.get_embed()  # [P, 2·d]
        # A masked slot, at position -1, may turn any way: nothing attends to it.
        positions = state.positions if state.alive is None else state.positions.clamp_min(0)
        rows = look_up(table, positions)
        if special := self.geometry.special_tokens:
            columns = torch.arange(table.shape[1], device=table.device)
            still = (columns >= table.shape[1] // 2).to(table.dtype)  # sines 0, cosines 1
            rows = torch.cat([still.expand(rows.shape[0], special, -1), rows], dim=1)
        return rows.unsqueeze(1)


host = TimmEvaHost


def _projections(attn: Any) -> Iterator[tuple[Any, Any]]:
    """Weight and bias, or None, that yield queries, keys and values, in that order."""
    if attn.qkv is None:
        return ((layer.weight, layer.bias) for layer in (attn.q_proj, attn.k_proj, attn.v_proj))
    biases: Sequence[Any] = (None, None, None)
    if attn.qkv.bias is not None:
        biases = attn.qkv.bias.chunk(3)
    elif getattr(attn, "q_bias", None) is not None:
        biases = (attn.q_bias, attn.k_bias, attn.v_bias)
    return zip(attn.qkv.weight.chunk(3), biases, strict=True)


def _scaled(values: Tensor, gamma: Tensor | None) -> Tensor:
    return values if gamma is None else gamma * values


def _refusal(model: Any) -> str | None:
    """Why a host would compute something else than this Eva, as a clause."""
    rope = model.rope
    if rope is not None and type(rope) not in (RotaryEmbeddingCat, RotaryEmbeddingDinoV3):
        return f"its rotary positions, {type(rope).__name__}, are not one fixed table for all blocks"
    for number, block in enumerate(model.blocks, start=1):
        attn = block.attn
        if type(block) is not EvaBlock:
            return f"block {number} is a {type(block).__name__}, not a plain EvaBlock, which normalises before it acts"
        if type(attn) not in (EvaAttention, AttentionRope):
            return f"block {number} has {type(attn).__name__}, not EvaAttention or AttentionRope"
        if getattr(attn, "num_kv_groups", 1) != 1:
            return f"in block {number} several heads share keys (grouped-query attention)"
    return None
