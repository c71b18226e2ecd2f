"""Attention in the exported graph: three projections, one turn of the keys, nothing turned and turned back."""

from __future__ import annotations

import numpy as np
import onnx
import onnx_ir
import pytest
import torch
from onnx import parser
from onnx.reference import ReferenceEvaluator
from torch import nn
from torch.nn import functional

import ztp_deploy as ztp
from tests import tiny
from ztp_deploy.errors import GateFailed
from ztp_deploy.exporters import attention

JOINT = """
<ir_version: 10, opset_import: ["" : 18]>
g (float[batch,3,4] tokens) => (float[batch,2,3,2] queries, float[batch,2,3,2] values)
<int64[5] shape = {-1, 3, 3, 2, 2},
 int64[1] zero = {0}, int64[1] one = {1}, int64[1] two = {2}, int64[1] three = {3}, int64 last = {2}>
{
  product = MatMul (tokens, weight)
  linear = Add (BIASED)
  heads = Reshape <allowzero = 1> (linear, shape)
  parts = Transpose <perm = [PERM]> (heads)
  first = Slice (parts, zero, END, zero)
  one_part = Squeeze (first, zero)
  queries = Neg (one_part)
  third_part = Gather <axis = 0> (parts, last)
  values = Neg (third_part)
}
"""


def joint(biased: str = "product, bias", perm: str = "2, 0, 3, 1, 4", end: str = "one") -> onnx.ModelProto:
    model = parser.parse_model(JOINT.replace("BIASED", biased).replace("PERM", perm).replace("END", end))
    draw = np.random.default_rng(3)
    for name, shape in {"weight": (4, 12), "bias": (12,), "places": (3, 12)}.items():
        values = draw.standard_normal(shape).astype(np.float32)
        model.graph.initializer.append(onnx.numpy_helper.from_array(values, name))
    return model


def given_out() -> onnx.ModelProto:
    model = joint()
    model.graph.output[1].name = "third_part"
    del model.graph.node[-1]
    return model


def simplified(model: onnx.ModelProto) -> onnx.ModelProto:
    carried = onnx_ir.from_proto(model)
    attention.simplify(carried)
    done = onnx_ir.to_proto(carried)
    onnx.checker.check_model(done)
    return done


def kinds(model: onnx.ModelProto) -> list[str]:
    return [node.op_type for node in model.graph.node]


@pytest.mark.parametrize("biased", ["product, bias", "bias, product"])
def test_a_joint_projection_is_split_and_what_nothing_reads_goes(biased):
    model = joint(biased)
    tokens = np.random.default_rng(4).standard_normal((2, 3, 4)).astype(np.float32)
    done = simplified(model)
    assert sorted(kinds(done)) == sorted(
        ["MatMul", "Add", "Reshape", "Transpose", "Neg"] * 2
    )  # no keys: nothing reads them
    assert [value.name for value in done.graph.output] == ["queries", "values"]
    for before, after in zip(
        *(ReferenceEvaluator(m).run(None, {"tokens": tokens}) for m in (model, done)), strict=True
    ):
        np.testing.assert_allclose(after, before, rtol=1e-6)


@pytest.mark.parametrize(
    "other",
    [
        joint(perm="2, 0, 3, 4, 1"),
        joint(end="two"),
        joint(biased="product, tokens"),
        joint(biased="product, places"),
        given_out(),
    ],
    ids=["another order", "two parts at once", "no bias but tokens", "a bias for every place", "a part is a result"],
)
def test_what_is_no_joint_projection_stays(other):
    assert kinds(simplified(other)) == kinds(other)


def test_turns_that_undo_each_other_are_left_out():
    model = parser.parse_model("""
    <ir_version: 10, opset_import: ["" : 18]>
    g (float[batch,6,4] tokens) => (float[batch,6,4] back, float[batch,2,6,2] turned, float[batch,6,2,2] again)
    <int64[4] heads = {-1, 6, 2, 2}, int64[3] joined = {-1, 6, 4}>
    {
      twice = Add (tokens, tokens)
      split = Reshape (twice, heads)
      turned = Transpose <perm = [0, 2, 1, 3]> (split)
      undone = Transpose <perm = [0, 2, 1, 3]> (turned)
      back = Reshape (undone, joined)
      again = Transpose <perm = [0, 2, 3, 1]> (turned)
    }
    """)
    tokens = np.random.default_rng(5).standard_normal((1, 6, 4)).astype(np.float32)
    done = simplified(model)
    assert kinds(done) == ["Add", "Reshape", "Transpose", "Reshape", "Transpose"]
    [back] = [node for node in done.graph.node if node.output[0] == "back"]
    assert back.input[0] == "twice"
    for before, after in zip(
        *(ReferenceEvaluator(m).run(None, {"tokens": tokens}) for m in (model, done)), strict=True
    ):
        np.testing.assert_array_equal(after, before)


