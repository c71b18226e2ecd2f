"""OpenVINO on the CPU: fp32, bf16 and quantised int8; the precision that really runs is checked."""

from __future__ import annotations

import contextlib
import threading
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict, Field

from ztp_deploy import environment
from ztp_deploy.atomic import ask_for_room
from ztp_deploy.backends import torch_device
from ztp_deploy.backends.base import BuildJob, Device, OnGpu
from ztp_deploy.backends.openvino import attention, ir
from ztp_deploy.backends.openvino import stage as stages
from ztp_deploy.errors import BadRequest, BuildFailed, DamagedFiles, GateFailed, MissingSoftware
from ztp_deploy.exporters.files import GRAPH_FILE
from ztp_deploy.manifest import EngineManifest, listed

if TYPE_CHECKING:
    from torch import Tensor

SUMMARY = "OpenVINO: CPUs, with bf16 and int8 where the processor has them"
FORMAT = "onnx"
DEVICES: tuple[str, ...] = ("cpu",)
PRECISIONS: tuple[str, ...] = ("fp32", "bf16", "int8")
CALIBRATED: tuple[str, ...] = ("int8",)
GPU_REPORT: OnGpu | None = None
DEVICE = "CPU"
MODEL_FILE, WEIGHTS_FILE, CACHE_FILE = "model.xml", "model.bin", "model.blob"
_AMX = "amx_bf16"
_HINTS = {"fp32": "f32", "bf16": "bf16"}
_RUNTIME_NAMES = {"fp32": {"f32"}, "bf16": {"bf16"}, "int8": {"i8", "u8"}}
_FAST_INT8 = {"avx_vnni", "avx512_vnni", "amx_int8", "i8mm"}
_LEAST_SHARE = {"fp32": 0.99, "bf16": 0.5, "int8": 0.5}
_CAPABILITY = {"fp32": "FP32", "bf16": "BF16", "int8": "INT8"}


class Settings(BaseModel):
    """`hint`: fewest milliseconds for one request, or most images a second over several threads' requests.

    `threads` and `streams` 0: OpenVINO's choice. `float_precision`: what an int8 engine computes in where it
    does not compute in int8. `cache`: also keep the compiled model, which opens faster and doubles the folder.
    `stage`: Zero-TPrune's stages as operations of the graph, or "compiled", one operator each, built with g++ for this
    very processor (fp32 and bf16, without `cache`); a stage that the operator does not know stays in the graph.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    hint: Literal["latency", "throughput"] = "latency"
    threads: int = Field(default=0, ge=0, le=1024)
    streams: int = Field(default=0, ge=0, le=1024)
    float_precision: Literal["fp32", "bf16"] = "fp32"
    cache: bool = False
    stage: Literal["graph", "compiled"] = "graph"


def missing() -> str | None:
    """The pip package to install, None when it is here."""
    return None if environment.installed("openvino") else "openvino"


def version() -> str:
    """OpenVINO's release, without the build number."""
    return (environment.installed("openvino") or "none").split("-")[0]


def instructions(settings: dict[str, Any]) -> list[str]:
    """AMX, for which attention that a stage reads takes another form, or all that a stage may be compiled to."""
    if settings["stage"] == "compiled":
        return sorted(environment.instruction_flags())
    return [_AMX] if _has_amx() else []


def tools(precision: str, settings: dict[str, Any]) -> dict[str, str]:
    """NNCF, which quantises, and the compiler of stages."""
    made = {"nncf": environment.installed("nncf") if precision == "int8" else None}
    if settings["stage"] == "compiled":
        with contextlib.suppress(MissingSoftware):
            made["c++"] = stages.compiler_version()
    return {name: version for name, version in made.items() if version}


def _has_amx() -> bool:
    return _AMX in environment.cpu_features()


