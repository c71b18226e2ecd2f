"""`ztp tune` from end to end: choice, verdicts, what is written, the command line."""

from __future__ import annotations

import json
import re
from pathlib import Path

import numpy as np
import pytest
from safetensors.torch import save_file

import ztp_deploy as ztp
from tests.commands import typed
from ztp_deploy.cli.options import plan_request
from ztp_deploy.errors import BadRequest, GateFailed
from ztp_deploy.evidence.accuracy import image_kl, mean_kl
from ztp_deploy.plan import Plan
from ztp_deploy.planning import make_plan
from ztp_deploy.recipes import Recipe, read_recipe
from ztp_deploy.source import ModelSize
from ztp_deploy.tune import rounds, run
from ztp_deploy.tune.cost import Budget, Timing
from ztp_deploy.tune.damage import HeldOut, held_out, split
from ztp_deploy.tune.report import TuneReport, recipe_of, recipe_toml, show_tune
from ztp_deploy.tune.run import _conclude, tune
from ztp_deploy.workflow.progress import Silent
from ztp_deploy.workflow.requests import BuildRequest

from .conftest import NAME


@pytest.fixture(autouse=True)
def few_rounds(monkeypatch):
    """Voting is tried up to 4 rounds, so that the tests take no longer than they must."""
    monkeypatch.setattr(rounds, "GRID", (1, 2, 4))


def test_every_other_image_is_held_out():
    rows = split(80)
    assert rows.search == tuple(range(0, 80, 2))
    assert rows.held_out == tuple(range(1, 80, 2))
    assert rows.subset == tuple(range(0, 80, 8))
    assert split(16).subset == split(16).search  # a quarter of 8 would be too few
    with pytest.raises(BadRequest, match="15 images are too few"):
        split(15)


def test_kl_of_every_image_has_the_mean_that_accuracy_reports():
    generator = np.random.default_rng(0)
    one, other = generator.standard_normal((2, 5, 10))
    probabilities = lambda logits: np.exp(logits) / np.exp(logits).sum(axis=1, keepdims=True)  # noqa: E731
    p, q = probabilities(one), probabilities(other)
    assert image_kl(one, other) == pytest.approx((p * np.log(p / q)).sum(axis=1))
    assert mean_kl(one, other) == pytest.approx(image_kl(one, other).mean())


def test_a_search_writes_plan_recipe_record_and_picture(request_, capsys):
    request = request_()
    report = tune(request, Silent())
    folder = request.directory
    assert sorted(path.name for path in folder.iterdir() if not path.name.startswith("study")) == [
        *("pareto.png", "plan.json", "recipe.toml", "tune.json"),
    ]
    assert TuneReport.model_validate_json((folder / "tune.json").read_text()) == report
    assert json.loads((folder / "tune.json").read_text())["schema"] == "ztp.tune/1"
    assert report.command == "ztp_deploy.tune.run.tune"
    plan = Plan.from_json((folder / "plan.json").read_text())
    assert plan == report.winner.plan
    recipe = read_recipe(str(folder / "recipe.toml"))
    again = make_plan(NAME, recipe.method, keep=recipe.keep, sites=recipe.sites, options=recipe.options)
    assert (again.counts, again.stages) == (plan.counts, plan.stages)
    assert (folder / "pareto.png").read_bytes().startswith(b"\x89PNG")
    # The choice is made on the search images, the uniform plan among the candidates.
    assert report.winner.search.mean_kl <= report.uniform.search.mean_kl
    assert [stage.block for stage in report.uniform.plan.stages] == [2, 4, 6]
    assert 0.65 * 0.995 <= report.uniform.plan.flops.share <= 0.65
    assert report.trials[0].counts == report.uniform.plan.counts
    assert (report.subset_images, report.search_images, report.held_out_images) == (8, 8, 8)
    assert report.held_out.difference == pytest.approx(
        report.uniform.held_out.mean_kl - report.winner.held_out.mean_kl, abs=1e-12
    )
    assert [stage.block for stage in report.rounds] == [stage.block for stage in plan.stages]
    assert report.weights.startswith("file (")
    assert "/" not in report.weights
    show_tune(report, Path("my plans"), ["--weights", "my weights.pth"])
    assert capsys.readouterr().out.endswith(
        f"Next: ztp engine --model {NAME} --weights 'my weights.pth' --recipe 'my plans/recipe.toml'\n"
    )


