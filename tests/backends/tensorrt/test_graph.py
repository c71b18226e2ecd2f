"""What is read off the ONNX graph before TensorRT sees it."""

from __future__ import annotations

import onnx
import pytest
from onnx import TensorProto, parser

from ztp_deploy import backends
from ztp_deploy.backends.tensorrt import graph
from ztp_deploy.manifest import BatchRange

ATTENTION = """
<ir_version: 10, opset_import: ["" : 18]>
attention (float[batch, 2, 5, 4] q, float[batch, 2, 4, 5] k, float[batch, 2, 5, 4] v) => (float[batch, 2, 5, 4] logits)
{
    [product] scores = MatMul (q, k)
    half = Constant <value = float {0.5}> ()
    [scale] scaled = Mul (scores, half)
    [softmax] probabilities = Softmax <axis = -1> (scaled)
    [cast] again = Cast <to = 1> (probabilities)
    [values] logits = MatMul (again, v)
    EXTRA
}
"""


def attention(extra: str = "") -> onnx.ModelProto:
    return parser.parse_model(ATTENTION.replace("EXTRA", extra))


def test_an_attention_is_a_softmax_between_two_products():
    [found] = graph.attentions(attention())
    assert (found.logits, found.softmax, found.output, found.shared) == ("product", "softmax", "values", False)
    assert found.names == {"product", "softmax", "values"}


def test_a_second_reader_of_the_probabilities_is_seen():
    [found] = graph.attentions(attention("[vote] votes = ReduceSum (probabilities)"))
    assert found.shared
    model = attention()
    model.graph.output.append(onnx.helper.make_tensor_value_info("probabilities", TensorProto.FLOAT, None))
    assert graph.attentions(model)[0].shared


def test_a_softmax_alone_is_no_attention():
    model = parser.parse_model(
        '<ir_version: 10, opset_import: ["" : 18]> g (float[2, 3] x) => (float[2, 3] y) { y = Softmax (x) }'
    )
    assert graph.attentions(model) == []


def test_every_block_of_a_vit_has_one(artifact):
    found = graph.attentions(onnx.load(str(artifact.directory / "model.onnx")))
    # Stages sit at blocks 1, 2 and 3 of 4: their votes read the probabilities too.
    assert [attention.shared for attention in found] == [True, True, True, False]


def test_one_batch_size_makes_the_graph_static(artifact):
    model = onnx.load(str(artifact.directory / "model.onnx"))
    static = graph.with_batch(model, BatchRange(min=3, opt=3, max=3))
    for value in (*static.graph.input, *static.graph.output):
        assert value.type.tensor_type.shape.dim[0].dim_value == 3
    assert not any(dim.dim_param for value in static.graph.input for dim in value.type.tensor_type.shape.dim)
    inferred = onnx.shape_inference.infer_shapes(static, strict_mode=True, data_prop=True)
    assert [dim.dim_value for dim in inferred.graph.output[0].type.tensor_type.shape.dim] == [3, 10]
    assert graph.with_batch(model, BatchRange(min=1, opt=3, max=3)) is model
    assert model.graph.input[0].type.tensor_type.shape.dim[0].dim_param


@pytest.mark.parametrize("precision, share", [("fp32", 0), ("fp16", 33), ("bf16", 33)])
def test_products_in_low_precision_are_listed_by_name(artifact, precision, share):
    from ztp_deploy.exporters.precision import lower

    model = lower(onnx.load(str(artifact.directory / "model.onnx")), precision)
    names = graph.low_products(model, precision)
    assert len(names) == share
    assert graph.low_products(model, {"fp16": "bf16", "bf16": "fp16", "fp32": "fp16"}[precision]) == frozenset()


def test_the_back_end_lists_the_precisions_of_graphs():
    listed = backends.get("tensorrt_rtx")
    assert ("fp32", *graph.LOW, *graph.QUANTISED) == listed.PRECISIONS
    assert tuple(graph.QUANTISED) == listed.CALIBRATED
