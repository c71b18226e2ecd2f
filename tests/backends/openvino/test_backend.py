"""OpenVINO: precision that is real, scores that stay in float32, quantisation, hints and the kept model."""

from __future__ import annotations

import re
import shutil
import sys
import xml.etree.ElementTree as ElementTree

import numpy as np
import openvino
import pytest
from openvino import opset13 as opset
from PIL import Image

import ztp_deploy as ztp
from tests import tiny
from ztp_deploy import environment
from ztp_deploy.backends import find_engine, name_tags
from ztp_deploy.backends.openvino import attention, backend, ir
from ztp_deploy.errors import BadRequest, GateFailed, MissingSoftware
from ztp_deploy.evidence.images import load_images
from ztp_deploy.workflow.progress import Clock, Silent
from ztp_deploy.workflow.requests import BuildRequest
from ztp_deploy.workflow.steps import build_engine

HAS_BF16 = "BF16" in openvino.Core().get_property("CPU", "OPTIMIZATION_CAPABILITIES")


@pytest.fixture(scope="module")
def calibration(model):
    return load_images(None, model.source.preprocessing, "float32", 16, purpose="calibration").pixels


@pytest.fixture(scope="module")
def int8_engine(artifact, calibration, tmp_path_factory):
    directory = tmp_path_factory.mktemp("int8") / "engine"
    return ztp.build(
        artifact, "openvino", precision="int8", batch=(1, 4, 8), calibration=calibration, directory=directory
    )


def test_fp32_is_fp32(openvino_engine):
    """Left alone, OpenVINO takes bf16 wherever a processor has it."""
    built = openvino_engine.manifest.built
    assert built["properties"] == {"INFERENCE_PRECISION_HINT": "f32", "PERFORMANCE_HINT": "LATENCY"}
    assert set(built["matrix_precisions"]) == set(built["score_precisions"]) == {"f32"}
    assert built["notes"] == []


def test_the_manifest_says_on_how_many_images_it_was_calibrated(int8_engine, openvino_engine):
    assert int8_engine.manifest.built["calibration_images"] == 16
    assert "calibration_images" not in openvino_engine.manifest.built


def test_bf16_is_bf16_or_refused(artifact, tmp_path):
    """On processors without bf16 OpenVINO would quietly compute in fp32."""
    if not HAS_BF16:
        with pytest.raises(MissingSoftware, match="no instructions for it") as refusal:
            ztp.build(artifact, "openvino", precision="bf16", directory=tmp_path / "e")
        assert refusal.value.exit_code == 3
        assert list(tmp_path.iterdir()) == []
        return
    try:
        engine = ztp.build(artifact, "openvino", precision="bf16", directory=tmp_path / "e")
    except GateFailed as refusal:
        assert "precision=bf16 was asked for, but OpenVINO computes" in refusal.problem  # noqa: PT017
        return
    counts = engine.manifest.built["matrix_precisions"]
    assert counts["bf16"] > sum(counts.values()) / 2


@pytest.mark.parametrize("counts", [{"f32": 20}, {"f32": 11, "bf16": 9}])
def test_a_precision_that_did_not_come_out_is_an_error(counts):
    with pytest.raises(GateFailed, match="precision=bf16 was asked for, but OpenVINO computes"):
        backend._check_precision("bf16", counts)
    backend._check_precision("bf16", {"f32": 2, "bf16": 18})
    with pytest.raises(GateFailed, match="precision=fp32"):
        backend._check_precision("fp32", {"f32": 19, "bf16": 1})


