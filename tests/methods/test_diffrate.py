"""DiffRate against the golden case of the authors' code, its counts, its replay, and one graph."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from timm.models.vision_transformer import VisionTransformer

import ztp_deploy as ztp
from tests import golden, tiny
from tests.runs import observe
from ztp_deploy.errors import BadRequest
from ztp_deploy.evidence.selection import Observation, differences
from ztp_deploy.methods import diffrate, parse_options
from ztp_deploy.models import host_of
from ztp_deploy.models.parts import mean_of_patches
from ztp_deploy.planning import make_plan
from ztp_deploy.pruning.prune import prune
from ztp_deploy.pruning.tokens import TokenState
from ztp_deploy.source import ModelSize

NAME = "diffrate_tiny"
BOUND = 1e-5


def run(**changes):
    """The golden case with its learned counts, changed by options: outputs and final sizes."""
    model = ztp.load_model(
        "deit_t", weights=golden.state_dict(NAME), overrides=ModelSize(embed_dim=96, num_heads=3, num_classes=100)
    )
    arguments = golden.CASES[NAME]["arguments"]
    kept, left = np.array(arguments["merge_kept_num"]), np.array(arguments["prune_kept_num"])
    pruned = np.concatenate([[197], kept[:-1]]) - left
    options = {"pruned": pruned.tolist()} | changes
    module = prune(model, make_plan(model, "diffrate", keep=(kept - 1).tolist(), options=options))
    states = []
    for stage in module.stages.values():
        stage.register_forward_hook(lambda module, inputs, output: states.append(output.state))
    with torch.inference_mode():
        outputs = module.run(golden.images(NAME))
    return outputs, states[-1].sizes


def groups(merged):
    """Per stage and original patch [L, B, n] the lowest patch in the same token, -1 where it is pruned."""
    where, found = None, []
    for slots in merged:
        slots = slots.long()
        where = slots if where is None else torch.where(where < 0, -1, slots.gather(1, where.clamp_min(0)))
        together = where.unsqueeze(1) == where.unsqueeze(2)
        found.append(torch.where(where < 0, -1, together.int().argmax(2)))
    return torch.stack(found).numpy()


def test_golden():
    outputs, sizes = run()
    golden.assert_matches(NAME, "logits", outputs.logits)
    truth = golden.arrays(NAME)
    # The first block keeps everything and has no stage; the class token, 0 there, is no patch here.
    official = truth["group"][1:, :, 1:]
    np.testing.assert_array_equal(groups(outputs.merged), np.where(official < 0, -1, official - 1))
    assert [kept.shape[1] + 1 for kept in outputs.kept] == truth["token_count"][1:].tolist()
    everyone = torch.cat([torch.ones(2, 1), sizes], dim=1)
    golden.assert_matches(NAME, "size_sorted", everyone.sort(1).values)


@pytest.mark.parametrize("changes", [{"proportional": False}, {"pruned": 0.0}, {"pruned": 1.0}, {"pruned": 0.5}])
def test_golden_notices_mistakes(changes):
    with pytest.raises(AssertionError):
        golden.assert_matches(NAME, "logits", run(**changes)[0].logits)


def test_golden_notices_sizes_that_are_plain_counts(monkeypatch):
    monkeypatch.setattr(diffrate, "likeness", lambda rows, target, kept, special: torch.ones(target.shape))
    with pytest.raises(AssertionError):
        golden.assert_matches(NAME, "logits", run()[0].logits)


def test_likeness_is_the_cosine_of_those_that_join():
    rows = torch.randn(2, 1 + 7, 5)
    cosine = diffrate.cosines(rows, 4, 1)
    target = torch.tensor([[3, 0, 3], [1, 2, 0]])
    found = diffrate.likeness(rows, target, 4, 1)
    torch.testing.assert_close(found, cosine.gather(2, target.unsqueeze(2)).squeeze(2))
    assert torch.isfinite(diffrate.likeness(torch.zeros(1, 3, 5), torch.tensor([[0]]), 1, 1)).all()


def test_negative_cosines_leave_a_size_to_take_the_logarithm_of(model):
    pruned = prune(model, make_plan(model, "diffrate", keep=[27], sites=[2], options={"pruned": 0.0}))
    order = torch.arange(36).unsqueeze(0)
    joining = diffrate.Joining(order[:, :27], order[:, 27:], torch.zeros(1, 9, dtype=torch.int64))
    state = pruned.stages["block2"]._sized(TokenState(positions=order.int()), joining, torch.full((1, 9), -0.5))
    assert state.sizes[0].tolist() == [diffrate.FLOOR] + [1] * 26
    assert torch.isfinite(state.bias).all()


def test_a_mean_by_size_counts_what_is_left():
    """Sizes do not add up to the number of patches once some are pruned or shrunk."""
    state = TokenState(positions=torch.zeros(1, 2), sizes=torch.tensor([[3.0, 1.0]]), weigh_mean=True)
    patches = torch.tensor([[[1.0], [5.0]]])
    assert mean_of_patches(patches, state).item() == pytest.approx(2)


# --- counts ------------------------------------------------------------------------------------


def test_half_of_what_leaves_is_pruned_rounded_up():
    stages = make_plan("deit_t", "diffrate", keep=[191, 181, 181, 180], sites=[1, 2, 3, 4]).stages
    assert [stage.static for stage in stages] == [
        {"pruned": 3, "top_k": 193},
        {"pruned": 5, "top_k": 186},
        {"pruned": 1, "top_k": 180},
    ]
    assert [diffrate.joining_in(stage) for stage in stages] == [2, 5, 0]
    assert [diffrate.score_names(stage) for stage in stages] == [("score", "similarity")] * 2 + [("score",)]


def test_a_ratio_is_zero_tprunes_share():
    plan = make_plan("deit_s", "diffrate", ratio=0.7)
    removed = [stage.tokens_in - stage.tokens_out for stage in plan.stages]
    assert set(removed) <= {min(removed), min(removed) + 1}
    assert plan.flops.share == pytest.approx(make_plan("deit_s", ratio=0.7).flops.share, abs=0.003)


def test_what_cannot_be_is_refused(model):
    with pytest.raises(BadRequest, match="3 entries for 2 sites"):
        make_plan(model, "diffrate", keep=[27, 19], sites=[1, 2], options={"pruned": [1, 2, 3]})
    with pytest.raises(BadRequest, match="At block 2 only 8 tokens leave; pruned=9"):
        make_plan(model, "diffrate", keep=[27, 19], sites=[1, 2], options={"pruned": [9, 9]})
    for pruned in (1.5, -0.1, [-1], "half"):
        with pytest.raises(BadRequest, match="pruned"):
            parse_options("diffrate", {"pruned": pruned})
    plan = make_plan(model, "diffrate", keep=[27], sites=[2])
    for static in ({}, {"pruned": 10, "top_k": 26}, {"pruned": 4, "top_k": 31}):
        stage = plan.stages[0].model_copy(update={"static": static})
        with pytest.raises(BadRequest, match="fixed numbers"):
            prune(model, plan.model_copy(update={"stages": (stage,)}))


def test_a_model_without_a_class_token_is_refused():
    own = VisionTransformer(
        img_size=32, embed_dim=24, depth=2, num_heads=3, num_classes=5, class_token=False, global_pool="avg"
    )
    with pytest.raises(BadRequest, match="this model has none"):
        make_plan(ztp.load_model(own), "diffrate", ratio=0.7)


# --- observing, forcing, explaining ------------------------------------------------------------


@pytest.mark.parametrize("name", ["deit_t", "deit_t_distilled"])
def test_a_forced_run_decides_as_it_is_told(name):
    model = tiny.model(name)
    options = {"pruned": [0, 8, 2]}
    plan = make_plan(model, "diffrate", keep=[27, 19, 12], sites=[1, 2, 4], options=options)
    pruned, images = prune(model, plan), tiny.images(2)
    honest = observe(pruned, images)
    forced = honest.forced(plan.patch_tokens)
    again = observe(pruned, images, forced)
    np.testing.assert_allclose(honest.logits, again.logits, rtol=1e-5, atol=1e-5)
    other = observe(pruned, images[::-1].copy(), forced)
    for run in (again, other):
        for index in range(3):
            np.testing.assert_array_equal(run.destinations(index, 36), honest.destinations(index, 36))
    np.testing.assert_array_equal(other.scores["score_1"], honest.scores["score_1"][::-1])
    np.testing.assert_array_equal(other.scores["similarity_1"], honest.scores["similarity_1"][::-1])


@pytest.fixture(scope="module")
def setting():
    """One image's honest run with two stages, its plan and geometry."""
    model = tiny.model()
    plan = make_plan(model, "diffrate", keep=[30, 20], sites=[2, 3])
    return observe(prune(model, plan), tiny.images(1)), plan, host_of(model).geometry