def test_a_search_that_is_prolonged_equals_one_in_one_go(request_, tmp_path):
    tune(request_(trials=2), Silent())
    longer = tune(request_(trials=3), Silent())
    whole = tune(request_(trials=3, directory=tmp_path / "whole"), Silent())
    assert longer.trials == whole.trials
    assert longer.winner == whole.winner
    with pytest.raises(BadRequest, match="other budget"):
        tune(request_(budget="flops=0.7"), Silent())


def test_a_method_without_votes(request_):
    report = tune(request_(method="random", trials=3), Silent())
    assert report.rounds == ()
    assert set(report.trials[1].params) == set(report.trials[0].params)
    assert not any("similar" in trial.params for trial in report.trials)


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"weights": "random"}, "are random"),
        ({"budget": "memory=1"}, "is not a budget"),
        ({"method": "dynamicvit"}, "cannot be tuned"),
        ({"trials": 0}, "--trials 0"),
        ({"seed": -1}, "--seed -1"),
        ({"count": 4}, "4 images are too few"),
        ({"seconds": 0.0}, "not a time to measure"),
        ({"images": "no/such/folder"}, "is not a folder"),
    ],
)
def test_requests_that_cannot_be_met(request_, changes, message):
    with pytest.raises(BadRequest, match=message):
        tune(request_(**changes), Silent())


def test_a_checkpoint_with_another_head_is_tuned(request_, tmp_path):
    path = tmp_path / "five.safetensors"
    size = ModelSize(num_classes=5)
    save_file(ztp.load_model(NAME, weights="random", overrides=size).state_dict(), path)
    with pytest.raises(BadRequest, match="--num-classes 5"):
        tune(request_(weights=str(path)), Silent())
    report = tune(request_(weights=str(path), size=size, trials=1), Silent())
    assert len(report.trials) == 1


def test_too_few_pictures_are_refused(request_, photographs, tmp_path):
    few = tmp_path / "few"
    few.mkdir()
    for path in sorted(photographs.iterdir())[:9]:
        (few / path.name).write_bytes(path.read_bytes())
    with pytest.raises(BadRequest, match="9 images are too few"):
        tune(request_(images=few), Silent())


# --- latency budgets, with engines that keep to the count of multiply-accumulates --------------


def fake_timer(slower=0.0, dense=10.0, asked=None):
    """10 ms for the dense model; every plan in proportion, `slower` by that share where it is the winner."""

    def timer(plans, purpose):
        found = {}
        for role, plan in plans.items():
            if asked is not None:
                asked.append((purpose, role))
            median = dense * plan.flops.share * (1 + slower * (role == "winner"))
            faster = dense / median
            found[role] = Timing(
                median=median, low=median, high=median, over_dense=faster, over_dense_low=faster, over_dense_high=faster
            )
        return found

    return timer


def test_a_latency_budget_is_met_and_the_winner_measured(request_):
    asked = []
    # Blocks are priced without their stages' MLP: the proportional engines are a little slower than predicted.
    timer = fake_timer(slower=-0.1, asked=asked)
    report = tune(request_(budget="latency=7ms@batch2", trials=3), Silent(), timer=timer)
    assert [purpose for purpose, _ in asked].count("blocks") == 7
    assert asked[7:] == [("winner", "dense"), ("winner", "winner")]
    for trial in report.trials:
        if trial.cost is not None:
            assert 7 * 0.995 <= trial.cost <= 7
    [attempt] = report.attempts
    assert attempt.meets
    assert attempt.predicted == report.winner.cost
    assert attempt.measured.median == pytest.approx(9 * report.winner.plan.flops.share)
    assert report.blocks.dense.median == 10
    # Gone on with, blocks are not measured again.
    again = tune(request_(budget="latency=7ms@batch2", trials=3), Silent(), timer=fake_timer(slower=-0.1, asked=asked))
    assert [purpose for purpose, _ in asked].count("blocks") == 7
    assert (again.trials, again.winner) == (report.trials, report.winner)


