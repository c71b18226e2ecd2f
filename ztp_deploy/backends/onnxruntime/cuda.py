"""What ONNX Runtime's CUDA kernels are slow at, in operators that they are fast at; the function stays the same.

As a profile on an H200 showed, three channels in half precision are convolved without tensor cores; biases, sums and
norms are a kernel each, all bound by memory; attention with an odd number of tokens misses the fast products; a length
along the last axis takes cuDNN a multiple of a sum's time.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from ztp_deploy import environment
from ztp_deploy.backends.onnxruntime.graph import DOMAIN, OpenAttention, drop, drop_unread, unread
from ztp_deploy.exporters.nodes import bias_of, constant, maker, only_reader, permutation

if TYPE_CHECKING:
    import onnx_ir

SKIP_NORM = "SkipLayerNormalization"
PRODUCT = "FusedMatMul"
_KINDS = ("Conv", "Softmax", "LayerNormalization", "ReduceL2")
_JOINS_SINCE = (1, 31)
"""The release whose joint norms were measured; earlier ones add their squares up in half precision."""
_PATCHES_LAST = (0, 2, 1)
"""Turns what a convolution gives, [B, C, n], into tokens [B, n, C]."""
_CUT = (0, 2, 4, 1, 3, 5)
"""Turns pixels [B, C, h, p, w, q] into patches [B, h, w, C, p, q]."""


def fit(path: Path) -> dict[str, int]:
    """Rewrites the graph in a file and returns what was done, by name; weights beside it stay there."""
    import onnx_ir
    from onnx_ir.passes.common import ShapeInferencePass

    model = onnx_ir.load(path)
    ShapeInferencePass()(model)  # graphs in half precision lie without shapes and types
    graph = model.graph
    expected = len(unread(graph))
    by_kind = {kind: [node for node in graph if node.op_type == kind] for kind in _KINDS}
    attended = [_attend(node) for node in by_kind["Softmax"]]
    joins = _joins_norms()
    done = {
        "attention_fused": attended.count("fused"),
        "attention_expected": expected,
        "attention_beside_scores": attended.count("beside scores"),
        "attention_read": len(attended) - expected,
        "patches_multiplied": sum([_multiply_patches(node) for node in by_kind["Conv"]]),
        "norms_joined": sum([joins and _join_norm(node) for node in by_kind["LayerNormalization"]]),
        "lengths_summed": sum([_sum_squares(node) for node in by_kind["ReduceL2"]]),
    }
    model.opset_imports[DOMAIN] = 1
    drop_unread(graph)
    onnx_ir.save(model, path)
    return done


def _attend(softmax: onnx_ir.Node) -> str | None:
    """The library's attention for the values, whether or not a stage reads the attention as well.

    Biases go where they cost nothing. That of the keys adds the same to all logits of a query, and falls out of the
    softmax. That of the values passes through, since a query's attention sums to 1, into the bias that follows. What a
    stage reads is computed by itself, from keys as they lie.
    """
    import onnx_ir

    attention = OpenAttention.of(softmax)
    graph = softmax.graph
    if attention is None or graph is None:
        return None
    queries, keys, values = attention.parts
    read = len(softmax.outputs[0].consumers()) > 1
    if read:
        heads = [attention.scaled.inputs[0], attention.keys.inputs[0]]
        turned = [onnx_ir.AttrInt64("transB", 1), onnx_ir.AttrFloat32("alpha", attention.scale)]
        _replace(attention.product, onnx_ir.Node(DOMAIN, PRODUCT, heads, turned))
    inputs = [
        queries.tokens,
        keys.tokens if keys.product is None or read else keys.product,
        values.product if values.product is not None and _pass_on(attention) else values.tokens,
    ]
    attention.mix(inputs, onnx_ir.tape.Tape())
    return "beside scores" if read else "fused"


def _pass_on(attention: OpenAttention) -> bool:
    """Puts the values' bias into that of the projection behind them; False where there is none."""
    import onnx_ir

    bias = attention.parts[2].bias
    projection = only_reader(attention.joined.outputs[0], "MatMul")
    weight = constant(projection.inputs[1]) if projection is not None else None
    addition = only_reader(projection.outputs[0], "Add") if projection is not None else None
    if projection is None or weight is None or weight.ndim != 2 or addition is None or bias is None:
        return False
    added = bias_of(addition, projection.outputs[0], weight.shape[1])
    if added is None:
        return False
    passed = added.astype(np.float64) + bias.astype(np.float64) @ weight.astype(np.float64)
    tensor = onnx_ir.tensor(passed.astype(added.dtype), name=f"{addition.outputs[0].name}_bias")
    value = onnx_ir.Value(
        name=tensor.name, shape=onnx_ir.Shape(passed.shape), type=onnx_ir.TensorType(tensor.dtype), const_value=tensor
    )
    assert addition.graph is not None
    addition.graph.register_initializer(value)
    place = next(i for i, operand in enumerate(addition.inputs) if operand is not projection.outputs[0])
    addition.replace_input_with(place, value)
    return True


