"""`make engine`: from a model's name to a checked, measured engine, one step after the other."""

from __future__ import annotations

import gc
import resource
import sys
import time
import warnings
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, Protocol

from pydantic import BaseModel
from torch import nn

from ztp_deploy import backends, environment, exporters, models
from ztp_deploy.backends import Engine
from ztp_deploy.defaults import BATCH, BENCH_SECONDS, CHECK_IMAGES, ENGINE_SECONDS, ENGINES_ROOT, EXPORT_ROOT, METHOD
from ztp_deploy.errors import BadRequest, GateFailed, MissingSoftware
from ztp_deploy.evidence.images import ImageSet, image_files, load_images
from ztp_deploy.evidence.latency import (
    LATENCY_FILE,
    LatencyReport,
    check_seconds,
    measure_latency,
    usual_batches,
)
from ztp_deploy.evidence.methods import DENSE, MethodsReport, methods_report, twin_role
from ztp_deploy.evidence.parity import ParityReport, check_parity, expected_steps, proof_of
from ztp_deploy.evidence.report.html import write_report
from ztp_deploy.evidence.report.markdown import render_markdown
from ztp_deploy.evidence.report.summary import MEASURING, SUMMARY_FILE, Summary, summarise, unproved_line, with_parity
from ztp_deploy.evidence.reproducer import write_reproducer
from ztp_deploy.evidence.schema import stored
from ztp_deploy.evidence.selftest import SELFTEST_FILE, write_selftest
from ztp_deploy.exporters import Artifact
from ztp_deploy.manifest import BatchRange, folder_tags, manifest_sha256
from ztp_deploy.methods.slice import twin_of
from ztp_deploy.models import RandomWeightsWarning
from ztp_deploy.plan import Plan, make_plan
from ztp_deploy.pruning.prune import build_stages, prune
from ztp_deploy.scratch import write_text

REPORT_FILE = "report.md"
YARDSTICK_IMAGES = 8


@dataclass(frozen=True)
class PlanRequest:
    """What was asked of a plan; exactly one of ratio, flops, keep, unless the method is dense."""

    model: str
    method: str = METHOD
    ratio: float | None = None
    flops: float | None = None
    keep: Sequence[int | float] | None = None
    sites: Sequence[int] | None = None
    options: dict[str, Any] = field(default_factory=dict)
    weights: str = "auto"

    def plan(self, model: nn.Module | str) -> Plan:
        """The plan for a model or, without its weights, for its name."""
        return make_plan(
            model,
            self.method,
            ratio=self.ratio,
            flops=self.flops,
            keep=self.keep,
            sites=self.sites,
            options=self.options,
        )

    def check(self) -> None:
        """Refuses what cannot be done, as far as that can be said before weights are loaded."""
        plan = self.plan(self.model)
        if self.weights in models.NAMED_WEIGHTS:
            build_stages(plan, models.describe(self.model)[1], weights={})


@dataclass(frozen=True)
class BuildRequest:
    """What was asked of a build."""

    backend: str = "auto"
    device: str = "auto"
    precision: str = "fp32"
    batch: str = BATCH
    input: Literal["float32", "uint8"] = "float32"
    settings: dict[str, Any] = field(default_factory=dict)
    export_root: Path = EXPORT_ROOT
    engines_root: Path = ENGINES_ROOT


class Monitor(Protocol):
    """Where the workflow tells how far it is; the command line draws bars from it."""

    def step(self, title: str, total: float | None) -> AbstractContextManager[Any]:
        """A step with `total` units of work (None: unknown); yields `advance(units)`."""

    def warn(self, text: str) -> None:
        """Something the user must not miss."""


class StepTime(BaseModel):
    """Wall time of one step."""

    step: str
    seconds: float


@dataclass
class Clock:
    """Times the steps of a run and remembers its largest memory use."""

    monitor: Monitor
    steps: list[StepTime] = field(default_factory=list)

    @contextmanager
    def step(self, title: str, total: float | None = None) -> Iterator[Any]:
        """Times and shows one step."""
        begin = time.perf_counter()
        with self.monitor.step(title, total) as advance:
            yield advance
        self.steps.append(StepTime(step=title, seconds=round(time.perf_counter() - begin, 2)))

    @property
    def seconds(self) -> float:
        """All steps together."""
        return sum(step.seconds for step in self.steps)

    @staticmethod
    def peak_gib() -> float:
        """The process's largest resident memory so far, in GiB."""
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        return peak / (2**30 if sys.platform == "darwin" else 2**20)