def test_keys_are_turned_where_they_are_multiplied():
    model = parser.parse_model("""
    <ir_version: 10, opset_import: ["" : 18]>
    g (float[batch,2,6,4] queries, float[batch,6,2,4] keys) => (float[batch,2,6,6] logits)
    {
      turned = Transpose <perm = [0, 2, 3, 1]> (keys)
      logits = MatMul (queries, turned)
    }
    """)
    draw = np.random.default_rng(6)
    fed = {"queries": draw.standard_normal((1, 2, 6, 4)), "keys": draw.standard_normal((1, 6, 2, 4))}
    fed = {name: values.astype(np.float32) for name, values in fed.items()}
    done = simplified(model)
    assert [list(node.attribute[0].ints) for node in done.graph.node[:2]] == [[0, 2, 1, 3], [0, 1, 3, 2]]
    one, other = (ReferenceEvaluator(m).run(None, fed)[0] for m in (model, done))
    np.testing.assert_array_equal(one, other)


@pytest.mark.parametrize("approximate", ["none", "tanh"])
def test_gelu_is_gelu(approximate):
    inputs = torch.linspace(-6, 6, 97).reshape(1, -1)
    program = torch.onnx.export(
        nn.GELU(approximate).eval(),
        (inputs,),
        dynamo=True,
        verbose=False,
        custom_translation_table=attention.translations(),
    )
    found = ReferenceEvaluator(program.model_proto).run(None, {program.model.graph.inputs[0].name: inputs.numpy()})[0]
    np.testing.assert_allclose(found, functional.gelu(inputs, approximate=approximate), atol=1e-6)


@pytest.fixture(scope="module", params=["zero_tprune", "dense"])
def graph(request, model, tmp_path_factory):
    """The exported graph of the tiny ViT."""
    keep = {"ratio": 0.7} if request.param != "dense" else {}
    plan = ztp.make_plan(model, method=request.param, **keep)
    directory = tmp_path_factory.mktemp("attention") / request.param
    return onnx.load(str(ztp.export(ztp.prune(model, plan), "onnx", directory).directory / "model.onnx")).graph


def test_every_block_projects_thrice_turns_four_times_and_scales_once(graph):
    blocks = tiny.SIZE.depth
    products = [node for node in graph.node if node.op_type in ("MatMul", "Gemm")]
    weights = {tensor.name: tuple(tensor.dims) for tensor in graph.initializer}
    square = [node for node in products if weights.get(node.input[1]) == (tiny.SIZE.embed_dim,) * 2]
    assert len(square) == 4 * blocks  # queries, keys, values and what joins the heads
    assert sum(node.op_type == "Softmax" for node in graph.node) == blocks
    turned = [node for node in graph.node if node.op_type == "Transpose" and len(node.attribute[0].ints) == 4]
    assert len(turned) == 5 * blocks  # queries, keys, values, keys as the right operand, the heads joined
    assert not [node for node in graph.node if node.op_type == "Split"]


def test_what_a_vit_does_not_do_is_refused():
    class Causal(nn.Module):
        def forward(self, x):
            return functional.scaled_dot_product_attention(x, x, x, is_causal=True)

    with pytest.raises(Exception, match=r"(?i)failed") as raised:
        torch.onnx.export(
            Causal().eval(),
            (torch.zeros(1, 2, 4, 8),),
            dynamo=True,
            verbose=False,
            custom_translation_table=attention.translations(),
        )
    causes = []
    error: BaseException | None = raised.value
    while error is not None:
        causes.append(error)
        error = error.__cause__
    assert any(isinstance(cause, GateFailed) and "is causal" in str(cause) for cause in causes)
