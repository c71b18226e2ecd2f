"""`ztp eval` from end to end: engines and models on labelled pictures, the report, the command line."""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

import ztp_deploy as ztp
from tests import tiny
from tests.commands import typed
from tests.pictures import write_pictures
from tests.runs import Listening
from ztp_deploy import entrypoint
from ztp_deploy.backends import Engine
from ztp_deploy.errors import BadRequest, MissingSoftware, WriteFailed
from ztp_deploy.evidence import accuracy, predictions
from ztp_deploy.evidence.accuracy import AccuracyReport, compare
from ztp_deploy.evidence.labelled import read_labelled
from ztp_deploy.evidence.report.accuracy import accuracy_lines, accuracy_rows
from ztp_deploy.manifest import manifest_sha256
from ztp_deploy.models import weights as weights_module
from ztp_deploy.preprocessing import open_image, transform_for
from ztp_deploy.workflow import evaluate
from ztp_deploy.workflow.evaluate import EvalRequest, evaluate_engine, evaluate_model
from ztp_deploy.workflow.progress import Silent
from ztp_deploy.workflow.requests import PlanRequest


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    """A folder of labelled pictures."""
    return write_pictures(tmp_path_factory.mktemp("pictures"))


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """The tiny model with weights from a file, which nobody calls random."""
    path = tmp_path_factory.mktemp("weights") / "trained.safetensors"
    save_file(tiny.model().state_dict(), path)
    return ztp.load_model("deit_t", weights=path, overrides=tiny.SIZE)


def built(model, plan, directory, batch, input="float32") -> Engine:
    """A TorchScript engine."""
    artifact = ztp.export(ztp.prune(model, plan), "torchscript", directory.parent / f"{directory.name}-x", input=input)
    return ztp.build(artifact, "torchscript", device="cpu", batch=batch, directory=directory)


@pytest.fixture(scope="module")
def engines(trained, tmp_path_factory) -> dict[str, Engine]:
    """Pruned and dense, and one that takes pixels."""
    root = tmp_path_factory.mktemp("built")
    plan = ztp.make_plan(trained, ratio=0.7, options={"rounds": 2})
    return {
        "pruned": built(trained, plan, root / "pruned", (3, 4, 8)),
        "dense": built(trained, ztp.make_plan(trained, "dense"), root / "dense", (1, 4, 8)),
        "pixels": built(trained, ztp.make_plan(trained, "slice", ratio=0.7), root / "pixels", (1, 2, 4), "uint8"),
    }


def test_an_engine_against_the_dense_model(engines, trained, pictures):
    engine = engines["pruned"]
    report = evaluate_engine(engine.directory, EvalRequest(pictures, batch=5, workers=2, command="ztp eval"), Silent())
    written = engine.evidence / "accuracy.json"
    assert AccuracyReport.model_validate_json(written.read_bytes()) == report
    assert json.loads(written.read_text())["schema"] == "ztp.accuracy/1"
    assert {path.name for path in engine.evidence.iterdir()} == {"accuracy.json", "report.html"}
    page = (engine.evidence / "report.html").read_text()
    assert "accuracy measured" in page
    assert f"{report.accuracy.top1.share * 100:.2f} %" in page
    data = read_labelled(pictures, 10, None)
    assert (report.images, report.data_sha256) == (22, data.sha256)
    assert report.mapping == "Labels are class indices."
    transform = transform_for(trained.source.preprocessing, "float32")
    pixels = torch.from_numpy(np.stack([transform(open_image(file)) for file in data.files]))
    with torch.inference_mode():
        dense = trained(pixels).numpy()
        thin = ztp.prune(trained, engine.manifest.plan)(pixels).numpy()
    expected = compare(dense, thin, data.labels)
    assert report.comparison is not None
    assert report.comparison.dense.top1 == expected.dense.top1
    assert report.accuracy == expected.pruned == report.comparison.pruned
    assert report.comparison.top1 == expected.top1
    assert report.comparison.agreement == expected.agreement
    assert report.comparison.mean_kl == pytest.approx(expected.mean_kl, rel=1e-3)
    assert sum(row.images for row in report.per_class) == 22
    assert [(one.role, one.images) for one in report.speed] == [("dense", 22), ("pruned", 22)]
    assert report.reference is not None
    assert report.reference.startswith("eager PyTorch")
    assert any("parity gate has not passed" in note for note in report.notes)
    assert "/" not in report.data + report.weights


