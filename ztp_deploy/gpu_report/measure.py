"""The GPU report: everything this machine's GPU can run, measured cell by cell, over as many calls as it takes.

A cell is one model, runtime, precision and batch; its plans are measured interleaved in one process. Every
finished cell is in the file before the next begins, so that a call may end at any time and the next goes on. Engines
that stand are used again; a module compiled in the process is compiled anew.
"""

from __future__ import annotations

import warnings
from collections import Counter
from collections.abc import Callable, Iterable
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from torch import nn

from ztp_deploy import environment
from ztp_deploy.defaults import GPU_MINUTES
from ztp_deploy.errors import MissingSoftware
from ztp_deploy.evidence.images import ImageSet, load_images
from ztp_deploy.gpu_report import runtimes
from ztp_deploy.gpu_report.cell import measure_cell
from ztp_deploy.gpu_report.grid import Grid, Group, twins_among
from ztp_deploy.gpu_report.ledger import UNKNOWN_WEIGHTS, Ledger, OutOfTime
from ztp_deploy.gpu_report.rows import Effort, GpuReport, Row
from ztp_deploy.gpu_report.runtimes import IN_PROCESS, Job, Opened
from ztp_deploy.gpu_report.workers import Failure, side_by_side
from ztp_deploy.models import RandomWeightsWarning, source_of
from ztp_deploy.plan import Plan

PARITY_IMAGES = 16


@dataclass(frozen=True)
class CallResult:
    """Where a call ended: `done` of `cells`, and `because` of what, where some are left."""

    report: GpuReport
    done: int
    cells: int
    because: str | None

    def lines(self) -> list[str]:
        """What the user is told at the end, with what to type next."""
        again = "" if self.done == self.cells else " Run the same command again to go on."
        lines = [f"{self.done} of {self.cells} cells are done. {self.because or ''}".rstrip() + again]
        statuses = Counter(row.status for row in self.report.latest())
        if failed := statuses["failed"]:
            lines.append(f"Rows failed: {failed}; --retry tries them again.")
        if missing := statuses["missing"]:
            lines.append(f"Rows missing: {missing}; they are tried again once the software that they name is here.")
        return lines


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
    command: str = "ztp_deploy.gpu_report.measure.measure_gpu",
    advance: Callable[[str], None] = lambda title: None,
) -> CallResult:
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
    return _Work(grid, Ledger(grid, path, minutes, retry, command, advance)).run()


