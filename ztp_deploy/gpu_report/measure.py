"""The GPU report: everything this machine's GPU can run, measured cell by cell, over as many calls as it takes.

A cell is one model, runtime, precision and batch; its plans are measured interleaved in one process. Every
finished cell is in the file before the next begins, so that a call may end at any time and the next goes on. Engines
that stand are used again; a module compiled in the process is compiled anew.
"""

from __future__ import annotations

import time
import warnings
from collections.abc import Callable, Iterable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from functools import cached_property, partial
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch
from pydantic import ValidationError
from torch import nn

from ztp_deploy import backends, environment
from ztp_deploy.defaults import (
    ENGINES_ROOT,
    EXPORT_ROOT,
    GPU_BATCHES,
    GPU_MINUTES,
    GPU_MODELS,
    GPU_PRECISIONS,
    GPU_SECONDS,
)
from ztp_deploy.errors import BadRequest, DamagedFiles, MissingSoftware
from ztp_deploy.evidence.images import ImageSet, load_images
from ztp_deploy.evidence.latency import Runs, interleave, paired_ratio
from ztp_deploy.gpu_report import runtimes
from ztp_deploy.gpu_report.rows import Call, Effort, GpuReport, Row
from ztp_deploy.gpu_report.runtimes import IN_PROCESS, RUNTIMES, Job, Opened, precisions_of
from ztp_deploy.gpu_report.workers import Failure, side_by_side
from ztp_deploy.manifest import sources_sha256
from ztp_deploy.methods.slice import twin_of
from ztp_deploy.models import RandomWeightsWarning, load_model, source_of
from ztp_deploy.plan import Plan, make_plan
from ztp_deploy.scratch import write_text

PARITY_IMAGES = 16
UNKNOWN_WEIGHTS = "unknown"
"""Of rows whose model could not be loaded."""

Group = tuple[str, str, str]
"""Model, runtime and precision: opened once, measured at every batch."""
Way = tuple[str, bool]
"""A plan's label, and whether it is replayed from a CUDA graph."""
Result = TypeVar("Result")


_ONE_STAGE = ", one stage"


def plans_of(model: nn.Module) -> dict[str, Plan]:
    """The plans that are compared, dense first: ratio 0.7 and the paper's FLOP share, their slice twins, ToMe.

    The paper's share also in one stage, where the others have their first: on a GPU every stage costs its launches.
    """
    pruned = [make_plan(model, ratio=0.7), make_plan(model, flops=0.653)]
    one = make_plan(model, flops=0.653, sites=[pruned[1].stages[0].block])
    plans = [make_plan(model, "dense"), *pruned, *map(twin_of, pruned), make_plan(model, "tome", ratio=0.7)]
    named = {plan.label: plan for plan in plans}
    return named | {pruned[1].label + _ONE_STAGE: one, twin_of(pruned[1]).label + _ONE_STAGE: twin_of(one)}