def test_the_manifest_is_named_and_the_last_batch_may_be_smaller_than_the_engine_takes(engines, pictures):
    """22 images in batches of 7 leave one, where the engine takes three at least."""
    engine = engines["pruned"]
    report = evaluate_engine(engine.directory, EvalRequest(pictures, dense=False, batch=7), Silent())
    assert report.manifest_sha256 == manifest_sha256(engine.directory)
    assert report.command == "ztp_deploy.workflow.evaluate"
    assert report.comparison is None
    assert report.per_class[0].dense is None
    assert [row[0] for row in accuracy_rows(report)] == ["pruned"]


def test_a_comparison_is_replaced_by_a_comparison_alone(trained, pictures, tmp_path):
    """A run without the dense model is printed and leaves the evidence that compares with it."""
    engine = built(trained, ztp.make_plan(trained, "slice", ratio=0.7), tmp_path / "engine", (1, 4, 8))
    written = engine.evidence / "accuracy.json"
    alone = EvalRequest(pictures, dense=False)
    evaluate_engine(engine.directory, alone, Silent())
    assert AccuracyReport.model_validate_json(written.read_bytes()).comparison is None
    compared = evaluate_engine(engine.directory, EvalRequest(pictures), Silent())
    assert AccuracyReport.model_validate_json(written.read_bytes()) == compared
    monitor = Listening()
    assert evaluate_engine(engine.directory, alone, monitor).comparison is None
    assert AccuracyReport.model_validate_json(written.read_bytes()) == compared
    [note] = [line for line in monitor.warned if "stays as it is" in line]
    assert "on 22 images" in note


def test_the_verdict_is_not_computed_where_it_cannot_be_kept(engines, pictures, monkeypatch):
    monkeypatch.setattr("os.access", lambda path, mode: not str(path).endswith("evidence"))
    engine = engines["dense"]
    engine.evidence.mkdir(exist_ok=True)
    monkeypatch.setattr(evaluate, "load_engine", lambda directory: pytest.fail("opened"))
    with pytest.raises(WriteFailed, match="could not be written"):
        evaluate_engine(engine.directory, EvalRequest(pictures), Silent())


def test_a_dense_engine_as_the_reference(engines, pictures):
    report = evaluate_engine(
        engines["pixels"].directory, EvalRequest(pictures), Silent(), dense_engine=engines["dense"].directory
    )
    assert report.reference is not None
    assert report.reference.startswith("torchscript")
    assert report.reference_manifest_sha256 == manifest_sha256(engines["dense"].directory)
    assert [one.batch for one in report.speed] == [4, 2]
    eager = evaluate_engine(engines["pixels"].directory, EvalRequest(pictures), Silent())
    assert report.comparison is not None
    assert eager.comparison is not None
    assert report.comparison.dense == eager.comparison.dense
    with pytest.raises(BadRequest, match="the reference must be dense"):
        evaluate_engine(
            engines["pruned"].directory, EvalRequest(pictures), Silent(), dense_engine=engines["pixels"].directory
        )
    with pytest.raises(BadRequest, match="range 1 to 4"):
        evaluate_engine(engines["pixels"].directory, EvalRequest(pictures, batch=5), Silent())


def test_an_interrupted_evaluation_goes_on(engines, pictures, monkeypatch):
    engine = engines["pruned"]
    whole = evaluate_engine(engine.directory, EvalRequest(pictures), Silent())
    real, calls = predictions.batches, []

    def interrupted(*given):
        calls.append(given)
        for number, batch in enumerate(real(*given)):
            if len(calls) == 2 and number == 2:
                raise KeyboardInterrupt
            yield batch

    monkeypatch.setattr(predictions, "batches", interrupted)
    with pytest.raises(KeyboardInterrupt, match="8 of 22 images are kept"):
        evaluate_engine(engine.directory, EvalRequest(pictures), Silent())
    assert len(list(engine.evidence.glob("*.npz"))) == 2
    monkeypatch.setattr(predictions, "batches", real)
    again = evaluate_engine(engine.directory, EvalRequest(pictures), Silent())
    assert again.comparison == whole.comparison
    assert again.per_class == whole.per_class
    assert [one.images for one in again.speed] == [0, 14]
    assert not list(engine.evidence.glob("*.npz"))
    assert "interrupted" in " ".join(accuracy_lines(again))


def test_a_truncated_picture_ends_an_evaluation_before_it_begins(engines, pictures, tmp_path, monkeypatch):
    monkeypatch.setattr(evaluate, "predict", lambda *given, **more: pytest.fail("ran"))
    data = tmp_path / "pictures"
    shutil.copytree(pictures, data)
    for number in (10, 16):
        file = data / "3" / f"{number}.png"
        file.write_bytes(file.read_bytes()[:-1000])
        which = "3/10.png cannot be read" if number == 10 else "2 of 22 pictures cannot be read: .*3/10.png, .*3/16.png"
        with pytest.raises(BadRequest, match=which):
            evaluate_engine(engines["pruned"].directory, EvalRequest(data), Silent())
    assert not list(engines["pruned"].evidence.glob("*.npz"))


