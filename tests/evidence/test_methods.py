"""Methods against each other: who is fastest, by how much, and what selection costs; and the table of it."""

from __future__ import annotations

import onnx
import pytest

import ztp_deploy as ztp
from ztp_deploy.errors import BadRequest, GateFailed
from ztp_deploy.evidence.latency import LatencyReport, Samples, paired_ratio
from ztp_deploy.evidence.methods import MethodRow, MethodsReport, twin_role
from ztp_deploy.evidence.report.methods import render_methods
from ztp_deploy.methods.slice import twin_of
from ztp_deploy.planning import make_plan
from ztp_deploy.workflow import steps
from ztp_deploy.workflow.compare import compare_methods
from ztp_deploy.workflow.make import make_engine
from ztp_deploy.workflow.progress import Silent
from ztp_deploy.workflow.requests import BuildRequest, PlanRequest

MILLISECONDS = {"dense": 20.0, "tome": 12.5, "tome slice twin": 12.0, "evit": 12.25, "evit slice twin": 12.25}


@pytest.fixture
def report() -> MethodsReport:
    """Made-up times without noise."""
    times = {role: [[value / 1e3] * 4] * 2 for role, value in MILLISECONDS.items()}
    roles = list(times)
    samples = [
        Samples(
            engine=role, role=role, manifest_sha256="0", batch=1, milliseconds=[[value]], runs=1, median=value, p90=value,
            p95=value, p99=None, drift=0, images_per_second=1e3 / value,
        )
        for role, value in MILLISECONDS.items()
    ]  # fmt: skip
    ratios = [paired_ratio(b, a, 1, times) for i, a in enumerate(roles) for b in roles[i + 1 :]]
    latency = LatencyReport(
        command="", started="", samples=samples, ratios=ratios, gpu="GPU: none", notes=["Busy."],
        environment={"cpu": "Some CPU", "cores": 2, "system": "Linux"},
    )  # fmt: skip
    rows = [
        MethodRow(
            method=name, options={}, blocks=[3], tokens=[196, 98], planned_share=0.65, executed_share=share, latency_only=None
        )
        for name, share in (("tome", 0.65), ("evit", 0.62))
    ]  # fmt: skip
    return MethodsReport(
        model="deit_s", backend="onnxruntime 1", precision="fp32", asked={"flops": 0.65}, methods=rows, latency=latency
    )


def test_the_fastest_method_and_the_distance_to_it(report):
    assert report.fastest(1) == "evit"  # a slice twin, faster still, is no method
    assert report.behind("tome", "evit", 1)[0] == pytest.approx(0.25 / 12.5)
    assert report.behind("evit", "tome", 1)[0] == pytest.approx(1 - 12.5 / 12.25)
    assert report.behind("tome", twin_role("tome"), 1)[0] == pytest.approx(0.04)


def test_the_table_says_it_line_by_line(report):
    lines = render_methods(report).splitlines()
    assert lines[2] == "| 1 | dense | 100.0 % | 100.0 % | 20.00 |  |  |  |"
    assert lines[3] == (
        "| 1 | tome | 65.0 % | 65.0 % | 12.50 | **1.60 ×** (1.60–1.60) | 2.0 % (2.0 to 2.0) | 4.0 % (4.0 to 4.0) |"
    )
    assert "fastest | 0.0 % (0.0 to 0.0)" in lines[4]
    assert lines[-1] == "- Busy."
    assert MethodsReport.model_validate_json(report.to_json()) == report


def test_twins_of_different_methods_have_names_of_their_own():
    plan = make_plan("deit_s", flops=0.65)
    twin = twin_of(plan)
    assert twin.label == "slice_of_zero_tprune-flops0.65"
    assert twin.counts == plan.counts
    assert twin_of(make_plan("deit_s", "dense")).label == "dense"


@pytest.fixture
def build(tmp_path, monkeypatch):
    """A build of the tiny model for batch 2, whatever model and plan are asked for."""
    from tests import tiny
    from ztp_deploy import models

    monkeypatch.setattr(steps, "load", lambda wanted, clock: tiny.model())
    monkeypatch.setattr(PlanRequest, "plan", lambda self, model: make_plan(tiny.model(), "zero_tprune", ratio=0.6))
    assert models.source_of(tiny.model()).name == "deit_t"
    return BuildRequest(
        backend="onnxruntime", device="cpu", batch="2", export_root=tmp_path / "x", engines_root=tmp_path / "e"
    )


WANTED = PlanRequest(model="deit_t", ratio=0.6)


def test_every_engine_is_proved_and_measured(build):
    """One method at a small size, from its name to the table."""
    with pytest.raises(BadRequest, match="Batch 1 was asked for, but the engine takes 2 to"):
        compare_methods("deit_t", [WANTED], build, Silent(), batches=(1,))
    with pytest.raises(BadRequest, match="no-such-folder"):
        compare_methods("deit_t", [WANTED], build, Silent(), images="no-such-folder")
    assert not build.export_root.exists()  # told before anything is built
    found = compare_methods("deit_t", [WANTED], build, Silent(), seconds=0.2)
    assert found.latency.command == "ztp_deploy.workflow.compare.compare_methods"
    assert {sample.batch for sample in found.latency.samples} == {2}
    assert [sample.role for sample in found.latency.samples] == ["dense", "zero_tprune", "zero_tprune slice twin"]
    assert found.asked == {"ratio": 0.6}
    assert found.methods[0].tokens == [36, 21, 12, 7]
    assert found.methods[0].executed_share < found.methods[0].planned_share < 1
    assert len(list(build.engines_root.glob("*/*/evidence/parity.json"))) == 3


def test_yardsticks_are_proved_once_and_again_when_they_changed(build, monkeypatch):
    """A dense engine or a slice twin that computes something else would make every ratio wrong."""
    from tests import tiny

    checked = []

    def check_parity(engine, model, pictures, **others):
        checked.append((engine.manifest.plan.method, len(pictures.names)))
        return ztp.check_parity(engine, model, pictures, **others)

    def damage(graph):
        node = next(node for node in reversed(graph.graph.node) if node.op_type in ("Gemm", "MatMul"))
        [weight] = [one for one in graph.graph.initializer if one.name == node.input[1]]
        weight.CopyFrom(onnx.numpy_helper.from_array(-onnx.numpy_helper.to_array(weight), weight.name))

    monkeypatch.setattr(steps, "check_parity", check_parity)
    monkeypatch.setattr(steps, "bench", lambda *others: pytest.fail(f"measured by {others[-1]}"))
    fail = pytest.raises(pytest.fail.Exception, match=r"measured by ztp_deploy\.workflow\.make\.make_engine")
    with fail:
        make_engine(WANTED, build, Silent())
    assert checked == [("zero_tprune", 64), ("dense", 8), ("slice", 8)]
    checked.clear()
    with fail:
        make_engine(WANTED, build, Silent())
    assert checked == [("zero_tprune", 64)]
    for method in ("slice", "dense"):
        [folder] = build.engines_root.glob(f"*/deit_t--{method}*")
        tiny.damage_graph(folder, damage)
        checked.clear()
        with pytest.raises(GateFailed, match=f"{folder.name}: Parity fails between .* weights fault"):
            make_engine(WANTED, build, Silent())
        assert checked == [("zero_tprune", 64), (method, 8)]
        with pytest.raises(GateFailed, match=f"{folder.name}: Parity fails"):
            compare_methods("deit_t", [WANTED], build, Silent())
