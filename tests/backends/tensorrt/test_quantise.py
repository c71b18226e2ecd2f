"""int8 and fp8: which products are quantised, what the graph then computes, and that the builder takes it."""

from __future__ import annotations

import sys
from types import SimpleNamespace

import numpy as np
import onnx
import pytest
import torch
from onnx import TensorProto, helper, numpy_helper

import ztp_deploy as ztp
from tests import tiny
from tests.backends.tensorrt import needs_modelopt, needs_rtx
from ztp_deploy import backends, environment
from ztp_deploy.backends.base import Device
from ztp_deploy.backends.onnxruntime import backend as onnxruntime_backend
from ztp_deploy.backends.tensorrt.build import build_plan
from ztp_deploy.backends.tensorrt.graph import low_products
from ztp_deploy.backends.tensorrt.quantise import Calibration, quantised
from ztp_deploy.errors import BadRequest, BuildFailed, GateFailed, MissingSoftware
from ztp_deploy.evidence.images import ImageSet, load_images
from ztp_deploy.evidence.parity import compare_with_eager
from ztp_deploy.evidence.tolerances import TOLERANCES
from ztp_deploy.exporters import vocabulary
from ztp_deploy.exporters.fold import constants, fold_constants
from ztp_deploy.exporters.precision import lower, weight_products
from ztp_deploy.manifest import hash_files

QUANTISED = {"int8": TensorProto.INT8, "fp8": TensorProto.FLOAT8E4M3FN}
GPU = environment.Gpu("NVIDIA RTX 3090", "8.6", 24.0)


def silent(share: float) -> None:
    """Nobody listens."""


@pytest.fixture(scope="module")
def folded(artifact):
    return fold_constants(onnx.load(str(artifact.directory / "model.onnx")))


@pytest.fixture(scope="module")
def calibration(model):
    return load_images(None, model.source.preprocessing, "float32", 8, purpose="calibration").pixels


@pytest.fixture(scope="module")
def graphs(folded, calibration, tmp_path_factory):
    """The float32 graph with Q/DQ, per precision."""
    scratch = tmp_path_factory.mktemp("scratch")
    products = [node.name for node in weight_products(folded) if node.op_type == "MatMul"]
    made = {
        precision: quantised(folded, products, Calibration(calibration, precision, "max"), scratch, silent)
        for precision in QUANTISED
    }
    assert list(scratch.iterdir()) == []
    return made


