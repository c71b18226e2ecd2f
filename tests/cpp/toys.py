"""Engines so small that opening them is quick: logits are the channels' means, kept tokens the two largest of them."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx.parser

from tests.cpp.conftest import reseal
from ztp_deploy.backends import get

SIZE = 16


def toy(back_end: str, directory: Path, like: Path, dtype: str = "float32") -> Path:
    """The toy for a back end, with the manifest of `like` fitted to it."""
    return {"openvino": openvino_toy, "onnxruntime": onnxruntime_toy}[back_end](directory, like, dtype)


def interface(dtype: str, outputs: Sequence[str] = ("logits", "kept_1")) -> dict[str, object]:
    """The entries of a manifest that say what goes in and what comes out."""
    return {"outputs": list(outputs), "input": {"name": "images", "dtype": dtype, "size": SIZE}}


def expected(images: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """What a toy gives, with kept tokens ascending."""
    logits = images.mean((2, 3), dtype=np.float32)
    return logits, np.sort(np.argsort(-logits, axis=1)[:, :2], axis=1).astype(np.int32)


def openvino_toy(directory: Path, like: Path, dtype: str = "float32") -> Path:
    """The toy for OpenVINO, with the manifest of `like` fitted to it."""
    from openvino import opset13 as op

    images = op.parameter([-1, 3, SIZE, SIZE], np.dtype(dtype), name="images")
    logits = op.reduce_mean(op.convert(images, "f32"), np.array([2, 3]), False)
    kept = op.topk(logits, np.array(2), 1, "max", "value", index_element_type="i32")
    return _save(directory, like, images, {"logits": logits.output(0), "kept_1": kept.output(1)}, dtype)


def telling_toy(directory: Path, like: Path, kept: Sequence[np.ndarray], merged: Sequence[np.ndarray]) -> Path:
    """One for OpenVINO that says of its tokens what it is told, whatever the images: [B, k] int32 by stage."""
    from openvino import opset13 as op

    images = op.parameter([-1, 3, SIZE, SIZE], np.dtype("float32"), name="images")
    outputs = {"logits": op.reduce_mean(images, np.array([2, 3]), False).output(0)}
    for kind, stages in (("kept", kept), ("merged", merged)):
        outputs |= {f"{kind}_{i}": op.constant(stage).output(0) for i, stage in enumerate(stages, start=1)}
    return _save(directory, like, images, outputs, "float32")


def _save(directory: Path, like: Path, images: Any, outputs: dict[str, Any], dtype: str) -> Path:
    import openvino

    for name, output in {"images": images.output(0), **outputs}.items():
        output.tensor.set_names({name})
    directory.mkdir()
    model = openvino.Model(list(outputs.values()), [images])
    openvino.save_model(model, directory / "model.xml", compress_to_fp16=False)
    described = {"backend": "openvino", "provider": "CPU", "settings": {}, "backend_version": get("openvino").version()}
    return reseal(directory, like, **described, **interface(dtype, list(outputs)))


def brittle_toy(directory: Path, like: Path) -> Path:
    """One for ONNX Runtime whose run fails, as the library logs, where a pixel is 9 or more."""
    graph = """
        <ir_version: 10, opset_import: ["" : 18]>
        toy (float[batch, 3, %d, %d] images) => (float[batch, 3] logits, int32[batch, 2] kept_1)
        <int64[2] axes = {2, 3}, int64[1] two = {2}, float[9] zeros = {0, 0, 0, 0, 0, 0, 0, 0, 0}> {
            largest_pixel = ReduceMax <keepdims = 0> (images)
            index = Cast <to = 7> (largest_pixel)
            zero = Gather (zeros, index)
            means = ReduceMean <keepdims = 0> (images, axes)
            logits = Add (means, zero)
            largest, places = TopK <axis = 1> (logits, two)
            kept_1 = Cast <to = 6> (places)
        }"""
    return _onnx(directory, like, graph % (SIZE, SIZE), "float32")


def onnxruntime_toy(directory: Path, like: Path, dtype: str = "float32") -> Path:
    """The toy for ONNX Runtime, with the manifest of `like` fitted to it."""
    kind = {"float32": "float", "uint8": "uint8"}[dtype]
    graph = f"""
        <ir_version: 10, opset_import: ["" : 18]>
        toy ({kind}[batch, 3, {SIZE}, {SIZE}] images) => (float[batch, 3] logits, int32[batch, 2] kept_1)
        <int64[2] axes = {{2, 3}}, int64[1] two = {{2}}> {{
            floats = Cast <to = 1> (images)
            logits = ReduceMean <keepdims = 0> (floats, axes)
            largest, places = TopK <axis = 1> (logits, two)
            kept_1 = Cast <to = 6> (places)
        }}"""
    return _onnx(directory, like, graph, dtype)


def _onnx(directory: Path, like: Path, graph: str, dtype: str) -> Path:
    directory.mkdir()
    onnx.save_model(onnx.parser.parse_model(graph), str(directory / "model.onnx"))
    settings = {"threads": 1, "spin_between_runs": False}
    described = {"backend": "onnxruntime", "provider": "CPUExecutionProvider", "settings": settings}
    return reseal(directory, like, **described, **interface(dtype))