@dataclass(frozen=True)
class Grid:
    """What is measured: every runtime × precision that it has × batch × plan × model; `device` is cuda or cpu.

    `seconds` is the time measured a cell. Engines are built for batches from 1 to the largest, as many side by side
    as there are `workers`: a worker is a process that loads the model itself.
    """

    models: Sequence[str] = GPU_MODELS
    runtimes: Sequence[str] = RUNTIMES
    precisions: Sequence[str] = GPU_PRECISIONS
    batches: Sequence[int] = GPU_BATCHES
    device: str = "cuda"
    weights: str = "auto"
    seconds: float = GPU_SECONDS
    workers: int = 1
    export_root: Path = EXPORT_ROOT
    engines_root: Path = ENGINES_ROOT
    load: Callable[[str, str], nn.Module] = load_model
    plans: Callable[[nn.Module], dict[str, Plan]] = plans_of

    def check(self) -> None:
        """Raises BadRequest for what no report has."""
        unknown = [runtime for runtime in self.runtimes if runtime not in RUNTIMES]
        unknown += [precision for precision in self.precisions if precision not in GPU_PRECISIONS]
        if self.workers < 1:
            raise BadRequest(
                f"{self.workers} workers were asked for.", "One builds plan after plan; more, side by side."
            )
        if unknown or self.device not in ("cuda", "cpu") or min(self.batches, default=0) < 1:
            wrong = unknown[0] if unknown else f"device {self.device} with batches {list(self.batches)}"
            raise BadRequest(
                f"The GPU report does not know {wrong}.",
                f"Runtimes: {', '.join(RUNTIMES)}; precisions: {', '.join(GPU_PRECISIONS)}; batches from 1 on.",
            )
        for precision in self.precisions:
            if not any(precision in precisions_of(runtime) for runtime in self.runtimes):
                having = [runtime for runtime in RUNTIMES if precision in precisions_of(runtime)]
                raise BadRequest(
                    f"{precision} was asked for, and none of {', '.join(self.runtimes)} has it.",
                    f"Runtimes that have it: {', '.join(having)}.",
                )

    def groups(self) -> list[Group]:
        """What there is to open, in order."""
        return [
            (model, runtime, precision)
            for model in self.models
            for runtime in self.runtimes
            for precision in self.precisions
            if precision in precisions_of(runtime)
        ]


@dataclass(frozen=True)
class Progress:
    """Where a call ended: `done` of `cells`, and `because` of what, where some are left."""

    report: GpuReport
    done: int
    cells: int
    because: str | None

    def lines(self) -> list[str]:
        """What the user is told at the end, with what to type next."""
        again = "" if self.done == self.cells else " Run the same command again to go on."
        lines = [f"{self.done} of {self.cells} cells are done. {self.because or ''}".rstrip() + again]
        failed = sum(row.status != "measured" for row in self.report.latest())
        if failed:
            lines.append(f"Rows missing or failed: {failed}; --retry tries them again.")
        return lines


def _twins(plans: dict[str, Plan]) -> dict[str, str]:
    """The label of each plan's slice twin, where that is among the plans."""
    return {
        label: other
        for label, plan in plans.items()
        if plan.method not in ("dense", "slice")
        for other, candidate in plans.items()
        if candidate == twin_of(plan)
    }


def _failed(row: Row, error: Exception) -> Row:
    return row.model_copy(update={"status": "failed", "reason": runtimes.reason(error)})


def _named(way: Way) -> str:
    """What a way is called among those that are timed against each other."""
    return f"{way[0]}, CUDA graph" if way[1] else way[0]


class _OutOfTime(Exception):
    """The call's time is spent, or too little is left; what is finished is in the file."""


def report_path(root: Path, device: str) -> Path:
    """`<root>/gpu/<gpu>.json`, `none.json` without a GPU."""
    found = environment.gpus() if device == "cuda" else ()
    return root / "gpu" / f"{found[0].slug if found else 'none'}.json"


def measure_gpu(
    grid: Grid,
    path: Path,
    *,
    minutes: float = GPU_MINUTES,
    retry: bool = False,
    command: str = "ztp.measure_gpu",
    advance: Callable[[str], None] = lambda title: None,
) -> Progress:
    """Measures what is missing in the report at `path` until all is there or the minutes are spent.

    Nothing is begun in less time than a comparable step took before, unless all minutes are there for it; what two
    calls could not finish, the last with all of its minutes, becomes a failed row. `retry` tries failed cells
    again; those that lacked software are, once other packages are installed. `advance` hears each step's title
    before it begins. Raises MissingSoftware without a GPU (device cuda), BadRequest for a report of another GPU,
    DamagedFiles for one that cannot be read.
    """
    grid.check()
    if grid.device == "cuda" and not (environment.gpus() and torch.cuda.is_available()):
        raise MissingSoftware(
            "The GPU report needs an NVIDIA GPU; none was found.", "Run it on a machine that has one (`ztp doctor`)."
        )
    if grid.device == "cuda":
        torch.backends.cudnn.allow_tf32 = False  # float32 means float32, here as in the engines
    return _AtWork(grid, path, minutes, retry, command, advance).run()