def test_scores_are_marked_to_stay_in_float32(openvino_engine):
    """All that leads to a TopK, and nothing of the way from the image to the logits but the classifier."""
    tree = ElementTree.parse(openvino_engine.directory / "model.xml")
    layers = {layer.get("id"): layer for layer in tree.iterfind("layers/layer")}
    marked = {
        identity
        for identity, layer in layers.items()
        if layer.find("rt_info/attribute[@name='DisablePrecisionConversion']") is not None
    }
    sources = {}
    for edge in tree.iterfind("edges/edge"):
        sources.setdefault(edge.get("to-layer"), []).append(edge.get("from-layer"))
    top_ks = [identity for identity, layer in layers.items() if layer.get("type") == "TopK"]
    assert len(top_ks) == 9
    for top_k in top_ks:
        scores = [s for s in sources[top_k] if layers[s].get("type") != "Const"]
        assert scores
        assert set(scores) <= marked
    attentions = ("SoftMax", "ScaledDotProductAttention")  # computed openly where a stage reads it, fused elsewhere
    softmaxes = {identity for identity, layer in layers.items() if layer.get("type") in attentions}
    assert len(softmaxes) == 4  # one per block
    assert not softmaxes & marked
    products = {identity for identity in marked if layers[identity].get("type") == "MatMul"}
    assert len(products) == sum(openvino_engine.manifest.built["score_precisions"].values())
    # The library reads the marks: they survive its own reader and writer.
    model = openvino.Core().read_model(str(openvino_engine.directory / "model.xml"))
    kept = [op for op in model.get_ops() if any("DisablePrecisionConversion" in key for key in op.get_rt_info())]
    assert len(kept) == len(marked)


def test_int8_is_int8_and_its_parity_is_told(int8_engine, model):
    counts = int8_engine.manifest.built["matrix_precisions"]
    assert counts.get("u8", 0) + counts.get("i8", 0) > counts["f32"]
    assert set(int8_engine.manifest.built["score_precisions"]) == {"f32"}
    report = ztp.check_parity(int8_engine, model, tiny.images(6))
    assert report.edges[0].worst_logit < 1e-4  # the export is fp32
    assert report.edges[0].tolerance.logits == 1e-4
    assert report.edges[1].worst_logit > 1e-3  # quantisation is seen
    assert report.edges[1].tolerance.logits == 1


def test_quantising_leaves_the_scores_as_they_were(int8_engine, openvino_engine):
    """Operation by operation; what is more makes start vectors that are no constants."""

    def scores_of(engine):
        graph = openvino.Core().read_model(str(engine.directory / "model.xml"))
        names = ir.outside_the_tokens_way(graph)
        kinds = {
            op.get_friendly_name(): op.get_type_name() for op in graph.get_ops() if op.get_friendly_name() in names
        }
        return {name: kind for name, kind in kinds.items() if not name.endswith("_in_float32")}

    plain, quantised = scores_of(openvino_engine), scores_of(int8_engine)
    assert plain.items() <= quantised.items()
    more = sorted(quantised[name] for name in quantised.keys() - plain.keys())
    assert more == ["Add", "Add", "Add", "Convert", "Slice"]


def test_what_int8_leaves_can_be_computed_in_bf16(calibration, model, exported, tmp_path):
    artifact = exported(ztp.prune(model, ztp.make_plan(model, ratio=0.7)))
    settings = {"float_precision": "bf16"}
    job = {"precision": "int8", "calibration": calibration[:8], "settings": settings, "directory": tmp_path / "e"}
    if not HAS_BF16:
        with pytest.raises(MissingSoftware, match="bf16 was asked for"):
            ztp.build(artifact, "openvino", **job)
        return
    engine = ztp.build(artifact, "openvino", **job)
    built = engine.manifest.built
    assert built["properties"]["INFERENCE_PRECISION_HINT"] == "bf16"
    assert built["matrix_precisions"].get("u8", 0) + built["matrix_precisions"].get("i8", 0) > 0
    assert set(built["matrix_precisions"]) <= {"u8", "i8", "bf16"}
    # Scores are summed in float32 all the same; the classifier is what the note is about.
    assert built["score_precisions"] == {"bf16 to f32": 9, "bf16": 1}
    assert ztp.check_parity(engine, model, tiny.images(6)).edges[1].worst_logit < 1


