"""ToMe against the golden cases of the authors' code, its counts, its replay, and one graph."""

from __future__ import annotations

import numpy as np
import pytest
import torch

import ztp_deploy as ztp
from tests import golden, tiny
from tests.runs import observe
from ztp_deploy.errors import BadRequest
from ztp_deploy.evidence.selection import Observation, differences
from ztp_deploy.methods import tome
from ztp_deploy.methods.share import zero_tprune_share
from ztp_deploy.models import describe, host_of
from ztp_deploy.planning import make_plan
from ztp_deploy.pruning.prune import prune
from ztp_deploy.source import ModelSize

CASES = [name for name in golden.CASES if name.startswith("tome_")]
NAMES = {"distilled": "deit_t_distilled", "mae": "mae_vit_b", "swag": "swag_vit_b16"}
BOUND = 1e-5


def model_of(name):
    """The case's model by its own name."""
    arguments = golden.CASES[name]["arguments"]
    kind = next((ours for word, ours in NAMES.items() if word in name), "deit_t")
    size = ModelSize(
        img_size=arguments.get("img_size") or arguments.get("image_size"),
        embed_dim=96,
        depth=arguments.get("depth") or arguments.get("num_layers"),
        num_heads=3,
        num_classes=100,
    )
    return ztp.load_model(kind, weights=golden.state_dict(name), overrides=size)


def run(name, **changes):
    """The case run with its arguments, changed by options: outputs, final sizes, special tokens."""
    arguments, truth = golden.CASES[name]["arguments"], golden.arrays(name)
    model = model_of(name)
    geometry = host_of(model).geometry
    options = {"proportional": arguments["prop_attn"]} | changes
    keep = [int(count) - geometry.special_tokens for count in truth["token_count"]]
    pruned = prune(model, make_plan(model, "tome", keep=keep, options=options))
    states = []
    for stage in pruned.stages.values():
        stage.register_forward_hook(lambda module, inputs, output: states.append(output.state))
    with torch.inference_mode():
        outputs = pruned.run(golden.images(name))
    return outputs, states[-1].sizes, geometry.special_tokens


def assignment(merged, special_tokens):
    """Per stage and original token [L, B, S + n] the output slot that holds it, special tokens counted."""
    where, found = None, []
    for slots in merged:
        where = slots.long() if where is None else slots.long().gather(1, where)
        special = torch.arange(special_tokens).expand(len(where), -1)
        found.append(torch.cat([special, where + special_tokens], dim=1))
    return torch.stack(found)


@pytest.mark.parametrize("name", CASES)
def test_golden(name):
    outputs, sizes, special = run(name)
    golden.assert_matches(name, "logits", outputs.logits)
    # Blocks that merge nothing have no stage: the official numbers repeat there.
    truth = golden.arrays(name)
    merging = np.flatnonzero(np.diff(truth["token_count"], prepend=outputs.merged[0].shape[1] + special))
    found = assignment(outputs.merged, special)
    np.testing.assert_array_equal(found, truth["assign"][merging])
    assert [kept.shape[1] + special for kept in outputs.kept] == truth["token_count"][merging].tolist()
    golden.assert_matches(name, "size", torch.cat([torch.ones(len(sizes), special), sizes], dim=1).int())
    for image, patches in enumerate(found[-1, :, special:]):
        assert sizes[image].tolist() == torch.bincount(patches - special, minlength=sizes.shape[1]).tolist()


@pytest.mark.parametrize("name", ["tome_tiny_r13", "tome_tiny_distilled_r13", "tome_tiny_r40_capped_noprop"])
def test_golden_notices_a_wrong_attention(name):
    wrong = not golden.CASES[name]["arguments"]["prop_attn"]
    with pytest.raises(AssertionError):
        golden.assert_matches(name, "logits", run(name, proportional=wrong)[0].logits)


def test_golden_notices_a_plain_mean():
    with pytest.raises(AssertionError):
        golden.assert_matches("tome_mae_tiny_r16", "logits", run("tome_mae_tiny_r16", weigh_mean=False)[0].logits)


def test_golden_notices_another_order(monkeypatch):
    """The next block splits by slot, so B ahead of A merges other tokens."""
    honest = tome.match

    def b_first(similarity, stage, special_tokens):
        joining, unmerged = honest(similarity, stage, special_tokens), stage.static["unmerged"]
        stay = joining.stay.roll(-unmerged, dims=1)
        return tome.Joining(stay, joining.leave, joining.target - unmerged)

    monkeypatch.setattr(tome, "match", b_first)
    with pytest.raises(AssertionError):
        golden.assert_matches("tome_tiny_r13", "logits", run("tome_tiny_r13")[0].logits)


