"""`ztp engine BACKEND=tensorrt_rtx` where there is no GPU: built, not run, and said loudly."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.backends.tensorrt import needs_modelopt, needs_rtx
from tests.commands import typed
from ztp_deploy import environment
from ztp_deploy.backends.tensorrt import quantise
from ztp_deploy.evidence.images import photograph_crops

pytestmark = needs_rtx

ENGINE = ("engine", "--model", "deit_t", "--method", "slice", "--ratio", 0.7, "--weights", "random")
RTX_FP16 = ("--backend", "tensorrt_rtx", "--precision", "fp16", "--batch", "1:2:4", "--batches", "1,2")


@pytest.fixture(scope="module")
def ztp(tmp_path_factory):
    """Runs a command in one folder for all tests here, without a GPU; returns exit code, stdout and stderr."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(environment, "gpus", lambda: ())
        patch.chdir(tmp_path_factory.mktemp("commands"))

        def run(capsys, *arguments: object) -> tuple[int, str, str]:
            return typed(patch, capsys, *arguments)

        yield run


@pytest.fixture(scope="module")
def report(ztp):
    """The engine, made once."""
    import contextlib
    import io

    out, err = io.StringIO(), io.StringIO()

    class Capture:
        def readouterr(self):
            return type("Captured", (), {"out": out.getvalue(), "err": err.getvalue()})

    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        code, printed, told = ztp(Capture(), *ENGINE, *RTX_FP16, "--json")
    return code, json.loads(printed), told


def test_an_engine_is_built_and_said_not_to_have_run(report):
    code, summary, _told = report
    assert code == 0
    assert summary["unproved"] == "no NVIDIA GPU was found"
    assert (summary["parity_passed"], summary["worst_logit"], summary["timings"]) == (None, None, [])
    assert summary["notes"][0].startswith("BUILT, NOT RUN: no NVIDIA GPU was found")
    engine = Path(summary["engine"])
    assert engine.parent.name.startswith("tensorrt_rtx-")
    assert engine.parent.name.endswith("-portable")
    assert {path.name for path in (engine / "evidence").iterdir()} == {"report.json", "report.md", "report.html"}
    page = (engine / "evidence" / "report.html").read_text()
    assert "BUILT, NOT RUN: no NVIDIA GPU was found" in page
    assert "None" not in page
    text = (engine / "evidence" / "report.md").read_text()
    assert "BUILT, NOT RUN" in text
    assert "was not checked" in text
    assert "None" not in text
    manifest = json.loads((engine / "manifest.json").read_text())
    assert manifest["built"]["attention_fused"] == 12
    assert manifest["unproved"] == "no NVIDIA GPU was found"


def test_the_terminal_says_so_too(report, ztp, capsys):
    code, out, err = ztp(capsys, *ENGINE, *RTX_FP16)
    assert code == 0
    assert "BUILT, NOT RUN" in out
    assert "Parity was not checked" in out
    assert "BUILT, NOT RUN" in err


def test_what_would_run_it_is_refused(report, ztp, capsys):
    engine = report[1]["engine"]
    for command in (("check", "--engine", engine), ("bench", "--engine", engine), ("bench", *ENGINE[1:], *RTX_FP16)):
        code, out, err = ztp(capsys, *command)
        assert (code, out) == (3, ""), err
        assert "no NVIDIA GPU was found" in err


@needs_modelopt
def test_int8_is_calibrated_on_the_users_pictures(report, ztp, capsys, tmp_path):
    for index, crop in enumerate(photograph_crops(6).values()):
        crop.save(tmp_path / f"{index}.png")
    options = ("--backend", "tensorrt_rtx", "--precision", "int8", "--batch", "1:2:4", "--batches", "1,2", "--json")
    code, out, err = ztp(capsys, *ENGINE, *options, "--images", tmp_path)
    assert code == 0, err
    manifest = json.loads((Path(json.loads(out)["engine"]) / "manifest.json").read_text())
    assert manifest["precision"] == "int8"
    assert manifest["built"]["calibration"]["images"] == 6
    assert manifest["built"]["engine_products"] == {"asked": 72, "proved": 72}
    assert set(manifest["files"]) == {"model.plan", "model.onnx"}


def test_int8_without_modelopt_is_refused_before_a_model_is_loaded(ztp, capsys, monkeypatch):
    monkeypatch.setattr("ztp_deploy.workflow.steps.load", lambda *arguments: pytest.fail("a model was loaded"))
    monkeypatch.setattr(quantise, "PACKAGE", "not-installed")
    code, out, err = ztp(capsys, *ENGINE, "--backend", "tensorrt_rtx", "--precision", "int8")
    assert (code, out) == (3, "")
    assert 'pip install "ztp_deploy[modelopt]"' in " ".join(err.split())


def test_tensorrt_itself_needs_the_gpu(ztp, capsys, monkeypatch):
    code, out, err = ztp(capsys, *ENGINE, "--backend", "tensorrt", "--precision", "fp16")
    assert (code, out) == (3, "")
    assert "tensorrt, which is not installed" in err or "none was found" in err
    monkeypatch.setattr("ztp_deploy.backends.tensorrt.library.Library.found", lambda self: self.module)
    code, _, err = ztp(capsys, *ENGINE, "--backend", "tensorrt", "--precision", "fp16")
    assert code == 3
    assert "builds on the very GPU that is to run the engine" in err


def test_list_and_doctor_name_both(ztp, capsys):
    code, out, _ = ztp(capsys, "list", "--json")
    assert code == 0
    found = {row["name"]: row for row in json.loads(out)["backends"]}
    assert found["tensorrt_rtx"]["status"] == "builds only"
    code, out, _ = ztp(capsys, "doctor", "--json")
    assert code == 0
    facts = json.loads(out)
    assert facts["would use"]["tensorrt_rtx"].startswith("builds only: ")
    assert facts["auto"] == "onnxruntime"
