"""Constants computed ahead: the same function, with weights where a weight is split or turned on the way."""

from __future__ import annotations

import numpy as np
import onnx
from onnx import numpy_helper, parser
from onnx.reference import ReferenceEvaluator

from ztp_deploy.exporters.fold import constants, drop_unread, fold_constants

TURNED = """
<ir_version: 10, opset_import: ["" : 18]>
g (float[batch,2] images) => (float[batch,1] logits)
<float[2,2] weight = {1, 2, 3, 4}>
{
  one, two = Split <axis = 0, num_outputs = 2> (weight)
  turned = Transpose <perm = [1, 0]> (two)
  factor = Constant <value = float {2}> ()
  doubled = Mul (turned, factor)
  score = ReduceSum <keepdims = 1> (images)
  logits = MatMul (images, doubled)
}
"""


def test_what_constants_decide_is_a_constant():
    model = parser.parse_model(TURNED)
    folded = fold_constants(model)
    assert [node.op_type for node in folded.graph.node] == ["ReduceSum", "MatMul"]  # a score that nothing reads stays
    assert list(constants(folded.graph)) == ["doubled"]
    assert numpy_helper.to_array(constants(folded.graph)["doubled"]).tolist() == [[6], [8]]
    images = np.array([[1, 10]], np.float32)
    assert ReferenceEvaluator(folded).run(None, {"images": images})[0].tolist() == [[86]]
    assert len(model.graph.node) == 6  # the caller's graph is as it was


def test_nothing_to_fold_is_no_change():
    text = TURNED[: TURNED.index("  one,")] + "  logits = MatMul (images, weight)\n}"
    model = parser.parse_model(text.replace("float[batch,1]", "float[batch,2]"))
    assert fold_constants(model) == model


def test_only_the_kinds_named_are_dropped():
    model = parser.parse_model(TURNED)
    del model.graph.node[5].input[1]
    model.graph.node[5].input.append("two")
    drop_unread(model.graph, ["Mul", "Transpose"])
    assert [node.op_type for node in model.graph.node] == ["Split", "Constant", "ReduceSum", "MatMul"]
    drop_unread(model.graph, ["Constant"])
    assert [node.op_type for node in model.graph.node] == ["Split", "ReduceSum", "MatMul"]


def test_every_weight_of_an_exported_graph_is_in_one_piece(artifact):
    """Queries, keys and values are projected apart by parts of one weight, which the graph holds as three."""
    model = onnx.load(str(artifact.directory / "model.onnx"))
    known = constants(model.graph)
    assert sum(node.op_type == "MatMul" and node.input[1] in known for node in model.graph.node) == 4 * 6
    assert fold_constants(model) == model
