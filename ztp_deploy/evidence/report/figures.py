"""Drawings of the HTML report as inline SVG.

Places along x are percentages and sizes along y pixels, so that a drawing fits any width and its text never shrinks.
Colours come from the page's style sheet by class.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from markupsafe import Markup, escape

from ztp_deploy.evidence.latency import LatencyReport, Ratio, Samples
from ztp_deploy.evidence.load import LoadReport
from ztp_deploy.evidence.report.load import load_names
from ztp_deploy.evidence.report.markdown import limit_text, milliseconds, percent, role_name, speedup_text

BINS = 60
_ROW = 26
_STRIP = 72
_AXIS = 26
_LABELS, _NUMBERS = 24.0, 9.0
"""Percent of the width that names, and that numbers, at the left take."""

Scale = Callable[[float], float]
"""A value's place."""


def tokens_figure(tokens: Sequence[int], blocks: Sequence[int]) -> Markup:
    """A bar a stage: the patch tokens that go on; `tokens` hold one more than `blocks`, what enters first."""
    names = ["enter", *(f"block {block}" for block in blocks)]
    parts = []
    for row, (name, count) in enumerate(zip(names, tokens, strict=True)):
        width = (100 - _LABELS - 32) * count / tokens[0]
        y = row * _ROW
        share = "" if row == 0 else f" · {percent(count / tokens[0])}"
        parts += [
            _text(0, y + 17, name, "name"),
            _rect(_LABELS, y + 4, width, _ROW - 8, "bar pruned" if row else "bar dense"),
            _text(_LABELS + width, y + 17, f"{count}{share}", "value", shift=8),
        ]
    said = ", then ".join(f"{count}" for count in tokens)
    return _svg(len(tokens) * _ROW, f"Patch tokens: {said}", parts)


def gains_figure(ratios: Sequence[Ratio], limit: float) -> Markup:
    """Reached speed-ups with their intervals, against 1 × and the one that multiply-accumulates would allow."""
    values = [limit, 1.0, *(value for ratio in ratios for value in (ratio.low, ratio.high, ratio.speedup))]
    low, high = min(values), max(values)
    pad = max(high - low, 0.1) * 0.12
    low, high = max(0.0, low - pad), high + pad
    x = _scale(low, high, _LABELS, 100)
    bottom = 22 + len(ratios) * 32
    parts = [
        _line(x(1.0), 20, x(1.0), bottom, "grid"),
        _line(x(limit), 20, x(limit), bottom, "limit"),
        _text(x(1.0), 13, "1 ×", "tick", anchor=_anchor(x(1.0))),
        _text(x(limit), 13, f"FLOP limit {limit_text(limit)}", "tick strong", anchor=_anchor(x(limit), 70)),
    ]
    for row, ratio in enumerate(ratios):
        kind = " unsure" if ratio.verdict == "inconclusive" else ""
        places = (x(ratio.speedup), x(ratio.low), x(ratio.high))
        parts += _interval_row(22 + row * 32 + 16, f"batch {ratio.batch}", *places, kind)
    parts += _axis(_ticks(low, high, 5), x, bottom)
    said = "; ".join(f"batch {one.batch}: {speedup_text(one).replace('**', '')}" for one in ratios)
    return _svg(bottom + _AXIS, f"Speed-up over dense, {said}; FLOP limit {limit_text(limit)}", parts)


