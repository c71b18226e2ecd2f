"""Runs as observations: what eager PyTorch or an engine did with each image."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from ztp_deploy.backends.batches import filled_batches
from ztp_deploy.evidence.selection import Observation
from ztp_deploy.exporters.graph import InferenceGraph

Advance = Callable[[int], None]
Run = Callable[[NDArray[Any]], Mapping[str, NDArray[Any]]]


def no_progress(count: int) -> None:
    """The progress callback of those who do not ask."""


def observe_eager(
    graph: InferenceGraph,
    pixels: NDArray[Any],
    *,
    batch: int = 8,
    forced: Sequence[NDArray[Any]] | None = None,
    advance: Advance = no_progress,
) -> Observation:
    """What eager PyTorch does with images [M, 3, H, W], with its scores.

    It is made to choose as `Observation.forced` says where that is given.
    """
    parts: list[tuple[NDArray[Any], ...]] = []
    for start in range(0, len(pixels), batch):
        chunk = slice(start, start + batch)
        instead = None if forced is None else [torch.from_numpy(one[chunk].copy()) for one in forced]
        with torch.inference_mode():
            values = graph.audited(torch.from_numpy(np.ascontiguousarray(pixels[chunk])), instead)
        parts.append(tuple(value.numpy() for value in values))
        advance(len(pixels[chunk]))
    columns = [np.concatenate(column) for column in zip(*parts, strict=True)]
    return Observation.of(dict(zip((*graph.output_names, *graph.audit_names), columns, strict=True)))


def observe(
    run: Run, pixels: NDArray[Any], names: Sequence[str], batch: int, smallest: int, advance: Advance = no_progress
) -> Observation:
    """What an engine does with images [M, 3, H, W]: of the outputs of `run` (a runner's or its audit) those named.

    Batches are of `batch` images, the last image repeated where fewer than `smallest` are left.
    """
    columns: dict[str, list[NDArray[Any]]] = {name: [] for name in names}
    for chunk, count in filled_batches(pixels, batch, smallest):
        result = run(chunk)
        for name in names:
            columns[name].append(result[name][:count])
        advance(count)
    return Observation.of({name: np.concatenate(values) for name, values in columns.items()})
