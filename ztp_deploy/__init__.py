"""ztp_deploy: token-pruned Vision Transformers in production.

Prune a Vision Transformer's tokens without training (fixed counts per layer), export it, build engines,
prove that they still do what the eager model does, measure what was gained. Nothing heavy is loaded
before it is used, and serving an engine uses none of what made it.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

if TYPE_CHECKING:
    from ztp_deploy.backends import Engine, ParityWarning, build, load_engine
    from ztp_deploy.backends.base import Session
    from ztp_deploy.errors import (
        BadRequest,
        BuildFailed,
        DamagedFiles,
        GateFailed,
        MissingSoftware,
        WriteFailed,
        ZtpError,
    )
    from ztp_deploy.evidence.images import ImageSet, load_images
    from ztp_deploy.evidence.latency import LatencyReport, measure_latency
    from ztp_deploy.evidence.load import LoadReport, measure_load
    from ztp_deploy.evidence.parity import ParityReport, check_parity
    from ztp_deploy.evidence.selftest import SelfTest, repeat_selftest
    from ztp_deploy.exporters import Artifact, export
    from ztp_deploy.models import RandomWeightsWarning, load_model
    from ztp_deploy.plan import Plan
    from ztp_deploy.planning import make_plan
    from ztp_deploy.pruning.prune import PrunedModel, prune
    from ztp_deploy.pruning.trace import TokenTrace, trace_tokens
    from ztp_deploy.source import ModelSize, Preprocessing

_HOMES = {
    "Artifact": "ztp_deploy.exporters",
    "BadRequest": "ztp_deploy.errors",
    "BuildFailed": "ztp_deploy.errors",
    "DamagedFiles": "ztp_deploy.errors",
    "Engine": "ztp_deploy.backends",
    "GateFailed": "ztp_deploy.errors",
    "ImageSet": "ztp_deploy.evidence.images",
    "LatencyReport": "ztp_deploy.evidence.latency",
    "LoadReport": "ztp_deploy.evidence.load",
    "MissingSoftware": "ztp_deploy.errors",
    "ModelSize": "ztp_deploy.source",
    "ParityReport": "ztp_deploy.evidence.parity",
    "ParityWarning": "ztp_deploy.backends",
    "Plan": "ztp_deploy.plan",
    "Preprocessing": "ztp_deploy.source",
    "PrunedModel": "ztp_deploy.pruning.prune",
    "RandomWeightsWarning": "ztp_deploy.models",
    "SelfTest": "ztp_deploy.evidence.selftest",
    "Session": "ztp_deploy.backends.base",
    "TokenTrace": "ztp_deploy.pruning.trace",
    "WriteFailed": "ztp_deploy.errors",
    "ZtpError": "ztp_deploy.errors",
    "build": "ztp_deploy.backends",
    "check_parity": "ztp_deploy.evidence.parity",
    "export": "ztp_deploy.exporters",
    "load_engine": "ztp_deploy.backends",
    "load_images": "ztp_deploy.evidence.images",
    "load_model": "ztp_deploy.models",
    "make_plan": "ztp_deploy.planning",
    "measure_latency": "ztp_deploy.evidence.latency",
    "measure_load": "ztp_deploy.evidence.load",
    "prune": "ztp_deploy.pruning.prune",
    "repeat_selftest": "ztp_deploy.evidence.selftest",
    "trace_tokens": "ztp_deploy.pruning.trace",
}

_SERVING = frozenset(
    {
        *("load_engine", "Session", "Engine", "ParityWarning", "repeat_selftest", "SelfTest"),
        *("measure_latency", "LatencyReport", "measure_load", "LoadReport"),
        *("ZtpError", "BadRequest", "BuildFailed", "DamagedFiles", "GateFailed", "MissingSoftware", "WriteFailed"),
        *("Artifact", "ModelSize", "Plan", "Preprocessing"),
    }
)
"""What needs nothing of the extra `build`: all that serving takes, and records."""

__all__ = [
    "Artifact",
    "BadRequest",
    "BuildFailed",
    "DamagedFiles",
    "Engine",
    "GateFailed",
    "ImageSet",
    "LatencyReport",
    "LoadReport",
    "MissingSoftware",
    "ModelSize",
    "ParityReport",
    "ParityWarning",
    "Plan",
    "Preprocessing",
    "PrunedModel",
    "RandomWeightsWarning",
    "SelfTest",
    "Session",
    "TokenTrace",
    "WriteFailed",
    "ZtpError",
    "build",
    "check_parity",
    "export",
    "load_engine",
    "load_images",
    "load_model",
    "make_plan",
    "measure_latency",
    "measure_load",
    "prune",
    "repeat_selftest",
    "trace_tokens",
]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    if name not in _SERVING:
        import_module("ztp_deploy.extras").require(f"ztp.{name}")
    return getattr(import_module(_HOMES[name]), name)


def __dir__() -> list[str]:
    return sorted([*__all__, "__version__"])
