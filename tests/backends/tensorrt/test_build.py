"""Building for real: TensorRT-RTX compiles without a GPU, so every graph goes through parser and builder here."""

from __future__ import annotations

import os
import signal
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

import ztp_deploy as ztp
from tests import tiny
from tests.backends.tensorrt import needs_rtx
from ztp_deploy import backends, environment, exporters, methods
from ztp_deploy.backends.tensorrt.build import Order, build_plan
from ztp_deploy.backends.tensorrt.config import configure
from ztp_deploy.backends.tensorrt.library import RTX, STANDARD
from ztp_deploy.backends.tensorrt.network import check_precision
from ztp_deploy.backends.tensorrt.progress import Progress
from ztp_deploy.backends.tensorrt.settings import Settings
from ztp_deploy.errors import BadRequest, BuildFailed, GateFailed, MissingSoftware
from ztp_deploy.manifest import BatchRange
from ztp_deploy.source import ModelSize

pytestmark = needs_rtx

SIZE = ModelSize(img_size=64, depth=3, embed_dim=32, num_heads=2, num_classes=10)
"""Sixteen patches, a stage at block 2, plain attention at blocks 1 and 3."""


@pytest.fixture(scope="module")
def artifacts(tmp_path_factory):
    """Every method's graph in every precision, from one trace each."""
    folder = tmp_path_factory.mktemp("artifacts")
    model = tiny.model(size=SIZE)
    made = {}
    for method in ("dense", *methods.METHODS):
        asked = {} if method == "dense" else {"keep": [11], "sites": [2], "options": tiny.OPTIONS.get(method)}
        pruned = ztp.prune(model, ztp.make_plan(model, method, **asked))
        made[method, "fp32"] = ztp.export(pruned, "onnx", folder / method)
        for precision in ("fp16", "bf16"):
            made[method, precision] = exporters.convert(
                made[method, "fp32"], precision, folder / f"{method}-{precision}"
            )
    return made


@pytest.fixture
def no_gpu(monkeypatch):
    monkeypatch.setattr(environment, "gpus", lambda: ())


def build(artifact, directory, batch=(1, 2, 4), **settings):
    return ztp.build(
        artifact,
        "tensorrt_rtx",
        precision=artifact.manifest.precision,
        batch=batch,
        directory=directory,
        settings={"audit": False} | settings,
    )


DYNAMIC, STATIC = (1, 2, 4), 2
GRAPHS = [
    (method, precision, batch)
    for method in ("dense", *methods.METHODS)
    for precision in ("fp32", "fp16", "bf16")
    for batch in (DYNAMIC, STATIC)
    # All forms of two, and of the others the one that is shipped most.
    if method in ("dense", "zero_tprune") or (precision, batch) == ("fp16", DYNAMIC)
]


@pytest.mark.parametrize("method, precision, batch", GRAPHS)
def test_every_graph_builds(method, precision, batch, artifacts, tmp_path, no_gpu):
    engine = build(artifacts[method, precision], tmp_path / "e", batch)
    assert set(engine.manifest.files) == {"model.plan"}
    assert engine.manifest.files["model.plan"].bytes > 10_000
    assert engine.manifest.unproved == "no NVIDIA GPU was found"
    built = engine.manifest.built
    # A stage that reads attention probabilities opens its own block's and no other.
    plain = 2 if method in ("zero_tprune", "evit", "ats", "diffrate") else 3
    low = precision != "fp32"
    assert built["attention_expected"] == plain
    assert built["attention_fused"] == (plain if low else 0)
    if low:
        assert built["engine_products"]["proved"] == built["engine_products"]["asked"] == built["matrix_products"] > 15
        assert built["notes"] == []
    else:
        assert "fuses them in fp16 and bf16" in built["notes"][0]


def test_the_audit_plan_is_a_second_plan(artifacts, tmp_path, no_gpu):
    told: list[float] = []
    artifact = artifacts["zero_tprune", "fp16"]
    engine = ztp.build(
        artifact, "tensorrt_rtx", precision="fp16", batch=2, directory=tmp_path / "e", progress=told.append
    )
    assert set(engine.manifest.files) == {"model.plan", "audit.plan"}
    assert sum(told) == pytest.approx(1.0)
    with pytest.raises(MissingSoftware, match="no NVIDIA GPU was found"):
        ztp.load_engine(engine.directory)


def order(model: onnx.ModelProto, tmp_path: Path, precision="fp32", batch=(1, 2, 4), **settings) -> Order:
    return Order(
        library=RTX,
        model=model,
        graph=tmp_path / "model.onnx",
        precision=precision,
        batch=BatchRange.parse(batch),
        stages=0,
        settings=Settings(**settings),
        timings=None,
    )


def silent() -> Progress:
    return Progress(lambda share: None, 1.0)


