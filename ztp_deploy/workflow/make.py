"""`make engine`: from a model's name to a checked, measured engine, one step after the other."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from ztp_deploy import environment
from ztp_deploy.atomic import write_text
from ztp_deploy.backends import Engine
from ztp_deploy.defaults import BENCH_SECONDS, ENGINE_SECONDS
from ztp_deploy.evidence.latency import LATENCY_FILE, LatencyReport, check_seconds
from ztp_deploy.evidence.load import Load, LoadReport
from ztp_deploy.evidence.parity import ParityReport
from ztp_deploy.evidence.report.summary import Summary, summarise
from ztp_deploy.manifest import manifest_sha256
from ztp_deploy.methods.slice import twin_of
from ztp_deploy.plan import Plan
from ztp_deploy.planning import make_plan
from ztp_deploy.workflow import steps
from ztp_deploy.workflow.progress import Clock, Monitor
from ztp_deploy.workflow.requests import BuildRequest, PlanRequest


@dataclass(frozen=True)
class Result:
    """A finished `make engine`: the engine, its yardsticks by role, and the evidence (none for an engine not run)."""

    engine: Engine
    yardsticks: dict[str, Engine]
    parity: ParityReport | None
    latency: LatencyReport | None
    summary: Summary


def make_engine(
    wanted: PlanRequest,
    build: BuildRequest,
    monitor: Monitor,
    *,
    images: Path | str | None = None,
    batches: Sequence[int] | None = None,
    seconds: float = ENGINE_SECONDS,
    measure: bool = True,
    command: str = "ztp_deploy.workflow.make.make_engine",
) -> Result:
    """Everything from a name to a shippable engine: plan, export, build, parity gate, latency, summary.

    The dense model and the slice twin are built and proved as well, as yardsticks, where latency is measured. An engine that
    this machine cannot run is built and left at that; the summary says so.
    Raises GateFailed after the evidence is written where parity does not hold.
    """
    clock = Clock(monitor)
    measured: Sequence[int] = ()
    if measure:
        measured = steps.measured_batches(batches, build)
        check_seconds(seconds)
    runs_here = build.target().unrunnable is None
    measure = measure and runs_here
    engines, parity = _made(wanted, build, images, clock, yardsticks=measure, runs_here=runs_here)
    latency = None
    if measure:
        latency = steps.bench(engines, measured, seconds, clock, command)
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
    steps.write_reports(engines["pruned"], summary)
    engine = engines.pop("pruned")
    return Result(engine, engines, parity, latency, summary)


def make_and_load(
    wanted: PlanRequest,
    build: BuildRequest,
    monitor: Monitor,
    loads: Sequence[Load],
    *,
    images: Path | str | None = None,
    batches: Sequence[int] | None = None,
    seconds: float = BENCH_SECONDS,
    command: str = "ztp_deploy.workflow.make.make_and_load",
) -> LoadReport:
    """What `make_engine` does up to the proofs, then dense, pruned and slice twin under load.

    Raises what `make_engine` and `measure_load` raise, and MissingSoftware where the engines cannot run here.
    """
    clock = Clock(monitor)
    batches = steps.measured_batches(batches, build)
    check_seconds(seconds)
    steps.check_runnable(build)
    engines, _ = _made(wanted, build, images, clock, yardsticks=True, runs_here=True)
    return steps.bench_load(engines, loads, batches, seconds, clock, command)


def _made(
    wanted: PlanRequest,
    build: BuildRequest,
    images: Path | str | None,
    clock: Clock,
    *,
    yardsticks: bool,
    runs_here: bool,
) -> tuple[dict[str, Engine], ParityReport | None]:
    """The engine as "pruned", with `yardsticks` dense and slice twin around it; all of them proved where they run."""
    steps.check_wanted([wanted], build, images)
    model = steps.load(wanted.backbone, clock)
    plan = wanted.plan(model)
    plans: dict[str, Plan] = {"pruned": plan}
    if yardsticks and plan.stages:
        plans |= {"dense": make_plan(model, "dense"), "slice": twin_of(plan)}
    engines = {role: steps.engine_for(model, chosen, build, clock, images) for role, chosen in plans.items()}
    parity = None
    if runs_here:
        parity = steps.check(engines["pruned"], model, images, clock)
        steps.require_parity(engines["pruned"], parity)
        steps.prove([engine for role, engine in engines.items() if role != "pruned"], model, images, clock)
    return {role: engines[role] for role in ("dense", "pruned", "slice") if role in engines}, parity