def distribution_figure(latency: LatencyReport, batch: int) -> tuple[Markup, list[str]]:
    """Histograms of all runs at a batch, an engine a row, with median, p90, p95 and p99; and what lies off the axis."""
    rows = [sample for sample in latency.samples if sample.batch == batch]
    times = {sample.role: np.concatenate([np.array(part) for part in sample.milliseconds]) / batch for sample in rows}
    low = min(float(values.min()) for values in times.values())
    # A handful of runs that the system held up would press all others into one bin.
    furthest = max(max(_marks(sample).values()) for sample in rows)
    high = min(max(float(values.max()) for values in times.values()), low + (furthest - low) * 1.15)
    pad = max((high - low) * 0.02, 1e-6)
    low, high = low - pad, high + pad
    x = _scale(low, high, 0, 100)
    bottom = len(rows) * _STRIP
    parts, beyond = _grid(_ticks(low, high, 5), x, 0, bottom), []
    for row, sample in enumerate(rows):
        top, base = row * _STRIP + 26, row * _STRIP + _STRIP - 4
        values = times[sample.role]
        counts, edges = np.histogram(values, BINS, (low, high))
        for count, left, right in zip(counts, edges[:-1], edges[1:], strict=True):
            if count:
                height = (base - top) * float(count) / float(counts.max())
                parts.append(_rect(x(left), base - height, x(right) - x(left), height, f"bin {_hue(sample.role)}"))
        parts.append(_line(0, base, 100, base, "base"))
        for name, value in _marks(sample).items():
            parts.append(_line(x(value), top - (4 if name == "median" else 0), x(value), base, f"mark {name}"))
        heading = f"{role_name(sample.role)}, median {milliseconds(sample.median / batch)} ms"
        parts.append(_text(0, row * _STRIP + 14, heading, "name"))
        if off := int((values > high).sum()):
            slowest = milliseconds(float(values.max()))
            beyond.append(
                f"{role_name(sample.role)}: {off} of {sample.runs} runs beyond the axis, slowest {slowest} ms"
            )
    said = ", ".join(f"{role_name(one.role)} median {milliseconds(one.median / batch)} ms" for one in rows)
    return _svg(bottom + _AXIS, f"Milliseconds an image at batch {batch}: {said}", parts), beyond


def interval_figure(rows: Sequence[tuple[str, float, float, float]]) -> Markup:
    """Shares with their intervals on one axis: (name, share, low, high)."""
    low, high = min(row[2] for row in rows), max(row[3] for row in rows)
    pad = max(high - low, 0.005) * 0.15
    low, high = max(0.0, low - pad) * 100, min(1.0, high + pad) * 100
    x = _scale(low, high, _LABELS, 100)
    bottom = len(rows) * 30
    parts = _grid(_ticks(low, high, 4), x, 0, bottom)
    for index, (name, *shares) in enumerate(rows):
        middle, least, most = (x(share * 100) for share in shares)
        parts += _interval_row(index * 30 + 15, name, middle, least, most, f" {_hue(name)}")
    said = ", ".join(f"{name} {percent(share, 2)}" for name, share, _, _ in rows)
    return _svg(bottom + _AXIS, f"Shares with 95 % intervals: {said}", parts)


@dataclass(frozen=True)
class Point:
    """An engine by what pruning gave and took: speed-up over dense and points of top-1, each (middle, low, high)."""

    name: str
    speedup: tuple[float, float, float]
    change: tuple[float, float, float]
    mine: bool


DENSE = Point("dense", (1.0, 1.0, 1.0), (0.0, 0.0, 0.0), mine=False)


def undominated(points: Sequence[Point]) -> list[Point]:
    """Those that no other beats in one without losing in the other, slowest first."""
    found = [
        one
        for one in points
        if not any(
            other.speedup[0] >= one.speedup[0]
            and other.change[0] >= one.change[0]
            and (other.speedup[0], other.change[0]) != (one.speedup[0], one.change[0])
            for other in points
        )
    ]
    return sorted(found, key=lambda point: point.speedup[0])