def resolve_device(device: str) -> Device:
    """The CPU; its other devices are not offered, since nothing here has measured them."""
    if device not in ("auto", "cpu"):
        raise (BadRequest if device != "cuda" else MissingSoftware)(
            f"OpenVINO engines run on the CPU here; device={device} was asked for.",
            "Use device=cpu, or another back end for cuda.",
        )
    return Device("cpu", "cpu", DEVICE)


def graph_precision(precision: str) -> str:
    """All are made from the float32 graph: OpenVINO lowers it when it compiles, int8 is calibrated here."""
    return "fp32"


def unrunnable(device: str) -> str | None:
    """Any CPU opens an OpenVINO engine; what precision it has is asked when it does."""
    return None


def check_target(device: str, precision: str, settings: dict[str, Any]) -> None:
    """Refuses what a compiled stage does not go with, and a precision that the processor has no instructions for."""
    asked = Settings(**settings)
    _check_stage(precision, asked)
    _check_processor(precision, asked)


def build(job: BuildJob) -> dict[str, Any]:
    """Writes the model as OpenVINO's own files, its scores marked to stay in float32.

    Raises BuildFailed, and GateFailed where the compiled model computes in another precision.
    """
    import openvino as ov

    settings = Settings(**job.settings)
    core = ov.Core()
    try:
        model = core.read_model(str(job.artifact.directory / GRAPH_FILE))
    except RuntimeError as error:
        raise DamagedFiles(
            f"OpenVINO cannot read {job.artifact.directory}: {_reason(error)}.", "Export again."
        ) from error
    job.advance(0.1)
    fitted = _fit(core, model, job, settings)
    path = job.directory / MODEL_FILE
    try:
        ov.save_model(fitted.model, str(path), compress_to_fp16=False)
    except RuntimeError:
        ask_for_room(job.directory)
        raise
    ir.keep_float32(path, fitted.scores - fitted.as_they_are)
    properties = _properties(job.precision, settings)
    try:
        compiled = core.compile_model(str(path), DEVICE, properties)
    except RuntimeError as error:
        raise BuildFailed(
            f"OpenVINO could not compile the model: {_reason(error)}.", "Nothing was kept. Choose other settings."
        ) from error
    counts, score_counts = ir.matrix_precisions(compiled, fitted.scores, fitted.as_they_are)
    _check_precision(job.precision, counts)
    if settings.cache:
        (job.directory / CACHE_FILE).write_bytes(compiled.export_model().getvalue())
    notes = _notes(job.precision, score_counts, fitted.stages)
    built = {"properties": properties, "matrix_precisions": counts, "score_precisions": score_counts, "notes": notes}
    return built | fitted.stages


@dataclass(frozen=True)
class _Fitted:
    """A model in the form that is saved.

    `scores`: names of the operations off the tokens' way; of these, `as_they_are` need no mark to be in float32.
    `stages`: what the manifest says of compiled ones.
    """

    model: Any
    scores: set[str]
    as_they_are: set[str]
    stages: dict[str, Any]


def _fit(core: Any, model: Any, job: BuildJob, settings: Settings) -> _Fitted:
    """Rewrites the graph for precision, processor, batch and settings; the order of the steps matters."""
    ir.fuse(model)
    fixed = job.batch.min == job.batch.max
    on_amx = _float_precision(job.precision, settings) == "bf16" and _has_amx()
    if on_amx and job.precision == "bf16":
        # Not in int8, which knows 256 steps: exponentials need more.
        attention.divide_late(model, fixed)
    made_of_stages = _compile_stages(core, model, job) if settings.stage == "compiled" else {}
    scores = ir.outside_the_tokens_way(model)
    as_they_are: set[str] = set()
    if job.precision != "fp32":
        # Before NNCF sees it: to a product with a constant, as the first vote is, it adds a scaling of the attention.
        as_they_are = ir.read_bf16(model, scores)
        scores = ir.outside_the_tokens_way(model)
    if job.precision == "int8":
        model = ir.quantised(model, job.calibration, scores, job.advance)
    if on_amx:
        attention.even_sums(model, scores)
    if fixed:
        # Shapes that are known spare OpenVINO working them out in every run.
        [images] = model.inputs
        model.reshape({images: [job.batch.max, *images.get_partial_shape()[1:]]})
    return _Fitted(model, scores - stages.passes_on(model), as_they_are, made_of_stages)


