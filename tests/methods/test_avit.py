"""A-ViT against the golden cases, its halting by hand, and its fixed counts."""

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
from ztp_deploy.methods import avit
from ztp_deploy.methods.share import zero_tprune_share
from ztp_deploy.models import describe, host_of
from ztp_deploy.pruning.tokens import initial_state

GOLDEN = [name for name in golden.CASES if name.startswith("avit_")]
FORMS = ("compact", "masked")
BOUND = 1e-5
QUICK = {"gate_scale": 3.0, "gate_center": 0.5}
"""A gate at which tokens of a random backbone halt in every block."""


def golden_pruned(name, **changes):
    arguments, model = golden.CASES[name]["arguments"], golden_model(name)
    options = {"form": "masked", "gate_scale": arguments["gate_scale"], "gate_center": arguments["gate_center"]}
    return ztp.prune(model, ztp.make_plan(model, "avit", ratio=1.0, options=options | changes))


@pytest.mark.parametrize("name", GOLDEN)
def test_official_masked_inference(name):
    outputs = run(golden_pruned(name), golden.images(name))
    golden.assert_matches(name, "logits", outputs.logits)
    halting = np.stack([scores["halting"].numpy() for scores in outputs.scores])  # [12, B, 197]
    running = halting >= 0
    golden.assert_matches(name, "active_count", running.sum(2))
    goes_on = running & (halting < avit.THRESHOLD)
    goes_on[-1] = False  # after the last block all have halted
    golden.assert_matches(name, "counter_token", 1 + goes_on.sum(0))
    before = np.concatenate([np.zeros_like(halting[:1]), halting[:-1]])
    remainder = ((1 - before) * (running & ~goes_on)).sum(0)
    golden.assert_matches(name, "rho_token", running.sum(0) + remainder)
    for kept, going in zip(outputs.kept[:-1], goes_on[:-1], strict=True):
        assert ((kept.numpy() >= 0) == going[:, 1:]).all()


@pytest.mark.parametrize("change", [{"form": "compact"}, {"gate_center": 4.4}])
def test_golden_notices_mistakes(change):
    name = "avit_tiny_g2_c4"
    outputs = run(golden_pruned(name, **change), golden.images(name))
    assert np.abs(outputs.logits.numpy() - golden.arrays(name)["logits"]).max() > 0.01


# --- halting ---------------------------------------------------------------------------------------


def test_scores_keep_their_order_far_from_halting():
    """Where an engine's own sigmoid is 0; the gate of the published tiny model."""
    channel = torch.tensor([[-9.0, -6.0, -1.0, -0.5, 0.0, 2.9, 3.0, 4.0]], dtype=torch.float64)
    score = avit.halting_score(channel.unsqueeze(2).float(), 10.0, 30.0)
    assert score.dtype == torch.float32
    assert (score[0, 2:].diff() > 0).all()
    torch.testing.assert_close(score[:, 2:], (channel[:, 2:] * 10 - 30).sigmoid().float(), rtol=2e-5, atol=0)
    assert score[0, 0] == score[0, 1] > 0


def test_weights_are_the_scores_and_then_the_remainder():
    """One token: 0.5, 0.3, then past the threshold, then nothing."""
    options = avit.Options(gate_scale=1.0, gate_center=0.0)
    gathered = avit.nothing_gathered(torch.zeros(1, 1, 2))
    logit = {0.5: 0.0, 0.3: float(np.log(0.3 / 0.7)), 0.9: float(np.log(9))}
    total = 0.0
    for score, weight in ((0.5, 0.5), (0.3, 0.3), (0.9, 0.2), (0.5, 0.0)):
        tokens = torch.tensor([[[logit[score], 1.0]]])
        running = gathered.halting < avit.THRESHOLD
        halting = gathered.halting + avit.halting_score(tokens, 1.0, 0.0)
        gathered = avit.gather(gathered, tokens, halting, running, halting < avit.THRESHOLD, options, last=False)
        total += weight
        assert gathered.output[0, 0, 1].item() == pytest.approx(total, abs=1e-6)
        assert gathered.remainder.item() == pytest.approx(1 - total, abs=1e-6)


@pytest.mark.parametrize("form", FORMS)
def test_weights_add_up_to_one_for_every_token_that_is_left(form):
    pruned, images = tiny_pruned(form), torch.from_numpy(tiny.images(2))
    constant = torch.ones(2, 37, 48)
    state, tokens = initial_state(images, 36), constant.clone()
    for stage in pruned.stages.values():
        # Channel 0 is the gate's; the others are 1 after every block, so that what they gather is the weight.
        tokens = constant[:, : tokens.shape[1]].clone()
        tokens[:, :, 0] = torch.randn(tokens.shape[:2], generator=torch.Generator().manual_seed(stage.stage.block))
        out = stage(tokens, state, None)
        tokens, state = out.tokens, out.state
    assert tokens.shape[1] == pruned.plan.stages[-1].tokens_out + 1
    torch.testing.assert_close(tokens[:, :, 1:], torch.ones_like(tokens[:, :, 1:]))
    assert state.alive is None
    assert state.bias is None
    assert not state.carried


