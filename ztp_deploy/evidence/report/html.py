"""The report as one HTML page that needs nothing but itself: no network, no scripts, no fonts of its own.

Numbers are formatted by the functions of the Markdown report; what is not known is called "not measured".
"""

from __future__ import annotations

import re
import shlex
from collections.abc import Sequence
from importlib.resources import files
from pathlib import Path
from typing import Any

from jinja2 import Environment, StrictUndefined
from markupsafe import Markup, escape

from ztp_deploy.atomic import write_text
from ztp_deploy.backends import EVIDENCE
from ztp_deploy.errors import BadRequest
from ztp_deploy.evidence.accuracy import AccuracyReport, ClassRow
from ztp_deploy.evidence.load import LoadReport
from ztp_deploy.evidence.report import figures
from ztp_deploy.evidence.report.accuracy import HEAD as ACCURACY_HEAD
from ztp_deploy.evidence.report.accuracy import accuracy_lines, accuracy_rows, change_text, share_text
from ztp_deploy.evidence.report.folder import Evidence, read_evidence
from ztp_deploy.evidence.report.load import NUMBERS as LOAD_NUMBERS
from ztp_deploy.evidence.report.load import load_head, load_lines, load_rows
from ztp_deploy.evidence.report.markdown import (
    giga,
    limit_text,
    macs_line,
    milliseconds,
    percent,
    selection_lines,
    speedup_text,
    table_rows,
)
from ztp_deploy.evidence.report.parity import EDGE_HEAD, STAGE_HEAD, edge_name, edge_rows, stage_rows, tolerance_line
from ztp_deploy.evidence.report.summary import Summary
from ztp_deploy.evidence.schema import HTML_FILE
from ztp_deploy.source import Preprocessing

NOT_MEASURED = "not measured"
_TEMPLATE = "report.html.jinja"
_LISTED = 50
"""Faults and near-ties that are listed one by one; parity.json holds all."""

LATENCY_HEAD = (
    *("batch", "engine", "ms per image: median", "p90", "p95", "p99", "images/s"),
    *("speed-up over dense (95 % interval)", "of the FLOP limit"),
)


def write_report(directory: Path | str, beside: Sequence[Path | str] = ()) -> Path:
    """Renders `evidence/report.html` of an engine folder from what lies there and returns its path.

    Engines `beside` it are drawn with it, accuracy against speed. Raises what `read_evidence` and `comparable`
    raise, and WriteFailed.
    """
    path = Path(directory) / EVIDENCE / HTML_FILE
    evidence = read_evidence(Path(directory))
    others = [comparable(evidence, read_evidence(Path(other)), Path(other)) for other in beside]
    write_text(path, render_html(evidence, others))
    return path


def comparable(evidence: Evidence, other: Evidence, directory: Path) -> Evidence:
    """The other engine's evidence, if both may stand in one picture.

    Raises BadRequest where speed-up or accuracy change of one was not measured, or not of the same weights in the same
    back end, precision, machine and labelled pictures.
    """
    for one, name in ((evidence, "this engine"), (other, str(directory))):
        lacks = _lacks(one)
        if lacks:
            raise BadRequest(f"{name} has no {' and no '.join(lacks)}.", "Run `ztp bench` and `ztp eval` on it first.")
    assert evidence.accuracy is not None
    assert other.accuracy is not None
    pairs = {
        "weights": [one.manifest.source.weights.sha256 for one in (evidence, other)],
        "preprocessing": [_shown(one.manifest.source.preprocessing) for one in (evidence, other)],
        "back end": [f"{one.summary.backend}, {one.summary.provider}" for one in (evidence, other)],
        "precision": [one.summary.precision for one in (evidence, other)],
        "processor": [str(one.summary.machine.get("cpu")) for one in (evidence, other)],
        "GPU": [one.summary.gpu for one in (evidence, other)],
        "labelled pictures": [evidence.accuracy.data_sha256, other.accuracy.data_sha256],
    }
    for what, (mine, its) in pairs.items():
        if mine != its:
            raise BadRequest(
                f"{directory} has other {what} than this engine: {its[:120]}, not {mine[:120]}.",
                "Compare engines that differ in how they prune alone.",
            )
    return other


def _shown(preprocessing: Preprocessing) -> str:
    return ", ".join(f"{name} {value}" for name, value in preprocessing if name != "input_size")


