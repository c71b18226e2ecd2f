"""Fates of patches by number: what each stage did, and why."""

from __future__ import annotations

import numpy as np
import pytest
import torch

import ztp_deploy as ztp
from tests import tiny
from tests.show.patches import PATCHES, pruned_by
from ztp_deploy.methods import avit
from ztp_deploy.show.draw import stage_numbers
from ztp_deploy.show.painting import CONTRARY, UNSCORED
from ztp_deploy.show.seen import Seen, seen_by_model
from ztp_deploy.show.stages import stage_pictures


def test_counts_of_zero_tprune_are_the_plans(pruned):
    seen = seen_by_model(pruned, tiny.images(3))
    for image in range(3):
        before = set(range(PATCHES))
        for stage, done in zip(pruned.plan.stages, stage_pictures(seen, image), strict=True):
            assert (done.block, done.tokens_in, len(done.kept)) == (stage.block, stage.tokens_in, stage.tokens_out)
            assert list(done.dropped) == ["similarity", "importance"]
            similar, unimportant = (set(positions.tolist()) for positions in done.dropped.values())
            assert len(similar) == stage.static["similar"]
            assert len(unimportant) == stage.tokens_in - stage.tokens_out - stage.static["similar"]
            kept = set(done.kept.tolist())
            assert kept | similar | unimportant == before
            assert set(done.earlier.tolist()) == set(range(PATCHES)) - before
            # By the method's own account: S-dropped ones are at −1, and I drops the lowest of the rest.
            heat = done.heat
            assert {p for p in before if np.isnan(heat[p])} == similar
            assert max(heat[p] for p in unimportant) <= min(heat[p] for p in kept)
            assert done.heat_name == "importance"
            before = kept


def test_similarity_is_told_from_importance_by_the_stages_own_scores(pruned):
    images = tiny.images(2)
    with torch.inference_mode():
        outputs = pruned.run(torch.from_numpy(images))
    scores = [stage["score"].numpy() for stage in outputs.scores]
    for image in range(2):
        for index, done in enumerate(stage_pictures(seen_by_model(pruned, images), image)):
            entering = outputs.kept[index - 1][image].numpy() if index else np.arange(PATCHES)
            assert set(done.dropped["similarity"].tolist()) == set(entering[scores[index][image] < 0].tolist())


@pytest.mark.parametrize("method, reason", [("evit", "class_attention"), ("ats", "sampled"), ("slice", UNSCORED)])
def test_other_methods_have_their_own_reasons(model, method, reason):
    seen = seen_by_model(pruned_by(model, method), tiny.images(1))
    for stage, done in zip(seen.plan.stages, stage_pictures(seen), strict=True):
        assert list(done.dropped) == [reason]
        assert len(done.kept) + len(done.dropped[reason]) == done.tokens_in == stage.tokens_in
        assert (done.heat is None) == (method == "slice")
    assert [note[:5] for note in seen.notes] == (["slice"] if method == "slice" else [])


def test_groups_are_those_of_the_assignment(model):
    images = tiny.images(2)
    pruned = pruned_by(model, "tome")
    traces = ztp.trace_tokens(pruned, torch.from_numpy(images))
    seen = seen_by_model(pruned, images)
    for image in range(2):
        for stage, done, trace in zip(pruned.plan.stages, stage_pictures(seen, image), traces, strict=True):
            carried = trace.assignment[image].tolist()
            together = [[p for p in range(PATCHES) if carried[p] == token] for token in range(stage.tokens_out)]
            assert sorted(done.groups) == sorted(group for group in together if len(group) > 1)
            assert (done.dropped, done.heat, len(done.kept)) == ({}, None, stage.tokens_out)
            numbers = stage_numbers(done)
            assert numbers["groups"] == done.groups


def test_merging_methods_drop_too_and_fused_tokens_go_on(model):
    seen = seen_by_model(pruned_by(model, "diffrate", ratio=0.5, options={"pruned": 0.5}), tiny.images(1))
    done = stage_pictures(seen)
    assert set().union(*(stage.dropped for stage in done)) == {"importance"}
    for stage in done:
        gone = sum(map(len, stage.dropped.values())) + len(stage.earlier)
        assert gone + (stage.carried >= 0).sum() == PATCHES
        assert np.isnan(stage.heat).sum() == len(stage.earlier)
    seen = seen_by_model(pruned_by(model, "evit", ratio=0.6, options={"fuse": True}), tiny.images(1))
    for index, stage in enumerate(stage_pictures(seen)):
        assert stage.dropped == {}
        assert PATCHES + index in stage.kept  # the token made anew
        assert np.isfinite(stage.heat).all()


def test_dropping_what_the_scores_would_merge_is_against_them(model):
    own = seen_by_model(pruned_by(model, "diffrate", ratio=0.5, options={"pruned": 0.5}), tiny.images(1))
    [pair, *_] = stage_pictures(own)[0].groups
    joined = next(p for p in pair if p not in own.kept[0][0])
    lost = own.assignment[0].copy()
    lost[0, joined] = -1
    seen = Seen(own.plan, own.kept, [lost, *own.assignment[1:]], own.audited, own.geometry)
    assert stage_pictures(seen)[0].dropped[CONTRARY].tolist() == [joined]


def test_masked_slots_are_out_and_counted_as_such(model):
    options = {"form": "masked", "gate_scale": 3.0, "gate_center": 0.5}
    seen = seen_by_model(pruned_by(model, "avit", ratio=1.0, options=options), tiny.images(1))
    before = PATCHES
    for index, done in enumerate(stage_pictures(seen)):
        alive = seen.kept[index][0][seen.kept[index][0] >= 0]
        assert done.kept.tolist() == alive.tolist()
        assert done.tokens_in == before
        gone = sum(map(len, done.dropped.values()))
        assert (len(done.kept) + gone, set(done.dropped) <= {"halted"}) == (before, True)
        # The scores count the class token, which is no patch: one slot off, this would not hold.
        assert (done.heat[done.kept] < avit.THRESHOLD).all()
        assert all((done.heat[positions] >= avit.THRESHOLD).all() for positions in done.dropped.values())
        before = len(done.kept)
    assert 0 < before < PATCHES


def test_images_are_run_one_by_one(pruned):
    images = tiny.images(2)
    both, second = seen_by_model(pruned, images), seen_by_model(pruned, images[1:])
    for ours, theirs in zip(both.kept, second.kept, strict=True):
        assert (ours[1] == theirs[0]).all()
