"""The owned op vocabulary, and the linter that holds every exported ONNX graph to it.

Selection is TopK with a constant k and Gather on axis 0; merging is a matrix product. Whatever moves
tokens any other way is refused, because engines run it slowly, differently, or not at all.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import onnx
from onnx import numpy_helper

from ztp_deploy.errors import GateFailed
from ztp_deploy.exporters.fold import constants
from ztp_deploy.exporters.graph import output_names
from ztp_deploy.plan import Plan

MAX_K = 3840
"""TensorRT refuses a TopK beyond this."""

MATRIX = frozenset({"MatMul", "Gemm", "Conv"})
ELEMENTWISE = frozenset(
    [
        *("Abs", "Add", "And", "Cast", "CastLike", "Ceil", "Clip", "Cos", "Div", "Equal", "Erf", "Exp", "Floor"),
        *("Gelu", "Greater", "GreaterOrEqual", "Identity", "IsInf", "IsNaN", "Less", "LessOrEqual", "Log", "Max"),
        *("Min", "Mod", "Mul", "Neg", "Not", "Or", "Pow", "Reciprocal", "Relu", "Round", "Sigmoid", "Sign", "Sin"),
        *("Softplus", "Sqrt", "Sub", "Tanh", "Where"),
    ]
)
REDUCTION = frozenset(
    [
        *("ArgMax", "BatchNormalization", "GlobalAveragePool", "GroupNormalization", "LayerNormalization"),
        *("LogSoftmax", "ReduceL1", "ReduceL2", "ReduceMax", "ReduceMean", "ReduceMin", "ReduceProd", "ReduceSum"),
        *("ReduceSumSquare", "Softmax", "Sum"),
    ]
)
SHAPE = frozenset(
    [
        *("Concat", "Constant", "ConstantOfShape", "Expand", "Flatten", "Range", "Reshape", "Shape", "Size"),
        *("Slice", "Split", "Squeeze", "Tile", "Transpose", "Unsqueeze"),
    ]
)
SELECTION = frozenset({"TopK", "Gather"})
QUANTISATION = frozenset({"QuantizeLinear", "DequantizeLinear"})
"""In graphs that a back end derives for int8 and fp8; an exported graph has none."""
ALLOWED = MATRIX | ELEMENTWISE | REDUCTION | SHAPE | SELECTION

FORBIDDEN = {
    "Scatter": "token writes depend on order and few engines run them well",
    "ScatterElements": "token writes depend on order; TensorRT knows no mean reduction",
    "ScatterND": "token writes depend on order",
    "GatherElements": "slow in engines; Gather on a row-flattened tensor does the same",
    "GatherND": "slow in engines; Gather on a row-flattened tensor does the same",
    "NonZero": "its result has a dynamic shape",
    "Compress": "its result has a dynamic shape",
    "Unique": "its result has a dynamic shape",
    "Loop": "control flow keeps engines from fusing",
    "If": "control flow keeps engines from fusing",
    "Scan": "control flow keeps engines from fusing",
}


def lint(model: onnx.ModelProto, plan: Plan, *, quantised: bool = False) -> list[str]:
    """Every way in which the graph breaks the vocabulary or the plan, as readable lines; empty when it keeps both.

    `quantised`: the graph was derived for int8 or fp8 and may hold `QUANTISATION`.

    Checks operators and domains, each TopK (sorted, largest, k constant and at most 3840, k's as the plan's
    counts ask), each Gather by a computed index (axis 0; a constant index is a mere slice), and the outputs:
    `logits`, then `kept_i` int32 [batch, tokens_out] and, of methods that merge, `merged_i` int32 [batch, tokens_in].
    """
    known = constants(model.graph)
    allowed = ALLOWED | QUANTISATION if quantised else ALLOWED
    faults: list[str] = []
    counts: Counter[int] = Counter()
    for node in _nodes(model.graph):
        name = f"{node.op_type} {node.name!r}"
        if node.domain not in ("", "ai.onnx"):
            faults.append(f"{name}: domain {node.domain!r} is not standard ONNX")
        elif node.op_type in FORBIDDEN:
            faults.append(f"{name} is forbidden: {FORBIDDEN[node.op_type]}")
        elif node.op_type not in allowed:
            faults.append(f"{name} is not in the vocabulary")
        elif node.op_type == "TopK":
            k = _lint_top_k(node, name, known, faults)
            if k is not None:
                counts[k] += 1
        elif node.op_type == "Gather" and node.input[1] not in known and _attribute(node, "axis", 0) != 0:
            faults.append(f"{name} gathers by a computed index on axis {_attribute(node, 'axis', 0)}, not 0")
    faults += _lint_counts(counts, plan) + _lint_outputs(model, plan)
    return faults


def check(model: onnx.ModelProto, plan: Plan, path: Path, *, quantised: bool = False) -> None:
    """Raises GateFailed with the linter's findings."""
    faults = lint(model, plan, quantised=quantised)
    if faults:
        shown = "; ".join(faults[:5]) + (f"; and {len(faults) - 5} more" if len(faults) > 5 else "")
        raise GateFailed(
            f"The graph {path.name} breaks the op vocabulary: {shown}.",
            "Nothing was kept. Rewrite the method's stage in the allowed operators (ztp_deploy/exporters/vocabulary.py).",
        )


