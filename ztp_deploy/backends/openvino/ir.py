"""OpenVINO's model as a graph: what stays in float32, what is quantised, what precision came out."""

from __future__ import annotations

import xml.etree.ElementTree as ElementTree
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ztp_deploy.backends.openvino.attention import is_attention
from ztp_deploy.errors import BadRequest, BuildFailed, MissingSoftware, first_line
from ztp_deploy.quiet import quiet

_MATRIX_LAYERS = frozenset({"MatMul", "FullyConnected", "Convolution"})
_NOTES = ("layerType", "runtimePrecision", "outputPrecisions", "originalLayersNames")
_MATRIX_OPERATIONS = frozenset({"MatMul", "Convolution"})
_MOVES = frozenset({"Gather", "Reshape", "Slice", "Squeeze", "StridedSlice", "Transpose", "Unsqueeze", "VariadicSplit"})
_WEIGHING = frozenset({"Divide", "Multiply", "Reshape", "Unsqueeze"})
_TOO_SMALL = 1e-30
"""Added to a score, it changes no digit of it."""


def outside_the_tokens_way(model: Any) -> set[str]:
    """Names of the operations on float values that logits depend on through indices alone, and of the classifier.

    The same rule as exporters.precision has for ONNX graphs: scores of a selection and the
    last product before the logits.
    """
    [logits] = [result for result in model.get_results() if "logits" in result.output(0).get_names()]
    way = _back(logits, lambda operation: True)
    classifier = _back(logits, lambda operation: operation.get_type_name() not in _MATRIX_OPERATIONS)
    floats = [operation for operation in model.get_ops() if _computes_floats(operation)]
    return {
        operation.get_friendly_name()
        for operation in floats
        if operation.get_friendly_name() not in way or operation.get_friendly_name() in classifier
    }


def fuse(model: Any) -> None:
    """The graph's own simplifications, done now: what they fuse when a plugin compiles loses its float32 mark."""
    from openvino._offline_transformations import apply_moc_transformations

    apply_moc_transformations(model, cf=False)


def read_bf16(model: Any, scores: set[str]) -> set[str]:
    """Lets scores read what is in bf16 anyway as it is, in place; names of the operations that then need no mark.

    They move what lies on the tokens' way, or multiply two operands that bf16 holds, and sum in float32: likenesses
    of features, and votes along the attention by a start vector and a mask. Marked, each would first copy its operands
    into float32. Of the start vector bf16 rounds the class token's share, by 0.4 % at most.
    """
    moved: set[str] = set()
    products: set[str] = set()
    zero: Any = None

    def held(value: Any) -> bool:
        source = value.get_node()
        known = source.get_type_name() not in ("Constant", "Parameter", "ZeroTPruneStage")
        return known and source.get_friendly_name() not in scores - moved

    for operation in model.get_ordered_ops():
        name, kind = operation.get_friendly_name(), operation.get_type_name()
        if name not in scores:
            continue
        if kind in _MOVES and held(operation.input_value(0)):
            moved.add(name)
        elif kind == "MatMul":
            first, second = operation.input_values()
            if held(second) and (held(first) or (is_attention(second) and _from_constants(_undivided(first)))):
                products.add(name)
                if not held(first):
                    products |= _made_for_it(first) & scores
                zero = zero if zero is not None else _zero(model)
                _give_out_float32(operation, zero)
    return moved | products


def _made_for_it(weights: Any) -> set[str]:
    """Names of the operations that make a vote's weights and are read by nothing else: bf16 rounds what they give."""
    found: set[str] = set()
    while len(weights.get_target_inputs()) == 1 and weights.get_node().get_type_name() in _WEIGHING:
        found.add(weights.get_node().get_friendly_name())
        weights = weights.get_node().input_value(0)
    return found


def keep_float32(path: Path, names: set[str]) -> None:
    """Marks operations of a saved model, so that no plugin computes them in a lower precision."""
    tree = ElementTree.parse(path)
    for layer in tree.iterfind("layers/layer"):
        if layer.get("name") not in names:
            continue
        notes = layer.find("rt_info")
        if notes is None:
            notes = ElementTree.Element("rt_info")
            layer.insert(0 if layer.find("data") is None else 1, notes)
        ElementTree.SubElement(
            notes, "attribute", name="DisablePrecisionConversion", version="0", value="dynamic:bf16,f16"
        )
    tree.write(path)


