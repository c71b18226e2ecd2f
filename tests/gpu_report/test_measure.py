"""The GPU report, run on the CPU: resumed, honest about what is missing or fails, rendered."""

from __future__ import annotations

import json
import os
import shutil
from types import SimpleNamespace

import numpy as np
import pytest
import torch

import ztp_deploy as ztp
from tests import tiny
from ztp_deploy import environment
from ztp_deploy.errors import BadRequest, DamagedFiles, GateFailed, MissingSoftware
from ztp_deploy.evidence import latency
from ztp_deploy.evidence.images import load_images
from ztp_deploy.gpu_report import measure, runtimes
from ztp_deploy.gpu_report.grid import Grid
from ztp_deploy.gpu_report.measure import measure_gpu
from ztp_deploy.gpu_report.rows import GpuReport
from ztp_deploy.gpu_report.runtimes import Job, open_job
from ztp_deploy.gpu_report.table import render_gpu_report
from ztp_deploy.methods.slice import twin_of

SMALL = tiny.SIZE.model_copy(update={"depth": 2})


def plans(model):
    pruned = ztp.make_plan(model, ratio=0.7, sites=[1], options={"rounds": 2})
    return {"dense": ztp.make_plan(model, "dense"), "pruned": pruned, "slice": twin_of(pruned)}


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    """Where artifacts and engines stand, for all tests."""
    return tmp_path_factory.mktemp("built")


@pytest.fixture
def grid(built, monkeypatch):
    monkeypatch.setattr(latency, "MAX_ROUNDS", latency.MIN_ROUNDS)
    return Grid(
        models=("deit_t",),
        runtimes=("eager", "tensorrt_rtx", "onnxruntime"),
        precisions=("fp32",),
        batches=(1, 2),
        device="cpu",
        weights="random",
        export_root=built / "export",
        engines_root=built / "engines",
        load=lambda name, weights: tiny.model(name, SMALL),
        plans=plans,
    )


@pytest.fixture(autouse=True)
def no_rtx(monkeypatch):
    """TensorRT-RTX is the runtime that is not here."""
    monkeypatch.setattr(
        runtimes,
        "unavailable",
        lambda runtime, precision: "pip install tensorrt-rtx." if runtime == "tensorrt_rtx" else None,
    )
    version = runtimes.version_of
    monkeypatch.setattr(runtimes, "version_of", lambda runtime: "" if "rtx" in runtime else version(runtime))


def test_an_interrupted_report_goes_on_and_measures_nothing_twice(grid, tmp_path):
    path = tmp_path / "gpu" / "here.json"
    timed = []

    def interrupt(title):
        timed.append(title)
        if "onnxruntime" in title:  # after eager's two cells and the missing ones
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        measure_gpu(grid, path, advance=interrupt)
    first = GpuReport.model_validate_json(path.read_bytes())
    assert [(row.runtime, row.batch, row.plan, row.status) for row in first.rows] == [
        *(("eager", batch, plan, "measured") for batch in (1, 2) for plan in ("dense", "pruned", "slice")),
        *(("tensorrt_rtx", batch, plan, "missing") for batch in (1, 2) for plan in ("dense", "pruned", "slice")),
    ]
    again = []
    progress = measure_gpu(grid, path, advance=again.append, command="ztp gpu-report")
    assert not [title for title in again if "eager" in title]
    assert (progress.done, progress.cells) == (6, 6)
    report = GpuReport.model_validate_json(path.read_bytes())
    assert report.rows[: len(first.rows)] == first.rows
    assert len({row.key for row in report.rows}) == len(report.rows) == 18
    assert [row.session for row in report.rows] == [0] * 12 + [1] * 6
    assert report.sessions[1].command == "ztp gpu-report"
    third = []
    assert measure_gpu(grid, path, advance=third.append).report == report
    assert third == []
    assert not list(tmp_path.rglob("*.partial"))


