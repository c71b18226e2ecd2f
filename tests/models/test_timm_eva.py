"""timm's Eva: EVA-02, DINOv3 and their like, dense and pruned, with rotary positions that follow their patches."""

from __future__ import annotations

from dataclasses import replace

import pytest
import timm
import torch
from timm.layers import apply_rot_embed_cat

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
from ztp_deploy.exporters.graph import InferenceGraph
from ztp_deploy.exporters.lower import lower
from ztp_deploy.models.timm_eva import _OFFICIAL, NAMES
from ztp_deploy.pruning.tokens import MASKED, TokenState, initial_state, key_bias, look_up
from ztp_deploy.source import ModelSize

KINDS = {
    "joint projections, packed SwiGLU, mean": ("eva02_tiny_patch14_336", {}),
    "projections apart, SwiGLU with a norm": ("eva02_base_patch14_448", {}),
    "a norm inside attention, class token": ("eva02_large_patch14_clip_224", {}),
    "registers, halves turned, LayerScale": ("vit_small_patch16_dinov3", {}),
    "the same with biases and SwiGLU": ("vit_huge_plus_patch16_dinov3_qkvb", {"global_pool": "token"}),
    "AttentionRope, no position embedding": ("vit_small_patch16_rope_224", {}),
    "no class token, a register": ("vit_base_patch16_rope_reg1_gap_256", {}),
    "no special token, attention pooling": ("vit_pe_core_gigantic_patch14_448", {"attn_pool_num_heads": 3}),
    "normalised queries and keys, maximum": ("vit_small_patch16_rope_224", {"qk_norm": True, "global_pool": "max"}),
    "no rotary positions": ("eva_giant_patch14_224", {}),
}
ROTARY = [kind for kind in KINDS if kind != "no rotary positions"]


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


def by_hand(model, batch, plan, kept, positions_of):
    """The pruned forward pass in timm's own modules; `positions_of` says which rows of the table tokens turn by."""
    table = model.rope.get_embed()
    tokens, _ = model._pos_embed(model.patch_embed(batch))
    tokens = model.norm_pre(tokens)
    special = model.num_prefix_tokens
    now = torch.arange(36).expand(len(batch), -1)
    stages = {stage.block: positions.long() for stage, positions in zip(plan.stages, kept, strict=True)}
    for number, block in enumerate(model.blocks, start=1):
        tokens = block(tokens, rope=table[positions_of(now)].unsqueeze(1))
        if number in stages:
            slots = (stages[number].unsqueeze(2) == now.unsqueeze(1)).int().argmax(2)
            patches = torch.stack([rows[chosen] for rows, chosen in zip(tokens[:, special:], slots, strict=True)])
            tokens, now = torch.cat([tokens[:, :special], patches], dim=1), stages[number]
    return model.forward_head(model.norm(tokens))


@pytest.mark.parametrize("kind", ROTARY)
def test_kept_tokens_turn_by_their_original_positions(kind):
    model = build(kind)
    plan = ztp.make_plan(model, ratio=0.6)
    assert plan.counts == [21, 12, 7]
    pruned = ztp.prune(model, plan)
    batch = images(model)
    outputs = pruned.run(batch)
    right = by_hand(model, batch, plan, outputs.kept, lambda positions: positions)
    torch.testing.assert_close(outputs.logits, right, atol=1e-5, rtol=1e-4)
    # Turned by slot instead, as if the rest had moved up, the logits are others.
    by_slot = by_hand(model, batch, plan, outputs.kept, lambda now: torch.arange(now.shape[1]).expand(2, -1))
    assert (outputs.logits - by_slot).abs().max() > 0.01 * right.std()


@pytest.mark.parametrize("kind", ROTARY)
def test_attention_follows_positions_in_whatever_order_the_slots_are(kind):
    host = models.host_of(build(kind))
    batch = images(host.model)
    tokens, state = host.embed(batch), initial_state(batch, 36)
    special = host.geometry.special_tokens
    order = torch.randperm(36, generator=torch.Generator().manual_seed(1))
    slots = torch.cat([torch.arange(special), order + special])
    moved = replace(state, positions=state.positions[:, order])
    expected = host.mix(host.blocks[0], tokens, state)[:, slots]
    torch.testing.assert_close(host.mix(host.blocks[0], tokens[:, slots], moved), expected, atol=1e-5, rtol=1e-5)
    unmoved = host.mix(host.blocks[0], tokens[:, slots], state)
    assert (unmoved - expected).abs().max() > 1e-3