def quantised(model: Any, images: NDArray[Any] | None, untouched: set[str], advance: Callable[[float], None]) -> Any:
    """The model with its products in int8, calibrated on images [M, 3, H, W]; scores and classifier stay as they are.

    Raises BadRequest without images, MissingSoftware without NNCF, and BuildFailed.
    """
    if images is None or not len(images):
        raise BadRequest("int8 is calibrated on images and none were given.", "Give calibration images [M, 3, H, W].")
    nncf = _nncf()

    def told(image: NDArray[Any]) -> NDArray[Any]:
        advance(0.6 / len(images))
        return image[None]

    present = {operation.get_friendly_name() for operation in model.get_ops()}
    with quiet("nncf", "torch.utils.cpp_extension"):  # the latter looks for CUDA when NNCF imports it
        try:
            return nncf.quantize(
                model,
                nncf.Dataset(list(images), told),
                model_type=nncf.ModelType.TRANSFORMER,
                preset=nncf.QuantizationPreset.MIXED,
                subset_size=len(images),
                ignored_scope=nncf.IgnoredScope(names=sorted(untouched & present)),
            )
        except Exception as error:  # it raises whatever OpenVINO and NumPy do, too
            raise BuildFailed(
                f"NNCF could not quantise the model: {first_line(error)}.", "Nothing was kept. Use bf16 or fp32."
            ) from error


def _nncf() -> Any:
    """The library, without torch's remark on CUDA that importing it calls forth. Raises MissingSoftware."""
    with quiet("torch.utils.cpp_extension"):
        try:
            import nncf
        except ImportError as error:
            raise MissingSoftware(
                "int8 needs nncf, which is not installed.", 'pip install "ztp_deploy[nncf]"'
            ) from error
    return nncf


def matrix_precisions(compiled: Any, scores: set[str], as_they_are: set[str]) -> tuple[dict[str, int], dict[str, int]]:
    """How many matrix products the compiled model computes in each precision, by its runtime's own account.

    First those on the way of the tokens, second those of the operations named in `scores`, of these as "bf16 to f32"
    what was chosen to multiply its operands `as_they_are`, and gives out float32.
    """
    way: Counter[str] = Counter()
    apart: Counter[str] = Counter()
    for operation in compiled.get_runtime_model().get_ops():
        notes = {name: operation.get_rt_info()[name].astype(str) for name in _NOTES if name in operation.get_rt_info()}
        if notes.get("layerType") in _MATRIX_LAYERS:
            names = set(notes.get("originalLayersNames", "").split(","))
            precision, given = notes["runtimePrecision"], notes["outputPrecisions"]
            if not names & scores:
                way[precision] += 1
            else:
                apart[f"{precision} to {given}" if names & as_they_are and given != precision else precision] += 1
    return dict(way), dict(apart)


def _back(result: Any, through: Callable[[Any], bool]) -> set[str]:
    """Names of operations from which a result is reached through float tensors."""
    found: set[str] = set()
    waiting = [result.input_value(0)]
    while waiting:
        value = waiting.pop()
        operation = value.get_node()
        if not value.get_element_type().is_real() or operation.get_friendly_name() in found:
            continue
        found.add(operation.get_friendly_name())
        if through(operation):
            waiting.extend(operation.input_values())
    return found


def _undivided(value: Any) -> Any:
    """A vote's weights without the row sums that `divide_late` divided them by."""
    return value.get_node().input_value(0) if value.get_node().get_type_name() == "Divide" else value


def _from_constants(value: Any) -> bool:
    """Whether constants and integers alone decide a float value."""
    found = [value.get_node()]
    seen: set[str] = set()
    while found:
        operation = found.pop()
        name = operation.get_friendly_name()
        if name in seen:
            continue
        seen.add(name)
        if operation.get_type_name() == "Parameter" or operation.get_type_name() in _MATRIX_OPERATIONS:
            return False
        found.extend(i.get_node() for i in operation.input_values() if i.get_element_type().is_real())
    return True


def _zero(model: Any) -> Any:
    """A zero [1, 1, 1, 1] that no simplification knows to be constant: whether a pixel is less than itself."""
    from openvino import opset13 as opset

    [images] = model.inputs
    pixel = opset.slice(images, *(np.array([number] * 4) for number in (0, 1, 1)))
    return opset.convert(opset.less(pixel, pixel), "f32").output(0)


def _give_out_float32(product: Any, zero: Any) -> None:
    """OpenVINO gives a product of bf16 out in float32 only where a float32 operation is fused with it."""
    from openvino import opset13 as opset

    readers = list(product.output(0).get_target_inputs())
    names = product.output(0).get_names()
    first = product.input_value(0)
    if first.get_node().get_type_name() == "Constant":
        # It takes constants for float32 and the other operand with them.
        product.input(0).replace_source_output(opset.add(first, zero).output(0))
    sums = opset.add(product, np.float32(_TOO_SMALL))
    sums.set_friendly_name(f"{product.get_friendly_name()}_in_float32")
    for reader in readers:
        reader.replace_source_output(sums.output(0))
    product.output(0).set_names(set())
    sums.output(0).set_names(names)


def _computes_floats(operation: Any) -> bool:
    passive = operation.get_type_name() in ("Parameter", "Constant", "Result")
    return not passive and any(output.get_element_type().is_real() for output in operation.outputs())
