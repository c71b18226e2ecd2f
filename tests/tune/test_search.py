"""The study: the uniform plan first, the same trials after an interruption, no mixing of searches."""

from __future__ import annotations

import pytest

from ztp_deploy.errors import BadRequest
from ztp_deploy.evidence.accuracy import wilson
from ztp_deploy.tune.cost import flop_share
from ztp_deploy.tune.damage import Damage
from ztp_deploy.tune.search import STUDY_FILE, Trial, finalists, finished, open_study, run_trials
from ztp_deploy.tune.space import Space

NAME, SHARE = "vit_digits", 0.65
MARK = {"model": NAME, "budget": "flops=0.65"}


def damage(plan):
    """Less the later the first stage, so that there is something to find."""
    return Damage(images=8, mean_kl=1 / plan.stages[0].block + 1e-3 * plan.counts[-1], agreement=wilson(7, 8))


@pytest.fixture(scope="module")
def space(loaded):
    return Space(loaded, "zero_tprune", dict.fromkeys(range(1, 9), 3))


@pytest.fixture(scope="module")
def cost(space):
    return flop_share(space.geometry)


def search(folder, space, cost, trials, seed=0, damage=damage):
    uniform = space.uniform(cost, SHARE, SHARE)
    return run_trials(open_study(folder, MARK), space, uniform, cost, SHARE, damage, trials=trials, seed=seed)


@pytest.fixture(scope="module")
def whole(space, cost, tmp_path_factory):
    """A search of 16 trials in one go: ten at random, then the sampler's own."""
    return search(tmp_path_factory.mktemp("whole"), space, cost, 16)


def test_the_uniform_plan_is_trial_0(whole, space, cost):
    assert whole[0].plan == space.uniform(cost, SHARE, SHARE)
    assert whole[0].params == space.uniform_params()
    assert [trial.number for trial in whole] == [*range(16)]
    for trial in whole:
        if trial.plan is not None:
            assert trial.cost == trial.plan.flops.share <= SHARE
            assert trial.damage == damage(trial.plan)


def test_the_same_seed_gives_the_same_trials_and_another_others(whole, space, cost, tmp_path):
    assert search(tmp_path / "again", space, cost, 16) == whole
    other = search(tmp_path / "other", space, cost, 3, seed=1)
    assert other[0] == whole[0]
    assert other[1].params != whole[1].params


def test_an_interrupted_search_goes_on_as_if_it_had_not_been(whole, space, cost, tmp_path):
    """Stopped twice: between trials, and in the middle of one."""
    assert search(tmp_path, space, cost, 4) == whole[:4]
    seen = 0

    def interrupted(plan):
        nonlocal seen
        seen += 1
        if seen == 9:
            raise KeyboardInterrupt
        return damage(plan)

    with pytest.raises(KeyboardInterrupt):
        search(tmp_path, space, cost, 16, damage=interrupted)
    held = len(finished(open_study(tmp_path, MARK)))
    assert 4 < held < 16
    assert search(tmp_path, space, cost, 16) == whole
    assert search(tmp_path, space, cost, 2) == whole[:2]  # fewer than there are: the first ones


def test_a_trial_that_was_killed_is_begun_anew(whole, space, cost, tmp_path):
    search(tmp_path, space, cost, 4)
    open_study(tmp_path, MARK).ask(space.distributions())  # what a killed process leaves behind: never told
    assert search(tmp_path, space, cost, 12) == whole[:12]


def test_a_folder_of_another_search_is_refused(space, cost, tmp_path):
    search(tmp_path, space, cost, 1)
    with pytest.raises(BadRequest, match=r"other budget: budget was flops=0\.65, now it is flops=0\.5"):
        open_study(tmp_path, MARK | {"budget": "flops=0.5"})
    with pytest.raises(BadRequest, match="other weights"):
        open_study(tmp_path, MARK | {"weights": "abc"})
    assert len(finished(open_study(tmp_path, MARK))) == 1


def test_a_file_that_is_no_study_is_refused(tmp_path):
    (tmp_path / STUDY_FILE).write_text("hello\nworld\n")
    with pytest.raises(BadRequest, match="is not a study"):
        open_study(tmp_path, MARK)


def test_plans_that_came_before_are_not_run_again(space, cost, tmp_path):
    runs = []

    def counted(plan):
        runs.append(str(plan.stages))
        return damage(plan)

    search(tmp_path, space, cost, 16, damage=counted)
    assert len(runs) == len(set(runs))


def test_finalists_are_the_uniform_plan_and_the_best_others(whole):
    chosen = finalists(whole, count=3)
    assert chosen[0] is whole[0]
    assert len({str(trial.plan.stages) for trial in chosen}) == len(chosen) == 4
    others = {
        str(trial.plan.stages): trial.damage.mean_kl
        for trial in whole[1:]
        if trial.plan and trial.plan.stages != whole[0].plan.stages
    }
    assert [trial.damage.mean_kl for trial in chosen[1:]] == sorted(others.values())[:3]
    twin = Trial(16, {}, whole[0].plan, whole[0].cost, Damage(images=8, mean_kl=0.0, agreement=wilson(8, 8)))
    assert twin not in finalists([*whole, twin])  # the uniform plan found again is no other
