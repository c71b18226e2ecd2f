"""Manifests and atomic folders."""

from __future__ import annotations

import hashlib
import json
import re

import numpy as np
import pytest

from ztp_deploy import backends
from ztp_deploy import manifest as mf
from ztp_deploy.errors import BadRequest, DamagedFiles
from ztp_deploy.manifest import ArtifactManifest, BatchRange, EngineManifest, read_manifest


def edit(directory, change):
    path = directory / "manifest.json"
    fields = json.loads(path.read_text())
    change(fields)
    path.write_text(json.dumps(fields))


@pytest.mark.parametrize(
    "change, message",
    [
        (lambda m: m["batch"].update(max=4096), "edited"),
        (lambda m: m["plan"]["stages"][0].update(static={}), "edited"),
        (lambda m: m["files"]["model.onnx"].update(sha256="0" * 64), "edited"),
        (lambda m: m.update(precision="fp16"), "edited"),
        (lambda m: m.pop("backend"), "backend"),
        (
            lambda m: m.update(schema="ztp.engine/1"),
            r"another version of ztp_deploy: its schema is ztp\.engine/1, not ",
        ),
        (lambda m: m.update(schema="another"), "schema: Input should be"),
        (lambda m: m.update(more=1), "more"),
    ],
)
def test_an_edited_manifest_is_refused(engine, change, message):
    edit(engine.directory, change)
    with pytest.raises(DamagedFiles, match=message):
        read_manifest(engine.directory, EngineManifest)


def test_folders_of_the_wrong_kind_are_named(engine, artifact, tmp_path):
    with pytest.raises(BadRequest, match="not an engine folder"):
        read_manifest(tmp_path, EngineManifest)
    with pytest.raises(BadRequest, match="an exported artifact, no engine"):
        read_manifest(artifact.directory, EngineManifest)
    edit(engine.directory, lambda manifest: manifest.pop("batch"))
    with pytest.raises(BadRequest, match="an engine, no exported artifact"):  # and a damaged one at that
        read_manifest(engine.directory, ArtifactManifest)
    (engine.directory / "manifest.json").write_bytes(b"\xff\xfe not json")
    with pytest.raises(DamagedFiles, match="not a valid"):
        read_manifest(engine.directory, EngineManifest)


def test_manifest_round_trip(artifact):
    assert read_manifest(artifact.directory, ArtifactManifest) == artifact.manifest


def test_a_changed_byte_anywhere_is_found(artifact, tmp_path):
    whole = (artifact.directory / "manifest.json").read_bytes()
    for at in range(0, len(whole), 7):
        (tmp_path / "manifest.json").write_bytes(whole[:at] + b" " + whole[at + (whole[at] != ord(" ")) :])
        with pytest.raises(DamagedFiles):
            read_manifest(tmp_path, ArtifactManifest)


@pytest.mark.parametrize("stated", ['"seal": ""', '"seal": "{seal}", "seal": "{seal}"', '"seal":  "{seal}"'])
def test_a_seal_stands_exactly_once_as_it_is_written(artifact, tmp_path, stated):
    seal = artifact.manifest.seal
    whole = (artifact.directory / "manifest.json").read_text()
    (tmp_path / "manifest.json").write_text(whole.replace(f'"seal": "{seal}"', stated.replace("{seal}", seal)))
    with pytest.raises(DamagedFiles, match="edited"):
        read_manifest(tmp_path, ArtifactManifest)


def test_files_are_verified_by_size_and_hash(engine):
    path = engine.directory / "model.onnx"
    whole = path.read_bytes()
    path.write_bytes(whole[:-1])
    with pytest.raises(DamagedFiles, match=f"{len(whole) - 1} bytes"):
        mf.verify_files(engine.directory, engine.manifest)
    path.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
    with pytest.raises(DamagedFiles, match="sha256 differs"):
        mf.verify_files(engine.directory, engine.manifest)
    path.unlink()
    with pytest.raises(DamagedFiles, match="missing"):
        mf.verify_files(engine.directory, engine.manifest)


def test_a_manifest_cannot_point_outside_its_folder(engine):
    record = mf.FileRecord(bytes=1, sha256="0")
    outside = engine.manifest.model_copy(update={"files": {"../../etc/passwd": record}})
    with pytest.raises(DamagedFiles, match="outside"):
        mf.verify_files(engine.directory, outside)


@pytest.mark.parametrize(
    "text, triple", [("1:8:64", (1, 8, 64)), ("4", (4, 4, 4)), (np.int64(4), (4, 4, 4)), ((1, 2, 3), (1, 2, 3))]
)
def test_batch_ranges(text, triple):
    span = BatchRange.parse(text)
    assert (span.min, span.opt, span.max) == triple


@pytest.mark.parametrize("text", ["8:1:4", "0:1:2", "1:2", "a", "", "1:8:64:128", "-1", "1.5", True, 2.0, (1.0, 2, 3)])
def test_wrong_batch_ranges(text):
    with pytest.raises(BadRequest, match="not a range"):
        BatchRange.parse(text)


