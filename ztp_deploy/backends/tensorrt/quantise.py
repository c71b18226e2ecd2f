"""int8 and fp8 as explicit Q/DQ in the graph, calibrated by NVIDIA's ModelOpt.

Quantised are the products of tokens with weights: projections of the attention and the MLP. Scores, attention
itself, the patch embedding and the classifier are not. Weights have a scale per output channel, tokens one per
tensor; all are symmetric, as TensorRT wants them.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import numpy_helper

from ztp_deploy import environment
from ztp_deploy.backends.base import BuildJob
from ztp_deploy.backends.tensorrt.graph import low_products
from ztp_deploy.backends.tensorrt.settings import Settings
from ztp_deploy.errors import BadRequest, BuildFailed, GateFailed, MissingSoftware, first_line
from ztp_deploy.exporters import vocabulary
from ztp_deploy.exporters.files import GRAPH_FILE
from ztp_deploy.exporters.fold import constants, drop_unread
from ztp_deploy.exporters.onnx import outgrows_message, save, with_audit
from ztp_deploy.exporters.precision import lower, weight_products
from ztp_deploy.exporters.vocabulary import QUANTISATION
from ztp_deploy.quiet import quiet

PACKAGE = "nvidia-modelopt"
SHARE = 0.4
"""Of a build's progress, what calibration takes."""
_OPERATORS = {"int8": ("MatMul", "Gemm", "Conv"), "fp8": ("MatMul", "Gemm")}
"""TensorRT has fp8 kernels for few convolutions."""
_SMALLEST_SCALE = 2.0**-24
"""The smallest number that fp16 has: rounded to 0, a scale would be refused."""


@dataclass(frozen=True)
class Calibration:
    """Images [M, 3, H, W], the precision they are run for, and how scales are found from what is seen."""

    images: NDArray[Any]
    precision: str
    method: str


@dataclass(frozen=True)
class Derived:
    """What the manifest says of a derived graph: how its scales were found, and what the user must not miss."""

    calibration: dict[str, Any]
    notes: list[str]


def require() -> None:
    """Raises MissingSoftware where ModelOpt is not installed."""
    if not environment.installed(PACKAGE):
        raise MissingSoftware(
            "int8 and fp8 are calibrated by NVIDIA's ModelOpt, which is not installed.",
            'pip install "ztp_deploy[modelopt]"',
        )


def derive(job: BuildJob, settings: Settings) -> Derived:
    """Writes `model.onnx` into the engine folder: the artifact's graph with Q/DQ, the rest of the way in 16 bits.

    Raises BadRequest without images, MissingSoftware without ModelOpt, BuildFailed where it fails, and GateFailed where nothing was quantised.
    """
    if job.calibration is None or not len(job.calibration):
        raise BadRequest(
            f"{job.precision} is calibrated on images and none were given.", "Give calibration images [M, 3, H, W]."
        )
    if job.precision == "fp8" and settings.calibration != "max":
        raise BadRequest("fp8 is calibrated by the largest values only.", "Leave calibration out, or use int8.")
    calibration = Calibration(job.calibration, job.precision, settings.calibration)
    manifest = job.artifact.manifest
    model = onnx.load(str(job.artifact.directory / GRAPH_FILE))
    wanted = [node.name for node in weight_products(model) if node.op_type in _OPERATORS[job.precision]]
    # As outputs the scores survive a tool that takes away what nothing reads.
    model = with_audit(model, manifest.audit)
    model = quantised(model, wanted, calibration, job.directory, lambda share: job.advance(share * SHARE))
    del model.graph.output[len(manifest.outputs) :]
    done = low_products(model, job.precision)
    model = lower(model, settings.float_precision)
    path = job.directory / GRAPH_FILE
    vocabulary.check(model, manifest.plan, path, quantised=True)
    save(model, path)
    notes = []
    if left := [name for name in wanted if name not in done]:
        notes.append(f"ModelOpt left {len(left)} of {len(wanted)} products in floating point: {', '.join(left)}.")
    if job.precision == "fp8" and not environment.gpus():
        notes.append("fp8 engines run on GPUs of compute capability 8.9 and newer (Ada, Hopper, Blackwell).")
    tool = f"{PACKAGE} {version(PACKAGE)}"
    return Derived({"tool": tool, "method": calibration.method, "images": len(calibration.images)}, notes)


