"""The demonstration from start to end on a machine without a network."""

from __future__ import annotations

import pytest

from ztp_deploy import environment, models
from ztp_deploy.console import Bars
from ztp_deploy.errors import BadRequest, MissingSoftware
from ztp_deploy.evidence.images import image_files
from ztp_deploy.reference import demo, model
from ztp_deploy.workflow.requests import BuildRequest, PlanRequest


def test_vit_digits_is_a_model_like_any_other():
    classifier = models.load_model("vit_digits", weights="random")
    source = models.source_of(classifier)
    assert source.labels == model.LABELS
    assert source.preprocessing.input_size == (3, 112, 112)
    assert (source.preprocessing.mean, source.preprocessing.std) == ((0.5,) * 3, (0.25,) * 3)
    _, geometry = models.describe("vit_digits")
    assert (geometry.patch_tokens, geometry.special_tokens, geometry.depth, geometry.num_heads) == (196, 1, 8, 3)


def test_weights_that_are_not_there_are_said_to_be_missing(monkeypatch, tmp_path):
    monkeypatch.setitem(model.CONFIG, "file", str(tmp_path / "none.safetensors"))
    with pytest.raises(MissingSoftware, match=r"No trained weights of vit_digits .*reference\.train"):
        models.load_model("vit_digits", weights="pretrained")


def test_the_demonstration_makes_an_engine_an_accuracy_and_pictures(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    build = BuildRequest(backend="torchscript", device="cpu", batch="1:8:16")
    made = demo.demonstrate(build, Bars(), count=24, seconds=1.0)
    assert made.result.summary.command == made.accuracy.command == "ztp_deploy.reference.demo.demonstrate"
    assert made.result.parity.passed
    assert made.result.engine.manifest.plan.counts == [137, 95, 66]
    assert made.accuracy.images == 24
    assert made.accuracy.accuracy.top1.hits >= 19
    assert made.accuracy.comparison.agreement.hits >= 21
    assert len(made.pictures.drawn) == 4
    assert all(drawn.picture.is_file() for drawn in made.pictures.drawn)


def test_what_a_larger_demonstration_drew_is_none_of_a_smaller_ones_pictures(tmp_path, monkeypatch):
    found = []

    def stop(*given, images, **more):
        found.append(len(image_files(images)))
        raise KeyboardInterrupt

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(demo, "make_engine", stop)
    for count in (6, 4):
        with pytest.raises(KeyboardInterrupt):
            demo.demonstrate(BuildRequest(backend="torchscript", device="cpu"), Bars(), count=count)
    assert found == [6, 4]


@pytest.mark.parametrize("nothing", [{"ratio": 1.0}, {"method": "dense"}])
def test_a_plan_that_prunes_nothing_is_refused_before_anything_is_made(nothing, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    wanted = PlanRequest(model="vit_digits", weights="pretrained", **nothing)
    with pytest.raises(BadRequest, match="prunes nothing"):
        demo.demonstrate(BuildRequest(), Bars(), wanted=wanted)
    assert list(tmp_path.iterdir()) == []


def test_an_engine_that_cannot_run_here_is_refused_before_it_is_built(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(environment, "gpus", lambda: ())
    with pytest.raises(MissingSoftware, match="cannot be measured"):
        demo.demonstrate(BuildRequest(backend="tensorrt_rtx"), Bars())
    assert list(tmp_path.iterdir()) == []


def test_an_accuracy_needs_trained_weights():
    wanted = PlanRequest(model="vit_digits", ratio=0.7, weights="random")
    with pytest.raises(BadRequest, match="needs trained weights"):
        demo.demonstrate(BuildRequest(), Bars(), wanted=wanted)
