"""Checkpoints of Hugging Face's transformers, written by hand from a timm ViT and read back."""

from __future__ import annotations

import pytest
import torch

import ztp_deploy as ztp
from tests import tiny
from ztp_deploy.errors import BadRequest


def in_their_keys(model: torch.nn.Module, body: str, head: str) -> dict[str, torch.Tensor]:
    """The model's weights as transformers' ViT or distilled DeiT saves them."""
    timm = model.state_dict()
    theirs = {
        f"{body}.embeddings.cls_token": timm["cls_token"],
        f"{body}.embeddings.position_embeddings": timm["pos_embed"],
    }
    if body == "deit":
        theirs["deit.embeddings.distillation_token"] = timm["dist_token"]
    for kind in ("weight", "bias"):
        theirs[f"{body}.embeddings.patch_embeddings.projection.{kind}"] = timm[f"patch_embed.proj.{kind}"]
        theirs[f"{body}.layernorm.{kind}"] = timm[f"norm.{kind}"]
        theirs[f"{head}.{kind}"] = timm[f"head.{kind}"]
        if body == "deit":
            theirs[f"distillation_classifier.{kind}"] = timm[f"head_dist.{kind}"]
        for number in range(len(model.blocks)):
            block, layer = f"blocks.{number}", f"{body}.encoder.layer.{number}"
            joint = timm[f"{block}.attn.qkv.{kind}"]
            width = joint.shape[0] // 3
            theirs[f"{layer}.attention.attention.query.{kind}"] = joint[:width]
            theirs[f"{layer}.attention.attention.key.{kind}"] = joint[width : 2 * width]
            theirs[f"{layer}.attention.attention.value.{kind}"] = joint[2 * width :]
            theirs[f"{layer}.attention.output.dense.{kind}"] = timm[f"{block}.attn.proj.{kind}"]
            theirs[f"{layer}.intermediate.dense.{kind}"] = timm[f"{block}.mlp.fc1.{kind}"]
            theirs[f"{layer}.output.dense.{kind}"] = timm[f"{block}.mlp.fc2.{kind}"]
            theirs[f"{layer}.layernorm_before.{kind}"] = timm[f"{block}.norm1.{kind}"]
            theirs[f"{layer}.layernorm_after.{kind}"] = timm[f"{block}.norm2.{kind}"]
    assert len(theirs) == len(timm) + 4 * len(model.blocks)  # two keys become six in every block
    return theirs


def load(name: str, state: dict[str, torch.Tensor]) -> torch.nn.Module:
    return ztp.load_model(name, weights=state, overrides=tiny.SIZE)


def logits(model: torch.nn.Module) -> torch.Tensor:
    with torch.inference_mode():
        return model(torch.from_numpy(tiny.images(2)))


LAYOUTS = [
    ("augreg_vit_t", "vit", "classifier"),
    ("deit_t", "vit", "classifier"),
    ("deit_t_distilled", "deit", "cls_classifier"),
]


@pytest.mark.parametrize("name, body, head", LAYOUTS)
def test_the_same_logits(name, body, head):
    model = tiny.model(name)
    again = load(name, in_their_keys(model, body, head))
    assert torch.equal(logits(again), logits(model))
    assert again.source.weights.sha256 == model.source.weights.sha256


def test_from_a_file(tmp_path):
    from safetensors.torch import save_file

    model = tiny.model()
    state = {name: value.contiguous().clone() for name, value in in_their_keys(model, "vit", "classifier").items()}
    save_file(state, tmp_path / "model.safetensors")
    again = ztp.load_model("deit_t", weights=tmp_path / "model.safetensors", overrides=tiny.SIZE)
    assert again.source.weights.sha256 == model.source.weights.sha256


def test_queries_and_keys_in_the_wrong_order_are_seen():
    model = tiny.model()
    state = in_their_keys(model, "vit", "classifier")
    query, value = (f"vit.encoder.layer.1.attention.attention.{part}.weight" for part in ("query", "value"))
    state[query], state[value] = state[value], state[query]
    assert (logits(load("deit_t", state)) - logits(model)).abs().max() > 1e-2


def test_wrong_keys_are_listed_in_the_layouts_own_terms():
    state = in_their_keys(tiny.model(), "vit", "classifier")
    del state["vit.encoder.layer.3.attention.attention.key.bias"]
    state["vit.pooler.dense.weight"] = torch.zeros(48, 48)
    state["classifier.bias"] = torch.zeros(3)
    with pytest.raises(BadRequest) as refusal:
        load("deit_t", state)
    text = str(refusal.value)
    assert "layout of Hugging Face does not fit" in text
    assert "missing: vit.encoder.layer.3.attention.attention.key.bias;" in text
    assert "unexpected: vit.pooler.dense.weight;" in text
    assert "misshapen: classifier.bias (3,) instead of (10,)" in text


@pytest.mark.parametrize("wrapper", ["", "module."])
def test_the_backbone_alone_is_refused_in_its_own_terms(wrapper):
    """Its keys all begin with `vit.`, which no wrapper has added."""
    state = in_their_keys(tiny.model(), "vit", "classifier")
    alone = {f"{wrapper}{name}": value for name, value in state.items() if name.startswith("vit.")}
    with pytest.raises(BadRequest, match=r"layout of Hugging Face does not fit.*missing: classifier\.bias"):
        load("deit_t", alone)


def test_a_distilled_checkpoint_without_its_second_head_is_refused():
    """DeiTForImageClassification has the token of the distilled DeiT and a single classifier."""
    state = in_their_keys(tiny.model("deit_t_distilled"), "deit", "classifier")
    for kind in ("weight", "bias"):
        del state[f"distillation_classifier.{kind}"]
    with pytest.raises(BadRequest, match=r"missing: cls_classifier\.bias.*distillation_classifier\.bias"):
        load("deit_t_distilled", state)


def test_keys_of_another_generation_are_refused():
    state = {
        key.replace("encoder.layer.", "layers."): value
        for key, value in in_their_keys(tiny.model(), "vit", "classifier").items()
    }
    with pytest.raises(BadRequest, match=r"unexpected: classifier\.bias, .*vit\.embeddings\.cls_token, .* and 67 more"):
        load("deit_t", state)
