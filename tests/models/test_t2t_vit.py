"""T2T-ViT: the official numbers, the soft split against torch's Unfold, pruning, exports and refusals."""

from __future__ import annotations

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from torch import nn
from torch.nn import functional

import ztp_deploy as ztp
from tests import golden, tiny
from ztp_deploy import exporters, models
from ztp_deploy.errors import BadRequest, MissingSoftware
from ztp_deploy.exporters import precision, torch_export, vocabulary
from ztp_deploy.exporters.graph import InferenceGraph
from ztp_deploy.exporters.lower import lower
from ztp_deploy.models import t2t_modules
from ztp_deploy.models.t2t_modules import Block, SoftSplit, T2TViT
from ztp_deploy.models.t2t_vit import NAMES, T2TVitHost
from ztp_deploy.pruning.tokens import MASKED, initial_state, key_bias
from ztp_deploy.source import ModelSize

CASES = ("t2t_vit_7", "t2t_vit_7_eps", "t2t_vit_7_performer_eps")


def official(case, state=None):
    return ztp.load_model("t2t_vit_7", weights=state or golden.state_dict(case))


def logits_of(model, images):
    with torch.inference_mode():
        return model(images)


# --- the official numbers ----------------------------------------------------------------------


@pytest.mark.parametrize(
    "name, parameters, macs",
    [
        ("t2t_vit_7", 4.3, 1.1),
        ("t2t_vit_10", 5.9, 1.5),
        ("t2t_vit_12", 6.9, 1.8),
        ("t2t_vit_14", 21.5, 4.8),
        ("t2t_vit_19", 39.2, 8.5),
        ("t2t_vit_24", 64.1, 13.8),
        ("t2t_vit_t_14", 21.5, 6.1),
        ("t2t_vit_t_19", 39.2, 9.8),
        ("t2t_vit_t_24", 64.1, 15.0),
    ],
)
def test_sizes_are_those_that_the_authors_publish(name, parameters, macs):
    """Millions of parameters, billions of multiply-accumulates; 13.8 is 13.66 by our count, which leaves norms out."""
    skeleton = models.family("t2t_vit").build(name, ModelSize(), device="meta")
    assert sum(p.numel() for p in skeleton.parameters()) / 1e6 == pytest.approx(parameters, abs=0.06)
    plan = ztp.make_plan(name, "dense")
    assert plan.flops.dense / 1e9 == pytest.approx(macs, rel=0.012, abs=0.05)
    assert (plan.patch_tokens, plan.special_tokens) == (196, 1)


def test_all_nine_names_are_tested_above():
    assert len(NAMES) == 9
    assert NAMES.keys() <= models.model_names().keys()


@pytest.mark.parametrize("case", CASES)
def test_logits_and_class_tokens_are_the_official_ones(case):
    model, images = official(case), golden.images(case)
    golden.assert_matches(case, "logits", logits_of(model, images))
    tokens, _ = run_by_blocks(model, images)
    channels = golden.arrays(case)["block_cls"].shape[-1]
    golden.assert_matches(case, "block_cls", torch.stack([t[:, 0, :channels] for t in tokens]))


def test_every_block_attends_as_the_official_one_does():
    tokens, attentions = run_by_blocks(official("t2t_vit_7"), golden.images("t2t_vit_7"))
    golden.assert_matches("t2t_vit_7", "block_mean", torch.stack([t[:, 1:, :96].mean(1) for t in tokens]))
    picked = [attentions[index] for index in (0, 3, 6)]
    golden.assert_matches("t2t_vit_7", "attn_colmean", torch.stack([a.probabilities.mean(2) for a in picked]))
    golden.assert_matches("t2t_vit_7", "key_norm", torch.stack([a.keys.norm(dim=-1) for a in picked]))


def test_the_token_module_gives_the_official_tokens():
    module, images = official("t2t_vit_7").tokens_to_token, golden.images("t2t_vit_7")
    with torch.inference_mode():
        first = module.attention1(module.split0(images.flatten(2).transpose(1, 2)))
        stem = module(images)
    golden.assert_matches("t2t_vit_7", "t2t_attention1_tokens", first[:, [0, 1, 57, 1000, 3135]])
    golden.assert_matches("t2t_vit_7", "stem_tokens", stem[:, [0, 1, 13, 14, 97, 98, 194, 195], :96])


