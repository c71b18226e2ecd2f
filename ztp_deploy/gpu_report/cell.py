"""One cell of the GPU report: the open plans of a group timed against each other at one batch."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

from ztp_deploy.evidence.latency import Runnable, interleave, paired_ratio
from ztp_deploy.gpu_report import runtimes
from ztp_deploy.gpu_report.rows import Row
from ztp_deploy.gpu_report.runtimes import Opened

Way = tuple[str, bool]
"""A plan's label, and whether it is replayed from a CUDA graph."""


def measure_cell(
    bases: dict[str, Row],
    opened: dict[str, Opened],
    twins: dict[str, str],
    *,
    device: str,
    batch: int,
    side: int,
    seconds: float,
) -> list[Row]:
    """The rows of one cell, run plainly and replayed: those of `opened` measured, the others as their base says.

    `bases`: by label a row without figures. `twins`: the labels of slice twins. `side`: of the images, in pixels.
    """
    rows = {(label, False): base for label, base in bases.items()}
    if not opened:
        return list(rows.values())
    try:
        generator = torch.Generator().manual_seed(0)
        images = torch.randn(batch, 3, side, side, generator=generator).to(device)
        runs: dict[Way, Runnable] = {(label, False): one for label, one in opened.items()}
        for label, one in opened.items():
            way, base = (label, True), bases[label].model_copy(update={"cuda_graph": True})
            try:
                replayed = runtimes.recorded(one, images)
            except Exception as error:  # what cannot be recorded can still be run
                rows[way] = _failed(base, error)
                continue
            if replayed is not None:
                runs[way], rows[way] = replayed, base
        named = {_named(way): run for way, run in runs.items()}
        with torch.inference_mode():
            times = interleave(
                named,
                dict.fromkeys(named, images),
                seconds,
                np.random.default_rng(0),
                lambda share: None,
                runtimes.stopwatch_for(device),
                settling=0.0,
            )
    except Exception as error:  # out of memory, a kernel that is not there: the cell says so, the next goes on
        return [_failed(row, error) if label in opened else row for (label, _), row in rows.items()]
    sittings = {name: [taken] for name, taken in times.items()}
    for way in runs:
        label, replayed_too = way
        milliseconds = np.array(times[_named(way)]) * 1e3
        update: dict[str, Any] = {
            "milliseconds": [round(float(value), 4) for value in milliseconds],
            "median": float(np.median(milliseconds)),
            "p90": float(np.percentile(milliseconds, 90)),
            "images_per_second": batch / float(np.median(milliseconds)) * 1e3,
        }
        for ratio, reference in (("speedup", "dense"), ("of_twin", twins.get(label, ""))):
            other = (reference, replayed_too)
            if other in runs and label != reference:
                update[ratio] = paired_ratio(_named(way), _named(other), batch, sittings)
        rows[way] = rows[way].model_copy(update=update)
    return list(rows.values())


def _failed(row: Row, error: Exception) -> Row:
    return row.model_copy(update={"status": "failed", "reason": runtimes.reason(error)})


def _named(way: Way) -> str:
    """What a way is called among those that are timed against each other."""
    return f"{way[0]}, CUDA graph" if way[1] else way[0]
