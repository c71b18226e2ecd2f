"""LV-ViT: the official numbers, the vote of the patches that are left, and an engine that passes the gate."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import onnx
import pytest
import torch
from onnx import TensorProto, numpy_helper
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

import ztp_deploy as ztp
from tests import golden, tiny
from ztp_deploy import exporters, models
from ztp_deploy.errors import BadRequest, GateFailed, MissingSoftware
from ztp_deploy.exporters import precision, vocabulary
from ztp_deploy.models import lvvit
from ztp_deploy.plan import count_flops
from ztp_deploy.pruning.tokens import MASKED, initial_state, key_bias, membership, special_ahead, take_special
from ztp_deploy.source import ModelSize

PATCHES = 196


@pytest.fixture(scope="module")
def model():
    return ztp.load_model("lvvit_t", weights=golden.state_dict("lvvit_t"))


@pytest.fixture(scope="module")
def walk(model):
    """Tokens before the first block and after every block of the golden case, and the host that made them."""
    host = models.host_of(model)
    images = golden.images("lvvit_t")
    state = initial_state(images, PATCHES)
    with torch.inference_mode():
        tokens = [host.embed(images)]
        for block in host.blocks:
            tokens.append(host.transform(block, host.mix(block, tokens[-1], state)))
    return host, tokens, state


def outputs_after_blocks(name, changed=lambda model: None):
    """Class tokens after every block and logits of a golden case."""
    model = ztp.load_model("lvvit_t", weights=golden.state_dict(name))
    changed(model)
    seen = []
    hooks = [block.register_forward_hook(lambda _, __, out: seen.append(out[:, 0])) for block in model.blocks]
    with torch.inference_mode():
        logits = model(golden.images(name))
    for hook in hooks:
        hook.remove()
    return torch.stack(seen), logits


# --- the official numbers ----------------------------------------------------------------------


def test_logits_are_the_official_ones(model, walk):
    host, tokens, state = walk
    with torch.inference_mode():
        golden.assert_matches("lvvit_t", "logits", model(golden.images("lvvit_t")))
        golden.assert_matches("lvvit_t", "logits", host.read_out(tokens[-1], state))


def test_tokens_are_the_official_ones(model, walk):
    _, tokens, _ = walk
    after = torch.stack(tokens[1:])
    golden.assert_matches("lvvit_t", "block_cls", after[:, :, 0, :96])
    golden.assert_matches("lvvit_t", "block_mean", after[:, :, 1:, :96].mean(2))
    with torch.inference_mode():
        stem = model.patch_embed(golden.images("lvvit_t"))
    golden.assert_matches("lvvit_t", "stem_tokens", stem[:, [0, 1, 13, 14, 97, 98, 194, 195], :96])


def test_attention_and_keys_are_the_official_ones(walk):
    host, tokens, state = walk
    with torch.inference_mode():
        found = [host.attention(host.blocks[index], tokens[index], state) for index in (0, 6, 11)]
    golden.assert_matches("lvvit_t", "attn_colmean", torch.stack([a.probabilities.mean(2) for a in found]))
    golden.assert_matches("lvvit_t", "key_norm", torch.stack([a.keys.norm(dim=-1) for a in found]))


def test_both_parts_of_the_read_out_are_the_official_ones(model, walk):
    _, tokens, _ = walk
    with torch.inference_mode():
        normed = model.norm(tokens[-1])
        golden.assert_matches("lvvit_t", "cls_logits", model.head(normed[:, 0]))
        golden.assert_matches("lvvit_t", "aux_max", model.aux_head(normed[:, 1:]).amax(1))


def test_layer_norm_eps_is_the_official_one():
    after, logits = outputs_after_blocks("lvvit_t_eps")
    golden.assert_matches("lvvit_t_eps", "logits", logits)
    golden.assert_matches("lvvit_t_eps", "block_cls", after[:, :, :64])


@pytest.mark.parametrize(
    "name, kind, eps", [("lvvit_t_eps", nn.LayerNorm, 1e-6), ("lvvit_t", nn.BatchNorm2d, 1e-3)], ids=["layer", "batch"]
)
def test_another_eps_is_noticed(name, kind, eps):
    def changed(model):
        for part in model.modules():
            if isinstance(part, kind):
                part.eps = eps

    _, logits = outputs_after_blocks(name, changed)
    with pytest.raises(AssertionError):
        golden.assert_matches(name, "logits", logits)


def test_another_residual_scale_is_noticed():
    def changed(model):
        for block in model.blocks:
            block.skip_lam = 2.0

    _, logits = outputs_after_blocks("lvvit_t", changed)
    distance = np.abs(logits.numpy() - golden.arrays("lvvit_t")["logits"]).max()
    np.testing.assert_allclose(
        distance, golden.CASES["lvvit_t"]["logit_change_under_mistakes"]["skip_lam 2 instead of 1"], rtol=0.01
    )


# --- names, sizes, weights ---------------------------------------------------------------------


@pytest.mark.parametrize(
    "name, side, millions, giga_macs",
    [
        ("lvvit_t", 224, 8.53, 2.9),
        ("lvvit_s", 224, 26.15, 6.6),
        ("lvvit_s_384", 384, 26.30, 21.9),
        ("lvvit_m", 224, 55.83, 12.7),
        ("lvvit_m_384", 384, 56.03, 41.6),
    ],
)
def test_every_name_has_the_official_size_and_counts_its_work(name, side, millions, giga_macs):
    """Parameters as the official table has them; multiply-accumulates as torch counts them on the module itself."""
    _, geometry = models.describe(name)
    assert (geometry.image_size, geometry.patch_tokens) == (side, (side // 16) ** 2)
    assert (geometry.special_tokens, geometry.class_token, geometry.num_classes) == (1, 0, 1000)
    module = lvvit.build(lvvit.NAMES[name], ModelSize(), device="meta")
    assert sum(parameter.numel() for parameter in module.parameters()) / 1e6 == pytest.approx(millions, abs=0.006)
    dense = count_flops(geometry, ()).dense
    with FlopCounterMode(display=False) as counter:
        module(torch.zeros(1, 3, side, side, device="meta"))
    assert 2 * dense == counter.get_total_flops()
    assert dense / 1e9 == pytest.approx(giga_macs, abs=0.05)


def test_all_names_are_covered():
    assert set(lvvit.NAMES) == {"lvvit_t", "lvvit_s", "lvvit_s_384", "lvvit_m", "lvvit_m_384"}
    assert set(lvvit.NAMES.values()) == set(lvvit.ARCHITECTURES)


@pytest.mark.parametrize("name, crop", [("lvvit_t", 0.9), ("lvvit_s", 0.9), ("lvvit_m", 1.0)])
def test_preprocessing_is_the_official_one(name, crop):
    module = lvvit.build(lvvit.NAMES[name], ModelSize(depth=1, embed_dim=48, num_heads=3))
    preprocessing = models.source_of(module).preprocessing
    assert preprocessing.input_size == (3, 224, 224)
    assert preprocessing.mean == (0.485, 0.456, 0.406)
    assert preprocessing.std == (0.229, 0.224, 0.225)
    assert (preprocessing.interpolation, preprocessing.crop_pct) == ("bicubic", crop)


def test_the_source_says_what_the_model_is(model):
    assert (model.source.name, model.source.family, model.source.architecture) == ("lvvit_t", "lvvit", "lvvit_t")
    assert model.source.labels is not None
    assert model.source.labels[0].startswith("tench")
    assert tiny.model("lvvit_s").source.labels is None  # ten classes of its own
    again = models.reload_model(tiny.model("lvvit_s").source)
    assert again.source == tiny.model("lvvit_s").source


def test_pretrained_weights_are_refused_with_the_place_where_they_are():
    with pytest.raises(
        MissingSoftware,
        match=r"lvvit_s-26M-224-83\.3.*GitHub release page of zihangJiang/TokenLabeling.*--weights path",
    ):
        ztp.load_model("lvvit_s", weights="pretrained")
    with pytest.warns(models.RandomWeightsWarning, match="TokenLabeling"):
        assert ztp.load_model("lvvit_t").source.weights.kind == "random"


def test_the_backbone_of_dynamicvit_loads_by_overrides():
    state = golden.state_dict("dynamicvit_lvvit_tiny")
    size = ModelSize(embed_dim=96, depth=8, num_heads=3, mlp_ratio=3.0, num_classes=100)
    module = ztp.load_model("lvvit_s", weights=state, overrides=size)
    backbone = {name: value for name, value in state.items() if not name.startswith("score_predictor.")}
    assert module.state_dict().keys() == backbone.keys()
    assert all(torch.equal(module.state_dict()[name], value) for name, value in backbone.items())
    assert {block.skip_lam for block in module.blocks} == {
        golden.CASES["dynamicvit_lvvit_tiny"]["arguments"]["skip_lam"]
    }
    del state["aux_head.bias"]
    with pytest.raises(BadRequest, match=r"missing: aux_head\.bias"):
        ztp.load_model("lvvit_s", weights=state, overrides=size)


@pytest.mark.parametrize(
    "size, message",
    [
        (ModelSize(embed_dim=50), "embed_dim=50 is not a multiple of num_heads=6"),
        (ModelSize(patch_size=7), "patch_size=7 is odd"),
        (ModelSize(img_size=230), "img_size=230 is not a multiple of patch_size=16"),
        (ModelSize(mlp_ratio=0.001), "without a hidden unit"),
    ],
)
def test_sizes_that_do_not_fit_are_refused(size, message):
    with pytest.raises(BadRequest, match=message):
        ztp.load_model("lvvit_s", weights="random", overrides=size)


def test_modules_that_no_engine_would_run_as_they_are_are_refused():
    half = tiny.model("lvvit_s").half()
    with pytest.raises(BadRequest, match="not float32"):
        models.host_of(half)
    hooked = tiny.model("lvvit_s")
    hooked.blocks[0].register_forward_hook(lambda *_: None)
    with pytest.raises(BadRequest, match="hooks"):
        models.host_of(hooked)
    other = tiny.model("lvvit_s")
    other.blocks[0] = nn.Identity()
    with pytest.raises(BadRequest, match="another kind"):
        models.host_of(other)


# --- pruning -----------------------------------------------------------------------------------


def by_hand(model, tokens):
    """The read-out in numpy: head of the class token plus half of the greatest of the patches' own logits."""
    state = {name: value.double().numpy() for name, value in model.state_dict().items()}
    centred = tokens.double().numpy()
    centred = centred - centred.mean(-1, keepdims=True)
    normed = centred / np.sqrt((centred**2).mean(-1, keepdims=True) + 1e-5) * state["norm.weight"] + state["norm.bias"]
    own = normed[:, 0] @ state["head.weight"].T + state["head.bias"]
    votes = normed[:, 1:] @ state["aux_head.weight"].T + state["aux_head.bias"]
    return own + 0.5 * votes.max(1)


