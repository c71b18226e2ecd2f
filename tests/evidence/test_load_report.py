"""What reports say of engines under load: rows, sentences, figure; which evidence is left out; records and their names."""

from __future__ import annotations

import io
import json
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
from rich.console import Console

import ztp_deploy as ztp
from tests import tiny
from tests.evidence.test_html import Page
from ztp_deploy import environment
from ztp_deploy.errors import BadRequest, GateFailed
from ztp_deploy.evidence import load
from ztp_deploy.evidence.clients import Turn
from ztp_deploy.evidence.load import Load, LoadReport
from ztp_deploy.evidence.records import record_load
from ztp_deploy.evidence.report import terminal
from ztp_deploy.evidence.report.figures import load_figure
from ztp_deploy.evidence.report.folder import read_evidence
from ztp_deploy.evidence.report.html import render_html
from ztp_deploy.evidence.report.load import load_head, load_lines, load_rows, render_load
from ztp_deploy.manifest import manifest_sha256
from ztp_deploy.workflow import steps

SPEED = {"dense": 1.0, "pruned": 1.5, "slice": 1.6}


def made_up(engine, roles=("dense", "pruned"), clients=(1, 2, 4), rates=(), count=40, batches=(1,)) -> LoadReport:
    """A run of 6 turns: an engine answers 20 images a second times its speed, two clients get the most out of it."""
    generator = np.random.default_rng(0)
    levels, ratios = [], []
    for batch in batches:
        for asked in [Load(clients=2, rate=rate) for rate in rates] or [Load(clients=number) for number in clients]:
            now = []
            for role in roles:
                most = 20 * SPEED[role] * (1 if asked.clients == 1 else 1.6)
                spread = generator.gamma(20, 1 / 20, (6, count)) * 1e3 * asked.clients / most
                late = asked.rate is not None and asked.rate > most
                turns = [
                    Turn(
                        sitting=number,
                        seconds=1.0,
                        images_per_second=most if asked.rate is None or late else asked.rate,
                        milliseconds=milliseconds.tolist(),
                        growth=None if asked.rate is None else 0.5 * late,
                    )
                    for number, milliseconds in enumerate(spread)
                ]
                now.append(load.level_of(role, engine, batch, asked, turns))
            levels += now
            ratios += load.ratios_of(now)
    return LoadReport(
        command="ztp bench --engine 'a b' --clients 1,2,4",
        started="2026-01-01T00:00:00Z",
        levels=levels,
        ratios=ratios,
        environment=environment.snapshot(),
        gpu="GPU: none found; everything ran on the CPU",
        notes=["The machine was busy."],
    )


def shown(report) -> str:
    console = Console(width=80, record=True, file=io.StringIO())
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(terminal, "out", console)
        terminal.show_load(report)
    return console.export_text()


def test_rows_of_clients(shared_engine):
    report = made_up(shared_engine)
    rows = load_rows(report)
    assert [row[:3] for row in rows] == [["1", str(n), role] for n in (1, 2, 4) for role in ("dense", "pruned")]
    assert {len(row) for row in rows} == {len(load_head(report))}
    assert rows[0][3] == "20.0 (20.0–20.0)"
    assert rows[5][3] == "48.0 (48.0–48.0)"
    assert [row[-1] for row in rows] == ["", "**1.50 ×** (1.50–1.50)"] * 3
    level = report.levels[3]
    times = (level.median, level.p90, level.p95, level.p99, level.maximum)
    assert rows[3][4:9] == [f"{value:.2f}" for value in times]
    assert load_head(report)[-1] == "images/s over dense (95 % interval)"
    assert load_lines(report) == [
        "Clients are threads of one Python process; each asks again as soon as it is answered."
    ]


def test_far_percentiles_that_are_not_known_are_explained_once(shared_engine):
    report = made_up(shared_engine, count=15)
    assert [row[6:8] for row in load_rows(report)] == [[f"{one.p95:.2f}", "–"] for one in report.levels]
    assert [row[6:8] for row in load_rows(made_up(shared_engine, count=3))] == [["–", "–"]] * 6
    [line] = [line for line in load_lines(report) if line.startswith("–")]
    assert line == "–: fewer than 20 requests say nothing of p95, fewer than 100 nothing of p99."


