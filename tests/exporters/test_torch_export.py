"""The torch.export format: what the program computes, in which types, and what is refused."""

from __future__ import annotations

import copy

import pytest
import torch

import ztp_deploy as ztp
from tests import tiny
from ztp_deploy.errors import DamagedFiles, GateFailed
from ztp_deploy.evidence.exported import open_exported
from ztp_deploy.exporters import torch_export
from ztp_deploy.exporters.graph import InferenceGraph
from ztp_deploy.exporters.lower import PatchProduct, cuts_patches, lower


@pytest.fixture(scope="module")
def small():
    """Two blocks, one stage."""
    model = tiny.model(size=tiny.SIZE.model_copy(update={"depth": 2}))
    return ztp.prune(model, ztp.make_plan(model, ratio=0.5, sites=[1], options={"rounds": 2}))


def types_of(program, name):
    """The types that operators of one name take, in order."""
    calls = [node for node in program.graph.nodes if node.op == "call_function" and str(node.target) == name]
    return [node.args[0].meta["val"].dtype for node in calls]


def test_the_program_equals_eager_at_any_batch_and_names_no_path(torch_export_artifact, pruned):
    manifest = torch_export_artifact.manifest
    assert set(manifest.files) == {"model.pt2"}
    program = open_exported(torch_export_artifact)
    for batch in (1, 3):
        images = tiny.images(batch)
        with torch.inference_mode():
            expected = pruned.run(torch.from_numpy(images))
        found = program.run(images)
        assert tuple(found) == (*manifest.outputs, *manifest.audit)
        torch.testing.assert_close(torch.from_numpy(found["logits"]), expected.logits)
        for index, (kept, scores) in enumerate(zip(expected.kept, expected.scores, strict=True), start=1):
            assert found[f"kept_{index}"].tolist() == kept.tolist()
            torch.testing.assert_close(torch.from_numpy(found[f"score_{index}"]), scores["score"])
    content = (torch_export_artifact.directory / "model.pt2").read_bytes()
    assert b"site-packages" not in content
    assert str(tiny.__file__).split("/tests/")[0].encode() not in content


@pytest.mark.parametrize("precision, low", [("fp16", torch.float16), ("bf16", torch.bfloat16)])
def test_tokens_are_low_and_scores_and_logits_are_float32(small, tmp_path, precision, low):
    artifact = ztp.export(small, "torch_export", tmp_path / "a", precision=precision, input="uint8")
    program = torch_export.read(artifact.directory / "model.pt2")
    linear = types_of(program, "aten.linear.default")
    assert linear == [low] * (len(linear) - 1) + [torch.float32]  # the classifier comes last
    assert types_of(program, "aten.conv2d.default") == []  # patches are multiplied
    assert types_of(program, "ztp.zero_tprune.default") == [low]  # a stage by name: `zero_tprune_op`
    assert types_of(program, "aten.div.Tensor")[0] == torch.float32  # pixels / 255
    runner = open_exported(artifact)
    pixels = InferenceGraph(small, "uint8").example(2)
    with torch.inference_mode():
        logits = InferenceGraph(small, "uint8").audited(pixels)[0]
    found = runner.run(pixels.numpy())
    assert found["logits"].dtype == found["score_1"].dtype == "float32"
    distance = (torch.from_numpy(found["logits"]) - logits).abs().max() / logits.std()
    assert 0 < distance < {"fp16": 0.05, "bf16": 0.3}[precision]


def test_lowering_leaves_the_callers_model_alone(small):
    before = copy.deepcopy(small.state_dict())
    graph = InferenceGraph(small, "float32")
    lowered = lower(graph, "bf16")
    assert lowered is not graph
    assert {value.dtype for value in small.state_dict().values()} == {torch.float32}
    assert all(torch.equal(value, before[name]) for name, value in small.state_dict().items())
    images = torch.from_numpy(tiny.images(1))
    with torch.inference_mode():
        assert small(images).dtype == lowered(images)[0].dtype == torch.float32
        assert not torch.equal(small(images), lowered(images)[0])
    assert lower(graph, "fp32") is graph


@pytest.mark.parametrize("size", [(32, 48), (37, 50)])
def test_a_product_of_patches_is_the_convolution(size):
    torch.manual_seed(0)
    convolution = torch.nn.Conv2d(3, 5, (8, 16), (8, 16))
    assert cuts_patches(convolution)
    images = torch.randn(2, 3, *size)
    with torch.inference_mode():
        expected = convolution(images)
        torch.testing.assert_close(PatchProduct(convolution)(images), expected, rtol=1e-5, atol=1e-5)
    assert expected.shape == (2, 5, size[0] // 8, size[1] // 16)


@pytest.mark.parametrize(
    "change", [{"stride": 4}, {"padding": 1}, {"dilation": 2}, {"groups": 3}, {"kernel_size": 1, "stride": 1}]
)
def test_other_convolutions_stay(change):
    assert not cuts_patches(
        torch.nn.Conv2d(**{"in_channels": 3, "out_channels": 6, "kernel_size": 8, "stride": 8} | change)
    )


def test_both_heads_of_a_distilled_model_stay_float32():
    model = tiny.model("deit_t_distilled", tiny.SIZE.model_copy(update={"depth": 2}))
    pruned = ztp.prune(model, ztp.make_plan(model, "dense"))
    backbone = lower(InferenceGraph(pruned, "float32"), "fp16").pruned.model
    assert {backbone.head.weight.dtype, backbone.head_dist.weight.dtype} == {torch.float32}
    assert backbone.blocks[0].mlp.fc1.weight.dtype == torch.float16


@pytest.mark.parametrize(
    "change, operator",
    [
        (lambda x: x.topk(2, dim=1).values, "aten::topk"),
        (lambda x: x.sort(dim=1).values, "aten::sort"),
        (lambda x: x.gather(1, x.argmax(1, keepdim=True)), "aten::gather"),
        (lambda x: x.scatter(1, x.argmax(1, keepdim=True), 0.0), "aten::scatter"),
        (lambda x: x.masked_select(x > 0), "aten::masked_select"),
        (lambda x: x[x.argmax(1)], "aten::index"),
    ],
)
def test_a_program_outside_the_vocabulary_is_not_kept(small, tmp_path, monkeypatch, change, operator):
    run = type(small).run

    def broken(self, *arguments):
        outputs = run(self, *arguments)
        outputs.scores[0]["score"] = change(outputs.scores[0]["score"])
        return outputs

    monkeypatch.setattr(type(small), "run", broken)
    with pytest.raises(GateFailed, match=f"{operator}: "):
        ztp.export(small, "torch_export", tmp_path / "a")
    assert list(tmp_path.iterdir()) == []


def test_a_damaged_program_is_one_sentence(tmp_path):
    (tmp_path / "model.pt2").write_bytes(b"PK\x03\x04 and no more")
    with pytest.raises(DamagedFiles, match="cannot open"):
        torch_export.read(tmp_path / "model.pt2")