@dataclass(frozen=True)
class Result:
    """A finished `make engine`: the engine, its yardsticks by role, and the evidence (none for an engine not run)."""

    engine: Engine
    yardsticks: dict[str, Engine]
    parity: ParityReport | None
    latency: LatencyReport | None
    summary: Summary


def load(name: str, weights: str, clock: Clock) -> nn.Module:
    """The model with its weights; random ones are announced loudly."""
    with clock.step(f"load {name}"), warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always", RandomWeightsWarning)
        model = models.load_model(name, weights)
    for warning in caught:
        if issubclass(warning.category, RandomWeightsWarning):
            clock.monitor.warn(str(warning.message))
    if weights == "random":
        clock.monitor.warn("Random weights, as asked: latency is real, predictions mean nothing.")
    licence = models.source_of(model).weights.licence
    if licence and any(word in licence.lower() for word in ("nc", "non-commercial", "noncommercial")):
        clock.monitor.warn(f"The weights of {name} are licensed {licence}: no commercial use.")
    return model


def export_model(
    model: nn.Module, plan: Plan, request: BuildRequest, format: str, precision: str, clock: Clock
) -> Artifact:
    """Exports one plan of a model into its canonical folder; a lower precision is derived from the fp32 graph."""
    source = models.source_of(model)

    def folder(precision: str) -> Path:
        parts = [source.name, plan.label, format, precision, *folder_tags(source, request.input)]
        return request.export_root / "--".join(parts)

    derived = precision != "fp32" and exporters.derives(format)
    with clock.step(f"export {plan.label} as {format}"):
        traced = "fp32" if derived else precision
        artifact = exporters.export(prune(model, plan), format, folder(traced), precision=traced, input=request.input)
    if not derived:
        return artifact
    with clock.step(f"write {plan.label} in {precision}"):
        return exporters.convert(artifact, precision, folder(precision))


def build_engine(artifact: Artifact, request: BuildRequest, clock: Clock, images: Path | str | None = None) -> Engine:
    """Builds one artifact into its canonical folder; `images`, or default ones, fit precisions that need some."""
    name = backends.choose(request.backend)
    module = backends.usable(name)
    device = module.resolve_device(request.device)
    manifest = artifact.manifest
    settings = module.parse_settings(dict(request.settings))
    calibration = None
    if request.precision in module.CALIBRATED:
        with clock.step("prepare images for calibration"):
            source, dtype = manifest.source.preprocessing, manifest.input.dtype
            pictures = load_images(images, source, dtype, purpose="calibration")
        calibration = pictures.pixels
        if pictures.shared:
            clock.monitor.warn(
                f"{len(pictures.names)} images calibrate the engine, and the check uses {pictures.shared} of them too: "
                f"give {2 * CHECK_IMAGES} or more for a proof on others."
            )
    span = BatchRange.parse(request.batch)
    directory = backends.engine_directory(
        request.engines_root, manifest, name, device, request.precision, span, settings, calibration
    )
    with clock.step(f"build {manifest.plan.label} for {name} on {device.name}", 1.0) as advance:
        engine = backends.build(
            artifact,
            name,
            device=request.device,
            precision=request.precision,
            batch=request.batch,
            directory=directory,
            settings=request.settings,
            calibration=calibration,
            progress=advance,
        )
    if reason := module.unrunnable(device):
        clock.monitor.warn(unproved_line(reason))
    for note in engine.manifest.built.get("notes", ()):
        clock.monitor.warn(note)
    return engine


def check_runnable(request: BuildRequest) -> None:
    """Raises MissingSoftware where an engine could be built here but not run."""
    name = backends.choose(request.backend)
    module = backends.usable(name)
    reason = module.unrunnable(module.resolve_device(request.device))
    if reason:
        raise MissingSoftware(
            f"{name} engines cannot be measured on this machine: {reason}.",
            "`ztp engine` builds one without running it.",
        )


