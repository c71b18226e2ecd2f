"""Small models and inputs, and ways to damage what was built."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from google.protobuf.message import EncodeError

import ztp_deploy as ztp
from ztp_deploy.exporters.precision import matrix_nodes
from ztp_deploy.manifest import EngineManifest, hash_files, read_manifest, write_manifest
from ztp_deploy.source import ModelSize

SIZE = ModelSize(img_size=96, depth=4, embed_dim=48, num_heads=3, num_classes=10)

OPTIONS: dict[str, dict[str, object]] = {"dynamicvit": {"weights": "random"}}
"""Methods that need options where there is no checkpoint for them."""


def model(name: str = "deit_t", size: ModelSize = SIZE) -> torch.nn.Module:
    """A small model with seeded random weights."""
    return ztp.load_model(name, weights="random", overrides=size)


def images(count: int, size: int = 96, seed: int = 0) -> np.ndarray:
    """Noise images [count, 3, size, size], float32."""
    return np.random.default_rng(seed).standard_normal((count, 3, size, size), dtype=np.float32)


def reseal(directory: Path, **changes: object) -> None:
    """Makes an engine's manifest fit its changed files, as a builder that went wrong would have left it."""
    manifest = read_manifest(directory, EngineManifest)
    write_manifest(manifest.model_copy(update={"files": hash_files(directory), **changes}), directory)


def damage_graph(directory: Path, change: Callable[[onnx.ModelProto], None]) -> None:
    """Changes an engine's ONNX graph and reseals the manifest."""
    path = directory / "model.onnx"
    graph = onnx.load(str(path))
    change(graph)
    onnx.save_model(graph, str(path))
    reseal(directory)


def hold_messages_to(size: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Graphs with more bytes of weights are neither serialised nor measured, as protobuf does beyond 2 GB."""
    for name in ("SerializeToString", "ByteSize"):
        genuine = getattr(onnx.ModelProto, name)

        def refuse(model: onnx.ModelProto, genuine: Callable[..., object] = genuine) -> object:
            if sum(len(tensor.raw_data) for tensor in model.graph.initializer) > size:
                raise EncodeError("Failed to serialize proto")
            return genuine(model)

        monkeypatch.setattr(onnx.ModelProto, name, refuse)


def matrix_types(model: onnx.ModelProto) -> Counter[str]:
    """How many matrix products the graph computes in each element type."""
    return Counter(onnx.TensorProto.DataType.Name(kind).lower() for _, kind in matrix_nodes(model))
