"""Voting rounds that are enough."""

from __future__ import annotations

import numpy as np
import torch

from ztp_deploy.planning import make_plan
from ztp_deploy.pruning.prune import prune
from ztp_deploy.tune import rounds
from ztp_deploy.tune.rounds import rounds_needed


def kept(*rows):
    return np.array(rows)


def test_rounds_needed_by_hand():
    """Two images that keep two tokens each: 4 rounds keep the final sets, in any order, 2 rounds three of four."""
    found = {
        1: kept([0, 1], [2, 3]),
        2: kept([5, 4], [6, 3]),
        4: kept([4, 5], [7, 6]),
        8: kept([5, 4], [6, 7]),
    }
    assert rounds_needed(found) == 4
    assert rounds_needed(found, share=0.75) == 2
    assert rounds_needed(found, share=0.5) == 2  # 1 round keeps none of them
    assert rounds_needed(found, share=0.0) == 1


def test_agreement_that_does_not_last_does_not_count():
    found = {1: kept([4, 5]), 2: kept([0, 1]), 4: kept([4, 5]), 8: kept([4, 5])}
    assert rounds_needed(found) == 4


def test_where_only_the_most_rounds_will_do():
    assert rounds_needed({1: kept([0]), 2: kept([1]), 3: kept([2])}) == 3
    assert rounds_needed({7: kept([0])}) == 7


def test_blocks_of_a_model_and_stages_of_a_plan(loaded):
    images = torch.from_numpy(np.random.default_rng(0).standard_normal((2, 3, 112, 112), dtype=np.float32))
    by_block = rounds.by_block(loaded, images)
    assert [*by_block] == [*range(1, 9)]
    assert set(by_block.values()) <= set(rounds.GRID)
    plan = make_plan(loaded, ratio=0.7, options={"rounds": 50})
    stages = rounds.of_plan(loaded, plan, images)
    assert [(stage.block, stage.rounds) for stage in stages] == [(2, 50), (4, 50), (6, 50)]
    # With the rounds that are enough the plan keeps what it kept with 50, as far as was promised.
    fewer = make_plan(loaded, ratio=0.7, options={"rounds": [stage.enough for stage in stages]})
    with torch.inference_mode():
        before, after = prune(loaded, plan).run(images).kept[0], prune(loaded, fewer).run(images).kept[0]
    same = sum(len(np.intersect1d(now, then)) for now, then in zip(before.numpy(), after.numpy(), strict=True))
    assert same >= 0.99 * before.numel()
    assert rounds.of_plan(loaded, make_plan(loaded, "random", ratio=0.7), images) == ()
