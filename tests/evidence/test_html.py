"""The HTML report: its numbers, what it does not know, what it refuses to show, and how it looks in a browser."""

from __future__ import annotations

import functools
import html
import io
import json
import re
import shutil
import subprocess
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from rich.console import Console

import ztp_deploy as ztp
from tests import tiny
from tests.commands import typed
from ztp_deploy import environment
from ztp_deploy.evidence import latency
from ztp_deploy.evidence.accuracy import AccuracyReport, Speed, accuracy, class_rows, compare
from ztp_deploy.evidence.latency import LatencyReport, paired_ratio
from ztp_deploy.evidence.parity import Fault, ParityReport
from ztp_deploy.evidence.report import figures, terminal
from ztp_deploy.evidence.report.accuracy import accuracy_rows
from ztp_deploy.evidence.report.figures import distribution_figure, gains_figure, tokens_figure
from ztp_deploy.evidence.report.folder import PictureFile, Pictures, read_evidence
from ztp_deploy.evidence.report.html import (
    latency_rows,
    render_html,
    worst_first,
    write_report,
)
from ztp_deploy.evidence.report.markdown import render_markdown, selection_lines, table_rows
from ztp_deploy.evidence.report.summary import summarise
from ztp_deploy.manifest import EngineManifest, hash_file, manifest_sha256, read_manifest

EVIL = '<b>&"x'
VOID = {"meta", "link", "br", "img", "hr", "input"}


class Page(HTMLParser):
    """Checks that tags close as they were opened, and gathers text, attributes and table rows."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.text: list[str] = []
        self.attributes: list[tuple[str, str, str]] = []
        self.rows: list[list[str]] = []
        self.wrong: list[str] = []
        self.feed(page)
        self.close()

    def handle_starttag(self, tag, attrs):
        self.attributes += [(tag, name, value or "") for name, value in attrs]
        if tag not in VOID:
            self.open.append(tag)
        if tag == "tr":
            self.rows.append([])
        if tag in ("td", "th") and self.rows:
            self.rows[-1].append("")

    def handle_endtag(self, tag):
        if not self.open or self.open.pop() != tag:
            self.wrong.append(tag)

    def handle_data(self, data):
        if "style" in self.open:
            return
        self.text.append(data)
        if "td" in self.open or "th" in self.open:
            self.rows[-1][-1] += data

    @property
    def words(self) -> str:
        return re.sub(r"\s+", " ", " ".join(self.text))


@functools.cache
def timed() -> LatencyReport:
    """A made-up run of 120 rounds: pruned takes 1 / 1.5 of dense's time, the slice twin a little less."""
    generator = np.random.default_rng(0)
    samples, ratios = [], []
    for batch in (1, 8):
        base = 0.030 * batch * generator.normal(1, 0.02, (4, 30))
        times = {"dense": base, "pruned": base / generator.normal(1.5, 0.01, base.shape), "slice": base / 1.6}
        for role, seconds in times.items():
            spread = seconds.ravel() * 1e3
            p90, p95, p99 = np.percentile(spread, [90, 95, 99])
            samples.append(
                latency.Samples(
                    engine=role,
                    role=role,
                    manifest_sha256="0" * 64,
                    batch=batch,
                    milliseconds=(seconds * 1e3).tolist(),
                    runs=spread.size,
                    median=float(np.median(spread)),
                    p90=p90,
                    p95=p95,
                    p99=p99,
                    drift=0.0,
                    images_per_second=batch / float(np.median(spread)) * 1e3,
                )
            )
        for faster, reference in (("pruned", "dense"), ("slice", "dense"), ("slice", "pruned")):
            ratios.append(paired_ratio(faster, reference, batch, times))
    return LatencyReport(
        command="ztp engine --model 'deit_t'",
        started="2026-01-01T00:00:00Z",
        samples=samples,
        ratios=ratios,
        environment=environment.snapshot(),
        gpu="GPU: none found; everything ran on the CPU",
        notes=[],
    )


def measured(sha: str) -> LatencyReport:
    """That run, of an engine with this manifest."""
    report = timed()
    mine = [s.model_copy(update={"manifest_sha256": sha}) if s.role == "pruned" else s for s in report.samples]
    return report.model_copy(update={"samples": mine})


