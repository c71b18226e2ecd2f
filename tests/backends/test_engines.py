"""Engines of every back end: build, open, run, refuse; one set of tests over the registry."""

from __future__ import annotations

import json
import shutil
import sys
import threading
import time
import warnings
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import ztp_deploy as ztp
from tests import tiny
from tests.test_import_order import imported
from ztp_deploy import backends, environment, exporters
from ztp_deploy.errors import BadRequest, DamagedFiles, MissingSoftware, WriteFailed
from ztp_deploy.evidence.images import photograph_crops
from ztp_deploy.manifest import BatchRange, write_manifest


@pytest.fixture(params=sorted(name for name in backends.BACKENDS if "cpu" in backends.get(name).DEVICES))
def any_engine(request):
    fixtures = {"onnxruntime": "shared_engine"}
    return request.getfixturevalue(fixtures.get(request.param, f"{request.param}_engine"))


@pytest.mark.parametrize("batch", [1, 2, 3, 5, 8])
def test_engines_equal_eager_at_every_batch(any_engine, pruned, batch):
    images = tiny.images(batch, seed=batch)
    with torch.inference_mode():
        expected = pruned.run(torch.from_numpy(images))
    with ztp.load_engine(any_engine.directory) as session:
        logits = session.run(images)
        kept = session.kept()
    assert logits.dtype == np.float32
    np.testing.assert_allclose(logits, expected.logits.numpy(), rtol=1e-4, atol=1e-4)
    for ours, theirs in zip(kept, expected.kept, strict=True):
        assert ours.dtype == np.int32
        assert ours.tolist() == theirs.sort(1).values.tolist()


def test_an_engine_is_loaded_as_its_folder_is(shared_engine):
    with ztp.load_engine(shared_engine) as session:
        assert session.directory == shared_engine.directory
        assert session.manifest == shared_engine.manifest


def test_audit_scores_equal_eager(any_engine, pruned):
    images = tiny.images(3)
    with torch.inference_mode():
        scores = pruned.run(torch.from_numpy(images)).scores
    with ztp.load_engine(any_engine.directory) as session:
        audited = session.audit(images)
        np.testing.assert_allclose(audited["logits"], session.run(images), rtol=1e-4, atol=1e-4)
    for index, stage in enumerate(scores, start=1):
        for name, value in stage.items():
            np.testing.assert_allclose(audited[f"{name}_{index}"], value.numpy(), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    "images, message",
    [
        (tiny.images(9), "outside this engine's range 1 to 8"),
        (tiny.images(0), "holds at least one image"),
        (tiny.images(1).astype(np.float64), "float64"),
        (tiny.images(1).astype(np.uint8), "uint8"),
        (tiny.images(1, size=64), r"\[1, 3, 64, 64\]"),
        (tiny.images(1)[0], r"\[3, 96, 96\]"),
        (tiny.images(1).tolist(), "list"),
        (np.ma.array(tiny.images(1), mask=False), "got a masked one"),
        (torch.zeros(1, 3, 96, 96).to_sparse(), "takes dense tensors; got one of torch.sparse_coo"),
        (torch.zeros(9, 3, 96, 96), "outside this engine's range 1 to 8"),
        (torch.zeros(1, 3, 96, 96, dtype=torch.float64), "got float64"),
        (torch.zeros(1, 3, 96, 96, device="meta"), "takes tensors on cpu; got one on meta"),
        (np.full((1, 3, 96, 96), np.nan, np.float32), "27648 of the pixels are NaN"),
        (torch.full((2, 3, 96, 96), torch.inf), "55296 of the pixels are NaN or infinite"),
        (np.concatenate([tiny.images(1), np.full((1, 3, 96, 96), np.inf, np.float32)]), "NaN or infinite"),
    ],
)
def test_wrong_input_is_refused_with_the_reason(any_engine, images, message):
    with ztp.load_engine(any_engine.directory) as session, pytest.raises(BadRequest, match=message):
        session.run(images)


def test_arrays_and_tensors_in_any_state(any_engine):
    """What may not be written to, and what torch has only marked as negated."""
    images = tiny.images(2)
    locked = images.copy()
    locked.flags.writeable = False
    negated = torch._neg_view(torch.from_numpy(-images))
    assert negated.is_neg()
    with ztp.load_engine(any_engine.directory) as session, warnings.catch_warnings():
        warnings.simplefilter("error")
        expected = session.run(images)
        np.testing.assert_array_equal(session.run(locked), expected)
        np.testing.assert_array_equal(session.run(negated).numpy(), expected)


