"""The report in a terminal, and engines under load."""

from __future__ import annotations

from rich import box
from rich.console import Console
from rich.table import Table

from ztp_deploy.evidence.load import LoadReport
from ztp_deploy.evidence.report.html import HTML_FILE
from ztp_deploy.evidence.report.load import NO_FIGURE, NOT_SUSTAINED, load_lines, load_names, load_rows
from ztp_deploy.evidence.report.markdown import macs_line, selection_lines, table_rows, unsure_batches
from ztp_deploy.evidence.report.summary import Summary

_SHORT = 12
"""Characters of an engine's name that a table under load has room for."""


def show_summary(summary: Summary, console: Console, kept: bool = True) -> None:
    """Prints the report, and where the engine lies if it is kept."""
    title = f"{summary.model} · {summary.label} · {summary.backend} · {summary.precision}"
    if summary.timings:
        table = Table(title=title, title_justify="left", title_style="bold")
        for name, justify in (
            ("batch", "right"),
            ("engine", "left"),
            ("ms/image", "right"),
            ("p90", "right"),
            ("images/s", "right"),
            ("speed-up (95 % interval)", "left"),
            ("of limit", "right"),
        ):
            table.add_column(name, justify=justify, no_wrap="speed-up" not in name)  # type: ignore[arg-type]
        previous = None
        for row in table_rows(summary, reasons=False):
            if previous not in (None, row[0]):
                table.add_section()
            previous = row[0]
            table.add_row(*(cell.replace("**", "") for cell in row))
        console.print(table)
    else:
        console.print(title, style="bold")
    for reason, batches in unsure_batches(summary).items():
        console.print(f"Inconclusive at batch {', '.join(map(str, batches))}: {reason}.", style="yellow")
    for line in selection_lines(summary):
        console.print(line)
    console.print(f"Tokens {' → '.join(map(str, summary.tokens))}.", highlight=False)
    console.print(macs_line(summary.flops), highlight=False)
    verdict = {True: "green", False: "bold red", None: "bold yellow"}[summary.parity_passed]
    console.print(f"Parity {summary.parity}.", style=verdict, highlight=False)
    console.print(f"{summary.gpu}.", highlight=False)
    for note in summary.notes:
        console.print(note, style="yellow", highlight=False)
    console.print(
        f"Made in {summary.seconds} s ({summary.seconds_measuring} s measuring latency), peak memory {summary.peak_gib} GiB.",
        highlight=False,
    )
    if not kept:
        return
    console.print(f"Engine: {summary.engine}", highlight=False, soft_wrap=True)
    console.print(f"Report: {summary.engine}/evidence/{HTML_FILE} (and report.md)", highlight=False, soft_wrap=True)


def show_load(report: LoadReport, console: Console) -> None:
    """Prints engines under load, a table a batch, without the intervals of throughput: it is to fit 80 columns.

    Long names become letters, which stand above.
    """
    names = load_names(report)
    letters = {name: chr(ord("A") + number) for number, name in enumerate(names.values())}
    short = {name: name for name in letters} if max(map(len, letters)) <= _SHORT else letters
    rows = load_rows(report)
    if short is letters:
        for name, letter in letters.items():
            console.print(f"{letter}: {name}", highlight=False)
    for batch in dict.fromkeys(row[0] for row in rows):
        counted = "ms since due" if report.at_a_rate else "ms a request"
        title = f"Under load, batch {batch}; {counted}"
        table = Table(title=title, title_justify="left", title_style="bold", box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0))
        table.show_edge = False
        table.add_column("rate" if report.at_a_rate else "clients", justify="right", no_wrap=True)
        table.add_column("engine", min_width=6, overflow="fold")
        for name in ("images/s", "median", "p90", "p95", "p99", "max"):
            table.add_column(name, justify="right", no_wrap=True)
        table.add_column(f"over {next(iter(short.values()))}" if len(names) > 1 else "", overflow="fold", min_width=11)
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
        console.print(table)
    for line in load_lines(report):
        console.print(line, highlight=False)
    for note in report.notes:
        console.print(note, style="yellow", highlight=False)
    console.print(f"{report.gpu}.", highlight=False)