def test_nothing_of_the_users_is_overwritten(pruned, artifact, tmp_path):
    """Only an empty folder or an earlier folder of the same kind is ever replaced."""
    import ztp_deploy as ztp

    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "precious.txt").write_text("keep me")
    (tmp_path / "file").write_text("keep me too")
    for name in ("mine", "file"):
        with pytest.raises(BadRequest, match="in the way"):
            ztp.export(pruned, "torchscript", tmp_path / name)
        with pytest.raises(BadRequest, match="in the way"):
            ztp.build(artifact, "onnxruntime", device="cpu", directory=tmp_path / name)
    with pytest.raises(BadRequest, match="not an engine folder"):
        ztp.build(artifact, "onnxruntime", device="cpu", directory=artifact.directory)
    assert (tmp_path / "mine" / "precious.txt").read_text() == "keep me"
    assert (tmp_path / "file").read_text() == "keep me too"
    (tmp_path / "empty").mkdir()
    assert ztp.export(pruned, "torchscript", tmp_path / "empty").manifest.files


def test_leavings_are_swept_even_where_nothing_is_rebuilt(pruned, tmp_path):
    import ztp_deploy as ztp

    ztp.export(pruned, "torchscript", tmp_path / "a")
    (tmp_path / ".b.0123abcd.partial").mkdir()
    ztp.export(pruned, "torchscript", tmp_path / "a")
    assert [path.name for path in tmp_path.iterdir()] == ["a"]


def test_folder_names_tell_weights_and_settings_apart(artifact, tmp_path):
    from ztp_deploy import backends
    from ztp_deploy.manifest import folder_tags

    source = artifact.manifest.source
    own = source.model_copy(update={"weights": source.weights.model_copy(update={"kind": "file"})})
    hub = source.model_copy(update={"weights": source.weights.model_copy(update={"kind": "pretrained"})})
    assert folder_tags(source, "float32") == ["random"]
    assert folder_tags(own, "uint8") == ["uint8", f"w{source.weights.sha256[:6]}"]
    assert folder_tags(hub, "float32") == []

    def path(settings):
        target = backends.resolve("onnxruntime", device="cpu", batch="1:2:4", settings=settings)
        return backends.engine_directory(tmp_path, artifact.manifest, target).name

    label = artifact.manifest.plan.label
    assert path({}) == f"deit_t--{label}--fp32--b1-2-4--random"
    assert path({"threads": 1}).startswith(f"deit_t--{label}--fp32--b1-2-4--random--s")
    assert path({"threads": 1}) != path({"threads": 2})


def test_only_json_is_hashed():
    """The text of an object may leave out what differs, as that of a large array does."""
    assert mf.hash_of(a=[1, 0.5, None]) != mf.hash_of(a=[1, 0.25, None])
    with pytest.raises(TypeError, match="not JSON serializable"):
        mf.hash_of(a=np.arange(9))


def test_the_hash_of_sources_follows_names_and_contents(tmp_path, monkeypatch):
    monkeypatch.setattr(mf, "__file__", str(tmp_path / "manifest.py"))
    (tmp_path / "room" / "deep").mkdir(parents=True)
    (tmp_path / "room" / "deep" / "a.py").write_text("one")
    (tmp_path / "plan.py").write_text("plan")
    (tmp_path / "elsewhere.py").write_text("elsewhere")
    seen = []

    def sources(change):
        change()
        mf.sources_sha256.cache_clear()
        seen.append(mf.sources_sha256("plan.py", "room"))
        return len(set(seen))

    assert sources(lambda: None) == 1
    assert sources(lambda: (tmp_path / "elsewhere.py").write_text("changed")) == 1
    assert sources(lambda: (tmp_path / "room" / "deep" / "a.py").write_text("two")) == 2
    assert sources(lambda: (tmp_path / "room" / "deep" / "a.py").rename(tmp_path / "room" / "b.py")) == 3
    assert sources(lambda: (tmp_path / "plan.py").write_text("another plan")) == 4
    mf.sources_sha256.cache_clear()


def test_folder_names_tell_calibrations_apart(artifact, tmp_path):
    dark, light = np.zeros((2, 3, 4, 4), np.float32), np.ones((2, 3, 4, 4), np.float32)

    def path(precision, images, settings):
        target = backends.resolve("openvino", device="cpu", precision=precision, batch=4, settings=settings)
        return backends.engine_directory(tmp_path, artifact.manifest, target, images).name

    # The tag is the start of the images' sha256, after that of the settings.
    digits = hashlib.sha256(bytes(2 * 3 * 4 * 4 * 4)).hexdigest()[:6]
    assert path("int8", dark, {}).endswith(f"--int8--b4-4-4--random--c{digits}")
    assert path("int8", dark, {}) != path("int8", light, {})
    assert path("fp32", dark, {}) == path("fp32", light, {}) == path("fp32", None, {})
    both = backends.name_tags("openvino-1-cpu/" + path("int8", dark, {"threads": 1}))
    assert both == ("b4", re.search(r"--(s\w{6})--c", path("int8", dark, {"threads": 1}))[1], f"c{digits}")
    assert backends.name_tags("deit_s--dense--fp32--b1-8-64--wcafe01") == (None, None, None)