def one_node(node: onnx.NodeProto, width: int, *constants: onnx.TensorProto) -> onnx.ModelProto:
    """The node after a matrix product of images [b, width]."""
    weights = numpy_helper.from_array(np.eye(width, dtype=np.float32), "w")
    product = helper.make_node("MatMul", ["images", "w"], ["x"], name="product")
    images = helper.make_tensor_value_info("images", TensorProto.FLOAT, ["b", width])
    logits = helper.make_tensor_value_info("logits", TensorProto.FLOAT, None)
    graph = helper.make_graph([product, node], "g", [images], [logits], [weights, *constants])
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=10)


def test_a_scatter_is_refused_by_name_and_cause(tmp_path):
    index = numpy_helper.from_array(np.zeros((1, 8), np.int64), "index")
    scatter = helper.make_node("ScatterElements", ["x", "index", "x"], ["logits"], name="merge_tokens", reduction="add")
    with pytest.raises(
        BuildFailed, match=r"parser refuses ScatterElements node 'merge_tokens': Unsupported reduction type\."
    ):
        build_plan(order(one_node(scatter, 8, index), tmp_path), silent())


def test_an_unknown_operator_is_refused_by_name(tmp_path):
    node = helper.make_node("Unique", ["x"], ["logits"], name="distinct")
    with pytest.raises(BuildFailed, match=r"parser refuses Unique node 'distinct': not supported"):
        build_plan(order(one_node(node, 8), tmp_path), silent())


@pytest.mark.parametrize("k, fits", [(3840, True), (3841, False)])
def test_the_builder_has_a_largest_k(k, fits, tmp_path):
    count = numpy_helper.from_array(np.array([k]), "k")
    model = one_node(helper.make_node("TopK", ["x", "k"], ["logits", "i"], name="too_many"), 4000, count)
    if fits:
        assert build_plan(order(model, tmp_path), silent()).data.nbytes > 0
        return
    with pytest.raises(
        BuildFailed, match=r"could not build the engine: .*too_many: K exceeds the maximum .*3840"
    ) as error:
        build_plan(order(model, tmp_path), silent())
    assert ".cpp" not in str(error.value)


def test_a_float32_graph_is_no_fp16_engine(artifacts, tmp_path):
    """Strongly typed networks compute what the graph says; a label alone must not pass."""
    model = onnx.load(str(artifacts["dense", "fp32"].directory / "model.onnx"))
    with pytest.raises(GateFailed, match=r"fp16 was asked for, but in TensorRT's network no matrix product is"):
        build_plan(order(model, tmp_path, "fp16"), silent())
    lowered = onnx.load(str(artifacts["dense", "fp16"].directory / "model.onnx"))
    with pytest.raises(GateFailed, match=r"fp32 was asked for, but .* \(half\) and 24 more are not"):
        build_plan(order(lowered, tmp_path, "fp32"), silent())


def test_products_that_went_missing_are_counted(artifacts):
    """As a parser would leave a network that renamed its layers and moved their types."""
    trt = RTX.load()

    class Layer:
        name, type = "renamed", trt.LayerType.MATRIX_MULTIPLY

        def get_output(self, index):
            return SimpleNamespace(dtype=trt.DataType.HALF)

    network = SimpleNamespace(num_layers=24, get_layer=lambda index: Layer())
    model = onnx.load(str(artifacts["dense", "fp16"].directory / "model.onnx"))
    with pytest.raises(GateFailed, match="only 24 of 25 matrix products are"):
        check_precision(trt, network, model, "fp16")
    network.num_layers = 25
    assert check_precision(trt, network, model, "fp16") == 25


def test_pixels_go_in_as_uint8(tmp_path, no_gpu):
    model = tiny.model(size=SIZE)
    pruned = ztp.prune(model, ztp.make_plan(model, "slice", ratio=0.7, sites=[2]))
    artifact = ztp.export(pruned, "onnx", tmp_path / "a", precision="fp16", input="uint8")
    assert build(artifact, tmp_path / "e").manifest.built["attention_fused"] == 3


def test_a_second_reader_unfuses_and_is_named(artifacts, tmp_path):
    """Probabilities that must be written out cannot stay inside a fused kernel."""
    model = onnx.load(str(artifacts["dense", "fp16"].directory / "model.onnx"))
    softmax = next(node for node in model.graph.node if node.op_type == "Softmax")
    model.graph.output.append(helper.make_tensor_value_info(softmax.output[0], TensorProto.FLOAT16, None))
    wanted = order(model, tmp_path, "fp16")
    found, _ = build_plan(wanted, silent()).proofs(wanted)
    assert (found.expected, found.fused) == (3, 2)
    assert found.unfused == ("node_scaled_dot_product_attention",)


def test_require_fusion_turns_the_note_into_an_error(artifacts, tmp_path, no_gpu):
    with pytest.raises(GateFailed, match=r"require_fusion was asked for\. None of 3 attention layers fused"):
        build(artifacts["dense", "fp32"], tmp_path / "e", require_fusion=True)
    assert list(tmp_path.iterdir()) == []
    engine = build(artifacts["dense", "fp16"], tmp_path / "e", require_fusion=True)
    assert engine.manifest.built["attention_fused"] == 3