def test_a_model_in_eager_pytorch(trained, pictures, tmp_path, monkeypatch):
    monkeypatch.setattr(evaluate, "load_trained", lambda wanted, clock: trained)
    monkeypatch.setattr(evaluate.models, "check_request", lambda *wanted: None)
    weights = trained.source.weights.origin
    wanted = PlanRequest(model="deit_t", ratio=0.7, options={"rounds": 2}, weights=weights)
    report = evaluate_model(wanted, EvalRequest(pictures, device="cpu"), Silent(), record=tmp_path)
    [path] = tmp_path.iterdir()
    assert path.name == f"deit_t--{report.plan}--accuracy-{report.data_sha256[:6]}.json"
    assert AccuracyReport.model_validate_json(path.read_bytes()) == report
    assert report.manifest_sha256 is None
    assert report.weights == "file (trained.safetensors)"
    assert report.comparison is not None
    dense = evaluate_model(
        PlanRequest(model="deit_t", method="dense", weights=weights), EvalRequest(pictures, device="cpu"), Silent()
    )
    assert dense.comparison is None
    assert dense.accuracy == report.comparison.dense


def test_what_would_mean_nothing_is_refused(model, trained, pictures, tmp_path):
    engine = built(model, ztp.make_plan(model, "slice", ratio=0.5), tmp_path / "engine", (1, 4, 8))
    with pytest.raises(BadRequest, match="weights of deit_t are random"):
        evaluate_engine(engine.directory, EvalRequest(pictures), Silent())
    with pytest.raises(BadRequest, match="are random"):
        evaluate_model(PlanRequest(model="deit_t", ratio=0.7, weights="random"), EvalRequest(pictures), Silent())
    plan = ztp.make_plan(trained, "dynamicvit", ratio=0.7, options={"weights": "random"})
    with pytest.raises(BadRequest, match="would mean nothing"):
        evaluate.refuse_meaningless(trained.source, plan)


def test_weights_that_only_python_had_leave_no_dense_model(trained, pictures, tmp_path):
    given = ztp.load_model("deit_t", weights=trained.state_dict(), overrides=tiny.SIZE)
    engine = built(given, ztp.make_plan(given, "slice", ratio=0.5), tmp_path / "engine", (1, 4, 8))
    with pytest.raises(BadRequest, match="handed over in Python") as refused:
        evaluate_engine(engine.directory, EvalRequest(pictures), Silent())
    assert "--no-dense" in refused.value.fix
    assert evaluate_engine(engine.directory, EvalRequest(pictures, dense=False), Silent()).images == 22


def test_weights_that_were_moved_are_found_where_they_lie_now(command, trained, pictures, tmp_path):
    old, new = tmp_path / "old.safetensors", tmp_path / "new.safetensors"
    save_file(trained.state_dict(), old)
    model = ztp.load_model("deit_t", weights=old, overrides=tiny.SIZE)
    engine = built(model, ztp.make_plan(model, "slice", ratio=0.5), tmp_path / "engine", (1, 4, 8)).directory
    old.rename(new)
    (tmp_path / "few").mkdir()
    Image.new("RGB", (100, 100)).save(tmp_path / "few" / "a.png")
    check = ("check", "--engine", engine, "--count", 1, "--images", tmp_path / "few")
    for asked in (check, ("eval", "--engine", engine, "--data", pictures)):
        code, _, err = command(*asked[1:], name=asked[0])
        assert code == 2
        assert "there is no such file. Say where the same checkpoint lies now: --weights path." in err
        code, _, err = command(*asked[1:], "--weights", new, name=asked[0])
        assert code == 0, err
    save_file({name: value + 1 for name, value in trained.state_dict().items()}, new)
    code, _, err = command(*check[1:], "--weights", new, name="check")
    assert code == 2
    assert "not the ones this was built from" in err


