"""What is rewritten for the CUDA provider: the same function, in the operators that it should become.

The processor runs them in float32; that they are fast, only a GPU can say.
"""

from __future__ import annotations

import shutil
from types import SimpleNamespace

import numpy as np
import onnx
import onnxruntime
import pytest
import timm
import torch

import ztp_deploy as ztp
from tests import tiny
from tests.backends.onnxruntime.test_graph import assert_same, kinds, run, unused
from ztp_deploy import environment
from ztp_deploy.backends.onnxruntime import backend
from ztp_deploy.backends.onnxruntime.cuda import fit
from ztp_deploy.errors import BadRequest
from ztp_deploy.exporters.onnx import with_audit

# Fused attention, of how many; attention beside scores, of how many; patches; norms; lengths. Four blocks, two norms each.
CASES = {
    "a stage reads three of four": ("deit_t", "zero_tprune", (1, 1, 3, 3, 1, 5, 9)),
    "nothing is read": ("deit_t", "dense", (4, 4, 0, 0, 1, 8, 0)),
    "projections without a bias": ("lvvit_t", "dense", (4, 4, 0, 0, 1, 8, 0)),
    "sizes weigh the attention": ("deit_t", "tome", (1, 4, 0, 0, 1, 4, 0)),
    "rotated queries and keys": ("eva02_t_336", "dense", (0, 4, 0, 0, 1, 7, 0)),
}


def copied(exported, tmp_path, name="deit_t", method="zero_tprune", **options):
    model = tiny.model(name, tiny.SIZE.model_copy(update={"patch_size": 16}) if name.startswith("eva") else tiny.SIZE)
    plan = ztp.make_plan(model, method=method, **({} if method == "dense" else {"ratio": 0.7}))
    artifact = exported(ztp.prune(model, plan), **options)
    return artifact, shutil.copyfile(artifact.directory / "model.onnx", tmp_path / "model.onnx")


@pytest.mark.parametrize("name, method, done", CASES.values(), ids=CASES)
def test_the_function_stays_and_the_operators_change(name, method, done, exported, tmp_path):
    artifact, path = copied(exported, tmp_path, name, method)
    before = kinds(path)
    assert tuple(fit(path).values()) == done
    after = kinds(path)
    fused, _, beside, _, patches, norms, lengths = done
    assert after.count("MultiHeadAttention") == fused + beside
    assert after.count("FusedMatMul") == beside
    assert after.count("Conv") == before.count("Conv") - patches
    assert after.count("SkipLayerNormalization") == norms
    assert after.count("LayerNormalization") == before.count("LayerNormalization") - norms
    assert after.count("ReduceL2") == before.count("ReduceL2") - lengths
    assert_same(artifact.directory / "model.onnx", path)
    assert not unused(path, artifact.manifest.audit)


def test_biases_go_where_they_cost_nothing(exported, tmp_path):
    _, path = copied(exported, tmp_path, method="dense")
    before = kinds(path)
    fit(path)
    # Of a block: three projections, the one behind them and its residual, two in the MLP, its residual, a sum in GELU.
    assert before.count("Add") == 4 * 9 + 1
    # What is left: the queries', the MLP's first and the sum in GELU; the patches' bias and the table of positions.
    assert kinds(path).count("Add") == 4 * 3 + 2
    nodes = [node for node in onnx.load(str(path)).graph.node if node.op_type == "MultiHeadAttention"]
    assert [len(node.input) for node in nodes] == [3] * 4


def test_audited_scores_keep_their_names_and_values(exported, tmp_path):
    artifact, path = copied(exported, tmp_path)
    names = artifact.manifest.audit
    found = {}
    for key, source in (("before", artifact.directory / "model.onnx"), ("after", path)):
        if key == "after":
            fit(path)
        model = with_audit(onnx.load(str(source)), names)
        session = onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
        found[key] = dict(zip(names, session.run(list(names), {"images": tiny.images(3)}), strict=True))
    for name in names:
        np.testing.assert_allclose(found["after"][name], found["before"][name], rtol=1e-4, atol=1e-5, err_msg=name)