def test_tensors_come_back_as_tensors(any_engine):
    with ztp.load_engine(any_engine.directory) as session:
        for batch in (3, 1, 3):
            images = tiny.images(batch, seed=batch)
            expected, expected_kept = session.run(images), session.kept()
            logits = session.run(torch.from_numpy(images))
            assert (logits.dtype, logits.device.type) == (torch.float32, "cpu")
            np.testing.assert_array_equal(logits.numpy(), expected)
            assert all(np.array_equal(a, b) for a, b in zip(session.kept(), expected_kept, strict=True))
        turned = torch.from_numpy(images).permute(0, 1, 3, 2)  # not contiguous
        np.testing.assert_array_equal(session.run(turned).numpy(), session.run(turned.contiguous().numpy()))
        assert not np.array_equal(session.run(turned).numpy(), expected)
        np.testing.assert_array_equal(logits.numpy(), expected)  # it is the caller's: later runs leave it alone
    with pytest.raises(BadRequest, match="closed"):
        session.run(torch.from_numpy(images))


def test_large_but_finite_pixels_pass(any_engine):
    huge = np.full((1, 3, 96, 96), 1e38, np.float32)  # their sum overflows, they do not
    with ztp.load_engine(any_engine.directory) as session, warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)
        session.run(huge)


def test_kept_belongs_to_the_threads_own_run(any_engine):
    with ztp.load_engine(any_engine.directory) as session:
        with pytest.raises(BadRequest, match="Nothing was run"):
            session.kept()
        session.run(tiny.images(2))
        mine = session.kept()
        theirs = []

        def other() -> None:
            session.run(tiny.images(1, seed=9))
            theirs.extend(session.kept())

        thread = threading.Thread(target=other)
        thread.start()
        thread.join()
        assert [k.shape for k in theirs] == [(1, 25), (1, 17), (1, 11)]
        assert all(np.array_equal(a, b) for a, b in zip(session.kept(), mine, strict=True))


def test_preprocess_equals_timms_transform(any_engine, tmp_path):
    from timm.data import create_transform, resolve_data_config

    crops = list(photograph_crops(3).values())
    crops[0].save(tmp_path / "a.png")
    with ztp.load_engine(any_engine.directory) as session:
        ours = session.preprocess([tmp_path / "a.png", crops[1], crops[2].convert("L")])
        config = resolve_data_config({}, model=tiny.model())
        config["input_size"] = (3, 96, 96)
        transform = create_transform(**config, is_training=False)
        theirs = [transform(crop).numpy() for crop in (crops[0], crops[1], crops[2].convert("L").convert("RGB"))]
        assert np.array_equal(ours, np.stack(theirs))
        assert np.array_equal(session.preprocess(np.asarray(crops[1])), ours[1:2])
        with pytest.raises(BadRequest, match="No image"):
            session.preprocess([])
        for picture in (np.zeros((96, 96, 3), np.float32), np.zeros((2, 96, 96, 3), np.uint8), np.zeros(3, np.uint8)):
            with pytest.raises(BadRequest, match=r"is not a picture\. Give uint8 arrays \[H, W, 3\] in RGB"):
                session.preprocess(picture)
        with pytest.raises(BadRequest, match="is a folder, not a file"):
            session.preprocess(tmp_path)


def test_a_closed_session_says_so(any_engine):
    session = ztp.load_engine(any_engine.directory)
    session.run(tiny.images(1))
    kept = session.kept()
    session.close()
    session.close()
    for images in (tiny.images(1), torch.from_numpy(tiny.images(1))):
        with pytest.raises(BadRequest, match="closed"):
            session.run(images)
    with pytest.raises(BadRequest, match="closed"):
        session.audit(tiny.images(1))
    assert all(np.array_equal(now, before) for now, before in zip(session.kept(), kept, strict=True))


def test_no_file_is_opened_that_the_manifest_does_not_list(any_engine, tmp_path):
    """It lies there all the same, and was never verified."""
    for name in {"model.onnx", "model.ts", "model.pt2", "model.xml", "model.bin"} & set(any_engine.manifest.files):
        folder = tmp_path / name
        shutil.copytree(any_engine.directory, folder)
        files = {file: record for file, record in any_engine.manifest.files.items() if file != name}
        write_manifest(any_engine.manifest.model_copy(update={"files": files}), folder)
        with pytest.raises(DamagedFiles, match=rf"does not list {name}, which {any_engine.manifest.backend} engines"):
            ztp.load_engine(folder)


