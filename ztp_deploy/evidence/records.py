"""Reports written down for others to read: named after what was measured and the machine, without local paths.

Each function says what it wrote.
"""

from __future__ import annotations

from pathlib import Path

from ztp_deploy.atomic import write_text
from ztp_deploy.backends import name_tags
from ztp_deploy.environment import slug
from ztp_deploy.evidence.latency import LatencyReport
from ztp_deploy.evidence.load import LoadReport
from ztp_deploy.evidence.methods import MethodsReport
from ztp_deploy.evidence.report.comparison import render_comparison
from ztp_deploy.evidence.report.load import render_load
from ztp_deploy.evidence.report.markdown import render_tables
from ztp_deploy.evidence.report.methods import render_methods
from ztp_deploy.evidence.report.summary import Summary
from ztp_deploy.evidence.schema import EvidenceFile


def record_summary(summary: Summary, latency: LatencyReport, folder: Path) -> str:
    """Writes summary, raw samples and table, named after model, plan, engine and machine, without local paths."""
    where = Path(summary.engine)
    summary = summary.model_copy(update={"engine": f"engines/{where.parent.name}/{where.name}"})
    backend = summary.backend.split()[0]
    engine = f"{backend}-{summary.precision}{_name_tags([where.name])}"
    name = f"{summary.model}--{summary.label}--{engine}--{slug(summary.machine['cpu'])}"
    write_text(folder / f"{name}.json", summary.to_json())
    _write(folder, name, latency, render_tables(summary))
    return f"{folder / name}.json, .samples.json and .md"


def record_comparison(report: LatencyReport, model: str, folder: Path) -> str:
    """Writes engines measured against each other and their table, without local paths."""
    engines = _name_tags([sample.engine for sample in report.samples])
    name = f"{model}--comparison{engines}--{slug(report.environment['cpu'])}"
    return _write(folder, name, report, render_comparison(report))


def record_methods(report: MethodsReport, folder: Path) -> str:
    """Writes methods measured against each other and their table, without local paths."""
    tags = _name_tags([sample.engine for sample in report.latency.samples])
    engines = f"{report.backend.split()[0]}-{report.precision}{tags}"
    name = f"{report.model}--methods--{engines}--{slug(report.latency.environment['cpu'])}"
    return _write(folder, name, report, render_methods(report))


def record_load(report: LoadReport, model: str, folder: Path) -> str:
    """Writes engines measured under load and their table, without local paths.

    In the name stand the back end and the precision that all have in common, and whether requests came at a rate.
    """
    backends, precisions = ({level.backend.split()[0] for level in report.levels}, {x.precision for x in report.levels})
    common = "".join(f"-{found.pop()}" for found in (backends, precisions) if len(found) == 1)
    kind = "rate" if report.at_a_rate else "load"
    name = f"{model}--{kind}{common}{_name_tags([level.engine for level in report.levels])}--{slug(report.environment['cpu'])}"
    return _write(folder, name, report, render_load(report))


def _write(folder: Path, name: str, report: EvidenceFile, table: str) -> str:
    write_text(folder / f"{name}.samples.json", report.to_json())
    write_text(folder / f"{name}.md", table)
    return f"{folder / name}.samples.json and .md"


def _name_tags(folders: list[str]) -> str:
    """What all these engines have in common beyond the defaults, for file names: one batch size, settings, calibration."""
    common = [set(values) for values in zip(*map(name_tags, folders), strict=True)]
    return "".join(f"-{value}" for values in common if len(values) == 1 for value in values if value)
