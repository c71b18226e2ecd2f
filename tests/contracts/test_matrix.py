"""Any method on any backbone: traces, exports, passes the linter and the gate, takes any batch, says what it kept.

`make matrix` runs all pairs; otherwise each method and each backbone comes once, and of the rest the eighth that the commit's hash names.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import onnx
import pytest
import torch

import ztp_deploy as ztp
from tests import tiny
from tests.backends.tensorrt import needs_rtx
from tests.contracts import matrix
from tests.contracts.matrix import ALL, BACKBONES, PARTS, Pair, chosen
from ztp_deploy import backends, environment, methods, models
from ztp_deploy.backends import Engine
from ztp_deploy.errors import BadRequest
from ztp_deploy.exporters import Artifact, vocabulary
from ztp_deploy.pruning.prune import PrunedModel

pytestmark = pytest.mark.matrix


@dataclass(frozen=True)
class Made:
    """A pair that runs, exported once for all its tests."""

    pair: Pair
    model: torch.nn.Module
    pruned: PrunedModel
    artifact: Artifact
    engine: Engine
    images: np.ndarray


@pytest.fixture(scope="module")
def made(request, tmp_path_factory):
    pair: Pair = request.param
    model = pair.model()
    pruned = ztp.prune(model, pair.plan(model))
    folder = tmp_path_factory.mktemp("matrix")
    artifact = ztp.export(pruned, "onnx", folder / "artifact")
    engine = ztp.build(artifact, "onnxruntime", device="cpu", batch=(1, 4, 8), directory=folder / "engine")
    return Made(pair, model, pruned, artifact, engine, tiny.images(5, pruned.plan.image_size))


def pytest_generate_tests(metafunc):
    if "made" in metafunc.fixturenames:
        metafunc.parametrize("made", [pair for pair in ALL if pair.refusal is None], indirect=True, ids=str)
    elif "refused" in metafunc.fixturenames:
        metafunc.parametrize("refused", [pair for pair in ALL if pair.refusal is not None], ids=str)


def test_the_gate_holds(made):
    assert ztp.check_parity(made.engine, made.model, made.images).require().passed


def test_the_graph_keeps_the_vocabulary_and_the_plan(made):
    graph = onnx.load(str(made.artifact.directory / "model.onnx"))
    assert vocabulary.lint(graph, made.pruned.plan) == []
    assert vocabulary.lint(graph, made.pruned.plan.model_copy(update={"stages": made.pruned.plan.stages[:-1]}))


def test_traces_and_engines_tell_the_same_story_at_any_batch(made):
    traces = ztp.trace_tokens(made.pruned, torch.from_numpy(made.images))
    plan = made.pruned.plan
    with ztp.load_engine(made.engine.directory) as session:
        together = session.run(made.images)
        kept, assignment = session.kept(), session.assignment()
        alone = np.concatenate([session.run(image[None]) for image in made.images])
    np.testing.assert_allclose(together, alone, rtol=1e-3, atol=1e-4)
    for stage, trace, ours, theirs in zip(plan.stages, traces, kept, assignment, strict=True):
        assert trace.kept.shape == (5, stage.tokens_out)
        assert trace.kept.tolist() == ours.tolist()
        assert trace.assignment.tolist() == theirs.tolist()
        there = trace.kept.numpy()
        carried = np.take_along_axis(there, trace.assignment.clip(0).numpy().astype(np.int64), axis=1)
        patches = np.broadcast_to(np.arange(plan.patch_tokens), carried.shape)
        # Every kept patch is carried by the token that goes by its position.
        for image in range(5):
            own = np.isin(patches[image], there[image])
            assert (carried[image][own] == patches[image][own]).all()
            assert (trace.assignment[image].numpy()[own] >= 0).all()


@pytest.mark.parametrize("backend", ["openvino", "torchscript"])
def test_other_back_ends_pass_the_gate(made, backend, tmp_path):
    artifact = made.artifact
    if backends.get(backend).FORMAT != "onnx":
        artifact = ztp.export(made.pruned, backends.get(backend).FORMAT, tmp_path / "artifact")
    engine = ztp.build(artifact, backend, device="cpu", batch=(1, 4, 8), directory=tmp_path / "engine")
    assert ztp.check_parity(engine, made.model, made.images).require().passed


@needs_rtx
def test_tensorrt_takes_the_graph(made, tmp_path, monkeypatch):
    monkeypatch.setattr(environment, "gpus", lambda: ())
    engine = ztp.build(
        made.artifact, "tensorrt_rtx", batch=(1, 2, 4), directory=tmp_path / "e", settings={"audit": False}
    )
    assert engine.manifest.files["model.plan"].bytes > 10_000


def test_a_pair_that_cannot_work_says_why(refused):
    model = refused.model()
    with pytest.raises(BadRequest, match=f"{refused.method} cannot prune") as caught:
        refused.plan(model)
    assert refused.refusal in str(caught.value)


def test_every_family_and_every_method_comes_up_in_every_part():
    hosts = {models.source_of(Pair("slice", name).model()).family for name in BACKBONES}
    assert hosts == set(models.FAMILIES)
    for due in range(PARTS):
        pairs = chosen(due)
        assert {pair.method for pair in pairs} == set(methods.METHODS)
        assert {pair.backbone for pair in pairs} == set(BACKBONES)
    assert {pair for due in range(PARTS) for pair in chosen(due)} == set(ALL)


def test_a_commit_takes_one_part_and_commits_take_all(monkeypatch):
    monkeypatch.delenv("ZTP_MATRIX", raising=False)
    monkeypatch.setattr(matrix, "commit", lambda: "0000000a" + 32 * "f")
    assert [matrix.part(), matrix.part()] == [2, 2]
    assert {matrix.part_of(f"{number:08x}") for number in range(PARTS)} == set(range(PARTS))
    monkeypatch.setenv("ZTP_MATRIX", "11")
    assert matrix.part() == 3
    monkeypatch.setenv("ZTP_MATRIX", "all")
    assert matrix.part() is None


def test_without_a_commit_the_first_part_is_due(tmp_path, monkeypatch):
    monkeypatch.setenv("GIT_CEILING_DIRECTORIES", str(tmp_path.parent))
    assert matrix.commit(tmp_path) == ""
    monkeypatch.setenv("PATH", "")
    assert matrix.commit(tmp_path) == ""
    assert matrix.part_of("") == 0
