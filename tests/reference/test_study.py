"""Studies: rows against the dense model and each other, with the intervals that their canvases give."""

from __future__ import annotations

import json
import re
import shlex
from importlib import import_module
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

from ztp_deploy import models
from ztp_deploy.console import Bars
from ztp_deploy.errors import BadRequest
from ztp_deploy.evidence.accuracy import image_kl, paired_bootstrap
from ztp_deploy.planning import make_plan
from ztp_deploy.pruning.prune import prune
from ztp_deploy.reference import canvases, study
from ztp_deploy.tune.run import TuneRequest, tune


@pytest.fixture(scope="module")
def classifier():
    return models.load_model("vit_digits", weights="random")


@pytest.fixture(scope="module")
def made(classifier):
    entries = (study.LADDER[0], study.LADDER[4])
    return study.run_study("choices", "test", 24, groups=[(0.65, entries)], model=classifier, command="study")


def images_of(data):
    pixels = data.pixels.astype(np.float32).transpose(0, 3, 1, 2) / 255
    return torch.from_numpy(((pixels - study.MEAN) / study.STD).astype(np.float32))


def test_the_ladder_adds_one_part_of_the_method_at_a_time():
    options = [entry.options for entry in study.LADDER]
    names = ["random", "WPR", "+ EIR", "+ VHF", "+ S-stage", "votes not renormalised", "one round"]
    assert [entry.name for entry in study.LADDER] == names
    published = {"rounds": "published", "renormalise": True}
    assert options[1] == published | {"heads": "mean", "variance_bounds": None, "similar": 0.0}
    assert options[2] == options[1] | {"heads": "rms"}
    assert options[3] == published | {"similar": 0.0}
    assert options[4:] == [published, {"rounds": "published"}, {}]
    for name, entries in study.STUDIES.items():
        assert len({entry.name for entry in entries}) == len(entries), name


@pytest.mark.parametrize("share", study.SHARES)
def test_every_entry_has_a_plan_at_every_share(classifier, share):
    for entries in study.STUDIES.values():
        for entry in entries:
            plan = entry.plan_at(classifier, share)
            assert plan.flops.share == pytest.approx(share, abs=0.005)
            assert entry.stages in (None, len(plan.stages))


def test_rows_are_what_the_models_say(classifier, made):
    data = study.sheet("test", 24)
    dense = classifier(images_of(data)).argmax(1).numpy()
    assert made.dense_top1.share == (dense == data.labels).mean()
    assert made.digits == 24
    right, kls = [], []
    for row, entry in zip(made.rows, (study.LADDER[0], study.LADDER[4]), strict=True):
        plan = make_plan(classifier, entry.method, flops=0.65, options=entry.options)
        with torch.inference_mode():
            best_logits = prune(classifier, plan)(images_of(data))
        best = best_logits.argmax(1).numpy()
        right.append(best == data.labels)
        assert row.comparison.pruned.top1.hits == right[-1].sum()
        assert row.comparison.agreement.hits == (best == dense).sum()
        assert row.tokens == [196, *plan.counts]
        kl = image_kl(classifier(images_of(data)).detach().numpy(), best_logits.numpy())
        kls.append(kl)
    assert made.rows[0].ahead == made.rows[0].closer == (0.0, 0.0, 0.0)
    assert made.rows[1].closer == paired_bootstrap(kls[0] - kls[1], data.digits)
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
    assert list(tmp_path.iterdir()) == [path]
    table = study.render_study(made)
    assert f"| {made.rows[1].comparison.pruned.top1.share:.2%} |" in table
    assert "| against the first row (95 %) |" in table
    assert sum(line.startswith("| ") for line in table.splitlines()) == 1 + len(made.rows)
    assert np.isfinite([row.comparison.mean_kl for row in made.rows]).all()


def test_each_row_of_the_ladder_is_held_against_the_row_before(classifier):
    entries = (study.LADDER[0], study.LADDER[1], study.LADDER[4])
    made = study.run_study("ladder", "test", 24, groups=[(0.55, entries)], model=classifier)
    right = []
    data = study.sheet("test", 24)
    kls = []
    dense = classifier(images_of(data)).detach().numpy()
    for entry in entries:
        plan = make_plan(classifier, entry.method, flops=0.55, options=entry.options)
        with torch.inference_mode():
            logits = prune(classifier, plan)(images_of(data)).numpy()
        right.append((logits.argmax(1) == data.labels).astype(float))
        kls.append(image_kl(dense, logits))
    assert [row.ahead for row in made.rows] == [
        paired_bootstrap(now - before, data.digits) for before, now in zip([right[0], *right], right, strict=False)
    ]
    assert made.rows[2].closer == paired_bootstrap(kls[1] - kls[2], data.digits)
    assert made.rows[2].closer != paired_bootstrap(kls[0] - kls[2], data.digits)
    assert "| against the row before (95 %) |" in study.render_study(made)


