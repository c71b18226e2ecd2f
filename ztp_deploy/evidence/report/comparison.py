"""Engines of different back ends against each other, as Markdown."""

from __future__ import annotations

import re
from collections.abc import Iterable

from ztp_deploy.backends import name_tags
from ztp_deploy.evidence.latency import LatencyReport
from ztp_deploy.evidence.report.markdown import machine_line, markdown_table, speedup_text


def render_comparison(report: LatencyReport) -> str:
    """A line an engine and batch, with its speed over the first engine's; then the machine."""
    lines = markdown_table(comparison_head(report), comparison_rows(report), right=(0, 2, 3, 4))
    first = report.samples[0].role
    if any(ratio.verdict == "inconclusive" for ratio in report.ratios if ratio.reference == first):
        lines += [
            "",
            "- Inconclusive: the interval is wide or the machine drifted; measure longer, with nothing else running.",
        ]
    lines += ["", f"- {machine_line(report.environment, report.gpu)}"]
    return "\n".join([*lines, *(f"- {note}" for note in report.notes)]) + "\n"


def comparison_head(report: LatencyReport) -> list[str]:
    """The columns' names."""
    names = engine_names(sample.role for sample in report.samples)
    over = [f"over {names[report.samples[0].role]} (95 % interval)"] if len(names) > 1 else []
    return ["batch", "engine", "ms per image: median", "p90", "images/s", *over]


def comparison_rows(report: LatencyReport) -> list[list[str]]:
    """One row an engine and batch, as text."""
    first = report.samples[0].role
    names = engine_names(sample.role for sample in report.samples)
    rows = []
    for sample in report.samples:
        gain = [""] if len(names) > 1 else []
        if sample.role != first:
            ratio = report.ratio(sample.role, first, sample.batch)
            gain = [speedup_text(ratio) + (" inconclusive" if ratio.verdict == "inconclusive" else "")]
        median, p90 = sample.median / sample.batch, sample.p90 / sample.batch
        cells = [str(sample.batch), names[sample.role], f"{median:.2f}", f"{p90:.2f}"]
        rows.append([*cells, f"{sample.images_per_second:.1f}", *gain])
    return rows


def engine_names(roles: Iterable[str]) -> dict[str, str]:
    """What engines are called by role: back end, plan and precision, and whatever else tells them apart.

    A fixed batch and a calibration are named where others lack or differ.
    """
    roles = list(dict.fromkeys(roles))
    found = {role: name_tags(role) for role in roles}
    ranges = any(one.batch is None for one in found.values())
    calibrations = {one.calibration for one in found.values() if one.calibration}
    names = {}
    for role, one in found.items():
        words = [
            _short(role),
            "fixed batch" if one.batch and ranges else "",
            f"settings {one.settings}" if one.settings else "",
            f"calibration {one.calibration}" if one.calibration and len(calibrations) > 1 else "",
        ]
        names[role] = ", ".join(filter(None, words))
    for name in set(names.values()):
        alike = [role for role in roles if names[role] == name]
        particulars = zip(*map(_particulars, alike), strict=True) if len(alike) > 1 else ()
        telling = [words for words in particulars if len(set(words)) > 1]
        names |= {role: ", ".join([name, *words]) for role, *words in zip(alike, *telling, strict=True)}
    shown = list(names.values())
    return {role: role if shown.count(name) > 1 else name for role, name in names.items()}


def _short(role: str) -> str:
    """`openvino-2026.4.1-cpu/deit_s--dense--fp32--b1-8-64` → `openvino 2026.4.1 dense fp32`."""
    machine, engine = _folders(role)
    backend, version, device, *_ = [*machine.split("-", 2), "", ""]
    _, plan, precision, *_ = [*engine.split("--"), "", ""]
    return f"{backend} {version} {plan} {precision}" if device and precision else role


def _particulars(role: str) -> tuple[str, ...]:
    """What else the path says in which engines may differ: model, device, batch range, input, weights, what is its user's."""
    machine, engine = _folders(role)
    model, *tags = engine.split("--")
    batch = next((tag[1:].replace("-", ":") for tag in tags if re.fullmatch(r"b\d+-\d+-\d+", tag)), "")
    weights, labels, preprocessing = (
        next((f"{what} {tag}" for tag in tags if re.fullmatch(rf"{what[0]}[0-9a-f]{{6}}", tag)), f"{usual} {what}")
        for what, usual in (("weights", "pretrained"), ("labels", "usual"), ("preprocessing", "usual"))
    )
    return (
        model,
        machine.split("-", 2)[-1],
        f"batch {batch}",
        "uint8 input" if "uint8" in tags else "float32 input",
        "random weights" if "random" in tags else weights,
        labels,
        preprocessing,
    )


def _folders(role: str) -> tuple[str, str]:
    """The path's last two parts: back end, version and device; and the engine."""
    machine, engine = ["", *role.split("/")][-2:]
    return machine, engine