def _notes(precision: str, score_counts: dict[str, int], made_of_stages: dict[str, Any]) -> list[str]:
    """What the user must not miss."""
    notes = []
    if lower := set(score_counts) - {"f32", "bf16 to f32"}:
        notes.append(
            f"OpenVINO computes {sum(score_counts[name] for name in lower)} of {sum(score_counts.values())} products of "
            f"scores and classifier in {', '.join(sorted(lower))} although float32 was asked for."
        )
    if precision == "int8" and not _FAST_INT8 & set(environment.cpu_features()):
        notes.append(
            "This processor has no int8 dot products (VNNI): int8 can be slower here than fp32. Measure before you ship."
        )
    if made_of_stages.get("compiled_stages", "").startswith("0 of"):
        notes.append("No stage was compiled: the operator knows Zero-TPrune alone, and not all of its options.")
    return notes


def _compile_stages(core: Any, model: Any, job: BuildJob) -> dict[str, Any]:
    """Builds the operator and puts it in the stages' places; what the manifest says of it, nothing without such a stage.

    Dense models and slice twins are built with the settings of what they are measured beside.
    """
    plan = job.artifact.manifest.plan
    if plan.method != stages.METHOD:
        return {} if plan.method in ("dense", "slice") else {"compiled_stages": f"0 of {len(plan.stages)}"}
    library = job.directory / stages.LIBRARY_FILE
    compiler = stages.compile_library(job.directory)
    core.add_extension(str(library))
    count = stages.replace(model, plan, library, job.precision == "bf16")
    told = {"compiled_stages": f"{count} of {len(plan.stages)}"}
    if not count:
        library.unlink()
        return told
    return told | {"compiler": compiler, "cpu_flags": instructions(job.settings)}


def open_runner(directory: Path, manifest: EngineManifest) -> OpenVinoRunner:
    """Opens `model.xml`. Raises DamagedFiles and MissingSoftware."""
    settings = Settings(**manifest.settings)
    _check_processor(manifest.precision, settings)
    environment.require_instructions(manifest.built.get("cpu_flags", ()))
    return OpenVinoRunner(directory, manifest, _properties(manifest.precision, settings))


class OpenVinoRunner:
    """One compiled model, an infer request a thread, and a second model with the audit scores on first use."""

    def __init__(self, directory: Path, manifest: EngineManifest, properties: dict[str, str]) -> None:
        self._directory = directory
        self._manifest = manifest
        self._properties = properties
        self._requests = threading.local()
        self._compiled: Any = self._cached() or self._compile(())
        self._audited: Any = None
        self._auditing = threading.Lock()

    def run(self, images: NDArray[Any]) -> dict[str, NDArray[Any]]:
        if not hasattr(self._requests, "own"):
            self._requests.own = self._compiled.create_infer_request()
        return _infer(self._requests.own, images, self._manifest.outputs)

    def run_tensors(self, images: Tensor) -> dict[str, Tensor]:
        """See `EngineRunner`; a tensor of the CPU is memory of the host."""
        import torch

        torch_device.require(images, "cpu")
        return {name: torch.from_numpy(value) for name, value in self.run(images.detach().numpy()).items()}

    def audit(self, images: NDArray[Any]) -> dict[str, NDArray[Any]]:
        with self._auditing:
            if self._audited is None:
                self._audited = self._compile(self._manifest.audit)
        names = (*self._manifest.outputs, *self._manifest.audit)
        return _infer(self._audited.create_infer_request(), images, names)

    def close(self) -> None:
        self._compiled = self._audited = None
        self._requests = threading.local()

    def _cached(self) -> Any:
        """The compiled model kept by the build; None where there is none or this processor does not take it."""
        import openvino as ov

        if CACHE_FILE not in self._manifest.files:
            return None
        try:
            return ov.Core().import_model((self._directory / CACHE_FILE).read_bytes(), DEVICE, self._properties)
        except RuntimeError:
            return None

    def _compile(self, further_outputs: tuple[str, ...]) -> Any:
        import openvino as ov

        core = ov.Core()
        if stages.LIBRARY_FILE in self._manifest.files:
            stages.add_to(core, self._directory, self._manifest.backend_version)
        graph, weights = (listed(self._directory, self._manifest, name) for name in (MODEL_FILE, WEIGHTS_FILE))
        try:
            model = core.read_model(str(graph), str(weights))
            if further_outputs:
                model.add_outputs(list(further_outputs))
            return core.compile_model(model, DEVICE, self._properties)
        except RuntimeError as error:
            raise DamagedFiles(f"OpenVINO cannot open {graph}: {_reason(error)}.", "Build it again.") from error


