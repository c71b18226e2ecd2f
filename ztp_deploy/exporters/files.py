"""Names of an ONNX artifact's files, for whoever opens it without the library that writes it."""

from __future__ import annotations

GRAPH_FILE = "model.onnx"
WEIGHTS_FILE = "model.onnx.data"
"""Beside the graph, where one protobuf message cannot hold it."""
