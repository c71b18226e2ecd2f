"""The linter on small graphs written as ONNX text: what it refuses and what it lets pass."""

from __future__ import annotations

import onnx
import onnx.parser
import pytest

from ztp_deploy.errors import GateFailed
from ztp_deploy.exporters import vocabulary
from ztp_deploy.plan import Flops, Plan, Stage

PLAN = Plan(
    model="m",
    method="zero_tprune",
    image_size=32,
    special_tokens=1,
    patch_tokens=6,
    asked={"ratio": 0.5},
    stages=(Stage(block=1, place="after_block", tokens_in=6, tokens_out=3, static={"similar": 1}),),
    flops=Flops(dense=2, planned=1, executed=1),
)

GOOD = """
<ir_version: 8, opset_import: ["" : 18]>
g (float[batch,6] images) => (float[batch,6] logits, int32[batch,3] kept_1)
<int64[1] k = {3}, int64[1] flat = {-1}, int64[2] back = {-1, 3}>
{
  values, indices = TopK <sorted = 1> (images, k)
  rows = Reshape (indices, flat)
  table = Reshape (images, flat)
  picked = Gather <axis = 0> (table, rows)
  shaped = Reshape (picked, back)
  kept_1 = Cast <to = 6> (shaped)
  logits = Identity (images)
}
"""


def lint(text):
    return vocabulary.lint(onnx.parser.parse_model(text), PLAN)


def test_a_graph_in_the_vocabulary_passes():
    assert lint(GOOD) == []


@pytest.mark.parametrize(
    "old, new, finding",
    [
        ("picked = Gather <axis = 0> (table, rows)", "picked = GatherElements (table, rows)", "GatherElements"),
        ("picked = Gather <axis = 0> (table, rows)", "picked = Gather <axis = 1> (images, rows)", "axis 1"),
        ("logits = Identity (images)", "logits = ScatterElements (images, indices, values)", "Scatter"),
        ("rows = Reshape (indices, flat)", "rows = NonZero (indices)", "NonZero"),
        ("logits = Identity (images)", "logits = Einsum <equation = \"ij->ij\"> (images)", "not in the vocabulary"),
        ("TopK <sorted = 1>", "TopK <sorted = 0>", "not sorted"),
        ("TopK <sorted = 1>", "TopK <largest = 0>", "smallest"),
        ("int64[1] k = {3}", "int64[1] k = {5}", "k = 5, a number the plan does not have"),
        ("int64[1] k = {3}", "int64[1] k = {4000}", "beyond 3840"),
        ("int64[1] k = {3}", "int64[1] k = {6}", "keeps 3 tokens at 1 stage"),
        ("int32[batch,3] kept_1)", "int32[batch,4] kept_1)", "has 3 tokens there"),
        ("int32[batch,3] kept_1)", "int64[batch,3] kept_1)", "not int32"),
        ("int32[batch,3] kept_1)", "int32[2,3] kept_1)", "fixed batch"),
        (", int32[batch,3] kept_1)", ")", "outputs are"),
    ],
)  # fmt: skip
def test_every_rule_can_fail(old, new, finding):
    assert old in GOOD
    assert any(finding in fault for fault in lint(GOOD.replace(old, new))), lint(GOOD.replace(old, new))


def test_a_constant_index_is_a_mere_slice():
    text = GOOD.replace("picked = Gather", "sliced = Gather <axis = 1> (images, back)\n  picked = Gather")
    assert lint(text) == []
    assert any("axis 1" in fault for fault in lint(text.replace("(images, back)", "(images, rows)")))


def test_a_k_computed_at_run_time_is_refused():
    text = GOOD.replace("float[batch,6] images)", "float[batch,6] images, int64[1] k)").replace(
        "int64[1] k = {3}, ", ""
    )
    assert any("computed at run time" in fault for fault in lint(text))


def test_foreign_domains_are_refused():
    text = GOOD.replace('["" : 18]', '["" : 18, "com.microsoft" : 1]')
    text = text.replace("logits = Identity (images)", "logits = com.microsoft.Gelu (images)")
    assert any("com.microsoft" in fault for fault in lint(text))


def test_check_names_the_fault(tmp_path):
    bad = onnx.parser.parse_model(GOOD.replace("TopK <sorted = 1>", "TopK <sorted = 0>"))
    with pytest.raises(GateFailed, match="not sorted"):
        vocabulary.check(bad, PLAN, tmp_path / "model.onnx")


def test_quantised_tensors_are_for_derived_graphs_alone():
    text = GOOD.replace("int64[1] k = {3}", "int64[1] k = {3}, float scale = {0.5}, int8 zero = {0}").replace(
        "logits = Identity (images)",
        "stored = QuantizeLinear (images, scale, zero)\n  logits = DequantizeLinear (stored, scale, zero)",
    )
    model = onnx.parser.parse_model(text)
    faults = vocabulary.lint(model, PLAN)
    assert [fault.split()[0] for fault in faults] == ["QuantizeLinear", "DequantizeLinear"]
    assert vocabulary.lint(model, PLAN, quantised=True) == []
    scattered = onnx.parser.parse_model(text.replace("DequantizeLinear (stored, scale, zero)", "Einsum (stored)"))
    assert any("Einsum" in fault for fault in vocabulary.lint(scattered, PLAN, quantised=True))