def test_the_maximum_is_over_the_survivors(model):
    plan = ztp.make_plan(model, ratio=0.7)
    assert [stage.block for stage in plan.stages] == [3, 6, 9]
    pruned = ztp.prune(model, plan)
    last = []
    pruned.model.norm.register_forward_pre_hook(lambda _, arguments: last.append(arguments[0]))
    with torch.inference_mode():
        logits = pruned(golden.images("lvvit_t")).numpy()
    assert last[0].shape == (2, 1 + 66, 240)
    np.testing.assert_allclose(logits, by_hand(pruned.model, last[0]), atol=2e-5)
    # One survivor less is another maximum for some class.
    assert np.abs(logits - by_hand(pruned.model, last[0][:, :-1])).max() > 1e-2


def test_patches_that_were_dropped_cost_no_logits():
    """Multiply-accumulates as torch counts them on the pruned module, whose selection has none."""
    model = ztp.load_model("lvvit_t", weights="random")
    plan = ztp.make_plan(model, "slice", ratio=0.5)
    with FlopCounterMode(display=False) as counter, torch.inference_mode():
        ztp.prune(model, plan)(golden.images("lvvit_t")[:1])
    assert 2 * plan.flops.executed == counter.get_total_flops()


def test_masked_slots_have_no_vote(walk):
    host, tokens, state = walk
    kept = torch.stack([torch.arange(0, 120, 2), torch.arange(15, 195, 3)])
    alive = special_ahead(membership(kept, PATCHES), 1, 1.0)
    with torch.inference_mode():
        gathered = host.read_out(take_special(tokens[-1], kept, 1), state)
        masked = host.read_out(tokens[-1], replace(state, alive=alive))
        everybody = host.read_out(tokens[-1], state)
    torch.testing.assert_close(masked, gathered)
    assert (everybody - masked).abs().max() > 0.1