def decided_by(observation, plan, **scores):
    """What an engine with these scores at the second stage would have done with them."""
    score, similarity = (scores.get(name, observation.scores[f"{name}_2"]) for name in ("score", "similarity"))
    order = torch.from_numpy(np.argsort(-score, axis=1, kind="stable")[:, : plan.stages[1].static["top_k"]])
    joining = diffrate.Joining(order[:, :20], order[:, 20:], torch.from_numpy(similarity).argmax(2))
    kept = np.take_along_axis(observation.kept[0], joining.stay.numpy(), axis=1)
    return Observation(
        observation.logits,
        [observation.kept[0], kept],
        [observation.merged[0], joining.destination_slots(30).numpy()],
        observation.scores | {"score_2": score, "similarity_2": similarity},
    )


def reversed_slots(observation):
    """The same run by an engine that hands the first stage's tokens on in the opposite order."""
    return Observation(
        observation.logits,
        [observation.kept[0][:, ::-1], observation.kept[1]],
        [np.where(observation.merged[0] < 0, -1, 29 - observation.merged[0]), observation.merged[1][:, ::-1]],
        observation.scores | {"score_2": observation.scores["score_2"][:, ::-1]},
    )


def test_equal_runs_have_no_difference_whatever_their_slots(setting):
    observation, plan, geometry = setting
    for same in (decided_by(observation, plan), reversed_slots(observation)):
        assert differences(observation, same, same, plan, geometry, BOUND) == []


