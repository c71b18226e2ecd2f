"""The ledger of a GPU report: what is on file, what is due, and whether there is time for it."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import TypeVar

from pydantic import ValidationError

from ztp_deploy import backends, environment
from ztp_deploy.atomic import write_text
from ztp_deploy.errors import BadRequest, DamagedFiles
from ztp_deploy.gpu_report import runtimes
from ztp_deploy.gpu_report.grid import Grid, Group
from ztp_deploy.gpu_report.rows import Call, Effort, GpuReport, Row
from ztp_deploy.gpu_report.runtimes import IN_PROCESS
from ztp_deploy.manifest import sources_sha256

UNKNOWN_WEIGHTS = "unknown"
"""Of rows whose model could not be loaded."""
MEASURING = ("gpu_report/runtimes.py", "gpu_report/cell.py", "gpu_report/grid.py", "evidence/latency.py")
"""What makes and measures rows, beside the back ends: rows of other code than today's are measured anew."""
Result = TypeVar("Result")


class OutOfTime(Exception):
    """The call's time is spent, or too little is left; what is finished is in the file."""


@dataclass
class Ledger:
    """One call's hold on the file, and on its own minutes.

    `gained` once the call has brought anything that the next need not do again; `trying` while a step's try is on
    file. `advance` hears each step's title before it begins.
    """

    grid: Grid
    path: Path
    minutes: float
    retry: bool
    command: str
    advance: Callable[[str], None]
    begin: float = field(default_factory=lambda: time.monotonic())
    gained: bool = False
    trying: bool = False
    _weights: dict[str, str] = field(default_factory=dict)
    _given_up: dict[str, str] = field(default_factory=dict)
    _packages: dict[str, str] = field(default_factory=lambda: environment.versions())
    _sources: str = field(default_factory=lambda: sources_sha256(*backends.SOURCES, *MEASURING))
    _earlier: int = field(init=False)

    def __post_init__(self) -> None:
        self._earlier = len(self.report.sessions)

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

    def due(self, group: Group) -> list[int]:
        """The batches that are to be measured there, for the first time or again."""
        version, why = runtimes.version_of(group[1]), runtimes.unavailable(*group[1:])
        rows = self.rows(group)
        stand = {
            batch: [self._stands(row, version, why) for row in rows if row.batch == batch]
            for batch in self.grid.batches
        }
        return [batch for batch in self.grid.batches if not (stand[batch] and all(stand[batch]))]

    def turn(self, group: Group) -> tuple[bool, int]:
        """What a call ended over comes first, with all the minutes for it; then what is new, then the oldest rows."""
        tries = self.effort(group).tries or self.loading(group[0]).tries
        sessions = {row.batch: row.session for row in self.rows(group)}
        return tries == 0, min((sessions.get(batch, -1) for batch in self.due(group)), default=-1)

    def rows(self, group: Group) -> list[Row]:
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

    def effort(self, group: Group) -> Effort:
        model, runtime, precision = group
        return self.report.effort(model, runtime, runtimes.version_of(runtime), precision)

    def blank(self, group: Group, effort: Effort, weights: str) -> Row:
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
            session=self.session,
            weights=weights,
            sources=self._sources,
        )

    def needed(self, effort: Effort, label: str) -> float:
        """The seconds that opening a plan will about take: none to speak of for an engine that stands."""
        if label in effort.builds:
            return effort.builds[label] if effort.runtime in IN_PROCESS else 0.0
        return self.report.longest(effort, "builds")

    def step(self, effort: Effort, title: str, needed: float, work: Callable[[], Result]) -> tuple[Result, float]:
        """Does a step that must not be begun too late, and says how many seconds it took.

        That it was begun is in the file first: a call that is killed over it leaves word.
        """
        self.hurry(needed, title)
        self.advance(title)
        if not self.trying:
            self.trying = True
            if effort not in self.report.efforts:
                self.report.efforts.append(effort)
            effort.tries += 1
            effort.minutes = 0.0 if self.gained else self.minutes
            self.write()
        begin = time.monotonic()
        try:
            return work(), time.monotonic() - begin
        except BaseException:  # Ctrl-C says nothing on how long it would have taken
            effort.tries -= 1
            self.write()
            raise

    def gain(self, effort: Effort) -> None:
        """Puts on file what the next call need not do again."""
        self.gained, self.trying = True, False
        effort.tries = 0
        self.write()

    def overrun(self, effort: Effort) -> str | None:
        """Why it is not tried again with so few minutes; None where it may be."""
        if effort.tries < 2 or effort.minutes < self.minutes:
            return None
        what = "It" if effort.runtime else "Loading the model"
        return (
            f"{what} does not fit in {effort.minutes:g} minutes: {effort.tries} calls ended before it was done, the last "
            f"with all of them for it. `ztp gpu-report --retry --minutes {2 * effort.minutes:g}` gives it more."
        )

    def note(self, effort: Effort, row: Row) -> None:
        """Puts on file why a plan cannot be measured: its rows come with the cells, and the call may end before."""
        self.advance(f"  {row.plan}: {row.reason}")
        effort.failures[row.plan] = row.reason or ""
        self.write()

    def loading(self, name: str) -> Effort:
        """The record of loading a model, which is of no runtime; on file while calls end over it."""
        return self.report.effort(name, "", "", "")

    def loaded(self, name: str, weights: str) -> None:
        """A model is there: what was measured with other weights is measured anew."""
        self.hurry()  # the try stays on file where loading took all there was
        loading = self.loading(name)
        if loading in self.report.efforts:
            self.report.efforts.remove(loading)
            self.trying = False
        self._weights[name] = weights

    def never_loads(self, name: str) -> str | None:
        """Why a model is not loaded again with so few minutes, for all its groups in this call; None where it may be."""
        loading = self.loading(name)
        if why := self.overrun(loading):
            self._given_up[name] = why
            loading.tries = 0
        return self._given_up.get(name)

    def write(self) -> None:
        self.report.sessions[self.session].after = environment.gpu_state()
        write_text(self.path, self.report.to_json())

    def hurry(self, needed: float = 0.0, what: str = "") -> None:
        """Ends the call where its time is spent, or too short for a step that the next has more for."""
        left = self.begin + self.minutes * 60 - time.monotonic()
        if left <= 0:
            raise OutOfTime(f"The {self.minutes:g} minutes are spent.")
        if self.gained and needed > left:
            raise OutOfTime(f"{what}: about {needed:.0f} s are needed and {left:.0f} s are left.")

    @cached_property
    def session(self) -> int:
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