def test_an_engine_is_found_again_and_rebuilt_for_other_settings(artifact, tmp_path):
    first = ztp.build(artifact, "onnxruntime", device="cpu", directory=tmp_path / "e")
    written = (tmp_path / "e" / "manifest.json").stat().st_mtime_ns
    assert ztp.build(artifact, "onnxruntime", device="cpu", directory=tmp_path / "e").manifest == first.manifest
    assert (tmp_path / "e" / "manifest.json").stat().st_mtime_ns == written
    other = ztp.build(artifact, "onnxruntime", device="cpu", directory=tmp_path / "e", settings={"threads": 1})
    assert other.manifest.settings["threads"] == 1


def test_another_tool_builds_anew_and_a_missing_one_does_not(artifact, tmp_path, monkeypatch):
    module, here = backends.get("onnxruntime"), {"quantiser": "1.0"}
    monkeypatch.setattr(module, "tools", lambda precision, settings: dict(here))

    def build():
        return ztp.build(artifact, "onnxruntime", device="cpu", directory=tmp_path / "e").manifest

    first = build()
    assert first.built["tools"] == {"quantiser": "1.0"}
    here.clear()
    assert build() == first
    here["quantiser"] = "1.1"
    assert build().built["tools"] == {"quantiser": "1.1"}


def test_tools_that_make_an_engine_are_named(monkeypatch):
    """Each where it takes part, and none that is not here."""
    monkeypatch.setattr(environment, "installed", lambda package: f"{package} 1")
    openvino = backends.get("openvino")
    graph = {"stage": "graph"}
    assert openvino.tools("fp32", graph) == {}
    assert openvino.tools("int8", graph) == {"nncf": "nncf 1"}
    monkeypatch.setenv("CXX", "echo C++")
    assert openvino.tools("fp32", {"stage": "compiled"}) == {"c++": "C++ --version"}
    monkeypatch.setenv("CXX", "no-such-compiler")
    assert openvino.tools("fp32", {"stage": "compiled"}) == {}
    for name in ("tensorrt", "tensorrt_rtx"):
        assert backends.get(name).tools("fp16", {}) == {}
        assert backends.get(name).tools("int8", {}) == {"nvidia-modelopt": "nvidia-modelopt 1"}
    monkeypatch.setattr(environment, "installed", lambda package: None)
    assert openvino.tools("int8", graph) == backends.get("tensorrt").tools("fp8", {}) == {}


def test_other_code_and_another_processor_build_anew(artifact, tmp_path, monkeypatch):
    """Else an engine that this processor refuses would stand in the way of the one it can run."""
    module, fingerprints = backends.get("onnxruntime"), set()
    for sources, instructions in (("today", ["avx2"]), ("today", ["avx2", "amx"]), ("tomorrow", ["avx2"])):
        monkeypatch.setattr(backends, "sources_sha256", lambda *rooms, now=sources: now)
        monkeypatch.setattr(module, "instructions", lambda settings, now=instructions: now)
        engine = ztp.build(artifact, "onnxruntime", device="cpu", directory=tmp_path / "e")
        assert ztp.build(artifact, "onnxruntime", device="cpu", directory=tmp_path / "e").manifest == engine.manifest
        fingerprints.add(engine.manifest.fingerprint)
    assert len(fingerprints) == 3


SAY_NOTHING_OF_AN_ENGINE = {"errors", "quiet", "atomic", "manifest", "defaults", "preprocessing"}
"""How a build fails, what it prints, where it writes, what it is called, what its sessions make of pictures."""


def test_all_code_that_a_build_runs_decides_whether_an_engine_stands():
    package = Path(ztp.__file__).parent
    used = {module for path in (package / "backends").rglob("*.py") for module in imported(path, package)}
    rooms = {room.removesuffix(".py") for room in backends.SOURCES}
    assert {"methods.zero_tprune_op", "exporters.precision", "environment"} <= used
    assert {module.split(".")[0] for module in used} - rooms == SAY_NOTHING_OF_AN_ENGINE
    assert set(exporters.SOURCES) < set(backends.SOURCES)


