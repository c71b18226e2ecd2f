"""The recorded run: what it holds, that a check records it, and that repeating it notices what differs."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
from safetensors import safe_open
from safetensors.numpy import load_file, save_file

import ztp_deploy as ztp
from tests import tiny
from tests.commands import typed
from tests.runs import Listening
from ztp_deploy import environment
from ztp_deploy.backends import find_engine, open_engine
from ztp_deploy.evidence import selftest
from ztp_deploy.evidence.report.summary import Summary, summarise
from ztp_deploy.manifest import BatchRange, manifest_sha256
from ztp_deploy.workflow.progress import Clock, Silent
from ztp_deploy.workflow.steps import check, write_reports


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
    write_reports(built, summary)
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


# --- repeated --------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def kept_run(openvino_engine, shared_engine, tmp_path_factory):
    """An OpenVINO engine, and its graph's run as ONNX Runtime recorded it."""
    root = tmp_path_factory.mktemp("recorded")
    for made, name in ((shared_engine, "other"), (openvino_engine, "engine")):
        shutil.copytree(made.directory, root / name)
    return root / "engine", load_file(selftest.write_selftest(root / "other", tiny.images(2)))


@pytest.fixture
def recorded(kept_run):
    """That engine, whose record a test may change."""
    engine, record = kept_run
    tensors = {name: tensor.copy() for name, tensor in record.items()}
    save_record(engine, tensors)
    return engine, tensors


def save_record(engine, tensors, **metadata):
    (engine / "evidence").mkdir(exist_ok=True)
    known = {"manifest_sha256": manifest_sha256(engine), "tolerance": "0.0001"} | metadata
    known = {name: value for name, value in known.items() if value is not None}
    save_file(tensors, engine / "evidence" / selftest.SELFTEST_FILE, known)


def repeated(engine):
    with open_engine(engine) as session:
        return ztp.repeat_selftest(session)


def test_another_librarys_run_holds(recorded):
    engine, _ = recorded
    found = repeated(engine)
    assert found.images == 2
    assert 0 < found.worst_logit < 1e-4


def test_its_own_run_holds_exactly(engine):
    selftest.write_selftest(engine.directory, tiny.images(3))
    assert repeated(engine.directory) == ztp.SelfTest(images=2, worst_logit=0.0)


def test_pixels_are_repeated_too(pruned, exported, tmp_path):
    artifact = exported(pruned, input="uint8")
    engine = ztp.build(artifact, "onnxruntime", device="cpu", batch=(1, 4, 8), directory=tmp_path / "engine")
    pixels = np.random.default_rng(0).integers(0, 256, (2, 3, 96, 96), dtype=np.uint8)
    record = load_file(selftest.write_selftest(engine.directory, pixels))
    assert repeated(engine.directory).images == 2
    save_record(engine.directory, record | {"images": pixels.astype(np.float32)})
    with pytest.raises(ztp.DamagedFiles, match="holds images of another kind"):
        repeated(engine.directory)


def doctored_logits(record):
    record["logits"][1, 3] += 2e-4 * record["logits"][1].std()


def not_a_number(record):
    record["logits"][0, 3] = np.nan


def doctored_tokens(record):
    free = set(range(36)) - set(record["kept_2"][1].tolist())
    record["kept_2"][1, 0] = min(free)


def doctored_merges(record):
    patch = np.argmax(record["assignment_2"][1] < 0)
    record["assignment_2"][1, patch] = 0


def without(name):
    return lambda record: record.pop(name)


def holding(name, tensor):
    return lambda record: record.update({name: tensor})