@needs_modelopt
@pytest.mark.parametrize("precision", sorted(QUANTISED))
class TestTheGraph:
    def test_products_of_tokens_with_weights_are_quantised_and_nothing_else(self, precision, graphs, folded):
        model = graphs[precision]
        names = {node.name for node in weight_products(folded)}
        # Per block four products of the attention with weights and two of the MLP.
        assert low_products(model, precision) == names
        assert len(names) == 4 * 6
        producer = {name: node for node in model.graph.node for name in node.output}
        for node in model.graph.node:
            sources = {producer[name].op_type for name in node.input if name in producer}
            if node.name not in names and node.op_type != "DequantizeLinear":
                assert not sources & vocabulary.QUANTISATION, node.name
        kinds = tiny.matrix_types(model)
        assert kinds[TensorProto.DataType.Name(QUANTISED[precision]).lower()] == 24
        assert kinds["float"] == sum(tiny.matrix_types(folded).values()) - 24

    def test_scales_are_symmetric_per_channel_for_weights_and_per_tensor_for_tokens(self, precision, graphs):
        model = graphs[precision]
        known = constants(model.graph)
        shapes = []
        for node in model.graph.node:
            if node.op_type == "QuantizeLinear":
                scale, zero = (known[name] for name in node.input[1:])
                assert zero.data_type == QUANTISED[precision]
                assert not numpy_helper.to_array(zero).astype(np.float32).any()
                assert (numpy_helper.to_array(scale) > 0).all()
                weights = node.input[0] in known
                assert list(scale.dims) == ([known[node.input[0]].dims[1]] if weights else [])
                shapes.append(weights)
        # Queries, keys and values read the same tokens.
        assert (shapes.count(True), shapes.count(False)) == (24, 16)

    def test_it_keeps_the_vocabulary_that_an_exported_graph_must_not_leave(self, precision, graphs, artifact):
        plan = artifact.manifest.plan
        assert vocabulary.lint(graphs[precision], plan, quantised=True) == []
        faults = vocabulary.lint(graphs[precision], plan)
        assert len(faults) == 2 * (24 + 16)
        assert all("Linear '" in fault and "is not in the vocabulary" in fault for fault in faults)

    def test_the_rest_of_the_tokens_way_goes_to_16_bits(self, precision, graphs):
        for low, kind in (("fp16", TensorProto.FLOAT16), ("bf16", TensorProto.BFLOAT16)):
            model = lower(graphs[precision], low)
            onnx.checker.check_model(model, full_check=True)
            known = constants(model.graph)
            assert {known[n.input[1]].data_type for n in model.graph.node if n.op_type == "QuantizeLinear"} == {kind}
            assert low_products(model, precision) == low_products(graphs[precision], precision)
            # The patch embedding and both products of every attention.
            assert len(low_products(model, low)) == 1 + 2 * 4

    def test_it_computes_what_eager_computes_less_exactly(self, precision, graphs, artifact, pruned, tmp_path):
        edge = compare(lower(graphs[precision], "fp16"), artifact, pruned, precision, tmp_path)
        assert edge.holds
        assert edge.tolerance == TOLERANCES[precision]
        # Seen: 0.1 σ in int8, 0.2 σ in fp8. An fp16 graph stays below 0.02 σ.
        assert 0.02 < edge.worst_logit < 0.3
        assert all(agreement.token_agreement > 0.7 for agreement in edge.stages)

    def test_wrong_weights_are_found_beyond_the_rounding(self, precision, graphs, artifact, pruned, tmp_path):
        damaged = lower(graphs[precision], "fp16")
        known = constants(damaged.graph)
        [product] = [node for node in damaged.graph.node if node.name == last_projection(damaged, precision)]
        producer = {name: node for node in damaged.graph.node for name in node.output}
        quantiser = producer[producer[product.input[1]].input[0]]
        weights = known[quantiser.input[0]]
        weights.CopyFrom(numpy_helper.from_array(-numpy_helper.to_array(weights), weights.name))
        edge = compare(damaged, artifact, pruned, precision, tmp_path)
        assert not edge.holds
        assert {fault.kind for fault in edge.faults} == {"weights"}


def compare(model, artifact, pruned, precision, folder, count=16):
    """The parity gate's edge from eager PyTorch to the graph in ONNX Runtime, on photographs."""
    path = folder / "model.onnx"
    onnx.save_model(model, path)
    runner = onnxruntime_backend.OnnxRuntimeRunner(
        path,
        artifact.manifest,
        provider=onnxruntime_backend.CPU,
        settings=onnxruntime_backend.Settings(),
        optimise=False,
    )
    pictures = load_images(None, pruned.source.preprocessing, "float32", count)
    return compare_with_eager(pruned, runner, pictures, precision)


def last_projection(model, precision):
    """The name of the last block's second MLP product."""
    names = low_products(model, precision)
    return [node.name for node in model.graph.node if node.name in names][-1]


@needs_modelopt
def test_fp8_is_coarser_than_int8_over_numbers_spread_as_these(graphs, artifact, pruned, tmp_path):
    worst = {}
    for precision in QUANTISED:
        (tmp_path / precision).mkdir()
        worst[precision] = compare(graphs[precision], artifact, pruned, precision, tmp_path / precision).worst_logit
    assert worst["int8"] < worst["fp8"] < 5 * worst["int8"]


