"""Constants of an ONNX graph computed ahead: weights that are split or turned on the way become weights."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import helper, numpy_helper
from onnx.reference import ReferenceEvaluator


def constants(graph: onnx.GraphProto) -> dict[str, onnx.TensorProto]:
    """The graph's constant tensors by name, initializers and Constant nodes alike."""
    found = {tensor.name: tensor for tensor in graph.initializer}
    for node in graph.node:
        if node.op_type == "Constant" and node.attribute and node.attribute[0].HasField("t"):
            found[node.output[0]] = node.attribute[0].t
    return found


def fold_constants(model: onnx.ModelProto) -> onnx.ModelProto:
    """The same function in a new graph, where whatever constants alone decide is a constant."""
    known = {"", *constants(model.graph)}
    folding: list[onnx.NodeProto] = []
    for node in model.graph.node:
        if node.input and known.issuperset(node.input):
            folding.append(node)
            known.update(node.output)
    computed = {name for node in folding for name in node.output}
    kept = [node for node in model.graph.node if not computed.intersection(node.output)]
    read = {name for node in kept for name in node.input} | {value.name for value in model.graph.output}
    wanted = sorted(computed & read)
    values = _values(model, folding, wanted)
    folded = onnx.ModelProto()
    folded.CopyFrom(model)
    del folded.graph.node[:]
    folded.graph.node.extend(kept)
    folded.graph.initializer.extend(numpy_helper.from_array(values[name], name) for name in wanted)
    drop_unread(folded.graph, ["Constant"])
    return folded


def drop_unread(graph: onnx.GraphProto, kinds: Iterable[str]) -> None:
    """Takes initializers, and nodes of those kinds, away that nothing reads.

    Other nodes stay: what they compute may be a score to audit.
    """
    read = {value.name for value in graph.output}
    kept = []
    for node in reversed(graph.node):
        if node.op_type not in kinds or read.intersection(node.output):
            kept.append(node)
            read.update(node.input)
    initializers = [tensor for tensor in graph.initializer if tensor.name in read]
    del graph.node[:]
    graph.node.extend(reversed(kept))
    del graph.initializer[:]
    graph.initializer.extend(initializers)


def _values(model: onnx.ModelProto, folding: list[onnx.NodeProto], wanted: list[str]) -> dict[str, NDArray[Any]]:
    """The wanted tensors, which those nodes compute from constants."""
    read = {name for node in folding for name in node.input}
    given = [node for node in model.graph.node if node.op_type == "Constant" and read.intersection(node.output)]
    graph = helper.make_graph(
        [*given, *folding],
        "constants",
        inputs=[],
        outputs=[helper.make_tensor_value_info(name, onnx.TensorProto.UNDEFINED, None) for name in wanted],
        initializer=[tensor for tensor in model.graph.initializer if tensor.name in read],
    )
    alone = helper.make_model(graph, opset_imports=model.opset_import, ir_version=model.ir_version)
    return dict(zip(wanted, map(np.asarray, ReferenceEvaluator(alone).run(wanted, {})), strict=True))