def _nodes(graph: onnx.GraphProto) -> Iterator[onnx.NodeProto]:
    for node in graph.node:
        yield node
        for attribute in node.attribute:
            if attribute.HasField("g"):
                yield from _nodes(attribute.g)


def _attribute(node: onnx.NodeProto, name: str, default: int) -> int:
    return next((a.i for a in node.attribute if a.name == name), default)


def _lint_top_k(node: onnx.NodeProto, name: str, known: dict[str, onnx.TensorProto], faults: list[str]) -> int | None:
    if _attribute(node, "sorted", 1) != 1:
        faults.append(f"{name} is not sorted: TensorRT refuses it")
    if _attribute(node, "largest", 1) != 1:
        faults.append(f"{name} takes the smallest: a selection keeps the largest")
    if node.input[1] not in known:
        faults.append(f"{name} has a k that is computed at run time")
        return None
    k = int(numpy_helper.to_array(known[node.input[1]]).item())
    if k > MAX_K:
        faults.append(f"{name} has k = {k}, beyond {MAX_K}")
    return k


def _lint_counts(counts: Counter[int], plan: Plan) -> list[str]:
    """A method that selects by score has, per stage, a TopK for the tokens it keeps; no k may be foreign to the plan.

    A stage whose TopK has another k than the tokens it hands on says so in `static["top_k"]`, 0 for none.
    """
    known = {n for stage in plan.stages for n in (stage.tokens_in, stage.tokens_out, *stage.static.values())}
    faults = [f"a TopK has k = {k}, a number the plan does not have" for k in sorted(counts) if k not in known]
    if counts:
        wanted = Counter(stage.static.get("top_k", stage.tokens_out) for stage in plan.stages)
        faults += [
            f"the plan keeps {k} tokens at {n} stage(s), the graph has {counts[k]} TopK of that k"
            for k, n in wanted.items()
            if k and counts[k] < n
        ]
    return faults


def _lint_outputs(model: onnx.ModelProto, plan: Plan) -> list[str]:
    faults: list[str] = []
    outputs = {output.name: output.type.tensor_type for output in model.graph.output}
    names = list(outputs)
    expected = list(output_names(plan))
    if names != expected:
        return [f"the outputs are {names}, not {expected}"]
    for name in expected[1:]:
        stage = plan.stages[int(name.split("_")[1]) - 1]
        tokens = stage.tokens_out if name.startswith("kept") else stage.tokens_in
        kind = outputs[name]
        dims = [d.dim_value if d.HasField("dim_value") else d.dim_param for d in kind.shape.dim]
        if kind.elem_type != onnx.TensorProto.INT32:
            faults.append(f"{name} is not int32")
        if len(dims) != 2 or dims[1] != tokens:
            faults.append(f"{name} has shape {dims}, the plan has {tokens} tokens there")
        if dims and isinstance(dims[0], int) and dims[0] > 0:
            faults.append(f"{name} has a fixed batch of {dims[0]}")
    return faults
