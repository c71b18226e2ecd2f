"""An ONNX graph parsed into a strongly typed network, its refusals made readable, its types checked."""

from __future__ import annotations

import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

import onnx

from ztp_deploy.backends.tensorrt.graph import QUANTISED, low_products
from ztp_deploy.backends.tensorrt.library import member
from ztp_deploy.errors import BuildFailed, GateFailed

if TYPE_CHECKING:
    import tensorrt

_IMPORTER = re.compile(r"(?:import|check)(\w+)")


def parse(
    trt: Any, builder: tensorrt.Builder, log: tensorrt.ILogger, model: onnx.ModelProto, path: Path
) -> tuple[tensorrt.INetworkDefinition, tensorrt.OnnxParser]:
    """The network and its parser, which must live as long as the network: it holds the weights.

    `path` is where the graph came from; weights outside the file are looked for beside it.
    Raises BuildFailed that names node and cause.
    """
    # Release 11 renumbered the flag and knows no other kind of network; 10 needs it said.
    typed = member(trt.NetworkDefinitionCreationFlag, "STRONGLY_TYPED", "Precision written into the graph")
    network: tensorrt.INetworkDefinition = builder.create_network(1 << int(typed))
    parser: tensorrt.OnnxParser = trt.OnnxParser(network, log)
    if not parser.parse(model.SerializeToString(), str(path)):
        raise _refusal(parser, model)
    return network, parser


def _refusal(parser: tensorrt.OnnxParser, model: onnx.ModelProto) -> BuildFailed:
    if not parser.num_errors:
        return BuildFailed("TensorRT's parser refuses the graph without giving a reason.", "Export it again.")
    error: tensorrt.ParserError = parser.get_error(0)
    operator, names = error.node_operator(), [error.node_name()] if error.node_name() else []
    importer = _IMPORTER.search(error.func())
    if not operator and importer:  # an importer that fails early does not say which node it was at
        operator = importer[1]
        names = [node.name for node in model.graph.node if node.op_type == operator]
    where = f"{operator or 'a'} node" + (f" {', '.join(map(repr, names[:3]))}" if names else "")
    reason = error.desc() if error.desc() not in ("", "false") else f"not supported ({error.func()})"
    more = f" ({parser.num_errors - 1} more)" if parser.num_errors > 1 else ""
    return BuildFailed(
        f"TensorRT's parser refuses {where}: {reason}{more}.",
        "Rewrite the method's stage in the allowed operators (ztp_deploy/exporters/vocabulary.py).",
    )


def check_precision(trt: Any, network: tensorrt.INetworkDefinition, model: onnx.ModelProto, precision: str) -> int:
    """How many matrix products the network computes in `precision`, before anything is built.

    Raises GateFailed where one that the graph has in that type turned into another, or where there is none.
    """
    kinds = {
        "fp32": trt.DataType.FLOAT,
        "fp16": trt.DataType.HALF,
        "bf16": trt.DataType.BF16,
        "int8": trt.DataType.INT8,
        "fp8": trt.DataType.FP8,
    }
    products = (trt.LayerType.MATRIX_MULTIPLY, trt.LayerType.CONVOLUTION)
    asked = low_products(model, precision)
    layers: list[tensorrt.ILayer] = [network.get_layer(index) for index in range(network.num_layers)]
    producers = _producers(layers) if precision in QUANTISED else {}
    count, wrong = 0, []
    for layer in layers:
        if layer.type not in products:
            continue
        kind = _computed_in(trt, layer, producers)
        matches = kind == kinds[precision]
        count += matches
        if not matches and (precision == "fp32" or layer.name in asked):
            wrong.append(f"{layer.name} ({kind.name.lower()})")
    if wrong or not count or count < len(asked):
        found = f"only {count} of {len(asked)} matrix products are"
        if wrong:
            found = f"{wrong[0]} and {len(wrong) - 1} more are not"
        elif not asked:
            found = "no matrix product is"
        raise GateFailed(
            f"{precision} was asked for, but in TensorRT's network {found}.",
            "Export the graph in that precision again.",
        )
    return count


def _producers(layers: list[tensorrt.ILayer]) -> dict[str, tensorrt.ILayer]:
    return {layer.get_output(index).name: layer for layer in layers for index in range(layer.num_outputs)}


def _computed_in(trt: Any, product: tensorrt.ILayer, producers: dict[str, tensorrt.ILayer]) -> Any:
    """What a product's operands were quantised to where both were to the same type, else the type of its result."""
    if producers and product.num_inputs > 1:
        stored = [_stored_in(trt, product.get_input(index), producers) for index in (0, 1)]
        if stored[0] is not None and stored[0] == stored[1]:
            return stored[0]
    return product.get_output(0).dtype


def _stored_in(trt: Any, operand: tensorrt.ITensor, producers: dict[str, tensorrt.ILayer]) -> Any:
    """The type that a dequantised operand comes from; None for any other. The parser gives weights a new shape."""
    layer = producers.get(operand.name)
    while layer is not None and layer.type == trt.LayerType.SHUFFLE:
        layer = producers.get(layer.get_input(0).name)
    if layer is None or layer.type != trt.LayerType.DEQUANTIZE:
        return None
    return layer.get_input(0).dtype
