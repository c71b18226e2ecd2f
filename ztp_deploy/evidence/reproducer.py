"""A failed parity check as a case for Polygraphy, NVIDIA's own tool: one image, eager's logits, one command."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from torch import nn

from ztp_deploy.atomic import write_text
from ztp_deploy.backends import Engine
from ztp_deploy.evidence.images import ImageSet
from ztp_deploy.evidence.verdict import ParityReport
from ztp_deploy.exporters.graph import InferenceGraph
from ztp_deploy.pruning.prune import prune
from ztp_deploy.quiet import quiet

FOLDER = "polygraphy"
COMMANDS = {
    "onnxruntime": "polygraphy run model.onnx --onnxrt",
    "tensorrt": "polygraphy run model.plan --model-type engine --trt",
    "tensorrt_rtx": "POLYGRAPHY_USE_TENSORRT_RTX=1 polygraphy run model.plan --model-type engine --trt",
}
"""What Polygraphy can open of the back ends' folders."""


def write_reproducer(engine: Engine, model: nn.Module, pictures: ImageSet, report: ParityReport) -> Path | None:
    """Writes `evidence/polygraphy/run.sh` with inputs and outputs for the first image at fault, and returns it.

    Another program then says whether the engine is wrong, and the three files are what a bug report needs. None
    where Polygraphy knows no such engine or no image is at fault.
    """
    manifest = engine.manifest
    at_fault = [fault.image for edge in report.edges if edge.candidate == "engine" for fault in edge.faults]
    named = [image for image in at_fault if image is not None]
    if manifest.backend not in COMMANDS or not named:
        return None
    pixels = pictures.pixels[pictures.names.index(named[0])][None]
    graph = InferenceGraph(prune(model, manifest.plan), manifest.input.dtype)
    with torch.inference_mode():
        logits = graph(torch.from_numpy(np.ascontiguousarray(pixels)))[0].numpy()
    batch = manifest.batch.min
    folder = engine.evidence / FOLDER
    with quiet("polygraphy"):
        from polygraphy.comparator import RunResults
        from polygraphy.json import to_json

        results = RunResults()
        results.add([{"logits": logits.repeat(batch, 0)}], runner_name="eager PyTorch")
        write_text(folder / "outputs.json", results.to_json())
        write_text(folder / "inputs.json", to_json([{manifest.input.name: pixels.repeat(batch, 0)}]))
    tolerance = report.tolerance.logits * float(logits.std())
    script = folder / "run.sh"
    write_text(
        script,
        "#!/bin/sh\n"
        f"# {named[0]!r}: the engine's logits against eager PyTorch's, within {report.tolerance.logits:g} σ.\n"
        'cd "$(dirname "$0")/../.." || exit\n'
        f"{COMMANDS[manifest.backend]} --load-inputs evidence/{FOLDER}/inputs.json \\\n"
        f"    --load-outputs evidence/{FOLDER}/outputs.json --atol {tolerance:.3g} --rtol 0\n",
    )
    return script
