"""What a user brings besides weights: class names and preprocessing."""

from __future__ import annotations

import json

import numpy as np
import pytest
import timm
import torch

import ztp_deploy as ztp
from tests import tiny
from ztp_deploy import backends, models
from ztp_deploy.errors import BadRequest
from ztp_deploy.manifest import EngineManifest, folder_tags, read_manifest
from ztp_deploy.source import Source, read_labels
from ztp_deploy.workflow.progress import Clock, Silent
from ztp_deploy.workflow.requests import BuildRequest
from ztp_deploy.workflow.steps import engine_for

NAMES = tuple(f"Klasse {letter}ß" for letter in "abcdefghij")
GREY = {"mean": [0.5, 0.5, 0.5], "std": [0.25, 0.25, 0.25], "crop_pct": 1.0}


def load(**brought):
    return ztp.load_model("deit_t", "random", tiny.SIZE, **brought)


def test_names_and_preprocessing_are_in_the_source_and_come_back():
    source = load(labels=list(NAMES), preprocessing=GREY).source
    assert source.labels == NAMES
    assert source.preprocessing == tiny.model().source.preprocessing.model_copy(
        update={"mean": (0.5,) * 3, "std": (0.25,) * 3, "crop_pct": 1.0}
    )
    assert source.own == ("labels", "preprocessing")
    assert models.reload_model(source).source == source
    assert Source.model_validate_json(source.model_dump_json()) == source
    by_record = load(preprocessing=source.preprocessing).source
    assert (by_record.preprocessing, by_record.labels, by_record.own) == (
        source.preprocessing,
        None,
        ("preprocessing",),
    )
    assert models.reload_model(by_record).source == by_record


def test_what_is_as_it_would_be_anyway_is_nobodys_own():
    usual = tiny.model().source
    assert load(preprocessing={"crop_pct": usual.preprocessing.crop_pct}).source == usual
    assert load(preprocessing=usual.preprocessing).source == usual
    assert usual.own == ()
    assert json.loads(load(labels=NAMES).source.model_dump_json())["own"] == ["labels"]
    digits = ztp.load_model("vit_digits", "random").source
    assert digits.labels is not None
    assert ztp.load_model("vit_digits", "random", labels=list(digits.labels)).source == digits
    assert ztp.load_model("vit_digits", "random", labels=digits.labels[::-1]).source.own == ("labels",)


def test_a_module_of_ones_own_takes_both():
    sizes = {"img_size": 32, "embed_dim": 24, "depth": 2, "num_heads": 3, "num_classes": 3}
    module = timm.create_model("vit_tiny_patch16_224", **sizes)
    first = ztp.load_model(module, labels=["a", "b", "c"])
    second = ztp.load_model(first, preprocessing={"crop_mode": "squash"})
    assert first.source.own == ("labels",)
    assert (second.source.labels, second.source.preprocessing.crop_mode) == (("a", "b", "c"), "squash")
    assert second.source.own == ("labels", "preprocessing")
    assert ztp.load_model(second).source == second.source
    with pytest.raises(BadRequest, match="2 class names were given, and the model tells 3 classes apart"):
        ztp.load_model(module, labels=["a", "b"])


@pytest.mark.parametrize(
    "labels, words",
    [
        (NAMES[:9], "9 class names were given, and the model tells 10 classes apart.*Give 10 names.*--num-classes"),
        ((*NAMES, "more"), "11 class names were given, and the model tells 10"),
        ((*NAMES[:4], "", *NAMES[5:]), "Class name 5 is '', which is not one line of text"),
        ((*NAMES[:4], " ", *NAMES[5:]), "Class name 5 is ' '"),
        ((*NAMES[:4], "cat ", *NAMES[5:]), "Class name 5 is 'cat '"),
        ((*NAMES[:4], "c\nat", *NAMES[5:]), r"Class name 5 is 'c\\nat'"),
        ((*NAMES[:4], 5, *NAMES[5:]), "Class name 5 is 5"),
        ((*NAMES[:9], NAMES[3]), "Class names 4 and 10 are both 'Klasse dß'"),
        ((*NAMES[:4], "a\x1b[31m", *NAMES[5:]), "Class name 5 is"),
        ("abcdefghij", "labels is a str, not a list of class names"),
        (dict.fromkeys(NAMES), "labels is a dict, not a list"),
    ],
)
def test_names_that_name_no_classes_are_refused(labels, words, monkeypatch):
    monkeypatch.setattr(models, "_give_weights", None)  # it is refused before weights are looked for
    with pytest.raises(BadRequest, match=words):
        load(labels=labels)
    with pytest.raises(BadRequest, match=words):
        models.check_request("deit_t", "random", tiny.SIZE, labels)


def test_preprocessing_is_refused_before_weights_are_looked_for(monkeypatch):
    monkeypatch.setattr(models, "_give_weights", None)
    for wanted, words in (({"crop": 1}, "no 'crop'"), ({"crop_mode": "corner"}, "crop_mode='corner'")):
        with pytest.raises(BadRequest, match=words):
            load(preprocessing=wanted)
        with pytest.raises(BadRequest, match=words):
            models.check_request("deit_t", "random", tiny.SIZE, None, wanted)


