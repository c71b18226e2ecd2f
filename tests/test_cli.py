"""The command line: what it prints, what it returns, and how it refuses."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from onnx import numpy_helper
from PIL import Image

from tests import tiny
from tests.commands import typed
from ztp_deploy import backends
from ztp_deploy.cli.app import app
from ztp_deploy.errors import BadRequest, MissingSoftware
from ztp_deploy.evidence import parity
from ztp_deploy.evidence.images import photograph_crops


@pytest.fixture
def ztp(monkeypatch, capsys, tmp_path):
    """Runs a command in an empty folder; returns exit code, stdout and stderr."""
    monkeypatch.chdir(tmp_path)

    def run(*arguments: object) -> tuple[int, str, str]:
        return typed(monkeypatch, capsys, *arguments)

    return run


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """`ztp engine` from a name, once: its folder and what it printed."""
    folder = tmp_path_factory.mktemp("made")
    command = [sys.executable, "-m", "ztp_deploy", "engine", "--model", "deit_t", "--ratio", "0.7"]
    command += ["--weights", "random", "--batches", "1,2", "--seconds", "0.5", "--batch", "1:2:4"]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=300)
    return folder, done


def one_sentence(code, out, err, expected, *words):
    """A refusal: the code, nothing on stdout, one line with the words (after any steps' titles), no traceback."""
    assert code == expected, err
    assert out == ""
    assert "Traceback" not in err
    assert err.strip().splitlines()[-1].startswith("error: ")
    assert err.count("error: ") == 1
    for word in words:
        assert word in err


def test_engine_from_a_name(made):
    folder, done = made
    assert done.returncode == 0, done.stderr
    assert "speed-up" in done.stdout
    assert "Selection costs" in done.stdout
    assert "of limit" in done.stdout
    assert "Parity holds" in done.stdout
    assert "GPU: " in done.stdout
    assert "Random weights" in done.stdout + done.stderr
    [engine] = folder.glob("engines/*/deit_t--zero_tprune-0.7--fp32--b1-2-4--random")
    assert {p.name for p in (engine / "evidence").iterdir()} == {
        *("parity.json", "latency.json", "report.json", "report.md", "report.html", "selftest.safetensors")
    }
    report = json.loads((engine / "evidence" / "report.json").read_text())
    assert report["schema"] == "ztp.report/1"
    assert report["parity_passed"] is True
    assert {(t["role"], t["batch"]) for t in report["timings"]} == {
        (role, batch) for role in ("dense", "pruned", "slice") for batch in (1, 2)
    }
    assert [gain["batch"] for gain in report["gains"]] == [1, 2]
    assert 0.1 < report["gains"][0]["flop_limit_reached"] < 2
    assert report["command"].startswith("ztp engine --model deit_t")
    markdown = (engine / "evidence" / "report.md").read_text()
    assert "| 1 | pruned |" in markdown
    assert "Selection costs" in markdown
    assert str(Path.home()) not in markdown
    page = (engine / "evidence" / "report.html").read_text()
    assert "parity holds" in page
    assert str(Path.home()) not in page
    assert "evidence/report.html" in done.stdout
    assert report["manifest_sha256"] in page
    assert not list(folder.rglob("*.partial"))


def test_check_and_classify_the_engine(made, ztp):
    folder, _ = made
    [engine] = folder.glob("engines/*/deit_t--zero_tprune*")
    page = engine / "evidence" / "report.html"
    assert "64/64" in page.read_text()
    code, out, err = ztp("check", "--engine", engine, "--count", 8)
    assert code == 0, err
    assert "holds" in out
    assert f"parity of {engine.name} on " in out  # piped it is 80 columns wide, and no name is broken
    assert "8/8" in page.read_text()
    assert "64/64" not in page.read_text()
    code, out, _ = ztp("check", "--engine", engine, "--count", 8, "--json")
    assert (code, json.loads(out)["passed"]) == (0, True)
    names = []
    for index, crop in enumerate(photograph_crops(3).values()):
        names.append(f"{index} {'long ' * 20}name.png")
        crop.save(names[-1])
    code, out, err = ztp("classify", *names, "--engine", engine)
    assert code == 0, err
    assert out.count("%") == 15
    assert [line for line in out.splitlines() if "%" not in line] == names
    assert "random weights" in err
    code, out, _ = ztp("classify", *names, "--engine", engine, "--json", "--top", 2)
    found = json.loads(out)
    assert found["random_weights"] is True
    assert [len(image["top"]) for image in found["images"]] == [2, 2, 2]
    import timm.data

    import ztp_deploy

    with ztp_deploy.load_engine(engine) as session:
        logits = session.run(session.preprocess(names))[1].astype(np.float64)
    best = int(logits.argmax())
    top = found["images"][1]["top"][0]
    assert top["class"] == best
    assert top["name"] == timm.data.ImageNetInfo().index_to_description(best)
    probability = np.exp(logits - logits.max()) / np.exp(logits - logits.max()).sum()
    assert top["probability"] == pytest.approx(probability.max())


def test_a_failed_gate_returns_1(made, ztp, tmp_path):
    folder, _ = made
    [engine] = folder.glob("engines/*/deit_t--zero_tprune*")
    copy = tmp_path / "copy"
    shutil.copytree(engine, copy)

    def damage(graph):
        top_k = next(n for n in graph.graph.node if n.op_type == "TopK" and n.input[0] == "score_1")
        top_k.input[0] = "pre_score_1"

    tiny.damage_graph(copy, damage)
    code, _, err = ztp("check", "--engine", copy, "--count", 4)
    assert code == 1
    assert "selection fault" in err


def test_logits_that_are_no_numbers_are_said_in_one_object_of_json(made, ztp, tmp_path):
    folder, _ = made
    [engine] = folder.glob("engines/*/deit_t--zero_tprune*")
    copy = tmp_path / "copy"
    shutil.copytree(engine, copy)

    def damage(graph):
        [bias] = [tensor for tensor in graph.graph.initializer if tensor.name.endswith("head.bias")]
        nan = numpy_helper.to_array(bias) * np.float32("nan")
        bias.CopyFrom(numpy_helper.from_array(nan, bias.name))

    tiny.damage_graph(copy, damage)
    code, out, err = ztp("check", "--engine", copy, "--count", 4, "--json")
    found = json.loads(out, parse_constant=pytest.fail)  # NaN is none of JSON's words
    assert (code, found["passed"]) == (1, False), err
    assert found["edges"][-1]["worst_logit"] == "NaN"


def test_reports_follow_the_last_check(made, ztp, tmp_path, monkeypatch):
    """An engine that fails on this machine must not lie beside a report that says it holds, or a self-test to pass."""
    folder, _ = made
    [engine] = folder.glob("engines/*/deit_t--zero_tprune*")
    copy = tmp_path / "copy"
    shutil.copytree(engine, copy)
    evidence = copy / "evidence"

    def says():
        summary = json.loads((evidence / "report.json").read_text())
        page = (evidence / "report.md").read_text()
        return summary["parity_passed"], "FAILS" in page, (evidence / "selftest.safetensors").exists()

    assert says() == (True, False, True)
    strict = parity.TOLERANCES["fp32"].model_copy(update={"logits": 0.0})
    with monkeypatch.context() as patch:
        patch.setitem(parity.TOLERANCES, "fp32", strict)
        assert ztp("check", "--engine", copy, "--count", 4)[0] == 1
    assert says() == (False, True, False)
    assert "PARITY FAILS" in (evidence / "report.html").read_text().upper()
    assert ztp("check", "--engine", copy, "--count", 4)[0] == 0
    assert says() == (True, False, True)


def test_paths_with_brackets_arrive_as_they_are(ztp, tmp_path):
    """To the library that prints them, brackets are markup."""
    folder = tmp_path / "runs[old]" / "b[/v2]"
    code, out, err = ztp("export", "-m", "deit_t", "--keep", "0.5", "--sites", "6", "--weights", "random", "--format", "torchscript",
                         "--directory", folder)  # fmt: skip
    assert code == 0, err
    [artifact] = folder.iterdir()
    assert f"Artifact: {artifact}\n" in out
    assert f"Next: ztp build --artifact '{artifact}'\n" in out


def test_a_checkpoint_with_another_head_and_other_images(ztp, tmp_path):
    from ztp_deploy import models
    from ztp_deploy.exporters import load_artifact

    size = models.ModelSize(num_classes=5, img_size=96)
    torch.save(models.load_model("deit_t", "random", size).state_dict(), "five.pth")
    plan = ("-m", "deit_t", "--keep", "0.5", "--sites", "6", "--weights", "five.pth", "--img-size", 96)
    one_sentence(*ztp("export", *plan), 2, "head.bias (5,) instead of (1000,)", "--num-classes 5")
    code, out, err = ztp("export", *plan, "--num-classes", 5, "--format", "torchscript", "--json")
    assert code == 0, err
    source = load_artifact(json.loads(out)["artifact"]).manifest.source
    assert source.size == size
    assert models.host_of(models.reload_model(source)).geometry.num_classes == 5
    assert json.loads(ztp("plan", "-m", "deit_t", "-r", 0.7, "--img-size", 96, "--json")[1])["patch_tokens"] == 36
    one_sentence(*ztp("show", "a.png", "--engine", "e", "--num-classes", 5), 2, "--num-classes makes no sense")
    one_sentence(*ztp("plan", "-m", "deit_t", "-r", 0.7, "--img-size", 0), 2, "--img-size")


def test_a_model_with_names_and_preprocessing_of_its_own(ztp, tmp_path):
    """From the checkpoint to the names that `ztp classify` prints; other names make another engine."""
    from ztp_deploy import models
    from ztp_deploy.backends import find_engine

    model = models.load_model("vit_digits", "random")
    torch.save({"state_dict": {f"model.{key}": value for key, value in model.state_dict().items()}}, "mine.ckpt")
    names = [f"digit {number} ✓" for number in range(10)]
    Path("names.txt").write_text("\n".join(names) + "\n", encoding="utf-8")
    Path("turned.txt").write_text("\n".join(reversed(names)) + "\n", encoding="utf-8")
    Path("few.txt").write_text("\n".join(names[:9]) + "\n", encoding="utf-8")
    (tmp_path / "val" / "digit_3_✓").mkdir(parents=True)
    Image.new("RGB", (130, 120), "red").save(tmp_path / "val" / "digit_3_✓" / "a.png")
    how = ("--preprocess", "mean=0.5,0.25,0.5", "--preprocess", "crop_pct=0.9", "--preprocess", "crop_mode=squash")
    mine = ("-m", "vit_digits", "--weights", "mine.ckpt", "--method", "slice", "--keep", "0.5", "--sites", "4")
    built = ("--backend", "torchscript", "--batch", 1, "--input", "uint8", "--images", "val", "--no-bench")

    def engine(*more: object) -> Path:
        before = set(Path("engines").glob("*/*"))
        code, _, err = ztp("engine", *mine, *built, *more)
        assert code == 0, err
        [made] = set(Path("engines").glob("*/*")) - before
        return made

    folders = [engine("--labels", "names.txt", *how), engine("--labels", "turned.txt", *how), engine(*how), engine()]
    sources = [find_engine(folder).manifest.source for folder in folders]
    assert [source.labels for source in sources] == [tuple(names), tuple(reversed(names)), *2 * [model.source.labels]]
    usual = model.source.preprocessing
    changed = usual.model_copy(update={"mean": (0.5, 0.25, 0.5), "crop_pct": 0.9, "crop_mode": "squash"})
    assert [source.preprocessing for source in sources] == [changed, changed, changed, usual]
    top = [json.loads(ztp("classify", "val/digit_3_✓/a.png", "-e", folder, "--json")[1]) for folder in folders]
    first, turned = (found["images"][0]["top"][0] for found in top[:2])
    assert first["name"] == names[first["class"]]
    assert (turned["class"], turned["name"]) == (first["class"], names[9 - first["class"]])
    assert names[first["class"]] in ztp("classify", "val/digit_3_✓/a.png", "-e", folders[0])[1]
    code, out, err = ztp("check", "-e", folders[0], "--images", "val", "--count", 1, "--json")
    assert code == 0, err
    code, out, err = ztp("eval", "-e", folders[1], "--data", "val", "--json")
    assert code == 0, err
    found = json.loads(out)
    assert found["mapping"] == "Labels were matched to the model's class names."
    assert [(row["label"], row["name"]) for row in found["per_class"]] == [(6, "digit 3 ✓")]
    eager = ("eval", *mine, "--labels", "names.txt", *how, "--data", "val", "--device", "cpu", "--json")
    assert [row["label"] for row in json.loads(ztp(*eager)[1])["per_class"]] == [3]
    dense = ("--dense-engine", folders[3])
    one_sentence(*ztp("eval", "-e", folders[0], *dense, "--data", "val"), 2, "the reference must be dense")


@pytest.mark.parametrize(
    "more, words",
    [
        (("--labels", "few.txt"), ("2 class names were given, and the model tells 10 classes apart", "--num-classes")),
        (("--labels", "none.txt"), ("--labels 'none.txt' cannot be read: No such file or directory",)),
        (("--preprocess", "crop"), ("--preprocess 'crop' has no value", "crop_pct=1.0")),
        (("--preprocess", "crop_pct=1", "--preprocess", "crop_pct=1"), ("--preprocess gives crop_pct twice",)),
        (("--preprocess", "crop=1"), ("Preprocessing has no 'crop'. Did you mean: crop_pct",)),
        (("--preprocess", "std=0.5"), ("Preprocessing has no std='0.5'",)),
        (("--preprocess", "interpolation=sharp"), ("interpolation='sharp'. Known are: nearest",)),
        (("--preprocess", "input_size=3,224,224"), ("which is not its to say",)),
    ],
)
@pytest.mark.parametrize(
    "command",
    [
        ("export", "-r", 0.7),
        ("engine", "-r", 0.7),
        ("bench", "-r", 0.7),
        ("compare", "-r", 0.7),
        ("eval", "-r", 0.7, "--data", "."),
        ("show", "a.png", "-r", 0.7),
        ("tune", "--images", ".", "--budget", "flops=0.6"),
    ],
    ids=lambda command: command[0],
)
def test_names_and_preprocessing_that_do_not_fit_are_refused_before_anything_is_loaded(
    command, more, words, ztp, monkeypatch
):
    from ztp_deploy import models

    monkeypatch.setattr(models, "_give_weights", None)
    Path("few.txt").write_text("a\nb\n", encoding="utf-8")
    one_sentence(*ztp(*command, "-m", "vit_digits", *more), 2, *words)


@pytest.mark.parametrize("option", [("--labels", "a.txt"), ("--preprocess", "crop_pct=1")])
def test_an_engine_has_its_names_and_preprocessing(ztp, option):
    for command in (("bench",), ("eval", "--data", "."), ("show", "a.png")):
        one_sentence(*ztp(*command, "-e", "e", *option), 2, f"{option[0]} makes no sense with --engine")


def test_bench_of_engine_folders(made, ztp):
    folder, _ = made
    engines = sorted(folder.glob("engines/*/deit_t*"))
    assert len(engines) == 3
    arguments = [word for path in engines for word in ("--engine", path)]
    code, out, err = ztp("bench", *arguments, "--batches", "1", "--seconds", "0.3", "--json")
    assert code == 0, err
    report = json.loads(out)
    assert report["schema"] == "ztp.latency/1"
    assert len(report["samples"]) == 3
    assert len(report["ratios"]) == 3


@pytest.mark.parametrize("command", ["bench", "compare", "eval"])
def test_a_record_that_cannot_be_written_is_refused_before_anything_is_done(command, ztp, tmp_path):
    (tmp_path / "file").touch()
    arguments = {"compare": ["--methods", "tome"], "eval": ["--data", tmp_path]}.get(command, [])
    plan = ("--model", "deit_t", "--ratio", 0.7, "--weights", "random")
    one_sentence(*ztp(command, *plan, *arguments, "--record", tmp_path / "file" / "x"), 2, "file", "Not a directory")


def test_the_second_run_builds_nothing(made, ztp):
    folder, _ = made
    before = {path: path.stat().st_mtime_ns for path in folder.rglob("manifest.json")}
    assert len(before) == 6
    os.chdir(folder)
    code, out, err = ztp("engine", "-m", "deit_t", "-r", 0.7, "--weights", "random", "--no-bench", "--batch", "1:2:4", "--json",
                         "--export-directory", folder / "export", "--directory", folder / "engines")  # fmt: skip
    assert code == 0, err
    assert json.loads(out)["parity_passed"] is True
    assert before == {path: path.stat().st_mtime_ns for path in folder.rglob("manifest.json")}


def test_export_then_build(ztp):
    code, out, err = ztp(
        "export", "-m", "deit_t", "-r", 0.5, "--weights", "random", "--format", "torchscript", "--json"
    )
    assert code == 0, err
    artifact = json.loads(out)["artifact"]
    assert artifact == "export/deit_t--zero_tprune-0.5--torchscript--fp32--random"
    code, out, err = ztp("build", "--artifact", artifact, "--backend", "torchscript", "--batch", "2")
    assert code == 0, err
    assert "b2-2-2" in out
    code, out, err = ztp("build", "--artifact", artifact, "--backend", "onnxruntime")
    one_sentence(code, out, err, 2, "built from onnx", "format='onnx'")


def test_plan_prints_counts_and_flops(ztp):
    code, out, _ = ztp("plan", "-m", "deit_s", "-r", 0.7)
    assert code == 0
    for word in ("137", "95", "66", "dense 4.60 G", "plan 2.87 G (62.3 %)", "FLOP limit"):
        assert word in " ".join(out.split())
    code, out, _ = ztp("plan", "-m", "deit_s", "--keep", "0.9,0.8,0.7", "--json")
    assert json.loads(out)["flops"]["planned"] == 3547539456
    code, out, _ = ztp("plan", "-m", "deit_s", "--method", "dense")
    assert (code, "196 patch tokens" in out) == (0, True)
    code, out, _ = ztp("plan", "-m", "deit_s", "-r", 0.7, "-o", "rounds=[5,5,5]", "-o", "start=uniform", "--json")
    assert json.loads(out)["options"]["start"] == "uniform"


def test_list_and_doctor(ztp):
    code, out, _ = ztp("list")
    assert code == 0
    for word in ("deit_s", "augreg_vit_l_384", "zero_tprune", "slice", "onnx", "torchscript", "onnxruntime", "OK"):
        assert word in out
    code, out, _ = ztp("list", "--json")
    known = json.loads(out)
    assert {entry["name"] for entry in known["backends"]} == set(backends.BACKENDS)
    assert {(entry["method"], entry["status"]) for entry in known["pairs"]} >= {("zero_tprune", "OK"), ("slice", "OK")}
    assert all((entry["status"] == "refused") == bool(entry["because"]) for entry in known["pairs"])
    code, out, _ = ztp("doctor")
    assert code == 0
    assert "--backend auto takes" in out
    code, out, _ = ztp("doctor", "--json")
    assert json.loads(out)["machine"]["packages"]["torch"]


def test_missing_software_is_named_with_its_command(ztp, monkeypatch):
    monkeypatch.setattr("ztp_deploy.backends.onnxruntime.backend.missing", lambda: "onnxruntime-gpu")
    code, out, _ = ztp("list")
    assert (code, "pip install onnxruntime-gpu" in out) == (0, True)
    code, out, err = ztp("engine", "-m", "deit_t", "-r", 0.7)
    one_sentence(code, out, err, 3, "pip install onnxruntime-gpu")


@pytest.mark.parametrize("module, title", [("onnxruntime", "ONNX Runtime"), ("tensorrt_rtx", "TensorRT-RTX")])
def test_a_library_that_cannot_be_loaded_is_named_beside_the_others(ztp, tmp_path, monkeypatch, module, title):
    (tmp_path / f"{module}.py").write_text("raise ImportError('libmine.so.1: cannot open shared object file')")
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.delitem(sys.modules, module, raising=False)
    reason = f"missing: {title} is installed but cannot be loaded: libmine.so.1: cannot open shared object file."
    code, out, err = ztp("doctor", "--json")
    uses = json.loads(out)["would use"]
    assert (code, err, uses[module]) == (0, "", reason)
    assert uses["openvino"].endswith(" on cpu")
    assert set(uses) == set(backends.BACKENDS)
    code, out, _ = ztp("list", "--json")
    statuses = {entry["name"]: entry["status"] for entry in json.loads(out)["backends"]}
    assert (code, statuses[module], statuses["openvino"]) == (0, reason, "OK")


def test_the_gpu_report_needs_a_gpu(ztp, tmp_path, monkeypatch):
    monkeypatch.setattr("ztp_deploy.environment.gpus", lambda: ())
    one_sentence(*ztp("gpu-report"), 3, "needs an NVIDIA GPU", "ztp doctor")
    assert list(tmp_path.iterdir()) == []


def test_the_gpu_report_says_what_is_left_and_how_to_go_on(ztp, monkeypatch):
    from ztp_deploy.gpu_report import measure
    from ztp_deploy.gpu_report.rows import GpuReport, Row

    asked = []
    failed = Row(
        model="deit_s",
        runtime="tensorrt",
        version="11.4",
        precision="fp8",
        batch=8,
        plan="dense",
        status="failed",
        reason="RuntimeError: CUDA out of memory.",
        session=0,
        weights="random",
    )

    def measured(grid, path, **options):
        asked.append((grid.precisions, options["minutes"], options["retry"]))
        report = GpuReport(gpu="none: run on the CPU", clock="wall clock", rows=[failed])
        return measure.CallResult(report, 3, 4, "The 5 minutes are spent.")

    monkeypatch.setattr(measure, "measure_gpu", measured)
    code, out, _ = ztp("gpu-report", "--device", "cpu", "--minutes", 5, "--retry")
    assert code == 0
    assert out.splitlines()[-3:] == [
        "3 of 4 cells are done. The 5 minutes are spent. Run the same command again to go on.",
        "Rows failed: 1; --retry tries them again.",
        "Report: engines/evidence/gpu/none.json",
    ]
    assert "- tensorrt fp8, failed (1 rows): RuntimeError: CUDA out of memory." in out
    ztp("gpu-report", "--device", "cpu", "--precisions", "int8")
    assert asked == [(["fp32", "fp16", "bf16", "int8", "fp8"], 5.0, True), (["int8"], 9.0, False)]
    one_sentence(*ztp("gpu-report", "--minutes", -1), 2, "minutes=-1.0", "positive number of minutes")

    def broken_off(grid, path, **options):
        path.write_text(measured(grid, path, **options).report.to_json())
        raise MissingSoftware("There are no such weights.")

    monkeypatch.setattr(measure, "measure_gpu", broken_off)
    table = Path("engines/evidence/gpu/none.md")
    table.unlink()
    assert ztp("gpu-report", "--device", "cpu")[0] == 3
    assert "- tensorrt fp8, failed (1 rows): RuntimeError: CUDA out of memory." in table.read_text()


COMMANDS = [
    *("plan", "export", "build", "check", "bench", "compare", "engine", "eval", "tune", "demo"),
    *("gpu-report", "selftest", "classify", "show", "report", "list", "doctor"),
]


def test_defaults_are_those_of_the_python_calls():
    """By command: parameter, its default there and in Python."""
    from inspect import signature

    from typer.main import get_command

    from ztp_deploy.gpu_report.grid import Grid
    from ztp_deploy.gpu_report.measure import measure_gpu
    from ztp_deploy.planning import make_plan
    from ztp_deploy.reference import canvases, demo
    from ztp_deploy.tune.run import TuneRequest
    from ztp_deploy.workflow.make import make_engine
    from ztp_deploy.workflow.requests import PlanRequest
    from ztp_deploy.workflow.steps import check

    commands = get_command(app).commands

    def default(command, name):
        [found] = [parameter.default for parameter in commands[command].params if parameter.name == name]
        return found

    def of(call, name):
        return signature(call).parameters[name].default

    assert [default("tune", name) for name in ("trials", "count", "seconds", "seed")] == [60, 256, 10.0, 0]
    assert [getattr(TuneRequest, name) for name in ("trials", "count", "seconds", "seed")] == [60, 256, 10.0, 0]
    assert default("check", "count") == of(check, "count") == 64
    assert default("demo", "count") == of(demo.demonstrate, "count") == 2 * canvases.TEST_DIGITS
    assert default("demo", "directory") == of(demo.demonstrate, "directory") == Path("pictures")
    assert default("gpu-report", "minutes") == of(measure_gpu, "minutes") == 9
    assert default("gpu-report", "seconds") == Grid.seconds == 4.0
    assert (
        default("gpu-report", "precisions").split(",")
        == list(Grid.precisions)
        == ["fp32", "fp16", "bf16", "int8", "fp8"]
    )
    assert [int(size) for size in default("gpu-report", "batches").split(",")] == list(Grid.batches) == [1, 8, 64, 256]
    assert default("engine", "seconds") == of(make_engine, "seconds") == 12.0
    assert TuneRequest.method == PlanRequest.model_fields["method"].default == of(make_plan, "method") == "zero_tprune"


def test_the_version(ztp):
    import ztp_deploy

    assert ztp("--version") == (0, f"ztp {ztp_deploy.__version__}\n", "")


def test_help_offers_what_the_command_takes(ztp):
    for command in ("export", "check"):
        _, out, _ = ztp(command, "--help")
        assert " int8" not in out
    assert " int8" in ztp("build", "--help")[1]


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_explains_itself(ztp, command):
    code, out, _ = ztp(command, "--help")
    assert code == 0
    assert "--json" in out
    assert "Usage" in out
    if command in ("engine", "bench"):
        assert out.count("default: auto") >= 3  # brackets are markup to rich: they must arrive


@pytest.mark.parametrize(
    "arguments, code, words",
    [
        (("plan", "-m", "deit_x", "-r", 0.7), 2, ("deit_x", "deit_s")),
        (("engine", "-m", "deit_smal", "-r", 0.7), 2, ("Did you mean",)),
        (("engine", "-m", "resnet50", "-r", 0.7), 2, ("ResNet",)),
        (("engine", "-m", "deit_t", "-r", 0), 2, ("(0, 1]",)),
        (("engine", "-m", "deit_t", "-r", 1.5), 2, ("(0, 1]",)),
        (("engine", "-m", "deit_t", "-r", "nan"), 2, ("(0, 1]",)),
        (("engine", "-m", "deit_t", "-r", "much"), 2, ("--ratio",)),
        (("engine", "-m", "deit_t"), 2, ("exactly one",)),
        (("engine", "-m", "deit_t", "--keep", "50,100,20"), 2, ("grows",)),
        (("engine", "-m", "deit_t", "--keep", "a,b"), 2, ("137,95,66",)),
        (("engine", "-m", "deit_t", "-r", 0.7, "--sites", "9,3"), 2, ("must rise",)),
        (("engine", "-m", "deit_t", "-r", 0.7, "--sites", "x"), 2, ("whole numbers",)),
        (("engine", "-m", "deit_t", "-r", 0.7, "--method", "tome2"), 2, ("no method",)),
        (("engine", "-m", "deit_t", "-r", 0.7, "-o", "tau=1"), 2, ("tau", "temperature")),
        (("engine", "-m", "deit_s", "-r", 0.7, "--method", "dynamicvit"), 2, ("weights have none", "weights=random")),
        (("engine", "-m", "deit_t", "-r", 0.7, "-o", "tau"), 2, ("name=value",)),
        (("engine", "-m", "deit_t", "-r", 0.7, "--batch", "8:4:1"), 2, ("min:opt:max",)),
        (("engine", "-m", "deit_t", "-r", 0.7, "--batches", ""), 2, ("not a list of whole numbers",)),
        (("engine", "-m", "deit_t", "-r", 0.7, "--batches", "1 8"), 2, ("'1 8' is not a list of whole numbers",)),
        (("engine", "-m", "deit_t", "-r", 0.7, "--batch", "1:2:4", "--batches", "1,8"), 2, ("Batch 8", "1 to 4")),
        (("engine", "-m", "deit_t", "-r", 0.7, "--batches", "0"), 2, ("Batch 0",)),
        (("engine", "-m", "deit_t", "-r", 0.7, "--backend", "trt"), 2, ("no back end",)),
        (("engine", "-m", "deit_t", "-r", 0.7, "--input", "fp8"), 2, ("uint8",)),
        (("engine", "-m", "deit_t", "-r", 0.7, "--precision", "int4", "--weights", "random"), 2, ("fp32",)),
        (("engine", "-m", "deit_t", "-r", 0.7, "--weights", "no/such.pth"), 2, ("no/such.pth", "not a file")),
        (("engine", "-m", "deit_t", "-r", 0.7, "--recipe", "none"), 2, ("no recipe",)),
        (("engine", "-m", "deit_t", "-r", 0.7, "--profile", "none"), 2, ("no profile",)),
        (("engine", "-m", "deit_t", "-r", 0.7, "--weights", "random", "--images", "nowhere"), 2, ("not a folder",)),
        (("export", "-m", "deit_t", "-r", 0.7, "--format", "onyx"), 2, ("onnx",)),
        (("build", "--artifact", "nowhere"), 2, ("not an artifact folder",)),
        (("check", "--engine", "nowhere"), 2, ("not an engine folder",)),
        (("bench",), 2, ("--engine", "--model")),
        (("bench", "--engine", "nowhere"), 2, ("not an engine folder",)),
        (("classify", "a.png", "--engine", "nowhere"), 2, ("not an engine folder",)),
        (("classify", "--engine", "nowhere"), 2, ("IMAGE",)),
        (("bench", "--engine", "a", "--ratio", 0.7), 2, ("--ratio", "no sense")),
        (("bench", "--engine", "a", "--engine", "a"), 2, ("twice",)),
        (("bench", "--engine", "a", "--engine", "a", "--clients", 2), 2, ("twice",)),
        (("bench", "--engine", "nowhere", "--clients", "1,2"), 2, ("nowhere", "engine folder")),
        (("bench", "--engine", "a", "--clients", "two"), 2, ("--clients", "whole numbers")),
        (("bench", "--engine", "a", "--clients", "1,0"), 2, ("0 clients", "1 to 256")),
        (("bench", "--engine", "a", "--clients", "4,4"), 2, ("4 twice",)),
        (("bench", "--engine", "a", "--clients", "1", "--seconds", "nan"), 2, ("seconds",)),
        (("bench", "--engine", "a", "--rate", "fast"), 2, ("--rate", "10,20.5")),
        (("bench", "--engine", "a", "--rate", "-1"), 2, ("-1 requests a second",)),
        (("bench", "--engine", "a", "--rate", "inf"), 2, ("inf requests a second",)),
        (("bench", "--engine", "a", "--rate", 20, "--clients", "1,2"), 2, ("Both clients and a rate",)),
        (("bench", "-m", "deit_t", "-r", 0.7, "--rate", 20, "--clients", "1,2"), 2, ("Both clients and a rate",)),
        (("bench", "-m", "deit_t", "-r", 0.7, "--clients", 2, "--batches", 65), 2, ("Batch 65",)),
        (("bench", "--clients", 2), 2, ("--engine", "--model")),
        (("engine", "-m", "deit_t", "-r", 0.7, "--seconds", "nan"), 2, ("seconds",)),
        (("engine", "-m", "deit_t", "-r", 0.7, "--device", "tpu"), 2, ("tpu",)),
        (("engine", "-m", "deit_t", "-r", 0.7, "--images", "nowhere"), 2, ("not a folder",)),
        (("engine", "-m", "deit_t", "-r", 0.7, "-o", "variance_bounds=[-1,-1]"), 2, ("variance_bounds",)),
        (("classify", "a" * 300, "--engine", "b" * 300), 2, ("too long",)),
        (("plan", "-m", "vitamin_small_224", "-r", 0.7), 2, ("cannot be pruned",)),
        (("fly",), 2, ("fly", "ztp --help")),
        (("plan", "--colour"), 2, ("--colour", "`ztp plan --help`")),
        (("--colour",), 2, ("--colour", "`ztp --help`")),
    ],
)
def test_bad_requests(ztp, tmp_path, arguments, code, words):
    one_sentence(*ztp(*arguments), code, *words)
    assert [path.name for path in tmp_path.iterdir()] == []


def test_refusals_in_json(ztp):
    code, out, err = ztp("plan", "-m", "deit_x", "-r", 0.7, "--json")
    assert (code, err) == (2, "")
    error = json.loads(out)["error"]
    assert error["exit_code"] == 2
    assert "deit_x" in error["problem"]
    assert "deit_s" in error["fix"]
    code, out, err = ztp("plan", "-m", "deit_s", "--ratio", "x", "--json")
    assert (code, err) == (2, "")
    assert "--ratio" in json.loads(out)["error"]["problem"]


def test_bad_files_for_an_engine(made, ztp, tmp_path):
    folder, _ = made
    [engine] = folder.glob("engines/*/deit_t--zero_tprune*")
    Path("good.png").write_bytes(b"")
    one_sentence(*ztp("classify", "good.png", "--engine", engine), 2, "good.png")
    one_sentence(*ztp("classify", "missing.png", "--engine", engine), 2, "missing.png")
    copy = tmp_path / "copy"
    shutil.copytree(engine, copy)
    manifest = (copy / "manifest.json").read_text()
    (copy / "manifest.json").write_text(manifest.replace('"max": 4', '"max": 64'))
    Image.new("RGB", (30, 30)).save("good.png")
    one_sentence(*ztp("classify", "good.png", "--engine", copy), 2, "edited")
    (copy / "manifest.json").write_text(manifest)
    graph = copy / "model.onnx"
    graph.write_bytes(graph.read_bytes()[:1000])
    one_sentence(*ztp("classify", "good.png", "--engine", copy), 2, "1000 bytes")


def test_a_folder_is_classified_and_what_cannot_be_read_is_named(shared_engine, ztp):
    """In several batches, since this engine takes 8 images at most."""
    Path("photos/deep").mkdir(parents=True)
    crops = list(photograph_crops(10).values())
    names = [f"photos/{index}.png" for index in range(9)] + ["photos/deep/9.png"]
    for name, crop in zip(names, crops, strict=True):
        crop.save(name)
    Path("photos/notes.txt").write_text("nothing to see")
    engine = shared_engine.directory
    code, out, err = ztp("classify", "photos", "--engine", engine, "--top", 1, "--json")
    assert (code, err) == (0, "")
    good = {entry["image"]: entry["top"] for entry in json.loads(out)["images"]}
    assert sorted(good) == sorted(names)
    broken = Path("photos/5.png")
    broken.write_bytes(broken.read_bytes()[:5000])
    code, out, err = ztp("classify", "photos", "--engine", engine, "--top", 1, "--json")
    assert (code, err) == (2, "")
    found = {entry.pop("image"): entry for entry in json.loads(out)["images"]}
    assert "photos/5.png" in found.pop("photos/5.png")["error"]
    assert {name: entry["top"][0]["class"] for name, entry in found.items()} == {
        name: top[0]["class"] for name, top in good.items() if name != "photos/5.png"
    }
    code, out, err = ztp("classify", "photos", "--engine", engine, "--top", 1)
    assert code == 2
    assert out.count("%") == 9
    assert "photos/5.png" in err
    assert "1 of 10 images could not be read" in err
    one_sentence(*ztp("classify", "photos/5.png", "--engine", engine), 2, "photos/5.png")
    Path("empty").mkdir()
    one_sentence(*ztp("classify", "empty", "--engine", engine), 2, "The folder empty holds no images")


def test_words_between_colons_are_printed_as_they_are(ztp):
    one_sentence(*ztp("engine", "-m", "deit_t", "-r", 0.7, "--batch", "1:x:3"), 2, "batch='1:x:3' is not a range")


def test_recipes_and_profiles(ztp):
    Path("export").mkdir()
    Path("engines").mkdir()
    Path("export/mine.toml").write_text('model = "deit_t"\nflops = 0.65\n[options]\nrounds = 4\n')
    Path("engines/small.toml").write_text('backend = "torchscript"\nbatch = "1:1:2"\n')
    code, out, err = ztp(
        "export", "-m", "deit_t", "--recipe", "mine", "--weights", "random", "--format", "torchscript", "--json"
    )
    assert code == 0, err
    plan = json.loads(out)["manifest"]["plan"]
    assert plan["asked"]["flops"] == 0.65
    assert plan["options"]["rounds"] == 4
    code, out, err = ztp("build", "--artifact", json.loads(out)["artifact"], "--profile", "small", "--json")
    assert code == 0, err
    assert json.loads(out)["manifest"]["batch"] == {"min": 1, "opt": 1, "max": 2}
    words = ("The recipe mine is for deit_t, and --model deit_s was given", "Leave --model out")
    one_sentence(*ztp("export", "-m", "deit_s", "--recipe", "mine"), 2, *words)
    Path("export/mine.toml").write_text('model = "deit_t"\nmethod = "slice"\nratio = 0.5\n')
    arguments = (
        "export",
        "-m",
        "deit_t",
        "--recipe",
        "mine",
        "--weights",
        "random",
        "--format",
        "torchscript",
        "--json",
    )
    assert json.loads(ztp(*arguments)[1])["manifest"]["plan"]["method"] == "slice"
    assert json.loads(ztp(*arguments, "--method", "zero_tprune")[1])["manifest"]["plan"]["method"] == "zero_tprune"
    Path("export/mine.toml").write_bytes(b"\xff\xfe")
    one_sentence(*ztp("export", "-m", "deit_t", "--recipe", "mine"), 2, "TOML")
    Path("export/mine.toml").write_text('model = "deit_t"\nratios = 0.65\n')
    one_sentence(*ztp("export", "-m", "deit_t", "--recipe", "mine"), 2, "ratios")
    Path("export/mine.toml").write_text("model = \n")
    one_sentence(*ztp("export", "-m", "deit_t", "--recipe", "mine"), 2, "TOML")


def test_a_profile_for_other_images_than_the_artifact_takes_is_refused(ztp, artifact, pruned, exported):
    Path("engines").mkdir()
    Path("engines/floats.toml").write_text('input = "float32"\n')
    Path("engines/small.toml").write_text('batch = "1:1:2"\n')
    pixels = exported(pruned, input="uint8").directory
    for folder, profile, asked, takes in (
        (artifact.directory, "pixels", "uint8", "float32"),
        (pixels, "floats", "float32", "uint8"),
    ):
        words = (f"{profile} asks for {asked}", f"exported for {takes}", f"--input {asked}", f"--profile {profile}")
        one_sentence(*ztp("build", "-a", folder, "-b", "onnxruntime", "--profile", profile), 2, *words)
    code, out, err = ztp("build", "-a", pixels, "-b", "onnxruntime", "--profile", "small", "--json")
    assert code == 0, err
    assert json.loads(out)["manifest"]["input"]["dtype"] == "uint8"  # where a profile says nothing, the artifact does


def requests(monkeypatch):
    """Records what `make_engine` is asked for, and stops there."""
    asked = []

    def make_engine(wanted, request, monitor, **others):
        asked.append((wanted, request, others))
        raise BadRequest("Asked.")

    monkeypatch.setattr("ztp_deploy.workflow.make.make_engine", make_engine)
    return asked


def test_engines_under_load(made, ztp, tmp_path):
    """Two engines from the command line: the table, evidence in both folders, a record, and nothing unproved."""
    folder, _ = made
    dense, pruned = (
        shutil.copytree(next(folder.glob(f"engines/*/deit_t--{name}--*")), tmp_path / "engines" / name)
        for name in ("dense", "zero_tprune-0.7")
    )
    both = ("bench", "--engine", dense, "--engine", pruned, "--batches", 2, "--seconds", 0.1)
    code, out, err = ztp(*both, "--clients", "1,2", "--record", "records")
    assert code == 0, err
    assert "Under load, batch 2; ms a request" in out
    assert "Clients are threads of one Python process" in out
    assert "measure load with 1, 2 clients, at batch 2" in err
    table = next(Path("records").glob("deit_t--load-onnxruntime-fp32--*.md")).read_text()
    [evidence] = {(one / "evidence" / "load.json").read_text() for one in (dense, pruned)}
    assert evidence == next(Path("records").glob("*.samples.json")).read_text()
    assert [(one["role"], one["clients"]) for one in json.loads(evidence)["levels"]] == [
        (f"engines/{role}", clients) for clients in (1, 2) for role in ("dense", "zero_tprune-0.7")
    ]
    assert "Under load" in (dense / "evidence" / "report.html").read_text()
    assert (pruned / "evidence" / "report.md").read_text().endswith(f"## Under load\n\n{table}")
    code, out, err = ztp(*both, "--rate", 1000, "--threads", 1, "--json")
    assert code == 0, err
    found = json.loads(out)
    assert (found["schema"], [one["rate"] for one in found["levels"]]) == ("ztp.load/1", [1000.0, 1000.0])
    report = (pruned / "evidence" / "report.md").read_text()
    assert f"## Under load\n\n{table}\n| batch | requests/s |" in report
    assert (pruned / "evidence" / "rate.json").is_file()
    code, out, err = ztp("check", "--engine", pruned, "--count", 8)
    assert code == 0, err
    assert "## Under load" in (pruned / "evidence" / "report.md").read_text()  # a new check leaves it there
    (dense / "evidence" / "parity.json").unlink()
    one_sentence(*ztp(*both, "--clients", 2), 2, "passed no parity check as it stands", "ztp check --engine")


def test_a_model_under_load(made, ztp, monkeypatch):
    """Dense, pruned and slice twin are made and proved first; here they stand already."""
    folder, _ = made
    monkeypatch.chdir(folder)
    arguments = ("-m", "deit_t", "-r", 0.7, "--weights", "random", "--batch", "1:2:4", "--batches", 1)
    code, out, err = ztp("bench", *arguments, "--clients", 2, "--seconds", 0.1, "--json")
    assert code == 0, err
    assert [one["role"] for one in json.loads(out)["levels"]] == ["dense", "pruned", "slice"]
    assert len(json.loads(out)["ratios"]) == 3
    loads = list(folder.glob("engines/*/*/evidence/load.json"))
    assert len(loads) == 3
    for path in loads:
        path.unlink()


@pytest.mark.parametrize("command", ["engine", "bench"])
def test_a_recipe_brings_its_model(ztp, monkeypatch, command):
    asked = requests(monkeypatch)
    Path("mine.toml").write_text('model = "deit_t"\nflops = 0.65\n')
    one_sentence(*ztp(command, "--recipe", "mine.toml"), 2, "Asked.")
    one_sentence(*ztp(command, "--recipe", "mine.toml", "--model", "deit_t"), 2, "Asked.")
    assert [(wanted.model, wanted.flops) for wanted, _, _ in asked] == [("deit_t", 0.65)] * 2
    one_sentence(*ztp(command, "--recipe", "mine.toml", "--model", "deit_b"), 2, "for deit_t, and --model deit_b")
    code, out, err = ztp(command, "--ratio", 0.7)
    one_sentence(code, out, err, 2, "--model", "--recipe")
    assert len(asked) == 2


def test_plan_previews_a_recipe(ztp):
    Path("mine.toml").write_text('model = "deit_t"\nratio = 0.5\n')
    code, out, err = ztp("plan", "--recipe", "mine.toml", "--json")
    assert code == 0, err
    assert json.loads(out) == json.loads(ztp("plan", "-m", "deit_t", "-r", 0.5, "--json")[1])
    asked = json.loads(ztp("plan", "--recipe", "mine.toml", "-r", 0.7, "--json")[1])["asked"]
    assert asked["ratio"] == 0.7
    one_sentence(*ztp("plan", "-r", 0.7), 2, "--model", "--recipe")


def test_export_takes_its_model_from_a_recipe(ztp):
    Path("mine.toml").write_text('model = "deit_t"\nratio = 0.5\n')
    arguments = ("export", "--recipe", "mine.toml", "--weights", "random", "--format", "torchscript", "--json")
    code, out, err = ztp(*arguments)
    assert code == 0, err
    assert json.loads(out)["artifact"] == "export/deit_t--zero_tprune-0.5--torchscript--fp32--random"
    one_sentence(*ztp("show", "a.png", "--recipe", "mine.toml", "--engine", "e"), 2, "either an engine folder")


def test_bench_finds_the_engine_that_was_calibrated_on_these_images(ztp, monkeypatch):
    asked = requests(monkeypatch)
    for command in ("engine", "bench"):
        arguments = ("-m", "deit_t", "-r", 0.7, "-b", "openvino", "--precision", "int8", "--images", "photos")
        one_sentence(*ztp(command, *arguments), 2, "Asked.")
    (_, engine, one), (_, bench, other) = asked
    assert engine == bench
    assert one["images"] == other["images"] == "photos"


@pytest.mark.parametrize(
    "start, heeded",
    [
        (
            ("bench", "--engine", "e"),
            {"engine", "batches", "seconds", "clients", "rate", "threads", "record", "as_json"},
        ),
        (("show", "a.png", "--engine", "e"), {"images", "engine", "directory", "as_json"}),
        (
            ("eval", "--engine", "e", "--data", "d"),
            {"data", "engine", "weights", "dense_engine", "no_dense", "batch", "workers", "device", "as_json"},
        ),
    ],
    ids=lambda value: value[0] if isinstance(value, tuple) else "",
)
def test_what_a_standing_engine_does_not_heed_is_refused(ztp, start, heeded):
    """Every option of the command is either listed here as heeded, or refused by its name, also at its default value."""
    from typer.main import get_command

    parameters = {parameter.name: parameter for parameter in get_command(app).commands[start[0]].params}
    assert heeded <= set(parameters)
    refused = set(parameters) - heeded - {"model", "recipe", "help"}
    assert {"method", "ratio", "flops", "keep", "sites", "option"} <= refused
    for name in sorted(refused):
        option = max(parameters[name].opts, key=len)
        value = () if parameters[name].is_flag else ("2",)
        one_sentence(*ztp(*start, option, *value), 2, f"{option} makes no sense with --engine")
    for word in ("--model", "--recipe"):
        one_sentence(*ztp(*start, word, "m"), 2, "Give either an engine folder (--engine) or a model")


@pytest.mark.parametrize(
    "arguments, words",
    [
        (("bench", "--engine", "X", "--precision", "int8", "--batch", 4, "--option", "a=1"), ("makes no sense",)),
        (("engine", "-m", "deit_t", "-r", 0.7, "--no-bench", "--batches", 8), ("--batches", "--no-bench")),
        (("engine", "-m", "deit_t", "-r", 0.7, "--no-bench", "--seconds", 12), ("--seconds", "--no-bench")),
        (("build", "-a", "a", "-b", "onnxruntime", "--images", "i"), ("--images", "precision fp32", "ztp check")),
        (("tune", "-m", "deit_t", "--budget", "flops=0.6", "--images", "i", "--precision", "fp16"), ("--precision",)),
        (("tune", "-m", "deit_t", "--budget", "flops=0.6", "--images", "i", "--seconds", 10), ("--seconds",)),
        (("eval", "-m", "deit_t", "-r", 0.7, "--data", "d", "--dense-engine", "e"), ("--dense-engine", "--model")),
    ],
)
def test_options_that_would_be_ignored_are_refused(ztp, tmp_path, arguments, words):
    one_sentence(*ztp(*arguments), 2, *words)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    "seconds, number, code, word",
    [
        (1.0, signal.SIGINT, 130, "Interrupted"),
        (1.0, signal.SIGTERM, 143, "Terminated"),
        (4.0, signal.SIGTERM, 143, "Terminated"),
        (7.0, signal.SIGINT, 130, "Interrupted"),
    ],
)
def test_a_stopped_command_leaves_nothing_partial(tmp_path, seconds, number, code, word):
    command = [sys.executable, "-m", "ztp_deploy", "engine", "-m", "deit_t", "-r", "0.7", "--weights", "random"]
    process = subprocess.Popen(command, cwd=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    time.sleep(seconds)
    process.send_signal(number)
    _, err = process.communicate(timeout=60)
    assert process.returncode == code, err
    assert "Traceback" not in err, err
    assert word in err
    assert not list(tmp_path.rglob("*.partial"))
    for folder in tmp_path.glob("e*/**/manifest.json"):
        assert json.loads(folder.read_text())["seal"]


@pytest.mark.parametrize(
    "number, code, word", [(signal.SIGINT, 130, "Interrupted"), (signal.SIGTERM, 143, "Terminated")]
)
def test_a_signal_while_the_command_line_is_imported_is_answered(number, code, word):
    script = f"""
import os, signal, sys
from ztp_deploy import __main__

class Press:
    @staticmethod
    def find_spec(name, path=None, target=None):
        if name == "ztp_deploy.cli":
            os.kill(os.getpid(), {int(number)})

sys.meta_path.insert(0, Press)
__main__.main()
"""
    command = [sys.executable, "-c", script, "list"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stdout, done.stderr) == (code, "", f"{word}; nothing was begun.\n")
    done = subprocess.run([*command, "--json"], capture_output=True, text=True, timeout=60)
    assert (done.returncode, json.loads(done.stdout)["error"]["exit_code"], done.stderr) == (code, code, "")


def test_the_command_line_starts_without_engine_libraries():
    script = "import sys, ztp_deploy, ztp_deploy.cli.app; print([m for m in ('torch', 'onnx', 'onnxruntime', 'timm') if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=60)
    assert done.stdout.strip() == "[]", done.stderr


@pytest.mark.parametrize(
    "arguments, words",
    [
        (("--methods", "slice,slice", "--flops", 0.65), ("names slice twice",)),
        (("--methods", ",", "--flops", 0.65), ("names no method",)),
        (("--methods", "slice"), ("Neither --ratio nor --flops",)),
        (("--methods", "slice", "--flops", 0.65, "--ratio", 0.7), ("--ratio 0.7 and --flops 0.65 were both given",)),
        (("--methods", "slice", "--flops", 0.65, "-o", "tome.r=3"), ("names no method of this comparison",)),
        (("--methods", "tone", "--flops", 0.65), ("no method 'tone'",)),
        (("--methods", "dynamicvit", "--flops", 0.65, "--weights", "random"), ("weights have none", "weights=random")),
    ],
)
def test_comparisons_that_make_no_sense(ztp, arguments, words):
    one_sentence(*ztp("compare", "-m", "deit_t", *arguments), 2, *words)
