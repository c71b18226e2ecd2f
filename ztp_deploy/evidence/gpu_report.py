"""The GPU report: everything this machine's GPU can run, measured cell by cell, over as many calls as it takes.

A cell is one model, runtime, precision and batch; its plans are measured interleaved in one process. Every
finished cell is in the file before the next begins, so that a call may end at any time and the next goes on.
"""

from __future__ import annotations

import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from pydantic import BaseModel, Field, ValidationError
from torch import nn

from ztp_deploy import environment, methods
from ztp_deploy.errors import BadRequest, DamagedFiles, MissingSoftware
from ztp_deploy.evidence import gpu_runtimes
from ztp_deploy.evidence.gpu_runtimes import RUNTIMES, Job, Opened
from ztp_deploy.evidence.images import ImageSet, load_images
from ztp_deploy.evidence.latency import Ratio, interleave, paired_ratio
from ztp_deploy.evidence.schema import EvidenceFile
from ztp_deploy.manifest import write_text
from ztp_deploy.methods.slice import twin_of
from ztp_deploy.models import RandomWeightsWarning, load_model, source_of
from ztp_deploy.plan import Plan, make_plan

PRECISIONS = ("fp32", "fp16", "bf16")
PARITY_IMAGES = 16
DEFAULT_MINUTES = 9.0
DEFAULT_SECONDS = 4.0


class Session(BaseModel):
    """One call: when, how, on what, and the GPU's clocks before and after (`absent` says why there are none)."""

    started: str
    command: str
    environment: dict[str, Any]
    before: dict[str, str]
    after: dict[str, str]


class Row(BaseModel):
    """One plan of one model in one runtime, precision and batch.

    `milliseconds` a batch, on the device, without copies. `status`: "missing" where the runtime is not here,
    "failed" where it did not run or parity does not hold; `reason` says why.
    """

    model: str
    runtime: str
    version: str
    precision: str
    batch: int
    plan: str
    status: Literal["measured", "missing", "failed"]
    reason: str | None = None
    session: int
    weights: str
    worst_logit: float | None = None
    parity: str | None = None
    milliseconds: list[float] = []
    median: float | None = None
    p90: float | None = None
    images_per_second: float | None = None
    speedup: Ratio | None = None

    @property
    def key(self) -> tuple[str, str, str, str, int, str]:
        """What makes it the same measurement."""
        return (self.model, self.runtime, self.version, self.precision, self.batch, self.plan)


class GpuReport(EvidenceFile):
    """All rows so far on one GPU (`engines/evidence/gpu/<gpu>.json`)."""

    schema_: Literal["ztp.gpu/1"] = Field(default="ztp.gpu/1", alias="schema")
    gpu: str
    clock: str
    sessions: list[Session] = Field(default_factory=list)
    rows: list[Row] = Field(default_factory=list)


def plans_of(model: nn.Module) -> dict[str, Plan]:
    """The plans that are compared, dense first: ratio 0.7, the paper's FLOP share, slice twin, ToMe where it exists."""
    pruned = make_plan(model, ratio=0.7)
    plans = [make_plan(model, "dense"), pruned, make_plan(model, flops=0.653), twin_of(pruned)]
    if "tome" in methods.METHODS:
        plans.append(make_plan(model, "tome", ratio=0.7))
    return {plan.label: plan for plan in plans}


@dataclass(frozen=True)
class Grid:
    """What is measured: every runtime × precision × batch × plan × model; `device` is cuda or cpu.

    `seconds` is the time measured a cell. Engines are built for batches from 1 to the largest.
    """

    models: Sequence[str] = ("deit_s", "deit_b")
    runtimes: Sequence[str] = RUNTIMES
    precisions: Sequence[str] = PRECISIONS
    batches: Sequence[int] = (1, 8, 64, 256)
    device: str = "cuda"
    weights: str = "auto"
    seconds: float = DEFAULT_SECONDS
    export_root: Path = Path("export")
    engines_root: Path = Path("engines")
    load: Callable[[str, str], nn.Module] = load_model
    plans: Callable[[nn.Module], dict[str, Plan]] = plans_of


@dataclass(frozen=True)
class Progress:
    """Where a call ended: `done` of `cells`."""

    report: GpuReport
    done: int
    cells: int


class _OutOfTime(Exception):
    """The call's time is spent; what is finished is in the file."""


def report_path(root: Path, device: str) -> Path:
    """`<root>/gpu/<gpu>.json`, `none.json` without a GPU."""
    found = environment.gpus() if device == "cuda" else ()
    return root / "gpu" / f"{found[0].slug if found else 'none'}.json"


