"""An evaluation on labelled pictures as rows and sentences."""

from __future__ import annotations

from ztp_deploy.evidence.accuracy import Accuracy, AccuracyReport, Change, Proportion
from ztp_deploy.evidence.report.markdown import percent

HEAD = ("model", "top-1 (95 % interval)", "top-5 (95 % interval)", "images/s")
_CLASSES = 5
"""Classes that are named as those that lost most."""


def accuracy_rows(report: AccuracyReport) -> list[list[str]]:
    """Dense, pruned and their difference, as text; what was not measured is left empty."""
    comparison = report.comparison
    speed = {one.role: one.images_per_second for one in report.speed}

    def row(name: str, found: Accuracy, rate: float | None) -> list[str]:
        top5 = "" if found.top5 is None else share_text(found.top5)
        return [name, share_text(found.top1), top5, "" if rate is None else f"{rate:.1f}"]

    if comparison is None:
        return [row("dense" if report.plan == "dense" else "pruned", report.accuracy, speed["pruned"])]
    return [
        row("dense", comparison.dense, speed["dense"]),
        row("engine" if report.plan == "dense" else "pruned", report.accuracy, speed["pruned"]),
        [
            "difference",
            change_text(comparison.top1),
            "" if comparison.top5 is None else change_text(comparison.top5),
            "",
        ],
    ]


def accuracy_lines(report: AccuracyReport) -> list[str]:
    """What else there is to say, a sentence or two a line."""
    lines = []
    if report.comparison is not None:
        top1, agreement = report.comparison.top1, report.comparison.agreement
        lines += [
            f"The difference is in percentage points. {top1.lost} images are right in the dense model alone, "
            f"{top1.gained} in the other alone: p = {top1.p_value:.2g} (McNemar's exact test).",
            f"Both say the same best class, right or wrong, on {share_text(agreement)}; "
            f"KL(dense ‖ pruned) is {report.comparison.mean_kl:.4f} nats per image.",
        ]
        if losers := _losers(report):
            lines.append(f"Classes that lost most: {losers}.")
        lines.append(f"The dense model ran in {report.reference}, the other in {report.speed[-1].runs}.")
    lines += [
        f"Data: {report.data}. {report.mapping}",
        f"Weights: {report.weights}.",
        "Images a second are from file to logits: reading, decoding and preprocessing are in them, in "
        f"{report.speed[0].workers} threads. For the model's own latency: ztp bench.",
    ]
    if any(one.images < report.images for one in report.speed):
        lines.append("The run was interrupted and gone on with; images a second are those of its last part.")
    return [*lines, *report.notes]


def share_text(part: Proportion) -> str:
    """79.34 % with its interval."""
    return f"{percent(part.share, 2)} ({part.low * 100:.2f}–{part.high * 100:.2f})"


def change_text(change: Change) -> str:
    """Percentage points with their interval: "-0.46 (-0.71 to -0.20)"."""
    return points_text(change.difference, change.low, change.high)


def points_text(difference: float, low: float, high: float) -> str:
    """The same of any difference between two shares."""
    return f"{difference * 100:+.2f} ({low * 100:+.2f} to {high * 100:+.2f})"


def _losers(report: AccuracyReport) -> str:
    """The classes with the most images right before and not now, most first."""
    lost = [(row.dense - row.pruned, row) for row in report.per_class if row.dense is not None]
    lost = sorted((pair for pair in lost if pair[0] > 0), key=lambda pair: (-pair[0], pair[1].label))
    return ", ".join(
        f"{(row.name or f'class {row.label}').split(',')[0]} ({row.dense} → {row.pruned} of {row.images})"
        for _, row in lost[:_CLASSES]
    )
