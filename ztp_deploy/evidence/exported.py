"""An exported graph at work as it stands, before any engine changes it: the middle of the parity gate."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from ztp_deploy.backends.base import Runner
from ztp_deploy.backends.onnxruntime import backend as onnxruntime
from ztp_deploy.errors import BadRequest
from ztp_deploy.exporters import Artifact, torch_export


class _Program:
    """A torch.export program, operator by operator on the CPU."""

    def __init__(self, artifact: Artifact) -> None:
        self._names = (*artifact.manifest.outputs, *artifact.manifest.audit)
        self._module: Any = torch_export.read(artifact.directory / torch_export.GRAPH_FILE).module()

    def run(self, images: NDArray[Any]) -> dict[str, NDArray[Any]]:
        """All outputs, the scores among them."""
        with torch.no_grad():
            values = self._module(torch.from_numpy(np.ascontiguousarray(images)))
        return {name: value.numpy() for name, value in zip(self._names, values, strict=True)}

    audit = run


def _nodes(artifact: Artifact) -> Runner:
    return onnxruntime.open_unoptimised(artifact.directory, artifact.manifest)


RUNNERS: dict[str, Callable[[Artifact], Runner]] = {"onnx": _nodes, "torch_export": _Program}
"""By format; one that is not here is the engine's own file."""


def open_exported(artifact: Artifact) -> Runner:
    """The graph opened on the CPU. Raises BadRequest where nothing runs it, and what its library raises."""
    name = artifact.manifest.format
    if name not in RUNNERS:
        raise BadRequest(f"Nothing runs a {name} graph but the engine made of it.", "Check the engine.")
    return RUNNERS[name](artifact)
