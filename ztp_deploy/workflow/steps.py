"""The steps that commands are made of: load, export, build, check, measure; each timed and shown."""

from __future__ import annotations

import gc
import re
import shlex
import warnings
from collections.abc import Iterable, Sequence
from dataclasses import replace
from pathlib import Path

from torch import nn

from ztp_deploy import backends, exporters, models
from ztp_deploy.atomic import write_text
from ztp_deploy.backends import PARITY_FILE, Engine
from ztp_deploy.defaults import CHECK_IMAGES
from ztp_deploy.errors import BadRequest, GateFailed, MissingSoftware
from ztp_deploy.evidence.images import ImageSet, image_files, load_images
from ztp_deploy.evidence.latency import LatencyReport, asked_batches, measure_latency
from ztp_deploy.evidence.load import Load, LoadReport, put_under
from ztp_deploy.evidence.parity import ParityReport, check_parity, expected_steps, proof_of
from ztp_deploy.evidence.report.folder import read_evidence
from ztp_deploy.evidence.report.html import HTML_FILE, render_html
from ztp_deploy.evidence.report.load import render_load
from ztp_deploy.evidence.report.markdown import render_markdown
from ztp_deploy.evidence.report.summary import MEASURING, Summary, unproved_line
from ztp_deploy.evidence.reproducer import write_reproducer
from ztp_deploy.evidence.schema import SUMMARY_FILE, stored
from ztp_deploy.evidence.selftest import SELFTEST_FILE, write_selftest
from ztp_deploy.exporters import Artifact
from ztp_deploy.manifest import BatchRange, folder_tags, manifest_sha256
from ztp_deploy.models import RandomWeightsWarning
from ztp_deploy.models.weights import user_path
from ztp_deploy.plan import Plan
from ztp_deploy.pruning.prune import prune
from ztp_deploy.source import Source
from ztp_deploy.workflow.progress import Clock
from ztp_deploy.workflow.requests import BuildRequest, ModelRequest, PlanRequest

REPORT_FILE = "report.md"
YARDSTICK_IMAGES = 8


def check_wanted(wanted: Sequence[PlanRequest], build: BuildRequest, images: Path | str | None) -> None:
    """Refuses whatever can be refused before anything heavy is loaded."""
    target = build.target()
    exporters.check_precision(target.backend.FORMAT, target.graph_precision)
    for request in wanted:
        request.backbone.check()
        request.check()
    if images is not None:
        image_files(Path(images))


def load(wanted: ModelRequest, clock: Clock) -> nn.Module:
    """The model with its weights; random ones are announced loudly."""
    with clock.step(f"load {wanted.name}"), warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always", RandomWeightsWarning)
        model = wanted.load()
    for warning in caught:
        if issubclass(warning.category, RandomWeightsWarning):
            clock.warn(str(warning.message))
    if wanted.weights == "random":
        clock.warn("Random weights, as asked: latency is real, predictions mean nothing.")
    licence = models.source_of(model).weights.licence
    if licence and re.search(r"\bnc\b|non-?commercial", licence, re.IGNORECASE):
        clock.warn(f"The weights of {wanted.name} are licensed {licence}: no commercial use.")
    return model


def reload(source: Source, weights: str | None, clock: Clock) -> nn.Module:
    """The model an engine was made from; `weights` is where its checkpoint lies now, None where it lay.

    Raises what `models.reload_model` raises, BadRequest too where there is no such checkpoint.
    """
    if weights is not None:
        moved = source.weights.model_copy(update={"kind": "file", "origin": weights})
        source = source.model_copy(update={"weights": moved})
    record = source.weights
    if record.kind == "file" and not user_path(record.origin)[0].is_file():
        raise BadRequest(
            f"The weights of {source.name} are to be loaded from {record.origin}: there is no such file.",
            "Say where the same checkpoint lies now: --weights path.",
        )
    with clock.step(f"load {source.name}"):
        return models.reload_model(source)


def load_trained(wanted: ModelRequest, clock: Clock) -> nn.Module:
    """The same where predictions count: "auto" takes no random weights. Raises MissingSoftware where there are none."""
    try:
        return load(replace(wanted, weights="pretrained") if wanted.weights == "auto" else wanted, clock)
    except MissingSoftware as error:
        raise MissingSoftware(error.problem, "Give a checkpoint: --weights path.") from error


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
    target = request.target()
    manifest = artifact.manifest
    calibration = None
    if target.calibrated:
        with clock.step("prepare images for calibration"):
            source, dtype = manifest.source.preprocessing, manifest.input.dtype
            pictures = load_images(images, source, dtype, purpose="calibration")
        calibration = pictures.pixels
        if pictures.shared:
            clock.warn(
                f"{len(pictures.names)} images calibrate the engine, and the check uses {pictures.shared} of them too: "
                f"give {2 * CHECK_IMAGES} or more for a proof on others."
            )
    directory = backends.engine_directory(request.engines_root, manifest, target, calibration)
    with clock.step(f"build {manifest.plan.label} for {target.name} on {target.device.name}", 1.0) as advance:
        engine = backends.build_target(artifact, target, directory, calibration=calibration, progress=advance)
    if reason := target.unrunnable:
        clock.warn(unproved_line(reason))
    for note in engine.manifest.built.get("notes", ()):
        clock.warn(note)
    return engine


