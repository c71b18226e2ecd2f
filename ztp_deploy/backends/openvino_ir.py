"""OpenVINO's model as a graph: what stays in float32, what is quantised, what precision came out."""

from __future__ import annotations

import xml.etree.ElementTree as ElementTree
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

from numpy.typing import NDArray

from ztp_deploy.errors import BadRequest, MissingSoftware
from ztp_deploy.quiet import quiet

_MATRIX_LAYERS = frozenset({"MatMul", "FullyConnected", "Convolution"})
_NOTES = ("layerType", "runtimePrecision", "originalLayersNames")
_MATRIX_OPERATIONS = frozenset({"MatMul", "Convolution"})


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

    Raises BadRequest without images and MissingSoftware without NNCF.
    """
    if images is None or not len(images):
        raise BadRequest("int8 is calibrated on images and none were given.", "Give calibration images [M, 3, H, W].")
    nncf = _nncf()

    def told(image: NDArray[Any]) -> NDArray[Any]:
        advance(0.6 / len(images))
        return image[None]

    present = {operation.get_friendly_name() for operation in model.get_ops()}
    with quiet("nncf"):
        return nncf.quantize(
            model,
            nncf.Dataset(list(images), told),
            model_type=nncf.ModelType.TRANSFORMER,
            preset=nncf.QuantizationPreset.MIXED,
            subset_size=len(images),
            ignored_scope=nncf.IgnoredScope(names=sorted(untouched & present)),
        )


def _nncf() -> Any:
    """The library, without torch's remark on CUDA that importing it calls forth. Raises MissingSoftware."""
    with quiet("torch.utils.cpp_extension"):
        try:
            import nncf
        except ImportError as error:
            raise MissingSoftware("int8 needs nncf, which is not installed.", "pip install nncf") from error
    return nncf


def matrix_precisions(compiled: Any, scores: set[str]) -> tuple[dict[str, int], dict[str, int]]:
    """How many matrix products the compiled model computes in each precision, by its runtime's own account.

    First those on the way of the tokens, second those of the operations named in `scores`.
    """
    way: Counter[str] = Counter()
    apart: Counter[str] = Counter()
    for operation in compiled.get_runtime_model().get_ops():
        notes = {name: operation.get_rt_info()[name].astype(str) for name in _NOTES if name in operation.get_rt_info()}
        if notes.get("layerType") in _MATRIX_LAYERS:
            names = set(notes.get("originalLayersNames", "").split(","))
            (apart if names & scores else way)[notes["runtimePrecision"]] += 1
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


def _computes_floats(operation: Any) -> bool:
    passive = operation.get_type_name() in ("Parameter", "Constant", "Result")
    return not passive and any(output.get_element_type().is_real() for output in operation.outputs())