@pytest.mark.filterwarnings("ignore::ztp_deploy.backends.ParityWarning")  # notes are looked at here
def test_what_a_reader_should_know_is_noted(engines, trained, pictures, tmp_path):
    """Whether parity was proved of this very engine, and that the reference ran in another precision."""
    copy = tmp_path / "copy"
    shutil.copytree(engines["pruned"].directory, copy)
    size = engines["pruned"].manifest.input.size
    proof = ztp.check_parity(copy, trained, np.random.default_rng(0).standard_normal((2, 3, size, size), np.float32))
    assert proof.passed
    for change, noted in (({}, False), ({"passed": False}, True), ({"manifest_sha256": "of another build"}, True)):
        (copy / "evidence" / "parity.json").write_text(proof.model_copy(update=change).to_json())
        notes = evaluate_engine(copy, EvalRequest(pictures, dense=False), Silent()).notes
        assert any("parity gate has not passed" in note for note in notes) == noted
    tiny.reseal(copy, precision="bf16")
    noted = "the difference holds what bf16 costs besides"
    assert noted in " ".join(evaluate_engine(copy, EvalRequest(pictures), Silent()).notes)
    assert noted not in " ".join(evaluate_engine(copy, EvalRequest(pictures, dense=False), Silent()).notes)


def test_sorted_order_is_said_aloud(engines, tmp_path):
    for name in "jihgfedcba":
        (tmp_path / name).mkdir()
        Image.new("RGB", (100, 100)).save(tmp_path / name / "x.png")
    monitor = Listening()
    report = evaluate_engine(engines["dense"].directory, EvalRequest(tmp_path, dense=False), monitor)
    assert [row.label for row in report.per_class] == list(range(10))
    assert monitor.warned == [report.mapping]
    assert "sorted order" in report.mapping
    assert [row[0] for row in accuracy_rows(report)] == ["dense"]


def test_an_engine_of_other_weights_is_no_reference(engines, model, pictures, tmp_path):
    other = built(model, ztp.make_plan(model, "dense"), tmp_path / "other", (1, 4, 8))
    tiny.reseal(other.directory, source=other.manifest.source.model_copy(
        update={"weights": other.manifest.source.weights.model_copy(update={"sha256": "0" * 64})}))  # fmt: skip
    with pytest.raises(BadRequest, match="have different weights"):
        evaluate_engine(engines["pruned"].directory, EvalRequest(pictures), Silent(), dense_engine=other.directory)


def test_an_engine_that_prepares_pictures_otherwise_is_no_reference(engines, trained, pictures, tmp_path):
    model = ztp.load_model(trained, preprocessing={"crop_pct": 1.0})
    other = built(model, ztp.make_plan(model, "dense"), tmp_path / "other", (1, 4, 8)).directory
    with pytest.raises(BadRequest, match="prepare pictures differently"):
        evaluate_engine(engines["pruned"].directory, EvalRequest(pictures), Silent(), dense_engine=other)


@pytest.fixture(scope="module")
def report(engines, pictures) -> AccuracyReport:
    """An evaluation to show."""
    return evaluate_engine(engines["pruned"].directory, EvalRequest(pictures, workers=2), Silent())


def test_the_table_says_it_line_by_line(report):
    assert report.comparison is not None
    rows = accuracy_rows(report)
    assert [row[0] for row in rows] == ["dense", "pruned", "difference"]
    top1 = report.comparison.dense.top1
    assert rows[0][1] == f"{top1.share * 100:.2f} % ({top1.low * 100:.2f}–{top1.high * 100:.2f})"
    assert rows[2][1].startswith(f"{report.comparison.top1.difference * 100:+.2f} (")
    text = "\n".join(accuracy_lines(report))
    for words in (
        "McNemar",
        "KL(dense ‖ pruned)",
        "Data: 22 images of 3 classes in",
        "preprocessing are in them, in 2 threads",
    ):
        assert words in text
    moved = report.model_copy(
        update={
            "per_class": (
                accuracy.ClassRow(label=1, name="tench, Tinca", images=9, dense=8, pruned=8),
                accuracy.ClassRow(label=2, name="crane, bird", images=9, dense=8, pruned=5),
                accuracy.ClassRow(label=3, name=None, images=9, dense=8, pruned=7),
            )
        }
    )
    assert "Classes that lost most: crane (8 → 5 of 9), class 3 (8 → 7 of 9)." in accuracy_lines(moved)


# --- the command line ---------------------------------------------------------------------------


@pytest.fixture
def command(monkeypatch, capsys, tmp_path):
    """Runs `ztp eval` in an empty folder; returns exit code, stdout and stderr."""
    monkeypatch.chdir(tmp_path)

    def run(*arguments: object, name: str = "eval") -> tuple[int, str, str]:
        return typed(monkeypatch, capsys, name, *arguments)

    return run