def evaluated(sha: str | None, names: list[str] | None = None, dense: bool = True) -> AccuracyReport:
    """A made-up evaluation on 200 images of ten classes; class 3 loses most."""
    generator = np.random.default_rng(0)
    labels = np.arange(200) % 10
    before = generator.normal(0, 1, (200, 10))
    before[np.arange(200), labels] += 3
    after = before.copy()
    after[labels == 3, 4] += 4
    speed = {"batch": 4, "workers": 1, "images": 200, "seconds": 1.0, "images_per_second": None}
    return AccuracyReport(
        command="ztp eval --engine mine --data pictures",
        started="2026-01-01T00:00:00Z",
        model="deit_t",
        plan="zero_tprune-0.7",
        runs="onnxruntime",
        precision="fp32",
        manifest_sha256=sha,
        weights="file (mine.pth)",
        weights_sha256="1" * 64,
        reference="eager PyTorch" if dense else None,
        reference_manifest_sha256=None,
        data="pictures",
        data_sha256="2" * 64,
        images=200,
        classes=10,
        mapping="Folders are class indices.",
        accuracy=accuracy(after, labels),
        comparison=compare(before, after, labels, draws=200) if dense else None,
        per_class=class_rows(after, labels, before if dense else None, names),
        speed=[Speed(role=role, runs="onnxruntime", **speed) for role in (("dense",) if dense else ()) + ("pruned",)],
        notes=(),
        environment=environment.snapshot(),
    )


@pytest.fixture(scope="module")
def full(shared_engine, model, tmp_path_factory):
    """An engine folder with parity, latency and summary; tests copy it."""
    folder = tmp_path_factory.mktemp("html") / "deit_t--zero_tprune-0.7--fp32--b1-4-8--random"
    shutil.copytree(shared_engine.directory, folder)
    parity = ztp.check_parity(folder, model, tiny.images(3))
    report = measured(manifest_sha256(folder))
    (folder / "evidence" / "latency.json").write_text(report.to_json())
    write_summary(folder, parity, report)
    return folder


@pytest.fixture
def folder(full, tmp_path):
    """A copy that a test may change."""
    return Path(shutil.copytree(full, tmp_path / full.name))


def write_summary(folder, parity, report, command="ztp engine --model deit_t"):
    summary = summarise(
        read_manifest(folder, EngineManifest),
        folder,
        parity,
        report,
        command=command,
        steps=[{"step": "build", "seconds": 12.5}, {"step": "measure latency at batch 1, 8", "seconds": 3.0}],
        peak_gib=1.25,
        machine=environment.snapshot(),
        manifest_sha256=manifest_sha256(folder),
    )
    (folder / "evidence").mkdir(exist_ok=True)
    (folder / "evidence" / "report.json").write_text(summary.to_json())
    return summary


def page_of(folder):
    text = render_html(read_evidence(folder))
    page = Page(text)
    assert (page.open, page.wrong) == ([], [])
    assert "None" not in page.words
    return text, page


def requote(folder, name, **changes):
    path = folder / "evidence" / name
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


# --- content -----------------------------------------------------------------------------------


def shown(summary) -> str:
    """The report in a terminal of 200 columns."""
    console = Console(width=200, record=True, file=io.StringIO())
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(terminal, "out", console)
        terminal.show_summary(summary)
    return console.export_text()


def test_the_terminal_says_what_the_markdown_says_and_why_a_figure_is_in_doubt_once(folder):
    summary = read_evidence(folder).summary
    doubtful = [
        gain.model_copy(
            update={"speedup": gain.speedup.model_copy(update={"verdict": "inconclusive", "reason": "it is wide"})}
        )
        for gain in summary.gains
    ]
    printed = shown(summary.model_copy(update={"gains": doubtful}))
    for line in selection_lines(summary):
        assert line in printed
    assert printed.count(") inconclusive ") == 2
    assert printed.count("it is wide") == 1
    assert "Inconclusive at batch 1, 8: it is wide." in printed