@pytest.mark.parametrize("biased", [False, True])
def test_open_attention_is_the_fused_one(walk, biased):
    host, tokens, state = walk
    block = host.blocks[5]
    if biased:
        dead = membership(torch.arange(0, 100).expand(2, -1), PATCHES)
        state = replace(state, bias=key_bias(special_ahead(dead * MASKED, 1, 0.0)))
    with torch.inference_mode():
        attention = host.attention(block, tokens[5], state)
        opened = host.finish(block, tokens[5], attention.probabilities @ attention.values)
        fused = host.mix(block, tokens[5], state)
        plain = host.mix(block, tokens[5], initial_state(tokens[5], PATCHES))
        torch.testing.assert_close(block(tokens[5]), host.transform(block, plain))
    torch.testing.assert_close(opened, fused, atol=1e-5, rtol=1e-5)
    assert bool((fused - plain).abs().max() > 1e-2) == biased
    assert biased == bool((attention.probabilities[..., 1:101] == 0).all())


# --- engines -----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def small():
    return tiny.model("lvvit_s")


@pytest.fixture(scope="module")
def small_artifact(small, tmp_path_factory):
    pruned = ztp.prune(small, ztp.make_plan(small, ratio=0.7, options={"rounds": 2}))
    return ztp.export(pruned, "onnx", tmp_path_factory.mktemp("lvvit") / "onnx")


