"""EViT against the official numbers, and its fused tokens followed from stage to stage."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import onnx
import pytest
import torch
from onnx import TensorProto
from timm.models.vision_transformer import VisionTransformer

import ztp_deploy as ztp
from tests import golden, runs, tiny
from ztp_deploy import exporters
from ztp_deploy.errors import BadRequest
from ztp_deploy.evidence.selection import differences
from ztp_deploy.methods import evit
from ztp_deploy.models import describe, host_of, load_model
from ztp_deploy.plan import Stage
from ztp_deploy.planning import make_plan
from ztp_deploy.pruning.prune import prune
from ztp_deploy.source import ModelSize

FUSED = {"fuse": True}
CASES = {"evit_tiny_fuse": {"fuse": True}, "evit_tiny_nofuse": {}}
BOUND = 1e-5


def golden_run(name):
    """The case's pruned model and its run on the case's images."""
    size = ModelSize(embed_dim=96, num_heads=3, num_classes=100)
    model = load_model("deit_t", weights=golden.state_dict(name), overrides=size)
    pruned = prune(model, make_plan(model, "evit", ratio=0.7, options=CASES[name]))
    with torch.inference_mode():
        return pruned, pruned.run(golden.images(name))


@pytest.mark.parametrize("name", CASES)
def test_golden(name):
    pruned, outputs = golden_run(name)
    golden.assert_matches(name, "logits", outputs.logits)
    tokens = [197]
    leaving = {stage.block: stage.tokens_out + 1 for stage in pruned.plan.stages}
    for block in range(1, 13):
        tokens.append(leaving.get(block, tokens[-1]))
    golden.assert_matches(name, "token_count", np.array(tokens[1:]))
    entering = np.tile(np.arange(196), (2, 1))
    for index, kept in enumerate(outputs.kept):
        selected = kept.numpy()[:, : pruned.plan.stages[index].static.get("top_k")]
        # There, any earlier fused token is -1 among the kept and slot 196 among the scores, unless there are two.
        golden.assert_matches(name, f"keep_patch_{index}", np.sort(np.where(selected > 195, -1, selected), axis=1))
        scores = np.full((2, 197), np.nan, dtype=np.float32)
        for image, row in enumerate(outputs.scores[index]["class_attention"].numpy()):
            scores[image, entering[image].clip(max=196)] = row
            if (entering[image] > 195).sum() > 1:
                scores[image, 196] = np.nan
        golden.assert_matches(name, f"cls_attn_patch_{index}", scores)
        entering = kept.numpy()


def normalised(patches, rows, dropped):
    weights = rows.mean(1) * dropped
    return (weights / weights.sum(1, keepdim=True)).unsqueeze(1) @ patches


MISTAKES = {
    "normalised": ("fuse", normalised),
    "everything is fused": ("fuse", lambda patches, rows, dropped: rows.mean(1, keepdim=True) @ patches),
    "attention received": ("class_rows", lambda probabilities, token, special: probabilities[:, :, special:, token]),
    "one head": ("class_rows", lambda probabilities, token, special: probabilities[:, :1, token, special:]),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_golden_notices_mistakes(mistake, monkeypatch):
    name, instead = MISTAKES[mistake]
    monkeypatch.setattr(evit, name, instead)
    _, outputs = golden_run("evit_tiny_fuse")
    assert np.abs(outputs.logits.numpy() - golden.arrays("evit_tiny_fuse")["logits"]).max() > 1e-2


@pytest.mark.parametrize(
    "ratio, fuse, kept",
    [(0.7, False, [138, 97, 68]), (0.7, True, [138, 98, 70]), (0.5, False, [98, 49, 25]), (0.5, True, [98, 50, 26])],
)
def test_counts_round_up_and_count_the_fused_token(ratio, fuse, kept):
    plan = make_plan("deit_s", "evit", ratio=ratio, options={"fuse": fuse})
    assert [stage.block for stage in plan.stages] == [4, 7, 10]
    assert {stage.place for stage in plan.stages} == {"after_attention"}
    assert plan.counts == [count + fuse for count in kept]
    for index, (stage, count) in enumerate(zip(plan.stages, kept, strict=True)):
        assert stage.static == ({"top_k": count, "stage": index} if fuse else {})


def test_keep_counts_are_those_of_the_top_k():
    plan = make_plan("deit_s", "evit", keep=[138, 98, 70], options=FUSED)
    assert plan.counts == make_plan("deit_s", "evit", ratio=0.7, options=FUSED).counts == [139, 99, 71]
    # A stage that keeps all fuses nothing and is none; the next one's token is then the first.
    plan = make_plan("deit_s", "evit", keep=[196, 100, 50], options=FUSED)
    assert [(stage.block, stage.tokens_in, stage.tokens_out, stage.static["stage"]) for stage in plan.stages] == [
        (7, 196, 101, 0),
        (10, 101, 51, 1),
    ]
    # One token left over is fused alone: as many leave as come.
    assert make_plan("deit_s", "evit", keep=[195], sites=[4], options=FUSED).counts == [196]
    assert make_plan("deit_s", "evit", ratio=1.0).method == "dense"
    share = make_plan("deit_s", "evit", flops=0.65)
    assert share.flops.share == pytest.approx(0.65, rel=0.005)


def test_backbones_that_cannot_carry_it_are_refused():
    _, geometry = describe("deit_t")
    fused, dropped = evit.Options(fuse=True), evit.Options()
    assert evit.refuses(geometry, fused) is None
    assert "no class token" in (evit.refuses(replace(geometry, class_token=None), dropped) or "")
    assert "fuse=false" in (evit.refuses(replace(geometry, rotary=True), fused) or "")
    assert evit.refuses(replace(geometry, rotary=True), dropped) is None
    averaging = VisionTransformer(img_size=32, embed_dim=24, depth=2, num_heads=3, class_token=False, global_pool="avg")
    with pytest.raises(BadRequest, match=r"evit cannot prune VisionTransformer: .*no class token"):
        make_plan(averaging, "evit", ratio=0.7, sites=[2])


def test_plans_edited_by_hand_are_refused():
    model = tiny.model()
    for options, static in ((FUSED, {}), (FUSED, {"top_k": 5, "stage": 0}), ({}, {"top_k": 17, "stage": 0})):
        plan = make_plan(model, "evit", keep=[18], sites=[2], options=options)
        stage = plan.stages[0].model_copy(update={"static": static})
        with pytest.raises(BadRequest, match="fixed numbers"):
            prune(model, plan.model_copy(update={"stages": (stage,)}))


def test_slots_after_a_stage():
    assert evit.slots_after(torch.tensor([[3, 0], [1, 2]]), 4).tolist() == [[1, 2, 2, 0], [2, 0, 1, 2]]
    assert evit.slots_after(torch.tensor([[3, 0]]), 4).dtype == torch.int32


def test_a_fused_token_is_the_weighted_sum_of_the_dropped():
    patches = torch.tensor([[[1.0, 0.0], [0.0, 1.0], [5.0, 5.0]]])
    rows = torch.tensor([[[0.1, 0.2, 0.3], [0.3, 0.4, 0.5]]])
    torch.testing.assert_close(evit.fuse(patches, rows, torch.tensor([[1.0, 1.0, 0.0]])), torch.tensor([[[0.2, 0.3]]]))


@pytest.fixture(scope="module", params=["fuse", "nofuse"])
def pruned(request, model):
    return prune(model, make_plan(model, "evit", ratio=0.6, options={"fuse": request.param == "fuse"}))


def test_every_dropped_patch_points_to_the_token_it_was_fused_into(model):
    pruned = prune(model, make_plan(model, "evit", ratio=0.6, options=FUSED))
    images = torch.from_numpy(tiny.images(3))
    carriers = np.tile(np.arange(36), (3, 1))  # the position that each patch goes by so far
    for index, trace in enumerate(ztp.trace_tokens(pruned, images)):
        assert (trace.kept[:, -1] == 36 + index).all()
        assert (trace.assignment >= 0).all()  # nothing is lost
        now = np.take_along_axis(trace.kept.numpy(), trace.assignment.numpy().astype(np.int64), axis=1)
        for image in range(3):
            survivors = set(trace.kept[image].tolist())
            wanted = [position if position in survivors else 36 + index for position in carriers[image]]
            assert now[image].tolist() == wanted
        carriers = now
    assert (carriers == 38).sum() > 18


def test_dropped_patches_without_fusing(model):
    pruned = prune(model, make_plan(model, "evit", ratio=0.6, options={"fuse": False}))
    for trace, count in zip(
        ztp.trace_tokens(pruned, torch.from_numpy(tiny.images(2))), pruned.plan.counts, strict=True
    ):
        assert (trace.assignment >= 0).sum(1).tolist() == [count, count]
        assert trace.kept.max() < 36


def test_forced_runs_reproduce(pruned):
    runs.assert_forced_runs_reproduce(pruned)


@pytest.fixture(scope="module", params=["fuse", "nofuse"])
def setting(request, model):
    """One image's honest run of one stage, with its plan and geometry and the two tokens at the cut."""
    plan = make_plan(model, "evit", keep=[20], sites=[2], options={"fuse": request.param == "fuse"})
    observation = runs.observe(prune(model, plan), tiny.images(1))
    order = np.argsort(-observation.scores["class_attention_1"][0], kind="stable")
    return observation, plan, host_of(model).geometry, int(order[19]), int(order[20])


