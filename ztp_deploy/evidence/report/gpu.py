"""The GPU report as Markdown."""

from __future__ import annotations

from ztp_deploy.evidence.gpu_report import GpuReport, Row
from ztp_deploy.evidence.report.markdown import speedup_text

_CLOCKS = ("clocks.sm", "clocks.mem", "temperature.gpu", "power.draw")


def render_gpu_report(report: GpuReport) -> str:
    """The table that the README shows: a line a model, runtime, precision and batch, a column a plan; then what is missing."""
    measured = [row for row in report.rows if row.status == "measured" and row.median is not None]
    plans = list(dict.fromkeys(row.plan for row in report.rows if row.plan != "dense"))
    head = ["model", "runtime", "precision", "batch", "dense: ms an image", *(f"{plan} over dense" for plan in plans)]
    lines = [f"| {' | '.join(head)} |", "|---|---|---|---:|---:|" + "---|" * len(plans)]
    for cell in dict.fromkeys((row.model, row.runtime, row.precision, row.batch) for row in measured):
        rows = {row.plan: row for row in measured if (row.model, row.runtime, row.precision, row.batch) == cell}
        dense = rows.get("dense")
        time = "" if dense is None or dense.median is None else f"{dense.median / dense.batch:.3f}"
        values = [*map(str, cell), time, *(_gain(rows.get(plan)) for plan in plans)]
        lines.append(f"| {' | '.join(values)} |")
    return "\n".join([*lines, "", *_absent(report), *_machine(report)]) + "\n"


def _gain(row: Row | None) -> str:
    if row is None:
        return ""
    if row.speedup is None:
        return f"{row.images_per_second:.0f} images/s" if row.images_per_second else ""
    text = speedup_text(row.speedup)
    return text if row.speedup.verdict == "measured" else f"{text} inconclusive"


def _absent(report: GpuReport) -> list[str]:
    """One bullet a runtime and reason, with how many rows it stands for."""
    counts: dict[tuple[str, str, str], int] = {}
    for row in report.rows:
        if row.status != "measured":
            what = (row.runtime, row.status, row.reason or "")
            counts[what] = counts.get(what, 0) + 1
    return [f"- {runtime}, {status} ({count} rows): {reason}" for (runtime, status, reason), count in counts.items()]


def _machine(report: GpuReport) -> list[str]:
    versions = {row.runtime: row.version for row in report.rows if row.status == "measured"}
    lines = [f"- GPU: {report.gpu}. Timed with {report.clock}, inputs on the device, outputs left there."]
    if versions:
        lines.append(f"- {', '.join(f'{runtime} {version}' for runtime, version in versions.items())}.")
    if any(row.weights == "random" for row in report.rows):
        lines.append("- Random weights: latency is real, predictions mean nothing.")
    if report.sessions:
        first, last = report.sessions[0].before, report.sessions[-1].after
        if "absent" in first:
            lines.append(f"- Clocks: {first['absent']}")
        else:
            shown = (f"{name} {first.get(name, '?')} → {last.get(name, '?')}" for name in _CLOCKS)
            lines.append(f"- Clocks before and after: {', '.join(shown)}.")
    return lines