def _lacks(evidence: Evidence) -> list[str]:
    """What an engine needs for its place in the picture and has not."""
    accuracy = evidence.accuracy
    missing = [] if evidence.summary.gains else ["speed-up over dense"]
    return missing if accuracy and accuracy.comparison else [*missing, "accuracy change against dense"]


def pareto_figures(evidence: Evidence, others: Sequence[Evidence]) -> list[tuple[int, Markup]]:
    """A drawing for every batch that all engines were measured at; none where this one lacks a number."""
    if _lacks(evidence):
        return []
    every = [evidence, *others]
    batches = set.intersection(*({gain.batch for gain in one.summary.gains} for one in every))
    return [
        (batch, figures.pareto_figure([_point(one, batch, one is evidence) for one in every]))
        for batch in sorted(batches)
    ]


def _point(evidence: Evidence, batch: int, mine: bool) -> figures.Point:
    ratio = next(gain.speedup for gain in evidence.summary.gains if gain.batch == batch)
    assert evidence.accuracy is not None
    assert evidence.accuracy.comparison is not None
    change = evidence.accuracy.comparison.top1
    return figures.Point(
        evidence.summary.label,
        (ratio.speedup, ratio.low, ratio.high),
        (change.difference * 100, change.low * 100, change.high * 100),
        mine,
    )


def render_html(evidence: Evidence, others: Sequence[Evidence] = ()) -> str:
    """The page; `others` are engines that `comparable` let through."""
    environment = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    environment.filters |= {"bold": _bold, "percent": percent, "ms": milliseconds, "giga": giga, "limit": limit_text}
    summary, parity, latency, accuracy = evidence.summary, evidence.parity, evidence.latency, evidence.accuracy
    template = environment.from_string(files(__package__).joinpath(_TEMPLATE).read_text(encoding="utf-8"))
    batches = sorted({sample.batch for sample in latency.samples}) if latency else []
    return template.render(
        e=evidence,
        s=summary,
        manifest=evidence.manifest,
        not_measured=NOT_MEASURED,
        badges=_badges(evidence),
        alarms=_alarms(evidence),
        figures=_key_figures(evidence),
        tokens=figures.tokens_figure(summary.tokens, summary.blocks),
        macs_line=macs_line(summary.flops),
        parity=parity,
        edge_head=EDGE_HEAD,
        edges=[(edge_name(edge), edge) for edge in parity.edges] if parity else [],
        edge_rows=edge_rows(parity) if parity else [],
        stage_rows=[row for edge in parity.edges for row in stage_rows(edge)] if parity else [],
        stage_head=STAGE_HEAD,
        tolerance=tolerance_line(parity.tolerance) if parity else "",
        listed=_LISTED,
        latency=latency,
        latency_head=LATENCY_HEAD,
        latency_rows=latency_rows(summary),
        selection_lines=selection_lines(summary),
        distributions=[(batch, *figures.distribution_figure(latency, batch)) for batch in batches] if latency else [],
        gains=figures.gains_figure([gain.speedup for gain in summary.gains], summary.flop_limit)
        if summary.gains
        else None,
        loads=[_load(report) for report in evidence.loads],
        accuracy=accuracy,
        accuracy_head=ACCURACY_HEAD,
        accuracy_rows=_accuracy_rows(accuracy) if accuracy else [],
        accuracy_lines=accuracy_lines(accuracy) if accuracy else [],
        accuracy_figure=_accuracy_figure(accuracy) if accuracy else None,
        pareto=pareto_figures(evidence, others),
        classes=worst_first(accuracy.per_class) if accuracy else [],
        machine=_machine(evidence),
        hashes=_hashes(evidence),
        commands=_commands(evidence),
    )


def latency_rows(summary: Summary) -> list[list[str]]:
    """The Markdown report's rows with p95 and p99 put in, and words where those have nothing."""
    rows = []
    for row, timing in zip(table_rows(summary), summary.timings, strict=True):
        p99 = "too few runs" if timing.p99 is None else milliseconds(timing.p99)
        gain = row[5] or {"dense": "the reference", "slice": "the yardstick of selection"}.get(
            timing.role, NOT_MEASURED
        )
        limit = row[6] or ("–" if timing.role in ("dense", "slice") else NOT_MEASURED)
        rows.append([*row[:4], milliseconds(timing.p95), p99, row[4], gain, limit])
    return rows