def test_groups_of_one_share_are_each_held_against_their_own_first_row(classifier):
    """Two searches within one budget, say: each has its uniform plan."""
    groups = [(0.65, [entry]) for entry in (study.LADDER[0], study.LADDER[4])]
    made = study.run_study("tuned", "test", 24, groups=groups, model=classifier)
    assert [row.closer for row in made.rows] == [row.ahead for row in made.rows] == [(0.0, 0.0, 0.0)] * 2


def test_several_processes_measure_what_one_does(classifier, made):
    entries = (study.LADDER[0], study.LADDER[4])
    again = study.run_study(
        "choices", "test", 24, groups=[(0.65, entries)], model=classifier, workers=2, command="study"
    )
    for row, other in zip(again.rows, made.rows, strict=True):
        assert row.comparison.mean_kl == pytest.approx(other.comparison.mean_kl, abs=1e-6)
        assert row.comparison.pruned == other.comparison.pruned
        assert (row.name, row.tokens) == (other.name, other.tokens)


@pytest.mark.parametrize("wrong", [{"workers": 0}, {"count": 0}, {"first": -1}])
def test_nothing_to_measure_is_no_study(classifier, wrong):
    with pytest.raises(BadRequest, match="Give at least 1"):
        study.run_study("choices", "test", wrong.pop("count", 1), groups=[], model=classifier, **wrong)


def test_a_page_gets_the_table(made):
    page = study.fill("above\n<!-- vit_digits--choices--test -->\nold\n<!-- / -->\nbelow\n", made)
    table = study.render_study(made).strip()
    assert page == f"above\n<!-- vit_digits--choices--test -->\n{table}\n<!-- / -->\nbelow\n"
    assert study.fill(page, made) == page


@pytest.mark.parametrize(
    "page", ["", "<!-- vit_digits--ladder--test -->\n<!-- / -->", "<!-- vit_digits--choices--test -->\n"]
)
def test_a_page_without_the_place_is_refused(made, page):
    with pytest.raises(BadRequest, match="no place for vit_digits--choices--test"):
        study.fill(page, made)


@pytest.fixture
def command(monkeypatch, capsys):
    """Runs the command; returns exit code, stdout and stderr."""

    def run(*words: object) -> tuple[int, str, str]:
        monkeypatch.setattr("sys.argv", ["study", *map(str, words)])
        with pytest.raises(SystemExit) as ended:
            study.main()
        printed = capsys.readouterr()
        return int(ended.value.code or 0), printed.out, printed.err

    return run


def test_the_command_writes_what_it_measured(classifier, tmp_path, command):
    save_file(classifier.state_dict(), tmp_path / "weights.safetensors")
    page = tmp_path / "page.md"
    page.write_text("<!-- vit_digits--ladder--train -->\n<!-- / -->\n")
    line = ["ladder", "--canvases", "3", "--first", "7", "--shares", "0.55", "--out", tmp_path / "out"]
    line += ["--workers", "1", "--page", page, "--weights", tmp_path / "weights.safetensors"]
    code, printed, _ = command(*line)
    assert code == 0
    written = study.read_study(tmp_path / "out" / "vit_digits--ladder--train.json")
    assert [row.name for row in written.rows] == [entry.name for entry in study.LADDER]
    assert {row.asked_share for row in written.rows} == {0.55}
    assert written.command.endswith(
        "ladder --part train --canvases 3 --first 7 --weights weights.safetensors --shares 0.55"
    )
    assert (written.images, written.first) == (3, 7)
    assert str(tmp_path) not in written.to_json()
    assert "+ S-stage" in printed
    assert study.render_study(written) in page.read_text().replace("<!-- / -->", "")


