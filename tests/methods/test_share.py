"""Ratios as FLOP shares, for methods with a number per block."""

from __future__ import annotations

from fractions import Fraction

import pytest

from tests import golden
from ztp_deploy.methods.share import (
    STEPS,
    counts_after,
    counts_at_share,
    falling,
    one_share_counts,
    spread,
    zero_tprune_share,
)
from ztp_deploy.models import describe
from ztp_deploy.plan import Stage, count_flops, floor_counts, kept_chain
from ztp_deploy.planning import make_plan

DEIT_S = describe("deit_s")[1]


def stages_for(counts):
    return [
        Stage(block=block, place="after_attention", tokens_in=before, tokens_out=after)
        for block, before, after in kept_chain(196, range(1, 13), counts)
    ]


def counts_for(total):
    return counts_after(196, spread(total, 12), lambda tokens: tokens // 2)


@pytest.mark.parametrize("ratio", [0.5, 0.7, 1.0])
def test_the_share_of_a_ratio_is_that_of_its_zero_tprune_plan(ratio):
    assert zero_tprune_share(DEIT_S, ratio) == make_plan("deit_s", ratio=ratio).flops.share


@pytest.mark.parametrize("share", [0.3, 0.62, 0.9, 1.0])
def test_no_other_total_is_nearer(share):
    def distance(counts):
        return abs(count_flops(DEIT_S, stages_for(counts)).share - share)

    found = counts_at_share(DEIT_S, share, 195, counts_for, stages_for)
    assert distance(found) == min(distance(counts_for(total)) for total in range(196))


def test_a_share_out_of_reach_ends_at_the_last_total():
    assert counts_at_share(DEIT_S, 0.01, 30, counts_for, stages_for) == counts_for(30)


def test_numbers_differ_by_at_most_one_larger_first():
    assert spread(10, 4) == [3, 3, 2, 2]
    assert spread(156, 12) == [13] * 12


def test_falling_numbers_are_the_official_ones():
    assert falling(Fraction(16), 12) == golden.CASES["tome_tiny_dec8"]["arguments"]["r_per_layer"]
    assert falling(Fraction(5), 1) == [5]


def test_no_block_removes_more_than_it_may():
    official = golden.arrays("tome_tiny_r40_capped_noprop")["token_count"]
    assert counts_after(196, [40] * 12, lambda tokens: tokens // 2) == (official - 1).tolist()
    assert counts_after(196, [40] * 4, lambda tokens: tokens) == [156, 116, 76, 36]


@pytest.mark.parametrize("ratio", [0.5, 0.7])
def test_one_share_for_every_stage_is_the_nearest(ratio):
    def counts_of(number):
        return floor_counts(196, 12, number / STEPS)

    found = one_share_counts(DEIT_S, 12, ratio, stages_for)
    wanted = zero_tprune_share(DEIT_S, ratio)
    distances = {
        tuple(counts): abs(count_flops(DEIT_S, stages_for(counts)).share - wanted)
        for counts in map(counts_of, range(1, STEPS + 1, 7))
    }
    assert abs(count_flops(DEIT_S, stages_for(found)).share - wanted) <= min(distances.values())
    assert one_share_counts(DEIT_S, 12, 1.0, stages_for) == [196] * 12
