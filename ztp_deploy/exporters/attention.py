"""Attention and GELU in an ONNX graph, written as engines run them fastest.

PyTorch's own graph projects queries, keys and values at once and cuts them apart again, scales queries and keys each,
and turns the keys by way of a flattened copy. Here each has its own projection, the queries alone are scaled, the
keys are turned where they are multiplied, and turns that undo each other are left out. GELU has the form that engines know as one. The
results are the same up to rounding.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray

from ztp_deploy.errors import GateFailed
from ztp_deploy.exporters.nodes import (
    HEADS_FIRST,
    KEYS_TURNED,
    axes,
    bias_of,
    constant,
    maker,
    only_reader,
    permutation,
)

if TYPE_CHECKING:
    import onnx_ir

_PARTS_FIRST = (2, 0, 3, 1, 4)
_BOTH_TURNS = (0, 2, 3, 1)


def translations() -> dict[Any, Callable[..., Any]]:
    """For `torch.onnx.export`: how attention and GELU are written. The export fails on attention that no ViT has."""
    from onnxscript import opset18 as op

    def attention(
        query: Any,
        key: Any,
        value: Any,
        attn_mask: Any = None,
        dropout_p: float = 0.0,
        is_causal: bool = False,
        scale: float | None = None,
        enable_gqa: bool = False,
    ) -> Any:
        if dropout_p or is_causal or enable_gqa or (attn_mask is not None and attn_mask.dtype != query.dtype):
            raise GateFailed(
                "The model's attention drops out, is causal, groups its queries or has a mask of another type.",
                "Prune a model whose blocks attend as a ViT's do.",
            )
        factor = op.Constant(value_float=query.shape[-1] ** -0.5 if scale is None else scale)
        scaled = op.Mul(query, factor)
        logits = op.MatMul(scaled, op.Transpose(key, perm=KEYS_TURNED))
        if attn_mask is not None:
            logits = op.Add(logits, attn_mask)
        return op.MatMul(op.Softmax(logits, axis=-1), value)

    def gelu(x: Any, approximate: str = "none") -> Any:
        half, one = op.Constant(value_float=0.5), op.Constant(value_float=1.0)
        if approximate == "tanh":
            cube = op.Mul(op.Mul(op.Mul(x, x), x), op.Constant(value_float=0.044715))
            curve = op.Tanh(op.Mul(op.Add(x, cube), op.Constant(value_float=math.sqrt(2 / math.pi))))
        else:
            curve = op.Erf(op.Div(x, op.Constant(value_float=math.sqrt(2))))
        return op.Mul(op.Mul(x, half), op.Add(curve, one))

    return {
        torch.ops.aten.scaled_dot_product_attention.default: attention,
        torch.ops.aten.gelu.default: gelu,
    }


def simplify(model: onnx_ir.Model) -> None:
    """Splits joint projections, turns keys at their product and leaves out turns that undo each other, in place; the graph's outputs stay."""
    from onnx_ir.passes.common import RemoveUnusedNodesPass

    for node in list(model.graph):
        if node.op_type == "MatMul":
            _split_projection(node)
    for node in list(model.graph):
        if node.op_type == "Transpose" and permutation(node) == _BOTH_TURNS:
            _turn_twice(node)
    for node in list(model.graph):
        if node.op_type == "Transpose":
            _undo_turn(node)
    RemoveUnusedNodesPass()(model)