@pytest.mark.parametrize("pixels", ["float32", "uint8"])
def test_half_precision_stays_half_precision(pixels, exported, tmp_path):
    artifact, _ = copied(exported, tmp_path, precision="fp16", input=pixels)
    path = shutil.copyfile(artifact.directory / "model.onnx", tmp_path / "half.onnx")
    assert tuple(fit(path).values()) == CASES["a stage reads three of four"][2]
    model = onnx.load(str(path))
    types = {tensor.name: tensor.data_type for tensor in model.graph.initializer}
    for node in model.graph.node:
        if node.op_type == "SkipLayerNormalization":
            assert {types[name] for name in node.input[2:]} == {onnx.TensorProto.FLOAT16}
    outputs = [name for node in model.graph.node for name in node.output if name]
    assert len(outputs) == len(set(outputs))
    images = tiny.images(3)
    if pixels == "uint8":
        images = np.random.default_rng(0).integers(0, 256, images.shape, dtype=np.uint8)
    before, after = run(artifact.directory / "model.onnx", images), run(path, images)
    assert np.abs(after["logits"] - before["logits"]).max() < 0.02 * before["logits"].std()
    for name in before.keys() - {"logits"}:
        np.testing.assert_array_equal(np.sort(after[name]), np.sort(before[name]))


def attribute(model, node, name, value):
    """Gives a node an attribute, in the place of its own."""
    for found in [found for found in node.attribute if found.name == name]:
        node.attribute.remove(found)
    node.attribute.append(onnx.helper.make_attribute(name, value))


def smaller_kernels(model, node, name, value):
    """Kernels that leave out pixels between the patches."""
    [weight] = [tensor for tensor in model.graph.initializer if tensor.name == node.input[1]]
    values = onnx.numpy_helper.to_array(weight)[:, :, :value, :value]
    weight.CopyFrom(onnx.numpy_helper.from_array(values.copy(), weight.name))


@pytest.mark.parametrize(
    "change, name, value",
    [
        (attribute, "pads", [2, 2, 2, 2]),
        (attribute, "strides", [15, 15]),
        (attribute, "auto_pad", "SAME_UPPER"),
        (smaller_kernels, "", 14),
    ],
)
def test_a_convolution_that_does_not_read_every_pixel_once_stays(change, name, value, exported, tmp_path):
    _, path = copied(exported, tmp_path, method="dense")
    model = onnx.load(str(path))
    change(model, next(node for node in model.graph.node if node.op_type == "Conv"), name, value)
    del model.graph.value_info[:]
    onnx.save_model(model, str(path))
    assert fit(path)["patches_multiplied"] == 0
    assert "Conv" in kinds(path)


@pytest.mark.parametrize("axis, kind, summed", [(-1, "FLOAT", 1), (2, "FLOAT", 1), (1, "FLOAT", 0), (-1, "FLOAT16", 0)])
def test_only_lengths_whose_squares_fit_are_summed(axis, kind, summed, tmp_path):
    element = getattr(onnx.TensorProto, kind)
    axes = onnx.numpy_helper.from_array(np.array([axis]), "axes")
    graph = onnx.helper.make_graph(
        [onnx.helper.make_node("ReduceL2", ["x", "axes"], ["y"], keepdims=0)],
        "lengths",
        [onnx.helper.make_tensor_value_info("x", element, [2, 3, 4])],
        [onnx.helper.make_tensor_value_info("y", element, None)],
        [axes],
    )
    opset = [onnx.helper.make_opsetid("", 18)]
    onnx.save_model(onnx.helper.make_model(graph, opset_imports=opset, ir_version=10), str(tmp_path / "model.onnx"))
    assert fit(tmp_path / "model.onnx")["lengths_summed"] == summed
    assert kinds(tmp_path / "model.onnx") == (["Mul", "ReduceSum", "Sqrt"] if summed else ["ReduceL2"])


def test_norms_are_left_alone_where_the_library_sums_in_half_precision(exported, tmp_path, monkeypatch):
    _, path = copied(exported, tmp_path, method="dense")
    monkeypatch.setattr(environment, "installed", lambda package: "1.30.2")
    assert fit(path)["norms_joined"] == 0
    assert kinds(path).count("LayerNormalization") == 9


