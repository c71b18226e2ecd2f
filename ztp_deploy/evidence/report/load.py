"""Engines under load: rows and sentences, and how they stand in Markdown."""

from __future__ import annotations

from collections.abc import Sequence

from ztp_deploy.evidence.latency import P99_SAMPLES
from ztp_deploy.evidence.load import P95_REQUESTS, Level, Load, LoadReport
from ztp_deploy.evidence.report.comparison import engine_names
from ztp_deploy.evidence.report.markdown import machine_line, markdown_table, milliseconds, role_name, speedup_text

NUMBERS = (0, 1, 4, 5, 6, 7, 8)
"""Columns that hold numbers alone."""
NO_FIGURE = "–"
NOT_SUSTAINED = "not sustained"


def render_load(report: LoadReport) -> str:
    """A line an engine, batch and load; what there is to say of them, and the machine."""
    lines = markdown_table(load_head(report), load_rows(report), NUMBERS)
    lines += ["", *(f"- {line}" for line in load_lines(report))]
    lines += [f"- {machine_line(report.environment, report.gpu)}", *(f"- {note}" for note in report.notes)]
    return "\n".join(lines) + "\n"


def load_head(report: LoadReport) -> list[str]:
    """The columns' names."""
    first = load_names(report)[report.levels[0].role]
    if report.at_a_rate:
        start = ["batch", "requests/s", "engine", "images/s", "ms since due: median"]
        over = f"median over {first}'s (95 % interval)"
    else:
        start = ["batch", "clients", "engine", "images/s (95 % interval)", "ms a request: median"]
        over = f"images/s over {first} (95 % interval)"
    return [*start, "p90", "p95", "p99", "max", *([over] if report.ratios or len(load_names(report)) > 1 else [])]


def load_rows(report: LoadReport) -> list[list[str]]:
    """One row an engine, batch and load, as text."""
    names = load_names(report)
    first = report.levels[0].role
    rows = []
    for level in report.levels:
        rate = f"{level.images_per_second:.1f}"
        if level.low is not None and level.high is not None:
            rate += f" ({level.low:.1f}–{level.high:.1f})"
        if level.verdict == "inconclusive":
            rate += " inconclusive"
        load = f"{level.clients}" if level.rate is None else f"{level.rate:g}"
        times = [level.median, level.p90, level.p95, level.p99, level.maximum]
        cells = [NO_FIGURE if value is None else milliseconds(value) for value in times]
        if level.verdict == "not sustained":
            cells[0] = NOT_SUSTAINED
        row = [str(level.batch), load, names[level.role], rate, *cells]
        if len(names) > 1:
            row.append(_over(report, level, first))
        rows.append(row)
    return rows


def load_lines(report: LoadReport) -> list[str]:
    """What else there is to say, a sentence or two a line."""
    levels = report.levels
    lines = []
    if report.at_a_rate:
        threads = levels[0].clients
        lines.append(
            "Requests are due at random (a Poisson process), the same for every engine, and served by "
            f"{'one thread' if threads == 1 else f'{threads} threads'} of Python; latency counts from when a request was due."
        )
    else:
        lines.append("Clients are threads of one Python process; each asks again as soon as it is answered.")
    behind = [level for level in levels if level.verdict == "not sustained"]
    if behind:
        left = sum(turn.left for level in behind for turn in level.turns)
        asked = left + sum(level.requests for level in behind)
        lines.append(
            f"Not sustained: requests came faster than they were answered, the queue grew, and {left} of {asked} were never "
            "begun. A latency would say how long was measured; the images a second are those that were answered."
        )
    measured = [level for level in levels if level.verdict != "not sustained"]
    if any(level.p95 is None or level.p99 is None for level in measured):
        lines.append(
            f"{NO_FIGURE}: fewer than {P95_REQUESTS} requests say nothing of p95, fewer than {P99_SAMPLES} nothing of p99."
        )
    doubts: dict[str, dict[tuple[str, int], list[Load]]] = {}
    names = load_names(report)
    for level in levels:
        name = names[level.role]
        doubted: list[tuple[str, str | None]] = [(name, level.reason if level.verdict == "inconclusive" else None)]
        if ratio := report.ratio(level.role, levels[0].role, level.batch, level):
            doubted.append((f"{name} over {names[levels[0].role]}", ratio.reason))
        for what, reason in doubted:
            if reason:
                doubts.setdefault(reason, {}).setdefault((what, level.batch), []).append(level)
    for reason, which in doubts.items():
        places = [f"{name} at batch {batch}, {_loads(found)}" for (name, batch), found in which.items()]
        lines.append(f"Inconclusive, {reason}: {'; '.join(places)}.")
    return lines


def load_names(report: LoadReport) -> dict[str, str]:
    """What tables call the engines, by role."""
    return {role: role_name(name) for role, name in engine_names(level.role for level in report.levels).items()}


def _over(report: LoadReport, level: Level, first: str) -> str:
    """How a level stands against the first engine's; empty for that one itself."""
    if level.role == first:
        return ""
    ratio = report.ratio(level.role, first, level.batch, level)
    if ratio is None:
        return NO_FIGURE
    return speedup_text(ratio) + (" inconclusive" if ratio.verdict == "inconclusive" else "")


def _loads(levels: Sequence[Load]) -> str:
    """What was asked of these: "1, 2 clients"."""
    if levels[0].rate is not None:
        return f"{', '.join(f'{level.rate:g}' for level in levels)} requests/s"
    counts = [level.clients for level in levels]
    return f"{', '.join(map(str, counts))} client{'' if counts == [1] else 's'}"