def test_int8_on_a_processor_without_dot_products_is_noted(artifact, calibration, tmp_path, monkeypatch):
    build = {"precision": "int8", "calibration": calibration[:2]}
    monkeypatch.setattr(environment, "cpu_features", lambda: ["avx2"])
    slow = ztp.build(artifact, "openvino", directory=tmp_path / "slow", **build)
    assert "no int8 dot products" in slow.manifest.built["notes"][0]
    monkeypatch.setattr(environment, "cpu_features", lambda: ["avx2", "avx512_vnni"])
    fast = ztp.build(artifact, "openvino", directory=tmp_path / "fast", **build)
    assert fast.manifest.built["notes"] == []


def test_another_calibration_is_another_engine(int8_engine, artifact, calibration, tmp_path):
    assert calibration.shape == (16, 3, 96, 96)
    copy = tmp_path / "engine"
    shutil.copytree(int8_engine.directory, copy)
    (tmp_path / "artifact").symlink_to(artifact.directory)
    same = {"precision": "int8", "batch": (1, 4, 8), "directory": copy}
    again = ztp.build(artifact, "openvino", calibration=calibration, **same)
    assert again.manifest == int8_engine.manifest
    other = ztp.build(artifact, "openvino", calibration=calibration[:8], **same)
    assert other.manifest.fingerprint != int8_engine.manifest.fingerprint


def test_engines_calibrated_on_other_images_live_side_by_side(artifact, tmp_path):
    """The same command with other images leaves the first engine and its evidence; with the same ones it finds it."""
    for name, shade in (("dark", 20), ("light", 220)):
        (tmp_path / name).mkdir()
        Image.new("RGB", (96, 96), (shade, 90, 255 - shade)).save(tmp_path / name / "plain.png")
    clock = Clock(Silent())

    def build(images, precision="int8"):
        request = BuildRequest(
            backend="openvino", device="cpu", precision=precision, batch="1:2:4", engines_root=tmp_path / "engines"
        )
        return build_engine(artifact, request, clock, tmp_path / images)

    dark = build("dark")
    assert re.search("--int8--b1-2-4--random--c[0-9a-f]{6}$", dark.directory.name)
    dark.evidence.mkdir()
    (dark.evidence / "parity.json").write_text("proved")
    light = build("light")
    assert light.directory != dark.directory
    assert build("dark").manifest == dark.manifest
    assert find_engine(light.directory).manifest == light.manifest
    assert (dark.evidence / "parity.json").read_text() == "proved"
    # What is fitted to no images is the same engine whatever images prove it.
    assert build("dark", "fp32").directory == build("light", "fp32").directory
    assert name_tags(build("light", "fp32").directory.name).calibration is None


def test_calibration_pictures_are_not_those_of_the_check(model):
    source = model.source.preprocessing
    check = load_images(None, source, "float32", 8)
    calibrated = load_images(None, source, "float32", 8, purpose="calibration")
    assert not set(check.names) & set(calibrated.names)


def test_hints_reach_the_library(artifact, tmp_path):
    settings = {"hint": "throughput", "threads": 1, "streams": 1}
    engine = ztp.build(artifact, "openvino", directory=tmp_path / "e", settings=settings)
    assert engine.manifest.built["properties"]["PERFORMANCE_HINT"] == "THROUGHPUT"
    with ztp.load_engine(engine.directory) as session:
        compiled = session._runner._compiled
        assert str(compiled.get_property("PERFORMANCE_HINT")) == "THROUGHPUT"
        assert compiled.get_property("INFERENCE_NUM_THREADS") == 1
        assert session.run(tiny.images(2)).shape == (2, 10)


def test_the_kept_model_is_what_opens(artifact, tmp_path, monkeypatch):
    engine = ztp.build(artifact, "openvino", directory=tmp_path / "e", settings={"cache": True})
    assert sorted(engine.manifest.files) == ["model.bin", "model.blob", "model.xml"]
    images = tiny.images(2)
    with ztp.load_engine(engine.directory) as session:
        expected = session.run(images)
    monkeypatch.setattr(backend.OpenVinoRunner, "_compile", lambda self, names: pytest.fail("it was compiled anew"))
    with ztp.load_engine(engine.directory) as session:
        assert np.array_equal(session.run(images), expected)


