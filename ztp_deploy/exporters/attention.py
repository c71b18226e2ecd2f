"""Attention in an ONNX graph, written as engines run it fastest: nothing is copied that need not be.

PyTorch's own graph projects queries, keys and values at once and cuts them apart again, scales queries and keys each,
and turns the keys by way of a flattened copy. Here each has its own projection, the queries alone are scaled, the
keys are turned once, and turns that undo each other are left out. The results are the same up to rounding.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray

from ztp_deploy.errors import GateFailed

if TYPE_CHECKING:
    import onnx_ir

_PARTS_FIRST = (2, 0, 3, 1, 4)
_HEADS_FIRST = (0, 2, 1, 3)
_KEYS_TURNED = (0, 1, 3, 2)


def translations() -> dict[Any, Callable[..., Any]]:
    """For `torch.onnx.export`: how scaled dot-product attention is written. The export fails where a ViT's is not."""
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
        logits = op.MatMul(scaled, op.Transpose(key, perm=_KEYS_TURNED))
        if attn_mask is not None:
            logits = op.Add(logits, attn_mask)
        return op.MatMul(op.Softmax(logits, axis=-1), value)

    return {torch.ops.aten.scaled_dot_product_attention.default: attention}


def simplify(model: onnx_ir.Model) -> None:
    """Splits joint projections and leaves out turns that undo each other, in place; the graph's outputs stay."""
    from onnx_ir.passes.common import RemoveUnusedNodesPass

    for node in list(model.graph):
        if node.op_type == "MatMul":
            _split_projection(node)
    for node in list(model.graph):
        if node.op_type == "Transpose":
            _undo_turn(node)
    RemoveUnusedNodesPass()(model)


def _split_projection(product: onnx_ir.Node) -> None:
    """Tokens → MatMul (→ Add) → [B, N, parts, H, d] → [parts, B, H, N, d] → a part: one projection a part instead."""
    import onnx_ir

    tokens, weight = product.inputs[0], _constant(product.inputs[1])
    if weight is None or weight.ndim != 2:
        return
    last, bias = product.outputs[0], None
    if addition := _only_reader(last, "Add"):
        [other] = [value for value in addition.inputs if value is not last]
        last, bias = addition.outputs[0], _constant(other)
        if bias is None:
            return
    shaped = _only_reader(last, "Reshape")
    turned = _only_reader(shaped.outputs[0], "Transpose") if shaped else None
    shape = _constant(shaped.inputs[1]) if shaped else None
    if turned is None or shape is None or _permutation(turned) != _PARTS_FIRST:
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
        output.replace_all_uses_with(tape.op("Transpose", [value], {"perm": _HEADS_FIRST}))
    assert product.graph is not None
    product.graph.insert_before(product, tape.nodes)
    for initializer in tape.initializers:
        product.graph.register_initializer(initializer)


def _taken_part(reader: onnx_ir.Node) -> tuple[int, onnx_ir.Value] | None:
    """Which part [B, H, N, d] a reader of [parts, B, H, N, d] takes, and as what.

    None where it does anything else, or where the graph gives the part out, whose name is then its own.
    """
    numbers = [value for value in map(_constant, reader.inputs[1:]) if value is not None]
    if len(numbers) < len(reader.inputs) - 1:
        return None
    taken = None
    if reader.op_type == "Gather" and reader.attributes.get_int("axis", 0) == 0 and numbers[0].ndim == 0:
        taken = int(numbers[0]), reader.outputs[0]
    elif reader.op_type == "Slice" and [value.tolist() for value in numbers[2:]] in ([[0]], [[0], [1]]):
        start, end = (int(value[0]) for value in numbers[:2])
        squeezed = _only_reader(reader.outputs[0], "Squeeze")
        if 0 <= start == end - 1 and squeezed and _axes(squeezed) == [0]:
            taken = start, squeezed.outputs[0]
    return None if taken is None or taken[1].is_graph_output() else taken


def _undo_turn(second: onnx_ir.Node) -> None:
    """Reshape → Transpose → Transpose back → Reshape: the second pair reads what the first one read."""
    turned = second.inputs[0]
    first = turned.producer() if turned is not None else None
    if first is None or first.op_type != "Transpose":
        return
    there, back = _permutation(first), _permutation(second)
    if there is None or back is None or [there[axis] for axis in back] != list(range(len(there))):
        return
    source = first.inputs[0]
    assert source is not None
    shaped = source.producer()
    for reader in list(second.outputs[0].consumers()):
        if shaped is not None and shaped.op_type == "Reshape" and reader.op_type == "Reshape":
            reader.replace_input_with(0, shaped.inputs[0])
    if not second.outputs[0].is_graph_output():
        second.outputs[0].replace_all_uses_with(source)


def _part(values: NDArray[Any], part: int, parts: int) -> NDArray[Any]:
    return np.ascontiguousarray(np.split(values, parts, axis=-1)[part])


def _constant(value: onnx_ir.Value | None) -> NDArray[Any] | None:
    import onnx_ir

    tensor = None if value is None else onnx_ir.convenience.get_const_tensor(value)
    return None if tensor is None else tensor.numpy()


def _only_reader(value: onnx_ir.Value, kind: str) -> onnx_ir.Node | None:
    """The one node that reads a value, where it is of that kind and the graph does not give the value out."""
    readers = value.consumers()
    return readers[0] if len(readers) == 1 and readers[0].op_type == kind and not value.is_graph_output() else None


def _permutation(node: onnx_ir.Node) -> tuple[int, ...] | None:
    attribute = node.attributes.get("perm")
    return None if attribute is None else tuple(attribute.as_ints())


def _axes(squeeze: onnx_ir.Node) -> list[int] | None:
    axes = _constant(squeeze.inputs[1]) if len(squeeze.inputs) > 1 else None
    return None if axes is None else np.ravel(axes).tolist()
