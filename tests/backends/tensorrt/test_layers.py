"""Reading a built engine's layers: what fused, and in which type it runs."""

from __future__ import annotations

import pytest

from ztp_deploy.backends.tensorrt.graph import AttentionNodes
from ztp_deploy.backends.tensorrt.layers import check_engine_precision, fusion, read_layers
from ztp_deploy.errors import GateFailed

FIRST = AttentionNodes("qk_1", "softmax_1", "pv_1", shared=False)
SECOND = AttentionNodes("qk_2", "softmax_2", "pv_2", shared=False)
STAGE = AttentionNodes("qk_3", "softmax_3", "pv_3", shared=True)


def line(name: str, nodes: str, kind: str = "Half", const: str = "Float") -> str:
    tensor = "{{ Name: {0}, Dimensions: [-1,37,16], Strides: [16,-1,1], Datatype: {1}, Format: Row major }}"
    carried = "".join(f"[ONNX Layer: {node}]" for node in nodes.split())
    return (
        f"Name: {name}, LayerType: kgen, Inputs: [ {tensor.format('a', kind)}, {tensor.format('b', kind)}], "
        f"Constants: [ {tensor.format('alpha', const)}], Outputs: [ {tensor.format('c', kind)}], "
        f"TacticName: t_0x1, StreamId: 0, Metadata: {carried}"
    )


def test_a_layer_is_read_with_its_types_and_nodes():
    text = (
        "Layers:\n" + line("_gemm_mha_v2_myl0_6", "pv_1 softmax_1 qk_1") + "\n\nBindings:\n Name: images, IOMode: Input"
    )
    [layer] = read_layers(text)
    assert layer.name == "_gemm_mha_v2_myl0_6"
    assert layer.reads == {"Half"}  # not the float32 constant, which a product in fp16 has too
    assert layer.carries == {"pv_1", "softmax_1", "qk_1"}


def test_other_wordings_are_read():
    """Older inspectors write Format/Datatype and part the nodes with a control character."""
    text = line("fmha", "a b").replace("Datatype", "Format/Datatype").replace("][", "]\x1e[")
    assert read_layers(text)[0].reads == {"Half"}
    assert read_layers(text)[0].carries == {"a", "b"}


@pytest.mark.parametrize(
    "words, kind",
    [
        ("Row major linear FP32", "Float"),
        ("Channel major FP16 format where channel % 8 == 0", "Half"),
        ("Row major linear BF16 format", "BFloat16"),
        ("Row major Int8 format", "Int8"),
        ("Row major linear FP8 format", "FP8"),
        ("Int32", "Int32"),
    ],
)
def test_a_type_in_words_is_read(words, kind):
    text = line("gemm", "qk_1").replace("Datatype: Half, Format: Row major", f"Format/Datatype: {words}")
    [layer] = read_layers(text)
    assert layer.reads == {kind}
    if kind == "Float":
        with pytest.raises(GateFailed, match="1 of 1 matrix products run in float32"):
            check_engine_precision([layer], frozenset({"qk_1"}), "fp16")


def test_fused_attention_is_one_layer_with_all_three_nodes():
    layers = read_layers("\n".join([line("mha_1", "qk_1 softmax_1 pv_1"), line("mha_2", "qk_2 softmax_2 pv_2")]))
    found = fusion(layers, [FIRST, SECOND, STAGE], stages=1)
    assert found.as_built() == {"attention_expected": 2, "attention_fused": 2, "attention_unfused": []}


def test_attention_in_pieces_is_named():
    layers = read_layers(
        "\n".join([line("gemm", "qk_1"), line("soft", "softmax_1 pv_1"), line("mha", "qk_2 softmax_2 pv_2")])
    )
    found = fusion(layers, [FIRST, SECOND], stages=0)
    assert (found.expected, found.fused, found.unfused) == (2, 1, ("pv_1",))


def test_a_region_that_was_not_taken_apart_proves_nothing():
    everything = "qk_1 softmax_1 pv_1 qk_2 softmax_2 pv_2"
    assert fusion(read_layers(line("{ForeignNode[a...z]}", everything)), [FIRST, SECOND], 0).fused is None
    assert fusion(read_layers(line("region", everything)), [FIRST, SECOND], 0).fused == 0
    assert fusion([], [FIRST], 0).as_built()["attention_fused"] is None


def test_open_attention_beyond_the_stages_counts_as_unfused():
    layers = read_layers(line("mha_1", "qk_1 softmax_1 pv_1"))
    assert fusion(layers, [FIRST, STAGE], stages=1).unfused == ()
    assert fusion(layers, [FIRST, STAGE], stages=0).unfused == ("pv_3",)


def test_products_in_the_asked_type_are_proved():
    layers = read_layers("\n".join([line("gemm", "qk_1"), line("prepare", "pv_1", "Float"), line("gemm2", "pv_1")]))
    assert check_engine_precision(layers, frozenset({"qk_1", "pv_1"}), "fp16") == {"asked": 2, "proved": 2}
    assert check_engine_precision([], frozenset({"qk_1"}), "fp16") is None
    assert check_engine_precision(layers, frozenset(), "fp32") is None


@pytest.mark.parametrize("precision", ["fp16", "bf16"])
def test_an_engine_in_float32_is_an_error(precision):
    layers = read_layers(
        "\n".join([line("gemm", "qk_1", "Float"), line("gemm2", "pv_1", {"fp16": "Half"}.get(precision, "BFloat16"))])
    )
    with pytest.raises(
        GateFailed, match=rf"{precision} was asked for, but 1 of 2 matrix products run in float32.*qk_1"
    ):
        check_engine_precision(layers, frozenset({"qk_1", "pv_1"}), precision)


@pytest.mark.parametrize("precision, kind", [("int8", "Int8"), ("fp8", "FP8")])
def test_quantised_products_must_not_run_in_anything_wider(precision, kind):
    """What comes after a product reads its result in 16 bits and carries its name too."""
    rest = line("scale", "qk_1 pv_1", "Half")
    layers = read_layers("\n".join([line("gemm", "qk_1", kind), line("gemm2", "pv_1", kind), rest]))
    products = frozenset({"qk_1", "pv_1"})
    assert check_engine_precision(layers, products, precision) == {"asked": 2, "proved": 2}
    for wider in ("Half", "BFloat16", "Float"):
        layers = read_layers("\n".join([line("gemm", "qk_1", kind), line("gemm2", "pv_1", wider)]))
        with pytest.raises(GateFailed, match=rf"{precision} was asked for, but 1 of 2 .* run in a wider type.*pv_1"):
            check_engine_precision(layers, products, precision)