# --- counts ------------------------------------------------------------------------------------


@pytest.mark.parametrize("ratio", [0.6, 0.7, 0.9])
def test_a_ratio_is_zero_tprunes_share_and_its_numbers_differ_by_at_most_one(ratio):
    plan = make_plan("deit_s", "tome", ratio=ratio)
    wanted = zero_tprune_share(describe("deit_s")[1], ratio)
    merged = [stage.tokens_in - stage.tokens_out for stage in plan.stages]
    assert merged == sorted(merged, reverse=True)
    assert set(merged) <= {min(merged), min(merged) + 1}
    assert [stage.block for stage in plan.stages] == list(range(1, 13))

    def share(total):
        numbers = [total // 12 + (index < total % 12) for index in range(12)]
        return make_plan("deit_s", "tome", keep=(196 - np.cumsum(numbers)).tolist()).flops.share

    distance = abs(plan.flops.share - wanted)
    assert distance <= min(abs(share(sum(merged) + step) - wanted) for step in (-1, 1))
    assert distance < 0.003


def test_blocks_that_few_tokens_reach_merge_half_of_them():
    plan = make_plan("deit_s", "tome", ratio=0.5)
    merged = [stage.tokens_in - stage.tokens_out for stage in plan.stages]
    assert merged == [18] + [17] * 9 + [12, 6]
    assert plan.flops.share == pytest.approx(make_plan("deit_s", ratio=0.5).flops.share, abs=0.003)


def test_the_decreasing_schedule_falls_linearly_to_nothing():
    plan = make_plan("deit_s", "tome", ratio=0.7, options={"schedule": "decreasing"})
    merged = np.array([stage.tokens_in - stage.tokens_out for stage in plan.stages])
    assert len(merged) == 11  # none in the last block
    line = merged[0] * (11 - np.arange(11)) / 11
    assert np.abs(merged - line).max() < 1.1
    assert plan.flops.share == pytest.approx(make_plan("deit_s", ratio=0.7).flops.share, abs=0.003)


def test_flops_are_met():
    assert make_plan("deit_s", "tome", flops=0.653).flops.share == pytest.approx(0.653, rel=0.005)


def test_at_most_half_of_the_tokens_merge_in_a_block():
    assert make_plan("deit_t", "tome", keep=[98, 49, 25], sites=[1, 2, 3]).counts == [98, 49, 25]
    with pytest.raises(BadRequest, match=r"from 49 to 24 at block 3 .* at least 25"):
        make_plan("deit_t", "tome", keep=[98, 49, 24], sites=[1, 2, 3])


@pytest.mark.parametrize("special", [0, 1, 2, 5])
@pytest.mark.parametrize("tokens", [2, 7, 8])
def test_the_split_is_the_official_one(tokens, special):
    everyone = range(special + tokens)
    assert [slot + special for slot in tome.set_a(tokens, special)] == [s for s in everyone[::2] if s >= special]
    assert [slot + special for slot in tome.set_b(tokens, special)] == [s for s in everyone[1::2] if s >= special]
    assert len(tome.set_a(tokens, special)) >= tome.most_merged(tokens)


def test_stages_edited_by_hand_are_refused(model):
    plan = make_plan(model, "tome", keep=[27], sites=[2])
    for changes in ({"static": {}}, {"static": {"unmerged": 9, "top_k": 8}}, {"tokens_out": 11}):
        stage = plan.stages[0].model_copy(update=changes)
        with pytest.raises(BadRequest, match="fixed numbers"):
            prune(model, plan.model_copy(update={"stages": (stage,)}))


# --- observing, forcing, explaining ------------------------------------------------------------


@pytest.mark.parametrize("name", ["deit_t", "deit_t_distilled"])
def test_a_forced_run_decides_as_it_is_told(name):
    model = tiny.model(name)
    plan = make_plan(model, "tome", keep=[27, 14, 10], sites=[1, 2, 4])
    pruned, images = prune(model, plan), tiny.images(2)
    honest = observe(pruned, images)
    forced = honest.forced(plan.patch_tokens)
    again = observe(pruned, images, forced)
    np.testing.assert_allclose(honest.logits, again.logits, rtol=1e-5, atol=1e-5)
    other = observe(pruned, images[::-1].copy(), forced)
    for run in (again, other):
        for index in range(3):
            np.testing.assert_array_equal(run.kept[index], honest.kept[index])
            np.testing.assert_array_equal(run.merged[index], honest.merged[index])
    # The scores are still what the stage would have gone by.
    np.testing.assert_array_equal(other.scores["similarity_1"], honest.scores["similarity_1"][::-1])


@pytest.fixture(scope="module")
def setting():
    """One image's honest run with one stage, its plan and geometry."""
    model = tiny.model()
    plan = make_plan(model, "tome", keep=[27], sites=[2])
    return observe(prune(model, plan), tiny.images(1)), plan, host_of(model).geometry


def decided_by(observation, plan, similarity):
    """What an engine with these scores would have done with them."""
    joining = tome.match(torch.from_numpy(similarity), plan.stages[0], 1)
    merged = joining.destination_slots(plan.stages[0].tokens_in)
    return Observation(observation.logits, [joining.stay.numpy()], [merged.numpy()], {"similarity_1": similarity})


def test_equal_runs_have_no_difference(setting):
    observation, plan, geometry = setting
    same = decided_by(observation, plan, observation.scores["similarity_1"])
    np.testing.assert_array_equal(same.merged[0], observation.merged[0])
    assert differences(observation, same, same, plan, geometry, BOUND) == []


@pytest.mark.parametrize("gap, cause", [(2e-6, "near_tie"), (0.01, "weights")])
def test_another_token_at_the_cut(setting, gap, cause):
    observation, plan, geometry = setting
    similarity = observation.scores["similarity_1"]
    order = np.argsort(-similarity[0].max(1))
    inside, outside = order[8], order[9]
    runs = []
    for side in (-1, 1):
        changed = similarity.copy()
        changed[0, outside, changed[0, outside].argmax()] = changed[0, inside].max() + side * gap
        runs.append(decided_by(observation, plan, changed))
    difference = differences(runs[0], runs[1], runs[1], plan, geometry, BOUND)[0]
    assert (difference.cause, difference.decision) == (cause, "merged")
    assert difference.gap == pytest.approx(gap / 2, rel=0.1)
    assert difference.tokens == sorted(int(slot) * 2 + 1 for slot in (inside, outside))


@pytest.mark.parametrize("gap, cause", [(2e-6, "near_tie"), (0.01, "weights")])
def test_another_partner(setting, gap, cause):
    observation, plan, geometry = setting
    similarity = observation.scores["similarity_1"]
    source = similarity[0].max(1).argmax()
    second = np.argsort(-similarity[0, source])[1]
    runs = []
    for side in (-1, 1):
        changed = similarity.copy()
        changed[0, source, second] = changed[0, source].max() + side * gap
        runs.append(decided_by(observation, plan, changed))
    difference = differences(runs[0], runs[1], runs[1], plan, geometry, BOUND)[0]
    assert (difference.cause, difference.decision, difference.tokens) == (cause, "partner", [source * 2 + 1])
    assert difference.gap == pytest.approx(gap, rel=0.1)


def test_a_wrong_partner_is_a_selection_fault_though_others_are_near_ties(setting):
    observation, plan, geometry = setting
    similarity = observation.scores["similarity_1"].copy()
    best, other = np.argsort(-similarity[0].max(1))[:2]
    ranked = np.argsort(-similarity[0, other])
    similarity[0, other, ranked[1]] = similarity[0, other, ranked[0]] - 1e-7
    reference = decided_by(observation, plan, similarity)
    wrong = decided_by(observation, plan, similarity)
    slot = best * 2 + 1
    wrong.merged[0][0, slot] = 9 + (wrong.merged[0][0, slot] - 9 + 1) % 18  # the next of B
    difference = differences(reference, wrong, wrong, plan, geometry, BOUND)[0]
    assert (difference.cause, difference.decision, difference.tokens) == ("selection", "partner", [slot])
    lead = np.diff(np.sort(similarity[0, best]))[-1]
    assert difference.gap == pytest.approx(lead, rel=1e-3)


# --- as a graph --------------------------------------------------------------------------------


def test_exported_graphs_keep_the_vocabulary_and_pass_the_gate(model, tmp_path):
    """The second stage merges all of A, so that nothing is left to rank."""
    pruned = prune(model, make_plan(model, "tome", keep=[27, 14], sites=[2, 3]))
    assert [stage.static["top_k"] for stage in pruned.plan.stages] == [9, 0]
    artifact = ztp.export(pruned, "onnx", tmp_path / "onnx")
    engine = ztp.build(artifact, "onnxruntime", device="cpu", batch=(1, 4, 8), directory=tmp_path / "engine")
    report = ztp.check_parity(engine, model, tiny.images(5)).require()
    assert {edge.candidate for edge in report.edges} == {"exported", "engine"}
    traced = ztp.export(pruned, "torchscript", tmp_path / "torchscript")
    engine = ztp.build(traced, "torchscript", device="cpu", batch=(1, 4, 8), directory=tmp_path / "traced")
    assert ztp.check_parity(engine, model, tiny.images(5)).require().passed