def test_a_kept_model_of_another_machine_is_compiled_anew(artifact, tmp_path):
    engine = ztp.build(artifact, "openvino", directory=tmp_path / "e", settings={"cache": True})
    (engine.directory / "model.blob").write_bytes(b"made elsewhere")
    tiny.reseal(engine.directory)
    with ztp.load_engine(engine.directory) as session:
        assert session.run(tiny.images(1)).shape == (1, 10)


def is_fixed(engine):
    model = openvino.Core().read_model(str(engine.directory / "model.xml"))
    return all(value.get_partial_shape().is_static for value in (*model.inputs, *model.outputs))


def test_a_fixed_batch_has_fixed_shapes_and_the_same_results(openvino_engine, artifact, tmp_path):
    engine = ztp.build(artifact, "openvino", batch=(3, 3, 3), directory=tmp_path / "fixed")
    assert is_fixed(engine)
    assert not is_fixed(openvino_engine)
    images = tiny.images(3)
    with ztp.load_engine(openvino_engine.directory) as session:
        expected = session.audit(images)
    with ztp.load_engine(engine.directory) as session:
        found = session.audit(images)
        with pytest.raises(BadRequest, match="batch of 2 is outside this engine's range 3 to 3"):
            session.run(images[:2])
    assert found.keys() == expected.keys()
    for name, values in expected.items():
        np.testing.assert_allclose(found[name], values, rtol=1e-4, atol=1e-5, err_msg=name)


def test_a_fixed_batch_is_quantised_too(artifact, calibration, model, tmp_path):
    job = {"precision": "int8", "calibration": calibration[:8]}
    engine = ztp.build(artifact, "openvino", batch=(3, 3, 3), directory=tmp_path / "fixed", **job)
    counts = engine.manifest.built["matrix_precisions"]
    assert is_fixed(engine)
    assert counts.get("u8", 0) + counts.get("i8", 0) > counts["f32"]
    assert ztp.check_parity(engine, model, tiny.images(6)).edges[1].worst_logit < 1


READ_AS_THEY_ARE = {
    "votes and likenesses": ("zero_tprune", {}, 9),
    "the first of two votes each": ("zero_tprune", {"rounds": 2}, 9),
    "what survivors attend to, not their votes": ("zero_tprune", {"renormalise": True}, 9),
    "distances are computed": ("zero_tprune", {"metric": "manhattan"}, 6),
    "normalised features are computed": ("zero_tprune", {"feature_heads": "normalised"}, 6),
    "keys are averaged": ("tome", {}, 0),
    "weights of a predictor are no mask": ("dynamicvit", tiny.OPTIONS["dynamicvit"], 0),
}


@pytest.mark.parametrize("method, options, products", READ_AS_THEY_ARE.values(), ids=READ_AS_THEY_ARE)
def test_scores_read_bf16_where_it_holds_what_they_read(method, options, products, model, exported):
    plan = ztp.make_plan(model, method=method, ratio=0.7, options=options)
    artifact = exported(ztp.prune(model, plan))
    graph = ir_model(artifact)
    marked = ir.outside_the_tokens_way(graph)
    kinds = {op.get_friendly_name(): op.get_type_name() for op in graph.get_ops()}
    freed = ir.read_bf16(graph, marked)
    assert sum(kinds[name] == "MatMul" for name in freed) == products
    assert {kinds[name] for name in freed} <= {"MatMul", *ir._MOVES, *ir._WEIGHING}
    # What it puts in has names that the rule finds again, and the float32 sums are marked.
    added = {name for name in ir.outside_the_tokens_way(graph) - marked if name.endswith("_in_float32")}
    assert len(added) == products
    # In float32 nothing has changed: what is added is too small, and the outputs keep their names.
    assert_same_results(graph, artifact.directory)


def test_attention_that_a_stage_reads_is_summed_in_pairs(artifact):
    """37 tokens enter the first stage, 26 and 18 the others."""
    graph = ir_model(artifact)
    attention.even_sums(graph, ir.outside_the_tokens_way(graph))
    padded = [op for op in graph.get_ops() if op.get_type_name() == "Pad"]
    assert sorted([d.get_length() for d in list(op.get_output_partial_shape(0))[1:]] for op in padded) == [
        [3, 37, 38],
        [3, 38, 16],
    ]
    assert_same_results(graph, artifact.directory)