def test_rows_hold_what_was_measured(grid, tmp_path):
    report = measure_gpu(grid, tmp_path / "r.json").report
    assert json.loads((tmp_path / "r.json").read_text())["schema"] == "ztp.gpu/1"
    for row in report.rows:
        if row.runtime == "tensorrt_rtx":
            assert (row.status, row.reason, row.milliseconds) == ("missing", "pip install tensorrt-rtx.", [])
            continue
        assert (row.status, row.parity, row.weights) == ("measured", "holds", "random")
        assert row.worst_logit < 1e-4
        assert len(row.milliseconds) == latency.MIN_ROUNDS
        assert row.median == pytest.approx(np.median(row.milliseconds), abs=1e-3)
        assert row.images_per_second == pytest.approx(row.batch * 1e3 / row.median)
        assert (row.speedup is None) == (row.plan == "dense")
        if row.speedup:
            assert row.speedup.low <= row.speedup.speedup <= row.speedup.high
            assert (row.speedup.engine, row.speedup.reference) == (row.plan, "dense")
    assert report.gpu == "none: run on the CPU"
    assert report.sessions[0].before["absent"]


def test_the_table_names_gpu_runtimes_and_what_is_missing(grid, tmp_path):
    report = measure_gpu(grid, tmp_path / "r.json").report
    report.gpu = "NVIDIA Test"
    report.sessions[0].before = report.sessions[-1].after = {"clocks.sm": "1980", "temperature.gpu": "41"}
    text = render_gpu_report(report)
    lines = text.splitlines()
    assert (
        lines[0]
        == "| model | runtime | precision | batch | dense: ms per image | pruned over dense | slice over dense |"
    )
    assert len([line for line in lines if line.startswith("| deit_t |")]) == 4
    dense = next(row for row in report.rows if row.plan == "dense")
    pruned = next(row for row in report.rows if row.plan == "pruned")
    assert f"| deit_t | eager | fp32 | 1 | {dense.median:.3f} | **{pruned.speedup.speedup:.2f} ×**" in text
    assert "- tensorrt_rtx fp32, missing (6 rows): pip install tensorrt-rtx." in text
    assert "NVIDIA Test" in text
    assert "clocks.sm 1980 → 1980" in text
    assert "Random weights" in text


def test_replays_are_rows_beside_the_plain_runs(grid, tmp_path, monkeypatch):
    def recorded(opened, images):
        if len(images) == 2:
            raise RuntimeError("operation not permitted when stream is capturing")
        return None if isinstance(opened, runtimes._Engine) else opened

    monkeypatch.setattr(runtimes, "recorded", recorded)
    one = Grid(**{**vars(grid), "runtimes": ("eager", "onnxruntime")})
    report = measure_gpu(one, tmp_path / "r.json").report
    found = {(row.runtime, row.batch, row.plan, row.cuda_graph): row for row in report.rows}
    assert len(found) == len(report.rows) == 3 * (2 + 2 + 1 + 2)
    replayed, plain = found["eager", 1, "pruned", True], found["eager", 1, "pruned", False]
    assert replayed.status == plain.status == "measured"
    assert replayed.milliseconds != plain.milliseconds
    assert (replayed.speedup.engine, replayed.speedup.reference) == ("pruned, CUDA graph", "dense, CUDA graph")
    assert (plain.of_twin.engine, plain.of_twin.reference) == ("pruned", "slice")
    assert found["eager", 1, "slice", True].of_twin is None
    refused = found["eager", 2, "dense", True]
    assert (refused.status, refused.milliseconds) == ("failed", [])
    assert "is capturing" in refused.reason
    assert found["eager", 2, "dense", False].status == "measured"
    text = render_gpu_report(report)
    assert f"| deit_t | eager, CUDA graph | fp32 | 1 | {found['eager', 1, 'dense', True].median:.3f} |" in text
    assert f"{plain.of_twin.speedup:.1%} of its twin" in text
    assert "merely cuts tokens off" in text


class OnGpu:
    """Images that say they lie on a GPU."""

    device = SimpleNamespace(type="cuda")

    def __init__(self, values):
        self.values = values

    def flip(self, *axes):
        return OnGpu(self.values.flip(*axes))


