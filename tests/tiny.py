"""Small models and inputs, and ways to damage what was built."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import onnx
import torch

import ztp_deploy as ztp
from ztp_deploy.evidence.selection import Observation
from ztp_deploy.manifest import EngineManifest, hash_files, read_manifest, write_manifest
from ztp_deploy.models.base import ModelSize
from ztp_deploy.pruning.prune import PrunedModel

SIZE = ModelSize(img_size=96, depth=4, embed_dim=48, num_heads=3, num_classes=10)

OPTIONS: dict[str, dict[str, object]] = {"dynamicvit": {"weights": "random"}}
"""Methods that need options where there is no checkpoint for them."""


def model(name: str = "deit_t", size: ModelSize = SIZE) -> torch.nn.Module:
    """A small model with seeded random weights."""
    return ztp.load_model(name, weights="random", overrides=size)


def images(count: int, size: int = 96, seed: int = 0) -> np.ndarray:
    """Noise images [count, 3, size, size], float32."""
    return np.random.default_rng(seed).standard_normal((count, 3, size, size), dtype=np.float32)


def observe(pruned: PrunedModel, images: torch.Tensor, forced: Sequence[torch.Tensor] | None = None) -> Observation:
    """A run as the parity gate sees it."""
    with torch.inference_mode():
        outputs = pruned.run(images, forced)
    scores = {
        f"{name}_{index}": value.numpy().copy()
        for index, stage in enumerate(outputs.scores, start=1)
        for name, value in stage.items()
    }
    kept, merged = ([one.numpy().copy() for one in many] for many in (outputs.kept, outputs.merged))
    return Observation(outputs.logits.numpy(), kept, merged, scores)


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