def run_by_blocks(model, images):
    """Tokens after each block and each block's attention, by the host."""
    host = models.host_of(model)
    state = initial_state(images, host.geometry.patch_tokens)
    tokens, after, attentions = host.embed(images), [], []
    with torch.inference_mode():
        for block in host.blocks:
            attentions.append(host.attention(block, tokens, state))
            tokens = host.transform(block, host.mix(block, tokens, state))
            after.append(tokens)
    return after, attentions


def wrong_norm_eps(model, monkeypatch):
    for part in model.modules():
        if isinstance(part, nn.LayerNorm):
            part.eps = 1e-6


def wrong_scale(model, monkeypatch):
    for block in model.blocks:
        block.attn.scale = 256**-0.5


def wrong_order(model, monkeypatch):
    for attention in (model.tokens_to_token.attention1, model.tokens_to_token.attention2):
        for parameter in (attention.kqv.weight, attention.kqv.bias):
            keys, queries, values = parameter.data.chunk(3)
            parameter.data = torch.cat([queries, keys, values])


def wrong_epsilon(model, monkeypatch):
    monkeypatch.setattr(t2t_modules, "EPSILON", 0.0)


def wrong_gelu(model, monkeypatch):
    exact = functional.gelu
    monkeypatch.setattr(functional, "gelu", lambda x, approximate="none": exact(x, approximate="tanh"))


@pytest.mark.parametrize(
    "case, mistake, make",
    [
        ("t2t_vit_7", "tanh GELU", wrong_gelu),
        ("t2t_vit_7", "qk_scale = embed_dim**-0.5 (the pretrained=True trap)", wrong_scale),
        ("t2t_vit_7", "performer projection read as q,k,v instead of k,q,v", wrong_order),
        ("t2t_vit_7_eps", "LayerNorm eps 1e-06", wrong_norm_eps),
        ("t2t_vit_7_performer_eps", "performer epsilon 0 instead of 1e-8", wrong_epsilon),
    ],
)
def test_the_known_mistakes_would_be_seen(case, mistake, make, monkeypatch):
    model, images = official(case), golden.images(case)
    right = logits_of(model, images)
    make(model, monkeypatch)
    wrong = logits_of(model, images)
    change = golden.CASES[case]["logit_change_under_mistakes"][mistake]
    assert (wrong - right).abs().max().item() == pytest.approx(change, rel=0.05)
    with pytest.raises(AssertionError, match="Not equal"):
        golden.assert_matches(case, "logits", wrong)


# --- soft splits and token layers ---------------------------------------------------------------


@pytest.mark.parametrize(
    "channels, side, kernel, stride, padding", [(3, 64, 7, 4, 2), (64, 16, 3, 2, 1), (5, 8, 3, 2, 1)]
)
def test_a_soft_split_is_exactly_torchs_unfold(channels, side, kernel, stride, padding):
    maps = torch.from_numpy(np.random.default_rng(1).standard_normal((2, channels, side, side), np.float32))
    split = SoftSplit(side, kernel, stride, padding)
    found = split(maps.flatten(2).transpose(1, 2))
    expected = nn.Unfold(kernel, stride=stride, padding=padding)(maps).transpose(1, 2)
    assert found.shape[1] == split.out_side**2
    assert torch.equal(found, expected)
    assert not torch.equal(SoftSplit(side, kernel, stride, padding - 1)(maps.flatten(2).transpose(1, 2)), expected)
    with pytest.raises(AssertionError):
        assert torch.equal(SoftSplit(side, kernel, stride, padding)(maps.flatten(2).transpose(1, 2).flip(1)), expected)


@pytest.mark.parametrize("name", ["t2t_vit_7", "t2t_vit_t_14"])
def test_the_token_module_agrees_with_a_slow_direct_computation(name):
    module = tiny.model(name).tokens_to_token.double()
    images = torch.from_numpy(tiny.images(2)).double()
    with torch.inference_mode():
        tokens = nn.Unfold(7, stride=4, padding=2)(images).transpose(1, 2)
        for layer in (module.attention1, module.attention2):
            tokens = direct_layer(layer, tokens)
            side = int(tokens.shape[1] ** 0.5)
            maps = tokens.transpose(1, 2).reshape(2, 64, side, side)
            tokens = nn.Unfold(3, stride=2, padding=1)(maps).transpose(1, 2)
        # The performer's kernel runs in float32 whatever comes in.
        torch.testing.assert_close(module(images), module.project(tokens), atol=2e-5, rtol=0)


