"""The table of pruning methods at one FLOP share, as Markdown."""

from __future__ import annotations

from ztp_deploy.evidence.methods import DENSE, MethodsReport, twin_role
from ztp_deploy.evidence.report.markdown import machine_line, markdown_table, percent, speedup_text

HEAD = (
    "batch",
    "method",
    "MACs planned",
    "executed",
    "ms per image",
    "over dense",
    "behind the fastest",
    "selection costs",
)


def render_methods(report: MethodsReport) -> str:
    """A line a method and batch: shares of multiply-accumulates, speed over dense, and what selection costs."""
    lines = [
        *markdown_table(HEAD, methods_rows(report), right=(0, 2, 3, 4)),
        "",
        f'- {report.model} in {report.backend}, {report.precision}. Brackets hold 95 % intervals. "Selection costs" is '
        "the share of a method's time by which its slice twin is faster, which has the same counts and merely cuts tokens off.",
        f"- {machine_line(report.latency.environment, report.latency.gpu)}",
    ]
    unsure = sorted(
        {
            f"{r.engine} over {r.reference}"
            for r in report.latency.ratios
            if r.verdict == "inconclusive" and r.reference == DENSE
        }
    )
    if unsure:
        lines.append(f"- Inconclusive, the interval is wide or the machine drifted: {', '.join(unsure)}.")
    return "\n".join([*lines, *(f"- {note}" for note in report.latency.notes)]) + "\n"


def methods_rows(report: MethodsReport) -> list[list[str]]:
    """One row a method and batch, as text."""
    rows = []
    for batch in dict.fromkeys(sample.batch for sample in report.latency.samples):
        dense = report.latency.sample(DENSE, batch)
        rows.append([str(batch), DENSE, "100.0 %", "100.0 %", f"{dense.median / batch:.2f}", "", "", ""])
        best = report.fastest(batch)
        for row in report.methods:
            rows.append(
                [
                    str(batch),
                    row.method,
                    percent(row.planned_share),
                    percent(row.executed_share),
                    f"{report.latency.sample(row.method, batch).median / batch:.2f}",
                    speedup_text(report.latency.ratio(row.method, DENSE, batch)),
                    "fastest" if row.method == best else _interval(report.behind(row.method, best, batch)),
                    _interval(report.behind(row.method, twin_role(row.method), batch)),
                ]
            )
    return rows


def _interval(behind: tuple[float, float, float]) -> str:
    middle, low, high = (f"{value * 100:.1f}" for value in behind)
    return f"{middle} % ({low} to {high})"