def check(
    engine: Engine, model: nn.Module, images: Path | str | None, clock: Clock, count: int = CHECK_IMAGES
) -> ParityReport:
    """The parity gate on photographs; its report is written, passed or not, and others that quote it anew.

    Where it passed the self-test joins it, else a case for Polygraphy.
    """
    with clock.step("prepare images"):
        pictures = load_images(images, engine.manifest.source.preprocessing, engine.manifest.input.dtype, count)
    return _check_on(pictures, engine, model, clock)


def _check_on(pictures: ImageSet, engine: Engine, model: nn.Module, clock: Clock) -> ParityReport:
    total = expected_steps(len(pictures.names), engine.manifest.format)
    title = f"check parity of {engine.manifest.plan.label} on {len(pictures.names)} images"
    with clock.step(title, total) as advance:
        report = check_parity(engine, model, pictures, progress=advance)
    if report.passed:
        write_selftest(engine.directory, pictures.pixels)
    else:
        (engine.evidence / SELFTEST_FILE).unlink(missing_ok=True)
        if script := write_reproducer(engine, model, pictures, report):
            clock.monitor.warn(f"To see the first fault with Polygraphy: sh {script}")
    _quote_anew(engine, report)
    return report


def _quote_anew(engine: Engine, report: ParityReport) -> None:
    """Reports of the engine that stand say what this check found; none goes on saying the contrary."""
    summary = stored(engine.evidence / SUMMARY_FILE, Summary)
    if summary is not None and summary.manifest_sha256 == report.manifest_sha256:
        _write_summary(engine, with_parity(summary, report))
    write_report(engine.directory)


def _write_summary(engine: Engine, summary: Summary) -> None:
    write_text(engine.evidence / SUMMARY_FILE, summary.to_json())
    write_text(engine.evidence / REPORT_FILE, render_markdown(summary))


def _require(engine: Engine, report: ParityReport) -> None:
    """Raises GateFailed, which names the engine, where the gate is not passed."""
    try:
        report.require()
    except GateFailed as error:
        raise GateFailed(f"{engine.directory.name}: {error.problem}", error.fix) from error


def _prove(engines: Sequence[Engine], model: nn.Module, images: Path | str | None, clock: Clock) -> None:
    """The gate, on fewer images, for what is only measured: a wrong yardstick makes every ratio wrong.

    One that this gate has passed as it stands keeps its proof. Raises GateFailed for the first that fails.
    """
    fresh = [engine for engine in engines if proof_of(engine) is None]
    if not fresh:
        return
    manifest = fresh[0].manifest
    with clock.step("prepare images for what is compared"):
        pictures = load_images(images, manifest.source.preprocessing, manifest.input.dtype, YARDSTICK_IMAGES)
    for engine in fresh:
        _require(engine, _check_on(pictures, engine, model, clock))


def bench(
    engines: dict[str, Engine], batches: Sequence[int] | None, seconds: float, clock: Clock, command: str
) -> LatencyReport:
    """Interleaved latency of the engines by role, by default at `usual_batches`."""
    if batches is None:
        batches = usual_batches([engine.manifest.batch for engine in engines.values()])
    gc.collect()
    with clock.step(f"{MEASURING} at batch {', '.join(map(str, batches))}", float(len(batches))) as advance:
        return measure_latency(engines, batches, seconds=seconds, command=command, progress=advance)


def _measured_batches(asked: Sequence[int] | None, build: BuildRequest) -> Sequence[int]:
    """What to measure, before anything is built. Raises BadRequest for batches that the engine will not take."""
    span = BatchRange.parse(build.batch)
    if outside := [batch for batch in asked or () if not span.min <= batch <= span.max]:
        raise BadRequest(
            f"Latency at batch {outside[0]} was asked for, but the engine's range is {build.batch}.",
            "Widen BATCH or measure other batches.",
        )
    return usual_batches([span]) if asked is None else asked


