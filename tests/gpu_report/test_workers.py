"""Plans built side by side: in processes of their own, which may crash."""

from __future__ import annotations

import os
from functools import partial

import ztp_deploy as ztp
from tests import tiny
from ztp_deploy.errors import MissingSoftware
from ztp_deploy.evidence.images import load_images
from ztp_deploy.gpu_report import measure
from ztp_deploy.gpu_report.grid import Grid
from ztp_deploy.gpu_report.measure import measure_gpu
from ztp_deploy.gpu_report.runtimes import Job
from ztp_deploy.gpu_report.workers import side_by_side
from ztp_deploy.methods.slice import twin_of
from ztp_deploy.models import source_of

SMALL = tiny.SIZE.model_copy(update={"depth": 2})


def load(name, weights):
    return tiny.model(name, SMALL)


def plans(model):
    pruned = ztp.make_plan(model, ratio=0.7, sites=[1])
    return {"dense": ztp.make_plan(model, "dense"), "pruned": pruned, "slice": twin_of(pruned)}


def crash(model):
    os._exit(9)


def lack(model):
    raise MissingSoftware("The library is not here.", "pip install it")


def test_what_is_built_stays_and_a_crash_is_one_answer(tmp_path):
    model = load("deit_t", "random")
    images = load_images(None, source_of(model).preprocessing, "float32", 2)
    works = partial(
        Job,
        plan=plans(model)["pruned"],
        runtime="onnxruntime",
        precision="fp32",
        device="cpu",
        max_batch=2,
        export_root=tmp_path / "export",
        engines_root=tmp_path / "engines",
    )
    found = side_by_side(
        {"works": works, "crashes": crash, "lacks": lack}, partial(load, "deit_t", "random"), images, 3
    )
    assert list(found) == ["works", "crashes", "lacks"]
    assert found["works"] is None
    assert found["crashes"] == (
        "failed",
        "The process that built it ended abruptly: it crashed, or the memory was short.",
    )
    assert found["lacks"] == ("missing", "The library is not here. pip install it")
    [manifest] = (tmp_path / "engines").rglob("manifest.json")
    assert (manifest.parent / "evidence" / "parity.json").is_file()


def test_a_report_measures_what_its_workers_built(tmp_path, monkeypatch):
    def one_crashes(jobs, load, images, workers):
        return side_by_side({**jobs, "slice": crash}, load, images, workers)

    monkeypatch.setattr(measure, "side_by_side", one_crashes)
    grid = Grid(
        models=("deit_t",),
        runtimes=("onnxruntime",),
        precisions=("fp32",),
        batches=(1,),
        device="cpu",
        weights="random",
        seconds=0.1,
        workers=3,
        export_root=tmp_path / "export",
        engines_root=tmp_path / "engines",
        load=load,
        plans=plans,
    )
    steps = []
    progress = measure_gpu(grid, tmp_path / "r.json", advance=steps.append)
    assert (progress.done, progress.cells) == (1, 1)
    rows = {row.plan: row for row in progress.report.rows}
    assert {label: row.status for label, row in rows.items()} == {
        "dense": "measured",
        "pruned": "measured",
        "slice": "failed",
    }
    assert "ended abruptly" in rows["slice"].reason
    assert steps[:3] == [
        "Load deit_t",
        "Build and prove 3 plans of deit_t side by side · onnxruntime fp32",
        "Build and prove deit_t dense · onnxruntime fp32",
    ]
    assert "  slice: The process that built it ended abruptly: it crashed, or the memory was short." in steps
    assert [effort.failures for effort in progress.report.efforts] == [{}]