def direct_layer(layer, tokens):
    """One token layer as the paper writes it, attention as a full matrix."""
    normed = layer.norm1(tokens)
    if isinstance(layer, t2t_modules.TokenPerformer):
        keys, queries, values = layer.kqv(normed).split(64, dim=-1)
        features = [
            torch.exp(torch.einsum("bnc,mc->bnm", x, layer.w) - (x**2).sum(-1, keepdim=True) / 2) / 32**0.5
            for x in (queries, keys)
        ]
        kernel = torch.einsum("bnm,bkm->bnk", *features)
        attention = kernel / (kernel.sum(-1, keepdim=True) + 1e-8)
        proj = layer.proj
    else:
        queries, keys, values = layer.attn.qkv(normed).split(64, dim=-1)
        attention = (torch.einsum("bnc,bkc->bnk", queries, keys) / tokens.shape[-1] ** 0.5).softmax(-1)
        proj = layer.attn.proj
    mixed = values + proj(torch.einsum("bnk,bkc->bnc", attention, values))
    return mixed + layer.mlp(layer.norm2(mixed))


# --- the host -----------------------------------------------------------------------------------


@pytest.fixture(scope="module", params=["t2t_vit_7", "t2t_vit_t_14"])
def small(request):
    return tiny.model(request.param)


def test_the_open_attention_path_equals_the_fused_one(small):
    images = torch.from_numpy(tiny.images(2))
    host = models.host_of(small)
    plain = initial_state(images, 36)
    bias = key_bias(torch.linspace(-2, 2, 2 * 37).reshape(2, 37))
    with torch.inference_mode():
        tokens = host.embed(images)
        for state in (plain, type(plain)(plain.positions, bias=bias)):
            for block in host.blocks:
                attention = host.attention(block, tokens, state)
                opened = host.finish(block, tokens, attention.probabilities @ attention.values)
                torch.testing.assert_close(opened, host.mix(block, tokens, state), atol=1e-5, rtol=1e-5)
        block = host.blocks[0]
        assert (host.mix(block, tokens, plain) - host.mix(block, tokens, state)).abs().max() > 1e-2
        torch.testing.assert_close(block(tokens), host.transform(block, host.mix(block, tokens, plain)))


def test_a_masked_token_counts_for_nothing(small):
    images = torch.from_numpy(tiny.images(2))
    host = models.host_of(small)
    state = initial_state(images, 36)
    bias = key_bias(torch.cat([torch.zeros(2, 36), torch.full((2, 1), MASKED)], dim=1))
    with torch.inference_mode():
        tokens = host.embed(images)
        masked = host.mix(host.blocks[0], tokens, type(state)(state.positions, bias=bias))
        without = host.mix(host.blocks[0], tokens[:, :-1], state)
    torch.testing.assert_close(masked[:, :-1], without, atol=1e-5, rtol=1e-5)


def test_zero_tprune_prunes_it(small):
    plan = ztp.make_plan(small, ratio=0.7)
    assert plan.counts == [25, 17, 11]
    pruned = ztp.prune(small, plan)
    images = torch.from_numpy(tiny.images(3))
    assert logits_of(pruned, images).shape == (3, 10)
    assert [trace.kept.shape for trace in ztp.trace_tokens(pruned, images)] == [(3, 25), (3, 17), (3, 11)]
    dense = ztp.prune(small, ztp.make_plan(small, "dense"))
    torch.testing.assert_close(logits_of(dense, images), logits_of(small, images), atol=1e-6, rtol=1e-5)
    assert (logits_of(pruned, images) - logits_of(small, images)).abs().max() > 1e-2


# --- exports ------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def wide():
    """A small T2T-ViT whose performers span many orders of magnitude, so that the epsilon and precision matter."""
    state = tiny.model("t2t_vit_7").state_dict()
    for name in state:
        if ".kqv." in name:
            state[name][:128] *= 2.7
    return ztp.load_model("t2t_vit_7", weights=state, overrides=tiny.SIZE)


@pytest.fixture(scope="module")
def pruned(wide):
    return ztp.prune(wide, ztp.make_plan(wide, ratio=0.7, options={"rounds": 2}))


@pytest.fixture(scope="module")
def artifact(pruned, tmp_path_factory):
    return ztp.export(pruned, "onnx", tmp_path_factory.mktemp("t2t") / "onnx")


