"""Reports in a terminal."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from functools import partial

from rich import box
from rich.table import Column, Table
from rich.text import Text

from ztp_deploy.console import out, titled_table, warn
from ztp_deploy.evidence.accuracy import AccuracyReport
from ztp_deploy.evidence.latency import LatencyReport
from ztp_deploy.evidence.load import LoadReport
from ztp_deploy.evidence.parity import ParityReport
from ztp_deploy.evidence.report.accuracy import HEAD as ACCURACY_HEAD
from ztp_deploy.evidence.report.accuracy import accuracy_lines, accuracy_rows
from ztp_deploy.evidence.report.html import HTML_FILE
from ztp_deploy.evidence.report.load import NO_FIGURE, NOT_SUSTAINED, load_lines, load_names, load_rows
from ztp_deploy.evidence.report.markdown import macs_line, selection_lines, table_rows, unsure_batches
from ztp_deploy.evidence.report.parity import EDGE_HEAD, edge_rows
from ztp_deploy.evidence.report.summary import Summary

_figure = partial(Column, justify="right", no_wrap=True)
_name = partial(Column, no_wrap=True)
_SHORT = 12
"""Characters of an engine's name that a table under load has room for."""


def show_summary(summary: Summary, kept: bool = True) -> None:
    """Prints the report, and where the engine lies if it is kept."""
    title = f"{summary.model} · {summary.label} · {summary.backend} · {summary.precision}"
    if summary.timings:
        left = _figure("batch"), _name("engine"), _figure("ms/image"), _figure("p90"), _figure("images/s")
        table = titled_table(title, *left, "speed-up (95 % interval)", _figure("of limit"))
        previous = None
        for row in table_rows(summary, reasons=False):
            if previous not in (None, row[0]):
                table.add_section()
            previous = row[0]
            table.add_row(*(cell.replace("**", "") for cell in row))
        out.print(table)
    else:
        out.print(title, style="bold")
    for reason, batches in unsure_batches(summary).items():
        out.print(f"Inconclusive at batch {', '.join(map(str, batches))}: {reason}.", style="yellow")
    for line in selection_lines(summary):
        out.print(line)
    out.print(f"Tokens {' → '.join(map(str, summary.tokens))}.")
    out.print(macs_line(summary.flops))
    verdict = {True: "green", False: "bold red", None: "bold yellow"}[summary.parity_passed]
    out.print(f"Parity {summary.parity}.", style=verdict)
    out.print(f"{summary.gpu}.")
    for note in summary.notes:
        out.print(note, style="yellow")
    out.print(
        f"Made in {summary.seconds} s ({summary.seconds_measuring} s measuring latency), peak memory {summary.peak_gib} GiB."
    )
    if not kept:
        return
    out.print(f"Engine: {summary.engine}", soft_wrap=True)
    out.print(f"Report: {summary.engine}/evidence/{HTML_FILE} (and report.md)", soft_wrap=True)


def show_load(report: LoadReport) -> None:
    """Prints engines under load, a table a batch, without the intervals of throughput: it is to fit 80 columns.

    Long names become letters, which stand above.
    """
    names = load_names(report)
    letters = {name: chr(ord("A") + number) for number, name in enumerate(names.values())}
    short = {name: name for name in letters} if max(map(len, letters)) <= _SHORT else letters
    rows = load_rows(report)
    if short is letters:
        for name, letter in letters.items():
            out.print(f"{letter}: {name}")
    for batch in dict.fromkeys(row[0] for row in rows):
        table = titled_table(
            f"Under load, batch {batch}; {'ms since due' if report.at_a_rate else 'ms a request'}",
            _figure("rate" if report.at_a_rate else "clients"),
            Column("engine", min_width=6, overflow="fold"),
            *map(_figure, ("images/s", "median", "p90", "p95", "p99", "max")),
            Column(f"over {next(iter(short.values()))}" if len(names) > 1 else "", min_width=11, overflow="fold"),
            box=box.SIMPLE_HEAD,
            padding=(0, 1, 0, 0),
            show_edge=False,
        )
        previous = None
        for row in (row for row in rows if row[0] == batch):
            if previous not in (None, row[1]):
                table.add_section()
            previous = row[1]
            _, load, name, rate, *times = row
            over = times.pop() if len(names) > 1 else ""
            if times[0] == NOT_SUSTAINED:
                times[0], over = NO_FIGURE, NOT_SUSTAINED
            times = [f"{float(cell):.1f}" if len(cell) > 4 else cell for cell in times]
            table.add_row(load, short[name], rate.split()[0], *times, over.replace("**", ""))
        out.print(table)
    for line in load_lines(report):
        out.print(line)
    for note in report.notes:
        out.print(note, style="yellow")
    out.print(f"{report.gpu}.")


def show_accuracy(report: AccuracyReport) -> None:
    """Prints an evaluation on labelled pictures."""
    columns = (_figure(name) if name == "images/s" else _name(name) for name in ACCURACY_HEAD)
    table = titled_table(f"{report.model} · {report.plan} · {report.runs} · {report.precision}", *columns)
    for row in accuracy_rows(report):
        if row[0] == "difference":
            table.add_section()
        table.add_row(*row)
    out.print(table)
    for line in accuracy_lines(report):
        out.print(line)


def show_parity(report: ParityReport) -> None:
    """Prints what the parity gate found, edge by edge."""
    out.print(f"parity of {report.engine} on {report.images}", style="bold", soft_wrap=True)  # a title would be broken
    table = Table(*EDGE_HEAD)
    for row, edge in zip(edge_rows(report), report.edges, strict=True):
        style = "green" if edge.holds else "bold red"
        table.add_row(*row[:-1], Text(row[-1], style))
    out.print(table)
    out.print(f"Parity {report.verdict}.", style="green" if report.passed else "bold red", soft_wrap=True)
    for note in report.notes:
        warn(note)


def show_rows(head: Sequence[str], rows: Iterable[Sequence[str]], report: LatencyReport) -> None:
    """Prints a report's table, of cells written for Markdown, its notes and the GPU."""
    table = Table(*head)
    for row in rows:
        table.add_row(*(cell.replace("**", "") for cell in row))
    out.print(table)
    for note in report.notes:
        warn(note)
    out.print(report.gpu)
