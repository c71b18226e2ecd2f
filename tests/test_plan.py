"""Plans: counts, FLOPs, JSON, refusals."""

from __future__ import annotations

import json

import numpy as np
import pytest

from tests import tiny
from ztp_deploy.errors import BadRequest
from ztp_deploy.methods.slice import twin_of
from ztp_deploy.models import describe
from ztp_deploy.plan import Plan, Stage, count_flops, default_sites, share_of
from ztp_deploy.planning import make_plan


@pytest.mark.parametrize(
    "name, published",
    [("deit_t", 0.963), ("deit_s", 3.555), ("deit_b", 13.628)],
)
def test_published_flops_of_the_paper_schedule(name, published):
    plan = make_plan(name, keep=[0.9, 0.8, 0.7], sites=[3, 6, 9])
    assert plan.counts == [176, 140, 98]
    assert plan.flops.planned / 1e9 == pytest.approx(published, rel=0.005)


@pytest.mark.parametrize("name, published", [("deit_s", 4.60), ("deit_b", 17.58)])
def test_published_dense_flops(name, published):
    assert make_plan(name, "dense").flops.dense / 1e9 == pytest.approx(published, rel=0.005)


def test_ratio_on_deit_s():
    plan = make_plan("deit_s", ratio=0.7)
    assert [stage.block for stage in plan.stages] == [3, 6, 9]
    assert plan.counts == [137, 95, 66]
    assert [stage.static for stage in plan.stages] == [
        {"similar": 29, "rounds": 1},
        {"similar": 21, "rounds": 1},
        {"similar": 14, "rounds": 1},
    ]
    assert plan.flops.planned / 1e9 == pytest.approx(2.87, abs=0.005)
    assert plan.flops.share == pytest.approx(0.623, abs=0.0005)
    assert plan.label == "zero_tprune-0.7"
    assert plan.special_tokens == 1


def test_executed_flops_leave_the_mlp_of_dropped_tokens_out():
    _, geometry = describe("deit_s")
    plan = make_plan("deit_s", ratio=0.7)
    dropped = sum(stage.tokens_in - stage.tokens_out for stage in plan.stages)
    assert plan.flops.planned - plan.flops.executed == dropped * geometry.mlp_macs_per_token == dropped * 8 * 384**2


def test_flops_of_each_place():
    """A stage at block 2 of DeiT-T that keeps 98 of 196 tokens, counted by hand."""
    _, geometry = describe("deit_t")
    width, full, half = 192, 197, 99
    block = lambda n: 12 * n * width**2 + 2 * n * n * width  # noqa: E731
    ends = geometry.embed_macs + geometry.head_macs

    def planned(place):
        return count_flops(geometry, [Stage(block=2, place=place, tokens_in=196, tokens_out=98)]).planned - ends

    later = 10 * block(half)
    assert planned("after_block") == 2 * block(full) + later
    assert planned("before_block") == block(full) + 11 * block(half)
    attention = 4 * full * width**2 + 2 * full**2 * width
    assert planned("after_attention") == block(full) + attention + 8 * half * width**2 + later
    rows = 2 * (full + half) * width**2 + 2 * full * half * width
    assert planned("attention_rows") == block(full) + rows + 8 * half * width**2 + later


def test_distilled_models_have_two_special_tokens_and_two_heads():
    plain, distilled = make_plan("deit_t", ratio=0.7), make_plan("deit_t_distilled", ratio=0.7)
    assert (plain.special_tokens, distilled.special_tokens) == (1, 2)
    assert distilled.counts == plain.counts
    assert distilled.flops.dense > plain.flops.dense


def test_larger_images_have_more_tokens():
    plan = make_plan("augreg_vit_s_384", ratio=0.7)
    assert (plan.image_size, plan.patch_tokens, plan.counts) == (384, 576, [403, 282, 197])


def test_flop_share_is_nearest():
    plan = make_plan("deit_s", flops=0.653)
    assert plan.flops.share == pytest.approx(0.653, rel=0.005)
    # Every schedule that some ratio gives is at least as far away.
    best = abs(plan.flops.share - 0.653)
    others = [make_plan("deit_s", ratio=0.7 + step / 1000).flops.share for step in range(60)]
    assert best <= min(abs(share - 0.653) for share in others) + 1e-12


def test_unreachable_flop_share_is_refused_with_the_nearest():
    with pytest.raises(BadRequest, match=r"nearest is 0\.\d+"):
        make_plan("deit_s", flops=0.05)


def test_counts_follow_the_decimal_not_the_binary_number():
    assert share_of(0.29, 100) == 29  # 0.29 · 100 is 28.999… in binary
    assert share_of(0.7, 10) == 7
    assert share_of(0.001, 10) == 1


@pytest.mark.parametrize("depth, stages, sites", [(12, 3, [3, 6, 9]), (24, 3, [6, 12, 18]), (12, 1, [6]), (2, 3, [1])])
def test_default_sites(depth, stages, sites):
    assert default_sites(depth, stages) == sites


def test_ratio_one_is_the_dense_model():
    assert make_plan("deit_t", ratio=1.0) == make_plan("deit_t", "dense")
    assert make_plan("deit_t", "dense").label == "dense"