def engine_for(
    model: nn.Module, plan: Plan, request: BuildRequest, clock: Clock, images: Path | str | None = None
) -> Engine:
    """The engine of one plan: exported as the request's back end takes it, then built."""
    target = request.target()
    artifact = export_model(model, plan, request, target.backend.FORMAT, target.graph_precision, clock)
    return build_engine(artifact, request, clock, images)


def check_runnable(request: BuildRequest) -> None:
    """Raises MissingSoftware where an engine could be built here but not run."""
    target = request.target()
    if reason := target.unrunnable:
        raise MissingSoftware(
            f"{target.name} engines cannot be measured on this machine: {reason}.",
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
    return check_on(pictures, engine, model, clock)


def check_on(pictures: ImageSet, engine: Engine, model: nn.Module, clock: Clock) -> ParityReport:
    """The parity gate on images that are loaded."""
    total = expected_steps(len(pictures.names), engine.manifest.format)
    title = f"check parity of {engine.manifest.plan.label} on {len(pictures.names)} images"
    with clock.step(title, total) as advance:
        report = check_parity(engine, model, pictures, progress=advance)
    if report.passed:
        write_selftest(engine.directory, pictures.pixels)
    else:
        (engine.evidence / SELFTEST_FILE).unlink(missing_ok=True)
        if script := write_reproducer(engine, model, pictures, report):
            clock.warn(f"To see the first fault with Polygraphy: sh {shlex.quote(str(script))}")
    write_reports(engine)  # none that stands goes on saying the contrary
    return report


def write_reports(engine: Engine, summary: Summary | None = None) -> None:
    """Renders the engine's reports from its evidence; `report.json` and `report.md` only after a run that made one.

    `summary`: what the run that made the engine has to say of itself.
    """
    if summary is not None:
        write_text(engine.evidence / SUMMARY_FILE, summary.to_json())
    evidence = read_evidence(engine.directory)
    if summary is None and evidence.made:
        summary = evidence.summary
        write_text(engine.evidence / SUMMARY_FILE, summary.to_json())
    if summary is not None:
        tables = "\n".join(map(render_load, evidence.loads))
        write_text(engine.evidence / REPORT_FILE, render_markdown(summary, tables))
    write_text(engine.evidence / HTML_FILE, render_html(evidence))


def require_parity(engine: Engine, report: ParityReport) -> None:
    """Raises GateFailed, which names the engine, where the gate is not passed."""
    try:
        report.require()
    except GateFailed as error:
        raise GateFailed(f"{engine.directory.name}: {error.problem}", error.fix) from error


def prove(engines: Sequence[Engine], model: nn.Module, images: Path | str | None, clock: Clock) -> None:
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
        require_parity(engine, check_on(pictures, engine, model, clock))


def bench(
    engines: dict[str, Engine], batches: Sequence[int] | None, seconds: float, clock: Clock, command: str
) -> LatencyReport:
    """Interleaved latency of the engines by role, by default at `usual_batches`."""
    batches = asked_batches({role: engine.manifest.batch for role, engine in engines.items()}, batches)
    gc.collect()
    with clock.step(f"{MEASURING} at batch {', '.join(map(str, batches))}", float(len(batches))) as advance:
        return measure_latency(engines, batches, seconds=seconds, command=command, progress=advance)


def require_proof(engines: Iterable[Engine]) -> None:
    """Raises BadRequest for an engine that was never proved as it stands, GateFailed for one that failed."""
    for engine in engines:
        if proof_of(engine) is not None:
            continue
        again = f"`ztp check --engine {shlex.quote(str(engine.directory))}`"
        report = stored(engine.evidence / PARITY_FILE, ParityReport)
        if report is not None and not report.passed and report.manifest_sha256 == manifest_sha256(engine.directory):
            raise GateFailed(f"{engine.directory} failed its last parity check.", f"See {again}, and build it again.")
        raise BadRequest(f"{engine.directory} has passed no parity check as it stands.", f"Prove it first: {again}.")


def bench_load(
    engines: dict[str, Engine],
    loads: Sequence[Load],
    batches: Sequence[int] | None,
    seconds: float,
    clock: Clock,
    command: str,
) -> LoadReport:
    """The engines by role under load, by default at `usual_batches`; the report joins each engine's evidence.

    Raises what `require_proof` and `measure_load` raise.
    """
    batches = asked_batches({role: engine.manifest.batch for role, engine in engines.items()}, batches)
    require_proof(engines.values())
    if loads[0].rate is None:
        levels = f"with {', '.join(str(load.clients) for load in loads)} clients"
    else:
        levels = f"at {', '.join(f'{load.rate:g}' for load in loads)} requests a second"
    gc.collect()
    title = f"measure load {levels}, at batch {', '.join(map(str, batches))}"
    with clock.step(title, float(len(batches) * len(loads))) as advance:
        report = put_under(loads, engines, batches, seconds, command, advance)
    for engine in engines.values():
        write_text(engine.evidence / report.file, report.to_json())
        write_reports(engine)
    return report


def measured_batches(asked: Sequence[int] | None, build: BuildRequest) -> Sequence[int]:
    """What to measure, before anything is built. Raises BadRequest for batches that the engine will not take."""
    return asked_batches({"the engine": BatchRange.parse(build.batch)}, asked)
