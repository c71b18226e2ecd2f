"""Precision written into an ONNX graph: the way of the tokens in fp16 or bf16, scores and logits in fp32.

A float tensor is on the way of the tokens where logits depend on it through float tensors alone. What bears on
them only through indices, as the scores of a selection do, stays float32, whatever the method. So do
the image before its first matrix product and the classifier's own product: they cost nothing and decide digits.
So do exponentials until a quotient norms them, as in a performer: their terms and sums outgrow half precision.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper

from ztp_deploy.exporters.fold import constants, drop_unread
from ztp_deploy.exporters.vocabulary import MATRIX

PRECISIONS = ("fp32", "fp16", "bf16")
_TYPES = {"fp16": TensorProto.FLOAT16, "bf16": TensorProto.BFLOAT16}
_LARGEST: dict[int, float] = {TensorProto.FLOAT16: 65504.0, TensorProto.BFLOAT16: 255 / 128 * 2.0**127}
_BF16_OPSET = 22
"""The first opset whose Conv takes bfloat16."""
_SMALL_BYTES = 1024
"""What an operator's rules may depend on, such as axes and shapes, is smaller."""


def lower(model: onnx.ModelProto, precision: str) -> onnx.ModelProto:
    """The float32 graph in another precision: same inputs, outputs and names, with casts where the types change."""
    if precision == "fp32":
        return model
    if precision == "bf16":
        lowered = _at_opset(model, _BF16_OPSET)
    else:
        lowered = onnx.ModelProto()
        lowered.CopyFrom(model)
    _Lowering(lowered.graph, _TYPES[precision]).run()
    return lowered


def matrix_nodes(model: onnx.ModelProto) -> list[tuple[str, int]]:
    """Every matrix product's node name and the element type it is computed in.

    A product of two dequantised operands is computed in the type that they were quantised to.
    """
    types = _float_types(model.graph)
    stored = _quantised_types(model.graph)
    found = []
    for node in model.graph.node:
        if node.op_type in MATRIX:
            kinds = {stored.get(name, TensorProto.UNDEFINED) for name in node.input[:2]}
            kind = kinds.pop() if len(kinds) == 1 else TensorProto.UNDEFINED
            found.append((node.name, kind or types.get(node.output[0], TensorProto.UNDEFINED)))
    return found


def weight_products(model: onnx.ModelProto) -> list[onnx.NodeProto]:
    """The matrix products of tokens with weights, in graph order: what may be quantised.

    They lie on the way of the tokens and one operand is a constant. So no product of scores is among them, none
    of attention, which are products of tokens with tokens, not the patch embedding, and not the classifier.
    """
    rule = _Lowering(model.graph, TensorProto.FLOAT16)
    pixels = rule._before_matrices()
    return [
        node
        for node in model.graph.node
        if node.op_type in MATRIX
        and node.output[0] in rule.lowered
        and node.input[1] in rule.constants
        and node.input[0] not in pixels
    ]


def _at_opset(model: onnx.ModelProto, opset: int) -> onnx.ModelProto:
    """The model by a later opset's rules. Weights do not pass the converter, whose messages hold 2 GB."""
    bare = onnx.ModelProto()
    bare.CopyFrom(model)
    weights = {tensor.name: tensor for tensor in model.graph.initializer if len(tensor.raw_data) > _SMALL_BYTES}
    for tensor in bare.graph.initializer:
        if tensor.name in weights:
            tensor.ClearField("raw_data")
    converted = onnx.version_converter.convert_version(bare, opset)
    for tensor in converted.graph.initializer:
        if tensor.name in weights:
            tensor.CopyFrom(weights[tensor.name])
    converted.doc_string = model.doc_string
    return converted