def test_the_verdict_says_within_which_bounds_and_what_was_not_run(folder):
    assert read_evidence(folder).summary.parity.startswith("holds along ")
    requote(
        folder, "parity.json", precision="int8", notes=["The exported graph could not be checked on its own: gone."]
    )
    evidence = read_evidence(folder)
    words = "holds within the bounds of int8 (eager → engine only: the exported graph was not checked)"
    assert evidence.summary.parity.startswith(f"{words} along ")
    assert f"parity {words}" in page_of(folder)[1].words
    assert f"| parity | {words} along " in render_markdown(evidence.summary)
    assert f"Parity {words} along " in shown(evidence.summary).replace("\n", " ")
    requote(folder, "parity.json", passed=False)
    assert read_evidence(folder).summary.parity.startswith("FAILS along ")


def test_every_number_is_formatted_as_in_the_markdown(folder):
    evidence = read_evidence(folder)
    _, page = page_of(folder)
    markdown = render_markdown(evidence.summary)
    assert len(evidence.summary.gains) == 2
    for row in table_rows(evidence.summary):
        cells = [cell.replace("**", "") for cell in row if cell]
        assert any(set(cells) <= set(shown) for shown in page.rows), cells
    for gain in evidence.summary.gains:
        ratio = gain.speedup
        assert f"{ratio.speedup:.2f} × ({ratio.low:.2f}–{ratio.high:.2f})" in markdown.replace("**", "")
        assert f"95 % interval {ratio.low:.2f}–{ratio.high:.2f}" in page.words
    for line in re.findall(r"^- (.*)$", markdown, flags=re.MULTILINE)[:-1]:
        assert line in page.words
    assert "1.50 ×" in page.words
    assert evidence.summary.parity in page.words


def test_percentiles_join_the_table(folder):
    summary = read_evidence(folder).summary
    row = latency_rows(summary)[1]
    timing = summary.timings[1]
    assert row[:7] == [
        "1",
        "pruned",
        *(f"{v:.2f}" for v in (timing.median, timing.p90, timing.p95, timing.p99)),
        row[6],
    ]
    few = summary.model_copy(
        update={"timings": [timing.model_copy(update={"p99": None}) for timing in summary.timings]}
    )
    assert latency_rows(few)[1][5] == "too few runs"
    alone = summary.model_copy(update={"gains": []})
    assert latency_rows(alone)[1][7:] == ["not measured", "not measured"]
    assert latency_rows(alone)[0][7:] == ["the reference", "–"]


def test_parity_is_told_edge_by_edge_and_stage_by_stage(folder):
    parity = read_evidence(folder).parity
    _, page = page_of(folder)
    assert [edge.candidate for edge in parity.edges] == ["exported", "engine", "engine"]
    for edge in parity.edges:
        name = f"{edge.reference} → {edge.candidate}"
        for stage in edge.stages:
            row = [name, str(stage.stage), str(stage.block), str(stage.tokens), "3/3", "100.0 %", "0", "0"]
            assert row in page.rows
    assert "within 0.0001 σ" in page.words
    assert "parity holds" in page.words


def test_a_failing_gate_is_said_first(folder):
    report = ParityReport.model_validate_json((folder / "evidence" / "parity.json").read_bytes())
    fault = Fault(kind="selection", image="a.png", stage=2, detail=f"stage 2 keeps other tokens on {EVIL}")
    edge = report.edges[1].model_copy(update={"faults": [fault] * 60})
    bad = report.model_copy(update={"passed": False, "edges": [report.edges[0], edge]})
    (folder / "evidence" / "parity.json").write_text(bad.to_json())
    text, page = page_of(folder)
    assert "PARITY FAILS between exported → engine: selection fault, stage 2 keeps" in page.words
    assert "PARITY FAILS" in page.words.split("Tokens")[0]
    assert "60 faults, the first 50" in page.words
    assert text.count("<li>selection fault") == 50
    assert "parity holds" not in page.words
    assert ["exported → engine", "2", str(edge.stages[1].block)] in [row[:3] for row in page.rows if row[-1] == "60"]


