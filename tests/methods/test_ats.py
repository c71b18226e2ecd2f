"""Adaptive Token Sampling against the golden cases, and its sampling against a plain one."""

from __future__ import annotations

import numpy as np
import pytest
import timm
import torch

import ztp_deploy as ztp
from tests import golden, tiny
from tests.runs import assert_engine_agrees, assert_forced_runs_reproduce, flip, golden_model, observation, observe, run
from ztp_deploy import methods
from ztp_deploy.errors import BadRequest
from ztp_deploy.evidence.selection import differences
from ztp_deploy.methods import ats
from ztp_deploy.methods.share import zero_tprune_share
from ztp_deploy.models import describe, host_of
from ztp_deploy.pruning.tokens import top_k

SITES = {"ats_tiny": None, "ats_tiny_two_layers": [3, 5]}
FORMS = ("compact", "masked")
BOUND = 1e-5


def golden_pruned(name, **options):
    blocks = len(golden.CASES[name]["arguments"]["ats_blocks"])
    model = golden_model(name)
    plan = ztp.make_plan(model, "ats", keep=[49] * blocks, sites=SITES[name], options={"form": "masked"} | options)
    assert [stage.block - 1 for stage in plan.stages] == golden.CASES[name]["arguments"]["ats_blocks"]
    return ztp.prune(model, plan)


def as_sampled(kept):
    """Kept positions [stage] of [B, k] as the golden array has them: 0 the class token, patches from 1, -1 to fill."""
    rows = [[[0, *sorted(p + 1 for p in image if p >= 0)] for image in stage.tolist()] for stage in kept]
    return np.array([[row + [-1] * (50 - len(row)) for row in stage] for stage in rows])


@pytest.mark.parametrize("name", SITES)
def test_official_batches(name):
    """Everything official code did to the batch, image by image."""
    outputs = run(golden_pruned(name, batch_padding=True), golden.images(name))
    golden.assert_matches(name, "logits", outputs.logits)
    golden.assert_matches(name, "token_count", np.stack([(kept >= 0).sum(1).numpy() + 1 for kept in outputs.kept]))
    golden.assert_matches(name, "sampled", as_sampled(outputs.kept))


def test_official_padding_is_no_engine(tmp_path):
    with pytest.raises(BadRequest, match="depends on the others in its batch"):
        ztp.export(golden_pruned("ats_tiny", batch_padding=True), "onnx", tmp_path / "a")
    with pytest.raises(BadRequest, match="masked form"):
        methods.parse_options("ats", {"batch_padding": True})


@pytest.mark.parametrize("name, images", [("ats_tiny", [1]), ("ats_tiny_two_layers", [0, 1])])
def test_images_that_official_code_does_not_pad(name, images):
    """The fullest images of the official batches, here as they are."""
    truth, bounds = golden.arrays(name), golden.CASES[name]["tolerance"]["logits"]
    outputs = run(golden_pruned(name), golden.images(name)[images])
    np.testing.assert_allclose(outputs.logits, truth["logits"][images], **bounds)
    np.testing.assert_array_equal(as_sampled(outputs.kept), truth["sampled"][:, images])


