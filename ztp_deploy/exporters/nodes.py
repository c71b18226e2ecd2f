"""Reading an ONNX graph node by node."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

if TYPE_CHECKING:
    import onnx_ir

HEADS_FIRST = (0, 2, 1, 3)
"""Turns [B, N, H, d] into [B, H, N, d], and back."""
KEYS_TURNED = (0, 1, 3, 2)
"""Turns keys [B, H, N, d] into the right operand of a product."""


def constant(value: onnx_ir.Value | None) -> NDArray[Any] | None:
    """What a constant value is; None for one that is computed."""
    import onnx_ir

    tensor = None if value is None else onnx_ir.convenience.get_const_tensor(value)
    return None if tensor is None else tensor.numpy()


def maker(value: onnx_ir.Value | None, kind: str) -> onnx_ir.Node | None:
    """The node that a value comes from, where it is of that kind."""
    node = None if value is None else value.producer()
    return node if node is not None and node.op_type == kind else None


def only_reader(value: onnx_ir.Value, kind: str) -> onnx_ir.Node | None:
    """The one node that reads a value, where it is of that kind and the graph does not give the value out."""
    readers = value.consumers()
    return readers[0] if len(readers) == 1 and readers[0].op_type == kind and not value.is_graph_output() else None


def permutation(node: onnx_ir.Node) -> tuple[int, ...] | None:
    """The order that a Transpose states."""
    attribute = node.attributes.get("perm")
    return None if attribute is None else tuple(attribute.as_ints())


def axes(node: onnx_ir.Node) -> list[int] | None:
    """The constant axes of a Squeeze or Unsqueeze."""
    found = constant(node.inputs[1]) if len(node.inputs) > 1 else None
    return None if found is None else np.ravel(found).tolist()


def bias_of(addition: onnx_ir.Node, product: onnx_ir.Value, width: int) -> NDArray[Any] | None:
    """The constant [width] that an Add adds to every row of a product; None where it adds anything else."""
    others = [value for value in addition.inputs if value is not product]
    added = constant(others[0]) if len(others) == 1 else None
    return None if added is None or added.shape != (width,) else added