def test_instructions_decide_where_the_build_looks_at_them(monkeypatch):
    monkeypatch.setattr(environment, "cpu_features", lambda: ["avx2", "amx_bf16"])
    monkeypatch.setattr(environment, "instruction_flags", lambda: {"fma", "avx2"})
    every = {name: backends.get(name) for name in backends.BACKENDS}
    asked = {name: module.instructions(module.Settings().model_dump()) for name, module in every.items()}
    assert {name: found for name, found in asked.items() if found} == {
        "openvino": ["amx_bf16"],
        "aotinductor": ["avx2", "fma"],
    }
    assert every["openvino"].instructions({"stage": "compiled"}) == ["avx2", "fma"]


def test_an_engine_is_built_from_the_path_of_an_artifact_as_from_the_artifact(artifact, shared_engine, tmp_path):
    folder = tmp_path / "artifact"
    shutil.copytree(artifact.directory, folder)
    for number, path in enumerate((folder, str(folder))):
        engine = ztp.build(path, "onnxruntime", device="cpu", batch=(1, 4, 8), directory=tmp_path / str(number))
        assert isinstance(engine, ztp.Engine)
        assert engine.manifest.fingerprint == shared_engine.manifest.fingerprint
        assert engine.manifest.artifact == "../artifact"
    with (folder / "model.onnx").open("ab") as graph:
        graph.write(b"more")
    with pytest.raises(ztp.DamagedFiles, match=r"model\.onnx"):
        ztp.build(folder, "onnxruntime", device="cpu", batch=(1, 4, 8), directory=tmp_path / "0")
    with pytest.raises(ztp.BadRequest, match=r"is not an artifact folder: it does not exist"):
        ztp.build(tmp_path / "none", "onnxruntime", device="cpu", directory=tmp_path / "2")
    assert not (tmp_path / "2").exists()


def test_an_engine_finds_its_artifact_through_links(artifact, tmp_path):
    """A folder of engines on another disk is often a link."""
    shutil.copytree(artifact.directory, tmp_path / "project" / "export" / "a")
    (tmp_path / "disk" / "deep" / "engines").mkdir(parents=True)
    (tmp_path / "project" / "engines").symlink_to(tmp_path / "disk" / "deep" / "engines")
    near = exporters.load_artifact(tmp_path / "project" / "export" / "a")
    folder = tmp_path / "project" / "engines" / "e"
    engine = ztp.build(near, "onnxruntime", device="cpu", directory=folder)
    assert (folder.resolve() / engine.manifest.artifact).resolve() == near.directory.resolve()


def test_first_audits_at_once_open_one_session(shared_engine, monkeypatch):
    with ztp.load_engine(shared_engine.directory) as session:
        genuine, opened = session._runner._open, []

        def slowly(*arguments, **options):
            opened.append(arguments)
            time.sleep(0.2)
            return genuine(*arguments, **options)

        monkeypatch.setattr(session._runner, "_open", slowly)
        with ThreadPoolExecutor(2) as pool:
            list(pool.map(session.audit, [tiny.images(1)] * 2))
    assert len(opened) == 1


def test_audits_leave_weights_in_their_file(pruned, shared_engine, tmp_path, monkeypatch):
    """Beyond protobuf's 2 GB, for which a limit of nothing stands in."""
    monkeypatch.setattr("ztp_deploy.exporters.onnx._PROTOBUF_LIMIT", 0)
    artifact = ztp.export(pruned, "onnx", tmp_path / "a")
    assert set(artifact.manifest.files) == {"model.onnx", "model.onnx.data"}
    engine = ztp.build(artifact, "onnxruntime", device="cpu", directory=tmp_path / "e")
    with ztp.load_engine(engine.directory) as large, ztp.load_engine(shared_engine.directory) as small:
        weights = (tmp_path / "e" / "model.onnx.data").stat().st_size
        assert len(large._runner._audited()) < len(small._runner._audited()) - 0.9 * weights
        found, expected = (session.audit(tiny.images(2)) for session in (large, small))
    assert set(found) == set(expected)
    for name, values in expected.items():
        np.testing.assert_array_equal(found[name], values)


