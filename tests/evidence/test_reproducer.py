"""A failed check as a case for Polygraphy, which is run on it: it agrees that the engine is wrong, and when it is not."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import onnx
import pytest

import ztp_deploy as ztp
from tests import tiny
from tests.runs import Listening
from ztp_deploy.evidence import reproducer
from ztp_deploy.evidence.images import load_images
from ztp_deploy.workflow.progress import Clock
from ztp_deploy.workflow.steps import check


def polygraphy(script: Path) -> subprocess.CompletedProcess:
    environment = os.environ | {"PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}
    return subprocess.run(["sh", str(script)], capture_output=True, text=True, env=environment, timeout=120)


def flip(model: onnx.ModelProto) -> None:
    [head] = [tensor for tensor in model.graph.initializer if tensor.name.endswith("head.weight")]
    head.CopyFrom(onnx.numpy_helper.from_array(-onnx.numpy_helper.to_array(head), head.name))


def test_polygraphy_sees_the_fault_that_the_gate_saw(artifact, model, tmp_path):
    # Fixed at two images: a case must have no fewer than the engine takes.
    engine = ztp.build(artifact, "onnxruntime", device="cpu", batch=2, directory=tmp_path / "engine")
    sound = (engine.directory / "model.onnx").read_bytes()
    tiny.damage_graph(engine.directory, flip)
    engine = ztp.backends.find_engine(engine.directory)
    monitor = Listening()
    report = check(engine, model, None, Clock(monitor), count=3)
    assert not report.passed
    script = engine.evidence / "polygraphy" / "run.sh"
    assert monitor.warned == [f"To see the first fault with Polygraphy: sh {script}"]
    assert {path.name for path in script.parent.iterdir()} == {"inputs.json", "outputs.json", "run.sh"}
    done = polygraphy(script)
    assert done.returncode == 1, done.stdout + done.stderr
    assert "eager PyTorch" in done.stdout
    assert "FAILED" in done.stdout
    (engine.directory / "model.onnx").write_bytes(sound)
    done = polygraphy(script)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "All outputs matched | Outputs: ['logits']" in done.stdout


@pytest.fixture
def failed(engine, model):
    """An engine that fails, its pictures and its report."""
    tiny.damage_graph(engine.directory, flip)
    found = ztp.backends.find_engine(engine.directory)
    pictures = load_images(None, found.manifest.source.preprocessing, "float32", 2)
    return found, pictures, ztp.check_parity(found, model, pictures)


@pytest.mark.parametrize(
    "backend, command",
    [
        ("tensorrt", "\npolygraphy run model.plan --model-type engine --trt --load-inputs"),
        ("tensorrt_rtx", "\nPOLYGRAPHY_USE_TENSORRT_RTX=1 polygraphy run model.plan --model-type engine --trt "),
    ],
)
def test_the_command_fits_the_engine(backend, command, failed, model):
    engine, pictures, report = failed
    other = type(engine)(engine.directory, engine.manifest.model_copy(update={"backend": backend}))
    script = reproducer.write_reproducer(other, model, pictures, report)
    assert command in script.read_text()
    assert "within 0.0001 σ" in script.read_text()
    assert str(engine.directory) not in script.read_text()


def test_no_case_without_a_fault_or_for_an_engine_it_does_not_know(failed, shared_engine, model):
    engine, pictures, report = failed
    other = type(engine)(engine.directory, engine.manifest.model_copy(update={"backend": "openvino"}))
    assert reproducer.write_reproducer(other, model, pictures, report) is None
    sound = ztp.check_parity(shared_engine, model, pictures)
    assert sound.passed
    assert reproducer.write_reproducer(shared_engine, model, pictures, sound) is None
    assert not (shared_engine.evidence / "polygraphy").exists()
