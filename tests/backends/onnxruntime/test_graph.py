"""ONNX Runtime's fused attention: the same results, only where no stage reads it, and nothing else touched."""

from __future__ import annotations

import shutil

import numpy as np
import onnx
import onnxruntime
import pytest

import ztp_deploy as ztp
from tests import tiny
from ztp_deploy.backends.onnxruntime.graph import DOMAIN, FUSED, fuse_attention
from ztp_deploy.errors import BadRequest
from ztp_deploy.exporters.onnx import convert
from ztp_deploy.manifest import hash_files


def run(path, images=None):
    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    names = [output.name for output in session.get_outputs()]
    return dict(zip(names, session.run(names, {"images": tiny.images(3) if images is None else images}), strict=True))


def assert_same(path, other):
    before, after = run(path), run(other)
    assert before.keys() == after.keys()
    for name, values in before.items():
        np.testing.assert_allclose(after[name], values, rtol=1e-4, atol=1e-5, err_msg=name)


def kinds(path):
    return [node.op_type for node in onnx.load(str(path), load_external_data=False).graph.node]


def unused(path, audited):
    """Nodes and weights that lead neither to an output nor to an audited score; ONNX Runtime warns of each weight."""
    graph = onnx.load(str(path), load_external_data=False).graph
    read = {name for node in graph.node for name in node.input} | {value.name for value in graph.output} | {*audited}
    dead = [node.name for node in graph.node if not read & set(node.output)]
    return dead + [weight.name for weight in graph.initializer if weight.name not in read]


CASES = {
    "a stage reads three of four": ("deit_t", "zero_tprune", (1, 1)),
    "nothing is read": ("deit_t", "dense", (4, 4)),
    "projections without a bias": ("lvvit_t", "dense", (4, 4)),
    "sizes weigh the attention": ("deit_t", "tome", (1, 4)),
    "rotated queries and keys": ("eva02_t_336", "dense", (0, 4)),
}


@pytest.mark.parametrize("name, method, fused", CASES.values(), ids=CASES)
def test_what_no_stage_reads_is_fused(name, method, fused, exported, tmp_path):
    model = tiny.model(name, tiny.SIZE.model_copy(update={"patch_size": 16}) if name.startswith("eva") else tiny.SIZE)
    plan = ztp.make_plan(model, method=method, **({} if method == "dense" else {"ratio": 0.7}))
    artifact = exported(ztp.prune(model, plan))
    path = shutil.copyfile(artifact.directory / "model.onnx", tmp_path / "model.onnx")
    assert fuse_attention(path) == fused
    assert kinds(path).count(FUSED) == fused[0]
    assert kinds(path).count("Softmax") == 4 - fused[0]
    assert_same(artifact.directory / "model.onnx", path)
    assert not unused(path, artifact.manifest.audit)


@pytest.mark.parametrize(
    "method, options, last", [("avit", {}, "halting_"), ("ats", {"form": "masked"}, "significance_")]
)
def test_scores_that_only_an_audit_reads_stay(method, options, last, model, exported, tmp_path):
    options = {**tiny.OPTIONS.get(method, {}), **options}
    pruned = ztp.prune(model, ztp.make_plan(model, method=method, ratio=0.7, options=options))
    artifact = exported(pruned)
    graph = onnx.load(str(artifact.directory / "model.onnx"), load_external_data=False).graph
    read = {name for node in graph.node for name in node.input}
    assert any(name.startswith(last) and name not in read for name in artifact.manifest.audit)
    engine = ztp.build(artifact, "onnxruntime", device="cpu", directory=tmp_path / "e")
    assert engine.manifest.built["attention_fused"] > 0
    with ztp.load_engine(engine.directory) as session:
        assert set(artifact.manifest.audit) <= set(session.audit(tiny.images(2)))


def test_an_engine_says_how_many_and_keeps_its_scores(artifact, tmp_path):
    engine = ztp.build(artifact, "onnxruntime", device="cpu", directory=tmp_path / "fused")
    assert engine.manifest.built == {"attention_fused": 1, "attention_expected": 1}
    with ztp.load_engine(tmp_path / "fused") as session:
        found = session.audit(tiny.images(2))
    assert set(artifact.manifest.audit) <= set(found)


def test_left_as_it_is_it_is_the_exported_graph(artifact, tmp_path):
    engine = ztp.build(
        artifact, "onnxruntime", device="cpu", settings={"operators": "exported"}, directory=tmp_path / "exported"
    )
    assert engine.manifest.built == {}
    assert hash_files(engine.directory)["model.onnx"] == artifact.manifest.files["model.onnx"]
    with pytest.raises(BadRequest, match="operators"):
        ztp.build(artifact, "onnxruntime", device="cpu", settings={"operators": "maybe"}, directory=tmp_path / "e")


