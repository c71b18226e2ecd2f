"""DynamicViT against the official numbers, and where its predictors come from."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch.nn import functional

import ztp_deploy as ztp
from tests import golden, runs, tiny
from ztp_deploy import methods
from ztp_deploy.errors import BadRequest
from ztp_deploy.evidence.selection import differences
from ztp_deploy.exporters.graph import InferenceGraph
from ztp_deploy.exporters.lower import lower
from ztp_deploy.methods import dynamicvit
from ztp_deploy.models import describe, host_of, load_model
from ztp_deploy.planning import make_plan
from ztp_deploy.pruning.prune import prune
from ztp_deploy.source import ModelSize
from ztp_deploy.workflow.requests import PlanRequest

BOUND = 1e-5
WIDTH = 48
KEYS = {
    "in_conv.0.weight": (WIDTH,),
    "in_conv.0.bias": (WIDTH,),
    "in_conv.1.weight": (WIDTH, WIDTH),
    "in_conv.1.bias": (WIDTH,),
    "out_conv.0.weight": (WIDTH // 2, WIDTH),
    "out_conv.0.bias": (WIDTH // 2,),
    "out_conv.2.weight": (WIDTH // 4, WIDTH // 2),
    "out_conv.2.bias": (WIDTH // 4,),
    "out_conv.4.weight": (2, WIDTH // 4),
    "out_conv.4.bias": (2,),
}
"""The official names within `score_predictor.<stage>`."""


def checkpoint(model, stages=3):
    """The model's weights with predictors, as an official checkpoint has them."""
    generator = torch.Generator().manual_seed(1)
    own = {
        f"score_predictor.{stage}.{name}": torch.randn(shape, generator=generator) * 0.3
        for stage in range(stages)
        for name, shape in KEYS.items()
    }
    return {**model.state_dict(), **own}


@pytest.fixture(scope="module")
def trained(model):
    return load_model("deit_t", weights=checkpoint(model), overrides=tiny.SIZE)


@pytest.fixture(scope="module")
def pruned(trained):
    return prune(trained, make_plan(trained, "dynamicvit", ratio=0.6))


# --- the official numbers ----------------------------------------------------------------------


def assert_golden(case, name, size):
    model = load_model(name, weights=golden.state_dict(case), overrides=size)
    pruned = prune(model, make_plan(model, "dynamicvit", ratio=0.7))
    with torch.inference_mode():
        outputs = pruned.run(golden.images(case))
    golden.assert_matches(case, "logits", outputs.logits)
    tokens, leaving = [197], {stage.block: stage.tokens_out + 1 for stage in pruned.plan.stages}
    for block in range(1, host_of(model).geometry.depth + 1):
        tokens.append(leaving.get(block, tokens[-1]))
    golden.assert_matches(case, "token_count", np.array(tokens[1:]))
    entering = torch.arange(196).expand(2, -1)
    for index, kept in enumerate(outputs.kept):
        golden.assert_matches(case, f"keep_patch_{index}", kept.sort(1).values)
        # Theirs is the log-probability of keeping, in raster order.
        scores = torch.full((2, 196), torch.nan)
        scores.scatter_(1, entering, functional.logsigmoid(outputs.scores[index]["log_odds"]))
        golden.assert_matches(case, f"score_patch_{index}", scores)
        entering = kept.long()


SIZE = ModelSize(embed_dim=96, num_heads=3, num_classes=100)


def test_golden():
    assert_golden("dynamicvit_tiny", "deit_t", SIZE)


def test_golden_on_lvvit():
    """The case halves what blocks add (skip_lam 2), as LV-ViT-S does and LV-ViT-T does not."""
    assert_golden("dynamicvit_lvvit_tiny", "lvvit_s", SIZE.model_copy(update={"depth": 8, "mlp_ratio": 3.0}))


plain = dynamicvit.Predictor.forward


def drops(self, patches):
    return -plain(self, patches)


def unshared(self, patches):
    """Every token by itself: nothing of the others' mean."""
    choice = self.out_conv(self.in_conv(patches))
    return choice[..., 0] - choice[..., 1]


def halves_swapped(self, patches):
    shared, own = self.in_conv(patches).chunk(2, dim=-1)
    choice = self.out_conv(torch.cat([own, shared.mean(1, keepdim=True).expand_as(own)], dim=-1))
    return choice[..., 0] - choice[..., 1]


@pytest.mark.parametrize("mistake", [drops, unshared, halves_swapped])
def test_golden_notices_mistakes(mistake, monkeypatch):
    monkeypatch.setattr(dynamicvit.Predictor, "forward", mistake)
    with pytest.raises(AssertionError):
        test_golden()