def pareto_figure(points: Sequence[Point]) -> Markup:
    """Points of top-1 over the speed-up, dense among them, a line through those that none beats in both."""
    points = [DENSE, *points]
    bottom = 272.0
    across = _padded([value for point in points for value in point.speedup], 0.05)
    upward = _padded([value for point in points for value in point.change], 0.5)
    x, y, parts = _plane(across, upward, 12, bottom, lambda tick: f"{tick:+g}" if tick else "0")
    front = undominated(points)
    for one, other in itertools.pairwise(front):
        parts.append(_line(x(one.speedup[0]), y(one.change[0]), x(other.speedup[0]), y(other.change[0]), "front"))
    for point in points:
        (speedup, low, high), (change, worst, best) = point.speedup, point.change
        hue = "dense" if point is DENSE else "" if point.mine else "other"
        if point is not DENSE:
            parts += [
                _line(x(low), y(change), x(high), y(change), f"whisker {hue}"),
                _line(x(speedup), y(worst), x(speedup), y(best), f"whisker {hue}"),
            ]
        late = x(speedup) > 70
        parts += [
            _dot(x(speedup), y(change), f"dot {hue}"),
            _text(
                x(speedup),
                y(change) - 10,
                point.name,
                "name" if point.mine else "value",
                anchor="end" if late else "start",
                shift=-8 if late else 8,
            ),
        ]
    said = "; ".join(f"{point.name} × {point.speedup[0]:.2f}, {point.change[0]:+.2f} points" for point in points)
    return _svg(bottom + _AXIS, f"Top-1 against speed: {said}", parts)


def load_figure(report: LoadReport, batch: int) -> Markup | None:
    """p95 over images a second, a line an engine through its numbers of clients; None where a p95 is not known.

    None, too, for rates, and for one number of clients, which makes no line.
    """
    levels = [level for level in report.levels if level.batch == batch]
    if report.at_a_rate or len({level.clients for level in levels}) < 2 or any(level.p95 is None for level in levels):
        return None
    names = load_names(report)
    top = 24.0 * len(names) + 14
    bottom = top + 240
    least, most = _padded([level.images_per_second for level in levels], 1e-3)
    low, high = _padded([level.p95 or 0.0 for level in levels], 1e-3)
    x, y, parts = _plane((max(0.0, least), most), (max(0.0, low), high), top, bottom, _number)
    said = []
    for row, (role, name) in enumerate(names.items()):
        hue = (" dense", "", " other")[min(row, 2)]
        line = sorted((level for level in levels if level.role == role), key=lambda level: level.clients)
        places = [(x(level.images_per_second), y(level.p95 or 0.0)) for level in line]
        parts += [
            _dot(_NUMBERS + 1, 24 * row + 10, f"dot{hue}"),
            _text(_NUMBERS + 1, 24 * row + 14, name, "name", shift=12),
        ]
        parts += [_line(*one, *other, f"whisker{hue}") for one, other in itertools.pairwise(places)]
        for level, (across, down) in zip(line, places, strict=True):
            parts += [
                _dot(across, down, f"dot{hue}" + (" unsure" if level.verdict == "inconclusive" else "")),
                _text(across, down + 4, str(level.clients), "value", *(("end", -9) if across > 96 else ("start", 9))),
            ]
        shown = (f"{one.clients}: {one.images_per_second:.1f} and {milliseconds(one.p95 or 0.0)} ms" for one in line)
        said.append(f"{name} {', '.join(shown)}")
    return _svg(bottom + _AXIS, f"Images a second and p95 by number of clients: {'; '.join(said)}", parts)


def _scale(low: float, high: float, start: float, end: float) -> Scale:
    """What puts `low` at `start`, `high` at `end`, and other values evenly."""
    return lambda value: start + (end - start) * (value - low) / (high - low)


def _padded(values: Sequence[float], least: float) -> tuple[float, float]:
    """The range of values with room around it."""
    low, high = min(values), max(values)
    pad = max((high - low) * 0.12, least)
    return low - pad, high + pad


def _marks(sample: Samples) -> dict[str, float]:
    """Milliseconds an image by the name of the quantile, those that are known."""
    known = {"median": sample.median, "p90": sample.p90, "p95": sample.p95, "p99": sample.p99}
    return {name: value / sample.batch for name, value in known.items() if value is not None}


