"""The report as Markdown."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Sequence
from typing import Any

from ztp_deploy.evidence.latency import Ratio
from ztp_deploy.evidence.report.summary import Summary
from ztp_deploy.plan import Flops

TABLE_HEAD = (
    *("batch", "engine", "ms per image: median", "p90", "images/s", "speed-up over dense (95 % interval)"),
    "of the FLOP limit",
)


def render_markdown(summary: Summary, load: str = "") -> str:
    """The whole report; `load` is what `render_load` makes of the engine under load, as often as it was measured."""
    lines = [f"# {summary.model} · {summary.label} · {summary.backend} · {summary.precision}", ""]
    for note in summary.notes:
        lines += [f"> {note}", ""]
    lines += [render_tables(summary), *markdown_table(("", ""), _facts(summary))]
    if load:
        lines += ["", "## Under load", "", load.removesuffix("\n")]
    return "\n".join(lines) + "\n"


def _facts(summary: Summary) -> list[list[str]]:
    agreement = summary.top1_dense_to_pruned
    made = f"{summary.seconds} s ({summary.seconds_measuring} s of them measuring latency)"
    return [
        ["parity", summary.parity],
        *([] if summary.parity_images is None else [["images", summary.parity_images]]),
        *([] if agreement is None else [["dense → pruned", f"top-1 agrees on {percent(agreement)}"]]),
        ["weights", summary.weights],
        ["engine", f"`{summary.engine}`"],
        ["made in", f"{made}, peak memory {summary.peak_gib} GiB"],
        ["command", f"`{summary.command}`"],
    ]


def render_tables(summary: Summary) -> str:
    """The latency table and its footnotes: what the README shows."""
    footnotes = [*selection_lines(summary), macs_line(summary.flops), machine_line(summary.machine, summary.gpu)]
    table = markdown_table(TABLE_HEAD, table_rows(summary), right=(0, 2, 3, 4, 6))
    return "\n".join([*table, "", *(f"- {line}" for line in footnotes)]) + "\n"


def markdown_table(head: Sequence[str], rows: Iterable[Sequence[str]], right: Collection[int] = ()) -> list[str]:
    """A table's lines; the columns `right` are aligned there."""
    rule = ["---:" if column in right else "---" for column in range(len(head))]
    cells = [f"| {' | '.join(row)} |" for row in (head, *rows)]
    return [cells[0], f"|{'|'.join(rule)}|", *cells[1:]]


def table_rows(summary: Summary, *, reasons: bool = True) -> list[list[str]]:
    """One row an engine and batch, as text; with `reasons` the cell of what is inconclusive says why."""
    gains = {gain.batch: gain for gain in summary.gains}
    rows = []
    for timing in summary.timings:
        gain = gains.get(timing.batch) if timing.role == "pruned" else None
        speedup = limit = ""
        if gain:
            speedup = speedup_text(gain.speedup)
            if gain.speedup.verdict == "inconclusive":
                speedup += f" inconclusive: {gain.speedup.reason}" if reasons else " inconclusive"
            limit = percent(gain.flop_limit_reached, 0)
        rows.append(
            [
                str(timing.batch),
                role_name(timing.role),
                milliseconds(timing.median),
                milliseconds(timing.p90),
                f"{timing.images_per_second:.1f}",
                speedup,
                limit,
            ]
        )
    return rows


def unsure_batches(summary: Summary) -> dict[str, list[int]]:
    """Why a speed-up is inconclusive, and at which batches for that reason."""
    found: dict[str, list[int]] = {}
    for gain in summary.gains:
        if gain.speedup.reason:
            found.setdefault(gain.speedup.reason, []).append(gain.batch)
    return found


def selection_lines(summary: Summary) -> list[str]:
    """What selection costs at each batch where a slice twin was measured, a sentence each."""
    return [
        f"Selection costs {percent(gain.selection_cost)} of the pruned engine's time at batch {gain.batch} "
        f"(interval {percent(gain.selection_cost_low or 0.0)} to {percent(gain.selection_cost_high or 0.0)}), "
        "measured against the slice twin."
        for gain in summary.gains
        if gain.selection_cost is not None
    ]


def macs_line(flops: Flops) -> str:
    """The multiply-accumulates and the speed-up that they would allow."""
    return (
        f"Multiply-accumulates per image: dense {giga(flops.dense)} G, plan {giga(flops.planned)} G "
        f"({percent(flops.share)}), executed {giga(flops.executed)} G: "
        f"the FLOP limit is {limit_text(flops.speedup_limit)}."
    )


def machine_line(machine: dict[str, Any], gpu: str) -> str:
    """Where latency was measured: `environment.snapshot` and `gpu_line` of then."""
    return f"{machine['cpu']}, {machine['cores']} cores, {machine['system']}. {gpu}."


def role_name(role: str) -> str:
    """What tables call the role of an engine."""
    return {"slice": "slice twin"}.get(role, role)


def speedup_text(ratio: Ratio) -> str:
    """A speed-up, bold, and its interval: "**1.48 ×** (1.47–1.49)"."""
    return f"**{ratio.speedup:.2f} ×** ({ratio.low:.2f}–{ratio.high:.2f})"


def limit_text(limit: float) -> str:
    """1.694944 → "× 1.69"."""
    return f"× {limit:.2f}"


def milliseconds(value: float) -> str:
    """25.67002 → "25.67"."""
    return f"{value:.2f}"


def percent(share: float, digits: int = 1) -> str:
    """0.0312 → "3.1 %"."""
    return f"{share * 100:.{digits}f} %"


def giga(macs: int) -> str:
    """4598882304 → "4.60"."""
    return f"{macs / 1e9:.2f}"
