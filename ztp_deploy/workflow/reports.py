"""An engine's reports, rendered from its evidence: `report.json`, `report.md`, `report.html`."""

from __future__ import annotations

from ztp_deploy.atomic import write_text
from ztp_deploy.backends import Engine
from ztp_deploy.evidence.report.folder import read_evidence
from ztp_deploy.evidence.report.html import render_html
from ztp_deploy.evidence.report.load import render_load
from ztp_deploy.evidence.report.markdown import render_markdown
from ztp_deploy.evidence.report.summary import Summary
from ztp_deploy.evidence.schema import HTML_FILE, SUMMARY_FILE

REPORT_FILE = "report.md"


def write_reports(engine: Engine, summary: Summary | None = None) -> None:
    """Renders the engine's reports from its evidence; `report.json` and `report.md` only after a run that made one.

    `summary`: what the run that made the engine has to say of itself.
    """
    if summary is not None:
        write_text(engine.evidence / SUMMARY_FILE, summary.to_json())
    evidence = read_evidence(engine.directory)
    if summary is None and evidence.made:
        summary = evidence.summary
        write_text(engine.evidence / SUMMARY_FILE, summary.to_json())
    if summary is not None:
        tables = "\n".join(map(render_load, evidence.loads))
        write_text(engine.evidence / REPORT_FILE, render_markdown(summary, tables))
    write_text(engine.evidence / HTML_FILE, render_html(evidence))