def test_a_pruned_engine_passes_the_gate(small, small_artifact, tmp_path):
    graph = onnx.load(str(small_artifact.directory / "model.onnx"))
    assert vocabulary.lint(graph, small_artifact.manifest.plan) == []
    engine = ztp.build(small_artifact, "onnxruntime", device="cpu", batch=(1, 4, 8), directory=tmp_path / "engine")
    assert ztp.check_parity(engine, small, tiny.images(5)).require().passed

    def damage(graph: onnx.ModelProto) -> None:
        [bias] = [t for t in graph.graph.initializer if t.name.endswith("aux_head.bias")]
        bias.CopyFrom(numpy_helper.from_array(numpy_helper.to_array(bias) * np.float32(2), bias.name))

    tiny.damage_graph(engine.directory, damage)
    with pytest.raises(GateFailed, match="on the same tokens logits differ"):
        ztp.check_parity(engine, small, tiny.images(5)).require()


def test_both_heads_stay_in_float32(small_artifact, tmp_path):
    lowered = exporters.convert(small_artifact, "fp16", tmp_path / "fp16")
    graph = onnx.load(str(lowered.directory / "model.onnx"))
    onnx.checker.check_model(graph, full_check=True)
    weights = {tensor.name: tuple(tensor.dims) for tensor in graph.graph.initializer}
    inputs = {node.name: [weights.get(name) for name in node.input] for node in graph.graph.node}
    wide = [name for name, kind in precision.matrix_nodes(graph) if kind == TensorProto.FLOAT]
    heads = [name for name in wide if {(48, 10), (10, 48)} & set(inputs[name])]
    assert len(heads) == 2