def test_a_residual_that_every_image_shares_is_added_as_it_is(tmp_path):
    torch.manual_seed(0)
    sizes = {"img_size": 96, "depth": 2, "embed_dim": 48, "num_heads": 3, "num_classes": 10}
    model = timm.create_model("vit_tiny_patch16_224", class_token=False, global_pool="avg", **sizes).eval()
    artifact = ztp.export(ztp.prune(model, ztp.make_plan(model, "dense")), "onnx", tmp_path / "a")
    path = shutil.copyfile(artifact.directory / "model.onnx", tmp_path / "model.onnx")
    assert (
        fit(path)["norms_joined"] == 2 * 2 - 1
    )  # the first norm's sum is of patches and of places, one for all images
    assert_same(artifact.directory / "model.onnx", path)


@pytest.fixture
def recording(artifact, tmp_path):
    """An engine's runner as with CUDA graphs; the processor's provider runs anew what a GPU would replay."""
    engine = ztp.build(artifact, "onnxruntime", device="cpu", batch=(1, 4, 8), directory=tmp_path / "e")
    settings = backend.Settings(cuda_graph=True)
    runner = backend.OnnxRuntimeRunner(
        engine.directory / backend.GRAPH_FILE, engine.manifest, provider=backend.CPU, settings=settings
    )
    yield engine, runner
    runner.close()


def test_every_batch_size_has_buffers_of_its_own_and_answers_are_the_callers(recording):
    engine, runner = recording
    images = {seed: torch.from_numpy(tiny.images(3, seed=seed)) for seed in (1, 2)}
    first = runner.run_tensors(images[1])
    kept = {name: value.clone() for name, value in first.items()}
    other = runner.run_tensors(images[2][:2])
    again = runner.run_tensors(images[2])
    assert sorted(runner._recordings) == [2, 3]
    # One buffer, of the largest batch, holds the images of all; the callers' are not written to.
    held = {recording.images.data_ptr() for recording in runner._recordings.values()}
    assert held == {runner._buffers[0].data_ptr()}
    assert len(runner._buffers[0]) == 8
    assert not held & {value.data_ptr() for value in images.values()}
    with ztp.load_engine(engine.directory) as session:
        for found, asked in ((first, images[1]), (other, images[2][:2]), (again, images[2])):
            torch.testing.assert_close(found["logits"], session.run(asked))
    for name, value in first.items():
        assert torch.equal(value, kept[name])
        assert value.data_ptr() != again[name].data_ptr()
    np.testing.assert_array_equal(runner.run(images[2].numpy())["logits"], again["logits"].numpy())
    assert set(engine.manifest.audit) <= set(runner.audit(images[1].numpy()))


def test_another_stream_waits_until_the_answers_before_are_copied(recording, monkeypatch):
    """The run writes where they are copied from; the library itself waits for the stream of the call alone."""
    _, runner = recording
    log = []

    class OnGpu(torch.Tensor):
        is_cuda = True

    def stream(name):
        return SimpleNamespace(
            name=name,
            wait_stream=lambda other: log.append(f"{name} waits for {other.name}"),
            synchronize=lambda: log.append(f"{name} is done"),
        )

    images = torch.from_numpy(tiny.images(2)).as_subclass(OnGpu)
    one, two = stream("one"), stream("two")
    for current in (one, one, two):
        monkeypatch.setattr(torch.cuda, "current_stream", lambda device, current=current: current)
        runner._replayed(images)
    assert log == ["one is done", "one is done", "two waits for one", "two is done"]


def test_recordings_are_freed(recording):
    _, runner = recording
    runner.run(tiny.images(2))
    runner.close()
    assert runner._recordings == {}


def test_a_cuda_graph_needs_a_gpu(artifact, tmp_path):
    with pytest.raises(BadRequest, match="cuda_graph=true was asked for on the CPU"):
        ztp.build(artifact, "onnxruntime", device="cpu", settings={"cuda_graph": True}, directory=tmp_path / "e")
    assert list(tmp_path.iterdir()) == []


def test_a_cuda_graph_is_the_cuda_providers_own():
    with pytest.raises(BadRequest, match=r"on provider=tensorrt_rtx.*provider=auto"):
        backend.check_target("cuda", "fp16", {"cuda_graph": True, "provider": "tensorrt_rtx"})