def test_other_tokens_from_the_right_scores_is_a_selection_fault(setting):
    observation, plan, geometry, inside, outside = setting
    assert differences(observation, observation, observation, plan, geometry, BOUND) == []
    candidate = runs.copy_of(observation)
    runs.exchange(candidate, inside, outside)
    [found] = differences(observation, candidate, candidate, plan, geometry, BOUND)
    assert (found.cause, found.decision, found.tokens) == ("selection", "class_attention", sorted([inside, outside]))


@pytest.mark.parametrize("gap, cause", [(1e-2, "weights"), (1e-6, "near_tie")])
def test_the_right_tokens_for_other_scores_are_a_weight_fault_or_a_near_tie(setting, gap, cause):
    observation, plan, geometry, inside, outside = setting
    reference, candidate = runs.copy_of(observation), runs.copy_of(observation)
    score = observation.scores["class_attention_1"][0, inside]
    reference.scores["class_attention_1"][0, [inside, outside]] = score, score * (1 - gap)
    candidate.scores["class_attention_1"][0, [inside, outside]] = score * (1 - gap), score
    runs.exchange(candidate, inside, outside)
    [found] = differences(reference, candidate, candidate, plan, geometry, BOUND)
    assert (found.cause, found.decision, found.tokens) == (cause, "class_attention", sorted([inside, outside]))
    assert found.gap == pytest.approx(gap / 2, rel=0.1)


