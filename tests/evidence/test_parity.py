"""The parity gate: it passes what is right, and engines damaged on purpose are caught and told apart."""

from __future__ import annotations

import copy
import json

import numpy as np
import onnx
import pytest
import torch
from onnx import numpy_helper

import ztp_deploy as ztp
from tests import tiny
from ztp_deploy.errors import BadRequest, GateFailed
from ztp_deploy.evidence import parity, verdict
from ztp_deploy.evidence.images import load_images
from ztp_deploy.evidence.selection import Observation
from ztp_deploy.exporters.graph import InferenceGraph
from ztp_deploy.manifest import manifest_sha256


@pytest.fixture(scope="module")
def photographs():
    return load_images(None, tiny.model().source.preprocessing, "float32", 24)


def edge(report, reference, candidate):
    return next(e for e in report.edges if (e.reference, e.candidate) == (reference, candidate))


def test_an_honest_engine_passes_along_every_edge(shared_engine, model, photographs):
    report = ztp.check_parity(shared_engine, model, photographs)
    assert report.passed
    assert report.require() is report
    assert [(e.reference, e.candidate) for e in report.edges] == [
        ("eager", "exported"),
        ("exported", "engine"),
        ("eager", "engine"),
    ]
    for one in report.edges:
        assert [stage.images_agreeing for stage in one.stages] == [24, 24, 24]
        assert [stage.token_agreement for stage in one.stages] == [1, 1, 1]
        assert one.top1_equal == one.compared_logits == 24
        assert one.worst_logit < 1e-4
    assert report.dense_to_pruned is None  # random weights: agreement would mean nothing
    written = json.loads((shared_engine.evidence / "parity.json").read_text())
    assert written["manifest_sha256"] == manifest_sha256(shared_engine.directory)
    assert written["passed"] is True


def test_torchscript_has_one_edge(torchscript_engine, model, photographs):
    report = ztp.check_parity(torchscript_engine, model, photographs)
    assert report.passed
    assert [(e.reference, e.candidate) for e in report.edges] == [("eager", "engine")]


def test_wrong_weights_before_a_stage_are_a_weight_fault(engine, model, photographs):
    def damage(graph: onnx.ModelProto) -> None:
        [weight] = [t for t in graph.graph.initializer if t.name.endswith("blocks.0.norm1.weight")]
        weight.CopyFrom(numpy_helper.from_array(numpy_helper.to_array(weight) * np.float32(1.3), weight.name))

    tiny.damage_graph(engine.directory, damage)
    report = ztp.check_parity(engine, model, photographs)
    assert not report.passed
    assert edge(report, "eager", "exported").holds  # the export is innocent
    broken = edge(report, "exported", "engine")
    assert {fault.kind for fault in broken.faults} == {"weights"}
    assert broken.faults[0].stage == 1
    with pytest.raises(GateFailed, match="between exported and engine: weights fault, stage 1"):
        report.require()
    said = r"\(fp32\) failed its last parity check between exported and engine.*`ztp check --engine .*engine`"
    with pytest.warns(ztp.ParityWarning, match=said):
        ztp.load_engine(engine).close()
    assert not ztp.check_parity(engine, model, photographs).passed  # without a warning: it is the judge
    for text in ("[]", '{"passed": false, "manifest_sha256": "of another"}', ""):
        (engine.evidence / verdict.PARITY_FILE).write_text(text)
        ztp.load_engine(engine).close()


def test_wrong_weights_after_the_last_stage_are_seen_in_the_logits(engine, model, photographs):
    def damage(graph: onnx.ModelProto) -> None:
        [bias] = [t for t in graph.graph.initializer if t.name.endswith("blocks.3.mlp.fc2.bias")]
        bias.CopyFrom(numpy_helper.from_array(numpy_helper.to_array(bias) * np.float32(2), bias.name))

    tiny.damage_graph(engine.directory, damage)
    report = ztp.check_parity(engine, model, photographs)
    broken = edge(report, "exported", "engine")
    assert [stage.images_agreeing for stage in broken.stages] == [24, 24, 24]
    assert {(fault.kind, fault.stage) for fault in broken.faults} == {("weights", None)}
    with pytest.raises(GateFailed, match="on the same tokens logits differ"):
        report.require()