def test_weights_beside_the_graph_stay_there(artifact, tmp_path):
    path = tmp_path / "model.onnx"
    onnx.save_model(
        onnx.load(str(artifact.directory / "model.onnx")),
        str(path),
        save_as_external_data=True,
        location="model.onnx.data",
    )
    size = (tmp_path / "model.onnx.data").stat().st_size
    assert fuse_attention(path) == (1, 1)
    assert (tmp_path / "model.onnx.data").stat().st_size == size
    assert path.stat().st_size < size
    assert_same(artifact.directory / "model.onnx", path)


def test_half_precision_is_fused_in_half_precision(artifact, tmp_path):
    """No processor runs it: what a GPU would be given is a valid graph with its bias in fp16."""
    (tmp_path / "h").mkdir()
    convert(artifact.directory, artifact.manifest.plan, tmp_path / "h", "fp16")
    path = tmp_path / "h" / "model.onnx"
    assert fuse_attention(path) == (1, 1)
    graph = onnx.load(str(path)).graph
    [node] = [node for node in graph.node if node.op_type == FUSED]
    assert node.domain == DOMAIN
    [bias] = [tensor for tensor in graph.initializer if tensor.name == node.input[3]]
    assert (bias.data_type, list(bias.dims)) == (onnx.TensorProto.FLOAT16, [3 * tiny.SIZE.embed_dim])
    assert len({name for node in graph.node for name in node.output}) == sum(len(node.output) for node in graph.node)


def test_what_every_place_adds_for_itself_is_no_bias(artifact, tmp_path):
    """The operator takes one bias for all places; sums of another form go in as they are."""
    model = onnx.load(str(artifact.directory / "model.onnx"))
    made = {name: node for node in model.graph.node for name in node.output}
    softmax = [n for n in model.graph.node if n.op_type == "Softmax"][-1]
    heads = made[made[made[softmax.input[0]].input[0]].input[0]]
    shaped = made[heads.input[0]]
    addition = made[shaped.input[0]]
    [shape] = [tensor for tensor in model.graph.initializer if tensor.name == shaped.input[1]]
    tokens = onnx.numpy_helper.to_array(shape)[1]
    [bias] = [tensor for tensor in model.graph.initializer if tensor.name in addition.input]
    places = np.random.default_rng(2).standard_normal((tokens, tiny.SIZE.embed_dim)).astype(np.float32)
    bias.CopyFrom(onnx.numpy_helper.from_array(places, bias.name))
    changed = tmp_path / "changed.onnx"
    onnx.save_model(model, str(changed))
    path = shutil.copyfile(changed, tmp_path / "model.onnx")
    assert fuse_attention(path) == (1, 1)
    [node] = [node for node in onnx.load(str(path)).graph.node if node.op_type == FUSED]
    assert len(node.input) == 3
    assert_same(changed, path)


def turn_keys_wrongly(graph):
    [node] = [n for n in graph.node if n.op_type == "Transpose" and list(n.attribute[0].ints) == [0, 1, 3, 2]][-1:]
    node.attribute[0].ints[:] = [0, 1, 2, 3]


def norm_over_queries(graph):
    node = [n for n in graph.node if n.op_type == "Softmax"][-1]
    node.attribute[0].i = 2


def scale_by_what_is_computed(graph):
    """The last block's queries, multiplied by their own values."""
    softmax = [n for n in graph.node if n.op_type == "Softmax"][-1]
    made = {name: node for node in graph.node for name in node.output}
    scaled = made[made[softmax.input[0]].input[0]]
    assert scaled.op_type == "Mul"
    scaled.input[1] = scaled.input[0]


@pytest.mark.parametrize("change", [turn_keys_wrongly, norm_over_queries, scale_by_what_is_computed])
def test_another_attention_stays_open(change, artifact, tmp_path):
    model = onnx.load(str(artifact.directory / "model.onnx"))
    softmaxes = [n for n in model.graph.node if n.op_type == "Softmax"]
    assert len(softmaxes) == 4
    change(model.graph)
    onnx.save_model(model, str(tmp_path / "model.onnx"))
    assert fuse_attention(tmp_path / "model.onnx") == (0, 1)
    assert FUSED not in kinds(tmp_path / "model.onnx")
