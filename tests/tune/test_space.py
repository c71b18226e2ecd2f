"""From a shape to a plan: the factor that meets the budget, and what cannot be tuned."""

from __future__ import annotations

import math

import numpy as np
import optuna
import pytest
from optuna.distributions import CategoricalDistribution, FloatDistribution
from optuna.samplers import RandomSampler

from ztp_deploy import methods
from ztp_deploy.errors import BadRequest
from ztp_deploy.methods.zero_tprune import Options
from ztp_deploy.plan import FLOP_SHARE_TOLERANCE
from ztp_deploy.planning import make_plan
from ztp_deploy.tune.cost import flop_share
from ztp_deploy.tune.space import Shape, Space, fit, search_of

TUNED = ("zero_tprune", "evit", "random")


def test_counts_of_a_shape():
    """At λ = −ln 0.7 and strength 1 a stage keeps ⌊0.7 n⌋; at strength 2 it keeps ⌊0.49 n⌋."""
    factor = -math.log(0.7000001)
    assert Shape((3, 6, 9), (1.0, 1.0, 1.0)).counts(196, factor) == [137, 95, 66]
    assert Shape((3, 6), (2.0, 1.0)).counts(196, factor) == [96, 67]
    assert Shape((3,), (0.1,)).counts(196, 0.0) == [196]


def test_fit_takes_the_largest_counts_within_the_limit():
    """The cost is the sum of counts: rounding leaves one token over, which the last stage gets."""
    shape = Shape((1, 2), (1.0, 1.0))
    total = lambda counts: float(sum(counts))  # noqa: E731
    assert fit(shape, 100, total, 75.0) == [50, 25]
    assert fit(shape, 100, total, 76.0) == [50, 26]
    assert sum(fit(shape, 100, total, 151.0)) == 151
    assert fit(shape, 100, total, 1.5) is None  # one token a stage costs 2
    assert fit(shape, 100, lambda counts: 10.0 * sum(counts), 759.0) is None  # 750 is more than 0.5 % below


def test_fit_never_gives_a_stage_more_than_reaches_it():
    counts = fit(Shape((1, 2), (1.0, 0.1)), 10, lambda counts: float(counts[0] + 1e-3 * counts[1]), 5.006)
    assert counts == [5, 5]


@pytest.mark.parametrize("method", TUNED)
def test_every_candidate_meets_the_budget_and_comes_within_half_a_percent(method, loaded):
    space = Space(loaded, method, dict.fromkeys(range(1, 9), 3))
    cost = flop_share(space.geometry)
    study = optuna.create_study(sampler=RandomSampler(seed=0))
    feasible = 0
    for share in (0.5, 0.65, 0.8):
        for _ in range(10):
            params = study.ask(space.distributions()).params
            plan = space.plan(params, cost, share)
            if plan is None:
                continue
            feasible += 1
            assert share * (1 - FLOP_SHARE_TOLERANCE) <= plan.flops.share <= share
            assert {stage.block for stage in plan.stages} <= set(space.shape(params).sites)
            assert plan.method == method
    assert feasible >= 15  # of 30: enough that the check is not empty


def test_the_uniform_plan_is_make_plans_own_where_that_is_within_the_budget(loaded):
    space = Space(loaded, "zero_tprune", {})
    cost = flop_share(space.geometry)
    below = above = 0
    for share in np.linspace(0.5, 0.8, 13).round(3).tolist():
        nearest = make_plan(loaded, flops=share)
        uniform = space.uniform(cost, share, share)
        assert share * (1 - FLOP_SHARE_TOLERANCE) <= uniform.flops.share <= share
        if nearest.flops.share <= share:
            assert uniform == nearest
            below += 1
        else:
            assert [stage.block for stage in uniform.stages] == [2, 4, 6]
            above += 1
    assert below
    assert above


def test_parameters_become_options():
    space = Space("deit_s", "zero_tprune", {3: 4, 6: 7})
    params = space.uniform_params() | {"stages": 3, "site_3": 6, "similar": 0.30000000000000004}
    assert space.shape(params).sites == (3, 6)  # twice block 6 is one stage
    assert space.options(params | {"rounds": "published"}, (3, 6)) == {"similar": 0.3, "rounds": [30, 8]}
    assert space.options(params | {"rounds": "one"}, (3, 6))["rounds"] == [1, 1]
    assert space.options(params | {"rounds": "enough"}, (3, 6))["rounds"] == [4, 7]
    assert Options.model_validate(space.options(params, (3, 6)))
    assert Space("deit_s", "evit", {}).options(params, (3, 6)) == {}


def test_blocks_that_may_carry_a_stage():
    assert Space("deit_s", "zero_tprune", {}).blocks == range(1, 12)  # after a block
    assert Space("deit_s", "evit", {}).blocks == range(2, 13)  # inside one


@pytest.mark.parametrize("method", ["dense", *(name for name in methods.METHODS if name not in TUNED)])
def test_methods_without_freedom_are_refused(method):
    with pytest.raises(BadRequest, match=rf"{method} cannot be tuned: it.*zero_tprune, evit, random"):
        search_of(method)


def test_unknown_methods_are_refused():
    with pytest.raises(BadRequest, match="zero_tprune"):
        search_of("zero_prune")


@pytest.mark.parametrize("method", TUNED)
def test_what_is_usual_can_be_chosen_and_comes_to_the_defaults(method):
    """The uniform plan is one of the search's own, and that of the method's default options."""
    space = Space("deit_s", method, {})
    params, distributions = space.uniform_params(), space.distributions()
    assert params.keys() == distributions.keys()
    assert all(distributions[name]._contains(distributions[name].to_internal_repr(params[name])) for name in params)
    sites = list(space.shape(params).sites)
    keep = [150, 100, 50]
    chosen = make_plan("deit_s", method, keep=keep, sites=sites, options=space.options(params, sites))
    assert chosen.stages == make_plan("deit_s", method, keep=keep, sites=sites).stages


def test_a_choice_of_a_method_is_searched():
    """What a method's module names is all it takes."""
    space = Space("deit_s", "zero_tprune", {})
    distributions = space.distributions()
    assert distributions["similar"] == FloatDistribution(0.0, 1.0, step=0.1)
    assert distributions["rounds"] == CategoricalDistribution(("one", "published", "enough"))
    assert distributions.keys() - Space("deit_s", "evit", {}).distributions().keys() == {"similar", "rounds"}


def test_budgets_that_no_uniform_plan_meets_are_refused(loaded):
    space = Space(loaded, "zero_tprune", {})
    cost = flop_share(space.geometry)
    with pytest.raises(BadRequest, match=r"cannot be reached"):
        space.uniform(cost, 0.05, 0.05)
    with pytest.raises(BadRequest, match=r"0\.05 cannot be met: .* one token a stage still costs 0\.2"):
        space.uniform(cost, 0.05, None)
