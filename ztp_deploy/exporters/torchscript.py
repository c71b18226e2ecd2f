"""TorchScript by tracing: one frozen module with two methods, `forward` and `audited`."""

from __future__ import annotations

import io
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from ztp_deploy.errors import GateFailed
from ztp_deploy.exporters.graph import InferenceGraph

SUMMARY = "traced and frozen, dynamic batch; runs wherever libtorch does"
PRECISIONS: tuple[str, ...] = ("fp32",)
PACKAGES: tuple[str, ...] = ()
OPSET: int | None = None
GRAPH_FILE = "model.ts"

FORBIDDEN = {
    "aten::nonzero": "its result has a dynamic shape",
    "aten::scatter": "token writes depend on order",
    "aten::scatter_": "token writes depend on order",
    "aten::index_put": "token writes depend on order",
    "aten::index_put_": "token writes depend on order",
    "aten::gather": "index_select on row-flattened tokens does the same",
    "aten::topk": "it leaves ties open; a stable sort does not",
    "prim::If": "control flow keeps the graph from being optimised",
    "prim::Loop": "control flow keeps the graph from being optimised",
}


def write(graph: InferenceGraph, directory: Path, image_batch: int, precision: str) -> None:
    """Writes `model.ts`. Raises GateFailed where the trace holds a forbidden operator."""
    example = graph.example(image_batch)
    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore")  # torch announces TorchScript's retirement and comments on constant shapes
        traced = torch.jit.trace_module(graph, {"forward": example, "audited": example}, check_trace=False)
        frozen = torch.jit.freeze(traced.eval(), preserved_attrs=["audited"])
        kinds = {node.kind() for node in nodes_of(frozen.graph)}
        faults = sorted(f"{kind}: {FORBIDDEN[kind]}" for kind in kinds & FORBIDDEN.keys())
        if faults:
            raise GateFailed(
                f"The trace breaks the op vocabulary: {'; '.join(faults)}.",
                "Nothing was kept. Rewrite the method's stage in the allowed operators.",
            )
        # Through memory: torch's own file writer aborts the process on a full disk.
        buffer = io.BytesIO()
        torch.jit.save(frozen, buffer)
    (directory / GRAPH_FILE).write_bytes(buffer.getbuffer())


def nodes_of(graph: Any) -> Iterator[Any]:
    """The nodes of a TorchScript graph and of the blocks in it."""
    for node in graph.nodes():
        yield node
        for block in node.blocks():
            yield from nodes_of(block)