def make_engine(
    wanted: PlanRequest,
    build: BuildRequest,
    monitor: Monitor,
    *,
    images: Path | str | None = None,
    batches: Sequence[int] | None = None,
    seconds: float = ENGINE_SECONDS,
    measure: bool = True,
    command: str = "ztp.make_engine",
) -> Result:
    """Everything from a name to a shippable engine: plan, export, build, parity gate, latency, summary.

    The dense model and the slice twin are built and proved as well, as yardsticks, where latency is measured. An engine that
    this machine cannot run is built and left at that; the summary says so.
    Raises GateFailed after the evidence is written where parity does not hold.
    """
    clock = Clock(monitor)
    measured: Sequence[int] = ()
    if measure:
        measured = _measured_batches(batches, build)
        check_seconds(seconds)
    backend = backends.choose(build.backend)
    module = backends.usable(backend)
    runs_here = module.unrunnable(module.resolve_device(build.device)) is None
    measure = measure and runs_here
    module.parse_settings(dict(build.settings))
    format, graph_precision = module.FORMAT, module.graph_precision(build.precision)
    # Whatever can be refused is refused before anything heavy is loaded.
    backends.check_precision(backend, build.precision)
    exporters.check_precision(format, graph_precision)
    models.check_request(wanted.model, wanted.weights)
    wanted.check()
    if images is not None:
        image_files(Path(images))
    model = load(wanted.model, wanted.weights, clock)
    plan = wanted.plan(model)
    plans: dict[str, Plan] = {"pruned": plan}
    if measure and plan.stages:
        plans |= {"dense": make_plan(model, "dense"), "slice": twin_of(plan)}
    engines = {
        role: build_engine(export_model(model, chosen, build, format, graph_precision, clock), build, clock, images)
        for role, chosen in plans.items()
    }
    parity = None
    if runs_here:
        parity = check(engines["pruned"], model, images, clock)
        _require(engines["pruned"], parity)
        _prove([engine for role, engine in engines.items() if role != "pruned"], model, images, clock)
    del model
    latency = None
    if measure:
        roles: dict[str, Engine] = {role: engines[role] for role in ("dense", "pruned", "slice") if role in engines}
        latency = bench(roles, measured, seconds, clock, command)
        write_text(engines["pruned"].evidence / LATENCY_FILE, latency.to_json())
    summary = summarise(
        engines["pruned"].manifest,
        engines["pruned"].directory,
        parity,
        latency,
        command=command,
        steps=[step.model_dump() for step in clock.steps],
        peak_gib=round(clock.peak_gib(), 2),
        machine=environment.snapshot(),
        manifest_sha256=manifest_sha256(engines["pruned"].directory),
    )
    _write_summary(engines["pruned"], summary)
    write_report(engines["pruned"].directory)
    engine = engines.pop("pruned")
    return Result(engine, engines, parity, latency, summary)


def compare_methods(
    model_name: str,
    wanted: Sequence[PlanRequest],
    build: BuildRequest,
    monitor: Monitor,
    *,
    images: Path | str | None = None,
    batches: Sequence[int] | None = None,
    seconds: float = BENCH_SECONDS,
    command: str = "ztp.compare_methods",
) -> MethodsReport:
    """Several methods on one model at one ratio or FLOP share, and their slice twins, in one interleaved run.

    Every engine passes the parity gate first. Raises GateFailed where one does not, and what `make_engine` raises.
    """
    clock = Clock(monitor)
    batches = _measured_batches(batches, build)
    check_seconds(seconds)
    check_runnable(build)
    for request in wanted:
        request.check()
    module = backends.usable(backends.choose(build.backend))
    format, graph_precision = module.FORMAT, module.graph_precision(build.precision)
    model = load(model_name, wanted[0].weights, clock)
    plans: dict[str, Plan] = {DENSE: make_plan(model, "dense")}
    for request in wanted:
        plan = request.plan(model)
        if not plan.stages:
            raise BadRequest(f"{request.method} keeps every token there.", "Compare at a smaller ratio or FLOP share.")
        plans |= {request.method: plan, twin_role(request.method): twin_of(plan)}
    engines: dict[str, Engine] = {}
    for role, plan in plans.items():
        artifact = export_model(model, plan, build, format, graph_precision, clock)
        engines[role] = build_engine(artifact, build, clock, images)
    _prove(list(engines.values()), model, images, clock)
    del model
    latency = bench(engines, batches, seconds, clock, command)
    first = wanted[0]
    asked = {"ratio": first.ratio} if first.ratio is not None else {"flops": first.flops}
    return methods_report(model_name, {name: value for name, value in asked.items() if value}, engines, latency)