class _Work:
    """A call at its work: groups opened, proved and measured, as the ledger says."""

    def __init__(self, grid: Grid, ledger: Ledger) -> None:
        self._grid, self._ledger = grid, ledger
        self._models: dict[str, nn.Module] = {}

    def run(self) -> CallResult:
        groups = self._grid.groups()
        because = None
        try:
            for group in sorted(groups, key=self._ledger.turn):
                if self._ledger.due(group):
                    self._group(group)
        except OutOfTime as end:
            because = str(end)
        cells = len(groups) * len(self._grid.batches)
        return CallResult(
            self._ledger.report, cells - sum(len(self._ledger.due(group)) for group in groups), cells, because
        )

    def _group(self, group: Group) -> None:
        """Opens a group's plans and measures them at every batch that is due."""
        name, runtime, precision = group
        self._ledger.hurry()
        effort = self._ledger.effort(group)
        missing = runtimes.unavailable(runtime, precision)
        if why := self._ledger.never_loads(name):
            # Which plans it would have had only the model knows.
            plans_on_file = (row.plan for row in self._ledger.rows(group))
            self._leave_out(group, effort, UNKNOWN_WEIGHTS, ("dense", *plans_on_file), missing, why)
            return
        model = self._model(name)
        batches = self._ledger.due(group)
        plans = self._grid.plans(model)
        weights = source_of(model).weights.kind
        why = self._ledger.overrun(effort)
        if missing or why:
            self._leave_out(group, effort, weights, plans, missing, why)
            return
        blank = self._ledger.blank(group, effort, weights)
        with ExitStack() as stack:
            opened, bases = self._open_all(model, plans, blank, effort, stack)
            side = source_of(model).preprocessing.input_size[1]
            twins = twins_among(plans)
            for batch in batches:
                rows = {label: base.model_copy(update={"batch": batch}) for label, base in bases.items()}
                cell, seconds = self._ledger.step(
                    effort,
                    f"Measure {name} · {runtime} {precision} · batch {batch}",
                    self._ledger.report.longest(effort, "cells"),
                    partial(
                        measure_cell,
                        rows,
                        opened,
                        twins,
                        device=self._grid.device,
                        batch=batch,
                        side=side,
                        seconds=self._grid.seconds,
                    ),
                )
                effort.cells[batch] = max(effort.cells.get(batch, 0.0), seconds)
                self._ledger.report.add(cell)
                effort.failures = {}
                self._ledger.gain(effort)

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
        blank = self._ledger.blank(group, effort, weights).model_copy(
            update={"status": "missing" if missing else "failed", "reason": missing or why}
        )
        effort.tries = 0
        labels = dict.fromkeys(plans)
        for batch in self._ledger.due(group):
            self._ledger.report.add([blank.model_copy(update={"batch": batch, "plan": label}) for label in labels])
        self._ledger.write()

    def _open_all(
        self, model: nn.Module, plans: dict[str, Plan], blank: Row, effort: Effort, stack: ExitStack
    ) -> tuple[dict[str, Opened], dict[str, Row]]:
        """Opens and proves a group's plans: what is open, and a row for each that says what came of it."""
        images = load_images(None, source_of(model).preprocessing, "float32", PARITY_IMAGES)
        what = f"{blank.runtime} {blank.precision}"
        lasting = blank.runtime not in IN_PROCESS
        if not lasting:  # nothing of it outlives the call before the first cell
            needed = [self._ledger.needed(effort, label) for label in plans]
            self._ledger.hurry(
                sum(needed) + self._ledger.report.longest(effort, "cells"), f"Measure {blank.model} · {what}"
            )
        opened: dict[str, Opened] = {}
        bases: dict[str, Row] = {}
        failures = self._prepare(plans, blank, effort, images)
        for label, plan in plans.items():
            base = blank.model_copy(update={"plan": label, "reason": None})
            if failure := failures.get(label):
                bases[label] = base.model_copy(update=dict(zip(("status", "reason"), failure, strict=True)))
                self._ledger.note(effort, bases[label])
                continue
            bases[label], seconds = self._ledger.step(
                effort,
                f"Build and prove {blank.model} {label} · {what}",
                self._ledger.needed(effort, label),
                partial(self._open, model, plan, base, images, opened, stack),
            )
            if bases[label].status == "measured":
                known = effort.builds.get(label)
                effort.builds[label] = max(known or 0.0, seconds)
                if lasting and known is None:
                    self._ledger.gain(effort)
            else:
                self._ledger.note(effort, bases[label])
        return opened, bases

    def _prepare(self, plans: dict[str, Plan], blank: Row, effort: Effort, images: ImageSet) -> dict[str, Failure]:
        """Builds and proves side by side what is not built yet, and says what failed, by plan."""
        fresh = {label: plan for label, plan in plans.items() if label not in effort.builds}
        if self._grid.workers == 1 or len(fresh) < 2 or runtimes.treatment_of(blank.runtime).built_alone:
            return {}
        failures, seconds = self._ledger.step(
            effort,
            f"Build and prove {len(fresh)} plans of {blank.model} side by side · {blank.runtime} {blank.precision}",
            max(self._ledger.needed(effort, label) for label in fresh),
            partial(
                side_by_side,
                {label: self._job(plan, blank) for label, plan in fresh.items()},
                partial(self._grid.load, blank.model, self._grid.weights),
                images,
                self._grid.workers,
            ),
        )
        built = [label for label, failure in failures.items() if failure is None]
        if built and blank.runtime not in IN_PROCESS:
            effort.builds |= dict.fromkeys(built, seconds)
            self._ledger.gain(effort)
        return failures

    def _job(self, plan: Plan, row: Row) -> Callable[[nn.Module], Job]:
        """The job that makes a row, of its model."""
        return partial(
            Job,
            plan=plan,
            runtime=row.runtime,
            precision=row.precision,
            device=self._grid.device,
            max_batch=max(self._grid.batches),
            export_root=self._grid.export_root,
            engines_root=self._grid.engines_root,
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

    def _model(self, name: str) -> nn.Module:
        if name not in self._models:
            self._models.clear()  # one at a time fits any memory
            loading = self._ledger.loading(name)
            self._models[name], _ = self._ledger.step(loading, f"Load {name}", 0.0, partial(self._load, name))
            self._ledger.loaded(name, source_of(self._models[name]).weights.kind)
        return self._models[name]

    def _load(self, name: str) -> nn.Module:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", RandomWeightsWarning)  # every row says what its weights are
            return self._grid.load(name, self._grid.weights)
