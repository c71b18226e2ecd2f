"""The pruned module: exact where nothing is pruned, fixed counts, the caller's model untouched."""

from __future__ import annotations

import copy

import pytest
import timm
import torch

import ztp_deploy as ztp
from tests import tiny
from ztp_deploy import methods
from ztp_deploy.errors import BadRequest
from ztp_deploy.methods.slice import twin_of
from ztp_deploy.plan import Plan
from ztp_deploy.planning import make_plan
from ztp_deploy.pruning.prune import prune


def test_the_dense_plan_is_the_model_itself(model):
    images = torch.from_numpy(tiny.images(3))
    with torch.inference_mode():
        assert torch.equal(prune(model, make_plan(model, "dense"))(images), model(images))


def test_counts_are_those_of_the_plan(pruned):
    with torch.inference_mode():
        outputs = pruned.run(torch.from_numpy(tiny.images(3)))
    assert [tuple(kept.shape) for kept in outputs.kept] == [(3, 25), (3, 17), (3, 11)]
    assert all(kept.dtype == torch.int32 for kept in outputs.kept)
    for earlier, later in zip(outputs.kept, outputs.kept[1:], strict=False):
        for image in range(3):
            assert set(later[image].tolist()) < set(earlier[image].tolist())


def test_dropping_before_the_mlp_changes_nothing(model):
    """The reference runs whole blocks and drops afterwards, as the paper draws it."""
    plan = make_plan(model, ratio=0.6)
    pruned = prune(model, plan)
    images = torch.from_numpy(tiny.images(2))
    host = pruned.host
    with torch.inference_mode():
        outputs = pruned.run(images)
        tokens = host.embed(images)
        slots = torch.arange(36).expand(2, -1)
        for number, block in enumerate(host.blocks, start=1):
            tokens = block(tokens)
            stages = [index for index, stage in enumerate(plan.stages) if stage.block == number]
            if not stages:
                continue
            kept = outputs.kept[stages[0]].long()
            index = torch.stack([(slots[i][None] == kept[i][:, None]).int().argmax(1) for i in range(2)])
            patches = torch.stack([tokens[i, 1:][index[i]] for i in range(2)])
            tokens, slots = torch.cat([tokens[:, :1], patches], 1), kept
        expected = host.read_out(tokens, None)
    torch.testing.assert_close(outputs.logits, expected, rtol=1e-5, atol=1e-5)


def test_an_image_does_not_see_its_batch(pruned):
    images = torch.from_numpy(tiny.images(4))
    with torch.inference_mode():
        together = pruned(images)
        alone = torch.cat([pruned(image[None]) for image in images])
    torch.testing.assert_close(together, alone, rtol=1e-4, atol=1e-5)


def test_the_callers_model_is_untouched(model):
    before = copy.deepcopy(model.state_dict())
    grads = [parameter.requires_grad for parameter in model.parameters()]
    pruned = prune(model, make_plan(model, ratio=0.7))
    with torch.no_grad():
        next(pruned.model.parameters()).add_(1)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert [parameter.requires_grad for parameter in model.parameters()] == grads
    assert all("hook" not in name or not hooks for name, hooks in vars(model).items() if name.endswith("hooks"))


def test_source_and_plan_travel_with_the_module(pruned, model):
    assert pruned.source == model.source
    assert pruned.plan.counts == [25, 17, 11]
    clone = copy.deepcopy(pruned)
    images = torch.from_numpy(tiny.images(1))
    with torch.inference_mode():
        assert torch.equal(clone(images), pruned(images))


def test_the_slice_twin_cuts_the_last_tokens(model):
    twin = prune(model, twin_of(make_plan(model, ratio=0.7)))
    with torch.inference_mode():
        kept = twin.run(torch.from_numpy(tiny.images(2))).kept
    assert kept[2].tolist() == [list(range(11))] * 2