def test_accuracy_joins(folder):
    sha = manifest_sha256(folder)
    assert "accuracy not measured" in page_of(folder)[1].words
    report = evaluated(sha, [f"class {EVIL} {index}" for index in range(10)])
    (folder / "evidence" / "accuracy.json").write_text(report.to_json())
    _, page = page_of(folder)
    assert "accuracy not measured" not in page.words
    for row in accuracy_rows(report):
        assert any([cell for cell in row if cell] == [c for c in shown if c in row] for shown in page.rows)
    change = report.comparison.top1
    assert f"{change.difference * 100:+.2f}" in page.words
    assert change.difference < 0
    classes = [row for row in page.rows if row[1:2] and row[1].startswith("class <b>")]
    assert classes[0][0] == "3"
    assert len(classes) == 10
    lost = report.per_class[3]
    assert classes[0] == [
        "3",
        f'class <b>&"x {3}',
        "20",
        str(lost.dense),
        str(lost.pruned),
        f"{lost.pruned - lost.dense:+d}",
    ]
    (folder / "evidence" / "accuracy.json").write_text(evaluated(sha, dense=False).to_json())
    _, page = page_of(folder)
    assert "change against dense not measured" in page.words
    assert next(row for row in page.rows if row[:2] == ["3", "no name"])[3] == "not measured"


def test_worst_classes_come_first():
    rows = evaluated(None).per_class
    assert worst_first(rows)[0].label == 3
    alone = [row.model_copy(update={"dense": None, "pruned": 20 - row.label}) for row in rows]
    assert [row.label for row in worst_first(alone)] == list(range(9, -1, -1))


# --- what is not known, and what is not shown ----------------------------------------------------


def test_without_evidence_everything_is_not_measured(shared_engine, tmp_path):
    folder = Path(shutil.copytree(shared_engine.directory, tmp_path / "bare"))
    shutil.rmtree(folder / "evidence", ignore_errors=True)
    path = write_report(folder)
    assert path == folder / "evidence" / "report.html"
    _, page = page_of(folder)
    for words in ("parity not measured", "speed-up not measured", "accuracy not measured", "Latency: not measured"):
        assert words in page.words
    assert "Environment: not measured" in page.words
    assert "RANDOM WEIGHTS" in page.words
    assert "holds" not in page.words
    assert not re.search(r"\d ×", page.words)


def test_random_weights_and_engines_that_were_not_run_are_said_loudly(folder):
    shutil.rmtree(folder / "evidence")
    tiny.reseal(folder, unproved="no NVIDIA GPU was found")
    write_summary(folder, None, None)
    text, page = page_of(folder)
    top = page.words.split("Tokens")[0]
    for words in ("BUILT, NOT RUN", "no NVIDIA GPU was found", "RANDOM WEIGHTS", "predictions mean nothing"):
        assert words in top
    assert 'class="alarms bad"' in text
    assert "12.5" not in top
    assert "made in" in page.words


def test_a_dense_engine_has_no_stages_and_no_speed_up(folder, model):
    shutil.rmtree(folder / "evidence")
    tiny.reseal(folder, plan=ztp.make_plan(model, "dense"))
    report = measured(manifest_sha256(folder))
    alone = {"samples": [s for s in report.samples if s.role == "pruned"], "ratios": []}
    (folder / "evidence").mkdir()
    (folder / "evidence" / "latency.json").write_text(report.model_copy(update=alone).to_json())
    text, page = page_of(folder)
    assert "the dense model keeps all" in page.words
    assert "this is the dense model" in page.words
    assert "Speed-up: not measured" in page.words
    assert text.count('class="mark median"') == 2 + 2  # two batches and their legends


def test_trained_weights_raise_no_alarm(full, tmp_path):
    folder = Path(shutil.copytree(full, tmp_path / "trained"))
    source = read_manifest(folder, EngineManifest).source
    weights = source.weights.model_copy(update={"kind": "file", "origin": "/home/me/mine.pth"})
    trained = source.model_copy(update={"weights": weights})
    tiny.reseal(folder, source=trained)
    sha = manifest_sha256(folder)
    requote(folder, "parity.json", manifest_sha256=sha)
    requote(folder, "report.json", manifest_sha256=sha)
    (folder / "evidence" / "latency.json").write_text(measured(sha).to_json())
    text, page = page_of(folder)
    assert "RANDOM" not in page.words
    assert "file (mine.pth)" in page.words
    assert "/home/me" not in text
    assert 'class="alarms' not in text
    assert "ztp eval measures it" in page.words


def test_the_page_names_the_engine_as_it_was_made_not_where_it_lies(folder):
    requote(folder, "report.json", engine="engines/here/deit t")
    text, page = page_of(folder)
    assert "ztp check --engine 'engines/here/deit t'" in page.words
    assert str(folder) not in text
    assert "made in 15.5 s (3.0 s of them measuring latency), peak memory 1.25 GiB" in page.words


