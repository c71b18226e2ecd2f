"""AugReg's `.npz` checkpoints, written by hand from a timm ViT; timm's own reader says whether they are written right."""

from __future__ import annotations

import numpy as np
import pytest
import timm
import torch

import ztp_deploy as ztp
from tests import tiny
from ztp_deploy.errors import BadRequest
from ztp_deploy.source import ModelSize


def written(model: torch.nn.Module) -> dict[str, np.ndarray]:
    """The model's weights as JAX saves them."""
    timm = {name: value.numpy() for name, value in model.state_dict().items()}
    width, heads = tiny.SIZE.embed_dim, tiny.SIZE.num_heads
    theirs = {
        "cls": timm["cls_token"],
        "Transformer/posembed_input/pos_embedding": timm["pos_embed"],
        "embedding/kernel": timm["patch_embed.proj.weight"].transpose(2, 3, 1, 0),
        "embedding/bias": timm["patch_embed.proj.bias"],
        "Transformer/encoder_norm/scale": timm["norm.weight"],
        "Transformer/encoder_norm/bias": timm["norm.bias"],
        "head/kernel": timm["head.weight"].T,
        "head/bias": timm["head.bias"],
    }
    for number in range(len(model.blocks)):
        block, layer = f"blocks.{number}", f"Transformer/encoderblock_{number}"
        attention = f"{layer}/MultiHeadDotProductAttention_1"
        for part, name in enumerate(("query", "key", "value")):
            rows = slice(part * width, (part + 1) * width)
            kernel, bias = timm[f"{block}.attn.qkv.weight"][rows].T, timm[f"{block}.attn.qkv.bias"][rows]
            theirs[f"{attention}/{name}/kernel"] = kernel.reshape(width, heads, -1)
            theirs[f"{attention}/{name}/bias"] = bias.reshape(heads, -1)
        theirs[f"{attention}/out/kernel"] = timm[f"{block}.attn.proj.weight"].T.reshape(heads, -1, width)
        theirs[f"{attention}/out/bias"] = timm[f"{block}.attn.proj.bias"]
        for ours, name in (("norm1", "LayerNorm_0"), ("norm2", "LayerNorm_2")):
            theirs[f"{layer}/{name}/scale"] = timm[f"{block}.{ours}.weight"]
            theirs[f"{layer}/{name}/bias"] = timm[f"{block}.{ours}.bias"]
        for ours, name in (("fc1", "Dense_0"), ("fc2", "Dense_1")):
            theirs[f"{layer}/MlpBlock_3/{name}/kernel"] = timm[f"{block}.mlp.{ours}.weight"].T
            theirs[f"{layer}/MlpBlock_3/{name}/bias"] = timm[f"{block}.mlp.{ours}.bias"]
    return theirs


def saved(state, tmp_path):
    np.savez(tmp_path / "augreg.npz", **state)
    return tmp_path / "augreg.npz"


def test_a_checkpoint_loads_as_timm_reads_it(tmp_path):
    model = tiny.model("augreg_vit_t")
    path = saved(written(model), tmp_path)
    by_timm = timm.create_model("vit_tiny_patch16_224", **tiny.SIZE.given())
    by_timm.load_pretrained(str(path))
    found = ztp.load_model("augreg_vit_t", weights=path, overrides=tiny.SIZE)
    assert found.source.weights.sha256 == model.source.weights.sha256
    for name, value in by_timm.state_dict().items():
        assert torch.equal(found.state_dict()[name], value), name


@pytest.mark.parametrize(
    "change, says",
    [
        ({"num_classes": 7}, r"misshapen: head/bias \(10,\) instead of \(7,\), head/kernel \(10, 48\) instead of \(7"),
        ({"img_size": 64}, r"pos_embedding \(1, 37, 48\) instead of \(1, 17, 48\)"),
        ({"patch_size": 32}, r"embedding/kernel \(48, 3, 16, 16\) instead of \(48, 3, 32, 32\)"),
        ({"depth": 3}, "unexpected: Transformer/encoderblock_3/LayerNorm_0/bias"),
        ({"depth": 5}, "missing: Transformer/encoderblock_4/LayerNorm_0/bias"),
    ],
)
def test_a_checkpoint_of_another_model_is_refused_by_name_and_shape(change, says, tmp_path):
    """timm resizes positions and leaves out a head that does not fit, and says nothing."""
    path = saved(written(tiny.model("augreg_vit_t")), tmp_path)
    with pytest.raises(BadRequest, match=says):
        ztp.load_model("augreg_vit_t", weights=path, overrides=ModelSize(**{**tiny.SIZE.given(), **change}))


def test_arrays_that_are_no_weights_are_refused(tmp_path):
    state = written(tiny.model("augreg_vit_t"))
    for value, says in ((np.full(48, np.nan, np.float32), "NaN"), (np.array(["text"]), "no numbers")):
        path = saved({**state, "embedding/bias": value}, tmp_path)
        with pytest.raises(BadRequest, match=says):
            ztp.load_model("augreg_vit_t", weights=path, overrides=tiny.SIZE)