def _infer(request: Any, images: NDArray[Any], names: tuple[str, ...]) -> dict[str, NDArray[Any]]:
    request.infer({"images": np.ascontiguousarray(images)}, share_inputs=True)
    return {name: request.get_tensor(name).data.copy() for name in names}


def _properties(precision: str, settings: Settings) -> dict[str, str]:
    """What the library is told, as the manifest records it and the C++ runtime repeats it."""
    properties = {
        "INFERENCE_PRECISION_HINT": _HINTS[_float_precision(precision, settings)],
        "PERFORMANCE_HINT": settings.hint.upper(),
    }
    if settings.threads:
        properties["INFERENCE_NUM_THREADS"] = str(settings.threads)
    if settings.streams:
        properties["NUM_STREAMS"] = str(settings.streams)
    return properties


def _float_precision(precision: str, settings: Settings) -> str:
    """What is computed in where nothing is quantised."""
    return settings.float_precision if precision == "int8" else precision


def _check_stage(precision: str, settings: Settings) -> None:
    """Raises BadRequest for what a compiled stage does not go with."""
    if settings.stage == "graph":
        return
    if precision == "int8":
        raise BadRequest(
            "stage=compiled was asked for in int8; the operator reads fp32 and bf16.",
            "Leave it out, or use precision bf16 or fp32.",
        )
    if settings.cache:
        raise BadRequest(
            "stage=compiled and cache=true were asked for; a kept model does not hold the operator.", "Leave one out."
        )


def _check_processor(precision: str, settings: Settings) -> None:
    import openvino as ov

    wanted = {precision, _float_precision(precision, settings)}
    known = ov.Core().get_property(DEVICE, "OPTIMIZATION_CAPABILITIES")
    for name in sorted(wanted):
        if _CAPABILITY[name] not in known:
            raise MissingSoftware(
                f"{name} was asked for, and this processor ({environment.cpu_name()}) has no instructions for it "
                f"(OpenVINO lists {', '.join(known)}).",
                "Use precision fp32, or a processor that has it (bf16: AVX512-BF16 or AMX).",
            )


def _check_precision(precision: str, counts: dict[str, int]) -> None:
    """Raises GateFailed unless most products of the tokens' way are computed as asked.

    In int8 and bf16 engines some products, such as those of attention, may stay in fp32.
    """
    real = sum(count for name, count in counts.items() if name in _RUNTIME_NAMES[precision])
    if real <= sum(counts.values()) * _LEAST_SHARE[precision]:
        raise GateFailed(
            f"precision={precision} was asked for, but OpenVINO computes the matrix products as {counts}.",
            "Nothing was kept. Choose another precision, and report this with what `ztp doctor` prints.",
        )


def _reason(error: Exception) -> str:
    """The last line of OpenVINO's nested messages: those before it name source files and the check that failed."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    told = [line for line in lines if not line.startswith("Exception from")]
    return (told or lines or ["no reason was given"])[-1].rstrip(".!")
