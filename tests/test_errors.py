"""What pydantic refuses, told in one sentence wherever it comes from."""

from __future__ import annotations

import json

import pytest

from ztp_deploy import backends, methods
from ztp_deploy.backends.settings import parse
from ztp_deploy.errors import BadRequest
from ztp_deploy.plan import Plan
from ztp_deploy.recipes import read_recipe


def plan(**changes):
    counts = dict.fromkeys(("image_size", "special_tokens", "patch_tokens"), 9)
    flops = {"dense": 1, "planned": 1, "executed": 1}
    return json.dumps({"model": "m", "method": "dense", **counts, "flops": flops, **changes})


def recipe(folder, text):
    path = folder / "mine.toml"
    path.write_text(f'model = "m"\n{text}\n')
    return str(path)


@pytest.mark.parametrize(
    "read, told",
    [
        (
            lambda folder: parse(backends.get("tensorrt").Settings, {"refit": True, "strip_plan": True}, "tensorrt"),
            "Back end tensorrt does not take settings={'refit': True, 'strip_plan': True}: a stripped plan is refitted "
            "by itself: give refit or strip_plan, not both.",
        ),
        (
            lambda folder: parse(backends.get("torchscript").Settings, {"threads": -1}, "torchscript"),
            "Back end torchscript does not take threads=-1: Input should be greater than or equal to 0.",
        ),
        (
            lambda folder: methods.parse_options("ats", {"batch_padding": True}),
            "Method ats does not take options={'batch_padding': True}: batch_padding belongs to the masked form.",
        ),
        (
            lambda folder: methods.parse_options("diffrate", {"pruned": "half"}),
            "Method diffrate does not take pruned='half': Input should be a valid number, unable to parse string as a "
            "number; or: Input should be a valid list.",
        ),
        (
            lambda folder: methods.parse_options("zero_tprune", {"variance_bounds": [0.1, "much"]}),
            "Method zero_tprune does not take variance_bounds=[0.1, 'much']: Input should be a valid number, unable to "
            "parse string as a number.",
        ),
        (
            lambda folder: read_recipe(recipe(folder, 'keep = ["most"]')),
            "mine.toml is not valid recipe: keep: Input should be a valid integer, unable to parse string as an integer; "
            "or: Input should be a valid number, unable to parse string as a number.",
        ),
        (
            lambda folder: Plan.from_json(plan(stages=[{"block": 1}])),
            "This is not a valid plan: stages.0.place: Field required.",
        ),
        (
            lambda folder: Plan.from_json(plan(method="evit")),
            "This is not a valid plan: plan: the dense plan, and no other, has no stages.",
        ),
    ],
)
def test_what_is_wrong_is_named_with_all_its_reasons(read, told, tmp_path):
    with pytest.raises(BadRequest) as refused:
        read(tmp_path)
    assert refused.value.problem.removeprefix(f"{tmp_path}/") == told
