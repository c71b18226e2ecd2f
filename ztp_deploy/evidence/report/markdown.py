"""The report as Markdown."""

from __future__ import annotations

from jinja2 import Environment

from ztp_deploy.evidence.report.summary import Summary

_TEMPLATE = """\
# {{ s.model }} · {{ s.label }} · {{ s.backend }} · {{ s.precision }}

{% for note in s.notes %}> {{ note }}

{% endfor -%}
{{ tables }}
| | |
|---|---|
| parity | {{ s.parity }} |
{% if s.parity_images is not none %}| images | {{ s.parity_images }} |
{% endif %}{% if s.top1_dense_to_pruned is not none %}| dense → pruned | top-1 agrees on {{ percent(s.top1_dense_to_pruned) }} |
{% endif %}| weights | {{ s.weights }} |
| engine | `{{ s.engine }}` |
| made in | {{ s.seconds }} s ({{ s.seconds_measuring }} s of them measuring latency), peak memory {{ s.peak_gib }} GiB |
| command | `{{ s.command }}` |
"""

_TABLES = """\
| batch | engine | ms an image: median | p90 | images/s | speed-up over dense (95 % interval) | of the FLOP limit |
|---:|---|---:|---:|---:|---|---:|
{% for row in rows %}| {{ row | join(' | ') }} |
{% endfor %}
{% for gain in s.gains if gain.selection_cost is not none -%}
- Selection costs {{ percent(gain.selection_cost) }} of the pruned engine's time at batch {{ gain.batch }} \
(interval {{ percent(gain.selection_cost_low) }} to {{ percent(gain.selection_cost_high) }}), measured against the slice twin.
{% endfor -%}
- Multiply-accumulates an image: dense {{ giga(s.dense_macs) }} G, plan {{ giga(s.planned_macs) }} G \
({{ percent(s.flop_share) }}), executed {{ giga(s.executed_macs) }} G: the FLOP limit is × {{ '%.2f' | format(s.flop_limit) }}.
- {{ s.machine.cpu }}, {{ s.machine.cores }} cores, {{ s.machine.system }}. {{ s.gpu }}.
"""


def render_markdown(summary: Summary) -> str:
    """The whole report."""
    return _render(_TEMPLATE, summary, tables=render_tables(summary))


def render_tables(summary: Summary) -> str:
    """The latency table and its footnotes: what the README shows."""
    return _render(_TABLES, summary, rows=table_rows(summary))


def table_rows(summary: Summary) -> list[list[str]]:
    """One row an engine and batch, as text."""
    gains = {gain.batch: gain for gain in summary.gains}
    rows = []
    for timing in summary.timings:
        gain = gains.get(timing.batch) if timing.role == "pruned" else None
        speedup = limit = ""
        if gain:
            ratio = gain.speedup
            speedup = f"**{ratio.speedup:.2f} ×** ({ratio.low:.2f}–{ratio.high:.2f})"
            if ratio.verdict == "inconclusive":
                speedup += f" inconclusive: {ratio.reason}"
            limit = percent(gain.flop_limit_reached, 0)
        rows.append(
            [
                str(timing.batch),
                {"slice": "slice twin"}.get(timing.role, timing.role),
                f"{timing.median:.2f}",
                f"{timing.p90:.2f}",
                f"{timing.images_per_second:.1f}",
                speedup,
                limit,
            ]
        )
    return rows


def percent(share: float, digits: int = 1) -> str:
    """0.0312 → "3.1 %"."""
    return f"{share * 100:.{digits}f} %"


def giga(macs: int) -> str:
    """4598882304 → "4.60"."""
    return f"{macs / 1e9:.2f}"


def _render(template: str, summary: Summary, **more: object) -> str:
    environment = Environment(autoescape=False, trim_blocks=False, keep_trailing_newline=True)
    return environment.from_string(template).render(s=summary, percent=percent, giga=giga, **more)