LOGITS = "the same tokens are kept but logits differ by"
FAULTS = {
    "logits": (doctored_logits, {}, 1, f"Self-test fails: {LOGITS} 0.0002 σ (at most 0.0001) on image 1."),
    "nan": (not_a_number, {}, 1, f"Self-test fails: {LOGITS} inf σ (at most 0.0001) on image 0."),
    "tokens": (
        doctored_tokens,
        {},
        1,
        "fails: stage 2 keeps other tokens on image 1 than when the engine was checked.",
    ),
    "merges": (doctored_merges, {}, 1, "fails: stage 2 carries patches in other tokens on image 1 than when"),
    "manifest": (None, {"manifest_sha256": "0" * 64}, 2, "belongs to another manifest than this engine's. Record it"),
    "no manifest": (None, {"manifest_sha256": None}, 2, "does not say manifest_sha256. Write it again with"),
    "no tolerance": (None, {"tolerance": None}, 2, "does not say tolerance. Write it again"),
    **{
        f"tolerance {text!r}": (None, {"tolerance": text}, 2, "gives no tolerance above zero. Write it again")
        for text in ("nan", "inf", "1e999", "0.0", "-0.1", "+0.1", " 0.1", "0,1", "1_0", "٠.١", "")
    },
    "no kept": (without("kept_3"), {}, 2, "holds no kept_3. Write it again"),
    "no assignment": (without("assignment_1"), {}, 2, "holds no assignment_1."),
    "no logits": (without("logits"), {}, 2, "holds no logits."),
    "no images": (without("images"), {}, 2, "holds no images."),
    "size": (holding("images", tiny.images(2, size=64)), {}, 2, "holds images of another size than the engine takes."),
    "kind": (holding("kept_1", np.zeros((2, 25), np.int64)), {}, 2, "holds kept_1 of another kind."),
    "axes": (holding("logits", np.zeros(20, np.float32)), {}, 2, "holds logits of another kind."),
    "count": (holding("kept_1", np.zeros((2, 3), np.int32)), {}, 2, "another number of tokens than the engine gives."),
    "classes": (holding("logits", np.zeros((2, 3), np.float32)), {}, 2, "another number of logits than the engine"),
    "batch": (holding("images", tiny.images(9)), {}, 2, "holds 9 images, and the engine takes 1 to 8. Write it again"),
    "none": (holding("images", tiny.images(0)), {}, 2, "holds 0 images, and the engine takes 1 to 8. Write it again"),
    "pixels": (holding("images", tiny.images(2) * np.float32(np.nan)), {}, 2, "holds pixels that are NaN or infinite."),
}


@pytest.mark.parametrize("change, metadata, code, sentence", FAULTS.values(), ids=FAULTS)
def test_a_record_that_does_not_fit_is_refused(recorded, change, metadata, code, sentence):
    engine, record = recorded
    if change:
        change(record)
    save_record(engine, record, **metadata)
    with pytest.raises(ztp.ZtpError) as refused:
        repeated(engine)
    assert sentence in str(refused.value)
    assert refused.value.exit_code == code


def test_a_record_that_is_gone_or_cut(recorded):
    engine, _ = recorded
    path = engine / "evidence" / selftest.SELFTEST_FILE
    whole = path.read_bytes()
    for length in (0, 3, 20, len(whole) - 1):
        path.write_bytes(whole[:length])
        with pytest.raises(
            ztp.DamagedFiles, match=re.escape(f"{path} is not a whole safetensors file. Write it again")
        ):
            repeated(engine)
    path.unlink()
    with pytest.raises(ztp.BadRequest, match=re.escape(f"{engine} carries no self-test: it has no evidence/selftest")):
        repeated(engine)


def test_a_record_that_may_not_be_read(recorded, monkeypatch):
    engine, _ = recorded
    path = engine / "evidence" / selftest.SELFTEST_FILE
    genuine = Path.open

    def refuse(self, *arguments, **words):
        if self == path:
            raise PermissionError(13, "Permission denied", str(path))
        return genuine(self, *arguments, **words)

    monkeypatch.setattr(Path, "open", refuse)
    with pytest.raises(ztp.DamagedFiles, match=re.escape(f"{path} cannot be read: Permission denied. Check who")):
        repeated(engine)


@pytest.mark.filterwarnings("default")
def test_an_engine_that_failed_its_parity_check_is_said_to(recorded, tmp_path, monkeypatch, capsys):
    engine = shutil.copytree(recorded[0], tmp_path / "failed")
    report = {"manifest_sha256": manifest_sha256(engine), "passed": False, "edges": []}
    (engine / "evidence" / "parity.json").write_text(json.dumps(report))
    code, _, err = typed(monkeypatch, capsys, "selftest", "--engine", engine)
    assert code == 0
    assert "failed its last parity check" in " ".join(err.split())


def test_the_command_ends_with_its_exit_codes(recorded, monkeypatch, capsys):
    engine, record = recorded
    code, out, _ = typed(monkeypatch, capsys, "selftest", "--engine", engine)
    assert (code, "Self-test holds: 2 images, the same tokens kept, logits within" in out) == (0, True)
    code, out, _ = typed(monkeypatch, capsys, "selftest", "--engine", engine, "--json")
    found = json.loads(out)
    assert (code, set(found)) == (0, {"engine", "images", "worst_logit"})
    doctored_tokens(record)
    save_record(engine, record)
    code, out, _ = typed(monkeypatch, capsys, "selftest", "--engine", engine, "--json")
    assert (code, json.loads(out)["error"]["exit_code"]) == (1, 1)
    assert json.loads(out)["error"]["fix"].startswith("Do not use this engine here: build it again on this machine")
