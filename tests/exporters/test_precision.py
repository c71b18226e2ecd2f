"""Precision in the graph: the tokens' way lowered, scores and logits in float32, and still the same function."""

from __future__ import annotations

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from google.protobuf.message import EncodeError
from onnx import TensorProto

import ztp_deploy as ztp
from tests import tiny
from ztp_deploy import exporters
from ztp_deploy.backends.onnxruntime import backend as onnxruntime_backend
from ztp_deploy.errors import BadRequest
from ztp_deploy.evidence import parity
from ztp_deploy.exporters import onnx as exporter
from ztp_deploy.exporters import precision, vocabulary

LOW = {"fp16": TensorProto.FLOAT16, "bf16": TensorProto.BFLOAT16}


@pytest.fixture(scope="module", params=sorted(LOW))
def lowered(request, artifact, tmp_path_factory):
    return exporters.convert(artifact, request.param, tmp_path_factory.mktemp("low") / request.param)


def graph_of(artifact):
    return onnx.load(str(artifact.directory / "model.onnx"))


def test_only_the_tokens_way_is_lowered(lowered, artifact):
    low = LOW[lowered.manifest.precision]
    model = graph_of(lowered)
    onnx.checker.check_model(model, full_check=True)
    inferred = onnx.shape_inference.infer_shapes(model, strict_mode=True)
    types = {value.name: value.type.tensor_type.elem_type for value in inferred.graph.value_info}
    for node in model.graph.node:
        if node.op_type == "TopK":
            assert types[node.input[0]] == TensorProto.FLOAT
        if node.op_type in ("LayerNormalization", "Softmax", "Conv"):
            assert types[node.output[0]] == low
    for name in lowered.manifest.audit:
        assert types[name] == TensorProto.FLOAT
    counts = tiny.matrix_types(model)
    # Patch embedding, per block six products of the attention and two of the MLP.
    assert counts[TensorProto.DataType.Name(low).lower()] == 1 + 4 * 8
    assert tiny.matrix_types(graph_of(artifact)) == {"float": sum(counts.values())}


def test_inputs_and_outputs_keep_their_types(lowered):
    model = graph_of(lowered)
    [images] = model.graph.input
    assert images.type.tensor_type.elem_type == TensorProto.FLOAT
    kinds = {output.name: output.type.tensor_type.elem_type for output in model.graph.output}
    assert kinds.pop("logits") == TensorProto.FLOAT
    assert set(kinds.values()) == {TensorProto.INT32}
    assert vocabulary.lint(model, lowered.manifest.plan) == []


def distance_on_the_same_tokens(outputs, images, pruned):
    """Largest logit difference in σ, eager keeping the tokens that the candidate kept."""
    kept = [torch.from_numpy(np.array(outputs[f"kept_{index}"])) for index in (1, 2, 3)]
    with torch.inference_mode():
        expected = pruned.run(torch.from_numpy(images), kept).logits.numpy()
    return (np.abs(outputs["logits"] - expected).max(1) / expected.std(1)).max()


def test_fp16_computes_the_same_function_less_exactly(artifact, pruned, tmp_path):
    half = exporters.convert(artifact, "fp16", tmp_path / "fp16")
    session = onnxruntime.InferenceSession(str(half.directory / "model.onnx"), providers=["CPUExecutionProvider"])
    images = tiny.images(4)
    names = half.manifest.outputs
    outputs = dict(zip(names, session.run(list(names), {"images": images}), strict=True))
    assert 1e-5 < distance_on_the_same_tokens(outputs, images, pruned) < 0.02


def test_bf16_computes_the_same_function_less_exactly(artifact, pruned, tmp_path):
    """OpenVINO reads bf16 graphs on any processor; the weights at least are rounded."""
    import openvino

    low = exporters.convert(artifact, "bf16", tmp_path / "bf16")
    compiled = openvino.Core().compile_model(str(low.directory / "model.onnx"), "CPU")
    images = tiny.images(4)
    results = compiled(images)
    outputs = {name: np.array(results[name]) for name in low.manifest.outputs}
    assert 1e-4 < distance_on_the_same_tokens(outputs, images, pruned) < 0.15


def test_converting_gives_what_exporting_gives(artifact, pruned, tmp_path):
    converted = exporters.convert(artifact, "fp16", tmp_path / "converted")
    exported = ztp.export(pruned, "onnx", tmp_path / "exported", precision="fp16")
    assert converted.manifest.fingerprint == exported.manifest.fingerprint
    assert converted.manifest.files == exported.manifest.files


