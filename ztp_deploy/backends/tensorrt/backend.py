"""TensorRT's face: what `backends` calls, for either library."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ztp_deploy import environment
from ztp_deploy.backends import torch_device
from ztp_deploy.backends.base import BuildJob, Device, OnGpu, no_instructions
from ztp_deploy.backends.tensorrt import timing_cache
from ztp_deploy.backends.tensorrt.home import check_gpu, check_home
from ztp_deploy.backends.tensorrt.library import Library
from ztp_deploy.backends.tensorrt.progress import Progress
from ztp_deploy.backends.tensorrt.settings import Settings
from ztp_deploy.errors import BadRequest, GateFailed, MissingSoftware
from ztp_deploy.exporters.files import GRAPH_FILE
from ztp_deploy.manifest import EngineManifest, listed

if TYPE_CHECKING:
    from ztp_deploy.backends.tensorrt.build import BuiltPlan, Order
    from ztp_deploy.backends.tensorrt.layers import Fusion
    from ztp_deploy.backends.tensorrt.runtime import Executor, TensorRTRunner

PLAN_FILE = "model.plan"
AUDIT_FILE = "audit.plan"


class TensorRT:
    """A back end over one of the two libraries."""

    FORMAT = "onnx"
    DEVICES: tuple[str, ...] = ("cuda",)
    CALIBRATED: tuple[str, ...] = ("int8", "fp8")
    PRECISIONS: tuple[str, ...] = ("fp32", "fp16", "bf16", *CALIBRATED)
    Settings = Settings

    instructions = staticmethod(no_instructions)

    def __init__(self, library: Library, summary: str) -> None:
        self.library = library
        self.SUMMARY = summary
        self.GPU_REPORT: OnGpu | None = OnGpu(built_alone=not library.portable, records=True)

    def __repr__(self) -> str:
        return self.library.module

    def missing(self) -> str | None:
        """The pip package to install, None when it is here: the library, and torch, which keeps an engine's memory."""
        return torch_device.missing() if self.library.found() else self.library.package

    def version(self) -> str:
        """The library's version."""
        return str(self.library.load().__version__)

    def tools(self, precision: str, settings: dict[str, Any]) -> dict[str, str]:
        """ModelOpt, which calibrates."""
        from ztp_deploy.backends.tensorrt import quantise

        found = environment.installed(quantise.PACKAGE) if precision in self.CALIBRATED else None
        return {quantise.PACKAGE: found} if found else {}

    def resolve_device(self, device: str) -> Device:
        """The GPU; a portable library needs none to build. Raises BadRequest and MissingSoftware."""
        title = self.library.title
        if device not in ("auto", "cuda"):
            raise BadRequest(f"{title} engines run on NVIDIA GPUs; device={device!r} was asked for.", "Use cuda.")
        if self.library.portable:
            return Device("cuda", "portable", title)
        found = environment.gpus()
        if not found:
            raise MissingSoftware(
                f"{title} builds on the very GPU that is to run the engine (device=cuda), and none was found.",
                "Use the back end tensorrt_rtx, which builds without one, or onnxruntime.",
            )
        return Device("cuda", found[0].slug, title)

    def graph_precision(self, precision: str) -> str:
        """Networks are strongly typed: the graph carries the precision; int8 and fp8 are calibrated here."""
        return "fp32" if precision in self.CALIBRATED else precision

    def check_target(self, device: str, precision: str, settings: dict[str, Any]) -> None:
        """Refuses int8 and fp8 without ModelOpt, fp8 beside a GPU that has none, and what a portable engine cannot be."""
        check_gpu(precision)
        asked = Settings(**settings)
        limits = {
            "version_compatible": asked.version_compatible,
            "hardware_compatible": asked.hardware_compatible != "none",
        }
        for name, given in limits.items():
            if given and self.library.portable:
                raise BadRequest(
                    f"{self.library.title} takes no {name}: its engines are portable between GPUs and bound to its version.",
                    "Leave the setting out, or use the back end tensorrt.",
                )
        if precision in self.CALIBRATED:
            from ztp_deploy.backends.tensorrt import quantise

            quantise.require()

    def build(self, job: BuildJob) -> dict[str, Any]:
        """Writes `model.plan` and, with `audit`, `audit.plan`; says what fused and what runs in the precision.

        int8 and fp8 engines come with `model.onnx`, the graph with Q/DQ that they are built from.
        """
        import onnx

        from ztp_deploy.backends.tensorrt import quantise
        from ztp_deploy.backends.tensorrt.build import Order, build_plan
        from ztp_deploy.backends.tensorrt.graph import with_batch
        from ztp_deploy.exporters.onnx import with_audit

        settings = Settings.model_validate(job.settings)
        manifest = job.artifact.manifest
        derived = quantise.derive(job, settings) if job.precision in self.CALIBRATED else None
        graph = (job.directory if derived else job.artifact.directory) / GRAPH_FILE
        shipped = with_batch(onnx.load(str(graph), load_external_data=False), job.batch)
        audited = settings.audit and bool(manifest.audit)
        timings = None
        if settings.timing_cache and not self.library.portable:
            timings = timing_cache.path_for(self.library.module, self.version(), job.device.slug)
        order = partial(
            Order,
            library=self.library,
            graph=graph,
            precision=job.precision,
            batch=job.batch,
            stages=len(manifest.plan.stages),
            settings=settings,
            timings=timings,
        )
        share = (1 - quantise.SHARE if derived else 1.0) / (2 if audited else 1)
        main = order(model=shipped)
        plan = build_plan(main, Progress(job.advance, share))
        (job.directory / PLAN_FILE).write_bytes(plan.data)
        built = self._proved(main, plan, job.directory / PLAN_FILE)
        if audited:
            second = order(model=with_audit(shipped, manifest.audit))
            (job.directory / AUDIT_FILE).write_bytes(build_plan(second, Progress(job.advance, share)).data)
        if derived:
            return built | {"calibration": derived.calibration, "notes": [*derived.notes, *built["notes"]]}
        if settings.strip_plan:
            job.copy_graph()  # the weights that the plans lack
        return built

    def _proved(self, order: Order, plan: BuiltPlan, path: Path) -> dict[str, Any]:
        """What the manifest says of a plan. Raises GateFailed where it is not what was asked for."""
        from ztp_deploy.backends.tensorrt import runtime
        from ztp_deploy.backends.tensorrt.build import BuiltPlan
        from ztp_deploy.backends.tensorrt.layers import read_layers

        here = environment.gpus()
        if here and not any(layer.carries for layer in plan.layers):
            inspected = read_layers(runtime.inspect(self.library, path, order.settings.version_compatible))
            plan = BuiltPlan(plan.data, inspected, plan.products)
        fused, precision = plan.proofs(order)
        notes = _notes(fused, order)
        if order.settings.require_fusion and fused.fused != fused.expected:
            raise GateFailed(f"require_fusion was asked for. {' '.join(notes)}", "Use fp16 or bf16, or leave it out.")
        built: dict[str, Any] = {"matrix_products": plan.products, **fused.as_built()}
        if precision is not None:
            built["engine_products"] = precision
        if here and not self.library.portable:
            built["gpu"] = {"name": here[0].name, "compute_capability": here[0].compute_capability}
        return built | {"notes": notes}

    def unrunnable(self, device: str) -> str | None:
        """Plans run on NVIDIA GPUs only."""
        return None if environment.gpus() else "no NVIDIA GPU was found"

    def open_runner(self, directory: Path, manifest: EngineManifest) -> TensorRTRunner:
        """Opens the plans, which are code: their hashes were checked, load only what you built."""
        import torch

        from ztp_deploy.backends.tensorrt import runtime

        settings = Settings.model_validate(manifest.settings)
        check_home(directory, manifest, self.library, self.version(), settings)
        if not torch.cuda.is_available():
            raise MissingSoftware("torch sees no GPU, and it keeps the engine's memory.", "Install torch with CUDA.")
        weights = listed(directory, manifest, GRAPH_FILE) if settings.strip_plan else None

        def execute(file: str) -> Executor:
            if file == AUDIT_FILE and not settings.audit:
                raise BadRequest(f"{directory} has no {file}: it was built with audit=false.", "Build it with audit.")
            path = listed(directory, manifest, file)
            engine = runtime.open_engine(self.library, path, weights, settings.version_compatible)
            recording = settings.cuda_graph and file == PLAN_FILE
            config = runtime.portable_config(self.library.load(), engine, recording) if self.library.portable else None
            return runtime.Executor(
                engine, largest=manifest.batch.max, device="cuda:0", cuda_graph=recording, config=config
            )

        # A graph without stages has nothing to audit: its one plan answers both.
        audit_file = AUDIT_FILE if manifest.audit else PLAN_FILE
        return runtime.TensorRTRunner(
            execute(PLAN_FILE), partial(execute, audit_file), manifest.outputs, manifest.audit
        )


def _notes(fused: Fusion, order: Order) -> list[str]:
    """What the user must not miss."""
    title = order.library.title
    if fused.fused is None:
        return [f"{title} did not say whether attention fused."]
    if fused.fused == fused.expected:
        return []
    if order.precision == "fp32" and not fused.fused:
        return [f"None of {fused.expected} attention layers fused: {title} fuses them in fp16 and bf16."]
    return [
        f"{fused.expected - fused.fused} of {fused.expected} attention layers did not fuse: {', '.join(fused.unfused)}."
    ]
