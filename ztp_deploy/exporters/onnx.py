"""ONNX by torch's dynamo exporter: one file, dynamic batch, linted; audit scores stay inside as named tensors."""

from __future__ import annotations

from pathlib import Path

import onnx
import torch

from ztp_deploy.errors import GateFailed
from ztp_deploy.exporters import attention, precision, vocabulary
from ztp_deploy.exporters.files import GRAPH_FILE, WEIGHTS_FILE
from ztp_deploy.exporters.fold import fold_constants
from ztp_deploy.exporters.graph import AuditedGraph, InferenceGraph
from ztp_deploy.plan import Plan
from ztp_deploy.quiet import quiet

SUMMARY = "dynamic batch; what ONNX Runtime, TensorRT and OpenVINO engines are built from"
PRECISIONS: tuple[str, ...] = precision.PRECISIONS
PACKAGES: tuple[str, ...] = ("onnx", "onnxscript", "onnx-ir")
OPSET: int | None = 18
"""Of the traced float32 graph; bf16 needs a later one."""
_PROTOBUF_LIMIT = 1_900_000_000
"""Bytes; one message holds 2 GB at most."""


def write(graph: InferenceGraph, directory: Path, image_batch: int, precision: str) -> None:
    """Writes `model.onnx` (and `model.onnx.data` beyond protobuf's 2 GB).

    The graph is traced with the audit scores as outputs; these are then taken off the list of outputs
    but keep their names inside, so that an audit can ask the very same graph for them.
    Raises GateFailed where the graph breaks the vocabulary.
    """
    model = _traced(graph, image_batch)
    del model.graph.output[len(graph.output_names) :]
    model.doc_string = f"{graph.pruned.source.name} {graph.pruned.plan.label}, exported by ztp_deploy"
    _save(model, graph.pruned.plan, directory, precision)


def convert(source: Path, plan: Plan, directory: Path, precision: str) -> None:
    """Writes the float32 graph of the folder `source` in another precision. Raises GateFailed as `write` does."""
    _save(onnx.load(str(source / GRAPH_FILE)), plan, directory, precision)


def _save(model: onnx.ModelProto, plan: Plan, directory: Path, wanted: str) -> None:
    model = precision.lower(model, wanted)
    path = directory / GRAPH_FILE
    vocabulary.check(model, plan, path)
    save(model, path)
    onnx.checker.check_model(str(path), full_check=False)


def save(model: onnx.ModelProto, path: Path) -> None:
    """Writes a graph, and its weights into `model.onnx.data` beside it where one message cannot hold them."""
    onnx.save_model(model, path, save_as_external_data=outgrows_message(model), location=WEIGHTS_FILE)


def outgrows_message(model: onnx.ModelProto) -> bool:
    """Whether the weights have to lie in a file beside the graph; one beyond 2 GB cannot even be asked for its size."""
    return sum(len(weights.raw_data) for weights in model.graph.initializer) > _PROTOBUF_LIMIT


def with_audit(model: onnx.ModelProto, names: tuple[str, ...]) -> onnx.ModelProto:
    """The same graph with the named inner tensors as further outputs. Raises GateFailed where one is missing."""
    known = {name for node in model.graph.node for name in node.output}
    missing = [name for name in names if name not in known]
    if missing:
        raise GateFailed(f"The graph has no tensor {missing[0]!r} to audit.", "Export the model again.")
    audited = onnx.ModelProto()
    audited.CopyFrom(model)
    audited.graph.output.extend(
        onnx.helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, None) for name in names
    )
    return audited


def _traced(graph: InferenceGraph, image_batch: int) -> onnx.ModelProto:
    names = [*graph.output_names, *graph.audit_names]
    with quiet("torch.onnx", "onnxscript", "onnx_ir"), torch.inference_mode(False), torch.no_grad():
        program = torch.onnx.export(
            AuditedGraph(graph),
            (graph.example(image_batch),),
            dynamo=True,
            opset_version=OPSET,
            input_names=["images"],
            output_names=names,
            dynamic_shapes={"images": {0: torch.export.Dim("batch")}},
            external_data=False,
            verbose=False,
            custom_translation_table=attention.translations(),
        )
        assert program is not None
        attention.simplify(program.model)
    model = fold_constants(program.model_proto)
    # Traces of Python source in the metadata would put the builder's paths into the file.
    for node in model.graph.node:
        del node.metadata_props[:]
        node.doc_string = ""
    del model.graph.metadata_props[:]
    return model
