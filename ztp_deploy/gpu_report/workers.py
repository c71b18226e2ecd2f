"""Plans of the GPU report built and proved side by side, each in a process of its own: one that crashes is one row."""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable, Mapping
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from multiprocessing import get_context
from typing import Literal

import torch
from torch import nn

from ztp_deploy import environment
from ztp_deploy.evidence.images import ImageSet
from ztp_deploy.gpu_report.runtimes import Job, failure, open_job
from ztp_deploy.models import RandomWeightsWarning

Failure = tuple[Literal["missing", "failed"], str] | None
"""The status of the row and the reason; None where it works."""
JobOf = Callable[[nn.Module], Job]
Load = Callable[[], nn.Module]


def side_by_side(jobs: Mapping[str, JobOf], load: Load, images: ImageSet, workers: int) -> dict[str, Failure]:
    """Builds and proves every job, `workers` at a time, and says what failed, by label.

    All arguments must be what `pickle` takes. What is done stays: engines stand, and compilers have their caches.
    """

    def alone(job: JobOf) -> Failure:
        # Not forked: CUDA cannot be used in a process that was forked from one that uses it.
        with ProcessPoolExecutor(1, get_context("spawn"), _share_cores, (workers,)) as process:
            try:
                return process.submit(_prepare, job, load, images).result()
            except BrokenProcessPool:
                return "failed", "The process that built it ended abruptly: it crashed, or the memory was short."

    with ThreadPoolExecutor(workers) as threads:
        return dict(zip(jobs, threads.map(alone, jobs.values()), strict=True))


def _share_cores(workers: int) -> None:
    share = max(1, environment.usable_cores() // workers)
    torch.set_num_threads(share)
    os.environ["TORCHINDUCTOR_COMPILE_THREADS"] = str(share)


def _prepare(job: JobOf, load: Load, images: ImageSet) -> Failure:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", RandomWeightsWarning)  # every row says what its weights are
            model = load()
        opened = open_job(job(model))
        try:
            opened.edges(images)
        finally:
            opened.close()
    except Exception as error:  # six runtimes, each with exceptions of its own
        return failure(error)
    return None
