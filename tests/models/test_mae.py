"""MAE: the golden numbers, the mean over what survives, and where weights come from."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

import ztp_deploy as ztp
from tests import golden, tiny
from tests.models import readings
from tests.runs import Listening
from ztp_deploy import models
from ztp_deploy.errors import BadRequest, MissingSoftware
from ztp_deploy.models.mae import NAMES
from ztp_deploy.pruning.tokens import TokenState, initial_state
from ztp_deploy.source import ModelSize
from ztp_deploy.workflow import steps
from ztp_deploy.workflow.progress import Clock
from ztp_deploy.workflow.requests import ModelRequest

GOLDEN_SIZE = ModelSize(embed_dim=96, depth=6, num_heads=3, num_classes=100)
CASES = ["mae_tiny_gap", "mae_tiny_gap_eps"]


def load(case: str) -> torch.nn.Module:
    return ztp.load_model("mae_vit_b", weights={"model": golden.state_dict(case)}, overrides=GOLDEN_SIZE)


@pytest.mark.parametrize("case", CASES)
def test_the_official_numbers(case):
    readings.assert_reads(case, load(case))


def test_another_epsilon_is_seen():
    readings.assert_another_epsilon_is_seen("mae_tiny_gap_eps", load("mae_tiny_gap_eps"))


@pytest.mark.parametrize(
    "mistake, attribute, value",
    [
        ("mean over all tokens incl. cls", "pool_include_prefix", True),
        ("cls read-out instead of mean", "global_pool", "token"),
    ],
)
def test_another_read_out_is_seen(mistake, attribute, value):
    case = "mae_tiny_gap"
    model = load(case)
    setattr(model, attribute, value)
    assert readings.change(case, model) == pytest.approx(
        golden.CASES[case]["logit_change_under_mistakes"][mistake], rel=0.01
    )
    with pytest.raises(AssertionError):
        readings.assert_reads(case, model)


@pytest.mark.parametrize("name, patches", [*zip(NAMES, (196, 196, 256), strict=True)])
def test_every_name_has_its_shape_and_loads(name, patches):
    _, geometry = models.describe(name)
    assert (geometry.image_size, geometry.patch_tokens) == (224, patches)
    assert (geometry.special_tokens, geometry.num_classes) == (1, 1000)
    small = tiny.model(name, ModelSize(img_size=112, depth=2, embed_dim=48, num_heads=3, num_classes=10))
    assert small.source.family == "mae"
    assert small.source.weights.licence is None  # random weights are nobody's


def test_preprocessing_is_that_of_the_mae_repository():
    small, large = (
        tiny.model("mae_vit_b", ModelSize(img_size=size, depth=1, embed_dim=48, num_heads=3)).source.preprocessing
        for size in (224, 384)
    )
    assert small.mean == (0.485, 0.456, 0.406)
    assert small.interpolation == "bicubic"
    assert (small.crop_pct, large.crop_pct) == (0.875, 1.0)


# --- the mean over what survives ---------------------------------------------------------------


@pytest.fixture(scope="module")
def mae() -> torch.nn.Module:
    return tiny.model("mae_vit_b")


def head(model: torch.nn.Module, mean: torch.Tensor) -> torch.Tensor:
    """fc_norm and classifier over a mean [B, C], written out."""
    norm, linear = model.fc_norm, model.head
    centred = mean - mean.mean(-1, keepdim=True)
    normed = centred / (centred.square().mean(-1, keepdim=True) + 1e-6).sqrt()
    return (normed * norm.weight + norm.bias) @ linear.weight.T + linear.bias


def test_pruned_the_mean_is_over_the_survivors(mae, monkeypatch):
    plan = ztp.make_plan(mae, ratio=0.5, options={"rounds": 2})
    pruned = ztp.prune(mae, plan)
    seen = []
    read_out = pruned.host.read_out
    monkeypatch.setattr(
        pruned.host, "read_out", lambda tokens, state: (seen.append(tokens), read_out(tokens, state))[1]
    )
    with torch.inference_mode():
        logits = pruned(torch.from_numpy(tiny.images(3)))
        (tokens,) = seen
        assert tokens.shape[1] == 1 + plan.counts[-1] < 1 + plan.patch_tokens
        expected = head(mae, tokens[:, 1:].sum(1) / plan.counts[-1])
        torch.testing.assert_close(logits, expected, atol=1e-5, rtol=1e-5)
        with_class = head(mae, tokens.mean(1))
    assert (logits - with_class).abs().max() > 1e-2


@pytest.fixture(scope="module")
def merged() -> tuple[torch.Tensor, TokenState]:
    """Three images of the tiny model's tokens [3, 1 + 5, 48], the patches 36 in number standing in 5 slots."""
    tokens = torch.randn(3, 6, 48, generator=torch.Generator().manual_seed(1))
    state = replace(initial_state(tokens, 5), sizes=torch.tensor([[20.0, 10, 3, 2, 1]]).expand(3, -1))
    return tokens, state