def test_compact_keeps_those_farthest_from_halting():
    halting = torch.tensor([[0.2, 1.7, 0.99, 0.1, 1.0, 0.98]])
    margin = avit.replay(_stage(6, 4), {"halting": halting}, _Special(0), avit.Options())
    # 0.99 and above have halted and are equal: the first of them fills the fourth place.
    assert margin.kept.tolist() == [[3, 0, 5, 1]]
    assert margin.decisions[0].chosen.tolist() == [[True, True, False, True, False, True]]


class _Special:
    def __init__(self, special_tokens):
        self.special_tokens = special_tokens


def _stage(tokens_in, tokens_out):
    return ztp.plan.Stage(block=1, place="read_out", tokens_in=tokens_in, tokens_out=tokens_out)


@pytest.mark.parametrize("form", FORMS)
def test_a_mean_over_patches_is_over_survivors_or_over_all(form):
    """Without a class token: compact pools what is left, masked every token with all it gathered."""
    model = timm.create_model(
        "vit_tiny_patch16_224",
        img_size=96,
        depth=3,
        num_classes=10,
        class_token=False,
        global_pool="avg",
        fc_norm=False,
    )
    model = ztp.load_model(model)
    ask = {"keep": [30, 20]} if form == "compact" else {"ratio": 1.0}
    pruned = ztp.prune(model, ztp.make_plan(model, "avit", options=QUICK | {"form": form}, **ask))
    with torch.inference_mode():
        images = torch.from_numpy(tiny.images(2))
        outputs = pruned.run(images)
        tokens, state = pruned.host.embed(images), initial_state(images, 36)
        for block, stage in zip(pruned.host.blocks, pruned.stages.values(), strict=True):
            out = stage(pruned.host.transform(block, pruned.host.mix(block, tokens, state)), state, None)
            tokens, state = out.tokens, out.state
        expected = model.head(model.norm(tokens).mean(1))
    assert tokens.shape[1] == (20 if form == "compact" else 36)
    torch.testing.assert_close(outputs.logits, expected)


# --- plans -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("ratio", [0.5, 0.7, 0.9, 1.0])
def test_a_ratio_is_the_flop_share_of_zero_tprune(ratio):
    plan = ztp.make_plan("deit_s", "avit", ratio=ratio)
    assert [stage.block for stage in plan.stages] == list(range(1, 13))
    assert plan.flops.share == pytest.approx(zero_tprune_share(describe("deit_s")[1], ratio), rel=0.003)
    assert plan.flops.planned == plan.flops.executed  # whole blocks
    assert plan.counts[10] == plan.counts[11]  # nothing follows the last block
    assert plan.options["form"] == "compact"


def test_every_block_carries_a_stage_and_sites_alone_drop():
    plan = ztp.make_plan("deit_s", "avit", keep=[137, 95, 66])
    assert [(stage.block, stage.tokens_out) for stage in plan.stages if not stage.static] == [
        (3, 137),
        (6, 95),
        (9, 66),
    ]
    assert len(plan.stages) == 12


@pytest.mark.parametrize(
    "depth, stages, sites", [(12, None, range(1, 12)), (12, 3, [3, 6, 9]), (12, 12, range(1, 13)), (1, None, [1])]
)
def test_default_sites(depth, stages, sites):
    assert avit.default_sites(depth, stages) == list(sites)


def test_masked_takes_no_counts():
    plan = ztp.make_plan("deit_s", "avit", ratio=1.0, options={"form": "masked"})
    assert plan.counts == [196] * 12
    assert plan.flops.share == 1
    for asked in ({"ratio": 0.7}, {"flops": 0.653}, {"keep": [137, 95, 66]}):
        with pytest.raises(BadRequest, match="leaves all 196 tokens in place"):
            ztp.make_plan("deit_s", "avit", options={"form": "masked"}, **asked)


def test_a_backbone_not_trained_for_it_is_said_to_be():
    plan = ztp.make_plan("deit_s", "avit", ratio=0.7)
    assert "A-ViT" in str(methods.untrained(plan))
    assert methods.untrained(ztp.make_plan("deit_s", "avit", ratio=0.7, options={"trained": True})) is None