def test_logits_that_overflow_are_a_fault_whose_evidence_can_be_read(engine, model, photographs):
    """fp16's way to fail: one bias is not a number, and the report must say so rather than the last finite figure."""

    def damage(graph: onnx.ModelProto) -> None:
        [bias] = [t for t in graph.graph.initializer if t.name.endswith("head.bias")]
        bias.CopyFrom(numpy_helper.from_array(numpy_helper.to_array(bias) * np.float32("nan"), bias.name))

    tiny.damage_graph(engine.directory, damage)
    report = ztp.check_parity(engine, model, photographs)
    assert not report.passed
    read = verdict.ParityReport.model_validate_json((engine.evidence / "parity.json").read_bytes())
    assert [np.isnan(one.worst_logit) for one in read.edges] == [False, True, True]
    assert read.passed is False


def test_the_worst_distance_is_not_lost_among_finite_ones():
    expected = np.array([[0.0, 1.0], [0.0, 1.0], [0.0, 1.0]])
    found = expected.copy()
    found[1, 0] = np.nan
    tolerance = parity.TOLERANCES["fp32"]
    worst, _, faults = parity._compare_logits(expected, found, tolerance, ["a", "b", "c"], set())
    assert np.isnan(worst)
    assert [fault.image for fault in faults] == ["b"]


def test_logits_that_are_all_alike_have_a_distance():
    """As in the C++ self-test: equal ones are not apart, others are infinitely far, and nothing is divided by zero."""
    alike, other = np.zeros((2, 3)), np.array([[0.0, 0, 0], [0, 0, 1]])
    tolerance = parity.TOLERANCES["fp32"]
    assert parity._compare_logits(alike, alike, tolerance, ["a", "b"], set()) == (0.0, 2, [])
    worst, _, [fault] = parity._compare_logits(alike, other, tolerance, ["a", "b"], set())
    assert (worst, fault.image) == (np.inf, "b")


def test_a_model_on_another_device_is_checked_by_a_copy_on_the_cpu(shared_engine, pruned, monkeypatch):
    """torch's meta device, which every machine has, stands in for a GPU; what it lacks is the way back."""
    elsewhere = copy.deepcopy(pruned).to("meta")
    monkeypatch.setattr(type(pruned), "cpu", lambda self: pruned)
    assert ztp.check_parity(shared_engine, elsewhere, tiny.images(3)).passed
    assert next(elsewhere.parameters()).is_meta


def test_a_top_k_that_keeps_the_wrong_tokens_is_a_selection_fault(engine, model, photographs):
    def damage(graph: onnx.ModelProto) -> None:
        [top_k] = [n for n in graph.graph.node if n.op_type == "TopK" and n.input[0] == "score_2"]
        del top_k.attribute[:]
        top_k.attribute.append(onnx.helper.make_attribute("largest", 0))

    tiny.damage_graph(engine.directory, damage)
    report = ztp.check_parity(engine, model, photographs)
    broken = edge(report, "exported", "engine")
    assert {fault.kind for fault in broken.faults} == {"selection"}
    assert {fault.stage for fault in broken.faults} == {2}
    assert broken.stages[0].images_agreeing == 24
    assert broken.stages[1].images_agreeing == 0
    with pytest.raises(GateFailed, match="selection fault, stage 2 keeps other tokens than its own scores call for"):
        report.require()


@pytest.mark.parametrize(
    "images, tied, faults", [(24, 2, ["near_ties"]), (24, 1, []), (2, 2, ["near_ties"]), (1, 1, [])]
)
def test_too_many_near_ties_fail(shared_engine, model, photographs, monkeypatch, images, tied, faults):
    """2 of 24 is more than 5 %; one of few images may be a near-tie and says nothing of the engine."""
    from ztp_deploy.evidence.selection import Difference

    monkeypatch.setattr(parity, "same_destinations", lambda a, b, *rest: np.arange(images)[:, None] >= tied)
    monkeypatch.setattr(
        parity, "differences", lambda *arguments: [Difference(1, "near_tie", "importance", 1e-6, [0, 1])]
    )
    pixels = photographs.pixels[:images]
    report = ztp.check_parity(shared_engine, model, pixels)
    broken = report.edges[0]
    assert len(broken.near_ties) == tied
    assert broken.compared_logits == images  # theirs too, against eager on the same tokens
    assert [fault.kind for fault in broken.faults] == faults