@pytest.mark.parametrize("name", ["parity.json", "latency.json", "accuracy.json", "report.json"])
def test_evidence_of_another_build_is_left_out(folder, name):
    (folder / "evidence" / "accuracy.json").write_text(evaluated(manifest_sha256(folder)).to_json())
    assert read_evidence(folder).left_out == ()
    if name == "latency.json":
        (folder / "evidence" / name).write_text(measured("f" * 64).to_json())
    else:
        requote(folder, name, manifest_sha256="f" * 64)
    evidence = read_evidence(folder)
    gone = {"parity.json": evidence.parity, "latency.json": evidence.latency, "accuracy.json": evidence.accuracy}
    assert gone.get(name) is None
    assert evidence.made == (name != "report.json")
    [sentence] = evidence.left_out
    assert sentence.startswith(f"{name} quotes manifest ffffffffffff…")
    _, page = page_of(folder)
    assert sentence in page.words
    expected = {
        "parity.json": "parity not measured",
        "latency.json": "speed-up not measured",
        "accuracy.json": "accuracy not measured",
        "report.json": "made in not measured",
    }
    assert expected[name] in page.words


def test_evidence_that_cannot_be_read_is_left_out(folder):
    (folder / "evidence" / "latency.json").write_text("{}")
    (folder / "evidence" / "accuracy.json").write_text(evaluated(None).to_json())  # of a model in eager PyTorch
    requote(folder, "report.json", manifest_sha256=None)
    evidence = read_evidence(folder)
    assert (evidence.latency, evidence.accuracy, evidence.made) == (None, None, False)
    starts = ("latency.json cannot be read", "accuracy.json names no manifest", "report.json cannot be read")
    assert [line.startswith(start) for line, start in zip(evidence.left_out, starts, strict=True)] == [True] * 3


# --- the page itself ---------------------------------------------------------------------------


def test_everything_is_escaped(folder):
    parity = ParityReport.model_validate_json((folder / "evidence" / "parity.json").read_bytes())
    command = f"ztp engine --model 'a' --option '{EVIL}' </code><script>alert(1)</script>"
    report = measured(manifest_sha256(folder)).model_copy(update={"notes": [f"Note {EVIL}"], "command": command})
    (folder / "evidence" / "latency.json").write_text(report.to_json())
    write_summary(folder, parity, report, command)
    (folder / "evidence" / "accuracy.json").write_text(evaluated(manifest_sha256(folder), [EVIL] * 10).to_json())
    text, page = page_of(folder)
    assert "<b>" not in text
    assert "<script" not in text
    assert html.escape(command, quote=False).replace('"', "&#34;").replace("'", "&#39;") in text
    assert f"Note {EVIL}" in page.words
    assert command in page.words
    assert [row for row in page.rows if EVIL in row]


def refers(text: str) -> list[str]:
    """What a page would fetch, or lead to: anything but data and its own places."""
    found = [
        f"{tag} {name}={value}"
        for tag, name, value in Page(text).attributes
        if name in ("src", "href", "srcset", "action", "data", "poster") and not value.startswith(("data:", "#"))
    ]
    style = "".join(re.findall(r"<style>(.*?)</style>", text, flags=re.DOTALL))
    return found + re.findall(r"url\([^)]*\)|@import[^;]*", style) + re.findall(r"https?://[^\s<]*", text)


def test_the_page_needs_no_network_and_no_script(folder):
    text, page = page_of(folder)
    assert refers(text) == []
    assert refers('<img src="a.png"><style>@import x; b { background: url(c) }</style>http://d') != []
    assert "<script" not in text
    assert ("meta", "name", "viewport") in page.attributes
    assert "default-src 'none'" in text
    assert "prefers-color-scheme: dark" in text
    assert "@media print" in text


def test_a_page_that_is_not_well_formed_is_noticed():
    assert Page("<p><b></p></b>").wrong
    assert Page("<div><p></p>").open == ["div"]


def luminance(colour: str) -> float:
    parts = [int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)]
    red, green, blue = (p / 12.92 if p <= 0.04045 else ((p + 0.055) / 1.055) ** 2.4 for p in parts)
    return 0.2126 * red + 0.7152 * green + 0.0722 * blue


