"""Budgets, and block times taken from engines."""

from __future__ import annotations

import numpy as np
import pytest

from tests.runs import Listening
from ztp_deploy.errors import BadRequest
from ztp_deploy.models import describe
from ztp_deploy.planning import make_plan
from ztp_deploy.tune.cost import Budget, Timing, engine_timer, flop_share, measure_blocks, take_apart
from ztp_deploy.workflow.progress import Clock
from ztp_deploy.workflow.requests import BuildRequest


def test_budgets_are_read():
    assert Budget.parse("flops=0.65") == Budget(kind="flops", limit=0.65)
    assert Budget.parse("latency=12ms@batch8") == Budget(kind="latency", limit=12, batch=8)
    assert Budget.parse("latency=0.5ms@batch1").limit == 0.5
    for text in ("flops=0.65", "latency=12ms@batch8"):
        assert str(Budget.parse(text)) == text


@pytest.mark.parametrize(
    "text",
    [
        *("", "0.65", "flops=1", "flops=1.2", "flops=0", "flops=.0", "flops=nan", "memory=2GiB"),
        *("latency=12", "latency=12ms", "latency=0ms@batch1", "latency=12ms@batch0"),
    ],
)
def test_what_is_no_budget_is_refused(text):
    with pytest.raises(BadRequest, match=r"flops=0\.65.*latency=12ms@batch8"):
        Budget.parse(text)


def test_flop_shares_are_the_plans_own():
    plan = make_plan("deit_s", ratio=0.7)
    assert flop_share(describe("deit_s")[1])(plan.stages) == plan.flops.share


def test_block_times_come_back_out_of_engine_times():
    """Engines that keep to the model exactly: a block takes 0.1 ms and 0.01 ms a token, a selection 0.4 ms."""
    geometry = describe("deit_s")[1]
    block = lambda tokens: 0.1 + 0.01 * tokens  # noqa: E731
    share = take_apart(geometry, times_of(dense=1, pruned=1, twin=1), 1)
    ends = 12 * block(196) / (1 - share.ends) * share.ends

    def slice_twin(count):
        return ends + (1 - share.mlp) * block(196) + (11 + share.mlp) * block(count)

    twins = {str(count): slice_twin(count) for count in (29, 58, 98, 147)}
    found = take_apart(geometry, times_of(dense=ends + 12 * block(196), pruned=21.2, twin=20.0, **twins), 3)
    assert found.tokens == (29, 58, 98, 147, 196)
    assert found.block == pytest.approx([block(count) for count in found.tokens])
    assert found.selection == pytest.approx(0.4)
    assert found.predict(geometry, ()) == pytest.approx(ends + 12 * block(196))
    plan = make_plan("deit_s", ratio=0.7)  # 137, 95 and 66 after blocks 3, 6 and 9
    mixed = lambda before, after: (1 - share.mlp) * block(before) + share.mlp * block(after)  # noqa: E731
    expected = ends + 2 * block(196) + 2 * block(137) + 2 * block(95) + 3 * block(66)
    expected += mixed(196, 137) + mixed(137, 95) + mixed(95, 66) + 3 * 0.4
    assert found.predict(geometry, plan.stages) == pytest.approx(expected)


def test_noise_makes_no_block_faster_for_more_tokens():
    times = times_of(dense=10, pruned=5, twin=6, **{"98": 9, "147": 7})
    found = take_apart(describe("deit_s")[1], times, 3)
    assert list(found.block) == sorted(found.block)
    assert found.block[0] == found.block[1]
    assert found.selection == 0  # a twin slower than its plan is noise as well


def test_plans_become_engines_that_are_timed(loaded, tmp_path):
    build = BuildRequest(
        backend="torchscript", device="cpu", batch="2", export_root=tmp_path / "x", engines_root=tmp_path / "e"
    )
    plans = {"dense": make_plan(loaded, "dense"), "7": make_plan(loaded, "slice", keep=[7], sites=[1])}
    monitor = Listening()
    times = engine_timer(loaded, build, 2, 0.2, Clock(monitor), "ztp tune", tmp_path)(plans, "blocks")
    assert [*times] == ["dense", "7"]
    assert (times["dense"].over_dense, times["dense"].inconclusive) == (1.0, None)
    for timing in times.values():
        assert 0 < timing.low <= timing.median <= timing.high
    assert times["7"].over_dense_low <= times["7"].over_dense <= times["7"].over_dense_high
    assert len([step for step in monitor.steps if step.startswith("build")]) == 2


def test_what_is_measured_for_blocks(loaded):
    asked = {}

    def timer(plans, purpose):
        asked.update(plans)
        return times_of(**{role: 1 + plan.flops.share for role, plan in plans.items()})

    found = measure_blocks(loaded, "zero_tprune", timer)
    assert [*asked] == ["dense", "29", "58", "98", "147", "pruned", "twin"]
    assert [(plan.method, plan.counts) for plan in asked.values()][1] == ("slice", [29])
    assert asked["twin"].counts == asked["pruned"].counts
    assert found.tokens == (29, 58, 98, 147, 196)
    assert np.all(np.diff(found.block) > 0)


def times_of(**medians: float) -> dict[str, Timing]:
    """Exact times by role, "dense" among them."""
    return {
        role: Timing(
            median=median,
            low=median,
            high=median,
            over_dense=medians["dense"] / median,
        )
        for role, median in medians.items()
    }
