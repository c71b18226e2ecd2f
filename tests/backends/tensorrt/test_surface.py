"""The interface we call exists, as we call it, in TensorRT 10, in TensorRT 11 and in TensorRT-RTX."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest

from tests.backends.tensorrt import harness, needs_rtx
from tests.backends.tensorrt.surface import used_names
from ztp_deploy import environment

pytestmark = needs_rtx


def needs_bindings(major: int) -> None:
    if not (harness.bindings_folder(major) / "tensorrt_bindings").is_dir():
        pytest.skip(
            f"TensorRT {major}'s bindings are not in {harness.bindings_folder(major)}: make setup puts them there"
        )


def run(*arguments: str) -> dict:
    done = subprocess.run([sys.executable, "-m", *arguments], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
    return json.loads(done.stdout.splitlines()[-1])


def test_the_source_is_read():
    names = used_names()
    assert {"BuilderFlag.TF32", "BuilderFlag.STRIP_PLAN", "NetworkDefinitionCreationFlag.STRONGLY_TYPED"} <= names
    assert {"OnnxParser", "Runtime", "IProgressMonitor", "DataType.BF16", "LayerType.MATRIX_MULTIPLY"} <= names


@pytest.mark.parametrize("module, release", [("tensorrt", "10"), ("tensorrt", "11"), ("tensorrt_rtx", "1")])
def test_everything_we_touch_exists(module, release, tmp_path):
    if module == "tensorrt":
        needs_bindings(int(release))
    found = run("tests.backends.tensorrt.surface", module, release, str(tmp_path))
    assert found["version"].split(".")[0] == release
    assert found["lacking"] == []
    assert found["errors"] == []
    # The check sees what is wrong: a flag and a method that are not there, wrong counts and types of arguments.
    assert found["invented"] == ["BuilderFlag.FASTER"]
    assert found["mistakes_found"] == 3


def test_release_11s_own_interface_builds(artifact, tmp_path):
    """The back end's `tensorrt` path, through the real bindings, to the serialised plan and its proofs."""
    needs_bindings(11)
    built = run("tests.backends.tensorrt.standard", str(artifact.directory), str(tmp_path))
    assert built["version"].startswith("11.")
    assert built["fp16"]["attention_fused"] == built["fp16"]["attention_expected"] == 1
    assert built["fp16"]["engine_products"]["proved"] == built["fp16"]["matrix_products"] == 33
    assert built["fp32"]["attention_fused"] == 0
    assert built["gpu"] == {"name": "NVIDIA Test", "compute_capability": "8.9"}
    assert built["files"] == ["audit.plan", "model.plan"]
    assert "Unsupported reduction type" in built["refused"]
    for precision in ("int8", "fp8") if environment.installed("nvidia-modelopt") else ():
        assert built[precision]["engine_products"] == {"asked": 24, "proved": 24}
        assert built[precision]["matrix_products"] == 24
        assert built[precision]["attention_fused"] == 1