@pytest.mark.parametrize("stale", [False, True])
def test_a_replay_that_repeats_old_logits_is_not_timed(stale):
    class Replay:
        def __init__(self, compute):
            self.compute, self.first = compute, None

        def __call__(self, images):
            self.first = self.first if stale and self.first is not None else self.compute(images)
            return self.first

    def run(images):
        return images.values.flatten(1)[:, :9] * 2

    opened = SimpleNamespace(run=run, recording=lambda: SimpleNamespace(run=Replay(run)))
    images = OnGpu(torch.randn(2, 3, 4, 4, generator=torch.Generator().manual_seed(0)))
    if stale:
        with pytest.raises(GateFailed, match="does not repeat"):
            runtimes.recorded(opened, images)
    else:
        assert runtimes.recorded(opened, images)


def test_nothing_is_recorded_on_a_cpu():
    assert runtimes.recorded(SimpleNamespace(), torch.zeros(1, 3, 4, 4)) is None


def test_a_failing_parity_is_a_row_and_not_a_crash(grid, tmp_path, monkeypatch):
    opened = runtimes._Module.outputs

    def wrong(self, images, audited):
        outputs = opened(self, images, audited)
        return outputs | {"logits": outputs["logits"] * (1.5 if self._job.plan.method == "slice" else 1)}

    monkeypatch.setattr(runtimes._Module, "outputs", wrong)
    one = Grid(**{**vars(grid), "runtimes": ("eager",), "batches": (1,)})
    rows = {row.plan: row for row in measure_gpu(one, tmp_path / "r.json").report.rows}
    assert rows["pruned"].status == "measured"
    assert (rows["slice"].status, rows["slice"].parity, rows["slice"].milliseconds) == ("failed", "fails", [])
    assert rows["slice"].reason.startswith("parity: on the same tokens logits differ")


def test_a_runtime_that_breaks_is_a_row_and_the_next_goes_on(grid, tmp_path, monkeypatch):
    def out_of_memory(self, images):
        if len(images) == 2:
            raise RuntimeError("CUDA out of memory.\nmuch more text")
        return real(self, images)

    real = runtimes._Module.run
    monkeypatch.setattr(runtimes._Module, "run", out_of_memory)
    one = Grid(**{**vars(grid), "runtimes": ("eager",)})
    rows = measure_gpu(one, tmp_path / "r.json").report.rows
    assert {row.status for row in rows if row.batch == 1} == {"measured"}
    assert {(row.status, row.reason) for row in rows if row.batch == 2} == {
        ("failed", "RuntimeError: CUDA out of memory.")
    }


def test_spent_time_ends_the_call_between_cells(grid, tmp_path):
    progress = measure_gpu(grid, tmp_path / "r.json", minutes=0)
    assert (progress.done, progress.cells, progress.report.rows) == (0, 6, [])


def test_another_version_is_measured_anew(grid, tmp_path, monkeypatch):
    one = Grid(**{**vars(grid), "runtimes": ("eager",), "batches": (1,)})
    measure_gpu(one, tmp_path / "r.json")
    monkeypatch.setattr(runtimes, "version_of", lambda runtime: "99")
    rows = measure_gpu(one, tmp_path / "r.json").report.rows
    assert [(row.version, row.session) for row in rows] == [("99", 1)] * 3


@pytest.mark.parametrize("label", ["dense", "zero_tprune-0.7"])
def test_torch_compile_equals_eager_in_bf16(label, grid):
    model = tiny.model("deit_t", SMALL)
    plan = ztp.make_plan(model, "dense") if label == "dense" else ztp.make_plan(model, ratio=0.7, sites=[1])
    one = open_job(Job(model, plan, "torch_compile", "bf16", "cpu", 2, grid.export_root, grid.engines_root))
    [edge] = one.edges(load_images(None, model.source.preprocessing, "float32", 8))
    assert edge.holds
    assert 1e-4 < edge.worst_logit < 0.15
    logits = one.run(torch.zeros(2, 3, 96, 96))
    assert (logits.shape, logits.dtype) == ((2, 10), torch.float32)
    one.close()