def assert_gate(artifact, model, directory):
    engine = ztp.build(artifact, "onnxruntime", device="cpu", batch=(1, 4, 8), directory=directory)
    report = ztp.check_parity(engine, model, tiny.images(5))
    assert report.require().passed


def test_the_onnx_graph_keeps_the_vocabulary_and_passes_the_gate(artifact, wide, tmp_path, monkeypatch):
    graph = onnx.load(str(artifact.directory / "model.onnx"))
    assert vocabulary.lint(graph, artifact.manifest.plan) == []
    assert_gate(artifact, wide, tmp_path / "engine")
    # The gate would have seen a performer without its epsilon, which torch's optimiser drops where it is a bare 1e-8.
    images = torch.from_numpy(tiny.images(5))
    right = logits_of(wide, images)
    monkeypatch.setattr(t2t_modules, "EPSILON", 0.0)
    assert (logits_of(wide, images) - right).abs().max() > 0.05


def test_the_transformer_variant_passes_the_gate(tmp_path):
    model = tiny.model("t2t_vit_t_14")
    pruned = ztp.prune(model, ztp.make_plan(model, ratio=0.7, options={"rounds": 2}))
    assert_gate(ztp.export(pruned, "onnx", tmp_path / "onnx"), model, tmp_path / "engine")


def test_it_traces_as_torchscript_and_torch_export_with_a_dynamic_batch(pruned, tmp_path):
    script = ztp.export(pruned, "torchscript", tmp_path / "torchscript")
    program = ztp.export(pruned, "torch_export", tmp_path / "torch_export")
    runs = [
        torch.jit.load(str(script.directory / "model.ts")),
        torch_export.read(program.directory / torch_export.GRAPH_FILE).module(),
    ]
    for count in (1, 3):
        images = torch.from_numpy(tiny.images(count))
        for run in runs:
            with torch.no_grad():
                torch.testing.assert_close(run(images)[0], logits_of(pruned, images), atol=1e-5, rtol=1e-4)


def distance(logits, kept, pruned, images):
    """Largest logit difference in σ, eager keeping the same tokens."""
    with torch.inference_mode():
        expected = pruned.run(images, kept).logits
    return ((logits - expected).abs().amax(1) / expected.std(1)).max().item()


def test_half_precision_leaves_the_performers_kernel_in_float32(artifact, pruned, tmp_path, monkeypatch):
    images = torch.from_numpy(tiny.images(4))

    def fp16(directory):
        half = exporters.convert(artifact, "fp16", directory)
        session = onnxruntime.InferenceSession(str(half.directory / "model.onnx"), providers=["CPUExecutionProvider"])
        logits, *kept = map(torch.from_numpy, session.run(list(half.manifest.outputs), {"images": images.numpy()}))
        return distance(logits, kept, pruned, images)

    assert fp16(tmp_path / "kept") < 0.01
    with torch.inference_mode():
        lowered = lower(InferenceGraph(pruned, "float32"), "fp16")
        logits, *kept = lowered(images)
    assert distance(logits, kept, pruned, images) < 0.01
    monkeypatch.setattr(precision._Lowering, "_exponentials", lambda self: set())
    assert fp16(tmp_path / "lowered") > 0.015


# --- names, sizes, refusals ---------------------------------------------------------------------


def test_the_source_says_what_the_model_is():
    source = ztp.load_model("t2t_vit_7", weights="random").source
    assert (source.family, source.architecture) == ("t2t_vit", "t2t_vit_7")
    assert source.preprocessing.model_dump() == {
        "input_size": (3, 224, 224),
        "interpolation": "bicubic",
        "mean": (0.485, 0.456, 0.406),
        "std": (0.229, 0.224, 0.225),
        "crop_pct": 0.9,
        "crop_mode": "center",
    }
    assert source.labels is not None
    assert source.labels[0].startswith("tench")
    assert tiny.model("t2t_vit_7").source.labels is None


def test_sizes_can_be_overridden():
    size = ModelSize(img_size=64, patch_size=16, embed_dim=24, depth=2, num_heads=3, mlp_ratio=1.5, num_classes=5)
    name, geometry = models.describe("t2t_vit_t_14", size)
    assert name == "t2t_vit_t_14"
    assert (geometry.patch_tokens, geometry.depth, geometry.num_heads, geometry.num_classes) == (16, 2, 3, 5)
    assert geometry.mlp_macs_per_token == 2 * 24 * 36
    model = ztp.load_model("t2t_vit_t_14", weights="random", overrides=size)
    assert logits_of(model, torch.from_numpy(tiny.images(1, 64))).shape == (1, 5)
    assert models.reload_model(model.source).source == model.source