def test_a_weighed_mean_is_over_the_original_patches(mae, merged):
    tokens, state = merged
    host = models.host_of(mae)
    with torch.inference_mode():
        weighed = host.read_out(tokens, replace(state, weigh_mean=True))
        expected = head(mae, (tokens[:, 1:] * state.sizes.unsqueeze(-1)).sum(1) / 36)
        torch.testing.assert_close(weighed, expected, atol=1e-5, rtol=1e-5)
        plain = host.read_out(tokens, state)
        assert torch.equal(plain, mae.forward_head(tokens))
    assert (weighed - plain).abs().max() > 1e-2


def test_masked_tokens_are_not_in_the_mean(mae, merged):
    tokens, state = merged
    alive = torch.tensor([[1.0, 1, 1, 0, 1, 0]]).expand(3, -1)
    with torch.inference_mode():
        found = models.host_of(mae).read_out(tokens, replace(state, alive=alive))
        expected = head(mae, tokens[:, [1, 2, 4]].mean(1))
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)


def test_other_pools_leave_masked_tokens_out(merged):
    tokens, state = merged
    masked = replace(state, alive=torch.tensor([[1.0, 1, 0, 1, 0, 1]] * 3))
    model = tiny.model("deit_t")
    host = models.host_of(model)
    with torch.inference_mode():
        logits = host.read_out(tokens, masked)  # a class token reads no patch
        assert torch.equal(logits, model.forward_head(model.norm(tokens)))
        model.global_pool = "max"
        found = host.read_out(tokens, masked)
        expected = model.head(model.norm(tokens)[:, [1, 3, 5]].amax(1))
        everything = model.head(model.norm(tokens)[:, 1:].amax(1))
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)
    assert (found - everything).abs().max() > 0.01


def test_the_engine_passes_the_gate(mae, tmp_path):
    pruned = ztp.prune(mae, ztp.make_plan(mae, ratio=0.7, options={"rounds": 2}))
    artifact = ztp.export(pruned, "onnx", tmp_path / "artifact")
    engine = ztp.build(artifact, "onnxruntime", device="cpu", directory=tmp_path / "engine")
    assert ztp.check_parity(engine, mae, tiny.images(5)).require().passed


# --- weights -----------------------------------------------------------------------------------


def test_pretrained_weights_are_refused_with_the_place_to_get_them():
    with pytest.raises(MissingSoftware) as refusal:
        ztp.load_model("mae_vit_b", weights="pretrained")
    text = str(refusal.value)
    assert "vit_base_patch16_224.mae are on no hub" in text
    assert "github.com/facebookresearch/mae" in text
    assert "CC-BY-NC-4.0" in text
    assert "--weights path" in text


def test_a_file_carries_the_licence_and_says_so(mae, tmp_path):
    path = tmp_path / "mae_finetuned.pth"
    torch.save({"model": mae.state_dict()}, path)
    own = tmp_path / "own.pth"
    torch.save(tiny.model("deit_t").state_dict(), own)
    monitor = Listening()
    model = steps.load(ModelRequest("mae_vit_b", str(path), tiny.SIZE), Clock(monitor))
    assert model.source.weights.licence == "CC-BY-NC-4.0"
    assert monitor.warned == ["The weights of mae_vit_b are licensed CC-BY-NC-4.0: no commercial use."]
    monitor = Listening()
    model = steps.load(ModelRequest("deit_t", str(own), tiny.SIZE), Clock(monitor))
    assert model.source.weights.licence is None  # a file of one's own; the hub's licence says nothing about it
    assert monitor.warned == []


def test_a_pre_training_checkpoint_is_refused(mae):
    state = {name: value for name, value in mae.state_dict().items() if not name.startswith(("head", "fc_norm"))}
    state["mask_token"] = torch.zeros(1, 1, 32)
    with pytest.raises(BadRequest) as refusal:
        ztp.load_model("mae_vit_b", weights=state, overrides=tiny.SIZE)
    assert "missing: fc_norm.bias, fc_norm.weight, head.bias, head.weight" in str(refusal.value)
    assert "unexpected: mask_token" in str(refusal.value)