@pytest.mark.parametrize("form", FORMS)
def test_an_image_does_not_depend_on_its_batch(form):
    model, images = golden_model("ats_tiny"), golden.images("ats_tiny")
    pruned = ztp.prune(model, ztp.make_plan(model, "ats", ratio=0.7, options={"form": form}))
    together = run(pruned, images)
    for image in range(2):
        alone = run(pruned, images[image : image + 1])
        assert [k[0].tolist() for k in alone.kept] == [k[image].tolist() for k in together.kept]
        torch.testing.assert_close(alone.logits[0], together.logits[image], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("mistake", ["value_norm", "start", "order"])
def test_golden_notices_mistakes(mistake, monkeypatch):
    name = "ats_tiny_two_layers"
    if mistake == "value_norm":
        monkeypatch.setattr(ats, "significance", _attention_alone)
    elif mistake == "start":
        monkeypatch.setattr(ats, "start_of", lambda score, *more: torch.zeros_like(score[:, :1]))
    else:
        monkeypatch.setattr(ats, "distribution", lambda score, start: score.cumsum(1))
    outputs = run(golden_pruned(name), golden.images(name))
    assert (as_sampled(outputs.kept) != golden.arrays(name)["sampled"]).any()
    assert np.abs(outputs.logits.numpy() - golden.arrays(name)["logits"]).max() > 0.01


def _attention_alone(attention, class_token, special_tokens, alive=None):
    score = attention.probabilities[:, :, class_token].sum(1)[:, special_tokens:]
    return score / score.sum(1, keepdim=True)


# --- sampling ------------------------------------------------------------------------------------


def some_scores(batch=4, tokens=36, seed=0):
    score = torch.from_numpy(np.random.default_rng(seed).exponential(size=(batch, tokens)) ** 2).float()
    return score / score.sum(1, keepdim=True)


def plainly_sampled(score, points):
    """Slots sampled by sorting, a running sum and a loop."""
    order = np.argsort(score, kind="stable")
    entries = np.cumsum(score[order])
    entries = (entries - entries[0]) / (entries[-1] - entries[0])
    first = entries[entries > 0].min()
    fractions = np.linspace(0, 1, points)
    return {int(order[np.abs(first + (1 - first) * fraction - entries).argmin()]) for fraction in fractions}


@pytest.mark.parametrize("points", [2, 7, 20, 36])
def test_sampling_is_that_of_the_sorted_running_sum(points):
    score = some_scores().double()
    sampled = ats.sample(score, ats.even_fractions(points).double())
    for image in range(4):
        assert set(sampled[image].nonzero().flatten().tolist()) == plainly_sampled(score[image].numpy(), points)


@pytest.mark.parametrize("points", [1, 7, 20, 35])
def test_compact_keeps_k_tokens_with_everything_that_was_sampled(points):
    score = some_scores(batch=16)
    sampled = ats.sample(score, ats.even_fractions(points))
    kept = ats.keep_slots(sampled, score, points, "compact")
    for image in range(16):
        slots, drawn = set(kept[image].tolist()), set(sampled[image].nonzero().flatten().tolist())
        assert len(slots) == points
        assert drawn <= slots
        others = [slot for slot in top_k(score[image : image + 1], 36)[0].tolist() if slot not in drawn]
        assert slots - drawn == set(others[: points - len(drawn)])


def test_masked_slots_are_never_sampled_and_move_nothing():
    score = some_scores(batch=1, tokens=12)
    alive = torch.tensor([[1.0, 0, 1, 1, 0, 1, 1, 1, 0, 1, 1, 1]])
    present = alive[0].nonzero().flatten()
    score = score * alive / (score * alive).sum()
    sampled = ats.sample(score, ats.even_fractions(8), alive)
    assert torch.equal(sampled[:, present], ats.sample(score[:, present], ats.even_fractions(8)))
    assert sampled.sum() == sampled[:, present].sum() > 0


def test_edges_of_the_distribution():
    assert ats.sample(torch.tensor([[0.1, 0.6, 0.3]]), ats.even_fractions(1)).tolist() == [[0, 1, 0]]
    assert ats.sample(torch.ones(1, 1), ats.even_fractions(5)).tolist() == [[1]]
    lonely = ats.sample(torch.tensor([[0.0, 1.0, 0.0]]), ats.even_fractions(3), torch.tensor([[0.0, 1.0, 0.0]]))
    assert lonely.tolist() == [[0, 1, 0]]
    # Equal significance: one entry, which the first token stands for.
    assert ats.sample(torch.full((1, 4), 0.25), ats.even_fractions(4)).tolist() == [[1, 0, 0, 0]]


# --- plans ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("ratio", [0.5, 0.7, 0.9])
def test_a_ratio_is_the_flop_share_of_zero_tprune(ratio):
    plan = ztp.make_plan("deit_s", "ats", ratio=ratio)
    assert [stage.block for stage in plan.stages] == list(range(4, 13))
    assert plan.flops.share == pytest.approx(zero_tprune_share(describe("deit_s")[1], ratio), rel=0.003)
    assert {stage.place for stage in plan.stages} == {"attention_rows"}
    assert plan.options == {"form": "compact", "batch_padding": False}
    assert plan.asked == {"ratio": ratio}


def test_flops_can_be_asked_for():
    assert ztp.make_plan("deit_s", "ats", flops=0.653).flops.share == pytest.approx(0.653, rel=0.005)


def test_everything_kept_is_dense_when_compact_and_sampled_when_masked():
    assert ztp.make_plan("deit_s", "ats", ratio=1.0).label == "dense"
    masked = ztp.make_plan("deit_s", "ats", ratio=1.0, options={"form": "masked"})
    assert masked.counts == [196] * 9
    assert masked.flops.share == 1
    assert all(stage.static == {"points": 196} for stage in masked.stages)


@pytest.mark.parametrize("depth, stages, sites", [(12, None, range(4, 13)), (12, 3, [4, 7, 10]), (4, None, [2, 3, 4])])
def test_default_sites(depth, stages, sites):
    assert ats.default_sites(depth, stages) == list(sites)


def test_a_backbone_without_class_token_is_refused():
    pooled = timm.create_model(
        "vit_tiny_patch16_224", img_size=96, depth=4, num_classes=10, class_token=False, global_pool="avg"
    )
    with pytest.raises(BadRequest, match="no class token"):
        ztp.make_plan(ztp.load_model(pooled), "ats", ratio=0.7)


def test_wrong_numbers_are_refused():
    with pytest.raises(BadRequest, match="form"):
        methods.parse_options("ats", {"form": "adaptive"})
    model = tiny.model()
    plan = ztp.make_plan(model, "ats", keep=[20], sites=[2])
    [stage] = plan.stages
    for points in ({}, {"points": 0}, {"points": 21}):
        edited = plan.model_copy(update={"stages": (stage.model_copy(update={"static": points}),)})
        with pytest.raises(BadRequest, match="needs points from 1 to 20"):
            ztp.prune(model, edited)


# --- parity --------------------------------------------------------------------------------------


def tiny_pruned(form):
    """Budgets of which the masked form leaves some empty at every stage."""
    model = tiny.model()
    return ztp.prune(model, ztp.make_plan(model, "ats", keep=[30, 25, 20], options={"form": form}))


@pytest.mark.parametrize("form", FORMS)
def test_a_forced_run_reproduces_itself(form):
    assert_forced_runs_reproduce(tiny_pruned(form), deciding="significance_1")


def one_stage(form):
    model = tiny.model()
    plan = ztp.make_plan(model, "ats", keep=[20], sites=[2], options={"form": form})
    geometry, options = host_of(model).geometry, methods.parse_options("ats", plan.options)

    def kept(score):
        replay = ats.replay(plan.stages[0], {"significance": torch.from_numpy(score)[None]}, geometry, options)
        return replay.kept[0].numpy()

    def run_of(tokens, score):
        return observation([tokens], {"significance_1": score})

    return plan, geometry, kept, run_of


@pytest.mark.parametrize("form", FORMS)
def test_whatever_flips_at_a_point_or_an_order_is_a_near_tie(form):
    """Between any two significances lies a point where the choice flips; both sides of it are explained, always."""
    plan, geometry, kept, run_of = one_stage(form)
    for seed in range(40):
        pair = flip(kept, *some_scores(batch=2, seed=seed).double().numpy())
        assert pair is not None
        before, after = (run_of(kept(score), score) for score in pair)
        [difference] = differences(before, after, after, plan, geometry, BOUND)
        assert (difference.cause, difference.gap < 1e-6) == ("near_tie", True), difference
        # An engine whose rounding decides as on the other side, with scores from this one.
        [difference] = differences(before, run_of(kept(pair[1]), pair[0]), before, plan, geometry, BOUND)
        assert difference.cause == "near_tie"
        assert differences(before, before, before, plan, geometry, BOUND) == []


@pytest.mark.parametrize("form", FORMS)
def test_other_tokens_than_the_scores_call_for_are_a_selection_fault(form):
    plan, geometry, kept, run_of = one_stage(form)
    score = some_scores(batch=1).double().numpy()[0]
    right, wrong = kept(score), kept(score)
    wrong[0] = next(slot for slot in range(36) if slot not in right)
    [difference] = differences(run_of(right, score), run_of(wrong, score), run_of(wrong, score), plan, geometry, BOUND)
    assert difference.cause == "selection"
    assert difference.gap > BOUND
    assert difference.tokens == sorted({int(right[0]), int(wrong[0])})


@pytest.mark.parametrize("form", FORMS)
def test_the_right_tokens_for_other_scores_are_a_weight_fault(form):
    plan, geometry, kept, run_of = one_stage(form)
    score, other = some_scores(batch=2).double().numpy()
    candidate = run_of(kept(other), other)
    [difference] = differences(run_of(kept(score), score), candidate, candidate, plan, geometry, BOUND)
    assert (difference.cause, difference.decision) == ("weights", "sampled")


def test_a_stage_after_masked_ones_is_compared_without_them():
    pruned = tiny_pruned("masked")
    seen = observe(pruned, tiny.images(1))
    assert all((kept < 0).any() for kept in seen.kept)
    geometry = pruned.host.geometry
    assert differences(seen, seen, seen, pruned.plan, geometry, BOUND) == []
    wrong = observe(pruned, tiny.images(1))
    wrong.kept[1][0, 0] = next(p for p in seen.kept[0][0] if p >= 0 and p not in seen.kept[1][0])
    assert differences(seen, wrong, wrong, pruned.plan, geometry, BOUND)[0].cause == "selection"


# --- graphs --------------------------------------------------------------------------------------


@pytest.mark.parametrize("format, backend", [("onnx", "onnxruntime"), ("torchscript", "torchscript")])
@pytest.mark.parametrize("form", FORMS)
def test_graphs_keep_the_vocabulary_and_pass_the_gate(form, format, backend, tmp_path):
    assert_engine_agrees(tiny_pruned(form), tiny.model(), format, backend, tmp_path)