class _Lowering:
    """One graph being rewritten in place."""

    def __init__(self, graph: onnx.GraphProto, low: int) -> None:
        self.graph = graph
        self.low = low
        self.types = _float_types(graph)
        self.producer = {name: node for node in graph.node for name in node.output}
        self.constants = constants(graph)
        self.lowered = self._tokens_way() - self._before_matrices() - self._classifier() - self._exponentials()
        for node in graph.node:  # a node's outputs have one type (Split)
            if self.lowered.intersection(node.output):
                self.lowered.update(name for name in node.output if name in self.types)
        self.casts: dict[tuple[str, int], str] = {}

    def run(self) -> None:
        nodes = list(self.graph.node)
        rewritten: list[onnx.NodeProto] = []
        for node in nodes:
            if node.op_type == "Constant":
                rewritten.append(node)
                continue
            floats = [name for name in node.output if name in self.types]
            wanted = self.low if any(name in self.lowered for name in floats) else TensorProto.FLOAT
            for index, name in enumerate(node.input):
                if name not in self.types:
                    continue
                # A cast takes whatever comes; anything that yields no floats (TopK's indices, Shape) does too.
                have = self.low if name in self.lowered and name not in self.constants else TensorProto.FLOAT
                if node.op_type in ("Cast", "Shape") or (not floats and have == self.low):
                    continue
                if name in self.constants and wanted == self.low:
                    node.input[index] = self._constant(name)
                elif name not in self.constants and have != wanted:
                    node.input[index] = self._cast(name, wanted, rewritten)
            if wanted == self.low:
                _retype(node, self.low)
            rewritten.append(node)
        del self.graph.node[:]
        self.graph.node.extend(rewritten)
        del self.graph.value_info[:]
        drop_unread(self.graph, ["Constant"])

    def _tokens_way(self) -> set[str]:
        """Float tensors from which logits are reached through float tensors alone."""
        return self._back(["logits"], lambda node: True)

    def _classifier(self) -> set[str]:
        """Tensors between the last matrix products and the logits, those products' results included."""
        return self._back(["logits"], lambda node: node.op_type not in MATRIX)

    def _back(self, start: Iterable[str], through: Callable[[onnx.NodeProto], bool]) -> set[str]:
        found: set[str] = set()
        waiting = list(start)
        while waiting:
            name = waiting.pop()
            if name in found or name not in self.types:
                continue
            found.add(name)
            node = self.producer.get(name)
            if node is not None and through(node):
                waiting.extend(node.input)
        return found

    def _before_matrices(self) -> set[str]:
        """Tensors computed from the image without any matrix product yet."""
        early = {value.name for value in self.graph.input}
        for node in self.graph.node:
            if node.op_type not in (*MATRIX, "Shape") and any(name in early for name in node.input):
                early.update(node.output)
        return early

    def _exponentials(self) -> set[str]:
        """Tensors from the last matrix products before an exponential to the quotient that norms it, both included.

        One whose exponent is clipped, as in a sigmoid written out, is bounded where it saturates and stays on the way.
        """
        found: set[str] = set()
        unnormed: set[str] = set()
        for node in self.graph.node:
            if node.op_type == "Exp" and not self._clipped(node.input[0]):
                found |= self._back(node.input, lambda node: node.op_type not in MATRIX)
            elif not unnormed.intersection(node.input):
                continue
            found.update(node.output)
            if node.op_type != "Div":
                unnormed.update(node.output)
        return found

    def _clipped(self, name: str) -> bool:
        node = self.producer.get(name)
        return node is not None and node.op_type in ("Clip", "Min", "Max")

    def _cast(self, name: str, wanted: int, nodes: list[onnx.NodeProto]) -> str:
        key = (name, wanted)
        if key not in self.casts:
            cast = f"{name}_as_{TensorProto.DataType.Name(wanted).lower()}"
            nodes.append(helper.make_node("Cast", [name], [cast], name=f"{cast}_cast", to=wanted))
            self.casts[key] = cast
        return self.casts[key]

    def _constant(self, name: str) -> str:
        key = (name, self.low)
        if key not in self.casts:
            cast = f"{name}_as_{TensorProto.DataType.Name(self.low).lower()}"
            tensor = numpy_helper.from_array(_rounded(numpy_helper.to_array(self.constants[name]), self.low), cast)
            self.graph.initializer.append(tensor)
            self.casts[key] = cast
        return self.casts[key]


def _rounded(values: NDArray[Any], low: int) -> NDArray[Any]:
    """Values in the lower type; finite numbers stay finite."""
    kind: Any = helper.tensor_dtype_to_np_dtype(low)
    limit = _LARGEST[low]
    clipped: NDArray[Any] = np.where(np.isfinite(values), np.clip(values, -limit, limit), values)
    return clipped.astype(kind)


def _retype(node: onnx.NodeProto, low: int) -> None:
    """Types that a node carries in its attributes."""
    for attribute in node.attribute:
        if node.op_type == "Cast" and attribute.name == "to" and attribute.i == TensorProto.FLOAT:
            attribute.i = low
        elif node.op_type == "ConstantOfShape" and attribute.name == "value":
            value = numpy_helper.to_array(attribute.t)
            attribute.t.CopyFrom(numpy_helper.from_array(_rounded(value, low)))


_BOOLEAN = frozenset(
    {"Equal", "Greater", "GreaterOrEqual", "Less", "LessOrEqual", "And", "Or", "Not", "IsNaN", "IsInf"}
)
_INTEGER = frozenset({"Shape", "Size", "ArgMax", "ArgMin"})
_FLOATS = (TensorProto.FLOAT, TensorProto.FLOAT16, TensorProto.BFLOAT16)


def _quantised_types(graph: onnx.GraphProto) -> dict[str, int]:
    """The element types that dequantised tensors were quantised to, by the tensors' names."""
    known = constants(graph)
    return {
        node.output[0]: known[node.input[2]].data_type
        for node in graph.node
        if node.op_type == "DequantizeLinear" and len(node.input) > 2
    }


def _float_types(graph: onnx.GraphProto) -> dict[str, int]:
    """Element types of all float tensors, by the few rules that the vocabulary's operators need.

    A quantised tensor counts as one of the type it was quantised from, so that the tokens' way leads through it.
    """
    types = {tensor.name: tensor.data_type for tensor in graph.initializer}
    types |= {value.name: value.type.tensor_type.elem_type for value in graph.input}
    for node in graph.node:
        attributes = {attribute.name: attribute for attribute in node.attribute}
        if node.op_type == "Constant":
            kind = attributes["value"].t.data_type if "value" in attributes else TensorProto.INT64
            kind = TensorProto.FLOAT if {"value_float", "value_floats"} & set(attributes) else kind
        elif node.op_type == "Cast":
            kind = attributes["to"].i
        elif node.op_type == "ConstantOfShape":
            kind = attributes["value"].t.data_type if "value" in attributes else TensorProto.FLOAT
        elif node.op_type in _BOOLEAN:
            kind = TensorProto.BOOL
        elif node.op_type in _INTEGER:
            kind = TensorProto.INT64
        else:
            kind = types.get(
                node.input[1 if node.op_type in ("Where", "CastLike", "DequantizeLinear") else 0], TensorProto.UNDEFINED
            )
        for index, name in enumerate(node.output):
            types[name] = TensorProto.INT64 if node.op_type == "TopK" and index == 1 else kind
    return {name: kind for name, kind in types.items() if kind in _FLOATS}
