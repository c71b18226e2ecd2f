"""Selection parity on constructed runs: each cause is told from the others."""

from __future__ import annotations

import numpy as np
import pytest

from tests import tiny
from tests.runs import copy_of, observe
from ztp_deploy.evidence.selection import Observation, differences, same_destinations
from ztp_deploy.models import host_of
from ztp_deploy.planning import make_plan
from ztp_deploy.pruning.prune import prune

BOUND = 1e-5


@pytest.fixture(scope="module")
def setting():
    """One image's honest run, with its plan and geometry."""
    model = tiny.model()
    plan = make_plan(model, ratio=0.7)
    return observe(prune(model, plan), tiny.images(1)), plan, host_of(model).geometry


def swap_at_the_cut(observation, keep, gap):
    """Gives the first dropped token the last kept one's score plus a relative gap; returns both slots."""
    order = np.argsort(-observation.scores["score_1"][0], kind="stable")
    inside, outside = order[keep - 1], order[keep]
    score = observation.scores["score_1"][0]
    score[inside], score[outside] = score[inside], score[inside] * (1 + gap)
    slot = np.flatnonzero(observation.kept[0][0] == inside)
    observation.kept[0][0, slot] = outside
    return int(inside), int(outside)


def test_equal_runs_have_no_difference(setting):
    observation, plan, geometry = setting
    assert differences(observation, copy_of(observation), copy_of(observation), plan, geometry, BOUND) == []
    shuffled = copy_of(observation)
    shuffled.kept[0][:] = shuffled.kept[0][:, ::-1]
    assert same_destinations(observation, shuffled, 0, 36).all()


def test_other_tokens_from_the_right_scores_is_a_selection_fault(setting):
    observation, plan, geometry = setting
    candidate = copy_of(observation)
    out = sorted(set(range(36)) - set(candidate.kept[0][0].tolist()))[0]
    gone = int(candidate.kept[0][0, 0])
    candidate.kept[0][0, 0] = out
    difference = differences(observation, candidate, candidate, plan, geometry, BOUND)[0]
    assert (difference.stage, difference.cause) == (1, "selection")
    assert difference.tokens == sorted([out, gone])
    assert difference.gap > BOUND


@pytest.mark.parametrize("nonsense", [5000, -7])
def test_positions_that_are_none_are_a_selection_fault(setting, nonsense):
    observation, plan, geometry = setting
    candidate = copy_of(observation)
    gone = int(candidate.kept[0][0, 0])
    candidate.kept[0][0, 0] = nonsense
    assert not same_destinations(observation, candidate, 0, 36).all()
    difference = differences(observation, candidate, candidate, plan, geometry, BOUND)[0]
    assert (difference.stage, difference.cause, difference.tokens) == (1, "selection", [gone])


def test_the_right_tokens_for_wrong_scores_is_a_weight_fault(setting):
    observation, plan, geometry = setting
    candidate = copy_of(observation)
    inside, outside = swap_at_the_cut(candidate, 25, gap=0.01)
    difference = differences(observation, candidate, candidate, plan, geometry, BOUND)[0]
    assert (difference.stage, difference.cause, difference.decision) == (1, "weights", "importance")
    assert difference.tokens == sorted([inside, outside])


def test_a_gap_within_the_bound_is_a_near_tie(setting):
    observation, plan, geometry = setting
    reference, candidate = copy_of(observation), copy_of(observation)
    order = np.argsort(-reference.scores["score_1"][0], kind="stable")
    inside, outside = order[24], order[25]
    reference.scores["score_1"][0][outside] = reference.scores["score_1"][0][inside] * (1 - 1e-6)
    candidate.scores["score_1"][0][outside] = reference.scores["score_1"][0][outside]
    swap_at_the_cut(candidate, 25, gap=1e-6)
    difference = differences(reference, candidate, candidate, plan, geometry, BOUND)[0]
    assert (difference.cause, difference.decision) == ("near_tie", "importance")
    assert 0 < difference.gap <= 2e-6
    assert differences(reference, candidate, candidate, plan, geometry, 1e-8)[0].cause == "weights"


def test_the_first_decision_that_flips_is_named(setting):
    """A head's variance moved over a bound explains everything after it."""
    observation, plan, geometry = setting
    candidate = copy_of(observation)
    candidate.scores["pre_spread_1"][0, :, 0] *= 10
    swap_at_the_cut(candidate, 25, gap=0.01)
    difference = differences(observation, candidate, candidate, plan, geometry, BOUND)[0]
    assert difference.decision == "pre_heads_below"
    assert difference.cause == "weights"


def test_flattened_scores_are_no_near_ties(setting):
    """An engine whose scores are all but equal is near every cut; how clear the choice was, the reference says."""
    observation, plan, geometry = setting
    candidate = copy_of(observation)
    candidate.scores["score_1"][0] = 1 + 1e-7 * np.arange(36)
    dropped = candidate.scores["similarity_1"]
    assert dropped.size  # similarity still takes its share; importance then keeps the last of the rest
    before = observation.scores["score_1"][0]
    gone = before <= 0  # what similarity took out
    candidate.scores["score_1"][0][gone] = before[gone]
    candidate.kept[0][0] = np.argsort(-candidate.scores["score_1"][0], kind="stable")[:25]
    [first, *_] = differences(observation, candidate, candidate, plan, geometry, 1e-3)
    assert (first.stage, first.cause, first.decision) == (1, "weights", "importance")
    assert first.gap > 1e-3


def test_slot_order_does_not_matter(setting):
    """Engines may order kept tokens freely: the second stage's slots are compared by position."""
    observation, plan, geometry = setting
    candidate = copy_of(observation)
    candidate.kept[0][0] = candidate.kept[0][0][::-1]
    for name in ("pre_score_2", "score_2"):
        candidate.scores[name][0] = candidate.scores[name][0][::-1]
    # The similarity scores follow the ranking, which is unchanged.
    assert differences(observation, candidate, candidate, plan, geometry, BOUND) == []


def test_named_outputs_become_an_observation():
    one, two, joined = (np.array([[number]]) for number in range(3))
    values = {"logits": one, "kept_1": one, "kept_2": two, "merged_1": joined, "kept_share_1": two, "score_1": one}
    seen = Observation.of(values)
    assert (seen.logits, seen.kept, seen.merged, seen.scores) == (one, [one, two], [joined], values)
    with pytest.raises(KeyError, match="logits"):
        Observation.of({"kept_1": one})