def _join_norm(norm: onnx_ir.Node) -> bool:
    """x + (product + bias) → norm as one operator, which gives the sum out too; False where it is not that."""
    import onnx_ir

    total = maker(norm.inputs[0], "Add")
    graph = norm.graph
    gamma = constant(norm.inputs[1])
    if total is None or graph is None or gamma is None or gamma.ndim != 1 or len(norm.inputs) < 3:
        return False
    given_out = norm.outputs[0].is_graph_output() or total.outputs[0].is_graph_output()
    if norm.attributes.get_int("axis", -1) not in (-1, 2) or given_out:
        return False
    for residual, added in (total.inputs, total.inputs[::-1]):
        addition = maker(added, "Add")
        # The operator takes two sums of one shape: no residual that is added to every image alike.
        if addition is None or added is None or residual is None or only_reader(added, "Add") is None:
            continue
        if not _alike(residual, added):
            continue
        for product, bias in (addition.inputs, addition.inputs[::-1]):
            if product is None or not maker(product, "MatMul") or bias_of(addition, product, gamma.size) is None:
                continue
            normed, summed = norm.outputs[0], total.outputs[0]
            joint = onnx_ir.Node(
                DOMAIN,
                SKIP_NORM,
                [residual, product, norm.inputs[1], norm.inputs[2], bias],
                [onnx_ir.AttrFloat32("epsilon", norm.attributes.get_float("epsilon", 1e-5))],
                outputs=[
                    onnx_ir.Value(name=normed.name, shape=normed.shape, type=normed.type),
                    *(onnx_ir.Value(name="") for _ in range(2)),
                    onnx_ir.Value(name=summed.name, shape=summed.shape, type=summed.type),
                ],
            )
            graph.insert_after(total, joint)
            normed.replace_all_uses_with(joint.outputs[0])
            summed.replace_all_uses_with(joint.outputs[3])
            drop(graph, (norm, total, addition))
            return True
    return False


def _alike(one: onnx_ir.Value, other: onnx_ir.Value) -> bool:
    """Whether both are of one shape [B, N, C]; a batch that is not known goes by any name."""
    if one.shape is None or other.shape is None or not len(one.shape) == len(other.shape) == 3:
        return False
    sides = zip(one.shape, other.shape, strict=True)
    return all(a == b or not (isinstance(a, int) or isinstance(b, int)) for a, b in sides)


