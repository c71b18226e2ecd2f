"""TensorRT-RTX inside ONNX Runtime: NVIDIA's plugin provider, found, registered and given to a session.

Never run here: this is written against the plugin's and ONNX Runtime's interfaces and tested with stand-ins.
"""

from __future__ import annotations

from functools import cache
from typing import Any

from ztp_deploy import environment
from ztp_deploy.errors import MissingSoftware, first_line
from ztp_deploy.manifest import ArtifactManifest, EngineManifest

PROVIDER = "NvTensorRTRTXExecutionProvider"
PACKAGE = "onnxruntime-ep-nv-tensorrt-rtx"
PRECISIONS = ("fp16", "bf16")
"""Not fp32: the plugin has no switch for TF32, so what it computes in could not be promised."""


def device() -> Any:
    """The first GPU that the plugin takes. Raises MissingSoftware where package, library or GPU is missing."""
    import onnxruntime as ort

    if not environment.gpus():
        raise MissingSoftware("provider=tensorrt_rtx needs an NVIDIA RTX GPU, and none was found.", "Leave it out.")
    register()
    found = [device for device in ort.get_ep_devices() if device.ep_name == PROVIDER]
    if not found:
        raise MissingSoftware(
            f"TensorRT-RTX's provider takes none of this machine's GPUs ({environment.gpus()[0].name}).",
            "It wants compute capability 8.6, 8.9 or 12.0 and newer; leave provider=tensorrt_rtx out.",
        )
    return found[0]


@cache
def register() -> None:
    """Makes the plugin known to ONNX Runtime, once a process. Raises MissingSoftware."""
    import onnxruntime as ort

    try:
        import onnxruntime_ep_nv_tensorrt_rtx as plugin
    except ImportError as error:
        raise MissingSoftware(
            f"provider=tensorrt_rtx needs {PACKAGE}, which is not installed.", f"pip install {PACKAGE}"
        ) from error
    if not hasattr(ort, "register_execution_provider_library"):
        raise MissingSoftware(
            f"ONNX Runtime {ort.__version__} takes no plugins; provider=tensorrt_rtx needs 1.24 or newer.",
            "pip install --upgrade onnxruntime-gpu",
        )
    try:
        ort.register_execution_provider_library(PROVIDER, plugin.get_library_path())
    except Exception as error:  # ONNX Runtime's own classes, and FileNotFoundError of the plugin
        reason = first_line(error)
        raise MissingSoftware(
            f"ONNX Runtime cannot load TensorRT-RTX's provider: {reason}.",
            f"Check the driver, or install it whole: pip install --force-reinstall {PACKAGE}",
        ) from error


def use(options: Any, manifest: ArtifactManifest | EngineManifest) -> None:
    """Gives a session to the plugin alone, with the engine's batches as its profile."""
    shape = "x".join(map(str, (3, manifest.input.size, manifest.input.size)))
    profile: dict[str, str] = {}
    if isinstance(manifest, EngineManifest):
        batches = {"min": manifest.batch.min, "opt": manifest.batch.opt, "max": manifest.batch.max}
        profile = {
            f"nv_profile_{name}_shapes": f"{manifest.input.name}:{batch}x{shape}" for name, batch in batches.items()
        }
    options.add_provider_for_devices([device()], profile)
    # Otherwise nodes that the plugin does not take would run on the CPU and nobody would know.
    options.add_session_config_entry("session.disable_cpu_ep_fallback", "1")