def two_readers(width: int = 32) -> onnx.ModelProto:
    """A product with weights, and beside it a score that reads the same tokens."""
    weights = np.random.default_rng(0).standard_normal((width, width)).astype(np.float32)
    graph = helper.make_graph(
        [
            helper.make_node("MatMul", ["images", "embed"], ["patches"], name="embedding"),
            helper.make_node("Neg", ["patches"], ["tokens"], name="between"),
            helper.make_node("MatMul", ["tokens", "w"], ["mixed"], name="mixing.1"),
            helper.make_node("MatMul", ["mixed", "w"], ["more"], name="mixing.10"),
            helper.make_node("ReduceSum", ["tokens"], ["score"], name="score"),
            helper.make_node("MatMul", ["more", "head"], ["logits"], name="classifier"),
        ],
        "g",
        [helper.make_tensor_value_info("images", TensorProto.FLOAT, ["b", 4, width])],
        [
            helper.make_tensor_value_info("logits", TensorProto.FLOAT, ["b", 4, width]),
            helper.make_tensor_value_info("score", TensorProto.FLOAT, None),
        ],
        [numpy_helper.from_array(weights, name) for name in ("embed", "w", "head")],
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=10)


def test_the_rule_needs_no_names():
    assert [node.name for node in weight_products(two_readers())] == ["mixing.1", "mixing.10"]


@needs_modelopt
def test_others_who_read_the_tokens_get_them_unquantised(tmp_path):
    images = np.random.default_rng(1).standard_normal((2, 4, 32)).astype(np.float32)
    told: list[float] = []
    made = quantised(two_readers(), ["mixing.1"], Calibration(images, "int8", "max"), tmp_path, told.append)
    nodes = {node.name: node for node in made.graph.node}
    assert nodes["score"].input[0] == "tokens"
    assert nodes["mixing.1"].input[0] != "tokens"
    # A name is a name and no pattern: its longer namesake is left alone.
    assert nodes["mixing.10"].input[0] == "mixed"
    assert nodes["mixing.10"].input[1] in constants(made.graph)
    assert told == [0.5, 0.5]


@needs_modelopt
@pytest.mark.parametrize("method", ["max", "entropy"])
def test_tokens_are_scaled_by_what_the_images_bring(method, tmp_path, capfd):
    images = np.random.default_rng(1).standard_normal((2, 4, 32)).astype(np.float32)
    made = quantised(two_readers(), ["mixing.1"], Calibration(images, "int8", method), tmp_path, silent)
    embedding = numpy_helper.to_array(two_readers().graph.initializer[0])
    tokens = -images @ embedding
    [quantiser] = [n for n in made.graph.node if n.op_type == "QuantizeLinear" and n.input[0] == "tokens"]
    scale = numpy_helper.to_array(constants(made.graph)[quantiser.input[1]])
    largest = np.abs(tokens).max() / 127
    if method == "max":
        assert scale == pytest.approx(largest, rel=1e-5)
    else:
        assert 0.2 * largest < scale <= 1.01 * largest
    assert capfd.readouterr() == ("", "")


@needs_modelopt
def test_scales_too_small_for_fp16_are_raised(tmp_path):
    model = two_readers()
    small = np.full((32, 32), 1e-9, np.float32)
    constants(model.graph)["w"].CopyFrom(numpy_helper.from_array(small, "w"))
    images = np.ones((1, 4, 32), np.float32)
    made = quantised(model, ["mixing.1"], Calibration(images, "int8", "max"), tmp_path, silent)
    low = lower(made, "fp16")
    scales = [numpy_helper.to_array(constants(low.graph)[n.input[1]]) for n in low.graph.node if "Linear" in n.op_type]
    assert all((scale > 0).all() for scale in scales)
    assert min(scale.min() for scale in scales) == np.float16(2**-24)