def test_plans_that_do_not_fit_are_refused_with_the_reason(model):
    with pytest.raises(BadRequest, match="image size: 224 in the plan, 96 in the model"):
        prune(model, make_plan("deit_t", ratio=0.7))
    deep = make_plan(model, ratio=0.7)
    stage = deep.stages[-1].model_copy(update={"block": 9})
    with pytest.raises(BadRequest, match=r"blocks \[9\], but the model has 4"):
        prune(model, deep.model_copy(update={"stages": (*deep.stages[:2], stage)}))
    text = deep.to_json().replace('"after_block"', '"before_block"')
    with pytest.raises(BadRequest, match="acts at after_block"):
        prune(model, Plan.from_json(text))


def test_an_own_timm_module_needs_no_name():
    own = timm.create_model(
        "vit_tiny_patch16_224", img_size=64, embed_dim=48, depth=4, num_heads=3, num_classes=7, global_pool="avg"
    )
    loaded = ztp.load_model(own)
    assert loaded is not own
    assert loaded.source.weights.kind == "given"
    pruned = prune(loaded, make_plan(loaded, ratio=0.5))
    with torch.inference_mode():
        assert pruned(torch.zeros(2, 3, 64, 64)).shape == (2, 7)


def test_stages_edited_by_hand_are_refused(model):
    other = {"similar": 1, "rounds": 1, "partition": 1}  # than the plan's options say
    for static in ({}, {"similar": 99, "rounds": 1}, {"similar": 1, "rounds": 0}, other):
        text = make_plan(model, ratio=0.7)
        stage = text.stages[0].model_copy(update={"static": static})
        with pytest.raises(BadRequest, match="fixed numbers"):
            prune(model, text.model_copy(update={"stages": (stage, *text.stages[1:])}))


def test_other_modules_are_refused():
    with pytest.raises(BadRequest, match="Linear"):
        prune(torch.nn.Linear(1, 1), make_plan("deit_t", ratio=0.7))
    with pytest.raises(BadRequest, match="str and NoneType"):
        prune("deit_t", None)


class _Changed(timm.models.vision_transformer.VisionTransformer):
    def forward_features(self, x, **more):
        return super().forward_features(x, **more) * 2


def small(kind=timm.models.vision_transformer.VisionTransformer, **changes):
    sizes = {"img_size": 32, "embed_dim": 24, "depth": 2, "num_heads": 3, "num_classes": 5}
    return kind(**(sizes | changes))


@pytest.mark.parametrize(
    "build, reason",
    [
        (lambda: small(_Changed), "changes would be lost"),
        (lambda: small(in_chans=1), "1 channels"),
        (lambda: small().half(), "not float32"),
        (lambda: small(num_classes=0), "no classifier"),
        (lambda: small(dynamic_img_size=True), "token count"),
        (lambda: timm.create_model("vit_tiny_r_s16_p8_224"), "stem"),
        (lambda: _hooked(), "hooks"),
    ],
)
def test_modules_whose_behaviour_would_be_lost_are_refused(build, reason):
    with pytest.raises(BadRequest, match=reason):
        ztp.load_model(build())


def _hooked():
    model = small()
    model.blocks[0].register_forward_hook(lambda *arguments: None)
    return model


@pytest.mark.parametrize("method", methods.METHODS)
def test_everything_is_where_the_model_is(method):
    """On a device that is not the CPU: one tensor that stays behind fails the run."""
    model = tiny.model().to("meta")
    plan = make_plan(model, method, ratio=0.7, options=tiny.OPTIONS.get(method, {}))
    pruned = prune(model, plan)
    assert {value.device.type for value in (*pruned.parameters(), *pruned.buffers())} == {"meta"}
    images = torch.empty(2, 3, 96, 96, device="meta")
    outputs = pruned.run(images)
    assert {value.device.type for value in (outputs.logits, *outputs.kept, *outputs.merged)} == {"meta"}
    assert outputs.logits.shape == (2, 10)
