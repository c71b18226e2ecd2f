"""What became of the graph: the built engine's layers, read from the builder's log or the engine inspector.

Both print one line a layer, which ends in the names of the ONNX nodes it carries:
`Name: …, LayerType: …, Inputs: [ { …, Datatype: Half, … } ], …, Metadata: [ONNX Layer: a][ONNX Layer: b]`.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from ztp_deploy.backends.tensorrt.graph import AttentionNodes
from ztp_deploy.errors import GateFailed

_LAYER = re.compile(r"Name: (?P<name>.*?), LayerType: (?P<kind>[^,]*), (?P<rest>.*)")
_CARRIED = re.compile(r"\[ONNX Layer: ([^\]]+)\]")
_READS = re.compile(r"Inputs: \[(?P<tensors>.*?)\](?=, (?:Constants|Outputs): )")
_TYPE = re.compile(r"Datatype: ([^,}]+)")
_IN_WORDS = {"FP32": "Float", "FP16": "Half", "BF16": "BFloat16", "Int8": "Int8", "FP8": "FP8"}
"""How older inspectors call a type, somewhere in `Format/Datatype: Row major linear FP16 format`."""
TYPES = {"fp32": "Float", "fp16": "Half", "bf16": "BFloat16", "int8": "Int8", "fp8": "FP8"}
_FLOAT32 = frozenset({"Float"})
_WIDER = {"fp16": _FLOAT32, "bf16": _FLOAT32} | dict.fromkeys(("int8", "fp8"), _FLOAT32 | {"Half", "BFloat16"})
"""What a product must not run in where it was asked for in the precision."""


@dataclass(frozen=True)
class Layer:
    """One layer of a built engine: the types it reads and the ONNX nodes it carries."""

    name: str
    reads: frozenset[str]
    carries: frozenset[str]


@dataclass(frozen=True)
class Fusion:
    """Attention that should have become one kernel each, and what did; None where the library did not say."""

    expected: int
    fused: int | None
    unfused: tuple[str, ...]

    def as_built(self) -> dict[str, Any]:
        """As the manifest records it."""
        return {
            "attention_expected": self.expected,
            "attention_fused": self.fused,
            "attention_unfused": list(self.unfused),
        }


def read_layers(text: str) -> list[Layer]:
    """The layers in a message of the builder, or in what the inspector prints line by line."""
    layers = []
    for line in text.split("\n"):  # splitlines() would also part at the separators that TensorRT puts between nodes
        found = _LAYER.search(line)
        # A region that was not taken apart carries everything and proves nothing.
        if found is None or "ForeignNode" in found["name"]:
            continue
        body, _, metadata = found["rest"].rpartition("Metadata: ")
        reads = _READS.search(body)
        layers.append(
            Layer(
                name=found["name"],
                reads=frozenset(map(_type, _TYPE.findall(reads["tensors"]))) if reads else frozenset(),
                carries=frozenset(_CARRIED.findall(metadata)),
            )
        )
    return layers


def _type(words: str) -> str:
    return next((_IN_WORDS[word] for word in words.split() if word in _IN_WORDS), words.split()[0])


def fusion(layers: Sequence[Layer], attentions: Sequence[AttentionNodes], stages: int) -> Fusion:
    """Holds the engine's layers against the graph's attentions.

    One is fused where a single layer carries both its products and its softmax, and no other attention. At most
    `stages` may be open, since the scores of a pruning stage read their probabilities.
    """
    closed = [attention for attention in attentions if not attention.shared]
    opened = [attention for attention in attentions if attention.shared]
    surplus = opened[: max(0, len(opened) - stages)]
    watched = sorted([*closed, *surplus], key=list(attentions).index)
    if not any(layer.carries for layer in layers):
        return Fusion(len(watched), None, ())
    softmaxes = {attention.softmax for attention in attentions}
    unfused = [
        attention.output
        for attention in watched
        if not any(
            attention.names <= layer.carries and layer.carries & softmaxes == {attention.softmax} for layer in layers
        )
    ]
    return Fusion(len(watched), len(watched) - len(unfused), tuple(unfused))


def check_engine_precision(layers: Sequence[Layer], low: frozenset[str], precision: str) -> dict[str, int] | None:
    """How many of the matrix products that were asked for in `precision` run in it; None where the library did not say.

    Raises GateFailed where one runs in a wider type: an fp16 request must not end in an fp32 engine.
    """
    if not low or not any(layer.carries for layer in layers):
        return None
    wanted = TYPES[precision]
    carriers = {name: [layer for layer in layers if name in layer.carries] for name in low}
    # Beside the product itself, layers that prepare an operand carry its node: one that reads the type is enough.
    proved = {name for name, found in carriers.items() if any(wanted in layer.reads for layer in found)}
    wider = _WIDER[precision]
    failed = sorted(name for name in low - proved if any(wider & layer.reads for layer in carriers[name]))
    if failed:
        raise GateFailed(
            f"{precision} was asked for, but {len(failed)} of {len(low)} matrix products run in "
            f"{'float32' if wider == _FLOAT32 else 'a wider type'}, the first being {failed[0]}.",
            "Do not ship this engine; build it again with another release of the library, or in fp32.",
        )
    return {"asked": len(low), "proved": len(proved)}