def contrast(one: str, other: str) -> float:
    low, high = sorted(map(luminance, (one, other)))
    return (high + 0.05) / (low + 0.05)


def test_text_has_the_contrast_of_wcag_aa_in_both_schemes(folder):
    text, _ = page_of(folder)
    assert contrast("#000000", "#ffffff") == pytest.approx(21)
    assert contrast("#999999", "#ffffff") < 4.5
    schemes = [dict(re.findall(r"--([\w-]+): (#\w{6})", block)) for block in re.findall(r":root \{(.*?)\}", text, re.S)]
    assert len(schemes) == 3
    for scheme in schemes:
        pairs = [("ink", "paper"), ("ink", "sheet"), ("soft", "paper"), ("soft", "sheet"), ("link", "paper")]
        pairs += [(kind, f"{kind}-sheet") for kind in ("good", "bad", "unsure")]
        pairs += [("good", "paper"), ("bad", "paper"), ("unsure", "sheet")]
        pairs += [("ink", f"{kind}-sheet") for kind in ("bad", "unsure")]
        assert {
            pair: contrast(*(scheme[name] for name in pair))
            for pair in pairs
            if contrast(*(scheme[n] for n in pair)) < 4.5
        } == {}
        drawn = {name: contrast(scheme[name], scheme["paper"]) for name in ("dense", "pruned", "slice")}
        assert min(drawn.values()) >= 3, drawn


# --- drawings ----------------------------------------------------------------------------------


def test_bars_are_as_long_as_tokens_are_many():
    drawing = tokens_figure([196, 137, 95, 66], [3, 6, 9])
    widths = [float(width) for width in re.findall(r'<rect[^>]* width="([\d.]+)%"', drawing)]
    assert [round(width / widths[0] * 196) for width in widths] == [196, 137, 95, 66]
    assert "137 · 69.9 %" in drawing
    assert 'aria-label="Patch tokens: 196, then 137, then 95, then 66"' in drawing


def test_the_histogram_holds_every_run_and_marks_its_quantiles():
    report = measured("a" * 64)
    drawing, beyond = distribution_figure(report, 1)
    assert beyond == []
    for kind in ("median", "p90", "p95", "p99"):
        assert drawing.count(f'class="mark {kind}"') == 3
    places = [float(x) for x in re.findall(r'class="mark \w+" x1="([\d.]+)%"', drawing)]
    assert all(0 <= place <= 100 for place in places)
    for first in range(0, 12, 4):
        assert places[first : first + 4] == sorted(places[first : first + 4])
    # One run that the system held up leaves the axis and is said, the others keep their bins.
    slow = report.samples[0].model_copy(update={"milliseconds": [*report.samples[0].milliseconds[:-1], [999.0] * 30]})
    _, beyond = distribution_figure(report.model_copy(update={"samples": [slow, *report.samples[1:3]]}), 1)
    assert beyond == ["dense: 30 of 120 runs beyond the axis, slowest 999.00 ms"]


def test_speed_ups_stand_against_the_limit():
    ratios = [measured("a" * 64).ratio("pruned", "dense", batch) for batch in (1, 8)]
    drawing = gains_figure(ratios, 2.0)
    limit = float(re.search(r'class="limit" x1="([\d.]+)%"', drawing)[1])
    dots = [float(x) for x in re.findall(r'class="dot" cx="([\d.]+)%"', drawing)]
    one = float(re.search(r'class="grid" x1="([\d.]+)%"', drawing)[1])
    assert [1 + (dot - one) / (limit - one) for dot in dots] == pytest.approx([r.speedup for r in ratios], abs=2e-3)
    unsure = gains_figure([ratios[0].model_copy(update={"verdict": "inconclusive"})], 2.0)
    assert 'class="dot unsure"' in unsure
    assert "unsure" not in drawing


# --- pictures and the command ------------------------------------------------------------------


@pytest.fixture
def ztp_command(monkeypatch, capsys):
    """Runs a command line; returns exit code, stdout, stderr."""

    def run(*arguments):
        return typed(monkeypatch, capsys, *arguments)

    return run


def point(name, speedup, change, mine=False):
    return figures.Point(name, (speedup, speedup - 0.02, speedup + 0.02), (change, change - 0.3, change + 0.3), mine)