def worst_first(rows: Sequence[ClassRow]) -> list[ClassRow]:
    """Classes by the share of their images that pruning lost, most first; without a reference by the share right."""

    def key(row: ClassRow) -> tuple[float, float, int]:
        lost = 0 if row.dense is None else row.dense - row.pruned
        return -lost / row.images, row.pruned / row.images, row.label

    return sorted(rows, key=key)


# --- what is said at the top -------------------------------------------------------------------


def _badges(evidence: Evidence) -> list[tuple[str, str]]:
    """(kind, words) for each thing a reader asks first."""
    summary = evidence.summary
    if summary.unproved:
        badges = [("bad", "BUILT, NOT RUN")]
    elif evidence.parity is None:
        badges = [("open", f"parity {NOT_MEASURED}")]
    else:
        passed = evidence.parity.passed
        badges = [("good", f"parity {evidence.parity.verdict}")] if passed else [("bad", "PARITY FAILS")]
    if summary.gains:
        unsure = any(gain.speedup.verdict == "inconclusive" for gain in summary.gains)
        badges.append(("unsure", "speed-up inconclusive") if unsure else ("good", "speed-up measured"))
    else:
        badges.append(("open", f"speed-up {NOT_MEASURED}"))
    if evidence.accuracy:
        badges.append(("good", "accuracy measured"))
    else:
        badges.append(("open", f"accuracy {NOT_MEASURED}"))
    if summary.random_weights:
        badges.append(("bad", "RANDOM WEIGHTS"))
    return badges


def _alarms(evidence: Evidence) -> list[str]:
    """The summary's notes and what was left out; then the faults of the gate's first failing edge."""
    alarms = [*evidence.summary.notes, *evidence.left_out]
    if evidence.parity and not evidence.parity.passed:
        first = [
            f" between {edge_name(edge)}: {fault.kind} fault, {fault.detail}"
            for edge in evidence.parity.edges
            for fault in edge.faults
        ][:1]
        alarms.insert(0, f"PARITY FAILS{''.join(first)}. Do not ship this engine.")
    return alarms


def _key_figures(evidence: Evidence) -> list[tuple[str, str, str]]:
    """(name, number, what goes with it) of the numbers that matter most."""
    summary = evidence.summary
    found: list[tuple[str, str, str]] = []
    for gain in summary.gains:
        number, interval = _parted(speedup_text(gain.speedup))
        unsure = "; inconclusive" if gain.speedup.verdict == "inconclusive" else ""
        reached = f"{percent(gain.flop_limit_reached, 0)} of the FLOP limit"
        found.append(
            (f"the speed of dense, batch {gain.batch}", number, f"95 % interval {interval}{unsure}; {reached}")
        )
    if not summary.gains:
        found.append(
            ("the speed of dense", NOT_MEASURED, "" if evidence.manifest.plan.stages else "this is the dense model")
        )
    found.append(
        (
            "of the multiply-accumulates",
            percent(summary.flop_share),
            f"{giga(summary.planned_macs)} G of {giga(summary.dense_macs)} G; {giga(summary.executed_macs)} G executed, "
            f"limit {limit_text(summary.flop_limit)}",
        )
    )
    if evidence.parity:
        agreeing = min((s.images_agreeing for edge in evidence.parity.edges for s in edge.stages), default=None)
        worst = evidence.parity.edges[-1]
        same = "no stages" if agreeing is None else f"same tokens on {agreeing} of {worst.images} images"
        number = f"{worst.worst_logit:.1e} σ"
        found.append(("largest logit difference", number, f"at most {evidence.parity.tolerance.logits:g} σ; {same}"))
    else:
        found.append(("parity", NOT_MEASURED, "ztp check proves it"))
    if evidence.accuracy and evidence.accuracy.comparison:
        number, interval = _parted(change_text(evidence.accuracy.comparison.top1))
        found.append(
            ("points of top-1 accuracy", number, f"95 % interval {interval}; {evidence.accuracy.images} images")
        )
    elif evidence.accuracy:
        number, interval = _parted(share_text(evidence.accuracy.accuracy.top1))
        found.append(("top-1 accuracy", number, f"95 % interval {interval}; change against dense {NOT_MEASURED}"))
    else:
        why = "weights are random" if summary.random_weights else "ztp eval measures it"
        found.append(("accuracy change", NOT_MEASURED, why))
    return found


