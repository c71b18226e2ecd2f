"""Plain timm ViTs beyond the paper: DINOv2 with and without registers, SigLIP with its attention pooling."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

import ztp_deploy as ztp
from tests.models.modules import (
    assert_dense_is_the_modules_own_forward,
    assert_open_attention_is_the_fused_one,
    images,
    macs,
    module,
)
from ztp_deploy import models
from ztp_deploy.errors import BadRequest
from ztp_deploy.models import timm_head
from ztp_deploy.pruning.tokens import MASKED, TokenState, initial_state, key_bias
from ztp_deploy.source import ModelSize

KINDS = {
    "DINOv2": ("vit_small_patch14_dinov2", {}),
    "DINOv2, registers": ("vit_small_patch14_reg4_dinov2", {}),
    "DINOv2, SwiGLU": ("vit_giant_patch14_reg4_dinov2", {}),
    "SigLIP": ("vit_base_patch16_siglip_224", {}),
    "SigLIP, mean": ("vit_so400m_patch14_siglip_gap_224", {}),
    "registers, attention pooling": ("vit_so150m_patch16_reg4_map_256", {}),
    "the same with the registers pooled": ("vit_so150m_patch16_reg4_map_256", {"pool_include_prefix": True}),
    "maximum and mean": ("vit_small_patch16_224", {"global_pool": "avgmax"}),
}
SPECIAL = {"DINOv2": 1, "DINOv2, registers": 5, "SigLIP": 0, "registers, attention pooling": 4}


def build(kind):
    name, changes = KINDS[kind]
    return module(name, **changes)


@pytest.fixture(autouse=True)
def _no_grad():
    with torch.no_grad():
        yield


@pytest.mark.parametrize("kind", KINDS)
def test_dense_is_the_modules_own_forward(kind):
    assert_dense_is_the_modules_own_forward(build(kind))


@pytest.mark.parametrize("kind", KINDS)
def test_open_attention_is_the_fused_one(kind):
    assert_open_attention_is_the_fused_one(build(kind))


@pytest.mark.parametrize("kind", KINDS)
def test_geometry_counts_what_is_multiplied(kind):
    """Against torch's own counter: the module's forward, and the pruned one without selection."""
    model = build(kind)
    image = images(model, 1)
    plan = ztp.make_plan(model, "slice", ratio=0.6)
    assert plan.flops.dense == macs(model, image)
    assert plan.flops.executed == macs(ztp.prune(model, plan), image) < plan.flops.planned
    geometry = models.host_of(model).geometry
    assert not geometry.rotary
    assert geometry.special_tokens == SPECIAL.get(kind, geometry.special_tokens)


def test_attention_pooling_is_counted_by_hand():
    _, geometry = models.describe("vit_base_patch16_siglip_224", ModelSize(num_classes=1000))
    width = 768
    assert (geometry.special_tokens, geometry.class_token, geometry.patch_tokens) == (0, None, 196)
    # Keys and values of every token, and the one query's two products with it.
    assert geometry.head_macs_per_token == 2 * width**2 + 2 * width
    # The query and the output, the pool's MLP, the classifier.
    assert geometry.head_macs == 2 * width**2 + 8 * width**2 + 1000 * width


@pytest.mark.parametrize("kind", ["SigLIP", "registers, attention pooling", "the same with the registers pooled"])
def test_the_attention_pool_sees_the_survivors_alone(kind):
    """Zero-TPrune's pruned forward by hand: timm's blocks on kept tokens, timm's head on the last of them."""
    model = build(kind)
    plan = ztp.make_plan(model, ratio=0.6)
    batch = images(model)
    outputs = ztp.prune(model, plan).run(batch)
    special = model.num_prefix_tokens
    tokens = model.norm_pre(model._pos_embed(model.patch_embed(batch)))
    now = torch.arange(36).expand(2, -1)
    kept = {stage.block: positions.long() for stage, positions in zip(plan.stages, outputs.kept, strict=True)}
    for number, block in enumerate(model.blocks, start=1):
        tokens = block(tokens)
        if number in kept:
            slots = (kept[number].unsqueeze(2) == now.unsqueeze(1)).int().argmax(2)
            patches = torch.stack([rows[chosen] for rows, chosen in zip(tokens[:, special:], slots, strict=True)])
            tokens, now = torch.cat([tokens[:, :special], patches], dim=1), kept[number]
    assert tokens.shape[1] == special + 7
    torch.testing.assert_close(outputs.logits, model.forward_head(model.norm(tokens)), atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("kind", KINDS)
def test_masked_slots_are_not_read(kind):
    host = models.host_of(build(kind))
    batch = images(host.model)
    special = host.geometry.special_tokens
    tokens = host.embed(batch)
    alive = torch.ones(2, special + 36)
    alive[:, special + 1 :: 2] = 0
    there = torch.arange(special + 36)[alive[0] > 0]
    everyone = initial_state(batch, 36)
    expected = host.read_out(tokens[:, there], TokenState(everyone.positions[:, ::2]))
    masked = replace(everyone, alive=alive)
    torch.testing.assert_close(host.read_out(tokens, masked), expected, atol=1e-5, rtol=1e-5)
    both = replace(masked, bias=key_bias((1 - alive) * MASKED))
    torch.testing.assert_close(host.read_out(tokens, both), expected, atol=1e-5, rtol=1e-5)
    if host.model.global_pool != "token":
        assert (host.read_out(tokens, everyone) - expected).abs().max() > 1e-2


def test_a_token_of_size_two_weighs_twice_in_the_attention_pool():
    """What ToMe adds to every attention, the logarithm of the sizes, stands for the tokens that were merged."""
    host = models.host_of(build("SigLIP"))
    batch = images(host.model)
    twice = torch.cat([tokens := host.embed(batch), tokens[:, :1]], dim=1)
    sizes = torch.ones(2, 36)
    sizes[:, 0] = 2
    everyone = initial_state(batch, 36)
    found = host.read_out(tokens, replace(everyone, sizes=sizes, bias=key_bias(sizes.log())))
    torch.testing.assert_close(found, host.read_out(twice, everyone), atol=1e-5, rtol=1e-5)
    assert (found - host.read_out(tokens, everyone)).abs().max() > 1e-4


@pytest.mark.parametrize("kind", ["DINOv2, registers", "SigLIP"])
def test_they_pass_the_gate(kind, tmp_path):
    model = ztp.load_model(build(kind))
    plan = ztp.make_plan(model, ratio=0.7, options={"rounds": 2})
    assert (plan.special_tokens, plan.counts) == (SPECIAL[kind], [25, 17, 11])
    engine = ztp.build(
        ztp.export(ztp.prune(model, plan), "onnx", tmp_path / "a"),
        "onnxruntime",
        device="cpu",
        directory=tmp_path / "e",
    )
    assert ztp.check_parity(engine, model, images(model, 5).numpy()).require().passed


def test_a_fine_tuned_checkpoint_brings_its_classifier():
    size = ModelSize(img_size=84, embed_dim=48, depth=4, num_heads=3, num_classes=10)
    trained = module("vit_small_patch14_reg4_dinov2")
    model = ztp.load_model("vit_small_patch14_reg4_dinov2", weights=trained.state_dict(), overrides=size)
    batch = images(trained)
    assert torch.equal(model(batch), trained(batch))
    headless = module("vit_small_patch14_reg4_dinov2", num_classes=0)
    headless.head = torch.nn.Linear(48, 5)  # as many fine-tuning scripts do it
    assert models.host_of(headless).geometry.num_classes == 5
    assert ztp.load_model(headless)(batch).shape == (2, 5)


@pytest.mark.parametrize(
    "make, reason",
    [
        (lambda: module("vit_small_patch14_dinov2", num_classes=0), r"no classifier.*ModelSize\(num_classes=…\)"),
        (lambda: module("vit_small_patch14_dinov2", global_pool=""), "no classifier"),
        (lambda: _with_head(torch.nn.Sequential(torch.nn.Linear(48, 5))), "not a linear layer"),
        (lambda: module("vit_small_patch14_dinov2", global_pool="prr"), "AttentionPoolPrr, needs every token"),
        (lambda: _positioned_pool(), "AttentionPoolLatent, needs every token"),
        (
            lambda: module("vit_small_patch14_dinov2", global_pool="avg", pool_include_prefix=True),
            "pools special tokens",
        ),
        (lambda: module("vit_small_patch14_dinov2", dynamic_img_size=True), "dynamic_img_size=False"),
        (lambda: module("beit_base_patch16_224"), "No family here carries a Beit"),
    ],
)
def test_what_cannot_work_is_refused_with_the_reason(make, reason):
    with pytest.raises(BadRequest, match=reason):
        ztp.load_model(make())


def _with_head(head):
    model = module("vit_small_patch14_dinov2")
    model.head = head
    return model


def _positioned_pool():
    model = module("vit_base_patch16_siglip_224")
    model.attn_pool.pos_embed = torch.nn.Parameter(torch.zeros(36, 48))
    return model


@pytest.mark.parametrize(
    "name", ["vit_small_patch14_dinov2", "vit_base_patch16_siglip_224", "vit_small_patch16_dinov3"]
)
def test_names_without_a_classifier_say_what_to_do(name):
    with pytest.raises(BadRequest) as refusal:
        ztp.make_plan(name, ratio=0.7)
    assert timm_head.GIVE_CLASSIFIER in str(refusal.value)