@pytest.mark.parametrize("gap, cause", [(2e-6, "near_tie"), (0.01, "weights")])
@pytest.mark.parametrize("cut, decision", [(25, "importance"), (20, "merged")])
def test_another_token_at_a_cut(setting, gap, cause, cut, decision):
    observation, plan, geometry = setting
    order = np.argsort(-observation.scores["score_2"][0])
    inside, outside = order[cut - 1], order[cut]
    runs = []
    for side in (-1, 1):
        score = observation.scores["score_2"].astype(np.float64)
        score[0, outside] = score[0, inside] * (1 + side * gap)
        runs.append(decided_by(observation, plan, score=score))
    candidate = reversed_slots(runs[1])
    difference = differences(runs[0], candidate, candidate, plan, geometry, BOUND)[0]
    assert (difference.stage, difference.cause, difference.decision) == (2, cause, decision)
    assert difference.gap == pytest.approx(gap / 2, rel=0.1)
    # A token may have lost its target to the cut, so more than the two can go elsewhere.
    assert set(observation.kept[0][0, [inside, outside]]) <= set(difference.tokens)


@pytest.mark.parametrize("gap, cause", [(2e-6, "near_tie"), (0.01, "weights")])
def test_another_target(setting, gap, cause):
    observation, plan, geometry = setting
    best, second = np.argsort(-observation.scores["similarity_2"][0, 2])[:2]
    runs = []
    for side in (-1, 1):
        similarity = observation.scores["similarity_2"].copy()
        similarity[0, 2, second] = similarity[0, 2, best] + side * gap
        runs.append(decided_by(observation, plan, similarity=similarity))
    candidate = reversed_slots(runs[1])
    difference = differences(runs[0], candidate, candidate, plan, geometry, BOUND)[0]
    assert (difference.stage, difference.cause, difference.decision) == (2, cause, "partner")
    assert difference.gap == pytest.approx(gap, rel=0.1)
    assert len(difference.tokens) == 1


def test_a_wrong_target_is_a_selection_fault(setting):
    observation, plan, geometry = setting
    wrong = decided_by(observation, plan)
    leaving = np.argsort(-observation.scores["score_2"][0])[22]
    wrong.merged[1][0, leaving] = (wrong.merged[1][0, leaving] + 1) % 20
    difference = differences(observation, wrong, wrong, plan, geometry, BOUND)[0]
    assert (difference.stage, difference.cause) == (2, "selection")
    assert difference.tokens == [observation.kept[0][0, leaving]]


# --- as a graph --------------------------------------------------------------------------------


def test_exported_graphs_keep_the_vocabulary_and_pass_the_gate(model, tmp_path):
    """One stage only merges, one does both, one only prunes."""
    options = {"pruned": [0, 4, 2]}
    pruned = prune(model, make_plan(model, "diffrate", keep=[30, 22, 20], sites=[1, 2, 3], options=options))
    artifact = ztp.export(pruned, "onnx", tmp_path / "onnx")
    engine = ztp.build(artifact, "onnxruntime", device="cpu", batch=(1, 4, 8), directory=tmp_path / "engine")
    report = ztp.check_parity(engine, model, tiny.images(5)).require()
    assert {edge.candidate for edge in report.edges} == {"exported", "engine"}
    traced = ztp.export(pruned, "torchscript", tmp_path / "torchscript")
    engine = ztp.build(traced, "torchscript", device="cpu", batch=(1, 4, 8), directory=tmp_path / "traced")
    assert ztp.check_parity(engine, model, tiny.images(5)).require().passed