def test_ctrl_c_cancels_a_build_and_leaves_nothing(artifacts, tmp_path, no_gpu):
    def press(share: float) -> None:
        os.kill(os.getpid(), signal.SIGINT)

    with pytest.raises(KeyboardInterrupt):
        ztp.build(
            artifacts["zero_tprune", "fp16"],
            "tensorrt_rtx",
            precision="fp16",
            directory=tmp_path / "e",
            progress=press,
        )
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    "settings, message",
    [
        ({"optimization_level": 6}, "optimization_level"),
        ({"workspace_mib": 0}, "workspace_mib"),
        ({"fast": True}, "Its settings are: audit, optimization_level"),
        ({"refit": True, "strip_plan": True}, "not both"),
        ({"version_compatible": True, "refit": True}, "cannot refit: give version_compatible alone"),
        ({"version_compatible": True, "strip_plan": True}, "cannot refit: give version_compatible alone"),
        ({"version_compatible": True}, "TensorRT-RTX takes no version_compatible"),
        ({"hardware_compatible": "ampere_plus"}, "TensorRT-RTX takes no hardware_compatible"),
    ],
)
def test_settings_that_cannot_be(settings, message, artifacts, tmp_path):
    with pytest.raises(BadRequest, match=message):
        build(artifacts["dense", "fp32"], tmp_path / "e", **settings)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("version, refused", [("11.3.0.14", True), ("11.4.0.106", False), ("10.16.1.11", False)])
def test_refit_is_refused_where_it_loses_numbers(version, refused):
    flags = []
    trt = SimpleNamespace(
        __version__=version,
        BuilderFlag=SimpleNamespace(TF32="tf32", REFIT="refit"),
        ProfilingVerbosity=SimpleNamespace(DETAILED="detailed"),
    )
    config = SimpleNamespace(set_flag=flags.append, clear_flag=lambda flag: None)
    settings = Settings(refit=True)
    if refused:
        with pytest.raises(BadRequest, match=r"TensorRT 11\.3\.0\.14 may lose a bias"):
            configure(trt, STANDARD, config, settings)
    else:
        configure(trt, STANDARD, config, settings)
    assert flags == ([] if refused else ["refit"])


def test_limits_reach_the_builder(artifacts, tmp_path, no_gpu):
    engine = build(artifacts["dense", "fp16"], tmp_path / "e", workspace_mib=64, optimization_level=0)
    assert engine.manifest.settings["workspace_mib"] == 64
    with pytest.raises(BuildFailed, match="could not build the engine"):
        build(artifacts["dense", "fp16"], tmp_path / "f", refit=True)  # compiles on the GPU, and there is none


@pytest.mark.parametrize("missing", ["STRONGLY_TYPED", "AMPERE_PLUS"])
def test_a_flag_that_a_release_lacks_is_a_sentence(missing):
    from enum import Enum

    from ztp_deploy.backends.tensorrt.library import member

    with pytest.raises(BadRequest, match=rf"my_setting needs Flag\.{missing}, which this release .* does not have"):
        member(Enum("Flag", ["OTHER"]), missing, "my_setting")


def test_the_choice_of_auto(monkeypatch):
    gpu = environment.Gpu("NVIDIA H100", "9.0", 80.0)
    tensorrt = backends.get("tensorrt")
    for gpus, missing, chosen in (
        ((), None, "onnxruntime"),
        ((gpu,), "tensorrt", "onnxruntime"),
        ((gpu,), None, "tensorrt"),
    ):
        monkeypatch.setattr(environment, "gpus", lambda gpus=gpus: gpus)
        monkeypatch.setattr(tensorrt, "missing", lambda missing=missing: missing)
        assert backends.choose("auto") == chosen
        assert backends.choose("torchscript") == "torchscript"


def test_devices(monkeypatch):
    standard, portable = backends.get("tensorrt"), backends.get("tensorrt_rtx")
    for gpus in ((), (environment.Gpu("NVIDIA H100", "9.0", 80.0),)):
        monkeypatch.setattr(environment, "gpus", lambda gpus=gpus: gpus)
        assert portable.resolve_device("auto").slug == "portable"
        if gpus:
            assert standard.resolve_device("cuda").slug == "nvidia-h100-sm90"
            assert standard.unrunnable(standard.resolve_device("auto").name) is None
        else:
            with pytest.raises(MissingSoftware, match="the back end tensorrt_rtx"):
                standard.resolve_device("auto")
            assert "no NVIDIA GPU" in portable.unrunnable(portable.resolve_device("auto").name)
        with pytest.raises(BadRequest, match="NVIDIA GPUs; device='cpu'"):
            portable.resolve_device("cpu")


@pytest.mark.slow
def test_deit_s_builds_with_every_plain_attention_fused(tmp_path, no_gpu):
    model = ztp.load_model("deit_s", weights="random")
    pruned = ztp.prune(model, ztp.make_plan(model, ratio=0.7))
    artifact = ztp.export(pruned, "onnx", tmp_path / "a", precision="fp16")
    built = build(artifact, tmp_path / "e", "1:8:64").manifest.built
    assert (built["attention_expected"], built["attention_fused"], built["attention_unfused"]) == (9, 9, [])
    assert built["engine_products"]["asked"] == built["engine_products"]["proved"]
