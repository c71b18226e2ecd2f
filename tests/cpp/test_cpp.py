"""The C++ runtime against the Python one: the same results, the same refusals, the same exit codes."""

from __future__ import annotations

import itertools
import json
import os
import re
import shutil
import subprocess
import sys
import warnings
from pathlib import Path

import numpy as np
import openvino
import pytest
import torch
from PIL import Image
from safetensors.numpy import load_file, save_file

import ztp_deploy as ztp
from tests import tiny
from tests.cpp import toys
from tests.cpp.conftest import (
    FLAGS,
    HERE,
    ORT_HEADERS,
    SOURCE,
    STRICT,
    build_runtime,
    command,
    manifest_of,
    needs_onnxruntime,
    program,
    require_tools,
    reseal,
)
from ztp_deploy import environment
from ztp_deploy.errors import DamagedFiles, ZtpError
from ztp_deploy.evidence.images import photograph_crops
from ztp_deploy.evidence.selftest import SELFTEST_FILE, write_selftest
from ztp_deploy.manifest import manifest_sha256
from ztp_deploy.preprocessing import transform_for
from ztp_deploy.pruning.assignment import assign

pytestmark = pytest.mark.slow


def refusal(done):
    """What a process that printed one JSON refusal said, and its exit code."""
    error = json.loads(done.stdout)["error"]
    assert error["exit_code"] == done.returncode
    return error["problem"], done.returncode


def python_refusal(directory):
    with pytest.raises(ZtpError) as caught:
        ztp.load_engine(directory)
    return caught.value.problem, caught.value.exit_code


# --- results -----------------------------------------------------------------------------------


@pytest.mark.parametrize("batch", [1, 3, 8])
def test_results_equal_pythons(runtime, engine, pruned, tmp_path, batch):
    images = tiny.images(batch, seed=batch)
    check_outputs(runtime.outputs(engine, images, tmp_path), pruned, images)


def check_outputs(found, pruned, images):
    """Against eager PyTorch: logits closely, tokens to the last."""
    with torch.inference_mode():
        logits = pruned(torch.from_numpy(images)).numpy()
    traced = ztp.trace_tokens(pruned, torch.from_numpy(images))
    np.testing.assert_allclose(found.logits, logits, rtol=1e-4, atol=1e-4)
    assert [kept.tolist() for kept in found.kept] == [stage.kept.tolist() for stage in traced]
    assert [carried.tolist() for carried in found.assignment] == [stage.assignment.tolist() for stage in traced]


TOKENS = {
    "tome": ({}, "some patches share a token, none is dropped"),
    "diffrate": ({}, "some patches share a token, some are dropped"),
    "evit": ({"fuse": True}, "a token is made anew"),
    "ats": ({"form": "masked"}, "slots are masked"),
}


@pytest.mark.parametrize("method", TOKENS)
def test_merged_and_masked_tokens_come_as_python_says_them(runtime, back_end, model, tmp_path, method):
    options, expected = TOKENS[method]
    plan = ztp.make_plan(model, method, keep=[27, 18], sites=[2, 3], options=options)
    artifact = ztp.export(ztp.prune(model, plan), "onnx", tmp_path / "artifact")
    engine = ztp.build(artifact, back_end, device="cpu", batch=(1, 4, 8), directory=tmp_path / "engine")
    images = tiny.images(3)
    with ztp.load_engine(engine.directory) as session:
        logits = session.run(images)
        kept, assignment = session.kept(), session.assignment()
    shares = all(len({*patches} - {-1}) < sum(slot >= 0 for slot in patches) for patches in assignment[0].tolist())
    seen = {
        "some patches share a token, none is dropped": shares and (assignment[-1] >= 0).all(),
        "some patches share a token, some are dropped": shares and (assignment[-1] < 0).any(),
        "a token is made anew": (kept[0] == 36).any(),
        "slots are masked": (kept[0] == -1).any(),
    }
    assert seen[expected]
    found = runtime.outputs(engine.directory, images, tmp_path)
    np.testing.assert_allclose(found.logits, logits, rtol=1e-4, atol=1e-4)
    assert [stage.tolist() for stage in found.kept] == [stage.tolist() for stage in kept]
    assert [stage.tolist() for stage in found.assignment] == [stage.tolist() for stage in assignment]
    write_selftest(engine.directory, images)
    assert runtime.run(engine.directory, "--selftest").returncode == 0


COUNTS = (36, 30, 21, 8)
"""Tokens of the manifest that toys are given, and of three stages."""


def told(seed, merges, batch=3):
    """Random tokens, by stage, as an engine might say them: in any order, some masked, made anew or dropped."""
    random = np.random.default_rng(seed)
    kept, merged = [], []
    for stage, (entering, leaving) in enumerate(itertools.pairwise(COUNTS)):
        positions = np.stack([random.permutation(COUNTS[0] + stage * merges)[:leaving] for _ in range(batch)])
        kept.append(np.where(random.random(positions.shape) < 0.1, -1, positions).astype(np.int32))
        if merges:
            merged.append(random.integers(-1, leaving, (batch, entering), dtype=np.int32))
    return kept, merged


@pytest.mark.parametrize("merges", [True, False])
@pytest.mark.parametrize("seed", range(3))
def test_assignment_is_pythons_whatever_an_engine_says(runtime, shared_engine, tmp_path, merges, seed):
    kept, merged = told(seed, merges)
    engine = toys.telling_toy(tmp_path / "toy", shared_engine.directory, kept, merged)
    images = np.zeros((3, 3, toys.SIZE, toys.SIZE), np.float32)
    found = runtime.outputs(engine, images, tmp_path)
    expected = assign(kept, merged, COUNTS[0])
    assert [stage.tolist() for stage in found.kept] == [np.sort(stage, axis=1).tolist() for stage in kept]
    assert [stage.tolist() for stage in found.assignment] == [stage.tolist() for stage in expected]
    # One patch that is dropped instead is seen.
    changed = (merged if merges else kept)[0][1]
    changed[np.argmax(changed >= 0)] = -1
    assert found.assignment[0].tolist() != assign(kept, merged, COUNTS[0])[0].tolist()


def no_such_slot(kept, merged):
    merged[1][2, 5] = COUNTS[2]
    # Whoever reaches that stage alive goes there.
    merged[0][2, :] = 5


def too_few_slots(kept, merged):
    merged[1] = merged[1][:, :5].copy()
    merged[0][:, 0] = 5


def no_such_patch(kept, merged):
    merged.clear()
    kept[1][2, 7] = 36


@pytest.mark.parametrize(
    "change, said",
    [
        (no_such_slot, "tokens merged into others that are not there"),
        (too_few_slots, "tokens merged into others that are not there"),
        (no_such_patch, "stage 2 kept position 36, of 36 patches"),
    ],
)
def test_tokens_that_cannot_be_are_refused_in_pythons_words(runtime, shared_engine, tmp_path, change, said):
    kept, merged = told(0, merges=change is not no_such_patch)
    change(kept, merged)
    engine = toys.telling_toy(tmp_path / "toy", shared_engine.directory, kept, merged)
    done = runtime.consume(engine, np.zeros((3, 3, toys.SIZE, toys.SIZE), np.float32), tmp_path)
    assert done.stderr.splitlines() == [
        f"The engine says that {said}.",
        f"It is broken: `ztp check --engine {engine}` shows where.",
    ]
    assert done.returncode == 1


