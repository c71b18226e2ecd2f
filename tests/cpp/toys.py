"""Engines so small that opening them is quick: logits are the channels' means, kept tokens the two largest of them."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from tests.cpp.conftest import reseal

SIZE = 16


def interface(dtype: str) -> dict[str, object]:
    """The entries of a manifest that say what goes in and what comes out."""
    return {"outputs": ["logits", "kept_1"], "input": {"name": "images", "dtype": dtype, "size": SIZE}}


def expected(images: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """What a toy gives, with kept tokens ascending."""
    logits = images.mean((2, 3), dtype=np.float32)
    return logits, np.sort(np.argsort(-logits, axis=1)[:, :2], axis=1).astype(np.int32)


def openvino_toy(directory: Path, like: Path, dtype: str = "float32") -> Path:
    """The toy for OpenVINO, with the manifest of `like` fitted to it."""
    import openvino
    from openvino import opset13 as op

    images = op.parameter([-1, 3, SIZE, SIZE], np.dtype(dtype), name="images")
    logits = op.reduce_mean(op.convert(images, "f32"), np.array([2, 3]), False)
    kept = op.topk(logits, np.array(2), 1, "max", "value", index_element_type="i32")
    for output, name in ((images.output(0), "images"), (logits.output(0), "logits"), (kept.output(1), "kept_1")):
        output.tensor.set_names({name})
    directory.mkdir()
    model = openvino.Model([logits.output(0), kept.output(1)], [images])
    openvino.save_model(model, directory / "model.xml", compress_to_fp16=False)
    return reseal(directory, like, backend="openvino", provider="CPU", settings={}, **interface(dtype))