def test_explicit_counts_and_sites():
    plan = make_plan("deit_t", keep=[100, 0.5], sites=[4, 8])
    assert plan.counts == [100, 50]
    assert plan.label.startswith("zero_tprune-100-50-")
    assert plan.label != make_plan("deit_t", keep=[100, 0.5], sites=[4, 9]).label


def test_labels_tell_plans_apart():
    one, two = make_plan("deit_t", ratio=0.35714285), make_plan("deit_t", ratio=0.35714286)
    assert one.counts != two.counts
    assert one.label != two.label


def test_numbers_of_numpy_are_numbers():
    assert make_plan("deit_t", ratio=np.float64(0.7)) == make_plan("deit_t", ratio=0.7)
    assert make_plan("deit_t", keep=list(np.array([100, 50, 20]))).counts == [100, 50, 20]


def test_json_round_trip():
    plan = make_plan("deit_s", ratio=0.7, options={"rounds": [30, 8, 1]})
    assert Plan.from_json(plan.to_json()) == plan
    fields = json.loads(plan.to_json())
    assert fields["schema"] == "ztp.plan/1"
    assert set(fields) == {
        *("schema", "model", "method", "options", "asked", "image_size", "special_tokens", "patch_tokens"),
        *("stages", "flops"),
    }
    assert fields["stages"][0] == {
        "block": 3,
        "place": "after_block",
        "tokens_in": 196,
        "tokens_out": 137,
        "static": {"similar": 29, "rounds": 30},
    }


@pytest.mark.parametrize(
    "change, message",
    [
        (lambda p: p["stages"][1].update(tokens_in=100), "expects 100 tokens but 137 reach it"),
        (lambda p: p["stages"][2].update(tokens_out=200), "grows from 95 to 200"),
        (lambda p: p["stages"][1].update(block=3), "block order"),
        (lambda p: p.update(schema="ztp.plan/9"), "schema"),
        (lambda p: p.pop("flops"), "flops"),
        (lambda p: p.update(colour="red"), "colour"),
        (lambda p: p.update(model="../../evil"), "model"),
        (lambda p: p["stages"][0]["static"].update(rounds=-1), "static"),
        (lambda p: p["flops"].update(executed=0), "executed"),
        (lambda p: p.update(method="dense"), "no stages"),
        (lambda p: p.update(asked={}), "neither ratio"),
        (lambda p: p.update(asked={"ratio": "../x"}), "not a number"),
    ],
)
def test_broken_plan_files_are_refused(change, message):
    fields = json.loads(make_plan("deit_s", ratio=0.7).to_json())
    change(fields)
    with pytest.raises(BadRequest, match=message):
        Plan.from_json(json.dumps(fields))


@pytest.mark.parametrize("ratio", [0, -0.1, 1.01, float("nan"), float("inf"), True, "0.7"])
def test_ratio_outside_is_refused(ratio):
    with pytest.raises(BadRequest, match=r"outside \(0, 1\]"):
        make_plan("deit_t", ratio=ratio)


@pytest.mark.parametrize(
    "request_, message",
    [
        ({}, "exactly one"),
        ({"ratio": 0.7, "flops": 0.7}, "exactly one"),
        ({"keep": [100, 120, 50]}, "grows"),
        ({"keep": [197]}, "the model has 196 patches"),
        ({"keep": [0, 0, 0]}, "holds 0"),
        ({"keep": [1.5, 0.5, 0.5]}, "holds 1.5.*Counts are whole numbers"),
        ({"keep": "137,95,66"}, r"keep='137,95,66' is not a list.*keep=\[137, 95, 66\]"),
        ({"keep": 137}, "keep=137 is not a list"),
        ({"ratio": 0.7, "sites": 3}, "sites=3 is not a list"),
        ({"ratio": 0.7, "method": None}, "no method None.*There are: .*tome.*dense"),
        ({"ratio": 0.7, "method": "xyz"}, "no method 'xyz'.*There are: .*tome.*dense"),
        ({"ratio": 0.7, "options": "x"}, "options='x' are not options"),
        ({"keep": [100, 50], "sites": [3, 6, 9]}, "2 entries for 3 sites"),
        ({"ratio": 0.7, "sites": [9, 3]}, "must rise"),
        ({"ratio": 0.7, "sites": [0]}, "not there"),
        ({"ratio": 0.7, "sites": [13]}, "not there"),
        ({"ratio": 0.7, "method": "dense"}, "prunes nothing"),
        ({"sites": [3], "method": "dense"}, "prunes nothing"),
        ({"keep": [9] * 12}, "no default sites"),
        ({"keep": []}, "no default sites"),
        ({"ratio": 0.7, "method": "zero_prune"}, "zero_tprune"),
    ],
)
def test_requests_that_cannot_be_met(request_, message):
    with pytest.raises(BadRequest, match=message):
        make_plan("deit_t", **request_)


def test_the_slice_twin_has_the_same_counts_and_flops():
    plan = make_plan("deit_s", flops=0.653)
    twin = twin_of(plan)
    assert (twin.counts, twin.flops) == (plan.counts, plan.flops)
    assert twin.method == "slice"
    assert all(not stage.static for stage in twin.stages)


def test_a_module_and_its_name_give_the_same_plan(model):
    by_module = make_plan(model, ratio=0.7)
    assert by_module.model == "deit_t"
    assert (by_module.patch_tokens, by_module.counts) == (36, [25, 17, 11])
    assert describe("deit_t", tiny.SIZE)[1] == describe(model)[1]