def test_the_default_path_names_everything(artifact, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    engine = ztp.build(artifact, "onnxruntime", device="cpu", batch=(1, 4, 8))
    version = backends.get("onnxruntime").version()
    plan = artifact.manifest.plan.label
    assert plan.startswith("zero_tprune-0.7-")  # with a hash, for it has options of its own
    assert str(engine.directory) == f"engines/onnxruntime-{version}-cpu/deit_t--{plan}--fp32--b1-4-8--random"


@pytest.mark.parametrize(
    "arguments, error, message",
    [
        ({"backend": "onnx_runtime"}, BadRequest, "onnxruntime"),
        ({"backend": "torchscript"}, BadRequest, "built from torchscript; the artifact is onnx"),
        ({"backend": "tensorrt_rtx", "precision": "fp16"}, BadRequest, "the artifact holds fp32"),
        ({"backend": "onnxruntime", "precision": "fp8"}, BadRequest, "builds fp32, fp16, bf16; precision='fp8'"),
        ({"backend": "torchscript", "precision": "bf16"}, BadRequest, "builds fp32; precision='bf16'"),
        ({"backend": "openvino", "precision": "int8"}, BadRequest, "calibrated on images and none were given"),
        ({"backend": "openvino", "settings": {"hint": "fast"}}, BadRequest, "hint"),
        ({"backend": "onnxruntime", "batch": "8:1:4"}, BadRequest, "not a range"),
        ({"backend": "onnxruntime", "settings": ["threads"]}, BadRequest, "are not settings"),
        ({"backend": "onnxruntime", "directory": "x" * 300}, WriteFailed, "File name too long"),
        ({"backend": "onnxruntime", "device": "tpu"}, BadRequest, "auto, cpu or cuda"),
        ({"backend": "onnxruntime", "settings": {"thread": 1}}, BadRequest, "threads"),
        ({"backend": "onnxruntime", "settings": {"threads": -1}}, BadRequest, "threads"),
    ],
)
def test_builds_that_cannot_be(artifact, tmp_path, arguments, error, message):
    with pytest.raises(error, match=message):
        ztp.build(artifact, **({"directory": tmp_path / "e"} | arguments))
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("backend", sorted(backends.BACKENDS))
def test_a_gpu_that_is_not_there_is_not_replaced(backend, monkeypatch):
    monkeypatch.setattr(environment, "gpus", lambda: ())
    module = backends.get(backend)
    if "cpu" in module.DEVICES:
        assert module.resolve_device("auto").name == "cpu"
    if backend == "tensorrt_rtx":  # builds without one, and says that it cannot run
        assert module.unrunnable(module.resolve_device("cuda").name) == "no NVIDIA GPU was found"
        return
    with pytest.raises(MissingSoftware, match="cuda") as refusal:
        module.resolve_device("cuda")
    assert "install onnxruntime" not in str(refusal.value)  # that brings no GPU


def test_a_torch_that_cannot_be_loaded_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "torch", None)
    status, reason = backends.here("torchscript")
    assert (status, reason.partition(": ")[0]) == ("missing", "PyTorch is installed but cannot be loaded")
    with pytest.raises(MissingSoftware, match=r"PyTorch is installed .* pip install --force-reinstall torch$"):
        backends.resolve("aotinductor")


def test_a_silent_fall_back_of_the_provider_is_an_error(shared_engine, monkeypatch):
    """ONNX Runtime opens a CPU session although CUDA was asked for; that must not pass."""
    from ztp_deploy.backends.onnxruntime import backend

    monkeypatch.setattr(environment, "gpus", lambda: (environment.Gpu("NVIDIA Test", "9.0", 1.0),))
    monkeypatch.setattr("onnxruntime.preload_dlls", lambda: None, raising=False)
    manifest = shared_engine.manifest.model_copy(update={"provider": backend.CUDA, "device": "cuda"})
    with warnings.catch_warnings(), pytest.raises(MissingSoftware, match="fell back to CPUExecutionProvider"):
        warnings.simplefilter("ignore")  # ONNX Runtime's own remark on the provider
        backend.open_runner(shared_engine.directory, manifest)


def test_a_damaged_engine_is_not_opened(any_engine, tmp_path):
    copy = tmp_path / "copy"
    shutil.copytree(any_engine.directory, copy)
    file = next(name for name in any_engine.manifest.files if name != "model.bin")
    (copy / file).write_bytes((copy / file).read_bytes()[: -len(file)])
    with pytest.raises(DamagedFiles, match="bytes, the manifest says"):
        ztp.load_engine(copy)
    tiny.reseal(copy)  # as if a builder had written half a file
    with pytest.raises(DamagedFiles, match="cannot open"):
        ztp.load_engine(copy)