def test_a_fused_token_kept_by_one_side_only_is_named(model):
    """The token that stage 1 made takes part in stage 2 and has a position of its own."""
    plan = make_plan(model, "evit", keep=[20, 10], sites=[2, 3], options=FUSED)
    observation = runs.observe(prune(model, plan), tiny.images(1))
    candidate = runs.copy_of(observation)
    fused = 20  # its slot before stage 2
    went = int(candidate.merged[1][0, fused])
    other = int(np.flatnonzero((candidate.merged[1][0] == 10) != (went == 10))[0])
    slots = candidate.merged[1][0]
    slots[[fused, other]] = slots[[other, fused]]
    moved = {36, int(candidate.kept[0][0, other])}
    new = 36 if went == 10 else int(candidate.kept[0][0, other])
    candidate.kept[1][0, min(went, int(observation.merged[1][0, other]))] = new
    [found] = differences(observation, candidate, candidate, plan, host_of(model).geometry, BOUND)
    assert (found.stage, found.cause, set(found.tokens)) == (2, "selection", moved)


def test_the_trace_and_the_engine_do_the_same(pruned, model, tmp_path):
    runs.assert_traces(pruned, tmp_path)
    report = runs.engine_report(pruned, model, tmp_path)
    assert report.require().passed
    assert len(report.edges) == 3
    artifact = exporters.load_artifact(tmp_path / "onnx")
    assert artifact.manifest.audit == ("class_attention_1", "class_attention_2", "class_attention_3")
    # The fused token weighs by the attention that decides: yet what decides stays float32 in lower precisions.
    lowered = exporters.convert(artifact, "fp16", tmp_path / "fp16")
    graph = onnx.load(str(lowered.directory / "model.onnx"))
    inferred = onnx.shape_inference.infer_shapes(graph, strict_mode=True)
    types = {value.name: value.type.tensor_type.elem_type for value in inferred.graph.value_info}
    deciding = [node.input[0] for node in graph.graph.node if node.op_type == "TopK"]
    assert deciding == list(artifact.manifest.audit)
    assert {types[name] for name in deciding} == {TensorProto.FLOAT}


def test_ties_go_to_the_lower_index_and_margins_are_relative():
    stage = Stage(block=1, place="after_attention", tokens_in=4, tokens_out=3, static={"top_k": 2, "stage": 0})
    geometry = describe("deit_t")[1]
    scores = {"class_attention": torch.tensor([[0.2, 0.2, 0.2, 0.4]])}
    replay = evit.replay(stage, scores, geometry, evit.Options(fuse=True))
    assert replay.kept.tolist() == [[3, 0]]
    assert replay.goes is not None
    assert replay.goes.tolist() == [[0, 4, 4, 3]]
    assert replay.decisions[0].margin[0, 3].item() == pytest.approx(1.0)
    assert evit.replay(stage, scores, geometry, evit.Options()).goes is None