def test_torch_compile_takes_an_open_stage_whole():
    model = tiny.model("deit_t", SMALL)
    pruned = ztp.prune(model, ztp.make_plan(model, ratio=0.7, sites=[1]))
    images = torch.from_numpy(tiny.images(2))
    with torch.inference_mode():
        found = torch.compile(pruned, backend="eager", fullgraph=True)(images)
        torch.testing.assert_close(found, pruned(images))


def test_refusals(grid, tmp_path, monkeypatch):
    path = tmp_path / "r.json"
    monkeypatch.setattr(environment, "gpus", lambda: ())
    with pytest.raises(MissingSoftware, match="needs an NVIDIA GPU"):
        measure_gpu(Grid(), path)
    for wrong in ({"runtimes": ("cuda",)}, {"precisions": ("int3",)}, {"batches": ()}, {"device": "tpu"}):
        with pytest.raises(BadRequest, match="does not know"):
            measure_gpu(Grid(**{**vars(grid), **wrong}), path)
    with pytest.raises(BadRequest) as refusal:
        measure_gpu(Grid(**{**vars(grid), "runtimes": ("eager", "onnxruntime"), "precisions": ("fp32", "int8")}), path)
    assert str(refusal.value) == (
        "int8 was asked for, and none of eager, onnxruntime has it. Runtimes that have it: tensorrt, tensorrt_rtx."
    )
    with pytest.raises(BadRequest, match="There is no model 'deit_q'"):  # before any other is measured
        measure_gpu(Grid(**{**vars(grid), "models": ("deit_t", "deit_q")}), path)
    assert not path.exists()
    path.write_text("{}")
    with pytest.raises(DamagedFiles, match="no GPU report"):
        measure_gpu(grid, path)
    path.write_text(GpuReport(gpu="NVIDIA Other", clock="CUDA events").to_json())
    with pytest.raises(BadRequest, match="measured on NVIDIA Other"):
        measure_gpu(grid, path)
    assert measure.report_path(tmp_path, "cuda") == tmp_path / "gpu" / "none.json"


def test_nvidia_smi_is_asked_for_the_gpu_that_the_driver_counts_first(tmp_path, monkeypatch):
    """CUDA_VISIBLE_DEVICES hides GPUs from the driver and not from nvidia-smi: numbers are not the same in both."""

    class Driver:
        def cuInit(self, flags):
            return 0

        def cuDeviceGetPCIBusId(self, text, length, device):
            text.value = b"0000:65:00.0"
            return 0 if device == 0 else 101

    monkeypatch.setattr(environment.ctypes, "CDLL", lambda name: Driver())
    monkeypatch.setenv("PATH", f"{tmp_path}{os.pathsep}{os.environ['PATH']}")
    tool = tmp_path / "nvidia-smi"
    tool.write_text('#!/bin/sh\necho "${3#--id=}, 580.1, P0, 1980, 2619, 1980, 41, 210.5, 700.0, 3"\n')
    tool.chmod(0o755)
    assert environment.gpu_state()["name"] == "0000:65:00.0"


def test_nvidia_smi_is_asked_for_clocks(tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    assert "not on this machine" in environment.gpu_state()["absent"]
    tool = tmp_path / "nvidia-smi"
    answer = "NVIDIA Test, 580.1, P0, 1980, 2619, 1980, 41, 210.5, 700.0, 3"
    tool.write_text(f'#!/bin/sh\necho "{answer}"\n')
    tool.chmod(0o755)
    state = environment.gpu_state()
    assert (state["clocks.sm"], state["temperature.gpu"], state["power.draw"]) == ("1980", "41", "210.5")
    tool.write_text("#!/bin/sh\necho nothing\n")
    assert "not known" in environment.gpu_state()["absent"]
    tool.write_text("#!/bin/sh\nexit 9\n")
    assert "did not answer" in environment.gpu_state()["absent"]
    assert shutil.which("nvidia-smi") == os.fspath(tool)