def test_official_positions_are_sinusoids():
    positions = models.family("t2t_vit").build("t2t_vit_7", ModelSize()).pos_embed
    assert positions.shape == (1, 197, 256)
    assert positions[0, 0].tolist() == [0.0, 1.0] * 128
    assert positions[0, 7, 4].item() == pytest.approx(np.sin(7 / 10000 ** (4 / 256)), abs=1e-6)
    assert positions[0, 7, 5].item() == pytest.approx(np.cos(7 / 10000 ** (4 / 256)), abs=1e-6)


def test_random_performers_attend(monkeypatch):
    """Drawn like any other layer, their keys would be so long that nothing but the epsilon were left."""
    module = tiny.model("t2t_vit_7").tokens_to_token
    assert module.attention1.w.norm(dim=1).mean().item() == pytest.approx(32**0.5, rel=0.1)
    images = torch.from_numpy(tiny.images(2))
    with_epsilon = logits_of(module, images)
    monkeypatch.setattr(t2t_modules, "EPSILON", 0.0)
    torch.testing.assert_close(logits_of(module, images), with_epsilon, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(
    "size, message",
    [
        ({"patch_size": 8}, "patch_size=8"),
        ({"img_size": 100}, "img_size=100"),
        ({"embed_dim": 250}, "num_heads=4"),
        ({"mlp_ratio": 0.001}, "mlp_ratio=0.001"),
    ],
)
def test_sizes_that_do_not_fit_are_refused(size, message):
    with pytest.raises(BadRequest, match=message):
        ztp.load_model("t2t_vit_7", weights="random", overrides=ModelSize(**size))


def test_pretrained_weights_say_where_they_come_from():
    with pytest.raises(MissingSoftware, match=r"yitu-opensource/T2T-ViT.*--weights path"):
        ztp.load_model("t2t_vit_14", weights="pretrained")
    with pytest.warns(models.RandomWeightsWarning, match="yitu-opensource/T2T-ViT"):
        ztp.load_model("t2t_vit_7")


def test_checkpoints_of_another_token_module_are_refused_with_their_keys():
    state = golden.state_dict("t2t_vit_7")
    del state["tokens_to_token.attention2.w"]
    with pytest.raises(BadRequest, match=r"missing: tokens_to_token\.attention2\.w"):
        official("t2t_vit_7", state)
    with pytest.raises(BadRequest, match=r"unexpected: .*tokens_to_token\.attention1\.kqv"):
        ztp.load_model("t2t_vit_t_14", weights=golden.state_dict("t2t_vit_7"))


def test_an_official_file_loads_from_its_container(tmp_path):
    state = {f"module.{name}": value for name, value in golden.state_dict("t2t_vit_7").items()}
    torch.save({"epoch": 309, "state_dict_ema": state}, tmp_path / "71.7_T2T_ViT_7.pth.tar")
    model = ztp.load_model("t2t_vit_7", weights=tmp_path / "71.7_T2T_ViT_7.pth.tar")
    assert model.state_dict().keys() == golden.CASES["t2t_vit_7"]["state_dict"].keys()
    assert model.source.weights.kind == "file"


class _OtherModel(T2TViT):
    pass


class _OtherBlock(Block):
    pass


def test_modules_that_the_host_would_not_follow_are_refused():
    assert isinstance(models.host_of(ztp.load_model(tiny.model("t2t_vit_7"))), T2TVitHost)
    with pytest.raises(BadRequest, match="changes parts"):
        models.host_of(_OtherModel(tiny.model("t2t_vit_7").size))
    other = tiny.model("t2t_vit_7")
    other.blocks[1] = _OtherBlock(48, 3, 96)
    with pytest.raises(BadRequest, match="changes parts"):
        models.host_of(other)
    with pytest.raises(BadRequest, match="float32"):
        models.host_of(tiny.model("t2t_vit_7").half())
    hooked = tiny.model("t2t_vit_7")
    hooked.blocks[0].register_forward_hook(lambda module, inputs, output: output)
    with pytest.raises(BadRequest, match="hooks"):
        models.host_of(hooked)
