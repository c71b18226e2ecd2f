"""The GPU report's file: which of two rows stays, what is comparable."""

from __future__ import annotations

import pytest

from ztp_deploy.gpu_report.rows import Effort, GpuReport, Row


def row(status="measured", version="1", plan="dense", session=0, weights="random"):
    return Row(
        model="deit_s",
        runtime="tensorrt",
        version=version,
        precision="int8",
        batch=8,
        plan=plan,
        status=status,
        session=session,
        weights=weights,
    )


def report(*rows):
    return GpuReport(gpu="NVIDIA Test", clock="CUDA events", rows=list(rows))


@pytest.mark.parametrize(
    "old, new, left, last",
    [
        (row("failed"), row(session=1), [("measured", 1)], "measured"),
        (row("missing", version=""), row("failed", session=1), [("failed", 1)], "failed"),
        (row(), row(session=1), [("measured", 1)], "measured"),
        (row(), row(session=1, version="2"), [("measured", 1)], "measured"),
        # What was measured is lost to nothing that was not.
        (row(), row("failed", session=1), [("measured", 0)], "measured"),
        (row(), row("failed", session=1, version="2"), [("measured", 0), ("failed", 1)], "failed"),
        (row(), row("failed", session=1, weights="pretrained"), [("measured", 0), ("failed", 1)], "failed"),
    ],
)
def test_which_row_stays(old, new, left, last):
    elsewhere = row(plan="slice")
    ours = report(old, elsewhere)
    ours.add([new])
    assert [(one.status, one.session) for one in ours.rows if one.plan == "dense"] == left
    assert [one.status for one in ours.latest() if one.plan == "dense"] == [last]
    assert elsewhere in ours.rows


def test_a_measured_row_clears_all_that_was_said_before():
    ours = report(row())
    ours.add([row("failed", version="2", session=1)])
    ours.add([row("failed", version="3", session=2)])
    assert [(one.version, one.status) for one in ours.rows] == [("1", "measured"), ("3", "failed")]
    ours.add([row(version="3", session=3)])
    assert [(one.version, one.status) for one in ours.rows] == [("3", "measured")]


def test_comparable_steps_are_the_models_own_and_else_any_of_the_runtime():
    def effort(model, runtime, precision, **seconds):
        return Effort(model=model, runtime=runtime, version="1", precision=precision, **seconds)

    ours = report()
    ours.efforts = [
        effort("deit_s", "tensorrt", "fp16", builds={"dense": 40.0, "slice": 60.0}, cells={1: 12.0}),
        effort("deit_b", "tensorrt", "fp16", builds={"dense": 90.0}),
        effort("deit_s", "eager", "fp16", builds={"dense": 900.0}),
    ]
    asked = effort("deit_s", "tensorrt", "int8")
    assert (ours.longest(asked, "builds"), ours.longest(asked, "cells")) == (60.0, 12.0)
    other = effort("deit_b", "tensorrt", "int8")
    assert (ours.longest(other, "builds"), ours.longest(other, "cells")) == (90.0, 12.0)
    assert ours.longest(effort("mae_vit_l", "tensorrt", "int8"), "builds") == 90.0
    assert ours.longest(effort("deit_s", "aotinductor", "fp32"), "builds") == 0.0
    assert ours.effort("deit_b", "tensorrt", "1", "fp16") is ours.efforts[1]
    assert ours.effort("deit_b", "tensorrt", "2", "fp16").builds == {}
    again = GpuReport.model_validate_json(ours.to_json())
    assert again.efforts[0].cells == {1: 12.0}
    assert len(again.efforts) == 3
