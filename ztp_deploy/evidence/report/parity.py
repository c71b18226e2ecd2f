"""The parity gate's finding as rows of text."""

from __future__ import annotations

from ztp_deploy.evidence.report.markdown import percent
from ztp_deploy.evidence.tolerances import Tolerance
from ztp_deploy.evidence.verdict import Edge, ParityReport

EDGE_HEAD = ("edge", "kept sets agree (tokens)", "worst logit", "top-1", "near-ties", "verdict")
STAGE_HEAD = (
    "edge",
    "stage",
    "block",
    "tokens kept",
    "images agreeing",
    "tokens agreeing",
    "images with near-ties",
    "faults",
)


def edge_rows(report: ParityReport) -> list[list[str]]:
    """One row an edge, as text."""
    rows = []
    for edge in report.edges:
        kept = ", ".join(
            f"stage {stage.stage}: {stage.images_agreeing}/{edge.images} ({stage.token_agreement:.1%})"
            for stage in edge.stages
        )
        rows.append(
            [
                edge_name(edge),
                kept or "no stages",
                f"{edge.worst_logit:.1e} σ (≤ {edge.tolerance.logits:g})",
                f"{edge.top1_equal}/{edge.compared_logits}",
                str(len(edge.near_ties)),
                "holds" if edge.holds else f"{len(edge.faults)} faults",
            ]
        )
    return rows


def stage_rows(edge: Edge) -> list[list[str]]:
    """One row a stage: how often both sides keep the same tokens, and what was found where they do not."""
    return [
        [
            edge_name(edge),
            str(stage.stage),
            str(stage.block),
            str(stage.tokens),
            f"{stage.images_agreeing}/{edge.images}",
            percent(stage.token_agreement),
            str(len({tie.image for tie in edge.near_ties if tie.stage == stage.stage})),
            str(sum(fault.stage == stage.stage for fault in edge.faults)),
        ]
        for stage in edge.stages
    ]


def edge_name(edge: Edge) -> str:
    """`eager → engine`."""
    return f"{edge.reference} → {edge.candidate}"


def tolerance_line(tolerance: Tolerance) -> str:
    """The bounds of the gate as a sentence."""
    top1 = "top-1 must be equal" if tolerance.top1 else "top-1 may differ"
    share = percent(tolerance.near_ties, 0)
    where = "" if tolerance.near_ties >= 1 else f", on at most {share} of the images, or on one where they are few"
    return (
        f"Logits within {tolerance.logits:g} σ of the image's own; tokens may differ by near-ties, a relative score gap "
        f"of at most {tolerance.gap:g}{where}; {top1}."
    )
