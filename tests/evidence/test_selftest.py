"""The recorded run: what it holds, and that a check records it."""

from __future__ import annotations

import numpy as np
import pytest
from safetensors import safe_open
from safetensors.numpy import load_file

import ztp_deploy as ztp
from tests import tiny
from tests.runs import Listening
from ztp_deploy import environment
from ztp_deploy.backends import find_engine
from ztp_deploy.evidence import selftest
from ztp_deploy.evidence.report.summary import Summary, summarise
from ztp_deploy.manifest import BatchRange, manifest_sha256
from ztp_deploy.workflow.progress import Clock, Silent
from ztp_deploy.workflow.steps import check, write_summary


def test_the_record_is_the_engines_own_run(engine):
    images = tiny.images(5)
    path = selftest.write_selftest(engine.directory, images)
    assert path == engine.evidence / "selftest.safetensors"
    found = load_file(path)
    stages = ("kept_1", "kept_2", "kept_3", "assignment_1", "assignment_2", "assignment_3")
    assert set(found) == {"images", "logits", *stages}
    assert np.array_equal(found["images"], images[:2])
    with ztp.load_engine(engine.directory) as session:
        assert np.array_equal(found["logits"], session.run(images[:2]))
        for stage, kept in enumerate(session.kept(), start=1):
            assert np.array_equal(found[f"kept_{stage}"], kept)
            assert found[f"kept_{stage}"].dtype == np.int32
        for stage, carriers in enumerate(session.assignment(), start=1):
            assert np.array_equal(found[f"assignment_{stage}"], carriers)
            assert carriers.shape == (2, 36)
            assert found[f"assignment_{stage}"].dtype == np.int32
    with safe_open(path, "np") as stored:
        assert stored.metadata() == {"manifest_sha256": manifest_sha256(engine.directory), "tolerance": "0.0001"}


@pytest.mark.parametrize("span, count", [((1, 4, 8), 2), ((1, 1, 1), 1), ((4, 4, 8), 4)])
def test_two_images_where_the_range_allows_it(engine, span, count):
    tiny.reseal(engine.directory, batch=BatchRange.parse(span))
    found = load_file(selftest.write_selftest(engine.directory, tiny.images(3)))
    expected = [tiny.images(3)[index % 3] for index in range(count)]
    assert np.array_equal(found["images"], expected)


def test_after_a_check_no_report_says_that_the_engine_never_ran(engine, model):
    tiny.reseal(engine.directory, unproved="no NVIDIA GPU was found")
    built = find_engine(engine.directory)
    sha = manifest_sha256(built.directory)
    facts = {"steps": [], "peak_gib": 0.0, "machine": environment.snapshot(), "manifest_sha256": sha}
    summary = summarise(built.manifest, built.directory, None, None, command="ztp engine", **facts)
    write_summary(built, summary)
    assert "BUILT, NOT RUN" in (built.evidence / "report.md").read_text()
    assert check(built, model, None, Clock(Silent()), count=2).passed
    for name in ("report.md", "report.json", "report.html"):
        assert "NOT RUN" not in (built.evidence / name).read_text()
    renewed = Summary.model_validate_json((built.evidence / "report.json").read_bytes())
    assert renewed.parity_passed
    assert renewed.command == "ztp engine"


def test_a_check_records_it_only_where_parity_holds(engine, model):
    monitor = Listening()

    path = engine.evidence / selftest.SELFTEST_FILE
    assert check(engine, model, None, Clock(monitor), count=2).passed
    assert path.is_file()
    assert monitor.warned == []
    path.unlink()

    def shift(graph):
        last = max(range(len(graph.graph.initializer)), key=lambda i: len(graph.graph.initializer[i].raw_data))
        values = np.frombuffer(graph.graph.initializer[last].raw_data, np.float32) * 1.01
        graph.graph.initializer[last].raw_data = values.astype(np.float32).tobytes()

    tiny.damage_graph(engine.directory, shift)
    assert not check(engine, model, None, Clock(monitor), count=2).passed
    assert not path.exists()
    [told] = monitor.warned
    assert "Polygraphy" in told