def test_rows_of_rates(shared_engine):
    """Dense answers 32 a second, pruned 48."""
    report = made_up(shared_engine, rates=(30, 40.5, 50))
    rows = load_rows(report)
    assert load_head(report)[1] == "requests/s"
    assert [row[1] for row in rows] == ["30", "30", "40.5", "40.5", "50", "50"]
    assert [row[3] for row in rows] == ["30.0", "30.0", "32.0", "40.5", "32.0", "48.0"]
    assert [row[4] == "not sustained" for row in rows] == [False, False, True, False, True, True]
    assert rows[2][5:] == ["–"] * 4 + [""]
    assert rows[3][-1] == "–"  # nothing to be faster than
    assert rows[1][-1].startswith("**1.5")
    lines = load_lines(report)
    assert "served by 2 threads of Python; latency counts from when a request was due." in lines[0]
    assert lines[1].startswith("Not sustained: ")
    assert not [line for line in load_lines(made_up(shared_engine, rates=(30,))) if line.startswith("Not")]


def test_what_is_in_doubt_is_named_once_with_its_reason(shared_engine):
    report = made_up(shared_engine)
    levels = [
        level.model_copy(update={"verdict": "inconclusive", "reason": "it is wide"})
        if level.role == "pruned" or level.clients == 1
        else level
        for level in report.levels
    ]
    doubtful = report.model_copy(update={"levels": levels})
    assert load_lines(doubtful)[1:] == [
        "Inconclusive, it is wide: dense at batch 1, 1 client; pruned at batch 1, 1, 2, 4 clients."
    ]
    ratios = [one.model_copy(update={"verdict": "inconclusive", "reason": "it drifted"}) for one in report.ratios]
    [line] = load_lines(report.model_copy(update={"ratios": ratios}))[1:]
    assert line == "Inconclusive, it drifted: pruned over dense at batch 1, 1, 2, 4 clients."
    assert [row[3].endswith(" inconclusive") for row in load_rows(doubtful)] == [True, True, False, True, False, True]


def test_engines_in_different_places_are_named_by_what_tells_them_apart(shared_engine):
    report = made_up(shared_engine)
    roles = {
        "dense": "onnxruntime-1.31.1-cpu/deit_t--dense--fp32--b1-4-8",
        "pruned": "openvino-2026.4.1-cpu/deit_t--zero_tprune-0.7--fp32--b1-4-8--s58160a",
    }
    levels = [level.model_copy(update={"role": roles[level.role]}) for level in report.levels]
    ratios = [
        one.model_copy(update={"engine": roles[one.engine], "reference": roles[one.reference]}) for one in report.ratios
    ]
    found = report.model_copy(update={"levels": levels, "ratios": ratios})
    assert [row[2] for row in load_rows(found)[:2]] == [
        "onnxruntime 1.31.1 dense fp32",
        "openvino 2026.4.1 zero_tprune-0.7 fp32, settings s58160a",
    ]
    assert load_rows(found)[1][-1] == "**1.50 ×** (1.50–1.50)"


def test_the_markdown_is_a_table_with_its_sentences(shared_engine):
    report = made_up(shared_engine, roles=("pruned",), rates=(30,))
    lines = render_load(report).splitlines()
    assert lines[0] == "| batch | requests/s | engine | images/s | ms since due: median | p90 | p95 | p99 | max |"
    assert lines[1] == "|---:|---:|---|---|---:|---:|---:|---:|---:|"
    assert lines[2].startswith("| 1 | 30 | pruned | 30.0 | ")
    assert lines[2].count("|") == 10
    assert lines[-2].startswith(f"- {environment.cpu_name()}")
    assert lines[-1] == "- The machine was busy."