def test_a_model_that_does_not_belong_is_refused(shared_engine, photographs):
    other = tiny.model()
    with torch.no_grad():
        other.head.bias.add_(1)
    stranger = ztp.load_model("deit_t", weights=other.state_dict(), overrides=tiny.SIZE)
    with pytest.raises(BadRequest, match="not the one"):
        ztp.check_parity(shared_engine, stranger, photographs)


def test_a_missing_export_is_said_not_hidden(engine, model, photographs):
    tiny.reseal(engine.directory, artifact="../nowhere")
    report = ztp.check_parity(engine, model, photographs)
    assert [(e.reference, e.candidate) for e in report.edges] == [("eager", "engine")]
    assert "could not be checked" in report.notes[0]


def test_a_proof_is_of_this_very_engine_by_the_bounds_of_today(engine, model, photographs, monkeypatch):
    path = engine.evidence / verdict.PARITY_FILE
    assert verdict.proof_of(engine) is None
    report = ztp.check_parity(engine, model, photographs)
    assert verdict.proof_of(engine) == report
    with monkeypatch.context() as patch:
        tighter = parity.TOLERANCES["fp32"].model_copy(update={"logits": 1e-9})
        patch.setitem(parity.TOLERANCES, "fp32", tighter)
        assert verdict.proof_of(engine) is None
    whole = path.read_text()
    for text in ("[]", whole[:-20], report.model_copy(update={"passed": False}).to_json(),
                 report.model_copy(update={"manifest_sha256": "0" * 64}).to_json()):  # fmt: skip
        path.write_text(text)
        assert verdict.proof_of(engine) is None
    path.write_text(whole)
    assert verdict.proof_of(engine) == report


def test_plain_arrays_are_images_too(shared_engine, pruned):
    report = ztp.check_parity(shared_engine, pruned, tiny.images(3))
    assert report.passed
    assert report.images == "3 given images"


def kl(dense: np.ndarray, pruned: np.ndarray) -> float:
    """KL(dense ‖ pruned) in nats per image, by the definition."""
    one, other = (torch.from_numpy(logits).double().softmax(-1) for logits in (dense, pruned))
    return float((one * (one / other).log()).sum(-1).mean())


def test_dense_agreement_is_reported_for_real_weights(tmp_path):
    """Weights that are not random: what pruning changes is reported, never gated."""
    model = ztp.load_model("deit_t", weights=tiny.model().state_dict(), overrides=tiny.SIZE)
    pruned = ztp.prune(model, ztp.make_plan(model, ratio=0.7))
    artifact = ztp.export(pruned, "torchscript", tmp_path / "a")
    engine = ztp.build(artifact, "torchscript", device="cpu", directory=tmp_path / "e")
    images = tiny.images(9)  # one more than eager PyTorch runs at once
    found = ztp.check_parity(engine, model, images).dense_to_pruned
    with torch.inference_mode():
        dense, thin = (module(torch.from_numpy(images)).numpy() for module in (model, pruned))
    assert found is not None
    assert found.images == 9
    assert found.top1_equal == (dense.argmax(1) == thin.argmax(1)).mean()
    assert found.mean_kl == pytest.approx(kl(dense, thin), rel=1e-4)


def test_dense_agreement_by_hand(pruned):
    """Pruned logits made up: two of four images with another best class, one of them far from dense."""
    images = tiny.images(4)
    graph = InferenceGraph(pruned, "float32")
    with torch.inference_mode():
        dense = pruned.model(torch.from_numpy(images)).numpy()
    thin = dense.copy()
    thin[1] = np.roll(thin[1], 1)
    thin[3] = -thin[3]
    found = parity._dense_agreement(graph, Observation(thin, [], [], {}), images)
    assert found == parity.Agreement(images=4, top1_equal=0.5, mean_kl=found.mean_kl)
    assert found.mean_kl == pytest.approx(kl(dense, thin), rel=1e-6)
    same = parity._dense_agreement(graph, Observation(dense, [], [], {}), images)
    assert (same.top1_equal, same.mean_kl) == (1, pytest.approx(0, abs=1e-9))
