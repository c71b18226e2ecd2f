"""Reading an ONNX graph node by node."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

if TYPE_CHECKING:
    import onnx_ir


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


def bias_of(addition: onnx_ir.Node, product: onnx_ir.Value) -> NDArray[Any] | None:
    """The constant that an Add adds to a product."""
    others = [value for value in addition.inputs if value is not product]
    return constant(others[0]) if len(others) == 1 else None