def test_wrong_numbers_are_refused():
    with pytest.raises(BadRequest, match="gate_scale"):
        methods.parse_options("avit", {"gate_scale": 0})
    model = tiny.model()
    plan = ztp.make_plan(model, "avit", keep=[30, 20, 10])
    edited = plan.model_copy(update={"options": plan.options | {"form": "masked"}})
    with pytest.raises(BadRequest, match="drops tokens"):
        ztp.prune(model, edited)
    headless = plan.model_copy(
        update={"stages": (plan.stages[1].model_copy(update={"tokens_in": 36}), *plan.stages[2:])}
    )
    with pytest.raises(BadRequest, match="from the first block on"):
        run(ztp.prune(model, headless), torch.from_numpy(tiny.images(1)))


# --- parity ----------------------------------------------------------------------------------------


def tiny_pruned(form):
    model = tiny.model()
    ask = {"keep": [30, 24, 18]} if form == "compact" else {"ratio": 1.0}
    return ztp.prune(model, ztp.make_plan(model, "avit", options=QUICK | {"form": form}, **ask))


@pytest.mark.parametrize("form", FORMS)
def test_a_forced_run_reproduces_itself(form):
    assert_forced_runs_reproduce(tiny_pruned(form), deciding="halting_1")


def one_block(form):
    """The first stage of a tiny plan, alone."""
    model = tiny.model()
    ask = {"keep": [20], "sites": [1]} if form == "compact" else {"ratio": 1.0}
    plan = ztp.make_plan(model, "avit", options={"form": form}, **ask)
    plan = plan.model_copy(update={"stages": plan.stages[:1]})
    geometry, options = host_of(model).geometry, methods.parse_options("avit", plan.options)

    def kept(halting):
        replay = avit.replay(plan.stages[0], {"halting": torch.from_numpy(halting)[None]}, geometry, options)
        return replay.kept[0].numpy()

    def run_of(tokens, halting):
        return observation([tokens], {"halting_1": halting})

    return plan, geometry, kept, run_of


def some_halting(seed=0):
    return np.random.default_rng(seed).uniform(0, 1.3, size=(2, 37))


@pytest.mark.parametrize("form", FORMS)
def test_whatever_flips_at_the_threshold_or_the_cut_is_a_near_tie(form):
    plan, geometry, kept, run_of = one_block(form)
    for seed in range(40):
        pair = flip(kept, *some_halting(seed))
        assert pair is not None
        before, after = (run_of(kept(halting), halting) for halting in pair)
        [difference] = differences(before, after, after, plan, geometry, BOUND)
        assert (difference.cause, difference.gap < 1e-6) == ("near_tie", True), difference
        [difference] = differences(before, run_of(kept(pair[1]), pair[0]), before, plan, geometry, BOUND)
        assert difference.cause == "near_tie"


@pytest.mark.parametrize("form", FORMS)
def test_other_tokens_than_the_sums_call_for_are_a_selection_fault(form):
    plan, geometry, kept, run_of = one_block(form)
    halting = some_halting()[0]
    right, wrong = kept(halting), kept(halting)
    slot = int(np.flatnonzero(right >= 0)[0])
    wrong[slot] = -1 if form == "masked" else next(s for s in range(36) if s not in right)
    candidate = run_of(wrong, halting)
    [difference] = differences(run_of(right, halting), candidate, candidate, plan, geometry, BOUND)
    assert difference.cause == "selection"
    assert int(right[slot]) in difference.tokens


@pytest.mark.parametrize("form", FORMS)
def test_the_right_tokens_for_other_sums_are_a_weight_fault(form):
    plan, geometry, kept, run_of = one_block(form)
    halting, other = some_halting()
    candidate = run_of(kept(other), other)
    [difference] = differences(run_of(kept(halting), halting), candidate, candidate, plan, geometry, BOUND)
    assert (difference.cause, difference.decision) == ("weights", "halting" if form == "compact" else "halted")


def test_stages_after_masked_ones_are_compared_without_them():
    pruned = tiny_pruned("masked")
    seen, wrong = (observe(pruned, tiny.images(1)) for _ in range(2))
    assert all((kept < 0).any() for kept in seen.kept)
    assert differences(seen, seen, seen, pruned.plan, pruned.host.geometry, BOUND) == []
    slot = int(np.flatnonzero(seen.kept[1][0] >= 0)[0])
    wrong.kept[1][0, slot] = -1
    assert differences(seen, wrong, wrong, pruned.plan, pruned.host.geometry, BOUND)[0].cause == "selection"


# --- graphs ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("format, backend", [("onnx", "onnxruntime"), ("torchscript", "torchscript")])
@pytest.mark.parametrize("form", FORMS)
def test_graphs_keep_the_vocabulary_and_pass_the_gate(form, format, backend, tmp_path):
    assert_engine_agrees(tiny_pruned(form), tiny.model(), format, backend, tmp_path)