@needs_modelopt
def test_graphs_beyond_protobufs_limit_go_through_files(tmp_path, monkeypatch):
    monkeypatch.setattr("ztp_deploy.exporters.onnx._PROTOBUF_LIMIT", 0)
    tiny.hold_messages_to(1_000, monkeypatch)
    images = np.ones((1, 4, 32), np.float32)
    made = quantised(two_readers(), ["mixing.1"], Calibration(images, "fp8", "max"), tmp_path, silent)
    assert low_products(made, "fp8") == {"mixing.1"}
    assert list(tmp_path.iterdir()) == []


@needs_modelopt
def test_products_too_narrow_for_the_kernels_are_none(tmp_path):
    """ModelOpt leaves products out that have fewer than sixteen columns."""
    images = np.ones((1, 4, 8), np.float32)
    with pytest.raises(GateFailed, match="int8 was asked for, and none of 2 products of tokens with weights could be"):
        quantised(two_readers(8), ["mixing.1", "mixing.10"], Calibration(images, "int8", "max"), tmp_path, silent)


def test_a_graph_without_such_products_never_reaches_modelopt(tmp_path):
    """Asked for no product in particular, it would choose by itself."""
    with pytest.raises(GateFailed, match="none of 0 products"):
        quantised(two_readers(), [], Calibration(np.ones((1, 4, 32), np.float32), "int8", "max"), tmp_path, silent)


def stand_in(monkeypatch, quantize) -> None:
    """ModelOpt replaced by a function."""
    monkeypatch.setattr(environment, "installed", lambda package: "0.0")
    monkeypatch.setitem(sys.modules, "modelopt", SimpleNamespace())
    monkeypatch.setitem(sys.modules, "modelopt.onnx", SimpleNamespace())
    monkeypatch.setitem(sys.modules, "modelopt.onnx.quantization", SimpleNamespace(quantize=quantize))


def test_its_errors_are_one_sentence(artifact, calibration, tmp_path, monkeypatch):
    def fail(path, **arguments):
        raise AttributeError("module 'onnxruntime' has no attribute 'x'.\nmore")

    stand_in(monkeypatch, fail)
    monkeypatch.setattr(backends.get("tensorrt_rtx"), "missing", lambda: None)
    monkeypatch.setattr(backends.get("tensorrt_rtx"), "version", lambda: "0.0")
    with pytest.raises(BuildFailed, match=r"quantise the graph to int8: module 'onnxruntime' has no attribute 'x'\. "):
        ztp.build(artifact, "tensorrt_rtx", precision="int8", calibration=calibration, directory=tmp_path / "e")
    assert list(tmp_path.iterdir()) == []


def test_a_graph_handed_back_as_it_came_is_refused(tmp_path, monkeypatch):
    stand_in(monkeypatch, lambda path, output_path, **arguments: onnx.save_model(onnx.load(path), output_path))
    with pytest.raises(GateFailed, match="none of 1 products"):
        quantised(
            two_readers(), ["mixing.1"], Calibration(np.ones((1, 4, 32), np.float32), "int8", "max"), tmp_path, silent
        )


@pytest.mark.parametrize("backend", ["tensorrt", "tensorrt_rtx"])
def test_a_missing_modelopt_is_named_before_anything_is_built(backend, artifact, tmp_path, monkeypatch):
    monkeypatch.setattr(environment, "installed", lambda package: None)
    module = backends.get(backend)
    monkeypatch.setattr(module, "missing", lambda: None)
    monkeypatch.setattr(module, "resolve_device", lambda device: Device("cuda", "cuda-x", "cuda:0"))
    assert module.graph_precision("fp16") == "fp16"
    with pytest.raises(MissingSoftware, match=r'pip install "ztp_deploy\[modelopt\]"'):
        ztp.build(artifact, backend, precision="int8", directory=tmp_path / "e")
    assert list(tmp_path.iterdir()) == []


def test_a_modelopt_that_does_not_load_says_why(tmp_path, monkeypatch):
    stand_in(monkeypatch, None)
    monkeypatch.setitem(sys.modules, "modelopt.onnx.quantization", None)
    images = np.ones((1, 4, 32), np.float32)
    with pytest.raises(MissingSoftware, match="installed but cannot be loaded: import of modelopt"):
        quantised(two_readers(), ["mixing.1"], Calibration(images, "int8", "max"), tmp_path, silent)


