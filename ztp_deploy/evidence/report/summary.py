"""The numbers of a report, drawn from manifest, parity and latency; renderers only lay them out."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

from pydantic import Field

from ztp_deploy.evidence.latency import LatencyReport, Ratio
from ztp_deploy.evidence.parity import ParityReport
from ztp_deploy.evidence.schema import EvidenceFile, EvidencePart
from ztp_deploy.manifest import EngineManifest
from ztp_deploy.plan import Flops

MEASURING = "measure latency"
"""How the latency step's title begins: its length is chosen, the other steps' is not."""


class Timing(EvidencePart):
    """One engine at one batch; times in milliseconds per image."""

    role: str
    batch: int
    runs: int
    median: float
    p90: float
    p95: float
    p99: float | None
    images_per_second: float


class Gain(EvidencePart):
    """What pruning gains over dense at one batch, and what selection costs.

    `flop_limit_reached` is the speed-up over the one that multiply-accumulates alone would allow;
    `selection_cost` the share of the pruned engine's time that its slice twin does not need.
    """

    batch: int
    speedup: Ratio
    flop_limit_reached: float
    selection_cost: float | None
    selection_cost_low: float | None
    selection_cost_high: float | None


class Summary(EvidenceFile):
    """Everything a reader of the report needs (`evidence/report.json`).

    `unproved` says why the engine was built but not run here; whatever parity would have said is then None.
    """

    schema_: Literal["ztp.report/1"] = Field(default="ztp.report/1", alias="schema")
    engine: str
    manifest_sha256: str
    model: str
    method: str
    label: str
    weights: str
    random_weights: bool
    backend: str
    provider: str
    precision: str
    input: str
    batch: str
    tokens: list[int]
    blocks: list[int]
    dense_macs: int
    planned_macs: int
    executed_macs: int
    flop_share: float
    flop_limit: float
    unproved: str | None = None
    parity_passed: bool | None
    parity: str
    parity_images: str | None
    worst_logit: float | None
    logit_tolerance: float | None
    near_ties: int | None
    top1_dense_to_pruned: float | None
    timings: list[Timing]
    gains: list[Gain]
    gpu: str
    machine: dict[str, Any]
    steps: list[dict[str, Any]]
    seconds: float
    seconds_measuring: float
    peak_gib: float
    command: str
    notes: list[str]

    @property
    def flops(self) -> Flops:
        """The multiply-accumulates of one image."""
        return Flops(dense=self.dense_macs, planned=self.planned_macs, executed=self.executed_macs)


def summarise(
    manifest: EngineManifest,
    directory: Path,
    parity: ParityReport | None,
    latency: LatencyReport | None,
    *,
    command: str,
    steps: list[dict[str, Any]],
    peak_gib: float,
    machine: dict[str, Any],
    manifest_sha256: str,
) -> Summary:
    """Draws the numbers together; `steps` hold {step, seconds}. `parity` is None for an engine that was not run."""
    from ztp_deploy import environment, methods

    plan = manifest.plan
    notes = [*manifest.built.get("notes", ()), *(parity.notes if parity else ()), *(latency.notes if latency else ())]
    if manifest.random_weights:
        notes.insert(0, "Random weights: latency is real, predictions mean nothing; accuracy is left out.")
    if (reason := methods.untrained(plan)) and not manifest.random_weights:
        notes.insert(0, f"Latency only: {reason} Accuracy is left out.")
    unproved = None if parity else manifest.unproved
    if unproved:
        notes.insert(0, unproved_line(unproved))
    return Summary(
        engine=str(directory),
        manifest_sha256=manifest_sha256,
        model=manifest.source.name,
        method=plan.method,
        label=plan.label,
        weights=manifest.source.weights.shown,
        random_weights=manifest.random_weights,
        backend=f"{manifest.backend} {manifest.backend_version}",
        provider=manifest.provider,
        precision=manifest.precision,
        input=manifest.input.dtype,
        batch=str(manifest.batch).replace("-", ":"),
        tokens=[plan.patch_tokens, *plan.counts],
        blocks=[stage.block for stage in plan.stages],
        dense_macs=plan.flops.dense,
        planned_macs=plan.flops.planned,
        executed_macs=plan.flops.executed,
        flop_share=plan.flops.share,
        flop_limit=plan.flops.speedup_limit,
        unproved=unproved,
        **_parity_fields(parity),
        timings=_timings(latency) if latency else [],
        gains=_gains(latency, plan.flops.speedup_limit) if latency and plan.stages else [],
        gpu=environment.gpu_line(),
        machine=machine,
        steps=steps,
        seconds=round(sum(step["seconds"] for step in steps), 1),
        seconds_measuring=round(sum(s["seconds"] for s in steps if s["step"].startswith(MEASURING)), 1),
        peak_gib=peak_gib,
        command=command,
        notes=notes,
    )


def _parity_fields(parity: ParityReport | None) -> dict[str, Any]:
    end_to_end = parity.edges[-1] if parity else None
    agreement = parity.dense_to_pruned if parity else None
    return {
        "parity_passed": parity.passed if parity else None,
        "parity": _parity_line(parity) if parity else "was not checked",
        "parity_images": parity.images if parity else None,
        "worst_logit": end_to_end.worst_logit if end_to_end else None,
        "logit_tolerance": parity.tolerance.logits if parity else None,
        "near_ties": len(end_to_end.near_ties) if end_to_end else None,
        "top1_dense_to_pruned": agreement.top1_equal if agreement else None,
    }


def unproved_line(reason: str) -> str:
    """What stands beside an engine that was built and not run."""
    return f"BUILT, NOT RUN: {reason}. Neither parity nor latency is known; check it where it is to run."


def _parity_line(parity: ParityReport) -> str:
    edges = " → ".join([parity.edges[0].reference, *dict.fromkeys(edge.candidate for edge in parity.edges)])
    worst = parity.edges[-1]
    agreeing = min((stage.images_agreeing for edge in parity.edges for stage in edge.stages), default=worst.images)
    kept = f"kept sets agree on {agreeing} of {worst.images} images"
    if agreeing < worst.images:
        shares = ", ".join(f"{stage.token_agreement:.1%}" for stage in worst.stages)
        gap = max((tie.gap for tie in worst.near_ties), default=0.0)
        kept += f" (kept tokens that agree, stage by stage: {shares}; the others were within {gap:.1e} of the cut)"
    return (
        f"{parity.verdict} along {edges}: {kept}, worst logit {worst.worst_logit:.1e} σ "
        f"(at most {parity.tolerance.logits:g}), top-1 equal on {worst.top1_equal} of {worst.images}"
    )


def _timings(latency: LatencyReport) -> list[Timing]:
    return [
        Timing(
            role=sample.role,
            batch=sample.batch,
            runs=sample.runs,
            median=sample.median / sample.batch,
            p90=sample.p90 / sample.batch,
            p95=sample.p95 / sample.batch,
            p99=None if sample.p99 is None else sample.p99 / sample.batch,
            images_per_second=sample.images_per_second,
        )
        for sample in latency.samples
    ]


def _gains(latency: LatencyReport, limit: float) -> list[Gain]:
    gains = []
    for batch in sorted({sample.batch for sample in latency.samples}):
        try:
            speedup = latency.ratio("pruned", "dense", batch)
        except KeyError:
            continue
        cost: tuple[float, float, float] | tuple[None, None, None]
        try:
            cost = latency.ratio("slice", "pruned", batch).behind
        except KeyError:
            cost = None, None, None
        gains.append(
            Gain(
                batch=batch,
                speedup=speedup,
                flop_limit_reached=speedup.speedup / limit,
                selection_cost=cost[0],
                selection_cost_low=cost[1],
                selection_cost_high=cost[2],
            )
        )
    return gains