def _hue(role: str) -> str:
    return role if role in ("dense", "slice") else "pruned"


def _ticks(low: float, high: float, count: int) -> list[float]:
    """Round numbers within a range, about `count` of them."""
    rough = (high - low) / count
    size = 10.0 ** math.floor(math.log10(rough))
    step = min((size * factor for factor in (1, 2, 2.5, 5, 10)), key=lambda one: abs(one - rough))
    first = math.ceil(low / step - 1e-9)
    return [round(step * number, 10) for number in range(first, math.floor(high / step + 1e-9) + 1)]


def _number(value: float) -> str:
    return f"{value:g}"


def _axis(ticks: Sequence[float], x: Scale, bottom: float) -> list[Markup]:
    return [_text(x(tick), bottom + 17, _number(tick), "tick", anchor=_anchor(x(tick), 98)) for tick in ticks]


def _grid(ticks: Sequence[float], x: Scale, top: float, bottom: float) -> list[Markup]:
    """Lines from `top` to `bottom`, with their numbers below."""
    return [*(_line(x(tick), top, x(tick), bottom, "grid") for tick in ticks), *_axis(ticks, x, bottom)]


def _plane(
    across: tuple[float, float],
    upward: tuple[float, float],
    top: float,
    bottom: float,
    number: Callable[[float], str],
) -> tuple[Scale, Scale, list[Markup]]:
    """For points: the scales of these two ranges, and a grid with numbers below and, as `number` writes them, at the left."""
    x = _scale(*across, _NUMBERS, 100)
    y = _scale(*upward, bottom, top)
    parts = _grid(_ticks(*across, 5), x, top, bottom)
    for tick in _ticks(*upward, 5):
        parts += [
            _line(_NUMBERS, y(tick), 100, y(tick), "grid"),
            _text(_NUMBERS, y(tick) + 4, number(tick), "tick", anchor="end", shift=-8),
        ]
    return x, y, parts


def _interval_row(y: float, name: str, middle: float, low: float, high: float, kind: str) -> list[Markup]:
    """A name at the left, and an interval with its middle; all but `y` and the words are places across."""
    return [_text(0, y + 4, name, "name"), _line(low, y, high, y, f"whisker{kind}"), _dot(middle, y, f"dot{kind}")]


def _anchor(x: float, wide: float = 94) -> str:
    return "start" if x < 4 else "end" if x > wide else "middle"


def _svg(height: float, said: str, parts: Sequence[Markup]) -> Markup:
    head = Markup('<svg class="figure" width="100%" height="{}" role="img" aria-label="{}">').format(_n(height), said)
    return head + Markup("").join(parts) + Markup("</svg>")


def _rect(x: float, y: float, width: float, height: float, kind: str) -> Markup:
    return Markup('<rect class="{}" x="{}%" y="{}" width="{}%" height="{}"></rect>').format(
        kind, _n(x), _n(y), _n(width), _n(height)
    )


def _line(x1: float, y1: float, x2: float, y2: float, kind: str) -> Markup:
    return Markup('<line class="{}" x1="{}%" y1="{}" x2="{}%" y2="{}"></line>').format(
        kind, _n(x1), _n(y1), _n(x2), _n(y2)
    )


def _dot(x: float, y: float, kind: str) -> Markup:
    return Markup('<circle class="{}" cx="{}%" cy="{}" r="5"></circle>').format(kind, _n(x), _n(y))


def _text(x: float, y: float, words: str, kind: str, anchor: str = "start", shift: float = 0) -> Markup:
    moved = Markup(' dx="{}"').format(_n(shift)) if shift else ""
    return Markup('<text class="{}" x="{}%" y="{}"{} text-anchor="{}">{}</text>').format(
        kind, _n(x), _n(y), moved, anchor, escape(words)
    )


def _n(value: float) -> str:
    return f"{value:.2f}".rstrip("0").rstrip(".")