def test_a_list_of_outputs_that_no_export_writes_is_refused(runtime, shared_engine, tmp_path):
    kept, merged = told(0, merges=True)
    engine = toys.telling_toy(tmp_path / "toy", shared_engine.directory, kept, merged[:2])
    done = runtime.consume(engine, np.zeros((3, 3, toys.SIZE, toys.SIZE), np.float32), tmp_path)
    assert "every stage should have one kept_, and one merged_ or none" in done.stderr
    assert done.returncode == 2


def test_uint8_engines_take_pixels(runtime, back_end, shared_engine, tmp_path):
    engine = toys.toy(back_end, tmp_path / "toy", shared_engine.directory, "uint8")
    pixels = np.random.default_rng(0).integers(0, 256, (3, 3, toys.SIZE, toys.SIZE), dtype=np.uint8)
    found = runtime.outputs(engine, pixels, tmp_path)
    expected_logits, expected_kept = toys.expected(pixels)
    np.testing.assert_allclose(found.logits, expected_logits, rtol=1e-5)
    assert found.kept[0].tolist() == expected_kept.tolist()
    done = runtime.consume(engine, pixels.astype(np.float32), tmp_path)
    assert done.stderr.startswith("This engine takes uint8 arrays [B, 3, 16, 16]; got float32.")
    assert done.returncode == 2
    Image.fromarray(pixels[0].transpose(1, 2, 0)).save(tmp_path / "a.png")
    (tmp_path / "raw").mkdir()
    pixels[0].tofile(tmp_path / "raw" / "a.u8")
    shown = [
        json.loads(runtime.run(engine, file, "--json").stdout)["images"][0]["top"]
        for file in (tmp_path / "a.png", tmp_path / "raw" / "a.u8")
    ]
    assert [len(top) for top in shown] == [3, 3]


def test_threads_get_their_own_results(runtime, engine, tmp_path):
    runtime.outputs(engine, tiny.images(4), tmp_path, threads=4)  # asserts that no run differed


# --- refusals ----------------------------------------------------------------------------------


def edit(directory, change):
    path = directory / "manifest.json"
    manifest = json.loads(path.read_text(encoding="utf-8"))
    change(manifest)
    path.write_text(json.dumps(manifest), encoding="utf-8")


def rename(directory, name):
    record = manifest_of(directory).files["model.onnx"].model_dump()
    manifest = manifest_of(directory)
    return reseal_files(directory, manifest, {name: record})


def reseal_files(directory, manifest, files):
    from ztp_deploy.manifest import FileRecord, write_manifest

    records = {name: FileRecord(**record) for name, record in files.items()}
    write_manifest(manifest.model_copy(update={"files": records}), directory)