def build(artifact, directory, precision, images, **settings):
    return ztp.build(
        artifact,
        "tensorrt_rtx",
        precision=precision,
        batch=(1, 2, 4),
        directory=directory,
        calibration=images,
        settings={"audit": False} | settings,
    )


@pytest.fixture
def no_gpu(monkeypatch):
    monkeypatch.setattr(environment, "gpus", lambda: ())


@needs_rtx
@needs_modelopt
def test_a_graph_beyond_protobufs_limit_is_built_from_two_files(artifact, calibration, tmp_path, no_gpu, monkeypatch):
    monkeypatch.setattr("ztp_deploy.exporters.onnx._PROTOBUF_LIMIT", 0)
    tiny.hold_messages_to(100_000, monkeypatch)
    engine = build(artifact, tmp_path / "e", "int8", calibration)
    assert set(engine.manifest.files) == {"model.plan", "model.onnx", "model.onnx.data"}
    assert engine.manifest.built["engine_products"] == {"asked": 24, "proved": 24}


@needs_rtx
@needs_modelopt
@pytest.mark.parametrize("low", ["fp16", "bf16"])
@pytest.mark.parametrize("precision", sorted(QUANTISED))
def test_the_builder_takes_it_and_its_layers_prove_it(precision, low, artifact, calibration, tmp_path, no_gpu):
    engine = build(artifact, tmp_path / "e", precision, calibration, float_precision=low)
    built = engine.manifest.built
    assert built["matrix_products"] == 24
    assert built["engine_products"] == {"asked": 24, "proved": 24}
    assert built["attention_fused"] == built["attention_expected"] == 1
    assert built["calibration"]["method"] == "max"
    assert built["calibration"]["images"] == 8
    assert built["calibration"]["tool"].startswith("nvidia-modelopt ")
    # What it was built from lies beside it; the artifact is what it was.
    assert set(engine.manifest.files) == {"model.plan", "model.onnx"}
    model = onnx.load(str(engine.directory / "model.onnx"))
    assert len(low_products(model, precision)) == 24
    assert len(low_products(model, low)) == 9
    assert hash_files(artifact.directory).keys() - {"manifest.json"} == artifact.manifest.files.keys()
    assert built["notes"] == (
        ["fp8 engines run on GPUs of compute capability 8.9 and newer (Ada, Hopper, Blackwell)."]
        if precision == "fp8"
        else []
    )


@needs_rtx
@needs_modelopt
def test_the_audit_plan_and_the_progress(artifact, calibration, tmp_path, no_gpu):
    told: list[float] = []
    engine = ztp.build(
        artifact,
        "tensorrt_rtx",
        precision="int8",
        batch=2,
        directory=tmp_path / "e",
        calibration=calibration[:2],
        progress=told.append,
    )
    assert set(engine.manifest.files) == {"model.plan", "audit.plan", "model.onnx"}
    assert sum(told) == pytest.approx(1.0)
    assert told[:2] == [0.2, 0.2]


@needs_rtx
@needs_modelopt
def test_pixels_calibrate_as_they_come(pruned, tmp_path, no_gpu):
    artifact = ztp.export(pruned, "onnx", tmp_path / "a", input="uint8")
    pixels = load_images(None, pruned.source.preprocessing, "uint8", 2, purpose="calibration").pixels
    assert build(artifact, tmp_path / "e", "int8", pixels).manifest.built["engine_products"]["proved"] == 24


@needs_rtx
def test_a_label_alone_makes_no_int8_engine(artifact, tmp_path, no_gpu):
    from tests.backends.tensorrt.test_build import order
    from ztp_deploy.backends.tensorrt.progress import Progress

    half = lower(onnx.load(str(artifact.directory / "model.onnx")), "fp16")
    for precision in QUANTISED:
        with pytest.raises(
            GateFailed, match=rf"{precision} was asked for, but in TensorRT's network no matrix product"
        ):
            build_plan(order(half, tmp_path, precision), Progress(silent, 1.0))