def test_the_command_prints_a_table_or_json(command, engines, pictures):
    code, out, err = command("--engine", engines["pruned"].directory, "--data", pictures, "--workers", 1)
    assert code == 0, err
    for words in ("top-1", "difference", "McNemar", "KL(dense ‖ pruned)", "Weights: file (trained"):
        assert words in " ".join(out.split())
    code, out, err = command("--engine", engines["pruned"].directory, "--data", pictures, "--no-dense", "--json")
    assert code == 0, err
    found = json.loads(out)
    assert (found["schema"], found["comparison"], found["images"]) == ("ztp.accuracy/1", None, 22)
    code, out, _ = command("--help")
    assert code == 0
    assert "--json" in out


def test_the_command_on_a_model_by_its_name(command, tmp_path):
    """The whole way with DeiT-T at its own size: weights from a file, ImageNet's names for folders."""
    weights = tmp_path / "w.safetensors"
    save_file(ztp.load_model("deit_t", weights="random").state_dict(), weights)
    for name, colour in (("n01440764", "red"), ("n02089867", "blue")):
        (tmp_path / "val" / name).mkdir(parents=True)
        Image.new("RGB", (300, 250), colour).save(tmp_path / "val" / name / "a.jpg")
    code, out, err = command("--model", "deit_t", "--ratio", 0.7, "--weights", "w.safetensors", "--data", "val", "--json",
                             "--device", "cpu")  # fmt: skip
    assert code == 0, err
    found = json.loads(out)
    assert found["mapping"] == "Labels are WordNet ids of ImageNet's classes."
    assert [row["name"].split(",")[0] for row in found["per_class"]] == ["tench", "Walker hound"]
    assert found["command"].startswith("ztp eval --model deit_t")


@pytest.mark.parametrize(
    "arguments, words",
    [
        (("--data", "."), ("either an engine folder", "--model")),
        (("--data", ".", "-e", "a", "-m", "deit_t"), ("either an engine folder",)),
        (("-m", "deit_t", "-r", 0.7), ("--data",)),
        (("-e", "a", "--data", ".", "-r", 0.7), ("--ratio makes no sense with --engine",)),
        (("-e", "a", "--data", ".", "--no-dense", "--weights", "w"), ("--weights makes no sense with --no-dense",)),
        (("-e", "a", "--data", ".", "--record", "r"), ("--record makes no sense with --engine",)),
        (("-m", "deit_t", "--data", ".", "--dense-engine", "a"), ("--dense-engine makes no sense with --model",)),
        (("-e", "a", "--data", ".", "--dense-engine", "b", "--no-dense"), ("makes no sense with --no-dense",)),
        (("-e", "a", "--data", "."), ("not an engine folder",)),
        (("-e", "a", "--data", "nowhere"), ("no --data 'nowhere'",)),
        (("-e", "a", "--data", ".", "--batch", 0), ("--batch 0",)),
        (("-e", "a", "--data", ".", "--workers", 0), ("--workers 0",)),
        (("-m", "deit_t", "-r", 0.7, "--data", ".", "--weights", "random"), ("are random", "means nothing")),
        (("-m", "deit_t", "-r", 0.7, "--data", ".", "--weights", "no.pth"), ("no.pth", "not a file")),
        (("-m", "deit_t", "--data", ".", "--weights", "no.pth"), ("not a file",)),
        (("-m", "deit_x", "-r", 0.7, "--data", "."), ("Did you mean",)),
    ],
)
def test_bad_requests(command, tmp_path, arguments, words):
    code, out, err = command(*arguments)
    assert (code, out) == (2, ""), err
    assert err.strip().splitlines()[-1].startswith("error: ")
    for word in words:
        assert word in err
    assert list(tmp_path.iterdir()) == []


def test_weights_that_cannot_be_had_are_missing_software(command, monkeypatch):
    def none(repository: str) -> Path:
        raise MissingSoftware("The weights are not in the cache.", "Connect.")

    monkeypatch.setattr(weights_module, "find_pretrained", none)
    code, _, err = command("-m", "deit_t", "-r", 0.7, "--data", ".")
    assert code == 3
    assert "not in the cache" in err
    assert "--weights path" in err


def test_an_interrupt_says_what_is_kept(command, engines, pictures, monkeypatch):
    def interrupted(*given):
        yield from list(predictions_batches(*given))[:2]
        raise KeyboardInterrupt

    predictions_batches = predictions.batches
    monkeypatch.setattr(predictions, "batches", interrupted)
    ended = []
    monkeypatch.setattr(entrypoint.os, "_exit", lambda code: (ended.append(code), sys.exit(code)))
    code, _, err = command("--engine", engines["pruned"].directory, "--data", pictures, "--no-dense")
    assert (code, ended) == (130, [130])
    assert "8 of 22 images are kept, and the same command goes on." in err
    for left in engines["pruned"].evidence.glob("*.npz"):
        left.unlink()
