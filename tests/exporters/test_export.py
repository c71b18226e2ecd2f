"""Artifacts: what a folder holds, that it is found again, that nothing partial is left."""

from __future__ import annotations

import onnx
import pytest
import timm
import torch

import ztp_deploy as ztp
from tests import tiny
from ztp_deploy import exporters
from ztp_deploy.errors import BadRequest, GateFailed, WriteFailed
from ztp_deploy.exporters import vocabulary
from ztp_deploy.exporters.graph import InferenceGraph
from ztp_deploy.exporters.onnx import with_audit


def test_the_onnx_artifact(artifact):
    manifest = artifact.manifest
    assert set(manifest.files) == {"model.onnx"}
    assert manifest.opset == 18
    assert manifest.outputs == ("logits", "kept_1", "kept_2", "kept_3")
    assert manifest.audit[:5] == ("pre_score_1", "pre_spread_1", "similarity_1", "score_1", "spread_1")
    model = onnx.load(str(artifact.directory / "model.onnx"))
    assert vocabulary.lint(model, manifest.plan) == []
    assert [o.name for o in model.graph.output] == list(manifest.outputs)
    assert model.graph.input[0].type.tensor_type.shape.dim[0].dim_param
    # Nothing of the machine that exported it.
    assert b"site-packages" not in model.SerializeToString()
    assert not any(node.metadata_props for node in model.graph.node)


def test_selection_is_top_k_and_gather_only(artifact):
    graph = onnx.load(str(artifact.directory / "model.onnx")).graph
    operators = {node.op_type for node in graph.node}
    assert {"TopK", "Gather"} <= operators <= vocabulary.ALLOWED
    # Per stage: ranking, similarity, importance.
    assert sum(node.op_type == "TopK" for node in graph.node) == 9


def test_the_audit_graph_is_the_same_graph_with_more_outputs(artifact):
    model = onnx.load(str(artifact.directory / "model.onnx"))
    audited = with_audit(model, artifact.manifest.audit)
    assert [o.name for o in audited.graph.output] == [*artifact.manifest.outputs, *artifact.manifest.audit]
    assert list(audited.graph.node) == list(model.graph.node)
    with pytest.raises(GateFailed, match="nothing_like_it"):
        with_audit(model, ("nothing_like_it",))


def test_a_finished_artifact_is_found_again_and_a_damaged_one_made_anew(pruned, tmp_path):
    first = ztp.export(pruned, "torchscript", tmp_path / "a")
    written = (tmp_path / "a" / "manifest.json").stat().st_mtime_ns
    assert ztp.export(pruned, "torchscript", tmp_path / "a").manifest == first.manifest
    assert (tmp_path / "a" / "manifest.json").stat().st_mtime_ns == written
    graph = tmp_path / "a" / "model.ts"
    graph.write_bytes(graph.read_bytes()[:-100])
    ztp.export(pruned, "torchscript", tmp_path / "a")
    assert exporters.load_artifact(tmp_path / "a").manifest.fingerprint == first.manifest.fingerprint


def test_another_version_of_the_code_exports_anew(pruned, tmp_path, monkeypatch):
    """A graph of last week's rules is not this week's engine."""
    first = ztp.export(pruned, "torchscript", tmp_path / "a")
    monkeypatch.setattr(exporters, "sources_sha256", lambda *rooms: f"other {rooms}")
    second = ztp.export(pruned, "torchscript", tmp_path / "a")
    assert second.manifest.fingerprint != first.manifest.fingerprint
    assert ztp.export(pruned, "torchscript", tmp_path / "a").manifest == second.manifest


def test_uint8_input_puts_the_normalisation_into_the_graph(pruned, tmp_path):
    artifact = ztp.export(pruned, "torchscript", tmp_path / "a", input="uint8")
    assert artifact.manifest.input.dtype == "uint8"
    graph = InferenceGraph(pruned, "uint8")
    pixels = graph.example(2)
    assert pixels.dtype == torch.uint8
    mean = torch.tensor(pruned.source.preprocessing.mean).reshape(1, 3, 1, 1)
    std = torch.tensor(pruned.source.preprocessing.std).reshape(1, 3, 1, 1)
    torch.testing.assert_close(graph.normalise(pixels), (pixels.float() / 255 - mean) / std)


@pytest.mark.parametrize(
    "arguments, message",
    [
        ({"format": "onyx"}, "onnx"),
        ({"format": "onnx", "precision": "int3"}, "fp32"),
        ({"format": "onnx", "image_batch": 1}, "at least 2"),
        ({"format": "onnx", "input": "float16"}, "float32"),
    ],
)
def test_refusals_leave_nothing(pruned, tmp_path, arguments, message):
    with pytest.raises(BadRequest, match=message):
        ztp.export(pruned, directory=tmp_path / "a", **arguments)
    assert list(tmp_path.iterdir()) == []


def test_an_interrupt_leaves_nothing_and_the_next_run_is_clean(pruned, tmp_path, monkeypatch):
    def interrupted(*arguments: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("ztp_deploy.exporters.torchscript.write", interrupted)
        with pytest.raises(KeyboardInterrupt):
            ztp.export(pruned, "torchscript", tmp_path / "a")
    assert list(tmp_path.iterdir()) == []
    assert ztp.export(pruned, "torchscript", tmp_path / "a").directory.is_dir()


def test_a_graph_outside_the_vocabulary_is_not_kept(pruned, tmp_path, monkeypatch):
    monkeypatch.setattr("ztp_deploy.exporters.torchscript.FORBIDDEN", {"aten::softmax": "for this test"})
    with pytest.raises(GateFailed, match="aten::softmax"):
        ztp.export(pruned, "torchscript", tmp_path / "a")
    assert list(tmp_path.iterdir()) == []


def test_a_write_the_system_refuses_is_one_sentence(pruned, tmp_path):
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(WriteFailed, match="could not be written"):
        ztp.export(pruned, "torchscript", tmp_path / "file" / "a")


def test_the_dense_model_exports_too(model, tmp_path):
    artifact = ztp.export(ztp.prune(model, ztp.make_plan(model, "dense")), "torchscript", tmp_path / "a")
    assert artifact.manifest.outputs == ("logits",)
    assert artifact.manifest.audit == ()
    assert tiny.images(1).shape == (1, 3, 96, 96)


def test_a_model_without_values_is_refused():
    bare = timm.create_model("vit_tiny_patch16_224").to("meta")
    with pytest.raises(BadRequest, match="meta device and has no values"):
        ztp.prune(bare, ztp.make_plan("augreg_vit_t", ratio=0.7))
