"""A function on CUDA tensors recorded as CUDA graphs, one a shape: replayed, its kernels need no launch each."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Generic, TypeVar

if TYPE_CHECKING:
    import torch
    from torch import Tensor

Outputs = TypeVar("Outputs")

_WARM_UPS = 3
_ONE_AT_A_TIME = threading.Lock()


@contextmanager
def capture(stream: Any) -> Iterator[Any]:
    """The graph of what is put into the stream meanwhile.

    One at a time in the process, as torch wants it; what other threads do on the device meanwhile does not spoil it.
    """
    import torch

    graph = torch.cuda.CUDAGraph()
    # The outer stream is the caller's: after a failure torch leaves the other one in its place.
    with (
        _ONE_AT_A_TIME,
        torch.cuda.stream(torch.cuda.current_stream(stream.device)),
        torch.cuda.graph(graph, stream=stream, capture_error_mode="thread_local"),
    ):
        yield graph


class Turns:
    """Buffers used from several streams, one call at a time: a call waits for what the stream before was given."""

    def __init__(self) -> None:
        self._last: Any = None

    def take(self, device: torch.device) -> None:
        """To be called before the caller's current stream touches the buffers."""
        import torch

        stream = torch.cuda.current_stream(device)
        if self._last is not None and self._last != stream:
            stream.wait_stream(self._last)
        self._last = stream


@dataclass(frozen=True)
class _Recording(Generic[Outputs]):
    """A graph, the buffer it reads and the buffers it writes."""

    graph: Any
    images: Tensor
    outputs: Outputs


class Recorder(Generic[Outputs]):
    """Runs `compute` once per shape of images under a recording, and replays that from then on.

    `compute` must not wait for the device. Calls must come one at a time. The outputs are the recording's own buffers:
    the next call of the same shape writes to them, on another stream after all that this one was given until then.
    Every recording keeps the memory of its whole computation until the recorder goes: for few shapes.
    """

    def __init__(self, compute: Callable[[Tensor], Outputs]) -> None:
        self._compute = compute
        self._recordings: dict[tuple[torch.Size, torch.dtype], _Recording[Outputs]] = {}
        self._turns = Turns()

    def __call__(self, images: Tensor) -> Outputs:
        """Images on the device → the outputs of `compute` for them."""
        self._turns.take(images.device)
        key = (images.shape, images.dtype)
        recording = self._recordings.get(key)
        if recording is None:
            recording = self._recordings[key] = self._record(images)
        recording.images.copy_(images)
        recording.graph.replay()
        return recording.outputs

    def _record(self, images: Tensor) -> _Recording[Outputs]:
        import torch

        buffer = images.clone()
        caller = torch.cuda.current_stream(images.device)
        side: torch.cuda.Stream = torch.cuda.Stream(images.device)  # type: ignore[no-untyped-call]
        side.wait_stream(caller)
        with torch.cuda.stream(side):  # what the first runs set up cannot be recorded
            for _ in range(_WARM_UPS):
                self._compute(buffer)
        caller.wait_stream(side)
        with capture(side) as graph:
            outputs = self._compute(buffer)
        return _Recording(graph, buffer, outputs)
