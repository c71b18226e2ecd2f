"""What the command line shows: progress on stderr, results on stdout, JSON on demand."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import sys
from collections.abc import Iterable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.panel import Panel
from rich.progress import BarColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn
from rich.table import Table
from rich.text import Text

if TYPE_CHECKING:
    from ztp_deploy.evidence.latency import LatencyReport
    from ztp_deploy.evidence.parity import ParityReport
    from ztp_deploy.workflow.make import Result


def reader_gone() -> int:
    """The exit code of a program whose output is piped into one that has ended, such as `head`; it writes no more."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    return 128 + signal.SIGPIPE


class _Console(Console):
    def on_broken_pipe(self) -> None:  # left to itself rich ends with the code of a failed gate
        raise SystemExit(reader_gone())


out = _Console(highlight=False, markup=False)  # square brackets are part of many a path
err = _Console(stderr=True, highlight=False, markup=False)


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

    out.print(f"parity of {report.engine} on {report.images}", style="bold", soft_wrap=True)  # a title would be broken
    table = Table()
    for name in EDGE_HEAD:
        table.add_column(name)
    for row, edge in zip(edge_rows(report), report.edges, strict=True):
        style = "green" if edge.holds else "bold red"
        table.add_row(*row[:-1], Text(row[-1], style))
    out.print(table)
    out.print(f"Parity {report.verdict}.", style="green" if report.passed else "bold red", soft_wrap=True)
    for note in report.notes:
        warn(note)


def recorded(what: str) -> None:
    err.print(f"Recorded {what}", soft_wrap=True)


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
    """One JSON object on stdout; what is not finite as "NaN" or "Infinity", as evidence files have it."""
    plain = json.loads(json.dumps(value), parse_constant=str)
    try:
        sys.stdout.write(json.dumps(plain, indent=2, ensure_ascii=False, allow_nan=False) + "\n")
        sys.stdout.flush()
    except BrokenPipeError as error:  # typer would make a failed gate of it, and Python, flushing at its end, code 120
        raise SystemExit(reader_gone()) from error