def test_another_profile_or_other_code_is_another_search(request_, monkeypatch):
    """Blocks are measured once a study: those of other engines would price this one's plans."""
    tune(request_(budget="latency=7ms@batch2", trials=1), Silent(), timer=fake_timer(slower=-0.1))
    other = BuildRequest(settings={"threads": 1})
    with pytest.raises(BadRequest, match=r"other settings: settings was \{'threads': 0.*now it is \{'threads': 1"):
        tune(request_(budget="latency=7ms@batch2", trials=1, build=other), Silent(), timer=fake_timer())
    monkeypatch.setattr(run, "sources_sha256", lambda *rooms: f"{rooms[-1]}")
    with pytest.raises(BadRequest, match="other code"):
        tune(request_(budget="latency=7ms@batch2", trials=1), Silent(), timer=fake_timer())


def test_plans_that_miss_when_measured_are_said_to(request_):
    asked = []
    request = request_(budget="latency=7ms@batch2", trials=4)
    report = tune(request, Silent(), timer=fake_timer(slower=0.5, asked=asked))
    assert report.verdict == "misses the budget"
    assert report.winner is None
    assert len(report.attempts) == min(run.ATTEMPTS, len(report.finalists))
    assert not any(attempt.meets for attempt in report.attempts)
    assert not (request.directory / "plan.json").exists()
    with pytest.raises(GateFailed, match=r"ms per run when measured: latency=7ms@batch2"):
        report.require()


def test_the_next_plan_is_taken_where_the_best_misses(request_, monkeypatch):
    calls, ranked = [], []

    def timer(plans, purpose):
        calls.append(purpose)
        return fake_timer(slower=0.5 if calls.count("winner") == 1 else -0.1)(plans, purpose)

    def rank(*given, real=run._rank):
        ranked.extend(real(*given))
        return ranked

    monkeypatch.setattr(run, "_rank", rank)
    report = tune(request_(budget="latency=7ms@batch2", trials=4), Silent(), timer=timer)
    assert [one.search.mean_kl for one in ranked] == sorted(one.search.mean_kl for one in ranked)
    assert sorted(one.number for one in ranked) == sorted(report.finalists)
    assert [attempt.meets for attempt in report.attempts] == [False, True]
    assert [attempt.trial for attempt in report.attempts] == [one.number for one in ranked[:2]]
    assert (report.winner.trial, report.winner.search) == (ranked[1].number, ranked[1].search)
    assert report.winner.search.mean_kl > ranked[0].search.mean_kl


@pytest.mark.parametrize(
    "budget, timer, because",
    [
        ("latency=11ms@batch2", fake_timer(), r"already meets latency=11ms@batch2: it takes 10\.000 ms"),
        ("latency=7ms@batch2", lambda plans, purpose: same_time(plans), r"Even one token of 196 after block 2"),
    ],
)
def test_pruning_that_does_not_pay_is_said_before_a_search(request_, budget, timer, because):
    report = tune(request_(budget=budget), Silent(), timer=timer)
    assert report.verdict == "pruning does not pay here"
    assert re.search(because, report.because)
    assert (report.trials, report.winner, report.held_out) == ((), None, None)
    assert report.require() is report


def same_time(plans):
    """Engines that take 10 ms whatever they hold, and half a millisecond more where they select."""
    return {role: Timing(median=10.5 if role == "pruned" else 10.0, low=10, high=10.5) for role, plan in plans.items()}