@pytest.mark.parametrize("kind", KINDS)
def test_masked_slots_are_as_good_as_gone(kind):
    """Blocks and read-out with a third of the slots masked, against the same with these tokens taken away."""
    host = models.host_of(build(kind))
    batch = images(host.model)
    special = host.geometry.special_tokens
    alive = torch.ones(2, special + 36)
    alive[:, special + 1 :: 3] = 0
    there = torch.arange(special + 36)[alive[0] > 0]
    positions = torch.arange(36, dtype=torch.int32).masked_fill(alive[0, special:] == 0, -1).expand(2, -1)
    masked = TokenState(positions, bias=key_bias((1 - alive) * MASKED), alive=alive)
    gone = TokenState(positions[:, alive[0, special:] > 0])
    tokens = host.embed(batch)
    fewer = tokens[:, there]
    for block in host.blocks:
        tokens = host.transform(block, host.mix(block, tokens, masked))
        fewer = host.transform(block, host.mix(block, fewer, gone))
    torch.testing.assert_close(tokens[:, there], fewer, atol=1e-4, rtol=1e-4)
    expected = host.read_out(fewer, gone)
    torch.testing.assert_close(host.read_out(tokens, masked), expected, atol=1e-4, rtol=1e-4)
    if host.model.global_pool != "token":
        assert (host.read_out(tokens, initial_state(batch, 36)) - expected).abs().max() > 1e-2


@pytest.mark.parametrize("kind", KINDS)
def test_geometry_counts_what_is_multiplied(kind):
    """Against torch's own counter: the module's forward, and the pruned one without selection."""
    model = build(kind)
    image = images(model, 1)
    plan = ztp.make_plan(model, "slice", ratio=0.6)
    assert plan.flops.dense == macs(model, image)
    assert plan.flops.executed == macs(ztp.prune(model, plan), image) < plan.flops.planned < plan.flops.dense
    geometry = models.host_of(model).geometry
    assert geometry.rotary == (kind in ROTARY)
    assert geometry.class_token == (0 if model.cls_token is not None else None)
    assert geometry.special_tokens == model.num_prefix_tokens


def test_swiglu_has_three_matrices():
    _, geometry = models.describe("eva02_b_448")
    assert geometry.mlp_macs_per_token == 3 * 768 * 2048
    assert geometry.head_macs_per_token == 0
    _, packed = models.describe("eva02_t_336")
    assert packed.mlp_macs_per_token == 3 * 192 * 512


@pytest.mark.parametrize("name", NAMES)
def test_every_name_has_a_timm_architecture_of_the_right_shape(name):
    _, geometry = models.describe(name)
    assert geometry.image_size == int(name.rsplit("_", 1)[-1])
    assert (geometry.special_tokens, geometry.num_classes, geometry.rotary) == (1, 1000, True)


def test_timm_names_of_this_family_are_built_here_at_one_image_size():
    name, geometry = models.describe("vit_small_patch16_dinov3.lvd1689m", ModelSize(num_classes=7))
    assert (geometry.image_size, geometry.patch_tokens, geometry.special_tokens) == (256, 256, 5)
    assert geometry.num_classes == 7
    model = ztp.load_model(name, weights="random", overrides=ModelSize(num_classes=7, img_size=64, depth=2))
    assert model.source.family == "timm_eva"
    assert not model.dynamic_img_size
    assert model(torch.zeros(1, 3, 64, 64)).shape == (1, 7)
    assert models.describe("eva_large_patch14_196")[1].rotary is False  # a plain ViT, whatever its name
    assert (
        ztp.load_model("eva02_t_336", weights="random", overrides=ModelSize(img_size=56, depth=1)).source.labels
        is not None
    )


def test_random_weights_spread_attention_whatever_the_projections():
    for name in ("eva02_tiny_patch14_336", "eva02_base_patch14_448"):
        host = models.host_of(module(name))
        batch = images(host.model)
        attention = host.attention(host.blocks[0], host.embed(batch), initial_state(batch, 36))
        entropy = -(attention.probabilities * attention.probabilities.log()).sum(-1).mean()
        assert 0.3 < entropy / torch.log(torch.tensor(37.0)) < 0.95