def test_the_terminal_fits_eighty_columns(shared_engine):
    printed = shown(made_up(shared_engine, roles=("dense", "pruned", "slice"), batches=(1, 8)))
    assert printed.count("Under load, batch") == 2
    assert "…" not in printed
    rows = [line.split() for line in printed.splitlines() if "pruned" in line]
    assert [row[:3] for row in rows] == [["1", "pruned", "30.0"], ["2", "pruned", "48.0"], ["4", "pruned", "48.0"]] * 2
    assert printed.count("(1.50–1.50)") == printed.count("(1.60–1.60)") == 6
    assert "The machine was busy." in printed
    assert "A: " not in printed
    roles = {"dense": "a-1-cpu/m--dense--fp32--b1-4-8", "pruned": "b-2-cpu/m--zero_tprune-0.7--bf16--b1-4-8"}
    report = made_up(shared_engine)
    levels = [one.model_copy(update={"role": roles[one.role]}) for one in report.levels]
    long = shown(report.model_copy(update={"levels": levels, "ratios": []}))
    assert long.splitlines()[:2] == ["A: a 1 dense fp32", "B: b 2 zero_tprune-0.7 bf16"]
    assert next(line.split()[:3] for line in long.splitlines() if " B " in line) == ["1", "B", "30.0"]
    late = shown(made_up(shared_engine, rates=(50,)))
    assert late.count("not") >= 2
    assert "Not sustained: requests came faster" in late


def test_the_figure_has_a_line_an_engine(shared_engine):
    report = made_up(shared_engine, roles=("dense", "pruned", "slice"))
    drawing = str(load_figure(report, 1))
    assert drawing.count("<circle") == 3 * (1 + 3)
    assert len(re.findall(r'class="whisker[^"]*"', drawing)) == 3 * 2
    last = next(level for level in report.levels if (level.role, level.clients) == ("pruned", 4))
    assert f"4: 48.0 and {last.p95:.2f} ms" in drawing
    # More throughput lies further right, a longer p95 higher up, which is a smaller y.
    dots = re.findall(r'<circle class="dot" cx="([\d.]+)%" cy="([\d.]+)"', drawing)[1:]
    places = [(float(across), float(down)) for across, down in dots]
    assert places[0][0] < places[1][0] == places[2][0]
    assert places[2][1] < places[1][1]
    wide = [one.model_copy(update={"verdict": "inconclusive"}) for one in report.levels]
    assert str(load_figure(report.model_copy(update={"levels": wide}), 1)).count("unsure") == 9
    for none in (
        made_up(shared_engine, clients=(4,)),
        made_up(shared_engine, rates=(30, 40)),
        made_up(shared_engine, count=3),
    ):
        assert load_figure(none, 1) is None


# --- folders -----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def proved(shared_engine, model, tmp_path_factory):
    """An engine folder that has passed the gate; tests copy it."""
    folder = tmp_path_factory.mktemp("load") / "deit_t--zero_tprune-0.7--fp32--b1-4-8--random"
    shutil.copytree(shared_engine.directory, folder)
    report = ztp.check_parity(folder, model, tiny.images(3))
    assert report.passed
    return folder


@pytest.fixture
def folder(proved, tmp_path):
    return Path(shutil.copytree(proved, tmp_path / proved.name))


def page_of(folder):
    text = render_html(read_evidence(folder))
    page = Page(text)
    assert (page.open, page.wrong) == ([], [])
    assert "None" not in page.words
    return text, page


def test_the_page_has_a_section_where_load_was_measured(folder, shared_engine):
    assert "Under load" not in page_of(folder)[1].words
    report = made_up(shared_engine)
    (folder / "evidence" / "load.json").write_text(report.to_json())
    assert read_evidence(folder).loads == (report,)
    text, page = page_of(folder)
    assert "Under load" in page.words
    plain = [[cell.replace("**", "") for cell in row] for row in load_rows(report)]
    assert [row for row in page.rows if row in plain] == plain
    for words in ("Latency against throughput, batch 1", "The machine was busy.", "Measure it under load again"):
        assert words in page.words
    assert report.command in page.words
    assert 'aria-label="Images a second and p95' in text
    rate = made_up(shared_engine, rates=(30,))
    (folder / "evidence" / "rate.json").write_text(rate.to_json())
    assert read_evidence(folder).loads == (report, rate)  # neither kind replaces the other
    both = page_of(folder)[1].words
    (folder / "evidence" / "load.json").unlink()
    alone = page_of(folder)[1].words
    for words in (both, alone):
        assert "ms since due" in words
    assert "Latency against throughput" in both
    assert "Latency against throughput" not in alone


