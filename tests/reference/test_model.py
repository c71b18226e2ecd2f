"""The shipped weights: what the model card says of them."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from ztp_deploy import models
from ztp_deploy.evidence.accuracy import hits, wilson
from ztp_deploy.manifest import hash_file
from ztp_deploy.reference import model, study

DOCS = Path(__file__).parents[2] / "docs"
CARD = (DOCS / "vit_digits.md").read_text(encoding="utf-8")


def test_the_card_is_of_the_weights_that_ship():
    assert re.search(r"sha256 `([0-9a-f]{64})`", CARD)[1] == hash_file(model.WEIGHTS).sha256
    assert model.WEIGHTS.stat().st_size <= 12e6
    classifier = models.load_model("vit_digits", weights="pretrained")
    parameters = sum(value.numel() for value in classifier.parameters())
    assert f"| {parameters:,} (" in CARD


def test_the_card_says_the_accuracy_that_was_recorded():
    [path] = (DOCS / "accuracy").glob("vit_digits--dense--test.json")
    recorded = json.loads(path.read_text(encoding="utf-8"))
    assert recorded["images"] >= 10_000
    assert recorded["dense_top1"]["low"] >= 0.9
    assert f"**{recorded['dense_top1']['share']:.2%}**" in CARD


@pytest.mark.parametrize("weights, count", [("pretrained", 597), ("random", 60)])
def test_the_shipped_classifier_reads_as_many_as_recorded(weights, count):
    """Each test scan once; random weights fall far outside."""
    data = study.sheet("test", count)
    classifier = models.load_model("vit_digits", weights=weights)
    right = hits(study.logits_of(classifier, data.pixels), data.labels)
    found = wilson(int(right.sum()), count)
    recorded = study.read_study(DOCS / "accuracy" / "vit_digits--dense--test.json").dense_top1.share
    assert (found.low < recorded < found.high) == (weights == "pretrained")
