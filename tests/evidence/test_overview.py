"""What `ztp inspect` reads of an engine folder."""

from __future__ import annotations

import json
import os

import pytest

from tests import tiny
from tests.commands import typed
from ztp_deploy.errors import BadRequest, DamagedFiles, MissingSoftware
from ztp_deploy.evidence.overview import overview
from ztp_deploy.evidence.selftest import write_selftest
from ztp_deploy.manifest import manifest_sha256


def summary(sha: str, **gain) -> str:
    gains = [{"batch": 8, "speedup": {"speedup": 1.65, "verdict": "measured"}} | gain]
    return json.dumps({"manifest_sha256": sha, "gains": gains, "machine": {"cpu": "A processor"}})


def write(engine, name, text):
    engine.evidence.mkdir(exist_ok=True)
    (engine.evidence / name).write_text(text)


def test_what_nobody_proved_or_measured_is_said_to_be_neither(engine):
    found = overview(engine.directory)
    assert found.manifest == engine.manifest
    assert found.bytes == (engine.directory / "model.onnx").stat().st_size
    assert (found.library, found.unusable) == (engine.manifest.backend_version, None)
    assert (found.parity, found.selftest, found.speedups, found.measured_on) == ("not checked", False, (), None)


@pytest.mark.parametrize("passed, parity", [(True, "passed"), (False, "failed")])
def test_evidence_of_this_build_is_read(engine, passed, parity):
    sha = manifest_sha256(engine.directory)
    write(engine, "parity.json", json.dumps({"manifest_sha256": sha, "passed": passed}))
    write(engine, "report.json", summary(sha))
    write_selftest(engine.directory, tiny.images(2))
    found = overview(engine.directory)
    assert (found.parity, found.selftest) == (parity, True)
    assert found.speedups == ((8, 1.65, "measured"),)
    assert found.measured_on == "A processor"


ODD = {"gains": [{"batch": 1}], "passed": [], "machine": 3}


@pytest.mark.parametrize(
    "text", [summary("another build's"), "[]", "{", '{"passed": true}', "[" * 10**5, "odd", "pipe"]
)
def test_evidence_of_another_build_or_unreadable_is_none(engine, text):
    for name in ("parity.json", "report.json"):
        if text == "pipe":  # which a reader would wait for
            engine.evidence.mkdir(exist_ok=True)
            os.mkfifo(engine.evidence / name)
            continue
        odd = json.dumps(ODD | {"manifest_sha256": manifest_sha256(engine.directory)})
        write(engine, name, odd if text == "odd" else text)
    found = overview(engine.directory)
    assert (found.parity, found.speedups, found.measured_on) == ("not checked", (), None)


def test_what_is_missing_here_is_named(engine, monkeypatch):
    monkeypatch.setattr("ztp_deploy.backends.onnxruntime.backend.missing", lambda: "onnxruntime-gpu")
    found = overview(engine.directory)
    assert (found.library, found.unusable) == (None, "onnxruntime-gpu is not installed (pip install onnxruntime-gpu)")


def test_a_library_that_cannot_be_loaded_is_named(engine, monkeypatch):
    def version():
        raise MissingSoftware("ONNX Runtime is installed and cannot be loaded: no such symbol.", "Install it again.")

    monkeypatch.setattr("ztp_deploy.backends.onnxruntime.backend.version", version)
    found = overview(engine.directory)
    assert (found.library, found.unusable) == (None, "ONNX Runtime is installed and cannot be loaded: no such symbol.")


def test_engines_for_a_gpu_that_is_not_here(engine, monkeypatch):
    monkeypatch.setattr("ztp_deploy.environment.gpus", lambda: ())
    tiny.reseal(engine.directory, device="cuda")
    assert overview(engine.directory).unusable == "no NVIDIA GPU was found"


def test_an_engine_for_another_processor(engine):
    tiny.reseal(engine.directory, built={"cpu_flags": ["amx_fantasy"]})
    assert "amx_fantasy" in overview(engine.directory).unusable


@pytest.mark.parametrize("gpu", [True, False])
def test_what_it_was_measured_on(engine, gpu):
    tiny.reseal(engine.directory, device="cuda" if gpu else "cpu")
    text = json.loads(summary(manifest_sha256(engine.directory)))
    write(engine, "report.json", json.dumps(text | {"gpu": "GPU: NVIDIA Test"}))
    assert overview(engine.directory).measured_on == ("GPU: NVIDIA Test" if gpu else "A processor")


def test_a_self_test_of_another_build_or_damaged_is_none(engine):
    path = write_selftest(engine.directory, tiny.images(2))
    tiny.reseal(engine.directory, unproved="changed")
    assert not overview(engine.directory).selftest
    path.write_bytes(b"cut off")
    assert not overview(engine.directory).selftest


def test_a_folder_that_is_none_or_damaged_is_refused(engine, tmp_path):
    with pytest.raises(BadRequest, match="is not an engine folder"):
        overview(tmp_path / "nowhere")
    (engine.directory / "model.onnx").write_bytes(b"x")
    with pytest.raises(DamagedFiles, match="has 1 bytes"):
        overview(engine.directory)


def test_the_command_line(engine, monkeypatch, capsys):
    sha = manifest_sha256(engine.directory)
    write(engine, "report.json", summary(sha, speedup={"speedup": 1.5, "verdict": "inconclusive"}))
    code, printed, _ = typed(monkeypatch, capsys, "inspect", "--engine", engine.directory)
    lines = {line.split("  ")[0].strip(): " ".join(line.split()) for line in printed.splitlines()}
    assert code == 0
    assert "tokens 36 → " in lines["plan"]
    assert lines["parity"] == "parity not checked"
    assert lines["self-test"] == "self-test none recorded"
    assert lines["speed-up"].startswith("speed-up 1.50 × dense at batch 8 (inconclusive) on")
    code, printed, _ = typed(monkeypatch, capsys, "inspect", "--engine", engine.directory, "--json")
    found = json.loads(printed)
    assert (code, found["parity"], found["manifest"]["schema"]) == (0, "not checked", "ztp.engine/2")
    assert found["speedups"] == [{"batch": 8, "times": 1.5, "verdict": "inconclusive"}]