def test_verdicts(request_):
    report = tune(request_(trials=1), Silent())
    flops, latency = Budget.parse("flops=0.65"), Budget.parse("latency=7ms@batch2")
    other = report.uniform.model_copy(update={"trial": 1})

    def verdict(low, high, winner=other, budget=flops, attempts=()):
        compared = HeldOut(images=8, difference=(low + high) / 2, low=low, high=high)
        return _conclude(budget, winner, compared, attempts).verdict

    assert verdict(0.01, 0.03) == "better than uniform"
    assert verdict(-0.01, 0.03) == "no better than uniform"
    assert verdict(-0.03, -0.01) == "no better than uniform"
    assert verdict(0.0, 0.0, report.uniform) == "no better than uniform"
    slow = Timing(median=9.9, low=9.8, high=10, over_dense=1.01, over_dense_low=0.99, over_dense_high=1.02)
    attempt = run.Attempt(trial=1, predicted=9.0, measured=slow, dense=slow, meets=True)
    assert verdict(0.01, 0.03, budget=latency, attempts=[attempt]) == "pruning does not pay here"
    fast = slow.model_copy(update={"over_dense": 1.2, "over_dense_low": 1.1})
    attempt = attempt.model_copy(update={"measured": fast})
    assert verdict(0.01, 0.03, budget=latency, attempts=[attempt]) == "better than uniform"


def test_held_out_differences_are_paired():
    """The spread between images is large, the difference on each is not: paired, it is certain."""
    base = np.array([1.0, 10.0, 100.0, 1000.0])
    found = held_out(base + np.array([0.1, 0.2, 0.1, 0.2]), base, seed=0)
    assert found.difference == pytest.approx(0.15)
    assert 0.1 - 1e-9 <= found.low <= found.high <= 0.2 + 1e-9


# --- recipes and the command line --------------------------------------------------------------


@pytest.mark.parametrize(
    "request_for",
    [
        {"flops": 0.653},
        {"ratio": 0.7, "options": {"rounds": [30, 8, 1], "similar": 0.3}},
        {"keep": [150, 150, 60], "sites": [2, 5, 7], "options": {"rounds": [3, 2, 1]}},
        {"keep": [100, 50], "sites": [4, 8], "method": "evit"},
    ],
)
def test_recipes_make_the_plan_again(request_for, tmp_path):
    plan = make_plan("deit_s", **request_for)
    path = tmp_path / "found.toml"
    path.write_text(recipe_toml(recipe_of(plan), Budget.parse("flops=0.65")))
    recipe = read_recipe(str(path))
    assert isinstance(recipe, Recipe)
    again = make_plan("deit_s", recipe.method, keep=recipe.keep, sites=recipe.sites, options=recipe.options)
    assert again.stages == plan.stages


def test_the_command_line(weights, photographs, tmp_path, monkeypatch, capsys):
    def ztp(*arguments: object) -> tuple[int, str, str]:
        return typed(monkeypatch, capsys, *arguments)

    monkeypatch.chdir(tmp_path)
    asked = ["tune", "--model", NAME, "--weights", weights, "--images", photographs, "--budget", "flops=0.65"]
    code, printed, progress = ztp(*asked, "--trials", 2, "--device", "cpu")
    assert code == 0, progress
    folder = "tuned/vit_digits--zero_tprune--flops0.65"
    assert "Verdict: " in printed
    assert "uniform" in printed
    assert f"--recipe {folder}/recipe.toml" in printed
    assert (tmp_path / folder / "plan.json").is_file()
    code, printed, _ = ztp(*asked, "--trials", 2, "--device", "cpu", "--json")
    report = json.loads(printed)
    assert code == 0
    assert report["schema"] == "ztp.tune/1"
    assert report["command"] == " ".join(["ztp", *map(str, asked), "--trials 2 --device cpu --json"])
    assert len(report["trials"]) == 2
    # What `ztp engine --recipe` would plan.
    again = plan_request(model=NAME, recipe=f"{folder}/recipe.toml").plan(NAME)
    assert again.counts == [stage["tokens_out"] for stage in report["winner"]["plan"]["stages"]]
    code, _, refusal = ztp(*asked, "--num-classes", 7)
    assert code == 2
    assert "instead of (7," in refusal
    missed = TuneReport.model_validate(report | {"verdict": "misses the budget"})
    monkeypatch.setattr(run, "tune", lambda *arguments: missed)
    code, printed, _ = ztp(*asked, "--json")
    assert (code, json.loads(printed)["verdict"]) == (1, "misses the budget")  # one object, also of a failed gate
    code, _, refusal = ztp(*asked, "--backend", "onnxruntime")
    assert code == 2
    assert "--backend makes no sense with --budget flops=0.65" in " ".join(refusal.split())
