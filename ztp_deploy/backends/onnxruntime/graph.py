"""ONNX Runtime's own attention in place of the open one, where no stage reads what it computes."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from ztp_deploy.exporters.nodes import HEADS_FIRST, KEYS_TURNED, bias_of, constant, maker, only_reader, permutation

if TYPE_CHECKING:
    import onnx_ir

DOMAIN = "com.microsoft"
FUSED = "MultiHeadAttention"


def fuse_attention(path: Path) -> tuple[int, int]:
    """Fuses, in the graph in a file, every attention that has the form of a ViT's; weights beside it stay there.

    Returns how many were fused, of how many that nothing but the values reads: what a stage reads has to stay open.
    """
    import onnx_ir

    model = onnx_ir.load(path)
    found = unread(model.graph)
    fused = sum([_fuse(node) for node in found])
    if fused:
        model.opset_imports[DOMAIN] = 1
        drop_unread(model.graph)
    onnx_ir.save(model, path)
    return fused, len(found)


def unread(graph: onnx_ir.Graph) -> list[onnx_ir.Node]:
    """The softmaxes whose attention nothing but the values reads."""
    softmaxes = [node for node in graph if node.op_type == "Softmax"]
    return [node for node in softmaxes if only_reader(node.outputs[0], "MatMul") is not None]


def drop_unread(graph: onnx_ir.Graph) -> None:
    """Takes out weights that nothing reads any more; nodes that nothing reads may compute scores to audit."""
    for name, weight in list(graph.initializers.items()):
        if not weight.uses() and not weight.is_graph_output():
            del graph.initializers[name]


def drop(graph: onnx_ir.Graph, nodes: Iterable[onnx_ir.Node]) -> None:
    """Takes out those of its nodes, listed from the last to the first, that nothing reads any more."""
    for node in nodes:
        if node.graph is graph and not any(value.consumers() or value.is_graph_output() for value in node.outputs):
            graph.remove(node, safe=True)


@dataclass(frozen=True)
class Heads:
    """Tokens [B, N, H·d] that became heads [B, H, N, d].

    `product` and `bias`: what they are the sum of, where that is a product and a constant. `made`: the
    nodes that nothing needs once the heads are fused, from the last to the first.
    """

    tokens: onnx_ir.Value
    product: onnx_ir.Value | None
    bias: NDArray[Any] | None
    heads: int
    made: tuple[onnx_ir.Node, ...]

    @classmethod
    def of(cls, value: onnx_ir.Value | None) -> Heads | None:
        """How a value was made, where it was made so."""
        turned = maker(value, "Transpose")
        shaped = maker(turned.inputs[0], "Reshape") if turned is not None else None
        shape = constant(shaped.inputs[1]) if shaped is not None else None
        if turned is None or shaped is None or shape is None or len(shape) != 4 or permutation(turned) != HEADS_FIRST:
            return None
        tokens = shaped.inputs[0]
        assert tokens is not None
        addition = maker(tokens, "Add")
        if addition is not None:
            width = int(shape[2] * shape[3])
            for product in addition.inputs:
                bias = bias_of(addition, product, width) if product is not None and maker(product, "MatMul") else None
                if bias is not None:
                    return cls(tokens, product, bias, int(shape[2]), (turned, shaped, addition))
        return cls(tokens, None, None, int(shape[2]), (turned, shaped))


@dataclass(frozen=True)
class OpenAttention:
    """Heads → queries · scale @ keysᵀ → softmax → @ values → heads joined, node by node."""

    softmax: onnx_ir.Node
    scaled: onnx_ir.Node
    keys: onnx_ir.Node
    product: onnx_ir.Node
    values: onnx_ir.Node
    turned: onnx_ir.Node
    joined: onnx_ir.Node
    parts: tuple[Heads, Heads, Heads]
    scale: float

    @classmethod
    def of(cls, softmax: onnx_ir.Node) -> OpenAttention | None:
        """The attention of a softmax, whoever else reads that; None where it has another form."""
        probabilities = softmax.outputs[0]
        readers = [node for node in probabilities.consumers() if node.op_type == "MatMul"]
        values = next((node for node in readers if node.inputs[0] is probabilities), None)
        turned = only_reader(values.outputs[0], "Transpose") if values is not None else None
        joined = only_reader(turned.outputs[0], "Reshape") if turned is not None else None
        product = maker(softmax.inputs[0], "MatMul")
        scaled = maker(product.inputs[0], "Mul") if product is not None else None
        keys = maker(product.inputs[1], "Transpose") if product is not None else None
        if values is None or turned is None or joined is None or product is None or scaled is None or keys is None:
            return None
        scale = constant(scaled.inputs[1])
        formed = (
            softmax.attributes.get_int("axis", -1) in (-1, 3)
            and permutation(turned) == HEADS_FIRST
            and permutation(keys) == KEYS_TURNED
            and not joined.outputs[0].is_graph_output()
        )
        first, second, third = (Heads.of(value) for value in (scaled.inputs[0], keys.inputs[0], values.inputs[1]))
        if not formed or scale is None or scale.size != 1 or first is None or second is None or third is None:
            return None
        if not first.heads == second.heads == third.heads:
            return None
        parts = (first, second, third)
        return cls(softmax, scaled, keys, product, values, turned, joined, parts, float(scale.reshape(())))

    def mix(self, inputs: list[onnx_ir.Value], tape: onnx_ir.tape.Tape) -> None:
        """Puts the library's operator on these inputs in the place of all that nothing else reads."""
        graph = self.softmax.graph
        assert graph is not None
        attributes = {"num_heads": self.parts[0].heads, "scale": self.scale}
        mixed = tape.op(FUSED, inputs, attributes, domain=DOMAIN)
        graph.insert_after(self.joined, tape.nodes)
        self.joined.outputs[0].replace_all_uses_with(mixed)
        drop(graph, (self.joined, self.turned, self.values, self.softmax, self.product, self.scaled, self.keys))
        drop(graph, [node for part in self.parts for node in part.made])


def _fuse(softmax: onnx_ir.Node) -> bool:
    """Attention as one node, projections' biases with it; False where it has another form."""
    import onnx_ir

    attention = OpenAttention.of(softmax)
    graph = softmax.graph
    if attention is None or graph is None:
        return False
    tape = onnx_ir.tape.Tape()
    inputs = [part.tokens for part in attention.parts]
    biases = [part.bias for part in attention.parts if part.bias is not None]
    if len(biases) == 3:
        inputs = [part.product for part in attention.parts if part.product is not None]
        joint = np.concatenate(biases)
        bias = tape.initializer(onnx_ir.tensor(joint, name=f"{softmax.outputs[0].name}_biases"))
        graph.register_initializer(bias)
        inputs.append(bias)
    attention.mix(inputs, tape)
    return True
