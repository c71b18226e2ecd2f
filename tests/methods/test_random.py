"""The random control: drawn once, the same for every image, everywhere and for good."""

from __future__ import annotations

import numpy as np
import pytest
import torch

import ztp_deploy as ztp
from tests import runs, tiny
from ztp_deploy.errors import BadRequest
from ztp_deploy.evidence.selection import differences
from ztp_deploy.methods import parse_options, random
from ztp_deploy.models import host_of
from ztp_deploy.plan import Stage
from ztp_deploy.planning import make_plan
from ztp_deploy.pruning.prune import prune


@pytest.fixture(scope="module")
def pruned(model):
    return prune(model, make_plan(model, "random", ratio=0.6))


def test_counts_and_sites_are_zero_tprunes():
    plan, other = make_plan("deit_s", "random", ratio=0.7), make_plan("deit_s", ratio=0.7)
    assert plan.counts == other.counts == [137, 95, 66]
    assert [(stage.block, stage.place) for stage in plan.stages] == [
        (stage.block, stage.place) for stage in other.stages
    ]
    assert plan.flops == other.flops


def test_the_draw_is_fixed():
    """Figures published with a seed must be found again on every machine."""
    stage = Stage(block=3, place="after_block", tokens_in=12, tokens_out=5)
    assert random.draw(stage, 0) == [2, 3, 7, 8, 9]
    assert random.draw(stage, 1) == [0, 2, 3, 10, 11]
    assert random.draw(stage.model_copy(update={"block": 6}), 0) == [2, 4, 5, 6, 9]


def test_every_token_is_as_likely():
    stage = Stage(block=3, place="after_block", tokens_in=20, tokens_out=5)
    drawn = np.array([random.draw(stage, seed) for seed in range(2000)])
    assert (np.diff(drawn, axis=1) > 0).all()
    often = np.bincount(drawn.flatten(), minlength=20) / 2000
    assert np.abs(often - 0.25).max() < 0.04  # four standard deviations


def test_all_images_keep_the_same_tokens(pruned, model):
    images = torch.from_numpy(tiny.images(3))
    first = ztp.trace_tokens(pruned, images)
    for trace, stage in zip(first, pruned.plan.stages, strict=True):
        assert (trace.kept == trace.kept[0]).all()
        assert trace.kept.shape[1] == stage.tokens_out
        assert trace.kept[0].tolist() != list(range(stage.tokens_out))
    again = ztp.trace_tokens(prune(model, make_plan(model, "random", ratio=0.6)), images)
    other = ztp.trace_tokens(prune(model, make_plan(model, "random", ratio=0.6, options={"seed": 1})), images)
    assert all(torch.equal(one.kept, two.kept) for one, two in zip(first, again, strict=True))
    assert not any(torch.equal(one.kept, two.kept) for one, two in zip(first, other, strict=True))


@pytest.mark.parametrize("options", [{"seed": -1}, {"seed": 0.5}, {"weights": "random"}])
def test_wrong_options_are_named(options):
    with pytest.raises(BadRequest, match=next(iter(options))):
        parse_options("random", options)


def test_forced_runs_reproduce(pruned, model):
    own = runs.observe(pruned, tiny.images(2))
    other = runs.observe(prune(model, make_plan(model, "random", ratio=0.6, options={"seed": 1})), tiny.images(2))
    for wanted in (own, other):
        forced = runs.observe(pruned, tiny.images(2), wanted.forced(36))
        np.testing.assert_allclose(forced.logits, wanted.logits, rtol=1e-4, atol=1e-5)
        assert all((forced.destinations(i, 36) == wanted.destinations(i, 36)).all() for i in range(3))


def test_other_tokens_are_always_a_selection_fault(model):
    plan = make_plan(model, "random", keep=[20], sites=[2])
    observation = runs.observe(prune(model, plan), tiny.images(1))
    geometry = host_of(model).geometry
    assert differences(observation, observation, observation, plan, geometry, 1e-5) == []
    candidate = runs.copy_of(observation)
    inside = int(candidate.kept[0][0, 0])
    outside = min(set(range(36)) - set(candidate.kept[0][0].tolist()))
    runs.exchange(candidate, inside, outside)
    [found] = differences(observation, candidate, candidate, plan, geometry, 0.25)
    assert (found.cause, found.tokens) == ("selection", sorted([inside, outside]))


def test_the_trace_and_the_engine_do_the_same(pruned, model, tmp_path):
    runs.assert_traces(pruned, tmp_path)
    assert runs.engine_report(pruned, model, tmp_path).require().passed
