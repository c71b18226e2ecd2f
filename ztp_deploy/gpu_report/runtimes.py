"""What the GPU report compares: eager PyTorch, torch.compile and every engine, behind one face on the device."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from ztp_deploy import backends, environment
from ztp_deploy.backends.base import OnGpu, Session
from ztp_deploy.backends.cuda_graph import Recorder
from ztp_deploy.backends.settings import parse
from ztp_deploy.errors import GateFailed, MissingSoftware, ZtpError
from ztp_deploy.evidence.images import DEFAULT_ORIGIN, ImageSet
from ztp_deploy.evidence.latency import Stopwatch, wall_clock
from ztp_deploy.evidence.parity import Edge, check_parity, compare_with_eager, proof_of
from ztp_deploy.exporters import check_precision
from ztp_deploy.exporters.graph import InferenceGraph
from ztp_deploy.exporters.lower import join_stages, lower
from ztp_deploy.exporters.precision import PRECISIONS as FLOATING
from ztp_deploy.plan import Plan
from ztp_deploy.pruning.prune import prune
from ztp_deploy.workflow.progress import Clock, Silent
from ztp_deploy.workflow.requests import BuildRequest
from ztp_deploy.workflow.steps import engine_for

IN_PROCESS = ("eager", "torch_compile")
RUNTIMES = (*IN_PROCESS, *(name for name in backends.BACKENDS if backends.get(name).GPU_REPORT))
_REPLAYED_ALIKE = 1e-2


@dataclass(frozen=True)
class Job:
    """What is to be opened: a plan of a model in one precision on `cuda` or `cpu`, for batches up to `max_batch`."""

    model: nn.Module
    plan: Plan
    runtime: str
    precision: str
    device: str
    max_batch: int
    export_root: Path
    engines_root: Path


class OnDevice(Protocol):
    """What runs on the device."""

    def run(self, images: Tensor) -> Tensor:
        """Images [B, 3, H, W] on the device → float32 logits [B, classes]; all outputs stay there."""


class Opened(OnDevice, Protocol):
    """A plan at work on the device; `calibration` is what its numbers were fitted to, None where they were not."""

    calibration: str | None

    def edges(self, images: ImageSet) -> list[Edge]:
        """Parity with eager PyTorch in float32 on the CPU."""

    def recording(self) -> OnDevice:
        """The same, replayed from CUDA graphs; closed together with this."""

    def close(self) -> None:
        """Frees it."""


def precisions_of(runtime: str) -> tuple[str, ...]:
    """The precisions that a runtime has anywhere."""
    return FLOATING if runtime in IN_PROCESS else backends.get(runtime).PRECISIONS


def treatment_of(runtime: str) -> OnGpu:
    """Whether its builds must have the GPU to themselves, and what records its runs as CUDA graphs.

    Eager PyTorch counts as built alone: there is nothing to build.
    """
    if runtime in IN_PROCESS:
        return OnGpu(built_alone=runtime == "eager")
    return backends.get(runtime).GPU_REPORT or OnGpu()


def unavailable(runtime: str, precision: str) -> str | None:
    """Why a runtime cannot be measured here in one of its precisions, as a sentence; None where it can."""
    if runtime in IN_PROCESS:
        return None
    try:
        module = backends.usable(runtime)
        check_precision(module.FORMAT, module.graph_precision(precision))
        module.check_target("cuda", precision, parse(module.Settings, {}, runtime))
    except ZtpError as error:
        return str(error)
    return None


def version_of(runtime: str) -> str:
    """The version of what runs; empty where it is not installed."""
    if runtime in IN_PROCESS:
        return environment.installed("torch") or ""
    module = backends.get(runtime)
    return "" if module.missing() else module.version()


def open_job(job: Job) -> Opened:
    """Exports, builds and opens what the job asks for; finished folders are used again.

    Raises ZtpError where it cannot be had.
    """
    return _Module(job) if job.runtime in IN_PROCESS else _Engine(job)


def recorded(opened: Opened, images: Tensor) -> OnDevice | None:
    """The plan replayed from a CUDA graph, None where the device has none.

    Raises GateFailed where a replay does not repeat what a plain run says of other images.
    """
    if images.device.type != "cuda":
        return None
    one = opened.recording()
    with torch.inference_mode():
        one.run(images)
        other = images.flip(0).flip(-1)
        plain, replayed = opened.run(other).clone(), one.run(other)
    far = (replayed - plain).abs().amax(1) > _REPLAYED_ALIKE * plain.std(1)
    if float(far.float().mean()) > 0.5:  # a near-tie may fall otherwise where kernels of other sizes are chosen
        raise GateFailed("The recorded CUDA graph does not repeat what a plain run says.", "It was not timed.")
    return one


class _Recorded:
    """A plan whose runs are replayed from a CUDA graph a shape, recorded from outside."""

    def __init__(self, opened: Opened) -> None:
        self._replay = Recorder(opened.run)

    def run(self, images: Tensor) -> Tensor:
        """As `Opened.run`; the logits are the recording's buffer."""
        return self._replay(images)