@dataclass
class _AtWork:
    """One call at work on the file; `gained` once it has brought anything that the next need not do again."""

    grid: Grid
    path: Path
    minutes: float
    retry: bool
    command: str
    advance: Callable[[str], None]
    begin: float = field(default_factory=lambda: time.monotonic())
    gained: bool = False
    trying: bool = False
    _models: dict[str, nn.Module] = field(default_factory=dict)
    _weights: dict[str, str] = field(default_factory=dict)
    _given_up: dict[str, str] = field(default_factory=dict)
    _packages: dict[str, str] = field(default_factory=lambda: environment.versions())
    _sources: str = field(default_factory=lambda: sources_sha256(*backends.SOURCES, "gpu_report/runtimes.py"))
    _earlier: int = 0

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
        self._earlier = len(self.report.sessions)
        groups = self.grid.groups()
        because = None
        try:
            for group in sorted(groups, key=self._turn):
                if self._due(group):
                    self._group(group)
        except _OutOfTime as end:
            because = str(end)
        cells = len(groups) * len(self.grid.batches)
        return Progress(self.report, cells - sum(len(self._due(group)) for group in groups), cells, because)

    def _turn(self, group: Group) -> tuple[bool, int]:
        """What a call ended over comes first, with all the minutes for it; then what is new, then the oldest rows."""
        tries = self._effort(group).tries or self._loading(group[0]).tries
        sessions = {row.batch: row.session for row in self._rows(group)}
        return tries == 0, min((sessions.get(batch, -1) for batch in self._due(group)), default=-1)

    def _due(self, group: Group) -> list[int]:
        """The batches that are to be measured there, for the first time or again."""
        version, why = runtimes.version_of(group[1]), runtimes.unavailable(*group[1:])
        rows = self._rows(group)
        stand = {
            batch: [self._stands(row, version, why) for row in rows if row.batch == batch]
            for batch in self.grid.batches
        }
        return [batch for batch in self.grid.batches if not (stand[batch] and all(stand[batch]))]

    def _rows(self, group: Group) -> list[Row]:
        return [row for row in self.report.latest() if (row.model, row.runtime, row.precision) == group]

    def _stands(self, row: Row, version: str, why: str | None) -> bool:
        """Whether a row is the last word here, where the runtime has that version, or is missing because of `why`."""
        if row.weights not in (UNKNOWN_WEIGHTS, self._weights.get(row.model, row.weights)):
            return False
        if row.status != "missing" and row.sources != self._sources:
            return False
        if row.status == "measured":
            return version in ("", row.version)
        if row.version != version:
            return False
        if row.session >= self._earlier or why:
            return True
        packages = self.report.sessions[row.session].environment.get("packages")
        return not (self.retry or (row.status == "missing" and packages != self._packages))

    def _effort(self, group: Group) -> Effort:
        model, runtime, precision = group
        return self.report.effort(model, runtime, runtimes.version_of(runtime), precision)

    def _group(self, group: Group) -> None:
        """Opens a group's plans and measures them at every batch that is due."""
        name, runtime, precision = group
        self._hurry()
        effort = self._effort(group)
        missing = runtimes.unavailable(runtime, precision)
        if why := self._never_loads(name):
            # Which plans it would have had only the model knows.
            plans_on_file = (row.plan for row in self._rows(group))
            self._leave_out(group, effort, UNKNOWN_WEIGHTS, ("dense", *plans_on_file), missing, why)
            return
        model = self._model(name)
        batches = self._due(group)
        plans = self.grid.plans(model)
        weights = source_of(model).weights.kind
        why = self._overrun(effort)
        if missing or why:
            self._leave_out(group, effort, weights, plans, missing, why)
            return
        blank = self._blank(group, effort, weights)
        with ExitStack() as stack:
            opened, bases = self._open_all(model, plans, blank, effort, stack)
            side = source_of(model).preprocessing.input_size[1]
            twins = _twins(plans)
            for batch in batches:
                rows = {label: base.model_copy(update={"batch": batch}) for label, base in bases.items()}
                cell, seconds = self._step(
                    effort,
                    f"Measure {name} · {runtime} {precision} · batch {batch}",
                    self.report.longest(effort, "cells"),
                    partial(self._measured, rows, opened, twins, batch, side),
                )
                effort.cells[batch] = max(effort.cells.get(batch, 0.0), seconds)
                self.report.add(cell)
                effort.failures = {}
                self._gain(effort)

    def _leave_out(
        self,
        group: Group,
        effort: Effort,
        weights: str,
        plans: Iterable[str],
        missing: str | None,
        why: str | None,
    ) -> None:
        """Puts rows on file that say why nothing is tried: what is `missing`, else why it does not fit."""
        blank = self._blank(group, effort, weights).model_copy(
            update={"status": "missing" if missing else "failed", "reason": missing or why}
        )
        effort.tries = 0
        labels = dict.fromkeys(plans)
        for batch in self._due(group):
            self.report.add([blank.model_copy(update={"batch": batch, "plan": label}) for label in labels])
        self._write()

    def _blank(self, group: Group, effort: Effort, weights: str) -> Row:
        """A row of the group before it is known what comes of it."""
        model, runtime, precision = group
        return Row(
            model=model,
            runtime=runtime,
            version=effort.version,
            precision=precision,
            batch=0,
            plan="",
            status="failed",
            session=self._session,
            weights=weights,
            sources=self._sources,
        )

    def _open_all(
        self, model: nn.Module, plans: dict[str, Plan], blank: Row, effort: Effort, stack: ExitStack
    ) -> tuple[dict[str, Opened], dict[str, Row]]:
        """Opens and proves a group's plans: what is open, and a row for each that says what came of it."""
        images = load_images(None, source_of(model).preprocessing, "float32", PARITY_IMAGES)
        what = f"{blank.runtime} {blank.precision}"
        lasting = blank.runtime not in IN_PROCESS
        if not lasting:  # nothing of it outlives the call before the first cell
            needed = [self._needed(effort, label) for label in plans]
            self._hurry(sum(needed) + self.report.longest(effort, "cells"), f"Measure {blank.model} · {what}")
        opened: dict[str, Opened] = {}
        bases: dict[str, Row] = {}
        failures = self._prepare(model, plans, blank, effort, images)
        for label, plan in plans.items():
            base = blank.model_copy(update={"plan": label, "reason": None})
            if failure := failures.get(label):
                bases[label] = base.model_copy(update=dict(zip(("status", "reason"), failure, strict=True)))
                self._note(effort, bases[label])
                continue
            bases[label], seconds = self._step(
                effort,
                f"Build and prove {blank.model} {label} · {what}",
                self._needed(effort, label),
                partial(self._open, model, plan, base, images, opened, stack),
            )
            if bases[label].status == "measured":
                known = effort.builds.get(label)
                effort.builds[label] = max(known or 0.0, seconds)
                if lasting and known is None:
                    self._gain(effort)
            else:
                self._note(effort, bases[label])
        return opened, bases

    def _note(self, effort: Effort, row: Row) -> None:
        """Puts on file why a plan cannot be measured: its rows come with the cells, and the call may end before."""
        self.advance(f"  {row.plan}: {row.reason}")
        effort.failures[row.plan] = row.reason or ""
        self._write()

    def _prepare(
        self, model: nn.Module, plans: dict[str, Plan], blank: Row, effort: Effort, images: ImageSet
    ) -> dict[str, Failure]:
        """Builds and proves side by side what is not built yet, and says what failed, by plan."""
        fresh = {label: plan for label, plan in plans.items() if label not in effort.builds}
        if self.grid.workers == 1 or len(fresh) < 2 or runtimes.treatment_of(blank.runtime).built_alone:
            return {}

        failures, seconds = self._step(
            effort,
            f"Build and prove {len(fresh)} plans of {blank.model} side by side · {blank.runtime} {blank.precision}",
            max(self._needed(effort, label) for label in fresh),
            partial(
                side_by_side,
                {label: self._job(plan, blank) for label, plan in fresh.items()},
                partial(self.grid.load, blank.model, self.grid.weights),
                images,
                self.grid.workers,
            ),
        )
        built = [label for label, failure in failures.items() if failure is None]
        if built and blank.runtime not in IN_PROCESS:
            effort.builds |= dict.fromkeys(built, seconds)
            self._gain(effort)
        return failures

    def _job(self, plan: Plan, row: Row) -> Callable[[nn.Module], Job]:
        """The job that makes a row, of its model."""
        return partial(
            Job,
            plan=plan,
            runtime=row.runtime,
            precision=row.precision,
            device=self.grid.device,
            max_batch=max(self.grid.batches),
            export_root=self.grid.export_root,
            engines_root=self.grid.engines_root,
        )

    def _needed(self, effort: Effort, label: str) -> float:
        """The seconds that opening a plan will about take: none to speak of for an engine that stands."""
        if label in effort.builds:
            return effort.builds[label] if effort.runtime in IN_PROCESS else 0.0
        return self.report.longest(effort, "builds")

    def _step(self, effort: Effort, title: str, needed: float, work: Callable[[], Result]) -> tuple[Result, float]:
        """Does a step that must not be begun too late, and says how many seconds it took.

        That it was begun is in the file first: a call that is killed over it leaves word.
        """
        self._hurry(needed, title)
        self.advance(title)
        if not self.trying:
            self.trying = True
            if effort not in self.report.efforts:
                self.report.efforts.append(effort)
            effort.tries += 1
            effort.minutes = 0.0 if self.gained else self.minutes
            self._write()
        begin = time.monotonic()
        try:
            return work(), time.monotonic() - begin
        except BaseException:  # Ctrl-C says nothing on how long it would have taken
            effort.tries -= 1
            self._write()
            raise

    def _gain(self, effort: Effort) -> None:
        """Puts on file what the next call need not do again."""
        self.gained, self.trying = True, False
        effort.tries = 0
        self._write()

    def _overrun(self, effort: Effort) -> str | None:
        """Why it is not tried again with so few minutes; None where it may be."""
        if effort.tries < 2 or effort.minutes < self.minutes:
            return None
        what = "It" if effort.runtime else "Loading the model"
        return (
            f"{what} does not fit in {effort.minutes:g} minutes: {effort.tries} calls ended before it was done, the last "
            f"with all of them for it. `ztp gpu-report --retry --minutes {2 * effort.minutes:g}` gives it more."
        )

    def _open(
        self, model: nn.Module, plan: Plan, row: Row, images: ImageSet, opened: dict[str, Opened], stack: ExitStack
    ) -> Row:
        """Opens and proves one plan; its row says what came of it, and only what holds is in `opened`."""
        try:
            one = runtimes.open_job(self._job(plan, row)(model))
            stack.callback(one.close)
            edges = one.edges(images)
        except Exception as error:  # six runtimes, each with exceptions of its own: the row says which
            status, reason = runtimes.failure(error)
            return row.model_copy(update={"status": status, "reason": reason})
        faults = [fault for edge in edges for fault in edge.faults]
        found = {
            "worst_logit": edges[-1].worst_logit,
            "parity": "fails" if faults else "holds",
            "calibration": one.calibration,
        }
        if faults:
            return row.model_copy(update=found | {"status": "failed", "reason": f"parity: {faults[0].detail}"})
        opened[row.plan] = one
        return row.model_copy(update=found | {"status": "measured"})

    def _measured(
        self, bases: dict[str, Row], opened: dict[str, Opened], twins: dict[str, str], batch: int, side: int
    ) -> list[Row]:
        """The rows of one cell: those that are open timed against each other, run plainly and replayed."""
        rows = {(label, False): base for label, base in bases.items()}
        if not opened:
            return list(rows.values())
        device = self.grid.device
        try:
            generator = torch.Generator().manual_seed(0)
            images = torch.randn(batch, 3, side, side, generator=generator).to(device)
            runs: dict[Way, Runs] = {(label, False): one for label, one in opened.items()}
            for label, one in opened.items():
                way, base = (label, True), bases[label].model_copy(update={"cuda_graph": True})
                try:
                    replayed = runtimes.recorded(one, images)
                except Exception as error:  # what cannot be recorded can still be run
                    rows[way] = _failed(base, error)
                    continue
                if replayed is not None:
                    runs[way], rows[way] = replayed, base
            named = {_named(way): run for way, run in runs.items()}
            with torch.inference_mode():
                times = interleave(
                    named,
                    dict.fromkeys(named, images),
                    self.grid.seconds,
                    np.random.default_rng(0),
                    lambda share: None,
                    runtimes.clock_for(device),
                    settling=0.0,
                )
        except Exception as error:  # out of memory, a kernel that is not there: the cell says so, the next goes on
            return [_failed(row, error) if label in opened else row for (label, _), row in rows.items()]
        sittings = {name: [seconds] for name, seconds in times.items()}
        for way in runs:
            label, replayed_too = way
            milliseconds = np.array(times[_named(way)]) * 1e3
            update: dict[str, Any] = {
                "milliseconds": [round(float(value), 4) for value in milliseconds],
                "median": float(np.median(milliseconds)),
                "p90": float(np.percentile(milliseconds, 90)),
                "images_per_second": batch / float(np.median(milliseconds)) * 1e3,
            }
            for ratio, reference in (("speedup", "dense"), ("of_twin", twins.get(label, ""))):
                other = (reference, replayed_too)
                if other in runs and label != reference:
                    update[ratio] = paired_ratio(_named(way), _named(other), batch, sittings)
            rows[way] = rows[way].model_copy(update=update)
        return list(rows.values())

    def _write(self) -> None:
        self.report.sessions[self._session].after = environment.gpu_state()
        write_text(self.path, self.report.to_json())

    def _hurry(self, needed: float = 0.0, what: str = "") -> None:
        """Ends the call where its time is spent, or too short for a step that the next has more for."""
        left = self.begin + self.minutes * 60 - time.monotonic()
        if left <= 0:
            raise _OutOfTime(f"The {self.minutes:g} minutes are spent.")
        if self.gained and needed > left:
            raise _OutOfTime(f"{what}: about {needed:.0f} s are needed and {left:.0f} s are left.")

    def _model(self, name: str) -> nn.Module:
        if name not in self._models:
            self._models.clear()
            loading = self._loading(name)
            self._models[name], _ = self._step(loading, f"Load {name}", 0.0, partial(self._load, name))
            self._hurry()  # the try stays on file where loading took all there was
            if loading in self.report.efforts:
                self.report.efforts.remove(loading)
                self.trying = False
            # What was measured with other weights is measured anew.
            self._weights[name] = source_of(self._models[name]).weights.kind
        return self._models[name]

    def _load(self, name: str) -> nn.Module:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", RandomWeightsWarning)  # every row says what its weights are
            return self.grid.load(name, self.grid.weights)

    def _loading(self, name: str) -> Effort:
        """The record of loading a model, which is of no runtime; on file while calls end over it."""
        return self.report.effort(name, "", "", "")

    def _never_loads(self, name: str) -> str | None:
        """Why a model is not loaded again with so few minutes, for all its groups in this call; None where it may be."""
        loading = self._loading(name)
        if why := self._overrun(loading):
            self._given_up[name] = why
            loading.tries = 0
        return self._given_up.get(name)

    @cached_property
    def _session(self) -> int:
        """The number of this call's entry, made when there is something to enter."""
        state = environment.gpu_state()
        started = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
        self.report.sessions.append(
            Call(
                started=started,
                command=self.command,
                environment=environment.snapshot(),
                before=state,
                after=state,
            )
        )
        return len(self.report.sessions) - 1