def test_engines_that_another_beats_in_both_are_off_the_line():
    points = [point("a", 1.4, -0.5), point("b", 1.6, -0.2), point("c", 1.8, -1.0), point("d", 1.5, -0.2)]
    assert [one.name for one in figures.undominated([figures.DENSE, *points])] == ["dense", "b", "c"]
    twins = [point("a", 1.4, -0.5), point("b", 1.4, -0.5)]
    assert len(figures.undominated(twins)) == 2


def test_the_pareto_drawing_places_engines_by_both_numbers():
    drawing = str(figures.pareto_figure([point("0.9", 1.2, -0.1, mine=True), point("0.7", 1.7, -1.1)]))
    assert "dense × 1.00, +0.00 points; 0.9 × 1.20, -0.10 points; 0.7 × 1.70, -1.10 points" in drawing
    dots = re.findall(r'<circle class="dot ?(\w*)" cx="([\d.]+)%" cy="([\d.]+)"', drawing)
    assert [kind for kind, _, _ in dots] == ["dense", "", "other"]
    (x0, y0), (x1, y1), (x2, y2) = ((float(x), float(y)) for _, x, y in dots)
    assert (x1 - x0) / (x2 - x0) == pytest.approx(0.2 / 0.7, abs=2e-3)
    assert (y1 - y0) / (y2 - y0) == pytest.approx(0.1 / 1.1, abs=2e-3)
    assert drawing.count('class="front"') == 2


def test_accuracy_stands_against_speed(folder, tmp_path, ztp_command):
    """Where both were measured; other engines join where they differ in how they prune alone."""
    assert "Accuracy against speed" not in page_of(folder)[0]
    sha = manifest_sha256(folder)
    (folder / "evidence" / "accuracy.json").write_text(evaluated(sha).to_json())
    assert page_of(folder)[0].count("Accuracy against speed, batch") == len(read_evidence(folder).summary.gains)
    other = tmp_path / "other"
    shutil.copytree(folder, other)
    assert ztp_command("report", "--engine", folder, "--beside", other)[0] == 0
    page = (folder / "evidence" / "report.html").read_text()
    assert page.count('class="dot other"') == len(read_evidence(folder).summary.gains)
    manifest = read_manifest(other, EngineManifest)
    prepared = manifest.source.preprocessing.model_copy(update={"crop_pct": 0.5})
    tiny.reseal(other, source=manifest.source.model_copy(update={"preprocessing": prepared}))
    for path in (other / "evidence").glob("*.json"):  # as evidence of this other build
        path.write_text(path.read_text().replace(sha, manifest_sha256(other)))
    code, said = ztp_command("report", "--engine", folder, "--beside", other)[0::2]
    assert code == 2
    assert "other preprocessing than this engine" in said
    assert "crop_pct 0.5" in said
    tiny.reseal(other, source=manifest.source)
    shutil.copytree(folder / "evidence", other / "evidence", dirs_exist_ok=True)
    other_data = evaluated(sha).model_copy(update={"data_sha256": "f" * 64})
    (other / "evidence" / "accuracy.json").write_text(other_data.to_json())
    code, said = ztp_command("report", "--engine", folder, "--beside", other)[0::2]
    assert code == 2
    assert "other labelled pictures" in said
    (other / "evidence" / "accuracy.json").unlink()
    code, said = ztp_command("report", "--engine", folder, "--beside", other)[0::2]
    assert code == 2
    assert "no accuracy change against dense" in said


def test_the_command_draws_pictures_and_keeps_them(folder, tmp_path, ztp_command):
    Image.effect_noise((120, 100), 80).convert("RGB").save(tmp_path / "first.png")
    Image.effect_noise((120, 100), 60).convert("RGB").save(tmp_path / "second.png")
    page = folder / "evidence" / "report.html"
    code, out, err = ztp_command("report", "--engine", folder)
    assert (code, err) == (0, "")
    assert str(page) in out.replace("\n", "")
    assert "data:image/png" not in page.read_text()
    code, out, err = ztp_command("report", "--engine", folder, "--pictures", tmp_path / "first.png", "--json")
    assert code == 0, err
    assert json.loads(out) == {"report": str(page), "pictures": 1, "left_out": []}
    assert page.read_text().count("data:image/png;base64,iVBOR") == 1
    assert "first.png: tokens kept by onnxruntime" in page.read_text()
    code, _, _ = ztp_command("report", "--engine", folder)
    assert page.read_text().count("data:image/png;base64,iVBOR") == 1
    code, _, err = ztp_command("report", "--engine", folder, "--pictures", tmp_path / "second.png")
    assert code == 0, err
    assert "first.png" not in page.read_text()
    assert len(list((folder / "evidence" / "pictures").glob("*.png"))) == 1
    code, _, err = ztp_command("report", "--engine", tmp_path)
    assert code == 2
    assert "not an engine folder" in err


