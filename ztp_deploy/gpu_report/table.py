"""The GPU report as Markdown."""

from __future__ import annotations

from ztp_deploy.defaults import GPU_PRECISIONS
from ztp_deploy.evidence.report.markdown import markdown_table, speedup_text
from ztp_deploy.gpu_report.rows import GpuReport, Row
from ztp_deploy.gpu_report.runtimes import RUNTIMES

_CLOCKS = ("clocks.sm", "clocks.mem", "temperature.gpu", "power.draw")


def render_gpu_report(report: GpuReport) -> str:
    """The table that docs/gpu.md shows: a line a model, runtime, precision and batch, a column a plan; then what is missing."""
    latest = report.latest()
    models = [row.model for row in latest]
    # In the order of the grid: what was tried again stands at the end of the file.
    measured = sorted(
        (row for row in latest if row.status == "measured"),
        key=lambda row: (
            models.index(row.model),
            RUNTIMES.index(row.runtime),
            GPU_PRECISIONS.index(row.precision),
            row.batch,
            row.cuda_graph,
        ),
    )
    plans = list(dict.fromkeys(row.plan for row in latest if row.plan != "dense"))
    head = ["model", "runtime", "precision", "batch", "dense: ms per image", *(f"{plan} over dense" for plan in plans)]
    cells = []
    for cell in dict.fromkeys(map(_cell, measured)):
        rows = {row.plan: row for row in measured if _cell(row) == cell}
        dense = rows.get("dense")
        time = "" if dense is None or dense.median is None else f"{dense.median / dense.batch:.3f}"
        cells.append([*map(str, cell), time, *(_gain(rows.get(plan)) for plan in plans)])
    table = markdown_table(head, cells, right=(3, 4))
    return "\n".join([*table, "", *_absent(latest), *_machine(report, measured)]) + "\n"


def _cell(row: Row) -> tuple[str, str, str, int]:
    """Model, runtime with whether it is replayed, precision and batch."""
    return row.model, f"{row.runtime}, CUDA graph" if row.cuda_graph else row.runtime, row.precision, row.batch


def _gain(row: Row | None) -> str:
    if row is None:
        return ""
    if row.speedup is None:
        return f"{row.images_per_second:.0f} images/s" if row.images_per_second else ""
    text = speedup_text(row.speedup)
    if row.speedup.verdict != "measured":
        text += " inconclusive"
    return f"{text}, {row.of_twin.speedup:.1%} of its twin" if row.of_twin else text


def _absent(rows: list[Row]) -> list[str]:
    """One bullet a runtime and reason, with the precisions and how many rows it stands for."""
    found: dict[tuple[str, str, str], list[str]] = {}
    for row in rows:
        if row.status != "measured":
            found.setdefault((row.runtime, row.status, row.reason or ""), []).append(row.precision)
    return [
        f"- {runtime} {', '.join(dict.fromkeys(precisions))}, {status} ({len(precisions)} rows): {reason}"
        for (runtime, status, reason), precisions in found.items()
    ]


def _machine(report: GpuReport, measured: list[Row]) -> list[str]:
    versions = dict.fromkeys(f"{row.runtime} {row.version}" for row in measured)
    lines = [f"- GPU: {report.gpu}. Timed with {report.clock}, inputs on the device, outputs left there."]
    if any(row.of_twin for row in measured):
        lines.append(
            "- Its twin has the same token counts and merely cuts tokens off: what is missing to 100 % is selection."
        )
    if versions:
        lines.append(f"- {', '.join(versions)}.")
    for calibration in dict.fromkeys(row.calibration for row in measured if row.calibration):
        precisions = dict.fromkeys(row.precision for row in measured if row.calibration == calibration)
        lines.append(f"- {' and '.join(precisions)}: calibrated on {calibration}; accuracy takes images of your own.")
    if any(row.weights == "random" for row in measured):
        lines.append("- Random weights: latency is real, predictions mean nothing.")
    if report.sessions:
        first, last = report.sessions[0].before, report.sessions[-1].after
        if "absent" in first:
            lines.append(f"- Clocks: {first['absent']}")
        else:
            shown = (f"{name} {first.get(name, '?')} → {last.get(name, '?')}" for name in _CLOCKS)
            lines.append(f"- Clocks before and after: {', '.join(shown)}.")
    return lines