def test_fp8_takes_the_largest_values_only(artifact, calibration, tmp_path, monkeypatch):
    stand_in(monkeypatch, None)
    monkeypatch.setattr(backends.get("tensorrt_rtx"), "missing", lambda: None)
    monkeypatch.setattr(backends.get("tensorrt_rtx"), "version", lambda: "0.0")
    with pytest.raises(BadRequest, match="fp8 is calibrated by the largest values only"):
        build(artifact, tmp_path / "e", "fp8", calibration, calibration="entropy")


def test_fp8_needs_a_gpu_that_has_it(shared_engine, artifact, calibration, tmp_path, monkeypatch):
    """Neither asked for nor built on an older GPU, nor opened there."""
    stand_in(monkeypatch, None)
    backend = backends.get("tensorrt")
    monkeypatch.setattr(backend, "missing", lambda: None)
    monkeypatch.setattr(backend, "version", lambda: "11.4")
    monkeypatch.setattr(environment, "gpus", lambda: (GPU,))
    refusal = r"capability 8\.9 or newer; this is NVIDIA RTX 3090 \(8\.6\)"
    with pytest.raises(MissingSoftware, match=refusal):
        backends.resolve("tensorrt", precision="fp8")  # what is asked before a model is loaded
    with pytest.raises(MissingSoftware, match=refusal):
        ztp.build(artifact, "tensorrt", precision="fp8", calibration=calibration, directory=tmp_path / "e")
    settings = backend.Settings().model_dump()
    changes = {"backend_version": "11.4", "settings": settings, "built": {}, "precision": "fp8"}
    manifest = shared_engine.manifest.model_copy(update=changes)
    with pytest.raises(MissingSoftware, match=r"Use int8 or fp16"):
        backend.open_runner(tmp_path, manifest)
    newer = environment.Gpu("NVIDIA Test", "10.0", 24.0)
    monkeypatch.setattr(environment, "gpus", lambda: (newer,))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(MissingSoftware, match="torch sees no GPU"):  # the next gate
        backend.open_runner(tmp_path, manifest)


def test_images_are_asked_for(artifact, tmp_path, monkeypatch):
    stand_in(monkeypatch, None)
    monkeypatch.setattr(backends.get("tensorrt_rtx"), "missing", lambda: None)
    for images in (None, tiny.images(0)):
        with pytest.raises(BadRequest, match="calibrated on images and none were given"):
            build(artifact, tmp_path / "e", "int8", images)
    assert list(tmp_path.iterdir()) == []


@needs_rtx
@needs_modelopt
@pytest.mark.slow
@pytest.mark.parametrize("precision", sorted(QUANTISED))
def test_deit_s_is_quantised_whole(precision, exported, tmp_path, no_gpu):
    model = ztp.load_model("deit_s", weights="random")
    pruned = ztp.prune(model, ztp.make_plan(model, ratio=0.7))
    artifact = exported(pruned)
    images: ImageSet = load_images(None, pruned.source.preprocessing, "float32", 8, purpose="calibration")
    engine = build(artifact, tmp_path / "e", precision, images.pixels)
    built = engine.manifest.built
    # Twelve blocks with six products each.
    assert built["engine_products"] == {"asked": 72, "proved": 72}
    assert (built["attention_expected"], built["attention_fused"]) == (9, 9)
    edge = compare(onnx.load(str(engine.directory / "model.onnx")), artifact, pruned, precision, tmp_path, count=8)
    assert edge.holds
    # Over 64 photographs 0.17 and 0.44 were seen, and 91 and 85 % of the last stage's tokens.
    assert edge.worst_logit < {"int8": 0.25, "fp8": 0.6}[precision]
    assert edge.stages[-1].token_agreement > 0.8