@pytest.mark.parametrize("name", ["eva02_tiny_patch14_336", "eva02_base_patch14_448"])
def test_eva02s_official_layout_loads(name):
    model = module(name)
    official = {"rope.freqs_cos": torch.zeros(1), "blocks.0.attn.rope.freqs_sin": torch.zeros(1)}
    for key, value in model.state_dict().items():
        for theirs, ours in _OFFICIAL.items():
            if name.startswith("eva02_tiny") or theirs != ".mlp.w12.":
                key = key.replace(ours, theirs)
        official[key.replace("_proj.bias", "_bias")] = value
    assert "blocks.1.attn.q_bias" in official
    assert ("blocks.1.mlp.w12.weight" if "tiny" in name else "blocks.1.mlp.w1.weight") in official
    size = ModelSize(img_size=84, embed_dim=48, depth=4, num_heads=3, num_classes=10)
    loaded = ztp.load_model(name, weights={"module": official}, overrides=size)
    batch = images(model)
    assert torch.equal(loaded(batch), model(batch))
    del official["blocks.1.attn.q_bias"]
    with pytest.raises(BadRequest, match=r"missing: blocks\.1\.attn\.q_"):
        ztp.load_model(name, weights=official, overrides=size)


@pytest.mark.parametrize("kind", ["registers, halves turned, LayerScale", "no special token, attention pooling"])
def test_lowered_models_stay_near(kind):
    model = build(kind)
    graph = InferenceGraph(ztp.prune(model, ztp.make_plan(model, "slice", ratio=0.6)), "float32")
    batch = images(model)
    expected, found = graph(batch)[0], lower(graph, "bf16")(batch)[0]
    assert found.dtype == torch.float32
    assert 0 < (found - expected).abs().max() < 0.1 * expected.std()


@pytest.mark.parametrize("name", ["eva02_tiny_patch14_336", "vit_small_patch16_dinov3"])
def test_rotary_models_pass_the_gate(name, tmp_path):
    model = ztp.load_model(module(name))
    pruned = ztp.prune(model, ztp.make_plan(model, ratio=0.7, options={"rounds": 2}))
    engine = ztp.build(
        ztp.export(pruned, "onnx", tmp_path / "a"), "onnxruntime", device="cpu", directory=tmp_path / "e"
    )
    assert ztp.check_parity(engine, model, images(model, 5).numpy()).require().passed


def test_a_rotary_trace_passes_the_gate(tmp_path):
    model = ztp.load_model(module("eva02_tiny_patch14_336"))
    pruned = ztp.prune(model, ztp.make_plan(model, ratio=0.7, options={"rounds": 2}))
    artifact = ztp.export(pruned, "torchscript", tmp_path / "a")
    engine = ztp.build(artifact, "torchscript", device="cpu", directory=tmp_path / "e")
    assert ztp.check_parity(engine, model, images(model, 5).numpy()).require().passed


def test_look_up_takes_rows_by_index():
    table = torch.arange(12.0).reshape(4, 3)
    index = torch.tensor([[3, 0], [1, 1]], dtype=torch.int32)
    assert look_up(table, index).tolist() == [[[9, 10, 11], [0, 1, 2]], [[3, 4, 5], [3, 4, 5]]]
    values = torch.randn(2, 3, 2, 4)  # and timm turns by rows of one's own for every image
    rows = torch.randn(2, 1, 2, 8)
    assert torch.equal(apply_rot_embed_cat(values, rows)[1], apply_rot_embed_cat(values[1], rows[1]))


class _Changed(timm.models.eva.Eva):
    pass


class _OtherAttention(timm.models.eva.EvaAttention):
    pass


def _other_attention():
    model = module("eva02_tiny_patch14_336")
    model.blocks[2].attn = _OtherAttention(48, 3, scale_norm=False)
    return model


def _grouped_queries():
    return module("vit_base_patch16_sapiens2", num_kv_heads=(3, 3, 1, 1), dynamic_img_size=False)


def _changed():
    return _Changed(img_size=32, embed_dim=24, depth=1, num_heads=3, num_classes=5)


@pytest.mark.parametrize(
    "make, reason",
    [
        (_changed, "changes timm's Eva"),
        (lambda: module("eva02_enormous_patch14_clip_224"), "block 1 is a EvaBlockPostNorm"),
        (lambda: module("vit_small_patch16_rope_mixed_224"), "not one fixed table"),
        (lambda: _grouped_queries(), "in block 3 several heads share keys"),
        (_other_attention, "block 3 has _OtherAttention"),
        (lambda: module("eva02_tiny_patch14_336", img_size=(84, 98)), "square"),
        (lambda: module("eva02_tiny_patch14_336").half(), "not float32"),
        (lambda: module("vit_small_patch16_dinov3", dynamic_img_size=True), "dynamic_img_size=False"),
        (lambda: module("vit_small_patch16_dinov3", num_classes=0), r"ModelSize\(num_classes=…\)"),
    ],
)
def test_what_cannot_work_is_refused_with_the_reason(make, reason):
    with pytest.raises(BadRequest, match=reason):
        ztp.load_model(make())