@pytest.mark.parametrize(
    "calibration, message",
    [
        (tiny.images(0), "calibrated on images and none were given"),
        (np.full((2, 3, 96, 96), np.nan, np.float32), "55296 of the pixels are NaN"),
        (tiny.images(2).astype(np.uint8), "takes float32 arrays .* got uint8"),
        (tiny.images(2, size=64), r"\[B, 3, 96, 96\]; got \[2, 3, 64, 64\]"),
        (tiny.images(2).tolist(), "calibration=list is not an array"),
    ],
)
def test_what_cannot_calibrate_is_refused(artifact, tmp_path, calibration, message):
    with pytest.raises(BadRequest, match=message):
        ztp.build(artifact, "openvino", precision="int8", calibration=calibration, directory=tmp_path / "e")
    assert list(tmp_path.iterdir()) == []


def test_another_version_of_the_library_is_announced(any_engine, tmp_path):
    copy = tmp_path / "copy"
    shutil.copytree(any_engine.directory, copy)
    tiny.reseal(copy, backend_version="0.1")
    with pytest.warns(UserWarning, match="ztp selftest"):
        ztp.load_engine(copy).close()


def test_low_precision_without_kernels_for_it_is_refused(artifact, tmp_path):
    """ONNX Runtime would run an fp16 graph on a CPU in fp32, with casts all over."""
    half = exporters.convert(artifact, "fp16", tmp_path / "a")
    with pytest.raises(BadRequest, match="no fp16 kernels for the cpu"):
        ztp.build(half, "onnxruntime", precision="fp16", device="cpu", directory=tmp_path / "e")
    assert not (tmp_path / "e").exists()


def test_uint8_engines_take_pixels(pruned, tmp_path):
    artifact = ztp.export(pruned, "onnx", tmp_path / "a", input="uint8")
    engine = ztp.build(artifact, "onnxruntime", device="cpu", directory=tmp_path / "e")
    picture = Image.effect_noise((128, 128), 60).convert("RGB")
    with ztp.load_engine(engine.directory) as session:
        pixels = session.preprocess(picture)
        assert pixels.dtype == np.uint8
        logits = session.run(pixels)
        np.testing.assert_array_equal(session.run(torch.from_numpy(pixels)).numpy(), logits)
        with pytest.raises(BadRequest, match="uint8"):
            session.run(pixels.astype(np.float32))
    mean = np.array(pruned.source.preprocessing.mean, np.float32).reshape(1, 3, 1, 1)
    std = np.array(pruned.source.preprocessing.std, np.float32).reshape(1, 3, 1, 1)
    normalised = (pixels.astype(np.float32) / 255 - mean) / std
    with torch.inference_mode():
        expected = pruned(torch.from_numpy(normalised)).numpy()
    np.testing.assert_allclose(logits, expected, rtol=1e-4, atol=1e-4)


def test_batch_range_is_in_the_manifest(shared_engine):
    assert shared_engine.manifest.batch == BatchRange(min=1, opt=4, max=8)
    fields = json.loads((shared_engine.directory / "manifest.json").read_text())
    assert fields["schema"] == "ztp.engine/2"
    assert fields["provider"] == "CPUExecutionProvider"
    assert fields["files"]["model.onnx"]["sha256"]


def test_an_artifact_is_no_engine_nor_the_reverse(shared_engine, artifact):
    with pytest.raises(BadRequest, match=r"exported artifact, no engine\. Build one .*`ztp build --artifact .*/onnx`"):
        ztp.load_engine(artifact.directory)
    with pytest.raises(BadRequest, match="is an engine, no exported artifact"):
        ztp.build(shared_engine.directory, "onnxruntime")
    with pytest.raises(BadRequest, match="nowhere is not an engine folder: it does not exist"):
        ztp.load_engine("nowhere")


def test_what_is_no_artifact_engine_or_name_is_refused(pruned, artifact, tmp_path):
    for call, message in (
        (lambda: ztp.build(None, "onnxruntime"), "An artifact or the path of its folder is needed; got NoneType"),
        (lambda: ztp.build(pruned, "onnxruntime"), r"got PrunedModel\. Make one with ztp\.export"),
        (lambda: ztp.build(artifact, None), "no back end None.*There are: .*onnxruntime"),
        (lambda: ztp.load_engine(None), "An engine or the path of its folder is needed; got NoneType"),
        (lambda: ztp.load_engine(artifact), r"got Artifact\. Make one with ztp\.build"),
        (lambda: ztp.export(pruned, None, tmp_path / "a"), "no format None.*There are: onnx"),
        (lambda: ztp.export(pruned, "onnx", None), "directory=None is not a path"),
    ):
        with pytest.raises(BadRequest, match=message):
            call()
