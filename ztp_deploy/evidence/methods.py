"""Pruning methods against each other at one FLOP share: what a measurement of them records."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

from pydantic import Field

from ztp_deploy import methods
from ztp_deploy.backends import Engine
from ztp_deploy.evidence.latency import LatencyReport
from ztp_deploy.evidence.schema import EvidenceFile, EvidencePart

DENSE = "dense"


def twin_role(method: str) -> str:
    """The role of a method's slice twin."""
    return f"{method} slice twin"


class MethodRow(EvidencePart):
    """One method's plan. Shares are of the dense model's multiply-accumulates; `blocks` carry its stages.

    `latency_only` says why its predictions would mean nothing, None where they would not.
    """

    method: str
    options: dict[str, Any]
    blocks: list[int]
    tokens: list[int]
    planned_share: float
    executed_share: float
    latency_only: str | None


class MethodsReport(EvidenceFile):
    """Dense, every method and every method's slice twin, measured in one interleaved run."""

    schema_: Literal["ztp.methods/1"] = Field(default="ztp.methods/1", alias="schema")
    model: str
    backend: str
    precision: str
    asked: dict[str, float]
    methods: list[MethodRow]
    latency: LatencyReport

    def fastest(self, batch: int) -> str:
        """The method with the most images a second, slice twins aside."""
        names = [row.method for row in self.methods]
        return max(names, key=lambda name: self.latency.sample(name, batch).images_per_second)

    def behind(self, method: str, other: str, batch: int) -> tuple[float, float, float]:
        """By what share `method` has fewer images a second than `other`: median and interval, negative if it has more."""
        try:
            return self.latency.ratio(other, method, batch).behind
        except KeyError:
            ratio = self.latency.ratio(method, other, batch)
            return 1 - ratio.speedup, 1 - ratio.high, 1 - ratio.low


def methods_report(
    model: str, asked: dict[str, float], engines: Mapping[str, Engine], latency: LatencyReport
) -> MethodsReport:
    """The record of a run over `engines` by role: "dense", method names, and `twin_role` of each."""
    rows = []
    for role, engine in engines.items():
        plan = engine.manifest.plan
        if role != plan.method or not plan.stages:
            continue
        rows.append(
            MethodRow(
                method=role,
                options=plan.options,
                blocks=[stage.block for stage in plan.stages],
                tokens=[plan.patch_tokens, *plan.counts],
                planned_share=plan.flops.share,
                executed_share=plan.flops.executed / plan.flops.dense,
                latency_only=methods.untrained(plan),
            )
        )
    manifest = engines[DENSE].manifest
    return MethodsReport(
        model=model,
        backend=f"{manifest.backend} {manifest.backend_version}",
        precision=manifest.precision,
        asked=asked,
        methods=rows,
        latency=latency,
    )
