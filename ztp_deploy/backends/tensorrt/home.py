"""Where a plan may be opened: the GPU and the release that it was built for."""

from __future__ import annotations

from pathlib import Path

from ztp_deploy import environment
from ztp_deploy.backends.tensorrt.library import Library
from ztp_deploy.backends.tensorrt.settings import Settings
from ztp_deploy.errors import MissingSoftware
from ztp_deploy.manifest import EngineManifest

_AMPERE = (8, 0)
_FP8_CAPABILITY = (8, 9)


def check_gpu(precision: str) -> None:
    """Raises MissingSoftware where the GPU that is here has no instructions for the precision."""
    here = environment.gpus()
    if precision == "fp8" and here and _numbers(here[0].compute_capability) < _FP8_CAPABILITY:
        raise MissingSoftware(
            f"fp8 needs a GPU of compute capability 8.9 or newer; this is {here[0].name} "
            f"({here[0].compute_capability}).",
            "Use int8 or fp16.",
        )


def check_home(directory: Path, manifest: EngineManifest, library: Library, version: str, settings: Settings) -> None:
    """Raises MissingSoftware for a plan of another GPU or version: the library would say it worse, or crash."""
    here = environment.gpus()
    if not here:
        raise MissingSoftware(f"{directory} needs an NVIDIA GPU, and none was found.", "Open it where there is one.")
    check_gpu(manifest.precision)
    if not _opens(manifest.backend_version, version, settings.version_compatible):
        known = settings.version_compatible or library.portable
        raise MissingSoftware(
            f"{directory} was built with {library.title} {manifest.backend_version}; this is {version}.",
            "Build it again with this release." if known else "Build it again, or build with version_compatible.",
        )
    if settings.hardware_compatible == "ampere_plus" and _numbers(here[0].compute_capability) < _AMPERE:
        raise MissingSoftware(
            f"{directory} was built for GPUs of compute capability 8.0 or newer; "
            f"this is {here[0].name} ({here[0].compute_capability}).",
            "Build it again on this GPU.",
        )
    home = manifest.built.get("gpu")
    if home is None or settings.hardware_compatible == "ampere_plus":
        return
    same = here[0].compute_capability == home["compute_capability"]
    if not same or (settings.hardware_compatible == "none" and here[0].name != home["name"]):
        raise MissingSoftware(
            f"{directory} was built for {home['name']} (compute capability {home['compute_capability']}); "
            f"this is {here[0].name} ({here[0].compute_capability}).",
            "Build it again on this GPU, or build with hardware_compatible.",
        )


def _opens(built: str, here: str, version_compatible: bool) -> bool:
    """Whether a plan opens in this release: the very one, or where built for it a later one, 11 also after 10.

    A wheel's `.post1` is not part of the library's version. What opens across major versions: TensorRT's support matrix.
    """
    one, other = _numbers(built), _numbers(here)
    if not version_compatible:
        return one == other
    return one[:2] <= other[:2] and (one[0] == other[0] or (one[0], other[0]) == (10, 11))


def _numbers(version: str) -> tuple[int, ...]:
    return tuple(int(part) for part in version.split(".") if part.isdigit())
