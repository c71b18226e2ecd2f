"""Studies: rows against the dense model and each other, with the intervals that their canvases give."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from ztp_deploy import models
from ztp_deploy.evidence.accuracy import paired_bootstrap
from ztp_deploy.plan import make_plan
from ztp_deploy.pruning.prune import prune
from ztp_deploy.reference import study


@pytest.fixture(scope="module")
def classifier():
    return models.load_model("vit_digits", weights="random")


@pytest.fixture(scope="module")
def made(classifier):
    entries = (study.LADDER[0], study.LADDER[-1])
    return study.run_study("ladder", "test", 24, shares=(0.65,), entries=entries, model=classifier, command="study")


def test_the_ladder_adds_one_part_of_the_method_at_a_time():
    options = [entry.options for entry in study.LADDER]
    assert [entry.name for entry in study.LADDER] == ["random", "WPR", "+ EIR", "+ VHF", "+ S-stage"]
    assert options[1] == {"heads": "mean", "variance_bounds": None, "similar": 0.0}
    assert options[2] == options[1] | {"heads": "rms"}
    for name, entries in study.STUDIES.items():
        assert len({entry.name for entry in entries}) == len(entries), name


@pytest.mark.parametrize("share", study.SHARES)
def test_every_entry_has_a_plan_at_every_share(classifier, share):
    for entries in study.STUDIES.values():
        for entry in entries:
            plan = make_plan(classifier, entry.method, flops=share, options=entry.options)
            assert plan.flops.share == pytest.approx(share, abs=0.005)


def test_rows_are_what_the_models_say(classifier, made):
    data = study.sheet("test", 24)
    dense = classifier(torch.from_numpy(data.images)).argmax(1).numpy()
    assert made.dense_top1 == (dense == data.labels).mean()
    assert made.digits == 24
    right = []
    for row, entry in zip(made.rows, (study.LADDER[0], study.LADDER[-1]), strict=True):
        plan = make_plan(classifier, entry.method, flops=0.65, options=entry.options)
        with torch.inference_mode():
            best = prune(classifier, plan)(torch.from_numpy(data.images)).argmax(1).numpy()
        right.append(best == data.labels)
        assert row.comparison.pruned.top1.hits == right[-1].sum()
        assert row.comparison.agreement.hits == (best == dense).sum()
        assert row.tokens == [196, *plan.counts]
    assert made.rows[0].ahead == (0.0, 0.0, 0.0)
    assert made.rows[1].ahead == paired_bootstrap(right[1].astype(float) - right[0], data.digits)


@pytest.mark.parametrize(
    "ahead, verdict",
    [((0.02, 0.01, 0.03), "better"), ((-0.02, -0.03, -0.01), "worse"), ((0.02, -0.01, 0.03), "undecided")],
)
def test_better_means_that_the_interval_excludes_nothing_gained(made, ahead, verdict):
    assert made.rows[0].model_copy(update={"ahead": ahead}).verdict == verdict


def test_a_study_is_written_and_read_back(made, tmp_path):
    path = study.record_study(made, tmp_path)
    assert study.read_study(path) == made
    table = path.with_suffix(".md").read_text(encoding="utf-8")
    assert f"| {made.rows[1].comparison.pruned.top1.share:.2%} |" in table
    assert sum(line.startswith("| ") for line in table.splitlines()) == 1 + len(made.rows)
    assert np.isfinite([row.comparison.mean_kl for row in made.rows]).all()


def test_the_command_writes_what_it_measured(classifier, tmp_path, monkeypatch, capsys):
    save_file(classifier.state_dict(), tmp_path / "weights.safetensors")
    line = ["study", "ladder", "--canvases", "3", "--shares", "0.55", "--out", str(tmp_path / "out")]
    monkeypatch.setattr("sys.argv", [*line, "--weights", str(tmp_path / "weights.safetensors")])
    study.main()
    written = study.read_study(tmp_path / "out" / "vit_digits--ladder--train.json")
    assert [row.name for row in written.rows] == [entry.name for entry in study.LADDER]
    assert {row.asked_share for row in written.rows} == {0.55}
    assert written.command.endswith("ladder --part train --canvases 3 --shares 0.55")
    assert str(tmp_path) not in written.to_json()
    assert "+ S-stage" in capsys.readouterr().out


def test_the_command_refuses_weights_that_are_not_there(tmp_path, monkeypatch):
    monkeypatch.setattr("sys.argv", ["study", "ladder", "--weights", str(tmp_path / "none"), "--out", str(tmp_path)])
    with pytest.raises(SystemExit, match="is no file"):
        study.main()
    assert list(tmp_path.iterdir()) == []
