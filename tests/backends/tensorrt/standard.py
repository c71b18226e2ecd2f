"""Run in a process of its own: the `tensorrt` back end on TensorRT 11's bindings, by way of the harness.

`python -m tests.backends.tensorrt.standard <artifact> <folder>` prints one JSON object.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import numpy as np
import onnx
from onnx import helper, numpy_helper

from tests.backends.tensorrt import harness
from ztp_deploy import backends, environment, exporters
from ztp_deploy.backends.base import BuildJob
from ztp_deploy.errors import BuildFailed
from ztp_deploy.manifest import BatchRange


def main(artifact: Path, folder: Path) -> None:
    harness.load(harness.bindings_folder(11), 11)
    backend = backends.get("tensorrt")
    # Pretended, for building alone: what is built here is never opened.
    environment.gpus = lambda: (environment.Gpu("NVIDIA Test", "8.9", 24.0),)  # type: ignore[assignment]
    float32 = exporters.load_artifact(artifact)
    float16 = exporters.convert(float32, "fp16", folder / "fp16")
    answer: dict[str, object] = {"version": backend.version()}

    def build(source: exporters.Artifact, name: str, precision: str = "", **settings: object) -> dict[str, object]:
        (folder / name).mkdir()
        job = BuildJob(
            artifact=source,
            directory=folder / name,
            device=backend.resolve_device("auto"),
            precision=precision or source.manifest.precision,
            batch=BatchRange.parse("1:2:4"),
            settings=backend.Settings(**{"timing_cache": False, **settings}).model_dump(),
            calibration=np.random.default_rng(0).standard_normal((2, 3, 96, 96), dtype=np.float32),
            advance=lambda share: None,
        )
        return backend.build(job)

    answer["fp32"] = build(float32, "plain", audit=False)
    answer["fp16"] = built = build(float16, "half", hardware_compatible="none", workspace_mib=512)
    answer["gpu"] = built["gpu"]
    answer["files"] = sorted(path.name for path in (folder / "half").iterdir())
    if environment.installed("nvidia-modelopt"):
        for precision in ("int8", "fp8"):
            answer[precision] = build(float32, precision, precision, audit=False)
    model = onnx.load(str(artifact / "model.onnx"))
    model.graph.initializer.append(numpy_helper.from_array(np.zeros((1, 10), np.int64), "index"))
    last = next(node for node in model.graph.node if "logits" in node.output)
    last.output[0] = "before"
    scatter = helper.make_node("ScatterElements", ["before", "index", "before"], ["logits"], name="s", reduction="add")
    model.graph.node.append(scatter)
    (folder / "bad").mkdir()
    onnx.save_model(model, str(folder / "bad" / "model.onnx"))
    try:
        build(exporters.Artifact(folder / "bad", float32.manifest), "refused", audit=False)
    except BuildFailed as error:
        answer["refused"] = str(error)
    print(json.dumps(answer))


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