DIVIDED_LATE = {
    "a vote and a vote of survivors": ("zero_tprune", {}, 3),
    "more rounds": ("zero_tprune", {"rounds": 3}, 3),
    "what survivors attend to": ("zero_tprune", {"renormalise": True}, 3),
    "no likeness": ("zero_tprune", {"similar": 0.0}, 3),
    "a class token's row": ("evit", {}, 3),
    "logits that are read too": ("zero_tprune", {"temperature": 2.0}, 0),
    "rows that are gathered": ("ats", {}, 0),
    "nothing": ("tome", {}, 0),
}


@pytest.mark.parametrize("fixed", [True, False])
@pytest.mark.parametrize("method, options, stages", DIVIDED_LATE.values(), ids=DIVIDED_LATE)
def test_attention_is_divided_late_where_it_is_read_row_by_row(method, options, stages, fixed, model, exported):
    plan = ztp.make_plan(model, method=method, ratio=0.7, options=options)
    artifact = exported(ztp.prune(model, plan))
    graph = ir_model(artifact)
    softmaxes = sum(op.get_type_name() == "Softmax" for op in graph.get_ops())
    attention.divide_late(graph, fixed)
    kinds = [op.get_type_name() for op in graph.get_ops()]
    assert kinds.count("Softmax") == softmaxes - stages
    assert kinds.count("Exp" if fixed else "Sigmoid") == stages
    assert_same_results(graph, artifact.directory)


def softmax_of(queries, keys, fixed, late=True):
    """(A V, s A) with values and votes of 1 to N, computed in float32 by OpenVINO."""
    queries, keys = (np.asarray(values, np.float32)[None, None] for values in (queries, keys))
    count = keys.shape[2]
    shape = openvino.PartialShape([-1, 1, count, keys.shape[3]])
    inputs = [opset.parameter(shape, np.float32) for _ in range(2)]
    softmax = opset.softmax(opset.matmul(inputs[0], inputs[1], False, True), -1)
    numbers = np.arange(1, count + 1, dtype=np.float32)
    results = [
        opset.matmul(softmax, numbers.reshape(1, 1, -1, 1), False, False),
        opset.matmul(numbers.reshape(1, 1, 1, -1), softmax, False, False),
    ]
    graph = openvino.Model(results, inputs)
    if late:
        attention.divide_late(graph, fixed)
        assert not any(op.get_type_name() == "Softmax" for op in graph.get_ops())
    found = openvino.compile_model(graph, "CPU", {"INFERENCE_PRECISION_HINT": "f32"})([queries, keys])
    return [found[index].ravel() for index in range(2)]


@pytest.mark.parametrize("fixed", [True, False])
@pytest.mark.parametrize("count", [5, 6])
def test_no_row_of_logits_overflows_when_divided_late(count, fixed):
    """Rows far from zero as a whole, either way, and one that attends to one token alone."""
    generator = np.random.default_rng(0)
    keys, queries = generator.standard_normal((2, count, 4))
    for shift in (0.0, 300.0, -300.0):
        found = softmax_of(np.c_[queries, np.ones(count)], np.c_[keys, np.full(count, shift)], fixed)
        expected = softmax_of(queries, keys, fixed, late=False)
        for one, other in zip(found, expected, strict=True):
            np.testing.assert_allclose(one, other, rtol=1e-3)
    # The last token's logit is 1000 above the others: it gets all, though its exponential has saturated.
    sink = np.zeros((count, 1))
    sink[-1] = 1000.0
    received, _ = softmax_of(np.ones((count, 1)), sink, fixed)
    np.testing.assert_allclose(received, count, rtol=1e-3)