def test_load_of_another_build_is_left_out(folder, shared_engine):
    """Of engines measured together, one of this build makes the file this engine's."""
    report = made_up(shared_engine)
    mixed = [
        one.model_copy(update={"manifest_sha256": "f" * 64}) if one.role == "dense" else one for one in report.levels
    ]
    (folder / "evidence" / "load.json").write_text(report.model_copy(update={"levels": mixed}).to_json())
    assert read_evidence(folder).left_out == ()
    assert len(read_evidence(folder).loads) == 1
    other = [one.model_copy(update={"manifest_sha256": "f" * 64}) for one in report.levels]
    (folder / "evidence" / "load.json").write_text(report.model_copy(update={"levels": other}).to_json())
    evidence = read_evidence(folder)
    assert evidence.loads == ()
    [sentence] = evidence.left_out
    assert sentence.startswith("load.json quotes manifest ffffffffffff…")
    assert "Under load" not in page_of(folder)[1].words
    (folder / "evidence" / "load.json").write_text("{}")
    assert read_evidence(folder).left_out[0].startswith("load.json cannot be read")


def test_markdown_reports_that_stand_join_in(folder, shared_engine):
    from ztp_deploy.evidence.report.summary import summarise
    from ztp_deploy.manifest import EngineManifest, read_manifest

    engine = ztp.load_engine(folder)
    sha = manifest_sha256(folder)
    made = {"command": "c", "steps": [], "peak_gib": 1.0, "machine": environment.snapshot(), "manifest_sha256": sha}
    summary = summarise(read_manifest(folder, EngineManifest), folder, None, None, **made)
    engine = steps.Engine(folder, engine.manifest)
    steps.write_reports(engine, summary)
    path = folder / "evidence" / "report.md"
    assert "Under load" not in path.read_text()
    report = made_up(shared_engine)
    (folder / "evidence" / "load.json").write_text(report.to_json())
    steps.write_reports(engine, summary)
    assert path.read_text().endswith(f"\n\n## Under load\n\n{render_load(report)}")


# --- what is proved, what is recorded ----------------------------------------------------------


def test_only_proved_engines_are_put_under_load(folder, shared_engine):
    engine = steps.Engine(folder, shared_engine.manifest)
    steps.require_proof([engine])
    path = folder / "evidence" / "parity.json"
    report = json.loads(path.read_text())
    path.write_text(json.dumps(report | {"passed": False}))
    with pytest.raises(GateFailed, match=r"failed its last parity check.*ztp check --engine"):
        steps.require_proof([engine])
    path.write_text(json.dumps(report | {"passed": False, "manifest_sha256": "f" * 64}))
    with pytest.raises(BadRequest, match=r"passed no parity check as it stands.*ztp check --engine"):
        steps.require_proof([engine])
    path.unlink()
    with pytest.raises(BadRequest, match="passed no parity check"):
        steps.require_proof([engine])


def test_records_are_named_by_what_engines_have_in_common(shared_engine, tmp_path):
    report = made_up(shared_engine)
    machine = "".join(c if c.isalnum() else "-" for c in environment.cpu_name().lower())
    machine = re.sub("-+", "-", machine).strip("-")
    record_load(report, "deit_t", tmp_path / "a")
    stem = f"deit_t--load-onnxruntime-fp32--{machine}"
    assert sorted(path.name for path in (tmp_path / "a").iterdir()) == [f"{stem}.md", f"{stem}.samples.json"]
    assert (tmp_path / "a" / f"{stem}.md").read_text() == render_load(report)
    assert LoadReport.model_validate_json((tmp_path / "a" / f"{stem}.samples.json").read_text()) == report
    levels = [
        one.model_copy(
            update={"engine": "deit_t--x--bf16--b8-8-8--s58160a", "backend": backend, "precision": precision}
        )
        for one, backend, precision in zip(
            report.levels, ["openvino 1"] + ["onnxruntime 1"] * 5, ["bf16"] + ["fp32"] * 5, strict=True
        )
    ]
    record_load(report.model_copy(update={"levels": levels}), "deit_t", tmp_path / "b")
    assert {path.name for path in (tmp_path / "b").glob("*.md")} == {f"deit_t--load-b8-s58160a--{machine}.md"}
    record_load(made_up(shared_engine, rates=(30,)), "deit_t", tmp_path / "c")
    assert {path.name for path in (tmp_path / "c").glob("*.md")} == {f"deit_t--rate-onnxruntime-fp32--{machine}.md"}
