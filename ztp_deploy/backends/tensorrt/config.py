"""The builder's configuration: flags, profile, limits, timing cache."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ztp_deploy.backends.tensorrt import timing_cache
from ztp_deploy.backends.tensorrt.library import Library, member
from ztp_deploy.backends.tensorrt.settings import Settings
from ztp_deploy.errors import BadRequest, WriteFailed
from ztp_deploy.manifest import BatchRange

if TYPE_CHECKING:
    import tensorrt


def configure(trt: Any, library: Library, config: tensorrt.IBuilderConfig, settings: Settings) -> None:
    """Sets what `settings` say. Raises BadRequest for what this library lacks."""
    # float32 means float32 here; left to itself TensorRT computes its products in TF32.
    config.clear_flag(trt.BuilderFlag.TF32)
    # Without it the engine does not say which nodes its layers carry.
    config.profiling_verbosity = trt.ProfilingVerbosity.DETAILED
    config.builder_optimization_level = settings.optimization_level
    if settings.workspace_mib is not None:
        config.set_memory_pool_limit(trt.MemoryPoolType.WORKSPACE, settings.workspace_mib << 20)
    if settings.version_compatible:
        config.set_flag(member(trt.BuilderFlag, "VERSION_COMPATIBLE", "version_compatible"))
    if settings.refit:
        if str(trt.__version__).startswith("11.3."):
            raise BadRequest(
                f"refit=true was asked for, and {library.title} {trt.__version__} may lose a bias of what can be refitted.",
                "Install release 11.4, or leave the setting out.",
            )
        config.set_flag(member(trt.BuilderFlag, "REFIT", "refit"))
    if settings.strip_plan:
        config.set_flag(member(trt.BuilderFlag, "STRIP_PLAN", "strip_plan"))
    if settings.hardware_compatible == "ampere_plus":
        level = member(trt.HardwareCompatibilityLevel, "AMPERE_PLUS", "hardware_compatible=ampere_plus")
        config.hardware_compatibility_level = level
    elif settings.hardware_compatible == "same_compute_capability":
        level = member(
            trt.HardwareCompatibilityLevel,
            "SAME_COMPUTE_CAPABILITY",
            "hardware_compatible=same_compute_capability",
        )
        config.hardware_compatibility_level = level


def add_profile(
    builder: tensorrt.Builder,
    network: tensorrt.INetworkDefinition,
    config: tensorrt.IBuilderConfig,
    batch: BatchRange,
) -> None:
    """The batch range as an optimisation profile; a static network has none."""
    images: tensorrt.ITensor = network.get_input(0)
    rest = tuple(images.shape)[1:]
    if images.shape[0] != -1:
        return
    profile: tensorrt.IOptimizationProfile = builder.create_optimization_profile()
    profile.set_shape(images.name, (batch.min, *rest), (batch.opt, *rest), (batch.max, *rest))
    config.add_optimization_profile(profile)


def use_timings(config: tensorrt.IBuilderConfig, path: Path) -> None:
    """Hands the builder the timings of earlier builds, or none where it does not trust those."""
    cache = _timings(config, timing_cache.read(path))
    if not config.set_timing_cache(cache, ignore_mismatch=False):
        config.set_timing_cache(_timings(config, b""), ignore_mismatch=False)


def keep_timings(config: tensorrt.IBuilderConfig, path: Path) -> None:
    """Adds what this build timed to the file; a folder that cannot be written costs time, not the build."""

    def combined(standing: bytes) -> bytes:
        mine: tensorrt.ITimingCache = config.get_timing_cache()
        cache = _timings(config, standing)
        # What cannot be combined with is of no use to any later build: mine takes its place.
        return bytes((cache if cache.combine(mine, ignore_mismatch=False) else mine).serialize())

    try:
        timing_cache.update(path, combined)
    except Exception as error:  # of the file system, or the bindings' own where the library gave no cache
        cause = error.__cause__ if isinstance(error, WriteFailed) else error
        reason = getattr(cause, "strerror", None) or str(cause)
        warnings.warn(f"TensorRT's timings were not kept in {path}: {reason}.", stacklevel=2)


def _timings(config: tensorrt.IBuilderConfig, data: bytes) -> tensorrt.ITimingCache:
    """A cache of those timings, an empty one where they are damaged."""
    cache: tensorrt.ITimingCache | None = config.create_timing_cache(data)
    return config.create_timing_cache(b"") if cache is None else cache