@pytest.mark.parametrize("batch", [(1, 8, 64), (4, 4, 4)], ids=["dynamic", "fixed"])
def test_bf16_scores_are_summed_in_float32(batch, model, exported, tmp_path):
    """Also where shapes are known: no start vector became a constant, which would copy attention into float32."""
    if not HAS_BF16:
        with pytest.raises(MissingSoftware):
            backend._check_processor("bf16", backend.Settings())
        return
    artifact = exported(ztp.prune(model, ztp.make_plan(model, ratio=0.7)))
    try:
        engine = ztp.build(artifact, "openvino", precision="bf16", batch=batch, directory=tmp_path / "e")
    except GateFailed as refusal:
        assert "precision=bf16 was asked for, but OpenVINO computes" in refusal.problem  # noqa: PT017
        return
    # The classifier is the tenth, and what the note is about.
    assert engine.manifest.built["score_precisions"] == {"bf16 to f32": 9, "bf16": 1}
    [note] = engine.manifest.built["notes"]
    assert "1 of 10 products of scores and classifier in bf16" in note
    with ztp.load_engine(tmp_path / "e") as session:
        found = session.audit(tiny.images(4))
    for name in ("similarity_1", "score_1", "similarity_3", "score_3"):
        values = found[name][found[name] > 0]  # a dropped token's -1 is exact
        assert (values.view(np.uint32) & 0xFFFF != 0).mean() > 0.9, name  # bf16 has none of these bits


def ir_model(artifact):
    graph = openvino.Core().read_model(str(artifact.directory / "model.onnx"))
    ir.fuse(graph)
    return graph


def assert_same_results(graph, directory):
    """The graph gives what the one in the folder gives, under the same names."""
    results = []
    for one in (graph, openvino.Core().read_model(str(directory / "model.onnx"))):
        compiled = openvino.Core().compile_model(one, "CPU", {"INFERENCE_PRECISION_HINT": "f32"})
        found = compiled(tiny.images(2))
        results.append({name: found[output] for output in compiled.outputs for name in output.get_names()})
    assert results[0].keys() == results[1].keys()
    for name, values in results[0].items():
        np.testing.assert_allclose(values, results[1][name], rtol=1e-4, atol=1e-5, err_msg=name)


def test_only_the_processor_is_offered():
    with pytest.raises(MissingSoftware, match="device=cuda"):
        backend.resolve_device("cuda")
    with pytest.raises(BadRequest, match="device=npu"):
        backend.resolve_device("npu")


def test_the_rule_for_scores_needs_the_graphs_names(openvino_engine):
    model = openvino.Core().read_model(str(openvino_engine.directory / "model.xml"))
    names = ir.outside_the_tokens_way(model)
    softmaxes = [op.get_friendly_name() for op in model.get_ops() if op.get_type_name() == "Softmax"]
    assert softmaxes
    assert not names & set(softmaxes)


def test_a_reason_is_what_the_innermost_message_ends_with(tmp_path):
    images = opset.parameter([1, 3], np.float32)
    model = openvino.Model([opset.matmul(images, np.ones((3, 50), np.float32), False, False)], [images])
    openvino.save_model(model, tmp_path / "model.xml")
    with (tmp_path / "model.bin").open("r+b") as weights:
        weights.truncate(10)
    with pytest.raises(RuntimeError) as cut:
        openvino.Core().read_model(tmp_path / "model.xml")
    assert "Check '" in str(cut.value)
    assert backend._reason(cut.value) == "Incorrect weights in bin file"
    (tmp_path / "model.onnx").write_bytes(b"no graph")
    with pytest.raises(RuntimeError) as unread:
        openvino.Core().read_model(tmp_path / "model.onnx")
    assert backend._reason(unread.value).startswith("Unable to read the model: ")
    assert backend._reason(RuntimeError("Exception from a.cpp:1:\n")) == "Exception from a.cpp:1:"
    assert backend._reason(RuntimeError("\n")) == "no reason was given"


def test_int8_without_nncf_is_refused_with_its_extra(artifact, calibration, monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "nncf", None)
    with pytest.raises(MissingSoftware, match=r'int8 needs nncf.* pip install "ztp_deploy\[nncf\]"'):
        ztp.build(artifact, "openvino", precision="int8", calibration=calibration, directory=tmp_path / "engine")
    assert list(tmp_path.iterdir()) == []