def quantised(
    model: onnx.ModelProto,
    products: Sequence[str],
    calibration: Calibration,
    scratch: Path,
    advance: Callable[[float], None],
) -> onnx.ModelProto:
    """The float32 graph with Q/DQ around the operands of those products and of no others; it may leave some out.

    The images are run one by one on the CPU; `advance` is told shares that add up to 1. `scratch` takes files for a
    while. Raises MissingSoftware, BuildFailed, and GateFailed where nothing was quantised.
    """
    made = _calibrated(model, products, calibration, scratch, advance) if products else model
    done = low_products(made, calibration.precision) & set(products)
    if not done:
        raise GateFailed(
            f"{calibration.precision} was asked for, and none of {len(products)} products of tokens with weights "
            "could be quantised.",
            "Use fp16.",
        )
    _confine(made.graph, done)
    _raise_scales(made.graph)
    return made


def _calibrated(
    model: onnx.ModelProto,
    products: Sequence[str],
    calibration: Calibration,
    scratch: Path,
    advance: Callable[[float], None],
) -> onnx.ModelProto:
    """What ModelOpt makes of the graph when asked for those products.

    Its own choice of products, its fusing and its lowering to fp16 are not used: they know no scores. It rewrites
    the file it is given, so it gets one of its own; and it patches ONNX Runtime's quantiser for the whole process.
    """

    quantize = _modelopt()
    large = outgrows_message(model)
    with TemporaryDirectory(dir=scratch) as folder, quiet("modelopt", errors=calibration.method == "entropy"):
        source, target = Path(folder) / "float32.onnx", Path(folder) / "quantised.onnx"
        onnx.save_model(model, source, save_as_external_data=large)
        try:
            quantize(
                str(source),
                quantize_mode=calibration.precision,
                calibration_data_reader=_reader(model.graph.input[0].name, calibration.images, advance),
                calibration_method=calibration.method,
                calibration_eps=["cpu"],
                op_types_to_quantize=list(_OPERATORS[calibration.precision]),
                nodes_to_quantize=[f"{re.escape(name)}$" for name in products],
                high_precision_dtype="fp32",
                passes=[],
                use_external_data_format=large,
                output_path=str(target),
                log_level="CRITICAL",
            )
            return onnx.load(str(target))
        except Exception as error:  # it raises whatever ONNX Runtime, onnx and Python raise
            reason = first_line(error)
            raise BuildFailed(
                f"ModelOpt could not quantise the graph to {calibration.precision}: {reason}.",
                "Use fp16, or report this.",
            ) from error


def _modelopt() -> Any:
    require()
    try:
        with quiet("modelopt"):
            from modelopt.onnx.quantization import quantize
    except ImportError as error:
        reason = first_line(error)
        raise MissingSoftware(
            f"ModelOpt is installed but cannot be loaded: {reason}.", 'pip install "ztp_deploy[modelopt]"'
        ) from error
    return quantize


def _reader(name: str, images: NDArray[Any], advance: Callable[[float], None]) -> Any:
    """The images one by one, as ModelOpt and ONNX Runtime ask for them; each is told of once."""
    from onnxruntime.quantization import CalibrationDataReader

    class Reader(CalibrationDataReader):  # type: ignore[misc]
        def __init__(self) -> None:
            self.next = self.told = 0

        def get_first(self) -> dict[str, NDArray[Any]]:
            return {name: images[:1]}

        def get_next(self) -> dict[str, NDArray[Any]] | None:
            if self.next == len(images):
                return None
            self.next += 1
            if self.next > self.told:
                self.told = self.next
                advance(1 / len(images))
            return {name: images[self.next - 1 : self.next]}

        def rewind(self) -> None:
            self.next = 0

    return Reader()


def _confine(graph: onnx.GraphProto, products: frozenset[str]) -> None:
    """Gives every other node the tensor itself: ONNX Runtime hands the dequantised one to all who read it."""
    quantisers = {node.output[0]: node.input[0] for node in graph.node if node.op_type == "QuantizeLinear"}
    originals = {
        node.output[0]: quantisers[node.input[0]]
        for node in graph.node
        if node.op_type == "DequantizeLinear" and node.input[0] in quantisers
    }
    for node in graph.node:
        if node.name not in products and node.op_type not in QUANTISATION:
            for index, name in enumerate(node.input):
                node.input[index] = originals.get(name, name)
    drop_unread(graph, QUANTISATION)


def _raise_scales(graph: onnx.GraphProto) -> None:
    known = constants(graph)
    for name in {node.input[1] for node in graph.node if node.op_type in QUANTISATION}:
        scale = numpy_helper.to_array(known[name])
        known[name].CopyFrom(numpy_helper.from_array(np.maximum(scale, np.float32(_SMALLEST_SCALE)), name))
