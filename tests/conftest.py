"""Tiny models, artifacts and engines shared by the tests, and the rule on skips in CI."""

from __future__ import annotations

import hashlib
import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import ztp_deploy as ztp
from tests import tiny
from tests.contracts import matrix
from ztp_deploy.backends import Engine
from ztp_deploy.evidence import latency
from ztp_deploy.exporters import Artifact
from ztp_deploy.pruning.prune import PrunedModel

# Two processes with two threads each on two cores would spend their time waiting for one another.
torch.set_num_threads(1 if "PYTEST_XDIST_WORKER" in os.environ else min(2, os.cpu_count() or 1))
# A shell that runs the tests in the background leaves Ctrl-C ignored, and tests that press it would wait for good.
signal.signal(signal.SIGINT, signal.default_int_handler)


def pytest_sessionfinish(session: pytest.Session, exitstatus: int) -> None:
    """With ZTP_STRICT_SKIPS (set by .ci/run) a skip is a failure unless its reason is a missing GPU."""
    if not os.environ.get("ZTP_STRICT_SKIPS"):
        return
    reporter = session.config.pluginmanager.get_plugin("terminalreporter")
    skipped = reporter.stats.get("skipped", []) if reporter else []
    unexcused = [report for report in skipped if "GPU" not in str(report.longrepr)]
    for report in unexcused:
        reporter.write_line(f"skip not allowed here: {report.nodeid}: {report.longrepr}", red=True)
    if unexcused and exitstatus == 0:
        session.exitstatus = pytest.ExitCode.TESTS_FAILED


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Of the matrix of methods and backbones, the pairs that are due (`make matrix`: all)."""
    pairs = {str(pair) for pair in matrix.chosen(matrix.part())}
    left_out = []
    for item in items:
        wanted = getattr(item, "callspec", None) and (
            item.callspec.params.get("made") or item.callspec.params.get("refused")
        )
        if isinstance(wanted, matrix.Pair) and str(wanted) not in pairs:
            left_out.append(item)
    if left_out:
        config.hook.pytest_deselected(items=left_out)
        items[:] = [item for item in items if item not in set(left_out)]


def pytest_report_header() -> str:
    """Says which part of the matrix this run takes, so that it can be repeated."""
    due = matrix.part()
    return "matrix: all pairs" if due is None else f"matrix: part {due} of {matrix.PARTS} (ZTP_MATRIX={due} repeats it)"


@pytest.fixture(autouse=True)
def brief_latency(monkeypatch: pytest.MonkeyPatch) -> None:
    """Figures that no test looks at are measured without the seconds that make them steady."""
    monkeypatch.setattr(latency, "WARM_UP_SECONDS", 0.0)
    monkeypatch.setattr(latency, "SETTLING_SECONDS", 0.0)


@pytest.fixture(scope="session")
def model() -> torch.nn.Module:
    """A four-block ViT with 36 patch tokens and seeded random weights."""
    return tiny.model()


@pytest.fixture(scope="session")
def pruned(model: torch.nn.Module) -> PrunedModel:
    """That model, Zero-TPrune at 0.7, with few voting rounds: what compiles graphs takes a minute otherwise."""
    return ztp.prune(model, ztp.make_plan(model, ratio=0.7, options={"rounds": 2}))


@pytest.fixture(scope="session")
def artifact(pruned: PrunedModel, tmp_path_factory: pytest.TempPathFactory) -> Artifact:
    """Its ONNX artifact; tests must not change it."""
    return ztp.export(pruned, "onnx", tmp_path_factory.mktemp("artifacts") / "onnx")


@pytest.fixture(scope="session")
def torchscript_artifact(pruned: PrunedModel, tmp_path_factory: pytest.TempPathFactory) -> Artifact:
    """Its TorchScript artifact; tests must not change it."""
    return ztp.export(pruned, "torchscript", tmp_path_factory.mktemp("artifacts") / "torchscript")


@pytest.fixture(scope="session")
def exported(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Artifact]:
    """`exported(pruned, **options)`: the ONNX artifact of any small pruned model; made once, tests must not change it."""
    root = tmp_path_factory.mktemp("exported")

    def export(pruned: PrunedModel, **options: Any) -> Artifact:
        what = f"{pruned.source.model_dump_json()} {pruned.plan.to_json()} {options}"
        return ztp.export(pruned, "onnx", root / hashlib.sha256(what.encode()).hexdigest()[:16], **options)

    return export


@pytest.fixture
def engine(artifact: Artifact, tmp_path: Path) -> Engine:
    """A fresh ONNX Runtime engine that a test may damage."""
    return ztp.build(artifact, "onnxruntime", device="cpu", batch=(1, 4, 8), directory=tmp_path / "engine")


@pytest.fixture(scope="session")
def shared_engine(artifact: Artifact, tmp_path_factory: pytest.TempPathFactory) -> Engine:
    """An ONNX Runtime engine that tests only read."""
    directory = tmp_path_factory.mktemp("engines") / "engine"
    return ztp.build(artifact, "onnxruntime", device="cpu", batch=(1, 4, 8), directory=directory)


@pytest.fixture(scope="session")
def torchscript_engine(torchscript_artifact: Artifact, tmp_path_factory: pytest.TempPathFactory) -> Engine:
    """A TorchScript engine that tests only read."""
    directory = tmp_path_factory.mktemp("engines") / "torchscript"
    return ztp.build(torchscript_artifact, "torchscript", device="cpu", batch=(1, 4, 8), directory=directory)


@pytest.fixture(scope="session")
def openvino_engine(artifact: Artifact, tmp_path_factory: pytest.TempPathFactory) -> Engine:
    """An OpenVINO engine that tests only read."""
    return ztp.build(artifact, "openvino", batch=(1, 4, 8), directory=tmp_path_factory.mktemp("engines") / "openvino")


@pytest.fixture(scope="session")
def torch_export_artifact(pruned: PrunedModel, tmp_path_factory: pytest.TempPathFactory) -> Artifact:
    """Its torch.export artifact; tests must not change it."""
    return ztp.export(pruned, "torch_export", tmp_path_factory.mktemp("artifacts") / "torch_export")


@pytest.fixture(scope="session")
def aotinductor_engine(torch_export_artifact: Artifact, tmp_path_factory: pytest.TempPathFactory) -> Engine:
    """An AOTInductor engine that tests only read."""
    directory = tmp_path_factory.mktemp("engines") / "aotinductor"
    return ztp.build(torch_export_artifact, "aotinductor", device="cpu", batch=(1, 4, 8), directory=directory)
