"""The GPU report's file: its rows, its calls, what they took, and which of two rows stays."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

from pydantic import BaseModel, Field

from ztp_deploy.evidence.latency import Ratio
from ztp_deploy.evidence.schema import EvidenceFile


class Call(BaseModel):
    """One call: when, how, on what, and the GPU's clocks before and after (`absent` says why there are none)."""

    started: str
    command: str
    environment: dict[str, Any]
    before: dict[str, str]
    after: dict[str, str]


class Row(BaseModel):
    """One plan of one model in one runtime, precision and batch.

    `milliseconds` a batch, on the device, without copies. `status`: "missing" where the software is not here,
    "failed" where it did not run or parity does not hold; `reason` says why. `calibration`: what an int8 or fp8
    engine was fitted to. `sources`: the hash of the code that made and measured it. `cuda_graph`: recorded and replayed, compared with plans that are too. `speedup` is over
    dense; `of_twin` the speed as a share of the slice twin's, 1 where the selection costs nothing.
    """

    model: str
    runtime: str
    version: str
    precision: str
    batch: int
    plan: str
    cuda_graph: bool = False
    status: Literal["measured", "missing", "failed"]
    reason: str | None = None
    session: int
    weights: str
    sources: str = ""
    calibration: str | None = None
    worst_logit: float | None = None
    parity: str | None = None
    milliseconds: list[float] = []
    median: float | None = None
    p90: float | None = None
    images_per_second: float | None = None
    speedup: Ratio | None = None
    of_twin: Ratio | None = None

    @property
    def place(self) -> tuple[str, str, str, int, str, bool]:
        """Where in the table it belongs."""
        return (self.model, self.runtime, self.precision, self.batch, self.plan, self.cuda_graph)

    @property
    def key(self) -> tuple[str, str, str, int, str, bool, str, str, str]:
        """What makes it the same measurement."""
        return (*self.place, self.version, self.weights, self.sources)


class Effort(BaseModel):
    """What one model took in one runtime and precision (both empty: loading it), and what calls ended over it.

    `builds`: the longest seconds by plan to open and prove it. `cells`: those to measure all plans, by batch.
    `failures`: by plan why it cannot be measured, until its rows say so. `tries`: calls since the last gain that ended, or were ended, before there was another; `minutes`: what the
    last of them had for it alone, 0 where other work came first.
    """

    model: str
    runtime: str
    version: str
    precision: str
    builds: dict[str, float] = Field(default_factory=dict)
    cells: dict[int, float] = Field(default_factory=dict)
    failures: dict[str, str] = Field(default_factory=dict)
    tries: int = 0
    minutes: float = 0.0


class GpuReport(EvidenceFile):
    """All rows so far on one GPU (`engines/evidence/gpu/<gpu>.json`)."""

    schema_: Literal["ztp.gpu/1"] = Field(default="ztp.gpu/1", alias="schema")
    gpu: str
    clock: str
    sessions: list[Call] = Field(default_factory=list)
    efforts: list[Effort] = Field(default_factory=list)
    rows: list[Row] = Field(default_factory=list)

    def latest(self) -> list[Row]:
        """The last word on every place in the table."""
        return list({row.place: row for row in self.rows}.values())

    def add(self, rows: Sequence[Row]) -> None:
        """Puts rows in the place of older ones; only a measured row takes the place of a measured one.

        One that could not be measured is left out where the same measurement stands, and is the last word beside
        one of another version, of other weights or of other code.
        """
        for new in rows:
            gives_way = {"missing", "failed"} | ({"measured"} if new.status == "measured" else set())
            self.rows = [row for row in self.rows if row.place != new.place or row.status not in gives_way]
            if new.key not in {row.key for row in self.rows}:
                self.rows.append(new)

    def effort(self, model: str, runtime: str, version: str, precision: str) -> Effort:
        """The record of that work; where there is none a new one, which is not in the report yet."""
        wanted = (model, runtime, version, precision)
        for effort in self.efforts:
            if (effort.model, effort.runtime, effort.version, effort.precision) == wanted:
                return effort
        return Effort(model=model, runtime=runtime, version=version, precision=precision)

    def longest(self, effort: Effort, what: Literal["builds", "cells"]) -> float:
        """The most seconds that a comparable step took: of the model in the runtime, else of any; 0 if none is known."""
        same_runtime = [other for other in self.efforts if other.runtime == effort.runtime]
        for comparable in ([other for other in same_runtime if other.model == effort.model], same_runtime):
            seconds: list[float] = [second for other in comparable for second in getattr(other, what).values()]
            if seconds:
                return max(seconds)
        return 0.0