def measure_gpu(
    grid: Grid,
    path: Path,
    *,
    minutes: float = DEFAULT_MINUTES,
    command: str = "ztp.measure_gpu",
    advance: Callable[[str], None] = lambda title: None,
) -> Progress:
    """Measures what is missing in the report at `path` until all is there or the minutes are spent.

    `advance` hears each cell's title before it begins. Raises MissingSoftware without a GPU (device cuda),
    BadRequest for a report of another GPU, DamagedFiles for one that cannot be read.
    """
    unknown = [runtime for runtime in grid.runtimes if runtime not in RUNTIMES]
    unknown += [precision for precision in grid.precisions if precision not in PRECISIONS]
    if unknown or grid.device not in ("cuda", "cpu") or min(grid.batches, default=0) < 1:
        wrong = unknown[0] if unknown else f"device {grid.device} with batches {list(grid.batches)}"
        raise BadRequest(
            f"The GPU report does not know {wrong}.",
            f"Runtimes: {', '.join(RUNTIMES)}; precisions: {', '.join(PRECISIONS)}; batches from 1 on.",
        )
    if grid.device == "cuda" and not (environment.gpus() and torch.cuda.is_available()):
        raise MissingSoftware(
            "The GPU report needs an NVIDIA GPU; none was found.", "Run it on a machine that has one (`ztp doctor`)."
        )
    if grid.device == "cuda":
        torch.backends.cudnn.allow_tf32 = False  # float32 means float32, here as in the engines
    return _Call(grid, path, time.monotonic() + minutes * 60, command, advance).run()