def test_a_file_of_names_is_read_line_by_line(tmp_path):
    path = tmp_path / "names.txt"
    for text in ("a b\nç\n", "a b\nç", "a b\r\nç\r\n", "a b\nç\n\n \n", "\ufeffa b\nç\n"):
        path.write_bytes(text.encode())
        assert read_labels(path) == ("a b", "ç")
    path.write_bytes(b"a\n\nb\n")
    assert read_labels(path) == ("a", "", "b")  # which no model takes
    path.write_bytes("ç".encode("latin-1"))
    with pytest.raises(BadRequest, match=r"names.txt' cannot be read: it is not UTF-8"):
        read_labels(path)
    for other, reason in ((tmp_path, "Is a directory"), (tmp_path / "none", "No such file")):
        with pytest.raises(BadRequest, match=reason):
            read_labels(other)


def test_folders_tell_names_and_preprocessing_apart():
    named, prepared, both = load(labels=NAMES), load(preprocessing=GREY), load(labels=NAMES, preprocessing=GREY)
    tags = [folder_tags(model.source, "float32") for model in (named, prepared, both)]
    assert tags[0][0] == "random"
    assert [tag[0] for tag in tags[2]] == ["r", "l", "p"]
    assert tags[2] == ["random", tags[0][1], tags[1][1]]
    assert folder_tags(load(labels=NAMES[::-1]).source, "float32") != tags[0]
    assert folder_tags(load(preprocessing={**GREY, "crop_pct": 0.9}).source, "float32") != tags[1]


@pytest.mark.parametrize("input", ["float32", "uint8"])
def test_a_run_with_other_names_or_preprocessing_takes_no_engine_of_the_former_ones(input, tmp_path):
    request = BuildRequest(
        backend="torchscript",
        device="cpu",
        batch="1:2:4",
        input=input,
        export_root=tmp_path / "x",
        engines_root=tmp_path / "e",
    )
    found = {}
    brought = (
        {}, {"labels": NAMES}, {"labels": NAMES[::-1]}, {"preprocessing": GREY}, {"preprocessing": {**GREY, "mean": [0.25] * 3}}
    )  # fmt: skip
    for number, kind in enumerate((*brought, *brought)):
        model = load(**kind)
        engine = engine_for(model, ztp.make_plan(model, "slice", keep=[18], sites=[2]), request, Clock(Silent()))
        assert engine.manifest.source == model.source
        assert read_manifest(engine.directory, EngineManifest).source == model.source
        assert models.reload_model(engine.manifest.source).source == model.source
        assert (engine.directory in found) == (number >= len(brought))  # the same request finds its own again
        found.setdefault(engine.directory, (engine.directory / "manifest.json").stat().st_mtime_ns)
        assert found[engine.directory] == (engine.directory / "manifest.json").stat().st_mtime_ns
    assert len(found) == len(brought)
    assert len(list((tmp_path / "x").iterdir())) == len(brought)


def test_one_folder_of_two_names_or_preprocessings_is_made_anew(tmp_path):
    """Where the folder's name is the user's own, what it holds decides."""
    made = []
    for kind in ({"preprocessing": GREY}, {}, {"labels": NAMES}):
        model = load(**kind)
        pruned = ztp.prune(model, ztp.make_plan(model, "slice", keep=[18], sites=[2]))
        artifact = ztp.export(pruned, "torchscript", tmp_path / "x", input="uint8")
        engine = ztp.build(artifact, "torchscript", device="cpu", batch=2, directory=tmp_path / "e")
        assert engine.manifest.source == model.source
        with ztp.load_engine(engine.directory) as session:
            pixels = np.full((2, 3, 96, 96), 200, np.uint8)
            made.append(session.run(pixels))
        with torch.inference_mode():
            mean, std = (np.array(getattr(model.source.preprocessing, name), np.float32) for name in ("mean", "std"))
            image = ((pixels.transpose(0, 2, 3, 1) / np.float32(255) - mean) / std).transpose(0, 3, 1, 2)
            np.testing.assert_allclose(made[-1], pruned(torch.from_numpy(image.copy())).numpy(), atol=1e-4)
    assert np.abs(made[0] - made[1]).max() > 1e-2
    np.testing.assert_array_equal(made[1], made[2])


def test_a_model_that_normalises_otherwise_proves_no_engine_of_pixels(tmp_path):
    model = load(preprocessing=GREY)
    pruned = ztp.prune(model, ztp.make_plan(model, "slice", keep=[18], sites=[2]))
    artifact = ztp.export(pruned, "torchscript", tmp_path / "x", input="uint8")
    engine = ztp.build(artifact, "torchscript", device="cpu", batch=2, directory=tmp_path / "e")
    images = np.random.default_rng(0).integers(0, 256, (2, 3, 96, 96), dtype=np.uint8)
    assert ztp.check_parity(engine, models.reload_model(engine.manifest.source), images).passed
    with pytest.raises(BadRequest, match="normalises pixels otherwise"):
        ztp.check_parity(engine, load(), images)
    assert backends.engine_directory(
        tmp_path, artifact.manifest, backends.resolve("torchscript", device="cpu")
    ).name.endswith(f"--uint8--random--{folder_tags(model.source, 'float32')[1]}")
