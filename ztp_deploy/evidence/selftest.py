"""The run that travels with an engine, so that another machine, without Python, can repeat it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ztp_deploy.atomic import write_bytes
from ztp_deploy.backends import EVIDENCE, load_engine
from ztp_deploy.evidence.parity import TOLERANCES
from ztp_deploy.manifest import manifest_sha256

SELFTEST_FILE = "selftest.safetensors"
_FULL_BATCH = 2
"""The smallest batch in which an engine could mix up images."""


def write_selftest(directory: Path | str, images: NDArray[Any]) -> Path:
    """Runs an engine on the first of `images` [M, 3, H, W] and keeps what it gave in `evidence/selftest.safetensors`.

    Tensors: `images`, `logits`, `kept_1` … ascending, and `assignment_1` …, which of them carries each patch.
    Metadata: `manifest_sha256`, and `tolerance` in units of an image's logit σ. Two images where the engine's batch range allows it. Raises what `load_engine` and `run` raise.
    """
    from safetensors.numpy import save

    folder = Path(directory)
    with load_engine(folder) as session:
        manifest = session.manifest
        batch = min(max(_FULL_BATCH, manifest.batch.min), manifest.batch.max)
        pixels = np.ascontiguousarray(np.resize(images, (batch, *images.shape[1:])))
        tensors = {"images": pixels, "logits": session.run(pixels)}
        for name, stages in (("kept", session.kept()), ("assignment", session.assignment())):
            for stage, tokens in enumerate(stages, start=1):
                tensors[f"{name}_{stage}"] = np.ascontiguousarray(tokens, dtype=np.int32)
    metadata = {
        "manifest_sha256": manifest_sha256(folder),
        "tolerance": repr(TOLERANCES[manifest.precision].logits),
    }
    path = folder / EVIDENCE / SELFTEST_FILE
    write_bytes(path, save(tensors, metadata))
    return path