DAMAGES = {
    "no folder": lambda folder: shutil.rmtree(folder),
    "no manifest": lambda folder: (folder / "manifest.json").unlink(),
    "an earlier schema": lambda folder: edit(folder, lambda manifest: manifest.update(schema="ztp.engine/1")),
    "an artifact": lambda folder: edit(folder, lambda manifest: manifest.update(schema="ztp.artifact/2")),
    "another schema": lambda folder: edit(folder, lambda manifest: manifest.update(schema="another")),
    "a key gone": lambda folder: edit(folder, lambda manifest: manifest.pop("precision")),
    "another batch range": lambda folder: edit(folder, lambda manifest: manifest["batch"].update(max=9)),
    "an empty batch": lambda folder: edit(folder, lambda manifest: manifest["batch"].update(min=0)),
    "no object": lambda folder: (folder / "manifest.json").write_text("[]"),
    "file gone": lambda folder: (folder / "model.onnx").unlink(),
    "file cut": lambda folder: (folder / "model.onnx").write_bytes((folder / "model.onnx").read_bytes()[:-7]),
    "byte changed": lambda folder: (folder / "model.onnx").write_bytes(
        (folder / "model.onnx").read_bytes()[:-1] + b"?"
    ),
    "outside": lambda folder: rename(folder, "../model.onnx"),
    "absolute": lambda folder: rename(folder, "/model.onnx"),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_damaged_folders_are_refused_in_pythons_words(runtime, damaged, damage):
    DAMAGES[damage](damaged)
    assert refusal(runtime.run(damaged, "--selftest", "--json")) == python_refusal(damaged)


@pytest.mark.parametrize(
    "changes, said",
    [
        ({"input": {"name": "images", "dtype": "float32", "size": 2**32}}, "input.size: Input should be less than or"),
        ({"batch": {"min": 1, "opt": 1, "max": 2**63}}, "batch.max: Input should be less than or equal to 65536."),
        ({"batch": {"min": 1, "opt": 9, "max": 8}}, "batch: Input should be min ≤ opt ≤ max."),
        ({"batch": {"min": 2, "opt": 1, "max": 8}}, "batch: Input should be min ≤ opt ≤ max."),
        ({"batch": {"min": -1, "opt": 1, "max": 8}}, "batch.min: Input should be greater than or equal to 1."),
    ],
)
def test_sizes_that_cannot_be_are_refused(runtime, damaged, changes, said):
    """With them, the bytes of an image were counted modulo 2^64, and files divided by nothing."""
    raw = damaged.parent / "a.f32"
    raw.write_bytes(bytes(64))
    reseal(damaged, **changes)
    problem, code = refusal(runtime.run(damaged, raw, "--json"))
    assert said in problem
    assert code == 2


def test_a_path_is_shown_as_python_shows_it_and_followed_as_the_system_does(runtime, shared_engine, tmp_path):
    (tmp_path / "far" / "away").mkdir(parents=True)
    (tmp_path / "link").symlink_to(tmp_path / "far" / "away")
    shutil.copytree(shared_engine.directory, tmp_path / "far" / "engine")
    reached = f"{tmp_path}/link/.././engine//"
    assert "carries no self-test" in refusal(runtime.run(reached, "--selftest", "--json"))[0]
    # What the text says, the link resolved by hand, is another folder.
    (tmp_path / "engine").mkdir()
    assert "is not an engine folder" in refusal(runtime.run(tmp_path / "engine", "--selftest", "--json"))[0]
    (tmp_path / "far" / "engine" / "model.onnx").unlink()
    assert refusal(runtime.run(reached, "--selftest", "--json")) == python_refusal(Path(reached))


def test_broken_json_is_refused(runtime, damaged):
    whole = (damaged / "manifest.json").read_bytes()
    (damaged / "manifest.json").write_bytes(b"\xef\xbb\xbf" + whole)
    problem, code = refusal(runtime.run(damaged, "--selftest", "--json"))
    assert "Invalid JSON" in problem
    assert code == python_refusal(damaged)[1]
    (damaged / "manifest.json").write_bytes(whole + b"\0more")
    problem, code = refusal(runtime.run(damaged, "--selftest", "--json"))
    assert problem.endswith(f": the file: Invalid JSON at byte {len(whole) + 1}.")
    assert code == python_refusal(damaged)[1]
    (damaged / "manifest.json").write_text('{"schema": ')
    problem, code = refusal(runtime.run(damaged, "--selftest", "--json"))
    theirs, their_code = python_refusal(damaged)
    same = f"{damaged}/manifest.json is not a valid engine manifest: the file: Invalid JSON"
    assert problem.startswith(same)
    assert theirs.startswith(same)
    assert code == their_code
    (damaged / "manifest.json").write_text('{"schema": 1e999}')
    assert refusal(runtime.run(damaged, "--selftest", "--json")) == (f"{same}: a number is too large.", 2)
    (damaged / "manifest.json").write_text("[" * 100000)
    assert "nested too deeply" in refusal(runtime.run(damaged, "--selftest", "--json"))[0]


@pytest.mark.parametrize(
    "images",
    [tiny.images(1)[:0], tiny.images(9), tiny.images(1).astype(np.uint8), np.full((1, 3, 96, 96), np.nan, np.float32)],
)
def test_wrong_input_is_refused_in_pythons_words(runtime, engine, tmp_path, images):
    with ztp.load_engine(engine) as session, pytest.raises(ZtpError) as caught:
        session.run(images)
    done = runtime.consume(engine, images, tmp_path)
    assert (done.stderr.splitlines()[0], done.returncode) == (caught.value.problem, caught.value.exit_code)
    if not len(images):
        assert done.stderr.splitlines() == ["A batch holds at least one image; got none.", "Give at least one."]


def test_a_folder_that_does_not_fit_into_memory_is_refused(runtime, damaged):
    """As everything is: the consumer catches the runtime's own errors alone."""
    os.truncate(damaged / "manifest.json", 1 << 40)
    limited = ["sh", "-c", 'ulimit -v 2000000 && exec "$@"', "sh"]
    done = command(*limited, runtime.consumer, damaged, "none.f32", 1)
    assert done.stderr.startswith(f"Reading failed on {damaged}: std::bad_alloc.")
    assert done.returncode == 2


@pytest.mark.parametrize("threads", [-1, 1025, 1.5, 2**32 + 1, 1e300, True, "4"])
def test_threads_that_cannot_be_are_refused(runtime, damaged, threads):
    """As one number of 32 bits they were others."""
    reseal(damaged, settings={"threads": threads})
    problem, code = refusal(runtime.run(damaged, "--selftest", "--json"))
    assert problem.endswith("settings.threads: Input should be a whole number from 0 to 1024.")
    assert code == 2


def test_large_but_finite_pixels_pass(runtime, engine, tmp_path):
    huge = np.full((1, 3, 96, 96), 1e38, np.float32)
    assert runtime.consume(engine, huge, tmp_path).returncode == 0


@pytest.mark.parametrize(
    "backend, code, message",
    [("torchscript", 2, "opens no torchscript engines"), ("aotinductor", 3, "this build of the runtime opens: ")],
)
def test_engines_of_other_back_ends_are_refused(runtime, damaged, backend, code, message):
    reseal(damaged, backend=backend)
    problem, found = refusal(runtime.run(damaged, "--selftest", "--json"))
    assert found == code
    assert message in problem


def test_a_file_nobody_vouched_for_is_not_opened(runtime, openvino_engine, tmp_path):
    engine = tmp_path / "engine"
    shutil.copytree(openvino_engine, engine)
    (engine / "model.bin").rename(tmp_path / "model.bin")
    reseal(engine)
    (tmp_path / "model.bin").rename(engine / "model.bin")
    problem, code = refusal(runtime.run(engine, "--selftest", "--json"))
    assert "does not list model.bin" in problem
    assert code == 2


def test_compiled_stages_run_and_are_refused_in_pythons_words(runtime, artifact, tmp_path):
    engine = ztp.build(artifact, "openvino", settings={"stage": "compiled"}, directory=tmp_path / "engine")
    images = tiny.images(2)
    with ztp.load_engine(engine.directory) as session:
        logits, kept = session.run(images), session.kept()
    found = runtime.outputs(engine.directory, images, tmp_path)
    np.testing.assert_allclose(found.logits, logits, rtol=1e-5, atol=1e-5)
    assert [stage.tolist() for stage in found.kept] == [stage.tolist() for stage in kept]
    write_selftest(engine.directory, images)
    assert runtime.run(engine.directory, "--selftest").returncode == 0
    built = engine.manifest.built
    reseal(engine.directory, built=built | {"cpu_flags": [*built["cpu_flags"], "avx4096"]})
    found = refusal(runtime.run(engine.directory, "--selftest", "--json"))
    assert found == python_refusal(engine.directory)
    assert found == ("This engine was compiled for a CPU with avx4096, which this one lacks.", 3)
    other = Path(shutil.copytree(engine.directory, tmp_path / "other"))  # where this process has nothing open
    (other / "stage.so").write_bytes(b"none")
    reseal(other, built=built)
    found = refusal(runtime.run(other, "--selftest", "--json"))
    assert found == python_refusal(other)
    assert "were compiled for OpenVINO" in found[0]


def test_stages_that_clang_compiled_run(runtime, artifact, pruned, tmp_path, monkeypatch):
    if shutil.which("clang++") is None:
        pytest.skip("clang++ is not installed: apt-get install clang")
    monkeypatch.setenv("CXX", "clang++")
    engine = ztp.build(artifact, "openvino", settings={"stage": "compiled"}, directory=tmp_path / "engine")
    images = tiny.images(2)
    check_outputs(runtime.outputs(engine.directory, images, tmp_path), pruned, images)


@pytest.mark.parametrize(
    "changes", [{"precision": "bf16"}, {"precision": "int8", "settings": {"float_precision": "bf16"}}]
)
def test_a_precision_the_processor_lacks_is_refused_in_pythons_words_but_for_its_name(
    runtime, shared_engine, tmp_path, monkeypatch, changes
):
    """OpenVINO itself would fall back to fp32 without a word."""
    engine = toys.openvino_toy(tmp_path / "toy", shared_engine.directory)
    reseal(engine, **changes)
    lesser = []
    if "BF16" in openvino.Core().get_property("CPU", "OPTIMIZATION_CAPABILITIES"):
        if shutil.which("valgrind") is None:
            pytest.skip("this processor has bf16, and no valgrind takes it away: apt-get install valgrind")
        assert runtime.consume(engine, np.zeros((1, 3, 16, 16), np.float32), tmp_path).returncode == 0
        lesser = ["valgrind", "--quiet", "--tool=none"]
    problem, code = refusal(command(*lesser, runtime.build / "run" / "ztp-run", engine, "--selftest", "--json"))
    listed = problem.removesuffix(").").rpartition("OpenVINO lists ")[2].split(", ")
    assert "FP32" in listed
    monkeypatch.setattr(openvino.Core, "get_property", lambda *_: listed)
    theirs, their_code = python_refusal(engine)
    assert (problem, code) == (theirs.replace(f" ({environment.cpu_name()})", ""), their_code)
    assert problem.startswith("bf16 was asked for, and this processor has no instructions for it ")
    assert code == 3


def test_a_gpus_engine_is_refused_in_pythons_words_where_there_is_none(runtime, damaged, monkeypatch):
    needs_onnxruntime(runtime)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")  # the driver of a machine that has one then finds none
    monkeypatch.setattr(environment, "gpus", lambda: ())
    reseal(damaged, device="cuda", provider="CUDAExecutionProvider")
    found = refusal(runtime.run(damaged, "--selftest", "--json"))
    assert found == python_refusal(damaged)
    assert found == (f"{damaged} runs on cuda, but no NVIDIA GPU was found.", 3)


def test_what_a_library_throws_comes_as_the_runtimes_own_error(runtime, shared_engine, tmp_path):
    """The consumer catches no other: it would be ended by the system."""
    engine = toys.openvino_toy(tmp_path / "toy", shared_engine.directory)
    reseal(engine, input={"name": "images", "dtype": "float32", "size": 2 * toys.SIZE})
    done = runtime.consume(engine, np.zeros((1, 3, 2 * toys.SIZE, 2 * toys.SIZE), np.float32), tmp_path)
    assert done.stderr.startswith(f"openvino failed on {engine}: ")
    assert "Exception from" not in done.stderr
    assert done.returncode == 2


def test_a_half_written_graph_is_named(runtime, openvino_engine, tmp_path):
    engine = tmp_path / "engine"
    shutil.copytree(openvino_engine, engine)
    (engine / "model.xml").write_bytes((engine / "model.xml").read_bytes()[:1000])
    reseal(engine)
    problem, code = refusal(runtime.run(engine, "--selftest", "--json"))
    with pytest.raises(DamagedFiles) as told:
        ztp.load_engine(engine)
    assert problem == told.value.problem
    assert problem.startswith(f"OpenVINO cannot open {engine}/model.xml: ")
    assert code == 2
    shutil.copy(openvino_engine / "model.xml", engine / "model.xml")
    reseal(engine, provider="TPU")
    problem, code = refusal(runtime.run(engine, "--selftest", "--json"))
    assert "device TPU, which was not found" in problem
    assert code == 3


def test_what_onnxruntime_cannot_open_is_named(runtime, shared_engine, tmp_path):
    needs_onnxruntime(runtime)
    copy = Path(shutil.copytree(shared_engine.directory, tmp_path / "copy"))
    (copy / "model.onnx").write_bytes((copy / "model.onnx").read_bytes()[:1000])
    reseal(copy)
    problem, code = refusal(runtime.run(copy, "--selftest", "--json"))
    assert problem.startswith(f"ONNX Runtime cannot open {copy}/model.onnx: ")
    assert code == 2
    shutil.copy(shared_engine.directory / "model.onnx", copy / "model.onnx")
    reseal(copy, provider="NPUExecutionProvider")
    problem, code = refusal(runtime.run(copy, "--selftest", "--json"))
    assert problem.startswith("This engine was built for ONNX Runtime's NPUExecutionProvider; the C++ runtime uses ")
    assert code == 2
    if not torch.cuda.is_available():
        reseal(copy, provider="CUDAExecutionProvider")
        problem, code = refusal(runtime.run(copy, "--selftest", "--json"))
        assert problem.startswith("This engine was built for a GPU, and ONNX Runtime cannot use one here: ")
        assert code == 3


@pytest.mark.parametrize(
    "change",
    [
        lambda text: text + "\n",
        lambda text: text.replace("\n", "\r\n", 1),
        lambda text: text.replace('"seal": "', '"seal":"'),
        lambda text: re.sub('("seal": ").*?"', r'\1"', text),
        lambda text: re.sub('("seal": ".*?",)', r"\1 \1", text),
        lambda text: text.replace('"provider": "', '"seal": "", "provider": "', 1),
    ],
    ids=["a line", "a line's end", "a blank less", "an empty seal", "the seal twice", "two seals"],
)
def test_a_changed_byte_of_the_manifest_is_found_in_pythons_words(runtime, damaged, change):
    path = damaged / "manifest.json"
    path.write_text(change(whole := path.read_text(encoding="utf-8")), encoding="utf-8", newline="")
    assert path.read_text(encoding="utf-8") != whole or path.read_bytes() != whole.encode()
    found = refusal(runtime.run(damaged, "--selftest", "--json"))
    assert found == python_refusal(damaged)
    assert found == (f"{path} was edited after it was written: its seal does not match.", 2)


def test_keys_that_are_not_known_are_sealed_and_otherwise_left_alone(runtime, damaged):
    reseal(damaged, later={"é\U0001f600": 'tab\t quote" back\\ del\x7f \u2028', "seal": "", "number": 1e-05})
    assert "carries no self-test" in refusal(runtime.run(damaged, "--selftest", "--json"))[0]
    edit(damaged, lambda manifest: manifest["later"].update(number=2))
    assert "was edited after it was written" in refusal(runtime.run(damaged, "--selftest", "--json"))[0]


# --- warnings ----------------------------------------------------------------------------------


def python_notes(directory):
    """What Python warns of when it opens an engine."""
    with warnings.catch_warnings(record=True) as found:
        warnings.simplefilter("always")
        ztp.load_engine(directory).close()
    return [str(entry.message) for entry in found]


def notes(runtime, directory):
    """What ztp-run notes of an engine, in whose JSON nothing of it shows."""
    done = runtime.run(directory, "--selftest", "--json")
    assert "carries no self-test" in refusal(done)[0]
    lines = done.stderr.splitlines()
    assert all(line.startswith("note: ") for line in lines)
    return [line.removeprefix("note: ") for line in lines]


@pytest.mark.parametrize("name", ["engine", "the cook's own"])
def test_a_library_of_another_version_is_told_in_pythons_words(runtime, engine, tmp_path, name):
    copy = Path(shutil.copytree(engine, tmp_path / name))
    assert notes(runtime, copy) == python_notes(copy) == []
    here = manifest_of(copy).backend_version
    reseal(copy, backend_version="1.2.3")
    [said] = notes(runtime, copy)
    assert said == python_notes(copy)[0]
    assert f"built and checked with {manifest_of(copy).backend} 1.2.3; this is {here}. Run `ztp selftest" in said
    # Of a wheel's suffix a C library knows nothing: here Python says more.
    for suffix in (".post1", "+cu132", ".dev20261128"):
        reseal(copy, backend_version=here + suffix)
        assert notes(runtime, copy) == []
    for other in (f"{here}.1", f"{here}1", here[:-2], "none", ""):
        reseal(copy, backend_version=other)
        assert notes(runtime, copy) == python_notes(copy) != []


FAULT = {"kind": "weights"}
EDGES = [
    {"reference": "eager", "candidate": "exported", "faults": []},
    {"reference": "exported", "candidate": "engine", "faults": [FAULT]},
    {"reference": "eager", "candidate": "engine", "faults": [FAULT, FAULT]},
]
FAILED = {"passed": False, "edges": EDGES, "notes": ["σ"], "worst": "NaN"}

# What a report holds besides the manifest's hash, or its bytes as a function of a failed one's; whether it warns. What is
# no verdict Python takes for one that failed where it is false.
REPORTS = {
    "failed": (FAILED, True),
    "failed nowhere": (FAILED | {"edges": []}, True),
    "passed": (FAILED | {"passed": True}, False),
    "passed, of a kind": (FAILED | {"passed": "yes"}, False),
    "failed, of a kind": (FAILED | {"passed": None}, False),
    "zero": (FAILED | {"passed": 0}, False),
    "of another manifest": (FAILED | {"manifest_sha256": "0" * 64}, False),
    "no verdict": ({"edges": EDGES}, False),
    "no edges": ({"passed": False}, False),
    "edges of another kind": (FAILED | {"edges": 3}, False),
    "an edge of another kind": (FAILED | {"edges": ["eager"]}, False),
    "an edge of nobody": (FAILED | {"edges": [EDGES[1], {"faults": [FAULT]}]}, False),
    "an edge without a verdict": (FAILED | {"edges": [{"reference": "a", "candidate": "b"}]}, False),
    "a list": (lambda whole: b"[]", False),
    "nothing": (lambda whole: b"", False),
    "cut off": (lambda whole: whole[:-9], False),
    "more": (lambda whole: whole + b"\0", False),
    "another encoding": (lambda whole: whole.replace("σ".encode(), b"\xff"), False),
    "nested too deeply": (lambda whole: b"[" * 100000, False),
}


def write_report(engine, entries):
    """A parity report of this very engine, of which nothing is checked but its verdict."""
    path = engine / "evidence" / "parity.json"
    path.parent.mkdir(exist_ok=True)
    report = {"manifest_sha256": manifest_sha256(engine)} | entries
    path.write_text(json.dumps(report, indent=2, ensure_ascii=False), encoding="utf-8")
    return path


@pytest.mark.parametrize("report", REPORTS)
def test_an_engine_that_failed_its_parity_check_is_told_in_pythons_words(runtime, damaged, report):
    content, warns = REPORTS[report]
    path = write_report(damaged, FAILED if callable(content) else content)
    if callable(content):
        path.write_bytes(content(path.read_bytes()))
    found = notes(runtime, damaged)
    assert len(found) == warns
    if report != "nested too deeply":  # where Python's parser gives up
        assert found == python_notes(damaged)
    if report == "failed":
        said = (
            f"{damaged} (fp32) failed its last parity check between exported and engine: do not rely on its answers. "
        )
        assert found == [f"{said}Run `ztp check --engine {damaged}`, and build it again."]


def test_evidence_that_is_no_file_is_no_evidence(runtime, damaged):
    (damaged / "evidence" / "parity.json").mkdir(parents=True)
    assert notes(runtime, damaged) == python_notes(damaged) == []


@pytest.fixture(scope="session")
def embedded(runtime, tmp_path_factory):
    """A program with a log of its own, see its first lines."""
    return program(runtime, HERE / "embedded.cpp", tmp_path_factory.mktemp("embedded") / "embedded")


def test_a_program_asks_what_it_is_warned_of(embedded, shared_engine, tmp_path):
    engine = toys.openvino_toy(tmp_path / "toy", shared_engine.directory)
    np.zeros((1, 3, toys.SIZE, toys.SIZE), np.float32).tofile(tmp_path / "one.f32")
    assert command(embedded, engine, tmp_path / "one.f32", 1, 1).stdout.splitlines() == ["ran: 1"] * 3
    reseal(engine, backend_version="1.2.3")
    write_report(engine, FAILED)
    expected = python_notes(engine)  # before it has a setting that Python's OpenVINO does not know
    reseal(engine, settings={"cuda_graph": True})
    write_report(engine, FAILED)
    done = command(embedded, engine, tmp_path / "one.f32", 1, 1)
    version, parity, graph, *ran = done.stdout.splitlines()
    assert [version, parity] == [f"{kind}: {said}" for kind, said in zip(("version", "parity"), expected, strict=True)]
    assert graph == (
        f"cuda_graph: {engine} was built with cuda_graph; this runtime launches kernel by kernel, with the same results. "
        "Serve it from Python where that time counts."
    )
    assert ran == ["ran: 1"] * 3
    assert done.stderr == ""


def test_what_a_library_logs_goes_where_the_program_says(runtime, embedded, shared_engine, tmp_path):
    """And a run that failed makes room for the next: one is allowed at once."""
    needs_onnxruntime(runtime)
    engine = toys.brittle_toy(tmp_path / "toy", shared_engine.directory)
    np.full((1, 3, toys.SIZE, toys.SIZE), 9, np.float32).tofile(tmp_path / "nine.f32")
    done = command(embedded, engine, tmp_path / "nine.f32", 1, 1)
    logged, refused = done.stdout.splitlines()[::2], done.stdout.splitlines()[1::2]
    assert len(logged) == len(refused) == 3
    assert all(line.startswith("error: ONNX Runtime: Non-zero status code returned") for line in logged)
    assert all(line.startswith("refused: ONNX Runtime failed: Non-zero status code returned") for line in refused)
    # The fourth run came when the log was taken away again.
    assert done.stderr.startswith("ONNX Runtime: Non-zero status code returned")
    assert done.stderr.count("ONNX Runtime: ") == 1
    np.full((1, 3, toys.SIZE, toys.SIZE), 8, np.float32).tofile(tmp_path / "eight.f32")
    done = command(embedded, engine, tmp_path / "eight.f32", 1, 1)
    assert (done.stdout, done.stderr) == ("ran: 1\n" * 3, "")


@pytest.mark.parametrize("limit", [1, 2, 0])
def test_threads_beyond_the_limit_wait(embedded, back_end, shared_engine, tmp_path, limit):
    engine = toys.toy(back_end, tmp_path / "toy", shared_engine.directory)
    np.random.default_rng(0).standard_normal((2, 3, toys.SIZE, toys.SIZE), dtype=np.float32).tofile(tmp_path / "a.f32")
    done = command(embedded, engine, tmp_path / "a.f32", 2, limit, 8)
    assert done.stdout.splitlines() == ["ran: 2"] * 3 + ["different: 0"], done.stderr


@pytest.mark.parametrize("sanitizer", ["thread", "address,undefined"])
def test_turns(tmp_path, sanitizer):
    require_tools()
    options = [f"-I{SOURCE / 'src'}", f"-fsanitize={sanitizer}", "-fno-sanitize-recover=all", "-O1", "-g1", "-pthread"]
    built = command("g++", *STRICT, *options, HERE / "turns.cpp", "-o", tmp_path / "turns")
    assert built.returncode == 0, built.stderr
    done = command(tmp_path / "turns")
    assert done.returncode == 0, done.stderr
    assert done.stdout == "most: 3, then 3\norder: 0 1 2 3 9\n"


# --- self-test ---------------------------------------------------------------------------------


@pytest.fixture
def recorded(openvino_engine, shared_engine, damaged, tmp_path):
    """An OpenVINO engine with a self-test, as ONNX Runtime recorded it from the same graph."""
    engine = tmp_path / "recorded"
    shutil.copytree(openvino_engine, engine)
    record = load_file(write_selftest(damaged, tiny.images(2)))
    (engine / "evidence").mkdir()
    save_record(engine, record)
    return engine, record


def save_record(engine, tensors, **metadata):
    known = {"manifest_sha256": manifest_sha256(engine), "tolerance": "0.0001"}
    save_file(tensors, engine / "evidence" / SELFTEST_FILE, known | metadata)


def test_the_self_test_holds(runtime, recorded):
    engine, _ = recorded
    found = json.loads(runtime.run(engine, "--selftest", "--json").stdout)
    assert found["images"] == 2
    assert 0 <= found["worst_logit"] < 1e-4
    assert "Self-test holds: 2 images" in runtime.run(engine, "--selftest").stdout


def test_what_python_recorded_holds_where_it_was_recorded(runtime, engine, tmp_path):
    copy = Path(shutil.copytree(engine, tmp_path / "copy"))
    write_selftest(copy, tiny.images(2))
    assert json.loads(runtime.run(copy, "--selftest", "--json").stdout)["worst_logit"] < 1e-4


def doctored_logits(record):
    record["logits"][1, 3] += 2e-4 * record["logits"][1].std()


def doctored_tokens(record):
    free = set(range(36)) - set(record["kept_2"][1].tolist())
    record["kept_2"][1, 0] = min(free)


def doctored_merges(record):
    patch = np.argmax(record["assignment_2"][1] < 0)
    record["assignment_2"][1, patch] = 0


@pytest.mark.parametrize(
    "change, metadata, code, message",
    [
        (doctored_logits, {}, 1, "the same tokens are kept but logits differ by 0.0002 σ (at most 0.0001) on image 1"),
        (doctored_tokens, {}, 1, "stage 2 keeps other tokens on image 1"),
        (doctored_merges, {}, 1, "stage 2 carries patches in other tokens on image 1"),
        (None, {"manifest_sha256": "0" * 64}, 2, "belongs to another manifest"),
        (None, {"tolerance": "nan"}, 2, "gives no tolerance above zero"),
        (None, {"tolerance": "inf"}, 2, "gives no tolerance above zero"),
        (lambda record: record.pop("kept_3"), {}, 2, "holds no kept_3"),
        (lambda record: record.pop("assignment_1"), {}, 2, "holds no assignment_1"),
        (lambda record: record.update(images=tiny.images(2, size=64)), {}, 2, "images of another size"),
    ],
)
def test_a_doctored_self_test_fails(runtime, recorded, change, metadata, code, message):
    engine, record = recorded
    if change:
        change(record)
    save_record(engine, record, **metadata)
    problem, found = refusal(runtime.run(engine, "--selftest", "--json"))
    assert message in problem
    assert found == code
    with pytest.raises(ZtpError) as pythons, ztp.load_engine(engine) as session:
        ztp.repeat_selftest(session)
    assert (pythons.value.problem, pythons.value.exit_code) == (problem, code)


def test_the_self_test_reads_and_says_numbers_in_any_locale(runtime, recorded, tmp_path):
    engine, record = recorded
    abroad = program(runtime, HERE / "abroad.cpp", tmp_path / "abroad")
    assert command(abroad, engine).stdout == "2 images\n"
    doctored_logits(record)
    save_record(engine, record)
    assert "differ by 0.0002 σ (at most 0.0001) on image 1" in command(abroad, engine).stderr


def test_a_self_test_that_is_gone_or_cut(runtime, recorded):
    engine, _ = recorded
    path = engine / "evidence" / SELFTEST_FILE
    whole = path.read_bytes()
    for length in (3, 20, len(whole) - 1):
        path.write_bytes(whole[:length])
        assert refusal(runtime.run(engine, "--selftest", "--json")) == (f"{path} is not a whole safetensors file.", 2)
    path.unlink()
    assert "carries no self-test" in refusal(runtime.run(engine, "--selftest", "--json"))[0]


# --- ztp-run -----------------------------------------------------------------------------------


@pytest.fixture
def pictures(tmp_path):
    """Photographs wide, tall, square, tiny and grey, all without loss."""
    crops = list(photograph_crops(5).values())
    sizes = [(300, 200), (97, 211), (107, 107), (31, 40), (640, 480)]
    made = [crop.resize(size) for crop, size in zip(crops, sizes, strict=True)]
    made[3] = made[3].convert("L")
    paths = [tmp_path / f"{index}.png" for index in range(len(made))]
    for picture, path in zip(made, paths, strict=True):
        picture.save(path)
    return paths


@pytest.mark.parametrize("interpolation", ["bicubic", "bilinear", "lanczos"])
def test_pictures_are_prepared_as_timm_does(prepare, openvino_engine, shared_engine, pictures, tmp_path, interpolation):
    engine = tmp_path / "engine"
    shutil.copytree(openvino_engine, engine)
    source = json.loads((engine / "manifest.json").read_text())["source"]
    source["preprocessing"]["interpolation"] = interpolation
    reseal(engine, source=source)
    preprocessing = shared_engine.manifest.source.preprocessing.model_copy(update={"interpolation": interpolation})
    transform = transform_for(preprocessing, "uint8")
    expected = np.stack([transform(Image.open(path).convert("RGB")) for path in pictures]).astype(int)
    (tmp_path / "prepared").write_bytes(command_bytes(prepare, engine, *pictures))
    found = np.fromfile(tmp_path / "prepared", np.uint8).reshape(expected.shape).astype(int)
    assert np.abs(found - expected).max() <= 1
    assert (found == expected).mean() > 0.999
    other = {"bicubic": "bilinear", "bilinear": "lanczos", "lanczos": "bicubic"}[interpolation]
    transform = transform_for(preprocessing.model_copy(update={"interpolation": other}), "uint8")
    unlike = np.stack([transform(Image.open(path).convert("RGB")) for path in pictures]).astype(int)
    assert np.abs(found - unlike).max() > 5


def pnm(channels, largest, pixels, comment=""):
    """A Netpbm file of 8 rows, 6 pixels wide."""
    return f"P{'?5?6'[channels]}\n{comment}6 8\n{largest}\n".encode() + pixels


GREY = bytes(range(48))
COLOUR = bytes(range(144))


@pytest.mark.parametrize(
    "file", [pnm(1, 255, GREY), pnm(3, 255, COLOUR, "# a comment of 3 words\n"), pnm(3, 255, COLOUR + b"more")]
)
def test_pnm_is_read_as_pillow_reads_it(prepare, runtime, openvino_engine, shared_engine, tmp_path, file):
    (tmp_path / "a.pnm").write_bytes(file)
    with Image.open(tmp_path / "a.pnm") as picture:
        expected = transform_for(shared_engine.manifest.source.preprocessing, "uint8")(picture.convert("RGB"))
    found = np.frombuffer(command_bytes(prepare, openvino_engine, tmp_path / "a.pnm"), np.uint8)
    assert np.abs(found.reshape(expected.shape).astype(int) - np.asarray(expected).astype(int)).max() <= 1
    assert runtime.run(openvino_engine, tmp_path / "a.pnm").returncode == 0


@pytest.mark.parametrize(
    "file, said",
    [
        (pnm(1, 65535, GREY + GREY), "its largest value is 65535, where 255 is read"),
        (pnm(3, 15, COLOUR), "its largest value is 15, where 255 is read"),
        (pnm(1, 255, GREY[:-1]), "it is cut off"),
        (pnm(3, 255, COLOUR[:-1]), "it is cut off"),
        (b"P6\n0 8\n255\n", "it has no pixels"),
        (b"P6\n99999999999999999999 8\n255\n", "its header has a number above 16777216"),
        (b"P6\n16777216 16777216\n255\n" + COLOUR, "it is cut off"),
        (b"P6\n6 8\n255", "its header is damaged"),
        (b"P6\n6 # wide", "its header is damaged"),
        (b"P5\n-6 8\n255\n" + GREY, "its header is damaged"),
    ],
)
def test_pnm_of_another_depth_or_cut_off_is_refused(runtime, openvino_engine, tmp_path, file, said):
    path = tmp_path / "a.pnm"
    path.write_bytes(file)
    found = refusal(runtime.run(openvino_engine, path, "--json"))
    assert found == (f"{path} is not an image that ztp-run can read: {said}.", 2)


def test_a_picture_too_narrow_to_resize_is_refused(runtime, openvino_engine, tmp_path):
    path = tmp_path / "a.pgm"
    path.write_bytes(b"P5\n1 1000000\n255\n" + bytes(1000000))
    problem, code = refusal(runtime.run(openvino_engine, path, "--json"))
    assert problem == "A picture of 1 × 1000000 pixels would be resized to more than 268435456."
    assert code == 2


@pytest.mark.parametrize("kind", ["jpg", "progressive", "bmp", "png"])
def test_a_picture_that_is_cut_off_is_refused_as_python_does(
    runtime, openvino_engine, shared_engine, pictures, tmp_path, kind
):
    path = tmp_path / ("a.jpg" if kind == "progressive" else f"a.{kind}")
    with Image.open(pictures[0]) as picture:
        picture.save(path, **({"progressive": True} if kind == "progressive" else {}))
    whole = path.read_bytes()
    assert runtime.run(openvino_engine, path).returncode == 0
    with ztp.load_engine(shared_engine.directory) as session:
        for missing in (200, len(whole) // 2):
            path.write_bytes(whole[:-missing])
            problem, code = refusal(runtime.run(openvino_engine, path, "--json"))
            assert problem.startswith(f"{path} is not an image that ztp-run can read: ")
            assert code == 2
            with pytest.raises(ZtpError):
                session.preprocess([path])
    if kind in ("jpg", "progressive"):
        path.write_bytes(whole[:-2])  # the marker of the end alone
        assert refusal(runtime.run(openvino_engine, path, "--json"))[0].endswith(": it is cut off.")
    path.write_bytes(whole + b"more")
    assert runtime.run(openvino_engine, path).returncode == 0


def test_a_jpeg_with_more_codes_than_there_are_bytes_is_refused(runtime, openvino_engine, pictures, tmp_path):
    """Debian's stb writes them over the pointers that come after its table."""
    path = tmp_path / "a.jpg"
    with Image.open(pictures[0]) as picture:
        picture.save(path)
    whole = path.read_bytes()
    place = whole.index(b"\xff\xc4") + 5
    path.write_bytes(whole[:place] + bytes([255] * 16) + whole[place + 16 :])
    problem, code = refusal(runtime.run(openvino_engine, path, "--json"))
    assert problem == f"{path} is not an image that ztp-run can read: it has a Huffman table of more than 256 codes."
    assert code == 2


def command_bytes(*words):
    return subprocess.run([str(word) for word in words], capture_output=True, check=True).stdout


def test_classify_says_what_python_says(runtime, openvino_engine, shared_engine, pictures):
    with ztp.load_engine(shared_engine.directory) as session:
        logits = session.run(session.preprocess(pictures))
    probabilities = torch.from_numpy(logits).softmax(-1).numpy()
    found = json.loads(runtime.run(openvino_engine, *pictures, "--top", 3, "--json").stdout)
    assert found["random_weights"] is True
    assert [entry["image"] for entry in found["images"]] == [str(path) for path in pictures]
    for entry, row in zip(found["images"], probabilities, strict=True):
        assert [guess["class"] for guess in entry["top"]] == np.argsort(-row)[:3].tolist()
        np.testing.assert_allclose([g["probability"] for g in entry["top"]], np.sort(row)[::-1][:3], atol=1e-4)
    said = runtime.run(openvino_engine, pictures[0])
    assert f"{probabilities[0].max() * 100:.2f} %  class {probabilities[0].argmax()}" in said.stdout
    assert "random weights" in said.stderr


def test_labels_and_small_batches(runtime, openvino_engine, tmp_path):
    """A batch below the smallest is filled up; raw files may hold several images."""
    engine = tmp_path / "engine"
    shutil.copytree(openvino_engine, engine)
    source = json.loads((engine / "manifest.json").read_text())["source"]
    source |= {"labels": [f"clé {index}" for index in range(10)], "own": ["labels"]}
    reseal(engine, source=source, batch={"min": 4, "opt": 4, "max": 4})
    images = tiny.images(5)
    images.tofile(tmp_path / "five.f32")
    found = json.loads(runtime.run(engine, tmp_path / "five.f32", "--top", 1, "--json").stdout)["images"]
    logits = np.concatenate(
        [
            runtime.outputs(openvino_engine, part, tmp_path).logits
            for part in (images[:4], np.repeat(images[4:], 4, axis=0))
        ]
    )[:5]
    assert [entry["top"][0]["name"] for entry in found] == [f"clé {index}" for index in logits.argmax(1)]
    assert found[4]["image"] == f"{tmp_path / 'five.f32'}[4]"


def test_latency_is_measured(runtime, openvino_engine):
    found = json.loads(runtime.run(openvino_engine, "--latency", "--batch", 2, "--seconds", 0.05, "--json").stdout)
    assert found["batch"] == 2
    assert found["runs"] >= 5
    assert 0 < found["median_ms"] <= found["p90_ms"]
    assert found["images_per_second"] == pytest.approx(2000 / found["median_ms"])
    assert "batch 4: median" in runtime.run(openvino_engine, "--latency", "--seconds", 0.05).stdout


@pytest.mark.parametrize(
    "arguments, message",
    [
        ([], "No image was given."),
        (["--latency", "--selftest"], "exclude each other"),
        (["--batch", "2"], "No image was given."),
        (["--latency", "--batch", "0"], "--batch 0 is not a usable number."),
        (["--latency", "--batch", "9"], "A batch of 9 is outside this engine's range 1 to 8."),
        (["--latency", "--seconds", "soon"], "--seconds soon is not a usable number."),
        (["--tops", "3"], "There is no option --tops."),
        (["a.png", "--top"], "--top needs a value."),
        (["a.png", "--selftest"], "do not read"),
        (["no_such.png"], "There is no file no_such.png."),
        (["no_such.f32"], "There is no file no_such.f32."),
        ([__file__], "is not an image that ztp-run can read"),
    ],
)
def test_command_lines_that_cannot_be_meant(runtime, openvino_engine, arguments, message):
    problem, code = refusal(runtime.run(openvino_engine, *arguments, "--json"))
    assert message in problem
    assert code == 2


def test_a_folder_named_as_a_tensor_is_no_file(runtime, openvino_engine, tmp_path):
    (tmp_path / "a.f32").mkdir()
    found = refusal(runtime.run(openvino_engine, tmp_path / "a.f32", "--json"))
    assert found == (f"{tmp_path / 'a.f32'} is a folder, not a file.", 2)


def test_what_cannot_be_written_is_no_success(runtime, openvino_engine):
    with open("/dev/full", "w") as full:
        words = [str(runtime.build / "run" / "ztp-run"), str(openvino_engine), "--selftest", "--help"]
        done = subprocess.run(words, stdout=full, stderr=subprocess.PIPE, text=True, check=False)
    assert done.stderr == "error: What was found could not be written to the standard output. Check where it goes.\n"
    assert done.returncode == 2


def test_help_names_every_option(runtime):
    done = runtime.run("--help")
    assert done.returncode == 0
    for word in ("--top", "--latency", "--batch", "--seconds", "--selftest", "--json", ".f32"):
        assert word in done.stdout
    assert runtime.run().stderr.startswith("error: No engine was given. See `ztp-run --help`.")


# --- the build ---------------------------------------------------------------------------------


def test_the_public_header_needs_nothing(runtime, tmp_path):
    """One header, C++17, no engine library in it."""
    headers = [path for path in (runtime.prefix / "include").rglob("*") if path.is_file()]
    assert [path.relative_to(runtime.prefix / "include").as_posix() for path in headers] == ["ztp/session.h"]
    (tmp_path / "a.cpp").write_text("#include <ztp/session.h>\nint main() { return 0; }\n")
    done = command("g++", *STRICT, "-fsyntax-only", f"-I{runtime.prefix / 'include'}", "-H", tmp_path / "a.cpp")
    assert done.returncode == 0, done.stderr
    assert "nlohmann" not in done.stderr
    assert "openvino" not in done.stderr


def rootless(**variables):
    """The environment without any variable that names a library's folder, and with those given."""
    return {name: value for name, value in os.environ.items() if not name.endswith("_ROOT")} | variables


def onnxruntime_in(build, *options, **variables):
    """What a configuration of that folder, the first or a later one, takes for ONNX Runtime: header's folder, library."""
    off = [f"-DZTP_WITH_{name}=OFF" for name in ("OPENVINO", "AOTINDUCTOR", "TENSORRT", "TENSORRT_RTX")]
    words = ["cmake", "-G", "Ninja", "-S", SOURCE, "-B", build, *FLAGS, *off, "-DZTP_BUILD_RUN=OFF", *options]
    done = command(*words, env=rootless(**variables))
    assert done.returncode == 0, done.stderr
    assert "  onnxruntime: yes" in done.stdout
    written = (build / "build.ninja").read_text()
    [library] = {*re.findall(r'ZTP_ONNXRUNTIME_LIBRARY=\\"([^"\\]*)', written)}
    [header] = {path for path in re.findall(r"-(?:I|isystem )(\S+)", written) if "onnxruntime" in path}
    return Path(header), Path(library)


def test_onnxruntime_is_found_beside_python_and_where_a_later_configuration_says(tmp_path):
    """As `make cpp` configures it, without a word about ONNX Runtime, and as the last line of that says."""
    require_tools()
    if not ORT_HEADERS.is_dir():
        pytest.skip(f"{ORT_HEADERS} is not there: make setup puts it there")
    header, library = onnxruntime_in(tmp_path / "build")
    assert header.is_relative_to(ORT_HEADERS)
    assert library.parent.name == "capi"
    for root in ("onnxruntime-1", "onnxruntime-2"):
        (tmp_path / root / "include").mkdir(parents=True)
        (tmp_path / root / "include" / "onnxruntime_c_api.h").touch()
        (tmp_path / root / "lib").mkdir()
        (tmp_path / root / "lib" / "libonnxruntime.so.1").touch()
    one, two = tmp_path / "onnxruntime-1", tmp_path / "onnxruntime-2"
    found = onnxruntime_in(tmp_path / "build", ORT_ROOT=str(one))
    assert found == (one / "include", one / "lib" / "libonnxruntime.so.1")
    found = onnxruntime_in(tmp_path / "build", f"-DORT_ROOT={two}")
    assert found == (two / "include", two / "lib" / "libonnxruntime.so.1")
    found = onnxruntime_in(tmp_path / "build", "-DZTP_ONNXRUNTIME_LIBRARY=/opt/mine.so")
    assert found == (two / "include", Path("/opt/mine.so"))


def test_packages_are_found_by_a_relative_path_and_when_they_come_later(tmp_path):
    require_tools()
    empty = tmp_path / "python"
    empty.write_text("#!/bin/sh\nexit 1\n")
    empty.chmod(0o755)

    def configured(python, cwd):
        words = ["-S", SOURCE, "-B", tmp_path / "build", f"-DPython3_EXECUTABLE={python}", "-DZTP_BUILD_RUN=OFF"]
        done = command("cmake", "-G", "Ninja", *words, cwd=cwd, env=rootless())
        assert done.returncode == 0, done.stderr
        return re.search(r"openvino: (yes|no)", done.stdout)[1]

    assert configured(empty, tmp_path) == "no"
    python = Path(sys.executable)
    assert configured(python.relative_to(python.parents[2]), python.parents[2]) == "yes"


def test_a_back_end_that_is_asked_for_and_missing_stops_the_configuration(runtime, tmp_path):
    # CMake is told to look nowhere by itself, so that a TensorRT that is installed is not found either.
    blind = ["CMAKE_FIND_USE_CMAKE_SYSTEM_PATH", "CMAKE_FIND_USE_SYSTEM_ENVIRONMENT_PATH"]
    cached = (runtime.build / "CMakeCache.txt").read_text()
    needed = ("CMAKE_MAKE_PROGRAM", "CMAKE_CXX_COMPILER", "nlohmann_json_DIR")
    known = [re.search(rf"^{name}:\w+=.*$", cached, flags=re.MULTILINE)[0] for name in needed]
    options = ["-DZTP_WITH_TENSORRT=ON", f"-DTENSORRT_ROOT={tmp_path}", "-DZTP_WITH_OPENVINO=OFF"]
    options += [*(f"-D{entry}" for entry in known), *(f"-D{name}=OFF" for name in blind)]
    done = command("cmake", "-G", "Ninja", "-S", SOURCE, "-B", tmp_path / "build", *options, env=rootless())
    assert done.returncode != 0
    assert "ZTP_WITH_TENSORRT=ON was asked for, but there is no NvInfer.h" in " ".join(done.stderr.split())


def test_no_memory_error(runtime, shared_engine, tmp_path):
    if shutil.which("valgrind") is None:
        pytest.skip("valgrind is not installed: apt-get install valgrind")
    valgrind = ["valgrind", "--quiet", "--error-exitcode=9", f"--suppressions={HERE / 'valgrind.supp'}"]
    engine = toys.openvino_toy(tmp_path / "toy", shared_engine.directory)
    images = np.random.default_rng(0).standard_normal((2, 3, toys.SIZE, toys.SIZE), dtype=np.float32)
    images.tofile(tmp_path / "two.f32")
    logits, kept = toys.expected(images)
    (engine / "evidence").mkdir()
    [assignment] = assign([kept], [], COUNTS[0])
    save_record(engine, {"images": images, "logits": logits, "kept_1": kept, "assignment_1": assignment})
    done = command(*valgrind, runtime.build / "run" / "ztp-run", engine, "--selftest")
    assert done.returncode == 0, done.stderr
    # The check itself can fail.
    (tmp_path / "bad.cpp").write_text("int main() { int* p = new int[2]; int v = p[2]; delete[] p; return v == 7; }\n")
    assert command("g++", "-O0", tmp_path / "bad.cpp", "-o", tmp_path / "bad").returncode == 0
    assert command(*valgrind, tmp_path / "bad").returncode == 9


def test_aotinductor_with_a_static_runtime(aotinductor_engine, pruned, tmp_path):
    """The other way to build, and libtorch, whose presence would slow valgrind down in the shared one."""
    require_tools()
    options = ["-DBUILD_SHARED_LIBS=OFF", "-DZTP_BUILD_RUN=OFF", "-DZTP_WITH_AOTINDUCTOR=ON"]
    others = [f"-DZTP_WITH_{name}=OFF" for name in ("OPENVINO", "ONNXRUNTIME", "TENSORRT", "TENSORRT_RTX")]
    runtime = build_runtime(tmp_path, *options, *others)
    assert runtime.backends == ("aotinductor",)
    engine = Path(shutil.copytree(aotinductor_engine.directory, tmp_path / "engine"))
    images = tiny.images(5)
    check_outputs(runtime.outputs(engine, images, tmp_path, threads=4), pruned, images)
    assert json.loads(runtime.consume(engine, images, tmp_path).stdout)["warnings"] == 0
    here = manifest_of(engine).backend_version
    reseal(engine, backend_version="2.0.0")
    assert json.loads(runtime.consume(engine, images, tmp_path).stdout)["warnings"] == 1
    reseal(engine, backend_version=here)
    built = json.loads((engine / "manifest.json").read_text())["built"]
    reseal(engine, built=built | {"cpu_flags": [*built["cpu_flags"], "avx4096"]})
    done = runtime.consume(engine, images, tmp_path)
    assert done.stderr.startswith("This engine was compiled for a CPU with avx4096, which this one lacks.")
    assert done.returncode == 3
    reseal(engine, built=built)
    (engine / "model.pt2").write_bytes((engine / "model.pt2").read_bytes()[:-999])
    reseal(engine)
    done = runtime.consume(engine, images, tmp_path)
    assert done.stderr.startswith(f"torch cannot open {engine}/model.pt2: ")
    assert done.returncode == 2
    reseal(engine, provider="cuda:0")
    if not torch.cuda.is_available():
        assert runtime.consume(engine, images, tmp_path).returncode == 3
