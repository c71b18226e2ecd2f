"""What the ONNX graph says before TensorRT sees it: static form, matrix products and attention by name."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import onnx
from onnx import TensorProto

from ztp_deploy.exporters.precision import matrix_nodes
from ztp_deploy.exporters.vocabulary import ELEMENTWISE
from ztp_deploy.manifest import BatchRange

LOW = {"fp16": TensorProto.FLOAT16, "bf16": TensorProto.BFLOAT16}
QUANTISED = {"int8": TensorProto.INT8, "fp8": TensorProto.FLOAT8E4M3FN}
_PASSING = ELEMENTWISE | {"Reshape", "Transpose", "Expand"}


@dataclass(frozen=True)
class AttentionNodes:
    """One attention by the names of its nodes.

    `shared` says that something besides the product with the values reads the probabilities, as the scores of
    a pruning stage do.
    """

    logits: str
    softmax: str
    output: str
    shared: bool

    @property
    def names(self) -> frozenset[str]:
        """The nodes that one fused kernel would carry together."""
        return frozenset({self.logits, self.softmax, self.output})


def with_batch(model: onnx.ModelProto, batch: BatchRange) -> onnx.ModelProto:
    """The graph for that range: where smallest and largest are equal, that number takes the symbol's place."""
    if batch.min != batch.max:
        return model
    static = onnx.ModelProto()
    static.CopyFrom(model)
    symbols = {dim.dim_param for value in static.graph.input for dim in value.type.tensor_type.shape.dim} - {""}
    for value in (*static.graph.input, *static.graph.output):
        for dim in value.type.tensor_type.shape.dim:
            if dim.dim_param in symbols:
                dim.dim_value = batch.max
    # Inner shapes are derived anew; as written they speak of the symbol.
    del static.graph.value_info[:]
    return static


def low_products(model: onnx.ModelProto, precision: str) -> frozenset[str]:
    """Names of the matrix products (MatMul, Gemm, Conv) that the graph computes in `precision`; none for fp32."""
    wanted = (LOW | QUANTISED).get(precision)
    return frozenset(name for name, kind in matrix_nodes(model) if kind == wanted)


def attentions(model: onnx.ModelProto) -> list[AttentionNodes]:
    """Every softmax between two matrix products, in graph order."""
    producer = {name: node for node in model.graph.node for name in node.output}
    readers: dict[str, list[onnx.NodeProto]] = {}
    for node in model.graph.node:
        for name in node.input:
            readers.setdefault(name, []).append(node)
    outputs = {value.name for value in model.graph.output}
    found = []
    for node in model.graph.node:
        if node.op_type != "Softmax":
            continue
        before = _product_before(node, producer)
        after = list(_readers_after(node.output[0], readers))
        products = [reader for reader in after if reader.op_type == "MatMul"]
        if before is None or not products:
            continue
        # What a checkpoint's value projection reads is the last product that mixes tokens; score votes come on top.
        shared = len(after) > 1 or node.output[0] in outputs
        found.append(AttentionNodes(before.name, node.name, products[0].name, shared))
    return found


def _product_before(softmax: onnx.NodeProto, producer: dict[str, onnx.NodeProto]) -> onnx.NodeProto | None:
    waiting, seen = list(softmax.input), set()
    while waiting:
        name = waiting.pop(0)
        node = producer.get(name)
        if node is None or name in seen:
            continue
        seen.add(name)
        if node.op_type == "MatMul":
            return node
        if node.op_type in _PASSING:
            waiting.extend(node.input)
    return None


def _readers_after(name: str, readers: dict[str, list[onnx.NodeProto]]) -> Iterator[onnx.NodeProto]:
    """Who uses the tensor, casts looked through."""
    for reader in readers.get(name, ()):
        if reader.op_type == "Cast":
            yield from _readers_after(reader.output[0], readers)
        else:
            yield reader
