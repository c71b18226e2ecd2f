"""What the command line shows: progress on stderr, results on stdout, JSON on demand."""

from __future__ import annotations

import contextlib
import errno
import json
import os
import sys
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.panel import Panel
from rich.progress import BarColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn
from rich.table import Table
from rich.text import Text

from ztp_deploy.errors import write_failed

if TYPE_CHECKING:
    from ztp_deploy.evidence.latency import LatencyReport
    from ztp_deploy.evidence.methods import MethodsReport
    from ztp_deploy.evidence.parity import ParityReport
    from ztp_deploy.workflow import Result

out = Console(highlight=False, markup=False)  # square brackets are part of many a path
err = Console(stderr=True, highlight=False, markup=False)


class Bars:
    """Progress on stderr: one line a step, with a bar where the amount of work is known."""

    @contextlib.contextmanager
    def step(self, title: str, total: float | None) -> Iterator[Any]:
        progress = Progress(
            SpinnerColumn(finished_text="[green]✓[/green]"),
            TextColumn("{task.description}", markup=False),
            BarColumn(),
            TimeElapsedColumn(),
            console=err,
            transient=False,
            disable=not err.is_terminal,
        )
        if not err.is_terminal:
            err.print(title)
        with progress:
            task = progress.add_task(title, total=total)
            yield lambda amount: progress.update(task, advance=amount)
            progress.update(task, total=total or 1, completed=total or 1)

    def warn(self, text: str) -> None:
        warn(text)


def warn(text: str) -> None:
    err.print(Panel(Text(text), title="note", title_align="left", border_style="yellow"))


def show_result(result: Result, as_json: bool, *, kept: bool = True) -> None:
    """Prints the summary, and where the engine lies if it is kept."""
    from ztp_deploy.evidence.report.terminal import show_summary

    if as_json:
        print_json(result.summary.model_dump(mode="json"))
    else:
        show_summary(result.summary, out, kept)


def show_parity(report: ParityReport) -> None:
    from ztp_deploy.evidence.report.parity import EDGE_HEAD, edge_rows

    table = Table(title=f"parity of {report.engine} on {report.images}", title_justify="left", title_style="bold")
    for name in EDGE_HEAD:
        table.add_column(name)
    for row, edge in zip(edge_rows(report), report.edges, strict=True):
        style = "green" if edge.holds else "bold red"
        table.add_row(*row[:-1], Text(row[-1], style))
    out.print(table)
    for note in report.notes:
        warn(note)


def check_record(folder: Path | None) -> None:
    """Raises WriteFailed where a record could not be written: before anything is measured for it."""
    if folder is None:
        return
    nearest = next(path for path in (folder.absolute(), *folder.absolute().parents) if path.exists())
    if not nearest.is_dir():
        raise write_failed(str(folder), NotADirectoryError(errno.ENOTDIR, os.strerror(errno.ENOTDIR)))
    if not os.access(nearest, os.W_OK | os.X_OK):
        raise write_failed(str(folder), PermissionError(errno.EACCES, os.strerror(errno.EACCES)))


def record_result(result: Result, folder: Path) -> None:
    """Writes summary, raw samples and table, named after model, plan, engine and machine, without local paths."""
    from ztp_deploy.evidence.report.markdown import render_tables
    from ztp_deploy.scratch import write_text

    assert result.latency is not None  # only engines that run are measured, and only these recorded
    where = Path(result.summary.engine)
    summary = result.summary.model_copy(update={"engine": f"engines/{where.parent.name}/{where.name}"})
    backend = summary.backend.split()[0]
    engine = f"{backend}-{summary.precision}{_particulars([where.name])}"
    name = f"{summary.model}--{summary.label}--{engine}--{_slug(summary.machine)}"
    write_text(folder / f"{name}.json", summary.to_json())
    write_text(folder / f"{name}.samples.json", result.latency.to_json())
    write_text(folder / f"{name}.md", render_tables(summary))
    err.print(f"Recorded {folder / name}.json, .samples.json and .md", soft_wrap=True)


def record_comparison(report: LatencyReport, model: str, folder: Path) -> None:
    """Writes engines measured against each other and their table, without local paths."""
    from ztp_deploy.evidence.report.comparison import render_comparison
    from ztp_deploy.scratch import write_text

    engines = _particulars([sample.engine for sample in report.samples])
    name = f"{model}--comparison{engines}--{_slug(report.environment)}"
    write_text(folder / f"{name}.samples.json", report.to_json())
    write_text(folder / f"{name}.md", render_comparison(report))
    err.print(f"Recorded {folder / name}.samples.json and .md", soft_wrap=True)


def record_methods(report: MethodsReport, folder: Path) -> None:
    """Writes methods measured against each other and their table, without local paths."""
    from ztp_deploy.evidence.report.methods import render_methods
    from ztp_deploy.scratch import write_text

    particulars = _particulars([sample.engine for sample in report.latency.samples])
    engines = f"{report.backend.split()[0]}-{report.precision}{particulars}"
    name = f"{report.model}--methods--{engines}--{_slug(report.latency.environment)}"
    write_text(folder / f"{name}.samples.json", report.to_json())
    write_text(folder / f"{name}.md", render_methods(report))
    err.print(f"Recorded {folder / name}.samples.json and .md", soft_wrap=True)


def _particulars(folders: list[str]) -> str:
    """What all these engines have in common beyond the defaults, for file names: one batch size, settings, calibration."""
    from ztp_deploy.backends import particulars

    common = [set(values) for values in zip(*map(particulars, folders), strict=True)]
    return "".join(f"-{value}" for values in common if len(values) == 1 for value in values if value)


def _slug(machine: dict[str, Any]) -> str:
    """The processor's name for file names."""
    words = "".join(c if c.isalnum() else "-" for c in machine["cpu"].lower()).split("-")
    return "-".join(filter(None, words))


def show_rows(head: Sequence[str], rows: Iterable[Sequence[str]], report: LatencyReport) -> None:
    """Prints a report's table, of cells written for Markdown, its notes and the GPU."""
    table = Table(*head)
    for row in rows:
        table.add_row(*(cell.replace("**", "") for cell in row))
    out.print(table)
    for note in report.notes:
        warn(note)
    out.print(report.gpu)


def print_json(value: Any) -> None:
    sys.stdout.write(json.dumps(value, indent=2, ensure_ascii=False) + "\n")
