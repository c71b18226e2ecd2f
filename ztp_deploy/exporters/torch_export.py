"""`torch.export`: one ExportedProgram, dynamic batch; what AOTInductor compiles."""

from __future__ import annotations

import io
import warnings
from importlib import import_module
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.export import Dim, ExportedProgram

from ztp_deploy.errors import DamagedFiles, GateFailed, first_line
from ztp_deploy.exporters.graph import AuditedGraph, InferenceGraph
from ztp_deploy.exporters.lower import join_stages, lower

SUMMARY = "torch.export's program, dynamic batch; what AOTInductor engines are built from"
PRECISIONS: tuple[str, ...] = ("fp32", "fp16", "bf16")
PACKAGES: tuple[str, ...] = ()
OPSET: int | None = None
GRAPH_FILE = "model.pt2"

FORBIDDEN = {
    "aten::nonzero": "its result has a dynamic shape",
    "aten::masked_select": "its result has a dynamic shape",
    "aten::index": "index_select on row-flattened tokens does the same",
    "aten::gather": "index_select on row-flattened tokens does the same",
    "aten::scatter": "token writes depend on order",
    "aten::scatter_add": "token writes depend on order",
    "aten::scatter_reduce": "token writes depend on order",
    "aten::index_put": "token writes depend on order",
    "aten::index_add": "token writes depend on order",
    "aten::topk": "it leaves ties open; a stable sort does not",
    "aten::sort": "it leaves ties open; a stable sort does not",
    "aten::argsort": "it leaves ties open; a stable sort does not",
    "cond": "control flow keeps the graph from being optimised",
    "while_loop": "control flow keeps the graph from being optimised",
}
_STABLE = frozenset({"aten::sort.stable"})


def write(graph: InferenceGraph, directory: Path, image_batch: int, precision: str) -> None:
    """Writes `model.pt2`, whose outputs are the graph's own, then the audit scores.

    Raises GateFailed where the program holds a forbidden operator.
    """
    program = _traced(join_stages(lower(graph, precision)), image_batch)
    faults = sorted({f"{kind}: {FORBIDDEN[kind]}" for kind in map(_kind, _calls(program)) if kind in FORBIDDEN})
    if faults:
        raise GateFailed(
            f"The program breaks the op vocabulary: {'; '.join(faults)}.",
            "Nothing was kept. Rewrite the method's stage in the allowed operators.",
        )
    # Through memory: torch's own file writer aborts the process on a full disk.
    buffer = io.BytesIO()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.export.save(program, buffer)
    (directory / GRAPH_FILE).write_bytes(buffer.getbuffer())


def read(path: Path) -> ExportedProgram:
    """The program in a file, which is code: load only what you exported. Raises DamagedFiles."""
    import_module("ztp_deploy.methods.zero_tprune_op")  # programs hold its operator by name
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return torch.export.load(io.BytesIO(path.read_bytes()))
    except Exception as error:  # a damaged archive raises anything
        reason = first_line(error)
        raise DamagedFiles(f"torch cannot open {path}: {reason}.", "Export the model again.") from error


def _traced(graph: InferenceGraph, image_batch: int) -> ExportedProgram:
    return export_module(AuditedGraph(graph), graph.example(image_batch), Dim("batch", min=1))


def export_module(module: nn.Module, example: torch.Tensor, batch: Any) -> ExportedProgram:
    """The program of a module whose one input has the batch on its first axis: a `Dim`, or None for a fixed one.

    It names no file of this machine.
    """
    with warnings.catch_warnings(), torch.inference_mode(False), torch.no_grad():
        warnings.simplefilter("ignore")
        shapes = None if batch is None else ({0: batch},)
        program = torch.export.export(module, (example,), dynamic_shapes=shapes)
    for graph_module in program.graph_module.modules():
        for node in getattr(graph_module, "graph", program.graph).nodes:
            node.meta.pop("stack_trace", None)
    return program


def _calls(program: ExportedProgram) -> list[Any]:
    modules = [module for module in program.graph_module.modules() if isinstance(module, torch.fx.GraphModule)]
    return [node.target for module in modules for node in module.graph.nodes if node.op == "call_function"]


def _kind(target: Any) -> str:
    """`aten::sort` for an unstable sort, the operator's own name where it is another."""
    name = str((getattr(target, "_schema", None) and target.name()) or getattr(target, "__name__", target))
    return name if name in _STABLE else name.split(".")[0].removesuffix("_")