def test_the_predictor_is_the_published_one():
    """Both halves written out: its own features beside the mean over all tokens."""
    predictor = dynamicvit.Predictor(WIDTH).double()
    assert {name: tuple(value.shape) for name, value in predictor.state_dict().items()} == KEYS
    patches = torch.randn(2, 7, WIDTH, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    own, shared = predictor.in_conv(patches).chunk(2, dim=-1)
    joined = torch.cat([own, shared.sum(1, keepdim=True).expand_as(own) / 7], dim=-1)
    expected = predictor.out_conv(joined).log_softmax(-1)[..., 0]
    torch.testing.assert_close(functional.logsigmoid(predictor(patches)), expected)


def test_tokens_that_are_all_but_certain_to_stay_are_told_apart():
    """Their log-probabilities are all 0 in float32."""
    predictor = dynamicvit.Predictor(WIDTH)
    patches = torch.randn(1, 7, WIDTH, generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        order = predictor(patches).argsort()
        predictor.out_conv[4].bias.copy_(torch.tensor([30.0, 0.0]))
        odds = predictor(patches)
        assert torch.stack([odds, torch.zeros(1, 7)]).log_softmax(0)[0].tolist() == [[0.0] * 7]
    assert odds.argsort().tolist() == order.tolist()
    assert odds.unique().numel() == 7


# --- counts and weights ------------------------------------------------------------------------


@pytest.mark.parametrize("ratio, counts", [(0.7, [137, 96, 67]), (0.9, [176, 158, 142]), (0.5, [98, 49, 24])])
def test_counts_are_powers_of_the_ratio(ratio, counts):
    plan = make_plan("deit_s", "dynamicvit", ratio=ratio)
    assert plan.counts == counts
    assert [(stage.block, stage.place) for stage in plan.stages] == [(b, "before_block") for b in (4, 7, 10)]
    assert [stage.static for stage in plan.stages] == [{"predictor": index} for index in range(3)]


def test_a_stage_that_keeps_all_leaves_its_predictor_unused():
    plan = make_plan("deit_s", "dynamicvit", keep=[196, 100, 50])
    assert [(stage.block, stage.static) for stage in plan.stages] == [(7, {"predictor": 1}), (10, {"predictor": 2})]


def test_flops_leave_the_predictors_out():
    _, geometry = describe("deit_t")
    plan = make_plan("deit_t", "dynamicvit", keep=[98], sites=[2])
    block = lambda n: 12 * n * 192**2 + 2 * n * n * 192  # noqa: E731
    assert (
        plan.flops.planned
        == plan.flops.executed
        == geometry.embed_macs + geometry.head_macs + block(197) + 11 * block(99)
    )


def test_the_checkpoints_own_predictors_are_used(trained, pruned, model):
    assert trained.method_weights["dynamicvit"].keys() == checkpoint(model).keys() - model.state_dict().keys()
    assert methods.untrained(pruned.plan) is None
    for index, stage in enumerate(pruned.stages.values()):
        for name, value in stage.predictor.state_dict().items():
            assert torch.equal(value, trained.method_weights["dynamicvit"][f"score_predictor.{index}.{name}"])
        assert not any(parameter.requires_grad for parameter in stage.parameters())


def test_weights_without_predictors_are_refused_with_what_to_do(model):
    plan = make_plan(model, "dynamicvit", ratio=0.6)
    with pytest.raises(
        BadRequest, match=r"trained together with the backbone.*these weights have none.*weights=random"
    ):
        prune(model, plan)


def test_predictors_that_do_not_fit_are_listed(model):
    state = checkpoint(model, stages=2)
    del state["score_predictor.1.out_conv.2.bias"]
    state["score_predictor.1.in_conv.0.weight"] = torch.ones(7)
    state["score_predictor.1.gate.weight"] = torch.ones(7)
    broken = load_model("deit_t", weights=state, overrides=tiny.SIZE)
    with pytest.raises(BadRequest) as refused:
        prune(broken, make_plan(broken, "dynamicvit", ratio=0.6))
    assert "block 3" in refused.value.problem
    assert "missing: score_predictor.1.out_conv.2.bias" in refused.value.problem
    assert "unexpected: score_predictor.1.gate.weight" in refused.value.problem
    assert "misshapen: score_predictor.1.in_conv.0.weight (7,) instead of (48,)" in refused.value.problem
    third = load_model("deit_t", weights=checkpoint(model, stages=2), overrides=tiny.SIZE)
    with pytest.raises(BadRequest, match=r"block 4. missing: score_predictor.2.in_conv.0.bias"):
        prune(third, make_plan(third, "dynamicvit", ratio=0.6))


def test_random_predictors_are_seeded_and_say_what_they_are_worth(model):
    plan = make_plan(model, "dynamicvit", ratio=0.6, options={"weights": "random"})
    assert methods.untrained(plan) == "DynamicViT's predictors are random, as asked."
    one, two = (prune(model, plan) for _ in range(2))
    states = [stage.predictor.state_dict() for stage in one.stages.values()]
    assert all(torch.equal(value, two.stages.state_dict()[name]) for name, value in one.stages.state_dict().items())
    assert not torch.equal(states[0]["in_conv.1.weight"], states[1]["in_conv.1.weight"])
    with torch.inference_mode():
        score = one.run(torch.from_numpy(tiny.images(2))).scores[0]["log_odds"]
    assert score.std() > 0.05  # the choice is none between equals
    with pytest.raises(BadRequest, match="weights"):
        make_plan(model, "dynamicvit", ratio=0.6, options={"weights": "drawn"})


@pytest.mark.parametrize("weights", ["auto", "pretrained", "random"])
def test_a_request_is_refused_before_weights_are_loaded(weights, tmp_path):
    request = PlanRequest(model="deit_s", method="dynamicvit", ratio=0.7, weights=weights)
    assert request.plan("deit_s").counts == [137, 96, 67]
    with pytest.raises(BadRequest, match="these weights have none"):
        request.check()
    PlanRequest(model="deit_s", method="dynamicvit", ratio=0.7, weights=weights, options={"weights": "random"}).check()
    PlanRequest(
        model="deit_s", method="dynamicvit", ratio=0.7, weights=str(tmp_path / "finetuned.pth")
    ).check()  # may hold some


def test_plans_edited_by_hand_are_refused(trained):
    plan = make_plan(trained, "dynamicvit", keep=[18], sites=[2])
    for static in ({}, {"predictor": 0, "rounds": 1}):
        stage = plan.stages[0].model_copy(update={"static": static})
        with pytest.raises(BadRequest, match="fixed numbers"):
            prune(trained, plan.model_copy(update={"stages": (stage,)}))


@pytest.mark.parametrize("precision", ["fp16", "bf16"])
def test_predictors_compute_in_float32_whatever_the_tokens_are_in(pruned, precision):
    graph = lower(InferenceGraph(pruned, "float32"), precision)
    assert {parameter.dtype for parameter in graph.pruned.stages.parameters()} == {torch.float32}
    assert graph.pruned.model.blocks[0].attn.qkv.weight.dtype == graph.low != torch.float32
    with torch.inference_mode():
        values = dict(zip((*graph.output_names, *graph.audit_names), graph.audited(graph.example(2)), strict=True))
        expected = InferenceGraph(pruned, "float32").audited(graph.example(2))
    assert values["log_odds_1"].dtype == torch.float32
    torch.testing.assert_close(values["log_odds_1"], expected[4], rtol=0.05, atol=0.1)
    assert not torch.equal(values["log_odds_1"], expected[4])


# --- selection parity --------------------------------------------------------------------------


def test_dropped_patches_are_traced(pruned):
    for trace, count in zip(
        ztp.trace_tokens(pruned, torch.from_numpy(tiny.images(2))), pruned.plan.counts, strict=True
    ):
        assert trace.kept.shape == (2, count)
        assert (trace.assignment >= 0).sum(1).tolist() == [count, count]


def test_forced_runs_reproduce(pruned):
    runs.assert_forced_runs_reproduce(pruned)


@pytest.fixture(scope="module")
def setting(trained):
    """One image's honest run of one stage, with its plan and geometry and the two tokens at the cut."""
    plan = make_plan(trained, "dynamicvit", keep=[20], sites=[2])
    observation = runs.observe(prune(trained, plan), tiny.images(1))
    order = np.argsort(-observation.scores["log_odds_1"][0], kind="stable")
    return observation, plan, host_of(trained).geometry, int(order[19]), int(order[20])


def test_other_tokens_from_the_right_scores_is_a_selection_fault(setting):
    observation, plan, geometry, inside, outside = setting
    assert differences(observation, observation, observation, plan, geometry, BOUND) == []
    candidate = runs.copy_of(observation)
    runs.exchange(candidate, inside, outside)
    [found] = differences(observation, candidate, candidate, plan, geometry, BOUND)
    assert (found.cause, found.decision, found.tokens) == ("selection", "log_odds", sorted([inside, outside]))


@pytest.mark.parametrize("gap, cause", [(1e-2, "weights"), (1e-6, "near_tie")])
@pytest.mark.parametrize("even", [False, True])
def test_the_right_tokens_for_other_scores_are_a_weight_fault_or_a_near_tie(setting, gap, cause, even):
    """Also where the odds at the cut are even, so that no distance is small beside the score itself."""
    observation, plan, geometry, inside, outside = setting
    reference, candidate = runs.copy_of(observation), runs.copy_of(observation)
    if even:
        middle = observation.scores["log_odds_1"][0, [inside, outside]].mean()
        reference.scores["log_odds_1"] -= middle
        candidate.scores["log_odds_1"] -= middle
    score = reference.scores["log_odds_1"]
    below = score[0, inside] - gap * np.sqrt((score**2).mean())
    candidate.scores["log_odds_1"][0, [inside, outside]] = below, score[0, inside]
    reference.scores["log_odds_1"][0, outside] = below
    runs.exchange(candidate, inside, outside)
    [found] = differences(reference, candidate, candidate, plan, geometry, BOUND)
    assert (found.cause, found.decision, found.tokens) == (cause, "log_odds", sorted([inside, outside]))
    assert found.gap == pytest.approx(gap / 2, rel=0.2)


def test_the_trace_and_the_engine_do_the_same(pruned, trained, tmp_path):
    runs.assert_traces(pruned, tmp_path)
    assert runs.engine_report(pruned, trained, tmp_path).require().passed