def test_curves_are_drawn(classifier, tmp_path):
    groups = [(share, study.CURVES[-2:]) for share in (0.65, 0.55)]
    made = study.run_study("curves", "train", 3, groups=groups, model=classifier)
    drawing = study.record_study(made, tmp_path).with_suffix(".png")
    with Image.open(drawing) as opened:
        assert opened.size == (1080, 660)


@pytest.fixture(scope="module")
def search(classifier, tmp_path_factory):
    """A folder that `ztp tune` wrote, from weights in a file."""
    root = tmp_path_factory.mktemp("search")
    save_file(classifier.state_dict(), root / "weights.safetensors")
    assert len(list(canvases.write(root / "pictures", "train", 16, by_class=False))) == 16
    request = TuneRequest(
        "vit_digits",
        root / "pictures",
        "flops=0.55",
        weights=str(root / "weights.safetensors"),
        trials=3,
        directory=root / "tuned",
    )
    tune(request, Bars())
    return root


def test_a_search_is_held_against_the_uniform_plan(search, tmp_path, command):
    line = ["tuned", "--canvases", 4, "--workers", 1, "--searches", search / "tuned", "--out", tmp_path]
    assert command(*line, "--weights", search / "weights.safetensors")[0] == 0
    written = study.read_study(tmp_path / "vit_digits--tuned--train.json")
    report = json.loads((search / "tuned" / "tune.json").read_text())
    assert [row.name for row in written.rows] == ["uniform", "tuned"]
    assert {row.asked_share for row in written.rows} == {0.55}
    for row in written.rows:
        plan = report["uniform" if row.name == "uniform" else "winner"]["plan"]
        assert row.tokens == [196, *(stage["tokens_out"] for stage in plan["stages"])]
        assert [stage["block"] for stage in row.stages] == [stage["block"] for stage in plan["stages"]]
    assert str(search) not in written.to_json()
    assert written.command.endswith("--searches tuned")


def test_folders_without_a_search_are_refused(tmp_path):
    with pytest.raises(BadRequest, match=r"holds no tune\.json"):
        study.tuned_groups([tmp_path])


@pytest.mark.parametrize(
    "line, sentence",
    [
        (["tuned"], "belongs to the study tuned"),
        (["ladder", "--searches", "somewhere"], "belongs to the study tuned"),
        (["ladder", "--weights", "none"], "'none' is not a file"),
        (["ladder", "--workers", "0"], "--workers 0 was asked for. Give at least 1."),
        (["ladder", "--canvases", "0"], "Give at least 1 canvas"),
        (["ladder", "--page", "none.md"], "There is no page none.md"),
        (["ladder", "--page", "page.md"], "no place for vit_digits--ladder--train"),
        (["ladder", "--out", "page.md"], "--out page.md is not a folder"),
    ],
)
def test_what_cannot_be_done_is_a_bad_request_before_anything_is_measured(
    line, sentence, command, tmp_path, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "page.md").write_text("<!-- vit_digits--ladder--test -->\n<!-- / -->\n")
    monkeypatch.setattr(study, "run_study", lambda *given, **named: pytest.fail("measured all the same"))
    code, printed, refusal = command(*line)
    assert (code, printed) == (2, "")
    assert refusal.startswith("error: ")
    assert sentence in refusal
    assert [path.name for path in tmp_path.iterdir()] == ["page.md"]


# --- the commands on the pages -----------------------------------------------------------------

ROOT = Path(__file__).parents[2]
PRINTED = [
    (name, words)
    for page in ("accuracy", "vit_digits")
    for name, words in re.findall(
        r"python -m ztp_deploy\.reference\.(\w+) ([^`\n]+)", (ROOT / "docs" / f"{page}.md").read_text(encoding="utf-8")
    )
]


@pytest.mark.parametrize("name, words", PRINTED)
def test_commands_on_the_pages_run_as_printed(name, words, monkeypatch):
    given = import_module(f"ztp_deploy.reference.{name}").parser().parse_args(shlex.split(words))
    if name == "study":
        monkeypatch.chdir(ROOT)
        study.check(given)
        assert study.told(given) == f"python -m ztp_deploy.reference.study {words}"
        assert len(study.tuned_groups(given.searches)) == (2 if given.study == "tuned" else 0)


def test_the_pages_print_commands_of_every_study_and_module():
    assert {name for name, _ in PRINTED} == {"study", "canvases", "train"}
    printed = {words.split()[0] for name, words in PRINTED if name == "study"}
    assert printed == {*study.STUDIES, study.TUNED}