def _multiply_patches(convolution: onnx_ir.Node) -> bool:
    """A convolution that reads every pixel once, as the product of patches that are cut out; False where it is not."""
    import onnx_ir

    shaped = only_reader(convolution.outputs[0], "Reshape")
    turned = only_reader(shaped.outputs[0], "Transpose") if shaped is not None else None
    kernels = constant(convolution.inputs[1])
    graph = convolution.graph
    pixels = convolution.inputs[0]
    if (
        shaped is None
        or turned is None
        or kernels is None
        or kernels.ndim != 4
        or graph is None
        or permutation(turned) != _PATCHES_LAST
    ):
        return False
    width, channels, *patch = kernels.shape
    shape = None if pixels is None or pixels.shape is None else list(pixels.shape.dims[1:])
    attributes = convolution.attributes
    if (
        shape is None
        or not all(isinstance(side, int) for side in shape)
        or tuple(attributes.get_ints("strides", ())) != tuple(patch)
        or any(attributes.get_ints("pads", ()))
        or any(step != 1 for step in attributes.get_ints("dilations", ()))
        or attributes.get_int("group", 1) != 1
        or attributes.get_string("auto_pad", "NOTSET") != "NOTSET"
        or any(side % step for side, step in zip(shape[1:], patch, strict=True))
    ):
        return False
    rows, columns = (side // step for side, step in zip(shape[1:], patch, strict=True))
    inner = channels * patch[0] * patch[1]
    tape = onnx_ir.tape.Tape()
    name = convolution.outputs[0].name

    def weight(values: np.ndarray, what: str) -> onnx_ir.Value:
        value = tape.initializer(onnx_ir.tensor(np.ascontiguousarray(values), name=f"{name}_{what}"))
        graph.register_initializer(value)
        return value

    cut = weight(np.array([0, channels, rows, patch[0], columns, patch[1]]), "cut")
    flat = weight(np.array([0, rows * columns, inner]), "flat")
    patches = tape.op("Transpose", [tape.op("Reshape", [pixels, cut])], {"perm": list(_CUT)})
    tokens = tape.op("MatMul", [tape.op("Reshape", [patches, flat]), weight(kernels.reshape(width, inner).T, "weight")])
    if len(convolution.inputs) > 2 and convolution.inputs[2] is not None:
        tokens = tape.op("Add", [tokens, convolution.inputs[2]])
    graph.insert_after(turned, tape.nodes)
    turned.outputs[0].replace_all_uses_with(tokens)
    drop(graph, (turned, shaped, convolution))
    return True


def _sum_squares(length: onnx_ir.Node) -> bool:
    """A float32 length along the last axis as the root of a sum; False for others: squares would leave half precision."""
    import onnx_ir

    values, along = length.inputs[0], constant(length.inputs[1]) if len(length.inputs) > 1 else None
    graph = length.graph
    if along is None or graph is None or values is None or values.shape is None:
        return False
    last = np.ravel(along).tolist() in ([-1], [len(values.shape) - 1])
    if not last or values.dtype != onnx_ir.DataType.FLOAT:
        return False
    tape = onnx_ir.tape.Tape()
    keep = {"keepdims": length.attributes.get_int("keepdims", 1)}
    total = tape.op("ReduceSum", [tape.op("Mul", [values, values]), length.inputs[1]], keep)
    graph.insert_before(length, tape.nodes)
    _replace(length, onnx_ir.Node("", "Sqrt", [total]))
    return True


def _replace(node: onnx_ir.Node, by: onnx_ir.Node) -> None:
    """Puts a node of one output in another's place, under its name: it may be what an audit asks for."""
    graph = node.graph
    assert graph is not None
    by.outputs[0].name = node.outputs[0].name
    by.outputs[0].shape, by.outputs[0].type = node.outputs[0].shape, node.outputs[0].type
    graph.insert_after(node, by)
    node.outputs[0].replace_all_uses_with(by.outputs[0], replace_graph_outputs=True)
    graph.remove(node, safe=True)


def _joins_norms() -> bool:
    """Whether this release adds the squares of a joint norm up in float32."""
    version = environment.installed("onnxruntime-gpu") or environment.installed("onnxruntime") or "0"
    return tuple(int(part) for part in version.split(".")[:2]) >= _JOINS_SINCE