def _parted(text: str) -> tuple[str, str]:
    """`**1.48 ×** (1.47–1.49)` → `1.48 ×`, `1.47–1.49`."""
    number, _, interval = text.replace("**", "").partition(" (")
    return number, interval.rstrip(")")


def _bold(text: str) -> Markup:
    """Markdown's bold as HTML, all else escaped."""
    return Markup(re.sub(r"\*\*(.+?)\*\*", r"<strong>\1</strong>", str(escape(text))))


# --- accuracy, machine, hashes, commands -------------------------------------------------------


def _accuracy_rows(report: AccuracyReport) -> list[list[str]]:
    """The rows of the other reports, with words where those have nothing."""
    rows = []
    for name, top1, top5, rate in accuracy_rows(report):
        few = "no more than five classes" if report.accuracy.top5 is None else NOT_MEASURED
        rows.append([name, top1, top5 or few, rate or ("–" if name == "difference" else NOT_MEASURED)])
    return rows


def _load(report: LoadReport) -> dict[str, Any]:
    """What the page shows of engines under load."""
    drawn = [(batch, figures.load_figure(report, batch)) for batch in sorted({one.batch for one in report.levels})]
    return {
        "title": "Requests at a rate" if report.at_a_rate else "Clients back to back",
        "head": load_head(report),
        "rows": load_rows(report),
        "numbers": LOAD_NUMBERS,
        "lines": [*load_lines(report), *report.notes],
        "figures": [(batch, drawing) for batch, drawing in drawn if drawing],
    }


def _accuracy_figure(report: AccuracyReport) -> Markup:
    name = "pruned" if report.plan != "dense" else "engine" if report.comparison else "dense"
    rows = [(name, report.accuracy.top1)]
    if report.comparison:
        rows.insert(0, ("dense", report.comparison.dense.top1))
    return figures.interval_figure([(name, one.share, one.low, one.high) for name, one in rows])


def _machine(evidence: Evidence) -> list[tuple[str, str]]:
    machine: dict[str, Any] = evidence.summary.machine
    if not machine:
        return []
    facts = [
        ("processor", f"{machine['cpu']}, {machine['cores']} cores"),
        ("instructions", ", ".join(machine.get("cpu_features") or []) or "not recorded"),
        ("memory", f"{machine['memory_gib']} GiB" if "memory_gib" in machine else "not recorded"),
        ("GPU", evidence.summary.gpu.removeprefix("GPU: ") or "not recorded"),
        ("system", f"{machine['system']}, Python {machine.get('python', 'not recorded')}"),
        ("latency measured", evidence.latency.started if evidence.latency else NOT_MEASURED),
    ]
    packages = ", ".join(f"{name} {version}" for name, version in machine.get("packages", {}).items())
    return [*facts, ("packages", packages or "not recorded")]


def _hashes(evidence: Evidence) -> list[tuple[str, str, str]]:
    """(what, sha256, size or origin)."""
    manifest, weights = evidence.manifest, evidence.manifest.source.weights
    found = [
        ("manifest.json", evidence.manifest_sha256, "quoted by every evidence file"),
        *(
            (name, record.sha256, f"{record.bytes:,} bytes".replace(",", " "))
            for name, record in manifest.files.items()
        ),
        ("weights", weights.sha256, weights.shown),
        ("exported graph's manifest", manifest.artifact_sha256, manifest.format),
    ]
    if evidence.parity:
        found.append(("parity images", evidence.parity.images_sha256, evidence.parity.images))
    if evidence.accuracy:
        found.append(("labelled pictures", evidence.accuracy.data_sha256, evidence.accuracy.data))
    return found


def _commands(evidence: Evidence) -> list[tuple[str, str]]:
    """(what it does, command) to make the engine and its evidence again."""
    found = [("Make and measure it again", evidence.summary.command)] if evidence.summary.command else []
    if evidence.latency and evidence.latency.command != evidence.summary.command:
        found.append(("Measure latency again", evidence.latency.command))
    found += [("Measure it under load again", report.command) for report in evidence.loads]
    found.append(("Prove it again", f"ztp check --engine {shlex.quote(evidence.summary.engine)}"))
    if evidence.accuracy:
        found.append(("Measure accuracy again", evidence.accuracy.command))
    return found
