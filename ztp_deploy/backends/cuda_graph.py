"""A function on CUDA tensors recorded as CUDA graphs, one a shape: replayed, its kernels need no launch each."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

import torch
from torch import Tensor

Outputs = TypeVar("Outputs")

_WARM_UPS = 3


@dataclass(frozen=True)
class _Recording(Generic[Outputs]):
    """A graph, the buffer it reads and the buffers it writes."""

    graph: Any
    images: Tensor
    outputs: Outputs


class Recorder(Generic[Outputs]):
    """Runs `compute` once per shape of images under a recording, and replays that from then on.

    `compute` must not wait for the device. Calls must come one at a time and from one stream at a time. The outputs
    are the recording's own buffers: the next call of the same shape writes to them.
    """

    def __init__(self, compute: Callable[[Tensor], Outputs]) -> None:
        self._compute = compute
        self._recordings: dict[tuple[torch.Size, torch.dtype], _Recording[Outputs]] = {}

    def __call__(self, images: Tensor) -> Outputs:
        """Images on the device → the outputs of `compute` for them."""
        key = (images.shape, images.dtype)
        recording = self._recordings.get(key)
        if recording is None:
            recording = self._recordings[key] = self._record(images)
        recording.images.copy_(images)
        recording.graph.replay()
        return recording.outputs

    def _record(self, images: Tensor) -> _Recording[Outputs]:
        buffer = images.clone()
        caller = torch.cuda.current_stream(images.device)
        side: torch.cuda.Stream = torch.cuda.Stream(images.device)  # type: ignore[no-untyped-call]
        side.wait_stream(caller)
        with torch.cuda.stream(side):  # what the first runs set up cannot be recorded
            for _ in range(_WARM_UPS):
                self._compute(buffer)
        caller.wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            outputs = self._compute(buffer)
        return _Recording(graph, buffer, outputs)
