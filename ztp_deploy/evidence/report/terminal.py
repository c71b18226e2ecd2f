"""The report in a terminal."""

from __future__ import annotations

from rich.console import Console
from rich.table import Table

from ztp_deploy.evidence.report.html import HTML_FILE
from ztp_deploy.evidence.report.markdown import macs_line, selection_lines, table_rows, unsure_batches
from ztp_deploy.evidence.report.summary import Summary


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