def test_pictures_that_were_changed_are_left_out(folder):
    home = folder / "evidence" / "pictures"
    home.mkdir()
    Image.new("RGB", (8, 8), "red").save(home / "a.png")
    sha = hash_file(home / "a.png").sha256
    files = [PictureFile(file="a.png", sha256=sha, caption=EVIL), PictureFile(file="../a.png", sha256=sha, caption="")]
    record = Pictures(manifest_sha256=manifest_sha256(folder), pictures=files)
    (folder / "evidence" / "pictures.json").write_text(record.to_json())
    evidence = read_evidence(folder)
    assert [picture.caption for picture in evidence.pictures] == [EVIL]
    assert len(evidence.left_out) == 1
    page_of(folder)
    Image.new("RGB", (8, 8), "blue").save(home / "a.png")
    assert read_evidence(folder).pictures == ()


# --- a browser ---------------------------------------------------------------------------------

BROWSER = next((found for name in ("/usr/bin/chromium", "chromium") if (found := shutil.which(name))), None)
FLAGS = (
    *("--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--hide-scrollbars"),
    *("--disable-background-networking", "--disable-component-update", "--disable-sync"),
)


def browse(scratch: Path, page: Path, *arguments: str) -> str:
    if BROWSER is None:
        pytest.skip("chromium is not installed: apt-get install chromium")
    profile = f"--user-data-dir={scratch / 'profile'}"
    command = [BROWSER, *FLAGS, profile, *arguments, page.as_uri()]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    return done.stdout


def inked(picture: Image.Image) -> float:
    """The share of pixels that are not of the commonest colour."""
    pixels = np.asarray(picture.convert("RGB")).reshape(-1, 3)
    return 1 - np.unique(pixels, axis=0, return_counts=True)[1].max() / len(pixels)


@pytest.mark.parametrize("width, scheme", [(390, 0), (1200, 1)], ids=["phone-dark", "desk-light"])
def test_a_browser_draws_the_page(folder, tmp_path, width, scheme):
    target = tmp_path / "page.png"
    setting = f"--blink-settings=preferredColorScheme={scheme}"
    browse(tmp_path, write_report(folder), setting, f"--screenshot={target}", f"--window-size={width},1600")
    picture = Image.open(target)
    assert picture.size == (width, 1600)
    assert inked(picture) > 0.02
    assert inked(Image.new("RGB", (width, 1600))) == 0
    dark = np.asarray(picture.convert("L"))[2, 2] < 64
    assert dark == (scheme == 0)


def test_no_width_scrolls_sideways(folder, tmp_path):
    """The page in frames of several widths; a page whose tables have no boxes of their own is noticed."""
    (folder / "evidence" / "accuracy.json").write_text(evaluated(manifest_sha256(folder)).to_json())
    text, _ = page_of(folder)
    broken = text.replace("overflow-x: auto", "overflow-x: visible")
    assert broken != text
    frames = [(390, text), (320, text), (1200, text), (390, broken)]
    inner = "".join(
        f'<iframe width="{width}" height="600" style="border:0" srcdoc="{html.escape(page)}"></iframe>'
        for width, page in frames
    )
    probe = (
        "onload = () => { document.title = [...document.querySelectorAll('iframe')]"
        ".map(f => f.contentDocument.documentElement.scrollWidth).join(' ') }"
    )
    wrapper = tmp_path / "frames.html"
    wrapper.write_text(f"<!doctype html><meta charset=utf-8><title></title><script>{probe}</script>{inner}")
    dumped = browse(tmp_path, wrapper, "--dump-dom", "--window-size=1300,800")
    phone, small, desk, overflowing = map(int, re.search(r"<title>([\d ]+)</title>", dumped)[1].split())
    assert (phone, small, desk) == (390, 320, 1200)
    assert overflowing > 390