@dataclass
class _Call:
    """One call at work on the file."""

    grid: Grid
    path: Path
    deadline: float
    command: str
    advance: Callable[[str], None]
    slowest: float = 0.0
    _models: dict[str, nn.Module] = field(default_factory=dict)

    @cached_property
    def report(self) -> GpuReport:
        gpu = environment.gpu_line().removeprefix("GPU: ") if self.grid.device == "cuda" else "none: run on the CPU"
        clock = "CUDA events" if self.grid.device == "cuda" else "wall clock"
        if not self.path.is_file():
            return GpuReport(gpu=gpu, clock=clock)
        try:
            report = GpuReport.model_validate_json(self.path.read_bytes())
        except ValidationError as error:
            raise DamagedFiles(
                f"{self.path} is no GPU report: {error.errors()[0]['msg']}.", "Move it away and measure anew."
            ) from error
        if report.gpu != gpu:
            raise BadRequest(f"{self.path} was measured on {report.gpu}; this is {gpu}.", "Choose another folder.")
        return report

    def run(self) -> Progress:
        # What another version of a runtime was measured with, or was missing and no longer is, is measured anew.
        self.report.rows = [row for row in self.report.rows if row.version == gpu_runtimes.version_of(row.runtime)]
        cells = list(self._cells())
        try:
            for model, runtime, precision in dict.fromkeys(cell[:3] for cell in cells):
                batches = [batch for batch in self.grid.batches if not self._has(model, runtime, precision, batch)]
                if batches:
                    self._group(model, runtime, precision, batches)
        except _OutOfTime:
            pass
        done = sum(self._has(*cell) for cell in cells)
        return Progress(self.report, done, len(cells))

    def _cells(self) -> Iterator[tuple[str, str, str, int]]:
        for model in self.grid.models:
            for runtime in self.grid.runtimes:
                for precision in self.grid.precisions:
                    for batch in self.grid.batches:
                        yield model, runtime, precision, batch

    def _has(self, model: str, runtime: str, precision: str, batch: int) -> bool:
        cell = (model, runtime, precision, batch)
        return any((row.model, row.runtime, row.precision, row.batch) == cell for row in self.report.rows)

    def _group(self, name: str, runtime: str, precision: str, batches: list[int]) -> None:
        """One model, runtime and precision: opened once, measured at every batch."""
        self._hurry()
        model = self._model(name)
        plans = self.grid.plans(model)
        why = gpu_runtimes.unavailable(runtime, precision)
        blank = Row(
            model=name,
            runtime=runtime,
            version=gpu_runtimes.version_of(runtime),
            precision=precision,
            batch=0,
            plan="",
            status="missing",
            reason=why,
            session=self._session,
            weights=source_of(model).weights.kind,
        )
        if why:
            for batch in batches:
                self._append([blank.model_copy(update={"batch": batch, "plan": label}) for label in plans])
            return
        images = load_images(None, source_of(model).preprocessing, "float32", PARITY_IMAGES)
        with ExitStack() as stack:
            opened: dict[str, Opened] = {}
            bases: dict[str, Row] = {}
            for label, plan in plans.items():
                self._hurry()
                self.advance(f"{name} {label} · {runtime} {precision}: build and prove")
                base = blank.model_copy(update={"plan": label, "reason": None})
                bases[label] = self._open(model, plan, base, images, opened, stack)
            for batch in batches:
                self._hurry(self.slowest)
                self.advance(f"{name} · {runtime} {precision} · batch {batch}")
                begin = time.monotonic()
                rows = {label: base.model_copy(update={"batch": batch}) for label, base in bases.items()}
                self._append(self._measured(rows, opened, batch, source_of(model).preprocessing.input_size[1]))
                self.slowest = max(self.slowest, time.monotonic() - begin)

    def _open(
        self, model: nn.Module, plan: Plan, row: Row, images: ImageSet, opened: dict[str, Opened], stack: ExitStack
    ) -> Row:
        """Opens and proves one plan; its row says what came of it, and only what holds is in `opened`."""
        grid = self.grid
        largest = max(grid.batches)
        job = Job(
            model, plan, row.runtime, row.precision, grid.device, largest, grid.export_root, grid.engines_root
        )  # fmt: skip
        try:
            one = gpu_runtimes.open_job(job)
            stack.callback(one.close)
            edges = one.edges(images)
        except Exception as error:  # six runtimes, each with exceptions of its own: the row says which
            missing = isinstance(error, MissingSoftware)
            return row.model_copy(
                update={"status": "missing" if missing else "failed", "reason": gpu_runtimes.reason(error)}
            )
        faults = [fault for edge in edges for fault in edge.faults]
        found = {"worst_logit": edges[-1].worst_logit, "parity": "fails" if faults else "holds"}
        if faults:
            return row.model_copy(update=found | {"status": "failed", "reason": f"parity: {faults[0].detail}"})
        opened[row.plan] = one
        return row.model_copy(update=found | {"status": "measured"})

    def _measured(self, rows: dict[str, Row], opened: dict[str, Opened], batch: int, side: int) -> list[Row]:
        """The rows of one cell, those that are open timed against each other."""
        if not opened:
            return list(rows.values())
        device = self.grid.device
        try:
            generator = torch.Generator().manual_seed(0)
            images = torch.randn(batch, 3, side, side, generator=generator).to(device)
            with torch.inference_mode():
                times = interleave(
                    opened,
                    dict.fromkeys(opened, images),
                    self.grid.seconds,
                    np.random.default_rng(0),
                    lambda share: None,
                    gpu_runtimes.clock_for(device),
                )
        except Exception as error:  # out of memory, a kernel that is not there: the cell says so, the next goes on
            failed = {"status": "failed", "reason": gpu_runtimes.reason(error)}
            return [row.model_copy(update=failed) if label in opened else row for label, row in rows.items()]
        sittings = {label: [seconds] for label, seconds in times.items()}
        for label, seconds in times.items():
            milliseconds = np.array(seconds) * 1e3
            update: dict[str, Any] = {
                "milliseconds": [round(float(value), 4) for value in milliseconds],
                "median": float(np.median(milliseconds)),
                "p90": float(np.percentile(milliseconds, 90)),
                "images_per_second": batch / float(np.median(milliseconds)) * 1e3,
            }
            if "dense" in times and label != "dense":
                update["speedup"] = paired_ratio(label, "dense", batch, sittings)
            rows[label] = rows[label].model_copy(update=update)
        return list(rows.values())

    def _append(self, rows: list[Row]) -> None:
        self.report.rows += rows
        self.report.sessions[self._session].after = environment.gpu_state()
        write_text(self.path, self.report.to_json())

    def _hurry(self, needed: float = 0.0) -> None:
        if time.monotonic() + needed > self.deadline:
            raise _OutOfTime

    def _model(self, name: str) -> nn.Module:
        if name not in self._models:
            self._models.clear()
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", RandomWeightsWarning)  # every row says what its weights are
                self._models[name] = self.grid.load(name, self.grid.weights)
            # What was measured with other weights is measured anew.
            kind = source_of(self._models[name]).weights.kind
            self.report.rows = [row for row in self.report.rows if row.model != name or row.weights == kind]
        return self._models[name]

    @cached_property
    def _session(self) -> int:
        """The number of this call's entry, made when there is something to enter."""
        state = environment.gpu_state()
        started = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
        self.report.sessions.append(
            Session(
                started=started,
                command=self.command,
                environment=environment.snapshot(),
                before=state,
                after=state,
            )
        )
        return len(self.report.sessions) - 1