@pytest.mark.parametrize("low", sorted(LOW))
def test_graphs_beyond_protobufs_limit_are_converted_as_others_are(low, artifact, tmp_path, monkeypatch):
    """Messages beyond 2 GB cannot be serialised, for which a limit of 100 kB stands in."""
    graph = graph_of(artifact)
    expected = precision.lower(graph, low)
    tiny.hold_messages_to(100_000, monkeypatch)
    with pytest.raises(EncodeError):
        graph.ByteSize()
    assert precision.lower(graph, low) == expected
    monkeypatch.setattr(exporter, "_PROTOBUF_LIMIT", 100_000)
    large = exporters.convert(artifact, low, tmp_path / "large")
    assert set(large.manifest.files) == {"model.onnx", "model.onnx.data"}
    assert {t.name for t in graph_of(large).graph.initializer} == {t.name for t in expected.graph.initializer}


def test_what_cannot_be_converted(artifact, torchscript_artifact, tmp_path):
    half = exporters.convert(artifact, "fp16", tmp_path / "half")
    with pytest.raises(BadRequest, match="A fp16 artifact in onnx cannot be converted"):
        exporters.convert(half, "bf16", tmp_path / "x")
    with pytest.raises(BadRequest, match="exported in fp32; precision='fp16'"):
        exporters.convert(torchscript_artifact, "fp16", tmp_path / "x")
    with pytest.raises(BadRequest, match="fp32, fp16, bf16; precision='int4'"):
        exporters.convert(artifact, "int4", tmp_path / "x")
    assert not (tmp_path / "x").exists()


def test_pixels_are_normalised_in_float32(pruned, tmp_path):
    pixels = ztp.export(pruned, "onnx", tmp_path / "pixels", input="uint8")
    low = graph_of(exporters.convert(pixels, "fp16", tmp_path / "low"))
    inferred = onnx.shape_inference.infer_shapes(low)
    types = {value.name: value.type.tensor_type.elem_type for value in inferred.graph.value_info}
    [convolution] = [node for node in low.graph.node if node.op_type == "Conv"]
    [cast] = [node for node in low.graph.node if convolution.input[0] in node.output]
    assert cast.op_type == "Cast"
    assert types[cast.input[0]] == TensorProto.FLOAT


def test_constants_stay_finite():
    values = precision._rounded(np.array([1e9, -1e9, 1.5, np.inf], np.float32), TensorProto.FLOAT16)
    assert values.tolist() == [65504, -65504, 1.5, np.inf]
    lowest = np.array([np.finfo(np.float32).min], np.float32)
    assert np.isfinite(precision._rounded(lowest, TensorProto.BFLOAT16).astype(np.float32)).all()


def test_the_gate_has_bounds_for_low_precision(artifact, model, tmp_path, monkeypatch):
    """An fp16 engine differs by more than fp32 may and by less than fp16 may; wrong weights are still found."""
    monkeypatch.setitem(onnxruntime_backend._PRECISIONS_OF, "cpu", ("fp16",))
    half = exporters.convert(artifact, "fp16", tmp_path / "a")
    engine = ztp.build(half, "onnxruntime", precision="fp16", device="cpu", directory=tmp_path / "e")
    images = tiny.images(8)
    report = ztp.check_parity(engine, model, images).require()
    assert all(edge.tolerance == parity.TOLERANCES["fp16"] for edge in report.edges)
    assert 1e-4 < report.edges[-1].worst_logit < 0.02

    def damage(graph: onnx.ModelProto) -> None:
        [bias] = [t for t in graph.graph.initializer if "blocks.3.mlp.fc2.bias" in t.name]
        bias.CopyFrom(onnx.numpy_helper.from_array(onnx.numpy_helper.to_array(bias) * np.float16(2), bias.name))

    tiny.damage_graph(engine.directory, damage)
    broken = ztp.check_parity(engine, model, images)
    assert not broken.passed
    assert {fault.kind for fault in broken.edges[-1].faults} == {"weights"}


def test_bf16_exports_are_not_run_where_they_cannot(artifact, tmp_path):
    low = exporters.convert(artifact, "bf16", tmp_path / "a")
    notes: list[str] = []
    engine = ztp.build(artifact, "onnxruntime", device="cpu", directory=tmp_path / "e")
    changed = engine.manifest.model_copy(
        update={"artifact": "../a", "artifact_sha256": parity.manifest_sha256(low.directory)}
    )
    assert parity._exported_runner(type(engine)(engine.directory, changed), notes) is None
    assert "no bf16 kernels" in notes[0]