def _split_projection(product: onnx_ir.Node) -> None:
    """Tokens → MatMul (→ Add) → [B, N, parts, H, d] → [parts, B, H, N, d] → a part: one projection a part instead."""
    import onnx_ir

    tokens, weight = product.inputs[0], constant(product.inputs[1])
    if weight is None or weight.ndim != 2:
        return
    last, bias = product.outputs[0], None
    if addition := only_reader(last, "Add"):
        last, bias = addition.outputs[0], bias_of(addition, last, weight.shape[1])
        if bias is None:
            return
    shaped = only_reader(last, "Reshape")
    turned = only_reader(shaped.outputs[0], "Transpose") if shaped else None
    shape = constant(shaped.inputs[1]) if shaped else None
    if turned is None or shape is None or permutation(turned) != _PARTS_FIRST:
        return
    parts = int(shape[2])
    taken = [_taken_part(reader) for reader in turned.outputs[0].consumers()]
    if parts < 2 or turned.outputs[0].is_graph_output() or None in taken:
        return
    tape = onnx_ir.tape.Tape()
    name = product.outputs[0].name
    heads = tape.initializer(onnx_ir.tensor(np.delete(shape, 2), name=f"{name}_shape"))
    for part, output in filter(None, taken):
        own = tape.initializer(onnx_ir.tensor(_part(weight, part, parts), name=f"{name}_weight_{part}"))
        value = tape.op("MatMul", [tokens, own])
        if bias is not None:
            own = tape.initializer(onnx_ir.tensor(_part(bias, part, parts), name=f"{name}_bias_{part}"))
            value = tape.op("Add", [value, own])
        value = tape.op("Reshape", [value, heads], {"allowzero": 1})
        output.replace_all_uses_with(tape.op("Transpose", [value], {"perm": HEADS_FIRST}))
    assert product.graph is not None
    product.graph.insert_before(product, tape.nodes)
    for initializer in tape.initializers:
        product.graph.register_initializer(initializer)


def _taken_part(reader: onnx_ir.Node) -> tuple[int, onnx_ir.Value] | None:
    """Which part [B, H, N, d] a reader of [parts, B, H, N, d] takes, and as what.

    None where it does anything else, or where the graph gives the part out, whose name is then its own.
    """
    numbers = [value for value in map(constant, reader.inputs[1:]) if value is not None]
    if len(numbers) < len(reader.inputs) - 1:
        return None
    taken = None
    if reader.op_type == "Gather" and reader.attributes.get_int("axis", 0) == 0 and numbers[0].ndim == 0:
        taken = int(numbers[0]), reader.outputs[0]
    elif reader.op_type == "Slice" and [value.tolist() for value in numbers[2:]] in ([[0]], [[0], [1]]):
        start, end = (int(value[0]) for value in numbers[:2])
        squeezed = only_reader(reader.outputs[0], "Squeeze")
        if 0 <= start == end - 1 and squeezed and axes(squeezed) == [0]:
            taken = start, squeezed.outputs[0]
    return None if taken is None or taken[1].is_graph_output() else taken


def _turn_twice(both: onnx_ir.Node) -> None:
    """Keys [B, N, H, d] → [B, H, d, N] by way of [B, H, N, d]: a product does the second turn for nothing."""
    import onnx_ir

    if both.outputs[0].is_graph_output():
        return
    tape = onnx_ir.tape.Tape()
    heads = tape.op("Transpose", [both.inputs[0]], {"perm": HEADS_FIRST})
    both.outputs[0].replace_all_uses_with(tape.op("Transpose", [heads], {"perm": KEYS_TURNED}))
    assert both.graph is not None
    both.graph.insert_before(both, tape.nodes)


def _undo_turn(second: onnx_ir.Node) -> None:
    """Reshape → Transpose → Transpose back → Reshape: the second pair reads what the first one read."""
    first = maker(second.inputs[0], "Transpose")
    if first is None:
        return
    there, back = permutation(first), permutation(second)
    if there is None or back is None or [there[axis] for axis in back] != list(range(len(there))):
        return
    source = first.inputs[0]
    assert source is not None
    shaped = maker(source, "Reshape")
    for reader in list(second.outputs[0].consumers()):
        if shaped is not None and reader.op_type == "Reshape":
            reader.replace_input_with(0, shaped.inputs[0])
    if not second.outputs[0].is_graph_output():
        second.outputs[0].replace_all_uses_with(source)


def _part(values: NDArray[Any], part: int, parts: int) -> NDArray[Any]:
    return np.ascontiguousarray(np.split(values, parts, axis=-1)[part])