def stopwatch_for(device: str) -> Stopwatch:
    """CUDA events on a GPU, from an idle device to the end of the work; the wall clock on the CPU."""
    return _cuda_events if device == "cuda" else wall_clock


def _cuda_events(run: Callable[[], object]) -> float:
    start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    start.record()
    run()
    end.record()
    end.synchronize()
    return float(start.elapsed_time(end)) / 1e3


class _Module:
    """The pruned module itself, plain or through torch.compile, lowered as the torch.export format is."""

    calibration: str | None = None

    def __init__(self, job: Job) -> None:
        self._job = job
        graph = lower(InferenceGraph(prune(job.model, job.plan), "float32"), job.precision)
        graph = join_stages(graph).to(job.device)
        self._graph = graph
        self._forward: Callable[[Tensor], tuple[Tensor, ...]] = graph
        if job.runtime == "torch_compile":
            # All plans share the code of one class: by default the ninth variant would silently run eagerly.
            torch._dynamo.config.recompile_limit = 64
            self._forward = torch.compile(graph, dynamic=True, fullgraph=True)

    def run(self, images: Tensor) -> Tensor:
        with torch.inference_mode():
            return self._forward(images)[0]

    def edges(self, images: ImageSet) -> list[Edge]:
        pruned = prune(self._job.model, self._job.plan)
        return [compare_with_eager(pruned, _Runner(self), images, self._job.precision)]

    def recording(self) -> OnDevice:
        return _Recorded(self)

    def close(self) -> None:
        del self._graph, self._forward

    def outputs(self, images: NDArray[Any], audited: bool) -> dict[str, NDArray[Any]]:
        batch = torch.from_numpy(np.ascontiguousarray(images)).to(self._job.device)
        names = (*self._graph.output_names, *(self._graph.audit_names if audited else ()))
        with torch.inference_mode():
            values = self._graph.audited(batch) if audited else self._forward(batch)
        return {name: value.cpu().numpy() for name, value in zip(names, values, strict=True)}


class _Runner:
    """The module as the parity gate sees engines. Scores are those of the module before torch.compile."""

    def __init__(self, module: _Module) -> None:
        self._module = module

    def run(self, images: NDArray[Any]) -> dict[str, NDArray[Any]]:
        return self._module.outputs(images, audited=False)

    def audit(self, images: NDArray[Any]) -> dict[str, NDArray[Any]]:
        return self._module.outputs(images, audited=True)


class _Engine:
    """An engine of a back end, built into its canonical folder."""

    def __init__(self, job: Job) -> None:
        self._job = job
        request = BuildRequest(
            backend=job.runtime,
            device=job.device,
            precision=job.precision,
            batch=f"1:{job.max_batch}:{job.max_batch}",
            export_root=job.export_root,
            engines_root=job.engines_root,
        )
        self._engine = engine_for(job.model, job.plan, request, Clock(Silent()))  # the rows say what matters
        self.calibration = calibrated_on(self._engine.manifest.built)
        self._session = backends.load_engine(self._engine.directory)
        self._recording: Session | None = None

    def run(self, images: Tensor) -> Tensor:
        return self._session.run(images)

    def edges(self, images: ImageSet) -> list[Edge]:
        report = proof_of(self._engine)
        if report is None or report.images_sha256 != images.sha256:
            report = check_parity(self._engine, self._job.model, images)
        return report.edges

    def recording(self) -> OnDevice:
        if not treatment_of(self._job.runtime).records:
            return _Recorded(self)
        if self._recording is None:
            directory, manifest = self._engine.directory, self._engine.manifest
            settings = {**manifest.settings, "cuda_graph": True}
            manifest = manifest.model_copy(update={"settings": settings})
            runner = backends.get(self._job.runtime).open_runner(directory, manifest)
            self._recording = Session(directory, manifest, runner)
        return self._recording

    def close(self) -> None:
        self._session.close()
        if self._recording is not None:
            self._recording.close()


def calibrated_on(built: dict[str, Any]) -> str | None:
    """What an engine built on the default images was calibrated on, by which method and tool."""
    found = built.get("calibration")
    return found and f"{found['images']} {DEFAULT_ORIGIN} ({found['method']}, {found['tool']})"


def failure(error: Exception) -> tuple[Literal["missing", "failed"], str]:
    """The status and the reason of a row that could not be measured."""
    return "missing" if isinstance(error, MissingSoftware) else "failed", reason(error)


def reason(error: Exception) -> str:
    """One line on why something failed."""
    if isinstance(error, ZtpError):
        return str(error)
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return f"{type(error).__name__}: {lines[0] if lines else 'no message'}"
